"""The real client of the AI SDK, in Node, and the encoder of pydantic-ai in the worker."""

import asyncio
import contextlib
import json
import threading

import pytest
from starlette.requests import Request
from starlette.routing import Route

import ff_fast
from ff_fast import FailureClass, web
from ff_fast.web import ai_sdk
from tests.web.node import Client

pytestmark = [pytest.mark.web, pytest.mark.timeout(120)]

TEXT = "Grüße 😀, ﷽\r\n" * 40
PIECES = [TEXT[at : at + 3] for at in range(0, len(TEXT), 3)]
USER = {"id": "u1", "role": "user", "parts": [{"type": "text", "text": "Hi"}]}


@pytest.fixture
def chats(site, lane):
    """The site of a chat, whose chats are named streams of the test."""

    def routes(backend):
        def find(request, chat):
            return backend.execution_id_for(chat, namespace=lane)

        async def send(request: Request):
            body = await request.json()
            return ai_sdk.message_response(backend, find(request, body["id"]), request)

        return [Route("/api/chat", send, methods=["POST"]), *ai_sdk.routes(backend, find)]

    return site(routes)


@pytest.fixture
def worker(server):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        yield backend


@pytest.fixture
def opened(worker, lane):
    """`opened(chat)`: the stream of a chat and a writer of its chunks."""
    streams = []

    def open_stream(chat):
        stream = worker.open_stream(chat, namespace=lane, ttl=60)
        assert stream.role == "producer"
        streams.append(stream)
        return stream, web.ChunkWriter(stream)

    yield open_stream
    for stream in streams:
        with contextlib.suppress(ff_fast.FFError):
            stream.__exit__(None, None, None)


def head(chunks):
    for chunk in (
        {"type": "start", "messageId": "m1"},
        {"type": "start-step"},
        {"type": "text-start", "id": "a"},
    ):
        chunks.write(chunk)


def deltas(stream, chunks, pieces):
    for piece in pieces:
        chunks.write({"type": "text-delta", "id": "a", "delta": piece})
    stream.flush()


def tail(stream, chunks):
    for chunk in (
        {"type": "text-end", "id": "a"},
        {"type": "finish-step"},
        {"type": "finish", "finishReason": "stop"},
    ):
        chunks.write(chunk)
    stream.complete()


def text_in(message):
    return "".join(each["text"] for each in message["parts"] if each["type"] == "text")


def test_a_transport_sends_and_reads(chats, opened):
    stream, chunks = opened("chat")
    head(chunks)
    deltas(stream, chunks, PIECES[:40])
    with Client("ai_sdk_client.mjs", "send", f"{chats.url}/api/chat", "chat") as client:
        client.until(lambda line: text_in(line["message"]))
        for piece in PIECES[40:]:
            deltas(stream, chunks, [piece])
        tail(stream, chunks)
        lines = client.rest()
    assert text_in(lines[-2]["message"]) == TEXT
    assert lines[-1]["error"] is None
    assert lines[-1]["kinds"][-1] == "finish"


@pytest.mark.parametrize("count", [0, 1, 80])
def test_a_transport_reconnects_in_the_middle(chats, opened, count):
    stream, chunks = opened("chat")
    head(chunks)
    deltas(stream, chunks, PIECES[:count])
    with Client("ai_sdk_client.mjs", "resume", f"{chats.url}/api/chat", "chat") as client:
        client.until(lambda line: line["message"]["parts"])
        for piece in PIECES[count:]:
            deltas(stream, chunks, [piece])
        tail(stream, chunks)
        lines = client.rest()
    assert text_in(lines[-2]["message"]) == TEXT
    assert lines[-2]["message"]["id"] == "m1"
    assert lines[-1]["error"] is None


def test_a_replay_of_a_long_answer_has_one_delta(chats, opened):
    stream, chunks = opened("chat")
    head(chunks)
    deltas(stream, chunks, [f"{i} " for i in range(2_000)])
    with Client("ai_sdk_client.mjs", "resume", f"{chats.url}/api/chat", "chat") as client:
        client.until(lambda line: text_in(line["message"]))
        tail(stream, chunks)
        end = client.rest()[-1]
    assert end["kinds"] == [
        "start", "start-step", "text-start", "text-delta", "text-end", "finish-step", "finish",
    ]  # fmt: skip


def test_nothing_to_resume(chats, opened):
    stream, chunks = opened("ended")
    head(chunks)
    tail(stream, chunks)
    for chat in ("none", "ended"):
        with Client("ai_sdk_client.mjs", "resume", f"{chats.url}/api/chat", chat) as client:
            assert client.rest() == [{"nothing": True}]


def test_a_new_attempt_replaces_the_text(chats, opened, worker, lane):
    stream, chunks = opened("chat")
    head(chunks)
    deltas(stream, chunks, ["wrong"])
    with Client("ai_sdk_client.mjs", "resume", f"{chats.url}/api/chat", "chat") as client:
        client.until(lambda line: text_in(line["message"]) == "wrong")
        # As a producer that is lost: its lease is given back, and the next who opens the name goes on.
        worker.fail(stream.handle, "lost", FailureClass.INFRA_CRASH)
        again, chunks = opened("chat")
        assert again.handle.attempt_index == 1
        head(chunks)
        deltas(again, chunks, PIECES)
        tail(again, chunks)
        lines = client.rest()
    assert text_in(lines[-2]["message"]) == TEXT
    assert [each["type"] for each in lines[-2]["message"]["parts"]] == ["step-start", "text"]
    assert "reset-step" in lines[-1]["kinds"]
    assert lines[-1]["error"] is None


def test_a_stopped_answer_is_aborted(chats, opened, worker, lane):
    stream, chunks = opened("chat")
    head(chunks)
    deltas(stream, chunks, ["half"])
    with Client("ai_sdk_client.mjs", "resume", f"{chats.url}/api/chat", "chat") as client:
        client.until(lambda line: text_in(line["message"]) == "half")
        worker.cancel(stream.execution_id, reason="enough")
        assert client.rest()[-1]["kinds"][-1] == "abort"


def test_an_answer_that_fails_is_an_error(chats, opened):
    stream, chunks = opened("chat")
    head(chunks)
    deltas(stream, chunks, ["half"])
    with Client("ai_sdk_client.mjs", "resume", f"{chats.url}/api/chat", "chat") as client:
        client.until(lambda line: text_in(line["message"]) == "half")
        stream.fail("no luck")
        assert client.rest()[-1]["error"] == "no luck"


@pytest.mark.parametrize("count", [0, 80])
def test_a_page_with_use_chat_resumes(chats, opened, count):
    stream, chunks = opened("chat")
    head(chunks)
    deltas(stream, chunks, PIECES[:count])
    # What the page knows: the question, and what it had got of the answer.
    known = [USER]
    if count:
        part = {"type": "text", "text": TEXT[:30]}
        known.append({"id": "m1", "role": "assistant", "parts": [{"type": "step-start"}, part]})
    with Client("use_chat_page.mjs", f"{chats.url}/api/chat", "chat", json.dumps(known)) as client:
        if count:
            client.until(lambda line: text_in(line["messages"][-1]) == "".join(PIECES[:count]))
        else:
            client.until(lambda line: line["status"] in ("submitted", "streaming"))
        for piece in PIECES[count:]:
            deltas(stream, chunks, [piece])
        tail(stream, chunks)
        last = client.rest()[-1]
    assert last["status"] == "ready"
    assert [each["role"] for each in last["messages"]] == ["user", "assistant"]
    assert text_in(last["messages"][-1]) == TEXT


# -- pydantic-ai --------------------------------------------------------------------------------------------------------


@pytest.fixture
def agent():
    """An agent that calls a tool, and then says TEXT; it pauses in the middle until it is let go."""
    from pydantic_ai import Agent
    from pydantic_ai.models.function import DeltaToolCall, FunctionModel

    paused, go = threading.Event(), threading.Event()

    async def answer(messages, info):
        if len(messages) == 1:
            yield {0: DeltaToolCall(name="weather", json_args='{"city":', tool_call_id="c1")}
            yield {0: DeltaToolCall(json_args=' "Köln"}', tool_call_id="c1")}
            return
        for at, piece in enumerate(PIECES):
            if at == 60:
                paused.set()
                await asyncio.to_thread(go.wait, 30)
            yield piece

    agent = Agent(FunctionModel(stream_function=answer))

    @agent.tool_plain
    def weather(city: str) -> str:
        return f"rain in {city}"

    agent.paused, agent.go = paused, go
    yield agent
    go.set()


def test_what_pydantic_ai_encodes_in_the_worker_is_resumed(site, lane, agent):
    from pydantic_ai.ui.vercel_ai import VercelAIAdapter

    tasks = []

    def routes(backend):
        def find(request, chat):
            return backend.execution_id_for(chat, namespace=lane)

        async def produce(stream, body):
            async with stream:
                adapter = VercelAIAdapter(
                    agent=agent, run_input=VercelAIAdapter.build_run_input(body), sdk_version=7
                )
                chunks = web.ChunkWriter(stream)
                async for text in adapter.encode_stream(adapter.run_stream()):
                    chunks.write(text)

        async def send(request: Request):
            body = await request.body()
            chat = json.loads(body)["id"]
            stream = await backend.open_stream(chat, namespace=lane, ttl=60)
            if stream.role == "producer":
                tasks.append(asyncio.create_task(produce(stream, body)))
            return ai_sdk.message_response(backend, stream.execution_id, request)

        return [Route("/api/chat", send, methods=["POST"]), *ai_sdk.routes(backend, find)]

    here = site(routes)
    api = f"{here.url}/api/chat"
    with Client("ai_sdk_client.mjs", "send", api, "chat") as sender:
        assert agent.paused.wait(30)
        # One goes away and comes again in the middle, and another page joins.
        with (
            Client("ai_sdk_client.mjs", "resume", api, "chat") as joiner,
            Client("use_chat_page.mjs", api, "chat", json.dumps([USER])) as page,
        ):
            joiner.until(lambda line: text_in(line["message"]))
            page.until(lambda line: text_in(line["messages"][-1]))
            agent.go.set()
            sent, joined, shown = sender.rest(), joiner.rest(), page.rest()
    assert sent[-1]["error"] is None
    assert joined[-1]["error"] is None
    messages = [sent[-2]["message"], joined[-2]["message"], shown[-1]["messages"][-1]]
    for message in messages:
        assert text_in(message) == TEXT
        assert message["parts"] == messages[0]["parts"]
    [tool] = [each for each in messages[0]["parts"] if each["type"] == "tool-weather"]
    assert (tool["state"], tool["input"], tool["output"]) == (
        "output-available", {"city": "Köln"}, "rain in Köln",
    )  # fmt: skip
