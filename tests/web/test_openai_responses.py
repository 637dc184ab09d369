"""The reading side of OpenAI's Responses API: numbers, places, restarts, ends and errors."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from ff_fast import FailureClass, Gap, InvalidInput, RetryPolicy, StreamMode, keys, web
from ff_fast.errors import Unavailable
from ff_fast.web import openai_responses
from ff_fast.web.openai_responses import ResponsesFraming, TextResponse
from tests.server.executions import World
from tests.web.sites import WORKER, EventSource, stream_of

pytestmark = pytest.mark.anyio

TEXT = ["Hel", "lo, ", "wörld 😀", "\r\n", '"quoted"\n\n']
KINDS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    *["response.output_text.delta"] * len(TEXT),
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


@pytest.fixture
def anyio_backend():
    return "asyncio"


def client_of(backend, *of, **options):
    routes = openai_responses.routes(backend, *of, **options)
    app = Starlette(routes=[Mount("/v1", routes=routes)])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test/v1")


def path_of(eid, **query):
    return str(httpx.URL(f"/responses/{openai_responses.response_id(eid)}", params=query))


def parse(answer):
    assert answer.status_code == 200, answer.content
    events = EventSource().parse(answer.content)
    assert all(each.event == each.json["type"] and not each.id for each in events)
    return [each.json for each in events]


async def events_after(client, eid, number=None):
    query = {} if number is None else {"starting_after": number}
    return parse(await client.get(path_of(eid, stream="true", **query)))


async def answered(backend, lane, pieces=TEXT, *, end=True):
    eid, handle = await stream_of(backend, lane, end=False)
    async with backend.open_writer(handle) as writer:
        answer = TextResponse(writer.write, openai_responses.response_id(eid), model="m")
        for piece in pieces:
            answer.delta(piece)
        if end:
            answer.complete(usage={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3})
        await writer.flush()
    if end:
        await backend.complete(handle)
    return eid, handle


def text_of(events):
    return "".join(each["delta"] for each in events if each["type"].endswith("text.delta"))


async def test_a_text_answer_has_the_events_of_the_api_numbered_from_zero(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await answered(backend, lane)
        events = await events_after(client, eid)
    assert [each["type"] for each in events] == KINDS
    assert [each["sequence_number"] for each in events] == list(range(len(events)))
    assert text_of(events) == "".join(TEXT)
    response = events[-1]["response"]
    assert response["id"] == openai_responses.response_id(eid)
    assert (response["status"], response["model"]) == ("completed", "m")
    assert response["output"][0]["content"][0]["text"] == "".join(TEXT)
    assert response["usage"]["total_tokens"] == 3


async def test_a_client_goes_on_after_any_number(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await answered(backend, lane)
        events = await events_after(client, eid)
        for number in range(len(events) + 2):
            assert await events_after(client, eid, number) == events[number + 1 :]


async def test_a_reader_gets_what_is_written_while_it_reads(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, handle = await stream_of(backend, lane, end=False)
        reading = asyncio.ensure_future(events_after(client, eid, 5))
        async with backend.open_writer(handle) as writer:
            answer = TextResponse(writer.write, "resp_1")
            for piece in TEXT:
                answer.delta(piece)
                await writer.flush()
            answer.complete()
        await backend.complete(handle)
        events = await reading
    assert [each["type"] for each in events] == KINDS[6:]
    assert [each["sequence_number"] for each in events] == list(range(6, len(KINDS)))


async def test_a_number_ahead_of_the_stream_waits_for_what_follows_it(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, handle = await answered(backend, lane, end=False)
        reading = asyncio.ensure_future(events_after(client, eid, 11))
        async with backend.open_writer(handle) as writer:
            for _ in range(6):
                writer.write(b'{"type":"response.output_text.delta","delta":"."}')
        await backend.complete(handle)
        events = await reading
    assert [each["sequence_number"] for each in events] == [12, 13, 14, 15]
    assert events[-1]["type"] == "response.completed"


async def test_numbers_that_the_worker_wrote_are_replaced(backend_of, lane):
    frames = [
        b'{"type":"response.created","sequence_number":7,"response":{"id":"resp_x"}}',
        (
            b'{"sequence_number":9,"type":"response.output_text.delta"}',
            "response.output_text.delta",
        ),
        b'{\n "type": "response.output_text.delta"}',
    ]
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(backend, lane, frames)
        events = await events_after(client, eid)
    assert [each["sequence_number"] for each in events] == [0, 1, 2, 3]
    assert events[-1]["response"]["id"] == "resp_x"


async def test_frames_that_are_no_events_are_left_out(backend_of, lane):
    frames = [
        b"text",
        b"[]",
        b"{}",
        b'{"type":1}',
        (b"", "response.x"),
        (b"{}", "response.x"),
        b'{"type":"a"}',
    ]
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(backend, lane, frames)
        events = await events_after(client, eid)
        whole = (await client.get(path_of(eid))).json()
    assert [(each["type"], each["sequence_number"]) for each in events] == [
        ("a", 6), ("response.completed", 7),
    ]  # fmt: skip
    assert (whole["status"], whole["output"]) == ("completed", [])


async def test_a_cancellation_ends_the_stream_and_comes_once(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await answered(backend, lane, end=False)
        reading = asyncio.ensure_future(events_after(client, eid))
        stopped = await client.post(f"{path_of(eid)}/cancel")
        assert (stopped.status_code, stopped.json()["status"]) == (200, "cancelled")
        events = await reading
        last = events[-1]
        assert (last["type"], last["response"]["status"]) == ("response.failed", "cancelled")
        assert last["sequence_number"] == len(events) - 1
        assert last["response"]["model"] == "m"
        assert await events_after(client, eid, len(events) - 2) == [
            {**last, "response": {**last["response"], "model": "", "created_at": pytest.approx(last["response"]["created_at"], abs=30)}},
        ]  # fmt: skip
        assert await events_after(client, eid, len(events) - 1) == []
        again = await client.post(f"{path_of(eid)}/cancel")
        assert again.json() == stopped.json() == (await client.get(path_of(eid))).json()
        assert text_of(events) == "".join(TEXT)
        assert again.json()["output"][0]["content"][0]["text"] == "".join(TEXT)


async def test_a_completed_response_stays_so_when_it_is_cancelled(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await answered(backend, lane)
        stopped = await client.post(f"{path_of(eid)}/cancel")
    assert stopped.json()["status"] == "completed"


async def test_a_failure_is_a_failed_response(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, handle = await answered(backend, lane, end=False)
        await backend.fail(handle, "no luck", FailureClass.PERMANENT)
        last = (await events_after(client, eid))[-1]
        whole = (await client.get(path_of(eid))).json()
    assert last["type"] == "response.failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "no luck"}
    assert (whole["status"], whole["error"]) == ("failed", last["response"]["error"])


async def test_the_json_of_a_response_follows_its_states(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid = await backend.create_execution(lane=lane)
        whole = (await client.get(path_of(eid))).json()
        assert (whole["status"], whole["output"]) == ("queued", [])
        assert whole["id"] == openai_responses.response_id(eid)
        handle = await backend.claim(lane=lane, **WORKER)
        async with backend.open_writer(handle) as writer:
            answer = TextResponse(writer.write, whole["id"], model="m")
            answer.delta("Hel")
            answer.delta("lo")
            await writer.flush()
            whole = (await client.get(path_of(eid, stream="false"))).json()
            assert (whole["status"], whole["model"]) == ("in_progress", "m")
            assert whole["output"][0]["content"][0]["text"] == "Hello"
            answer.complete(incomplete="max_output_tokens")
            answer.complete()
        await backend.complete(handle)
        whole = (await client.get(path_of(eid))).json()
    assert (whole["status"], whole["incomplete_details"]) == (
        "incomplete", {"reason": "max_output_tokens"},
    )  # fmt: skip
    assert whole["output"][0]["content"][0]["text"] == "Hello"


async def test_output_of_other_kinds_adds_up(backend_of, lane):
    call = {"type": "function_call", "id": "fc", "call_id": "c", "name": "f", "arguments": ""}
    events = [
        {"type": "response.output_item.added", "output_index": 1, "item": call},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": '{"a":'},
        {"type": "response.function_call_arguments.delta", "output_index": 1, "delta": "1}"},
        {"type": "response.output_item.added", "output_index": 0, "item": {"type": "reasoning", "content": []}},
        {"type": "response.content_part.added", "output_index": 0, "content_index": 0, "part": {"text": ""}},
        {"type": "response.reasoning_text.delta", "output_index": 0, "content_index": 0, "delta": "hm"},
        {"type": "response.output_text.delta", "output_index": 0, "content_index": 3, "delta": "lost"},
        {"type": "response.output_text.delta", "output_index": 9, "content_index": 0, "delta": "lost"},
    ]  # fmt: skip
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await stream_of(
            backend, lane, [json.dumps(each).encode() for each in events], end=False
        )
        output = (await client.get(path_of(eid))).json()["output"]
    assert output == [
        {"type": "reasoning", "content": [{"text": "hm"}]},
        {**call, "arguments": '{"a":1}'},
    ]


async def trimmed(backend, lane, *, end=True):
    eid, handle = await stream_of(backend, lane, end=False)
    async with backend.open_writer(handle, retention_maxlen=10) as writer:
        answer = TextResponse(writer.write, "resp_1")
        for index in range(400):
            answer.delta(f"{index} ")
        if end:
            answer.complete()
        await writer.flush()
    if end:
        await backend.complete(handle)
    return eid


@pytest.mark.parametrize("number", [None, 0, 17])
async def test_events_that_are_not_kept_any_more_are_refused(backend_of, lane, number):
    async with backend_of() as backend, client_of(backend) as client:
        eid = await trimmed(backend, lane)
        query = {} if number is None else {"starting_after": number}
        answer = await client.get(path_of(eid, stream="true", **query))
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert (error["type"], error["code"], error["param"]) == (
            "invalid_request_error", openai_responses.TRIMMED, None,
        )  # fmt: skip
        assert len(await events_after(client, eid, 405)) == 2
        whole = (await client.get(path_of(eid))).json()
    assert whole["output"][0]["content"][0]["text"].endswith("399 ")


async def test_a_text_with_a_hole_is_not_shown_as_a_whole(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid = await trimmed(backend, lane, end=False)
        whole = (await client.get(path_of(eid))).json()
    assert (whole["status"], whole["output"]) == ("in_progress", [])


async def test_a_gap_in_the_middle_ends_the_stream_with_an_error():
    framing = ResponsesFraming("resp_1")
    events = EventSource().parse(framing.items([Gap(1, 3, "fell_behind")]))
    assert [(each.event, each.json["code"]) for each in events] == [
        ("error", openai_responses.TRIMMED)
    ]
    assert framing.over


@pytest.mark.parametrize(
    "number", ["-1", "x", "1.5", "9" * 30, "9" * 5_000, str(2**53 - 1), "٣", "1_0", " 1"]
)
async def test_a_number_that_is_none_is_refused(backend_of, lane, number):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await answered(backend, lane)
        answer = await client.get(path_of(eid, stream="true", starting_after=number))
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


async def test_a_client_goes_on_behind_a_read_that_has_failed(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, _ = await answered(backend, lane)
        whole = await events_after(client, eid)
        frames = list(await backend.read_stream(eid))
        for count in range(len(frames) + 1):
            framing = ResponsesFraming("resp_1")
            read = framing.items(frames[:count]) + framing.failed(Unavailable())
            events = EventSource().parse(read)
            # Nothing is lost for a client that goes on behind the last number that it has seen.
            numbers = [each.json["sequence_number"] for each in events]
            rest = await events_after(client, eid, numbers[-1] if numbers else None)
            assert [each.json for each in events[:count]] + rest == whole
            assert [each.event for each in events[count:]] == ["error"] * (count > 0)


@pytest.mark.parametrize("query", [{}, {"stream": "true"}, {"stream": "true", "starting_after": 3}])
async def test_an_unknown_response_is_404(backend_of, lane, query):
    async with backend_of() as backend, client_of(backend) as client:
        eid = keys.execution_id_for("nobody", namespace=lane)
        for path in (path_of(eid, **query), "/responses/resp_x"):
            answer = await client.get(path)
            assert answer.status_code == 404
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
        assert (await client.post(f"{path_of(eid)}/cancel")).status_code == 404


async def test_who_may_not_read_gets_403_in_the_form_of_the_api(backend_of, lane):
    key = b"k" * 32
    async with backend_of() as backend, client_of(backend, token_key=key) as client:
        eid, _ = await answered(backend, lane)
        for path in (path_of(eid), path_of(eid, stream="true")):
            answer = await client.get(path)
            assert answer.status_code == 403
            assert answer.json()["error"]["type"] == "invalid_request_error"
            token = web.stream_token(key, eid)
            answer = await client.get(path, headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == 200
        answer = await client.post(
            f"{path_of(eid)}/cancel", headers={"authorization": f"Bearer {token}"}
        )
        assert answer.status_code == 403


async def test_named_streams_are_responses_under_their_names(backend_of, lane):
    async with backend_of() as backend:

        def execution_id(name):
            return backend.execution_id_for(name, namespace=lane)

        async with client_of(backend, execution_id) as client:
            async with backend.open_stream("resp_1", namespace=lane) as stream:
                answer = TextResponse(stream.write, "resp_1")
                answer.delta("Hi")
                answer.complete()
            whole = (await client.get("/responses/resp_1")).json()
            events = parse(await client.get("/responses/resp_1?stream=true&starting_after=3"))
            assert (await client.get("/responses/resp_2")).status_code == 404
            assert (await client.get("/responses/%00")).status_code == 404
    assert (whole["id"], whole["output"][0]["content"][0]["text"]) == ("resp_1", "Hi")
    assert text_of(events) == "Hi"


class Retried:
    """An execution of two attempts."""

    def __init__(self, server, raw, lane):
        self.world = World(server.url, raw, lane)
        self.eid, self.handle = self.world.owned(retry=RetryPolicy(1, delay=0))

    def write(self, text, *, complete=False):
        with self.world.backend.open_writer(self.handle) as writer:
            answer = TextResponse(writer.write, "resp_1")
            answer.delta(text)
            if complete:
                answer.complete()
            writer.flush()

    def again(self):
        self.world.backend.fail(self.handle, "no luck", FailureClass.TRANSIENT)
        self.world.fire(self.eid, "delay")
        self.handle = self.world.claim()


async def test_a_restart_is_told_and_never_mixed(backend_of, server, raw, lane):
    retried = Retried(server, raw, lane)
    with retried.world as world:
        retried.write("lost")
        async with backend_of() as backend, client_of(backend) as client:
            reading = asyncio.ensure_future(events_after(client, retried.eid))
            await asyncio.sleep(0)
            await asyncio.to_thread(retried.again)
            retried.write("kept", complete=True)
            world.backend.complete(retried.handle)
            # Whether it began before the restart or after it, it got the events of one attempt.
            first = await reading
            assert text_of(first) in ("lost", "kept")
            # Who begins anew gets the new attempt, and its numbers go on.
            events = await events_after(client, retried.eid)
            assert text_of(events) == "kept"
            assert [each["sequence_number"] for each in events] == list(range(6, 15))
            for number in range(5):
                answer = await client.get(
                    path_of(retried.eid, stream="true", starting_after=number)
                )
                assert answer.status_code == 400
                assert answer.json()["error"]["code"] == openai_responses.RESTARTED
            for number in range(5, 16):
                assert await events_after(client, retried.eid, number) == [
                    each for each in events if each["sequence_number"] > number
                ]


async def test_a_reader_of_the_first_attempt_is_told_that_another_one_has_begun(
    backend_of, server, raw, lane
):
    retried = Retried(server, raw, lane)
    with retried.world as world:
        retried.write("lost")
        async with backend_of() as backend:
            # As a response does that began in the first attempt.
            framing = ResponsesFraming("resp_1", starting_after=3)
            chunks = web.events(backend, retried.eid, after="0.0-4", framing=framing)
            got = await anext(chunks)
            await asyncio.to_thread(retried.again)
            retried.write("kept", complete=True)
            world.backend.complete(retried.handle)
            async for chunk in chunks:
                got += chunk
    events = [each.json for each in EventSource().parse(got)]
    assert [(each["type"], each["sequence_number"]) for each in events] == [
        ("response.output_text.delta", 4),
        ("error", 5),
    ]
    assert events[-1]["code"] == openai_responses.RESTARTED
    assert not chunks.finished


async def test_an_attempt_that_has_streamed_nothing_is_no_restart(backend_of, server, raw, lane):
    retried = Retried(server, raw, lane)
    with retried.world as world:
        async with backend_of() as backend, client_of(backend) as client:
            reading = asyncio.ensure_future(events_after(client, retried.eid))
            await asyncio.sleep(0)
            await asyncio.to_thread(retried.again)
            retried.write("kept", complete=True)
            world.backend.complete(retried.handle)
            events = await reading
            assert text_of(events) == "kept"
            assert [each["sequence_number"] for each in events] == list(range(1, 10))
            assert await events_after(client, retried.eid) == events


async def test_deltas_may_be_best_effort(backend_of, lane):
    async with backend_of() as backend, client_of(backend) as client:
        eid, handle = await stream_of(backend, lane, end=False)
        async with backend.open_writer(handle) as writer:

            def write(payload, *, frame_type):
                live = frame_type == "response.output_text.delta"
                mode = StreamMode.best_effort_live(15_000) if live else None
                writer.write(payload, frame_type=frame_type, mode=mode)

            answer = TextResponse(write, "resp_1")
            for piece in TEXT:
                answer.delta(piece)
            answer.complete()
        await backend.complete(handle)
        events = await events_after(client, eid)
    assert [each["type"] for each in events] == KINDS
    assert [each["sequence_number"] for each in events] == list(range(len(KINDS)))
    assert text_of(events) == "".join(TEXT)


def test_what_is_written_behind_the_end_is_refused():
    answer = TextResponse(lambda payload, **options: None, "resp_1")
    answer.complete()
    with pytest.raises(InvalidInput, match="complete"):
        answer.delta("x")
