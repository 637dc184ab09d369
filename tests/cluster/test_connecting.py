"""Connecting takes its time: a cluster that is still being formed, and nodes that do not answer while a caller waits."""

import asyncio
import contextlib
import threading
import time

import pytest

from ff_fast import keys
from ff_fast.embedded import EmbeddedNode, EmbeddedServer
from ff_fast.errors import FFError, NotEnoughReplicas, NotPrimary, Outcome, Unavailable

from ..conftest import PROMPT, connect_raw
from ..faults.chaos import DOWN, UP
from ..shells import WORKER, config
from .test_calls import execution_at
from .test_faults import proxied, proxied_cluster, slot_of, spread  # noqa: F401

HALF = keys.SLOTS // 2


class Forming:
    """Two nodes of which nobody has made a cluster yet."""

    def __init__(self):
        with contextlib.ExitStack() as stack:
            self.nodes = [
                stack.enter_context(EmbeddedNode(cluster_enabled=True, **PROMPT)) for _ in range(2)
            ]
            self.close = stack.pop_all().close
        hosts = ",".join(f"{host}:{port}" for host, port in (node.address for node in self.nodes))
        self.url = f"valkey://{hosts}/?cluster=true"

    def give_slots(self, index):
        first = HALF * index
        self.nodes[index].command("CLUSTER", "ADDSLOTSRANGE", first, first + HALF - 1)

    def form(self):
        for epoch, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", epoch + 1)
        self.nodes[1].command("CLUSTER", "MEET", *self.nodes[0].bus_address)
        for index in range(2):
            self.give_slots(index)


@pytest.fixture
def forming():
    with contextlib.closing(Forming()) as running:
        yield running


@pytest.mark.long
async def test_connect_waits_for_a_cluster_that_is_being_formed(shell, forming, lane):
    connecting = asyncio.ensure_future(shell.connect(forming.url))
    await asyncio.wait({connecting}, timeout=0.5)
    assert not connecting.done()
    await asyncio.to_thread(forming.form)
    async with await connecting as backend:
        await backend.cancel(await backend.create_execution(lane=lane))


@pytest.mark.long
async def test_connect_to_nodes_without_slots_says_what_is_missing(shell, forming):
    for retries in (0, 2):
        with pytest.raises(Unavailable, match="still being formed") as caught:
            await shell.connect(forming.url, retries=retries, factor=1)
        assert caught.value.retryable
        assert caught.value.outcome is Outcome.NOT_APPLIED
        assert str(forming.nodes[1].address[1]) in str(caught.value)


@pytest.mark.long
async def test_connect_to_a_cluster_that_lacks_slots_says_that_it_is_down(shell, forming):
    forming.give_slots(0)
    with pytest.raises(Unavailable, match="check CLUSTER INFO") as caught:
        await shell.connect(forming.url, retries=2, factor=1)
    assert caught.value.port == forming.nodes[0].address[1]


# -- a deadline that ends while a connection is being made -----------------------------------------------------------

TIMEOUT_S = 5.0
LEASE_MS = 600


@pytest.mark.long
async def test_a_lease_is_lost_in_time_while_its_node_takes_connections_and_is_silent(
    shell,
    proxied,  # noqa: F811
    lane,
):
    """The request timeout is far longer than the lease."""
    async with await shell.connect(proxied.url, timeout=TIMEOUT_S) as backend:
        slots = proxied.slots()
        while True:
            await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, lease_ttl_ms=LEASE_MS, **WORKER)
            if slot_of(handle.execution_id) in slots:
                break
            await backend.cancel(handle.execution_id)
        proxied.proxy.hold(UP, DOWN)
        proxied.proxy.cut_all()
        began = time.monotonic()
        keeper = await backend.keep_lease(handle)
        if shell.kind == "sync":
            # Over once the thread has ended, and not only once the lease has lapsed.
            await asyncio.to_thread(keeper._over.wait, TIMEOUT_S)
            assert keeper._over.is_set()
        else:
            await keeper.wait_lost(TIMEOUT_S)
        assert not keeper.held
        assert time.monotonic() - began < TIMEOUT_S / 2
        proxied.proxy.release()
        stopped = keeper.stop()
        if stopped is not None:
            await stopped
        # Nobody is to find a lease that has lapsed.
        await backend.cancel(handle.execution_id)


@pytest.mark.long
async def test_a_read_ends_in_time_while_its_node_takes_connections_and_is_silent(
    shell,
    proxied,  # noqa: F811
    lane,
):
    """It loses nothing: once the node answers, the read after it goes on."""
    async with await shell.connect(proxied.url, timeout=TIMEOUT_S) as backend:
        (eid, *_), _ = await spread(backend, lane, proxied.slots())
        proxied.proxy.hold(UP, DOWN)
        proxied.proxy.cut_all()
        reader = backend.wrapped.follow(eid)
        for _ in range(3):
            began = time.monotonic()
            assert await _batch(shell, reader, 0.3) == []
            assert time.monotonic() - began < TIMEOUT_S / 2
        assert sum(thread.name == "ff_fast connect" for thread in threading.enumerate()) <= 1
        proxied.proxy.release()
        await backend.cancel(eid)
        items = []
        deadline = time.monotonic() + 10
        while not reader.ended and time.monotonic() < deadline:
            items += await _batch(shell, reader, 1)
        assert reader.ended
        assert items


async def _batch(shell, reader, seconds):
    if shell.kind == "asyncio":
        return await reader.next_batch(seconds)
    return await asyncio.to_thread(reader.next_batch, seconds)


# -- who has refused -------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_server_that_refuses_to_write_is_named(shell, lane):
    with EmbeddedServer(tcp=True, **PROMPT) as server, connect_raw(server.url) as raw:
        port = int(server.url.rpartition(":")[2].partition("/")[0])
        limits = config(server.url, retries=1, factor=1)
        async with await shell.connect(limits) as backend:
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, **WORKER)
            raw.config_set("min-replicas-to-write", 1)
            for refused in (backend.cancel(eid), backend.open_writer(handle)):
                with pytest.raises(NotEnoughReplicas) as caught:
                    await refused
                _is_named(caught.value, port)
                assert "min-replicas-to-write" in str(caught.value)
            raw.config_set("min-replicas-to-write", 0)
            writer = await backend.open_writer(handle)
            raw.replicaof("127.0.0.1", 1)
            for refused in (backend.cancel(eid), _written(writer)):
                with pytest.raises(NotPrimary) as caught:
                    await refused
                _is_named(caught.value, port)


async def _written(writer):
    writer.write(b"1")
    await writer.flush(5)


def _is_named(error: FFError, port):
    assert (error.host, error.port) == ("127.0.0.1", port)
    assert str(error).count(f"127.0.0.1:{port}") == 1


async def test_a_node_that_refuses_to_write_is_named(shell, cluster, lane):
    async with await shell.connect(config(cluster.url, retries=1, factor=1)) as backend:
        # Another one may have a proxy in front.
        node = cluster.nodes[0]
        eid = await execution_at(backend, cluster, node, lane)
        node.command("CONFIG", "SET", "min-replicas-to-write", 1)
        try:
            with pytest.raises(NotEnoughReplicas) as caught:
                await backend.cancel(eid)
        finally:
            node.command("CONFIG", "SET", "min-replicas-to-write", 0)
        _is_named(caught.value, node.address[1])
        await backend.cancel(eid)
