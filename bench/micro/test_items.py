"""Taking items: the compiled iterators beside the same in Python."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from ff_fast._hot.items import AsyncItems, BlockingItems

if TYPE_CHECKING:
    from bench.micro.timing import Benchmark

ITEMS = list(range(1_000))


class Compiled(BlockingItems[int]):
    """Holds one answer."""

    def _fill(self) -> bool:
        return False


class CompiledAsync(AsyncItems[int]):
    """Holds one answer."""

    async def _next_item(self) -> int:
        raise StopAsyncIteration


class Python:
    """The same in Python."""

    def __init__(self) -> None:
        self.batch = list(ITEMS)
        self.at = 0
        self.last: int | None = None

    def __iter__(self) -> Python:
        return self

    def __aiter__(self) -> Python:
        return self

    def __next__(self) -> int:
        if self.at >= len(self.batch):
            raise StopIteration
        self.last = self.batch[self.at]
        self.at += 1
        return self.last

    async def __anext__(self) -> int:
        if self.at >= len(self.batch):
            raise StopAsyncIteration
        return self.__next__()


def compiled() -> Compiled:
    items = Compiled()
    items._put(list(ITEMS))
    return items


def compiled_async() -> CompiledAsync:
    items = CompiledAsync()
    items._put(list(ITEMS))
    return items


@pytest.mark.parametrize("make", [compiled, Python])
def test_iterate(benchmark: Benchmark, make: type[Python]) -> None:
    benchmark(lambda: sum(make()))


@pytest.mark.parametrize("make", [compiled_async, Python])
def test_iterate_async(benchmark: Benchmark, make: type[Python]) -> None:
    async def taken() -> int:
        return sum([item async for item in make()])

    loop = asyncio.new_event_loop()
    benchmark(lambda: loop.run_until_complete(taken()))
    loop.close()
