"""Write the public names of ff_fast as stubs, with signatures and docstrings as they are at run time.

The site's API reference is made of them: ``python -m tools.api_stubs build/docs/api``. What reads sources alone sees neither the
methods that both shells bind to the operations of the core, nor what compiled classes have.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import sys
from enum import Enum
from functools import cache
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, TypeVar, get_args, get_origin

import ff_fast
from ff_fast import aio

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parent.parent
PLAIN = ("embedded", "errors", "keys", "metrics", "tracing")
"""Modules whose sources say everything."""

_ROLE = re.compile(r":(?:class|func|meth|attr|data|mod|exc):`~?([^`]+)`")


# An interactive session, to the empty line behind it.
_SESSION = re.compile(r"^([ \t]*)>>> .*\n(?:\1(?!\"\"\")\S.*(?:\n|\Z))*", re.MULTILINE)


def markdown(doc: str) -> str:
    """Return a docstring whose marks of reStructuredText are Markdown."""
    doc = _ROLE.sub(r"`\1`", doc)
    doc = _SESSION.sub(r"\1```pycon\n\g<0>\1```\n", doc)
    doc = re.sub(r"^[ \t]*::\n", "", doc, flags=re.MULTILINE)
    return re.sub(r"::$", ":", doc, flags=re.MULTILINE)


@cache
def _compiled(module: str) -> dict[str, ast.FunctionDef]:
    """The functions of a compiled module's stub, by qualified name."""
    path = ROOT / (module.replace(".", "/") + ".pyi")
    found: dict[str, ast.FunctionDef] = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            for inner in node.body:
                if isinstance(inner, ast.FunctionDef):
                    found[f"{node.name}.{inner.name}"] = inner
    return found


def _of_compiled(name: str, signature: inspect.Signature) -> ast.FunctionDef | None:
    """The stub of the compiled function that another class has as its own, without annotations; None if it is none."""
    if any(each.annotation is not each.empty for each in signature.parameters.values()):
        return None
    node = _compiled("ff_fast._hot.writer").get(f"WriterCore.{name}")
    if node is None:
        return None
    names = [each.arg for each in (*node.args.args, *node.args.kwonlyargs)]
    return node if names == list(signature.parameters) else None


def _quoted(text: str) -> str:
    return '"""' + text.replace("\\", "\\\\").replace('"""', r"\"\"\"") + '\n"""'


def _doc_of(thing: object) -> str:
    return markdown(inspect.cleandoc(thing.__doc__ or ""))


def _signature(function: object, owner: type, name: str) -> tuple[str, str]:
    """Parameters and the annotation of the value."""
    home = getattr(function, "__module__", None) or owner.__module__
    if home.startswith("ff_fast._hot"):
        qualified = getattr(function, "__qualname__", f"{owner.__name__}.{name}")
        node = _compiled(home).get(qualified)
        if node is not None:
            returns = "" if node.returns is None else ast.unparse(node.returns)
            return f"({ast.unparse(node.args)})", returns
    signature = inspect.signature(function)  # type: ignore[arg-type]
    if name == "__init__":
        known = {
            key: value
            for base in reversed(owner.__mro__)
            for key, value in vars(base).get("__annotations__", {}).items()
        }
        signature = signature.replace(
            parameters=[
                each.replace(annotation=known.get(key, each.annotation))
                for key, each in signature.parameters.items()
            ]
        )
    elif (node := _of_compiled(name, signature)) is not None:
        return f"({ast.unparse(node.args)})", "" if node.returns is None else ast.unparse(
            node.returns
        )
    returned = signature.return_annotation
    text = str(signature.replace(return_annotation=signature.empty))
    # Annotations are text already, which is shown in quotes; values that no source has are left out.
    text = re.sub(r": '([^']*)'", r": \1", text).replace("(self, /)", "(self)")
    text = re.sub(r"\(self, /, ", "(self, ", text)
    text = re.sub(r"<([\w.]+)[^>]*>", "...", text)
    returns = "" if "_empty" in str(returned) else str(returned).strip("'")
    return text, returns.replace("typing.", "")


def _without(doc: str, parameters: str) -> str:
    """Leave out what a docstring says of arguments that are bound: a task's methods have those of the operations."""
    before, heading, rest = doc.partition("\nArgs:\n")
    if not heading:
        return doc
    entries, blank, after = rest.partition("\n\n")
    kept = [
        entry
        for entry in re.split(r"\n(?=    \S)", entries)
        if (named := re.match(r" +\**(\w+)", entry)) and re.search(rf"\b{named[1]}\b", parameters)
    ]
    arguments = heading + "\n".join(kept) if kept else ""
    return (before + arguments + blank + after).rstrip()


def _function(function: object, owner: type, name: str, doc: str, *marks: str) -> str:
    parameters, returns = _signature(function, owner, name)
    doc = _without(doc, parameters)
    head = "".join(f"@{mark}\n" for mark in marks)
    arrow = f" -> {returns}" if returns else ""
    word = "async def" if inspect.iscoroutinefunction(function) else "def"
    body = indent(_quoted(doc), "    ") + "\n" if doc else ""
    return f"{head}{word} {name}{parameters}{arrow}:\n{body}    ...\n"


def _members(cls: type) -> Iterator[tuple[str, type, object]]:
    seen = set()
    for owner in cls.__mro__:
        if not owner.__module__.startswith("ff_fast"):
            continue
        for name, value in vars(owner).items():
            if not name.startswith("_") and name not in seen:
                seen.add(name)
                yield name, owner, value


def _member(name: str, owner: type, value: object) -> str:
    """One member of a class; nothing for data that its class describes."""
    if isinstance(value, (classmethod, staticmethod)):
        mark = type(value).__name__
        return _function(value.__func__, owner, name, _doc_of(value), mark)
    if isinstance(value, property):
        doc = _doc_of(value)
        return _function(value.fget, owner, name, doc, "property") if doc else ""
    if owner.__module__.startswith("ff_fast._hot"):
        node = _compiled(owner.__module__).get(f"{owner.__name__}.{name}")
        if node is None:
            return ""
        doc = markdown(ast.get_docstring(node) or _doc_of(value))
        marks = [ast.unparse(mark) for mark in node.decorator_list]
        return _function(value, owner, name, doc, *marks) if doc else ""
    if callable(value) and not isinstance(value, type):
        return _function(value, owner, name, _doc_of(value))
    return ""


def _variables(cls: type) -> dict[str, str]:
    """What the type variables of the bases stand for in a class."""
    meanings = [
        pair
        for owner in cls.__mro__
        for base in vars(owner).get("__orig_bases__", ())
        for pair in zip(
            getattr(get_origin(base), "__parameters__", ()), get_args(base), strict=False
        )
    ]
    found = {
        variable.__name__: getattr(meant, "__name__", None)
        or str(getattr(meant, "__forward_arg__", meant))
        for variable, meant in meanings
        if not isinstance(meant, TypeVar)
    }
    # Those of a base that is generic over a variable of another name.
    for variable, meant in meanings:
        if isinstance(meant, TypeVar) and meant.__name__ in found:
            found[variable.__name__] = found[meant.__name__]
    return found


def class_stub(cls: type, name: str) -> str:
    """Return the stub of a class with all public members, its own and those of its bases."""
    body = [_quoted(_doc_of(cls))]
    described = "Args:" in (cls.__doc__ or "")
    if described or (
        cls.__module__.startswith("ff_fast.types") and not issubclass(cls, (BaseException, Enum))
    ):
        parameters, _ = _signature(cls, cls, "__init__")
        parameters = parameters.replace("(", "(self, ", 1).replace("(self, )", "(self)")
        body.append(f"def __init__{parameters}:\n    ...\n")
    body += [_member(member, owner, value) for member, owner, value in _members(cls)]
    text = "\n".join(filter(None, body))
    for variable, meant in _variables(cls).items():
        text = re.sub(rf"(?<=[ \[]){variable}(?=[\] :\n])", meant, text)
    return f"class {name}:\n" + indent(text, "    ") + "\n"


def stub_of(module: ModuleType) -> str:
    """Return the stub of a module: its public classes and functions."""
    parts = ["from __future__ import annotations\n", _quoted(_doc_of(module))]
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isclass(value):
            parts.append(class_stub(value, name))
        elif inspect.isroutine(value):
            parts.append(_function(value, object, name, _doc_of(value)))
    return "\n\n".join(parts) + "\n"


def copied(source: Path, target: Path) -> None:
    """Copy a module, its docstrings as Markdown."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(markdown(source.read_text("utf-8")), "utf-8")


def write(folder: Path) -> None:
    """Write the stubs into a folder."""
    package = folder / "ff_fast"
    package.mkdir(parents=True, exist_ok=True)
    for module, path in ((ff_fast, "__init__.pyi"), (aio, "aio.pyi")):
        text = stub_of(module)
        ast.parse(text)
        (package / path).write_text(text, "utf-8")
    for name in PLAIN:
        copied(ROOT / f"ff_fast/{name}.py", package / f"{name}.py")
    for part in ("web", "adapters"):
        for source in sorted((ROOT / "ff_fast" / part).glob("*.py")):
            copied(source, package / part / source.name)


def main() -> int:
    """Write the stubs into the folder that is named."""
    (folder,) = sys.argv[1:]
    importlib.invalidate_caches()
    write(Path(folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
