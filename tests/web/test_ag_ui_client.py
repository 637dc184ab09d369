"""The real client of AG-UI, in Node, which checks each event that it gets; and pydantic-ai's encoder in the worker."""

import asyncio
import json

import pytest
from starlette.requests import Request
from starlette.routing import Route

from ff_fast import web
from ff_fast.web import ag_ui
from tests.web.node import Client
from tests.web.test_ag_ui import EVENTS, MESSAGES, STARTED, USER
from tests.web.test_ai_sdk_client import TEXT, agent, opened, worker  # noqa: F401 - fixtures

pytestmark = [pytest.mark.web, pytest.mark.timeout(120)]


@pytest.fixture
def runs(site, lane):
    def routes(backend):
        async def run(request: Request):
            eid = backend.execution_id_for("chat", namespace=lane)
            return ag_ui.run_response(backend, eid, request)

        return [Route("/", run, methods=["POST"])]

    return site(routes)


def plain(messages):
    """*messages* without the fields that the client adds."""
    names = ("id", "role", "content", "toolCalls", "toolCallId")
    return [{name: each[name] for name in names if each.get(name) is not None} for each in messages]


@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("count", [1, 4, 5, 10, 12, 17, 18, 19])
def test_who_joins_a_run_has_its_messages(runs, opened, count, asked):  # noqa: F811
    events = EVENTS if asked else [STARTED, *EVENTS[1:]]
    stream, log = opened("chat")
    for event in events[:count]:
        log.write(event)
    stream.flush()
    with Client("ag_ui_agent.mjs", runs.url, json.dumps([USER])) as client:
        first = client.next()
        for event in events[count:]:
            log.write(event)
            stream.flush()
        stream.complete()
        last = client.rest()[-1]
    assert first["event"]["type"] == "RUN_STARTED"
    assert last["error"] is None
    assert plain(last["messages"]) == MESSAGES
    assert last["state"] == {"b": 2}


def test_what_pydantic_ai_encodes_in_the_worker_is_joined(site, lane, agent):  # noqa: F811
    from pydantic_ai.ui.ag_ui import AGUIAdapter

    tasks = []

    def routes(backend):
        async def produce(stream, body):
            async with stream:
                adapter = AGUIAdapter(agent=agent, run_input=AGUIAdapter.build_run_input(body))
                log = web.ChunkWriter(stream)
                async for text in adapter.encode_stream(adapter.run_stream()):
                    log.write(text)

        async def run(request: Request):
            stream = await backend.open_stream("chat", namespace=lane, ttl=60)
            body = await request.body()
            if stream.role == "producer":
                tasks.append(asyncio.create_task(produce(stream, body)))
            messages = json.loads(body)["messages"]
            return ag_ui.run_response(
                backend, stream.execution_id, request, thread_id="t", run_id="r", messages=messages
            )

        return [Route("/", run, methods=["POST"])]

    here = site(routes)
    with Client("ag_ui_agent.mjs", here.url, json.dumps([USER])) as runner:
        assert agent.paused.wait(30)
        with Client("ag_ui_agent.mjs", here.url, json.dumps([USER])) as joiner:
            joiner.until(lambda line: line.get("event", {}).get("type") == "MESSAGES_SNAPSHOT")
            agent.go.set()
            ran, joined = runner.rest()[-1], joiner.rest()[-1]
    assert ran["error"] is None
    assert joined["error"] is None
    assert plain(joined["messages"]) == plain(ran["messages"])
    said = [
        each["content"]
        for each in ran["messages"]
        if each["role"] == "assistant" and "content" in each
    ]
    assert TEXT in said
