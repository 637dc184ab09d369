"""LangGraph's own SDK reads runs from a web application whose worker is another process."""

import asyncio
import uuid

import pytest

from ff_fast import web
from ff_fast.web import langgraph
from tests.web.producers import producer, text_of

pytestmark = pytest.mark.web

COUNT = 400


@pytest.fixture
def run_id():
    return str(uuid.uuid4())


@pytest.fixture
def runs(site):
    return site(lambda backend: langgraph.routes(backend, backend.execution_id_for))


@pytest.fixture
def client_of():
    from langgraph_sdk import get_client

    return lambda site: get_client(url=site.url, api_key=None)


def text_in(parts):
    return "".join(part.data[0]["content"] for part in parts if part.event == "messages")


def places_in(parts):
    return [part.data[1]["at"] for part in parts if part.event == "messages"]


async def read(client, run_id, parts=None, **options):
    parts = [] if parts is None else parts
    async for part in client.runs.join_stream("thread 1", run_id, **options):
        parts.append(part)
    return parts


def test_a_run_is_joined_and_read_to_its_end(server, runs, client_of, run_id):
    async def run():
        async with client_of(runs) as client:
            parts = await read(client, run_id)
            status = (await client.runs.get("thread 1", run_id))["status"]
            some = await read(client, run_id, stream_mode="values")
        return parts, status, some

    with producer("run", server.url, run_id, COUNT):
        parts, status, some = asyncio.run(run())
    assert (parts[0].event, parts[0].data) == ("metadata", {"run_id": run_id, "attempt": 1})
    assert (parts[-1].event, parts[-1].data) == ("end", None)
    assert text_in(parts) == text_of(COUNT)
    assert status in ("running", "success")
    assert [part.event for part in some] == ["metadata", "end"]


def test_a_client_goes_on_behind_its_last_event(server, runs, client_of, run_id):
    async def run():
        parts = []
        async with client_of(runs) as client:
            while not parts or parts[-1].event != "end":
                last = parts[-1].id if parts else None
                joined = client.runs.join_stream("thread 1", run_id, last_event_id=last)
                index = 0
                async for part in joined:
                    parts.append(part)
                    index += 1
                    if index == 90:
                        break
                await joined.aclose()
            # Who has the end gets it again.
            again = await read(client, run_id, last_event_id=parts[-1].id)
        return parts, again

    with producer("run", server.url, run_id, COUNT):
        parts, again = asyncio.run(run())
    assert places_in(parts) == list(range(COUNT))
    assert [part.event for part in again] == ["end"]


@pytest.mark.parametrize("how", ["cut", "shut down"])
def test_the_sdk_comes_again_by_the_location(server, runs, client_of, run_id, how):
    requests = []

    def drop():
        if how == "shut down":
            web.end_responses()
        else:
            for connection in list(runs.server.server_state.connections):
                connection.transport.abort()

    async def run():
        parts = []
        async with client_of(runs) as client:

            async def note(request):
                requests.append((request.url.path, request.headers.get("last-event-id")))

            client.http.client.event_hooks["request"].append(note)
            dropped = False
            async for part in client.runs.join_stream("thread 1", run_id):
                parts.append(part)
                if len(parts) > 100 and not dropped:
                    dropped = True
                    runs.loop.call_soon_threadsafe(drop)
        return parts

    with producer("run", server.url, run_id, 2 * COUNT):
        parts = asyncio.run(run())
    assert places_in(parts) == list(range(2 * COUNT))
    assert text_in(parts) == text_of(2 * COUNT)
    assert parts[-1].event == "end"
    path = f"/threads/thread 1/runs/{run_id}"
    streams = [last for asked, last in requests if asked == f"{path}/stream"]
    assert streams[0] is None
    assert streams[1] in {part.id for part in parts}
    # Either way the connection is dropped, so it need not ask whether the run goes on.
    assert path not in [asked for asked, _ in requests]


def test_a_run_that_is_cancelled_ends(server, runs, client_of, run_id):
    async def run():
        async with client_of(runs) as client:
            parts = []
            async for part in client.runs.join_stream("thread 1", run_id):
                parts.append(part)
                if len(parts) == 50:
                    await client.runs.cancel("thread 1", run_id)
            return parts, await client.runs.get("thread 1", run_id)

    with producer("run", server.url, run_id, 100_000):
        parts, found = asyncio.run(run())
    assert parts[-1].event == "end"
    assert places_in(parts) == list(range(len(parts) - 2))
    assert (found["status"], found["cancel_reason"]) == ("interrupted", "cancelled by the client")


def test_an_unknown_run_is_the_error_of_the_sdk(runs, client_of, run_id):
    from langgraph_sdk.errors import NotFoundError

    async def run():
        async with client_of(runs) as client:
            await read(client, run_id)

    with pytest.raises(NotFoundError, match="execution"):
        asyncio.run(run())


def test_the_blocking_client_reads_the_same(server, runs, run_id):
    from langgraph_sdk import get_sync_client

    with (
        producer("run", server.url, run_id, COUNT),
        get_sync_client(url=runs.url, api_key=None) as client,
    ):
        parts = list(client.runs.join_stream("thread 1", run_id))
    assert text_in(parts) == text_of(COUNT)
