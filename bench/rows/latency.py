"""P5: token bursts at a steady rate: milliseconds from `write` in one process to the frame in another."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, cast

from bench.figures import Report, Row, Target, percentile
from bench.harness import Metrics, Stage, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

RATES = (200, 500, 1000, 2000, 4000)
# The first frames meet cold caches in three processes.
SKIPPED = 20


def run(stage: Stage) -> Report:
    """P5 and the picture of latency against rate."""

    def measured_by(start: Callable[[], list[float]]) -> Metrics:
        latencies = start()[SKIPPED:]
        return {
            "p50_ms": percentile(latencies, 0.50),
            "p99_ms": percentile(latencies, 0.99),
            "max_ms": max(latencies),
        }

    def ours(rate: int, mode: str) -> Callable[[], Metrics]:
        count = frames_at(stage, rate)

        def turn() -> Metrics:
            stage.fresh()
            lane = uuid.uuid4().hex
            eid = stage.backend.create_execution(lane=lane)
            wrote: Metrics = {}

            def start() -> list[float]:
                reader, writer = stage.worker("ff_fast reader"), stage.worker("ff_fast writer")
                reader.start("bench.jobs:burst_read", url=stage.url, execution_id=eid, count=count)
                wrote.update(
                    writer.run(
                        "bench.jobs:burst_write",
                        url=stage.url, lane=lane, rate=rate, count=count, mode=mode,
                    )
                )  # fmt: skip
                return latencies_of(dict(reader.result()))

            return {**measured_by(start), **wrote}

        return turn

    def theirs(rate: int) -> Callable[[], Metrics]:
        count = frames_at(stage, rate)

        def turn() -> Metrics:
            stage.fresh()
            wrote: Metrics = {}

            def start() -> list[float]:
                reader, writer = stage.worker("redis reader"), stage.worker("redis writer")
                reader.start(
                    "bench.rivals:redis_burst_read", path=stage.path, key="bench", count=count
                )
                wrote.update(
                    writer.run(
                        "bench.rivals:redis_burst_write",
                        path=stage.path, key="bench", rate=rate, count=count,
                    )
                )  # fmt: skip
                return latencies_of(dict(reader.result()))

            return {**measured_by(start), **wrote}

        return turn

    report = Report()
    picture = report.series["latency"] = {}
    rival = "redis-py asyncio: awaited XADD, XREAD"
    for rate in RATES:
        found = take_turns(
            {
                "ff_fast durable": ours(rate, "durable"),
                rival: theirs(rate),
                "ff_fast best-effort": ours(rate, "best_effort"),
            },
            stage.pick(3, 1),
            warm=rate == RATES[0],
        )
        for name, figures in found.items():
            report.figures[f"{name}, {rate} Hz"] = figures
            for share in ("p50", "p99"):
                line = picture.setdefault(f"{name}, {share}", [])
                line.append((rate, figures[f"{share}_ms"].median))
        for what in ("durable", "best-effort"):
            for share, bound in (("p50", 1.0), ("p99", 5.0)):
                report.rows.append(
                    Row(
                        "P5", f"{what}, {rate} Hz, write to reader, {share}", "ms",
                        found[f"ff_fast {what}"][f"{share}_ms"],
                        rival, found[rival][f"{share}_ms"], Target(bound),
                    )
                )  # fmt: skip
    stage.end_workers()
    return report


def frames_at(stage: Stage, rate: int) -> int:
    return rate * 3 if not stage.quick else max(rate // 5, 60)


def latencies_of(answer: dict[str, object]) -> list[float]:
    return cast("list[float]", answer["latencies_ms"])
