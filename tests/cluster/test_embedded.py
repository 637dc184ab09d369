"""A cluster of one's own: it forms, changes when asked, survives its nodes, and is gone with its owner."""

import asyncio
from pathlib import Path

import pytest

import ff_fast
from ff_fast import aio, keys
from ff_fast.embedded import SLOTS, EmbeddedCluster, EmbeddedServerError
from ff_fast.errors import InvalidInput
from ff_fast.types import ClaimPolicy

from ..conftest import connect_raw
from ..server.test_embedded import alive

KEY = b"of one slot"
SLOT = keys.key_slot(KEY)


def test_every_slot_has_a_primary_and_the_url_leads_to_all(cluster):
    assert len(cluster.primaries) == 3
    slots = [slot for node in cluster.primaries for slot in cluster.slots_of(node)]
    assert sorted(slots) == list(range(SLOTS))
    assert cluster.url in repr(cluster)
    with connect_raw(cluster.url) as client:
        assert client.set(KEY, b"v")
        assert client.delete(KEY) == 1


def test_slots_move_with_their_keys(cluster):
    owner = cluster.node_of(SLOT)
    other = next(node for node in cluster.nodes if node is not owner)
    owner.command("SET", "of one slot", "kept")
    cluster.migrate([SLOT, SLOT + 1, SLOT + 3], other)
    assert cluster.node_of(SLOT) is cluster.node_of(SLOT + 3) is other
    assert cluster.node_of(SLOT + 2) is owner
    assert other.command("GET", "of one slot") == b"kept"
    cluster.migrate([SLOT, SLOT + 1, SLOT + 3], owner)
    assert cluster.node_of(SLOT) is owner
    assert owner.command("DEL", "of one slot") == 1


def test_what_a_node_refuses_is_raised(cluster):
    with pytest.raises(EmbeddedServerError, match="unknown subcommand"):
        cluster.nodes[0].command("CLUSTER", "NO-SUCH-THING")


@pytest.mark.long
def test_a_replica_takes_over_and_the_old_primary_follows_it(replicated_cluster):
    cluster = replicated_cluster
    primary = cluster.node_of(SLOT)
    (replica,) = cluster.replicas_of(primary)
    cluster.failover(replica)
    assert cluster.node_of(SLOT) is replica
    assert cluster.primary_of(primary) is replica
    cluster.failover(primary)
    assert cluster.node_of(SLOT) is primary
    assert cluster.primary_of(primary) is None


@pytest.mark.long
def test_a_killed_primary_comes_back_as_a_replica(replicated_cluster):
    cluster = replicated_cluster
    primary = cluster.node_of(SLOT)
    (replica,) = cluster.replicas_of(primary)
    cluster.kill(primary)
    assert not primary.running
    assert primary not in cluster.running
    cluster.wait_until_stable()
    assert cluster.node_of(SLOT) is replica
    cluster.restart(primary)
    assert cluster.primary_of(primary) is replica


@pytest.mark.long
def test_a_node_joins_and_leaves():
    with EmbeddedCluster(1) as cluster:
        (first,) = cluster.nodes
        second = cluster.add_node()
        assert cluster.slots_of(second) == []
        cluster.migrate(range(100), second)
        assert cluster.primaries == [first, second]
        pid, directory = second.pid, second.directory
        cluster.remove_node(second)
        assert cluster.nodes == [first]
        assert len(cluster.slots_of(first)) == SLOTS
        assert not alive(pid)
        assert not directory.exists()
        with pytest.raises(EmbeddedServerError, match="last primary"):
            cluster.remove_node(first)
        pids = [node.pid for node in cluster.nodes]
    cluster.stop()
    assert not any(alive(pid) for pid in pids)


def test_a_cluster_that_cannot_form_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr("ff_fast.embedded.tempfile.tempdir", str(tmp_path))
    with pytest.raises(EmbeddedServerError, match="bad-directive"):
        EmbeddedCluster(bad_directive=1)
    assert list(Path(tmp_path).iterdir()) == []


@pytest.mark.parametrize("counts", [(0, 0), (1, -1)])
def test_a_cluster_has_a_primary(counts):
    with pytest.raises(InvalidInput, match="at least one primary"):
        EmbeddedCluster(*counts)


@pytest.mark.long
def test_a_backend_brings_its_cluster_and_supervises_it(lane):
    with ff_fast.ValkeyBackend.embedded(cluster=True, primaries=1) as backend:
        pids = [node.pid for node in backend._server.nodes]
        eid = backend.create_execution(lane=lane, delay=0.01)
        # A supervisor alone makes what is delayed eligible.
        assert backend.claim(lane=lane, policy=ClaimPolicy.with_max_wait(10)).execution_id == eid
    assert not any(alive(pid) for pid in pids)


@pytest.mark.long
def test_an_asyncio_backend_brings_its_cluster(lane):
    async def main():
        async with aio.ValkeyBackend.embedded(cluster=True, primaries=1) as backend:
            eid = await backend.create_execution(lane=lane)
            assert (await backend.describe(eid)).lane == lane
            return [node.pid for node in backend._server.nodes]

    assert not any(alive(pid) for pid in asyncio.run(main()))
