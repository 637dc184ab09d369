"""P21 to P24: several primaries, frames that a replica has, and failovers."""

from __future__ import annotations

import time
import urllib.parse
from functools import partial
from typing import TYPE_CHECKING, cast

import ff_fast
from bench import million
from bench.figures import Figure, Report, Row, Target, percentile
from bench.harness import Metrics, Stage, Wire, check, take_turns
from bench.rows.own_pace import MODES, RATE, Job, keeps_up, turn
from ff_fast import keys
from ff_fast.embedded import EmbeddedCluster, EmbeddedServer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ff_fast.embedded import EmbeddedNode

PRIMARIES = (1, 2, 3)
# The default, and as many as make a call of several streams.
PARTITIONS = (256, 16)
NODE_TIMEOUT_MS = 1500
# Streams that notice a failover, and what they have to show before and after it.
STREAMS = 16
CALM_S = 0.3
LOOK_S = 0.005


class Wires(Wire):
    """A connection to each of several servers. What it tells is their sum."""

    def __init__(self, ports: Sequence[int]) -> None:
        self.each = [Wire(port=port) for port in ports]

    def command(self, *parts: str | bytes | int) -> object:
        """Send a command to all; return what the first one answers."""
        replies = [wire.command(*parts) for wire in self.each]
        return replies[0]

    def calls(self, *commands: str) -> int:
        return sum(wire.calls(*commands) for wire in self.each)

    def connections(self) -> int:
        return sum(wire.connections() for wire in self.each)

    def server_cpu(self) -> float:
        return sum(wire.server_cpu() for wire in self.each)

    def total(self, section: str, field: str) -> int:
        """Return the sum of a number of ``INFO``."""
        return sum(int(wire.info(section)[field]) for wire in self.each)

    def close(self) -> None:
        for wire in self.each:
            wire.close()


class Fleet(Stage):
    """The surroundings of a benchmark on a cluster, or on one server that is reached by TCP for *primaries* = 0."""

    def __init__(
        self, *, quick: bool, executable: str | None, primaries: int, replicas: int = 0, partitions: int = 256
    ) -> None:  # fmt: skip
        self.quick = quick
        self.executable = executable
        self.fleet: EmbeddedCluster | EmbeddedServer
        if primaries:
            self.fleet = EmbeddedCluster(
                primaries, replicas, executable=executable, node_timeout_ms=NODE_TIMEOUT_MS
            )
            ports = [node.address[1] for node in self.fleet.nodes]
            self.url = f"{self.fleet.url}&partitions={partitions}"
        else:
            self.fleet = EmbeddedServer(executable=executable, tcp=True)
            ports = [urllib.parse.urlsplit(self.fleet.url).port or 0]
            self.url = f"{self.fleet.url}?partitions={partitions}"
        self.wires = self.wire = Wires(ports)
        self.backend = ff_fast.ValkeyBackend.connect(self.url)
        self._workers = {}

    def close(self) -> None:
        self.end_workers()
        self.backend.close()
        self.wire.close()
        self.fleet.stop()


# -- P21 ----------------------------------------------------------------------------------------------------------


def cost(stage: Stage) -> Report:
    """P21."""
    job = Job(stage.pick(1_000, 60), RATE, stage.pick(20, 2) / 10, readers=0)
    report = Report()
    one = "one server"
    plans = {one: (0, 256)} | {
        f"three primaries, {partitions} partitions": (3, partitions) for partitions in PARTITIONS
    }
    fleets: dict[str, Fleet] = {}
    try:
        for name, (primaries, partitions) in plans.items():
            fleets[name] = Fleet(
                quick=stage.quick, executable=stage.executable, primaries=primaries, partitions=partitions
            )  # fmt: skip

        def contender(fleet: Fleet, mode: str) -> Callable[[], Metrics]:
            def run() -> Metrics:
                metrics = turn(fleet, job, mode)
                fleet.end_workers()
                return metrics

            return run

        for what, mode in MODES.items():
            found = take_turns(
                {name: contender(fleet, mode) for name, fleet in fleets.items()},
                stage.pick(2, 1),
                warm=False,
            )
            report.figures |= {f"{name}, {what}": figures for name, figures in found.items()}
            for name in plans:
                if name == one:
                    continue
                report.rows += [
                    Row(
                        "P21", f"{job.streams:,} streams at {RATE} Hz, {what}, {name}: {text}", unit,
                        found[name][quantity], one, found[one][quantity], target,
                    )
                    for text, unit, quantity, target in (
                        ("server CPU per frame, all servers", "us", "server_us", Target(1.3, of_ratio=True)),
                        ("frames in a call", "", "frames_per_call", None),
                        ("frames written", "/s", "written_per_second", keeps_up(job)),
                    )
                ]  # fmt: skip
    finally:
        for fleet in fleets.values():
            fleet.close()
    report.include(scaled(stage), "model")
    return report


# -- the model ----------------------------------------------------------------------------------------------------


def scaled(stage: Stage) -> Report:
    """Return what the model of a large deployment is made of, and what it is checked by."""
    report = Report()
    partitions = million.PARTITIONS
    for primaries in PRIMARIES:
        streams = primaries * stage.pick(million.STREAMS_EACH, 20)
        job = Job(streams, RATE, stage.pick(20, 4) / 10)
        name = million.named(primaries, partitions)
        with Fleet(
            quick=stage.quick, executable=stage.executable, primaries=primaries, partitions=partitions
        ) as fleet:  # fmt: skip
            found = take_turns({name: partial(watched, fleet, job)}, 1, warm=False)
        report.figures |= found
        report.costs[name] = {quantity: figure.median for quantity, figure in found[name].items()}
        report.rows += [
            Row(
                "P21", f"{job.streams:,} streams at {RATE} Hz, each with a reader, durable, {name}: {text}", unit,
                found[name][quantity],
            )
            for text, unit, quantity in (
                ("server CPU per frame delivered", "us", "server_us"),
                ("frames in a call", "", "frames_per_call"),
                ("write to reader, p99", "ms", "p99_ms"),
            )
        ]  # fmt: skip
    return report


def watched(fleet: Fleet, job: Job) -> Metrics:
    """Do a turn of P16 and tell what it takes of memory, connections and network too."""
    seen: dict[str, Metrics] = {}

    def look(when: str) -> None:
        wires = fleet.wires
        seen[when] = {
            "memory": wires.total("memory", "used_memory_dataset"),
            "connections": wires.connections(),
            "in": wires.total("stats", "total_net_input_bytes"),
            "out": wires.total("stats", "total_net_output_bytes"),
        }

    fleet.fresh()
    look("empty")
    metrics = turn(fleet, job, "durable", look)
    fleet.end_workers()
    empty, begun, written = seen["empty"], seen["open"], seen["written"]
    metrics["stream_bytes"] = (begun["memory"] - empty["memory"]) / job.streams
    metrics["connections"] = (written["connections"] - empty["connections"]) / len(fleet.wires.each)
    for quantity, name in (("memory", "frame_bytes"), ("in", "in_bytes"), ("out", "out_bytes")):
        metrics[name] = (written[quantity] - begun[quantity]) / metrics["frames"]
    return metrics


# -- P22 ----------------------------------------------------------------------------------------------------------


def replicated(stage: Stage) -> Report:
    """P22."""
    count = stage.pick(40_000, 2_000)
    report = Report()
    with Pair(stage) as pair:

        def contender(who: str, replicas: int, batch: int) -> Callable[[], Metrics]:
            def run() -> Metrics:
                pair.fresh()
                done = pair.worker(who).run(
                    "bench.fleet:write",
                    url=pair.url, count=count, mode="durable", replicas=replicas, batch=batch,
                )  # fmt: skip
                check(done["frames"] == count, f"{done['frames']} of {count} frames")
                return {name: done[name] for name in ("per_second", "client_us")}

            return run

        for what, batch in (
            ("each batch of 64 awaited", 64),
            ("64 at a time, awaited at the end", 0),
        ):
            found = take_turns(
                {
                    "replicated": contender("replicated", 1, batch),
                    "stored": contender("stored", 0, batch),
                },
                stage.rounds,
            )
            report.figures |= {f"{name}, {what}": figures for name, figures in found.items()}
            report.rows.append(
                Row(
                    "P22", f"a primary with a replica, {what}: frames acknowledged as replicated(1)", "/s",
                    found["replicated"]["per_second"], "stored", found["stored"]["per_second"],
                    Target(0.5, at_least=True, of_ratio=True),
                )
            )  # fmt: skip
    return report


class Pair(Stage):
    """A primary that is reached by TCP, and its replica."""

    def __init__(self, stage: Stage) -> None:
        super().__init__(quick=stage.quick, executable=stage.executable, tcp=True)
        self.replica = EmbeddedServer(
            executable=stage.executable,
            replicaof=("127.0.0.1", urllib.parse.urlsplit(self.url).port or 0),
        )
        while "state=online" not in self.wire.info("replication").get("slave0", ""):
            time.sleep(0.05)

    def close(self) -> None:
        self.replica.stop()
        super().close()


# -- P23, P24 -----------------------------------------------------------------------------------------------------


def failovers(stage: Stage) -> Report:
    """P23 and P24."""
    report = Report()
    with Fleet(quick=stage.quick, executable=stage.executable, primaries=3, replicas=3) as fleet:
        cluster = fleet.fleet
        assert isinstance(cluster, EmbeddedCluster)

        def planned(replica: EmbeddedNode) -> None:
            cluster.failover(replica)

        def killed(replica: EmbeddedNode) -> None:
            primary = cluster.primary_of(replica)
            assert primary is not None
            began = time.monotonic()
            cluster.kill(primary)
            while replica.command("ROLE")[0] != b"master":
                time.sleep(LOOK_S)
            own.append((time.monotonic() - began) * 1e3)
            cluster.wait_until_stable()

        own: list[float] = []

        for row, what, fail, count, target in (
            ("P23", "planned failover", planned, stage.pick(20, 1), Target(500)),
            ("P24", "SIGKILL of a primary", killed, stage.pick(5, 1), Target(NODE_TIMEOUT_MS + 1000)),
        ):  # fmt: skip
            ms: list[float] = []
            for number in range(count):
                ms += failed_over(fleet, cluster, number, fail)
            rival = Figure.of([percentile(own, 0.99)]) if own else None
            shares = {"p50": percentile(ms, 0.5), "p99": percentile(ms, 0.99)}
            report.figures[what] = {
                f"{share}_ms": Figure.of([value]) for share, value in shares.items()
            }
            report.rows += [
                Row(
                    row, f"{what}, {STREAMS} streams on it, {count} times: longest time without an acknowledgement, {share}",
                    "ms", report.figure(what, f"{share}_ms"),
                    None if rival is None else "until the replica is a primary, p99", rival,
                    target if share == "p99" else None,
                )
                for share in shares
            ]  # fmt: skip
    return report


def failed_over(
    fleet: Fleet,
    cluster: EmbeddedCluster,
    number: int,
    fail: Callable[[EmbeddedNode], None],
) -> list[float]:
    """Let one primary fail under streams of its own; return how long each of them was held up, in milliseconds."""
    primary = cluster.primaries[number % 3]
    slots = set(cluster.slots_of(primary))
    partitions = [n for n in range(256) if keys.key_slot(keys.slot_tag(n).encode()) in slots]
    worker = fleet.worker("worker")
    worker.start(
        "bench.fleet:served", url=fleet.url, partitions=partitions, streams=STREAMS, failovers=1
    )
    worker.stage()
    time.sleep(CALM_S)
    (replica,) = cluster.replicas_of(primary)
    fail(replica)
    time.sleep(CALM_S)
    worker.go_on()
    ms = cast("list[float]", worker.stage()["longest_ms"])
    worker.finish()
    for node in cluster.nodes:
        if not node.running:
            cluster.restart(node)
    return ms
