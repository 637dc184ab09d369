"""Who may connect, and as whom: passwords, refused rights, and TLS. What each user of the guide may do: ``test_rights``."""

import contextlib
import datetime
import errno
import logging
import pickle
import re
import socket
import ssl
import threading
import time

import pytest
import trustme

import ff_fast
from ff_fast import _library, keys
from ff_fast._core import ops
from ff_fast.errors import (
    AuthenticationFailed,
    DeadlineExceeded,
    FFError,
    Outcome,
    PermissionDenied,
    TlsFailed,
    Unavailable,
)

from ..conftest import connect_raw
from .chaos import ChaosProxy
from .rights import ACL, PASSWORD, allow, as_user
from .stored import claimed


@pytest.fixture
def guarded(own_server):
    """The test's own server with the users of ACL, and a client of the administrator."""
    with connect_raw(own_server.url) as raw:
        for name, rules in ACL.items():
            allow(raw, name, rules)
        yield raw


async def test_whoever_may_not_bring_the_library_says_so(shell, own_server, guarded, lane):
    with pytest.raises(PermissionDenied):
        await shell.connect(as_user(own_server, "ff_worker"))
    async with await shell.connect(as_user(own_server, "ff_deploy")):
        pass
    async with await shell.connect(as_user(own_server, "ff_worker")) as worker:
        assert await worker.claim(lane=lane, worker_id="w", worker_instance_id="w-1") is None


def test_the_partition_count_is_stored_once_and_everybody_may_read_it(own_server, guarded):
    version = ops.version()

    def stored(raw):
        reply = raw.fcall_ro(version.function, len(version.keys), *version.keys)
        return version.answer(reply).partitions

    guarded.function_load(_library.source())
    with connect_raw(as_user(own_server, "ff_deploy")) as deploy:
        assert stored(deploy) is None
        for count in (7, 8):
            deploy.execute_command("SET", keys.PARTITIONS_CONFIG, count, "NX", "GET")
    for name in ACL:
        with connect_raw(as_user(own_server, name)) as raw:
            assert stored(raw) == 7


async def test_what_a_user_may_not_do_is_told_at_once(shell, own_server, guarded, lane):
    async with await shell.connect(own_server.url) as backend:
        eid, handle = await claimed(backend, lane)
    async with await shell.connect(as_user(own_server, "ff_reader")) as tailer:
        for call in (
            tailer.create_execution(lane=lane),
            tailer.renew(handle),
            tailer.complete(handle),
            tailer.open_writer(handle),
            tailer.claim(lane=lane, worker_id="w", worker_instance_id="w-1"),
        ):
            with pytest.raises(PermissionDenied) as caught:
                await call
            assert caught.value.outcome is Outcome.NOT_APPLIED
            assert not caught.value.retryable
            assert caught.value.denied == "command"
            assert "The user may not run the command " in str(caught.value)
            assert "ff_reader" not in f"{caught.value} {vars(caught.value)}"
        assert (await tailer.describe(eid)).state == "active"


async def test_rights_taken_amid_a_stream_end_the_writer(shell, own_server, guarded, lane):
    async with await shell.connect(own_server.url) as backend:
        _, handle = await claimed(backend, lane)
    async with await shell.connect(as_user(own_server, "ff_worker")) as worker:
        writer = await worker.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        # A command inside the function: its first write is refused, and what came before it nobody knows.
        guarded.execute_command("ACL", "SETUSER", "ff_worker", "-xadd")
        writer.write(b"2")
        with pytest.raises(PermissionDenied) as caught:
            await writer.flush(5)
        assert [frame.payload for frame in caught.value.unstored] == [b"2"]
        assert (caught.value.denied, caught.value.command) == ("command", "xadd")
        assert re.match(r"lua/append\.lua:\d+$", caught.value.location)


async def test_a_user_that_is_deleted_while_connected(shell, own_server, guarded, lane):
    async with await shell.connect(own_server.url) as backend:
        _, handle = await claimed(backend, lane)
    async with await shell.connect(as_user(own_server, "ff_worker")) as worker:
        writer = await worker.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        guarded.execute_command("ACL", "DELUSER", "ff_worker")
        failures = len(guarded.acl_log())
        writer.write(b"2")
        with pytest.raises(AuthenticationFailed):
            await writer.flush(5)
        with pytest.raises(AuthenticationFailed):
            await worker.renew(handle)
        assert _attempts(guarded) - failures <= 2


def _attempts(raw):
    return sum(entry["count"] for entry in raw.acl_log() if entry["reason"] == "auth")


async def test_a_wrong_password_is_tried_once(shell, own_server, guarded, caplog):
    caplog.set_level(logging.DEBUG)
    guarded.acl_log_reset()
    url = as_user(own_server, "ff_worker", "wrong-canary")
    with pytest.raises(AuthenticationFailed) as caught:
        await shell.connect(url)
    assert _attempts(guarded) == 1
    error = caught.value
    assert error.fault == "refused"
    assert error.unix_path == own_server.url.removeprefix("unix://")
    assert error.__context__ is None
    assert error.__cause__ is None
    for text in (str(error), repr(error), repr(pickle.dumps(error)), caplog.text):
        assert "canary" not in text
        assert "WRONGPASS" not in text


async def test_no_password_where_one_is_wanted(shell, own_server, guarded):
    guarded.config_set("requirepass", PASSWORD)
    with pytest.raises(AuthenticationFailed, match="got none") as caught:
        await shell.connect(own_server.url)
    assert caught.value.fault == "missing"
    url = own_server.url.replace("unix://", f"unix://:{PASSWORD}@", 1)
    async with await shell.connect(url) as backend:
        assert PASSWORD not in repr(backend.wrapped)
        assert PASSWORD not in repr(backend.config)


async def test_a_password_where_none_is_wanted(shell, own_server):
    url = own_server.url.replace("unix://", f"unix://:{PASSWORD}@", 1)
    with pytest.raises(AuthenticationFailed) as caught:
        await shell.connect(url)
    assert caught.value.fault == "not_configured"


async def test_a_database_that_is_not_there(shell, own_server):
    with pytest.raises(ff_fast.errors.InvalidInput, match="database 99"):
        await shell.connect(f"{own_server.url}?db=99")


async def test_too_many_clients(shell, own_server, lane):
    async with await shell.connect(own_server.url) as backend:
        eid = await backend.create_execution(lane=lane)
        with connect_raw(own_server.url) as raw:
            raw.config_set("maxclients", "2")
            with pytest.raises(Unavailable) as caught:
                await shell.connect(own_server.url, retries=1, factor=1)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            assert caught.value.unix_path is not None
            raw.config_set("maxclients", "100")
        assert (await backend.describe(eid)).state == "waiting"


# -- addresses ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def resetting():
    """The address of a server that resets every connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset():
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    client.recv(1)
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                    client.close()

        thread = threading.Thread(target=reset)
        thread.start()
        yield listener.getsockname()
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@pytest.mark.parametrize(
    "url, number, cause, text",
    [
        (
            "valkey://127.0.0.1:1",
            errno.ECONNREFUSED,
            ConnectionRefusedError,
            "127.0.0.1:1 was refused",
        ),
        (
            "valkeys://127.0.0.1:1",
            errno.ECONNREFUSED,
            ConnectionRefusedError,
            "127.0.0.1:1 was refused",
        ),
        ("valkey://no-such-host.invalid", socket.EAI_NONAME, socket.gaierror, "was not found"),
        ("unix:///nowhere/valkey.sock", errno.ENOENT, FileNotFoundError, "no socket at /nowhere"),
    ],
)
async def test_a_server_that_is_not_there(shell, url, number, cause, text):
    with pytest.raises(Unavailable, match=text) as caught:
        await shell.connect(url.replace("://", f"://u:{PASSWORD}@"), retries=0)
    error = caught.value
    assert isinstance(error, ConnectionError)
    assert error.outcome is Outcome.NOT_APPLIED
    assert (error.errno, type(error.__cause__)) == (number, cause)
    assert error.__cause__.errno == number
    assert error.strerror
    if error.unix_path is None:
        assert f"{error.host}:{error.port}" in str(error)
    chain = (
        f"{error!r} {vars(error)} {error.__cause__!r} {error.__context__!r} {pickle.dumps(error)!r}"
    )
    assert PASSWORD not in chain
    assert error.__cause__.__context__ is None


async def test_a_connection_that_is_reset_while_it_is_made(shell, resetting):
    host, port = resetting
    with pytest.raises(Unavailable, match="whether the port uses TLS") as caught:
        await shell.connect(f"valkey://u:{PASSWORD}@{host}:{port}", retries=0)
    assert (caught.value.host, caught.value.port) == resetting
    assert caught.value.errno == errno.ECONNRESET
    assert isinstance(caught.value.__cause__, ConnectionResetError)


async def test_a_server_that_never_answers(shell):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()
        for scheme, hint in (("valkey", ""), ("valkeys", "connect with valkey://")):
            with pytest.raises(DeadlineExceeded, match=f"{port} did not answer .*{hint}") as caught:
                await shell.connect(f"{scheme}://u:p@{host}:{port}", timeout=0.2, retries=0)
            assert isinstance(caught.value, TimeoutError)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            assert (caught.value.host, caught.value.port) == (host, port)


async def test_what_answers_is_no_valkey(shell):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        host, port = listener.getsockname()

        def answer(first):
            client, _ = listener.accept()
            with client:
                client.recv(1)
                client.sendall(first)

        for first, kind, text in (
            (b"HTTP/1.1 400 Bad Request\r\n\r\n", Unavailable, "is not a Valkey server"),
            (b"\x15\x03\x03\x00\x02\x02\x0a", TlsFailed, "speaks TLS; connect with valkeys://"),
        ):
            thread = threading.Thread(target=answer, args=(first,))
            thread.start()
            with pytest.raises(kind, match=text):
                await shell.connect(f"valkey://u:p@{host}:{port}", timeout=5, retries=0)
            thread.join()


# -- TLS -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def terminator(server, certificate, *, client_ca=None):
    """A proxy that speaks TLS to the client and plain to the server."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    certificate.configure_cert(context)
    if client_ca is not None:
        client_ca.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED

    def wrap(client):
        client.settimeout(5)
        wrapped = context.wrap_socket(client, server_side=True)
        wrapped.settimeout(None)
        return wrapped

    return ChaosProxy(server.url, wrap)


def tls_url(proxy, ca_file=None, host="localhost", **files):
    query = {"tls_ca_file": ca_file, **files}
    joined = "&".join(f"{name}={path}" for name, path in query.items() if path)
    return f"valkeys://{host}:{proxy.address[1]}" + (f"?{joined}" if joined else "")


@pytest.mark.standalone("a proxy stands before one server")
async def test_tls_with_a_trusted_authority(shell, server, authority, ca_file, lane):
    with terminator(server, authority.issue_cert("localhost")) as proxy:
        async with await shell.connect(tls_url(proxy, ca_file)) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            for i in range(2_000):
                writer.write(b"%d" % i)
                if i == 1_000:
                    await writer.flush(5)
                    proxy.cut_all()
            await writer.flush(10)
            proxy.chunk = 1
            writer.write(b"slow")
            await writer.close()
            await backend.complete(handle)
            proxy.chunk = 1 << 16
            assert len(await backend.items(eid)) == 2_002


FAULTS = {
    "unknown authority": "unknown_authority",
    "system authorities only": "unknown_authority",
    "wrong host": "wrong_host",
    "expired": "expired",
}
UNTRUSTED = {
    "unknown authority": lambda ca: (trustme.CA().issue_cert("localhost"), True),
    "system authorities only": lambda ca: (ca.issue_cert("localhost"), False),
    "wrong host": lambda ca: (ca.issue_cert("elsewhere.example"), True),
    "expired": lambda ca: (
        ca.issue_cert(
            "localhost",
            not_before=datetime.datetime(2001, 1, 1, tzinfo=datetime.UTC),
            not_after=datetime.datetime(2002, 1, 1, tzinfo=datetime.UTC),
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", UNTRUSTED)
@pytest.mark.standalone("a proxy stands before one server")
async def test_tls_that_cannot_be_trusted_is_refused_once(shell, name, server, authority, ca_file):
    certificate, trusted = UNTRUSTED[name](authority)
    with terminator(server, certificate) as proxy:
        began = time.monotonic()
        with pytest.raises(TlsFailed) as caught:
            await shell.connect(tls_url(proxy, ca_file if trusted else None))
        assert time.monotonic() - began < 4
        assert proxy.accepted == 1
        assert caught.value.outcome is Outcome.NOT_APPLIED
        assert caught.value.__context__ is None
        assert "CERTIFICATE" not in str(caught.value)
        assert caught.value.fault == FAULTS[name]
        assert isinstance(caught.value.__cause__, ssl.SSLCertVerificationError)
        assert (caught.value.host, caught.value.port) == ("localhost", proxy.address[1])


@pytest.mark.standalone("a proxy stands before one server")
async def test_tls_with_a_client_certificate(shell, server, authority, ca_file, tmp_path, lane):
    mine = authority.issue_cert("worker@example.com")
    pem = tmp_path / "mine.pem"
    mine.private_key_and_cert_chain_pem.write_to_path(pem)
    with terminator(server, authority.issue_cert("localhost"), client_ca=authority) as proxy:
        url = tls_url(proxy, ca_file, tls_cert_file=pem, tls_key_file=pem)
        async with await shell.connect(url) as backend:
            await claimed(backend, lane)
        with pytest.raises(FFError) as caught:
            await shell.connect(tls_url(proxy, ca_file), retries=1, factor=1)
        # Under TLS 1.3 the refusal arrives with the first read, or as a reset.
        assert isinstance(caught.value, TlsFailed | Unavailable)


@pytest.mark.standalone("a proxy stands before one server")
async def test_tls_files_that_are_not_there(shell, server, authority):
    with terminator(server, authority.issue_cert("localhost")) as proxy:
        for path in ("/nowhere/ca.pem", "/etc/passwd"):
            with pytest.raises(TlsFailed) as caught:
                await shell.connect(tls_url(proxy, path))
            assert caught.value.fault == "files"
        assert proxy.accepted <= 2


async def test_tls_to_a_server_without_it(shell, proxy):
    with pytest.raises((TlsFailed, DeadlineExceeded, Unavailable)):
        await shell.connect(tls_url(proxy), timeout=0.5, retries=0)


@pytest.mark.standalone("a proxy stands before one server")
async def test_plain_to_a_server_with_tls(shell, server, authority):
    with terminator(server, authority.issue_cert("localhost")) as proxy:
        with pytest.raises(FFError) as caught:
            await shell.connect(proxy.url, timeout=0.5, retries=1, factor=1)
        assert caught.value.outcome is Outcome.NOT_APPLIED


@pytest.mark.standalone("a proxy stands before one server")
def test_the_terminator_itself(server, authority):
    with terminator(server, authority.issue_cert("localhost")) as proxy:
        context = ssl.create_default_context()
        authority.configure_trust(context)
        with (
            socket.create_connection(proxy.address) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as client,
        ):
            client.sendall(b"PING\r\n")
            assert client.recv(16) == b"+PONG\r\n"
