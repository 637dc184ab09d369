"""Times of lease renewals, pushes about leases, and the errors that mean a lost lease."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol

from ff_fast import keys
from ff_fast._log import say, say_seldom
from ff_fast.errors import ExecutionNotActive, ExecutionNotFound, FFError, LeaseExpired

if TYPE_CHECKING:
    from collections.abc import Callable

RENEW_AT = 1 / 3
"""Share of a lease after which it is renewed; the rest leaves time for failed renewals."""

KEEP_CHANNEL_S = 60.0
"""How long a backend listens on after it has kept its last lease of a partition, in seconds, so that short executions do
not subscribe one by one. So long also does it wait after a refused subscription."""

LISTEN_AGAIN_S = 5.0
"""Pause, in seconds, after which a backend listens again if the server could not be reached."""

_LONGEST_PERIOD_S = 3_600.0

# Between two looks for channels that are to be left or tried again.
_SOONEST_LOOK_S = 0.1

_MOST_UNKNOWN = 64
"""Pushes about leases that are not kept, or not yet: so many are remembered for each partition."""


def is_ended_by_plan(error: FFError) -> bool:
    """Return whether a lease is gone because somebody has cancelled the execution, or its time was over."""
    ended = isinstance(error, ExecutionNotActive) and error.state in ("cancelled", "expired")
    return ended or isinstance(error, ExecutionNotFound)


def say_lost(
    error: FFError, execution_id: str, attempt_index: int, worker_id: str | None = None
) -> None:
    """Say that a lease is lost, once whoever finds it out."""
    say_seldom(
        logging.WARNING,
        "lease",
        # An outage loses all leases of a process.
        error.code,
        "The lease of attempt %d of execution %s is lost: %s What its worker still does is discarded.",
        attempt_index,
        execution_id,
        error,
        execution_id=execution_id,
        attempt_index=attempt_index,
        worker_id=worker_id,
    )


def is_lease_lost(error: FFError) -> bool:
    """Return whether an error means that another worker owns the execution, that it has ended, or that the claim is lost."""
    return error.code in (
        "stale_owner",
        "state_lost",
        "lease_expired",
        "execution_not_active",
        "execution_not_found",
        "stream_closed",
        "suspended",
        "writer_superseded",
    )


class LeaseClock:
    """Times of a lease's renewals by the local clock. The server's clock decides when the lease lapses.

    Attributes:
        wait_s: Seconds until the next renewal.
        held_until: When the lease lapses unless it is renewed, in monotonic time.
    """

    __slots__ = ("_period_s", "_sent_at", "_ttl_s", "held_until", "wait_s")

    def __init__(self, lease_ttl_ms: int, *, soon: bool = False) -> None:
        self._ttl_s = lease_ttl_ms / 1000
        self._period_s = min(self._ttl_s * RENEW_AT, _LONGEST_PERIOD_S)
        self._sent_at = time.monotonic()
        self.wait_s = 0.0 if soon else self._period_s
        self.held_until = self._sent_at + self._ttl_s

    @property
    def held(self) -> bool:
        return time.monotonic() < self.held_until

    def sending(self) -> None:
        """Note the time before a renewal is sent: the renewed lease begins no earlier."""
        self._sent_at = time.monotonic()

    def renewed(self) -> None:
        self.wait_s = self._period_s
        self.held_until = self._sent_at + self._ttl_s

    def failed(self, error: FFError) -> FFError | None:
        """Return the error with which the lease is lost, or None to retry the failed renewal."""
        if is_lease_lost(error) or not error.retryable:
            return error
        if not self.held:
            return lapsed()
        self.wait_s = self._period_s / 4
        return None


def lapsed() -> FFError:
    """Return the error of a lease that has run out by the local clock."""
    return LeaseExpired("The lease could not be renewed before it lapsed.")


class KeeperState:
    """What a lease keeper of either shell knows.

    Args:
        clock: Times of the renewals.
        fail: Fails the writers of the lease; called by whoever finds out that it is lost, so perhaps more than once.
    """

    if TYPE_CHECKING:

        def _tell_lost(self, error: FFError) -> None:
            """Let the keeper tell of the loss."""

    def __init__(self, clock: LeaseClock, fail: Callable[[FFError], None]) -> None:
        self.error: FFError | None = None
        self.cancel_requested = False
        self._clock = clock
        self._fail = fail
        self._stopped = False
        # Two may find out at once; there is one loss.
        self._finding = threading.Lock()
        # The end of the lease that somebody has seen to have come, who may not fail the writers; in monotonic time.
        self._seen_end = 0.0

    @property
    def held(self) -> bool:
        """Whether the lease is held, as far as this process knows. One that is seen to have lapsed stays lost."""
        while self.error is None:
            end = self._clock.held_until
            if time.monotonic() < end:
                return True
            if self._may_look:
                self._lose(lapsed())
                return False
            self._seen_end = end
            # Where it was renewed meanwhile, nobody may have heard of this look.
            if self._clock.held_until == end:
                return False
        return False

    def _renewed(self) -> bool:
        """Note that the server has renewed the lease; return False if somebody has seen it lapse before."""
        end = self._clock.held_until
        self._clock.renewed()
        # Whoever looks notes the end first, and then looks again.
        if self._seen_end == end:
            self._lose(lapsed())
        return self.error is None

    @property
    def _may_look(self) -> bool:
        """Whether whoever looks may fail the writers, too."""
        return True

    def _lose(self, error: FFError | None) -> None:
        """Take the lease as lost with *error*, unless that is None."""
        # A renewal that fails after stop() is no loss: the execution has usually ended.
        if error is None or self._stopped or self.error is not None:
            return
        # Before: whoever sees the loss, on whichever thread, finds no writer that still takes frames.
        self._fail(error)
        with self._finding:
            if self.error is not None:
                return
            self.error = error
        self._tell_lost(error)


# -- pushes ------------------------------------------------------------------------------------------------------------


def told_as(execution_id: str, attempt_index: int) -> tuple[bytes, bytes]:
    """Return the channel of the pushes about the leases of an attempt, and its name in them."""
    name = f"{execution_id} {attempt_index}".encode("ascii")
    return keys.leases_channel(keys.slot_tag_of(execution_id)), name


class Keeper(Protocol):
    """A keeper of one lease. Its methods return at once."""

    def _ask_to_stop(self) -> None:
        """Note that a cancellation is requested."""

    def _renew_soon(self) -> None:
        """Renew the lease now: the answer says whether it is lost, and whether a cancellation is requested."""

    def _abandon(self, error: FFError) -> None:
        """Lose the lease with *error*, since the backend is closed."""


class _Channels(Protocol):
    """The hub of a shell."""

    def listen(self, channel: bytes, listener: _Partition, /) -> None: ...
    def unlisten(self, channel: bytes, listener: _Partition, /) -> None: ...


class _Timer(Protocol):
    def cancel(self) -> None: ...


class _Partition:
    """The kept leases of one partition, which listens to their channel.

    Attributes:
        keepers: By execution and attempt, as a push names them. The tuples are replaced, never changed: pushes come on
            the hub's thread.
        unknown: Leases that pushes were about before their keepers were there. A claim takes effect before its answer
            arrives, and a push may overtake the answer.
        listening: Whether the hub knows this partition.
        idle_since: When its last lease was given up, in monotonic time.
    """

    __slots__ = ("channel", "idle_since", "keepers", "listening", "on_failed", "unknown")

    def __init__(self, channel: bytes, on_failed: Callable[[_Partition, FFError], None]) -> None:
        self.channel = channel
        self.on_failed = on_failed
        self.keepers: dict[bytes, tuple[Keeper, ...]] = {}
        self.unknown: deque[bytes] = deque(maxlen=_MOST_UNKNOWN)
        self.listening = False
        self.idle_since = 0.0

    def told(self, message: bytes, /) -> None:
        what, _, lease = message.partition(b" ")
        if lease not in self.keepers:
            self.unknown.append(lease)
        # Asked again, as another thread may have added it before it was noted as unknown.
        for keeper in self.keepers.get(lease, ()):
            if what == b"cancel":
                keeper._ask_to_stop()
            else:
                keeper._renew_soon()

    def doubt(self, subscribed: bool, /) -> None:
        if subscribed:
            for keepers in list(self.keepers.values()):
                for keeper in keepers:
                    keeper._renew_soon()

    def failed(self, error: FFError, /) -> None:
        self.on_failed(self, error)


class KeptLeases:
    """The leases that a backend keeps, and the channels on which it hears what befalls them.

    Renewals tell the same later, so nothing depends on a push: one that was lost delays. Of a loss a push only says that
    a renewal will tell; a request to stop it is itself, so whoever may publish in the channel may cancel.

    Args:
        hub: The hub of the shell.
        later: Calls a function after some seconds, from anywhere.
    """

    def __init__(
        self,
        hub: _Channels,
        later: Callable[[float, Callable[[], None]], _Timer],
    ) -> None:
        self._hub = hub
        self._later = later
        # Reentrant: a hub may answer within listen().
        self._lock = threading.RLock()
        self._partitions: dict[bytes, _Partition] = {}
        self._timer: _Timer | None = None
        self._timer_at = 0.0
        self._deaf_until = 0.0
        self._closed = False

    def add(self, channel: bytes, lease: bytes, keeper: Keeper) -> None:
        """Let *keeper* hear the pushes about *lease*: ``<execution id> <attempt index>``."""
        with self._lock:
            found = self._partitions.get(channel)
            if found is None:
                found = self._partitions[channel] = _Partition(channel, self._failed)
            found.keepers[lease] = (*found.keepers.get(lease, ()), keeper)
            if not found.listening:
                self._listen(found)
            elif lease in found.unknown:
                keeper._renew_soon()

    def remove(self, channel: bytes, lease: bytes, keeper: Keeper) -> None:
        """Forget *keeper*; doing so again changes nothing."""
        with self._lock:
            found = self._partitions.get(channel)
            if found is None:
                return
            left = tuple(each for each in found.keepers.get(lease, ()) if each is not keeper)
            if left:
                found.keepers[lease] = left
                return
            found.keepers.pop(lease, None)
            if not found.keepers:
                found.idle_since = time.monotonic()
                self._look_later(KEEP_CHANNEL_S)

    def ask_to_stop(self, execution_id: str, attempt_index: int) -> None:
        """Tell the keepers of an attempt that a cancellation is requested, as an answer of the server has said."""
        channel, lease = told_as(execution_id, attempt_index)
        found = self._partitions.get(channel)
        if found is not None:
            for keeper in found.keepers.get(lease, ()):
                keeper._ask_to_stop()

    def close(self) -> list[Keeper]:
        """Listen no more, and return the keepers, which the shell abandons when its connections are closed."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None
            partitions = list(self._partitions.values())
            self._partitions.clear()
        return [
            each for found in partitions for keepers in found.keepers.values() for each in keepers
        ]

    def _listen(self, found: _Partition) -> None:
        if time.monotonic() >= self._deaf_until and not self._closed:
            # Set before, since the hub may fail it within.
            found.listening = True
            self._hub.listen(found.channel, found)

    def _failed(self, found: _Partition, error: FFError) -> None:
        with self._lock:
            found.listening = False
            if self._closed:
                return
            pause_s = LISTEN_AGAIN_S if error.retryable else KEEP_CHANNEL_S
            now = time.monotonic()
            if now >= self._deaf_until:
                # It fails for all partitions at once.
                self._deaf_until = now + pause_s
                if not error.retryable:
                    # An outage needs no word of it: the renewals meet it too.
                    say(
                        logging.WARNING,
                        "Workers hear of cancellations and lost leases with their next renewal only: %s",
                        error,
                    )
            self._look_later(pause_s)

    def _look_later(self, seconds: float) -> None:
        at = time.monotonic() + seconds
        if self._timer is not None:
            if self._timer_at <= at:
                return
            self._timer.cancel()
        self._timer_at = at
        self._timer = self._later(seconds, self._look)

    def _look(self) -> None:
        """Leave the channels that were not needed for a while, and try those again that failed."""
        with self._lock:
            self._timer = None
            now = time.monotonic()
            before = now - KEEP_CHANNEL_S
            for found in list(self._partitions.values()):
                if not found.keepers and found.idle_since <= before:
                    del self._partitions[found.channel]
                    if found.listening:
                        self._hub.unlisten(found.channel, found)
                elif not found.listening:
                    self._listen(found)
            left = self._partitions.values()
            if not all(each.listening for each in left):
                self._look_later(max(self._deaf_until - now, _SOONEST_LOOK_S))
            if not all(each.keepers for each in left):
                self._look_later(KEEP_CHANNEL_S)
