"""The jobs of P22 to P24: a writer whose frames are replicated, and writers that a failover holds up."""

from __future__ import annotations

import asyncio
import time
from typing import TYPE_CHECKING

from bench.harness import LEASE_MS, batches, check, payloads
from bench.jobs import YIELD_EVERY, claimed, mode_of
from bench.rivals import Clock
from ff_fast import Durability, FFError, aio, keys

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ff_fast import Handle

# Between an acknowledgement and the next frame.
PAUSE_S = 0.002


async def write(url: str, count: int, mode: str, replicas: int, batch: int) -> dict[str, object]:
    """Write *count* frames, each acknowledged when *replicas* have it; flush after each *batch*, or at the end if 0."""
    clock = Clock()
    durability = Durability.replicated(replicas) if replicas else Durability.stored()
    async with aio.ValkeyBackend.connect(url) as backend:
        eid, handle = await claimed(backend)
        writer = await backend.open_writer(
            handle, mode=mode_of(mode), durability=durability, durability_timeout=30
        )
        clock.start()
        for part in batches(payloads(count), batch or YIELD_EVERY):
            for payload in part:
                writer.write(payload)
            if batch:
                await writer.flush()
            else:
                await asyncio.sleep(0)
                await writer.drain()
        outcome = await writer.flush()
        metrics: dict[str, object] = dict(clock.stop(count))
        check(outcome.durability == durability, f"the frames are {outcome.durability!r}")
        metrics["frames"] = writer.last_sequence
        await writer.close()
        return {**metrics, "execution_id": eid}


async def served(
    url: str, partitions: list[int], streams: int, failovers: int
) -> AsyncIterator[dict[str, object]]:
    """Flush frame after frame on *streams* streams of those partitions, while there are *failovers*.

    The answer to each has the longest time between two acknowledgements of each stream, in milliseconds.
    """
    last, longest = [0.0] * streams, [0.0] * streams
    stop, all_run = asyncio.Event(), asyncio.Event()
    async with aio.ValkeyBackend.connect(url) as backend:

        async def stream(number: int, handle: Handle) -> None:
            writer = await backend.open_writer(handle)
            last[number] = time.monotonic()
            while not stop.is_set():
                writer.write(b"frame")
                while not await flushed(writer):
                    pass
                now = time.monotonic()
                longest[number] = max(longest[number], now - last[number])
                last[number] = now
                if all(longest):
                    all_run.set()
                await asyncio.sleep(PAUSE_S)
            await writer.close()

        handles = [
            await claimed_in(backend, partitions[i % len(partitions)]) for i in range(streams)
        ]
        tasks = [asyncio.create_task(stream(i, handle)) for i, handle in enumerate(handles)]
        async with asyncio.timeout(60):
            await all_run.wait()
        for _ in range(failovers):
            longest[:] = [0.0] * streams
            yield {}
            now = time.monotonic()
            ended = [task for task in tasks if task.done()]
            await asyncio.gather(*ended)
            yield {
                "longest_ms": [
                    max(most, now - since) * 1e3 for most, since in zip(longest, last, strict=True)
                ]
            }
        stop.set()
        await asyncio.gather(*tasks)


async def flushed(writer: aio.Writer) -> bool:
    """Flush; return False if it has to be tried again, as a worker would."""
    try:
        await writer.flush()
    except FFError as error:
        if not error.retryable:
            raise
        return False
    return True


async def claimed_in(backend: aio.ValkeyBackend, partition: int) -> Handle:
    """Create an execution in a partition, and claim it."""
    lane = keys.new_uuid()
    await backend.create_execution(lane=lane, execution_id=f"{keys.slot_tag(partition)}:{lane}")
    handle = await backend.claim(
        lane=lane, worker_id="bench", worker_instance_id="bench-1", lease_ttl_ms=LEASE_MS
    )
    assert handle is not None
    return handle
