"""Each transition of the table in lua/state.lua, made once by a call or a timer: state, index and history agree."""

import contextlib

import pytest

import ff_fast
from ff_fast import (
    CancelFlowPolicy,
    CancelFlowWait,
    FailureClass,
    RetryBackoff,
    RetryPolicy,
    TimeoutBehavior,
    WaitpointKind,
    WaitpointSpec,
    keys,
)
from ff_fast._core import ops
from tools import draw_states

from .executions import TERMINAL, World
from .streams import Listener

TABLE = draw_states.transitions(draw_states.STATES.read_text("utf-8"))
TRANSITIONS = [(old, new) for old, targets in TABLE.items() for new in targets]
RETRY = RetryPolicy(max_retries=1, backoff=RetryBackoff.FIXED, delay=60)


@pytest.fixture
def world(engine, raw, lane):
    with World(engine.url, raw, lane) as world:
        yield world


class Subject:
    """An execution that was brought into a state."""

    def __init__(self, world, state, on_timeout=TimeoutBehavior.FAIL):
        self.world, self.backend = world, world.backend
        options = {"deadline": 600, "retry": RETRY}
        if state in ("waiting", "delayed"):
            self.eid = world.create(delay=600 if state == "delayed" else None, **options)
            return
        self.eid, self.handle = world.owned(**options)
        if state == "waiting_children":
            self.child = world.create(parent_id=self.eid)
            self.backend.wait_children(self.handle)
        elif state == "suspended":
            self.point = self.backend.create_waitpoint(self.handle)
            self.suspend(timeout=600, on_timeout=on_timeout)

    def suspend(self, **options):
        spec = WaitpointSpec(WaitpointKind.EXTERNAL, b"", self.point.hmac_token)
        self.backend.suspend(self.handle, spec, **options)


class Unproduced(Subject):
    """The execution of a named stream whose first producer has given it back."""

    def __init__(self, world):
        self.world, self.backend = world, world.backend
        stream = self.backend.open_stream(world.lane, namespace=world.lane)
        self.eid = stream.execution_id
        stream._keeper.stop()
        lease_id = stream.handle.fields().lease_id
        op = ops.give_back(keys.partition_index(self.eid), lease_id)
        assert world.call(op) == (True, [])


def wait_for_a_child(subject):
    subject.world.create(parent_id=subject.eid)
    subject.backend.wait_children(subject.handle)


def suspend(subject):
    subject.point = subject.backend.create_waitpoint(subject.handle)
    subject.suspend()


def cancel(subject):
    subject.backend.cancel(subject.eid)


def deadline(subject):
    subject.world.fire(subject.eid, "deadline")


MOVES = {
    ("waiting", "active"): lambda s: s.world.claim(),
    ("waiting", "failed"): lambda s: s.world.fire(s.eid, "lease"),
    ("delayed", "waiting"): lambda s: s.world.fire(s.eid, "delay"),
    ("waiting_children", "waiting"): lambda s: s.backend.cancel(s.child),
    ("active", "waiting"): lambda s: s.world.fire(s.eid, "lease"),
    ("active", "delayed"): lambda s: s.backend.delay(s.handle, 600),
    ("active", "waiting_children"): wait_for_a_child,
    ("active", "suspended"): suspend,
    ("active", "completed"): lambda s: s.backend.complete(s.handle),
    ("active", "failed"): lambda s: s.backend.fail(s.handle, "no", FailureClass.PERMANENT),
    ("suspended", "waiting"): lambda s: s.backend.deliver_signal(s.eid, s.point, "go"),
    ("suspended", "failed"): lambda s: s.world.fire(s.eid, "suspension"),
} | {
    (old, new): move
    for old in TABLE
    for new, move in (("cancelled", cancel), ("expired", deadline))
}


def listening(world, eid):
    """A subscriber of the channels of an execution and of its attempts."""
    attempts = (keys.attempt_channel(eid, index) for index in range(3))
    return contextlib.closing(Listener(world.raw, keys.execution_channel(eid), *attempts))


def end_of(world, eid, index=0):
    """What is published of the end of an attempt: the id and the fields of its entry."""
    ((identity, fields),) = world.raw.xrevrange(keys.stream(eid, index), count=1)
    told = [b"E%b" % identity, fields[b"prev"], fields[b"end"]]
    return b" ".join([*told, fields[b"error"]] if b"error" in fields else told)


@pytest.mark.parametrize("old, new", TRANSITIONS)
def test_each_transition_of_the_table(world, old, new):
    subject = Unproduced(world) if (old, new) == ("waiting", "failed") else Subject(world, old)
    assert world.state(subject.eid) == old
    with listening(world, subject.eid) as listener:
        MOVES[old, new](subject)
        heard = listener.heard()
    assert world.state(subject.eid) == new
    eid = subject.eid
    expected = [(keys.execution_channel(eid), b"S" + new.encode())]
    if old == "active" and new == "waiting":
        expected.insert(0, (keys.attempt_channel(eid, 0), end_of(world, eid)))
    if "active" in (old, new) and new not in TERMINAL:
        # Its lease begins, or no longer ends.
        expected.append((keys.attempt_channel(eid, 0), b"R"))
    if new in TERMINAL:
        expected.append((keys.attempt_channel(eid, 0), end_of(world, eid)))
        if old not in ("waiting", "delayed"):
            # Readers of the next attempt learn that there is none.
            expected.append((keys.attempt_channel(eid, 1), b"R"))
    assert heard == expected
    last = world.backend.describe(subject.eid).history[-1]
    assert (last.from_state, last.to_state) == (old, new)
    world.check(subject.eid)


@pytest.mark.parametrize("end", TERMINAL)
def test_nothing_follows_an_end(world, end):
    subject = Subject(world, "active")
    MOVES["active", end](subject)
    history = world.backend.describe(subject.eid).history
    for kind in ("delay", "lease", "attempt", "suspension", "deadline", "cancel"):
        world.raw.zadd(f"ff:idx:{subject.eid[:-37]}:timers", {f"{kind}:{subject.eid}": 1})
    world.round()
    assert world.claim() is None
    assert world.backend.describe(subject.eid).history == history
    world.check(subject.eid)


@pytest.mark.parametrize(
    "behavior, new",
    [
        (TimeoutBehavior.AUTO_RESUME, "waiting"),
        (TimeoutBehavior.CANCEL, "cancelled"),
        (TimeoutBehavior.EXPIRE, "expired"),
        (TimeoutBehavior.FAIL, "failed"),
        (TimeoutBehavior.ESCALATE, "suspended"),
    ],
)
def test_each_end_of_a_suspension_that_nobody_ended(world, behavior, new):
    subject = Subject(world, "suspended", behavior)
    world.fire(subject.eid, "suspension")
    assert world.state(subject.eid) == new
    world.check(subject.eid)


def test_a_member_of_a_cancelled_flow_passes_through_waiting_to_its_end(world):
    flow = world.create_flow()
    eid = world.create(flow_id=flow, delay=600)
    world.backend.cancel_flow(flow, CancelFlowPolicy.CANCEL_ALL, CancelFlowWait.NO_WAIT)
    assert world.state(eid) == "delayed"
    with listening(world, eid) as listener:
        world.fire(eid, "delay")
        assert listener.heard() == [
            (keys.execution_channel(eid), b"Swaiting"),
            (keys.execution_channel(eid), b"Scancelled"),
            (keys.attempt_channel(eid, 0), end_of(world, eid)),
        ]
    steps = [(step.from_state, step.to_state) for step in world.backend.describe(eid).history]
    assert steps == [("delayed", "waiting"), ("waiting", "cancelled")]
    world.check(eid)


def test_a_new_attempt_is_told_on_its_own_channel(world):
    eid, _ = world.owned(retry=RETRY)
    world.fire(eid, "lease")
    with listening(world, eid) as listener:
        handle = world.claim()
        assert listener.heard() == [
            (keys.execution_channel(eid), b"Sactive"),
            (keys.attempt_channel(eid, 1), b"R"),
        ]
        world.backend.renew(handle, lease_ttl_ms=12_000)
        assert listener.heard() == [(keys.attempt_channel(eid, 1), b"L12000")]
        world.backend.open_writer(handle)
        assert listener.heard() == [(keys.attempt_channel(eid, 1), b"R")]
        world.backend.complete(handle)
        assert listener.heard() == [
            (keys.execution_channel(eid), b"Scompleted"),
            (keys.attempt_channel(eid, 1), end_of(world, eid, 1)),
            (keys.attempt_channel(eid, 2), b"R"),
        ]


def test_an_end_behind_a_foreign_entry_is_told_with_its_own_id(world):
    eid, handle = world.owned()
    world.raw.xadd(keys.stream(eid, 0), {"junk": "1"}, id="9999999999999-7")
    with listening(world, eid) as listener:
        world.backend.complete(handle)
        (_, told) = listener.heard()[1]
    assert told == b"E10000000000000-1 0 attempt_success" == end_of(world, eid)


def test_a_user_who_may_not_publish_moves_an_execution_all_the_same(engine, world):
    world.raw.execute_command(
        "ACL", "SETUSER", "mute", "reset", "on", "nopass", "~*", "+@all", "resetchannels"
    )
    eid, handle = world.owned()
    with (
        ff_fast.ValkeyBackend.connect(engine.url.replace("://", "://mute:any@", 1)) as mute,
        listening(world, eid) as listener,
    ):
        mute.renew(handle)
        mute.complete(handle)
        assert listener.heard() == []
    assert world.state(eid) == "completed"
    world.check(eid)
    world.raw.execute_command("ACL", "DELUSER", "mute")
