"""Handles: proof that a worker owns an attempt."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, ClassVar

from ff_fast import keys
from ff_fast.errors import (
    MAX_INT,
    HandleFromOtherBackend,
    InvalidHandle,
    InvalidInput,
    check_int,
)

from ._value import Value, check_type, set_field

if TYPE_CHECKING:
    from dataclasses import KW_ONLY


class BackendTag(enum.Enum):
    """Kind of the backend that made a handle; the value is its byte in the encoding.

    Only ``VALKEY`` is implemented; the others let their handles be recognised and refused.
    """

    VALKEY = 1
    POSTGRES = 2
    SQLITE = 3


class HandleKind(enum.Enum):
    """Origin of a handle.

    ``FRESH``: a new attempt was claimed. ``RESUMED``: an attempt continues, or a lost worker is replaced.
    ``SUSPENDED``: the execution was suspended; the lease has ended.
    """

    FRESH = "fresh"
    RESUMED = "resumed"
    SUSPENDED = "suspended"


class HandleOpaque:
    """The bytes of a handle.  They contain the lease id, so ``repr`` shows their number only."""

    __slots__ = ("_data", "_decoded")

    def __init__(self, data: bytes) -> None:
        self._data = check_type("opaque", data, bytes)
        self._decoded: HandleFields | None = None

    def as_bytes(self) -> bytes:
        """Return the bytes."""
        return self._data

    def decoded(self) -> HandleFields:
        """Return the fields in the bytes; see :class:`Handle` for their layout.  Decoded once.

        Raises:
            InvalidHandle: The bytes are truncated, too long, or have another layout.
            HandleFromOtherBackend: They belong to another kind of backend.
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
    """The fields in a handle.

    Attributes:
        execution_id: Canonical execution id.
        attempt_index: Attempt, from 0.
        attempt_id: Id of the attempt.
        lease_id: Id of the lease, a secret.
        lease_epoch: Grant of ownership, from 1; 0 means never leased.
        lease_ttl_ms: Length of the lease as granted, in ms.
        lane_id: Lane of the claim; empty for the producer of a named stream.
        worker_instance_id: Worker instance of the claim.
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
        set_field(self, "execution_id", keys.canonical_execution_id(self.execution_id))
        keys.attempt_index(self.attempt_index)
        keys.opaque_id("attempt_id", self.attempt_id)
        keys.opaque_id("lease_id", self.lease_id)
        check_int("lease_epoch", self.lease_epoch, 0, MAX_INT)
        check_int("lease_ttl_ms", self.lease_ttl_ms, 1, MAX_INT)
        if self.lane_id:
            keys.lane_id(self.lane_id)
        keys.free_text("worker_instance_id", self.worker_instance_id)


class Handle(Value):
    """Proof that a worker owns an attempt; every call of the worker takes it.

    The opaque bytes are, with integers little-endian and a string as u32 length and UTF-8:

    ======  ==================================================================
    v2      ``02 01 <backend tag>`` and the body; written
    v1      ``01`` and the body; only read, and always of Valkey
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
        check_type("backend", self.backend, BackendTag)
        check_type("kind", self.kind, HandleKind)
        if isinstance(self.opaque, bytes):
            set_field(self, "opaque", HandleOpaque(self.opaque))
        check_type("opaque", self.opaque, HandleOpaque)

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
        """Return the handle for the answer of a claim.

        Args:
            kind: Origin of the ownership.
            execution_id: Execution id.
            attempt_index: Attempt, from 0.
            attempt_id: 1 to 64 letters, digits, ``_`` or ``-``; usually a UUID.
            lease_id: Likewise.
            lease_epoch: 0 to 2^53-1.
            lease_ttl_ms: 1 to 2^53-1.
            lane_id: 1 to 64 printable ASCII characters; empty for the producer of a named stream.
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

    @property
    def execution_id(self) -> str:
        """Id of the owned execution; raises as :meth:`fields` does."""
        return self.fields().execution_id

    @property
    def attempt_index(self) -> int:
        """The owned attempt, from 0; raises as :meth:`fields` does."""
        return self.fields().attempt_index

    def fields(self) -> HandleFields:
        """Return the fields in the handle; decoded once.

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


# -- the bytes -------------------------------------------------------------------------------------


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
        # Raised outside the except block, whose error holds the text and would be chained.
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
