"""Deployments of several servers, shared where tests leave them as they were."""

import contextlib

import pytest

# Coroutine tests run, and leave nothing behind, as those of the fault tests.
from ..faults.conftest import pytest_pyfunc_call, shell  # noqa: F401
from ..faults.failover import Failover
from . import sites


@pytest.fixture(scope="session")
def cluster(cluster_server):
    """Three primaries; a test gives back every slot that it moves."""
    return cluster_server


@pytest.fixture(scope="module")
def replicated_cluster():
    """Three primaries with a replica each; which is which may change."""
    with sites.cluster(3, 3) as running:
        yield running


@pytest.fixture
def sentinels():
    """A primary with a replica and three Sentinels, for one test."""
    with sites.SentinelSite() as running:
        yield running


@pytest.fixture(params=["standalone", "cluster", "sentinel"])
def failover(request):
    """A primary whose replica can fall behind and take over: ``stall(slot)``, ``promote()``, ``url``."""
    if request.param == "cluster":
        site = sites.ClusterFailover(request.getfixturevalue("replicated_cluster"))
    else:
        site = Failover() if request.param == "standalone" else sites.SentinelSite()
    with contextlib.closing(site):
        yield site
