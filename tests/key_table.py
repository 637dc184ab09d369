"""The table of keys in the docstring of ``ff_fast.keys``, as data."""

import re
from typing import NamedTuple

from ff_fast import keys

_ROW = re.compile(r"^    (ff:\S+) +(\w+) +(string|hash|list|set|zset|stream) +\S.*$", re.MULTILINE)
_CHANNEL = re.compile(r"^    (ff:\S+) +(\w+)_channel +\S.*$", re.MULTILINE)
_PLACES = {
    "{fp:N}": r"\{fp:\d+\}",
    "<eid>": r"\{fp:\d+\}:[0-9a-f-]{36}",
    "<i>": r"\d+",
    "<flow>": r"[0-9a-f-]{36}",
    "<lane>": r"[A-Za-z0-9._~%-]+",
    "<needs>": r"(?::[A-Za-z0-9._~%-]+)?",
    "<seen>": r"\d+",
    "<state>": r"[a-z]+",
    "<task>": r"[0-9a-f-]{36}",
    "<owner>": r"[0-9a-f]{40}",
    "<budget>": r"[A-Za-z0-9_-]+",
}
_PLACE = re.compile(r"\{fp:N\}|<\w+>")


class Row(NamedTuple):
    pattern: str
    type: str

    def matches(self, key: str) -> bool:
        parts = _PLACE.split(self.pattern)
        places = [_PLACES[place] for place in _PLACE.findall(self.pattern)] + [""]
        regex = "".join(re.escape(part) + place for part, place in zip(parts, places, strict=True))
        return re.fullmatch(regex, key) is not None


TABLE = {name: Row(pattern, kind) for pattern, name, kind in _ROW.findall(keys.__doc__)}

CHANNELS = {name: Row(pattern, "channel") for pattern, name in _CHANNEL.findall(keys.__doc__)}
"""The channels in the same docstring, by their names in ``ff.CHANNELS``."""


def row_of(key: str) -> Row:
    """The one row that a key matches."""
    (row,) = [row for row in TABLE.values() if row.matches(key)]
    return row
