"""The UI message stream: what a client of the AI SDK gets, joins and stops."""

import asyncio
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

import ff_fast
from ff_fast import (
    FailureClass,
    InvalidInput,
    PatchKind,
    RetryPolicy,
    StreamFrame,
    StreamMode,
    keys,
    web,
)
from ff_fast.types import AttemptStarted, End, Gap, Snapshot
from ff_fast.web import ai_sdk
from ff_fast.web.chunk_log import ChunkWriter
from tests.server.executions import World
from tests.waiting import wait_until_async
from tests.web.sites import WORKER, stream_of
from tests.web.test_stream_response import UNKNOWN

anyio = pytest.mark.anyio

START = [
    {"type": "start", "messageId": "m1"},
    {"type": "start-step"},
    {"type": "text-start", "id": "a"},
]
STOP = [{"type": "text-end", "id": "a"}, {"type": "finish-step"}]
FINISH = {"type": "finish", "finishReason": "stop"}
CHUNKS = [
    *START,
    *({"type": "text-delta", "id": "a", "delta": text} for text in ("He", "€l", "l\no")),
    *STOP,
    FINISH,
]
TEXT = {"type": "text-delta", "id": "a", "delta": "He€ll\no"}
APPEND = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))


@pytest.fixture
def anyio_backend():
    return "asyncio"


def sse(chunk):
    return f"data: {json.dumps(chunk)}\n\n"


def chunks_of(raw):
    """The chunks of a body; the mark of the end is a string."""
    assert raw.endswith(b"data: [DONE]\n\n")
    found = []
    for event in raw.decode().split("\n\n")[:-1]:
        if not event.startswith(":"):
            data = event.removeprefix("data: ")
            found.append(data if data == "[DONE]" else json.loads(data))
    return found[:-1]


def joined(chunks):
    """*chunks* with the deltas of one part that follow each other in one."""
    out = []
    for chunk in chunks:
        last = out[-1] if out else {}
        if "delta" in chunk and (last.get("type"), last.get("id")) == (chunk["type"], chunk["id"]):
            out[-1] = {**last, "delta": last["delta"] + chunk["delta"]}
        else:
            out.append(chunk)
    return out


async def written(backend, lane, chunks=(), *, end=True, **options):
    """An execution whose worker has written *chunks*."""
    eid = await backend.create_execution(lane=lane, payload=b"p", **options)
    handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
    async with backend.open_writer(handle) as writer:
        log = ChunkWriter(writer)
        for chunk in chunks:
            log.write(chunk)
        await writer.flush()
    if end:
        await backend.complete(handle)
    return eid, handle


async def body_of(backend, eid, **options):
    framing = ai_sdk.AiSdkFraming(**options)
    return b"".join([chunk async for chunk in web.events(backend, eid, framing=framing)])


def told_in(raw):
    """The text and the reasoning in a body."""
    told = {"text": "", "reasoning": ""}
    for each in chunks_of(raw):
        if "delta" in each:
            told[each["type"].removesuffix("-delta")] += each["delta"]
    return told["text"], told["reasoning"]


def client_of(backend, found, **options):
    async def send(request):
        return ai_sdk.message_response(backend, found["chat"], request)

    routes = ai_sdk.routes(backend, lambda request, chat: found.get(chat), **options)
    app = Starlette(routes=[*routes, Route("/api/chat", send, methods=["POST"])])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


# -- what is sent -------------------------------------------------------------------------------------------------------


@anyio
async def test_a_late_joiner_gets_each_part_with_one_delta(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, CHUNKS)
        assert chunks_of(await body_of(backend, eid)) == [*START, TEXT, *STOP, FINISH]
        document = json.loads((await backend.read_summary(eid, 0)).document_json)
    assert document["log"]["3"] == TEXT


@anyio
@pytest.mark.parametrize("text", ["a\u2028data: x", "a\x85: b", "x\x0cid: 1", "\u2029retry: 5"])
async def test_ends_of_lines_that_json_may_hold_end_no_line(backend_of, lane, text):
    delta = {"type": "text-delta", "id": "a", "delta": text.replace("\x0c", "")}
    raw = json.dumps(delta, ensure_ascii=False)
    async with backend_of() as backend:
        for form in (raw, f"data: {raw}\n\n", f"event: x\rdata: {raw}\r\r: y\r\r"):
            eid, _ = await written(backend, lane, [*START, form, *STOP])
            assert delta in chunks_of(await body_of(backend, eid))
            frames = [json.dumps(START[0]), json.dumps(START[2]), form]
            eid, _ = await stream_of(backend, lane, frames)
            assert delta in chunks_of(await body_of(backend, eid))


@anyio
@pytest.mark.parametrize("form", [sse, json.dumps, dict, lambda chunk: sse(chunk).encode()])
async def test_chunks_are_taken_in_every_form_that_an_encoder_makes(backend_of, lane, form):
    async with backend_of() as backend:
        eid, _ = await written(
            backend, lane, [*map(form, CHUNKS), "data: [DONE]\n\n", ": keep-alive\n\n"]
        )
        assert chunks_of(await body_of(backend, eid)) == [*START, TEXT, *STOP, FINISH]


@anyio
@pytest.mark.parametrize("form", [sse, json.dumps])
async def test_frames_that_hold_chunks_need_no_log(backend_of, lane, form):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [form(chunk).encode() for chunk in CHUNKS])
        assert chunks_of(await body_of(backend, eid)) == [*START, TEXT, *STOP, FINISH]


@anyio
async def test_who_joins_at_any_chunk_gets_the_same_message(backend_of, lane):
    """As a client that reads while the worker writes, for every number of chunks that were written when it came."""
    async with backend_of() as backend:
        for count in range(len(CHUNKS)):
            eid, handle = await written(backend, lane, CHUNKS[:0], end=False)
            async with backend.open_writer(handle) as writer:
                log = ChunkWriter(writer)
                for chunk in CHUNKS[:count]:
                    log.write(chunk)
                await writer.flush()
                reading = web.events(backend, eid, framing=ai_sdk.AiSdkFraming())
                got = [await anext(reading)] if count else []
                for chunk in CHUNKS[count:]:
                    log.write(chunk)
                await writer.flush()
            await backend.complete(handle)
            got += [chunk async for chunk in reading]
            assert joined(chunks_of(b"".join(got))) == [*START, TEXT, *STOP, FINISH], count


@anyio
async def test_parts_that_alternate_keep_their_texts(backend_of, lane):
    parts = [
        {"type": "reasoning-start", "id": "r"},
        {"type": "text-start", "id": "a"},
        {"type": "reasoning-delta", "id": "r", "delta": "1"},
        {"type": "text-delta", "id": "a", "delta": "x"},
        {"type": "reasoning-delta", "id": "r", "delta": "2"},
        {"type": "text-delta", "id": "a", "delta": "y"},
        {"type": "reasoning-end", "id": "r"},
        {"type": "text-end", "id": "a"},
        # An id that names another part.
        {"type": "text-start", "id": "a"},
        {"type": "text-delta", "id": "a", "delta": "z"},
        {"type": "tool-input-start", "toolCallId": "t", "toolName": "n"},
        {"type": "tool-input-delta", "toolCallId": "t", "inputTextDelta": '{"a":'},
        {"type": "tool-input-delta", "toolCallId": "t", "inputTextDelta": "null}"},
        {"type": "tool-input-available", "toolCallId": "t", "toolName": "n", "input": {"a": None}},
    ]
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, [*START[:2], *parts])
        got = chunks_of(await body_of(backend, eid))
    assert got == [
        *START[:2],
        *parts[:2],
        {**parts[2], "delta": "12"},
        {**parts[3], "delta": "xy"},
        *parts[6:11],
        {**parts[11], "inputTextDelta": '{"a":null}'},
        parts[13],
        {"type": "text-end", "id": "a"},
        {"type": "finish"},
    ]


@anyio
@pytest.mark.parametrize(
    "delta", ["__ff_null__", "_", "__ff_null", '\0"\\', "x" * 100_000, "€" * 30_000, "😀" * 20_000]
)
async def test_a_delta_of_any_text_and_size_comes_unchanged(backend_of, lane, delta):
    chunks = [*START, *[{"type": "text-delta", "id": "a", "delta": text} for text in (delta, "__")]]
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, chunks)
        got = chunks_of(await body_of(backend, eid))
    assert "".join(each.get("delta", "") for each in got) == delta + "__"


class Kept:
    """A writer that keeps what it is given."""

    def __init__(self):
        self.frames = []

    def write(self, payload, kind, *, mode):
        self.frames.append((payload, kind, mode))


def frames_of(chunks):
    kept = Kept()
    log = ChunkWriter(kept)
    for chunk in chunks:
        log.write(chunk)
    return kept.frames


OUTPUT = {"type": "tool-output-available", "toolCallId": "t", "output": "é\n" * 10_000}


@anyio
async def test_who_joins_in_the_middle_of_a_chunk_gets_it_whole(backend_of, lane):
    """A chunk that no frame can hold is kept in pieces."""
    chunks = [*START, TEXT, OUTPUT, STOP[0]]
    frames = frames_of(chunks)
    assert len(frames) > len(chunks) + 3
    async with backend_of() as backend:
        for count in range(1, len(frames)):
            eid, handle = await written(backend, lane, end=False)
            async with backend.open_writer(handle) as writer:
                for payload, kind, mode in frames[:count]:
                    writer.write(payload, kind, mode=mode)
                await writer.flush()
                reading = web.events(backend, eid, framing=ai_sdk.AiSdkFraming())
                await reading.open()
                got = [reading.ready()]
                for payload, kind, mode in frames[count:]:
                    writer.write(payload, kind, mode=mode)
            await backend.complete(handle)
            got += [chunk async for chunk in reading]
            assert chunks_of(b"".join(got)) == [*chunks, {"type": "finish"}], count


def test_a_blocking_reader_joins_again_behind_a_gap(server, lane):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid = backend.create_execution(lane=lane, payload=b"p")
        handle = backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
        frames = frames_of(CHUNKS)
        with backend.open_writer(handle) as writer:
            for payload, kind, mode in frames[:4]:
                writer.write(payload, kind, mode=mode)
            writer.flush()
            reading = web.iter_events(backend, eid, framing=ai_sdk.AiSdkFraming())
            reading.open()
            reading._first.append(Gap(5, 9, "fell_behind", "0.1-8"))
            first = next(reading)
            for payload, kind, mode in frames[4:]:
                writer.write(payload, kind, mode=mode)
        backend.complete(handle)
        got = first + b"".join(reading)
    assert reading.finished
    assert joined(chunks_of(got)) == [*START, TEXT, *STOP, FINISH]


@pytest.mark.parametrize("text", ["{}", "[]", '{"type": 1}', "data: nonsense\n\n", "{", "text"])
def test_what_is_no_chunk_is_refused(text):
    kept = Kept()
    with pytest.raises(InvalidInput):
        ChunkWriter(kept).write(text)
    assert kept.frames == []


# -- tokens, and a document that keeps them ------------------------------------------------------------------------------

LIVE = StreamMode.best_effort_live(60_000)
KEPT = {
    "appended": lambda whole, new: (new, APPEND),
    "replaced": lambda whole, new: (json.dumps({"text": whole}), StreamMode.durable_summary()),
}


def is_whole(raw):
    try:
        raw.decode()
    except UnicodeDecodeError:
        return False
    return True


@anyio
@pytest.mark.parametrize("how", KEPT)
async def test_tokens_that_a_document_catches_up_with_are_told_once(backend_of, lane, how):
    text = "".join(f"{at} é😀 " for at in range(60))
    raw = text.encode()
    kept = 0
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, end=False)
        readers = []
        async with backend.open_writer(handle) as writer:
            for at in range(0, len(raw), 7):
                if at % 70 == 0:
                    await writer.flush()
                    readers.append(web.events(backend, eid, framing=ai_sdk.AiSdkFraming(text=True)))
                    await readers[-1].open()
                new = raw[kept : at + 7]
                writer.write(raw[at : at + 7], mode=LIVE)
                # A reader that comes before the first one gets all from the window.
                if (kept == 0 or len(new) > 40) and is_whole(new):
                    payload, mode = KEPT[how](raw[: at + 7].decode(), new)
                    writer.write(payload, "patch", mode=mode)
                    kept += len(new)
        await backend.complete(handle)
        for reader in readers:
            found = b"".join([chunk async for chunk in reader])
            assert told_in(found) == (text, "")
            assert b"reset-step" not in found


def frame(sequence, payload, kind="token", patch=None):
    mode = "best_effort" if patch is None else "summary"
    return StreamFrame(
        stream_id=f"1-{sequence}",
        frame_type=kind,
        payload=payload,
        ts_ms=1,
        mode=mode,
        patch_kind=patch,
    )


def test_a_gap_amid_tokens_that_a_document_has_loses_and_doubles_nothing():
    framing = ai_sdk.AiSdkFraming(text=True)
    append = PatchKind.STRING_APPEND("/text")
    frames = [
        frame(1, b"ab"),
        frame(2, b"cd\xe2"),
        frame(3, b"\x82\xac"),
        frame(4, "abcd€".encode(), patch=append),
        frame(5, b"ef\xe2"),
    ]
    raw = framing.items([AttemptStarted(0, "0.0-0"), *frames, Gap(6, 7, "expired", "0.1-6")])
    assert framing.rejoin
    framing.rejoin = False
    # The document is behind what was told: one frame comes again.
    document = Snapshot(b'{"text":"abcd\xe2\x82\xac"}', 1, 0, "0.1-4")
    raw += framing.items([document, frames[4], frame(6, b"\x82\xacg")])
    raw += framing.items([End("attempt_success", "0.1-9", "success")])
    assert told_in(raw) == ("abcd€ef€g", "")


def test_a_character_that_is_cut_in_the_reasoning_does_not_go_into_the_text():
    framing = ai_sdk.AiSdkFraming(text=True)
    frames = [
        frame(1, b"a\xe2\x82", "reasoning"),
        frame(2, b"b\xf0\x9f"),
        frame(3, b"\xac", "reasoning"),
        frame(4, b"\x98\x80"),
    ]
    raw = framing.items([AttemptStarted(0, "0.0-0"), *frames])
    raw += framing.items([End("attempt_success", "0.1-9", "success")])
    assert told_in(raw) == ("b😀", "a€")


# -- plain text ---------------------------------------------------------------------------------------------------------


def text_message(*parts):
    out = [{"type": "start"}, {"type": "start-step"}]
    for kind, part, text in parts:
        out += [
            {"type": f"{kind}-start", "id": part},
            {"type": f"{kind}-delta", "id": part, "delta": text},
        ]
    out += [{"type": f"{kind}-end", "id": part} for kind, part, _ in parts]
    return [*out, {"type": "finish-step"}, {"type": "finish"}]


@anyio
async def test_plain_text_is_a_message(backend_of, lane):
    frames = [(b"Hm", "reasoning"), b"a\xe2\x82", b"\xacb", (b"{}", "other")]
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, frames)
        got = chunks_of(await body_of(backend, eid, text=True))
    assert joined(got) == text_message(("reasoning", "reasoning", "Hm"), ("text", "text", "a€b"))


@anyio
async def test_a_document_of_text_is_a_message(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, end=False)
        async with backend.open_writer(handle, mode=APPEND) as writer:
            for text in ("He", "llo"):
                writer.write(text)
            await writer.flush()
            reading = web.events(backend, eid, framing=ai_sdk.AiSdkFraming())
            got = [await anext(reading)]
            writer.write("!")
        await backend.complete(handle)
        got += [chunk async for chunk in reading]
    deltas = [each["delta"] for each in chunks_of(b"".join(got)) if "delta" in each]
    assert deltas == ["Hello", "!"]
    assert joined(chunks_of(b"".join(got))) == text_message(("text", "text", "Hello!"))


@anyio
async def test_a_text_that_is_replaced_is_sent_again(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, end=False)
        async with backend.open_writer(handle, mode=APPEND) as writer:
            writer.write("wrong")
            await writer.flush()
            reading = web.events(backend, eid, framing=ai_sdk.AiSdkFraming())
            got = [await anext(reading)]
            writer.write(b'{"text": "right"}', mode=StreamMode.durable_summary())
            writer.write(", and more")
        await backend.complete(handle)
        got += [chunk async for chunk in reading]
    chunks = chunks_of(b"".join(got))
    assert {"type": "reset-step"} in chunks
    after = chunks[chunks.index({"type": "reset-step"}) :]
    assert "".join(each.get("delta", "") for each in after) == "right, and more"


# -- ends ---------------------------------------------------------------------------------------------------------------


@anyio
async def test_what_is_cancelled_is_aborted(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, CHUNKS, end=False)
        await backend.cancel(eid, reason="enough")
        got = chunks_of(await body_of(backend, eid))
    assert got[-2:] == [STOP[-1], {"type": "abort", "reason": "enough"}]


@anyio
async def test_what_fails_is_an_error(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, CHUNKS, end=False)
        await backend.fail(handle, "no luck", FailureClass.PERMANENT)
        got = chunks_of(await body_of(backend, eid))
    assert got[-1] == {"type": "error", "errorText": "no luck"}
    assert FINISH not in got


@anyio
async def test_an_error_of_the_worker_is_the_last_chunk(backend_of, lane):
    error = {"type": "error", "errorText": "the model is away"}
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, [*START, error, FINISH])
        assert chunks_of(await body_of(backend, eid)) == [*START, error]


@anyio
async def test_a_read_that_fails_is_an_error(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, START, end=False)
        reading = web.events(backend, eid, framing=ai_sdk.AiSdkFraming())
        got = [await anext(reading)]
        await backend.close()
        got += [chunk async for chunk in reading]
    assert chunks_of(b"".join(got))[-1]["type"] == "error"


@anyio
async def test_a_shutdown_is_no_silent_end(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, START, end=False)
        reading = web.events(backend, eid, framing=ai_sdk.AiSdkFraming())
        got = [await anext(reading)]
        web.end_responses()
        got += [chunk async for chunk in reading]
    assert chunks_of(b"".join(got))[-1]["type"] == "error"


@anyio
async def test_frames_that_are_no_chunks_are_an_error(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"{nonsense", b"x"])
        got = chunks_of(await body_of(backend, eid))
    assert [each["type"] for each in got] == ["error"]


# -- attempts and gaps --------------------------------------------------------------------------------------------------


def two_attempts_of(world, framing, first, second):
    """What a reader gets who has seen the first attempt of an execution, and one who has not."""
    eid, handle = world.owned(retry=RetryPolicy(1, delay=0))

    def write(chunks):
        with world.backend.open_writer(handle) as writer:
            log = ChunkWriter(writer)
            for chunk in chunks:
                log.write(chunk)

    write(first)
    reading = web.iter_events(world.backend, eid, framing=framing())
    got = next(reading)
    world.backend.fail(handle, "no luck", FailureClass.TRANSIENT)
    world.fire(eid, "delay")
    handle = world.claim()
    write(second)
    world.backend.complete(handle)
    late = web.iter_events(world.backend, eid, framing=framing())
    return got + b"".join(reading), b"".join(late)


def two_attempts(world, first, second):
    return map(chunks_of, two_attempts_of(world, ai_sdk.AiSdkFraming, first, second))


def test_a_new_attempt_takes_back_the_step(server, raw, lane):
    with World(server.url, raw, lane) as world:
        got, late = two_attempts(world, CHUNKS[:5], CHUNKS)
    assert joined(got) == [
        *START,
        {**TEXT, "delta": "He€l"},
        {"type": "reset-step"},
        START[2],
        TEXT,
        *STOP,
        FINISH,
    ]
    assert late == [*START, TEXT, *STOP, FINISH]


def test_a_new_attempt_behind_a_finished_step_begins_with_the_next_response(server, raw, lane):
    with World(server.url, raw, lane) as world:
        got, late = two_attempts(world, [*START, *STOP, *START[1:]], CHUNKS)
    assert [each["type"] for each in got][-2:] == ["text-start", "error"]
    assert late == [*START, TEXT, *STOP, FINISH]


SNAPSHOTS = {
    "0": json.dumps(START[0]),
    "1": json.dumps(START[1]),
    "2": json.dumps(START[2]),
    "3": {"type": "text-delta", "id": "a", "delta": "He"},
}


def snapshot(log, attempt=0):
    return Snapshot(json.dumps({"log": log}).encode(), 1, attempt, f"{attempt}.1-1")


@pytest.mark.parametrize("reason", ["trimmed", "fell_behind", "expired"])
def test_a_gap_is_filled_from_the_document(reason):
    framing = ai_sdk.AiSdkFraming()
    assert TEXT["delta"][:2].encode() in framing.items([snapshot(SNAPSHOTS)])
    assert framing.items([Gap(5, 9, reason, "0.1-8")]) == b""
    assert framing.rejoin
    framing.rejoin = False
    log = {**SNAPSHOTS, "3": {**SNAPSHOTS["3"], "delta": "Hello"}, "4": json.dumps(STOP[0])}
    assert framing.items([snapshot(log)]) == (
        b'data: {"type":"text-delta","id":"a","delta":"llo"}\n\ndata: %b\n\n' % log["4"].encode()
    )
    assert not framing.over


@pytest.mark.parametrize("reason", ["lost", "rewritten", "cursor_ahead"])
def test_a_gap_of_another_history_is_an_error(reason):
    framing = ai_sdk.AiSdkFraming()
    framing.items([snapshot(SNAPSHOTS)])
    got = chunks_of(
        framing.items([Gap(5, 9, reason, "0.1-8"), End("attempt_success", "0.1-9", "success")])
    )
    assert [each["type"] for each in got] == ["error"]
    assert framing.over


def test_a_gap_without_a_document_is_an_error():
    framing = ai_sdk.AiSdkFraming(text=True)
    framing.items([AttemptStarted(0, "0.0-0")])
    got = chunks_of(framing.items([Gap(1, 9, "trimmed", "0.1-8")]))
    assert [each["type"] for each in got] == ["error"]
    assert framing.over


@anyio
async def test_a_reader_that_falls_behind_misses_no_character(backend_of, lane):
    """The live window of patches is cut off under a reader that has not read them."""
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, end=False)
        async with backend.open_writer(handle) as writer:
            log = ChunkWriter(writer)
            for chunk in CHUNKS[:4]:
                log.write(chunk)
            await writer.flush()
            framing = ai_sdk.AiSdkFraming()
            reading = web.events(backend, eid, framing=framing)
            got = [await anext(reading)]
            joined_again = []
            follow = backend.follow
            backend.follow = lambda *args, **options: (
                joined_again.append(options) or follow(*args, **options)
            )
            reading._items = [Gap(5, 9, "fell_behind", "0.1-8")]
            for chunk in CHUNKS[4:]:
                log.write(chunk)
            await writer.flush()
        await backend.complete(handle)
        got += [chunk async for chunk in reading]
    assert joined_again
    assert joined(chunks_of(b"".join(got))) == [*START, TEXT, *STOP, FINISH]


# -- routes -------------------------------------------------------------------------------------------------------------


@anyio
async def test_headers_say_what_it_is(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, CHUNKS)
        async with client_of(backend, {"chat": eid}) as client:
            answer = await client.post("/api/chat")
    assert answer.headers["x-vercel-ai-ui-message-stream"] == "v1"
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert chunks_of(answer.content) == [*START, TEXT, *STOP, FINISH]


@anyio
async def test_a_chat_that_streams_is_resumed(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await written(backend, lane, CHUNKS[:-1], end=False)
        async with client_of(backend, {"chat": keys.url_id(eid)}) as client:
            reading = asyncio.create_task(client.get("/api/chat/chat/stream"))

            async def read():
                return bool(backend._hub._core.routes)

            await wait_until_async(read)
            await backend.complete(handle)
            answer = await reading
    assert chunks_of(answer.content) == [*START, TEXT, *STOP, {"type": "finish"}]


@anyio
async def test_nothing_to_resume_is_204(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, CHUNKS)
        found = {"ended": eid, "unknown": UNKNOWN, "bad": "nonsense"}
        async with client_of(backend, found) as client:
            for chat in ("none", *found):
                answer = await client.get(f"/api/chat/{chat}/stream")
                assert (answer.status_code, answer.content) == (204, b"")
        async with client_of(backend, found, ended=True) as client:
            answer = await client.get("/api/chat/ended/stream")
            assert chunks_of(answer.content) == [*START, TEXT, *STOP, FINISH]


@anyio
async def test_who_may_not_read_learns_nothing(backend_of, lane):
    async with backend_of() as backend:
        found = {"chat": UNKNOWN}
        async with client_of(backend, found, authorize=lambda *_: False) as client:
            assert (await client.get("/api/chat/chat/stream")).status_code == 403
            assert (await client.post("/api/chat/chat/stop")).status_code == 403


@anyio
async def test_stopping_cancels_what_is_meant(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await written(backend, lane, START, end=False)
        async with client_of(backend, {"chat": eid}) as client:
            for meant in (UNKNOWN, "nonsense"):
                answer = await client.post("/api/chat/chat/stop", json={"activeStreamId": meant})
                assert answer.json() == {"success": True}
            assert (await backend.describe(eid)).outcome is None
            for _ in range(2):
                answer = await client.post(
                    "/api/chat/chat/stop", json={"activeStreamId": keys.url_id(eid)}
                )
                assert (answer.status_code, answer.json()) == (200, {"success": True})
            assert (await backend.describe(eid)).outcome == "cancelled"
            assert (await client.post("/api/chat/none/stop")).json() == {"success": True}
