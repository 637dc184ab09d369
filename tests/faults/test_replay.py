"""Acknowledged frames that a failover loses: their writer stores them again, or the stream says that they are lost."""

import pytest

from ff_fast import End, Gap, StreamFrame, StreamMode, TailVisibility
from ff_fast.errors import FramesLost, SequenceGap

from .failover import Past
from .stored import claimed

ALL, EXCLUDE = TailVisibility.ALL, TailVisibility.EXCLUDE_BEST_EFFORT
MODES = {
    "durable": StreamMode.durable(),
    "summary": StreamMode.durable_summary(),
    "best_effort": StreamMode.best_effort_live(600_000),
}


async def put(writer, first, last, mode=None):
    """Write frames and wait until they are stored."""
    for n in range(first, last + 1):
        assert writer.write(b'{"f%d":%d}' % (n % 7, n), mode=mode) == n
    await writer.flush(20)


def frames_of(items):
    return [item for item in items if isinstance(item, StreamFrame)]


@pytest.mark.parametrize("mode", MODES)
async def test_a_writer_stores_again_what_a_failover_has_lost(mode, pair, shell, lane):
    async with await shell.connect(pair.url) as backend:
        eid, handle = await claimed(backend, lane)
        writer = await backend.open_writer(handle, mode=MODES[mode])
        await put(writer, 1, 5)
        pair.stall()
        await put(writer, 6, 10)
        seen = list(await backend.read_stream(eid))
        pair.promote()
        writer.write(b"{}")
        await writer.flush(20)
        await writer.close(20)
        await backend.complete(handle, b"result")
        items = await backend.items(eid)
        assert frames_of(items)[:10] == seen
        assert items[-1] == End("attempt_success")
        assert len(items) == 12
