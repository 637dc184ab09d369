"""A server that is frozen, restarted, full, busy, read-only or of another version."""

import asyncio
import contextlib
import os
import re
import signal
import threading
from pathlib import Path

import pytest
import redis

import ff_fast
from ff_fast import _library
from ff_fast._core import ops
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import (
    DeadlineExceeded,
    ExecutionNotFound,
    LibraryMismatch,
    NotPrimary,
    Outcome,
    OutOfMemory,
    ServerBusy,
    StorageUnavailable,
)

from ..conftest import connect_raw
from ..waiting import wait_until, wait_until_async
from .stored import claimed, stored_once


@pytest.fixture
def broken(own_server):
    """A plain client of the test's own server."""
    with connect_raw(own_server.url) as client:
        client.ping()
        yield client


async def _true(value):
    return value


@pytest.mark.long
async def test_a_frozen_server(shell, own_server, lane):
    async with await shell.connect(own_server.url, timeout=0.4) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        loop = asyncio.get_running_loop()
        os.kill(own_server.pid, signal.SIGSTOP)
        try:
            writer.write(b"1")
            began = loop.time()
            with pytest.raises(DeadlineExceeded) as caught:
                await backend.append_frame(
                    handle, ff_fast.Frame(b"2", ff_fast.FrameKind.EVENT), 0.3
                )
            assert caught.value.outcome is Outcome.UNKNOWN
            with pytest.raises(DeadlineExceeded):
                await backend.renew(handle)
            assert loop.time() - began < 3
            # Long enough for the writers' connection to be given up and made again.
            with pytest.raises(DeadlineExceeded):
                await writer.flush(1.0)
            writer.write(b"3")
        finally:
            os.kill(own_server.pid, signal.SIGCONT)
        await writer.flush(20)
        await backend.renew(handle)
        await writer.close()
    stored_once(own_server.url, eid, [b"1", b"2", b"3"])


async def test_a_restart_with_a_log_loses_nothing(shell, lane):
    with EmbeddedServer(appendonly=True, appendfsync="always") as server:
        async with await shell.connect(server.url) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            payloads = [b"%d" % i for i in range(300)]
            for i, payload in enumerate(payloads):
                writer.write(payload)
                if i % 100 == 50:
                    await asyncio.to_thread(server.restart)
            await writer.flush(20)
            await backend.renew(handle)
            await writer.close()
        stored_once(server.url, eid, payloads)


async def test_killed_by_force_with_a_log_loses_nothing(shell, lane):
    with EmbeddedServer(appendonly=True, appendfsync="always") as server:
        async with await shell.connect(server.url) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            for i in range(400):
                writer.write(b"%d" % i)
                if i % 100 == 50:
                    os.kill(server.pid, signal.SIGKILL)
                    await asyncio.to_thread(server.restart)
            await writer.flush(20)
            await writer.close()
        stored_once(server.url, eid, [b"%d" % i for i in range(400)])


async def test_a_restart_without_a_log_is_never_a_silent_start_from_the_beginning(
    shell, own_server, lane
):
    async with await shell.connect(own_server.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        await asyncio.to_thread(own_server.restart)
        writer.write(b"2")
        writer.write(b"3")
        with pytest.raises(ExecutionNotFound) as caught:
            await writer.flush(20)
        assert [(f.sequence, f.payload) for f in caught.value.unstored] == [(2, b"2"), (3, b"3")]
        with pytest.raises(ExecutionNotFound):
            writer.write(b"4")
        with pytest.raises(ExecutionNotFound):
            await backend.renew(handle)
        with pytest.raises(ExecutionNotFound):
            await backend.items(eid)
        # The library came back by itself.
        await claimed(backend, lane)


async def test_functions_flushed_amid_a_stream(shell, own_server, broken, lane):
    async with await shell.connect(own_server.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        payloads = [b"%d" % i for i in range(5_000)]
        for i, payload in enumerate(payloads):
            writer.write(payload)
            if i % 500 == 250:
                broken.function_flush()
            if i % 100 == 0:
                await asyncio.sleep(0)
        await writer.flush(20)
        await writer.close()
        broken.function_flush()
        assert (await backend.describe(eid)).state == "active"
        broken.function_flush()
        await backend.complete(handle)
        broken.function_flush()
        assert len(await backend.items(eid)) == 5_001
    stored_once(own_server.url, eid, payloads)


async def test_a_library_that_is_replaced_amid_calls_costs_none_of_them(
    shell, own_server, broken, lane
):
    # Without retries: no call may fail.
    async with await shell.connect(own_server.url, retries=0) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        payloads = [b"%d" % i for i in range(5_000)]
        calls = []
        for i, payload in enumerate(payloads):
            writer.write(payload)
            if i % 250 == 0:
                calls += [asyncio.ensure_future(backend.describe(eid)) for _ in range(5)]
                await asyncio.sleep(0)
                broken.function_load(library(note=f"text {i}"), replace=True)
                with pytest.raises(redis.ResponseError):
                    # A text that does not load leaves the one before it.
                    broken.function_load(f"#!lua name={_library.NAME}\nnonsense", replace=True)
        await writer.flush(20)
        await writer.close()
        assert {one.state for one in await asyncio.gather(*calls)} == {"active"}
        await backend.complete(handle)
    stored_once(own_server.url, eid, payloads)


async def test_functions_flushed_need_no_retry(shell, own_server, broken, lane):
    async with await shell.connect(own_server.url, retries=0) as backend:
        eid = await backend.create_execution(lane=lane)
        broken.function_flush()
        assert (await backend.describe(eid)).state == "waiting"


def refusing(broken, name):
    """Bring the server into a state in which it accepts no writes; return how it ends."""
    if name == "OOM":
        broken.config_set("maxmemory", "1")
        return lambda: broken.config_set("maxmemory", "0")
    if name == "READONLY":
        broken.replicaof("127.0.0.1", "1")
        return lambda: broken.replicaof("NO", "ONE")
    if name == "NOREPLICAS":
        broken.config_set("min-replicas-to-write", "1")
        return lambda: broken.config_set("min-replicas-to-write", "0")
    directory = broken.config_get("dir")["dir"]
    Path(directory, "dump.rdb").mkdir()
    broken.config_set("save", "1 1")
    broken.set("something", "changed")
    with contextlib.suppress(Exception):
        broken.bgsave()
    wait_until(lambda: broken.info("persistence")["rdb_last_bgsave_status"] == "err")

    def end():
        Path(directory, "dump.rdb").rmdir()
        broken.config_set("save", "")

    return end


REFUSALS = {
    "OOM": OutOfMemory,
    "READONLY": NotPrimary,
    "NOREPLICAS": ff_fast.errors.NotEnoughReplicas,
    "MISCONF": StorageUnavailable,
}


@pytest.mark.parametrize("name", REFUSALS)
async def test_a_server_that_accepts_no_writes(shell, name, own_server, broken, lane):
    async with await shell.connect(own_server.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        async with await shell.connect(own_server.url, retries=2, factor=1) as hasty:
            _, hasty_handle = await claimed(hasty, lane)
            hasty_writer = await hasty.open_writer(hasty_handle)
            end = refusing(broken, name)
            # Not applied, and after the few retries of this backend, told.
            with pytest.raises(REFUSALS[name]) as caught:
                await hasty.renew(handle)
            assert caught.value.outcome is Outcome.NOT_APPLIED
            hasty_writer.write(b"never")
            with pytest.raises(REFUSALS[name]) as caught:
                await hasty_writer.flush(5)
            assert [frame.payload for frame in caught.value.unstored] == [b"never"]
            # Meanwhile the patient writer waits, in order, and reads go on.
            for i in range(2, 500):
                writer.write(b"%d" % i)
            with pytest.raises(DeadlineExceeded):
                await writer.flush(0.3)
            assert writer.error is None
            assert len(await backend.read_stream(eid, 0)) == 1
            end()
            await writer.flush(10)
            await writer.close()
    stored_once(own_server.url, eid, [b"%d" % i for i in range(1, 500)])


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-random"])
async def test_a_server_that_evicts_any_key_is_told_when_connecting(
    shell, policy, own_server, broken, lane
):
    broken.config_set("maxmemory-policy", policy)
    # Without a limit nothing is evicted.
    await (await shell.connect(own_server.url)).close()
    broken.config_set("maxmemory", "100mb")
    with pytest.warns(RuntimeWarning, match=f"maxmemory-policy is {policy}") as caught:
        async with await shell.connect(own_server.url) as backend:
            await claimed(backend, lane)
    assert len(caught) == 1
    # A user who may not read INFO is told nothing, and leaves no trace in the log of the server.
    broken.execute_command(
        *("ACL", "SETUSER", "plain", "on", ">p", "~ff:*", "+@all", "-@dangerous", "-@admin")
    )
    await (await shell.connect(own_server.url.replace("unix://", "unix://plain:p@"))).close()
    assert broken.acl_log() == []


async def test_a_busy_server(shell, own_server, broken, lane):
    async with (
        await shell.connect(own_server.url, retries=2, factor=1) as hasty,
        await shell.connect(own_server.url) as backend,
    ):
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        broken.config_set("busy-reply-threshold", "20")
        with connect_raw(own_server.url, socket_timeout=30) as blocked:
            running = threading.Thread(target=_run_for_ever, args=(blocked,))
            running.start()
            try:
                await wait_until_async(lambda: _true(_is_busy(broken)))
                with pytest.raises(ServerBusy) as caught:
                    await hasty.describe(eid)
                assert caught.value.outcome is Outcome.NOT_APPLIED
                writer.write(b"1")
                with pytest.raises(DeadlineExceeded):
                    await writer.flush(0.2)
            finally:
                broken.script_kill()
                running.join()
        await writer.flush(10)
        await writer.close()
    stored_once(own_server.url, eid, [b"1"])


async def test_a_script_that_cannot_be_killed_ends_with_its_server(shell, lane):
    """It has written, so only an end of the server ends it. Ours are bounded; this one is a stranger's."""
    with EmbeddedServer(appendonly=True, appendfsync="always", busy_reply_threshold=20) as server:
        async with (
            await shell.connect(server.url, retries=2, factor=1) as hasty,
            await shell.connect(server.url) as backend,
        ):
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            with connect_raw(server.url) as raw, connect_raw(server.url) as blocked:
                program = "redis.call('set', KEYS[1], 1) while true do end"
                running = threading.Thread(target=_run_for_ever, args=(blocked, program, 1, "own"))
                running.start()
                await wait_until_async(lambda: _true(_is_busy(raw)))
                with pytest.raises(redis.ResponseError, match="UNKILLABLE"):
                    raw.script_kill()
                with pytest.raises(ServerBusy) as caught:
                    await hasty.renew(handle)
                assert caught.value.outcome is Outcome.NOT_APPLIED
                writer.write(b"1")
                os.kill(server.pid, signal.SIGKILL)
                running.join()
            await asyncio.to_thread(server.restart)
            await writer.flush(10)
            await writer.close()
        stored_once(server.url, eid, [b"1"])


def _run_for_ever(client, program="while true do end", *keys):
    with contextlib.suppress(Exception):
        client.eval(program, *(keys or (0,)))


def _is_busy(client):
    try:
        client.ping()
    except redis.ResponseError as error:
        return "BUSY" in str(error)
    return False


async def test_a_server_that_is_loading(shell, lane):
    with EmbeddedServer(
        debug_command=True,
        appendonly=True,
        appendfsync="always",
        loading_process_events_interval_bytes=1024,
    ) as server:
        async with await shell.connect(server.url) as backend:
            eid = await backend.create_execution(lane=lane)
            with connect_raw(server.url) as raw, connect_raw(server.url) as looking:
                raw.execute_command("DEBUG", "POPULATE", "200", "key", "100")
                raw.bgrewriteaof()
                await wait_until_async(
                    lambda: _true(not raw.info("persistence")["aof_rewrite_in_progress"])
                )
                raw.config_set("key-load-delay", "2000")
                loading = threading.Thread(target=_load, args=(raw,))
                loading.start()
                await wait_until_async(lambda: _true(_is_loading(looking)))
                assert (await backend.describe(eid)).state == "waiting"
                loading.join()


def _load(raw):
    with contextlib.suppress(Exception):
        raw.execute_command("DEBUG", "LOADAOF")


def _is_loading(client):
    try:
        client.get("key:0")
    except redis.ConnectionError as error:
        return "loading" in str(error)
    return False


# -- versions of the library -------------------------------------------------------------------------------------


def library(contract=None, note=""):
    text = _library.source() + f"\n-- {note}\n"
    if contract is not None:
        found = re.search(r"ff\.ok\('(\d+)', '([0-9a-f]+)'", text)
        text = text.replace(found[0], f"ff.ok('{contract}', '{found[2][::-1]}'")
    return text


def version_on(raw):
    op = ops.version()
    return op.answer(raw.fcall_ro(op.function, len(op.keys), *op.keys))


async def test_a_newer_contract_is_left_alone(shell, own_server, broken):
    newer = library(contract=_library.CONTRACT + 1)
    broken.function_load(newer)
    with pytest.raises(LibraryMismatch) as caught:
        await shell.connect(own_server.url)
    assert (caught.value.server, caught.value.client) == (_library.CONTRACT + 1, _library.CONTRACT)
    assert f"contract {_library.CONTRACT + 1}" in str(caught.value)
    assert version_on(broken).contract == _library.CONTRACT + 1


async def test_a_newer_contract_that_arrives_amid_a_stream_ends_the_writer_when_it_reconnects(
    shell, own_server, broken, lane
):
    async with await shell.connect(own_server.url) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        broken.function_load(library(contract=_library.CONTRACT + 1), replace=True)
        broken.client_kill_filter(_type="normal", skipme=True)
        writer.write(b"2")
        with pytest.raises(LibraryMismatch) as caught:
            await writer.flush(10)
        assert [frame.payload for frame in caught.value.unstored] == [b"2"]


@pytest.mark.parametrize("contract", [_library.CONTRACT, _library.CONTRACT - 1])
async def test_another_library_of_no_newer_contract_is_replaced(
    shell, contract, own_server, broken, lane
):
    broken.function_load(library(contract=contract))
    async with await shell.connect(own_server.url) as backend:
        await claimed(backend, lane)
    assert version_on(broken).digest == _library.digest()


async def test_eight_clients_load_the_library_at_once(shell, own_server, broken, lane):
    for _ in range(5):
        broken.function_flush()
        backends = await asyncio.gather(*(shell.connect(own_server.url) for _ in range(8)))
        await asyncio.gather(*(claimed(b, f"{lane}-{i}") for i, b in enumerate(backends)))
        await asyncio.gather(*(b.close() for b in backends))
