"""What a backend knows to be stored: the newest acknowledged frame of each lease under which it writes.

What was acknowledged a moment ago is held with it, so that a server which has lost it in a failover gets it again from
whatever the backend does next under the lease: from the writer, from the next writer, or from the call that releases the
lease.
"""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING, Any

from ff_fast._hot.writer import Held, Newest
from ff_fast._log import say_seldom
from ff_fast.errors import FramesLost

if TYPE_CHECKING:
    from ff_fast._hot.tally import Tally
    from ff_fast._hot.writer import WriterCore

MAX_PLACES = 16_384
"""Leases that a backend remembers at most; for one that was forgotten, an end is sent without the last frame."""

MAX_RELEASED = 1024
"""Released leases of which the last frame is remembered, for calls that are repeated."""


class Place(Newest):
    """The newest frame of an attempt that is known to be stored. Writers move it with each acknowledgement.

    Attributes:
        told: A caller got ``SequenceGap``: frames up to this one are lost. A writer that is opened then goes on from
            what is stored.
        held: What was acknowledged a moment ago; None where nothing is kept.
        attempt: The execution and its attempt, for records.
    """

    __slots__ = ("_lost", "attempt", "held", "told")

    def __init__(self, held: Held | None = None) -> None:
        self.told = False
        self.attempt: tuple[str, int] | None = None
        self.held = held
        # First and last of the lost frames that the stream tells of, and no caller was told of.
        self._lost: tuple[int, int] | None = None

    @property
    def writer(self) -> WriterCore | None:
        """The newest writer of the lease; None where it is gone, or nothing is kept."""
        if self.held is None or self.held.owner is None:
            return None
        return self.held.owner()

    def lose(self, first: int, last: int) -> None:
        """Note that frames are lost, which the stream tells its readers."""
        execution_id, attempt_index = self.attempt or (None, None)
        say_seldom(
            logging.WARNING,
            "frames",
            # A failover may lose some of every stream.
            "lost",
            "The server has lost the frames %d to %d of attempt %s of execution %s, which it had acknowledged, and this"
            " process keeps them no longer.",
            first,
            last,
            attempt_index,
            execution_id,
            execution_id=execution_id,
            attempt_index=attempt_index,
        )
        if self._lost is not None:
            first, last = min(first, self._lost[0]), max(last, self._lost[1])
        self._lost = first, last

    def tell_losses(self) -> None:
        """Tell the caller of lost frames, once.

        Raises:
            FramesLost: There are any that no caller was told of.
        """
        lost, self._lost = self._lost, None
        if lost is not None:
            raise FramesLost(*lost)

    def opened(self, ms: int, sequence: int) -> None:
        """Note the last frame that the server has named to a new writer. An earlier one is a loss, unless it was told."""
        if self.told:
            self.told, self.checked = False, 0
        elif sequence < self.sequence:
            return
        self.ms, self.sequence = ms, sequence


class Places:
    """The place of each lease, from the opening of its first writer until the lease is released or lost.

    Of a lease that was released the id of the last frame stays known for a while. A failover may lose the release, and
    frames with it: a repeat of the call then meets the gap, as the first call would.

    Attributes:
        tally: Counts what is written under the leases; None counts nothing.
    """

    __slots__ = ("_places", "_released", "_replay_bytes", "_replay_ms", "tally")

    def __init__(
        self, replay_ms: int = 0, replay_bytes: int = 0, tally: Tally | None = None
    ) -> None:
        self.tally = tally
        # Single calls in C change it, so threads need no lock.
        self._places: dict[str, Place] = {}
        self._released: dict[str, tuple[int, int]] = {}
        self._replay_ms = replay_ms
        self._replay_bytes = replay_bytes

    def __len__(self) -> int:
        return len(self._places)

    def open(self, lease_id: str) -> Place:
        """Return the place of a lease that a writer is opened under."""
        place = self._places.get(lease_id)
        if place is None:
            keeps = self._replay_ms and self._replay_bytes
            held = Held(self._replay_ms, self._replay_bytes) if keeps else None
            new = Place(held)
            new.ms, new.sequence = self._released.pop(lease_id, (0, 0))
            place = self._places.setdefault(lease_id, new)
        bound(self._places, MAX_PLACES)
        return place

    def find(self, lease_id: str) -> Place | None:
        """Return the place of a lease; None where nothing was written under it."""
        return self._places.get(lease_id)

    def last_id(self, lease_id: str, last_sequence: int | None = None) -> bytes:
        """Return the id of the newest frame that is known under a lease, as calls that release it take it.

        Args:
            lease_id: The lease.
            last_sequence: A sequence that the caller knows to be stored, from elsewhere.
        """
        place = self._places.get(lease_id)
        if place is None:
            ms, sequence = self._released.get(lease_id, (0, 0))
        else:
            ms, sequence = place.ms, place.sequence
        if last_sequence is not None and last_sequence > sequence:
            ms, sequence = 0, last_sequence
        return b"%d-%d" % (ms, sequence) if sequence else b""

    def tell(self, lease_id: str) -> None:
        """Note that a caller is told of lost frames."""
        place = self._places.get(lease_id)
        if place is not None:
            place.told = True

    def confirm(self, lease_id: str) -> None:
        """Note that the server has compared the newest frame with its own."""
        place = self._places.get(lease_id)
        if place is not None:
            place.checked = place.sequence

    def release(self, lease_id: str) -> None:
        """Note that the server has released a lease: it needs nothing more, unless it loses that."""
        place = self._places.get(lease_id)
        if place is not None and place.sequence:
            self._released[lease_id] = place.ms, place.sequence
            bound(self._released, MAX_RELEASED)
        self._drop(lease_id)

    def forget(self, lease_id: str) -> None:
        """Forget a lease that is gone."""
        self._released.pop(lease_id, None)
        self._drop(lease_id)

    def _drop(self, lease_id: str) -> None:
        place = self._places.pop(lease_id, None)
        if place is not None and place.held is not None:
            place.held.clear()


def bound(table: dict[str, Any], most: int) -> None:
    """Forget the oldest of a table that has grown too large."""
    if len(table) > most:
        # Another thread may change it meanwhile, and forgets the oldest then.
        with contextlib.suppress(RuntimeError):
            table.pop(next(iter(table)), None)
