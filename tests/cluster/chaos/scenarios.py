"""What is done to the servers. `SCENARIOS` is the list."""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable
from typing import NamedTuple

from ...faults.chaos import DOWN, UP
from ..sites import cut_off, let_follow
from .site import ClusterSite, PairSite, SentinelsSite

TAILS_S = (0.2, 0.5, 2.5)
"""How much a replica lacks, in seconds: what a writer still holds, and what it does not."""

STALLS_S = (0.7, 3.0, 7.0)
"""Below the node timeout, past it, and past the time limit of a call."""


class Pace:
    """How long a scenario runs, and how long it waits between two faults."""

    def __init__(self, seconds, every):
        self._until = time.monotonic() + seconds
        self._every = every

    async def __aiter__(self):
        """Numbers of faults, in time; the first at once."""
        number = 0
        while time.monotonic() < self._until:
            began = time.monotonic()
            yield number
            number += 1
            left = self._every - (time.monotonic() - began)
            await asyncio.sleep(max(0.0, min(left, self._until - time.monotonic())))


async def migrate(site, dice, pace, note):
    """Slots move to another node, and back."""
    cluster = site.cluster
    async for _ in pace:
        source, target = dice.sample(cluster.primaries, 2)
        slots = cluster.slots_of(source)
        half = slots[: len(slots) // 2] if dice.random() < 0.5 else slots[len(slots) // 2 :]
        note(f"{len(half)} slots move")
        await asyncio.to_thread(cluster.migrate, half, target)
        await asyncio.to_thread(cluster.migrate, half, source)


async def kill(site, dice, pace, note):
    """A primary is killed, and comes back as a replica of its replica."""
    cluster = site.cluster
    async for _ in pace:
        node = dice.choice(cluster.primaries)
        note(f"{node.address} is killed")
        await asyncio.to_thread(cluster.kill, node)
        # The others agree once its replica has taken over.
        await asyncio.to_thread(cluster.wait_until_stable)
        await asyncio.to_thread(cluster.restart, node)


async def stall(site, dice, pace, note):
    """A primary stands still: for a moment, or until its replica has taken over, which it has to find out."""
    cluster = site.cluster
    async for _ in pace:
        node = dice.choice(cluster.primaries)
        length = dice.choice(STALLS_S)
        note(f"{node.address} stands still for {length:g} s")
        os.kill(node.pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(length)
        finally:
            os.kill(node.pid, signal.SIGCONT)
        await asyncio.to_thread(cluster.wait_until_stable)


async def crash(site, dice, pace, note):
    """A primary without replicas, which syncs its log before it answers, is killed and started again."""
    cluster = site.cluster
    async for _ in pace:
        node = dice.choice(cluster.primaries)
        note(f"{node.address} is killed")
        await asyncio.to_thread(cluster.kill, node)
        await asyncio.sleep(dice.uniform(0.0, 3.0))
        await asyncio.to_thread(cluster.restart, node)


async def join(site, dice, pace, note):
    """A node joins and gets slots; then it gives them back and leaves."""
    cluster = site.cluster
    async for _ in pace:
        node = await asyncio.to_thread(cluster.add_node)
        note(f"{node.address} joins")
        slots = [slot for each in cluster.primaries for slot in cluster.slots_of(each)[::4]]
        await asyncio.to_thread(cluster.migrate, slots, node)
        note(f"{node.address} leaves")
        await asyncio.to_thread(cluster.remove_node, node)


async def failover(site, dice, pace, note):
    """A replica takes over: as planned, or without the tail, since its link was cut before the primary died."""
    cluster = site.cluster
    async for number in pace:
        primary = dice.choice(cluster.primaries)
        (replica,) = cluster.replicas_of(primary)
        if number % 2 == 0:
            note(f"{replica.address} takes over from {primary.address}")
            await asyncio.to_thread(cluster.failover, replica)
            continue
        note(f"{replica.address} takes over from {primary.address} without the tail")
        await asyncio.to_thread(cut_off, primary, replica)
        await asyncio.sleep(dice.choice(TAILS_S))
        await asyncio.to_thread(cluster.kill, primary)
        await asyncio.to_thread(cluster.failover, replica, "TAKEOVER")
        let_follow(replica)
        await asyncio.to_thread(cluster.restart, primary)


async def pair(site, dice, pace, note):
    """`failover` without a cluster: ``FAILOVER`` and a promotion by hand, or what Sentinels do."""
    async for number in pace:
        if number % 2 == 0:
            note("a planned failover")
            await asyncio.to_thread(site.planned)
            continue
        note("a failover without the tail")
        await asyncio.to_thread(site.cut_off)
        await asyncio.sleep(dice.choice(TAILS_S))
        await asyncio.to_thread(site.killed)


async def partition(site, dice, pace, note):
    """The network between the clients and one node is cut: refused, silent, or lost with what is on its way."""
    async for _ in pace:
        front = site.front_of(dice.choice(site.cluster.primaries))
        how = dice.choice(("refused", "silent", "lost"))
        note(f"{front.address}: {how}")
        if how == "refused":
            await asyncio.to_thread(front.refuse)
            front.cut_all()
        elif how == "silent":
            front.hold(UP, DOWN)
        else:
            front.swallow()
        await asyncio.sleep(dice.uniform(0.2, 2.0))
        front.release()
        front.cut_all()
        if how == "refused":
            front.listen()


async def rolling(site, dice, pace, note):
    """Every node is restarted, a primary after its replica has taken over."""
    cluster = site.cluster
    async for _ in pace:
        for node in list(cluster.nodes):
            if node in cluster.primaries:
                (replica,) = cluster.replicas_of(node)
                note(f"{replica.address} takes over")
                await asyncio.to_thread(cluster.failover, replica)
            note(f"{node.address} is restarted")
            await asyncio.to_thread(cluster.restart, node)


class Scenario(NamedTuple):
    """What is done, where, and what it may cost.

    Attributes:
        run: Does it, until its pace is over.
        site: Makes its servers.
        every: Seconds from one fault to the next.
        lossy: Whether what was acknowledged may be lost, unless replicas had it.
    """

    run: Callable
    site: Callable
    every: float
    lossy: bool = False


def _with_fronts():
    site = ClusterSite()
    with contextlib.ExitStack() as stack:
        stack.callback(site.close)
        site.put_fronts()
        stack.pop_all()
    return site


SCENARIOS = {
    "migrate": Scenario(migrate, ClusterSite, 0.5),
    "kill": Scenario(kill, lambda: ClusterSite(replicas=3), 10.0, lossy=True),
    "join": Scenario(join, ClusterSite, 2.0),
    "failover": Scenario(failover, lambda: ClusterSite(replicas=3), 5.0, lossy=True),
    "pair": Scenario(pair, PairSite, 3.0, lossy=True),
    "sentinel": Scenario(pair, SentinelsSite, 5.0, lossy=True),
    "partition": Scenario(partition, _with_fronts, 3.0),
    "stall": Scenario(stall, lambda: ClusterSite(replicas=3), 5.0, lossy=True),
    "crash": Scenario(crash, lambda: ClusterSite(durable=True), 5.0),
    "rolling": Scenario(rolling, lambda: ClusterSite(replicas=3), 1.0),
}
