"""Responses of a real uvicorn, over sockets: readers that come, hang up, do not read, and a server that goes."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import threading
import time

import pytest
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.routing import Route

import ff_fast
from ff_fast import web
from tests.waiting import wait_until
from tests.web.sites import WORKER, EventSource, text_of
from tests.web.sockets import Reader


def streams(**options):
    def routes(backend):
        async def stream(request):
            return web.StreamResponse(backend, request.path_params["eid"], request, **options)

        return [Route("/{eid:path}", stream)]

    return routes


def listening(site):
    """How many channels the readers of the site listen to."""

    async def count():
        return len(site.backend._hub._core.routes)

    return site.call(count())


def tasks(site):
    async def count():
        return len(asyncio.all_tasks())

    return site.call(count())


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as opened:
        yield opened


def producing(backend, lane):
    eid = backend.create_execution(lane=lane, payload=b"p")
    return eid, backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_what_a_worker_writes_is_read_while_it_writes(site, backend, lane, loop):
    here = site(streams(), loop=loop)
    eid, handle = producing(backend, lane)
    with backend.open_writer(handle) as writer, Reader(here, f"/{eid}") as reader:
        for i in range(5):
            writer.write(b"%d " % i)
            reader.read_until(lambda reader, i=i: len(text_of(reader.events).split()) > i)
        writer.flush()
        backend.complete(handle)
        assert text_of(reader.read_all().events) == "0 1 2 3 4 "
    assert reader.ended
    wait_until(lambda: listening(here) == 0)


def test_a_reader_that_hangs_up_and_comes_again_loses_nothing(site, backend, lane):
    here = site(streams(pace=0))
    eid, handle = producing(backend, lane)
    text = "".join(f"{i}€😀\n" for i in range(600))
    raw = text.encode()

    def produce():
        with backend.open_writer(handle) as writer:
            for at in range(0, len(raw), 5):
                writer.write(raw[at : at + 5])
                if at % 100 == 0:
                    time.sleep(0.001)
        backend.complete(handle)

    producer = threading.Thread(target=produce)
    producer.start()
    got, last_id, visits = [], "", 0
    while not any(each.event == "end" for each in got):
        visits += 1
        headers = [f"last-event-id: {last_id}"] if last_id else []
        with Reader(here, f"/{eid}", headers) as reader:
            reader.read_until(lambda reader, most=37 * visits: len(reader.raw) > 300 + most)
            source = EventSource(last_id)
            got += source.parse(reader.body)
            last_id = source.last_id
    producer.join()
    assert text_of(got) == text
    assert visits > 5
    wait_until(lambda: listening(here) == 0)


def test_two_hundred_readers_of_one_stream_get_the_same(site, backend, lane):
    here = site(streams(pace=0.02), backlog=512)
    eid, handle = producing(backend, lane)
    readers = [Reader(here, f"/{eid}") for _ in range(200)]
    for reader in readers:
        reader.read_until(lambda reader: reader.events)
    with backend.open_writer(handle) as writer:
        for i in range(300):
            writer.write(b"%d " % i)
    assert listening(here) <= 2
    backend.complete(handle)
    bodies = {
        tuple((each.id, each.data) for each in reader.read_all().events) for reader in readers
    }
    assert len(bodies) == 1
    assert text_of(readers[0].events) == "".join(f"{i} " for i in range(300))
    for reader in readers:
        reader.hang_up()
    wait_until(lambda: listening(here) == 0)


@pytest.mark.parametrize("claimed", [True, False])
def test_a_reader_that_hangs_up_leaves_nothing_behind(site, backend, lane, claimed):
    here = site(streams())
    eid = backend.create_execution(lane=lane, payload=b"p")
    if claimed:
        backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
    with Reader(here, f"/{eid}") as reader:
        reader.read_until(lambda reader: reader.events if claimed else b"\r\n\r\n" in reader.raw)
    wait_until(lambda: listening(here) == 0)
    before = tasks(here)
    readers = [Reader(here, f"/{eid}") for _ in range(20)]
    for reader in readers:
        reader.read_until(lambda reader: reader.events if claimed else b"\r\n\r\n" in reader.raw)
    assert tasks(here) > before
    for reader in readers:
        reader.hang_up()
    wait_until(
        lambda: (
            listening(here) == 0
            and tasks(here) <= before
            and not here.server.server_state.connections
        )
    )
    assert not open_responses(here)


def open_responses(site):
    from ff_fast.web.reading import _Watch

    async def count():
        return len(_Watch.of_loop(asyncio.get_running_loop())._open)

    return site.call(count())


class Plain(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)


@pytest.mark.parametrize(
    "middleware", [Middleware(Plain), Middleware(GZipMiddleware, minimum_size=1)]
)
def test_middleware_changes_nothing(site, backend, lane, middleware):
    here = site(streams(pace=0), middleware=[middleware])
    eid, handle = producing(backend, lane)
    gzip = ["accept-encoding: gzip"]
    with backend.open_writer(handle) as writer, Reader(here, f"/{eid}", gzip) as reader:
        writer.write(b"a")
        reader.read_until(lambda reader: text_of(reader.events) == "a")
    wait_until(lambda: not open_responses(here))
    with Reader(here, f"/{eid}", gzip) as reader:
        backend.complete(handle)
        assert reader.read_all().events[-1].event == "end"


class Nested(Plain):
    """Has read the body, and wraps what its application receives by."""

    async def dispatch(self, request, call_next):
        await request.body()
        return await call_next(request)


@pytest.mark.parametrize("middleware", [(), (Middleware(Nested), Middleware(Plain))])
def test_a_client_that_takes_nothing_is_closed(site, backend, lane, middleware):
    # Long enough to be seen open.
    here = site(streams(send_timeout=1.5, pace=0), middleware=middleware)
    eid, handle = producing(backend, lane)
    with backend.open_writer(handle) as writer:
        for _ in range(200):
            writer.write(b"x" * 60_000)
            writer.drain()
    with Reader(here, f"/{eid}", receive_buffer=4096) as slow:
        slow.read(100)
        wait_until(lambda: open_responses(here) == 1)
        wait_until(lambda: open_responses(here) == 0)
        wait_until(lambda: listening(here) == 0)
        # The connection as well, though its client never takes what was sent.
        wait_until(lambda: not here.server.server_state.connections)
        assert not slow.read_all().ended
    backend.complete(handle)
    with Reader(here, f"/{eid}") as reader:
        assert reader.read_all().events[-1].event == "end"


def test_a_silent_stream_sends_heartbeats(site, backend, lane):
    here = site(streams(heartbeat=0.05))
    eid, _ = producing(backend, lane)
    with Reader(here, f"/{eid}") as reader:
        reader.read_until(lambda reader: reader.body.count(b": keep-alive\n\n") >= 3)
        assert [each.event for each in reader.events] == ["attempt"]


def test_an_execution_that_nobody_has_claimed_is_answered_at_once(site, backend, lane):
    here = site(streams())
    eid = backend.create_execution(lane=lane, payload=b"p")
    with Reader(here, f"/{eid}") as reader:
        reader.read_until(lambda reader: b"\r\n\r\n" in reader.raw)
        assert reader.status == 200
        backend.cancel(eid)
        assert reader.read_all().events[-1].json["outcome"] == "cancelled"


def test_the_end_of_the_backend_ends_the_responses(site, backend, lane):
    here = site(streams())
    eid, _ = producing(backend, lane)
    with Reader(here, f"/{eid}") as reader:
        reader.read_until(lambda reader: reader.events)
        here.call(here.backend.close())
        reader.read_all()
        assert reader.ended
        assert reader.body.endswith(b"\n\n")


def test_responses_end_with_a_word_when_the_application_says_so(site, backend, lane):
    here = site(streams())
    eid, _ = producing(backend, lane)
    with Reader(here, f"/{eid}") as reader:
        reader.read_until(lambda reader: reader.events)

        async def end():
            web.end_responses()

        here.call(end())
        source = EventSource()
        source.parse(reader.read_all().body)
        assert reader.ended
        assert 200 <= source.retry <= 2_000
        assert "shutting down" in source.comments


APP = """
import contextlib, sys
from starlette.applications import Starlette
from starlette.routing import Route
from ff_fast import aio, web

@contextlib.asynccontextmanager
async def lifespan(app):
    async with aio.ValkeyBackend.connect(sys.argv[1]) as app.state.backend:
        yield

async def stream(request):
    return web.StreamResponse(request.app.state.backend, request.path_params["eid"], request)

app = Starlette(lifespan=lifespan, routes=[Route("/{eid:path}", stream)])

if __name__ == "__main__":
    import socket, uvicorn
    listening = socket.create_server(("127.0.0.1", 0))
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning", loop=sys.argv[2])).run([listening])
"""


class Elsewhere:
    def __init__(self, port):
        self.port = port


WRAPPED = APP.replace(
    "app = Starlette(",
    """from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware

class Plain(BaseHTTPMiddleware):
    async def dispatch(self, request, call_next):
        return await call_next(request)

app = Starlette(middleware=[Middleware(Plain)], """,
)


# Its handler ends when the lifespan does, which is behind the last response.
WITH_WORKER = APP.replace(
    """app.state.backend:
        yield""",
    """app.state.backend:
        import asyncio, uuid
        stop, begun, lane = asyncio.Event(), asyncio.Event(), uuid.uuid4().hex
        async def handler(task):
            begun.set()
            await stop.wait()
        backend = app.state.backend
        await backend.create_execution(lane=lane)
        worker = asyncio.create_task(backend.run_worker(handler, lane=lane, stop=stop))
        await begun.wait()
        yield
        stop.set()
        await worker""",
)


@contextlib.contextmanager
def elsewhere(server, tmp_path, loop, text=APP):
    """An application in a process of its own: where it listens, and the process."""
    program = tmp_path / "app.py"
    program.write_text(text)
    with subprocess.Popen(
        [sys.executable, program, server.url, loop],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield Elsewhere(int(process.stdout.readline())), process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "loop, app",
    [("asyncio", APP), ("uvloop", APP), ("asyncio", WITH_WORKER)],
    ids=["asyncio", "uvloop", "with a worker"],
)
def test_open_responses_do_not_hold_up_a_shutdown(server, backend, lane, tmp_path, loop, app):
    eid, _ = producing(backend, lane)
    with elsewhere(server, tmp_path, loop, app) as (here, process):
        readers = [Reader(here, f"/{eid}") for _ in range(10)]
        for reader in readers:
            reader.read_until(lambda reader: reader.events)
        process.send_signal(signal.SIGTERM)
        process.wait(10)
        assert process.returncode == -signal.SIGTERM
        for reader in readers:
            assert reader.read_all().ended
            assert b"retry: " in reader.body
            reader.hang_up()
        assert process.stderr.read() == ""


@pytest.mark.parametrize(
    "size, app", [(20, APP), (60_000, APP), (60_000, WRAPPED)], ids=["small", "large", "wrapped"]
)
def test_clients_that_take_nothing_do_not_hold_up_a_shutdown(
    server, backend, lane, tmp_path, size, app
):
    eid, handle = producing(backend, lane)
    with backend.open_writer(handle) as writer:
        for _ in range(20_000_000 // size // 50 if size < 100 else 200):
            writer.write(b"x" * size)
            writer.drain()
    with (
        elsewhere(server, tmp_path, "asyncio", app) as (here, process),
        Reader(here, f"/{eid}", receive_buffer=4096) as reader,
    ):
        reader.read(100)
        process.send_signal(signal.SIGTERM)
        process.wait(5)
