"""Health and metrics of a worker process over HTTP, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import io
import logging
import socket
import sys
import threading
import time
import traceback
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import TYPE_CHECKING, Any

from ff_fast import InvalidInput, MissingDependency
from ff_fast._log import say, say_seldom

if TYPE_CHECKING:
    from collections.abc import Callable

_ANSWER_S = 5.0
_AT_ONCE = 32
_TEXT = "text/plain; charset=utf-8"


STANDSTILL_S = 30.0
"""How long an event loop may stand still before its process counts as dead, in seconds: a default lease, which lapses."""


class Pulse:
    """Sees from another thread whether the running event loop goes round.

    Args:
        every_s: Seconds between two looks.

    Attributes:
        stuck: Whether it has stood still for :data:`STANDSTILL_S`.
    """

    def __init__(self, every_s: float) -> None:
        self.stuck = False
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._most = STANDSTILL_S / every_s
        self._answered = True
        # Looks, not time: where the whole process was stopped, the loop has missed nothing.
        self._looks = 0

    def look(self) -> None:
        """Look, on a thread of its own."""
        if self._answered:
            self._answered, self._looks, self.stuck = False, 0, False
            # A loop that is closed has ended, and does not stand still.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._answer)
            return
        self._looks += 1
        if self._looks >= self._most and not self.stuck and not self._loop.is_closed():
            frame = sys._current_frames().get(self._thread)  # noqa: SLF001 - the documented way
            say(
                logging.ERROR,
                "The event loop has stood still for %g s, so leases lapse. Call what blocks with asyncio.to_thread. It is"
                " here:\n%s",
                STANDSTILL_S,
                "".join(traceback.format_stack(frame)).rstrip(),
            )
            # Behind the record: whoever is told may end the process at once.
            self.stuck = True

    def _answer(self) -> None:
        self._answered = True


class Endpoints:
    """What is served: ``/live``, ``/ready`` and ``/metrics``, each where it was set.

    Attributes:
        live: Returns why the process is to be ended, as one word; empty if it is alive.
        ready: Returns why the worker is not ready, as one word; empty if it is.
        metrics: Returns the content type and the metrics.
    """

    def __init__(self) -> None:
        self.live: Callable[[], str] | None = None
        self.ready: Callable[[], str] | None = None
        self.metrics: Callable[[], tuple[str, bytes]] | None = None

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body."""
        for name, why_not in (("live", self.live), ("ready", self.ready)):
            if path == f"/{name}" and why_not is not None:
                why = why_not()
                return 503 if why else 200, _TEXT, f"{why or name}\n".encode()
        if self.metrics is not None and path == "/metrics":
            return 200, *self.metrics()
        return 404, _TEXT, b"Not here.\n"


class _Until(io.RawIOBase):
    """Reads a socket until a moment, however slowly the other side writes."""

    def __init__(self, connection: socket.socket, until: float) -> None:
        self._connection = connection
        self._until = until

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:  # noqa: ANN401 - a writable buffer
        self._connection.settimeout(max(self._until - time.monotonic(), 0.001))
        return self._connection.recv_into(buffer)


class _Server(ThreadingHTTPServer):
    """Answers a bounded number of clients at once; the others wait until one of those has its answer, or is late."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._free = threading.Semaphore(_AT_ONCE)
        super().__init__((address, port), handler)

    def server_bind(self) -> None:
        if self.address_family == socket.AF_INET6:
            # "::" stands for all addresses, of both kinds.
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        # Without the look-up of the machine's name in HTTPServer.
        TCPServer.server_bind(self)
        self.server_port = self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        self._free.acquire()
        try:
            super().process_request(request, client_address)
        except BaseException:
            self._free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:  # noqa: ANN401
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401, ARG002
        error = sys.exception()
        # A client that goes is none of ours.
        if not isinstance(error, OSError):
            say_seldom(logging.ERROR, "health", "", "A request was not answered.", raised=error)


def serve(endpoints: Endpoints, address: str, port: int) -> int:
    """Serve until the process ends; return the port, of which 0 takes a free one.

    Raises:
        InvalidInput: The port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _ANSWER_S

        def version_string(self) -> str:
            return "ff_fast"

        def setup(self) -> None:
            super().setup()
            until = time.monotonic() + _ANSWER_S
            self.rfile = io.BufferedReader(_Until(self.connection, until))

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            try:
                status, kind, body = endpoints.answer(path)
            except Exception as error:  # noqa: BLE001 - a collector's
                say_seldom(logging.ERROR, "health", path, "%s has failed.", path, raised=error)
                status, kind, body = 500, _TEXT, b"See the log.\n"
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.connection.settimeout(_ANSWER_S)
                self.wfile.write(body)

        do_HEAD = do_GET  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing of requests that come every few seconds."""

    try:
        server = _Server(address, port, Handler)
    except (OSError, OverflowError) as error:
        raise InvalidInput(f"Port {port} of {address} cannot be had: {error}.") from None
    threading.Thread(target=server.serve_forever, name="ff-fast health", daemon=True).start()
    return server.server_port


def prometheus(backend: object) -> Callable[[], tuple[str, bytes]]:
    """Return what gives the metrics of a backend in the format of Prometheus.

    Raises:
        MissingDependency: The extra ``metrics`` is not installed.
    """
    check_metrics()
    client: Any = importlib.import_module("prometheus_client")
    collectors: Any = importlib.import_module("ff_fast.metrics")
    registry = client.CollectorRegistry()
    registry.register(collectors.PrometheusCollector(backend))
    return lambda: (client.CONTENT_TYPE_LATEST, client.generate_latest(registry))


def check_metrics() -> None:
    """Check that metrics can be given.

    Raises:
        MissingDependency: The extra ``metrics`` is not installed.
    """
    try:
        for name in ("prometheus_client", "ff_fast.metrics"):
            importlib.import_module(name)
    except ImportError:
        raise MissingDependency(
            "--metrics-port needs prometheus-client: pip install 'ff_fast[metrics]'."
        ) from None
