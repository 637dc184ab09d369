"""``ff-fast ls``, ``why``, ``doctor`` and ``acl``: commands of those who look after a deployment."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from ff_fast import FailureClass, InvalidInput
from ff_fast._cli.shared import DONE, FAILED, add_url, counted, look_at, one_line, pair, write_json
from ff_fast._core.explain import signal_text
from ff_fast._core.operations import STATES
from ff_fast._core.roles import ROLES, acl_line

if TYPE_CHECKING:
    import argparse

    from ff_fast import ExecutionSummary
    from ff_fast._cli.shared import Commands

_PAGE = 500


# -- why --------------------------------------------------------------------------------------------


def add_why(commands: Commands) -> None:
    parser = commands.add(
        why,
        help_text="tell the history of an execution: why it failed, who has it, where its frames are",
        description=(
            "Tells when an execution was created and claimed, why its attempts ended, who holds its lease or what"
            " it waits for, and by which rule frames have left its streams."
        ),
    )
    parser.add_argument("execution_id", metavar="EXECUTION_ID")
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="one JSON list of sentences")


def why(arguments: argparse.Namespace) -> int:
    with look_at(arguments) as backend:
        told = backend.explain(arguments.execution_id)
    if arguments.json:
        write_json(told)
    else:
        for sentence in told:
            print(one_line(sentence))
    return DONE


# -- doctor -----------------------------------------------------------------------------------------


def add_doctor(commands: Commands) -> None:
    parser = commands.add(
        doctor,
        help_text="check server, persistence, library, clock, supervision and rights",
        description=(
            "Checks the deployment and the rights of the user that the URL names. It changes nothing, and exits with 1"
            " if a check has failed."
        ),
    )
    parser.add_argument(
        "--role",
        choices=ROLES,
        metavar="ROLE",
        help=f"the part that the user plays: {', '.join(ROLES)}",
    )
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def doctor(arguments: argparse.Namespace) -> int:
    with look_at(arguments) as backend:
        found = backend.diagnose(role=arguments.role)
    for each in found:
        if arguments.json:
            write_json(plain(each))
        else:
            print(f"{each.level:<8} {each.check:<12} {one_line(each.text)}")
    return FAILED if any(each.level == "failed" for each in found) else DONE


# -- acl --------------------------------------------------------------------------------------------


def add_acl(commands: Commands) -> None:
    parser = commands.add(
        acl,
        help_text="print the ACL line of a user for a role",
        description=(
            "Prints what a server has to be told to make a user with the rights of a role, and no others. With several"
            " roles it is one user for all of them; without a role there is one for each. Add 'on' and a password."
        ),
    )
    parser.add_argument("roles", nargs="*", metavar="ROLE", help=", ".join(ROLES))
    parser.add_argument("--user", metavar="NAME", help="name of the user (default: ff_ROLE)")
    parser.add_argument("--cluster", action="store_true", help="of a cluster, for each node")


def acl(arguments: argparse.Namespace) -> int:
    given = arguments.roles
    if unknown := [name for name in given if name not in ROLES]:
        raise InvalidInput(f"There is no role {unknown[0]}. The roles are {', '.join(ROLES)}.")
    if not given and arguments.user:
        raise InvalidInput("Name the roles of the user.")
    for names in [given] if given else [[name] for name in ROLES]:
        print(acl_line(names, arguments.user, cluster=arguments.cluster))
    return DONE


# -- ls ---------------------------------------------------------------------------------------------


def add_ls(commands: Commands) -> None:
    parser = commands.add(
        ls,
        help_text="list executions, the newest first",
        description=(
            "Lists executions, the newest first: by the time of their end, or of their creation while they have"
            " not ended. Executions that have ended are listed for a day at most."
        ),
    )
    parser.add_argument("--lane", metavar="LANE", help="only of this lane")
    parser.add_argument("--state", choices=STATES, metavar="STATE", help=", ".join(STATES))
    parser.add_argument("--namespace", metavar="NAME", help="only of this namespace")
    parser.add_argument("--tag", type=pair, metavar="TAG=VALUE", help="only those with this tag")
    parser.add_argument(
        "--count", type=counted, default=20, metavar="N", help="at most so many (default: 20)"
    )
    add_url(parser)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")


def ls(arguments: argparse.Namespace) -> int:
    left, after = arguments.count, None
    with look_at(arguments) as backend:
        while left:
            page = backend.list_executions(
                lane=arguments.lane,
                state=arguments.state,
                namespace=arguments.namespace,
                tag=arguments.tag,
                after=after,
                count=min(left, _PAGE),
            )
            for each in page.items:
                if arguments.json:
                    write_json(plain(each))
                else:
                    print(_line(each))
            left, after = left - len(page.items), page.next
            if after is None:
                break
    return DONE


def plain(value: object) -> dict[str, object]:
    """Return a value as JSON takes it."""
    fields = dataclasses.asdict(value)  # type: ignore[call-overload]
    return {
        name: each.value if isinstance(each, FailureClass) else each
        for name, each in fields.items()
    }


def _line(each: ExecutionSummary) -> str:
    at_ms = each.finished_at_ms or each.created_at_ms
    told = (
        f"{each.state:<16} {age(at_ms):>5} {one_line(each.lane) or '-':<12} {each.execution_id}"
        f" {_remark(each)}"
    )
    return told.rstrip()


def age(ms: int) -> str:
    """Return how long ago a time was, such as ``14m``, by the clock of this machine."""
    seconds = max(time.time() - ms / 1000, 0)
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds >= size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def _remark(each: ExecutionSummary) -> str:
    """Return what matters most about an execution in its state."""
    if each.state == "active":
        return f"worker {one_line(each.worker_instance_id)}, attempt {each.attempt_index}"
    if each.state == "suspended":
        signals = ", ".join(map(signal_text, each.waiting_for))
        return f"waits for {one_line(signals or each.suspension_reason or 'signals')}"
    if each.state == "delayed" and each.error is None:
        return f"until {until(each.due_at_ms)}"
    if each.error is not None:
        return one_line(each.error)[:100]
    return ""


def until(ms: int | None) -> str:
    """Return how long it is until a time."""
    return "-" if ms is None else f"{max(ms / 1000 - time.time(), 0):.1f}s from now"
