"""Faults of one node of three: calls to the others go on, every caller gets one outcome, and nothing is left behind."""

import asyncio
import contextlib
import gc
import random
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import ff_fast
from ff_fast import ScannerFilter, _transport, aio, keys
from ff_fast._core import claiming, completions, hub, readers
from ff_fast.errors import DeadlineExceeded, FFError, ForkedClient, Unavailable
from ff_fast.types import ClaimPolicy

from ..faults.chaos import DOWN, UP, ChaosProxy
from ..faults.conftest import seed  # noqa: F401
from ..faults.stored import stored_once
from ..faults.test_process import in_child, interrupts, together
from ..server.workers import Subscription
from ..shells import KINDS, WORKER, config
from ..waiting import wait_until, wait_until_async

TIMEOUT_S = 0.3


class Proxied:
    """The cluster, where clients reach one node through a proxy.

    Attributes:
        proxy: In front of that node.
        node: The node.
        url: Of the cluster.
    """

    def __init__(self, cluster):
        self._cluster = cluster
        self.url = cluster.url
        self.node = cluster.nodes[1]
        host, port = self.node.address
        self.proxy = ChaosProxy(f"valkey://{host}:{port}")
        self._announce(self.proxy.address[1])

    def _announce(self, port):
        """Let all nodes tell clients another port of the node; 0 is its own."""
        self.node.command("CONFIG", "SET", "cluster-announce-port", port)
        told = port or self.node.address[1]
        wait_until(lambda: all(self._told(each) == told for each in self._cluster.running))

    def _told(self, node):
        for _, _, (_, port, identity, *_), *_ in node.command("CLUSTER", "SLOTS"):
            if identity.decode() == self.node.id:
                return port
        return None

    def slots(self):
        return set(self._cluster.slots_of(self.node))

    def close(self):
        self._announce(0)
        self.proxy.close()


@pytest.fixture(scope="module")
def proxied_cluster(cluster):
    running = Proxied(cluster)
    yield running
    running.close()


@pytest.fixture
def proxied(proxied_cluster):
    """A node behind a proxy that passes everything, until the test tells it otherwise."""
    proxy = proxied_cluster.proxy
    let_go(proxy)
    proxy.accepted = proxy.cuts = 0
    yield proxied_cluster
    # Also of a test that has failed.
    let_go(proxy)


def let_go(proxy):
    """Pass everything, and end every connection, also what somebody opens meanwhile."""
    proxy.cut_by(())
    proxy.release()

    def gone():
        proxy.cut_all()
        return proxy.connections == 0

    wait_until(gone)


def slot_of(eid):
    return keys.key_slot(keys.core(eid))


def of_lane(tokens, lane):
    return [token for token in tokens if token.grant.lane_id == lane]


async def spread(backend, lane, slots, count=12):
    """New executions of *lane*; those of the node behind the proxy, and the others."""
    eids = [await backend.create_execution(lane=lane) for _ in range(count)]
    mine = [eid for eid in eids if slot_of(eid) in slots]
    others = [eid for eid in eids if slot_of(eid) not in slots]
    return (mine, others) if mine and others else await spread(backend, lane, slots, count)


async def test_cuts_at_random_bytes_on_one_node(shell, proxied, lane, seed, monkeypatch):  # noqa: F811
    """Every execution is claimed once and ends once, whatever breaks on the way."""
    # What finds an execution whose hint was lost.
    monkeypatch.setattr(claiming, "SWEEP_EVERY_S", 0.2)
    monkeypatch.setattr(claiming, "LOOK_EVERY_S", 0.2)
    dice = random.Random(seed)
    proxy = proxied.proxy

    def plan():
        while True:
            yield (
                dice.choice([UP, DOWN]),
                dice.randrange(1, 1_500),
                dice.choice(["rst", "fin"]),
            )

    async with await shell.connect(proxied.url, retries=1_000, factor=1, base=1) as backend:
        proxy.cut_by(plan())
        eids = [await backend.create_execution(lane=lane) for _ in range(20)]
        for eid in eids:
            await backend.set_tags(eid, {"a.b": "c"})
        taken = {}
        while len(taken) < len(eids):
            handle = await backend.claim(
                lane=lane, policy=ClaimPolicy.with_max_wait(60.0), **WORKER
            )
            assert handle is not None
            assert handle.execution_id not in taken
            taken[handle.execution_id] = handle
        for eid, handle in taken.items():
            await backend.renew(handle)
            await backend.complete(handle, eid.encode())
        for eid in eids:
            assert await backend.read_result(eid) == eid.encode()
        proxy.cut_by(())
        assert proxy.cuts
        assert await backend.claim(lane=lane, **WORKER) is None


# -- silence -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_a_silent_node_is_silent_for_its_own_slots_alone(shell, proxied, lane):
    async with await shell.connect(proxied.url, timeout=TIMEOUT_S) as backend:
        mine, others = await spread(backend, lane, proxied.slots())
        proxied.proxy.hold(UP, DOWN)
        # The last one is a step to all nodes.
        waiting = [asyncio.ensure_future(backend.describe(eid)) for eid in mine[:2]]
        waiting.append(asyncio.ensure_future(backend.find_reclaimable()))
        for eid in others:
            assert (await backend.describe(eid)).execution_id == eid
        for each in waiting:
            with pytest.raises((DeadlineExceeded, Unavailable)):
                await each
        for eid in others:
            assert (await backend.describe(eid)).execution_id == eid
        proxied.proxy.release()
        assert not of_lane(await backend.find_reclaimable(), lane)
        for eid in mine:
            assert (await backend.describe(eid)).execution_id == eid


async def test_connections_to_one_node_that_died_in_silence_are_replaced(shell, proxied, lane):
    async with await shell.connect(proxied.url, timeout=TIMEOUT_S) as backend:
        mine, others = await spread(backend, lane, proxied.slots())
        assert not of_lane(await backend.find_reclaimable(), lane)
        proxied.proxy.swallow()
        assert not of_lane(await backend.find_reclaimable(), lane)
        for eid in mine + others:
            assert (await backend.describe(eid)).execution_id == eid


@pytest.mark.long
async def test_a_claim_ends_in_time_where_the_node_of_its_lane_is_silent(
    shell, proxied, lane, monkeypatch
):
    monkeypatch.setattr(claiming, "LOOK_EVERY_S", 0.05)
    monkeypatch.setattr(_transport, "_BLOCK_MARGIN_S", 0.05)
    slots = proxied.slots()
    lane = next(
        name
        for name in (f"{lane}-{i}" for i in range(1_000))
        if keys.key_slot(keys.ready(name, "")) in slots
    )
    async with await shell.connect(proxied.url, timeout=TIMEOUT_S) as backend:
        wait = ClaimPolicy.with_max_wait(60.0)
        claims = [
            asyncio.ensure_future(backend.claim(lane=lane, policy=wait, **WORKER)) for _ in range(3)
        ]
        await wait_until_async(lambda: _blocked(proxied.node))
        proxied.proxy.hold(UP, DOWN)
        for each in claims:
            with pytest.raises((DeadlineExceeded, Unavailable)):
                await each
        proxied.proxy.release()
        eid = await backend.create_execution(lane=lane)
        handle = await backend.claim(lane=lane, policy=wait, **WORKER)
        assert handle.execution_id == eid
        await backend.complete(handle)


async def _blocked(node):
    return b"blocked_clients:0\r" not in node.command("INFO", "clients")


@pytest.mark.long
async def test_a_lease_on_a_silent_node_is_lost_in_time(shell, proxied, lane):
    async with await shell.connect(proxied.url, timeout=TIMEOUT_S) as backend:
        slots = proxied.slots()
        while True:
            await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, lease_ttl_ms=600, **WORKER)
            if slot_of(handle.execution_id) in slots:
                break
        keeper = await backend.keep_lease(handle)
        proxied.proxy.hold(UP, DOWN)
        await wait_until_async(lambda: _true(not keeper.held))
        proxied.proxy.release()
        stopped = keeper.stop()
        if stopped is not None:
            await stopped


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_completions_of_the_other_nodes_are_told_while_one_is_silent(
    kind, proxied, lane, monkeypatch
):
    """And those of the silent one when it is back. A wait for that node alone would take the request timeout."""
    look_often(monkeypatch)
    slots = proxied.slots()
    with (
        ff_fast.ValkeyBackend.connect(proxied.url) as backend,
        Subscription(kind, patient(proxied.url), ScannerFilter(namespace=lane)) as subscription,
    ):
        wait_until(lambda: subscription.begun)
        eids = [backend.create_execution(lane=lane, namespace=lane) for _ in range(30)]
        mine = [eid for eid in eids if slot_of(eid) in slots]
        others = [eid for eid in eids if slot_of(eid) not in slots]
        proxied.proxy.hold(UP, DOWN)
        for eid in others[:8]:
            backend.cancel(eid)
            wait_until(lambda: _told(subscription, eid))  # noqa: B023
            # Over several looks at all partitions.
            time.sleep(0.2)
        proxied.proxy.release()
        for eid in mine:
            backend.cancel(eid)
        wait_until(lambda: all(_told(subscription, eid) for eid in mine))
        subscription.ended.set()
        backend.cancel(others[8])
        told = [each.execution_id for each in subscription.result(20)]
    assert sorted(told) == sorted([*mine, *others[:9]])


def test_a_subscription_that_has_to_connect_to_a_silent_node_keeps_the_others(
    proxied, lane, monkeypatch
):
    """The blocking shell connects on the thread that reads."""
    look_often(monkeypatch)
    slots = proxied.slots()
    with (
        ff_fast.ValkeyBackend.connect(proxied.url) as backend,
        Subscription("sync", patient(proxied.url), ScannerFilter(namespace=lane)) as subscription,
    ):
        wait_until(lambda: subscription.begun)
        eids = [backend.create_execution(lane=lane, namespace=lane) for _ in range(12)]
        other = next(eid for eid in eids if slot_of(eid) not in slots)
        proxied.proxy.hold(UP, DOWN)
        accepted = proxied.proxy.accepted
        for node in subscription.backend._nodes.all():
            node.close_idle()
        wait_until(lambda: proxied.proxy.accepted > accepted)
        backend.cancel(other)
        wait_until(lambda: _told(subscription, other))


def look_often(monkeypatch):
    """Let subscriptions look at all partitions now and then, and bear silence for a moment."""
    monkeypatch.setattr(readers, "SILENT_S", 0.1)
    monkeypatch.setattr(hub, "LINGER_S", 0.05)
    monkeypatch.setattr(completions, "_LOOK_S", 0.4)
    monkeypatch.setattr(completions, "_LOOK_S_EACH", 0)


def patient(url):
    """A configuration whose request timeout is longer than any wait of a test."""
    return config(url, timeout=60)


def _told(subscription, eid):
    return any(each.execution_id == eid for each in subscription.items)


async def _true(value):
    return value


# -- callers that go ---------------------------------------------------------------------------------------------------


def interrupted_when(condition):
    """A thread that interrupts the main thread once *condition* holds."""

    def interrupt():
        wait_until(condition)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    running = threading.Thread(target=interrupt)
    running.start()
    return running


def test_an_interrupt_amid_a_step_over_three_nodes(proxied, lane):
    """Replies that nobody read must not answer the next call, on whichever node they wait."""
    proxy = proxied.proxy
    with ff_fast.ValkeyBackend.connect(proxied.url) as backend:
        eids = [backend.create_execution(lane=lane) for _ in range(12)]
        assert not of_lane(backend.find_reclaimable(), lane)
        proxy.hold(DOWN)
        interrupting = interrupted_when(lambda: proxy.waiting(DOWN))
        with pytest.raises(KeyboardInterrupt):
            backend.find_reclaimable()
        interrupting.join()
        proxy.release()
        assert not any(ref() and not ref().closed for ref in backend._busy.values())
        for eid in eids:
            assert backend.describe(eid).execution_id == eid
        assert not of_lane(backend.find_reclaimable(), lane)


# redis-py drops a socket when it is interrupted while it opens one.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_interrupts_at_any_moment_amid_steps_over_three_nodes(cluster, lane, seed):  # noqa: F811
    with ff_fast.ValkeyBackend.connect(cluster.url) as backend:
        eids = [backend.create_execution(lane=lane) for _ in range(12)]
        interrupted = 0
        with interrupts(seed) as gate:
            while interrupted < 30:
                with contextlib.suppress(KeyboardInterrupt):
                    gate.open = True
                    for eid in eids:
                        assert not of_lane(backend.find_reclaimable(), lane)
                        assert backend.describe(eid).execution_id == eid
                    gate.open = False
                    continue
                interrupted += 1
        for eid in eids:
            assert backend.describe(eid).execution_id == eid


async def test_a_cancelled_step_over_three_nodes_disturbs_nobody(cluster, lane):
    async with aio.ValkeyBackend.connect(cluster.url) as backend:
        eids = [await backend.create_execution(lane=lane) for _ in range(12)]
        for step in range(14):
            others = [asyncio.ensure_future(backend.describe(eid)) for eid in eids]
            cancelled = asyncio.ensure_future(backend.find_reclaimable())
            for _ in range(step):
                await asyncio.sleep(0)
            cancelled.cancel()
            assert [(await other).execution_id for other in others] == eids
            with contextlib.suppress(asyncio.CancelledError):
                await cancelled


def test_a_fork_amid_calls_to_three_nodes(cluster, lane):
    with ff_fast.ValkeyBackend.connect(cluster.url) as backend:
        eids = [backend.create_execution(lane=lane) for _ in range(12)]

        def child():
            for eid in eids:
                with pytest.raises(ForkedClient):
                    backend.describe(eid)
            with pytest.raises(ForkedClient):
                backend.find_reclaimable()
            backend.close()
            with ff_fast.ValkeyBackend.connect(cluster.url) as own:
                assert [own.describe(eid).execution_id for eid in eids] == eids
            gc.collect()

        for _ in range(2):
            in_child(child)
            assert [backend.describe(eid).execution_id for eid in eids] == eids
            assert not of_lane(backend.find_reclaimable(), lane)


async def test_closing_ends_every_call_to_every_node(shell, proxied, lane):
    backend = await shell.connect(patient(proxied.url))
    mine, _ = await spread(backend, lane, proxied.slots())
    proxied.proxy.hold(UP, DOWN)
    waiting = [
        asyncio.ensure_future(each)
        for each in (
            backend.describe(mine[0]),
            backend.find_reclaimable(),
            backend.claim(lane=f"{lane}-none", policy=ClaimPolicy.with_max_wait(60.0), **WORKER),
        )
    ]
    await wait_until_async(lambda: _true(proxied.proxy.waiting(UP)))
    await asyncio.wait_for(backend.close(), 15)
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 15)
    assert all(isinstance(result, FFError) for result in results), results
    proxied.proxy.release()


def test_closing_leaves_no_descriptor_although_somebody_keeps_the_backend(cluster, lane):
    def descriptors():
        return len(list(Path("/proc/self/fd").iterdir()))

    gc.collect()
    before = descriptors()
    backend = ff_fast.ValkeyBackend.connect(cluster.url)
    done = backend.subscribe_completions(ScannerFilter(namespace=lane))
    done.next_batch(0.01)
    tail = backend.follow(backend.create_execution(lane=lane))
    tail.next_batch(0.01)
    assert descriptors() > before
    backend.close()
    wait_until(lambda: descriptors() <= before)
    assert backend.closed
    assert not tail.closed


async def test_closing_ends_readers_of_a_silent_node(shell, proxied, lane):
    backend = await shell.connect(patient(proxied.url))
    mine, _ = await spread(backend, lane, proxied.slots())
    # Each takes a thread, of which there are few more than cores; one is for close().
    mine = mine[:4]
    waiting = [asyncio.ensure_future(backend.wait(eid)) for eid in mine[:2]]
    await asyncio.sleep(0.05)
    # What is open is cut, and what is opened again hears nothing.
    proxied.proxy.hold(UP, DOWN)
    proxied.proxy.cut_all()
    waiting += [asyncio.ensure_future(backend.wait(eid)) for eid in mine[2:]]
    await asyncio.sleep(0.3)
    await asyncio.wait_for(backend.close(), 15)
    results = await asyncio.wait_for(asyncio.gather(*waiting, return_exceptions=True), 15)
    assert all(isinstance(result, FFError) for result in results), results
    proxied.proxy.release()


# -- many callers ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_sixteen_threads_while_slots_move_and_connections_break(cluster, proxied, lane, seed):  # noqa: F811
    """Everybody gets the answer to his own question."""
    proxy, dice = proxied.proxy, random.Random(seed)
    over = threading.Event()
    with ff_fast.ValkeyBackend.connect(config(proxied.url, retries=100, base=1)) as backend:
        handles = []
        for _ in range(48):
            backend.create_execution(lane=lane)
            handles.append(backend.claim(lane=lane, **WORKER))

        def work(index):
            if index == 16:
                try:
                    first, last = proxied.node, cluster.nodes[2]
                    moved = cluster.slots_of(first)[:1_000]
                    for to in (last, first):
                        cluster.migrate(moved, to)
                        proxy.cut_all(dice.choice(["rst", "fin"]))
                finally:
                    over.set()
                return
            mine = handles[index::16]
            done = 0
            while not over.is_set() or done < 2:
                for handle in mine:
                    found = backend.describe(handle.execution_id)
                    assert found.execution_id == handle.execution_id
                    backend.progress(handle, min(done, 100))
                done += 1
            for handle in mine:
                backend.complete(handle, handle.execution_id.encode())

        together(17, work)
        for handle in handles:
            assert backend.read_result(handle.execution_id) == handle.execution_id.encode()
    # A thread that was told to end may not have had its turn.
    wait_until(lambda: not [each for each in threading.enumerate() if "ff_fast" in each.name])


# -- streams -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
async def test_streams_on_all_nodes_are_whole_whatever_breaks_on_one(shell, proxied, lane, seed):  # noqa: F811
    dice = random.Random(seed)
    payloads = [b"%d" % i for i in range(300)]
    # Each reader of the blocking shell takes one.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(32))

    def plan():
        while True:
            yield dice.choice([UP, DOWN]), dice.randrange(1, 4_000), dice.choice(["rst", "fin"])

    async with await shell.connect(proxied.url, retries=1_000, factor=1, base=1) as backend:
        slots, handles = proxied.slots(), []
        while sum(slot_of(each.execution_id) in slots for each in handles) < 3:
            await backend.create_execution(lane=lane)
            handles.append(await backend.claim(lane=lane, **WORKER))
        reading = [asyncio.ensure_future(backend.items(each.execution_id)) for each in handles]
        writers = [await backend.open_writer(each) for each in handles]
        proxied.proxy.cut_by(plan())
        for payload in payloads:
            for writer in writers:
                writer.write(payload)
            if int(payload) % 30 == 29:
                await asyncio.gather(*(writer.flush(30) for writer in writers))
        proxied.proxy.cut_by(())
        for writer, handle in zip(writers, handles, strict=True):
            await writer.close()
            await backend.complete(handle)
        for items in await asyncio.gather(*reading):
            assert [item.payload for item in items[:-1]] == payloads
    assert proxied.proxy.cuts
    for handle in handles:
        stored_once(proxied.url, handle.execution_id, payloads)


@pytest.mark.long
@pytest.mark.parametrize("who", ["supervisor", "worker"])
async def test_a_supervisor_fires_the_timers_of_the_nodes_that_answer(
    shell,
    proxied,
    lane,
    who,
    monkeypatch,
):
    async with await shell.connect(proxied.url, timeout=TIMEOUT_S) as backend:
        slots = proxied.slots()
        # The node that is lost has the mark of who supervises.
        partition = next(
            n for n in range(256) if keys.key_slot(keys.timers(keys.slot_tag(n))) in slots
        )
        mark = b"ff:part:{fp:%d}:supervisor" % partition
        monkeypatch.setattr(keys, "supervisor", lambda: mark)
        eids = [await backend.create_execution(lane=lane, delay=0.001) for _ in range(12)]
        others = {eid for eid in eids if slot_of(eid) not in slots}
        proxied.proxy.hold(UP, DOWN)
        stop = threading.Event() if shell.kind == "sync" else asyncio.Event()
        if who == "supervisor":
            supervising = asyncio.ensure_future(backend.supervise(interval=0.01, stop=stop))
        else:
            handler = idle if shell.kind == "sync" else idle_coroutine
            supervising = asyncio.ensure_future(
                backend.run_worker(handler, lane=f"{lane}-other", stop=stop)
            )

        async def fired():
            states = {eid: (await backend.describe(eid)).state for eid in others}
            return set(states.values()) == {"waiting"}

        await wait_until_async(fired)
        proxied.proxy.release()
        stop.set()
        await supervising


def idle(task):
    """Handles what never comes."""


async def idle_coroutine(task):
    """Handles what never comes."""
