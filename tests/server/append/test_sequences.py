"""How `ff_append` numbers frames, and what it does with those that are stored already."""

import json

import pytest

import ff_fast
from ff_fast.errors import MAX_INT

from ...heads import head_of
from ...reference_frames import run_of, varint
from ..streams import Stream, appended, live, log, number, patches, replaced, server_ms


def test_frames_are_numbered_densely_over_both_streams(stream, next_ms):
    assert stream.append(log(b"1", b"2"), live(b"3", b"4"), patches(b"{}", base=0))[1] == 5
    next_ms()
    assert stream.append(live(b"6"), log(b"7"), first=6)[1] == 7
    assert stream.payloads() == [b"1", b"2", b"3", b"4", b"{}", b"6", b"7"]
    ids = [frame.stream_id for frame in stream.frames()]
    assert [int(each.split("-")[1]) for each in ids] == list(range(1, 8))
    assert sorted(ids, key=lambda each: int(each.split("-")[0])) == ids


def test_the_milliseconds_of_ids_never_go_back(stream):
    ahead = server_ms(stream.raw) + 100_000
    stream.set_last(ms=ahead)
    assert stream.append(log(b"1"), live(b"2")) == (ahead, 2)
    assert stream.append(log(b"3"), first=3) == (ahead, 3)
    assert stream.payloads() == [b"1", b"2", b"3"]


def test_a_repeated_batch_is_a_success_with_what_is_stored(stream, next_ms):
    batches = [
        (1, log(b"1", b"2")),
        (3, live(b"3", b"4", b"5")),
        (6, live(b"6")),
        (7, patches(b'{"a":1}', b'{"b":2}', base=0)),
        (9, log(b"9")),
    ]
    answers = []
    for first, block in batches:
        answers.append(stream.append(block, first=first))
        next_ms()
    assert len({ms for ms, _ in answers}) == len(answers)
    for (first, block), answer in zip(batches, answers, strict=True):
        assert stream.repeated(block, first=first) == answer
    # Repeats that end inside a run stand under the id that readers have seen.
    assert stream.repeated(live(b"3", b"4"), first=3) == (answers[1][0], 4)
    assert stream.repeated(live(b"4"), first=4) == (answers[1][0], 4)
    assert stream.repeated(patches(b'{"a":1}', base=0), first=7) == (answers[3][0], 7)
    # And across batches.
    assert stream.repeated(log(*[b"x"] * 8), first=1) == (answers[3][0], 8)
    summary = stream.backend.read_summary(stream.eid)
    assert (json.loads(summary.document_json), summary.version) == ({"a": 1, "b": 2}, 2)


def test_an_old_frame_is_found_behind_many_others(stream, next_ms):
    first = stream.append(log(b"1"))
    next_ms()
    for at in range(2, 502):
        stream.append(live(b"x") if at % 2 else log(b"x"), first=at)
    assert stream.repeated(log(b"1")) == first


def test_a_duplicate_of_a_trimmed_frame_is_a_success_without_a_time(stream):
    stream.append(live(b"1"))
    stream.append(log(b"2"), first=2)
    stream.raw.delete(stream.live)
    assert stream.repeated(live(b"1")) == (0, 1)


BATCH = [
    ("log", b"1"), ("log", b"2"),
    ("live", b"3"), ("live", b"4"), ("live", b"5" * 200),
    ("patch", b'{"n":6}'), ("patch", b'{"l":{"x":7}}'), ("patch", b'{"n":8}'), ("patch", b'{"l":{"y":9}}'),
    ("log", b"10"), ("live", b"11"),
]  # fmt: skip


def batch_of(frames, before=0):
    """The blocks of consecutive frames of BATCH; *before* of them are in earlier batches."""
    blocks = []
    groups = []
    for kind, payload in frames:
        if groups and groups[-1][0] == kind:
            groups[-1][1].append(payload)
        else:
            groups.append((kind, [payload]))
    kinds = [kind for kind, _ in BATCH]
    at = before
    for kind, payloads in groups:
        prev = (b"prev", number(visible_at(at))) if at and kinds[at - 1] == "live" else ()
        if kind == "log":
            blocks.append(log(*payloads, extras=prev))
        elif kind == "live":
            blocks.append(live(*payloads))
        else:
            blocks.append(patches(*payloads, base=kinds[:at].count("patch"), fields=prev))
        at += len(payloads)
    return [*blocks, [b"H", number(visible_at(at)) if kinds[at - 1] == "live" else b""]]


def visible_at(count):
    """The last visible one of the first frames of BATCH."""
    return max((i + 1 for i in range(count) if BATCH[i][0] != "live"), default=0)


def shown(frames):
    return [(f.sequence, f.payload, f.mode, f.summary_version) for f in frames]


@pytest.mark.parametrize("stored", range(1, len(BATCH)))
def test_of_an_overlap_only_the_suffix_is_appended(unopened, raw, backend, stored):
    whole = Stream(raw, backend, f"whole-{unopened.eid[-12:]}")
    whole.open()
    assert whole.append(*batch_of(BATCH))[1] == len(BATCH)
    stream = unopened
    stream.open()
    stream.append(*batch_of(BATCH[:stored]))
    assert stream.append(*batch_of(BATCH))[1] == len(BATCH)
    assert shown(stream.frames()) == shown(whole.frames())
    assert stream.payloads() == [payload for _, payload in BATCH]
    visible = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert visible.gaps == ()
    assert shown(visible) == [row for row in shown(whole.frames()) if row[2] != "best_effort"]
    summary = stream.backend.read_summary(stream.eid)
    assert (summary.document_json, summary.version) == (b'{"n":8,"l":{"x":7,"y":9}}', 4)
    # The repeat of it all is a duplicate now.
    stream.repeated(*batch_of(BATCH))


@pytest.mark.parametrize("before", range(1, 7))
def test_an_overlap_that_begins_inside_what_is_stored(stream, before):
    stream.append(*batch_of(BATCH[:7]))
    assert stream.append(*batch_of(BATCH[before:], before), first=before + 1)[1] == len(BATCH)
    assert stream.payloads() == [payload for _, payload in BATCH]
    summary = stream.backend.read_summary(stream.eid)
    assert (summary.document_json, summary.version) == (b'{"n":8,"l":{"x":7,"y":9}}', 4)


@pytest.mark.parametrize("skip", [1, 44, 127, 128, 129, 171, 172, 173, 298, 299])
@pytest.mark.parametrize("summary", [False, True], ids=["live", "summary"])
def test_a_run_whose_count_takes_two_bytes_is_cut(stream, skip, summary):
    payloads = [b'{"n":%d}' % n for n in range(300)]

    def frames(upto):
        return patches(*payloads[:upto], base=0) if summary else live(*payloads[:upto])

    names = "head log live summary" if summary else "head live"
    ms, sequence = stream.append(frames(skip), names=names)
    assert sequence == skip
    end_ms, sequence = stream.append(frames(300), names=names)
    assert sequence == 300
    assert stream.payloads() == payloads
    assert [entry for entry, _ in stream.raw.xrange(stream.live)] == [
        b"%d-%d" % (ms, skip), b"%d-300" % end_ms,
    ]  # fmt: skip
    # A repeat that ends inside a run stands under the run's time.
    assert stream.repeated(frames(skip), names=names) == (ms, skip)
    inside = max(skip - 1, 1)
    assert stream.repeated(frames(inside), names=names) == (ms, inside)
    if summary:
        found = stream.backend.read_summary(stream.eid)
        assert (found.document_json, found.version) == (payloads[-1], 300)


def test_ages_of_frames_survive_a_cut(stream):
    stream.append(live(b"1", b"2"))
    stream.append(live(b"1", b"2", b"3", b"4", b"5"))
    third, fourth, fifth = stream.frames()[2:]
    assert [fourth.ts_ms - third.ts_ms, fifth.ts_ms - fourth.ts_ms] == [100, 100]


def test_a_cut_run_does_not_hide_a_hole_before_it(stream):
    stream.append(*batch_of(BATCH[:7]))
    stream.append(*batch_of(BATCH[:9]))
    # Frames 6 and 7 are lost: who reads durable frames alone must hear of it.
    entry = next(entry for entry, _ in stream.raw.xrange(stream.live) if entry.endswith(b"-7"))
    stream.raw.xdel(stream.live, entry)
    page = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert [frame.sequence for frame in page] == [1, 2, 8, 9]
    (gap,) = page.gaps
    assert gap.next_sequence == 8


BROKEN_RUNS = {
    "empty": b"",
    "count": varint(2) + run_of([b"1", b"2", b"3"])[1:],
    "cut": run_of([b"1", b"2", b"3"])[:-1],
    "longer": run_of([b"1", b"2", b"3"]) + b"x",
    "endless number": b"\x03" + b"\xff" * 400,
    "lengths beyond the end": b"\x03\xff\xff\x7f\x01\x01\x00\x00\x00abc",
}


@pytest.mark.parametrize("summary", [False, True], ids=["live", "summary"])
def test_a_run_that_cannot_be_cut_is_refused(stream, summary, subtests):
    stream.append(live(b"1"))
    block = patches(b"{}", b"{}", b"{}", base=0) if summary else live(b"1", b"2", b"3")
    at = 3 + 2 * int(block[2]) if summary else 2
    assert block[at][0] == 3
    for name, run in BROKEN_RUNS.items():
        with subtests.test(name):
            stream.refused("invalid_input", replaced(block, at, run))


def test_a_new_writer_does_not_swallow_frames_of_the_old_one(stream):
    stream.append(log(b"1", b"2", b"3"))
    stream.open(b"writer-2")
    # To writer-2 a sequence before its first is no duplicate: it has never written it.
    for first in (1, 3):
        error = stream.refused("sequence_gap", log(b"mine"), writer=b"writer-2", first=first)
        assert (error.expected, error.got) == (4, first)
    stream.refused("sequence_gap", log(b"a", b"b"), writer=b"writer-2", first=3)
    assert stream.append(log(b"4"), writer=b"writer-2", first=4)[1] == 4
    assert stream.repeated(log(b"4"), writer=b"writer-2", first=4)[1] == 4
    assert stream.payloads() == [b"1", b"2", b"3", b"4"]


def test_the_last_sequence_is_the_last_exact_integer(stream):
    stream.set_last(sequence=MAX_INT - 2)
    stream.refused("invalid_input", log(b"1", b"2", b"3"), first=MAX_INT - 1)
    ms, sequence = stream.append(log(b"1"), live(b"2"), first=MAX_INT - 1)
    assert sequence == MAX_INT
    assert stream.raw.xrange(stream.log)[0][0] == b"%d-%d" % (ms, MAX_INT - 1)
    assert stream.raw.xrange(stream.live)[0][0] == b"%d-%d" % (ms, MAX_INT)
    assert head_of(stream.raw, stream.head).last_id == b"%d-%d" % (ms, MAX_INT)
    assert stream.repeated(live(b"2"), first=MAX_INT) == (ms, MAX_INT)
    stream.refused("invalid_input", log(b"3"), first=MAX_INT + 1)


@pytest.mark.parametrize("left", range(1, 9))
def test_the_last_sequences_are_counted_exactly(stream, left):
    """Sums beyond the last exact integer, however soon they are undone, are another number."""
    stream.set_last(sequence=MAX_INT - left)
    payloads = [b"%d" % n for n in range(left)]
    blocks = [log(payload) for payload in payloads[: left // 2]]
    ms, sequence = stream.append(*blocks, log(*payloads[left // 2 :]), first=MAX_INT - left + 1)
    assert sequence == MAX_INT
    ids = [b"%d-%d" % (ms, MAX_INT - left + 1 + n) for n in range(left)]
    found = zip(ids, payloads, strict=True)
    assert stream.raw.xrange(stream.log) == [(each, {b"payload": data}) for each, data in found]
    assert head_of(stream.raw, stream.head).last_id == ids[-1]


def test_a_batch_holds_1024_frames(stream):
    assert stream.append(log(*[b"x"] * 1000), live(*[b"y"] * 24))[1] == 1024
    stream.refused("invalid_input", log(*[b"x"] * 1000), live(*[b"y"] * 25), first=1025)


def test_a_requested_cancel_is_told_to_the_writer(stream):
    def told(previous):
        (answer,), now = appended(stream.raw, stream.part(log(b"x"), previous=previous))
        _, expires, cancel = answer.split(b" ")
        (pushed,), _ = appended(stream.raw, stream.push_part(b"f1-1 "))
        assert pushed == b"%b %b" % (expires, cancel)
        assert 0 < int(expires) - now <= 30_000
        return cancel

    assert told(b"0") == b"0"
    assert not stream.backend.cancel(stream.handle, reason="enough", grace=60).cancelled
    assert head_of(stream.raw, stream.head).cancel_requested
    assert told(b"1") == b"1"
    # Also to one that has lost its reply.
    assert told(b"1") == b"1"
