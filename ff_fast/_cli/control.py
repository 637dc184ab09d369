"""``ff-fast submit``, ``signal``, ``cancel`` and ``supervise``: commands that change executions."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ff_fast import InvalidInput, PendingWaitpoint, RetryPolicy, ScannerFilter, WaitpointHmac
from ff_fast._cli.shared import (
    DONE,
    FAILED,
    MAX_SECONDS,
    TOKEN_VARIABLE,
    add_url,
    complain,
    connect,
    number,
    pair,
    whole,
)

if TYPE_CHECKING:
    import argparse

    from ff_fast._cli.shared import Commands

# -- submit ----------------------------------------------------------------------------------------


def add_submit(commands: Commands) -> None:
    parser = commands.add(
        submit,
        help_text="create an execution and print its id",
        description="Creates an execution. Its payload is PAYLOAD, or what stdin holds.",
    )
    parser.add_argument("payload", nargs="?", help="text for the worker (default: stdin)")
    parser.add_argument("--lane", default="default", metavar="LANE", help="lane (default: default)")
    parser.add_argument("--handler", metavar="NAME", help="name of the handler that runs it")
    parser.add_argument("--namespace", default="default", metavar="NAME", help="tenant")
    parser.add_argument("--priority", type=whole, default=0, metavar="N", help="0 to 9000")
    parser.add_argument(
        "--delay", type=number(0, MAX_SECONDS), metavar="S", help="seconds before it can be claimed"
    )
    parser.add_argument(
        "--retries", type=whole, default=0, metavar="N", help="retries of a failed attempt"
    )
    parser.add_argument(
        "--tag", type=pair, action="append", metavar="TAG=VALUE", help="a tag; may be repeated"
    )
    add_url(parser)


def submit(arguments: argparse.Namespace) -> int:
    payload = arguments.payload
    if payload is None:
        if sys.stdin.isatty():
            complain("The payload is read from here; end it with Ctrl-D on a line of its own.")
        payload = sys.stdin.buffer.read()
    else:
        # Bytes of the command line that are no text stay what they are.
        payload = payload.encode("utf-8", "surrogateescape")
    with connect(arguments) as backend:
        execution_id = backend.create_execution(
            lane=arguments.lane,
            payload=payload,
            namespace=arguments.namespace,
            priority=arguments.priority,
            delay=arguments.delay,
            retry=RetryPolicy(max_retries=arguments.retries),
            tags=dict(arguments.tag or ()),
            handler=arguments.handler,
        )
    print(execution_id)
    return DONE


# -- signal ----------------------------------------------------------------------------------------


def add_signal(commands: Commands) -> None:
    parser = commands.add(
        signal,
        help_text="deliver a signal to a waitpoint of a suspended execution",
        description=(
            "Delivers a signal. The waitpoint's token is a secret: it is read from the environment"
            f" variable {TOKEN_VARIABLE}, never from the command line."
        ),
    )
    parser.add_argument("execution_id", metavar="EXECUTION_ID")
    parser.add_argument("waitpoint_id", metavar="WAITPOINT_ID")
    parser.add_argument("name", metavar="NAME", help="name of the signal")
    parser.add_argument("--payload", metavar="TEXT", help="text for the resumed worker")
    parser.add_argument(
        "--idempotency-key",
        default="",
        metavar="KEY",
        help="signals with the same key are delivered once",
    )
    parser.add_argument("--correlation-id", default="", metavar="ID", help="correlation id")
    add_url(parser)


def signal(arguments: argparse.Namespace) -> int:
    token = os.environ.get(TOKEN_VARIABLE)
    if not token:
        raise InvalidInput(f"Put the waitpoint's token into the environment as {TOKEN_VARIABLE}.")
    waitpoint = PendingWaitpoint(arguments.waitpoint_id, WaitpointHmac(token))
    with connect(arguments) as backend:
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
    if outcome.effect.startswith("signal_ignored"):
        complain(
            "Nothing at this waitpoint waits for a signal of this name, so it has changed nothing; `ff-fast inspect` shows"
            " what the execution waits for."
        )
        return FAILED
    return DONE


# -- cancel ----------------------------------------------------------------------------------------


def add_cancel(commands: Commands) -> None:
    parser = commands.add(
        cancel,
        help_text="cancel an execution",
        description="Cancels an execution. With --grace its worker is asked to stop first.",
    )
    parser.add_argument("execution_id", metavar="EXECUTION_ID")
    parser.add_argument("--reason", default="cancelled", metavar="TEXT", help="why")
    parser.add_argument(
        "--grace", type=number(0, MAX_SECONDS), metavar="S", help="seconds that the worker has"
    )
    add_url(parser)


def cancel(arguments: argparse.Namespace) -> int:
    with connect(arguments) as backend:
        outcome = backend.cancel(
            arguments.execution_id, reason=arguments.reason, grace=arguments.grace
        )
    print("cancelled" if outcome.cancelled else "requested")
    return DONE


# -- supervise -------------------------------------------------------------------------------------


def add_supervise(commands: Commands) -> None:
    parser = commands.add(
        supervise,
        help_text="fire due timers until Ctrl-C; a deployment needs at least one supervisor",
        description=(
            "Brings back executions whose worker was lost, and fires delays, timeouts, deadlines"
            " and cancellations when they are due. Any number may run at once."
        ),
    )
    parser.add_argument("--namespace", metavar="NAME", help="only executions of this namespace")
    parser.add_argument(
        "--tag", type=pair, metavar="TAG=VALUE", help="only executions with this tag"
    )
    add_url(parser)


def supervise(arguments: argparse.Namespace) -> int:
    scope = ScannerFilter(namespace=arguments.namespace, instance_tag=arguments.tag)
    with connect(arguments) as backend:
        backend.supervise(scope)
    return DONE
