"""The kinds of faults: each is a coroutine that injects one and heals it.

``FAULTS`` is the table. Its weights say how often a kind is drawn. A fault holds the turns that it names, so two faults
of one proxy or of the server follow each other; all others overlap.
"""

import asyncio
import contextlib
import os
import signal
from collections.abc import Callable, Coroutine
from typing import NamedTuple

import redis

from ff_fast import _library

from ..faults.chaos import DOWN, UP
from ..shells import KINDS
from . import failover
from .child import LEASE_MS


class Fault(NamedTuple):
    """A kind of fault: its weight, what it breaks, and the coroutine of (site, dice)."""

    weight: int
    breaks: str
    inject: Callable[..., Coroutine]


FAULTS = {}


def fault(weight, breaks):
    def register(inject):
        FAULTS[inject.__name__] = Fault(weight, breaks, inject)
        return inject

    return register


# -- connections --------------------------------------------------------------------------------------------------


@fault(10, "proxy")
async def connections_cut_at_random_bytes(site, dice, proxy):
    def plan():
        while True:
            yield (
                dice.choice((UP, DOWN)),
                dice.randrange(1, dice.choice((100, 1_000, 50_000))),
                dice.choice(("rst", "fin")),
            )

    proxy.cut_by(plan())
    try:
        await asyncio.sleep(dice.uniform(0.1, 1.5))
    finally:
        proxy.cut_by(())


@fault(4, "proxy")
async def all_connections_cut(site, dice, proxy):
    proxy.cut_all(dice.choice(("rst", "fin")))


@fault(4, "proxy")
async def a_black_hole(site, dice, proxy):
    proxy.hold(*dice.choice(((UP,), (DOWN,), (UP, DOWN))))
    try:
        await asyncio.sleep(dice.choice((0.2, 1.0, 3.0, 7.0)))
        if dice.random() < 0.5:
            proxy.cut_all("rst")
    finally:
        proxy.release()


@fault(4, "proxy")
async def connections_dead_in_silence(site, dice, proxy):
    """What the present connections send is lost both ways, and they never end; new ones work."""
    proxy.swallow()


@fault(3, "proxy")
async def a_slow_link(site, dice, proxy):
    proxy.chunk, proxy.delay = dice.choice(((64, 0.001), (1_000, 0.005), (1 << 16, 0.03)))
    try:
        await asyncio.sleep(dice.uniform(0.5, 3))
    finally:
        proxy.chunk, proxy.delay = 1 << 16, 0.0


@fault(3, "proxy")
async def connections_refused(site, dice, proxy):
    await asyncio.to_thread(proxy.refuse)
    try:
        proxy.cut_all("rst")
        await asyncio.sleep(dice.choice((0.1, 1.0, 4.0)))
    finally:
        proxy.listen()


@fault(3, "server")
async def clients_killed_by_the_server(site, dice):
    with site.raw() as raw:
        raw.client_kill_filter(_type="normal", skipme=True)


@fault(3, "server")
async def blocked_clients_woken(site, dice):
    with site.raw() as raw:
        for client in raw.client_list():
            if "b" in client["flags"]:
                raw.client_unblock(int(client["id"]), error=dice.random() < 0.5)


# -- the server ---------------------------------------------------------------------------------------------------


@fault(5, "server")
async def the_server_killed(site, dice):
    os.kill(site.server.pid, signal.SIGKILL)
    await asyncio.sleep(dice.choice((0, 0, 0.5, 2.0)))
    await site.restart_server()


@fault(3, "server")
async def the_server_frozen(site, dice):
    os.kill(site.server.pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(dice.choice((0.2, 1.0, 3.0, 6.0)))
    finally:
        os.kill(site.server.pid, signal.SIGCONT)


@fault(5, "server")
async def memory_limited(site, dice):
    with site.raw() as raw:
        for _ in range(dice.randrange(1, 15)):
            used = raw.info("memory")["used_memory"]
            raw.config_set(
                "maxmemory",
                max(1, used + dice.choice((-10_000, 0, 100, 300, 1_000, 5_000, 50_000))),
            )
            await asyncio.sleep(dice.uniform(0.01, 0.2))
        raw.config_set("maxmemory", 0)


@fault(3, "server")
async def the_clock_stepped(site, dice):
    """Forward or back, and later to where it was."""
    step = dice.choice((-60, -5, -1, 1, 5, 20))
    site.server.step_clock(step)
    try:
        await asyncio.sleep(dice.uniform(0.2, 3))
    finally:
        site.server.step_clock(-step)


@fault(2, "server")
async def no_replica_in_reach(site, dice):
    with site.raw() as raw:
        raw.config_set("min-replicas-to-write", 1)
        await asyncio.sleep(dice.uniform(0.05, 2))
        raw.config_set("min-replicas-to-write", 0)


@fault(3, "server")
async def the_server_demoted_for_a_while(site, dice):
    """Blocked readers are woken with -UNBLOCKED, writes are refused with -READONLY."""
    with site.raw() as raw:
        raw.replicaof("127.0.0.1", "1")
        await asyncio.sleep(dice.uniform(0.05, 2))
        raw.replicaof("NO", "ONE")


@fault(2, "server")
async def the_server_busy(site, dice):
    """A foreign script that runs too long; even PING is answered with -BUSY."""
    with site.raw() as raw, site.raw() as other:
        raw.config_set("busy-reply-threshold", 20)
        endless = asyncio.create_task(asyncio.to_thread(_run_for_ever, other))
        await asyncio.sleep(dice.uniform(0.05, 1.5))
        while not endless.done():
            with contextlib.suppress(redis.ResponseError):
                raw.script_kill()
            await asyncio.sleep(0.01)
        raw.config_set("busy-reply-threshold", 5_000)


def _run_for_ever(client):
    with contextlib.suppress(redis.ResponseError):
        client.eval("while true do end", 0)


@fault(2, "server")
async def functions_flushed(site, dice):
    with site.raw() as raw:
        raw.function_flush()


@fault(2, "server")
async def the_library_replaced(site, dice):
    """By another text of the same contract."""
    with site.raw() as raw:
        text = f"{_library.source()}\n-- {dice.random()}\n"
        raw.function_load(text, replace=True)


@fault(2, "pair")
async def a_failover(site, dice):
    """Of a primary and a replica of its own, with a stream that goes on through it."""
    await failover.run(site.account, dice, dice.choice(KINDS))


# -- processes ----------------------------------------------------------------------------------------------------


async def _again(process):
    await process.wait(10)
    process.start()


@fault(5, "processes")
async def a_worker_killed(site, dice):
    # The first worker of each shell lives on: its size is looked at in the end.
    process = dice.choice(site.of("worker")[2:])
    process.signal(signal.SIGKILL)
    await _again(process)


@fault(2, "processes")
async def a_worker_asked_to_end(site, dice):
    process = dice.choice(site.of("worker")[2:])
    process.signal(signal.SIGTERM)
    if not await process.wait(20):
        site.account.violation(f"{process.name} did not end on SIGTERM")
        process.signal(signal.SIGKILL)
    await _again(process)


@fault(3, "processes")
async def an_asyncio_worker_cancelled(site, dice):
    # The first one has been there for long enough to listen for the signal.
    site.of("worker")[1].signal(signal.SIGUSR1)


@fault(3, "processes")
async def a_worker_paused_past_its_lease(site, dice):
    process = dice.choice(site.of("worker"))
    process.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(LEASE_MS / 1000 * dice.uniform(0.3, 2))
    finally:
        process.signal(signal.SIGCONT)


@fault(3, "processes")
async def a_supervisor_killed(site, dice):
    process = dice.choice(site.of("supervisor"))
    process.signal(signal.SIGKILL)
    await asyncio.sleep(dice.choice((0, 1.0)))
    await _again(process)


async def inject(site, name, dice):
    """Inject one fault of that kind, and heal it."""
    kind = FAULTS[name]
    proxy = dice.choice(sorted(site.proxies)) if kind.breaks == "proxy" else None
    async with site.turns[proxy or kind.breaks]:
        site.account.inject(name, proxy or "")
        try:
            if proxy is not None:
                await kind.inject(site, dice, site.proxies[proxy])
            else:
                await kind.inject(site, dice)
        except redis.ConnectionError:
            # Another fault cut this one's own connection; what it changed is undone in the end.
            site.account.event(f"fault {name} was cut short")
        finally:
            site.account.event(f"healed {name} {proxy or ''}")
