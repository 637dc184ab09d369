"""The live window of one writer: which frames may leave it, how long its key lives, its rate.

The window keeps every frame that is younger than ttl, and at least

    K = clamp(ceil(rate * ttl * 2), floor, ceiling)

frames. Only the ceiling drops a frame that is younger than ttl. The server trims: each batch names
the oldest id to keep (`first_kept`). A trim can only cut after a frame whose id is known, so the
window remembers last ids of acknowledged batches as marks, in steps of about a sixteenth of the
window. A missing mark makes a trim coarser, never wrong.

The key of the window expires 2 * ttl after the last renewal. A renewal is due after a quarter of a
ttl (`renew_due`), so the key outlives its newest frame by more than half a ttl. A batch that was on
its way for longer than a ttl forces one (`mark`).

Two clocks: `now_us` is any monotonic clock of this machine, in µs; `server_ms` is the earliest time
that the server's clock can show, in ms since the epoch.

No method runs Python code. Those that are ``noexcept`` make no objects and cannot fail. For each
batch the writer calls `widen` for each mode in it, then `first_kept`, `renew_due`,
`take_rate` and `sealed`; later `stored` and, for the newest acknowledged batch, `mark`.
"""

cimport cython
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from libc.string cimport memmove

from ff_fast._hot.rate cimport RateEstimator, window_frames
from ff_fast.errors import Corruption

cdef enum:
    # Finer steps would cost the server more trims than they save it frames.
    STEPS = 16
    FIRST_MARKS = 8
    MAX_MARKS = 32
    STORE_RATE_EVERY_US = 1_000_000
    # Frames under an id that a push has fixed were written so long after its ms, at most.
    GROUP_MS = 1000

# Beyond every rate that can be; keeps the stored estimate short.
cdef double MAX_RATE_HZ = 1e12


cdef double parse_rate(bytes stored) except -1.0:
    """Return the rate that `take_rate` of an earlier writer has stored; 0 for an empty text.

    What stands behind the rate is for people: a writer has its own ttl, floor and ceiling.

    Raises:
        Corruption: It is not a rate.
    """
    cdef double rate = 0.0
    if stored:
        try:
            rate = float(stored.split(None, 1)[0])
        except (ValueError, IndexError):
            rate = -1.0
        # Not a number fails the comparison too.
        if not 0.0 <= rate <= MAX_RATE_HZ:
            raise Corruption("The rate of the live window is not a number; end the attempt.")
    return rate


@cython.final
@cython.auto_pickle(False)
cdef class LiveWindow:
    """Size, expiry and rate of the live window of one writer (see the module).

    Args:
        ttl_ms: How long a frame stays visible, in ms, at least.
        floor: Least number of frames to keep.
        ceiling: Greatest number of frames to keep.
        ema_alpha: Share of the latest 100 ms in the rate, in (0, 1].
        assumed: The four above are defaults; the first `widen` replaces them.
        rate_hz: Rate that an earlier writer has stored, in frames a second; 0 for none.
        now_us: The time, in µs.
        ms: Last id that is stored, which bounds what an earlier writer left: ms
        sequence: and sequence; 0 for none.

    Raises:
        InvalidInput: *ema_alpha* or *rate_hz* is out of range.
    """

    def __cinit__(self):
        self._marks = <Mark*>PyMem_Realloc(NULL, FIRST_MARKS * sizeof(Mark))
        if self._marks is NULL:
            raise MemoryError()
        self._mark_capacity = FIRST_MARKS

    def __dealloc__(self):
        PyMem_Free(self._marks)

    def __init__(
        self, long long ttl_ms, long long floor, long long ceiling, double ema_alpha=0.2,
        bint assumed=False, double rate_hz=0.0, long long now_us=0, long long ms=0,
        long long sequence=0,
    ):
        self._estimator = RateEstimator(ema_alpha, rate_hz, now_us)
        self.ttl_ms = ttl_ms
        self.floor = floor
        self.ceiling = ceiling
        self._assumed = assumed
        self.must_renew = True
        self._rate_due_us = now_us
        self._mark_count = 0
        if sequence:
            # What an earlier writer left, and what the log holds, counts as nothing.
            self._marks[0].count = 0
            self._marks[0].ms = ms
            self._marks[0].sequence = sequence
            self._marks[0].stored_ms = ms + GROUP_MS
            self._mark_count = 1

    cpdef int widen(
        self, long long ttl_ms, long long floor, long long ceiling, double ema_alpha,
        long long now_us
    ) except -1:
        """Keep what best-effort frames of another mode ask for too. The window never narrows, but
        for defaults, which are replaced."""
        if self._assumed:
            self._estimator = RateEstimator(ema_alpha, self._estimator.rate_at(now_us), now_us)
            self._assumed = False
            self.ttl_ms = ttl_ms
            self.floor = floor
            self.ceiling = ceiling
            self.must_renew = True
            return 0
        if ttl_ms > self.ttl_ms:
            self.ttl_ms = ttl_ms
            self.must_renew = True
        self.floor = max(self.floor, floor)
        self.ceiling = max(self.ceiling, ceiling)
        return 0

    cpdef (long long, long long) first_kept(
        self, Py_ssize_t count, long long now_us, long long server_ms
    ) noexcept:
        """Count *count* frames of a batch that is sealed now, and return the oldest id to keep.

        Returns:
            ``(ms, sequence)`` of the id; ``(0, 0)`` if nothing may leave that has not left before.
        """
        cdef (long long, long long) first = (0, 0)
        cdef Py_ssize_t i = 0
        self.frames = window_frames(
            self._estimator.rate_at(now_us), self.ttl_ms, self.floor, self.ceiling
        )
        self._estimator.add(count, now_us)
        while i < self._mark_count and self._may_drop(&self._marks[i], count, server_ms):
            i += 1
        if i:
            first = (self._marks[i - 1].ms, self._marks[i - 1].sequence + 1)
            self._mark_count -= i
            memmove(self._marks, self._marks + i, self._mark_count * sizeof(Mark))
        return first

    cdef bint _may_drop(self, Mark* mark, Py_ssize_t count, long long server_ms) noexcept:
        """Whether everything up to a mark may leave: K frames remain, the *count* new ones
        included, and all that leave are older than ttl; or as many remain as the ceiling allows."""
        cdef long long remaining = self._sealed_count + count - mark.count
        if remaining >= self.ceiling:
            return True
        return remaining >= self.frames and server_ms - mark.stored_ms >= self.ttl_ms

    cpdef bint renew_due(self, bint has_frames, long long now_us) noexcept:
        """Whether a batch that is sealed now, with live frames or without, renews the expiry."""
        return self.must_renew or (
            has_frames and now_us >= self._renewed_us + self.ttl_ms * 250
        )

    cpdef bytes take_rate(self, bint closing, long long now_us):
        """Return what to store with a batch that is sealed now: the rate in frames a second, ttl,
        floor and ceiling.

        None within a second of the last time, unless the writer is *closing*.
        """
        if now_us < self._rate_due_us and not closing:
            return None
        self._rate_due_us = now_us + STORE_RATE_EVERY_US
        return b"%.3f %d %d %d" % (
            min(self._estimator.rate_at(now_us), MAX_RATE_HZ), self.ttl_ms, self.floor, self.ceiling
        )

    cpdef void sealed(self, Py_ssize_t count, bint renews, long long now_us) noexcept:
        """A batch with *count* live frames was sealed; whether it renews the expiry."""
        self._sealed_count += count
        if renews:
            self.must_renew = False
            self._renewed_us = now_us

    cpdef void stored(self, Py_ssize_t count) noexcept:
        """A batch with *count* live frames was acknowledged."""
        self._stored_count += count

    cpdef void mark(
        self, long long ms, long long sequence, bint renewed, long long now_us,
        long long stored_ms=0
    ) noexcept:
        """Add a mark if the last stored id is a step after the previous mark.

        Args:
            ms: The id: ms
            sequence: and sequence, each not below that of any mark.
            renewed: Whether the batch that was acknowledged renewed the expiry.
            now_us: The time, in µs.
            stored_ms: The server's time when it was stored, at the latest: no frame up to it is
                younger. A frame may be younger than its id, whose ms a push has fixed.
        """
        cdef Mark* mark
        cdef void* moved
        cdef long long frames, passed_ms
        stored_ms = max(ms, stored_ms)
        if not renewed and now_us > self._renewed_us + self.ttl_ms * 1000:
            # The batch took so long that the key may have expired on its way, and the batch then
            # made a new one, without an expiry.
            self.must_renew = True
        if self._mark_count:
            mark = &self._marks[self._mark_count - 1]
            frames = self._stored_count - mark.count
            passed_ms = stored_ms - mark.stored_ms
            if frames < self.ceiling // STEPS and (
                passed_ms < self.ttl_ms // STEPS or frames < self.floor // STEPS
            ):
                return
        if self._mark_count == self._mark_capacity:
            moved = NULL
            if self._mark_capacity < MAX_MARKS:
                moved = PyMem_Realloc(self._marks, 2 * self._mark_capacity * sizeof(Mark))
            if moved is not NULL:
                self._marks = <Mark*>moved
                self._mark_capacity *= 2
            else:
                self._forget_mark()
        mark = &self._marks[self._mark_count]
        mark.count = self._stored_count
        mark.ms = ms
        mark.sequence = sequence
        mark.stored_ms = stored_ms
        self._mark_count += 1

    cdef void _forget_mark(self) noexcept:
        """Drop the mark whose neighbours stand closest; the last one's next neighbour is the mark
        that is about to be added."""
        cdef Py_ssize_t i, least
        cdef long long next_count, gap, least_gap
        least = 1
        least_gap = -1
        for i in range(1, self._mark_count):
            next_count = self._stored_count
            if i + 1 < self._mark_count:
                next_count = self._marks[i + 1].count
            gap = next_count - self._marks[i - 1].count
            if least_gap < 0 or gap < least_gap:
                least = i
                least_gap = gap
        self._mark_count -= 1
        memmove(
            self._marks + least, self._marks + least + 1,
            (self._mark_count - least) * sizeof(Mark),
        )

    cpdef double rate_hz(self, long long now_us) noexcept:
        """Return the rate at *now_us*, in frames a second."""
        return self._estimator.rate_at(now_us)

    @property
    def mark_count(self):
        """How many ids are remembered, at most 32."""
        return self._mark_count
