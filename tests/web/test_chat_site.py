"""The site of `ff-fast demo --web`, without a browser."""

import asyncio
from typing import ClassVar

import httpx
import pytest

from ff_fast._demo import answers, chat, plan
from tests.web.sites import EventSource, text_of

pytestmark = pytest.mark.anyio

TOKENS = 200


@pytest.fixture
def anyio_backend():
    return "asyncio"


class Watched(chat.Child):
    started: ClassVar[list[chat.Child]] = []

    def __init__(self, *args):
        super().__init__(*args)
        self.started.append(self)


async def test_a_question_is_answered_once_and_in_full(server, monkeypatch):
    monkeypatch.setattr(chat, "Child", Watched)
    monkeypatch.setattr(Watched, "started", [])
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
        for killed in await asyncio.gather(*[client.post("/worker/kill") for _ in range(2)]):
            assert killed.json() == {"success": True}
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
    assert len(Watched.started) == 3
    assert all(each._process.poll() is not None for each in Watched.started)
