"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl

mpl.use("Agg")
from typing import TYPE_CHECKING, NamedTuple

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench import capacity
from bench.figures import number

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from bench.figures import Report

Series = Mapping[str, Sequence[tuple[float, float]]]


class Panel(NamedTuple):
    """One diagram of a picture: the series that it shows, and its texts."""

    series: str
    title: str
    x_label: str
    y_label: str


PICTURES = {
    "throughput": [
        Panel(
            "throughput",
            "Frames a second, one stream, each batch awaited",
            "frames per batch",
            "acknowledged frames a second",
        )
    ],
    "latency": [
        Panel(
            "latency",
            "From write to the reader: one stream",
            "frames a second",
            "milliseconds",
        ),
        Panel(
            "latency of streams",
            "From write to the reader: streams of 60 Hz, a reader each",
            "streams",
            "milliseconds",
        ),
    ],
    "growth": [
        Panel("growth", "Server CPU per frame as things grow", "size", "microseconds per frame")
    ],
}


def draw(report: Report, folder: Path, note: str) -> list[Path]:
    """Draw a picture of each series and of the model of cost into *folder*, and return the files."""
    made = []
    for name, panels in PICTURES.items():
        shown = [panel for panel in panels if panel.series in report.series]
        if shown:
            figure, all_axes = plt.subplots(
                ncols=len(shown), squeeze=False, figsize=(8 * len(shown), 5), layout="constrained"
            )
            for panel, axes in zip(shown, all_axes[0], strict=True):
                draw_lines(axes, panel, report.series[panel.series])
            made.append(saved(figure, folder / f"{name}.png", note))
    if bars := capacity.bars(report.costs):
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        draw_bars(axes, bars)
        made.append(saved(figure, folder / "capacity.png", note))
    return made


def draw_lines(axes: Axes, panel: Panel, lines: Series) -> None:
    # p50 and p99 of a contender follow each other and share a colour.
    pairs = panel.series.startswith("latency")
    for i, (label, points) in enumerate(lines.items()):
        axes.plot(
            [point[0] for point in points],
            [point[1] for point in points],
            marker="o",
            markersize=4,
            label=label,
            color=f"C{i // 2 if pairs else i}",
            linestyle="--" if label.endswith("p99") else "-",
            linewidth=2.2 if label.startswith("ff_fast") else 1.2,
        )
    axes.set_xscale("log", base=2 if panel.series == "throughput" else 10)
    axes.set_yscale("log")
    if panel.series != "growth":
        axes.set_xticks(sorted({point[0] for points in lines.values() for point in points}))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 4)))
        axis.set_minor_formatter(NullFormatter())
    if pairs:
        # An axis of less than two decades would have too few labels at powers of ten alone.
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: number(value)))
    axes.set_title(panel.title)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.grid(visible=True, which="both", alpha=0.25)
    axes.legend(fontsize=8)


def draw_bars(axes: Axes, contenders: Mapping[str, Sequence[tuple[str, float]]]) -> None:
    places = {core: place for place, core in enumerate(capacity.WHAT)}
    width = 0.8 / len(contenders)
    for i, (label, carried) in enumerate(contenders.items()):
        at = [places[core] + (i + 0.5) * width - 0.4 for core, _ in carried]
        drawn = axes.bar(at, [streams for _, streams in carried], width, label=label)
        axes.bar_label(drawn, [number(streams, 2) for _, streams in carried], fontsize=8)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 4)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xticks(
        list(places.values()),
        [f"a core of {core}\n{what}" for core, what in capacity.WHAT.items()],
        fontsize=8,
    )
    axes.set_title(f"Live streams of {capacity.DRAWN_RATE} Hz that one core carries")
    axes.set_ylabel("streams")
    axes.grid(visible=True, axis="y", alpha=0.25)
    axes.legend(fontsize=8)


def saved(figure: Figure, path: Path, note: str) -> Path:
    figure.supxlabel(note, fontsize=7, color="gray")
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return path
