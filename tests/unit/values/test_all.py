"""What holds for every value, and for the words that the functions of the server share with them."""

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

import ff_fast
from ff_fast import _library, types
from ff_fast.errors import (
    FFError,
    InvalidId,
    InvalidInput,
    InvalidType,
)
from ff_fast.types import (
    BackendConfig,
    BackendRetry,
    BackendTimeouts,
    BestEffortLiveConfig,
    ClaimPolicy,
    CompletionPayload,
    End,
    FailureReason,
    Frame,
    FrameKind,
    Gap,
    Handle,
    PatchKind,
    PendingWaitpoint,
    ReclaimGrant,
    ResumeCondition,
    ResumeSignal,
    RetryPolicy,
    StreamMode,
    SummaryDocument,
    SuspendOutcome,
    UsageDimensions,
    WaitpointHmac,
    WaitpointKind,
    WaitpointSpec,
)

from .samples import CANARY, EID, HANDLE, LIVE, TOKEN, UUID, VALUES

# -- all values ------------------------------------------------------------------------------------


def test_values_are_equal_by_content_hashable_and_picklable(subtests):
    for value in VALUES:
        with subtests.test(f"{value!r:.60}"):
            for twin in (pickle.loads(pickle.dumps(value)), copy.copy(value), copy.deepcopy(value)):
                assert type(twin) is type(value)
                assert twin == value
                assert hash(twin) == hash(value)
            assert value != object()
            assert not hasattr(value, "__dict__") or isinstance(value, str)


def test_values_are_frozen_and_replaced(subtests):
    for value in [v for v in VALUES if isinstance(v, types.Value)]:
        with subtests.test(f"{value!r:.60}"):
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


def test_every_value_class_is_a_dataclass_to_the_stdlib(subtests):
    for cls in VALUE_CLASSES:
        with subtests.test(f"{cls!r:.60}"):
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


def test_values_are_dataclasses_to_the_stdlib(subtests):
    for value in [v for v in VALUES if isinstance(v, types.Value)]:
        with subtests.test(f"{value!r:.60}"):
            names = [field.name for field in dataclasses.fields(value)]
            assert dataclasses.is_dataclass(value)
            assert dataclasses.replace(value) == value
            with pytest.raises(TypeError, match="no_such_field"):
                dataclasses.replace(value, no_such_field=1)
            assert list(dataclasses.asdict(value)) == names
            assert all(
                getattr(value, name) == part
                for name, part in zip(names, dataclasses.astuple(value), strict=True)
                if not dataclasses.is_dataclass(getattr(value, name))
                and not isinstance(part, tuple)
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
    helpers = {"DEFAULT_PAYLOAD_LIMIT", "LARGEST_PAYLOAD_LIMIT", "MAX_SECONDS", "MAX_U32"}
    assert set(types.__all__) - public == helpers | {
        *(
            "Value",
            "cursor_after",
            "duration_ms",
            "make_cursor",
            "milliseconds",
            "parse_cursor",
            "payload_bytes",
            "seconds",
            "split_cursor",
        )
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


# -- ids -------------------------------------------------------------------------------------------


def test_ids_in_values_are_canonical():
    assert CompletionPayload(EID.upper().replace("FP", "fp"), "success").execution_id == EID
    assert PendingWaitpoint(UUID.upper(), WaitpointHmac(TOKEN)).waitpoint_id == UUID
    with pytest.raises(InvalidId):
        ReclaimGrant(EID, "{fp:1}", "k", 1, "default")


# -- durations -------------------------------------------------------------------------------------


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


# -- words -----------------------------------------------------------------------------------------


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


def test_no_tool_of_dataclasses_shows_a_secret(subtests):
    for value in HOLDERS:
        with subtests.test(f"{value!r:.60}"):
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


def test_errors_of_values_are_errors_of_the_library():
    with pytest.raises(FFError):
        Frame(None, FrameKind.EVENT)
