"""Draw the states of an execution from the table in ``lua/state.lua``.

``python tools/draw_states.py`` prints the block of ``CONTRIBUTING.md``; with ``--write`` it writes the block there.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).parent.parent
STATES = ROOT / "lua" / "state.lua"
GUIDE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- states:begin -->", "<!-- states:end -->"

FIRST = ("waiting", "delayed")
"""The states that `ff_create_execution` gives to a new execution."""

_TABLE = re.compile(r"^ff\.TRANSITIONS = \{\n(.*?)^\}", re.MULTILINE | re.DOTALL)
_ROW = re.compile(r"^  (\w+) = \{([^{}]*)\},$", re.MULTILINE)
_TARGET = re.compile(r"(\w+) = true")


def transitions(lua: str) -> dict[str, tuple[str, ...]]:
    """Return ``ff.TRANSITIONS``: each state with the states that may follow it, in the order of the table.

    Raises:
        ValueError: The table is missing or has another form.
    """
    table = _TABLE.search(lua)
    if table is None:
        raise ValueError("there is no table ff.TRANSITIONS")
    rows = {state: tuple(_TARGET.findall(targets)) for state, targets in _ROW.findall(table[1])}
    left = re.sub(r"[\s,]", "", _TARGET.sub("", _ROW.sub(r"\2", table[1])))
    if left:
        raise ValueError(f"ff.TRANSITIONS has {left[:40]!r}, which is no row of this form")
    if unknown := {target for targets in rows.values() for target in targets} - rows.keys():
        raise ValueError(f"ff.TRANSITIONS has no row for {', '.join(sorted(unknown))}")
    return rows


def drawn(rows: dict[str, tuple[str, ...]]) -> str:
    """Return the diagram and the table of *rows*, between their markers."""
    arrows = [f"    [*] --> {state}" for state in FIRST]
    for state, targets in rows.items():
        arrows += [f"    {state} --> {target}" for target in targets or ("[*]",)]
    lines = [
        f"| `{state}` | {', '.join(f'`{target}`' for target in targets) or 'nothing: an end'} |"
        for state, targets in rows.items()
    ]
    return "\n".join(
        [
            BEGIN,
            "```mermaid",
            "stateDiagram-v2",
            *arrows,
            "```",
            "",
            "| from | to |",
            "|---|---|",
            *lines,
            END,
        ]
    )


def replaced(guide: str, block: str) -> str:
    """Return *guide* with its block replaced by *block*.

    Raises:
        ValueError: A marker is missing or repeated, or the two are in the wrong order.
    """
    if guide.count(BEGIN) != 1 or guide.count(END) != 1 or guide.index(BEGIN) > guide.index(END):
        raise ValueError(f"there must be {BEGIN} and {END}, once each, in this order")
    return guide.partition(BEGIN)[0] + block + guide.partition(END)[2]


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the block, or write it into the guide."""
    parser = argparse.ArgumentParser(description="Draw the states of an execution.")
    parser.add_argument("--write", action="store_true", help="into CONTRIBUTING.md")
    block = drawn(transitions(STATES.read_text("utf-8")))
    if parser.parse_args(arguments).write:
        GUIDE.write_text(replaced(GUIDE.read_text("utf-8"), block), "utf-8")
    else:
        print(block)
    return 0


if __name__ == "__main__":
    sys.exit(main())
