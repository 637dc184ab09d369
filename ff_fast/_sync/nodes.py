"""The servers of a backend, and the connections that a call holds while it runs."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from ff_fast._core.steps import Step
    from ff_fast._sync.connection import Connection
    from ff_fast.types import BackendConfig


class Node:
    """One server: the idle connections to it.

    Single calls in C change its state, so no lock is needed that an interrupt or a finaliser could leave locked.

    Attributes:
        config: The configuration with the address of this server.
        library_missing: A function was not found there: the next connection that is taken loads the library.
    """

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self.library_missing = False
        # The most recently used is at the right.
        self._idle: deque[Connection] = deque()
        # The latest time at which a connection fell silent. One that was heard of before may have died with it.
        self._silence = 0.0

    @property
    def idle(self) -> int:
        """Number of idle connections."""
        return len(self._idle)

    def trusts(self, connection: Connection) -> bool:
        """Whether *connection*, which owes nothing, was heard of since another one fell silent."""
        return connection.heard_at >= self._silence

    def note_silence(self, connection: Connection) -> None:
        """Note when a connection that is given up fell silent, if it did."""
        if connection.silent_since is not None:
            self._silence = max(self._silence, connection.silent_since)

    def take(self) -> Connection | None:
        """Return an idle connection that works, as far as is known; None if there is none."""
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                return None
            if self.trusts(connection) and connection.reusable:
                return connection
            connection.close()

    def give(self, connection: Connection, most: int) -> None:
        """Keep a connection for the next caller; one that owes a reply, or finds *most* idle ones, is closed."""
        self.note_silence(connection)
        if len(self._idle) < most and connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()

    def close_idle(self, before: float = float("inf"), keep: int = 0) -> None:
        """Close the idle connections that were last heard of before a point in monotonic time, but for *keep* of them."""
        try:
            while len(self._idle) > keep and self._idle[0].heard_at < before:
                self._idle.popleft().close()
        except IndexError:
            # There is none left; another thread may have taken the one that was looked at.
            return


class Nodes:
    """The servers of a backend; a standalone server is the only one of its backend."""

    def __init__(self, config: BackendConfig) -> None:
        self._only = Node(config)

    def of(self, slot: int | None) -> Node:  # noqa: ARG002
        """Return the server that holds *slot*; any one for None."""
        return self._only

    def all(self) -> list[Node]:
        """Return the servers that are known."""
        return [self._only]


class Connections(Protocol):
    """The pool, as far as a call needs it."""

    _nodes: Nodes

    def _acquire_at(self, node: Node) -> Connection: ...

    def _release(self, connection: Connection) -> None: ...

    def _prepare(self, connection: Connection) -> None: ...


class Requests:
    """Sends the steps of one call, on connections that it holds until they are released. Used by one thread.

    Args:
        pool: Where the connections come from.
        longest: Longest time for the replies to a step in seconds, where it is shorter than the request timeout.
    """

    __slots__ = ("_held", "_longest", "_nodes", "_pool")

    def __init__(self, pool: Connections, longest: float = float("inf")) -> None:
        self._pool = pool
        self._nodes = pool._nodes
        self._longest = longest
        self._held: dict[Node, Connection] = {}

    def request(self, step: Step) -> list[object]:
        """Send the commands of *step*, each to the server of its slot, and return their replies, in order."""
        return self._on(self._nodes.of(None)).request(step, self._longest)

    def _on(self, node: Node) -> Connection:
        """Return the connection to *node* that is held; take one if there is none."""
        connection = self._held.get(node)
        if connection is None:
            connection = self._held[node] = self._pool._acquire_at(node)
            if node.library_missing:
                # First: where it cannot be loaded, only calls of functions are to fail.
                node.library_missing = False
                self._pool._prepare(connection)
        return connection

    def library_missing(self) -> None:
        """Note that a function was not found on one of the servers whose connections are held."""
        for node in self._held:
            node.library_missing = True

    def release(self) -> None:
        """Give back the connections; those that owe a reply are closed."""
        while self._held:
            self._pool._release(self._held.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()
