"""One connection of the blocking shell, and the server that it leads to."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast import _transport
from ff_fast._core.contact import Contact, name_of
from ff_fast._core.sentinel import ROLE, ask_another_first, check_role
from ff_fast._core.steps import AwaitHint, Pause, Step, Steps
from ff_fast._hot.resp import ReplyGuard, take_reply
from ff_fast._sync.credentials import ask
from ff_fast.errors import DeadlineExceeded, FFError, OutcomeUnknown, ProtocolError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from ff_fast._core.topology import Address
    from ff_fast._hot.tally import Tally
    from ff_fast._sync.credentials import Credentials
    from ff_fast.types import BackendConfig, ValkeyConnection

T = TypeVar("T")

PENDING = object()
"""Returned by `receive` in place of a reply that has not arrived in time."""


class Connection:
    """One connection: bytes out, replies in, used by one thread at a time.

    Attributes:
        node: The server, which whoever connects sets.
    """

    node: Node

    _socket: socket.socket | None = None
    # Hears of its loss, once it has a node.
    contact: Contact | None = None
    # Set when another thread ends it: its loss is no fault.
    _aborted = False

    def __init__(self, config: BackendConfig) -> None:
        import hiredis
        from redis import connection as redis_connection
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        server = config.connection
        # Host and port to which it leads.
        self.address = server.host, server.port
        # When it logged in last, in monotonic time.
        self.authenticated_at = time.monotonic()
        # Logs it in again before a request; None where nothing is renewed.
        self.credentials: Credentials | None = None
        # Number of replies before that of a command that logs in again; None without one.
        self._renewal_after: int | None = None
        provider = server.credential_provider
        login = None if provider is None else ask(provider)
        kind: type[Any] = redis_connection.Connection
        if server.unix_path:
            kind = redis_connection.UnixDomainSocketConnection
        elif server.tls:
            kind = redis_connection.SSLConnection
        connection = kind(
            **_transport.connection_arguments(config, login),
            parser_class=_transport.guarded_parser(redis_connection),
            retry=Retry(NoBackoff(), 0),
        )
        if server.ssl_context is not None:
            _transport.use_context(connection, server.ssl_context)
        failure: FFError | None = None
        try:
            connection.connect()
        except Exception as error:  # noqa: BLE001 - every failure becomes an error of connecting
            failure = _transport.connect_error(error, config)
        except BaseException:
            connection.disconnect()
            raise
        if failure is not None:
            connection.disconnect()
            if server.sentinel_service is not None:
                ask_another_first(server)
            raise failure
        self._pid = os.getpid()
        self._timeout = _transport.request_timeout_s(config)
        self._socket = _transport.take_socket(connection)
        self._wants_read = _transport.wants_read(server.tls)
        self._reader = hiredis.Reader()
        self._guard = ReplyGuard()
        self._broken_reply = hiredis.ProtocolError
        self._pushed = hiredis.PushNotification
        self._owed = 0
        self._due = 0.0
        self._large = False
        self._sent_at = 0.0
        # When the last bytes came, in monotonic time.
        self.heard_at = time.monotonic()
        # Set once it has answered the steps of connecting.
        self.ready = False
        # Set when it missed a deadline: it had been silent since then.
        self.silent_since: float | None = None
        if server.sentinel_service is not None:
            self._check_role(server)

    def _check_role(self, server: ValkeyConnection) -> None:
        """Raise ``NotPrimary`` unless the server is the primary that a sentinel has named."""
        try:
            (reply,) = self.request(ROLE)
            check_role(reply, server)
        except BaseException:
            self.close()
            raise

    @property
    def closed(self) -> bool:
        return self._socket is None

    @property
    def reusable(self) -> bool:
        """Whether another caller may use it: no reply is owed, and the server has not closed it."""
        if self._socket is None or self._owed:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def send(self, step: Step, longest: float = float("inf")) -> None:
        """Send the commands of *step*; :meth:`receive` returns their replies.

        Args:
            step: The step.
            longest: Longest time for the replies in seconds, where it is shorter than the request timeout.

        Raises:
            Unavailable: The connection was closed before; nothing was sent.
            OutcomeUnknown, DeadlineExceeded: A part of the request may have been sent.
        """
        if self._socket is None:
            raise Unavailable
        failure: FFError
        try:
            # Counted first: an interrupt may strike after a part of the request was sent.
            self._owed += len(step.commands)
            self._sent_at = time.monotonic()
            timeout = min(self._timeout, longest)
            self._due = self._sent_at + _transport.wait_s(timeout, step)
            self._large = step.large
            request = step.request
            if self.credentials is not None:
                request = self._renewed(request, self._owed - len(step.commands))
            self._socket.settimeout(timeout)
            self._socket.sendall(request)
        except TimeoutError:
            failure = self._late()
        except OSError:
            # A part of the request may have been sent.
            failure = OutcomeUnknown()
        except BaseException:
            self.close()
            raise
        else:
            return
        self._lose(failure)
        raise failure

    def receive(self, until: float | None = None) -> object:
        """Return the next owed reply, or `PENDING` if it has not arrived by *until*, in monotonic time.

        All replies of a step share its deadline, which large ones extend as they come. A connection that misses the
        deadline is closed.
        """
        if self._socket is None:
            raise OutcomeUnknown
        failure: FFError
        looked = False
        try:
            while (reply := take_reply(self._reader.gets, self._pushed)) is False:
                now = time.monotonic()
                # Once in any case, so that whoever only looks sees what has come.
                if looked and until is not None and now >= until:
                    return PENDING
                looked = True
                due = self._due if until is None else min(self._due, until)
                # Bounds the whole reply, not each of its reads; of a large one, the silence within it.
                self._socket.settimeout(max(due - now, 1e-6))
                try:
                    data = self._socket.recv(1 << 18)
                except TimeoutError:
                    if time.monotonic() >= self._due:
                        raise
                    continue
                if not data:
                    raise ConnectionResetError
                self.heard_at = time.monotonic()
                if not self._guard.accepts(data):
                    raise self._broken_reply
                self._reader.feed(data)
                if self._large:
                    self._due = max(self._due, self.heard_at + self._timeout)
        except TimeoutError:
            failure = self._late()
        except OSError:
            failure = OutcomeUnknown()
        except self._broken_reply:
            failure = ProtocolError()
        except BaseException:
            # After an interrupt the next user of the connection would read this reply as its own.
            self.close()
            raise
        else:
            if self._renewal_after is not None:
                if self._renewal_after == 0:
                    self._renewal_after = None
                    self._note_renewal(reply)
                    return self.receive(until)
                self._renewal_after -= 1
            self._owed -= 1
            return reply
        self._lose(failure)
        raise failure

    def renewal(self) -> bytes | None:
        """Return a command that logs in again, to be sent before others, where that is due."""
        if self.credentials is None:
            return None
        request = self.credentials.due(self)
        if request is not None:
            self.authenticated_at = time.monotonic()
        return request

    def _renewed(self, request: bytes, owed: int) -> bytes:
        """Return *request*, behind one that logs in again where that is due; *owed* replies come before."""
        if self._renewal_after is not None or (renewal := self.renewal()) is None:
            return request
        self._renewal_after = owed
        return renewal + request

    def _note_renewal(self, reply: object) -> None:
        if isinstance(reply, Exception) and self.credentials is not None:
            self.credentials.refused()

    def listen(self, wake: socket.socket, until: float) -> list[Any]:
        """Wait for what comes, replies or pushes; return all of it, in order.

        The list is empty if *wake* can be read, or nothing has come by *until*, in monotonic time.

        Raises:
            OutcomeUnknown: The connection is lost.
            ProtocolError: What came is no RESP.
        """
        taken = self._socket
        if taken is None:
            raise OutcomeUnknown
        found: list[Any] = []
        failure: FFError
        try:
            # A TLS socket may hold bytes that came with those read before.
            data = self._receive_now(taken)
            if data is None:
                poll = select.poll()
                poll.register(taken, select.POLLIN)
                poll.register(wake, select.POLLIN)
                poll.poll(max(until - time.monotonic(), 0.0) * 1000 + 1)
                data = self._receive_now(taken)
            while data is not None:
                if not data:
                    raise ConnectionResetError
                self.heard_at = time.monotonic()
                if not self._guard.accepts(data):
                    raise self._broken_reply
                self._reader.feed(data)
                while (reply := take_reply(self._reader.gets)) is not False:
                    found.append(reply)
                # The rest of a message that came in part; what follows is for the next call.
                data = None if found else self._receive_now(taken)
        except OSError:
            failure = OutcomeUnknown()
        except self._broken_reply:
            failure = ProtocolError()
        else:
            return found
        self._lose(failure)
        raise failure

    def _receive_now(self, taken: socket.socket) -> bytes | None:
        """Return the bytes that have come; None if there are none, empty at the end of the connection."""
        taken.settimeout(0)
        try:
            return taken.recv(1 << 18)
        except (BlockingIOError, self._wants_read):
            return None

    def post(self, request: bytes) -> None:
        """Send *request*, whose replies and pushes :meth:`listen` returns.

        Raises:
            OutcomeUnknown: The connection is lost, or takes nothing for a request timeout.
        """
        if self._socket is None:
            raise OutcomeUnknown
        try:
            self._socket.settimeout(self._timeout)
            self._socket.sendall(request)
        except OSError:
            pass
        else:
            return
        failure = OutcomeUnknown()
        self._lose(failure)
        raise failure

    def is_push(self, reply: object) -> bool:
        """Return whether the server sent *reply* unasked."""
        return type(reply) is self._pushed

    def _late(self) -> DeadlineExceeded:
        """Return the error of a missed deadline; note whether nothing has come since the request was sent."""
        late = DeadlineExceeded()
        if self.heard_at <= self._sent_at:
            self.silent_since = self._sent_at
            late.silent = self.ready
        return late

    def request(self, step: Step, longest: float = float("inf")) -> list[object]:
        """Send the commands of *step* and return their replies, in order; see :meth:`send`."""
        self.send(step, longest)
        return self.receive_all(step)

    def receive_all(self, step: Step) -> list[object]:
        """Return the replies to *step*, which was sent, in order."""
        return [self.receive() for _ in step.commands]

    def _lose(self, failure: FFError) -> None:
        """Close the connection, which has failed."""
        self.close()
        if self.contact is not None and not self._aborted:
            self.contact.lost(failure, idle_s=self._sent_at - self.heard_at)

    def abort(self) -> None:
        """Wake the thread that reads from the connection; called from another thread."""
        self._aborted = True
        taken = self._socket
        if taken is not None:
            with contextlib.suppress(OSError):
                # The method of a TLS socket would drop the TLS session while the other thread reads.
                socket.socket.shutdown(taken, socket.SHUT_RDWR)

    def close(self) -> None:
        taken, self._socket = self._socket, None
        if taken is None:
            return
        if self._pid == os.getpid():
            with contextlib.suppress(OSError):
                # close() alone would not end the connection while a forked child holds the socket too.
                socket.socket.shutdown(taken, socket.SHUT_RDWR)
        taken.close()

    def __del__(self) -> None:
        # An interrupt may strike before the pool holds the connection.
        self.close()


class Wanting:
    """A caller that wants a connection in time: a lock, since an interrupt could leave a Condition locked for ever."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self.error: FFError | None = None

    def wait(self, seconds: float) -> None:
        """Wait until it is told something, at most *seconds*."""
        self._lock.acquire(timeout=max(seconds, 0.0))

    def tell(self, error: FFError | None) -> None:
        """Wake the caller: there is a connection, or the error of making one."""
        self.error = error
        # RuntimeError: it is awake.
        with contextlib.suppress(RuntimeError):
            self._lock.release()


class Node:
    """One server: the idle connections to it.

    Single calls in C change its state, so no lock is needed that an interrupt or a finaliser could leave locked.

    Attributes:
        config: The configuration with the address of this server.
        reached: The same with the address that sentinels have named last.
        address: Where it listens; None for the one server of a backend without a cluster.
        replica: It is asked as a replica.
        library_missing: A function was not found there: the next connection that is taken loads the library.
        failed_at: When it could not be reached, in monotonic time.
        gone: It has left the cluster; no connection to it stays.
        opening: Threads that open a connection for callers that have little time.
        wanting: These callers.
        place: A version of the topology, and the slots that this server has in it.
        contact: Whether it can be reached.
    """

    def __init__(
        self,
        config: BackendConfig,
        tally: Tally,
        address: Address | None = None,
        *,
        replica: bool = False,
    ) -> None:
        self.contact = Contact(name_of(config.connection, replica=replica), tally)
        self.config = self.reached = config
        self.address = address
        self.replica = replica
        self.library_missing = False
        self.failed_at = 0.0
        self.gone = False
        self.place: tuple[int, frozenset[int]] = (0, frozenset())
        self.opening: set[threading.Thread] = set()
        self.wanting: set[Wanting] = set()
        # The most recently used is at the right.
        self._idle: deque[Connection] = deque()
        # The latest time at which a connection fell silent, or the server was no primary any more. A connection that was
        # heard of before may be as dead.
        self._doubted_at = 0.0

    @property
    def idle(self) -> int:
        """Number of idle connections."""
        return len(self._idle)

    @property
    def heard_at(self) -> float:
        """When the connection that was used last was heard of, in monotonic time; 0 if none is idle."""
        try:
            return self._idle[-1].heard_at
        except IndexError:
            return 0.0

    def trusts(self, connection: Connection) -> bool:
        """Whether *connection*, which owes nothing, was heard of since another one fell silent."""
        return connection.heard_at >= self._doubted_at

    def doubt(self, since: float) -> None:
        """Trust no connection any more that was not heard of since a point in monotonic time."""
        self._doubted_at = max(self._doubted_at, since)

    def leave(self, address: tuple[str, int]) -> None:
        """Trust no idle connection any more if one of them leads elsewhere than to *address*."""
        if any(connection.address != address for connection in list(self._idle)):
            self.doubt(time.monotonic())

    def note_silence(self, connection: Connection) -> None:
        """Note when a connection that is given up fell silent, if it did."""
        if connection.silent_since is not None:
            self.doubt(connection.silent_since)

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
        if len(self._idle) < most and connection.reusable and self.trusts(connection):
            self._idle.append(connection)
        else:
            connection.close()
        if self.gone:
            self.close_idle()

    def close_idle(self, before: float = float("inf"), keep: int = 0) -> None:
        """Close the idle connections that were last heard of before a point in monotonic time, but for *keep* of them."""
        try:
            while len(self._idle) > keep and self._idle[0].heard_at < before:
                self._idle.popleft().close()
        except IndexError:
            # There is none left; another thread may have taken the one that was looked at.
            return


def run_steps(
    steps: Steps[T],
    request: Callable[[Step], list[object]],
    wait: Callable[[AwaitHint], None] | None = None,
) -> T:
    """Run the steps of an operation, and return its value.

    Args:
        steps: The steps.
        request: Sends a step and returns its replies.
        wait: Waits for a hint, in the steps of a claim.
    """
    try:
        step = next(steps)
        while True:
            try:
                replies: list[object] = []
                if isinstance(step, Step):
                    replies = request(step)
                elif isinstance(step, Pause):
                    time.sleep(step.seconds)
                else:
                    assert wait is not None
                    wait(step)
            except FFError as error:
                step = steps.throw(error)
            else:
                step = steps.send(replies)
    except StopIteration as stop:
        value: T = stop.value
        return value
