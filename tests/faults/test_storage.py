"""A server whose disk is slow to be written, lost, or full, or whose memory is full: what is stored is whole, or the loss
is told.
"""

import asyncio
import contextlib
import os
import signal
from pathlib import Path

import pytest
import redis

from ff_fast import keys
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import (
    DeadlineExceeded,
    ExecutionNotFound,
    Outcome,
    OutOfMemory,
    SequenceGap,
    StorageUnavailable,
)

from ..conftest import connect_raw
from ..waiting import wait_until
from .stored import claimed, frames, stored_once


async def test_kills_by_force_with_a_log_that_is_synced_each_second(shell, lane):
    """The system keeps what the server wrote. A server that waits for the disk may acknowledge what it has not written."""
    with EmbeddedServer(appendonly=True, appendfsync="everysec") as server:
        async with await shell.connect(server.url) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            payloads = [b"%d" % i for i in range(300)]
            lost = None
            try:
                for i, payload in enumerate(payloads):
                    writer.write(payload)
                    if i % 100 == 50:
                        os.kill(server.pid, signal.SIGKILL)
                        await asyncio.to_thread(server.restart)
                await writer.flush(20)
                await writer.close()
            except SequenceGap as error:
                lost = error
        if lost is None:
            stored_once(server.url, eid, payloads)
        else:
            # Nothing is lost in silence: the error says where the stream ends, and what it lacks behind that is unstored.
            stored_once(server.url, eid, payloads[: lost.expected - 1])
            assert payloads[lost.got - 1 :] == [frame.payload for frame in lost.unstored]


@pytest.mark.parametrize("replay_ms", [60_000, 0])
async def test_a_kill_by_force_with_snapshots_alone_loses_what_nobody_keeps(replay_ms, shell, lane):
    """A writer stores again what it keeps, and is told of what it does not keep."""
    with EmbeddedServer(save="3600 1") as server, contextlib.ExitStack() as stack:
        raw = stack.enter_context(connect_raw(server.url))
        async with await shell.connect(server.url, replay_ms=replay_ms) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            for i in range(1, 11):
                writer.write(b"%d" % i)
            await writer.flush(5)
            raw.save()
            later = await backend.create_execution(lane=lane)
            for i in range(11, 21):
                writer.write(b"%d" % i)
            await writer.flush(5)
            os.kill(server.pid, signal.SIGKILL)
            await asyncio.to_thread(server.restart)
            writer.write(b"21")
            payloads = [b"%d" % i for i in range(1, 22)]
            if replay_ms:
                await writer.flush(20)
            else:
                with pytest.raises(SequenceGap) as caught:
                    await writer.flush(20)
                assert (caught.value.expected, caught.value.got) == (11, 21)
                assert [frame.payload for frame in caught.value.unstored] == [b"21"]
                with pytest.raises(SequenceGap):
                    writer.write(b"22")
                # The lease of the snapshot is this worker's own, so it may go on from what is stored.
                writer = await backend.open_writer(handle)
                assert writer.next_sequence == 11
                writer.write(b"11 again")
                payloads[10:] = [b"11 again"]
            with pytest.raises(ExecutionNotFound):
                await backend.describe(later)
            await writer.close()
            await backend.complete(handle)
        stored_once(server.url, eid, payloads)


# -- a full disk -----------------------------------------------------------------------------------------------------------


def fill_disk(raw):
    """Begin a new log on a disk without room; return the log's path."""
    log = Path(raw.config_get("dir")["dir"], "appendonlydir", "appendonly.aof.2.incr.aof")
    log.symlink_to("/dev/full")
    raw.bgrewriteaof()
    return log


def rewritten(raw):
    wait_until(lambda: not raw.info("persistence")["aof_rewrite_in_progress"], 20)


def misconfigured(raw):
    try:
        raw.set("something", "changed")
    except redis.ResponseError as error:
        return "MISCONF" in str(error)
    return False


async def test_a_full_disk_under_a_log_that_is_synced_each_second(shell, lane):
    with EmbeddedServer(appendonly=True, appendfsync="everysec") as server:
        async with (
            await shell.connect(server.url) as backend,
            await shell.connect(server.url, retries=2, factor=1) as hasty,
        ):
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            _, hasty_handle = await claimed(hasty, lane)
            hasty_writer = await hasty.open_writer(hasty_handle)
            with connect_raw(server.url) as raw:
                rewritten(raw)
                fill_disk(raw)
                # Frames that the server takes before it notices are acknowledged, and stay.
                payloads = [b"%d" % i for i in range(500)]
                writer.write(payloads[0])
                await asyncio.sleep(0)
                wait_until(lambda: misconfigured(raw))
                with pytest.raises(StorageUnavailable) as caught:
                    await hasty.renew(handle)
                assert caught.value.outcome is Outcome.NOT_APPLIED
                hasty_writer.write(b"never")
                with pytest.raises(StorageUnavailable) as caught:
                    await hasty_writer.flush(5)
                assert caught.value.outcome is Outcome.NOT_APPLIED
                assert [frame.payload for frame in caught.value.unstored] == [b"never"]
                for payload in payloads[1:]:
                    writer.write(payload)
                with pytest.raises(DeadlineExceeded):
                    await writer.flush(0.2)
                assert writer.error is None
                assert len(await backend.read_stream(eid, 0)) <= 1
                # With room, the next log is an ordinary file.
                rewritten(raw)
                raw.bgrewriteaof()
                await writer.flush(20)
                await writer.close()
                rewritten(raw)
            stored_once(server.url, eid, payloads)
            await asyncio.to_thread(server.restart)
            stored_once(server.url, eid, payloads)


async def test_a_full_disk_under_a_log_that_is_synced_always(shell, lane):
    with EmbeddedServer(appendonly=True, appendfsync="always") as server:
        async with (
            await shell.connect(server.url) as backend,
            await shell.connect(server.url, retries=0) as hasty,
        ):
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            writer.write(b"1")
            await writer.flush(5)
            await hasty.describe(eid)
            with connect_raw(server.url) as raw:
                rewritten(raw)
                log = fill_disk(raw)
            # The server ends in place of an answer.
            with pytest.raises(Exception) as caught:  # noqa: PT011 - its outcome is what counts
                await hasty.renew(handle)
            assert caught.value.outcome is Outcome.UNKNOWN
            wait_until(lambda: not server.running)
            for i in range(2, 300):
                writer.write(b"%d" % i)
            log.unlink()
            log.touch()
            await asyncio.to_thread(server.restart)
            await writer.flush(20)
            await backend.renew(handle)
            await writer.close()
        stored_once(server.url, eid, [b"%d" % i for i in range(1, 300)])


# -- full memory -----------------------------------------------------------------------------------------------------------


async def test_full_memory_stops_writes_alone_and_they_go_on_when_there_is_room(
    shell, own_server, lane
):
    payloads = [b"%03d" % i + bytes(65_000) for i in range(150)]
    async with (
        await shell.connect(own_server.url) as backend,
        await shell.connect(own_server.url, retries=2, factor=1) as hasty,
    ):
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(payloads[0])
        await writer.flush(5)
        with connect_raw(own_server.url) as raw:
            used = raw.info("memory")["used_memory"]
            raw.config_set("maxmemory", str(used + (4 << 20)))
            for payload in payloads[1:]:
                writer.write(payload)
            with pytest.raises(DeadlineExceeded):
                await writer.flush(0.2)
            assert writer.error is None
            assert 1 <= writer.last_sequence < len(payloads)
            # A small call may still fit where the next batch does not; now nothing does.
            raw.config_set("maxmemory", str(used))
            with pytest.raises(OutOfMemory) as caught:
                await hasty.progress(handle, percent=1)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            # What was acknowledged can be read, and memory given back.
            assert raw.xtrim(keys.live(eid, 0), maxlen=0) == 0
            known = writer.last_sequence
            found = await asyncio.to_thread(frames, own_server.url, eid)
            assert len(found) >= known
            assert [frame.payload for frame in found] == payloads[: len(found)]
            raw.config_set("maxmemory", "0")
            await writer.flush(20)
            await hasty.progress(handle, percent=1)
            await writer.close()
    stored_once(own_server.url, eid, payloads)
