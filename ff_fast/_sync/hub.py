"""The threads that own the connections over which all readers of a backend hear of pushes: one a server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from ff_fast import _transport
from ff_fast._core import hub
from ff_fast._core.hub import (
    HELLO,
    ONCE,
    PING,
    Asked,
    HubCore,
    HubsCore,
    Listener,
    Part,
)
from ff_fast._core.steps import Retries
from ff_fast.errors import DeadlineExceeded, FFError, ProtocolError

if TYPE_CHECKING:
    from collections.abc import Callable

    from ff_fast._core.topology import Address
    from ff_fast._sync.connection import Connection
    from ff_fast._sync.nodes import Nodes
    from ff_fast.types import BackendRetry


class Bell:
    """Wakes the thread that waits for it."""

    def __init__(self) -> None:
        # A lock, not a Condition: an interrupt could leave a Condition locked for ever.
        self._lock = threading.Lock()
        self._lock.acquire()

    def __call__(self) -> None:
        with contextlib.suppress(RuntimeError):
            self._lock.release()

    def wait(self, seconds: float) -> None:
        """Wait until it rings, at once if it has rung since the last wait."""
        if seconds > 0:
            self._lock.acquire(timeout=min(seconds, threading.TIMEOUT_MAX))


class _Face:
    """What readers ask of one hub, or of those of a cluster. It becomes an order to the thread that has the core.

    Orders are single calls in C, so that no interrupt leaves half of one or a lock that is taken.
    """

    _core: HubCore | HubsCore

    def _order(self, order: Callable[[], None]) -> None:
        """Let the thread carry out *order*; begin the thread with the first one."""
        raise NotImplementedError

    @property
    def _begun(self) -> bool:
        """Whether the thread has begun, so that there may be something to detach."""
        raise NotImplementedError

    def listen(self, channel: bytes, listener: Listener) -> None:
        """Pass pushes of *channel* to *listener*, which hears first that the subscription is confirmed."""
        self._order(lambda: self._core.listen(channel, listener, time.monotonic()))

    def unlisten(self, channel: bytes, listener: Listener) -> None:
        """Pass nothing more to *listener*."""
        self._order(lambda: self._core.unlisten(channel, listener, time.monotonic()))

    def attach(self, part: Part) -> None:
        """Let *part* of a reader hear its channels."""
        self._order(lambda: self._core.attach(part, time.monotonic()))

    def detach(self, part: Part) -> None:
        """Let *part* go; does nothing if it is not attached."""
        if self._begun:
            self._order(lambda: self._core.detach(part, time.monotonic()))

    def confirmed(self, channel: bytes) -> bool:
        """Return whether the node has confirmed the subscription on the connection that is open."""
        return self._core.confirmed(channel)


class Hub(_Face):
    """All channels of a backend's readers at one server, on one connection. Its thread begins with the first channel."""

    _core: HubCore

    def __init__(
        self,
        connect: Callable[[str], Connection],
        discard: Callable[[Connection], None],
        trusts: Callable[[Connection], bool],
        timeout_s: float,
        retry: BackendRetry,
        *,
        by_slot: bool = False,
    ) -> None:
        self._connect = connect
        self._discard = discard
        self._trusts = trusts
        self._timeout_s = timeout_s
        self._retry = retry
        self._core = HubCore(by_slot=by_slot)
        # At most one thread; the first who puts it here has made it.
        self._threads: dict[str, _Thread] = {}
        self._orders: deque[Callable[[], None]] = deque()
        self._closing = False

    @property
    def _begun(self) -> bool:
        return bool(self._threads)

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        thread = self._threads.get("")
        if thread is None:
            thread = self._threads.setdefault("", _Thread(self))
        thread.wake()

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do with its server any more."""
        thread = self._threads.get("")
        unused = thread is None or thread._connection is None
        return unused and self._core.empty and not self._orders

    def stop(self) -> None:
        """End the thread; its connection was aborted before."""
        self._closing = True
        thread = self._threads.get("")
        if thread is not None:
            thread.end()


class _Thread:
    """The thread of a hub."""

    def __init__(self, owner: Hub) -> None:
        self._hub = owner
        self._core = owner._core
        self._retries = Retries(owner._retry, retry_timeouts=True)
        self._timeout_s = owner._timeout_s
        self._connection: Connection | None = None
        # Requests whose replies have not come; None stands for a PING.
        self._receivers: deque[Asked | None] = deque()
        self._owed_since = 0.0
        # When the server was last asked for its role.
        self._pinged_at = 0.0
        # Since when no channel needs the connection.
        self._idle_since: float | None = None
        self._woken, self._waking = socket.socketpair()
        self._woken.setblocking(False)
        self._waking.setblocking(False)
        self._ended = False
        # Threads that are about to wake this one; an interrupt may leave one here that is not.
        self._wakers: deque[None] = deque()
        # At most one; the first that puts itself here runs.
        self._runs: dict[str, threading.Thread] = {}

    def __del__(self) -> None:
        self._close()

    def _close(self) -> None:
        self._woken.close()
        self._waking.close()

    def wake(self) -> None:
        """Let the thread look for orders; begin it if it has not begun, or an interrupt struck before it did."""
        if not self._runs:
            # One for each that comes first at the same moment: a thread begins only once.
            thread = threading.Thread(target=self._main, name="ff_fast readers", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
        # Noted first: a socket that is closed while another thread sends may be another socket by then.
        self._wakers.append(None)
        try:
            if not self._ended:
                # A full buffer wakes it as well.
                with contextlib.suppress(OSError):
                    self._waking.send(b".")
        finally:
            self._wakers.pop()
            if self._ended and not self._wakers:
                self._close()

    def end(self) -> None:
        self.wake()
        thread = self._runs.get("")
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._ended = True
        if not self._wakers:
            self._close()

    # -- the thread ----------------------------------------------------------------------------------------------

    def _main(self) -> None:
        me = threading.current_thread()
        if self._runs.setdefault("", me) is not me:
            return
        error: FFError = _transport.closed_error()
        try:
            while not self._hub._closing:
                try:
                    self._round()
                except FFError as failure:
                    self._recover(failure)
        except BaseException:
            self._hub._closing = True
            raise
        finally:
            self._drop()
            self._take_orders()
            self._core.fail(error)

    def _take_orders(self) -> None:
        # There is nothing, or it is closed.
        with contextlib.suppress(OSError):
            while self._woken.recv(4096):
                pass
        while self._hub._orders:
            self._hub._orders.popleft()()

    def _round(self) -> None:
        """Take orders and send what they need; then wait for what comes, and pass it on."""
        self._take_orders()
        if self._hub._closing:
            # What told of it may have been taken with the orders.
            return
        now = time.monotonic()
        if self._connection is None:
            if self._core.waiting:
                self._open()
            else:
                self._pause(now + 3600.0)
            return
        if not self._hub._trusts(self._connection):
            raise DeadlineExceeded
        if (renewal := self._connection.renewal()) is not None:
            self._send(renewal, None, now)
        for asked in self._core.requests(now):
            self._send(PING if asked is None else asked.request, asked, now)
        self._look(now)
        connection = self._connection
        if connection is None:
            return
        timeout_s = min(hub.LINGER_S, self._timeout_s / 2)
        for reply in connection.listen(self._woken, now + timeout_s):
            if connection.is_push(reply):
                due = bool(self._receivers) and self._receivers[0] is not None
                if self._core.received(reply, due=due) is not None:
                    self._retries.reset()
                    self._receivers.popleft()
            else:
                self._take(reply)

    def _take(self, reply: object) -> None:
        if not self._receivers:
            raise ProtocolError
        if self._receivers[0] is None and self._core.late(reply):
            return
        asked = self._receivers.popleft()
        self._owed_since = time.monotonic()
        if asked is None:
            self._retries.reset()
            if (failure := self._core.heard(reply)) is not None:
                raise failure
            return
        failure = self._core.refused(reply) if isinstance(reply, Exception) else ProtocolError()
        if failure is not None:
            raise failure

    def _send(self, request: bytes, receiver: Asked | None, now: float) -> None:
        assert self._connection is not None
        if not self._receivers:
            self._owed_since = now
        self._receivers.append(receiver)
        self._connection.post(request)

    def _look(self, now: float) -> None:
        """Look for silence, and for a connection that nobody needs."""
        connection = self._connection
        assert connection is not None
        timeout_s = self._timeout_s
        if self._receivers:
            since = max(self._owed_since, connection.heard_at)
            if now - since >= timeout_s:
                connection.silent_since = since
                raise DeadlineExceeded
        if self._core.doubts_role or now - self._pinged_at >= timeout_s:
            self._core.doubts_role = False
            self._pinged_at = now
            self._send(PING, None, now)
        if self._core.listening:
            self._idle_since = None
        elif self._idle_since is None:
            self._idle_since = now
        elif now - self._idle_since >= _transport.MAX_IDLE_S:
            self._drop()
            self._core.lost()

    def _open(self) -> None:
        connection = self._hub._connect("readers")
        try:
            (reply,) = connection.request(HELLO)
            if (failure := self._core.opened(reply)) is not None:
                raise failure
        except BaseException:
            self._hub._discard(connection)
            raise
        self._connection = connection
        self._pinged_at = time.monotonic()
        self._idle_since = None

    def _recover(self, failure: FFError) -> None:
        """Give up the connection, and wait before the next one; fail the listeners when the retries are used up."""
        self._drop()
        self._core.lost()
        pause = None if self._hub._closing else self._retries.pause(failure)
        if pause is None:
            self._retries.reset()
            self._take_orders()
            self._core.fail(_transport.closed_error() if self._hub._closing else failure)
            return
        until = time.monotonic() + pause
        while not self._hub._closing and time.monotonic() < until:
            self._pause(until)
            self._take_orders()

    def _pause(self, until: float) -> None:
        """Wait until there are orders, or until a point in monotonic time."""
        self._woken.settimeout(max(until - time.monotonic(), 1e-3))
        try:
            self._woken.recv(4096)
        except TimeoutError:
            pass
        finally:
            self._woken.settimeout(0)

    def _drop(self) -> None:
        self._receivers.clear()
        connection, self._connection = self._connection, None
        if connection is not None:
            self._hub._discard(connection)


class Hubs(_Face):
    """The hubs of a cluster, one a node, behind the face of one. A thread gives them their channels."""

    _core: HubsCore

    def __init__(
        self,
        nodes: Nodes,
        connect: Callable[[str, Address], Connection],
        discard: Callable[[Connection], None],
        trusts: Callable[[Connection], bool],
        timeout_s: float,
        retry: BackendRetry,
    ) -> None:
        assert nodes.topology is not None
        self._nodes = nodes
        self._topology = nodes.topology
        self._connect = connect
        self._discard = discard
        self._trusts = trusts
        self._timeout_s = timeout_s
        self._bell = Bell()
        self._core = HubsCore(self._topology, retry, self._listen_at, self._unlisten_at, self._bell)
        # Of the thread.
        self._hubs: dict[Address, Hub] = {}
        self._orders: deque[Callable[[], None]] = deque()
        # At most one thread; the first that puts itself here runs.
        self._runs: dict[str, threading.Thread] = {}
        self._closing = False

    @property
    def _begun(self) -> bool:
        return bool(self._runs)

    def _order(self, order: Callable[[], None]) -> None:
        self._orders.append(order)
        if not self._runs:
            # One for each that comes first at the same moment: a thread begins only once.
            thread = threading.Thread(target=self._main, name="ff_fast channels", daemon=True)
            with contextlib.suppress(RuntimeError):
                thread.start()
        self._bell()

    def stop(self) -> None:
        """End the threads; their connections were aborted before."""
        self._closing = True
        self._bell()
        thread = self._runs.get("")
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    # -- the thread --------------------------------------------------------------------------------------------------

    def _main(self) -> None:
        me = threading.current_thread()
        if self._runs.setdefault("", me) is not me:
            return
        try:
            while not self._closing:
                self._round()
        finally:
            self._closing = True
            for each in self._hubs.values():
                each.stop()
            self._take_orders()
            self._core.fail(_transport.closed_error())

    def _take_orders(self) -> None:
        while self._orders:
            self._orders.popleft()()

    def _round(self) -> None:
        """Take orders, and let every channel be listened to where its slot is; then wait."""
        self._take_orders()
        now = time.monotonic()
        doubtful = self._core.doubtful(now)
        again_at = self._core.settle(now)
        if doubtful:
            self._nodes.doubt()
            # The channels that wait for it have retries of their own.
            with contextlib.suppress(FFError):
                self._nodes.refresh()
            again_at = self._core.settle(time.monotonic())
        idle = [address for address, each in self._hubs.items() if each.idle]
        for address in {*idle}.difference(self._topology.addresses if idle else ()):
            self._hubs.pop(address).stop()
        self._bell.wait(3600.0 if again_at is None else again_at - time.monotonic())

    def _at(self, address: Address) -> Hub:
        found = self._hubs.get(address)
        if found is None:
            found = self._hubs[address] = Hub(
                lambda role: self._connect(role, address),
                self._discard,
                self._trusts,
                self._timeout_s,
                ONCE,
                by_slot=True,
            )
        return found

    def _listen_at(self, address: Address, channel: bytes, listener: Listener) -> None:
        self._at(address).listen(channel, listener)

    def _unlisten_at(self, address: Address, channel: bytes, listener: Listener) -> None:
        self._at(address).unlisten(channel, listener)
