"""The events of AG-UI: what who started a run gets, and who joins it in the middle."""

import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from ff_fast import FailureClass, InvalidInput, web
from ff_fast.types import AttemptStarted, End, Gap, Snapshot
from ff_fast.web import ag_ui
from ff_fast.web.chunk_log import ChunkWriter
from tests.server.executions import World
from tests.web.sites import EventSource, stream_of
from tests.web.test_ai_sdk import two_attempts_of, written

anyio = pytest.mark.anyio

USER = {"id": "u1", "role": "user", "content": "Hi"}
RUN = {"threadId": "t", "runId": "r"}
STARTED = {"type": "RUN_STARTED", **RUN}
ASKED = {**STARTED, "input": {**RUN, "messages": [USER]}}
FINISHED = {"type": "RUN_FINISHED", **RUN, "result": 1}
M1 = {"type": "TEXT_MESSAGE_START", "messageId": "m1", "role": "assistant"}
EVENTS = [
    ASKED,
    {"type": "STEP_STARTED", "stepName": "one"},
    M1,
    {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m1", "delta": "He"},
    {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m1", "delta": "llo", "timestamp": 5},
    {"type": "TEXT_MESSAGE_END", "messageId": "m1"},
    {"type": "STATE_SNAPSHOT", "snapshot": {"a": None}},
    {"type": "STATE_DELTA", "delta": [{"op": "add", "path": "/a", "value": 1}]},
    {
        "type": "TOOL_CALL_START",
        "toolCallId": "c1",
        "toolCallName": "look",
        "parentMessageId": "m1",
    },
    {"type": "TOOL_CALL_ARGS", "toolCallId": "c1", "delta": "{"},
    {"type": "TOOL_CALL_ARGS", "toolCallId": "c1", "delta": "}"},
    {"type": "TOOL_CALL_END", "toolCallId": "c1"},
    {"type": "TOOL_CALL_RESULT", "messageId": "r1", "toolCallId": "c1", "content": "seen"},
    {"type": "STATE_SNAPSHOT", "snapshot": {"b": 2}},
    {"type": "STEP_FINISHED", "stepName": "one"},
    {"type": "CUSTOM", "name": "x", "value": None},
    {"type": "TEXT_MESSAGE_START", "messageId": "m2", "role": "assistant"},
    {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m2", "delta": "Bye"},
    {"type": "TEXT_MESSAGE_END", "messageId": "m2"},
    FINISHED,
]
MESSAGES = [
    USER,
    {
        "id": "m1",
        "role": "assistant",
        "content": "Hello",
        "toolCalls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}
        ],
    },
    {"id": "r1", "role": "tool", "toolCallId": "c1", "content": "seen"},
    {"id": "m2", "role": "assistant", "content": "Bye"},
]


@pytest.fixture
def anyio_backend():
    return "asyncio"


def events_of(raw):
    return [each.json for each in EventSource().parse(raw)]


async def body_of(backend, eid, **options):
    framing = ag_ui.AgUiFraming(**options)
    return b"".join([chunk async for chunk in web.events(backend, eid, framing=framing)])


def applied(events):
    """The messages and the state that a client has after *events*, which it has checked as the protocol asks."""
    messages, state, spans, started, ended = [], None, set(), False, False
    for each in events:
        kind = each["type"]
        assert not ended
        assert started or kind in ("RUN_STARTED", "RUN_ERROR"), kind
        assert not (started and kind == "RUN_STARTED")
        started = True
        part = each.get("messageId") or each.get("toolCallId") or each.get("stepName")
        if kind == "RUN_STARTED":
            known = {message["id"] for message in messages}
            given = json.loads(json.dumps(each.get("input", {}).get("messages", [])))
            messages += [message for message in given if message["id"] not in known]
        elif kind in ("RUN_FINISHED", "RUN_ERROR"):
            ended = True
            assert kind == "RUN_ERROR" or not spans
        elif kind == "MESSAGES_SNAPSHOT":
            messages = json.loads(json.dumps(each["messages"]))
        elif kind == "STATE_SNAPSHOT":
            state = each["snapshot"]
        elif kind == "STATE_DELTA":
            state = {**state, each["delta"][0]["path"][1:]: each["delta"][0]["value"]}
        elif kind in ("STEP_STARTED", "TEXT_MESSAGE_START", "TOOL_CALL_START"):
            assert (kind[:4], part) not in spans
            spans.add((kind[:4], part if kind[:4] != "TOOL" else each["toolCallId"]))
            if kind == "TEXT_MESSAGE_START" and part not in [each["id"] for each in messages]:
                messages.append({"id": part, "role": each["role"], "content": ""})
            if kind == "TOOL_CALL_START":
                parent = each.get("parentMessageId") or part
                found = [message for message in messages if message["id"] == parent]
                if not found or found[0]["role"] != "assistant":
                    parent = each["toolCallId"] if found else parent
                    found = [{"id": parent, "role": "assistant"}]
                    messages += found
                function = {"name": each["toolCallName"], "arguments": ""}
                found[0].setdefault("toolCalls", []).append(
                    {"id": each["toolCallId"], "type": "function", "function": function}
                )
        elif kind == "TEXT_MESSAGE_CONTENT":
            assert ("TEXT", part) in spans
            [message] = [message for message in messages if message["id"] == part]
            message["content"] += each["delta"]
        elif kind == "TOOL_CALL_ARGS":
            assert ("TOOL", part) in spans
            calls = [call for message in messages for call in message.get("toolCalls", [])]
            [call] = [call for call in calls if call["id"] == part]
            call["function"]["arguments"] += each["delta"]
        elif kind in ("STEP_FINISHED", "TEXT_MESSAGE_END", "TOOL_CALL_END"):
            spans.remove((kind[:4], part))
        elif kind == "TOOL_CALL_RESULT":
            at = len(messages)
            for place, message in enumerate(messages):
                if each["toolCallId"] in [call["id"] for call in message.get("toolCalls", [])]:
                    at = place + 1
                    while at < len(messages) and messages[at]["role"] == "tool":
                        at += 1
            result = {"id": each["messageId"], "role": "tool", "toolCallId": each["toolCallId"]}
            messages.insert(at, {**result, "content": each["content"]})
    assert ended
    return messages, state


@anyio
@pytest.mark.parametrize("messages", [None, [USER]])
@pytest.mark.parametrize("asked", [True, False])
async def test_who_joins_at_any_event_has_the_same_messages(backend_of, lane, messages, asked):
    events = EVENTS if asked else [STARTED, *EVENTS[1:]]
    async with backend_of() as backend:
        for count in range(len(events) + 1):
            eid, handle = await written(backend, lane, end=False)
            async with backend.open_writer(handle) as writer:
                log = ChunkWriter(writer)
                for each in events[:count]:
                    log.write(each)
                await writer.flush()
                framing = ag_ui.AgUiFraming(messages=messages)
                reading = web.events(backend, eid, framing=framing)
                joins = 0 < count < len(events)
                got = [await anext(reading)] if joins else []
                for each in events[count:]:
                    log.write(each)
                await writer.flush()
            await backend.complete(handle)
            got += [chunk async for chunk in reading]
            found = events_of(b"".join(got))
            # Where nobody has said what the conversation is, it is the client's own.
            known = asked or messages is not None
            assert applied(found) == (MESSAGES if known else MESSAGES[1:], {"b": 2}), count
            assert found[-1] == FINISHED
            assert (found[1]["type"] == "MESSAGES_SNAPSHOT") == known


def text_of(part, *deltas, role="assistant", end=True):
    yield {"type": "TEXT_MESSAGE_START", "messageId": part, "role": role}
    for delta in deltas:
        yield {"type": "TEXT_MESSAGE_CONTENT", "messageId": part, "delta": delta}
    if end:
        yield {"type": "TEXT_MESSAGE_END", "messageId": part}


def call_of(call, parent):
    named = {"toolCallId": call, "toolCallName": "look", "parentMessageId": parent}
    yield {"type": "TOOL_CALL_START", **named}
    yield {"type": "TOOL_CALL_ARGS", "toolCallId": call, "delta": "{"}
    yield {"type": "TOOL_CALL_ARGS", "toolCallId": call, "delta": "}"}
    yield {"type": "TOOL_CALL_END", "toolCallId": call}


def result_of(call):
    return {
        "type": "TOOL_CALL_RESULT",
        "messageId": f"r-{call}",
        "toolCallId": call,
        "content": "y",
    }


TOLD = {"id": "m0", "role": "assistant", "content": "Let me"}
STORIES = {
    "snapshot of the worker": [
        *text_of("m1", "a", "b"),
        {"type": "MESSAGES_SNAPSHOT", "messages": [USER, {**TOLD, "id": "m1", "content": "A"}]},
        *text_of("m2", "c", "d"),
        *call_of("c1", "m2"),
        result_of("c1"),
    ],
    "call of a message from before": [
        *call_of("c1", "m0"),
        *text_of("m1", "a"),
        result_of("c1"),
        *call_of("c2", "user"),
    ],
    "results of two calls behind a text": [
        *call_of("c1", "m1"),
        *call_of("c2", "m1"),
        *text_of("m2", "a"),
        result_of("c2"),
        result_of("c1"),
        *text_of("m3", "b"),
    ],
    "text of a message from before": [*text_of("m0", " see"), *text_of("m1", "a")],
}


@anyio
@pytest.mark.parametrize("story", STORIES)
async def test_who_joins_at_any_event_has_what_a_client_has_that_read_all(backend_of, lane, story):
    before = [{"id": "user", "role": "user", "content": "?"}, TOLD]
    started = {**STARTED, "input": {"messages": before}}
    events = [started, *STORIES[story]]
    wanted = applied([*events, FINISHED])
    async with backend_of() as backend:
        for count in range(1, len(events) + 1):
            eid, handle = await written(backend, lane, end=False)
            async with backend.open_writer(handle) as writer:
                log = ChunkWriter(writer)
                for each in events[:count]:
                    log.write(each)
                await writer.flush()
                reading = web.events(backend, eid, framing=ag_ui.AgUiFraming())
                got = [await anext(reading)]
                for each in events[count:]:
                    log.write(each)
                await writer.flush()
            await backend.complete(handle)
            got += [chunk async for chunk in reading]
            assert applied(events_of(b"".join(got))) == wanted, count


CHUNKED = [
    ASKED,
    {"type": "TEXT_MESSAGE_CHUNK", "messageId": "m1", "delta": "Hel"},
    {"type": "TEXT_MESSAGE_CHUNK", "delta": "lo"},
    {"type": "RAW", "event": {}},
    {"type": "TEXT_MESSAGE_CHUNK", "messageId": "m1", "delta": "!"},
    {"type": "TOOL_CALL_CHUNK", "toolCallId": "c1", "toolCallName": "look", "parentMessageId": "m1"},
    {"type": "TOOL_CALL_CHUNK", "toolCallId": "c1", "delta": "{"},
    {"type": "TOOL_CALL_CHUNK", "delta": "}"},
    result_of("c1"),
    {"type": "REASONING_MESSAGE_CHUNK", "messageId": "m2", "delta": "hm"},
    {"type": "TEXT_MESSAGE_CHUNK", "messageId": "m3", "role": "assistant", "delta": "Bye", "timestamp": 1},
]  # fmt: skip


@anyio
async def test_events_that_open_what_they_go_on_with_are_written_as_those_they_stand_for(
    backend_of, lane
):
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, CHUNKED, end=False)
        live = web.events(backend, eid, framing=ag_ui.AgUiFraming(messages=[]))
        got = await anext(live)
        await backend.complete(handle)
        got += b"".join([chunk async for chunk in live])
        document = json.loads((await backend.read_summary(eid, 0)).document_json)
    told = [
        json.loads(each) if isinstance(each, str) else each for each in document["log"].values()
    ]
    assert [(each["type"], each.get("delta")) for each in told] == [
        ("RUN_STARTED", None),
        ("TEXT_MESSAGE_START", None),
        ("TEXT_MESSAGE_CONTENT", "Hello!"),
        ("RAW", None),
        ("TEXT_MESSAGE_END", None),
        ("TOOL_CALL_START", None),
        ("TOOL_CALL_ARGS", "{}"),
        ("TOOL_CALL_END", None),
        ("TOOL_CALL_RESULT", None),
        ("REASONING_MESSAGE_START", None),
        ("REASONING_MESSAGE_CONTENT", "hm"),
        ("REASONING_MESSAGE_END", None),
        ("TEXT_MESSAGE_START", None),
        ("TEXT_MESSAGE_CONTENT", "Bye"),
    ]
    found = events_of(got)
    snapshot = found[1]["messages"]
    assert [(each["role"], each["content"]) for each in snapshot] == [
        ("assistant", "Hello!"), ("tool", "y"), ("reasoning", "hm"), ("assistant", "Bye"),
    ]  # fmt: skip
    assert snapshot[0]["toolCalls"][0]["function"] == {"name": "look", "arguments": "{}"}
    assert [each["type"] for each in found[2:]] == [
        "TEXT_MESSAGE_START", "RAW", "TEXT_MESSAGE_END", "RUN_FINISHED",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["TEXT_MESSAGE_CHUNK", "TOOL_CALL_CHUNK"])
def test_the_first_event_of_a_message_must_name_it(kind):
    with pytest.raises(InvalidInput, match="must have a"):
        ChunkWriter(None).write({"type": kind, "delta": "x"})


@anyio
async def test_frames_that_hold_events_need_no_log(backend_of, lane):
    frames = [f"data: {json.dumps(each)}\n\n".encode() for each in EVENTS]
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, frames)
        found = events_of(await body_of(backend, eid))
    assert applied(found) == (MESSAGES, {"b": 2})
    assert found[0] == ASKED


@anyio
async def test_each_event_has_the_id_of_its_place(backend_of, lane):
    frames = [json.dumps(each).encode() for each in EVENTS]
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, frames)
        events = EventSource().parse(await body_of(backend, eid))
        items = [item async for item in backend.follow(eid)]
    places = [item.cursor for item in items]
    # The first item is the start of the attempt; deltas that were joined have the id of the last one, and the last event
    # that of the end.
    joined = {places[4], places[10]}
    assert [each.id for each in events] == [
        place for place in places[1:] if place not in joined and place != places[-2]
    ]


@anyio
async def test_plain_text_is_a_message_of_a_run(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a\xe2\x82", b"\xacb"])
        app = Starlette(
            routes=[
                Route(
                    "/",
                    lambda request: ag_ui.run_response(
                        backend, eid, request, thread_id="t", run_id="r", text=True
                    ),
                )
            ]
        )
        client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")
        async with client:
            answer = await client.get("/")
            found = events_of(answer.content)
            # Whatever place a client names, it joins.
            place = EventSource().parse(answer.content)[2].id
            again = await client.get("/", headers={"last-event-id": place})
            assert events_of(again.content) == found
            bad = await client.get("/", headers={"last-event-id": "nonsense"})
            assert bad.status_code == 400
    assert found[0] == STARTED
    assert applied(found)[0] == [{"id": "text", "role": "assistant", "content": "a€b"}]
    assert found[-1] == {"type": "RUN_FINISHED", **RUN}


@anyio
async def test_what_is_cancelled_is_a_run_that_was_cancelled(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, EVENTS[:10], end=False)
        await backend.cancel(eid, reason="enough")
        found = events_of(await body_of(backend, eid))
    applied(found)
    assert found[-1] == {"type": "RUN_FINISHED", **RUN, "outcome": {"type": "cancelled"}}


@anyio
async def test_what_fails_is_an_error_with_its_reason(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, EVENTS, end=False)
        await backend.fail(handle, "no luck", FailureClass.PERMANENT)
        found = events_of(await body_of(backend, eid))
    applied(found)
    assert found[-1] == {"type": "RUN_ERROR", "message": "no luck", "code": "attempt_failure"}


@pytest.mark.parametrize("known", [True, False])
def test_a_new_attempt_takes_back_the_messages(server, raw, lane, known):
    events = EVENTS if known else [STARTED, *EVENTS[1:]]
    with World(server.url, raw, lane) as world:
        got, late = two_attempts_of(world, ag_ui.AgUiFraming, events[:10], events)
    assert applied(events_of(late))[0] == (MESSAGES if known else MESSAGES[1:])
    found = events_of(got)
    told, state = applied(found)
    if known:
        assert (told, state) == (MESSAGES, {"b": 2})
    else:
        assert found[-1]["code"] == "producer_lost"


def test_a_gap_is_filled_from_the_document_or_is_an_error():
    framing = ag_ui.AgUiFraming()
    log = {"0": json.dumps(STARTED), "1": json.dumps(M1)}
    delta = {"type": "TEXT_MESSAGE_CONTENT", "messageId": "m1", "delta": "Hello"}
    first = framing.items([Snapshot(json.dumps({"log": log}).encode(), 2, 0, "0.1-2")])
    assert framing.items([Gap(3, 9, "fell_behind", "0.1-8")]) == b""
    assert framing.rejoin
    framing.rejoin = False
    log["2"] = delta
    rest = framing.items([Snapshot(json.dumps({"log": log}).encode(), 9, 0, "0.1-9")])
    assert events_of(first + rest) == [STARTED, M1, delta]
    framing = ag_ui.AgUiFraming()
    framing.items([AttemptStarted(0, "0.0-0")])
    end = End("attempt_success", "0.1-9", "success")
    found = events_of(framing.items([Gap(1, 9, "trimmed", "0.1-8"), end]))
    assert [(each["type"], each["code"]) for each in found] == [("RUN_ERROR", "gap")]
    assert framing.over
