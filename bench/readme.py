"""Put what the last complete run has found into README.md, bench/RESULTS.md and bench/README.md: ``python -m bench.readme``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench import capacity, million
from bench.figures import RowJson, markdown, note, number

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "latest.json"
NOT_MEASURED = "Run `make bench`."

SHOWN = {
    "latency": "Milliseconds from write to reader: one stream, and many streams of 60 Hz with a reader each",
    "capacity": "Streams of 60 Hz that a core carries: of Valkey, of a worker, of a gateway",
}
"""The pictures in bench/RESULTS.md, with what they show in words; README.md has the first one."""

TOLD = [
    (
        "P25",
        "1,000 SSE readers of 1,000 streams at 30 Hz: CPU of the web process per event",
        "1,000 browsers, each with a stream of 30 Hz: CPU of the web process for an event",
    ),
    (
        "P27",
        "an answer of 2,000 tokens, resumed in the middle: first byte, p99",
        "an answer of 2,000 tokens, resumed in the middle: first byte, p99",
    ),
    (
        "P3",
        "client CPU per best-effort frame, asyncio",
        "client CPU for a best-effort frame, asyncio",
    ),
    (
        "P1b",
        "server CPU per best-effort frame, runs of 64",
        "server CPU for a best-effort frame, in runs of 64",
    ),
    (
        "P4",
        "acknowledged durable frames, one asyncio worker",
        "acknowledged durable frames of one asyncio worker",
    ),
    (
        "P16",
        "1,000 streams at 60 Hz, each with a reader, best-effort: write to reader, p50",
        "1,000 streams of 60 Hz with a reader each: write to reader, p50",
    ),
    (
        "P16",
        "1,000 streams at 60 Hz, each with a reader, best-effort: gateway CPU per frame delivered",
        "the same: CPU of the reading process for a frame",
    ),
    (
        "P16",
        "1,000 streams at 60 Hz, each with a reader, best-effort: connections of the readers",
        "the same: connections of the readers",
    ),
    ("P18", "the same: memory of the reading process for each", "memory of each of 5,000 readers"),
    (
        "P14",
        "create to handle in a waiting worker, asyncio, p99",
        "work created to work begun in a waiting worker, p99",
    ),
    (
        "P20",
        "cancel to a handler that waits, p99",
        "cancellation to a handler that waits, p99",
    ),
    (
        "P23",
        "planned failover, 16 streams on it, 20 times: longest time without an acknowledgement, p99",
        "longest pause of a writer at a planned failover, p99",
    ),
]
"""Rows for README.md: the id and the words of the row, and what README.md says. It has the first ten that a run has."""

Result = dict[str, Any]


def told(result: Result) -> str:
    """Return ten rows, for README.md."""
    rows: dict[tuple[str, str], RowJson] = {}
    for row in cast("list[RowJson]", result["rows"]):
        rows.setdefault((row["id"], row["what"]), row)
    lines = ["| what | ff_fast | beside it |", "| --- | --- | --- |"]
    for id_, what, words in [each for each in TOLD if each[:2] in rows][:10]:
        row = rows[id_, what]
        unit, rival = row["unit"], row["rival"]
        ours = f"{number(row['ours']['median'])} {unit}".rstrip()
        other = (
            ""
            if rival is None
            else f"{number(rival['median'])} {unit}".rstrip() + f", {row['rival_name']}"
        )
        lines.append(f"| {words} | {ours} | {other} |")
    judged = [row["met"] for row in cast("list[RowJson]", result["rows"]) if row["met"] is not None]
    table = "\n".join(lines)
    return (
        f"{table}\n\nOf {len(judged)} targets {sum(judged)} are met; [bench/RESULTS.md](bench/RESULTS.md) has every row, those too. "
        f"{note(result)}."
    )


def numbers(result: Result) -> str:
    """Return the table of all rows."""
    rows = cast("list[RowJson]", result["rows"])
    return f"{markdown(rows)}\n\nRatios are ours over the rival's, in one run of `make bench`. {note(result)}."


def pictures(result: Result) -> str:
    """Return the pictures; nothing for a run that has not drawn them."""
    if not result.get("costs"):
        return ""
    return "\n\n".join(f"![{what}](results/{name}.png)" for name, what in SHOWN.items())


def picture(result: Result) -> str:
    """Return the picture that README.md shows; nothing for a run that has not drawn it."""
    return pictures(result).partition("\n")[0].replace("](", "](bench/")


def carried(result: Result) -> str:
    """Return the model of cost."""
    costs = cast("capacity.Costs", result.get("costs") or {})
    return f"{capacity.table(costs)}\n\n{note(result)}." if costs else NOT_MEASURED


def fleets(result: Result) -> str:
    """Return the model of a large deployment."""
    costs = cast("million.Costs", result.get("costs") or {})
    known = costs.keys() >= {*million.CHECKED}
    return f"{million.table(costs)}\n\n{note(result)}." if known else NOT_MEASURED


# What stands between the two markers of a name, in which file.
PARTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "told": ("README.md", told),
    "picture": ("README.md", picture),
    "pictures": ("bench/RESULTS.md", pictures),
    "numbers": ("bench/RESULTS.md", numbers),
    "capacity": ("bench/README.md", carried),
    "million": ("bench/README.md", fleets),
}


def replaced(text: str, name: str, part: str) -> str:
    """Return *text* with *part* between the markers of *name*.

    Raises:
        ValueError: A marker is missing or repeated, or the two are in the wrong order.
    """
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"the text must have {begin} and {end}, once each, in this order")
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{part}\n{end}{after}"


def main() -> int:
    """Rewrite the files."""
    result = json.loads(RESULTS.read_text("utf-8"))
    if result["quick"] or result["only"]:
        print("The last run was not a complete one: run `make bench`.", file=sys.stderr)
        return 1
    for name, (file, part) in PARTS.items():
        path = ROOT / file
        path.write_text(replaced(path.read_text("utf-8"), name, part(result)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
