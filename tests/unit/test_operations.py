"""What each public operation refuses when it is called, before there is anything to send.

What it sends where it refuses nothing is held in ``test_ops.py``.
"""

import inspect
import math
from datetime import timedelta

import pytest

from ff_fast import keys
from ff_fast._core import operations
from ff_fast._core.deployment import Deployment
from ff_fast.errors import (
    InvalidCursor,
    InvalidHandle,
    InvalidId,
    InvalidInput,
    InvalidPayload,
    InvalidType,
    Outcome,
    PayloadTooLarge,
    Unavailable,
)
from ff_fast.types import (
    BackendTag,
    FailureClass,
    Frame,
    FrameKind,
    Handle,
    HandleKind,
    PendingWaitpoint,
    ReclaimGrant,
    ReclaimToken,
    ResumeCondition,
    StreamMode,
    UsageDimensions,
    WaitpointHmac,
    WaitpointKind,
    WaitpointSpec,
)

from .script import functions, run

ON = Deployment(4)
UUID = "550e8400-e29b-41d4-a716-446655440000"
EID = f"{{fp:1}}:{UUID}"
FLOW = next(f for f in iter(keys.new_uuid, None) if keys.flow_slot_tag(f, 4) == "{fp:2}")
TOKEN = WaitpointHmac(f"kid:{'a' * 40}")
HANDLE = Handle.encode(
    execution_id=EID,
    attempt_index=0,
    attempt_id="attempt-1",
    lease_id=UUID,
    lease_epoch=1,
    lease_ttl_ms=30_000,
    lane_id="lane",
    worker_instance_id="w-1",
)
SPEC = WaitpointSpec(kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=TOKEN)
GRANT = ReclaimGrant(
    execution_id=EID, partition_key="{fp:1}", grant_key="g", expires_at_ms=1, lane_id="lane"
)
MIB_16 = 16 << 20
YEAR_S = 31_536_000

# -- what many operations take ------------------------------------------------------------------------------------------

IDS = [
    ("", InvalidId),
    ("x", InvalidId),
    ("{fp:1}:nope", InvalidId),
    ("{fp:1}:*", InvalidId),
    (f"{{fp:70000}}:{UUID}", InvalidId),
    (f"{EID}\n", InvalidId),
    (b"{fp:1}:x", InvalidId),
    (7, InvalidType),
    (None, InvalidType),
]
UUIDS = [("", InvalidId), ("nope", InvalidId), (UUID.replace("-", ""), InvalidId), (7, InvalidType)]
LANES = [
    ("", InvalidId),
    ("é", InvalidId),
    ("a\n", InvalidId),
    ("a" * 65, InvalidId),
    (b"a", InvalidType),
]
OPAQUE = [("", InvalidId), ("k.1", InvalidId), ("k" * 65, InvalidId), (7, InvalidType)]
NAMES = [("", InvalidId), ("a\x00", InvalidId), ("x" * 257, InvalidId), (7, InvalidType)]
FOREIGN = [
    (None, InvalidType),
    ("handle", InvalidType),
    (b"\x02\x01\x01", InvalidType),
    (Handle(BackendTag.VALKEY, HandleKind.FRESH, b"\x02\x01\x01rest"), InvalidHandle),
]
DURATIONS = [
    (-1, InvalidInput),
    (math.nan, InvalidInput),
    (YEAR_S + 1, InvalidInput),
    (timedelta(days=366), InvalidInput),
    ("1", InvalidType),
    (True, InvalidType),
]
ABOVE_ZERO = [*DURATIONS, (0, InvalidInput), (0.0001, InvalidInput)]
TTLS = [
    (0, InvalidInput),
    (-1, InvalidInput),
    (2**48 + 1, InvalidInput),
    (timedelta(0), InvalidInput),
    (1.5, InvalidType),
    (True, InvalidType),
]
DOCUMENTS = [
    (7, InvalidType),
    (["x"], InvalidType),
    ("\ud800", InvalidPayload),
    (bytes(MIB_16 + 1), PayloadTooLarge),
    ("é" * (MIB_16 // 2 + 1), PayloadTooLarge),
]
CAPABILITIES = [(bad, InvalidType) for bad in (["gpu"], {"a": 1}, "gpu", b"gpu")]
TAGS = [
    ({"NoDot": "x"}, InvalidId),
    ({"ab": "x"}, InvalidId),
    ({"a.": "x"}, InvalidId),
    ({"a.b": "line\nbreak"}, InvalidId),
    ({"a.b": 1}, InvalidType),
    ({"a.b": None}, InvalidType),
    ({1: "x"}, InvalidType),
    ([("a.b", "x")], InvalidType),
]
ATTEMPTS = [(-1, InvalidInput), (2**32, InvalidInput), (1.0, InvalidType), ("0", InvalidType)]
CURSORS = [
    (bad, InvalidCursor)
    for bad in (
        "", "-1", "$", "+", "-", "+x", "end", "nonsense", "1", "1-", "-1-1", "1-1 ", "(1-1", "1-1-1", "x-1", "1-x",
        "1.0-1", "0x1-1", "99999999999999999999-1", "1-9007199254740992", 5, 1.5, b"1-1", (1, 1), True,
    )
]  # fmt: skip
SCOPES = [("everything", InvalidType), ({}, InvalidType)]
MODES = [("durable", InvalidType), (7, InvalidType)]


def line(limit=256, *, empty=False):
    """Text of at most *limit* bytes on one line."""
    bad = [
        ("a\nb", InvalidInput),
        ("\x00", InvalidInput),
        ("\ud800", InvalidInput),
        (7, InvalidType),
    ]
    bad.append(("x" * (limit + 1), InvalidInput))
    return bad if empty else [*bad, ("", InvalidInput)]


LEVELS = {
    "durability": [("synced", InvalidType), (1, InvalidType)],
    "durability_timeout": [*ABOVE_ZERO, (0.0005, InvalidInput)],
}

CLAIMER = {
    "worker_id": NAMES,
    "worker_instance_id": NAMES,
    "lease_ttl_ms": TTLS,
    "capabilities": CAPABILITIES,
}

# -- operation: arguments that it takes, and for each parameter what it refuses -------------------------------------------

WRITING = {
    "mode": MODES,
    "retention_maxlen": [
        (0, InvalidInput),
        (2**40 + 1, InvalidInput),
        (1.5, InvalidType),
    ],
    "max_unacknowledged_bytes": [
        (0, InvalidInput),
        ((1 << 16) - 1, InvalidInput),
        ((1 << 34) + 1, InvalidInput),
        ("1", InvalidType),
    ],
    "linger": [
        *DURATIONS,
        (1.001, InvalidInput),
        (timedelta(seconds=2), InvalidInput),
    ],
    **LEVELS,
}

STREAM_NAMES = [
    ("", InvalidId),
    ("a\x00", InvalidId),
    ("a\x85b", InvalidId),
    ("\ud800", InvalidId),
    ("é" * 257, InvalidId),
    (b"name", InvalidType),
    (None, InvalidType),
]

REFUSALS = {
    "create_execution": (
        {},
        {
            "lane": LANES,
            "payload": [*DOCUMENTS, (None, InvalidType)],
            "execution_id": IDS[:-1],
            "priority": [
                (-1, InvalidInput),
                (9001, InvalidInput),
                (1.5, InvalidType),
                (True, InvalidType),
            ],
            "required_capabilities": CAPABILITIES,
            "namespace": NAMES,
            "tags": TAGS,
            "retention": ABOVE_ZERO,
            "retry": [(3, InvalidType)],
            "delay": DURATIONS,
            "deadline": DURATIONS,
            "attempt_timeout": DURATIONS,
            "flow_id": UUIDS,
            "parent_id": IDS[:-1],
            "budgets": [([""], InvalidId), ([7], InvalidType)],
            "handler": [("", InvalidId), ("a b", InvalidId), ("a,b", InvalidId), ("a" * 65, InvalidId), (7, InvalidType)],
        },
    ),
    "describe": ({"execution_id": EID}, {"execution_id": IDS}),
    "claim": ({}, {"lane": LANES, **CLAIMER, "policy": [(5, InvalidType)]}),
    "read_payload": ({"handle": HANDLE}, {"handle": FOREIGN}),
    "renew": ({"handle": HANDLE}, {"handle": FOREIGN, "lease_ttl_ms": TTLS}),
    "complete": (
        {"handle": HANDLE},
        {
            "handle": FOREIGN,
            "payload": [*DOCUMENTS, (None, InvalidType)],
            "last_sequence": [(-1, InvalidInput), (2**53, InvalidInput), (1.5, InvalidType)],
            **LEVELS,
        },
    ),
    "fail": (
        {"handle": HANDLE, "reason": "why"},
        {
            "handle": FOREIGN,
            "reason": [(None, InvalidType), (b"x", InvalidType), ("\ud800", InvalidInput)],
            "failure_class": [("permanent", InvalidType), (None, InvalidType)],
            **LEVELS,
        },
    ),
    "cancel": (
        {"target": EID},
        {"target": [*IDS, FOREIGN[-1]], "reason": line(4096), "grace": DURATIONS, **LEVELS},
    ),
    "progress": (
        {"handle": HANDLE},
        {
            "handle": FOREIGN,
            "percent": [
                (-1, InvalidInput),
                (101, InvalidInput),
                (1.5, InvalidType),
                (True, InvalidType),
            ],
            "message": line(4096, empty=True),
        },
    ),
    "delay": ({"handle": HANDLE, "delay": 1}, {"handle": FOREIGN, "delay": DURATIONS}),
    "wait_children": ({"handle": HANDLE}, {"handle": FOREIGN}),
    "find_reclaimable": (
        {},
        {"limit": [(0, InvalidInput), (10_001, InvalidInput), (1.5, InvalidType)]},
    ),
    "claim_from_reclaim": (
        {"token": ReclaimToken(GRANT)},
        {"token": [(None, InvalidType), (GRANT, InvalidType)], **CLAIMER},
    ),
    "create_waitpoint": (
        {"handle": HANDLE},
        {"handle": FOREIGN, "waitpoint_id": UUIDS, "expires": ABOVE_ZERO},
    ),
    "suspend": (
        {"handle": HANDLE, "condition": SPEC},
        {
            "handle": FOREIGN,
            "condition": [
                (None, InvalidType),
                ("go", InvalidType),
                ([SPEC, None], InvalidType),
                ([], InvalidInput),
                ((), InvalidInput),
            ],
            "timeout": DURATIONS,
            "on_timeout": [("fail", InvalidType), (None, InvalidType)],
            "reason": line(),
            **LEVELS,
        },
    ),
    "deliver_signal": (
        {
            "execution_id": EID,
            "waitpoint": PendingWaitpoint(waitpoint_id=UUID, hmac_token=TOKEN),
            "signal_name": "go",
        },
        {
            "execution_id": IDS,
            "waitpoint": [(None, InvalidType), (TOKEN, InvalidType)],
            "signal_name": line(),
            "payload": [
                (7, InvalidType),
                ("\ud800", InvalidPayload),
                (bytes(65_537), PayloadTooLarge),
            ],
            "signal_id": UUIDS,
            "idempotency_key": line(empty=True),
            "correlation_id": line(empty=True),
            "category": line(empty=True),
            "source_type": line(empty=True),
            "source_identity": line(empty=True),
        },
    ),
    "observe_signals": ({"handle": HANDLE}, {"handle": FOREIGN}),
    "rotate_waitpoint_secret": (
        {"kid": "k", "secret": bytes(32)},
        {
            "kid": OPAQUE,
            "secret": [
                (bytes(31), InvalidInput),
                (bytes(33), InvalidInput),
                ("x" * 32, InvalidType),
                (None, InvalidType),
            ],
            "grace": DURATIONS,
        },
    ),
    "report_usage": (
        {"handle": HANDLE, "usage": UsageDimensions(input_tokens=1)},
        {"handle": FOREIGN, "usage": [(None, InvalidType), ({"input_tokens": 1}, InvalidType)]},
    ),
    "create_budget": (
        {"budget_id": "b", "hard": {"calls": 1}},
        {
            "budget_id": OPAQUE,
            "hard": [
                (None, InvalidInput),
                ({}, InvalidInput),
                (["calls"], InvalidType),
                ({"": 1}, InvalidInput),
                ({"x" * 129: 1}, InvalidInput),
                ({1: 1}, InvalidType),
                ({"calls": -1}, InvalidInput),
                ({"calls": 2**53}, InvalidInput),
                ({"calls": 1.5}, InvalidType),
            ],
            "soft": [(7, InvalidType), ({"calls": True}, InvalidType)],
        },
    ),
    "create_flow": ({}, {"flow_id": UUIDS, "namespace": NAMES}),
    "cancel_flow": (
        {"flow_id": UUID},
        {
            "flow_id": [*UUIDS, (None, InvalidType)],
            "policy": [("cancel_all", InvalidType), (None, InvalidType)],
            "wait": [(5, InvalidType), (None, InvalidType)],
            "reason": line(4096),
        },
    ),
    "explain": ({"execution_id": EID}, {"execution_id": IDS}),
    "list_executions": (
        {},
        {
            # The empty text is for named streams.
            "lane": [each for each in LANES if each[0] != ""],
            "state": [("", InvalidInput), ("running", InvalidInput), (7, InvalidInput)],
            "namespace": NAMES,
            "tag": [
                ("a.b", InvalidType),
                (("a.b",), InvalidType),
                (("ab", "x"), InvalidId),
                (("a.b", 7), InvalidType),
            ],
            "after": [(bad, InvalidCursor) for bad in ("", "0-0", "1", f"1.{EID}", f"x.fp1-{UUID}", 7, b"1")],
            "count": [(0, InvalidInput), (1001, InvalidInput), (1.0, InvalidType)],
        },
    ),
    "list_lanes": ({}, {}),
    "list_workers": ({}, {}),
    "diagnose": ({}, {"role": [("", InvalidInput), ("root", InvalidInput), (7, InvalidInput)]}),
    "describe_flow": ({"flow_id": UUID}, {"flow_id": [*UUIDS, (None, InvalidType)]}),
    "execution_id_for": ({"name": "n"}, {"name": STREAM_NAMES, "namespace": NAMES}),
    "open_stream": (
        {"name": "n"},
        {
            # The deployment of these tests has four partitions.
            "name": [*STREAM_NAMES, (f"{{fp:4}}:{UUID}", InvalidId), (f"fp4-{UUID}", InvalidId)],
            "namespace": NAMES,
            "ttl": ABOVE_ZERO,
            "lease_ttl_ms": TTLS,
            "takeover": ABOVE_ZERO,
            "payload": [*DOCUMENTS, (None, InvalidType)],
            "tags": TAGS,
            **WRITING,
        },
    ),
    "delete_execution": (
        {"execution_id": EID},
        {"execution_id": IDS, "reason": [("", InvalidInput), ("a\nb", InvalidInput), (7, InvalidType)]},
    ),
    "set_tags": (
        {"execution_id": EID, "tags": {"a.b": "c"}},
        {"execution_id": IDS, "tags": [*TAGS, ({}, InvalidInput), (None, InvalidType)]},
    ),
    "get_tags": ({"execution_id": EID}, {"execution_id": IDS}),
    "read_result": ({"execution_id": EID}, {"execution_id": IDS}),
    "describe_stream": ({"execution_id": EID}, {"execution_id": IDS, "attempt_index": ATTEMPTS}),
    "read_stream": (
        {"execution_id": EID},
        {
            "execution_id": IDS,
            "attempt_index": ATTEMPTS,
            "after": CURSORS,
            "count": [
                (0, InvalidInput),
                (-1, InvalidInput),
                (10_001, InvalidInput),
                (1.0, InvalidType),
                ("5", InvalidType),
                (True, InvalidType),
            ],
            "max_bytes": [(0, InvalidInput), ((64 << 20) + 1, InvalidInput), (None, InvalidType)],
            "visibility": [("all", InvalidInput), (None, InvalidInput)],
        },
    ),
    "read_summary": ({"execution_id": EID}, {"execution_id": IDS, "attempt_index": ATTEMPTS}),
    "tail": (
        {"execution_id": EID},
        {
            "execution_id": IDS,
            "attempt_index": ATTEMPTS,
            "after": CURSORS,
            "visibility": [("all", InvalidInput), (None, InvalidInput)],
        },
    ),
    "follow": (
        {"execution_id": EID},
        {
            "execution_id": IDS,
            "after": [("1-1", InvalidCursor), (b"0.1-1", InvalidCursor), ("x.1-1", InvalidCursor)],
            "snapshot": [(1, InvalidType), (None, InvalidType)],
            "visibility": [("all", InvalidType), (None, InvalidType)],
        },
    ),
    "wait": ({"execution_id": EID}, {"execution_id": IDS, "timeout": DURATIONS}),
    "subscribe_completions": (
        {},
        {
            "scope": SCOPES,
            "after": [
                (bad, InvalidCursor)
                for bad in (
                    "", "now", "0", "1-", "1-2,", "1-2,3", "1-2,3:4", "1-2,4:1-1", "1-2,-1:1-1", "1-2\n", "١-٢", 7,
                    b"0-0",
                )
            ],
        },
    ),
    "open_writer": ({"handle": HANDLE}, {"handle": FOREIGN, **WRITING},
    ),
    "append_frame": (
        {"handle": HANDLE, "frame": Frame(b"x", FrameKind.STDOUT)},
        {
            "handle": FOREIGN,
            "frame": [(bad, InvalidType) for bad in (b"x", None, "x", 7)],
            "timeout": DURATIONS,
            **LEVELS,
        },
    ),
    "keep_lease": ({"handle": HANDLE}, {"handle": FOREIGN}),
    "supervise": ({}, {"scope": SCOPES, "interval": DURATIONS}),
    "stats": ({}, {}),
    "run_worker": (
        {},
        {
            "lane": LANES,
            **CLAIMER,
            "mode": MODES,
            "concurrency": [(0, InvalidInput), (10_001, InvalidInput), (1.5, InvalidType)],
            "on_cancel": [("cancel", InvalidType), (True, InvalidType)],
            "cancel_grace": DURATIONS,
            "supervise": [(None, InvalidType), (1, InvalidType), ("yes", InvalidType)],
            "until_idle": [(None, InvalidType), (1, InvalidType)],
            "drain_timeout": DURATIONS,
            **LEVELS,
        },
    ),
}  # fmt: skip
"""Every operation; a parameter without a row takes anything."""

ANYTHING = {"keep_lease": {"on_lost"}, "supervise": {"stop"}, "run_worker": {"stop"}}


def test_every_parameter_of_every_operation_has_its_refusals():
    declared = {
        name: set(list(inspect.signature(make).parameters)[1:]) - ANYTHING.get(name, set())
        for name, make in vars(operations).items()
        if inspect.isfunction(make)
        and make.__module__ == operations.__name__
        and not name.startswith("_")
    }
    assert {name: set(refused) for name, (_, refused) in REFUSALS.items()} == declared


@pytest.mark.parametrize("name", REFUSALS)
def test_what_an_operation_refuses(name, subtests):
    make = getattr(operations, name)
    good, refused = REFUSALS[name]
    make(ON, **good)
    for parameter, rows in refused.items():
        for value, error in rows:
            with subtests.test(f"{parameter}={value!r:.40}"):
                with pytest.raises(error) as caught:
                    make(ON, **{**good, parameter: value})
                # Of what a caller may catch, exactly this.
                assert type(caught.value) is error
                assert caught.value.outcome is Outcome.NOT_APPLIED
                assert not caught.value.retryable


def test_what_is_just_not_refused(subtests):
    for name, arguments in (
        ("create_execution", {"priority": 9000, "retention": timedelta(milliseconds=1)}),
        ("create_execution", {"payload": bytes(MIB_16), "lane": "a" * 64, "deadline": YEAR_S}),
        ("create_execution", {"execution_id": EID.upper().replace("FP", "fp"), "parent_id": EID}),
        ("claim", {"lease_ttl_ms": 1}),
        ("claim", {"lease_ttl_ms": timedelta(milliseconds=2**48)}),
        ("progress", {"handle": HANDLE, "percent": 100, "message": "x" * 4096}),
        ("suspend", {"handle": HANDLE, "condition": (SPEC, SPEC)}),
        ("suspend", {"handle": HANDLE, "condition": ResumeCondition.any(SPEC)}),
        ("cancel", {"target": HANDLE}),
        ("open_writer", {"handle": HANDLE, "linger": 1, "mode": StreamMode.durable_summary()}),
        ("find_reclaimable", {"limit": 10_000}),
        ("read_stream", {"execution_id": EID, "count": 10_000, "max_bytes": 64 << 20}),
        ("create_budget", {"budget_id": "b" * 64, "soft": {"calls": 2**53 - 1}}),
        ("run_worker", {"concurrency": 10_000}),
    ):
        with subtests.test(f"{name!r:.60}"):
            getattr(operations, name)(ON, **arguments)


def test_what_is_too_large_is_named_and_what_cannot_be_split_goes_elsewhere(subtests):
    for name, arguments, what in (
        ("create_execution", {"payload": bytes(MIB_16 + 1)}, "payload of an execution"),
        ("complete", {"handle": HANDLE, "payload": bytes(MIB_16 + 1)}, "result"),
        (
            "deliver_signal",
            {**REFUSALS["deliver_signal"][0], "payload": bytes(65_537)},
            "payload of a signal",
        ),
    ):
        with subtests.test(name), pytest.raises(PayloadTooLarge) as caught:
            getattr(operations, name)(ON, **arguments)
        assert caught.value.what == what
        assert str(caught.value) == (
            f"The {what} has {caught.value.size} bytes and the limit is {caught.value.limit}; "
            "store it elsewhere and pass a reference."
        )


def test_a_writer_has_the_payload_limit_of_its_backend_and_room_for_one_such_frame():
    on = Deployment(4, 1 << 20)
    assert operations.open_writer(on, HANDLE).options.max_payload_bytes == 1 << 20
    with pytest.raises(InvalidInput, match="max_unacknowledged_bytes"):
        operations.open_writer(on, HANDLE, max_unacknowledged_bytes=(1 << 20) - 1)
    operations.open_writer(on, HANDLE, max_unacknowledged_bytes=1 << 20)
    assert operations.open_writer(Deployment(4, 1), HANDLE).options.max_payload_bytes == 1


# -- partitions ---------------------------------------------------------------------------------------------------------


def test_a_member_is_in_the_partition_of_its_flow():
    with pytest.raises(InvalidInput, match="flow's partition"):
        operations.create_execution(ON, execution_id=EID, flow_id=FLOW)
    with pytest.raises(InvalidInput, match="flow's partition"):
        operations.create_execution(ON, parent_id=EID, flow_id=FLOW)


def test_a_child_is_in_the_partition_of_its_parent():
    with pytest.raises(InvalidInput, match="parent's partition"):
        operations.create_execution(ON, execution_id=f"{{fp:2}}:{UUID}", parent_id=EID)


@pytest.mark.parametrize(
    "arguments, slot_tag", [({"flow_id": FLOW}, b"{fp:2}"), ({"parent_id": EID}, b"{fp:1}")]
)
def test_an_id_that_is_made_is_in_the_right_partition(arguments, slot_tag):
    for _ in range(8):
        step = next(operations.create_execution(ON, **arguments).steps())
        assert slot_tag in step.commands[0].key


# -- what the shell is told about a call ------------------------------------------------------------------------------------


def test_what_takes_long_has_a_connection_of_its_own():
    assert operations.supervise(ON).round.own_connection


@pytest.mark.parametrize(
    "call",
    [
        operations.complete(ON, HANDLE),
        operations.fail(ON, HANDLE, "why", FailureClass.TRANSIENT),
        operations.delay(ON, HANDLE, 1),
        operations.wait_children(ON, HANDLE),
    ],
)
def test_what_ends_the_lease_says_which(call):
    assert call.released_lease(None) == UUID


def test_a_suspension_that_is_not_needed_releases_nothing():
    call = operations.suspend(ON, HANDLE, SPEC)
    outcome = operations.SuspendOutcome(UUID, HANDLE, already_satisfied=True)
    assert call.released_lease(outcome) is None
    outcome = operations.SuspendOutcome(UUID, HANDLE, already_satisfied=False)
    assert call.released_lease(outcome) == UUID
    assert operations.renew(ON, HANDLE).released_lease(None) is None


def test_a_worker_is_named_after_its_process(monkeypatch):
    monkeypatch.setattr(operations.socket, "gethostname", lambda: "host")
    monkeypatch.setattr(operations.os, "getpid", lambda: 7)
    assert operations._claimer("w", None, 1_000, None)[1] == "host-7"
    assert operations._claimer("w", "mine", 1_000, None)[1] == "mine"


# -- what they make of the answers ----------------------------------------------------------------------------------------

OK = [1, b"OK"]


def test_a_creation_tells_the_lane_and_answers_its_id():
    call = operations.create_execution(ON, execution_id=EID, lane="lane")
    asked, value = run(call.steps(), [[*OK, b"lane", b"", b"-5"], 1, 1, 1])
    assert value == EID
    assert functions(asked) == ["ff_create_execution", "ZADD", "HSET", "PEXPIRE"]


def test_a_retry_of_a_creation_sends_the_same():
    call = operations.create_execution(ON)
    first, second = next(call.steps()), next(call.steps())
    assert first == second


@pytest.mark.parametrize("status, satisfied", [(b"OK", False), (b"ALREADY_SATISFIED", True)])
def test_a_suspension_answers_which_handle_goes_on(status, satisfied):
    call = operations.suspend(ON, HANDLE, SPEC)
    _, outcome = run(call.steps(), [[1, status, b"suspended", b"s-1"]])
    assert (outcome.suspension_id, outcome.already_satisfied) == ("s-1", satisfied)
    assert outcome.handle.kind is (HandleKind.FRESH if satisfied else HandleKind.SUSPENDED)


def test_a_suspension_that_ends_between_two_pages_of_signals_is_unknown():
    replies = [[1, b"MORE", b"suspended", b"s-1"], Unavailable()]
    _, error = run(operations.suspend(ON, HANDLE, SPEC).steps(), replies)
    assert (error.code, error.outcome) == ("unavailable", Outcome.UNKNOWN)


def test_a_key_of_waitpoints_goes_to_every_partition():
    call = operations.rotate_waitpoint_secret(ON, "k", bytes(32))
    asked, value = run(call.steps(), [[*OK, b""]] * 4)
    assert value is None
    assert [words[3] for words in asked] == [
        keys.waitpoint_secrets(keys.slot_tag(index)) for index in range(4)
    ]


def test_a_refusal_of_one_partition_is_told():
    call = operations.rotate_waitpoint_secret(ON, "k", bytes(32))
    refused = [0, b"rotation_conflict", b""]
    _, value = run(call.steps(), [[*OK, b""], refused, [*OK, b""], [*OK, b""]])
    assert value.code == "rotation_conflict"


def test_a_flow_answers_its_id():
    assert run(operations.create_flow(ON, UUID).steps(), [[*OK, b"open"]])[1] == UUID
    made = operations.create_flow(ON)
    assert run(made.steps(), [[*OK, b"open"]])[1] == run(made.steps(), [[*OK, b"open"]])[1]


def test_no_summary_is_none():
    assert run(operations.read_summary(ON, EID).steps(), [[*OK, []]])[1] is None
