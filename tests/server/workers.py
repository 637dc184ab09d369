"""Workers and supervisors of either shell, in threads of their own, and handlers that are written once for both.

Such a handler is a generator: it yields what the asyncio shell would await, and gets its value.
"""

import asyncio
import contextlib
import inspect
import threading

import ff_fast
from ff_fast import aio

from ..waiting import wait_until, wait_until_async

KINDS = ("sync", "asyncio")
WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}


def opened(task):
    """Open the writer of a task; yield it."""
    return task.open() if hasattr(task, "open") else task.writer


def until(task, condition):
    """Wait for a condition in a handler; yield it."""
    if isinstance(task, ff_fast.Task):
        return wait_until(condition, 20)

    async def asked():
        return condition()

    return wait_until_async(asked, 20)


def _of_sync(handler):
    def run(task):
        steps = handler(task)
        if not inspect.isgenerator(steps):
            return steps
        value = None
        try:
            while True:
                value = steps.send(value)
        except StopIteration as stop:
            return stop.value

    return run


def _of_asyncio(handler):
    async def run(task):
        steps = handler(task)
        if not inspect.isgenerator(steps):
            return steps
        try:
            step = steps.send(None)
            while True:
                try:
                    value = await step if inspect.isawaitable(step) else step
                except BaseException as error:  # noqa: BLE001 - the generator's to see
                    step = steps.throw(error)
                else:
                    step = steps.send(value)
        except StopIteration as stop:
            return stop.value

    return run


def handler_for(kind, handler):
    return _of_sync(handler) if kind == "sync" else _of_asyncio(handler)


class Background(threading.Thread):
    """A backend of one shell in a thread, with something that runs on it until it is stopped.

    ``backend`` is the shell's own; of asyncio, only its loop may use it: see `call`.
    """

    def __init__(self, kind, url):
        super().__init__(daemon=True)
        self.kind = kind
        self.url = url
        self.error = None
        self.backend = None
        self.complaints = []
        self._stop_event = None
        self._loop = None
        self._task = None
        self._closing = None
        self._ready = threading.Event()

    def begin(self):
        self.start()
        assert self._ready.wait(20)
        return self

    def run(self):
        try:
            if self.kind == "sync":
                with ff_fast.ValkeyBackend.connect(self.url) as self.backend:
                    self._stop_event = threading.Event()
                    self._ready.set()
                    self.work(self._stop_event)
            else:
                asyncio.run(self._run())
        except BaseException as error:  # noqa: BLE001 - the test's thread raises it
            self.error = error
        finally:
            self._ready.set()

    async def _run(self):
        self._loop = asyncio.get_running_loop()
        self._loop.set_exception_handler(lambda _, context: self.complaints.append(context))
        self._stop_event = asyncio.Event()
        async with aio.ValkeyBackend.connect(self.url) as self.backend:
            self._task = self._loop.create_task(self.work(self._stop_event))
            self._ready.set()
            try:
                await self._task
            finally:
                if self._closing is not None:
                    await self._closing
                left = asyncio.all_tasks() - {asyncio.current_task()} - self.backend._tasks
                assert not left, f"tasks left: {left}"

    def work(self, stop):
        raise NotImplementedError

    def ask(self):
        """Ask it to stop, without waiting."""
        if self._loop is None:
            self._stop_event.set()
        else:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._stop_event.set)

    def cancel(self):
        self._loop.call_soon_threadsafe(self._task.cancel)

    def close_backend(self):
        """Close the backend under it."""
        if self._loop is None:
            self.backend.close()
        else:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop)

    async def _close(self):
        self._closing = asyncio.current_task()
        await self.backend.close()

    def result(self, deadline_s=10.0):
        """Wait for its end, and raise what it raised."""
        self.join(deadline_s)
        assert not self.is_alive(), "it still runs"
        if self.error is not None:
            raise self.error
        assert not self.complaints, self.complaints

    def __enter__(self):
        return self.begin()

    def __exit__(self, kind, error, where):
        self.ask()
        if kind is None:
            self.result()
        else:
            self.join(10)


class Worker(Background):
    def __init__(self, kind, url, handler, **options):
        super().__init__(kind, url)
        self._handler = handler_for(kind, handler)
        self._options = options

    def work(self, stop):
        return self.backend.run_worker(self._handler, stop=stop, **self._options)


class Supervisor(Background):
    def __init__(self, kind, url, scope=None, interval=0.02):
        super().__init__(kind, url)
        self._scope, self._interval = scope, interval

    def work(self, stop):
        return self.backend.supervise(self._scope, interval=self._interval, stop=stop)


class Subscription(threading.Thread):
    """A subscription to completions in a thread, of either shell; ``items`` is what it brought."""

    def __init__(self, kind, url, scope=None, after=None, count=None):
        super().__init__(daemon=True)
        self._kind, self._url, self._scope, self._after = kind, url, scope, after
        self._count = count
        self.items = []
        self.error = None
        self.ended = threading.Event()
        self.start()

    def run(self):
        try:
            if self._kind == "sync":
                with ff_fast.ValkeyBackend.connect(self._url) as backend:
                    found = backend.subscribe_completions(self._scope, after=self._after)
                    for item in found:
                        self.items.append(item)
                        if len(self.items) == self._count or self.ended.is_set():
                            break
                    found.close()
            else:
                asyncio.run(self._run())
        except BaseException as error:  # noqa: BLE001 - the test's thread raises it
            self.error = error

    async def _run(self):
        async with aio.ValkeyBackend.connect(self._url) as backend:
            found = backend.subscribe_completions(self._scope, after=self._after)
            async for item in found:
                self.items.append(item)
                if len(self.items) == self._count or self.ended.is_set():
                    break
            await found.aclose()

    def result(self):
        self.join(10)
        assert not self.is_alive(), f"it still waits after {self.items[-3:]}"
        if self.error is not None:
            raise self.error
        return self.items
