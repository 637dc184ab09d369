"""P10: does a best-effort frame stay for its ttl, and how large a window does that take?

Writer cores run in real time, beside each other, on steady streams and on traces of bursts and pauses. No server takes
part: acknowledgements are made up from this machine's clock. Each trim and expiry that a core requests is checked. The
formula is FlowFabric's, K = ceil(rate * ttl * 2), with the true rate of the stream or burst.
"""

from __future__ import annotations

import math
import random
import re
import time
from collections import deque

from bench.figures import Figure, Report, Row, Target, percentile
from bench.harness import Stage, check, position
from bench.jobs import mode_of
from ff_fast._hot.writer import WriterCore

RATES = (200, 500, 1000, 2000, 4000)
# No multiple of a frame's period, so that the sizes of batches vary.
TICK_S = 0.0013
TRACES = 6
CEILING = 4_000_000
FLOOR = 64
TRIM = re.compile(rb"\r\n\$1\r\nT\r\n\$\d+\r\n(\d+)-(\d+)\r\n")
EXPIRE = re.compile(rb"\r\n\$1\r\nP\r\n\$\d+\r\n(\d+)\r\n")


class Phase:
    """A time of one rate."""

    def __init__(self, start: float, seconds: float, count: int) -> None:
        self.start = start
        self.rate = count / seconds
        self.count = count

    def due(self, now: float) -> int:
        """Return the number of frames that are due by *now*."""
        return min(max(int((now - self.start) * self.rate), 0), self.count)


def trace(seed: int, seconds: float) -> list[Phase]:
    """Return bursts of 50 to 2000 frames over 0.5 to 10 s, with pauses of 1 to 30 s."""
    rng = random.Random(seed)
    phases = []
    at = 0.0
    while at < seconds:
        length = rng.uniform(0.5, 10.0)
        phases.append(Phase(at, length, rng.randint(50, 2000)))
        at += length + rng.uniform(1.0, 30.0)
    return phases


class FlowFabricRate:
    """FlowFabric's estimate: a moving average of the rate, from whole milliseconds between two appends."""

    def __init__(self, ttl_ms: int) -> None:
        self._ttl_s = ttl_ms / 1000
        self._rate = FLOOR / (2 * self._ttl_s)
        self._last: int | None = None

    def window(self, now_ms: int) -> int:
        if self._last is not None:
            self._rate = 0.2 * (1000 / max(now_ms - self._last, 1)) + 0.8 * self._rate
        self._last = now_ms
        return formula(self._rate, self._ttl_s)


def formula(rate: float, ttl_s: float) -> int:
    return min(max(math.ceil(rate * ttl_s * 2), FLOOR), CEILING)


class Stream:
    """A writer core, and the frames that a reader would still find."""

    def __init__(self, name: str, phases: list[Phase], ttl_ms: int) -> None:
        self.name = name
        self.ttl_ms = ttl_ms
        self.windows: list[float] = []
        self.held: list[float] = []
        self.by_formula: list[float] = []
        self.by_flowfabric: list[float] = []
        self.early = 0
        self.frames = 0
        self._phases = deque(phases)
        self._written = 0
        self._kept: deque[tuple[int, int]] = deque()
        self._dropped = 0
        self._expires_ms = 0
        self._newest_ms = 0
        self._flowfabric = FlowFabricRate(ttl_ms)
        self._core = WriterCore(
            keys=(b"head", b"log", b"live", b"summary"),
            writer=b"0:lease:1:writer",
            mode=mode_of("best_effort", ttl_ms, CEILING),
            opened=(1_700_000_000_000, 0, 0, b"", 0),
        )

    def turn(self, now: float, now_ms: int) -> None:
        """Write the due frames as one batch, and check the trims and expiries in its request."""
        if not self._phases:
            return
        phase = self._phases[0]
        count = phase.due(now) - self._written
        if count > 0:
            # A bound for stalls of this machine: a writer would have sent several batches meanwhile.
            count = min(count, 1000)
            self._append(count, phase, now_ms)
            self._written += count
        if self._written == phase.count:
            self._phases.popleft()
            self._written = 0

    def _append(self, count: int, phase: Phase, now_ms: int) -> None:
        core = self._core
        by_flowfabric = 0
        for _ in range(count):
            core.write(b"token.")
            by_flowfabric = self._flowfabric.window(now_ms)
        sequence = core.next_sequence - 1
        self.frames += count
        if self._expires_ms and self._expires_ms < min(now_ms, self._newest_ms + self.ttl_ms):
            self.early += 1
        batch = core._next_batch()
        assert batch is not None
        if found := TRIM.search(batch.message):
            self._trim(int(found[2]), now_ms)
        if found := EXPIRE.search(batch.message):
            self._expires_ms = now_ms + int(found[1])
        self._kept.append((sequence, now_ms))
        self._newest_ms = now_ms
        check(
            core._acknowledge(batch, position(now_ms, sequence), now_ms) is None,
            "refused",
        )
        self.windows.append(core.window_frames)
        self.held.append(sequence - self._dropped)
        self.by_formula.append(formula(phase.rate, self.ttl_ms / 1000))
        self.by_flowfabric.append(by_flowfabric)

    def _trim(self, first_kept: int, now_ms: int) -> None:
        while self._kept and self._kept[0][0] < first_kept:
            last, stored_ms = self._kept.popleft()
            if now_ms - stored_ms < self.ttl_ms:
                self.early += last - self._dropped
            self._dropped = last

    def end(self) -> None:
        if self._expires_ms < self._newest_ms + self.ttl_ms:
            self.early += 1


def run(stage: Stage) -> Report:
    """P10."""
    seconds = float(stage.pick(75, 2))
    ttls = (400, 800) if stage.quick else (5_000, 30_000)
    streams = [
        Stream(
            f"steady {rate} Hz, ttl {ttl / 1000:g} s", [Phase(0, seconds, int(rate * seconds))], ttl
        )
        for ttl in ttls
        for rate in RATES
    ]
    for ttl in ttls:
        streams += [
            Stream(f"trace, ttl {ttl / 1000:g} s", trace(seed, seconds), ttl)
            for seed in range(TRACES)
        ]
    start = time.monotonic()
    while (now := time.monotonic() - start) < seconds:
        for stream in streams:
            stream.turn(now, int((start + now) * 1000))
        time.sleep(max(TICK_S - (time.monotonic() - start - now), 0))
    report = Report()
    names = list(dict.fromkeys(stream.name for stream in streams))
    for name in names:
        same = [stream for stream in streams if stream.name == name]
        for stream in same:
            stream.end()
        report.figures[name] = {
            "frames_gone_early": Figure.of([sum(stream.early for stream in same)]),
            "frames": Figure.of([sum(stream.frames for stream in same)]),
            "p99_k": p99([stream.windows for stream in same]),
            "p99_held": p99([stream.held for stream in same]),
            "p99_k_by_formula": p99([stream.by_formula for stream in same]),
            "p99_k_by_flowfabric": p99([stream.by_flowfabric for stream in same]),
        }
        report.rows.append(
            Row(
                "P10", f"{name}: p99 K", "frames", report.figure(name, "p99_k"),
                "formula at the true rate", report.figure(name, "p99_k_by_formula"),
                Target(1.0, of_ratio=True),
            )
        )  # fmt: skip
    report.rows.insert(
        0,
        Row(
            "P10", f"frames gone before their ttl, {len(streams)} streams", "",
            Figure.of([sum(stream.early for stream in streams)]), target=Target(0),
        ),
    )  # fmt: skip
    return report


def p99(lists: list[list[float]]) -> Figure:
    return Figure.of([percentile([value for values in lists for value in values], 0.99)])
