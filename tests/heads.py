"""The head of an attempt, as tests look at it and change it past the library."""

from typing import NamedTuple


class Head(NamedTuple):
    lease_expires_at: int
    cancel_requested: bool
    writer: bytes | None
    last_id: bytes


def head_of(raw, key):
    """The head that stands under the key."""
    ends, cancel_requested, writer, last_id = raw.get(key).split(b" ")
    return Head(int(ends), cancel_requested == b"1", None if writer == b"-" else writer, last_id)


def set_head(raw, key, **changes):
    """Change fields of a head; one that does not exist stays away."""
    if not raw.exists(key):
        return
    head = head_of(raw, key)._replace(**changes)
    last_id = head.last_id if isinstance(head.last_id, bytes) else head.last_id.encode()
    text = b"%013d %d %b %b" % (
        int(head.lease_expires_at), head.cancel_requested, head.writer or b"-", last_id
    )  # fmt: skip
    raw.set(key, text, keepttl=True)
