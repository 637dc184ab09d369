"""Runs as the SDKs of LangGraph read them: events and their places, ends, restarts, status and errors."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette

from ff_fast import FailureClass, RetryPolicy, keys, web
from ff_fast.errors import Unavailable
from ff_fast.web import langgraph
from tests.server.executions import World
from tests.web.sites import WORKER, EventSource, stream_of
from tests.web.sockets import Reader

pytestmark = pytest.mark.anyio

FRAMES = [
    (b'{"a":1}', "values"),
    (b'[{"b":\n2},"\xc3\xa9"]', "messages"),
    (b'"x"', "messages/partial"),
    (b"null", "updates|sub:1"),
]


@pytest.fixture
def anyio_backend():
    return "asyncio"


def client_of(backend, *of, **options):
    app = Starlette(routes=langgraph.routes(backend, *of, **options))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


def path_of(eid, end=""):
    return f"/threads/t%201/runs/{keys.url_id(eid)}{end}"


async def read(client, eid, last_id=None, **query):
    headers = {} if last_id is None else {"last-event-id": last_id}
    answer = await client.get(path_of(eid, "/stream"), headers=headers, params=query)
    assert answer.status_code == 200, answer.content
    return EventSource().parse(answer.content)


async def test_a_run_is_read_to_its_end(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(backend, lane, FRAMES)
        answer = await client.get(path_of(eid, "/stream"))
        run = (await client.get(path_of(eid))).json()
    events = EventSource().parse(answer.content)
    assert [each.event for each in events] == [
        "metadata", "values", "messages", "messages/partial", "updates|sub:1", "end",
    ]  # fmt: skip
    assert [each.json for each in events] == [
        {"run_id": keys.url_id(eid), "attempt": 1}, *(json.loads(data) for data, _ in FRAMES), None,
    ]  # fmt: skip
    assert len({each.id for each in events} - {""}) == len(events)
    assert answer.headers["location"] == path_of(eid, "/stream")
    assert answer.headers["content-location"] == path_of(eid)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert (run["run_id"], run["thread_id"], run["status"]) == (keys.url_id(eid), "t 1", "success")


async def test_a_client_goes_on_behind_any_id_and_gets_the_end_again(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(backend, lane, FRAMES)
        events = await read(client, eid)
        for index, each in enumerate(events):
            rest = await read(client, eid, each.id)
            assert rest == (events[index + 1 :] or events[-1:])
        for beginning in ("", "-1"):
            assert await read(client, eid, beginning) == events


async def test_a_client_chooses_its_modes(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(backend, lane, FRAMES)
        events = await read(client, eid, stream_mode=["messages", "updates"])
        assert [each.event for each in events] == [
            "metadata", "messages", "messages/partial", "updates|sub:1", "end",
        ]  # fmt: skip
        assert len(await read(client, eid, stream_mode="")) == len(FRAMES) + 2


@pytest.mark.parametrize(
    "asked, kinds",
    [
        ("messages-tuple", ["messages", "messages/partial"]),
        # As the SDK for JavaScript writes several.
        ('["values","updates"]', ["values", "updates|sub:1"]),
        ('["messages-tuple"]', ["messages", "messages/partial"]),
        ("[]", [kind for _, kind in FRAMES]),
        ("[values", []),
        ("debug", []),
    ],
)
async def test_modes_are_taken_as_the_sdks_write_them(backend_of, lane, asked, kinds):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(backend, lane, FRAMES)
        events = await read(client, eid, stream_mode=asked)
    assert [each.event for each in events] == ["metadata", *kinds, "end"]


def test_a_heartbeat_is_no_event():
    framing = langgraph.LangGraphFraming("run")
    for said in (framing.heartbeat(), framing.shutdown(500), framing.failed(Unavailable())):
        assert said.startswith(b":")
        assert said.count(b"\n") == 1


def test_a_response_that_a_shutdown_ends_is_not_complete(site, lane):
    """The SDK for JavaScript takes a complete response for the end of the run."""
    here = site(langgraph.routes)
    eid, _ = here.call(stream_of(here.backend, lane, FRAMES, end=False))
    with Reader(here, path_of(eid, "/stream")) as reader:
        reader.read_until(lambda reader: b"event: values" in reader.raw)
        here.loop.call_soon_threadsafe(web.end_responses)
        reader.read_all()
        assert reader.closed
        assert not reader.ended


async def test_text_can_be_sent_as_json_strings(backend_of, lane):
    text = 'a€\r\n"é😀'
    raw = text.encode()
    async with backend_of() as backend, client_of(backend, data="json") as client:
        eid, _ = await stream_of(backend, lane, [raw[at : at + 2] for at in range(0, len(raw), 2)])
        events = await read(client, eid)
        assert "".join(each.json for each in events if each.event == "token") == text
        for index, each in enumerate(events[:-1]):
            rest = await read(client, eid, each.id)
            assert [*events[: index + 1], *rest] == events


async def test_types_that_the_protocol_has_are_renamed(backend_of, lane):
    frames = [(b"1", "end"), (b"2", "error"), (b"3", "metadata")]
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(backend, lane, frames)
        events = await read(client, eid)
    assert [each.event for each in events] == [
        "metadata", "frame-end", "frame-error", "frame-metadata", "end",
    ]  # fmt: skip


@pytest.mark.parametrize("failed", [True, False])
async def test_a_failure_is_an_error_and_a_cancellation_an_end(backend_of, lane, failed):
    async with backend_of() as backend, client_of(backend) as client:
        eid, handle = await stream_of(backend, lane, FRAMES, end=False)
        assert (await client.get(path_of(eid))).json()["status"] == "running"
        reading = asyncio.ensure_future(read(client, eid))
        if failed:
            await backend.fail(handle, "no luck", FailureClass.PERMANENT)
        else:
            for _ in range(2):
                assert (await client.post(path_of(eid, "/cancel"))).status_code == 200
        events = await reading
        run = (await client.get(path_of(eid))).json()
    if failed:
        assert (events[-1].event, events[-1].json["message"]) == ("error", "no luck")
        assert run["status"] == "error"
    else:
        assert (events[-1].event, events[-1].json) == ("end", None)
        assert (run["status"], run["cancel_reason"]) == ("interrupted", "cancelled by the client")


async def test_a_run_that_waits_for_its_worker_is_pending(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid = await backend.create_execution(lane=lane)
        assert (await client.get(path_of(eid))).json()["status"] == "pending"
        await backend.claim(lane=lane, **WORKER)
        assert (await client.get(path_of(eid))).json()["status"] == "running"


async def test_another_attempt_begins_with_its_metadata(backend_of, server, raw, lane):
    with World(server.url, raw, lane) as world:
        eid, handle = world.owned(retry=RetryPolicy(1, delay=0))
        with world.backend.open_writer(handle) as writer:
            writer.write(b"1", frame_type="custom")
        world.backend.fail(handle, "no luck", FailureClass.TRANSIENT)
        async with backend_of() as backend, client_of(backend) as client:
            assert (await client.get(path_of(eid))).json()["status"] == "running"
            world.fire(eid, "delay")
            handle = world.claim()
            with world.backend.open_writer(handle) as writer:
                writer.write(b"2", frame_type="custom")
            world.backend.complete(handle)
            events = await read(client, eid)
            assert [(each.event, each.json) for each in events[1:]] == [
                ("custom", 1),
                ("metadata", {"run_id": keys.url_id(eid), "attempt": 2}),
                ("custom", 2),
                ("end", None),
            ]
            assert await read(client, eid, events[1].id) == events[2:]


async def test_missing_events_are_an_error_that_ends_the_response(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(
            backend, lane, [b"%d" % i for i in range(400)], retention_maxlen=10
        )
        events = await read(client, eid)
        assert [each.event for each in events] == ["metadata", "error"]
        assert events[-1].json["error"] == "resume_gap"
        # It is no place to go on from.
        assert events[-1].id == events[0].id


async def test_refusals_name_their_reason(backend_of, lane):
    key = b"k" * 32
    async with backend_of() as backend, client_of(backend, token_key=key) as client:
        eid, _ = await stream_of(backend, lane, FRAMES)
        unknown = keys.execution_id_for("nobody", namespace=lane)
        for method, end in (("GET", ""), ("GET", "/stream"), ("POST", "/cancel")):
            assert (await client.request(method, path_of(eid, end))).status_code == 403
            answer = await client.request(method, f"/threads/t/runs/nothing{end}")
            assert (answer.status_code, set(answer.json())) == (404, {"detail", "code"})
            token = web.stream_token(key, unknown, can=("read", "stop"))
            answer = await client.request(method, path_of(unknown, end), params={"token": token})
            assert answer.status_code == 404
        token = web.stream_token(key, eid)
        answer = await client.get(
            path_of(eid, "/stream"), params={"token": token}, headers={"last-event-id": "x"}
        )
        assert (answer.status_code, answer.json()["code"]) == (400, "invalid_cursor")


async def test_a_run_that_another_path_begins_can_be_joined(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, FRAMES)

        async def begin(request):
            return langgraph.join_response(backend, eid, request, thread_id="t/1", run_id="r?")

        app = Starlette()
        app.add_route("/threads/{thread_id}/runs/stream", begin, methods=["POST"])
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(app), base_url="http://test"
        ) as client:
            answer = await client.post("/threads/t/runs/stream", json={})
    assert answer.headers["location"] == "/threads/t%2F1/runs/r%3F/stream"
    assert EventSource().parse(answer.content)[0].json == {"run_id": "r?", "attempt": 1}
