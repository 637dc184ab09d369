"""The blocks of code in README.md and docs/, as programs that tests run, and type checkers read, where they stand."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent

# A comment that begins with "python" stands in front of a block and is a part of it. It gives the block the name by which a
# test runs it, and declares what the prose has already introduced; no reader of the page sees it.
BLOCK = re.compile(
    r"^(?:<!-- (?P<kind>python)(?: (?P<name>[\w-]+))?\n(?P<hidden>.*?)^-->\n+)?"
    r"```(?P<language>python|html|js|ts)\n(?P<shown>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)

URL = "valkey://localhost:6379"
"""The server of the examples: a test puts its own in this place."""


@dataclass(frozen=True)
class Block:
    """A block of code. `source` has every line at the number that it has in the document."""

    document: str
    line: int
    language: str
    name: str | None
    shown: str
    source: str


def documents() -> list[Path]:
    """README.md, and every page of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks_of(text: str, document: str) -> list[Block]:
    found = []
    for block in BLOCK.finditer(text):
        lines = [""] * text.count("\n", 0, block.end())
        for part in ("hidden", "shown"):
            if block[part] is not None:
                first = text.count("\n", 0, block.start(part))
                code = block[part].splitlines()
                lines[first : first + len(code)] = code
        line = text.count("\n", 0, block.start("shown")) + 1
        source = "\n".join(lines) + "\n"
        found.append(
            Block(document, line, block["language"], block["name"], block["shown"], source)
        )
    return found


def blocks(*languages: str) -> list[Block]:
    """Every block of these languages, document after document."""
    return [
        block
        for path in documents()
        for block in blocks_of(path.read_text("utf-8"), path.relative_to(ROOT).as_posix())
        if block.language in languages
    ]


def program(name: str) -> Block:
    """The Python block of this name."""
    (found,) = (block for block in blocks("python") if block.name == name)
    return found


def run(name: str, url: str = URL, **names: object) -> dict[str, object]:
    """Run the block of this name, with the server at *url*; return its names, *names* among them."""
    block = program(name)
    code = compile(block.source.replace(URL, url), str(ROOT / block.document), "exec")
    names = {"__name__": "__main__", **names}
    exec(code, names)
    return names
