"""The roles of `ff_fast._core.roles`, one user for each, what each of them does, and which rights that takes.

What a user needs has two sources. `Life` is the work of all users, one part after the other; while it runs on a server,
MONITOR tells every command and key, also those of the Lua functions, and `ECHO` says whose they are. `may_run` reads
the Lua files: the commands that a function may run on any path.

A new function or operation gets a step in `Life`, by the user that calls it. `complaints` then tells what to add to
the role, and what to take away.
"""

import contextlib
import fnmatch
import functools
import re
import socket
import time
from collections import defaultdict
from types import SimpleNamespace
from typing import NamedTuple

from ff_fast import (
    CancelFlowPolicy,
    CancelFlowWait,
    CapabilitySet,
    ClaimPolicy,
    Durability,
    End,
    FailureClass,
    FFError,
    Frame,
    FrameKind,
    RetryPolicy,
    ScannerFilter,
    StreamMode,
    TimeoutBehavior,
    UsageDimensions,
    WaitpointKind,
    WaitpointSpec,
    _library,
    keys,
)
from ff_fast._core import claiming, operations, ops
from ff_fast._core import supervision as supervision_core
from ff_fast._core.operations import Call
from ff_fast._core.roles import ROLES
from ff_fast.errors import NotReplicated, UnsupportedServer

from .. import shells
from ..heads import set_head

ACL = {f"ff_{name}": role.rules for name, role in ROLES.items()}
PASSWORD = "s3cret-canary"
GPU = CapabilitySet({"gpu"})


# Commands that Redis has since 7.2. An ACL may not name what the server does not know.
_NEWER = {"+client|setinfo", "+waitaof"}


def allow(raw, name, rules):
    if "valkey_version" not in raw.info("server"):
        rules = " ".join(rule for rule in rules.split() if rule not in _NEWER)
    raw.execute_command("ACL", "SETUSER", name, "reset", "on", f">{PASSWORD}", *rules.split())


def as_user(server, name, password=PASSWORD):
    return server.url.replace("://", f"://{name}:{password}@", 1)


# -- what the Lua functions may run ---------------------------------------------------------------------------------------

_BEGINS = re.compile(
    r"^(?:local function (?P<own>\w+)|function (?P<table>ff|FIRE)\.(?P<field>\w+)"
    r"|redis\.register_function\((?:'(?P<plain>\w+)'|\{\s*function_name = '(?P<flagged>\w+)'))",
    re.MULTILINE,
)
_CALLS = re.compile(
    r"(?:(?<![\w.])call|\bredis\.p?call)\(\s*(?:'([A-Z]+)'(?:, '([A-Z]+)')?|([^'\s,)]+))"
)

WITH_SUBCOMMANDS = {"client", "function", "xinfo", "config", "object", "memory"}
"""Commands whose rights name a subcommand."""


def right_to(command, subcommand):
    """The right to a command, as it stands in an ACL line behind the plus."""
    command = command.lower()
    return f"{command}|{subcommand.lower()}" if command in WITH_SUBCOMMANDS else command


@functools.cache
def _bodies():
    """Each function of the library: its part and name to its text."""
    found = {}
    for part, written in _library._read_parts().items():
        text = re.sub(r"--[^\n]*", "", written)
        for begin in _BEGINS.finditer(text):
            name = begin["own"] or begin["plain"] or begin["flagged"]
            owner = begin["table"] or (part if begin["own"] else "")
            end = re.compile(r"^(?:end|\})", re.MULTILINE).search(text, begin.end())
            found[owner, name or begin["field"]] = (part, text[begin.end() : end.start()])
    return found


@functools.cache
def _asked_for():
    """Commands that a function runs only if its caller has the right: it asks."""
    texts = " ".join(text for _, text in _bodies().values())
    return {found.lower() for found in re.findall(r"acl_check_cmd\('([A-Z]+)'", texts)}


@functools.cache
def _runners():
    """Names of functions that run a command whose name they are given."""
    return {
        at[1]
        for at, (_, text) in _bodies().items()
        if any(call[2] for call in _CALLS.findall(text))
    }


@functools.cache
def may_run(function):
    """The commands that a registered function may run, in lower case."""
    bodies, commands, seen = _bodies(), set(), set()
    left = [("", function)]
    while left:
        at = left.pop()
        if at in seen:
            continue
        seen.add(at)
        part, text = bodies[at]
        for command, subcommand, computed in _CALLS.findall(text):
            if command:
                commands.add(right_to(command, subcommand))
            else:
                # The name is a parameter of the function, and stands where the function is called.
                assert re.match(rf"[^)]*\b{computed}\b", text), (
                    f"{part}: {computed} is no parameter"
                )
        for name in _runners():
            commands |= {found.lower() for found in re.findall(rf"\b{name}\(\s*'([A-Z]+)'", text)}
        left += [
            ("ff", name) for name in re.findall(r"\bff\.(\w+)", text) if ("ff", name) in bodies
        ]
        if re.search(r"\bFIRE\[", text):
            left += [name for name in bodies if name[0] == "FIRE"]
        left += [(part, name) for name in set(re.findall(r"\b\w+", text)) if (part, name) in bodies]
    return frozenset(commands)


# -- the rights of a line -------------------------------------------------------------------------------------------------


class Pattern(NamedTuple):
    """A key pattern of an ACL line."""

    text: str
    glob: str
    reads: bool
    writes: bool

    def matches(self, key):
        return fnmatch.fnmatchcase(key, self.glob)


class Line(NamedTuple):
    """An ACL line, read: its commands as after ``+``, its key patterns, and its channel patterns as after ``&``."""

    commands: frozenset[str]
    patterns: tuple[Pattern, ...]
    channels: tuple[str, ...]

    @classmethod
    def of(cls, rules):
        commands, patterns, channels = set(), [], []
        for rule in rules.split():
            if rule.startswith("+"):
                commands.add(rule[1:])
            elif rule.startswith("&"):
                channels.append(rule[1:])
            elif found := re.fullmatch(r"(?:%(RW?|W))?~(.*)", rule):
                mode = found[1] or "RW"
                patterns.append(Pattern(rule, found[2], "R" in mode, "W" in mode))
            else:
                raise AssertionError(rule)
        return cls(frozenset(commands), tuple(patterns), tuple(channels))


# -- who ran what ---------------------------------------------------------------------------------------------------------

FRAMES = 150
"""As many as the live window and the log need to be trimmed."""

_PART = "part-of:"
NOBODY = "nobody"


class Ran(NamedTuple):
    """What one user ran: functions, commands of its own, commands of its functions, keys with what was done to them, and
    the channels on which it published or listened.

    A key is touched by a command that learns no more than its type or size.
    """

    functions: set[str]
    own: set[str]
    inside: dict[str, set[str]]
    reads: set[str]
    writes: set[str]
    touches: set[str]
    channels: set[str]


_ID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<=\{fp:)\d+(?=\})")


def kind_of(argument):
    """A key with 0 for each id and partition, so that keys of a kind are one; '' for what is no key."""
    return _ID.sub("0", argument.decode("latin-1")) if argument.startswith(b"ff:") else ""


class Monitor:
    """Listens to a server from its creation on; `users` reads what it heard."""

    def __init__(self, raw, path):
        self._raw = raw
        self._flags = {}
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(10)
        self._socket.connect(path)
        self._lines = self._socket.makefile("rb")
        self._socket.sendall(b"MONITOR\r\n")
        assert self._lines.readline() == b"+OK\r\n"

    def begin(self, user):
        """From here on everything is done by *user*."""
        self._raw.echo(_PART + user)

    def close(self):
        self._lines.close()
        self._socket.close()

    def users(self):
        self._raw.echo(_PART)
        found = defaultdict(lambda: Ran(set(), set(), defaultdict(set), set(), set(), set(), set()))
        user = function = ""
        for line in self._lines:
            # <time> [<database> <client>] "<argument>"...
            heard = re.match(rb"\+\S+ \[\d+ (\S+)\] (.*)", line)
            arguments = [_unquoted(text) for text in re.findall(rb'"((?:[^"\\]|\\.)*)"', heard[2])]
            command = arguments[0].decode().lower()
            if command == "echo":
                user = arguments[1].decode().removeprefix(_PART)
                if not user:
                    return found
                continue
            if user in ("", NOBODY):
                continue
            ran = found[user]
            right = right_to(command, arguments[1].decode("latin-1") if arguments[1:] else "")
            if heard[1] == b"lua":
                ran.inside[function].add(right)
            elif command.startswith("fcall"):
                function = arguments[1].decode()
                ran.functions.add(f"{command}|{function}")
            else:
                ran.own.add(right)
            self._note_keys(ran, arguments)
        raise AssertionError("the server has closed MONITOR")

    def _note_keys(self, ran, arguments):
        if arguments[0].upper() in (b"SPUBLISH", b"SSUBSCRIBE", b"SUNSUBSCRIBE"):
            named = arguments[1:2] if arguments[0].upper() == b"SPUBLISH" else arguments[1:]
            ran.channels.update(map(kind_of, named))
            return
        # Which of its arguments are keys depends on the command and on the place of what looks like one.
        place = (arguments[0], len(arguments), *(kind_of(text) for text in arguments[1:]))
        if not any(place[2:]):
            return
        if place not in self._flags:
            found = self._raw.execute_command("COMMAND GETKEYSANDFLAGS", *arguments)
            self._flags[place] = [
                (kind_of(key), set(map(bytes.lower, flags))) for key, flags in found
            ]
        for key, flags in self._flags[place]:
            if b"access" in flags:
                ran.reads.add(key)
            if flags & {b"insert", b"update", b"delete"}:
                ran.writes.add(key)
            ran.touches.add(key)


_ESCAPES = {b"n": b"\n", b"r": b"\r", b"t": b"\t", b"a": b"\a", b"b": b"\b"}


def _unquoted(text):
    def plain(found):
        if found[1].startswith(b"x"):
            return bytes.fromhex(found[1][1:].decode())
        return _ESCAPES.get(found[1], found[1])

    return re.sub(rb"\\(x[0-9a-f]{2}|.)", plain, text, flags=re.DOTALL)


# -- the work of all users ------------------------------------------------------------------------------------------------


def _hears_nothing(backend):
    """Whether a backend listens to no channel any more; in a cluster it has a hub for each node."""
    hubs = getattr(backend._hub, "_hubs", None)
    return all(hub._core.empty for hub in ([backend._hub] if hubs is None else [*hubs.values()]))


def stops_renewing(stream):
    """Let a named stream's lease be renewed no more, and wait for a renewal that is under way."""
    stop = stream._keeper.stop
    (stream._call(stop) if isinstance(stream, shells._Blocking) else stop)()


class Life:
    """The whole life of executions, each part by the user whose work it is.

    Args:
        open_as: ``open_as(user)`` gives a backend of that user.
        raw: A client that may do everything.
        monitor: Is told whose part begins.
    """

    def __init__(self, open_as, raw, monitor=None):
        self._open_as = open_as
        self._raw = raw
        self._monitor = monitor
        self._backends = {}

    def by(self, user):
        """The backend of a user, whose part begins."""
        if self._monitor is not None:
            self._monitor.begin(user)
        if user not in self._backends:
            self._backends[user] = self._open_as(user)
        return self._backends[user]

    def aside(self):
        """What follows is the test's own doing."""
        if self._monitor is not None:
            self._monitor.begin(NOBODY)

    # -- what the test does itself --------------------------------------------------------------------

    def due(self, eid, *kinds):
        """Make timers of an execution, or of a flow, due now."""
        self.aside()
        for timers in self._raw.keys("ff:idx:*:timers"):
            for name in self._raw.zrange(timers, 0, -1):
                if eid.encode() in name and name.partition(b":")[0].decode() in kinds:
                    self._raw.zadd(timers, {name: 1})
        if "lease" in kinds:
            index = int(self._raw.hget(keys.core(eid), "current_attempt_index"))
            set_head(self._raw, keys.head(eid, index), lease_expires_at=1)

    def supervised(self, eid, *kinds, scope=None, user="ff_supervisor"):
        self.due(eid, *kinds)
        backend = self.by(user)
        turn = supervision_core.Turn(user, 0.25, insists=user == "ff_supervisor")
        assert backend._do(Call(turn.take))
        rounds = supervision_core.Supervision(backend._deployment, scope or ScannerFilter())
        backend._do(Call(rounds.round, own_connection=True))
        backend._do(Call(turn.leave))

    def claimed(self, lane, **options):
        worker = self.by("ff_worker")
        options = {"policy": ClaimPolicy.immediate(), "capabilities": GPU, **options}
        handle = worker.claim(lane=lane, worker_id="w", worker_instance_id="w-1", **options)
        assert handle is not None
        return worker, handle

    def waits(self, call, *arguments, **options):
        """Make a call at each level of durability; the server has neither a replica nor an append-only file."""
        for level in (Durability.replicated(), Durability.synced()):
            with contextlib.suppress(NotReplicated, UnsupportedServer):
                call(*arguments, durability=level, durability_timeout=0.001, **options)

    def created(self, **options):
        """An execution that requires capabilities, so that its hints register these."""
        return self.by("ff_producer").create_execution(required_capabilities=GPU, **options)

    # -- the parts ------------------------------------------------------------------------------------

    def run(self):
        self.by("ff_deploy")
        eid = self.streams()
        self.reads(eid)
        self.refuses_and_waits()
        self.gives_back()
        self.budgets()
        self.suspends()
        for number in range(3):
            # Earlier ones are dropped after their grace.
            self.by("ff_deploy").rotate_waitpoint_secret(
                f"k{number}", bytes([number] * 32), grace=0
            )
        self.suspends()
        self.children()
        self.cancels()
        self.flows()
        self.stands_by()
        self.loses()
        self.names()
        self.tasks()
        self.subscribes()
        self.looks()

    def streams(self):
        producer = self.by("ff_producer")
        eid = producer.create_execution(
            lane="a", payload=b"prompt", tags={"app.x": "1"}, priority=3
        )
        producer.set_tags(eid, {"app.y": "2"})
        worker, handle = self.claimed("a")
        assert worker.read_payload(handle) == b"prompt"
        writer = worker.open_writer(handle, retention_maxlen=100)
        for i in range(FRAMES):
            writer.write(b"durable %d" % i)
            writer.write(b"live %d" % i, mode=StreamMode.best_effort_live(50))
            writer.write(b'{"n":%d,"t":"%s"}' % (i, b"x" * 100), mode=StreamMode.durable_summary())
            if i % 20 == 0:
                writer.flush(5)
        writer.close()
        again = worker.open_writer(handle)
        again.write(b"last", mode=StreamMode.best_effort_live(50))
        again.write(b"visible")
        again.flush(5)
        worker.append_frame(handle, Frame(b"{}", FrameKind.EVENT, frame_type="tool_event"))
        assert worker.read_summary(eid, 0).version == FRAMES
        worker.renew(handle)
        worker.renew(handle, lease_ttl_ms=20_000)
        worker.progress(handle, 40, "reading")
        self.waits(worker.complete, handle, b"answer")
        worker.complete(handle, b"answer")
        # The first finds a partition that had work, and forgets it.
        assert worker.claim(lane="a") is None
        assert worker.claim(lane="a") is None
        # Of an ended execution: its tags expire with it.
        self.by("ff_producer").set_tags(eid, {"app.z": "3"})
        return eid

    def reads(self, eid):
        tailer = self.by("ff_reader")
        assert tailer.read_stream(eid, 0, count=10)
        tail = tailer.tail(eid, 0)
        while (items := tail.next_batch(5)) and not isinstance(items[-1], End):
            pass
        tail.close()
        following = tailer.follow(eid, snapshot=True)
        while (items := following.next_batch(5)) and not isinstance(items[-1], End):
            pass
        following.close()
        assert tailer.wait(eid, 5) == b"answer"
        assert tailer.read_summary(eid, 0).version == FRAMES
        assert tailer.describe(eid).state == "completed"
        assert tailer.describe_stream(eid, 0).closed_reason == "attempt_success"
        assert tailer.get_tags(eid) == {"app.x": "1", "app.y": "2", "app.z": "3"}
        assert tailer.read_result(eid) == b"answer"
        # One that runs: its lease and its timers.
        running = self.created(lane="b", deadline=60, attempt_timeout=60)
        _, handle = self.claimed("b")
        tail = self.by("ff_reader").tail(running, 0)
        assert not tail.next_batch(0.01)
        tail.close()
        # A tail that is closed so soon may not have listened yet.
        for channel in (keys.execution_channel(running), keys.attempt_channel(running, 0)):
            self.listens(tailer, channel)
        self.by("ff_reader").describe(running)
        self.by("ff_reader").describe_stream(running, 0)
        self.by("ff_worker").fail(handle, "broken", FailureClass.INFRA_CRASH)

    def refuses_and_waits(self):
        """What a claim passes over, and hints that are stale or missing."""
        producer = self.by("ff_producer")
        for _ in range(8):
            producer.create_execution(lane="c", required_capabilities=GPU, priority=9)
        producer.create_execution(lane="c")
        worker, handle = self.claimed("c")
        worker.complete(handle)
        self.aside()
        self._raw.delete(keys.ready("c"))
        with contextlib.suppress(AssertionError):
            self.claimed("c")
        late = self.created(lane="late", delay=60)
        assert self.by("ff_worker").claim(lane="late", capabilities=GPU, **WAITING) is None
        self.supervised(late, "delay", scope=ScannerFilter(instance_tag=("app.none", "x")))
        self.supervised(late, "delay", scope=ScannerFilter(namespace="default"))
        _, handle = self.claimed("late")
        worker.fail(handle, "broken", FailureClass.TRANSIENT)

    def gives_back(self):
        """A claim whose caller has gone."""
        self.created(lane="back")
        worker, handle = self.claimed("back")
        state = claiming.Claim(claiming.ClaimRequest("back", "w", "w-1", 1000, GPU, None))
        claimed = handle.fields()
        state.lease = keys.partition_index(claimed.execution_id), claimed.lease_id
        state.hint_taken = True
        worker._do(Call(lambda: claiming.give_back(worker._deployment, state)))
        _, handle = self.claimed("back")
        worker.complete(handle)

    def budgets(self):
        operator = self.by("ff_operator")
        operator.create_budget("b-1", hard={"input_tokens": 100}, soft={"input_tokens": 5})
        operator.create_budget("b-2", hard={"input_tokens": 10})
        eid = self.created(lane="d", budgets=["b-1", "b-2"])
        worker, handle = self.claimed("d")
        for amount in (3, 6, 50):
            worker.report_usage(handle, UsageDimensions(amount, dedup_key=f"k{amount}"))
        worker.report_usage(handle, UsageDimensions(3, dedup_key="k3"))
        assert self.by("ff_reader").describe(eid).usage["input_tokens"] == 9
        self.by("ff_worker").complete(handle)

    def suspended(self, lane, on_timeout=TimeoutBehavior.FAIL, **options):
        """An execution that waits for a signal, and its waitpoint."""
        eid = self.created(lane=lane, **options)
        worker, handle = self.claimed(lane)
        waitpoint = worker.create_waitpoint(handle)
        other = worker.create_waitpoint(handle)
        self.by("ff_signaller").deliver_signal(
            eid, other, "early", payload=b"1", idempotency_key="i"
        )
        self.by("ff_signaller").deliver_signal(
            eid, other, "early", payload=b"1", idempotency_key="i"
        )
        self.by("ff_signaller").deliver_signal(eid, waitpoint, "early")
        spec = WaitpointSpec(
            kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=waitpoint.hmac_token
        )
        self.by("ff_worker").suspend(handle, spec, timeout=60, on_timeout=on_timeout)
        return eid, waitpoint

    def suspends(self):
        eid = self.created(lane="e")
        worker, handle = self.claimed("e")
        waitpoint = worker.create_waitpoint(handle)
        self.by("ff_signaller").deliver_signal(eid, waitpoint, "go")
        spec = WaitpointSpec(
            kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=waitpoint.hmac_token
        )
        assert self.by("ff_worker").suspend(handle, spec).already_satisfied
        worker.complete(handle)
        eid, waitpoint = self.suspended("e")
        self.by("ff_reader").describe(eid)
        self.by("ff_signaller").deliver_signal(eid, waitpoint, "no")
        self.by("ff_signaller").deliver_signal(eid, waitpoint, "go", payload=b"yes")
        worker, handle = self.claimed("e")
        assert [signal.payload for signal in worker.observe_signals(handle)] == [b"yes"]
        writer = worker.open_writer(handle, mode=StreamMode.durable_summary())
        writer.write(b"{}")
        writer.close()
        worker.delay(handle, 60)
        self.supervised(eid, "delay")
        worker, handle = self.claimed("e")
        worker.open_writer(handle).close()
        waitpoint = worker.create_waitpoint(handle)
        self.supervised(eid, "waitpoint")
        self.by("ff_worker").complete(handle)
        for behavior in TimeoutBehavior:
            eid, _ = self.suspended("e", behavior)
            self.supervised(eid, "suspension")
            if behavior is TimeoutBehavior.AUTO_RESUME:
                worker, handle = self.claimed("e")
                worker.complete(handle)

    def children(self):
        flow_id = self.by("ff_producer").create_flow()
        parent = self.created(lane="f", flow_id=flow_id)
        worker, handle = self.claimed("f")
        child = worker.create_execution(
            required_capabilities=GPU,
            lane="f",
            flow_id=flow_id,
            parent_id=parent,
            payload=b"part",
            tags={"app.of": "f"},
        )
        self.created(lane="f", parent_id=parent)
        self.by("ff_worker").wait_children(handle)
        for user in ("ff_reader", "ff_operator"):
            assert any(child in sentence for sentence in self.by(user).explain(parent))
        for _ in range(2):
            worker, handle = self.claimed("f")
            worker.complete(handle, b"done")
        assert worker.read_result(child) == b"done"
        worker, handle = self.claimed("f")
        worker.complete(handle)

    def listens(self, backend, channel):
        """As a worker does while it keeps a lease and a reader while it waits, and soon after no more."""
        listener = SimpleNamespace()
        listener.told = listener.doubt = listener.failed = lambda _: None
        backend._hub.listen(channel, listener)
        backend.wait_until(lambda: backend._hub.confirmed(channel))
        backend._hub.unlisten(channel, listener)
        backend.wait_until(lambda: _hears_nothing(backend))

    def cancels(self):
        eid = self.created(lane="g")
        worker, handle = self.claimed("g")
        worker.create_waitpoint(handle)
        self.waits(self.by("ff_operator").cancel, eid, reason="too expensive", grace=60)
        worker = self.by("ff_worker")
        assert worker.renew(handle).cancel_requested
        self.listens(worker, keys.leases_channel(keys.slot_tag_of(eid)))
        # By itself, as a worker does that was asked to stop.
        worker.describe(eid)
        worker.cancel(eid, reason="too expensive")
        for grace in (0, 60):
            eid = self.created(lane="g")
            worker, handle = self.claimed("g")
            self.by("ff_operator").cancel(eid, grace=grace)
            if grace:
                self.supervised(eid, "cancel")
        eid, _ = self.suspended("g")
        self.by("ff_operator").cancel(eid)
        parent = self.created(lane="g")
        worker, handle = self.claimed("g")
        child = worker.create_execution(required_capabilities=GPU, lane="g", parent_id=parent)
        worker.wait_children(handle)
        self.by("ff_operator").cancel(child)
        self.claimed("g")

    def flows(self):
        for policy, wait in (
            (CancelFlowPolicy.CANCEL_ALL, CancelFlowWait.WAIT_INDEFINITE),
            (CancelFlowPolicy.CANCEL_ALL, CancelFlowWait.NO_WAIT),
            (CancelFlowPolicy.CANCEL_PENDING, CancelFlowWait.NO_WAIT),
        ):
            flow_id = self.by("ff_producer").create_flow()
            options = {"lane": f"h-{policy.value}", "flow_id": flow_id}
            waiting, waitpoint = self.suspended(options["lane"], flow_id=flow_id)
            self.created(**options)
            _, handle = self.claimed(options["lane"])
            delayed = self.created(delay=60, **options)
            assert len(self.by("ff_reader").describe_flow(flow_id).open_members) == 3
            self.by("ff_operator").cancel_flow(flow_id, policy, wait)
            if wait is CancelFlowWait.NO_WAIT:
                # The members learn of it from whatever comes first.
                with contextlib.suppress(FFError):
                    self.by("ff_worker").fail(handle, "broken", FailureClass.INFRA_CRASH)
                with contextlib.suppress(FFError):
                    self.by("ff_signaller").deliver_signal(waiting, waitpoint, "go")
                self.supervised(delayed, "delay")
                self.supervised(flow_id, "flow", scope=ScannerFilter(namespace="default"))

    def stands_by(self):
        """A worker that supervises while nobody else does."""
        eid = self.created(lane="by", delay=60)
        self.supervised(eid, "delay", user="ff_worker")
        worker, handle = self.claimed("by")
        worker.complete(handle)
        self.created(lane="idle", delay=60)
        worker = self.by("ff_worker")
        assert worker._do(operations.run_worker(worker._deployment, lane="idle").remaining)
        flow_id = self.by("ff_producer").create_flow()
        self.created(lane="by", flow_id=flow_id)
        self.by("ff_operator").cancel_flow(
            flow_id, CancelFlowPolicy.CANCEL_ALL, CancelFlowWait.NO_WAIT
        )
        self.supervised(flow_id, "flow", user="ff_worker")

    def loses(self):
        """Leases that lapse, and attempts that take too long."""
        eid = self.created(lane="i", retry=RetryPolicy(max_retries=1))
        self.claimed("i")
        self.supervised(eid, "lease")
        _, handle = self.claimed("i")
        self.due(eid, "lease")
        worker = self.by("ff_worker")
        with contextlib.suppress(FFError):
            worker.renew(handle)
        (token,) = [t for t in worker.find_reclaimable() if t.grant.execution_id == eid]
        handle = worker.claim_from_reclaim(token, capabilities=GPU)
        worker.fail(handle, "again", FailureClass.TRANSIENT)
        self.supervised(eid, "delay")
        for kind in ("attempt", "deadline"):
            eid = self.created(lane=f"i-{kind}", deadline=60, attempt_timeout=60)
            self.claimed(f"i-{kind}")
            self.supervised(eid, kind)

    def names(self):
        """Named streams: produced, taken over, ended, and removed."""
        worker = self.by("ff_worker")
        stream = worker.open_stream("n", payload=b"prompt", tags={"app.x": "1"})
        eid = stream.execution_id
        stream.write(b"a")
        stream.flush(5)
        assert worker.open_stream("n").role == "consumer"
        # A renewal of the lost producer would count as the work of whoever comes next.
        stops_renewing(stream)
        self.due(eid, "lease")
        worker = self.by("ff_worker")
        other = worker.open_stream("n")
        assert other.role == "producer"
        other.complete(b"done")
        self.by("ff_operator").delete_execution(eid)
        worker = self.by("ff_worker")
        stream = worker.open_stream("n")
        stops_renewing(stream)
        self.supervised(eid, "lease")
        self.supervised(eid, "lease")
        flow_id = self.by("ff_producer").create_flow()
        eid = self.created(lane="n", flow_id=flow_id)
        self.by("ff_operator").delete_execution(eid)

    def tasks(self):
        """Tasks of agents: saved, listed, read, expired and removed. Their events are heard on a channel."""
        agent, owner = self.by("ff_agent"), "0" * 40
        name = ops.TaskName("{fp:1}", keys.new_uuid())

        def do(op):
            return agent._do(Call(lambda: ops.call(op), writes=not op.read_only))

        assert do(ops.note_task(owner, "t", 1, 5, "2", "-", 1))
        until = time.monotonic() + 0.05
        assert do(ops.save_task(name, owner, 0, "", "save-1", 60_000, b"d", b"e")) == 1
        assert do(ops.save_task(name, owner, 0, "", "save-2", 60_000, b"d", b"e")) is None
        # By then the time of the first one is over.
        agent.wait_until(lambda: time.monotonic() > until)
        assert do(ops.note_task(owner, "u", 1, 5, "2", "-", 60_000))
        assert do(ops.list_tasks(owner, "2", "", -1, None, 5)).found
        assert do(ops.read_task(name, owner, count=5)).events
        assert do(ops.delete_task(name, owner))
        do(ops.note_task(owner, "u", 0, None, "", "", 60_000))
        self.listens(agent, keys.task_channel(*name))

    def subscribes(self):
        tailer = self.by("ff_reader")
        for scope in (None, ScannerFilter(instance_tag=("app.x", "1"))):
            subscription = tailer.subscribe_completions(scope, after="start")
            assert subscription.next_batch(5)
            subscription.close()
        subscription = tailer.subscribe_completions()
        subscription.next_batch(0.01)
        subscription.close()

    def looks(self):
        """Listings, histories and a diagnosis, of executions in all states."""
        options = {"lane": "l", "tags": {"app.l": "1"}, "retry": RetryPolicy(max_retries=1)}
        failed = self.created(**options)
        self.by("ff_worker").fail(self.claimed("l")[1], "broken")
        self.created(**options)
        self.by("ff_worker").fail(self.claimed("l")[1], "again", FailureClass.TRANSIENT)
        self.suspended("l", tags=options["tags"])
        self.created(**options)
        self.claimed("l")
        flow_id = self.by("ff_producer").create_flow()
        waits = self.created(**options, flow_id=flow_id)
        # What it stops to listen to would count as the next user's.
        reader = self.by("ff_reader")
        reader.wait_until(lambda: _hears_nothing(reader))
        for user in ("ff_reader", "ff_operator"):
            looker = self.by(user)
            page = looker.list_executions(tag=("app.l", "1"))
            states = ["active", "delayed", "failed", "suspended", "waiting"]
            assert sorted(each.state for each in page.items) == states
            assert looker.list_executions().items
            (lane,) = [each for each in looker.list_lanes() if each.lane == "l"]
            assert (lane.active, lane.delayed, lane.suspended, lane.failed) == (1, 1, 1, 1)
            assert looker.list_workers()
            for each in page.items:
                assert looker.explain(each.execution_id)
            levels = {each.level for each in looker.diagnose(role=user.removeprefix("ff_"))}
            assert levels <= {"ok", "warning", "unknown"}
        for eid in (failed, waits):
            self.by("ff_operator").delete_execution(eid)


WAITING = {
    "worker_id": "w",
    "worker_instance_id": "w-1",
    "policy": ClaimPolicy.with_max_wait(0.1),
}


# -- the lines that follow ------------------------------------------------------------------------------------------------


def commands_of(ran):
    """What a user needs: its functions, its own commands, and all that its functions may run."""
    needed = ran.functions | ran.own
    for function in ran.functions:
        needed |= may_run(function.partition("|")[2])
    # These need no right.
    return needed - {"hello", "auth", "reset", "quit"} - _asked_for()


def complaints(user, ran):
    """What is wrong with a user's line of that page, one sentence for each right."""
    line = Line.of(ACL[user])
    needed = commands_of(ran)
    found = [f"{user} lacks +{right}" for right in sorted(needed - line.commands)]
    found += [
        f"{user} has +{right}, which no step of Life and no function that it calls needs"
        for right in sorted(line.commands - needed)
    ]
    only_touched = ran.touches - ran.reads - ran.writes
    for keys_used, mode in ((ran.reads | only_touched, "reads"), (ran.writes, "writes")):
        patterns = [pattern for pattern in line.patterns if getattr(pattern, mode)]
        found += [
            f"{user} {mode} {key}, and no key pattern of its line allows it"
            for key in sorted(keys_used)
            if not any(pattern.matches(key) for pattern in patterns)
        ]
        found += [
            f"{user} has {pattern.text}, and {mode} no such key"
            for pattern in patterns
            if not any(pattern.matches(key) for key in keys_used)
        ]
    found += [
        f"{user} uses the channel {channel}, and no channel pattern of its line allows it"
        for channel in sorted(ran.channels)
        if not any(fnmatch.fnmatchcase(channel, glob) for glob in line.channels)
    ]
    found += [
        f"{user} has &{glob}, and uses no such channel"
        for glob in line.channels
        if not any(fnmatch.fnmatchcase(channel, glob) for channel in ran.channels)
    ]
    return found
