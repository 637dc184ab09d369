"""Wait for a condition instead of for a time: no test sleeps and hopes."""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], deadline_s: float = 15.0) -> T:
    """Return the first true value of *condition*; fail when there is none before the deadline."""
    end = time.monotonic() + deadline_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise AssertionError(f"still {value!r} after {deadline_s:g} s")
        time.sleep(0.002)
    return value


async def wait_until_async(condition: Callable[[], Awaitable[T]], deadline_s: float = 15.0) -> T:
    """:func:`wait_until` for a condition that is awaited."""
    end = time.monotonic() + deadline_s
    while not (value := await condition()):
        if time.monotonic() > end:
            raise AssertionError(f"still {value!r} after {deadline_s:g} s")
        await asyncio.sleep(0.002)
    return value
