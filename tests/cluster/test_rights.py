"""The users of the roles can do their work in a cluster, with the rights that a cluster adds."""

import asyncio

import pytest

from ff_fast import Durability, Frame, FrameKind
from ff_fast._core import hub as hub_core
from ff_fast._core.roles import IN_A_CLUSTER
from ff_fast.errors import FunctionMissing, NotReplicated, PermissionDenied, UnsupportedServer

from ..conftest import connect_raw
from ..faults.rights import ACL, PASSWORD, Life, allow
from ..faults.test_rights import FEW
from ..router import Router
from ..shells import WORKER, Opener, config
from .test_calls import execution_at


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


# -- what a user lacks, on all nodes or on one -----------------------------------------------------------------------

IN_TIME_S = 8.0


def url_of(cluster, user):
    return cluster.url.replace("://", f"://{user}:{PASSWORD}@", 1)


def take(nodes, user, *rules):
    for node in nodes:
        node.execute_command("ACL", "SETUSER", user, *rules)


def bring_library(cluster):
    opener = Opener("sync")
    opener(url_of(cluster, "ff_deploy"))
    opener.close()


@pytest.mark.long
async def test_a_user_that_may_not_ask_for_the_slots_is_told(shell, guarded):
    cluster, raw = guarded
    bring_library(cluster)
    take(raw.nodes, "ff_worker", "-cluster|slots")
    with pytest.raises(PermissionDenied) as caught:
        await asyncio.wait_for(shell.connect(url_of(cluster, "ff_worker")), IN_TIME_S)
    assert (caught.value.denied, caught.value.command) == ("command", "cluster|slots")


@pytest.mark.long
async def test_a_node_that_alone_does_not_let_a_user_ask_is_passed_over(shell, guarded, lane):
    cluster, raw = guarded
    bring_library(cluster)
    take(raw.nodes[:1], "ff_worker", "-cluster|slots")
    async with await asyncio.wait_for(
        shell.connect(url_of(cluster, "ff_worker")), IN_TIME_S
    ) as worker:
        assert await worker.claim(lane=lane, **WORKER) is None


@pytest.mark.long
async def test_a_node_without_the_library_for_a_user_that_may_not_load_it(shell, guarded, lane):
    cluster, raw = guarded
    bring_library(cluster)
    async with await shell.connect(cluster.url) as backend:
        await execution_at(backend, cluster, cluster.nodes[1], lane)
    # Retries wait for somebody who may.
    few = config(url_of(cluster, "ff_worker"), retries=2, factor=1)
    async with await shell.connect(few) as worker:
        raw.nodes[1].function_flush()
        with pytest.raises(FunctionMissing, match="this user may not load it"):
            await asyncio.wait_for(worker.claim(lane=lane, **WORKER), IN_TIME_S)
    with pytest.raises(PermissionDenied):
        await asyncio.wait_for(shell.connect(url_of(cluster, "ff_worker")), IN_TIME_S)
    # Whoever may load it brings it to the one node.
    bring_library(cluster)
    async with await shell.connect(url_of(cluster, "ff_worker")) as worker:
        assert await worker.claim(lane=lane, **WORKER) is not None


@pytest.mark.long
async def test_a_user_that_may_not_subscribe_on_one_node(shell, guarded, lane):
    cluster, raw = guarded
    bring_library(cluster)
    take(raw.nodes[1:2], "ff_reader", "-ssubscribe")
    async with (
        await shell.connect(url_of(cluster, "ff_deploy")) as deploy,
        await shell.connect(url_of(cluster, "ff_reader")) as tailer,
    ):
        take(raw.nodes, "ff_deploy", "+@all", "~*", "&*")
        for index, node in enumerate(cluster.nodes):
            eid = await execution_at(deploy, cluster, node, lane)
            reading = asyncio.ensure_future(tailer.items(eid))
            if index == 1:
                with pytest.raises(PermissionDenied) as caught:
                    await asyncio.wait_for(reading, IN_TIME_S)
                assert caught.value.command == "ssubscribe"
                await deploy.cancel(eid)
            else:
                await deploy.cancel(eid)
                await asyncio.wait_for(reading, IN_TIME_S)


@pytest.mark.long
async def test_a_user_that_may_not_wait_for_replicas_is_told(shell, guarded, lane):
    cluster, raw = guarded
    bring_library(cluster)
    async with await shell.connect(cluster.url) as backend:
        await execution_at(backend, cluster, cluster.nodes[0], lane)
    take(raw.nodes, "ff_worker", "-wait")
    async with await shell.connect(url_of(cluster, "ff_worker")) as worker:
        handle = await worker.claim(lane=lane, **WORKER)
        with pytest.raises(PermissionDenied) as caught:
            await asyncio.wait_for(
                worker.append_frame(
                    handle, Frame(b"1", FrameKind.EVENT), durability=Durability.replicated()
                ),
                IN_TIME_S,
            )
        assert caught.value.command == "wait"
        writer = await worker.open_writer(handle)
        writer.write(b"2")
        await writer.close()
