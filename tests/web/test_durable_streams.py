import asyncio
import base64
import contextlib
import json

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from ff_fast import FailureClass, StreamMode, TailVisibility, keys, web
from ff_fast.errors import InvalidInput
from ff_fast.web import durable_streams
from tests.web.sites import WORKER, EventSource, stream_of

pytestmark = pytest.mark.anyio

METHODS = ["GET", "HEAD", "OPTIONS", "POST", "PUT", "DELETE"]
UNKNOWN = "fp1-00000000-0000-4000-8000-000000000000"


@pytest.fixture
def anyio_backend():
    return "asyncio"


def client_of(backend, **options):
    async def stream(request):
        return await durable_streams.read_response(
            backend, request.path_params["eid"], request, **options
        )

    app = Starlette(routes=[Route("/{eid:path}", stream, methods=METHODS)])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@contextlib.asynccontextmanager
async def served(backend_of, lane, frames=(), *, end=True, writer=None, **options):
    """A client, the URL of a stream with *frames*, its backend and its handle."""
    async with backend_of() as backend:
        eid, handle = await stream_of(backend, lane, frames, end=end, **(writer or {}))
        async with client_of(backend, **options) as client:
            yield client, "/" + keys.url_id(eid), backend, handle


async def write(backend, handle, *frames):
    async with backend.open_writer(handle) as writer:
        for frame in frames:
            writer.write(frame)
        await writer.flush()


def read(answer):
    """What the events of a response hold: the data of all, and each control."""
    found = events(answer)
    return (
        "".join(each for each in found if isinstance(each, str)),
        [each for each in found if not isinstance(each, str)],
    )


def events(answer):
    return [
        each.json if each.event == "control" else each.data
        for each in EventSource().parse(answer.content)
    ]


async def test_a_stream_that_has_ended_is_one_body(backend_of, lane):
    async with served(backend_of, lane, [b"Hello", b", ", b"world"]) as (client, url, *_):
        answer = await client.get(url)
        rest = await client.get(url, params={"offset": answer.headers["stream-next-offset"]})
        begin = await client.get(url, params={"offset": "-1"})
    assert (answer.status_code, answer.text) == (200, "Hello, world")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["stream-up-to-date"] == answer.headers["stream-closed"] == "true"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    assert "access-control-allow-origin" not in answer.headers
    assert begin.content == answer.content
    assert (rest.status_code, rest.content) == (200, b"")
    assert rest.headers["stream-closed"] == "true"
    assert rest.headers["stream-next-offset"] == answer.headers["stream-next-offset"]


async def test_bodies_that_are_cut_anywhere_make_the_whole(backend_of, lane, monkeypatch):
    text = "".join(chr(0x4E00 + at) + "🎈é" for at in range(20)).encode()
    frames = [text[at : at + 2] for at in range(0, len(text), 2)]
    for most in (1, 2, 3, 7):
        monkeypatch.setattr(durable_streams, "_FRAMES", most)
        async with served(backend_of, lane, frames, content_type="application/x-any") as (
            client,
            url,
            *_,
        ):
            offsets, read = ["-1"], b""
            while True:
                answer = await client.get(url, params={"offset": offsets[-1]})
                read += answer.content
                if "stream-closed" in answer.headers:
                    break
                assert "stream-up-to-date" not in answer.headers
                offsets.append(answer.headers["stream-next-offset"])
        assert read == text
        assert offsets == sorted(set(offsets))


async def test_text_ends_with_a_whole_character_until_the_stream_does(backend_of, lane):
    async with served(backend_of, lane, [b"a", b"\xe2", b"\x82"], end=False) as (
        client,
        url,
        backend,
        handle,
    ):
        answer = await client.get(url)
        assert answer.content == b"a"
        place = {"offset": answer.headers["stream-next-offset"]}
        await write(backend, handle, b"\xac!")
        assert (await client.get(url, params=place)).content == "€!".encode()
        await write(backend, handle, b"\xe2")
        assert (await client.get(url, params=place)).content == "€!".encode()
        await backend.complete(handle)
        assert (await client.get(url, params=place)).content == "€!".encode() + b"\xe2"


async def test_an_etag_holds_until_the_stream_grows_or_closes(backend_of, lane):
    async with served(backend_of, lane, [b"a"], end=False) as (client, url, backend, handle):
        tags = []
        for change in (None, write(backend, handle, b"b"), backend.complete(handle)):
            if change is not None:
                await change
            answer = await client.get(url)
            tags.append(answer.headers["etag"])
            for given in (tags[-1], f'"x", W/{tags[-1]}', "*"):
                again = await client.get(url, headers={"if-none-match": given})
                assert (again.status_code, again.content) == (304, b"")
                assert again.headers["etag"] == tags[-1]
            for given in tags[:-1]:
                again = await client.get(url, headers={"if-none-match": given})
                assert again.status_code == 200
    assert len(set(tags)) == 3


async def test_head_names_the_tail(backend_of, lane):
    async with served(backend_of, lane, [b"a"], end=False) as (client, url, backend, handle):
        head = await client.head(url)
        assert head.headers["cache-control"] == "no-store"
        assert "stream-closed" not in head.headers
        body = await client.get(url)
        assert head.headers["stream-next-offset"] == body.headers["stream-next-offset"]
        await backend.complete(handle)
        assert (await client.head(url)).headers["stream-closed"] == "true"


async def test_now_is_the_tail(backend_of, lane):
    async with served(backend_of, lane, [b"1"], end=False, content_type="application/json") as (
        client, url, backend, handle,
    ):  # fmt: skip
        now = await client.get(url, params={"offset": "now"})
        assert (now.content, now.headers["cache-control"]) == (b"[]", "no-store")
        assert now.headers["stream-up-to-date"] == "true"
        assert "etag" not in now.headers
        await write(backend, handle, b"2", b'{"a":[3]}')
        rest = await client.get(url, params={"offset": now.headers["stream-next-offset"]})
    assert rest.json() == [2, {"a": [3]}]


async def test_an_execution_that_nobody_has_claimed_is_empty(backend_of, lane):
    async with backend_of() as backend:
        eid = await backend.create_execution(lane=lane, payload=b"p")
        async with client_of(backend, long_poll=0.05, sse_lasts=0.1) as client:
            first = await client.get(f"/{eid}")
            assert (first.status_code, first.content) == (200, b"")
            offset = first.headers["stream-next-offset"]
            assert (await client.head(f"/{eid}")).headers["stream-next-offset"] == offset
            waited = await client.get(f"/{eid}", params={"offset": offset, "live": "long-poll"})
            assert waited.status_code == 204
            (control,) = events(
                await client.get(f"/{eid}", params={"offset": offset, "live": "sse"})
            )
            assert (control["streamNextOffset"], control["upToDate"]) == (offset, True)
            handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
            await write(backend, handle, b"a")
            assert (await client.get(f"/{eid}", params={"offset": offset})).content == b"a"
            await backend.cancel(eid)
            last = await client.get(f"/{eid}", params={"offset": offset})
            assert last.headers["stream-closed"] == "true"


BAD = [
    "", "0,1", "abc", "0", "1.5-1", "-2", "NOW", "0" * 300, "0000000000_0000000000000000_000000000000000a",
    "9999999999_0000000000000000_0000000000000001", "0000000000_0000000000000000_9999999999999999", "a=b", "a/b",
]  # fmt: skip


@pytest.mark.parametrize("live", [None, "sse", "long-poll"])
async def test_what_is_no_offset_is_400(backend_of, lane, live):
    async with served(backend_of, lane, [b"a"]) as (client, url, *_):
        for offset in BAD:
            params = {"offset": offset, **({"live": live} if live else {})}
            answer = await client.get(url, params=params)
            assert answer.status_code == 400, offset
            assert answer.json()["error"]["code"]
        for query in (
            "offset=-1&offset=-1",
            "live=sse",
            "live=long-poll",
            "offset=-1&live=",
            "offset=-1&live=x",
        ):
            assert (await client.get(f"{url}?{query}")).status_code == 400


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_an_unknown_execution_is_404(backend_of, method):
    async with backend_of() as backend, client_of(backend) as client:
        for params in ({}, {"offset": "-1", "live": "sse"}, {"offset": "-1", "live": "long-poll"}):
            for eid in (UNKNOWN, "nonsense"):
                assert (await client.request(method, f"/{eid}", params=params)).status_code == 404


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE"])
async def test_writers_are_405(backend_of, method):
    async with backend_of() as backend, client_of(backend) as client:
        answer = await client.request(method, f"/{UNKNOWN}")
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD, OPTIONS")


async def test_a_browser_of_another_origin_reads_where_it_may(backend_of, lane):
    async with served(backend_of, lane, [b"a"], allow_origin="*", headers={"x-mine": "1"}) as (
        client,
        url,
        *_,
    ):
        asked = await client.options(url, headers={"access-control-request-method": "GET"})
        answers = [asked, await client.get(url), await client.get(url, params={"offset": "x"})]
        answers.append(await client.get(url, params={"offset": "-1", "live": "sse"}))
    assert asked.status_code == 204
    assert "if-none-match" in asked.headers["access-control-allow-headers"]
    for answer in answers:
        assert answer.headers["access-control-allow-origin"] == "*"
        assert answer.headers["x-mine"] == "1"
        assert answer.headers["x-content-type-options"] == "nosniff"
    assert "stream-next-offset" in answers[1].headers["access-control-expose-headers"]


async def test_the_app_decides_who_reads(backend_of, lane):
    async with served(backend_of, lane, [b"a"], authorize=lambda request, eid: False) as (
        client,
        url,
        *_,
    ):
        for method in ("GET", "HEAD"):
            answer = await client.request(method, url, params={"offset": "-1", "live": "sse"})
            assert answer.status_code == 403


async def test_what_was_read_of_a_lost_attempt_is_gone(backend_of, lane):
    async with served(backend_of, lane, [b"old"], end=False, long_poll=0.05, sse_lasts=0.2) as (
        client, url, backend, handle,
    ):  # fmt: skip
        first = await client.get(url)
        offset = first.headers["stream-next-offset"]
        await fail_and_claim_again(backend, handle, lane, b"new")
        for params in ({}, {"live": "sse"}, {"live": "long-poll"}):
            answer = await client.get(url, params={"offset": offset, **params})
            assert answer.status_code == 410
        again = await client.get(url, params={"offset": "-1"})
        assert again.content == b"new"
        assert again.headers["stream-next-offset"] > offset


async def fail_and_claim_again(backend, handle, lane, *frames):
    """Lose the worker of *handle*; another one writes *frames*."""
    await backend.fail(handle, "lost", FailureClass.INFRA_CRASH)
    handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
    await write(backend, handle, *frames)
    return handle


async def test_frames_that_are_trimmed_are_gone_and_the_beginning_is_the_first_that_is_kept(
    backend_of, lane
):
    frames = [b"%d," % at for at in range(2_000)]
    async with served(backend_of, lane, frames, writer={"retention_maxlen": 10}) as (
        client,
        url,
        *_,
    ):
        kept = await client.get(url)
        assert kept.status_code == 200
        assert b"".join(frames).endswith(kept.content)
        assert 0 < kept.content.count(b",") < 1_000
        early = "0000000000_0000000000000001_0000000000000001"
        for live in ({}, {"live": "sse"}, {"live": "long-poll"}):
            answer = await client.get(url, params={"offset": early, **live})
            assert answer.status_code == 410
            assert answer.json()["error"]["code"] == "offset_gone"
        data, controls = read(await client.get(url, params={"offset": "-1", "live": "sse"}))
        assert (data.encode(), controls[-1]["streamClosed"]) == (kept.content, True)


@pytest.mark.parametrize("live", [{}, {"live": "sse"}, {"live": "long-poll"}])
async def test_an_offset_beyond_the_end_is_gone(backend_of, lane, live):
    async with served(backend_of, lane, [b"a"]) as (client, url, *_):
        for offset in (
            "0000000000_9999999999999999_0000000000000009",
            "0000000007_0000000000000001_0000000000000001",
        ):
            answer = await client.get(url, params={"offset": offset, **live})
            assert answer.status_code == 410


async def test_best_effort_frames_that_expired_do_not_end_a_reader(backend_of, lane):
    """Else a client that begins again would come to the same place for ever."""
    short = StreamMode.best_effort_live(1_000)
    async with backend_of() as backend:
        eid = await backend.create_execution(lane=lane, payload=b"p")
        handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
        async with backend.open_writer(handle) as writer:
            for at in range(6):
                writer.write(b"%d" % at, mode=short if at in (1, 3, 4) else StreamMode.durable())
            await writer.flush()
        await backend.complete(handle)
        async with client_of(backend, visibility=TailVisibility.EXCLUDE_BEST_EFFORT) as client:
            answer = await client.get(f"/{eid}")
            data, controls = read(
                await client.get(f"/{eid}", params={"offset": "-1", "live": "sse"})
            )
    assert answer.content == data.encode() == b"025"
    assert controls[-1]["streamNextOffset"] == answer.headers["stream-next-offset"]


@pytest.mark.parametrize("most", [1, 2, 3, 2_000])
async def test_a_hole_between_frames_that_are_kept_is_passed_over_from_every_offset(
    backend_of, lane, raw, monkeypatch, most
):
    """Else a client that is told to begin again comes to the same place for ever."""
    monkeypatch.setattr(durable_streams, "_FRAMES", most + 1)
    live = StreamMode.best_effort_live(60_000)
    frames = [f"{at}é,".encode() for at in range(12)]
    gone = {0, 3, 4, 7, 11}
    async with backend_of() as backend:
        eid = await backend.create_execution(lane=lane, payload=b"p")
        handle = await backend.claim(lane=lane, **WORKER, lease_ttl_ms=60_000)
        async with backend.open_writer(handle) as writer:
            for at, frame in enumerate(frames):
                writer.write(frame, mode=live if at in gone else StreamMode.durable())
            await writer.flush()
        raw.delete(keys.live(eid, 0))
        await backend.complete(handle)
        left = b"".join(each for at, each in enumerate(frames) if at not in gone)
        async with client_of(backend) as client:
            offsets, found = ["-1"], b""
            while True:
                answer = await client.get(f"/{eid}", params={"offset": offsets[-1]})
                assert answer.status_code == 200
                found += answer.content
                if "stream-up-to-date" in answer.headers:
                    break
                offsets.append(answer.headers["stream-next-offset"])
            assert found == left
            last = {"offset": answer.headers["stream-next-offset"]}
            assert (await client.get(f"/{eid}", params=last)).status_code == 200
            data, controls = read(
                await client.get(f"/{eid}", params={"offset": "-1", "live": "sse"})
            )
            assert data.encode() == left
            for control in controls:
                place = {"offset": control["streamNextOffset"], "live": "sse"}
                assert (await client.get(f"/{eid}", params=place)).status_code == 200


@pytest.mark.parametrize(
    "text", [" a", "  a\n b\n\n c", "\n", "\n ", ":x", "data: x", "a\n\nevent: control"]
)
async def test_lines_of_events_are_those_of_the_text(backend_of, lane, text):
    async with served(backend_of, lane, [text.encode()]) as (client, url, *_):
        data, controls = read(await client.get(url, params={"offset": "-1", "live": "sse"}))
    assert data == text
    assert len(controls) <= 2


@pytest.mark.parametrize(
    "payloads, count",
    [
        ([], 0),
        ([b"a"], 1),
        ([b"\xe2"], 0),
        ([b"a", b"\xe2"], 1),
        ([b"a", b"\xe2", b"\x82"], 1),
        ([b"a", b"\xe2", b"\x82", b"\xac"], 4),
        ([b"\xf0", b"\x9f", b"\x8e"], 0),
        ([b"\xf0", b"\x9f", b"\x8e", b"\x88"], 4),
        ([b"\xff"], 1),
        ([b"\x80", b"\x80", b"\x80"], 3),
        # No text: it is not held for ever.
        ([b"\xe2"] * 4, 4),
        ([b"\xf0\x9f"] * 9, 9),
    ],
)
def test_how_many_payloads_end_with_a_whole_character(payloads, count):
    assert durable_streams._Kind.of("text/plain").whole(payloads) == count
    assert durable_streams._Kind.of("image/png").whole(payloads) == len(payloads)


# -- while the stream grows: over a real connection ------------------------------------------------------------------


@pytest.fixture
def served_live(site, lane):
    """`served_live(**options)`: a site, a function that calls its backend, the URL of a stream, and its handle."""

    def serve(frames=(), **options):
        def routes(backend):
            async def stream(request):
                eid = request.path_params["eid"]
                return await durable_streams.read_response(backend, eid, request, **options)

            return [Route("/{eid:path}", stream)]

        where = site(routes)
        eid, handle = where.call(stream_of(where.backend, lane, frames, end=False))
        return where, f"{where.url}/{keys.url_id(eid)}", handle

    return serve


def after(where, seconds, coroutine):
    """Let *coroutine* run on the site in a moment."""

    async def later():
        await asyncio.sleep(seconds)
        await coroutine

    return asyncio.run_coroutine_threadsafe(later(), where.loop)


def test_a_long_poll_waits_for_a_frame(served_live):
    where, url, handle = served_live([b"a"])
    with httpx.Client() as client:
        offset = client.get(url, params={"offset": "now"}).headers["stream-next-offset"]
        for text in (b"b", b"c"):
            after(where, 0.05, write(where.backend, handle, text))
            answer = client.get(url, params={"offset": offset, "live": "long-poll"})
            assert (answer.status_code, answer.content) == (200, text)
            assert answer.headers["stream-up-to-date"] == "true"
            assert answer.headers["etag"]
            offset = answer.headers["stream-next-offset"]
        after(where, 0.05, where.backend.complete(handle))
        answer = client.get(url, params={"offset": offset, "live": "long-poll"})
        assert (answer.status_code, answer.headers["stream-closed"]) == (204, "true")
        again = client.get(url, params={"offset": offset, "live": "long-poll"})
        assert (again.status_code, again.headers["stream-closed"]) == (204, "true")


def test_a_long_poll_waits_for_the_rest_of_a_character(served_live):
    where, url, handle = served_live([b"\xe2"])
    with httpx.Client() as client:
        after(where, 0.05, write(where.backend, handle, b"\x82", b"\xac"))
        answer = client.get(url, params={"offset": "-1", "live": "long-poll"})
    assert answer.text == "€"


def test_a_long_poll_ends_in_time(served_live):
    _, url, _ = served_live([b"a"], long_poll=0.05)
    with httpx.Client() as client:
        offset = client.get(url).headers["stream-next-offset"]
        answer = client.get(url, params={"offset": offset, "live": "long-poll"})
    assert answer.status_code == 204
    assert answer.headers["stream-next-offset"] == offset
    assert answer.headers["stream-up-to-date"] == "true"
    assert answer.headers["stream-cursor"].isdigit()
    assert "stream-closed" not in answer.headers


def test_a_new_attempt_ends_a_live_reader_that_has_read_the_one_before(served_live, lane):
    where, url, handle = served_live([b"old"])
    with httpx.Client() as client:
        with client.stream("GET", url, params={"offset": "-1", "live": "sse"}) as answer:
            chunks = answer.iter_bytes()
            raw = next(chunks)
            where.call(fail_and_claim_again(where.backend, handle, lane, b"new"))
            raw += b"".join(chunks)
        assert b"old" in raw
        assert b"new" not in raw
        assert b"streamClosed" not in raw
        offset = EventSource().parse(raw)[-1].json["streamNextOffset"]
        for live in ("sse", "long-poll"):
            assert client.get(url, params={"offset": offset, "live": live}).status_code == 410


def test_a_new_attempt_goes_on_for_a_reader_that_has_read_nothing(served_live, lane):
    where, url, handle = served_live()
    after(where, 0.05, fail_and_claim_again(where.backend, handle, lane, b"new"))
    with httpx.Client() as client:
        answer = client.get(url, params={"offset": "-1", "live": "long-poll"})
    assert answer.content == b"new"


def test_server_sent_events_hold_whole_characters_and_offsets_resume(served_live):
    text = "Zeit für 🎈 und ❤️: 日本語\n leer".encode() * 3
    where, url, handle = served_live()

    async def produce():
        async with where.backend.open_writer(handle) as writer:
            for at in range(0, len(text), 2):
                writer.write(text[at : at + 2])
                await writer.flush()
        await where.backend.complete(handle)

    after(where, 0.02, produce())
    with httpx.Client() as client:
        found = events(client.get(url, params={"offset": "-1", "live": "sse"}))
        assert "".join(each for each in found if isinstance(each, str)) == text.decode()
        assert found[-1]["streamClosed"]
        read = ""
        for each in found:
            if isinstance(each, str):
                read += each
                continue
            rest = client.get(url, params={"offset": each["streamNextOffset"]})
            assert (read + rest.text) == text.decode()


def test_a_response_of_events_ends_after_a_while_and_goes_on(served_live):
    where, url, handle = served_live([b"a"], sse_lasts=0.1)
    with httpx.Client() as client:
        data, control = events(client.get(url, params={"offset": "-1", "live": "sse"}))
        assert (data, control["upToDate"]) == ("a", True)
        after(where, 0.02, write(where.backend, handle, b"b"))
        rest = events(
            client.get(url, params={"offset": control["streamNextOffset"], "live": "sse"})
        )
    assert rest[0]["upToDate"]
    assert rest[1] == "b"


def test_a_shutdown_does_not_wait_for_readers(served_live):
    where, url, _ = served_live([b"a"])
    with (
        httpx.Client() as client,
        client.stream("GET", url, params={"offset": "now", "live": "sse"}) as answer,
    ):
        chunks = answer.iter_bytes()
        assert b"upToDate" in next(chunks)
        where.loop.call_soon_threadsafe(web.end_responses)
        assert b"".join(chunks) == b""


@pytest.mark.parametrize(
    "options", [{"content_type": ""}, {"content_type": "a\r\nb"}, {"long_poll": 0}]
)
async def test_what_an_app_may_not_ask_for(backend_of, lane, options):
    async with served(backend_of, lane, [b"a"], **options) as (client, url, *_):
        with pytest.raises(InvalidInput):
            await client.get(url)


async def test_server_sent_events_of_an_ended_stream(backend_of, lane):
    live = {"offset": "-1", "live": "sse"}
    async with served(backend_of, lane, [b"a\nb", b"c\r\n", b"d"]) as (client, url, *_):
        answer = await client.get(url, params=live)
        data, controls = read(answer)
        assert data == "a\nbc\nd"
        control = controls[-1]
        assert control.keys() == {"streamNextOffset", "streamClosed", "upToDate"}
        (last,) = events(
            await client.get(url, params={**live, "offset": control["streamNextOffset"]})
        )
        assert last == control
    assert "stream-sse-data-encoding" not in answer.headers
    assert answer.headers["cross-origin-resource-policy"] == "cross-origin"
    async with served(backend_of, lane, [b"1", b'"2"'], content_type="application/json") as (
        client,
        url,
        *_,
    ):
        arrays = [
            each for each in events(await client.get(url, params=live)) if isinstance(each, str)
        ]
        assert [item for each in arrays for item in json.loads(each)] == [1, "2"]
    async with served(backend_of, lane, [b"\0\xff", b"1"], content_type="image/png") as (
        client,
        url,
        *_,
    ):
        answer = await client.get(url, params=live)
        assert answer.headers["stream-sse-data-encoding"] == "base64"
        assert (
            b"".join(
                map(base64.b64decode, filter(lambda each: isinstance(each, str), events(answer)))
            )
            == b"\0\xff1"
        )


async def test_a_cursor_moves_on(backend_of, lane):
    async with served(backend_of, lane, [b"a"]) as (client, url, *_):
        cursors = [None]
        for _ in range(5):
            params = {"offset": "-1", "live": "long-poll"} | (
                {"cursor": cursors[-1]} if cursors[-1] else {}
            )
            cursors.append((await client.get(url, params=params)).headers["stream-cursor"])
        values = [int(each) for each in cursors[1:]]
        assert values == sorted(set(values))
        for odd in ("", "x", "-1", "1", "9" * 400, "١"):
            answer = await client.get(
                url, params={"offset": "-1", "live": "long-poll", "cursor": odd}
            )
            assert abs(int(answer.headers["stream-cursor"]) - values[0]) <= 1
