"""Workers as objects: handlers by name, what a process opens, and what it takes from its lane."""

import contextlib
import threading
import time

import pytest

import ff_fast
from ff_fast import CapabilitySet, InvalidInput, InvalidType, aio, errors
from ff_fast._core import claiming
from ff_fast._core import operations as operations_core
from ff_fast._core import worker as worker_core

from ...waiting import wait_until
from ..workers import Worker, handler_for


@pytest.fixture
def app(kind):
    """``app(name=handler, ...)``: a worker's object of the test's shell; the name ``default`` stands for none."""

    def make(*, lifespan=None, options=None, **handlers):
        made = ff_fast.Worker(lifespan=lifespan, **(options or {}))
        for name, handler in handlers.items():
            made.handler(None if name == "default" else name)(handler_for(kind, handler))
        return made

    return make


def told(word):
    return lambda task: f"{word} {task.handler}"


def test_an_execution_runs_with_the_handler_that_it_names(worker, app, backend, lane, state):
    worker(app(default=told("default"), sum=told("sum"), chat=told("chat")))
    eids = {
        name: backend.create_execution(lane=lane, handler=name) for name in ("sum", "chat", None)
    }
    for name, eid in eids.items():
        assert state(eid) == "completed"
        assert backend.read_result(eid).decode() == f"{name or 'default'} {name}"
        assert backend.describe(eid).handler == name


def test_what_a_worker_has_no_handler_for_waits_for_one_that_has(worker, app, backend, lane, state):
    named = worker(app(sum=told("sum")))
    plain = worker(lambda task: f"plain {task.handler}")
    mine = [backend.create_execution(lane=lane, handler="sum") for _ in range(10)]
    unnamed = [backend.create_execution(lane=lane) for _ in range(10)]
    other = backend.create_execution(lane=lane, handler="other")
    for eid in mine + unnamed:
        assert state(eid) == "completed"
        assert backend.read_result(eid) == (b"sum sum" if eid in mine else b"plain None")
    # Nobody has claimed it.
    assert backend.describe(other).state == "waiting"
    assert backend.describe(other).attempt_count == 0
    plain.ask()
    plain.join(10)
    left = backend.create_execution(lane=lane)
    worker(app(other=told("other")))
    assert state(other) == "completed"
    assert backend.describe(left).attempt_count == 0
    assert named.is_alive()


def test_a_worker_of_named_handlers_finds_work_whose_hint_was_lost(
    worker, app, backend, lane, raw, state, monkeypatch
):
    monkeypatch.setattr(claiming, "SWEEP_EVERY_S", 0.1)
    unnamed = backend.create_execution(lane=lane)
    eid = backend.create_execution(lane=lane, handler="sum", priority=3)
    for key in raw.keys(f"ff:lane:{{{lane}}}:*"):
        raw.delete(key)
    worker(app(sum=told("sum")))
    assert state(eid) == "completed"
    assert backend.describe(unnamed).state == "waiting"


def test_a_named_handler_needs_the_other_capabilities_too(worker, app, backend, lane, state):
    gpu = CapabilitySet(["gpu"])
    eid = backend.create_execution(lane=lane, handler="sum", required_capabilities=gpu)
    worker(app(sum=told("without")))
    assert state(backend.create_execution(lane=lane, handler="sum")) == "completed"
    assert backend.describe(eid).state == "waiting"
    worker(app(sum=told("with"), options={"capabilities": gpu}))
    assert state(eid) == "completed"
    assert backend.read_result(eid) == b"with sum"


def test_a_retry_and_a_resumed_execution_keep_their_handler(
    worker, app, backend, lane, state, kind
):
    seen = []

    def handler(task):
        seen.append((task.handler, task.resumed))
        if not task.resumed:
            yield task.delay(0.01)
        return b""

    worker(app(sum=handler), supervise=True)
    assert state(backend.create_execution(lane=lane, handler="sum")) == "completed"
    assert seen == [("sum", False), ("sum", True)]


def test_what_a_lifespan_yields_is_the_context_of_each_task(
    kind, server, app, backend, lane, state
):
    events = []

    @contextlib.contextmanager
    def opened(given):
        assert isinstance(given, aio.ValkeyBackend if kind == "asyncio" else ff_fast.ValkeyBackend)
        events.append("opened")
        yield {"pool": 7}
        events.append("closed")

    @contextlib.asynccontextmanager
    async def opened_async(given):
        with opened(given) as context:
            yield context

    def handler(task):
        events.append(task.context["pool"])

    lifespans = [opened, *([opened_async] if kind == "asyncio" else [])]
    for lifespan in lifespans:
        events.clear()
        with Worker(kind, server.url, app(default=handler, lifespan=lifespan), lane=lane):
            for _ in range(2):
                assert state(backend.create_execution(lane=lane)) == "completed"
        assert events == ["opened", 7, 7, "closed"]


def test_a_lifespan_that_fails_ends_the_worker_before_it_claims(kind, server, app, backend, lane):
    @contextlib.contextmanager
    def broken(_):
        raise RuntimeError("no database")
        yield

    eid = backend.create_execution(lane=lane)
    failing = Worker(kind, server.url, app(default=told(""), lifespan=broken), lane=lane).begin()
    threading.Thread.join(failing, 10)
    assert isinstance(failing.error, RuntimeError)
    assert backend.describe(eid).attempt_count == 0


def test_the_options_of_a_worker_count_unless_others_are_given(
    kind, server, app, backend, lane, state
):
    made = ff_fast.Worker(lane=lane, concurrency=2, supervise=False)
    made.handler(handler_for(kind, told("x")))
    with Worker(kind, server.url, made):
        assert state(backend.create_execution(lane=lane)) == "completed"
    with Worker(kind, server.url, made, lane=f"{lane}-2"):
        assert state(backend.create_execution(lane=f"{lane}-2")) == "completed"


def test_a_plain_function_may_be_registered_with_and_without_parentheses():
    made = ff_fast.Worker()

    @made.handler
    def first(task):
        return b""

    @made.handler("second")
    def second(task):
        return b""

    assert made.handlers == (None, "second")
    assert not made.is_async
    assert repr(made) == "<ff_fast.Worker lane='default' handlers=[None, 'second']>"
    assert first(None) == second(None) == b""


def test_a_worker_is_checked_when_it_is_made(backend, kind, server, lane):
    made = ff_fast.Worker()

    async def coroutine(task):
        return b""

    made.handler("a")(coroutine)
    for wrong, error in (
        (lambda: made.handler("a")(coroutine), InvalidInput),
        (lambda: made.handler("b")(lambda task: b""), InvalidInput),
        (lambda: made.handler("b c")(coroutine), InvalidInput),
        (lambda: made.handler("b")(7), InvalidType),
        (lambda: ff_fast.Worker(lifespan=7), InvalidType),
        (lambda: ff_fast.Worker(concurrency=0), InvalidInput),
        (lambda: ff_fast.Worker(lane=""), InvalidInput),
        (lambda: backend.run_worker(made), InvalidType),
        (lambda: backend.run_worker(ff_fast.Worker()), InvalidInput),
        (lambda: backend.create_execution(handler="a b"), InvalidInput),
        (lambda: backend.create_execution(handler=7), InvalidType),
    ):
        with pytest.raises(error):
            wrong()


def test_a_worker_ends_when_there_is_nothing_to_do(kind, server, backend, lane, app):
    def handler(task):
        if task.payload == b"parent":
            yield opened_child(task, lane)
        return b""

    eids = [backend.create_execution(lane=lane, payload=b"parent") for _ in range(3)]
    idle = Worker(kind, server.url, app(default=handler), lane=lane, until_idle=True, concurrency=2)
    idle.begin()
    threading.Thread.join(idle, 20)
    assert idle.error is None
    assert not idle.is_alive()
    for eid in eids:
        assert backend.describe(eid).state == "completed"
    # Also what the handlers created.
    assert backend.claim(lane=lane) is None


def test_a_worker_that_leaves_supervision_to_others_waits_for_nothing_that_they_bring(
    kind, server, backend, lane, app, monkeypatch
):
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)
    backend.create_execution(lane=lane, delay=600)
    idle = Worker(
        kind, server.url, app(default=lambda _: b""), lane=lane, until_idle=True, supervise=False
    )
    idle.begin()
    threading.Thread.join(idle, 20)
    assert not idle.is_alive()


def opened_child(task, lane):
    return task._backend.create_execution(lane=lane, payload=b"child")


def test_handlers_that_outlast_the_drain_are_interrupted_and_their_work_goes_on_elsewhere(
    kind, server, backend, lane, state
):
    held, go_on = threading.Event(), threading.Event()
    told_lost = []

    def handler(task):
        task.write(b"first")
        held.set()
        try:
            yield task.wait_cancelled(20)
            told_lost.append(task.lost)
        finally:
            go_on.set()

    eid = backend.create_execution(lane=lane)
    stubborn = Worker(kind, server.url, handler, lane=lane, drain_timeout=0.05).begin()
    assert held.wait(10)
    stubborn.ask()
    stubborn.join(10)
    assert not stubborn.is_alive()
    assert go_on.wait(10)
    if kind == "sync":
        wait_until(lambda: told_lost == [True])
    # At once, and not when the lease of 30 s lapses.
    handle = wait_until(lambda: backend.claim(lane=lane))
    assert [frame.payload for frame in backend.read_stream(eid, 0)] == [b"first"]
    assert handle.fields().execution_id == eid
    backend.complete(handle)


def _told_of_it(task):
    task.write("more")


def _keeps_it_to_itself(task):
    try:
        task.write("more")
    except errors.FFError as error:
        return error
    return None


@pytest.mark.parametrize("writes", [_told_of_it, _keeps_it_to_itself])
def test_a_handler_that_is_left_behind_does_not_end_what_is_handed_back(
    server, backend, lane, monkeypatch, writes
):
    """It runs on between the close of its writer and the call that hands its execution back."""
    held, left = threading.Event(), threading.Event()
    seen = []

    def handler(task):
        try:
            task.write("first")
            held.set()
            while not (refused := writes(task)):
                time.sleep(0.001)
            seen.append((refused, task.cancelled, task.lost, task.wait_cancelled(0)))
            return "half"
        finally:
            left.set()

    def slowly(on, task, error, hand_back=worker_core.hand_back):
        actions = hand_back(on, task, error)
        action = next(actions)
        while True:
            if isinstance(action, worker_core.Run):
                assert left.wait(10)
                # Time enough for the handler's own end.
                time.sleep(0.1)
            value = yield action
            try:
                action = actions.send(value)
            except StopIteration as stop:
                return stop.value

    monkeypatch.setattr(worker_core, "hand_back", slowly)
    eid = backend.create_execution(lane=lane)
    stubborn = Worker("sync", server.url, handler, lane=lane, drain_timeout=0.05).begin()
    assert held.wait(10)
    stubborn.ask()
    stubborn.join(10)
    assert not stubborn.is_alive()
    assert backend.describe(eid).state == "waiting"
    backend.complete(wait_until(lambda: backend.claim(lane=lane)))
    if writes is _keeps_it_to_itself:
        ((refused, *told),) = seen
        assert isinstance(refused, errors.StaleOwner)
        assert told == [True, True, True]


def test_a_handler_that_waits_hears_at_once_that_its_execution_is_handed_back(
    server, backend, lane, monkeypatch
):
    held, heard = threading.Event(), threading.Event()

    def handler(task):
        held.set()
        if task.wait_cancelled(20) and task.lost:
            heard.set()

    def slowly(on, task, error, hand_back=worker_core.hand_back):
        actions = hand_back(on, task, error)
        first = next(actions)
        assert heard.wait(10)
        yield first
        return (yield from actions)

    monkeypatch.setattr(worker_core, "hand_back", slowly)
    backend.create_execution(lane=lane)
    stubborn = Worker("sync", server.url, handler, lane=lane, drain_timeout=0.05).begin()
    assert held.wait(10)
    stubborn.ask()
    stubborn.join(15)
    assert stubborn.error is None
    backend.complete(wait_until(lambda: backend.claim(lane=lane)))


def test_what_is_claimed_as_the_worker_is_left_behind_goes_back_too(
    server, backend, lane, monkeypatch
):
    """A blocking worker whose other slots wait in claims: a thread cannot be interrupted in them."""
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.5)
    held, released = threading.Event(), threading.Event()

    def handler(task):
        held.set()
        released.wait(20)

    options = {"lane": lane, "concurrency": 3, "drain_timeout": 0}
    stubborn = Worker("sync", server.url, handler, **options).begin()
    eids = {backend.create_execution(lane=lane)}
    assert held.wait(10)
    stubborn.ask()
    eids.add(backend.create_execution(lane=lane))
    stubborn.join(10)
    assert not stubborn.is_alive()
    # With leases of 30 s, both are there for others at once.
    claimed = [wait_until(lambda: backend.claim(lane=lane), 5).fields() for _ in eids]
    assert {each.execution_id for each in claimed} == eids
    released.set()
