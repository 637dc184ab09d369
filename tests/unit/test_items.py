"""Items that a reader has read: iteration takes each once, whatever interrupts it."""

import asyncio
import gc
import weakref

import pytest

from ff_fast._hot.items import AsyncItems, BlockingItems


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
