"""Several workers, and processes that are signalled, stopped or killed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from ff_fast import (
    ClaimPolicy,
    HandleKind,
    _process,
    keys,
)
from ff_fast._core import claiming
from ff_fast._core import operations as operations_core

from ...conftest import ROOT
from ...heads import set_head
from ...shells import WORKER
from ...waiting import wait_until
from ..readers import counted
from ..streams import server_ms
from ..workers import Worker, opened
from .attempts import read

# -- several workers -------------------------------------------------------------------------------


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


def test_a_worker_is_woken_by_each_execution(kind, server, backend, lane, raw, monkeypatch):
    """Not by a sweep, which takes none here."""
    monkeypatch.setattr(claiming, "SWEEP_EVERY_S", 3_600.0)
    arrived = threading.Event()
    with Worker(kind, server.url, lambda task: arrived.set(), lane=lane):
        for _ in range(20):
            wait_until(lambda: waits_for_work(raw))
            arrived.clear()
            backend.create_execution(lane=lane)
            assert arrived.wait(10)


def waits_for_work(raw):
    return [c for c in raw.client_list() if "b" in c["flags"] and c["cmd"] == "bzmpop"]


def test_a_worker_that_waits_does_not_poll(kind, server, raw, lane, monkeypatch):
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.4)
    # What it looks at every few seconds is no poll, and may come where the machine is slow.
    monkeypatch.setattr(claiming, "LOOK_EVERY_S", 3_600.0)
    monkeypatch.setattr(claiming, "SWEEP_EVERY_S", 3_600.0)
    with Worker(kind, server.url, lambda task: None, lane=lane):
        wait_until(lambda: waits_for_work(raw))
        names = ("bzmpop", "zpopmin", "fcall", "fcall_ro", "zrange", "zadd", "xread")
        began = time.monotonic()
        with counted(raw, *names) as calls:
            # What is measured: as long as one claim waits, and idle.
            threading.Event().wait(0.4)
        # It may have been longer.
        most = (time.monotonic() - began) // 0.4 + 1
    assert calls["bzmpop"] <= most
    assert calls["zpopmin"] <= most
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


# -- processes -------------------------------------------------------------------------------------


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
options = dict(lane=lane, lease_ttl_ms=int(ttl), on_cancel=ff_fast.OnCancel.TELL)
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


def lapse(raw, eid):
    """Let the lease of a process that is dead run out, by the server's clock."""
    set_head(raw, keys.head(eid, 0), lease_expires_at=server_ms(raw))
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"lease:{eid}": server_ms(raw)})


def test_a_worker_that_is_killed_has_a_successor(
    process, server, kind, backend, lane, supervisor, state, raw
):
    eid = backend.create_execution(lane=lane)
    one = process("streams", expect="flushed")
    one.kill()
    one.wait(10)
    lapse(raw, eid)
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
    one = process("streams", 1_500, expect="flushed")
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
def test_clocks_of_clients_do_not_matter(process, backend, lane, supervisor, raw, hours):
    before = f"""
import time
_time, _time_ns = time.time, time.time_ns
time.time = lambda: _time() + 3600 * {hours}
time.time_ns = lambda: _time_ns() + 3600 * 10**9 * {hours}
"""
    eid = backend.create_execution(lane=lane)
    one = process("streams", 1_200, before=before, expect="flushed")
    # Its lease is renewed, not lapsed, for longer than it is: by the server's clock.
    first = backend.describe_stream(eid).lease_left
    assert 0 < first <= 1.2
    end = time.monotonic() + 1.4
    wait_until(lambda: time.monotonic() > end)
    assert backend.describe(eid).attempt_index == 0
    one.kill()
    one.wait(10)
    lapse(raw, eid)
    handle = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert handle.fields().attempt_index == 1
    assert read(backend, eid, 0) == (FRAMES, "producer_lost")


# -- signals of the process ------------------------------------------------------------------------


@pytest.fixture
def _handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    after = {number: signal.getsignal(number) for number in before}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert after[signal.SIGTERM] == before[signal.SIGTERM]


@pytest.mark.usefixtures("_handlers")
def test_signals_are_shared_and_put_back():
    heard = []
    own = signal.default_int_handler
    signal.signal(signal.SIGINT, own)
    first = _process.on_stop_signals(lambda: heard.append("first"))
    second = _process.on_stop_signals(lambda: heard.append("second"))
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["first", "second"]
    first()
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["first", "second", "second"]
    heard.clear()
    signal.raise_signal(signal.SIGINT)
    # Whoever interrupts twice does not want to wait.
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert heard == ["second"]
    second()
    assert signal.getsignal(signal.SIGINT) is own


@pytest.mark.usefixtures("_handlers")
def test_a_program_with_handlers_of_its_own_hears_each_signal_too():
    heard = []
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        signal.signal(number, lambda *_: heard.append("program"))
    restore = _process.on_stop_signals(lambda: heard.append("worker"), twice=True)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGINT, signal.SIGINT):
        signal.raise_signal(number)
    assert heard == ["worker", "program"] * 4
    restore()
    signal.signal(signal.SIGTERM, before[signal.SIGTERM])


@pytest.mark.usefixtures("_handlers")
def test_a_handler_of_the_program_that_exits_breaks_off_no_stop():
    heard = []

    def leave(*_):
        heard.append("program")
        raise SystemExit

    before = signal.signal(signal.SIGTERM, leave)
    restore = _process.on_stop_signals(lambda: heard.append("worker"))
    signal.raise_signal(signal.SIGTERM)
    assert heard == ["worker", "program"]
    restore()
    assert signal.signal(signal.SIGTERM, before) is leave


@pytest.mark.usefixtures("_handlers")
def test_the_handler_of_asyncio_is_for_a_second_interrupt():
    heard = []

    async def main():
        restore = _process.on_stop_signals(lambda: heard.append("worker"))
        signal.raise_signal(signal.SIGINT)
        await asyncio.sleep(0)
        heard.append("went on")
        signal.raise_signal(signal.SIGINT)
        try:
            await asyncio.sleep(60)
        finally:
            restore()

    signal.signal(signal.SIGINT, signal.default_int_handler)
    with pytest.raises(KeyboardInterrupt):
        asyncio.run(main())
    assert heard == ["worker", "went on"]


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
