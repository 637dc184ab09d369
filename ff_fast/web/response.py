"""Responses of Starlette, and so of FastAPI."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from functools import cache, partial
from hashlib import sha256
from time import monotonic
from types import FunctionType, MethodType
from typing import TYPE_CHECKING, Any, cast

from ff_fast import keys
from ff_fast.errors import (
    AttemptNotFound,
    ExecutionNotActive,
    ExecutionNotFound,
    FFError,
    InvalidCursor,
    InvalidId,
    InvalidInput,
    InvalidToken,
    InvalidType,
    MissingDependency,
)
from ff_fast.types import TailVisibility, seconds
from ff_fast.web.framing import EventFraming, Framing
from ff_fast.web.reading import FAREWELL_S, HEARTBEAT_S, Chunks, check_backend, events
from ff_fast.web.script import CLIENT_JS
from ff_fast.web.tickets import check_token

try:
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
except ImportError as error:
    raise MissingDependency(
        "ff_fast.web needs Starlette for its responses; run: pip install 'ff_fast[web]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import timedelta

    from starlette.background import BackgroundTask
    from starlette.types import Receive, Scope, Send

    from ff_fast import aio

    Authorize = Callable[[Request, str], object]
    ErrorBody = Callable[[str, str, int], object]

# How many functions are looked at for the server's.
_MOST_WRAPPERS = 100

SEND_TIMEOUT_S = 30.0
"""How long a client may take nothing before its response is closed, in seconds."""


def error_response(error: FFError, body: ErrorBody = Framing.error_body) -> Response:
    """Return the answer to a request that cannot be served, as JSON.

    400 for a bad cursor, 403 for a bad token, 404 for an id that no execution has, 503 with ``Retry-After`` where the server
    cannot be reached and a retry may pass.

    Args:
        error: Why it cannot be served.
        body: Makes the JSON of the code, the message and the status; see :meth:`Framing.error_body`.

    Raises:
        FFError: *error* itself, if it is none of these.
    """
    headers = {"cache-control": "no-store"}
    if isinstance(error, (InvalidId, ExecutionNotFound, AttemptNotFound)):
        status = 404
    elif isinstance(error, InvalidToken):
        status = 403
    elif isinstance(error, InvalidCursor):
        status = 400
    elif error.retryable:
        status = 503
        headers["retry-after"] = "1"
    else:
        raise error
    return JSONResponse(body(error.code, str(error), status), status, headers)


def json_response(content: object, status: int = 200) -> Response:
    """Return an answer as JSON, which no cache keeps."""
    return JSONResponse(content, status, {"cache-control": "no-store"})


def _forbidden(body: ErrorBody) -> Response:
    text = "You may not use this stream."
    return json_response(body("forbidden", text, 403), 403)


async def refusal(
    request: Request,
    execution_id: str,
    authorize: Authorize | None,
    token_key: bytes | Sequence[bytes] | None,
    can: str,
    body: ErrorBody = Framing.error_body,
) -> Response | None:
    """Return the response that refuses *request*; None if it is permitted.

    Raises:
        FFError: See :func:`error_response`.
    """
    if token_key is not None:
        _check_shown(request, token_key, execution_id, can)
    if authorize is not None:
        try:
            allowed = authorize(request, execution_id)
            if inspect.isawaitable(allowed):
                allowed = await allowed
        except PermissionError as error:
            if isinstance(error, FFError):
                raise
            return _forbidden(body)
        if not allowed:
            return _forbidden(body)
    return None


def _check_shown(
    request: Request, key: bytes | Sequence[bytes], execution_id: str, can: str
) -> None:
    """Raise an error unless *request* shows a good token; the application may use one of the places for its own."""
    shown: list[str | None] = [*request.query_params.getlist("token")[-1:]]
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        shown.append(given.strip())
    for other in shown[1:]:
        with contextlib.suppress(InvalidToken):
            check_token(key, other, execution_id, can=can)
            return
    check_token(key, shown[0] if shown else None, execution_id, can=can)


def requested_place(request: Request) -> str | None:
    """Return the cursor that *request* names: by ``Last-Event-ID``, else by ``?after=`` or ``?lastEventId=``."""
    given = request.headers.get("last-event-id")
    if given is None and request.scope.get("query_string"):
        given = request.query_params.get("after", request.query_params.get("lastEventId"))
    return given


class StreamResponse(Response):
    """Streams an execution to an HTTP client, from where the client left off to its end.

    An unknown execution is 404, a malformed cursor 400, a client that may not read 403, and a client that has got the end
    already 204. ``HEAD`` answers the same without a body. While nothing comes, a comment every *heartbeat* seconds keeps
    the connection. A client that disconnects, or that takes nothing for *send_timeout* seconds, ends the response and its
    reader. When the server shuts down, the response ends and tells the client to come again.

    Args:
        backend: The backend, of the asyncio shell, on the loop of the server.
        execution_id: Id of the execution, as it is or as it stands in a URL.
        request: The request; None takes it from what the server passes.
        framing: Makes the framing of this response: a class, or a function without arguments.
        after: Cursor to begin after; None takes what the client names by ``Last-Event-ID``, ``?after=`` or ``?lastEventId=``.
            ``""`` and ``-1`` are the beginning.
        visibility: Whether best-effort frames are delivered.
        heartbeat: How long nothing may come before a heartbeat does, in seconds or as a ``timedelta``.
        authorize: Called with the request and the id before anything is read, and awaited if it returns an awaitable. The client
            is refused with 403 where it returns anything false, or raises ``PermissionError``; an ``HTTPException`` passes.
        token_key: The key of :func:`stream_token`, or several: the client must show a token, by ``?token=`` or as ``Bearer``.
        send_timeout: How long a client may take nothing, in seconds or as a ``timedelta``.
        pace: See :func:`events`.
        headers: Further headers; one of a name that the framing has replaces it.
        background: Runs after the response.

    Raises:
        InvalidInput: An argument that is not the client's is not accepted.
    """

    def __init__(
        self,
        backend: aio.ValkeyBackend,
        execution_id: str,
        request: Request | None = None,
        *,
        framing: Callable[[], Framing] = EventFraming,
        after: str | None = None,
        visibility: TailVisibility = TailVisibility.ALL,
        heartbeat: float | timedelta = HEARTBEAT_S,
        authorize: Authorize | None = None,
        token_key: bytes | Sequence[bytes] | None = None,
        send_timeout: float | timedelta = SEND_TIMEOUT_S,
        pace: float | timedelta | None = None,
        headers: Mapping[str, str] | None = None,
        background: BackgroundTask | None = None,
    ) -> None:
        self._backend = backend
        self._execution_id = execution_id
        self._request = request
        self._after = after
        self._visibility = visibility
        self._heartbeat = seconds("heartbeat", heartbeat, zero=False)
        self._authorize = authorize
        self._token_key = token_key
        self._send_timeout = seconds("send_timeout", send_timeout, zero=False)
        self._pace = None if pace is None else seconds("pace", pace)
        self._framing = _made(framing)
        self.status_code = 200
        self.media_type = self._framing.media_type
        self.background = background
        more = [
            (name.lower().encode("latin-1"), value.encode("latin-1"))
            for name, value in (headers or {}).items()
        ]
        names = {name for name, _ in more}
        own = _encoded(self.media_type, *self._framing.headers.items())
        self.raw_headers = [*(each for each in own if each[0] not in names), *more]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = self._request or Request(scope, receive, send)
        try:
            answer = await self._prepare(request)
        except FFError as error:
            answer = error_response(error, self._framing.error_body)
        if isinstance(answer, Chunks):
            try:
                await self._stream(answer, receive, send)
            finally:
                await answer.aclose()
        else:
            await answer(scope, receive, send)
        if self.background is not None:
            await self.background()

    async def _prepare(self, request: Request) -> Chunks | Response:
        """Return the chunks, or the response to a request that gets none."""
        eid = keys.canonical_execution_id(self._execution_id)
        refused = await refusal(
            request, eid, self._authorize, self._token_key, "read", self._framing.error_body
        )
        if refused is not None:
            return refused
        after = requested_place(request) if self._after is None else self._after
        chunks = events(
            self._backend,
            eid,
            after=after,
            framing=self._framing,
            visibility=self._visibility,
            heartbeat=self._heartbeat,
            pace=self._pace,
        )
        await chunks.open()
        if chunks.has_nothing_new:
            await chunks.aclose()
            return Response(status_code=204, headers={"cache-control": "no-store"})
        if request.method == "HEAD":
            await chunks.aclose()
            return _Head(self)
        return chunks

    async def _stream(self, chunks: Chunks, receive: Receive, send: Send) -> None:
        task = asyncio.current_task()
        gone = asyncio.ensure_future(_disconnected(receive))
        gone.add_done_callback(chunks.abandon)
        chunks.send_timeout = self._send_timeout
        chunks.on_stuck = partial(_drop, receive, task)
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # As `async for`, which costs a coroutine for each chunk.
            while not chunks.over:
                chunk = chunks.ready()
                if not chunk:
                    await chunks.wait()
                    continue
                chunks.sending_since = monotonic()
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
                chunks.sending_since = None
            if gone.done() or chunks.stuck:
                # A server would keep the connection of a response that is complete.
                return
            if self._framing.drops and not (chunks.finished or self._framing.over):
                abort = _abort_of(receive)
                if abort is not None:
                    abort()
            chunks.sending_since = monotonic()
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            chunks.sending_since = None
            if chunks.stopping:
                # The server waits until every client has taken all, and some never do.
                abort = _abort_of(receive)
                if abort is not None:
                    asyncio.get_running_loop().call_later(FAREWELL_S, abort)
        except asyncio.CancelledError:
            if not chunks.stuck or task is None or task.uncancel() > 0:
                raise
        except OSError:
            # What a server of ASGI 2.4 raises when the client has gone.
            return
        finally:
            chunks.on_stuck = None
            gone.cancel()


def _made(framing: object) -> Framing:
    made = framing() if callable(framing) else None
    if not isinstance(made, Framing):
        raise InvalidType("framing must be a subclass of Framing, or a function that makes one.")
    return made


def _drop(receive: Receive, task: asyncio.Task[Any] | None) -> None:
    """Drop the connection of a client that takes nothing; where it cannot be dropped, cancel the task that sends."""
    abort = _abort_of(receive)
    if abort is not None:
        abort()
    elif task is not None:
        task.cancel()


def _abort_of(receive: Receive) -> Callable[[], None] | None:
    """Return what drops the connection of a request, if it can be found.

    A server closes a connection when its client has taken what was sent, and a client may never do so. The protocol has no word
    for it; but ``receive`` is a method of uvicorn's request, which knows the transport. A middleware that wraps it does so in a
    closure or in a ``Request``, as Starlette's ``BaseHTTPMiddleware`` does.
    """
    found: list[object] = [receive]
    for each in found:
        owner = getattr(each, "__self__", None)
        abort = getattr(getattr(owner, "transport", None), "abort", None)
        if callable(abort) and getattr(owner, "receive", None) == each:
            return cast("Callable[[], None]", abort)
        within = [getattr(owner, "_receive", None)]
        for cell in getattr(each, "__closure__", None) or ():
            # A variable that is not assigned yet has an empty cell.
            with contextlib.suppress(ValueError):
                within.append(cell.cell_contents)
        found += [
            other
            for other in within
            if isinstance(other, (FunctionType, MethodType)) and other not in found
        ][: _MOST_WRAPPERS - len(found)]
    return None


class _Head(Response):
    """The head of a stream that was asked for by ``HEAD``."""

    def __init__(self, stream: Response) -> None:
        self.status_code = stream.status_code
        self.body = b""
        self.background = None
        self.raw_headers = stream.raw_headers


@cache
def _encoded(media_type: str, *headers: tuple[str, str]) -> list[tuple[bytes, bytes]]:
    """Return headers as a server takes them: the same objects for all responses of a framing."""
    is_text = media_type.startswith("text/") and "charset=" not in media_type
    charset = "; charset=utf-8" if is_text else ""
    return [
        (name.encode("latin-1"), value.encode("latin-1"))
        for name, value in (("content-type", media_type + charset), *headers)
    ]


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def stop_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request | None = None,
    *,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    reason: str = "stopped by the client",
    grace: float | timedelta | None = None,
) -> Response:
    """Cancel an execution for a client that has asked for it, and return the answer: ``{"success": true}``.

    Readers get their end, and the worker is told. An execution that has ended is left as it is, with the same answer.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution.
        request: The request, which *authorize* and *token_key* need.
        authorize: As of :class:`StreamResponse`.
        token_key: As of :class:`StreamResponse`; the token must permit ``stop``.
        reason: Why, for whoever reads about the cancellation.
        grace: How long the worker may still write, in seconds or as a ``timedelta``; None ends the streams at once.
    """
    check_backend(backend)
    if request is None and (authorize is not None or token_key is not None):
        raise InvalidInput("authorize and token_key need the request.")
    unable = await unable_to_stop(
        backend, execution_id, request, authorize, token_key, reason, grace
    )
    return json_response({"success": True}) if unable is None else unable


async def unable_to_stop(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request | None,
    authorize: Authorize | None,
    token_key: bytes | Sequence[bytes] | None,
    reason: str,
    grace: float | timedelta | None,
    body: ErrorBody = Framing.error_body,
) -> Response | None:
    """Cancel an execution, unless it has ended; return the answer where the request may not, or the server does not."""
    try:
        eid = keys.canonical_execution_id(execution_id)
        if request is not None:
            refused = await refusal(request, eid, authorize, token_key, "stop", body)
            if refused is not None:
                return refused
        with contextlib.suppress(ExecutionNotActive):
            await backend.cancel(eid, reason=reason, grace=grace)
    except FFError as error:
        return error_response(error, body)
    return None


async def client_script(request: Request) -> Response:
    """Return the browser client, an ES module: an endpoint for ``Route("/ff_fast.js", client_script)``.

    A browser keeps it, and asks at each load whether it has changed.
    """
    content, tag = _client_script()
    headers = {"cache-control": "no-cache", "etag": tag}
    if tag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type="text/javascript")


@cache
def _client_script() -> tuple[bytes, str]:
    content = CLIENT_JS.read_bytes()
    return content, f'"{sha256(content).hexdigest()[:16]}"'
