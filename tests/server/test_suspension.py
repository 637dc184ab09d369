"""Waitpoints, conditions, signals and resumption; every defect of the engine this one comes from, by its name."""

import dataclasses
import hashlib
import hmac
import itertools
import os

import pytest

from ff_fast import (
    CountKind,
    Frame,
    FrameKind,
    Handle,
    HandleKind,
    PendingWaitpoint,
    ResumeCondition,
    StreamMode,
    TimeoutBehavior,
    WaitpointHmac,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast._core import ops

from ..heads import head_of
from .executions import WORKER, World, beside

any_of, all_of, count = ResumeCondition.any, ResumeCondition.all, ResumeCondition.count
MET, MORE = "resume_condition_satisfied", "appended_to_waitpoint"
AGAIN, NO_MATCH = "appended_to_waitpoint_duplicate", "signal_ignored_matcher_failed"
FOREIGN, BUFFERED = "signal_ignored_not_in_condition", "buffered_for_pending_waitpoint"


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


def spec(waitpoint, name=None, *, correlation_id=None):
    if name is not None:
        kind, matcher = WaitpointKind.SIGNAL_NAME, name
    elif correlation_id is not None:
        kind, matcher = WaitpointKind.CORRELATION_ID, correlation_id
    else:
        kind, matcher = WaitpointKind.EXTERNAL, ""
    return WaitpointSpec(kind, matcher.encode(), waitpoint.hmac_token)


@pytest.fixture
def suspended(world):
    """``suspended(condition)``: an execution that waits on what *condition* makes of waitpoints A to E, and those."""

    def make(condition, **options):
        eid, handle = world.owned()
        points = [world.backend.create_waitpoint(handle) for _ in range(5)]
        outcome = world.backend.suspend(handle, condition(*points), **options)
        assert not outcome.already_satisfied
        return eid, points

    return make


def signal(world, eid, point, name="go", **options):
    return world.backend.deliver_signal(eid, point, name, **options).effect


# -- conditions ------------------------------------------------------------------------------------


def test_what_it_waits_for_is_described(world, suspended):
    eid, (a, b, *_) = suspended(
        lambda a, b, *_: ResumeCondition.any(spec(a, "go"), spec(b, "x y"), spec(a, "on")),
        reason="approval",
        timeout=60,
        on_timeout=TimeoutBehavior.CANCEL,
    )
    told = world.backend.describe(eid)
    found = told.suspension
    assert found.waitpoint_ids == (a.waitpoint_id, b.waitpoint_id)
    assert (found.attempt_index, found.reason) == (0, "approval")
    assert found.on_timeout is TimeoutBehavior.CANCEL
    assert found.suspended_at_ms == told.last_transition_at_ms == found.timeout_at_ms - 60_000
    assert a.hmac_token.reveal() not in f"{told!r} {dataclasses.asdict(told)}"
    signal(world, eid, a, "go")
    assert world.backend.describe(eid).suspension is None


def test_a_single_waitpoint_resumes(world, suspended):
    eid, (a, *_) = suspended(lambda a, *_: spec(a, "go"))
    assert world.state(eid) == "suspended"
    world.check(eid, suspension_timer=False)
    assert signal(world, eid, a, "stop") == NO_MATCH
    assert signal(world, eid, a, "go ") == NO_MATCH
    assert signal(world, eid, a, "go") == MET
    world.check(eid)
    assert world.state(eid) == "waiting"


def test_correlation_and_external_match(world, suspended):
    eid, (a, b, c, *_) = suspended(
        lambda a, b, c, *_: all_of(spec(a, correlation_id="c\u00e9-1"), spec(b))
    )
    assert signal(world, eid, a, correlation_id="other") == NO_MATCH
    assert signal(world, eid, c) == BUFFERED
    assert signal(world, eid, a, "whatever", correlation_id="c\u00e9-1") == MORE
    assert signal(world, eid, b, "whatever") == MET


@pytest.mark.parametrize("depth", range(1, 6))
@pytest.mark.parametrize("kind", [all_of, any_of, lambda *m: count(len(m), *m)])
def test_nodes_of_any_depth_can_be_met(world, suspended, depth, kind):
    def nest(a, b, *_):
        inner = all_of(spec(a), spec(b))
        for _ in range(depth):
            inner = kind(inner)
        return inner

    eid, (a, b, *_) = suspended(nest)
    assert signal(world, eid, a) == MORE
    assert signal(world, eid, a) == AGAIN
    assert signal(world, eid, b) == MET
    assert world.state(eid) == "waiting"


def test_any_within_all_within_count(world, suspended):
    eid, (a, b, c, _, e) = suspended(
        lambda a, b, c, d, e: count(
            2, all_of(spec(a), any_of(spec(b), spec(c))), all_of(spec(d)), all_of(spec(e))
        )
    )
    assert signal(world, eid, b) == MORE
    # Another member of a node that has what it needs: it counts there, and nowhere else.
    assert signal(world, eid, c) == MORE
    assert signal(world, eid, c) == AGAIN
    assert signal(world, eid, e) == MORE
    assert signal(world, eid, e) == AGAIN
    assert signal(world, eid, a) == MET


def test_tokens_are_counted_per_node(world, suspended):
    eid, (a, b, *_) = suspended(
        lambda a, b, *_: all_of(
            count(2, spec(a), distinct=CountKind.DISTINCT_SIGNALS),
            count(2, spec(b), distinct=CountKind.DISTINCT_SIGNALS),
        )
    )
    assert [signal(world, eid, a) for _ in range(3)] == [MORE] * 3
    assert signal(world, eid, b) == MORE
    assert world.state(eid) == "suspended"
    assert signal(world, eid, b) == MET


def test_a_signal_that_two_nodes_wait_for_counts_in_both(world, suspended):
    eid, (a, b, *_) = suspended(
        lambda a, b, *_: all_of(all_of(spec(a), spec(b)), any_of(spec(a, "go")))
    )
    assert signal(world, eid, a) == MORE
    assert signal(world, eid, b) == MET


@pytest.mark.parametrize(
    "kind, effects",
    [
        # Signals: A from ann, A from ann, A from bob, B from bob, C from ann; 3 are needed.
        (CountKind.DISTINCT_MEMBERS, [MORE, AGAIN, AGAIN, MORE, MET]),
        (CountKind.DISTINCT_WAITPOINTS, [MORE, AGAIN, AGAIN, MORE, MET]),
        (CountKind.DISTINCT_SIGNALS, [MORE, MORE, MET]),
        (CountKind.DISTINCT_SOURCES, [MORE, AGAIN, MORE, AGAIN, AGAIN]),
    ],
)
def test_each_count_kind(world, suspended, kind, effects):
    eid, (a, b, c, *_) = suspended(
        lambda a, b, c, *_: count(3, spec(a), spec(b), spec(c), distinct=kind)
    )
    sent = [(a, "ann"), (a, "ann"), (a, "bob"), (b, "bob"), (c, "ann")]
    got = [
        signal(world, eid, point, source_type="user", source_identity=who)
        for point, who in sent[: len(effects)]
    ]
    assert got == effects


def test_sources_are_told_apart_exactly(world, suspended):
    eid, (a, *_) = suspended(lambda a, *_: count(3, spec(a), distinct=CountKind.DISTINCT_SOURCES))
    assert signal(world, eid, a, source_type="a b", source_identity="c") == MORE
    assert signal(world, eid, a, source_type="a", source_identity="b c") == MORE
    assert signal(world, eid, a, source_type="a", source_identity="b c") == AGAIN
    assert signal(world, eid, a, source_type="", source_identity="a b c") == MET


def test_two_leaves_of_one_waitpoint_count_once_as_a_waitpoint(world, suspended):
    eid, (a, b, *_) = suspended(lambda a, b, *_: count(2, spec(a, "x"), spec(a, "y"), spec(b, "x")))
    assert signal(world, eid, a, "x") == MORE
    assert signal(world, eid, a, "y") == AGAIN
    assert signal(world, eid, b, "x") == MET


def test_one_signal_to_two_waitpoints_counts_once_as_a_signal(world, suspended):
    eid, (a, b, *_) = suspended(
        lambda a, b, *_: all_of(
            count(2, spec(a), spec(b), distinct=CountKind.DISTINCT_WAITPOINTS),
            count(2, spec(a), spec(b), distinct=CountKind.DISTINCT_SIGNALS),
        )
    )
    same = keys.new_uuid()
    assert signal(world, eid, a, signal_id=same) == MORE
    assert signal(world, eid, b, signal_id=same) == MORE
    assert world.state(eid) == "suspended"
    assert signal(world, eid, b) == MET


def test_the_same_signal_id_for_another_execution_is_another_signal(world, suspended):
    """A defect of ours that this test found: signals were known by their id alone in a partition."""
    same = keys.new_uuid()
    first, (a, *_) = suspended(lambda a, *_: spec(a))
    assert signal(world, first, a, signal_id=same) == MET
    second = world.create(execution_id=beside(first), priority=9)
    world.raw.zrem(keys.eligible(keys.slot_tag_of(first), world.lane), first)
    handle = world.claim()
    assert handle.fields().execution_id == second
    b = world.backend.create_waitpoint(handle)
    world.backend.suspend(handle, spec(b))
    assert signal(world, second, b, signal_id=same) == MET


def test_a_condition_has_no_version_that_could_be_unknown(world):
    """Cannot exist: the condition goes to the server as flat nodes that are checked there, not as JSON with a version."""
    _, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    attempt = ops.Attempt.of(handle)
    op = ops.suspend_execution(
        attempt, keys.new_uuid(), any_of(spec(point)), 0, TimeoutBehavior.FAIL, "r"
    )
    good = list(op.argv)
    for at, bad in [(8, b"0"), (8, b"257"), (8, b"x"), (9, b"0"), (9, b"-2"), (10, b"0"), (10, b"1e3"), (12, b"9"), (14, b"x")]:  # fmt: skip
        argv = [*good[:at], bad, *good[at + 1 :]]
        with pytest.raises(errors.InvalidInput):
            world.call(op._replace(argv=tuple(argv)))
    with pytest.raises(errors.InvalidInput):
        world.call(op._replace(argv=tuple(good[:-1])))
    assert world.state(attempt.execution_id) == "active"
    world.call(op)
    assert world.state(attempt.execution_id) == "suspended"


@pytest.mark.parametrize("name", ["__operator_only__", "__timeout_only__", "leaf 0", "node 0"])
def test_no_name_of_a_signal_is_special(world, suspended, name):
    """Operator-only and timeout-only conditions, and with them the sentinel names, do not exist here."""
    eid, (a, b, *_) = suspended(lambda a, b, *_: all_of(spec(a, "go"), spec(b, name)))
    assert signal(world, eid, a, name) == NO_MATCH
    assert signal(world, eid, b, name) == MORE
    assert signal(world, eid, a) == MET


def test_all_waitpoints_close_whichever_brought_the_last_signal(world, suspended):
    eid, (a, b, c, *_) = suspended(lambda a, b, c, *_: any_of(spec(a), spec(b), spec(c)))
    assert signal(world, eid, c) == MET
    for point in (a, b, c):
        with pytest.raises(errors.WaitpointClosed):
            signal(world, eid, point)


def test_a_minimum_without_names_can_be_met(world, suspended):
    """The unnamed one of the simple conditions: two signals of any name."""
    eid, (a, *_) = suspended(lambda a, *_: count(2, spec(a), distinct=CountKind.DISTINCT_SIGNALS))
    assert [signal(world, eid, a) for _ in range(2)] == [MORE, MET]


def test_a_condition_of_256_waitpoints_costs_the_server_little(world):
    """A defect of ours: every leaf was compared with the token of every waitpoint, 65,536 digests in one call."""
    eid, handle = world.owned()
    points = [world.backend.create_waitpoint(handle) for _ in range(256)]
    world.raw.config_set("slowlog-log-slower-than", 0)
    try:
        world.raw.slowlog_reset()
        world.backend.suspend(handle, all_of(*map(spec, points)))
        spent = max(entry["duration"] for entry in world.raw.slowlog_get(16))
    finally:
        world.raw.config_set("slowlog-log-slower-than", 10_000)
    assert spent < 100_000
    for point in points[:-1]:
        assert signal(world, eid, point) == MORE
    assert signal(world, eid, points[-1]) == MET


# -- early signals -----------------------------------------------------------------------------------


def test_early_signals_count_at_suspend(world):
    eid, handle = world.owned()
    a, b = (world.backend.create_waitpoint(handle) for _ in range(2))
    assert signal(world, eid, a, payload=b"early") == BUFFERED
    outcome = world.backend.suspend(handle, all_of(spec(a), spec(b)))
    assert not outcome.already_satisfied
    assert outcome.handle.kind is HandleKind.SUSPENDED
    assert signal(world, eid, a) == AGAIN
    assert signal(world, eid, b, payload=b"late") == MET
    resumed = world.claim()
    assert [s.payload for s in world.backend.observe_signals(resumed)] == [b"early", b"late"]


@pytest.mark.parametrize("composite", [False, True])
def test_early_signals_satisfy_also_a_composite(world, composite):
    eid, handle = world.owned()
    a, b = (world.backend.create_waitpoint(handle) for _ in range(2))
    for point in (a, b):
        assert signal(world, eid, point) == BUFFERED
    condition = all_of(any_of(spec(a)), all_of(all_of(spec(b)))) if composite else spec(a)
    outcome = world.backend.suspend(handle, condition)
    assert outcome.already_satisfied
    assert outcome.handle is handle
    assert world.state(eid) == "active"
    world.check(eid)
    assert len(world.backend.observe_signals(handle)) == (2 if composite else 1)
    with pytest.raises(errors.WaitpointClosed):
        signal(world, eid, a)
    world.backend.renew(handle)
    world.backend.complete(handle)


def test_a_pending_waitpoint_outlives_the_suspension_before_its_own(world):
    """A defect of ours: a resumption closed every waitpoint of the execution, and lost its early signals."""
    eid, handle = world.owned()
    first, later = (world.backend.create_waitpoint(handle) for _ in range(2))
    assert signal(world, eid, later) == BUFFERED
    world.backend.suspend(handle, spec(first))
    assert signal(world, eid, first) == MET
    handle = world.claim()
    assert world.backend.suspend(handle, spec(later)).already_satisfied


def test_a_waitpoint_of_an_attempt_that_ended_is_closed(world):
    """A defect of ours: it went on buffering signals that nothing could ever use."""
    eid, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    world.fire(eid, "lease")
    with pytest.raises(errors.WaitpointClosed):
        signal(world, eid, point)
    successor = world.claim()
    with pytest.raises(errors.WaitpointClosed):
        world.backend.suspend(successor, spec(point))
    assert world.timers(eid).keys() == {"lease"}


# -- tokens ------------------------------------------------------------------------------------------


def test_a_token_of_a_closed_waitpoint_never_resumes_a_later_suspension(world, suspended):
    eid, (a, *_) = suspended(
        lambda a, *_: spec(a), timeout=60, on_timeout=TimeoutBehavior.AUTO_RESUME
    )
    world.fire(eid, "suspension")
    assert world.state(eid) == "waiting"
    handle = world.claim()
    with pytest.raises(errors.WaitpointClosed):
        world.backend.suspend(handle, spec(a))
    b = world.backend.create_waitpoint(handle)
    world.backend.suspend(handle, spec(b))
    with pytest.raises(errors.WaitpointClosed):
        signal(world, eid, a)
    with pytest.raises(errors.InvalidToken):
        signal(world, eid, b.replace(hmac_token=a.hmac_token))
    assert world.state(eid) == "suspended"
    assert signal(world, eid, b) == MET


def test_tokens_are_bound_to_execution_and_waitpoint(world, suspended):
    eid, (a, b, *_) = suspended(lambda a, b, *_: any_of(spec(a), spec(b)))
    world_eid, (c, *_) = suspended(lambda a, *_: spec(a))
    digest = a.hmac_token.reveal()
    wrong = [
        (eid, a.replace(hmac_token=b.hmac_token)),
        (eid, c),
        (world_eid, a),
        (eid, PendingWaitpoint(keys.new_uuid(), a.hmac_token)),
        (
            eid,
            a.replace(hmac_token=WaitpointHmac(digest[:-1] + ("0" if digest[-1] != "0" else "1"))),
        ),
        (eid, a.replace(hmac_token=WaitpointHmac("zz:" + digest.partition(":")[2]))),
    ]
    for target, point in wrong:
        with pytest.raises(errors.InvalidToken) as caught:
            signal(world, target, point)
        assert digest[-40:] not in f"{caught.value} {caught.value!r}"
    with pytest.raises(errors.ExecutionNotFound):
        signal(world, keys.new_execution_id(), a)
    assert world.state(eid) == world.state(world_eid) == "suspended"


def test_the_token_is_the_hmac_that_the_design_says(world):
    eid, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    tag = keys.slot_tag_of(eid)
    ring = world.raw.hgetall(keys.waitpoint_secrets(tag))
    kid, _, digest = point.hmac_token.reveal().partition(":")
    created = world.waitpoint(eid, point)["created_at"]
    message = "".join(f"{len(part)}:{part}" for part in (eid, point.waitpoint_id, created))
    secret = bytes.fromhex(ring[f"secret:{kid}".encode()].decode())
    assert digest == hmac.new(secret, message.encode(), hashlib.sha1).hexdigest()
    assert world.backend.create_waitpoint(handle, waitpoint_id=point.waitpoint_id) == point


def test_a_waitpoint_id_of_another_attempt_is_a_conflict(world):
    eid, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    world.fire(eid, "lease")
    again = world.claim()
    with pytest.raises(errors.WaitpointConflict):
        world.backend.create_waitpoint(again, waitpoint_id=point.waitpoint_id)


def test_the_same_waitpoint_id_of_another_execution_is_another_waitpoint(world):
    first, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    second = world.create(execution_id=beside(first))
    other = world.claim()
    twin = world.backend.create_waitpoint(other, waitpoint_id=point.waitpoint_id)
    with pytest.raises(errors.InvalidToken):
        signal(world, second, point)
    world.backend.suspend(other, spec(twin))
    assert signal(world, first, point) == BUFFERED
    assert world.state(second) == "suspended"
    assert signal(world, second, twin) == MET


def test_a_worker_without_its_lease_gets_no_waitpoint(world):
    """The unnamed one of create_pending_waitpoint: a zombie on a lapsed lease, marked or not."""
    eid, handle = world.owned()
    world.due(eid, "lease")
    with pytest.raises(errors.LeaseExpired):
        world.backend.create_waitpoint(handle)
    world.round()
    world.claim()
    with pytest.raises(errors.StaleOwner):
        world.backend.create_waitpoint(handle)


@pytest.fixture
def ring(world):
    """One partition whose keys a test rotates: ``ring(kid, secret, grace_ms)``."""
    eid, handle = world.owned()
    partition = keys.partition_index(eid)
    slot_tag = keys.slot_tag(partition)
    # Executions that earlier tests left suspended in the partition would keep its secrets.
    world.raw.delete(keys.waitpoint_secrets(slot_tag), f"ff:part:{slot_tag}:waitpoints")

    def rotate(kid, secret, grace_ms=60_000):
        op = ops.rotate_waitpoint_secret(partition, kid, secret.hex(), grace_ms)
        return world.call(op)

    yield eid, handle, rotate
    world.raw.delete(keys.waitpoint_secrets(slot_tag))


@pytest.mark.parametrize("kid", ["", "k.1", "k:1", "k 1", "é", "k" * 65])
def test_the_server_refuses_a_kid_that_is_no_opaque_id(world, ring, kid):
    _, handle, rotate = ring
    with pytest.raises(errors.InvalidInput):
        rotate(kid, b"s" * 32)
    op = ops.create_waitpoint(ops.Attempt.of(handle), keys.new_uuid(), 1_000, kid, "5e" * 32)
    with pytest.raises(errors.InvalidInput):
        world.call(op)


def test_a_key_that_came_back_keeps_its_tokens(world, ring):
    eid, handle, rotate = ring
    secrets = {name: os.urandom(32) for name in "ABC"}
    points = []
    before = ""
    for kid in "ABA":
        assert rotate(kid, secrets[kid]) == before
        before = kid
        points.append(world.backend.create_waitpoint(handle))
        assert points[-1].hmac_token.kid == kid
    # The end that A was given before it came back lies in the past by now.
    tag = keys.slot_tag_of(eid)
    assert world.raw.hget(keys.waitpoint_secrets(tag), "expires_at:A") is None
    rotate("C", secrets["C"])
    for point in points:
        assert signal(world, eid, point) == BUFFERED


def test_a_key_is_valid_until_its_grace_is_over(world, ring):
    eid, handle, rotate = ring
    rotate("A", os.urandom(32))
    point = world.backend.create_waitpoint(handle)
    rotate("B", b"b" * 32)
    rotate("B", b"b" * 32)
    assert signal(world, eid, point) == BUFFERED
    key = keys.waitpoint_secrets(keys.slot_tag_of(eid))
    world.raw.hset(key, "expires_at:A", 1)
    with pytest.raises(errors.InvalidToken):
        signal(world, eid, point)
    rotate("C", b"c" * 32)
    assert world.raw.hget(key, "secret:A") is None
    # The waitpoint itself is still good under the token of today.
    fresh = world.backend.create_waitpoint(handle, waitpoint_id=point.waitpoint_id)
    assert fresh.hmac_token.kid == "C"
    assert world.backend.suspend(handle, spec(fresh)).already_satisfied


def test_a_kid_with_another_secret_is_a_conflict(world, ring):
    _, _, rotate = ring
    rotate("A", b"a" * 32)
    rotate("B", b"b" * 32)
    for kid in "AB":
        with pytest.raises(errors.RotationConflict):
            rotate(kid, b"x" * 32)


def test_the_secret_of_every_partition_rotates(world):
    eid, handle = world.owned()
    old = world.backend.create_waitpoint(handle)
    kid = f"kid-{keys.new_uuid()[:8]}"
    for _ in range(2):
        world.backend.rotate_waitpoint_secret(kid, b"s" * 32)
    new = world.backend.create_waitpoint(handle)
    assert new.hmac_token.kid == kid
    for point in (old, new):
        assert signal(world, eid, point) == BUFFERED


# -- the end of secrets ------------------------------------------------------------------------------

DAY_MS = 86_400_000


def ring_left(world, eid):
    return world.raw.pttl(keys.waitpoint_secrets(keys.slot_tag_of(eid)))


def test_secrets_end_a_day_after_the_last_waitpoint_was_open(world, ring):
    eid, handle, _ = ring
    point = world.backend.create_waitpoint(handle, expires=60)
    assert 0 < ring_left(world, eid) <= DAY_MS
    late = world.backend.create_waitpoint(handle, expires=3 * 86_400)
    assert 2 * DAY_MS < ring_left(world, eid) <= 3 * DAY_MS
    # An earlier end of another one takes nothing from it.
    world.backend.create_waitpoint(handle, expires=60)
    assert 2 * DAY_MS < ring_left(world, eid) <= 3 * DAY_MS
    world.backend.suspend(handle, spec(late))
    # Nobody knows how long a suspension lasts.
    assert ring_left(world, eid) == -1
    assert signal(world, eid, late) == MET
    assert 2 * DAY_MS < ring_left(world, eid) <= 3 * DAY_MS
    with pytest.raises(errors.WaitpointClosed):
        signal(world, eid, late)
    assert signal(world, eid, point) == BUFFERED


@pytest.mark.parametrize("how", ["resumed", "cancelled", "timed out", "continued"])
def test_secrets_stay_while_any_execution_is_suspended(world, ring, how):
    eid, handle, rotate = ring
    other = world.create(execution_id=beside(eid))
    world.backend.suspend(handle, spec(world.backend.create_waitpoint(handle)), timeout=60,
        on_timeout=TimeoutBehavior.AUTO_RESUME if how == "continued" else TimeoutBehavior.FAIL)  # fmt: skip
    second = world.claim()
    point = world.backend.create_waitpoint(second)
    world.backend.suspend(second, spec(point))
    rotate("fresh", os.urandom(32))
    if how == "cancelled":
        world.backend.cancel(eid)
    elif how != "resumed":
        world.fire(eid, "suspension")
    assert ring_left(world, eid) == -1
    assert signal(world, other, point) == MET
    if how == "resumed":
        assert ring_left(world, eid) == -1
        world.backend.cancel(eid)
    assert DAY_MS / 2 < ring_left(world, eid) <= DAY_MS


def test_a_rotation_keeps_the_old_secret_for_its_grace(world, ring):
    eid, handle, rotate = ring
    rotate("A", os.urandom(32))
    point = world.backend.create_waitpoint(handle)
    rotate("B", os.urandom(32), 5 * DAY_MS)
    assert 4 * DAY_MS < ring_left(world, eid) <= 5 * DAY_MS
    assert signal(world, eid, point) == BUFFERED


def test_a_partition_whose_secrets_have_ended_makes_new_ones(world, ring):
    eid, handle, _ = ring
    old = world.backend.create_waitpoint(handle)
    world.raw.delete(keys.waitpoint_secrets(keys.slot_tag_of(eid)))
    new = world.backend.create_waitpoint(handle)
    with pytest.raises(errors.InvalidToken):
        signal(world, eid, old)
    assert signal(world, eid, new) == BUFFERED


def test_a_ring_holds_so_many_secrets_and_no_more(world, ring):
    _, _, rotate = ring
    for number in range(65):
        rotate(f"k{number}", os.urandom(32))
    with pytest.raises(errors.RotationConflict):
        rotate("more", os.urandom(32))


# -- idempotency -------------------------------------------------------------------------------------


def test_the_signal_that_resumed_is_answered_again(world, suspended):
    eid, (a, *_) = suspended(lambda a, *_: spec(a))
    first = world.backend.deliver_signal(eid, a, "go", idempotency_key="k 1")
    assert first.effect == MET
    for _ in range(2):
        again = world.backend.deliver_signal(eid, a, "go", idempotency_key="k 1")
        assert (again.signal_id, again.effect, again.duplicate) == (first.signal_id, MET, True)
        by_id = world.backend.deliver_signal(eid, a, "go", signal_id=first.signal_id)
        assert by_id == again
    with pytest.raises(errors.WaitpointClosed):
        world.backend.deliver_signal(eid, a, "go", idempotency_key="k 2")
    world.backend.complete(world.claim())
    assert world.backend.deliver_signal(eid, a, "go", idempotency_key="k 1").duplicate


def test_idempotency_keys_are_of_one_waitpoint(world, suspended):
    eid, (a, b, *_) = suspended(lambda a, b, *_: all_of(spec(a), spec(b)))
    assert signal(world, eid, a, idempotency_key="k") == MORE
    assert signal(world, eid, b, idempotency_key="k") == MET


def test_an_early_signal_is_buffered_once(world):
    eid, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    for _ in range(2):
        assert signal(world, eid, point, idempotency_key="k") == BUFFERED
    condition = count(2, spec(point), distinct=CountKind.DISTINCT_SIGNALS)
    assert not world.backend.suspend(handle, condition).already_satisfied


def test_the_limit_of_signals_is_of_one_waitpoint(world, suspended):
    eid, (a, b, *_) = suspended(lambda a, b, *_: all_of(spec(a, "x"), spec(b)))
    world.waitpoint(eid, a, signal_count=9_999)
    assert signal(world, eid, a) == NO_MATCH
    with pytest.raises(errors.SignalLimitExceeded):
        signal(world, eid, a)
    assert signal(world, eid, b) == MORE


@pytest.mark.parametrize("text", ["\u00e9" * 128, "a b", "'; DEL", "%s"])
def test_the_identity_of_a_source_is_kept(world, suspended, text):
    eid, (a, *_) = suspended(lambda a, *_: spec(a))
    assert signal(world, eid, a, source_identity=text, source_type="t") == MET
    (seen,) = world.backend.observe_signals(world.claim())
    assert (seen.source_identity, seen.source_type) == (text, "t")


def test_a_resumption_has_no_delay_that_could_be_lost(world, suspended):
    """A resumption goes to ``waiting`` at once; a delayed resumption does not exist."""
    eid, (a, *_) = suspended(lambda a, *_: spec(a))
    assert signal(world, eid, a) == MET
    world.check(eid)
    assert world.claim() is not None


def test_suspending_again_after_a_lost_reply_answers_as_the_first_time(world):
    eid, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    first = world.backend.suspend(handle, spec(point))
    assert world.backend.suspend(handle, spec(point)) == first
    assert signal(world, eid, point) == MET
    assert world.backend.suspend(handle, spec(point)) == first
    resumed = world.claim()
    assert world.backend.suspend(handle, spec(point)) == first
    world.backend.renew(resumed)
    with pytest.raises(errors.StaleOwner):
        world.backend.complete(handle)


def test_suspending_again_after_a_lost_reply_when_it_was_satisfied(world):
    """A defect of ours: the repeat found its waitpoints closed."""
    eid, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    signal(world, eid, point)
    op = ops.suspend_execution(
        ops.Attempt.of(handle), keys.new_uuid(), any_of(spec(point)), 0, TimeoutBehavior.FAIL, "r"
    )
    assert world.call(op) == world.call(op)
    assert world.state(eid) == "active"
    assert len(world.backend.observe_signals(handle)) == 1


# -- the resumed attempt --------------------------------------------------------------------------------


def test_a_resumed_claim_continues_attempt_stream_estimator_and_summary(world):
    eid, handle = world.owned(attempt_timeout=60)
    backend = world.backend
    with backend.open_writer(handle, mode=StreamMode.durable_summary()) as writer:
        for i in range(3):
            writer.write(b'{"n":%d}' % i)
            writer.write(b"x", mode=StreamMode.best_effort_live(60_000))
        writer.flush()
    meta = world.raw.hgetall(keys.meta(eid, 0))
    last_id = head_of(world.raw, keys.head(eid, 0)).last_id
    point = backend.create_waitpoint(handle)
    world.check(eid, attempt_timer=True)
    backend.suspend(handle, spec(point))
    world.check(eid, attempt_timer=False)
    with pytest.raises(errors.ExecutionSuspended):
        backend.open_writer(handle)
    assert signal(world, eid, point) == MET
    resumed = world.claim()
    old, new = handle.fields(), resumed.fields()
    assert resumed.kind is HandleKind.RESUMED
    assert (new.attempt_index, new.attempt_id) == (0, old.attempt_id)
    assert new.lease_epoch == old.lease_epoch + 1
    # The limit of the attempt stood still, and goes on.
    world.check(eid, attempt_timer=True)
    assert world.timers(eid)["attempt"] - world.now() <= 60_000
    again = world.raw.hgetall(keys.meta(eid, 0))
    assert last_id.endswith(b"-6")
    assert head_of(world.raw, keys.head(eid, 0)).last_id == last_id
    assert again[b"created_at"] == meta[b"created_at"]
    assert again.get(b"estimator") == meta.get(b"estimator")
    with backend.open_writer(resumed, mode=StreamMode.durable_summary()) as writer:
        assert writer.write(b'{"m":1}') == 7
    document = backend.read_summary(eid)
    assert (document.document_json, document.version) == (b'{"n":2,"m":1}', 4)
    assert [f.sequence for f in backend.read_stream(eid)] == [1, 2, 3, 4, 5, 6, 7]
    with pytest.raises(errors.StaleOwner):
        backend.append_frame(handle, Frame(b"late", FrameKind.EVENT))
    backend.complete(resumed)
    world.check(eid)


def test_observed_signals_are_those_that_resumed_and_for_the_owner_alone(world, suspended):
    eid, (a, b, c, *_) = suspended(lambda a, b, c, *_: all_of(spec(a, "x"), spec(b)))
    assert signal(world, eid, a, "y") == NO_MATCH
    assert signal(world, eid, c) == BUFFERED
    wanted = []
    for point in (a, b):
        wanted.append(world.backend.deliver_signal(eid, point, "x").signal_id)
        if point is a:
            assert signal(world, eid, a, "x") == AGAIN
    handle = world.claim()
    assert [seen.signal_id for seen in world.backend.observe_signals(handle)] == wanted
    guessed = Handle.encode(
        execution_id=eid, attempt_index=0, attempt_id=keys.new_uuid(), lease_id=keys.new_uuid(),
        lease_epoch=2, lease_ttl_ms=1000, lane_id=world.lane, worker_instance_id="w-1",
    )  # fmt: skip
    with pytest.raises(errors.StaleOwner):
        world.backend.observe_signals(guessed)


def test_the_fields_of_a_signal_arrive_as_they_were_sent(world, suspended):
    eid, (a, b, *_) = suspended(lambda a, b, *_: all_of(spec(a, "x"), spec(b)))
    fields = {
        "correlation_id": "c", "source_type": "user", "source_identity": "ann",
    }  # fmt: skip
    world.backend.deliver_signal(eid, a, "x", payload=b"\x00\xff", category="k", **fields)
    signal(world, eid, a, "x")
    signal(world, eid, b, "z")
    first, second = world.backend.observe_signals(world.claim())
    assert (first.signal_name, first.signal_category, first.payload) == ("x", "k", b"\x00\xff")
    assert {name: getattr(first, name) for name in fields} == fields
    assert (second.signal_name, second.payload) == ("z", None)
    assert 0 < first.accepted_at <= second.accepted_at <= world.now()


# -- timeouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "behavior, state, reason",
    [
        (TimeoutBehavior.FAIL, "failed", "suspension_timeout"),
        (TimeoutBehavior.CANCEL, "cancelled", "suspension_timeout"),
        (TimeoutBehavior.EXPIRE, "expired", "suspension_timeout"),
        (TimeoutBehavior.AUTO_RESUME, "waiting", None),
        (TimeoutBehavior.ESCALATE, "suspended", None),
    ],
)
def test_each_timeout_behavior(world, suspended, behavior, state, reason):
    eid, (a, *_) = suspended(lambda a, *_: spec(a), timeout=60, on_timeout=behavior)
    world.check(eid, suspension_timer=True)
    world.round()
    assert world.state(eid) == "suspended"
    assert world.fire(eid, "suspension") == 1
    assert world.state(eid) == state
    world.check(eid, suspension_timer=False)
    assert world.backend.describe_stream(eid, 0).closed_reason == reason
    if behavior is TimeoutBehavior.ESCALATE:
        assert int(world.core(eid)["escalated_at"]) > 0
        assert signal(world, eid, a) == MET
    else:
        with pytest.raises(errors.WaitpointClosed):
            signal(world, eid, a)
    if behavior is TimeoutBehavior.AUTO_RESUME:
        assert world.backend.observe_signals(world.claim()) == ()


def test_a_timeout_that_comes_too_late_does_nothing(world, suspended):
    eid, (a, *_) = suspended(lambda a, *_: spec(a), timeout=60)
    signal(world, eid, a)
    member = f"suspension:{eid}"
    world.raw.zadd(keys.timers(keys.slot_tag_of(eid)), {member: 1})
    world.round()
    assert world.state(eid) == "waiting"
    world.check(eid)


def test_a_pending_waitpoint_expires_and_one_that_a_suspension_waits_for_does_not(world):
    eid, handle = world.owned()
    a, b = (world.backend.create_waitpoint(handle, expires=60) for _ in range(2))
    world.backend.suspend(handle, spec(a))
    for point in (a, b):
        world.waitpoint(eid, point, expires_at=1)
    assert world.timers(eid) == {}
    with pytest.raises(errors.WaitpointClosed):
        signal(world, eid, b)
    assert signal(world, eid, a) == MET


def test_a_waitpoint_has_expired_by_the_servers_clock_without_a_supervisor(world):
    eid, handle = world.owned()
    point = world.backend.create_waitpoint(handle)
    world.waitpoint(eid, point, expires_at=1)
    with pytest.raises(errors.WaitpointClosed):
        signal(world, eid, point)
    with pytest.raises(errors.WaitpointClosed):
        world.backend.suspend(handle, spec(point))
    world.backend.complete(handle)


@pytest.mark.parametrize("how", ["complete", "fail", "cancel", "deadline"])
def test_the_keys_of_waitpoints_and_signals_end_with_the_execution(world, how):
    eid, handle = world.owned(deadline=60)
    points = [world.backend.create_waitpoint(handle) for _ in range(3)]
    signal(world, eid, points[1], payload=b"p", idempotency_key="k")
    world.backend.suspend(handle, spec(points[0]))
    signal(world, eid, points[0], payload=b"q", idempotency_key="k")
    handle = world.claim()
    if how == "complete":
        world.backend.complete(handle)
    elif how == "fail":
        world.backend.fail(handle, "no")
    elif how == "cancel":
        world.backend.cancel(handle)
    else:
        world.fire(eid, "deadline")
    world.check(eid)
    kinds = {key.split(b":")[1] for key in world.keys_of(eid)}
    assert {b"exec", b"stream", b"attempt"} == kinds
    with pytest.raises(errors.WaitpointClosed):
        signal(world, eid, points[2])


def test_many_suspensions_of_one_attempt(world):
    eid, handle = world.owned()
    old = []
    for i in itertools.count():
        point = world.backend.create_waitpoint(handle)
        world.backend.suspend(handle, spec(point))
        for closed in old:
            with pytest.raises(errors.WaitpointClosed):
                signal(world, eid, closed)
        assert signal(world, eid, point) == MET
        old.append(point)
        handle = world.backend.claim(lane=world.lane, **WORKER)
        assert handle.fields().attempt_index == 0
        if i == 10:
            break
    world.backend.complete(handle)
    world.check(eid)
