"""Many streams at a model's own pace: the jobs of P15 to P17, ours and redis-py's, which have the same shape.

A worker's process has a task for each stream, a gateway's process one for each reader. A job has stages (see
:mod:`bench.child`): one answer when its streams are open, or its readers have their first frame, and one at the end. Between
the two each task writes on a schedule of its own, with a random phase. A payload is the time of its write; the first
and the last frame of a stream are marks that are not timed.
"""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from typing import TYPE_CHECKING, NamedTuple, cast

import redis.asyncio

from bench.figures import percentile
from bench.jobs import claim_many, mode_of
from bench.rivals import entries_of, fields
from ff_fast import StreamFrame, aio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

FIRST, LAST = b"0", b"-1"
# How long the schedule alone is measured.
CALIBRATION_S = 1.0
# Entries that redis-py takes from one XREAD, and the wait of that XREAD.
XREAD_COUNT, XREAD_MS = 1000, 2000


class Pace(NamedTuple):
    """The frames of a worker.

    Attributes:
        streams: Number of streams.
        rate: Frames a second of each.
        seconds: How long they are written.
    """

    streams: int
    rate: int
    seconds: float

    async def keep(self, puts: Sequence[Callable[[bytes], object]]) -> Written:
        """Call each of *puts* on schedule, and return what was written."""
        return await self._run([self._stream(put, i) for i, put in enumerate(puts)])

    async def keep_awaited(self, puts: Sequence[Callable[[bytes], Awaitable[object]]]) -> Written:
        """Do the same, and await each of the calls before the next of its stream."""
        return await self._run([self._awaited_stream(put, i) for i, put in enumerate(puts)])

    async def _run(self, streams: Sequence[Awaitable[tuple[int, float]]]) -> Written:
        start = time.perf_counter()
        found = await asyncio.gather(*streams)
        wall = time.perf_counter() - start
        return Written([count for count, _ in found], max(late for _, late in found), wall)

    async def _stream(self, put: Callable[[bytes], object], number: int) -> tuple[int, float]:
        clock, clock_ns, sleep, period = (
            time.monotonic,
            time.monotonic_ns,
            asyncio.sleep,
            1 / self.rate,
        )
        end, due = self._times(number)
        written, late = 0, 0.0
        while due < end and (now := clock()) < end:
            await sleep(max(due - now, 0.0))
            now_ns = clock_ns()
            late = max(late, now_ns * 1e-9 - due)
            put(b"%d" % now_ns)
            written += 1
            due += period
        return written, late

    async def _awaited_stream(
        self, put: Callable[[bytes], Awaitable[object]], number: int
    ) -> tuple[int, float]:
        clock, clock_ns, sleep, period = (
            time.monotonic,
            time.monotonic_ns,
            asyncio.sleep,
            1 / self.rate,
        )
        end, due = self._times(number)
        written, late = 0, 0.0
        while due < end and (now := clock()) < end:
            await sleep(max(due - now, 0.0))
            now_ns = clock_ns()
            late = max(late, now_ns * 1e-9 - due)
            await put(b"%d" % now_ns)
            written += 1
            due += period
        return written, late

    def _times(self, number: int) -> tuple[float, float]:
        """Return when a stream ends, and when its first frame is due."""
        now = time.monotonic()
        return now + self.seconds, now + random.Random(number).uniform(0, 1 / self.rate)


class Written(NamedTuple):
    """What was written on schedule.

    Attributes:
        counts: Number of frames, for each stream.
        behind_s: Greatest delay of a write behind its schedule.
        wall_s: Time from the first to the last.
    """

    counts: list[int]
    behind_s: float
    wall_s: float

    def answer(self, cpu: float, pacing_us: float) -> dict[str, object]:
        total = sum(self.counts)
        worker_us = cpu / total * 1e6
        return {
            "counts": self.counts,
            "metrics": {
                "written_per_second": total / self.wall_s,
                "behind_ms": self.behind_s * 1e3,
                "worker_us": worker_us,
                "pacing_us": pacing_us,
                "worker_beyond_us": worker_us - pacing_us,
            },
        }


async def pacing_cost(pace: Pace) -> float:
    """Return the microseconds of CPU that the schedule takes for a frame, with nothing written."""
    empty = pace._replace(seconds=min(CALIBRATION_S, pace.seconds))
    cpu = time.process_time()
    written = await empty.keep([lambda _: None] * pace.streams)
    return (time.process_time() - cpu) / sum(written.counts) * 1e6


# -- writing ------------------------------------------------------------------------------------------------------


async def write(
    url: str, streams: int, rate: int, seconds: float, mode: str
) -> AsyncIterator[dict[str, object]]:
    """ff_fast: `Writer.write` on schedule."""
    pace = Pace(streams, rate, seconds)
    async with aio.ValkeyBackend.connect(url) as backend:
        handles = await claim_many(backend, streams)
        writers = [await backend.open_writer(handle, mode=mode_of(mode)) for handle in handles]
        for writer in writers:
            writer.write(FIRST)
        await flush(writers)
        pacing_us = await pacing_cost(pace)
        yield {"streams": [handle.fields().execution_id for handle in handles]}
        cpu = time.process_time()
        written = await pace.keep([writer.write for writer in writers])
        await flush(writers)
        cpu = time.process_time() - cpu
        for writer in writers:
            writer.write(LAST)
        await flush(writers)
        yield written.answer(cpu, pacing_us)
        for writer in writers:
            await writer.close()


async def flush(writers: Sequence[aio.Writer]) -> None:
    """Flush all at once, as the tasks of a worker would."""
    await asyncio.gather(*(writer.flush() for writer in writers))


async def redis_write(
    url: str, streams: int, rate: int, seconds: float
) -> AsyncIterator[dict[str, object]]:
    """redis-py asyncio: awaited XADD on schedule, on connections of one pool."""
    pace = Pace(streams, rate, seconds)
    keys = [uuid.uuid4().hex for _ in range(streams)]
    async with connected(url, streams) as client:
        for key in keys:
            await client.xadd(key, fields(FIRST))

        def put_to(key: str) -> Callable[[bytes], Awaitable[object]]:
            async def put(payload: bytes) -> None:
                await client.xadd(key, fields(payload))

            return put

        pacing_us = await pacing_cost(pace)
        yield {"streams": keys}
        cpu = time.process_time()
        written = await pace.keep_awaited([put_to(key) for key in keys])
        cpu = time.process_time() - cpu
        for key in keys:
            await client.xadd(key, fields(LAST))
        yield written.answer(cpu, pacing_us)


def connected(url: str, connections: int) -> redis.asyncio.Redis:
    """Return a client with a pool of as many connections as its tasks need at once."""
    return redis.asyncio.Redis.from_url(
        url.replace("valkey:", "redis:", 1), max_connections=connections + 1
    )


# -- reading ------------------------------------------------------------------------------------------------------


class Arrivals:
    """What the readers of a gateway have seen."""

    def __init__(self, readers: int, timed_every: int) -> None:
        self.counts = [0] * readers
        self.timed_every = timed_every
        self.latencies_ns: list[int] = []
        self.all_ready = asyncio.Event()
        self._waiting = readers

    def is_timed(self, reader: int) -> bool:
        return reader % self.timed_every == 0

    def ready(self) -> None:
        """Note that one more reader has its first frame."""
        self._waiting -= 1
        if not self._waiting:
            self.all_ready.set()

    async def stages(self, readers: Sequence[Awaitable[None]]) -> AsyncIterator[dict[str, object]]:
        """Run the readers."""
        all_read = asyncio.gather(*readers)
        all_read.add_done_callback(lambda _: self.all_ready.set())
        await self.all_ready.wait()
        if all_read.done():
            # Readers that end before the first stage have failed.
            await all_read
        yield {}
        cpu, wall = time.process_time(), time.perf_counter()
        await all_read
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        total = sum(self.counts)
        ms = [latency / 1e6 for latency in self.latencies_ns]
        yield {
            "counts": self.counts,
            "metrics": {
                "gateway_us": cpu / total * 1e6,
                "delivered_per_second": total / wall,
                "p50_ms": percentile(ms, 0.50),
                "p99_ms": percentile(ms, 0.99),
                "max_ms": max(ms),
            },
        }


async def read(
    url: str, streams: list[str], timed_every: int = 1
) -> AsyncIterator[dict[str, object]]:
    """ff_fast: a tail for each of *streams*; every *timed_every*-th of them times its frames."""
    arrivals = Arrivals(len(streams), timed_every)
    async with aio.ValkeyBackend.connect(url) as backend:

        async def reader(number: int, execution_id: str) -> None:
            clock, took, timed = (
                time.monotonic_ns,
                arrivals.latencies_ns.append,
                arrivals.is_timed(number),
            )
            count = 0
            async for item in backend.tail(execution_id):
                assert type(item) is StreamFrame, f"the tail yielded {item!r}"
                payload = item.payload
                if payload == LAST:
                    break
                if payload == FIRST:
                    arrivals.ready()
                    continue
                count += 1
                if timed:
                    took(clock() - int(payload))
            arrivals.counts[number] = count

        async for answer in arrivals.stages([reader(i, eid) for i, eid in enumerate(streams)]):
            yield answer


async def redis_read(
    url: str, streams: list[str], timed_every: int = 1
) -> AsyncIterator[dict[str, object]]:
    """redis-py asyncio: a blocking XREAD for each of *streams*, on a connection of its own."""
    arrivals = Arrivals(len(streams), timed_every)
    async with connected(url, len(streams)) as client:

        async def reader(number: int, key: str) -> None:
            clock, took, timed = (
                time.monotonic_ns,
                arrivals.latencies_ns.append,
                arrivals.is_timed(number),
            )
            count, last = 0, b"0-0"
            while True:
                answer = cast(
                    "dict[bytes, object] | list[object]",
                    await client.xread({key: last}, count=XREAD_COUNT, block=XREAD_MS),
                )
                if not answer:
                    continue
                entries = entries_of(answer)
                last = entries[-1][0]
                for _, entry in entries:
                    payload = entry[b"payload"]
                    if payload == LAST:
                        arrivals.counts[number] = count
                        return
                    if payload == FIRST:
                        arrivals.ready()
                        continue
                    count += 1
                    if timed:
                        took(clock() - int(payload))

        async for answer in arrivals.stages([reader(i, key) for i, key in enumerate(streams)]):
            yield answer
