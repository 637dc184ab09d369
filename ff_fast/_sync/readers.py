"""Readers, which hear of pushes over the hub."""

from __future__ import annotations

import contextlib
import time
from math import inf
from typing import TYPE_CHECKING, Self, TypeVar, cast

from ff_fast import _transport
from ff_fast._core import readers
from ff_fast._core.follow import Ended
from ff_fast._core.follow import Item as FollowItem
from ff_fast._core.routing import refusal
from ff_fast._core.tail import Item
from ff_fast._hot.items import BlockingItems, Turn
from ff_fast._sync.connection import PENDING
from ff_fast._sync.hub import Bell
from ff_fast.errors import DeadlineExceeded, FFError, InvalidInput
from ff_fast.types import CompletionPayload

if TYPE_CHECKING:
    from datetime import timedelta

    from ff_fast._core.steps import Step
    from ff_fast._sync.connection import Connection, Node
    from ff_fast._sync.pool import Pool

# Least time for a look at the topology, in seconds.
_LEAST_S = 0.05

T = TypeVar("T", bound=readers.HasCursor)


class Readable(readers.ReaderState[T], BlockingItems[T]):
    """What all readers have: an iterator and a context manager, read by one thread at a time."""

    _pool: Pool
    _turn: Turn
    # Set while a read is under way; an interrupt leaves it set, and items may not have been delivered.
    _torn = False

    if TYPE_CHECKING:

        def _advance(self, until: float | None) -> bool:
            """Take, ask or wait; return whether *until* has not passed."""

        def _let_go(self) -> None:
            """Give back what the server or the pool holds for this reader."""

        def _abandon(self) -> None:
            """Let go, unless it is being read."""

        def close(self) -> None:
            """Stop reading."""

    def next_batch(self, timeout: float | timedelta | None = None) -> list[T]:
        """Return all items of the server's next answer, or the items left of the last one.

        Args:
            timeout: Longest wait, in seconds or as a ``timedelta``; None waits until there are items.

        Returns:
            The items; an empty list if none arrived in time, and after the end.

        Raises:
            FFError: The same errors as iterating.
        """
        deadline = readers.deadline(timeout)
        while self._empty:
            if not self._read(deadline):
                return []
        rest = self._rest
        del self._rest
        return rest

    def _fill(self) -> bool:
        return self._read(None)

    def _read(self, until: float | None) -> bool:
        """Read the next items; return whether there are any, in time and before the end."""
        try:
            return self._read_in_turn(until)
        finally:
            if self._closed:
                # By another thread, which has left it to this one to let go.
                self._abandon()

    def _read_in_turn(self, until: float | None) -> bool:
        with self._turn:
            if not self._empty:
                # Another thread has read them meanwhile.
                return True
            if self.ended:
                self._let_go()
                return False
            if self._torn:
                self._let_go()
                self._restart(self.cursor)
            self._torn = True
            try:
                self._read_on(until)
            except FFError:
                self._torn = False
                raise
            self._torn = False
            return not self._empty

    def _read_on(self, until: float | None) -> None:
        while self._empty and not self._source.ended:
            try:
                if not self._advance(until):
                    return
            except FFError as error:
                self._let_go()
                self._failed(error, _transport.closed_error() if self._pool.closed else None)
        if self._source.ended:
            self._let_go()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Asked:
    """One read under way: what the nodes of its commands were asked, and have answered.

    Args:
        pool: Where the connections come from.
        step: The commands.
        load: Load the library where it is missing.
    """

    def __init__(self, pool: Pool, step: Step, *, load: bool) -> None:
        self._pool = pool
        self._step = step
        self._load = load
        self._replies: list[object] = [None] * len(step.commands)
        # Whether the error of a node stands for its replies.
        self._partial = step.partial and pool._nodes.topology is not None
        # The nodes that are not asked yet, with the places of their commands, in turn; None before the first look.
        self._places: list[tuple[Node, list[int]]] | None = None
        # How long connecting to the first of them is borne, in monotonic time; None before it begins.
        self._borne_until: float | None = None
        # On which replies are owed, and the places of these; the next one is the last in its list.
        self._owing: list[tuple[Connection, list[int]]] = []
        # Since when all nodes are asked that are.
        self._sent_at = 0.0

    def _find(self, until: float) -> list[tuple[Node, list[int]]]:
        """Return the nodes of the commands, with their places, in the order in which they are asked."""
        nodes = self._pool._nodes
        places: dict[Node, list[int]] = {}
        for index, command in enumerate(self._step.commands):
            try:
                places.setdefault(nodes.of(command.slot, until), []).append(index)
            except FFError as error:
                if not self._partial:
                    raise
                self._replies[index] = error
        # Those last that have failed before: connecting to them may take as long as silence is borne.
        return sorted(places.items(), key=lambda each: each[0].failed_at)

    def send(self, until: float | None) -> bool:
        """Send each command to the node of its slot; the next call goes on where the time was up.

        Returns:
            Whether all are sent; False if *until*, in monotonic time, has passed while a connection was being made.
        """
        late = inf if until is None else until
        if self._places is None:
            # Also whoever only looks finds out where slots have gone.
            self._places = self._find(max(late, time.monotonic() + _LEAST_S))
        step = self._step
        while self._places:
            node, indexes = self._places[0]
            part = step
            if len(indexes) < len(step.commands):
                part = step._replace(commands=[step.commands[index] for index in indexes])
            if self._borne_until is None:
                self._borne_until = time.monotonic() + readers.SILENT_S if self._partial else inf
            connection = None
            try:
                connection = self._pool._acquire_at(node, min(late, self._borne_until))
                self._owing.append((connection, indexes[::-1]))
                if self._load:
                    self._pool._prepare(connection)
                connection.send(part)
            except FFError as error:
                if connection is not None:
                    self._give_back(*self._owing.pop())
                elif isinstance(error, DeadlineExceeded):
                    now = time.monotonic()
                    if late <= now < self._borne_until:
                        return False
                    node.failed_at = now
                self._failed(node, indexes, error)
            del self._places[0]
            self._borne_until = None
            self._sent_at = time.monotonic()
        return True

    def receive(self, until: float | None) -> list[object] | None:
        """Return the replies, in order; None if they have not all arrived by *until*, in monotonic time.

        In a partial step the error of a node stands for each of its replies; so does its silence for a second.

        Raises:
            FFError: The read failed; it may be repeated if the error says so.
        """
        while self._owing:
            connection, indexes = self._owing[-1]
            try:
                while indexes:
                    silent_at = self._silent_at(connection)
                    reply = connection.receive(min(inf if until is None else until, silent_at))
                    if reply is not PENDING:
                        self._replies[indexes.pop()] = reply
                        error = refusal(reply)
                        if error is not None:
                            self._pool._nodes.failed(connection.node, error)
                    elif self._silent_at(connection) <= time.monotonic():
                        # No other connection to the node is trusted that was not heard of since, as that of the hub.
                        connection.silent_since = self._sent_at
                        raise DeadlineExceeded
                    elif until is not None and time.monotonic() >= until:
                        return None
            except FFError as error:
                self._failed(connection.node, indexes, error)
            self._give_back(*self._owing.pop())
        return self._replies

    def _silent_at(self, connection: Connection) -> float:
        """Return from when on a node that owes a reply is taken for silent, in monotonic time."""
        return max(self._sent_at, connection.heard_at) + readers.SILENT_S if self._partial else inf

    def _failed(self, node: Node, indexes: list[int], error: FFError) -> None:
        self._pool._nodes.failed(node, error)
        if not self._partial:
            raise error
        for index in indexes:
            self._replies[index] = error

    def _give_back(self, connection: Connection, _: list[int]) -> None:
        self._pool._release(connection, _transport.MAX_IDLE_OF_READERS)

    def release(self) -> None:
        """Give the connections back; those on which a reply is owed are closed."""
        while self._owing:
            self._give_back(*self._owing.pop())

    def abort(self) -> None:
        """Wake the thread that waits for a reply."""
        for connection, _ in list(self._owing):
            connection.abort()


class PushReader(readers.PushState[T], Readable[T]):
    """Base of the readers that take what is pushed.

    The thread of the hub queues pushes and rings the bell. Everything else is done by the thread that reads, which
    sends its reads on a connection of the pool.
    """

    # The read under way. Of the class, since an interrupt may strike before the object is complete.
    _asked: Asked | None = None

    def __init__(self, pool: Pool, source: readers.PushSource[T]) -> None:
        super().__init__(source, pool.config.retry)
        self._pool = pool
        # The hub knows the bell, and not the reader, so a reader that was left can go.
        self._bell = Bell()
        self._turn = Turn(readers.busy_error)

    def _advance(self, until: float | None) -> bool:
        # Also if there is a connection: a forked child must leave it alone.
        self._pool._check()
        if self.closed:
            raise readers.closed_error()
        if self._resume_at > time.monotonic():
            return self._wait(until, self._resume_at)
        asked = self._asked
        if asked is None:
            self._attach_part()
            if self._put_pushed():
                self._attach_part()
                return True
            step = self._next_step()
            if step is None:
                return self._wait(until, self._source.wake_at)
            asked = self._asked = Asked(self._pool, step, load=self._library_missing)
            self._library_missing = False
        replies = asked.receive(until) if asked.send(until) else None
        if replies is None:
            self._pool._paused[id(self)] = self
            return False
        self._asked = None
        self._put_received(replies)
        self._attach_part()
        return True

    def _wait(self, until: float | None, look_at: float) -> bool:
        """Wait until the bell rings, or *look_at* has come; return False where *until* has passed."""
        now = time.monotonic()
        if until is not None:
            if now >= until:
                return False
            look_at = min(look_at, until)
        self._bell.wait(look_at - now)
        return True

    def _attach_part(self) -> None:
        """Let the hub know what this reader listens with."""
        part = self._source.part
        if part is self._attached:
            return
        self._leave()
        part.on_wake = self._bell
        self._attached = part
        self._pool._hub.attach(part)
        self._opened()

    def _leave(self) -> None:
        attached, self._attached = self._attached, None
        self._listening = None
        if attached is not None:
            self._pool._hub.detach(attached)

    def _let_go(self) -> None:
        """Listen no more, and close the connections on which a reply is owed."""
        self._leave()
        asked, self._asked = self._asked, None
        if asked is not None:
            asked.release()

    def _abandon(self) -> None:
        """Let go for good of what a read has left; a thread that reads does so itself."""
        with contextlib.suppress(InvalidInput), self._turn:
            self._let_go()

    def close(self) -> None:
        """Stop reading. A waiting read raises an error."""
        self._closed = True
        try:
            with self._turn:
                self._let_go()
        except InvalidInput:
            self._bell()
            asked = self._asked
            if asked is not None:
                asked.abort()

    def __del__(self) -> None:
        # A loop that was left in the middle.
        self._let_go()


class Tail(PushReader[Item]):
    __doc__ = readers.TAIL


class Follow(PushReader[FollowItem]):
    __doc__ = readers.FOLLOW


class PatientReader(PushReader[T]):
    """Base of the readers whose first read may go on beyond its time."""

    def _advance(self, until: float | None) -> bool:
        return super()._advance(cast("readers.Patient", self._source).patience(until))


class Waiting(PatientReader[Ended]):
    """Waits for the end of an execution."""


class Completions(PatientReader[CompletionPayload]):
    __doc__ = readers.COMPLETIONS
