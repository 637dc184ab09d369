"""What `ff_append` stores of a batch."""

import pytest
from redis.exceptions import ResponseError

import ff_fast
from ff_fast import errors

from ...heads import set_head
from ..streams import (
    MAX_PAYLOAD,
    Stream,
    _closed,
    _gone,
    _suspended,
    appended,
    live,
    log,
    part_of,
    patches,
    run_value,
    server_ms,
    visible,
)

# -- blocks ----------------------------------------------------------------------------------------


def entries(stream, key):
    return [(identity, list(fields.items())) for identity, fields in stream.raw.xrange(key)]


def test_extra_fields_stand_on_every_frame_of_their_block(stream):
    extras = [b"frame_type", b"event", b"correlation_id", b"c-1", b"encoding", b"binary"]
    ms, sequence = stream.append(log(b"1"), log(b"2", b"3", extras=extras), log(b"4"))
    assert sequence == 4
    named = [(b"frame_type", b"event"), (b"correlation_id", b"c-1"), (b"encoding", b"binary")]
    assert entries(stream, stream.log) == [
        (b"%d-1" % ms, [(b"payload", b"1")]),
        (b"%d-2" % ms, [(b"payload", b"2"), *named]),
        (b"%d-3" % ms, [(b"payload", b"3"), *named]),
        (b"%d-4" % ms, [(b"payload", b"4")]),
    ]
    assert [frame.correlation_id for frame in stream.frames()] == [None, "c-1", "c-1", None]
    assert [frame.frame_type for frame in stream.frames()] == ["token", "event", "event", "token"]


def test_extra_fields_stand_on_an_entry_of_the_window(stream):
    named = [b"frame_type", b"event", b"source", b"tool"]
    ms, sequence = stream.append(live(b"1", fields=named), live(b"2", b"3", fields=named))
    assert sequence == 3
    pairs = [(b"frame_type", b"event"), (b"source", b"tool")]
    assert entries(stream, stream.live) == [
        (b"%d-1" % ms, [(b"payload", b"1"), *pairs]),
        (b"%d-3" % ms, [(b"run", run_value(b"2", b"3")), *pairs]),
    ]
    assert [(f.frame_type, f.source) for f in stream.frames()] == [("event", "tool")] * 3


def test_an_entry_has_only_what_is_unusual(stream):
    ms, _ = stream.append(
        log(b"1", b"2"), live(b"3"), live(b"4", b"5"), patches(b"{}", base=0),
        patches(b"{}", b"{}", base=1),
    )  # fmt: skip
    assert entries(stream, stream.log) == [
        (b"%d-1" % ms, [(b"payload", b"1")]),
        (b"%d-2" % ms, [(b"payload", b"2")]),
    ]
    kind = [(b"mode", b"summary"), (b"patch_kind", b"json-merge-patch")]
    assert entries(stream, stream.live) == [
        (b"%d-3" % ms, [(b"payload", b"3")]),
        (b"%d-5" % ms, [(b"run", run_value(b"4", b"5"))]),
        (b"%d-6" % ms, [(b"payload", b"{}"), *kind, (b"summary_version", b"1")]),
        (b"%d-8" % ms, [(b"run", run_value(b"{}", b"{}")), *kind, (b"summary_version", b"3")]),
    ]
    modes = ["durable"] * 2 + ["best_effort"] * 3 + ["summary"] * 3
    assert [(f.mode, f.frame_type) for f in stream.frames()] == [(mode, "token") for mode in modes]
    assert stream.raw.hgetall(stream.meta).keys() == {
        b"created_at", b"writer_base", b"writer_openings",
    }  # fmt: skip


@pytest.mark.parametrize("letter", [b"X", b"W"])
def test_a_block_of_no_extra_fields_is_a_plain_one(stream, letter):
    if letter == b"X":
        ms, _ = stream.append([b"X", b"2", b"0", b"1", b"2"])
        assert entries(stream, stream.log) == [
            (b"%d-%d" % (ms, i), [(b"payload", b"%d" % i)]) for i in (1, 2)
        ]
    else:
        run = run_value(b"1", b"2")
        ms, _ = stream.append([b"W", b"2", b"0", run])
        assert entries(stream, stream.live) == [(b"%d-2" % ms, [(b"run", run)])]


@pytest.mark.parametrize("block, key", [(log, "log"), (live, "live")])
def test_a_frame_has_up_to_32_extra_fields(stream, block, key):
    fields = [part for i in range(32) for part in (b"f%d" % i, b"v")]
    stream.append(block(b"p", **{"extras" if block is log else "fields": fields}))
    ((_, found),) = entries(stream, getattr(stream, key))
    assert found == [(b"payload", b"p"), *((b"f%d" % i, b"v") for i in range(32))]


def test_too_large_a_payload_beside_extra_fields(stream):
    block = log(b"a", bytes(MAX_PAYLOAD + 1), extras=[b"f", b"v"])
    error = stream.refused("payload_too_large", block)
    assert (error.limit, error.size) == (MAX_PAYLOAD, MAX_PAYLOAD + 1)
    # Fields are no payload, so an extra one is not held to its limit.
    stream.append(log(bytes(MAX_PAYLOAD), extras=[b"f", bytes(MAX_PAYLOAD + 1)]))


@pytest.mark.parametrize("stored", range(1, 5))
def test_of_an_overlap_extra_fields_stay_with_their_frames(stream, stored):
    payloads = [b"1", b"2", b"3"]
    extras = [b"f", b"v"]
    stream.append(log(*payloads[:stored], extras=extras), *([log(b"4")] if stored > 3 else []))
    stream.append(log(*payloads, extras=extras), log(b"4", b"5"), names="head log")
    found = [dict(fields) for _, fields in entries(stream, stream.log)]
    assert [fields[b"payload"] for fields in found] == [b"1", b"2", b"3", b"4", b"5"]
    assert [fields.get(b"f") for fields in found] == [b"v", b"v", b"v", None, None]


def test_the_last_visible_frame_is_kept_while_best_effort_frames_are_last(stream):
    assert visible(stream) is None
    stream.append(log(b"1"))
    assert visible(stream) is None
    stream.append(live(b"2"), [b"H", b"1"], first=2)
    assert visible(stream) == b"1"
    # Sent when it changes: what does not name it leaves it.
    stream.append(live(b"3"), first=3)
    assert visible(stream) == b"1"
    stream.append(log(b"4", extras=[b"prev", b"1"]), [b"H", b""], first=4)
    assert visible(stream) is None
    assert stream.raw.hexists(stream.meta, "visible_sequence") is False
    stream.append([b"H", b""], first=5)
    assert visible(stream) is None


def test_no_visible_frame_at_all(stream):
    stream.append(live(b"1", b"2"), [b"H", b"0"])
    assert visible(stream) == b"0"
    assert stream.open(b"writer-2")[3] == b"0"
    page = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert (page, page.gaps) == ((), ())


def test_of_several_the_last_word_on_visibility_counts(stream):
    stream.append(live(b"1"), [b"H", b"0"], log(b"2"), [b"H", b""], live(b"3"), [b"H", b"2"])
    assert visible(stream) == b"2"


@pytest.mark.parametrize("last, prev", [([], b"2"), ([live(b"3"), [b"H", b"2"]], b"2")])
def test_the_end_names_the_last_visible_frame(stream, last, prev):
    stream.append(log(b"1", b"2"), *last)
    stream.backend.complete(stream.handle)
    assert stream.raw.xrevrange(stream.log, count=1)[0][1] == {
        b"end": b"attempt_success",
        b"prev": prev,
    }
    page = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert (len(page), page.gaps, page.end_reason) == (2, (), "attempt_success")


def test_a_repeated_word_on_visibility_is_not_taken_back(stream):
    first = (live(b"1"), [b"H", b"0"])
    stream.append(*first)
    stream.append(log(b"2", extras=[b"prev", b"0"]), [b"H", b""], first=2)
    stream.repeated(*first)
    assert visible(stream) is None


# -- summary ---------------------------------------------------------------------------------------


def test_patches_need_the_version_that_they_were_made_for(stream):
    stream.append(patches(b'{"a":1}', base=0))
    for base in (0, 2, 5):
        error = stream.refused("summary_conflict", patches(b'{"a":2}', base=base), first=2)
        assert (error.expected, error.got) == (1, base)
    # An overlap is held to the version after what it leaves out.
    stream.append(patches(b'{"a":2}', base=1), first=2)
    error = stream.refused("summary_conflict", patches(b"{}", b"{}", base=3), first=2)
    assert (error.expected, error.got) == (2, 4)
    stream.refused("summary_conflict", [b"C", b"3", b"{}", b"json-merge-patch:"], first=3)


def test_a_fresh_document_takes_the_place_of_its_patches(stream, next_ms):
    stream.append(patches(b'{"a":1}', b'{"b":[]}', base=0))
    before = stream.backend.read_summary(stream.eid)
    next_ms()
    stream.append([b"C", b"2", b'{"a":1,"b":[]}', b"json-merge-patch:"], first=3)
    assert stream.backend.read_summary(stream.eid) == before
    assert not [name for name in stream.raw.hkeys(stream.summary) if b":" in name]
    # With patches of its own batch.
    stream.append(
        patches(b'{"c":3}', base=2),
        [b"C", b"3", b'{"a":1,"b":[],"c":3}', b"json-merge-patch:"],
        first=3,
    )
    after = stream.backend.read_summary(stream.eid)
    assert (after.version, after.document_json) == (3, b'{"a":1,"b":[],"c":3}')
    assert after.first_applied_ms == before.first_applied_ms < after.last_updated_ms


# -- cases that FlowFabric's append gets wrong -----------------------------------------------------


def test_the_same_call_twice_stores_once(stream):
    block = patches(b'{"n":1}', base=0)
    assert stream.append(log(b"x"), block) == stream.repeated(log(b"x"), block)
    assert len(stream.payloads()) == 2
    assert stream.backend.read_summary(stream.eid).version == 1


def test_no_text_of_a_mode_makes_frames_of_the_log_vanish(stream):
    for first, mode in zip((1, 3, 5), (b"foo", b"Durable", b"durable"), strict=True):
        stream.append(live(b"x", fields=[b"mode", mode]), [b"P", b"1"], log(b"kept"), first=first)
    assert stream.raw.pttl(stream.log) == -1
    assert stream.raw.xlen(stream.log) == 3


def test_a_rate_that_is_no_number_is_refused_and_the_window_is_trimmed_still(stream):
    stream.refused("invalid_input", live(b"x"), [b"E", b"nan"])
    for first in range(1, 1001):
        stream.append(live(b"x"), [b"T", b"0-%d" % max(first - 10, 1)], first=first)
    stream.append(live(b"x"), [b"T", b"%d-%d" % (server_ms(stream.raw) + 1, 0)], first=1001)
    assert stream.raw.xlen(stream.live) < 300


@pytest.mark.parametrize("ends", [0, None])
def test_a_lease_without_a_time_has_lapsed(stream, ends):
    if ends is None:
        stream.raw.delete(stream.head)
    else:
        set_head(stream.raw, stream.head, lease_expires_at=ends)
    stream.refused("lease_expired", log(b"x"))
    assert stream.open(b"writer-2") == [0, b"lease_expired"]
    before = stream.everything()
    for call in (stream.backend.renew, stream.backend.complete):
        with pytest.raises(errors.LeaseExpired):
            call(stream.handle)
    assert stream.everything() == before


JUNK_HEADS = {
    "nothing": b"", "one word": b"junk", "a time without digits": b"soon 0 - 1-1", "a short time": b"17 0 - 1-1",
    "no id": b"1700000000000 0 -", "other digits": b"1700000000000 2 - 1-1", "a list": None,
}  # fmt: skip


def is_corruption(error):
    return type(errors.from_server_error(str(error), "ff_append")) is errors.Corruption


@pytest.mark.parametrize("junk", JUNK_HEADS.values(), ids=JUNK_HEADS)
def test_a_head_that_is_none_refuses_every_call_as_corrupt(raw, streams, junk):
    damaged, good = streams(2)
    raw.delete(damaged.head)
    if junk is None:
        raw.rpush(damaged.head, "junk")
    else:
        raw.set(damaged.head, junk)
    before = damaged.everything()
    for part in (damaged.part(log(b"x")), damaged.push_part(b"f1-1 ")):
        with pytest.raises(ResponseError) as failed:
            appended(raw, part)
        assert is_corruption(failed.value)
        answers, now = appended(raw, part, good.push_part(b"f1-1 "))
        assert is_corruption(answers[0])
        assert good.told(answers[1], now) is None
    with pytest.raises(ResponseError):
        damaged.open(b"writer-2")
    for call in (damaged.backend.renew, damaged.backend.complete):
        with pytest.raises(errors.Corruption):
            call(damaged.handle)
    assert damaged.everything() == before


@pytest.mark.parametrize("last_id", [b"junk", b"1700000000000-x", b"1700000000000", b"-"])
def test_a_head_whose_last_id_is_none_refuses_an_append_as_corrupt(stream, last_id):
    set_head(stream.raw, stream.head, last_id=last_id)
    before = stream.everything()
    with pytest.raises(ResponseError) as failed:
        stream.append(log(b"x"))
    assert is_corruption(failed.value)
    assert stream.everything() == before


def test_times_are_the_servers(stream):
    before = server_ms(stream.raw)
    ms, _ = stream.append(log(b"x"))
    (frame,) = stream.frames()
    assert before <= frame.ts_ms == ms <= server_ms(stream.raw)


def test_absent_suspended_and_closed_are_told_apart(raw, backend, lane):
    told = []
    for change in (_gone, _suspended, _closed):
        stream = Stream(raw, backend, lane)
        stream.open()
        change(stream)
        told.append(stream.append(log(b"x")).code)
    assert told == ["execution_not_found", "suspended", "stream_closed"]


def test_whoever_has_no_lease_has_no_say(raw, backend, lane):
    stream = Stream(raw, backend, lane)
    stream.open()
    # Nobody's: the lease fields are empty, and so are those of the call.
    raw.hset(stream.core, "current_lease_digest", "")
    set_head(raw, stream.head, writer=None)
    # Nor has the word that stands in the place of a writer.
    args = part_of(stream.keys, b"-", b"0", b"", *log(b"x"))
    assert stream.call("ff_append", stream.keys, *args)[0] == 0
    set_head(raw, stream.head, lease_expires_at=0)
    stream.refused("stale_owner", log(b"x"))
    stream.refused("stale_owner", log(b"x"), fence=(stream.fence[0], b"", stream.fence[2]))
    # Nor has an empty writer, where none is open.
    for writer in (b"", b":::"):
        args = part_of(stream.keys, writer, b"0", b"", *log(b"x"))
        assert stream.call("ff_append", stream.keys, *args)[0] == 0
