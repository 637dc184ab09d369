"""The connection pool of one backend, and the retries of its calls."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from ff_fast import _process, _transport
from ff_fast._core.deployment import Deployment
from ff_fast._core.steps import Retries
from ff_fast._sync.claims import Claiming
from ff_fast._sync.connection import Connection, run_steps
from ff_fast._sync.hub import Hub
from ff_fast.errors import FFError, ForkedClient, FunctionMissing

if TYPE_CHECKING:
    from collections.abc import Callable

    from ff_fast._core.operations import Call
    from ff_fast._core.steps import Step
    from ff_fast.types import BackendConfig

T = TypeVar("T")


class Pool:
    """Connections to one server, each used by one thread at a time."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._deployment = Deployment(config.partitions, config.max_payload_bytes)
        self._pid = os.getpid()
        # Calls are refused, and then connections.
        self._closed = self._stopped = False
        # Single calls in C change both, so no lock is needed that an interrupt or a finaliser could leave locked.
        # The most recently used is at the right.
        self._idle: deque[Connection] = deque()
        # The latest time at which a connection fell silent. One that was heard of before may have died with it.
        self._silence = 0.0
        self._busy: dict[int, weakref.ref[Connection]] = {}
        # At most one thread; the first that puts itself here runs until the lock is released.
        self._sweepers: dict[str, threading.Thread] = {}
        self._sweep_no_more = threading.Lock()
        self._sweep_no_more.acquire()
        self._hub = self._make_hub()
        _process.watch_fork(self)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Close every connection; threads that wait for a reply get an error.

        What is written is stored first, and claims under way give back what they took, where that takes a short time.
        """
        self._closed = True
        if self._pid == os.getpid():
            self._stop()
        with contextlib.suppress(RuntimeError):
            self._sweep_no_more.release()
        self._close_idle()

    def _stop(self) -> None:
        """Wake the threads that wait on connections; only in the process that connected."""
        self._stopped = True
        for connection in [found() for found in list(self._busy.values())]:
            if connection is None:
                continue
            # The writers' and the readers' connections are among them.
            connection.abort()
        self._hub.stop()

    def _forked(self) -> None:
        """Reset the state in a forked child."""
        self._hub = self._make_hub()

    def _make_hub(self) -> Hub:
        timeout_s = _transport.request_timeout_s(self.config)
        return Hub(self._connect, self._discard, self._trusts, timeout_s, self.config.retry)

    def _connect(self, role: str = "calls") -> Connection:
        if not self._sweepers and (self._busy or self._idle):
            # Not where a connection is given back: a finaliser may do that amid the start of another thread.
            args = weakref.ref(self), self._sweepers, self._sweep_no_more
            thread = threading.Thread(target=_sweep, args=args, name="ff_fast idle", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
        connection = Connection(self.config)
        self._busy[id(connection)] = weakref.ref(connection)
        if self._stopped:
            # close() has already aborted the connections it knew, so it would never wake this thread.
            self._release(connection)
            raise _transport.closed_error()
        try:
            self._prepare(connection, role)
        except BaseException:
            self._discard(connection)
            raise
        return connection

    def _prepare(self, connection: Connection, role: str | None = None) -> None:
        """Load the library if it is missing, and check the deployment; its errors are those of connecting."""
        try:
            run_steps(self._deployment.prepare(role), connection.request)
        except FFError as error:
            failure = _transport.connect_error(error, self.config)
        else:
            connection.ready = True
            return
        raise failure

    def _discard(self, connection: Connection) -> None:
        connection.close()
        self._busy.pop(id(connection), None)
        self._note_silence(connection)

    def _note_silence(self, connection: Connection) -> None:
        if connection.silent_since is not None:
            self._silence = max(self._silence, connection.silent_since)

    def _trusts(self, connection: Connection) -> bool:
        """Whether *connection*, which owes nothing, was heard of since another one fell silent."""
        return connection.heard_at >= self._silence

    def _acquire(self) -> Connection:
        self._check()
        while True:
            try:
                connection = self._idle.pop()
            except IndexError:
                break
            if self._trusts(connection) and connection.reusable:
                self._busy[id(connection)] = weakref.ref(connection)
                return connection
            connection.close()
        return self._connect()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedClient
        if self._closed:
            raise _transport.closed_error()

    def _release(self, connection: Connection, most: int = _transport.MAX_IDLE) -> None:
        """Give a connection back; one that owes a reply, or finds *most* idle ones, is closed."""
        self._busy.pop(id(connection), None)
        if connection.silent_since is not None:
            self._note_silence(connection)
        if len(self._idle) < most and connection.reusable:
            self._idle.append(connection)
        else:
            connection.close()
        if self._closed:
            self._close_idle()

    def _close_idle(self, before: float = float("inf"), keep: int = 0) -> None:
        """Close the idle connections that were last heard of before a point in monotonic time, but for *keep* of them."""
        try:
            while len(self._idle) > keep and self._idle[0].heard_at < before:
                self._idle.popleft().close()
        except IndexError:
            # There is none left; another thread may have taken the one that was looked at.
            return

    def _run(self, call: Call[T], *, until: float = float("inf")) -> T:
        """Make a call; retry as the configuration and the call allow, but not after *until*, in monotonic time."""
        retries = Retries(self.config.retry, writes=call.writes)
        missing = False
        while True:
            try:
                if call.claim is not None:
                    with Claiming(self) as claiming:
                        if missing:
                            self._prepare(claiming.connection())
                        return run_steps(call.steps(), claiming.request, claiming.wait)
                connection = self._acquire()
                try:
                    if missing:
                        self._prepare(connection)
                    request: Callable[[Step], list[object]] = connection.request
                    if until != float("inf"):
                        longest = _transport.longest_try_s(until)
                        request = partial(connection.request, longest=longest)
                    return run_steps(call.steps(), request)
                finally:
                    self._release(connection)
            except FFError as error:
                pause = None if self._closed else retries.pause(error)
                if pause is None or time.monotonic() + pause >= until:
                    retries.settle(error)
                    raise
                missing = isinstance(error, FunctionMissing)
            time.sleep(pause)


def _sweep(
    found: weakref.ref[Pool], sweepers: dict[str, threading.Thread], no_more: threading.Lock
) -> None:
    """Close what has been idle for too long; the last connection of a pool stays for its next call."""
    me = threading.current_thread()
    if sweepers.setdefault("", me) is not me:
        return
    while not no_more.acquire(timeout=_transport.MAX_IDLE_S / 4):
        pool = found()
        if pool is None:
            return
        pool._close_idle(time.monotonic() - _transport.MAX_IDLE_S, keep=1)
        del pool
