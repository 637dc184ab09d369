"""The Responses API of OpenAI, its reading side: ``GET /responses/{id}`` with and without ``stream``, and the stop endpoint.

A worker writes the events of a response as JSON, one a frame, and :class:`TextResponse` writes those of a text answer::

    async with backend.open_stream("resp_1") as stream:
        answer = TextResponse(stream.write, "resp_1", model="my-model")
        async for token in tokens:
            answer.delta(token)
        answer.complete()

Any client of the API reads it from the web application, from the beginning or after an event that it has got::

    routes = openai_responses.routes(backend, backend.execution_id_for)

The place of a frame in its stream is its ``sequence_number``, from 0, so what a worker writes needs none. Where an attempt is
followed by another one, after a failure or the death of a worker, its events do not count any more, and the API has no word
for that. So a client that has got some of them gets an ``error`` event with the code ``response_restarted``, and reads again
from the beginning; the number of that event comes between those of both attempts, which go on. Nobody gets events of two
attempts in one response.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from typing import TYPE_CHECKING, Any, NamedTuple
from uuid import uuid4

import orjson

from ff_fast import keys
from ff_fast.errors import (
    AttemptNotFound,
    ExecutionNotFound,
    FFError,
    InvalidInput,
)
from ff_fast.types import AttemptStarted, End, Gap, Snapshot, cursor_after
from ff_fast.web.framing import Framing, event
from ff_fast.web.reading import HEARTBEAT_S

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence
    from datetime import timedelta

    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.routing import Route

    from ff_fast import StreamFrame, aio
    from ff_fast.web.framing import Item
    from ff_fast.web.response import Authorize

_BEGINNINGS = frozenset(("response.created", "response.queued", "response.in_progress"))
_ENDS = frozenset(("response.completed", "response.failed", "response.incomplete"))
# Frames of a page that is folded.
_PAGE = 2_000
# None, or a number of an event: below that of the last frame that a stream can have.
_NUMBER = re.compile(r"[0-9]{0,15}")

RESTARTED = "response_restarted"
TRIMMED = "response_events_expired"


def response_id(execution_id: str) -> str:
    """Return the id of the response that an execution is: ``resp_`` and its id as it stands in a URL."""
    return f"resp_{keys.url_id(execution_id)}"


def execution_id_of(response_id: str) -> str:
    """Return the execution that :func:`response_id` has named.

    Raises:
        InvalidId: It is no such id.
    """
    return keys.canonical_execution_id(response_id.removeprefix("resp_"))


# -- the worker's side -----------------------------------------------------------------------------------------------------


def empty_response(id: str, *, status: str = "in_progress", **fields: Any) -> dict[str, Any]:  # noqa: A002 - the name of the field
    """Return the JSON of a response without output.

    Args:
        id: Its id.
        status: ``queued``, ``in_progress``, ``completed``, ``failed``, ``cancelled`` or ``incomplete``.
        fields: What else it has, such as ``model``, in place of the defaults.
    """
    return {
        "id": id,
        "object": "response",
        "created_at": int(time.time()),
        "status": status,
        "background": True,
        "error": None,
        "incomplete_details": None,
        "instructions": None,
        "metadata": {},
        "model": "",
        "output": [],
        "parallel_tool_calls": True,
        "temperature": None,
        "tool_choice": "auto",
        "tools": [],
        "top_p": None,
        **fields,
    }


class TextResponse:
    """Writes the events of an answer that is one text, in the order of the API. It does no I/O but by *write*.

    A failure needs no event: fail the execution, and readers get ``response.failed``.

    Args:
        write: ``write`` of a stream, a writer or a task: it takes the payload of a frame.
        id: Id of the response, as the client knows it.
        fields: Further fields of the response, such as ``model`` and ``metadata``.
    """

    def __init__(
        self,
        write: Callable[..., object],
        id: str,  # noqa: A002 - the name of the field
        **fields: Any,
    ) -> None:
        self._write = write
        self._response = empty_response(id, **fields)
        self._item_id = f"msg_{uuid4().hex}"
        self._text: list[str] = []
        self._ended = False
        self._event("response.created", response=self._response)
        self._event("response.in_progress", response=self._response)
        self._event("response.output_item.added", output_index=0, item=self._item("in_progress"))
        self._part_event("response.content_part.added", part=_part(""))

    def delta(self, text: str) -> None:
        """Write the next piece of the text.

        Raises:
            InvalidInput: The response is complete.
        """
        if self._ended:
            raise InvalidInput("The response is complete; write nothing more.")
        if text:
            self._part_event("response.output_text.delta", delta=text, logprobs=[])
            self._text.append(text)

    def complete(
        self, *, usage: Mapping[str, object] | None = None, incomplete: str | None = None
    ) -> None:
        """Write the end of the text, of its message and of the response; a second call does nothing.

        Args:
            usage: ``usage`` of the response.
            incomplete: Why the text is incomplete, such as ``max_output_tokens``; None if it is not.
        """
        if self._ended:
            return
        self._ended = True
        status = "completed" if incomplete is None else "incomplete"
        text = "".join(self._text)
        self._part_event("response.output_text.done", text=text, logprobs=[])
        self._part_event("response.content_part.done", part=_part(text))
        item = self._item(status, _part(text))
        self._event("response.output_item.done", output_index=0, item=item)
        response = {**self._response, "status": status, "output": [item]}
        if usage is not None:
            response["usage"] = usage
        if incomplete is not None:
            response["incomplete_details"] = {"reason": incomplete}
        self._event(f"response.{status}", response=response)

    def _item(self, status: str, *content: object) -> dict[str, object]:
        return {
            "id": self._item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    def _part_event(self, kind: str, **fields: object) -> None:
        self._event(kind, item_id=self._item_id, output_index=0, content_index=0, **fields)

    def _event(self, kind: str, **fields: object) -> None:
        self._write(orjson.dumps({"type": kind, **fields}), frame_type=kind)


def _part(text: str) -> dict[str, object]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


# -- the reader's side -----------------------------------------------------------------------------------------------------


class ResponsesFraming(Framing):
    """The events of a response, numbered: what :func:`retrieve_response` sends.

    A frame that is no JSON object with a ``type`` is left out, and its number with it. Where an execution has ended without
    an event that ends the response, one is made: ``response.completed`` or ``response.failed``, whose ``response`` has the
    status ``cancelled`` after a cancellation.

    Args:
        id: Id of the response, where the worker has written none.
        attempt_index: The attempt that is read.
        base: The number of its first event.
        starting_after: The number of the last event that the client has got; None for none.
        has_end: It has got the end of the response.
    """

    def __init__(
        self,
        id: str,  # noqa: A002 - the name of the field
        *,
        attempt_index: int = 0,
        base: int = 0,
        starting_after: int | None = None,
        has_end: bool = False,
    ) -> None:
        self._attempt = attempt_index
        self._base = base
        self._after = -1 if starting_after is None else starting_after
        # Whether the client has got events of the attempt.
        self._begun = self._after >= base
        self._next = max(base, self._after + 1)
        self._response = empty_response(id)
        self._ended = has_end

    @staticmethod
    def error_body(code: str, message: str, status: int) -> object:
        return _error_body(code, message, status)

    def items(self, items: Sequence[Item]) -> bytes:
        parts: list[bytes] = []
        for item in items:
            if self.over:
                break
            if isinstance(item, AttemptStarted):
                parts.append(self._attempt_started(item))
            elif isinstance(item, Gap):
                parts.append(self._gap(item))
            elif isinstance(item, End):
                parts.append(self._end(item))
            elif not isinstance(item, Snapshot):
                parts.append(self._frame(item))
        return b"".join(parts)

    def shutdown(self, retry_ms: int) -> bytes:  # noqa: ARG002 - the clients would take it for an event
        return b": shutting down\n\n"

    def _frame(self, frame: StreamFrame) -> bytes:
        number = self._base + frame.sequence - 1
        if number <= self._after or self._ended:
            return b""
        self._begun = True
        self._next = number + 1
        payload, kind = frame.payload, frame.frame_type
        known = kind.startswith("response.") or kind == "error"
        if not known or kind in _BEGINNINGS or b'"sequence_number"' in payload:
            found = _event_of(payload)
            if found is None:
                return b""
            kind = found["type"]
            if kind in _BEGINNINGS and isinstance(found.get("response"), dict):
                self._response = found["response"]
            payload = orjson.dumps({**found, "sequence_number": number})
        elif payload[:1] == b"{" and payload[1:2] != b"}":
            payload = b'{"sequence_number":%d,%b' % (number, payload[1:])
        else:
            return b""
        self._ended = kind in _ENDS
        return event(payload, event=kind)

    def _attempt_started(self, started: AttemptStarted) -> bytes:
        later = started.attempt_index - self._attempt
        if later <= 0:
            return b""
        if self._ended:
            self.over = True
            return b""
        if self._begun:
            text = "The response was started again: drop what came so far, and read it from the beginning."
            return self._failed(RESTARTED, text)
        # Each attempt leaves out one number, which the event above has.
        self._attempt = started.attempt_index
        self._base = self._next = self._next + later
        return b""

    def _gap(self, gap: Gap) -> bytes:
        if gap.reason == "cursor_ahead" or self._ended:
            # The client says that it has got them.
            return b""
        return self._failed(TRIMMED, "Events of the response are not kept any more.")

    def _end(self, end: End) -> bytes:
        if self._ended:
            return b""
        status, error = _status_of(end.outcome, end.error)
        response = {**self._response, "status": status, "error": error}
        kind = "response.completed" if status == "completed" else "response.failed"
        return self._made(kind, response=response)

    def failed(self, error: FFError) -> bytes:
        if self._next == 0:
            self.over = True
            return super().failed(error)
        # With the number of the event before it, behind which a client goes on: the next one is that of a frame.
        self._next -= 1
        return self._failed(error.code, "The response cannot be read at the moment; go on later.")

    def _failed(self, code: str, message: str) -> bytes:
        self.over = True
        return self._made("error", code=code, message=message, param=None)

    def _made(self, kind: str, **fields: object) -> bytes:
        data = {"type": kind, "sequence_number": self._next, **fields}
        self._next += 1
        return event(orjson.dumps(data), event=kind)


def _event_of(payload: bytes) -> dict[str, Any] | None:
    try:
        found = orjson.loads(payload)
    except ValueError:
        return None
    good = isinstance(found, dict) and isinstance(found.get("type"), str)
    return found if good else None


def _status_of(outcome: str | None, error: str | None) -> tuple[str, dict[str, str] | None]:
    if outcome == "success":
        return "completed", None
    if outcome == "cancelled":
        return "cancelled", None
    return "failed", {"code": "server_error", "message": error or "The response has failed."}


def _error_body(code: str, message: str, status: int) -> object:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Fold:
    """Makes the JSON of a response from the events of one attempt."""

    def __init__(self) -> None:
        self.response: dict[str, Any] | None = None
        self.ended = False
        self._items: dict[int, dict[str, Any]] = {}
        self._whole: set[int] = set()
        self._texts: dict[tuple[int, int | None, str], list[str]] = {}

    def add(self, payload: bytes) -> None:
        """Take the next event; what is none changes nothing."""
        found = _event_of(payload)
        if found is None or self.ended:
            return
        kind = found["type"]
        response = found.get("response")
        if isinstance(response, dict) and (kind in _BEGINNINGS or kind in _ENDS):
            self.response = response
            self.ended = kind in _ENDS
        index = found.get("output_index")
        if not isinstance(index, int):
            return
        item = found.get("item")
        if kind.startswith("response.output_item.") and isinstance(item, dict):
            self._items[index] = item
            if kind.endswith(".done"):
                self._whole.add(index)
            return
        part_index = found.get("content_index")
        part = found.get("part")
        if kind.startswith("response.content_part.") and isinstance(part, dict):
            self._put_part(index, part_index, part)
        elif isinstance(found.get("delta"), str) and kind in _DELTAS:
            self._texts.setdefault((index, part_index, _DELTAS[kind]), []).append(found["delta"])

    def _put_part(self, index: int, part_index: object, part: dict[str, Any]) -> None:
        content = self._items.get(index, {}).get("content")
        if isinstance(content, list) and isinstance(part_index, int) and part_index >= 0:
            content[part_index : part_index + 1] = [part]

    def output(self, *, whole: bool = True) -> list[dict[str, Any]]:
        """Return the output so far.

        Args:
            whole: All events were there; else only items are returned that are complete.
        """
        for (index, part_index, field), deltas in self._texts.items():
            target: Any = self._items.get(index)
            if index in self._whole or target is None:
                continue
            if part_index is not None:
                content = target.get("content")
                if not isinstance(content, list) or not part_index < len(content):
                    continue
                target = content[part_index]
            target[field] = "".join(deltas)
        return [self._items[at] for at in sorted(self._items) if whole or at in self._whole]


# Where the pieces of an event go, in an item or in a part of it.
_DELTAS = {
    "response.output_text.delta": "text",
    "response.reasoning_text.delta": "text",
    "response.refusal.delta": "refusal",
    "response.function_call_arguments.delta": "arguments",
    "response.mcp_call_arguments.delta": "arguments",
    "response.custom_tool_call_input.delta": "input",
}


async def response_json(
    backend: aio.ValkeyBackend, execution_id: str, *, response_id: str | None = None
) -> dict[str, Any]:
    """Return the JSON of a response as it is: what its events add up to, and how the execution stands.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution.
        response_id: The id of the response, where the worker has written none.

    Raises:
        ExecutionNotFound: There is no such execution.
    """
    eid = keys.canonical_execution_id(execution_id)
    described = await backend.describe(eid)
    fold, whole = await _fold(backend, eid, described.attempt_index or 0)
    response = fold.response
    if fold.ended and response is not None:
        return response
    if response is None:
        created_at = described.created_at_ms // 1000
        response = empty_response(response_id or _id_of(eid), created_at=created_at)
    response = {**response, "output": fold.output(whole=whole)}
    if described.outcome is not None:
        reason = described.failure_reason
        response["status"], response["error"] = _status_of(described.outcome, reason)
    else:
        queued = described.attempt_index is None
        response["status"] = "queued" if queued else "in_progress"
    return response


# The name is that of an argument elsewhere.
_id_of = response_id


async def _fold(backend: aio.ValkeyBackend, eid: str, attempt_index: int) -> tuple[Fold, bool]:
    """Fold the events of an attempt; the last one alone where it holds the whole response."""
    stream = await backend.describe_stream(eid, attempt_index)
    if stream.closed_reason is not None:
        fold = await _last_event(backend, eid, attempt_index, stream.frame_count)
        if fold.ended:
            return fold, True
    fold = Fold()
    after: str | None = None
    whole = True
    while True:
        try:
            page = await backend.read_stream(eid, attempt_index, after=after, count=_PAGE)
        except AttemptNotFound:
            return fold, whole
        for frame in page:
            fold.add(frame.payload)
        whole = whole and not page.gaps
        if not page or page.end_reason is not None:
            return fold, whole
        after = page.cursor


async def _last_event(backend: aio.ValkeyBackend, eid: str, attempt_index: int, count: int) -> Fold:
    fold = Fold()
    if count:
        after = cursor_after(count - 1, attempt_index)
        for frame in await backend.read_stream(eid, attempt_index, after=after, count=1):
            fold.add(frame.payload)
    return fold


async def retrieve_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request,
    *,
    response_id: str | None = None,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    heartbeat: float | timedelta = HEARTBEAT_S,
    headers: Mapping[str, str] | None = None,
    **options: Any,
) -> Response:
    """Answer ``GET /responses/{id}``: with ``?stream=true`` its events, after ``starting_after``, to its end; else its JSON.

    Where events that the client asks for are not kept any more, the answer is 400. All errors have the API's form.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution.
        request: The request.
        response_id: The id of the response, where the worker has written none; None is that of :func:`response_id`.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`; clients of the API send their ``api_key`` as ``Bearer``.
        heartbeat: As of :class:`ff_fast.web.StreamResponse`.
        headers: Further headers of the stream.
        options: Further arguments of :class:`ff_fast.web.StreamResponse`.
    """
    from ff_fast.web.response import StreamResponse, error_response, json_response, refusal

    try:
        eid = keys.canonical_execution_id(execution_id)
        refused = await refusal(request, eid, authorize, token_key, "read", _error_body)
        if refused is not None:
            return refused
        query = request.query_params
        if query.get("stream", "").lower() not in ("true", "1"):
            found = await response_json(backend, eid, response_id=response_id)
            return json_response(found)
        asked = query.get("starting_after", "")
        if _NUMBER.fullmatch(asked) is None:
            return _bad_request("invalid_value", "starting_after must be an integer from 0.")
        number = int(asked) if asked else None
        place = await _place_of(backend, eid, number)
        if place.refusal is not None:
            return _bad_request(*place.refusal)
    except FFError as error:
        return error_response(error, _error_body)
    return StreamResponse(
        backend,
        eid,
        request,
        after=place.cursor,
        framing=lambda: ResponsesFraming(
            response_id or _id_of(eid),
            attempt_index=place.attempt_index,
            base=place.base,
            starting_after=number,
            has_end=place.has_end,
        ),
        heartbeat=heartbeat,
        headers=headers,
        **options,
    )


def _bad_request(code: str, message: str) -> Response:
    from ff_fast.web.response import json_response

    return json_response(_error_body(code, message, 400), 400)


class _Place(NamedTuple):
    """Where a client goes on; or code and message of the refusal."""

    cursor: str = ""
    attempt_index: int = 0
    base: int = 0
    has_end: bool = False
    refusal: tuple[str, str] | None = None


async def _place_of(backend: aio.ValkeyBackend, eid: str, number: int | None) -> _Place:
    """Find the place behind the event *number*, in the newest attempt."""
    described = await backend.describe(eid)
    if described.attempt_index is None:
        return _Place()
    index = described.attempt_index
    earlier = await asyncio.gather(*[backend.describe_stream(eid, at) for at in range(index)])
    base = sum([each.frame_count + 1 for each in earlier])
    sequence = 0
    has_end = False
    if number is not None:
        if number < base - 1:
            text = "The response was started again after this event; read it from the beginning."
            return _Place(refusal=(RESTARTED, text))
        sequence = number - base + 1
        if described.outcome is not None:
            count = (await backend.describe_stream(eid, index)).frame_count
            # The end is the last frame, or was made behind it.
            has_end = sequence > count or (
                sequence == count and (await _last_event(backend, eid, index, count)).ended
            )
    cursor = cursor_after(sequence, index)
    # A read that does not wait: whether the events that follow are kept is known before anything is sent.
    with contextlib.suppress(AttemptNotFound):
        page = await backend.read_stream(eid, index, after=cursor, count=1)
        if any(gap.reason != "cursor_ahead" for gap in page.gaps):
            text = "This response can no longer be streamed from there: its events are not kept any more."
            return _Place(refusal=(TRIMMED, text))
    return _Place(cursor if index or sequence else "", index, base, has_end)


async def cancel_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request,
    *,
    response_id: str | None = None,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    reason: str = "cancelled by the client",
    grace: float | timedelta | None = None,
) -> Response:
    """Answer ``POST /responses/{id}/cancel``: the execution is cancelled, and the JSON of the response returned.

    A response that has ended is returned as it is.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution.
        request: The request.
        response_id: As of :func:`retrieve_response`.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`; the token must permit ``stop``.
        reason: Why, for whoever reads about the cancellation.
        grace: How long the worker may still write, in seconds or as a ``timedelta``; None ends the stream at once.
    """
    from ff_fast.web.response import error_response, json_response, unable_to_stop

    unable = await unable_to_stop(
        backend, execution_id, request, authorize, token_key, reason, grace, _error_body
    )
    if unable is not None:
        return unable
    try:
        eid = keys.canonical_execution_id(execution_id)
        found = await response_json(backend, eid, response_id=response_id)
    except FFError as error:
        return error_response(error, _error_body)
    return json_response(found)


def routes(
    backend: aio.ValkeyBackend,
    execution_id: Callable[[str], str] = execution_id_of,
    *,
    authorize: Authorize | None = None,
    token_key: bytes | Sequence[bytes] | None = None,
    **options: Any,
) -> list[Route]:
    """Return the routes ``GET /responses/{id}`` and ``POST /responses/{id}/cancel``; mount them where clients expect ``/v1``.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Makes the execution's id of the response's; such as ``backend.execution_id_for`` for named streams.
        authorize: As of :class:`ff_fast.web.StreamResponse`.
        token_key: As of :class:`ff_fast.web.StreamResponse`.
        options: Further arguments of :func:`retrieve_response`.
    """
    # Before Starlette is imported: this says what to install.
    from ff_fast.web.response import error_response

    async def answer(
        request: Request, respond: Callable[..., Awaitable[Response]], **more: Any
    ) -> Response:
        id_ = request.path_params["response_id"]
        try:
            eid = execution_id(id_)
        except InvalidInput:
            return error_response(ExecutionNotFound(), _error_body)
        checks = {"authorize": authorize, "token_key": token_key}
        return await respond(backend, eid, request, response_id=id_, **checks, **more)

    async def retrieve(request: Request) -> Response:
        return await answer(request, retrieve_response, **options)

    async def cancel(request: Request) -> Response:
        return await answer(request, cancel_response)

    from starlette.routing import Route

    return [
        Route("/responses/{response_id}", retrieve, methods=["GET"]),
        Route("/responses/{response_id}/cancel", cancel, methods=["POST"]),
    ]
