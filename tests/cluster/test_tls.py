"""TLS to a cluster: a terminator stands in front of each node, and the nodes tell clients its port."""

import asyncio
import contextlib

import pytest
import trustme

from ff_fast.errors import FFError, TlsFailed, Unavailable

from ..faults.test_access import terminator
from ..shells import WORKER
from ..waiting import wait_until
from .test_calls import execution_at

pytestmark = pytest.mark.long


class Terminated:
    """A cluster that clients reach over TLS alone.

    Attributes:
        proxies: The terminator of each node.
    """

    def __init__(self, cluster, certificate, **options):
        self._cluster = cluster
        with contextlib.ExitStack() as stack:
            self.proxies = [
                stack.enter_context(terminator(node, certificate, **options))
                for node in cluster.nodes
            ]
            stack.callback(self._announce, [0] * len(cluster.nodes))
            self._announce([proxy.address[1] for proxy in self.proxies])
            self._stack = stack.pop_all()

    def _announce(self, ports):
        nodes = self._cluster.nodes
        for node, port in zip(nodes, ports, strict=True):
            node.command("CONFIG", "SET", "cluster-announce-port", port)
        wanted = {port or node.address[1] for node, port in zip(nodes, ports, strict=True)}
        wait_until(lambda: all(_told(node) == wanted for node in nodes))

    def url(self, host="127.0.0.1", **files):
        query = "".join(f"&{name}={path}" for name, path in files.items())
        return f"valkeys://{host}:{self.proxies[0].address[1]}/?cluster=true{query}"

    def close(self):
        self._stack.close()


def _told(node):
    return {port for _, _, (_, port, *_), *_ in node.command("CLUSTER", "SLOTS")}


@pytest.fixture(scope="module")
def authority():
    return trustme.CA()


@pytest.fixture(scope="module")
def ca_file(authority, tmp_path_factory):
    path = tmp_path_factory.mktemp("tls") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


@pytest.fixture
def terminated(cluster, authority):
    with contextlib.closing(Terminated(cluster, authority.issue_cert("127.0.0.1"))) as running:
        yield running


async def test_calls_writers_tails_and_completions_go_over_tls_to_every_node(
    shell, cluster, terminated, ca_file, lane
):
    for proxy in terminated.proxies:
        proxy.passed = 0
    async with await shell.connect(terminated.url(tls_ca_file=ca_file)) as backend:
        subscription = await backend.subscribe_completions()
        subscription = getattr(subscription, "wrapped", subscription)
        await _batch(shell, subscription, 0.1)
        eids = [await execution_at(backend, cluster, node, lane) for node in cluster.primaries]
        handles = [await backend.claim(lane=lane, **WORKER) for _ in eids]
        writers = [await backend.open_writer(handle) for handle in handles]
        for i in range(300):
            for writer in writers:
                writer.write(b"%d" % i)
        await writers[0].flush(5)
        # What is kept is stored again over new connections.
        for proxy in terminated.proxies:
            proxy.cut_all()
        for writer in writers:
            writer.write(b"last")
            await writer.close()
        reads = [asyncio.ensure_future(backend.items(eid)) for eid in eids]
        for handle in handles:
            await backend.complete(handle, b"r")
        for items in await asyncio.gather(*reads):
            payloads = [item.payload for item in items if hasattr(item, "payload")]
            assert payloads == [b"%d" % i for i in range(300)] + [b"last"]
        assert {await backend.read_result(eid) for eid in eids} == {b"r"}
        told = []
        while len(told) < 3:
            told += of_ours(await _batch(shell, subscription, 5), eids)
        assert sorted(told) == sorted(eids)
    assert all(proxy.passed > 1_000 for proxy in terminated.proxies)


def of_ours(batch, eids):
    return [each.execution_id for each in batch if each.execution_id in eids]


async def _batch(shell, reader, seconds):
    if shell.kind == "asyncio":
        return await reader.next_batch(seconds)
    return await asyncio.to_thread(reader.next_batch, seconds)


async def test_nodes_are_verified_by_the_names_that_they_announce(
    shell, cluster, authority, ca_file, lane
):
    for node in cluster.nodes:
        node.command("CONFIG", "SET", "cluster-announce-hostname", "localhost")
        node.command("CONFIG", "SET", "cluster-preferred-endpoint-type", "hostname")
    try:
        with contextlib.closing(Terminated(cluster, authority.issue_cert("localhost"))) as running:
            wait_until(lambda: all(_hosts(node) == {b"localhost"} for node in cluster.nodes))
            url = running.url("localhost", tls_ca_file=ca_file)
            async with await shell.connect(url) as backend:
                for node in cluster.primaries:
                    await backend.cancel(await execution_at(backend, cluster, node, lane))
    finally:
        for node in cluster.nodes:
            node.command("CONFIG", "SET", "cluster-announce-hostname", "")
            node.command("CONFIG", "SET", "cluster-preferred-endpoint-type", "ip")


def _hosts(node):
    return {host for _, _, (host, *_), *_ in node.command("CLUSTER", "SLOTS")}


async def test_a_cluster_that_cannot_be_trusted_is_refused_at_once(
    shell, cluster, terminated, tmp_path, ca_file
):
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    for url, fault in (
        (terminated.url(tls_ca_file=other), "unknown_authority"),
        (terminated.url(), "unknown_authority"),
        (terminated.url("localhost", tls_ca_file=ca_file), "wrong_host"),
    ):
        with pytest.raises(TlsFailed) as caught:
            await asyncio.wait_for(shell.connect(url), 5)
        assert caught.value.fault == fault
        assert caught.value.port == terminated.proxies[0].address[1]


async def test_one_node_that_cannot_be_trusted_is_named(shell, cluster, terminated, ca_file):
    """The seed is what it should be; another node has the certificate of somebody else."""
    node, proxy = cluster.nodes[2], terminated.proxies[2]
    with terminator(node, trustme.CA().issue_cert("127.0.0.1")) as false:
        port = false.address[1]
        node.command("CONFIG", "SET", "cluster-announce-port", port)
        try:
            wait_until(lambda: all(port in _told(each) for each in cluster.nodes))
            with pytest.raises(TlsFailed) as caught:
                await asyncio.wait_for(shell.connect(terminated.url(tls_ca_file=ca_file)), 5)
        finally:
            node.command("CONFIG", "SET", "cluster-announce-port", proxy.address[1])
            wait_until(lambda: all(port not in _told(each) for each in cluster.nodes))
        assert (caught.value.fault, caught.value.port) == ("unknown_authority", port)


async def test_a_cluster_that_wants_a_client_certificate(
    shell, cluster, authority, ca_file, tmp_path, lane
):
    mine = authority.issue_cert("worker@example.com")
    pem = tmp_path / "mine.pem"
    mine.private_key_and_cert_chain_pem.write_to_path(pem)
    certificate = authority.issue_cert("127.0.0.1")
    with contextlib.closing(Terminated(cluster, certificate, client_ca=authority)) as running:
        url = running.url(tls_ca_file=ca_file, tls_cert_file=pem, tls_key_file=pem)
        async with await shell.connect(url) as backend:
            for node in cluster.primaries:
                await backend.cancel(await execution_at(backend, cluster, node, lane))
        with pytest.raises(FFError) as caught:
            await asyncio.wait_for(shell.connect(running.url(tls_ca_file=ca_file)), 5)
        # Under TLS 1.3 the refusal arrives with the first read, or as a reset.
        assert isinstance(caught.value, TlsFailed | Unavailable)


async def test_a_cluster_that_speaks_no_tls(shell, cluster):
    """A server without TLS waits for the rest of what it takes for a command."""
    host, port = cluster.nodes[0].address
    with pytest.raises(Unavailable, match="connect with valkey://") as caught:
        await asyncio.wait_for(shell.connect(f"valkeys://{host}:{port}/?cluster=true"), 5)
    assert caught.value.port == port
