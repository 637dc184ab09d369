"""Supervision: firing due timers, and finding executions whose worker was lost."""

from __future__ import annotations

import contextlib
import logging
import random
import re
import time
from typing import TYPE_CHECKING

from ff_fast import keys
from ff_fast._core import ops
from ff_fast._core.flows import MEMBERS_A_CALL
from ff_fast._core.ready import publish_hints, with_hints
from ff_fast._core.steps import Command, Step, Steps, checked, command, time_ms
from ff_fast._hot.resp import pack_command
from ff_fast._log import LOG, Outage, named, say, say_seldom
from ff_fast.errors import (
    Corruption,
    ExecutionNotFound,
    FFError,
    InternalFunctionError,
    ProtocolError,
)
from ff_fast.types import ReclaimGrant, ReclaimToken, ScannerFilter

if TYPE_CHECKING:
    from types import TracebackType

    from ff_fast._core.deployment import Deployment

# Their calls go to the server together, which serves nobody else until the last is done: firing one takes about 50 us.
_DUE_A_CALL = 32
_GRANT_MS = 60_000
_DEFER_MS = 60_000
# A flow of any size takes this share of a round, so that other timers fire meanwhile.
_CALLS_A_FLOW = 64
# Partitions, most of which are on different nodes, that are asked for the time until one answers.
_NODES_ASKED = 4
_TIME = pack_command(b"TIME")
_MARK_S = 5.0
_MARK_AGAIN_S = 1.0
_LOOK_S = 2.0
_UUID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"


def _due(partition: int, now: bytes, offset: int) -> Command:
    """Return the command that reads the due timers of a partition, from *offset* on."""
    timers = keys.timers(keys.slot_tag(partition))
    page = (b"LIMIT", b"%d" % offset, b"%d" % _DUE_A_CALL)
    return command(b"ZRANGEBYSCORE", timers, b"-inf", now, *page)


def stand_by_s() -> float:
    """Return the seconds until the next look of a process that stands by."""
    return _LOOK_S * random.uniform(0.75, 1.25)  # noqa: S311


class Turn:
    """Whether this process makes the next round: a mark on the server says who does, until it lapses.

    It saves rounds and guards nothing, as any number may supervise at once.

    Args:
        name: Names the process in the mark.
        insists: Make every round, whoever else does; those that do not insist stand by.
        interval_s: Seconds between two rounds.
    """

    __slots__ = ("_held_until", "_insists", "_lasts_ms", "_name")

    def __init__(self, name: str, interval_s: float, *, insists: bool) -> None:
        self._name = name.encode()
        self._insists = insists
        self._lasts_ms = b"%d" % (max(_MARK_S, 3 * interval_s) * 1000)
        self._held_until = 0.0

    def take(self) -> Steps[bool]:
        """Take the mark, or keep it; return whether to make a round.

        Raises:
            FFError: The server does not answer, or refuses the mark to who does not insist.
        """
        key, now = keys.supervisor(), time.monotonic()
        if now < self._held_until:
            return True
        lasts = (b"PX", self._lasts_ms)
        # Others than who insists leave the mark to whoever has set it.
        taking = () if self._insists else (b"NX", b"GET")
        # Its node may be lost, and the others have timers too: then everybody supervises, as without the right to set it.
        (reply,) = yield Step((command(b"SET", key, self._name, *taking, *lasts),), partial=True)
        if isinstance(reply, FFError):
            return True
        if not self._insists:
            if isinstance(reply, bytes):
                if reply != self._name:
                    return False
                yield Step((command(b"PEXPIRE", key, self._lasts_ms),))
            else:
                # Where the mark is a key of another type, everybody supervises.
                with contextlib.suppress(Corruption):
                    checked(reply)
        self._held_until = now + _MARK_AGAIN_S
        return True

    def leave(self) -> Steps[None]:
        """Take the mark away where this process has set it, so that another one need not wait."""
        if self._held_until:
            self._held_until = 0.0
            yield Step((command(b"PEXPIRE", keys.supervisor(), b"0"),))


class Supervision:
    """The rounds of a supervisor: each reads the due timers of every partition, and fires them.

    Args:
        on: The deployment.
        scope: Filter of the executions.
    """

    __slots__ = ("_on", "_scope", "_unreadable")

    def __init__(self, on: Deployment, scope: ScannerFilter) -> None:
        self._on = on
        self._scope = scope
        self._unreadable: set[int] = set()

    def round(self) -> Steps[int]:
        """Fire every due timer; return how many took effect.

        Foreign data stops the timers that it concerns and no others: a timer that cannot be fired is put off by the
        server, and a partition whose timers cannot be read is left out of the round. Both are logged.

        Raises:
            FFError: The server does not answer; of a cluster, a node, after the timers of the others have fired.
        """
        now_ms = yield from _server_ms(self._on.partitions)
        now = b"%d" % now_ms
        offsets = dict.fromkeys(range(self._on.partitions), 0)
        fired = 0
        unread: FFError | None = None
        while offsets:
            due = [_due(index, now, offset) for index, offset in offsets.items()]
            pages = yield Step(due, partial=True)
            following: dict[int, int] = {}
            for (index, offset), page in zip(offsets.items(), pages, strict=True):
                if isinstance(page, FFError):
                    unread = page
                    continue
                try:
                    members = checked(page)
                except Corruption:
                    if index not in self._unreadable:
                        LOG.warning("Partition %d is not supervised: foreign timers.", index)
                    self._unreadable.add(index)
                    continue
                self._unreadable.discard(index)
                if members:
                    stayed, done = yield from self._fire(index, members, now_ms)
                    fired += done
                    if len(members) == _DUE_A_CALL:
                        # Skipped and early timers stay in the set; continue after them.
                        following[index] = offset + stayed
            offsets = following
        if unread is not None:
            raise unread
        return fired

    def _fire(self, partition: int, members: list[bytes], now_ms: int) -> Steps[tuple[int, int]]:
        slot_tag = keys.slot_tag(partition)
        stayed = done = deferred = 0
        hints: ops.Hints = []
        timers = []
        for member in members:
            kind, _, rest = member.decode("utf-8", "replace").partition(":")
            if kind == "flow" and re.fullmatch(_UUID, rest):
                try:
                    left = yield from self._cancel_members(rest, partition)
                except (Corruption, InternalFunctionError):
                    yield from self._defer(slot_tag, member, now_ms)
                    deferred += 1
                    continue
                stayed += left != 0
                done += left is not None
                continue
            # The call drops a member that names no execution of this partition.
            found = re.fullmatch(rf"{re.escape(slot_tag)}:{_UUID}", rest)
            execution_id = rest if found else f"{slot_tag}:"
            timers.append(ops.fire_timer(slot_tag, member, kind, execution_id, self._scope))
        replies: list[object] = []
        if timers:
            replies = yield Step([op.command() for op in timers])
        for op, reply in zip(timers, replies, strict=True):
            try:
                what, told = op.answer(reply)
            except (Corruption, InternalFunctionError):
                yield from self._defer(slot_tag, op.argv[0], now_ms)
                deferred += 1
                continue
            hints += told
            stayed += what == "skipped" or what == "later"
            done += what == "done"
            deferred += what == "deferred"
        if deferred:
            say_seldom(
                logging.WARNING,
                "timers",
                "foreign",
                "%d timers of partition %d cannot be fired: their keys hold foreign data. They are tried again in a"
                " minute.",
                deferred,
                partition,
            )
        yield from publish_hints(hints, partition)
        return stayed, done

    def _defer(self, slot_tag: str, member: bytes, now_ms: int) -> Steps[None]:
        """Put off a timer whose call failed: it must not hold back those after it, nor be tried in every round."""
        timers = keys.timers(slot_tag)
        yield Step((command(b"ZADD", timers, b"XX", b"%d" % (now_ms + _DEFER_MS), member),))

    def _cancel_members(self, flow_id: str, partition: int) -> Steps[int | None]:
        """Cancel members of a cancelled flow; 0 if none is left, None for a flow outside the filter."""
        slot_tag = keys.slot_tag(partition)
        if self._scope.namespace is not None:
            (reply,) = yield Step((command(b"HGET", keys.flow(slot_tag, flow_id), b"namespace"),))
            if isinstance(reply, bytes) and reply != self._scope.namespace.encode():
                return None
        left = 1
        for _ in range(_CALLS_A_FLOW):
            _, left = yield from with_hints(
                ops.cancel_members(flow_id, slot_tag, MEMBERS_A_CALL), partition
            )
            if left == 0:
                break
        return left


class Watch:
    """Says when a supervisor starts and stops, and when it has no server; a context manager.

    Args:
        scope: Filter of the executions.
        aside: It stands by in a worker, which says the same of itself.
    """

    def __init__(self, scope: ScannerFilter, *, aside: bool = False) -> None:
        self._aside = aside
        self._of = "" if scope.is_noop() else f" of {scope}"
        self._outage = Outage("supervisor")

    def __enter__(self) -> None:
        self._say(logging.INFO, "A supervisor%s has started.")

    def failed(self, error: FFError) -> None:
        """Note that a round has failed, and that the next one tries again."""
        if not self._aside:
            self._outage.fails(
                error.code,
                "A supervisor%s has no server: %s Until it has, lost workers, delays and time limits take no effect.",
                self._of,
                error,
            )

    def done(self, fired: int) -> None:
        """Note that a round was made."""
        self._outage.works("A supervisor%s goes on after %.1f s.", self._of)
        if fired:
            say(logging.DEBUG, "Timers fired: %d.", fired)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if isinstance(error, Exception):
            # No other round would pass.
            self._say(logging.ERROR, "A supervisor%s has ended with an error: %s", named(error))
        else:
            self._say(logging.INFO, "A supervisor%s has stopped.")

    def _say(self, level: int, message: str, *arguments: object) -> None:
        say(logging.DEBUG if self._aside else level, message, self._of, *arguments)


def _members(page: object) -> list[bytes]:
    """Return the due timers of a partition; none if its timers are a key of another type."""
    try:
        return checked(page)
    except Corruption:
        return []


def _server_ms(partitions: int) -> Steps[int]:
    """Ask for the server's time; in a cluster the first node that answers counts."""
    reply: object = None
    for index in range(0, partitions, max(partitions // _NODES_ASKED, 1)):
        key = keys.timers(keys.slot_tag(index))
        (reply,) = yield Step((Command(key, _TIME),), partial=True)
        if not isinstance(reply, FFError):
            break
    if isinstance(reply, FFError):
        raise reply
    return time_ms(reply)


def find_reclaimable(partitions: int, limit: int) -> Steps[list[ReclaimToken]]:
    """Find at most *limit* active executions of all partitions whose lease has lapsed.

    Raises:
        FFError: The server does not answer; of a cluster, a node, and there are none at the others.
    """
    now_ms = yield from _server_ms(partitions)
    now = b"%d" % now_ms
    tokens: list[ReclaimToken] = []
    unread: FFError | None = None
    indexes, offset = list(range(partitions)), 0
    while indexes:
        due = [_due(index, now, offset) for index in indexes]
        replies = yield Step(due, partial=True)
        unread = next((each for each in replies if isinstance(each, FFError)), unread)
        pages = [[] if isinstance(each, FFError) else _members(each) for each in replies]
        for member in [member for page in pages for member in page]:
            kind, _, execution_id = member.decode("utf-8", "replace").partition(":")
            if kind != "lease" or not re.fullmatch(rf"\{{fp:\d+\}}:{_UUID}", execution_id):
                continue
            try:
                found = yield from ops.call(ops.describe_execution(execution_id))
                attempt = found.attempt_index or 0
                stream = yield from ops.call(ops.describe_attempt(execution_id, attempt))
            except (ExecutionNotFound, Corruption, InternalFunctionError, ProtocolError):
                # Gone meanwhile, or foreign data in its keys.
                continue
            # That of a named stream is in no lane: whoever opens its name takes it over.
            if found.state == "active" and found.lane and stream.lease_left == 0:
                tokens.append(reclaim_token(execution_id, found.lane, now_ms))
                if len(tokens) == limit:
                    return tokens
        # The set holds timers of other kinds too.
        indexes = [
            index for index, page in zip(indexes, pages, strict=True) if page[_DUE_A_CALL - 1 :]
        ]
        offset += _DUE_A_CALL
    if unread is not None and not tokens:
        raise unread
    return tokens


def reclaim_token(execution_id: str, lane: str, now_ms: int) -> ReclaimToken:
    """Return the token of an execution to take over; the claim itself checks the lease."""
    grant = ReclaimGrant(
        execution_id=execution_id,
        partition_key=keys.slot_tag_of(execution_id),
        grant_key=keys.core(execution_id).decode(),
        expires_at_ms=now_ms + _GRANT_MS,
        lane_id=lane,
    )
    return ReclaimToken(grant)
