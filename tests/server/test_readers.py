"""What a reader promises whatever happens to a read: nothing is lost, nothing comes twice, and it goes on."""

import asyncio
import concurrent.futures
import contextlib
import dis
import multiprocessing
import os
import sys
import threading
import time

import pytest

import ff_fast
from ff_fast import End, ForkedClient, InvalidInput, aio

from ..faults.chaos import DOWN, ChaosProxy
from ..waiting import wait_until, wait_until_async
from .readers import begin, sequences

FRAMES = 300


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def attempt(backend, lane):
    """An attempt that has ended, behind frames that no single answer holds."""
    begun = begin(backend, lane)
    with backend.open_writer(begun.handle) as writer:
        for i in range(FRAMES):
            writer.write(b"%d" % i)
            if i % 100 == 0:
                writer.flush()
    backend.complete(begun.handle)
    return begun


def whole(items):
    assert sequences(items) == list(range(1, FRAMES + 1))
    assert [item for item in items if isinstance(item, End)] == [items[-1]]
    return True


async def gathered(reader):
    items = []
    while not reader.ended:
        items += await reader.next_batch(timeout=1)
    return items


# -- time-outs --------------------------------------------------------------------------------------


def test_a_look_without_a_wait_sees_what_has_come(backend, attempt):
    tail, items = backend.tail(attempt.eid), []
    wait_until(lambda: items.extend(tail.next_batch(timeout=0)) or tail.ended)
    assert whole(items)


def test_a_look_without_a_wait_sees_what_has_come_in_asyncio(server, attempt):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            tail, items = backend.tail(attempt.eid), []
            async with asyncio.timeout(10):
                while not tail.ended:
                    items += await tail.next_batch(timeout=0)
                    await asyncio.sleep(0.001)
            return items

    assert whole(asyncio.run(main()))


@pytest.mark.standalone("a proxy stands before one server")
def test_a_time_out_also_ends_the_wait_for_a_connection(server, attempt):
    async def main(proxy):
        async with aio.ValkeyBackend.connect(proxy.url) as backend:
            proxy.hold(DOWN)
            tail = backend.tail(attempt.eid)
            began = time.monotonic()
            assert await tail.next_batch(timeout=0.05) == []
            assert time.monotonic() - began < 3
            proxy.release()
            return await gathered(tail)

    with ChaosProxy(server.url) as proxy:
        assert whole(asyncio.run(main(proxy)))


@pytest.mark.parametrize("how", ["aclose", "drop"])
@pytest.mark.standalone("a proxy stands before one server")
def test_a_reader_that_was_left_while_it_connected_leaves_nothing(how, server, attempt):
    async def main(proxy):
        async with aio.ValkeyBackend.connect(proxy.url) as backend:
            tail = backend.tail(attempt.eid)
            proxy.hold(DOWN)
            assert await tail.next_batch(timeout=0.02) == []
            if how == "aclose":
                await tail.aclose()
            del tail
            proxy.release()
            core = backend._hub._core

            async def gone():
                return core.empty and not backend._hub._queue

            await wait_until_async(gone)

    with ChaosProxy(server.url) as proxy:
        asyncio.run(main(proxy))


# -- cancellations ----------------------------------------------------------------------------------


def test_a_read_that_was_cancelled_before_it_began_takes_nothing(server, attempt):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            tail = backend.tail(attempt.eid)
            items = [await anext(tail)]
            for _ in range(3):
                with contextlib.suppress(TimeoutError):
                    items.append(await asyncio.wait_for(anext(tail), 0))
                task = asyncio.create_task(anext(tail))
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await task
            return [*items, *await gathered(tail)]

    assert whole(asyncio.run(main()))


def test_reads_that_were_made_before_they_are_awaited(server, attempt):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            tail = backend.tail(attempt.eid)
            items = [await read for read in [anext(tail) for _ in range(3)]]
            return [*items, *await gathered(tail)]

    assert whole(asyncio.run(main()))


@pytest.mark.standalone("a proxy stands before one server")
def test_short_waits_get_on_where_connecting_takes_longer(server, attempt):
    async def main(proxy):
        async with aio.ValkeyBackend.connect(proxy.url) as backend:
            proxy.delay = 0.03
            tail, items = backend.tail(attempt.eid), []
            async with asyncio.timeout(20):
                while not items:
                    with contextlib.suppress(TimeoutError):
                        items.append(await asyncio.wait_for(anext(tail), 0.04))
            proxy.delay = 0
            assert proxy.accepted == 2
            return [*items, *await gathered(tail)]

    with ChaosProxy(server.url) as proxy:
        assert whole(asyncio.run(main(proxy)))


# -- interrupts -------------------------------------------------------------------------------------

# Where CPython looks for signals: behind a call, at the start of a function and at the end of a loop.
_LOOKS = {"CALL", "CALL_KW", "CALL_FUNCTION_EX", "RESUME", "JUMP_BACKWARD"}
_TRACED = ("_sync/readers.py", "_core/readers.py", "_core/tail.py")


class _Interrupt:
    """Interrupts the thread at one of these points in what a reader does."""

    def __init__(self, point):
        self._left = point
        self._before = {}
        self._names = {}

    @property
    def done(self):
        return self._left == 0

    def __call__(self, frame, event, _):
        code = frame.f_code
        collected = "__del__" in (code.co_name, frame.f_back and frame.f_back.f_code.co_name)
        if not code.co_filename.endswith(_TRACED) or collected:
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if code not in self._names:
            self._names[code] = {i.offset: i.opname for i in dis.get_instructions(code)}
        if event == "opcode":
            before = self._before.get(frame)
            self._before[frame] = self._names[code][frame.f_lasti]
            if before in _LOOKS and self._left:
                self._left -= 1
                if not self._left:
                    raise KeyboardInterrupt
        return self


def _iterated(tail, items):
    # Not extend(): an interrupt would take what it has drawn along.
    for item in tail:
        items.append(item)


def _batched(tail, items):
    while not tail.ended:
        batch = tail.next_batch(timeout=1)
        items += batch
    tail.next_batch()


def _interrupted(tail, read, interrupt):
    items = []
    sys.settrace(interrupt)
    try:
        while True:
            with contextlib.suppress(KeyboardInterrupt):
                read(tail, items)
                return items
    finally:
        sys.settrace(None)


@pytest.mark.long
@pytest.mark.parametrize("read", [_iterated, _batched])
def test_an_interrupt_in_the_middle_of_a_read(read, backend, attempt):
    # Every third point, and others in each variant: every one takes a tail of its own.
    point, interrupt = 0 if read is _iterated else 1, None
    # In a thread of its own: an error of a trace function stays its context for ever.
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        while interrupt is None or interrupt.done:
            point += 3
            interrupt = _Interrupt(point)
            found = thread.submit(_interrupted, backend.tail(attempt.eid), read, interrupt)
            assert whole(found.result()), f"at point {point}"
    assert point > 50


# -- threads, processes, and connections ------------------------------------------------------------


def test_threads_that_read_from_one_reader_take_each_item_once(backend, attempt):
    tail, items = backend.tail(attempt.eid), []

    def read():
        while not tail.ended:
            with contextlib.suppress(InvalidInput):
                items.extend(tail.next_batch(timeout=0.1))

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(sequences(items)) == list(range(1, FRAMES + 1))


def test_a_forked_child_leaves_the_readers_connection_alone(backend, lane):
    begun = begin(backend, lane)
    tail = backend.tail(begun.eid)
    assert tail.next_batch(timeout=0.05) == []

    def child():
        try:
            tail.next_batch(timeout=1)
        except ForkedClient:
            os._exit(0)
        os._exit(1)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    with backend.open_writer(begun.handle) as writer:
        writer.write(b"x")
    assert [frame.sequence for frame in tail.next_batch(timeout=2)] == [1]


def test_a_read_whose_reader_is_closed_says_so(backend, server, lane):
    eid = begin(backend, lane).eid
    tail, raised = backend.tail(eid), []

    def read():
        with pytest.raises(ff_fast.Unavailable, match="reader is closed") as caught:
            next(tail)
        raised.append(caught.value)

    thread = threading.Thread(target=read)
    thread.start()
    wait_until(lambda: tail._attached is not None)
    tail.close()
    thread.join()
    assert raised

    async def main():
        async with aio.ValkeyBackend.connect(server.url) as other:
            tail = other.tail(eid)
            reading = asyncio.create_task(anext(tail))
            await asyncio.sleep(0.02)
            await tail.aclose()
            with pytest.raises(ff_fast.Unavailable, match="reader is closed"):
                await reading

    asyncio.run(main())


def test_a_reader_that_has_ended_listens_no_more(backend, attempt):
    tail = backend.tail(attempt.eid)
    while not tail.ended:
        tail.next_batch()
    assert (tail._asked, tail._attached) == (None, None)


@pytest.mark.standalone("it looks inside the hub of one server")
def test_a_reader_that_has_ended_listens_no_more_in_asyncio(server, attempt):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            tail = backend.tail(attempt.eid)
            await gathered(tail)
            assert tail._attached is None
            assert not backend._hub._core.listening

    asyncio.run(main())
