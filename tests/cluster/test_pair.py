"""A primary and its replica behind one address, without anybody who watches them."""

import asyncio
import contextlib

import pytest

from ff_fast import End

from ..faults.stored import claimed
from .chaos.site import PairSite


@pytest.mark.long
async def test_a_planned_failover_of_a_pair_loses_nothing(shell, lane):
    """``FAILOVER`` waits until the replica has everything, so that nobody needs what writers keep."""
    with contextlib.closing(PairSite()) as site:
        async with await shell.connect(site.url, replay_ms=0) as backend:
            eid, handle = await claimed(backend, lane)
            writer = await backend.open_writer(handle)
            for n in range(1, 11):
                writer.write(b"%d" % n)
                if n == 5:
                    await writer.flush(20)
                    await asyncio.to_thread(site.planned)
            await writer.close(20)
            await backend.complete(handle, b"result")
            items = await backend.items(eid)
            assert [item.payload for item in items[:-1]] == [b"%d" % n for n in range(1, 11)]
            assert items[-1] == End("attempt_success")
