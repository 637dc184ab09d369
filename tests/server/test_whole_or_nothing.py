"""Every function that writes, once with each of its keys damaged: a call has its whole effect, or none.

The keys of a call are those that the server sees it use, so a key that a function begins to use is tried without being
named here. A key is damaged by another type in its place; a stream also by somebody else's entry with a high id; a hash
also by text in the place of a number.
"""

import contextlib
import re

import pytest

import ff_fast
from ff_fast import (
    CancelFlowPolicy,
    CapabilitySet,
    CountKind,
    FailureClass,
    FailureReason,
    ResumeCondition,
    RetryBackoff,
    RetryPolicy,
    ScannerFilter,
    TimeoutBehavior,
    UsageDimensions,
    WaitpointKind,
    WaitpointSpec,
    _library,
    keys,
)
from ff_fast._core import ops
from ff_fast.embedded import EmbeddedServer

from ..conftest import connect_raw, second_engine
from ..heads import set_head
from . import streams
from .executions import beside

LANE = "lane"
RETRY = RetryPolicy(max_retries=1, backoff=RetryBackoff.EXPONENTIAL, delay=5, jitter_percent=0)
WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}
MAX_ID = "18446744073709551615-18446744073709551615"
HIGH_ID = "9999999999999-7"


class Scene:
    """A partition with a flow, a parent that waits for its child, the child that is active, and one that waits."""

    def __init__(self, backend, raw, url):
        self.backend, self.raw, self.url = backend, raw, url
        self.flow = backend.create_flow()
        self.budget = "budget"
        backend.create_budget(self.budget, hard={"calls": 100}, soft={"calls": 50})
        self.parent = self.create(flow_id=self.flow)
        parent = self.claim()
        self.tag = keys.slot_tag_of(self.parent)
        self.child = self.create(
            flow_id=self.flow, parent_id=self.parent, budgets=[self.budget], deadline=600
        )
        self.handle = self.claim()
        backend.wait_children(parent)
        self.attempt = ops.Attempt.of(self.handle)
        self.call(ops.open_writer(self.attempt, ops.writer_id(self.attempt)))
        self.writer = ops.writer_id(self.attempt)
        self.call(ops.open_writer(self.attempt, self.writer))
        self.call(
            self.append(
                streams.log(b"log"), streams.live(b"live"), streams.patches(b'{"a":1}', base=0),
                [b"P", b"600000"], [b"E", b"2.5"], [b"H", b"3"], first=1,
            )
        )  # fmt: skip
        self.points = [backend.create_waitpoint(self.handle) for _ in range(2)]
        self.signal(self.points[0])
        backend.report_usage(self.handle, UsageDimensions(custom={"calls": 1}, dedup_key="r"))
        backend.report_usage(self.handle, UsageDimensions(custom={"calls": 1}))
        self.waiting = self.create(flow_id=self.flow, execution_id=beside(self.parent))
        self.delayed = self.create(flow_id=self.flow, execution_id=beside(self.parent), delay=600)
        self.eids = (self.parent, self.child, self.waiting, self.delayed)

    def create(self, **options):
        return self.backend.create_execution(
            lane=LANE, payload=b"p", tags={"a.b": "c"}, retry=RETRY, attempt_timeout=600, **options
        )

    def claim(self):
        return self.backend.claim(lane=LANE, **WORKER)

    def call(self, op):
        return self.raw.fcall(op.function, len(op.keys), *op.keys, *op.argv)

    def signal(self, point):
        self.backend.deliver_signal(self.child, point, "go", idempotency_key="k", payload=b"p")

    # -- variants -----------------------------------------------------------------------------------

    def condition(self, needed=2):
        specs = [WaitpointSpec(WaitpointKind.EXTERNAL, b"", p.hmac_token) for p in self.points]
        return ResumeCondition.count(needed, *specs, distinct=CountKind.DISTINCT_SIGNALS)

    def suspended(self, behavior=TimeoutBehavior.FAIL):
        self.backend.suspend(self.handle, self.condition(), timeout=600, on_timeout=behavior)
        return self

    def cancelled(self):
        self.backend.cancel_flow(
            self.flow, CancelFlowPolicy.CANCEL_ALL, ff_fast.CancelFlowWait.NO_WAIT
        )
        return self

    def lapsed(self):
        set_head(self.raw, keys.head(self.child, 0), lease_expires_at=1)
        return self

    def due(self, kind, eid=None):
        member = f"{kind}:{eid or self.child}"
        self.raw.zadd(keys.timers(self.tag), {member: 1})
        return ops.fire_timer(
            self.tag, member.encode(), kind, eid or self.child, ScannerFilter.NOOP
        )

    def append(self, *blocks, first=4, push=b" push"):
        attempt = self.attempt
        args = (part for block in blocks for part in block)
        argv = streams.part_of(attempt.stream_keys, self.writer, b"%d" % (first - 1), push, *args)
        return ops.Op(b"ff_append", attempt.stream_keys, argv, None)

    # -- ops ----------------------------------------------------------------------------------------

    def creation(self, **options):
        given = {
            "namespace": "default", "lane": LANE, "priority": 0, "required_capabilities": b"",
            "retention_ms": 1000, "delay_ms": 0, "deadline_ms": 1000, "attempt_timeout_ms": 0,
            "flow_id": self.flow, "parent_id": self.child, "budget_ids": [], "retry": RETRY,
            "payload": b"p", "tags": {"a.b": "c"}, **options,
        }  # fmt: skip
        return ops.create_execution(beside(self.parent), **given)

    def claiming(self):
        return {
            "lane": LANE, **WORKER, "lease_id": keys.new_uuid(), "lease_ttl_ms": 1000,
            "attempt_id": keys.new_uuid(),
        }  # fmt: skip

    def opening(self, eid=None, **options):
        given = {
            "namespace": "default", "retention_ms": 60_000, "takeover_ms": 60_000,
            "worker_instance_id": "w-1", "lease_id": keys.new_uuid(), "lease_ttl_ms": 60_000,
            "attempt_id": keys.new_uuid(), "writer_text": "0a1b", "max_payload_bytes": 65_536,
            "payload": b"p", "tags": {"a.b": "c"}, **options,
        }  # fmt: skip
        return ops.open_stream(eid or beside(self.parent), **given)

    def named(self, lapsed=False, given_back=False):
        """An opening of a named stream that has a producer, or has lost it."""
        lease_id, eid = keys.new_uuid(), beside(self.parent)
        op = self.opening(eid, lease_id=lease_id)
        produced = op.answer(self.call(op))
        self.eids += (eid,)
        if lapsed:
            set_head(self.raw, keys.head(eid, 0), lease_expires_at=1)
        elif given_back:
            attempt = ops.Attempt.of(produced.handle)
            given = streams.part_of(
                attempt.stream_keys, produced.writer_id, b"0", b" push", *streams.log(b"a")
            )
            self.call(ops.Op(b"ff_append", attempt.stream_keys, given, None))
            self.call(ops.give_back(keys.index_of(self.tag), lease_id))
        else:
            return op
        return self.opening(eid)

    def ended(self):
        """An execution that has ended, with all that one may have."""
        self.backend.complete(self.handle, b"r")
        return ops.delete_execution(self.child, "why")

    def untouched(self):
        """A claim of an execution that needs a capability, given back before anything was written."""
        needy = CapabilitySet({"gpu"})
        self.create(execution_id=beside(self.parent), required_capabilities=needy, priority=9)
        handle = self.backend.claim(lane=LANE, capabilities=needy, **WORKER)
        return ops.give_back(keys.index_of(self.tag), handle.fields().lease_id)

    def forgetting(self):
        self.raw.hset(keys.hinted(LANE, "gpu"), "0", "m")
        return ops.forget_hints(LANE, "gpu", [b"0", b"m"])

    def failing(self, class_):
        return ops.fail_execution(self.attempt, FailureReason("no"), class_)

    def delivery(self, point):
        return ops.deliver_signal(
            self.child, point, signal_id=keys.new_uuid(), signal_name="go", category="",
            source_type="t", source_identity="i", correlation_id="", idempotency_key="k2",
            payload=b"p",
        )  # fmt: skip

    def task(self):
        name = ops.TaskName(self.tag, keys.new_uuid())
        self.call(ops.save_task(name, "o" * 40, 0, "", "first", 60_000, b"d", b"e"))
        return name

    def saving(self, version, kind=""):
        return ops.save_task(self.task(), "o" * 40, version, kind, "second", 60_000, b"D", b"E")

    def noting(self, version, time_us=6):
        owner = keys.new_uuid().replace("-", "") + "0" * 8
        for number in range(2):
            self.call(ops.note_task(owner, f"t-{number}", 1, 5, "2", "-", 60_000))
        return ops.note_task(owner, "t-0", version, time_us, "3", "-", 60_000)

    def suspension(self, needed=2):
        return ops.suspend_execution(
            self.attempt, keys.new_uuid(), self.condition(needed), 600, TimeoutBehavior.FAIL, "r"
        )


S = streams
USAGE = UsageDimensions(custom={"calls": 3})
CALLS = {
    "ff_create_execution": [
        lambda s: s.creation(),
        lambda s: s.creation(delay_ms=600_000),
    ],
    "ff_set_tags": [lambda s: ops.set_tags(s.child, {"c.d": "e"})],
    "ff_claim": [lambda s: ops.claim(keys.index_of(s.tag), needs="", **s.claiming())],
    "ff_claim_execution": [
        lambda s: ops.claim_execution(s.waiting, reclaim=False, capabilities=(), **s.claiming()),
        lambda s: ops.claim_execution(
            s.lapsed().child, reclaim=True, capabilities=(), **s.claiming()
        ),
    ],
    "ff_give_back": [
        lambda s: ops.give_back(keys.index_of(s.tag), s.handle.fields().lease_id),
        lambda s: s.untouched(),
    ],
    "ff_hint": [lambda s: ops.hint(LANE, "gpu", b"1", 0, b"m", b"1000")],
    "ff_forget_hints": [lambda s: s.forgetting()],
    "ff_open_writer": [lambda s: ops.open_writer(s.attempt, ops.writer_id(s.attempt))],
    "ff_open_stream": [
        lambda s: s.opening(),
        lambda s: s.named(),
        lambda s: s.named(lapsed=True),
        lambda s: s.named(given_back=True),
    ],
    "ff_delete_execution": [
        lambda s: ops.delete_execution(s.child, "why"),
        lambda s: s.ended(),
    ],
    "ff_save_task": [
        lambda s: s.saving(1),
        lambda s: s.saving(7, "cancelled"),
    ],
    "ff_delete_task": [lambda s: ops.delete_task(s.task(), "o" * 40)],
    "ff_note_task": [
        lambda s: s.noting(2),
        lambda s: s.noting(0, None),
    ],
    "ff_append": [
        lambda s: s.append(S.log(b"a", b"b"), [b"K", b"100"], [b"E", b"1.5"]),
        lambda s: s.append(S.live(b"a", b"b"), [b"T", b"0-0"], [b"P", b"100000"], [b"H", b"1"]),
        lambda s: s.append(S.log(b"a"), S.live(b"b"), S.log(b"c"), [b"T", b"0-0"], [b"H", b"6"]),
        lambda s: s.append(S.live(b"a"), S.log(b"b"), S.live(b"c"), [b"P", b"100000"]),
        lambda s: s.append(S.patches(b'{"b":2}', base=1), S.log(b"x"), [b"E", b"2"]),
        lambda s: s.append(
            S.patches(b'{"b":2}', base=1), [b"C", b"2", b'{"a":1,"b":2}', b"json-merge-patch"]
        ),
        lambda s: s.append([b"E", b"1.5"], [b"H", b"1"], [b"K", b"100"]),
        lambda s: s.append([b"E", b"1.5"], S.live(b"a"), [b"H", b""]),
        lambda s: s.append(S.live(b"again"), S.log(b"a"), first=4),
        lambda s: s.append(
            [b"G", b"5"], [b"H", b""], [b"N", b"7", b"{}", b"json-merge-patch:"], push=b" "
        ),
        lambda s: s.append([b"R", *2 * [b"1000000000000"]], S.live(b"a"), S.log(b"b"), push=b" "),
    ],
    "ff_renew_lease": [lambda s: ops.renew_lease(s.attempt, 1000)],
    "ff_report_progress": [lambda s: ops.report_progress(s.attempt, 5, "m")],
    "ff_complete_execution": [
        lambda s: ops.complete_execution(s.attempt, b"r"),
        lambda s: ops.complete_execution(s.cancelled().attempt, b"r"),
    ],
    "ff_fail_execution": [
        lambda s: s.failing(FailureClass.TRANSIENT),
        lambda s: s.failing(FailureClass.PERMANENT),
        lambda s: s.failing(FailureClass.INFRA_CRASH),
    ],
    "ff_delay_execution": [lambda s: ops.delay_execution(s.attempt, 1000)],
    "ff_wait_children": [lambda s: ops.wait_children(s.attempt)],
    "ff_cancel_execution": [
        lambda s: ops.cancel_execution(s.child, "r", 0),
        lambda s: ops.cancel_execution(s.child, "r", 1000),
        lambda s: ops.cancel_execution(s.suspended().child, "r", 0),
        lambda s: ops.cancel_execution(s.waiting, "r", 0),
        lambda s: ops.cancel_execution(s.delayed, "r", 0),
    ],
    "ff_create_waitpoint": [
        lambda s: ops.create_waitpoint(s.attempt, keys.new_uuid(), 1000, "auto", "5e" * 32)
    ],
    "ff_rotate_waitpoint_secret": [
        lambda s: ops.rotate_waitpoint_secret(keys.index_of(s.tag), "fresh", "5e" * 32, 1000)
    ],
    "ff_suspend_execution": [lambda s: s.suspension(), lambda s: s.suspension(needed=1)],
    "ff_deliver_signal": [
        lambda s: s.delivery(s.points[1]),
        lambda s: s.suspended().delivery(s.points[1]),
    ],
    "ff_report_usage": [
        lambda s: ops.report_usage(s.attempt, USAGE.with_dedup_key("k"), "k", apply=True),
        lambda s: ops.report_usage(s.attempt, USAGE, "k", apply=True),
    ],
    "ff_create_budget": [lambda s: ops.create_budget(s.budget, {"x": 1}, {})],
    "ff_charge_budget": [lambda s: ops.charge_budget(s.budget, s.child, "k", USAGE, 1000)],
    "ff_release_charge": [lambda s: ops.release_charge(s.budget, s.child, "r")],
    "ff_create_flow": [lambda s: ops.create_flow(keys.new_uuid(), s.tag, "n")],
    "ff_cancel_flow": [
        lambda s: ops.cancel_flow(s.flow, s.tag, "r", CancelFlowPolicy.CANCEL_ALL, 1000)
    ],
    "ff_cancel_members": [
        lambda s: ops.cancel_members((s.cancelled() and s.flow), s.tag, 32),
    ],
    "ff_fire_timer": [
        lambda s: s.lapsed().due("lease"),
        lambda s: s.lapsed().cancelled().due("lease"),
        lambda s: (s.named(lapsed=True), s.due("lease", s.eids[-1]))[1],
        lambda s: (s.named(given_back=True), s.due("lease", s.eids[-1]))[1],
        lambda s: s.due("attempt"),
        lambda s: s.due("deadline"),
        lambda s: s.due("cancel"),
        lambda s: s.due("delay", s.delayed),
        *(
            lambda s, behavior=behavior: s.suspended(behavior).due("suspension")
            for behavior in TimeoutBehavior
        ),
    ],
}
CASES = [
    pytest.param(make, id=f"{name[3:]}-{number}")
    for name, makes in CALLS.items()
    for number, make in enumerate(makes)
]
SECOND = [pytest.param(*makes[:1], id=name[3:]) for name, makes in CALLS.items()]


def test_every_function_that_writes_is_tried():
    read_only = set(
        re.findall(
            r"function_name = '(ff_\w+)',(?:(?!register_function).)*?flags = \{ 'no-writes' \}",
            _library.source(),
            re.DOTALL,
        )
    )
    assert set(CALLS) == set(_library.headers()) - read_only


@contextlib.contextmanager
def opened(**options):
    with EmbeddedServer(debug_command=True, **options) as running, connect_raw(running.url) as raw:
        raw.set(keys.PARTITIONS_CONFIG, 1)
        with ff_fast.ValkeyBackend.connect(running.url) as backend:
            yield backend, raw, running.url


@pytest.fixture(scope="module")
def own_server():
    """An engine of this module's own, since its data is dropped and put back: a backend, and a client."""
    with opened() as found:
        yield found


@pytest.fixture(scope="module")
def own_redis():
    with opened(executable=second_engine()) as found:
        yield found


def snapshot(raw):
    names = sorted(raw.keys("*"))
    with raw.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.dump(name)
            pipeline.pexpiretime(name)
        flat = pipeline.execute()
    return dict(zip(names, zip(flat[::2], flat[1::2], strict=True), strict=True))


def put_back(raw, stored, names=None):
    """Put keys back as they were stored: these, or all there were."""
    with raw.pipeline(transaction=False) as pipeline:
        if names is None:
            pipeline.flushdb()
        for name in stored if names is None else names:
            pipeline.delete(name)
            if name in stored:
                dumped, expires_at = stored[name]
                pipeline.restore(name, max(expires_at, 0), dumped, absttl=expires_at > 0)
        pipeline.execute()


def touched(scene, op):
    """The keys of the commands inside the call, as the server tells them; and the answer."""
    with scene.raw.monitor() as monitor, connect_raw(scene.url) as other:
        reply = other.fcall(op.function, len(op.keys), *op.keys, *op.argv)
        other.echo("the call is over")
        found = set()
        while "the call is over" not in (each := monitor.next_command())["command"]:
            if each["client_type"] == "lua" and not each["command"].startswith("SPUBLISH"):
                found |= {word.encode() for word in each["command"].split(" ") if word[:3] == "ff:"}
    return found, reply


NUMBER = re.compile(rb"\d{1,16}(?:-\d+)?")


def shapes(raw, names):
    """What an effect leaves in each key, without the times and random ids in it."""
    names = list(names)
    with raw.pipeline(transaction=False) as pipeline:
        for name in names:
            pipeline.type(name)
            pipeline.pttl(name)
        flat = pipeline.execute()
    kinds = flat[::2]
    with raw.pipeline(transaction=False) as pipeline:
        for name, kind in zip(names, kinds, strict=True):
            if kind == b"hash":
                pipeline.hgetall(name)
            elif kind == b"zset":
                pipeline.zrange(name, 0, -1)
            elif kind == b"set":
                pipeline.scard(name)
            elif kind == b"stream":
                pipeline.xrange(name)
            else:
                pipeline.exists(name)
        values = pipeline.execute()
    told = {}
    for name, kind, ttl, value in zip(names, kinds, flat[1::2], values, strict=True):
        if kind == b"hash":
            fields = {re.sub(rb"[0-9a-f]{8,}", b"", field) for field in value}
            told[name] = kind, ttl > 0, fields, value.get(b"state")
        elif kind == b"zset":
            told[name] = kind, ttl > 0, sorted(re.sub(rb"[^a-z:].*", b"", each) for each in value)
        elif kind == b"stream":
            told[name] = kind, ttl > 0, [sorted(fields) for _, fields in value]
        else:
            told[name] = kind, ttl > 0, value
    return told


def damages(raw, name):
    """Ways to damage a key as it is: a name, and what does it."""
    kind = raw.type(name)
    if kind == b"string":
        yield "another type", [("DEL", name), ("RPUSH", name, "junk")]
    else:
        yield "another type", [("SET", name, "junk")]
    if kind == b"stream":
        yield "a high id", [("XADD", name, HIGH_ID, "junk", "1")]
        yield "the last id", [("XADD", name, MAX_ID, "junk", "1")]
        yield "an id that was deleted", [("XADD", name, HIGH_ID, "j", "1"), ("XDEL", name, HIGH_ID)]
    if kind == b"hash":
        for field, value in raw.hgetall(name).items():
            if NUMBER.fullmatch(value):
                yield f"junk in {field.decode()}", [("HSET", name, field, "junk")]


def attempted(scene, op, commands):
    """The answer of a call after *commands*, None where it was refused or stopped; and whether it had an effect."""
    with scene.raw.pipeline(transaction=False) as pipeline:
        for command in commands:
            pipeline.execute_command(*command)
        pipeline.info("commandstats")
        pipeline.execute_command("DEBUG", "DIGEST")
        pipeline.fcall(op.function, len(op.keys), *op.keys, *op.argv)
        pipeline.execute_command("DEBUG", "DIGEST")
        pipeline.info("commandstats")
        *_, told_before, before, reply, after, told = pipeline.execute(raise_on_error=False)
    refused = isinstance(reply, Exception) or (isinstance(reply, list) and reply[0] == 0)
    return None if refused else reply, before != after or published(told_before) != published(told)


def published(commandstats):
    """How many messages the server was given to publish."""
    return commandstats.get("cmdstat_spublish", {"calls": 0})["calls"]


@pytest.mark.parametrize("make", CASES)
def test_a_call_has_its_whole_effect_or_none(own_server, make):
    check_every_damage(*own_server, make)


@pytest.mark.second_engine
@pytest.mark.parametrize("make", SECOND)
def test_so_it_has_on_the_second_engine(own_redis, make):
    check_every_damage(*own_redis, make)


def check_every_damage(backend, raw, url, make):
    raw.flushdb()
    raw.set(keys.PARTITIONS_CONFIG, 1)
    scene = Scene(backend, raw, url)
    op = make(scene)
    before = snapshot(raw)
    names, reply = touched(scene, op)
    assert isinstance(reply, bytes) or reply[0] == 1
    assert set(op.keys) & names
    effect = shapes(raw, raw.keys("*"))
    made = effect.keys() - before.keys()
    put_back(raw, before)
    before = snapshot(raw)
    digest = raw.execute_command("DEBUG", "DIGEST")
    for name in sorted(names):
        for how, commands in list(damages(raw, name)):
            reply, changed = attempted(scene, op, commands)
            where = f"{how}: {name.decode()}: {reply!r:.80}"
            refused = reply is None
            if refused:
                assert not changed, where
            elif b"NONE" in reply:
                # What cannot be claimed leaves the index, and comes back with a timer.
                index = {
                    keys.eligible(scene.tag, LANE),
                    keys.queues(scene.tag),
                    keys.timers(scene.tag),
                }
                put_back(raw, before, {name, *index})
                assert raw.execute_command("DEBUG", "DIGEST") == digest, where
            elif b"deferred" in reply:
                put_back(raw, before, {name, keys.timers(scene.tag)})
                assert raw.execute_command("DEBUG", "DIGEST") == digest, where
            elif how == "another type":
                check_effect(scene, op, name, effect, where)
            put_back(raw, before, {name} if refused else names | made)
            if raw.execute_command("DEBUG", "DIGEST") != digest:
                # The damage has led the call elsewhere.
                put_back(raw, before)


def check_effect(scene, op, name, effect, where):
    """Every key but the damaged one is as an undamaged call leaves it."""
    others = set(effect) - {name}
    damaged = next((eid for eid in scene.eids if eid.encode() in name), None)
    if op.function == b"ff_cancel_members" or damaged == scene.parent:
        # The keys of one member, or of a parent, are damaged: it is left as it is, and the others are not.
        others = {
            each
            for each in others
            if damaged and damaged.encode() not in each and b":{fp:0}:{fp:0}" in each
        }
    found = shapes(scene.raw, others)
    assert {each: found[each] for each in others if found[each] != effect[each]} == {}, where
