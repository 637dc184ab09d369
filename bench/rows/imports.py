"""P12: the time of `import ff_fast`."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

from bench.figures import Figure, Report, Row, Target
from bench.harness import ROOT, Metrics, Stage, clean_environment, take_turns

if TYPE_CHECKING:
    from collections.abc import Callable

# `import ff_fast` must load none of these numeric, web and client libraries.
HEAVY = ("numpy", "starlette", "uvicorn", "pydantic", "rich", "coredis", "glide")
PROGRAM = """
import json, sys, time
start = time.perf_counter()
__import__(sys.argv[1])
ms = (time.perf_counter() - start) * 1000
print(json.dumps([ms, sorted(sys.modules.keys() & set(sys.argv[2:]))]))
"""


def imported(module: str) -> tuple[float, list[str]]:
    """Import *module* in a fresh interpreter; return the milliseconds and the heavy modules that it loaded."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, module, *HEAVY],
        capture_output=True, text=True, check=True, cwd=ROOT, env=clean_environment(), timeout=60,
    )  # fmt: skip
    ms, heavy = json.loads(done.stdout)
    return ms, heavy


def run(stage: Stage) -> Report:
    """P12."""
    # The first import compiles bytecode; it falls into the discarded round.
    found: dict[str, list[str]] = {}

    def timed(module: str) -> Callable[[], Metrics]:
        def turn() -> Metrics:
            ms, found[module] = imported(module)
            return {"ms": ms}

        return turn

    modules = ("ff_fast", "ff_fast.aio", "redis", "redis.asyncio", "coredis", "glide")
    report = Report(figures=take_turns({name: timed(name) for name in modules}, stage.pick(20, 1)))
    heavy = found["ff_fast"] + found["ff_fast.aio"]
    report.rows = [
        Row(
            "P12", "import ff_fast", "ms", report.figure("ff_fast", "ms"),
            "import redis", report.figure("redis", "ms"), Target(60),
        ),
        Row(
            "P12", "import ff_fast.aio", "ms", report.figure("ff_fast.aio", "ms"),
            "import redis.asyncio", report.figure("redis.asyncio", "ms"),
        ),
        Row(
            "P12", "numeric, web and client stacks that come with it", "",
            Figure.of([len(heavy)]), target=Target(0),
        ),
    ]  # fmt: skip
    return report
