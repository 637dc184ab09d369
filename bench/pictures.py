"""The pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl

mpl.use("Agg")
from typing import TYPE_CHECKING

from matplotlib import pyplot as plt
from matplotlib.ticker import FuncFormatter, NullFormatter

from bench.figures import number

if TYPE_CHECKING:
    from pathlib import Path

Series = Mapping[str, Sequence[Sequence[float]]]
TEXTS = {
    "throughput": (
        "Frames a second, one stream, each batch awaited",
        "frames per batch",
        "acknowledged frames a second",
    ),
    "latency": (
        "From write to the reader, three processes on one machine",
        "frames a second",
        "milliseconds",
    ),
    "growth": ("Server CPU per frame as things grow", "size", "microseconds per frame"),
}


def draw(pictures: Mapping[str, Series], folder: Path, note: str) -> list[Path]:
    """Draw a picture for each of *pictures* into *folder* and return the files."""
    made = []
    for name, lines in pictures.items():
        title, x_label, y_label = TEXTS[name]
        figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
        for i, (label, points) in enumerate(lines.items()):
            xs, ys = [point[0] for point in points], [point[1] for point in points]
            # p50 and p99 of a contender follow each other and share a colour.
            pair = name == "latency"
            axes.plot(
                xs,
                ys,
                marker="o",
                markersize=4,
                label=label,
                color=f"C{i // 2 if pair else i}",
                linestyle="--" if label.endswith("p99") else "-",
                linewidth=2.2 if label.startswith("ff_fast") else 1.2,
            )
        axes.set_xscale("log", base=2 if name == "throughput" else 10)
        axes.set_yscale("log")
        if name != "growth":
            axes.set_xticks(sorted({point[0] for points in lines.values() for point in points}))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: number(value, 4)))
            axis.set_minor_formatter(NullFormatter())
        if name == "latency":
            # An axis of less than two decades would have too few labels at powers of ten alone.
            axes.yaxis.set_minor_formatter(FuncFormatter(lambda value, _: number(value)))
        axes.set_title(title)
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.grid(visible=True, which="both", alpha=0.25)
        axes.legend(fontsize=8)
        figure.supxlabel(note, fontsize=7, color="gray")
        path = folder / f"{name}.png"
        figure.savefig(path, dpi=110)
        plt.close(figure)
        made.append(path)
    return made
