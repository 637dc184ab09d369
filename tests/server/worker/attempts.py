"""How attempts end, and when they are tried again."""

from ff_fast import (
    End,
    RetryPolicy,
    StreamFrame,
)

RETRY = RetryPolicy(max_retries=3, delay=0.001)


def read(backend, eid, attempt=0):
    """The payloads of an attempt that has ended or gone on, and how it ended."""
    *frames, end = backend.tail(eid, attempt)
    assert all(isinstance(frame, StreamFrame) for frame in frames), frames
    assert [frame.sequence for frame in frames] == list(range(1, len(frames) + 1))
    assert isinstance(end, End)
    return [frame.payload for frame in frames], end.reason
