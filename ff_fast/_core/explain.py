"""The history of an execution, told in sentences."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ff_fast._core import ops

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ff_fast._core.steps import Steps
    from ff_fast.types import ExecutionDescription, StateTransition, StreamDescription

MOST_ATTEMPTS = 10
"""Attempts whose streams are looked at, the newest ones."""

_SHARE_OF_CEILING = 0.9

_ENDS = {
    "attempt_timeout": "it ran longer than its time limit",
    "suspension_timeout": "its suspension lasted too long",
    "expired": "the deadline of the execution passed",
}


def explain(execution_id: str) -> Steps[tuple[str, ...]]:
    """Read what is to be told, and tell it."""
    execution = yield from ops.call(ops.describe_execution(execution_id))
    first = max(execution.attempt_count - MOST_ATTEMPTS, 0)
    streams: dict[int, StreamDescription] = {}
    for index in range(first, execution.attempt_count):
        streams[index] = yield from ops.call(ops.describe_attempt(execution_id, index))
    return tuple(sentences(execution, streams))


def sentences(
    execution: ExecutionDescription, streams: Mapping[int, StreamDescription]
) -> Iterator[str]:
    """Tell of an execution: its creation, its changes, what it is doing, and what has become of its frames."""
    yield from _creation(execution)
    seen: set[int] = set()
    for change in execution.history:
        yield f"{_at(change.at_ms)} {_change(change, seen, streams.get(change.attempt_index))}"
    yield from _present(execution, streams)
    for index, stream in streams.items():
        yield from _frames(index, stream)


def point_in_time(ms: int) -> str:
    """Return Unix milliseconds as text, in UTC: ``2026-11-27T09:00:00.000Z``."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(ms // 1000))}.{ms % 1000:03d}Z"


def _at(ms: int | None) -> str:
    return "an unknown time" if ms is None else point_in_time(ms)


def _creation(execution: ExecutionDescription) -> Iterator[str]:
    where = f"in lane {execution.lane}" if execution.lane else "as a named stream"
    yield (
        f"{_at(execution.created_at_ms)} It was created {where}, namespace {execution.namespace},"
        f" priority {execution.priority}."
    )
    if execution.flow_id:
        yield f"It belongs to flow {execution.flow_id}."
    if execution.parent_id:
        yield f"Its parent is {execution.parent_id}."
    if len(execution.history) >= 100:
        yield "Only its newest 100 changes are kept."


def _worker(stream: StreamDescription | None) -> str:
    if stream is None or stream.worker_id is None:
        return "A worker"
    return f"Worker {stream.worker_id} ({stream.worker_instance_id})"


def _change(change: StateTransition, seen: set[int], stream: StreamDescription | None) -> str:
    index, to, reason = change.attempt_index, change.to_state, change.reason
    if to == "active":
        word = "continued" if index in seen else "claimed it and began"
        seen.add(index)
        return f"{_worker(stream)} {word} attempt {index}."
    if change.from_state == "active":
        return _left(change)
    if to == "waiting":
        return {
            "resumed": "The signals that it waited for had come; it waited for a worker.",
            "suspension_timeout": "Its suspension lasted too long; it waited for a worker.",
        }.get(reason or "", _WAITED[change.from_state])
    return _end(change)


_WAITED = {
    "delayed": "Its delay was over; it waited for a worker.",
    "waiting_children": "Its last child had ended; it waited for a worker.",
    "suspended": "Its suspension was over; it waited for a worker.",
}


def _left(change: StateTransition) -> str:
    """Tell how an attempt that was with a worker went on."""
    index, to, reason = change.attempt_index, change.to_state, change.reason
    if to == "suspended":
        return f"Attempt {index} was suspended{_because(reason)}."
    if to == "waiting_children":
        return f"Attempt {index} waited for its children."
    if to == "delayed" and reason is None:
        return f"Its worker delayed attempt {index}."
    if to == "delayed":
        return f"Attempt {index} failed{_why(change)} A retry was scheduled."
    if to == "waiting" and reason == "given_back":
        return f"Attempt {index} was given back by its worker; it waited for another one."
    if to == "waiting":
        return (
            f"Attempt {index} lost its worker: the lease lapsed without a renewal"
            f"{_because(change.error)}. It waited for another one."
        )
    return _end(change)


def _end(change: StateTransition) -> str:
    if change.to_state == "completed":
        return f"It completed with attempt {change.attempt_index}."
    return f"It ended as {change.to_state}, in attempt {change.attempt_index}{_why(change)}"


def _because(text: str | None) -> str:
    return f": {text}" if text else ""


def _why(change: StateTransition) -> str:
    """Tell an error as the end of a sentence, with its class."""
    kind = f" ({change.failure_class.value})" if change.failure_class else ""
    if change.reason in _ENDS:
        return f"{kind}: {_ENDS[change.reason]}."
    if change.error:
        return f"{kind}: {change.error.rstrip('.')}."
    if change.reason == "producer_lost":
        return f"{kind}: its worker was lost, and the lease lapsed."
    return f"{kind}."


def _present(
    execution: ExecutionDescription, streams: Mapping[int, StreamDescription]
) -> Iterator[str]:
    state = execution.state
    since = _at(execution.last_transition_at_ms)
    if state == "waiting":
        needs = ", ".join(execution.required_capabilities.tokens)
        whom = f"a worker of lane {execution.lane}" if execution.lane else "a producer"
        offers = f" that offers {needs}" if needs else ""
        yield f"It is waiting for {whom}{offers}, since {since}."
    elif state == "delayed":
        yield (
            f"It is delayed until {_at(execution.delay_until_ms)}, when a supervisor lets it be claimed."
        )
        if execution.failure_reason:
            yield f"Retries left: {execution.retries_left}."
    elif state == "waiting_children":
        yield f"It is waiting for its children, since {since}."
    elif state == "active":
        yield from _lease(execution, streams)
    elif state == "suspended":
        yield from _suspension(execution)
    else:
        kept = (execution.finished_at_ms or 0) + int(execution.retention * 1000)
        why = execution.cancellation_reason if state == "cancelled" else execution.failure_reason
        told = "" if state == "completed" else _because(why)
        yield f"It has ended as {state}{told.rstrip('.')}. Its data is kept until {_at(kept)}."
    if execution.cancel_requested and state == "active":
        yield f"Its worker is asked to stop{_because(execution.cancellation_reason)}."


def _lease(
    execution: ExecutionDescription, streams: Mapping[int, StreamDescription]
) -> Iterator[str]:
    index = execution.attempt_index or 0
    holder = f"worker {execution.worker_id} ({execution.worker_instance_id})"
    left = streams[index].lease_left if index in streams else None
    until = _at(execution.lease_expires_at_ms)
    if left == 0:
        yield (
            f"The lease of {holder} lapsed at {until}; a supervisor has not ended attempt {index} yet."
            " Run one: ff-fast supervise."
        )
    else:
        more = "" if left is None else f", {left:.1f} s from now, unless it is renewed"
        yield f"Attempt {index} is with {holder}, who holds the lease until {until}{more}."
    if execution.progress_percent is not None or execution.progress_message:
        percent = "" if execution.progress_percent is None else f" {execution.progress_percent} %"
        yield (
            f"Its last progress, at {_at(execution.progress_at_ms)}:{percent}"
            f" {execution.progress_message or ''}".rstrip()
            + "."
        )


def _suspension(execution: ExecutionDescription) -> Iterator[str]:
    suspension = execution.suspension
    if suspension is None:
        return
    signals = " or ".join(map(signal_text, suspension.waiting_for)) or "a signal"
    yield (
        f"It is suspended since {_at(suspension.suspended_at_ms)} and waits for {signals};"
        f" its waitpoints: {', '.join(suspension.waitpoint_ids)}."
    )
    if suspension.timeout_at_ms is not None:
        yield f"At {_at(suspension.timeout_at_ms)} it times out ({suspension.on_timeout.value})."


def signal_text(wait: str) -> str:
    """Return what a suspension waits for, as words of a sentence."""
    kind, _, matcher = wait.partition(" ")
    if kind == "external":
        return "any signal"
    name = "named" if kind == "signal_name" else "with the correlation id"
    return f"a signal {name} {matcher}"


def _frames(index: int, stream: StreamDescription) -> Iterator[str]:
    """Tell what an attempt has written, and which frames have left its streams by which rule."""
    frames = stream.frame_count
    if not frames:
        yield f"Attempt {index} has no frame."
        return
    end = 1 if stream.closed_reason else 0
    durable = max(stream.log_added - end, 0)
    live = max(frames - durable, 0)
    yield f"Attempt {index} has {frames} frames: {durable} in its log, {live} for its live window."
    left = stream.log_added - stream.log_entries
    if left > 0:
        kept = stream.log_entries - end
        yield (
            f"{left} durable frames of attempt {index} have left the log, the oldest first: it keeps its newest"
            f" {kept}, by the retention_maxlen of their mode."
        )
    if live:
        yield from _window(index, stream, durable, live)


def _window(index: int, stream: StreamDescription, durable: int, live: int) -> Iterator[str]:
    first = stream.live_first_sequence
    ttl_s = None if stream.live_ttl_ms is None else stream.live_ttl_ms / 1000
    if first is None:
        rule = "" if ttl_s is None else f" of twice its ttl of {ttl_s:g} s"
        yield (
            f"The live window of attempt {index} is gone with all its {live} frames: nothing was written to it for"
            f" the time{rule}."
        )
        return
    # Durable frames between them are not told apart, but for their number.
    gone = first - 1 - durable
    if gone <= 0:
        return
    least = "" if durable == 0 else "At least "
    yield (
        f"{least}{gone} frames of attempt {index} have left the live window, the oldest first: it begins with"
        f" frame {first}."
    )
    ceiling = stream.live_ceiling
    if ceiling is None or ttl_s is None:
        return
    if stream.frame_count - first + 1 >= _SHARE_OF_CEILING * ceiling:
        yield (
            f"The window is at its ceiling: it keeps {ceiling} frames at most, whatever their age"
            f" (maxlen_ceiling). Frames came at {stream.live_rate_hz:.0f} Hz lately."
        )
    else:
        yield (
            f"They were older than its ttl of {ttl_s:g} s: beyond that the window keeps what is written in twice the"
            f" ttl, {stream.live_floor} frames at least. Frames came at {stream.live_rate_hz:.0f} Hz lately."
        )
