"""Whoever waits on the server when an administrator, a failover or a limit of the server breaks the wait."""

import pytest

import ff_fast
from ff_fast import ScannerFilter
from ff_fast._core import operations as operations_core
from ff_fast.embedded import EmbeddedServer

from ..conftest import PROMPT, connect_raw
from ..server.readers import DURABLE, Reader, begin, sequences, wait_listening
from ..server.workers import Subscription, Worker
from ..shells import KINDS
from ..waiting import wait_until
from .chaos import DOWN, ChaosProxy

pytestmark = pytest.mark.parametrize("kind", KINDS)


def waiting(raw, command):
    return [c for c in raw.client_list() if "b" in c["flags"] and c["cmd"] == command]


def wait_blocked(raw, command):
    (client,) = wait_until(lambda: waiting(raw, command))
    return client


def demoted(raw, client):
    """The server becomes a replica, which wakes all that wait with -UNBLOCKED, and a primary again."""
    raw.replicaof("127.0.0.1", "1")
    wait_until(lambda: client["id"] not in {c["id"] for c in waiting(raw, client["cmd"])})
    raw.replicaof("NO", "ONE")


def unblocked(raw, client):
    assert raw.client_unblock(int(client["id"]))


def unblocked_with_an_error(raw, client):
    assert raw.client_unblock(int(client["id"]), error=True)


def killed(raw, client):
    assert raw.client_kill_filter(_id=client["id"])


HOW = (demoted, unblocked, unblocked_with_an_error, killed)


@pytest.fixture(scope="module")
def own():
    """A server that these tests may demote."""
    with EmbeddedServer(**PROMPT) as running:
        yield running


@pytest.fixture
def raw(own):
    with connect_raw(own.url) as client:
        yield client


@pytest.fixture
def backend(own):
    with ff_fast.ValkeyBackend.connect(own.url) as running:
        yield running


@pytest.mark.parametrize("how", [demoted, killed])
def test_a_tail_goes_on(kind, how, own, raw, backend, lane):
    attempt = begin(backend, lane)
    reader = Reader(kind, own.url, attempt.eid)
    with backend.open_writer(attempt.handle) as writer:
        for count in (1, 2, 3):
            for client in wait_listening(raw):
                how(raw, client)
            writer.write(b"%d" % count, mode=DURABLE)
            writer.flush(10)
            reader.wait_for(count)
    backend.complete(attempt.handle)
    items = reader.result()
    assert sequences(items) == [1, 2, 3]
    assert items[3].reason == "attempt_success"


@pytest.mark.parametrize("how", [demoted, killed])
def test_a_subscription_goes_on(kind, how, own, raw, backend, lane):
    scope = ScannerFilter(namespace=lane)
    subscription = Subscription(kind, own.url, scope, count=3)
    eids = []
    wait_until(lambda: subscription.begun)
    for _ in range(3):
        for client in wait_listening(raw):
            how(raw, client)
        eids.append(backend.create_execution(lane=lane, namespace=lane))
        backend.cancel(eids[-1])
    # Those of several partitions have no order.
    assert sorted(item.execution_id for item in subscription.result()) == sorted(eids)


@pytest.mark.parametrize("how", HOW)
def test_an_idle_worker_goes_on(kind, how, own, raw, backend, lane, monkeypatch):
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.2)
    ran = []

    def handler(task):
        ran.append(task.execution_id)

    with Worker(kind, own.url, handler, lane=lane):
        eids = []
        for _ in range(2):
            how(raw, wait_blocked(raw, "bzmpop"))
            eids.append(backend.create_execution(lane=lane))
            wait_until(lambda: len(ran) == len(eids))
    assert ran == eids


@pytest.mark.long
@pytest.mark.standalone("a proxy stands before one server")
def test_readers_whose_connection_the_server_cuts_off_for_its_slowness_lose_nothing(kind, lane):
    """The server holds little for a subscriber, and less than one answer of a reader that is behind."""
    limit = ("pubsub", 0, 64 << 10, 1)
    with (
        EmbeddedServer(client_output_buffer_limit=limit, **PROMPT) as server,
        ChaosProxy(server.url) as proxy,
        ff_fast.ValkeyBackend.connect(server.url) as backend,
        connect_raw(server.url) as raw,
    ):
        attempt = begin(backend, lane)
        with backend.open_writer(attempt.handle) as writer:
            reader = Reader(kind, proxy.url, attempt.eid)
            beside = Reader(kind, server.url, attempt.eid)
            wait_listening(raw, 2)
            proxy.hold(DOWN)
            for count in range(800):
                writer.write(b"%d " % count + b"x" * 2_000, mode=DURABLE)
                if count % 4 == 0:
                    writer.flush()
            writer.flush()
            # Nobody else waits for the slow one.
            beside.wait_for(800)
        backend.complete(attempt.handle)
        wait_until(lambda: "output buffer limits" in server.log())
        proxy.release()
        items = reader.result(20)
        assert sequences(items) == sequences(beside.result()) == list(range(1, 801))
    assert items[-1].reason == "attempt_success"
