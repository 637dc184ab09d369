"""Listings of executions, lanes and workers; histories in sentences; the diagnosis of a deployment."""

import time

import pytest

import ff_fast
from ff_fast import (
    BestEffortLiveConfig,
    CapabilitySet,
    Corruption,
    ExecutionNotFound,
    FailureClass,
    RetryPolicy,
    StreamMode,
    WaitpointKind,
    WaitpointSpec,
    cli,
    keys,
)
from ff_fast._core.roles import ROLES
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


def test_an_error_in_a_listing_is_short(world):
    eid, handle = world.owned()
    world.backend.fail(handle, "é" * 10_000)
    (found,) = everything(world.backend, state="failed")
    assert found.execution_id == eid
    assert 250 <= len(found.error) <= 257


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


def test_a_history_tells_of_every_state(shell, states):
    for state, eid in states.items():
        words = {"active": "holds the lease", "waiting_children": "waiting for its children"}
        assert words.get(state, state) in told(shell, eid)


def test_a_history_tells_the_reason_of_a_cancellation_and_the_wish_for_one(world, states):
    assert "It has ended as cancelled: too expensive." in told(world.backend, states["cancelled"])
    world.backend.cancel(states["active"], reason="enough", grace=60)
    assert "Its worker is asked to stop: enough." in told(world.backend, states["active"])


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
    assert f"{first - 1} frames of attempt 0 have left the live window" in text
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
    assert f"{left} durable frames of attempt 0 have left the log" in told(shell, eid)


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


def test_a_healthy_deployment_has_nothing_that_failed(shell):
    found = levels(shell)
    assert set(found.values()) <= {"ok", "unknown"}
    assert (found["library"], found["clock"], found["supervisor"]) == ("ok", "ok", "ok")
    (rights,) = [each for each in shell.diagnose() if each.check == "rights"]
    assert all(name in rights.text for name in ROLES)


def test_timers_that_nobody_fires_are_told(shell, world, raw):
    eid = world.create(delay=60)
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"delay:{eid}": world.now() - 40_000})
    found = {each.check: each for each in shell.diagnose()}
    assert found["supervisor"].level == "failed"
    assert "nobody supervises" in found["supervisor"].text
    world.fire(eid, "delay")
    assert levels(shell)["supervisor"] == "ok"


def test_who_supervises_is_told(shell, raw):
    raw.set(keys.supervisor(), "worker-7", px=60_000)
    (found,) = [each for each in shell.diagnose() if each.check == "supervisor"]
    assert found.text == "Worker-7 supervises; no timer is overdue."


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
    assert "have left the live window" in out
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


def test_a_time_is_told_as_an_age():
    from ff_fast._cli.look import age

    now = time.time() * 1000
    ages = [age(int(now - seconds * 1000)) for seconds in (-5, 3.5, 200, 7300, 200_000)]
    assert ages == ["0s", "3s", "3m", "2h", "2d"]
