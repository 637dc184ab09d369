"""The streams of runs as the SDKs of LangGraph read them: ``join_stream``, its reconnects, and the status of a run.

A worker writes each chunk of ``graph.astream`` as JSON, its mode as the type of the frame::

    async for mode, chunk in graph.astream(input, stream_mode=["updates", "custom"]):
        task.write(orjson.dumps(chunk), frame_type=mode)

The web application joins it to readers; with :func:`routes`, or one by one::

    @app.get("/threads/{thread_id}/runs/{run_id}/stream")
    async def join(thread_id: str, run_id: str, request: Request):
        eid = backend.execution_id_for(run_id)
        return join_response(backend, eid, request, thread_id=thread_id, run_id=run_id)

The ``Location`` of the answer is what makes an SDK come again after a lost connection, from the last id that it has got. The
response to ``POST /threads/{thread_id}/runs/stream``, which begins a run and reads it, is the same.
"""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import quote

import orjson

from ff_fast import keys
from ff_fast._hot import sse
from ff_fast.errors import ExecutionNotFound, FFError, InvalidInput
from ff_fast.types import AttemptStarted, End, Gap, Snapshot
from ff_fast.web.framing import EventFraming, event
from ff_fast.web.reading import HEARTBEAT_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
    from datetime import timedelta

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from ff_fast import StreamFrame, aio
    from ff_fast.types import ExecutionDescription
    from ff_fast.web.framing import Item
    from ff_fast.web.response import Authorize

_STATUSES = {
    "success": "success",
    "failed": "error",
    "cancelled": "interrupted",
    "expired": "timeout",
}


# The mode that a client names, where it is not the type of its events.
_TYPES = {"messages-tuple": "messages"}


def location(thread_id: str, run_id: str) -> str:
    """Return the path of the stream of a run, for the header ``Location``."""
    return f"{_run_path(thread_id, run_id)}/stream"


def _run_path(thread_id: str, run_id: str) -> str:
    return f"/threads/{quote(thread_id, safe='')}/runs/{quote(run_id, safe='')}"


class LangGraphFraming(EventFraming):
    """Server-sent events as the SDKs of LangGraph read them; each has the id of its place.

    A frame is an event of its type. What else a reader gets:

    - ``metadata``: ``{"run_id", "attempt"}``, where an attempt begins, from 1; what came before does not count any more.
    - ``end``: the run has succeeded, or was cancelled.
    - ``error``: ``{"error", "message"}``; the run has failed, or events are missing (``resume_gap``), which ends the response.

    Args:
        run_id: Id of the run, for ``metadata``.
        modes: Send only frames of these types, and those that begin with one of them and ``/`` or ``|``; None sends all. The
            mode ``messages-tuple`` is that of frames of the type ``messages``, as in the API.
        data: What a payload is. ``text``: JSON, which is sent as it is; ``json``: text, which is sent as a JSON string.
    """

    # A client that has got the end, and asks again, gets it again: these clients take 204 for a broken connection.
    ids = False
    drops = True

    _RESERVED = frozenset(("metadata", "end", "error", "message"))

    def __init__(
        self,
        run_id: str,
        *,
        modes: Iterable[str] | None = None,
        data: Literal["text", "json"] = "text",
    ) -> None:
        self._run_id = run_id
        self._modes = None if modes is None else frozenset(_TYPES.get(each, each) for each in modes)
        super().__init__(types=True, data=data)

    def _start(self, carry: bytes) -> sse.Events:
        return sse.Events(
            self._control,
            kind=self._data,
            types=True,
            default="",
            reserved=self._RESERVED,
            carry=carry,
        )

    @staticmethod
    def error_body(code: str, message: str, status: int) -> object:  # noqa: ARG004 - others' bodies have it
        return {"detail": message, "code": code}

    def items(self, items: Sequence[Item]) -> bytes:
        wanted: list[Item] = []
        for item in items:
            if isinstance(item, Gap):
                self.over = True
                wanted.append(item)
                break
            if isinstance(item, (Snapshot, AttemptStarted, End)) or self._wants(item):
                wanted.append(item)
        return super().items(wanted)

    def _wants(self, frame: StreamFrame) -> bool:
        if self._modes is None:
            return True
        kind = frame.frame_type
        return kind in self._modes or kind.partition("|")[0].partition("/")[0] in self._modes

    def _control(self, item: Item) -> bytes:
        if isinstance(item, AttemptStarted):
            data = {"run_id": self._run_id, "attempt": item.attempt_index + 1}
            return _event("metadata", data, item.cursor)
        if isinstance(item, Gap):
            # Without an id of its own: a client that insists begins before the gap again.
            return _error("resume_gap", "Events of the run are not kept any more; read its result.")
        if not isinstance(item, End):
            return b""
        if item.outcome in ("success", "cancelled"):
            return _event("end", None, item.cursor)
        return _error(item.reason, item.error or "The run has failed.", item.cursor)

    # Lines of comments alone: behind an empty one, the SDK for JavaScript has an event without a name.

    def heartbeat(self) -> bytes:
        return b": keep-alive\n"

    def shutdown(self, retry_ms: int) -> bytes:  # noqa: ARG002 - the SDKs have times of their own
        return b": shutting down\n"

    def failed(self, error: FFError) -> bytes:
        """Return a comment: the client finds that the run goes on, and comes again."""
        return b": %b\n" % error.code.encode()


def _event(kind: str, data: object, cursor: str | None = None) -> bytes:
    return event(orjson.dumps(data), id=cursor, event=kind)


def _error(code: str, message: str, cursor: str | None = None) -> bytes:
    return _event("error", {"error": code, "message": message}, cursor)


def join_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request,
    *,
    thread_id: str,
    run_id: str,
    data: Literal["text", "json"] = "text",
    heartbeat: float | timedelta = HEARTBEAT_S,
    headers: Mapping[str, str] | None = None,
    **options: Any,
) -> Response:
    """Return the stream of a run, from where the client left off to its end.

    ``?stream_mode=`` chooses the types of frames; it may come several times, or hold a JSON list. A reader never cancels a run, so ``?cancel_on_disconnect=`` does nothing.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution.
        request: The request.
        thread_id: Id of the thread, as it stands in the URL.
        run_id: Id of the run, as it stands in the URL.
        data: See :class:`LangGraphFraming`.
        heartbeat: As of :class:`ff_fast.web.StreamResponse`.
        headers: Further headers.
        options: Further arguments of :class:`ff_fast.web.StreamResponse`.
    """
    from ff_fast.web.response import StreamResponse

    modes = _modes(request.query_params.getlist("stream_mode"))
    return StreamResponse(
        backend,
        execution_id,
        request,
        framing=lambda: LangGraphFraming(run_id, modes=modes, data=data),
        heartbeat=heartbeat,
        headers={
            "location": location(thread_id, run_id),
            "content-location": _run_path(thread_id, run_id),
            **(headers or {}),
        },
        **options,
    )


def _modes(given: Sequence[str]) -> list[str] | None:
    """Return the modes in a query: each by itself, or several as a JSON list, as the SDK for JavaScript writes them."""
    modes: list[str] = []
    for each in given:
        listed = None
        if each.startswith("["):
            with contextlib.suppress(ValueError):
                listed = orjson.loads(each)
        modes += [each] if listed is None else [mode for mode in listed if isinstance(mode, str)]
    return [mode for mode in modes if mode] or None


def run_status(described: ExecutionDescription) -> str:
    """Return the status of a run: ``pending``, ``running``, ``success``, ``error``, ``timeout`` or ``interrupted``.

    A run that waits, for a retry or in a suspension, is ``running``: its stream goes on.
    """
    if described.outcome is not None:
        return _STATUSES[described.outcome]
    return "pending" if described.attempt_index is None else "running"


async def run_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request,
    *,
    thread_id: str,
    run_id: str,
    assistant_id: str = "",
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
) -> Response:
    """Answer ``GET /threads/{thread_id}/runs/{run_id}``: the run as JSON.

    A client asks for it whose connection was closed before the end, to learn whether to come again.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution.
        request: The request.
        thread_id: Id of the thread.
        run_id: Id of the run.
        assistant_id: Id of the assistant.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`.
    """
    from ff_fast.web.response import error_response, json_response, refusal

    try:
        eid = keys.canonical_execution_id(execution_id)
        refused = await refusal(
            request, eid, authorize, token_key, "read", LangGraphFraming.error_body
        )
        if refused is not None:
            return refused
        described = await backend.describe(eid)
    except FFError as error:
        return error_response(error, LangGraphFraming.error_body)
    run: dict[str, object] = {
        "run_id": run_id,
        "thread_id": thread_id,
        "assistant_id": assistant_id,
        "created_at": _time(described.created_at_ms),
        "updated_at": _time(described.last_transition_at_ms),
        "status": run_status(described),
        "metadata": {},
        "multitask_strategy": "reject",
        "cancel_reason": described.cancellation_reason,
    }
    return json_response(run)


def _time(ms: int) -> str:
    return datetime.fromtimestamp(ms / 1000, UTC).isoformat()


async def cancel_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request,
    *,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    grace: float | timedelta | None = None,
) -> Response:
    """Answer ``POST /threads/{thread_id}/runs/{run_id}/cancel``: the run is cancelled, unless it has ended.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution.
        request: The request.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`; the token must permit ``stop``.
        grace: How long the worker may still write, in seconds or as a ``timedelta``; None ends the stream at once.
    """
    from ff_fast.web.response import json_response, unable_to_stop

    unable = await unable_to_stop(
        backend,
        execution_id,
        request,
        authorize,
        token_key,
        "cancelled by the client",
        grace,
        LangGraphFraming.error_body,
    )
    return json_response({}) if unable is None else unable


def routes(
    backend: aio.ValkeyBackend,
    execution_id: Callable[[str], str] = keys.canonical_execution_id,
    *,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    **options: Any,
) -> list[Route]:
    """Return the routes of a run below ``/threads/{thread_id}/runs/{run_id}``: its stream, its status, and its cancellation.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Makes the execution's id of the run's; such as ``backend.execution_id_for`` for named streams.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`.
        options: Further arguments of :func:`join_response`.
    """
    # Before Starlette is imported: this says what to install.
    from ff_fast.web.response import error_response

    checks: dict[str, Any] = {"authorize": authorize, "token_key": token_key}

    async def join(request: Request, eid: str) -> Response:
        return join_response(backend, eid, request, **request.path_params, **checks, **options)

    async def get(request: Request, eid: str) -> Response:
        return await run_response(backend, eid, request, **request.path_params, **checks)

    async def cancel(request: Request, eid: str) -> Response:
        return await cancel_response(backend, eid, request, **checks)

    def route(
        end: str, method: str, respond: Callable[[Request, str], Awaitable[Response]]
    ) -> Route:
        async def endpoint(request: Request) -> Response:
            try:
                eid = execution_id(request.path_params["run_id"])
            except InvalidInput:
                return error_response(ExecutionNotFound(), LangGraphFraming.error_body)
            return await respond(request, eid)

        from starlette.routing import Route

        return Route("/threads/{thread_id}/runs/{run_id}" + end, endpoint, methods=[method])

    return [route("/stream", "GET", join), route("", "GET", get), route("/cancel", "POST", cancel)]
