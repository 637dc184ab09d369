"""The events of AG-UI: what its clients, and CopilotKit, read; also by one who joins a run in the middle.

A worker writes the events with :class:`ChunkWriter`, or plain text. Who joins gets ``RUN_STARTED``, the messages so far as
``MESSAGES_SNAPSHOT``, the start of each message that is still written, and then the events as they come.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

from ff_fast import keys
from ff_fast._core.follow import follow_place
from ff_fast.errors import FFError
from ff_fast.web.chunk_log import Chunk, ChunkFraming, ChunkWriter, chunk_of
from ff_fast.web.framing import event

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.requests import Request

    from ff_fast import aio
    from ff_fast.types import End
    from ff_fast.web.response import StreamResponse

__all__ = ["AgUiFraming", "ChunkWriter", "run_response"]

_RESTARTED = "The run was started again; join it again."

# What is open between two events: by its first and its last, with the field that names it.
_SPANS: Mapping[str, tuple[str, str]] = {
    "TEXT_MESSAGE": ("messageId", "TEXT_MESSAGE_END"),
    "TOOL_CALL": ("toolCallId", "TOOL_CALL_END"),
    "REASONING_MESSAGE": ("messageId", "REASONING_MESSAGE_END"),
    "REASONING": ("messageId", "REASONING_END"),
    "STEP": ("stepName", "STEP_FINISHED"),
}
_STARTS = {f"{span}_START": span for span in _SPANS if span != "STEP"} | {"STEP_STARTED": "STEP"}
_ENDS = {end: span for span, (_, end) in _SPANS.items()}
# What a snapshot of the messages has of the events.
_IN_MESSAGES = frozenset(
    (
        "TEXT_MESSAGE_START", "TEXT_MESSAGE_CONTENT", "TEXT_MESSAGE_END", "TOOL_CALL_RESULT",
        "REASONING_MESSAGE_START", "REASONING_MESSAGE_CONTENT", "REASONING_MESSAGE_END", "MESSAGES_SNAPSHOT",
    )
)  # fmt: skip
_OF_TOOLS = frozenset(("TOOL_CALL_START", "TOOL_CALL_ARGS", "TOOL_CALL_END"))
_OF_SPANS = frozenset(("STEP_STARTED", "STEP_FINISHED", "REASONING_START", "REASONING_END"))


class AgUiFraming(ChunkFraming):
    """The events of AG-UI 1.0, each with the id of its place where it ends at one.

    The protocol has no resumption: who names a place gets what one gets who joins. The snapshot of messages replaces those that a
    client has, so it is sent where the conversation before this run is known: from *messages*, or from the ``input`` of the
    worker's ``RUN_STARTED``. Otherwise the events of the run are replayed, with one delta for each message and tool call.

    A new attempt takes back the messages of the one before with a snapshot; where the conversation is not known, it ends with
    ``RUN_ERROR``, and who joins then gets the new attempt. ``RUN_FINISHED`` goes out when the execution has succeeded, or,
    with the outcome ``cancelled``, when it was cancelled. Every other end is a ``RUN_ERROR`` whose code is the reason.

    Args:
        thread_id: Id of the thread, for a run whose worker writes no ``RUN_STARTED``.
        run_id: Id of the run, likewise.
        messages: The conversation before this run, as AG-UI has messages.
        text: The worker writes text instead of events. See :class:`ff_fast.web.chunk_log.ChunkFraming`.
    """

    _last = "RUN_FINISHED"
    _fatal = "RUN_ERROR"
    _text_delta = "TEXT_MESSAGE_CONTENT"
    _reasoning_delta = "REASONING_MESSAGE_CONTENT"

    def __init__(
        self,
        *,
        thread_id: str = "thread",
        run_id: str = "run",
        messages: Sequence[Mapping[str, Any]] | None = None,
        text: bool = False,
    ) -> None:
        super().__init__(text=text)
        self._run = {"threadId": thread_id, "runId": run_id}
        self._before = None if messages is None else list(messages)
        self._started = False
        self._restarts = False
        # What is open, in the order of its beginning.
        self._open: dict[tuple[str, str], None] = {}

    def place(self, cursor: str) -> str:
        follow_place(cursor)
        return "start"

    def _event(self, chunk: Chunk) -> bytes:
        return event(chunk.json, id=chunk.cursor)

    # -- events --------------------------------------------------------------------------------------------------------

    def _send(self, chunk: Chunk) -> list[Chunk]:
        kind = chunk.kind
        out: list[Chunk] = []
        if kind == "RUN_STARTED":
            if self._started:
                return []
            self._note_run(chunk)
        elif not self._started:
            out.append(self._run_started())
        self._started = True
        if chunk.fields is None:
            if kind != "TOOL_CALL_ARGS":
                out += self._opened(kind.removesuffix("_CONTENT"), chunk.part)
        else:
            self._span(chunk)
        return [*out, chunk]

    def _note_run(self, chunk: Chunk) -> None:
        fields = chunk.fields or {}
        self._run = {name: fields.get(name, self._run[name]) for name in ("threadId", "runId")}
        given = fields.get("input")
        if self._before is None and isinstance(given, dict) and given.get("messages"):
            self._before = given["messages"]

    def _run_started(self) -> Chunk:
        return chunk_of(type="RUN_STARTED", **self._run)

    def _span(self, chunk: Chunk) -> None:
        fields = chunk.fields or {}
        span = _STARTS.get(chunk.kind)
        if span is not None:
            self._open[span, fields[_SPANS[span][0]]] = None
            return
        span = _ENDS.get(chunk.kind)
        if span is not None:
            self._open.pop((span, fields[_SPANS[span][0]]), None)

    def _opened(self, span: str, part: str) -> list[Chunk]:
        """Return what opens a message that text has made."""
        if (span, part) in self._open:
            return []
        self._open[span, part] = None
        role = "assistant" if span == "TEXT_MESSAGE" else "reasoning"
        return [chunk_of(type=f"{span}_START", messageId=part, role=role)]

    def _closed(self) -> list[Chunk]:
        """Return what ends all that is open, the newest first."""
        out = [
            chunk_of(**{"type": _SPANS[span][1], _SPANS[span][0]: part})
            for span, part in reversed(self._open)
        ]
        self._open.clear()
        return out

    def _restarted(self) -> list[Chunk]:
        if not self._started:
            return []
        if self._before is None:
            self.over = self._told = True
            return self._broken(_RESTARTED, "producer_lost")
        return [*self._closed(), chunk_of(type="MESSAGES_SNAPSHOT", messages=self._before)]

    def _ended(self, end: End) -> list[Chunk]:
        out: list[Chunk] = [] if self._started else [self._run_started()]
        if end.outcome == "success":
            return [
                *out,
                *self._closed(),
                self._held or chunk_of(type="RUN_FINISHED", **self._run),
            ]
        if end.outcome == "cancelled":
            outcome = {"type": "cancelled"}
            return [
                *out,
                *self._closed(),
                chunk_of(type="RUN_FINISHED", **self._run, outcome=outcome),
            ]
        return [*out, *self._broken(end.error or end.reason, end.reason)]

    def _broken(self, message: str, code: str) -> list[Chunk]:
        return [chunk_of(type="RUN_ERROR", message=message, code=code)]

    # -- who joins -----------------------------------------------------------------------------------------------------

    def _joined(self, chunks: list[Chunk]) -> list[Chunk]:
        for chunk in chunks:
            if chunk.kind == "RUN_STARTED":
                self._note_run(chunk)
                break
        if self._before is None or any(chunk.kind == self._fatal for chunk in chunks):
            return self._sent(chunks)
        first = [chunk for chunk in chunks if chunk.kind == "RUN_STARTED"][:1]
        out = [] if self._started else first or [self._run_started()]
        self._started = True
        rest: list[Chunk] = []
        story = _Story(self._before)
        # How often each thing was opened and not closed again: only what is open has a start behind the snapshot.
        for chunk in chunks:
            if chunk.kind == "RUN_STARTED":
                continue
            if chunk.kind == self._last:
                self._held = chunk
                continue
            if chunk.fields is None and chunk.kind != "TOOL_CALL_ARGS":
                self._opened(chunk.kind.removesuffix("_CONTENT"), chunk.part)
            elif chunk.fields is not None:
                self._span(chunk)
            story.tell(chunk)
            if chunk.kind not in _IN_MESSAGES | _OF_TOOLS | _OF_SPANS:
                rest.append(chunk)
        tools = {part for span, part in self._open if span == "TOOL_CALL"}
        out.append(chunk_of(type="MESSAGES_SNAPSHOT", messages=story.messages(tools)))
        for span, part in self._open:
            if span == "TOOL_CALL":
                # A client would add the call a second time, so it is not in the snapshot.
                out += story.calls[part]
            elif span in ("TEXT_MESSAGE", "REASONING_MESSAGE"):
                out.append(
                    story.starts.get(part)
                    or chunk_of(type=f"{span}_START", messageId=part, role=story.roles[part])
                )
            else:
                name = "STEP_STARTED" if span == "STEP" else f"{span}_START"
                out.append(chunk_of(**{"type": name, _SPANS[span][0]: part}))
        return out + rest


class _Story:
    """The messages that a client has made of events, as the clients of the protocol do.

    Attributes:
        calls: The events of each tool call.
        starts: The first event of each message.
        roles: The role of each message.
    """

    def __init__(self, before: Sequence[Mapping[str, Any]]) -> None:
        self._messages: list[dict[str, Any]] = deepcopy([dict(each) for each in before])
        self.calls: dict[str, list[Chunk]] = {}
        self.starts: dict[str, Chunk] = {}
        self.roles: dict[str, str] = {}

    def tell(self, chunk: Chunk) -> None:
        kind, fields = chunk.kind, chunk.fields or {}
        if kind == "MESSAGES_SNAPSHOT":
            self._messages = [dict(each) for each in fields["messages"]]
        elif kind in ("TEXT_MESSAGE_START", "REASONING_MESSAGE_START"):
            role = fields.get("role") or ("assistant" if kind[0] == "T" else "reasoning")
            self.starts[fields["messageId"]] = chunk
            self._message(fields["messageId"], role, fields)
        elif kind in ("TEXT_MESSAGE_CONTENT", "REASONING_MESSAGE_CONTENT"):
            part = chunk.part or fields["messageId"]
            message = self._message(part, "assistant" if kind[0] == "T" else "reasoning", {})
            content = message.get("content")
            more = chunk.text or fields.get("delta", "")
            message["content"] = (content if isinstance(content, str) else "") + more
        elif kind == "TOOL_CALL_START":
            self._call(chunk, fields)
        elif kind == "TOOL_CALL_ARGS":
            self._argue(chunk.part or fields["toolCallId"], chunk)
        elif kind == "TOOL_CALL_END":
            self.calls[fields["toolCallId"]].append(chunk)
        elif kind == "TOOL_CALL_RESULT":
            self._result(fields)

    def _find(self, part: str) -> dict[str, Any] | None:
        found = (each for each in reversed(self._messages) if each.get("id") == part)
        return next(found, None)

    def _message(self, part: str, role: str, fields: Mapping[str, Any]) -> dict[str, Any]:
        self.roles.setdefault(part, role)
        message = self._find(part)
        if message is None:
            more = {name: fields[name] for name in ("name", "subagentRunId") if fields.get(name)}
            message = {"id": part, "role": role, "content": "", **more}
            self._messages.append(message)
        return message

    def _calls_of(self, call: str) -> tuple[int, list[dict[str, Any]]] | None:
        """Return the place of the message that has a tool call, and its calls."""
        for at, message in enumerate(self._messages):
            calls = message.get("toolCalls") or []
            if any(each["id"] == call for each in calls):
                return at, calls
        return None

    def _call(self, chunk: Chunk, fields: dict[str, Any]) -> None:
        call = fields["toolCallId"]
        self.calls[call] = [chunk]
        if self._calls_of(call) is not None:
            return
        parent = fields.get("parentMessageId") or call
        message = self._find(parent)
        if message is None or message.get("role") != "assistant":
            message = {"id": call if message else parent, "role": "assistant"}
            self._messages.append(message)
        function = {"name": fields["toolCallName"], "arguments": ""}
        made = {"id": call, "type": "function", "function": function}
        message["toolCalls"] = [*(message.get("toolCalls") or []), made]

    def _argue(self, call: str, chunk: Chunk) -> None:
        self.calls[call].append(chunk)
        found = self._calls_of(call)
        for each in () if found is None else found[1]:
            if each["id"] == call:
                more = chunk.text or (chunk.fields or {}).get("delta", "")
                each["function"] = {
                    **each["function"],
                    "arguments": each["function"]["arguments"] + more,
                }

    def _result(self, fields: dict[str, Any]) -> None:
        call = fields["toolCallId"]
        result = {
            "id": fields["messageId"],
            "role": fields.get("role") or "tool",
            "toolCallId": call,
            "content": fields["content"],
        }
        found = self._calls_of(call)
        at = len(self._messages)
        if found is not None:
            # Behind the call, and behind the results of other calls of its message.
            at = found[0] + 1
            while at < len(self._messages) and self._messages[at].get("role") == "tool":
                at += 1
        self._messages.insert(at, result)

    def messages(self, without: set[str]) -> list[Mapping[str, Any]]:
        """Return the conversation and the messages of the run, without the tool calls *without*."""
        return [shown for each in self._messages if (shown := _shown(each, without)) is not None]


def _shown(message: dict[str, Any], without: set[str]) -> dict[str, Any] | None:
    """Return *message* without the tool calls *without*; None if nothing is left."""
    calls = message.get("toolCalls") or []
    left = [call for call in calls if call["id"] not in without]
    if len(left) == len(calls):
        return message
    if left:
        return {**message, "toolCalls": left}
    rest: dict[str, Any] = {name: value for name, value in message.items() if name != "toolCalls"}
    return rest if "content" in rest else None


def run_response(
    backend: aio.ValkeyBackend,
    execution_id: str,
    request: Request | None = None,
    *,
    thread_id: str = "thread",
    run_id: str | None = None,
    messages: Sequence[Mapping[str, Any]] | None = None,
    text: bool = False,
    **options: Any,
) -> StreamResponse:
    """Return the events of a run: to the one who started it, and to everybody who joins.

    Args:
        backend: The backend, of the asyncio shell.
        execution_id: Id of the execution that is the run.
        request: The request.
        thread_id: See :class:`AgUiFraming`.
        run_id: See :class:`AgUiFraming`; None is the id of the execution as in URLs.
        messages: See :class:`AgUiFraming`.
        text: See :class:`AgUiFraming`.
        **options: See :class:`ff_fast.web.StreamResponse`.
    """
    from ff_fast.web.response import StreamResponse

    def framing() -> AgUiFraming:
        run = run_id or _run_id(execution_id)
        return AgUiFraming(thread_id=thread_id, run_id=run, messages=messages, text=text)

    return StreamResponse(backend, execution_id, request, framing=framing, **options)


def _run_id(execution_id: str) -> str:
    try:
        return keys.url_id(execution_id)
    except FFError:
        # The response says what is wrong with it.
        return execution_id
