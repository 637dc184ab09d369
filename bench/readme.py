"""Put what the last complete run has found into README.md and bench/README.md: ``python -m bench.readme``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from bench import capacity, million
from bench.figures import RowJson, markdown, note

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "latest.json"
NOT_MEASURED = "Run `make bench`."

SHOWN = {
    "latency": "Milliseconds from write to reader: one stream, and many streams of 60 Hz with a reader each",
    "capacity": "Streams of 60 Hz that a core carries: of Valkey, of a worker, of a gateway",
}
"""The pictures in README.md, with what they show in words."""

Result = dict[str, Any]


def numbers(result: Result) -> str:
    """Return the table of all rows."""
    rows = cast("list[RowJson]", result["rows"])
    return f"{markdown(rows)}\n\nRatios are ours over the rival's, in one run of `make bench`. {note(result)}."


def pictures(result: Result) -> str:
    """Return the pictures that README.md shows; nothing for a run that has not drawn them."""
    if not result.get("costs"):
        return ""
    return "\n\n".join(f"![{what}](bench/results/{name}.png)" for name, what in SHOWN.items())


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
    "pictures": ("README.md", pictures),
    "numbers": ("README.md", numbers),
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
