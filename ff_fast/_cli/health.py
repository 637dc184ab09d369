"""Health and metrics of a worker process over HTTP, on a thread of its own."""

from __future__ import annotations

import importlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from ff_fast import InvalidInput, MissingDependency

if TYPE_CHECKING:
    from collections.abc import Callable

_ANSWER_S = 5.0


class Endpoints:
    """What is served: ``/live``, ``/ready`` and ``/metrics``, each where it was set.

    Attributes:
        ready: Returns why the worker is not ready, as one word; empty if it is.
        metrics: Returns the content type and the metrics.
    """

    def __init__(self) -> None:
        self.ready: Callable[[], str] | None = None
        self.metrics: Callable[[], tuple[str, bytes]] | None = None

    def answer(self, path: str) -> tuple[int, str, bytes]:
        """Return status, content type and body."""
        text = "text/plain; charset=utf-8"
        if self.ready is not None and path == "/live":
            return 200, text, b"live\n"
        if self.ready is not None and path == "/ready":
            why = self.ready()
            return (503, text, f"{why}\n".encode()) if why else (200, text, b"ready\n")
        if self.metrics is not None and path == "/metrics":
            return 200, *self.metrics()
        return 404, text, b"Not here.\n"


def serve(endpoints: Endpoints, address: str, port: int) -> int:
    """Serve until the process ends; return the port, of which 0 takes a free one.

    Raises:
        InvalidInput: The port cannot be had.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = _ANSWER_S

        def do_GET(self) -> None:
            status, kind, body = endpoints.answer(self.path.partition("?")[0])
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Say nothing of requests that come every few seconds."""

    try:
        server = ThreadingHTTPServer((address, port), Handler)
    except (OSError, OverflowError) as error:
        raise InvalidInput(f"Port {port} of {address} cannot be had: {error}.") from None
    server.daemon_threads = True
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
