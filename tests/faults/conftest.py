"""Fault tests are coroutines; each is run in a loop of its own and must leave nothing behind."""

import asyncio
import contextlib
import gc
import inspect
import os
import threading
from pathlib import Path

import pytest

from ff_fast.embedded import EmbeddedServer

from .. import waiting
from ..shells import KINDS, Shell
from .chaos import ChaosProxy
from .failover import Failover


def descriptors():
    """Sockets and selectors that this process holds open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            target = str(link.readlink())
            if "socket:" in target or "eventpoll" in target:
                found.append(target)
    return found


def threads():
    return {thread for thread in threading.enumerate() if "chaos" not in thread.name}


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem):
    if not inspect.iscoroutinefunction(pyfuncitem.obj):
        return None
    names = inspect.signature(pyfuncitem.obj).parameters
    arguments = {name: pyfuncitem.funcargs[name] for name in names}
    before, running = len(descriptors()), threads()
    complaints = []

    async def checked():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: complaints.append(context))
        await pyfuncitem.obj(**arguments)
        await loop.shutdown_default_executor()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        assert not left, f"tasks left: {left}"

    asyncio.run(checked())
    gc.collect()
    assert not complaints
    waiting.wait_until(lambda: threads() <= running)
    waiting.wait_until(lambda: len(descriptors()) <= before)
    return True


@pytest.fixture(params=KINDS)
def shell(request):
    return Shell(request.param)


@pytest.fixture
def own_server():
    """A server that the test may break."""
    with EmbeddedServer(debug_command=True) as running:
        yield running


@pytest.fixture
def proxy(server):
    with ChaosProxy(server.url) as running:
        yield running


@pytest.fixture
def pair():
    """A primary with a replica, and an address that moves to it."""
    with Failover() as running:
        yield running


@pytest.fixture
def seed(request):
    """Of the test's dice; a failure shows it. FF_FAST_SEED repeats one."""
    chosen = int(os.environ.get("FF_FAST_SEED", "0")) or int.from_bytes(os.urandom(4), "big")
    print(f"FF_FAST_SEED={chosen}")
    return chosen
