"""P11: the server's memory for each stored frame, the client's for each open writer."""

from __future__ import annotations

from bench.figures import Figure, Report, Row, Target
from bench.harness import Stage, batches, check_core, payloads
from bench.jobs import mode_of
from bench.rivals import acknowledged, encoded_xadd


def run(stage: Stage) -> Report:
    """P11."""
    count = stage.pick(9_984, 1_024)
    frames = payloads(count)
    report = Report()

    def used(name: str, key: bytes) -> Figure:
        size = stage.wire.count("MEMORY", "USAGE", key, "SAMPLES", 0)
        figure = Figure.of([size / count])
        report.figures[name] = {"bytes_per_frame": figure}
        return figure

    stage.fresh()
    acknowledged(stage.wire, [encoded_xadd("bench", frame) for frame in frames], 64)()
    rival_name = "XADD of 6 fields"
    rival = used(rival_name, b"bench")
    core = stage.core()
    for part in batches(frames, 64):
        core.send(part)
    check_core(stage, core, frames, count)
    report.rows.append(
        Row("P11", "server, durable frame of 6 bytes", "B", used("durable", core.log), rival_name, rival, Target(50))
    )  # fmt: skip
    for size in (1, 16, 64, 256):
        core = stage.core(mode_of("best_effort"))
        for part in batches(frames, size):
            core.send(part)
        check_core(stage, core, frames, count)
        name = f"best-effort, runs of {size}"
        report.rows.append(
            Row(
                "P11", f"server, {name}", "B", used(name, core.live), rival_name, rival,
                Target(20) if size >= 16 else None,
            )
        )  # fmt: skip
    writers = stage.pick(5_000, 200)
    answer = stage.worker("ff_fast").run(
        "bench.jobs:idle_writers", url=stage.url, count=writers, frames=100
    )
    stage.end_workers()
    idle, after = (Figure.of([answer[name] / 1024]) for name in ("idle_bytes", "used_bytes"))
    report.figures[f"{writers} idle writers"] = {"new_kib": idle, "used_kib": after}
    report.rows += [
        Row("P11", f"client, each of {writers:,} writers, new", "KiB", idle, target=Target(4)),
        Row("P11", "client, the same after 100 frames each", "KiB", after, target=Target(4)),
    ]
    return report
