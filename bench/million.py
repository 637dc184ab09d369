"""The model of a large deployment: what a number of live streams takes, from what one primary with a share of them takes.

A primary has nothing to do with another one, so *n* of them with *n* times the streams cost as much for each frame and
stream. Measurements on one primary make the model, those on two and three, each with as many streams, check it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from bench.figures import number

STREAMS, RATE = 1_000_000, 60
# Cores are planned to be this busy: the rest is for bursts, and for the streams of a primary that has failed.
BUSY = 0.6
# Frames of a stream that lives a minute: all are in its log.
KEPT = 60 * RATE
# A worker process, and a gateway process: each fills a core at this many streams of 60 Hz (see the model of cost).
PROCESS_STREAMS = 3_500

Costs = Mapping[str, Mapping[str, float]]
"""What was measured, by the name of a deployment (`named`): one dictionary of quantities each."""
PARTITIONS, STREAMS_EACH = 16, 200


def named(primaries: int, partitions: int) -> str:
    servers = "1 primary" if primaries == 1 else f"{primaries} primaries"
    return f"{servers}, {partitions} partitions"


CHECKED = tuple(named(primaries, PARTITIONS) for primaries in (1, 2, 3))


QUANTITIES = (
    ("server_us", "server us a frame"),
    ("stream_bytes", "bytes of memory a stream"),
    ("frame_bytes", "bytes of memory a frame"),
    ("connections", "connections of a worker and a gateway"),
    ("in_bytes", "network bytes a frame, in"),
    ("out_bytes", "network bytes a frame, out"),
)


def table(costs: Costs) -> str:
    """Return the check of the model and what it says, as two tables in Markdown."""
    return f"{_markdown(_checked(costs))}\n\n{_markdown(_needed(costs[CHECKED[0]]))}"


def _checked(costs: Costs) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [("of each primary", *CHECKED)]
    for quantity, what in QUANTITIES:
        lines.append((what, *(number(costs[name][quantity]) for name in CHECKED)))
    return lines


def _needed(model: Mapping[str, float]) -> list[tuple[str, ...]]:
    frames = STREAMS * RATE
    primaries = math.ceil(frames * model["server_us"] / 1e6 / BUSY)
    memory = STREAMS * (model["stream_bytes"] + KEPT * model["frame_bytes"])
    processes = math.ceil(STREAMS / PROCESS_STREAMS)
    traffic = [model[name] * frames * 8 / 1e6 for name in ("in_bytes", "out_bytes")]
    return [
        (f"{STREAMS:,} streams of {RATE} Hz", "all", "a primary"),
        ("primaries", f"{primaries:,}", "1"),
        ("streams", f"{STREAMS:,}", number(STREAMS / primaries, 2)),
        ("memory, GiB", number(memory / 2**30, 2), number(memory / primaries / 2**30, 2)),
        (
            "connections, if every process writes to every primary",
            number(processes * primaries * model["connections"], 2),
            number(processes * model["connections"], 2),
        ),
        *(
            (f"network {way}, Mbit/s", number(each, 2), number(each / primaries, 2))
            for way, each in zip(("in", "out"), traffic, strict=True)
        ),
    ]


def _markdown(lines: list[tuple[str, ...]]) -> str:
    heading, *rest = lines
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (heading, tuple("---" for _ in heading), *rest)
    )
