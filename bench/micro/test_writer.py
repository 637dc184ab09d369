"""Writing 1,024 frames into a writer core, up to the bytes of its requests, without a connection."""

from __future__ import annotations

from typing import TYPE_CHECKING

import hiredis
import pytest

from bench.harness import PAYLOAD_SIZE, payloads, position
from bench.jobs import mode_of
from ff_fast._hot.writer import WriterCore

if TYPE_CHECKING:
    from bench.micro.timing import Benchmark

COUNT = 1_024
FRAMES = payloads(COUNT)


def new_core(mode: str) -> WriterCore:
    return WriterCore(
        keys=(b"head", b"log", b"live", b"summary"),
        writer=b"0:lease:1:writer",
        mode=mode_of(mode),
        opened=(1_700_000_000_000, 0, 0, b"", 0),
    )


def stream(core: WriterCore, batch: int) -> int:
    """Write every frame; each *batch* of them is sealed and acknowledged."""
    size = 0
    for at in range(0, COUNT, batch):
        sequence = 0
        for payload in FRAMES[at : at + batch]:
            sequence = core.write(payload)
        sealed = core._next_batch()
        assert sealed is not None
        size += len(sealed.message)
        core._acknowledge(sealed, position(1_700_000_000_000, sequence))
    return size


@pytest.mark.parametrize("batch", [1, 64, 256])
@pytest.mark.parametrize("mode", ["durable", "best_effort"])
def test_1024_frames(benchmark: Benchmark, mode: str, batch: int) -> None:
    core = new_core(mode)
    assert benchmark(stream, core, batch) > COUNT * PAYLOAD_SIZE
    assert core._idle


def test_1024_xadd_by_hiredis(benchmark: Benchmark) -> None:
    """Pack one XADD of six fields for each frame: the least that a client does."""

    def pack() -> int:
        size = 0
        for payload in FRAMES:
            command = (
                "XADD", "stream", "*", "frame_type", "token", "ts", "1700000000000", "payload", payload,
                "encoding", "utf8", "source", "worker", "mode", "durable",
            )  # fmt: skip
            size += len(hiredis.pack_command(command))  # type: ignore[arg-type] # its stub means one-tuples
        return size

    assert benchmark(pack) > COUNT * PAYLOAD_SIZE
