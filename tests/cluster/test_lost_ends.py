"""Real failovers under calls that ask for a level, and a second one while frames are stored again."""

import asyncio
import contextlib
import os
import signal
import threading

import pytest

from ff_fast import Durability, End, Gap, StreamFrame, StreamMode, keys
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import FramesLost, NotReplicated

from ..conftest import PROMPT, connect_raw
from ..faults.chaos import DOWN, ChaosProxy
from ..faults.stored import claimed
from ..server.readers import Reader
from ..waiting import wait_until, wait_until_async

pytestmark = pytest.mark.long

REPLICATED = Durability.replicated()
SUCCESS = End("attempt_success")
MODES = {
    "durable": StreamMode.durable(),
    "summary": StreamMode.durable_summary(),
    "best_effort": StreamMode.best_effort_live(600_000),
}


async def put(writer, first, last):
    """Write frames, each in a batch of its own."""
    for n in range(first, last + 1):
        writer.write(b'{"f%d":%d}' % (n % 7, n))
        await writer.flush(20)


@pytest.mark.parametrize("closed", [True, False])
async def test_an_end_that_waits_for_its_level_outlives_a_failover_with_its_frames(
    closed, failover, shell, lane
):
    async with await shell.connect(failover.url, replay_ms=60_000) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        await put(writer, 1, 5)
        await asyncio.to_thread(failover.stall, keys.key_slot(keys.core(eid)))
        await put(writer, 6, 10)
        if closed:
            await writer.close(20)
        seen = list(await backend.read_stream(eid))
        ending = asyncio.ensure_future(
            backend.complete(handle, b"r", durability=REPLICATED, durability_timeout=3)
        )

        async def ended():
            return (await backend.describe(eid)).state == "completed"

        await wait_until_async(ended)
        await asyncio.to_thread(failover.promote)
        # Nobody is left who could confirm it.
        with pytest.raises(NotReplicated):
            await ending
        items = await backend.items(eid)
        assert (items[:-1], items[-1]) == (seen, SUCCESS)
        assert await backend.read_result(eid) == b"r"
        del writer


class Chain:
    """Three servers, each a replica of the one before, and an address that moves along them."""

    def __init__(self):
        self.first_is_dead = threading.Event()
        quick = {"repl_diskless_sync": False, "repl_diskless_load": "on-empty-db", **PROMPT}
        with contextlib.ExitStack() as stack:
            self.servers = [stack.enter_context(EmbeddedServer(**quick)) for _ in range(3)]
            self.clients = [stack.enter_context(connect_raw(each.url)) for each in self.servers]
            self.links = []
            for server, client in zip(self.servers, self.clients[1:], strict=False):
                self.links.append(stack.enter_context(ChaosProxy(server.url)))
                client.replicaof(*self.links[-1].address)
                wait_until(
                    lambda client=client: client.info("replication")["master_link_status"] == "up"
                )
            self.front = stack.enter_context(ChaosProxy(self.servers[0].url))
            self._stack = stack.pop_all()

    def stall(self, at):
        """Let the server behind *at* have what there is, and nothing from here on."""
        wait_until(
            lambda: (
                self.clients[at].info("replication")["master_repl_offset"]
                == self.clients[at + 1].info("replication")["master_repl_offset"]
            )
        )
        self.links[at].hold(DOWN)

    def promote(self, at):
        """Kill the server before *at*, and let *at* take its place."""
        os.kill(self.servers[at - 1].pid, signal.SIGKILL)
        self.links[at - 1].close()
        self.clients[at].replicaof("NO", "ONE")
        self.front.lead_to(self.servers[at].url)

    def lose_both(self, eid):
        """Kill the first server, and the second one once it has got some of the frames again."""
        self.promote(1)
        self.first_is_dead.set()
        wait_until(lambda: self.stored(1, eid) > 20)
        self.promote(2)

    def close(self):
        self._stack.close()

    def stored(self, at, eid):
        """Sequence of the last frame that a server has."""
        return int(self.clients[at].get(keys.head(eid, 0)).rpartition(b"-")[2])


@pytest.mark.parametrize("closed", [True, False])
@pytest.mark.parametrize("mode", MODES)
async def test_a_primary_that_dies_while_frames_are_stored_again_loses_nothing(
    mode, closed, shell, lane
):
    chain = await asyncio.to_thread(Chain)
    with contextlib.closing(chain):
        async with await shell.connect(chain.front.url, replay_ms=60_000) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle, mode=MODES[mode])
            await put(writer, 1, 5)
            await asyncio.to_thread(chain.stall, 0)
            await put(writer, 6, 200)
            seen = []
            while len(seen) < 200:
                seen += await backend.read_stream(eid, after=seen[-1].cursor if seen else None)
            reader = Reader(shell.kind, chain.front.url, eid)
            await asyncio.to_thread(reader.wait_for, 200)
            if closed:
                await writer.close(20)
            await asyncio.to_thread(chain.stall, 1)

            dying = asyncio.ensure_future(asyncio.to_thread(chain.lose_both, eid))
            if closed:
                # Else the first server could end the attempt, and nobody would store its frames again.
                await asyncio.to_thread(chain.first_is_dead.wait, 20)
                await asyncio.gather(dying, backend.complete(handle))
            else:
                await dying
                await put(writer, 201, 205)
                await backend.complete(handle)
            items = await backend.items(eid)
            frames = [item for item in items if isinstance(item, StreamFrame)]
            assert frames[:200] == seen
            assert items[200 + 5 * (not closed) :] == [SUCCESS]
            got = await asyncio.to_thread(reader.result, 40)
            assert [item for item in got if isinstance(item, StreamFrame)] == frames
            assert got[len(frames) :] == [SUCCESS]
            del writer


@pytest.mark.parametrize("mode", MODES)
async def test_what_two_failovers_have_lost_and_nobody_holds_is_told_on_both_sides(
    mode, shell, lane
):
    chain = await asyncio.to_thread(Chain)
    with contextlib.closing(chain):
        async with await shell.connect(chain.front.url, replay_bytes=5_000) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle, mode=MODES[mode])
            await put(writer, 1, 5)
            await asyncio.to_thread(chain.stall, 0)
            await put(writer, 6, 200)
            reader = Reader(shell.kind, chain.front.url, eid)
            await asyncio.to_thread(reader.wait_for, 200)
            await asyncio.to_thread(chain.stall, 1)
            dying = asyncio.ensure_future(asyncio.to_thread(chain.lose_both, eid))
            told = []
            for n in range(201, 206):
                writer.write(b'{"f":%d}' % n)
                try:
                    await writer.flush(20)
                except FramesLost as error:
                    told.append((error.first, error.last))
                if n == 203:
                    await dying
            await writer.close(20)
            await backend.complete(handle)
            items = await backend.items(eid)
            (gap,) = [item for item in items if isinstance(item, Gap)]
            assert (gap.first_missing, gap.reason) == (6, "lost")
            assert max(last for _, last in told) == gap.next_sequence - 1 < 200
            frames = [item for item in items if isinstance(item, StreamFrame)]
            assert [frame.sequence for frame in frames] == [
                *range(1, 6), *range(gap.next_sequence, 206),
            ]  # fmt: skip
            # Who had read them before gets nothing twice, and no gap.
            got = await asyncio.to_thread(reader.result, 40)
            assert [item.sequence for item in got[:-1]] == list(range(1, 206))
            assert {frame.stream_id for frame in frames} <= {item.stream_id for item in got[:-1]}
