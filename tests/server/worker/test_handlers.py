"""Handlers from claim to end."""

import asyncio
import contextlib
import os
import signal
import threading
import warnings

import pytest

import ff_fast
from ff_fast import (
    CapabilitySet,
    ClaimPolicy,
    End,
    FailureClass,
    HandleKind,
    OnCancel,
    TaskFailed,
    UsageDimensions,
    WaitpointKind,
    WaitpointSpec,
    aio,
    errors,
)
from ff_fast._core import leases as leases_core

from ...shells import WORKER
from ...waiting import wait_until
from ..workers import Worker, opened, until
from .attempts import RETRY, read

# -- handlers --------------------------------------------------------------------------------------


def test_a_handler_streams_and_its_result_is_stored(worker, backend, lane, state):
    seen = []

    def handler(task):
        seen.append(
            (task.execution_id, task.attempt_index, task.resumed, task.payload, task.signals)
        )
        yield opened(task)
        for word in (b"one", b"two"):
            task.write(word)
        yield task.drain()
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


# -- giving up and going on ------------------------------------------------------------------------


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


# -- cancellation ----------------------------------------------------------------------------------


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


# -- what is not the handler's failure -------------------------------------------------------------


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


@pytest.mark.parametrize(
    "error, end, over",
    [
        (errors.Unavailable, "producer_lost", None),
        (errors.AuthenticationFailed, "producer_lost", errors.AuthenticationFailed),
        (errors.ProtocolError, "attempt_failure", None),
    ],
)
def test_a_handler_that_could_not_start(kind, server, backend, lane, error, end, over):
    called = []
    running = Worker(kind, server.url, called.append, lane=lane).begin()
    carry_out, claims = running.backend._do, [True]

    def refuse(call, **renewing):
        if renewing:
            return carry_out(call, **renewing)
        # The call after a claim loads what the handler starts from.
        claims.append(call.claim is not None)
        if claims[-2] and call.claim is None:
            running.ask()
            raise error
        return carry_out(call)

    running.backend._do = refuse
    eid = backend.create_execution(lane=lane)
    with pytest.raises(over) if over else contextlib.nullcontext():
        running.result()
    assert called == []
    assert backend.describe(eid).state == ("waiting" if end == "producer_lost" else "failed")
    assert read(backend, eid, 0) == ([], end)


def test_an_end_is_tried_again_while_the_lease_is_held(kind, server, backend, lane, state):
    running = Worker(kind, server.url, lambda task: b"kept", lane=lane).begin()
    carry_out, failures = running.backend._do, [errors.Unavailable(), errors.OutcomeUnknown()]
    loaded = []

    def flaky(call, **renewing):
        if renewing:
            return carry_out(call, **renewing)
        if call.claim is None:
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

    def stopping(call, **renewing):
        if call.claim is not None:
            running.ask()
        return carry_out(call, **renewing)

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

    running = worker(handler, on_cancel=OnCancel.TELL)
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


# -- cancelled coroutines --------------------------------------------------------------------------


def test_a_renewal_tells_a_handler_that_never_writes_of_a_cancellation(
    worker, backend, lane, state, monkeypatch
):
    # Soon, and the lease does not lapse on a machine that stands still for a while.
    monkeypatch.setattr(leases_core, "RENEW_AT", 0.005)
    started = threading.Event()

    def handler(task):
        started.set()
        yield until(task, lambda: task.cancelled)

    worker(handler)
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


@pytest.mark.parametrize("how", ["cancelled", "drained"])
@pytest.mark.parametrize("end", ["returns", "raises"])
def test_an_interrupted_asyncio_worker_hands_back_what_a_handler_keeps_to_itself(
    server, backend, lane, how, end
):
    """The handler was broken off, and takes that for its end: its text is no result."""
    started, seen = threading.Event(), []

    def handler(task):
        yield opened(task)
        task.write("half")
        started.set()
        with contextlib.suppress(asyncio.CancelledError):
            yield until(task, lambda: False)
        seen.append((task.cancelled, task.lost))
        if end == "raises":
            raise ValueError("broken off")
        return "half"

    drain_s = 0.05 if how == "drained" else None
    running = Worker("asyncio", server.url, handler, lane=lane, drain_timeout=drain_s).begin()
    eid = backend.create_execution(lane=lane)
    assert started.wait(10)
    if how == "drained":
        running.ask()
        running.join(10)
        assert running.error is None
    else:
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            running.result()
    assert seen == [(True, True)]
    handle = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(5))
    assert handle.fields().attempt_index == 1
    assert read(backend, eid) == ([b"half"], "producer_lost")


def test_a_task_group_of_one_handler_is_not_the_next_ones_cancellation(
    server, backend, lane, state
):
    async def handler(task):
        if task.payload == b"group":
            async with asyncio.TaskGroup() as group:
                group.create_task(asyncio.wait_for(asyncio.Event().wait(), 0.01))
        if task.payload == b"cancelled":
            raise asyncio.CancelledError

    running = Worker("asyncio", server.url, lambda task: None, lane=lane)
    running._handler = handler
    with running:
        # In the only slot, one after the other.
        for payload, end in ((b"group", "failed"), (b"cancelled", "failed"), (b"", "completed")):
            assert state(backend.create_execution(lane=lane, payload=payload)) == end


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
