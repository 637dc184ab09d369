"""What ``ff_fast._hot.merge`` must do, written the slow and obvious way on top of :mod:`json`.

The oracle of the differential tests; not part of the package.  A document here is plain Python:
``dict``, ``list``, ``str``, ``bool``, ``None``, and :class:`Number`, which keeps its spelling.
Everything that is refused raises :class:`RefusedError`.
"""

import copy
import json
from dataclasses import dataclass

SENTINEL = "__ff_null__"
MAX_DEPTH = 128


class RefusedError(Exception):
    """The input is not acceptable, whatever the reason."""


@dataclass(frozen=True)
class Number:
    text: str


def parse(raw: bytes) -> dict:
    """Strict JSON with an object at the root, or RefusedError."""
    try:
        root = json.loads(
            raw.decode("utf-8"),
            parse_int=Number,
            parse_float=Number,
            parse_constant=_refuse,
            object_pairs_hook=_object,
        )
    except (ValueError, RecursionError):
        raise RefusedError from None
    if not isinstance(root, dict):
        raise RefusedError
    _check(root, 1)
    return root


def _refuse(_constant: str):
    raise RefusedError


def _object(pairs):
    # Here, since a member that a later one of the same name replaces is gone from the dict.
    for name, value in pairs:
        _check_text(name)
        _check(value, 1)
    return dict(pairs)


def _check(value, depth: int) -> None:
    """Refuse half surrogate pairs, which :mod:`json` lets through, and what is too deep."""
    if isinstance(value, str):
        _check_text(value)
    elif isinstance(value, dict | list):
        if depth > MAX_DEPTH:
            raise RefusedError
        if isinstance(value, dict):
            for key in value:
                _check_text(key)
            value = value.values()
        for item in value:
            _check(item, depth + 1)


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise RefusedError from None


def resolved(value):
    """*value* with null in place of every sentinel."""
    if value == SENTINEL:
        return None
    if isinstance(value, list):
        return [resolved(item) for item in value]
    if isinstance(value, dict):
        return {key: resolved(item) for key, item in value.items()}
    return value


def merge_patch(target, patch):
    """The function of RFC 7396, section 2, word for word; the sentinel is resolved at its leaves."""
    if isinstance(patch, dict):
        if not isinstance(target, dict):
            target = {}
        for name, value in patch.items():
            if value is None:
                target.pop(name, None)
            else:
                target[name] = merge_patch(target.get(name), value)
        return target
    return resolved(patch)


def tokens(pointer: bytes) -> list[str]:
    """The reference tokens of a pointer that names a member, or RefusedError."""
    try:
        text = pointer.decode("utf-8")
    except UnicodeDecodeError:
        raise RefusedError from None
    if not text.startswith("/"):
        raise RefusedError
    found = text[1:].split("/")
    for token in found:
        if "~" in token.replace("~0", "").replace("~1", ""):
            raise RefusedError
    if len(found) > MAX_DEPTH:
        raise RefusedError
    return [token.replace("~1", "/").replace("~0", "~") for token in found]


def appended(value, path: list[str], text: str):
    """*value* with *text* appended at *path*; a missing value is the empty tuple."""
    if not path:
        if value == () or value is None:
            value = ""
        if not isinstance(value, str) or value + text == SENTINEL:
            raise RefusedError
        return value + text
    step, rest = path[0], path[1:]
    if value == ():
        value = {}
    if isinstance(value, dict):
        value[step] = appended(value.get(step, ()), rest, text)
    elif isinstance(value, list):
        if not (step.isascii() and step.isdigit()) or str(int(step)) != step:
            raise RefusedError
        if int(step) >= len(value):
            raise RefusedError
        value[int(step)] = appended(value[int(step)], rest, text)
    else:
        raise RefusedError
    return value


def dump(value) -> str:
    if isinstance(value, Number):
        return value.text
    if isinstance(value, list):
        return "[" + ",".join(map(dump, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{dump(key)}:{dump(item)}" for key, item in value.items()) + "}"
    return json.dumps(value, ensure_ascii=False)


class Document:
    def __init__(self, document_json: bytes = b"{}", *, max_bytes: int = 16 * 1024 * 1024):
        self.root = resolved(parse(document_json))
        self.max_bytes = max_bytes

    def merge(self, patch: bytes) -> None:
        self._accept(merge_patch(copy.deepcopy(self.root), parse(patch)))

    def append(self, pointer: bytes, text: bytes) -> None:
        path = tokens(pointer)
        try:
            piece = text.decode("utf-8")
        except UnicodeDecodeError:
            raise RefusedError from None
        self._accept(appended(copy.deepcopy(self.root), path, piece))

    def _accept(self, root) -> None:
        size = len(dump(root).encode())
        if size > self.max_bytes and size > len(self.dumps()):
            raise RefusedError
        self.root = root

    def dumps(self) -> bytes:
        return dump(self.root).encode()
