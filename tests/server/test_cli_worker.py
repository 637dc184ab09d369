"""``ff-fast worker`` and ``ff-fast server``: what they run, say and leave behind, with exit codes."""

import contextlib
import errno
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

import ff_fast
from ff_fast import _process, cli
from ff_fast._cli import health, processes, work
from ff_fast._core import operations as operations_core

from ..conftest import ROOT, connect_raw
from ..waiting import wait_until

MODULE = """
import asyncio, contextlib, os, signal, threading, time, urllib.request
import ff_fast

NOT_ONE = 7

def plain(task):
    task.write(b"plain")
    return b"plain"

def other(task):
    return b"other"

async def coroutine(task):
    task.write(b"coroutine")
    return b"coroutine"

@contextlib.contextmanager
def opened(backend):
    yield "opened"

sync_app = ff_fast.Worker(lane="unused", lifespan=opened)
async_app = ff_fast.Worker(lane="unused", lifespan=opened)

@sync_app.handler("name")
def named(task):
    return task.context

@async_app.handler("name")
async def named_too(task):
    return task.context

def slow(task):
    task.write(b"begun")
    task.flush()
    task.wait_cancelled(float(task.payload))
    return b"lost" if task.lost else b"done"

async def slow_coroutine(task):
    task.write(b"begun")
    await task.flush()
    await asyncio.sleep(float(task.payload))
    return b"done"

go_on = threading.Event()

def held(task):
    task.write(b"begun")
    task.flush()
    go_on.wait(30)
    return b"done"

async def held_coroutine(task):
    task.write(b"begun")
    await task.flush()
    await asyncio.to_thread(go_on.wait, 30)
    return b"done"

def stubborn(task):
    task.write(b"begun")
    task.flush()
    time.sleep(600)

async def stubborn_coroutine(task):
    task.write(b"begun")
    await task.flush()
    time.sleep(600)

def pid(task):
    return str(os.getpid())

def generator(task):
    yield "token"

async def async_generator(task):
    yield "token"

class Kind:
    def __init__(self, task):
        pass
"""


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working directory, which no other test has imported."""
    name = f"jobs_{os.getpid()}_{time.monotonic_ns()}"
    (tmp_path / f"{name}.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return name


@pytest.fixture
def run(server, monkeypatch, capfd, module):
    """Run the command in this process, until there is nothing to do."""
    monkeypatch.setenv(cli.URL_VARIABLE, server.url)
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)

    def run(*argv):
        code = cli.main(["worker", *argv])
        return code, capfd.readouterr().err

    return run


@contextlib.contextmanager
def started(server, *argv, **options):
    """The command in a process of its own; killed at the end, with what it has started."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FF_FAST_URL": server.url}
    process = subprocess.Popen(
        [sys.executable, "-m", "ff_fast", *argv],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def begun(backend, eid):
    """Wait until the handler of an execution has written."""
    wait_until(lambda: backend.describe(eid).attempt_count and list(backend.read_stream(eid, 0)))


def state(backend, eid, *states):
    return wait_until(lambda: (found := backend.describe(eid).state) in states and found)


# -- what is run -----------------------------------------------------------------------------------


@pytest.mark.parametrize("handler", ["plain", "coroutine"])
def test_a_function_runs_what_names_no_handler(run, backend, lane, module, handler):
    eids = [backend.create_execution(lane=lane) for _ in range(3)]
    named = backend.create_execution(lane=lane, handler=handler)
    assert run(f"{module}:{handler}", "--lane", lane, "--until-idle", "--concurrency", "2")[0] == 0
    assert {backend.read_result(eid) for eid in eids} == {handler.encode()}
    assert backend.describe(named).state == "waiting"


def test_several_functions_run_by_their_names(run, backend, lane, module):
    eids = {name: backend.create_execution(lane=lane, handler=name) for name in ("plain", "other")}
    argv = [f"{module}:plain", f"{module}:other", "--lane", lane, "--until-idle", "--no-supervise"]
    assert run(*argv)[0] == 0
    for name, eid in eids.items():
        assert backend.read_result(eid) == name.encode()


@pytest.mark.parametrize("app, function", [("sync_app", "plain"), ("async_app", "coroutine")])
def test_a_worker_and_a_function_run_beside_each_other(run, backend, lane, module, app, function):
    named = backend.create_execution(lane=lane, handler="name")
    plain = backend.create_execution(lane=lane)
    argv = [f"{module}:{app}", f"{module}:{function}", "--lane", lane, "--until-idle"]
    assert run(*argv)[0] == 0
    assert backend.read_result(named) == b"opened"
    assert backend.read_result(plain) == function.encode()


@pytest.mark.parametrize(
    "argv, said",
    [
        (["{m}:nothing"], "{m} has no nothing."),
        (["{m}:NOT_ONE"], "{m}:NOT_ONE is neither a function nor an ff_fast.Worker."),
        (["{m}"], "{m} must be MODULE:HANDLER."),
        (["no_module_of_ours:plain"], "There is no module no_module_of_ours here."),
        (["{m}.py:plain"], "There is no module {m}.py; leave .py out: {m}"),
        (["./some/{m}.py:plain"], "must be the name of a module, such as some.{m}."),
        ([".{m}:plain"], ".{m}:plain must be MODULE:HANDLER."),
        (["{m}:generator"], "A handler must not be a generator"),
        (["{m}:async_generator"], "A handler must not be a generator"),
        (["{m}:Kind"], "A handler must be a function."),
        (["{m}:plain", "{m}:coroutine"], "are all coroutine functions"),
        (["{m}:sync_app", "{m}:coroutine"], "must all be coroutine functions"),
        (["{m}:plain", "--lane", "x\n"], "A lane must be"),
        (["{m}:plain", "--workers", "0"], "must be at least 1"),
        (["{m}:plain", "--concurrency", "0"], "must be at least 1"),
        (["{m}:plain", "--drain-timeout", "-1"], "must be a number"),
        (["{m}:plain", "--health-port", "65536"], "must be a port"),
        (["{m}:plain", "--parent-fd", "99"], "--parent-fd is for"),
        ([], "required: MODULE:HANDLER"),
    ],
)
def test_wrong_usage_is_said_in_a_line(run, module, argv, said):
    code, err = run(*(each.format(m=module) for each in argv))
    assert code == 2
    assert said.format(m=module) in err.splitlines()[-1]
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "text, says",
    [
        ("import absent_of_ours", "ModuleNotFoundError: No module named 'absent_of_ours'"),
        ("def f():\n  1 / 0\nf()", "ZeroDivisionError: division by zero"),
        ("import sys\nsys.exit()", "SystemExit"),
        ("def f(:", "SyntaxError: invalid syntax"),
    ],
)
def test_a_module_that_cannot_be_imported_shows_why(run, module, tmp_path, text, says):
    file = tmp_path / f"{module}.py"
    file.write_text(text)
    code, err = run(f"{module}:handler")
    assert code == 2
    *_, last, said = err.splitlines()
    assert (last, said) == (says, f"ff-fast: {module} cannot be imported: see above.")
    # None of the frames that import it.
    assert set(re.findall(r'File "([^"]*)"', err)) == {str(file)}


@pytest.mark.parametrize("option, package", [("--metrics-port", "metrics"), ("--reload", "reload")])
def test_a_package_that_is_missing_is_named(run, module, monkeypatch, option, package):
    for name in ("prometheus_client", "watchfiles"):
        monkeypatch.setitem(sys.modules, name, None)
    code, err = run(f"{module}:plain", option, *(["9"] if package == "metrics" else []))
    assert code == 1
    assert f"ff_fast[{package}]" in err


def test_a_server_that_is_not_there_ends_the_worker(run, module):
    code, err = run(f"{module}:plain", "--url", "unix:///nowhere/valkey.sock")
    assert code == 1
    assert "There is no socket" in err


# -- health ----------------------------------------------------------------------------------------


def get(port, path):
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()


@pytest.mark.parametrize("handler", ["held", "held_coroutine"])
def test_readiness_follows_the_worker(server, backend, lane, module, handler, monkeypatch):
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)
    ports = []
    monkeypatch.setattr(health, "serve", kept(health.serve, ports))
    arguments = cli._parser().parse_args(
        [
            "worker",
            f"{module}:{handler}",
            "--lane",
            lane,
            "--health-port",
            "0",
            "--bind",
            "127.0.0.1",
        ]
    )
    arguments.drain_timeout = 20
    # What supervises would say that the server has answered.
    arguments.no_supervise = True
    process = work.Process(arguments, server.url)
    running = threading.Thread(target=process.run, daemon=True)
    eid = backend.create_execution(lane=lane)
    running.start()
    try:
        begun(backend, eid)
        (port,) = ports
        wait_until(lambda: get(port, "/ready") == (200, b"ready\n"))
        assert get(port, "/live") == (200, b"live\n")
        assert get(port, "/metrics")[0] == get(port, "/other")[0] == 404
        # While the only slot runs a handler, nobody asks the server for work.
        process._backend._attending.reached = False
        assert get(port, "/ready") == (503, b"unreachable\n")
        process._stop.set()
        assert get(port, "/ready") == (503, b"stopping\n")
        assert get(port, "/live")[0] == 200
    finally:
        process._stop.set()
        sys.modules[module].go_on.set()
        running.join(20)
    assert not running.is_alive()
    # It was not interrupted.
    assert backend.read_result(eid) == b"done"


def kept(serve, ports):
    def serving(*arguments):
        ports.append(serve(*arguments))
        return ports[-1]

    return serving


def test_a_port_that_is_taken_is_said(run, module):
    endpoints = health.Endpoints()
    port = health.serve(endpoints, "127.0.0.1", 0)
    code, err = run(f"{module}:plain", "--health-port", str(port), "--bind", "127.0.0.1")
    assert code == 2
    assert f"Port {port} of 127.0.0.1 cannot be had" in err


def test_the_metrics_of_a_worker_are_served(run, backend, lane, module, monkeypatch):
    pytest.importorskip("prometheus_client")
    shown, ports = [], []
    monkeypatch.setattr(health, "serve", kept(health.serve, ports))
    run_worker = ff_fast.ValkeyBackend.run_worker

    def ends(self, *arguments, **options):
        run_worker(self, *arguments, **options)
        shown.append(get(ports[0], "/metrics"))

    monkeypatch.setattr(ff_fast.ValkeyBackend, "run_worker", ends)
    for _ in range(3):
        backend.create_execution(lane=lane)
    argv = ("--lane", lane, "--until-idle", "--metrics-port", "0", "--bind", "127.0.0.1")
    assert run(f"{module}:plain", *argv)[0] == 0
    ((status, text),) = shown
    assert status == 200
    assert re.search(rb"^ff_fast_executions_completed_total 3.0$", text, re.MULTILINE)


def test_a_loop_that_stands_still_is_not_live(
    server, backend, lane, module, tmp_path, monkeypatch, said
):
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)
    monkeypatch.setattr(health, "STANDSTILL_S", 1.0)
    ports = []
    monkeypatch.setattr(health, "serve", kept(health.serve, ports))
    (tmp_path / f"{module}.py").write_text(
        """
import threading
go_on = threading.Event()

async def blocks(task):
    go_on.wait(20)
"""
    )
    arguments = cli._parser().parse_args(
        ["worker", f"{module}:blocks", "--lane", lane, "--health-port", "0", "--bind", "127.0.0.1"]
    )
    process = work.Process(arguments, server.url)
    say, live_until = health.say, []

    def saying(*arguments):
        live_until.append(process.why_not_live())
        say(*arguments)

    monkeypatch.setattr(health, "say", saying)
    running = threading.Thread(target=process.run, daemon=True)
    running.start()
    try:
        wait_until(lambda: ports)
        (port,) = ports
        wait_until(lambda: get(port, "/ready") == (200, b"ready\n"))
        assert get(port, "/live") == (200, b"live\n")
        eid = backend.create_execution(lane=lane)
        wait_until(lambda: get(port, "/live") == (503, b"blocked\n"))
        # The log says it before anybody is told, who may end the process at once.
        (record,) = said(logging.ERROR)
        assert "go_on.wait(20)" in record.getMessage()
        assert live_until == [""]
        sys.modules[module].go_on.set()
        wait_until(lambda: get(port, "/live") == (200, b"live\n"))
        wait_until(lambda: backend.describe(eid).state == "completed")
    finally:
        process._stop.set()
        running.join(20)
    assert not running.is_alive()


def talk(port, request):
    with socket.create_connection(("127.0.0.1", port), 10) as client:
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(4096), b""))


def test_what_a_client_may_ask_and_how_it_may_go(caplog):
    endpoints = health.Endpoints()
    endpoints.live = endpoints.ready = lambda: ""
    endpoints.metrics = lambda: 1 / 0
    port = health.serve(endpoints, "127.0.0.1", 0)
    head, body = talk(port, b"HEAD /ready HTTP/1.1\r\n\r\n").split(b"\r\n\r\n")
    assert (head.split(b"\r\n")[0], body) == (b"HTTP/1.0 200 OK", b"")
    assert b"Python" not in head
    assert talk(port, b"POST /ready HTTP/1.1\r\n\r\n").startswith(b"HTTP/1.0 501")
    assert b"400" in talk(port, b"\x16\x03\x01\r\n\r\n")
    with socket.create_connection(("127.0.0.1", port)) as client:
        # It is reset amid its request.
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.sendall(b"GET /re")
    assert get(port, "/live") == (200, b"live\n")
    assert caplog.records == []
    assert get(port, "/metrics") == (500, b"See the log.\n")
    (record,) = caplog.records
    assert (record.getMessage(), record.exc_info[0]) == ("/metrics has failed.", ZeroDivisionError)


def test_clients_that_are_slow_take_a_bounded_number_of_threads(monkeypatch):
    monkeypatch.setattr(health, "_ANSWER_S", 0.3)
    monkeypatch.setattr(health, "_AT_ONCE", 4)
    endpoints = health.Endpoints()
    endpoints.ready = lambda: ""
    port = health.serve(endpoints, "127.0.0.1", 0)

    def busy():
        # Not all threads: those of earlier tests may still be about to end.
        return [each for each in threading.enumerate() if "process_request" in each.name]

    with contextlib.ExitStack() as opened:
        for _ in range(20):
            client = opened.enter_context(socket.create_connection(("127.0.0.1", port)))
            client.sendall(b"GET /ready HTTP/1.1\r\n")
        wait_until(lambda: len(busy()) == 4)
        # They have no answer in time, one byte after the other does not help, and the next in line are answered.
        assert get(port, "/ready") == (200, b"ready\n")
        assert len(busy()) <= 4


@pytest.mark.parametrize("address", ["::1", "::"])
def test_ports_are_bound_to_addresses_of_both_kinds(address):
    if not socket.has_dualstack_ipv6():
        pytest.skip("The machine has no IPv6.")
    endpoints = health.Endpoints()
    endpoints.live = lambda: ""
    port = health.serve(endpoints, address, 0)
    for host in ("::1", "127.0.0.1") if address == "::" else ("::1",):
        with socket.create_connection((host, port), 10) as client:
            client.sendall(b"GET /live HTTP/1.1\r\n\r\n")
            assert client.recv(100).startswith(b"HTTP/1.0 200")


def test_metrics_are_on_their_path():
    endpoints = health.Endpoints()
    endpoints.metrics = lambda: ("text/x", b"ff_fast_up 1\n")
    assert endpoints.answer("/metrics") == (200, "text/x", b"ff_fast_up 1\n")
    assert endpoints.answer("/live")[0] == endpoints.answer("/ready")[0] == 404


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("capsys")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_stops_in_order_is_not_broken_off(monkeypatch, number):
    heard = []

    def stops(_):
        restore = _process.on_stop_signals(lambda: heard.append(number), twice=True)
        try:
            signal.raise_signal(number)
            signal.raise_signal(number)
        finally:
            restore()
        return 0

    monkeypatch.setattr(cli, "_run", stops)
    assert cli.main(()) == 0
    assert heard == [number, number]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_ends_an_import_at_once(run, module, tmp_path, number):
    (tmp_path / f"{module}.py").write_text(
        f"import signal, time\nsignal.raise_signal({int(number)})\ntime.sleep(600)"
    )
    assert run(f"{module}:handler") == (0, "")


@pytest.mark.long
def test_sigterm_lets_a_handler_end(server, backend, lane, module):
    eid = backend.create_execution(lane=lane, payload=b"0.5")
    with started(server, "worker", f"{module}:slow_coroutine", "--lane", lane) as process:
        begun(backend, eid)
        process.send_signal(signal.SIGTERM)
        later = backend.create_execution(lane=lane, payload=b"0")
        _, err = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert backend.read_result(eid) == b"done"
    assert backend.describe(later).attempt_count == 0


@pytest.mark.long
@pytest.mark.parametrize("how", ["drain", "second signal", "second interrupt"])
@pytest.mark.parametrize("handler", ["slow", "slow_coroutine"])
def test_a_handler_that_outlasts_the_drain_is_interrupted(
    server, backend, lane, module, handler, how
):
    eid = backend.create_execution(lane=lane, payload=b"600")
    drain = "0.2" if how == "drain" else "600"
    argv = ("worker", f"{module}:{handler}", "--lane", lane, "--drain-timeout", drain)
    with started(server, *argv) as process:
        begun(backend, eid)
        number = signal.SIGINT if how == "second interrupt" else signal.SIGTERM
        process.send_signal(number)
        if how != "drain":
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(1.5)
            process.send_signal(number)
        _, err = process.communicate(timeout=20)
    assert (process.returncode, "Traceback" in err) == (0, False)
    # Handed back: the lease of 30 s has not lapsed.
    handle = wait_until(lambda: backend.claim(lane=lane), 5)
    assert handle.fields().execution_id == eid
    assert [frame.payload for frame in backend.read_stream(eid, 0)] == [b"begun"]


@pytest.mark.long
@pytest.mark.parametrize("handler", ["stubborn", "stubborn_coroutine"])
def test_a_handler_that_cannot_be_interrupted_keeps_no_process(
    server, backend, lane, module, handler
):
    eid = backend.create_execution(lane=lane)
    argv = ("worker", f"{module}:{handler}", "--lane", lane, "--drain-timeout", "0.1")
    with started(server, *argv) as process:
        begun(backend, eid)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    # A thread is left behind; a loop that is blocked is ended with its process.
    assert process.returncode == (0 if handler == "stubborn" else 1)
    assert ("does not end" in err) == (handler != "stubborn")


# -- several processes -----------------------------------------------------------------------------


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children(process):
    listed = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return [int(pid) for pid in listed.split()]


def pids_of(backend, lane, count):
    """The processes that run executions, once there are *count*."""
    seen = set()

    def more():
        eid = backend.create_execution(lane=lane)
        state(backend, eid, "completed")
        seen.add(int(backend.read_result(eid)))
        return len(seen) >= count

    wait_until(more, 60)
    return seen


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_processes_of_a_command_end_with_it(server, backend, lane, module, number):
    argv = ("worker", f"{module}:pid", "--lane", lane, "--workers", "2")
    with started(server, *argv) as process:
        pids = pids_of(backend, lane, 2)
        assert pids == set(children(process))
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, "Traceback" in err) == (0, False)
    assert not any(map(alive, pids))


@pytest.mark.long
def test_the_processes_of_a_command_that_is_killed_end_too(server, backend, lane, module):
    argv = ("worker", f"{module}:pid", "--lane", lane, "--workers", "2")
    with started(server, *argv) as process:
        pids = pids_of(backend, lane, 2)
        process.kill()
        wait_until(lambda: not any(map(alive, pids)), 30)


@pytest.mark.long
def test_a_process_that_dies_is_started_again(server, backend, lane, module):
    argv = ("worker", f"{module}:pid", "--lane", lane, "--workers", "2", "--health-port", "0")
    with started(server, *argv, "--bind", "127.0.0.1") as process:
        port = int(re.search(r"on port (\d+)", process.stderr.readline())[1])
        pids = pids_of(backend, lane, 2)
        wait_until(lambda: get(port, "/ready") == (200, b"ready\n"))
        os.kill(min(pids), signal.SIGKILL)
        wait_until(lambda: get(port, "/ready") == (503, b"starting\n"))
        wait_until(lambda: get(port, "/ready") == (200, b"ready\n"), 30)
        assert len(set(children(process)) - pids) == 1
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 0
    assert "has ended by SIGKILL; it is started again in 0.5 s" in err


@pytest.mark.long
def test_processes_that_are_idle_end_the_command(server, backend, lane, module):
    eids = [backend.create_execution(lane=lane) for _ in range(20)]
    argv = ("worker", f"{module}:pid", "--lane", lane, "--workers", "2", "--until-idle")
    with started(server, *argv) as process:
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert all(backend.describe(eid).state == "completed" for eid in eids)


@pytest.mark.long
def test_what_no_process_can_import_ends_the_command(server, module):
    with started(server, "worker", f"{module}:nothing", "--workers", "2") as process:
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert f"{module} has no nothing." in err


def test_ports_of_several_processes_may_not_overlap(run, module, monkeypatch):
    monkeypatch.setattr(health, "check_metrics", lambda: None)
    argv = (f"{module}:plain", "--workers", "3", "--metrics-port", "9000", "--health-port", "9002")
    code, err = run(*argv)
    assert code == 2
    assert "one port a process" in err


def test_the_pauses_between_starts_grow(monkeypatch, caplog, server):
    arguments = cli._parser().parse_args(["worker", "a:b", "--workers", "2"])
    parent = processes._Parent(arguments, server.url)
    parent._due.clear()

    class Ended:
        began = time.monotonic()
        replaced = False

    caplog.set_level(logging.WARNING, "ff_fast")
    for _ in range(8):
        parent._ended(0, Ended, -9)
    pauses = [float(each) for each in re.findall(r"again in ([\d.]+) s", caplog.text)]
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
    Ended.began -= 60
    parent._ended(0, Ended, 1)
    assert caplog.text.rstrip().endswith("with code 1; it is started again in 0.5 s")


def test_a_process_that_cannot_be_started_is_tried_again(monkeypatch, caplog, server):
    arguments = cli._parser().parse_args(["worker", "a:b", "--workers", "2"])
    parent = processes._Parent(arguments, server.url)
    parent._due.clear()

    def refused(*_: object):
        raise BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(processes, "_Child", refused)
    parent._start(1)
    assert set(parent._due) == {1}
    assert caplog.messages == [
        "Worker process 1 cannot be started (Resource temporarily unavailable); it is tried again in 0.5 s"
    ]


@pytest.mark.parametrize("code, expected", [(0, 0), (-15, 0), (143, 0), (1, 1), (-9, 1)])
def test_the_exit_code_of_several_processes_that_were_stopped(server, code, expected):
    # SIGTERM ends an interpreter that is still starting.
    arguments = cli._parser().parse_args(["worker", "a:b", "--workers", "2"])
    parent = processes._Parent(arguments, server.url)
    parent._on_signal()
    parent._ended(0, None, code)
    assert parent._code == expected


def test_a_process_may_end_by_a_signal_without_a_name(server, caplog):
    arguments = cli._parser().parse_args(["worker", "a:b", "--workers", "2"])
    parent = processes._Parent(arguments, server.url)
    parent._ended(0, SimpleNamespace(began=0.0, replaced=False), -40)
    assert "has ended by signal 40; it is started again" in caplog.text


@pytest.mark.parametrize("given, drain_s", [([], 7.0), (["--drain-timeout", "3"], 3.0)])
def test_the_drain_of_a_worker_counts_unless_another_one_is_given(server, given, drain_s):
    arguments = cli._parser().parse_args(["worker", "a:b", *given])
    process = work.Process(arguments, server.url)
    app = ff_fast.Worker(drain_timeout=timedelta(seconds=7), until_idle=True)
    options = process._options(app)
    assert options["drain_timeout"] == drain_s
    assert "until_idle" not in options
    assert process._options(ff_fast.Worker())["drain_timeout"] == (3.0 if given else 25.0)


@pytest.mark.long
def test_reload_runs_the_module_as_it_was_changed(server, backend, lane, module, tmp_path):
    pytest.importorskip("watchfiles")
    file = tmp_path / f"{module}.py"
    with started(server, "worker", f"{module}:plain", "--lane", lane, "--reload") as process:

        def answers(text):
            eid = backend.create_execution(lane=lane)
            state(backend, eid, "completed")
            return backend.read_result(eid) == text

        wait_until(lambda: answers(b"plain"), 30)
        file.write_text("this is not Python")
        wait_until(lambda: "waits for a change" in process.stderr.readline(), 30)
        file.write_text(MODULE.replace('return b"plain"', 'return b"changed"'))
        wait_until(lambda: answers(b"changed"), 30)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=30)
    assert process.returncode == 0


# -- server ----------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_development_server_prints_its_url_and_ends_with_the_command(server):
    with started(server, "server", "--unix") as process:
        url = process.stdout.readline().strip()
        with ff_fast.ValkeyBackend.connect(url) as backend:
            # It has a supervisor.
            eid = backend.create_execution(lane="x", deadline=0.01)
            state(backend, eid, "expired")
        assert Path(url.removeprefix("unix://")).exists()
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 0
    wait_until(lambda: not Path(url.removeprefix("unix://")).exists())


@pytest.mark.long
def test_a_development_server_keeps_its_data_where_it_is_told_to(server, tmp_path):
    folder = tmp_path / "data"
    seen = []
    for _ in range(2):
        with started(server, "server", "--dir", str(folder)) as process:
            url = process.stdout.readline().strip()
            assert url.startswith("valkey://127.0.0.1:")
            with ff_fast.ValkeyBackend.connect(url) as backend:
                if not seen:
                    seen.append(backend.create_execution(lane="x"))
                assert backend.describe(seen[0]).state == "waiting"
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=20)
        assert process.returncode == 0


@pytest.mark.long
def test_a_development_server_that_is_killed_ends_the_command(server):
    with started(server, "server") as process:
        url = process.stdout.readline().strip()
        with contextlib.closing(connect_raw(url)) as raw:
            os.kill(raw.info("server")["process_id"], signal.SIGKILL)
        _, err = process.communicate(timeout=20)
    # Its supervisor may have noticed first, and said so.
    assert err.endswith("ff-fast: The server has ended; start it again.\n")
    assert (process.returncode, "Traceback" in err) == (1, False)


@pytest.mark.parametrize(
    "argv",
    [["--port", "6379"], ["--port", "65536"], ["--unix", "--port", "7000"], ["--dir", "/proc/x"]],
)
def test_a_development_server_says_what_it_cannot_do(argv, capfd):
    assert cli.main(["server", *argv]) == 2
    assert re.fullmatch(r"ff-fast: [^\n]+\n", capfd.readouterr().err)
