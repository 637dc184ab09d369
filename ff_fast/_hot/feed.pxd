cimport cython

from ff_fast._hot.frames cimport Pushed
from ff_fast._hot.tally cimport Tally


cdef enum:
    # Pushes whose ids a reader remembers.
    REMEMBERED = 16


cdef class Bell


@cython.final
cdef class Ringer:
    cdef object _loop
    cdef list _rung

    cdef int add(self, Bell bell) except -1


@cython.final
cdef class Bell:
    cdef public bint _asyncio_future_blocking
    cdef Ringer _ringer
    cdef object _loop
    cdef object _callback
    cdef object _context
    cdef object _message
    cdef bint _waiting
    cdef bint _rung
    cdef bint _cancelled

    cdef int ring(self) except -1
    cdef int begin(self) except -1
    cdef int resume(self) except -1


cdef class Inbox:
    cdef public long long ms
    cdef public long long sequence
    cdef public long long stored
    cdef public unsigned int attempt_index
    cdef public bint exclude
    cdef public bint due
    cdef public bint reading
    cdef public bint doubted
    cdef public bint confirmed
    cdef public double settled_at
    cdef public double asked_at
    cdef public bint reads_end
    cdef public str end_reason
    cdef public double lease_at
    cdef public double look_at
    cdef public object on_wake
    cdef public Tally tally
    cdef list _queue
    cdef Py_ssize_t _frames
    cdef Py_ssize_t _bytes
    cdef bint _dropping
    cdef bint _woken
    cdef bint _blocked
    cdef int _remembered
    cdef long long _first[REMEMBERED]
    cdef long long _last[REMEMBERED]
    cdef long long _ms[REMEMBERED]

    cdef int wake(self) except -1
    cdef int accept(self, Pushed pushed) except -1
    cdef int drop(self) noexcept
    cdef list taken(self)
    cdef int put_back(self, list ahead, list rest) except -1
    cdef int check_place(self) noexcept
    cdef bint must_ask(self) noexcept
    cdef double next_look(self) noexcept
    cdef int count(self, list items) except -1
    cdef int follow(self, Pushed pushed, list items) except -1
    cdef int add_all(self, Pushed pushed, list items) except -1
    cdef int add_visible(self, Pushed pushed, list items) except -1
    cdef int add_end(self, Pushed pushed, list items) except -1
    cdef bint agrees(self, Pushed pushed) noexcept
    cdef int remember(self, Pushed pushed) noexcept
