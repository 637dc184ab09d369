"""The line: the claims of one backend that wait for the same kind of work, in the order in which they came.

One wait on the server serves them all. It takes up to as many hints at once as there are claims, and each goes to the
claim that has waited longest. A hint for a claim that has left goes to the next one, or back to its queue.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

from ff_fast.errors import FFError, Outcome

if TYPE_CHECKING:
    from collections.abc import Callable

# A leader connects, waits, looks and hands out within this time.
_LEAD_S = 11.0


class Head(NamedTuple):
    """The best execution of a partition among those with the same requirements."""

    score: float
    needs: str
    partition: int


class Waiter(Protocol):
    """A claim, as far as its line needs it; :class:`ff_fast._core.claiming.Claim` says what the attributes mean."""

    abandoned: bool
    blocked: bool
    dismissed: bool
    failure: FFError | None
    given: Head | None
    hint_taken: bool
    joined_at: float
    left_line: bool
    until: float
    wake: Callable[[], None]

    @property
    def told(self) -> bool: ...

    def joins(self) -> None: ...

    def left(self) -> float: ...


class Line:
    """The waiting claims of one kind.

    Threads share it without a lock that an interrupt could leave locked: each change is a single call in C. Where two of
    them cross, a hint is handed out twice, which costs one empty claim, and never lost.

    Attributes:
        waiting: The claims, the oldest first.
        until: No claim that waits goes on for longer, in monotonic time.
        looked_at: When the last look at hints that others had taken began, in monotonic time.
    """

    __slots__ = ("_lead_until", "_seat", "looked_at", "until", "waiting")

    def __init__(self) -> None:
        self.waiting: deque[Waiter] = deque()
        self.until = 0.0
        self.looked_at = float("-inf")
        # Holds the claim whose thread waits on the server.
        self._seat: dict[str, Waiter] = {}
        self._lead_until = 0.0

    def join(self, claim: Waiter) -> None:
        """Put *claim* at the end of the line; one whose hint has led to nothing comes back to the front."""
        been = claim.joined_at > 0
        claim.joins()
        self.until = max(self.until, claim.until) if self.waiting else claim.until
        if been:
            self.waiting.appendleft(claim)
        else:
            self.waiting.append(claim)

    def leave(self, claim: Waiter) -> None:
        """Take *claim* out of the line, whether or not it is still there."""
        claim.left_line = True
        with contextlib.suppress(ValueError):
            self.waiting.remove(claim)

    def dismiss(self, claim: Waiter) -> None:
        """Tell *claim*, if it is still in the line, that there is nothing for it."""
        with contextlib.suppress(ValueError):
            self.waiting.remove(claim)
            claim.dismissed = True
            claim.wake()

    def give(self, head: Head) -> bool:
        """Give a hint to the claim that has waited longest; return False if none waits."""
        while True:
            try:
                claim = self.waiting.popleft()
            except IndexError:
                return False
            claim.hint_taken = True
            claim.given = head
            claim.wake()
            if not claim.left_line:
                return True

    def fail(self, error: FFError) -> None:
        """Let the wait of every claim end with *error*."""
        while True:
            try:
                claim = self.waiting.popleft()
            except IndexError:
                return
            # The server may have taken a hint out of its queue.
            claim.hint_taken = claim.hint_taken or error.outcome is Outcome.UNKNOWN
            claim.failure = copy.copy(error)
            claim.wake()

    def lead(self, claim: Waiter) -> bool:
        """Return whether *claim* is the one whose thread waits on the server for all."""
        leader = self._seat.setdefault("leader", claim)
        now = time.monotonic()
        if leader is not claim:
            if not (leader.left_line or leader.abandoned or now > self._lead_until):
                return False
            # An interrupt has kept it from resigning.
            self._seat["leader"] = claim
        self._lead_until = now + _LEAD_S
        return True

    def resign(self, claim: Waiter) -> None:
        """Let the claim that has waited longest lead, if *claim* was the leader or there is none."""
        if self._seat.get("leader") is claim:
            self._seat.pop("leader", None)
        if not self._seat:
            with contextlib.suppress(IndexError):
                self.waiting[0].wake()
