from asyncio import AbstractEventLoop
from collections.abc import Callable, Sequence
from typing import Protocol, final, type_check_only

from typing_extensions import disjoint_base

from ff_fast._hot.frames import StreamFrame
from ff_fast._hot.tally import Tally
from ff_fast.errors import FFError
from ff_fast.types import StreamMode

@type_check_only
class Place(Protocol):
    """The newest frame of an attempt that is known to be stored."""

    ms: int
    sequence: int
    checked: int
    held: Held | None

    def opened(self, ms: int, sequence: int) -> None: ...
    def tell_losses(self) -> None: ...
    def lose(self, first: int, last: int) -> None: ...

@disjoint_base
class Newest:
    """The newest frame that is known to be stored under a lease; each acknowledgement moves it.

    Attributes:
        ms, sequence: Its id; 0 and 0 for none.
        checked: Sequence up to which the server has confirmed its streams by releasing the lease.
    """

    ms: int
    sequence: int
    checked: int

@final
class Held:
    """What was acknowledged under a lease a moment ago: the writers of the lease send it again to a
    server that lacks it.

    The sequences of what is held follow one another, and end with the newest acknowledged frame.

    Args:
        ms: How long a batch is held.
        size: Most bytes that are held.
    """

    owner: Callable[[], WriterCore | None] | None
    def __init__(self, ms: int, size: int) -> None: ...
    def __len__(self) -> int: ...
    def clear(self) -> None:
        """Let go of everything."""
    @property
    def writer(self) -> bytes | None:
        """Id of the newest writer; None before the first one."""

    @property
    def opening(self) -> int:
        """The number of its opening."""

    @property
    def version(self) -> int:
        """Version of the summary after its newest patch."""

@final
class Batch:
    """A sealed batch, kept until it is acknowledged.

    Attributes:
        first_sequence: Sequence of its first frame.
        frame_count: How many frames it has; 0 for retention work alone.
    """

    @property
    def arguments(self) -> bytes:
        """Its part of a call, as it goes on the wire."""

    @property
    def message(self) -> bytes:
        """The call that has it alone."""

    @property
    def first_sequence(self) -> int:
        """Sequence of its first frame."""

    @property
    def frame_count(self) -> int:
        """How many frames it has; 0 for retention work alone."""

    @property
    def lost_count(self) -> int:
        """How many frames it says to be lost."""

@final
class Push:
    """Frames that are pushed to readers before they are stored."""

    @property
    def arguments(self) -> bytes:
        """Its part of a call, as it goes on the wire."""

    @property
    def message(self) -> bytes:
        """The call that has it alone."""

@final
class Call:
    """One call of ff_append with the parts of several writers; as a function, it takes the reply.

    Attributes:
        message: The request as it goes on the wire; None once it was taken.
        accepted: Whether the server has applied a part.
        error: The last error of a part that is sent again; None for none.
        home: The home of its writers, which is the same for all; None where they have none.
    """

    @property
    def message(self) -> bytes | None:
        """The request as it goes on the wire; None once it was taken."""

    @property
    def accepted(self) -> bool:
        """Whether the server has applied a part."""

    @property
    def error(self) -> FFError | None:
        """The last error of a part that is sent again; None for none."""

    @property
    def home(self) -> Home | None:
        """The home of its writers, which is the same for all; None where they have none."""

    def __len__(self) -> int: ...
    def __call__(self, reply: object) -> None: ...
    def take(self) -> bytes:
        """Return the request, and keep it no longer: its batches have all that is sent again."""
    def lost(self) -> None:
        """The connection is lost: the parts are sent again."""

@disjoint_base
class Home:
    """Where the writers of one slot register; without a cluster, where all do.

    Attributes:
        slot: The slot; None without a cluster.
        outbox: That of the node that has the slot. Writers follow as their answers come; those that
            are ready already, by `Outbox.withdraw`.
    """

    outbox: Outbox

    def __init__(self, slot: int | None, outbox: Outbox) -> None: ...
    @property
    def slot(self) -> int | None:
        """The slot; None without a cluster."""

@disjoint_base
class Outbox:
    """The writers of one connection that have something to send.

    A writer registers itself. The shell overrides `_on_ready` and `_on_answer`, asks `wait_s` when
    to send, and sends what `next_call` returns, or `next_calls`.

    All but `register` is for the thread that owns the connection; no method lets another thread run
    between a check and the change that relies on it.

    Args:
        linger_ms: How long what is ready waits for more, 0 to 1000 ms.
        lost: What a call gets in place of a reply when there is none.
        thread: Ident of the only thread whose writers may register; 0 for any.
        running: Returns the event loop that runs in this thread, and
        loop: what it must be; None for any.
    """

    def __init__(
        self,
        linger_ms: float = 0.0,
        lost: tuple[object, ...] = (),
        thread: int = 0,
        running: Callable[[], AbstractEventLoop | None] | None = None,
        loop: AbstractEventLoop | None = None,
    ) -> None: ...
    def next_call(self) -> Call | None:
        """Return the call to send now, or None. Its parts are in flight from here on.

        When writers are left, the shell goes on without being told.
        """
    def next_calls(self) -> list[Call]:
        """Return the calls to send now, in one write: of each slot one or more, each within the
        bounds of a call, and all within those of a send. Else as `next_call`.
        """
    def homes(self) -> set[Home]:
        """Return the homes of the writers that are ready."""
    def withdraw(self, home: Home) -> None:
        """Let the writers of *home* that are ready register where it says."""
    def hand_over(self) -> None:
        """Let all writers that are ready or held register where their homes say; what they hold of
        what was acknowledged goes with them.
        """
    def wait_s(self) -> float:
        """Return in how many seconds the next call is due, 0 for now; -1 if nothing is ready."""
    def hold_s(self) -> float:
        """Register the writers whose group is due to be stored; return in how many seconds others
        are, -1 if none is held.
        """
    def let_go_s(self) -> float:
        """Let go of what was held for long enough; return in how many seconds to look again, -1 if
        nothing is held.

        A look takes a bounded time, so it may be asked for again soon.
        """
    def doubt(self) -> None:
        """Note that the connection is lost: writers ask the next server whether it has what they
        hold.
        """
    def take_ready(self) -> list[WriterCore]:
        """Return the writers that are ready; they register again with their next frame."""
    def forget(self) -> None:
        """Drop what is ready and held: the writers have failed."""
    def _on_ready(self) -> None: ...
    def _on_answer(self, call: Call) -> None: ...
    def _on_wrong_thread(self) -> None: ...
    @property
    def ready(self) -> int:
        """How many writers are ready."""

    @property
    def holds(self) -> bool:
        """Whether frames are held that are to be stored later."""

    @property
    def keeps(self) -> bool:
        """Whether something is held that was acknowledged, and is to be let go later."""

    @property
    def _calls_in_flight(self) -> int: ...

@disjoint_base
class WriterCore:
    """The writer of one attempt: batches frames, resends, takes acknowledgements (see the module).

    A shell subclasses it, moves the bytes and overrides the hooks `_on_ready`, `_on_linger` and
    `_on_progress`. What has no underscore is for users.

    Args:
        keys: head, log, live and summary key of the attempt.
        writer: Writer id of `ff_open_writer`, which is the fence of every append.
        mode: Mode of frames that name none.
        opened: Answer of `ff_open_writer`: ms and sequence of the last id, last visible sequence,
            stored rate, summary version, and the number of the opening if it is known.
        document: The summary at that version; None for version 0.
        retention_maxlen: Least number of durable frames that the log keeps, from 1.
        max_unacknowledged_bytes: `write` raises ``Overloaded`` instead of keeping more, from 1.
        linger_ms: How long a batch waits for more frames, 0 to 1000 ms; 0 sends at once.
        max_payload_bytes: Largest payload that `write` accepts, 1 byte to 1 MiB.
        place: The newest frame of the attempt that is known to be stored, which acknowledgements
            move (`ff_fast._core.places.Place`); None for a writer on its own.
        outbox: Takes its parts into calls; None for a writer whose owner asks `_next_batch`.
        home: Says which outbox that is, in place of *outbox*.
        tally: Counts what is written and acknowledged; None counts nothing.
        replays: The writer stores again what those before it have written, and has their document.

    Raises:
        InvalidInput: A number is out of range.
        Corruption: The stored rate or *document* is not in the form that ff_fast writes.
    """

    def __init__(
        self,
        *,
        keys: tuple[bytes, bytes, bytes, bytes],
        writer: bytes,
        mode: StreamMode,
        opened: tuple[object, ...],
        document: bytes | None = None,
        retention_maxlen: int = 10_000,
        max_unacknowledged_bytes: int = ...,
        linger_ms: float = 0.0,
        max_payload_bytes: int = 65_536,
        place: Place | None = None,
        outbox: Outbox | None = None,
        home: Home | None = None,
        replays: bool = False,
        tally: Tally | None = None,
    ) -> None: ...
    def write(
        self,
        payload: bytes | bytearray | memoryview | str,
        frame_type: str = "token",
        *,
        mode: StreamMode | None = None,
        correlation_id: str | None = None,
        encoding: str = "utf8",
        source: str = "worker",
    ) -> int:
        """Take one frame and return its sequence. Never waits, never does I/O.

        Args:
            payload: Up to ``max_payload_bytes`` of the backend, 65,536 by default. ``str`` is
                encoded as UTF-8; ``bytearray`` and ``memoryview`` are copied. In mode ``summary``
                it is a patch, checked here.
            frame_type: Classifier of the frame, 1 to 256 bytes of UTF-8.
            mode: ``StreamMode`` of the frame; None for the writer's.
            correlation_id: Text that readers get with the frame, 1 to 256 bytes of UTF-8, or None.
            encoding: ``utf8``, or how the payload is encoded otherwise, 1 to 256 bytes of UTF-8.
                Readers get this text; nothing is converted.
            source: Who made the frame, 1 to 256 bytes of UTF-8.

        Returns:
            Sequence of the frame in its attempt, from 1. The frame is stored once `flush` returns.

        Raises:
            InvalidType: An argument has the wrong type.
            InvalidPayload: The payload is a ``str`` with a surrogate or a released ``memoryview``.
            PayloadTooLarge: The payload has more than ``max_payload_bytes`` of the backend.
            InvalidPatch: The payload is not a patch that the summary can take.
            InvalidInput: A text is empty, too long or not UTF-8; or `close` was called.
            Overloaded: Too many bytes are unacknowledged. Call `drain`, then write again.
            FFError: A copy of the `error` that stopped the writer. Its ``unstored`` has the frames
                that were not stored.

        After all of these but the last the writer goes on, without this frame.
        """

    def _next_batch(self) -> Batch | None: ...
    def _seal_soon(self) -> None: ...
    def _check_soon(self) -> bool: ...
    def _ask(self) -> None: ...
    def _reopened(self, ms: int, sequence: int, opening: int) -> None: ...
    def _seal_last(self) -> None: ...
    def _acknowledge(
        self, part: Batch | Push, reply: object, now_ms: int = 0, shared: bool = False
    ) -> FFError | None: ...
    def _requeue(self) -> None: ...
    def _fail(self, error: FFError, hand_back: bool = True) -> None: ...
    def _unstored_frames(self) -> tuple[StreamFrame, ...]: ...
    def _tell_losses(self) -> int: ...
    def _on_ready(self) -> None: ...
    def _on_lost_opening(self) -> None: ...
    def _on_end(self, error: FFError) -> None: ...
    def _on_linger(self) -> None: ...
    def _on_cancel_requested(self) -> None: ...
    def _on_progress(self) -> None: ...
    @property
    def mode(self) -> StreamMode:
        """``StreamMode`` of frames that name none."""

    @property
    def error(self) -> FFError | None:
        """The ``FFError`` that stopped the writer; its ``unstored`` has the frames that were not
        stored. None while the writer runs. ``WriterClosed`` after `close`."""

    @property
    def next_sequence(self) -> int:
        """Sequence that the next frame gets, from 1."""

    @property
    def last_sequence(self) -> int:
        """Sequence of the newest stored frame; 0 for none."""

    @property
    def last_id(self) -> str:
        """``stream_id`` of the newest stored frame; ``0-0`` for none."""

    @property
    def unacknowledged_bytes(self) -> int:
        """Bytes in memory that wait for the server: payloads of the open batch, and sealed ones."""

    @property
    def summary_version(self) -> int:
        """Version of the summary after every patch written so far; 0 for no summary."""

    @property
    def cancel_requested(self) -> bool:
        """Whether somebody has asked to cancel the execution, as of the newest acknowledgement."""

    @property
    def lease_left(self) -> float:
        """Seconds that the lease had left at the newest acknowledgement, by the server's clock; 0.0
        before the first one."""

    @property
    def rate_hz(self) -> float:
        """Estimated frames a second in the live window; 0 before the first one."""

    @property
    def window_frames(self) -> int:
        """K, how many frames the live window keeps at least; 0 before the first one."""

    @property
    def _failure(self) -> FFError | None: ...
    @property
    def _place(self) -> Place | None: ...
    @property
    def _max_payload(self) -> int: ...
    @property
    def _writer_name(self) -> bytes: ...
    @property
    def _stopped(self) -> bool: ...
    @property
    def _first_sequence(self) -> int: ...
    @property
    def _checked_sequence(self) -> int: ...
    @property
    def _opening_lost(self) -> bool: ...
    @property
    def _replays(self) -> int: ...
    @property
    def _linger_us(self) -> int: ...
    @property
    def _idle(self) -> bool: ...
    @property
    def _holds_back(self) -> bool: ...
    @_holds_back.setter
    def _holds_back(self, value: bool, /) -> None: ...
    @property
    def _has_waiters(self) -> bool: ...
    @_has_waiters.setter
    def _has_waiters(self, value: bool, /) -> None: ...

def arguments_of(message: bytes) -> Sequence[bytes]:
    """Return the arguments of a call after its keys."""
