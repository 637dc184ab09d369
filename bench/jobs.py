"""The jobs of ff_fast as a contender; each runs in a process of its own (:mod:`bench.child`)."""

from __future__ import annotations

import asyncio
import random
import resource
import time
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

from bench.harness import LEASE_MS, batches, check, payloads
from bench.rivals import Clock
from ff_fast import (
    BestEffortLiveConfig,
    ClaimPolicy,
    End,
    Handle,
    PatchKind,
    StreamFrame,
    StreamMode,
    ValkeyBackend,
    aio,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

# Writes between two turns of the event loop, which a real worker needs to receive its tokens.
YIELD_EVERY = 64
WAIT = ClaimPolicy.with_max_wait(60)


def mode_of(name: str, ttl_ms: int = 15_000, ceiling: int = 16_384) -> StreamMode:
    """Return the stream mode that an argument of a job names."""
    if name == "best_effort":
        config = BestEffortLiveConfig.with_ttl(ttl_ms).with_maxlen_ceiling(ceiling)
        return StreamMode.best_effort_live_with_config(config)
    if name == "append":
        return StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
    return StreamMode.durable_summary() if name == "merge" else StreamMode.durable()


async def claimed(backend: aio.ValkeyBackend) -> tuple[str, Handle]:
    """Create an execution in a lane of its own and claim it."""
    lane = uuid.uuid4().hex
    eid = await backend.create_execution(lane=lane)
    handle = await backend.claim(
        lane=lane, worker_id="bench", worker_instance_id="bench-1", lease_ttl_ms=LEASE_MS
    )
    assert handle is not None
    return eid, handle


async def write(url: str, count: int, mode: str, batch: int = 0) -> dict[str, object]:
    """Write *count* frames; flush after each *batch* of them, or once at the end if it is 0."""
    clock = Clock()
    async with aio.ValkeyBackend.connect(url) as backend:
        eid, handle = await claimed(backend)
        writer = await backend.open_writer(handle, mode=mode_of(mode))
        parts = batches(payloads(count), batch or YIELD_EVERY)
        put = writer.write
        clock.start()
        for part in parts:
            for payload in part:
                put(payload)
            if batch:
                await writer.flush()
            else:
                await asyncio.sleep(0)
                await writer.drain()
        await writer.flush()
        metrics: dict[str, object] = dict(clock.stop(count))
        metrics["frames"] = writer.last_sequence
        await writer.close()
        return {**metrics, "execution_id": eid}


def write_sync(url: str, count: int, mode: str, batch: int = 0) -> dict[str, object]:
    """Do the same as :func:`write` by the blocking interface."""
    clock = Clock()
    with ValkeyBackend.connect(url) as backend:
        lane = uuid.uuid4().hex
        eid = backend.create_execution(lane=lane)
        handle = backend.claim(
            lane=lane, worker_id="bench", worker_instance_id="bench-1", lease_ttl_ms=LEASE_MS
        )
        assert handle is not None
        with backend.open_writer(handle, mode=mode_of(mode)) as writer:
            put = writer.write
            clock.start()
            for part in batches(payloads(count), batch or YIELD_EVERY):
                for payload in part:
                    put(payload)
                if batch:
                    writer.flush()
                else:
                    writer.drain()
            writer.flush()
            metrics: dict[str, object] = dict(clock.stop(count))
            metrics["frames"] = writer.last_sequence
        return {**metrics, "execution_id": eid}


# -- latency ------------------------------------------------------------------------------------------------------


async def burst_write(url: str, lane: str, rate: int, count: int, mode: str) -> dict[str, float]:
    """Write *rate* frames a second; each payload is the time of its write."""
    async with aio.ValkeyBackend.connect(url) as backend:
        handle = await backend.claim(
            lane=lane, worker_id="bench", worker_instance_id="bench-1", lease_ttl_ms=LEASE_MS
        )
        assert handle is not None
        writer = await backend.open_writer(handle, mode=mode_of(mode))
        # Time for the reader to notice the attempt and to block in its read.
        await asyncio.sleep(0.3)
        start = time.monotonic()
        late = 0.0
        for i in range(count):
            due = start + i / rate
            if (wait := due - time.monotonic()) > 0:
                await asyncio.sleep(wait)
            now = time.monotonic_ns()
            late = max(late, now / 1e9 - due)
            writer.write(b"%d" % now)
        elapsed = time.monotonic() - start
        await writer.close()
        return {"rate": (count - 1) / elapsed, "behind_ms": late * 1000}


async def burst_read(url: str, execution_id: str, count: int) -> dict[str, object]:
    """Return for each frame the milliseconds from its write to its arrival here."""
    latencies: list[float] = []
    async with aio.ValkeyBackend.connect(url) as backend:
        async for item in backend.tail(execution_id):
            check(isinstance(item, StreamFrame), f"the tail yielded {item!r}")
            assert isinstance(item, StreamFrame)
            latencies.append((time.monotonic_ns() - int(item.payload)) / 1e6)
            if len(latencies) == count:
                break
    return {"latencies_ms": latencies}


# -- many streams -------------------------------------------------------------------------------------------------


def resident_bytes() -> int:
    """Return the resident memory of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def claim_many(backend: aio.ValkeyBackend, count: int, at_once: int = 64) -> list[Handle]:
    """Return the handles of *count* claimed executions."""
    found: list[Handle] = []
    while len(found) < count:
        group = min(at_once, count - len(found))
        claims = await asyncio.gather(*(claimed(backend) for _ in range(group)))
        found += [handle for _, handle in claims]
    return found


async def many_streams(
    url: str, streams: int, rate: int, seconds: float, mode: str
) -> dict[str, object]:
    """Write to *streams* streams at *rate* frames a second each, on one connection.

    About every millisecond the due frames are written, spread evenly over the streams. One frame in 101 is timed from
    its write to its acknowledgement.
    """
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, streams)
        writers = [
            await backend.open_writer(handle, mode=mode_of(mode), retention_maxlen=1000)
            for handle in handles
        ]
        latencies: list[float] = []
        memory: list[tuple[float, int]] = []
        probes: set[asyncio.Task[None]] = set()

        async def probe(writer: aio.Writer, written: float) -> None:
            await writer.flush()
            latencies.append((time.monotonic() - written) * 1000)

        total = int(streams * rate * seconds)
        frames = payloads(1000)
        done = 0
        cpu = time.process_time()
        start = time.monotonic()
        next_sample = start
        while done < total:
            now = time.monotonic()
            due = min(int((now - start) * streams * rate), total)
            for i in range(done, due):
                writer = writers[i % streams]
                writer.write(frames[i % 1000])
                if i % 101 == 0:
                    task = asyncio.create_task(probe(writer, time.monotonic()))
                    probes.add(task)
                    task.add_done_callback(probes.discard)
            done = due
            if now >= next_sample:
                memory.append((now - start, resident_bytes()))
                next_sample = now + 1.0
            await asyncio.sleep(0.001)
        written = time.monotonic() - start
        for writer in writers:
            await writer.flush()
        elapsed = time.monotonic() - start
        cpu = time.process_time() - cpu
        await asyncio.gather(*probes)
        check(sum(writer.last_sequence for writer in writers) == total, "frames are missing")
        for writer in writers:
            await writer.close()
        return {
            "offered_per_second": total / written,
            "per_second": total / elapsed,
            "client_us": cpu / total * 1e6,
            "latencies_ms": latencies,
            "memory": memory,
            "executions": [handle.fields().execution_id for handle in handles[:10]],
        }


async def idle_writers(url: str, count: int, frames: int) -> dict[str, float]:
    """Return the memory of each of *count* open writers, before and after their first frames."""
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, count)
        before = resident_bytes()
        writers = [await backend.open_writer(handle) for handle in handles]
        opened = resident_bytes()
        for writer in writers:
            for payload in payloads(frames):
                writer.write(payload)
            await writer.flush()
        used = resident_bytes()
        for writer in writers:
            await writer.close()
        return {"idle_bytes": (opened - before) / count, "used_bytes": (used - before) / count}


# -- reading ------------------------------------------------------------------------------------------------------


def read(url: str, execution_id: str, count: int, how: str) -> dict[str, float]:
    """Read every frame of an ended attempt, by a tail or in pages of 10,000."""
    clock = Clock()
    with ValkeyBackend.connect(url) as backend:
        clock.start()
        seen = 0
        if how == "tail":
            for item in backend.tail(execution_id):
                if type(item) is StreamFrame:
                    seen += 1
                else:
                    check(isinstance(item, End), f"the tail yielded {item!r}")
        else:
            page = backend.read_stream(execution_id, count=10_000)
            seen = len(page)
            while page.end_reason is None:
                page = backend.read_stream(execution_id, after=page.cursor, count=10_000)
                seen += len(page)
        check(seen == count, f"{seen} frames, not {count}")
        return clock.stop(count)


async def read_asyncio(url: str, execution_id: str, count: int, how: str) -> dict[str, float]:
    """Do the same as :func:`read` in asyncio."""
    clock = Clock()
    async with aio.ValkeyBackend.connect(url) as backend:
        clock.start()
        seen = 0
        if how == "tail":
            async for item in backend.tail(execution_id):
                if type(item) is StreamFrame:
                    seen += 1
                else:
                    check(isinstance(item, End), f"the tail yielded {item!r}")
        else:
            page = await backend.read_stream(execution_id, count=10_000)
            seen = len(page)
            while page.end_reason is None:
                page = await backend.read_stream(execution_id, after=page.cursor, count=10_000)
                seen += len(page)
        check(seen == count, f"{seen} frames, not {count}")
        return clock.stop(count)


# -- summary ------------------------------------------------------------------------------------------------------


async def write_patches(
    url: str, first: str, patches: Iterable[str], mode: str
) -> dict[str, object]:
    """Write *first*, then, timed, *patches* as fast as they are acknowledged."""
    clock = Clock()
    encoded = [patch.encode() for patch in patches]
    async with aio.ValkeyBackend.connect(url) as backend:
        eid, handle = await claimed(backend)
        writer = await backend.open_writer(handle, mode=mode_of(mode))
        writer.write(first.encode())
        await writer.flush()
        clock.start()
        for part in batches(encoded, YIELD_EVERY):
            for patch in part:
                writer.write(patch)
            await asyncio.sleep(0)
            await writer.drain()
        await writer.flush()
        metrics: dict[str, object] = dict(clock.stop(len(encoded)))
        await writer.close()
        return {**metrics, "execution_id": eid}


async def write_answer(
    url: str, tokens: list[str], rate: int, linger_ms: float
) -> dict[str, object]:
    """Append *tokens* to the summary one by one, at *rate* a second or, if that is 0, as fast as possible."""
    async with aio.ValkeyBackend.connect(url) as backend:
        eid, handle = await claimed(backend)
        writer = await backend.open_writer(handle, mode=mode_of("append"), linger=linger_ms / 1000)
        writer.write("", mode=mode_of("append"))
        start = time.monotonic()
        for i, token in enumerate(tokens):
            if rate:
                due = start + i / rate
                if (wait := due - time.monotonic()) > 0:
                    await asyncio.sleep(wait)
            elif i % YIELD_EVERY == 0:
                await asyncio.sleep(0)
            writer.write(token.encode())
        await writer.flush()
        await writer.close()
        return {"execution_id": eid}


# -- executions ---------------------------------------------------------------------------------------------------


async def lifecycle(url: str, lane: str, count: int, tasks: int) -> dict[str, float]:
    """Create, claim and complete *count* executions: *tasks* creators and as many claimers on one connection."""
    clock = Clock()
    to_create = iter(range(count))
    completed = 0

    async with aio.ValkeyBackend.connect(url) as backend:

        async def create() -> None:
            for i in to_create:
                await backend.create_execution(lane=lane, payload=b"%d" % i)

        async def work() -> None:
            nonlocal completed
            while completed < count:
                handle = await backend.claim(
                    lane=lane, worker_id="bench", worker_instance_id="bench-1"
                )
                if handle is None:
                    # Only creators on this event loop can make work, so they need a turn.
                    await asyncio.sleep(0.001)
                    continue
                await backend.complete(handle, b"done")
                completed += 1

        clock.start()
        async with asyncio.TaskGroup() as group:
            for _ in range(tasks):
                group.create_task(create())
                group.create_task(work())
        return clock.stop(count)


async def create_paced(url: str, lane: str, count: int) -> dict[str, int]:
    """Create executions about 10 ms apart; return the start of each call."""
    spread = random.Random(14)
    created: dict[str, int] = {}
    async with aio.ValkeyBackend.connect(url) as backend:
        for _ in range(count):
            await asyncio.sleep(spread.uniform(0.008, 0.012))
            now = time.monotonic_ns()
            created[await backend.create_execution(lane=lane)] = now
    return created


async def claim_aio(url: str, lane: str, count: int) -> dict[str, tuple[int, int]]:
    """Wait for executions and complete them; return for each the start of the wait and the arrival of its handle."""
    claimed: dict[str, tuple[int, int]] = {}
    async with aio.ValkeyBackend.connect(url) as backend:
        for _ in range(count):
            began = time.monotonic_ns()
            handle = await backend.claim(
                lane=lane, worker_id="bench", worker_instance_id="bench-1", policy=WAIT
            )
            now = time.monotonic_ns()
            assert handle is not None
            claimed[handle.fields().execution_id] = (began, now)
            await backend.complete(handle)
    return claimed


def claim_sync(url: str, lane: str, count: int) -> dict[str, tuple[int, int]]:
    """Do the same as :func:`claim_aio` by the blocking interface."""
    claimed: dict[str, tuple[int, int]] = {}
    with ValkeyBackend.connect(url) as backend:
        for _ in range(count):
            began = time.monotonic_ns()
            handle = backend.claim(
                lane=lane, worker_id="bench", worker_instance_id="bench-1", policy=WAIT
            )
            now = time.monotonic_ns()
            assert handle is not None
            claimed[handle.fields().execution_id] = (began, now)
            backend.complete(handle)
    return claimed
