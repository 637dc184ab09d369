"""The Lua library: which parts, in which order, as one ``FUNCTION LOAD`` source.

The source is ``lua/*.lua``.  The prelude comes first and is the only part whose names the
others see: one shared table, ``ff``.  Each other part gets a ``do … end`` block of its own,
because the whole library is one Lua function, and that has room for 200 locals and 60 upvalues.

The library's version is a digest of its text, so every edit changes it.  ``CONTRACT`` orders
versions: it grows when callers of the old library would break.
"""

from __future__ import annotations

import re
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping
    from importlib.resources.abc import Traversable

VERSION = "0.1.0"
"""Version of the Python package."""

NAME = "ff_fast"
"""The library's name on the server."""

CONTRACT = 2
"""A client loads its library over a lower contract, and never over a higher one."""

PARTS = (
    "prelude",
    "version",
    "state",
    "execution",
    "claim",
    "lease",
    "finish",
    "append",
    "named",
    "read",
    "waitpoint",
    "usage",
    "flow",
    "timers",
    "list",
    "task",
)
"""Parts of ``lua/`` in load order; the prelude makes the table that they share."""

Field = Literal["keys", "args", "returns", "errors"]
FIELDS: tuple[Field, ...] = ("keys", "args", "returns", "errors")


class Header(NamedTuple):
    """The declaration in the comment above a Lua function.

    Attributes:
        tails: For each field that ends in ``...``, the group of words that repeats at its end, zero or
            more times.  The field itself holds the words before them.
        where: Place of the header, as ``lua/lease.lua:12``.
    """

    name: str
    keys: tuple[str, ...]
    args: tuple[str, ...]
    returns: tuple[str, ...]
    errors: tuple[str, ...]
    tails: Mapping[Field, tuple[str, ...]]
    where: str

    def accepts(self, field: Field, count: int) -> bool:
        """Return whether *count* keys, arguments or values agree with the declaration."""
        named = {"keys": self.keys, "args": self.args, "returns": self.returns}[field]
        further = count - len(named)
        if field not in self.tails:
            return further == 0
        return further >= 0 and further % len(self.tails[field]) == 0


class _Assembly(NamedTuple):
    text: str
    digest: str
    lines: tuple[str, ...]  # lines[n - 1] is the place in lua/ of line n of text


def _folder() -> Traversable:
    """``ff_fast/_lua`` in an installed wheel, ``lua/`` in a checkout."""
    bundled = files(__package__) / "_lua"
    return bundled if bundled.is_dir() else Path(__file__).parent.parent / "lua"


def _read_parts() -> dict[str, str]:
    folder = _folder()
    missing = [part for part in PARTS if not (folder / f"{part}.lua").is_file()]
    if missing:
        names = ", ".join(f"{part}.lua" for part in missing)
        raise FileNotFoundError(f"the Lua library is incomplete: {folder} has no {names}")
    return {part: (folder / f"{part}.lua").read_text("utf-8").rstrip() + "\n" for part in PARTS}


def _assemble(texts: dict[str, str]) -> _Assembly:
    # The server removes the shebang but keeps its line end, so its line counts.
    lines = [(f"#!lua name={NAME}", f"lua/{PARTS[0]}.lua:1")]
    for part, text in texts.items():
        written = text.splitlines()
        placed = [(line, f"lua/{part}.lua:{n}") for n, line in enumerate(written, start=1)]
        if part != PARTS[0]:
            # Lua reports an unclosed block at the end of the enclosing one.
            placed = [
                ("do", f"lua/{part}.lua:1"),
                *placed,
                ("end", f"lua/{part}.lua:{len(written)}"),
            ]
        lines += placed
    body = "".join(f"{line}\n" for line, _ in lines).replace("@CONTRACT@", str(CONTRACT))
    version = sha256(body.encode()).hexdigest()[:12]
    return _Assembly(body.replace("@DIGEST@", version), version, tuple(where for _, where in lines))


@cache
def _assembled() -> _Assembly:
    return _assemble(_read_parts())


def source() -> str:
    """Return the whole library, ready for ``FUNCTION LOAD``."""
    return _assembled().text


def digest() -> str:
    """Return the library's version, which changes exactly when its text does."""
    return _assembled().digest


def line_of(assembled_line: int) -> str:
    """Return the place in ``lua/`` of line *assembled_line* of :func:`source`.

    The server's errors count lines of the assembled text (``@user_function:412``); the place is in the
    source files (``lua/append.lua:17``).

    Raises:
        ValueError: The source has no such line.
    """
    lines = _assembled().lines
    if not 1 <= assembled_line <= len(lines):
        raise ValueError(f"the Lua library has lines 1 to {len(lines)}, not {assembled_line}")
    return lines[assembled_line - 1]


_TITLE = re.compile(r"-- (ff_[a-z0-9_]+)")
_FIELD = re.compile(r"--   ([a-z]+):(.*)")
_MORE = re.compile(r"--     +(\S.*)")
_WORDS = re.compile(
    r"(?P<words>(?:\w+(?:\s+|$))*)(?:(?P<one>\w+)\.\.\.|\((?P<group>\w+(?:\s+\w+)*)\)\.\.\.)?"
)


def _parse_headers(part: str, text: str) -> dict[str, Header]:
    found: dict[str, Header] = {}
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        title = _TITLE.fullmatch(line)
        if not title:
            continue
        name, where = title[1], f"lua/{part}.lua:{number}"
        texts: dict[str, str] = {}
        for below in lines[number:]:
            if field := _FIELD.fullmatch(below):
                if field[1] in texts:
                    raise ValueError(f"{where}: {name} declares {field[1]} twice")
                texts[field[1]] = field[2]
            elif texts and (more := _MORE.fullmatch(below)):
                texts[next(reversed(texts))] += f" {more[1]}"
            else:
                break
        if tuple(texts) != FIELDS:
            raise ValueError(
                f"{where}: {name} must declare {', '.join(FIELDS)}, in this order; "
                f"it declares {', '.join(texts) or 'nothing'}"
            )
        if name in found:
            raise ValueError(f"{where}: {name} has two headers")
        words: dict[Field, tuple[str, ...]] = {}
        tails: dict[Field, tuple[str, ...]] = {}
        for declared in FIELDS:
            matched = _WORDS.fullmatch(texts[declared].strip())
            if not matched:
                raise ValueError(
                    f"{where}: {name}'s {declared} must be words, then at most one "
                    "'word...' or '(word word)...'"
                )
            words[declared] = tuple(matched["words"].split())
            if tail := matched["one"] or matched["group"]:
                tails[declared] = tuple(tail.split())
        found[name] = Header(name, **words, tails=tails, where=where)
    return found


@cache
def headers() -> dict[str, Header]:
    """Return the header of every Lua function, by name.

    A header is a comment of the form below.  A field may continue in deeper-indented lines, and a
    field without words stays empty.  The last word (``frame...``) or a group of words
    (``(field value)...``) may repeat, zero or more times::

        -- ff_renew_lease
        --   keys:    core meta
        --   args:    execution_id attempt_index lease_id lease_epoch lease_ttl_ms
        --   returns: expires_at_ms lease_epoch
        --   errors:  execution_not_found stale_owner lease_expired

    Raises:
        ValueError: A header is malformed, or a function has two.
    """
    found: dict[str, Header] = {}
    for part, text in _read_parts().items():
        for name, header in _parse_headers(part, text).items():
            if name in found:
                raise ValueError(f"{header.where}: {name} is declared in {found[name].where} too")
            found[name] = header
    return found
