"""Decoding entries to frames: ff_fast, the oracle, and a loop over redis-py's lists."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.harness import payloads
from bench.micro import oracles
from ff_fast._hot.frames import decode_entries

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.micro.timing import Benchmark

Entries = list[list[object]]

COUNT = 1_024
FRAMES = payloads(COUNT)


def durable() -> Entries:
    return [
        [b"1700000000000-%d" % i, [b"payload", payload]]
        for i, payload in enumerate(FRAMES, start=1)
    ]


def runs(size: int) -> Entries:
    made: Entries = []
    for at in range(0, COUNT, size):
        run = oracles.frames.run_of(FRAMES[at : at + size], [0] * size)
        made.append([b"1700000000000-%d" % (at + size), [b"run", run]])
    return made


CASES = {"durable": durable(), "runs of 16": runs(16), "runs of 64": runs(64)}


def by_ff_fast(entries: Entries) -> list[bytes]:
    return [frame.payload for frame in decode_entries(entries, 0).frames]


def by_oracle(entries: Entries) -> list[bytes]:
    return [frame.payload for frame in oracles.frames.decode(entries).frames]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("decode", [by_ff_fast, by_oracle], ids=["ff_fast", "oracle"])
def test_1024_frames(
    benchmark: Benchmark, case: str, decode: Callable[[Entries], list[bytes]]
) -> None:
    assert benchmark(decode, CASES[case]) == FRAMES


def test_1024_entries_to_dicts(benchmark: Benchmark) -> None:
    """Make a dict of each entry's fields, as a user of redis-py would; no frame objects."""

    def to_dicts(entries: list[tuple[bytes, list[bytes]]]) -> list[dict[bytes, bytes]]:
        return [dict(zip(fields[::2], fields[1::2], strict=True)) for _, fields in entries]

    found = benchmark(to_dicts, CASES["durable"])
    assert [fields[b"payload"] for fields in found] == FRAMES
