"""Connections that die in silence: no reset, no end, no answer. They are replaced like any other that is lost."""

import asyncio
import threading

import pytest

import ff_fast
from ff_fast import aio
from ff_fast.errors import DeadlineExceeded, Outcome
from ff_fast.types import ClaimPolicy

from ..conftest import connect_raw
from ..shells import config
from ..waiting import wait_until, wait_until_async
from .chaos import DOWN
from .stored import claimed, stored_once

# Longer than a busy machine keeps a process from its core, which looks like silence.
TIMEOUT_S = 0.8


async def _true(value):
    return value


async def with_idle_connections(backend, proxy, count, eid):
    """Make *count* calls at once, so that the blocking shell keeps as many connections."""
    proxy.hold(DOWN)
    threads = [threading.Thread(target=backend.wrapped.describe, args=(eid,)) for _ in range(count)]
    for thread in threads:
        thread.start()
    await wait_until_async(lambda: _true(proxy.connections >= count))
    proxy.release()
    for thread in threads:
        await asyncio.to_thread(thread.join)
    await wait_until_async(lambda: _true(backend.wrapped._nodes.of(None).idle >= count))


async def test_calls_outlive_every_dead_connection_after_one_wait(shell, proxy, lane):
    async with await shell.connect(proxy.url, timeout=TIMEOUT_S) as backend:
        eid, handle = await claimed(backend, lane)
        if shell.kind == "sync":
            await with_idle_connections(backend, proxy, 8, eid)
        proxy.swallow()
        loop = asyncio.get_running_loop()
        began = loop.time()
        for call in (
            backend.progress(handle, 10),
            backend.renew(handle),
            backend.describe(eid),
            backend.create_execution(lane=lane),
            backend.set_tags(eid, {"a.b": "c"}),
            backend.read_stream(eid),
            backend.complete(handle, b"answer"),
            backend.read_result(eid),
        ):
            await call
        # Eight waits would take longer.
        assert loop.time() - began < 7 * TIMEOUT_S


async def test_the_first_call_outlives_a_connection_that_died_unused(shell, proxy, lane):
    async with await shell.connect(proxy.url, timeout=TIMEOUT_S) as backend:
        proxy.swallow()
        assert await backend.create_execution(lane=lane)


async def test_calls_of_many_at_once_outlive_the_shared_connection(proxy, lane):
    """Also those that were never sent, since so many others wait for their replies."""
    backend = await aio.ValkeyBackend.connect(config(proxy.url, timeout=TIMEOUT_S))
    eid = await backend.create_execution(lane=lane)
    proxy.swallow()
    calls = [backend.describe(eid) for _ in range(600)]
    # These are due later than the first ones.
    later = asyncio.ensure_future(_after(TIMEOUT_S / 2, backend.describe(eid)))
    found = await asyncio.gather(*calls, later)
    assert {each.state for each in found} == {"waiting"}
    await backend.close()


async def _after(seconds, call):
    await asyncio.sleep(seconds)
    return await call


async def test_a_claim_on_a_dead_connection_is_made_again(shell, proxy, lane):
    async with await shell.connect(proxy.url, timeout=TIMEOUT_S) as backend:
        eid = await backend.create_execution(lane=lane)
        # So that both shells have used the connection of a call that waits.
        await backend.claim(lane=f"{lane}-other", policy=ClaimPolicy.with_max_wait(0.01))
        proxy.swallow()
        assert (await backend.claim(lane=lane)).fields().execution_id == eid


async def test_a_reply_that_is_lost_on_a_connection_that_works_on(shell, proxy, server, lane):
    async with await shell.connect(proxy.url, timeout=TIMEOUT_S) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        proxy.rewrite = lambda reply: b""
        writer.write(b"2")
        await writer.flush(5)
        await writer.close()
        # The blocking shell trusts no connection older than a silence, so it connects here.
        await backend.renew(handle)
        proxy.rewrite = lambda reply: b""
        await backend.complete(handle, b"answer")
        assert await backend.read_result(eid) == b"answer"
    stored_once(server.url, eid, [b"1", b"2"])


async def test_a_second_silence_is_the_last(shell, proxy, lane):
    """Within two request timeouts, whatever the number of retries."""
    async with await shell.connect(proxy.url, timeout=TIMEOUT_S) as backend:
        _, handle = await claimed(backend, lane)
        proxy.hold(DOWN)
        loop = asyncio.get_running_loop()
        began = loop.time()
        with pytest.raises(DeadlineExceeded) as caught:
            await backend.progress(handle, 50)
        assert loop.time() - began < 8 * TIMEOUT_S
        assert caught.value.outcome is Outcome.UNKNOWN
        proxy.release()


async def test_without_retries_a_silent_connection_is_told(shell, proxy, lane):
    async with await shell.connect(proxy.url, timeout=TIMEOUT_S, retries=0) as backend:
        eid, handle = await claimed(backend, lane)
        proxy.swallow()
        with pytest.raises(DeadlineExceeded) as caught:
            await backend.progress(handle, 50)
        assert caught.value.outcome is Outcome.UNKNOWN
        assert (await backend.describe(eid)).state == "active"


async def test_a_writer_outlives_its_dead_connection(shell, proxy, server, lane):
    async with await shell.connect(proxy.url, timeout=TIMEOUT_S) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        proxy.swallow()
        writer.write(b"2")
        await writer.flush(5)
        await backend.renew(handle)
        proxy.swallow()
        # A call finds out first; then the writer sends nothing into the silence.
        await backend.renew(handle)
        before = proxy.swallowed
        writer.write(b"3")
        await writer.flush(5)
        assert proxy.swallowed == before
        await writer.close()
    stored_once(server.url, eid, [b"1", b"2", b"3"])


async def test_a_kept_lease_outlives_dead_connections(shell, proxy, server, lane):
    async with (
        await shell.connect(proxy.url, timeout=TIMEOUT_S) as backend,
        await shell.connect(server.url) as beside,
    ):
        eid, handle = await claimed(backend, lane, lease_ttl_ms=4_000)
        if shell.kind == "sync":
            await with_idle_connections(backend, proxy, 3, eid)
        proxy.swallow()
        lost = []
        keeper = backend.wrapped.keep_lease(handle, lost.append)
        first = (await beside.describe(eid)).lease_expires_at_ms

        async def renewed():
            return (await beside.describe(eid)).lease_expires_at_ms != first

        await wait_until_async(renewed)
        assert keeper.held
        if shell.kind == "sync":
            await asyncio.to_thread(keeper.stop)
        else:
            await keeper.stop()
    assert not lost


def test_a_running_handler_outlives_dead_connections(proxy, server, lane):
    """Its progress is reported, its frames are stored, and its result too."""
    seen = []

    def handler(task):
        task.write(b"1")
        task.flush(5)
        proxy.swallow()
        task.progress(50)
        proxy.swallow()
        task.write(b"2")
        seen.append(task.execution_id)
        stop.set()
        return b"answer"

    stop = threading.Event()
    with ff_fast.ValkeyBackend.connect(config(proxy.url, timeout=TIMEOUT_S)) as backend:
        eid = backend.create_execution(lane=lane)
        backend.run_worker(handler, lane=lane, stop=stop)
        assert seen == [eid]
        description = backend.describe(eid)
        assert (description.state, description.progress_percent) == ("completed", 50)
    stored_once(server.url, eid, [b"1", b"2"])


async def test_a_running_handler_of_asyncio_outlives_dead_connections(proxy, server, lane):
    stop = asyncio.Event()

    async def handler(task):
        task.write(b"1")
        await task.flush(5)
        proxy.swallow()
        await task.progress(50)
        proxy.swallow()
        task.write(b"2")
        stop.set()
        return b"answer"

    async with aio.ValkeyBackend.connect(config(proxy.url, timeout=TIMEOUT_S)) as backend:
        eid = await backend.create_execution(lane=lane)
        await backend.run_worker(handler, lane=lane, stop=stop)
        description = await backend.describe(eid)
        assert (description.state, description.progress_percent) == ("completed", 50)
    stored_once(server.url, eid, [b"1", b"2"])


# -- idle connections --------------------------------------------------------------------------------------------------


@pytest.mark.standalone("each node has connections of its own")
async def test_a_burst_of_readers_takes_a_handful_of_connections(shell, server, lane):
    with connect_raw(server.url) as raw:
        before = len(raw.client_list())
        async with await shell.connect(server.url) as backend:
            eid, _ = await claimed(backend, lane)
            tails = [backend.wrapped.tail(eid) for _ in range(60)]
            if shell.kind == "sync":
                for tail in tails:
                    tail.next_batch(0)
                most = len(raw.client_list())
                for tail in tails:
                    tail.close()
            else:
                await asyncio.gather(*(tail.next_batch(0.05) for tail in tails))
                most = len(raw.client_list())
                await asyncio.gather(*(tail.aclose() for tail in tails))
            assert most <= before + 3


def test_idle_connections_have_a_greatest_age(proxy, lane, monkeypatch):
    """Also where nobody uses the backend; one stays for its next call."""
    monkeypatch.setattr(ff_fast._transport, "MAX_IDLE_S", 0.1)
    with ff_fast.ValkeyBackend.connect(proxy.url) as backend:
        eid = backend.create_execution(lane=lane)
        others = [backend._connect() for _ in range(3)]
        for connection in others:
            backend._release(connection)
        wait_until(lambda: proxy.connections == 1)
        backend.describe(eid)
        (thread,) = backend._sweepers.values()
    wait_until(lambda: not thread.is_alive())
