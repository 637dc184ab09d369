"""Subscriptions to ended executions, without I/O."""

from __future__ import annotations

import re
from typing import Any, cast

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.steps import Command, Step, Steps, checked, server_ms
from ff_fast._hot.resp import pack_command
from ff_fast.errors import ExecutionNotFound, InvalidCursor
from ff_fast.types import CompletionOutcome, CompletionPayload, ScannerFilter

_START = "0-0"
_LAST_OF_A_MS = 10**16 - 1

COMPLETION_BLOCK_MS = 5_000
"""Longest block of a subscription on the server, in ms."""


def _cursor(start: str, ids: dict[int, str]) -> str:
    return ",".join([start, *(f"{index}:{identity}" for index, identity in ids.items())])


class CompletionCore:
    """A subscription to ended executions: makes requests, and completions from the replies.

    One read covers the completion streams of all partitions. The cursor holds the start of the subscription, by the
    server's clock, and the newest id read from each partition since.

    Args:
        partitions: Number of partitions of the deployment.
        after: Cursor of an earlier subscription; None begins now, ``start`` with the oldest completion kept.
        scope: Filter of the executions.
    """

    __slots__ = ("_check_trimmed", "_first", "_ids", "_partitions", "_scope", "_start")

    ended = False

    def __init__(self, partitions: int, after: str | None, scope: ScannerFilter) -> None:
        self._partitions = partitions
        self._scope = scope
        self._start: str | None = None
        self._ids: dict[int, str] = {}
        # Completions after the cursor may have been trimmed, so the next read checks.
        self._check_trimmed = after is not None
        if after is not None:
            self._move(_START if after == "start" else after)
        self._first = None if after is None else _cursor(str(self._start), self._ids)

    def _move(self, cursor: object) -> None:
        found = None
        if isinstance(cursor, str):
            found = re.fullmatch(
                r"(\d{1,16}-\d{1,16})((?:,\d{1,5}:\d{1,16}-\d{1,16})*)", cursor, re.ASCII
            )
        if found is None:
            raise InvalidCursor("after must be a cursor of a completion, 'start' or None.")
        ids = dict(part.split(":") for part in found[2].split(",")[1:])
        self._start, self._ids = found[1], {int(index): identity for index, identity in ids.items()}
        if any(index >= self._partitions for index in self._ids):
            raise InvalidCursor("after is a cursor of a deployment with more partitions.")

    @property
    def start(self) -> str | None:
        """Cursor of the beginning; None until the server's time is known."""
        return self._first

    def restart(self, cursor: str | None = None) -> None:
        """Continue after *cursor*, or after the last read; completions there may have been trimmed meanwhile."""
        if cursor is not None:
            self._move(cursor)
        self._check_trimmed = self._start is not None

    def read(self) -> Steps[list[CompletionPayload]]:
        """Wait up to :data:`COMPLETION_BLOCK_MS`; return new completions, each with the cursor after it."""
        if self._start is None:
            now = yield from server_ms(keys.completions(keys.slot_tag(0)))
            # The last id of the millisecond before, since completions of this millisecond may follow.
            self._start = f"{now - 1}-{_LAST_OF_A_MS}"
            self._first = self._start
        indexes = range(self._partitions)
        if self._check_trimmed:
            yield from self._check_kept(self._start)
            self._check_trimmed = False
        names = [keys.completions(keys.slot_tag(index)) for index in indexes]
        request = pack_command(
            b"XREAD", b"COUNT", b"100", b"BLOCK", b"%d" % COMPLETION_BLOCK_MS, b"STREAMS",
            *names,
            *(self._ids.get(index, self._start).encode() for index in indexes),
        )  # fmt: skip
        (reply,) = yield Step((Command(names[0], request),), COMPLETION_BLOCK_MS / 1000)
        streams = cast("list[tuple[bytes, list[tuple[bytes, list[bytes]]]]]", checked(reply))
        ids = dict(self._ids)
        found: list[CompletionPayload] = []
        for name, entries in streams:
            index = keys.index_of(name.decode())
            for identity, flat in entries:
                ids[index] = identity.decode()
                cursor = _cursor(self._start, ids)
                fields = {
                    key.decode(): value for key, value in zip(flat[::2], flat[1::2], strict=True)
                }
                completion = yield from _completion_of(fields, cursor, self._scope)
                if completion is not None:
                    found.append(completion)
        self._ids = ids
        return found

    def _check_kept(self, base: str) -> Steps[None]:
        """Raise ``InvalidCursor`` if completions after the cursor may have been trimmed."""
        names = [keys.completions(keys.slot_tag(index)) for index in range(self._partitions)]
        infos = [Command(name, pack_command(b"XINFO", b"STREAM", name)) for name in names]
        for index, reply in enumerate((yield Step(infos))):
            if isinstance(reply, Exception) and "no such key" in str(reply):
                continue
            flat = cast("list[Any]", checked(reply))
            about = dict(zip(flat[::2], flat[1::2], strict=True))
            first = about[b"recorded-first-entry-id"].decode()
            # The server does not report the last trimmed id, so any cursor before the first kept entry is refused.
            trimmed = about[b"entries-added"] > about[b"length"]
            here = self._ids.get(index, base)
            if trimmed and here != _START and ops.entry_id(here) < ops.entry_id(first):
                raise InvalidCursor(
                    "Completions behind the cursor are not kept any more; begin with 'start' and"
                    " compare with what you have."
                )


def _completion_of(
    fields: dict[str, bytes], cursor: str, scope: ScannerFilter
) -> Steps[CompletionPayload | None]:
    """Return the completion of a record; None if the filter excludes it. A large result is read from the execution."""
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
        # The execution's retention is over: only the record is left, and its tags cannot be compared.
        if scope.instance_tag is not None:
            return None
        payload = None
    flow_id = fields.get("flow_id")
    return CompletionPayload(
        execution_id=execution_id,
        outcome=cast("CompletionOutcome", fields["outcome"].decode()),
        payload_bytes=payload,
        produced_at_ms=int(fields["produced_at_ms"]),
        flow_id=None if flow_id is None else flow_id.decode(),
        cursor=cursor,
    )
