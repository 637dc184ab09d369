"""The site of `ff-fast demo --web`, without a browser."""

import httpx
import pytest

from ff_fast._demo import answers, chat, plan
from tests.web.sites import EventSource, text_of

pytestmark = pytest.mark.anyio

TOKENS = 200


@pytest.fixture
def anyio_backend():
    return "asyncio"


async def test_a_question_is_answered_once_and_in_full(server):
    app = chat.Chat(server.url, answers.Answering(2_000.0, TOKENS)).app
    transport = httpx.ASGITransport(app)
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(transport=transport, base_url="http://test", timeout=30) as client,
    ):
        page = await client.get("/")
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert (await client.get("/ff_fast.js")).status_code == 200
        # A worker that has nothing to do is killed, and its successor answers.
        assert (await client.post("/worker/kill")).json() == {"success": True}
        path = "/chats/" + (await client.post("/chats", content="Who?")).json()["id"]
        got = EventSource().parse((await client.get(path)).content)
        text = b"".join(plan.tokens(TOKENS)).decode()
        result = await client.get(f"{path}/result")
        assert result.text == text
        assert got[-1].event == "end"
        # The answer may have begun with the summary.
        begun = [each.json["document"].get("text", "") for each in got if each.event == "snapshot"]
        assert "".join(begun) + text_of(got) == text
        # Stopping what has ended changes nothing.
        assert (await client.post(f"{path}/stop")).json() == {"success": True}
        unknown = "/chats/fp1-00000000-0000-4000-8000-000000000000"
        assert (await client.get(f"{unknown}/result")).status_code == 404
        assert (await client.get(unknown)).status_code == 404
