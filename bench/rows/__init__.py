"""The benchmarks, in groups that share their measurements."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from bench.rows import (
    cluster,
    crowd,
    growth,
    imports,
    latency,
    lifecycle,
    many_streams,
    memory,
    own_pace,
    reading,
    server_cost,
    summary,
    throughput,
    web,
    window,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from bench.figures import Report
    from bench.harness import Stage


class Group(NamedTuple):
    """Rows that one function measures together."""

    ids: tuple[str, ...]
    run: Callable[[Stage], Report]


GROUPS = (
    Group(("P1a", "P1b", "P2"), server_cost.run),
    Group(("P3", "P4"), throughput.run),
    Group(("P5",), latency.run),
    Group(("P6",), many_streams.run),
    Group(("P7",), reading.run),
    Group(("P8",), summary.patches),
    Group(("P9",), summary.answer),
    Group(("P10",), window.run),
    Group(("P11",), memory.run),
    Group(("P12",), imports.run),
    Group(("P13",), lifecycle.run),
    Group(("P14",), lifecycle.latency),
    Group(("P15",), own_pace.appends),
    Group(("P16",), own_pace.with_readers),
    Group(("P17",), own_pace.one_stream),
    Group(("P18",), crowd.tails),
    Group(("P19",), crowd.writers),
    Group(("P20",), crowd.cancellation),
    Group(("P21",), cluster.cost),
    Group(("P22",), cluster.replicated),
    Group(("P23", "P24"), cluster.failovers),
    Group(("P25",), web.many_streams),
    Group(("P26",), web.one_stream),
    Group(("P27",), web.answers),
    Group(("growth",), growth.run),
)
