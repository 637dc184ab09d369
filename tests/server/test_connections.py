"""Connecting: every kind of address, what a connection costs, and backends that are closed."""

import asyncio

import pytest

import ff_fast
from ff_fast import Outcome, aio, errors, keys
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import InvalidInput, InvalidType, Unavailable, WriterClosed

from ..conftest import connect_raw
from ..shells import KINDS, Opener


@pytest.fixture(params=KINDS)
def connect(request):
    opener = Opener(request.param)
    yield opener
    opener.close()


@pytest.fixture(scope="module")
def tcp_server():
    with EmbeddedServer(tcp=True) as running:
        yield running


@pytest.fixture
def own_server():
    with EmbeddedServer() as running:
        yield running


def claimed(backend, lane):
    eid = backend.create_execution(lane=lane)
    return eid, backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")


@pytest.mark.standalone("its URL is made of one address")
def test_a_url_of_every_scheme(connect, server, tcp_server, lane):
    port = tcp_server.url.rpartition(":")[2]
    for url in (
        server.url,
        f"{server.url}?db=1",
        f"valkey://127.0.0.1:{port}",
        f"redis://localhost:{port}/2",
        f"valkey://127.0.0.1:{port}?timeout=2.5",
    ):
        eid, _ = claimed(connect(url), lane)
        assert eid


def test_a_configuration(connect, server, lane):
    assert claimed(connect(ff_fast.BackendConfig.from_url(server.url)), lane)


@pytest.mark.parametrize("target", ["http://x", "valkey://", 7, None, b"valkey://x"])
@pytest.mark.parametrize("backend", [ff_fast.ValkeyBackend, aio.ValkeyBackend])
def test_what_is_no_address(backend, target):
    with pytest.raises((InvalidInput, InvalidType)):
        backend.connect(target)


@pytest.mark.standalone("each node has connections of its own")
def test_calls_and_writers_share_few_connections(connect, server, lane):
    """The blocking shell has one for calls and one for writers; the asyncio shell one for both."""
    with connect_raw(server.url) as raw:
        raw.ping()
        before = len(raw.client_list())
        backend = connect(server.url)
        for _ in range(5):
            eid, handle = claimed(backend, lane)
            with backend.open_writer(handle) as writer:
                writer.write(b"1")
            backend.complete(handle)
            backend.read_stream(eid)
        assert len(raw.client_list()) - before == (2 if connect.kind == "sync" else 1)


def test_a_connection_says_who_it_is_and_asks_for_the_library_alone(connect, own_monitor, lane):
    """No HELLO, no PING: it says its name, and asks for the version of the library and the partition count."""
    connect(own_monitor.url)
    own_monitor.forget()
    connect(own_monitor.url)
    # The function asks for the count.
    assert sorted(own_monitor.commands()) == [
        "client|setinfo",
        "client|setname",
        "fcall_ro",
        "get",
        "info",
    ]


class Monitored:
    """A server that tells which commands it was sent."""

    def __init__(self, server):
        self._server = server
        self.url = server.url
        with connect_raw(server.url) as raw:
            raw.function_load(ff_fast._library.source(), replace=True)
        self.forget()

    def forget(self):
        with connect_raw(self.url, driver_info=None) as raw:
            raw.config_resetstat()

    def commands(self):
        """Names of the commands, but for the own ones."""
        with connect_raw(self.url, driver_info=None) as raw:
            stats = raw.info("commandstats")
        return sorted({name.removeprefix("cmdstat_") for name in stats} - {"config|resetstat"})


@pytest.fixture
def own_monitor():
    with EmbeddedServer() as running:
        yield Monitored(running)


def test_a_closed_backend_says_so(connect, server, lane):
    backend = connect(server.url)
    eid, handle = claimed(backend, lane)
    writer = backend.open_writer(handle)
    writer.write(b"not flushed")
    backend.close()
    backend.close()
    for call in (
        lambda: backend.describe(eid),
        lambda: backend.renew(handle),
        lambda: backend.open_writer(handle),
        lambda: claimed(backend, lane),
        lambda: backend.read_stream(eid),
    ):
        with pytest.raises(Unavailable, match="closed"):
            call()
    for call in (lambda: writer.write(b"x"), writer.drain):
        with pytest.raises(WriterClosed):
            call()
    writer.close()
    # A writer that had no connection yet is given one.
    assert writer.last_sequence == 1


async def use(url, lane):
    async with await aio.ValkeyBackend.connect(url) as backend:
        eid = await backend.create_execution(lane=lane)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        async with await backend.open_writer(handle) as writer:
            writer.write(b"1")
        return await backend.read_stream(eid)


def test_awaited_objects_can_be_entered_too(server, lane):
    assert len(asyncio.run(use(server.url, lane))) == 1


def test_embedded_backends_take_their_server_with_them():
    with ff_fast.ValkeyBackend.embedded() as backend:
        running = backend._server
        assert running.running
    assert not running.running

    async def embedded():
        async with aio.ValkeyBackend.embedded() as backend:
            return backend._server

    assert not asyncio.run(embedded()).running


@pytest.fixture
def cluster_node():
    """A node of a cluster that has no other, and some of the slots."""
    with EmbeddedServer(cluster_enabled=True) as running:
        with connect_raw(running.url) as raw:
            raw.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 8000)
        yield running


def test_a_node_of_a_cluster_is_refused_in_one_sentence(connect, cluster_node):
    with pytest.raises(errors.ClusterModeRequired, match="cluster=true") as caught:
        connect(cluster_node.url)
    assert caught.value.outcome is Outcome.NOT_APPLIED


# -- the deployment ------------------------------------------------------------------------------------


def test_the_first_backend_stores_the_partition_count_and_others_take_it(connect, own_server):
    first = connect(f"{own_server.url}?partitions=7")
    later = connect(own_server.url)
    for backend in (first, later):
        indexes = {keys.partition_index(backend.create_execution()) for _ in range(60)}
        assert indexes <= set(range(7))
    with connect_raw(own_server.url) as raw:
        assert raw.get(keys.PARTITIONS_CONFIG) == b"7"


def test_another_partition_count_is_refused(connect, own_server):
    connect(own_server.url)
    connect(f"{own_server.url}?partitions=256")
    with pytest.raises(errors.DeploymentMismatch, match="partitions=256") as caught:
        connect(f"{own_server.url}?partitions=64")
    assert (caught.value.server, caught.value.client) == (256, 64)


def test_a_count_that_changes_is_noticed_by_the_next_connection(connect, own_server):
    backend = connect(own_server.url)
    with connect_raw(own_server.url) as raw:
        raw.set(keys.PARTITIONS_CONFIG, 64)
        raw.client_kill_filter(_type="normal", skipme=True)
    with pytest.raises(errors.DeploymentMismatch):
        backend.create_execution()
