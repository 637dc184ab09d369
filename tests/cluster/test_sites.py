"""The deployments that other tests stand on do what they say."""

import pytest

from ff_fast import keys

from ..conftest import connect_raw
from .sites import ClusterFailover, ask

pytestmark = pytest.mark.long

KEY = "of one shard"
SLOT = keys.key_slot(KEY.encode())


def primary_of(site):
    return site.cluster.node_of(SLOT) if isinstance(site, ClusterFailover) else site.primary


def test_what_a_stalled_replica_lacks_is_gone_after_its_promotion(failover):
    ask(primary_of(failover), "SET", KEY, "before")
    failover.stall(SLOT)
    ask(primary_of(failover), "SET", KEY, "after")
    failover.promote()
    promoted = failover.replica if hasattr(failover, "replica") else failover.primary
    assert ask(promoted, "GET", KEY) == b"before"
    assert ask(promoted, "SET", KEY, "again")


def test_a_planned_failover_under_sentinels_loses_nothing(sentinels):
    before = sentinels.primary
    with connect_raw(before.url) as client:
        client.set(KEY, "kept")
    sentinels.failover()
    assert sentinels.primary is not before
    assert ask(sentinels.primary, "GET", KEY) == b"kept"
