"""A client of HTTP on a plain socket, which reads when it is told to, and can hang up at any byte."""

import socket
import time

from tests.web.sites import EventSource


class Reader:
    def __init__(self, site, path, headers=(), *, receive_buffer=None):
        self._socket = socket.socket()
        if receive_buffer is not None:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self._socket.settimeout(10)
        self._socket.connect(("127.0.0.1", site.port))
        lines = [f"GET {path} HTTP/1.1", "host: test", *headers]
        self._socket.sendall("".join(line + "\r\n" for line in lines).encode() + b"\r\n")
        self.raw = b""
        self.closed = False

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.hang_up()

    def hang_up(self):
        self._socket.close()

    def read(self, size=1 << 16):
        """Read what there is; return whether the server has not closed the connection."""
        try:
            got = self._socket.recv(size)
        except ConnectionResetError:
            got = b""
        self.raw += got
        self.closed = not got
        return bool(got)

    def read_until(self, condition):
        """Read until ``condition(self)`` holds, or the response has ended."""
        end = time.monotonic() + 10
        while not condition(self) and not self.ended:
            assert time.monotonic() < end
            if not self.read():
                break
        return self

    def read_all(self):
        return self.read_until(lambda _: False)

    @property
    def status(self):
        return int(self.raw.split(b" ", 2)[1])

    @property
    def body(self):
        _, _, rest = self.raw.partition(b"\r\n\r\n")
        chunks = []
        at = 0
        while (end := rest.find(b"\r\n", at)) > 0:
            size = int(rest[at:end], 16)
            chunks.append(rest[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
        return b"".join(chunks)

    @property
    def ended(self):
        """Whether the response is complete. No event ends as its last chunk does."""
        return self.raw.endswith(b"0\r\n\r\n")

    @property
    def events(self):
        return EventSource().parse(self.body)
