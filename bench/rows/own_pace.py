"""P15 to P17: many streams at a model's own pace, with and without readers, in three processes over loopback TCP."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple, cast

from bench.figures import Figure, Report, Row, Target
from bench.harness import Metrics, Stage, check, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

RATE = 60
MANY, SOME, FEW = 1_000, 600, 300
ROUNDS = 2
# What a client sends for its frames, by contender; functions do not call them.
APPEND = {True: "fcall", False: "xadd"}
# Readers that have their first frame need a moment until they wait for the next.
SETTLE_S = 0.3
XADD = "redis-py asyncio: awaited XADD"
XREAD = "redis-py asyncio: awaited XADD, XREAD BLOCK"
PLAIN_RIVAL = "redis-py asyncio"
MODES = {"durable": "durable", "best-effort": "best_effort"}


class Job(NamedTuple):
    """What a worker writes, and how many readers each stream has; every *timed_every*-th reader times its frames."""

    streams: int
    rate: int
    seconds: float
    readers: int = 1
    timed_every: int = 1


def turn(
    stage: Stage, job: Job, mode: str | None, watch: Callable[[str], None] = lambda _: None
) -> Metrics:
    """Run *job* by ff_fast in a *mode*, or by the rival for None; check that every frame arrived.

    *watch* is called as the streams are ``open``, with a frame each, and when all is ``written``; the processes are connected.
    """
    stage.fresh()
    who, prefix = ("redis", "redis_") if mode is None else ("ff_fast", "")
    worker, gateway = stage.worker(f"{who} worker"), stage.worker(f"{who} gateway")
    options = {} if mode is None else {"mode": mode}
    worker.start(
        f"bench.paced:{prefix}write",
        url=stage.url, streams=job.streams, rate=job.rate, seconds=job.seconds, **options,
    )  # fmt: skip
    streams = cast("list[str]", worker.stage()["streams"])
    connections = stage.wire.connections()
    metrics: Metrics = {}
    if job.readers:
        gateway.start(
            f"bench.paced:{prefix}read",
            url=stage.url, streams=streams * job.readers, timed_every=job.timed_every,
        )  # fmt: skip
        gateway.stage()
        metrics["reader_connections"] = stage.wire.connections() - connections
    time.sleep(SETTLE_S)
    watch("open")
    cpu, calls = stage.wire.server_cpu(), stage.wire.calls(APPEND[mode is not None])
    if job.readers:
        gateway.go_on()
    worker.go_on()
    wrote = worker.stage()
    counts = cast("list[int]", wrote["counts"])
    metrics |= cast("Metrics", wrote["metrics"])
    if job.readers:
        read = gateway.stage()
        metrics |= cast("Metrics", read["metrics"])
        check(read["counts"] == counts * job.readers, "a reader has missed frames of its stream")
    # Each stream has one mark more, behind its frames.
    frames = sum(counts) + job.streams
    metrics["server_us"] = (stage.wire.server_cpu() - cpu) / frames * 1e6
    metrics["frames_per_call"] = frames / (stage.wire.calls(APPEND[mode is not None]) - calls)
    metrics["frames"] = frames
    watch("written")
    worker.finish()
    if job.readers:
        gateway.finish()
    return metrics


def appends(stage: Stage) -> Report:
    """P15."""
    job = Job(stage.pick(MANY, 60), RATE, stage.pick(20, 2) / 10, readers=0)
    report = measured(
        stage,
        {
            **{f"ff_fast {name}": (job, mode) for name, mode in MODES.items()},
            XADD: (job, None),
        },
    )
    for name in MODES:
        ours = report.figures[f"ff_fast {name}"]
        rival = report.figures[XADD]
        what = f"{job.streams:,} streams at {RATE} Hz, {name}"

        def row(
            text: str, unit: str, quantity: str, target: Target | None,
            ours: dict[str, Figure] = ours, rival: dict[str, Figure] = rival, what: str = what,
        ) -> Row:  # fmt: skip
            return Row(
                "P15", f"{what}: {text}", unit, ours[quantity], XADD, rival[quantity], target
            )

        report.rows += [
            row("server CPU per frame", "us", "server_us", Target(5.0)),
            row("worker CPU per frame beyond its schedule", "us", "worker_beyond_us", Target(4.0)),
            row("frames written", "/s", "written_per_second", keeps_up(job)),
        ]
        report.add_cost("worker", f"ff_fast, {name}", ours["worker_beyond_us"])
    return report


def with_readers(stage: Stage) -> Report:
    """P16, and the picture of latency against the number of streams."""
    seconds = stage.pick(20, 2) / 10
    sizes = (FEW, SOME, MANY) if not stage.quick else (20, 40, 60)
    jobs = {size: Job(size, RATE, seconds) for size in sizes}
    rival = named(XREAD, sizes[0])
    report = measured(
        stage,
        {
            **{
                named(f"ff_fast {name}", size): (job, mode)
                for size, job in jobs.items()
                for name, mode in MODES.items()
            },
            # It carries no more: its client is full.
            rival: (jobs[sizes[0]], None),
        },
    )
    least, most = sizes[0], sizes[-1]
    absolute = {"durable": 7.0, "best-effort": 4.0}
    for size, job in jobs.items():
        for name in MODES:
            ours, beside = report.figures[named(f"ff_fast {name}", size)], report.figures[rival]
            what = f"{size:,} streams at {RATE} Hz, each with a reader, {name}"
            server = {
                least: [Target(0.5, of_ratio=True)],
                most: [Target(absolute[name]), Target(0.3, of_ratio=True)],
            }.get(size, [None])
            plan: list[tuple[str, str, str, Target | None]] = [
                ("server CPU per frame delivered", "us", "server_us", target) for target in server
            ]
            plan += [
                ("gateway CPU per frame delivered", "us", "gateway_us", Target(8.0) if size == most else None),
                ("write to reader, p50", "ms", "p50_ms", Target(5.0) if size == most else None),
                ("write to reader, p99", "ms", "p99_ms", {least: Target(10.0), most: Target(25.0)}.get(size)),
                ("frames delivered", "/s", "delivered_per_second", keeps_up(job)),
            ]  # fmt: skip
            if size == most:
                plan.append(("connections of the readers", "", "reader_connections", Target(2.0)))
            report.rows += [
                Row("P16", f"{what}: {text}", unit, ours[quantity], rival, beside[quantity], target)
                for text, unit, quantity, target in plan
            ]
    for core, quantity in (("Valkey", "server_us"), ("gateway", "gateway_us")):
        for name in MODES:
            ours = report.figures[named(f"ff_fast {name}", most)]
            report.add_cost(core, f"ff_fast, {name}", ours[quantity])
        report.add_cost(core, PLAIN_RIVAL, report.figures[rival][quantity])
    report.add_cost("worker", PLAIN_RIVAL, report.figures[rival]["worker_beyond_us"])
    picture = report.series["latency of streams"] = {}
    for name in MODES:
        for share in ("p50", "p99"):
            picture[f"ff_fast {name}, {share}"] = [
                (size, report.figures[named(f"ff_fast {name}", size)][f"{share}_ms"].median)
                for size in sizes
            ]
    for share in ("p50", "p99"):
        picture[f"{XREAD}, {share}"] = [(least, report.figures[rival][f"{share}_ms"].median)]
    return report


def one_stream(stage: Stage) -> Report:
    """P17."""
    readers = stage.pick(1_000, 50)
    job = Job(1, 200, stage.pick(20, 3) / 10, readers=readers, timed_every=10)
    report = measured(
        stage,
        {
            **{f"ff_fast {name}": (job, mode) for name, mode in MODES.items()},
            XREAD: (job, None),
        },
    )
    ping = "PING at the same pace"
    report.figures[ping] = {"server_us": Figure.of([lone_ping(stage, job)])}
    for name in MODES:
        ours, rival = report.figures[f"ff_fast {name}"], report.figures[XREAD]
        what = f"one stream at {job.rate} Hz, {readers:,} readers in one process, {name}"
        report.rows += [
            Row("P17", f"{what}: {text}", unit, ours[quantity], XREAD, rival[quantity], target)
            for text, unit, quantity, target in (
                ("server CPU per append", "us", "server_us", Target(10.0)),
                ("gateway CPU per frame delivered", "us", "gateway_us", Target(3.0)),
                ("write to reader, p99", "ms", "p99_ms", None),
            )
        ]
        report.rows.append(
            Row(
                "P17", f"{what}: server CPU per append", "us", ours["server_us"],
                ping, report.figures[ping]["server_us"],
            )
        )  # fmt: skip
    return report


def lone_ping(stage: Stage, job: Job) -> float:
    """Return the server CPU of a PING at the pace of *job*: what a request costs that wakes an idle server."""
    count = int(job.rate * job.seconds)
    with Stage(quick=stage.quick, executable=stage.executable, tcp=True) as tcp:
        before = tcp.wire.server_cpu()
        for _ in range(count):
            time.sleep(1 / job.rate)
            tcp.wire.command("PING")
        return (tcp.wire.server_cpu() - before) / count * 1e6


def measured(stage: Stage, jobs: dict[str, tuple[Job, str | None]]) -> Report:
    """Run each of *jobs* in turns, on a server that is reached by TCP."""
    with Stage(quick=stage.quick, executable=stage.executable, tcp=True) as tcp:

        def contender(job: Job, mode: str | None) -> Callable[[], Metrics]:
            return lambda: turn(tcp, job, mode)

        # Streams and readers have had their first frame before the clock starts, so no round is discarded.
        return Report(
            figures=take_turns(
                {name: contender(job, mode) for name, (job, mode) in jobs.items()},
                stage.pick(ROUNDS, 1),
                warm=False,
            )
        )


def named(contender: str, streams: int) -> str:
    return f"{contender}, {streams:,} streams"


def keeps_up(job: Job) -> Target:
    """The frames that are due, but for those that the end of the schedule cuts off."""
    return Target(0.97 * job.streams * job.rate, at_least=True)
