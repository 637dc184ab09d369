"""What a multi-step operation asks of its shell.

An operation of several steps is a generator: it yields a :class:`Step` or a :class:`Pause`, is resumed with the
replies, and returns its value. A shell moves the bytes and waits; it decides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Generator, Iterator
from typing import NamedTuple, TypeVar

from ff_fast.types import BackendRetry

T = TypeVar("T")


class Step(NamedTuple):
    """Send *request*, and resume with the list of its *replies* replies.

    Attributes:
        request: One or more packed commands.
        replies: How many replies they have.
        block_s: How long the server may block before it answers, in seconds.
    """

    request: bytes
    replies: int = 1
    block_s: float = 0.0


class Pause(NamedTuple):
    """Wait for *seconds*, then resume with an empty list."""

    seconds: float


Flow = Generator[Step | Pause, list[object], T]

DEFAULT_REQUEST_TIMEOUT_S = 5.0

# A lost connection is tried again for about ten seconds before a caller hears of it.
_DEFAULT_RETRIES = 16
_DEFAULT_BASE = 2
_DEFAULT_FACTOR_MS = 10
_DEFAULT_JITTER_PERCENT = 50
_LONGEST_S = 1.0


def backoff(retry: BackendRetry) -> Iterator[float]:
    """Yield the pauses between attempts, in seconds: ``factor * base^n`` ms, at most a second, less some jitter."""

    def given(value: int | None, default: int) -> int:
        return default if value is None else value

    base = given(retry.exponent_base, _DEFAULT_BASE)
    factor = given(retry.factor, _DEFAULT_FACTOR_MS)
    jitter = given(retry.jitter_percent, _DEFAULT_JITTER_PERCENT) / 100
    pause = factor / 1000
    for _ in range(given(retry.number_of_retries, _DEFAULT_RETRIES)):
        yield min(pause, _LONGEST_S) * (1 - jitter * random.random())  # noqa: S311 - no secret
        pause = min(pause * base, _LONGEST_S)
