"""All errors of ff_fast.

The root, :class:`FFError`, has three facts for the caller: ``code`` (stable text, for logs and for
branching), ``retryable`` (the same call may pass later) and ``outcome`` (whether the server may have
applied the call).  Each class has a code of its own, so the class tree is also the table from code to
class.

A class also derives from Python's exception for the same event: ``except TimeoutError`` catches
:class:`DeadlineExceeded`, ``except LookupError`` catches :class:`ExecutionNotFound` and its kin, and
``except OSError`` catches every error of a connection.

No message holds a payload, a lease id, a token or a password. The texts of the server and of redis-py
are never passed on, since they may quote the failed command.
"""

# ruff: noqa: N818 - names say the event; a suffix Error would repeat the base class.

from __future__ import annotations

import enum
import re
from typing import TYPE_CHECKING, Literal, cast, get_args

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

ExecutionState = Literal[
    "waiting",
    "delayed",
    "waiting_children",
    "active",
    "suspended",
    "completed",
    "failed",
    "cancelled",
    "expired",
]
"""State of an execution; the last four are final."""

CompletionOutcome = Literal["success", "failed", "cancelled", "expired"]
"""How an execution ended, as its completion says."""


class Outcome(enum.Enum):
    """Whether the server may have applied the call that failed.

    ``NOT_APPLIED``: nothing was written.  ``UNKNOWN``: the call may have been applied; read the
    state, or repeat the call where its documentation says that repeating is safe.  ``APPLIED``: all of
    it was written, and what was asked for beyond that was not reached.
    """

    NOT_APPLIED = "not_applied"
    UNKNOWN = "unknown"
    APPLIED = "applied"


MAX_INT = 2**53 - 1
"""Largest integer that the server's Lua keeps exactly."""

_classes: dict[str, type[FFError]] = {}


class FFError(Exception):
    """Root of all errors of this library.

    Args:
        message: One sentence: the event, and the remedy.  None takes the sentence of the class.

    Attributes:
        code: Stable name of the error, in snake case.
        retryable: True when the same call may pass later without any change.
        outcome: Whether the call may have been applied.
        unstored: Frames that a failed writer had accepted and the server has not stored, oldest first.
            It holds payloads: ``str``, ``repr`` and pickles leave it out, a copy keeps it.
    """

    code: str = "error"
    retryable: bool = False
    outcome: Outcome = Outcome.NOT_APPLIED
    unstored: tuple[object, ...] = ()
    _sentence: str = "The call failed."

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        code = cls.__dict__.get("code")
        if code is None:
            return
        taken = _classes.setdefault(code, cls)
        if taken is not cls:
            raise TypeError(f"error code {code!r} belongs to {taken.__name__}")

    def __init__(self, message: str | None = None) -> None:
        super().__init__(self._sentence if message is None else message)

    def __str__(self) -> str:
        # OSError's own str() shows errno and strerror, and drops the sentence.
        return str(self.args[0]) if self.args else ""

    def __reduce__(self) -> tuple[Callable[..., FFError], tuple[object, ...]]:
        return _rebuild, (type(self), self.args, self._state(with_unstored=False))

    def __copy__(self) -> FFError:
        twin = _rebuild(type(self), self.args, self._state(with_unstored=True))
        twin.__cause__ = self.__cause__
        return twin

    def __deepcopy__(self, memo: dict[int, object]) -> FFError:
        # All attributes are immutable, so a shallow copy is enough.
        return self.__copy__()

    def _state(self, *, with_unstored: bool) -> dict[str, object]:
        state = dict(self.__dict__)
        if not with_unstored:
            state.pop("unstored", None)
        if isinstance(self, OSError):
            # OSError keeps these two outside __dict__.
            state |= {"errno": self.errno, "strerror": self.strerror}
        return state

    @classmethod
    def _from_details(cls, details: Sequence[bytes]) -> FFError:  # noqa: ARG003
        """Build the error from the details of a function's answer; ``ValueError`` if they are bad."""
        return cls()


_classes[FFError.code] = FFError


def make_unknown(error: FFError, why: str) -> None:
    """Give *error* the outcome ``UNKNOWN``, and its message the sentence *why*, unless its outcome is unknown already."""
    if error.outcome is Outcome.NOT_APPLIED:
        error.outcome = Outcome.UNKNOWN
        error.args = (f"{error} {why}", *error.args[1:])


def _rebuild(cls: type[FFError], args: tuple[object, ...], state: dict[str, object]) -> FFError:
    # __init__ is not called: typed errors take other arguments than their message.
    error = cls.__new__(cls)
    error.args = args
    for name, value in state.items():
        setattr(error, name, value)
    return error


def _whole_number(text: bytes) -> int:
    # int() alone would accept b" 5 ", b"+5" and b"1_000".
    if not re.fullmatch(rb"-?[0-9]{1,20}", text):
        raise ValueError("not a whole number")
    return int(text)


def _two_numbers(details: Sequence[bytes]) -> tuple[int, int]:
    first, second = details[:2]
    return _whole_number(first), _whole_number(second)


# -- refused before anything is sent -------------------------------------------------------------


class InvalidInput(FFError, ValueError):
    """An argument has a value that the library does not accept; the message names the accepted values."""

    code = "invalid_input"
    _sentence = "An argument has a value that is not accepted; see the documentation of the call."

    @classmethod
    def _from_details(cls, details: Sequence[bytes]) -> FFError:
        # Only a plain argument name is quoted; any other text could hold the caller's data.
        if details and re.fullmatch(rb"[a-z][a-z0-9_]{0,63}", details[0]):
            return cls(f"The server functions refused the value of {details[0].decode('ascii')}.")
        return cls()


class InvalidType(InvalidInput, TypeError):
    """An argument has a type that the library does not accept; nothing is converted silently."""

    code = "invalid_type"
    _sentence = "An argument has a type that is not accepted; see the documentation of the call."


class InvalidId(InvalidInput):
    """An execution id, lane, worker name, namespace or other identifier is malformed."""

    code = "invalid_id"
    _sentence = "An identifier is malformed; pass it exactly as the library returned it."


class InvalidPayload(InvalidInput):
    """A payload is not accepted, for instance because it does not fit its mode."""

    code = "invalid_payload"
    _sentence = "The payload is not accepted; see the documentation of the frame's mode."


# The server functions store no larger frame, whatever a backend is configured with.
_LARGEST_FRAME = 1 << 20


class PayloadTooLarge(InvalidPayload):
    """A payload is larger than the limit.

    Args:
        limit: Largest size accepted, in bytes.
        size: Size that was offered, in bytes.
        what: What is too large: ``frame``, ``patch``, ``result``, ``payload of an execution``, ``payload of a signal``,
            ``message`` or ``detail``.
    """

    code = "payload_too_large"

    def __init__(self, limit: int, size: int, what: str = "frame") -> None:
        advice = "store it elsewhere and pass a reference"
        if what == "message":
            advice = "shorten it"
        elif what in ("frame", "patch"):
            if size <= _LARGEST_FRAME:
                advice = "raise max_payload_bytes of the backend's configuration"
            advice = f"split it, or {advice}"
        super().__init__(f"The {what} has {size} bytes and the limit is {limit}; {advice}.")
        self.limit = limit
        self.size = size
        self.what = what

    @classmethod
    def _from_details(cls, details: Sequence[bytes]) -> FFError:
        what = {b"signal": "payload of a signal"}.get(b"".join(details[2:3]), "frame")
        return cls(*_two_numbers(details), what)


class InvalidSequence(InvalidInput):
    """A frame's sequence is not a whole number from 1 to 2^53-1, or cannot follow the last one."""

    code = "invalid_sequence"
    _sentence = "The sequence must be a whole number from 1 to 9007199254740991."


class InvalidPatch(InvalidPayload):
    """A summary patch is not valid JSON, is not exact, or does not fit the document."""

    code = "invalid_patch"
    _sentence = "The patch cannot be applied to the summary; send valid JSON that fits it."


class InvalidCursor(InvalidInput):
    """A cursor of a stream has another form, or belongs to another attempt."""

    code = "invalid_cursor"
    _sentence = "A cursor must be None, 'start', '0-0', the cursor of an item or an entry id '<milliseconds>-<sequence>'."


class InvalidCapabilities(InvalidInput):
    """A capability token is malformed, or there are too many of them."""

    code = "invalid_capabilities"
    _sentence = (
        "Capabilities must be at most 256 tokens without commas, blanks or control characters."
    )


class InvalidHandle(InvalidInput):
    """The bytes of a handle cannot be decoded."""

    code = "corrupt_handle"
    _sentence = "The handle's bytes are damaged; use the handle that claim returned."


class HandleFromOtherBackend(InvalidInput):
    """The handle was made by another kind of backend."""

    code = "handle_from_other_backend"
    _sentence = "The handle was made by another kind of backend; use it with the one that made it."


class WriterClosed(FFError):
    """The writer was closed; open a new one to write more."""

    code = "writer_closed"
    _sentence = "The writer is closed; open a new one to write more frames."


class Overloaded(FFError):
    """Too many bytes are unacknowledged; the frame was not accepted.  Drain, then write again."""

    code = "overloaded"
    retryable = True
    _sentence = "Too much is waiting to be acknowledged; call drain() and write the frame again."


class WrongLoop(FFError):
    """An asyncio object was used from another event loop than the one it belongs to."""

    code = "wrong_loop"
    _sentence = "The object belongs to another event loop; use it on the loop that made it."


class ForkedClient(FFError):
    """A client made before ``fork`` was used in the child process."""

    code = "forked_client"
    _sentence = "The client was made before this process was forked; connect again in the child."


class LibraryMismatch(FFError):
    """The server's function library has another contract than this one.

    It is a newer one, or an older one that this client does not load: see `BackendConfig.load_library`.

    Args:
        server: Contract of the server's library.
        client: Contract of this library.
    """

    code = "library_mismatch"

    def __init__(self, server: object, client: object) -> None:
        super().__init__(
            f"The server holds contract {server} of the function library and this ff_fast speaks"
            f" contract {client}; use the release of ff_fast that the workers of the deployment use, or another server."
        )
        self.server = server
        self.client = client


class DeploymentMismatch(FFError):
    """The deployment on the server has another partition count than this backend.

    Args:
        server: Partition count stored on the server.
        client: Partition count of this backend.
    """

    code = "deployment_mismatch"

    def __init__(self, server: int, client: int) -> None:
        super().__init__(
            f"The deployment on this server has {server} partitions and this backend uses {client};"
            f" connect with partitions={server}, or without the option."
        )
        self.server = server
        self.client = client


class MissingDependency(FFError, ImportError):
    """An optional package is not installed; the message names the extra that brings it."""

    code = "missing_dependency"
    _sentence = "An optional dependency is missing; install the extra that the call needs."


def check_int(
    name: str, value: object, low: int, high: int, error: type[InvalidInput] = InvalidInput
) -> int:
    """Return *value* if it is an ``int`` from *low* to *high*; nothing is converted.

    Raises:
        InvalidType: The value is not an ``int`` (``bool``, ``float`` and text are not).
        InvalidInput: The value is out of range.  Another *error* is raised in both cases.
    """
    if type(value) is not int:
        cls = InvalidType if error is InvalidInput else error
        raise cls(f"{name} must be an int, not {type(value).__name__}.")
    if not low <= value <= high:
        raise error(f"{name} must be a whole number from {low} to {high}.")
    return value


# -- answered by the server functions; nothing was written ---------------------------------------


class ExecutionNotFound(FFError, LookupError):
    """No execution with this id exists on this server."""

    code = "execution_not_found"
    _sentence = "No execution with this id exists here; it was removed after its end, or the server has lost it."


class StaleOwner(FFError):
    """Another attempt, lease or epoch owns the execution now: drop the work."""

    code = "stale_owner"
    _sentence = "Another worker owns this execution now; drop the work."


class StateLost(FFError):
    """The server has lost the claim or the writer that it had acknowledged, for instance in a failover.

    Nobody else has taken the execution: it is as it was before the claim, or before the writer was opened.
    """

    code = "state_lost"
    _sentence = (
        "The server has lost a claim or writer that it had acknowledged, as after a failover;"
        " drop the work, and claim the execution again."
    )


class ExecutionSuspended(FFError):
    """The execution is suspended; it accepts frames again after it was resumed and claimed."""

    code = "suspended"
    _sentence = "The execution is suspended; claim it again after it was resumed."


class StreamClosed(FFError):
    """The attempt's stream has ended and accepts no more frames."""

    code = "stream_closed"
    _sentence = "The stream of this attempt has ended; it accepts no more frames."


class LeaseExpired(FFError):
    """The lease has expired by the server's clock: drop the work, and renew earlier next time."""

    code = "lease_expired"
    _sentence = "The lease has expired; drop the work and renew earlier next time."


class WriterSuperseded(FFError):
    """Another writer was opened for the same attempt; this one may not append any more."""

    code = "writer_superseded"
    _sentence = "A newer writer was opened for this attempt; use that one."


class SequenceGap(FFError):
    """Frames are missing before the next one: the caller's, or acknowledged ones that the server has lost.

    Args:
        expected: Next sequence of the stream; where the newest frame is another one, the sequence of that frame.
        got: Next sequence of the caller.
    """

    code = "sequence_gap"

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(
            f"The stream expects sequence {expected} and got {got}; the frames from {expected} on were not sent, or"
            " the server has lost them, as after a failover."
        )
        self.expected = expected
        self.got = got

    @classmethod
    def _from_details(cls, details: Sequence[bytes]) -> FFError:
        return cls(*_two_numbers(details))


class FramesLost(FFError):
    """The server has lost acknowledged frames in a failover, and the writer did not keep them any more.

    The stream tells its readers, by a ``Gap`` with the reason ``lost``, and goes on behind them. The call is told of
    once: a call that was to release the lease has not done so, and may be made again; a writer goes on.

    Args:
        first: Sequence of the first frame that is lost.
        last: Sequence of the last one.
    """

    code = "frames_lost"

    def __init__(self, first: int, last: int) -> None:
        super().__init__(
            f"The server has lost the frames {first} to {last}, which it had acknowledged, and the stream says so to its"
            " readers; call again to go on without them."
        )
        self.first = first
        self.last = last


class SummaryConflict(FFError):
    """The summary has another version than the base of the patches.

    Args:
        expected: Version on the server.
        got: Base version of the patches.
    """

    code = "summary_conflict"
    retryable = True

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(
            f"The summary is at version {expected} and the patches were made for version {got};"
            " read the summary again and repeat."
        )
        self.expected = expected
        self.got = got

    @classmethod
    def _from_details(cls, details: Sequence[bytes]) -> FFError:
        return cls(*_two_numbers(details))


class ExecutionNotActive(FFError):
    """The call needs an active execution.

    Args:
        state: Its state; None if the server did not name it.
        terminal_outcome: How it ended; None while it has not ended.
    """

    code = "execution_not_active"
    state: ExecutionState | None
    terminal_outcome: CompletionOutcome | None

    def __init__(
        self,
        state: ExecutionState | None = None,
        terminal_outcome: CompletionOutcome | None = None,
    ) -> None:
        where = f" but {state}" if state else ""
        how = f" ({terminal_outcome})" if terminal_outcome else ""
        super().__init__(
            f"The execution is not active{where}{how}; read its state before retrying."
        )
        self.state = state
        self.terminal_outcome = terminal_outcome

    @classmethod
    def _from_details(cls, details: Sequence[bytes]) -> FFError:
        state, outcome = [*(detail.decode("ascii") for detail in details[:2]), "", ""][:2]
        # A newer library on the server may use more words.
        return cls(
            cast("ExecutionState", state) if state in get_args(ExecutionState) else None,
            cast("CompletionOutcome", outcome) if outcome in get_args(CompletionOutcome) else None,
        )


def _word(text: str) -> str:
    """Return *text* if it is one plain word of the state vocabulary, else nothing."""
    return text if re.fullmatch(r"[a-z][a-z0-9_]{0,63}", text) else ""


_SHOWN_CHARACTERS = 200


class _Ended(FFError):
    """An execution that somebody waits for has ended without a result.

    Args:
        reason: Why it ended, in the words of whoever ended it; None if nobody said.

    Attributes:
        reason: The same text, whole; the message shows its beginning.
    """

    _event = "The execution has ended without a result"

    def __init__(self, reason: str | None = None) -> None:
        super().__init__(f"{self._event}{_shown(reason)}; describe() and its history tell more.")
        self.reason = reason


def _shown(reason: str | None) -> str:
    """Return the beginning of *reason* on one line, in brackets."""
    if not reason:
        return ""
    line = " ".join(reason[: _SHOWN_CHARACTERS + 1].split())
    text = "".join(char if char.isprintable() else "?" for char in line)
    return f" ({text[:_SHOWN_CHARACTERS]}{'...' if len(reason) > _SHOWN_CHARACTERS else ''})"


class ExecutionFailed(_Ended):
    """The execution has failed, and is not retried.

    Args:
        reason: Message of its last failure; None if it had none.
        failure_class: Class of the failure, as ``permanent``; None if it is not known.

    Attributes:
        reason: The same text, whole; the message shows its beginning.
        failure_class: The same word.
    """

    code = "execution_failed"
    _event = "The execution has failed"

    def __init__(self, reason: str | None = None, failure_class: str | None = None) -> None:
        super().__init__(reason)
        self.failure_class = failure_class


class ExecutionCancelled(_Ended):
    """The execution was cancelled.

    Args:
        reason: Reason of the cancellation; None if it had none.

    Attributes:
        reason: The same text, whole; the message shows its beginning.
    """

    code = "execution_cancelled"
    _event = "The execution was cancelled"


class ExecutionExpired(_Ended):
    """The execution ran out of time: of its deadline, of its last attempt's limit, or of its suspension's.

    Args:
        reason: ``execution_deadline``, ``attempt_timeout`` or ``suspension_timeout``.

    Attributes:
        reason: The same word.
    """

    code = "execution_expired"
    _event = "The execution has run out of time"


class AttemptNotFound(FFError, LookupError):
    """The execution has no attempt with this index."""

    code = "attempt_not_found"
    _sentence = "The execution has no attempt with this index; attempts are counted from 0."


class ExecutionNotClaimable(FFError):
    """The execution cannot be claimed by its id now."""

    code = "execution_not_claimable"
    _sentence = (
        "The execution is not waiting for a worker, or its flow is cancelled; read its state."
    )


class CapabilityMismatch(FFError):
    """The worker lacks capabilities that the execution requires.

    Args:
        missing: The capabilities that are missing.
    """

    code = "capability_mismatch"

    def __init__(self, missing: Sequence[str] = ()) -> None:
        super().__init__(
            "The worker lacks capabilities that the execution requires"
            f" ({', '.join(missing)}); claim it with a worker that has them."
        )
        self.missing = tuple(missing)

    @classmethod
    def _from_details(cls, details: Sequence[bytes]) -> FFError:
        return cls([token.decode("ascii") for token in details[0].split(b",")])


class FlowNotFound(FFError, LookupError):
    """There is no such flow."""

    code = "flow_not_found"
    _sentence = "There is no such flow; create it first."


class FlowAlreadyTerminal(FFError):
    """The flow is cancelled."""

    code = "flow_already_terminal"
    _sentence = "The flow is cancelled and takes no more executions; create another flow."


class WaitpointConflict(FFError):
    """The waitpoint id belongs to another attempt of the execution."""

    code = "waitpoint_conflict"
    _sentence = "The waitpoint id belongs to another attempt of the execution; use a fresh one."


class WaitpointClosed(FFError):
    """The waitpoint takes no more signals, and no suspension."""

    code = "waitpoint_closed"
    _sentence = "The waitpoint is closed; create another one."


class InvalidToken(FFError):
    """The waitpoint's token is not valid, or there is no such waitpoint."""

    code = "invalid_token"
    _sentence = "The token is not valid for this waitpoint; use the one it was created with."


class SignalLimitExceeded(FFError):
    """The waitpoint has reached its limit of 10,000 signals."""

    code = "signal_limit_exceeded"
    _sentence = "The waitpoint has had 10,000 signals; no more are taken."


class RotationConflict(FFError):
    """The key id is in use with another secret, or 64 earlier secrets are still in their grace."""

    code = "rotation_conflict"
    _sentence = (
        "This kid has another secret already, or 64 earlier secrets are still valid;"
        " rotate to a fresh kid, or wait until a grace is over."
    )


class BudgetNotFound(FFError, LookupError):
    """There is no such budget."""

    code = "budget_not_found"
    _sentence = "There is no such budget; create it first."


class Corruption(FFError):
    """Stored data cannot be used; another program wrote to the library's keys. Nothing was changed.

    Attributes:
        function: Lua function of the call; None without one.
        location: Line at which it met the data, as ``lua/append.lua:123``; None if the server did not tell.
    """

    function: str | None = None
    location: str | None = None
    code = "corruption"
    _sentence = "Stored data cannot be read; look for another program that writes to these keys."


# -- connections, state of the server, and malformed answers ---------------------------------------


class _Connecting(FFError):
    """An error between this process and a server.

    Attributes:
        host: Host of the server; None with a Unix socket, or if the error concerns no single address.
        port: Port of the server; None as for *host*.
        unix_path: Path of the Unix socket; None without one.
    """

    host: str | None = None
    port: int | None = None
    unix_path: str | None = None


class Unavailable(_Connecting, ConnectionError):
    """The server could not be reached, or is not ready; the call was not sent or not applied.

    Attributes:
        errno: Error number of the operating system; None if the error came from elsewhere.
        strerror: The system's text for the number.
    """

    code = "unavailable"
    retryable = True
    _sentence = "The server cannot be reached or is not ready; try again later."


class PrimaryNotFound(Unavailable):
    """No sentinel names a primary of the service.

    Attributes:
        service: Name of the service.
        sentinels: Addresses of the sentinels that were asked.
    """

    code = "primary_not_found"
    service: str = ""
    sentinels: tuple[str, ...] = ()
    _sentence = "No sentinel names a primary of the service; check its name and the sentinels."


class OutcomeUnknown(_Connecting, ConnectionError):
    """The connection broke after the call was sent: it may have been applied."""

    code = "outcome_unknown"
    retryable = True
    outcome = Outcome.UNKNOWN
    _sentence = "The connection broke before the answer; the call may have been applied."


class DeadlineExceeded(_Connecting, TimeoutError):
    """No answer arrived in time. The call may have been applied, unless ``outcome`` is ``NOT_APPLIED``.

    Attributes:
        silent: Whether nothing came any more over a connection that had worked before: it may have died in silence.
    """

    code = "deadline_exceeded"
    silent: bool = False
    retryable = True
    outcome = Outcome.UNKNOWN
    _sentence = "No answer came in time; the call may have been applied."


CredentialFault = Literal["missing", "refused", "not_configured"]
"""Fault of refused credentials.

``missing``: the server requires credentials and got none. ``refused``: the user name or the password is wrong, or the
user is disabled. ``not_configured``: a password was sent, and the server's default user has none.
"""


class AuthenticationFailed(_Connecting, PermissionError):
    """The server refused the user name or the password, or requires them.

    Attributes:
        fault: See :data:`CredentialFault`; None if the server did not tell.
    """

    code = "authentication_failed"
    fault: CredentialFault | None = None
    _sentence = "The server refused the credentials; check the user name and the password."


class CredentialsUnavailable(_Connecting):
    """The provider of credentials raised, or returned something else than credentials.

    It is retryable where the provider's error was one of the system, as a lost connection or a timeout. What the provider
    said or returned is not in it.
    """

    code = "credentials_unavailable"
    _sentence = "The credential provider did not return credentials; look into its own log."


DeniedKind = Literal["command", "key", "channel", "database"]
"""Kind of object that an ACL denies."""


class PermissionDenied(FFError, PermissionError):
    """The user may not run a command, or touch a key, that the call needs.

    Functions run with the caller's rights.

    Attributes:
        denied: Kind of the denied object; None if the server did not tell.
        command: The denied command in lower case, as ``xadd`` or ``config|get``; None for another kind.
        function: Lua function of the call; None without one.
        location: Line of the function, as ``lua/append.lua:123``; None if the server did not tell.
    """

    code = "permission_denied"
    denied: DeniedKind | None = None
    command: str | None = None
    function: str | None = None
    location: str | None = None
    _sentence = "The user lacks a permission that the call needs; compare its ACL with the line that ff-fast acl prints for its role."


TlsFault = Literal[
    "not_tls",
    "tls_required",
    "unknown_authority",
    "wrong_host",
    "expired",
    "client_certificate",
    "files",
]
"""Why TLS failed.

``not_tls``: the port does not speak TLS. ``tls_required``: the port speaks TLS, and the client did not.
``unknown_authority``: no trusted authority signed the server's certificate. ``wrong_host``: the certificate is for
another host. ``expired``: the certificate is not valid now. ``client_certificate``: the server requires a client
certificate, or another one. ``files``: a file of certificates or keys cannot be read or used.
"""


class TlsFailed(_Connecting, ConnectionError):
    """The TLS handshake failed: unknown authority, wrong host name, expired or missing certificate.

    Attributes:
        fault: See :data:`TlsFault`; None for any other fault.
    """

    code = "tls_failed"
    fault: TlsFault | None = None
    _sentence = "The TLS handshake failed; check the certificates and the host name."


class ClusterModeRequired(_Connecting):
    """The server is a node of a cluster, and the configuration has no ``cluster=true``."""

    code = "cluster_mode_required"
    _sentence = "The server is a node of a cluster; connect with cluster=true, as in valkey://host?cluster=true."


class NotACluster(_Connecting):
    """The configuration has ``cluster=true``, and the server is no node of a cluster."""

    code = "not_a_cluster"
    _sentence = (
        "The server is no node of a cluster and cluster=true is set; connect without cluster=true."
    )


class DeploymentWarning(RuntimeWarning):
    """A server that can be used and may lose data: it evicts any key, stores nothing on disk, or is older than Valkey 7.2.

    Connecting warns once a backend, in one text with all that was found; what the user may not ask is left out.
    """


class UnsupportedServer(FFError):
    """The server, or a proxy in front of it, lacks a command that the library needs."""

    code = "unsupported_server"
    _sentence = (
        "The server lacks a command that the library needs; use Valkey 7.2, Redis 7.0 or newer."
    )


class ServerBusy(FFError):
    """The server is running a long script and answers nothing else."""

    code = "server_busy"
    retryable = True
    _sentence = "The server is busy with a long script; try again later."


class OutOfMemory(FFError):
    """The server has reached its memory limit and accepts no writes."""

    code = "out_of_memory"
    retryable = True
    _sentence = (
        "The server has reached maxmemory and accepts no writes; free memory or raise the limit."
    )


class StorageUnavailable(FFError):
    """The server cannot persist and therefore accepts no writes."""

    code = "storage_unavailable"
    retryable = True
    _sentence = (
        "The server cannot write to its disk and accepts no writes; check its disk and its log."
    )


class NotPrimary(_Connecting):
    """The call reached a replica; find the primary and repeat."""

    code = "not_primary"
    retryable = True
    _sentence = "The call reached a replica; find the primary and try again."


class NotEnoughReplicas(_Connecting):
    """The server has fewer replicas than ``min-replicas-to-write`` demands."""

    code = "not_enough_replicas"
    retryable = True
    _sentence = "The server has fewer replicas than its min-replicas-to-write demands; check the replication, and try again later."


class NotReplicated(FFError, TimeoutError):
    """What was written is stored, but the level of durability that was asked for was not confirmed in time.

    A writer goes on, and its next ``flush`` or ``close`` asks again; so does a repeat of a call.

    Attributes:
        replicas: How many replicas had confirmed it when the time was up; 0 where that is not known.
        synced: Whether it was known to be in the append-only file of the primary, where that was asked for.
    """

    code = "not_replicated"
    retryable = True
    outcome = Outcome.APPLIED
    _sentence = (
        "What was written is stored, but its replicas or its disk have not confirmed it in time;"
        " check the replication, and ask again."
    )

    def __init__(
        self, message: str | None = None, *, replicas: int = 0, synced: bool = False
    ) -> None:
        super().__init__(message)
        self.replicas = replicas
        self.synced = synced


class FunctionMissing(FFError):
    """The server does not hold the function library."""

    code = "function_missing"
    retryable = True
    _sentence = "The server does not hold the function library; load it and try again."


class Redirected(FFError):
    """Another cluster node owns the slot.  A client follows it, and raises it when the redirects do not end.

    Attributes:
        ask: True for ``ASK`` (this call only), False for ``MOVED`` (from now on).
        slot: The hash slot.
        address: ``host:port`` of the owner; an empty host means the host that answered.
    """

    code = "redirected"
    retryable = True
    _sentence = "Another cluster node owns the slot; the cluster is being changed, try again later."

    def __init__(self, *, ask: bool, slot: int, address: str) -> None:
        super().__init__(f"{self._sentence} The slot is {slot}, its node {address}.")
        self.ask = ask
        self.slot = slot
        self.address = address


class ProtocolError(FFError):
    """The server's answer has a form that this version of the library does not know."""

    code = "protocol_error"
    outcome = Outcome.UNKNOWN
    _sentence = "The server's answer is not understood; check that client and library versions fit."


class InternalFunctionError(FFError):
    """A server function stopped with an error of its own: a defect, or foreign data in its keys.

    Attributes:
        function: Lua function of the call; None if it is not known.
        location: Line at which it stopped, as ``lua/append.lua:123``; None if the server did not tell.
    """

    function: str | None = None
    location: str | None = None
    code = "internal_function_error"
    outcome = Outcome.UNKNOWN
    _sentence = "A server function stopped with an error; the call may have been applied in part."


_MOST_CAUSES = 8
"""Bound of the walk along a chain of causes."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield *error* and what has led to it, as cause or as context: libraries wrap errors in their own."""
    cause: BaseException | None = error
    for _ in range(_MOST_CAUSES):
        if cause is None:
            return
        yield cause
        cause = cause.__cause__ or cause.__context__


# -- from answers to errors --------------------------------------------------------------------------


def for_code(code: str, details: Sequence[bytes] = ()) -> FFError:
    """Return the error for the answer ``[0, code, *details]`` of a server function.

    An unknown code, or details that do not fit the code, give :class:`ProtocolError`. Its message names
    the code if it is a plain word.
    """
    cls = _classes.get(code)
    if cls is not None:
        try:
            return cls._from_details(details)
        except (TypeError, ValueError, IndexError):
            return ProtocolError(f"The server's details of the answer {code} are not understood.")
    named = f" {_word(code)}" if _word(code) else ""
    return ProtocolError(f"The server answered with the unknown code{named}; check the versions.")


_BY_FIRST_WORD: dict[str, type[FFError]] = {
    "NOAUTH": AuthenticationFailed,
    "WRONGPASS": AuthenticationFailed,
    "NOPERM": PermissionDenied,
    "DENIED": PermissionDenied,
    "OOM": OutOfMemory,
    "MISCONF": StorageUnavailable,
    "LOADING": Unavailable,
    "MASTERDOWN": Unavailable,
    "CLUSTERDOWN": Unavailable,
    "TRYAGAIN": Unavailable,
    "UNBLOCKED": Unavailable,
    "READONLY": NotPrimary,
    "BUSY": ServerBusy,
    "NOREPLICAS": NotEnoughReplicas,
    "WRONGTYPE": Corruption,
    "CORRUPT": Corruption,
}

# A function has met a key that has gone to another node, or is not there yet, because its slot moves key by key. The
# first word is Redis's alone.
_NOT_LOCAL = re.compile(r"(?:Script a|A)ttempted to access a non local key\b")

_BY_TEXT: tuple[tuple[str, type[FFError]], ...] = (
    ("ACL failure in script", PermissionDenied),
    ("The user executing the script", PermissionDenied),  # Redis 7.0
    ("Function not found", FunctionMissing),
    ("AUTH <password> called without any password configured", AuthenticationFailed),
    ("max number of clients reached", Unavailable),
    ("SELECT is not allowed in cluster mode", ClusterModeRequired),
    ("WAIT cannot be used with replica", NotPrimary),
    ("WAITAOF cannot be used with replica", NotPrimary),
    ("WAITAOF cannot be used when numlocal", UnsupportedServer),
    # Somebody else's entry has an id at or after that of the next frame; or the last id that there is.
    ("The ID specified in XADD is equal or smaller", Corruption),
    ("The stream has exhausted the last possible ID", Corruption),
)
"""Error texts without a code word of their own, compared as prefixes."""

# End of a function's error: Valkey 9.1 and Redis 7 leave out its name. Anchored, since the text before it may hold
# the caller's data.
_ENDS_AT = re.compile(r" script: (?:ff_[a-z0-9_]+, )?on @?user_function:([0-9]{1,7})\.?$")
_BEGINS_AT = re.compile(r"(?:ERR )?@?user_function:([0-9]{1,7}): ")


_CLUSTER_DOWN = (
    "The cluster is down: slots have no node that answers, or it is still being formed; check CLUSTER INFO, and try again"
    " later."
)

_TOLD_BY = re.compile(r" \(node (\S{1,255}):([0-9]{1,5})\)$")


def told_by(message: str, host: str, port: int) -> str:
    """Return a server's error reply with the address of the server, which :func:`from_server_error` finds there."""
    return f"{message} (node {host}:{port})"


def name_server(error: FFError, host: str, port: int, unix_path: str | None = None) -> None:
    """Say in *error* which server it concerns, where that matters and is not told."""
    named = Unavailable | OutcomeUnknown | DeadlineExceeded | NotPrimary | NotEnoughReplicas
    if not isinstance(error, named) or error.host is not None or error.unix_path is not None:
        return
    where = unix_path or (f"[{host}]" if ":" in host else host) + f":{port}"
    if unix_path is None:
        error.host, error.port = host, port
    else:
        error.unix_path = unix_path
    error.args = (f"{error} The server is {where}.", *error.args[1:])


def from_server_error(message: str, function: str | None = None) -> FFError:
    """Return the error for a server's error reply, given without its leading ``-``.

    Only the first word and fixed phrases are read.  No other part of the text reaches the error: server errors may
    quote arguments, keys and user names.  If a command inside a function failed, ``outcome`` is unknown for every
    class, since the function may have written before.

    Args:
        message: The reply.
        function: Lua function of the call; None without one.

    """
    word, _, rest = message.partition(" ")
    if word in ("MOVED", "ASK"):
        return _redirected(word, rest)
    cls = _BY_FIRST_WORD.get(word)
    if cls is None:
        text = rest if word == "ERR" else message
        cls = next((c for start, c in _BY_TEXT if text.startswith(start)), InternalFunctionError)
        if cls is InternalFunctionError and _NOT_LOCAL.match(text):
            cls = Unavailable
    if cls is AuthenticationFailed:
        return credentials_error(message)
    if cls is PermissionDenied:
        error: FFError = _denied(message, function)
    elif cls is InternalFunctionError:
        error = _stopped(message, function)
    elif cls is Corruption:
        # Functions ask for foreign data before their first write.
        return _corrupt(message, function)
    elif word == "CLUSTERDOWN":
        error = Unavailable(_CLUSTER_DOWN)
    else:
        error = cls()
    if found := _TOLD_BY.search(message):
        name_server(error, found[1], int(found[2]))
    if "@user_function" in message or "ACL failure in script" in message:
        # Lua has no rollback, so writes before the failed command stand.
        error.outcome = Outcome.UNKNOWN
    return error


_CREDENTIALS: tuple[tuple[str, CredentialFault, str], ...] = (
    (
        "Authentication required",
        "missing",
        "The server wants credentials and got none; add a user name and a password.",
    ),
    (
        "without any password configured",
        "not_configured",
        "A password was sent and the server's default user has none; connect without it, or name the user.",
    ),
    (
        "invalid username-password pair",
        "refused",
        "The server refused the user name or the password, or the user is disabled; check them.",
    ),
    ("WRONGPASS", "refused", "The server refused the user name or the password; check them."),
    (
        "NOAUTH",
        "missing",
        "The server wants credentials and got none; add a user name and a password.",
    ),
)


def credentials_error(text: str) -> AuthenticationFailed:
    """Return the error for a server's text about credentials; no part of the text is repeated."""
    for phrase, fault, sentence in _CREDENTIALS:
        if phrase in text:
            error = AuthenticationFailed(sentence)
            error.fault = fault
            return error
    return AuthenticationFailed()


# User names have no blank, so a name cannot imitate the rest of the sentence.
_DENIED_COMMAND = re.compile(
    r"(?:User \S+|[Tt]his user) has no permissions to run the '([A-Za-z0-9_.|-]{1,64})' command"
)
_DENIED_OTHER: tuple[tuple[str, DeniedKind, str], ...] = (
    ("o permissions to access a key", "key", "a key"),
    ("no permissions to access one of the keys", "key", "a key"),
    ("o permissions to access a channel", "channel", "a channel"),
    ("no permissions to access one of the channels", "channel", "a channel"),
    ("o permissions to access database", "database", "the database"),
    ("can't run this command or subcommand", "command", "a command"),
    ("can't access at least one of the keys", "key", "a key"),
    ("can't publish to the channel", "channel", "a channel"),
)


def _denied(text: str, function: str | None) -> PermissionDenied:
    denied: DeniedKind | None = None
    command, what = None, ""
    if found := _DENIED_COMMAND.search(text):
        denied, command = "command", found[1].lower()
        what = f"run the command {command}"
    for phrase, kind, name in () if found else _DENIED_OTHER:
        if phrase in text:
            denied, what = kind, f"use {name}"
            break
    location = _location(text)
    if denied is None:
        error = PermissionDenied()
    else:
        needs = f" that {function} needs" if function else ""
        at = f" ({location})" if location else ""
        error = PermissionDenied(
            f"The user may not {what}{needs}{at}; compare its ACL with the line that ff-fast acl prints for its role."
        )
    error.denied, error.command = denied, command
    error.function, error.location = function, location
    return error


def _stopped(text: str, function: str | None) -> InternalFunctionError:
    location = _location(text)
    if function is None and location is None:
        return InternalFunctionError()
    at = f" at {location}" if location else ""
    error = InternalFunctionError(
        f"The server function {function or 'that was called'} stopped with an error{at};"
        " the call may have been applied in part."
    )
    error.function, error.location = function, location
    return error


_CORRUPT_KEY = re.compile(r"CORRUPT ([a-z_]{1,40})\b")


def _corrupt(text: str, function: str | None) -> Corruption:
    location = _location(text)
    named = _CORRUPT_KEY.match(text)
    if function is None and location is None:
        return Corruption()
    what = f"a key of the kind {named[1]}" if named else "one of its keys"
    at = f" ({location})" if location else ""
    error = Corruption(
        f"The server function {function or 'that was called'} found foreign data in {what}{at} and changed nothing;"
        " look for another program that writes to these keys."
    )
    error.function, error.location = function, location
    return error


def _location(text: str) -> str | None:
    """Return the file and line at which a function failed; None if the server did not tell."""
    found = _BEGINS_AT.match(text) or _ENDS_AT.search(text)
    if found is None:
        return None
    from ff_fast import _library  # noqa: PLC0415 - reads the Lua files, which nothing else here needs

    try:
        return _library.line_of(int(found[1]))
    except (ValueError, OSError):
        # Another version of the library, or an installation without its Lua files.
        return None


def shows_cluster(text: str) -> bool:
    """Return whether a server's error reply, or its ``INFO cluster``, shows a cluster node."""
    return (
        text.startswith(("MOVED ", "ASK ", "CROSSSLOT ", "CLUSTERDOWN "))
        or text.removeprefix("ERR ").startswith("SELECT is not allowed in cluster mode")
        or re.search(r"^cluster_enabled:1\r?$", text, re.MULTILINE) is not None
    )


def _redirected(word: str, rest: str) -> FFError:
    found = re.fullmatch(r"([0-9]{1,5}) (\S*:[0-9]{1,5})", rest)
    if found is None or int(found[1]) >= 16384:
        return ProtocolError()
    return Redirected(ask=word == "ASK", slot=int(found[1]), address=found[2])
