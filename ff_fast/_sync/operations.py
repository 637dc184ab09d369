"""Methods of the blocking backend, bound to the operations of the core."""

from __future__ import annotations

import contextlib
import copy
import threading
import time
import weakref
from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ff_fast import _transport
from ff_fast._core import claiming, durability, operations
from ff_fast._core.binding import bind
from ff_fast._core.leases import KeptLeases
from ff_fast._core.slots import Attending
from ff_fast._core.writer import FrameWriters, flush_to, settle
from ff_fast._sync.connection import PENDING
from ff_fast._sync.leases import LeaseKeeper
from ff_fast._sync.pool import Pool
from ff_fast._sync.readers import Completions, Follow, Tail, Waiting
from ff_fast._sync.writers import Senders, Writer
from ff_fast.errors import DeadlineExceeded, FFError, WriterClosed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from ff_fast._core.claiming import Claim
    from ff_fast._core.completions import CompletionCore
    from ff_fast._core.deployment import Deployment
    from ff_fast._core.durability import Ask
    from ff_fast._core.follow import FollowCore
    from ff_fast._core.operations import Call
    from ff_fast._core.steps import Steps
    from ff_fast._core.tail import TailCore
    from ff_fast._core.writer import WriterState
    from ff_fast._sync.connection import Connection
    from ff_fast.types import AppendFrameOutcome, BackendConfig, LeaseRenewal, Stats

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")


_LEFT = 1_024

# A wait on the server ends when its time is up, and its answer says then how many replicas there are.
_ANSWERS_S = 0.1


def method(
    make: Callable[Concatenate[Deployment, P], Call[T]],
) -> Callable[Concatenate[Operations, P], T]:
    """Return the method that sends a call and returns its value."""
    return bind(make, lambda backend, call: backend._do(call))


def _later(seconds: float, call: Callable[[], None]) -> threading.Timer:
    """Call a function after some seconds, on a thread of its own."""
    timer = threading.Timer(seconds, call)
    timer.name = "ff_fast leases"
    timer.daemon = True
    timer.start()
    return timer


def _put(question: durability.Question, connection: Connection, until: float) -> None:
    """Put a question, and take the replies that come until shortly after *until*, in monotonic time."""
    in_cluster = connection.node.address is not None
    connection.send(question.step.in_cluster if in_cluster else question.step)
    more = True
    while more:
        reply = connection.receive(until + _ANSWERS_S)
        if reply is PENDING:
            raise DeadlineExceeded
        more = question.take(reply)


def drive(actions: Generator[A, Any, T], perform: Callable[[A], object]) -> T:
    """Perform the actions of the core, and return what comes of them."""
    try:
        action = next(actions)
        while True:
            try:
                value = perform(action)
            except BaseException as error:  # noqa: BLE001 - the core decides what it means
                action = actions.throw(error)
            else:
                action = actions.send(value)
    except StopIteration as stop:
        value_of: T = stop.value
        return value_of


class Operations(Pool):
    """Every operation on executions and streams."""

    def __init__(self, config: BackendConfig) -> None:
        super().__init__(config)
        self._opening = threading.Lock()
        self._starting = threading.Lock()
        self._senders: Senders | None = None
        self._writers: weakref.WeakValueDictionary[str, Writer] = weakref.WeakValueDictionary()
        self._frame_writers: FrameWriters[Writer] = FrameWriters(self._writers)
        # Claims under way, with their threads; and those that have left something on the server.
        self._claims: dict[Claim, int] = {}
        self._left: deque[Claim] = deque(maxlen=_LEFT)
        self._attending = Attending()
        self._kept = KeptLeases(self._hub, _later)

    def _stop(self) -> None:
        with self._starting:
            senders = self._senders
        self._settle(senders)
        keepers = self._kept.close()
        super()._stop()
        for keeper in keepers:
            keeper._abandon(_transport.closed_error())
        if senders is not None:
            senders.close()
        self._frame_writers.clear()

    def _settle(self, senders: Senders | None) -> None:
        """Wait for a short time until all is stored, and every claim of other threads has given back what it took."""
        others = [
            claim for claim, thread in list(self._claims.items()) if thread != threading.get_ident()
        ]
        for claim in others:
            claim.abandoned = True
            claim.wake()
        if senders is not None:
            senders._finish_soon()
        until = time.monotonic() + claiming.SETTLE_S
        while time.monotonic() < until and (
            any(each in self._claims and each.unsettled and not each.blocked for each in others)
            or not (senders is None or senders._finished())
        ):
            time.sleep(claiming.SETTLE_LOOK_S)

    def _forked(self) -> None:
        super()._forked()
        self._opening = threading.Lock()
        self._starting = threading.Lock()
        self._kept = KeptLeases(self._hub, _later)

    def _running_senders(self) -> Senders:
        with self._starting:
            if self._closed:
                raise _transport.closed_error()
            if self._senders is None or not self._senders.running:
                self._senders = Senders(self)
            return self._senders

    def _do(self, call: Call[T], *, until: float = float("inf")) -> T:
        if call.claim is not None:
            return self._claim(call, call.claim)
        writer = None if call.releases is None else self._writers.get(call.releases)
        if writer is not None and not writer._idle:
            # An error of the writer is its own; what it means for the lease, the call says.
            with contextlib.suppress(FFError):
                writer._wait(settle(writer, _transport.request_timeout_s(self.config)))
        value = self._run(call, until=until)
        self._frame_writers.settle(call.released_lease(value), call.extended_lease)
        return value

    def _claim(self, call: Call[T], claim: Claim) -> T:
        """Make a claim; what it has taken is given back, unless the caller gets it."""
        for _ in range(len(self._left)):
            with contextlib.suppress(IndexError):
                # Another thread may have taken the last one.
                self._give_back(self._left.popleft())
        try:
            self._claims[claim] = threading.get_ident()
            value = self._run(call)
            if claim.abandoned:
                raise _transport.closed_error()
            self._claims.pop(claim, None)
            return value  # noqa: TRY300 - only an interrupt that strikes behind this line is the caller's
        except BaseException:
            try:
                self._give_back(claim)
            finally:
                self._claims.pop(claim, None)
            raise

    def _give_back(self, claim: Claim) -> None:
        """Give back what a claim has taken; keep it for the next claim where the server does not answer."""
        if not claim.unsettled:
            return
        claim.abandoned = True

        def steps() -> Steps[None]:
            return claiming.give_back(self._deployment, claim)

        try:
            self._run(operations.Call(steps), until=time.monotonic() + claiming.SETTLE_S)
        except BaseException as error:
            # A lease that is never given back lapses.
            if not self._closed:
                self._left.append(claim)
            if not isinstance(error, FFError):
                raise

    def _tail(self, source: TailCore) -> Tail:
        return Tail(self, source)

    def _follow(self, source: FollowCore) -> Follow:
        return Follow(self, source)

    def _wait(self, request: operations.WaitRequest) -> bytes:
        with Waiting(self, request.source) as waiting:
            return request.value(waiting.next_batch(request.timeout_s))

    def _subscribe(self, source: CompletionCore) -> Completions:
        return Completions(self, source)

    def _open_writer(self, request: operations.WriterRequest) -> Writer:
        return self._use_writer(self._run(request.call))

    def _use_writer(self, state: WriterState) -> Writer:
        timeout_s = _transport.request_timeout_s(self.config)
        writer = Writer(state, self._running_senders(), timeout_s, self._witness)
        writer._kept = self._kept
        self._writers[writer._lease_id] = writer
        self._frame_writers.pop(writer._lease_id, None)
        return writer

    def _witness(self, ask: Ask) -> None:
        """Put a question of durability on a connection that nobody else uses; return once it has ended, or is late."""
        ask.begin()
        try:
            connection = self._acquire(ask.evidence.command.slot, ask.until)
        except FFError as error:
            ask.end(error)
            return
        try:
            _put(durability.Question(ask.level.durability, (ask,)), connection, ask.until)
        except FFError as error:
            ask.end(error)
        finally:
            if ask.failure is not None:
                self._nodes.failed(connection.node, ask.failure)
            self._release(connection)

    def _append_frame(self, request: operations.FrameRequest) -> AppendFrameOutcome:
        self._check()
        with self._opening:
            # One at a time: two concurrent openings would supersede each other.
            writer = self._writers.get(request.lease_id)
            if writer is None or isinstance(writer._failure, WriterClosed):
                writer = self._open_writer(request.opening())
                self._frame_writers.opened(writer, request.lease_s)
        try:
            writer.write_frame(request.frame)
            level = request.level if request.level.asks else writer._level
            outcome = writer._wait(flush_to(writer, request.timeout, level))
        finally:
            if writer.error is not None:
                self._frame_writers.failed(writer)
        self._frame_writers.appended(writer)
        return outcome

    def _keep_lease(self, request: operations.LeaseRequest) -> LeaseKeeper:
        self._check()

        def fail(error: FFError) -> None:
            writer = self._writers.get(request.lease_id)
            if writer is not None:
                writer._fail(copy.copy(error))
                self._frame_writers.failed(writer)

        def lost(error: FFError) -> None:
            if not self._closed:
                request.lost(error)
            if request.on_lost is not None:
                request.on_lost(error)

        def renew(until: float) -> LeaseRenewal:
            return self._do(request.renewal, until=until)

        leave = partial(self._kept.remove, request.channel, request.name)
        keeper = LeaseKeeper(request.clock(), renew, fail, lost, leave)
        self._kept.add(request.channel, request.name, keeper)
        if self._closed:
            keeper._abandon(_transport.closed_error())
        return keeper

    def _stats(self, count: Callable[..., Stats]) -> Stats:
        return count(self._writers.valuerefs(), closed=self._closed)

    def _supervise(self, request: operations.SupervisionRequest) -> None:
        drive(request.actions(lambda: self._closed, self._attending.tell), self._supervising)

    def _supervising(self, action: operations.MakeCall | operations.Rest) -> object:
        if isinstance(action, operations.MakeCall):
            return self._run(action.call, until=time.monotonic() + action.limit_s)
        time.sleep(action.seconds)
        return None

    create_execution = method(operations.create_execution)
    describe = method(operations.describe)
    explain = method(operations.explain)
    diagnose = method(operations.diagnose)
    list_executions = method(operations.list_executions)
    list_lanes = method(operations.list_lanes)
    list_workers = method(operations.list_workers)
    claim = method(operations.claim)
    read_payload = method(operations.read_payload)
    renew = method(operations.renew)
    complete = method(operations.complete)
    fail = method(operations.fail)
    cancel = method(operations.cancel)
    progress = method(operations.progress)
    delay = method(operations.delay)
    wait_children = method(operations.wait_children)
    find_reclaimable = method(operations.find_reclaimable)
    claim_from_reclaim = method(operations.claim_from_reclaim)
    create_waitpoint = method(operations.create_waitpoint)
    suspend = method(operations.suspend)
    deliver_signal = method(operations.deliver_signal)
    observe_signals = method(operations.observe_signals)
    rotate_waitpoint_secret = method(operations.rotate_waitpoint_secret)
    report_usage = method(operations.report_usage)
    create_budget = method(operations.create_budget)
    create_flow = method(operations.create_flow)
    cancel_flow = method(operations.cancel_flow)
    describe_flow = method(operations.describe_flow)
    set_tags = method(operations.set_tags)
    get_tags = method(operations.get_tags)
    read_result = method(operations.read_result)
    describe_stream = method(operations.describe_stream)
    read_stream = method(operations.read_stream)
    read_summary = method(operations.read_summary)
    delete_execution = method(operations.delete_execution)
    stats = bind(operations.stats, _stats, "Stats")
    execution_id_for = bind(operations.execution_id_for, lambda _, value: value, "str")
    tail = bind(operations.tail, _tail, "Tail")
    follow = bind(operations.follow, _follow, "Follow")
    wait = bind(operations.wait, _wait, "bytes")
    subscribe_completions = bind(operations.subscribe_completions, _subscribe, "Completions")
    open_writer = bind(operations.open_writer, _open_writer, "Writer")
    append_frame = bind(operations.append_frame, _append_frame, "AppendFrameOutcome")
    keep_lease = bind(operations.keep_lease, _keep_lease, "LeaseKeeper")
    supervise = bind(operations.supervise, _supervise, "None")
