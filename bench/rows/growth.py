"""Growth: the cost per frame must not grow with the stream, the document or the number of streams."""

from __future__ import annotations

import time

import orjson

from bench.figures import Figure, Report, Row, Target
from bench.harness import Stage, batches, payloads
from bench.jobs import mode_of
from bench.rows.summary import document_of, patches_for

BATCH = 64


def run(stage: Stage) -> Report:
    """Measure each kind of growth. Its row is the cost at the large end over that at the small end."""
    report = Report()
    for what, measure in (
        ("frames in the stream", stream_length),
        ("bytes of the document", document_size),
        ("streams", stream_count),
    ):
        turns = [measure(stage) for _ in range(stage.pick(3, 1))]
        points = {at: Figure.of([values[at] for values in map(dict, turns)]) for at, _ in turns[0]}
        report.series.setdefault("growth", {})[f"us per frame against {what}"] = [
            (at, figure.median) for at, figure in points.items()
        ]
        for at, figure in points.items():
            report.figures[f"{at:,.0f} {what}"] = {"server_us": figure}
        small, large = min(points), max(points)
        report.rows.append(
            Row(
                "growth", f"server CPU per frame at {large:,.0f} {what}", "us", points[large],
                f"{small:,.0f}", points[small], Target(1.5, of_ratio=True),
            )
        )  # fmt: skip
    sizes = frame_size(stage)
    report.series["growth"]["us per frame against bytes of a frame"] = [
        (n, us) for n, us, _ in sizes
    ]
    for at, value, rate in sizes:
        report.figures[f"frames of {at:,.0f} bytes"] = {
            "server_us": Figure.of([value]),
            "mib_per_second": Figure.of([rate]),
        }
    report.rows.append(
        Row(
            "growth",
            f"frames of {sizes[-1][0]:,.0f} bytes, acknowledged",
            "MiB/s",
            Figure.of([sizes[-1][2]]),
        )
    )
    return report


def stream_length(stage: Stage) -> list[tuple[float, float]]:
    """Append durable frames without trimming; measure around each length, from nine tenths of it to eleven."""
    stage.fresh()
    core = stage.core(retention_maxlen=100_000_000)
    parts = batches(payloads(BATCH * 100), BATCH)
    points: list[tuple[float, float]] = []
    sent = 0
    for goal in (1_000, 10_000, 100_000, 1_000_000)[: stage.pick(4, 2)]:
        while sent < goal * 9 // 10:
            core.send(parts[sent // BATCH % 100])
            sent += BATCH
        begun, before = sent, stage.wire.server_cpu()
        while sent < goal * 11 // 10:
            core.send(parts[sent // BATCH % 100])
            sent += BATCH
        points.append((goal, (stage.wire.server_cpu() - before) / (sent - begun) * 1e6))
    return points


def document_size(stage: Stage) -> list[tuple[float, float]]:
    """Send 25-byte patches, enough for the writer to store the document three times, which is part of the cost."""
    points: list[tuple[float, float]] = []
    for size in (1 << 10, 10 << 10, 100 << 10, 1 << 20)[: stage.pick(4, 2)]:
        stage.fresh()
        document = document_of(size)
        core = stage.core(mode_of("merge"))
        # A patch has at most 64 KiB, so a large document takes several.
        names = list(document)
        for group in batches([name.encode() for name in names], 400):
            core.send([orjson.dumps({name.decode(): document[name.decode()] for name in group})])
        count = max(size * 3 // 25 // BATCH, stage.pick(100, 3)) * BATCH if not stage.quick else 192
        parts = batches(patches_for(document, count), BATCH)
        before = stage.wire.server_cpu()
        for part in parts:
            core.send(part)
        points.append((size, (stage.wire.server_cpu() - before) / count * 1e6))
    return points


def stream_count(stage: Stage) -> list[tuple[float, float]]:
    """Send batches of 16 to all streams in turn."""
    points: list[tuple[float, float]] = []
    frames = payloads(16)
    for streams in (1, 10, 100, 2_000)[: stage.pick(4, 2)]:
        stage.fresh()
        cores = [stage.core(retention_maxlen=1_000) for _ in range(streams)]
        turns = stage.pick(4_000, 40)
        for core in cores:
            core.send(frames)
        before = stage.wire.server_cpu()
        for i in range(turns):
            cores[i % streams].send(frames)
        points.append((streams, (stage.wire.server_cpu() - before) / (turns * 16) * 1e6))
    return points


def frame_size(stage: Stage) -> list[tuple[float, float, float]]:
    """Return for each frame size the server CPU per frame, and MiB a second with each batch awaited."""
    points = []
    for size in (1, 64, 1_024, 16_384, 65_536):
        stage.fresh()
        core = stage.core(retention_maxlen=1_000)
        each = min(BATCH, (1 << 20) // size)
        frames = payloads(each, size)
        turns = stage.pick(max(min(400, (200 << 20) // (size * each)), 10), 2)
        before, start = stage.wire.server_cpu(), time.perf_counter()
        for _ in range(turns):
            core.send(frames)
        wall = time.perf_counter() - start
        cpu = stage.wire.server_cpu() - before
        count = turns * each
        points.append((float(size), cpu / count * 1e6, count * size / wall / 2**20))
    return points
