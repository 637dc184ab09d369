"""Modes, frames, outcomes and cursors."""

from urllib.parse import quote

import pytest

from ff_fast import types
from ff_fast.errors import (
    InvalidCursor,
    InvalidInput,
    InvalidPayload,
    InvalidSequence,
    InvalidType,
)
from ff_fast.types import (
    AppendFrameOutcome,
    BestEffortLiveConfig,
    CancelFlowPolicy,
    CountKind,
    FailureClass,
    Frame,
    FrameKind,
    Gap,
    HandleKind,
    PatchKind,
    RetryBackoff,
    StreamCursor,
    StreamMode,
    SummaryDocument,
    TailVisibility,
    TimeoutBehavior,
    UsageVerdict,
    make_cursor,
    parse_cursor,
    split_cursor,
)

from .samples import CANARY, LIVE

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


def test_bad_modes(subtests):
    for make in (
        lambda: StreamMode("no_such_mode"),
        lambda: StreamMode("summary"),
        lambda: StreamMode("best_effort"),
        lambda: StreamMode("durable", config=LIVE),
        lambda: StreamMode("durable", PatchKind.JSON_MERGE_PATCH),
        lambda: StreamMode.durable_summary("json-merge-patch"),
        lambda: StreamMode.best_effort_live_with_config(15_000),
        lambda: PatchKind("json-merge-patch", "/a"),
        lambda: PatchKind("json-patch"),
    ):
        with subtests.test(f"{make!r:.60}"), pytest.raises(InvalidInput):
            make()


@pytest.mark.parametrize("pointer", ["", "/", "/a", "/a/0/b", "/~0~1", "//", "/ü\n{}"])
def test_good_pointers(pointer):
    assert PatchKind.STRING_APPEND(pointer).pointer == pointer


def test_bad_pointers(subtests):
    for pointer in (
        "a",
        "#/a",
        "/~",
        "/~2",
        "a/b",
        "/\ud800",
        "/" + "x" * 1024,
        None,
        5,
        b"/a",
    ):
        with subtests.test(f"{pointer!r:.60}"), pytest.raises(InvalidInput, match="pointer"):
            PatchKind.STRING_APPEND(pointer)


# FlowFabric accepts these, and then fails after its write, or never trims or expires the stream.
def test_bad_live_configs(subtests):
    for fields in (
        *({"ttl_ms": ttl} for ttl in (0, -1, 2**32, True, 0.4, 15_000.0, "15000", " 5 ", None)),
        *({"ttl_ms": float(ttl)} for ttl in ("nan", "inf")),
        *({"maxlen_floor": floor} for floor in (0, -1, True, 1.5, "64", float("nan"), 16_385)),
        *({"maxlen_ceiling": ceiling} for ceiling in (0, 63, 2**32, True, float("inf"), "1e3")),
        *({"ema_alpha": alpha} for alpha in (0, -0.1, 1.01, 2, True, "0.2", None)),
        *({"ema_alpha": float(alpha)} for alpha in ("nan", "inf", "-inf")),
    ):
        with (
            subtests.test(f"{fields!r:.60}"),
            pytest.raises(InvalidInput, match=next(iter(fields)).split("_")[0]),
        ):
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


def test_payloads_of_another_type(subtests):
    for payload in (
        None,
        True,
        5,
        1.5,
        [1],
        {},
        (),
        [b"a"],
    ):
        with subtests.test(f"{payload!r:.60}"), pytest.raises(InvalidType, match="payload must be"):
            Frame(payload, FrameKind.BLOB)


def test_text_payload_that_cannot_be_encoded():
    with pytest.raises(InvalidPayload) as caught:
        Frame(CANARY + "\ud800", FrameKind.BLOB)
    assert caught.value.__context__ is None
    assert CANARY not in repr(caught.value)


def test_bad_sequences(subtests):
    for seq in (
        0,
        -1,
        2**53,
        True,
        1.0,
        "1e3",
        "0x10",
        " 5 ",
        float("nan"),
        b"1",
    ):
        with subtests.test(f"{seq!r:.60}"):
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


def test_bad_cursors(subtests):
    for value in (
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
        "1.0",
        "1.",
        ".0-1",
        "1.1.0-1",
        "-1.0-1",
        "4294967296.0-1",
        "11111111111.0-1",
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
    ):
        with (
            subtests.test(f"{value!r:.60}"),
            pytest.raises(
                InvalidCursor, match="A cursor must be None, 'start', '0-0', the cursor of an item"
            ),
        ):
            parse_cursor(value)


@pytest.mark.parametrize(
    "value, attempt", [(None, None), ("start", None), ("5-7", None), ("0.5-7", 0), ("12.5-7", 12)]
)
def test_a_cursor_names_its_attempt(value, attempt):
    named, place = split_cursor(value)
    assert (named, place) == (attempt, parse_cursor(value))
    assert parse_cursor(value, attempt or 0) == place
    if attempt is not None:
        assert make_cursor(attempt, *place) == value
        # As it is, also in a URL.
        assert quote(value, safe="") == value
        with pytest.raises(InvalidCursor, match=f"attempt {attempt}, not to attempt 3"):
            parse_cursor(value, 3)


@pytest.mark.parametrize("pair", [(-1, 0), (0, -1), (2**63, 0), (0, 2**53), (True, 0), ("1", 1)])
def test_bad_cursor_pairs(pair):
    with pytest.raises(InvalidCursor):
        StreamCursor(*pair)
