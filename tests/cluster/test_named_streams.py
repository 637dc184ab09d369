"""Named streams when a server is replaced by one that lacks the last of them."""

import asyncio

import pytest

from ff_fast import keys

from ..faults.test_named_streams import SOON, followed


# Where one server stands alone, tests/faults has the same.
@pytest.mark.parametrize(
    "shell, failover", [("sync", "sentinel"), ("asyncio", "cluster")], indirect=True
)
async def test_frames_that_a_failover_lost_are_stored_again_before_the_end(shell, failover, lane):
    name = {"name": "chat", "namespace": lane, "ttl": 60}
    eid = keys.execution_id_for("chat", namespace=lane)
    slot = keys.key_slot(keys.core(eid))
    async with await shell.connect(failover.url) as backend:
        stream = await backend.open_stream(**name)
        stream.write(b"a")
        await stream.flush(SOON)
        await asyncio.to_thread(failover.stall, slot)
        stream.write(b"b")
        await stream.flush(SOON)
        await asyncio.to_thread(failover.promote)
        async with stream:
            stream.write(b"c")
        assert await followed(backend, eid) == [0, b"a", b"b", b"c", ("success", None)]
        assert (await backend.open_stream(**name)).role == "consumer"
