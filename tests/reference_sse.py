"""The oracle of ``ff_fast._hot.sse``: the same events, made in the obvious way."""

import base64
import codecs
import re

from ff_fast import StreamFrame


def unfinished_bytes(text):
    """How many bytes at the end begin a character that they do not complete."""
    for size in (1, 2, 3):
        if size > len(text):
            return 0
        tail = text[-size:]
        if tail[0] & 0xC0 == 0x80:
            continue
        if tail[:1] == b"\xed" and tail[1:2] >= b"\xa0":
            # A surrogate, which no byte completes; the decoder waits for the third one all the same.
            return 0
        decoder = codecs.getincrementaldecoder("utf-8")()
        try:
            return size if decoder.decode(tail) == "" else 0
        except UnicodeDecodeError:
            return 0
    return 0


def event(data, *, id=None, event=None, retry=None):
    data = data.encode() if isinstance(data, str) else data
    fields = [
        *([b"id: " + one_line(id)] if id is not None else []),
        *([b"event: " + one_line(event)] if event else []),
        *([b"retry: %d" % retry] if retry is not None else []),
        *(b"data: " + line for line in re.split(b"\r\n|\n|\r", data)),
    ]
    return b"".join(field + b"\n" for field in fields) + b"\n"


def one_line(text):
    return re.sub(rb"[\0-\x1f]", b" ", text.encode("utf-8", "replace"))


class Events:
    def __init__(
        self, other, *, kind="text", ids=True, types=False, default="token", reserved=(), carry=b""
    ):
        self.other, self.kind, self.ids, self.types = other, kind, ids, types
        self.default, self.reserved = default, reserved
        if carry and (len(carry) > 3 or self.waiting(carry) != len(carry)):
            raise ValueError("carry")
        self.carry = carry
        self.of = None

    def waiting(self, text):
        if self.kind == "text" and text.endswith(b"\r"):
            return 1
        return unfinished_bytes(text)

    def join(self, items):
        out = []
        for item in items:
            if not isinstance(item, StreamFrame):
                out += [*self.orphan(), self.other(item)]
                continue
            if self.types and self.of is not None and self.of.frame_type != item.frame_type:
                out += self.orphan()
            out += self.frame(item)
        return b"".join(out)

    def frame(self, frame):
        if self.kind == "base64":
            return [self.made(frame, frame.cursor, base64.b64encode(frame.payload))]
        text = self.carry + frame.payload
        left = self.waiting(text)
        self.carry = text[len(text) - left :]
        self.of = frame if left else None
        if left and left == len(text):
            return []
        cursor = f"{frame.cursor}~{self.carry.hex()}" if left else frame.cursor
        return [self.made(frame, cursor, self.data(text[: len(text) - left]))]

    def orphan(self):
        frame, carry = self.of, self.carry
        self.of, self.carry = None, b""
        if not carry:
            return []
        data = self.data(carry)
        return [event(data) if frame is None else self.made(frame, frame.cursor, data)]

    def data(self, text):
        if self.kind == "json":
            return b'"%b"' % "".join(map(escaped, decoded(text))).encode()
        return text

    def made(self, frame, cursor, data):
        kind = None
        if self.types and frame.frame_type != self.default:
            kind = ("frame-" if frame.frame_type in self.reserved else "") + frame.frame_type
        return event(data, id=cursor if self.ids else None, event=kind)


def escaped(character):
    if character in '"\\':
        return "\\" + character
    short = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character)
    return short or (f"\\u{ord(character):04x}" if character < " " else character)


def decoded(text):
    """*text*, each byte that is no part of a character replaced."""
    out, at = [], 0
    while at < len(text):
        for size in (1, 2, 3, 4):
            try:
                out.append(text[at : at + size].decode())
            except UnicodeDecodeError:
                continue
            at += size
            break
        else:
            out.append("\ufffd")
            at += 1
    return "".join(out)
