"""The browser client is part of the package, and served as a module that browsers keep."""

import httpx
import pytest
from starlette.applications import Starlette
from starlette.routing import Route

from ff_fast import web

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


@pytest.fixture
def client():
    app = Starlette(routes=[Route("/ff_fast.js", web.client_script)])
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test")


async def test_the_client_is_served_as_it_is(client):
    answer = await client.get("/ff_fast.js")
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/javascript; charset=utf-8"
    assert answer.content == web.CLIENT_JS.read_bytes()
    assert b"export function follow" in answer.content


async def test_a_browser_that_has_it_is_told_so(client):
    first = await client.get("/ff_fast.js")
    again = await client.get("/ff_fast.js", headers={"if-none-match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert again.headers["etag"] == first.headers["etag"]
    other = await client.get("/ff_fast.js", headers={"if-none-match": '"another"'})
    assert other.status_code == 200


def test_it_is_small_and_asks_for_nothing_else():
    text = web.CLIENT_JS.read_text()
    assert len(text) < 20_000
    assert "import(" not in text
    assert not [line for line in text.splitlines() if line.startswith("import ")]
