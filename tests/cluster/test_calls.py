"""Calls on a cluster: every partition has a node, and slots move, nodes fail and come back while calls run."""

import asyncio
import contextlib
import itertools

import pytest

from ff_fast import ClaimPolicy, UsageDimensions, WaitpointKind, WaitpointSpec, errors, keys
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import Outcome
from ff_fast.types import BackendConfig, BackendRetry, BackendTimeouts

from ..shells import WORKER
from ..waiting import wait_until_async
from .sites import port_of

MANY = 24
"""Executions of a test; they are in many partitions, and so on all nodes."""

WAITS = ClaimPolicy.with_max_wait(5)


def few_retries(url, **options):
    """A configuration whose calls give up soon."""
    return BackendConfig.from_url(url).replace(
        timeouts=BackendTimeouts(2.0), retry=BackendRetry(number_of_retries=3, factor=5), **options
    )


def slot_of(execution_id):
    return keys.key_slot(keys.core(execution_id))


class Once:
    """A stop event that lets a loop run one round."""

    def __init__(self):
        self._asked = 0

    def is_set(self):
        self._asked += 1
        return self._asked > 1


async def create_many(backend, lane, count=MANY, **options):
    made = [
        backend.create_execution(lane=lane, namespace=lane, payload=b"p", retention=60, **options)
        for _ in range(count)
    ]
    return [await each for each in made]


async def execution_at(backend, cluster, node, lane, **options):
    """An execution in a slot of *node*."""
    while True:
        eid = await backend.create_execution(
            lane=lane, namespace=lane, payload=b"p", retention=60, **options
        )
        if await asyncio.to_thread(cluster.node_of, slot_of(eid)) is node:
            return eid
        await backend.cancel(eid)


async def claimed_at(backend, cluster, node, lane):
    eid = await execution_at(backend, cluster, node, lane)
    handle = await backend.claim(lane=lane, **WORKER, policy=WAITS)
    assert handle.execution_id == eid
    return eid, handle


# -- everything that crosses partitions ------------------------------------------------------------------------------


async def test_executions_of_all_partitions_are_claimed_and_end(shell, cluster, lane):
    async with await shell.connect(cluster.url) as backend:
        eids = await create_many(backend, lane)
        assert len({cluster.node_of(slot_of(eid)).id for eid in eids}) == 3
        handles = [await backend.claim(lane=lane, **WORKER) for _ in eids]
        assert sorted(handle.execution_id for handle in handles) == sorted(eids)
        assert await backend.claim(lane=lane, **WORKER) is None
        for number, handle in enumerate(handles):
            assert await backend.read_payload(handle) == b"p"
            assert (await backend.renew(handle)).lease_epoch == 1
            if number % 2:
                await backend.complete(handle, b"r")
                assert await backend.read_result(handle.execution_id) == b"r"
            else:
                await backend.fail(handle, "no")
        states = [(await backend.describe(eid)).state for eid in eids]
        assert sorted(states) == ["completed"] * (MANY // 2) + ["failed"] * (MANY // 2)


async def test_budgets_flows_and_children_are_in_slots_of_their_own(shell, cluster, lane):
    async with await shell.connect(cluster.url) as backend:
        for _ in range(4):
            budget = keys.new_uuid()
            await backend.create_budget(budget, soft={"calls": 1})
            flow = await backend.create_flow(namespace=lane)
            eid = await backend.create_execution(
                lane=lane, namespace=lane, flow_id=flow, budgets=[budget], retention=60
            )
            handle = await backend.claim(lane=lane, **WORKER, policy=WAITS)
            verdict = await backend.report_usage(handle, UsageDimensions(custom={"calls": 2}))
            assert verdict.budget_id == budget
            child = await backend.create_execution(lane=lane, namespace=lane, parent_id=eid)
            assert (await backend.describe(child)).parent_id == eid
            await backend.cancel_flow(flow)
            assert (await backend.describe_flow(flow)).state == "cancelled"
            await backend.cancel(child)


async def test_secrets_reach_every_partition_and_signals_resume(shell, cluster, lane):
    async with await shell.connect(cluster.url) as backend:
        await backend.rotate_waitpoint_secret(kid=f"k-{keys.new_uuid()[:8]}", secret=b"s" * 32)
        for _ in range(4):
            eid = await backend.create_execution(lane=lane, namespace=lane, retention=60)
            handle = await backend.claim(lane=lane, **WORKER, policy=WAITS)
            waitpoint = await backend.create_waitpoint(handle)
            spec = WaitpointSpec(
                kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=waitpoint.hmac_token
            )
            await backend.suspend(handle, spec)
            assert (await backend.describe(eid)).state == "suspended"
            await backend.deliver_signal(eid, waitpoint, "go")
            again = await backend.claim(lane=lane, **WORKER, policy=WAITS)
            assert again.execution_id == eid
            assert await backend.observe_signals(again)
            await backend.complete(again, b"")


async def test_a_round_of_a_supervisor_fires_the_timers_of_all_partitions(shell, cluster, lane):
    async with await shell.connect(cluster.url) as backend:
        eids = await create_many(backend, lane, delay=0.001)
        for _ in range(3):
            await backend.supervise(stop=Once())
        handles = [await backend.claim(lane=lane, **WORKER) for _ in eids]
        assert sorted(handle.execution_id for handle in handles) == sorted(eids)
        for handle in handles:
            await backend.cancel(handle.execution_id)


async def test_lost_workers_are_found_in_all_partitions(shell, cluster, lane):
    async with await shell.connect(cluster.url) as backend:
        eids = await create_many(backend, lane, 8)
        for _ in eids:
            assert await backend.claim(lane=lane, **WORKER, lease_ttl_ms=1)

        async def all_found():
            found = {token.grant.execution_id for token in await backend.find_reclaimable(10_000)}
            return found >= {*eids}

        await wait_until_async(all_found)
        for token in await backend.find_reclaimable(10_000):
            if token.grant.execution_id in eids:
                handle = await backend.claim_from_reclaim(token, **WORKER)
                await backend.complete(handle, b"")


async def test_the_partition_count_belongs_to_the_cluster(shell, cluster):
    async with await shell.connect(cluster.url) as backend:
        assert backend.wrapped._deployment.partitions == 256
    with pytest.raises(errors.DeploymentMismatch):
        await shell.connect(BackendConfig.from_url(cluster.url).replace(partitions=64))


# -- who is connected to whom ----------------------------------------------------------------------------------------


async def test_a_server_that_is_no_node_of_a_cluster_is_told_apart(shell):
    with EmbeddedServer(tcp=True) as server:
        host, port = "127.0.0.1", port_of(server.url)
        with pytest.raises(errors.NotACluster) as caught:
            await shell.connect(f"valkey://{host}:{port}/?cluster=true")
        assert (caught.value.host, caught.value.port) == (host, port)


async def test_a_node_of_a_cluster_asks_for_cluster_mode(shell, cluster):
    host, port = cluster.nodes[0].address
    with pytest.raises(errors.ClusterModeRequired):
        await shell.connect(f"valkey://{host}:{port}")


async def test_any_seed_that_answers_is_enough(shell, cluster):
    host, port = cluster.nodes[2].address
    async with await shell.connect(f"valkey://127.0.0.1:1,{host}:{port}/?cluster=true") as backend:
        assert await backend.create_execution(lane="any")


async def test_seeds_that_do_not_answer_are_named(shell):
    with pytest.raises(errors.Unavailable) as caught:
        await shell.connect("valkey://127.0.0.1:1/?cluster=true")
    assert (caught.value.host, caught.value.port) == ("127.0.0.1", 1)


# -- slots that move -------------------------------------------------------------------------------------------------


async def work(backend, lane, over):
    """Create, claim and complete until *over*; return the executions that have completed."""
    done = []
    while not over.is_set():
        eid = await backend.create_execution(lane=lane, namespace=lane, payload=b"p", retention=60)
        handle = await backend.claim(lane=lane, **WORKER, policy=WAITS)
        assert handle is not None
        await backend.renew(handle)
        assert await backend.read_payload(handle) == b"p"
        await backend.complete(handle, eid.encode())
        done.append(handle.execution_id)
    return done


@contextlib.asynccontextmanager
async def working(backend, lane, tasks=3):
    """Work beside the block, and check at its end that every execution has completed once."""
    over = asyncio.Event()
    running = [asyncio.create_task(work(backend, f"{lane}-{i}", over)) for i in range(tasks)]
    try:
        yield
    finally:
        over.set()
        done = list(itertools.chain(*(await asyncio.gather(*running))))
    assert len({*done}) == len(done) > 0
    for eid in done[:: max(len(done) // 20, 1)]:
        assert (await backend.describe(eid)).state == "completed"


async def test_calls_go_on_while_slots_move(shell, cluster, lane):
    first, second = cluster.nodes[:2]
    slots = cluster.slots_of(first)[:2000]
    async with await shell.connect(cluster.url) as backend, working(backend, lane):
        for to in (second, first):
            await asyncio.to_thread(cluster.migrate, slots, to)


async def test_a_claim_that_waits_follows_its_lane(shell, cluster, lane):
    slot = keys.key_slot(keys.ready(lane))
    home = cluster.node_of(slot)
    other = next(node for node in cluster.nodes if node is not home)
    async with await shell.connect(cluster.url) as backend:
        waiting = asyncio.create_task(backend.claim(lane=lane, **WORKER, policy=WAITS))

        async def blocked():
            return "blocked_clients:0" not in str(home.command("INFO", "clients"))

        await wait_until_async(blocked)
        try:
            await asyncio.to_thread(cluster.migrate, [slot], other)
            eid = await backend.create_execution(lane=lane, namespace=lane, retention=60)
            assert (await waiting).execution_id == eid
            await backend.cancel(eid)
        finally:
            await asyncio.to_thread(cluster.migrate, [slot], home)


class Moving:
    """A slot that moves from its node to another one key by key; at the end of the block it is where it was."""

    def __init__(self, cluster, slot, to):
        self.cluster, self.slot, self.to = cluster, slot, to
        self.home = cluster.node_of(slot)

    def __enter__(self):
        self.to.command("CLUSTER", "SETSLOT", self.slot, "IMPORTING", self.home.id)
        self.home.command("CLUSTER", "SETSLOT", self.slot, "MIGRATING", self.to.id)
        return self

    def move(self, key):
        host, port = self.to.address
        self.home.command("MIGRATE", host, port, key.decode(), 0, 5000)

    def finish(self):
        while found := self.home.command("CLUSTER", "GETKEYSINSLOT", self.slot, 100):
            for key in found:
                self.move(key)
        for node in (self.to, self.home):
            node.command("CLUSTER", "SETSLOT", self.slot, "NODE", self.to.id)
        self.cluster.wait_until_stable()

    def __exit__(self, *_):
        if self.cluster.node_of(self.slot) is self.home:
            self.finish()
        self.cluster.migrate([self.slot], self.home)


async def test_a_call_waits_for_the_end_of_a_migration_by_keys(shell, cluster, lane):
    """No function stops in the middle, whichever keys have gone."""
    home, to = cluster.nodes[:2]
    async with (
        await shell.connect(few_retries(cluster.url)) as hasty,
        await shell.connect(cluster.url) as backend,
    ):
        eid, handle = await claimed_at(backend, cluster, home, lane)
        with Moving(cluster, slot_of(eid), to) as slot:
            for key in (keys.payload(eid), keys.timers(keys.slot_tag_of(eid))):
                for call in (
                    lambda: hasty.complete(handle, b"r"),
                    lambda: hasty.renew(handle),
                    lambda: hasty.describe(eid),
                    lambda: hasty.set_tags(eid, {"a.b": "c"}),
                    lambda: hasty.report_usage(handle, UsageDimensions(custom={"calls": 1})),
                ):
                    with pytest.raises((errors.Unavailable, errors.Redirected)) as caught:
                        await call()
                    assert caught.value.outcome is Outcome.NOT_APPLIED
                    if isinstance(caught.value, errors.Unavailable):
                        assert (caught.value.host, caught.value.port) == home.address
                slot.move(key)
            ending = asyncio.create_task(backend.complete(handle, b"r"))
            await asyncio.to_thread(slot.finish)
            await ending
        assert await backend.read_result(eid) == b"r"
        described = await backend.describe(eid)
        assert (described.state, described.usage) == ("completed", {})


async def test_a_writer_waits_for_a_key_that_its_call_does_not_name(shell, cluster, lane):
    """Large frames are noted in the meta hash, which an append finds by itself."""
    home, to = cluster.nodes[:2]
    async with await shell.connect(cluster.url) as backend:
        eid, handle = await claimed_at(backend, cluster, home, lane)
        async with await backend.open_writer(handle) as writer:
            writer.write(b"small")
            await writer.flush()
            with Moving(cluster, slot_of(eid), to) as slot:
                slot.move(keys.meta(eid, 0))
                for _ in range(3):
                    writer.write(b"large" * 1000)
                await asyncio.sleep(0.02)
                await asyncio.to_thread(slot.finish)
                await writer.flush()
        frames = [item for item in await backend.read_stream(eid) if hasattr(item, "payload")]
        assert [len(frame.payload) for frame in frames] == [5, 5000, 5000, 5000]
        await backend.complete(handle, b"")


async def test_plain_commands_follow_a_migration_by_keys(shell, cluster, lane):
    """Hints of a lane go with its keys, over connections that others use, and to a node that has no other slot."""
    slot = keys.key_slot(keys.ready(lane))
    home = cluster.node_of(slot)
    to = next(node for node in cluster.nodes if node is not home)
    async with await shell.connect(cluster.url) as backend:
        with Moving(cluster, slot, to):
            eids = await asyncio.gather(
                *(backend.create_execution(lane=lane, namespace=lane) for _ in range(8))
            )
            assert to.command("CLUSTER", "COUNTKEYSINSLOT", slot) > 0
            found = [await backend.claim(lane=lane, **WORKER) for _ in eids]
            assert sorted(each.execution_id for each in found) == sorted(eids)
        for handle in found:
            await backend.complete(handle, b"")
