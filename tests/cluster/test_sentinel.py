"""A primary under sentinels: it is found, checked, and found again after a failover."""

import asyncio
import contextlib
import socket
import ssl
import threading
import time

import pytest
import trustme

from ff_fast import StreamFrame
from ff_fast._aio import sentinel as of_asyncio
from ff_fast._sync import sentinel as of_sync
from ff_fast.errors import (
    AuthenticationFailed,
    NotPrimary,
    Outcome,
    PrimaryNotFound,
    TlsFailed,
    Unavailable,
)
from ff_fast.types import BackendConfig, ClaimPolicy

from ..conftest import connect_raw
from ..faults.chaos import ChaosProxy
from ..faults.stored import claimed, stored_once
from ..shells import KINDS, Shell
from ..waiting import wait_until, wait_until_async
from . import sites

WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}


@pytest.fixture(scope="module")
def site():
    """A primary with a replica and three sentinels; tests leave the primary where it is."""
    with sites.SentinelSite() as running:
        yield running


class FakeSentinel:
    """A sentinel that answers every question with *answer*; None never answers."""

    def __init__(self, answer):
        self._answer = answer
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        self.asked = 0
        self._clients = []
        self._thread = threading.Thread(target=self._serve, name="chaos sentinel", daemon=True)
        self._thread.start()

    @property
    def url(self):
        """As far as a proxy needs it."""
        return f"valkey://127.0.0.1:{self.port}"

    def _serve(self):
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                self._clients.append(client)
                threading.Thread(
                    target=self._talk, args=(client,), name="chaos sentinel", daemon=True
                ).start()

    def _talk(self, client):
        with contextlib.suppress(OSError):
            while client.recv(4096):
                self.asked += 1
                if self._answer is not None:
                    client.sendall(self._answer)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for each in (self._listener, *self._clients):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._thread.join()


def names(port, host="127.0.0.1"):
    """The answer that names an address."""
    return b"*2\r\n$%d\r\n%s\r\n$%d\r\n%d\r\n" % (len(host), host.encode(), len(str(port)), port)


def before(port, url):
    """The URL with another sentinel in front."""
    return url.replace("://", f"://127.0.0.1:{port},", 1)


# -- failover -------------------------------------------------------------------------------------------------------------


async def through_a_failover(site, lane, failover, *, writing):
    """A stream, a reader and a waiting claim of each shell, before, during and after a failover: nothing is lost.

    With *writing* frames are written during the failover, too.
    """
    begun, over = asyncio.Barrier(len(KINDS) + 1), asyncio.Event()

    async def use(kind):
        mine, others = f"{lane}-{kind}", f"{lane}-{kind}-2"
        async with await Shell(kind).connect(site.url) as backend:
            eid, handle = await claimed(backend, mine)
            reading = asyncio.create_task(backend.items(eid))
            policy = ClaimPolicy.with_max_wait(20)
            waiting = asyncio.create_task(backend.claim(lane=others, policy=policy, **WORKER))
            writer = await backend.open_writer(handle)
            payloads = [b"%d" % i for i in range(100)]
            for payload in payloads:
                writer.write(payload)
            await writer.flush(5)
            await begun.wait()
            while writing and not over.is_set():
                payloads.append(b"%d" % len(payloads))
                writer.write(payloads[-1])
                await asyncio.sleep(0.002)
            await over.wait()
            for i in range(100):
                payloads.append(b"later %d" % i)
                writer.write(payloads[-1])
            await writer.close(10)
            await backend.complete(handle)
            items = await asyncio.wait_for(reading, 10)
            assert [each.payload for each in items if isinstance(each, StreamFrame)] == payloads
            assert items[-1].reason == "attempt_success"
            other = await backend.create_execution(lane=others)
            handle = await asyncio.wait_for(waiting, 15)
            assert handle.execution_id == other
            await backend.complete(handle)
        # On the server that is the primary now, not on the one that was.
        await asyncio.to_thread(stored_once, site.primary.url, eid, payloads)

    async def break_it():
        await begun.wait()
        await asyncio.to_thread(wait_until, site.replicated)
        await asyncio.to_thread(failover)
        over.set()

    async with asyncio.TaskGroup() as group:
        for kind in KINDS:
            group.create_task(use(kind))
        group.create_task(break_it())


async def test_a_planned_failover_amid_streams_and_waiting_claims(sentinels, lane):
    await through_a_failover(sentinels, lane, sentinels.failover, writing=True)


@pytest.mark.long
async def test_a_killed_primary_amid_streams_and_waiting_claims(sentinels, lane):
    def kill():
        sentinels.wait_for_another(sentinels.kill())

    # What the replica lacks of an acknowledged stream is lost; here it has everything.
    await through_a_failover(sentinels, lane, kill, writing=False)


# -- sentinels ------------------------------------------------------------------------------------------------------------

USELESS = {
    "names the replica": lambda site: names(sites.port_of(other(site).url)),
    "names a server that is down": lambda _: names(closed_port()),
    "does not know the service": lambda _: b"*-1\r\n",
    "loads": lambda _: b"-LOADING\r\n",
    "names nothing of use": lambda _: b"*2\r\n$3\r\na b\r\n$1\r\nx\r\n",
    "is slow": lambda _: None,
    "answers no RESP": lambda _: b"HTTP/1.1 400 Bad Request\r\n",
}

MISLED = {"names the replica": NotPrimary, "names a server that is down": Unavailable}


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def other(site):
    return next(each for each in site.servers if each is not site.primary)


@pytest.mark.long
@pytest.mark.parametrize("fault", USELESS)
async def test_a_sentinel_that_is_of_no_use_is_passed_over(shell, site, lane, fault):
    with FakeSentinel(USELESS[fault](site)) as fake:
        began = time.monotonic()
        url = before(fake.port, site.url)
        if misled := MISLED.get(fault):
            # The next try asks another one first; a backend that runs does so by itself.
            with pytest.raises(misled) as caught:
                await shell.connect(url, timeout=1.0)
            assert caught.value.outcome is Outcome.NOT_APPLIED
        async with await shell.connect(url, timeout=1.0) as backend:
            await claimed(backend, lane)
        assert fake.asked
        assert time.monotonic() - began < 5.0


async def test_a_sentinel_that_is_down_is_passed_over(shell, site, lane):
    async with await shell.connect(before(closed_port(), site.url)) as backend:
        await claimed(backend, lane)


async def test_the_sentinels_and_the_service_are_named_where_there_is_no_primary(shell, site):
    sentinels = site.url.split("/")[2].split(",")
    with pytest.raises(PrimaryNotFound, match=r"of the service other.*that answered") as caught:
        await shell.connect(site.url.rsplit("/", 1)[0] + "/other")
    error = caught.value
    assert error.service == "other"
    assert sorted(error.sentinels) == sorted(sentinels)
    assert all(each in str(error) for each in sentinels)
    assert error.outcome is Outcome.NOT_APPLIED
    assert error.retryable
    with FakeSentinel(None) as one, FakeSentinel(None) as two:
        began = time.monotonic()
        with pytest.raises(PrimaryNotFound, match="no sentinel answered"):
            await shell.connect(
                f"valkey+sentinel://127.0.0.1:{one.port},127.0.0.1:{two.port}/s", timeout=0.4
            )
        assert time.monotonic() - began < 3.0
        assert one.asked
        assert two.asked


async def test_sentinels_have_credentials_of_their_own(shell, site, lane):
    with contextlib.ExitStack() as stack:
        for server in site.sentinels.servers:
            raw = stack.enter_context(connect_raw(server.url))
            raw.execute_command("ACL", "SETUSER", "watcher", "on", ">canary", "+@all")
            raw.execute_command("ACL", "SETUSER", "default", "off")
            stack.callback(raw.execute_command, "ACL", "SETUSER", "default", "on")
        with pytest.raises(AuthenticationFailed, match="A sentinel of the service") as caught:
            await shell.connect(f"{site.url}?sentinel_username=watcher&sentinel_password=wrong")
        assert "wrong" not in str(caught.value)
        with pytest.raises(AuthenticationFailed, match="sentinel_password"):
            await shell.connect(site.url)
        url = f"{site.url}?sentinel_username=watcher&sentinel_password=canary"
        async with await shell.connect(url) as backend:
            await claimed(backend, lane)
            assert "canary" not in repr(backend.wrapped)


async def test_tls_leads_to_the_sentinels_and_to_the_server(shell, site, lane, tmp_path):
    authority = trustme.CA()
    ca_file = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(ca_file)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(context)

    def wrap(client):
        client.settimeout(5)
        wrapped = context.wrap_socket(client, server_side=True)
        wrapped.settimeout(None)
        return wrapped

    with (
        ChaosProxy(site.primary.url, wrap) as server,
        FakeSentinel(names(server.address[1], "localhost")) as fake,
        ChaosProxy(fake.url, wrap) as front,
    ):
        url = f"valkeys+sentinel://localhost:{front.address[1]}/s"
        async with await shell.connect(f"{url}?tls_ca_file={ca_file}") as backend:
            await claimed(backend, lane)
        with pytest.raises(TlsFailed) as caught:
            await shell.connect(url)
        assert caught.value.fault == "unknown_authority"


async def test_the_replicas_are_those_that_the_sentinels_name(shell, site):
    config = BackendConfig.from_url(site.url)
    if shell.kind == "asyncio":
        found = await of_asyncio.replicas(config)
    else:
        found = await asyncio.to_thread(of_sync.replicas, config)
    (replica,) = (each.connection for each in found)
    assert (replica.host, replica.port) == ("127.0.0.1", sites.port_of(other(site).url))
    assert replica.sentinel_service is None


async def test_reads_go_to_a_replica_where_the_caller_says_so(shell, site, lane):
    with connect_raw(site.primary.url) as primary, connect_raw(other(site).url) as replica:
        primary.ping()
        async with await shell.connect(f"{site.url}?read_from=replica") as backend:
            eid, handle = await claimed(backend, lane)
            await asyncio.to_thread(wait_until, site.replicated)
            replica.config_resetstat()

            async def read_there():
                assert (await backend.describe(eid)).state == "active"
                return "fcall_ro" in " ".join(replica.info("commandstats"))

            # After a failure the primary answers for a moment.
            await wait_until_async(read_there)
            # Nothing is written there, and the primary answers where the replica does not.
            await backend.complete(handle)
            replica.execute_command("CLIENT", "PAUSE", 1, "WRITE")
            replica.client_kill_filter(_type="normal", skipme=True)
            replica.config_set("maxclients", 1)
            assert (await backend.describe(eid)).state == "completed"
            replica.config_set("maxclients", 10_000)
