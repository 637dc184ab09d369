"""What a backend has done, in numbers: one object, which its writers and readers share.

They count once a batch and never once a frame. No method runs Python code or releases the GIL in
the middle, so threads need no lock, and what is gone stays counted.
"""

cimport cython
from cpython.bytes cimport PyBytes_GET_SIZE
from posix.time cimport CLOCK_REALTIME, clock_gettime, timespec

from ff_fast._hot.frames cimport DURABLE_FRAMES, LIVE_FRAMES, SUMMARY_FRAMES, StreamFrame

from ff_fast.types import Gap


cdef extern from *:
    int clz "__builtin_clzll"(unsigned long long value) noexcept nogil


cdef inline long long wall_us() noexcept nogil:
    """Return the time of this host since the epoch, in µs."""
    cdef timespec now
    clock_gettime(CLOCK_REALTIME, &now)
    return <long long>now.tv_sec * 1_000_000 + now.tv_nsec // 1000


cdef inline void observe(Spread* spread, long long value) noexcept nogil:
    """Count a value in the bucket of the least power of two that is not below it."""
    cdef int bucket = 0
    if value < 0:
        value = 0
    spread.count += 1
    spread.total += <unsigned long long>value
    if value > 1:
        # How many bits the value before it has.
        bucket = 64 - clz(<unsigned long long>(value - 1))
    spread.buckets[bucket if bucket < BUCKETS else BUCKETS - 1] += 1


cdef tuple seen(Spread* spread):
    return spread.count, spread.total, tuple([spread.buckets[i] for i in range(BUCKETS)])


cdef tuple by_mode(unsigned long long* counts):
    return counts[DURABLE_FRAMES], counts[SUMMARY_FRAMES], counts[LIVE_FRAMES]


@cython.final
cdef class Tally:
    """The counters of one backend.

    Attributes:
        tails_open: How many readers are listening to an execution.
    """

    def __cinit__(self):
        self._gaps = {}
        self._events = {}

    cdef void wrote(
        self, Py_ssize_t durable, Py_ssize_t summary, Py_ssize_t live, Py_ssize_t size
    ) noexcept:
        """Count a batch that is sealed, with its frames by mode and the bytes of their payloads."""
        self._written[DURABLE_FRAMES] += durable
        self._written[SUMMARY_FRAMES] += summary
        self._written[LIVE_FRAMES] += live
        self._bytes_written += size
        observe(&self._batch_frames, durable + summary + live)

    cdef void stored(
        self, Py_ssize_t durable, Py_ssize_t summary, Py_ssize_t live, long long us
    ) noexcept:
        """Count a batch that is acknowledged for the first time, so long after its first frame was
        written."""
        self._acknowledged[DURABLE_FRAMES] += durable
        self._acknowledged[SUMMARY_FRAMES] += summary
        self._acknowledged[LIVE_FRAMES] += live
        observe(&self._write_to_acknowledged_us, us)

    cdef void sent_again(self, Py_ssize_t batches) noexcept:
        self._resends += batches

    cdef void got(self, Py_ssize_t* frames, Py_ssize_t size) noexcept:
        """Count frames that a reader got, by mode."""
        self._read[DURABLE_FRAMES] += frames[DURABLE_FRAMES]
        self._read[SUMMARY_FRAMES] += frames[SUMMARY_FRAMES]
        self._read[LIVE_FRAMES] += frames[LIVE_FRAMES]
        self._bytes_read += size

    cdef void lagged(self, long long ms) noexcept:
        """Count how long ago, by the clocks of both hosts, the server has had the frame of a batch
        that a reader takes; of the first batch, and of one in sixteen."""
        if self._takes % LAG_EVERY == 0:
            observe(&self._read_lag_us, wall_us() - 1000 * ms)
        self._takes += 1

    cdef int count_items(self, list items) except -1:
        cdef Py_ssize_t frames[MODES]
        cdef Py_ssize_t size = 0
        cdef StreamFrame frame
        cdef str mode
        frames[DURABLE_FRAMES] = frames[SUMMARY_FRAMES] = frames[LIVE_FRAMES] = 0
        for item in items:
            if type(item) is StreamFrame:
                frame = <StreamFrame>item
                mode = frame.mode
                size += PyBytes_GET_SIZE(frame.payload)
                if mode == "durable":
                    frames[DURABLE_FRAMES] += 1
                elif mode == "best_effort":
                    frames[LIVE_FRAMES] += 1
                else:
                    frames[SUMMARY_FRAMES] += 1
            elif type(item) is Gap:
                self.missed(item.reason)
        self.got(frames, size)
        return 0

    def took(self, list items not None):
        """Count the items of one answer."""
        self.count_items(items)

    def missed(self, str reason not None):
        """Count a gap that a reader is told of."""
        self._gaps[reason] = self._gaps.get(reason, 0) + 1

    def note(self, str event not None):
        """Count something that happens once in a call at most."""
        self._events[event] = self._events.get(event, 0) + 1

    def snapshot(self):
        """Return all counts by name; of frames by mode, of values as count, total and buckets."""
        return {
            "frames_written": by_mode(self._written),
            "frames_acknowledged": by_mode(self._acknowledged),
            "frames_read": by_mode(self._read),
            "bytes_written": self._bytes_written,
            "bytes_read": self._bytes_read,
            "batches": self._batch_frames.count,
            "resends": self._resends,
            "tails_open": self.tails_open,
            "gaps": dict(self._gaps),
            "events": dict(self._events),
            "batch_frames": seen(&self._batch_frames),
            "write_to_acknowledged_us": seen(&self._write_to_acknowledged_us),
            "read_lag_us": seen(&self._read_lag_us),
        }


@cython.final
cdef class Listening:
    """A reader that listens: it counts as open until it is let go."""

    cdef Tally _tally

    def __cinit__(self, Tally tally not None):
        self._tally = tally
        tally.tails_open += 1

    def __dealloc__(self):
        if self._tally is not None:
            self._tally.tails_open -= 1
