"""P13 and P14: executions a second from creation to end, and the time until a waiting worker has one."""

from __future__ import annotations

import time
import uuid
from typing import TYPE_CHECKING, cast

from bench.figures import Report, Row, Target, percentile
from bench.harness import Metrics, Stage, check, take_turns, until
from ff_fast import keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

# Number of creators, and of claimers.
TOGETHER = 64
# The first claims meet cold caches in three processes.
SKIPPED = 10


def run(stage: Stage) -> Report:
    """P13."""
    count = stage.pick(10_000, 300)

    def turn(tasks: int, count: int) -> Callable[[], Metrics]:
        def measured() -> Metrics:
            stage.fresh()
            lane = uuid.uuid4().hex
            cpu_before = stage.wire.server_cpu()
            metrics = dict(
                stage.worker("lifecycle").run(
                    "bench.jobs:lifecycle", url=stage.url, lane=lane, count=count, tasks=tasks
                )
            )
            cpu = stage.wire.server_cpu() - cpu_before
            check_all_completed(stage, lane, count)
            return {**metrics, "server_us": cpu / count * 1e6}

        return measured

    together = f"{TOGETHER} creators and {TOGETHER} claimers"
    alone = "one creator and one claimer"
    report = Report(
        figures=take_turns(
            {together: turn(TOGETHER, count), alone: turn(1, count // 5)}, stage.rounds
        )
    )
    report.rows = [
        Row(
            "P13", f"create, claim and complete, one asyncio process, {together}", "/s",
            report.figure(together, "per_second"), target=Target(3_000, at_least=True),
        ),
        Row("P13", f"the same, {alone}", "/s", report.figure(alone, "per_second")),
        Row("P13", "server CPU of an execution", "us", report.figure(together, "server_us")),
        Row("P13", "client CPU of an execution", "us", report.figure(together, "client_us")),
    ]  # fmt: skip
    stage.end_workers()
    return report


def check_all_completed(stage: Stage, lane: str, count: int) -> None:
    """Check that each execution was completed once, and that no index, timer or hint is left."""
    wire = stage.wire
    ended = [eid for index in range(keys.DEFAULT_PARTITIONS) for eid in completed(stage, index)]
    check(len(ended) == count, f"{len(ended)} completion records, not {count}")
    check(len(set(ended)) == count, "an execution has two completion records")
    for eid in ended:
        check(wire.command("HGET", keys.core(eid), "state") == b"completed", f"{eid} has not ended")
    check(not wire.count("EXISTS", keys.ready(lane)), "the lane has a hint left")
    for index in range(keys.DEFAULT_PARTITIONS):
        tag = keys.slot_tag(index)
        left = wire.count("EXISTS", keys.eligible(tag, lane), keys.timers(tag))
        check(not left, f"partition {index} has an index or a timer left")


def completed(stage: Stage, partition: int) -> Iterator[str]:
    """Yield the ids in the completion records of one partition."""
    records = stage.wire.command("XRANGE", keys.completions(keys.slot_tag(partition)), "-", "+")
    for _, flat in cast("list[tuple[bytes, list[bytes]]]", records):
        fields = dict(zip(flat[::2], flat[1::2], strict=True))
        check(fields[b"outcome"] == b"success", "an execution has ended in another way")
        yield fields[b"execution_id"].decode()


def latency(stage: Stage) -> Report:
    """P14."""
    count = stage.pick(400, 40)

    def turn(shell: str) -> Callable[[], Metrics]:
        def measured() -> Metrics:
            stage.fresh()
            lane = uuid.uuid4().hex
            claimer, creator = stage.worker(f"{shell} claimer"), stage.worker("creator")
            claimer.start(f"bench.jobs:claim_{shell}", url=stage.url, lane=lane, count=count)
            with until(30) as waiting:
                while waiting() and stage.wire.info("clients")["blocked_clients"] == "0":
                    time.sleep(0.01)
            created = cast(
                "dict[str, int]",
                creator.run("bench.jobs:create_paced", url=stage.url, lane=lane, count=count),
            )
            claimed = cast("dict[str, list[int]]", claimer.result())
            check_all_completed(stage, lane, count)
            check(claimed.keys() == created.keys(), "what was claimed is not what was created")
            blocked = sum(claimed[eid][0] < at for eid, at in created.items())
            check(blocked >= 0.9 * count, f"the worker was waiting {blocked} times of {count}")
            ms = [(claimed[eid][1] - at) / 1e6 for eid, at in created.items()][SKIPPED:]
            return {
                "p50_ms": percentile(ms, 0.50),
                "p99_ms": percentile(ms, 0.99),
                "max_ms": max(ms),
                "blocked": blocked / count,
            }

        return measured

    report = Report(
        figures=take_turns({"asyncio": turn("aio"), "sync": turn("sync")}, stage.pick(3, 1))
    )
    report.rows = [
        Row(
            "P14", f"create to handle in a waiting worker, {shell}, {share}", "ms",
            report.figure(shell, f"{share}_ms"), target=Target(5) if share == "p99" else None,
        )
        for shell in ("asyncio", "sync")
        for share in ("p50", "p99")
    ]  # fmt: skip
    stage.end_workers()
    return report
