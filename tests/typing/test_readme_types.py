"""The examples of README.md pass mypy --strict as a user's programs would."""

import os
import re
import subprocess
import sys

import pytest

from ..conftest import ROOT

README = ROOT / "README.md"

# A comment that begins with "python" stands in front of a block and is checked with it. It imports and declares
# what the prose has already introduced, and no reader of the page sees it.
BLOCK = re.compile(
    r"^(?:<!-- python\n(?P<hidden>.*?)^-->\n+)?```python\n(?P<shown>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


def programs(text: str) -> list[str]:
    """Each block with its hidden part, every line at the number that it has in *text*."""
    found = []
    for block in BLOCK.finditer(text):
        lines = [""] * text.count("\n", 0, block.end())
        for part in ("hidden", "shown"):
            if block[part] is not None:
                first = text.count("\n", 0, block.start(part))
                code = block[part].splitlines()
                lines[first : first + len(code)] = code
        found.append("\n".join(lines) + "\n")
    return found


def complaints(folder, *sources: str) -> list[str]:
    """The lines that mypy prints for *sources*, with README.md as the name of every file."""
    pytest.importorskip("mypy", reason="mypy is not installed: it comes with the extra lint")
    for number, source in enumerate(sources, start=1):
        (folder / f"readme_{number}.py").write_text(source, "utf-8")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    # A cache of its own: mypy may run elsewhere in this checkout meanwhile.
    options = [
        "--cache-dir",
        str(folder / "cache"),
        "--strict",
        "--no-error-summary",
        "--no-pretty",
        "--hide-error-context",
    ]
    done = subprocess.run(
        [*command, *options, *(str(path) for path in sorted(folder.glob("readme_*.py")))],
        cwd=ROOT,
        env={**os.environ, "MYPY_FORCE_COLOR": "0"},
        capture_output=True,
        text=True,
        check=False,
        timeout=55,
    )
    assert done.returncode in (0, 1), f"mypy failed\n{done.stdout}{done.stderr}"
    return [re.sub(r"^.*readme_\d+\.py:", "README.md:", line) for line in done.stdout.splitlines()]


def test_the_examples_type_check(tmp_path):
    found = complaints(tmp_path, *programs(README.read_text("utf-8")))
    assert not found, "mypy --strict on the examples:\n" + "\n".join(found)


def test_a_wrong_example_is_reported_at_its_line(tmp_path):
    text = "# Title\n\n```python\nx: int = 1\n```\n\n<!-- python\nname = 2\n-->\n\n```python\ny: str = name\n```\n"
    (line,) = complaints(tmp_path, *programs(text))
    assert line.startswith(
        'README.md:12: error: Incompatible types in assignment (expression has type "int"'
    )


def test_every_block_is_checked():
    assert len(programs(README.read_text("utf-8"))) == README.read_text("utf-8").count(
        "\n```python\n"
    )
