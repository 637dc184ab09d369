"""The state of a deployment, as one look at it tells."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ff_fast import _library, keys
from ff_fast._core import ops
from ff_fast._core.deployment import PERSISTENCE, is_older
from ff_fast._core.roles import ROLES, Role
from ff_fast._core.steps import Command, Step, Steps, checked, command, time_ms
from ff_fast._hot.resp import pack_command
from ff_fast.errors import FFError
from ff_fast.types import Finding

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ff_fast._core.deployment import Deployment

_OVERDUE_MS = 10_000
_SKEW_MS = 1_000
_TIME = pack_command(b"TIME")
_READING = ("+get", "+exists", "+hgetall")
_WRITING = ("+set", "+hset", "+pexpire")
_UNTOLD = ": this user may not ask (INFO), or the server is embedded."
_SOMEWHERE = "{fp:0}:0"
"""What stands for the wildcard of a pattern where the right to a key is asked for."""


def diagnose(
    on: Deployment, roles: Sequence[str], required: str | None
) -> Steps[tuple[Finding, ...]]:
    """Look at everything; *required* is the role that the user must have."""
    rights = {name: _rights(ROLES[name]) for name in roles}
    # What is refused would fill the server's log of violations.
    asked = [f"zrangebyscore ff:idx:{_SOMEWHERE}:timers", f"get {keys.supervisor().decode()}"]
    asked += [question for each in rights.values() for _, question in each]
    held = yield from ops.call(ops.version((keys.PARTITIONS_CONFIG,), asked))
    may_look, may_read_mark, granted = held.rights[:1], held.rights[1:2] == "1", held.rights[2:]
    began = time.time()
    (told,) = yield Step((Command(keys.PARTITIONS_CONFIG, _TIME),))
    ended = time.time()
    found = [*_server(held)]
    found += yield from _persistence(held)
    found += _library_of(held, on.partitions)
    now_ms: int | None = None
    if isinstance(told, Exception):
        found.append(Finding("clock", "unknown", "This user may not ask for the server's time."))
    else:
        now_ms = time_ms(told)
        found.append(_clock(now_ms, began, ended))
    if now_ms is None or may_look != "1":
        found.append(Finding("supervisor", "unknown", "This user may not read timers."))
    else:
        marked: bytes | None = None
        if may_read_mark:
            (mark,) = yield Step((command(b"GET", keys.supervisor()),))
            if not isinstance(mark, Exception):
                marked = mark if isinstance(mark, bytes) else b""
        found.append((yield from _supervisor(on.partitions, now_ms, marked)))
    found += _roles(rights, granted, required)
    return tuple(found)


# -- the server ------------------------------------------------------------------------------------


def _server(held: ops.Version) -> Iterator[Finding]:
    if not held.engine:
        yield Finding("server", "unknown", f"Its version is not told{_UNTOLD}")
    elif is_older(held.engine):
        yield Finding("server", "warning", f"{held.engine}. Use Valkey 7.2 or newer.")
    else:
        yield Finding("server", "ok", f"{held.engine}.")
    policy = held.eviction_policy
    if policy.startswith("allkeys"):
        yield Finding(
            "memory",
            "failed",
            f"maxmemory-policy is {policy}: a full server deletes frames, leases and executions. Set it to noeviction.",
        )
    elif policy.startswith("volatile"):
        yield Finding(
            "memory",
            "warning",
            f"maxmemory-policy is {policy}: a full server deletes what has a time to live, such as the live windows of"
            " running streams, and results that are kept. Set it to noeviction.",
        )
    elif held.engine or policy:
        text = f"maxmemory-policy is {policy}." if policy else "maxmemory is not set."
        yield Finding("memory", "ok", text)
    else:
        yield Finding("memory", "unknown", f"Its limit is not told{_UNTOLD}")


def _persistence(held: ops.Version) -> Steps[list[Finding]]:
    if held.settings:
        (settings,) = yield Step((PERSISTENCE,))
        if isinstance(settings, list):
            told = dict(zip(settings[::2], settings[1::2], strict=False))
            if told.get(b"appendonly") == b"yes":
                return [Finding("persistence", "ok", "appendonly is yes.")]
            if told.get(b"save"):
                text = "Snapshots alone: a kill loses what came after the last one. Set appendonly to yes."
                return [Finding("persistence", "warning", text)]
            text = "Nothing is stored on disk: a restart loses everything. Set appendonly to yes."
            return [Finding("persistence", "failed", text)]
    return [
        Finding(
            "persistence",
            "unknown",
            "It is not told: this user may not ask (CONFIG GET), or the server is embedded.",
        )
    ]


def _library_of(held: ops.Version, partitions: int) -> Iterator[Finding]:
    told = f"contract {held.contract}, digest {held.digest}"
    if held.digest == _library.digest():
        yield Finding("library", "ok", f"{told}, as this client has it.")
    else:
        text = f"{told}, while this client has {_library.digest()}: versions of ff_fast are mixed."
        yield Finding("library", "warning", text)
    if held.partitions is None:
        yield Finding("partitions", "failed", f"No count is stored; this client uses {partitions}.")
    else:
        yield Finding("partitions", "ok", f"{held.partitions}.")


def _clock(now_ms: int, began: float, ended: float) -> Finding:
    # The server's time was taken somewhere between.
    off_ms = max(began * 1000 - now_ms - 1, now_ms - ended * 1000, 0)
    if off_ms > _SKEW_MS:
        text = (
            f"This machine is {off_ms / 1000:.1f} s off the server. Leases are not affected, as the server's clock"
            " alone counts; ages that are shown here are."
        )
        return Finding("clock", "warning", text)
    return Finding("clock", "ok", f"Less than {max(off_ms, 1) / 1000:.3f} s off the server.")


def _supervisor(partitions: int, now_ms: int, marked: bytes | None) -> Steps[Finding]:
    """Who supervises, empty for nobody, and whether timers are long overdue: then nobody fires them."""
    before = b"%d" % (now_ms - _OVERDUE_MS)
    replies = yield Step(
        [
            command(
                b"ZRANGEBYSCORE",
                keys.timers(keys.slot_tag(index)),
                *(b"-inf", before, b"WITHSCORES", b"LIMIT", b"0", b"1"),
            )
            for index in range(partitions)
        ],
        partial=True,
    )
    oldest: list[int] = []
    for index, reply in enumerate(replies):
        try:
            page = checked(reply)
        except FFError as error:
            text = f"The timers of partition {index} cannot be read: {error}"
            return Finding("supervisor", "failed", text)
        if page:
            oldest.append(int(float(page[1])))
    if not oldest and marked == b"":
        text = "Nobody supervises. No timer is overdue yet. Run a worker or ff-fast supervise."
        return Finding("supervisor", "warning", text)
    if not oldest:
        who = f"{marked.decode('utf-8', 'replace')} supervises. " if marked else ""
        return Finding("supervisor", "ok", f"{who}No timer is overdue.")
    late = (now_ms - min(oldest)) / 1000
    who = "nobody supervises"
    if marked:
        who = f"{marked.decode('utf-8', 'replace')} supervises and does not keep up, or cannot fire them: see its log"
    text = (
        f"Timers of {len(oldest)} partitions are overdue, one of them for {late:.0f} s: {who}. Lost workers are not"
        " replaced and retries do not begin. Run a worker or ff-fast supervise."
    )
    return Finding("supervisor", "failed", text)


# -- rights ----------------------------------------------------------------------------------------


def _rights(role: Role) -> list[tuple[str, str]]:
    """Return each rule of a role, with a command that a user may run who has it.

    The last argument stands for all that follow.
    """
    rules = role.rules.split()
    patterns = [rule for rule in rules if "~" in rule]
    any_key = _sample(next((rule for rule in patterns if rule.startswith("~")), patterns[0]))
    reading = next(rule for rule in _READING if rule in rules)[1:]
    writing = next((rule for rule in _WRITING if rule in rules), "+set")[1:]
    channels = [rule for rule in rules if rule.startswith("&")]
    publishing = "spublish" if "+spublish" in rules else "ssubscribe"
    found: list[tuple[str, str]] = []
    for rule in rules:
        if rule.startswith("+"):
            words = rule[1:].replace("|", " ")
            if words.startswith("fcall"):
                words += " 0"
            elif "publish" in words or "subscribe" in words:
                words += f" {_sample(channels[0])}"
            elif words == "bzmpop":
                words += f" 0 1 {any_key}"
            else:
                words += f" {any_key}"
            found.append((rule, words))
        elif rule in channels:
            found.append((rule, f"{publishing} {_sample(rule)}"))
        elif rule in patterns:
            mode = rule.partition("~")[0]
            if "W" not in mode:
                found.append((rule, f"{reading} {_sample(rule)}"))
            if "R" not in mode:
                found.append((rule, f"{writing} {_sample(rule)}"))
    return found


def _sample(rule: str) -> str:
    """Return a key or a channel that a pattern matches."""
    return rule[rule.index("ff:") :].replace("*", _SOMEWHERE)


def _roles(
    rights: dict[str, list[tuple[str, str]]], answers: str, required: str | None
) -> Iterator[Finding]:
    held: list[str] = []
    place = 0
    for name, asked in rights.items():
        told = answers[place : place + len(asked)]
        place += len(asked)
        missing = list(
            dict.fromkeys(rule for (rule, _), may in zip(asked, told, strict=True) if may == "0")
        )
        if not missing:
            held.append(name)
        elif name == required:
            text = f"This user lacks {' '.join(missing)}: see ff-fast acl {name}."
            yield Finding("rights", "failed", text)
            return
    if required is not None:
        yield Finding("rights", "ok", f"This user has all rights of the role {required}.")
    elif held:
        yield Finding("rights", "ok", f"This user has all rights of {', '.join(held)}.")
    else:
        text = "This user has all rights of no role. Name one with --role, to see what it lacks."
        yield Finding("rights", "warning", text)
