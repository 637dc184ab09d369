"""Somebody else's entries in the streams of an attempt: appends are refused whole, and the execution ends nevertheless."""

import pytest
import redis

import ff_fast
from ff_fast import End, Frame, FrameKind, StreamMode, errors, keys
from ff_fast.errors import Corruption, Outcome

from ..shells import KINDS, Opener
from .executions import World
from .readers import Reader
from .streams import Stream, live, log

MAX_ID = "18446744073709551615-18446744073709551615"
HIGH_ID = "9999999999999-7"


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


@pytest.fixture(params=KINDS)
def backend(request, server):
    opener = Opener(request.param)
    yield opener(server.url)
    opener.close()


@pytest.fixture
def stream(world):
    made = Stream(world.raw, world.backend, world.lane)
    made.open()
    made.append(log(b"1"))
    return made


def damage(raw, key, how):
    if how == "another type":
        raw.delete(key)
        raw.set(key, "junk")
    else:
        raw.xadd(key, {"junk": "1"}, id=MAX_ID if how == "the last id" else HIGH_ID)
        if how == "deleted":
            raw.xdel(key, HIGH_ID)


DAMAGES = ("a high id", "deleted", "the last id", "another type")


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("key", ["log", "live"])
@pytest.mark.parametrize("blocks", [(log(b"2"), live(b"3")), (live(b"2"), log(b"3"))])
def test_a_batch_for_both_streams_stores_nothing_where_one_cannot_be_written(
    stream, key, how, blocks
):
    damage(stream.raw, getattr(stream, key), how)
    before = stream.everything()
    for _ in range(2):
        with pytest.raises(redis.ResponseError) as caught:
            stream.append(*blocks, first=2)
        error = errors.from_server_error(str(caught.value))
        assert (type(error), error.outcome) == (Corruption, Outcome.NOT_APPLIED)
    assert stream.everything() == before


@pytest.mark.parametrize("how", DAMAGES)
def test_a_writer_learns_that_its_stream_is_not_its_own(world, how):
    eid, handle = world.owned()
    writer = world.backend.open_writer(handle)
    writer.write(b"1")
    writer.flush()
    damage(world.raw, keys.stream(eid, 0), how)
    writer.write(b"2")
    with pytest.raises(Corruption) as caught:
        writer.close()
    assert (caught.value.outcome, caught.value.retryable) == (Outcome.NOT_APPLIED, False)
    with pytest.raises(Corruption):
        world.backend.append_frame(handle, Frame(b"x", FrameKind.EVENT))
    world.backend.complete(handle, b"r")
    world.check(eid)


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("end", ["complete", "fail", "cancel", "deadline", "lapse"])
def test_an_execution_ends_whatever_stands_in_its_streams(world, how, end):
    parent, above = world.owned()
    eid = world.create(parent_id=parent, deadline=600)
    handle = world.claim()
    world.backend.wait_children(above)
    for key in (
        keys.stream(eid, 0), keys.live(eid, 0), keys.history(eid), keys.completions(keys.slot_tag_of(eid)),
    ):  # fmt: skip
        damage(world.raw, key, how)
    if end == "complete":
        world.backend.complete(handle, b"r")
        world.backend.complete(handle, b"r")
    elif end == "fail":
        world.backend.fail(handle, "no", ff_fast.FailureClass.PERMANENT)
    elif end == "cancel":
        world.backend.cancel(eid)
    elif end == "deadline":
        world.fire(eid, "deadline")
    else:
        world.raw.hset(keys.core(eid), "max_reclaims", 0)
        world.fire(eid, "lease")
    assert world.state(eid) in ("completed", "failed", "cancelled", "expired")
    assert world.timers(eid) == {}
    assert [key for key in world.keys_of(eid) if world.raw.pttl(key) < 0] == []
    assert world.state(parent) == "waiting"
    assert world.raw.hget(keys.meta(eid, 0), "closed_reason") is not None
    # Later tests of this partition's completions find them intact.
    world.raw.delete(keys.completions(keys.slot_tag_of(eid)))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["a high id", "deleted"])
def test_a_blocked_tail_gets_the_end_behind_a_foreign_entry_at_once(kind, world, server, how):
    """The tail would read the state only after five seconds without an entry."""
    eid, handle = world.owned()
    with world.backend.open_writer(handle, mode=StreamMode.durable()) as writer:
        writer.write(b"1")
    reader = Reader(kind, server.url, eid)
    damage(world.raw, keys.stream(eid, 0), how)
    world.backend.complete(handle)
    items = reader.result()
    assert [item.payload for item in items[:-1]] == [b"1"]
    assert isinstance(items[-1], End)
    assert items[-1].reason == "attempt_success"


@pytest.mark.parametrize("how", ["the last id", "another type"])
def test_a_stream_that_takes_no_end_is_ended_by_its_state(backend, world, how):
    eid, handle = world.owned()
    damage(world.raw, keys.stream(eid, 0), how)
    world.backend.complete(handle)
    if how == "the last id":
        assert list(backend.read_stream(eid, 0)) == []
        assert backend.read_stream(eid, 0).end_reason == "attempt_success"
    else:
        with pytest.raises(errors.Corruption):
            backend.read_stream(eid, 0)
    assert backend.describe(eid).state == "completed"


def test_entries_in_the_form_of_ours_behind_the_last_frame_are_no_frames(backend, world, server):
    """As XADD with `*` makes them: the second one of a millisecond has the sequence of the first frame."""
    eid, handle = world.owned()
    with world.backend.open_writer(handle, mode=StreamMode.durable()) as writer:
        for _ in range(9):
            writer.write(b"ours")
    with world.raw.pipeline(transaction=True) as pipe:
        for key in (keys.stream(eid, 0), keys.live(eid, 0)):
            for _ in range(4):
                pipe.xadd(key, {"payload": "foreign"})
        pipe.execute()
    for outcome in (None, "attempt_success"):
        pages, after = [], None
        while len(pages) < 5:
            pages.append(backend.read_stream(eid, after=after, count=4))
            after = pages[-1].cursor
        assert [frame.sequence for page in pages for frame in page] == list(range(1, 10))
        assert {frame.payload for page in pages for frame in page} == {b"ours"}
        assert [page.gaps for page in pages] == [()] * 5
        assert pages[-1].end_reason == outcome
        tail = backend.tail(eid, after=pages[0].cursor)
        if outcome is None:
            assert len(tail.next_batch(timeout=5)) == 5
            assert tail.next_batch(timeout=0) == []
            world.backend.complete(handle)
        else:
            assert [type(item) for item in tail.next_batch(timeout=5)[5:]] == [End]
        tail.close()
