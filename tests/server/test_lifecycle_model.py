"""Random sequences of operations on one server against a plain model of what must come of them.

All executions are in one partition of a server of their own. After every step each one is in exactly the index that its state
names, and has a completion record if it has ended, and one alone. Calls are repeated as after a lost reply.
"""

import threading
import uuid

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ff_fast import (
    CancelFlowPolicy,
    CancelFlowWait,
    CapabilitySet,
    CountKind,
    FailureClass,
    HandleKind,
    ResumeCondition,
    RetryBackoff,
    RetryPolicy,
    ScannerFilter,
    TimeoutBehavior,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast._core import supervision as supervision_core
from ff_fast._core.deployment import Deployment
from ff_fast.embedded import EmbeddedServer

from ..conftest import connect_raw
from .executions import TERMINAL, World

OUTCOMES = {
    "completed": b"success", "failed": b"failed", "cancelled": b"cancelled", "expired": b"expired",
}  # fmt: skip
RETRY = RetryPolicy(
    max_retries=1, backoff=RetryBackoff.FIXED, delay=60, max_reclaims=1, jitter_percent=0
)


class Modelled:
    """One execution, as the model has it."""

    def __init__(self, eid, state, flow, parent, gpu, limits):
        self.eid, self.state, self.flow, self.parent, self.gpu = eid, state, flow, parent, gpu
        self.attempt_limit, self.deadline = limits
        self.children = set()
        self.attempts = self.retries = self.reclaims = self.epoch = 0
        self.interrupted = False
        self.handle = None
        self.last = None
        self.lapsed = self.cancel_asked = False
        self.pending = {}
        self.early = []
        self.suspension = None

    def __repr__(self):
        return f"<{self.eid[-4:]} {self.state}>"


class Lifecycle(RuleBasedStateMachine):
    world = None

    def __init__(self):
        super().__init__()
        # A world of its own on the same connection.
        self.world.lane = self.lane = f"model-{uuid.uuid4().hex}"
        self.world.scope = ScannerFilter(namespace=self.lane)
        self.all = []
        self.flow_state = {}
        self.dead = []
        self.ended = set()
        self.world.raw.flushdb()

    # -- the model's own moves ---------------------------------------------------------------------

    def flow_policy(self, x):
        return self.flow_state.get(x.flow)

    def to_waiting(self, x):
        policy = self.flow_policy(x)
        if policy is CancelFlowPolicy.CANCEL_ALL or (
            policy is CancelFlowPolicy.CANCEL_PENDING and not x.interrupted
        ):
            self.end(x, "cancelled")
        else:
            x.state = "waiting"

    def drop_waitpoints(self, x):
        for point in x.pending.values():
            self.dead.append((x, point))
        x.pending, x.early = {}, []
        self.drop_suspension(x)

    def drop_suspension(self, x):
        if x.suspension is not None:
            self.dead.extend((x, point) for point in x.suspension["points"])
        x.suspension = None

    def end(self, x, state):
        x.state = state
        x.handle = None
        self.drop_waitpoints(x)
        parent = x.parent
        if parent is not None:
            parent.children.discard(x)
            if parent.state == "waiting_children" and not parent.children:
                self.to_waiting(parent)

    def end_attempt(self, x):
        x.interrupted = False
        x.handle = None
        self.drop_waitpoints(x)

    def interrupt(self, x):
        x.interrupted = True
        x.handle = None

    def lapse(self, x):
        x.reclaims += 1
        x.lapsed = False
        if x.reclaims > 1:
            self.end(x, "failed")
        else:
            self.end_attempt(x)
            self.to_waiting(x)

    def refused(self, x, call, *args):
        """A call of somebody whose lease is gone."""
        try:
            call(*args)
        except (
            errors.StaleOwner,
            errors.LeaseExpired,
            errors.ExecutionNotActive,
            errors.ExecutionSuspended,
        ):
            return
        raise AssertionError(f"{call} was not refused to {x}")

    def pick(self, data, *states, owned=False):
        found = [x for x in self.all if x.state in states and (not owned or not x.lapsed)]
        return data.draw(st.sampled_from(found)) if found else None

    def owned(self, data):
        """An execution under a lease that has not lapsed; one is claimed or made where there is none."""
        for _ in range(2):
            x = self.pick(data, "active", owned=True)
            if x is not None:
                return x
            if not any(self.claimable(x, True) for x in self.all):
                self.make()
            self.claim_one(True)
        return self.pick(data, "active", owned=True)

    # -- rules --------------------------------------------------------------------------------------

    @initialize()
    def begin(self):
        self.flow = self.world.backend.create_flow()
        self.flow_state[self.flow] = None

    @rule(
        delay=st.sampled_from([None, None, 60]),
        deadline=st.sampled_from([None, 60]),
        limit=st.sampled_from([None, 60]),
        gpu=st.booleans(),
        in_flow=st.booleans(),
        with_parent=st.booleans(),
        data=st.data(),
    )
    def create(self, delay, deadline, limit, gpu, in_flow, with_parent, data):
        flow = self.flow if in_flow and self.flow_state[self.flow] is None else None
        parents = [x for x in self.all if x.state not in TERMINAL]
        parent = data.draw(st.sampled_from(parents)) if with_parent and parents else None
        self.make(delay, deadline, limit, gpu, flow, parent)

    def make(self, delay=None, deadline=None, limit=60, gpu=False, flow=None, parent=None):
        eid = f"{{fp:0}}:{uuid.uuid4()}"
        for _ in range(2):
            self.world.create(
                # The first that was made is the first to be claimed, within a millisecond as well.
                priority=9_000 - len(self.all),
                execution_id=eid, delay=delay, deadline=deadline, attempt_timeout=limit,
                required_capabilities=CapabilitySet(["gpu"] if gpu else []), flow_id=flow,
                parent_id=None if parent is None else parent.eid, retry=RETRY,
            )  # fmt: skip
        x = Modelled(eid, "delayed" if delay else "waiting", flow, parent, gpu, (limit, deadline))
        if parent is not None:
            parent.children.add(x)
        self.all.append(x)

    def claimable(self, x, gpu):
        policy = self.flow_policy(x)
        allowed = policy is None or (policy is not CancelFlowPolicy.CANCEL_ALL and x.interrupted)
        return x.state == "waiting" and allowed and (gpu or not x.gpu)

    @precondition(lambda self: self.all)
    @rule(gpu=st.booleans())
    def claim(self, gpu):
        self.claim_one(gpu)

    def claim_one(self, gpu):
        handle = self.world.claim(capabilities=CapabilitySet(["gpu"] if gpu else []))
        able = [x for x in self.all if self.claimable(x, gpu)]
        if handle is None:
            assert able == []
            return
        eid = handle.fields().execution_id
        (x,) = [x for x in able if x.eid == eid]
        assert x is able[0]
        self.claimed(x, handle)

    def claimed(self, x, handle):
        x.epoch += 1
        fields = handle.fields()
        if not x.interrupted:
            x.attempts += 1
        assert (fields.attempt_index, fields.lease_epoch) == (x.attempts - 1, x.epoch)
        assert (handle.kind is HandleKind.RESUMED) or not x.interrupted
        x.interrupted, x.state, x.handle, x.lapsed = False, "active", handle, False

    @rule(data=st.data())
    def renew(self, data):
        x = self.owned(data)
        if x is not None:
            self.world.backend.renew(x.handle)

    @rule(data=st.data())
    def complete(self, data):
        x = self.owned(data)
        if x is not None:
            handle = x.handle
            self.end(x, "completed")
            for _ in range(2):
                self.world.backend.complete(handle, b"r")

    @rule(data=st.data(), cls=st.sampled_from(FailureClass))
    def fail(self, data, cls):
        x = self.owned(data)
        if x is None:
            return
        handle = x.handle
        outcomes = [self.world.backend.fail(handle, "why", cls) for _ in range(2)]
        assert outcomes[0] == outcomes[1]
        if cls is FailureClass.INFRA_CRASH:
            self.lapse(x)
        elif cls in (FailureClass.TRANSIENT, FailureClass.TIMEOUT) and x.retries < 1:
            x.retries += 1
            self.end_attempt(x)
            x.state = "delayed"
        else:
            self.end(x, "failed")
        assert outcomes[0].retry_scheduled == (x.state in ("waiting", "delayed"))
        self.refused(x, self.world.backend.complete, handle)

    @rule(data=st.data())
    def delay(self, data):
        x = self.owned(data)
        if x is not None:
            handle = x.handle
            assert self.world.backend.delay(handle, 60) == self.world.backend.delay(handle, 60)
            self.interrupt(x)
            x.state = "delayed"
            self.refused(x, self.world.backend.renew, handle)

    @rule(data=st.data())
    def wait_children(self, data):
        x = self.owned(data)
        if x is not None:
            handle = x.handle
            for _ in range(2):
                self.world.backend.wait_children(handle)
            self.interrupt(x)
            x.state = "waiting_children"
            if not x.children:
                self.to_waiting(x)

    @precondition(lambda self: self.all)
    @rule(data=st.data(), grace=st.sampled_from([None, 60]))
    def cancel(self, data, grace):
        x = data.draw(st.sampled_from(self.all))
        if x.state in TERMINAL and x.state != "cancelled":
            self.refused(x, self.world.backend.cancel, x.eid)
            return
        outcomes = [self.world.backend.cancel(x.eid, grace=grace) for _ in range(2)]
        assert outcomes[0] == outcomes[1]
        if x.state == "active" and grace:
            assert not outcomes[0].cancelled
            x.cancel_asked = True
        elif x.state != "cancelled":
            assert outcomes[0].previous_state == x.state
            self.end(x, "cancelled")

    # -- suspension ---------------------------------------------------------------------------------

    @rule(data=st.data())
    def create_waitpoint(self, data):
        x = self.owned(data)
        if x is not None and len(x.pending) < 4:
            point = self.world.backend.create_waitpoint(x.handle)
            again = self.world.backend.create_waitpoint(x.handle, waitpoint_id=point.waitpoint_id)
            assert again == point
            x.pending[point.waitpoint_id] = point

    @rule(
        data=st.data(),
        timeout=st.sampled_from([60, 60, None]),
        behavior=st.sampled_from(TimeoutBehavior),
        depth=st.sampled_from([1, 1, 2, 3, 5]),
    )
    def suspend(self, data, timeout, behavior, depth):
        x = self.owned(data)
        if x is None:
            return
        while len(x.pending) < 2:
            point = self.world.backend.create_waitpoint(x.handle)
            x.pending[point.waitpoint_id] = point
        tree = data.draw(trees(list(x.pending), depth))
        named = names_of(tree)
        points = {name: point for name, point in x.pending.items() if name in named}
        handle = x.handle
        condition = condition_of(tree, points)
        outcome = self.world.backend.suspend(
            handle, condition, timeout=timeout, on_timeout=behavior
        )
        suspension = {
            "tree": tree, "points": list(points.values()), "signals": [],
            "timeout": timeout, "behavior": behavior,
        }  # fmt: skip
        x.suspension = suspension
        for name in points:
            del x.pending[name]
        met = False
        for signal in x.early:
            if signal[0] in points and not met:
                suspension["signals"].append(signal)
                met = is_met(tree, suspension["signals"])
        x.early = [signal for signal in x.early if signal[0] not in points]
        assert outcome.already_satisfied == met
        if met:
            self.drop_suspension(x)
            self.world.backend.renew(handle)
            return
        again = self.world.backend.suspend(handle, condition, timeout=timeout, on_timeout=behavior)
        assert again.suspension_id == outcome.suspension_id
        self.interrupt(x)
        x.state = "suspended"
        self.refused(x, self.world.backend.renew, handle)

    @precondition(lambda self: any(x.suspension or x.pending for x in self.all))
    @rule(data=st.data(), name=st.sampled_from("xy"), source=st.sampled_from("pq"))
    def signal(self, data, name, source):
        targets = [
            (x, point)
            for x in self.all
            for point in [*x.pending.values(), *(x.suspension or {"points": []})["points"]]
        ]
        if not targets:
            return
        x, point = data.draw(st.sampled_from(targets))
        one = str(uuid.uuid4())
        options = {"signal_id": one, "source_identity": source, "idempotency_key": one}
        first, again = (
            self.world.backend.deliver_signal(x.eid, point, name, **options) for _ in range(2)
        )
        assert again.duplicate
        assert (again.signal_id, again.effect) == (first.signal_id, first.effect)
        signal = (point.waitpoint_id, name, one, source)
        if point.waitpoint_id in x.pending:
            assert first.effect == "buffered_for_pending_waitpoint"
            x.early.append(signal)
            return
        x.suspension["signals"].append(signal)
        met = is_met(x.suspension["tree"], x.suspension["signals"])
        assert (first.effect == "resume_condition_satisfied") == met
        if met:
            self.drop_suspension(x)
            self.to_waiting(x)

    @precondition(lambda self: self.dead)
    @rule(data=st.data())
    def a_dead_token_does_nothing(self, data):
        x, point = data.draw(st.sampled_from(self.dead))
        try:
            self.world.backend.deliver_signal(x.eid, point, "x")
        except errors.WaitpointClosed:
            return
        raise AssertionError(f"a closed waitpoint took a signal of {x}")

    # -- time ---------------------------------------------------------------------------------------

    @rule(data=st.data())
    def lapse_without_a_supervisor(self, data):
        x = self.owned(data)
        if x is not None:
            handle = x.handle
            self.world.due(x.eid, "lease")
            x.lapsed = True
            for call in (self.world.backend.renew, self.world.backend.complete):
                self.refused(x, call, handle)

    @rule(data=st.data())
    def reclaim(self, data):
        x = self.pick(data, "active")
        if x is None:
            return
        token = supervision_core.reclaim_token(x.eid, self.lane, self.world.now())
        able = CapabilitySet(["gpu"])
        policy, lapsed = self.flow_policy(x), x.lapsed
        try:
            handle = self.world.backend.claim_from_reclaim(
                token, worker_id="w", worker_instance_id="w-2", capabilities=able
            )
        except errors.ExecutionNotClaimable:
            if policy is None and lapsed:
                self.lapse(x)
                assert x.state == "failed"
            return
        assert lapsed
        assert policy is None
        self.lapse(x)
        assert x.state == "waiting"
        self.claimed(x, handle)

    def armed(self):
        for x in self.all:
            if x.state in TERMINAL:
                continue
            if x.deadline:
                yield x, "deadline"
            if x.cancel_asked:
                yield x, "cancel"
            if x.state == "active":
                yield x, "lease"
            if x.state == "active" and x.attempt_limit:
                yield x, "attempt"
            if x.state == "delayed":
                yield x, "delay"
            if x.state == "suspended" and x.suspension["timeout"]:
                yield x, "suspension"

    @precondition(lambda self: any(self.armed()))
    @rule(data=st.data(), supervisors=st.integers(1, 2))
    def a_round(self, data, supervisors):
        x, kind = data.draw(st.sampled_from(list(self.armed())))
        # Lapsed leases have been due before.
        lapsed = [y for y in self.all if y.state == "active" and y.lapsed]
        if kind != "lease" and x in lapsed:
            return
        self.world.due(x.eid, kind)
        threads = [threading.Thread(target=self.world.round) for _ in range(supervisors - 1)]
        for thread in threads:
            thread.start()
        self.world.round()
        for thread in threads:
            thread.join()
        for y in lapsed:
            if y is not x:
                self.lapse(y)
        if x.state in TERMINAL:
            return
        if kind == "lease":
            self.lapse(x)
        elif kind == "delay":
            self.to_waiting(x)
        elif kind == "deadline":
            self.end(x, "expired")
        elif kind == "cancel":
            self.end(x, "cancelled")
        elif kind == "attempt" and x.retries < 1:
            x.retries += 1
            self.end_attempt(x)
            x.state = "delayed"
        elif kind == "attempt":
            self.end(x, "expired")
        else:
            self.time_out(x)

    def time_out(self, x):
        behavior = x.suspension["behavior"]
        if behavior is TimeoutBehavior.AUTO_RESUME:
            self.drop_suspension(x)
            self.to_waiting(x)
        elif behavior is TimeoutBehavior.ESCALATE:
            x.suspension["timeout"] = None
        else:
            ends = {"fail": "failed", "cancel": "cancelled", "expire": "expired"}
            self.end(x, ends[behavior.value])

    # -- flows --------------------------------------------------------------------------------------

    @precondition(lambda self: sum(x.flow is not None for x in self.all) > 1)
    @rule(policy=st.sampled_from(CancelFlowPolicy), wait=st.booleans())
    def cancel_flow(self, policy, wait):
        first = self.flow_state[self.flow]
        how = CancelFlowWait.WAIT_INDEFINITE if wait else CancelFlowWait.NO_WAIT
        outcome = self.world.backend.cancel_flow(self.flow, policy, how)
        self.flow_state[self.flow] = policy = first or policy
        assert outcome.policy is policy
        if not wait and first is None:
            # The supervisor that finishes it comes with the next step at the latest.
            self.world.raw.zadd(
                keys.timers("{fp:0}"), {f"flow:{self.flow}": self.world.now() + 60_000}, xx=True
            )
        if not wait or policy is CancelFlowPolicy.FLOW_ONLY:
            return
        self.members_end(policy)

    def members_end(self, policy):
        for x in self.all:
            if x.flow == self.flow and x.state not in TERMINAL:
                runs = x.state in ("active", "suspended") or (
                    x.state == "waiting" and x.interrupted
                )
                if policy is CancelFlowPolicy.CANCEL_ALL or not runs:
                    self.end(x, "cancelled")

    # -- what always holds ----------------------------------------------------------------------------

    @invariant()
    def each_execution_is_in_exactly_its_index(self):
        for x in self.all:
            if x in self.ended:
                assert self.world.state(x.eid) == x.state, x
                continue
            look = self.world.check(
                x.eid,
                suspension_timer=x.state == "suspended" and bool(x.suspension["timeout"]),
                attempt_timer=x.state == "active" and bool(x.attempt_limit),
            )
            core, timers = look.core, look.timers
            assert core["state"] == x.state, x
            if x.state in TERMINAL:
                self.ended.add(x)
                (record,) = look.completions
                assert record[b"outcome"] == OUTCOMES[x.state]
            alive = x.state not in TERMINAL
            assert ("deadline" in timers) == (alive and bool(x.deadline))
            assert ("cancel" in timers) == (alive and x.cancel_asked)
            assert int(core["total_attempt_count"]) == x.attempts
            if x.flow:
                key = keys.flow_open("{fp:0}", x.flow)
                assert (self.world.raw.zscore(key, x.eid) is not None) == alive


# -- conditions: trees of (needed, kind, members), a leaf is (waitpoint, name or None) ------------------


def trees(names, depth):
    leaf = st.tuples(st.sampled_from(names), st.sampled_from([None, "x"]))

    @st.composite
    def node(draw, left):
        inner = leaf if left <= 1 else st.one_of(leaf, node(left - 1))
        members = draw(st.lists(inner, min_size=1, max_size=3))
        kind = draw(st.sampled_from(CountKind))
        leaves = [m for m in members if len(m) == 2]
        nodes = len(members) - len(leaves)
        if not leaves or kind is CountKind.DISTINCT_MEMBERS:
            most = len(members)
        elif kind is CountKind.DISTINCT_WAITPOINTS:
            most = len({name for name, _ in leaves}) + nodes
        else:
            most = 3
        return (draw(st.integers(1, most)), kind, members)

    return node(depth)


def names_of(tree):
    if len(tree) == 2:
        return {tree[0]}
    return set().union(*(names_of(member) for member in tree[2]))


def condition_of(tree, points):
    if len(tree) == 2:
        name, matcher = tree
        kind = WaitpointKind.EXTERNAL if matcher is None else WaitpointKind.SIGNAL_NAME
        return WaitpointSpec(kind, (matcher or "").encode(), points[name].hmac_token)
    needed, kind, members = tree
    return ResumeCondition(tuple(condition_of(member, points) for member in members), needed, kind)


def is_met(tree, signals):
    needed, kind, members = tree
    tokens = set()
    for at, member in enumerate(members):
        if len(member) == 3:
            if is_met(member, signals):
                tokens.add(("node", at))
            continue
        for point, name, identity, source in signals:
            if point == member[0] and member[1] in (None, name):
                tokens.add(
                    {
                        CountKind.DISTINCT_MEMBERS: ("leaf", at),
                        CountKind.DISTINCT_WAITPOINTS: ("waitpoint", point),
                        CountKind.DISTINCT_SIGNALS: ("signal", identity),
                        CountKind.DISTINCT_SOURCES: ("source", source),
                    }[kind]
                )
    return len(tokens) >= needed


# Some twenty seconds of work; the machine may be slow.
@pytest.mark.timeout(180)
def test_lifecycle_model(lane):
    with (
        EmbeddedServer() as server,
        connect_raw(server.url) as raw,
        World(server.url, raw, lane) as world,
    ):
        # One partition: a round is one read, and every operation meets every other.
        world.backend._deployment = Deployment(1)
        Lifecycle.world = world
        run_state_machine_as_test(
            Lifecycle,
            settings=settings(
                max_examples=60,
                stateful_step_count=40,
                deadline=None,
                suppress_health_check=list(HealthCheck),
            ),
        )
