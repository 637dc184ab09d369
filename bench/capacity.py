"""The model of cost: how many streams a core carries, computed from what a frame costs it.

A core that spends *n* microseconds on a frame carries ``1,000,000 / n`` frames a second, and that many streams divided by
their rate. The cost of a frame falls as more frames share a call, so the model holds from the number of streams on at
which the cost was measured.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.figures import number

RATES = (30, 60, 200)
"""Frames a second of a stream: a slow model, a usual one, a fast one."""
DRAWN_RATE = 60

Costs = Mapping[str, Mapping[str, float]]
"""Microseconds of CPU for a frame: by core (the server's, a worker's, a gateway's), then by contender."""

WHAT = {
    "Valkey": "stores a frame and delivers it to its reader",
    "worker": "writes a frame, beyond its own schedule",
    "gateway": "receives a frame and hands it to its reader",
}


def streams(us_per_frame: float, rate: float) -> float:
    """Return how many streams of *rate* frames a second fill a core.

    >>> round(streams(4.0, 60))
    4167
    """
    return 1e6 / us_per_frame / rate


def table(costs: Costs) -> str:
    """Return the model as a table in Markdown."""
    headings = (
        "a core of",
        "that",
        "by",
        "us a frame",
        *(f"streams at {rate} Hz" for rate in RATES),
    )
    lines = [headings, tuple("---" for _ in headings)]
    for core, what in WHAT.items():
        for contender, us in costs.get(core, {}).items():
            carried = (number(streams(us, rate), 2) for rate in RATES)
            lines.append((core, what, contender, number(us), *carried))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def bars(costs: Costs) -> dict[str, list[tuple[str, float]]]:
    """Return for each contender the cores and the streams that they carry at one rate."""
    found: dict[str, list[tuple[str, float]]] = {}
    for core in WHAT:
        for contender, us in costs.get(core, {}).items():
            found.setdefault(contender, []).append((core, streams(us, DRAWN_RATE)))
    return found
