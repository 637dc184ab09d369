"""A caller that is cancelled takes itself away and nothing else: the connection, the other callers and the frames stay."""

import asyncio
import contextlib

import pytest

from ff_fast import Frame, FrameKind, aio, keys
from ff_fast._aio.connection import Connection
from ff_fast.errors import DeadlineExceeded, WriterClosed

from ..shells import config
from ..waiting import wait_until_async
from .chaos import DOWN, UP
from .stored import stored_once

STEPS = 14


async def opened(url, lane, **limits):
    backend = await aio.ValkeyBackend.connect(config(url, **limits))
    eid = await backend.create_execution(lane=lane)
    handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
    return backend, eid, handle


def tasks():
    return asyncio.all_tasks() - {asyncio.current_task()}


async def cancelled_at(step, coroutine):
    """Run *coroutine* for *step* turns of the loop, cancel it, and wait until it has gone."""
    task = asyncio.ensure_future(coroutine)
    for _ in range(step):
        await asyncio.sleep(0)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


CALLS = {
    "flush": lambda b, h, w, eid: w.flush(),
    "drain": lambda b, h, w, eid: w.drain(),
    "append_frame": lambda b, h, w, eid: b.append_frame(h, Frame(b"{}", FrameKind.EVENT)),
    "describe": lambda b, h, w, eid: b.describe(eid),
    "renew": lambda b, h, w, eid: b.renew(h),
    "create": lambda b, h, w, eid: b.create_execution(lane="cancelled"),
    "claim": lambda b, h, w, eid: b.claim(
        lane="nothing-here", worker_id="w", worker_instance_id="w-1"
    ),
    "read_stream": lambda b, h, w, eid: b.read_stream(eid),
    "read_summary": lambda b, h, w, eid: b.read_summary(eid),
    "tail": lambda b, h, w, eid: _first(b.tail(eid)),
}


async def _first(generator):
    async with contextlib.aclosing(generator) as items:
        return await anext(items)


@pytest.mark.parametrize("name", CALLS)
async def test_a_cancelled_caller_disturbs_nobody(name, proxy, server, lane):
    backend, eid, handle = await opened(proxy.url, lane)
    other, other_eid, other_handle = backend, *(await _another(backend, lane))
    writer = await backend.open_writer(handle)
    streaming = await other.open_writer(other_handle)
    written, appended = 0, 0
    connections = proxy.accepted
    for step in range(STEPS):
        for _ in range(20):
            streaming.write(b"%d" % written)
            written += 1
        writer.write(b"mine")
        appended += 1
        reading = asyncio.ensure_future(backend.describe(other_eid))
        before = writer.next_sequence
        await cancelled_at(step, CALLS[name](backend, handle, writer, eid))
        appended += writer.next_sequence - before
        assert (await reading).state == "active"
    await streaming.flush(5)
    await writer.flush(5)
    assert writer.next_sequence - 1 == appended
    if name != "tail":
        # Nothing was dropped and made again: the shared connection is the first one.
        assert proxy.accepted == connections
    # An abandoned claim gives back what it took.
    await wait_until_async(lambda: _true(not tasks()))
    assert not writer._waiters
    await backend.close()
    stored_once(server.url, other_eid, [b"%d" % i for i in range(written)])


async def _another(backend, lane):
    eid = await backend.create_execution(lane=lane)
    return eid, await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-2")


@pytest.mark.parametrize("name", ["flush", "describe", "renew", "create", "read_stream", "claim"])
async def test_wait_for_on_held_replies(name, proxy, server, lane):
    backend, eid, handle = await opened(proxy.url, lane)
    writer = await backend.open_writer(handle)
    connections = proxy.accepted
    proxy.hold(DOWN)
    writer.write(b"1")
    others = [asyncio.ensure_future(backend.describe(eid)) for _ in range(3)]
    for _ in range(5):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(CALLS[name](backend, handle, writer, eid), 0.02)
    proxy.release()
    assert {result.state for result in await asyncio.gather(*others)} == {"active"}
    await writer.flush(5)
    assert proxy.accepted == connections
    await wait_until_async(lambda: _true(not tasks()))
    await backend.close()
    stored_once(server.url, eid, [b"1"])


async def test_replies_after_a_cancelled_call_stay_paired(proxy, lane):
    """The classic: an answer that nobody waits for any more goes to the next caller."""
    backend, first, _ = await opened(proxy.url, lane)
    eids = [await backend.create_execution(lane=lane) for _ in range(20)]
    proxy.hold(DOWN)
    calls = {eid: asyncio.ensure_future(backend.describe(eid)) for eid in eids}
    await wait_until_async(lambda: _true(proxy.waiting(DOWN)))
    for eid in eids[::2]:
        calls[eid].cancel()
    proxy.release()
    for eid in eids[1::2]:
        assert (await calls[eid]).execution_id == eid
    assert (await backend.describe(first)).execution_id == first
    await asyncio.gather(*calls.values(), return_exceptions=True)
    await backend.close()


async def _true(value):
    return value


async def test_cancelled_while_connecting(proxy, lane):
    for step in range(STEPS):
        await cancelled_at(step, _connected_and_closed(proxy.url))
        assert not tasks()
    await wait_until_async(lambda: _true(proxy.connections == 0))


async def _connected_and_closed(url):
    async with aio.ValkeyBackend.connect(url) as backend:
        await backend.describe(keys.new_execution_id())


async def test_cancelling_the_caller_that_reconnects_leaves_the_others_their_connection(
    proxy, lane
):
    backend, eid, _ = await opened(proxy.url, lane)
    for step in range(STEPS):
        proxy.cut_all()
        await wait_until_async(lambda: _true(backend._nodes.first.shared.connection is None))
        first = asyncio.ensure_future(backend.describe(eid))
        others = [asyncio.ensure_future(backend.describe(eid)) for _ in range(3)]
        for _ in range(step):
            await asyncio.sleep(0)
        first.cancel()
        for other in others:
            assert (await other).execution_id == eid
        with contextlib.suppress(asyncio.CancelledError):
            await first
    assert not tasks()
    await backend.close()


async def test_cancelled_while_closing(proxy, lane):
    for step in range(8):
        backend, _, handle = await opened(proxy.url, f"{lane}-{step}")
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await cancelled_at(step, backend.close())
        await cancelled_at(step, backend.close())
        await backend.close()
        assert isinstance(writer.error, WriterClosed)
        assert not tasks()
    await wait_until_async(lambda: _true(proxy.connections == 0))


async def test_cancelled_while_a_writer_closes(proxy, server, lane):
    for step in range(8):
        backend, eid, handle = await opened(proxy.url, f"{lane}-{step}")
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await cancelled_at(step, writer.close())
        await writer.close()
        await backend.close()
        stored_once(server.url, eid, [b"1"])


async def test_closing_while_everything_is_under_way(proxy, lane):
    backend, eid, handle = await opened(proxy.url, lane)
    writer = await backend.open_writer(handle)
    proxy.hold(UP, DOWN)
    writer.write(b"lost")
    waiting = [
        asyncio.ensure_future(each)
        for each in (
            writer.flush(),
            backend.describe(eid),
            backend.renew(handle),
            _first(backend.tail(eid)),
            backend.claim(lane=lane, worker_id="w", worker_instance_id="w"),
        )
    ]
    for _ in range(20):
        await asyncio.sleep(0)
    await asyncio.wait_for(backend.close(), 1)
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 1)
    assert not [result for result in results if not isinstance(result, Exception)]
    assert all(hasattr(result, "outcome") for result in results), results
    assert [frame.payload for frame in writer.error.unstored] == [b"lost"]
    assert not tasks()
    proxy.release()


async def test_a_timeout_of_flush_leaves_the_frames_on_their_way(proxy, server, lane):
    backend, eid, handle = await opened(proxy.url, lane)
    writer = await backend.open_writer(handle)
    proxy.hold(DOWN)
    writer.write(b"1")
    for _ in range(3):
        with pytest.raises(DeadlineExceeded):
            await writer.flush(0.02)
    with pytest.raises(DeadlineExceeded):
        await writer.close(0.02)
    proxy.release()
    await writer.close()
    await backend.close()
    stored_once(server.url, eid, [b"1"])


@pytest.mark.standalone("a cluster has one database")
async def test_no_cancellation_is_lost_while_a_connection_is_made(server):
    """redis-py sends the commands of the handshake by a function of asyncio that may drop one."""
    loop = asyncio.get_running_loop()
    given = config(server.url)
    given = given.replace(connection=given.connection.replace(db=1))
    cancelled = []
    for step in range(60):
        connection = Connection()
        task = asyncio.create_task(connection.open(given))
        for _ in range(step):
            await asyncio.sleep(0)
        # Between a future of the handshake and the task that waits for it.
        struck = loop.create_future()
        loop.call_soon(lambda task=task, struck=struck: struck.set_result(task.cancel()))
        await asyncio.wait({task})
        if await struck:
            assert task.cancelled()
            assert connection.closed
            cancelled.append(step)
        connection.abort()
        await connection.wait_closed()
    assert cancelled
