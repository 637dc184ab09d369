"""Values of the public interface: handles, frames, modes, outcomes, configuration.

Names, wire tokens and defaults are those of FlowFabric's ``ff_core::backend``.  All values are
frozen, compare by content, and are checked when they are made: every existing value is valid.
Wrong types raise :class:`~ff_fast.errors.InvalidType`, wrong values
:class:`~ff_fast.errors.InvalidInput` or a more specific class named in a docstring.

``repr`` never shows a payload, a lease id, a token or a password.  ``dataclasses.asdict`` and
``pickle`` hold all of them.

Units: a duration whose name ends in ``_ms``, and ``BackendRetry.factor``, is whole milliseconds; other
durations are seconds.  An argument that is a duration also takes a ``timedelta``.  A point in time is
Unix milliseconds.
Integers stop at 2^53-1, the largest that the server's Lua keeps exactly.
"""

from ff_fast.errors import CompletionOutcome, ExecutionState

from ._value import (
    DEFAULT_PAYLOAD_LIMIT,
    LARGEST_PAYLOAD_LIMIT,
    MAX_SECONDS,
    MAX_U32,
    Value,
    duration_ms,
    milliseconds,
    payload_bytes,
    seconds,
)
from .config import (
    BackendConfig,
    BackendConnection,
    BackendRetry,
    BackendTimeouts,
    ValkeyConnection,
)
from .handle import (
    BackendTag,
    Handle,
    HandleFields,
    HandleKind,
    HandleOpaque,
)
from .listing import (
    ExecutionPage,
    ExecutionSummary,
    Finding,
    FindingLevel,
    LaneSummary,
    WorkerSummary,
)
from .stats import (
    FramesByMode,
    GapsByReason,
    Histogram,
    Stats,
)
from .stream import (
    SUMMARY_NULL_SENTINEL,
    AppendFrameOutcome,
    AttemptStarted,
    BestEffortLiveConfig,
    Durability,
    End,
    EndReason,
    Frame,
    FrameKind,
    FrameMode,
    Gap,
    GapReason,
    PatchFormat,
    PatchKind,
    Snapshot,
    StreamCursor,
    StreamDescription,
    StreamMode,
    SummaryDocument,
    TailVisibility,
    cursor_after,
    make_cursor,
    parse_cursor,
    split_cursor,
)
from .waitpoint import (
    CountKind,
    PendingWaitpoint,
    ResumeCondition,
    ResumeSignal,
    SignalEffect,
    SignalOutcome,
    SuspendOutcome,
    TimeoutBehavior,
    WaitpointHmac,
    WaitpointKind,
    WaitpointSpec,
)
from .work import (
    AttemptDescription,
    CancelFlowOutcome,
    CancelFlowPolicy,
    CancelFlowWait,
    CancelOutcome,
    CapabilitySet,
    ClaimPolicy,
    CompletionPayload,
    ExecutionDescription,
    FailOutcome,
    FailureClass,
    FailureReason,
    FlowDescription,
    FlowState,
    LeaseRenewal,
    Namespace,
    OnCancel,
    ReclaimGrant,
    ReclaimToken,
    ReportUsageResult,
    RetryBackoff,
    RetryPolicy,
    ScannerFilter,
    StateTransition,
    SuspensionDescription,
    UsageDimensions,
    UsageVerdict,
)

__all__ = [  # noqa: RUF022 - by topic
    # streams
    "SUMMARY_NULL_SENTINEL",
    "PatchFormat",
    "PatchKind",
    "BestEffortLiveConfig",
    "FrameMode",
    "StreamMode",
    "TailVisibility",
    "FrameKind",
    "Frame",
    "AppendFrameOutcome",
    "SummaryDocument",
    "StreamCursor",
    "cursor_after",
    "make_cursor",
    "parse_cursor",
    "split_cursor",
    "GapReason",
    "Gap",
    "Durability",
    "EndReason",
    "End",
    "AttemptStarted",
    "Snapshot",
    "StreamDescription",
    # handles
    "BackendTag",
    "HandleKind",
    "HandleOpaque",
    "HandleFields",
    "Handle",
    # suspension
    "WaitpointKind",
    "WaitpointHmac",
    "PendingWaitpoint",
    "WaitpointSpec",
    "CountKind",
    "ResumeCondition",
    "TimeoutBehavior",
    "SuspendOutcome",
    "ResumeSignal",
    "SignalEffect",
    "SignalOutcome",
    # work
    "ExecutionState",
    "CompletionOutcome",
    "CapabilitySet",
    "ClaimPolicy",
    "LeaseRenewal",
    "OnCancel",
    "ReclaimGrant",
    "ReclaimToken",
    "RetryBackoff",
    "RetryPolicy",
    "FailureReason",
    "FailureClass",
    "FailOutcome",
    "CancelOutcome",
    "CompletionPayload",
    "UsageDimensions",
    "UsageVerdict",
    "ReportUsageResult",
    "CancelFlowPolicy",
    "CancelFlowWait",
    "CancelFlowOutcome",
    "FlowState",
    "FlowDescription",
    "AttemptDescription",
    "StateTransition",
    "SuspensionDescription",
    "ExecutionDescription",
    "Namespace",
    "ScannerFilter",
    # listings
    "ExecutionSummary",
    "ExecutionPage",
    "LaneSummary",
    "WorkerSummary",
    "FindingLevel",
    "Finding",
    # numbers
    "FramesByMode",
    "GapsByReason",
    "Histogram",
    "Stats",
    # configuration
    "BackendTimeouts",
    "BackendRetry",
    "ValkeyConnection",
    "BackendConnection",
    "BackendConfig",
    # for the modules above this package
    "DEFAULT_PAYLOAD_LIMIT",
    "LARGEST_PAYLOAD_LIMIT",
    "MAX_SECONDS",
    "MAX_U32",
    "Value",
    "duration_ms",
    "milliseconds",
    "payload_bytes",
    "seconds",
]
