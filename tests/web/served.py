"""Applications of any framework, as their users serve them: an ASGI application under uvicorn, a WSGI one under wsgiref."""

import asyncio
import contextlib
import socket
import socketserver
import threading
import wsgiref.simple_server

import uvicorn

from ff_fast import web
from tests.waiting import wait_until


@contextlib.contextmanager
def asgi(app, lifespan="on"):
    """`with asgi(app) as url`: served by uvicorn, on a thread."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan=lifespan))
    loops = []

    async def serve():
        loops.append(asyncio.get_running_loop())
        await server.serve(sockets=[listening])

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        # On a thread uvicorn has no handler of signals, by which responses learn that it ends.
        loops[0].call_soon_threadsafe(web.end_responses)
        server.should_exit = True
        thread.join(10)
        assert not thread.is_alive()


class _Server(socketserver.ThreadingMixIn, wsgiref.simple_server.WSGIServer):
    pass


class _Handler(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


@contextlib.contextmanager
def wsgi(app):
    """`with wsgi(app) as url`: served by wsgiref, with a thread for each request."""
    made = wsgiref.simple_server.make_server(
        "127.0.0.1", 0, app, server_class=_Server, handler_class=_Handler
    )
    with made as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def celery(app):
    """`with celery(app)`: a worker on a thread. What the program has connected to Celery's signals is forgotten afterwards."""
    from celery import signals
    from celery.contrib.testing.worker import start_worker

    try:
        with start_worker(app, pool="solo", perform_ping_check=False, shutdown_timeout=20):
            yield
    finally:
        for signal in (signals.worker_process_init, signals.worker_process_shutdown):
            signal.receivers = []
