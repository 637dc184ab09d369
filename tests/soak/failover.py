"""A failover that loses what was not replicated, beside the load: what the writer, the worker and readers are told.

It has servers of its own, since the other checks rest on a server that loses nothing.
"""

import asyncio
import contextlib

from ff_fast import End, Gap, StreamFrame, keys
from ff_fast.errors import FFError

from ..faults.failover import Failover
from ..shells import Shell
from .job import MODES

FRAMES = 60


async def run(account, dice, kind):
    """Write and read through one failover; tell the account what does not hold."""
    pair = await asyncio.to_thread(Failover)
    try:
        shell = Shell(kind)
        async with await shell.connect(pair.url) as backend, await shell.connect(pair.url) as other:
            backend.kind = other.kind = kind
            for text in await _through(pair, backend, other, dice):
                account.violation(f"failover, {kind}: {text}")
    finally:
        await asyncio.to_thread(pair.close)


async def _through(pair, backend, other, dice):
    eid = await backend.create_execution(lane="failover")
    handle = await backend.claim(lane="failover", lease_ttl_ms=600_000)
    mode = MODES[dice.choice(("durable", "best_effort"))]
    stalls, promotes = sorted(dice.sample(range(1, FRAMES + 1), 2))
    if dice.random() < 0.5:
        promotes = FRAMES
    items = []
    reading = asyncio.create_task(_read(other, eid, items, dice.random() < 0.5))
    written, error = [], None

    async def write(count):
        writer = await backend.open_writer(handle)
        for _ in range(count):
            if len(written) == stalls:
                await asyncio.to_thread(pair.stall)
            written.append(keys.new_uuid().encode())
            writer.write(written[-1], mode=mode)
            if dice.random() < 0.3 or len(written) == promotes:
                await writer.flush(20)
            if len(written) == promotes:
                await asyncio.to_thread(pair.promote)
        await writer.close(20)

    try:
        await write(FRAMES)
        await backend.complete(handle)
    except FFError as caught:
        error = caught
        # Told of the loss, a worker may go on, with other frames in the place of those that are gone.
        with contextlib.suppress(FFError):
            await write(FRAMES)
            await backend.complete(handle)
        with contextlib.suppress(FFError):
            await backend.cancel(eid)
    page, wrong = (), []
    try:
        page = await backend.read_stream(eid, 0, count=10_000)
    except FFError as lost:
        if error is None:
            wrong.append(f"the attempt was completed, and is lost: {lost!r}")
    stored = {frame.sequence: frame.payload for frame in page}
    if error is None and [stored[sequence] for sequence in sorted(stored)] != written:
        wrong.append(f"completed with {len(stored)} of {FRAMES} frames, and nobody was told")
    try:
        await asyncio.wait_for(reading, 30)
    except FFError:
        # It is told that there is no such execution any more.
        return wrong
    except TimeoutError:
        return [
            *wrong,
            f"a reader has no end after {len(items)} items; the writer was told {error!r}",
        ]
    return [*wrong, *_silent(items, stored)]


async def _read(backend, eid, items, reopens):
    """Read to the end; with *reopens* the reader goes on from its cursor after each batch."""
    cursor = None
    while not items or not isinstance(items[-1], End):
        tail = backend.wrapped.tail(eid, after=cursor)
        while not tail.ended:
            if backend.kind == "sync":
                batch = await asyncio.to_thread(tail.next_batch, 0.2)
            else:
                batch = await tail.next_batch(0.2)
            items += batch
            cursor = tail.cursor or cursor
            if reopens and batch:
                break
        await (asyncio.to_thread(tail.close) if backend.kind == "sync" else tail.aclose())


def _silent(items, stored):
    """What differs between a reader's frames and the stored ones without a gap that says so."""
    at, got, told = 0, {}, False
    for item in items:
        if isinstance(item, Gap):
            at, told = item.next_sequence - 1, True
        elif isinstance(item, StreamFrame):
            if item.sequence != at + 1:
                yield f"a reader got {item.sequence} after {at}"
            at = item.sequence
            got[at] = item.payload
    if not told and got != stored:
        yield f"a reader got {len(got)} frames, other than the {len(stored)} that are stored, and no gap"
