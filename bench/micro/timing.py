"""The part of pytest-benchmark's fixture that is used here, which has no type information."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Benchmark(Protocol):
    """``benchmark(function, *arguments)``: calls it many times, returns what one call returned."""

    def __call__(self, function: Callable[..., T], *arguments: object) -> T: ...
