"""Frames that a server has lost: `ff_append` stores them under the ids that they had, or that they are lost."""

import json

import pytest

from ff_fast import Gap, StreamFrame, TailVisibility

from ...reference_frames import run_of
from ..streams import live, log, number, patches, server_ms, visible
from .test_refused import NOT_INTEGERS

EXCLUDE = TailVisibility.EXCLUDE_BEST_EFFORT


def again(ms, later_ms, *blocks):
    return [b"R", number(ms), number(later_ms), *(part for block in blocks for part in block)]


def lost(count):
    return [b"G", number(count)]


def renewal(version, document):
    return [b"N", number(version), document, b"json-merge-patch:"]


@pytest.fixture
def since(stream):
    """The ms from which ids may be chosen: that of the claim."""
    return int(stream.raw.get(stream.head).split(b" ")[-1].split(b"-")[0])


def test_frames_stand_under_the_ids_that_they_had(stream, since):
    blocks = live(b"1", b"2"), log(b"3"), patches(b'{"a":1}', base=0)
    assert stream.append(again(since + 1, since + 5, *blocks), push=b" ") == (since + 5, 4)
    page = stream.frames()
    assert [frame.stream_id for frame in page] == [
        f"{since + 1}-1", f"{since + 1}-2", f"{since + 5}-3", f"{since + 5}-4",
    ]  # fmt: skip
    assert [frame.payload for frame in page] == [b"1", b"2", b"3", b'{"a":1}']
    # A lone small entry is stored in a shorter way.
    assert stream.append(again(since + 6, since + 6, log(b"5")), first=5, push=b" ") == (
        since + 6,
        5,
    )
    assert stream.repeated(again(since + 6, since + 6, log(b"5")), first=5, push=b" ") == (
        since + 6,
        5,
    )
    # What follows has ids of its own time.
    assert stream.append(log(b"6"), first=6)[0] >= since + 6


def test_no_id_goes_back(stream, since):
    stream.append(again(since + 9, since + 9, log(b"1")), push=b" ")
    assert stream.append(again(since + 1, since + 3, log(b"2")), first=2, push=b" ") == (
        since + 9,
        2,
    )


def test_a_batch_that_overlaps_keeps_its_ids(stream, since):
    stream.append(again(since + 1, since + 1, live(b"1", b"2")), push=b" ")
    blocks = live(b"1", b"2", b"3"), log(b"4")
    assert stream.append(again(since + 2, since + 3, *blocks), push=b" ") == (since + 3, 4)
    assert stream.payloads() == [b"1", b"2", b"3", b"4"]


def test_a_loss_is_one_entry_that_every_reader_gets(stream, since):
    stream.append(log(b"1"))
    stream.append(live(b"2", b"3"), [b"H", b"1"], first=2)
    ms = server_ms(stream.raw) + 5
    assert stream.append(again(ms, ms, lost(5), [b"H", b""]), first=4, push=b" ") == (ms, 8)
    assert stream.raw.xrevrange(stream.log, count=1) == [
        (b"%d-8" % ms, {b"lost": b"5", b"prev": b"1"})
    ]
    assert visible(stream) is None
    assert stream.append(log(b"9"), first=9)[1] == 9
    assert stream.frames().gaps == (Gap(4, 9, "lost"),)
    page = stream.frames(visibility=EXCLUDE)
    assert (page.gaps, [frame.sequence for frame in page]) == ((Gap(4, 9, "lost"),), [1, 9])
    # Whoever had some of them begins among them, and whoever had all has no gap.
    for sequence in (4, 7):
        page = stream.frames(after=f"{ms - 1}-{sequence}")
        assert page.gaps == (Gap(sequence + 1, 9, "lost"),)
    page = stream.frames(after=f"{ms}-8")
    assert (page.gaps, [frame.sequence for frame in page]) == ((), [9])


def test_a_loss_may_be_larger_than_a_batch(stream, since):
    assert stream.append(again(since, since, lost(1_000_000)), push=b" ") == (since, 1_000_000)
    assert stream.frames().gaps == (Gap(1, 1_000_001, "lost"),)


def test_a_loss_is_stored_once(stream, since):
    loss = again(since + 1, since + 1, lost(5))
    answer = stream.append(loss, push=b" ")
    assert stream.repeated(loss, push=b" ") == answer
    assert stream.repeated(again(since + 1, since + 1, lost(3)), push=b" ")[1] == 3
    told = stream.backend.describe_stream(stream.eid, 0)
    assert (told.frame_count, told.lost_frames, told.lost_entries) == (5, 5, 1)
    assert stream.append(again(since + 1, since + 2, lost(7)), push=b" ") == (since + 1, 7)
    assert [fields[b"lost"] for _, fields in stream.raw.xrange(stream.log)] == [b"5", b"2"]
    assert stream.frames().gaps == (Gap(1, 6, "lost"), Gap(6, 8, "lost"))


def test_a_history_tells_what_was_lost_apart_from_what_was_trimmed(stream, since):
    stream.append(log(b"1"))
    for first in (2, 8):
        ms = server_ms(stream.raw) + first
        stream.append(again(ms, ms, lost(5)), first=first, push=b" ")
        stream.append(live(b"x"), first=first + 5)
    text = "\n".join(stream.backend.explain(stream.eid))
    assert "Attempt 0 has 13 frames: 1 in its log, 2 for its live window." in text
    assert "A server that failed took 10 acknowledged frames of attempt 0 along" in text
    assert "of attempt 0 left the" not in text


def test_a_tail_is_told_at_once(stream, since, listen):
    listener = listen(stream.head.decode())
    stream.append(again(since, since, lost(2)), push=b" ")
    assert list(listener.heard()) == [b"F%d-2 " % since]


def test_a_document_is_renewed_whatever_is_stored(stream, since):
    stream.append(patches(b'{"a":1}', base=0))
    first = stream.backend.read_summary(stream.eid)
    loss = again(since, since, lost(4), renewal(9, b'{"b":2}'))
    ms, _ = stream.append(loss, first=2, push=b" ")
    summary = stream.backend.read_summary(stream.eid)
    assert (json.loads(summary.document_json), summary.version) == ({"b": 2}, 9)
    assert summary.first_applied_ms == first.first_applied_ms
    assert summary.cursor == f"0.{ms}-5"
    stream.append(patches(b'{"c":3}', base=9), first=6)
    assert stream.backend.read_summary(stream.eid).version == 10
    # A stream without one gets it.
    stream.append(log(b"7"), renewal(12, b"{}"), first=7)
    assert stream.backend.read_summary(stream.eid).version == 12


@pytest.mark.parametrize(
    "blocks, options",
    [
        ([b"R", b"1", b"1", b"L", b"1", b"x"], {}),
        (again(10**12 * 2, 10**12 * 2 - 1, log(b"x")), {}),
        (again(9 * 10**12, 9 * 10**12, log(b"x")), {}),
        (again(10**12 * 1, 9 * 10**12, log(b"x")), {}),
        (again(10**12, 10**12, [b"H", b"1"]), {}),
        ([b"R", b"1000000000000", b"1000000000000"], {}),
        (again(10**12 + 5, 10**12 + 5, log(b"x")), {"push": b""}),
        (again(10**12 + 5, 10**12 + 5, log(b"x")), {"push": b"+1"}),
        (lost(3), {"push": b""}),
        (lost(3), {"push": b"+\x01"}),
        ([*lost(3), *log(b"x")], {}),
        ([*lost(3), *lost(3)], {}),
        ([*log(b"x"), *lost(3)], {}),
        ([*lost(3), *patches(b"{}", base=0)], {}),
        ([*patches(b"{}", base=0), *renewal(1, b"{}")], {}),
        ([*log(b"x"), *renewal(1, b"{}"), *renewal(2, b"{}")], {}),
        ([*log(b"x"), *renewal(1, b"{}"), b"C", b"1", b"{}", b"k"], {}),
        ([*log(b"x"), *renewal(0, b"{}")], {}),
        ([*log(b"x"), *renewal(1, b"{}")[:-1]], {}),
        ([b"G"], {}),
    ],
)
def test_what_is_malformed_changes_nothing(stream, blocks, options):
    stream.append(log(b"first"))
    stream.refused("invalid_input", blocks, first=2, **{"push": b" ", **options})


@pytest.mark.parametrize("text", [*NOT_INTEGERS, b"0"])
def test_a_count_that_is_none_is_refused(stream, text):
    stream.refused("invalid_input", [b"G", text], push=b" ")
    stream.refused("invalid_input", log(b"x"), [b"N", text, b"{}", b"k"])


def test_a_loss_needs_the_log_and_a_renewal_the_summary(stream):
    stream.refused("invalid_input", log(b"x"), renewal(1, b"{}"), names="head log live")
    assert stream.append(lost(2), names="head log", push=b" ")[1] == 2


@pytest.mark.parametrize(
    "fields",
    [
        {"lost": "5"},
        {"lost": "3", "prev": "0", "payload": "x"},
        {"lost": "3", "prev": "0", "run": run_of([b"x"], [0])},
    ],
)
def test_an_entry_that_only_looks_like_a_loss_is_none(stream, fields):
    stream.append(log(b"1"))
    stream.raw.xadd(stream.log, fields, id=f"{server_ms(stream.raw) + 1}-7")
    assert not any(gap.reason == "lost" for gap in stream.frames().gaps)


def test_a_loss_of_another_program_behind_the_newest_frame_is_none(stream):
    stream.append(log(b"1"))
    stream.raw.xadd(
        stream.log, {"lost": "3", "prev": "1"}, id=f"{server_ms(stream.raw) + 99_999}-9"
    )
    page = stream.frames()
    assert (page.gaps, [type(item) for item in page]) == ((), [StreamFrame])
