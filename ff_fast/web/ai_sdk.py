"""The UI message stream of the AI SDK: what ``useChat`` reads, and what it resumes.

A worker writes the chunks of the protocol with :class:`ChunkWriter`, or plain text. The application has three routes::

    @app.post("/api/chat")
    async def send(request: Request):
        execution_id = await start_the_work(await request.json())
        return ai_sdk.message_response(backend, execution_id, request)

    app.router.routes.extend(ai_sdk.routes(backend, execution_id_of_chat))

A page that is loaded again with ``useChat({resume: true})`` gets the whole answer with one delta for each part, and goes on.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import orjson

from ff_fast import keys
from ff_fast.errors import ExecutionNotFound, FFError, InvalidId
from ff_fast.web.chunk_log import Chunk, ChunkFraming, ChunkWriter, chunk_of
from ff_fast.web.framing import HEADERS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from ff_fast import aio
    from ff_fast.types import End
    from ff_fast.web.response import Authorize, StreamResponse

    FindExecution = Callable[[Request, str], "str | Awaitable[str | None] | None"]

__all__ = [
    "AiSdkFraming",
    "ChunkWriter",
    "message_response",
    "resume_response",
    "routes",
]

_RESTARTED = "The answer was started again; load it again."


class AiSdkFraming(ChunkFraming):
    """The UI message stream, version 1: chunks as JSON, and ``[DONE]`` at the end.

    A new attempt of the worker is a ``reset-step``, behind which the chunks of the new one follow. The protocol can take back
    one step: where an attempt had finished a step, the response ends with an ``error``, and the next one begins anew. ``finish``
    goes out when the execution has succeeded. What was cancelled ends with ``abort``, and everything else with ``error``, also
    an answer of which a part is lost and in no summary.

    Args:
        text: The worker writes text instead of chunks. See :class:`ff_fast.web.chunk_log.ChunkFraming`.
        message_id: Id of the message, where the worker names none.
    """

    headers: Mapping[str, str] = {**HEADERS, "x-vercel-ai-ui-message-stream": "v1"}
    _last = "finish"
    _fatal = "error"
    _text_delta = "text-delta"
    _reasoning_delta = "reasoning-delta"

    def __init__(self, *, text: bool = False, message_id: str | None = None) -> None:
        super().__init__(text=text)
        self._message_id = message_id
        self._started = False
        # Steps that were started, and whether the worker does so itself.
        self._steps = 0
        self._makes_steps = False
        # Chunks that the client has got from an attempt before.
        self._repeated: set[str] = set()
        self._open: dict[tuple[str, str], None] = {}

    def _event(self, chunk: Chunk) -> bytes:
        return b"data: %b\n\n" % chunk.json

    def _goodbye(self) -> bytes:
        return b"data: [DONE]\n\n"

    def _send(self, chunk: Chunk) -> list[Chunk]:
        kind = chunk.kind
        if kind in self._repeated:
            self._repeated.discard(kind)
            metadata = (chunk.fields or {}).get("messageMetadata")
            if metadata is None:
                return []
            return [chunk_of(type="message-metadata", messageMetadata=metadata)]
        out: list[Chunk] = []
        if not self._started:
            self._started = True
            if kind != "start":
                out.append(self._start_chunk({}))
        if kind == "start":
            if self._message_id is not None and "messageId" not in (chunk.fields or {}):
                chunk = self._start_chunk(chunk.fields or {})
        elif kind == "start-step":
            self._steps += 1
        elif chunk.fields is None:
            out += self._opened(kind.removesuffix("-delta"), chunk.part)
        elif kind in ("text-start", "reasoning-start"):
            self._open[kind.removesuffix("-start"), chunk.fields["id"]] = None
        elif kind in ("text-end", "reasoning-end"):
            self._open.pop((kind.removesuffix("-end"), chunk.fields["id"]), None)
        elif kind == "reset-step":
            self._open.clear()
        return [*out, chunk]

    def _start_chunk(self, fields: Mapping[str, Any]) -> Chunk:
        named = {} if self._message_id is None else {"messageId": self._message_id}
        return chunk_of(**{"type": "start", **named, **fields})

    def _opened(self, kind: str, part: str) -> list[Chunk]:
        """Return what opens a part that text has made."""
        if kind == "tool-input" or (kind, part) in self._open:
            return []
        self._open[kind, part] = None
        out = [chunk_of(type=f"{kind}-start", id=part)]
        if self._steps == 0:
            self._steps = 1
            self._makes_steps = True
            out.insert(0, chunk_of(type="start-step"))
        return out

    def _restarted(self) -> list[Chunk]:
        if not self._started:
            return []
        self._open.clear()
        if self._steps > 1:
            self.over = self._told = True
            return self._broken(_RESTARTED, "restarted")
        self._repeated = {"start"} | ({"start-step"} if self._steps else set())
        return [chunk_of(type="reset-step")]

    def _ended(self, end: End) -> list[Chunk]:
        out: list[Chunk] = [] if self._started else [self._start_chunk({})]
        if end.outcome == "cancelled":
            reason = {} if end.error is None else {"reason": end.error}
            return [*out, chunk_of(type="abort", **reason)]
        if end.outcome != "success":
            return [*out, *self._broken(end.error or end.reason, end.reason)]
        out += [chunk_of(type=f"{kind}-end", id=part) for kind, part in self._open]
        if self._makes_steps:
            out.append(chunk_of(type="finish-step"))
        return [*out, self._held or chunk_of(type="finish")]

    def _broken(self, message: str, code: str) -> list[Chunk]:  # noqa: ARG002 - the protocol has no code
        return [chunk_of(type="error", errorText=message)]


def message_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request | None = None,
    *,
    text: bool = False,
    message_id: str | None = None,
    **options: Any,
) -> StreamResponse:
    """Return the answer to a message: the UI message stream of an execution, from its beginning.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution that produces the answer.
        request: The request.
        text: See :class:`AiSdkFraming`.
        message_id: See :class:`AiSdkFraming`.
        **options: See :class:`ff_fast.web.StreamResponse`.
    """
    from ff_fast.web.response import StreamResponse

    return StreamResponse(
        backend,
        execution_id,
        request,
        framing=lambda: AiSdkFraming(text=text, message_id=message_id),
        after="",
        **options,
    )


async def resume_response(
    backend: aio.ValkeyBackend,
    execution_id: str | None,
    request: Request,
    *,
    text: bool = False,
    message_id: str | None = None,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    ended: bool = False,
    **options: Any,
) -> Response:
    """Return the answer to ``GET {api}/{id}/stream``: the message stream of the execution, or 204 if nothing is streaming.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution that produces the newest answer of the chat; None if there is none.
        request: The request.
        text: See :class:`AiSdkFraming`.
        message_id: See :class:`AiSdkFraming`. Without an id a client keeps the one that it has made up.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`.
        ended: An execution that has ended is streamed too; for applications that do not keep the messages themselves.
        **options: See :class:`ff_fast.web.StreamResponse`.
    """
    from ff_fast.web.response import error_response, refusal

    if execution_id is None:
        return _nothing()
    try:
        eid = keys.canonical_execution_id(execution_id)
        refused = await refusal(request, eid, authorize, token_key, "read")
        if refused is not None:
            return refused
        description = await backend.describe(eid)
    except (ExecutionNotFound, InvalidId):
        return _nothing()
    except FFError as error:
        return error_response(error)
    if description.outcome is not None and not ended:
        return _nothing()
    return message_response(backend, eid, request, text=text, message_id=message_id, **options)


def _nothing() -> Response:
    from starlette.responses import Response

    return Response(status_code=204, headers={"cache-control": "no-store"})


def _success() -> Response:
    from starlette.responses import JSONResponse

    return JSONResponse({"success": True}, headers={"cache-control": "no-store"})


def routes(
    backend: aio.ValkeyBackend,
    find: FindExecution,
    *,
    api: str = "/api/chat",
    text: bool = False,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    **options: Any,
) -> list[Route]:
    """Return the routes ``GET {api}/{id}/stream`` and ``POST {api}/{id}/stop``.

    Stopping cancels the execution. A body ``{"activeStreamId": ...}`` names the execution that is meant, by its id as in URLs:
    if the chat has another one by then, nothing is done.

    Args:
        backend: The backend, of the asyncio shell.
        find: Called with the request and the id of a chat, and awaited if it returns an awaitable: returns the id of the execution
            that produces the newest answer, or None.
        api: Path of the API, as the transport of the client has it.
        text: See :class:`AiSdkFraming`.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`.
        **options: See :func:`resume_response`.
    """
    # Before Starlette is imported: this says what to install.
    from ff_fast.web.response import stop_response

    def route(path: str, answer: Callable[[Request], Awaitable[Response]], method: str) -> Route:
        from starlette.routing import Route

        return Route(path, answer, methods=[method])

    async def found(request: Request) -> str | None:
        execution_id = find(request, request.path_params["id"])
        if inspect.isawaitable(execution_id):
            execution_id = await execution_id
        return execution_id

    async def stream(request: Request) -> Response:
        return await resume_response(
            backend,
            await found(request),
            request,
            text=text,
            authorize=authorize,
            token_key=token_key,
            **options,
        )

    async def stop(request: Request) -> Response:
        execution_id = await found(request)
        meant = await _active_stream(request)
        if execution_id is None or not _is_same(meant, execution_id):
            return _success()
        return await stop_response(
            backend, execution_id, request, authorize=authorize, token_key=token_key
        )

    return [
        route(f"{api}/{{id}}/stream", stream, "GET"),
        route(f"{api}/{{id}}/stop", stop, "POST"),
    ]


async def _active_stream(request: Request) -> str | None:
    """Return the id in the body of a request to stop."""
    body = await request.body()
    try:
        given = orjson.loads(body) if body else None
    except ValueError:
        return None
    meant = given.get("activeStreamId") if isinstance(given, dict) else None
    return meant if isinstance(meant, str) else None


def _is_same(meant: str | None, execution_id: str) -> bool:
    if meant is None:
        return True
    try:
        return keys.canonical_execution_id(meant) == keys.canonical_execution_id(execution_id)
    except InvalidId:
        return False
