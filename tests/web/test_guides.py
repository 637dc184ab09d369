"""The programs of docs/guides that need no more than Starlette run as they stand."""

import asyncio
import logging
import uuid

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import ff_fast
from ff_fast import PatchKind, StreamMode, keys
from tests import documents
from tests.web.sites import EventSource, text_of

TOKENS = ("For", "ty", "-two")


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def llm(prompt):
    for token in TOKENS:
        yield token


def client_of(app):
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def ended(backend, name=None, **options):
    """The id of a stream of these tokens, whose summary has them too."""
    async with backend.open_stream(name or uuid.uuid4().hex, **options) as stream:
        for token in TOKENS:
            stream.write(token)
        patch = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
        stream.write("".join(TOKENS), "answer", mode=patch)
    return stream.execution_id


def test_a_reader_goes_on_where_another_one_left_off(capsys):
    documents.run("follow-resume")
    first, *rest = capsys.readouterr().out.splitlines()
    assert [first, *rest[:-1]] == ["Hello", ",", " world"]
    assert rest[-1].startswith("End(reason='attempt_success'")


def test_a_notebook_streams_and_anybody_reads_it(server, capsys):
    backend = documents.run("notebook", server.url)["backend"]
    with backend:
        documents.run("notebook-reader", backend=backend)
        assert capsys.readouterr().out == "Forty-two"
        backend.delete_execution(backend.execution_id_for("experiment 7"))


def test_what_was_written_by_hand_and_what_takes_its_place_read_alike(server, raw):
    name = uuid.uuid4().hex
    before = documents.run("from-xadd-before", client=raw)
    before["work"](name)
    assert "".join(before["read"](name)) == "Forty-two"
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        after = documents.run("from-xadd-after", backend=backend, ff_fast=ff_fast)
        after["work"](name)
        assert "".join(after["read"](name)) == "Forty-two"


@pytest.mark.anyio
async def test_a_worker_of_two_handlers(backend_of):
    app = documents.run("worker-object")["app"]
    async with backend_of() as backend:
        plain = await backend.create_execution(lane="chat", payload="Hi")
        named = await backend.create_execution(lane="chat", handler="summarise", payload="Hi")
        await backend.run_worker(app, until_idle=True, supervise=False)
        assert await backend.wait(named, 10) == b"Hi"
        frames = [item async for item in backend.follow(plain)]
        assert frames[1].payload == b"small: Hi"


@pytest.mark.anyio
async def test_the_routes_of_the_browser_client(backend_of):
    async with backend_of() as backend:
        app = Starlette()
        documents.run("client-routes", app=app, backend=backend)
        eid = await ended(backend)
        async with client_of(app) as client:
            assert "export function follow" in (await client.get("/ff_fast.js")).text
            answer = await client.get(f"/streams/{keys.url_id(eid)}")
            kinds = [each.event for each in EventSource().parse(answer.content)]
            assert kinds[0] == "snapshot"
            assert kinds[-1] == "end"
            stopped = await client.post(f"/streams/{keys.url_id(eid)}/stop")
            assert stopped.json() == {"success": True}


@pytest.mark.anyio
async def test_only_its_owner_reads_a_stream(backend_of):
    async with backend_of() as backend:
        eid = await ended(backend)
        names = documents.run("authorize", backend=backend, owners={eid: "ada"}, app=None)
        async with client_of(Starlette(routes=[Route("/{id}", names["stream"])])) as client:
            answers = [
                await client.get(f"/{keys.url_id(eid)}", headers={"x-user": user})
                for user in ("ada", "bob")
            ]
    assert [answer.status_code for answer in answers] == [200, 403]


@pytest.mark.anyio
async def test_a_ticket_lets_its_holder_read_and_stop(backend_of, monkeypatch):
    monkeypatch.setenv("STREAM_KEY", "0123456789abcdef" * 2)
    async with backend_of() as backend:
        eid = await ended(backend)
        names = documents.run("tickets", backend=backend, app=None)
        routes = [
            Route("/streams/{id}", names["stream"]),
            Route("/streams/{id}/stop", names["stop"], methods=["POST"]),
        ]
        address = names["address"](eid)
        async with client_of(Starlette(routes=routes)) as client:
            assert text_of(EventSource().parse((await client.get(address)).content))
            bare, _, token = address.partition("?token=")
            assert (await client.get(bare)).status_code == 403
            bearer = {"authorization": f"Bearer {token}"}
            assert (await client.post(f"{bare}/stop")).status_code == 403
            assert (await client.post(f"{bare}/stop", headers=bearer)).json() == {"success": True}


@pytest.mark.anyio
async def test_a_response_of_the_openai_api(backend_of):
    async with backend_of() as backend:
        app = Starlette()
        names = documents.run("openai-responses", app=app, backend=backend, llm=llm)
        name = f"resp_{uuid.uuid4().hex}"
        await names["produce"](name, "6 x 7?")
        async with client_of(app) as client:
            whole = (await client.get(f"/v1/responses/{name}")).json()
            streamed = (await client.get(f"/v1/responses/{name}?stream=true")).text
    assert whole["output"][0]["content"][0]["text"] == "Forty-two"
    assert streamed.count("event: response.output_text.delta") == 3


@pytest.mark.anyio
async def test_a_run_of_langgraph(backend_of):
    class Graph:
        async def astream(self, given, stream_mode):
            yield "updates", {"model": {"answer": given["question"]}}
            yield "custom", {"at": 1}

    async with backend_of() as backend:
        app = Starlette()
        names = documents.run("langgraph", app=app, backend=backend, graph=Graph())
        run = str(uuid.uuid4())
        await names["produce"](run, "6 x 7?")
        async with client_of(app) as client:
            answer = await client.get(f"/threads/t/runs/{run}/stream")
    kinds = [each.event for each in EventSource().parse(answer.content)]
    assert kinds == ["metadata", "updates", "custom", "end"]


@pytest.mark.anyio
async def test_a_run_of_ag_ui(backend_of):
    async with backend_of() as backend:
        app = Starlette()
        tasks = set()
        documents.run("ag-ui", app=app, backend=backend, llm=llm, tasks=tasks, Route=Route)
        given = {
            "threadId": "t",
            "runId": uuid.uuid4().hex,
            "messages": [{"id": "u", "role": "user", "content": "6 x 7?"}],
        }
        async with client_of(app) as client:
            answer = await client.post("/agent", json=given)
            again = await client.post("/agent", json=given)
        await asyncio.gather(*tasks)
    for each in (answer, again):
        events = [event.json for event in EventSource().parse(each.content)]
        assert events[0]["type"] == "RUN_STARTED"
        assert events[-1]["type"] == "RUN_FINISHED"
    assert "ty" in answer.text
    assert "Forty-two" in again.text


@pytest.mark.anyio
async def test_a_stream_of_the_durable_streams_protocol(backend_of):
    async with backend_of() as backend:
        app = Starlette()
        documents.run("durable-streams", app=app, backend=backend)
        name = uuid.uuid4().hex
        async with backend.open_stream(name) as stream:
            for token in TOKENS:
                stream.write(token)
        async with client_of(app) as client:
            answer = await client.get(f"/log/{name}?offset=-1")
    assert answer.text == "Forty-two"
    assert answer.headers["stream-closed"] == "true"


def test_logs_are_set_up():
    root, level = logging.root.handlers[:], logging.root.level
    ours = logging.getLogger("ff_fast").level
    documents.run("logs")
    assert logging.getLogger("ff_fast").isEnabledFor(logging.INFO)
    logging.root.handlers[:] = root
    logging.root.setLevel(level)
    logging.getLogger("ff_fast").setLevel(ours)


def test_prometheus_and_opentelemetry_read_a_backend(server, monkeypatch):
    import prometheus_client

    registry = prometheus_client.CollectorRegistry()
    serve = prometheus_client.start_http_server
    monkeypatch.setattr(prometheus_client, "REGISTRY", registry)
    monkeypatch.setattr(
        prometheus_client, "start_http_server", lambda _: serve(0, "127.0.0.1", registry)
    )
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        names = documents.run("prometheus", backend=backend)
        documents.run("opentelemetry", backend=backend)
        try:
            port = names["server"].server_port
            assert "ff_fast_frames_written_total" in httpx.get(f"http://127.0.0.1:{port}").text
        finally:
            names["server"].shutdown()
            names["server"].server_close()
            names["thread"].join()
