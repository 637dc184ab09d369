"""Both shells, so that one test says what holds for both: ``sync`` is :mod:`ff_fast`, ``asyncio`` is :mod:`ff_fast.aio`.

A test looks at them from one of three sides:

- blocking, as ``Opener`` opens them. The blocking shell is used as it is. The asyncio shell gets a loop of its own, which
  runs while a call of it waits and stands still between two calls; so its tests need no thread.
- awaited, as ``Shell`` opens them: for tests that do other things meanwhile. A call of the blocking shell runs on a thread
  of its own.
- from beside, as ``Background`` and ``Reading`` run them: something that goes on by itself in a thread.
"""

import asyncio
import contextlib
import inspect
import threading
import time

import ff_fast
from ff_fast import aio
from ff_fast.types import BackendConfig, BackendRetry, BackendTimeouts

from . import waiting

KINDS = ("sync", "asyncio")
WORKER = {"worker_id": "w", "worker_instance_id": "w-1"}

# -- the blocking face --------------------------------------------------------------------------------------------------


_READERS = (aio.Tail, aio.Follow, aio.Completions)
_WRAPPED = (aio.Writer, aio.OpenedStream, *_READERS)


class _Blocking:
    """An object of the asyncio shell: what it would have awaited is run to its end."""

    def __init__(self, target, loop):
        self._target = target
        self._loop = loop

    def __getattr__(self, name):
        if name == "close" and isinstance(self._target, _READERS):
            name = "aclose"
        value = getattr(self._target, name)
        return self._call(value) if callable(value) else value

    def __repr__(self):
        return repr(self._target)

    def _call(self, function):
        def called(*args, **options):
            result = function(*args, **options)
            if inspect.isawaitable(result):
                result = self._loop.run_until_complete(_awaited(result))
            return _Blocking(result, self._loop) if isinstance(result, _WRAPPED) else result

        return called

    def __enter__(self):
        self._loop.run_until_complete(self._target.__aenter__())
        return self

    def __exit__(self, *raised):
        return self._loop.run_until_complete(self._target.__aexit__(*raised))

    def wait_until(self, condition, deadline_s=15.0):
        """`waiting.wait_until` while the loop runs."""

        async def asked():
            return condition()

        return self._loop.run_until_complete(waiting.wait_until_async(asked, deadline_s))

    def paced(self, rate_hz, seconds, step):
        """Call ``step(i)`` *rate_hz* times a second while the loop runs."""

        async def run():
            began = time.monotonic()
            done = 0
            while done < rate_hz * seconds:
                due = min(int((time.monotonic() - began) * rate_hz), int(rate_hz * seconds))
                for i in range(done, due):
                    step(i)
                done = max(done, due)
                await asyncio.sleep(0.001)

        self._loop.run_until_complete(run())


async def _awaited(result):
    return await result


class _Sync:
    """The blocking shell's backend with the few helpers that the tests need of both."""

    def __init__(self, backend):
        self._backend = backend

    def __getattr__(self, name):
        return getattr(self._backend, name)

    def wait_until(self, condition, deadline_s=15.0):
        return waiting.wait_until(condition, deadline_s)

    def paced(self, rate_hz, seconds, step):
        began = time.monotonic()
        done = 0
        while done < rate_hz * seconds:
            due = min(int((time.monotonic() - began) * rate_hz), int(rate_hz * seconds))
            for i in range(done, due):
                step(i)
            done = max(done, due)
            time.sleep(0.001)


class Opener:
    """Opens backends of one shell, and closes them all at last."""

    def __init__(self, kind):
        self.kind = kind
        self._backends = []
        self._loop = asyncio.new_event_loop() if kind == "asyncio" else None

    def __call__(self, target):
        if self._loop is None:
            backend = _Sync(ff_fast.ValkeyBackend.connect(target))
        else:

            async def connect():
                return await aio.ValkeyBackend.connect(target)

            backend = _Blocking(self._loop.run_until_complete(connect()), self._loop)
        self._backends.append(backend)
        return backend

    def close(self):
        for backend in self._backends:
            backend.close()
        if self._loop is not None:
            self._loop.close()


# -- the awaited face ---------------------------------------------------------------------------------------------------

PLAIN = {"write", "write_frame", "wrapped"}


_AWAITED = (aio.Writer, ff_fast.Writer, aio.OpenedStream, ff_fast.OpenedStream)


class _Awaited:
    def __init__(self, wrapped):
        self.wrapped = wrapped

    def __getattr__(self, name):
        value = getattr(self.wrapped, name)
        if not callable(value) or name in PLAIN or isinstance(value, Exception):
            return value

        async def call(*args, **options):
            if isinstance(self.wrapped, aio.ValkeyBackend | aio.Writer | aio.OpenedStream):
                result = value(*args, **options)
                result = await result if inspect.isawaitable(result) else result
            else:
                result = await asyncio.to_thread(value, *args, **options)
            return _Awaited(result) if isinstance(result, _AWAITED) else result

        return call

    async def items(self, *args, **options):
        """Everything that a tail yields."""
        if isinstance(self.wrapped, aio.ValkeyBackend):
            return [item async for item in self.wrapped.tail(*args, **options)]
        return await asyncio.to_thread(lambda: list(self.wrapped.tail(*args, **options)))

    async def __aenter__(self):
        return self

    async def __aexit__(self, *raised):
        if isinstance(self.wrapped, aio.OpenedStream):
            await self.wrapped.__aexit__(*raised)
        elif isinstance(self.wrapped, ff_fast.OpenedStream):
            await asyncio.to_thread(self.wrapped.__exit__, *raised)
        else:
            await self.close()


class Shell:
    """Opens backends of one shell behind the awaited face."""

    def __init__(self, kind):
        self.kind = kind

    async def connect(self, target, **limits):
        if limits:
            target = config(target, **limits)
        if self.kind == "asyncio":
            return _Awaited(await aio.ValkeyBackend.connect(target))
        return _Awaited(await asyncio.to_thread(ff_fast.ValkeyBackend.connect, target))


def config(url, *, timeout=None, retries=None, factor=None, base=None, **kept):
    """The configuration of *url* with other limits."""
    given = BackendConfig.from_url(url)
    return BackendConfig(
        given.connection,
        timeouts=BackendTimeouts(request=timeout),
        retry=BackendRetry(number_of_retries=retries, factor=factor, exponent_base=base),
        **kept,
    )


def with_option(url, option):
    """*url* with one more parameter; that of a cluster has some."""
    return f"{url}{'&' if '?' in url else '?'}{option}"


# -- in a thread beside the test ------------------------------------------------------------------------------------------


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

    def result(self, deadline_s=20.0):
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
            self.join(20)


class Reading(Background):
    """A reader in a thread of its own; ``items`` is what it brought."""

    def __init__(self, kind, url):
        super().__init__(kind, url)
        self.items = []
        self.start()

    def open(self):
        """Open the reader on ``self.backend``."""
        raise NotImplementedError

    def take(self, item):
        """Take an item; return whether it was the last one that is wanted."""
        self.items.append(item)
        return False

    def work(self, stop):
        reader = self.open()
        return self._read(reader) if self.kind == "sync" else self._read_async(reader)

    def _read(self, reader):
        for item in reader:
            if self.take(item):
                break
        reader.close()

    async def _read_async(self, reader):
        async for item in reader:
            if self.take(item):
                break
        await reader.aclose()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        """Leave nothing behind, however the test ended."""
        assert self._ready.wait(20)
        if self.is_alive():
            self.close_backend()
        self.join(20)

    def result(self, deadline_s=15.0):
        """What it brought, once it is over."""
        super().result(deadline_s)
        return self.items
