"""Who may read and stop: the application's word, and signed tokens."""

import time

import httpx
import pytest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.routing import Route

from ff_fast import ExecutionCancelled, InvalidInput, InvalidToken, web
from ff_fast.errors import InvalidType
from tests.web.sites import EventSource, stream_of, text_of
from tests.web.test_stream_response import UNKNOWN, client_of

KEY = b"a secret of many bytes"
OTHER = b"another one, as long as this"
EID = "{fp:86}:8d5f8a52-3c2c-4d3a-9f3c-0123456789ab"
anyio = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def refuses(error):
    def authorize(request, execution_id):
        raise error

    return authorize


async def later(request, execution_id):
    return request.headers.get("x-user") == "owner"


@anyio
@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "authorize, status",
    [
        (lambda request, eid: False, 403),
        # One that forgets to say yes does not say it.
        (lambda request, eid: None, 403),
        (refuses(PermissionError()), 403),
        (refuses(InvalidToken()), 403),
        (refuses(HTTPException(401)), 401),
        (later, 403),
        (lambda request, eid: True, 404),
    ],
)
async def test_who_may_not_read_learns_nothing(backend_of, method, authorize, status):
    async with backend_of() as backend, client_of(backend, authorize=authorize) as client:
        answer = await client.request(method, f"/{UNKNOWN}", params={"after": ""})
        assert answer.status_code == status
        if status != 404:
            # Before the place is looked at.
            answer = await client.request(method, f"/{UNKNOWN}", params={"after": "nonsense"})
            assert answer.status_code == status


@anyio
async def test_who_may_read_reads(backend_of, lane):
    seen = []

    async def authorize(request, execution_id):
        seen.append(execution_id)
        return await later(request, execution_id)

    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"text"])
        async with client_of(backend, authorize=authorize) as client:
            answer = await client.get(
                f"/{eid.upper().replace('FP', 'fp')}", headers={"x-user": "owner"}
            )
    assert text_of(EventSource().parse(answer.content)) == "text"
    assert seen == [eid]


@anyio
@pytest.mark.parametrize("how", ["query", "bearer"])
async def test_a_token_opens_its_own_stream(backend_of, lane, how):
    def shown(token):
        if how == "query":
            return {"params": {"token": token}}
        return {"headers": {"authorization": f"Bearer {token}"}}

    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"text"])
        async with client_of(backend, token_key=KEY) as client:
            good = web.stream_token(KEY, eid)
            assert (await client.get(f"/{eid}", **shown(good))).status_code == 200
            for bad in (
                "",
                "x",
                good[:-1],
                good + "x",
                web.stream_token(OTHER, eid),
                web.stream_token(KEY, EID),
                web.stream_token(KEY, eid, can=["stop"]),
            ):
                answer = await client.get(f"/{eid}", **shown(bad))
                assert (answer.status_code, answer.json()["error"]["code"]) == (
                    403,
                    "invalid_token",
                )
            assert (await client.get(f"/{eid}")).status_code == 403


@anyio
async def test_an_application_may_use_one_of_the_two_places_of_a_token_for_its_own(
    backend_of, lane
):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"text"])
        good = web.stream_token(KEY, eid)
        async with client_of(backend, token_key=KEY) as client:
            for query, header, status in (
                (good, "Bearer of-another-kind", 200),
                ("of-another-kind", f"Bearer {good}", 200),
                (good, "Bearer", 200),
                (good, "Basic YTpi", 200),
                ("of-another-kind", "Bearer of-another-kind", 403),
                ("", "Bearer", 403),
            ):
                answer = await client.get(
                    f"/{eid}", params={"token": query}, headers={"authorization": header}
                )
                assert answer.status_code == status


@pytest.mark.parametrize("token", [None, "x", "1.read." + "A" * 43])
def test_a_key_that_is_none_is_refused_whatever_the_token(token):
    with pytest.raises(InvalidInput):
        web.check_token(b"short", token, EID)
    with pytest.raises(InvalidType):
        web.check_token([KEY, "a text of many characters"], token, EID)


def test_a_token_is_safe_in_a_url():
    assert set(web.stream_token(KEY, EID)) <= set(
        "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-"
    )


def test_a_token_expires():
    token = web.stream_token(KEY, EID, expires_in=10)
    web.check_token(KEY, token, EID)
    web.check_token(KEY, token, EID, now=time.time() + 9)
    with pytest.raises(InvalidToken, match="expired"):
        web.check_token(KEY, token, EID, now=time.time() + 12)


def test_no_part_of_a_token_can_be_changed():
    token = web.stream_token(KEY, EID)
    for at, old in enumerate(token[:-1]):
        changed = token[:at] + ("1" if old != "1" else "2") + token[at + 1 :]
        with pytest.raises(InvalidToken):
            web.check_token(KEY, changed, EID)
    expires, _, signature = token.split(".")
    for forged in (f"{int(expires) + 1}.read.{signature}", f"{expires}.read-stop.{signature}"):
        with pytest.raises(InvalidToken):
            web.check_token(KEY, forged, EID)


@pytest.mark.parametrize("token", [None, "", "é", "1.read." + "A" * 43, 7, "9" * 5000])
def test_what_is_no_token_is_refused(token):
    with pytest.raises(InvalidToken):
        web.check_token(KEY, token, EID)


def test_a_key_can_be_replaced_while_its_tokens_live():
    token = web.stream_token(KEY, EID)
    web.check_token([OTHER, KEY], token, EID)
    with pytest.raises(InvalidToken):
        web.check_token([OTHER], token, EID)
    with pytest.raises(InvalidToken):
        web.check_token([], token, EID)


def test_a_token_says_what_it_permits():
    both = web.stream_token(KEY, EID, can=("stop", "read"))
    web.check_token(KEY, both, EID, can="stop")
    web.check_token(KEY, both, EID, can="read")
    with pytest.raises(InvalidToken, match="permit"):
        web.check_token(KEY, web.stream_token(KEY, EID), EID, can="stop")


@pytest.mark.parametrize(
    "key, options, error",
    [
        (b"short", {}, InvalidInput),
        ("x" * 32, {}, InvalidType),
        (KEY, {"can": []}, InvalidInput),
        (KEY, {"can": ["write"]}, InvalidInput),
        (KEY, {"expires_in": 0}, InvalidInput),
    ],
)
def test_what_makes_no_token(key, options, error):
    with pytest.raises(error):
        web.stream_token(key, EID, **options)


def stopping(backend, **options):
    async def stop(request):
        return await web.stop_response(backend, request.path_params["eid"], request, **options)

    app = Starlette(routes=[Route("/{eid:path}", stop, methods=["POST"])])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


@anyio
async def test_a_client_stops_a_stream_as_often_as_it_likes(backend_of, lane):
    async with backend_of() as backend:
        eid, _ = await stream_of(backend, lane, [b"text"], end=False)
        async with stopping(backend) as client:
            for _ in range(3):
                answer = await client.post(f"/{eid}")
                assert (answer.status_code, answer.json()) == (200, {"success": True})
            with pytest.raises(ExecutionCancelled):
                await backend.wait(eid)
            done, _ = await stream_of(backend, lane)
            assert (await client.post(f"/{done}")).json() == {"success": True}
            assert (await client.post(f"/{UNKNOWN}")).status_code == 404
            assert (await client.post("/nonsense")).status_code == 404
        assert await backend.wait(done) == b""


@anyio
async def test_who_may_not_stop_does_not(backend_of, lane):
    async with backend_of() as backend:
        eid, handle = await stream_of(backend, lane, end=False)
        async with stopping(backend, token_key=KEY) as client:
            reading = web.stream_token(KEY, eid)
            assert (await client.post(f"/{eid}", params={"token": reading})).status_code == 403
        async with stopping(backend, authorize=lambda request, eid: False) as client:
            assert (await client.post(f"/{eid}")).status_code == 403
        await backend.complete(handle, payload=b"done")
        assert await backend.wait(eid) == b"done"
        with pytest.raises(InvalidInput, match="need the request"):
            await web.stop_response(backend, eid, authorize=later)
