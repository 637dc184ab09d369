"""The connections of one backend: who has which, what runs on them and is tried again, and their end."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from ff_fast import _transport
from ff_fast._core import ops
from ff_fast._core.steps import Flow, Retries, Source
from ff_fast._sync.connection import Channel
from ff_fast.errors import FFError, ForkedClient

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ff_fast._core import operations as _arguments
    from ff_fast.types import BackendConfig

T = TypeVar("T")


class Connections:
    """Connections to one server, each used by one thread at a time."""

    def __init__(self, config: BackendConfig) -> None:
        self.config = config
        self._pid = os.getpid()
        self._closed = False
        self._idle: deque[Channel] = deque()
        self._busy: set[Channel] = set()
        self._lock = threading.Lock()
        _transport.watch_fork(self)

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return self._closed

    def close(self) -> None:
        """Close every connection; what other threads wait for there ends with an error."""
        self._closed = True
        if self._pid == os.getpid():
            self._stop()
        self._close_idle()

    def _stop(self) -> None:
        """End what goes on, in the process that began it."""
        with self._lock:
            busy = list(self._busy)
        for channel in busy:
            # Among them the writers': their thread is waiting for replies, or for nothing.
            channel.abort()

    def _forked(self) -> None:
        """Called in a forked child."""
        self._lock = threading.Lock()

    def _connect(self) -> Channel:
        channel = Channel(self.config)
        with self._lock:
            self._busy.add(channel)
        if self._closed:
            # Nobody would wake this thread any more.
            self._release(channel)
            raise _transport.closed_error()
        failure: FFError
        try:
            channel.run(_transport.ensure_library())
        except FFError as error:
            failure = _transport.connect_error(error, self.config)
        except BaseException:
            self._discard(channel)
            raise
        else:
            return channel
        self._discard(channel)
        raise failure

    def _discard(self, channel: Channel) -> None:
        channel.close()
        with self._lock:
            self._busy.discard(channel)

    def _acquire(self) -> Channel:
        self._check()
        while True:
            try:
                channel = self._idle.pop()
            except IndexError:
                break
            if channel.reusable:
                with self._lock:
                    self._busy.add(channel)
                return channel
            channel.close()
        return self._connect()

    def _check(self) -> None:
        if self._pid != os.getpid():
            raise ForkedClient
        if self._closed:
            raise _transport.closed_error()

    def _release(self, channel: Channel) -> None:
        with self._lock:
            self._busy.discard(channel)
        if channel.reusable:
            self._idle.append(channel)
        else:
            channel.close()
        if self._closed:
            self._close_idle()

    def _close_idle(self) -> None:
        while True:
            try:
                self._idle.pop().close()
            except IndexError:
                return

    def _run(
        self,
        make: Callable[[], Flow[T]],
        *,
        repeatable: bool = True,
        until: float = float("inf"),
    ) -> T:
        """Run an operation, again where it may be repeated, until the retries of the configuration are used up.

        Or until a point in monotonic time, after which it is not sent again.
        """
        retries = Retries(self.config.retry, repeatable=repeatable)
        while True:
            try:
                channel = self._acquire()
                try:
                    return channel.run(_transport.with_library(make))
                finally:
                    self._release(channel)
            except FFError as error:
                pause = None if self._closed else retries.pause(error)
                if pause is None or time.monotonic() + pause >= until:
                    raise
            time.sleep(pause)

    def _do(self, call: _arguments.Call[T]) -> T:
        return self._run(call.flow, repeatable=call.repeatable)

    def _call(self, op: ops.Op[T]) -> T:
        return self._run(lambda: ops.call(op), repeatable=op.repeatable)

    def _follow(self, core: Source, read: Callable[[], Flow[list[T]]]) -> Iterator[T]:
        """Yield what *core* reads, on a connection of its own, until it has ended."""
        channel: Channel | None = None
        retries = Retries(self.config.retry, patient=True)
        try:
            while not core.ended:
                try:
                    if channel is None:
                        channel = self._acquire()
                    items = channel.run(_transport.with_library(read))
                except FFError as error:
                    pause = retries.pause(error)
                    if pause is None or self._closed:
                        raise
                    if channel is not None:
                        self._discard(channel)
                        channel = None
                else:
                    retries.reset()
                    yield from items
                    continue
                core.restart()
                time.sleep(pause)
        finally:
            if channel is not None:
                self._release(channel)
