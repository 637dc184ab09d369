"""What a new connection learns of the deployment, from scripted replies."""

import hiredis
import pytest

from ff_fast import _library
from ff_fast._core.deployment import Deployment
from ff_fast.errors import Corruption, PermissionDenied

from .script import run

MISSING = hiredis.ReplyError("ERR Function not found")
DENIED = hiredis.ReplyError("NOPERM User u has no permissions to run the 'set' command")


def version(stored=b""):
    return [1, b"ok", b"%d" % _library.CONTRACT, _library.digest().encode(), stored]


def prepared(*replies):
    """Commands that a new connection sent first, the partition count, and the error if there was one."""
    deployment = Deployment()
    asked, value = run(deployment.prepare(), replies)
    return [command[0] for command in asked], deployment.partitions, value


def test_a_count_that_is_stored_counts_for_who_loads_the_library():
    sent = [b"FCALL_RO", b"FUNCTION", b"FCALL_RO"]
    assert prepared(MISSING, b"ff_fast", version(b"64")) == (sent, 64, None)


@pytest.mark.parametrize("stored, partitions", [(b"64", 64), (None, 256), (DENIED, 256)], ids=repr)
def test_a_user_who_may_not_store_the_count_takes_what_can_be_read(stored, partitions):
    sent = [b"FCALL_RO", b"SET", b"GET"]
    assert prepared(version(), DENIED, stored) == (sent, partitions, None)


@pytest.mark.parametrize("stored", [b"0", b"-1", b"65536"])
def test_an_absurd_count_is_corruption(stored):
    _, partitions, error = prepared(version(stored))
    assert partitions == 256
    assert isinstance(error, Corruption)
    assert "ff:config:partitions" in str(error)


def test_an_unreadable_count_is_corruption():
    _, _, error = prepared(version(), None, b"abc")
    assert isinstance(error, Corruption)


def test_a_refused_read_is_told():
    _, _, error = prepared(version(), b"OK", DENIED)
    assert isinstance(error, PermissionDenied)
