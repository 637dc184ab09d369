"""What is sent to each Lua function, and how its answers are read, against what the Lua headers declare."""

import re

import hiredis
import pytest

from ff_fast import _library, errors, keys, ops
from ff_fast._hot.writer import WriterCore
from ff_fast.errors import Corruption, Outcome, ProtocolError
from ff_fast.types import (
    FailOutcome,
    FailureClass,
    FailureReason,
    Handle,
    HandleKind,
    LeaseRenewal,
    StreamMode,
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
}
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
            "key_prefix": b"ff:exec:{fp:86}:",
            "attempt_prefix": b"ff:attempt:{fp:86}:",
            "stream_prefix": b"ff:stream:{fp:86}:",
            "worker_id": b"w",
            "worker_instance_id": b"worker-1",
            "lease_id": LEASE.encode(),
            "lease_ttl_ms": b"30000",
            "attempt_id": b"attempt-1",
            "offset": b"9",
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
    "ff_open_writer": (ops.open_writer(ATTEMPT, "writer"), {**FENCE, "writer": b"writer"}, []),
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
    "ff_read_payload": (ops.read_payload(ATTEMPT), {}, []),
}


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
    assert op.keys == tuple(KEYS[key] for key in header.keys)
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
    assert [name for name, (op, _, _) in CALLS.items() if not op.repeatable] == ["ff_claim"]


def test_an_append_is_what_its_header_names():
    header = HEADERS["ff_append"]
    writer = WriterCore(
        keys=tuple(KEYS[key] for key in header.keys),
        fence=(*FENCE.values(), b"writer"),
        mode=StreamMode.durable(),
        opened=tuple(ops.Opened(6, 0, 0, b"", 0)),
    )
    writer.write(b"payload")
    command, function, count, *rest = parsed(writer.next_batch().message)
    assert (command, function, count) == (b"FCALL", b"ff_append", b"5")
    assert rest[:5] == list(ATTEMPT.stream_keys) == [KEYS[key] for key in header.keys]
    arguments = {**FENCE, "writer": b"writer", "first_sequence": b"7"}
    assert header.args == tuple(arguments)
    assert rest[5:10] == list(arguments.values())
    assert rest[10] == b"L"
    assert header.accepts("args", len(rest) - 5)


# -- errors ------------------------------------------------------------------------------------------

DETAILS = {
    "payload_too_large": [b"65536", b"65537"],
    "sequence_gap": [b"3", b"5"],
    "summary_conflict": [b"1", b"2"],
    "execution_not_active": [b"completed"],
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
    assert raised <= (set(CODES) if part == "prelude" else declared)


def test_codes_that_are_declared_are_raised():
    raised = {match[1] for text in PARTS.values() for match in RAISED.finditer(text)}
    assert raised == set(CODES)


def test_details_are_as_many_as_the_class_takes():
    for text in PARTS.values():
        for match in RAISED.finditer(text):
            code, details = match[1], len(re.findall(r", ", match[2]))
            assert details == len(DETAILS.get(code, [])), match[0]


# -- answers -----------------------------------------------------------------------------------------

ANSWERS = {
    "ff_version": ([b"1", b"abc"], (1, "abc")),
    "ff_create_execution": ([b"-5"], b"-5"),
    "ff_renew_lease": ([b"99", b"4"], LeaseRenewal(99, 4)),
    "ff_complete_execution": ([b"completed"], None),
    "ff_fail_execution": ([b"failed"], FailOutcome.TERMINAL_FAILED),
    "ff_open_writer": ([b"7", b"8", b"6", b"1.5", b"2"], ops.Opened(7, 8, 6, b"1.5", 2)),
    "ff_read_range": (
        [[], b"1-2", b"1", [], b"1-3", b"", b"7", b"8", b"6", b"expired", b"50"],
        ops.Range([], b"1-2", True, [], b"1-3", False, 7, 8, 6, "expired", 50),
    ),
    "ff_read_summary": ([[b"version", b"1"]], {b"version": b"1"}),
    "ff_describe_execution": (
        [b"state", b"active", b"current_lease_id", LEASE.encode()],
        {"state": "active"},
    ),
    "ff_read_payload": ([b"\x00\xff"], b"\x00\xff"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_an_answer_of_the_declared_form_is_read(name):
    fields, value = ANSWERS[name]
    if name != "ff_read_summary":
        assert HEADERS[name].accepts("returns", len(fields))
    assert CALLS[name][0].answer([1, b"OK", *fields]) == value


@pytest.mark.parametrize(
    "name", sorted(set(ANSWERS) - {"ff_complete_execution", "ff_fail_execution"})
)
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
        [1, b"OK", None, *fields[1:]],
    ]
    if len(fields) > 1 or name == "ff_read_summary":
        bad.append([1, b"OK", *fields[:-1]])
    for reply in bad:
        with pytest.raises((ProtocolError, Corruption)):
            op.answer(reply)


def test_a_claim_answers_with_a_handle_or_with_where_to_go_on():
    op = CALLS["ff_claim"][0]
    fields = [EID.encode(), b"3", b"4", b"99", b"-7"]
    assert HEADERS["ff_claim"].accepts("returns", len(fields))
    answer = op.answer([1, b"OK", *fields])
    assert answer == (HANDLE, None, b"-7")
    assert answer.handle.kind is HandleKind.FRESH
    assert op.answer([1, b"OK", *fields[:4], b""]).next_score is None
    assert op.answer([1, b"NONE", b"64", b"-7"]) == (None, 64, b"-7")
    assert op.answer([1, b"NONE", b"", b""]) == (None, None, None)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("code", [*CODES, "a_new_code"])
def test_a_refusal_is_its_error(name, code):
    wanted = errors.for_code(code, DETAILS.get(code, []))
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
