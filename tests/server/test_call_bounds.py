"""What one call costs the server does not grow with the data of its users: the commands inside it are counted."""

import re

import pytest

import ff_fast
from ff_fast import (
    CancelFlowPolicy,
    CountKind,
    ResumeCondition,
    TimeoutBehavior,
    UsageDimensions,
    WaitpointKind,
    WaitpointSpec,
    _library,
    errors,
    keys,
)
from ff_fast._core import ops

from . import streams as streams_module
from .executions import World
from .streams import live, log

# A command inside a function takes 0.3 to 2 us, so a call of this many stays below 2 ms.
MOST_COMMANDS = 1_000


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


def many(raw, calls):
    """Send calls in pipelines; return their answers."""
    answers = []
    for first in range(0, len(calls), 500):
        some = calls[first : first + 500]
        with raw.pipeline(transaction=False) as pipeline:
            for op in some:
                pipeline.fcall(op.function, len(op.keys), *op.keys, *op.argv)
            answers += map(ops.Op.answer, some, pipeline.execute())
    return answers


def inside(raw, work):
    """The number of commands inside each call that *work* makes, and its result."""
    with raw.monitor() as monitor:
        result = work()
        raw.echo("the work is done")
        counts = []
        while "the work is done" not in (each := monitor.next_command())["command"]:
            if each["client_type"] == "lua":
                counts[-1] += 1
            elif each["command"].upper().startswith("FCALL"):
                counts.append(0)
    return counts, result


def waitpoints(world, handle, count):
    attempt = ops.Attempt.of(handle)
    return many(
        world.raw,
        [
            ops.create_waitpoint(attempt, keys.new_uuid(), 600_000, "auto", "5e" * 32)
            for _ in range(count)
        ],
    )


def signals(world, eid, points, name="go", **options):
    return many(
        world.raw,
        [
            ops.deliver_signal(
                eid, point, signal_id=keys.new_uuid(), signal_name=name, category="",
                source_type="", source_identity=options.get("source", ""), correlation_id="",
                idempotency_key="", payload=options.get("payload", b"p"),
            )
            for point in points
        ],
    )  # fmt: skip


def spec(point, name=None):
    kind = WaitpointKind.EXTERNAL if name is None else WaitpointKind.SIGNAL_NAME
    return WaitpointSpec(kind, (name or "").encode(), point.hmac_token)


def count_signals(needed, *specs, distinct=CountKind.DISTINCT_SIGNALS):
    return ResumeCondition.count(needed, *specs, distinct=distinct)


@pytest.mark.parametrize("needed, satisfied", [(1_400, True), (1_401, False)])
@pytest.mark.standalone("one server watches its commands")
def test_early_signals_are_applied_a_bounded_number_in_a_call(world, needed, satisfied):
    eid, handle = world.owned()
    points = waitpoints(world, handle, 14)
    signals(world, eid, points * 100, payload=b"x" * 1000)
    condition = count_signals(needed, *map(spec, points))
    counts, outcome = inside(world.raw, lambda: world.backend.suspend(handle, condition))
    assert outcome.already_satisfied is satisfied
    assert max(counts) < MOST_COMMANDS
    if satisfied:
        counts, seen = inside(world.raw, lambda: world.backend.observe_signals(handle))
        assert len({each.signal_id for each in seen}) == len(seen) == 1_400
        assert len(counts) > 1
        assert max(counts) < 300
    else:
        assert world.state(eid) == "suspended"
        assert [each.effect for each, _ in signals(world, eid, points[:1])] == [
            "resume_condition_satisfied"
        ]
        assert len(world.backend.observe_signals(world.claim())) == 1_401


@pytest.mark.standalone("one server watches its commands")
def test_early_signals_that_nothing_waits_for_are_not_looked_at(world):
    counts = []
    for number in (3, 600):
        eid, handle = world.owned()
        wanted, other = waitpoints(world, handle, 2)
        signals(world, eid, [wanted] + [other] * number)
        condition = count_signals(2, spec(wanted))
        made, _ = inside(
            world.raw, lambda handle=handle, on=condition: world.backend.suspend(handle, on)
        )
        counts += made
    assert counts[0] == counts[1] < 100


@pytest.mark.standalone("one server watches its commands")
def test_a_condition_with_a_leaf_for_each_of_many_signals_is_bounded(world):
    """Each leaf takes the first signal that it matches, and no signal meets the leaves of another name."""
    eid, handle = world.owned()
    (point,) = waitpoints(world, handle, 1)
    for name in ("a", "b", "c"):
        signals(world, eid, [point] * 400, name)
    leaves = [spec(point, name) for name in ("a", "b", "c", "missing") for _ in range(50)]
    condition = ResumeCondition.all(*leaves)
    counts, outcome = inside(world.raw, lambda: world.backend.suspend(handle, condition))
    assert not outcome.already_satisfied
    assert max(counts) < MOST_COMMANDS
    assert [each.effect for each, _ in signals(world, eid, [point], "missing")] == [
        "resume_condition_satisfied"
    ]


@pytest.mark.standalone("one server watches its commands")
def test_many_nodes_that_each_count_every_signal_are_bounded(world):
    eid, handle = world.owned()
    (point,) = waitpoints(world, handle, 1)
    signals(world, eid, [point] * 30)
    nodes = [count_signals(30, spec(point)) for _ in range(100)]
    condition = ResumeCondition.all(*nodes)
    counts, outcome = inside(world.raw, lambda: world.backend.suspend(handle, condition))
    assert outcome.already_satisfied
    assert len(counts) > 3
    assert max(counts) < MOST_COMMANDS


def test_a_suspension_that_was_given_up_half_way_loses_no_signal(world):
    eid, handle = world.owned()
    (point,) = waitpoints(world, handle, 1)
    signals(world, eid, [point] * 1_200)
    attempt = ops.Attempt.of(handle)
    condition = count_signals(1_201, spec(point))
    op = ops.suspend_execution(attempt, keys.new_uuid(), condition, 0, TimeoutBehavior.FAIL, "r")
    assert world.call(op)[0] is None
    assert world.state(eid) == "active"
    # It arrives between two calls, and is not forgotten.
    assert signals(world, eid, [point])[0][0].effect == "buffered_for_pending_waitpoint"
    assert world.backend.suspend(handle, condition).already_satisfied


@pytest.mark.parametrize("how", ["complete", "fail", "cancel", "lapse"])
@pytest.mark.standalone("one server watches its commands")
def test_an_end_costs_the_same_with_any_number_of_waitpoints_and_signals(world, how):
    ends = {
        "complete": lambda eid, handle: world.backend.complete(handle),
        "fail": lambda eid, handle: world.backend.fail(handle, "no", ff_fast.FailureClass.PERMANENT),
        "cancel": lambda eid, handle: world.backend.cancel(eid),
        "lapse": lambda eid, handle: world.fire(eid, "lease"),
    }  # fmt: skip
    counts = []
    for number in (3, 600):
        eid, handle = world.owned()
        points = waitpoints(world, handle, number)
        signals(world, eid, points)
        if how == "lapse":
            world.due(eid, "lease")
        made, _ = inside(world.raw, lambda eid=eid, handle=handle: ends[how](eid, handle))
        counts.append(max(made))
        if how != "lapse":
            world.check(eid)
        else:
            world.backend.cancel(eid)
        with pytest.raises(errors.WaitpointClosed):
            world.backend.deliver_signal(eid, points[0], "late")
    assert counts[0] == counts[1] < 100


@pytest.mark.parametrize("policy", [CancelFlowPolicy.CANCEL_ALL, CancelFlowPolicy.CANCEL_PENDING])
@pytest.mark.standalone("one server watches its commands")
def test_cancelling_a_flow_looks_at_each_member_once(world, policy):
    costs = []
    for number in (40, 400):
        flow = world.create_flow()
        eid = world.create(flow_id=flow)
        running = world.claim()
        members = [world.create(flow_id=flow) for _ in range(3)]
        core = world.raw.dump(keys.core(members[0]))
        tag = keys.slot_tag_of(eid)
        more = [f"{tag}:{keys.new_uuid()}" for _ in range(number)]
        with world.raw.pipeline(transaction=False) as pipeline:
            for each in more:
                pipeline.restore(keys.core(each), 0, core)
                if policy is CancelFlowPolicy.CANCEL_PENDING:
                    pipeline.hset(
                        keys.core(each), mapping={"state": "active", "current_attempt_index": 0}
                    )
                pipeline.zadd(keys.flow_open(tag, flow), {each: 0})
            pipeline.execute()
        counts, _ = inside(world.raw, lambda flow=flow: world.backend.cancel_flow(flow, policy))
        assert max(counts) < MOST_COMMANDS
        left = number + 1 if policy is CancelFlowPolicy.CANCEL_PENDING else 0
        assert len(world.backend.describe_flow(flow).open_members) == left
        costs.append(sum(counts) / (number + 4))
        if policy is CancelFlowPolicy.CANCEL_PENDING:
            world.backend.complete(running)
        for each in more:
            world.raw.delete(keys.core(each))
    assert costs[1] < 1.5 * costs[0]


def test_the_numbers_of_tags_and_dimensions_have_a_limit(world):
    eid, handle = world.owned(tags={f"a.t{n}": "v" for n in range(250)})
    assert world.backend.set_tags(eid, {f"a.t{n}": "w" for n in range(240, 256)}) == 256
    with pytest.raises(errors.InvalidInput):
        world.backend.set_tags(eid, {"a.more": "v"})
    with pytest.raises(errors.InvalidInput):
        world.create(tags={f"a.t{n}": "v" for n in range(257)})
    assert len(world.backend.get_tags(eid)) == 256
    for first in range(0, 256, 32):
        usage = UsageDimensions(custom={f"d{n}": 1 for n in range(first, first + 32)})
        world.backend.report_usage(handle, usage)
    with pytest.raises(errors.InvalidInput):
        world.backend.report_usage(handle, UsageDimensions(custom={"more": 1}))
    world.backend.report_usage(handle, UsageDimensions(custom={"d1": 1}))
    assert len(world.backend.describe(eid).usage) == 256


@pytest.mark.parametrize(
    "part, commands",
    [
        # The head, an entry, the new place in the head, and what is published.
        (lambda stream: stream.part(log(b"x"), push=b" body"), 4),
        (lambda stream: stream.part(live(*[b"x"] * 64), names="head live", push=b" body"), 4),
        (lambda stream: stream.part(log(b"x"), names="head log"), 3),
        (lambda stream: stream.push_part(b"f1-1 body"), 2),
    ],
    ids=["a frame", "a run", "nothing published", "nothing stored"],
)
@pytest.mark.standalone("one server watches its commands")
def test_each_part_of_a_shared_append_costs_the_same(world, part, commands):
    made = []
    for number in (1, 2, 32):
        streams = opened_streams(world, number)
        parts = [part(stream) for stream in streams]
        counts, (answers, now) = inside(
            world.raw, lambda parts=parts: streams_module.appended(world.raw, *parts)
        )
        for stream, answer in zip(streams, answers, strict=True):
            assert not isinstance(stream.told(answer, now), errors.FFError)
        made += counts
    # And the time, once.
    assert made == [1 + commands, 1 + 2 * commands, 1 + 32 * commands]


@pytest.mark.standalone("one server watches its commands")
def test_the_largest_shared_append_is_bounded(world):
    """It has 128 parts and 1,024 entries, at 1.6 ms; each refused part reads two hashes."""
    streams = opened_streams(world, 32)
    frames = [b"x"] * 8
    parts = [
        stream.part(log(*frames), first=1 + 8 * turn, names="head log", push=b" body")
        for turn in range(4)
        for stream in streams
    ]
    counts, (answers, _) = inside(world.raw, lambda: streams_module.appended(world.raw, *parts))
    assert [answer.partition(b" ")[0].partition(b"-")[2] for answer in answers] == [
        b"%d" % (8 + 8 * turn) for turn in range(4) for _ in streams
    ]
    assert counts == [1 + 128 * 3 + 1024]
    refused = [stream.part(log(b"x"), writer=b"another") for stream in streams * 4]
    counts, (answers, _) = inside(world.raw, lambda: streams_module.appended(world.raw, *refused))
    assert all(answer[:2] == [0, b"writer_superseded"] for answer in answers)
    assert counts[0] < MOST_COMMANDS


def opened_streams(world, number):
    made = [streams_module.Stream(world.raw, world.backend, world.lane) for _ in range(number)]
    for stream in made:
        stream.open()
    return made


UNBOUNDED = (
    r"'(SMEMBERS|HKEYS|HVALS|KEYS|SORT|LRANGE'[^)]*-1|ZRANGE'[^)]*-1|XRANGE'[^)]*'\+'\)|HGETALL)"
)


def test_no_function_reads_a_key_whole_that_a_user_can_fill():
    """HGETALL is left for hashes whose number of fields has a limit."""
    found = {
        (_library.line_of(number).partition(":")[0], line.strip())
        for number, line in enumerate(_library.source().splitlines(), start=1)
        if re.search(UNBOUNDED, line) and not line.strip().startswith("--")
    }
    assert {line for _, line in found} <= {
        "local flat = redis.call('HGETALL', key)",  # ff.hash: a core, a ring of secrets
        "local core = call('HGETALL', core_key)",
        "core, call('HGETALL', tags_key), call('HGETALL', usage_key),",
        "local meta = call('HGETALL', ff.meta_beside(head_key))",
        "return ff.ok(redis.call('HGETALL', tags_key))",
        "return ff.ok(redis.call('HGETALL', summary_key))",
    }
