"""Deployments of several servers, shared where tests leave them as they were."""

import pytest

# Coroutine tests run, and leave nothing behind, as those of the fault tests.
from ..faults.conftest import pytest_pyfunc_call, shell  # noqa: F401
from . import sites


@pytest.fixture(scope="session")
def cluster():
    """Three primaries; a test gives back every slot that it moves."""
    with sites.cluster() as running:
        yield running


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
