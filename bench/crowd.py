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

import hiredis

from bench.harness import LEASE_MS, Core, Wire, batches, check, payloads
from bench.jobs import claim_many, mode_of, resident_bytes
from ff_fast import StreamFrame, aio
from ff_fast._hot.writer import Outbox

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from ff_fast import Handle

# Calls that the server has not answered yet.
IN_FLIGHT = 4
# Letters of blocks: the time of frames that were pushed, and frames that are all that a batch has.
PUSHED_MS, ONE_BLOCK = b"I", (b"L", b"V")


# -- idle tails ---------------------------------------------------------------------------------------------------


async def store(url: str, streams: int, frames: int) -> list[str]:
    """Write *frames* to each of *streams* attempts, which stay active; return their executions."""
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, streams)

        async def write(handle: Handle) -> None:
            async with await backend.open_writer(handle) as writer:
                for payload in payloads(frames):
                    writer.write(payload)

        for group in batches(handles, 64):
            await asyncio.gather(*(write(handle) for handle in group))
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
    url: str, attempts: int, rounds: int, rate: int, mode: str
) -> AsyncIterator[dict[str, float]]:
    """Seal the calls of writers at *rate* frames a second each ahead of time; then send them as fast as possible."""
    address = urllib.parse.urlsplit(url)
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, attempts)
    with Wire(port=address.port or 0) as wire:
        outbox = Outbox()
        cores = [Core(handle, wire, mode_of(mode), outbox=outbox) for handle in handles]
        calls = sealed(outbox, cores, payloads(rounds), 1 / rate)
        yield {"calls": len(calls)}
        start = time.perf_counter()
        send(wire, calls)
        wall = time.perf_counter() - start
        for core in cores:
            last = wire.command("GET", core.head)
            assert isinstance(last, bytes)
            check(last.endswith(b"-%d" % rounds), f"the last of {rounds} frames is {last!r}")
        yield {"per_second": attempts * rounds / wall}


def sealed(
    outbox: Outbox, cores: Sequence[Core], frames: Sequence[bytes], period_s: float
) -> list[bytes]:
    """Return the requests of writers that write one of *frames* each period; their acknowledgements are made up.

    It takes as long as writing them would, since best-effort frames are held for a time.
    """
    calls: list[bytes] = []

    def take() -> None:
        while outbox.ready:
            call = outbox.next_call()
            if call is None:
                break
            request = call.take()
            calls.append(request)
            call(made_up(request))

    begin = time.monotonic()
    for number, frame in enumerate(frames):
        time.sleep(max(begin + number * period_s - time.monotonic(), 0))
        for core in cores:
            core.write(frame)
        take()
    for core in cores:
        core._seal_soon()
    take()
    return calls


def made_up(request: bytes) -> list[bytes] | bytes:
    """Return the reply of a server that accepts each part of a call."""
    reader = hiredis.Reader()
    reader.feed(request)
    words = reader.gets()
    at = 3 + int(words[2])
    now_ms = int(time.time() * 1000)
    lease = b"%d 0" % (now_ms + LEASE_MS)
    replies = [b"%d" % now_ms]
    while at < len(words):
        keys, arguments = int(words[at][-1:]), int(words[at][:-1])
        part = words[at + 1 : at + 1 + arguments]
        at += 1 + arguments
        # Of a push alone the server names no id.
        replies.append(lease if keys == 1 else b"%b %b" % (last_id(part, now_ms), lease))
    return b" ".join(replies) if len(replies) == 2 else replies


def last_id(part: Sequence[bytes], now_ms: int) -> bytes:
    """Return the id of the last frame of a batch: writer, previous sequence, push and blocks."""
    ms, at, sequence = b"%d" % now_ms, 3, int(part[1])
    if part[at] == PUSHED_MS:
        ms, at = part[at + 1], at + 2
    if part[at] in ONE_BLOCK:
        sequence += int(part[at + 1])
    return b"%b-%d" % (ms, sequence)


def send(wire: Wire, calls: Sequence[bytes]) -> None:
    """Send each of *calls*, with a bounded number of them unanswered; check the replies."""

    def settle() -> None:
        reply = wire.receive()
        answers = reply if isinstance(reply, list) else [reply]
        refused = [answer for answer in answers if not isinstance(answer, bytes)]
        check(not refused, f"refused: {refused[:1]!r}")

    for number, request in enumerate(calls):
        if number >= IN_FLIGHT:
            settle()
        wire.send(request)
    for _ in calls[-IN_FLIGHT:]:
        settle()


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
        await task.wait_cancelled()
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
