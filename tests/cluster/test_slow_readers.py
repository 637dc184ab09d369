"""A link that stalls while a node pushes, and that the server then cuts off."""

import asyncio

import pytest

from ff_fast import End

from ..shells import WORKER
from .test_calls import execution_at
from .test_faults import proxied, proxied_cluster  # noqa: F401

pytestmark = pytest.mark.long

FRAMES = 600
PADDING = b"x" * 400


async def test_readers_of_a_link_that_stalls_are_whole_and_those_of_other_nodes_do_not_wait(
    shell,
    cluster,
    proxied,  # noqa: F811
    lane,
):
    node, proxy = proxied.node, proxied.proxy
    other = next(each for each in cluster.nodes if each is not node)
    async with await shell.connect(proxied.url) as far:
        slow_eid = await execution_at(far, cluster, node, lane)
        slow = await far.claim(lane=lane, **WORKER)
        quick_eid = await execution_at(far, cluster, other, lane)
        quick = await far.claim(lane=lane, **WORKER)
        assert (slow.execution_id, quick.execution_id) == (slow_eid, quick_eid)
        slow_writer = await far.open_writer(slow)
        quick_writer = await far.open_writer(quick)
        reading = [asyncio.ensure_future(far.items(slow_eid)) for _ in range(2)]
        quick_tail = far.wrapped.tail(quick_eid)
        idle = far.wrapped.tail(slow_eid)
        for writer in (slow_writer, quick_writer):
            writer.write(b"first")
            await writer.flush(5)
        assert (await _batch(shell, quick_tail, 5))[0].payload == b"first"
        assert (await _batch(shell, idle, 5))[0].payload == b"first"
        proxy.pushes_held = True
        for i in range(FRAMES):
            slow_writer.write(b"%d " % i + PADDING)
            # A push each.
            await slow_writer.flush(5)
            if i % 50 == 0:
                # Beside the stalled link.
                quick_writer.write(b"%d" % i)
                await quick_writer.flush(5)
                (item,) = await _batch(shell, quick_tail, 5)
                assert item.payload == b"%d" % i
        await slow_writer.flush(10)
        # As at its limit; how much the kernels of both sides take before that differs.
        assert node.command("CLIENT", "KILL", "TYPE", "pubsub") >= 1
        proxy.release()
        await slow_writer.close()
        await far.complete(slow)
        expected = [b"first", *(b"%d " % i + PADDING for i in range(FRAMES))]
        for items in await asyncio.gather(*reading):
            _is_whole(items, expected)
        items = []
        while not (items and isinstance(items[-1], End)):
            items += await _batch(shell, idle, 5)
        _is_whole(items, expected[1:])
        await quick_writer.close()
        await far.complete(quick)
        for tail in (quick_tail, idle):
            closed = tail.aclose() if shell.kind == "asyncio" else tail.close()
            if closed is not None:
                await closed


def _is_whole(items, expected):
    assert isinstance(items[-1], End)
    assert [item.payload for item in items[:-1]] == expected


async def _batch(shell, reader, seconds):
    if shell.kind == "asyncio":
        return await reader.next_batch(seconds)
    return await asyncio.to_thread(reader.next_batch, seconds)
