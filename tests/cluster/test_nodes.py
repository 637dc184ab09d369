"""Nodes that die, fall silent, come back, are promoted, or have no library: what calls on a cluster make of it."""

import asyncio
import contextlib
import os
import signal
import socket
import time

import pytest

from ff_fast import aio, errors, keys
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import Outcome
from ff_fast.types import BackendConfig, BackendTimeouts, ClaimPolicy

from ..shells import WORKER, Shell
from ..waiting import wait_until_async
from .sites import port_of
from .test_calls import WAITS, claimed_at, create_many, execution_at, few_retries, slot_of, working


def fast(url, **options):
    """A configuration that notices silence soon."""
    return BackendConfig.from_url(url).replace(timeouts=BackendTimeouts(0.5), **options)


def others(cluster, node):
    return [each for each in cluster.primaries if each is not node]


@contextlib.contextmanager
def stopped(node):
    """The node's process stands still: it answers nothing, and closes nothing."""
    os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(node.pid, signal.SIGCONT)


# -- the library -----------------------------------------------------------------------------------------------------


async def test_a_node_without_the_library_gets_it_from_the_call_that_needs_it(shell, cluster, lane):
    async with await shell.connect(cluster.url) as backend:
        for node in cluster.primaries:
            eid = await execution_at(backend, cluster, node, lane)
            node.command("FUNCTION", "FLUSH", "SYNC")
            assert (await backend.describe(eid)).state == "waiting"
            assert node.command("FUNCTION", "LIST")
            await backend.cancel(eid)


async def test_slots_that_move_to_a_node_without_the_library(shell, cluster, lane):
    home, to = cluster.nodes[:2]
    async with await shell.connect(cluster.url) as backend:
        eid, handle = await claimed_at(backend, cluster, home, lane)
        slot = slot_of(eid)
        to.command("FUNCTION", "FLUSH", "SYNC")
        await asyncio.to_thread(cluster.migrate, [slot], to)
        try:
            await backend.complete(handle, b"r")
            assert await backend.read_result(eid) == b"r"
        finally:
            await asyncio.to_thread(cluster.migrate, [slot], home)


async def test_seeds_that_are_of_no_use_are_passed_over(shell, cluster, lane):
    """Nobody listens at the first, and the second is no node of a cluster."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        down = f"127.0.0.1:{listener.getsockname()[1]}"
    with EmbeddedServer(tcp=True) as server:
        host, port = cluster.nodes[0].address
        seeds = f"{down},127.0.0.1:{port_of(server.url)}"
        async with await shell.connect(f"valkey://{seeds},{host}:{port}/?cluster=true") as backend:
            await backend.cancel(await backend.create_execution(lane=lane))
        with pytest.raises(errors.NotACluster):
            await shell.connect(f"valkey://{seeds}/?cluster=true")


# -- slots and names -------------------------------------------------------------------------------------------------


async def test_nodes_that_do_not_say_their_host_are_where_they_were_asked(shell, cluster, lane):
    """Neither in the map of the slots nor in a redirect."""
    home, to = cluster.nodes[:2]
    for node in cluster.nodes:
        node.command("CONFIG", "SET", "cluster-preferred-endpoint-type", "unknown-endpoint")
    try:
        async with await shell.connect(cluster.url) as backend:
            eid, handle = await claimed_at(backend, cluster, home, lane)
            slot = slot_of(eid)
            await asyncio.to_thread(cluster.migrate, [slot], to)
            try:
                await backend.complete(handle, b"r")
            finally:
                await asyncio.to_thread(cluster.migrate, [slot], home)
    finally:
        for node in cluster.nodes:
            node.command("CONFIG", "SET", "cluster-preferred-endpoint-type", "ip")


async def test_a_slot_without_an_owner_is_waited_for(cluster, lane):
    """Both shells at once: a node accepts writes again only a while after its cluster is whole."""
    home = cluster.nodes[0]
    async with (
        await Shell("sync").connect(cluster.url) as blocking,
        await Shell("asyncio").connect(cluster.url) as backend,
        await Shell("asyncio").connect(few_retries(cluster.url)) as hasty,
    ):
        eid, handle = await claimed_at(backend, cluster, home, lane)
        slot = slot_of(eid)
        home.command("CLUSTER", "DELSLOTS", slot)
        try:
            with pytest.raises(errors.Unavailable) as caught:
                await hasty.renew(handle)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            calls = [
                asyncio.create_task(call)
                for call in (blocking.renew(handle), backend.set_tags(eid, {"a.b": "c"}))
            ]
            await asyncio.sleep(0)
        finally:
            home.command("CLUSTER", "ADDSLOTS", slot)
            await asyncio.to_thread(cluster.wait_until_stable)
        await asyncio.gather(*calls)
        await backend.complete(handle, b"")


# -- silence ---------------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_silent_node_keeps_no_call_to_another_one_waiting(shell, cluster, lane):
    silent = cluster.nodes[1]
    async with await shell.connect(fast(cluster.url)) as backend:
        eid = await execution_at(backend, cluster, silent, lane)
        elsewhere = [
            await execution_at(backend, cluster, node, lane) for node in others(cluster, silent)
        ]
        with stopped(silent):
            stuck = asyncio.create_task(backend.describe(eid))
            for _ in range(20):
                for each in elsewhere:
                    assert (await backend.describe(each)).state == "waiting"
            with pytest.raises(errors.FFError) as caught:
                await stuck
            assert (caught.value.host, caught.value.port) == silent.address
        assert (await backend.describe(eid)).state == "waiting"
        for each in (eid, *elsewhere):
            await backend.cancel(each)


@pytest.mark.long
async def test_silence_of_a_node_closes_no_connection_to_another_one(cluster, lane):
    silent = cluster.nodes[1]
    async with aio.ValkeyBackend.connect(fast(cluster.url)) as backend:
        eid = await execution_at(backend, cluster, silent, lane)
        before = {
            node.address: node.shared.connection
            for node in backend._nodes.all()
            if node.address != silent.address
        }
        with stopped(silent), pytest.raises(errors.FFError):
            await backend.describe(eid)
        for node in backend._nodes.all():
            if node.address in before and before[node.address] is not None:
                assert node.shared.connection is before[node.address]
        await backend.cancel(eid)


@pytest.fixture
def partial(cluster):
    """The cluster goes on while it lacks a node."""
    cover = "cluster-require-full-coverage"
    for node in cluster.nodes:
        node.command("CONFIG", "SET", cover, "no")
    yield cluster
    for node in cluster.nodes:
        node.command("CONFIG", "SET", cover, "yes")
    cluster.wait_until_stable()


@pytest.mark.long
async def test_looks_at_all_partitions_find_what_the_other_nodes_have(shell, partial, lane):
    cluster = partial
    silent, *rest = cluster.nodes
    lane = next(
        each
        for each in (f"{lane}-{i}" for i in range(100))
        if cluster.node_of(keys.key_slot(keys.ready(each))) is rest[0]
    )
    async with await shell.connect(fast(cluster.url)) as backend:
        lapsed = await execution_at(backend, cluster, rest[1], lane)
        handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=1_000)
        assert handle.execution_id == lapsed
        unhinted = await execution_at(backend, cluster, rest[1], lane)
        beyond = await execution_at(backend, cluster, silent, lane)
        # A lost hint; a sweep finds the execution.
        rest[0].command("DEL", keys.ready(lane))

        async def found():
            tokens = await backend.find_reclaimable(10_000)
            return lapsed in {each.grant.execution_id for each in tokens}

        await wait_until_async(found)
        with stopped(silent):
            handle = await backend.claim(lane=lane, **WORKER)
            assert handle.execution_id == unhinted
            assert await found()
            await backend.complete(handle)
            # "There is none" would not be known to be true.
            with pytest.raises(errors.FFError):
                await backend.claim(lane=lane, **WORKER)
            patient = ClaimPolicy.with_max_wait(1.2)
            assert await backend.claim(lane=lane, **WORKER, policy=patient) is None
        # What did not answer was not forgotten.
        handle = await backend.claim(lane=lane, **WORKER)
        assert handle.execution_id == beyond
        await backend.complete(handle)
        await backend.cancel(lapsed)


# -- cancelled callers -----------------------------------------------------------------------------------------------


async def test_a_caller_may_be_cancelled_at_any_moment(cluster, lane):
    """Of steps that go to all nodes; other callers hear nothing of it."""
    async with aio.ValkeyBackend.connect(cluster.url) as backend:
        eid = await backend.create_execution(lane=lane, namespace=lane, retention=60)
        for turns in range(12):
            calls = [backend.find_reclaimable(1), backend.claim(lane=f"{lane}-none", **WORKER)]
            tasks = [asyncio.create_task(call) for call in calls]
            beside = asyncio.create_task(backend.describe(eid))
            for _ in range(turns):
                await asyncio.sleep(0)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            assert (await beside).state == "waiting"
        connections = [node.shared.connection for node in backend._nodes.all()]

        async def owes_nothing():
            return not any(each.receivers for each in connections if each is not None)

        await wait_until_async(owes_nothing)
        await backend.cancel(eid)


async def test_a_closed_backend_ends_calls_that_wait_for_a_node(shell, cluster, lane):
    silent = cluster.nodes[1]
    backend = await shell.connect(cluster.url)
    eid = await execution_at(backend, cluster, silent, lane)
    with stopped(silent):
        stuck = asyncio.create_task(backend.describe(eid))
        await asyncio.sleep(0.05)
        await backend.close()
        with pytest.raises(errors.FFError):
            await stuck


# -- failover --------------------------------------------------------------------------------------------------------


async def test_calls_go_on_through_planned_failovers(shell, replicated_cluster, lane):
    cluster = replicated_cluster
    async with await shell.connect(cluster.url) as backend, working(backend, lane):
        for primary in cluster.primaries[:2]:
            replica = cluster.replicas_of(primary)[0]
            await asyncio.to_thread(cluster.failover, replica)


@pytest.mark.long
async def test_a_claim_that_waits_outlives_the_failover_of_its_lane(
    shell, replicated_cluster, lane
):
    cluster = replicated_cluster
    home = cluster.node_of(keys.key_slot(keys.ready(lane)))
    async with await shell.connect(cluster.url) as backend:
        waiting = asyncio.create_task(backend.claim(lane=lane, **WORKER, policy=WAITS))

        async def blocked():
            return "blocked_clients:0" not in str(home.command("INFO", "clients"))

        await wait_until_async(blocked)
        await asyncio.to_thread(cluster.failover, cluster.replicas_of(home)[0])
        eid = await backend.create_execution(lane=lane, namespace=lane, retention=60)
        assert (await waiting).execution_id == eid
        await backend.cancel(eid)


async def test_reads_go_to_replicas_where_the_caller_says_so(shell, replicated_cluster, lane):
    cluster = replicated_cluster

    def asked(node):
        told = str(node.command("INFO", "commandstats"))
        return "cmdstat_fcall_ro" in told

    async with await shell.connect(
        BackendConfig.from_url(cluster.url).replace(read_from="replica")
    ) as backend:
        primary = cluster.primaries[0]
        replica = cluster.replicas_of(primary)[0]
        eid, handle = await claimed_at(backend, cluster, primary, lane)
        await backend.complete(handle, b"r")

        async def replicated():
            with contextlib.suppress(errors.FFError):
                return (await backend.describe(eid)).state == "completed"
            return False

        await wait_until_async(replicated)
        for node in (primary, replica):
            node.command("CONFIG", "RESETSTAT")
        assert await backend.read_result(eid) == b"r"
        assert asked(replica)
        assert not asked(primary)
        # It answers no more: the primary does.
        with stopped(replica):
            hasty = await shell.connect(fast(cluster.url, read_from="replica"))
            async with hasty:
                assert await hasty.read_result(eid) == b"r"
        assert asked(primary)


@pytest.mark.long
async def test_calls_wait_for_the_successor_of_a_dead_primary(replicated_cluster, lane):
    """Both shells at once, and at the end of the module: a failover takes seconds, and a start of a node, too."""
    cluster = replicated_cluster
    victim = cluster.primaries[0]
    async with (
        await Shell("sync").connect(cluster.url) as blocking,
        await Shell("asyncio").connect(cluster.url) as backend,
        working(blocking, f"{lane}-a", 2),
        working(backend, f"{lane}-b", 2),
    ):
        cluster.kill(victim)
        began = time.monotonic()
        eids = [await create_many(each, lane, 8) for each in (blocking, backend)]
        assert len(eids) == 2
        await asyncio.to_thread(cluster.wait_until_stable)
        assert time.monotonic() - began < 30
