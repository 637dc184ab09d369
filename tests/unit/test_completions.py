"""A subscription to completions step by step: what it reads, and from where it goes on."""

import hiredis
import pytest

from ff_fast import errors, keys
from ff_fast._core.completions import CompletionCore
from ff_fast.types import CompletionPayload, ScannerFilter

from .script import functions, run

UUID = "550e8400-e29b-41d4-a716-446655440000"
EID = f"{{fp:1}}:{UUID}"
STREAMS = [keys.completions(f"{{fp:{index}}}") for index in range(2)]
EVERYTHING = ScannerFilter()
NO_KEY = hiredis.ReplyError("ERR no such key")
NOPERM = hiredis.ReplyError("NOPERM no")


def read(core, *replies):
    return run(core.read(), replies)


def core(after="start", scope=EVERYTHING):
    return CompletionCore(2, after, scope)


def xread(*ids):
    return [b"XREAD", b"COUNT", b"100", b"BLOCK", b"5000", b"STREAMS", *STREAMS, *ids]


def record(index=1, entry=b"10-1", **more):
    fields = {
        "execution_id": EID,
        "namespace": "tenant",
        "outcome": "success",
        "produced_at_ms": "10",
        **more,
    }
    flat = [part.encode() for pair in fields.items() for part in pair]
    return [STREAMS[index], [[entry, flat]]]


def kept(first=b"5-0", length=3, added=3):
    return [b"length", length, b"entries-added", added, b"recorded-first-entry-id", first]


def test_a_new_subscription_begins_now_by_the_servers_clock():
    new = core(None)
    asked, found = read(new, [b"1700000000", b"5999"], None)
    # XREAD gives what is greater: all of this millisecond, of which something may be still to come.
    begin = b"1700000000004-9999999999999999"
    assert asked == [[b"TIME"], xread(begin, begin)]
    assert found == []
    # It has begun; nothing can have been trimmed since, so nothing else is asked.
    assert read(new, None) == ([xread(begin, begin)], [])


def test_from_the_start_everything_that_is_kept_is_read():
    asked, found = read(core(), NO_KEY, kept(added=9), [record(payload="done")])
    assert asked[:2] == [[b"XINFO", b"STREAM", name] for name in STREAMS]
    assert asked[2:] == [xread(b"0-0", b"0-0")]
    assert found == [CompletionPayload(EID, "success", b"done", 10, None, "0-0,1:10-1")]


def test_a_cursor_goes_on_in_each_partition_behind_what_it_brought():
    running = core("4-0,1:7-1")
    asked, found = read(
        running, kept(), kept(), [record(0, b"8-1"), record(1, b"9-1", flow_id=UUID)]
    )
    assert asked[2] == xread(b"4-0", b"7-1")
    assert [each.cursor for each in found] == ["4-0,1:7-1,0:8-1", "4-0,1:9-1,0:8-1"]
    assert found[1].flow_id == UUID
    assert read(running, None)[0] == [xread(b"8-1", b"9-1")]


def test_after_a_lost_connection_it_reads_again_from_where_it_stood():
    running = core("4-0")
    assert type(read(running, kept(), kept(), errors.Unavailable())[1]) is errors.Unavailable
    running.restart()
    asked, _ = read(running, kept(), kept(), None)
    assert asked[2] == xread(b"4-0", b"4-0")


@pytest.mark.parametrize(
    "after, about, trimmed",
    [
        ("4-0", kept(added=9), True),
        ("5-0", kept(added=9), False),
        ("4-0", kept(), False),
        ("start", kept(added=9), False),
        ("4-0,0:6-0", kept(added=9), False),
        ("6-0,0:4-0", kept(added=9), True),
    ],
)
def test_a_cursor_before_what_is_kept_is_refused(after, about, trimmed):
    running = core(after)
    if trimmed:
        assert type(read(running, about, NO_KEY)[1]) is errors.InvalidCursor
    else:
        assert read(running, about, NO_KEY, None)[1] == []


@pytest.mark.parametrize("after", ["", "now", "1-2,", "1-2,3:4", "1-2,2:1-1", "1-2\n", 7, b"0-0"])
def test_a_bad_cursor_is_refused(after):
    with pytest.raises(errors.InvalidCursor):
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
        ([0, b"execution_not_found"], False),
    ],
)
def test_a_tag_is_read_from_the_execution(tags, wanted):
    running = core(scope=EVERYTHING.with_instance_tag("a.b", "c"))
    asked, found = read(running, NO_KEY, NO_KEY, [record()], tags)
    assert functions(asked)[3:] == ["ff_read_tags"]
    assert [each.execution_id for each in found] == [EID] * wanted


@pytest.mark.parametrize(
    "reply, payload", [([1, b"OK", b"large"], b"large"), ([0, b"execution_not_found"], None)]
)
def test_a_large_result_is_read_from_the_execution(reply, payload):
    asked, (found,) = read(core(), NO_KEY, NO_KEY, [record(payload_bytes="5")], reply)
    assert functions(asked)[3:] == ["ff_read_payload"]
    assert asked[3][4] == keys.result(EID)
    assert (found.payload_bytes, found.outcome) == (payload, "success")


@pytest.mark.parametrize(
    "replies, error",
    [
        ([NOPERM, NO_KEY], errors.PermissionDenied),
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
