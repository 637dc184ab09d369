"""Listings of executions, lanes and workers; histories in sentences; the diagnosis of a deployment."""

import contextlib
import dataclasses
import io
import os
import signal
import time
import warnings
from types import SimpleNamespace

import orjson
import pytest

import ff_fast
from ff_fast import (
    BackendConfig,
    BackendRetry,
    BestEffortLiveConfig,
    CancelFlowPolicy,
    CapabilitySet,
    Corruption,
    DeploymentWarning,
    ExecutionNotFound,
    FailureClass,
    Frame,
    FrameKind,
    FunctionMissing,
    ResumeCondition,
    RetryPolicy,
    StreamMode,
    WaitpointKind,
    WaitpointSpec,
    _library,
    cli,
    keys,
)
from ff_fast._cli.top import fitted
from ff_fast._core.roles import ROLES, acl_line
from ff_fast.embedded import EmbeddedServer

from ..conftest import PROMPT, connect_raw
from ..shells import KINDS, WORKER, Opener
from ..waiting import wait_until
from .executions import World

CLAIM = dict(WORKER)


@pytest.fixture(scope="module")
def own_server():
    """A server with few partitions, whose keys are removed between tests."""
    with EmbeddedServer(**PROMPT) as server, connect_raw(server.url) as raw:
        yield server, raw


@pytest.fixture
def raw(own_server):
    server, client = own_server
    client.flushall()
    with ff_fast.ValkeyBackend.connect(f"{server.url}?partitions=4"):
        pass
    return client


@pytest.fixture
def world(own_server, raw, lane):
    with World(own_server[0].url, raw, lane) as opened:
        yield opened


@pytest.fixture(params=KINDS)
def shell(request, own_server, raw):
    opener = Opener(request.param)
    yield opener(own_server[0].url)
    opener.close()


def everything(backend, **options):
    """All pages of a listing."""
    found, after = [], None
    while True:
        page = backend.list_executions(after=after, **options)
        found += page.items
        after = page.next
        if after is None:
            return found


def ids(found):
    return [each.execution_id for each in found]


def suspend(world, handle, name=b"approve"):
    waitpoint = world.backend.create_waitpoint(handle)
    spec = WaitpointSpec(WaitpointKind.SIGNAL_NAME, name, waitpoint.hmac_token)
    world.backend.suspend(handle, spec, reason="a human must look", timeout=60)


@pytest.fixture
def states(world):
    """An execution in each state, by the state."""
    backend, found = world.backend, {}
    found["completed"], handle = world.owned()
    backend.complete(handle)
    found["failed"], handle = world.owned()
    backend.fail(handle, "no GPU")
    found["cancelled"], _ = world.owned()
    backend.cancel(found["cancelled"], reason="too expensive")
    found["expired"], _ = world.owned(deadline=60)
    world.fire(found["expired"], "deadline")
    found["suspended"], handle = world.owned()
    suspend(world, handle)
    found["waiting_children"], handle = world.owned()
    world.create(parent_id=found["waiting_children"], delay=60, namespace="children")
    backend.wait_children(handle)
    found["active"], _ = world.owned()
    found["delayed"] = world.create(delay=60)
    found["waiting"] = world.create()
    return found


# -- executions -----------------------------------------------------------------------------------------------------------


def test_an_execution_is_listed_in_its_state_with_what_matters_there(shell, world, states):
    told = {}
    for state, eid in states.items():
        found = {each.execution_id: each for each in everything(shell, state=state)}
        assert {each.state for each in found.values()} == {state}
        told[state] = found[eid]
    assert {each.lane for each in told.values()} == {world.lane}
    active, suspended = told["active"], told["suspended"]
    assert (active.worker_id, active.worker_instance_id, active.attempt_index) == ("w", "w-1", 0)
    assert active.lease_expires_at_ms > world.now()
    assert suspended.waiting_for == ("signal_name approve",)
    assert suspended.suspension_reason == "a human must look"
    assert suspended.due_at_ms > world.now()
    assert told["delayed"].due_at_ms > world.now()
    assert (told["failed"].error, told["failed"].failure_class) == (
        "no GPU",
        FailureClass.PERMANENT,
    )
    assert told["cancelled"].error == "too expensive"
    assert told["expired"].error == "execution_deadline"
    assert told["completed"].error is None
    assert told["completed"].finished_at_ms >= told["completed"].created_at_ms


def test_pages_have_each_execution_once_the_newest_first(shell, world, states):
    for number in range(20):
        world.create(delay=60 if number % 2 else None)
    whole = shell.list_executions(count=1000)
    assert whole.next is None
    times = [each.finished_at_ms or each.created_at_ms for each in whole.items]
    assert times == sorted(times, reverse=True)
    for count in (1, 4, 7):
        assert ids(everything(shell, count=count)) == ids(whole.items)
    assert set(states.values()) < set(ids(whole.items))


def test_many_of_one_millisecond_are_listed_once_each(world, raw):
    eids = [world.create(execution_id=f"{{fp:1}}:{keys.new_uuid()}") for _ in range(60)]
    for eid in eids:
        raw.zadd(keys.listed("{fp:1}"), {f"{eid} {world.lane}": 10**13 + 1_700_000_000_000})
    assert ids(everything(world.backend, count=1)) == sorted(eids, reverse=True)
    for eid in eids:
        raw.xadd(
            keys.completions("{fp:1}"),
            {"execution_id": eid, "outcome": "success"},
            "1700000000000-*",
        )
        raw.hset(keys.core(eid), "state", "completed")
    assert ids(everything(world.backend, count=1)) == sorted(eids, reverse=True)


def test_filters_by_lane_namespace_and_tag(shell, world):
    mine = world.create(tags={"app.user": "ada"})
    other = world.create(namespace="other", tags={"app.user": "bob"})
    elsewhere = world.backend.create_execution(lane="elsewhere")
    assert ids(everything(shell, lane="elsewhere")) == [elsewhere]
    assert ids(everything(shell, namespace="other")) == [other]
    assert ids(everything(shell, tag=("app.user", "ada"))) == [mine]
    assert everything(shell, lane="elsewhere", tag=("app.user", "ada")) == []


def test_a_filter_that_lets_little_pass_ends_in_finite_pages(shell, world):
    rare = world.create(tags={"app.rare": "1"})
    for _ in range(200):
        world.create()
    assert ids(everything(shell, tag=("app.rare", "1"), count=5)) == [rare]
    other = world.backend.create_execution(lane="other")
    assert ids(everything(shell, lane="other")) == [other]


def test_named_streams_are_listed_without_a_lane(shell, world):
    stream = world.backend.open_stream("talk")
    (found,) = everything(shell, lane="")
    assert (found.execution_id, found.state, found.lane) == (stream.execution_id, "active", "")
    stream.complete()
    (found,) = everything(shell, lane="")
    assert found.state == "completed"
    world.backend.delete_execution(stream.execution_id)
    assert everything(shell, lane="") == []


def test_what_has_expired_or_was_deleted_is_not_listed(world, raw):
    for end in ("fail", "complete"):
        eid, handle = world.owned(retention=0.05)
        getattr(world.backend, end)(handle, b"x" if end == "complete" else "x")
        wait_until(lambda eid=eid: not raw.exists(keys.core(eid)))
        assert eid not in ids(everything(world.backend))
    eid, handle = world.owned()
    world.backend.fail(handle, "no")
    tag = keys.slot_tag_of(eid)
    assert 0 < raw.pttl(keys.ended(tag, "failed")) <= 86_400_000
    world.backend.delete_execution(eid)
    assert not [
        each for each in raw.zrange(keys.ended(tag, "failed"), 0, -1) if eid.encode() in each
    ]


def test_each_partition_lists_a_bounded_number_of_failures(world, raw):
    eid, handle = world.owned()
    key = keys.ended(keys.slot_tag_of(eid), "failed")
    raw.zadd(
        key, {f"{keys.slot_tag_of(eid)}:{keys.new_uuid()} {world.lane}": n for n in range(2500)}
    )
    world.backend.fail(handle, "no")
    assert raw.zcard(key) == 2000
    assert ids(everything(world.backend, state="failed")) == [eid]


def test_a_text_that_is_cut_ends_with_a_whole_character(world):
    for start in ("", "x"):
        _, handle = world.owned()
        world.backend.fail(handle, start + "é" * 400)
        error = world.backend.list_executions(state="failed").items[0].error
        assert error == start + "é" * (len(error) - len(start))
        assert 500 < len(error.encode()) <= 512


def test_an_error_in_a_listing_is_short(world):
    eid, handle = world.owned()
    world.backend.fail(handle, "é" * 10_000)
    (found,) = everything(world.backend, state="failed")
    assert found.execution_id == eid
    assert 250 <= len(found.error) <= 257


def test_one_call_looks_at_a_bounded_number_of_one_millisecond(world, raw):
    """As after the server's clock was set back: completions share the last time until it is reached again."""
    tag, shared = "{fp:1}", 1_700_000_000_000
    eids = [world.create(execution_id=f"{tag}:{keys.new_uuid()}") for _ in range(4)]
    pipe = raw.pipeline()

    def completed(eid, ms):
        pipe.xadd(keys.completions(tag), {"execution_id": eid, "outcome": "success"}, f"{ms}-*")

    for eid in eids[:3]:
        pipe.hset(keys.core(eid), "state", "completed")
        pipe.zrem(keys.listed(tag), f"{eid} {world.lane}")
    completed(eids[2], shared - 1)
    for _ in range(600):
        completed(f"{tag}:{keys.new_uuid()}", shared)
    completed(eids[1], shared)
    completed(eids[0], shared + 1)
    for _ in range(2000):
        pipe.zadd(keys.listed(tag), {f"{tag}:{keys.new_uuid()} x": 10**13 + shared})
    pipe.zadd(keys.listed(tag), {f"{eids[3]} {world.lane}": 10**13 + shared - 2})
    pipe.execute()
    for count in (1, 50):
        assert ids(everything(world.backend, count=count)) == eids


def test_pages_go_on_behind_foreign_members(world, raw):
    tag, now = "{fp:1}", world.now()
    old = world.create(execution_id=f"{tag}:{keys.new_uuid()}")
    foreign = {f"{number:04}junk x": 10**13 + now + 60_000 for number in range(1000)}
    raw.zadd(keys.listed(tag), foreign | {b"\xff\xfe": 10**13 + now + 70_000})
    new = world.create(execution_id=f"{tag}:{keys.new_uuid()}")
    for count in (1, 2, 100):
        assert sorted(ids(everything(world.backend, count=count))) == sorted([old, new])
        assert sorted(ids(everything(world.backend, count=count, lane=world.lane))) == sorted(
            [old, new]
        )


def test_a_retry_clears_no_place(world):
    """An execution that is claimed, fails, waits and is claimed again is in one index at any time."""
    eid, handle = world.owned(retry=RetryPolicy(max_retries=1, delay=0.001))
    world.check(eid)
    world.backend.fail(handle, "again", FailureClass.TRANSIENT)
    world.check(eid)
    world.fire(eid, "delay")
    world.check(eid)
    world.backend.complete(world.claim())
    world.check(eid)


def test_an_index_of_another_type_is_told_and_keeps_no_execution_from_moving(world, raw):
    tags = [keys.slot_tag(index) for index in range(4)]
    for tag in tags:
        raw.set(keys.listed(tag), "junk")
        raw.set(keys.queues(tag), "junk")
    eid, handle = world.owned()
    world.backend.complete(handle)
    assert world.state(eid) == "completed"
    with pytest.raises(Corruption):
        world.backend.list_executions()
    with pytest.raises(Corruption):
        world.backend.list_lanes()


def test_foreign_members_and_cores_are_passed_over(world, raw):
    eid = world.create()
    tag = keys.slot_tag_of(eid)
    for member in ("junk", f"{tag}:{keys.new_uuid()} x", f"{eid}x {world.lane}"):
        raw.zadd(keys.listed(tag), {member: 10**13 + world.now()})
    broken = world.create()
    raw.delete(keys.core(broken))
    raw.set(keys.core(broken), "junk")
    assert ids(everything(world.backend)) == [eid]


FIELDS = ("priority", "created_at", "last_transition_at", "lane_id", "namespace", "retry_count")


@pytest.mark.parametrize("value", [None, "junk", b"\xff"])
def test_an_execution_with_foreign_data_hides_no_other_one(world, raw, value):
    eid, _ = world.owned()
    for field in FIELDS:
        broken, _ = world.owned()
        if value is None:
            raw.hdel(keys.core(broken), field)
        else:
            raw.hset(keys.core(broken), field, value)
        assert eid in ids(everything(world.backend)), field
        assert world.backend.list_workers()[0].executions >= 1
        raw.delete(keys.core(broken))


# -- lanes and workers ----------------------------------------------------------------------------------------------------


def test_lanes_tell_what_is_in_them(shell, world, states):
    world.create(priority=9)
    oldest = world.backend.describe(states["waiting"]).created_at_ms
    lanes = {each.lane: each for each in shell.list_lanes()}
    told = lanes[world.lane]
    assert (told.waiting, told.delayed, told.active, told.suspended) == (2, 2, 1, 1)
    assert (told.waiting_children, told.failed) == (1, 1)
    # It waits longest, although the other one is claimed first.
    waiting = everything(shell, state="waiting")
    assert told.oldest_waiting_at_ms == min(each.created_at_ms for each in waiting)
    assert told.oldest_waiting_at_ms <= oldest


def test_a_lane_counts_all_that_waits_whatever_it_requires(shell, world):
    world.create()
    world.create(required_capabilities=ff_fast.CapabilitySet({"gpu"}))
    world.backend.create_execution(lane="odd lane: 50%")
    lanes = {each.lane: each.waiting for each in shell.list_lanes()}
    assert lanes == {world.lane: 2, "odd lane: 50%": 1}


def test_a_lane_that_is_empty_leaves_the_list(world, raw):
    for _ in range(8):
        world.create()
    while (handle := world.claim()) is not None:
        world.backend.complete(handle)
    world.backend.cancel(world.create())
    assert world.backend.list_lanes() == ()
    assert not raw.exists(*(keys.queues(keys.slot_tag(index)) for index in range(4)))


@pytest.mark.parametrize("needs", [(), ("gpu:a100", "b%c")])
def test_a_queue_of_which_nothing_can_be_claimed_is_forgotten(world, raw, needs):
    capabilities = CapabilitySet(needs)
    eid = world.create(required_capabilities=capabilities)
    raw.delete(keys.core(eid))
    queues = keys.queues(keys.slot_tag_of(eid))
    assert raw.zcard(queues) == 1
    assert world.backend.claim(lane=world.lane, capabilities=capabilities, **WORKER) is None
    assert not raw.exists(queues)


def test_workers_are_those_that_hold_leases(shell, world):
    assert shell.list_workers() == ()
    for _ in range(3):
        world.owned()
    world.create()
    other = world.backend.claim(lane=world.lane, worker_id="v", worker_instance_id="v-1")
    first, second = shell.list_workers()
    assert (first.worker_id, first.worker_instance_id, first.executions) == ("w", "w-1", 3)
    assert first.lanes == (world.lane,)
    assert first.next_lease_expires_at_ms > world.now() >= first.oldest_claim_at_ms
    assert (second.worker_id, second.executions) == ("v", 1)
    world.backend.complete(other)
    assert len(shell.list_workers()) == 1


# -- histories ------------------------------------------------------------------------------------------------------------


def told(backend, eid):
    return "\n".join(backend.explain(eid))


def test_a_history_tells_why_an_execution_failed_and_who_had_it(shell, world):
    eid, handle = world.owned(retry=RetryPolicy(max_retries=1, delay=0.001))
    world.backend.fail(handle, "no GPU left", FailureClass.TRANSIENT)
    text = told(shell, eid)
    assert f"It was created in lane {world.lane}, namespace {world.lane}, priority 0." in text
    assert "Worker w (w-1) claimed it and began attempt 0." in text
    assert "Attempt 0 failed (transient): no GPU left. A retry was scheduled." in text
    assert "It is delayed until " in text
    world.fire(eid, "delay")
    handle = world.claim()
    assert "Attempt 1 is with worker w (w-1), who holds the lease until " in told(shell, eid)
    world.backend.fail(handle, "still none")
    text = told(shell, eid)
    assert "It ended as failed, in attempt 1 (permanent): still none." in text
    assert "It has ended as failed: still none. Its data is kept until " in text


def test_what_ran_out_is_told_in_words(shell, world):
    slow, _ = world.owned(attempt_timeout=60)
    late, _ = world.owned(deadline=60)
    never = world.create(deadline=60)
    for eid, timer in ((slow, "attempt"), (late, "deadline"), (never, "deadline")):
        world.fire(eid, timer)
    (attempt,) = shell.describe(slow).attempts
    assert attempt.error == "The attempt ran longer than its time limit."
    text = told(shell, slow)
    assert "as expired, in attempt 0 (timeout): the attempt ran longer than its time limit." in text
    (attempt,) = shell.describe(late).attempts
    assert attempt.error == "The deadline of the execution passed."
    assert "as expired, in attempt 0: the deadline of the execution passed." in told(shell, late)
    # Nobody has begun an attempt of it.
    assert shell.describe(never).attempts == ()
    assert "It ended as expired: the deadline of the execution passed." in told(shell, never)


def test_a_history_tells_of_lost_workers(shell, world):
    eid, _ = world.owned()
    world.due(eid, "lease")
    assert "lapsed at " in told(shell, eid)
    assert "ff-fast supervise" in told(shell, eid)
    world.fire(eid, "lease")
    text = told(shell, eid)
    assert "Attempt 0 lost its worker: the lease lapsed without a renewal." in text
    assert f"It is waiting for a worker of lane {world.lane}, since " in text


def test_a_history_tells_what_a_suspended_execution_waits_for(shell, world, states):
    text = told(shell, states["suspended"])
    assert "Attempt 0 was suspended: a human must look." in text
    assert "waits for a signal named approve; its waitpoints: " in text
    assert "it times out (fail)" in text


def test_a_history_tells_how_many_signals_are_still_missing(shell, world):
    eid, handle = world.owned()
    waitpoints = [world.backend.create_waitpoint(handle) for _ in range(2)]
    specs = [
        WaitpointSpec(WaitpointKind.SIGNAL_NAME, name, each.hmac_token)
        for name, each in zip((b"legal", b"price"), waitpoints, strict=True)
    ]
    world.backend.suspend(handle, ResumeCondition.all(*specs), reason="two must agree")
    waits = "of which it has {}: a signal named legal, a signal named price;"
    assert f"waits for 2 of these, {waits.format(0)}" in told(shell, eid)
    world.backend.deliver_signal(eid, waitpoints[0], "legal")
    assert f"waits for 2 of these, {waits.format(1)}" in told(shell, eid)
    suspension = shell.describe(eid).suspension
    assert (suspension.needed, suspension.received) == (2, 1)


def test_a_history_tells_of_every_state(shell, states):
    for state, eid in states.items():
        words = {"active": "holds the lease", "waiting_children": "waiting for its children"}
        assert words.get(state, state) in told(shell, eid)


def test_a_history_tells_the_reason_of_a_cancellation_and_the_wish_for_one(world, states):
    assert "It has ended as cancelled: too expensive." in told(world.backend, states["cancelled"])
    world.backend.cancel(states["active"], reason="enough", grace=60)
    assert "Its worker is asked to stop: enough." in told(world.backend, states["active"])


GPU = CapabilitySet(["gpu"])


def test_a_history_tells_why_nobody_claims_an_execution(shell, world):
    eid = world.create(required_capabilities=GPU)
    text = told(shell, eid)
    assert f"It is waiting for a worker of lane {world.lane} that offers gpu, since " in text
    assert f"No worker holds a lease of lane {world.lane}" in text
    world.owned()
    assert f"These workers hold leases of lane {world.lane}: w-1. They are busy" in told(shell, eid)
    # A worker without the capability has looked.
    assert world.backend.claim(lane=world.lane, **CLAIM) is None
    assert "No worker that could claim it is idle." in told(shell, eid)
    popped = world.raw.zpopmin(keys.ready(world.lane, "gpu"))
    assert popped
    assert "A worker has heard of it and is about to claim it." in told(shell, eid)
    world.raw.hset(keys.core(eid), "last_transition_at", world.now() - 60_000)
    text = told(shell, eid)
    assert "A worker has heard of it and has not claimed it, or word of it was lost" in text
    assert "These workers hold leases" in text


def test_a_history_tells_which_children_have_not_ended(shell, world):
    parent, handle = world.owned()
    children = [world.create(parent_id=parent, delay=60) for _ in range(3)]
    world.backend.wait_children(handle)
    world.backend.cancel(children.pop())
    text = told(shell, parent)
    assert "2 of them have not ended: " in text
    assert all(each in text for each in children)


def test_a_history_tells_that_a_cancelled_flow_keeps_an_execution(shell, world):
    flow_id = world.create_flow()
    eid = world.create(flow_id=flow_id)
    world.backend.cancel_flow(flow_id, CancelFlowPolicy.FLOW_ONLY)
    text = told(shell, eid)
    assert "Its flow is cancelled or was removed: no new attempt of it begins." in text
    assert "idle" not in text
    world.raw.delete(keys.flow(keys.slot_tag_of(eid), flow_id))
    assert "Its flow is cancelled or was removed" in told(shell, eid)


def test_a_history_tells_that_nobody_fires_the_timers(shell, world, raw):
    eid = world.create(delay=60)
    assert "Nobody supervises, so its timers take no effect" in told(shell, eid)
    raw.set(keys.supervisor(), "worker-7", px=60_000)
    assert "supervises" not in told(shell, eid)
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"delay:{eid}": world.now() - 40_000})
    assert "worker-7, who supervises, has not acted on it" in told(shell, eid)


def test_a_history_tells_with_which_tags_and_in_which_trace_an_execution_was_created(
    shell, world, raw
):
    eid = world.create(tags={"app.user": "ada", "app.by": "web-3"})
    assert "Its tags are app.by=web-3, app.user=ada." in told(shell, eid)
    assert shell.describe(eid).traceparent is None
    trace = f"00-{'a' * 32}-{'b' * 16}-01"
    raw.hset(keys.core(eid), "traceparent", trace)
    assert f"It was created in the trace {trace}." in told(shell, eid)


def test_a_history_asks_for_nothing_that_the_user_may_not_do(own_server, raw, world):
    eid = world.create()
    rules = ROLES["worker"].rules.split()
    raw.execute_command("ACL", "SETUSER", "looker", "reset", "on", ">pass", *rules)
    raw.acl_log_reset()
    url = own_server[0].url.replace("://", "://looker:pass@", 1)
    with ff_fast.ValkeyBackend.connect(url) as backend:
        assert "It is waiting for a worker" in told(backend, eid)
    assert raw.acl_log() == []
    raw.execute_command("ACL", "DELUSER", "looker")


def test_a_history_tells_which_attempts_it_does_not_look_at(shell, world):
    retry = RetryPolicy(max_retries=11, delay=0.001)
    eid = world.create(retry=retry)
    for number in range(12):
        if number:
            world.fire(eid, "delay")
        handle = world.claim()
        world.backend.append_frame(handle, Frame(b"{}", FrameKind.EVENT, frame_type="x"))
        world.backend.fail(handle, "again", FailureClass.TRANSIENT)
    text = told(shell, eid)
    assert "The workers and frames of attempts 0 to 1 are not looked at." in text
    assert "Attempt 2 has 1 frame: 1 in its log, 0 for its live window." in text
    assert "Attempt 1 has" not in text


def test_a_history_of_nothing_is_refused(shell):
    with pytest.raises(ExecutionNotFound):
        shell.explain(keys.new_execution_id(4))


LIVE = BestEffortLiveConfig(ttl_ms=60_000, maxlen_floor=16, maxlen_ceiling=64)
BRIEF = BestEffortLiveConfig(ttl_ms=50, maxlen_floor=1, maxlen_ceiling=64)


def write(world, handle, count, mode, **options):
    with world.backend.open_writer(handle, mode=mode, **options) as writer:
        for number in range(count):
            writer.write(b"x")
            if number % 16 == 15:
                writer.flush(5)
    return writer


def test_a_history_tells_that_the_ceiling_of_the_window_dropped_frames(shell, world):
    eid, handle = world.owned()
    write(world, handle, 1600, StreamMode.best_effort_live_with_config(LIVE))
    text = told(shell, eid)
    first = shell.describe_stream(eid, 0).live_first_sequence
    assert 64 <= 1600 - first + 1 < 1600
    assert "Attempt 0 has 1600 frames: 0 in its log, 1600 for its live window." in text
    assert f"{first - 1} frames of attempt 0 left the live window" in text
    assert "The window is at its ceiling: it keeps 64 frames at most" in text


def test_a_history_tells_that_the_window_has_expired(shell, world, raw):
    eid, handle = world.owned()
    write(world, handle, 8, StreamMode.best_effort_live_with_config(BRIEF))
    wait_until(lambda: not raw.exists(keys.live(eid, 0)))
    text = told(shell, eid)
    assert "The live window of attempt 0 is gone with all its 8 frames" in text
    assert "twice its ttl of 0.05 s" in text


def test_a_history_tells_what_has_left_the_log(shell, world):
    eid, handle = world.owned()
    write(world, handle, 2000, StreamMode.durable(), retention_maxlen=100)
    stream = shell.describe_stream(eid, 0)
    left = stream.log_added - stream.log_entries
    assert left > 0
    assert stream.log_first_id is not None
    assert f"{left} durable frames of attempt 0 left the log" in told(shell, eid)


def test_an_attempt_tells_who_has_had_it_and_when(shell, world):
    eid, handle = world.owned()
    before = shell.describe_stream(eid, 0)
    assert (before.worker_id, before.worker_instance_id) == ("w", "w-1")
    assert before.began_at_ms <= before.claimed_at_ms <= world.now()
    assert (before.ended_at_ms, before.log_added) == (None, 0)
    world.backend.complete(handle)
    assert before.claimed_at_ms <= shell.describe_stream(eid, 0).ended_at_ms


# -- the diagnosis --------------------------------------------------------------------------------------------------------


def levels(backend, **options):
    return {each.check: each.level for each in backend.diagnose(**options)}


def test_a_healthy_deployment_has_nothing_that_failed(shell, raw):
    raw.set(keys.supervisor(), "worker-7", px=60_000)
    found = levels(shell)
    assert set(found.values()) <= {"ok", "unknown"}
    assert (found["library"], found["clock"], found["supervisor"]) == ("ok", "ok", "ok")
    raw.delete(keys.supervisor())
    assert levels(shell)["supervisor"] == "warning"
    (rights,) = [each for each in shell.diagnose() if each.check == "rights"]
    assert all(name in rights.text for name in ROLES)


def test_timers_that_nobody_fires_are_told(shell, world, raw):
    eid = world.create(delay=60)
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"delay:{eid}": world.now() - 40_000})
    found = {each.check: each for each in shell.diagnose()}
    assert found["supervisor"].level == "failed"
    assert "nobody supervises" in found["supervisor"].text
    world.fire(eid, "delay")
    assert levels(shell)["supervisor"] == "warning"


def test_who_supervises_is_told(shell, raw):
    raw.set(keys.supervisor(), "worker-7", px=60_000)
    (found,) = [each for each in shell.diagnose() if each.check == "supervisor"]
    assert found.text == "worker-7 supervises. No timer is overdue."


def test_a_supervisor_that_does_not_keep_up_is_told_by_its_name(shell, world, raw):
    eid = world.create(delay=60)
    raw.set(keys.supervisor(), "worker-7", px=60_000)
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"delay:{eid}": world.now() - 40_000})
    (found,) = [each for each in shell.diagnose() if each.check == "supervisor"]
    assert found.level == "failed"
    assert "worker-7 supervises and does not keep up" in found.text


@pytest.mark.parametrize(
    "policy, level",
    [("allkeys-lru", "failed"), ("volatile-lru", "warning"), ("noeviction", "ok")],
)
def test_a_full_server_that_deletes_is_told(own_server, raw, policy, level):
    raw.config_set("maxmemory", "1gb")
    raw.config_set("maxmemory-policy", policy)
    try:
        with (
            warnings.catch_warnings(action="ignore", category=DeploymentWarning),
            ff_fast.ValkeyBackend.connect(own_server[0].url) as backend,
        ):
            (found,) = [each for each in backend.diagnose() if each.check == "memory"]
    finally:
        raw.config_set("maxmemory", "0")
        raw.config_set("maxmemory-policy", "noeviction")
    assert found.level == level
    assert policy in found.text


@pytest.mark.parametrize("role", ROLES)
def test_a_user_has_the_role_of_its_line_and_is_told_each_right_that_it_lacks(
    own_server, raw, role
):
    server, _ = own_server
    url = server.url.replace("://", "://looker:pass@", 1)
    rules = ROLES[role].rules.split()
    raw.execute_command("ACL", "SETUSER", "looker", "reset", "on", ">pass", *rules)
    with ff_fast.ValkeyBackend.connect(url) as backend:
        raw.acl_log_reset()
        assert levels(backend, role=role)["rights"] == "ok"
        # What it may not do is asked for, and never tried.
        assert set(levels(backend).values()) <= {"ok", "unknown", "warning"}
        assert raw.acl_log() == []
        lost = [rules[-1], next(rule for rule in rules if "~" in rule and "config" not in rule)]
        fewer = [rule for rule in rules if rule not in lost]
        raw.execute_command("ACL", "SETUSER", "looker", "reset", "on", ">pass", *fewer)
        with ff_fast.ValkeyBackend.connect(url) as again:
            (found,) = [each for each in again.diagnose(role=role) if each.check == "rights"]
    raw.execute_command("ACL", "DELUSER", "looker")
    assert found.level == "failed"
    assert all(rule in found.text for rule in lost)


def test_the_line_of_a_role_takes_all_other_rights_of_a_user(own_server, raw):
    raw.execute_command("ACL", "SETUSER", "looker", "reset", "on", ">pass", "~*", "&*", "+@all")
    raw.execute_command("ACL", "SETUSER", "looker", "(~secret:* +get)")
    *_, line = acl_line(["reader"], "looker").splitlines()
    raw.execute_command(*line.split())
    for command in (["GET", "secret:1"], ["GET", "other"], ["SPUBLISH", "other", "x"], ["PING"]):
        told = raw.execute_command("ACL", "DRYRUN", "looker", *command)
        assert b"has no permissions" in told, command
    assert raw.execute_command("ACL", "DRYRUN", "looker", "GET", keys.PARTITIONS_CONFIG) == b"OK"
    raw.execute_command("ACL", "DELUSER", "looker")


# -- the commands ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(own_server, monkeypatch, capsys):
    monkeypatch.setenv(cli.URL_VARIABLE, own_server[0].url)

    def run(*argv):
        code = cli.main(argv)
        return code, capsys.readouterr().out

    return run


def test_one_command_says_why_an_execution_failed_why_frames_left_and_who_has_the_lease(run, world):
    failed, handle = world.owned()
    write(world, handle, 1600, StreamMode.best_effort_live_with_config(LIVE))
    world.backend.fail(handle, "no GPU\nleft")
    held, _ = world.owned()
    code, out = run("why", failed)
    assert code == 0
    assert "no GPU\\x0aleft" in out
    assert "left the live window" in out
    assert "worker w (w-1), who holds the lease until" in run("why", keys.url_id(held))[1]
    assert run("why", keys.new_execution_id(4))[0] == 1


def test_ls_prints_a_line_for_each(run, world, states):
    code, out = run("ls", "--lane", world.lane, "--count", "100")
    assert code == 0
    assert len(out.splitlines()) == len(everything(world.backend, lane=world.lane))
    (line,) = run("ls", "--state", "failed")[1].splitlines()
    assert states["failed"] in line
    assert line.endswith("no GPU")
    assert "waits for a signal named approve" in run("ls", "--state", "suspended")[1]
    assert "worker w-1, attempt 0" in run("ls", "--state", "active")[1]
    assert len(run("ls", "--count", "3", "--json")[1].splitlines()) == 3
    assert run("ls", "--tag", "app.x=1", "--namespace", "nobody") == (0, "")


def test_top_shows_lanes_workers_and_streams(run, world):
    eid, handle = world.owned()
    writer = write(world, handle, 20, StreamMode.durable())
    assert writer is not None
    code, out = run("top", "--once")
    assert code == 0
    assert world.lane in out
    assert "w (w-1)" in out
    assert eid in out
    assert '"frames":20' in run("top", "--once", "--json")[1]


def test_doctor_exits_with_1_if_something_failed(run, world, raw):
    code, out = run("doctor", "--role", "reader")
    assert code == 0
    assert "This user has all rights of the role reader." in out
    eid = world.create(delay=60)
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"delay:{eid}": 1})
    assert run("doctor", "--json")[0] == 1


ANOTHER = "0123456789ab"


def test_who_looks_changes_nothing_on_the_server(own_server, raw, monkeypatch, capsys):
    monkeypatch.setenv(cli.URL_VARIABLE, own_server[0].url)
    raw.flushall()
    raw.function_flush()
    for argv in (["doctor"], ["ls"], ["top", "--once"], ["why", keys.new_execution_id(4)]):
        assert cli.main(argv) == 1
        assert "no function library of ff_fast" in capsys.readouterr().err
    assert (raw.keys(), raw.function_list()) == ([], [])

    # Another build of the same contract serves, and is told of.
    other = _library.source().replace(_library.digest(), ANOTHER)
    raw.function_load(other, replace=True)
    assert cli.main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert f"digest {ANOTHER}, while this client has {_library.digest()}" in out
    assert "No count is stored" in out
    assert cli.main(["ls"]) == 0
    assert ANOTHER in str(raw.function_list(withcode=True))
    assert raw.keys() == []

    # An older contract is not replaced either.
    mine = f"ff.ok('{_library.CONTRACT}', '{ANOTHER}'"
    assert mine in other
    raw.function_load(
        other.replace(mine, f"ff.ok('{_library.CONTRACT - 1}', '{ANOTHER}'"), replace=True
    )
    assert cli.main(["doctor"]) == 1
    assert f"holds contract {_library.CONTRACT - 1} " in capsys.readouterr().err
    assert ANOTHER in str(raw.function_list(withcode=True))


BRISK = BackendRetry(number_of_retries=1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backend_that_loads_no_library_says_so_when_the_server_loses_it(own_server, raw, kind):
    config = BackendConfig.from_url(f"{own_server[0].url}?load_library=false")
    config = dataclasses.replace(config, retry=BRISK)
    opener = Opener(kind)
    backend = opener(config)
    assert backend.list_executions().items == ()
    raw.function_flush()
    for call in (backend.list_executions, lambda: opener(config)):
        with pytest.raises(FunctionMissing, match="no function library of ff_fast"):
            call()
    opener.close()
    assert raw.function_list() == []


NASTY = "\x1b[31m\x9b2J\x7f\u202e\nname"


def test_a_server_that_loses_data_is_told_of_in_one_line_and_not_to_who_looks(
    own_server, raw, capsys
):
    raw.config_set("maxmemory", "1gb")
    raw.config_set("maxmemory-policy", "allkeys-lru")
    url = ["--url", own_server[0].url]
    try:
        with warnings.catch_warnings(action="always", category=DeploymentWarning):
            assert cli.main(["submit", *url, "prompt"]) == 0
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith("ff-fast: The server's maxmemory-policy is allkeys-lru")
            assert cli.main(["ls", *url]) == 0
            assert capsys.readouterr().err == ""
    finally:
        raw.config_set("maxmemory", "0")
        raw.config_set("maxmemory-policy", "noeviction")


def test_texts_of_others_reach_no_terminal_as_commands(own_server, run, world, raw):
    eid, handle = world.owned()
    world.backend.fail(handle, NASTY)
    raw.set(keys.supervisor(), NASTY.encode(), px=60_000)
    held, _ = world.owned()
    raw.hset(keys.core(held), "current_worker_instance_id", NASTY.encode())
    for argv in (["doctor"], ["doctor", "--json"], ["ls"], ["ls", "--json"], ["why", eid]):
        code, out = run(*argv)
        assert (code, "name" in out) == (0, True), argv
        assert not set(out) & set("\x1b\x9b\x7f"), argv
    for argv in (["top", "--once"], ["top", "--once", "--json"], ["why", "--json", eid]):
        assert not set(run(*argv)[1]) & set("\x1b\x9b\x7f"), argv
    assert orjson.loads(run("why", "--json", eid)[1])[2].count(NASTY) == 1


def test_a_terminal_without_the_letters_of_a_text_shows_their_numbers(
    world, own_server, monkeypatch
):
    eid, handle = world.owned()
    world.backend.fail(handle, "déjà vu")
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", out)
    assert cli.main(["why", "--url", own_server[0].url, eid]) == 0
    assert b"d\\xe9j\\xe0 vu" in out.buffer.getvalue()


def test_top_goes_on_when_the_server_is_back(monkeypatch, capsys):
    with EmbeddedServer(**PROMPT) as server, contextlib.ExitStack() as stack:
        stack.enter_context(ff_fast.ValkeyBackend.connect(server.url)).create_execution(lane="one")

        def away():
            os.kill(server.pid, signal.SIGKILL)

        def back():
            server.restart()
            again = stack.enter_context(ff_fast.ValkeyBackend.connect(server.url))
            again.create_execution(lane="two")

        def stop():
            raise KeyboardInterrupt

        then = iter((away, back, stop))
        clock = SimpleNamespace(monotonic=time.monotonic, sleep=lambda _: next(then)())
        monkeypatch.setattr("ff_fast._cli.top.time", clock)
        config = dataclasses.replace(BackendConfig.from_url(server.url), retry=BRISK)
        monkeypatch.setattr(
            "ff_fast._cli.top.look_at", lambda _: ff_fast.ValkeyBackend.connect(config)
        )
        assert cli.main(["top", "--url", server.url]) == 130
    told = capsys.readouterr()
    assert told.out.index("one") < told.out.index("two")
    assert told.err.startswith("ff-fast: ")
    assert len(told.err.splitlines()) == 1


def test_each_part_of_top_has_lines_on_a_low_terminal():
    assert fitted([15, 15, 15], 19) == [6, 6, 7]
    assert fitted([2, 15, 15], 19) == [2, 8, 9]
    assert fitted([1, 0, 15], 100) == [1, 0, 15]
    assert fitted([15, 15, 15], -3) == [1, 1, 1]


def test_top_tells_how_many_lines_it_leaves_out(run, world):
    for number in range(3):
        world.backend.create_execution(lane=f"lane-{number}")
    assert "LANE (2 of 3) " in run("top", "--once", "--count", "2")[1]
    assert "LANE  " in run("top", "--once")[1]


@pytest.mark.parametrize("command", ["ls", "top"])
def test_a_count_of_nothing_is_wrong_usage(command, capsys):
    assert cli.main([command, "--count", "0"]) == 2
    assert "whole number from 1" in capsys.readouterr().err


def test_a_time_is_told_as_an_age():
    from ff_fast._cli.look import age

    now = time.time() * 1000
    ages = [age(int(now - seconds * 1000)) for seconds in (-5, 3.5, 200, 7300, 200_000)]
    assert ages == ["0s", "3s", "3m", "2h", "2d"]
