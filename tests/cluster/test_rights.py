"""The users of the README's ACL lines can do their work in a cluster, with the rights that the README adds."""

import re

import pytest

from ff_fast import Durability, Frame, FrameKind
from ff_fast._core import hub as hub_core
from ff_fast.errors import NotReplicated, UnsupportedServer

from ..conftest import connect_raw
from ..faults.rights import ACL, PASSWORD, README, Life, allow
from ..faults.test_rights import FEW
from ..router import Router
from ..shells import Opener

(IN_A_CLUSTER,) = re.findall(r"`(\+cluster\|slots[^`]*)`", README)


@pytest.fixture
def guarded(cluster, monkeypatch):
    """The cluster, emptied, and a client of all nodes that may do everything."""
    monkeypatch.setattr(hub_core, "LINGER_S", 0.1)
    with Router([connect_raw(node.url) for node in cluster.nodes]) as raw:
        raw.function_flush()
        raw.flushall()
        for node in raw.nodes:
            for name, rules in ACL.items():
                allow(node, name, f"{rules} {IN_A_CLUSTER}")
            node.acl_log_reset()
        yield cluster, raw
        raw.flushall()
        for node in raw.nodes:
            node.execute_command("ACL", "DELUSER", *ACL)


def test_each_user_can_do_its_work_and_is_refused_nothing(guarded):
    """In one shell: both send the same commands."""
    cluster, raw = guarded
    opener = Opener("sync")
    try:
        life = Life(
            lambda user: opener(
                cluster.url.replace("://", f"://{user}:{PASSWORD}@", 1) + FEW.replace("?", "&")
            ),
            raw,
        )
        life.run()
        life.created(lane="levels")
        worker, handle = life.claimed("levels")
        frame = Frame(b"1", FrameKind.EVENT)
        # There is no replica, and no file: what matters is that the commands are not refused.
        with pytest.raises(NotReplicated):
            worker.append_frame(
                handle, frame, durability=Durability.replicated(), durability_timeout=0.01
            )
        with pytest.raises(UnsupportedServer):
            worker.append_frame(handle, frame, durability=Durability.synced())
    finally:
        opener.close()
    assert raw.acl_log() == []
    # Those that only a migration by keys, and a replica, ask for.
    for node in raw.nodes:
        for user in ACL:
            for command in ("ASKING", "READONLY"):
                assert node.execute_command("ACL", "DRYRUN", user, command) == b"OK"
