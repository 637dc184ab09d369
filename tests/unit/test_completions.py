"""A subscription to completions step by step: what it reads, and from where it goes on."""

import hiredis
import pytest

from ff_fast import errors, keys
from ff_fast._core import completions
from ff_fast._core.completions import CompletionCore
from ff_fast.types import CompletionPayload, ScannerFilter

from .script import functions, request_of, words

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
    """Let *core* ask until it has items or nothing to ask; return what it asked for, and its items or an error."""
    replies = iter(replies)
    asked = []
    try:
        while not (items := core.take()) and (step := core.step()) is not None:
            commands = words(request_of(step))
            asked += commands
            if items := core.receive(*[next(replies) for _ in commands]):
                break
    except errors.FFError as error:
        items = error
    assert next(replies, EOFError) is EOFError
    return asked, items


def core(after="start", scope=EVERYTHING):
    """A subscription whose channels are confirmed."""
    new = CompletionCore(2, after, scope)
    listen(new)
    return new


def listen(core):
    for _, listener in core.part.listeners:
        listener.doubt(True)


def tell(core, *indexes):
    for index in indexes:
        core.part.listeners[index][1].told(b"C")


def xrange(index, after, of=1):
    count = b"%d" % (completions._REPLY_RECORDS // of)
    return [b"XRANGE", STREAMS[index], b"(" + after, b"+", b"COUNT", count]


def stored(last=b"10-1", added=1):
    """What XINFO says of a stream with something to read."""
    return kept(b"1-0", added, added, last)


def entry(identity=b"10-1", index=1, **more):
    fields = {
        "execution_id": EIDS[index],
        "namespace": "tenant",
        "outcome": "success",
        "produced_at_ms": "10",
        **more,
    }
    return [identity, [part.encode() for pair in fields.items() for part in pair]]


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
    assert read(new, kept(last=b"7-3"), NO_KEY) == (LOOK, [])
    assert new.start == "0-0~0.7-3.3"
    # Nothing is asked before something is pushed.
    assert read(new) == ([], [])
    tell(new, 1)
    asked, found = read(new, [entry()])
    assert asked == [xrange(1, b"0-0")]
    assert [each.cursor for each in found] == ["0-0~0.7-3.3~1.a-1.1"]


def test_it_begins_with_its_first_read_whatever_is_subscribed_to(monkeypatch):
    new = CompletionCore(2, None, EVERYTHING)
    now = completions.monotonic()
    monkeypatch.setattr(completions, "monotonic", lambda: now)
    # Also a read that has no time finds where it begins.
    assert new.patience(now) == now + completions._FIRST_LOOK_S
    assert new.patience(None) is None
    assert read(new, NO_KEY, NO_KEY)[0] == LOOK
    assert new.start == "0-0"
    assert new.patience(now) == now
    # What is not listened to is looked at often.
    assert read(new) == ([], [])
    now += completions._UNSUBSCRIBED_S
    assert new.wake_at <= now
    assert read(new, NO_KEY, NO_KEY)[0] == LOOK
    listen(new)
    assert read(new, NO_KEY, NO_KEY)[0] == LOOK
    assert new.wake_at > now + completions._UNSUBSCRIBED_S


def test_a_partition_whose_node_is_gone_is_looked_at_when_it_is_listened_to_again(monkeypatch):
    running = core()
    read(running, NO_KEY, NO_KEY)
    now = completions.monotonic()
    monkeypatch.setattr(completions, "monotonic", lambda: now)
    running.part.listeners[1][1].doubt(False)
    now += completions._UNSUBSCRIBED_S
    # That it does not answer is no failure of the subscription, which goes on with the others.
    assert read(running, errors.Unavailable()) == (LOOK[1:], [])
    for _ in range(3):
        now = running.wake_at
        assert read(running, NO_KEY) == (LOOK[:1], [])
    running.part.listeners[1][1].doubt(True)
    asked, found = read(running, stored(), [entry()])
    assert asked == [LOOK[1], xrange(1, b"0-0")]
    assert len(found) == 1


def test_a_lost_push_is_found_by_a_look(monkeypatch):
    running = core()
    read(running, NO_KEY, NO_KEY)
    now = running.wake_at
    monkeypatch.setattr(completions, "monotonic", lambda: now)
    asked, found = read(running, NO_KEY, stored(), [entry()])
    assert asked == [*LOOK, xrange(1, b"0-0")]
    assert len(found) == 1


def test_a_channel_that_was_lost_is_looked_at_when_it_is_back():
    running = core()
    read(running, NO_KEY, NO_KEY)
    listener = running.part.listeners[1][1]
    listener.doubt(False)
    assert read(running) == ([], [])
    listener.doubt(True)
    asked, found = read(running, stored(), [entry()])
    assert asked == [LOOK[1], xrange(1, b"0-0")]
    assert len(found) == 1


def test_a_partition_that_cannot_answer_keeps_no_other_from_being_read(monkeypatch):
    running = core()
    read(running, NO_KEY, NO_KEY)
    tell(running, 0, 1)
    asked, found = read(running, errors.Unavailable(), [entry()])
    assert asked == [xrange(0, b"0-0", 2), xrange(1, b"0-0", 2)]
    assert len(found) == 1
    now = running.wake_at
    monkeypatch.setattr(completions, "monotonic", lambda: now)
    there = [[b"10-1", []]]
    asked, found = read(running, stored(), stored(), there, [entry(index=0)])
    assert asked == [*LOOK, passed(1, b"10-1"), xrange(0, b"0-0")]
    assert len(found) == 1
    tell(running, 0, 1)
    assert len(read(running, hiredis.ReplyError("CLUSTERDOWN no"), [entry(b"11-0")])[1]) == 1
    tell(running, 0, 1)
    # Where none can, the error is raised.
    assert type(read(running, errors.Unavailable(), errors.Unavailable())[1]) is errors.Unavailable


def test_a_failed_subscription_is_raised():
    running = core()
    running.part.listeners[0][1].failed(errors.Unavailable())
    with pytest.raises(errors.Unavailable):
        running.step()


def test_from_the_start_everything_that_is_kept_is_read():
    asked, found = read(core(), NO_KEY, kept(b"5-0", 3, 9), [entry()])
    assert asked == [*LOOK, xrange(1, b"0-0")]
    assert found == [CompletionPayload(EIDS[1], "success", None, 10, None, "0-0~1.a-1.7")]


def test_a_cursor_goes_on_in_each_partition_behind_what_it_brought():
    running = core("0-0~0.4.1~1.7-1.3")
    assert running.start == "0-0~0.4.1~1.7-1.3"
    abouts = kept(b"4-0", 2, 2, b"8-1"), kept(b"5-0", 4, 4, b"90-1")
    entries = [entry(b"8-1", 0)], [entry(b"90-1", 1, flow_id=UUID)]
    asked, found = read(running, *abouts, THERE, THERE, *entries)
    places = passed(0, b"4-0"), passed(1, b"7-1")
    assert asked == [*LOOK, *places, xrange(0, b"4-0", 2), xrange(1, b"7-1", 2)]
    assert [each.cursor for each in found] == ["0-0~0.8-1.2~1.7-1.3", "0-0~0.8-1.2~1.2i-1.4"]
    assert found[1].flow_id == UUID
    tell(running, 1, 0)
    assert read(running, [], [])[0] == [xrange(1, b"90-1", 2), xrange(0, b"8-1", 2)]


def test_an_id_is_a_place_in_every_partition():
    running = core("6-0")
    asked, _ = read(running, kept(last=b"5-2"), kept(last=b"7-0"), [])
    assert asked[2:] == [xrange(1, b"6-0")]
    # Whatever comes is behind the last record, also if the id is a time that the server's clock has still to reach.
    tell(running, 0)
    assert read(running, [])[0] == [xrange(0, b"5-2")]


def test_after_a_lost_connection_it_reads_again_from_where_it_stood():
    running = core("4-0")
    assert (
        type(read(running, kept(), kept(), errors.Unavailable(), errors.Unavailable())[1])
        is errors.Unavailable
    )
    running.restart()
    asked, _ = read(running, kept(), kept(), [], [])
    assert asked == [*LOOK, xrange(0, b"4-0", 2), xrange(1, b"4-0", 2)]


def test_a_cursor_before_what_is_kept_is_refused(subtests):
    for after, about, lost in (
        ("4-0", kept(added=9), True),
        ("5-0", kept(added=9), False),
        ("4-0", kept(), False),
        ("start", kept(added=9), False),
        # Six records were trimmed. A place behind six has missed none, although its own record is gone.
        ("0-0~0.4-0.6", kept(added=9), False),
        ("0-0~0.4-0.5", kept(added=9), True),
        ("0-0", kept(added=9), True),
        # All were trimmed.
        ("0-0~0.4-0.9", kept(b"0-0", 0, 9, b"4-0"), False),
        ("0-0~0.4-0.8", kept(b"0-0", 0, 9, b"7-0"), True),
        # The stream is not the one that was read, or is gone.
        ("0-0~0.8-0.3", kept(), True),
        ("0-0~0.8-0.3", NO_KEY, True),
        # Its record is not among those that are kept; if somebody deleted records up to there, that says nothing.
        ("0-0~0.6-0.2", kept(), True),
        ("0-0~0.6-0.2", kept(deleted=b"6-0"), False),
        ("0-0~0.7-0.3", kept(deleted=b"7-0"), False),
    ):
        with subtests.test(after=after, about=about):
            running = core(after)
            there = [[]] * len(running._places)
            if lost:
                assert type(read(running, about, NO_KEY, *there)[1]) is errors.InvalidCursor
            else:
                behind = (
                    running._places.get(0, running._base)[:2] < completions._Stream.of(about).last
                )
                assert (
                    read(
                        running,
                        about,
                        NO_KEY,
                        *there,
                        *([[]] if behind or after == "start" else []),
                    )[1]
                    == []
                )


def test_a_bad_cursor_is_refused(subtests):
    large = "zzzzzzzzzzzzz"
    for after in (
        *("", "now", "1-2~", "1-2~3.4", "1-2~2.1-1", "1-2\n", "1-2~1.1.1.1", 7, b"0-0"),
        f"0-0~0.{large}",
    ):
        with subtests.test(after=after), pytest.raises(errors.InvalidCursor):
            core(after)


def test_a_namespace_leaves_others_out_and_goes_on_behind_them():
    running = core(scope=ScannerFilter(namespace="another"))
    assert read(running, NO_KEY, stored(), [entry()])[1] == []
    tell(running, 1)
    assert read(running, [])[0] == [xrange(1, b"10-1")]


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
    asked, found = read(running, NO_KEY, stored(), [entry()], tags)
    assert functions(asked)[3:] == ["ff_read_tags"]
    assert [each.execution_id for each in found] == [EIDS[1]] * wanted


@pytest.mark.parametrize(
    "reply, payload",
    [([1, b"OK", b"large"], b"large"), ([1, b"OK", b""], None), (GONE, None), (WRONGTYPE, None)],
)
def test_a_result_is_read_from_the_execution(reply, payload):
    asked, (found,) = read(core(), NO_KEY, stored(), [entry(payload_bytes="5")], reply)
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
    replies = [NO_KEY, kept(b"1-0", 8, 8, b"8-0"), entries]
    # Each read takes the largest group that fits; one that takes all leaves nothing to ask.
    for asks in (1, 3, 1, 1):
        asked, found = read(running, *replies, *[[1, b"OK", b"x"]] * asks)
        groups.append(functions(asked[-asks:]))
        told += found
        replies = []
    assert groups == [["ff_read_payload"] * asks for asks in (1, 3, 1, 1)]
    assert [each.cursor for each in told] == [f"0-0~1.{n}.{n}" for n in range(1, 9)]
    assert [each.payload_bytes for each in told] == [b"x" if size else None for size in sizes]
    assert read(running) == ([], [])


def test_a_partition_that_has_more_is_read_on_in_turn_with_the_others(monkeypatch):
    monkeypatch.setattr(completions, "_REPLY_RECORDS", 2)
    running = core()
    two = kept(b"1-0", 3, 3, b"3-0"), kept(b"1-0", 3, 3, b"3-0")
    one = [entry(b"1-0", 0)], [entry(b"1-0")]
    read(running, *two, *one)
    tell(running, 0)
    asked, _ = read(running, [entry(b"2-0", 0)], [])
    assert asked == [xrange(0, b"1-0", 2), xrange(1, b"1-0", 2)]
    asked, _ = read(running, [])
    assert asked == [xrange(0, b"2-0")]
    assert read(running) == ([], [])


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
            asked, found = read(running, NO_KEY, stored(b"11-0", 2), [foreign, entry(b"11-0")])
            assert len(asked) == 3
            assert [each.cursor for each in found] == ["0-0~1.b.2"]


def test_a_key_of_another_type_takes_one_partition_out_until_it_is_gone():
    running = core(None)
    read(running, kept(), kept())
    tell(running, 0, 1)
    asked, found = read(running, [entry(b"8-0", 0)], WRONGTYPE)
    assert asked == [xrange(0, b"7-0", 2), xrange(1, b"7-0", 2)]
    assert len(found) == 1
    tell(running, 1)
    asked, found = read(running, [entry(b"9-0")])
    assert asked == [xrange(1, b"7-0")]
    assert len(found) == 1
    error = read(core(None), WRONGTYPE, WRONGTYPE)[1]
    assert type(error) is errors.Corruption


@pytest.mark.parametrize(
    "replies, error",
    [
        ([NOPERM, NO_KEY], errors.PermissionDenied),
        ([NO_KEY, [b"length", b"x"]], errors.ProtocolError),
        ([NO_KEY, stored(), NOPERM], errors.PermissionDenied),
        ([NO_KEY, stored(), b"text"], errors.ProtocolError),
        ([NO_KEY, stored(), [entry(payload_bytes="5")], NOPERM], errors.PermissionDenied),
    ],
)
def test_a_refused_read_passes_nothing(replies, error):
    running = core()
    assert type(read(running, *replies)[1]) is error
    running.restart()
    assert read(running, NO_KEY, stored(), [])[0][2] == xrange(1, b"0-0")
