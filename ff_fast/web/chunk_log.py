"""The chunks of a front end's protocol, kept in the summary of a stream: a whole message in constant size.

The summary document has a log of chunks, ``{"log": {"0": ..., "1": ...}}``. An entry is the JSON of a chunk as text, or, for
the deltas of one part, an object of a single chunk whose delta grows: ``{"type": "text-delta", "id": "a", "delta": "..."}``.
So the document replays a message with one delta for each part, and the patches that follow it are the chunks that follow.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Protocol
from zlib import crc32

import orjson

from ff_fast._hot.sse import unfinished_bytes
from ff_fast.errors import InvalidInput
from ff_fast.types import (
    SUMMARY_NULL_SENTINEL,
    AttemptStarted,
    End,
    Gap,
    PatchKind,
    Snapshot,
    StreamMode,
)
from ff_fast.web.framing import Framing

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from ff_fast import StreamFrame
    from ff_fast.errors import FFError
    from ff_fast.web.framing import Item

# What grows: the type of the chunk, the field that names its part, and the field that is appended to.
DELTAS: Mapping[str, tuple[str, str]] = {
    "text-delta": ("id", "delta"),
    "reasoning-delta": ("id", "delta"),
    "tool-input-delta": ("toolCallId", "inputTextDelta"),
    "TEXT_MESSAGE_CONTENT": ("messageId", "delta"),
    "REASONING_MESSAGE_CONTENT": ("messageId", "delta"),
    "TOOL_CALL_ARGS": ("toolCallId", "delta"),
}
# Chunks after which an id may name another part.
_BOUNDARIES = frozenset(("start-step", "finish-step", "reset-step"))
_STATE = frozenset(("STATE_SNAPSHOT", "STATE_DELTA"))
# Events that open a message or call where it is not open, and go on with it: their spans, the field that names one, the
# event of a delta, and the fields of the first event.
_SPANS: Mapping[str, tuple[str, str, str, tuple[str, ...]]] = {
    "TEXT_MESSAGE_CHUNK": ("TEXT_MESSAGE", "messageId", "CONTENT", ("role", "name")),
    "REASONING_MESSAGE_CHUNK": ("REASONING_MESSAGE", "messageId", "CONTENT", ("role",)),
    "TOOL_CALL_CHUNK": ("TOOL_CALL", "toolCallId", "ARGS", ("toolCallName", "parentMessageId")),
}
_ROLES = {"TEXT_MESSAGE": "assistant", "REASONING_MESSAGE": "reasoning"}
# What does not end the span that such events have opened.
_ASIDE = frozenset(
    ("RAW", "ACTIVITY_SNAPSHOT", "ACTIVITY_DELTA", "REASONING_ENCRYPTED_VALUE", "SUBAGENT_STARTED")
)
# How a line of a server-sent event begins, and how it ends: other characters that end lines elsewhere may be in JSON.
_FIELDS = ("data:", ":", "event:", "id:", "retry:")
_LINES = re.compile("\r\n|\n|\r")
# Characters of a piece, so that it is a payload in UTF-8 and in JSON.
_PIECE = 8_000
_MERGE = StreamMode.durable_summary()


class Writes(Protocol):
    """What a chunk is written to: a writer, a task, or a named stream."""

    def write(
        self, payload: Any, frame_type: str = ..., /, *, mode: StreamMode | None = ...
    ) -> Any:
        """Take one frame."""


def parse_events(text: str) -> Iterator[str]:
    """Yield the data of the server-sent events in *text*, without the mark of the end."""
    lines: list[str] = []
    for line in [*_LINES.split(text), ""]:
        if line.startswith("data:"):
            lines.append(line[5:].removeprefix(" "))
        elif not line and lines:
            data = "\n".join(lines)
            lines = []
            if data and data != "[DONE]":
                yield data


def chunk_texts(payload: str | bytes | Mapping[str, Any]) -> Iterator[str]:
    """Yield the JSON of each chunk in *payload*: JSON itself, or text of server-sent events."""
    if isinstance(payload, bytes):
        payload = payload.decode()
    elif not isinstance(payload, str):
        payload = orjson.dumps(payload).decode()
    if any(line.startswith(_FIELDS) for line in _LINES.split(payload)):
        yield from parse_events(payload)
    elif payload.strip():
        yield payload


class ChunkWriter:
    """Writes the chunks of a protocol to a stream, so that a reader who joins gets each part with one delta.

    Pass it what an encoder makes, such as the strings of ``encode_stream`` of pydantic-ai, for the AI SDK or for AG-UI::

        async with backend.open_stream(chat_id) as stream:
            if stream.role == "producer":
                chunks = ChunkWriter(stream)
                async for text in adapter.encode_stream(adapter.run_stream()):
                    chunks.write(text)

    Frames in other modes must not be written to the same attempt: who joins begins behind them. ``TEXT_MESSAGE_CHUNK`` of AG-UI
    and its like are written as the events that they stand for.

    Args:
        writer: The writer of an attempt, the task of a worker, or a named stream.
    """

    __slots__ = ("_growing", "_next", "_span", "_state", "_writer")

    def __init__(self, writer: Writes) -> None:
        self._writer = writer
        self._next = 0
        # How the entries that grow are appended to, by type and part.
        self._growing: dict[tuple[str, str], StreamMode] = {}
        # Entries that the next snapshot of a state makes void.
        self._state: list[int] = []
        # What is open without an event that says so: the span, the field that names it, and its name.
        self._span: tuple[str, str, str] | None = None

    def write(self, payload: str | bytes | Mapping[str, Any]) -> None:
        """Write one chunk, as JSON or as a mapping, or all that are in a text of server-sent events. Never waits.

        ``[DONE]`` is not written: the end of the execution says it.

        Raises:
            InvalidInput: It is no JSON object with a ``type``.
            FFError: See ``write`` of the writer. What comes after the frame that was not taken is not written.
        """
        for text in chunk_texts(payload):
            try:
                chunk = orjson.loads(text)
            except ValueError:
                chunk = None
            kind = chunk.get("type") if isinstance(chunk, dict) else None
            if not isinstance(kind, str):
                raise InvalidInput("A chunk must be a JSON object with a type.")
            if kind in _SPANS and chunk.get("subagentRunId") is None:
                for each in self._spelled(kind, chunk):
                    self._write(each["type"], each, orjson.dumps(each).decode())
                continue
            if self._span is not None and kind not in _ASIDE:
                self._close()
            self._write(kind, chunk, text)

    def _spelled(self, kind: str, chunk: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events that one stands for."""
        span, name, more, fields = _SPANS[kind]
        part = chunk.get(name)
        if self._span is None or self._span[0] != span or part not in (None, self._span[2]):
            if not isinstance(part, str):
                raise InvalidInput(f"The first {kind} must have a {name}.")
            if self._span is not None:
                self._close()
            self._span = (span, name, part)
            role = {"role": _ROLES[span]} if span in _ROLES else {}
            given = {field: chunk[field] for field in fields if chunk.get(field) is not None}
            yield {"type": f"{span}_START", name: part, **role, **given}
        known = {"type", "timestamp", name, *fields}
        rest = {field: chunk[field] for field in chunk.keys() - known if chunk[field] is not None}
        if rest:
            yield {"type": f"{span}_{more}", name: self._span[2], "delta": "", **rest}

    def _close(self) -> None:
        assert self._span is not None
        span, name, part = self._span
        self._span = None
        kind = f"{span}_END"
        event = {"type": kind, name: part}
        self._write(kind, event, orjson.dumps(event).decode())

    def _write(self, kind: str, chunk: dict[str, Any], text: str) -> None:
        fields = DELTAS.get(kind)
        if fields is not None:
            part, delta = chunk.get(fields[0]), chunk.get(fields[1])
            known = {"type", "timestamp", *fields}
            if isinstance(part, str) and isinstance(delta, str) and known.issuperset(chunk):
                if not delta:
                    return
                if (kind, part) in self._growing or not SUMMARY_NULL_SENTINEL.startswith(delta):
                    self._grow(kind, *fields, part, delta)
                    return
                # A text that might grow into the sentinel of null cannot be grown.
        if kind in _BOUNDARIES:
            self._growing.clear()
        else:
            parts = {chunk.get("id"), chunk.get("messageId"), chunk.get("toolCallId")}
            for key in [key for key in self._growing if key[1] in parts]:
                del self._growing[key]
        number = self._entry()
        void: dict[str, Any] = {}
        if kind == "STATE_SNAPSHOT":
            void = {str(each): None for each in self._state}
            self._state = []
        if kind in _STATE:
            self._state.append(number)
        if len(text) <= _PIECE:
            self._merge({str(number): text, **void})
            return
        self._merge({str(number): {"json": ""}, **void})
        self._append(_appending(number, "json"), text)
        self._merge({str(number): {"whole": True}})

    def _grow(self, kind: str, part_field: str, field: str, part: str, delta: str) -> None:
        mode = self._growing.get((kind, part))
        if mode is None:
            number = self._entry()
            mode = self._growing[kind, part] = _appending(number, field)
            head, delta = delta[:_PIECE], delta[_PIECE:]
            self._merge({str(number): {"type": kind, part_field: part, field: head}})
        self._append(mode, delta)

    def _entry(self) -> int:
        number = self._next
        self._next += 1
        return number

    def _merge(self, entries: dict[str, Any]) -> None:
        self._writer.write(orjson.dumps({"log": entries}), "chunk", mode=_MERGE)

    def _append(self, mode: StreamMode, text: str) -> None:
        for at in range(0, len(text), _PIECE):
            self._writer.write(text[at : at + _PIECE], "chunk", mode=mode)


def _appending(number: int, field: str) -> StreamMode:
    return StreamMode.durable_summary(PatchKind.STRING_APPEND(f"/log/{number}/{field}"))


class _Growing:
    """A chunk whose delta grows.

    Attributes:
        head: Its JSON up to the delta.
        kind: Its type.
        part: The part that it belongs to.
        sent: How many characters of the delta were returned.
    """

    __slots__ = ("head", "kind", "part", "sent")

    def __init__(self, kind: str, part: str) -> None:
        part_field, field = DELTAS[kind]
        self.head = b'%b,"%b":' % (
            orjson.dumps({"type": kind, part_field: part})[:-1],
            field.encode(),
        )
        self.kind = kind
        self.part = part
        self.sent = 0


class Chunk:
    """A chunk that a reader sends.

    Attributes:
        json: The chunk.
        kind: Its type.
        fields: All of it, parsed; None for a delta.
        part: The part that a delta belongs to; empty for other chunks.
        text: The delta.
        cursor: Behind which item it is whole; None where that is in the middle of one.
    """

    __slots__ = ("cursor", "fields", "json", "kind", "part", "text")

    def __init__(
        self,
        json: bytes,
        kind: str,
        fields: dict[str, Any] | None = None,
        *,
        part: str = "",
        text: str = "",
    ) -> None:
        self.json = json
        self.kind = kind
        self.fields = fields
        self.part = part
        self.text = text
        self.cursor: str | None = None


def chunk_of(**fields: Any) -> Chunk:
    """Return the chunk of *fields*."""
    return Chunk(orjson.dumps(fields), fields["type"], fields)


class ChunkLog:
    """Reads the chunks of one attempt, each once: from the log of its document and the patches behind it, or from frames.

    Deltas of one part that follow each other are gathered. A document that is read again, after a gap, yields what has
    come meanwhile.
    """

    __slots__ = ("_big", "_entries", "_gathering", "_parts", "_seen", "_text", "kept")

    def __init__(self) -> None:
        self._seen: set[int] = set()
        self._entries: dict[int, _Growing] = {}
        self._parts: dict[tuple[str, str], _Growing] = {}
        # Chunks in pieces, until they are whole.
        self._big: dict[int, list[str]] = {}
        self._gathering: _Growing | None = None
        self._text: list[str] = []
        self.kept = False
        """Whether there is a document with all that was read."""

    def document(self, log: Mapping[str, Any]) -> list[Chunk]:
        """Return what *log*, the log of a document, has that was not returned before."""
        self.kept = True
        self._big.clear()
        chunks: list[Chunk] = []
        for number in sorted(map(int, log)):
            chunks += self._take(number, log[str(number)])
        return chunks + self.flush()

    def patch(self, frame: StreamFrame) -> list[Chunk] | None:
        """Return the chunks that a patch completes; None if it does not change the log."""
        kind = frame.patch_kind
        assert kind is not None
        if kind.pointer is not None:
            if not kind.pointer.startswith("/log/"):
                return None
            _, _, number, field = kind.pointer.split("/")
            return self._appended(int(number), field, frame.payload.decode())
        patch = orjson.loads(frame.payload)
        if "log" not in patch:
            return None
        self.kept = True
        chunks: list[Chunk] = []
        for name in sorted(patch["log"], key=int):
            chunks += self._take(int(name), patch["log"][name])
        return chunks

    def text(self, text: str) -> list[Chunk]:
        """Return the chunks that *text*, the JSON of one, completes."""
        fields = orjson.loads(text)
        kind = fields["type"]
        names = DELTAS.get(kind)
        if names is not None and fields.keys() <= {"type", "timestamp", *names}:
            return self.grow(kind, fields[names[0]], fields[names[1]])
        return [*self.flush(), Chunk(text.encode(), kind, fields)]

    def grow(self, kind: str, part: str, text: str) -> list[Chunk]:
        """Return the chunks that a delta completes."""
        growing = self._parts.get((kind, part))
        if growing is None:
            growing = self._parts[kind, part] = _Growing(kind, part)
        return self._more(growing, text)

    @property
    def gathers(self) -> bool:
        """Whether a delta is gathered."""
        return self._gathering is not None

    def flush(self) -> list[Chunk]:
        """Return the delta that was gathered."""
        growing = self._gathering
        if growing is None:
            return []
        text = "".join(self._text)
        self._gathering = None
        self._text = []
        json = growing.head + orjson.dumps(text) + b"}"
        return [Chunk(json, growing.kind, part=growing.part, text=text)]

    def _take(self, number: int, value: Any) -> list[Chunk]:
        if value is None or number in self._seen:
            return []
        if isinstance(value, str):
            return self._whole(number, value)
        if "type" in value:
            growing = self._entries.get(number)
            kind = value["type"]
            part_field, field = DELTAS[kind]
            if growing is None:
                growing = self._entries[number] = _Growing(kind, value[part_field])
            return self._more(growing, value[field][growing.sent :])
        if "json" in value:
            self._big[number] = [value["json"]]
        if value.get("whole"):
            return self._whole(number, "".join(self._big.pop(number)))
        return []

    def _appended(self, number: int, field: str, text: str) -> list[Chunk]:
        if field == "json":
            self._big[number].append(text)
            return []
        return self._more(self._entries[number], text)

    def _more(self, growing: _Growing, text: str) -> list[Chunk]:
        if not text:
            return []
        growing.sent += len(text)
        done = [] if growing is self._gathering else self.flush()
        self._gathering = growing
        self._text.append(text)
        return done

    def _whole(self, number: int, text: str) -> list[Chunk]:
        self._seen.add(number)
        fields = orjson.loads(text)
        return [*self.flush(), Chunk(text.encode(), fields["type"], fields)]


class _Text:
    """A text that is not in the log: from a member of the document, from frames, or from frames that the document catches up with.

    Attributes:
        kept: Its length in the document.
        told: Where the next frame of it begins.
        sent: How much of it the client has got.
        check: A checksum of that.
    """

    __slots__ = ("check", "kept", "sent", "told")

    def __init__(self) -> None:
        self.kept = self.told = self.sent = self.check = 0

    def new(self, at: int, text: str) -> str:
        """Return what the client has not got of *text*, which is at the place *at*."""
        new = text[max(self.sent - at, 0) :]
        if new:
            self.sent = at + len(text)
            self.check = crc32(new.encode(), self.check)
        return new

    def begins(self, text: str) -> bool:
        """Whether *text* begins with what the client has got."""
        return len(text) >= self.sent and crc32(text[: self.sent].encode()) == self.check


# Reasons of gaps behind which the document goes on from what was sent.
_SAME_HISTORY = frozenset(("trimmed", "fell_behind", "expired"))
_GAP = "A part of the answer was lost."
_UNREADABLE = "The answer cannot be read."


class ChunkFraming(Framing):
    """Chunks of a protocol, from their log, from frames that hold them, or made of plain text.

    Args:
        text: Durable and best-effort frames are text: of type ``reasoning``, or else ``token``; frames of other types are left
            out. Otherwise they are chunks, as JSON or as text of server-sent events. Patches speak for themselves: those of
            a :class:`ChunkWriter`, or appends to ``/text``, ``/reasoning`` and ``/parts/<id>``. Where a worker writes tokens
            and keeps them with patches to ``/text``, or ``/reasoning``, a client gets each once; a patch must have all
            that was written before it.
    """

    snapshot = True
    # Types of chunks: one that waits for the end of the execution, and one that nothing may follow.
    _last = ""
    _fatal = ""
    # Types of the deltas that text becomes.
    _text_delta = ""
    _reasoning_delta = ""

    def __init__(self, *, text: bool = False) -> None:
        self._is_text = text
        self._log = ChunkLog()
        self._attempt: int | None = None
        # The last chunk of the worker, which waits until the execution has ended as well.
        self._held: Chunk | None = None
        # The client has been told how it ended.
        self._told = False
        # Texts by the type of their deltas and their part, and the bytes at their ends that begin a character.
        self._texts: dict[tuple[str, str], _Text] = {}
        self._carry: dict[str, bytes] = {}
        self._cursor = ""

    # -- what a protocol says ------------------------------------------------------------------------------------------

    def _send(self, chunk: Chunk) -> list[Chunk]:
        """Return what goes out for a chunk of the worker."""
        raise NotImplementedError

    def _joined(self, chunks: list[Chunk]) -> list[Chunk]:
        """Return what goes out for the chunks of the first document."""
        return self._sent(chunks)

    def _restarted(self) -> list[Chunk]:
        """Return what takes back what was sent: another attempt follows."""
        raise NotImplementedError

    def _ended(self, end: End) -> list[Chunk]:
        """Return how the client is told of the end."""
        raise NotImplementedError

    def _broken(self, message: str, code: str) -> list[Chunk]:
        """Return how the client is told that nothing follows, although the answer is not whole."""
        raise NotImplementedError

    def _event(self, chunk: Chunk) -> bytes:
        """Return the event of a chunk."""
        raise NotImplementedError

    # -- items ---------------------------------------------------------------------------------------------------------

    def items(self, items: Sequence[Item]) -> bytes:
        out: list[Chunk] = []
        for item in items:
            if self.over or self.rejoin:
                break
            try:
                chunks = self._item(item)
            except (ValueError, LookupError, TypeError, AttributeError):
                chunks = self._break(_UNREADABLE, "unreadable")
            for chunk in chunks:
                if chunk.fields is None:
                    # It was whole before this item.
                    chunk.cursor = self._cursor or None
            if chunks and not self._log.gathers:
                chunks[-1].cursor = item.cursor
            out += chunks
            self._cursor = item.cursor
        if not self.over:
            rest = [each for chunk in self._log.flush() for each in self._send(chunk)]
            if rest:
                rest[-1].cursor = self._cursor
                out += rest
        return b"".join(map(self._event, out)) + (self._goodbye() if self.over else b"")

    def _goodbye(self) -> bytes:
        """Return the last bytes of a response."""
        return b""

    def _item(self, item: Item) -> list[Chunk]:
        if isinstance(item, End):
            return self._end(item)
        if isinstance(item, Gap):
            if self._log.kept and item.reason in _SAME_HISTORY:
                # What is missing is in the document.
                self.rejoin = True
                return []
            return self._break(_GAP, "gap")
        if isinstance(item, (AttemptStarted, Snapshot)):
            started = self._start(item.attempt_index)
            if isinstance(item, Snapshot) and not self.over:
                return started + self._document(orjson.loads(item.document_json))
            return started
        if self._told:
            return []
        if item.patch_kind is not None:
            chunks = self._log.patch(item)
            return self._sent(self._patched(item) if chunks is None else chunks)
        if self._is_text:
            return self._sent(self._token(item))
        return self._sent(
            [each for text in chunk_texts(item.payload) for each in self._log.text(text)]
        )

    def _sent(self, chunks: list[Chunk]) -> list[Chunk]:
        return [each for chunk in chunks for each in self._pass(chunk)]

    def _pass(self, chunk: Chunk) -> list[Chunk]:
        if self._told:
            return []
        if chunk.kind == self._last:
            self._held = chunk
            return []
        sent = self._send(chunk)
        if chunk.kind == self._fatal:
            self._told = self.over = True
        return sent

    def _start(self, attempt: int) -> list[Chunk]:
        before, self._attempt = self._attempt, attempt
        if before is None or before == attempt or self._told:
            return []
        done = [each for chunk in self._log.flush() for each in self._send(chunk)]
        self._forget()
        self._held = None
        return done + self._restarted()

    def _forget(self) -> None:
        self._log = ChunkLog()
        self._texts = {}
        self._carry = {}

    def _end(self, end: End) -> list[Chunk]:
        done = self._sent(self._log.flush())
        self.over = True
        return done if self._told else done + self._ended(end)

    def _break(self, message: str, code: str) -> list[Chunk]:
        done = self._sent(self._log.flush())
        self.over = True
        return done if self._told else done + self._broken(message, code)

    def failed(self, error: FFError) -> bytes:
        return self._last_words("The answer cannot be read further.", error.code)

    def shutdown(self, retry_ms: int) -> bytes:  # noqa: ARG002 - such a client does not know the field
        return self._last_words("The server shuts down; ask for the answer again.", "shutdown")

    def _last_words(self, message: str, code: str) -> bytes:
        chunks = self._break(message, code)
        return b"".join(map(self._event, chunks)) + self._goodbye()

    # -- documents and text --------------------------------------------------------------------------------------------

    def _document(self, document: Any) -> list[Chunk]:
        first = not self._log.kept
        chunks: list[Chunk] = []
        # Frames of text that follow go on where the document ends.
        self._carry = {}
        for each in self._texts.values():
            each.kept = each.told = 0
        for name, value in document.items():
            if name == "log":
                chunks += self._log.document(value)
            else:
                for part, kind in self._parts(name, value):
                    chunks += self._kept(kind, part, value if part == name else value[part])
        self._log.kept = True
        chunks += self._log.flush()
        return self._joined(chunks) if first else self._sent(chunks)

    def _parts(self, name: str, value: Any) -> list[tuple[str, str]]:
        """Return the parts of text in a member of a document, and the types of their deltas."""
        if name == "parts" and isinstance(value, dict):
            return [(part, self._text_delta) for part in value if isinstance(value[part], str)]
        if isinstance(value, str) and name in ("text", "reasoning"):
            return [(name, self._text_delta if name == "text" else self._reasoning_delta)]
        return []

    def _patched(self, frame: StreamFrame) -> list[Chunk]:
        """Return the chunks for a patch of a document that its application has made up."""
        kind = frame.patch_kind
        assert kind is not None
        self._log.kept = True
        if kind.pointer is None:
            return self._merged(orjson.loads(frame.payload))
        _, name, *rest = kind.pointer.split("/")
        value: Any = {rest[0]: ""} if len(rest) == 1 else "" if not rest else None
        for part, delta in self._parts(name, value):
            return self._kept(delta, part, frame.payload.decode())
        return []

    def _text(self, kind: str, part: str) -> _Text:
        found = self._texts.get((kind, part))
        if found is None:
            found = self._texts[kind, part] = _Text()
        return found

    def _kept(self, kind: str, part: str, more: str) -> list[Chunk]:
        """Return the chunks for *more* of a text in the document."""
        text = self._text(kind, part)
        at = text.kept
        text.kept += len(more)
        text.told = max(text.told, text.kept)
        return self._log.grow(kind, part, text.new(at, more))

    def _merged(self, patch: dict[str, Any]) -> list[Chunk]:
        chunks: list[Chunk] = []
        for name, value in patch.items():
            if name not in ("text", "reasoning", "parts"):
                continue
            values = value if name == "parts" and isinstance(value, dict) else {name: value}
            for part, given in values.items():
                delta = self._reasoning_delta if name == "reasoning" else self._text_delta
                text = self._text(delta, part)
                if not (text.begins(given) if isinstance(given, str) else text.sent == 0):
                    # It was replaced: the document is sent again.
                    self._forget()
                    self._log.kept = True
                    self.rejoin = True
                    return self._restarted()
                if isinstance(given, str):
                    text.kept = 0
                    chunks += self._kept(delta, part, given)
        return chunks

    def _token(self, frame: StreamFrame) -> list[Chunk]:
        reasoning = frame.frame_type == "reasoning"
        if not reasoning and frame.frame_type != "token":
            return []
        kind = self._reasoning_delta if reasoning else self._text_delta
        part = "reasoning" if reasoning else "text"
        payload = self._carry.get(part, b"") + frame.payload
        size = len(payload) - unfinished_bytes(payload)
        self._carry[part] = payload[size:]
        more = payload[:size].decode("utf-8", "replace")
        text = self._text(kind, part)
        at = text.told
        text.told += len(more)
        return self._log.grow(kind, part, text.new(at, more))
