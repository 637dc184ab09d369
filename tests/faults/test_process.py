"""What a process does to its clients: fork, threads, loops, interrupts, exits; and what they cost it."""

import asyncio
import contextlib
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
import types
import warnings

import pytest

import ff_fast
from ff_fast import Frame, FrameKind, aio
from ff_fast._sync.writers import Sender
from ff_fast.errors import (
    ExecutionNotFound,
    FFError,
    ForkedClient,
    Overloaded,
    Unavailable,
    WriterClosed,
    WrongLoop,
)

from ..conftest import connect_raw
from ..shells import config
from ..waiting import wait_until, wait_until_async
from .chaos import DOWN, UP
from .conftest import descriptors
from .stored import claimed, frames, stored_once


def taken(backend, lane):
    eid = backend.create_execution(lane=lane)
    return eid, backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")


async def _true(value):
    return value


# -- fork --------------------------------------------------------------------------------------------------------


def in_child(work):
    """Run *work* in a forked child; fail with what it says."""
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pid = os.fork()
    if pid == 0:
        text = "the child died"
        try:
            signal.alarm(20)
            work()
            text = ""
        except BaseException as error:  # noqa: BLE001 - the parent tells of it
            text = f"{type(error).__name__}: {error}"
        finally:
            os.write(writing, text.encode())
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as said:
        text = said.read()
    os.waitpid(pid, 0)
    assert not text, text


def test_a_forked_child_of_the_blocking_shell(server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid, handle = taken(backend, lane)
        writer = backend.open_writer(handle)
        tail = backend.tail(eid)
        writer.write(b"1")
        writer.flush(5)
        writer.write(b"2")

        def child():
            for call in (
                lambda: writer.write(b"child"),
                writer.flush,
                writer.drain,
                writer.close,
                lambda: backend.describe(eid),
                lambda: backend.create_execution(lane=lane),
                lambda: backend.claim(lane=lane, worker_id="w", worker_instance_id="w"),
                lambda: backend.renew(handle),
                lambda: backend.complete(handle),
                lambda: backend.open_writer(handle),
                lambda: backend.append_frame(handle, Frame(b"x", FrameKind.EVENT)),
                lambda: backend.read_stream(eid),
                lambda: backend.read_summary(eid),
                lambda: next(backend.tail(eid)),
                lambda: next(tail),
            ):
                with pytest.raises(ForkedClient) as caught:
                    call()
                assert caught.value.unstored == ()
            # The parent counts what it has done.
            assert backend.stats() == ff_fast.Stats()
            backend.close()
            # A client of its own works, beside what it inherited.
            with ff_fast.ValkeyBackend.connect(server.url) as own:
                assert own.describe(eid).state == "active"
            gc.collect()

        in_child(child)
        writer.write(b"3")
        writer.flush(5)
        backend.renew(handle)
        assert next(tail).payload == b"1"
        tail.close()
        writer.close()
    stored_once(server.url, eid, [b"1", b"2", b"3"])


def test_forks_amid_a_stream_leave_the_parent_alone(server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid, handle = taken(backend, lane)
        writer = backend.open_writer(handle)
        payloads = [b"%d" % i for i in range(4_000)]

        def child():
            with pytest.raises(ForkedClient):
                writer.flush()

        for i, payload in enumerate(payloads):
            writer.write(payload)
            if i % 500 == 250:
                in_child(child)
        writer.close()
    stored_once(server.url, eid, payloads)


async def test_a_forked_child_of_the_asyncio_shell(server, lane):
    async with aio.ValkeyBackend.connect(server.url) as backend:
        eid = await backend.create_execution(lane=lane)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await writer.flush()

        def child():
            # The child runs inside the parent's loop, so each coroutine is stepped by hand.
            def step(coroutine):
                with pytest.raises(ForkedClient):
                    coroutine.send(None)

            with pytest.raises(ForkedClient):
                writer.write(b"child")
            step(writer.flush())
            assert backend.stats() == ff_fast.Stats()
            step(writer.drain())
            step(writer.close())
            step(backend.describe(eid))
            step(backend.claim(lane=lane, worker_id="w", worker_instance_id="w"))
            step(backend.append_frame(handle, Frame(b"x", FrameKind.EVENT)))
            step(backend.tail(eid).__anext__())
            with pytest.raises(StopIteration):
                backend.close().send(None)

        in_child(child)
        writer.write(b"2")
        await writer.flush(5)
        assert (await backend.describe(eid)).state == "active"
        await writer.close()
    stored_once(server.url, eid, [b"1", b"2"])


# -- threads -----------------------------------------------------------------------------------------------------


def together(count, work):
    failures = []

    def run(index):
        try:
            work(index)
        except BaseException as error:  # noqa: BLE001 - the test tells of it
            failures.append(error)

    running = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    assert not failures


def test_eight_threads_with_a_writer_each(server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        attempts = [taken(backend, lane) for _ in range(8)]

        def work(index):
            with backend.open_writer(attempts[index][1]) as writer:
                for i in range(2_000):
                    writer.write(b"%d-%d" % (index, i))
                    if i % 500 == 0:
                        writer.flush(10)

        together(8, work)
    for index, (eid, _) in enumerate(attempts):
        stored_once(server.url, eid, [b"%d-%d" % (index, i) for i in range(2_000)])


def test_eight_threads_with_one_writer(server, lane):
    """Each call returns its own frame's sequence, whoever writes meanwhile."""
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid, handle = taken(backend, lane)
        told = {}
        with backend.open_writer(handle, retention_maxlen=20_000) as writer:

            def work(index):
                for i in range(1_500):
                    payload = b"%d-%d" % (index, i)
                    sequence = writer.write(payload, frame_type="token" if i % 3 else "other")
                    assert told.setdefault(sequence, payload) is payload
                    if i % 400 == 0:
                        writer.flush(10)

            together(8, work)
    found = frames(server.url, eid)
    assert len(found) == 12_000
    assert {frame.sequence: frame.payload for frame in found} == told


def test_calls_of_many_threads_stay_paired(server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:

        def work(_):
            for _ in range(50):
                eid = backend.create_execution(lane=lane)
                assert backend.describe(eid).execution_id == eid

        together(8, work)


def test_append_frame_from_many_threads_opens_one_writer(server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid, handle = taken(backend, lane)
        together(8, lambda i: backend.append_frame(handle, Frame(b"%d" % i, FrameKind.EVENT)))
        backend.complete(handle)
        assert not backend._frame_writers
    assert sorted(frame.payload for frame in frames(server.url, eid)) == [
        b"%d" % i for i in range(8)
    ]


async def test_append_frame_from_many_tasks_opens_one_writer(server, lane):
    async with aio.ValkeyBackend.connect(server.url) as backend:
        eid = await backend.create_execution(lane=lane)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        await asyncio.gather(
            *(backend.append_frame(handle, Frame(b"%d" % i, FrameKind.EVENT)) for i in range(8))
        )
        await backend.complete(handle)
        assert not backend._frame_writers
    assert len(frames(server.url, eid)) == 8


def test_closing_while_other_threads_wait(proxy, lane):
    backend = ff_fast.ValkeyBackend.connect(proxy.url)
    eid, handle = taken(backend, lane)
    writer = backend.open_writer(handle)
    outcomes = []

    def expect(call):
        try:
            call()
        except FFError as error:
            outcomes.append(error)

    writer.write(b"stored")
    writer.flush()
    running = [
        threading.Thread(target=expect, args=(call,))
        for call in (
            lambda: list(backend.tail(eid)),
            lambda: backend.claim(
                lane=lane,
                worker_id="w",
                worker_instance_id="w",
                policy=ff_fast.ClaimPolicy(max_wait=60.0),
            ),
            writer.flush,
            lambda: backend.renew(handle),
        )
    ]
    proxy.hold(DOWN)
    writer.write(b"lost")
    for thread in running:
        thread.start()
    wait_until(lambda: proxy.waiting(DOWN) > 100)
    backend.close()
    for thread in running:
        thread.join(2)
        assert not thread.is_alive()
    assert len(outcomes) == 4
    assert {type(error) for error in outcomes} >= {WriterClosed}
    assert [frame.payload for frame in writer.error.unstored] == [b"lost"]
    backend.close()
    with pytest.raises(Unavailable, match="closed"):
        backend.renew(handle)
    with pytest.raises(Unavailable, match="closed"):
        next(backend.tail(eid))
    with pytest.raises(WriterClosed):
        writer.write(b"more")
    proxy.release()


def test_the_thread_of_the_writers_never_dies_in_silence(server, lane, monkeypatch):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        _, handle = taken(backend, lane)
        writer = backend.open_writer(handle)
        monkeypatch.setattr(Sender, "_round", lambda _: 1 / 0)
        reported = []
        monkeypatch.setattr(threading, "excepthook", reported.append)
        writer.write(b"1")
        with pytest.raises(FFError, match="error of its own") as caught:
            writer.flush(5)
        assert [frame.payload for frame in caught.value.unstored] == [b"1"]
        wait_until(lambda: reported)
        monkeypatch.undo()
        # The next writer gets a thread of its own.
        with backend.open_writer(handle) as other:
            other.write(b"2")


def test_an_interrupt_between_request_and_reply(proxy, lane):
    """The reply that nobody read must not answer the next call."""
    with ff_fast.ValkeyBackend.connect(proxy.url) as backend:
        eids = [backend.create_execution(lane=lane) for _ in range(2)]
        proxy.hold(DOWN)

        def interrupt():
            wait_until(lambda: proxy.waiting(DOWN))
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

        interrupting = threading.Thread(target=interrupt)
        interrupting.start()
        with pytest.raises(KeyboardInterrupt):
            backend.describe(eids[0])
        interrupting.join()
        proxy.release()
        assert backend.describe(eids[1]).execution_id == eids[1]


@contextlib.contextmanager
def interrupts(seed):
    """Interrupt the main thread again and again; yields ``gate``, whose ``open`` lets one through.

    Another process sends them, so that they come at any moment: a thread of this one would run, and send, only
    where the main thread has let go of the interpreter. SIGALRM and its timer belong to pytest-timeout.
    """
    # No threading.Event: the handler may run inside its set() and would wait for itself.
    gate = types.SimpleNamespace(open=False)

    def interrupt(*_):
        if gate.open:
            gate.open = False
            raise KeyboardInterrupt

    program = f"""
import os, random, signal, time
dice = random.Random({seed})
while os.getppid() == {os.getpid()}:
    time.sleep(dice.uniform(1e-5, 2e-3))
    os.kill({os.getpid()}, signal.SIGUSR1)
"""
    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        with subprocess.Popen([sys.executable, "-c", program]) as sender:
            try:
                yield gate
            finally:
                gate.open = False
                sender.kill()
    finally:
        signal.signal(signal.SIGUSR1, before)


# redis-py drops a socket when it is interrupted while it opens one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment(server, lane, seed):
    """Interrupts all over a stream: nothing hangs, and every frame whose call returned is stored."""
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid, handle = taken(backend, lane)
        writer = backend.open_writer(handle)
        written = []
        interrupted = 0
        with interrupts(seed) as gate:
            while interrupted < 60:
                try:
                    gate.open = True
                    for j in range(100):
                        payload = b"%d-%d" % (interrupted, j)
                        written.append((writer.write(payload), payload))
                        if j % 10 == 0:
                            writer.flush(5)
                        if j % 25 == 0:
                            assert backend.describe(eid).execution_id == eid
                    gate.open = False
                except KeyboardInterrupt:
                    interrupted += 1
        writer.close(10)
    found = {frame.sequence: frame.payload for frame in frames(server.url, eid)}
    assert list(found) == list(range(1, len(found) + 1))
    assert all(found[sequence] == payload for sequence, payload in written)


def test_an_exit_without_close_does_not_hang(run_python, server, lane):
    program = """
import sys, ff_fast
backend = ff_fast.ValkeyBackend.connect(sys.argv[1])
backend.create_execution(lane=sys.argv[2])
handle = backend.claim(lane=sys.argv[2], worker_id="w", worker_instance_id="w")
writer = backend.open_writer(handle)
writer.write(b"1")
writer.flush()
print("done")
"""
    assert run_python(program, server.url, lane) == "done\n"


# -- loops -------------------------------------------------------------------------------------------------------


def test_a_second_loop(server, lane):
    kept = {}

    async def first():
        backend = await aio.ValkeyBackend.connect(server.url)
        eid = await backend.create_execution(lane=lane)
        handle = await backend.claim(lane=lane, worker_id="w", worker_instance_id="w-1")
        kept.update(backend=backend, eid=eid, handle=handle)
        kept["writer"] = await backend.open_writer(handle)
        kept["tail"] = backend.tail(eid)

    async def second():
        backend, eid, handle, writer = (kept[k] for k in ("backend", "eid", "handle", "writer"))
        for call in (
            lambda: backend.describe(eid),
            lambda: backend.create_execution(lane=lane),
            lambda: backend.claim(lane=lane, worker_id="w", worker_instance_id="w"),
            lambda: backend.renew(handle),
            lambda: backend.complete(handle),
            lambda: backend.fail(handle, "no"),
            lambda: backend.read_payload(handle),
            lambda: backend.open_writer(handle),
            lambda: backend.append_frame(handle, Frame(b"x", FrameKind.EVENT)),
            lambda: backend.read_stream(eid),
            lambda: backend.read_summary(eid),
            lambda: backend.tail(eid).__anext__(),
            kept["tail"].__anext__,
            backend.close,
            writer.flush,
            writer.drain,
            writer.close,
        ):
            with pytest.raises(WrongLoop):
                await call()
        with pytest.raises(WrongLoop):
            writer.write(b"x")

    loop = asyncio.new_event_loop()
    loop.run_until_complete(first())
    asyncio.run(second())

    def elsewhere(_):
        with pytest.raises(WrongLoop):
            kept["writer"].write(b"x")

    together(1, elsewhere)
    loop.run_until_complete(kept["backend"].close())
    # What a write has taken is stored, whatever it raised.
    assert kept["writer"].last_sequence > 0
    assert kept["writer"].error.unstored == ()
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


# -- objects -----------------------------------------------------------------------------------------------------


async def test_clients_are_not_pickled_or_copied(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        for each in (backend.wrapped, writer.wrapped):
            for refused in (pickle.dumps, copy.copy, copy.deepcopy):
                with pytest.raises(TypeError):
                    refused(each)


async def test_an_error_is_another_object_each_time_it_is_raised(shell, server, lane):
    """One instance raised again and again would gather tracebacks and contexts of strangers."""
    async with await shell.connect(server.url) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        await backend.complete(handle)
        writer.write(b"late")
        caught = []
        for _ in range(3):
            try:
                raise KeyError("unrelated")
            except KeyError:
                with pytest.raises(FFError) as info:
                    await writer.flush(5)
                caught.append(info.value)
        for _ in range(3):
            with pytest.raises(FFError) as info:
                writer.write(b"more")
            caught.append(info.value)
        assert len({id(error) for error in caught}) == 6
        assert len({type(error) for error in caught}) == 1
        assert all([f.payload for f in error.unstored] == [b"late"] for error in caught)
        assert writer.error.__traceback__ is None
        assert writer.error.__context__ is None
        with pytest.raises(type(caught[0])):
            await writer.close()
        with pytest.raises(type(caught[0])):
            await writer.drain()


async def test_closing_twice(shell, server, lane):
    backend = await shell.connect(server.url)
    _, handle = await claimed(backend, lane)
    writer = await backend.open_writer(handle)
    writer.write(b"1")
    for _ in range(3):
        await writer.close()
    with pytest.raises(WriterClosed):
        writer.write(b"2")
    for _ in range(3):
        await backend.close()


async def test_a_superseded_writer_is_closed_with_its_backend(shell, server, lane):
    backend = await shell.connect(server.url)
    _, handle = await claimed(backend, lane)
    first = await backend.open_writer(handle)
    await backend.open_writer(handle)
    await backend.close()
    assert isinstance(first.error, WriterClosed)


async def test_writers_are_forgotten(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        for _ in range(20):
            _, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            writer.write(b"1")
            await writer.close()
            del writer
            await backend.append_frame(handle, Frame(b"{}", FrameKind.EVENT))
            await backend.complete(handle)
        gc.collect()
        assert len(backend.wrapped._writers) <= 1
        assert len(backend.wrapped._senders.writers) <= 1
        assert not backend.wrapped._frame_writers


def test_the_private_names_of_redis_py():
    """The library takes socket and parser from redis-py by names that it does not promise: see `_transport`."""
    import redis
    from redis.asyncio.connection import Connection as AsyncConnection
    from redis.connection import Connection

    said = f"redis-py {redis.__version__} keeps its socket elsewhere: adapt ff_fast/_transport.py"
    for kind, name in (
        (Connection, "_sock"),
        (AsyncConnection, "_writer"),
        (AsyncConnection, "_reader"),
    ):
        assert getattr(kind(), name, said) is None, said


# -- pressure ----------------------------------------------------------------------------------------------------


async def test_a_server_that_does_not_keep_up(shell, proxy, server, lane):
    limit = 1 << 20
    async with await shell.connect(proxy.url, timeout=30) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, max_unacknowledged_bytes=2 * limit)
        proxy.hold(UP, DOWN)
        tracemalloc.start()
        payload, written = b"x" * 1024, 0
        for _ in range(3):
            overload = None
            while overload is None:
                try:
                    writer.write(payload)
                except Overloaded as error:
                    overload = error
                else:
                    written += 1
            assert overload.retryable
            await asyncio.sleep(0)
        held, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        # Payloads count as they were given, or as what is sent once they are.
        assert 0.9 * limit < written * 1024 / 2 <= limit
        assert peak < 6 * limit
        draining = asyncio.ensure_future(writer.drain(20))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(asyncio.shield(draining), 0.05)
        proxy.release()
        await draining
        assert writer.unacknowledged_bytes <= limit
        writer.write(payload)
        await writer.close()
    assert len(frames(server.url, eid)) == written + 1
    assert held


async def test_many_large_calls_wait_their_turn(proxy, lane):
    backend = await aio.ValkeyBackend.connect(config(proxy.url, timeout=20))
    proxy.hold(UP)
    calls = [
        asyncio.ensure_future(backend.create_execution(lane=lane, payload=b"x" * (1 << 18)))
        for _ in range(64)
    ]
    await wait_until_async(lambda: _true(not backend._nodes.first.shared.connection.writable))
    for _ in range(50):
        await asyncio.sleep(0)
    # One call may be in the buffer, and what the kernel took; the other sixty wait.
    assert backend._nodes.first.shared.connection._transport.get_write_buffer_size() < 3 << 20
    calls[30].cancel()
    proxy.release()
    results = await asyncio.gather(*calls, return_exceptions=True)
    assert len({result for result in results if isinstance(result, str)}) == 63
    await backend.close()


# -- what stays --------------------------------------------------------------------------------------------------


async def turns(shell, url, lane, count):
    for i in range(count):
        backend = await shell.connect(url)
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        for _ in range(3):
            writer.write(b"frame")
        await writer.flush(5)
        with pytest.raises(ExecutionNotFound):
            await backend.describe(ff_fast.keys.new_execution_id())
        await backend.append_frame(handle, Frame(b"{}", FrameKind.EVENT))
        if i % 2:
            await writer.close()
            await backend.complete(handle)
        else:
            writer.write(b"never flushed")
        await backend.close()
        assert isinstance(writer.error, WriterClosed)


def own_threads():
    # Those of the loop's executor come when two calls overlap, and stay: they are not the library's.
    return [thread for thread in threading.enumerate() if not thread.name.startswith("asyncio_")]


@pytest.mark.long
async def test_three_hundred_lives_leave_nothing(shell, server, lane):
    with connect_raw(server.url) as raw:
        clients = len(raw.client_list())
        await turns(shell, server.url, lane, 5)
        gc.collect()
        before = len(descriptors())
        threads = len(own_threads())
        await turns(shell, server.url, lane, 300)
        gc.collect()
        # A thread that was told to end may not have had its turn.
        await wait_until_async(lambda: _true(len(own_threads()) <= threads))
        await wait_until_async(lambda: _true(len(descriptors()) <= before))
        assert len(asyncio.all_tasks()) == 1
        await wait_until_async(lambda: _true(len(raw.client_list()) <= clients))


async def test_failed_connects_leave_nothing(shell, proxy):
    before = len(descriptors())
    proxy.refuse()
    for _ in range(50):
        with pytest.raises(Unavailable):
            await shell.connect(proxy.url, retries=1, factor=0)
    gc.collect()
    assert len(descriptors()) <= before


async def test_readers_that_walk_away_leave_nothing(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        eid, handle = await claimed(backend, lane)
        async with await backend.open_writer(handle) as writer:
            for i in range(100):
                writer.write(b"%d" % i)
        with connect_raw(server.url) as raw:
            raw.ping()
            connected = None
            for _ in range(30):
                await _one_item(backend.wrapped, eid)
                connected = connected or len(raw.client_list())
            assert len(raw.client_list()) <= connected


async def _one_item(backend, eid):
    if isinstance(backend, aio.ValkeyBackend):
        tail = backend.tail(eid)
        assert (await anext(tail)).payload == b"0"
        await tail.aclose()
    else:
        for item in backend.tail(eid):
            assert item.payload == b"0"
            break
