"""The output of a benchmark: repeated values, rows with a target, the table. No benchmark runs here."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that is at least as great as a *share* (0 to 1) of *values*.

    >>> percentile([4, 1, 3, 2], 0.5), percentile([4, 1, 3, 2], 0.99)
    (2, 4)
    """
    if not values:
        raise ValueError("no values")
    ordered = sorted(values)
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


class FigureJson(TypedDict):
    min: float
    median: float
    max: float
    values: list[float]


@dataclass(frozen=True)
class Figure:
    """One quantity, measured once a round."""

    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float]) -> Figure:
        if not values:
            raise ValueError("a figure needs a value")
        return cls(tuple(float(value) for value in values))

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def to_json(self) -> FigureJson:
        return {
            "min": min(self.values),
            "median": self.median,
            "max": max(self.values),
            "values": list(self.values),
        }


def ratio(ours: Figure, rival: Figure) -> float:
    """Return ours over the rival's: formed within each round, then the median of all rounds.

    With different numbers of rounds it is the ratio of the medians, since rounds cannot be paired.
    """
    if len(ours.values) != len(rival.values):
        return ours.median / rival.median
    return statistics.median(a / b for a, b in zip(ours.values, rival.values, strict=True))


@dataclass(frozen=True)
class Target:
    """A bound on our figure, or on its ratio to the rival's."""

    bound: float
    at_least: bool = False
    of_ratio: bool = False

    def holds(self, value: float) -> bool:
        return value >= self.bound if self.at_least else value <= self.bound

    def text(self, unit: str) -> str:
        sign = "≥" if self.at_least else "≤"
        return f"{sign} {number(self.bound)}" + (" x" if self.of_ratio else f" {unit}".rstrip())


class RowJson(TypedDict):
    id: str
    what: str
    unit: str
    ours: FigureJson
    rival_name: str | None
    rival: FigureJson | None
    ratio: float | None
    target: str | None
    met: bool | None


@dataclass(frozen=True)
class Row:
    """One line of the table; without a target it is for information."""

    id: str
    what: str
    unit: str
    ours: Figure
    rival_name: str | None = None
    rival: Figure | None = None
    target: Target | None = None

    def to_json(self) -> RowJson:
        compared = None if self.rival is None else ratio(self.ours, self.rival)
        met = None
        if self.target is not None:
            judged = compared if self.target.of_ratio else self.ours.median
            assert judged is not None, f"{self.id} has a target for a ratio and no rival"
            met = self.target.holds(judged)
        return {
            "id": self.id,
            "what": self.what,
            "unit": self.unit,
            "ours": self.ours.to_json(),
            "rival_name": self.rival_name,
            "rival": None if self.rival is None else self.rival.to_json(),
            "ratio": compared,
            "target": None if self.target is None else self.target.text(self.unit),
            "met": met,
        }


@dataclass
class Report:
    """The results of one group of benchmarks.

    Attributes:
        rows: Lines of the table.
        figures: All measured figures, by contender and quantity.
        series: Points of the pictures: picture, line, ``[x, y]`` pairs.
        costs: Microseconds of CPU for a frame, by core and contender: the model of cost (:mod:`bench.capacity`).
    """

    rows: list[Row] = field(default_factory=list)
    figures: dict[str, dict[str, Figure]] = field(default_factory=dict)
    series: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    costs: dict[str, dict[str, float]] = field(default_factory=dict)

    def figure(self, contender: str, quantity: str) -> Figure:
        return self.figures[contender][quantity]

    def add_cost(self, core: str, contender: str, cost: Figure) -> None:
        self.costs.setdefault(core, {})[contender] = cost.median

    def include(self, other: Report, prefix: str) -> None:
        """Add another report; its contenders get a *prefix*."""
        self.rows += other.rows
        self.figures |= {f"{prefix}: {name}": figures for name, figures in other.figures.items()}
        self.series |= other.series
        for core, costs in other.costs.items():
            self.costs.setdefault(core, {}).update(costs)


def number(value: float, significant: int = 3) -> str:
    """Return *value* with *significant* digits, commas, and no trailing zeros.

    >>> number(0.4567), number(12.34), number(123456.7), number(3.0)
    ('0.457', '12.3', '123,000', '3')
    """
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = significant - 1 - math.floor(math.log10(abs(value)))
    rounded = round(value, digits)
    if digits <= 0 or rounded == int(rounded):
        return f"{int(rounded):,}"
    return f"{rounded:,.{digits}f}".rstrip("0").rstrip(".")


def ratio_text(value: float) -> str:
    """Return a ratio with 3 digits, or 4 near 1, where the fourth decides about a target."""
    return number(value, 4 if 0.95 < value < 1.05 else 3)


HEADINGS = ("row", "what", "ours", "rival", "ratio", "target", "met")


def cells(row: RowJson) -> tuple[str, ...]:
    """The texts of one line of the table."""
    rival = "" if row["rival"] is None else f"{number(row['rival']['median'])}: {row['rival_name']}"
    return (
        row["id"],
        row["what"],
        f"{number(row['ours']['median'])} {row['unit']}".rstrip(),
        rival,
        "" if row["ratio"] is None else f"{ratio_text(row['ratio'])} x",
        row["target"] or "",
        {True: "yes", False: "**no**", None: ""}[row["met"]],
    )


def markdown(rows: Sequence[RowJson]) -> str:
    """The table as README.md shows it."""
    lines = [HEADINGS, tuple("---" for _ in HEADINGS), *(cells(row) for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def aligned(rows: Sequence[RowJson]) -> str:
    """The table for a terminal."""
    lines = [HEADINGS, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADINGS))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def note(result: Mapping[str, object]) -> str:
    """Return server, machine, versions and date of a run in one line."""
    state = "dirty" if result["dirty"] else "clean"
    return (
        f"{result['server']}, allocator {result['allocator']}, {result['transport']}, {result['cpu']}, "
        f"{result['cores']} cores, Python {result['python']}, commit {str(result['commit'])[:10]} ({state}), "
        f"{str(result['date'])[:10]}" + (", quick: figures mean nothing" if result["quick"] else "")
    )
