"""P25 to P27: server-sent events through uvicorn to a thousand clients, in four processes over loopback TCP."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, NamedTuple, cast

from bench.figures import Report, Row, Target
from bench.harness import Metrics, Stage, Worker, check, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ROUNDS = 2
# Clients that come before the memory of the others is measured, so that imports and caches are not theirs.
WARM = 20
# Open responses need a moment until they wait.
SETTLE_S = 0.5
TOKENS = 2_000


class Contender(NamedTuple):
    """A web application on a loop and a parser of HTTP, and the job of the worker that writes for it."""

    app: str
    writer: str
    answer: str
    uvloop: bool = True
    mode: str | None = None

    @property
    def http(self) -> str:
        # Those that uvicorn prefers where it finds them, and those that are always there.
        return "httptools" if self.uvloop else "h11"


OURS, PLAIN = "ff_fast", "ff_fast, asyncio and h11"
STARLETTE, FASTAPI = "redis-py, sse-starlette", "redis-py, FastAPI's own SSE"
CONTENDERS = {
    OURS: Contender("ff_fast", "write", "answer", mode="durable"),
    PLAIN: Contender("ff_fast", "write", "answer", uvloop=False, mode="durable"),
    STARLETTE: Contender("sse_starlette", "xadd", "xadd_answer"),
    FASTAPI: Contender("fastapi_sse", "xadd", "xadd_answer"),
}


class Load(NamedTuple):
    """Streams of a rate, and the clients, which are spread over them."""

    streams: int
    clients: int
    rate: int
    seconds: float


@contextlib.contextmanager
def server(stage: Stage, contender: Contender, looks: int) -> Iterator[tuple[Worker, int]]:
    """Run a web server; give its process and its port. It is a new process, whose memory no other has used."""
    with contextlib.closing(Worker(uvloop=contender.uvloop)) as process:
        process.start(
            "bench.sse:serve", url=stage.url, app=contender.app, http=contender.http, looks=looks
        )
        yield process, cast("int", process.stage()["port"])


def turn(stage: Stage, load: Load, contender: Contender, asking: int = 0) -> Metrics:
    """Run *load*; check that every client got every frame.

    Meanwhile an answer is asked for *asking* times.
    """
    stage.fresh()
    worker, clients = stage.worker("tokens"), stage.worker("clients")
    options = {} if contender.mode is None else {"mode": contender.mode}
    worker.start(
        f"bench.sse:{contender.writer}",
        url=stage.url, streams=load.streams, rate=load.rate, seconds=load.seconds, **options,
    )  # fmt: skip
    streams = cast("list[str]", worker.stage()["streams"])
    asked = stored(stage, contender) if asking else ""
    with server(stage, contender, looks=3) as (web, port):

        def look() -> dict[str, object]:
            web.go_on()
            return web.stage()

        warm = min(WARM, load.clients // 5)
        clients.start(
            "bench.sse:read",
            port=port, streams=[streams[i % load.streams] for i in range(load.clients)], warm=warm,
            frames=int(load.rate * load.seconds),
        )  # fmt: skip
        clients.stage()
        few = look()
        clients.go_on()
        clients.stage()
        time.sleep(0.0 if stage.quick else SETTLE_S)
        all_open = look()
        metrics: Metrics = {"connections": connections(stage, all_open["to_valkey"])}
        clients.go_on()
        worker.go_on()
        if asking:
            metrics |= ask(stage, port, asked, asking, load.seconds / asking / 4)
        written = worker.stage()
        read = clients.stage()
        done = look()
        worker.finish()
        clients.finish()
        web.finish()
    metrics |= cast("Metrics", read["metrics"])

    def grown(
        quantity: str, before: dict[str, object], after: dict[str, object], since: str = ""
    ) -> float:
        return cast("float", after[quantity]) - cast("float", before[since or quantity])

    opened = load.clients - warm
    metrics["open_us"] = grown("cpu_until", few, all_open, "cpu_since") / opened * 1e6
    metrics["idle_kib"] = grown("resident", few, all_open) / opened / 1024
    metrics["web_us"] = (
        grown("cpu_until", all_open, done, "cpu_since") / cast("float", read["events"]) * 1e6
    )
    metrics["behind_ms"] = cast("float", written["behind_ms"])
    return metrics


def connections(stage: Stage, addresses: object) -> int:
    """Return how many of its clients the server sees at the *addresses* of a process."""
    listed = stage.wire.command("CLIENT", "LIST")
    assert isinstance(listed, bytes)
    seen = {
        field.removeprefix("addr=")
        for line in listed.decode().splitlines()
        for field in line.split()
        if field.startswith("addr=")
    }
    mine = set(cast("list[str]", addresses))
    check(mine <= seen, "the server does not see a connection of the web process")
    return len(mine)


def stored(stage: Stage, contender: Contender) -> str:
    """Store an answer; return its stream."""
    found = stage.worker("tokens of the answer").run(
        f"bench.sse:{contender.answer}", url=stage.url, tokens=TOKENS
    )
    return cast("str", cast("dict[str, object]", found)["stream"])


def ask(stage: Stage, port: int, stream: str, count: int, pause: float) -> Metrics:
    found = stage.worker("client of the answer").run(
        "bench.sse:resume", port=port, stream=stream, tokens=TOKENS, count=count, pause=pause
    )
    return cast("Metrics", cast("dict[str, object]", found)["metrics"])


def asked_alone(stage: Stage, contender: Contender, count: int) -> Metrics:
    """Ask an otherwise idle web server for an answer, *count* times."""
    stage.fresh()
    stream = stored(stage, contender)
    with server(stage, contender, looks=0) as (web, port):
        metrics = ask(stage, port, stream, count, 0.0)
        web.finish()
    return metrics


def many_streams(stage: Stage) -> Report:
    """P25."""
    clients = stage.pick(1_000, 20)
    load = Load(clients, clients, 30, stage.pick(20, 3) / 10)
    report = measured(stage, load, [OURS, STARLETTE], [PLAIN, FASTAPI])
    what = f"{clients:,} SSE readers of {clients:,} streams at {load.rate} Hz"
    report.rows = of_load("P25", what, report)
    return report


def one_stream(stage: Stage) -> Report:
    """P26."""
    clients = stage.pick(1_000, 20)
    load = Load(1, clients, 60, stage.pick(20, 3) / 10)
    report = measured(stage, load, [OURS, STARLETTE], [PLAIN, FASTAPI])
    report.rows = of_load("P26", f"{clients:,} SSE readers of one stream at {load.rate} Hz", report)
    return report


def answers(stage: Stage) -> Report:
    """P27."""
    clients, alone, meanwhile = stage.pick(1_000, 20), stage.pick(300, 5), stage.pick(150, 5)
    load = Load(clients, clients, 30, stage.pick(60, 6) / 10)
    busy = f"{OURS}, beside {clients:,} readers"
    with Stage(quick=stage.quick, executable=stage.executable, tcp=True) as tcp:

        def idle(name: str, count: int) -> Callable[[], Metrics]:
            return lambda: asked_alone(tcp, CONTENDERS[name], count)

        report = Report()
        for name, work in {
            OURS: idle(OURS, alone),
            **{rival: idle(rival, stage.pick(30, 2)) for rival in (STARLETTE, FASTAPI)},
            busy: lambda: turn(tcp, load, CONTENDERS[OURS], meanwhile),
        }.items():
            report.figures |= take_turns({name: work}, 1, warm=False)
    for how, said in (("loaded", "loaded again"), ("resumed", "resumed in the middle")):
        what = f"an answer of {TOKENS:,} tokens, {said}"
        for rival in (STARLETTE, FASTAPI):
            report.rows += [
                Row("P27", f"{what}: {text}", "ms", report.figure(OURS, quantity),
                    rival, report.figure(rival, quantity), target)
                for text, quantity, target in (
                    ("first byte, p99", f"{how}_first_p99_ms", Target(20.0)),
                    ("last byte, p50", f"{how}_whole_p50_ms", None),
                )
            ]  # fmt: skip
        report.rows.append(
            Row("P27", f"{what}, beside {clients:,} readers at {load.rate} Hz: first byte, p99", "ms",
                report.figure(busy, f"{how}_first_p99_ms"), target=Target(20.0))
        )  # fmt: skip
    return report


def of_load(row: str, what: str, report: Report) -> list[Row]:
    """Return the rows that both loads have."""

    def beside(
        text: str,
        unit: str,
        quantity: str,
        rival: str,
        target: Target | None = None,
        ours: str = OURS,
    ) -> Row:
        return Row(
            row, f"{what}{text}", unit, report.figure(ours, quantity),
            rival, report.figure(rival, quantity), target,
        )  # fmt: skip

    def alone(text: str, unit: str, quantity: str, target: Target) -> Row:
        return Row(row, f"{what}{text}", unit, report.figure(PLAIN, quantity), target=target)

    cpu, memory = "CPU of the web process per event", "its memory for an idle reader"
    plain = ", asyncio and h11"
    return [
        beside(f": {cpu}", "us", "web_us", STARLETTE, Target(10.0)),
        beside(f": {cpu}", "us", "web_us", STARLETTE, Target(0.25, of_ratio=True)),
        beside(f": {cpu}", "us", "web_us", FASTAPI, Target(0.25, of_ratio=True)),
        alone(f"{plain}: {cpu}", "us", "web_us", Target(10.0)),
        beside(f": {memory}", "KiB", "idle_kib", STARLETTE, Target(24.0)),
        beside(f": {memory}", "KiB", "idle_kib", FASTAPI),
        alone(f"{plain}: {memory}", "KiB", "idle_kib", Target(24.0)),
        beside(": its connections to Valkey", "", "connections", STARLETTE, Target(2.0)),
        beside(": write to client, p50", "ms", "p50_ms", STARLETTE),
        beside(": write to client, p99", "ms", "p99_ms", STARLETTE),
        beside(": write to client, p99", "ms", "p99_ms", FASTAPI),
    ]


def measured(stage: Stage, load: Load, names: list[str], once: list[str]) -> Report:
    """Run *load* by each of *names* in turns, and *once* by the others, on a server that is reached by TCP."""
    with Stage(quick=stage.quick, executable=stage.executable, tcp=True) as tcp:

        def contender(name: str) -> Callable[[], Metrics]:
            return lambda: turn(tcp, load, CONTENDERS[name])

        # Clients have had their first event before the clock starts, so no round is discarded.
        figures = take_turns(
            {name: contender(name) for name in names}, stage.pick(ROUNDS, 1), warm=False
        )
        figures |= take_turns({name: contender(name) for name in once}, 1, warm=False)
    return Report(figures=figures)
