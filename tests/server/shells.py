"""Both shells behind one blocking face, so that one test says what holds for both.

The blocking shell is used as it is. The asyncio shell gets a loop of its own, which runs while a call of it waits
and stands still between two calls; so its tests need no thread.
"""

import asyncio
import inspect
import time

import ff_fast
from ff_fast import aio

from .. import waiting

_WRAPPED = (aio.Writer, aio.Tail, aio.Completions)


class _Blocking:
    """An object of the asyncio shell: what it would have awaited is run to its end."""

    def __init__(self, target, loop):
        self._target = target
        self._loop = loop

    def __getattr__(self, name):
        if name == "close" and isinstance(self._target, aio.Tail | aio.Completions):
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

    def wait_until(self, condition, deadline_s=5.0):
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

    def wait_until(self, condition, deadline_s=5.0):
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
