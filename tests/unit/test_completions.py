"""A subscription to completions step by step: what it reads, and from where it goes on."""

import hiredis
import pytest

from ff_fast import errors, keys
from ff_fast._core import completions
from ff_fast._core.completions import CompletionCore
from ff_fast.types import CompletionPayload, ScannerFilter

from .script import functions, run

UUID = "550e8400-e29b-41d4-a716-446655440000"
EIDS = [f"{{fp:{index}}}:{UUID}" for index in range(2)]
STREAMS = [keys.completions(f"{{fp:{index}}}") for index in range(2)]
EVERYTHING = ScannerFilter()
LOOK = [[b"XINFO", b"STREAM", name] for name in STREAMS]
NO_KEY = hiredis.ReplyError("ERR no such key")
NOPERM = hiredis.ReplyError("NOPERM no")
WRONGTYPE = hiredis.ReplyError("WRONGTYPE Operation against a key holding the wrong kind of value")
GONE = [0, b"execution_not_found"]


def read(core, *replies):
    return run(core.read(), replies)


def core(after="start", scope=EVERYTHING):
    return CompletionCore(2, after, scope)


def xread(*ids, streams=(0, 1), block=True):
    return [
        *(b"XREAD", b"COUNT", b"%d" % (completions._REPLY_RECORDS // len(streams))),
        *((b"BLOCK", b"5000") if block else ()),
        *(b"STREAMS", *(STREAMS[index] for index in streams), *ids),
    ]


def entry(identity=b"10-1", index=1, **more):
    fields = {
        "execution_id": EIDS[index],
        "namespace": "tenant",
        "outcome": "success",
        "produced_at_ms": "10",
        **more,
    }
    return [identity, [part.encode() for pair in fields.items() for part in pair]]


def record(index=1, identity=b"10-1", **more):
    return [STREAMS[index], [entry(identity, index, **more)]]


def kept(first=b"5-0", length=3, added=3, last=b"7-0", deleted=b"0-0"):
    return [
        *(b"length", length, b"entries-added", added),
        *(b"recorded-first-entry-id", first, b"last-generated-id", last),
        *(b"max-deleted-entry-id", deleted),
    ]


THERE = [[b"7-0", []]]


def passed(index, identity):
    """The question whether the record of a place is there."""
    return [b"XRANGE", STREAMS[index], identity, identity]


def test_a_new_subscription_begins_behind_the_last_record_of_each_partition():
    new = core(None)
    assert new.start is None
    asked, found = read(new, kept(last=b"7-3"), NO_KEY, None)
    assert asked == [*LOOK, xread(b"7-3", b"0-0")]
    assert (found, new.start) == ([], "0-0,0:7-3:3")
    # It has begun; nothing can have been trimmed since, so nothing else is asked.
    assert read(new, None) == ([xread(b"7-3", b"0-0")], [])


def test_from_the_start_everything_that_is_kept_is_read():
    asked, found = read(core(), NO_KEY, kept(added=9), [record()])
    assert asked == [*LOOK, xread(b"0-0", b"0-0")]
    assert found == [CompletionPayload(EIDS[1], "success", None, 10, None, "0-0,1:a-1:7")]


def test_a_cursor_goes_on_in_each_partition_behind_what_it_brought():
    running = core("0-0,0:4:1,1:7-1:3")
    assert running.start == "0-0,0:4:1,1:7-1:3"
    records = [record(0, b"8-1"), record(1, b"90-1", flow_id=UUID)]
    abouts = kept(b"4-0", 1, 1, b"4-0"), kept(last=b"7-1")
    asked, found = read(running, *abouts, THERE, THERE, records)
    assert asked == [*LOOK, passed(0, b"4-0"), passed(1, b"7-1"), xread(b"4-0", b"7-1")]
    assert [each.cursor for each in found] == ["0-0,0:8-1:2,1:7-1:3", "0-0,0:8-1:2,1:2i-1:4"]
    assert found[1].flow_id == UUID
    assert read(running, None)[0] == [xread(b"8-1", b"90-1")]


def test_an_id_is_a_place_in_every_partition():
    asked, _ = read(core("6-0"), kept(last=b"5-2"), kept(last=b"7-0"), None)
    # Whatever comes is behind the last record, also if the id is a time that the server's clock has still to reach.
    assert asked[2] == xread(b"5-2", b"6-0")


def test_after_a_lost_connection_it_reads_again_from_where_it_stood():
    running = core("4-0")
    assert type(read(running, kept(), kept(), errors.Unavailable())[1]) is errors.Unavailable
    running.restart()
    asked, _ = read(running, kept(), kept(), None)
    assert asked == [*LOOK, xread(b"4-0", b"4-0")]


def test_a_cursor_before_what_is_kept_is_refused(subtests):
    for after, about, lost in (
        ("4-0", kept(added=9), True),
        ("5-0", kept(added=9), False),
        ("4-0", kept(), False),
        ("start", kept(added=9), False),
        # Six records were trimmed. A place behind six has missed none, although its own record is gone.
        ("0-0,0:4-0:6", kept(added=9), False),
        ("0-0,0:4-0:5", kept(added=9), True),
        ("0-0", kept(added=9), True),
        # All were trimmed.
        ("0-0,0:4-0:9", kept(b"0-0", 0, 9, b"4-0"), False),
        ("0-0,0:4-0:8", kept(b"0-0", 0, 9, b"7-0"), True),
        # The stream is not the one that was read, or is gone.
        ("0-0,0:8-0:3", kept(), True),
        ("0-0,0:8-0:3", NO_KEY, True),
        # Its record is not among those that are kept; if somebody deleted records up to there, that says nothing.
        ("0-0,0:6-0:2", kept(), True),
        ("0-0,0:6-0:2", kept(deleted=b"6-0"), False),
        ("0-0,0:7-0:3", kept(deleted=b"7-0"), False),
    ):
        with subtests.test(after=after, about=about):
            running = core(after)
            there = [[]] * len(running._places)
            if lost:
                assert type(read(running, about, NO_KEY, *there)[1]) is errors.InvalidCursor
            else:
                assert read(running, about, NO_KEY, *there, None)[1] == []


def test_a_bad_cursor_is_refused(subtests):
    large = "zzzzzzzzzzzzz"
    for after in (
        *("", "now", "1-2,", "1-2,3:4", "1-2,2:1-1", "1-2\n", "1-2,1:1:1:1", 7, b"0-0"),
        f"0-0,0:{large}",
    ):
        with subtests.test(after=after), pytest.raises(errors.InvalidCursor):
            core(after)


def test_a_namespace_leaves_others_out_and_goes_on_behind_them():
    running = core(scope=ScannerFilter(namespace="another"))
    assert read(running, NO_KEY, NO_KEY, [record()])[1] == []
    assert read(running, None)[0] == [xread(b"0-0", b"10-1")]


@pytest.mark.parametrize(
    "tags, wanted",
    [
        ([1, b"OK", [b"a.b", b"c"]], True),
        ([1, b"OK", [b"a.b", b"d"]], False),
        ([1, b"OK", []], False),
        (GONE, False),
        (WRONGTYPE, False),
    ],
)
def test_a_tag_is_read_from_the_execution(tags, wanted):
    running = core(scope=EVERYTHING.with_instance_tag("a.b", "c"))
    asked, found = read(running, NO_KEY, NO_KEY, [record()], tags)
    assert functions(asked)[3:] == ["ff_read_tags"]
    assert [each.execution_id for each in found] == [EIDS[1]] * wanted


@pytest.mark.parametrize(
    "reply, payload",
    [([1, b"OK", b"large"], b"large"), ([1, b"OK", b""], None), (GONE, None), (WRONGTYPE, None)],
)
def test_a_result_is_read_from_the_execution(reply, payload):
    asked, (found,) = read(core(), NO_KEY, NO_KEY, [record(payload_bytes="5")], reply)
    assert functions(asked)[3:] == ["ff_read_payload"]
    assert asked[3][4] == keys.result(EIDS[1])
    assert (found.payload_bytes, found.outcome) == (payload, "success")


def test_results_are_asked_for_as_many_as_make_one_answer():
    running = core()
    sizes = [600_000, 600_000, 0, 0, 400_000, 5, 2 << 20, 2 << 20]
    entries = [
        entry(b"%d-0" % n, **({"payload_bytes": str(size)} if size else {}))
        for n, size in enumerate(sizes, 1)
    ]
    told, groups = [], []
    replies = [NO_KEY, NO_KEY, [[STREAMS[1], entries]]]
    # Each read takes the largest group that fits; one that takes all leaves nothing to ask.
    for asks in (1, 3, 1, 1):
        asked, found = read(running, *replies, *[[1, b"OK", b"x"]] * asks)
        groups.append(functions(asked[-asks:]))
        told += found
        replies = []
    assert groups == [["ff_read_payload"] * asks for asks in (1, 3, 1, 1)]
    assert [each.cursor for each in told] == [f"0-0,1:{n}:{n}" for n in range(1, 9)]
    assert [each.payload_bytes for each in told] == [b"x" if size else None for size in sizes]
    assert read(running, None)[0] == [xread(b"0-0", b"8-0")]


def test_a_partition_that_has_more_is_read_on_alone_and_then_all(monkeypatch):
    monkeypatch.setattr(completions, "_REPLY_RECORDS", 4)
    running = core()
    two = [[STREAMS[1], [entry(b"1-0"), entry(b"2-0")]]]
    asked, _ = read(running, NO_KEY, NO_KEY, two)
    assert asked[2][2] == b"2"
    asked, found = read(running, [[STREAMS[1], [entry(b"3-0")] * 4]])
    assert asked == [xread(b"2-0", streams=[1], block=False)]
    assert len(found) == 4
    assert read(running, None)[0] == [xread(b"0-0", b"3-0")]


def test_a_foreign_record_is_passed_over(subtests):
    for foreign in (
        [b"10-1", [b"a", b"b"]],
        [b"10-1", [b"execution_id", b"x"]],
        entry(execution_id=EIDS[0]),
        entry(execution_id="\n"),
        entry(outcome="other"),
        entry(produced_at_ms="soon"),
        entry(produced_at_ms="-5"),
        entry(produced_at_ms="9" * 5000),
        entry(flow_id="x"),
        entry(payload_bytes="-1"),
        entry(payload_bytes="many"),
        [b"10-1", [b"\xff", b"\xff", *entry()[1][:-2]]],
    ):
        with subtests.test(foreign=str(foreign)[:80]):
            running = core()
            asked, found = read(running, NO_KEY, NO_KEY, [[STREAMS[1], [foreign, entry(b"11-0")]]])
            assert len(asked) == 3
            assert [each.cursor for each in found] == ["0-0,1:b:2"]


def test_a_key_of_another_type_takes_one_partition_out_until_it_is_gone():
    running = core(None)
    read(running, kept(), kept(), None)
    # Seen by a read, which looks again.
    assert read(running, WRONGTYPE) == ([xread(b"7-0", b"7-0")], [])
    asked, found = read(running, kept(), WRONGTYPE, THERE, WRONGTYPE, [record(0, b"8-0")])
    places = passed(0, b"7-0"), passed(1, b"7-0")
    assert asked == [*LOOK, *places, xread(b"7-0", streams=[0])]
    assert len(found) == 1
    asked, _ = read(running, kept(last=b"8-0"), kept(), THERE, THERE, None)
    assert asked == [*LOOK, passed(0, b"8-0"), passed(1, b"7-0"), xread(b"8-0", b"7-0")]
    assert read(running, None)[0] == [xread(b"8-0", b"7-0")]
    error = read(core(None), WRONGTYPE, WRONGTYPE)[1]
    assert type(error) is errors.Corruption


@pytest.mark.parametrize(
    "replies, error",
    [
        ([NOPERM, NO_KEY], errors.PermissionDenied),
        ([NO_KEY, [b"length", b"x"]], errors.ProtocolError),
        ([NO_KEY, NO_KEY, NOPERM], errors.PermissionDenied),
        ([NO_KEY, NO_KEY, b"text"], errors.ProtocolError),
        ([NO_KEY, NO_KEY, [record(payload_bytes="5")], NOPERM], errors.PermissionDenied),
    ],
)
def test_a_refused_read_passes_nothing(replies, error):
    running = core()
    assert type(read(running, *replies)[1]) is error
    running.restart()
    assert read(running, NO_KEY, NO_KEY, None)[0][2] == xread(b"0-0", b"0-0")
