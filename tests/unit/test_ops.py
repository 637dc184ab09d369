"""What is sent to each Lua function, and how its answers are read, against what the Lua headers declare."""

import dataclasses
import hashlib
import re

import hiredis
import pytest

from ff_fast import _library, errors, keys
from ff_fast._core import ops
from ff_fast._core.steps import Step
from ff_fast._hot.writer import WriterCore
from ff_fast.errors import Corruption, Outcome, ProtocolError
from ff_fast.types import (
    AttemptDescription,
    CancelFlowPolicy,
    CancelOutcome,
    CapabilitySet,
    CountKind,
    ExecutionDescription,
    ExecutionSummary,
    FailOutcome,
    FailureClass,
    FailureReason,
    Handle,
    HandleKind,
    LeaseRenewal,
    PendingWaitpoint,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    RetryBackoff,
    RetryPolicy,
    ScannerFilter,
    SignalOutcome,
    StateTransition,
    StreamDescription,
    StreamMode,
    SuspensionDescription,
    TimeoutBehavior,
    UsageDimensions,
    UsageVerdict,
    WaitpointHmac,
    WaitpointKind,
    WaitpointSpec,
)

HEADERS = _library.headers()
PARTS = _library._read_parts()
EID = "{fp:86}:550e8400-e29b-41d4-a716-446655440000"
LEASE = "11111111-2222-4333-8444-555555555555"
INDEX = 3
CLAIMED = {
    "execution_id": EID,
    "attempt_index": INDEX,
    "attempt_id": "attempt-1",
    "lease_id": LEASE,
    "lease_epoch": 4,
    "lease_ttl_ms": 30_000,
    "worker_instance_id": "worker-1",
}
HANDLE = Handle.encode(**CLAIMED, lane_id="lane 1")
IN_NO_LANE = Handle.encode(**CLAIMED, lane_id="")
ATTEMPT = ops.Attempt.of(HANDLE)
FLOW = "99999999-2222-4333-8444-555555555555"
PARENT = "{fp:86}:660e8400-e29b-41d4-a716-446655440000"
WAITPOINT = "77777777-2222-4333-8444-555555555555"
SIGNAL_ID = "88888888-2222-4333-8444-555555555555"
TOKENS = [f"k1:{digit * 40}" for digit in "abc"]
SECRET = "5e" * 32
DIGEST = hashlib.sha1(LEASE.encode()).hexdigest().encode()
TASK = ops.TaskName("{fp:86}", "550e8400-e29b-41d4-a716-446655440000")
WRITER = b"3:" + DIGEST + b":4:w"
USAGE = UsageDimensions(10, 0, 30, {"calls": 2, "none": 0})
AMOUNTS = [b"input_tokens", b"10", b"wall_ms", b"30", b"calls", b"2"]
SIGNAL = ResumeSignal(SIGNAL_ID, "go", "cat", "user", "ada", "c-1", 0, b"\x00p")
SCOPE = ScannerFilter().with_namespace("tenant").with_instance_tag("a.b", "c")


def leaf(index):
    kind = list(WaitpointKind)[index]
    return WaitpointSpec(kind, b"m%d" % index, WaitpointHmac(TOKENS[index]))


CONDITION = ResumeCondition(
    (leaf(0), ResumeCondition.count(1, leaf(1), leaf(2), distinct=CountKind.DISTINCT_SOURCES)), 2
)

KEYS = {
    "core": keys.core(EID),
    "payload": keys.payload(EID),
    "tags": keys.tags(EID),
    "result": keys.result(EID),
    "log": keys.stream(EID, INDEX),
    "live": keys.live(EID, INDEX),
    "head": keys.head(EID, INDEX),
    "summary": keys.summary(EID, INDEX),
    "attempt": keys.attempt(EID, INDEX),
    "eligible": keys.eligible("{fp:86}", "lane 1", "a,b"),
    "needs": keys.needs("{fp:86}", "lane 1"),
    "leases": keys.leases("{fp:86}"),
    "lane_needs": keys.lane_needs("lane 1"),
    "ready": keys.ready("lane 1", "a,b"),
    "hinted": keys.hinted("lane 1", "a,b"),
    "usage": keys.usage(EID),
    "history": keys.history(EID),
    "timers": keys.timers("{fp:86}"),
    "listed": keys.listed("{fp:86}"),
    "queues": keys.queues("{fp:86}"),
    "completions": keys.completions("{fp:86}"),
    "ring": keys.waitpoint_secrets("{fp:86}"),
    "flow": keys.flow("{fp:86}", FLOW),
    "members": keys.flow_members("{fp:86}", FLOW),
    "open": keys.flow_open("{fp:86}", FLOW),
    "limits": keys.budget_limits("b-1"),
    "charges": keys.budget_charges("b-1", EID),
    "task": keys.task(*TASK),
    "task_events": keys.task_events(*TASK),
    "task_order": keys.task_order("o"),
    "task_due": keys.task_due("o"),
    "task_facts": keys.task_facts("o"),
    "partitions": keys.PARTITIONS_CONFIG,
    "probe": keys.CLUSTER_PROBE,
}
OF_A_BUDGET = ("ff_create_budget", "ff_charge_budget", "ff_release_charge")


def keys_of(name):
    """The keys that a function's header names."""
    named = {**KEYS, "usage": keys.budget_usage("b-1")} if name in OF_A_BUDGET else KEYS
    return tuple(named[key] for key in HEADERS[name].keys)


FENCE = {
    "attempt_index": b"3",
    "lease_id": LEASE.encode(),
    "lease_epoch": b"4",
}


# Each function: its call, its arguments by name, and the repeated ones behind them.
def signalled(payload):
    return ops.deliver_signal(
        EID,
        PendingWaitpoint(WAITPOINT, WaitpointHmac(TOKENS[0])),
        signal_id=SIGNAL_ID,
        signal_name="go",
        category="cat",
        source_type="user",
        source_identity="ada",
        correlation_id="c-1",
        idempotency_key="once",
        payload=payload,
    )


CALLS = {
    "ff_version": (ops.version(), {}, []),
    "ff_create_execution": (
        ops.create_execution(
            EID,
            namespace="tenant",
            lane="lane 1",
            priority=7,
            required_capabilities=b"a,b",
            retention_ms=60,
            delay_ms=61,
            deadline_ms=62,
            attempt_timeout_ms=63,
            flow_id=FLOW,
            parent_id=PARENT,
            budget_ids=["b-1", "b-2"],
            retry=RetryPolicy(3, RetryBackoff.FIXED, 0.1, 1.255, 5, 15, 7),
            payload=b"\x00\xff",
            tags={"a.b": "c", "d.e": "ż"},
        ),
        {
            "execution_id": EID.encode(),
            "namespace": b"tenant",
            "lane_id": b"lane 1",
            "priority": b"7",
            "required_capabilities": b"a,b",
            "retention_ms": b"60",
            "delay_ms": b"61",
            "deadline_ms": b"62",
            "flow_id": FLOW.encode(),
            "parent_id": PARENT.encode(),
            "budget_ids": b"b-1 b-2",
            "retry_max": b"3",
            "retry_backoff": b"fixed",
            "retry_delay_ms": b"100",
            "retry_multiplier_percent": b"125",
            "retry_max_delay_ms": b"5000",
            "retry_jitter_percent": b"15",
            "max_reclaims": b"7",
            "attempt_timeout_ms": b"63",
            "payload": b"\x00\xff",
        },
        [b"a.b", b"c", b"d.e", "ż".encode()],
    ),
    "ff_claim": (
        ops.claim(
            86,
            lane="lane 1",
            needs="a,b",
            worker_id="w",
            worker_instance_id="worker-1",
            lease_id=LEASE,
            lease_ttl_ms=30_000,
            attempt_id="attempt-1",
            hint_score=b"-9",
        ),
        {
            "worker_id": b"w",
            "worker_instance_id": b"worker-1",
            "lease_id": LEASE.encode(),
            "lease_ttl_ms": b"30000",
            "attempt_id": b"attempt-1",
            "required_capabilities": b"a,b",
            "hint_score": b"-9",
        },
        [],
    ),
    "ff_give_back": (ops.give_back(86, LEASE), {"lease_id": LEASE.encode()}, []),
    "ff_hint": (
        ops.hint("lane 1", "a,b", b"-5", 86, b"mark", b"60"),
        {
            "required_capabilities": b"a,b",
            "eligible_score": b"-5",
            "partition": b"86",
            "mark": b"mark",
            "kept_ms": b"60",
        },
        [],
    ),
    "ff_forget_hints": (
        ops.forget_hints("lane 1", "a,b", [b"86", b"mark"]),
        {},
        [b"86", b"mark"],
    ),
    "ff_claim_execution": (
        ops.claim_execution(
            EID,
            lane="lane 1",
            worker_id="w",
            worker_instance_id="worker-1",
            lease_id=LEASE,
            lease_ttl_ms=30_000,
            attempt_id="attempt-1",
            reclaim=True,
            capabilities=("a", "b"),
        ),
        {
            "worker_id": b"w",
            "worker_instance_id": b"worker-1",
            "lease_id": LEASE.encode(),
            "lease_ttl_ms": b"30000",
            "attempt_id": b"attempt-1",
            "reclaim": b"1",
        },
        [b"a", b"b"],
    ),
    "ff_renew_lease": (ops.renew_lease(ATTEMPT, 500), {**FENCE, "lease_ttl_ms": b"500"}, []),
    "ff_complete_execution": (
        ops.complete_execution(ATTEMPT, b"r\x00", b"7-8"),
        {**FENCE, "last_id": b"7-8", "payload": b"r\x00"},
        [],
    ),
    "ff_fail_execution": (
        ops.fail_execution(ATTEMPT, FailureReason("why", b"\xff"), FailureClass.TIMEOUT),
        {
            **FENCE,
            "last_id": b"",
            "message": b"why",
            "failure_class": b"timeout",
            "detail": b"\xff",
        },
        [],
    ),
    "ff_report_progress": (
        ops.report_progress(ATTEMPT, 42, "half ż"),
        {**FENCE, "percent": b"42", "message": "half ż".encode()},
        [],
    ),
    "ff_delay_execution": (
        ops.delay_execution(ATTEMPT, 500, b"7-8"),
        {**FENCE, "last_id": b"7-8", "delay_ms": b"500"},
        [],
    ),
    "ff_wait_children": (ops.wait_children(ATTEMPT), {**FENCE, "last_id": b""}, []),
    "ff_cancel_execution": (
        ops.cancel_execution(EID, "why ż", 700, LEASE),
        {"reason": "why ż".encode(), "grace_ms": b"700", "lease_id": LEASE.encode()},
        [],
    ),
    "ff_create_waitpoint": (
        ops.create_waitpoint(ATTEMPT, WAITPOINT, 900, "k1", SECRET),
        {
            **FENCE,
            "waitpoint_id": WAITPOINT.encode(),
            "expires_ms": b"900",
            "kid": b"k1",
            "secret": SECRET.encode(),
        },
        [],
    ),
    "ff_rotate_waitpoint_secret": (
        ops.rotate_waitpoint_secret(86, "k2", SECRET, 50),
        {"kid": b"k2", "secret": SECRET.encode(), "grace_ms": b"50"},
        [],
    ),
    "ff_suspend_execution": (
        ops.suspend_execution(ATTEMPT, "s-1", CONDITION, 800, TimeoutBehavior.ESCALATE, "why"),
        {
            **FENCE,
            "last_id": b"",
            "suspension_id": b"s-1",
            "timeout_ms": b"800",
            "timeout_behavior": b"escalate",
            "reason": b"why",
            "node_count": b"2",
        },
        [
            *(b"-1", b"2", b"leaf"),
            *(b"0", b"1", b"source"),
            *(b"0", TOKENS[0].encode(), b"signal_name", b"m0"),
            *(b"1", TOKENS[1].encode(), b"correlation_id", b"m1"),
            *(b"1", TOKENS[2].encode(), b"external", b"m2"),
        ],
    ),
    "ff_deliver_signal": (
        signalled(b"\x00p"),
        {
            "waitpoint_id": WAITPOINT.encode(),
            "token": TOKENS[0].encode(),
            "signal_id": SIGNAL_ID.encode(),
            "signal_name": b"go",
            "signal_category": b"cat",
            "source_type": b"user",
            "source_identity": b"ada",
            "correlation_id": b"c-1",
            "idempotency_key": b"once",
            "has_payload": b"1",
            "payload": b"\x00p",
        },
        [],
    ),
    "ff_observe_signals": (
        ops.observe_signals(ATTEMPT, 7),
        {**FENCE, "offset": b"7", "max_bytes": b"1048576"},
        [],
    ),
    "ff_report_usage": (
        ops.report_usage(ATTEMPT, USAGE.with_dedup_key("report-1"), "report-1", apply=True),
        {**FENCE, "phase": b"apply", "kind": b"keyed", "report_id": b"report-1"},
        AMOUNTS,
    ),
    "ff_create_budget": (
        ops.create_budget("b-1", {"input_tokens": 5}, {"calls": 0}),
        {},
        [b"hard:input_tokens", b"5", b"soft:calls", b"0"],
    ),
    "ff_charge_budget": (
        ops.charge_budget("b-1", EID, "report-1", USAGE, 60),
        {"charge_id": b"report-1", "window_ms": b"60"},
        AMOUNTS,
    ),
    "ff_release_charge": (
        ops.release_charge("b-1", EID, "report-1"),
        {"charge_id": b"report-1"},
        [],
    ),
    "ff_create_flow": (
        ops.create_flow(FLOW, "{fp:86}", "tenant"),
        {"flow_id": FLOW.encode(), "namespace": b"tenant"},
        [],
    ),
    "ff_cancel_flow": (
        ops.cancel_flow(FLOW, "{fp:86}", "why", CancelFlowPolicy.CANCEL_PENDING, 20),
        {"reason": b"why", "policy": b"cancel_pending", "backlog_ms": b"20"},
        [],
    ),
    "ff_cancel_members": (ops.cancel_members(FLOW, "{fp:86}", 100), {"count": b"100"}, []),
    "ff_describe_flow": (ops.describe_flow(FLOW, "{fp:86}"), {}, []),
    "ff_fire_timer": (
        ops.fire_timer("{fp:86}", b"lease:x", "lease", EID, SCOPE),
        {
            "member": b"lease:x",
            "kind": b"lease",
            "namespace": b"tenant",
            "tag_name": b"a.b",
            "tag_value": b"c",
        },
        [],
    ),
    "ff_set_tags": (
        ops.set_tags(EID, {"a.b": "c", "d.e": "ż"}),
        {},
        [b"a.b", b"c", b"d.e", "ż".encode()],
    ),
    "ff_read_tags": (ops.read_tags(EID, "a.b"), {"tag_name": b"a.b"}, []),
    "ff_open_writer": (
        ops.open_writer(ATTEMPT, WRITER, 70_000),
        {"writer": WRITER, "lease_id": LEASE.encode(), "payload_limit": b"70000"},
        [],
    ),
    "ff_open_stream": (
        ops.open_stream(
            EID,
            namespace="tenant",
            retention_ms=60,
            takeover_ms=61,
            worker_instance_id="worker-1",
            lease_id=LEASE,
            lease_ttl_ms=30_000,
            attempt_id="attempt-1",
            writer_text="0a1b",
            max_payload_bytes=70_000,
            payload=b"p\x00",
            tags={"a.b": "ż"},
        ),
        {
            "execution_id": EID.encode(),
            "namespace": b"tenant",
            "retention_ms": b"60",
            "takeover_ms": b"61",
            "worker_id": b"open_stream",
            "worker_instance_id": b"worker-1",
            "lease_id": LEASE.encode(),
            "lease_ttl_ms": b"30000",
            "attempt_id": b"attempt-1",
            "writer_text": b"0a1b",
            "payload_limit": b"70000",
            "payload": b"p\x00",
        },
        [b"a.b", "ż".encode()],
    ),
    "ff_delete_execution": (ops.delete_execution(EID, "why"), {"reason": b"why"}, []),
    "ff_save_task": (
        ops.save_task(TASK, "o", 3, "ended", "save-1", 50, b"d\x00", b"e"),
        {
            "owner": b"o",
            "prev_version": b"3",
            "kind": b"ended",
            "save_id": b"save-1",
            "ttl_ms": b"50",
            "document": b"d\x00",
            "event": b"e",
        },
        [],
    ),
    "ff_read_task": (
        ops.read_task(TASK, "o", "7-8", 9),
        {"owner": b"o", "after": b"7-8", "count": b"9"},
        [],
    ),
    "ff_delete_task": (ops.delete_task(TASK, "o"), {"owner": b"o"}, []),
    "ff_note_task": (
        ops.note_task("o", "t-ż", 4, 5, "2", "c", 50),
        {
            "task_id": "t-ż".encode(),
            "version": b"4",
            "time_us": b"5",
            "state": b"2",
            "context": b"c",
            "ttl_ms": b"50",
        },
        [],
    ),
    "ff_list_tasks": (
        ops.list_tasks("o", "2", "c", -1, ops.TaskPlace(7, "t"), 9),
        {
            "state": b"2",
            "context": b"c",
            "least_us": b"-1",
            "below_us": b"7",
            "below_id": b"t",
            "count": b"9",
        },
        [],
    ),
    "ff_list_executions": (
        ops.list_executions(
            86, ops.Filter(("active", "failed"), "l", "n", ("a.b", "c")), (7, EID), 9
        ),
        {
            "states": b"active failed",
            "lane_suffix": b" l",
            "namespace": b"n",
            "tag_name": b"a.b",
            "tag_value": b"c",
            "before_ms": b"7",
            "before_id": EID.encode(),
            "count": b"9",
        },
        [],
    ),
    "ff_list_lanes": (
        ops.list_lanes(86, "(a", "5"),
        {"queue_after": b"(a", "offset": b"5"},
        [],
    ),
    "ff_read_range": (
        ops.read_range(
            EID,
            INDEX,
            log_after=b"1-2",
            live_after=b"1-3",
            count=10,
            max_bytes=20,
            visibility="exclude_best_effort",
            cursor=b"1-1",
        ),
        {
            "attempt_index": b"3",
            "log_after": b"1-2",
            "live_after": b"1-3",
            "count": b"10",
            "max_bytes": b"20",
            "visibility": b"exclude_best_effort",
            "cursor": b"1-1",
        },
        [],
    ),
    "ff_read_summary": (ops.read_summary(EID, INDEX), {}, []),
    "ff_read_state": (ops.read_state(EID), {}, []),
    "ff_describe_execution": (ops.describe_execution(EID), {}, []),
    "ff_describe_attempt": (ops.describe_attempt(EID, INDEX), {"attempt_index": b"3"}, []),
    "ff_read_payload": (ops.read_payload(EID), {}, []),
}

# What else the operations are called with: (operation, place of the argument, what stands there).
FURTHER_ARGUMENTS = [
    (ops.report_usage(ATTEMPT, USAGE, "k", apply=False), 3, b"check"),
    (ops.report_progress(ATTEMPT, None, ""), 3, b""),
    (ops.report_progress(ATTEMPT, 0, ""), 3, b"0"),
    (
        signalled(None),
        9,
        b"0",
    ),
    (
        signalled(b""),
        9,
        b"1",
    ),
    (ops.fire_timer("{fp:86}", b"m", "lease", EID, ScannerFilter.NOOP), 2, b""),
    (ops.fire_timer("{fp:86}", b"m", "lease", EID, ScannerFilter.NOOP), 3, b""),
]


@pytest.mark.parametrize("op, at, argument", FURTHER_ARGUMENTS)
def test_an_argument_stands_in_its_place(op, at, argument):
    assert op.argv[at] == argument
    assert HEADERS[op.function.decode()].accepts("args", len(op.argv))


def test_a_claim_by_id_takes_over_only_where_it_is_told_to():
    op = ops.claim_execution(
        EID,
        lane="l",
        worker_id="w",
        worker_instance_id="i",
        lease_id=LEASE,
        lease_ttl_ms=1,
        attempt_id="a",
        reclaim=False,
        capabilities=(),
    )
    assert op.argv[5:] == (b"0",)


def test_a_result_is_read_as_a_payload_is():
    op = ops.read_result(EID)
    assert (op.function, op.keys) == (b"ff_read_payload", (KEYS["core"], KEYS["result"]))
    assert op.answer([1, b"OK", b"\xff"]) == b"\xff"


def test_an_input_is_a_payload_and_where_it_comes_from():
    op = ops.read_input(EID)
    assert op[:3] == ops.read_payload(EID)[:3]
    assert op.answer([1, b"OK", b"\xff"]) == (b"\xff", None)
    assert op.answer([1, b"OK", b"", b"00-1-2-01"]) == (b"", "00-1-2-01")


@pytest.mark.parametrize(
    "fields, version",
    [
        ([b"1", b"abc", b""], (1, "abc", None, "", "", False, "")),
        ([b"2", b"abc"], (2, "abc", None, "", "", False, "")),
        ([b"2", b"abc", b"7"], (2, "abc", 7, "", "", False, "")),
        (
            [b"2", b"abc", b"7", b"allkeys-lru", b"Valkey 9.1.0", b"1", b"01", b"more"],
            (2, "abc", 7, "allkeys-lru", "Valkey 9.1.0", True, "01"),
        ),
    ],
)
def test_the_version_of_another_contract_can_be_read(fields, version):
    assert ops.version().answer([1, b"OK", *fields]) == version


def test_a_report_without_an_amount_names_none():
    usage = UsageDimensions(0, 0, 0, {"calls": 0})
    assert ops.report_usage(ATTEMPT, usage, "k", apply=True).argv[4:] == (b"once", b"k")


def test_a_writer_id_is_the_fence_and_a_text_of_its_own():
    made = {ops.writer_id(ATTEMPT) for _ in range(50)}
    assert len(made) == 50
    for writer in made:
        assert re.fullmatch(rb"3:" + DIGEST + rb":4:[0-9a-f-]{8,}", writer)


def parsed(request):
    reader = hiredis.Reader()
    reader.feed(request)
    parts = reader.gets()
    assert reader.gets() is False
    return parts


def test_every_function_is_called_by_somebody():
    # The writer's core packs ff_append by itself: it is the hot path.
    assert sorted([*CALLS, "ff_append"]) == sorted(HEADERS)


def test_keys_and_arguments_are_those_that_the_header_names(subtests):
    for name, (op, arguments, repeated) in CALLS.items():
        with subtests.test(f"{name!r:.60}"):
            header = HEADERS[name]
            assert op.function == name.encode()
            assert op.keys == keys_of(name)
            assert tuple(arguments) == header.args
            assert op.argv == (*arguments.values(), *repeated)
            assert header.accepts("keys", len(op.keys))
            assert header.accepts("args", len(op.argv))
            # One slot a call, or a cluster refuses it.
            slots = {keys.key_slot(key) for key in op.keys}
            assert len(slots) <= (2 if name == "ff_version" else 1)


def test_the_request_is_the_call(subtests):
    for name, (op, _, _) in CALLS.items():
        with subtests.test(f"{name!r:.60}"):
            called = op.command()
            command, function, count, *rest = parsed(called.request)
            assert command == (b"FCALL_RO" if op.read_only else b"FCALL")
            assert (function, count) == (name.encode(), b"%d" % len(op.keys))
            assert rest == [*op.keys, *op.argv]
            # In a cluster, a call that writes names one more key.
            (sent,) = Step((called,)).in_cluster.commands
            command, function, count, *rest = parsed(sent.request)
            assert command == (b"FCALL_RO" if op.read_only else b"FCALL")
            absent = [] if op.read_only else [keys.absent(op.keys[0])]
            assert (function, count) == (name.encode(), b"%d" % len([*op.keys, *absent]))
            assert rest == [*op.keys, *absent, *op.argv]
            assert len({keys.key_slot(key) for key in (*op.keys, *absent)}) == 1 + (
                name == "ff_version"
            )
            # It is none of the keys that the table names.
            assert not {*absent} & {*op.keys}


@pytest.mark.parametrize(
    "mode, names, letter",
    [
        (StreamMode.durable(), "head log", b"L"),
        (StreamMode.best_effort_live(5_000), "head live", b"V"),
        (StreamMode.durable_summary(), "head log live summary", b"S"),
    ],
)
def test_an_append_is_what_its_header_names(mode, names, letter):
    header = HEADERS["ff_append"]
    # Its stream is the log, or the live window where the batch has to do with nothing else.
    named_keys = (*header.keys, *header.tails.get("keys", ()))
    assert named_keys == ("head", "stream", "live", "summary")
    of_all = tuple(KEYS["log" if name == "stream" else name] for name in named_keys)
    assert of_all == ATTEMPT.stream_keys
    # Those that a refusal or a repeat is looked up in are spelled in Lua: one slot for them all.
    assert len({keys.key_slot(key) for key in (*of_all, KEYS["core"])}) == 1
    writer = WriterCore(
        keys=ATTEMPT.stream_keys,
        writer=WRITER,
        mode=mode,
        opened=tuple(ops.Opened(0, 5, 5, b"", 0)),
    )
    # The first batch of a later writer trims the log as well.
    writer.write(b"", mode=StreamMode.durable())
    assert writer._acknowledge(writer._next_batch(), b"1-6 2 0") is None
    writer.write(b"{}")
    command, function, named, *rest = parsed(writer._next_batch().message)
    # Those that the batch needs: each key costs the server time.
    wanted = [KEYS[name] for name in names.split()]
    count = len(wanted)
    assert (command, function, named) == (b"FCALL", b"ff_append", b"%d" % count)
    assert rest[:count] == wanted
    arguments = {"writer": WRITER, "previous_sequence": b"6"}
    assert rest[count + 1 : count + 3] == list(arguments.values())
    assert rest[count + 4] == letter
    assert header.accepts("args", len(rest) - count)


# -- errors ------------------------------------------------------------------------------------------

DETAILS = {
    "payload_too_large": [b"65536", b"65537"],
    "sequence_gap": [b"3", b"5"],
    "summary_conflict": [b"1", b"2"],
    "execution_not_active": [b"completed", b"success"],
    "execution_not_claimable": [b"active"],
    "capability_mismatch": [b"gpu,a100"],
    "invalid_input": [b"block"],
}
CODES = sorted({code for header in HEADERS.values() for code in header.errors})
RAISED = re.compile(r"ff\.err\('(\w+)'((?:, ?[^,()]+(?:\([^()]*\))?)*)\)")


def test_each_code_has_a_class_of_its_own(subtests):
    for code in CODES:
        with subtests.test(f"{code!r:.60}"):
            error = errors.for_code(code, DETAILS.get(code, []))
            assert type(error).__dict__["code"] == code == error.code
            assert type(error) is not errors.ProtocolError
            assert error.outcome is Outcome.NOT_APPLIED
            of_code = [
                each for each in _subclasses(errors.FFError) if each.__dict__.get("code") == code
            ]
            assert of_code == [type(error)]


def _subclasses(cls):
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


# -- names in Lua --------------------------------------------------------------------------------------

_UNPACKED = re.compile(r"\n +local ([\w\s,]+?) =\s+unpack\((keys|args), 1, (\d+)\)")
_INDEXED = re.compile(
    r"\n +local ([\w, ]+) = ((?:keys|args)\[\d\](?:, (?:keys|args)\[\d\])*)(?=\n)"
)


def unpacked(name):
    """The names that a function of lua/ gives its keys and its arguments, each in their order."""
    part, line = HEADERS[name].where.removeprefix("lua/").split(":")
    text = "\n".join(PARTS[part.removesuffix(".lua")].splitlines()[int(line) :])
    body = re.split(r"\n-- ff_\w+\n", text)[0]
    found = {"keys": (), "args": ()}
    for match in _UNPACKED.finditer(body):
        names = tuple(re.split(r",\s*", match[1]))
        assert len(names) == int(match[3]), f"{name} unpacks {match[3]} values into {names}"
        found[match[2]] = names
    for match in _INDEXED.finditer(body):
        names, places = tuple(match[1].split(", ")), match[2].split(", ")
        for field in found:
            if places == [f"{field}[{at}]" for at in range(1, len(names) + 1)]:
                found[field] = names
    return found


def test_keys_and_arguments_have_the_names_of_the_header(subtests):
    # Where the parts of an append begin is computed.
    for name in HEADERS.keys() - {"ff_append"}:
        with subtests.test(f"{name!r:.60}"):
            header, names = HEADERS[name], unpacked(name)
            assert names["args"] == header.args
            declared = (*header.keys, *header.tails.get("keys", ()))
            # The last ones may be there for their slot or for a client's ACL, and stay without a name.
            assert set(names["keys"]) <= {"_", *(f"{key}_key" for key in declared)}
            for given, key in zip(names["keys"], declared, strict=False):
                assert given in ("_", f"{key}_key")


# -- answers -----------------------------------------------------------------------------------------

HINTS = [b"lane 1", b"", b"-5", b"other", "gpu,ż".encode(), b"7"]
HINTED = [("lane 1", "", b"-5"), ("other", "gpu,ż", b"7")]
DESCRIBED = [
    [
        *(b"execution_id", EID.encode(), b"state", b"suspended", b"priority", b"7"),
        *(b"lane_id", b"default", b"namespace", b"n", b"required_capabilities", b"gpu"),
        *(b"flow_id", FLOW.encode(), b"budget_ids", b"b1,b2", b"created_at", b"10"),
        *(b"started_at", b"20", b"last_transition_at", b"30", b"total_attempt_count", b"2"),
        *(b"current_attempt_index", b"1", b"current_attempt_id", b"a", b"current_worker_id", b"w"),
        *(b"current_worker_instance_id", b"w-1", b"current_lease_epoch", b"3"),
        *(b"current_lease_digest", DIGEST, b"released_lease", b"0 " + DIGEST + b" 1"),
        *(b"lease_ttl_ms", b"30000", b"retry_max", b"3", b"retry_backoff", b"fixed"),
        *(b"retry_delay_ms", b"100", b"retry_multiplier_percent", b"126"),
        *(b"retry_max_delay_ms", b"5000", b"retry_jitter_percent", b"15", b"max_reclaims", b"7"),
        *(b"attempt_timeout_ms", b"2500", b"retry_count", b"1", b"reclaim_count", b"2"),
        *(b"retention_ms", b"86400000", b"failure_reason", b"broken"),
        *(b"failure_class", b"transient", b"failure_detail", b"\xff", b"progress_percent", b"40"),
        *(b"progress_message", b"reading", b"progress_updated_at", b"25", b"interrupted", b"1"),
    ],
    [b"a.b", "ż".encode()],
    [b"calls", b"2"],
    [
        [b"20-1", [b"from", b"waiting", b"to", b"active", b"attempt", b"0", b"reason", b"resumed"]],
        [b"10-0", [b"from", b"delayed", b"to", b"waiting", b"attempt", b"0", b"reason", b""]],
    ],
    [b"deadline", b"70", b"suspension", b"90"],
    [
        *(b"suspension_id", b"s", b"attempt_index", b"1", b"created_at", b"30", b"reason"),
        *(b"approval", b"timeout_behavior", b"fail", b"waitpoint_ids", b"w1 w2 w1"),
        *(
            b"waits:1",
            b"signal_name go",
            b"waits:2",
            b"external ",
            b"needed",
            b"2",
            b"received",
            b"1",
        ),
    ],
]
STORED_SIGNAL = [
    *(b"signal_id", SIGNAL_ID.encode(), b"signal_name", b"go", b"signal_category", b"cat"),
    *(b"source_type", b"user", b"source_identity", b"ada", b"correlation_id", b"c-1"),
    *(b"accepted_at", b"5", b"waitpoint_id", WAITPOINT.encode(), b"payload", b"\x00p"),
]
ANSWERS = {
    "ff_version": (
        [b"1", b"abc", b"256", b"noeviction", b"Valkey 9.1.0", b"", b"10?"],
        (1, "abc", 256, "noeviction", "Valkey 9.1.0", False, "10?"),
    ),
    "ff_create_execution": ([b"lane 1", b"", b"-5"], (None, [("lane 1", "", b"-5")])),
    "ff_claim_execution": (
        [EID.encode(), b"3", b"attempt-1", b"4", b"99", b"resumed"],
        (HANDLE.replace(kind=HandleKind.RESUMED), []),
    ),
    "ff_renew_lease": ([b"99", b"4", b"1"], LeaseRenewal(99, 4, cancel_requested=True)),
    "ff_give_back": ([b"1", *HINTS], (True, HINTED)),
    "ff_hint": ([], None),
    "ff_forget_hints": ([], None),
    "ff_report_progress": ([], None),
    "ff_complete_execution": ([b"completed", *HINTS], (None, HINTED)),
    "ff_fail_execution": (
        [b"failed", b"terminal_failed", b"0", *HINTS],
        (FailOutcome.TERMINAL_FAILED, HINTED),
    ),
    "ff_delay_execution": ([b"delayed", b"99"], 99),
    "ff_wait_children": ([b"waiting_children", *HINTS], (None, HINTED)),
    "ff_cancel_execution": (
        [b"cancelled", b"active", *HINTS],
        (CancelOutcome(cancelled=True, previous_state="active"), HINTED),
    ),
    "ff_create_waitpoint": (
        [TOKENS[0].encode()],
        PendingWaitpoint(WAITPOINT, WaitpointHmac(TOKENS[0])),
    ),
    "ff_rotate_waitpoint_secret": ([b"k1"], "k1"),
    "ff_suspend_execution": ([b"suspended", b"s-1"], (False, "s-1")),
    "ff_deliver_signal": (
        [SIGNAL_ID.encode(), b"appended_to_waitpoint", *HINTS],
        (SignalOutcome(SIGNAL_ID, "appended_to_waitpoint"), HINTED),
    ),
    "ff_observe_signals": ([[STORED_SIGNAL], b"3"], ((SIGNAL.replace(accepted_at=5),), 3)),
    "ff_report_usage": ([b"b-1 b-2"], ops.UsageCheck(False, ("b-1", "b-2"))),
    "ff_create_budget": ([], None),
    "ff_charge_budget": ([b"", b"0", b"0"], ReportUsageResult(UsageVerdict.OK)),
    "ff_release_charge": ([], None),
    "ff_create_flow": ([b"open"], "open"),
    "ff_cancel_flow": ([b"cancel_all", b"3"], (CancelFlowPolicy.CANCEL_ALL, 3)),
    "ff_cancel_members": ([b"2", b"1", *HINTS], ((2, 1), HINTED)),
    "ff_describe_flow": ([b"open", b"2", b"1"], ops.FlowCounts("open", 2, 1)),
    "ff_fire_timer": ([b"done", *HINTS], ("done", HINTED)),
    "ff_set_tags": ([b"2"], 2),
    "ff_read_tags": ([[b"a.b", "ż".encode()]], {"a.b": "ż"}),
    "ff_open_writer": ([b"7-8", b"6", b"1.5", b"2", b"3"], ops.Opened(7, 8, 6, b"1.5", 2, 3)),
    "ff_open_stream": (
        [
            EID.encode(),
            b"3",
            b"attempt-1",
            b"4",
            b"99",
            b"fresh",
            b"7-8",
            b"6",
            b"1.5",
            b"2",
            b"3",
        ],
        ops.Produced(
            IN_NO_LANE,
            b":".join((b"3", hashlib.sha1(LEASE.encode()).hexdigest().encode(), b"4", b"0a1b")),
            ops.Opened(7, 8, 6, b"1.5", 2, 3),
        ),
    ),
    "ff_delete_execution": ([*HINTS], (ops.Deleted(cancelled=False, more=False), HINTED)),
    "ff_save_task": ([b"4"], 4),
    "ff_read_task": (
        [b"1", b"4", b"d", b"", [b"7-0", b"3", b"e"]],
        ops.TaskRead(True, 4, b"d", False, [("7-0", 3, b"e")]),
    ),
    "ff_delete_task": ([b"1"], True),
    "ff_note_task": ([b""], False),
    "ff_list_tasks": (
        [b"-1", b"t", b"8", b"a", b"5"],
        ops.TaskPage([ops.TaskPlace(5, "a")], ops.TaskPlace(-1, "t"), 8),
    ),
    "ff_list_executions": (
        [
            b"9",
            EID.encode(),
            [
                [
                    *(b"id", EID.encode(), b"listed_at", b"10", b"state", b"suspended"),
                    *(b"namespace", b"n", b"priority", b"1", b"created_at", b"2", b"lane_id", b"l"),
                    *(b"last_transition_at", b"10", b"total_attempt_count", b"1", b"retry_count"),
                    *(b"0", b"failure_reason", b"no", b"failure_class", b"transient"),
                    *(b"reason", b"approval", b"waits:1", b"signal_name go", b"due", b"12"),
                ]
            ],
        ],
        ops.Listed(
            [
                (
                    (10, EID),
                    ExecutionSummary(
                        execution_id=EID,
                        state="suspended",
                        lane="l",
                        namespace="n",
                        priority=1,
                        created_at_ms=2,
                        last_transition_at_ms=10,
                        due_at_ms=12,
                        attempt_count=1,
                        error="no",
                        failure_class=FailureClass.TRANSIENT,
                        suspension_reason="approval",
                        waiting_for=("signal_name go",),
                    ),
                )
            ],
            (9, EID),
        ),
    ),
    "ff_list_lanes": (
        [b"(x", b"512", [b"l:gpu", b"2", b"7"], [b"active l a", b"3"]],
        ops.LanesPart("(x", "512", [("l:gpu", 2, 7)], [("active", "l a", 3)]),
    ),
    "ff_read_range": (
        [[], b"1-2", b"1", [], b"1-3", b"", b"7-8", b"6", b"expired", b"50", b"1", b"4-5", b"9"],
        ops.Range(
            [],
            b"1-2",
            True,
            [],
            b"1-3",
            False,
            7,
            8,
            6,
            "expired",
            50,
            small=True,
            place=(4, 5),
            payload_limit=9,
        ),
    ),
    "ff_read_summary": ([[b"version", b"1"]], {b"version": b"1"}),
    "ff_read_state": (
        [b"failed", b"2", b"1", b"", b"attempt_failure", b"failed", b"no", b"permanent"],
        ops.State(
            *("failed", 2, True, False, "attempt_failure", "failed", "no"), FailureClass.PERMANENT
        ),
    ),
    "ff_describe_execution": (
        DESCRIBED,
        ExecutionDescription(
            execution_id=EID,
            state="suspended",
            lane="default",
            namespace="n",
            priority=7,
            required_capabilities=CapabilitySet(["gpu"]),
            flow_id=FLOW,
            budget_ids=("b1", "b2"),
            tags={"a.b": "ż"},
            created_at_ms=10,
            started_at_ms=20,
            last_transition_at_ms=30,
            deadline_at_ms=70,
            attempt_count=2,
            attempt_index=1,
            worker_id="w",
            worker_instance_id="w-1",
            lease_epoch=3,
            retry=RetryPolicy(3, RetryBackoff.FIXED, 0.1, 1.26, 5.0, 15, 7),
            retry_count=1,
            reclaim_count=2,
            attempt_timeout=2.5,
            retention=86_400.0,
            failure_reason="broken",
            failure_class=FailureClass.TRANSIENT,
            failure_detail=b"\xff",
            progress_percent=40,
            progress_message="reading",
            progress_at_ms=25,
            suspension=SuspensionDescription(
                "s",
                1,
                "approval",
                30,
                90,
                TimeoutBehavior.FAIL,
                ("w1", "w2"),
                ("signal_name go", "external"),
                2,
                1,
            ),
            usage={"calls": 2},
            history=(
                StateTransition(10, "delayed", "waiting", 0),
                StateTransition(20, "waiting", "active", 0, "resumed"),
            ),
            attempts=(AttemptDescription(0, 20),),
        ),
    ),
    "ff_describe_attempt": (
        [
            [
                *(b"last_id", b"9-7", b"closed_reason", b"expired"),
                *(b"estimator", b"250.500 50 64 128"),
            ],
            *(b"5", b"2", b"1", b"80"),
            [b"worker_id", b"w", b"worker_instance_id", b"w-1", b"started_at", b"3"],
            [b"log_added", b"8", b"live_first", b"9-6", b"live_first_frames", b"2"],
        ],
        StreamDescription(
            *("9-7", 7, 5, 2, 1, "expired", 0.08, "w", "w-1", 3),
            log_added=8,
            live_first_sequence=5,
            live_ttl_ms=50,
            live_floor=64,
            live_ceiling=128,
            live_rate_hz=250.5,
        ),
    ),
    "ff_read_payload": ([b"\x00\xff"], b"\x00\xff"),
}
# Those that answer with nothing that is read.
NOTHING_TO_READ = (
    "ff_hint",
    "ff_forget_hints",
    "ff_report_progress",
    "ff_create_budget",
    "ff_charge_budget",
    "ff_release_charge",
)


def test_every_answer_is_read_here():
    assert sorted([*ANSWERS, "ff_append", "ff_claim"]) == sorted(HEADERS)


def test_an_answer_of_the_declared_form_is_read(subtests):
    for name, (fields, value) in ANSWERS.items():
        with subtests.test(f"{name!r:.60}"):
            assert HEADERS[name].accepts("returns", len(fields))
            assert CALLS[name][0].answer([1, b"OK", *fields]) == value


def test_an_answer_of_another_form_is_not_understood(subtests):
    for name in sorted(set(ANSWERS) - set(NOTHING_TO_READ)):
        with subtests.test(f"{name!r:.60}"):
            op = CALLS[name][0]
            fields, _ = ANSWERS[name]
            bad = [
                None,
                7,
                b"OK",
                [],
                [1],
                [1, 2],
                [1, b"OK", *fields[:-1], 5],
            ]
            read = READ_FIRST.get(name, 0)
            bad.append([1, b"OK", *fields[:read], None, *fields[read + 1 :]])
            # The version is asked of libraries of other contracts too, which may answer less.
            if fields and name != "ff_version":
                bad.append([1, b"OK", *fields[:-1]])
            for reply in bad:
                with pytest.raises((ProtocolError, Corruption)):
                    op.answer(reply)


# The first field that is read of an answer; before it stands what a repeat is known by.
READ_FIRST = {
    "ff_complete_execution": 1,
    "ff_fail_execution": 1,
    "ff_delay_execution": 1,
    "ff_wait_children": 1,
    "ff_cancel_execution": 1,
    "ff_suspend_execution": 1,
}


@pytest.mark.parametrize("name", NOTHING_TO_READ)
@pytest.mark.parametrize("reply", [None, 7, b"OK", [], [1], [1, 2]])
def test_even_an_answer_without_a_field_has_its_form(name, reply):
    with pytest.raises(ProtocolError):
        CALLS[name][0].answer(reply)


def test_further_answers(subtests):
    for name, status, fields, value in (
        ("ff_create_execution", b"OK", [], (None, [])),
        ("ff_create_execution", b"DUPLICATE", [b"l", b"gpu", b"1"], (None, [("l", "gpu", b"1")])),
        ("ff_complete_execution", b"OK", [b"completed"], (None, [])),
        (
            "ff_fail_execution",
            b"OK",
            [b"failed", b"retry_scheduled", b"42"],
            (FailOutcome.RETRY_SCHEDULED(42), []),
        ),
        (
            "ff_cancel_execution",
            b"REQUESTED",
            [b"active", b"active"],
            (CancelOutcome(cancelled=False, previous_state="active"), []),
        ),
        ("ff_suspend_execution", b"ALREADY_SATISFIED", [b"suspended", b"s-0"], (True, "s-0")),
        (
            "ff_deliver_signal",
            b"DUPLICATE",
            [b"s", b"appended_to_waitpoint"],
            (SignalOutcome("s", "appended_to_waitpoint", duplicate=True), []),
        ),
        ("ff_observe_signals", b"OK", [[], b""], ((), None)),
        ("ff_suspend_execution", b"MORE", [b"suspended", b"s-1"], (None, "s-1")),
        ("ff_rotate_waitpoint_secret", b"OK", [b""], ""),
        ("ff_report_usage", b"ALREADY_APPLIED", [b""], ops.UsageCheck(True, ())),
        (
            "ff_charge_budget",
            b"HARD_BREACH",
            [b"calls", b"4", b"5"],
            ReportUsageResult(UsageVerdict.HARD_BREACH, "b-1", "calls", 4, 5),
        ),
        (
            "ff_charge_budget",
            b"SOFT_BREACH",
            [b"calls", b"6", b"5"],
            ReportUsageResult(UsageVerdict.SOFT_BREACH, "b-1", "calls", 6, 5),
        ),
        (
            "ff_charge_budget",
            b"ALREADY_APPLIED",
            [b"", b"0", b"0"],
            ReportUsageResult(UsageVerdict.ALREADY_APPLIED),
        ),
        ("ff_create_flow", b"DUPLICATE", [b"cancelled"], "cancelled"),
        (
            "ff_describe_attempt",
            b"OK",
            [[], b"0", b"0", b"0", b"", [], []],
            StreamDescription("0-0", 0, 0, 0, 0, None, None),
        ),
        # Claimed, and nothing written: the id of the claim is not one of a frame.
        (
            "ff_describe_attempt",
            b"OK",
            [[b"last_id", b"1700000000000-0"], b"0", b"0", b"0", b"80", [], []],
            StreamDescription("0-0", 0, 0, 0, 0, None, 0.08),
        ),
        ("ff_read_tags", b"OK", [[]], {}),
        ("ff_fire_timer", b"OK", [b"later"], ("later", [])),
    ):
        with subtests.test(f"{name!r:.60}"):
            assert HEADERS[name].accepts("returns", len(fields))
            assert CALLS[name][0].answer([1, status, *fields]) == value


NO_IDS = (b"", b"7", b"7-", b"-8", b"7-x", b"7-8-9")


def test_a_half_understood_answer_is_none(subtests):
    for name, status, fields in (
        ("ff_charge_budget", b"NO_VERDICT", [b"", b"0", b"0"]),
        ("ff_charge_budget", b"HARD_BREACH", [b"calls", b"4"]),
        ("ff_charge_budget", b"SOFT_BREACH", [b"calls", b"x", b"5"]),
        ("ff_fail_execution", b"OK", [b"failed", b"something_else", b"0"]),
        ("ff_fail_execution", b"OK", [b"failed", b"retry_scheduled", b"soon"]),
        ("ff_complete_execution", b"OK", [b"completed", b"lane without a score"]),
        ("ff_cancel_flow", b"OK", [b"no_policy", b"0"]),
        ("ff_create_waitpoint", b"OK", [b"k1:short"]),
        ("ff_describe_execution", b"OK", [[], [], [], []]),
        ("ff_describe_execution", b"OK", [[b"state", b"x"], [], [], [[b"1-1"]]]),
        ("ff_describe_execution", b"OK", [[b"state", b"x"], [], [b"calls", b"many"], []]),
        ("ff_describe_flow", b"OK", [b"open", b"x", b"0"]),
        ("ff_describe_flow", b"OK", [b"open", b"1"]),
        ("ff_observe_signals", b"OK", [[[b"signal_id", b"x"]], b""]),
        ("ff_observe_signals", b"OK", [[], b"x"]),
        ("ff_claim", b"NONE", []),
        ("ff_give_back", b"OK", [b"1", b"lane", b"-5"]),
        *(("ff_open_writer", b"OK", [bad, b"0", b"", b"0", b"1"]) for bad in NO_IDS),
        *(
            ("ff_open_writer", b"OK", [*(bad if i == at else b"1" for i in range(4)), b"1"])
            for bad in (b"-1", b"9007199254740992")
            for at in (1, 3)
        ),
        ("ff_open_writer", b"OK", [b"1-9007199254740992", b"0", b"", b"0", b"1"]),
        *(
            (
                "ff_read_range",
                b"OK",
                [[], b"1-2", b"", [], b"1-3", b"", bad, b"0", b"", b"", b"", b"9"],
            )
            for bad in NO_IDS
        ),
        *(
            ("ff_describe_attempt", b"OK", [[b"last_id", bad], b"0", b"0", b"0", b"", [], []])
            for bad in NO_IDS
        ),
    ):
        with subtests.test(f"{name!r:.60}"), pytest.raises((ProtocolError, Corruption)):
            CALLS[name][0].answer([1, status, *fields])


def test_a_description_holds_no_lease():
    described = CALLS["ff_describe_execution"][0].answer([1, b"OK", *DESCRIBED])
    assert LEASE not in f"{described!r} {dataclasses.asdict(described)}"


def test_of_a_suspension_that_is_over_nothing_is_described():
    core, *rest = DESCRIBED
    active = [b"active" if word == b"suspended" else word for word in core]
    described = CALLS["ff_describe_execution"][0].answer([1, b"OK", active, *rest])
    assert described.suspension is None
    assert described.retries_left == 2


def test_a_claim_answers_with_a_handle_and_what_stays():
    op = CALLS["ff_claim"][0]
    fields = [EID.encode(), b"3", b"attempt-1", b"4", b"99", b"fresh", b"-7"]
    assert HEADERS["ff_claim"].accepts("returns", len(fields))
    answer = op.answer([1, b"OK", *fields])
    assert answer == (HANDLE, b"-7", False)
    assert op.answer([1, b"BEHIND", b"-7"]) == (None, b"-7", True)
    assert answer.handle.kind is HandleKind.FRESH
    assert op.answer([1, b"OK", *fields[:6], b""]).next_score is None
    resumed = op.answer([1, b"OK", *fields[:5], b"resumed", b""]).handle
    assert resumed == HANDLE.replace(kind=HandleKind.RESUMED)
    # An interrupted attempt keeps its id, whatever id the call brought.
    went_on = op.answer([1, b"OK", *fields[:2], b"attempt-0", *fields[3:]]).handle
    assert went_on.fields().attempt_id == "attempt-0"
    # When the lease ends is the server's to know: the handle does not say.
    for at in (0, 1, 2, 3, 5, 6):
        for bad in (None, 5):
            with pytest.raises((ProtocolError, Corruption)):
                op.answer([1, b"OK", *fields[:at], bad, *fields[at + 1 :]])
    assert op.answer([1, b"NONE", b"-7"]) == (None, b"-7", False)
    assert op.answer([1, b"NONE", b""]) == (None, None, False)


@pytest.mark.parametrize("name", CALLS)
def test_a_refusal_is_its_error(name, subtests):
    for code in [*CODES, "a_new_code"]:
        wanted = errors.for_code(code, DETAILS.get(code, []))
        with subtests.test(code):
            with pytest.raises(type(wanted)) as caught:
                CALLS[name][0].answer([0, code.encode(), *DETAILS.get(code, [])])
            assert str(caught.value) == str(wanted)


def test_an_error_reply_is_not_quoted(subtests):
    for name in CALLS:
        with subtests.test(f"{name!r:.60}"):
            op = CALLS[name][0]
            with pytest.raises(errors.FunctionMissing):
                op.answer(hiredis.ReplyError("ERR Function not found"))
            with pytest.raises(errors.InternalFunctionError) as caught:
                op.answer(hiredis.ReplyError("ERR s3cret payload script: x, on @user_function:1."))
            assert "s3cret" not in repr(caught.value) + str(caught.value)
