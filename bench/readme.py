"""Put the table of the last complete run into README.md: ``python -m bench.readme``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import cast

from bench.figures import RowJson, markdown, note

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results" / "latest.json"
BEGIN, END = "<!-- numbers:begin -->", "<!-- numbers:end -->"


def numbers(result: dict[str, object]) -> str:
    """Return the text between the two markers."""
    rows = cast("list[RowJson]", result["rows"])
    return f"{markdown(rows)}\n\nRatios are ours over the rival's, in one run of `make bench`. {note(result)}."


def replaced(readme: str, text: str) -> str:
    """Return *readme* with *text* between its markers.

    Raises:
        ValueError: A marker is missing or repeated, or the two are in the wrong order.
    """
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(f"README.md must have {BEGIN} and {END}, once each, in this order")
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    """Rewrite README.md."""
    result = json.loads(RESULTS.read_text("utf-8"))
    if result["quick"] or result["only"]:
        print("The last run was not a complete one: run `make bench`.", file=sys.stderr)
        return 1
    readme = ROOT / "README.md"
    readme.write_text(replaced(readme.read_text("utf-8"), numbers(result)), "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
