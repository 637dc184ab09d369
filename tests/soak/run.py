"""One soak from its first process to its report."""

import asyncio
import contextlib
import gc
import os
import random
import tempfile
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import redis

from ff_fast import aio
from ff_fast.errors import FFError

from ..waiting import wait_until_async
from . import check, faults, plan
from .account import Account
from .load import Load
from .site import Site, size_of

WARM_S = 1.5
"""Load without faults, before the sizes are taken that the last ones are compared with."""

HEALED_S = 60.0
"""Longest time, in seconds, from the last fault until every execution has ended."""

SETTLED_S = 2.0
"""An ended execution is looked at so long after its end, when no call about it is on its way."""


KEPT_S = 2 * 86_400.0
"""Seconds by which the clock is stepped before sizes are compared, beyond the retention of executions."""


class Settings(NamedTuple):
    """What one soak is.

    Attributes:
        seconds: How long faults are injected.
        seed: Of everything that is drawn.
        kinds: Kinds of faults; None for all.
        every: Seconds between two faults on average.
        retention: Seconds that an ended execution is kept.
        workers: Number of worker processes, at least three; the first of each shell is never killed.
        sizes: Whether to let everything expire and compare sizes.
    """

    seconds: float = 3600.0
    seed: int = 0
    kinds: tuple[str, ...] | None = None
    every: float = 0.7
    retention: float = 180.0
    workers: int = 4
    sizes: bool = True


class Report(NamedTuple):
    """What a soak found."""

    settings: Settings
    account: Account
    folder: Path

    def text(self):
        account = self.account
        lines = ["", f"{'times':>7}  fault"]
        lines += [f"{count:7}  {kind}" for kind, count in sorted(account.injected.items())]
        lines += ["", f"{'times':>7}  what was said"]
        lines += [f"{count:7}  {what}" for what, count in sorted(account.counts.items())]
        lines += [
            "",
            f"{len(account.executions)} executions, seed {self.settings.seed}, {self.folder}",
        ]
        lines += [f"VIOLATION {text}" for text in account.violations[:50]]
        lines += [f"{len(account.violations)} violations"]
        return "\n".join(lines)


def run(settings, say=lambda text: None):
    """Run one soak; return its report."""
    folder = Path(tempfile.mkdtemp(prefix="ff_fast-soak-"))
    account = Account(folder)
    account.event(f"{settings}")
    say(f"seed {settings.seed}, {settings.seconds:g} s; event log: {folder}/events.log")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", RuntimeWarning)
            warnings.showwarning = lambda warning, *_: account.warned("this process", warning)
            asyncio.run(_Soak(settings, account, say).run())
    finally:
        account.close()
    return Report(settings, account, folder)


class _Soak:
    def __init__(self, settings, account, say):
        self.settings = settings
        self.account = account
        self.say = say

    async def run(self):
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(100, "soak"))
        loop.set_exception_handler(
            lambda _, context: self.account.violation(f"the loop: {context}")
        )
        self.site = site = Site(self.account.folder, self.account, workers=self.settings.workers)
        try:
            # Past every proxy: what it sees is what is stored.
            async with aio.ValkeyBackend.connect(site.server.url) as self.looking:
                await self._soak(site)
        finally:
            site.close()

    async def _soak(self, site):
        settings, account = self.settings, self.account
        own = _own_size()
        load = Load(site, account, settings.seed, settings.retention)
        await load.start()
        await wait_until_async(self._processes_work, 60)
        await asyncio.sleep(min(WARM_S, settings.seconds))
        before = self._sizes(site)
        account.event(f"sizes {before}")
        verifying = asyncio.create_task(self._verify_ended())
        await self._inject(site)
        site.heal()
        account.event("healed")
        self.say("healed")
        load.stopping = True
        await self._drain(load)
        account.event("drained")
        verifying.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await verifying
        for known in list(account.executions.values()):
            if not known.verified:
                await self._verify(known)
        for text in (*check.completions(account), *check.indexes(site)):
            account.violation(text)
        if settings.sizes:
            await self._compare(site, before)
        await load.stop()
        account.event("stopped")
        await site.stop_processes()
        account.read_files()
        gc.collect()
        for text in check.sizes("this process", own, _own_size(), {"descriptors": 8, "tasks": 2}):
            account.violation(text)

    async def _processes_work(self):
        return self.account.began == {process.name for process in self.site.processes}

    # -- faults -------------------------------------------------------------------------------------------------

    async def _inject(self, site):
        settings = self.settings
        weights = {
            name: fault.weight
            for name, fault in faults.FAULTS.items()
            if settings.kinds is None or name in settings.kinds
        }
        began = time.monotonic()
        running = []
        for planned in plan.schedule(settings.seed, settings.seconds, weights, settings.every):
            await asyncio.sleep(max(0.0, began + planned.at - time.monotonic()))
            dice = random.Random(planned.seed)
            running.append(asyncio.create_task(faults.inject(site, planned.kind, dice)))
            self._collect(running)
        done, late = await asyncio.wait(running, timeout=60) if running else ((), ())
        self._collect(list(done))
        for task in late:
            self.account.violation(f"a fault does not end: {task}")
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)

    def _collect(self, running):
        for task in [task for task in running if task.done()]:
            running.remove(task)
            if task.exception() is not None:
                self.account.violation(f"injecting failed: {task.exception()!r}")

    # -- what is stored -------------------------------------------------------------------------------------------

    async def _verify(self, known):
        wrong = await check.execution(self.site, self.looking, self.account, known)
        known.verified = True
        for text in wrong:
            self.account.violation(f"{known.eid}: {text}")
        known.reads.clear()
        known.said.clear()

    async def _verify_ended(self):
        """Verify executions soon after their end, since they are kept for a while only."""
        ended_at = {}
        while True:
            await asyncio.sleep(0.5)
            now = time.monotonic()
            for known in list(self.account.executions.values()):
                if known.verified or not known.told:
                    continue
                since = ended_at.setdefault(known.eid, now)
                if now - since > SETTLED_S and not known.busy:
                    # A fault may be in the way; then it is looked at again.
                    with contextlib.suppress(FFError, redis.RedisError):
                        await self._verify(known)
                        del ended_at[known.eid]

    async def _drain(self, load):
        """Let everything end that is there."""
        load.draining = True
        until = time.monotonic() + HEALED_S
        while left := await check.ended(self.looking, self.account):
            if time.monotonic() > until:
                for known, state in left:
                    known.verified = True
                    self.account.violation(
                        f"{known.eid} has not ended {HEALED_S:g} s after the last fault: {state}"
                    )
                return
            await asyncio.sleep(0.2)
        # Readers come to their end, and subscribers take what has been told by then.
        with contextlib.suppress(AssertionError):
            await wait_until_async(self._is_quiet, max(1.0, until - time.monotonic()))

    async def _is_quiet(self):
        if any(known.busy for known in self.account.executions.values()):
            return False
        return not any(check.completions(self.account))

    # -- sizes ----------------------------------------------------------------------------------------------------

    def _sizes(self, site):
        veterans = {process.name: size_of(process.pid) for process in site.of("worker")[:2]}
        return {"server": site.size_of_server(), **veterans}

    async def _compare(self, site, before):
        slack = {"descriptors": 12, "threads": 6, "MiB": 60}
        slacks = {"server": {"keys": 400, "clients": 30, "MiB": 20}}
        # What is kept for a while has been kept for long enough.
        site.server.step_clock(self.settings.retention + KEPT_S)
        until = time.monotonic() + 30
        wrong = True
        while wrong and time.monotonic() < until:
            await asyncio.sleep(1)
            after = self._sizes(site)
            wrong = [
                text
                for name, size in after.items()
                for text in check.sizes(name, before[name], size, slacks.get(name, slack))
            ]
        for text in wrong:
            self.account.violation(text)
        self.account.event(f"sizes before {before}, after {after}")


def _own_size():
    return {"descriptors": size_of(os.getpid())["descriptors"], "tasks": len(asyncio.all_tasks())}
