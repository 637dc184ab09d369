"""A proxy between a client and a server that holds, delays, splits and cuts what passes.

One thread a connection, which alone reads and closes its two sockets, so a reset is sent at once. Nothing here waits
for a time: a switch takes effect with the next byte, and :meth:`ChaosProxy.waiting` says what a held side has ready.
"""

import array
import contextlib
import fcntl
import select
import socket
import struct
import termios
import threading
import time
import urllib.parse

UP, DOWN = "up", "down"
"""Requests; replies."""


def connect_to(url):
    """A socket to the server at *url*."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme == "unix":
        connection = socket.socket(socket.AF_UNIX)
        try:
            connection.connect(urllib.parse.unquote(parts.path))
        except OSError:
            connection.close()
            raise
    else:
        connection = socket.create_connection((parts.hostname, parts.port))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


class ChaosProxy:
    """Listens on a free port of the loopback interface, and passes what comes to *target* until told otherwise.

    Attributes:
        pushes_held: Nothing comes down over connections that have subscribed to channels; `release` ends that.
        cut_before: Bytes of a request; the connection is cut, once, before it passes them on.
        rewrite: A function that changes what the server sends next; it is called once.
        chunk: Most bytes that are passed at once.
        delay: Seconds before each piece.
        accepted: How many connections there have been.
        cuts: How many of them were cut here.
        swallowed: How many bytes were lost in silence.
        passed: Bytes of replies that were passed.
    """

    def __init__(self, target, wrap=None):
        self._target = target
        self._wrap = wrap
        self._lock = threading.RLock()
        self._held = {UP: False, DOWN: False}
        self._plan = iter(())
        self._cut = None
        self._pairs = set()
        self.pushes_held = False
        self.cut_before = None
        self.rewrite = None
        self.chunk = 1 << 16
        self.delay = 0.0
        self.accepted = 0
        self.cuts = 0
        self.swallowed = 0
        self.passed = 0
        self._port = 0
        self._listener = None
        self.listen()

    @property
    def address(self):
        return "127.0.0.1", self._port

    @property
    def url(self):
        return f"valkey://127.0.0.1:{self._port}"

    # -- switches --------------------------------------------------------------------------------

    def hold(self, *directions):
        """Pass nothing in these directions; what the kernel takes waits there."""
        for direction in directions:
            self._held[direction] = True
        self._wake()

    def release(self):
        self.pushes_held = False
        self._held = {UP: False, DOWN: False}
        self._wake()

    def waiting(self, direction):
        """Bytes that are ready on the held side, over all connections."""
        with self._lock:
            return sum(pair.ready(direction) for pair in self._pairs)

    def cut_after(self, direction, size, how="rst"):
        """Pass *size* more bytes in that direction, then cut the connection on which they went."""
        self.cut_by([(direction, size, how)])

    def cut_by(self, plan):
        """Cut by an iterable of (direction, bytes, ``rst`` or ``fin``), one after the other."""
        with self._lock:
            self._plan = iter(plan)
            self._next_cut()

    def _next_cut(self):
        planned = next(self._plan, None)
        self._cut = list(planned) if planned else None

    def spend(self, direction, size):
        """How much of *size* bytes may pass, and how the connection is cut after it."""
        with self._lock:
            if self._cut is None or self._cut[0] != direction:
                return size, None
            if size < self._cut[1]:
                self._cut[1] -= size
                return size, None
            allowed, how = self._cut[1], self._cut[2]
            self._next_cut()
            return allowed, how

    def swallow(self):
        """Lose everything that the present connections send, both ways, without ever ending them; new ones work."""
        with self._lock:
            for pair in self._pairs:
                pair.deaf = True

    def lead_to(self, target):
        """Pass new connections to *target*, and cut those to the old one."""
        self._target = target
        self.cut_all()

    def cut_all(self, how="rst"):
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.condemned = how
            pair.wake()

    def refuse(self):
        """Accept nothing: the port is closed until :meth:`listen`."""
        listener, self._listener = self._listener, None
        if listener is not None:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            self._thread.join()
            listener.close()

    def listen(self):
        listener = socket.socket()
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", self._port))
        listener.listen(128)
        self._port = listener.getsockname()[1]
        self._listener = listener
        self._thread = threading.Thread(target=self._accept, args=(listener,), name="chaos accept")
        self._thread.start()

    # -- its life --------------------------------------------------------------------------------

    def _accept(self, listener):
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self.accepted += 1
                pair = _Pair(self, client, self._target, self._wrap)
                self._pairs.add(pair)
            pair.start()

    def held(self, direction):
        return self._held[direction]

    def forget(self, pair):
        with self._lock:
            self._pairs.discard(pair)

    @property
    def connections(self):
        return len(self._pairs)

    def _wake(self):
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.wake()

    def close(self):
        self.refuse()
        self.cut_all()
        with self._lock:
            pairs = list(self._pairs)
        for pair in pairs:
            pair.join()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def _readable(sources, *, wait):
    """The sockets that have something to read. `select` refuses descriptors from 1,024 on."""
    poll = select.poll()
    for source in sources:
        poll.register(source, select.POLLIN)
    ready = {descriptor for descriptor, _ in poll.poll(None if wait else 0)}
    return [source for source in sources if source.fileno() in ready]


class _Pair(threading.Thread):
    """One connection and its twin on the other side."""

    def __init__(self, proxy, client, target, wrap):
        super().__init__(name="chaos pair", daemon=True)
        self._proxy = proxy
        self._client = client
        self._target = target
        self._wrap = wrap
        self._server = None
        self._waker, self._woken = socket.socketpair()
        self.condemned = None
        self.deaf = False
        self._subscribes = False

    def _holds(self, direction):
        pushes = direction == DOWN and self._subscribes and self._proxy.pushes_held
        return pushes or self._proxy.held(direction)

    def wake(self):
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def ready(self, direction):
        source = self._client if direction == UP else self._server
        if source is None or source.fileno() < 0:
            return 0
        count = array.array("i", [0])
        fcntl.ioctl(source, termios.FIONREAD, count)
        return count[0]

    def run(self):
        try:
            if self._wrap is not None:
                self._client = self._wrap(self._client)
            self._server = connect_to(self._target)
            self._pump()
        except OSError:
            pass
        finally:
            for each in (self._client, self._server, self._waker, self._woken):
                if each is not None:
                    each.close()
            self._proxy.forget(self)

    def _pump(self):
        routes = {UP: (self._client, self._server), DOWN: (self._server, self._client)}
        while True:
            sources = {
                source: direction
                for direction, (source, _) in routes.items()
                if not self._holds(direction)
            }
            pending = [s for s in sources if hasattr(s, "pending") and s.pending()]
            ready = _readable([*sources, self._woken], wait=not pending)
            if self._woken in ready:
                self._woken.recv(4096)
            if self.condemned:
                self._end(self.condemned)
                return
            for source in {*ready, *pending} - {self._woken}:
                direction = sources[source]
                if self._holds(direction):
                    continue
                data = source.recv(self._proxy.chunk)
                if not data:
                    return
                if direction == UP and b"SSUBSCRIBE" in data and not self._subscribes:
                    self._subscribes = True
                    # What is held is the server's to keep, and not the kernel's.
                    self._server.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 14)
                if self.deaf:
                    self._proxy.swallowed += len(data)
                    continue
                if self._proxy.delay:
                    time.sleep(self._proxy.delay)
                mark = self._proxy.cut_before
                if mark is not None and direction == UP and mark in data:
                    self._proxy.cut_before = None
                    self._end("rst")
                    return
                if direction == DOWN:
                    change, self._proxy.rewrite = self._proxy.rewrite, None
                    data = change(data) if change else data
                allowed, how = self._proxy.spend(direction, len(data))
                self._pass(routes[direction][1], data[:allowed])
                if direction == DOWN:
                    self._proxy.passed += allowed
                if how is not None:
                    self._end(how)
                    return

    def _pass(self, to, data):
        to.settimeout(0.05)
        while data and not self.condemned:
            with contextlib.suppress(TimeoutError):
                data = data[to.send(data) :]
        to.settimeout(None)

    def _end(self, how):
        self._proxy.cuts += 1
        if how == "rst":
            for each in (self._client, self._server):
                with contextlib.suppress(OSError):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
