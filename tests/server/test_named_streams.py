"""A named stream has one producer at a time, stands in no lane, and ends; in both shells, on a real server."""

import contextlib
import gc
from urllib.parse import quote

import pytest

import ff_fast
from ff_fast import (
    FailureClass,
    HandleKind,
    ResumeCondition,
    StreamMode,
    TaskFailed,
    WaitpointKind,
    WaitpointSpec,
    errors,
    keys,
)
from ff_fast._core import leases, ops
from ff_fast._core.leases import is_lease_lost
from ff_fast._core.supervision import reclaim_token

from ..shells import KINDS, Opener, Reading
from ..waiting import wait_until
from .executions import WORKER, World
from .test_follow import followed, rest, take, told


@pytest.fixture
def world(server, raw, lane):
    with World(server.url, raw, lane) as world:
        yield world


@pytest.fixture(params=KINDS)
def connect(request, server):
    opener = Opener(request.param)
    yield lambda: opener(server.url)
    opener.close()


@pytest.fixture
def shell(connect):
    return connect()


@pytest.fixture
def open_stream(shell, lane):
    """Opens the stream of a name in the namespace of the test; the leases are given up behind it."""
    opened = []

    def opening(name="chat", by=shell, **options):
        stream = by.open_stream(name, namespace=lane, ttl=60, **options)
        opened.append(stream)
        return stream

    yield opening
    for stream in opened:
        keeper = stream._keeper
        if keeper is not None:
            keeper._end()


def indexed(world, eid):
    """The keys of the deployment's indexes and lanes in which an execution stands."""
    found = set()
    for key in world.raw.keys("ff:idx:*:eligible"):
        if world.raw.zscore(key, eid) is not None:
            found.add(key)
    return found


def in_no_lane(world, eid):
    """No claim and no take-over gets it, and no hint leads to it."""
    assert not indexed(world, eid)
    assert not world.raw.keys("ff:lane:{}*")
    assert world.claim() is None
    assert all(each.grant.execution_id != eid for each in world.backend.find_reclaimable(10_000))
    with pytest.raises(errors.ExecutionNotClaimable):
        world.backend.claim_from_reclaim(reclaim_token(eid, "default", 1), **WORKER)


# -- producers and consumers -------------------------------------------------------------------------------------------


@pytest.mark.cluster
def test_the_first_who_opens_a_name_produces_and_all_others_read(connect, world, open_stream):
    with open_stream() as stream:
        assert stream.role == "producer"
        assert stream.handle.fields().lane_id == ""
        assert not stream.cancelled
        stream.write(b"a")
        stream.write(b"b", mode=StreamMode.durable())
        assert stream.flush(5).frame_count == 2
        with open_stream(by=connect()) as other:
            assert (other.role, other.handle, other.writer) == ("consumer", None, None)
            assert other.execution_id == stream.execution_id
            assert not other.cancelled
            reader = other.follow()
            assert told(take(reader, 3)) == [0, "a", "b"]
        in_no_lane(world, stream.execution_id)
        stream.write(b"c")
    assert told(rest(reader)) == ["c", ("success", None)]
    assert other.wait(5) == b""
    reader.close()
    assert world.state(stream.execution_id) == "completed"


@pytest.mark.parametrize(
    "use",
    [
        lambda stream: stream.write(b"x"),
        lambda stream: stream.flush(),
        lambda stream: stream.drain(),
        lambda stream: stream.complete(),
        lambda stream: stream.fail("no"),
        lambda stream: stream.wait_cancelled(0),
    ],
)
def test_a_consumer_can_do_nothing_to_a_stream(open_stream, use):
    with open_stream() as stream, open_stream() as other:
        with pytest.raises(
            errors.InvalidInput, match="Somebody else produces this stream"
        ) as caught:
            use(other)
        assert caught.value.outcome is errors.Outcome.NOT_APPLIED
        stream.write(b"goes on")


def test_a_name_stands_for_the_same_execution_everywhere(world, shell, open_stream):
    eid = shell.execution_id_for("chat", namespace=world.lane)
    assert eid == keys.execution_id_for("chat", namespace=world.lane)
    assert eid != shell.execution_id_for("chat")
    with open_stream() as stream:
        assert stream.execution_id == eid
        for form in (eid, keys.url_id(eid), eid.upper().replace("FP", "fp")):
            with open_stream(form) as other:
                assert (other.role, other.execution_id) == ("consumer", eid)
    form = keys.url_id(eid)
    assert told(followed(shell, form)) == [0, ("success", None)]
    assert shell.wait(form, 5) == b""
    assert shell.describe(form).execution_id == eid
    assert shell.read_result(form) == b""
    assert shell.read_summary(form) is None
    assert len(shell.read_stream(form)) == 0
    assert shell.describe_stream(form).closed_reason == "attempt_success"
    assert shell.set_tags(form, {"a.b": "c"}) == 1
    assert shell.get_tags(form) == {"a.b": "c"}
    shell.delete_execution(form)


def test_what_the_first_opening_gives_is_kept(world, shell, open_stream):
    given = {"payload": b"prompt", "tags": {"app.user": "u"}, "ttl": 5, "takeover": 7}
    options = {"namespace": world.lane, **given}
    with shell.open_stream("chat", **options) as stream:
        assert open_stream(payload=b"other", tags={"app.user": "v"}).role == "consumer"
        eid = stream.execution_id
        assert shell.read_payload(stream.handle) == b"prompt"
        assert shell.get_tags(eid) == {"app.user": "u"}
        told_of = shell.describe(eid)
        assert (told_of.lane, told_of.namespace, told_of.retention) == ("", world.lane, 5)
        assert told_of.worker_id == "open_stream"
        assert world.core(eid)["takeover_ms"] == "7000"
    assert {world.raw.pttl(key) <= 5000 for key in world.keys_of(eid)} == {True}


def test_an_execution_of_a_lane_is_never_produced_by_its_name(world, shell, open_stream):
    eid = world.create(execution_id=shell.execution_id_for("chat", namespace=world.lane))
    assert open_stream().role == "consumer"
    handle = world.claim()
    assert handle.execution_id == eid
    assert open_stream(eid).role == "consumer"
    world.due(eid, "lease")
    assert open_stream(eid).role == "consumer"
    world.fire(eid, "lease")
    assert world.is_eligible(eid)
    assert open_stream().role == "consumer"


def test_an_execution_that_is_created_under_a_name_that_is_produced_stands_in_no_lane(
    world, open_stream
):
    stream = open_stream()
    world.create(execution_id=stream.execution_id)
    in_no_lane(world, stream.execution_id)
    given_back(world, stream)
    world.create(execution_id=stream.execution_id)
    in_no_lane(world, stream.execution_id)


def test_an_opening_that_is_repeated_gets_the_same_answer(world, shell):
    eid = shell.execution_id_for("chat", namespace=world.lane)
    call = {
        "namespace": world.lane, "retention_ms": 60_000, "takeover_ms": 1_000,
        "worker_instance_id": "w-1", "lease_id": keys.new_uuid(), "lease_ttl_ms": 30_000,
        "attempt_id": keys.new_uuid(), "writer_text": "0a1b", "max_payload_bytes": 65_536,
        "payload": b"", "tags": {},
    }  # fmt: skip
    first = world.call(ops.open_stream(eid, **call))
    assert world.call(ops.open_stream(eid, **call)) == first
    assert first.opened.opening == 1
    other = ops.open_stream(eid, **{**call, "lease_id": keys.new_uuid()})
    assert world.call(other) is None
    assert len(world.backend.describe(eid).history) == 1


# -- ends ---------------------------------------------------------------------------------------------------------------


class CanaryError(Exception):
    pass


def break_off(stream, *payloads):
    """Leave the block of a stream by an exception."""
    with stream:
        for payload in payloads:
            stream.write(payload)
        raise CanaryError("no room")


def test_an_exception_of_the_block_fails_the_stream(world, shell, open_stream):
    stream = open_stream(payload=b"secret prompt")
    with pytest.raises(CanaryError):
        break_off(stream, b"written before")
    assert told(followed(shell, stream.execution_id)) == [
        0, "written before", ("failed", "CanaryError: no room"),
    ]  # fmt: skip
    with pytest.raises(errors.ExecutionFailed, match="CanaryError: no room"):
        stream.wait(5)
    assert world.backend.describe(stream.execution_id).failure_class is FailureClass.TRANSIENT
    assert open_stream().role == "consumer"


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, GeneratorExit])
def test_an_interrupt_or_an_exit_cancels_the_stream(shell, open_stream, error):
    stream = open_stream()
    if isinstance(stream, ff_fast.OpenedStream):
        leave = stream.__exit__
    else:
        leave = stream._call(stream._target.__aexit__)
    stream.write(b"a")
    leave(error, error(), None)
    assert told(followed(shell, stream.execution_id)) == [
        0, "a", ("cancelled", "the producer was cancelled"),
    ]  # fmt: skip


def test_a_result_is_given_by_complete_and_leaving_changes_nothing(world, shell, open_stream):
    with open_stream() as stream:
        stream.write(b"a")
        stream.complete("answer")
        stream.complete("answer")
        assert not stream.cancelled
        with pytest.raises(errors.WriterClosed):
            stream.write(b"b")
    assert stream.wait(5) == b"answer"
    stream = open_stream("other")
    stream.complete()
    with pytest.raises(CanaryError):
        break_off(stream)
    assert stream.wait(5) == b""


def test_what_is_no_result_is_refused_and_the_stream_goes_on(open_stream):
    with open_stream() as stream:
        with pytest.raises(errors.PayloadTooLarge):
            stream.complete(bytes((16 << 20) + 1))
        with pytest.raises(errors.InvalidType):
            stream.complete(7)
        stream.write(b"a")
        stream.complete(b"r")
    assert stream.wait(5) == b"r"


def test_a_stream_is_failed_with_a_reason(world, shell, open_stream):
    with open_stream() as stream:
        stream.write(b"a")
        assert stream.fail("no room") == ff_fast.FailOutcome.TERMINAL_FAILED
        assert not stream.cancelled
    assert told(followed(shell, stream.execution_id)) == [0, "a", ("failed", "no room")]


@pytest.mark.parametrize("how", ["call", "exception"])
def test_a_crash_that_is_told_hands_the_stream_to_the_next(world, shell, open_stream, how):
    with contextlib.suppress(TaskFailed), open_stream() as stream:
        stream.write(b"a")
        if how == "exception":
            raise TaskFailed("out of memory", FailureClass.INFRA_CRASH)
        stream.fail("out of memory", FailureClass.INFRA_CRASH)
    in_no_lane(world, stream.execution_id)
    with open_stream() as other:
        assert (other.role, other.handle.attempt_index) == ("producer", 1)
    assert told(followed(shell, stream.execution_id)) == [0, "a", 1, ("success", None)]


@pytest.mark.parametrize("end", ["complete", "fail", "cancel"])
def test_what_has_ended_stays_ended_until_it_is_removed(shell, open_stream, end):
    stream = open_stream()
    stream.write(b"a")
    if end == "cancel":
        shell.cancel(stream.execution_id)
    else:
        getattr(stream, end)(*(["no"] if end == "fail" else []))
    with open_stream() as again:
        assert again.role == "consumer"
    shell.delete_execution(stream.execution_id)
    with open_stream() as again:
        assert (again.role, again.handle.attempt_index) == ("producer", 0)
        again.write(b"b")
    assert told(followed(shell, stream.execution_id)) == [0, "b", ("success", None)]


# -- cancellation ---------------------------------------------------------------------------------------------------------


def test_a_cancellation_that_is_requested_is_told_and_ends_the_stream(world, shell, open_stream):
    with open_stream() as stream:
        stream.write(b"a")
        world.backend.cancel(stream.execution_id, reason="too long", grace=60)
        assert stream.wait_cancelled(10)
        assert stream.cancelled
        stream.write(b"b")
    assert told(followed(shell, stream.execution_id)) == [0, "a", "b", ("cancelled", "too long")]


@pytest.mark.parametrize("leave", ["normally", "with an exception", "by complete"])
def test_a_stream_that_somebody_has_cancelled_stays_so(world, shell, open_stream, leave):
    with contextlib.suppress(CanaryError), open_stream() as stream:
        stream.write(b"a")
        stream.flush(5)
        world.backend.cancel(stream.execution_id, reason="stop")
        assert stream.wait_cancelled(10)
        assert stream.cancelled
        with pytest.raises(errors.FFError):
            stream.write(b"b")
        if leave == "by complete":
            stream.complete(b"r")
        if leave == "with an exception":
            raise CanaryError
    assert told(followed(shell, stream.execution_id)) == [0, "a", ("cancelled", "stop")]


def test_a_forced_cancellation_of_a_stream_without_a_producer(world, shell, open_stream):
    stream = open_stream()
    world.fire(stream.execution_id, "lease")
    assert world.state(stream.execution_id) == "waiting"
    shell.cancel(stream.execution_id, reason="nobody wants it")
    assert told(followed(shell, stream.execution_id))[-1] == ("cancelled", "nobody wants it")
    assert world.timers(stream.execution_id) == {}
    assert open_stream().role == "consumer"


def test_a_requested_cancellation_is_told_to_the_next_producer(world, open_stream):
    stream = open_stream()
    world.backend.cancel(stream.execution_id, reason="stop", grace=60)
    world.due(stream.execution_id, "lease")
    with open_stream() as other:
        assert other.role == "producer"
        assert other.wait_cancelled(10)
    assert world.backend.describe(stream.execution_id).cancellation_reason == "stop"


# -- lapses ---------------------------------------------------------------------------------------------------------------


@pytest.mark.cluster
@pytest.mark.parametrize("found", ["by a supervisor", "by the next producer"])
def test_a_producer_that_is_lost_is_replaced(world, shell, open_stream, found):
    stream = open_stream(takeover=60)
    eid = stream.execution_id
    stream.write(b"a")
    stream.flush(5)
    reader = shell.follow(eid)
    assert told(take(reader, 2)) == [0, "a"]
    world.due(eid, "lease")
    tail = rest(shell.tail(eid))
    assert [tail[0].payload, tail[-1].reason] == [b"a", "producer_lost"]
    in_no_lane(world, eid)
    if found == "by a supervisor":
        world.round()
        assert world.state(eid) == "waiting"
        assert world.timers(eid).keys() == {"lease"}
        in_no_lane(world, eid)
    with open_stream() as other:
        assert other.role == "producer"
        assert (other.handle.attempt_index, other.handle.kind) == (1, HandleKind.RESUMED)
        assert world.timers(eid).keys() == {"lease"}
        other.write(b"b")
        assert open_stream().role == "consumer"
        shell.wait_until(lambda: stream.cancelled)
        assert refused(stream)
        with pytest.raises(errors.FFError) as caught:
            stream.complete()
        assert is_lease_lost(caught.value)
    assert told(rest(reader)) == [1, "b", ("success", None)]
    assert world.timers(eid) == {}
    assert world.backend.describe_stream(eid, 0).closed_reason == "producer_lost"


@pytest.mark.parametrize("end", ["complete", "leave"])
def test_a_producer_that_was_told_of_a_loss_completes_nothing(
    world, shell, open_stream, monkeypatch, end
):
    """The server does not know of it: it has renewed the lease, and no answer came in time."""
    monkeypatch.setattr(leases, "RENEW_AT", 1_000)
    stream = open_stream(lease_ttl_ms=300)

    def told():
        world.backend.renew(stream.handle)
        return stream.cancelled

    def produce():
        with stream:
            stream.write(b"half")
            stream.flush(5)
            # A writer that is closed has no error of the loss.
            stream.writer._fail(errors.WriterClosed())
            shell.wait_until(told)
            if end == "complete":
                stream.complete(b"half")

    with pytest.raises(errors.LeaseExpired):
        produce()
    # Its producer has not ended it, or has said that it failed.
    assert world.state(stream.execution_id) == {"complete": "failed", "leave": "active"}[end]
    world.backend.delete_execution(stream.execution_id)


def test_readers_of_a_stream_that_nobody_takes_over_get_an_end(world, shell, open_stream):
    stream = open_stream(takeover=0.5)
    eid = stream.execution_id
    stream.write(b"a")
    stream.flush(5)
    reader = shell.follow(eid)
    world.fire(eid, "lease")
    assert told(take(reader, 2)) == [0, "a"]
    assert 0 < world.timers(eid)["lease"] - world.now() <= 500
    world.due(eid, "lease")
    world.round()
    items = rest(reader)
    assert told(items) == [("failed", "producer_lost")]
    assert items[0].reason == "producer_lost"
    with pytest.raises(errors.ExecutionFailed, match="producer_lost"):
        shell.wait(eid, 5)
    assert world.backend.describe(eid).failure_class is FailureClass.INFRA_CRASH
    assert open_stream().role == "consumer"
    assert world.timers(eid) == {}
    assert 30_000 < world.raw.pttl(keys.core(eid)) <= 60_000


def given_back(world, stream):
    """The claim of a producer that has written nothing is given back."""
    stream._keeper._end()
    lease_id = stream.handle.fields().lease_id
    op = ops.give_back(keys.partition_index(stream.execution_id), lease_id)
    assert world.call(op) == (True, [])


def test_an_opening_that_is_given_back_leaves_the_name_to_others(world, open_stream):
    stream = open_stream()
    given_back(world, stream)
    in_no_lane(world, stream.execution_id)
    with open_stream() as other:
        assert (other.role, other.handle.attempt_index) == ("producer", 0)


def test_a_name_that_nobody_has_produced_is_free_again_soon(world, shell, open_stream):
    stream = open_stream(takeover=5)
    given_back(world, stream)
    world.fire(stream.execution_id, "lease")
    assert told(followed(shell, stream.execution_id)) == [("failed", "producer_lost")]
    for key in world.keys_of(stream.execution_id):
        assert 0 < world.raw.pttl(key) <= 5_000


@pytest.mark.parametrize("how", ["delay", "suspension", "children"])
def test_a_producer_may_give_its_stream_up_for_a_while(world, shell, open_stream, how):
    stream = open_stream()
    eid = stream.execution_id
    stream.write(b"a")
    stream.flush(5)
    if how == "delay":
        shell.delay(stream.handle, 60)
        resume = lambda: world.fire(eid, "delay")  # noqa: E731
    elif how == "suspension":
        point = shell.create_waitpoint(stream.handle)
        spec = WaitpointSpec(WaitpointKind.SIGNAL_NAME, b"go", point.hmac_token)
        shell.suspend(stream.handle, ResumeCondition.any(spec))
        resume = lambda: world.backend.deliver_signal(eid, point, "go")  # noqa: E731
    else:
        child = world.create(parent_id=eid)
        shell.wait_children(stream.handle)
        resume = lambda: world.backend.cancel(child)  # noqa: E731
    assert open_stream().role == "consumer"
    resume()
    in_no_lane(world, eid)
    with open_stream() as again:
        assert (again.role, again.handle.attempt_index) == ("producer", 0)
        assert again.handle.kind is HandleKind.RESUMED
        again.write(b"b")
    assert told(followed(shell, eid)) == [0, "a", "b", ("success", None)]


@pytest.mark.parametrize("how", ["delay", "fail", "complete"])
def test_what_was_done_with_the_handle_is_left_as_it_is(world, shell, open_stream, how):
    with open_stream() as stream:
        stream.write(b"a")
        stream.flush(5)
        if how == "delay":
            shell.delay(stream.handle, 60)
        elif how == "fail":
            shell.fail(stream.handle, "no")
        else:
            shell.complete(stream.handle, b"r")
    state = {"delay": "delayed", "fail": "failed", "complete": "completed"}[how]
    assert world.state(stream.execution_id) == state


def test_a_stream_that_has_failed_is_not_completed(open_stream):
    with open_stream() as stream:
        stream.fail("no")
        with pytest.raises(errors.ExecutionNotActive):
            stream.complete(b"r")


def test_a_stream_is_taken_over_more_often_than_a_worker_is_replaced(world, open_stream):
    eid = open_stream().execution_id
    world.raw.hset(keys.core(eid), "reclaim_count", 1000)
    world.fire(eid, "lease")
    assert world.state(eid) == "waiting"


def test_a_stream_that_is_dropped_is_lost_when_its_lease_lapses(server, world):
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        stream = backend.open_stream("chat", namespace=world.lane)
        keeper = stream._keeper
        del stream
        gc.collect()
        wait_until(lambda: not keeper._thread.is_alive())


# -- removal --------------------------------------------------------------------------------------------------------------


class Following(Reading):
    """A follower in a thread, which reads on while the test does other things."""

    def __init__(self, kind, url, eid):
        self._eid = eid
        super().__init__(kind, url)

    def open(self):
        return self.backend.follow(self._eid)


@pytest.mark.cluster
def test_what_runs_is_cancelled_and_then_removed(server, world, connect, open_stream):
    shell = connect()
    stream = open_stream(payload=b"p", tags={"a.b": "c"})
    eid = stream.execution_id
    stream.write(b"a")
    stream.flush(5)
    readers = [Following(kind, server.url, eid) for kind in KINDS]
    wait_until(lambda: all(len(reader.items) == 2 for reader in readers))
    shell.delete_execution(eid, reason="not wanted")
    for reader in readers:
        assert told(reader.result()) == [0, "a", ("cancelled", "not wanted")]
    assert world.keys_of(eid) == set()
    for call in (shell.delete_execution, shell.describe, shell.wait):
        with pytest.raises(errors.ExecutionNotFound):
            call(eid)
    assert refused(stream)


@pytest.mark.parametrize("again", [False, True], ids=["free", "open again"])
@pytest.mark.parametrize("leave", ["normally", "by complete"])
def test_a_producer_whose_stream_is_removed_leaves_as_one_that_is_cancelled(
    shell, open_stream, leave, again
):
    with open_stream() as stream:
        stream.write(b"a")
        stream.flush(5)
        shell.delete_execution(stream.execution_id)
        assert stream.wait_cancelled(10)
        successor = open_stream() if again else None
        if leave == "by complete":
            stream.complete(b"r")
    if successor is not None:
        assert successor.role == "producer"
        successor.complete(b"own")
        assert successor.wait(5) == b"own"


def refused(stream):
    """Whether a producer that has lost its stream learns it when it writes on."""
    try:
        stream.write(b"too late")
        stream.flush(5)
    except errors.FFError as error:
        return is_lease_lost(error)
    return False


def test_an_execution_of_a_lane_is_removed_with_all_that_names_it(world, shell):
    flow = world.create_flow()
    eid, handle = world.owned(flow_id=flow, tags={"a.b": "c"}, payload=b"p", deadline=600)
    child = world.create(parent_id=eid, flow_id=flow)
    point = shell.create_waitpoint(handle)
    shell.deliver_signal(eid, point, "early")
    shell.append_frame(handle, ff_fast.Frame(b"x", ff_fast.FrameKind.EVENT))
    shell.complete(handle, b"r")
    shell.delete_execution(eid)
    assert {key for key in world.keys_of(eid) if b"completions" not in key} == set()
    assert world.timers(eid) == {}
    assert shell.describe_flow(flow).members == (child,)
    # Nobody waits for it any more.
    world.backend.cancel(child)


def test_one_with_many_attempts_is_removed_in_several_calls(world, shell, open_stream):
    stream = open_stream()
    eid = stream.execution_id
    stream.complete()
    for attempt in range(1, 400):
        world.raw.set(keys.head(eid, attempt), "junk")
        world.raw.hset(keys.meta(eid, attempt), "created_at", "1")
    world.raw.hset(keys.core(eid), "total_attempt_count", 400)
    shell.delete_execution(eid)
    assert world.keys_of(eid) == set()


# -- ids ------------------------------------------------------------------------------------------------------------------


def test_every_id_that_users_meet_needs_no_escape_in_a_url(world, shell, open_stream):
    done = world.backend.subscribe_completions(after="start")
    with open_stream() as stream:
        stream.write(b"a")
        lease = stream.handle.fields()
        point = shell.create_waitpoint(stream.handle)
        signal = shell.deliver_signal(stream.execution_id, point, "go")
    flow = world.create_flow()
    completion = done.next_batch(10)[-1]
    done.close()
    items = followed(shell, stream.execution_id)
    met = [
        keys.url_id(stream.execution_id), flow, point.waitpoint_id, signal.signal_id,
        lease.lease_id, lease.attempt_id, completion.cursor, "start",
        *(item.cursor for item in items), items[1].stream_id,
    ]  # fmt: skip
    assert [each for each in met if quote(each, safe="") != each] == []
