"""The store of assistant-ui's resumable streams: what its own tests ask of a store, and what a lost producer does.

Without assistant-stream a stand-in takes its place; `make test-web` runs the same tests with the package.
"""

import asyncio
import contextlib
import sys
import uuid

import pytest

import ff_fast
from ff_fast import BackendConfig, aio, keys
from tests.waiting import wait_until_async

from . import stand_ins

stand_ins.assistant_stream()

from assistant_stream.resumable import ResumableStreamError  # noqa: E402

from ff_fast.adapters.assistant_ui import ValkeyResumableStreamStore  # noqa: E402


@pytest.fixture
def stores(server):
    """`async with stores(n, **options) as (store, ...)`: as many replicas of an application."""

    @contextlib.asynccontextmanager
    async def opened(count=1, **options):
        async with contextlib.AsyncExitStack() as stack:
            backends = [
                await stack.enter_async_context(aio.ValkeyBackend.connect(server.url))
                for _ in range(count)
            ]
            made = [ValkeyResumableStreamStore(each, **options) for each in backends]
            yield made[0] if count == 1 else made

    return opened


@pytest.fixture
def name():
    return f"turn-{uuid.uuid4().hex}"


async def collect(store, name, cursor="", signal=None):
    return [each.chunk async for each in store.read(name, cursor, signal or asyncio.Event())]


async def collect_into(found, store, name, signal=None):
    async for each in store.read(name, "", signal or asyncio.Event()):
        found.append(each.chunk)


@pytest.mark.cluster
def test_the_first_who_acquires_is_the_producer(stores, name):
    async def run():
        async with stores(2) as (one, other):
            roles = await asyncio.gather(*(each.acquire(name) for each in (one, other) * 8))
            assert sorted(roles) == ["consumer"] * 15 + ["producer"]
            assert await other.acquire(name + "-b") == "producer"
            producer = one if name in one._productions else other
            await producer.finalize(name, "done")
            assert await one.acquire(name) == await other.acquire(name) == "consumer"

    asyncio.run(run())


@pytest.mark.parametrize("bad", ["", "a b", "a\n", "é", "x" * 257, "a/b"])
def test_an_id_of_another_form_is_refused_by_every_call(stores, bad):
    async def run():
        async with stores() as store:
            for call in (
                store.acquire(bad),
                store.append(bad, b"x"),
                store.finalize(bad, "done"),
                store.status(bad),
                store.delete(bad),
                anext(store.read(bad, "", asyncio.Event())),
            ):
                with pytest.raises(ResumableStreamError) as refused:
                    await call
                assert refused.value.code == "invalid-id"

    asyncio.run(run())


def test_every_form_of_id_is_accepted(stores, name):
    async def run():
        async with stores() as store:
            for stream_id in (f"a:b.{name}", (name + "-" + "x" * 256)[:256]):
                assert await store.acquire(stream_id) == "producer"
                await store.append(stream_id, b"x")
                await store.finalize(stream_id, "done")
                assert await collect(store, stream_id) == [b"x"]
                await store.delete(stream_id)

    asyncio.run(run())


@pytest.mark.cluster
def test_a_reader_gets_what_is_there_and_what_is_appended(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            await producer.append(name, b"hello")
            found = []
            reading = asyncio.create_task(collect_into(found, other, name))
            await producer.append(name, b" world")
            await wait_until_async(lambda: _true(len(found) == 2))
            await producer.append(name, b"!")
            await producer.finalize(name, "done")
            await reading
            assert found == [b"hello", b" world", b"!"]
            assert await collect(producer, name) == found

    asyncio.run(run())


async def _true(value):
    return value


def test_what_is_appended_is_stored_when_the_call_returns(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            for count in range(1, 20):
                await producer.append(name, b"x")
                eid = other._backend.execution_id_for(name, namespace="assistant-ui")
                assert (await other._backend.describe_stream(eid, 0)).frame_count == count

    asyncio.run(run())


def test_a_cursor_is_exclusive_and_of_any_replica(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            for chunk in (b"1", b"2", b"3"):
                await producer.append(name, chunk)
            await producer.finalize(name, "done")
            entries = [each async for each in producer.read(name, "", asyncio.Event())]
            for at, entry in enumerate(entries):
                assert await collect(other, name, entry.cursor) == [b"1", b"2", b"3"][at + 1 :]

    asyncio.run(run())


def test_a_text_that_is_no_cursor_is_refused(stores, name):
    async def run():
        async with stores() as store:
            await store.acquire(name)
            for cursor in ("x", "9.1-1"):
                with pytest.raises(ff_fast.InvalidCursor):
                    await collect(store, name, cursor)

    asyncio.run(run())


@pytest.mark.parametrize(
    "chunk",
    [b"", bytes(range(256)) * 2, b"\r\n\0", b"x" * 65_536, bytes(range(256)) * 1_025],
    ids=len,
)
def test_chunks_of_any_bytes_and_size_come_whole(stores, name, chunk):
    async def run():
        async with stores() as store:
            await store.acquire(name)
            await asyncio.gather(store.append(name, chunk), store.append(name, b"between"))
            await store.append(name, b"last")
            await store.finalize(name, "done")
            assert await collect(store, name) == [chunk, b"between", b"last"]
            entries = [each async for each in store.read(name, "", asyncio.Event())]
            assert await collect(store, name, entries[0].cursor) == [b"between", b"last"]

    asyncio.run(run())


def test_an_error_is_raised_behind_the_last_chunk(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            await producer.append(name, b"partial")
            await producer.finalize(name, "error", "boom\nat line 2 \ud800")
            found = []
            with pytest.raises(RuntimeError, match="boom\nat line 2 "):
                await collect_into(found, other, name)
            assert found == [b"partial"]
            assert await other.status(name) == "error"

    asyncio.run(run())


@pytest.mark.parametrize("error", [None, "", "x" * 200_000], ids=["none", "empty", "long"])
def test_every_error_can_be_stored(stores, name, error):
    async def run():
        async with stores() as store:
            await store.acquire(name)
            await store.finalize(name, "error", error)
            with pytest.raises(RuntimeError, match=error[:10_000] if error else "Stream errored"):
                await collect(store, name)

    asyncio.run(run())


def test_status_follows_the_stream(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            assert await other.status(name) == "missing"
            await producer.acquire(name)
            assert await other.status(name) == "streaming"
            await producer.append(name, b"x")
            assert await other.status(name) == "streaming"
            await producer.finalize(name, "done")
            assert await other.status(name) == "done"
            await other.delete(name)
            assert await producer.status(name) == "missing"

    asyncio.run(run())


def test_what_has_ended_takes_no_chunk_and_ends_only_once(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            await producer.finalize(name, "done")
            await producer.finalize(name, "error", "late")
            await other.finalize(name, "error", "late")
            assert await producer.status(name) == "done"
            for store in (producer, other):
                with pytest.raises(ResumableStreamError, match="already finalized") as refused:
                    await store.append(name, b"late")
                assert refused.value.code == "finalized"

    asyncio.run(run())


def test_there_is_nothing_to_be_done_with_an_unknown_stream(stores, name):
    async def run():
        async with stores() as store:
            for call in (
                store.append(name, b"x"),
                store.finalize(name, "done"),
                anext(store.read(name, "", asyncio.Event())),
            ):
                with pytest.raises(RuntimeError, match="Stream not found"):
                    await call
            await store.delete(name)
            assert await store.status(name) == "missing"

    asyncio.run(run())


def test_who_does_not_produce_a_stream_cannot_write_it(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            assert await other.acquire(name) == "consumer"
            for call in (other.append(name, b"x"), other.finalize(name, "done")):
                with pytest.raises(RuntimeError, match="produced by somebody else"):
                    await call
            await producer.finalize(name, "done")
            assert await collect(other, name) == []

    asyncio.run(run())


def test_a_chunk_beyond_the_limit_is_refused_and_the_stream_goes_on(stores, name):
    async def run():
        async with stores(max_chunk_bytes=4) as store:
            await store.acquire(name)
            with pytest.raises(RuntimeError, match="Chunk exceeds maxChunkBytes: 5"):
                await store.append(name, b"hello")
            await store.append(name, b"ok")
            assert await store.status(name) == "streaming"

    asyncio.run(run())


def test_a_signal_ends_a_reader_in_silence(stores, name):
    async def run():
        async with stores() as store:
            await store.acquire(name)
            await store.append(name, b"x")
            signal, found = asyncio.Event(), []
            reading = asyncio.create_task(collect_into(found, store, name, signal))
            await wait_until_async(lambda: _true(found == [b"x"]))
            signal.set()
            await asyncio.wait_for(reading, 5)
            assert await collect(store, name, signal=signal) == []
            assert found == [b"x"]

    asyncio.run(run())


def test_a_reader_that_is_left_leaves_nothing(stores, name):
    async def run():
        async with stores() as store:
            await store.acquire(name)
            await store.append(name, b"x")
            reader = store.read(name, "", asyncio.Event())
            assert (await anext(reader)).chunk == b"x"
            await reader.aclose()
            waiting = asyncio.create_task(collect(store, name))
            await asyncio.sleep(0.02)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            left = asyncio.all_tasks() - {asyncio.current_task()} - store._backend._tasks
            await asyncio.sleep(0)
            assert not {each for each in left if not each.done()}

    asyncio.run(run())


@pytest.mark.cluster
def test_readers_of_a_stream_that_is_removed_end_in_silence(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            found = [[], []]
            readings = [
                asyncio.create_task(collect_into(into, store, name))
                for into, store in zip(found, (producer, other), strict=True)
            ]
            await producer.append(name, b"x")
            await wait_until_async(lambda: _true(found == [[b"x"], [b"x"]]))
            await other.delete(name)
            await asyncio.wait_for(asyncio.gather(*readings), 5)
            assert await other.status(name) == "missing"
            with pytest.raises(RuntimeError, match="Stream not found"):
                await producer.append(name, b"late")
            # The id is free again, with nothing of what was there.
            assert await other.acquire(name) == "producer"
            await other.append(name, b"new")
            await other.finalize(name, "done")
            assert await collect(producer, name) == [b"new"]

    asyncio.run(run())


def test_a_stream_to_which_nothing_is_appended_is_removed_after_its_time(stores, name):
    async def run():
        async with stores(2, default_ttl_ms=1_000) as (producer, other):
            await producer.acquire(name)
            await producer.acquire(name + "-kept", ttl_ms=60_000)
            reading = asyncio.create_task(collect(other, name))
            # Longer than the time, in steps that are far shorter.
            for _ in range(4):
                await asyncio.sleep(0.3)
                await producer.append(name, b"x")
            assert await other.status(name) == "streaming"
            assert await asyncio.wait_for(reading, 5) == [b"x"] * 4
            await wait_until_async(lambda: _is(other, name, "missing"))
            assert await other.acquire(name) == "producer"
            assert await other.status(name + "-kept") == "streaming"

    asyncio.run(run())


@pytest.mark.cluster
def test_a_finalized_stream_is_removed_after_its_time(stores, name):
    async def run():
        async with stores() as store:
            await store.acquire(name, ttl_ms=80)
            await store.append(name, b"x")
            await store.finalize(name, "done")
            await wait_until_async(lambda: _is(store, name, "missing"))
            assert await store.acquire(name) == "producer"
            assert not await _keys(store, name, ":tags")

    asyncio.run(run())


async def _is(store, name, status):
    return await store.status(name) == status


async def _keys(store, name, suffix):
    eid = store._backend.execution_id_for(name, namespace="assistant-ui")
    with contextlib.suppress(ff_fast.ExecutionNotFound):
        return await store._backend.get_tags(eid)
    return {}


def test_a_producer_whose_task_is_cancelled_ends_its_stream_with_an_error(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)

            async def produce():
                while True:
                    await producer.append(name, b"x")
                    await asyncio.sleep(0.01)

            producing = asyncio.create_task(produce())
            found = []
            reading = asyncio.create_task(collect_into(found, other, name))
            await wait_until_async(lambda: _true(len(found) > 2))
            producing.cancel()
            with pytest.raises(RuntimeError, match="was cancelled"):
                await asyncio.wait_for(reading, 5)
            assert await other.status(name) == "error"

    asyncio.run(run())


def test_a_stream_that_somebody_cancels_ends_with_an_error(stores, name):
    async def run():
        async with stores(2) as (producer, other):
            await producer.acquire(name)
            await producer.append(name, b"x")
            eid = other._backend.execution_id_for(name, namespace="assistant-ui")
            await other._backend.cancel(eid, reason="the user has had enough")
            with pytest.raises(RuntimeError, match="had enough"):
                await collect(other, name)
            assert await other.status(name) == "error"
            with pytest.raises(ResumableStreamError, match="already finalized"):
                await producer.append(name, b"late")
            await producer.finalize(name, "done")

    asyncio.run(run())


PRODUCER = """
import asyncio, os, signal, sys
from tests.web import stand_ins
stand_ins.assistant_stream()
from ff_fast import aio
from ff_fast.adapters.assistant_ui import ValkeyResumableStreamStore

async def run(url, name):
    async with aio.ValkeyBackend.connect(url) as backend:
        store = ValkeyResumableStreamStore(backend, lease_ttl_ms=1_500)
        assert await store.acquire(name) == "producer"
        await store.append(name, b"one")
        await store.append(name, b"two")
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run(*sys.argv[1:]))
"""


@pytest.mark.cluster
def test_readers_of_a_producer_that_is_killed_are_told_and_another_begins_anew(
    stores, name, server
):
    async def run():
        async with stores(2) as (one, other):
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", PRODUCER, server.url, name
            )
            await wait_until_async(lambda: _is(one, name, "streaming"), 20)
            found = []
            with pytest.raises(RuntimeError, match="producer of the stream is lost"):
                await asyncio.wait_for(collect_into(found, one, name), 20)
            await child.wait()
            assert found == [b"one", b"two"]
            assert await other.status(name) == "error"
            with pytest.raises(RuntimeError, match="producer of the stream is lost"):
                await collect(other, name)

            assert await other.acquire(name) == "producer"
            assert await one.acquire(name) == "consumer"
            await other.append(name, b"anew")
            await other.finalize(name, "done")
            assert await collect(one, name) == [b"anew"]
            # A cursor of the lost producer's chunks does not lead into those of another.
            with pytest.raises(RuntimeError, match="producer of the stream is lost"):
                await collect(one, name, "0.0-1")

    asyncio.run(run())


def test_a_producer_that_has_lost_its_lease_can_write_nothing(stores, name):
    async def run():
        async with stores(lease_ttl_ms=1_000) as paused, stores() as other:
            await paused.acquire(name)
            await paused.append(name, b"old")
            # As a process that stands still: nobody renews.
            await paused._productions[name].stream._keeper.stop()
            await wait_until_async(lambda: _is(other, name, "error"))
            assert await other.acquire(name) == "producer"
            await other.append(name, b"new")
            with pytest.raises(RuntimeError, match="produced by somebody else"):
                await paused.append(name, b"old")
            with pytest.raises(RuntimeError, match="produced by somebody else"):
                await paused.finalize(name, "done")
            await other.finalize(name, "done")
            assert await collect(paused, name) == [b"new"]

    asyncio.run(run())


def test_streams_of_two_namespaces_have_nothing_in_common(stores, name):
    async def run():
        async with stores(namespace="one") as one, stores(namespace="other") as other:
            assert await one.acquire(name) == "producer"
            assert await other.status(name) == "missing"
            assert await other.acquire(name) == "producer"

    asyncio.run(run())


def test_an_id_that_looks_like_that_of_an_execution_is_a_name(stores, name):
    """A client chooses it, and must not reach what is not a stream of the store."""

    async def run():
        async with stores() as store:
            eid = store._backend.execution_id_for(name, namespace="another")
            async with store._backend.open_stream(name, namespace="another") as foreign:
                foreign.write(b"secret")
                await foreign.flush()
                asked = keys.url_id(eid)
                assert await store.acquire(asked) == "producer"
                await store.append(asked, b"own")
                await store.finalize(asked, "done")
                assert b"".join(await collect(store, asked)) == b"own"

    asyncio.run(run())


def test_a_small_backend_limit_splits_chunks(server, name):
    async def run():
        config = BackendConfig(BackendConfig.from_url(server.url).connection, max_payload_bytes=64)
        async with aio.ValkeyBackend.connect(config) as backend:
            store = ValkeyResumableStreamStore(backend)
            await store.acquire(name)
            chunks = [bytes([size % 256]) * size for size in (63, 64, 65, 128, 129, 1_000)]
            for chunk in chunks:
                await store.append(name, chunk)
            await store.finalize(name, "done")
            assert await collect(store, name) == chunks
            eid = backend.execution_id_for(name, namespace="assistant-ui")
            assert keys.canonical_execution_id(eid) == eid

    asyncio.run(run())
