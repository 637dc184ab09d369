"""An execution is followed to its end across all its attempts, and waited for, in both shells."""

import asyncio
import contextlib
import threading

import pytest

import ff_fast
from ff_fast import (
    AttemptStarted,
    End,
    FailureClass,
    Gap,
    ResumeCondition,
    RetryPolicy,
    Snapshot,
    StreamFrame,
    StreamMode,
    SummaryView,
    TailVisibility,
    TimeoutBehavior,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast._core import ops

from ..shells import KINDS, Opener, Shell
from ..waiting import wait_until, wait_until_async
from .executions import WORKER, World

SOON = 10
"""Deadline of what a push tells, in seconds: well below the half minute after which the state is read anyway."""

PATCH = StreamMode.durable_summary()
BEST_EFFORT = StreamMode.best_effort_live(60_000)
AGAIN = RetryPolicy(5, delay=0)


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def connect(kind, server):
    opener = Opener(kind)
    yield lambda: opener(server.url)
    opener.close()


@pytest.fixture
def shell(connect):
    return connect()


def write(world, handle, *payloads, mode=None):
    with world.backend.open_writer(handle, mode=mode or StreamMode.durable()) as writer:
        for payload in payloads:
            writer.write(payload)


def fail(world, handle, reason="no luck"):
    """End the attempt; another one is due."""
    world.backend.fail(handle, reason, FailureClass.TRANSIENT)
    world.fire(handle.execution_id, "delay")


def lose(world, handle):
    """The worker of the attempt is lost; another one is due."""
    world.fire(handle.execution_id, "lease")


def suspend(world, handle, **options):
    """Suspend the execution; return what resumes it."""
    point = world.backend.create_waitpoint(handle)
    spec = WaitpointSpec(WaitpointKind.SIGNAL_NAME, b"go", point.hmac_token)
    world.backend.suspend(handle, ResumeCondition.any(spec), **options)
    eid = handle.execution_id
    return lambda: world.backend.deliver_signal(eid, point, "go")


def told(items):
    """Items in short: frames are their payloads, attempts their numbers, an end its outcome."""
    words = []
    for item in items:
        match item:
            case StreamFrame(payload=payload):
                words.append(payload.decode())
            case AttemptStarted(index):
                words.append(index)
            case End(outcome=outcome, error=error):
                words.append((outcome, error))
            case _:
                words.append(item)
    return words


def take(reader, count):
    """The next items of a reader, exactly so many."""
    items = []
    while len(items) < count:
        batch = reader.next_batch(SOON)
        assert batch, f"nothing after {told(items)}"
        items += batch
    assert len(items) == count, told(items)
    return items


def rest(reader):
    """All items to the end."""
    items = []
    while not reader.ended:
        batch = reader.next_batch(SOON)
        assert batch or reader.ended, f"nothing after {told(items)}"
        items += batch
    return items


def followed(backend, eid, *args, **options):
    with contextlib.closing(backend.follow(eid, *args, **options)) as reader:
        return rest(reader)


# -- attempts -----------------------------------------------------------------------------------------------------------


def test_it_waits_for_the_first_claim_and_hears_of_a_retry(world, shell):
    eid = world.create(retry=AGAIN)
    reader = shell.follow(eid)
    assert reader.cursor == "start"
    assert reader.next_batch(0.01) == []
    handle = world.claim()
    assert told(take(reader, 1)) == [0]
    write(world, handle, "a", "b")
    assert told(take(reader, 2)) == ["a", "b"]
    fail(world, handle)
    assert reader.next_batch(0.01) == []
    handle = world.claim()
    assert told(take(reader, 1)) == [1]
    write(world, handle, "c")
    world.backend.complete(handle, b"done")
    assert told(rest(reader)) == ["c", ("success", None)]
    assert reader.ended
    assert reader.last.reason == "attempt_success"
    assert reader.next_batch(0.01) == []


@pytest.mark.parametrize("found", ["by a supervisor", "by the next worker"])
def test_a_lost_worker_is_replaced(world, shell, found):
    eid, handle = world.owned()
    write(world, handle, "a")
    reader = shell.follow(eid)
    assert told(take(reader, 2)) == [0, "a"]
    if found == "by a supervisor":
        lose(world, handle)
        handle = world.claim()
    else:
        world.due(eid, "lease")
        tokens = world.backend.find_reclaimable(10_000)
        token = next(each for each in tokens if each.grant.execution_id == eid)
        handle = world.backend.claim_from_reclaim(token, **WORKER)
    assert told(take(reader, 1)) == [1]
    write(world, handle, "b")
    world.backend.complete(handle)
    assert told(rest(reader)) == ["b", ("success", None)]


def test_an_attempt_that_is_interrupted_goes_on_and_does_not_start_again(world, shell):
    eid, handle = world.owned()
    reader = shell.follow(eid)
    write(world, handle, "a")
    resume = suspend(world, handle)
    assert told(take(reader, 2)) == [0, "a"]
    resume()
    handle = world.claim()
    write(world, handle, "b")
    assert told(take(reader, 1)) == ["b"]
    world.backend.delay(handle, 60)
    world.fire(eid, "delay")
    handle = world.claim()
    write(world, handle, "c")
    assert told(take(reader, 1)) == ["c"]
    child = world.create(parent_id=eid)
    world.backend.wait_children(handle)
    world.backend.cancel(child)
    handle = world.claim()
    write(world, handle, "d")
    world.backend.complete(handle)
    assert told(rest(reader)) == ["d", ("success", None)]


def test_a_claim_that_is_given_back_starts_no_second_attempt(world, shell):
    eid, handle = world.owned()
    reader = shell.follow(eid)
    assert told(take(reader, 1)) == [0]
    world.raw.spublish(keys.attempt_channel(eid, 0), "R")
    assert reader.next_batch(0.05) == []
    world.call(give_back(handle))
    handle = world.claim()
    assert handle.attempt_index == 0
    write(world, handle, "a")
    world.backend.complete(handle)
    assert told(rest(reader)) == ["a", ("success", None)]


def test_a_claim_that_is_given_back_after_its_lease_is_a_lost_worker(world, shell):
    """A tail has ended with it, and no frame of the attempt may follow."""
    eid, handle = world.owned()
    reader = shell.follow(eid)
    assert told(take(reader, 1)) == [0]
    world.due(eid, "lease")
    (ended,) = world.backend.tail(eid, 0)
    assert ended.reason == "producer_lost"
    assert world.call(give_back(handle))[0] is False
    world.fire(eid, "lease")
    handle = world.claim()
    assert handle.attempt_index == 1
    write(world, handle, "a")
    world.backend.complete(handle)
    assert told(rest(reader)) == [1, "a", ("success", None)]


def give_back(handle):
    return ops.give_back(keys.partition_index(handle.execution_id), handle.fields().lease_id)


# -- ends ---------------------------------------------------------------------------------------------------------------


def test_an_execution_that_ends_before_a_claim_has_its_end_alone(world, shell):
    live = []
    for end in (
        lambda eid: world.backend.cancel(eid, reason="not needed"),
        lambda eid: world.fire(eid, "deadline"),
    ):
        eid = world.create(deadline=60)
        reader = shell.follow(eid)
        assert reader.next_batch(0.01) == []
        end(eid)
        live.append(rest(reader))
        assert followed(shell, eid) == live[-1]
        assert followed(shell, eid, live[-1][0].cursor) == live[-1]
    cancelled, expired = live
    assert cancelled == [
        End("attempt_cancelled", outcome="cancelled", error="not needed"),
    ]
    assert expired == [End("expired", outcome="expired", error="execution_deadline")]


ENDS = {
    "failed": (
        lambda world, handle: world.backend.fail(handle, "no room"),
        End("attempt_failure", outcome="failed", error="no room"),
    ),
    "cancelled": (
        lambda world, handle: world.backend.cancel(handle, reason="nobody reads"),
        End("attempt_cancelled", outcome="cancelled", error="nobody reads"),
    ),
    "out of time": (
        lambda world, handle: world.fire(handle.execution_id, "deadline"),
        End("expired", outcome="expired", error="execution_deadline"),
    ),
    "out of the attempt's time": (
        lambda world, handle: world.fire(handle.execution_id, "attempt"),
        End("attempt_timeout", outcome="expired", error="attempt_timeout"),
    ),
    "lost once too often": (
        lose,
        End("producer_lost", outcome="failed", error="max_reclaims_exceeded"),
    ),
    "never resumed": (
        lambda world, handle: (
            suspend(world, handle, timeout=60, on_timeout=TimeoutBehavior.EXPIRE),
            world.fire(handle.execution_id, "suspension"),
        ),
        End("suspension_timeout", outcome="expired", error="suspension_timeout"),
    ),
}


@pytest.mark.parametrize("how", ENDS)
def test_the_end_says_what_ended_the_execution(world, shell, how):
    end, wanted = ENDS[how]
    policy = RetryPolicy(1, delay=0, max_reclaims=0)
    eid, handle = world.owned(deadline=60, attempt_timeout=60, retry=policy)
    fail(world, handle, "an earlier failure")
    handle = world.claim()
    reader = shell.follow(eid)
    assert told(take(reader, 2)) == [0, 1]
    end(world, handle)
    assert rest(reader) == [wanted]
    assert followed(shell, eid)[-1] == wanted


def test_an_execution_that_is_cancelled_while_a_retry_is_due_starts_no_attempt(world, shell):
    eid, handle = world.owned(retry=AGAIN)
    reader = shell.follow(eid)
    write(world, handle, "a")
    world.backend.fail(handle, "no luck", FailureClass.TRANSIENT)
    assert told(take(reader, 2)) == [0, "a"]
    world.backend.cancel(eid, reason="enough")
    whole = [0, "a", ("cancelled", "enough")]
    assert told(rest(reader)) == whole[2:]
    assert told(followed(shell, eid)) == whole
    # The document of the last attempt that was claimed is the newest.
    assert told(followed(shell, eid, snapshot=True)) == whole


def test_members_of_a_cancelled_flow_end(world, shell):
    flow = world.create_flow()
    eid = world.create(flow_id=flow)
    reader = shell.follow(eid)
    assert reader.next_batch(0.01) == []
    world.backend.cancel_flow(flow)
    assert told(rest(reader)) == [("cancelled", "flow cancelled")]


# -- cursors ------------------------------------------------------------------------------------------------------------


def story(world):
    """An execution with everything: retries, a lost worker, an interruption, all modes; return its id."""
    eid, handle = world.owned(retry=AGAIN)
    write(world, handle, "a", "b", "c")
    fail(world, handle)
    # An attempt without a frame.
    handle = world.claim()
    lose(world, handle)
    handle = world.claim()
    write(world, handle, *"defg", mode=BEST_EFFORT)
    world.backend.delay(handle, 60)
    world.fire(eid, "delay")
    handle = world.claim()
    write(world, handle, '{"a":1}', '{"b":2}', mode=PATCH)
    fail(world, handle)
    handle = world.claim()
    with world.backend.open_writer(handle, mode=BEST_EFFORT) as writer:
        for i in range(6):
            writer.write(f"{i}")
            writer.write(f'{{"at":{i}}}', mode=PATCH)
            writer.write(f"[{i}]", mode=StreamMode.durable())
    world.backend.complete(handle, b"done")
    return eid


@pytest.mark.parametrize("visibility", TailVisibility)
def test_from_every_item_on_a_fresh_backend_reads_the_rest(world, connect, visibility):
    eid = story(world)
    whole = followed(connect(), eid, visibility=visibility)
    assert [item.attempt_index for item in whole if isinstance(item, AttemptStarted)] == [
        0,
        1,
        2,
        3,
    ]
    assert not [item for item in whole if isinstance(item, Gap)]
    assert [isinstance(item, End) for item in whole].index(True) == len(whole) - 1
    frames = [item for item in whole if isinstance(item, StreamFrame)]
    best_effort = [item for item in frames if item.mode == "best_effort"]
    assert len(frames) == (27 if visibility is TailVisibility.ALL else 17)
    assert bool(best_effort) == (visibility is TailVisibility.ALL)
    other = connect()
    for cut, item in enumerate(whole):
        left = whole[cut + 1 :] or [item]
        again = followed(other, eid, item.cursor, visibility=visibility)
        assert again == left
        assert [each.cursor for each in again] == [each.cursor for each in left]


def test_a_cursor_of_a_running_execution_leads_through_later_attempts(world, connect):
    eid, handle = world.owned(retry=AGAIN)
    write(world, handle, "a", "b")
    reader = connect().follow(eid)
    first = take(reader, 3)
    fail(world, handle)
    handle = world.claim()
    write(world, handle, "c")
    first += take(reader, 2)
    other = connect()
    readers = [other.follow(eid, item.cursor) for item in first]
    left = [take(each, 4 - at) if at < 4 else [] for at, each in enumerate(readers)]
    assert [told(items) for items in left] == [told(first[at + 1 :]) for at in range(5)]
    world.backend.complete(handle)
    for each in [reader, *readers]:
        assert told(rest(each)) == [("success", None)]


def test_cursors_of_tails_pages_and_summaries_lead_on(world, shell):
    eid = story(world)
    whole = followed(shell, eid)
    frames = [item for item in whole if isinstance(item, StreamFrame)]
    page = shell.read_stream(eid, 3, count=3)
    assert followed(shell, eid, page.cursor) == [*frames[-15:], whole[-1]]
    document = shell.read_summary(eid, 3)
    assert followed(shell, eid, document.cursor) == [frames[-1], whole[-1]]


def test_thousands_of_items_are_read_whole(world, shell):
    eid, handle = world.owned(retry=AGAIN)
    reader = shell.follow(eid)
    write(world, handle, *map(str, range(2_000)))
    fail(world, handle)
    handle = world.claim()
    write(world, handle, *map(str, range(3_000)), mode=BEST_EFFORT)
    world.backend.complete(handle)
    items = rest(reader)
    wanted = [0, *map(str, range(2_000)), 1, *map(str, range(3_000)), ("success", None)]
    assert told(items) == wanted
    cut = items[1_234]
    assert told(followed(shell, eid, cut.cursor)) == wanted[1_235:]


# -- snapshots ----------------------------------------------------------------------------------------------------------


def test_whoever_joins_with_a_snapshot_has_the_document_at_the_end(world, shell):
    eid, handle = world.owned(retry=AGAIN)
    write(world, handle, '{"lost":true}', mode=PATCH)
    fail(world, handle)
    handle = world.claim()
    readers = [shell.follow(eid, snapshot=True)]
    with world.backend.open_writer(handle, mode=PATCH) as writer:
        for i in range(12):
            writer.write(f'{{"n{i % 5}":{i}}}')
            writer.write("token", mode=BEST_EFFORT)
            if i % 3 == 0:
                writer.flush()
                readers.append(shell.follow(eid, snapshot=True))
                assert readers[-1].next_batch(SOON)
    final = shell.read_summary(eid, 1)
    world.backend.complete(handle)
    readers.append(shell.follow(eid, snapshot=True))
    for at, reader in enumerate(readers):
        first = reader.last
        if first is None:
            (first, *items) = rest(reader)
        else:
            items = rest(reader)
        if at == 0:
            assert isinstance(first, AttemptStarted | Snapshot)
        else:
            assert isinstance(first, Snapshot)
        assert first.attempt_index == 1
        assert told(items)[-1] == ("success", None)
        view = SummaryView(first if isinstance(first, Snapshot) else None)
        frames = [item for item in items if isinstance(item, StreamFrame)]
        for frame in frames:
            view.apply(frame)
        assert (view.version, view.document_json) == (12, final.document_json)


def test_an_attempt_without_a_document_begins_with_its_first_frame(world, shell):
    eid, handle = world.owned()
    write(world, handle, "a")
    reader = shell.follow(eid, snapshot=True)
    assert told(take(reader, 2)) == [0, "a"]


def test_with_a_cursor_the_snapshot_is_of_its_attempt_and_nothing_comes_twice(world, shell):
    eid = story(world)
    whole = followed(shell, eid)
    for cut in (0, 10, 13, len(whole) - 3):
        first, *items = followed(shell, eid, whole[cut].cursor, snapshot=True)
        attempt = int(whole[cut].cursor.partition(".")[0])
        document = shell.read_summary(eid, attempt)
        if document is None:
            assert [first, *items] == whole[cut + 1 :]
            continue
        assert first == Snapshot(document.document_json, document.version, attempt)
        assert items == followed(shell, eid, first.cursor)
        place = max(document.cursor, whole[cut].cursor, key=ff_fast.types.parse_cursor)
        assert first.cursor == place


# -- what is lost -------------------------------------------------------------------------------------------------------


def test_an_attempt_that_is_not_kept_any_more_is_told_as_a_gap(world, shell):
    eid, handle = world.owned(retry=AGAIN)
    write(world, handle, "a", "b")
    fail(world, handle)
    world.claim()
    cut = take(shell.follow(eid), 4)[1].cursor
    for key in (keys.stream, keys.live, keys.head, keys.meta, keys.summary):
        world.raw.delete(key(eid, 0))
    again = shell.follow(eid)
    assert told(take(again, 3)) == [0, Gap(1, 1, "expired"), 1]
    again = shell.follow(eid, cut)
    assert told(take(again, 2)) == [Gap(2, 1, "expired"), 1]


@pytest.mark.parametrize("claimed", [True, False])
def test_an_execution_that_is_removed_is_an_error(world, shell, claimed):
    eid = world.create()
    if claimed:
        world.claim()
    reader = shell.follow(eid)
    assert len(reader.next_batch(SOON if claimed else 0.05)) == claimed
    world.raw.delete(*world.keys_of(eid))
    channel = keys.attempt_channel(eid, 0) if claimed else keys.execution_channel(eid)
    world.raw.spublish(channel, "R")
    with pytest.raises(errors.ExecutionNotFound):
        reader.next_batch(SOON)
    with pytest.raises(errors.ExecutionNotFound):
        shell.follow(eid).next_batch(SOON)
    with pytest.raises(errors.ExecutionNotFound):
        shell.wait(eid, SOON)


def test_attempts_that_the_server_has_lost_are_left_for_those_that_it_has(world, shell):
    eid, handle = world.owned(retry=AGAIN)
    write(world, handle, "a")
    saved = {key: world.raw.dump(key) for key in world.keys_of(eid)}
    fail(world, handle)
    write(world, world.claim(), "b")
    reader = shell.follow(eid)
    assert told(take(reader, 4)) == [0, "a", 1, "b"]
    # As a replica that had not heard of the second attempt, and has taken over.
    world.raw.delete(*world.keys_of(eid))
    for key, value in saved.items():
        world.raw.restore(key, 0, value)
    world.raw.spublish(keys.attempt_channel(eid, 1), "R")
    items = take(reader, 3)
    assert told(items)[1:] == [0, "a"]
    assert items[0].reason == "cursor_ahead"


# -- reads that are broken off ------------------------------------------------------------------------------------------


def kill_readers(raw):
    """Close the connections over which pushes come; return how many there were."""
    found = [each for each in raw.client_list() if each["name"] == "ff_fast:readers"]
    return sum(raw.client_kill_filter(_id=each["id"]) for each in found)


def cut(reader, raw):
    """Kill the connection of a reader that has nothing to read, once it has one."""

    def killed():
        assert reader.next_batch(0.05) == []
        return kill_readers(raw)

    wait_until(killed)


def test_a_lost_connection_loses_nothing(world, shell):
    eid = world.create(retry=AGAIN)
    reader = shell.follow(eid)
    cut(reader, world.raw)
    handle = world.claim()
    assert told(take(reader, 1)) == [0]
    cut(reader, world.raw)
    write(world, handle, "a")
    assert told(take(reader, 1)) == ["a"]
    fail(world, handle)
    kill_readers(world.raw)
    handle = world.claim()
    write(world, handle, "b")
    kill_readers(world.raw)
    world.backend.complete(handle)
    assert told(rest(reader)) == [1, "b", ("success", None)]


def test_a_closed_reader_says_so_and_a_closed_backend_too(world, connect):
    eid = world.create()
    backend = connect()
    reader = backend.follow(eid)
    assert reader.next_batch(0.01) == []
    reader.close()
    with pytest.raises(errors.Unavailable, match="closed"):
        reader.next_batch(SOON)
    reader = backend.follow(eid)
    assert reader.next_batch(0.01) == []
    backend.close()
    with pytest.raises(errors.Unavailable, match="closed"):
        reader.next_batch(SOON)
    with pytest.raises(errors.Unavailable, match="closed"):
        backend.wait(eid)


def test_a_cancelled_read_is_continued_by_the_next_one(world, server):
    eid = world.create(retry=AGAIN)

    async def run():
        async with ff_fast.aio.ValkeyBackend.connect(server.url) as backend:
            reader = backend.follow(eid)
            items = []

            async def read_on():
                async for item in reader:
                    items.append(item)  # noqa: PERF401 - what came before a cancellation is kept

            async def cancelled(ready):
                task = asyncio.create_task(read_on())
                await wait_until_async(ready)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task

            async def has(count):
                return len(items) >= count

            await asyncio.wait_for(asyncio.shield(cancelled(lambda: has(0))), 10)
            handle = await asyncio.to_thread(world.claim)
            await cancelled(lambda: has(1))
            await asyncio.to_thread(write, world, handle, "a")
            await cancelled(lambda: has(2))
            await asyncio.to_thread(fail, world, handle)
            await asyncio.to_thread(world.claim)
            await cancelled(lambda: has(3))
            await asyncio.to_thread(world.backend.cancel, eid)
            await asyncio.wait_for(read_on(), SOON)
            return items

    assert told(asyncio.run(run())) == [0, "a", 1, ("cancelled", "cancelled")]


# -- waiting ------------------------------------------------------------------------------------------------------------

OUTCOMES = {
    "completed": (lambda world, handle: world.backend.complete(handle, b"\x00done"), None, None),
    "completed without a result": (
        lambda world, handle: world.backend.complete(handle),
        None,
        None,
    ),
    "failed": (
        lambda world, handle: world.backend.fail(handle, "no room"),
        errors.ExecutionFailed,
        "no room",
    ),
    "cancelled": (
        lambda world, handle: world.backend.cancel(handle, reason="nobody reads"),
        errors.ExecutionCancelled,
        "nobody reads",
    ),
    "expired": (
        lambda world, handle: world.fire(handle.execution_id, "deadline"),
        errors.ExecutionExpired,
        "execution_deadline",
    ),
}


@pytest.mark.parametrize("how", OUTCOMES)
def test_whoever_waits_gets_the_result_or_what_ended_it(world, kind, server, how):
    end, error, reason = OUTCOMES[how]
    eid = world.create(deadline=60, retry=AGAIN)

    async def run():
        backend = await Shell(kind).connect(server.url)
        async with backend:
            early = [asyncio.create_task(backend.wait(eid)) for _ in range(3)]
            await asyncio.sleep(0)
            handle = await asyncio.to_thread(world.claim)
            await asyncio.to_thread(fail, world, handle, "an earlier failure")
            handle = await asyncio.to_thread(world.claim)
            assert not any(task.done() for task in early)
            await asyncio.to_thread(end, world, handle)
            late = backend.wait(eid, SOON)
            waits = asyncio.gather(*early, late, return_exceptions=True)
            return await asyncio.wait_for(waits, SOON)

    ends = asyncio.run(run())
    assert len(ends) == 4
    for each in ends:
        if error is None:
            assert each == (b"\x00done" if how == "completed" else b"")
        else:
            assert type(each) is error
            assert each.reason == reason
            assert reason in str(each)


def test_a_wait_ends_at_its_time_and_the_execution_goes_on(world, shell):
    eid, handle = world.owned()
    for timeout in (0, 0.02):
        with pytest.raises(errors.DeadlineExceeded, match="goes on") as caught:
            shell.wait(eid, timeout)
        assert caught.value.outcome is errors.Outcome.NOT_APPLIED
    world.backend.complete(handle, b"done")
    for timeout in (SOON, 0, 1e-6):
        assert shell.wait(eid, timeout) == b"done"


@pytest.mark.standalone("it looks inside the hub of one server")
def test_a_cancelled_wait_leaves_nothing_behind(world, server):
    eid, handle = world.owned()

    async def run():
        async with ff_fast.aio.ValkeyBackend.connect(server.url) as backend:
            waiting = asyncio.create_task(backend.wait(eid))
            channel = keys.execution_channel(eid)

            async def subscribed():
                return dict(world.raw.pubsub_shardnumsub(channel)).get(channel)

            await wait_until_async(subscribed)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            assert backend._hub._core.routes == {}
            await backend.complete(handle, b"done")
            return await backend.wait(eid, SOON)

    assert asyncio.run(run()) == b"done"


def test_closing_the_backend_ends_the_waits_of_its_threads(world, server):
    eid = world.create()
    caught = []

    def wait():
        try:
            backend.wait(eid)
        except errors.FFError as error:
            caught.append(error)

    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        thread = threading.Thread(target=wait)
        thread.start()
        channel = keys.execution_channel(eid)
        wait_until(lambda: dict(world.raw.pubsub_shardnumsub(channel)).get(channel))
    thread.join(SOON)
    assert not thread.is_alive()
    assert [type(error) for error in caught] == [errors.Unavailable]
