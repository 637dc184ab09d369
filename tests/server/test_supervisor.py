"""Supervisors: what is due is fired once, by however many of them, and nothing stands in the way of the next."""

import asyncio
import threading
import time

import pytest

import ff_fast
from ff_fast import (
    ClaimPolicy,
    HandleKind,
    RetryPolicy,
    ScannerFilter,
    TimeoutBehavior,
    WaitpointKind,
    WaitpointSpec,
    aio,
    errors,
    keys,
)
from ff_fast._core import supervision as supervision_core

from ..heads import set_head
from ..shells import KINDS, WORKER
from ..waiting import wait_until
from .streams import server_ms
from .workers import Supervisor


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def supervisor(kind, server):
    with Supervisor(kind, server.url) as running:
        yield running


def history(backend, eid):
    return [step.to_state for step in backend.describe(eid).history]


def due_now(raw, *eids, kind="lease"):
    now = server_ms(raw)
    for eid in eids:
        raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"{kind}:{eid}": now - 1})


@pytest.mark.cluster
def test_a_lapsed_lease_makes_way_for_another_worker(supervisor, backend, lane):
    eid = backend.create_execution(lane=lane)
    backend.claim(lane=lane, **WORKER, lease_ttl_ms=50)
    handle = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert (handle.kind, handle.fields().execution_id) == (HandleKind.RESUMED, eid)
    assert backend.describe_stream(eid, 0).closed_reason == "producer_lost"


def test_a_renewed_lease_is_not_taken(supervisor, backend, lane, raw):
    eid = backend.create_execution(lane=lane)
    backend.claim(lane=lane, **WORKER, lease_ttl_ms=30_000)
    due_now(raw, eid)
    timers = keys.timers(keys.slot_tag_of(eid))
    wait_until(lambda: raw.zscore(timers, f"lease:{eid}") > server_ms(raw))
    assert history(backend, eid) == ["active"]


def test_delays_deadlines_timeouts_and_forced_cancellations(supervisor, backend, lane):
    def claimed(**options):
        eid = backend.create_execution(lane=lane, **options)
        handle = backend.claim(lane=lane, **WORKER)
        assert handle.fields().execution_id == eid
        return eid, handle

    late = backend.create_execution(lane=lane, deadline=0.02)
    wait_until(lambda: backend.describe(late).state == "expired")
    slow, _ = claimed(attempt_timeout=0.02)
    wait_until(lambda: backend.describe(slow).state == "expired")
    stubborn, _ = claimed()
    backend.cancel(stubborn, grace=0.02)
    wait_until(lambda: backend.describe(stubborn).state == "cancelled")
    unheard, handle = claimed()
    waitpoint = backend.create_waitpoint(handle)
    spec = WaitpointSpec(kind=WaitpointKind.EXTERNAL, matcher=b"", hmac_token=waitpoint.hmac_token)
    backend.suspend(handle, spec, timeout=0.02, on_timeout=TimeoutBehavior.FAIL)
    wait_until(lambda: backend.describe(unheard).state == "failed")
    delayed = backend.create_execution(lane=lane, delay=0.02)
    handle = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert handle.fields().execution_id == delayed


def test_a_retry_comes_after_its_delay(supervisor, backend, lane):
    eid = backend.create_execution(lane=lane, retry=RetryPolicy(max_retries=1, delay=0.04))
    handle = backend.claim(lane=lane, **WORKER)
    outcome = backend.fail(handle, "x", ff_fast.FailureClass.TRANSIENT)
    assert outcome.retry_scheduled
    again = backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(10))
    assert again.fields().attempt_index == 1
    claimed_at = backend.describe(eid).history[-1].at_ms
    assert claimed_at >= outcome.delay_until_ms


def test_the_backlog_of_a_cancelled_flow_is_worked_off(supervisor, backend, lane, raw):
    flow = backend.create_flow()
    members = [backend.create_execution(lane=lane, flow_id=flow) for _ in range(250)]
    backend.cancel_flow(flow, wait=ff_fast.CancelFlowWait.NO_WAIT)
    raw.zadd(keys.timers(keys.slot_tag_of(members[0])), {f"flow:{flow}": 1})
    wait_until(lambda: not backend.describe_flow(flow).open_members)
    assert {backend.describe(eid).state for eid in members} == {"cancelled"}


@pytest.mark.cluster
def test_several_supervisors_fire_each_timer_once(kind, server, backend, lane, raw):
    eids = [backend.create_execution(lane=lane) for _ in range(60)]
    for _ in eids:
        backend.claim(lane=lane, **WORKER, lease_ttl_ms=1)
    due_now(raw, *eids)
    with (
        Supervisor(kind, server.url, interval=0.001),
        Supervisor("sync", server.url, interval=0.001),
        Supervisor("asyncio", server.url, interval=0.001),
    ):
        wait_until(lambda: all(backend.describe(eid).state == "waiting" for eid in eids))
    for eid in eids:
        assert history(backend, eid) == ["active", "waiting"]
        assert backend.describe(eid).reclaim_count == 1


def test_a_filter_leaves_the_rest_to_others(kind, server, backend, lane, raw):
    namespace = f"ns-{lane}"
    theirs = backend.create_execution(lane=lane, namespace="other")
    tagged = backend.create_execution(lane=lane, namespace=namespace, tags={"app.a": "1"})
    untagged = backend.create_execution(lane=lane, namespace=namespace)
    for _ in range(3):
        backend.claim(lane=lane, **WORKER, lease_ttl_ms=1)
    due_now(raw, theirs, tagged, untagged)
    scope = ScannerFilter().with_namespace(namespace)
    with Supervisor(kind, server.url, scope.with_instance_tag("app.a", "1")):
        wait_until(lambda: backend.describe(tagged).state == "waiting")
        assert backend.describe(untagged).state == "active"
        with Supervisor(kind, server.url, scope):
            wait_until(lambda: backend.describe(untagged).state == "waiting")
    assert backend.describe(theirs).state == "active"


def test_a_thousand_that_are_stuck_do_not_starve_the_next(supervisor, backend, lane, raw):
    eid = backend.create_execution(lane=lane)
    backend.claim(lane=lane, **WORKER, lease_ttl_ms=1)
    tag = keys.slot_tag_of(eid)
    timers = keys.timers(tag)
    # Timers of executions that a call cannot handle, in front of it: of another type, and of a state that is none.
    stuck = [f"{tag}:00000000-0000-4000-8000-{number:012d}" for number in range(1_000)]
    try:
        with raw.pipeline() as pipe:
            for number, other in enumerate(stuck):
                if number % 2:
                    pipe.set(keys.core(other), "no hash")
                else:
                    pipe.hset(keys.core(other), mapping={"state": "active", "namespace": "x"})
                    pipe.hset(keys.core(other), "current_attempt_index", "0")
                pipe.zadd(timers, {f"lease:{other}": 1})
            pipe.zadd(timers, {f"flow:{keys.new_uuid()}": 2, "nonsense": 3, "lease:nonsense": 4})
            pipe.execute()
        due_now(raw, eid)
        wait_until(lambda: backend.describe(eid).state == "waiting")
        assert supervisor.is_alive()
    finally:
        members = [
            m for m in raw.zrange(timers, 0, -1) if b"0000-4000-8000" in m or m[:4] == b"flow"
        ]
        raw.zrem(timers, *members)
        raw.delete(*(keys.core(other) for other in stuck))


def test_it_outlives_a_lost_connection(supervisor, backend, lane, raw):
    for _ in range(3):
        raw.client_kill_filter(_type="normal", skipme=True)
        eid = keys.new_execution_id()
        wait_until(lambda eid=eid: _created(backend, lane, eid))
        wait_until(lambda eid=eid: backend.describe(eid).state == "expired")


def _created(backend, lane, eid):
    return backend.create_execution(lane=lane, execution_id=eid, deadline=0.01)


def test_stop_is_heard_at_once(kind, server):
    running = Supervisor(kind, server.url, interval=3_600).begin()
    began = time.monotonic()
    running.ask()
    running.result()
    assert time.monotonic() - began < 10


def test_one_that_is_stopped_already_does_nothing(backend):
    stop = threading.Event()
    stop.set()
    backend.supervise(stop=stop)


def test_closing_the_backend_ends_it(kind, server):
    running = Supervisor(kind, server.url, interval=0.01).begin()
    running.close_backend()
    running.result()


def test_cancelling_one_of_asyncio(server):
    running = Supervisor("asyncio", server.url, interval=3_600).begin()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        running.result()


def test_a_refusal_for_good_is_raised(kind, server, monkeypatch):
    def refuse(self):
        raise errors.PermissionDenied
        yield

    monkeypatch.setattr(supervision_core.Supervision, "round", refuse)
    running = Supervisor(kind, server.url).begin()
    with pytest.raises(errors.PermissionDenied):
        running.result()


def supervising():
    return [t for t in threading.enumerate() if t.name == "ff_fast supervisor"]


def test_an_embedded_server_brings_its_own(kind, lane):
    before = supervising()
    if kind == "sync":
        with ff_fast.ValkeyBackend.embedded() as own:
            assert len(supervising()) == len(before) + 1
            eid = own.create_execution(deadline=0.01)
            wait_until(lambda: own.describe(eid).state == "expired")
        wait_until(lambda: supervising() == before)
    else:

        async def main():
            async with aio.ValkeyBackend.embedded() as own:
                eid = await own.create_execution(deadline=0.01)
                async for item in own.tail(eid):
                    assert item.reason == "expired"
            assert asyncio.all_tasks() == {asyncio.current_task()}

        asyncio.run(main())


# -- foreign data ----------------------------------------------------------------------------------------


def in_partition(index):
    return f"{{fp:{index}}}:{keys.new_uuid()}"


def lost(backend, lane, raw, eid):
    """An execution whose worker is gone."""
    backend.create_execution(lane=lane, execution_id=eid)
    handle = backend.claim(lane=lane, **WORKER)
    assert handle.fields().execution_id == eid
    set_head(raw, keys.head(eid, 0), lease_expires_at=1)
    return eid


def damaged(raw, key):
    """Put another type in the place of a key; returns what puts it back."""
    stored = raw.dump(key)
    raw.delete(key)
    raw.set(key, "junk")

    def repair():
        raw.delete(key)
        if stored is not None:
            raw.restore(key, 0, stored)

    return repair


def test_timers_of_another_type_stop_their_partition_alone(supervisor, backend, lane, raw):
    first, second = (lost(backend, lane, raw, in_partition(index)) for index in (3, 4))
    repair = damaged(raw, keys.timers("{fp:3}"))
    due_now(raw, second)
    wait_until(lambda: backend.describe(second).state == "waiting")
    repair()
    due_now(raw, first)
    wait_until(lambda: backend.describe(first).state == "waiting")


@pytest.mark.parametrize("name", ["core", "head", "meta", "tags", "eligible", "flow"])
def test_a_timer_that_foreign_data_stops_stops_no_other(kind, server, backend, lane, raw, name):
    ill, well = (lost(backend, lane, raw, in_partition(5)) for _ in range(2))
    other = f"{lane[:50]}-other"
    raw.hset(keys.core(well), "lane_id", other)
    flow = backend.create_flow()
    raw.hset(keys.core(ill), "flow_id", flow)
    key = {
        "core": keys.core(ill), "head": keys.head(ill, 0), "meta": keys.meta(ill, 0), "tags": keys.tags(ill),
        "eligible": keys.eligible("{fp:5}", lane), "flow": keys.flow("{fp:5}", flow),
    }[name]  # fmt: skip
    raw.hset(keys.core(ill), "namespace", "n")
    raw.hset(keys.core(well), "namespace", "n")
    raw.hset(keys.tags(well), "a.b", "c")
    raw.hset(keys.tags(ill), "a.b", "c")
    repair = damaged(raw, key)
    timers = keys.timers("{fp:5}")
    # What other tests have left there, and what is outside the scope, is nothing to this supervisor.
    raw.delete(timers)
    raw.zadd(
        timers,
        {"lease": 1, "junk:\xff": 1, f"lease:{{fp:5}}:{keys.new_uuid()}": 1, f"flow:{flow}": 1},
    )
    raw.zadd(timers, {f"lease:{ill}": 2, f"lease:{well}": 3})
    scope = ScannerFilter(namespace="n").with_instance_tag("a.b", "c")
    with Supervisor(kind, server.url, scope=scope, interval=0.001):
        wait_until(lambda: raw.hget(keys.core(well), "state") == b"waiting")
        # It is put off, so that no round is spent on it.
        wait_until(lambda: raw.zscore(timers, f"lease:{ill}") > server_ms(raw) + 30_000)
        wait_until(lambda: raw.zcount(timers, "-inf", server_ms(raw)) == 0)
        repair()
        raw.zadd(timers, {f"lease:{ill}": 2})
        wait_until(lambda: raw.hget(keys.core(ill), "state") == b"waiting")


@pytest.mark.parametrize("name", ["core", "meta", "attempt"])
def test_work_that_could_not_be_claimed_is_claimed_once_it_is_mended(
    supervisor, backend, lane, raw, name
):
    eid = backend.create_execution(lane=lane)
    key = {"core": keys.core(eid), "meta": keys.meta(eid, 0), "attempt": keys.attempt(eid, 0)}[name]
    repair = damaged(raw, key)
    assert backend.claim(lane=lane, **WORKER) is None
    timers = keys.timers(keys.slot_tag_of(eid))
    assert raw.zscore(timers, f"eligible:{eid}") > server_ms(raw) + 30_000
    repair()
    due_now(raw, eid, kind="eligible")
    wait_until(lambda: backend.claim(lane=lane, **WORKER) is not None)


def test_lost_executions_are_found_beside_foreign_data(backend, lane, raw):
    ill, well = (lost(backend, lane, raw, in_partition(6)) for _ in range(2))
    due_now(raw, ill, well)
    repairs = [damaged(raw, keys.core(ill)), damaged(raw, keys.timers("{fp:7}"))]
    raw.zadd(keys.timers("{fp:6}"), {"lease:junk": 1})
    found = [token.grant.execution_id for token in backend.find_reclaimable(limit=10_000)]
    for repair in repairs:
        repair()
    raw.zrem(keys.timers("{fp:6}"), "lease:junk")
    assert well in found
    assert ill not in found
