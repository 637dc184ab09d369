"""Workers that supervise: of many one does, and another follows it; none where somebody else does already."""

import os
import signal
import subprocess
import sys
import threading

import pytest

import ff_fast
from ff_fast import FailureClass, RetryPolicy, aio, client, keys
from ff_fast._core import operations as operations_core
from ff_fast._core import supervision as supervision_core
from ff_fast.embedded import EmbeddedServer

from ...conftest import ROOT
from ...waiting import wait_until
from ..workers import Supervisor, Worker

MARK = keys.supervisor()


@pytest.fixture(scope="module")
def server():
    """A server of these tests alone: others would fire their timers."""
    with EmbeddedServer(hz=500) as running:
        yield running


@pytest.fixture(autouse=True)
def no_mark(raw):
    raw.delete(MARK)


@pytest.fixture
def prompt(monkeypatch):
    monkeypatch.setattr(supervision_core, "_LOOK_S", 0.05)
    monkeypatch.setattr(operations_core, "SUPERVISE_EVERY_S", 0.02)
    # A worker that ends waits until its mark is gone, however slow the machine is; else the mark would lapse.
    monkeypatch.setattr(operations_core, "_LEAVE_S", 10.0)
    for shell in (client, aio):
        monkeypatch.setattr(shell, "_SUPERVISOR_ENDS_S", 10.0)


def timers_due(raw):
    """Count the calls that read due timers."""
    return raw.info("commandstats").get("cmdstat_zrangebyscore", {}).get("calls", 0)


@pytest.mark.usefixtures("prompt")
def test_a_worker_retries_delays_and_replaces_lost_workers_by_itself(worker, backend, lane, state):
    lost = backend.create_execution(lane=lane)
    assert backend.claim(lane=lane, lease_ttl_ms=50) is not None
    delayed = backend.create_execution(lane=lane, delay=0.05)
    tried = []

    def handler(task):
        if task.payload == b"again":
            tried.append(task.attempt_index)
            if len(tried) == 1:
                raise RuntimeError
        return b"done"

    retried = backend.create_execution(
        lane=lane, payload=b"again", retry=RetryPolicy(max_retries=1, delay=0.05)
    )
    worker(handler, supervise=True)
    for eid in (lost, delayed, retried):
        assert state(eid) == "completed"
    assert tried == [0, 1]


@pytest.mark.usefixtures("prompt")
def test_a_worker_that_ends_when_idle_waits_for_retries_and_for_what_others_run(
    kind, server, backend, lane, monkeypatch
):
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)
    tries = []

    def handler(task):
        tries.append(task.execution_id)
        if tries == [retried]:
            raise RuntimeError
        return b"again"

    policy = RetryPolicy(max_retries=1, delay=0.3)
    retried = backend.create_execution(lane=lane, retry=policy)
    held = backend.create_execution(lane=lane, priority=9)
    holder = backend.claim(lane=lane)
    assert holder.fields().execution_id == held
    idle = Worker(
        kind, server.url, handler, lane=lane, until_idle=True, concurrency=3, supervise=True
    )
    idle.begin()
    wait_until(lambda: backend.describe(retried).state == "completed")
    assert idle.is_alive()
    # Its holder gives it up, as a worker that is stopped does.
    backend.fail(holder, "lost", FailureClass.INFRA_CRASH)
    threading.Thread.join(idle, 20)
    assert idle.error is None
    assert not idle.is_alive()
    assert backend.read_result(held) == backend.read_result(retried) == b"again"


@pytest.mark.usefixtures("prompt")
def test_of_many_workers_one_supervises_and_another_one_follows_it(kind, server, lane, raw):
    workers = [
        Worker(kind, server.url, lambda task: None, lane=lane, supervise=True).begin()
        for _ in range(4)
    ]
    try:
        wait_until(lambda: raw.get(MARK))
        # One connection asks for the due timers, however many workers there are.
        begun = timers_due(raw)
        wait_until(lambda: timers_due(raw) > begun + 5 * keys.DEFAULT_PARTITIONS)
        while len(workers) > 1:
            held = raw.get(MARK)
            stopped = workers.pop(0)
            stopped.ask()
            stopped.join(10)
            if held != raw.get(MARK):
                assert wait_until(lambda: raw.get(MARK)) != held
    finally:
        for each in workers:
            each.ask()
        for each in workers:
            each.join(10)
    # The last one has left no mark behind it.
    assert raw.get(MARK) is None


@pytest.mark.usefixtures("prompt")
def test_workers_stand_by_while_somebody_else_supervises(kind, server, lane, raw, monkeypatch):
    monkeypatch.setattr(supervision_core, "_MARK_AGAIN_S", 0.02)
    with Supervisor("sync", server.url):
        mark = wait_until(lambda: raw.get(MARK))
        with Worker(kind, server.url, lambda task: None, lane=lane, supervise=True):
            calls = raw.info("commandstats")["cmdstat_set"]["calls"]
            # Both set the mark, or try to.
            wait_until(lambda: raw.info("commandstats")["cmdstat_set"]["calls"] > calls + 10)
            assert raw.get(MARK) == mark
    wait_until(lambda: raw.get(MARK) is None)


@pytest.mark.usefixtures("prompt")
def test_a_supervisor_of_some_executions_stands_in_for_nobody(kind, server, lane, raw):
    with (
        Supervisor("sync", server.url, ff_fast.ScannerFilter(namespace="mine")),
        Worker(kind, server.url, lambda task: None, lane=lane, supervise=True),
    ):
        wait_until(lambda: raw.get(MARK))


def test_a_worker_that_shall_not_supervise_does_not(worker, backend, lane, raw, state):
    worker(lambda task: None, supervise=False)
    assert state(backend.create_execution(lane=lane)) == "completed"
    assert raw.get(MARK) is None


@pytest.mark.usefixtures("prompt")
def test_a_worker_without_the_right_to_supervise_works_and_says_so_once(
    kind, server, backend, lane, raw, state, caplog
):
    raw.execute_command(
        "ACL", "SETUSER", "plain", "on", ">p", "+@all", "-zrangebyscore", "~*", "&*"
    )
    delayed = backend.create_execution(lane=lane, delay=0.01)
    url = server.url.replace("://", "://plain:p@")
    with Worker(kind, url, lambda task: None, lane=lane, supervise=True):
        wait_until(lambda: "does not supervise" in caplog.text)
        assert state(backend.create_execution(lane=lane)) == "completed"
        assert backend.describe(delayed).state == "delayed"
        wait_until(lambda: raw.get(MARK) is None)
    raw.acl_deluser("plain")
    assert caplog.text.count("does not supervise") == 1


CHILD = """
import sys, ff_fast
with ff_fast.ValkeyBackend.connect(sys.argv[1]) as backend:
    backend.run_worker(lambda task: None, lane=sys.argv[2])
"""


@pytest.mark.usefixtures("prompt")
def test_a_worker_supervises_once_the_mark_of_a_lost_one_has_lapsed(kind, server, lane, raw):
    raw.set(MARK, "lost", px=100)
    with Worker(kind, server.url, lambda task: None, lane=lane, supervise=True):
        wait_until(lambda: raw.get(MARK) not in (None, b"lost"))


@pytest.mark.long
@pytest.mark.usefixtures("prompt")
def test_another_worker_supervises_after_the_one_that_did_was_killed(kind, server, lane, raw):
    child = subprocess.Popen(
        [sys.executable, "-Wignore::DeprecationWarning", "-c", CHILD, server.url, lane],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        mark = wait_until(lambda: raw.get(MARK))
        with Worker(kind, server.url, lambda task: None, lane=lane, supervise=True):
            child.send_signal(signal.SIGKILL)
            child.wait(10)
            wait_until(lambda: raw.get(MARK) not in (None, mark))
    finally:
        child.kill()
        child.wait(10)


def test_a_mark_that_is_foreign_data_stops_nobody(kind, server, lane, raw, prompt, backend, state):
    raw.rpush(MARK, "x")
    delayed = backend.create_execution(lane=lane, delay=0.01)
    with Worker(kind, server.url, lambda task: None, lane=lane, supervise=True):
        assert state(delayed) == "completed"
    raw.delete(MARK)
