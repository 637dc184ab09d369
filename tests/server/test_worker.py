"""Workers of both shells: handlers from claim to end, leases that are kept or lost, processes that die.

What the end of a handler means is decided in the core, and held in ``tests/unit/test_worker_core.py``.
"""

import asyncio
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
import warnings

import pytest

import ff_fast
from ff_fast import (
    CapabilitySet,
    ClaimPolicy,
    End,
    FailureClass,
    HandleKind,
    RetryPolicy,
    StreamFrame,
    TaskFailed,
    UsageDimensions,
    WaitpointKind,
    WaitpointSpec,
    _process,
    aio,
    errors,
    keys,
)
from ff_fast._core import operations as operations_core
from ff_fast._core.leases import is_lease_lost

from ..conftest import ROOT
from ..shells import KINDS, WORKER
from ..waiting import wait_until
from .readers import counted
from .test_append import server_ms
from .workers import Supervisor, Worker, opened, until

RETRY = RetryPolicy(max_retries=3, delay=0.001)


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def supervisor(server):
    with Supervisor("sync", server.url) as running:
        yield running


@pytest.fixture(autouse=True)
def prompt_workers(monkeypatch):
    """Workers look more often whether they shall stop."""
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)


@pytest.fixture
def worker(kind, server, lane):
    """``worker(handler, **options)``: a worker of the test's lane and shell, stopped at the end."""
    started = []

    def start(handler, **options):
        options = {"lane": lane, **options}
        started.append(Worker(kind, server.url, handler, **options).begin())
        return started[-1]

    yield start
    for one in started:
        one.ask()
    for one in started:
        one.join(10)
        assert not one.is_alive()


@pytest.fixture
def state(backend):
    """``state(eid)`` waits for an end, and returns it."""

    def wait(eid, *expected):
        expected = expected or ("completed", "failed", "cancelled", "expired")
        return wait_until(lambda: (found := backend.describe(eid).state) in expected and found, 10)

    return wait


def read(backend, eid, attempt=0):
    """The payloads of an attempt that has ended or gone on, and how it ended."""
    *frames, end = backend.tail(eid, attempt)
    assert all(isinstance(frame, StreamFrame) for frame in frames), frames
    assert [frame.sequence for frame in frames] == list(range(1, len(frames) + 1))
    assert isinstance(end, End)
    return [frame.payload for frame in frames], end.reason


def lapse(raw, eid):
    """Let the lease of an execution run out, by the server's clock."""
    fields = raw.hgetall(keys.core(eid))
    meta = keys.meta(eid, int(fields[b"current_attempt_index"]))
    raw.hset(meta, "lease_expires_at", server_ms(raw))
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"lease:{eid}": server_ms(raw)})


# -- handlers --------------------------------------------------------------------------------------------------------


def test_a_handler_streams_and_its_result_is_stored(worker, backend, lane, state):
    seen = []

    def handler(task):
        seen.append(
            (task.execution_id, task.attempt_index, task.resumed, task.payload, task.signals)
        )
        yield opened(task)
        for word in (b"one", b"two"):
            task.write(word)
        yield task.flush()
        task.write("three")
        assert not task.cancelled
        return "done"

    worker(handler)
    eid = backend.create_execution(lane=lane, payload=b"prompt")
    assert state(eid) == "completed"
    assert seen == [(eid, 0, False, b"prompt", ())]
    assert read(backend, eid) == ([b"one", b"two", b"three"], "attempt_success")
    assert backend.read_result(eid) == b"done"


def test_a_result_of_a_wrong_type_fails_for_good_and_the_worker_goes_on(
    worker, backend, lane, state
):
    worker(lambda task: 7 if task.payload == b"bad" else b"good")
    eid = backend.create_execution(lane=lane, payload=b"bad", retry=RETRY)
    assert state(eid) == "failed"
    assert "result of a handler" in backend.describe(eid).failure_reason
    assert state(backend.create_execution(lane=lane)) == "completed"


def test_an_exception_is_retried_as_the_policy_says(worker, backend, lane, state, supervisor):
    def handler(task):
        yield opened(task)
        task.write(f"try {task.attempt_index}")
        if task.attempt_index < 2:
            raise ValueError("not yet")
        return str(task.attempt_index)

    worker(handler)
    eid = backend.create_execution(lane=lane, retry=RETRY)
    assert state(eid) == "completed"
    assert backend.read_result(eid) == b"2"
    for attempt in range(2):
        assert read(backend, eid, attempt) == ([b"try %d" % attempt], "attempt_failure")
    assert read(backend, eid, 2) == ([b"try 2"], "attempt_success")


@pytest.mark.parametrize(
    "failure, attempts, name",
    [
        (TaskFailed("no"), 1, "permanent"),
        (TaskFailed("no", FailureClass.TRANSIENT), 4, "transient"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_the_class_of_a_failure_decides(
    worker, backend, lane, state, supervisor, failure, attempts, name
):
    def handler(task):
        raise failure

    worker(handler)
    eid = backend.create_execution(lane=lane, retry=RETRY)
    assert state(eid) == "failed"
    told = backend.describe(eid)
    assert (told.failure_class.value, told.failure_reason) == (name, "no")
    assert told.attempt_count == attempts


def test_a_crash_that_a_handler_reports_goes_to_another_worker(worker, backend, lane, state):
    def handler(task):
        if not task.resumed:
            raise TaskFailed("the device is gone", FailureClass.INFRA_CRASH)
        return str(task.attempt_index)

    worker(handler)
    eid = backend.create_execution(lane=lane)
    assert state(eid) == "completed"
    assert backend.read_result(eid) == b"1"
    assert read(backend, eid, 0) == ([], "producer_lost")


def test_frames_that_cannot_be_stored_fail_the_attempt(worker, backend, lane, state):
    def handler(task):
        writer = yield opened(task)
        writer.write(b"stored")
        yield writer.flush()
        writer._fail(errors.OutOfMemory())
        return b"as if nothing had happened"

    worker(handler)
    eid = backend.create_execution(lane=lane)
    assert state(eid) == "failed"
    assert "OutOfMemory" in backend.describe(eid).failure_reason
    assert read(backend, eid) == ([b"stored"], "attempt_failure")


def test_a_handler_of_the_wrong_shell_is_refused(kind, server, lane, backend, state):
    if kind == "sync":

        async def wrong(task):
            pass

        with pytest.raises(errors.InvalidType):
            backend.run_worker(wrong)
        with pytest.raises(errors.InvalidType):
            backend.run_worker("not a function")
        return
    running = Worker(kind, server.url, lambda task: None, lane=lane)
    running._handler = lambda task: b"not awaitable"
    with running:
        eid = backend.create_execution(lane=lane)
        assert state(eid) == "failed"
        assert "not a coroutine" in backend.describe(eid).failure_reason


def test_progress_and_usage(worker, backend, lane, state):
    def handler(task):
        yield task.progress(40, "reading")
        yield task.report_usage(UsageDimensions(input_tokens=3, output_tokens=4))
        yield task.report_usage(UsageDimensions(output_tokens=5))

    worker(handler)
    eid = backend.create_execution(lane=lane)
    assert state(eid) == "completed"
    told = backend.describe(eid)
    assert (told.progress_percent, told.progress_message) == (40, "reading")
    assert (told.usage["input_tokens"], told.usage["output_tokens"]) == (3, 9)


def test_a_worker_takes_only_what_it_can_do(worker, backend, lane, state):
    plain, gpu = [], []
    hard = backend.create_execution(lane=lane, required_capabilities=CapabilitySet({"gpu"}))
    worker(lambda task: plain.append(task.execution_id))
    easy = backend.create_execution(lane=lane)
    assert state(easy) == "completed"
    assert backend.describe(hard).state == "waiting"
    worker(lambda task: gpu.append(task.execution_id), capabilities=CapabilitySet({"gpu"}))
    assert state(hard) == "completed"
    assert (plain, gpu) in (([easy], [hard]), ([], [easy, hard]))


# -- giving up and going on ------------------------------------------------------------------------------------------


def test_a_human_approves_in_the_middle_of_one_stream(
    worker, backend, server, lane, state, supervisor
):
    waiting = []

    def handler(task):
        yield opened(task)
        if not task.signals:
            task.write("draft")
            waitpoint = yield task.create_waitpoint()
            waiting.append(waitpoint)
            yield task.suspend(
                WaitpointSpec(
                    kind=WaitpointKind.SIGNAL_NAME,
                    matcher=b"approved",
                    hmac_token=waitpoint.hmac_token,
                ),
                timeout=30,
            )
        assert task.resumed
        task.write(b"final " + task.signals[0].payload)
        return "done"

    worker(handler)
    eid = backend.create_execution(lane=lane)
    seen = []

    def follow():
        with ff_fast.ValkeyBackend.connect(server.url) as own:
            seen.extend(own.tail(eid))

    tail = threading.Thread(target=follow, daemon=True)
    tail.start()
    state(eid, "suspended")
    wait_until(lambda: [item.payload for item in seen] == [b"draft"])
    answer = backend.deliver_signal(eid, waiting[0], "rejected")
    assert answer.effect == "signal_ignored_matcher_failed"
    assert backend.describe(eid).state == "suspended"
    backend.deliver_signal(eid, waiting[0], "approved", payload=b"yes")
    assert state(eid) == "completed"
    tail.join(10)
    assert [item.payload for item in seen[:-1]] == [b"draft", b"final yes"]
    assert [item.sequence for item in seen[:-1]] == [1, 2]
    assert seen[-1] == End("attempt_success")
    assert read(backend, eid) == ([b"draft", b"final yes"], "attempt_success")
    assert backend.describe(eid).attempt_count == 1


def test_a_suspension_that_is_satisfied_already_goes_on_at_once(worker, backend, lane, state):
    def handler(task):
        yield opened(task)
        task.write("before")
        waitpoint = yield task.create_waitpoint()
        backend.deliver_signal(task.execution_id, waitpoint, "go", payload=b"early")
        signals = yield task.suspend(
            WaitpointSpec(
                kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=waitpoint.hmac_token
            )
        )
        assert signals == task.signals
        yield opened(task)
        task.write(b"after " + signals[0].payload)

    worker(handler)
    eid = backend.create_execution(lane=lane)
    assert state(eid) == "completed"
    assert read(backend, eid) == ([b"before", b"after early"], "attempt_success")


def test_a_delay_continues_the_same_stream(worker, backend, lane, state, supervisor):
    def handler(task):
        yield opened(task)
        task.write(f"resumed {task.resumed}")
        if not task.resumed:
            yield task.delay(0.03)

    worker(handler)
    eid = backend.create_execution(lane=lane)
    assert state(eid) == "completed"
    assert read(backend, eid) == ([b"resumed False", b"resumed True"], "attempt_success")
    history = [(h.at_ms, h.to_state) for h in backend.describe(eid).history]
    assert [to for _, to in history] == ["active", "delayed", "waiting", "active", "completed"]
    assert history[2][0] - history[1][0] >= 30


def test_children_run_beside_their_parent(worker, backend, lane, state):
    def handler(task):
        if task.payload == b"parent" and not task.resumed:
            for _ in range(3):
                backend.create_execution(lane=lane, parent_id=task.execution_id, payload=b"child")
            yield task.wait_children()
        return task.payload

    worker(handler, concurrency=2)
    eid = backend.create_execution(lane=lane, payload=b"parent")
    assert state(eid) == "completed"
    assert backend.describe(eid).attempt_count == 1
    assert [h.to_state for h in backend.describe(eid).history] == [
        "active",
        "waiting_children",
        "waiting",
        "active",
        "completed",
    ]


# -- cancellation ----------------------------------------------------------------------------------------------------


def test_a_cancellation_with_grace_is_seen_and_is_the_end(worker, backend, lane, state, supervisor):
    started = threading.Event()

    def handler(task):
        yield opened(task)

        def asked():
            task.write("x")
            started.set()
            return task.cancelled

        yield until(task, asked)
        raise ValueError("stopped")

    worker(handler)
    eid = backend.create_execution(lane=lane, retry=RETRY)
    assert started.wait(10)
    backend.cancel(eid, reason="too expensive", grace=20)
    assert state(eid) == "cancelled"
    told = backend.describe(eid)
    # The reason of whoever asked, and no retry of a handler that failed because it was to stop.
    assert told.cancellation_reason == "too expensive"
    assert told.attempt_count == 1
    payloads, end = read(backend, eid)
    assert set(payloads) == {b"x"}
    assert end == "attempt_cancelled"


# -- leases ----------------------------------------------------------------------------------------------------------


def test_a_lease_that_is_lost_in_the_middle(worker, backend, lane, state, supervisor, raw):
    lost, over = threading.Event(), threading.Event()
    found = []

    def handler(task):
        writer = yield opened(task)
        task.write("mine")
        yield task.flush()
        lost.set()
        yield until(task, lambda: task.cancelled)
        with pytest.raises(errors.FFError) as caught:
            task.write("too late")
        found.append((caught.value, writer.error))
        over.set()
        return b"not mine any more"

    running = worker(handler, lease_ttl_ms=300)
    eid = backend.create_execution(lane=lane, retry=RETRY)
    assert lost.wait(10)
    lapse(raw, eid)
    other = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert (other.kind, other.fields().attempt_index) == (HandleKind.RESUMED, 1)
    assert over.wait(10)
    running.ask()
    running.result()
    for error in found[0]:
        assert is_lease_lost(error)
    # What the successor does is all that counts: it was neither completed, failed nor cancelled under it.
    assert backend.describe(eid).state == "active"
    backend.complete(other, b"the successor's")
    assert backend.read_result(eid) == b"the successor's"
    assert read(backend, eid, 0) == ([b"mine"], "producer_lost")


def test_a_short_lease_is_kept_under_load(worker, backend, lane, state, supervisor):
    started = threading.Event()

    def handler(task):
        # Longer than its lease.
        end = time.monotonic() + 1.2
        started.set()
        yield opened(task)

        def step():
            task.write("x" * 100)
            sum(range(2_000))
            return time.monotonic() > end

        yield until(task, step)

    worker(handler, lease_ttl_ms=500)
    eid = backend.create_execution(lane=lane)
    assert started.wait(10)
    load = threading.Event()

    def spin():
        while not load.is_set():
            sum(range(1_000))

    spinner = threading.Thread(target=spin, daemon=True)
    spinner.start()
    try:
        assert state(eid) == "completed"
    finally:
        load.set()
        spinner.join()
    assert backend.describe(eid).attempt_count == 1


def test_the_keeper_tells_the_writer_at_once(backend, lane):
    eid = backend.create_execution(lane=lane)
    handle = backend.claim(lane=lane, **WORKER, lease_ttl_ms=300)
    told = []
    with backend.keep_lease(handle, told.append) as keeper:
        writer = backend.open_writer(handle)
        writer.write("stored")
        writer.flush()
        backend.cancel(eid)
        wait_until(lambda: told)
        # Nothing was written since: the keeper alone has told it.
        assert isinstance(writer.error, errors.ExecutionNotActive)
        with pytest.raises(errors.ExecutionNotActive):
            writer.write("late")
    assert keeper.error is told[0]
    assert len(told) == 1
    wait_until(lambda: not keeper._thread.is_alive())


def test_the_keeper_of_asyncio_tells_the_writer_at_once(server, lane):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=300)
            told = []
            async with backend.keep_lease(handle, told.append) as keeper:
                writer = await backend.open_writer(handle)
                writer.write("stored")
                await writer.flush()
                await backend.cancel(eid)
                assert await keeper.wait_lost(10)
                assert isinstance(writer.error, errors.ExecutionNotActive)
            assert keeper.error is told[0]

    asyncio.run(main())


def _renewing(outcomes):
    """A renewal that raises or returns what it is told, and counts."""
    calls = []

    def renew(*_):
        calls.append(time.monotonic())
        outcome = outcomes[min(len(calls), len(outcomes)) - 1]
        if isinstance(outcome, BaseException):
            raise outcome
        return ff_fast.LeaseRenewal(1, 1)

    return renew, calls


def test_a_renewal_that_fails_is_tried_again_soon_until_the_lease_lapses():
    renew, calls = _renewing([errors.Unavailable()])
    told = []
    began = time.monotonic()
    keeper = ff_fast.LeaseKeeper(240, renew, told.append)
    wait_until(lambda: told)
    assert isinstance(told[0], errors.LeaseExpired)
    assert time.monotonic() - began >= 0.24
    assert len(calls) > 3
    assert not keeper.held
    keeper.stop()


def test_a_renewal_that_passes_again_keeps_the_lease():
    renew, calls = _renewing([errors.Unavailable(), errors.OutcomeUnknown(), None])
    told = []
    with ff_fast.LeaseKeeper(200, renew, told.append) as keeper:
        wait_until(lambda: len(calls) > 5)
        assert keeper.held
    assert told == []
    assert not keeper._thread.is_alive()


def test_a_lease_as_long_as_it_may_be_is_kept():
    with ff_fast.LeaseKeeper(2**48, lambda _: None, lambda _: None) as keeper:
        assert keeper._thread.is_alive()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_callback_that_raises_ends_the_keeper_only():
    renew, _ = _renewing([errors.StaleOwner()])

    def on_lost(error):
        raise ValueError("the caller's")

    keeper = ff_fast.LeaseKeeper(30, renew, on_lost)
    wait_until(lambda: not keeper._thread.is_alive())
    assert isinstance(keeper.error, errors.StaleOwner)
    keeper.stop()


def test_a_callback_of_asyncio_that_raises_is_reported_by_the_loop(server, lane):
    async def main():
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda _, c: complaints.append(c))

        def on_lost(error):
            raise ValueError("the caller's")

        async with aio.ValkeyBackend.connect(server.url) as backend:
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=60)
            async with backend.keep_lease(handle, on_lost) as keeper:
                await backend.cancel(eid)
                assert await keeper.wait_lost(10)
            assert isinstance(keeper.error, errors.ExecutionNotActive)
            await keeper.stop()
        (complaint,) = complaints
        assert str(complaint["exception"]) == "the caller's"

    asyncio.run(main())


def test_stopping_a_keeper_of_asyncio_in_the_middle_of_a_renewal():
    async def main():
        begun = asyncio.Event()
        told = []

        async def renew():
            begun.set()
            await asyncio.get_running_loop().create_future()

        keeper = aio.LeaseKeeper(300, renew, told.append, lambda: False)
        keeper._start(asyncio.get_running_loop().create_task)
        await begun.wait()
        await asyncio.wait_for(keeper.stop(), 5)
        await keeper.stop()
        assert told == []
        assert keeper.error is None
        # And one that hangs is over when the lease is.
        keeper = aio.LeaseKeeper(100, renew, told.append, lambda: False)
        keeper._start(asyncio.get_running_loop().create_task)
        assert await keeper.wait_lost(5)
        assert isinstance(told[0], errors.LeaseExpired)
        await keeper.stop()

    asyncio.run(main())


def test_closing_the_backend_ends_its_keepers(kind, server, lane, backend):
    backend.create_execution(lane=lane)
    told = []
    if kind == "sync":
        own = ff_fast.ValkeyBackend.connect(server.url)
        keeper = own.keep_lease(own.claim(lane=lane, **WORKER), told.append)
        own.close()
        wait_until(lambda: not keeper._thread.is_alive())
    else:

        async def main():
            own = await aio.ValkeyBackend.connect(server.url)
            keeper = own.keep_lease(await own.claim(lane=lane, **WORKER), told.append)
            await own.close()
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return keeper

        keeper = asyncio.run(main())
    assert isinstance(told[0], errors.Unavailable)
    assert not keeper.held


# -- what is not the handler's failure -----------------------------------------------------------------------------


@pytest.mark.parametrize("exit_", [SystemExit, KeyboardInterrupt])
def test_an_exit_in_a_handler_ends_the_worker_and_hands_the_execution_back(
    worker, backend, lane, state, exit_
):
    beside, go = threading.Event(), threading.Event()

    def handler(task):
        if task.payload == b"beside":
            beside.set()
            yield until(task, go.is_set)
            return b"ended in order"
        yield until(task, beside.is_set)
        raise exit_(3)

    running = worker(handler, concurrency=2)
    other = backend.create_execution(lane=lane, payload=b"beside")
    eid = backend.create_execution(lane=lane)
    # At once, not when the lease of 30 s is over.
    wait_until(lambda: [h.to_state for h in backend.describe(eid).history] == ["active", "waiting"])
    handle = backend.claim(lane=lane, **WORKER)
    assert (handle.kind, handle.fields().execution_id) == (HandleKind.RESUMED, eid)
    assert handle.fields().attempt_index == 1
    go.set()
    with pytest.raises(exit_):
        running.result()
    # The other slot's handler was neither cancelled nor dropped.
    assert backend.read_result(other) == b"ended in order"
    backend.complete(handle)


def test_a_handler_that_could_not_start_is_handed_back(kind, server, backend, lane):
    called = []
    running = Worker(kind, server.url, called.append, lane=lane).begin()
    carry_out, claims = running.backend._do, [True]

    def refuse(call):
        # A claim has a connection of its own; the call after it loads what the handler starts from.
        claims.append(call.own_connection)
        if claims[-2] and not call.own_connection:
            raise errors.ProtocolError
        return carry_out(call)

    running.backend._do = refuse
    eid = backend.create_execution(lane=lane)
    wait_until(lambda: backend.describe(eid).attempt_count != 0)
    running.ask()
    with pytest.raises(errors.ProtocolError):
        running.result()
    assert called == []
    assert backend.describe(eid).state in ("waiting", "failed")
    assert read(backend, eid, 0) == ([], "producer_lost")


def test_an_end_is_tried_again_while_the_lease_is_held(kind, server, backend, lane, state):
    running = Worker(kind, server.url, lambda task: b"kept", lane=lane).begin()
    carry_out, failures = running.backend._do, [errors.Unavailable(), errors.OutcomeUnknown()]
    loaded = []

    def flaky(call):
        if not call.own_connection:
            if loaded and failures:
                raise failures.pop()
            loaded.append(call)
        return carry_out(call)

    running.backend._do = flaky
    with_retries = backend.create_execution(lane=lane, retry=RETRY)
    assert state(with_retries) == "completed"
    assert backend.read_result(with_retries) == b"kept"
    running.ask()
    running.result()


def test_what_was_claimed_runs_also_when_it_is_time_to_stop(kind, server, backend, lane, state):
    running = Worker(kind, server.url, lambda task: b"ran", lane=lane).begin()
    carry_out = running.backend._do

    def stopping(call):
        if call.own_connection:
            running.ask()
        return carry_out(call)

    running.backend._do = stopping
    # The claim that waits already may be the first to get it; the next one certainly is not dropped.
    eids = [backend.create_execution(lane=lane) for _ in range(2)]
    running.result()
    left = 0
    while (handle := backend.claim(lane=lane, **WORKER)) is not None:
        backend.complete(handle, b"left")
        left += 1
    assert left < 2
    assert all(backend.read_result(eid) in (b"ran", b"left") for eid in eids)


def test_a_callers_stop_event_is_the_callers(backend):
    stop = threading.Event()
    with pytest.raises(errors.InvalidInput):
        backend.run_worker(print, lane="", stop=stop)
    assert not stop.is_set()


def test_closing_the_backend_ends_an_idle_worker(worker):
    running = worker(lambda task: None, concurrency=2)
    running.close_backend()
    running.result()


def test_closing_the_backend_ends_a_worker_whose_handler_runs(worker, backend, lane):
    started, seen = threading.Event(), []

    def handler(task):
        started.set()
        yield until(task, lambda: task.cancelled)
        seen.append(True)

    running = worker(handler)
    eid = backend.create_execution(lane=lane)
    assert started.wait(10)
    running.close_backend()
    running.result()
    assert seen == [True]
    # It comes back when its lease lapses.
    assert backend.describe(eid).state == "active"


def test_a_worker_in_a_forked_child_says_so(kind, server, lane):
    def in_child(target):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            pid = os.fork()
        if pid == 0:
            code = 1
            try:
                signal.alarm(20)
                try:
                    target()
                except errors.ForkedClient:
                    code = 0
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0

    if kind == "sync":
        with ff_fast.ValkeyBackend.connect(server.url) as own:
            in_child(lambda: own.run_worker(print, lane=lane))
    else:

        async def main():
            async with aio.ValkeyBackend.connect(server.url) as own:
                work = own.run_worker(print, lane=lane)

                def child():
                    asyncio._set_running_loop(None)
                    asyncio.run(work)

                in_child(child)
                work.close()

        asyncio.run(main())


# -- cancelled coroutines --------------------------------------------------------------------------------------------


def test_a_renewal_tells_a_handler_that_never_writes_of_a_cancellation(
    worker, backend, lane, state
):
    started = threading.Event()

    def handler(task):
        started.set()
        yield until(task, lambda: task.cancelled)

    worker(handler, lease_ttl_ms=600)
    eid = backend.create_execution(lane=lane)
    assert started.wait(10)
    backend.cancel(eid, grace=20)
    assert state(eid) == "cancelled"


def test_cancelling_an_asyncio_worker_hands_its_execution_back(server, backend, lane):
    started, seen = threading.Event(), []

    def handler(task):
        yield opened(task)
        task.write("written, not flushed")
        started.set()
        try:
            yield until(task, lambda: False)
        except asyncio.CancelledError:
            seen.append(task.execution_id)
            raise

    running = Worker("asyncio", server.url, handler, lane=lane).begin()
    eid = backend.create_execution(lane=lane)
    assert started.wait(10)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        running.result()
    assert seen == [eid]
    handle = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(5))
    assert (handle.kind, handle.fields().attempt_index) == (HandleKind.RESUMED, 1)
    assert read(backend, eid) == ([b"written, not flushed"], "producer_lost")


def test_a_cancellation_of_the_handlers_own_is_a_failure(server, backend, lane, state):
    def handler(task):
        if task.payload:
            raise asyncio.CancelledError

    with Worker("asyncio", server.url, handler, lane=lane):
        assert state(backend.create_execution(lane=lane, payload=b"x")) == "failed"
        # The only slot still claims.
        assert state(backend.create_execution(lane=lane)) == "completed"


def test_giving_up_in_a_task_group_is_giving_up(server, backend, lane, state, supervisor):
    async def handler(task):
        if task.resumed:
            return b"second"
        async with asyncio.TaskGroup() as group:
            group.create_task(task.delay(0.02))
        return b"never"

    running = Worker("asyncio", server.url, lambda task: None, lane=lane)
    running._handler = handler
    with running:
        eid = backend.create_execution(lane=lane)
        assert state(eid) == "completed"
        assert backend.read_result(eid) == b"second"


def test_an_asyncio_handler_writes_without_opening_anything(server, backend, lane, state):
    async def handler(task):
        assert task.write("one") == 1
        assert task.writer.next_sequence == 2

    running = Worker("asyncio", server.url, lambda task: None, lane=lane)
    running._handler = handler
    with running:
        eid = backend.create_execution(lane=lane)
        assert state(eid) == "completed"


# -- several workers -------------------------------------------------------------------------------------------------


def test_two_workers_run_each_of_200_executions_once(worker, backend, lane):
    ran = []

    def handler(task):
        ran.append(task.execution_id)
        return task.payload

    for _ in range(2):
        worker(handler, concurrency=2)
    eids = [backend.create_execution(lane=lane, payload=b"%d" % n) for n in range(200)]
    wait_until(lambda: len(ran) >= 200, 20)
    for number, eid in enumerate(eids):
        wait_until(lambda eid=eid: backend.describe(eid).state == "completed")
        assert backend.read_result(eid) == b"%d" % number
    assert sorted(ran) == sorted(eids)


def test_a_worker_wakes_within_milliseconds(kind, server, backend, lane, raw):
    woken = {}
    arrived = threading.Event()

    def handler(task):
        woken[task.execution_id] = time.perf_counter()
        arrived.set()

    took = []
    with Worker(kind, server.url, handler, lane=lane):
        for _ in range(20):
            wait_until(lambda: waits_for_work(raw))
            arrived.clear()
            began = time.perf_counter()
            eid = backend.create_execution(lane=lane)
            assert arrived.wait(10)
            took.append((woken[eid] - began) * 1000)
    print(f"woken after {statistics.median(took):.2f} ms (median), {max(took):.2f} ms at the most")
    assert statistics.median(took) < 25
    assert sorted(took)[18] < 50


def waits_for_work(raw):
    return [c for c in raw.client_list() if "b" in c["flags"] and c["cmd"] == "bzpopmin"]


def test_a_worker_that_waits_does_not_poll(kind, server, raw, lane, monkeypatch):
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.4)
    with Worker(kind, server.url, lambda task: None, lane=lane):
        wait_until(lambda: waits_for_work(raw))
        names = ("bzpopmin", "zpopmin", "fcall", "fcall_ro", "zrange", "zadd", "xread")
        with counted(raw, *names) as calls:
            # What is measured: as long as one claim waits, and idle.
            threading.Event().wait(0.4)
    assert calls["bzpopmin"] <= 2
    assert calls["zpopmin"] <= 2
    assert sum(calls[name] for name in names[2:]) == 0


def test_a_lost_wake_up_loses_no_work(kind, server, backend, lane, raw, monkeypatch, state):
    monkeypatch.setattr("ff_fast._core.claiming.SWEEP_EVERY_S", 0.3)
    with Worker(kind, server.url, lambda task: None, lane=lane):
        for _ in range(3):
            eid = keys.new_execution_id()
            create_without_hint(backend, lane, eid)
            raw.delete(keys.ready(lane))
            assert state(eid) == "completed"


def create_without_hint(backend, lane, eid):
    """Create an execution as where the creator dies before it has told the lane."""
    call = operations_core.create_execution(
        backend._deployment, lane=lane, execution_id=eid, retention=60
    )

    def first_step_only():
        steps = call.steps()
        reply = yield next(steps)
        steps.close()
        return reply

    backend._run(operations_core.Call(first_step_only))


# -- processes -------------------------------------------------------------------------------------------------------


PROGRAM = """
import asyncio, sys, threading, time
import ff_fast
from ff_fast import aio
from tests.server.workers import handler_for, opened, until
kind, url, lane, ttl, what = sys.argv[1:]

def say(*words):
    print(*words, flush=True)

def streams(task):
    yield opened(task)
    for n in range(5):
        task.write(f"frame {n}")
    yield task.flush()
    say("flushed")
    end = time.monotonic() + 40
    yield until(task, lambda: task.cancelled or time.monotonic() > end)
    # Whatever it tries from here on is refused.
    refused = []
    calls = {
        "renew": lambda: backend.renew(task.handle),
        "progress": lambda: backend.progress(task.handle, 1),
        "complete": lambda: backend.complete(task.handle),
        "fail": lambda: backend.fail(task.handle, "x"),
        "delay": lambda: backend.delay(task.handle, 1),
        "waitpoint": lambda: backend.create_waitpoint(task.handle),
        "writer": lambda: opened_again(task),
    }
    for name, call in calls.items():
        try:
            yield call()
        except ff_fast.FFError as error:
            refused.append(f"{name}={error.code}")
    say(*refused)
    return "stale"

def opened_again(task):
    return backend.open_writer(task.handle) if kind == "sync" else opening(task)

async def opening(task):
    return await backend.open_writer(task.handle)

def ends(task):
    say("began")
    go = []
    threading.Thread(target=lambda: go.append(sys.stdin.readline()), daemon=True).start()
    yield until(task, lambda: go)
    return "in order"

handler = handler_for(kind, {"streams": streams, "ends": ends}[what])
options = dict(lane=lane, lease_ttl_ms=int(ttl))
if kind == "sync":
    with ff_fast.ValkeyBackend.connect(url) as backend:
        import signal
        before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        backend.run_worker(handler, **options)
        assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
else:
    async def main():
        global backend
        import signal
        async with aio.ValkeyBackend.connect(url) as backend:
            before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
            # Two workers of one loop hear the same signal.
            await asyncio.gather(
                backend.run_worker(handler, **options),
                backend.run_worker(handler, lane=lane + "-other"),
            )
            assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))
    asyncio.run(main())
say("ended")
"""


@pytest.fixture
def process(kind, server, lane):
    """``process(what, ttl)``: a worker in a process of its own."""
    started = []

    def start(what, lease_ttl_ms=30_000, before="", expect=None):
        one = subprocess.Popen(
            [
                sys.executable,
                "-c",
                before + PROGRAM,
                kind,
                server.url,
                lane,
                str(lease_ttl_ms),
                what,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"},
        )
        started.append(one)
        if expect is not None:
            assert one.stdout.readline() == f"{expect}\n"
        return one

    yield start
    for one in started:
        one.kill()
        one.communicate(timeout=10)


FRAMES = [b"frame %d" % n for n in range(5)]


def test_a_worker_that_is_killed_has_a_successor(
    process, server, kind, backend, lane, supervisor, state
):
    eid = backend.create_execution(lane=lane)
    process("streams", 400, expect="flushed").kill()
    found = []

    def handler(task):
        found.append((task.handle.kind, task.attempt_index, task.resumed))
        yield opened(task)
        task.write("again")

    with Worker(kind, server.url, handler, lane=lane):
        assert state(eid) == "completed"
    assert found == [(HandleKind.RESUMED, 1, True)]
    assert read(backend, eid, 0) == (FRAMES, "producer_lost")
    assert read(backend, eid, 1) == ([b"again"], "attempt_success")


def test_a_worker_that_was_stopped_is_a_stale_owner_everywhere(process, backend, lane, supervisor):
    eid = backend.create_execution(lane=lane)
    one = process("streams", 400, expect="flushed")
    one.send_signal(signal.SIGSTOP)
    handle = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert handle.fields().attempt_index == 1
    one.send_signal(signal.SIGCONT)
    names = ("renew", "progress", "complete", "fail", "delay", "waitpoint", "writer")
    assert one.stdout.readline().split() == [f"{name}=stale_owner" for name in names]
    # It goes on with other work; its execution is the successor's, in the state that it was in.
    assert one.poll() is None
    assert backend.describe(eid).state == "active"
    backend.complete(handle, b"mine")
    one.terminate()
    assert one.stdout.readline() == "ended\n"
    assert backend.read_result(eid) == b"mine"
    assert read(backend, eid, 0) == (FRAMES, "producer_lost")


NOISY = """
from ff_fast import _process
_stop_all = _process._stop_all
def noisy(*signal):
    _stop_all(*signal)
    print("signalled", flush=True)
_process._stop_all = noisy
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_handlers_end(process, backend, lane, state, number):
    eid = backend.create_execution(lane=lane)
    one = process("ends", before=NOISY, expect="began")
    one.send_signal(number)
    assert one.stdout.readline() == "signalled\n"
    # Nothing more is claimed; what runs goes on.
    later = backend.create_execution(lane=lane)
    one.stdin.write("go\n")
    one.stdin.flush()
    assert one.stdout.readline() == "ended\n"
    assert one.wait(10) == 0
    assert backend.read_result(eid) == b"in order"
    assert backend.describe(later).state == "waiting"


@pytest.mark.parametrize("hours", [-1, 1])
def test_clocks_of_clients_do_not_matter(process, backend, lane, supervisor, hours):
    before = f"""
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + 3600 * {hours}
time.time_ns = lambda: _time_ns() + 3600 * 10**9 * {hours}
"""
    eid = backend.create_execution(lane=lane)
    one = process("streams", 500, before=before, expect="flushed")
    # Its lease is renewed, not lapsed, for longer than it is: by the server's clock.
    first = backend.describe_stream(eid).lease_left
    assert 0 < first <= 0.5
    end = time.monotonic() + 0.7
    wait_until(lambda: time.monotonic() > end)
    assert backend.describe(eid).attempt_index == 0
    one.kill()
    handle = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert handle.fields().attempt_index == 1
    assert read(backend, eid, 0) == (FRAMES, "producer_lost")


# -- signals of the process --------------------------------------------------------------------------------------------


def test_signals_are_shared_and_put_back():
    heard = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        signal.signal(signal.SIGINT, lambda *_: heard.append("before"))
        own = signal.getsignal(signal.SIGINT)
        first = _process.on_stop_signals(lambda: heard.append("first"))
        second = _process.on_stop_signals(lambda: heard.append("second"))
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["first", "second"]
        first()
        signal.raise_signal(signal.SIGTERM)
        assert heard == ["first", "second", "second"]
        heard.clear()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        # Whoever interrupts twice does not want to wait.
        assert heard == ["second", "before"]
        second()
        assert signal.getsignal(signal.SIGINT) is own
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]


def test_elsewhere_than_in_the_main_thread_signals_are_left_alone():
    found = []

    def look():
        before = signal.getsignal(signal.SIGTERM)
        restore = _process.on_stop_signals(lambda: None)
        found.append(signal.getsignal(signal.SIGTERM) is before)
        restore()

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [True]
