"""What a backend knows to be stored: the newest acknowledged frame of each lease under which it writes."""

from __future__ import annotations

import contextlib

MAX_PLACES = 16_384
"""Leases that a backend remembers at most; for one that was forgotten, an end is sent without the last frame."""


class Place:
    """The newest frame of an attempt that is known to be stored. Writers move it with each acknowledgement.

    Attributes:
        ms, sequence: Its id; 0 and 0 for none.
        checked: Sequence up to which the server has confirmed its streams by releasing the lease.
        told: A caller got ``SequenceGap``: frames up to this one are lost. A writer that is opened then goes on from
            what is stored.
    """

    __slots__ = ("checked", "ms", "sequence", "told")

    def __init__(self) -> None:
        self.ms = 0
        self.sequence = 0
        self.checked = 0
        self.told = False

    def opened(self, ms: int, sequence: int) -> None:
        """Note the last frame that the server has named to a new writer. An earlier one is a loss, unless it was told."""
        if self.told:
            self.told, self.checked = False, 0
        elif sequence < self.sequence:
            return
        self.ms, self.sequence = ms, sequence


class Places:
    """The place of each lease, from the opening of its first writer until the lease is released or lost."""

    __slots__ = ("_places",)

    def __init__(self) -> None:
        # Single calls in C change it, so threads need no lock.
        self._places: dict[str, Place] = {}

    def __len__(self) -> int:
        return len(self._places)

    def open(self, lease_id: str) -> Place:
        """Return the place of a lease that a writer is opened under."""
        place = self._places.setdefault(lease_id, Place())
        if len(self._places) > MAX_PLACES:
            # Another thread may change it meanwhile, and forgets the oldest then.
            with contextlib.suppress(RuntimeError):
                self._places.pop(next(iter(self._places)), None)
        return place

    def last_id(self, lease_id: str, last_sequence: int | None = None) -> bytes:
        """Return the id of the newest frame that is known under a lease, as calls that release it take it.

        Args:
            lease_id: The lease.
            last_sequence: A sequence that the caller knows to be stored, from elsewhere.
        """
        place = self._places.get(lease_id)
        ms, sequence = (0, 0) if place is None else (place.ms, place.sequence)
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

    def forget(self, lease_id: str) -> None:
        """Forget a lease that is gone."""
        self._places.pop(lease_id, None)
