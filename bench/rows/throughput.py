"""P3, P4: one worker on one stream at full speed: client CPU per frame, and frames a second."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from bench.figures import Report, Row, Target
from bench.harness import Metrics, Stage, check, check_entries, payloads, take_turns
from bench.rivals import FencedAttempt
from ff_fast import keys

if TYPE_CHECKING:
    from collections.abc import Callable

RIVAL_BATCH = 256
SIZES = (1, 4, 16, 64, 256, 1024)
STREAM = "bench"


def run(stage: Stage) -> Report:
    """P3, P4 and the picture of throughput against batch size."""

    def ours(job: str, mode: str, count: int, batch: int = 0) -> Callable[[], Metrics]:
        def turn() -> Metrics:
            stage.fresh()
            answer: dict[str, object] = dict(
                stage.worker(f"ff_fast {job}").run(
                    f"bench.jobs:{job}", url=stage.url, count=count, mode=mode, batch=batch
                )
            )
            eid = cast("str", answer["execution_id"])
            check(answer["frames"] == count, f"{answer['frames']} frames, not {count}")
            frames = payloads(count)
            if mode == "durable":
                check_entries(stage.wire, keys.stream(eid, 0), frames, trimmed=True)
            page = stage.backend.read_stream(eid, 0, after=f"0-{max(count - 500, 0)}", count=500)
            check([frame.payload for frame in page] == frames[-500:], "the newest frames differ")
            return timing(answer)

        return turn

    def theirs(job: str, count: int, batch: int) -> Callable[[], Metrics]:
        count = max(count // batch, 1) * batch

        def turn() -> Metrics:
            stage.fresh()
            answer = stage.worker(job).run(
                f"bench.rivals:{job}", path=stage.path, key=STREAM, count=count, batch=batch
            )
            check_entries(stage.wire, STREAM.encode(), payloads(count))
            return timing(dict(answer))

        return turn

    def fenced(count: int, batch: int) -> Callable[[], Metrics]:
        count = max(count // batch, 1) * batch

        def turn() -> Metrics:
            stage.fresh()
            attempt = FencedAttempt(STREAM)
            attempt.create(stage.wire)
            answer = stage.worker("fenced_blast").run(
                "bench.rivals:fenced_blast", path=stage.path, name=STREAM, count=count, batch=batch
            )
            check_entries(stage.wire, attempt.stream, payloads(count), trimmed=True)
            return timing(dict(answer))

        return turn

    many, few = stage.pick(200_000, 4_000), stage.pick(20_480, 512)
    report = Report()
    report.figures = take_turns(
        {
            "ff_fast asyncio, durable": ours("write", "durable", many),
            "blast": theirs("blast", many, RIVAL_BATCH),
            "ff_fast asyncio, best-effort": ours("write", "best_effort", many),
            "redis-py asyncio pipeline": theirs("redis_asyncio", few, RIVAL_BATCH),
            "valkey-glide batch": theirs("glide_batch", few, RIVAL_BATCH),
            "redis-py pipeline": theirs("redis_sync", few, RIVAL_BATCH),
            "coredis pipeline": theirs("coredis_pipeline", few, RIVAL_BATCH),
            "redis-py asyncio, awaited XADD": theirs("redis_asyncio", few // 4, 1),
            "ff_fast sync, durable": ours("write_sync", "durable", many),
            "ff_fast sync, best-effort": ours("write_sync", "best_effort", many),
            "fenced blast": fenced(few, RIVAL_BATCH),
        },
        stage.rounds,
    )
    add_rows(report)
    sweep(stage, report, ours, theirs)
    stage.end_workers()
    return report


def add_rows(report: Report) -> None:
    durable, live = "ff_fast asyncio, durable", "ff_fast asyncio, best-effort"
    plan: list[tuple[str, str, str, str, str, str, Target | None]] = [
        ("P3", "client CPU per durable frame, asyncio", "client_us", "us",
         durable, "redis-py asyncio pipeline", Target(0.5)),
        ("P3", "client CPU per best-effort frame, asyncio", "client_us", "us",
         live, "redis-py asyncio pipeline", Target(0.5)),
        ("P3", "the same, durable", "client_us", "us", durable, "valkey-glide batch", None),
        ("P3", "the same, durable", "client_us", "us", durable, "coredis pipeline", None),
        ("P4", "acknowledged durable frames, one asyncio worker", "per_second", "/s",
         durable, "redis-py asyncio pipeline", Target(10, at_least=True, of_ratio=True)),
        ("P4", "the same", "per_second", "/s",
         durable, "blast", Target(0.95, at_least=True, of_ratio=True)),
        ("P4", "acknowledged best-effort frames, one asyncio worker", "per_second", "/s",
         live, "redis-py asyncio pipeline", Target(25, at_least=True, of_ratio=True)),
        ("P4", "the same", "per_second", "/s",
         live, "blast", Target(3, at_least=True, of_ratio=True)),
        ("P4", "durable", "per_second", "/s", durable, "valkey-glide batch", None),
        ("P4", "durable", "per_second", "/s", durable, "coredis pipeline", None),
        ("P4", "durable", "per_second", "/s", durable, "redis-py asyncio, awaited XADD", None),
        ("P4", "durable", "per_second", "/s", durable, "fenced blast", None),
        ("P4", "durable, from a thread", "per_second", "/s",
         "ff_fast sync, durable", "redis-py pipeline", None),
        ("P4", "best-effort, from a thread", "per_second", "/s",
         "ff_fast sync, best-effort", "redis-py pipeline", None),
    ]  # fmt: skip
    names = {
        "blast": "XADD from a raw socket",
        "fenced blast": "one fenced call a frame, raw socket",
    }
    for row, what, quantity, unit, ours, rival, target in plan:
        report.rows.append(
            Row(
                row, what, unit, report.figure(ours, quantity),
                names.get(rival, rival), report.figure(rival, quantity), target,
            )
        )  # fmt: skip


def sweep(
    stage: Stage,
    report: Report,
    ours: Callable[..., Callable[[], Metrics]],
    theirs: Callable[..., Callable[[], Metrics]],
) -> None:
    """Measure frames a second against the size of batches; every contender awaits each batch."""
    lines: dict[str, Callable[[int], Callable[[], Metrics]]] = {
        "ff_fast durable": lambda n: ours("write", "durable", sized(stage, n, 60_000), n),
        "ff_fast best-effort": lambda n: ours("write", "best_effort", sized(stage, n, 60_000), n),
        "redis-py asyncio": lambda n: theirs("redis_asyncio", sized(stage, n, 10_000), n),
        "redis-py": lambda n: theirs("redis_sync", sized(stage, n, 10_000), n),
        "coredis": lambda n: theirs("coredis_pipeline", sized(stage, n, 10_000), n),
        "valkey-glide": lambda n: theirs("glide_batch", sized(stage, n, 10_000), n),
        "XADD from a raw socket": lambda n: theirs("blast", sized(stage, n, 60_000), n),
    }
    picture = report.series["throughput"] = {name: [] for name in lines}
    sizes = SIZES[::3] if stage.quick else SIZES
    for size in sizes:
        measured = take_turns(
            {name: contender(size) for name, contender in lines.items()},
            stage.pick(3, 1),
            warm=False,
        )
        for name, figures in measured.items():
            picture[name].append((size, figures["per_second"].median))
            report.figures[f"{name}, {size} a batch"] = figures


def sized(stage: Stage, batch: int, most: int) -> int:
    """Return the number of frames; contenders with a round trip for each frame get fewer."""
    if stage.quick:
        return max(batch, 64)
    return max(min(most, 2_000 * batch), batch) // batch * batch


def timing(answer: dict[str, object]) -> Metrics:
    return {name: cast("float", answer[name]) for name in ("per_second", "client_us")}
