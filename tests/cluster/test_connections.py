"""How many connections a backend has at each node, whatever runs on it at once; and what a fork makes of them."""

import asyncio
import gc
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

import ff_fast
from ff_fast import aio
from ff_fast.errors import ForkedClient
from ff_fast.types import BackendConfig

from ..faults.test_process import in_child
from ..shells import WORKER
from ..waiting import wait_until

pytestmark = pytest.mark.long

TASKS = 200
THREADS = 16
NAME = "bounded"


def named(cluster):
    return BackendConfig.from_url(f"{cluster.url}&client_name={NAME}")


def counted(cluster):
    """Number of connections of the backend under test at each node: those of readers, and the others."""
    found = []
    for node in cluster.nodes:
        lines = bytes(node.command("CLIENT", "LIST")).decode().splitlines()
        mine = [line.split() for line in lines if f" name={NAME}" in line]
        # What is pushed takes RESP3.
        readers = sum("resp=3" in words for words in mine)
        found.append((readers, len(mine) - readers))
    return found


def none_left(cluster):
    wait_until(lambda: counted(cluster) == [(0, 0)] * 3)


async def test_two_hundred_tasks_have_two_connections_a_node(cluster, lane):
    most = []

    async def work(backend, index, together):
        eid = await backend.create_execution(lane=f"{lane}{index}")
        handle = await backend.claim(lane=f"{lane}{index}", **WORKER)
        assert handle.execution_id == eid
        tail = backend.tail(eid)
        writer = await backend.open_writer(handle)
        for i in range(10):
            writer.write(b"%d" % i)
        assert (await anext(tail)).payload == b"0"
        await together.wait()
        await writer.close()
        await backend.complete(handle)
        rest = [item async for item in tail]
        assert len(rest) == 10

    async with aio.ValkeyBackend.connect(named(cluster)) as backend:
        together = asyncio.Barrier(TASKS + 1)
        tasks = [asyncio.create_task(work(backend, i, together)) for i in range(TASKS)]
        await asyncio.wait_for(together.wait(), 60)
        most.append(await asyncio.to_thread(counted, cluster))
        await asyncio.gather(*tasks)
        most.append(await asyncio.to_thread(counted, cluster))
    await asyncio.to_thread(none_left, cluster)
    assert all(readers <= 1 and others <= 1 for found in most for readers, others in found), most
    assert most[0] == [(1, 1)] * 3


def test_sixteen_threads_have_one_connection_a_node_each(cluster, lane):
    together = threading.Barrier(THREADS + 1, timeout=60)

    def work(backend, index):
        for turn in range(10):
            own = f"{lane}{index}-{turn}"
            eid = backend.create_execution(lane=own)
            handle = backend.claim(lane=own, **WORKER)
            with backend.tail(eid) as tail, backend.open_writer(handle) as writer:
                writer.write(b"1")
                assert next(tail).payload == b"1"
            backend.complete(handle)
        together.wait()
        together.wait()

    with ThreadPoolExecutor(THREADS) as pool:
        with ff_fast.ValkeyBackend.connect(named(cluster)) as backend:
            done = [pool.submit(work, backend, i) for i in range(THREADS)]
            together.wait()
            found = counted(cluster)
            together.wait()
            for each in done:
                each.result()
        none_left(cluster)
    # One for what is pushed; beside the threads' own one of the writers.
    assert all(readers <= 1 and others <= THREADS + 1 for readers, others in found), found


# -- forks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["cluster", "sentinel"])
def url(request):
    if request.param == "cluster":
        return request.getfixturevalue("cluster").url
    return request.getfixturevalue("sentinels").url


def test_a_fork_while_the_backend_is_idle(url, lane):
    with ff_fast.ValkeyBackend.connect(url) as backend:
        eid = backend.create_execution(lane=lane)

        def child():
            with pytest.raises(ForkedClient):
                backend.describe(eid)
            backend.close()
            _works(url, eid)
            gc.collect()

        for _ in range(2):
            in_child(child)
            assert backend.describe(eid).state == "waiting"


def test_a_fork_amid_writers_tails_and_subscriptions(url, lane):
    payloads = [b"%d" % i for i in range(300)]
    with ff_fast.ValkeyBackend.connect(url) as backend:
        subscription = backend.subscribe_completions()
        subscription.next_batch(0.1)
        for _ in range(6):
            backend.create_execution(lane=lane)
        handles = [backend.claim(lane=lane, **WORKER) for _ in range(6)]
        eids = [handle.execution_id for handle in handles]
        writers = [backend.open_writer(handle) for handle in handles]
        tails = [backend.tail(eid) for eid in eids]
        for writer, tail in zip(writers, tails, strict=True):
            writer.write(b"first")
            assert next(tail).payload == b"first"
        keeper = backend.keep_lease(handles[0])

        def child():
            for call in (
                lambda: writers[0].write(b"child"),
                writers[1].flush,
                writers[2].close,
                lambda: next(tails[0]),
                lambda: tails[1].next_batch(0.1),
                lambda: subscription.next_batch(0.1),
                lambda: backend.subscribe_completions().next_batch(0.1),
                lambda: next(backend.tail(eids[0])),
                lambda: backend.open_writer(handles[3]),
                lambda: backend.renew(handles[4]),
                lambda: backend.keep_lease(handles[4]),
                lambda: backend.claim(lane=lane, **WORKER),
            ):
                with pytest.raises(ForkedClient):
                    call()
            backend.close()
            _works(url, eids[0])
            gc.collect()

        for i, payload in enumerate(payloads):
            for writer in writers:
                writer.write(payload)
            if i in (100, 200):
                in_child(child)
        for writer, handle in zip(writers, handles, strict=True):
            writer.close()
            backend.complete(handle)
        keeper.stop()
        for tail in tails:
            items = list(tail)
            assert [item.payload for item in items[:-1]] == payloads
        told = set()

        def all_told():
            told.update(each.execution_id for each in subscription.next_batch(0.2))
            return told.issuperset(eids)

        wait_until(all_told)


def _works(url, eid):
    """A backend of the child's own does what the parent's does."""
    with ff_fast.ValkeyBackend.connect(url) as own:
        assert own.describe(eid).execution_id == eid
        own.create_execution(lane="of-the-child")
        handle = own.claim(lane="of-the-child", **WORKER)
        with own.open_writer(handle) as writer:
            writer.write(b"1")
        tail = own.tail(handle.execution_id)
        assert next(tail).payload == b"1"
        own.complete(handle)
        assert isinstance(next(tail), ff_fast.End)
