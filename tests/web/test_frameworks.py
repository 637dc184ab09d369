"""The iterators of bytes under what other frameworks do with them: plain ASGI and WSGI, FastAPI, and without Starlette."""

import asyncio
import gc
import threading
import wsgiref.simple_server

import pytest

import ff_fast
from ff_fast import ExecutionNotFound, InvalidCursor, InvalidId, InvalidInput, InvalidType, web
from tests.waiting import wait_until, wait_until_async
from tests.web.sites import EventSource, stream_of, text_of
from tests.web.sockets import Reader
from tests.web.test_sockets import Elsewhere, producing
from tests.web.test_stream_response import UNKNOWN

anyio = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as opened:
        yield opened


async def collected(chunks):
    return [chunk async for chunk in chunks]


@anyio
async def test_chunks_are_the_response(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a", b"b"])
        chunks = web.events(backend, eid)
        events = EventSource().parse(b"".join(await collected(chunks)))
        assert text_of(events) == "ab"
        assert chunks.finished
        rest = b"".join(await collected(web.events(backend, eid, after=events[1].id)))
        assert EventSource().parse(rest) == events[2:]
        assert not backend._hub._core.routes


@anyio
async def test_what_cannot_be_read_is_raised_before_the_first_chunk(backend_of):
    async with backend_of() as backend:
        with pytest.raises(InvalidId):
            web.events(backend, "nonsense")
        with pytest.raises(InvalidCursor):
            web.events(backend, UNKNOWN, after="nonsense")
        with pytest.raises(InvalidInput):
            web.events(backend, UNKNOWN, heartbeat=0)
        with pytest.raises(InvalidInput):
            web.events(backend, UNKNOWN, framing=web.EventFraming)
        chunks = web.events(backend, UNKNOWN)
        with pytest.raises(ExecutionNotFound):
            await chunks.open()
        with pytest.raises(ExecutionNotFound):
            await anext(web.events(backend, UNKNOWN))


@anyio
async def test_what_the_application_has_mixed_up_is_named(backend, backend_of, server, lane):
    async with backend_of() as other:
        for mixed in (backend, ff_fast.aio.ValkeyBackend.connect(server.url)):
            with pytest.raises(InvalidType, match=r"ff_fast\.aio\.ValkeyBackend; web\.iter_events"):
                web.events(mixed, UNKNOWN)
            with pytest.raises(InvalidType, match=r"ff_fast\.aio\.ValkeyBackend"):
                await web.stop_response(mixed, UNKNOWN)
        with pytest.raises(InvalidType, match=r"ff_fast\.ValkeyBackend; web\.events"):
            web.iter_events(other, UNKNOWN)
        with pytest.raises(InvalidType, match="subclass of Framing"):
            web.StreamResponse(other, UNKNOWN, framing=web.EventFraming())
        with pytest.raises(InvalidCursor):
            web.events(other, UNKNOWN, after=7)


@anyio
async def test_a_cancelled_wait_ends_the_chunks(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, end=False)
        chunks = web.events(backend, eid)
        await anext(chunks)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(anext(chunks), 0.01)
        assert not backend._hub._core.routes
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


@anyio
async def test_chunks_that_are_left_let_their_reader_go(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, end=False)
        chunks = web.events(backend, eid)
        await anext(chunks)
        assert backend._hub._core.routes
        await chunks.aclose()
        await chunks.aclose()

        async def gone():
            return not backend._hub._core.routes

        await wait_until_async(gone)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


@anyio
@pytest.mark.parametrize("how", ["dropped", "closed elsewhere"])
async def test_chunks_that_nobody_awaits_any_more_let_their_reader_go(backend_of, lane, how):
    async def gone():
        gc.collect()
        return not backend._hub._core.routes

    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, end=False)
        chunks = web.events(backend, eid)
        await anext(chunks)
        if how == "dropped":
            del chunks
        else:
            await asyncio.to_thread(chunks.close)
        await wait_until_async(gone)


@anyio
async def test_a_pace_gathers_frames_into_one_chunk(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await stream_of(backend, lane, end=False)
        chunks = web.events(backend, eid, pace=0.2)
        assert [each.event for each in EventSource().parse(await anext(chunks))] == ["attempt"]
        async with backend.open_writer(handle) as writer:
            for _ in range(20):
                writer.write(b"x")
                await writer.flush()
        assert text_of(EventSource().parse(await anext(chunks))) == "x" * 20
        await chunks.aclose()


@anyio
async def test_a_read_that_fails_ends_the_chunks_as_the_framing_says(backend_of, lane):
    class Told(web.EventFraming):
        def begin(self, cursor):
            return b": begins after %b\n\n" % repr(cursor).encode()

        def failed(self, error):
            return b": failed %b\n\n" % error.code.encode()

    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, end=False)
        chunks = web.events(backend, eid, framing=Told())
        assert (await anext(chunks)).startswith(b": begins after None\n\n")
        await backend.close()
        assert await collected(chunks) == [b": failed unavailable\n\n"]


def test_blocking_chunks_are_the_response(backend, lane):
    eid, handle = producing(backend, lane)
    with backend.open_writer(handle) as writer:
        writer.write(b"a\xe2\x82")
        writer.write(b"\xacb")
    backend.complete(handle)
    chunks = web.iter_events(backend, eid)
    events = EventSource().parse(b"".join(chunks))
    assert text_of(events) == "a€b"
    assert chunks.finished
    assert (
        EventSource().parse(b"".join(web.iter_events(backend, eid, after=events[1].id)))
        == events[2:]
    )
    with pytest.raises(ExecutionNotFound):
        web.iter_events(backend, UNKNOWN).open()
    with pytest.raises(InvalidCursor):
        web.iter_events(backend, eid, after="nonsense")


def test_blocking_chunks_begin_at_once_where_there_is_nothing_to_be_read(backend, lane):
    # A server of WSGI sends no head before the first chunk, and a client waits for it.
    eid = backend.create_execution(lane=lane, payload=b"p")
    chunks = web.iter_events(backend, eid, heartbeat=3600)
    assert next(chunks) == b": keep-alive\n\n"
    chunks.close()
    eid, _ = producing(backend, lane)
    chunks = web.iter_events(backend, eid, after="0.0-0", heartbeat=3600)
    assert next(chunks) == b": keep-alive\n\n"
    chunks.close()


def test_blocking_chunks_say_that_the_client_has_got_the_end(backend, lane):
    eid, handle = producing(backend, lane)
    backend.complete(handle)
    start, end = EventSource().parse(b"".join(web.iter_events(backend, eid)))
    for after, nothing in ((None, False), (start.id, False), (end.id, True)):
        chunks = web.iter_events(backend, eid, after=after)
        assert not chunks.has_nothing_new
        chunks.open()
        assert chunks.has_nothing_new is nothing
        chunks.close()


class Silent(web.EventFraming):
    """Leaves out every frame."""

    begun: tuple = ()

    def begin(self, cursor):
        self.begun = (*self.begun, cursor)
        return b": begin\n\n"

    def items(self, items):
        return b""


@anyio
@pytest.mark.parametrize("after", [None, "", "-1", "start", "0.0-0"])
async def test_a_client_hears_that_the_connection_lives_where_it_gets_nothing_of_what_comes(
    backend_of, lane, after
):
    framing = Silent()
    async with backend_of() as backend:
        eid, handle = await stream_of(backend, lane, end=False)
        chunks = web.events(backend, eid, after=after, framing=framing, heartbeat=0.05, pace=0)
        assert await anext(chunks) == b": begin\n\n"
        assert framing.begun == (after if after == "0.0-0" else None,)

        async def write():
            async with backend.open_writer(handle) as writer:
                while True:
                    writer.write(b"x")
                    await asyncio.sleep(0.005)

        writing = asyncio.create_task(write())
        for _ in range(3):
            assert await anext(chunks) == b": keep-alive\n\n"
        writing.cancel()
        await asyncio.wait({writing})
        await backend.complete(handle)
        assert b"".join(await collected(chunks)).replace(b": keep-alive\n\n", b"") == b""


def test_blocking_chunks_hear_it_as_well(backend, lane):
    eid, handle = producing(backend, lane)
    chunks = web.iter_events(backend, eid, framing=Silent(), heartbeat=0.05)
    assert next(chunks) == b": begin\n\n"
    stop = threading.Event()

    def write():
        with backend.open_writer(handle) as writer:
            while not stop.wait(0.005):
                writer.write(b"x")

    writing = threading.Thread(target=write)
    writing.start()
    assert [next(chunks) for _ in range(3)] == [b": keep-alive\n\n"] * 3
    stop.set()
    writing.join()
    chunks.close()
    unopened = web.iter_events(backend, eid)
    unopened.close()
    assert list(unopened) == []


def test_blocking_chunks_that_are_closed_let_their_reader_go(backend, lane):
    eid, _ = producing(backend, lane)
    chunks = web.iter_events(backend, eid, heartbeat=0.01)
    assert [each.event for each in EventSource().parse(next(chunks))] == ["attempt"]
    assert next(chunks) == b": keep-alive\n\n"
    chunks.close()
    assert list(chunks) == []
    wait_until(lambda: not backend._hub._core.routes)


# -- as a framework uses them -------------------------------------------------------------------------------------------


def wsgi(backend):
    """What Flask and Django without ASGI do with an iterator."""

    def app(environ, start_response):
        eid = environ["PATH_INFO"][1:]
        try:
            chunks = web.iter_events(
                backend, eid, after=environ.get("HTTP_LAST_EVENT_ID"), heartbeat=0.05
            )
            chunks.open()
        except (InvalidId, ExecutionNotFound):
            start_response("404 Not Found", [("content-type", "text/plain")])
            return [b"no such stream"]
        start_response(
            "200 OK", [("content-type", "text/event-stream"), *chunks.framing.headers.items()]
        )
        return chunks

    return app


class Quiet(wsgiref.simple_server.WSGIRequestHandler):
    def log_message(self, *_):
        pass


def test_a_server_of_wsgi_streams_and_closes_what_its_client_has_left(backend, lane):
    eid, handle = producing(backend, lane)
    with wsgiref.simple_server.make_server(
        "127.0.0.1", 0, wsgi(backend), handler_class=Quiet
    ) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            here = Elsewhere(server.server_port)
            with backend.open_writer(handle) as writer:
                writer.write(b"text")
            with Reader(here, f"/{eid}") as reader:
                reader.read_until(lambda reader: b"data: text" in reader.raw)
            wait_until(lambda: not backend._hub._core.routes)
            with Reader(here, f"/{UNKNOWN}") as reader:
                while reader.read():
                    pass
                assert reader.status == 404
            backend.complete(handle)
            with Reader(here, f"/{eid}") as reader:
                while reader.read():
                    pass
                body = reader.raw.partition(b"\r\n\r\n")[2]
                assert text_of(EventSource().parse(body)) == "text"
        finally:
            server.shutdown()
            thread.join()


@anyio
async def test_a_plain_application_of_asgi_streams(backend_of, lane):
    """What Django's and Litestar's responses do with an asynchronous iterator: a task sends, and is cancelled at last."""
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"text"], end=False)
        sent = asyncio.Queue()

        async def app(scope, receive, send):
            chunks = web.events(backend, scope["path"][1:], heartbeat=0.05)
            await chunks.open()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            try:
                async for chunk in chunks:
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            finally:
                await chunks.aclose()

        serving = asyncio.create_task(app({"path": f"/{eid}"}, None, sent.put))
        assert (await sent.get())["status"] == 200
        for expected in (b"event: attempt", b"data: text", b": keep-alive\n\n"):
            body = b""
            while expected not in body:
                body += (await sent.get())["body"]
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving

        async def gone():
            return not backend._hub._core.routes

        await wait_until_async(gone)


def test_without_starlette_the_iterators_work_and_the_responses_say_what_is_missing(run_python):
    program = """
import sys
sys.modules["starlette"] = sys.modules["starlette.requests"] = None
from ff_fast import MissingDependency, web
print(web.events.__name__, web.EventFraming().media_type)
try:
    web.StreamResponse
except MissingDependency as error:
    print(error)
"""
    assert run_python(program).splitlines() == [
        "events text/event-stream",
        "ff_fast.web needs Starlette for its responses; run: pip install 'ff_fast[web]'",
    ]


def test_importing_the_web_loads_no_framework(run_python):
    program = "import sys, ff_fast.web; print(*sorted(sys.modules.keys() & {'starlette', 'anyio', 'redis'}))"
    assert run_python(program).split() == []


def test_every_name_is_there():
    for name in web.__all__:
        assert getattr(web, name)
    assert set(web.__all__) <= set(dir(web))
    with pytest.raises(AttributeError):
        _ = web.Nothing


def test_a_response_does_not_take_another_framing():
    with pytest.raises(InvalidInput, match="framing"):
        web.StreamResponse(None, "", framing=object)
