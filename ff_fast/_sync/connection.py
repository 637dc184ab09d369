"""One connection of the blocking shell."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from typing import TYPE_CHECKING, Any, TypeVar

from ff_fast import _transport
from ff_fast._core.steps import Flow, Pause, Step
from ff_fast._hot.resp import take_reply
from ff_fast.errors import DeadlineExceeded, FFError, OutcomeUnknown, ProtocolError

if TYPE_CHECKING:
    from ff_fast.types import BackendConfig

T = TypeVar("T")


class Channel:
    """One connection: bytes out, replies in, used by one thread at a time."""

    _socket: socket.socket | None = None

    def __init__(self, config: BackendConfig) -> None:
        import hiredis
        from redis.backoff import NoBackoff
        from redis.connection import Connection, SSLConnection, UnixDomainSocketConnection
        from redis.retry import Retry

        server = config.connection
        kind: type[Any] = UnixDomainSocketConnection if server.unix_path else Connection
        if server.tls:
            kind = SSLConnection
        connection = kind(**_transport.connection_arguments(config), retry=Retry(NoBackoff(), 0))
        failure: FFError | None = None
        try:
            connection.connect()
        except Exception as error:  # noqa: BLE001 - whatever it was, it was on the way to the server
            failure = _transport.connect_error(error, config)
        except BaseException:
            connection.disconnect()
            raise
        if failure is not None:
            connection.disconnect()
            raise failure
        self._pid = os.getpid()
        self._timeout = _transport.request_timeout_s(config)
        self._socket = _transport.take_socket(connection)
        self._reader = hiredis.Reader()
        self._broken_reply = hiredis.ProtocolError
        self._owed = 0

    @property
    def closed(self) -> bool:
        return self._socket is None

    @property
    def reusable(self) -> bool:
        """Whether another caller may have it: nothing is owed, so anything to read would be its end."""
        if self._socket is None or self._owed:
            return False
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return not poll.poll(0)

    def send(self, step: Step) -> None:
        if self._socket is None:
            raise _transport.closed_error()
        failure: FFError
        try:
            # Counted first: after an interrupt nobody knows how much has gone out.
            self._owed += step.replies
            self._socket.settimeout(self._timeout)
            self._socket.sendall(step.request)
        except TimeoutError:
            failure = DeadlineExceeded()
        except OSError:
            # Part of the request may have gone out.
            failure = OutcomeUnknown()
        except BaseException:
            self.close()
            raise
        else:
            return
        self.close()
        raise failure

    def receive(self, step: Step) -> object:
        """Return the next reply that is owed."""
        if self._socket is None:
            raise OutcomeUnknown
        deadline = time.monotonic() + _transport.wait_s(self._timeout, step)
        failure: FFError
        try:
            while (reply := take_reply(self._reader.gets)) is False:
                # Of the whole reply, not of its next byte.
                self._socket.settimeout(max(deadline - time.monotonic(), 1e-6))
                data = self._socket.recv(1 << 18)
                if not data:
                    raise ConnectionResetError
                self._reader.feed(data)
        except TimeoutError:
            failure = DeadlineExceeded()
        except OSError:
            failure = OutcomeUnknown()
        except self._broken_reply:
            failure = ProtocolError()
        except BaseException:
            # An interrupt left a reply unread: the next user of the connection would take it for its own.
            self.close()
            raise
        else:
            self._owed -= 1
            return reply
        self.close()
        raise failure

    def run(self, flow: Flow[T]) -> T:
        """Drive an operation of several steps to its value."""
        try:
            step = next(flow)
            while True:
                try:
                    replies: list[object] = []
                    if isinstance(step, Pause):
                        time.sleep(step.seconds)
                    else:
                        self.send(step)
                        replies = [self.receive(step) for _ in range(step.replies)]
                except FFError as error:
                    step = flow.throw(error)
                else:
                    step = flow.send(replies)
        except StopIteration as stop:
            value: T = stop.value
            return value

    def abort(self) -> None:
        """Wake the thread that waits on the connection; called from another thread."""
        taken = self._socket
        if taken is not None:
            with contextlib.suppress(OSError):
                # Not the method of a TLS socket: that one takes the session away from under the reader.
                socket.socket.shutdown(taken, socket.SHUT_RDWR)

    def close(self) -> None:
        taken, self._socket = self._socket, None
        if taken is None:
            return
        if self._pid == os.getpid():
            with contextlib.suppress(OSError):
                # A forked child may hold the socket open.
                socket.socket.shutdown(taken, socket.SHUT_RDWR)
        taken.close()

    def __del__(self) -> None:
        # An interrupt may strike where nobody else holds it yet.
        self.close()
