"""Run the benchmarks: ``python -m bench [--quick] [--only P1a,P5] [--out DIR] [--server PATH]``."""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from bench import pictures
from bench.figures import Report, Row, aligned, note
from bench.harness import ROOT, Stage
from bench.rows import GROUPS, Group

if TYPE_CHECKING:
    from collections.abc import Sequence

RIVALS = ("redis", "hiredis", "coredis", "valkey-glide", "orjson", "sse-starlette", "fastapi")
# What web rows run on.
WEB = ("uvicorn", "starlette", "uvloop", "httptools", "h11")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, write JSON and pictures, print the table."""
    options = parsed(arguments)
    wanted = [group for group in GROUPS if not options.only or options.only & set(group.ids)]
    with Stage(quick=options.quick, executable=options.server) as stage:
        about = circumstances(stage, options)
        report = measure(stage, wanted)
    rows = [row for row in report.rows if not options.only or row.id in options.only]
    result = {
        **about,
        "rows": [row.to_json() for row in rows],
        "figures": {
            name: {quantity: figure.to_json() for quantity, figure in quantities.items()}
            for name, quantities in report.figures.items()
        },
        "series": report.series,
        "costs": report.costs,
    }
    if not options.only:
        result["micro"] = micro(quick=options.quick)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "latest.json"
    path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    made = pictures.draw(report, options.out, note(result))
    print(aligned([row.to_json() for row in rows]))
    print(note(result))
    print("written:", *(shown.relative_to(Path.cwd()) if shown.is_relative_to(Path.cwd()) else shown
                        for shown in (path, *made)))  # fmt: skip
    return 0


class Options(argparse.Namespace):
    """The options of the command line."""

    quick: bool
    only: set[str]
    out: Path
    server: str | None


def parsed(arguments: Sequence[str] | None) -> Options:
    known = [row for group in GROUPS for row in group.ids]
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="everything once and small: does it run?"
    )
    parser.add_argument("--only", default="", help=f"comma-separated rows: {', '.join(known)}")
    parser.add_argument("--out", type=Path, help="folder for latest.json and the pictures")
    parser.add_argument("--server", help="server executable instead of the bundled one")
    options = parser.parse_args(arguments, namespace=Options())
    options.only = {name.strip() for name in str(options.only).split(",") if name.strip()}
    if unknown := options.only - set(known):
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    if options.out is None:
        # bench/results is what the README shows, so only a complete run is written there.
        whole = not options.quick and not options.only
        options.out = ROOT / ("bench/results" if whole else "build/bench")
    return options


def measure(stage: Stage, wanted: Sequence[Group]) -> Report:
    """Run the *wanted* groups and return their results."""
    whole = Report()
    for group in wanted:
        name = ", ".join(group.ids)
        print(f"{name} ...", end=" ", flush=True, file=sys.stderr)
        start = time.monotonic()
        found = group.run(stage)
        print(f"{time.monotonic() - start:.1f} s", file=sys.stderr)
        whole.include(found, name)
    whole.rows.sort(key=order_of)
    return whole


def order_of(row: Row) -> int:
    return [name for group in GROUPS for name in group.ids].index(row.id)


def circumstances(stage: Stage, options: Options) -> dict[str, object]:
    """Return the facts that make figures of two runs comparable: commit, machine, server, versions."""
    server = stage.wire.info("server")
    name = "valkey" if "valkey_version" in server else "redis"
    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "quick": options.quick,
        "only": sorted(options.only),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "server": f"{name} {server[f'{name}_version']}",
        "allocator": stage.wire.info("memory")["mem_allocator"],
        "transport": "unix socket",
        "versions": {
            "ff_fast": importlib.import_module("ff_fast").__version__,
            **{rival: importlib.metadata.version(rival) for rival in (*RIVALS, *WEB)},
        },
    }


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=30
    )
    return done.stdout.strip()


def cpu_model() -> str:
    """Return the name of the processor, or an empty text if the system does not tell it."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def micro(*, quick: bool) -> dict[str, dict[str, float]]:
    """Run the micro-benchmarks and return their figures in ns. A quick run has none: it calls each once."""
    command = [sys.executable, "-m", "pytest", "bench/micro", "-q", "-p", "no:cacheprovider"]
    if quick:
        subprocess.run([*command, "--benchmark-disable"], cwd=ROOT, check=True, timeout=120)
        return {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "micro.json")
        options = [
            "--benchmark-only",
            f"--benchmark-json={path}",
            "--benchmark-columns=min,median,max",
        ]
        subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=300)
        measured = json.loads(path.read_text("utf-8"))["benchmarks"]
    return {
        case["name"]: {share: case["stats"][share] * 1e9 for share in ("min", "median", "max")}
        for case in measured
    }


if __name__ == "__main__":
    sys.exit(main())
