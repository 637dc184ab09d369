"""P1, P2: server CPU for each frame. Requests come from a raw socket, so no client takes part."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from bench.figures import Report, Row, Target
from bench.harness import (
    DURABLE,
    Metrics,
    Stage,
    batches,
    check_core,
    check_entries,
    payloads,
    per_frame_cpu,
    take_turns,
)
from bench.jobs import mode_of
from bench.rivals import FENCED_LIBRARY, FencedAttempt, acknowledged, encoded_xadd

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ff_fast import StreamMode

BATCH = 64
# Calls of one frame, and batches of different streams, in one round trip: enough to make the socket's share small.
PIPELINE = 64
STREAMS = 4


def run(stage: Stage) -> Report:
    """P1a, P1b, P2."""
    count = stage.pick(300, 4) * BATCH
    singles = stage.pick(60, 4) * PIPELINE
    # The log and the live window are full before the clock starts, so that trimming is measured too.
    filling = stage.pick(270, 4) * BATCH
    frames = payloads(filling + count)
    live = mode_of("best_effort")

    def in_batches(mode: StreamMode, kept: int, streams: int) -> Callable[[], Metrics]:
        def turn() -> Metrics:
            stage.fresh()
            cores = [stage.core(mode) for _ in range(streams)]

            def work(parts: list[Sequence[bytes]]) -> None:
                for part in parts:
                    sealed = [core.batch(part) for core in cores]
                    stage.wire.send(b"".join(batch.message for batch in sealed))
                    for core, batch in zip(cores, sealed, strict=True):
                        core.settle(batch, stage.wire.receive())

            work(batches(frames[:filling], BATCH))
            filled = sum(core.sent_bytes for core in cores)
            parts = batches(frames[filling:], BATCH)
            server_us = per_frame_cpu(stage.wire, count * streams, lambda: work(parts))
            wire_bytes = (sum(core.sent_bytes for core in cores) - filled) / count / streams
            for core in cores:
                check_core(stage, core, frames, min(kept, len(frames)))
            return {"server_us": server_us, "wire_bytes": wire_bytes}

        return turn

    def one_a_call(mode: StreamMode, each: int) -> Callable[[], Metrics]:
        def turn() -> Metrics:
            stage.fresh()
            core = stage.core(mode)
            requests = [core.encode(frame, int(time.time() * 1000)) for frame in frames[:singles]]
            work = acknowledged(stage.wire, requests, each)
            server_us = per_frame_cpu(stage.wire, singles, work)
            check_core(stage, core, frames[:singles], singles)
            return {"server_us": server_us, "wire_bytes": len(requests[0])}

        return turn

    def commands_alone() -> Metrics:
        stage.fresh()
        stage.wire.command("FUNCTION", "LOAD", "REPLACE", FENCED_LIBRARY)
        core = stage.core(DURABLE)
        requests = [
            core.encode(frame, int(time.time() * 1000)).replace(b"ff_append", b"bench_min", 1)
            for frame in frames[:singles]
        ]
        work = acknowledged(stage.wire, requests, PIPELINE)
        server_us = per_frame_cpu(stage.wire, singles, work)
        check_entries(stage.wire, core.log, frames[:singles])
        return {"server_us": server_us}

    def plain(each: int, streams: int) -> Callable[[], Metrics]:
        def turn() -> Metrics:
            stage.fresh()
            number = count if each > 1 else singles
            names = [f"bench{i}" for i in range(streams)]
            requests = [
                encoded_xadd(name, frame)
                for part in batches(frames[:number], each)
                for name in names
                for frame in part
            ]
            work = acknowledged(stage.wire, requests, each * streams)
            server_us = per_frame_cpu(stage.wire, number * streams, work)
            for name in names:
                check_entries(stage.wire, name.encode(), frames[:number])
            return {"server_us": server_us, "wire_bytes": len(requests[0])}

        return turn

    def fenced(each: int) -> Callable[[], Metrics]:
        def turn() -> Metrics:
            stage.fresh()
            attempt = FencedAttempt("bench")
            attempt.create(stage.wire)
            requests = [attempt.request(frame) for frame in frames[:singles]]
            work = acknowledged(stage.wire, requests, each)
            server_us = per_frame_cpu(stage.wire, singles, work)
            check_entries(stage.wire, attempt.stream, frames[:singles])
            return {"server_us": server_us, "wire_bytes": len(requests[0])}

        return turn

    measured = take_turns(
        {
            "ff_fast durable, batches of 64": in_batches(DURABLE, 10_000, STREAMS),
            "pipelined XADD": plain(BATCH, STREAMS),
            "ff_fast best-effort, runs of 64": in_batches(live, 16_000, STREAMS),
            "ff_fast durable, 64 a round trip": in_batches(DURABLE, 10_000, 1),
            "pipelined XADD, 64 a round trip": plain(BATCH, 1),
            "ff_fast best-effort, 64 a round trip": in_batches(live, 16_000, 1),
            "one fenced call a frame, 64 pipelined": fenced(PIPELINE),
            "ff_fast durable, one a call, 64 pipelined": one_a_call(DURABLE, PIPELINE),
            "ff_fast best-effort, one a call, 64 pipelined": one_a_call(live, PIPELINE),
            "its five commands alone": commands_alone,
            "ff_fast durable, one a round trip": one_a_call(DURABLE, 1),
            "awaited XADD, one a round trip": plain(1, 1),
            "one fenced call a frame, one a round trip": fenced(1),
        },
        # Turns are short, so other load on the machine hits some of them; more rounds make up for it.
        stage.pick(9, 1),
    )
    report = Report(figures=measured)

    def row(name: str, what: str, ours: str, rival: str, target: Target | None) -> None:
        report.rows.append(
            Row(
                name, what, "us", report.figure(ours, "server_us"),
                rival, report.figure(rival, "server_us"), target,
            )
        )  # fmt: skip

    xadd = "pipelined XADD"
    alone = "pipelined XADD, 64 a round trip"
    fence = "one fenced call a frame, 64 pipelined"
    durable = "ff_fast durable, batches of 64"
    row("P1a", "server CPU per durable frame, batches of 64", durable, xadd, ratio_of(1.0))
    row("P1a", "the same, beside one fenced call a frame", durable, fence, ratio_of(0.125))
    row("P1a", "the same, each batch a round trip", "ff_fast durable, 64 a round trip", alone, None)
    row(
        "P1b", "server CPU per best-effort frame, runs of 64", "ff_fast best-effort, runs of 64",
        xadd, ratio_of(0.25),
    )  # fmt: skip
    row(
        "P1b", "the same, each batch a round trip", "ff_fast best-effort, 64 a round trip", alone,
        None,
    )  # fmt: skip
    single = "ff_fast durable, one a call, 64 pipelined"
    row("P2", "server CPU per call with a single durable frame", single, fence, Target(9.0))
    row(
        "P2", "the same, best-effort", "ff_fast best-effort, one a call, 64 pipelined", fence,
        Target(9.0),
    )  # fmt: skip
    row("P2", "the same, durable, over the least", single, "its five commands alone", None)
    for rival in ("one fenced call a frame, one a round trip", "awaited XADD, one a round trip"):
        row(
            "P2", "the same, durable, each call a round trip", "ff_fast durable, one a round trip",
            rival, None,
        )  # fmt: skip
    return report


def ratio_of(bound: float) -> Target:
    return Target(bound, of_ratio=True)
