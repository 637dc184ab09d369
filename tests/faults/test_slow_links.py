"""Reads over links so slow that an answer takes longer than the request timeout, and over links that fall silent."""

import asyncio

import pytest

import ff_fast
from ff_fast import (
    BestEffortLiveConfig,
    PatchKind,
    ScannerFilter,
    StreamFrame,
    StreamMode,
    errors,
)

from ..conftest import connect_raw
from ..waiting import wait_until_async
from .chaos import DOWN, ChaosProxy
from .stored import claimed

# Longer than a busy machine keeps a process from its core, which looks like silence.
TIMEOUT = 0.9
PIECE = 8192
# Pieces of 8 KiB each 12 ms: below 700 KB a second.
DELAY = 0.012
LARGE = bytes(64 * 1024)
BEST_EFFORT = StreamMode.best_effort_live_with_config(BestEffortLiveConfig(600_000))


@pytest.fixture
def slow(server):
    with ChaosProxy(server.url) as running:
        yield running


def slow_down(proxy):
    proxy.chunk, proxy.delay = PIECE, DELAY


async def drained(reader, count):
    """Read until *count* items have come, through the thread or the loop of the reader."""
    items = []
    while len(items) < count:
        batch = reader.next_batch(10)
        items += await batch if asyncio.iscoroutine(batch) else batch
    return items


async def test_reads_make_progress_on_a_slow_link(shell, server, slow, lane):
    namespace = f"ns-{lane}"
    async with (
        await shell.connect(server.url) as near,
        await shell.connect(slow.url, timeout=TIMEOUT) as far,
    ):
        eid, handle = await claimed(near, lane)
        text = "t" * 60_000
        async with await near.open_writer(handle, mode=StreamMode.durable()) as writer:
            for _ in range(8):
                writer.write(LARGE)
                writer.write(LARGE[:-1], mode=BEST_EFFORT)
                await writer.drain()
            patch = StreamMode.durable_summary(PatchKind.STRING_APPEND("/a"))
            for _ in range(10):
                writer.write(text, mode=patch)
                await writer.drain()
        await near.complete(handle, bytes(700_000))
        for _ in range(4):
            other = await near.create_execution(lane=lane, namespace=namespace)
            handle = await near.claim(lane=lane, worker_id="w", worker_instance_id="i")
            assert handle.fields().execution_id == other
            await near.complete(handle, bytes(230_000))
        await far.describe(eid)
        slow_down(slow)
        scope = ScannerFilter().with_namespace(namespace)

        async def tail():
            items = await far.items(eid)
            assert len([item for item in items if isinstance(item, StreamFrame)]) == 26

        async def pages():
            frames, after, end = [], None, None
            while end is None:
                page = await far.read_stream(eid, after=after, count=100, max_bytes=1 << 20)
                frames += page
                after, end = page.cursor, page.end_reason
            assert len(frames) == 26

        async def summary():
            found = await far.read_summary(eid)
            assert found.version == 10
            assert len(found.document_json) > 600_000 - 1_000

        async def result():
            assert len(await far.read_result(eid)) == 700_000

        async def completions():
            told = await asyncio.wait_for(_told(far, scope, 4), 20)
            assert [len(each.payload_bytes) for each in told] == [230_000] * 4

        accepted = slow.accepted
        await asyncio.gather(tail(), pages(), summary(), result(), completions())
        # Nobody gave a connection up.
        assert slow.accepted <= accepted + 8


async def _told(backend, scope, count):
    subscription = backend.wrapped.subscribe_completions(scope, after="start")
    if isinstance(backend.wrapped, ff_fast.ValkeyBackend):
        told = await asyncio.to_thread(lambda: [next(subscription) for _ in range(count)])
        subscription.close()
        return told
    told = [await anext(subscription) for _ in range(count)]
    await subscription.aclose()
    return told


async def test_a_reader_of_a_link_that_falls_silent_dials_again(shell, server, slow, lane):
    async with (
        await shell.connect(server.url) as near,
        await shell.connect(slow.url, timeout=TIMEOUT) as far,
    ):
        eid, handle = await claimed(near, lane)
        async with await near.open_writer(handle) as writer:
            for _ in range(24):
                writer.write(LARGE)
                await writer.drain()
        await near.complete(handle)
        # In the middle of an answer: its first bytes have come.
        slow_down(slow)
        passed, accepted = slow.passed, slow.accepted
        reading = asyncio.ensure_future(far.items(eid))
        await wait_until_async(lambda: _is(slow.passed > passed + 100_000), 10)
        slow.hold(DOWN)
        await wait_until_async(lambda: _is(slow.accepted > accepted + 1), 10)
        slow.chunk, slow.delay = 1 << 16, 0.0
        slow.release()
        items = await reading
        assert len(items) == 25
        # A call of its own says so.
        slow.hold(DOWN)
        with pytest.raises(errors.DeadlineExceeded):
            await far.read_result(eid)
        slow.release()


async def _is(value):
    return value


async def test_silence_longer_than_the_timeout_costs_no_connection(shell, server, slow, lane):
    """The server is asked for a sign of life, and gives one."""
    async with (
        await shell.connect(server.url) as near,
        await shell.connect(slow.url, timeout=TIMEOUT) as far,
    ):
        eid, handle = await claimed(near, lane)
        reading = asyncio.ensure_future(far.items(eid))
        with connect_raw(server.url) as raw:
            before = raw.info("commandstats").get("cmdstat_hello", {"calls": 0})["calls"]

            async def asked():
                return raw.info("commandstats")["cmdstat_hello"]["calls"] >= before + 3

            await wait_until_async(asked, 10)
        accepted = slow.accepted
        async with await near.open_writer(handle) as writer:
            writer.write(b"x")
        await near.complete(handle)
        items = await reading
        assert len(items) == 2
        assert slow.accepted == accepted


async def test_a_reader_that_the_server_throws_out_goes_on(shell, own_server, lane):
    """A reader that takes nothing holds little of the server, and one that is thrown out loses nothing."""
    with ChaosProxy(own_server.url) as proxy, connect_raw(own_server.url) as raw:
        raw.config_set("client-output-buffer-limit", "normal 1mb 800kb 1")
        async with (
            await shell.connect(own_server.url) as near,
            await shell.connect(proxy.url) as far,
        ):
            eid, handle = await claimed(near, lane)
            async with await near.open_writer(handle) as writer:
                for _ in range(100):
                    writer.write(LARGE)
                    await writer.drain()
            await near.complete(handle)
            slow_down(proxy)
            reading = asyncio.ensure_future(far.items(eid))
            await wait_until_async(lambda: _is(proxy.passed > 100_000), 10)
            proxy.hold(DOWN)
            await wait_until_async(lambda: _is(proxy.waiting(DOWN) > 10_000), 10)
            assert raw.info("clients")["client_recent_max_output_buffer"] < 1 << 20
            accepted = proxy.accepted
            # The limit has not been met; whoever is thrown out for another reason goes on behind what it had.
            for kind in ("normal", "pubsub"):
                raw.client_kill_filter(_type=kind, skipme=True)
            proxy.chunk, proxy.delay = 1 << 16, 0.0
            proxy.release()
            items = await reading
            assert proxy.accepted > accepted
    assert [item.sequence for item in items[:-1]] == list(range(1, 101))


async def test_a_slow_consumer_costs_nobody_memory(shell, server, lane):
    """Between two reads one answer at most is in flight, and it is small."""
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        tail = backend.wrapped.tail(eid)
        async with await backend.open_writer(handle) as writer:
            writer.write(b"first")
            await writer.flush()
            first = (await drained(tail, 1))[0]
            with connect_raw(server.url) as raw:
                before = raw.info("commandstats")
                for _ in range(300):
                    writer.write(LARGE)
                    await writer.drain()
                await writer.flush()
                after = raw.info("commandstats")
        await backend.complete(handle)
        asked = [
            after.get(name, {"calls": 0})["calls"] - before.get(name, {"calls": 0})["calls"]
            for name in ("cmdstat_xread", "cmdstat_fcall_ro", "cmdstat_xrange")
        ]
        assert sum(asked) <= 1
        items = [first]
        while not isinstance(items[-1], ff_fast.End):
            batch = await drained(tail, 1)
            assert sum(len(item.payload) for item in batch[:-1]) <= 1 << 20
            items += batch
        assert [item.sequence for item in items[:-1]] == list(range(1, 302))
        if hasattr(tail, "aclose"):
            await tail.aclose()
        else:
            tail.close()
