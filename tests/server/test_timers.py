"""Timers and the supervisors that fire them: each fires once, and none starves behind another."""

import threading

import pytest

from ff_fast import (
    RetryBackoff,
    RetryPolicy,
    ScannerFilter,
    TimeoutBehavior,
    WaitpointKind,
    WaitpointSpec,
    keys,
)
from ff_fast._core import ops
from ff_fast._core import supervision as supervision_core
from ff_fast._core.deployment import Deployment
from ff_fast._core.operations import Call

from .executions import World, beside

RETRY = RetryPolicy(max_retries=1, backoff=RetryBackoff.FIXED, delay=60)


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


def armed(world, kind, **options):
    """An execution with a timer of a kind that is due."""
    if kind in ("delay", "deadline"):
        eid = world.create(delay=60 if kind == "delay" else None, deadline=60, **options)
    else:
        eid, handle = world.owned(attempt_timeout=60, **options)
        if kind == "suspension":
            point = world.backend.create_waitpoint(handle)
            spec = WaitpointSpec(WaitpointKind.EXTERNAL, b"", point.hmac_token)
            world.backend.suspend(handle, spec, timeout=60, on_timeout=TimeoutBehavior.EXPIRE)
        elif kind == "cancel":
            world.backend.cancel(eid, grace=60)
    assert kind in world.timers(eid)
    world.due(eid, kind)
    return eid


KINDS = {
    "lease": "waiting", "delay": "waiting", "attempt": "expired", "deadline": "expired",
    "suspension": "expired", "cancel": "cancelled",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cluster
def test_each_kind_fires_once(world, kind):
    eid = armed(world, kind)
    before = len(world.backend.describe(eid).history)
    assert [world.round(), world.round()] == [1, 0]
    assert world.state(eid) == KINDS[kind]
    assert kind not in world.timers(eid)
    world.check(eid)
    assert len(world.backend.describe(eid).history) == before + 1


def test_what_fires_into_waiting_is_heard_of_at_once(world):
    """No sweep: the hint comes with the fired timer."""
    armed(world, "lease")
    world.round()
    on = world.backend._deployment
    on.sweep_due(on.offer(world.lane, ()).kind, 0)
    assert world.claim() is not None


@pytest.mark.parametrize("kind", KINDS)
def test_a_timer_that_is_not_due_is_left(world, kind):
    eid = armed(world, kind)
    timers = keys.timers(keys.slot_tag_of(eid))
    (name,) = [n for n in world.raw.zrange(timers, 0, 0) if n.startswith(kind.encode())]
    world.raw.zadd(timers, {name: world.now() + 60_000})
    state = world.state(eid)
    assert world.round() == 0
    op = ops.fire_timer(keys.slot_tag_of(eid), name, kind, eid, ScannerFilter.NOOP)
    assert world.call(op) == ("later", [])
    assert world.state(eid) == state
    assert kind in world.timers(eid)
    world.raw.zrem(timers, name)
    assert world.call(op) == ("done", [])
    assert world.state(eid) == state


@pytest.mark.parametrize("retry, state", [(None, "expired"), (RETRY, "delayed")])
def test_an_attempt_that_takes_too_long_is_retried_or_expires(world, retry, state):
    eid = armed(world, "attempt", retry=retry)
    world.round()
    assert world.state(eid) == state
    assert world.backend.describe_stream(eid, 0).closed_reason == "attempt_timeout"
    world.check(eid)


def test_the_timer_of_a_renewed_lease_moves_to_its_end(world):
    eid, handle = world.owned()
    timers = keys.timers(keys.slot_tag_of(eid))
    expires_at = world.backend.renew(handle, 90_000).expires_at_ms
    world.raw.zadd(timers, {f"lease:{eid}": 1})
    assert world.round() == 0
    assert world.timers(eid) == {"lease": expires_at}
    assert world.state(eid) == "active"
    # A shorter one is found when it ends, not when the longer one would have.
    expires_at = world.backend.renew(handle, 50_000).expires_at_ms
    assert world.timers(eid) == {"lease": expires_at}
    world.backend.renew(handle, 500_000)
    assert world.timers(eid) == {"lease": expires_at}


def test_several_supervisors_at_once_do_no_harm(world):
    # The claims of the others must find nothing that waits.
    kinds = [kind for kind in KINDS if kind != "deadline"] + ["deadline"]
    eids = {kind: [armed(world, kind) for _ in range(8)] for kind in kinds}
    histories = {
        eid: len(world.backend.describe(eid).history) for group in eids.values() for eid in group
    }
    start = threading.Barrier(4)
    fired, failures = [], []

    def supervise():
        supervision = supervision_core.Supervision(Deployment(), world.scope)
        try:
            start.wait(10)
            fired.extend(world.backend._run(Call(supervision.round)) for _ in range(3))
        except BaseException as error:
            failures.append(error)
            raise

    threads = [threading.Thread(target=supervise) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    for kind, group in eids.items():
        for eid in group:
            assert world.state(eid) == KINDS[kind]
            assert len(world.backend.describe(eid).history) == histories[eid] + 1
            world.check(eid)
            if kind == "lease":
                assert world.core(eid)["reclaim_count"] == "1"


def beside_with_timers(world, eid, count, **options):
    """Executions of the same partition whose deadline has passed, before everything else."""
    found = [world.create(execution_id=beside(eid), deadline=60, **options) for _ in range(count)]
    timers = keys.timers(keys.slot_tag_of(eid))
    world.raw.zadd(timers, {f"deadline:{other}": 0 for other in found})
    return found


def test_a_thousand_timers_of_others_do_not_starve_the_next(world):
    eid = world.create(deadline=60)
    others = beside_with_timers(world, eid, 1_000, namespace="other")
    world.due(eid, "deadline")
    assert world.round() == 1
    assert world.state(eid) == "expired"
    assert {world.state(other) for other in others} == {"waiting"}
    assert world.round(ScannerFilter(namespace="other")) == 1_000
    assert {world.state(other) for other in others} == {"expired"}


def test_a_thousand_stuck_executions_do_not_starve_the_next(world):
    """The unnamed ones of lease expiry and of every scanner: what cannot be handled filled its batch for ever."""
    eid = world.create(deadline=60)
    elsewhere = world.create(deadline=60)
    stuck = [beside(eid) for _ in range(1_000)]
    pipe = world.raw.pipeline()
    for other in stuck:
        pipe.set(keys.core(other), "no hash")
    pipe.execute()
    timers = keys.timers(keys.slot_tag_of(eid))
    world.raw.zadd(timers, {f"lease:{other}": 0 for other in stuck})
    try:
        world.due(eid, "deadline")
        world.due(elsewhere, "deadline")
        world.round()
        assert world.state(eid) == world.state(elsewhere) == "expired"
    finally:
        world.raw.delete(*map(keys.core, stuck))
    # Now they are gone, and so are their timers.
    world.round()
    assert world.raw.zcount(timers, "-inf", 1) == 0


def test_a_round_of_thousands_finishes_all_that_is_due(world):
    eid = world.create(deadline=60)
    others = beside_with_timers(world, eid, 350)
    world.due(eid, "deadline")
    assert world.round() == 351
    assert {world.state(other) for other in others} == {"expired"}


@pytest.mark.parametrize(
    "scope, wanted",
    [
        (ScannerFilter(), {"a", "b", "c", "d"}),
        (ScannerFilter(namespace="one"), {"a", "b"}),
        (ScannerFilter(instance_tag=("app.id", "x")), {"a", "c"}),
        (ScannerFilter(namespace="one", instance_tag=("app.id", "x")), {"a"}),
        (ScannerFilter(namespace="none"), set()),
        (ScannerFilter(instance_tag=("app.other", "x")), set()),
    ],
)
@pytest.mark.parametrize("kind", ["lease", "deadline"])
def test_a_supervisor_looks_after_its_own(world, scope, wanted, kind):
    eids = {
        name: armed(world, kind, namespace=namespace, tags={"app.id": tag})
        for name, namespace, tag in [
            ("a", "one", "x"), ("b", "one", "y"), ("c", "two", "x"), ("d", "two", "y"),
        ]
    }  # fmt: skip
    world.round(scope)
    done = {name for name, eid in eids.items() if world.state(eid) == KINDS[kind]}
    assert done == wanted
    world.round(ScannerFilter.NOOP)
    for eid in eids.values():
        world.check(eid)
