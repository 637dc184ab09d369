"""Workers of both shells, each in a thread of its own.

What the end of a handler means is decided in the core, and held in ``tests/unit/test_worker_core.py``.
"""

import pytest

import ff_fast
from ff_fast._core import operations as operations_core

from ...shells import KINDS
from ...waiting import wait_until
from ..workers import Supervisor, Worker


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def backend(server):
    with ff_fast.ValkeyBackend.connect(server.url) as connected:
        yield connected


@pytest.fixture
def supervisor(server):
    with Supervisor("sync", server.url) as running:
        yield running


@pytest.fixture(autouse=True)
def prompt_workers(monkeypatch):
    """Workers look more often whether they shall stop."""
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)


@pytest.fixture
def worker(kind, server, lane):
    """``worker(handler, **options)``: a worker of the test's lane and shell, stopped at the end."""
    started = []

    def start(handler, **options):
        options = {"lane": lane, **options}
        started.append(Worker(kind, server.url, handler, **options).begin())
        return started[-1]

    yield start
    for one in started:
        one.ask()
    for one in started:
        one.join(20)
        assert not one.is_alive()


@pytest.fixture
def state(backend):
    """``state(eid)`` waits for an end, and returns it."""

    def wait(eid, *expected):
        expected = expected or ("completed", "failed", "cancelled", "expired")
        return wait_until(lambda: (found := backend.describe(eid).state) in expected and found, 20)

    return wait
