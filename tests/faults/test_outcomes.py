"""What an error says of its call: not applied only where no try of it, and no step, can have been applied."""

import asyncio
import contextlib
import threading
from functools import partial

import pytest

import ff_fast
from ff_fast import Frame, FrameKind, keys
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import ExecutionNotActive, FFError, Outcome, Unavailable
from ff_fast.types import UsageDimensions

from ..conftest import connect_raw
from ..waiting import wait_until, wait_until_async
from .chaos import DOWN
from .stored import claimed, frames


def lose_one_reply_and_then_refuse(proxy):
    """The server does its work, its answer is lost, and nobody can connect again."""
    proxy.refuse()
    proxy.cut_after(DOWN, 1)


@contextlib.contextmanager
def away(proxy):
    try:
        yield
    finally:
        proxy.cut_by(())
        proxy.listen()


CALLS = {
    "create_execution": lambda b, ids: b.create_execution(
        execution_id=ids["new"], lane=ids["lane"]
    ),
    "progress": lambda b, ids: b.progress(ids["handle"], 50),
    "renew": lambda b, ids: b.renew(ids["handle"]),
    "fail": lambda b, ids: b.fail(ids["handle"], "broken"),
    "complete": lambda b, ids: b.complete(ids["handle"], b"answer"),
    "cancel": lambda b, ids: b.cancel(ids["eid"]),
    "delay": lambda b, ids: b.delay(ids["handle"], 60),
    "wait_children": lambda b, ids: b.wait_children(ids["handle"]),
    "create_waitpoint": lambda b, ids: b.create_waitpoint(ids["handle"]),
    "open_writer": lambda b, ids: b.open_writer(ids["handle"]),
    "append_frame": lambda b, ids: b.append_frame(ids["handle"], Frame(b"x", FrameKind.EVENT)),
    "set_tags": lambda b, ids: b.set_tags(ids["eid"], {"a.b": "c"}),
    "create_flow": lambda b, ids: b.create_flow(ids["flow"]),
    "cancel_flow": lambda b, ids: b.cancel_flow(ids["open flow"]),
    "create_budget": lambda b, ids: b.create_budget(ids["budget"], hard={"input_tokens": 1}),
    "report_usage": lambda b, ids: b.report_usage(ids["handle"], UsageDimensions(input_tokens=1)),
    "rotate": lambda b, ids: b.rotate_waitpoint_secret(ids["budget"], bytes(32)),
}


@pytest.mark.parametrize("name", CALLS)
async def test_a_lost_reply_is_remembered_when_a_later_try_is_refused(shell, name, proxy, lane):
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        eid, handle = await claimed(backend, lane)
        ids = {"lane": lane, "eid": eid, "handle": handle, "new": keys.new_execution_id()}
        ids["flow"], ids["budget"] = keys.new_uuid(), keys.new_uuid()
        ids["open flow"] = await backend.create_flow()
        with away(proxy):
            lose_one_reply_and_then_refuse(proxy)
            with pytest.raises(FFError) as caught:
                await CALLS[name](backend, ids)
        error = caught.value
        # The cause is that of the last try; the outcome is that of all tries.
        assert isinstance(error, Unavailable)
        assert error.outcome is Outcome.UNKNOWN
        assert str(error).endswith("An earlier try of the call may have been applied.")
        assert error.retryable


async def test_no_try_that_was_sent_means_not_applied(shell, proxy, lane):
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        _, handle = await claimed(backend, lane)
        with away(proxy):
            proxy.refuse()
            proxy.cut_all("fin")
            await asyncio.to_thread(wait_until, lambda: proxy.connections == 0)
            with pytest.raises(Unavailable) as caught:
                await backend.progress(handle, 50)
        assert caught.value.outcome is Outcome.NOT_APPLIED
        assert "earlier" not in str(caught.value)


async def test_a_read_has_nothing_that_an_earlier_try_may_have_applied(shell, proxy, lane):
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        eid = await backend.create_execution(lane=lane)
        with away(proxy):
            lose_one_reply_and_then_refuse(proxy)
            with pytest.raises(Unavailable) as caught:
                await backend.describe(eid)
        assert caught.value.outcome is Outcome.NOT_APPLIED


async def test_a_refusal_by_the_function_says_nothing_about_the_try_before(
    shell, proxy, server, lane
):
    async with (
        await shell.connect(server.url) as beside,
        await shell.connect(proxy.url, factor=200, base=1) as backend,
    ):
        eid, handle = await claimed(beside, lane)
        proxy.cut_after(DOWN, 1)
        reporting = asyncio.ensure_future(backend.progress(handle, 50))
        await wait_until_async(partial(_progressed, beside, eid))
        await beside.complete(handle)
        with pytest.raises(ExecutionNotActive) as caught:
            await reporting
        assert caught.value.outcome is Outcome.UNKNOWN
        assert caught.value.terminal_outcome == "success"


async def _progressed(backend, eid):
    return (await backend.describe(eid)).progress_percent == 50


async def _has_two(backend, eid):
    return len(await backend.read_stream(eid)) == 2


async def _waits(backend, eid):
    return (await backend.describe(eid)).state == "waiting"


# -- writers -----------------------------------------------------------------------------------------------------------


async def test_a_writer_that_gives_up_says_that_frames_it_hands_back_may_be_stored(
    shell, proxy, server, lane
):
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        with away(proxy):
            writer.write(b"1")
            await writer.flush(5)
            lose_one_reply_and_then_refuse(proxy)
            writer.write(b"2")
            with pytest.raises(Unavailable) as caught:
                await writer.flush(5)
        assert [frame.payload for frame in caught.value.unstored] == [b"2"]
        assert caught.value.outcome is Outcome.UNKNOWN
        assert str(caught.value).endswith("Some of the unstored frames may be stored.")
        with pytest.raises(Unavailable) as again:
            writer.write(b"3")
        assert again.value.outcome is Outcome.UNKNOWN
    assert [frame.payload for frame in frames(server.url, eid)] == [b"1", b"2"]


async def test_a_writer_whose_frames_were_never_sent_says_not_applied(shell, proxy, server, lane):
    async with await shell.connect(proxy.url, retries=2, factor=1) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        with away(proxy):
            writer.write(b"1")
            await writer.flush(5)
            proxy.refuse()
            proxy.cut_all("fin")
            await asyncio.to_thread(wait_until, lambda: proxy.connections == 0)
            # The blocking shell learns of the end by the first batch that it sends into it.
            with contextlib.suppress(FFError):
                writer.write(b"2")
                await writer.flush(5)
            if shell.kind == "asyncio":
                assert writer.error.outcome is Outcome.NOT_APPLIED
            assert [frame.payload for frame in writer.error.unstored] == [b"2"]
    assert [frame.payload for frame in frames(server.url, eid)] == [b"1"]


async def test_closing_the_backend_amid_a_batch_leaves_its_frames_unknown(
    shell, proxy, server, lane
):
    backend = await shell.connect(proxy.url)
    _, handle = await claimed(backend, lane)
    writer = await backend.open_writer(handle)
    # The blocking shell connects its writers with their first frame.
    writer.write(b"1")
    await writer.flush(5)
    proxy.hold(DOWN)
    writer.write(b"2")
    await asyncio.to_thread(wait_until, lambda: proxy.waiting(DOWN))
    await backend.close()
    proxy.release()
    assert writer.error.code == "writer_closed"
    assert writer.error.outcome is Outcome.UNKNOWN
    assert len(writer.error.unstored) == 1


async def test_a_fence_that_refuses_a_batch_leaves_nothing_unknown(shell, server, lane):
    async with await shell.connect(server.url) as backend:
        _, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        await backend.complete(handle)
        written = 0
        # A write is refused from the answer to the first batch on.
        with contextlib.suppress(FFError):
            while written < 3_000:
                writer.write(b"%d" % written)
                written += 1
        with pytest.raises(FFError) as caught:
            await writer.flush(5)
        assert caught.value.outcome is Outcome.NOT_APPLIED
        assert len(caught.value.unstored) == written


async def test_a_fence_that_refuses_what_was_sent_before_leaves_it_unknown(
    shell, proxy, server, lane
):
    async with (
        await shell.connect(server.url) as beside,
        await shell.connect(proxy.url, factor=200, base=1) as backend,
    ):
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle)
        writer.write(b"1")
        await writer.flush(5)
        proxy.cut_after(DOWN, 1)
        writer.write(b"2")
        await wait_until_async(partial(_has_two, beside, eid))
        await beside.complete(handle)
        with pytest.raises(FFError) as caught:
            await writer.flush(5)
        assert caught.value.code == "stream_closed"
        assert [frame.payload for frame in caught.value.unstored] == [b"2"]
        assert caught.value.outcome is Outcome.UNKNOWN


# -- steps after the one that counts -------------------------------------------------------------------------------------


HINTED = {
    "complete": lambda b, ids: b.complete(ids["child"], b"answer"),
    "fail": lambda b, ids: b.fail(ids["child"], "broken"),
    "cancel": lambda b, ids: b.cancel(ids["child"]),
    "cancel_flow": lambda b, ids: b.cancel_flow(ids["flow"]),
    "deliver_signal": lambda b, ids: b.deliver_signal(ids["suspended"], ids["waitpoint"], "go"),
    "create_execution": lambda b, ids: b.create_execution(
        lane=ids["lane"], execution_id=ids["new"]
    ),
}
DONE = {
    "complete": "completed",
    "fail": "failed",
    "cancel": "cancelled",
    "cancel_flow": "cancelled",
}


async def hintable(backend, lane):
    """A parent that waits for its last child, a suspended execution, and ids: what each call above makes claimable."""
    flow = await backend.create_flow()
    parent = await backend.create_execution(lane=lane)
    held = await backend.claim(lane=lane)
    child = await backend.create_execution(
        lane=lane, parent_id=parent, execution_id=keys.new_execution_id_beside(parent)
    )
    handle = await backend.claim(lane=lane)
    await backend.wait_children(held)
    suspended, other = await claimed(backend, lane)
    waitpoint = await backend.create_waitpoint(other)
    await backend.suspend(
        other, ff_fast.WaitpointSpec(ff_fast.WaitpointKind.SIGNAL_NAME, b"go", waitpoint.hmac_token)
    )
    return {
        "lane": lane, "flow": flow, "parent": parent, "child": handle, "child id": child,
        "suspended": suspended, "waitpoint": waitpoint, "new": keys.new_execution_id(),
    }  # fmt: skip


async def done(backend, name, ids):
    """Assert that the call took effect, and that a worker finds the work that it made claimable."""
    if name in ("complete", "fail", "cancel"):
        assert (await backend.describe(ids["child id"])).state == DONE[name]
        assert (await backend.describe(ids["parent"])).state == "waiting"
    if name != "cancel_flow":
        policy = ff_fast.ClaimPolicy.with_max_wait(5)
        assert await backend.claim(lane=ids["lane"], policy=policy) is not None


@pytest.mark.parametrize("name", HINTED)
async def test_a_hint_that_is_lost_leaves_the_call_done(shell, name, proxy, server, lane):
    async with (
        await shell.connect(server.url) as beside,
        await shell.connect(proxy.url, retries=0) as backend,
    ):
        ids = await hintable(beside, lane)
        proxy.cut_before = b"ZADD"
        await HINTED[name](backend, ids)
        if name != "cancel_flow":
            assert proxy.cut_before is None
        proxy.cut_before = None
        # The next call has a connection of its own.
        await backend.describe(ids["parent"])
        async with await shell.connect(server.url) as fresh:
            await done(fresh, name, ids)


@pytest.fixture(scope="module")
def without_hints():
    """A user who may do everything but touch the lanes' ready queues, and the server's own users."""
    with EmbeddedServer() as running, connect_raw(running.url) as raw:
        raw.execute_command(
            "ACL", "SETUSER", "nohints", "on", ">secret", "~*{fp:*", "~ff:config:*", "&*", "+@all"
        )
        raw.acl_log_reset()
        yield running.url, running.url.replace("unix://", "unix://nohints:secret@", 1)
        denied = {entry["object"] for entry in raw.acl_log()}
        assert denied
        assert all(name.startswith("ff:lane:") for name in denied)


@pytest.mark.parametrize("name", HINTED)
async def test_a_hint_that_is_refused_leaves_the_call_done(shell, name, without_hints, lane):
    url, restricted = without_hints
    async with await shell.connect(url) as beside, await shell.connect(restricted) as backend:
        ids = await hintable(beside, lane)
        await HINTED[name](backend, ids)
        async with await shell.connect(url) as fresh:
            await done(fresh, name, ids)


async def test_a_refused_hint_does_not_keep_a_supervisor_from_its_timers(
    shell, without_hints, lane
):
    url, restricted = without_hints
    async with await shell.connect(url) as beside, await shell.connect(restricted) as backend:
        eids = [await beside.create_execution(lane=lane, delay=0.001) for _ in range(5)]
        stop = threading.Event()
        supervising = asyncio.ensure_future(backend.supervise(stop=stop, interval=0.01))
        for eid in eids:
            await wait_until_async(partial(_waits, beside, eid))
        assert not supervising.done()
        stop.set()
        await supervising
