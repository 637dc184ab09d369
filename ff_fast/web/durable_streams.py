"""The read side of the Durable Streams protocol, for its clients in a dozen languages.

With Starlette, and so with FastAPI::

    @app.api_route("/streams/{execution_id}", methods=["GET", "HEAD", "OPTIONS"])
    async def stream(request: Request, execution_id: str):
        return await durable_streams.read_response(backend, execution_id, request)

A frame is a message, and the end of the execution closes the stream; how it has ended is not told. The stream of a client
is that of the newest attempt: an offset in an earlier one is 410, as one whose frames are not kept any more, and ``offset=-1``
begins with the first frame that is kept. Workers write through ff_fast, so a request that would write is 405.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from base64 import b64encode
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import orjson

from ff_fast import StreamFrame, keys
from ff_fast._core.follow import follow_place
from ff_fast.errors import FFError, InvalidInput, MissingDependency
from ff_fast.types import (
    AttemptStarted,
    End,
    Gap,
    Snapshot,
    StreamCursor,
    TailVisibility,
    make_cursor,
    parse_cursor,
    seconds,
)
from ff_fast.web.framing import HEADERS, Framing
from ff_fast.web.reading import HEARTBEAT_S, Chunks, server_stops
from ff_fast.web.response import SEND_TIMEOUT_S, StreamResponse, error_response, refusal

try:
    from starlette.responses import JSONResponse, Response
except ImportError as error:
    raise MissingDependency(
        "ff_fast.web needs Starlette for its responses; run: pip install 'ff_fast[web]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import timedelta

    from starlette.requests import Request
    from starlette.types import Receive, Send

    from ff_fast import aio
    from ff_fast._core.tail import StreamPage
    from ff_fast.types import ExecutionDescription
    from ff_fast.web.framing import Item
    from ff_fast.web.response import Authorize

LONG_POLL_S = 30.0
"""How long a long-poll waits for a frame, in seconds."""

SSE_S = 60.0
"""How long one response of server-sent events lasts at most, in seconds; a client reconnects with its last offset."""

# Most of one body; one frame may be larger.
_FRAMES = 2_000
_BODY_BYTES = 1 << 20
# How often a long-poll looks whether its client has gone or the server shuts down.
_LOOK_S = 1.0

# 2024-10-09T00:00:00Z; time is counted from there in intervals, and an answer to a cursor is ahead of it by up to an hour.
_EPOCH_S = 1_728_432_000
_INTERVAL_S = 20
_LARGEST_JITTER_S = 3_600

# What has been read does not change, so a full body may be kept; the last one grows.
_KEEP = "private, max-age=60, stale-while-revalidate=300"
_ASK = "private, no-cache"

_METHODS = "GET, HEAD, OPTIONS"
_EXPOSED = (
    "stream-next-offset, stream-cursor, stream-up-to-date, stream-closed, stream-ttl, stream-expires-at,"
    " stream-sse-data-encoding, etag, content-type"
)
_ALLOWED = "authorization, content-type, if-none-match, last-event-id"

_OFFSET = re.compile(r"([0-9]{10})_([0-9]{16})_([0-9]{16})")


class Place(NamedTuple):
    """A place in the stream: everything up to this frame has been read."""

    attempt_index: int
    ms: int
    sequence: int

    @classmethod
    def of_cursor(cls, cursor: str) -> Place:
        found = follow_place(cursor)
        return _BEGINNING if found is None else cls(found[0], *found[1])

    @property
    def cursor(self) -> str:
        return make_cursor(*self)

    @property
    def offset(self) -> str:
        """The offset of the protocol; the text sorts as the places do."""
        return f"{self.attempt_index:010d}_{self.ms:016d}_{self.sequence:016d}"


_BEGINNING = Place(0, 0, 0)


def offset_of(cursor: str) -> str:
    """Return the offset of the protocol for the cursor of an item.

    Raises:
        InvalidCursor: It is none.
    """
    return Place.of_cursor(cursor).offset


class _Refused(Exception):  # noqa: N818 - an answer, not a fault
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.response = JSONResponse(
            {"error": {"code": code, "message": message}}, status, {"cache-control": "no-store"}
        )


def _bad(message: str) -> NoReturn:
    raise _Refused(400, "invalid_offset", message)


def _gone() -> _Refused:
    return _Refused(
        410,
        "offset_gone",
        "The frames after this offset are not kept any more, or a new attempt has replaced them; begin at -1.",
    )


class _Asked:
    """What a request asks for.

    Attributes:
        place: Where it begins; None at the beginning or the tail.
        now: It begins at the tail.
        live: ``long-poll``, ``sse``, or empty.
        cursor: The time that the client has seen.
    """

    def __init__(self, request: Request) -> None:
        query = request.query_params
        self.live = query.get("live", "")
        if self.live not in ("", "long-poll", "sse") or ("live" in query and not self.live):
            raise _Refused(400, "invalid_live", "live must be long-poll or sse.")
        offsets = query.getlist("offset")
        if len(offsets) > 1:
            _bad("Name one offset.")
        if self.live and not offsets:
            _bad("A live read needs an offset; -1 is the beginning.")
        offset = offsets[0] if offsets else "-1"
        self.now = offset == "now"
        self.place: Place | None = None
        if offset not in ("-1", "now"):
            found = _OFFSET.fullmatch(offset)
            if found is None:
                _bad("The offset is none that this server has given out.")
            self.place = Place(int(found[1]), int(found[2]), int(found[3]))
            if self.place.attempt_index > keys.MAX_ATTEMPT_INDEX:
                _bad("The offset is none that this server has given out.")
            StreamCursor(*self.place[1:])
        self.cursor = query.get("cursor")


def _cursor(given: str | None) -> str:
    """Return the cursor of an answer, which a cache takes for another URL than that of the request."""
    at = int(time.time() - _EPOCH_S) // _INTERVAL_S
    if (
        given is not None
        and given.isascii()
        and given.isdigit()
        and len(given) <= 16
        and int(given) >= at
    ):
        jitter = random.randint(1, _LARGEST_JITTER_S)  # noqa: S311 - no secret
        return str(int(given) + max(1, jitter // _INTERVAL_S))
    return str(at)


class _Kind(NamedTuple):
    """How messages of a content type make a body."""

    content_type: str
    is_json: bool
    is_text: bool

    @classmethod
    def of(cls, content_type: str) -> _Kind:
        media = content_type.partition(";")[0].strip().lower()
        is_json = media == "application/json"
        return cls(content_type, is_json, media.startswith("text/"))

    def body(self, payloads: Sequence[bytes]) -> bytes:
        return b"[%b]" % b",".join(payloads) if self.is_json else b"".join(payloads)

    def whole(self, payloads: Sequence[bytes]) -> int:
        """Return how many payloads end with a whole character, so that they are text by themselves.

        A character has four bytes at most: where more payloads end inside of one, they are no text at all.
        """
        if not self.is_text:
            return len(payloads)
        for count in range(len(payloads), max(len(payloads) - 4, 0), -1):
            if not _is_cut(b"".join(payloads[max(count - 3, 0) : count])[-3:]):
                return count
        return len(payloads) if len(payloads) >= 4 else 0


def _is_cut(tail: bytes) -> bool:
    """Whether the last bytes of a text are the beginning of a character."""
    for length in range(1, min(3, len(tail)) + 1):
        byte = tail[-length]
        if byte & 0xC0 == 0x80:
            continue
        wanted = (
            2
            if byte & 0xE0 == 0xC0
            else 3
            if byte & 0xF0 == 0xE0
            else 4
            if byte & 0xF8 == 0xF0
            else 1
        )
        return wanted > length
    return False


def _event(name: bytes, data: bytes) -> bytes:
    """Return an event. A client takes one space from the front of a line, so only a line that begins with one gets one."""
    lines = b"\n" + data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return b"event: %b%b\n\n" % (name, lines.replace(b"\n ", b"\n  ").replace(b"\n", b"\ndata:"))


class DurableFraming(Framing):
    """Server-sent events of the protocol: one ``data`` for a batch, and a ``control`` behind it with the next offset.

    Args:
        content_type: Of the stream. Text and JSON go out as they are, anything else in base64.
        place: Where the client stands.
        tail: The newest frame when the response began.
        closed: The execution had ended then.
        cursor: The time that the client has seen.
    """

    headers: Mapping[str, str] = HEADERS

    def __init__(
        self,
        content_type: str,
        place: Place,
        tail: Place,
        *,
        closed: bool,
        cursor: str | None = None,
    ) -> None:
        self._kind = kind = _Kind.of(content_type)
        self._place = place
        self._tail = tail
        self._closed = closed
        self._cursor = cursor
        self._held: list[StreamFrame] = []
        self._moved = False
        # How many of the held frames are before a gap, and the place behind it.
        self._before_gap = 0
        self._behind_gap = place
        self._is_plain = kind.is_text or kind.is_json
        if not self._is_plain:
            self.headers = {**HEADERS, "stream-sse-data-encoding": "base64"}
        self.stop: Callable[[], None] = lambda: None

    def begin(self, cursor: str | None) -> bytes:  # noqa: ARG002 - the place says it
        return self._control() if self._is_up_to_date and not self._closed else b""

    def heartbeat(self) -> bytes:
        if self._held or self._is_up_to_date:
            return super().heartbeat()
        # What lies between is not shown to this client.
        self._tail = self._place
        return self._control()

    def shutdown(self, retry_ms: int) -> bytes:  # noqa: ARG002 - clients of the protocol reconnect at once
        return b""

    def items(self, items: Sequence[Item]) -> bytes:
        ends = closed = False
        for item in items:
            if isinstance(item, StreamFrame):
                self._held.append(item)
            elif isinstance(item, End):
                ends = closed = True
            elif self._ends_at(item):
                ends = True
                break
        if ends and not closed:
            self.stop()
        count = len(self._held)
        if not ends:
            # Behind a gap, no more bytes of a character come.
            count = max(self._kind.whole([each.payload for each in self._held]), self._before_gap)
        sent, self._held = self._held[:count], self._held[count:]
        if not sent:
            return self._control(closed=True) if closed else b""
        body = self._kind.body([each.payload for each in sent])
        self._place = Place.of_cursor(sent[-1].cursor)
        if self._before_gap == count:
            self._place = self._behind_gap
        self._before_gap = 0
        self._moved = True
        if not self._is_plain:
            body = b64encode(body)
        return _event(b"data", body) + self._control(closed=closed)

    def _ends_at(self, item: Snapshot | AttemptStarted | Gap) -> bool:
        """Whether the stream of this client cannot go on behind *item*: with its next request it learns that."""
        has_read = bool(self._held) or self._place.sequence > 0
        if isinstance(item, AttemptStarted):
            if not has_read:
                self._place = Place(item.attempt_index, 0, 0)
            return has_read
        if isinstance(item, Gap):
            # What has left between frames that are kept is missing for whoever begins again, too.
            is_history = (self._moved or bool(self._held)) and not self._is_up_to_date
            if has_read and not is_history:
                return True
            self._before_gap = len(self._held)
            self._behind_gap = Place.of_cursor(item.cursor)
            if not self._held:
                self._place = self._behind_gap
        return False

    @property
    def _is_up_to_date(self) -> bool:
        return self._place >= self._tail

    def _control(self, *, closed: bool = False) -> bytes:
        data: dict[str, object] = {"streamNextOffset": self._place.offset}
        if closed:
            data["streamClosed"] = True
        else:
            data["streamCursor"] = _cursor(self._cursor)
        if closed or self._is_up_to_date:
            data["upToDate"] = True
        return _event(b"control", orjson.dumps(data))


class _EventStream(StreamResponse):
    """A response of server-sent events, which lasts for a while."""

    def __init__(
        self, framing: DurableFraming, lasts_s: float, *args: object, **options: object
    ) -> None:
        super().__init__(*args, framing=lambda: framing, **options)  # type: ignore[arg-type]
        self._durable = framing
        self._lasts_s = lasts_s

    async def _stream(self, chunks: Chunks, receive: Receive, send: Send) -> None:
        self._durable.stop = chunks.abandon
        timer = asyncio.get_running_loop().call_later(self._lasts_s, chunks.abandon)
        try:
            await super()._stream(chunks, receive, send)
        finally:
            timer.cancel()


class _Answer(NamedTuple):
    """Frames for one body.

    Attributes:
        payloads: Of the frames.
        place: The last of them.
        up_to_date: Nothing follows that is stored.
        closed: Nothing ever follows.
    """

    payloads: list[bytes]
    place: Place
    up_to_date: bool
    closed: bool


class _Reader:
    """Reads one execution for one request."""

    def __init__(
        self, backend: aio.ValkeyBackend, execution_id: str, kind: _Kind, visibility: TailVisibility
    ) -> None:
        self._backend = backend
        self._execution_id = execution_id
        self._kind = kind
        self._visibility = visibility
        self._state: ExecutionDescription

    @property
    def closed(self) -> bool:
        return self._state.outcome is not None

    async def look(self) -> None:
        """Read the state of the execution.

        Raises:
            ExecutionNotFound: There is no such execution.
        """
        self._state = await self._backend.describe(self._execution_id)

    def start(self, place: Place | None) -> Place:
        """Return where reading begins for a client that stands at *place*.

        Raises:
            _Refused: What it has read belongs to another attempt.
        """
        newest = Place(self._state.attempt_index or 0, 0, 0)
        if place is None or not place.sequence:
            return newest
        if place.attempt_index != newest.attempt_index:
            raise _gone()
        return place

    async def tail(self) -> Place:
        """Return the place of the newest frame."""
        attempt = self._state.attempt_index
        if attempt is None:
            return _BEGINNING
        found = await self._backend.describe_stream(self._execution_id, attempt)
        return Place(attempt, *parse_cursor(found.last_id))

    async def _page(self, place: Place, count: int) -> StreamPage | None:
        if self._state.attempt_index is None:
            return None
        page = await self._backend.read_stream(
            self._execution_id,
            place.attempt_index,
            after=place.cursor,
            count=count,
            max_bytes=_BODY_BYTES,
            visibility=self._visibility,
        )
        gaps = page.gaps
        if place.sequence and gaps and (not page or gaps[0].next_sequence <= page[0].sequence):
            raise _gone()
        return page

    async def check(self, place: Place) -> None:
        """Raise an error unless reading can go on behind *place*."""
        if place.sequence:
            await self._page(place, 1)

    async def read(self, place: Place) -> _Answer:
        """Return what is stored behind *place*."""
        page = await self._page(place, _FRAMES)
        if page is None:
            return _Answer([], place, up_to_date=True, closed=self.closed)
        frames = list(page)
        sizes = sum(len(each.payload) for each in frames)
        reached = len(frames) < _FRAMES and sizes < _BODY_BYTES
        if reached and page.end_reason is not None and not self.closed:
            await self.look()
        if self._state.attempt_index != place.attempt_index:
            # Another attempt has begun meanwhile.
            if place.sequence:
                raise _gone()
            return await self.read(self.start(None))
        closed = reached and self.closed
        if not reached and len(frames) > 1:
            # A gap is reported before a frame, so one frame more is read than is answered.
            frames.pop()
        place, frames = self._after(page, place, frames, closed=closed)
        return _Answer([each.payload for each in frames], place, up_to_date=reached, closed=closed)

    def _after(
        self, page: StreamPage, place: Place, frames: list[StreamFrame], *, closed: bool
    ) -> tuple[Place, list[StreamFrame]]:
        if not closed:
            frames = frames[: self._kind.whole([each.payload for each in frames])]
        if not frames:
            return place, frames
        last = frames[-1]
        place = Place.of_cursor(last.cursor)
        following = page[len(frames)].sequence if len(frames) < len(page) else None
        for gap in page.gaps:
            if gap.first_missing > last.sequence and (
                following is None or gap.next_sequence <= following
            ):
                # What has expired between two frames that are kept is no reason to begin again.
                place = Place.of_cursor(gap.cursor)
        return place, frames

    async def wait(self, place: Place, timeout_s: float, request: Request) -> _Answer:
        """Return the frames that come behind *place*, which is the tail; none if nothing comes in time."""
        started = self._state.attempt_index is not None
        until = time.monotonic() + timeout_s
        frames: list[StreamFrame] = []
        reader = self._backend.follow(
            self._execution_id,
            after=place.cursor if started else None,
            visibility=self._visibility,
        )
        async with reader:
            while (left := until - time.monotonic()) > 0:
                for item in await reader.next_batch(min(left, _LOOK_S)):
                    if isinstance(item, StreamFrame):
                        frames.append(item)
                    elif isinstance(item, End):
                        return self._waited(frames, place, closed=True)
                    elif place.sequence or frames:
                        if frames:
                            # The next request learns of it.
                            return self._waited(frames, place, closed=False)
                        raise _gone()
                    else:
                        place = Place.of_cursor(item.cursor)
                count = self._kind.whole([each.payload for each in frames])
                if count:
                    return self._waited(frames[:count], place, closed=False)
                if server_stops() or await request.is_disconnected():
                    break
        return _Answer([], place, up_to_date=True, closed=False)

    @staticmethod
    def _waited(frames: list[StreamFrame], place: Place, *, closed: bool) -> _Answer:
        place = Place.of_cursor(frames[-1].cursor) if frames else place
        return _Answer([each.payload for each in frames], place, up_to_date=True, closed=closed)


def _position(answer: _Answer) -> dict[str, str]:
    headers = {"stream-next-offset": answer.place.offset}
    if answer.up_to_date:
        headers["stream-up-to-date"] = "true"
    if answer.closed:
        headers["stream-closed"] = "true"
    return headers


def _is_known(request: Request, etag: str) -> bool:
    given = request.headers.get("if-none-match", "")
    return any(each.strip().removeprefix("W/") in (etag, "*") for each in given.split(","))


async def read_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request,
    *,
    content_type: str = "text/plain; charset=utf-8",
    visibility: TailVisibility = TailVisibility.ALL,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    allow_origin: str | None = None,
    long_poll: float | timedelta = LONG_POLL_S,
    sse_lasts: float | timedelta = SSE_S,
    heartbeat: float | timedelta = HEARTBEAT_S,
    send_timeout: float | timedelta = SEND_TIMEOUT_S,
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Answer a request of a Durable Streams client.

    ``GET`` with ``offset``, and with ``live=long-poll`` or ``live=sse`` for what comes later; ``HEAD`` for the tail; ``OPTIONS``
    for browsers. An unknown execution is 404, a malformed offset 400, one that cannot be continued 410, any other
    method 405, a client that may not read 403.

    Args:
        backend: The backend, of the asyncio shell, on the loop of the server.
        execution_id: Id of the execution, as it is or as it stands in a URL.
        request: The request.
        content_type: Of the messages. With ``application/json`` each frame is one JSON document, and a body is an array.
            Text is answered up to the last whole character.
        visibility: Whether best-effort frames are delivered. Those that have expired between others are left out without
            a word, so writers of durable frames suit the protocol.
        authorize: As of :class:`StreamResponse`.
        token_key: As of :class:`StreamResponse`.
        allow_origin: ``Access-Control-Allow-Origin``: which pages of other origins may read, ``*`` for all. None leaves it to
            the application.
        long_poll: How long a long-poll waits, in seconds or as a ``timedelta``.
        sse_lasts: How long a response of server-sent events lasts, in seconds or as a ``timedelta``.
        heartbeat: As of :class:`StreamResponse`.
        send_timeout: As of :class:`StreamResponse`.
        headers: Further headers of every response.

    Raises:
        InvalidInput: An argument that is not the client's is not accepted.
    """
    long_poll_s = seconds("long_poll", long_poll, zero=False)
    sse_s = seconds("sse_lasts", sse_lasts, zero=False)
    if not content_type or not content_type.isascii() or not content_type.isprintable():
        raise InvalidInput("content_type must be a content type, such as text/plain.")
    kind = _Kind.of(content_type)
    more = {
        "x-content-type-options": "nosniff",
        "cross-origin-resource-policy": "cross-origin",
        "access-control-expose-headers": _EXPOSED,
        **({} if allow_origin is None else {"access-control-allow-origin": allow_origin}),
        **(headers or {}),
    }
    try:
        if request.method not in ("GET", "HEAD"):
            return _without_reading(request, more)
        eid = keys.canonical_execution_id(execution_id)
        refused = await refusal(request, eid, authorize, token_key, "read")
        if refused is not None:
            return _with(refused, more)
        reader = _Reader(backend, eid, kind, visibility)
        if request.method == "HEAD":
            return _with(await _head(reader, kind), more)
        asked = _Asked(request)
        await reader.look()
        if asked.live != "sse":
            return _with(await _body(reader, kind, asked, request, long_poll_s), more)
        place = reader.start(asked.place)
        closed = reader.closed
        tail = await reader.tail()
        if asked.now:
            place = tail
        await reader.check(place)
        # A reader that begins before the first attempt learns of it as it comes.
        begins = place.sequence or place.attempt_index or tail.sequence
        return _EventStream(
            DurableFraming(content_type, place, tail, closed=closed, cursor=asked.cursor),
            sse_s,
            backend,
            eid,
            request,
            after=place.cursor if begins else "",
            visibility=visibility,
            heartbeat=heartbeat,
            send_timeout=send_timeout,
            headers={"content-type": "text/event-stream", **more},
        )
    except _Refused as refusing:
        return _with(refusing.response, more)
    except FFError as error:
        return _with(error_response(error), more)


async def _head(reader: _Reader, kind: _Kind) -> Response:
    await reader.look()
    answer = _Answer([], await reader.tail(), up_to_date=False, closed=reader.closed)
    return Response(
        headers={
            "content-type": kind.content_type,
            "cache-control": "no-store",
            **_position(answer),
        }
    )


async def _body(
    reader: _Reader, kind: _Kind, asked: _Asked, request: Request, long_poll_s: float
) -> Response:
    if asked.now:
        answer = _Answer([], await reader.tail(), up_to_date=True, closed=reader.closed)
    else:
        answer = await reader.read(reader.start(asked.place))
    waits = asked.live == "long-poll"
    begin = asked.place or _BEGINNING
    if waits and not answer.payloads and not answer.closed:
        answer = await reader.wait(answer.place, long_poll_s, request)
    if waits and answer.payloads and answer.closed:
        # The protocol's own client gives up the body of a response that says so, if it is still on its way: the next
        # one, which has none, says it.
        answer = answer._replace(closed=False)
    headers = _position(answer)
    if waits:
        headers["stream-cursor"] = _cursor(asked.cursor)
        if not answer.payloads:
            return Response(status_code=204, headers={**headers, "cache-control": "no-store"})
    headers["content-type"] = kind.content_type
    if asked.now:
        headers["cache-control"] = "no-store"
    else:
        etag = f'"{begin.offset}:{answer.place.offset}{":c" if answer.closed else ""}"'
        headers["etag"] = etag
        headers["cache-control"] = _KEEP if answer.closed or not answer.up_to_date else _ASK
        if _is_known(request, etag):
            return Response(status_code=304, headers=headers)
    return Response(kind.body(answer.payloads), headers=headers)


def _without_reading(request: Request, more: Mapping[str, str]) -> Response:
    if request.method != "OPTIONS":
        answer: Response = JSONResponse(
            {"error": {"code": "read_only", "message": "This stream can be read alone."}},
            405,
            {"allow": _METHODS, "cache-control": "no-store"},
        )
        return _with(answer, more)
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": _METHODS,
            "access-control-allow-headers": _ALLOWED,
            "access-control-max-age": "86400",
            **more,
        },
    )


def _with(response: Response, headers: Mapping[str, str]) -> Response:
    for name, value in headers.items():
        response.headers[name] = value
    return response
