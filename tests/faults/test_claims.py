"""A claim gives work to its caller or to nobody: memory that runs out, lost replies, callers that go away, foreign records."""

import asyncio
import contextlib
import itertools
import os
import random
import signal
import sys
import threading
import time

import pytest

import ff_fast
from ff_fast import CancelFlowPolicy, CancelFlowWait, CapabilitySet, ClaimPolicy, aio, keys
from ff_fast._core import claiming, operations, ops
from ff_fast._core.supervision import reclaim_token
from ff_fast.errors import DeadlineExceeded, FFError, Outcome, OutOfMemory, StaleOwner

from ..conftest import connect_raw
from ..heads import head_of, set_head
from ..waiting import wait_until, wait_until_async
from .chaos import DOWN
from .test_outcomes import away, lose_one_reply_and_then_refuse

WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}
GPU = CapabilitySet(["gpu"])


@pytest.fixture
def raw(raw):
    """Connected before the test, which must leave no more connections than it found."""
    raw.ping()
    return raw


def in_partition(partition):
    return f"{keys.slot_tag(partition)}:{keys.new_uuid()}"


def core_of(raw, eid):
    return {k.decode(): v.decode() for k, v in raw.hgetall(keys.core(eid)).items()}


def waits_unclaimed(raw, eid):
    """It waits as if it had never been claimed."""
    core = core_of(raw, eid)
    if core["state"] != "waiting":
        return False
    assert (core["total_attempt_count"], core["reclaim_count"]) == ("0", "0")
    assert "current_attempt_index" not in core
    tag = keys.slot_tag_of(eid)
    assert raw.zscore(keys.timers(tag), f"lease:{eid}") is None
    assert eid.encode() not in raw.hvals(keys.leases(tag))
    return raw.zscore(keys.ready(core["lane_id"]), eid[4 : eid.index("}")]) is not None


async def claim_all(backend, lane):
    """The ids of everything that a lane has, completed."""
    found = []
    while (handle := await backend.claim(lane=lane, **WORKER)) is not None:
        fields = handle.fields()
        assert fields.attempt_index == 0
        found.append(fields.execution_id)
        await backend.complete(handle)
    return found


async def _now(condition):
    return condition()


# -- memory ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tight():
    """A server whose memory the tests limit."""
    with ff_fast.embedded.EmbeddedServer() as running, connect_raw(running.url) as raw:
        raw.ping()
        yield running, raw


async def test_no_work_is_lost_to_a_hint_that_is_refused(shell, tight, lane):
    server, raw = tight
    granted = 0
    async with await shell.connect(server.url, retries=0) as backend:
        await backend.create_execution(lane=lane)
        assert await backend.claim(lane=lane, **WORKER)
        for above in range(-400, 3_000, 200):
            pair = [in_partition(3) for _ in range(2)]
            for eid in pair:
                await backend.create_execution(lane=lane, execution_id=eid)
            raw.config_set("maxmemory", int(raw.info("memory")["used_memory"]) + above)
            handle = None
            with contextlib.suppress(OutOfMemory):
                handle = await backend.claim(lane=lane, **WORKER)
            raw.config_set("maxmemory", 0)
            states = {eid: core_of(raw, eid)["state"] for eid in pair}
            if handle is not None:
                granted += 1
                assert states.pop(handle.fields().execution_id) == "active"
                await backend.complete(handle)
            assert set(states.values()) == {"waiting"}
            rest = await claim_all(backend, lane)
            assert sorted(rest) == sorted(states)
    assert granted


# -- replies that are lost, and refusals behind them -------------------------------------------------


async def test_a_take_over_whose_reply_was_lost_is_given_back_whatever_follows(
    shell, proxy, raw, lane
):
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        eid = await backend.create_execution(lane=lane)
        await backend.claim(lane=lane, **WORKER)
        set_head(raw, keys.head(eid, 0), lease_expires_at=1)
        with away(proxy):
            lose_one_reply_and_then_refuse(proxy)
            with pytest.raises(FFError) as caught:
                await backend.claim_from_reclaim(reclaim_token(eid, lane, 1), **WORKER)
        assert caught.value.outcome is Outcome.UNKNOWN
        # The blocking shell gives back with its next claim.
        await backend.claim(lane=f"{lane}-other", **WORKER)
        await wait_until_async(lambda: _now(lambda: core_of(raw, eid)["state"] == "waiting"))


# -- callers that go away ----------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True], ids=["immediate", "waiting"])
async def test_a_cancelled_claim_gives_back_what_it_took(waits, server, raw, lane):
    policy = ClaimPolicy.with_max_wait(5) if waits else None
    dice = random.Random(5)
    async with aio.ValkeyBackend.connect(server.url) as backend:
        made = [await backend.create_execution(lane=lane) for _ in range(30)]
        taken = []
        for turns in itertools.chain(range(12), (dice.randrange(40) for _ in range(30))):
            claim = asyncio.ensure_future(backend.claim(lane=lane, policy=policy, **WORKER))
            for _ in range(turns):
                await asyncio.sleep(0 if turns < 12 else dice.choice((0, 0, 0.0002)))
            claim.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                handle = await claim
                assert handle is not None
                taken.append(handle.fields().execution_id)
                await backend.complete(handle)
            if len(taken) > 20:
                break
        await wait_until_async(lambda: _now(lambda: not backend._giving_back))
        left = [eid for eid in made if eid not in taken]
        assert all(core_of(raw, eid)["state"] == "waiting" for eid in left)
        assert sorted(await claim_all(backend, lane)) == sorted(left)
        assert all(core_of(raw, eid)["reclaim_count"] == "0" for eid in made)


@pytest.fixture
def held(proxy, monkeypatch):
    """Makes the proxy hold back the reply to the next claim call, and none before it."""
    claim = ops.claim

    def hold():
        def once(*args, **options):
            proxy.hold(DOWN)
            monkeypatch.setattr(ops, "claim", claim)
            return claim(*args, **options)

        monkeypatch.setattr(ops, "claim", once)

    return hold


@pytest.mark.parametrize("waits", [False, True], ids=["immediate", "waiting"])
@pytest.mark.parametrize("limit", ["wait_for", "timeout", "cancel"])
async def test_a_claim_that_is_cut_off_while_its_reply_is_on_the_way_is_given_back(
    limit, waits, proxy, held, raw, lane
):
    policy = ClaimPolicy.with_max_wait(5) if waits else None
    async with aio.ValkeyBackend.connect(proxy.url) as backend:
        eid = await backend.create_execution(lane=lane)
        held()
        claim = asyncio.ensure_future(_limited(backend, limit, lane=lane, policy=policy, **WORKER))
        await wait_until_async(lambda: _now(lambda: core_of(raw, eid)["state"] == "active"))
        if limit == "cancel":
            claim.cancel()
        with pytest.raises((TimeoutError, asyncio.CancelledError)):
            await claim
        proxy.release()
        await wait_until_async(lambda: _now(lambda: waits_unclaimed(raw, eid)))
        assert await claim_all(backend, lane) == [eid]


async def _limited(backend, limit, **options):
    if limit == "wait_for":
        return await asyncio.wait_for(backend.claim(**options), 1)
    async with asyncio.timeout(1 if limit == "timeout" else None):
        return await backend.claim(**options)


async def test_a_cancelled_claim_leaves_the_hint_that_it_waited_for(server, raw, lane):
    async with (
        aio.ValkeyBackend.connect(server.url) as backend,
        aio.ValkeyBackend.connect(server.url) as other,
    ):
        wait = ClaimPolicy.with_max_wait(10)
        for _ in range(20):
            first = asyncio.ensure_future(backend.claim(lane=lane, policy=wait, **WORKER))
            await wait_until_async(lambda: _now(lambda: raw.info("clients")["blocked_clients"]))
            creation = asyncio.ensure_future(other.create_execution(lane=lane))
            await asyncio.sleep(0)
            first.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await backend.complete(await first)
                await creation
                continue
            eid = await creation
            handle = await other.claim(lane=lane, policy=wait, **WORKER)
            assert handle.fields().execution_id == eid
            await other.complete(handle)


async def test_closing_a_backend_gives_back_what_a_claim_has_just_taken(
    shell, proxy, held, raw, lane
):
    backend = await shell.connect(proxy.url)
    eid = await backend.create_execution(lane=lane)
    held()
    claim = asyncio.ensure_future(backend.claim(lane=lane, **WORKER))
    await wait_until_async(lambda: _now(lambda: core_of(raw, eid)["state"] == "active"))
    closing = asyncio.ensure_future(backend.close())
    await wait_until_async(lambda: _now(lambda: backend.closed))
    proxy.release()
    await closing
    with pytest.raises(FFError) as caught:
        await claim
    assert "closed" in str(caught.value)
    assert waits_unclaimed(raw, eid)


async def test_a_close_that_is_cancelled_gives_back_all_the_same(proxy, held, raw, lane):
    backend = await aio.ValkeyBackend.connect(proxy.url)
    eid = await backend.create_execution(lane=lane)
    held()
    claim = asyncio.ensure_future(backend.claim(lane=lane, **WORKER))
    await wait_until_async(lambda: _now(lambda: core_of(raw, eid)["state"] == "active"))
    closing = asyncio.ensure_future(backend.close())
    await asyncio.sleep(0)
    closing.cancel()
    proxy.release()
    with pytest.raises(asyncio.CancelledError):
        await closing
    with pytest.raises(FFError):
        await claim
    assert waits_unclaimed(raw, eid)


async def test_a_claim_past_its_deadline_is_given_back(shell, proxy, held, raw, lane):
    async with await shell.connect(proxy.url, timeout=1, retries=0) as backend:
        eid = await backend.create_execution(lane=lane)
        held()
        with pytest.raises(DeadlineExceeded):
            await backend.claim(lane=lane, **WORKER)
        assert core_of(raw, eid)["state"] == "active"
        proxy.release()
        if shell.kind == "asyncio":
            await wait_until_async(lambda: _now(lambda: waits_unclaimed(raw, eid)))
        # The blocking shell gives back with its next claim at the latest.
        assert await claim_all(backend, lane) == [eid]
        assert core_of(raw, eid)["reclaim_count"] == "0"


def test_an_interrupted_claim_is_given_back(proxy, held, raw, lane):
    with ff_fast.ValkeyBackend.connect(proxy.url) as backend:
        eid = backend.create_execution(lane=lane)
        held()

        def interrupt():
            wait_until(lambda: core_of(raw, eid)["state"] == "active")
            before = proxy.accepted
            os.kill(os.getpid(), signal.SIGINT)
            wait_until(lambda: proxy.accepted > before)
            proxy.release()

        interrupter = threading.Thread(target=interrupt)
        interrupter.start()
        with pytest.raises(KeyboardInterrupt):
            backend.claim(lane=lane, **WORKER)
        interrupter.join()
        assert waits_unclaimed(raw, eid)
        assert backend.claim(lane=lane, **WORKER).fields().execution_id == eid


class _Interrupt:
    """A trace function that interrupts the library at the lines with these numbers, counted from 1."""

    def __init__(self, *at):
        self._at = list(at)
        self._line = 0

    def __call__(self, frame, event, _):
        if "/ff_fast/" not in frame.f_code.co_filename:
            return None
        self._line += event == "line"
        if self._at and self._line == self._at[0]:
            self._at.pop(0)
            raise KeyboardInterrupt
        return self


def test_a_claim_that_is_interrupted_at_any_line_is_given_back(server, raw, lane):
    tracing = sys.gettrace()
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        backend.create_execution(lane=lane)
        # Half of them are interrupted again, perhaps while they give back.
        for first in itertools.count(1, 31):
            sys.settrace(_Interrupt(first, first + 60 if first % 2 else 0))
            try:
                handle = backend.claim(lane=lane, **WORKER)
            except KeyboardInterrupt:
                handle = None
            finally:
                sys.settrace(tracing)
            if handle is not None:
                break
            handle = backend.claim(lane=lane, **WORKER)
            assert handle.fields().attempt_index == 0
            backend.complete(handle)
            backend.create_execution(lane=lane)
    assert first > 200


def lapsed(raw, eid):
    """The token of an execution whose lease lapses now."""
    set_head(raw, keys.head(eid, 0), lease_expires_at=1)
    lane = core_of(raw, eid)["lane_id"]
    return reclaim_token(eid, lane, int(time.time() * 1000))


async def test_an_abandoned_take_over_is_given_back(server, raw, lane):
    async with aio.ValkeyBackend.connect(server.url) as backend:
        for turns in range(10):
            eid = await backend.create_execution(lane=lane)
            handle = await backend.claim(lane=lane, **WORKER)
            assert handle is not None
            token = lapsed(raw, eid)
            taking = asyncio.ensure_future(backend.claim_from_reclaim(token))
            for _ in range(turns):
                await asyncio.sleep(0)
            taking.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await backend.complete(await taking)
                continue
            await wait_until_async(lambda: _now(lambda: not backend._giving_back))
            if core_of(raw, eid)["state"] == "active":
                # The call was never sent: the old lease is still the one that has lapsed.
                taken = await backend.claim_from_reclaim(token)
            else:
                taken = await backend.claim(lane=lane, **WORKER)
            fields = taken.fields()
            assert (fields.execution_id, fields.attempt_index) == (eid, 1)
            assert taken.kind is ff_fast.HandleKind.RESUMED
            assert core_of(raw, eid)["reclaim_count"] == "1"
            await backend.complete(taken)


async def test_a_cancelled_worker_leaves_nothing_claimed(server, raw, lane):
    async with aio.ValkeyBackend.connect(server.url) as backend:
        made = [await backend.create_execution(lane=lane) for _ in range(40)]
        begun = set()

        async def handler(task):
            begun.add(task.execution_id)

        for turns in range(25):
            worker = asyncio.ensure_future(backend.run_worker(handler, lane=lane, concurrency=3))
            for _ in range(turns):
                await asyncio.sleep(0)
            worker.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await worker
        await wait_until_async(lambda: _now(lambda: not backend._giving_back))
        for eid in made:
            core = core_of(raw, eid)
            assert core["state"] != "active"
            assert eid in begun or core["total_attempt_count"] == core["reclaim_count"]


# -- hints that somebody else has taken --------------------------------------------------------------


@pytest.mark.parametrize("wait", [None, 0.0, 0.2])
async def test_a_hint_that_somebody_took_and_dropped_hides_no_work(
    shell, server, raw, lane, wait, monkeypatch
):
    monkeypatch.setattr(claiming, "LOOK_EVERY_S", 0.05)
    policy = None if wait is None else ClaimPolicy.with_max_wait(wait)
    async with await shell.connect(server.url) as backend:
        # The first claim of a backend looks everywhere, and so would hide what is tested.
        assert await backend.claim(lane=lane, policy=policy, **WORKER) is None
        pair = {in_partition(5) for _ in range(2)}
        for eid in pair:
            await backend.create_execution(lane=lane, execution_id=eid)
        for _ in range(2):
            assert raw.zpopmin(keys.ready(lane))
            handle = await backend.claim(lane=lane, policy=policy, **WORKER)
            pair.remove(handle.fields().execution_id)
        assert await backend.claim(lane=lane, **WORKER) is None
        assert raw.exists(keys.ready(lane), keys.hinted(lane)) == 0


async def test_of_many_callers_none_hears_that_there_is_no_work_while_work_waits(
    shell, server, lane
):
    async with contextlib.AsyncExitStack() as stack:
        backends = [
            await stack.enter_async_context(await shell.connect(server.url)) for _ in range(4)
        ]
        partitions = itertools.cycle(range(12))
        made = {
            await backends[0].create_execution(
                lane=lane, execution_id=in_partition(next(partitions))
            )
            for _ in range(120)
        }
        granted, refused, claimed = [], [], set()

        async def caller(backend):
            while True:
                began = time.monotonic()
                handle = await backend.claim(lane=lane, **WORKER)
                if handle is None:
                    refused.append(time.monotonic())
                    return
                granted.append(began)
                claimed.add(handle.fields().execution_id)

        await asyncio.gather(*(caller(backends[i % 4]) for i in range(24)))
    assert claimed == made
    assert max(granted) <= min(refused)


# -- what is not for this worker ---------------------------------------------------------------------


def calls_of(raw):
    return {name[8:]: row["calls"] for name, row in raw.info("commandstats").items()}


async def test_work_for_others_costs_an_idle_worker_nothing(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as maker:
        for offered in (CapabilitySet(), CapabilitySet(["fpga"])):
            assert await backend.claim(lane=lane, capabilities=offered, **WORKER) is None
        for i in range(120):
            await maker.create_execution(
                lane=lane, execution_id=in_partition(i % 5), required_capabilities=GPU
            )
        for offered in (CapabilitySet(), CapabilitySet(["fpga"])):
            # The first claim learns of the new requirement.
            assert await backend.claim(lane=lane, capabilities=offered, **WORKER) is None
            before = calls_of(raw)
            for _ in range(5):
                assert await backend.claim(lane=lane, capabilities=offered, **WORKER) is None
            after = calls_of(raw)
            assert after.get("fcall") == before.get("fcall")
            assert after.get("zrange", 0) - before.get("zrange", 0) <= 5
        handle = await backend.claim(lane=lane, capabilities=GPU, **WORKER)
        assert handle is not None


async def test_waiting_workers_learn_of_a_new_requirement(shell, server, raw, lane, monkeypatch):
    # Only the news can wake them.
    monkeypatch.setattr(claiming, "LOOK_EVERY_S", 30.0)
    wait = ClaimPolicy.with_max_wait(30)
    async with await shell.connect(server.url) as maker, contextlib.AsyncExitStack() as stack:
        workers = [
            await stack.enter_async_context(await shell.connect(server.url)) for _ in range(3)
        ]
        claims = [
            asyncio.ensure_future(
                each.claim(
                    lane=lane, policy=wait, capabilities=CapabilitySet(["gpu", "x"]), **WORKER
                )
            )
            for each in workers
        ]
        await wait_until_async(lambda: _now(lambda: raw.info("clients")["blocked_clients"] == 3))
        made = set()
        for needs in (["gpu"], ["gpu", "x"], ["x"]):
            made.add(
                await maker.create_execution(lane=lane, required_capabilities=CapabilitySet(needs))
            )
        handles = await asyncio.wait_for(asyncio.gather(*claims), 20)
        assert {handle.fields().execution_id for handle in handles} == made


async def test_a_lost_registry_of_requirements_only_delays(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as other:
        eid = await backend.create_execution(lane=lane, required_capabilities=GPU)
        raw.delete(keys.lane_needs(lane), keys.ready(lane, "gpu"), keys.hinted(lane, "gpu"))
        handle = await other.claim(lane=lane, capabilities=GPU, **WORKER)
        assert handle.fields().execution_id == eid
        await other.complete(handle)
        # It is registered anew, later than before.
        again = await backend.create_execution(lane=lane, required_capabilities=GPU)
        handle = await other.claim(lane=lane, capabilities=GPU, **WORKER)
        assert handle.fields().execution_id == again


async def test_what_a_cancelled_flow_holds_is_looked_at_once(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        flow = await backend.create_flow()
        members = [
            await backend.create_execution(lane=lane, flow_id=flow, priority=1) for _ in range(70)
        ]
        partition = keys.partition_index(members[0])
        free = await backend.create_execution(lane=lane, execution_id=in_partition(partition))
        await backend.cancel_flow(flow, CancelFlowPolicy.FLOW_ONLY)
        handle = await backend.claim(lane=lane, **WORKER)
        assert handle.fields().execution_id == free
        assert raw.exists(keys.eligible(keys.slot_tag(partition), lane)) == 0
        assert (await backend.describe(members[0])).state == "waiting"
        assert await backend.claim(lane=lane, **WORKER) is None


# -- foreign records ---------------------------------------------------------------------------------


async def test_junk_among_hints_and_members_harms_no_claim(shell, server, raw, lane):
    async with await shell.connect(server.url) as backend:
        eid = await backend.create_execution(lane=lane, execution_id=in_partition(7))
        needy = await backend.create_execution(
            lane=lane, execution_id=in_partition(7), required_capabilities=GPU
        )
        tag = keys.slot_tag(7)
        typed, hollow = in_partition(7), in_partition(7)
        raw.set(keys.core(typed), "a string")
        raw.hset(keys.core(hollow), "state", "waiting")
        junk = {b"junk": -9e15, b"\xff\x00": -9e15, b"-1": -9e15, b"99999": "-inf", b"1e3": -9e15}
        for needs in ("", "gpu"):
            raw.zadd(keys.ready(lane, needs), junk)
            raw.hset(keys.hinted(lane, needs), mapping=dict.fromkeys(junk, b"m"))
            raw.zadd(keys.eligible(tag, lane, needs), {**junk, typed: -9e15, hollow: -9e15})
            # Of the other requirement: it is claimed from where it belongs.
            raw.zadd(keys.eligible(tag, lane, needs), {needy if not needs else eid: -9e15})
        raw.sadd(keys.needs(tag, lane), b"\xff", b"", b",", "gpu")
        raw.zadd(keys.lane_needs(lane), {b"\xff": 1, b"": 2, b",": 3, b"x": "+inf", b"y": 1e300})
        handle = await backend.claim(lane=lane, **WORKER)
        assert handle.fields().execution_id == eid
        handle = await backend.claim(lane=lane, capabilities=GPU, **WORKER)
        assert handle.fields().execution_id == needy
        for offered in (CapabilitySet(), GPU):
            assert await backend.claim(lane=lane, capabilities=offered, **WORKER) is None
        for needs in ("", "gpu"):
            assert raw.exists(keys.ready(lane, needs), keys.eligible(tag, lane, needs)) == 0


LANE_KEYS = {
    "ready": keys.ready,
    "hinted": keys.hinted,
    "needs of the lane": keys.lane_needs,
    "ready for gpu": lambda lane: keys.ready(lane, "gpu"),
}


@pytest.mark.parametrize("name", LANE_KEYS)
async def test_a_key_of_another_type_in_a_lane_stops_no_claim(name, shell, server, raw, lane):
    key = LANE_KEYS[name](lane)
    async with await shell.connect(server.url) as backend, await shell.connect(server.url) as maker:
        for policy in (ClaimPolicy.immediate(), ClaimPolicy.with_max_wait(0.2)):
            raw.set(key, "foreign")
            eid = keys.new_execution_id()
            # The hint may be refused, the work is there.
            with contextlib.suppress(FFError):
                await maker.create_execution(lane=lane, execution_id=eid)
            handle = await backend.claim(lane=lane, policy=policy, capabilities=GPU, **WORKER)
            assert handle.fields().execution_id == eid
            await backend.complete(handle)
            assert await backend.claim(lane=lane, policy=policy, capabilities=GPU, **WORKER) is None
            raw.delete(key)


PARTITION_KEYS = {
    "eligible": lambda tag, lane: keys.eligible(tag, lane, "gpu"),
    "timers": lambda tag, lane: keys.timers(tag),
    "leases": lambda tag, lane: keys.leases(tag),
    "needs": keys.needs,
}


@pytest.mark.parametrize("name", PARTITION_KEYS)
async def test_a_key_of_another_type_in_a_partition_harms_that_partition_alone(
    name, shell, server, raw, lane
):
    partition = next(_partitions)
    key = PARTITION_KEYS[name](keys.slot_tag(partition), lane)
    async with await shell.connect(server.url) as backend:
        stuck = await backend.create_execution(
            lane=lane,
            execution_id=in_partition(partition),
            priority=9,
            required_capabilities=GPU,
        )
        eid = await backend.create_execution(lane=lane, execution_id=in_partition(0))
        kept = raw.dump(key)
        raw.set(key, "foreign")
        handle = await backend.claim(lane=lane, capabilities=GPU, **WORKER)
        assert handle.fields().execution_id == eid
        assert await backend.claim(lane=lane, capabilities=GPU, **WORKER) is None
        assert core_of(raw, stuck)["state"] == "waiting"
        raw.delete(key)
        if kept:
            raw.restore(key, 0, kept)
        # The next look finds it again; the first claim of a backend looks everywhere.
        async with await shell.connect(server.url) as other:
            handle = await other.claim(lane=lane, capabilities=GPU, **WORKER)
            assert handle.fields().execution_id == stuck


_partitions = itertools.count(200)


# -- giving back, on the server ----------------------------------------------------------------------


def give_back(backend, handle):
    fields = handle.fields()
    op = ops.give_back(keys.partition_index(fields.execution_id), fields.lease_id)
    return backend._run(operations.Call(lambda: ops.call(op)))


def test_an_attempt_that_is_given_back_has_not_been(server, raw, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid = backend.create_execution(lane=lane, attempt_timeout=60)
        first = backend.claim(lane=lane, **WORKER)
        given, hints = give_back(backend, first)
        assert (given, [(told, needs) for told, needs, _ in hints]) == (True, [(lane, "")])
        assert give_back(backend, first) == (False, [])
        assert backend.describe(eid).attempt_index is None
        assert "started_at" not in core_of(raw, eid)
        assert raw.zscore(keys.timers(keys.slot_tag_of(eid)), f"attempt:{eid}") is None
        with pytest.raises(StaleOwner):
            backend.open_writer(first)
        second = backend.claim(lane=lane, **WORKER)
        assert (second.fields().attempt_index, second.kind) == (0, ff_fast.HandleKind.FRESH)
        assert second.fields().lease_epoch == 2
        with backend.open_writer(second) as writer:
            writer.write(b"x")
        backend.complete(second)
        items = list(backend.tail(eid))
        assert [getattr(item, "payload", None) for item in items] == [b"x", None]


def test_a_continued_attempt_that_is_given_back_continues_later(server, raw, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid = backend.create_execution(lane=lane, attempt_timeout=60)
        first = backend.claim(lane=lane, **WORKER)
        with backend.open_writer(first) as writer:
            writer.write(b"a")
        # Without children it continues at once.
        backend.wait_children(first)
        given, _ = give_back(backend, backend.claim(lane=lane, **WORKER))
        assert given
        assert head_of(raw, keys.head(eid, 0)).lease_expires_at == 0
        again = backend.claim(lane=lane, **WORKER)
        assert (again.fields().attempt_index, again.kind) == (0, ff_fast.HandleKind.RESUMED)
        assert raw.zscore(keys.timers(keys.slot_tag_of(eid)), f"attempt:{eid}") is not None
        with backend.open_writer(again) as writer:
            assert writer.write(b"b") == 2
        backend.complete(again)
        assert [item.payload for item in list(backend.tail(eid))[:2]] == [b"a", b"b"]


def test_a_replacement_that_is_given_back_replaces_the_lost_worker_later(server, raw, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid = backend.create_execution(lane=lane)
        backend.claim(lane=lane, **WORKER)
        assert give_back(backend, backend.claim_from_reclaim(lapsed(raw, eid)))[0]
        again = backend.claim(lane=lane, **WORKER)
        assert (again.fields().attempt_index, again.kind) == (1, ff_fast.HandleKind.RESUMED)
        assert core_of(raw, eid)["reclaim_count"] == "1"
        # What fails for another reason is retried afresh.
        backend.complete(again)


@pytest.mark.parametrize("policy", [CancelFlowPolicy.CANCEL_ALL, CancelFlowPolicy.FLOW_ONLY])
def test_what_is_given_back_to_a_cancelled_flow_is_for_nobody(policy, server, raw, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        flow = backend.create_flow()
        eid = backend.create_execution(lane=lane, flow_id=flow)
        handle = backend.claim(lane=lane, **WORKER)
        backend.cancel_flow(flow, policy, CancelFlowWait.NO_WAIT)
        assert give_back(backend, handle) == (True, [])
        ended = policy is CancelFlowPolicy.CANCEL_ALL
        assert core_of(raw, eid)["state"] == ("cancelled" if ended else "waiting")
        assert backend.claim(lane=lane, **WORKER) is None
        assert raw.exists(keys.eligible(keys.slot_tag_of(eid), lane)) == 0
        if ended:
            (end,) = backend.tail(eid)
            assert end.reason == "attempt_cancelled"
