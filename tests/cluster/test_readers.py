"""Readers of a cluster while its slots move, its primaries hand over and its nodes die."""

import threading
import uuid

import pytest

import ff_fast
from ff_fast import ScannerFilter, keys

from ..server.readers import DURABLE, Reader, begin, sequences
from ..server.test_hub import Heard
from ..server.workers import Subscription, Worker, opened, until
from ..shells import KINDS, Opener, Reading
from ..waiting import wait_until


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def connect(kind):
    opener = Opener(kind)
    yield opener
    opener.close()


def channel(partition):
    return f"ff:stream:{{fp:{partition}}}:{uuid.uuid4()}:0:head".encode()


def others(cluster, node):
    return [each for each in cluster.primaries if each is not node]


class Listening:
    """A channel of each primary with a listener, and what was published on it."""

    def __init__(self, backend, cluster):
        self.backend, self.cluster = backend, cluster
        self.heard, self.sent = {}, {}
        for node in cluster.primaries:
            mine = set(cluster.slots_of(node))
            partition = next(
                i for i in range(256) if keys.key_slot(keys.slot_tag(i).encode()) in mine
            )
            name = channel(partition)
            self.heard[name], self.sent[name] = Heard(), []
            backend._hub.listen(name, self.heard[name])
        self.settled()

    def settled(self):
        """Wait until every channel is listened to at the node that has its slot."""

        def there():
            return all(
                each.doubts[-1:] == [True]
                and self.cluster.node_of(keys.key_slot(name)).command(
                    "PUBSUB", "SHARDNUMSUB", name.decode()
                )[1]
                == 1
                for name, each in self.heard.items()
            )

        self.backend.wait_until(there, 15)

    def publish(self):
        """Publish on every channel, and see that its listener hears it."""
        for name, listener in self.heard.items():
            message = b"%d" % len(self.sent[name])
            self.cluster.node_of(keys.key_slot(name)).command(
                "SPUBLISH", name.decode(), message.decode()
            )
            self.sent[name].append(message)
            self.backend.wait_until(lambda: listener.messages == self.sent[name])  # noqa: B023

    def check(self):
        for name, listener in self.heard.items():
            assert listener.messages == self.sent[name]
            assert listener.errors == []


def test_a_channel_goes_with_its_slot(connect, cluster):
    listening = Listening(connect(cluster.url), cluster)
    listening.publish()
    name = next(iter(listening.heard))
    slot = keys.key_slot(name)
    home = cluster.node_of(slot)
    for to in (*others(cluster, home), home):
        cluster.migrate([slot], to)
        listening.settled()
        listening.publish()
    listening.check()
    # Those of other slots have heard nothing of it.
    assert all(each.doubts == [True] for at, each in listening.heard.items() if at != name)


@pytest.mark.long
def test_channels_of_a_primary_go_to_the_replica_that_takes_over(connect, replicated_cluster):
    cluster = replicated_cluster
    listening = Listening(connect(cluster.url), cluster)
    listening.publish()
    for handover in ("planned", "killed"):
        names = list(listening.heard)
        old = cluster.node_of(keys.key_slot(names[0]))
        (new,) = cluster.replicas_of(old)
        before = {name: len(each.doubts) for name, each in listening.heard.items()}
        if handover == "planned":
            cluster.failover(new)
        else:
            cluster.kill(old)
            cluster.wait_until_stable()
        listening.settled()
        listening.publish()
        for name in names[1:]:
            assert len(listening.heard[name].doubts) == before[name]
        if handover == "killed":
            cluster.restart(old)
    listening.check()


def ended(backend, namespace, count):
    """Executions that end in many partitions."""
    eids = [backend.create_execution(lane=namespace, namespace=namespace) for _ in range(count)]
    for eid in eids:
        backend.cancel(eid)
    return eids


@pytest.mark.long
def test_completions_are_told_once_while_slots_move_and_a_primary_dies(
    kind, replicated_cluster, lane
):
    cluster = replicated_cluster
    with (
        ff_fast.ValkeyBackend.connect(cluster.url) as backend,
        Subscription(kind, cluster.url, ScannerFilter(namespace=lane)) as subscription,
    ):
        wait_until(lambda: subscription.begun)
        eids = ended(backend, lane, 20)
        first, second, *_ = cluster.primaries
        slots = [s for s in range(16384) if s in set(cluster.slots_of(first))]
        tags = {keys.key_slot(keys.slot_tag(i).encode()) for i in range(256)}
        moved = [slot for slot in slots if slot in tags][:30]
        for to in (second, first):
            cluster.migrate(moved, to)
            eids += ended(backend, lane, 20)
        wait_until(lambda: len(subscription.items) == len(eids), 15)
        cluster.kill(first)
        eids += ended(backend, lane, 20)
        wait_until(lambda: len(subscription.items) >= len(eids), 15)
        cluster.restart(first)
        subscription.ended.set()
        eids += ended(backend, lane, 1)
        told = [each.execution_id for each in subscription.result(20)]
    assert sorted(told) == sorted(eids)


@pytest.mark.long
def test_a_tail_brings_every_frame_once_while_its_slot_moves(kind, cluster, lane):
    with ff_fast.ValkeyBackend.connect(cluster.url) as backend:
        attempt = begin(backend, lane)
        slot = keys.key_slot(attempt.eid.encode())
        home = cluster.node_of(slot)
        reader = Reader(kind, cluster.url, attempt.eid)
        waiting = backend.tail(attempt.eid)
        sent = 0
        with backend.open_writer(attempt.handle) as writer:
            for to in (*others(cluster, home), home):
                for _ in range(20):
                    sent += 1
                    writer.write(b"%d" % sent, mode=DURABLE)
                writer.flush(10)
                cluster.migrate([slot], to)
                sent += 1
                writer.write(b"%d" % sent, mode=DURABLE)
                writer.flush(10)
                reader.wait_for(sent)
        backend.complete(attempt.handle, b"done")
        assert backend.wait(attempt.eid, timeout=10) == b"done"
        for items in (reader.result(), list(waiting)):
            assert sequences(items) == list(range(1, sent + 1))
            assert [type(each) for each in items[sent:]] == [ff_fast.End]


class Following(Reading):
    """A follow of an execution to its end."""

    def __init__(self, kind, url, eid):
        self._eid = eid
        super().__init__(kind, url)

    def open(self):
        return self.backend.follow(self._eid)


def of_node(backend, cluster, node, lane):
    """An execution whose slot *node* has; it waits in a lane of its own."""
    slots = set(cluster.slots_of(node))
    for i in range(1_000):
        eid = backend.create_execution(lane=f"{lane}-{i}")
        if keys.key_slot(keys.core(eid)) in slots:
            return eid, f"{lane}-{i}"
        backend.cancel(eid)
    raise AssertionError


@pytest.mark.parametrize("handover", ["planned", pytest.param("killed", marks=pytest.mark.long)])
def test_readers_and_workers_hear_on_after_a_failover(kind, replicated_cluster, lane, handover):
    """A tail and a follow bring every frame once, a worker hears of a cancellation; nobody waits for a look or a renewal."""
    cluster = replicated_cluster
    seen = []
    go_on = threading.Event()

    def handle(task):
        writer = yield opened(task)
        for part in range(2):
            for i in range(20):
                writer.write(b"%d" % (20 * part + i), mode=DURABLE)
            yield writer.flush(20)
            yield until(task, go_on.is_set)
        seen.append((yield task.wait_cancelled(20)))

    with ff_fast.ValkeyBackend.connect(cluster.url) as backend:
        old = cluster.primaries[0]
        (new,) = cluster.replicas_of(old)
        eid, lane = of_node(backend, cluster, old, lane)
        with Worker(kind, cluster.url, handle, lane=lane, lease_ttl_ms=600_000):
            wait_until(lambda: backend.describe(eid).attempt_index is not None)
            tailing, following = Reader(kind, cluster.url, eid), Following(kind, cluster.url, eid)
            wait_until(lambda: len(tailing.items) >= 20 and len(following.items) >= 21)
            if handover == "planned":
                cluster.failover(new)
            else:
                cluster.kill(old)
            go_on.set()
            wait_until(lambda: len(tailing.items) >= 40 and len(following.items) >= 41, 20)
            assert not backend.cancel(eid, grace=60).cancelled
            wait_until(lambda: seen, 20)
            with pytest.raises(ff_fast.ExecutionCancelled):
                backend.wait(eid, timeout=20)
            for items in (tailing.result(20), following.result(20)):
                frames = [each for each in items if isinstance(each, ff_fast.StreamFrame)]
                assert sequences(frames) == list(range(1, 41))
                assert not [each for each in items if isinstance(each, ff_fast.Gap)]
                assert isinstance(items[-1], ff_fast.End)
    assert seen == [True]
    if handover == "killed":
        cluster.restart(old)


def test_a_read_goes_on_elsewhere_when_its_node_leaves_before_there_is_a_connection(cluster):
    with ff_fast.ValkeyBackend.connect(cluster.url) as backend:
        with backend.open_stream(uuid.uuid4().hex) as stream:
            stream.write(b"x")
        slot = keys.key_slot(keys.slot_tag_of(stream.execution_id).encode())
        node = backend._nodes.of(slot)
        tail = backend.tail(stream.execution_id)
        # As it is once another thread has seen that it has left.
        node.gone = True
        node.close_idle()
        assert tail.next_batch(timeout=0.01) == []
        backend._nodes._primaries.pop(node.address)
        assert [each.payload for each in tail.next_batch(timeout=30)[:1]] == [b"x"]
