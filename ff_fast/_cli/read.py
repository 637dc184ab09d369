"""``ff-fast follow``, ``tail``, ``summary``, ``info`` and ``inspect``: commands that read an execution."""

from __future__ import annotations

import base64
import dataclasses
import shlex
import sys
from typing import TYPE_CHECKING

import orjson

from ff_fast import (
    AttemptNotFound,
    AttemptStarted,
    End,
    FFError,
    Gap,
    Snapshot,
    StreamFrame,
    TailVisibility,
    ValkeyBackend,
)
from ff_fast._cli.shared import (
    DONE,
    FAILED,
    add_url,
    complain,
    look_at,
    one_line,
    whole,
    write_json,
)
from ff_fast._core.explain import point_in_time

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable

    from ff_fast import ExecutionDescription
    from ff_fast._cli.shared import Commands
    from ff_fast._core.follow import Item


def _add_execution(parser: argparse.ArgumentParser, *, json: str, attempt: bool = True) -> None:
    parser.add_argument("execution_id", metavar="EXECUTION_ID", help="such as {fp:19}:134f58e2-...")
    if attempt:
        parser.add_argument(
            "--attempt", type=whole, metavar="N", help="attempt, from 0 (default: the newest)"
        )
    add_url(parser)
    parser.add_argument("--json", action="store_true", help=json)


def _add_choice(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--exclude-best-effort", action="store_true", help="durable and summary frames only"
    )
    parser.add_argument(
        "--type",
        action="append",
        metavar="TYPE",
        help="only frames of this type, as in --type token; may be repeated",
    )
    parser.add_argument(
        "--types",
        action="store_true",
        help="name the type of frames on stderr whenever it changes (a terminal shows it anyway)",
    )


def _attempt(backend: ValkeyBackend, arguments: argparse.Namespace) -> int:
    if arguments.attempt is not None:
        return int(arguments.attempt)
    return _newest(backend.describe(arguments.execution_id))


def _newest(execution: ExecutionDescription) -> int:
    # Before the first claim there is no attempt; its number is known all the same, and can be tailed.
    return execution.attempt_index or 0


# -- follow and tail -------------------------------------------------------------------------------


def add_follow(commands: Commands) -> None:
    parser = commands.add(
        follow,
        help_text="print what an execution streams in all its attempts, live, until it ends",
        description=(
            "Writes the payloads of an execution's frames to stdout, byte for byte. Starts of attempts,"
            " gaps and the end go to stderr."
        ),
    )
    _add_execution(parser, json="one JSON object a line for each item", attempt=False)
    parser.add_argument("--after", metavar="CURSOR", help="start after the item with this cursor")
    parser.add_argument(
        "--snapshot", action="store_true", help="begin with the newest summary document"
    )
    _add_choice(parser)


def follow(arguments: argparse.Namespace) -> int:
    with look_at(arguments) as backend:
        items = backend.follow(
            arguments.execution_id,
            arguments.after,
            snapshot=arguments.snapshot,
            visibility=_visibility(arguments),
        )
        _show(items, arguments, None)
    return DONE


def add_tail(commands: Commands) -> None:
    parser = commands.add(
        tail,
        help_text="print what an execution streams, live, until its end",
        description=(
            "Writes the payloads of an execution's frames to stdout, byte for byte. Gaps and the"
            " end go to stderr."
        ),
    )
    _add_execution(parser, json="one JSON object a line for each frame, gap and end")
    parser.add_argument("--after", metavar="CURSOR", help="start after this cursor or frame id")
    _add_choice(parser)


def tail(arguments: argparse.Namespace) -> int:
    with look_at(arguments) as backend:
        attempt = _attempt(backend, arguments)
        items = backend.tail(
            arguments.execution_id,
            attempt,
            after=arguments.after,
            visibility=_visibility(arguments),
        )
        _show(items, arguments, attempt)
    return DONE


def _visibility(arguments: argparse.Namespace) -> TailVisibility:
    if arguments.exclude_best_effort:
        return TailVisibility.EXCLUDE_BEST_EFFORT
    return TailVisibility.ALL


def _show(items: Iterable[Item], arguments: argparse.Namespace, attempt: int | None) -> None:
    """Show what is read, and say where to go on where that is broken off; *attempt* is the one that is read, if it is one."""
    only = None if arguments.type is None else frozenset(arguments.type)
    show = _show_json if arguments.json else _Text(types=arguments.types)
    cursor: str | None = arguments.after
    try:
        for item in items:
            if only is None or not isinstance(item, StreamFrame) or item.frame_type in only:
                show(item)
            cursor = item.cursor
    except (KeyboardInterrupt, FFError) as error:
        if isinstance(error, KeyboardInterrupt) or cursor != arguments.after:
            complain(f"go on with: {_again(arguments, cursor, attempt)}")
        raise


def _again(arguments: argparse.Namespace, cursor: str | None, attempt: int | None) -> str:
    """Return the command that continues after *cursor*."""
    options = [] if cursor is None else ["--after", cursor]
    if attempt is not None:
        options += ["--attempt", str(attempt)]
    for name in arguments.type or ():
        options += ["--type", name]
    for flag in ("json", "exclude_best_effort", "types"):
        if getattr(arguments, flag):
            options.append(f"--{flag.replace('_', '-')}")
    if arguments.url and "@" not in arguments.url:
        # Without a password in it.
        options += ["--url", arguments.url]
    command = arguments.run.__name__
    return shlex.join(["ff-fast", command, arguments.execution_id, *options])


class _Text:
    """Shows items as text: payloads on stdout, byte for byte, and all else on stderr.

    On a terminal, which shows both, a line of stderr begins a line.
    """

    def __init__(self, *, types: bool) -> None:
        self._terminal = sys.stdout.isatty()
        self._types = types or self._terminal
        self._type: str | None = None
        self._in_line = False

    def __call__(self, item: Item) -> None:
        if not isinstance(item, StreamFrame):
            self._break()
            _tell(item)
            return
        if self._types and item.frame_type != self._type:
            self._type = item.frame_type
            self._break()
            complain(f"type: {one_line(item.frame_type)}")
        out = sys.stdout.buffer
        out.write(item.payload)
        out.flush()
        if item.payload:
            self._in_line = not item.payload.endswith(b"\n")

    def _break(self) -> None:
        if self._terminal and self._in_line:
            sys.stdout.buffer.write(b"\n")
            sys.stdout.buffer.flush()
            self._in_line = False


def _tell(item: Gap | AttemptStarted | Snapshot | End) -> None:
    if isinstance(item, Gap):
        complain(f"gap: {_missing(item)} ({item.reason})")
    elif isinstance(item, AttemptStarted):
        complain(f"attempt: {item.attempt_index}")
    elif isinstance(item, Snapshot):
        sys.stdout.buffer.write(item.document_json + b"\n")
        complain(f"snapshot: version {item.version} of attempt {item.attempt_index}")
    else:
        error = "" if item.error is None else f" ({one_line(item.error)})"
        complain(f"end: {item.reason}{error}")


def _missing(gap: Gap) -> str:
    if gap.next_sequence <= gap.first_missing:
        # The cursor is beyond the log: after a failover, or from another stream.
        return f"the log ends at {gap.next_sequence - 1}, before {gap.first_missing - 1}"
    return f"{gap.first_missing} to {gap.next_sequence - 1} are missing"


def _show_json(item: Item) -> None:
    line: dict[str, object]
    if isinstance(item, StreamFrame):
        line = _frame_fields(item)
    elif isinstance(item, Gap):
        line = {
            "gap": item.reason,
            "first_missing": item.first_missing,
            "next_sequence": item.next_sequence,
        }
    elif isinstance(item, AttemptStarted):
        line = {"attempt": item.attempt_index}
    elif isinstance(item, Snapshot):
        line = {
            "snapshot": orjson.Fragment(item.document_json),
            "version": item.version,
            "attempt": item.attempt_index,
        }
    else:
        line = {"end": item.reason}
        if item.outcome is not None:
            line |= {"outcome": item.outcome, "error": item.error}
    write_json(line | {"cursor": item.cursor})


def _frame_fields(frame: StreamFrame) -> dict[str, object]:
    """Return a frame for JSON, with ``payload`` if it is UTF-8, else with ``payload_base64``."""
    line: dict[str, object] = {
        "stream_id": frame.stream_id,
        "sequence": frame.sequence,
        "mode": frame.mode,
        "frame_type": frame.frame_type,
        "ts_ms": frame.ts_ms,
    }
    try:
        line["payload"] = frame.payload.decode("utf-8")
    except UnicodeDecodeError:
        line["payload_base64"] = base64.b64encode(frame.payload).decode("ascii")
    if frame.encoding != "utf8":
        line["encoding"] = frame.encoding
    if frame.source != "worker":
        line["source"] = frame.source
    if frame.correlation_id is not None:
        line["correlation_id"] = frame.correlation_id
    if frame.summary_version is not None:
        line["summary_version"] = frame.summary_version
    if frame.patch_kind is not None:
        line["patch_kind"] = frame.patch_kind.wire
        if frame.patch_kind.pointer is not None:
            line["pointer"] = frame.patch_kind.pointer
    return line


# -- summary ---------------------------------------------------------------------------------------


def add_summary(commands: Commands) -> None:
    parser = commands.add(
        summary,
        help_text="print the summary document of an execution",
        description="Prints the rolling summary of an execution as JSON.",
    )
    _add_execution(parser, json="the document with its version, times and cursor")


def summary(arguments: argparse.Namespace) -> int:
    with look_at(arguments) as backend:
        attempt = _attempt(backend, arguments)
        document = backend.read_summary(arguments.execution_id, attempt)
    if document is None:
        complain(f"Attempt {attempt} has no summary.")
        return FAILED
    text = document.document_json
    if arguments.json:
        fields = {
            "version": document.version,
            "cursor": document.cursor,
            "first_applied_ms": document.first_applied_ms,
            "last_updated_ms": document.last_updated_ms,
            # Not parsed: that would change numbers of great size or precision.
            "document": orjson.Fragment(text),
        }
        text = orjson.dumps(fields)
    sys.stdout.buffer.write(text + b"\n")
    return DONE


# -- info ------------------------------------------------------------------------------------------


def _when(ms: int | None) -> str | None:
    return None if ms is None else point_in_time(ms)


def add_info(commands: Commands) -> None:
    parser = commands.add(
        info,
        help_text="print the state of an execution, its lease and its stream",
        description="Prints the state of an execution, of its lease and of one attempt's stream.",
    )
    _add_execution(parser, json="one JSON object")


def info(arguments: argparse.Namespace) -> int:
    eid = arguments.execution_id
    with look_at(arguments) as backend:
        execution = backend.describe(eid)
        attempts = execution.attempt_count
        fields: dict[str, object] = {
            "execution_id": execution.execution_id,
            "state": execution.state,
            "outcome": execution.outcome,
            "failure": execution.failure_reason,
            "lane": execution.lane,
            "namespace": execution.namespace,
            "priority": execution.priority,
            "created": _when(execution.created_at_ms),
            "started": _when(execution.started_at_ms),
            "finished": _when(execution.finished_at_ms),
            "attempts": attempts,
        }
        if execution.state == "active":
            fields |= {
                "worker": execution.worker_instance_id,
                "lease_epoch": execution.lease_epoch,
            }
        if attempts or arguments.attempt is not None:
            attempt = _newest(execution) if arguments.attempt is None else arguments.attempt
            if attempt >= max(attempts, 1):
                raise AttemptNotFound
            stream = backend.describe_stream(eid, attempt)
            left, closed_reason = stream.lease_left, stream.closed_reason
            if left is not None:
                fields["lease_left_s"] = round(left, 1)
                if left == 0 and closed_reason is None:
                    # Readers are told so, although no supervisor has ended the attempt yet.
                    closed_reason = "producer_lost"
            summary = backend.read_summary(eid, attempt)
            ends = {each.attempt_index: each.error for each in execution.attempts}
            fields |= {
                "attempt": attempt,
                "frames": stream.frame_count,
                "log_entries": stream.log_entries,
                "live_entries": stream.live_entries,
                "last_id": stream.last_id,
                "closed_reason": closed_reason,
                "error": ends.get(attempt),
                "summary_version": stream.summary_version or None,
                "summary_bytes": len(summary.document_json) if summary else None,
            }
    if arguments.json:
        write_json(fields)
        return DONE
    for name, value in fields.items():
        if value is not None:
            print(f"{name.replace('_', ' '):<22}{one_line(value)}")
    return DONE


# -- inspect ---------------------------------------------------------------------------------------


def add_inspect(commands: Commands) -> None:
    parser = commands.add(
        inspect,
        help_text="print everything about an execution as JSON: state, attempts, streams, history",
        description="Prints an execution as one JSON object, without payloads and secrets.",
    )
    parser.add_argument("execution_id", metavar="EXECUTION_ID")
    add_url(parser)


def inspect(arguments: argparse.Namespace) -> int:
    eid = arguments.execution_id
    with look_at(arguments) as backend:
        execution = backend.describe(eid)
        ends = {each.attempt_index: each for each in execution.attempts}
        attempts = []
        for index in range(execution.attempt_count):
            stream = backend.describe_stream(eid, index)
            attempts.append(
                {
                    "attempt": index,
                    "frames": stream.frame_count,
                    "last_id": stream.last_id,
                    "log_entries": stream.log_entries,
                    "live_entries": stream.live_entries,
                    "summary_version": stream.summary_version,
                    "closed_reason": stream.closed_reason,
                    "lease_left": stream.lease_left,
                    "error": ends[index].error if index in ends else None,
                    "failure_class": ends[index].failure_class if index in ends else None,
                }
            )
    everything = {**dataclasses.asdict(execution), "attempts": attempts}
    everything["required_capabilities"] = execution.required_capabilities.tokens
    everything["retries_left"] = execution.retries_left
    if execution.failure_detail is not None:
        everything["failure_detail"] = execution.failure_detail.decode("utf-8", "replace")
    write_json(everything, orjson.OPT_INDENT_2)
    return DONE
