"""The values that callers pass in and get back: handles, frames, modes, outcomes, configuration.

Names, wire tokens and defaults are those of FlowFabric's ``ff_core::backend``.  All values are
frozen, compare by content, and check themselves when they are made: a value that exists is valid.
Wrong types raise :class:`~ff_fast.errors.InvalidType`, wrong values
:class:`~ff_fast.errors.InvalidInput` or the more specific class that a docstring names.

``repr`` never shows a payload, a lease id, a token or a password.

Units: ``*_ms`` are whole milliseconds (Unix time where it is a point in time), other durations are
seconds.  Integers stop at 2^53-1, the largest that the server's Lua keeps exactly.
"""

from __future__ import annotations

import enum
import re
from operator import attrgetter
from types import MappingProxyType

from . import keys
from .errors import (
    MAX_INT,
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
    check_int,
)

TYPE_CHECKING = False  # typing itself takes milliseconds to import
if TYPE_CHECKING:
    import builtins
    from collections.abc import Callable, Iterable, Mapping
    from dataclasses import KW_ONLY
    from datetime import timedelta
    from typing import ClassVar, Self, TypeVar, dataclass_transform

    _T = TypeVar("_T")
else:

    def dataclass_transform(**_: object) -> object:
        return lambda cls: cls


MAX_PAYLOAD_BYTES = 65_536
"""Default limit of one payload; the server functions hold the same."""

MAX_U32 = 2**32 - 1
MAX_U64 = 2**64 - 1
MAX_SECONDS = 31_536_000.0
"""Longest duration accepted, a year: beyond it a timeout is a mistake in units."""

SUMMARY_NULL_SENTINEL = "__ff_null__"
"""Leaf of a merge patch that becomes JSON ``null``; a summary document never contains it."""


# -- checks ----------------------------------------------------------------------------------------


def _check_type(name: str, value: object, wanted: type[_T]) -> _T:
    if not isinstance(value, wanted):
        raise InvalidType(f"{name} must be {wanted.__name__}, not {type(value).__name__}.")
    return value


def _check_flag(name: str, value: object) -> None:
    if type(value) is not bool:
        raise InvalidType(f"{name} must be bool, not {type(value).__name__}.")


def _check_optional_int(name: str, value: object, low: int, high: int) -> None:
    if value is not None:
        check_int(name, value, low, high)


def _seconds(name: str, value: object, *, zero: bool) -> float:
    """Return a duration in seconds; *value* is a number of seconds or a ``timedelta``."""
    if type(value) not in (int, float):
        # Asked for by its method: datetime would be imported for this alone.
        total: Callable[[], float] | None = getattr(value, "total_seconds", None)
        if total is None:
            raise InvalidType(
                f"{name} must be a number of seconds or a timedelta, not {type(value).__name__}."
            )
        value = total()
    if not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise InvalidInput(f"{name} must be from 0 to {MAX_SECONDS:.0f} seconds.")
    if value == 0 and not zero:
        raise InvalidInput(f"{name} must be longer than 0 seconds.")
    return float(value)


def duration_ms(name: str, value: object) -> int:
    """Return a duration in whole milliseconds; *value* is seconds, a ``timedelta``, or None for 0.

    Raises:
        InvalidInput: It is negative, not finite, or longer than a year.
        InvalidType: It is neither a number nor a ``timedelta``.
    """
    return 0 if value is None else round(_seconds(name, value, zero=True) * 1000)


def payload_bytes(payload: object, name: str = "payload") -> bytes:
    """Return a payload as ``bytes``, copied if the caller could change it later.

    Accepts ``bytes``, ``bytearray``, ``memoryview`` and ``str`` (encoded as UTF-8).

    Raises:
        InvalidPayload: Text that cannot be encoded (a lone surrogate).
        InvalidType: Anything else.
    """
    if isinstance(payload, (bytes, bytearray, memoryview)):
        return bytes(payload)
    if not isinstance(payload, str):
        raise InvalidType(
            f"{name} must be bytes, bytearray, memoryview or str, not {type(payload).__name__}."
        )
    encoded = _utf8(payload)
    if encoded is None:
        raise InvalidPayload(f"{name} contains a lone surrogate; encode the text yourself.")
    return encoded


def _utf8(text: str) -> bytes | None:
    # The error is dropped here, because it holds the text and would be chained to the next one.
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return None


# -- frozen values ---------------------------------------------------------------------------------
#
# What ``dataclasses`` would do with frozen=True and slots=True.  Importing it (with inspect, ast and
# dis) and decorating thirty classes takes 25 ms, close to half of what importing ff_fast may take;
# this takes 3 ms.  Type checkers see frozen dataclasses.

_set = object.__setattr__
"""Stores a normalised field of a value that is being made."""


class _ValueType(type):
    """Turns annotations into slots and, unless there is one, an ``__init__``, as a dataclass does."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]
    ) -> _ValueType:
        fields: list[str] = []
        if bases:
            parameters = ["self"]
            defaults: dict[str, object] = {"_set": _set}
            annotations: dict[str, str] = namespace.get("__annotations__", {})  # type: ignore[assignment]
            for field, annotation in annotations.items():
                if annotation == "KW_ONLY":
                    parameters.append("*")
                elif not annotation.startswith("ClassVar"):
                    fields.append(field)
                    if field in namespace:
                        defaults[f"_{field}"] = namespace.pop(field)
                        parameters.append(f"{field}=_{field}")
                    else:
                        parameters.append(field)
            if "__init__" not in namespace:
                body = [f"_set(self, {field!r}, {field})" for field in fields]
                if "__post_init__" in namespace:
                    body.append("self.__post_init__()")
                # Only names from the class statements below get in here.
                source = f"def __init__({', '.join(parameters)}):\n " + "\n ".join(body)
                exec(source, defaults, namespace)  # noqa: S102
                namespace["__init__"].__qualname__ = f"{name}.__init__"  # type: ignore[attr-defined]
            namespace["_key"] = attrgetter(*fields)
            namespace["__match_args__"] = tuple(fields)
        namespace["__slots__"] = tuple(fields)
        return super().__new__(cls, name, bases, namespace)


@dataclass_transform(frozen_default=True)
class Value(metaclass=_ValueType):
    """Base of the values below: frozen, compared by content, copied by reference."""

    _key: ClassVar[Callable[[object], object]]
    _secret: ClassVar[tuple[str, ...]] = ()  # fields that repr leaves out
    __match_args__: ClassVar[tuple[str, ...]] = ()

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; use replace().")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen.")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return type(self)._key(self) == type(self)._key(other)

    def __hash__(self) -> int:
        return hash((type(self), type(self)._key(self)))  # noqa: SLF001 - its own

    def __repr__(self) -> str:
        shown = (
            f"{name}={_shown(value)}"
            for name, value in self._fields().items()
            if name not in self._secret
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _remake, (type(self), self._fields())

    def replace(self, **changes: object) -> Self:
        """Return a copy with some fields changed, checked like any other value."""
        return _remake(type(self), {**self._fields(), **changes})

    __replace__ = replace

    def _fields(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in type(self).__match_args__}


def _remake(cls: Callable[..., _T], fields: dict[str, object]) -> _T:
    return cls(**fields)


def _shown(value: object) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else repr(value)


# -- stream modes ----------------------------------------------------------------------------------


class PatchKind(Value):
    """How the payload of a summary frame changes the document.

    Made by name: ``PatchKind.JSON_MERGE_PATCH`` (RFC 7396), or ``PatchKind.STRING_APPEND(pointer)``,
    whose payload is text that is appended to the string at a JSON Pointer (RFC 6901).

    Attributes:
        wire: ``json-merge-patch`` or ``string-append``.
        pointer: Where text is appended; None for merge patches.
    """

    wire: str
    pointer: str | None = None

    JSON_MERGE_PATCH: ClassVar[PatchKind]

    def __post_init__(self) -> None:
        if self.wire == "json-merge-patch":
            if self.pointer is not None:
                raise InvalidInput("A JSON merge patch has no pointer.")
            return
        if self.wire != "string-append":
            raise InvalidInput("A patch kind is JSON_MERGE_PATCH or STRING_APPEND(pointer).")
        pointer = _check_type("pointer", self.pointer, str)
        encoded = _utf8(pointer)
        if encoded is None or len(encoded) > 1024:
            raise InvalidInput("pointer must be at most 1024 bytes of UTF-8.")
        if re.fullmatch(r"(?:/(?:[^~/]|~[01])*)*", pointer, re.DOTALL) is None:
            raise InvalidInput("pointer must be a JSON Pointer such as '/text' (RFC 6901).")

    @classmethod
    def STRING_APPEND(cls, pointer: str) -> PatchKind:  # noqa: N802 - beside JSON_MERGE_PATCH
        """Append text to the string at *pointer*, for instance ``/text``.

        Raises:
            InvalidInput: *pointer* is not a JSON Pointer, or longer than 1024 bytes.
        """
        return cls("string-append", pointer)

    def wire_str(self) -> str:
        """Return the stable token of the kind."""
        return self.wire


PatchKind.JSON_MERGE_PATCH = PatchKind("json-merge-patch")


class BestEffortLiveConfig(Value):
    """How much of a best-effort stream stays readable.

    The window holds ``clamp(ceil(rate * ttl * 2), maxlen_floor, maxlen_ceiling)`` frames, where the
    rate is a moving average of the observed frames per second.

    Attributes:
        ttl_ms: How long a frame should stay visible, 1 to 2^32-1 ms; 5,000 to 30,000 is usual.
        maxlen_floor: Smallest window in frames, from 1.
        maxlen_ceiling: Largest window in frames, from ``maxlen_floor``.
        ema_alpha: Weight of the latest observation, above 0 and at most 1.
    """

    ttl_ms: int
    maxlen_floor: int = 64
    maxlen_ceiling: int = 16_384
    ema_alpha: float = 0.2

    def __post_init__(self) -> None:
        check_int("ttl_ms", self.ttl_ms, 1, MAX_U32)
        check_int("maxlen_floor", self.maxlen_floor, 1, MAX_U32)
        check_int("maxlen_ceiling", self.maxlen_ceiling, 1, MAX_U32)
        if self.maxlen_ceiling < self.maxlen_floor:
            raise InvalidInput("maxlen_ceiling must not be below maxlen_floor.")
        if type(self.ema_alpha) not in (int, float):
            raise InvalidType(f"ema_alpha must be a float, not {type(self.ema_alpha).__name__}.")
        if not 0 < self.ema_alpha <= 1:  # also refuses NaN
            raise InvalidInput("ema_alpha must be above 0 and at most 1.")
        _set(self, "ema_alpha", float(self.ema_alpha))

    @classmethod
    def with_ttl(cls, ttl_ms: int) -> BestEffortLiveConfig:
        """Return the defaults with this ``ttl_ms``."""
        return cls(ttl_ms)

    def with_maxlen_floor(self, floor: int) -> BestEffortLiveConfig:
        """Return a copy with another ``maxlen_floor``."""
        return BestEffortLiveConfig(self.ttl_ms, floor, self.maxlen_ceiling, self.ema_alpha)

    def with_maxlen_ceiling(self, ceiling: int) -> BestEffortLiveConfig:
        """Return a copy with another ``maxlen_ceiling``."""
        return BestEffortLiveConfig(self.ttl_ms, self.maxlen_floor, ceiling, self.ema_alpha)

    def with_ema_alpha(self, alpha: float) -> BestEffortLiveConfig:
        """Return a copy with another ``ema_alpha``."""
        return BestEffortLiveConfig(self.ttl_ms, self.maxlen_floor, self.maxlen_ceiling, alpha)


class StreamMode(Value):
    """How durable a frame is.  The mode is chosen per frame; a stream may mix them.

    Made by name: :meth:`durable`, :meth:`durable_summary`, :meth:`best_effort_live`,
    :meth:`best_effort_live_with_config`.

    Attributes:
        wire: ``durable``, ``summary`` or ``best_effort``.
        patch_kind: For ``summary`` alone: how payloads change the document.
        config: For ``best_effort`` alone: how much stays readable.
    """

    wire: str = "durable"
    patch_kind: PatchKind | None = None
    config: BestEffortLiveConfig | None = None

    _DURABLE: ClassVar[StreamMode]

    def __post_init__(self) -> None:
        if self.wire not in ("durable", "summary", "best_effort"):
            raise InvalidInput("A mode is durable, summary or best_effort.")
        if self.wire == "summary":
            _check_type("patch_kind", self.patch_kind, PatchKind)
        elif self.patch_kind is not None:
            raise InvalidInput(f"A {self.wire} mode has no patch_kind.")
        if self.wire == "best_effort":
            _check_type("config", self.config, BestEffortLiveConfig)
        elif self.config is not None:
            raise InvalidInput(f"A {self.wire} mode has no config.")

    @classmethod
    def durable(cls) -> StreamMode:
        """Every frame is an entry of the log and stays until the retention limit."""
        return cls._DURABLE

    @classmethod
    def durable_summary(cls, patch_kind: PatchKind = PatchKind.JSON_MERGE_PATCH) -> StreamMode:
        """Every frame is a patch of the rolling summary document, which is kept."""
        return cls("summary", patch_kind=patch_kind)

    @classmethod
    def best_effort_live(cls, ttl_ms: int) -> StreamMode:
        """Frames stay readable for about *ttl_ms*; 5,000 to 30,000 ms is usual."""
        return cls("best_effort", config=BestEffortLiveConfig(ttl_ms))

    @classmethod
    def best_effort_live_with_config(cls, config: BestEffortLiveConfig) -> StreamMode:
        """As :meth:`best_effort_live`, with every knob given."""
        return cls("best_effort", config=config)

    def wire_str(self) -> str:
        """Return the stable token that entries carry in their ``mode`` field."""
        return self.wire


StreamMode._DURABLE = StreamMode()  # noqa: SLF001 - the class's own constant


class TailVisibility(enum.Enum):
    """Which frames a reader sees.  Summary frames are durable, since the document is."""

    ALL = ""
    EXCLUDE_BEST_EFFORT = "exclude_best_effort"

    def wire_str(self) -> str:
        """Return the stable token; empty means no filter."""
        return self.value


# -- frames ----------------------------------------------------------------------------------------


class FrameKind(enum.Enum):
    """Coarse class of a frame; its value is the frame type of a frame that names none."""

    STDOUT = "stdout"
    STDERR = "stderr"
    EVENT = "event"
    BLOB = "blob"

    def wire_str(self) -> str:
        """Return the frame type that the kind stands for."""
        return self.value


class Frame(Value):
    """One frame to append.

    Args:
        bytes: The payload; as :func:`payload_bytes` takes it.  Its size is checked on append.
        kind: Coarse class.
        seq: The sequence the frame must get, 1 to 2^53-1; None takes the next one.  With it, a
            repeated append is recognised and stored once.
        frame_type: One line of text of at most 256 bytes; empty means the kind's own name.
        correlation_id: One line of text of at most 256 bytes; empty and None are the same.
        mode: How durable the frame is.

    Raises:
        InvalidPayload: See :func:`payload_bytes`.
        InvalidSequence: *seq* is anything but an ``int`` in its range.
    """

    bytes: builtins.bytes
    kind: FrameKind
    _: KW_ONLY
    seq: int | None = None
    frame_type: str = ""
    correlation_id: str | None = None
    mode: StreamMode = StreamMode.durable()

    def __post_init__(self) -> None:
        _set(self, "bytes", payload_bytes(self.bytes))
        _check_type("kind", self.kind, FrameKind)
        if self.seq is not None:
            check_int("seq", self.seq, 1, MAX_INT, InvalidSequence)
        keys.free_text("frame_type", self.frame_type, empty=True, error=InvalidInput)
        if self.correlation_id is not None:
            keys.free_text("correlation_id", self.correlation_id, empty=True, error=InvalidInput)
            if not self.correlation_id:
                _set(self, "correlation_id", None)
        _check_type("mode", self.mode, StreamMode)

    @property
    def wire_type(self) -> str:
        """The frame type as stored: ``frame_type``, or the kind's own name."""
        return self.frame_type or self.kind.value


class AppendFrameOutcome(Value):
    """What is stored after an append or a flush.

    Attributes:
        stream_id: Entry id of the last frame, ``<ms>-<sequence>``.
        frame_count: Frames appended in this attempt so far.
        summary_version: Version of the summary; None when no summary frame was appended.
    """

    stream_id: str
    frame_count: int
    summary_version: int | None = None

    def __post_init__(self) -> None:
        _check_type("stream_id", self.stream_id, str)
        check_int("frame_count", self.frame_count, 0, MAX_INT)
        _check_optional_int("summary_version", self.summary_version, 0, MAX_INT)

    def with_summary_version(self, version: int) -> AppendFrameOutcome:
        """Return a copy with this summary version."""
        return AppendFrameOutcome(self.stream_id, self.frame_count, version)


class SummaryDocument(Value):
    """The rolling summary of an attempt at one moment.

    Attributes:
        document_json: The document, JSON in UTF-8, exact; it never contains the null sentinel.
        version: Number of patches folded in, from 1.
        patch_kind: How the latest patch was applied.
        last_updated_ms: When the latest patch was applied.
        first_applied_ms: When the first one was.
        cursor: Tailing from here continues the document without hole or repeat.
    """

    document_json: bytes
    version: int
    patch_kind: PatchKind
    last_updated_ms: int
    first_applied_ms: int
    cursor: str = "0-0"

    def __post_init__(self) -> None:
        _check_type("document_json", self.document_json, bytes)
        check_int("version", self.version, 1, MAX_INT)
        _check_type("patch_kind", self.patch_kind, PatchKind)
        check_int("last_updated_ms", self.last_updated_ms, 0, MAX_INT)
        check_int("first_applied_ms", self.first_applied_ms, 0, MAX_INT)
        parse_cursor(self.cursor)


class Gap(Value):
    """Frames that a reader cannot have any more, delivered in their place.

    Attributes:
        first_missing: Sequence of the first frame that is missing.
        next_sequence: Sequence that the reader goes on with.
        reason: Why, as a word: ``trimmed``, ``expired``, ``fell_behind``, ``cursor_ahead`` and so on.
    """

    first_missing: int
    next_sequence: int
    reason: str

    def __post_init__(self) -> None:
        check_int("first_missing", self.first_missing, 1, MAX_INT + 1)
        check_int("next_sequence", self.next_sequence, 1, MAX_INT + 1)
        _check_type("reason", self.reason, str)


class End(Value):
    """The stream has ended; nothing follows.

    Attributes:
        reason: How the attempt ended, as a word; ``producer_lost`` when its lease ran out.
    """

    reason: str

    def __post_init__(self) -> None:
        _check_type("reason", self.reason, str)


# -- cursors ---------------------------------------------------------------------------------------


class StreamCursor(tuple[int, int]):
    """A place in a stream: everything up to and including this frame has been read.

    A pair ``(milliseconds, sequence)`` whose ``str`` is the entry id ``<milliseconds>-<sequence>``;
    ``(0, 0)`` is the start.
    """

    __slots__ = ()

    def __new__(cls, ms: int, sequence: int) -> StreamCursor:
        check_int("milliseconds", ms, 0, 2**63 - 1, InvalidCursor)
        check_int("sequence", sequence, 0, MAX_INT, InvalidCursor)
        return super().__new__(cls, (ms, sequence))

    def __getnewargs__(self) -> tuple[int, int]:
        return self[0], self[1]

    @property
    def ms(self) -> int:
        """Milliseconds of the entry id."""
        return self[0]

    @property
    def sequence(self) -> int:
        """Sequence of the last frame read; 0 at the start."""
        return self[1]

    def __str__(self) -> str:
        return f"{self[0]}-{self[1]}"

    def __repr__(self) -> str:
        return f"StreamCursor({self[0]}, {self[1]})"


_START = StreamCursor(0, 0)
_CURSOR = r"([0-9]{1,20})-([0-9]{1,16})"


def parse_cursor(value: object) -> StreamCursor:
    """Return the cursor that *value* names, as a pair ``(milliseconds, sequence)``.

    Args:
        value: None, ``"start"`` or ``"0-0"`` for the start, an entry id
            ``"<milliseconds>-<sequence>"`` as frames carry it, or a :class:`StreamCursor`.

    Raises:
        InvalidCursor: Anything else.  ``-``, ``+``, ``$`` and ``end`` are not accepted: a reader
            starts at a frame it can name.
    """
    if value is None or value == "start":
        return _START
    if isinstance(value, StreamCursor):
        return value
    found = re.fullmatch(_CURSOR, value) if isinstance(value, str) else None
    if found is None:
        raise InvalidCursor
    ms, sequence = int(found[1]), int(found[2])
    if ms >= 2**63 or sequence > MAX_INT:
        raise InvalidCursor
    return StreamCursor(ms, sequence)


# -- handles ---------------------------------------------------------------------------------------


class BackendTag(enum.Enum):
    """Which kind of backend made a handle; the value is its byte in the encoding.

    Only ``VALKEY`` is implemented here; the others are known so that their handles are recognised.
    """

    VALKEY = 1
    POSTGRES = 2
    SQLITE = 3


class HandleKind(enum.Enum):
    """How a handle came about: by a claim, by resuming, by suspending, or by reclaiming."""

    FRESH = "fresh"
    RESUMED = "resumed"
    SUSPENDED = "suspended"
    RECLAIMED = "reclaimed"


class HandleOpaque:
    """The bytes of a handle.  They contain the lease id, so ``repr`` shows their number only."""

    __slots__ = ("_data", "_decoded")

    def __init__(self, data: bytes) -> None:
        self._data = _check_type("opaque", data, bytes)
        self._decoded: HandleFields | None = None

    def as_bytes(self) -> bytes:
        """Return the bytes."""
        return self._data

    def decoded(self) -> HandleFields:
        """Return what the bytes say; see :class:`Handle` for their layout.  Decoded once.

        Raises:
            InvalidHandle: The bytes are truncated, followed by others, or not what the table says.
            HandleFromOtherBackend: They are of another kind of backend.
        """
        if self._decoded is None:
            self._decoded = _decode_handle(self._data)
        return self._decoded

    def __eq__(self, other: object) -> bool:
        return self._data == other._data if isinstance(other, HandleOpaque) else NotImplemented

    def __hash__(self) -> int:
        return hash((HandleOpaque, self._data))

    def __reduce__(self) -> tuple[type[HandleOpaque], tuple[bytes]]:
        return HandleOpaque, (self._data,)

    def __repr__(self) -> str:
        return f"HandleOpaque(<{len(self._data)} bytes>)"


class HandleFields(Value):
    """What a handle says.

    Attributes:
        execution_id: Canonical execution id.
        attempt_index: Attempt, from 0.
        attempt_id: Id of the attempt.
        lease_id: Id of the lease, a secret.
        lease_epoch: Grant of ownership, from 1; 0 means never leased.
        lease_ttl_ms: Length of the lease as granted.
        lane_id: Lane it was claimed from.
        worker_instance_id: Worker that claimed it.
    """

    _secret: ClassVar[tuple[str, ...]] = ("lease_id",)

    _: KW_ONLY
    execution_id: str
    attempt_index: int
    attempt_id: str
    lease_id: str
    lease_epoch: int
    lease_ttl_ms: int
    lane_id: str
    worker_instance_id: str

    def __post_init__(self) -> None:
        _set(self, "execution_id", keys.canonical_execution_id(self.execution_id))
        keys.attempt_index(self.attempt_index)
        keys.opaque_id("attempt_id", self.attempt_id)
        keys.opaque_id("lease_id", self.lease_id)
        check_int("lease_epoch", self.lease_epoch, 0, MAX_INT)
        check_int("lease_ttl_ms", self.lease_ttl_ms, 1, MAX_INT)
        keys.lane_id(self.lane_id)
        keys.free_text("worker_instance_id", self.worker_instance_id)


class Handle(Value):
    """Proof that a worker owns an attempt; every call of the worker takes it.

    The opaque bytes are, with integers little-endian and a string as u32 length and UTF-8:

    ======  ==================================================================
    v2      ``02 01 <backend tag>`` and the body; this is what is written
    v1      ``01`` and the body; read only, and always of Valkey
    body    execution_id str, attempt_index u32, attempt_id str, lease_id str,
            lease_epoch u64, lease_ttl_ms u64, lane_id str,
            worker_instance_id str, and nothing after it
    ======  ==================================================================

    ``kind`` is not part of the bytes.
    """

    backend: BackendTag
    kind: HandleKind
    opaque: HandleOpaque

    def __post_init__(self) -> None:
        _check_type("backend", self.backend, BackendTag)
        _check_type("kind", self.kind, HandleKind)
        if isinstance(self.opaque, bytes):
            _set(self, "opaque", HandleOpaque(self.opaque))
        _check_type("opaque", self.opaque, HandleOpaque)

    @classmethod
    def encode(
        cls,
        *,
        kind: HandleKind = HandleKind.FRESH,
        execution_id: str,
        attempt_index: int,
        attempt_id: str,
        lease_id: str,
        lease_epoch: int,
        lease_ttl_ms: int,
        lane_id: str,
        worker_instance_id: str,
    ) -> Handle:
        """Return the handle for what a claim answered.

        Args:
            kind: How ownership came about.
            execution_id: Execution id.
            attempt_index: Attempt, from 0.
            attempt_id: 1 to 64 letters, digits, ``_`` or ``-``; usually a UUID.
            lease_id: Likewise.
            lease_epoch: 0 to 2^53-1.
            lease_ttl_ms: 1 to 2^53-1.
            lane_id: 1 to 64 printable ASCII characters.
            worker_instance_id: One line of text of at most 256 bytes.

        Raises:
            InvalidInput: A value is out of its range.
        """
        fields = HandleFields(
            execution_id=execution_id,
            attempt_index=attempt_index,
            attempt_id=attempt_id,
            lease_id=lease_id,
            lease_epoch=lease_epoch,
            lease_ttl_ms=lease_ttl_ms,
            lane_id=lane_id,
            worker_instance_id=worker_instance_id,
        )
        data = b"".join(
            (
                bytes((2, 1, BackendTag.VALKEY.value)),
                _put_text(fields.execution_id),
                fields.attempt_index.to_bytes(4, "little"),
                _put_text(fields.attempt_id),
                _put_text(fields.lease_id),
                fields.lease_epoch.to_bytes(8, "little"),
                fields.lease_ttl_ms.to_bytes(8, "little"),
                _put_text(fields.lane_id),
                _put_text(fields.worker_instance_id),
            )
        )
        return cls(BackendTag.VALKEY, kind, HandleOpaque(data))

    def fields(self) -> HandleFields:
        """Return what the handle says; decoded once.

        Raises:
            InvalidHandle: See :meth:`HandleOpaque.decoded`.
            HandleFromOtherBackend: The handle is of another kind of backend.
        """
        if self.backend is not BackendTag.VALKEY:
            raise HandleFromOtherBackend
        return self.opaque.decoded()

    def __repr__(self) -> str:
        try:
            fields = self.fields()
        except InvalidInput:
            return f"Handle(kind={self.kind.value}, not decodable, {self.opaque!r})"
        return (
            f"Handle(kind={self.kind.value}, execution_id={fields.execution_id},"
            f" attempt_index={fields.attempt_index})"
        )


def _put_text(text: str) -> bytes:
    encoded = text.encode("utf-8")
    return len(encoded).to_bytes(4, "little") + encoded


class _HandleReader:
    """Cursor over a handle's bytes that never reads past their end."""

    __slots__ = ("at", "data")

    def __init__(self, data: bytes, at: int) -> None:
        self.data = data
        self.at = at

    def take(self, size: int) -> bytes:
        end = self.at + size
        if end > len(self.data):
            raise InvalidHandle
        taken = self.data[self.at : end]
        self.at = end
        return taken

    def number(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def text(self) -> str:
        return self.take(self.number(4)).decode("utf-8")


def _decode_handle(data: bytes) -> HandleFields:
    if data[:1] == b"\x01":
        body = 1
    elif data[:2] == b"\x02\x01" and len(data) > 2:
        if data[2] in (BackendTag.POSTGRES.value, BackendTag.SQLITE.value):
            raise HandleFromOtherBackend
        if data[2] != BackendTag.VALKEY.value:
            raise InvalidHandle
        body = 3
    else:
        raise InvalidHandle
    fields = _decode_handle_body(_HandleReader(data, body))
    if fields is None:
        # Raised here and not where it was found, so that no error with the text in it is chained.
        raise InvalidHandle
    return fields


def _decode_handle_body(reader: _HandleReader) -> HandleFields | None:
    try:
        fields = HandleFields(
            execution_id=reader.text(),
            attempt_index=reader.number(4),
            attempt_id=reader.text(),
            lease_id=reader.text(),
            lease_epoch=reader.number(8),
            lease_ttl_ms=reader.number(8),
            lane_id=reader.text(),
            worker_instance_id=reader.text(),
        )
    except (InvalidInput, UnicodeDecodeError):
        return None
    return fields if reader.at == len(reader.data) else None


# -- claiming and leases ---------------------------------------------------------------------------


class CapabilitySet(Value):
    """What a worker can do, or what an execution needs: a set of tokens.

    Args:
        tokens: Any iterable of text.  A token has no comma, no blank, no control character and is
            not empty; at most 256 of them, and at most 4096 bytes as CSV.

    Attributes:
        tokens: The tokens, each once, sorted.

    Raises:
        InvalidCapabilities: A token is malformed, or there are too many.
        InvalidType: *tokens* is a single text, or not an iterable of text.
    """

    tokens: tuple[str, ...] = ()

    def __init__(self, tokens: Iterable[str] = ()) -> None:
        if isinstance(tokens, (str, bytes)) or not hasattr(tokens, "__iter__"):
            raise InvalidType(f"tokens must be a list of str, not {type(tokens).__name__}.")
        unique: set[str] = set()
        for token in tokens:
            if not isinstance(token, str):
                raise InvalidType(f"A capability must be str, not {type(token).__name__}.")
            if re.fullmatch(_CAPABILITY, token) is None or _utf8(token) is None:
                raise InvalidCapabilities
            unique.add(token)
            if len(unique) > 256:
                raise InvalidCapabilities
        _set(self, "tokens", tuple(sorted(unique)))
        if len(self.csv()) > 4096:
            raise InvalidCapabilities("Capabilities must take at most 4096 bytes, commas included.")

    def is_empty(self) -> bool:
        """Return whether there is no token."""
        return not self.tokens

    def csv(self) -> bytes:
        """Return the tokens as the server functions take them: sorted, joined by commas."""
        return ",".join(self.tokens).encode("utf-8")


_CAPABILITY = r"[^,\x00-\x20\x7f]+"


class ClaimPolicy(Value):
    """How long a claim may wait for work.

    Attributes:
        max_wait: Seconds, from 0; None answers at once.
    """

    max_wait: float | None = None

    def __post_init__(self) -> None:
        if self.max_wait is not None:
            _set(self, "max_wait", _seconds("max_wait", self.max_wait, zero=True))

    @classmethod
    def immediate(cls) -> ClaimPolicy:
        """Answer at once."""
        return cls()

    @classmethod
    def with_max_wait(cls, max_wait: float | timedelta) -> ClaimPolicy:
        """Wait for work at most so long: seconds, or a ``timedelta``."""
        return cls(_seconds("max_wait", max_wait, zero=True))


class LeaseRenewal(Value):
    """A renewed lease.

    Attributes:
        expires_at_ms: When it now expires, by the server's clock.
        lease_epoch: Its epoch; renewing does not change it.
        cancel_requested: Whether the worker is asked to stop.
    """

    expires_at_ms: int
    lease_epoch: int
    cancel_requested: bool = False

    def __post_init__(self) -> None:
        check_int("expires_at_ms", self.expires_at_ms, 0, MAX_INT)
        check_int("lease_epoch", self.lease_epoch, 0, MAX_INT)
        _check_flag("cancel_requested", self.cancel_requested)


class ReclaimGrant(Value):
    """Permission to take over an execution whose worker was lost.

    Attributes:
        execution_id: Canonical execution id.
        partition_key: Its hash tag, ``{fp:N}``.
        grant_key: Key that holds the grant.
        expires_at_ms: When the grant expires, by the server's clock.
        lane_id: Lane of the execution.
    """

    execution_id: str
    partition_key: str
    grant_key: str
    expires_at_ms: int
    lane_id: str

    def __post_init__(self) -> None:
        _set(self, "execution_id", keys.canonical_execution_id(self.execution_id))
        if self.partition_key != keys.slot_tag_of(self.execution_id):
            raise InvalidId("partition_key must be the hash tag of the execution id.")
        _check_type("grant_key", self.grant_key, str)
        check_int("expires_at_ms", self.expires_at_ms, 0, MAX_INT)
        keys.lane_id(self.lane_id)


class ReclaimToken(Value):
    """What a search for lost workers returns, and a reclaim takes."""

    grant: ReclaimGrant

    def __post_init__(self) -> None:
        _check_type("grant", self.grant, ReclaimGrant)


# -- suspension and signals ------------------------------------------------------------------------


class WaitpointKind(enum.Enum):
    """What a waitpoint matches signals by."""

    SIGNAL_NAME = "signal_name"
    CORRELATION_ID = "correlation_id"
    EXTERNAL = "external"


class WaitpointHmac:
    """Bearer token of a waitpoint, ``<kid>:<40 lower-case hex digits>``.

    Printing it in any way shows the key id alone; :meth:`reveal` returns the text.  Comparison
    takes the same time wherever two tokens differ.

    Raises:
        InvalidInput: The text has another shape.
    """

    __slots__ = ("_text",)

    def __init__(self, token: str) -> None:
        _check_type("token", token, str)
        if re.fullmatch(_WAITPOINT_HMAC, token) is None:
            raise InvalidInput("A waitpoint token must be '<kid>:' and 40 lower-case hex digits.")
        self._text = token

    def reveal(self) -> str:
        """Return the token itself; for sending it, never for showing it."""
        return self._text

    as_str = reveal

    @property
    def kid(self) -> str:
        """Id of the key that signed the token; not a secret."""
        return self._text.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.kid}:<REDACTED:len=40>"

    def __repr__(self) -> str:
        return f"WaitpointHmac('{self}')"

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    def __eq__(self, other: object) -> bool:
        # Imported here: hmac loads OpenSSL, and most processes never compare a token.
        from hmac import compare_digest  # noqa: PLC0415

        if not isinstance(other, WaitpointHmac):
            return NotImplemented
        return compare_digest(self._text.encode("ascii"), other._text.encode("ascii"))

    def __hash__(self) -> int:
        return hash((WaitpointHmac, self._text))


_WAITPOINT_HMAC = r"[!-9;-~]{1,64}:[0-9a-f]{40}"


class PendingWaitpoint(Value):
    """A waitpoint that was created before the execution suspends on it."""

    waitpoint_id: str
    hmac_token: WaitpointHmac

    def __post_init__(self) -> None:
        _set(self, "waitpoint_id", keys.canonical_uuid("waitpoint_id", self.waitpoint_id))
        _check_type("hmac_token", self.hmac_token, WaitpointHmac)


class WaitpointSpec(Value):
    """One waitpoint of a suspension.

    Attributes:
        kind: What it matches by.
        matcher: The name or id to match.
        hmac_token: Its token.
    """

    kind: WaitpointKind
    matcher: bytes
    hmac_token: WaitpointHmac

    def __post_init__(self) -> None:
        _check_type("kind", self.kind, WaitpointKind)
        _set(self, "matcher", payload_bytes(self.matcher, "matcher"))
        _check_type("hmac_token", self.hmac_token, WaitpointHmac)


class ResumeSignal(Value):
    """A signal that took part in resuming an execution.

    Attributes:
        signal_id: Id of the signal.
        signal_name: Name it was sent under.
        signal_category: Category it was sent under.
        source_type: What kind of source sent it.
        source_identity: Which source sent it.
        correlation_id: Correlation id; may be empty.
        accepted_at: When the server accepted it, Unix milliseconds.
        payload: Its payload; None when it had none.
    """

    signal_id: str
    signal_name: str
    signal_category: str
    source_type: str
    source_identity: str
    correlation_id: str
    accepted_at: int
    payload: bytes | None = None

    def __post_init__(self) -> None:
        _set(self, "signal_id", keys.canonical_uuid("signal_id", self.signal_id))
        for name in (
            "signal_name",
            "signal_category",
            "source_type",
            "source_identity",
            "correlation_id",
        ):
            _check_type(name, getattr(self, name), str)
        check_int("accepted_at", self.accepted_at, 0, MAX_INT)
        if self.payload is not None:
            _set(self, "payload", payload_bytes(self.payload))


# -- ending an execution ---------------------------------------------------------------------------


class FailureReason(Value):
    """Why an attempt failed.

    Attributes:
        message: Text for people, at most 64 KiB of UTF-8.  It is stored and shown as it is.
        detail: Structured detail, at most 64 KiB; ``repr`` shows its size only.
    """

    message: str
    detail: bytes | None = None

    def __post_init__(self) -> None:
        encoded = _utf8(_check_type("message", self.message, str))
        if encoded is None:
            raise InvalidInput("message contains a lone surrogate; replace it before reporting.")
        if self.detail is not None:
            _set(self, "detail", payload_bytes(self.detail, "detail"))
        for data in (encoded, self.detail or b""):
            if len(data) > MAX_PAYLOAD_BYTES:
                raise PayloadTooLarge(MAX_PAYLOAD_BYTES, len(data))

    @classmethod
    def with_detail(cls, message: str, detail: bytes) -> FailureReason:
        """Return a reason with structured detail."""
        return cls(message, detail)


class FailureClass(enum.Enum):
    """What kind of failure it was; decides whether the execution is retried."""

    TRANSIENT = "transient"
    PERMANENT = "permanent"
    INFRA_CRASH = "infra_crash"
    TIMEOUT = "timeout"
    CANCELLED = "cancelled"


class FailOutcome(Value):
    """What a failure led to: a retry at some time, or the end.

    Attributes:
        retry_scheduled: Whether the execution will be retried.
        delay_until_ms: When it can be claimed again, Unix milliseconds; None when it ended.
    """

    retry_scheduled: bool
    delay_until_ms: int | None = None

    TERMINAL_FAILED: ClassVar[FailOutcome]

    def __post_init__(self) -> None:
        _check_flag("retry_scheduled", self.retry_scheduled)
        if self.retry_scheduled:
            check_int("delay_until_ms", self.delay_until_ms, 0, MAX_INT)
        elif self.delay_until_ms is not None:
            raise InvalidInput("An execution that ended has no delay_until_ms.")

    @classmethod
    def RETRY_SCHEDULED(cls, delay_until_ms: int) -> FailOutcome:  # noqa: N802 - a variant
        """Return the outcome "retried from *delay_until_ms* on"."""
        return cls(True, delay_until_ms)


FailOutcome.TERMINAL_FAILED = FailOutcome(False)


class CompletionPayload(Value):
    """One execution that ended, as subscribers see it.

    Attributes:
        execution_id: Canonical execution id.
        outcome: How it ended, as a word.
        payload_bytes: Its result; None when it has none.
        produced_at_ms: When it ended, by the server's clock; 0 when unknown.
        flow_id: The flow it belongs to; None for a solo execution.
        cursor: Where a subscription goes on behind it; None outside a subscription.
    """

    execution_id: str
    outcome: str
    payload_bytes: bytes | None = None
    produced_at_ms: int = 0
    flow_id: str | None = None
    cursor: str | None = None

    def __post_init__(self) -> None:
        _set(self, "execution_id", keys.canonical_execution_id(self.execution_id))
        _check_type("outcome", self.outcome, str)
        if self.payload_bytes is not None:
            _set(self, "payload_bytes", payload_bytes(self.payload_bytes, "payload_bytes"))
        check_int("produced_at_ms", self.produced_at_ms, 0, MAX_INT)
        if self.flow_id is not None:
            _set(self, "flow_id", keys.canonical_uuid("flow_id", self.flow_id))

    def with_flow_id(self, flow_id: str) -> CompletionPayload:
        """Return a copy that belongs to this flow."""
        return self.replace(flow_id=flow_id)


class CancelFlowPolicy(enum.Enum):
    """What happens to the members of a flow that is cancelled.

    ``FLOW_ONLY`` leaves them alone, ``CANCEL_ALL`` cancels every one that has not ended, and
    ``CANCEL_PENDING`` cancels those that do not run.
    """

    FLOW_ONLY = "flow_only"
    CANCEL_ALL = "cancel_all"
    CANCEL_PENDING = "cancel_pending"


class CancelFlowWait(Value):
    """Whether cancelling a flow waits until its members are cancelled.

    Made by name: ``NO_WAIT``, ``WAIT_INDEFINITE``, or :meth:`wait_timeout`.

    Attributes:
        wait: Whether to wait.
        timeout: Longest wait in seconds; None without a limit, and when not waiting.
    """

    wait: bool
    timeout: float | None = None

    NO_WAIT: ClassVar[CancelFlowWait]
    WAIT_INDEFINITE: ClassVar[CancelFlowWait]

    def __post_init__(self) -> None:
        _check_flag("wait", self.wait)
        if self.timeout is not None:
            if not self.wait:
                raise InvalidInput("timeout has no meaning without waiting.")
            _set(self, "timeout", _seconds("timeout", self.timeout, zero=True))

    @classmethod
    def wait_timeout(cls, timeout: float | timedelta) -> CancelFlowWait:
        """Wait at most so long: seconds, or a ``timedelta``."""
        return cls(True, _seconds("timeout", timeout, zero=True))


CancelFlowWait.NO_WAIT = CancelFlowWait(False)
CancelFlowWait.WAIT_INDEFINITE = CancelFlowWait(True)


# -- usage -----------------------------------------------------------------------------------------


class UsageDimensions(Value):
    """What an attempt used up since its last report.

    Attributes:
        input_tokens: Tokens read, from 0.
        output_tokens: Tokens written, from 0.
        wall_ms: Wall-clock time; None when it does not count.
        custom: Further dimensions, at most 61, by name; sorted by name, and a copy of what was
            given.  Names are text of 1 to 128 bytes, other than those of the attributes above.
        dedup_key: A report with a key that was seen before is not counted again; None and empty
            switch this off.
    """

    input_tokens: int = 0
    output_tokens: int = 0
    wall_ms: int | None = None
    custom: Mapping[str, int] = MappingProxyType({})
    dedup_key: str | None = None

    def __post_init__(self) -> None:
        check_int("input_tokens", self.input_tokens, 0, MAX_INT)
        check_int("output_tokens", self.output_tokens, 0, MAX_INT)
        _check_optional_int("wall_ms", self.wall_ms, 0, MAX_INT)
        if not hasattr(self.custom, "items"):
            raise InvalidType(f"custom must be a dict, not {type(self.custom).__name__}.")
        # The server takes 64 dimensions in one report, three of which have names of their own.
        if len(self.custom) > 61:
            raise InvalidInput("custom must have at most 61 dimensions.")
        for name, amount in self.custom.items():
            keys.free_text("A dimension's name", name, 128, error=InvalidInput)
            if name in ("input_tokens", "output_tokens", "wall_ms"):
                raise InvalidInput("custom must not repeat input_tokens, output_tokens or wall_ms.")
            check_int("A custom amount", amount, 0, MAX_INT)
        _set(self, "custom", dict(sorted(self.custom.items())))
        if self.dedup_key is not None:
            keys.free_text("dedup_key", self.dedup_key, empty=True, error=InvalidInput)
            _set(self, "dedup_key", self.dedup_key or None)

    def with_input_tokens(self, tokens: int) -> UsageDimensions:
        """Return a copy with this number of input tokens."""
        return self.replace(input_tokens=tokens)

    def with_output_tokens(self, tokens: int) -> UsageDimensions:
        """Return a copy with this number of output tokens."""
        return self.replace(output_tokens=tokens)

    def with_wall_ms(self, ms: int) -> UsageDimensions:
        """Return a copy with this wall-clock time."""
        return self.replace(wall_ms=ms)

    def with_custom(self, name: str, amount: int) -> UsageDimensions:
        """Return a copy with one more custom dimension, or another amount of it."""
        return self.replace(custom={**self.custom, name: amount})

    def with_dedup_key(self, key: str) -> UsageDimensions:
        """Return a copy with this key against double counting."""
        return self.replace(dedup_key=key)

    def __hash__(self) -> int:
        return hash(
            (
                self.input_tokens,
                self.output_tokens,
                self.wall_ms,
                tuple(self.custom.items()),
                self.dedup_key,
            )
        )


# -- retries ---------------------------------------------------------------------------------------


class RetryBackoff(enum.Enum):
    """How the pauses between retries grow."""

    FIXED = "fixed"
    EXPONENTIAL = "exponential"


class RetryPolicy(Value):
    """When a failed or lost attempt is tried again.

    The pause before retry n (from 0) is ``delay_ms`` or, exponentially, ``delay_ms * multiplier^n``, at most
    ``max_delay_ms``, less a random share of up to ``jitter_percent``.

    Attributes:
        max_retries: Retries after transient failures and timeouts.
        backoff: How the pauses grow.
        delay_ms: The first pause.
        multiplier: Growth of an exponential backoff, 1 to 100.
        max_delay_ms: The longest pause.
        jitter_percent: Random share of each pause, 0 to 100.
        max_reclaims: How often a lost worker is replaced.
    """

    max_retries: int = 0
    backoff: RetryBackoff = RetryBackoff.EXPONENTIAL
    delay_ms: int = 1_000
    multiplier: float = 2.0
    max_delay_ms: int = 60_000
    jitter_percent: int = 20
    max_reclaims: int = 100

    def __post_init__(self) -> None:
        check_int("max_retries", self.max_retries, 0, MAX_U32)
        _check_type("backoff", self.backoff, RetryBackoff)
        check_int("delay_ms", self.delay_ms, 0, MAX_U32)
        check_int("max_delay_ms", self.max_delay_ms, 0, MAX_U32)
        check_int("jitter_percent", self.jitter_percent, 0, 100)
        check_int("max_reclaims", self.max_reclaims, 0, MAX_U32)
        if type(self.multiplier) not in (int, float) or not 1 <= self.multiplier <= 100:
            raise InvalidInput("multiplier must be a number from 1 to 100.")


# -- conditions ------------------------------------------------------------------------------------


class CountKind(enum.Enum):
    """What makes a contribution to a condition distinct from another one."""

    DISTINCT_MEMBERS = "leaf"
    DISTINCT_WAITPOINTS = "waitpoint"
    DISTINCT_SIGNALS = "signal"
    DISTINCT_SOURCES = "source"


class ResumeCondition(Value):
    """What must come before a suspended execution goes on: made by :meth:`any`, :meth:`all` and :meth:`count`.

    Conditions nest, at most 16 levels and 256 members in all. Each node counts for itself: a signal that two nodes wait
    for contributes to both.

    Attributes:
        members: Waitpoints and conditions.
        needed: How many distinct contributions meet it.
        distinct: What makes contributions of its waitpoints distinct; conditions inside it count once each.
    """

    members: tuple[WaitpointSpec | ResumeCondition, ...]
    needed: int
    distinct: CountKind = CountKind.DISTINCT_MEMBERS

    def __post_init__(self) -> None:
        _check_type("members", self.members, tuple)
        if not self.members:
            raise InvalidInput("A condition needs at least one member.")
        for member in self.members:
            if not isinstance(member, (WaitpointSpec, ResumeCondition)):
                raise InvalidType(
                    "A member of a condition is a WaitpointSpec or a ResumeCondition."
                )
        check_int("needed", self.needed, 1, 10_000)
        _check_type("distinct", self.distinct, CountKind)
        reachable = self._reachable()
        if reachable is not None and self.needed > reachable:
            raise InvalidInput(
                f"The condition needs {self.needed} contributions and can get {reachable}."
            )
        levels, members = self._size()
        if levels > 16 or members > 256:
            raise InvalidInput("A condition has at most 16 levels and 256 members in all.")

    def _reachable(self) -> int | None:
        """How many distinct contributions there can be; None for no limit."""
        leaves = [member for member in self.members if isinstance(member, WaitpointSpec)]
        nodes = len(self.members) - len(leaves)
        if not leaves or self.distinct is CountKind.DISTINCT_MEMBERS:
            return len(leaves) + nodes
        if self.distinct is CountKind.DISTINCT_WAITPOINTS:
            return len({leaf.hmac_token for leaf in leaves}) + nodes
        return None

    def _size(self) -> tuple[int, int]:
        levels, members = 1, len(self.members)
        for member in self.members:
            if isinstance(member, ResumeCondition):
                inner = member._size()  # noqa: SLF001 - its own
                levels, members = max(levels, inner[0] + 1), members + inner[1]
        return levels, members

    @classmethod
    def any(cls, *members: WaitpointSpec | ResumeCondition) -> ResumeCondition:
        """Return the condition that one member is enough for."""
        return cls(members, 1)

    @classmethod
    def all(cls, *members: WaitpointSpec | ResumeCondition) -> ResumeCondition:
        """Return the condition that every member is needed for."""
        return cls(members, max(len(members), 1))

    @classmethod
    def count(
        cls,
        needed: int,
        *members: WaitpointSpec | ResumeCondition,
        distinct: CountKind = CountKind.DISTINCT_WAITPOINTS,
    ) -> ResumeCondition:
        """Return the condition that *needed* distinct contributions meet."""
        return cls(members, needed, distinct)


class TimeoutBehavior(enum.Enum):
    """What happens to a suspended execution that nobody resumed in time."""

    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"
    AUTO_RESUME = "auto_resume"
    ESCALATE = "escalate"


class SuspendOutcome(Value):
    """What a suspension led to.

    Attributes:
        suspension_id: Its id.
        handle: The handle of the suspended execution, of kind ``SUSPENDED``; where the condition was met already, the
            caller's own handle, whose lease goes on.
        already_satisfied: Signals that had come before met the condition.
    """

    suspension_id: str
    handle: Handle
    already_satisfied: bool


class SignalOutcome(Value):
    """What a signal did.

    Attributes:
        signal_id: Id of the signal; of the earlier one where it is a duplicate.
        effect: ``resume_condition_satisfied``, ``appended_to_waitpoint``, ``appended_to_waitpoint_duplicate``,
            ``buffered_for_pending_waitpoint``, ``signal_ignored_matcher_failed`` or
            ``signal_ignored_not_in_condition``.
        duplicate: A signal with this id or idempotency key had come before.
    """

    signal_id: str
    effect: str
    duplicate: bool = False


# -- usage -----------------------------------------------------------------------------------------


class UsageVerdict(enum.Enum):
    """What became of a usage report."""

    OK = "ok"
    SOFT_BREACH = "soft_breach"
    HARD_BREACH = "hard_breach"
    ALREADY_APPLIED = "already_applied"


class ReportUsageResult(Value):
    """Answer to a usage report.

    Attributes:
        verdict: ``OK`` and ``SOFT_BREACH``: applied. ``HARD_BREACH``: nothing was applied, to no budget and not to the
            execution. ``ALREADY_APPLIED``: a report with this key was.
        budget_id: For a breach, whose limit it is.
        dimension: For a breach, the dimension.
        current: For a breach, what is used (with this report where it was applied).
        limit: For a breach, the limit.
    """

    verdict: UsageVerdict
    budget_id: str | None = None
    dimension: str | None = None
    current: int = 0
    limit: int = 0


# -- ends ------------------------------------------------------------------------------------------


class CancelOutcome(Value):
    """Answer to a cancellation.

    Attributes:
        cancelled: Whether the execution is cancelled; False while its worker is asked first.
        previous_state: State that it was in.
    """

    cancelled: bool
    previous_state: str


class CancelFlowOutcome(Value):
    """Answer to the cancellation of a flow.

    Attributes:
        policy: The policy that holds; that of the first cancellation.
        cancelled_members: How many members this call cancelled.
        open_members: How many members had not ended when it returned.
    """

    policy: CancelFlowPolicy
    cancelled_members: int
    open_members: int


class FlowDescription(Value):
    """A flow.

    Attributes:
        flow_id: Its id.
        state: ``open`` or ``cancelled``.
        members: Ids of its executions.
        open_members: Ids of those that have not ended.
    """

    flow_id: str
    state: str
    members: tuple[str, ...]
    open_members: tuple[str, ...]


# -- descriptions ----------------------------------------------------------------------------------


class ExecutionDescription(Value):
    """An execution as the server holds it, without its payload and without secrets.

    Attributes:
        execution_id: Its id.
        state: ``waiting``, ``delayed``, ``waiting_children``, ``active``, ``suspended``, ``completed``, ``failed``,
            ``cancelled`` or ``expired``.
        fields: The fields of its core, as text.
        tags: Its tags.
        usage: What it reported as used.
        history: Its newest transitions, oldest first: ``at_ms``, ``from``, ``to``, ``attempt``, ``reason``.
    """

    execution_id: str
    state: str
    fields: dict[str, str]
    tags: dict[str, str]
    usage: dict[str, int]
    history: tuple[dict[str, str], ...]


class StreamDescription(Value):
    """The streams of one attempt.

    Attributes:
        last_id: Id of the newest frame, ``0-0`` for none.
        frame_count: How many frames the attempt has had.
        log_entries: Durable frames that are kept, and the end entry.
        live_entries: Entries of the live window; a run is one.
        summary_version: How many patches the summary has had.
        closed_reason: Why the stream ended; None while it has not.
        lease_left_ms: How long the lease still lasts by the server's clock; None where there is none.
    """

    last_id: str
    frame_count: int
    log_entries: int
    live_entries: int
    summary_version: int
    closed_reason: str | None
    lease_left_ms: int | None


# -- filters ---------------------------------------------------------------------------------------


class Namespace(str):
    """Name of a tenant or workspace: one line of text of 1 to 256 bytes of UTF-8.

    Raises:
        InvalidId: The text is anything else.
    """

    __slots__ = ()

    def __new__(cls, text: str) -> Namespace:
        return super().__new__(cls, keys.free_text("namespace", text))


class ScannerFilter(Value):
    """Which executions a scan or a subscription sees; without any part, all of them.

    Attributes:
        namespace: Only executions of this namespace.
        instance_tag: Only executions whose tag ``instance_tag[0]`` has the value
            ``instance_tag[1]``.
    """

    namespace: Namespace | None = None
    instance_tag: tuple[str, str] | None = None

    NOOP: ClassVar[ScannerFilter]

    def __post_init__(self) -> None:
        if self.namespace is not None:
            _set(self, "namespace", Namespace(self.namespace))
        if self.instance_tag is not None:
            if len(_check_type("instance_tag", self.instance_tag, tuple)) != 2:
                raise InvalidType("instance_tag must be a pair (key, value).")
            keys.tag_key(self.instance_tag[0])
            _check_type("tag value", self.instance_tag[1], str)

    def with_namespace(self, namespace: str) -> ScannerFilter:
        """Return a copy that sees this namespace only."""
        return ScannerFilter(Namespace(namespace), self.instance_tag)

    def with_instance_tag(self, key: str, value: str) -> ScannerFilter:
        """Return a copy that sees only executions whose tag *key* is *value*."""
        return ScannerFilter(self.namespace, (key, value))

    def is_noop(self) -> bool:
        """Return whether every execution passes."""
        return self.namespace is None and self.instance_tag is None

    def matches(self, core_namespace: str | None = None, tag_value: str | None = None) -> bool:
        """Return whether an execution passes.

        Args:
            core_namespace: Its namespace; not looked at when the filter has none.
            tag_value: The value it has for the filter's tag; likewise.
        """
        if self.namespace is not None and core_namespace != self.namespace:
            return False
        return self.instance_tag is None or tag_value == self.instance_tag[1]


ScannerFilter.NOOP = ScannerFilter()


# -- configuration ---------------------------------------------------------------------------------


class BackendTimeouts(Value):
    """Time limits of calls.

    Attributes:
        request: Seconds that one call may take, above 0; None takes the library's default.
    """

    request: float | None = None

    def __post_init__(self) -> None:
        if self.request is not None:
            _set(self, "request", _seconds("request", self.request, zero=False))


class BackendRetry(Value):
    """How reconnecting backs off; None takes the library's default.

    Attributes:
        exponent_base: Base of the exponential growth, from 1.
        factor: Multiplier of each step, in milliseconds.
        number_of_retries: Attempts after the first one.
        jitter_percent: Random share of each wait, 0 to 100.
    """

    exponent_base: int | None = None
    factor: int | None = None
    number_of_retries: int | None = None
    jitter_percent: int | None = None

    def __post_init__(self) -> None:
        _check_optional_int("exponent_base", self.exponent_base, 1, MAX_U32)
        _check_optional_int("factor", self.factor, 0, MAX_U32)
        _check_optional_int("number_of_retries", self.number_of_retries, 0, MAX_U32)
        _check_optional_int("jitter_percent", self.jitter_percent, 0, 100)


class ValkeyConnection(Value):
    """Where a server is and how to log in.

    With TLS the certificate and the host name are always verified, and nothing here turns that off.

    Attributes:
        host: Name or address; an IPv6 address without brackets.  Empty with ``unix_path``.
        port: 1 to 65535.
        tls: Whether to use TLS.
        cluster: Whether the server is part of a Valkey Cluster.
        username: ACL user; None is the default user.
        password: Its password; never shown by ``repr``.
        db: Database number; a cluster has only 0.
        unix_path: Path of a Unix socket, in place of host and port.
        tls_ca_file: Authorities to trust in place of the system's; PEM.
        tls_cert_file: Client certificate; PEM.
        tls_key_file: Its private key, when it is not in the same file.
    """

    _secret: ClassVar[tuple[str, ...]] = ("password",)

    host: str = "127.0.0.1"
    port: int = 6379
    _: KW_ONLY
    tls: bool = False
    cluster: bool = False
    username: str | None = None
    password: str | None = None
    db: int = 0
    unix_path: str | None = None
    tls_ca_file: str | None = None
    tls_cert_file: str | None = None
    tls_key_file: str | None = None

    def __post_init__(self) -> None:
        _check_flag("tls", self.tls)
        _check_flag("cluster", self.cluster)
        check_int("port", self.port, 1, 65_535)
        check_int("db", self.db, 0, 65_535)
        _check_type("host", self.host, str)
        for name in ("unix_path", "tls_ca_file", "tls_cert_file", "tls_key_file"):
            if getattr(self, name) is not None:
                keys.free_text(name, getattr(self, name), 4096, error=InvalidInput)
        for name in ("username", "password"):
            text = getattr(self, name)
            if text is not None and _utf8(_check_type(name, text, str)) is None:
                raise InvalidInput(f"{name} contains a lone surrogate.")
        if self.username == "":
            raise InvalidInput("username must not be empty; use None for the default user.")
        if self.unix_path is None:
            _check_host(self.host)
        else:
            _set(self, "host", "")
            if self.tls or self.cluster:
                raise InvalidInput("A Unix socket has neither TLS nor a cluster.")
        if self.cluster and self.db != 0:
            raise InvalidInput("A cluster has no database but 0.")
        if not self.tls and (self.tls_ca_file or self.tls_cert_file or self.tls_key_file):
            raise InvalidInput("TLS files are given but tls is off; use valkeys:// or tls=True.")
        if self.tls_key_file is not None and self.tls_cert_file is None:
            raise InvalidInput("tls_key_file needs tls_cert_file.")


def _check_host(host: str) -> None:
    if re.fullmatch(_IPV6 if ":" in host else _HOST, host) is None:
        raise InvalidInput("host must be a host name, an IPv4 address, or an IPv6 address.")


# Resolving, and names beyond ASCII, are left to the system; this keeps out lists of hosts and what
# would change the meaning of a URL or a log line.  255 is the limit of a DNS name (RFC 1035 §2.3.4).
_HOST = r"(?:[A-Za-z0-9._-]|[^\x00-\x9f\u2028\u2029\ud800-\udfff]){1,255}"
_IPV6 = r"(?=.*:.*:)[0-9A-Fa-f:.]{2,45}(?:%[A-Za-z0-9._-]{1,64})?"

BackendConnection = ValkeyConnection
"""How to reach a backend.  Valkey is the only kind so far."""


class BackendConfig(Value):
    """Everything that connecting needs.

    Attributes:
        connection: Where the server is and how to log in.
        timeouts: Time limits.
        retry: How reconnecting backs off.
    """

    connection: BackendConnection
    _: KW_ONLY
    timeouts: BackendTimeouts = BackendTimeouts()
    retry: BackendRetry = BackendRetry()

    def __post_init__(self) -> None:
        _check_type("connection", self.connection, ValkeyConnection)
        _check_type("timeouts", self.timeouts, BackendTimeouts)
        _check_type("retry", self.retry, BackendRetry)

    @classmethod
    def valkey(cls, host: str, port: int = 6379) -> BackendConfig:
        """Return the defaults for a standalone server without TLS."""
        return cls(ValkeyConnection(host, port))

    @classmethod
    def from_url(cls, url: str) -> BackendConfig:
        """Return the configuration that a URL describes.

        ``valkey://[user[:password]@]host[:port][/db]`` (also ``redis://``), the same with TLS as
        ``valkeys://`` (``rediss://``), and ``unix://[user[:password]@]/path``.  User, password and
        path are percent-decoded.  Query parameters, each at most once: ``cluster=true``,
        ``timeout=<seconds>``, ``tls_ca_file=``, ``tls_cert_file=``, ``tls_key_file=``, and for a
        Unix socket ``db=``.

        Raises:
            InvalidInput: Any other scheme or parameter, a missing host, a bad port, database or
                percent-escape, a blank or a fragment.  The message never quotes the URL, which may
                hold a password.
        """
        return _from_url(_check_type("url", url, str))


_URL_PARAMETERS = ("cluster", "timeout", "tls_ca_file", "tls_cert_file", "tls_key_file", "db")
_AUTHORITY = r"(?:\[([^\[\]]*)\]|([^\[\]:]*))(?::([0-9]{1,5}))?"


def _from_url(url: str) -> BackendConfig:
    # Taken apart by hand: urllib drops blanks silently, and quotes parts of the URL in its errors.
    if re.search(r"[\x00-\x20\x7f-\x9f#\u2028\u2029\ud800-\udfff]", url):
        raise InvalidInput(
            "The URL contains a blank, a control character or '#'; percent-encode it."
        )
    if re.search(r"%(?![0-9A-Fa-f]{2})", url):
        raise InvalidInput("The URL contains a '%' that starts no escape; write it as %25.")
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator or scheme not in ("valkey", "valkeys", "redis", "rediss", "unix"):
        raise InvalidInput(
            "The URL must start with valkey://, valkeys://, redis://, rediss:// or unix://."
        )
    rest, _, query = rest.partition("?")
    authority, slash, path = rest.partition("/")
    login, _, place = authority.rpartition("@")
    username, _, password = login.partition(":")
    given = _url_parameters(query)

    host, port, db, unix_path = "", "6379", "0", None
    if scheme == "unix":
        if place or not path:
            raise InvalidInput("A unix:// URL must hold an absolute path and no host.")
        unix_path = _unquote(slash + path)
        db = given.pop("db", "0")
    else:
        found = re.fullmatch(_AUTHORITY, place)
        if found is None:
            raise InvalidInput("The URL must hold a host, and a port must be a number up to 65535.")
        host, port = found[1] or found[2], found[3] or "6379"
        if not host or (found[1] and ":" not in host):
            raise InvalidInput("The URL must hold a host; an IPv6 address goes in brackets.")
        if "db" in given:
            raise InvalidInput("The database of a URL goes in its path, as in valkey://host/1.")
        db = path or "0"
    if re.fullmatch(r"[0-9]{1,5}", db) is None:
        raise InvalidInput("The database in a URL must be a number.")
    timeout = given.pop("timeout", None)
    if timeout is not None and re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,9})?", timeout) is None:
        raise InvalidInput("timeout must be a number of seconds.")
    cluster = given.pop("cluster", "false")
    if cluster not in ("true", "false"):
        raise InvalidInput("cluster must be true or false.")
    connection = ValkeyConnection(
        host,
        int(port),
        tls=scheme in ("valkeys", "rediss"),
        cluster=cluster == "true",
        username=_unquote(username) or None,
        password=_unquote(password) or None,
        db=int(db),
        unix_path=unix_path,
        **{name: _unquote(text) for name, text in given.items()},
    )
    return BackendConfig(
        connection, timeouts=BackendTimeouts(None if timeout is None else float(timeout))
    )


def _url_parameters(query: str) -> dict[str, str]:
    given: dict[str, str] = {}
    for item in query.split("&") if query else ():
        name, _, text = item.partition("=")
        # The name is not quoted in the message: it is a piece of the password when that holds a '?'.
        if name not in _URL_PARAMETERS:
            raise InvalidInput(f"A URL's parameters are {', '.join(_URL_PARAMETERS)}.")
        if name in given or not text:
            raise InvalidInput(f"{name} must be given once, with a value.")
        given[name] = text
    return given


def _unquote(text: str) -> str:
    from urllib.parse import unquote_to_bytes  # noqa: PLC0415 - costs milliseconds to import

    try:
        return unquote_to_bytes(text).decode("utf-8")
    except UnicodeDecodeError:
        pass
    raise InvalidInput("The URL's escapes are not UTF-8.")
