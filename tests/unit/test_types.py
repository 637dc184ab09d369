"""``ff_fast.types``: defaults, invariants, builders, wire tokens, the handle's bytes, and secrecy."""

import ast
import copy
import dataclasses
import datetime
import inspect
import logging
import pickle
import pprint
import re
import site
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

import ff_fast
from ff_fast import _library, types
from ff_fast.errors import (
    FFError,
    HandleFromOtherBackend,
    InvalidCapabilities,
    InvalidCursor,
    InvalidHandle,
    InvalidId,
    InvalidInput,
    InvalidPayload,
    InvalidSequence,
    InvalidType,
    PayloadTooLarge,
)
from ff_fast.types import (
    AppendFrameOutcome,
    BackendConfig,
    BackendRetry,
    BackendTag,
    BackendTimeouts,
    BestEffortLiveConfig,
    CancelFlowOutcome,
    CancelFlowPolicy,
    CancelFlowWait,
    CancelOutcome,
    CapabilitySet,
    ClaimPolicy,
    CompletionPayload,
    CountKind,
    End,
    ExecutionDescription,
    FailOutcome,
    FailureClass,
    FailureReason,
    FlowDescription,
    Frame,
    FrameKind,
    Gap,
    Handle,
    HandleKind,
    HandleOpaque,
    LeaseRenewal,
    Namespace,
    PatchKind,
    PendingWaitpoint,
    ReclaimGrant,
    ReclaimToken,
    ReportUsageResult,
    ResumeCondition,
    ResumeSignal,
    RetryBackoff,
    RetryPolicy,
    ScannerFilter,
    SignalOutcome,
    StateTransition,
    StreamCursor,
    StreamDescription,
    StreamMode,
    SummaryDocument,
    SuspendOutcome,
    SuspensionDescription,
    TailVisibility,
    TimeoutBehavior,
    UsageDimensions,
    UsageVerdict,
    ValkeyConnection,
    WaitpointHmac,
    WaitpointKind,
    WaitpointSpec,
    parse_cursor,
)

EID = "{fp:86}:550e8400-e29b-41d4-a716-446655440000"
UUID = "550e8400-e29b-41d4-a716-446655440000"
LEASE = "22222222-2222-4222-8222-222222222222"
TOKEN = "kid1:" + "ab" * 20
CANARY = "s3cr3t-canary"
LIVE = BestEffortLiveConfig(15_000)

HANDLE = {
    "execution_id": EID,
    "attempt_index": 3,
    "attempt_id": "11111111-1111-4111-8111-111111111111",
    "lease_id": LEASE,
    "lease_epoch": 7,
    "lease_ttl_ms": 30_000,
    "lane_id": "default",
    "worker_instance_id": "worker-1",
}
# The fields above in FlowFabric's layout of a handle, version 2.
VECTOR = bytes.fromhex(
    "0201012c0000007b66703a38367d3a35353065383430302d653239622d343164342d613731362d34343636353534"
    "3430303030030000002400000031313131313131312d313131312d343131312d383131312d313131313131313131"
    "3131312400000032323232323232322d323232322d343232322d383232322d323232323232323232323232070000"
    "000000000030750000000000000700000064656661756c7408000000776f726b65722d31"
)


def spec(index=0, kind=WaitpointKind.EXTERNAL):
    return WaitpointSpec(kind, b"m", WaitpointHmac(f"kid1:{index:040x}"))


DESCRIBED = ExecutionDescription(
    execution_id=EID,
    state="active",
    lane="default",
    namespace="n",
    priority=7,
    tags={"a.b": "v"},
    created_at_ms=1,
    last_transition_at_ms=2,
    retention=3.0,
    usage={"calls": 1},
)

VALUES = [
    Frame(b"x", FrameKind.EVENT),
    Frame(b"x", FrameKind.BLOB, seq=1, frame_type="t", correlation_id="c", mode=StreamMode()),
    AppendFrameOutcome("1-1", 1, 2),
    SummaryDocument(b"{}", 1, PatchKind.STRING_APPEND("/a"), 2, 1, "1-1"),
    StreamMode.best_effort_live(5),
    Gap(1, 3, "trimmed"),
    End("success"),
    Handle.encode(**HANDLE),
    CapabilitySet(["gpu", "cuda"]),
    ClaimPolicy.with_max_wait(2),
    LeaseRenewal(1, 2),
    ReclaimToken(ReclaimGrant(EID, "{fp:86}", "k", 1, "default")),
    PendingWaitpoint(UUID, WaitpointHmac(TOKEN)),
    WaitpointSpec(WaitpointKind.EXTERNAL, b"m", WaitpointHmac(TOKEN)),
    ResumeSignal(UUID, "n", "c", "t", "i", "", 1, b"p"),
    FailureReason.with_detail("m", b"d"),
    FailOutcome.RETRY_SCHEDULED(42),
    CompletionPayload(EID, "success", b"p", 1).with_flow_id(UUID),
    CancelFlowWait.wait_timeout(1),
    UsageDimensions(1, 2, 3, {"b": 1, "a": 2}, "k"),
    ScannerFilter(Namespace("n"), ("a.b", "v")),
    RetryPolicy(1, RetryBackoff.FIXED, 2, 1.5, 3, 4, 5),
    StateTransition(1, "waiting", "active", 0, "why"),
    SuspensionDescription("s", 1, "r", 2, None, TimeoutBehavior.FAIL, ("w",)),
    DESCRIBED,
    ResumeCondition.all(spec(1), ResumeCondition.any(spec(2), spec(3))),
    SuspendOutcome("s", Handle.encode(**HANDLE), already_satisfied=False),
    SignalOutcome("s", "appended_to_waitpoint", duplicate=True),
    ReportUsageResult(UsageVerdict.HARD_BREACH, "b", "calls", 4, 5),
    CancelOutcome(cancelled=True, previous_state="active"),
    CancelFlowOutcome(CancelFlowPolicy.CANCEL_ALL, 1, 2),
    FlowDescription("f", "open", ("a", "b"), ("a",)),
    StreamDescription("1-1", 1, 2, 3, 4, None, 5),
    BackendConfig.from_url("rediss://u:p@h:1/2?timeout=3"),
    WaitpointHmac(TOKEN),
    StreamCursor(1, 2),
    HandleOpaque(b"x"),
    Namespace("n"),
]


# -- all values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_values_are_equal_by_content_hashable_and_picklable(value):
    for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
        assert type(twin) is type(value)
        assert twin == value
        assert hash(twin) == hash(value)
    assert value != object()
    assert not hasattr(value, "__dict__") or isinstance(value, str)


@pytest.mark.parametrize(
    "value", [v for v in VALUES if isinstance(v, types.Value)], ids=lambda v: type(v).__name__
)
def test_values_are_frozen_and_replaced(value):
    name = type(value).__match_args__[0]
    with pytest.raises(AttributeError, match="frozen"):
        setattr(value, name, None)
    with pytest.raises(AttributeError, match="frozen"):
        delattr(value, name)
    with pytest.raises(AttributeError):
        value.no_such_field = 1
    assert value.replace() == value
    with pytest.raises(TypeError, match="no_such_field"):
        value.replace(no_such_field=1)


def test_replace_checks_again():
    assert LIVE.replace(ttl_ms=7).ttl_ms == 7
    with pytest.raises(InvalidInput):
        LIVE.replace(ttl_ms=0)


VALUE_CLASSES = sorted(types.Value.__subclasses__(), key=lambda cls: cls.__name__)


@pytest.mark.parametrize("cls", VALUE_CLASSES, ids=lambda cls: cls.__name__)
def test_every_value_class_is_a_dataclass_to_the_stdlib(cls):
    assert dataclasses.is_dataclass(cls)
    fields = dataclasses.fields(cls)
    assert tuple(field.name for field in fields) == cls.__match_args__
    for field, parameter in zip(
        fields, list(inspect.signature(cls).parameters.values()), strict=False
    ):
        assert field.name == parameter.name
        assert field.kw_only == (parameter.kind is inspect.Parameter.KEYWORD_ONLY)
        has_default = not (field.default is field.default_factory is dataclasses.MISSING)
        assert has_default == (parameter.default is not inspect.Parameter.empty)


@pytest.mark.parametrize(
    "value", [v for v in VALUES if isinstance(v, types.Value)], ids=lambda v: type(v).__name__
)
def test_values_are_dataclasses_to_the_stdlib(value):
    names = [field.name for field in dataclasses.fields(value)]
    assert dataclasses.is_dataclass(value)
    assert dataclasses.replace(value) == value
    with pytest.raises(TypeError, match="no_such_field"):
        dataclasses.replace(value, no_such_field=1)
    assert list(dataclasses.asdict(value)) == names
    assert all(
        getattr(value, name) == part
        for name, part in zip(names, dataclasses.astuple(value), strict=True)
        if not dataclasses.is_dataclass(getattr(value, name)) and not isinstance(part, tuple)
    )
    pprint.pformat(value, width=1)
    if sys.version_info >= (3, 13):
        assert copy.replace(value) == value


def test_dataclass_functions_check_as_the_class_does():
    assert dataclasses.replace(LIVE, ttl_ms=datetime.timedelta(seconds=7)).ttl_ms == 7_000
    with pytest.raises(InvalidInput, match="ttl_ms"):
        dataclasses.replace(LIVE, ttl_ms=0)
    assert dataclasses.asdict(Gap(1, 2, "trimmed")) == {
        "first_missing": 1,
        "next_sequence": 2,
        "reason": "trimmed",
        "cursor": "0-0",
    }


def test_signatures_and_patterns_read_as_in_a_dataclass():
    assert list(inspect.signature(Frame).parameters)[:3] == ["bytes", "kind", "seq"]
    with pytest.raises(TypeError, match=r"Frame.__init__\(\) .* 'kind'"):
        Frame(b"x")
    match Gap(1, 2, "trimmed"):
        case Gap(first, upto, reason):
            assert (first, upto, reason) == (1, 2, "trimmed")


def test_every_public_class_is_documented():
    for name, cls in vars(types).items():
        if isinstance(cls, type) and name[0] != "_":
            assert cls.__doc__, name


def test_every_name_of_the_modules_is_offered_once():
    offered = {
        name
        for module in (types.stream, types.handle, types.work, types.waitpoint, types.config)
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    }
    assert offered <= set(types.__all__)
    assert len(types.__all__) == len(set(types.__all__))
    public = set(ff_fast.__all__)
    helpers = {"MAX_PAYLOAD_BYTES", "MAX_SECONDS", "MAX_U32", "Value", "parse_cursor"}
    assert set(types.__all__) - public == helpers | {
        *("duration_ms", "milliseconds", "payload_bytes", "seconds")
    }


def test_the_seeds_types_are_all_here():
    names = [
        "BackendTag",
        "HandleKind",
        "HandleOpaque",
        "Handle",
        "CapabilitySet",
        "ClaimPolicy",
        "FrameKind",
        "PatchKind",
        "StreamMode",
        "BestEffortLiveConfig",
        "TailVisibility",
        "SUMMARY_NULL_SENTINEL",
        "SummaryDocument",
        "Frame",
        "WaitpointKind",
        "WaitpointHmac",
        "PendingWaitpoint",
        "WaitpointSpec",
        "FailureReason",
        "FailureClass",
        "UsageDimensions",
        "ReclaimGrant",
        "ReclaimToken",
        "LeaseRenewal",
        "CancelFlowPolicy",
        "CancelFlowWait",
        "CompletionPayload",
        "ResumeSignal",
        "FailOutcome",
        "AppendFrameOutcome",
        "BackendTimeouts",
        "BackendRetry",
        "ValkeyConnection",
        "BackendConnection",
        "BackendConfig",
        "ScannerFilter",
        "Namespace",
        "Gap",
        "End",
        "StreamCursor",
    ]
    assert [name for name in names if not hasattr(types, name)] == []


def test_importing_the_package_loads_no_dataclasses():
    # -S: without site, whose .pth files may load anything.
    code = "import sys; sys.path[:0] = sys.argv[1:]; import ff_fast\nprint(*sys.modules)"
    paths = [str(Path(ff_fast.__file__).parent.parent), *site.getsitepackages()]
    run = subprocess.run(
        [sys.executable, "-I", "-S", "-c", code, *paths], capture_output=True, text=True, check=True
    )
    loaded = set(run.stdout.split())
    assert "ff_fast.types.work" in loaded
    assert not loaded & {"dataclasses", "datetime", "asyncio", "redis"}


# -- modes -----------------------------------------------------------------------------------------


def test_wire_tokens():
    assert [StreamMode.durable().wire_str(), StreamMode().wire] == ["durable", "durable"]
    assert StreamMode.durable_summary().wire_str() == "summary"
    assert StreamMode.best_effort_live(1).wire_str() == "best_effort"
    assert [v.wire_str() for v in TailVisibility] == ["", "exclude_best_effort"]
    assert [k.wire_str() for k in FrameKind] == ["stdout", "stderr", "event", "blob"]
    assert PatchKind.JSON_MERGE_PATCH.wire_str() == "json-merge-patch"
    assert PatchKind.STRING_APPEND("/a").wire_str() == "string-append"
    assert [k.value for k in HandleKind] == ["fresh", "resumed", "suspended"]
    assert [p.value for p in CancelFlowPolicy] == ["flow_only", "cancel_all", "cancel_pending"]
    assert [c.value for c in FailureClass] == [
        "transient",
        "permanent",
        "infra_crash",
        "timeout",
        "cancelled",
    ]
    assert types.SUMMARY_NULL_SENTINEL == "__ff_null__"
    assert [b.value for b in RetryBackoff] == ["fixed", "exponential"]
    assert [c.value for c in CountKind] == ["leaf", "waitpoint", "signal", "source"]
    assert [b.value for b in TimeoutBehavior] == [
        "fail",
        "cancel",
        "expire",
        "auto_resume",
        "escalate",
    ]
    assert [v.value for v in UsageVerdict] == [
        "ok",
        "soft_breach",
        "hard_breach",
        "already_applied",
    ]


def test_mode_builders():
    assert StreamMode.durable() is StreamMode.durable()
    assert StreamMode.durable_summary().patch_kind is PatchKind.JSON_MERGE_PATCH
    appending = StreamMode.durable_summary(patch_kind=PatchKind.STRING_APPEND("/text"))
    assert appending.patch_kind.pointer == "/text"
    config = StreamMode.best_effort_live(15_000).config
    assert config == LIVE == BestEffortLiveConfig.with_ttl(15_000)
    assert (config.maxlen_floor, config.maxlen_ceiling, config.ema_alpha) == (64, 16_384, 0.2)
    tuned = LIVE.with_maxlen_floor(128).with_maxlen_ceiling(8_192).with_ema_alpha(0.3)
    assert tuned == BestEffortLiveConfig(15_000, 128, 8_192, 0.3)
    assert StreamMode.best_effort_live_with_config(tuned).config is tuned


@pytest.mark.parametrize(
    "make",
    [
        lambda: StreamMode("no_such_mode"),
        lambda: StreamMode("summary"),
        lambda: StreamMode("best_effort"),
        lambda: StreamMode("durable", config=LIVE),
        lambda: StreamMode("durable", PatchKind.JSON_MERGE_PATCH),
        lambda: StreamMode.durable_summary("json-merge-patch"),
        lambda: StreamMode.best_effort_live_with_config(15_000),
        lambda: PatchKind("json-merge-patch", "/a"),
        lambda: PatchKind("json-patch"),
    ],
)
def test_bad_modes(make):
    with pytest.raises(InvalidInput):
        make()


@pytest.mark.parametrize("pointer", ["", "/", "/a", "/a/0/b", "/~0~1", "//", "/ü\n{}"])
def test_good_pointers(pointer):
    assert PatchKind.STRING_APPEND(pointer).pointer == pointer


@pytest.mark.parametrize(
    "pointer", ["a", "#/a", "/~", "/~2", "a/b", "/\ud800", "/" + "x" * 1024, None, 5, b"/a"]
)
def test_bad_pointers(pointer):
    with pytest.raises(InvalidInput, match="pointer"):
        PatchKind.STRING_APPEND(pointer)


# FlowFabric accepts these, and then fails after its write, or never trims or expires the stream.
@pytest.mark.parametrize(
    "fields",
    [
        *({"ttl_ms": ttl} for ttl in (0, -1, 2**32, True, 0.4, 15_000.0, "15000", " 5 ", None)),
        *({"ttl_ms": float(ttl)} for ttl in ("nan", "inf")),
        *({"maxlen_floor": floor} for floor in (0, -1, True, 1.5, "64", float("nan"), 16_385)),
        *({"maxlen_ceiling": ceiling} for ceiling in (0, 63, 2**32, True, float("inf"), "1e3")),
        *({"ema_alpha": alpha} for alpha in (0, -0.1, 1.01, 2, True, "0.2", None)),
        *({"ema_alpha": float(alpha)} for alpha in ("nan", "inf", "-inf")),
    ],
    ids=str,
)
def test_bad_live_configs(fields):
    with pytest.raises(InvalidInput, match=next(iter(fields)).split("_")[0]):
        BestEffortLiveConfig(**{"ttl_ms": 15_000, **fields})


@pytest.mark.parametrize("alpha", [1, 1.0, 5e-324])
def test_good_alphas(alpha):
    assert type(LIVE.with_ema_alpha(alpha).ema_alpha) is float


# -- frames and outcomes ---------------------------------------------------------------------------


def test_frame_defaults():
    frame = Frame(b"{}", FrameKind.EVENT, frame_type="tool_event")
    assert (frame.seq, frame.correlation_id, frame.mode) == (None, None, StreamMode.durable())
    assert frame.wire_type == "tool_event"
    assert Frame(b"", FrameKind.STDERR).wire_type == "stderr"
    assert Frame(b"", FrameKind.BLOB, correlation_id="").correlation_id is None


@pytest.mark.parametrize(
    "payload, stored",
    [
        (b"\x00\r\n\xff", b"\x00\r\n\xff"),
        (b"", b""),
        (bytearray(b"ab"), b"ab"),
        (memoryview(b"abcde")[::2], b"ace"),
        ("é", "é".encode()),
    ],
)
def test_payloads(payload, stored):
    frame = Frame(payload, FrameKind.BLOB)
    assert type(frame.bytes) is bytes
    assert frame.bytes == stored
    if isinstance(payload, bytearray):
        payload.extend(b"later")
        assert frame.bytes == stored


def test_exact_bytes_are_not_copied():
    payload = b"x" * 1000
    assert Frame(payload, FrameKind.BLOB).bytes is payload


@pytest.mark.parametrize("payload", [None, True, 5, 1.5, [1], {}, (), [b"a"]])
def test_payloads_of_another_type(payload):
    with pytest.raises(InvalidType, match="payload must be"):
        Frame(payload, FrameKind.BLOB)


def test_text_payload_that_cannot_be_encoded():
    with pytest.raises(InvalidPayload) as caught:
        Frame(CANARY + "\ud800", FrameKind.BLOB)
    assert caught.value.__context__ is None
    assert CANARY not in repr(caught.value)


@pytest.mark.parametrize("seq", [0, -1, 2**53, True, 1.0, "1e3", "0x10", " 5 ", float("nan"), b"1"])
def test_bad_sequences(seq):
    assert Frame(b"", FrameKind.BLOB, seq=2**53 - 1).seq == 2**53 - 1
    with pytest.raises(InvalidSequence, match="seq"):
        Frame(b"", FrameKind.BLOB, seq=seq)


@pytest.mark.parametrize("name", ["frame_type", "correlation_id"])
@pytest.mark.parametrize("text", ["a\n", "\0", "\ud800", "x" * 257, 5, b"t", True])
def test_bad_frame_texts(name, text):
    with pytest.raises(InvalidInput, match=name):
        Frame(b"", FrameKind.BLOB, **{name: text})


@pytest.mark.parametrize("fields", [{"kind": "event"}, {"mode": "durable"}, {"mode": None}])
def test_bad_frame_kinds_and_modes(fields):
    with pytest.raises(InvalidType):
        Frame(b"", **{"kind": FrameKind.EVENT, **fields})


def test_outcomes_and_documents():
    base = AppendFrameOutcome("1713-1", 3)
    assert base.summary_version is None
    assert base.with_summary_version(7).summary_version == 7
    document = SummaryDocument(b'{"n":3}', 2, PatchKind.JSON_MERGE_PATCH, 200, 100)
    assert document.cursor == "0-0"
    for bad in ({"version": 0}, {"version": True}, {"cursor": "x"}, {"document_json": "{}"}):
        with pytest.raises(InvalidInput):
            document.replace(**bad)
    for bad in (0, True, "1", 1.0):
        with pytest.raises(InvalidInput):
            Gap(bad, 5, "trimmed")


# -- cursors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, place",
    [
        (None, (0, 0)),
        ("start", (0, 0)),
        ("0-0", (0, 0)),
        ("1713-7", (1713, 7)),
        ("007-01", (7, 1)),
        ("9223372036854775807-9007199254740991", (2**63 - 1, 2**53 - 1)),
        (StreamCursor(5, 6), (5, 6)),
    ],
)
def test_cursors(value, place):
    cursor = parse_cursor(value)
    assert cursor == place
    assert (cursor.ms, cursor.sequence) == place
    assert parse_cursor(str(cursor)) == cursor


@pytest.mark.parametrize(
    "value",
    [
        "",
        "-",
        "+",
        "$",
        ">",
        "end",
        "12",
        "12-",
        "-1",
        "1--1",
        "1-+1",
        "1-1\n",
        " 1-1",
        "1-*",
        "1.0-1",
        "1e3-1",
        "\u0665-1",
        "1-1-1",
        "(1-1",
        "Start",
        "9223372036854775808-0",
        "1-9007199254740992",
        "1" * 21 + "-1",
        "1-" + "1" * 17,
        0,
        12,
        True,
        1.0,
        (0, 0),
        b"1-1",
        [],
        object(),
    ],
)
def test_bad_cursors(value):
    with pytest.raises(InvalidCursor, match="A cursor must be None, 'start', '0-0' or an entry id"):
        parse_cursor(value)


@pytest.mark.parametrize("pair", [(-1, 0), (0, -1), (2**63, 0), (0, 2**53), (True, 0), ("1", 1)])
def test_bad_cursor_pairs(pair):
    with pytest.raises(InvalidCursor):
        StreamCursor(*pair)


# -- handles ---------------------------------------------------------------------------------------


def test_handle_vector():
    handle = Handle.encode(kind=HandleKind.FRESH, **HANDLE)
    assert handle.opaque.as_bytes() == VECTOR
    assert len(VECTOR) == 174
    for data in (VECTOR, b"\x01" + VECTOR[3:]):
        fields = Handle(BackendTag.VALKEY, HandleKind.RESUMED, HandleOpaque(data)).fields()
        assert {name: getattr(fields, name) for name in HANDLE} == HANDLE


def test_handle_decodes_once_and_takes_bytes():
    handle = Handle(BackendTag.VALKEY, HandleKind.FRESH, VECTOR)
    assert handle.fields() is handle.fields()
    assert handle == Handle.encode(**HANDLE)


def decode(data):
    return Handle(BackendTag.VALKEY, HandleKind.FRESH, HandleOpaque(data)).fields()


def vector_with(**changes):
    """The vector with some fields replaced by raw bytes."""
    texts = ("execution_id", "attempt_id", "lease_id", "lane_id", "worker_instance_id")
    parts = []
    for name, value in HANDLE.items():
        if name in texts:
            raw = changes.get(name, value.encode())
            parts.append(len(raw).to_bytes(4, "little") + raw)
        else:
            size = 4 if name == "attempt_index" else 8
            parts.append(changes.get(name, value).to_bytes(size, "little"))
    return b"\x02\x01\x01" + b"".join(parts)


def test_truncated_handles(subtests):
    for cut in range(len(VECTOR)):
        with subtests.test(cut=cut), pytest.raises(InvalidHandle):
            decode(VECTOR[:cut])


@pytest.mark.parametrize(
    "data",
    [
        VECTOR + b"\0",
        b"\x00" + VECTOR[1:],
        b"\x03" + VECTOR[1:],
        b"\x02\x02" + VECTOR[2:],
        b"\x02\x01\x00" + VECTOR[3:],
        b"\x02\x01\x04" + VECTOR[3:],
        b"\x02\x01\x01\xff\xff\xff\xff" + VECTOR[7:],
        vector_with(execution_id=b"x"),
        vector_with(execution_id=b"{fp:007}:" + UUID.encode()),
        vector_with(lease_id=b"\xff\xfe"),
        vector_with(lease_id=b""),
        vector_with(attempt_id=b"a b"),
        vector_with(lane_id=b"\n"),
        vector_with(worker_instance_id=b""),
        vector_with(worker_instance_id="\ud800".encode("utf-8", "surrogatepass")),
        vector_with(lease_epoch=2**53),
        vector_with(lease_ttl_ms=0),
    ],
)
def test_damaged_handles(data):
    with pytest.raises(InvalidHandle) as caught:
        decode(data)
    assert caught.value.__context__ is None
    assert LEASE not in f"{caught.value!r}"
    assert "not decodable" in repr(Handle(BackendTag.VALKEY, HandleKind.FRESH, data))


@pytest.mark.parametrize("tag", [BackendTag.POSTGRES, BackendTag.SQLITE])
def test_handles_of_other_backends(tag):
    with pytest.raises(HandleFromOtherBackend):
        Handle(tag, HandleKind.FRESH, HandleOpaque(VECTOR)).fields()
    with pytest.raises(HandleFromOtherBackend):
        decode(bytes((2, 1, tag.value)) + VECTOR[3:])


@given(st.binary(max_size=200) | st.binary(max_size=8).map(lambda tail: VECTOR[:-8] + tail))
def test_any_bytes_are_a_handle_or_refused(data):
    try:
        fields = decode(data)
    except (InvalidHandle, HandleFromOtherBackend):
        return
    again = Handle.encode(**{name: getattr(fields, name) for name in HANDLE})
    assert again.fields() == fields


@pytest.mark.parametrize(
    "fields",
    [
        *({"attempt_index": bad} for bad in (-1, 2**32, True, "3", 3.0)),
        *({"lease_epoch": bad} for bad in (-1, 2**53, True, "7")),
        *({"lease_ttl_ms": bad} for bad in (0, 2**53, None)),
        *({"lease_id": bad} for bad in ("", "a\n", "x" * 65, None, b"l")),
        {"execution_id": "x"},
        {"lane_id": ""},
        {"worker_instance_id": "a\n"},
    ],
    ids=str,
)
def test_bad_handle_fields(fields):
    with pytest.raises(InvalidInput):
        Handle.encode(**{**HANDLE, **fields})


@pytest.mark.parametrize("parts", [("v", HandleKind.FRESH, b""), (BackendTag.VALKEY, "fresh", b"")])
def test_bad_handle_parts(parts):
    with pytest.raises(InvalidType):
        Handle(*parts)


# -- claiming --------------------------------------------------------------------------------------


def test_capabilities():
    assert CapabilitySet().is_empty()
    assert CapabilitySet().csv() == b""
    some = CapabilitySet(["gpu", "cuda", "gpu"])
    assert some.tokens == ("cuda", "gpu")
    assert some.csv() == b"cuda,gpu"
    assert some == CapabilitySet({"cuda", "gpu"}) == CapabilitySet(tokens=iter(["gpu", "cuda"]))
    assert len(CapabilitySet(f"t{n}" for n in range(256)).tokens) == 256
    assert len(CapabilitySet(["x" * 4096]).csv()) == 4096


@pytest.mark.parametrize(
    "tokens",
    [
        [""],
        ["a,b"],
        ["a b"],
        ["a\n"],
        ["\0"],
        ["\x7f"],
        ["\ud800"],
        ["x" * 4097],
        ["é" * 2049],
        [f"t{n}" for n in range(257)],
    ],
    ids=lambda tokens: ascii(tokens)[:20],
)
def test_bad_capabilities(tokens):
    with pytest.raises(InvalidCapabilities):
        CapabilitySet(tokens)


@pytest.mark.parametrize("tokens", ["gpu", b"gpu", None, 5, [5], [b"gpu"], [None]])
def test_capabilities_of_another_type(tokens):
    with pytest.raises(InvalidType):
        CapabilitySet(tokens)


def test_durations():
    assert ClaimPolicy.immediate() == ClaimPolicy() == ClaimPolicy(max_wait=None)
    assert ClaimPolicy.with_max_wait(datetime.timedelta(milliseconds=500)).max_wait == 0.5
    assert ClaimPolicy.with_max_wait(0).max_wait == 0.0
    assert CancelFlowWait.wait_timeout(1).timeout == 1.0
    assert not CancelFlowWait.NO_WAIT.wait
    assert CancelFlowWait.WAIT_INDEFINITE.timeout is None
    assert BackendTimeouts().request is None
    assert BackendTimeouts(2).request == 2.0


@pytest.mark.parametrize(
    "value", [-1, float("nan"), float("inf"), 1e9, 10**400, True, "1", b"1", [], 1j]
)
def test_bad_durations(value):
    for make in (
        ClaimPolicy.with_max_wait,
        ClaimPolicy,
        CancelFlowWait.wait_timeout,
        BackendTimeouts,
    ):
        with pytest.raises(InvalidInput, match=r"max_wait|timeout|request"):
            make(value)


def test_a_request_takes_time():
    with pytest.raises(InvalidInput, match="longer than 0"):
        BackendTimeouts(0)


# -- tokens ----------------------------------------------------------------------------------------


def test_waitpoint_token():
    token = WaitpointHmac(TOKEN)
    assert token.reveal() == token.as_str() == TOKEN
    assert token.kid == "kid1"
    assert token == WaitpointHmac(TOKEN) != WaitpointHmac(TOKEN[:-1] + "c")
    assert token != TOKEN
    assert repr(token) == "WaitpointHmac('kid1:<REDACTED:len=40>')"
    assert str(token) == f"{token}" == "kid1:<REDACTED:len=40>"
    assert f"{token:>30}" == f"{'kid1:<REDACTED:len=40>':>30}"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "kid1",
        ":" + "a" * 40,
        "k:" + "a" * 39,
        "k:" + "a" * 41,
        "k:" + "A" * 40,
        "k:k:" + "a" * 40,
        "k:" + "a" * 40 + "\n",
        "é:" + "a" * 40,
        "k k:" + "a" * 40,
        "x" * 65 + ":" + "a" * 40,
        None,
        TOKEN.encode(),
        5,
    ],
)
def test_bad_waitpoint_tokens(text):
    with pytest.raises(InvalidInput) as caught:
        WaitpointHmac(text)
    assert "aaaa" not in f"{caught.value!r}"


def test_tokens_are_never_compared_with_an_operator():
    source = inspect.getsource(WaitpointHmac.__eq__)
    compared = [
        node for node in ast.walk(ast.parse(source.lstrip())) if isinstance(node, ast.Compare)
    ]
    assert "compare_digest" in source
    assert not compared


# -- ending, usage, filters ------------------------------------------------------------------------


def test_failures():
    assert FailureReason("boom").detail is None
    assert FailureReason.with_detail("boom", b"stack").detail == b"stack"
    for bad in (5, None, b"boom", "\ud800"):
        with pytest.raises(InvalidInput):
            FailureReason(bad)
    for make in (lambda n: FailureReason("x" * n), lambda n: FailureReason("m", b"x" * n)):
        make(65_536)
        with pytest.raises(PayloadTooLarge):
            make(65_537)
    retry, terminal = FailOutcome.RETRY_SCHEDULED(42), FailOutcome.TERMINAL_FAILED
    assert (retry.retry_scheduled, retry.delay_until_ms) == (True, 42)
    assert (terminal.retry_scheduled, terminal.delay_until_ms) == (False, None)
    for bad in ((True,), (False, 1), (1, 1), (True, True)):
        with pytest.raises(InvalidInput):
            FailOutcome(*bad)


def test_usage():
    assert UsageDimensions() == UsageDimensions(custom={})
    given_dict = {"net_bytes": 42, "a": 1}
    usage = (
        UsageDimensions(custom=given_dict)
        .with_input_tokens(10)
        .with_output_tokens(20)
        .with_wall_ms(150)
        .with_dedup_key("k1")
        .with_custom("a", 2)
    )
    assert (usage.input_tokens, usage.output_tokens, usage.wall_ms) == (10, 20, 150)
    assert list(usage.custom.items()) == [("a", 2), ("net_bytes", 42)]
    assert given_dict == {"net_bytes": 42, "a": 1}
    assert usage.dedup_key == "k1"
    assert UsageDimensions(dedup_key="").dedup_key is None


# FlowFabric accepts most of these, and then counts usage wrongly.
@pytest.mark.parametrize(
    "fields",
    [
        *({"input_tokens": bad} for bad in (-1, 2**53, True, 1.0, "1")),
        {"output_tokens": -1},
        {"wall_ms": -1},
        *({"custom": bad} for bad in ({"a": -1}, {"a": 1.0}, {"": 1}, {5: 1}, [("a", 1)], None)),
        {"custom": {"input_tokens": 1}},
        {"custom": {f"d{n}": 1 for n in range(62)}},
        {"dedup_key": "a\n"},
    ],
    ids=lambda fields: str(fields)[:30],
)
def test_bad_usage(fields):
    with pytest.raises(InvalidInput):
        UsageDimensions(**fields)


def test_scanner_filter():
    assert ScannerFilter() == ScannerFilter.NOOP
    assert ScannerFilter.NOOP.is_noop()
    assert ScannerFilter.NOOP.matches()
    assert ScannerFilter.NOOP.matches("t1", "v")
    both = ScannerFilter().with_namespace("tenant-a").with_instance_tag("cairn.instance_id", "i-1")
    assert isinstance(both.namespace, Namespace)
    assert both.matches(Namespace("tenant-a"), "i-1")
    for core_namespace, tag in (
        ("tenant-a", "i-2"),
        ("tenant-b", "i-1"),
        (None, "i-1"),
        ("tenant-a", None),
    ):
        assert not both.matches(core_namespace, tag)
    assert ScannerFilter(namespace="tenant-a").matches("tenant-a")
    for bad in ("", "a\n", 5):
        with pytest.raises(InvalidInput):
            ScannerFilter(namespace=bad)
    for bad in ("x", ("a.b",), ("bad", "v"), ("a.b", 5)):
        with pytest.raises(InvalidInput):
            ScannerFilter(instance_tag=bad)


def test_ids_in_values_are_canonical():
    assert CompletionPayload(EID.upper().replace("FP", "fp"), "success").execution_id == EID
    assert PendingWaitpoint(UUID.upper(), WaitpointHmac(TOKEN)).waitpoint_id == UUID
    with pytest.raises(InvalidId):
        ReclaimGrant(EID, "{fp:1}", "k", 1, "default")


# -- configuration ---------------------------------------------------------------------------------


def test_configuration_defaults():
    config = BackendConfig.valkey("host.local", 6379)
    connection = config.connection
    assert (connection.host, connection.port) == ("host.local", 6379)
    assert (connection.tls, connection.cluster) == (False, False)
    assert (connection.username, connection.password, connection.db) == (None, None, 0)
    assert (config.timeouts, config.retry) == (BackendTimeouts(), BackendRetry())


@pytest.mark.parametrize(
    "url, fields",
    [
        ("valkey://h", {"host": "h", "port": 6379, "tls": False, "db": 0}),
        ("REDIS://h:7000", {"host": "h", "port": 7000, "tls": False}),
        ("valkeys://h", {"tls": True}),
        ("rediss://h/", {"tls": True, "db": 0}),
        ("valkey://h/15", {"db": 15}),
        ("valkey://10.0.0.1:1", {"host": "10.0.0.1", "port": 1}),
        ("valkey://my_host.svc:65535", {"host": "my_host.svc", "port": 65_535}),
        ("valkey://[::1]", {"host": "::1", "port": 6379}),
        ("valkey://u:p@[fe80::1]:7000/2", {"host": "fe80::1", "port": 7000, "db": 2}),
        ("valkey://u:p@h", {"username": "u", "password": "p"}),
        ("valkey://:p@h", {"username": None, "password": "p"}),
        ("valkey://u@h", {"username": "u", "password": None}),
        ("valkey://u:a%40b%3A%2F%25%3F%C3%A9@h", {"password": "a@b:/%?é"}),
        ("valkey://u:a@b:c@h", {"password": "a@b:c"}),
        ("valkey://h?cluster=true", {"cluster": True}),
        ("valkey://h?cluster=false", {"cluster": False}),
        (
            "valkeys://h?tls_ca_file=%2Fca+1.pem&tls_cert_file=/c&tls_key_file=/k",
            {"tls_ca_file": "/ca+1.pem", "tls_cert_file": "/c", "tls_key_file": "/k"},
        ),
        ("unix:///run/v.sock", {"unix_path": "/run/v.sock", "host": "", "db": 0}),
        (
            "unix://u:p@/run/my%20v.sock?db=3",
            {"unix_path": "/run/my v.sock", "db": 3, "username": "u", "password": "p"},
        ),
    ],
)
def test_urls(url, fields):
    connection = BackendConfig.from_url(url).connection
    assert {name: getattr(connection, name) for name in fields} == fields


def test_url_timeout():
    assert BackendConfig.from_url("valkey://h?timeout=2.5").timeouts == BackendTimeouts(2.5)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "h",
        "h:6379",
        "http://@h",
        "valkey:/@h",
        "valkey://",
        "valkey://@",
        "valkey:///0",
        "valkey://:6379",
        "valkey://@h:",
        "valkey://@h:0",
        "valkey://@h:65536",
        "valkey://@h:abc",
        "valkey://@h:-1",
        "valkey://@h:+1",
        "valkey://@h:\u0665",
        "valkey://@h:1:2",
        "valkey://@::1",
        "valkey://@[::1",
        "valkey://@[::1]x",
        "valkey://@[h]",
        "valkey://@[]",
        "valkey://@h,h2",
        "valkey://@h/x",
        "valkey://@h/-1",
        "valkey://@h/0/1",
        "valkey://@h/99999",
        "valkey://@h/0#f",
        "valkey://@h /0",
        "valkey://@h\n",
        "valkey://@h%41",
        "valkey://%zz@h",
        "valkey://%@h",
        "valkey://%ff@h",
        "valkey://@h?db=1",
        "valkey://@h?cluster=yes",
        "valkey://@h/1?cluster=true",
        "valkey://@h?cluster=true&cluster=true",
        "valkey://@h?cluster",
        "valkey://@h?timeout=0",
        "valkey://@h?timeout=-1",
        "valkey://@h?timeout=nan",
        "valkey://@h?timeout=1e3",
        "valkey://@h?timeout=999999999",
        "valkey://@h?tls_ca_file=/ca",
        "valkeys://@h?tls_key_file=/k",
        "valkeys://@h?tls_ca_file=%0A",
        "valkeys://@h?ssl_cert_reqs=none",
        "valkeys://@h?ssl_check_hostname=false",
        "valkey://@h?&",
        "unix://@",
        "unix://@/",
        "unix://@h/path",
        "unix://@/path?db=x",
        "unix://@/path?cluster=true",
    ],
)
def test_bad_urls_never_show_the_password(url):
    for bad in {url, url.replace("@", f"u:{CANARY}@"), url.replace("@", f":{CANARY}@")}:
        with pytest.raises(InvalidInput) as caught:
            BackendConfig.from_url(bad)
        chain, error = [], caught.value
        while error is not None:
            chain.append(repr(error))
            error = error.__context__
        assert CANARY not in " ".join(chain)


@pytest.mark.parametrize(
    "url",
    [f"valkey://u:{CANARY}/x@h", f"valkey://u:{CANARY}?{CANARY}@h", f"valkey://u:{CANARY}#@h"],
)
def test_a_password_that_was_not_escaped_is_not_shown(url):
    with pytest.raises(InvalidInput) as caught:
        BackendConfig.from_url(url)
    assert CANARY not in repr(caught.value)


@pytest.mark.parametrize("url", [None, b"valkey://h", 5, ValkeyConnection("h")])
def test_urls_of_another_type(url):
    with pytest.raises(InvalidType):
        BackendConfig.from_url(url)


@given(st.text(max_size=40).map("valkey://".__add__) | st.text(max_size=40))
def test_any_url_is_understood_or_refused(url):
    try:
        config = BackendConfig.from_url(url)
    except InvalidInput:
        return
    assert config.connection.host or config.connection.unix_path


@pytest.mark.parametrize(
    "fields",
    [
        *({"host": bad} for bad in ("", "a b", "a/b", "a@b", "[::1]", "a\n", "::zz", "x:1", None)),
        *({"port": bad} for bad in (0, 65_536, True, "6379", 6379.0, None)),
        *({"db": bad} for bad in (-1, True, "0", None)),
        *({name: bad} for name in ("tls", "cluster") for bad in (1, "true", None)),
        {"cluster": True, "db": 1},
        {"unix_path": "/s", "tls": True},
        {"unix_path": "/s", "cluster": True},
        {"unix_path": ""},
        {"tls_ca_file": "/ca"},
        {"tls": True, "tls_key_file": "/k"},
        {"username": ""},
        {"password": CANARY + "\ud800"},
        {"password": CANARY.encode()},
    ],
    ids=ascii,
)
def test_bad_connections(fields):
    with pytest.raises(InvalidInput) as caught:
        ValkeyConnection(**{"host": "h", **fields})
    assert CANARY not in repr(caught.value)


@pytest.mark.parametrize(
    "fields",
    [{"exponent_base": 0}, {"factor": -1}, {"number_of_retries": True}, {"jitter_percent": 101}],
    ids=str,
)
def test_bad_retries(fields):
    assert BackendRetry(2, 100, 5, 20).jitter_percent == 20
    with pytest.raises(InvalidInput):
        BackendRetry(**fields)


def test_bad_configurations():
    for bad in ({"connection": "valkey://h"}, {"timeouts": 5}, {"retry": None}):
        with pytest.raises(InvalidType):
            BackendConfig(**{"connection": ValkeyConnection("h"), **bad})


# -- retries, conditions, descriptions --------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        *({"max_retries": value} for value in (-1, 2**32, True, 1.0, "1", None)),
        *({"delay": value} for value in (-1, 31_536_001, True, "1", float("nan"))),
        *({"max_delay": value} for value in (-1, 31_536_001, True, "1", float("inf"))),
        *({"jitter_percent": value} for value in (-1, 101, True, 0.5)),
        *({"max_reclaims": value} for value in (-1, 2**32, True, 0.5)),
        *({"multiplier": value} for value in (0.99, 101, float("nan"), float("inf"), True, "2")),
        {"backoff": "fixed"},
    ],
    ids=str,
)
def test_bad_retry_policies(fields):
    assert RetryPolicy().max_retries == 0
    with pytest.raises(InvalidInput, match=next(iter(fields))):
        RetryPolicy(**fields)


def test_durations_take_a_timedelta():
    delta = datetime.timedelta(milliseconds=1_500)
    assert RetryPolicy(delay=delta, max_delay=delta) == RetryPolicy(delay=1.5, max_delay=1.5)
    assert StreamMode.best_effort_live(delta) == StreamMode.best_effort_live(1_500)
    assert type(BestEffortLiveConfig(delta).ttl_ms) is int
    assert UsageDimensions(wall_ms=delta) == UsageDimensions().with_wall_ms(1_500)
    assert BackendRetry(factor=delta).factor == 1_500
    assert BackendTimeouts(delta).request == ClaimPolicy(delta).max_wait == 1.5


@pytest.mark.parametrize("value", [0.5, True, "1", None, 1.0])
def test_milliseconds_convert_nothing_else(value):
    assert types.milliseconds("lease_ttl_ms", 5, 1, 10) == 5
    with pytest.raises(InvalidType, match="lease_ttl_ms must be an int of milliseconds"):
        types.milliseconds("lease_ttl_ms", value, 1, 10)


@pytest.mark.parametrize(
    "value", [0, 11, datetime.timedelta(milliseconds=11), -datetime.timedelta(1)]
)
def test_milliseconds_have_bounds(value):
    with pytest.raises(InvalidInput, match="lease_ttl_ms"):
        types.milliseconds("lease_ttl_ms", value, 1, 10)


def test_conditions_are_made_by_name():
    assert ResumeCondition.any(spec(1), spec(2)) == ResumeCondition((spec(1), spec(2)), 1)
    assert ResumeCondition.all(spec(1), spec(2)).needed == 2
    counted = ResumeCondition.count(2, spec(1), spec(2))
    assert (counted.needed, counted.distinct) == (2, CountKind.DISTINCT_WAITPOINTS)


def nested(levels):
    condition = ResumeCondition.any(spec())
    for _ in range(levels - 1):
        condition = ResumeCondition.any(condition)
    return condition


@pytest.mark.parametrize(
    "make",
    [
        ResumeCondition.any,
        ResumeCondition.all,
        lambda: ResumeCondition.any("x"),
        lambda: ResumeCondition([spec()], 1),
        lambda: ResumeCondition((spec(),), 0),
        lambda: ResumeCondition((spec(),), True),
        lambda: ResumeCondition((spec(),), 1, "leaf"),
        # More than can ever come.
        lambda: ResumeCondition((spec(),), 2),
        lambda: ResumeCondition.count(2, spec(1), spec(1)),
        lambda: ResumeCondition.count(3, spec(1), spec(1), nested(1)),
        lambda: ResumeCondition.count(3, nested(1), nested(1), distinct=CountKind.DISTINCT_SOURCES),
        lambda: ResumeCondition.count(10_001, spec(), distinct=CountKind.DISTINCT_SIGNALS),
        lambda: nested(17),
        lambda: ResumeCondition.any(*[spec(i) for i in range(257)]),
    ],
)
def test_bad_conditions(make):
    with pytest.raises(InvalidInput):
        make()


def test_the_largest_conditions():
    nested(16)
    ResumeCondition.any(*[spec(i) for i in range(256)])
    for distinct in (CountKind.DISTINCT_SIGNALS, CountKind.DISTINCT_SOURCES):
        assert ResumeCondition.count(10_000, spec(), distinct=distinct).needed == 10_000


def test_a_description_is_a_copy_of_what_it_was_made_of():
    tags = {"a.b": "v"}
    value = DESCRIBED.replace(tags=tags)
    tags["a.b"] = "w"
    assert value.tags == {"a.b": "v"}
    assert value == DESCRIBED != DESCRIBED.replace(state="failed")
    assert DESCRIBED.replace(retry=RetryPolicy(3), retry_count=1).retries_left == 2


# -- words -------------------------------------------------------------------------------------------

LUA = "".join(_library._read_parts().values())


def lua_table(name):
    """Words of a table of the Lua library: its keys, and its values that are words."""
    body = re.search(rf"^ff\.{name} = \{{(.*?)(?:^\}}|\}}$)", LUA, re.MULTILINE | re.DOTALL)[1]
    return re.findall(r"(\w+) = (?:'(\w+)'|\{)", body)


def test_states_and_outcomes_are_those_of_the_functions():
    states = {state for state, _ in lua_table("TRANSITIONS")}
    assert set(get_args(types.ExecutionState)) == states
    outcomes = dict(lua_table("OUTCOMES"))
    assert set(get_args(types.CompletionOutcome)) == set(outcomes.values())
    assert set(outcomes) < states


def test_end_reasons_of_the_states_are_among_them():
    """The other reasons are given by calls; tests/server/test_ends.py meets each on a server."""
    assert {reason for _, reason in lua_table("END_REASONS")} < set(get_args(types.EndReason))


def test_gap_reasons_are_those_of_the_reader():
    package = Path(ff_fast.__file__).parent
    source = "".join(
        path.read_text("utf-8")
        for path in [*package.glob("_core/*.py"), *package.glob("_hot/*.pyx")]
    )
    for reason in get_args(types.GapReason):
        assert re.search(rf"[\"']{reason}[\"']", source), reason


def test_modes_and_kinds_are_made_of_their_words():
    made = [StreamMode(), StreamMode.durable_summary(), StreamMode.best_effort_live(1)]
    assert tuple(mode.wire for mode in made) == get_args(types.FrameMode)
    kinds = [PatchKind.JSON_MERGE_PATCH, PatchKind.STRING_APPEND("/a")]
    assert tuple(kind.wire for kind in kinds) == get_args(types.PatchFormat)
    flows = re.findall(r"HSET.* 'state', '(\w+)'", _library._read_parts()["flow"])
    assert set(get_args(types.FlowState)) == set(flows)


def test_gaps_and_ends_say_where_reading_goes_on():
    assert (Gap(1, 2, "trimmed").cursor, End("expired").cursor) == ("0-0", "0-0")
    assert Gap(1, 2, "trimmed", "5-1").cursor == "5-1"
    for bad in (None, "$", "5", 5):
        with pytest.raises(InvalidInput):
            End("expired", bad)


# -- secrecy ---------------------------------------------------------------------------------------

SECRET = CANARY.encode()
HOLDERS = [
    Frame(SECRET, FrameKind.EVENT),
    SummaryDocument(SECRET, 1, PatchKind.JSON_MERGE_PATCH, 1, 1),
    CompletionPayload(EID, "success", SECRET),
    ResumeSignal(UUID, "n", "c", "t", "i", "", 1, SECRET),
    FailureReason("m", SECRET),
    WaitpointSpec(WaitpointKind.EXTERNAL, SECRET, WaitpointHmac(TOKEN)),
    PendingWaitpoint(UUID, WaitpointHmac(TOKEN)),
    ResumeCondition.any(WaitpointSpec(WaitpointKind.EXTERNAL, SECRET, WaitpointHmac(TOKEN))),
    SuspendOutcome("s", Handle.encode(**{**HANDLE, "lease_id": CANARY}), already_satisfied=True),
    Handle.encode(**{**HANDLE, "lease_id": CANARY}),
    Handle.encode(**{**HANDLE, "lease_id": CANARY}).opaque,
    Handle.encode(**{**HANDLE, "lease_id": CANARY}).fields(),
    BackendConfig.from_url(f"valkey://u:{CANARY}@h"),
    BackendConfig.from_url(f"valkey://u:{CANARY}@h").connection,
    WaitpointHmac(TOKEN),
]


@pytest.mark.parametrize("value", HOLDERS, ids=lambda value: type(value).__name__)
def test_no_tool_of_dataclasses_shows_a_secret(value):
    shown = pprint.pformat([value], width=1)
    if dataclasses.is_dataclass(value):
        shown += repr(dataclasses.fields(value))
    for secret in (CANARY, TOKEN, "ab" * 20, SECRET.hex()):
        assert secret not in shown


@pytest.mark.parametrize("value", HOLDERS, ids=lambda value: type(value).__name__)
def test_no_formatter_shows_a_secret(value, caplog):
    with caplog.at_level(logging.DEBUG):
        logging.getLogger("ff_fast.test").debug("%s %r", value, [value])
    shown = f"{value} {value!r} {value!s} {[value]} {value:} {caplog.text}"
    for secret in (CANARY, TOKEN, "ab" * 20, SECRET.hex()):
        assert secret not in shown


def test_handle_repr():
    assert repr(Handle.encode(**HANDLE)) == (
        f"Handle(kind=fresh, execution_id={EID}, attempt_index=3)"
    )


def test_errors_of_values_are_errors_of_the_library():
    with pytest.raises(FFError):
        Frame(None, FrameKind.EVENT)
