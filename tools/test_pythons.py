"""Build a wheel with each Python and run the suite on it: ``make test-pythons``.

``python tools/test_pythons.py PYTHON... -- ARGUMENTS OF PYTEST``. A Python is a path or a name, which is looked for on PATH and
among the versions of pyenv and uv. One that is not on this machine is left out, with a line that says so; if none is, that is an
error. For each a copy of the checkout, with the extensions of the wheel, and an environment stay in ``build/pythons``.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build/pythons"
_MADE = (
    *(".git", ".venv", ".*_cache", ".hypothesis", ".coverage*", ".benchmarks"),
    *("build", "dist", "*.egg-info", "*.so", "*.c", "__pycache__"),
)


def version_of(python: Path) -> str | None:
    """The version that *python* says it is; None if it does not run, as a shim of pyenv without its version."""
    call: list[str | Path] = [python, "-c", "import platform; print(platform.python_version())"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def places_of(name: str) -> list[Path]:
    """Where a Python of this name may be, the best first."""
    home = Path.home()
    on_path = shutil.which(name)
    pyenv = Path(os.environ.get("PYENV_ROOT", home / ".pyenv"))
    uv = Path(os.environ.get("UV_PYTHON_INSTALL_DIR", home / ".local/share/uv/python"))
    managed = [*pyenv.glob(f"versions/*/bin/{name}"), *uv.glob(f"*/bin/{name}")]
    return [*([Path(on_path)] if on_path else []), *sorted(managed)]


def find(name: str) -> tuple[Path, str] | None:
    """The Python of this name and its version; None if there is none that runs."""
    for python in places_of(name):
        version = version_of(python)
        if version is not None:
            return python, version
    return None


def suite(python: Path, version: str, arguments: list[str]) -> int:
    """Build, install and test with one Python. Return the exit code of pytest."""
    place = BUILD / version
    source, wheels, venv = place / "src", place / "wheels", place / "venv"
    for old in (source, wheels, venv):
        shutil.rmtree(old, ignore_errors=True)
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*_MADE))
    subprocess.run([python, "-m", "venv", venv], check=True)
    own = venv / "bin/python"
    pip: list[str | Path] = [own, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, source], check=True)
    (wheel,) = wheels.iterdir()
    requirement = f"ff_fast[embedded,cli,test] @ {wheel.as_uri()}"
    subprocess.run([*pip, "install", requirement], check=True)
    subprocess.run([own, ROOT / "tools/check_installed.py"], cwd=place, check=True)
    # What was compiled for the wheel is what the suite runs, beside the sources that its tests read.
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith(".so"):
                archive.extract(name, source)
    call: list[str | Path] = [
        own,
        "-m",
        "pytest",
        "-p",
        "no:benchmark",
        "-n",
        "4",
        "--dist",
        "worksteal",
    ]
    return subprocess.run([*call, *arguments], cwd=source, check=False).returncode


def main(arguments: list[str]) -> int:
    """Return 0 if the suite passes on every Python that is here, and one is."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    names, rest = arguments[:cut], arguments[cut + 1 :]
    results: dict[str, str] = {}
    failed = False
    for name in names:
        found = find(name)
        if found is None:
            results[name] = "is not on this machine"
            continue
        python, version = found
        print(f"=== {name}: {version}, {python}", flush=True)
        code = suite(python, version, rest)
        failed |= code != 0
        results[name] = f"{version}: " + ("passed" if code == 0 else f"failed (pytest: {code})")
    for name, result in results.items():
        print(f"{name} {result}")
    if all(find(name) is None for name in names):
        print(f"none of these Pythons is on this machine: {', '.join(names)}", file=sys.stderr)
        return 1
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
