"""Subscribers to the executions that end, without I/O."""

from __future__ import annotations

import re
from typing import Any, cast

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Flow, Step, checked, server_ms
from ff_fast._hot.resp import pack_command
from ff_fast.errors import ExecutionNotFound, InvalidCursor
from ff_fast.types import CompletionPayload, ScannerFilter

_START = "0-0"
_LAST_OF_A_MS = 10**16 - 1

COMPLETION_BLOCK_MS = 5_000
"""How long a subscription blocks on the server at the most."""


class CompletionCore:
    """A subscriber to the executions that end, without I/O: what to ask next, and what the answer brought.

    One read goes over the completion streams of all partitions. The cursor is where it began, by the server's clock,
    and the newest id of every partition that has brought something since.

    Args:
        partitions: How many partitions there are.
        after: Cursor of an earlier subscription; None begins now, ``start`` with everything that is kept.
        scope: Which executions are wanted.
    """

    __slots__ = ("_base", "_ids", "_partitions", "_scope", "_unsure")

    ended = False

    def __init__(self, partitions: int, after: str | None, scope: ScannerFilter) -> None:
        self._partitions = partitions
        self._scope = scope
        self._ids: dict[int, str] = {}
        self._base: str | None = None
        # Whether what comes next may have been trimmed since the cursor was made.
        self._unsure = after is not None
        if after == "start":
            self._base = _START
        elif after is not None:
            found = None
            if isinstance(after, str):
                found = re.fullmatch(
                    r"(\d{1,16}-\d{1,16})((?:,\d{1,5}:\d{1,16}-\d{1,16})*)", after, re.ASCII
                )
            if found is None:
                raise InvalidCursor("after must be a cursor of a completion, 'start' or None.")
            self._base = found[1]
            for part in found[2].split(",")[1:]:
                index, _, identity = part.partition(":")
                if int(index) >= partitions:
                    raise InvalidCursor("after is a cursor of a deployment with more partitions.")
                self._ids[int(index)] = identity

    def restart(self) -> None:
        """The connection was lost: what was not delivered was not passed either, but may be gone by now."""
        self._unsure = True

    def read(self) -> Flow[list[CompletionPayload]]:
        """Wait for up to :data:`COMPLETION_BLOCK_MS`; returns what ended since, each with the cursor behind it."""
        if self._base is None:
            now = yield from server_ms()
            # Below every id from now on: the first of this millisecond may be still to come.
            self._base = f"{now - 1}-{_LAST_OF_A_MS}"
        indexes = range(self._partitions)
        if self._unsure:
            yield from self._check_kept(self._base)
            self._unsure = False
        request = pack_command(
            b"XREAD", b"COUNT", b"100", b"BLOCK", b"%d" % COMPLETION_BLOCK_MS, b"STREAMS",
            *(keys.completions(keys.slot_tag(index)) for index in indexes),
            *(self._ids.get(index, self._base).encode() for index in indexes),
        )  # fmt: skip
        (reply,) = yield Step(request, block_s=COMPLETION_BLOCK_MS / 1000)
        streams = cast("list[tuple[bytes, list[tuple[bytes, list[bytes]]]]]", checked(reply))
        ids = dict(self._ids)
        found: list[CompletionPayload] = []
        for name, entries in streams:
            index = keys.index_of(name.decode())
            for identity, flat in entries:
                ids[index] = identity.decode()
                cursor = ",".join([self._base, *(f"{at}:{place}" for at, place in ids.items())])
                fields = {
                    key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)
                }
                completion = yield from _completion_of(fields, cursor, self._scope)
                if completion is not None:
                    found.append(completion)
        self._ids = ids
        return found

    def _check_kept(self, base: str) -> Flow[None]:
        """Raise ``InvalidCursor`` where what comes next may have been trimmed."""
        names = [keys.completions(keys.slot_tag(index)) for index in range(self._partitions)]
        request = b"".join(pack_command(b"XINFO", b"STREAM", name) for name in names)
        for index, reply in enumerate((yield Step(request, replies=len(names)))):
            if isinstance(reply, Exception) and "no such key" in str(reply):
                continue
            flat = cast("list[Any]", checked(reply))
            about = dict(zip(flat[::2], flat[1::2], strict=True))
            first = about[b"recorded-first-entry-id"].decode()
            # The server does not say what was trimmed last; of thousands that may be, the one before the first.
            trimmed = about[b"entries-added"] > about[b"length"]
            here = self._ids.get(index, base)
            if trimmed and here != _START and ops.entry_id(here) < ops.entry_id(first):
                raise InvalidCursor(
                    "Completions behind the cursor are not kept any more; begin with 'start' and"
                    " compare with what you have."
                )


def _completion_of(
    fields: dict[str, bytes], cursor: str, scope: ScannerFilter
) -> Flow[CompletionPayload | None]:
    """Make the value of a record; None where the filter leaves it out. A large result is read from the execution."""
    execution_id = fields["execution_id"].decode()
    if scope.namespace is not None and fields["namespace"].decode() != scope.namespace:
        return None
    try:
        if scope.instance_tag is not None:
            tags = yield from ops.call(ops.read_tags(execution_id))
            if tags.get(scope.instance_tag[0]) != scope.instance_tag[1]:
                return None
        payload = fields.get("payload")
        if "payload_bytes" in fields and payload is None:
            payload = yield from ops.call(ops.read_result(execution_id))
    except ExecutionNotFound:
        # Its retention is over: what the record says is all there is, and a filter by tag cannot be answered.
        if scope.instance_tag is not None:
            return None
        payload = None
    flow_id = fields.get("flow_id")
    return CompletionPayload(
        execution_id=execution_id,
        outcome=fields["outcome"].decode(),
        payload_bytes=payload,
        produced_at_ms=int(fields["produced_at_ms"]),
        flow_id=None if flow_id is None else flow_id.decode(),
        cursor=cursor,
    )
