"""A worker or a supervisor in a process of its own: ``python -m tests.soak.child ROLE KIND URL LANE FILE``."""

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import threading
import time
import traceback
import warnings

import ff_fast
from ff_fast import RetryPolicy, WaitpointKind, WaitpointSpec, aio
from ff_fast.errors import FFError

from ..server.workers import handler_for
from ..shells import config
from .account import Teller
from .job import CHILD, MODES, Job, child_ids, frame

LEASE_MS = 2_000
RETENTION_S = 180.0
PATIENT = RetryPolicy(max_retries=100_000, delay=0.05, max_delay=0.2, max_reclaims=100_000)


def sleep(task, seconds):
    """Sleep in a handler; yield it."""
    return time.sleep(seconds) if isinstance(task, ff_fast.Task) else asyncio.sleep(seconds)


class Handler:
    """Does what the payload says, from where the stream of its attempt stands."""

    def __init__(self, teller):
        self.backend = None
        self._tell = teller

    def __call__(self, task):
        job = Job.load(task.payload)
        stood, end = task.writer.next_sequence - 1, 0
        for burst in job.bursts:
            end += burst.frames
            if stood < end:
                yield from self._write(task, job, burst, end)
            if burst.pause and (stood < end or (stood == end and not task.resumed)):
                yield from self._pause(task, job, burst)
        if job.end == "failed":
            raise ff_fast.TaskFailed("as its job says")
        return f"{task.execution_id}/{task.attempt_index}"

    def _write(self, task, job, burst, end):
        while (sequence := task.writer.next_sequence) <= end:
            payload = frame(task.execution_id, task.attempt_index, sequence, burst)
            assert task.write(payload, mode=MODES[burst.mode]) == sequence
            if sequence == job.length and task.attempt_index < job.failures:
                raise RuntimeError("as its job says")
            if sequence % 50 == 0:
                yield task.writer.drain()
            if burst.pace_ms:
                yield sleep(task, burst.pace_ms / 1000)
        yield task.flush()
        self._tell.say("stored", eid=task.execution_id, attempt=task.attempt_index, sequence=end)

    def _pause(self, task, job, burst):
        if burst.pause == "delay":
            yield task.delay(0.1)
        elif burst.pause == "children":
            for eid in child_ids(task.execution_id, job.children):
                yield self.backend.create_execution(
                    execution_id=eid,
                    parent_id=task.execution_id,
                    lane=task.handle.fields().lane_id,
                    payload=CHILD.dump(),
                    retry=PATIENT,
                    retention=RETENTION_S,
                )
            yield task.wait_children()
        else:
            waitpoint = yield task.create_waitpoint()
            token = waitpoint.hmac_token
            self._tell.say(
                "waitpoint", eid=task.execution_id, id=waitpoint.waitpoint_id, token=token.reveal()
            )
            yield task.suspend(WaitpointSpec(WaitpointKind.SIGNAL_NAME, b"go", token))


def work(kind, url, lane, teller):
    handler = Handler(teller)
    options = {"lane": lane, "lease_ttl_ms": LEASE_MS, "concurrency": 4}
    run = handler_for(kind, handler)
    if kind == "sync":
        with ff_fast.ValkeyBackend.connect(config(url, timeout=2.0)) as handler.backend:
            teller.say("began")
            handler.backend.run_worker(run, **options)
        return

    async def main():
        """SIGUSR1 cancels the worker, and another one begins."""
        loop = asyncio.get_running_loop()
        async with aio.ValkeyBackend.connect(config(url, timeout=2.0)) as handler.backend:
            while True:
                worker = asyncio.create_task(handler.backend.run_worker(run, **options))
                loop.add_signal_handler(signal.SIGUSR1, worker.cancel)
                teller.say("began")
                await asyncio.wait({worker})
                if not worker.cancelled():
                    return worker.result()

    asyncio.run(main())


def supervise(kind, url, teller):
    if kind == "sync":
        stop = threading.Event()
        signal.signal(signal.SIGTERM, lambda *_: stop.set())
        with ff_fast.ValkeyBackend.connect(config(url, timeout=2.0)) as backend:
            teller.say("began")
            backend.supervise(interval=0.1, stop=stop)
        return

    async def main():
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        async with aio.ValkeyBackend.connect(config(url, timeout=2.0)) as backend:
            teller.say("began")
            await backend.supervise(interval=0.1, stop=stop)

    asyncio.run(main())


def main(role, kind, url, lane, file):
    # Handlers raise and connections break on purpose; what else is on stderr is a fault.
    logging.getLogger("ff_fast").addHandler(logging.NullHandler())
    teller = Teller(file)
    warnings.showwarning = lambda warning, *_: teller.say("warned", text=str(warning))
    while True:
        try:
            if role == "worker":
                work(kind, url, lane, teller)
            else:
                supervise(kind, url, teller)
        except FFError as error:
            # As a service manager does: a server that cannot be reached for long ends a process, which is started again.
            if not error.retryable:
                teller.say("complaint", text=f"{role} ended: {traceback.format_exc()}")
            time.sleep(0.2)
        else:
            return


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main(*sys.argv[1:])
    gc.collect()
