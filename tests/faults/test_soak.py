"""Minutes of everything at once, with a seed: ``pytest -m soak tests/faults``."""

import asyncio
import os
import random
import signal
import time

import pytest

from ff_fast.embedded import EmbeddedServer

from .chaos import DOWN, UP, ChaosProxy
from .stored import claimed, stored_once
from .test_cuts import MODES, payloads_of

SECONDS = float(os.environ.get("FF_FAST_SOAK_SECONDS", "120"))


@pytest.mark.soak
@pytest.mark.timeout(SECONDS * 3 + 60)
async def test_streams_through_cuts_holds_and_killed_servers(shell, lane, seed):
    dice = random.Random(seed)
    with (
        EmbeddedServer(appendonly=True, appendfsync="always") as server,
        ChaosProxy(server.url) as proxy,
    ):
        async with await shell.connect(proxy.url) as backend:
            until = time.monotonic() + SECONDS
            while time.monotonic() < until:
                proxy.cut_by(())
                streams = []
                for name, mode in MODES.items():
                    eid, handle = await claimed(backend, f"{lane}-{name}")
                    writer = await backend.open_writer(handle, retention_maxlen=20_000)
                    streams.append((eid, mode, payloads_of(name, 3_000), writer))
                for i in range(0, 3_000, 50):
                    for _, mode, payloads, writer in streams:
                        for payload in payloads[i : i + 50]:
                            writer.write(payload, mode=mode)
                    what = dice.randrange(20)
                    if what < 4:
                        proxy.cut_after(dice.choice([UP, DOWN]), dice.randrange(1, 5_000))
                    elif what < 6:
                        proxy.cut_all(dice.choice(["rst", "fin"]))
                    elif what == 6:
                        os.kill(server.pid, signal.SIGKILL)
                        await asyncio.to_thread(server.restart)
                    elif what == 7:
                        proxy.hold(dice.choice([UP, DOWN]))
                        await asyncio.sleep(dice.random() / 5)
                        proxy.release()
                    await asyncio.sleep(0)
                for eid, _, payloads, writer in streams:
                    await writer.flush(60)
                    await writer.close()
                    stored_once(server.url, eid, payloads)
