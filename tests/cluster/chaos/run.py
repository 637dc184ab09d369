"""One run: servers, load, faults, and what is found at the end."""

import asyncio
import contextlib
import gc
import random
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from ...waiting import wait_until, wait_until_async
from . import check, held
from .held import Held
from .load import Load
from .scenarios import SCENARIOS, Pace

HEALED_S = 60.0
"""Longest time, in seconds, from the last fault until every execution has ended."""


class Settings(NamedTuple):
    """What one run is.

    Attributes:
        scenario: Name in `SCENARIOS`.
        shell: The shell of its clients.
        seconds: How long faults are injected.
        streams: Executions that are worked on at a time.
        length: Frames of each.
        rate: Frames a second of each.
        seed: Of everything that is drawn.
        every: Seconds between two faults; None takes that of the scenario.
    """

    scenario: str
    shell: str
    seconds: float = 60.0
    streams: int = 200
    length: int = 100
    rate: float = 20.0
    seed: int = 0
    every: float | None = None


class Report:
    """What a run found."""

    def __init__(self, settings, say):
        self.settings = settings
        self.violations = []
        self.faults = 0
        self.counts = {}
        self.executions = 0
        self.slowest = 0.0
        # What of the library there was under load, and how much more memory the process has at the end.
        self.held = {}
        self.grown = 0
        self._say = say
        self._began = time.monotonic()

    def violation(self, text):
        self.violations.append(text)
        self._say(f"{time.monotonic() - self._began:8.3f} VIOLATION {text}")

    def fault(self, text):
        self.faults += 1
        self._say(f"{time.monotonic() - self._began:8.3f} {text}")

    def text(self):
        lines = [f"{count:7}  {what}" for what, count in sorted(self.counts.items())]
        lines.append(
            f"{self.settings.scenario}, {self.settings.shell}: {self.faults} faults, {self.executions} executions, "
            f"slowest call {self.slowest:.1f} s, {self.grown >> 20} MiB more, seed {self.settings.seed}"
        )
        lines += [f"VIOLATION {text}" for text in self.violations[:30]]
        return "\n".join([*lines, f"{len(self.violations)} violations"])


def run(settings, say=lambda text: None):
    """Run a scenario; return its report."""
    report = Report(settings, say)
    scenario = SCENARIOS[settings.scenario]
    threads = set(threading.enumerate())
    site = scenario.site()
    try:
        asyncio.run(_run(settings, scenario, site, report))
    finally:
        site.close()
    gc.collect()

    def left():
        return {each.name for each in threading.enumerate()} - {each.name for each in threads}

    try:
        # One that was told to end may not have had its turn.
        wait_until(lambda: not left())
    except AssertionError:
        report.violation(f"threads are left: {sorted(left())}")
    return report


async def _run(settings, scenario, site, report):
    loop = asyncio.get_running_loop()
    loop.set_default_executor(ThreadPoolExecutor(settings.streams * 3 + 50, "chaos"))
    loop.set_exception_handler(lambda _, context: report.violation(_told_by_the_loop(context)))
    before, empty = _descriptors(), Held()
    await _break(settings, scenario, site, report, empty)
    if left := asyncio.all_tasks() - {asyncio.current_task()}:
        report.violation(f"tasks are left: {left}")
    await loop.shutdown_default_executor()
    # What a backend keeps for its threads goes with it.
    gc.collect()
    try:
        wait_until(lambda: _descriptors() <= before, 10)
    except AssertionError:
        report.violation(f"{_descriptors() - before} descriptors are left")
    now = Held()
    report.grown = now.memory - empty.memory
    for text in held.after_everything(empty, now):
        report.violation(text)


def _told_by_the_loop(context):
    error = context.get("exception")
    return f"the loop: {context} {''.join(traceback.format_exception(error)) if error else ''}"


async def _break(settings, scenario, site, report, empty):
    """Break the servers under load, then look at what is there; nothing was held when it was *empty*."""
    load = Load(
        settings.shell, site,
        streams=settings.streams, length=settings.length, rate=settings.rate, seed=settings.seed,
        report=report.violation,
    )  # fmt: skip
    await load.start()

    async def writing():
        return sum(len(known.attempts) for known in load.executions.values()) >= settings.streams

    await wait_until_async(writing, 60)
    report.held = Held().counts
    pace = Pace(settings.seconds, settings.every or scenario.every)
    await scenario.run(site, random.Random(settings.seed), pace, report.fault)
    await asyncio.to_thread(site.heal)
    report.fault("healed")
    for known in await load.drain(HEALED_S):
        report.violation(f"{known.eid} has not ended {HEALED_S:g} s after the last fault")
    for known in load.executions.values():
        for text in await check.execution(load, known, lossy=scenario.lossy):
            report.violation(f"{known.eid}: {text}")
    await _told(load)
    for text in check.completions(load, lossy=scenario.lossy):
        report.violation(text)
    load.forget_frames()
    for text in await _let_go(empty):
        report.violation(text)
    await load.stop()
    report.counts = load.counts
    report.executions = len(load.executions)
    report.slowest = load.slowest


async def _told(load):
    """Wait for a moment until the subscriber was told of every end."""

    async def all_told():
        return not any(check.completions(load, lossy=True))

    try:
        await wait_until_async(all_told, 10)
    except AssertionError:
        return


async def _let_go(empty):
    """Wait until nothing is held of streams that have ended; return what still is."""
    left = []

    async def gone():
        left[:] = held.after_the_streams(empty, Held())
        return not left

    try:
        await wait_until_async(gone, 10)
    except AssertionError:
        return left
    return []


def _descriptors():
    count = 0
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            count += str(each.readlink()).startswith("socket:")
    return count
