"""`ff_open_writer`, and what takes a writer away."""

import pytest

import ff_fast
from ff_fast import keys
from ff_fast._core import ops

from ...heads import head_of
from ..streams import CODES, REFUSALS, Stream, _lapsed, live, log, part_of, patches, spoil

# -- opening ---------------------------------------------------------------------------------------


def test_opening_tells_where_to_go_on(unopened):
    claimed = unopened.raw.hget(unopened.meta, "created_at") + b"-0"
    assert head_of(unopened.raw, unopened.head).last_id == claimed
    assert unopened.open() == [1, b"OK", claimed, b"0", b"", b"0", b"1"]
    ms, _ = unopened.append(
        log(b"1"), patches(b"{}", base=0), live(b"3"), [b"H", b"2"], [b"E", b"99.5"]
    )
    assert unopened.open(b"writer-2") == [1, b"OK", b"%d-3" % ms, b"2", b"99.5", b"1", b"2"]
    ms, _ = unopened.append(log(b"4"), [b"H", b""], first=4, writer=b"writer-2")
    assert unopened.open(b"writer-3") == [1, b"OK", b"%d-4" % ms, b"4", b"99.5", b"1", b"3"]


def test_opening_again_with_the_same_id_changes_nothing(stream):
    stream.append(log(b"1"))
    before = stream.everything()
    answer = stream.open()
    assert stream.everything() == before
    assert stream.open() == answer
    # What was a duplicate for this writer is one still.
    assert stream.repeated(log(b"1"))[1] == 1


def test_opening_supersedes_the_writer_before(stream):
    stream.append(log(b"1"))
    stream.open(b"writer-2")
    stream.refused("writer_superseded", log(b"2"), first=2)
    stream.refused("writer_superseded", log(b"1"), first=1)
    stream.open()
    stream.refused("writer_superseded", log(b"2"), first=2, writer=b"writer-2")
    assert stream.append(log(b"2"), first=2)[1] == 2


def test_nobody_appends_without_opening(unopened):
    unopened.refused("writer_superseded", log(b"1"))


@pytest.mark.parametrize("at", range(5), ids=CODES[:5])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "first of several"])
def test_opening_is_refused_as_appending_is(unopened, at, alone):
    refusals = REFUSALS[at : at + 1] if alone else REFUSALS[at:5]
    _, call = spoil(unopened, refusals)
    before = unopened.everything()
    assert unopened.open(**call) == [0, CODES[at].encode()]
    assert unopened.everything() == before


# -- whatever takes the lease away takes the writer away -------------------------------------------


def _retried(stream):
    outcome = stream.backend.fail(stream.handle, "again", ff_fast.FailureClass.TRANSIENT)
    assert outcome.retry_scheduled


def _crashed(stream):
    stream.backend.fail(stream.handle, "lost", ff_fast.FailureClass.INFRA_CRASH)


def _suspend(stream):
    waitpoint = stream.backend.create_waitpoint(stream.handle)
    spec = ff_fast.WaitpointSpec(ff_fast.WaitpointKind.EXTERNAL, b"", waitpoint.hmac_token)
    assert not stream.backend.suspend(stream.handle, spec).already_satisfied


def _fire(stream, kind):
    tag = stream.eid[: stream.eid.index("}") + 1]
    timers = keys.timers(tag)
    member = f"{kind}:{stream.eid}"
    stream.raw.zadd(timers, {member: 1})
    args = (member, kind, "", "", "")
    assert stream.call("ff_fire_timer", (timers, stream.core), *args)[:3] == [1, b"OK", b"done"]
    assert stream.raw.zscore(timers, member) is None


def _lapse_by_timer(stream):
    _lapsed(stream)
    _fire(stream, "lease")


def _lapse_by_claim(stream):
    _lapsed(stream)
    args = ("w", "i", "lease-2", 30_000, "attempt-2", "1")
    assert stream.call("ff_claim_execution", (stream.core,), *args)[1] == b"OK"


def _cancel_with_its_flow(stream):
    tag = stream.eid[: stream.eid.index("}") + 1]
    flow = keys.new_uuid()
    names = [key(tag, flow) for key in (keys.flow, keys.flow_members, keys.flow_open)]
    stream.call("ff_create_flow", names[:1], flow, "default")
    stream.raw.zadd(names[2], {stream.eid: 0})
    reply = stream.call("ff_cancel_flow", (*names, keys.timers(tag)), "stop", "cancel_all", 0)
    assert reply[1] == b"OK"
    reply = stream.call("ff_cancel_members", (names[0], names[2], keys.timers(tag)), 10)
    assert reply[2:4] == [b"1", b"0"]


TAKERS = {
    "complete": (lambda s: s.backend.complete(s.handle, b"r"), "completed", "stream_closed"),
    "fail": (lambda s: s.backend.fail(s.handle, "x", ff_fast.FailureClass.PERMANENT), "failed", "stream_closed"),
    "fail and retry": (_retried, "delayed", "stream_closed"),
    "crash": (_crashed, "waiting", "stream_closed"),
    "cancel": (lambda s: s.backend.cancel(s.eid), "cancelled", "stream_closed"),
    "cancel by timer": (lambda s: _fire(s, "cancel"), "cancelled", "stream_closed"),
    "cancel with its flow": (_cancel_with_its_flow, "cancelled", "stream_closed"),
    "deadline": (lambda s: _fire(s, "deadline"), "expired", "stream_closed"),
    "attempt timeout": (lambda s: _fire(s, "attempt"), "delayed", "stream_closed"),
    "delay": (lambda s: s.backend.delay(s.handle, 60), "delayed", "stale_owner"),
    "no delay": (lambda s: s.backend.delay(s.handle, 0), "delayed", "stale_owner"),
    "wait for a child": (lambda s: (s.child(), s.backend.wait_children(s.handle)), "waiting_children", "stale_owner"),
    "wait for no child": (lambda s: s.backend.wait_children(s.handle), "waiting", "stale_owner"),
    "suspend": (_suspend, "suspended", "suspended"),
    "lapse by timer": (_lapse_by_timer, "waiting", "stream_closed"),
    "lapse by claim": (_lapse_by_claim, "active", "stale_owner"),
}  # fmt: skip


@pytest.fixture
def retrying(raw, backend, lane):
    stream = Stream(raw, backend, lane, retry=ff_fast.RetryPolicy(max_retries=1))
    stream.open()
    return stream


@pytest.mark.parametrize("take, state, code", TAKERS.values(), ids=TAKERS)
def test_who_takes_the_lease_away_takes_the_writer_away(retrying, take, state, code):
    stream = retrying
    stream.append(log(b"1"), live(b"2"), [b"H", b"1"])
    assert head_of(stream.raw, stream.head).writer == stream.writer_id()
    take(stream)
    assert stream.raw.hget(stream.core, "state") == state.encode()
    assert head_of(stream.raw, stream.head).writer is None
    # Not a new frame, not a repeat, not a batch without frames; nor may it open again.
    stream.refused(code, log(b"3"), first=3)
    stream.refused(code, log(b"1"), first=1)
    stream.refused(code, [b"K", b"1"], first=3)
    before = stream.everything()
    assert stream.open() == [0, code.encode()]
    assert stream.open(b"writer-2") == [0, code.encode()]
    assert stream.everything() == before


RESUMED = {
    "delay": lambda s: (s.backend.delay(s.handle, 0), _fire(s, "delay")),
    "wait for no child": lambda s: s.backend.wait_children(s.handle),
}


@pytest.mark.parametrize("interrupt", RESUMED.values(), ids=RESUMED)
def test_an_attempt_that_goes_on_is_not_the_old_writers(stream, interrupt):
    stream.append(log(b"1"), live(b"2"), [b"H", b"1"])
    old = stream.fence
    interrupt(stream)
    handle = stream.claim()
    assert handle.kind is ff_fast.HandleKind.RESUMED
    fence = ops.Attempt.of(handle).fence
    assert (fence[0], int(fence[2])) == (old[0], int(old[2]) + 1)
    stream.refused("stale_owner", log(b"3"), first=3)
    stream.refused("writer_superseded", log(b"3"), first=3, fence=fence)
    assert stream.open(fence=fence)[2].split(b"-")[1] == b"2"
    stream.refused("stale_owner", log(b"3"), first=3)
    assert stream.append(log(b"3"), first=3, fence=fence)[1] == 3
    assert stream.payloads() == [b"1", b"2", b"3"]


def test_a_suspension_that_is_not_needed_keeps_the_writer(stream):
    waitpoint = stream.backend.create_waitpoint(stream.handle)
    stream.backend.deliver_signal(stream.eid, waitpoint, "go")
    spec = ff_fast.WaitpointSpec(ff_fast.WaitpointKind.EXTERNAL, b"", waitpoint.hmac_token)
    assert stream.backend.suspend(stream.handle, spec).already_satisfied
    assert stream.append(log(b"1"))[1] == 1


def test_a_timer_that_is_early_takes_nothing(stream):
    tag = stream.eid[: stream.eid.index("}") + 1]
    member = f"lease:{stream.eid}"
    timers = keys.timers(tag)
    # Renewed since: the timer moves to the end that the lease has now.
    stream.raw.zadd(timers, {member: 1})
    reply = stream.call("ff_fire_timer", (timers, stream.core), member, "lease", "", "", "")
    assert reply == [1, b"OK", b"later"]
    expires_at = head_of(stream.raw, stream.head).lease_expires_at
    assert stream.raw.zscore(timers, member) == expires_at
    assert stream.append(log(b"1"))[1] == 1


def test_a_requested_cancel_is_told_to_the_writer_of_the_next_attempt(retrying):
    stream = retrying
    stream.backend.cancel(stream.eid, grace=60)
    _retried(stream)
    _fire(stream, "delay")
    attempt = ops.Attempt.of(stream.claim())
    assert attempt.attempt_index == 1
    head, _, _, summary = attempt.stream_keys
    names = (stream.core, head, summary)
    writer = ops.writer_id(attempt)
    assert stream.call("ff_open_writer", names, writer, attempt.fence[1])[1] == b"OK"
    args = part_of(attempt.stream_keys, writer, b"0", b"", *log(b"x"))
    reply = stream.call("ff_append", attempt.stream_keys, *args)
    assert reply.split(b" ")[3] == b"1"


def test_a_requested_cancel_leaves_the_writer_its_grace(stream):
    stream.backend.cancel(stream.eid, grace=60)
    assert stream.append(log(b"1"))[1] == 1
