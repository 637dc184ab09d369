"""Every public method and property of both shells is used at least once on a real server.

What each does is tested elsewhere. Here nothing may be missing: a name that the scenario does not use fails the test.
"""

import asyncio
import contextlib
import inspect
import urllib.parse
from collections import defaultdict

import pytest
import redis

import ff_fast
from ff_fast import (
    ClaimPolicy,
    Frame,
    FrameKind,
    ScannerFilter,
    UsageDimensions,
    WaitpointKind,
    WaitpointSpec,
    aio,
    keys,
)

from ..conftest import connect_raw
from ..shells import KINDS, WORKER
from ..unit.test_shells import CLASSES, public
from .workers import handler_for

# What the asyncio shell calls by the name of Python's protocol.
PROTOCOL = {"close": "aclose"}


class Used:
    """An object of either shell that notes which of its names are used."""

    def __init__(self, target, names):
        self._target = target
        cls = target if inspect.isclass(target) else type(target)
        self._names = names[cls.__name__]
        self._all = names

    def __getattr__(self, name):
        self._names.add(name)
        if not hasattr(self._target, name):
            name = PROTOCOL[name]
        return getattr(self._target, name)

    def of(self, target):
        return Used(target, self._all)


class Once:
    """A stop event that lets a loop run one round."""

    def __init__(self):
        self._asked = 0

    def is_set(self):
        self._asked += 1
        return self._asked > 1


def spec(waitpoint):
    return WaitpointSpec(
        kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=waitpoint.hmac_token
    )


def client_of(url):
    """A client of redis-py."""
    if "cluster=true" in url:
        host, port = urllib.parse.urlsplit(url).netloc.split(",")[0].split(":")
        return redis.RedisCluster(host=host, port=int(port))
    return connect_raw(url)


def scenario(shell, kind, url, lane, names):
    """Uses everything; yields what the asyncio shell awaits."""
    made = Used(shell.ValkeyBackend, names)
    embedded = made.of((yield made.embedded()))
    yield embedded.close()
    assert embedded.closed
    with contextlib.closing(client_of(url)) as client:
        copied = made.of((yield made.from_client(client)))
    yield copied.close()
    backend = made.of((yield made.connect(url)))
    try:
        yield from calls(backend, lane)
        yield from writes(backend, lane)
        yield from reads(backend, lane)
        yield from suspends(backend, lane)
        yield from works(backend, kind, lane)
        yield from names_streams(backend, lane)
    finally:
        yield backend.close()


def begin(backend, lane, **options):
    eid = yield backend.create_execution(lane=lane, namespace=lane, retention=60, **options)
    handle = yield backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(5))
    assert handle.execution_id == eid
    return eid, handle


def calls(backend, lane):
    budget = keys.new_uuid()
    yield backend.create_budget(budget, soft={"calls": 1})
    flow = yield backend.create_flow(namespace=lane)
    eid, handle = yield from begin(
        backend, lane, payload=b"p", flow_id=flow, budgets=[budget], tags={"a.b": "c"}
    )
    assert (yield backend.read_payload(handle)) == b"p"
    assert (yield backend.set_tags(eid, {"a.c": "d"})) == 2
    assert (yield backend.get_tags(eid)) == {"a.b": "c", "a.c": "d"}
    yield backend.progress(handle, 40)
    yield backend.report_usage(handle, UsageDimensions(custom={"calls": 2}))
    assert (yield backend.renew(handle)).lease_epoch == 1
    described = yield backend.describe(eid)
    assert backend.stats().executions_claimed == 1
    assert (described.progress_percent, described.usage) == (40, {"calls": 2})
    page = yield backend.list_executions(lane=lane, state="active")
    assert [each.execution_id for each in page.items] == [eid]
    assert lane in {each.lane for each in (yield backend.list_lanes())}
    assert "w" in {each.worker_id for each in (yield backend.list_workers())}
    assert any("holds the lease" in sentence for sentence in (yield backend.explain(eid)))
    assert "rights" in {each.check for each in (yield backend.diagnose())}

    keeper = backend.of(backend.keep_lease(handle))
    assert keeper.held
    assert not (yield keeper.wait_lost(0.001))
    assert not (yield keeper.wait_cancelled(0.001))
    yield keeper.stop()

    yield backend.complete(handle, b"r")
    assert (yield backend.read_result(eid)) == b"r"
    assert eid in (yield backend.describe_flow(flow)).members
    yield backend.cancel_flow(flow)

    eid, handle = yield from begin(backend, lane)
    yield backend.fail(handle, "no")
    eid = yield backend.create_execution(lane=lane, delay=60, retention=60)
    assert (yield backend.cancel(eid)).cancelled
    eid, handle = yield from begin(backend, lane)
    yield backend.delay(handle, 0)
    yield backend.supervise(ScannerFilter(namespace=lane), stop=Once())
    handle = yield backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(5))
    assert handle.execution_id == eid
    yield backend.wait_children(handle)
    yield backend.cancel(eid)

    eid, _ = yield from begin(backend, lane)
    yield backend.cancel(eid)
    assert all(token.grant.execution_id != eid for token in (yield backend.find_reclaimable()))


def lapsed(backend, lane):
    """An execution whose worker is lost, taken over."""
    eid = yield backend.create_execution(lane=lane, namespace=lane, retention=60)
    yield backend.claim(lane=lane, **WORKER, lease_ttl_ms=1, policy=ClaimPolicy.with_max_wait(5))
    tokens = []
    while not tokens:
        found = yield backend.find_reclaimable(10_000)
        tokens = [token for token in found if token.grant.execution_id == eid]
    return (yield backend.claim_from_reclaim(tokens[0], **WORKER))


def writes(backend, lane):
    handle = yield from lapsed(backend, lane)
    writer = backend.of((yield backend.open_writer(handle)))
    assert writer.next_sequence == 1
    assert writer.write("a") == 1
    assert writer.write_frame(Frame(b"b", FrameKind.STDOUT)) == 2
    yield writer.drain()
    yield writer.flush()
    assert writer.unacknowledged_bytes == 0
    assert writer.last_sequence == 2
    assert writer.last_id == writer.outcome().stream_id
    assert writer.mode == ff_fast.StreamMode.durable()
    assert writer.summary_version == 0
    assert writer.window_frames >= 0
    assert writer.rate_hz >= 0
    assert writer.lease_left > 0
    assert writer.error is None
    assert not writer.cancel_requested
    yield writer.close()
    assert (yield backend.append_frame(handle, Frame("c", FrameKind.STDOUT))).frame_count == 3
    yield backend.complete(handle)


def reads(backend, lane):
    done = backend.of(backend.subscribe_completions(ScannerFilter(namespace=lane)))
    yield done.next_batch(0.001)
    eid, handle = yield from begin(backend, lane)
    yield backend.append_frame(handle, Frame("a", FrameKind.STDOUT))
    assert (yield backend.describe_stream(eid)).closed_reason is None
    assert (yield backend.read_summary(eid)) is None
    tail = backend.of(backend.tail(eid))
    assert [item.payload for item in (yield tail.next_batch(5))] == [b"a"]
    assert tail.last.payload == b"a"
    assert not tail.ended
    yield backend.complete(handle)
    page = yield backend.read_stream(eid)
    assert tail.cursor == next(iter(page)).cursor
    yield tail.close()
    assert tail.closed

    following = backend.of(backend.follow(eid))
    batch = []
    while not following.ended:
        batch += yield following.next_batch(5)
    assert [item.cursor for item in batch] == ["0.0-0", page[0].cursor, following.last.cursor]
    assert following.cursor == following.last.cursor
    yield following.close()
    assert following.closed
    assert (yield backend.wait(eid, 5)) == b""

    # It began a millisecond ago: what ended just before may be told too.
    while done.last is None or done.last.execution_id != eid:
        batch = yield done.next_batch(5)
    assert done.last == batch[-1]
    assert done.cursor == batch[-1].cursor
    assert not done.ended
    yield done.close()
    assert done.closed


def suspends(backend, lane):
    eid, handle = yield from begin(backend, lane)
    waitpoint = yield backend.create_waitpoint(handle)
    assert not (yield backend.suspend(handle, spec(waitpoint))).already_satisfied
    yield backend.deliver_signal(eid, waitpoint, "go")
    handle = yield backend.claim(lane=lane, **WORKER, policy=ClaimPolicy.with_max_wait(5))
    (signal,) = yield backend.observe_signals(handle)
    assert signal.signal_name == "go"
    yield backend.complete(handle)
    # The same key again completes a rotation, also one that another test began.
    yield backend.rotate_waitpoint_secret("every-method", bytes(32))


def works(backend, kind, lane):
    left = {"delay", "went on"}

    class Stop:
        def is_set(self):
            return not left

    def handler(given):
        task = backend.of(given)
        if given.resumed:
            left.discard("went on")
            return
        if given.payload == b"delay":
            left.discard("delay")
            yield task.delay(60)
        assert task.write("x") == 1
        yield task.drain()
        yield task.flush()
        assert task.writer.next_sequence == 2
        yield task.progress(1)
        yield task.report_usage(UsageDimensions(input_tokens=1))
        assert not task.cancelled
        assert not task.lost
        assert not (yield task.wait_cancelled(0))
        waitpoint = yield task.create_waitpoint()
        yield backend.deliver_signal(given.execution_id, waitpoint, "go")
        assert len((yield task.suspend(spec(waitpoint)))) == 1
        yield task.wait_children()

    given_up = yield backend.create_execution(lane=lane, payload=b"delay", retention=60)
    done = yield backend.create_execution(lane=lane, retention=60)
    yield backend.run_worker(handler_for(kind, handler), lane=lane, stop=Stop())
    assert (yield backend.describe(given_up)).state == "delayed"
    assert (yield backend.describe(done)).state == "completed"


def names_streams(backend, lane):
    opened = yield backend.open_stream(lane, namespace=lane)
    stream, eid = backend.of(opened), opened.execution_id
    assert opened.role == "producer"
    assert eid == opened.handle.execution_id == backend.execution_id_for(lane, namespace=lane)
    assert stream.write("a") == 1
    yield stream.drain()
    assert (yield stream.flush()).frame_count == stream.writer.last_sequence == 1
    assert not stream.cancelled
    assert not (yield stream.wait_cancelled(0.001))
    following = backend.of(stream.follow(snapshot=True))
    assert len((yield following.next_batch(5))) > 0
    yield following.close()
    yield stream.complete("r")
    assert (yield stream.wait(5)) == b"r"
    yield backend.delete_execution(keys.url_id(eid))
    yield backend.of((yield backend.open_stream(lane, namespace=lane))).fail("no")


@pytest.mark.parametrize("kind", KINDS)
def test_every_name_is_used(kind, server, lane):
    shell = ff_fast if kind == "sync" else aio
    names = defaultdict(set)
    run = handler_for(kind, lambda _: scenario(shell, kind, server.url, lane, names))
    done = run(None)
    if kind == "asyncio":
        asyncio.run(done)
    assert dict(names) == {cls: public(getattr(shell, cls)) for cls in CLASSES}
