"""Items that a reader has read: iteration takes each once, whatever interrupts it."""

import asyncio
import contextvars
import gc
import weakref

import pytest

from ff_fast._hot.feed import Bell, Feed, Inbox
from ff_fast._hot.frames import decode_push
from ff_fast._hot.items import AsyncItems, BlockingItems

from ..reference_frames import block_of, push_of


class Blocking(BlockingItems):
    """Reads the given answers."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def _fill(self):
        if not self.answers:
            return False
        self._put(self.answers.pop(0))
        return True


class Awaited(AsyncItems):
    def __init__(self, *answers):
        self.answers = list(answers)
        self.gate = None

    async def _next_item(self):
        if self.gate is not None:
            await self.gate.wait()
        if not self.answers:
            raise StopAsyncIteration
        self._put(self.answers.pop(0))
        return self._pop()


def taken(items):
    """All that is left, taken."""
    rest = items._rest
    del items._rest
    return rest


async def collected(items):
    return [item async for item in items]


@pytest.mark.parametrize("answers", [[], [[1]], [[1, 2, 3]], [[1], [2, 3], [4]]])
def test_every_item_once_in_order(answers):
    flat = [item for answer in answers for item in answer]
    assert list(Blocking(*[list(answer) for answer in answers])) == flat
    assert asyncio.run(collected(Awaited(*[list(answer) for answer in answers]))) == flat


def test_the_last_item_is_the_one_that_was_taken():
    items = Blocking([1, 2, 3])
    assert items.last is None
    assert next(items) == 1
    assert items.last == 1
    assert taken(items) == [2, 3]
    assert items.last == 3
    assert taken(items) == []
    assert items.last == 3
    assert items._empty


def test_an_end_stays_an_end():
    items = Blocking([1])
    assert list(items) == [1]
    assert list(items) == []
    awaited = Awaited([1])
    assert asyncio.run(collected(awaited)) == [1]
    assert asyncio.run(collected(awaited)) == []


def test_a_reader_that_fails_keeps_what_it_has():
    class Failing(Blocking):
        def _fill(self):
            if not self.answers:
                raise RuntimeError("later")
            return super()._fill()

    items = Failing([1, 2])
    assert next(items) == 1
    assert next(items) == 2
    with pytest.raises(RuntimeError, match="later"):
        next(items)
    items.answers.append([3])
    assert next(items) == 3


def test_an_item_that_was_taken_is_let_go_of():
    class Thing:
        pass

    things = [Thing(), Thing()]
    watched = weakref.ref(things[0])
    items = Blocking(things)
    next(items)
    next(items)
    del things
    gc.collect()
    assert watched() is None


def test_a_cancelled_wait_loses_nothing():
    async def main():
        items = Awaited([1, 2])
        items.gate = asyncio.Event()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(items), 0.01)
        items.gate.set()
        # Also where the item is there at once.
        assert await asyncio.wait_for(anext(items), 1) == 1
        assert await asyncio.wait_for(anext(items), 1) == 2
        with pytest.raises(StopAsyncIteration):
            await anext(items)

        # A task that is cancelled before it begins takes nothing.
        items.answers.append([3, 4])
        assert await anext(items) == 3
        task = asyncio.ensure_future(anext(items))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert await anext(items) == 4

    asyncio.run(main())


def test_classes_take_a_type_as_a_parameter():
    assert BlockingItems[int] is BlockingItems
    assert AsyncItems[int] is AsyncItems


# -- items that are pushed ------------------------------------------------------------------------


class Pushed(AsyncItems):
    """A tail whose reads bring nothing: what is not pushed is an end."""

    def __init__(self):
        self.inbox = Inbox()
        self.bell = Bell(asyncio.get_running_loop())
        self._attach(self.inbox, self.bell)
        self._looks_at = 0.0
        self.asked = 0

    async def _next_item(self):
        self.asked += 1
        if self.bell.waiting:
            raise RuntimeError("busy")
        raise StopAsyncIteration

    def push(self, *sequences):
        for n in sequences:
            block = block_of(b"V", [], [b"%d" % n])
            self.inbox.offer(decode_push(push_of(b"f", 5, n, [block])))


async def turns(count=5):
    for _ in range(count):
        await asyncio.sleep(0)


def payloads(frames):
    return [frame.payload for frame in frames]


def test_what_is_pushed_wakes_the_task_that_waits():
    async def main():
        items = Pushed()
        got = []

        async def read():
            got.extend([item async for item in items])

        task = asyncio.ensure_future(read())
        await turns()
        assert items.bell.waiting
        items.push(1)
        await turns()
        items.push(2, 3)
        items.push(4)
        await turns()
        assert (items.last.sequence, items.asked, got) == (4, 0, [])
        items._detach()
        await task
        assert payloads(got) == [b"1", b"2", b"3", b"4"]
        assert items.asked == 1

    asyncio.run(main())


def test_a_read_that_is_due_is_asked_for():
    async def main():
        items = Pushed()
        waiting = asyncio.ensure_future(anext(items))
        await turns()
        items.inbox.doubt(True)
        with pytest.raises(StopAsyncIteration):
            await waiting
        assert items.asked == 1

        # So is one whose time comes before that of the shell's timer.
        items = Pushed()
        items._looks_at = float("inf")
        items.inbox.look_at = 5.0
        with pytest.raises(StopAsyncIteration):
            await anext(items)

    asyncio.run(main())


def test_a_cancelled_wait_for_a_push_loses_nothing():
    async def main():
        items = Pushed()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(items), 0.01)
        assert not items.bell.waiting
        task = asyncio.ensure_future(anext(items))
        await turns()
        # The push comes first, then the cancellation, before the task has run.
        items.push(1)
        task.cancel("why")
        with pytest.raises(asyncio.CancelledError):
            await task
        assert (await anext(items)).payload == b"1"
        task = asyncio.ensure_future(anext(items))
        await turns()
        task.cancel("why")
        items.push(2)
        with pytest.raises(asyncio.CancelledError, match="why"):
            await task
        assert (await anext(items)).payload == b"2"
        assert items.asked == 0

    asyncio.run(main())


def test_one_task_at_a_time_waits():
    async def main():
        items = Pushed()
        task = asyncio.ensure_future(anext(items))
        await turns()
        with pytest.raises(RuntimeError, match="busy"):
            await anext(items)
        items.push(1)
        assert (await task).payload == b"1"

    asyncio.run(main())


def test_a_bell_is_awaited_many_times_and_keeps_the_context():
    async def main():
        bell = Bell(asyncio.get_running_loop())
        variable = contextvars.ContextVar("variable")

        async def wait():
            variable.set("mine")
            for _ in range(3):
                await bell
            return variable.get()

        task = asyncio.ensure_future(wait())
        for _ in range(3):
            await turns()
            assert bell.waiting
            bell()
            bell()
        assert await task == "mine"
        # Nobody waits, so nobody is woken later.
        bell()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await bell

    asyncio.run(main())


def test_an_exit_in_one_task_leaves_the_others_to_be_woken():
    bells = []
    ended = []

    async def wait(bell, how):
        await bell
        ended.append(how)
        if how == "exits":
            raise SystemExit

    async def first():
        loop = asyncio.get_running_loop()
        tasks = []
        for how in ("goes on", "exits", "goes on", "goes on"):
            bells.append(Bell(loop))
            tasks.append(loop.create_task(wait(bells[-1], how)))
        await turns()
        for bell in bells:
            bell()
        await asyncio.sleep(1)

    loop = asyncio.new_event_loop()
    with pytest.raises(SystemExit):
        loop.run_until_complete(first())
    assert ended == ["goes on", "exits"]
    loop.run_until_complete(turns())
    assert ended == ["goes on", "exits", "goes on", "goes on"]
    for task in asyncio.all_tasks(loop):
        task.cancel()
    loop.run_until_complete(turns())
    loop.close()


def test_a_reader_that_nobody_holds_is_let_go_of_by_its_feed():
    async def main():
        items = Pushed()
        feed = Feed(b"channel")
        feed.add(items.inbox)
        watched = weakref.ref(items)
        del items
        gc.collect()
        assert watched() is None

    asyncio.run(main())
