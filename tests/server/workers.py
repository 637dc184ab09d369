"""Workers and supervisors of either shell, in threads of their own, and handlers that are written once for both.

Such a handler is a generator: it yields what the asyncio shell would await, and gets its value.
"""

import inspect
import threading

import ff_fast

from ..shells import Background, Reading
from ..waiting import wait_until, wait_until_async


def opened(task):
    """The writer of a task; yield it."""
    return task.writer


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
    if isinstance(handler, ff_fast.Worker):
        return handler
    return _of_sync(handler) if kind == "sync" else _of_asyncio(handler)


class Worker(Background):
    def __init__(self, kind, url, handler, **options):
        super().__init__(kind, url)
        self._handler = handler_for(kind, handler)
        # The suite shares its server, and each test says who supervises.
        self._options = {"supervise": False, **options}

    def work(self, stop):
        return self.backend.run_worker(self._handler, stop=stop, **self._options)


class Supervisor(Background):
    def __init__(self, kind, url, scope=None, interval=0.02):
        super().__init__(kind, url)
        self._scope, self._interval = scope, interval

    def work(self, stop):
        return self.backend.supervise(self._scope, interval=self._interval, stop=stop)


class Subscription(Reading):
    """A subscription to completions: ends after *count* items, or with the first one behind ``ended``."""

    def __init__(self, kind, url, scope=None, after=None, count=None):
        self._scope, self._after, self._count = scope, after, count
        self.ended = threading.Event()
        self._reader = None
        super().__init__(kind, url)

    def open(self):
        self._reader = self.backend.subscribe_completions(self._scope, after=self._after)
        return self._reader

    @property
    def begun(self):
        """Whether it knows from where it reads."""
        return self._reader is not None and self._reader.cursor is not None

    def take(self, item):
        self.items.append(item)
        return len(self.items) == self._count or self.ended.is_set()
