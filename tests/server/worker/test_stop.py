"""How a handler hears that it shall stop, and what ends it.

The leases of these tests are renewed for the first time after minutes, so within a test's patience a push alone can tell.
"""

import asyncio
import threading

import pytest

import ff_fast
from ff_fast import (
    CancelFlowPolicy,
    CancelFlowWait,
    ClaimPolicy,
    FailureClass,
    OnCancel,
    WaitpointKind,
    WaitpointSpec,
    aio,
    errors,
    keys,
)
from ff_fast._core import leases as leases_core

from ...heads import set_head
from ...shells import KINDS, WORKER
from ...waiting import wait_until
from ..executions import World
from ..streams import server_ms
from ..workers import Worker, handler_for, opened, until
from .attempts import read

LONG = {"lease_ttl_ms": 600_000}


def lapse(raw, eid, kind="lease"):
    """Make a timer of an execution due, and let its lease lapse if it is that one."""
    if kind == "lease":
        index = int(raw.hget(keys.core(eid), "current_attempt_index"))
        set_head(raw, keys.head(eid, index), lease_expires_at=server_ms(raw))
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"{kind}:{eid}": server_ms(raw)})


# -- what is published --------------------------------------------------------------------------------------------------


@pytest.fixture
def world(engine, raw, lane):
    with World(engine.url, raw, lane) as world:
        yield world


@pytest.fixture
def heard(raw):
    """``heard(eid)`` returns what was published on the channel of the execution's partition since the last call."""
    with raw.pubsub() as listening:
        channels = set()

        def since(eid):
            channel = keys.leases_channel(keys.slot_tag_of(eid))
            if channel not in channels:
                channels.add(channel)
                listening.ssubscribe(channel)
            # Everything that the server has sent before stands in front of this answer.
            listening.ping()
            told = []
            while (message := listening.parse_response(block=True))[0] != b"pong":
                if message[0] == b"smessage":
                    told.append(message[2].decode())
            return told

        yield since


def by_take_over(world, eid, handle):
    lapse(world.raw, eid)
    (token,) = [
        token for token in world.backend.find_reclaimable(10_000) if token.grant.execution_id == eid
    ]
    world.backend.claim_from_reclaim(token, **WORKER)


def by_flow(world, eid, handle):
    flow = world.core(eid)["flow_id"]
    world.backend.cancel_flow(flow, CancelFlowPolicy.CANCEL_ALL, CancelFlowWait.WAIT_INDEFINITE)


def suspend(world, handle):
    point = world.backend.create_waitpoint(handle)
    world.backend.suspend(handle, WaitpointSpec(WaitpointKind.EXTERNAL, b"", point.hmac_token))


TAKEN = {
    "cancel": lambda w, eid, _: w.backend.cancel(eid),
    "cancel by handle": lambda w, _, handle: w.backend.cancel(handle),
    "cancel of the flow": by_flow,
    "lapse": lambda w, eid, _: w.fire(eid, "lease"),
    "take over": by_take_over,
    "attempt timeout": lambda w, eid, _: w.fire(eid, "attempt"),
    "deadline": lambda w, eid, _: w.fire(eid, "deadline"),
    "end of the grace": lambda w, eid, _: (
        w.backend.cancel(eid, grace=60),
        w.fire(eid, "cancel"),
    ),
}


@pytest.mark.standalone("one connection listens to one node")
@pytest.mark.parametrize("how", TAKEN)
def test_whoever_takes_an_attempt_tells_its_holder(world, heard, how):
    flow = world.create_flow() if "flow" in how else None
    eid, handle = world.owned(attempt_timeout=600, deadline=600, flow_id=flow)
    heard(eid)
    TAKEN[how](world, eid, handle)
    first = [f"cancel {eid} 0"] if how == "end of the grace" else []
    assert heard(eid) == [*first, f"lost {eid} 0"]


def of_lease(world, function, key, handle, *before):
    fields = handle.fields()
    world.raw.fcall(function, 1, key(fields.execution_id), *before, fields.lease_id)


OWN = {
    "cancel": lambda w, handle: of_lease(w, "ff_cancel_execution", keys.core, handle, "r", 0),
    "give back": lambda w, handle: of_lease(
        w, "ff_give_back", lambda eid: keys.leases(keys.slot_tag_of(eid)), handle
    ),
    "complete": lambda w, handle: w.backend.complete(handle),
    "fail": lambda w, handle: w.backend.fail(handle, "no"),
    "fail for good": lambda w, handle: w.backend.fail(handle, "no", FailureClass.PERMANENT),
    "crash": lambda w, handle: w.backend.fail(handle, "no", FailureClass.INFRA_CRASH),
    "delay": lambda w, handle: w.backend.delay(handle, 60),
    "wait for children": lambda w, handle: w.backend.wait_children(handle),
    "suspend": suspend,
    "renew": lambda w, handle: w.backend.renew(handle),
    "progress": lambda w, handle: w.backend.progress(handle, 1),
}


@pytest.mark.standalone("one connection listens to one node")
def test_calls_of_the_holder_itself_tell_nobody(world, heard):
    for call in OWN.values():
        eid, handle = world.owned()
        heard(eid)
        call(world, handle)
        assert heard(eid) == []
        if world.state(eid) in ("delayed", "waiting", "waiting_children", "suspended"):
            # Nobody holds it.
            world.backend.cancel(eid)
            assert heard(eid) == []


@pytest.mark.standalone("one connection listens to one node")
def test_a_request_is_told_and_who_waits_has_no_holder(world, heard):
    eid, _ = world.owned()
    waiting = world.create()
    heard(eid), heard(waiting)
    assert not world.backend.cancel(eid, grace=60).cancelled
    assert heard(eid) == [f"cancel {eid} 0"]
    world.backend.cancel(waiting)
    assert [told for told in heard(waiting) if waiting in told] == []


@pytest.mark.standalone("one connection listens to one node")
def test_who_may_not_publish_cancels_all_the_same(world, heard):
    eid, _ = world.owned()
    heard(eid)
    name = f"mute-{world.lane}"
    world.raw.execute_command("ACL", "SETUSER", name, "on", ">p", "~*", "resetchannels", "+@all")
    try:
        url = str(world.backend.config.connection.unix_path or "")
        mute = ff_fast.ValkeyBackend.connect(f"unix://{name}:p@{url}")
        with mute:
            assert mute.cancel(eid).cancelled
    finally:
        world.raw.execute_command("ACL", "DELUSER", name)
    assert world.state(eid) == "cancelled"
    assert heard(eid) == []


# -- a handler that waits -----------------------------------------------------------------------------------------------


class Waiting:
    """A handler that waits until it shall stop, and says what it saw."""

    def __init__(self):
        self.started, self.over = threading.Event(), threading.Event()
        self.seen = []

    def __call__(self, task):
        writer = yield opened(task)
        writer.write("written")
        self.started.set()
        told = yield task.wait_cancelled()
        self.seen.append((told, task.cancelled, task.lost))
        self.over.set()
        return b"well"


def test_a_cancellation_reaches_a_handler_that_waits(worker, backend, lane, state):
    handler = Waiting()
    worker(handler, **LONG)
    eid = backend.create_execution(lane=lane)
    assert handler.started.wait(10)
    backend.cancel(eid, reason="too expensive", grace=60)
    assert state(eid) == "cancelled"
    assert handler.seen == [(True, True, False)]
    assert backend.describe(eid).cancellation_reason == "too expensive"
    assert read(backend, eid) == ([b"written"], "attempt_cancelled")


@pytest.mark.parametrize("how", ["cancel", "cancel of the flow", "lapse", "deadline"])
def test_the_loss_of_its_lease_reaches_a_handler_that_waits(
    worker, backend, lane, state, supervisor, raw, how
):
    handler = Waiting()
    running = worker(handler, on_cancel=OnCancel.TELL, **LONG)
    flow = backend.create_flow()
    eid = backend.create_execution(lane=lane, deadline=600, flow_id=flow)
    assert handler.started.wait(10)
    running.ask()
    if how == "cancel":
        backend.cancel(eid)
    elif how == "lapse":
        lapse(raw, eid)
        other = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    elif how == "deadline":
        lapse(raw, eid, "deadline")
    else:
        backend.cancel_flow(flow)
    assert handler.over.wait(10)
    running.result()
    assert handler.seen == [(True, True, True)]
    if how == "lapse":
        # It has ended nothing under its successor.
        backend.complete(other, b"the successor's")
        assert backend.read_result(eid) == b"the successor's"
    else:
        assert state(eid) == ("expired" if how == "deadline" else "cancelled")


def test_one_that_waits_for_a_time_goes_on(worker, backend, lane, state):
    seen = []

    def handler(task):
        seen.append((yield task.wait_cancelled(0)))
        seen.append((yield task.wait_cancelled(timeout=0.001)))
        seen.append(task.lost)
        with pytest.raises(errors.InvalidInput):
            yield task.wait_cancelled(-1)

    worker(handler, **LONG)
    assert state(backend.create_execution(lane=lane)) == "completed"
    assert seen == [False, False, False]


def test_a_cancellation_of_one_is_not_told_to_another(worker, backend, lane, state):
    handler = Waiting()
    done, go = threading.Event(), threading.Event()

    def beside(task):
        done.set()
        yield until(task, go.is_set)
        return b"never told" if not task.cancelled else b"told"

    worker(lambda task: beside(task) if task.payload else handler(task), concurrency=2, **LONG)
    eid = backend.create_execution(lane=lane)
    # Of the same partition, so of the same channel.
    other = backend.create_execution(lane=lane, parent_id=eid, payload=b"beside")
    assert handler.started.wait(10)
    assert done.wait(10)
    backend.cancel(eid, grace=60)
    assert state(eid) == "cancelled"
    go.set()
    assert state(other) == "completed"
    assert backend.read_result(other) == b"never told"


def test_a_request_of_an_earlier_lease_reaches_the_next_one(
    worker, backend, lane, state, supervisor
):
    seen = []

    def handler(task):
        if not task.resumed:
            backend.cancel(task.execution_id, grace=60)
            yield task.delay(0.01)
        seen.append(task.cancelled)

    worker(handler, **LONG)
    eid = backend.create_execution(lane=lane)
    assert state(eid) == "cancelled"
    assert seen == [True]


def test_closing_the_backend_reaches_a_handler_that_waits(worker, backend, lane):
    handler = Waiting()
    running = worker(handler, on_cancel=OnCancel.TELL, **LONG)
    eid = backend.create_execution(lane=lane)
    assert handler.started.wait(10)
    running.close_backend()
    running.result()
    assert handler.seen == [(True, True, True)]
    assert backend.describe(eid).state == "active"


# -- without pushes -----------------------------------------------------------------------------------------------------


def test_what_a_lost_connection_has_missed_is_asked_for(worker, backend, lane, state, raw):
    handler = Waiting()
    worker(handler, **LONG)
    eid = backend.create_execution(lane=lane)
    assert handler.started.wait(10)
    wait_until(lambda: raw.pubsub_shardnumsub(keys.leases_channel(keys.slot_tag_of(eid)))[0][1])
    with raw.pipeline(transaction=True) as pipeline:
        # Nobody listens when it is published.
        for each in raw.client_list():
            if each["name"] == "ff_fast:readers":
                pipeline.execute_command("CLIENT", "KILL", "ID", each["id"])
        pipeline.fcall("ff_cancel_execution", 1, keys.core(eid), "too expensive", 60_000, "")
        pipeline.execute()
    assert state(eid) == "cancelled"
    assert handler.seen == [(True, True, False)]


@pytest.mark.parametrize("kind", KINDS)
def test_who_may_not_listen_hears_it_from_a_renewal(
    kind, server, raw, backend, lane, caplog, monkeypatch
):
    # Soon, and the lease does not lapse on a machine that stands still for a while.
    monkeypatch.setattr(leases_core, "RENEW_AT", 0.005)
    name = f"deaf-{lane}"
    raw.execute_command("ACL", "SETUSER", name, "on", ">p", "~*", "resetchannels", "+@all")

    def steps(own):
        eid = backend.create_execution(lane=lane)
        handle = yield own.claim(lane=lane, **WORKER, lease_ttl_ms=30_000)
        keeper = own.keep_lease(handle)
        backend.cancel(eid, grace=60)
        assert (yield keeper.wait_cancelled(20))
        assert (keeper.cancel_requested, keeper.error) == (True, None)
        yield keeper.stop()
        yield own.complete(handle)

    try:
        on_backend(kind, server.url.replace("://", f"://{name}:p@", 1), steps)
    finally:
        raw.execute_command("ACL", "DELUSER", name)
    assert len([each for each in caplog.messages if "next renewal only" in each]) == 1


# -- leases that are kept without a worker --------------------------------------------------------------------------------


def on_backend(kind, url, steps):
    """Run steps with a backend of either shell: a generator that yields what asyncio would await."""
    if kind == "sync":
        with ff_fast.ValkeyBackend.connect(url) as own:
            return handler_for(kind, steps)(own)

    async def main():
        async with aio.ValkeyBackend.connect(url) as own:
            return await handler_for(kind, steps)(own)

    return asyncio.run(main())


def test_a_keeper_hears_of_both(kind, server, backend, lane):
    def steps(own):
        told = []
        eid = backend.create_execution(lane=lane)
        handle = yield own.claim(lane=lane, **WORKER, **LONG)
        keeper = own.keep_lease(handle, told.append)
        assert not (yield keeper.wait_cancelled(0))
        backend.cancel(eid, grace=60)
        assert (yield keeper.wait_cancelled())
        assert (keeper.cancel_requested, keeper.held, told) == (True, True, [])
        backend.cancel(eid)
        assert (yield keeper.wait_lost(20))
        assert not keeper.held
        assert isinstance(keeper.error, errors.ExecutionNotActive)
        yield keeper.stop()
        # The thread of a blocking one wakes its waiters first.
        assert told == [keeper.error]

    on_backend(kind, server.url, steps)


def test_a_keeper_hears_of_a_request_from_the_answer_to_an_append(kind, server, raw, backend, lane):
    def steps(own):
        eid = backend.create_execution(lane=lane)
        handle = yield own.claim(lane=lane, **WORKER, **LONG)
        keeper = own.keep_lease(handle)
        writer = yield own.open_writer(handle)
        # As a cancellation whose push nobody has heard.
        set_head(raw, keys.head(eid, 0), cancel_requested=True)
        writer.write("text")
        assert (yield keeper.wait_cancelled(20))
        assert keeper.cancel_requested
        yield writer.close()
        yield keeper.stop()
        yield own.complete(handle)

    on_backend(kind, server.url, steps)


def test_a_keeper_that_is_stopped_lets_its_waiters_go(kind, server, backend, lane):
    def steps(own):
        backend.create_execution(lane=lane)
        handle = yield own.claim(lane=lane, **WORKER, **LONG)
        keeper = own.keep_lease(handle)
        yield keeper.stop()
        assert not (yield keeper.wait_cancelled())
        assert not (yield keeper.wait_lost(20))
        yield own.complete(handle)

    on_backend(kind, server.url, steps)


def subscriptions(raw):
    return raw.info("commandstats").get("cmdstat_ssubscribe", {"calls": 0})["calls"]


def test_short_executions_do_not_subscribe_one_by_one(
    worker, backend, lane, state, raw, monkeypatch
):
    running = worker(lambda task: None, **LONG)
    first = backend.create_execution(lane=lane)
    assert state(first) == "completed"
    channel = keys.leases_channel(keys.slot_tag_of(first))
    wait_until(lambda: raw.pubsub_shardnumsub(channel)[0][1])
    before = subscriptions(raw)
    beside = [keys.new_execution_id_beside(first) for _ in range(30)]
    for eid in beside:
        backend.create_execution(lane=lane, execution_id=eid)
    for eid in beside:
        assert state(eid) == "completed"
    assert subscriptions(raw) == before
    kept = running.backend._kept
    wait_until(lambda: not any(each.keepers for each in kept._partitions.values()))
    # And none stays after a while.
    monkeypatch.setattr(leases_core, "KEEP_CHANNEL_S", 0.0)
    if running.kind == "sync":
        kept._look()
    else:
        running._loop.call_soon_threadsafe(kept._look)
    wait_until(lambda: not raw.pubsub_shardnumsub(channel)[0][1])
    assert kept._partitions == {}


# -- what an asyncio handler is cancelled by ------------------------------------------------------------------------------


class Held:
    """An asyncio handler that waits for ever; ``seen`` has its cancellations."""

    def __init__(self):
        self.started = threading.Event()
        self.seen = []

    async def __call__(self, task):
        if task.payload == b"next":
            return b"%d" % asyncio.current_task().cancelling()
        task.write("written")
        self.started.set()
        return await self.wait(task)

    async def wait(self, task):
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.seen.append((task.cancelled, task.lost))
            raise


@pytest.fixture
def held(server, lane, backend, state):
    """``held(handler, **options)``: an asyncio worker with one slot, which must still work at the end."""
    started = []

    def start(handler, **options):
        running = Worker("asyncio", server.url, None, lane=lane, **{**LONG, **options})
        running._handler = handler
        started.append(running.begin())
        return running

    yield start
    for running in started:
        if running.is_alive():
            eid = backend.create_execution(lane=lane, payload=b"next")
            assert state(eid) == "completed"
            # The task of the slot has no cancellation left.
            assert backend.read_result(eid) == b"0"
            running.ask()
            running.result()


def begun(handler, backend, lane):
    eid = backend.create_execution(lane=lane)
    assert handler.started.wait(10)
    return eid


def test_a_handler_is_cancelled_after_its_grace(held, backend, lane, state):
    handler = Held()
    held(handler, cancel_grace=0.01)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, reason="too expensive", grace=60)
    assert state(eid) == "cancelled"
    assert handler.seen == [(True, False)]
    told = backend.describe(eid)
    assert (told.cancellation_reason, told.attempt_count) == ("too expensive", 1)
    # What it wrote is stored.
    assert read(backend, eid) == ([b"written"], "attempt_cancelled")


def test_a_handler_that_stops_within_the_grace_is_not_cancelled(held, backend, lane, state):
    class Stopping(Held):
        async def wait(self, task):
            assert await task.wait_cancelled()
            await asyncio.sleep(0)
            self.seen.append("in order")

    handler = Stopping()
    held(handler, cancel_grace=600)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, grace=60)
    assert state(eid) == "cancelled"
    assert handler.seen == ["in order"]


def test_a_handler_whose_lease_is_lost_is_cancelled_at_once_and_ends_nothing(
    held, backend, lane, state, supervisor, raw
):
    handler = Held()
    running = held(handler, cancel_grace=600)
    eid = begun(handler, backend, lane)
    running.ask()
    wait_until(lambda: raw.exists(keys.stream(eid, 0)))
    lapse(raw, eid)
    other = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    running.result()
    assert handler.seen == [(True, True)]
    assert backend.describe(eid).state == "active"
    backend.complete(other, b"the successor's")
    assert read(backend, eid, 0) == ([b"written"], "producer_lost")


def test_the_end_of_the_callers_grace_ends_that_of_the_worker(
    held, backend, lane, state, supervisor
):
    handler = Held()
    held(handler, cancel_grace=600)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, grace=0.05)
    assert state(eid) == "cancelled"
    wait_until(lambda: handler.seen)
    assert handler.seen == [(True, True)]


def test_a_handler_that_is_only_told_is_never_cancelled(held, backend, lane, state):
    class Told(Held):
        async def wait(self, task):
            assert await task.wait_cancelled()
            assert not task.lost
            backend.cancel(task.execution_id)
            await until(task, lambda: task.lost)
            await asyncio.sleep(0.01)
            self.seen.append("in order")

    handler = Told()
    held(handler, on_cancel=OnCancel.TELL, cancel_grace=0)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, grace=60)
    assert state(eid) == "cancelled"
    wait_until(lambda: handler.seen)
    assert handler.seen == ["in order"]


def test_a_handler_that_keeps_its_cancellation_to_itself_goes_on(held, backend, lane, state):
    class Deaf(Held):
        async def wait(self, task):
            for _ in range(2):
                try:
                    await asyncio.Event().wait()
                except asyncio.CancelledError:
                    self.seen.append((task.cancelled, task.lost))
            # Cancelled for the request and for the lost lease, and not again.
            await asyncio.sleep(0.01)
            self.seen.append("in order")
            return b"well"

    handler = Deaf()
    held(handler, cancel_grace=0)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, grace=60)
    wait_until(lambda: handler.seen)
    assert backend.describe(eid).state == "active"
    backend.cancel(eid)
    wait_until(lambda: len(handler.seen) == 3)
    assert handler.seen == [(True, False), (True, True), "in order"]


def test_a_task_group_of_a_cancelled_handler_ends_with_it(held, backend, lane, state):
    class Grouped(Held):
        async def wait(self, task):
            async with asyncio.TaskGroup() as group:
                for _ in range(3):
                    group.create_task(super().wait(task))

    handler = Grouped()
    held(handler, cancel_grace=0)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, grace=60)
    assert state(eid) == "cancelled"
    assert handler.seen == [(True, False)] * 3


def test_a_task_group_that_has_failed_leaves_nothing_behind(held, backend, lane, state):
    async def fails():
        raise ff_fast.TaskFailed("no")

    class Failing(Held):
        async def wait(self, task):
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())

    handler = Failing()
    held(handler)
    assert state(begun(handler, backend, lane)) == "failed"


def test_a_timeout_within_a_handler_stays_a_timeout(held, backend, lane, state):
    class Timed(Held):
        async def wait(self, task):
            try:
                await asyncio.wait_for(super().wait(task), 600)
            except asyncio.CancelledError:
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.001):
                        await asyncio.Event().wait()
                self.seen.append("cleaned up")
                raise

    handler = Timed()
    held(handler, cancel_grace=0)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, grace=60)
    assert state(eid) == "cancelled"
    assert handler.seen == [(True, False), "cleaned up"]


def test_a_cancellation_of_the_worker_is_not_taken_for_one_of_its_own(held, backend, lane):
    class Cleaning(Held):
        async def wait(self, task):
            try:
                await super().wait(task)
            finally:
                self.started.clear()
                await super().wait(task)

    handler = Cleaning()
    running = held(handler, cancel_grace=0)
    eid = begun(handler, backend, lane)
    backend.cancel(eid, grace=60)
    wait_until(lambda: handler.seen and not handler.started.is_set())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        running.result()
    assert len(handler.seen) == 2
    # It is handed back, with the request.
    assert [each.to_state for each in backend.describe(eid).history] == ["active", "waiting"]
    backend.cancel(eid)


def test_a_handler_that_gives_its_lease_up_is_not_cancelled_for_that(
    held, backend, lane, state, supervisor
):
    class Delaying(Held):
        async def wait(self, task):
            if not task.resumed:
                await task.delay(0.01)
            return b"well"

    handler = Delaying()
    held(handler, cancel_grace=0)
    eid = begun(handler, backend, lane)
    assert state(eid) == "completed"
    assert backend.read_result(eid) == b"well"


def test_closing_the_backend_ends_a_handler_that_waits(held, backend, lane):
    handler = Held()
    running = held(handler)
    eid = begun(handler, backend, lane)
    running.close_backend()
    running.result()
    assert handler.seen == [(True, True)]
    assert backend.describe(eid).state == "active"


# -- options ------------------------------------------------------------------------------------------------------------


def test_a_blocking_worker_refuses_to_interrupt_a_thread(backend, lane):
    with pytest.raises(errors.InvalidInput) as caught:
        backend.run_worker(print, lane=lane, on_cancel=OnCancel.CANCEL)
    assert "wait_cancelled" in str(caught.value)
