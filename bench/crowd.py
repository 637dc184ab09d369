"""The jobs of P18 to P20: idle tails, writers without their clients, handlers that wait for a cancellation.

Most have stages (see :mod:`bench.child`).
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import urllib.parse
from typing import TYPE_CHECKING

from bench.harness import Core, Wire, batches, check, payloads
from bench.jobs import claim_many, mode_of, resident_bytes
from ff_fast import StreamFrame, aio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

# Calls that the server has not answered yet.
IN_FLIGHT = 4
LOOK_S = 0.002


# -- idle tails ---------------------------------------------------------------------------------------------------


async def store(url: str, streams: int, frames: int) -> list[str]:
    """Write *frames* to each of *streams* attempts, which stay active; return their executions."""
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, streams)
        for group in batches(handles, 64):
            for handle in group:
                async with await backend.open_writer(handle) as writer:
                    for payload in payloads(frames):
                        writer.write(payload)
        return [handle.fields().execution_id for handle in handles]


async def idle_tails(
    url: str, executions: list[str], frames: int
) -> AsyncIterator[dict[str, float]]:
    """Open all tails at once; answer when each has yielded its *frames*, and keep them open."""
    caught_up = asyncio.Event()
    left = len(executions)
    async with aio.ValkeyBackend.connect(url) as backend:

        async def reader(execution_id: str) -> None:
            nonlocal left
            count = 0
            async for item in backend.tail(execution_id):
                assert type(item) is StreamFrame, f"the tail yielded {item!r}"
                count += 1
                if count == frames:
                    left -= 1
                    if not left:
                        caught_up.set()

        gc.collect()
        before = resident_bytes()
        start, cpu = time.perf_counter(), time.process_time()
        tasks = [asyncio.create_task(reader(execution_id)) for execution_id in executions]
        async with asyncio.timeout(60):
            await caught_up.wait()
        metrics = {
            "caught_up_s": time.perf_counter() - start,
            "client_us": (time.process_time() - cpu) / len(executions) * 1e6,
        }
        gc.collect()
        yield {**metrics, "bytes_per_tail": (resident_bytes() - before) / len(executions)}
        check(not any(task.done() for task in tasks), "a tail has ended")
        yield {"bytes_per_tail": (resident_bytes() - before) / len(executions)}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# -- writers without their clients --------------------------------------------------------------------------------


async def flood(
    url: str, attempts: int, rounds: int, mode: str, parts: int
) -> AsyncIterator[dict[str, float]]:
    """Seal one frame of each attempt a round ahead of time, *parts* a call; then send the calls as fast as possible."""
    address = urllib.parse.urlsplit(url)
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, attempts)
    with Wire(port=address.port or 0) as wire:
        cores = [Core(handle, wire, mode_of(mode), 10_000, 32 << 20) for handle in handles]
        calls = sealed(cores, payloads(rounds), parts)
        yield {}
        start = time.perf_counter()
        send(wire, calls)
        wall = time.perf_counter() - start
        for core in cores:
            last = wire.command("GET", core.head)
            assert isinstance(last, bytes)
            check(last.endswith(b"-%d" % rounds), f"the last of {rounds} frames is {last!r}")
        yield {"per_second": attempts * rounds / wall}


def sealed(cores: Sequence[Core], frames: Sequence[bytes], parts: int) -> list[tuple[bytes, int]]:
    """Return the requests of all frames, and how many replies each has."""
    now_ms = int(time.time() * 1000)
    return [
        (b"".join(core.encode(frame, now_ms) for core in group), len(group))
        for frame in frames
        for group in batches(cores, parts)
    ]


def send(wire: Wire, calls: Sequence[tuple[bytes, int]]) -> None:
    """Send each of *calls*, with a bounded number of them unanswered; check the replies."""

    def settle(replies: int) -> None:
        for _ in range(replies):
            reply = wire.receive()
            check(isinstance(reply, bytes), f"refused: {reply!r}")

    for number, (request, _) in enumerate(calls):
        if number >= IN_FLIGHT:
            settle(calls[number - IN_FLIGHT][1])
        wire.send(request)
    for _, replies in calls[-IN_FLIGHT:]:
        settle(replies)


# -- cancellations ------------------------------------------------------------------------------------------------


async def handlers(url: str, lane: str, count: int) -> AsyncIterator[dict[str, int]]:
    """Run *count* handlers that wait; answer when all run, then with the time at which each knew that it is cancelled."""
    told: dict[str, int] = {}
    running = 0
    all_run, all_told, stop = asyncio.Event(), asyncio.Event(), asyncio.Event()

    async def handler(task: aio.Task) -> None:
        nonlocal running
        running += 1
        if running == count:
            all_run.set()
        while not task.cancelled:  # noqa: ASYNC110 - it changes without a call
            await asyncio.sleep(LOOK_S)
        told[task.handle.fields().execution_id] = time.monotonic_ns()
        if len(told) == count:
            all_told.set()

    async with aio.ValkeyBackend.connect(url) as backend:
        worker = asyncio.create_task(
            backend.run_worker(handler, lane=lane, concurrency=count, stop=stop)
        )
        async with asyncio.timeout(30):
            await all_run.wait()
        yield {}
        async with asyncio.timeout(60):
            await all_told.wait()
        yield told
        stop.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(worker, 10)
