import httpx
import pytest
from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.routing import Route

from ff_fast import BackendConfig, BackendRetry, aio, keys, web
from ff_fast.embedded import EmbeddedServer
from tests.web.sites import EventSource, stream_of, text_of

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def client_of(backend, **options):
    async def stream(request):
        return web.StreamResponse(backend, request.path_params["eid"], request, **options)

    app = Starlette(routes=[Route("/{eid:path}", stream, methods=["GET", "HEAD"])])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_a_stream_that_has_ended_is_one_response(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"Hello", b", ", b"world"])
        async with client_of(backend) as client:
            answer = await client.get(f"/{eid}")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    events = EventSource().parse(answer.content)
    assert text_of(events) == "Hello, world"
    assert [each.event for each in events] == ["attempt", *["message"] * 3, "end"]
    assert events[-1].json == {"reason": "attempt_success", "outcome": "success", "error": None}


async def test_a_client_goes_on_behind_the_id_it_names(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a", b"b", b"c"])
        async with client_of(backend) as client:
            events = EventSource().parse((await client.get(f"/{eid}")).content)
            for index, each in enumerate(events[:-1]):
                rest = await client.get(f"/{eid}", headers={"last-event-id": each.id})
                assert [*events[: index + 1], *EventSource().parse(rest.content)] == events
                rest = await client.get(f"/{eid}", params={"after": each.id})
                assert EventSource().parse(rest.content)[-1] == events[-1]


@pytest.mark.parametrize("after", ["", "-1", "start"])
async def test_names_of_the_beginning(backend_of, lane, after):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a", b"b"])
        async with client_of(backend) as client:
            answer = await client.get(f"/{eid}", headers={"last-event-id": after})
    assert text_of(EventSource().parse(answer.content)) == "ab"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_client_that_has_the_end_is_told_that_nothing_follows(backend_of, lane, method):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a"])
        async with client_of(backend) as client:
            last = EventSource().parse((await client.get(f"/{eid}")).content)[-1]
            again = await client.request(method, f"/{eid}", headers={"last-event-id": last.id})
    assert (again.status_code, again.content) == (204, b"")


async def test_the_id_of_a_url_is_one(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a"])
        async with client_of(backend) as client:
            answer = await client.get(f"/{keys.url_id(eid)}")
    assert text_of(EventSource().parse(answer.content)) == "a"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_server_that_cannot_be_reached_is_503(method):
    with EmbeddedServer() as server:
        config = BackendConfig.from_url(server.url).replace(retry=BackendRetry(number_of_retries=0))
        backend = await aio.ValkeyBackend.connect(config)
    async with backend, client_of(backend) as client:
        answer = await client.request(method, f"/{UNKNOWN}")
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")


async def test_headers_of_the_application_come_before_those_of_the_framing(backend_of, lane):
    headers = {"Cache-Control": "no-store", "X-Own": "1"}
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a"])
        async with client_of(backend, headers=headers) as client:
            answer = await client.get(f"/{eid}")
    assert answer.headers.get_list("cache-control") == ["no-store"]
    assert answer.headers["x-own"] == "1"


async def test_what_follows_a_response_follows_it(backend_of, lane):
    ran = []
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a"])
        async with client_of(backend, background=BackgroundTask(ran.append, 1)) as client:
            await client.get(f"/{eid}")
            await client.get(f"/{UNKNOWN}")
    assert ran == [1, 1]


async def test_a_response_whose_client_has_gone_is_not_completed(backend_of, lane):
    sent = []

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "GET", "headers": [], "query_string": b""}
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a"], end=False)
        await web.StreamResponse(backend, eid)(scope, receive, send)
        assert not backend._hub._core.routes
    assert all(each.get("more_body", True) for each in sent)


UNKNOWN = "{fp:1}:00000000-0000-4000-8000-000000000000"


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("eid", [UNKNOWN, "nonsense", "{fp:1}"])
async def test_an_unknown_execution_is_404(backend_of, method, eid):
    async with backend_of() as backend, client_of(backend) as client:
        answer = await client.request(method, f"/{eid}")
    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"


BAD_PLACES = [
    "nonsense",
    "1-1",
    "0.1",
    "0.1-1~",
    "0.1-1~zz",
    "0.1-1~61",
    "0.1-1~e282ac",
    "start~e2",
    "0-0~e2",
    "0.0-0~e2",
    "$",
    "0.1-1\t",
]


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("place", BAD_PLACES)
async def test_a_malformed_place_is_400(backend_of, lane, method, place):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a"])
        async with client_of(backend) as client:
            answer = await client.request(method, f"/{eid}", params={"after": place})
    assert answer.status_code == 400
    if method == "GET":
        assert answer.json()["error"]["code"] == "invalid_cursor"


async def test_head_answers_the_headers_alone(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a"], end=False)
        async with client_of(backend) as client:
            answer = await client.head(f"/{eid}")
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["x-accel-buffering"] == "no"


async def test_a_client_that_has_the_start_alone_gets_the_end(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [])
        async with client_of(backend) as client:
            events = EventSource().parse((await client.get(f"/{eid}")).content)
            assert [each.event for each in events] == ["attempt", "end"]
            again = await client.get(f"/{eid}", headers={"last-event-id": events[0].id})
            assert EventSource().parse(again.content) == events[1:]
