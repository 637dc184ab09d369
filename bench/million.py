"""The model of a large deployment: what a number of live streams takes, from what a few of them cost.

A call costs a server its own part, and each of its frames another. So what a frame costs follows from the frames that
share a call: the streams of one process in one partition that are ready in the same moment. Both parts come from
measurements on one primary with many and with few partitions; the measurements on two and three primaries check them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from bench.figures import number

STREAMS, RATE = 1_000_000, 60
# Cores are planned to be this busy: the rest is for bursts, and for the streams of a primary that has failed.
BUSY = 0.6
FRAMES_PER_CALL = (1, 4, 16)
# Frames of a stream that lives a minute: all are in its log.
KEPT = 60 * RATE
# A worker process, and a gateway process: each fills a core at this many streams of 60 Hz (see the model of cost).
PROCESS_STREAMS = 3_500

Costs = Mapping[str, Mapping[str, float]]
"""What was measured, by the name of a deployment (`named`): one dictionary of quantities each."""
FEW, MANY, HALF = 4, 256, 16


def named(primaries: int, partitions: int) -> str:
    servers = "1 primary" if primaries == 1 else f"{primaries} primaries"
    return f"{servers}, {partitions} partitions"


CHECKED = tuple(named(primaries, HALF) for primaries in (1, 2, 3))


class Model(NamedTuple):
    """What streams cost.

    Attributes:
        call_us: Server CPU of a call, beyond its frames.
        frame_us: Server CPU of a frame, stored and delivered.
        stream_bytes: Memory of a stream with one frame.
        frame_bytes: Memory of a frame in the log.
        connections: Connections that one process has to a primary.
        in_bytes, out_bytes: Network traffic of a primary for a frame.
    """

    call_us: float
    frame_us: float
    stream_bytes: float
    frame_bytes: float
    connections: float
    in_bytes: float
    out_bytes: float

    @classmethod
    def of(cls, costs: Costs) -> Model:
        """Fit it to the measurements on one primary."""
        few, many = costs[named(1, FEW)], costs[named(1, MANY)]
        calls = [1 / each["frames_per_call"] for each in (few, many)]
        call_us = (many["server_us"] - few["server_us"]) / (calls[1] - calls[0])
        return cls(
            call_us=call_us,
            frame_us=few["server_us"] - call_us * calls[0],
            stream_bytes=few["stream_bytes"],
            frame_bytes=few["frame_bytes"],
            connections=few["connections"],
            in_bytes=few["in_bytes"],
            out_bytes=few["out_bytes"],
        )

    def server_us(self, frames_per_call: float) -> float:
        """Return the server CPU of a frame.

        >>> Model(10.0, 4.0, 0, 0, 0, 0, 0).server_us(5)
        6.0
        """
        return self.frame_us + self.call_us / frames_per_call


def table(costs: Costs) -> str:
    """Return the check of the model and what it says, as two tables in Markdown."""
    model = Model.of(costs)
    return f"{_markdown(_checked(model, costs))}\n\n{_markdown(_needed(model))}"


def _checked(model: Model, costs: Costs) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("measured on", "frames a call", "server us a frame", "by the model", "bytes a stream", "by the model", "bytes a frame", "by the model",
         "connections of a worker and a gateway to a primary", "network bytes a frame in, out")
    ]  # fmt: skip
    for name in CHECKED:
        found = costs[name]
        lines.append(
            (
                name,
                number(found["frames_per_call"]),
                number(found["server_us"]),
                number(model.server_us(found["frames_per_call"])),
                number(found["stream_bytes"]),
                number(model.stream_bytes),
                number(found["frame_bytes"]),
                number(model.frame_bytes),
                number(found["connections"]),
                f"{number(found['in_bytes'])}, {number(found['out_bytes'])}",
            )
        )
    return lines


def _needed(model: Model) -> list[tuple[str, ...]]:
    lines: list[tuple[str, ...]] = [
        ("frames a call", "server us a frame", "primaries", "streams a primary", "memory of all", "of a primary",
         "connections of a primary, if every process writes to all", "network of a primary, in, out")
    ]  # fmt: skip
    frames = STREAMS * RATE
    processes = math.ceil(STREAMS / PROCESS_STREAMS)
    for per_call in FRAMES_PER_CALL:
        us = model.server_us(per_call)
        primaries = math.ceil(frames * us / 1e6 / BUSY)
        memory = STREAMS * (model.stream_bytes + KEPT * model.frame_bytes)
        traffic = [
            each * frames / primaries * 8 / 1e6 for each in (model.in_bytes, model.out_bytes)
        ]
        lines.append(
            (
                f"{per_call}",
                number(us),
                f"{primaries:,}",
                number(STREAMS / primaries, 2),
                f"{number(memory / 2**30, 2)} GiB",
                f"{number(memory / primaries / 2**20, 2)} MiB",
                number(processes * model.connections, 2),
                f"{number(traffic[0], 2)}, {number(traffic[1], 2)} Mbit/s",
            )
        )
    return lines


def _markdown(lines: list[tuple[str, ...]]) -> str:
    heading, *rest = lines
    return "\n".join(
        "| " + " | ".join(line) + " |" for line in (heading, tuple("---" for _ in heading), *rest)
    )
