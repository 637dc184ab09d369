"""The logger ``ff_fast``: how a record is made, and how often the same thing is said.

Levels: ERROR where a handler raised or work was given up. WARNING where something was lost, repeated or refused, and
somebody should look. INFO once in the life of a thing: a library that was loaded, a supervisor or a worker that starts
and stops, a server that answers again. DEBUG for the rest.

A record has the fields ``execution_id``, ``attempt_index`` and ``worker_id`` where there is such a thing. None has a
payload, a token, a password or a lease id.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING

from ff_fast.errors import FFError

if TYPE_CHECKING:
    from collections.abc import Hashable

LOG = logging.getLogger("ff_fast")

AGAIN_S = 10.0
"""For so long, in seconds, a place says nothing more of a cause that it has told of."""

_MOST = 1_024

# Of each place and cause: when it was told of, in monotonic time, and how often it was kept back since. Single calls in C
# change it, so it needs no lock that an interrupt could leave locked; a race costs a line or a count.
_told: dict[tuple[str, Hashable], list[float]] = {}


def named(error: Exception) -> str:
    """Return what a record may say of an error: the text of one of ours, and of any other its type alone."""
    return str(error) if isinstance(error, FFError) else f"{type(error).__name__}."


def say(
    level: int,
    message: str,
    *arguments: object,
    raised: BaseException | None = None,
    **about: object,
) -> None:
    """Make a record; *raised* comes with its traceback, and what is None in *about* is left out."""
    if not LOG.isEnabledFor(level):
        return
    # A record may be kept, and an error has the frames that it went through, with the connections in them.
    texts = [str(each) if isinstance(each, BaseException) else each for each in arguments]
    extra = {name: value for name, value in about.items() if value is not None}
    LOG.log(level, message, *texts, exc_info=raised, extra=extra)


def say_seldom(
    level: int,
    place: str,
    cause: Hashable,
    message: str,
    *arguments: object,
    raised: BaseException | None = None,
    **about: object,
) -> bool:
    """Make a record unless *place* has told of *cause* in the last 10 s; the next one says how often it was kept back.

    Returns:
        Whether a record was made.
    """
    if not LOG.isEnabledFor(level):
        return False
    now = time.monotonic()
    key = place, cause
    before = _told.get(key)
    if before is not None and now - before[0] < AGAIN_S:
        before[1] += 1
        return False
    while len(_told) >= _MOST:
        oldest = next(iter(tuple(_told)), None)
        if oldest is None:
            break
        _told.pop(oldest, None)
    # Behind the others, so that those which are told of most seldom are forgotten first.
    _told.pop(key, None)
    _told[key] = [now, 0]
    if before is not None and before[1]:
        message += " (%d more since the last such line.)"
        arguments = (*arguments, int(before[1]))
    say(level, message, *arguments, raised=raised, **about)
    return True


class Outage:
    """Says once that something fails, and once that it works again.

    Args:
        place: What fails, for :func:`say_seldom`.
    """

    __slots__ = ("_place", "_said", "_since")

    def __init__(self, place: str) -> None:
        self._place = place
        self._said = False
        # Since when it fails, in monotonic time; None while it works.
        self._since: float | None = None

    def fails(self, cause: Hashable, message: str, *arguments: object) -> None:
        """Note that it fails, which *message* says."""
        if self._since is None:
            self._since = time.monotonic()
        self._said |= say_seldom(logging.WARNING, self._place, cause, message, *arguments)

    def works(self, message: str, *arguments: object) -> bool:
        """Note that it works, and return whether it had failed; *message* says for how many seconds, its last argument."""
        since, self._since = self._since, None
        if since is None:
            return False
        if self._said:
            self._said = False
            say(logging.INFO, message, *arguments, time.monotonic() - since)
        return True
