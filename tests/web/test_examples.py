"""The programs of examples/ run as they stand, with the packages that they are about."""

import asyncio
import importlib
import subprocess
import sys
import threading
import uuid

import httpx
import pytest

from tests import documents
from tests.web import served
from tests.web.sites import EventSource

EXAMPLES = documents.ROOT / "examples"
web = pytest.mark.web


@pytest.fixture(autouse=True)
def _at_the_server(server, monkeypatch):
    monkeypatch.setenv("FF_FAST_URL", server.url)
    monkeypatch.setenv("BROKER_URL", "memory://")
    monkeypatch.syspath_prepend(str(EXAMPLES))


def imported(name):
    sys.modules.pop(name, None)
    return importlib.import_module(name)


def run(name, *, answers="", timeout=50):
    """What a program prints, to whose questions a person says *answers*."""
    done = subprocess.run(
        [sys.executable, EXAMPLES / name],
        input=answers,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_every_example_is_short_and_listed_and_has_a_test():
    listed = (EXAMPLES / "README.md").read_text("utf-8")
    here = (documents.ROOT / "tests/web/test_examples.py").read_text("utf-8")
    programs = sorted(EXAMPLES.glob("*.py"))
    assert len(programs) >= 7
    for path in programs:
        lines = [line for line in path.read_text("utf-8").splitlines() if line.strip()]
        assert len(lines) <= 60, path
        assert f"]({path.name})" in listed
        assert f'"{path.stem}"' in here or f'"{path.name}"' in here


def test_a_human_approves():
    assert run("human_approval.py", answers="yes\n").endswith("May I? Sent.\n")


@web
def test_a_killed_worker_has_a_successor():
    lines = run("multi_process_workers.py").splitlines()
    assert [line.split(":")[0] for line in lines] == [f"report {n}" for n in range(12)]
    assert all(": 20 frames" in line for line in lines)
    assert "of attempt 2" in lines[0]


@web
def test_a_chat():
    app = imported("fastapi_chat").app
    with served.asgi(app) as url:
        assert "/ff_fast.js" in httpx.get(url).text
        assert "export function follow" in httpx.get(f"{url}/ff_fast.js").text
        chat = httpx.post(f"{url}/chats", content=b"Hi").json()["id"]
        events = EventSource().parse(httpx.get(f"{url}/chats/{chat}", timeout=30).content)
        assert events[-1].json["outcome"] == "success"
        late = EventSource().parse(httpx.get(f"{url}/chats/{chat}").content)
        assert late[0].event == "snapshot"
        assert "You asked: Hi" in late[0].json["document"]["text"]
        chat = httpx.post(f"{url}/chats", content=b"Hi").json()["id"]
        assert httpx.post(f"{url}/chats/{chat}/stop").json() == {"success": True}
        stopped = EventSource().parse(httpx.get(f"{url}/chats/{chat}", timeout=30).content)
        assert stopped[-1].json["outcome"] == "cancelled"


@web
def test_a_chat_of_the_ai_sdk():
    part = {"type": "text", "text": "6 x 7?"}
    body = {
        "trigger": "submit-message",
        "id": uuid.uuid4().hex,
        "messages": [{"id": uuid.uuid4().hex, "role": "user", "parts": [part]}],
    }
    with served.asgi(imported("pydantic_ai_chat").app) as url:
        answers = [httpx.post(f"{url}/api/chat", json=body) for _ in range(2)]
        for answer in answers:
            events = [each for each in EventSource().parse(answer.content) if each.data != "[DONE]"]
            deltas = [each.json["delta"] for each in events if each.json["type"] == "text-delta"]
            assert "".join(deltas) == "What a model would say."


@web
@pytest.mark.filterwarnings("ignore")
def test_a_graph_is_joined_by_its_own_sdk():
    from langgraph_sdk import get_client

    async def read(url):
        async with httpx.AsyncClient() as client:
            run_id = (await client.post(f"{url}/runs", json={"question": "6 x 7?"})).json()
        async with get_client(url=url, api_key=None) as client:
            return [part async for part in client.runs.join_stream("thread", run_id)]

    with served.asgi(imported("langgraph_agent").app) as url:
        parts = asyncio.run(read(url))
    tokens = [part.data["token"] for part in parts if part.event == "custom"]
    assert "".join(tokens) == "It is forty-two."
    assert [part.event for part in parts][-2:] == ["updates", "end"]


@web
@pytest.mark.filterwarnings("ignore")
def test_a_task_of_celery_streams_once():
    module = imported("celery_task")
    module.app.conf.update(result_backend="cache+memory://")
    chat = uuid.uuid4().hex
    found = []
    reader = threading.Thread(target=lambda: found.extend(module.read(chat)))
    with served.celery(module.app):
        module.answer.delay(chat, "6 x 7?").get(timeout=20)
        reader.start()
        module.answer.delay(chat, "6 x 7?").get(timeout=20)
        reader.join(20)
    module.disconnect()
    assert found == ["It", " is", " forty-two."]


@web
def test_a_task_of_taskiq_streams(capsys):
    asyncio.run(imported("taskiq_task").main(uuid.uuid4().hex))
    assert capsys.readouterr().out == "It is forty-two.\n"
