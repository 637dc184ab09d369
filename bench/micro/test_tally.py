"""What counting costs: a writer's batches and a reader's pushes, with a tally and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from bench.harness import position
from bench.jobs import mode_of
from bench.micro.test_writer import FRAMES
from ff_fast._hot.feed import Inbox
from ff_fast._hot.frames import decode_push
from ff_fast._hot.tally import Tally
from ff_fast._hot.writer import WriterCore

if TYPE_CHECKING:
    from bench.micro.timing import Benchmark
    from ff_fast._hot.frames import Pushed

NOW_MS = 1_700_000_000_000
COUNTED = pytest.mark.parametrize("tally", [Tally(), None], ids=["counted", "not"])


def core_of(tally: Tally | None) -> WriterCore:
    return WriterCore(
        keys=(b"head", b"log", b"live", b"summary"),
        writer=b"0:lease:1:writer",
        mode=mode_of("durable"),
        opened=(NOW_MS, 0, 0, b"", 0),
        tally=tally,
    )


@COUNTED
@pytest.mark.parametrize("batch", [1, 64])
def test_1024_frames(benchmark: Benchmark, tally: Tally | None, batch: int) -> None:
    core = core_of(tally)

    def stream() -> None:
        for at in range(0, len(FRAMES), batch):
            sequence = 0
            for payload in FRAMES[at : at + batch]:
                sequence = core.write(payload)
            sealed = core._next_batch()
            assert sealed is not None
            core._acknowledge(sealed, position(NOW_MS, sequence))

    benchmark(stream)


def pushes(frames: int) -> list[Pushed]:
    """1,024 frames of 6 bytes in pushes of so many, as the server publishes them."""
    found = []
    for first in range(1, 1025, frames):
        values = bytes([frames] if frames < 128 else [frames % 128 | 128, frames // 128])
        body = values + b"\x06" * frames + b"\x00" * frames + b"123456" * frames
        size = bytes([len(body)] if len(body) < 128 else [len(body) % 128 | 128, len(body) // 128])
        found.append(decode_push(b"F%d-%d L\x00%b%b" % (NOW_MS, first + frames - 1, size, body)))
    return found


@COUNTED
@pytest.mark.parametrize("frames", [1, 64])
def test_1024_pushed_frames(benchmark: Benchmark, tally: Tally | None, frames: int) -> None:
    queue = pushes(frames)

    def read() -> int:
        inbox = Inbox()
        inbox.tally = tally
        taken = 0
        for pushed in queue:
            inbox.offer(pushed)
            taken += len(inbox.take())
        return taken

    assert benchmark(read) == 1024
