"""A reader is an object: time-outs and cancellations lose nothing, and every item says where to go on."""

import asyncio
import contextlib
import datetime
import random
import signal
import threading
import time

import pytest

import ff_fast
from ff_fast import BestEffortLiveConfig, End, Gap, StreamFrame, StreamMode, aio, errors
from ff_fast.embedded import EmbeddedServer

from ..conftest import connect_raw
from ..shells import Opener
from .readers import begin, sequences, wait_listening


@pytest.fixture(params=["sync", "asyncio"])
def connect(request):
    opener = Opener(request.param)
    yield opener
    opener.close()


@pytest.fixture
def shell(connect, server):
    return connect(server.url)


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def attempt(backend, lane):
    return begin(backend, lane)


@pytest.fixture
def writer(backend, attempt):
    return backend.open_writer(attempt.handle)


def write(writer, *payloads):
    for payload in payloads:
        writer.write(payload)
    writer.flush()


# -- batches -------------------------------------------------------------------------------------------


def test_a_batch_is_what_one_answer_brought(shell, writer, attempt):
    write(writer, b"1", b"2", b"3")
    tail = shell.tail(attempt.eid)
    batch = tail.next_batch()
    assert [frame.payload for frame in batch] == [b"1", b"2", b"3"]
    assert tail.cursor == batch[-1].cursor
    assert tail.last == batch[-1]


def test_nothing_in_time_is_an_empty_batch_and_the_tail_goes_on(shell, writer, attempt):
    tail = shell.tail(attempt.eid)
    for timeout in (0, 0.01, datetime.timedelta(milliseconds=10)):
        assert tail.next_batch(timeout) == []
    assert not tail.ended
    write(writer, b"late")
    assert [frame.payload for frame in tail.next_batch(10)] == [b"late"]
    assert tail.next_batch(0.01) == []
    writer.close()


@pytest.mark.parametrize("timeout", [-1, float("nan"), float("inf"), "1", 1e9])
def test_a_bad_timeout_is_refused_and_the_tail_goes_on(shell, writer, attempt, timeout):
    write(writer, b"1")
    tail = shell.tail(attempt.eid)
    with pytest.raises(errors.InvalidInput, match="timeout"):
        tail.next_batch(timeout)
    assert len(tail.next_batch(10)) == 1


def test_a_batch_after_single_items_has_the_rest(backend, writer, attempt):
    write(writer, b"1", b"2", b"3")
    tail = backend.tail(attempt.eid)
    assert next(tail).payload == b"1"
    assert [frame.payload for frame in tail.next_batch()] == [b"2", b"3"]


def test_the_end_comes_once_and_stays(shell, backend, writer, attempt):
    write(writer, b"1")
    writer.close()
    backend.complete(attempt.handle)
    tail = shell.tail(attempt.eid)
    items = []
    while not tail.ended:
        items += tail.next_batch(10)
    assert [type(item) for item in items] == [StreamFrame, End]
    assert tail.next_batch() == tail.next_batch(0.01) == []
    assert "ended=True" in repr(tail)


# -- cursors -------------------------------------------------------------------------------------------


def test_every_item_has_a_cursor_that_goes_on_behind_it(shell, backend, raw, attempt):
    mode = StreamMode.best_effort_live_with_config(BestEffortLiveConfig(600_000, maxlen_floor=1))
    with backend.open_writer(attempt.handle) as writer:
        for n in range(20):
            writer.write(b"%d" % n, mode=mode if 5 <= n < 15 else None)
            writer.flush()
        raw.xtrim(attempt.live, maxlen=3, approximate=False)
    backend.complete(attempt.handle)
    tail = shell.tail(attempt.eid)
    items = []
    while not tail.ended:
        items += tail.next_batch(10)
    assert any(isinstance(item, Gap) for item in items)
    for at, item in enumerate(items):
        rest = shell.tail(attempt.eid, after=item.cursor)
        behind = []
        while not rest.ended:
            behind += rest.next_batch(10)
        # Behind the end there is the end again.
        assert behind == (items[at + 1 :] or [items[-1]]), item


def test_the_cursor_is_that_of_the_item_taken_last(backend, writer, attempt):
    write(writer, b"1", b"2", b"3")
    tail = backend.tail(attempt.eid)
    assert tail.cursor == "0.0-0"
    first = next(tail)
    # The others were read already.
    assert tail.cursor == first.cursor
    tail.close()
    assert next(backend.tail(attempt.eid, after=tail.cursor)).payload == b"2"


# -- time-outs and cancellations -------------------------------------------------------------------------


def test_wait_for_on_the_next_item_loses_nothing(server, backend, writer, attempt):
    """The tail goes on after a time-out, and its loop ends with an End alone."""

    async def main():
        async with aio.ValkeyBackend.connect(server.url) as own:
            tail = own.tail(attempt.eid)
            for _ in range(3):
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(tail), 0.02)
            await asyncio.to_thread(write, writer, b"1", b"2")
            assert (await asyncio.wait_for(anext(tail), 10)).payload == b"1"
            await asyncio.to_thread(finish, backend, writer, attempt)
            return [item async for item in tail]

    *frames, end = asyncio.run(main())
    assert end == End("attempt_success")
    assert sequences(frames) == [2]


def finish(backend, writer, attempt):
    writer.close()
    backend.complete(attempt.handle)


@pytest.mark.parametrize("seed", range(3))
def test_reads_cancelled_at_random_lose_and_double_nothing(server, backend, writer, attempt, seed):
    count = 2_000
    dice = random.Random(seed)
    stop = threading.Event()

    def produce():
        for n in range(count):
            writer.write(b"%d" % n)
            if n % 50 == 0:
                time.sleep(0.002)
        writer.close()
        backend.complete(attempt.handle)
        stop.set()

    async def main():
        items = []
        async with aio.ValkeyBackend.connect(server.url) as own:
            tail = own.tail(attempt.eid)
            while not tail.ended:
                kind = dice.random()
                limit = dice.choice([0, 0.0001, 0.001, 0.005])
                if kind < 0.4:
                    items += await tail.next_batch(limit)
                elif kind < 0.7:
                    task = asyncio.create_task(tail.next_batch())
                    await asyncio.sleep(limit)
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError):
                        items += await task
                else:
                    with contextlib.suppress(TimeoutError, StopAsyncIteration):
                        items.append(await asyncio.wait_for(anext(tail), limit))
        return items

    producer = threading.Thread(target=produce)
    producer.start()
    items = asyncio.run(main())
    producer.join()
    assert items[-1] == End("attempt_success")
    assert sequences(items) == list(range(1, count + 1))
    assert len(items) == count + 1


class Interrupt(Exception):  # noqa: N818 - raised by a signal
    pass


# An interrupt that strikes in a destructor is reported there.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_at_any_moment_loses_and_doubles_nothing(server, backend, writer, attempt):
    count, dice = 4_000, random.Random(5)
    me, armed = threading.get_ident(), threading.Event()

    def produce():
        for n in range(count):
            writer.write(b"%d" % n)
            if n % 10 == 0:
                time.sleep(0.002)
        writer.close()
        backend.complete(attempt.handle)

    def interrupt(*_):
        if armed.is_set():
            armed.clear()
            raise Interrupt

    def interrupted():
        """A batch, or an interrupt in the middle of reading it."""
        strike = threading.Timer(dice.random() * 0.002, signal.pthread_kill, (me, signal.SIGUSR1))
        strike.start()
        try:
            armed.set()
            batch = tail.next_batch(0.005)
            armed.clear()
        except Interrupt:
            # Taken by the call, but not by its caller: the cursor says so.
            batch = None
        strike.join()
        armed.clear()
        return batch

    before = signal.signal(signal.SIGUSR1, interrupt)
    producer = threading.Thread(target=produce)
    items, struck = [], 0
    try:
        with ff_fast.ValkeyBackend.connect(server.url) as own:
            tail = own.tail(attempt.eid)
            producer.start()
            while not tail.ended:
                batch = interrupted()
                if batch is None:
                    struck += 1
                    if tail.cursor != (items[-1].cursor if items else "0-0"):
                        tail = own.tail(attempt.eid, after=items[-1].cursor if items else None)
                items += batch or []
    finally:
        signal.signal(signal.SIGUSR1, before)
        producer.join()
    assert struck
    assert sequences(items) == list(range(1, count + 1))


# -- one at a time, closing -----------------------------------------------------------------------------


def test_a_second_reader_of_one_tail_is_refused(server, backend, attempt, raw):
    tail = backend.tail(attempt.eid)
    reading = threading.Thread(target=tail.next_batch, args=(20,))
    reading.start()
    wait_listening(raw)
    with pytest.raises(errors.InvalidInput, match="for each"):
        tail.next_batch(0)
    with backend.open_writer(attempt.handle) as writer:
        writer.write(b"x")
    reading.join()

    async def main():
        async with aio.ValkeyBackend.connect(server.url) as own:
            other = own.tail(attempt.eid)
            first = asyncio.create_task(other.next_batch(1))
            await asyncio.sleep(0)
            with pytest.raises(errors.InvalidInput, match="for each"):
                await other.next_batch(0)
            assert [each.payload for each in await first] == [b"x"]

    asyncio.run(main())


def test_a_closed_tail_says_so(server, backend, attempt):
    tail = backend.tail(attempt.eid)
    tail.close()
    tail.close()
    assert tail.closed
    for read in (tail.next_batch, lambda: next(tail)):
        with pytest.raises(errors.Unavailable, match="closed"):
            read()

    async def main():
        async with aio.ValkeyBackend.connect(server.url) as own:
            other = own.tail(attempt.eid)
            await other.aclose()
            await other.aclose()
            with pytest.raises(errors.Unavailable, match="closed"):
                await anext(other)

    asyncio.run(main())


def test_closing_ends_a_read_of_another_thread(backend, attempt, raw):
    tail = backend.tail(attempt.eid)
    caught = []

    def read():
        try:
            tail.next_batch()
        except errors.FFError as error:
            caught.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    wait_listening(raw)
    tail.close()
    reading.join(10)
    assert [type(error) for error in caught] in ([errors.Unavailable], [errors.OutcomeUnknown])


def test_a_tail_that_is_closed_as_a_read_ends_listens_no_more(backend, writer, attempt):
    write(writer, b"1")
    tail = backend.tail(attempt.eid)
    read_on = tail._read_on

    def closed_behind(until):
        read_on(until)
        closing = threading.Thread(target=tail.close)
        closing.start()
        closing.join(10)

    tail._read_on = closed_behind
    assert [frame.payload for frame in tail.next_batch(10)] == [b"1"]
    assert tail.closed
    # Though nobody reads it again, and somebody still refers to it.
    assert backend.stats().tails_open == 0
    assert tail._attached is None


def test_closing_ends_a_read_of_another_task(server, backend, attempt, raw):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as own:
            tail = own.tail(attempt.eid)
            reading = asyncio.create_task(tail.next_batch())
            await asyncio.to_thread(wait_listening, raw)
            await tail.aclose()
            with pytest.raises(errors.FFError):
                await asyncio.wait_for(reading, 10)

    asyncio.run(main())


def test_a_tail_hears_what_came_after_a_read_was_cancelled(server, backend, attempt, raw):
    async def main():
        async with aio.ValkeyBackend.connect(server.url) as own:
            tail = own.tail(attempt.eid)
            task = asyncio.create_task(tail.next_batch())
            await asyncio.to_thread(wait_listening, raw)
            task.cancel()
            await asyncio.wait({task})
            with backend.open_writer(attempt.handle) as writer:
                await asyncio.to_thread(write, writer, b"1")
            assert sequences(await tail.next_batch(10)) == [1]

    asyncio.run(main())


# -- trouble -------------------------------------------------------------------------------------------


def test_a_tail_survives_its_servers_restart(connect, lane):
    with (
        EmbeddedServer(appendonly=True, appendfsync="always") as running,
        ff_fast.ValkeyBackend.connect(running.url) as backend,
    ):
        attempt = begin(backend, lane, lease_ttl_ms=600_000)
        tail = connect(running.url).tail(attempt.eid)
        with backend.open_writer(attempt.handle) as writer:
            write(writer, b"1")
        assert [frame.payload for frame in tail.next_batch(10)] == [b"1"]
        assert tail.next_batch(0.01) == []
        running.restart()
        with backend.open_writer(attempt.handle) as writer:
            write(writer, b"2")
        got = []
        until = time.monotonic() + 30
        while not got and time.monotonic() < until:
            got = tail.next_batch(1)
        assert [frame.payload for frame in got] == [b"2"]


def test_a_library_that_is_lost_is_loaded_by_the_tail(connect, lane):
    with EmbeddedServer() as running, ff_fast.ValkeyBackend.connect(running.url) as backend:
        attempt = begin(backend, lane)
        tail = connect(running.url).tail(attempt.eid)
        with connect_raw(running.url) as raw:
            raw.function_flush()
            assert tail.next_batch(0.5) == []
            assert raw.function_list()


def test_an_error_of_the_first_read_is_raised_by_each(shell):
    tail = shell.tail(ff_fast.keys.new_execution_id())
    for _ in range(2):
        with pytest.raises(errors.ExecutionNotFound):
            tail.next_batch(5)


# -- subscriptions ---------------------------------------------------------------------------------------


def test_a_subscription_is_a_reader_too(shell, backend, lane):
    scope = ff_fast.ScannerFilter(namespace=lane)
    completions = shell.subscribe_completions(scope)
    assert completions.next_batch(0.05) == []
    start = completions.cursor
    eids = []
    for _ in range(3):
        eids.append(backend.create_execution(lane=lane, namespace=lane))
        handle = backend.claim(lane=lane)
        backend.complete(handle, b"done")
    got = []
    while len(got) < 3:
        got += completions.next_batch(10)
    assert sorted(each.execution_id for each in got) == sorted(eids)
    assert completions.cursor == got[-1].cursor
    again = shell.subscribe_completions(scope, after=start)
    found = []
    while len(found) < 3:
        found += again.next_batch(10)
    assert sorted(each.execution_id for each in found) == sorted(eids)
