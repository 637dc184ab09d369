"""The command ``ff-fast``: a demo, and a look at what any execution of a server streams."""

from __future__ import annotations

import argparse
import base64
import contextlib
import dataclasses
import math
import os
import sys
import time
from typing import TYPE_CHECKING

import orjson

from ff_fast import (
    AttemptNotFound,
    End,
    FFError,
    Gap,
    InvalidInput,
    PendingWaitpoint,
    RetryPolicy,
    ScannerFilter,
    StreamFrame,
    TailVisibility,
    ValkeyBackend,
    WaitpointHmac,
    __version__,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import NoReturn

    from ff_fast import ExecutionDescription

URL_VARIABLE = "FF_FAST_URL"
TOKEN_VARIABLE = "FF_FAST_TOKEN"  # noqa: S105 - the name of a variable

_USAGE = 2
_FAILED = 1
_INTERRUPTED = 130
_BROKEN_PIPE = 141


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as every other error of the command."""

    def error(self, message: str) -> NoReturn:
        _complain(f"{message} (see {self.prog} --help)")
        raise SystemExit(_USAGE)


def _complain(sentence: str) -> None:
    print(f"ff-fast: {sentence}", file=sys.stderr)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with *argv* (``sys.argv`` where None) and return its exit code.

    Returns:
        0; 1 where the server or the demo says no; 2 where the arguments are not accepted; 130 after
        a Ctrl-C; 141 where the reader of the output has gone.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
        sys.stdout.flush()
    except InvalidInput as error:
        _complain(str(error))
        return _USAGE
    except FFError as error:
        _complain(str(error))
        return _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes once more at its end, and would complain.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return code


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="ff-fast",
        description="Streams LLM tokens from workers to readers through Valkey.",
        epilog="Exit codes: 0 done; 1 the server refused or something differs; 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"ff-fast {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    demo = commands.add_parser(
        "demo",
        help="stream a text from a worker to a reader and compare every byte",
        description=(
            "A worker process streams a text in three modes at once, a reader process tails it, and"
            " what arrived is compared with what was sent. Without --url on a private server that"
            " is gone afterwards."
        ),
    )
    demo.add_argument(
        "--rate",
        type=_number(1, 100_000),
        default=1000.0,
        metavar="HZ",
        help="tokens a second (default: 1000)",
    )
    demo.add_argument(
        "--seconds",
        type=_number(0.01, 3600),
        default=6.0,
        metavar="S",
        help="how long to stream; the text starts again when it is over (default: 6)",
    )
    demo.add_argument(
        "--modes",
        type=_modes,
        default=None,
        metavar="MODE,...",
        help="only some of: best-effort, summary, durable (default: all)",
    )
    demo.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")
    demo.add_argument("--url", metavar="URL", help="server to stream through")
    demo.set_defaults(command=_demo)

    tail = commands.add_parser(
        "tail",
        help="print what an execution streams, live, until its end",
        description=(
            "Writes the payloads of an execution's frames to stdout as they are; gaps and the end"
            " go to stderr."
        ),
    )
    _execution_arguments(tail)
    tail.add_argument(
        "--after", metavar="CURSOR", help="start behind this frame id or summary cursor"
    )
    tail.add_argument(
        "--exclude-best-effort", action="store_true", help="durable and summary frames only"
    )
    tail.add_argument(
        "--type",
        action="append",
        metavar="TYPE",
        help="only frames of this type, as in --type token; may be repeated",
    )
    _json_argument(tail, "one JSON object a line for each frame, gap and end")
    tail.set_defaults(command=_tail)

    summary = commands.add_parser(
        "summary",
        help="print the summary document of an execution",
        description="Prints the rolling summary of an execution as JSON.",
    )
    _execution_arguments(summary)
    _json_argument(summary, "the document with its version, times and cursor")
    summary.set_defaults(command=_summary)

    info = commands.add_parser(
        "info",
        help="print the state of an execution, its lease and its stream",
        description="Prints the state of an execution, of its lease and of its streams.",
    )
    _execution_arguments(info)
    _json_argument(info, "one JSON object")
    info.set_defaults(command=_info)

    supervise = commands.add_parser(
        "supervise",
        help="fire what is due, until a Ctrl-C; a deployment needs one of these",
        description=(
            "Brings back executions whose worker was lost, and fires delays, timeouts, deadlines"
            " and cancellations when they are due. Any number may run at once."
        ),
    )
    supervise.add_argument("--namespace", metavar="NAME", help="only executions of this namespace")
    supervise.add_argument(
        "--tag", type=_pair, metavar="TAG=VALUE", help="only executions with this tag"
    )
    _url_argument(supervise)
    supervise.set_defaults(command=_supervise)
    _work_commands(commands)
    return parser


def _work_commands(commands: argparse._SubParsersAction[_Parser]) -> None:
    """The commands that create, look into, signal and cancel executions."""
    submit = commands.add_parser(
        "submit",
        help="create an execution and print its id",
        description="Creates an execution with a payload, or with what stdin holds.",
    )
    submit.add_argument("payload", nargs="?", help="text for the worker (default: stdin)")
    submit.add_argument("--lane", default="default", metavar="LANE", help="lane (default: default)")
    submit.add_argument("--namespace", default="default", metavar="NAME", help="tenant")
    submit.add_argument("--priority", type=_whole, default=0, metavar="N", help="0 to 9000")
    submit.add_argument(
        "--delay", type=_number(0, 31_536_000), metavar="S", help="seconds before it can be claimed"
    )
    submit.add_argument(
        "--retries", type=_whole, default=0, metavar="N", help="retries of a failed attempt"
    )
    submit.add_argument(
        "--tag", type=_pair, action="append", metavar="TAG=VALUE", help="a tag; may be repeated"
    )
    _url_argument(submit)
    submit.set_defaults(command=_submit)

    inspect = commands.add_parser(
        "inspect",
        help="print everything of an execution as JSON: state, attempts, streams, history",
        description="Prints an execution as one JSON object, without payloads and secrets.",
    )
    inspect.add_argument("execution_id", metavar="EXECUTION_ID")
    _url_argument(inspect)
    inspect.set_defaults(command=_inspect)

    signal = commands.add_parser(
        "signal",
        help="deliver a signal to a waitpoint of a suspended execution",
        description=(
            "Delivers a signal. The waitpoint's token is a secret: it is read from the environment"
            f" variable {TOKEN_VARIABLE}, never from the command line."
        ),
    )
    signal.add_argument("execution_id", metavar="EXECUTION_ID")
    signal.add_argument("waitpoint_id", metavar="WAITPOINT_ID")
    signal.add_argument("name", metavar="NAME", help="name of the signal")
    signal.add_argument("--payload", metavar="TEXT", help="what the resumed worker gets")
    signal.add_argument("--idempotency-key", default="", metavar="KEY", help="delivered once a key")
    signal.add_argument("--correlation-id", default="", metavar="ID", help="correlation id")
    _url_argument(signal)
    signal.set_defaults(command=_signal)

    cancel = commands.add_parser(
        "cancel",
        help="cancel an execution",
        description="Cancels an execution; with a grace its worker is asked to stop first.",
    )
    cancel.add_argument("execution_id", metavar="EXECUTION_ID")
    cancel.add_argument("--reason", default="cancelled", metavar="TEXT", help="why")
    cancel.add_argument(
        "--grace", type=_number(0, 31_536_000), metavar="S", help="seconds that the worker has"
    )
    _url_argument(cancel)
    cancel.set_defaults(command=_cancel)


def _execution_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("execution_id", metavar="EXECUTION_ID", help="as {fp:19}:134f58e2-...")
    parser.add_argument(
        "--attempt", type=_whole, metavar="N", help="attempt, from 0 (default: the newest)"
    )
    _url_argument(parser)


def _url_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--url",
        metavar="URL",
        help=f"the server, as valkey://host:6379; default: ${URL_VARIABLE}, which other users of"
        " the machine cannot see",
    )


def _json_argument(parser: argparse.ArgumentParser, text: str) -> None:
    parser.add_argument("--json", action="store_true", help=text)


def _number(low: float, high: float) -> Callable[[str], float]:
    def parse(text: str) -> float:
        with contextlib.suppress(ValueError):
            value = float(text)
            if math.isfinite(value) and low <= value <= high:
                return value
        raise argparse.ArgumentTypeError(f"must be a number from {low:g} to {high:g}")

    return parse


def _whole(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise argparse.ArgumentTypeError("must be a whole number from 0")
    return int(text)


def _pair(text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError("must be TAG=VALUE")
    return name, value


def _modes(text: str) -> tuple[str, ...]:
    known = ("best-effort", "summary", "durable")
    given = set(text.split(","))
    if not given <= set(known):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(known)}, with commas")
    return tuple(mode for mode in known if mode in given)


def _url(arguments: argparse.Namespace) -> str:
    url: str | None = arguments.url or os.environ.get(URL_VARIABLE)
    if not url:
        raise InvalidInput(f"Name the server with --url, or in {URL_VARIABLE}.")
    return url


# -- demo ------------------------------------------------------------------------------------------


def _demo(arguments: argparse.Namespace) -> int:
    # Its processes and asyncio are nothing that the other commands need.
    from ff_fast import demo  # noqa: PLC0415

    count = max(round(arguments.rate * arguments.seconds), 1)
    if count > demo.MAX_TOKENS:
        raise InvalidInput(
            f"--rate times --seconds is {count} tokens; the demo keeps at most {demo.MAX_TOKENS}."
        )
    plan = demo.Plan(arguments.rate, count, arguments.modes or demo.MODES)
    view = demo.choose_view(plain=arguments.plain)
    if arguments.url:
        differences = demo.run(arguments.url, plan, view)
    else:
        from ff_fast.embedded import EmbeddedServer  # noqa: PLC0415

        with EmbeddedServer() as server:
            differences = demo.run(server.url, plan, view)
    for sentence in differences:
        _complain(sentence)
    return _FAILED if differences else 0


# -- tail ------------------------------------------------------------------------------------------


def _tail(arguments: argparse.Namespace) -> int:
    only = None if arguments.type is None else frozenset(arguments.type)
    visibility = (
        TailVisibility.EXCLUDE_BEST_EFFORT if arguments.exclude_best_effort else TailVisibility.ALL
    )
    show = _show_json if arguments.json else _show_text
    with ValkeyBackend.connect(_url(arguments)) as backend:
        attempt = _attempt(backend, arguments)
        items = backend.tail(
            arguments.execution_id, attempt, after=arguments.after, visibility=visibility
        )
        for item in items:
            if only is None or not isinstance(item, StreamFrame) or item.frame_type in only:
                show(item)
    return 0


def _attempt(backend: ValkeyBackend, arguments: argparse.Namespace) -> int:
    if arguments.attempt is not None:
        return int(arguments.attempt)
    # Before the first claim there is none, and the first one can be waited for.
    return _newest(backend.describe(arguments.execution_id))


def _newest(execution: ExecutionDescription) -> int:
    return execution.attempt_index or 0


def _show_text(item: StreamFrame | Gap | End) -> None:
    if isinstance(item, StreamFrame):
        out = sys.stdout.buffer
        out.write(item.payload)
        out.flush()
    elif isinstance(item, Gap):
        _complain(f"gap: {_missing(item)} ({item.reason})")
    else:
        _complain(f"end: {item.reason}")


def _missing(gap: Gap) -> str:
    if gap.next_sequence <= gap.first_missing:
        # The log ends before the cursor: a failover, or an id of somewhere else.
        return f"the log ends at {gap.next_sequence - 1}, before {gap.first_missing - 1}"
    return f"{gap.first_missing} to {gap.next_sequence - 1} are missing"


def _show_json(item: StreamFrame | Gap | End) -> None:
    line: dict[str, object]
    if isinstance(item, StreamFrame):
        line = _frame_fields(item)
    elif isinstance(item, Gap):
        line = {
            "gap": item.reason,
            "first_missing": item.first_missing,
            "next_sequence": item.next_sequence,
        }
    else:
        line = {"end": item.reason}
    out = sys.stdout.buffer
    out.write(orjson.dumps(line) + b"\n")
    out.flush()


def _frame_fields(frame: StreamFrame) -> dict[str, object]:
    """A frame as JSON: its payload as ``payload`` where it is text, else as ``payload_base64``."""
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


def _summary(arguments: argparse.Namespace) -> int:
    with ValkeyBackend.connect(_url(arguments)) as backend:
        attempt = _attempt(backend, arguments)
        document = backend.read_summary(arguments.execution_id, attempt)
    if document is None:
        _complain(f"Attempt {attempt} has no summary.")
        return _FAILED
    text = document.document_json
    if arguments.json:
        fields = {
            "version": document.version,
            "cursor": document.cursor,
            "first_applied_ms": document.first_applied_ms,
            "last_updated_ms": document.last_updated_ms,
            # As it is: numbers of any size and precision would not survive a conversion.
            "document": orjson.Fragment(text),
        }
        text = orjson.dumps(fields)
    sys.stdout.buffer.write(text + b"\n")
    return 0


# -- info ------------------------------------------------------------------------------------------


def _info(arguments: argparse.Namespace) -> int:
    eid = arguments.execution_id
    with ValkeyBackend.connect(_url(arguments)) as backend:
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
                    # What every reader is told, although nobody has written it down yet.
                    closed_reason = "producer_lost"
            summary = backend.read_summary(eid, attempt)
            fields |= {
                "attempt": attempt,
                "frames": stream.frame_count,
                "log_entries": stream.log_entries,
                "live_entries": stream.live_entries,
                "last_id": stream.last_id,
                "closed_reason": closed_reason,
                "summary_version": stream.summary_version or None,
                "summary_bytes": len(summary.document_json) if summary else None,
            }
    if arguments.json:
        sys.stdout.buffer.write(orjson.dumps(fields) + b"\n")
        return 0
    for name, value in fields.items():
        if value is not None:
            print(f"{name.replace('_', ' '):<22}{_one_line(value)}")
    return 0


def _one_line(value: object) -> str:
    """Text of a worker or a caller, without what a terminal would obey."""
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in str(value))


def _when(ms: int | None) -> str | None:
    if ms is None:
        return None
    at = time.gmtime(ms // 1000)
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', at)}.{ms % 1000:03d}Z"


# -- supervise -------------------------------------------------------------------------------------


def _supervise(arguments: argparse.Namespace) -> int:
    scope = ScannerFilter(namespace=arguments.namespace, instance_tag=arguments.tag)
    with ValkeyBackend.connect(_url(arguments)) as backend:
        backend.supervise(scope)
    return 0


# -- executions ------------------------------------------------------------------------------------


def _submit(arguments: argparse.Namespace) -> int:
    payload = sys.stdin.buffer.read() if arguments.payload is None else arguments.payload
    with ValkeyBackend.connect(_url(arguments)) as backend:
        execution_id = backend.create_execution(
            lane=arguments.lane,
            payload=payload,
            namespace=arguments.namespace,
            priority=arguments.priority,
            delay=arguments.delay,
            retry=RetryPolicy(max_retries=arguments.retries),
            tags=dict(arguments.tag or ()),
        )
    print(execution_id)
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    eid = arguments.execution_id
    with ValkeyBackend.connect(_url(arguments)) as backend:
        execution = backend.describe(eid)
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
                }
            )
    everything = {**dataclasses.asdict(execution), "attempts": attempts}
    everything["required_capabilities"] = execution.required_capabilities.tokens
    everything["retries_left"] = execution.retries_left
    if execution.failure_detail is not None:
        everything["failure_detail"] = execution.failure_detail.decode("utf-8", "replace")
    sys.stdout.buffer.write(orjson.dumps(everything, option=orjson.OPT_INDENT_2) + b"\n")
    return 0


def _signal(arguments: argparse.Namespace) -> int:
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise InvalidInput(f"Put the waitpoint's token into the environment as {TOKEN_VARIABLE}.")
    waitpoint = PendingWaitpoint(arguments.waitpoint_id, WaitpointHmac(token))
    with ValkeyBackend.connect(_url(arguments)) as backend:
        outcome = backend.deliver_signal(
            arguments.execution_id,
            waitpoint,
            arguments.name,
            payload=arguments.payload,
            idempotency_key=arguments.idempotency_key,
            correlation_id=arguments.correlation_id,
            source_type="cli",
        )
    print(f"{outcome.signal_id} {'duplicate' if outcome.duplicate else outcome.effect}")
    return 0


def _cancel(arguments: argparse.Namespace) -> int:
    with ValkeyBackend.connect(_url(arguments)) as backend:
        outcome = backend.cancel(
            arguments.execution_id, reason=arguments.reason, grace=arguments.grace
        )
    print("cancelled" if outcome.cancelled else "requested")
    return 0
