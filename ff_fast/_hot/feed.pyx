"""Pushes on their way to the readers of an attempt: decoded once, and queued at every reader.

A feed and its readers may be on different threads. `Feed` and `Inbox.accept` run on the hub's,
`Inbox.taken` on the reader's. None of them releases the GIL between two steps that rely on each
other, so there is no lock that an interrupt could leave locked.
"""

cimport cython
from cpython.list cimport PyList_GET_SIZE
from libc.math cimport INFINITY

from contextvars import copy_context
from time import monotonic
from weakref import WeakKeyDictionary, ref

from ff_fast._hot.frames cimport (
    PUSHED_END,
    PUSHED_FRAMES,
    PUSHED_LEASE,
    Pushed,
    StreamFrame,
    read_push,
)

from ff_fast.types import End

cdef enum:
    # What a reader's queue holds at most; a single push may have more.
    QUEUE_FRAMES = 4096
    QUEUE_BYTES = 1 << 20
    # What became of a push: the reader took it or had it, it begins behind the reader's place, or
    # it contradicts it.
    TAKEN = 0
    AHEAD = 1
    CONTRADICTS = 2

# Longest wait for a push, in seconds.
cdef double LONGEST_S = 60.0
# Frames are stored within a tenth of a second of their push.
cdef double SETTLE_S = 0.2


# Of each event loop, what wakes its tasks.
cdef object ringers = WeakKeyDictionary()


cdef class Ringer:
    """Resumes the tasks whose bells were rung, all of them in one call of the loop."""

    def __init__(self, loop):
        # `ringers` must not keep the loop.
        self._loop = ref(loop)
        self._rung = []

    cdef int add(self, Bell bell) except -1:
        if not self._rung:
            self._loop().call_soon(self)
        self._rung.append(bell)
        return 0

    def __call__(self):
        cdef list rung = self._rung
        cdef Py_ssize_t done = 0
        self._rung = []
        try:
            while done < PyList_GET_SIZE(rung):
                done += 1
                (<Bell>rung[done - 1]).resume()
        finally:
            # An exit or an interrupt in a task leaves the others waiting.
            if done < PyList_GET_SIZE(rung):
                if not self._rung:
                    self._loop().call_soon(self)
                self._rung = rung[done:] + self._rung


cdef class Bell:
    """Wakes one asyncio task that waits for a reader, any number of times.

    It is what a task awaits, in place of a future for each wait: a task asks only for the methods
    below. A feed refers to it, and it refers to no reader but by a task that waits.
    """

    def __init__(self, loop):
        cdef object ringer = ringers.get(loop)
        if ringer is None:
            ringer = ringers[loop] = Ringer(loop)
        self._ringer = ringer
        self._loop = loop

    def __call__(self):
        """Wake the task that waits, if one does."""
        self.ring()

    cdef int ring(self) except -1:
        if self._waiting and not self._rung:
            self._rung = True
            self._ringer.add(self)
        return 0

    cdef int begin(self) except -1:
        """Let the task wait that is given this bell."""
        self._waiting = True
        self._rung = self._cancelled = False
        self._asyncio_future_blocking = True
        return 0

    cdef int resume(self) except -1:
        cdef object callback = self._callback
        cdef object context = self._context
        self._waiting = False
        self._callback = self._context = None
        if callback is not None:
            context.run(callback, self)
        return 0

    def __await__(self):
        """Wait for the next ring. One task at a time may wait."""
        self.begin()
        yield self
        self.result()

    @property
    def waiting(self):
        """Whether a task waits."""
        return self._waiting

    # What asyncio asks of a future.

    def get_loop(self):
        """Return the loop of the tasks that wait."""
        return self._loop

    def add_done_callback(self, callback, *, context=None):
        """Call *callback* at the ring."""
        self._callback = callback
        self._context = copy_context() if context is None else context

    def cancel(self, msg=None):
        """End the wait of a task that was cancelled."""
        if not self._waiting or self._rung:
            return False
        self._rung = self._cancelled = True
        self._message = msg
        self._ringer.add(self)
        return True

    def result(self):
        """Return None, or raise ``CancelledError`` where the wait was cancelled."""
        if self._cancelled:
            from asyncio import CancelledError

            self._cancelled = False
            message, self._message = self._message, None
            raise CancelledError() if message is None else CancelledError(message)


cdef class Inbox:
    """Place of a reader in an attempt, and the pushes that it has not taken yet.

    A push is taken if its frames follow the place, by their ids: what overlaps must have the ids
    that the reader knows. Everything else makes a read due. The queue has a bound; beyond it all is
    dropped, and a read is due.

    Attributes:
        ms, sequence: Id of the last frame that was delivered or reported missing.
        stored: Sequence up to which what the reader got is known to be stored.
        due: A read must be made, since something may have been missed.
        reading: A read is under way; no push is taken meanwhile.
        doubted: The place may not be in storage; no push is taken until a read has found it there.
        confirmed: The server has confirmed the subscription, and it was not lost since.
        settled_at: Monotonic time from which storage has the frames that were pushed before the
            subscription.
        asked_at: Monotonic time of the last request, at the earliest.
        reads_end: A push that tells of the end makes a read due, which delivers it.
        end_reason: Why the attempt ended; None until the end was delivered.
        lease_at, look_at: Monotonic times at which a read is due although nothing was pushed.
        on_wake: Called, on the thread of the feed, when there may be something to take or to ask.
        tally: Counts the frames that are taken; None counts none.
    """

    def __cinit__(self, *_, **__):
        self._queue = []
        self.lease_at = INFINITY
        self.look_at = INFINITY

    cdef int wake(self) except -1:
        cdef object on_wake
        if self._woken:
            return 0
        self._woken = True
        on_wake = self.on_wake
        if type(on_wake) is Bell:
            (<Bell>on_wake).ring()
        elif on_wake is not None:
            on_wake()
        return 0

    @property
    def wake_at(self):
        """Monotonic time at which a read is due although nothing was pushed."""
        return self.next_look()

    cdef double next_look(self) noexcept:
        return self.lease_at if self.lease_at < self.look_at else self.look_at

    def offer(self, Pushed pushed not None):
        """Queue what was pushed, from the thread of the feed."""
        self.accept(pushed)

    def doubt(self, bint subscribed):
        """Note that the subscription was confirmed, or is lost: pushes may have been missed."""
        self.confirmed = subscribed
        if subscribed:
            # The server may be another one, and what follows may not follow what the reader had.
            self.due = self.doubted = True
            self.settled_at = monotonic() + SETTLE_S
        else:
            # Storage is asked now and then until the subscription is back.
            self.look_at = min(self.look_at, monotonic() + 1.0)
        self.wake()

    cdef int accept(self, Pushed pushed) except -1:
        cdef Py_ssize_t frames
        cdef double at
        if self.end_reason is not None:
            return 0
        if pushed._kind == PUSHED_FRAMES:
            frames = pushed.count(self.exclude)
            # Frames that the reader does not want neither wake it nor are a hole: those it wants
            # name the one before.
            if frames == 0 or self._dropping:
                return 0
            if self._queue and (
                self._frames + frames > QUEUE_FRAMES or self._bytes + pushed.size > QUEUE_BYTES
            ):
                self.drop()
                self._dropping = True
                self.due = True
            else:
                self._queue.append(pushed)
                self._frames += frames
                self._bytes += pushed.size
        elif pushed._kind == PUSHED_END:
            if self._dropping:
                return 0
            self._queue.append(pushed)
        elif pushed._kind == PUSHED_LEASE:
            at = monotonic() + min(pushed.lease_ms / 1000.0 + 0.001, LONGEST_S)
            at, self.lease_at = self.lease_at, at
            if self.lease_at >= at:
                return 0
        else:
            self.due = True
        return self.wake()

    cdef int drop(self) noexcept:
        """Forget what is queued."""
        self._queue = []
        self._frames = 0
        self._bytes = 0
        return 0

    def _begin_reading(self):
        """Note that a read begins: what was pushed so far need not be followed by another one."""
        self._woken = False
        self._dropping = False
        self.check_place()
        self.due = False
        self.reading = True
        self.asked_at = monotonic()

    def _forget(self):
        """Note that the place is another one, which no push has named."""
        self._remembered = 0

    def _drop_pushes(self):
        """Forget the pushes that are queued."""
        self.drop()

    cdef bint must_ask(self) noexcept:
        """Whether the reader has to be asked for its next step before it waits."""
        return self.due or self.reading or self.end_reason is not None

    cdef int check_place(self) noexcept:
        """Doubt a place that storage may never get to, where something may have been missed."""
        if self.due and self.stored < self.sequence:
            self.doubted = True
        return 0

    def take(self):
        """Return the items of the pushes that follow the place, in order."""
        return self.taken()

    cdef list taken(self):
        cdef list items = []
        cdef list queue
        cdef list ahead = None
        cdef Pushed pushed
        cdef Py_ssize_t i
        cdef int what
        cdef bint again = True
        self._woken = False
        self.check_place()
        if self.reading or self.doubted or not self._queue:
            return items
        queue = self._queue
        self.drop()
        while again:
            again = False
            ahead = None
            for i in range(PyList_GET_SIZE(queue)):
                pushed = <Pushed>queue[i]
                what = self.follow(pushed, items)
                if self.end_reason is not None:
                    return items
                if what == TAKEN:
                    # One that came out of order may follow now.
                    again = ahead is not None
                elif what == AHEAD:
                    if ahead is None:
                        ahead = []
                    ahead.append(pushed)
                else:
                    # What follows may belong to another history than the place. Storage decides.
                    self.due = self.doubted = True
                    self.put_back(ahead, queue[i + 1:])
                    return items
            if again:
                queue = ahead
        if items and self.tally is not None:
            self.tally.lagged(self.ms)
        if ahead is not None:
            self.put_back(ahead, None)
            self._blocked = True
            self._wait_for_hole()
        elif items:
            if self._blocked:
                self._blocked = False
                self._hole_filled()
            if self.confirmed:
                # What follows without a hole shows that nothing was missed.
                self.settled_at = 0.0
                self.look_at = INFINITY
        return items

    cdef int put_back(self, list ahead, list rest) except -1:
        """Queue *ahead* and *rest* again, before what has come meanwhile."""
        cdef Pushed pushed
        if ahead is None:
            ahead = []
        if rest is not None:
            ahead.extend(rest)
        for pushed in ahead:
            if pushed._kind == PUSHED_FRAMES:
                self._frames += pushed.count(self.exclude)
                self._bytes += pushed.size
        ahead.extend(self._queue)
        self._queue = ahead
        return 0

    def _wait_for_hole(self):
        """Frames are missing before those that are queued."""
        self.due = True

    def _hole_filled(self):
        """Nothing is queued that does not follow."""

    cdef int count(self, list items) except -1:
        if self.tally is not None:
            self.tally.count_items(items)
        return 0

    cdef int follow(self, Pushed pushed, list items) except -1:
        """Add the items of a push that follow the place, and move behind them."""
        if pushed._kind == PUSHED_END:
            return self.add_end(pushed, items)
        if pushed.last <= self.sequence:
            if not self.agrees(pushed):
                return CONTRADICTS
            if not pushed.deferred and pushed.last > self.stored:
                self.stored = pushed.last
            return TAKEN
        if pushed.first <= self.sequence:
            if self.ms and pushed.ms != self.ms:
                return CONTRADICTS
        elif pushed.ms < self.ms:
            return CONTRADICTS
        if self.exclude:
            return self.add_visible(pushed, items)
        return self.add_all(pushed, items)

    cdef int add_all(self, Pushed pushed, list items) except -1:
        cdef Py_ssize_t at
        cdef list frames
        if pushed.first > self.sequence + 1:
            return AHEAD
        at = <Py_ssize_t>(self.sequence + 1 - pushed.first)
        if at == 0:
            if pushed.alone is not None:
                items.append(pushed.alone)
            else:
                items.extend(pushed._frames)
            if self.tally is not None:
                self.tally.got(pushed.counts, pushed.payload_bytes)
        else:
            frames = pushed._frames[at:]
            items.extend(frames)
            self.count(frames)
        self.ms = pushed.ms
        self.sequence = pushed.last
        if not pushed.deferred:
            self.stored = pushed.last
        self.remember(pushed)
        return TAKEN

    cdef int add_visible(self, Pushed pushed, list items) except -1:
        cdef long long sequence = self.sequence
        cdef list frames = []
        cdef StreamFrame frame
        for frame in pushed._visible if pushed.alone is None else (pushed.alone,):
            if frame.sequence <= sequence:
                continue
            if frame._previous > sequence:
                return CONTRADICTS if frames else AHEAD
            sequence = frame.sequence
            frames.append(frame)
        if frames:
            items.extend(frames)
            self.count(frames)
            self.ms = pushed.ms
            self.sequence = self.stored = sequence
        self.remember(pushed)
        return TAKEN

    cdef int add_end(self, Pushed pushed, list items) except -1:
        cdef long long before = pushed.previous if self.exclude else pushed.last - 1
        # Where frames were pushed and never known to be stored, storage has the last word.
        if (
            self.reads_end
            or self.sequence < before or self.sequence >= pushed.last or self.ms > pushed.ms
            or self.stored != self.sequence
        ):
            return CONTRADICTS
        cursor = f"{self.attempt_index}.{pushed.ms}-{pushed.last}"
        items.append(End(reason=pushed.end_reason, cursor=cursor, error=pushed.end_error))
        self.ms = pushed.ms
        self.sequence = self.stored = pushed.last
        self.end_reason = pushed.end_reason
        return TAKEN

    cdef bint agrees(self, Pushed pushed) noexcept:
        """Whether the last frame of a push has the id under which the reader got it, if known."""
        cdef int i
        if pushed.last == self.sequence:
            return self.ms == 0 or pushed.ms == self.ms
        for i in range(self._remembered):
            if self._first[i] <= pushed.last <= self._last[i]:
                return pushed.ms == self._ms[i]
        return self.ms == 0 or pushed.ms <= self.ms

    cdef int remember(self, Pushed pushed) noexcept:
        """Note the ids of a push that was taken."""
        cdef int i = self._remembered
        if i and self._ms[i - 1] == pushed.ms and pushed.first <= self._last[i - 1] + 1:
            self._last[i - 1] = pushed.last
            return 0
        if i == REMEMBERED:
            for i in range(REMEMBERED - 1):
                self._first[i] = self._first[i + 1]
                self._last[i] = self._last[i + 1]
                self._ms[i] = self._ms[i + 1]
            i = REMEMBERED - 1
        self._first[i] = pushed.first
        self._last[i] = pushed.last
        self._ms[i] = pushed.ms
        self._remembered = i + 1
        return 0


@cython.final
cdef class Feed:
    """The channel of one attempt, and the readers that listen to it. It is a listener of the hub.

    Attributes:
        channel: Name of the channel.
    """

    cdef readonly bytes channel
    cdef dict _readers
    # The same, to be gone through; None where it has to be made again.
    cdef tuple _all
    cdef bint _subscribed
    cdef unsigned int _attempt_index

    def __init__(self, bytes channel not None):
        self.channel = channel
        self._readers = {}

    def add(self, Inbox reader not None):
        """Let *reader* hear what is pushed from here on."""
        self._readers[reader] = None
        self._all = None
        self._attempt_index = reader.attempt_index
        if self._subscribed:
            reader.doubt(True)

    def remove(self, Inbox reader not None):
        """Let *reader* go; return whether none is left."""
        self._readers.pop(reader, None)
        self._all = None
        return not self._readers

    cdef tuple readers(self):
        # A reader that is woken may leave, or bring another one.
        if self._all is None:
            self._all = tuple(self._readers)
        return self._all

    def told(self, bytes message not None):
        """Hand a message to every reader."""
        cdef Pushed pushed = read_push(message, self._attempt_index)
        for reader in self.readers():
            (<Inbox>reader).accept(pushed)

    def doubt(self, bint subscribed):
        """Tell every reader that the subscription was confirmed, or lost."""
        self._subscribed = subscribed
        for reader in self.readers():
            reader.doubt(subscribed)

    def failed(self, error):
        """Tell every reader that there is no subscription to be had."""
        self._subscribed = False
        for reader in self.readers():
            reader.failed(error)
