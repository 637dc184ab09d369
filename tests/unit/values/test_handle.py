"""Handles: what is in them, and what is no handle."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ff_fast.errors import (
    HandleFromOtherBackend,
    InvalidHandle,
    InvalidInput,
    InvalidType,
)
from ff_fast.types import (
    BackendTag,
    Handle,
    HandleKind,
    HandleOpaque,
)

from .samples import EID, HANDLE, LEASE, UUID

# The fields above in FlowFabric's layout of a handle, version 2.
VECTOR = bytes.fromhex(
    "0201012c0000007b66703a38367d3a35353065383430302d653239622d343164342d613731362d34343636353534"
    "3430303030030000002400000031313131313131312d313131312d343131312d383131312d313131313131313131"
    "3131312400000032323232323232322d323232322d343232322d383232322d323232323232323232323232070000"
    "000000000030750000000000000700000064656661756c7408000000776f726b65722d31"
)


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


def test_damaged_handles(subtests):
    for data in (
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
    ):
        with subtests.test(f"{data!r:.60}"):
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


def test_bad_handle_fields(subtests):
    for fields in (
        *({"attempt_index": bad} for bad in (-1, 2**32, True, "3", 3.0)),
        *({"lease_epoch": bad} for bad in (-1, 2**53, True, "7")),
        *({"lease_ttl_ms": bad} for bad in (0, 2**53, None)),
        *({"lease_id": bad} for bad in ("", "a\n", "x" * 65, None, b"l")),
        {"execution_id": "x"},
        {"lane_id": "\n"},
        {"worker_instance_id": "a\n"},
    ):
        with subtests.test(f"{fields!r:.60}"), pytest.raises(InvalidInput):
            Handle.encode(**{**HANDLE, **fields})


@pytest.mark.parametrize("parts", [("v", HandleKind.FRESH, b""), (BackendTag.VALKEY, "fresh", b"")])
def test_bad_handle_parts(parts):
    with pytest.raises(InvalidType):
        Handle(*parts)


def test_handle_repr():
    assert repr(Handle.encode(**HANDLE)) == (
        f"Handle(kind=fresh, execution_id={EID}, attempt_index=3)"
    )
