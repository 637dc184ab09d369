"""Credentials that change: providers are asked at every connect, and open connections log in again."""

import asyncio
import logging
import ssl
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from redis.auth.token import SimpleToken
from redis.credentials import CredentialProvider, StreamingCredentialProvider

from ff_fast._core import credentials
from ff_fast._sync import credentials as of_sync
from ff_fast.errors import (
    AuthenticationFailed,
    CredentialsUnavailable,
    Outcome,
)
from ff_fast.types import BackendConfig, BackendTimeouts, ClaimPolicy

from ..conftest import connect_raw
from ..shells import Shell
from ..waiting import wait_until, wait_until_async
from .stored import claimed, stored_once
from .test_access import terminator

ADMIN = "a-secret"


@pytest.fixture
def guarded(own_server):
    """The test's own server without a default user for clients, and a client of the administrator."""
    with connect_raw(own_server.url) as raw:
        raw.ping()
        yield raw


def let_in(raw, name, password, *rules):
    raw.execute_command(
        "ACL", "SETUSER", name, "reset", "on", f">{password}", "~*", "&*", "+@all", *rules
    )


def config(server, provider, **others):
    given = BackendConfig.from_url(server.url)
    return given.replace(
        connection=given.connection.replace(credential_provider=provider), **others
    )


def users(raw):
    """Users of the connections of ff_fast."""
    return {each["user"] for each in raw.client_list() if each["name"].startswith("ff_fast:")}


class Rotating(CredentialProvider):
    """Gives the newest of its logins, and notes on which thread it was asked."""

    def __init__(self, *login):
        self.login = login
        self.threads = []

    def get_credentials(self):
        self.threads.append(threading.get_ident())
        return self.login


class Streaming(StreamingCredentialProvider):
    """Keeps only the newest callback, as some providers do."""

    def __init__(self, *login):
        self.login = login
        self.callbacks = []
        self.errors = None

    def get_credentials(self):
        return self.login

    def on_next(self, callback):
        self.callbacks.append(callback)

    def on_error(self, callback):
        self.errors = callback

    def is_streaming(self):
        return True

    def push(self, *login):
        self.login = login
        username, password = login
        self.callbacks[-1](SimpleToken(password, 2e12, 0, {"oid": username}))


# -- who is asked, and when -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["provider", "callable", "password alone"])
async def test_a_provider_is_asked_at_every_connect_and_never_on_the_loop(
    shell, own_server, guarded, lane, form
):
    let_in(guarded, "u", "first")
    provider = Rotating("u", "first")
    if form == "password alone":
        guarded.execute_command("ACL", "SETUSER", "default", ">first")
        provider.login = ("first",)
    given = provider.get_credentials if form == "callable" else provider
    async with await shell.connect(config(own_server, given)) as backend:
        asked = len(provider.threads)
        assert asked >= 1
        assert users(guarded) == {"default" if form == "password alone" else "u"}
        assert threading.get_ident() not in provider.threads
        let_in(guarded, "u", "second")
        if form != "password alone":
            provider.login = ("u", "second")
        guarded.client_kill_filter(_type="normal", skipme=True)
        await claimed(backend, lane)
        assert len(provider.threads) > asked


class Awaited(CredentialProvider):
    def __init__(self):
        self.loops = []

    async def get_credentials_async(self):
        self.loops.append(asyncio.get_running_loop())
        return "u", "p"


async def test_a_provider_for_asyncio_is_awaited_and_the_blocking_shell_says_that_it_cannot(
    shell, own_server, guarded, lane
):
    let_in(guarded, "u", "p")
    awaited = Awaited()

    async def function():
        return await awaited.get_credentials_async()

    for provider in (awaited, function):
        if shell.kind == "asyncio":
            async with await shell.connect(config(own_server, provider)) as backend:
                await claimed(backend, lane)
                assert users(guarded) == {"u"}
        else:
            with pytest.raises(CredentialsUnavailable):
                await shell.connect(config(own_server, provider))
    assert set(awaited.loops) <= {asyncio.get_running_loop()}


FAILURES = {
    "a bug": (lambda: {}["canary"], False),
    "the network": (lambda: Path("/nowhere/canary").read_text(), True),
    "a timeout": (lambda: (_ for _ in ()).throw(TimeoutError("canary")), True),
    "nothing": (lambda: None, False),
    "a text": (lambda: "canary", False),
    "numbers": (lambda: (1, 2), False),
}


@pytest.mark.parametrize("name", FAILURES)
async def test_a_provider_that_fails_is_named_without_what_it_said(shell, own_server, caplog, name):
    provider, retryable = FAILURES[name]
    caplog.set_level(logging.DEBUG)
    with pytest.raises(CredentialsUnavailable, match="provider") as caught:
        await shell.connect(config(own_server, provider))
    error = caught.value
    assert error.retryable is retryable
    assert error.outcome is Outcome.NOT_APPLIED
    assert error.__cause__ is None
    assert error.__context__ is None
    assert "canary" not in f"{error!r} {caplog.text}"


async def test_a_provider_that_hangs_costs_the_asyncio_shell_a_request_timeout(own_server):
    hangs = threading.Event()
    try:
        with pytest.raises(CredentialsUnavailable, match=r"did not answer within 0\.2 s") as caught:
            await Shell("asyncio").connect(
                config(own_server, lambda: hangs.wait(10), timeouts=BackendTimeouts(0.2))
            )
        assert caught.value.retryable
    finally:
        hangs.set()


async def test_refused_credentials_of_a_provider_are_told_at_once_when_connecting(
    shell, own_server, guarded
):
    guarded.acl_log_reset()
    with pytest.raises(AuthenticationFailed) as caught:
        await shell.connect(config(own_server, lambda: ("u", "canary")))
    assert "canary" not in repr(caught.value)
    assert sum(each["count"] for each in guarded.acl_log()) == 1


# -- open connections -------------------------------------------------------------------------------------------------------


async def busy(backend, lane):
    """A writer, a reader that waits, and a claim that waits: every kind of connection."""
    eid, handle = await claimed(backend, lane)
    writer = await backend.open_writer(handle)
    reading = asyncio.create_task(backend.items(eid))
    policy = ClaimPolicy.with_max_wait(10)
    waiting = asyncio.create_task(
        backend.claim(lane=f"{lane}-2", worker_id="w", worker_instance_id="w-1", policy=policy)
    )
    writer.write(b"0")
    await writer.flush(5)
    return eid, handle, writer, reading, waiting


async def finish(backend, lane, busy_with):
    eid, handle, writer, reading, waiting = busy_with
    await writer.close(5)
    await backend.complete(handle)
    items = await asyncio.wait_for(reading, 10)
    await backend.create_execution(lane=f"{lane}-2")
    other = await asyncio.wait_for(waiting, 10)
    await backend.complete(other)
    return [each.payload for each in items[:-1]], eid


@pytest.mark.parametrize("how", ["pushed", "asked again"])
async def test_open_connections_log_in_again_between_requests(
    shell, own_server, guarded, lane, how, monkeypatch
):
    let_in(guarded, "before", "p")
    let_in(guarded, "after", "q")
    if how == "pushed":
        provider = Streaming("before", "p")
    else:
        monkeypatch.setattr(credentials, "RENEW_EVERY_S", 0.1)
        provider = Rotating("before", "p")
    async with await shell.connect(config(own_server, provider)) as backend:
        using = await busy(backend, lane)
        assert users(guarded) == {"before"}
        if how == "pushed":
            provider.push("after", "q")
        else:
            provider.login = ("after", "q")
        sent = 1
        # Every connection is used now and then; the one of the claim that waits when it is woken, and one that many calls
        # at once have left when there are as many again.
        while True:
            using[2].write(b"%d" % sent)
            sent += 1
            await using[2].flush(5)
            await backend.describe(using[0])
            await backend.read_stream(using[0])
            left = [
                each for each in guarded.client_list()
                if each["user"] == "before" and "blocked" not in each.get("flags", "")
                and each["cmd"] != "bzmpop" and not (each["name"] == "ff_fast:calls" and int(each["idle"]))
            ]  # fmt: skip
            if not left:
                break
            await asyncio.sleep(0.01)
            assert sent < 500, left
        payloads, eid = await finish(backend, lane, using)
        assert payloads == [b"%d" % i for i in range(sent)]
    await asyncio.to_thread(stored_once, own_server.url, eid, payloads)


async def test_a_provider_that_keeps_one_callback_serves_several_backends(
    shell, own_server, guarded, lane
):
    let_in(guarded, "before", "p")
    let_in(guarded, "after", "q")
    provider = Streaming("before", "p")
    async with (
        await shell.connect(config(own_server, provider)) as one,
        await shell.connect(config(own_server, provider)) as two,
    ):
        assert len(provider.callbacks) == 1
        provider.push("after", "q")

        async def renewed():
            for backend in (one, two):
                await backend.claim(lane=lane)
            return users(guarded) == {"after"}

        await wait_until_async(renewed)


async def test_what_a_streaming_provider_reports_is_logged_without_its_text(
    shell, own_server, guarded, lane, caplog
):
    let_in(guarded, "u", "p")
    provider = Streaming("u", "p")
    async with await shell.connect(config(own_server, provider)) as backend:
        provider.errors(OSError("canary"))
        # Neither a token that is none, nor one that the server refuses, disturbs the connections.
        provider.callbacks[-1](object())
        provider.push("u", "canary")
        provider.login = ("u", "p")
        for _ in range(3):
            await claimed(backend, lane)
    assert "reports OSError" in caplog.text
    assert "canary" not in caplog.text


@pytest.mark.parametrize("late", [False, True], ids=["at once", "a moment later"])
async def test_a_rotated_password_amid_a_stream_loses_nothing(
    shell, own_server, guarded, lane, late
):
    let_in(guarded, "u", "first")
    provider = Rotating("u", "first")
    async with await shell.connect(config(own_server, provider)) as backend:
        using = await busy(backend, lane)
        writer = using[2]
        payloads = [b"0"]
        for turn in range(2):
            for _ in range(50):
                payloads.append(b"%d" % len(payloads))
                writer.write(payloads[-1])
            await asyncio.sleep(0)
            password = f"rotated {turn}"
            if not late:
                provider.login = ("u", password)
            guarded.execute_command("ACL", "SETUSER", "u", "resetpass", f">{password}")
            for kind in ("normal", "pubsub"):
                guarded.client_kill_filter(_type=kind, skipme=True)
            if late:
                await asyncio.sleep(0.05)
                provider.login = ("u", password)
            for _ in range(50):
                payloads.append(b"%d" % len(payloads))
                writer.write(payloads[-1])
            await writer.flush(10)
        found, eid = await finish(backend, lane, using)
        assert found == payloads
    await asyncio.to_thread(stored_once, own_server.url, eid, payloads)


# -- TLS and names -----------------------------------------------------------------------------------------------------------


@pytest.mark.standalone("a proxy stands before one server")
async def test_a_tls_context_of_the_caller_is_used(shell, server, lane):
    import trustme

    authority = trustme.CA()
    context = ssl.create_default_context()
    with terminator(server, authority.issue_cert("localhost")) as proxy:
        plain = BackendConfig.from_url(f"valkeys://localhost:{proxy.address[1]}")
        with_context = plain.replace(connection=plain.connection.replace(ssl_context=context))
        with pytest.raises(ConnectionError):
            await shell.connect(with_context)
        authority.configure_trust(context)
        async with await shell.connect(with_context) as backend:
            await claimed(backend, lane)


async def test_connections_have_the_chosen_name(shell, own_server, guarded, lane):
    given = BackendConfig.from_url(own_server.url)
    named = given.replace(connection=given.connection.replace(client_name="chat-api"))
    async with await shell.connect(named) as backend:
        using = await busy(backend, lane)
        names = {each["name"] for each in guarded.client_list() if each["name"]}
        assert names == {"chat-api"}
        await finish(backend, lane, using)


def test_renewal_goes_on_after_a_thread_could_not_be_started(monkeypatch):
    asked = []
    renewing = of_sync.Credentials(lambda: asked.append(None) or ("u", "p"))
    connection = SimpleNamespace(authenticated_at=time.monotonic(), credentials=None)

    def fails(_):
        raise RuntimeError

    renewing.opened_by(connection)
    renewing.ask_at = 0.0
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fails)
        assert renewing.due(connection) is None
    assert not asked
    # Asked again after a while, by whoever sends next.
    assert renewing.ask_at > time.monotonic()
    renewing.ask_at = 0.0
    renewing.due(connection)
    wait_until(lambda: renewing.due(connection))
    assert asked
