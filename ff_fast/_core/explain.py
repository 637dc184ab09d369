"""The history of an execution, told in sentences."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, NamedTuple

from ff_fast import keys
from ff_fast._core import listing, ops
from ff_fast._core.attempts import BEGUN, cause_of
from ff_fast._core.steps import Command, Step, Steps, command, time_ms
from ff_fast._hot.resp import pack_command
from ff_fast.errors import FlowNotFound

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ff_fast.types import ExecutionDescription, StateTransition, StreamDescription

MOST_ATTEMPTS = 10
"""Attempts whose streams are looked at, the newest ones."""

_SHARE_OF_CEILING = 0.9
_HOLDERS = 8
"""Workers of a lane that are named."""
_CHILDREN = 8
"""Children that are named."""
_LATE_MS = 2_000
"""A supervisor fires a timer within this time, in ms."""
_TIME = pack_command(b"TIME")


class Around(NamedTuple):
    """What an execution that has not ended depends on; None where it does not matter, or the user may not ask.

    Attributes:
        now_ms: The server's time.
        supervisor: Who supervises; empty for nobody.
        offered: Whether its lane offers it to workers, and none has taken it: none that may claim it is idle.
        holders: Workers that hold leases of its lane, some of them.
        flow_open: Whether its flow is there and not cancelled.
        children: Children that have not ended: how many, and some of them.
    """

    now_ms: int | None = None
    supervisor: str | None = None
    offered: bool | None = None
    holders: tuple[str, ...] | None = None
    flow_open: bool | None = None
    children: tuple[int, tuple[str, ...]] | None = None


def explain(execution_id: str, partitions: int) -> Steps[tuple[str, ...]]:
    """Read what is to be told, and tell it."""
    execution = yield from ops.call(ops.describe_execution(execution_id))
    first = max(execution.attempt_count - MOST_ATTEMPTS, 0)
    streams: dict[int, StreamDescription] = {}
    for index in range(first, execution.attempt_count):
        streams[index] = yield from ops.call(ops.describe_attempt(execution_id, index))
    around = Around() if execution.outcome else (yield from _look_around(execution, partitions))
    return tuple(sentences(execution, streams, around))


def _look_around(execution: ExecutionDescription, partitions: int) -> Steps[Around]:
    """Ask for what the execution depends on, and for nothing that this user may not: servers log refusals."""
    slot_tag = keys.slot_tag_of(execution.execution_id)
    core, supervisor = keys.core(execution.execution_id), keys.supervisor()
    children = keys.children(execution.execution_id)
    ready = keys.ready(execution.lane, ",".join(execution.required_capabilities.tokens))
    asked = (
        "time",
        f"get {supervisor.decode()}",
        f"zscore {ready.decode()} 0",
        "fcall_ro ff_list_executions 0",
        "fcall_ro ff_describe_flow 0",
        f"sscan {children.decode()} 0",
    )
    held = yield from ops.call(ops.version((keys.PARTITIONS_CONFIG,), asked))
    may = [each == "1" for each in held.rights]
    now_ms = who = offered = holders = flow_open = some = None
    if may[0]:
        (reply,) = yield Step((Command(core, _TIME),))
        now_ms = None if isinstance(reply, Exception) else time_ms(reply)
    if may[1]:
        (reply,) = yield Step((command(b"GET", supervisor),))
        who = None if isinstance(reply, Exception) else _text(reply)
    if execution.state == "waiting" and execution.lane:
        if may[2]:
            partition = b"%d" % keys.partition_index(execution.execution_id)
            (reply,) = yield Step((command(b"ZSCORE", ready, partition),))
            offered = None if isinstance(reply, Exception) else reply is not None
        if may[3]:
            wanted = ops.Filter(("active",), execution.lane)
            page = yield from listing.executions(partitions, wanted, None, 100)
            found = dict.fromkeys(each.worker_instance_id or "" for each in page.items)
            holders = tuple(found)[:_HOLDERS]
    if execution.flow_id and may[4]:
        try:
            flow = yield from ops.call(ops.describe_flow(execution.flow_id, slot_tag))
            flow_open = flow.state == "open"
        except FlowNotFound:
            flow_open = False
    if execution.state == "waiting_children" and may[5]:
        number, scanned = yield Step(
            (
                command(b"SCARD", children),
                command(b"SSCAN", children, b"0", b"COUNT", b"%d" % _CHILDREN),
            )
        )
        if isinstance(number, int) and isinstance(scanned, list):
            some = number, tuple(map(_text, scanned[1][:_CHILDREN]))
    return Around(now_ms, who, offered, holders, flow_open, some)


def _text(reply: object) -> str:
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else ""


def sentences(
    execution: ExecutionDescription,
    streams: Mapping[int, StreamDescription],
    around: Around = Around(),  # noqa: B008 - it is frozen
) -> Iterator[str]:
    """Tell of an execution: its creation, its changes, what it is doing, and what has become of its frames."""
    yield from _creation(execution)
    seen: set[int] = set()
    for change in execution.history:
        yield f"{_at(change.at_ms)} {_change(change, seen, streams.get(change.attempt_index))}"
    yield from _present(execution, streams, around)
    if streams and min(streams):
        yield f"The workers and frames of attempts 0 to {min(streams) - 1} are not looked at."
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
    if execution.tags:
        tags = ", ".join(f"{name}={value}" for name, value in sorted(execution.tags.items()))
        yield f"Its tags are {tags}."
    if execution.traceparent:
        yield f"It was created in the trace {execution.traceparent}."
    if execution.flow_id:
        yield f"It belongs to flow {execution.flow_id}."
    if execution.parent_id:
        yield f"Its parent is {execution.parent_id}."
    if len(execution.history) >= 100:
        yield "Only its newest 100 changes are told."


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
    return _end(change, begun=index in seen or change.from_state in BEGUN)


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
    return _end(change, begun=True)


def _end(change: StateTransition, *, begun: bool) -> str:
    if change.to_state == "completed":
        return f"It completed with attempt {change.attempt_index}."
    where = f", in attempt {change.attempt_index}" if begun else ""
    return f"It ended as {change.to_state}{where}{_why(change)}"


def _because(text: str | None) -> str:
    return f": {text}" if text else ""


def _why(change: StateTransition) -> str:
    """Tell an error as the end of a sentence, with its class."""
    kind = f" ({change.failure_class.value})" if change.failure_class else ""
    why = cause_of(change) or change.error
    return f"{kind}{_because(why and why.rstrip('.'))}."


def _present(
    execution: ExecutionDescription,
    streams: Mapping[int, StreamDescription],
    around: Around,
) -> Iterator[str]:
    state = execution.state
    since = _at(execution.last_transition_at_ms)
    if state == "waiting":
        needs = ", ".join(execution.required_capabilities.tokens)
        whom = f"a worker of lane {execution.lane}" if execution.lane else "a producer"
        offers = f" that offers {needs}" if needs else ""
        yield f"It is waiting for {whom}{offers}, since {since}."
        if around.flow_open is False:
            yield "Its flow is cancelled or was removed: no new attempt of it begins."
        else:
            waited_ms = (around.now_ms or 0) - execution.last_transition_at_ms
            yield from _queue(execution.lane, around, waited_ms)
    elif state == "delayed":
        yield (
            f"It is delayed until {_at(execution.delay_until_ms)}, when a supervisor lets it be claimed."
        )
        yield from _supervised(execution.delay_until_ms, around)
        if execution.failure_reason:
            yield f"Retries left: {execution.retries_left}."
    elif state == "waiting_children":
        yield f"It is waiting for its children, since {since}."
        if around.children is not None:
            number, some = around.children
            yield f"{number} of them have not ended: {', '.join(some)}{', …' * (number > len(some))}."
    elif state == "active":
        yield from _lease(execution, streams)
        yield from _supervised(None, around)
    elif state == "suspended":
        yield from _suspension(execution)
        due_ms = execution.suspension.timeout_at_ms if execution.suspension else None
        if due_ms is not None:
            yield from _supervised(due_ms, around)
    else:
        kept = (execution.finished_at_ms or 0) + int(execution.retention * 1000)
        why = execution.cancellation_reason if state == "cancelled" else execution.failure_reason
        told = "" if state == "completed" else _because(why)
        yield f"It has ended as {state}{told.rstrip('.')}. Its data is kept until {_at(kept)}."
    if execution.cancel_requested and state == "active":
        yield f"Its worker is asked to stop{_because(execution.cancellation_reason)}."


def _queue(lane: str, around: Around, waited_ms: int) -> Iterator[str]:
    """Tell why no worker has taken what waits in a lane."""
    if around.offered is None:
        return
    if not around.offered and waited_ms <= _LATE_MS:
        yield "A worker has heard of it and is about to claim it."
        return
    if around.offered:
        yield "No worker that could claim it is idle."
    else:
        yield (
            "A worker has heard of it and has not claimed it, or word of it was lost: the next idle worker that looks at"
            " the lane finds it."
        )
    if around.holders:
        yield (
            f"These workers hold leases of lane {lane}: {', '.join(around.holders)}. They are busy, or do not offer what it"
            " requires."
        )
    elif around.holders is not None:
        yield (
            f"No worker holds a lease of lane {lane}: it seems that none claims from it with these capabilities. Start one:"
            f" ff-fast worker MODULE:HANDLER --lane {lane}."
        )


def _supervised(due_ms: int | None, around: Around) -> Iterator[str]:
    """Tell whether somebody fires the timer on which an execution depends."""
    if around.supervisor == "":
        yield "Nobody supervises, so its timers take no effect: start a worker, or ff-fast supervise."
    elif due_ms is not None and around.now_ms is not None and around.now_ms > due_ms + _LATE_MS:
        who = f"{around.supervisor}, who supervises," if around.supervisor else "a supervisor"
        late_s = (around.now_ms - due_ms) / 1000
        yield f"That is {late_s:.0f} s ago, and {who} has not acted on it: see ff-fast doctor."


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
    if suspension.needed > 1:
        signals = ", ".join(map(signal_text, suspension.waiting_for))
        signals = f"{suspension.needed} of these, of which it has {suspension.received}: {signals}"
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


def _number(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def _frames(index: int, stream: StreamDescription) -> Iterator[str]:
    """Tell what an attempt has written, and which frames have left its streams by which rule."""
    frames = stream.frame_count
    if not frames:
        yield f"Attempt {index} has no frame."
        return
    end = 1 if stream.closed_reason else 0
    lost = stream.lost_frames
    durable = max(stream.log_added - end - stream.lost_entries, 0)
    live = max(frames - durable - lost, 0)
    yield f"Attempt {index} has {_number(frames, 'frame')}: {durable} in its log, {live} for its live window."
    left = stream.log_added - stream.log_entries
    if left > 0:
        # A loss that has left with them counts as one.
        kept = max(stream.log_entries - end - stream.lost_entries, 0)
        yield (
            f"{_number(left, 'durable frame')} of attempt {index} left the log, the oldest first: it keeps its newest"
            f" {kept}, by the retention_maxlen of their mode."
        )
    if lost:
        yield (
            f"A server that failed took {_number(lost, 'acknowledged frame')} of attempt {index} along, and nobody has"
            " them: see durability."
        )
    if live:
        yield from _window(index, stream, durable + lost, live)


def _window(index: int, stream: StreamDescription, others: int, live: int) -> Iterator[str]:
    first = stream.live_first_sequence
    ttl_s = None if stream.live_ttl_ms is None else stream.live_ttl_ms / 1000
    if first is None:
        rule = "" if ttl_s is None else f" of twice its ttl of {ttl_s:g} s"
        yield (
            f"The live window of attempt {index} is gone with all its {live} frames: nothing was written to it for"
            f" the time{rule}."
        )
        return
    # Durable and lost frames between them are not told apart, but for their number.
    gone = first - 1 - others
    if gone <= 0:
        return
    least = "" if others == 0 else "At least "
    yield (
        f"{least}{_number(gone, 'frame')} of attempt {index} left the live window, the oldest first: it begins with"
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
