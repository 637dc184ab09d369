"""Writers of a cluster: slots move, primaries change and die, and the streams are whole."""

import asyncio
import contextlib

import pytest

import ff_fast
from ff_fast import StreamMode, keys

from ..shells import WORKER
from ..waiting import wait_until_async

MODES = (
    StreamMode.durable(),
    StreamMode.durable_summary(),
    StreamMode.best_effort_live(600_000),
)


def payload(mode, stream, n):
    if mode.patch_kind is not None:
        return b'{"k%d":"%d-%d"}' % (n % 7, stream, n)
    return b"%d-%d" % (stream, n)


class Stream:
    """One attempt, and what was written to it."""

    def __init__(self, number, eid, handle, mode):
        self.number, self.eid, self.handle, self.mode = number, eid, handle, mode
        self.written = []
        self.acknowledged = 0
        self.writer = None

    @property
    def slot(self):
        return keys.key_slot(keys.core(self.eid))

    def write(self):
        data = payload(self.mode, self.number, len(self.written) + 1)
        assert self.writer.write(data) == len(self.written) + 1
        self.written.append(data)

    async def check(self, backend):
        """Every frame is stored once, in order, as it was written."""
        found, after = [], None
        while True:
            page = await backend.read_stream(self.eid, after=after)
            assert not page.gaps, (self.number, page.gaps)
            if not len(page):
                break
            found += page
            after = page.cursor
        assert [frame.sequence for frame in found] == list(range(1, len(self.written) + 1))
        assert [frame.payload for frame in found] == self.written


async def streams(backend, lane, count, **options):
    made = []
    for number in range(count):
        await backend.create_execution(lane=lane)
        handle = await backend.claim(lane=lane, lease_ttl_ms=600_000, **WORKER)
        assert handle is not None, number
        stream = Stream(number, handle.fields().execution_id, handle, MODES[number % 3])
        stream.writer = await backend.open_writer(handle, mode=stream.mode, **options)
        made.append(stream)
    return made


async def written_while(made, faults, least=30):
    """Write a frame to every stream in turn until *faults* have passed, and then wait for all."""
    passing = asyncio.ensure_future(faults)
    rounds = 0
    while not passing.done() or rounds < least:
        for stream in made:
            stream.write()
        rounds += 1
        await asyncio.sleep(0.005 if rounds < 200 else 0.05)
        if rounds % 16 == 0:
            some = made[rounds % len(made)]
            outcome = await some.writer.flush(20)
            assert outcome.frame_count == len(some.written)
    await passing
    for stream in made:
        outcome = await stream.writer.flush(20)
        assert outcome.frame_count == len(stream.written)


async def flushed(writer, level):
    """Flush until the level is reached."""

    async def reached():
        with contextlib.suppress(ff_fast.NotReplicated):
            return (await writer.flush(20)).durability.covers(level)
        return False

    await wait_until_async(reached, 20)


async def ended(backend, made):
    for stream in made:
        await stream.writer.close(20)
        await stream.check(backend)
        await backend.complete(stream.handle, b"%d" % stream.number)
        assert (await backend.describe(stream.eid)).state == "completed"


async def back_and_forth(cluster, made):
    """Move the slots of half of the streams to another primary, and back."""
    slots = {stream.slot for stream in made[::2]}
    first, second, *_ = cluster.primaries
    moving = slots.intersection(cluster.slots_of(first))
    for to in (second, first):
        await asyncio.to_thread(cluster.migrate, moving, to)


@pytest.mark.parametrize("count", [24, pytest.param(200, marks=pytest.mark.long)])
async def test_streams_are_whole_while_their_slots_move(count, shell, cluster, lane):
    async with await shell.connect(cluster.url) as backend:
        made = await streams(backend, lane, count)
        assert len({cluster.node_of(stream.slot) for stream in made}) == 3
        await written_while(made, back_and_forth(cluster, made))
        await ended(backend, made)


@pytest.mark.long
async def test_streams_are_whole_after_a_planned_failover(shell, replicated_cluster, lane):
    cluster = replicated_cluster
    async with await shell.connect(cluster.url) as backend:
        made = await streams(backend, lane, 30)

        async def faults():
            primary = cluster.node_of(made[0].slot)
            (replica,) = cluster.replicas_of(primary)
            await asyncio.to_thread(cluster.failover, replica)

        await written_while(made, faults())
        await ended(backend, made)


@pytest.mark.long
async def test_writers_of_other_nodes_go_on_while_one_is_dead(shell, replicated_cluster, lane):
    """What was acknowledged as replicated is there after the death of the primary."""
    cluster = replicated_cluster
    async with await shell.connect(cluster.url) as backend:
        level = ff_fast.Durability.replicated()
        made = await streams(backend, lane, 30, durability=level, durability_timeout=0.5)
        for stream in made:
            stream.write()
        await asyncio.gather(*(flushed(stream.writer, level) for stream in made))
        dead = cluster.node_of(made[0].slot)
        there = [stream for stream in made if cluster.node_of(stream.slot) is dead]
        others = [stream for stream in made if stream not in there]
        assert there
        assert others
        cluster.kill(dead)
        for stream in others + there:
            stream.write()
        for outcome in await asyncio.gather(*(stream.writer.flush(20) for stream in others)):
            assert outcome.frame_count == 2
        # They are stored by the new primary, which has no replica yet.
        flushes = (stream.writer.flush(20) for stream in there)
        errors = await asyncio.gather(*flushes, return_exceptions=True)
        for stream, error in zip(there, errors, strict=True):
            assert isinstance(error, ff_fast.NotReplicated), error
            assert (error.replicas, error.outcome) == (0, ff_fast.Outcome.APPLIED)
            assert stream.writer.last_sequence == 2
        await asyncio.to_thread(cluster.restart, dead)
        await asyncio.gather(*(flushed(stream.writer, level) for stream in there))
        await ended(backend, made)
