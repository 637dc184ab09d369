"""What is said of servers that cannot be reached."""

import asyncio
import logging
import threading

import pytest

from ff_fast import errors
from ff_fast._core.leases import say_lost

from ..waiting import wait_until_async
from .chaos import ChaosProxy

PASSWORD = "s3cr3t-canary"


async def _true(value):
    return value


def name_of(proxy):
    host, port = proxy.address
    return f"The server {host}:{port}"


async def test_a_server_that_is_lost_is_said_once_and_that_it_answers_again(
    shell, proxy, lane, said, caplog
):
    async with await shell.connect(proxy.url) as backend:
        caplog.clear()
        eid = await backend.create_execution(lane=lane)
        before = (await backend.stats()).reconnects
        proxy.cut_before = b"ff_describe_execution"
        assert (await backend.describe(eid)).state == "waiting"
        lost, again = said(logging.INFO)
        assert lost.levelno == logging.WARNING
        assert lost.getMessage().startswith(f"{name_of(proxy)} is not reached: ")
        assert again.levelno == logging.INFO
        assert again.getMessage().startswith(f"{name_of(proxy)} answers again, ")
        assert (await backend.stats()).reconnects == before + 1
        # So soon again it is one storm.
        for _ in range(3):
            proxy.cut_before = b"ff_describe_execution"
            assert (await backend.describe(eid)).state == "waiting"
        assert len(said(logging.INFO)) == 2
        assert (await backend.stats()).reconnects == before + 4


async def test_a_server_that_was_never_reached_is_the_callers_to_tell(shell, said):
    with ChaosProxy("valkey://127.0.0.1:1") as nowhere:
        pass
    with pytest.raises(errors.Unavailable):
        await shell.connect(nowhere.url, retries=0)
    assert said(logging.INFO) == []


async def test_retries_that_are_used_up_are_said_once(shell, proxy, lane, said):
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        eid = await backend.create_execution(lane=lane)
        proxy.close()
        for _ in range(2):
            with pytest.raises((errors.Unavailable, errors.OutcomeUnknown)):
                await backend.describe(eid)
        given_up = [text for text in _texts(said, logging.WARNING) if "Gave up" in text]
        assert len(given_up) == 1
        assert given_up[0].startswith("Gave up after 2 retries: ")


async def test_a_writer_that_is_given_up_is_an_error_with_the_number_of_its_frames(
    shell, proxy, lane, said, caplog
):
    async with await shell.connect(proxy.url, retries=1, factor=1) as backend:
        eid = await backend.create_execution(lane=lane)
        handle = await backend.claim(lane=lane)
        writer = await backend.open_writer(handle)
        proxy.close()
        for _ in range(3):
            writer.write(PASSWORD)
        with pytest.raises(errors.FFError):
            await writer.flush()
        await wait_until_async(lambda: _true(said(logging.ERROR)))
        (text,) = _texts(said, logging.ERROR)
        assert text.startswith(f"The writer of attempt 0 of execution {eid} is given up: ")
        assert text.endswith(" Frames that were not stored: 3.")
        assert PASSWORD not in caplog.text
        assert handle.fields().lease_id not in caplog.text


async def test_a_supervisor_without_a_server_says_so_until_it_has_one(shell, proxy, said):
    stop = threading.Event()
    async with await shell.connect(proxy.url, retries=0) as backend:
        running = asyncio.ensure_future(backend.supervise(interval=0.01, stop=stop))
        await wait_until_async(lambda: _true("A supervisor has started." in _texts(said)))
        proxy.close()
        await wait_until_async(
            lambda: _true([text for text in _texts(said) if "has no server: " in text])
        )
        proxy.listen()
        await wait_until_async(
            lambda: _true([text for text in _texts(said) if "A supervisor goes on after" in text])
        )
        stop.set()
        await running
        assert _texts(said)[-1] == "A supervisor has stopped."
        assert len([text for text in _texts(said) if "has no server: " in text]) == 1


def _texts(said, level=logging.INFO):
    return [each.getMessage() for each in said(level)]


async def test_a_library_that_is_loaded_is_said(shell, own_server, said):
    async with await shell.connect(own_server.url):
        loaded = [text for text in _texts(said) if "function library" in text]
        assert len(loaded) == 1
        assert loaded[0].endswith("the server had none.")
    async with await shell.connect(own_server.url):
        assert len([text for text in _texts(said) if "function library" in text]) == 1


async def test_a_connection_that_the_server_closes_after_a_long_idle_time_is_no_loss(
    shell, proxy, lane, said
):
    async with await shell.connect(proxy.url) as backend:
        await backend.create_execution(lane=lane)
        writer = await backend.open_writer(await backend.claim(lane=lane))
        writer.write(b"a")
        await writer.flush()
        if shell.kind == "sync":
            for sender in backend.wrapped._senders._senders.values():
                sender._connection.heard_at -= 60
        else:
            backend.wrapped._nodes.first.shared.connection.heard_at -= 60
        idle = proxy.connections
        proxy.cut_all("fin")
        # The blocking shell may have connected again meanwhile.
        await wait_until_async(lambda: _true(proxy.cuts == idle))
        writer.write(b"b")
        await writer.flush()
        await writer.close()
        assert said(logging.WARNING) == []


def test_a_storm_of_lost_leases_is_one_line(caplog):
    for number in range(100):
        say_lost(errors.StaleOwner(), f"execution {number}", 0)
    assert len(caplog.records) == 1
