"""Flows: created, joined, described, and cancelled by each policy, with each way of waiting."""

import pytest

from ff_fast import (
    CancelFlowPolicy,
    CancelFlowWait,
    ClaimPolicy,
    FailureClass,
    RetryPolicy,
    ScannerFilter,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast._core import ops
from ff_fast._core import supervision as supervision_core

from .executions import World

ALL, PENDING, ONLY = (
    CancelFlowPolicy.CANCEL_ALL, CancelFlowPolicy.CANCEL_PENDING, CancelFlowPolicy.FLOW_ONLY,
)  # fmt: skip
NO_WAIT = CancelFlowWait.NO_WAIT


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


def suspend(world, handle):
    point = world.backend.create_waitpoint(handle)
    world.backend.suspend(handle, WaitpointSpec(WaitpointKind.EXTERNAL, b"", point.hmac_token))
    return point


@pytest.fixture
def family(world):
    """A flow with a member in every state that is not an end, and one that has ended."""
    flow = world.create_flow()

    def member(priority, **options):
        return world.create(flow_id=flow, priority=priority, **options)

    eids = {"active": member(9, retry=RetryPolicy(max_retries=3, delay=0.001))}
    handles = {"active": world.claim()}
    eids["suspended"] = member(9)
    handles["point"] = suspend(world, world.claim())
    eids["waiting_children"] = member(9)
    parent = world.claim()
    eids["child"] = member(0, parent_id=eids["waiting_children"], delay=60)
    world.backend.wait_children(parent)
    eids["completed"] = member(9)
    world.backend.complete(world.claim())
    eids["delayed"] = member(9, delay=60)
    eids["waiting"] = member(1)
    return flow, eids, handles


def states(world, eids):
    return {name: world.state(eid) for name, eid in eids.items()}


def due(world, flow):
    """Make the backlog of a flow due."""
    tag = keys.flow_slot_tag(flow, 256)
    key = keys.timers(tag)
    assert world.raw.zscore(key, f"flow:{flow}") is not None
    world.raw.zadd(key, {f"flow:{flow}": 1})


def test_members_share_the_partition_of_their_flow(world, family):
    flow, eids, _ = family
    assert {keys.slot_tag_of(eid) for eid in eids.values()} == {keys.flow_slot_tag(flow, 256)}
    told = world.backend.describe_flow(flow)
    assert (told.flow_id, told.state) == (flow, "open")
    assert set(told.members) == set(eids.values())
    assert set(told.members) - set(told.open_members) == {eids["completed"]}


def test_creating_a_flow_again_changes_nothing(world):
    flow = world.backend.create_flow(namespace="one")
    assert world.backend.create_flow(flow, namespace="two") == flow
    key = keys.flow(keys.flow_slot_tag(flow, 256), flow)
    assert world.raw.hget(key, "namespace") == b"one"
    world.backend.cancel_flow(flow)
    assert world.backend.create_flow(flow.upper()) == flow
    assert world.backend.describe_flow(flow).state == "cancelled"


def test_unknown_and_cancelled_flows_take_no_member(world):
    unknown = keys.new_uuid()
    with pytest.raises(errors.FlowNotFound):
        world.create(flow_id=unknown)
    for call in (world.backend.cancel_flow, world.backend.describe_flow):
        with pytest.raises(errors.FlowNotFound):
            call(unknown)
    flow = world.create_flow()
    member = keys.execution_id_for_flow(flow, 256)
    world.create(flow_id=flow, execution_id=member)
    world.backend.cancel_flow(flow)
    with pytest.raises(errors.FlowAlreadyTerminal):
        world.create(flow_id=flow)
    # The repeat of a creation that came in time is no new member.
    assert world.create(flow_id=flow, execution_id=member) == member


@pytest.mark.cluster
def test_cancel_all(world, family):
    flow, eids, handles = family
    outcome = world.backend.cancel_flow(flow, ALL, reason="enough")
    assert (outcome.policy, outcome.cancelled_members, outcome.open_members) == (ALL, 6, 0)
    assert set(states(world, eids).values()) == {"cancelled", "completed"}
    for eid in eids.values():
        world.check(eid)
    with pytest.raises(errors.ExecutionNotActive):
        world.backend.complete(handles["active"])
    with pytest.raises(errors.WaitpointClosed):
        world.backend.deliver_signal(eids["suspended"], handles["point"], "go")
    assert world.core(eids["waiting"])["cancellation_reason"] == "enough"
    assert world.claim() is None
    assert world.raw.zscore(keys.timers(keys.flow_slot_tag(flow, 256)), f"flow:{flow}") is None
    again = world.backend.cancel_flow(flow, PENDING)
    assert (again.policy, again.cancelled_members, again.open_members) == (ALL, 0, 0)


@pytest.mark.cluster
def test_cancel_pending_lets_run_what_runs(world, family):
    flow, eids, handles = family
    outcome = world.backend.cancel_flow(flow, PENDING)
    assert (outcome.cancelled_members, outcome.open_members) == (4, 2)
    assert {name for name, state in states(world, eids).items() if state != "cancelled"} == {
        "active", "suspended", "completed",
    }  # fmt: skip
    # What is suspended is running: it is resumed, goes on, and ends.
    world.backend.deliver_signal(eids["suspended"], handles["point"], "go")
    resumed = world.claim()
    assert resumed.fields().execution_id == eids["suspended"]
    world.backend.complete(resumed)
    world.backend.renew(handles["active"])
    world.backend.complete(handles["active"])
    assert world.backend.describe_flow(flow).open_members == ()
    for eid in eids.values():
        world.check(eid)


@pytest.mark.parametrize("first", ["parent", "child"])
def test_a_parent_that_waits_is_cancelled_whichever_of_the_two_comes_first(world, first):
    flow = world.create_flow()
    tag = keys.flow_slot_tag(flow, 256)
    ids = sorted((f"{tag}:{keys.new_uuid()}" for _ in range(2)), reverse=first == "child")
    parent, child = (world.create(flow_id=flow, execution_id=ids[0]), ids[1])
    handle = world.claim()
    world.create(flow_id=flow, execution_id=child, parent_id=parent, delay=60)
    world.backend.wait_children(handle)
    outcome = world.backend.cancel_flow(flow, PENDING)
    assert (outcome.cancelled_members, outcome.open_members) == (2, 0)
    for eid in (parent, child):
        assert world.state(eid) == "cancelled"
        world.check(eid)


def test_cancel_pending_spares_what_waits_to_go_on(world, family):
    """A member that is resumed before a supervisor cancels the rest goes on, as it does afterwards."""
    flow, eids, handles = family
    world.backend.cancel_flow(flow, PENDING, NO_WAIT)
    world.backend.deliver_signal(eids["suspended"], handles["point"], "go")
    due(world, flow)
    world.round()
    assert world.state(eids["waiting"]) == "cancelled"
    assert world.state(eids["suspended"]) == "waiting"
    assert world.claim().fields().execution_id == eids["suspended"]


@pytest.mark.parametrize("how", ["fail", "lapse"])
@pytest.mark.parametrize("policy", [ALL, PENDING])
def test_what_would_need_another_attempt_is_cancelled(world, family, how, policy):
    """A defect of ours: such a member waited for ever, as nobody may claim it."""
    flow, eids, handles = family
    world.backend.cancel_flow(flow, policy, NO_WAIT)
    if how == "fail":
        world.backend.fail(handles["active"], "again", FailureClass.TRANSIENT)
        world.check(eids["active"])
        world.fire(eids["active"], "delay")
    else:
        world.fire(eids["active"], "lease")
    assert world.state(eids["active"]) == "cancelled"
    world.check(eids["active"])


def test_flow_only_leaves_members_alone_and_starts_none(world, family):
    flow, eids, handles = family
    before = states(world, eids)
    outcome = world.backend.cancel_flow(flow, ONLY)
    assert (outcome.cancelled_members, outcome.open_members) == (0, 6)
    assert states(world, eids) == before
    assert world.claim() is None
    world.backend.deliver_signal(eids["suspended"], handles["point"], "go")
    assert world.claim().fields().execution_id == eids["suspended"]
    world.backend.complete(handles["active"])
    world.backend.cancel(eids["waiting"])
    for eid in eids.values():
        world.check(eid)


@pytest.mark.parametrize("policy", [ALL, PENDING, ONLY])
def test_no_member_is_claimed_once_its_flow_is_cancelled(world, family, policy):
    flow, eids, _ = family
    world.backend.cancel_flow(flow, policy, NO_WAIT)
    assert world.state(eids["waiting"]) == "waiting"
    assert world.claim() is None
    assert world.claim(policy=ClaimPolicy.with_max_wait(0.02)) is None
    token = supervision_core.reclaim_token(eids["waiting"], world.lane, world.now())
    with pytest.raises(errors.ExecutionNotClaimable):
        world.backend.claim_from_reclaim(token, worker_id="w", worker_instance_id="w-2")
    # Other work of the partition is not held up.
    other = world.create(execution_id=f"{keys.flow_slot_tag(flow, 256)}:{keys.new_uuid()}")
    assert world.claim().fields().execution_id == other


@pytest.mark.parametrize("policy, cancelled", [(ALL, 6), (PENDING, 4)])
def test_without_waiting_a_supervisor_finishes(world, family, policy, cancelled):
    flow, eids, _ = family
    outcome = world.backend.cancel_flow(flow, policy, NO_WAIT)
    assert (outcome.cancelled_members, outcome.open_members) == (0, 6)
    world.round()
    assert world.state(eids["waiting"]) == "waiting"
    due(world, flow)
    assert world.round() == 1
    assert list(states(world, eids).values()).count("cancelled") == cancelled
    assert world.raw.zscore(keys.timers(keys.flow_slot_tag(flow, 256)), f"flow:{flow}") is None
    for eid in eids.values():
        world.check(eid)


def test_a_wait_that_is_too_short_says_so_and_a_repeat_goes_on(world):
    flow = world.create_flow()
    eids = [world.create(flow_id=flow) for _ in range(250)]
    with pytest.raises(errors.DeadlineExceeded):
        world.backend.cancel_flow(flow, ALL, CancelFlowWait.wait_timeout(0))
    left = len(world.backend.describe_flow(flow).open_members)
    assert 0 < left < 250
    outcome = world.backend.cancel_flow(flow, ALL, CancelFlowWait.wait_timeout(60))
    assert (outcome.cancelled_members, outcome.open_members) == (left, 0)
    assert {world.state(eid) for eid in eids} == {"cancelled"}


def test_each_member_that_is_cancelled_is_completed_with_its_flow(world, family):
    """The unnamed one of the completions: cascades of a flow were not published."""
    flow, eids, _ = family
    world.backend.cancel_flow(flow)
    for name, eid in eids.items():
        (record,) = world.completions(eid)
        assert record[b"flow_id"] == flow.encode()
        assert record[b"outcome"] == (b"success" if name == "completed" else b"cancelled")


def test_a_flow_that_is_gone_holds_nothing_up(world, family):
    """A defect of ours: its timer stopped every round of every supervisor."""
    flow, eids, _ = family
    tag = keys.flow_slot_tag(flow, 256)
    junk = ["flow:", "flow:\u00e9", f"flow:{keys.new_uuid()}", "nonsense", "lease:x", b"\xff:\xff"]
    junk += [f"lease:{{fp:{(keys.index_of(tag) + 1) % 256}}}:{keys.new_uuid()}"]
    world.raw.zadd(keys.timers(tag), dict.fromkeys(junk, 1))
    world.fire(eids["delayed"], "delay")
    assert world.state(eids["delayed"]) == "waiting"
    assert world.raw.zrangebyscore(keys.timers(tag), 0, 2) == []
    with pytest.raises(errors.FlowNotFound):
        world.call(ops.describe_flow(keys.new_uuid(), tag))


def test_a_supervisor_of_another_namespace_leaves_the_flow_alone(world):
    flow = world.backend.create_flow(namespace="one")
    eid = world.create(flow_id=flow, namespace="one")
    world.backend.cancel_flow(flow, ALL, NO_WAIT)
    due(world, flow)
    world.round(ScannerFilter(namespace="two"))
    assert world.state(eid) == "waiting"
    world.round(ScannerFilter(namespace="one"))
    assert world.state(eid) == "cancelled"


def test_a_flow_is_kept_while_a_member_is_open(world):
    day = 86_400_000
    flow = world.backend.create_flow()
    key = keys.flow(keys.flow_slot_tag(flow, 256), flow)
    members = key + b":members"
    assert 0 < world.raw.pttl(key) <= day
    first = world.create(flow_id=flow, priority=9, retention=3 * day / 1000)
    second = world.create(flow_id=flow)
    assert world.raw.pttl(key) == world.raw.pttl(members) == -1
    world.backend.complete(world.claim())
    assert world.state(first) == "completed"
    assert world.raw.pttl(key) == world.raw.pttl(members) == -1
    world.backend.cancel(second)
    assert 0 < world.raw.pttl(key) <= day
    assert 0 < world.raw.pttl(members) <= day
    world.create(flow_id=flow, retention=3 * day / 1000)
    assert world.raw.pttl(key) == world.raw.pttl(members) == -1
    world.backend.complete(world.claim())
    assert day < world.raw.pttl(key) <= 3 * day
