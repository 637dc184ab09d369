"""Which writers of `append_frame` a backend keeps, and how long: by a clock of the test's own."""

from types import SimpleNamespace

import pytest

from ff_fast._core import writer as writer_core
from ff_fast._core.ops import Attempt, Opened
from ff_fast._core.places import Places
from ff_fast._core.writer import FrameWriters, SharedWriter, WriterOptions, WriterState
from ff_fast.errors import StaleOwner, WriterClosed
from ff_fast.types import Handle

from .core import DURABLE, NEW, NOW_MS, WRITER, position


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(writer_core.time, "monotonic", lambda: now.s)
    return now


def opened(lease):
    handle = Handle.encode(
        execution_id="{fp:1}:550e8400-e29b-41d4-a716-446655440000",
        attempt_index=0,
        attempt_id="attempt-1",
        lease_id=lease,
        lease_epoch=1,
        lease_ttl_ms=30_000,
        lane_id="lane",
        worker_instance_id="w-1",
    )
    options = WriterOptions(mode=DURABLE)
    state = WriterState(Attempt.of(handle), WRITER, Opened(*NEW), None, options, Places())
    return SharedWriter(state)


def kept(*writers, lease_s=(30, 30)):
    found = FrameWriters({writer._lease_id: writer for writer in writers})
    for writer, each in zip(writers, lease_s, strict=False):
        found.opened(writer, each)
    found._look_at = 0.0
    return found


A, B = "550e8400-e29b-41d4-a716-44665544000a", "550e8400-e29b-41d4-a716-44665544000b"


def test_a_writer_goes_when_its_lease_has_lapsed_and_not_before(clock):
    writers = kept(opened(A), opened(B), lease_s=(30, 90))
    clock.s += 30
    writers.drop_lapsed()
    assert set(writers) == {A, B}
    clock.s += 1
    writers.drop_lapsed()
    assert set(writers) == {B}


def test_a_renewed_lease_keeps_its_writer(clock):
    writers = kept(opened(A), opened(B))
    clock.s += 20
    writers.settle(None, (A, 60.0))
    writers.settle(None, ("another lease", 60.0))
    clock.s += 40
    writers.settle(None, None)
    assert set(writers) == {A}
    clock.s += 21
    writers.settle(None, None)
    assert not writers


def test_a_stored_frame_says_how_long_the_lease_lasts(clock):
    writer = opened(A)
    writers = kept(writer)
    writer.write(b"x")
    batch = writer._next_batch()
    clock.s += 5
    # It waits for the server, whose answer decides.
    writers.drop_lapsed()
    assert set(writers) == {A}
    writer._acknowledge(batch, position(batch), NOW_MS)
    writers.appended(writer)
    clock.s += 29
    writers.drop_lapsed()
    assert set(writers) == {A}
    clock.s += 2
    writers.drop_lapsed()
    assert not writers


def test_writers_are_looked_at_once_a_second(clock):
    writers = kept(opened(A), opened(B), lease_s=(0.1, 1.5))
    clock.s += 1
    writers.drop_lapsed()
    assert set(writers) == {B}
    clock.s += 0.9
    writers.drop_lapsed()
    assert set(writers) == {B}
    clock.s += 0.2
    writers.drop_lapsed()
    assert not writers


def test_a_failed_writer_goes_and_its_lease_may_have_another(clock):
    writer = opened(A)
    writers = kept(writer, opened(B))
    writer._fail(StaleOwner())
    writers.failed(writer)
    assert set(writers) == set(writers._open_writers) == {B}
    other = opened(A)
    writers[A] = writers._open_writers[A] = other
    writers.failed(writer)
    assert writers[A] is writers._open_writers[A] is other
    # One that failed while nobody appended goes with the next look.
    other._fail(StaleOwner())
    writers.drop_lapsed()
    assert set(writers) == {B}


def test_a_released_lease_closes_its_writer(clock):
    writer = opened(A)
    writers = kept(writer, opened(B))
    writers.settle(A, None)
    writers.settle("another lease", None)
    assert set(writers) == {B}
    assert isinstance(writer.error, WriterClosed)
