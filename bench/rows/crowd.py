"""P18 to P20: idle tails, ten thousand writers on one server, a cancellation that reaches a waiting handler."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, cast

from bench.figures import Figure, Report, Row, Target, percentile
from bench.harness import Metrics, Stage, check, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

STORED = 10
SETTLE_S = 0.5
# What a client sends for its tails. Functions do not call these, and the server counts what they call by its own name.
OF_TAILS = (
    "fcall",
    "fcall_ro",
    "xread",
    "ssubscribe",
    "sunsubscribe",
    "ping",
    "hello",
    "client|setinfo",
)
RATE = 20


def tails(stage: Stage) -> Report:
    """P18."""
    count, idle_s = stage.pick(5_000, 50), stage.pick(30, 1)
    with Stage(quick=stage.quick, executable=stage.executable, tcp=True) as tcp:
        streams = cast(
            "list[str]",
            tcp.worker("worker").run(
                "bench.crowd:store", url=tcp.url, streams=count, frames=STORED
            ),
        )
        tcp.end_workers()
        before = tcp.wire.connections()
        gateway = tcp.worker("gateway")
        gateway.start("bench.crowd:idle_tails", url=tcp.url, executions=streams, frames=STORED)
        opened = cast("Metrics", gateway.stage())
        time.sleep(SETTLE_S)
        calls, connections = tcp.wire.calls(*OF_TAILS), tcp.wire.connections() - before
        time.sleep(idle_s)
        calls = tcp.wire.calls(*OF_TAILS) - calls
        gateway.go_on()
        idle = cast("Metrics", gateway.stage())
        gateway.finish()
    figures = {
        name: Figure.of([value])
        for name, value in {
            "caught_up_s": opened["caught_up_s"],
            "client_us": opened["client_us"],
            "connections": connections,
            "kib_per_tail": opened["bytes_per_tail"] / 1024,
            "kib_per_idle_tail": idle["bytes_per_tail"] / 1024,
            "calls_per_tail": calls / count,
        }.items()
    }
    report = Report(figures={f"{count:,} tails": figures})
    what = f"{count:,} tails, opened at once, {STORED} frames each"
    report.rows = [
        Row("P18", f"{what}: caught up", "s", figures["caught_up_s"], target=Target(3.0)),
        Row("P18", "the same: connections", "", figures["connections"], target=Target(2.0)),
        Row("P18", "the same: memory of the reading process for each", "KiB", figures["kib_per_tail"],
            target=Target(8.0)),
        Row("P18", f"the same, idle for {idle_s} s: server calls for each", "", figures["calls_per_tail"],
            target=Target(1.0)),
    ]  # fmt: skip
    return report


def writers(stage: Stage) -> Report:
    """P19."""
    attempts, rounds = stage.pick(10_000, 256), stage.pick(10, 3)
    report = Report()
    with Stage(quick=stage.quick, executable=stage.executable, tcp=True) as tcp:
        for name, mode in (("durable", "durable"), ("best-effort", "best_effort")):
            tcp.fresh()
            generator = tcp.worker("generator")
            generator.start(
                "bench.crowd:flood",
                url=tcp.url, attempts=attempts, rounds=rounds, rate=RATE, mode=mode,
            )  # fmt: skip
            calls = cast("Metrics", generator.stage())["calls"]
            cpu = tcp.wire.server_cpu()
            generator.go_on()
            flooded = cast("Metrics", generator.stage())
            cpu = tcp.wire.server_cpu() - cpu
            generator.finish()
            tcp.end_workers()
            figures = report.figures[f"{attempts:,} writers, {name}"] = {
                "server_us": Figure.of([cpu / attempts / rounds * 1e6]),
                "per_second": Figure.of([flooded["per_second"]]),
                "frames_per_call": Figure.of([attempts * rounds / calls]),
            }
            what = f"{attempts:,} writers on one server, {name}"
            report.rows += [
                Row("P19", f"{what}: server CPU per frame", "us", figures["server_us"], target=Target(5.0)),
                Row("P19", f"{what}: frames acknowledged", "/s", figures["per_second"],
                    target=Target(200_000, at_least=True)),
            ]  # fmt: skip
    return report


def cancellation(stage: Stage) -> Report:
    """P20."""
    count = stage.pick(100, 20)

    def turn() -> Metrics:
        stage.fresh()
        lane = uuid.uuid4().hex
        ids = [stage.backend.create_execution(lane=lane) for _ in range(count)]
        worker = stage.worker("worker")
        worker.start("bench.crowd:handlers", url=stage.url, lane=lane, count=count)
        worker.stage()
        asked: dict[str, int] = {}
        for execution_id in ids:
            time.sleep(0.005)
            asked[execution_id] = time.monotonic_ns()
            stage.backend.cancel(execution_id, grace=60.0)
        worker.go_on()
        told = cast("dict[str, int]", worker.stage())
        worker.finish()
        check(told.keys() == asked.keys(), "what was told is not what was cancelled")
        ms = [(told[execution_id] - at) / 1e6 for execution_id, at in asked.items()]
        return {"p50_ms": percentile(ms, 0.50), "p99_ms": percentile(ms, 0.99), "max_ms": max(ms)}

    turns: dict[str, Callable[[], Metrics]] = {"asyncio": turn}
    report = Report(figures=take_turns(turns, stage.pick(2, 1), warm=False))
    report.rows = [
        Row(
            "P20", f"cancel to a handler that waits, {share}", "ms",
            report.figure("asyncio", f"{share}_ms"), target=Target(50.0) if share == "p99" else None,
        )
        for share in ("p50", "p99")
    ]  # fmt: skip
    stage.end_workers()
    return report
