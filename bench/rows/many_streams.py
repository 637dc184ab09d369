"""P6: a thousand streams at 100 Hz each, from one process over one connection."""

from __future__ import annotations

from typing import cast

from bench.figures import Figure, Report, Row, Target, percentile
from bench.harness import Stage, check

RATE = 100


def run(stage: Stage) -> Report:
    """P6."""
    report = Report()
    streams, seconds = stage.pick(1_000, 100), float(stage.pick(60, 3))
    for mode in ("durable", "best_effort"):
        stage.fresh()
        length = seconds if mode == "durable" else min(seconds, 15.0)
        memory_before = float(stage.wire.info("memory")["used_memory"])
        cpu_before = stage.wire.server_cpu()
        answer: dict[str, object] = dict(
            stage.worker("many").run(
                "bench.jobs:many_streams",
                timeout=length * 3 + 60,
                url=stage.url, streams=streams, rate=RATE, seconds=length, mode=mode,
            )
        )  # fmt: skip
        cpu = stage.wire.server_cpu() - cpu_before
        memory_after = float(stage.wire.info("memory")["used_memory"])
        total = streams * RATE * length
        for eid in cast("list[str]", answer["executions"]):
            page = stage.backend.read_stream(eid, 0, after=f"0-{int(RATE * length) - 50}", count=50)
            check(len(page) == 50, f"the last 50 frames of a stream are {len(page)}")
        latencies = cast("list[float]", answer["latencies_ms"])
        samples = cast("list[tuple[float, float]]", answer["memory"])
        # The first quarter fills buffers and caches.
        settled = [size for at, size in samples if at >= length / 4] or [samples[-1][1]]
        growth = max(settled) / min(settled)
        figures = report.figures[f"{streams} streams, {mode}"] = {
            "per_second": Figure.of([cast("float", answer["per_second"])]),
            "client_us": Figure.of([cast("float", answer["client_us"])]),
            "server_us": Figure.of([cpu / total * 1e6]),
            "p50_ms": Figure.of([percentile(latencies, 0.5)]),
            "p99_ms": Figure.of([percentile(latencies, 0.99)]),
            "client_rss_mib": Figure.of([size / 2**20 for _, size in samples]),
            "client_growth": Figure.of([growth]),
            "server_mib": Figure.of([(memory_after - memory_before) / 2**20]),
        }
        name = mode.replace("_", "-")
        offered = streams * RATE
        job = f"{streams:,} streams at {RATE} Hz, {name}, {length:g} s"
        report.rows += [
            Row(
                "P6", f"{job}: acknowledged", "/s", figures["per_second"],
                target=Target(0.99 * offered, at_least=True),
            ),
            Row("P6", f"{job}: write to acknowledged, p99", "ms", figures["p99_ms"], target=Target(50)),
            Row(
                "P6", f"{job}: greatest over least memory of the client", "", figures["client_growth"],
                target=Target(1.1),
            ),
        ]  # fmt: skip
        stage.end_workers()
    return report
