"""P7: a whole stream, from entries on the server to frames in Python."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from bench.figures import Report, Row, Target
from bench.harness import Core, Metrics, Stage, batches, payloads, take_turns
from bench.jobs import mode_of
from bench.rivals import acknowledged, encoded_xadd

if TYPE_CHECKING:
    from collections.abc import Callable

# The largest page of `read_stream`; XREAD and XRANGE get the same.
PAGE = 10_000


def run(stage: Stage) -> Report:
    """P7."""
    count = stage.pick(100_000, 2_000)
    frames = payloads(count)
    stage.fresh()
    singles = filled(stage.core(retention_maxlen=10_000_000), frames, 256)
    stage.backend.complete(singles.handle)
    # Longer than the benchmark, since an expired window would be a gap.
    runs = filled(stage.core(mode_of("best_effort", 600_000, 10_000_000)), frames, 64)
    stage.backend.complete(runs.handle)
    acknowledged(stage.wire, [encoded_xadd("bench", frame) for frame in frames], 256)()

    def ours(core: Core, job: str, how: str) -> Callable[[], Metrics]:
        return lambda: stage.worker("ff_fast").run(
            f"bench.jobs:{job}", url=stage.url, execution_id=core.execution_id, count=count, how=how
        )

    def theirs(job: str, how: str) -> Callable[[], Metrics]:
        return lambda: stage.worker("redis-py").run(
            f"bench.rivals:{job}", path=stage.path, key="bench", count=count, page=PAGE, how=how
        )

    contenders: dict[str, Callable[[], Metrics]] = {}
    for shell, job in (("sync", "read"), ("asyncio", "read_asyncio")):
        for (kind, core), how in itertools.product(
            (("durable", singles), ("runs of 64", runs)), ("tail", "read_stream")
        ):
            contenders[f"ff_fast {shell} {how}, {kind}"] = ours(core, job, how)
    for shell, job in (("sync", "redis_read"), ("asyncio", "redis_asyncio_read")):
        for how in ("xread", "xrange"):
            contenders[f"redis-py {shell} {how}"] = theirs(job, how)
    report = Report(figures=take_turns(contenders, stage.rounds))
    for shell, kind, (how, rival) in itertools.product(
        ("sync", "asyncio"),
        ("durable", "runs of 64"),
        (("tail", "xread"), ("read_stream", "xrange")),
    ):
        ours_name, rival_name = f"ff_fast {shell} {how}, {kind}", f"redis-py {shell} {rival}"
        figures = (
            report.figure(ours_name, "per_second"),
            rival_name,
            report.figure(rival_name, "per_second"),
        )
        what = f"{how}, {kind}, {shell}"
        targets = Target(500_000, at_least=True), Target(2, at_least=True, of_ratio=True)
        report.rows += [Row("P7", what, "/s", *figures, target) for target in targets]
    stage.end_workers()
    return report


def filled(core: Core, frames: list[bytes], size: int) -> Core:
    for part in batches(frames, size):
        core.send(part)
    return core
