"""Suspension: waitpoints, conditions, and signals."""

from __future__ import annotations

import enum
import re
from hmac import compare_digest
from typing import TYPE_CHECKING, Literal

from ff_fast import keys
from ff_fast.errors import MAX_INT, InvalidInput, InvalidType, check_int

from ._value import Value, check_type, payload_bytes, set_field

if TYPE_CHECKING:
    from .handle import Handle

SignalEffect = Literal[
    "resume_condition_satisfied",
    "appended_to_waitpoint",
    "appended_to_waitpoint_duplicate",
    "buffered_for_pending_waitpoint",
    "signal_ignored_matcher_failed",
    "signal_ignored_not_in_condition",
]
"""Effect of a signal.

``resume_condition_satisfied``: it was the last one needed. ``appended_to_waitpoint``: more are needed.
``appended_to_waitpoint_duplicate``: the waitpoint has this signal already. ``buffered_for_pending_waitpoint``: it
counts when the execution suspends on the waitpoint. The others: it changed nothing.
"""


# -- waitpoints and their tokens -------------------------------------------------------------------


class WaitpointKind(enum.Enum):
    """Field of a signal that a waitpoint matches."""

    SIGNAL_NAME = "signal_name"
    CORRELATION_ID = "correlation_id"
    EXTERNAL = "external"


class WaitpointHmac:
    """Bearer token of a waitpoint, ``<kid>:<40 lower-case hex digits>``.

    Printing it in any way shows the key id alone; :meth:`reveal` returns the text.  Comparison
    takes the same time wherever two tokens differ.

    Raises:
        InvalidInput: The text has another shape.
    """

    __slots__ = ("_text",)

    def __init__(self, token: str) -> None:
        check_type("token", token, str)
        if re.fullmatch(_WAITPOINT_HMAC, token) is None:
            raise InvalidInput("A waitpoint token must be '<kid>:' and 40 lower-case hex digits.")
        self._text = token

    def reveal(self) -> str:
        """Return the token itself; for sending it, never for showing it."""
        return self._text

    as_str = reveal

    @property
    def kid(self) -> str:
        """Id of the key that signed the token; not a secret."""
        return self._text.partition(":")[0]

    def __str__(self) -> str:
        return f"{self.kid}:<REDACTED:len=40>"

    def __repr__(self) -> str:
        return f"WaitpointHmac('{self}')"

    def __format__(self, format_spec: str) -> str:
        return format(str(self), format_spec)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, WaitpointHmac):
            return NotImplemented
        return compare_digest(self._text.encode("ascii"), other._text.encode("ascii"))

    def __hash__(self) -> int:
        return hash((WaitpointHmac, self._text))


_WAITPOINT_HMAC = keys.OPAQUE_ID + r":[0-9a-f]{40}"


class PendingWaitpoint(Value):
    """A waitpoint that was created before the execution suspends on it."""

    waitpoint_id: str
    hmac_token: WaitpointHmac

    def __post_init__(self) -> None:
        set_field(self, "waitpoint_id", keys.canonical_uuid("waitpoint_id", self.waitpoint_id))
        check_type("hmac_token", self.hmac_token, WaitpointHmac)


class WaitpointSpec(Value):
    """One waitpoint of a suspension.

    Attributes:
        kind: Field of a signal to match.
        matcher: The name or id to match.
        hmac_token: Its token.
    """

    kind: WaitpointKind
    matcher: bytes
    hmac_token: WaitpointHmac

    def __post_init__(self) -> None:
        check_type("kind", self.kind, WaitpointKind)
        set_field(self, "matcher", payload_bytes(self.matcher, "matcher"))
        check_type("hmac_token", self.hmac_token, WaitpointHmac)


# -- conditions ------------------------------------------------------------------------------------


class CountKind(enum.Enum):
    """Which contributions to a condition count as distinct."""

    DISTINCT_MEMBERS = "leaf"
    DISTINCT_WAITPOINTS = "waitpoint"
    DISTINCT_SIGNALS = "signal"
    DISTINCT_SOURCES = "source"


class ResumeCondition(Value):
    """A condition on signals for resuming an execution, made by :meth:`any`, :meth:`all` and :meth:`count`.

    Conditions nest, at most 16 levels and 256 members in all. Each node counts for itself: a signal that matches two
    nodes contributes to both.

    Attributes:
        members: Waitpoints and conditions.
        needed: Number of distinct contributions that meet it.
        distinct: Which contributions of its waitpoints count as distinct; each inner condition counts once.
    """

    members: tuple[WaitpointSpec | ResumeCondition, ...]
    needed: int
    distinct: CountKind = CountKind.DISTINCT_MEMBERS

    def __post_init__(self) -> None:
        check_type("members", self.members, tuple)
        if not self.members:
            raise InvalidInput("A condition needs at least one member.")
        for member in self.members:
            if not isinstance(member, (WaitpointSpec, ResumeCondition)):
                raise InvalidType(
                    "A member of a condition is a WaitpointSpec or a ResumeCondition."
                )
        check_int("needed", self.needed, 1, 10_000)
        check_type("distinct", self.distinct, CountKind)
        reachable = self._reachable()
        if reachable is not None and self.needed > reachable:
            raise InvalidInput(
                f"The condition needs {self.needed} contributions and can get {reachable}."
            )
        levels, members = self._size()
        if levels > 16 or members > 256:
            raise InvalidInput("A condition has at most 16 levels and 256 members in all.")

    def _reachable(self) -> int | None:
        """Return the largest possible number of distinct contributions; None for no limit."""
        leaves = [member for member in self.members if isinstance(member, WaitpointSpec)]
        nodes = len(self.members) - len(leaves)
        if not leaves or self.distinct is CountKind.DISTINCT_MEMBERS:
            return len(leaves) + nodes
        if self.distinct is CountKind.DISTINCT_WAITPOINTS:
            return len({leaf.hmac_token for leaf in leaves}) + nodes
        return None

    def _size(self) -> tuple[int, int]:
        levels, members = 1, len(self.members)
        for member in self.members:
            if isinstance(member, ResumeCondition):
                inner = member._size()  # noqa: SLF001 - its own
                levels, members = max(levels, inner[0] + 1), members + inner[1]
        return levels, members

    @classmethod
    def any(cls, *members: WaitpointSpec | ResumeCondition) -> ResumeCondition:
        """Return the condition that one member meets."""
        return cls(members, 1)

    @classmethod
    def all(cls, *members: WaitpointSpec | ResumeCondition) -> ResumeCondition:
        """Return the condition that all members together meet."""
        return cls(members, max(len(members), 1))

    @classmethod
    def count(
        cls,
        needed: int,
        *members: WaitpointSpec | ResumeCondition,
        distinct: CountKind = CountKind.DISTINCT_WAITPOINTS,
    ) -> ResumeCondition:
        """Return the condition that *needed* distinct contributions meet."""
        return cls(members, needed, distinct)


class TimeoutBehavior(enum.Enum):
    """Action at the timeout of a suspension."""

    FAIL = "fail"
    CANCEL = "cancel"
    EXPIRE = "expire"
    AUTO_RESUME = "auto_resume"
    ESCALATE = "escalate"


class SuspendOutcome(Value):
    """Outcome of `suspend`.

    Attributes:
        suspension_id: Its id.
        handle: Handle of the suspended execution, of kind ``SUSPENDED``; with ``already_satisfied`` the caller's own
            handle, whose lease continues.
        already_satisfied: Whether earlier signals had met the condition, so that nothing was suspended.
    """

    suspension_id: str
    handle: Handle
    already_satisfied: bool


# -- signals ---------------------------------------------------------------------------------------


class ResumeSignal(Value):
    """A signal that took part in resuming an execution.

    Attributes:
        signal_id: Id of the signal.
        signal_name: Its name.
        signal_category: Its category.
        source_type: Kind of its sender.
        source_identity: Name of its sender.
        correlation_id: Correlation id; may be empty.
        accepted_at: When the server accepted it, Unix milliseconds.
        payload: Its payload; None without one.
    """

    signal_id: str
    signal_name: str
    signal_category: str
    source_type: str
    source_identity: str
    correlation_id: str
    accepted_at: int
    payload: bytes | None = None

    def __post_init__(self) -> None:
        set_field(self, "signal_id", keys.canonical_uuid("signal_id", self.signal_id))
        for name in (
            "signal_name",
            "signal_category",
            "source_type",
            "source_identity",
            "correlation_id",
        ):
            check_type(name, getattr(self, name), str)
        check_int("accepted_at", self.accepted_at, 0, MAX_INT)
        if self.payload is not None:
            set_field(self, "payload", payload_bytes(self.payload))


class SignalOutcome(Value):
    """Outcome of `deliver_signal`.

    Attributes:
        signal_id: Id of the signal; for a duplicate, the id of the earlier one.
        effect: Its effect; see :data:`SignalEffect`.
        duplicate: Whether the waitpoint has a signal with this id or idempotency key already.
    """

    signal_id: str
    effect: SignalEffect
    duplicate: bool = False
