"""Writers that go with frames which are not stored: a warning, unless somebody knows."""

import warnings

import pytest

from ff_fast import Handle, HandleKind, keys
from ff_fast._core import ops
from ff_fast._core.places import Places
from ff_fast._core.writer import SharedWriter, WriterOptions, WriterState, warn_of_losses
from ff_fast.errors import ForkedClient, LeaseExpired, StaleOwner, Unavailable, WriterClosed
from ff_fast.types import StreamMode


def opened():
    handle = Handle.encode(
        kind=HandleKind.FRESH, execution_id=keys.new_execution_id(), attempt_index=0,
        attempt_id=keys.new_uuid(), lease_id=keys.new_uuid(), lease_epoch=1, lease_ttl_ms=1_000,
        lane_id="lane", worker_instance_id="w",
    )  # fmt: skip
    attempt = ops.Attempt.of(handle)
    return SharedWriter(
        WriterState(
            attempt, b"writer", ops.Opened(0, 0, 0, b"", 0), None, WriterOptions(StreamMode.durable()), Places()
        )
    )  # fmt: skip


def see_error(writer):
    assert writer.error is not None


def write_again(writer):
    with pytest.raises(WriterClosed):
        writer.write(b"x")


def nothing(writer):
    pass


@pytest.mark.parametrize("error", [None, WriterClosed, Unavailable])
def test_frames_that_nobody_knows_of_are_warned_of(error):
    writer = opened()
    for _ in range(3):
        writer.write(b"a secret")
    writer._next_batch()
    if error is not None:
        writer._fail(error())
    with pytest.warns(RuntimeWarning, match="were not acknowledged.*: 3; close a writer") as caught:
        del writer
    assert "secret" not in str(caught[0].message)


@pytest.mark.parametrize(
    "error, look",
    [
        (WriterClosed, see_error),
        (WriterClosed, write_again),
        # Another worker owns the execution, and writes its own frames.
        (LeaseExpired, nothing),
        (StaleOwner, nothing),
    ],
)
def test_losses_that_somebody_knows_of_are_not(error, look):
    writer = opened()
    writer.write(b"x")
    writer._fail(error())
    look(writer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del writer


def test_losses_of_many_writers_are_one_warning():
    writers = [opened() for _ in range(5)]
    for count, writer in enumerate(writers):
        for _ in range(count):
            writer.write(b"x")
        writer._fail(Unavailable())
    # Nobody wants these.
    writers[1]._tell_losses()
    with pytest.warns(RuntimeWarning) as caught:
        warn_of_losses(writers)
    (warning,) = caught
    assert str(warning.message) == (
        f"Frames of 3 writers, such as that of attempt 0 of execution {writers[2].execution_id}, were not acknowledged"
        " (unavailable): 9; close a writer before its backend is closed or the program ends."
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_losses(writers)
        writers.clear()
        del writer


def test_frames_behind_a_look_that_found_none_are_told():
    writer = opened()
    assert writer._tell_losses() == 0
    writer.write(b"x")
    assert writer._tell_losses() == 1
    assert writer._tell_losses() == 0


def test_frames_of_a_parent_are_no_loss_of_the_forked_child():
    writer = opened()
    writer.write(b"x")
    writer._fail(ForkedClient(), hand_back=False)
    assert writer._failure.unstored == ()
    assert writer._tell_losses() == 0


def test_a_writer_without_frames_goes_quietly():
    writer = opened()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        del writer
