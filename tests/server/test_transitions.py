"""Each transition of the table in lua/state.lua, made once by a call or a timer: state, index and history agree."""

import pytest

from ff_fast import (
    CancelFlowPolicy,
    CancelFlowWait,
    FailureClass,
    RetryBackoff,
    RetryPolicy,
    TimeoutBehavior,
    WaitpointKind,
    WaitpointSpec,
)
from tools import draw_states

from .executions import TERMINAL, World

TABLE = draw_states.transitions(draw_states.STATES.read_text("utf-8"))
TRANSITIONS = [(old, new) for old, targets in TABLE.items() for new in targets]
RETRY = RetryPolicy(max_retries=1, backoff=RetryBackoff.FIXED, delay=60)


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
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


@pytest.mark.parametrize("old, new", TRANSITIONS)
def test_each_transition_of_the_table(world, old, new):
    subject = Subject(world, old)
    assert world.state(subject.eid) == old
    MOVES[old, new](subject)
    assert world.state(subject.eid) == new
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
    world.fire(eid, "delay")
    steps = [(step.from_state, step.to_state) for step in world.backend.describe(eid).history]
    assert steps == [("delayed", "waiting"), ("waiting", "cancelled")]
    world.check(eid)
