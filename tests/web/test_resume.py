"""A response that is cut anywhere, and asked for again from the last id that its client has got, loses and doubles nothing."""

import pytest

from ff_fast import FailureClass, PatchKind, RetryPolicy, StreamMode, TailVisibility, web
from tests.server.executions import World
from tests.web.sites import EventSource, stream_of, text_of
from tests.web.test_stream_response import client_of

pytestmark = pytest.mark.anyio

TEXT = "a€\r\n😀é\nb\n\n\0 \U0010ffff: id: 9\ndata: x\n\n"


@pytest.fixture
def anyio_backend():
    return "asyncio"


def pieces(text, size):
    raw = text.encode()
    return [raw[at : at + size] for at in range(0, len(raw), size)]


async def cut_everywhere(client, url):
    """Read *url*, then cut what came at every byte, and go on from there; every time the same must have come."""
    whole = (await client.get(url)).content
    events = EventSource().parse(whole)
    rests = {}
    for cut in range(len(whole) + 1):
        source = EventSource()
        got = source.parse(whole[:cut])
        if source.last_id not in rests:
            answer = await client.get(url, headers={"last-event-id": source.last_id})
            rests[source.last_id] = EventSource().parse(answer.content)
        assert [(each.event, each.data) for each in [*got, *rests[source.last_id]]] == [
            (each.event, each.data) for each in events
        ], (cut, source.last_id)
    return events


@pytest.mark.parametrize("size", [1, 2, 3, 5, 1000])
async def test_a_cut_at_any_byte_loses_and_doubles_no_character(backend_of, lane, size):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, pieces(TEXT, size))
        async with client_of(backend) as client:
            events = await cut_everywhere(client, f"/{eid}")
    assert text_of(events) == TEXT.replace("\r\n", "\n")


async def test_json_data_keeps_every_line_ending(backend_of, lane):
    text = TEXT + "\r\r\n"
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, pieces(text, 3))
        async with client_of(backend, framing=lambda: web.EventFraming(data="json")) as client:
            events = await cut_everywhere(client, f"/{eid}")
    assert "".join(each.json for each in events if each.event == "message") == text


async def test_a_type_cannot_pass_for_another_event(backend_of, lane):
    frames = [(b"1", "end"), (b"2", "reasoning"), (b"3", "error")]
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, frames)
        async with client_of(backend, framing=lambda: web.EventFraming(types=True)) as client:
            events = await cut_everywhere(client, f"/{eid}")
    assert [each.event for each in events] == [
        "attempt", "frame-end", "reasoning", "frame-error", "end",
    ]  # fmt: skip


async def test_a_second_attempt_is_told_of_and_resumed(backend_of, server, raw, lane):
    with World(server.url, raw, lane) as world:
        eid, handle = world.owned(retry=RetryPolicy(1, delay=0))
        with world.backend.open_writer(handle) as writer:
            writer.write(b"first\xe2")
        world.backend.fail(handle, "no luck", FailureClass.TRANSIENT)
        world.fire(eid, "delay")
        handle = world.claim()
        with world.backend.open_writer(handle) as writer:
            writer.write(b"second")
        world.backend.complete(handle)
    async with backend_of() as backend, client_of(backend) as client:
        events = await cut_everywhere(client, f"/{eid}")
    assert [each.event for each in events] == [
        "attempt", "message", "message", "attempt", "message", "end",
    ]  # fmt: skip
    assert text_of(events) == "first\ufffdsecond"
    assert [each.json["attempt_index"] for each in events if each.event == "attempt"] == [0, 1]


async def test_frames_that_were_trimmed_are_a_gap(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(
            backend, lane, [b"%d " % i for i in range(400)], retention_maxlen=10
        )
        async with client_of(backend) as client:
            events = await cut_everywhere(client, f"/{eid}")
            second = await client.get(f"/{eid}", headers={"last-event-id": events[0].id})
            assert EventSource().parse(second.content) == events[1:]
    gap = events[1]
    assert (gap.event, gap.json["reason"], gap.json["first_missing"]) == ("gap", "trimmed", 1)
    assert len(text_of(events).split()) == 401 - gap.json["next_sequence"]


@pytest.mark.parametrize("cursor", ["7.1-1", "0.1-1", "0.1-9007199254740991", "4294967295.0-0"])
async def test_a_forged_place_gets_the_stream_and_is_told_of_what_does_not_fit(
    backend_of, lane, cursor
):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"a", b"b"])
        async with client_of(backend) as client:
            answer = await client.get(f"/{eid}", headers={"last-event-id": cursor})
    assert answer.status_code == 200
    events = EventSource().parse(answer.content)
    assert events[-1].event == "end"
    assert text_of(events) in ("ab", "b", "")
    if text_of(events) != "b":
        assert any(each.event in ("gap", "attempt") for each in events)


async def test_a_late_joiner_begins_with_the_document(backend_of, lane):
    mode = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"Hello ", b"world"], mode=mode)
        async with client_of(backend, framing=lambda: web.EventFraming(snapshot=True)) as client:
            events = await cut_everywhere(client, f"/{eid}")
    assert [each.event for each in events] == ["snapshot", "end"]
    assert events[0].json == {"attempt_index": 0, "version": 2, "document": {"text": "Hello world"}}


async def test_best_effort_frames_can_be_left_out(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await stream_of(backend, lane, [b"kept"], end=False)
        async with backend.open_writer(handle) as writer:
            writer.write(b"live", mode=StreamMode.best_effort_live(15_000))
            writer.write(b" too")
        await backend.complete(handle)
        async with client_of(backend, visibility=TailVisibility.EXCLUDE_BEST_EFFORT) as client:
            events = await cut_everywhere(client, f"/{eid}")
    assert text_of(events) == "kept too"


async def test_text_that_is_framed_already_gets_the_id_of_its_place(backend_of, lane):
    frames = [
        b"data: 1\n\n",
        b"data: 2\n\ndata: 3\n\n",
        b"event: x\nda",
        b"ta: 4\n\n",
        b"data: [DONE]\n\n",
    ]
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, frames)
        async with client_of(backend, framing=web.Passthrough) as client:
            whole = (await client.get(f"/{eid}")).content
            events = EventSource().parse(whole)
            assert [each.data for each in events] == ["1", "2", "3", "4", "[DONE]"]
            for cut in range(len(whole)):
                source = EventSource()
                got = source.parse(whole[:cut])
                answer = await client.get(f"/{eid}", headers={"last-event-id": source.last_id})
                rest = EventSource().parse(answer.content)
                # Two events of one frame may come twice; none is lost.
                again = len(got) + len(rest) - len(events)
                assert again in (0, 1)
                assert [each.data for each in [*got[: len(got) - again], *rest]] == [
                    each.data for each in events
                ]
        async with client_of(backend, framing=lambda: web.Passthrough(ids=False)) as client:
            assert (await client.get(f"/{eid}")).content == b"".join(frames)


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b"\r"])
async def test_text_that_is_framed_already_has_lines_of_any_kind(backend_of, lane, line):
    frames = [b"event: x\n", b"data: 1\n", b"data: 2\n\n", b"data: 3\n\ndata: 4\n\n"]
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [each.replace(b"\n", line) for each in frames])
        async with client_of(backend, framing=web.Passthrough) as client:
            whole = (await client.get(f"/{eid}")).content
    events = EventSource().parse(whole)
    assert [(each.event, each.data) for each in events] == [
        ("x", "1\n2"), ("message", "3"), ("message", "4"),
    ]  # fmt: skip
    # One id for what completes an event, and none for what does not.
    assert whole.count(b"id: ") == 2
    assert [each.id.rpartition("-")[2] for each in events] == ["3", "3", "4"]


async def test_half_an_event_of_an_attempt_that_is_left_is_none(backend_of, server, raw, lane):
    with World(server.url, raw, lane) as world:
        eid, handle = world.owned(retry=RetryPolicy(1, delay=0))
        with world.backend.open_writer(handle) as writer:
            writer.write(b'data: {"a": 1}\n\n')
            writer.write(b'data: {"b": ')
        world.backend.fail(handle, "no luck", FailureClass.TRANSIENT)
        world.fire(eid, "delay")
        handle = world.claim()
        with world.backend.open_writer(handle) as writer:
            writer.write(b'data: {"c": 3}\n\n')
        world.backend.complete(handle)
    async with backend_of() as backend, client_of(backend, framing=web.Passthrough) as client:
        events = EventSource().parse((await client.get(f"/{eid}")).content)
    assert [each.json for each in events] == [{"a": 1}, {"c": 3}]


async def test_messages_alone_end_with_the_word_that_was_asked_for(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b'{"a":1}', b'{"b":2}'])
        async with client_of(backend, framing=lambda: web.DataFraming(done=b"[DONE]")) as client:
            events = await cut_everywhere(client, f"/{eid}")
    assert [(each.event, each.data) for each in events] == [
        ("message", '{"a":1}'),
        ("message", '{"b":2}'),
        ("message", "[DONE]"),
    ]
