"""The writers that `append_frame` opens by itself: none outlives its lease, whoever ends it."""

import asyncio
import gc

import pytest

from ff_fast import FFError, Frame, FrameKind
from ff_fast._core.leases import is_lease_lost
from ff_fast.errors import SequenceGap, WriterSuperseded

from ..waiting import wait_until_async
from .stored import claimed, stored_once


def event(data, **fields):
    return Frame(data, FrameKind.EVENT, **fields)


def kept(backend):
    gc.collect()
    return len(backend.wrapped._frame_writers), len(backend.wrapped._senders.writers)


async def test_a_lease_that_somebody_else_ended_frees_its_writer(shell, server, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        for _ in range(5):
            eid, handle = await claimed(backend, lane)
            await backend.append_frame(handle, event(b"1"))
            await other.cancel(eid)
            for _ in range(2):
                # The second one opens a writer, and is refused for the same reason.
                with pytest.raises(FFError) as caught:
                    await backend.append_frame(handle, event(b"2"))
                assert is_lease_lost(caught.value)
                del caught
        assert kept(backend) == (0, 0)


@pytest.mark.long
async def test_leases_that_lapse_in_silence_free_their_writers(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        for _ in range(5):
            _, handle = await claimed(backend, lane, lease_ttl_ms=1_500)
            await backend.append_frame(handle, event(b"1"))
        eid, _ = await claimed(backend, lane)

        async def freed():
            await backend.describe(eid)
            return kept(backend) == (0, 0)

        await wait_until_async(freed)


async def test_a_kept_lease_that_is_lost_frees_its_writer(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        await backend.append_frame(handle, event(b"1"))
        keeper = backend.wrapped.keep_lease(handle)
        await backend.cancel(eid)
        await wait_until_async(lambda: _of(keeper.error is not None))
        assert is_lease_lost(keeper.error)
        stopped = await asyncio.to_thread(keeper.stop) if shell.kind == "sync" else keeper.stop()
        if stopped is not None:
            await stopped
        assert kept(backend)[0] == 0


async def _of(value):
    return value


async def test_after_a_failure_the_next_frame_has_a_writer_of_its_own(shell, server, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        eid, handle = await claimed(backend, lane)
        await backend.append_frame(handle, event(b"1", seq=1))
        await other.append_frame(handle, event(b"2", seq=2))
        with pytest.raises(WriterSuperseded):
            await backend.append_frame(handle, event(b"lost"))
        # What the failed writer has stored is no sequence of the next one.
        with pytest.raises(SequenceGap):
            await backend.append_frame(handle, event(b"1", seq=1))
        assert (await backend.append_frame(handle, event(b"3", seq=3))).frame_count == 3
    stored_once(server.url, eid, [b"1", b"2", b"3"])
