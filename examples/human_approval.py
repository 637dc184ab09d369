"""A handler that asks a human in the middle of its stream, and goes on in the same stream when somebody has answered.

Run it:   pip install 'ff_fast[embedded]'
          python human_approval.py
"""

import asyncio
import os
import sys

from ff_fast import PendingWaitpoint, StreamFrame, WaitpointKind, WaitpointSpec, aio

# Whoever has the id of the waitpoint and its token can answer. Here it is the person at the terminal.
asked: asyncio.Queue[PendingWaitpoint] = asyncio.Queue()


async def handler(task: aio.Task) -> bytes:
    if not task.signals:
        task.write(b"I would send this mail to 12,000 customers. May I? ")
        waitpoint = await task.create_waitpoint()
        await asked.put(waitpoint)
        # Gives the lease up: no worker waits, for days if need be.
        await task.suspend(
            WaitpointSpec(WaitpointKind.SIGNAL_NAME, b"decided", waitpoint.hmac_token)
        )
    (signal,) = task.signals
    said = (signal.payload or b"").decode()
    task.write("Sent." if said == "yes" else "Then I do not.")
    return said.encode()


async def ask(backend: aio.ValkeyBackend, eid: str) -> None:
    waitpoint = await asked.get()
    said = await asyncio.to_thread(sys.stdin.readline)
    await backend.deliver_signal(eid, waitpoint, "decided", payload=said.strip())


async def main() -> None:
    url = os.environ.get("FF_FAST_URL")
    async with aio.ValkeyBackend.connect(url) if url else aio.ValkeyBackend.embedded() as backend:
        stop = asyncio.Event()
        worker = asyncio.create_task(backend.run_worker(handler, lane="mails", stop=stop))
        eid = await backend.create_execution(lane="mails", payload="Spring sale")
        asking = asyncio.create_task(ask(backend, eid))
        async for item in backend.follow(eid):
            if isinstance(item, StreamFrame):
                print(item.payload.decode(), end="", flush=True)
        print()
        stop.set()
        await asyncio.gather(worker, asking)


if __name__ == "__main__":
    asyncio.run(main())
