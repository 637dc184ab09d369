"""The programs of docs/guides that need other people's packages run as they stand, in the frameworks themselves."""

import asyncio
import logging
import shutil
import subprocess
import sys
import uuid

import httpx
import pytest

import ff_fast
from ff_fast import keys
from tests import documents
from tests.web import served
from tests.web.sites import EventSource, text_of

pytestmark = pytest.mark.web

TOKENS = ("For", "ty", "-two")
UNKNOWN = "fp1-00000000-0000-4000-8000-000000000000"


@pytest.fixture(autouse=True)
def _logging():
    """Litestar and Celery put handlers of their own at the root, which must not outlive the test."""
    handlers, level = logging.root.handlers[:], logging.root.level
    yield
    logging.root.handlers[:] = handlers
    logging.root.setLevel(level)


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as opened:
        yield opened


@pytest.fixture
def execution(backend):
    """The id, as in URLs, of a stream that has ended."""
    with backend.open_stream(uuid.uuid4().hex) as stream:
        for token in TOKENS:
            stream.write(token)
    return keys.url_id(stream.execution_id)


def test_every_recipe_streams_and_resumes(server, execution, subtests):
    for framework, serve in (
        ("fastapi", fastapi),
        ("django async", django_async),
        ("django", django_sync),
        ("flask", flask),
        ("litestar", litestar),
    ):
        with subtests.test(framework), serve(server.url) as url:
            answer = httpx.get(f"{url}/streams/{execution}")
            assert answer.headers["content-type"].startswith("text/event-stream")
            assert "no-transform" in answer.headers["cache-control"]
            events = EventSource().parse(answer.content)
            assert text_of(events) == "Forty-two"
            rest = httpx.get(f"{url}/streams/{execution}", headers={"Last-Event-ID": events[1].id})
            assert EventSource().parse(rest.content) == events[2:]
            assert httpx.get(f"{url}/streams/{UNKNOWN}").status_code == 404
            assert httpx.get(f"{url}/streams/nonsense").status_code == 404


def fastapi(url):
    return served.asgi(documents.run("fastapi-stream", url)["app"])


def litestar(url):
    return served.asgi(documents.run("litestar", url)["app"])


class ClosingAfter:
    """A served application, whose backend is closed behind it."""

    def __init__(self, server, backend):
        self._server = server
        self._backend = backend

    def __enter__(self):
        return self._server.__enter__()

    def __exit__(self, *error):
        self._server.__exit__(*error)
        self._backend.close()


def flask(url):
    names = documents.run("flask", url)
    return ClosingAfter(served.wsgi(names["app"]), names["backend"])


def set_up_django():
    import django
    from django.conf import settings

    if not settings.configured:
        settings.configure(ALLOWED_HOSTS=["*"], ROOT_URLCONF="django_urls", SECRET_KEY="-" * 50)
        django.setup()


def django_urls(view):
    """Serve *view* by Django."""
    import types

    from django.urls import clear_url_caches, path

    module = types.ModuleType("django_urls")
    module.urlpatterns = [path("streams/<execution_id>", view)]
    sys.modules["django_urls"] = module
    clear_url_caches()


def django_async(url):
    from django.core.handlers.asgi import ASGIHandler

    set_up_django()
    names = documents.run("django-async", url)
    django_urls(names["stream"])
    handler = ASGIHandler()

    async def app(scope, receive, send):
        if scope["type"] == "lifespan":  # Django knows none: the process ends with its backend
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await (await names["connecting"]()).close()
            await send({"type": "lifespan.shutdown.complete"})
        else:
            await handler(scope, receive, send)

    return served.asgi(app)


def django_sync(url):
    from django.core.handlers.wsgi import WSGIHandler

    set_up_django()
    names = documents.run("django-sync", url)
    django_urls(names["stream"])
    return ClosingAfter(served.wsgi(WSGIHandler()), names["backend"])


def test_the_worker_and_the_endpoint_of_the_readme_run_as_printed(server, tmp_path, monkeypatch):
    """Both are files, which the commands of the page start."""
    monkeypatch.setenv("FF_FAST_URL", server.url)
    (tmp_path / "worker.py").write_text(documents.program("readme-worker").shown)
    command = [sys.executable, "-m", "ff_fast", "worker", "worker:answer"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        with served.asgi(documents.run("readme-web")["app"]) as url:
            chat = httpx.post(f"{url}/chats", content=b"Hi").json()
            answer = httpx.get(f"{url}/chats/{chat}", timeout=30)
        assert text_of(EventSource().parse(answer.content)) == "You said: Hi"
    finally:
        process.terminate()
        process.communicate(timeout=20)
    assert process.returncode == 0


def test_the_first_request_produces_and_others_read(server):
    """The request handler of the guide, whose backend is that of the application."""
    from contextlib import asynccontextmanager

    from fastapi import FastAPI

    from ff_fast import aio

    names = {}

    @asynccontextmanager
    async def lifespan(app):
        async with aio.ValkeyBackend.connect(server.url) as backend:
            names.update(documents.run("request-handler", app=app, backend=backend))
            yield

    name = uuid.uuid4().hex
    with served.asgi(FastAPI(lifespan=lifespan)) as url:
        for _ in range(2):
            answer = httpx.get(f"{url}/chat/{name}", params={"prompt": "6 x 7?"})
            assert text_of(EventSource().parse(answer.content)) == "Forty-two"


@pytest.mark.filterwarnings("ignore")
def test_a_task_of_celery_streams(server, backend):
    names = documents.run("celery-task", server.url)
    app = names["app"]
    app.conf.update(broker_url="memory://", result_backend="cache+memory://")
    chat = uuid.uuid4().hex
    eid = backend.execution_id_for(chat)
    with served.celery(app):
        first = names["answer"].delay(chat, "6 x 7?")
        first.get(timeout=20)
        names["answer"].delay(chat, "6 x 7?").get(timeout=20)
    frames = [item for item in backend.follow(eid) if isinstance(item, ff_fast.StreamFrame)]
    assert [frame.payload.decode() for frame in frames] == list(TOKENS)
    names["backend"].close()


def test_a_chat_of_the_ai_sdk(server):
    from contextlib import asynccontextmanager

    from fastapi import FastAPI
    from pydantic_ai import Agent
    from pydantic_ai.models.test import TestModel

    from ff_fast import aio

    agent = Agent(TestModel(custom_output_text="Forty-two"))

    @asynccontextmanager
    async def lifespan(app):
        async with aio.ValkeyBackend.connect(server.url) as backend:
            documents.run("ai-sdk", app=app, agent=agent, backend=backend)
            yield

    chat, message = uuid.uuid4().hex, uuid.uuid4().hex
    part = {"type": "text", "text": "6 x 7?"}
    body = {
        "trigger": "submit-message",
        "id": chat,
        "messages": [{"id": message, "role": "user", "parts": [part]}],
    }
    with served.asgi(FastAPI(lifespan=lifespan)) as url:
        answer = httpx.post(f"{url}/api/chat", json=body)
        events = [each for each in EventSource().parse(answer.content) if each.data != "[DONE]"]
        deltas = [each.json["delta"] for each in events if each.json["type"] == "text-delta"]
        assert "".join(deltas) == "Forty-two"
        assert httpx.get(f"{url}/api/chat/{chat}/stream").status_code == 204
        assert httpx.post(f"{url}/api/chat/{chat}/stop").json() == {"success": True}


def test_a_turn_of_assistant_ui(server):
    from contextlib import asynccontextmanager

    from fastapi import FastAPI

    from ff_fast import aio

    @asynccontextmanager
    async def lifespan(app):
        async with aio.ValkeyBackend.connect(server.url) as backend:
            documents.run("assistant-ui", app=app, backend=backend)
            yield

    turn = uuid.uuid4().hex
    with served.asgi(FastAPI(lifespan=lifespan)) as url:
        answer = httpx.post(f"{url}/chat/{turn}")
        assert answer.status_code == 200
        assert "ty" in answer.text
        assert httpx.get(f"{url}/chat/{turn}").content == answer.content
        assert httpx.get(f"{url}/chat/{uuid.uuid4().hex}").status_code == 404


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_agent_of_a2a(server):
    from a2a.auth.user import UnauthenticatedUser
    from a2a.server.agent_execution import AgentExecutor
    from a2a.server.context import ServerCallContext
    from a2a.server.tasks import TaskUpdater
    from a2a.types.a2a_pb2 import (
        AgentCapabilities,
        AgentCard,
        GetTaskRequest,
        Message,
        Part,
        Role,
        SendMessageRequest,
        Task,
        TaskState,
        TaskStatus,
    )

    from ff_fast import aio

    class Answering(AgentExecutor):
        async def execute(self, context, event_queue):
            task = Task(
                id=context.task_id,
                context_id=context.context_id,
                status=TaskStatus(state=TaskState.TASK_STATE_SUBMITTED),
            )
            await event_queue.enqueue_event(task)
            updater = TaskUpdater(event_queue, context.task_id, context.context_id)
            await updater.start_work()
            await updater.add_artifact([Part(text="Forty-two")], artifact_id="a")
            await updater.complete()

        async def cancel(self, context, event_queue):
            raise NotImplementedError

    card = AgentCard(
        name="a",
        description="a",
        version="1",
        capabilities=AgentCapabilities(streaming=True),
        default_input_modes=["text"],
        default_output_modes=["text"],
    )

    async def asked():
        async with aio.ValkeyBackend.connect(server.url) as backend:
            names = documents.run("a2a", backend=backend, card=card, executor=Answering())
            context = ServerCallContext(user=UnauthenticatedUser())
            message = Message(
                message_id=uuid.uuid4().hex, role=Role.ROLE_USER, parts=[Part(text="6 x 7?")]
            )
            events = names["handler"].on_message_send_stream(
                SendMessageRequest(message=message), context
            )
            ids = [event.id async for event in events if isinstance(event, Task)]
            found = await names["handler"].on_get_task(GetTaskRequest(id=ids[0]), context)
            await names["shut_down"]()
            return found

    assert asyncio.run(asked()).artifacts[0].parts[0].text == "Forty-two"


def test_scripts_of_the_documents_are_scripts(tmp_path, subtests):
    """Every block of JavaScript, and every script of an HTML block, is one for Node's parser."""
    import re

    node = shutil.which("node")
    assert node
    scripts = [(block, block.shown) for block in documents.blocks("js")]
    for block in documents.blocks("html"):
        found = re.findall(r"<script[^>]*>\n(.*?)</script>", block.shown, re.DOTALL)
        assert found
        scripts += [(block, script) for script in found]
    assert scripts
    for number, (block, script) in enumerate(scripts):
        path = tmp_path / f"{number}.mjs"
        path.write_text(script)
        with subtests.test(f"{block.document}:{block.line}"):
            done = subprocess.run(
                [node, "--check", str(path)], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr


def test_a_script_that_is_none_is_found(tmp_path):
    path = tmp_path / "a.mjs"
    path.write_text("const = 1;")
    assert subprocess.run(["node", "--check", path], capture_output=True, check=False).returncode
