"""One FCALL as RESP: ff_fast beside hiredis and plain Python. All must make the same bytes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import hiredis
import pytest

from ff_fast._hot.resp import pack_fcall

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.micro.timing import Benchmark

Call = tuple[bytes, tuple[bytes, ...], tuple[bytes, ...]]


def call(arguments: int, size: int) -> Call:
    rng = random.Random(arguments * 1_000_003 + size)
    keys = tuple(b"{fp:%d}:%d" % (rng.randrange(256), i) for i in range(5))
    return b"ff_append", keys, tuple(rng.randbytes(size) for _ in range(arguments))


CASES = {
    # A renewal of a lease, a batch of small frames, and large payloads, where copying should dominate.
    "7 x 16 B": call(7, 16),
    "100 x 6 B": call(100, 6),
    "4 x 64 KiB": call(4, 65_536),
}


def by_python(function: bytes, keys: tuple[bytes, ...], argv: tuple[bytes, ...]) -> bytes:
    parts = (b"FCALL", function, b"%d" % len(keys), *keys, *argv)
    encoded = b"".join(b"$%d\r\n%b\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n%b" % (len(parts), encoded)


def by_hiredis(function: bytes, keys: tuple[bytes, ...], argv: tuple[bytes, ...]) -> bytes:
    packed: bytes = hiredis.pack_command((b"FCALL", function, len(keys), *keys, *argv))  # type: ignore[arg-type] # its stub means one-tuples
    return packed


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    "pack", [pack_fcall, by_hiredis, by_python], ids=["ff_fast", "hiredis", "python"]
)
def test_pack(benchmark: Benchmark, case: str, pack: Callable[..., bytes]) -> None:
    arguments = CASES[case]
    assert benchmark(pack, *arguments) == by_python(*arguments)
