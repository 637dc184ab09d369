"""The live window: what 1,000 batches ask of it, beside the oracle that remembers each of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.micro import oracles
from ff_fast._hot.window import LiveWindow

if TYPE_CHECKING:
    from bench.micro.timing import Benchmark

BATCHES = 1_000
FRAMES = 4
STEP_US = 2_000
# More frames come within a ttl than the ceiling allows, so every trim is due to it.
TTL_MS, FLOOR, CEILING = 1_000, 64, 1_000
START_MS = 1_700_000_000_000


def ours() -> int:
    window = LiveWindow(TTL_MS, FLOOR, CEILING)
    first_kept = 0
    for i in range(BATCHES):
        now_us, server_ms = i * STEP_US, START_MS + i * STEP_US // 1000
        first_kept = max(first_kept, window.first_kept(FRAMES, now_us, server_ms)[1])
        renews = window.renew_due(True, now_us)
        window.take_rate(False, now_us)
        window.sealed(FRAMES, renews, now_us)
        window.stored(FRAMES)
        window.mark(server_ms, (i + 1) * FRAMES, renews, now_us)
    return first_kept


def oracle() -> int:
    window = oracles.window.Window(TTL_MS, FLOOR, CEILING)
    first_kept = 0
    for i in range(BATCHES):
        now_us, server_ms = i * STEP_US, START_MS + i * STEP_US // 1000
        first_kept = max(first_kept, window.first_kept(FRAMES, CEILING, server_ms)[1])
        renews = window.renew_due(True, now_us)
        window.sealed(FRAMES, renews, now_us)
        window.mark(FRAMES, server_ms, (i + 1) * FRAMES, renews, now_us)
    return first_kept


def test_1000_batches(benchmark: Benchmark) -> None:
    left = BATCHES * FRAMES - benchmark(ours)
    # Trims are a sixteenth of the window apart.
    assert CEILING - FRAMES <= left <= CEILING + CEILING // 16 + FRAMES


def test_1000_batches_python(benchmark: Benchmark) -> None:
    assert abs(BATCHES * FRAMES - benchmark(oracle) - CEILING) <= FRAMES
