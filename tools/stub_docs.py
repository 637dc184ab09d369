"""Copy the docstrings of the compiled modules into their stubs, where editors and the API reference read them.

``python -m tools.stub_docs --write``; without it, nothing is written, and the exit code is 1 where a stub says something else.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import sys
from pathlib import Path
from textwrap import indent

HOT = Path(__file__).parent.parent / "ff_fast/_hot"


def _runtime(owner: object, name: str) -> tuple[object, str]:
    """What a name stands for in a compiled module or class, and its docstring."""
    found = inspect.getattr_static(owner, name, None)
    # None is a name that the module lacks, and has a docstring of its own from Python 3.13 on.
    doc = None if found is None else getattr(found, "__doc__", None)
    return found, inspect.cleandoc(doc or "")


def _quoted(doc: str, column: int) -> list[str]:
    doc = doc.replace("\\", r"\\")
    text = f'"""{doc}"""' if "\n" not in doc else f'"""{doc}\n"""'
    return indent(text, " " * column).splitlines()


def documented(source: str, module: object) -> str:
    """Return a stub in which every public name has the docstring that it has in the compiled *module*."""
    lines = source.splitlines()
    edits: list[tuple[ast.ClassDef | ast.FunctionDef, str]] = []

    def look(body: list[ast.stmt], owner: object) -> None:
        for node in body:
            if not isinstance(node, (ast.ClassDef, ast.FunctionDef)) or node.name.startswith("_"):
                continue
            if any(isinstance(mark, ast.Attribute) for mark in getattr(node, "decorator_list", [])):
                continue  # the setter of a property has none
            found, doc = _runtime(owner, node.name)
            if doc and ast.get_docstring(node) != doc:
                edits.append((node, doc))
            if isinstance(node, ast.ClassDef):
                look(node.body, found)

    look(ast.parse(source).body, module)
    for node, doc in sorted(edits, key=lambda edit: -edit[0].lineno):
        first = node.body[0]
        column = node.col_offset + 4
        assert first.end_lineno is not None
        is_text = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
        if is_text and ast.get_docstring(node) is not None:
            lines[first.lineno - 1 : first.end_lineno] = _quoted(doc, column)
        elif is_text:  # an ellipsis, often behind the colon
            head = lines[first.lineno - 1][: first.col_offset].rstrip()
            lines[first.lineno - 1 : first.end_lineno] = [
                *([head] if head else []),
                *_quoted(doc, column),
            ]
        else:
            at = min(
                [first.lineno, *(mark.lineno for mark in getattr(first, "decorator_list", []))]
            )
            lines[at - 1 : at - 1] = [*_quoted(doc, column), ""]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write the stubs, or say which differ."""
    differ = []
    for path in sorted(HOT.glob("*.pyi")):
        source = path.read_text("utf-8")
        text = documented(source, importlib.import_module(f"ff_fast._hot.{path.stem}"))
        if text != source:
            differ.append(path)
            if "--write" in sys.argv[1:]:
                path.write_text(text, "utf-8")
    print(*differ, sep="\n", end="\n" if differ else "")
    return int(bool(differ) and "--write" not in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
