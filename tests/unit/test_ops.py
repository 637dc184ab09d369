"""What is sent to each Lua function, and how its answers are read, against what the Lua headers declare."""

import re

import hiredis
import pytest

from ff_fast import _library, errors, keys
from ff_fast._core import ops
from ff_fast._hot.writer import WriterCore
from ff_fast.errors import Corruption, Outcome, ProtocolError
from ff_fast.types import (
    CancelFlowPolicy,
    CancelOutcome,
    CountKind,
    ExecutionDescription,
    FailOutcome,
    FailureClass,
    FailureReason,
    FlowDescription,
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
    StreamDescription,
    StreamMode,
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
HANDLE = Handle.encode(
    execution_id=EID,
    attempt_index=INDEX,
    attempt_id="attempt-1",
    lease_id=LEASE,
    lease_epoch=4,
    lease_ttl_ms=30_000,
    lane_id="lane 1",
    worker_instance_id="worker-1",
)
ATTEMPT = ops.Attempt.of(HANDLE)
FLOW = "99999999-2222-4333-8444-555555555555"
PARENT = "{fp:86}:660e8400-e29b-41d4-a716-446655440000"
WAITPOINT = "77777777-2222-4333-8444-555555555555"
SIGNAL_ID = "88888888-2222-4333-8444-555555555555"
TOKENS = [f"k1:{digit * 40}" for digit in "abc"]
SECRET = "5e" * 32
WRITER = b"3:" + LEASE.encode() + b":4:w"
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
    "meta": keys.meta(EID, INDEX),
    "summary": keys.summary(EID, INDEX),
    "attempt": keys.attempt(EID, INDEX),
    "eligible": keys.eligible("{fp:86}", "lane 1"),
    "usage": keys.usage(EID),
    "history": keys.history(EID),
    "timers": keys.timers("{fp:86}"),
    "ring": keys.waitpoint_secrets("{fp:86}"),
    "flow": keys.flow("{fp:86}", FLOW),
    "members": keys.flow_members("{fp:86}", FLOW),
    "open": keys.flow_open("{fp:86}", FLOW),
    "limits": keys.budget_limits("b-1"),
    "dedup": keys.budget_dedup("b-1", f"{EID}:report-1"),
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
            retry=RetryPolicy(3, RetryBackoff.FIXED, 100, 1.255, 5_000, 15, 7),
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
            worker_id="w",
            worker_instance_id="worker-1",
            lease_id=LEASE,
            lease_ttl_ms=30_000,
            attempt_id="attempt-1",
            capabilities=("a", "b"),
            offset=9,
        ),
        {
            "core_prefix": b"ff:exec:{fp:86}:",
            "worker_id": b"w",
            "worker_instance_id": b"worker-1",
            "lease_id": LEASE.encode(),
            "lease_ttl_ms": b"30000",
            "attempt_id": b"attempt-1",
            "offset": b"9",
        },
        [b"a", b"b"],
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
        ops.complete_execution(ATTEMPT, b"r\x00"),
        {**FENCE, "payload": b"r\x00"},
        [],
    ),
    "ff_fail_execution": (
        ops.fail_execution(ATTEMPT, FailureReason("why", b"\xff"), FailureClass.TIMEOUT),
        {**FENCE, "message": b"why", "failure_class": b"timeout", "detail": b"\xff"},
        [],
    ),
    "ff_report_progress": (
        ops.report_progress(ATTEMPT, 42, "half ż"),
        {**FENCE, "percent": b"42", "message": "half ż".encode()},
        [],
    ),
    "ff_delay_execution": (
        ops.delay_execution(ATTEMPT, 500),
        {**FENCE, "delay_ms": b"500"},
        [],
    ),
    "ff_wait_children": (ops.wait_children(ATTEMPT), FENCE, []),
    "ff_cancel_execution": (
        ops.cancel_execution(EID, "why ż", 700),
        {"reason": "why ż".encode(), "grace_ms": b"700"},
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
            "suspension_id": b"s-1",
            "timeout_ms": b"800",
            "timeout_behavior": b"escalate",
            "reason": b"why",
            "node_count": b"2",
        },
        [
            *(b"-1", b"2", b"leaf"),
            *(b"0", b"1", b"source"),
            b"3",
            *(b"0", TOKENS[0].encode(), b"signal_name", b"m0"),
            *(b"1", TOKENS[1].encode(), b"correlation_id", b"m1"),
            *(b"1", TOKENS[2].encode(), b"external", b"m2"),
        ],
    ),
    "ff_deliver_signal": (
        ops.deliver_signal(
            EID, PendingWaitpoint(WAITPOINT, WaitpointHmac(TOKENS[0])), SIGNAL, "once"
        ),
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
    "ff_observe_signals": (ops.observe_signals(ATTEMPT), FENCE, []),
    "ff_report_usage": (
        ops.report_usage(ATTEMPT, USAGE, "report-1", apply=True),
        {**FENCE, "phase": b"apply", "dedup_key": b"report-1"},
        AMOUNTS,
    ),
    "ff_create_budget": (
        ops.create_budget("b-1", {"input_tokens": 5}, {"calls": 0}),
        {},
        [b"hard:input_tokens", b"5", b"soft:calls", b"0"],
    ),
    "ff_charge_budget": (
        ops.charge_budget("b-1", f"{EID}:report-1", USAGE, 60),
        {"dedup_ttl_ms": b"60"},
        AMOUNTS,
    ),
    "ff_release_charge": (ops.release_charge("b-1", f"{EID}:report-1"), {}, []),
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
        ops.fire_timer("{fp:86}", b"waitpoint:x", "waitpoint", EID, WAITPOINT, SCOPE),
        {
            "member": b"waitpoint:x",
            "kind": b"waitpoint",
            "more": WAITPOINT.encode(),
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
    "ff_read_tags": (ops.read_tags(EID), {}, []),
    "ff_open_writer": (ops.open_writer(ATTEMPT, WRITER), {"writer": WRITER}, []),
    "ff_read_range": (
        ops.read_range(
            EID,
            INDEX,
            log_after=b"1-2",
            live_after=b"1-3",
            count=10,
            max_bytes=20,
            visibility="exclude_best_effort",
        ),
        {
            "attempt_index": b"3",
            "log_after": b"1-2",
            "live_after": b"1-3",
            "count": b"10",
            "max_bytes": b"20",
            "visibility": b"exclude_best_effort",
        },
        [],
    ),
    "ff_read_summary": (ops.read_summary(EID, INDEX), {}, []),
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
        ops.deliver_signal(
            EID,
            PendingWaitpoint(WAITPOINT, WaitpointHmac(TOKENS[0])),
            SIGNAL.replace(payload=None),
            "",
        ),
        9,
        b"0",
    ),
    (
        ops.deliver_signal(
            EID,
            PendingWaitpoint(WAITPOINT, WaitpointHmac(TOKENS[0])),
            SIGNAL.replace(payload=b""),
            "",
        ),
        9,
        b"1",
    ),
    (ops.fire_timer("{fp:86}", b"m", "lease", EID, "", ScannerFilter.NOOP), 3, b""),
    (ops.fire_timer("{fp:86}", b"m", "lease", EID, "", ScannerFilter.NOOP), 4, b""),
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


def test_a_report_without_an_amount_names_none():
    usage = UsageDimensions(0, 0, 0, {"calls": 0})
    assert ops.report_usage(ATTEMPT, usage, "k", apply=True).argv[5:] == ()


def test_a_writer_id_is_the_fence_and_a_text_of_its_own():
    made = {ops.writer_id(ATTEMPT) for _ in range(50)}
    assert len(made) == 50
    for writer in made:
        assert re.fullmatch(rb"3:" + LEASE.encode() + rb":4:[0-9a-f-]{8,}", writer)


def parsed(request):
    reader = hiredis.Reader()
    reader.feed(request)
    parts = reader.gets()
    assert reader.gets() is False
    return parts


def test_every_function_is_called_by_somebody():
    # The writer's core packs ff_append by itself: it is the hot path.
    assert sorted([*CALLS, "ff_append"]) == sorted(HEADERS)


@pytest.mark.parametrize("name", CALLS)
def test_keys_and_arguments_are_those_that_the_header_names(name):
    op, arguments, repeated = CALLS[name]
    header = HEADERS[name]
    assert op.function == name.encode()
    assert op.keys == keys_of(name)
    assert tuple(arguments) == header.args
    assert op.argv == (*arguments.values(), *repeated)
    assert header.accepts("keys", len(op.keys))
    assert header.accepts("args", len(op.argv))
    # One slot a call, or a cluster refuses it.
    assert len({keys.key_slot(key) for key in op.keys}) <= 1


@pytest.mark.parametrize("name", CALLS)
def test_the_request_is_the_call(name):
    op, _, _ = CALLS[name]
    command, function, count, *rest = parsed(op.request())
    assert command == (b"FCALL_RO" if op.read_only else b"FCALL")
    assert (function, count) == (name.encode(), b"%d" % len(op.keys))
    assert rest == [*op.keys, *op.argv]


@pytest.mark.parametrize("name", CALLS)
def test_read_only_calls_are_those_of_functions_without_writes(name):
    (registered,) = [
        match[2]
        for text in PARTS.values()
        for match in re.finditer(
            r"register_function\(\{?\s*(?:function_name = )?'(\w+)'(.*?)\n(?:end\)|\}\))",
            text,
            re.DOTALL,
        )
        if match[1] == name
    ]
    assert CALLS[name][0].read_only == ("'no-writes'" in registered)


def test_only_a_claim_may_not_be_repeated():
    assert [name for name, (op, _, _) in CALLS.items() if not op.repeatable] == [
        "ff_claim",
        "ff_claim_execution",
    ]


@pytest.mark.parametrize(
    "mode, names, letter",
    [
        (StreamMode.durable(), "meta log", b"L"),
        (StreamMode.best_effort_live(5_000), "meta live", b"V"),
        (StreamMode.durable_summary(), "meta log live summary", b"S"),
    ],
)
def test_an_append_is_what_its_header_names(mode, names, letter):
    header = HEADERS["ff_append"]
    # Its stream is the log, or the live window where the batch has to do with nothing else.
    named_keys = (*header.keys, *header.tails.get("keys", ()))
    assert named_keys == ("meta", "stream", "live", "summary")
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
    assert writer.acknowledge(writer.next_batch(), b"1-6 1 2 0") is None
    writer.write(b"{}")
    command, function, named, *rest = parsed(writer.next_batch().message)
    # Those that the batch needs: each key costs the server time.
    wanted = [KEYS[name] for name in names.split()]
    count = len(wanted)
    assert (command, function, named) == (b"FCALL", b"ff_append", b"%d" % count)
    assert rest[:count] == wanted
    arguments = {"writer": WRITER, "previous_sequence": b"6"}
    assert header.args == tuple(arguments)
    assert rest[count : count + 2] == list(arguments.values())
    assert rest[count + 2] == letter
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


@pytest.mark.parametrize("code", CODES)
def test_each_code_has_a_class_of_its_own(code):
    error = errors.for_code(code, DETAILS.get(code, []))
    assert type(error).__dict__["code"] == code == error.code
    assert type(error) is not errors.ProtocolError
    assert error.outcome is Outcome.NOT_APPLIED
    of_code = [each for each in _subclasses(errors.FFError) if each.__dict__.get("code") == code]
    assert of_code == [type(error)]


def _subclasses(cls):
    for each in cls.__subclasses__():
        yield each
        yield from _subclasses(each)


@pytest.mark.parametrize("part", PARTS)
def test_codes_that_are_raised_are_declared(part):
    raised = {match[1] for match in RAISED.finditer(PARTS[part])}
    calls = PARTS[part].replace("function ff.err(", "").count("ff.err(")
    assert calls == len(RAISED.findall(PARTS[part]))
    declared = {
        code
        for header in _library._parse_headers(part, PARTS[part]).values()
        for code in header.errors
    }
    assert raised <= (set(CODES) if part in ("prelude", "state") else declared)


def bodies():
    """What stands between the header of a function and the end of its registration, by its name."""
    found = {}
    for text in PARTS.values():
        for match in re.finditer(
            r"register_function\(\{?\s*(?:function_name = )?'(\w+)'(.*?)\n(?:end\)|\}\))",
            text,
            re.DOTALL,
        ):
            found[match[1]] = match[2]
    return found


BODIES = bodies()
OWNED = {"execution_not_found", "stale_owner", "suspended", "execution_not_active", "lease_expired"}


def test_every_function_has_a_body():
    assert sorted(BODIES) == sorted(HEADERS)


@pytest.mark.parametrize("name", BODIES)
def test_a_function_declares_what_it_answers(name):
    body = BODIES[name]
    wanted = {match[1] for match in RAISED.finditer(body)}
    if re.search(r"ff\.owned\(|giving_up\(", body):
        wanted |= OWNED
    if re.search(r"[^.\w]refusal\(", body):
        ((refusal,),) = [
            re.findall(r"\nlocal function refusal\(.*?\nend\n", text, re.DOTALL)
            for text in PARTS.values()
            if "local function refusal(" in text
        ]
        wanted |= {match[1] for match in RAISED.finditer(refusal)}
        if name == "ff_open_writer":
            # Which opening a writer ends.
            wanted -= {"writer_superseded"}
    assert set(HEADERS[name].errors) == wanted


@pytest.mark.parametrize("name", BODIES)
def test_a_function_uses_the_keys_and_arguments_that_it_declares(name):
    header, body = HEADERS[name], BODIES[name]
    for field, declared in (("keys", header.keys), ("args", header.args)):
        used = [int(at) for at in re.findall(rf"\b{field}\[(\d+)\]", body)]
        tail = header.tails.get(field, ())
        assert max(used, default=0) <= len(declared) + 2 * len(tail)


def test_codes_that_are_declared_are_raised():
    raised = {match[1] for text in PARTS.values() for match in RAISED.finditer(text)}
    assert raised == set(CODES)


def test_details_are_as_many_as_the_class_takes():
    for text in PARTS.values():
        for match in RAISED.finditer(text):
            code, details = match[1], len(re.findall(r", ", match[2]))
            assert details == len(DETAILS.get(code, [])), match[0]


# -- answers -----------------------------------------------------------------------------------------

HINTS = [b"lane 1", b"-5", b"other", b"7"]
HINTED = [("lane 1", b"-5"), ("other", b"7")]
DESCRIBED = [
    [
        *(b"state", b"active", b"current_lease_id", LEASE.encode(), b"priority", b"7"),
        *(b"released_lease", b"0 " + LEASE.encode() + b" 1"),
    ],
    [b"a.b", "ż".encode()],
    [b"calls", b"2"],
    [
        [b"20-1", [b"from", b"waiting", b"to", b"active"]],
        [b"10-0", [b"from", b"delayed", b"to", b"waiting"]],
    ],
]
STORED_SIGNAL = [
    *(b"signal_id", SIGNAL_ID.encode(), b"signal_name", b"go", b"signal_category", b"cat"),
    *(b"source_type", b"user", b"source_identity", b"ada", b"correlation_id", b"c-1"),
    *(b"accepted_at", b"5", b"waitpoint_id", WAITPOINT.encode(), b"payload", b"\x00p"),
]
ANSWERS = {
    "ff_version": ([b"1", b"abc"], (1, "abc")),
    "ff_create_execution": ([b"lane 1", b"-5"], (None, [("lane 1", b"-5")])),
    "ff_claim_execution": (
        [EID.encode(), b"3", b"attempt-1", b"4", b"99", b"resumed"],
        HANDLE.replace(kind=HandleKind.RESUMED),
    ),
    "ff_renew_lease": ([b"99", b"4", b"1"], LeaseRenewal(99, 4, cancel_requested=True)),
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
    "ff_observe_signals": ([[STORED_SIGNAL]], (SIGNAL.replace(accepted_at=5),)),
    "ff_report_usage": ([b"b-1 b-2"], ops.UsageCheck(False, ("b-1", "b-2"))),
    "ff_create_budget": ([], None),
    "ff_charge_budget": ([b"", b"0", b"0"], ReportUsageResult(UsageVerdict.OK)),
    "ff_release_charge": ([], None),
    "ff_create_flow": ([b"open"], "open"),
    "ff_cancel_flow": ([b"cancel_all", b"3"], (CancelFlowPolicy.CANCEL_ALL, 3)),
    "ff_cancel_members": ([b"2", b"1", *HINTS], ((2, 1), HINTED)),
    "ff_describe_flow": (
        [[b"state", b"open"], [b"b", b"a"], [b"a"]],
        FlowDescription(FLOW, "open", ("a", "b"), ("a",)),
    ),
    "ff_fire_timer": ([b"done", *HINTS], ("done", HINTED)),
    "ff_set_tags": ([b"2"], 2),
    "ff_read_tags": ([[b"a.b", "ż".encode()]], {"a.b": "ż"}),
    "ff_open_writer": ([b"7-8", b"6", b"1.5", b"2"], ops.Opened(7, 8, 6, b"1.5", 2)),
    "ff_read_range": (
        [[], b"1-2", b"1", [], b"1-3", b"", b"7-8", b"6", b"expired", b"50"],
        ops.Range([], b"1-2", True, [], b"1-3", False, 7, 8, 6, "expired", 50),
    ),
    "ff_read_summary": ([[b"version", b"1"]], {b"version": b"1"}),
    "ff_describe_execution": (
        DESCRIBED,
        ExecutionDescription(
            execution_id=EID,
            state="active",
            fields={"state": "active", "priority": "7"},
            tags={"a.b": "ż"},
            usage={"calls": 2},
            history=(
                {"at_ms": "10", "from": "delayed", "to": "waiting"},
                {"at_ms": "20", "from": "waiting", "to": "active"},
            ),
        ),
    ),
    "ff_describe_attempt": (
        [
            [b"last_id", b"9-7", b"closed_reason", b"expired"],
            *(b"5", b"2", b"1", b"80"),
        ],
        StreamDescription("9-7", 7, 5, 2, 1, "expired", 80),
    ),
    "ff_read_payload": ([b"\x00\xff"], b"\x00\xff"),
}
# Functions whose answer is one list, in place of the words that the header repeats.
ONE_LIST = ("ff_read_summary", "ff_read_tags", "ff_observe_signals")
# Those that answer with nothing that is read.
NOTHING_TO_READ = (
    "ff_report_progress",
    "ff_create_budget",
    "ff_charge_budget",
    "ff_release_charge",
)


def test_every_answer_is_read_here():
    assert sorted([*ANSWERS, "ff_append", "ff_claim"]) == sorted(HEADERS)


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_the_declared_form_is_read(name):
    fields, value = ANSWERS[name]
    if name not in ONE_LIST:
        assert HEADERS[name].accepts("returns", len(fields))
    assert CALLS[name][0].answer([1, b"OK", *fields]) == value


@pytest.mark.parametrize("name", sorted(set(ANSWERS) - set(NOTHING_TO_READ)))
def test_an_answer_of_another_form_is_not_understood(name):
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
    if len(fields) > 1 or name in ONE_LIST:
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


@pytest.mark.parametrize(
    "name, status, fields, value",
    [
        ("ff_create_execution", b"OK", [], (None, [])),
        ("ff_create_execution", b"DUPLICATE", [b"l", b"1"], (None, [("l", b"1")])),
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
        ("ff_observe_signals", b"OK", [[]], ()),
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
            "ff_describe_flow",
            b"OK",
            [[b"state", b"open"], [], []],
            FlowDescription(FLOW, "open", (), ()),
        ),
        (
            "ff_describe_attempt",
            b"OK",
            [[], b"0", b"0", b"0", b""],
            StreamDescription("0-0", 0, 0, 0, 0, None, None),
        ),
        # Claimed, and nothing written: the id of the claim is not one of a frame.
        (
            "ff_describe_attempt",
            b"OK",
            [[b"last_id", b"1700000000000-0"], b"0", b"0", b"0", b"80"],
            StreamDescription("0-0", 0, 0, 0, 0, None, 80),
        ),
        ("ff_read_tags", b"OK", [[]], {}),
        ("ff_fire_timer", b"OK", [b"later"], ("later", [])),
    ],
)
def test_further_answers(name, status, fields, value):
    if name not in ONE_LIST:
        assert HEADERS[name].accepts("returns", len(fields))
    assert CALLS[name][0].answer([1, status, *fields]) == value


NO_IDS = (b"", b"7", b"7-", b"-8", b"7-x", b"7-8-9")


@pytest.mark.parametrize(
    "name, status, fields",
    [
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
        ("ff_describe_flow", b"OK", [[], [], []]),
        ("ff_describe_flow", b"OK", [[b"state", b"open"], None, []]),
        ("ff_observe_signals", b"OK", [[[b"signal_id", b"x"]]]),
        ("ff_claim", b"NONE", [b"x", b""]),
        *(("ff_open_writer", b"OK", [bad, b"0", b"", b"0"]) for bad in NO_IDS),
        *(
            ("ff_read_range", b"OK", [[], b"1-2", b"", [], b"1-3", b"", bad, b"0", b"", b""])
            for bad in NO_IDS
        ),
        *(
            ("ff_describe_attempt", b"OK", [[b"last_id", bad], b"0", b"0", b"0", b""])
            for bad in NO_IDS
        ),
    ],
)
def test_a_half_understood_answer_is_none(name, status, fields):
    with pytest.raises((ProtocolError, Corruption)):
        CALLS[name][0].answer([1, status, *fields])


def test_a_description_holds_no_lease():
    described = CALLS["ff_describe_execution"][0].answer([1, b"OK", *DESCRIBED])
    assert LEASE not in f"{described!r} {described.fields} {described.history}"


def test_a_claim_answers_with_a_handle_or_with_where_to_go_on():
    op = CALLS["ff_claim"][0]
    fields = [EID.encode(), b"3", b"attempt-1", b"4", b"99", b"fresh", b"-7"]
    assert HEADERS["ff_claim"].accepts("returns", len(fields))
    answer = op.answer([1, b"OK", *fields])
    assert answer == (HANDLE, None, b"-7")
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
    assert op.answer([1, b"NONE", b"64", b"-7"]) == (None, 64, b"-7")
    assert op.answer([1, b"NONE", b"", b""]) == (None, None, None)


@pytest.mark.parametrize("name", CALLS)
def test_a_refusal_is_its_error(name, subtests):
    for code in [*CODES, "a_new_code"]:
        wanted = errors.for_code(code, DETAILS.get(code, []))
        with subtests.test(code):
            with pytest.raises(type(wanted)) as caught:
                CALLS[name][0].answer([0, code.encode(), *DETAILS.get(code, [])])
            assert str(caught.value) == str(wanted)


@pytest.mark.parametrize("name", CALLS)
def test_an_error_reply_is_not_quoted(name):
    op = CALLS[name][0]
    with pytest.raises(errors.FunctionMissing):
        op.answer(hiredis.ReplyError("ERR Function not found"))
    with pytest.raises(errors.InternalFunctionError) as caught:
        op.answer(hiredis.ReplyError("ERR secret payload script: x, on @user_function:1."))
    assert "secret" not in repr(caught.value) + str(caught.value)
