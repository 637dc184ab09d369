"""How executions end, are put off and are tried again; every defect of the engine this one comes from, by its name."""

import threading

import pytest

from ff_fast import (
    CapabilitySet,
    End,
    FailOutcome,
    FailureClass,
    FailureReason,
    HandleKind,
    RetryBackoff,
    RetryPolicy,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast._core import ops

from .executions import TERMINAL, World, beside
from .readers import wait_listening

TRANSIENT, PERMANENT, TIMEOUT, CRASH, CANCELLED = (
    FailureClass.TRANSIENT, FailureClass.PERMANENT, FailureClass.TIMEOUT,
    FailureClass.INFRA_CRASH, FailureClass.CANCELLED,
)  # fmt: skip
RETRY = RetryPolicy(max_retries=2, backoff=RetryBackoff.FIXED, delay=5, jitter_percent=0)


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


def suspend(world, handle, **options):
    point = world.backend.create_waitpoint(handle)
    condition = WaitpointSpec(WaitpointKind.EXTERNAL, b"", point.hmac_token)
    world.backend.suspend(handle, condition, **options)
    return point


# -- create ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delay", [None, 0, 0.0004, 60])
def test_the_server_alone_decides_which_index_a_new_execution_is_in(world, delay):
    eid = world.create(delay=delay)
    assert world.state(eid) == ("delayed" if delay == 60 else "waiting")
    world.check(eid)


def test_a_delay_that_is_over_when_it_arrives_is_found_by_its_timer(world):
    eid = world.create(delay=60)
    assert world.fire(eid, "delay") == 1
    world.check(eid)
    assert world.claim().fields().execution_id == eid


def test_who_lacks_a_capability_claims_nothing(world):
    eid = world.create(required_capabilities=CapabilitySet(["gpu"]))
    assert world.claim() is None
    assert world.claim(capabilities=CapabilitySet(["gpu"])).fields().execution_id == eid


@pytest.mark.parametrize("at", [3, 5, 6, 7, 11, 13, 14, 15, 16, 17, 18])
def test_a_bad_number_is_refused_before_anything_is_written(world, at):
    eid = keys.new_execution_id()
    op = ops.create_execution(
        eid, namespace="n", lane=world.lane, priority=0, required_capabilities=b"",
        retention_ms=1000, delay_ms=0, deadline_ms=0, attempt_timeout_ms=0, flow_id="",
        parent_id="", budget_ids=[], retry=RetryPolicy(), payload=b"p", tags={},
    )  # fmt: skip
    for bad in (b"x", b"", b"-1", b"1.5", b"1e3", b"9007199254740992"):
        argv = (*op.argv[:at], bad, *op.argv[at + 1 :])
        with pytest.raises(errors.InvalidInput):
            world.call(op._replace(argv=argv))
    assert world.keys_of(eid) == set()
    assert not world.is_eligible(eid)


def test_an_id_stands_for_one_creation(world):
    """By contract the first creation wins: an id is made for one call, whose repeat it is recognised by."""
    eid = world.create(payload=b"one", priority=1, tags={"a.b": "c"})
    assert world.create(execution_id=eid, payload=b"two", priority=2, delay=60) == eid
    assert world.core(eid)["priority"] == "1"
    assert world.backend.read_payload(world.claim()) == b"one"
    world.check(eid)


# -- claim -------------------------------------------------------------------------------------------


def test_a_resumed_execution_at_the_head_is_claimed_as_any_other(world):
    eid, handle = world.owned(priority=9)
    point = suspend(world, handle)
    other = world.create(execution_id=beside(eid))
    world.backend.deliver_signal(eid, point, "go")
    resumed = world.claim()
    assert (resumed.fields().execution_id, resumed.kind) == (eid, HandleKind.RESUMED)
    fresh = world.claim()
    assert (fresh.fields().execution_id, fresh.kind) == (other, HandleKind.FRESH)


def test_a_member_whose_execution_is_gone_does_not_stop_a_claim(world):
    gone = world.create(priority=9)
    eid = world.create(execution_id=beside(gone))
    world.raw.delete(keys.core(gone))
    assert world.claim().fields().execution_id == eid
    assert not world.is_eligible(gone)


def test_a_claim_reads_no_policy_that_could_be_malformed(world):
    """Cannot exist: a policy is numbers, checked at creation. What a claim is told is checked before it writes."""
    eid = world.create()
    op = ops.claim_execution(
        eid, lane=world.lane, worker_id="w", worker_instance_id="i", lease_id=keys.new_uuid(),
        lease_ttl_ms=1000, attempt_id=keys.new_uuid(), reclaim=False, capabilities=(),
    )  # fmt: skip
    for bad in (b"0", b"x", b"-1", b""):
        argv = (*op.argv[:3], bad, *op.argv[4:])
        with pytest.raises(errors.InvalidInput):
            world.call(op._replace(argv=argv))
    world.check(eid)
    assert world.state(eid) == "waiting"
    world.call(op)
    world.check(eid)


def test_the_lane_is_the_executions_own(world):
    """There is no grant whose worker could differ; and an execution leaves the set of the lane that it was made for."""
    eid = world.create()
    op = ops.claim_execution(
        eid, lane="another", worker_id="w", worker_instance_id="i", lease_id=keys.new_uuid(),
        lease_ttl_ms=1000, attempt_id=keys.new_uuid(), reclaim=False, capabilities=(),
    )  # fmt: skip
    world.call(op)
    assert not world.is_eligible(eid)
    world.check(eid)


def test_every_claim_applies_the_time_limits(world):
    eid, handle = world.owned(attempt_timeout=60, deadline=120, retry=RETRY)
    for _ in range(2):
        timers = world.timers(eid)
        assert timers.keys() == {"lease", "attempt", "deadline"}
        assert 59_000 < timers["attempt"] - world.now() <= 60_000
        world.backend.fail(handle, "again", TRANSIENT)
        world.check(eid, attempt_timer=False)
        world.fire(eid, "delay")
        handle = world.claim()
    world.fire(eid, "lease")
    token_less = world.claim()
    world.check(eid, attempt_timer=True)
    world.backend.complete(token_less)
    world.check(eid)


def test_a_delayed_execution_cannot_be_claimed(world):
    """The unnamed one of the resumed claim: it did not look whether the execution was due."""
    eid, handle = world.owned()
    world.backend.delay(handle, 60)
    op = ops.claim_execution(
        eid, lane=world.lane, worker_id="w", worker_instance_id="i", lease_id=keys.new_uuid(),
        lease_ttl_ms=1000, attempt_id=keys.new_uuid(), reclaim=True, capabilities=(),
    )  # fmt: skip
    with pytest.raises(errors.ExecutionNotClaimable):
        world.call(op)
    world.check(eid)


# -- progress ----------------------------------------------------------------------------------------


def test_progress_keeps_what_is_left_out(world):
    """The unnamed ones of update_progress: 250 per cent, and a message that resets the percentage."""
    eid, handle = world.owned()
    world.backend.progress(handle, 40, "half")
    world.backend.progress(handle, message="still")
    world.backend.progress(handle, 41)
    core = world.core(eid)
    assert (core["progress_percent"], core["progress_message"]) == ("41", "still")
    op = ops.report_progress(ops.Attempt.of(handle), 101, "")
    with pytest.raises(errors.InvalidInput):
        world.call(op)


# -- terminal calls ----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["complete", "fail", "delay", "wait_children"])
def test_a_repeat_by_the_same_lease_gets_the_first_answer_and_others_get_none(world, how):
    eid, handle = world.owned(retry=RETRY)
    backend = world.backend
    calls = {
        "complete": lambda: backend.complete(handle, b"r"),
        "fail": lambda: backend.fail(handle, "why", TRANSIENT),
        "delay": lambda: backend.delay(handle, 60),
        "wait_children": lambda: backend.wait_children(handle),
    }
    first = calls[how]()
    before = (world.core(eid), world.timers(eid), world.completions(eid))
    for name, call in calls.items():
        if name == how:
            assert call() == first
            assert call() == first
        else:
            with pytest.raises(errors.ExecutionNotActive):
                call()
    assert (world.core(eid), world.timers(eid), world.completions(eid)) == before
    world.check(eid)


def test_the_repeat_is_answered_also_while_the_next_lease_runs(world):
    eid, handle = world.owned(retry=RETRY)
    first = world.backend.fail(handle, "why", TRANSIENT)
    world.fire(eid, "delay")
    successor = world.claim()
    assert successor.fields().attempt_index == 1
    assert world.backend.fail(handle, "why", TRANSIENT) == first
    with pytest.raises(errors.StaleOwner):
        world.backend.complete(handle)
    world.backend.complete(successor)
    with pytest.raises(errors.StaleOwner):
        world.backend.complete(handle)


def test_a_lapsed_lease_ends_nothing(world):
    eid, handle = world.owned()
    world.due(eid, "lease")
    for call in (world.backend.complete, world.backend.wait_children, lambda h: world.backend.fail(h, "x")):  # fmt: skip
        with pytest.raises(errors.LeaseExpired):
            call(handle)
    world.check(eid)
    assert world.state(eid) == "active"


def test_a_later_completion_shows_no_result_of_an_earlier_attempt(world):
    """The unnamed one of complete after a replay. A replay does not exist, and only a completion has a result."""
    eid, _ = world.owned()
    world.fire(eid, "lease")
    world.backend.complete(world.claim())
    assert world.backend.read_result(eid) == b""


# -- fail and retry ----------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [PERMANENT, CANCELLED])
def test_permanent_and_cancelled_never_retry(world, cls):
    """The unnamed one of fail: the class was text only, and permanent failures were retried."""
    eid, handle = world.owned(retry=RETRY)
    reason = FailureReason("why", b"detail")
    assert world.backend.fail(handle, reason, cls) == FailOutcome.TERMINAL_FAILED
    assert world.state(eid) == "failed"
    world.check(eid)


@pytest.mark.parametrize("cls", [TRANSIENT, TIMEOUT])
def test_others_retry_until_retries_are_used_up(world, cls):
    eid, handle = world.owned(retry=RETRY)
    for n in range(2):
        before = world.now()
        outcome = world.backend.fail(handle, "why", cls)
        assert outcome.retry_scheduled
        assert before + 5_000 <= outcome.delay_until_ms <= world.now() + 5_000
        assert world.timers(eid) == {"delay": outcome.delay_until_ms}
        assert world.backend.describe_stream(eid, n).closed_reason == "attempt_failure"
        world.check(eid)
        assert world.claim() is None
        world.fire(eid, "delay")
        handle = world.claim()
        assert handle.fields().attempt_index == n + 1
        assert handle.kind is HandleKind.FRESH
    assert world.backend.fail(handle, "why", cls) == FailOutcome.TERMINAL_FAILED
    assert world.state(eid) == "failed"
    world.check(eid)


def test_without_a_policy_nothing_is_retried(world):
    _, handle = world.owned()
    assert world.backend.fail(handle, "why", TRANSIENT) == FailOutcome.TERMINAL_FAILED


@pytest.mark.parametrize("count", [0, 1, 2, 3, 40, 2_000])
@pytest.mark.parametrize("multiplier, delay_ms", [(1.5, 1_001), (2, 1_000), (100, 0), (1, 7)])
def test_exponential_pauses_are_whole_and_bounded(world, count, multiplier, delay_ms):
    """The unnamed one of fail: a fraction of a millisecond. And one of ours: 0 times infinity."""
    policy = RetryPolicy(
        max_retries=5_000, delay=delay_ms / 1000, multiplier=multiplier, max_delay=50,
        jitter_percent=0,
    )  # fmt: skip
    eid, handle = world.owned(retry=policy)
    world.raw.hset(keys.core(eid), "retry_count", count)
    before = world.now()
    due = world.backend.fail(handle, "why", TRANSIENT).delay_until_ms
    wanted = min(delay_ms * min(multiplier ** min(count, 150), 2**53), 50_000)
    assert before + int(wanted) <= due <= world.now() + int(wanted)


@pytest.mark.parametrize("jitter", [20, 100])
def test_jitter_shortens_a_pause_by_up_to_its_share(world, jitter):
    policy = RetryPolicy(max_retries=1, delay=30, jitter_percent=jitter)
    pauses = []
    for _ in range(12):
        _, handle = world.owned(retry=policy)
        before = world.now()
        due = world.backend.fail(handle, "why", TRANSIENT).delay_until_ms
        pauses.append(due - before)
    assert all(30_000 * (1 - jitter / 100) - 1 <= pause <= 30_100 for pause in pauses)
    assert len({pause // 100 for pause in pauses}) > 4


def test_a_crash_counts_as_a_lost_worker_and_max_reclaims_ends_it(world):
    """The unnamed ones of the reclaim: its end was not published, its attempt and stream stayed open."""
    policy = RetryPolicy(max_retries=0, max_reclaims=2)
    eid, handle = world.owned(retry=policy)
    for how in ("crash", "lapse"):
        if how == "crash":
            assert world.backend.fail(handle, "oom", CRASH).retry_scheduled
        else:
            world.fire(eid, "lease")
        world.check(eid)
        handle = world.claim()
        assert handle.kind is HandleKind.RESUMED
    world.fire(eid, "lease")
    assert world.state(eid) == "failed"
    assert world.core(eid)["failure_reason"] == "max_reclaims_exceeded"
    assert world.backend.describe_stream(eid, 2).closed_reason == "producer_lost"
    world.check(eid)
    with pytest.raises(errors.ExecutionNotActive):
        world.backend.complete(handle)


def test_claim_from_reclaim_beyond_max_reclaims_ends_it_and_wakes_its_parent(world):
    parent, handle = world.owned()
    eid = world.create(parent_id=parent, retry=RetryPolicy(max_reclaims=0))
    world.backend.wait_children(handle)
    world.claim()
    world.due(eid, "lease")
    (token,) = [t for t in world.backend.find_reclaimable(10_000) if t.grant.execution_id == eid]
    with pytest.raises(errors.ExecutionNotClaimable):
        world.backend.claim_from_reclaim(token, worker_id="w", worker_instance_id="w-2")
    assert world.state(eid) == "failed"
    world.check(eid)
    assert world.raw.zcard(keys.ready(world.lane)) == 1
    assert world.claim().fields().execution_id == parent


def test_claim_from_reclaim_makes_a_new_attempt(world):
    eid, handle = world.owned(attempt_timeout=60, required_capabilities=CapabilitySet())
    world.due(eid, "lease")
    (token,) = [t for t in world.backend.find_reclaimable(10_000) if t.grant.execution_id == eid]
    successor = world.backend.claim_from_reclaim(token, worker_id="w", worker_instance_id="w-2")
    assert successor.kind is HandleKind.RESUMED
    assert successor.fields().attempt_index == 1
    assert world.backend.describe_stream(eid, 0).closed_reason == "producer_lost"
    world.check(eid, attempt_timer=True)
    for call in (world.backend.renew, world.backend.complete, world.backend.open_writer):
        with pytest.raises(errors.StaleOwner):
            call(handle)
    with pytest.raises(errors.ExecutionNotClaimable):
        world.backend.claim_from_reclaim(token, worker_id="w", worker_instance_id="w-3")


def test_reclaimable_executions_are_found_behind_a_thousand_other_timers(world):
    """A defect of ours: only the first timers that were due were looked at, of whatever kind."""
    eid, _ = world.owned()
    world.due(eid, "lease")
    timers = keys.timers(keys.slot_tag_of(eid))
    names = {f"lease:{beside(eid)}": 0 for _ in range(600)} | {f"delay:{i}": 0 for i in range(600)}
    world.raw.zadd(timers, names)
    found = world.backend.find_reclaimable(limit=10_000)
    world.raw.zrem(timers, *names)
    assert eid in {token.grant.execution_id for token in found}
    assert len(world.backend.find_reclaimable(limit=1)) == 1


# -- delay and children --------------------------------------------------------------------------------


def test_after_a_delay_the_same_attempt_goes_on(world):
    eid, handle = world.owned(attempt_timeout=60)
    with world.backend.open_writer(handle) as writer:
        writer.write(b"a")
    left = world.timers(eid)["attempt"]
    due = world.backend.delay(handle, 60)
    assert world.timers(eid) == {"delay": due}
    world.check(eid)
    world.fire(eid, "delay")
    world.check(eid)
    resumed = world.claim()
    assert resumed.kind is HandleKind.RESUMED
    assert resumed.fields().attempt_index == 0
    assert world.timers(eid)["attempt"] >= left
    with world.backend.open_writer(resumed) as writer:
        assert writer.write(b"b") == 2


def test_a_bad_delay_is_refused_before_the_lease_is_given_up(world):
    """The unnamed one of delay: it threw after the release, and the execution was in no index."""
    eid, handle = world.owned()
    op = ops.delay_execution(ops.Attempt.of(handle), 5)
    for bad in (b"", b"x", b"-1", b"1.5"):
        with pytest.raises(errors.InvalidInput):
            world.call(op._replace(argv=(*op.argv[:-1], bad)))
    world.check(eid)
    assert world.state(eid) == "active"


def test_without_children_the_parent_goes_on_at_once(world):
    """The unnamed one of wait_children: nothing woke an execution without unresolved children."""
    eid, handle = world.owned(attempt_timeout=60)
    world.backend.wait_children(handle)
    assert world.state(eid) == "waiting"
    world.check(eid)
    resumed = world.claim()
    assert (resumed.kind, resumed.fields().attempt_index) == (HandleKind.RESUMED, 0)
    world.check(eid, attempt_timer=True)


@pytest.mark.parametrize("last", ["complete", "fail", "cancel", "deadline", "lapse", "flow"])
def test_the_last_child_wakes_the_parent_however_it_ends(world, last):
    flow = world.create_flow() if last == "flow" else None
    eid, handle = world.owned(priority=9)
    policy = RetryPolicy(max_reclaims=0)
    if flow is not None:
        flow_tag = keys.flow_slot_tag(flow, 256)
        world.backend.complete(handle)
        world.create(execution_id=f"{flow_tag}:{keys.new_uuid()}", priority=9)
        handle = world.claim()
        eid = handle.fields().execution_id
    children = [
        world.create(parent_id=eid, priority=8 - i, deadline=60, retry=policy, flow_id=flow)
        for i in range(3)
    ]
    world.backend.complete(world.claim())
    world.backend.wait_children(handle)
    assert world.state(eid) == "waiting_children"
    world.check(eid)
    world.backend.cancel(children[1])
    assert world.state(eid) == "waiting_children"
    if last == "complete":
        world.backend.complete(world.claim())
    elif last == "fail":
        world.backend.fail(world.claim(), "no")
    elif last == "cancel":
        world.backend.cancel(children[2])
    elif last == "deadline":
        world.fire(children[2], "deadline")
    elif last == "lapse":
        world.claim()
        world.fire(children[2], "lease")
    else:
        world.backend.cancel_flow(flow)
    assert world.state(children[2]) in TERMINAL
    assert world.state(eid) == "waiting"
    world.check(eid)
    resumed = world.claim()
    assert (resumed.fields().execution_id, resumed.kind) == (eid, HandleKind.RESUMED)
    world.backend.complete(resumed)
    world.check(eid)


def test_a_retried_child_has_not_ended(world):
    eid, handle = world.owned(priority=9)
    world.create(parent_id=eid, retry=RETRY)
    world.backend.wait_children(handle)
    child = world.claim()
    world.backend.fail(child, "again", TRANSIENT)
    assert world.state(eid) == "waiting_children"


def test_an_ended_execution_gets_no_child(world):
    eid, handle = world.owned()
    world.backend.complete(handle)
    with pytest.raises(errors.ExecutionNotFound):
        world.create(parent_id=eid)
    with pytest.raises(errors.ExecutionNotFound):
        world.create(parent_id=beside(eid))


# -- cancel ------------------------------------------------------------------------------------------


def into(world, state):
    """An execution in a state, and its handle where it had one."""
    if state == "delayed":
        return world.create(delay=60, deadline=60), None
    if state == "waiting":
        return world.create(deadline=60), None
    eid, handle = world.owned(attempt_timeout=60, deadline=60, retry=RETRY)
    backend = world.backend
    if state == "suspended":
        suspend(world, handle, timeout=60)
    elif state == "waiting_children":
        world.create(parent_id=eid, delay=60)
        backend.wait_children(handle)
    elif state == "retrying":
        backend.fail(handle, "x", TRANSIENT)
    elif state == "put_off":
        backend.delay(handle, 60)
    elif state == "lapsed":
        world.due(eid, "lease")
    elif state == "lost":
        world.fire(eid, "lease")
    return eid, handle


STATES = ["delayed", "waiting", "active", "suspended", "waiting_children", "retrying", "put_off", "lapsed", "lost"]  # fmt: skip


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_every_state_can_end_from_outside(world, state, how):
    eid, handle = into(world, state)
    was = world.state(eid)
    attempt = {"retrying": 1, "lost": 1}.get(state, 0)
    if how == "cancel":
        outcome = world.backend.cancel(eid, reason="enough")
        assert (outcome.cancelled, outcome.previous_state) == (True, was)
        assert world.backend.cancel(eid, reason="again") == outcome
        assert world.core(eid)["cancellation_reason"] == "enough"
    else:
        world.fire(eid, "deadline")
        with pytest.raises(errors.ExecutionNotActive):
            world.backend.cancel(eid)
    world.check(eid)
    reason = {"cancel": "attempt_cancelled", "deadline": "expired"}[how]
    assert world.backend.describe_stream(eid, attempt).closed_reason == reason
    error = {"cancel": "enough", "deadline": "execution_deadline"}[how]
    assert list(world.backend.tail(eid, attempt)) == [End(reason, error=error)]
    (record,) = world.completions(eid)
    assert record[b"outcome"] == {"cancel": b"cancelled", "deadline": b"expired"}[how]
    assert b"flow_id" not in record
    assert world.claim() is None
    if handle is not None:
        with pytest.raises(errors.FFError):
            world.backend.renew(handle)


@pytest.mark.parametrize("how", ["complete", "fail"])
def test_an_end_is_not_cancelled(world, how):
    eid, handle = world.owned()
    world.backend.complete(handle) if how == "complete" else world.backend.fail(handle, "no")
    with pytest.raises(errors.ExecutionNotActive):
        world.backend.cancel(eid)
    with pytest.raises(errors.ExecutionNotFound):
        world.backend.cancel(keys.new_execution_id())
    world.check(eid)


def test_a_grace_asks_the_worker_first(world):
    eid, handle = world.owned()
    writer = world.backend.open_writer(handle)
    writer.write(b"a")
    writer.flush()
    assert not writer.cancel_requested
    outcome = world.backend.cancel(eid, grace=60)
    assert (outcome.cancelled, outcome.previous_state) == (False, "active")
    writer.write(b"b")
    writer.flush()
    assert writer.cancel_requested
    world.check(eid)
    due = world.timers(eid)["cancel"]
    # Asking again, with a longer grace, does not put it off.
    world.backend.cancel(eid, grace=600)
    assert world.timers(eid)["cancel"] == due
    world.fire(eid, "cancel")
    assert world.state(eid) == "cancelled"
    world.check(eid)
    writer.write(b"c")
    with pytest.raises(errors.FFError):
        writer.flush()
    assert [frame.payload for frame in world.backend.read_stream(eid)] == [b"a", b"b"]


def test_a_worker_that_stops_in_time_ends_as_it_says(world):
    eid, handle = world.owned()
    world.backend.cancel(eid, grace=60)
    world.backend.complete(handle, b"partial")
    assert world.state(eid) == "completed"
    world.check(eid)


@pytest.mark.parametrize("how", ["fail", "delay", "suspend", "wait_children", "lapse"])
def test_a_requested_cancellation_holds_whatever_the_worker_does(world, how):
    """A defect of ours: it was forgotten when the worker gave the lease up in another way than by ending."""
    eid, handle = world.owned(retry=RETRY)
    world.backend.cancel(eid, grace=60)
    if how == "fail":
        world.backend.fail(handle, "x", TRANSIENT)
    elif how == "delay":
        world.backend.delay(handle, 60)
    elif how == "suspend":
        suspend(world, handle)
    elif how == "wait_children":
        world.create(parent_id=eid, delay=60)
        world.backend.wait_children(handle)
    else:
        world.fire(eid, "lease")
    world.fire(eid, "cancel")
    assert world.state(eid) == "cancelled"
    world.check(eid)


@pytest.mark.parametrize("state", ["waiting", "delayed", "suspended"])
def test_a_grace_is_for_a_worker_only(world, state):
    eid, _ = into(world, state)
    assert world.backend.cancel(eid, grace=60).cancelled
    world.check(eid)


def test_a_reader_of_an_attempt_that_nobody_claimed_sees_the_end(world, wait_until):
    eid = world.create(delay=60)
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(world.backend.tail(eid)))
    thread.start()
    wait_listening(world.raw)
    world.backend.cancel(eid)
    thread.join(5)
    assert seen == [End("attempt_cancelled", error="cancelled")]


# -- completions -------------------------------------------------------------------------------------


@pytest.mark.parametrize("result", [b"", b"\x00r", b"x" * 65_537])
def test_a_record_has_the_size_of_the_result_alone(world, result):
    eid, handle = world.owned()
    world.backend.complete(handle, result)
    (record,) = world.completions(eid)
    assert b"payload" not in record
    assert record.get(b"payload_bytes") == (b"%d" % len(result) if result else None)
    assert record[b"outcome"] == b"success"
    assert world.backend.read_result(eid) == result


def test_tags_set_after_the_end_end_with_the_execution(world):
    eid, handle = world.owned()
    world.backend.complete(handle)
    assert world.backend.set_tags(eid, {"a.b": "c"}) == 1
    world.check(eid)
