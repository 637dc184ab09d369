"""Slots that move under calls, writers and readers: whole and at once, or key by key, and nodes that die."""

import asyncio
import contextlib

import pytest

from ff_fast import Frame, FrameKind, keys
from ff_fast.errors import FFError, Outcome

from .test_partitions import claimed_on, put, replicated_to, whole

pytestmark = pytest.mark.long


def slot_of(eid):
    return keys.key_slot(keys.core(eid))


class Import:
    """A slot is moved key by key, and stands half way."""

    def __init__(self, cluster, slot, target):
        self.slot = slot
        self._cluster = cluster
        self._source, self._target = cluster.node_of(slot), target
        target.command("CLUSTER", "SETSLOT", self.slot, "IMPORTING", self._source.id)
        self._source.command("CLUSTER", "SETSLOT", self.slot, "MIGRATING", target.id)

    def keys(self):
        return self._source.command("CLUSTER", "GETKEYSINSLOT", self.slot, 10_000)

    def move(self, *moved):
        """Move keys; without any, all that are left."""
        host, port = self._target.address
        for key in moved or self.keys():
            self._source.command("MIGRATE", host, port, key, 0, 5000)

    def end(self):
        while self.keys():
            self.move()
        for node in (self._target, self._source, *self._cluster.nodes):
            node.command("CLUSTER", "SETSLOT", self.slot, "NODE", self._target.id)
        self._cluster.wait_until_stable()


@contextlib.contextmanager
def moving(cluster, eid, target):
    """The slot of an execution, half way to *target*; it is there at last, and then goes back."""
    source = cluster.node_of(slot_of(eid))
    half = Import(cluster, slot_of(eid), target)
    try:
        yield half
    finally:
        half.end()
        cluster.migrate([half.slot], source)


# -- whole and at once ----------------------------------------------------------------------------------------------


async def test_a_stream_is_whole_while_its_slot_moves(shell, cluster, lane):
    source, target, _ = cluster.nodes
    async with (
        await shell.connect(cluster.url) as backend,
        await shell.connect(cluster.url) as other,
    ):
        eid, handle = await claimed_on(backend, cluster, source, lane)
        reading = asyncio.ensure_future(other.items(eid))
        # As many as it takes until the slot is there; the log keeps all of them.
        writer = await backend.open_writer(handle, retention_maxlen=1_000_000)
        first = 1
        for to in (target, source, target, source):
            moved = asyncio.ensure_future(asyncio.to_thread(cluster.migrate, [slot_of(eid)], to))
            while not moved.done():
                await put(writer, first, first + 4)
                first += 5
            await moved
        await writer.close(20)
        await backend.complete(handle)
        await whole(backend, eid, first - 1)
        items = await asyncio.wait_for(reading, 20)
        assert [item.payload for item in items[:-1]] == [b"%d" % n for n in range(1, first)]


async def test_a_node_that_lacks_the_library_gets_it_from_whoever_meets_it(shell, cluster, lane):
    source, target, _ = cluster.nodes
    async with await shell.connect(cluster.url) as backend:
        eid, handle = await claimed_on(backend, cluster, source, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 5)
        target.command("FUNCTION", "FLUSH")
        await asyncio.to_thread(cluster.migrate, [slot_of(eid)], target)
        try:
            await put(writer, 6, 10)
            await writer.close(20)
            target.command("FUNCTION", "FLUSH")
            await backend.complete(handle)
            await whole(backend, eid, 10)
        finally:
            await asyncio.to_thread(cluster.migrate, [slot_of(eid)], source)


# -- key by key -----------------------------------------------------------------------------------------------------


async def test_keys_that_are_apart_are_waited_for_and_then_the_call_is_not_applied(
    shell, cluster, lane
):
    source, target, _ = cluster.nodes
    async with (
        await shell.connect(cluster.url) as backend,
        await shell.connect(cluster.url, timeout=1.0, retries=3) as hasty,
    ):
        eid, handle = await claimed_on(backend, cluster, source, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 5)
        with moving(cluster, eid, target) as half:
            half.move(keys.core(eid).decode())
            for call in (
                hasty.set_tags(eid, {"a.b": "c"}),
                hasty.append_frame(handle, Frame(b"never", FrameKind.EVENT)),
                hasty.complete(handle),
            ):
                with pytest.raises(FFError) as told:
                    await asyncio.wait_for(call, 10)
                assert (told.value.retryable, told.value.outcome) == (True, Outcome.NOT_APPLIED)
            for n in range(6, 11):
                writer.write(b"%d" % n)
            half.end()
            await writer.close(20)
        await backend.complete(handle)
        await whole(backend, eid, 10)


async def test_keys_that_have_gone_ahead_are_waited_for_until_the_slot_is_there(
    shell, cluster, lane
):
    """Functions do not follow ASK: keys that they do not name may still be on the old node."""
    source, _, target = cluster.nodes
    async with (
        await shell.connect(cluster.url) as backend,
        await shell.connect(cluster.url, timeout=1.0, retries=3) as hasty,
    ):
        eid, handle = await claimed_on(backend, cluster, source, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 5)
        with moving(cluster, eid, target) as half:
            half.move()
            for call in (hasty.describe(eid), hasty.set_tags(eid, {"a.b": "c"})):
                with pytest.raises(FFError) as told:
                    await asyncio.wait_for(call, 10)
                assert (told.value.retryable, told.value.outcome) == (True, Outcome.NOT_APPLIED)
            for n in range(6, 11):
                writer.write(b"%d" % n)
            half.end()
            await writer.close(20)
        await backend.complete(handle)
        await whole(backend, eid, 10)


@pytest.mark.parametrize("slotless", [False, True], ids=["with slots", "without slots"])
async def test_work_is_claimed_while_the_keys_of_its_lane_move(shell, cluster, lane, slotless):
    slot = keys.key_slot(keys.ready(lane))
    source = cluster.node_of(slot)
    target, other = (node for node in cluster.nodes if node is not source)
    slots = cluster.slots_of(target) if slotless else []
    async with await shell.connect(cluster.url) as backend:
        eids = {await backend.create_execution(lane=lane) for _ in range(8)}

        async def claimed(count):
            """Claims at once, each on a connection that is warm."""
            calls = (backend.claim(lane=lane, lease_ttl_ms=600_000) for _ in range(count))
            return {handle.execution_id for handle in await asyncio.gather(*calls)}

        await asyncio.to_thread(cluster.migrate, slots, other)
        half = Import(cluster, slot, target)
        try:
            found = await claimed(4)
            half.move()
            found |= await claimed(4)
        finally:
            half.end()
            cluster.migrate([slot], source)
            cluster.migrate(slots, target)
        assert found == eids
        assert await backend.claim(lane=lane) is None


# -- nodes that die --------------------------------------------------------------------------------------------------


async def test_a_primary_that_is_killed_is_waited_for_until_its_replica_takes_over(
    shell, replicated_cluster, lane
):
    cluster = replicated_cluster
    primary = cluster.primaries[0]
    async with (
        await shell.connect(cluster.url) as backend,
        await shell.connect(cluster.url) as other,
    ):
        eid, handle = await claimed_on(backend, cluster, primary, lane)
        reading = asyncio.ensure_future(other.items(eid))
        writer = await backend.open_writer(handle)
        await put(writer, 1, 5)
        await asyncio.to_thread(replicated_to, cluster, primary)
        await asyncio.to_thread(cluster.kill, primary)
        described, _ = await asyncio.gather(backend.describe(eid), put(writer, 6, 10))
        assert described.state == "active"
        await writer.close(20)
        await backend.complete(handle)
        await whole(backend, eid, 10)
        items = await asyncio.wait_for(reading, 20)
        assert [item.payload for item in items[:-1]] == [b"%d" % n for n in range(1, 11)]
    await asyncio.to_thread(cluster.restart, primary)
