"""A part of a cluster that is cut off from the rest, with a client on its side."""

import asyncio
import contextlib
import os
import re
import signal

import pytest

from ff_fast import End, StreamFrame, keys
from ff_fast.errors import FFError, Outcome

from ..waiting import wait_until
from .sites import cut_off, let_follow

pytestmark = pytest.mark.long


def partition_of(cluster, node):
    """A partition that the node has."""
    slots = set(cluster.slots_of(node))
    return next(n for n in range(256) if keys.key_slot(keys.slot_tag(n).encode()) in slots)


async def claimed_on(backend, cluster, node, lane):
    """An execution whose keys are on that node, and its lease."""
    eid = f"{keys.slot_tag(partition_of(cluster, node))}:{keys.new_uuid()}"
    await backend.create_execution(lane=lane, execution_id=eid)
    return eid, await backend.claim(lane=lane, lease_ttl_ms=600_000)


async def put(writer, first, last):
    for n in range(first, last + 1):
        assert writer.write(b"%d" % n) == n
    await writer.flush(20)


async def whole(backend, eid, count):
    """All frames are read once and in order, then the end as a success."""
    items = await backend.items(eid)
    assert [item.payload for item in items if isinstance(item, StreamFrame)] == [
        b"%d" % n for n in range(1, count + 1)
    ]
    assert isinstance(items[-1], End)
    assert (len(items), items[-1].reason) == (count + 1, "attempt_success")


def replicated_to(cluster, primary):
    """Wait until the replicas of a primary have all that it has."""
    offset = _offset(primary)
    for replica in cluster.replicas_of(primary):
        wait_until(lambda replica=replica: _offset(replica) >= offset)


def _offset(node):
    return int(re.search(rb"master_repl_offset:(\d+)", node.command("INFO", "replication"))[1])


@contextlib.contextmanager
def stopped(nodes):
    for node in nodes:
        os.kill(node.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for node in nodes:
            os.kill(node.pid, signal.SIGCONT)


async def test_a_minority_accepts_nothing_and_its_callers_are_told_in_time(shell, cluster, lane):
    minority, *majority = cluster.nodes
    async with (
        await shell.connect(cluster.url) as backend,
        await shell.connect(cluster.url, timeout=1.0, retries=2) as hasty,
    ):
        eid, handle = await claimed_on(backend, cluster, minority, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 5)
        with stopped(majority):
            wait_until(lambda: b"cluster_state:fail" in minority.command("CLUSTER", "INFO"))
            with pytest.raises(FFError) as told:
                await asyncio.wait_for(hasty.set_tags(eid, {"a.b": "c"}), 10)
            assert (told.value.retryable, told.value.outcome) == (True, Outcome.NOT_APPLIED)
            # A writer keeps what it has, and waits.
            assert writer.write(b"6") == 6
            # Some of them may have answered no vote for so long that they are thought to have failed.
        await asyncio.to_thread(cluster.wait_until_stable)
        await put(writer, 7, 10)
        await writer.close(20)
        await backend.complete(handle)
        await whole(backend, eid, 10)
        assert (await backend.describe(eid)).tags == {}


async def test_what_a_minority_accepted_is_replayed_to_the_majority(
    shell, replicated_cluster, lane
):
    cluster = replicated_cluster
    primary = cluster.primaries[0]
    (replica,) = cluster.replicas_of(primary)
    # A writer turns away from a server that is silent once the time limit of its backend has passed.
    async with (
        await shell.connect(cluster.url, timeout=2.5) as backend,
        await shell.connect(cluster.url) as other,
    ):
        eid, handle = await claimed_on(backend, cluster, primary, lane)
        writer = await backend.open_writer(handle)
        reading = asyncio.ensure_future(other.items(eid))
        await put(writer, 1, 5)
        await asyncio.to_thread(cut_off, primary, replica)
        await put(writer, 6, 10)
        with stopped([primary]):
            replica.command("CLUSTER", "FAILOVER", "TAKEOVER")
            let_follow(replica)
            await put(writer, writer.next_sequence, 15)
        await writer.close(20)
        await backend.complete(handle)
        await whole(backend, eid, 15)
        items = await asyncio.wait_for(reading, 20)
        assert [item for item in items[:-1] if not isinstance(item, StreamFrame)] == []
        assert [item.payload for item in items[:-1]] == [b"%d" % n for n in range(1, 16)]
        await asyncio.to_thread(cluster.wait_until_stable)
