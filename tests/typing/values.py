"""What type checkers reveal of values, words and errors; read by test_typing.py and never run."""

import asyncio
import copy
import dataclasses
from datetime import timedelta
from typing import reveal_type

import ff_fast
from ff_fast import (
    AttemptStarted,
    BestEffortLiveConfig,
    CancelOutcome,
    ClaimPolicy,
    CompletionPayload,
    End,
    ExecutionDescription,
    ExecutionNotActive,
    FlowDescription,
    Gap,
    Handle,
    PatchKind,
    RetryPolicy,
    SignalOutcome,
    Snapshot,
    StreamDescription,
    StreamFrame,
    StreamMode,
    SummaryDocument,
    UsageDimensions,
)


def frames(item: StreamFrame | Gap | End) -> None:
    reveal_type(item.cursor)  # -> str
    match item:
        case StreamFrame():
            reveal_type(item.payload)  # -> bytes
            reveal_type(item.mode)  # -> FrameMode
            reveal_type(item.patch_kind)  # -> PatchKind | None
        case Gap(first, upto, reason):
            reveal_type(first)  # -> int
            reveal_type(upto)  # -> int
            reveal_type(reason)  # -> GapReason
        case End(reason=why):
            reveal_type(why)  # -> EndReason


def followed(item: StreamFrame | Gap | End | Snapshot | AttemptStarted) -> None:
    match item:
        case Snapshot(document_json=document, version=version):
            reveal_type(document)  # -> bytes
            reveal_type(version)  # -> int
        case AttemptStarted(index):
            reveal_type(index)  # -> int
        case StreamFrame(payload=payload):
            reveal_type(payload)  # -> bytes
        case End(outcome=outcome, error=error):
            reveal_type(outcome)  # -> CompletionOutcome | None
            reveal_type(error)  # -> str | None
        case Gap():
            reveal_type(item.reason)  # -> GapReason


def modes() -> None:
    reveal_type(StreamMode.best_effort_live(timedelta(seconds=15)))  # -> StreamMode
    reveal_type(BestEffortLiveConfig(timedelta(seconds=15)).ttl_ms)  # -> int
    reveal_type(StreamMode.durable().wire_str())  # -> FrameMode
    reveal_type(PatchKind.STRING_APPEND("/text"))  # -> PatchKind
    reveal_type(PatchKind.JSON_MERGE_PATCH.wire)  # -> PatchFormat


def durations() -> None:
    reveal_type(RetryPolicy(3, delay=timedelta(seconds=1)).delay)  # -> float
    reveal_type(ClaimPolicy.with_max_wait(timedelta(seconds=1)).max_wait)  # -> float | None
    reveal_type(UsageDimensions(wall_ms=timedelta(seconds=1)).wall_ms)  # -> int | None


def described(
    execution: ExecutionDescription, stream: StreamDescription, flow: FlowDescription
) -> None:
    reveal_type(execution.state)  # -> ExecutionState
    reveal_type(execution.outcome)  # -> CompletionOutcome | None
    reveal_type(execution.failure_class)  # -> FailureClass | None
    reveal_type(execution.suspension)  # -> SuspensionDescription | None
    reveal_type(execution.retry)  # -> RetryPolicy
    reveal_type(execution.history[0].at_ms)  # -> int
    reveal_type(execution.tags)  # -> Mapping[str, str]
    reveal_type(stream.lease_left)  # -> float | None
    reveal_type(flow.state)  # -> FlowState


def outcomes(cancel: CancelOutcome, completion: CompletionPayload, signal: SignalOutcome) -> None:
    reveal_type(cancel.previous_state)  # -> ExecutionState
    reveal_type(completion.outcome)  # -> CompletionOutcome
    reveal_type(signal.effect)  # -> SignalEffect


def handles(handle: Handle) -> None:
    reveal_type(handle.execution_id)  # -> str
    reveal_type(handle.fields().lease_epoch)  # -> int


def as_dataclasses(document: SummaryDocument) -> None:
    reveal_type(dataclasses.replace(document, version=2))  # -> SummaryDocument
    reveal_type(document.replace(version=2))  # -> SummaryDocument
    reveal_type(copy.copy(document))  # -> SummaryDocument
    reveal_type(dataclasses.asdict(document))  # -> dict[str, Any]
    reveal_type(dataclasses.fields(document)[0].name)  # -> str


def failures() -> None:
    try:
        pass
    except ExecutionNotActive as error:
        reveal_type(error.state)  # -> ExecutionState | None
        reveal_type(error.terminal_outcome)  # -> CompletionOutcome | None
    except ff_fast.ExecutionFailed as error:
        reveal_type(error.reason)  # -> str | None
        reveal_type(error.failure_class)  # -> str | None
    except ff_fast.Unavailable as error:
        reveal_type(error.host)  # -> str | None
        reveal_type(error.port)  # -> int | None
    except ff_fast.PermissionDenied as error:
        reveal_type(error.denied)  # -> DeniedKind | None
        reveal_type(error.command)  # -> str | None
    except ff_fast.InternalFunctionError as error:
        reveal_type(error.location)  # -> str | None
    except ff_fast.FFError as error:
        reveal_type(error.code)  # -> str
        reveal_type(error.outcome)  # -> Outcome


async def a_read_as_a_task(tail: ff_fast.aio.Tail) -> None:
    reveal_type(await asyncio.create_task(anext(tail)))  # -> StreamFrame | Gap | End
