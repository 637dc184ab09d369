"""The type of pytest-benchmark's fixture, which has none, as far as it is used here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


class Benchmark(Protocol):
    """``benchmark(function, *arguments)`` calls *function* many times and returns the value of one call."""

    def __call__(self, function: Callable[..., T], *arguments: object) -> T: ...
