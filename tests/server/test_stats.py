"""What a backend counts, in both shells."""

import pickle

import pytest

from ff_fast import Durability, FailureClass, NotReplicated, RetryPolicy, Stats, StreamMode

from ..shells import KINDS, WORKER, Opener

DURABLE = StreamMode.durable()
SUMMARY = StreamMode.durable_summary()
LIVE = StreamMode.best_effort_live(30_000)


@pytest.fixture(params=KINDS)
def open_backend(request, server):
    opener = Opener(request.param)
    yield lambda: opener(server.url)
    opener.close()


def claimed(backend, lane):
    eid = backend.create_execution(lane=lane)
    return eid, backend.claim(lane=lane, **WORKER)


def took(tail, count):
    """The next items of a reader, so many."""
    items = []
    while len(items) < count:
        items += tail.next_batch(10)
    return items


def test_a_backend_that_has_done_nothing_has_counted_nothing(open_backend):
    backend = open_backend()
    assert backend.stats() == Stats()
    assert pickle.loads(pickle.dumps(backend.stats())) == Stats()


def test_frames_are_counted_by_mode_and_read_once_by_each_reader(open_backend, lane):
    backend = open_backend()
    eid, handle = claimed(backend, lane)
    written = {"durable": 3, "durable_summary": 2, "best_effort": 4}
    with backend.open_writer(handle, mode=DURABLE) as writer:
        assert backend.stats().writers_open == 1
        for mode, count in ((DURABLE, 3), (SUMMARY, 2), (LIVE, 4)):
            for _ in range(count):
                writer.write(b'{"a":1}', mode=mode)
        writer.flush()
        found = backend.stats()
        assert found.unacknowledged_bytes == found.unacknowledged_frames == 0
        for counted in (found.frames_written, found.frames_acknowledged):
            assert {name: getattr(counted, name) for name in written} == written
            assert counted.total == 9
        assert found.bytes_written == 9 * 7
        assert found.batches == found.batch_frames.count >= 1
        assert found.batch_frames.total == 9
        assert found.write_to_acknowledged_us.count == found.batches
    backend.complete(handle)
    reader = open_backend()
    tail = reader.tail(eid)
    assert len(took(tail, 10)) == 10
    found = reader.stats()
    assert {name: getattr(found.frames_read, name) for name in written} == written
    assert found.bytes_read == 9 * 7
    assert found.frames_written.total == found.tails_open == 0
    page = reader.read_stream(eid)
    assert len(page) == 9
    assert reader.stats().frames_read.total == 18
    found = backend.stats()
    assert found.writers_open == 0
    assert (found.executions_claimed, found.executions_completed) == (1, 1)


def test_what_is_pushed_is_counted_with_its_lag(open_backend, lane):
    backend, reader = open_backend(), open_backend()
    eid, handle = claimed(backend, lane)
    writer = backend.open_writer(handle)
    tail = reader.tail(eid)
    writer.write(b"a")
    writer.flush()
    took(tail, 1)
    assert reader.stats().tails_open == 1
    for _ in range(4):
        writer.write(b"b")
        writer.flush()
        took(tail, 1)
    found = reader.stats()
    assert found.frames_read.durable == 5
    assert found.bytes_read == 5
    assert found.read_lag_us.count >= 1
    # Of the same host's clock: whole milliseconds, and less than the test takes.
    assert found.read_lag_us.total < found.read_lag_us.count * 60_000_000
    tail.close()
    assert reader.stats().tails_open == 0
    writer.close()


def test_what_waits_for_the_server_is_a_gauge(open_backend, lane):
    backend = open_backend()
    _, handle = claimed(backend, lane)
    writer = backend.open_writer(handle)
    writer.write(b"x" * 100)
    found = backend.stats()
    # The thread of the blocking shell may have stored it meanwhile.
    assert (found.unacknowledged_frames, found.unacknowledged_bytes >= 100) in (
        (1, True),
        (0, False),
    )
    writer.close()
    assert backend.stats().unacknowledged_frames == 0


def test_a_named_stream_is_claimed_and_ended_by_its_producer(open_backend, lane):
    backend, other = open_backend(), open_backend()
    with backend.open_stream(lane, namespace=lane) as stream:
        with other.open_stream(lane, namespace=lane) as consumer:
            assert consumer.role == "consumer"
        assert stream.role == "producer"
    with pytest.raises(ValueError, match="no"), backend.open_stream(lane + "2", namespace=lane):
        raise ValueError("no")
    found = backend.stats()
    assert found.executions_claimed == 2
    assert (found.executions_completed, found.executions_failed) == (1, 1)
    assert other.stats().executions_claimed == 0


def test_a_backend_that_is_closed_keeps_its_counts_and_has_nothing_open(open_backend, lane):
    backend = open_backend()
    eid, handle = claimed(backend, lane)
    writer = backend.open_writer(handle)
    writer.write(b"a")
    writer.flush()
    tail = backend.tail(eid)
    took(tail, 1)
    assert backend.stats().tails_open == 1
    backend.close()
    found = backend.stats()
    assert (found.frames_written.total, found.frames_read.total) == (1, 1)
    assert (found.tails_open, found.writers_open, found.unacknowledged_bytes) == (0, 0, 0)


def test_an_end_that_does_not_reach_its_level_is_counted(open_backend, lane):
    backend = open_backend()
    # The shared server has no replica.
    level = {"durability": Durability.replicated(1), "durability_timeout": 0.001}
    for end in (
        lambda handle: backend.complete(handle, **level),
        lambda handle: backend.fail(handle, "no", **level),
        lambda handle: backend.cancel(handle, **level),
        lambda handle: backend.cancel(handle, grace=60, **level),
    ):
        handle = claimed(backend, lane)[1]
        with pytest.raises(NotReplicated):
            end(handle)
    found = backend.stats()
    assert (
        found.executions_completed,
        found.executions_failed,
        found.executions_cancelled,
    ) == (1, 1, 1)


def test_ends_are_counted_by_kind(open_backend, lane):
    backend = open_backend()
    for end in ("complete", "fail", "retry", "cancel", "request"):
        eid = backend.create_execution(lane=lane, retry=RetryPolicy(max_retries=1, delay=60.0))
        handle = backend.claim(lane=lane, **WORKER)
        if end == "complete":
            backend.complete(handle)
        elif end == "fail":
            backend.fail(handle, "no")
        elif end == "retry":
            backend.fail(handle, "later", FailureClass.TRANSIENT)
        elif end == "cancel":
            backend.cancel(eid)
        else:
            backend.cancel(eid, grace=60)
    assert backend.claim(lane=lane, **WORKER) is None
    found = backend.stats()
    assert (
        found.executions_claimed,
        found.executions_completed,
        found.executions_failed,
        found.executions_cancelled,
    ) == (5, 1, 2, 1)
