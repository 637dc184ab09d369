"""What a batch of items looks like to an HTTP client: one framing for each response, without I/O."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar, Literal, TypeAlias

import orjson

from ff_fast._hot import sse
from ff_fast.errors import InvalidCursor, InvalidInput
from ff_fast.types import AttemptStarted, End, Gap, Snapshot, split_cursor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ff_fast import StreamFrame
    from ff_fast.errors import FFError

Item: TypeAlias = "Snapshot | AttemptStarted | StreamFrame | Gap | End"

HEADERS: Mapping[str, str] = {
    "cache-control": "no-cache, no-transform",
    # nginx, and what is built on it, passes each chunk on at once.
    "x-accel-buffering": "no",
}

_ID = re.compile(r"([^~]+)(?:~((?:[0-9a-f]{2}){1,3}))?")


def split_id(text: object) -> tuple[str, bytes]:
    """Return the cursor in the id of an event, and the bytes of a character that the client has not got.

    Raises:
        InvalidCursor: It is not an id that :class:`EventFraming` writes.
    """
    found = _ID.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise InvalidCursor
    return found[1], bytes.fromhex(found[2] or "")


def event(
    data: bytes | str,
    *,
    id: str | None = None,  # noqa: A002 - the name of the field
    event: str | None = None,
    retry: int | None = None,
) -> bytes:
    """Return one server-sent event.

    Args:
        data: The data, of any number of lines; each gets a ``data:`` of its own.
        id: What a client sends back as ``Last-Event-ID``.
        event: Its type; a control character in it becomes a space.
        retry: After how many milliseconds a client that was cut off comes again.
    """
    return sse.event(data, id=id, event=event, retry=retry)


class Framing:
    """Makes bytes of items, for one response. A subclass is the protocol of a front end.

    An instance serves one response, so it may remember what it has sent. Its methods are called in order: :meth:`begin`,
    :meth:`items` for each batch, and :meth:`heartbeat` between two of them.

    Attributes:
        media_type: The content type.
        headers: Headers of the response, their names in lower case.
        snapshot: A reader without a cursor begins with the summary document of the newest attempt, if it has one.
        ids: The events have ids that :meth:`place` understands, so a client that has got the end, and asks again after it,
            is told with 204 that nothing follows. It stops a browser's ``EventSource``, which asks for ever otherwise.
        over: The framing has said its last word: set by :meth:`items`, it ends the response behind what that returns.
        drops: Clients take the end of a response for that of the stream. So the connection of one that ends before it, because
            the server shuts down or a read has failed, is dropped where that can be done, and the client comes again.
        rejoin: The framing needs the summary document: set by :meth:`items`, it makes the reader begin anew with it. What
            that has returned goes out, and the rest of the batch does not count.
    """

    media_type: str = "text/event-stream"
    headers: Mapping[str, str] = HEADERS
    snapshot: bool = False
    ids: bool = False
    over: bool = False
    drops: bool = False
    rejoin: bool = False

    def place(self, cursor: str) -> str:
        """Return the cursor from which reading goes on, where a client names *cursor*, the id of an event.

        Raises:
            InvalidCursor: It is no such id.
        """
        return cursor

    @staticmethod
    def error_body(code: str, message: str, status: int) -> object:  # noqa: ARG004 - for subclasses
        """Return the JSON of the answer to a request that is refused."""
        return {"error": {"code": code, "message": message}}

    def begin(self, cursor: str | None) -> bytes:  # noqa: ARG002 - for subclasses
        """Return what comes before the first items.

        Args:
            cursor: What the client has named; None at the beginning.
        """
        return b""

    def items(self, items: Sequence[Item]) -> bytes:
        """Return the bytes of a batch; none where a client need not hear of it."""
        raise NotImplementedError

    def heartbeat(self) -> bytes:
        """Return what shows that the connection lives: a comment."""
        return b": keep-alive\n\n"

    def shutdown(self, retry_ms: int) -> bytes:
        """Return the last bytes of a response that ends because its server does; the client shall come again."""
        return b"retry: %d\n: shutting down\n\n" % retry_ms

    def failed(self, error: FFError) -> bytes:
        """Return the last bytes of a response whose reading has failed."""
        return b": %b\n\n" % error.code.encode()


class EventFraming(Framing):
    """Server-sent events that resume to the character: each has the id of its place.

    A frame is an event without a name, so ``EventSource.onmessage`` gets its payload as ``data``. What else a reader gets
    are events with a name, and JSON as data:

    - ``snapshot``: ``{"attempt_index", "version", "document"}``
    - ``attempt``: ``{"attempt_index"}``; what earlier attempts have streamed does not count any more.
    - ``gap``: ``{"first_missing", "next_sequence", "reason"}``
    - ``end``: ``{"reason", "outcome", "error"}``; a client closes its ``EventSource`` then.

    A payload that ends in the middle of a character is sent without its last bytes, which the event of the next frame
    begins with. The id carries them, so no cut loses or doubles a character.

    Args:
        snapshot: Begin with the summary document where the client names no cursor.
        types: A frame whose type is not ``token`` is an event of that name; ``frame-`` comes before the names above,
            and before ``error``, ``open`` and ``message``.
        data: What becomes of a payload. ``text``: itself, in lines; every client reads CR LF and CR as LF, and bytes that
            are not UTF-8 as U+FFFD. ``json``: a JSON string, which keeps all of UTF-8. ``base64``: keeps all bytes.
    """

    ids = True

    _RESERVED: ClassVar[frozenset[str]] = frozenset(
        ("snapshot", "attempt", "gap", "end", "error", "open", "message")
    )

    def __init__(
        self,
        *,
        snapshot: bool = False,
        types: bool = False,
        data: Literal["text", "json", "base64"] = "text",
    ) -> None:
        if data not in ("text", "json", "base64"):
            raise InvalidInput("data must be 'text', 'json' or 'base64'.")
        self.snapshot = snapshot
        self._types = types
        self._data: Literal["text", "json", "base64"] = data
        self._events = self._start(b"")

    def _start(self, carry: bytes) -> sse.Events:
        return sse.Events(
            control_event,
            kind=self._data,
            types=self._types,
            reserved=self._RESERVED,
            carry=carry,
        )

    def place(self, cursor: str) -> str:
        place, carry = split_id(cursor)
        if carry:
            if split_cursor(place)[1].sequence == 0:
                # At the beginning of an attempt there was no frame that a character could have begun in.
                raise InvalidCursor
            try:
                self._events = self._start(carry)
            except ValueError:
                raise InvalidCursor from None
        return place

    def items(self, items: Sequence[Item]) -> bytes:
        return self._events.join(items)


class DataFraming(Framing):
    """Payloads that are messages of their own, such as JSON: each is the ``data`` of an event without a name.

    Nothing else is sent, except *done* after the end of a success, and comments that tell of gaps and of other ends.

    Args:
        done: Data of the last event, such as ``[DONE]``; None sends none.
        ids: Each event has the id of its place.
    """

    def __init__(self, *, done: bytes | None = None, ids: bool = True) -> None:
        self.ids = ids
        self._done = done
        self._events = sse.Events(self._other, ids=ids)

    def items(self, items: Sequence[Item]) -> bytes:
        return self._events.join(items)

    def _other(self, item: Item) -> bytes:
        if isinstance(item, Gap):
            return b": gap, %b\n\n" % item.reason.encode()
        if isinstance(item, End):
            if item.outcome != "success":
                return b": end, %b\n\n" % item.reason.encode()
            if self._done is not None:
                return event(self._done, id=item.cursor if self.ids else None)
        return b""


class Passthrough(Framing):
    """Payloads that are text of server-sent events already: a worker has framed them.

    A frame should hold whole events. What ends in the middle of one waits for the frame that completes it, and goes out
    with it; where none does, it is left out. The last event that such frames hold together gets the id of their place, so a client that is cut off before it
    gets those before it again: with one event a frame it gets each event once. Events with an ``id:`` of their own should
    not be written.

    Args:
        ids: Events have ids. Without them a client cannot resume, and what a worker wrote goes out unchanged.
    """

    def __init__(self, *, ids: bool = True) -> None:
        self.ids = ids
        self._held: list[bytes] = []

    def items(self, items: Sequence[Item]) -> bytes:
        parts: list[bytes] = []
        for item in items:
            if isinstance(item, (Snapshot, AttemptStarted, Gap, End)):
                # The rest of an event that has begun never comes, and half an event is none.
                self._held = []
                continue
            if not self.ids:
                parts.append(item.payload)
                continue
            text = item.payload
            if self._held:
                self._held.append(text)
                text = b"".join(self._held)
                self._held = []
            last = _last_event(text)
            if last is None:
                self._held = [text]
            else:
                parts.append(b"%bid: %b\n%b" % (text[:last], item.cursor.encode(), text[last:]))
        return b"".join(parts)


# CR LF ends one line, not two.
_BLANK = re.compile(rb"(?:\r\n|\n|\r(?!\n))(?:\r\n|\n|\r)")


def _last_event(text: bytes) -> int | None:
    """Return where the last event of *text* begins; None unless *text* ends with an event."""
    end = len(text)
    starts = [0, *(found.end() for found in _BLANK.finditer(text))]
    if starts[-1] != end or end == 0:
        return None
    return starts[-2]


def control_event(item: Item) -> bytes:
    """Return the named event for an item that is not a frame, as :class:`EventFraming` sends it."""
    if isinstance(item, Snapshot):
        data = b'{"attempt_index":%d,"version":%d,"document":%b}' % (
            item.attempt_index,
            item.version,
            item.document_json,
        )
        name = "snapshot"
    elif isinstance(item, AttemptStarted):
        name, data = "attempt", orjson.dumps({"attempt_index": item.attempt_index})
    elif isinstance(item, Gap):
        name = "gap"
        data = orjson.dumps(
            {
                "first_missing": item.first_missing,
                "next_sequence": item.next_sequence,
                "reason": item.reason,
            }
        )
    elif isinstance(item, End):
        name = "end"
        data = orjson.dumps({"reason": item.reason, "outcome": item.outcome, "error": item.error})
    else:
        raise TypeError(f"{type(item).__name__} is no item of a reader.")
    return event(data, id=item.cursor, event=name)
