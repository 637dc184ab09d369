"""Methods of the asyncio backend, bound to the operations of the core."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import time
import weakref
from functools import partial
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from ff_fast import _transport
from ff_fast._aio.leases import LeaseKeeper
from ff_fast._aio.opening import Opening
from ff_fast._aio.pool import Pool
from ff_fast._aio.readers import Completions, Follow, Tail, Waiting
from ff_fast._aio.witness import Witness
from ff_fast._aio.writers import Senders, Writer
from ff_fast._core import claiming, operations
from ff_fast._core.binding import HANDLER, R, S, bind, dressed
from ff_fast._core.handlers import H, options_of
from ff_fast._core.leases import KeptLeases
from ff_fast._core.slots import Attending
from ff_fast._core.worker import HAND_BACK_S
from ff_fast._core.writer import FrameWriters, flush_to, settle
from ff_fast.errors import FFError, WriterClosed

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Generator

    from ff_fast._aio.nodes import Node
    from ff_fast._core.claiming import Claim
    from ff_fast._core.completions import CompletionCore
    from ff_fast._core.deployment import Deployment
    from ff_fast._core.durability import Ask
    from ff_fast._core.follow import FollowCore
    from ff_fast._core.operations import Call
    from ff_fast._core.steps import Steps
    from ff_fast._core.tail import TailCore
    from ff_fast._core.writer import WriterState
    from ff_fast.types import AppendFrameOutcome, BackendConfig, Durability, LeaseRenewal, Stats

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")

_GIVE_BACK_EVERY_S = 0.25


def awaited(
    make: Callable[Concatenate[Deployment, P], R],
    carry_out: Callable[[Operations, R], Coroutine[Any, Any, T]],
    returns: str | None = None,
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]]:
    """Return a coroutine method that calls *make* with its arguments and awaits the shell's part."""

    async def method(self: Operations, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await carry_out(self, make(self._deployment, *args, **kwargs))

    return dressed("Operations", method, make, returns)


def of_handler(
    make: Callable[Concatenate[Deployment, P], R],
    carry_out: Callable[[S, H, R], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[S, H, P], Coroutine[Any, Any, T]]:
    """Return the coroutine method whose first argument is a handler, in front of the operation's."""

    async def method(self: S, handler: H, /, *args: P.args, **kwargs: P.kwargs) -> T:
        options: dict[str, Any] = options_of(handler, kwargs)
        return await carry_out(self, handler, make(self._deployment, *args, **options))

    return dressed("ValkeyBackend", method, make, "None", HANDLER)


def method(
    make: Callable[Concatenate[Deployment, P], Call[T]],
) -> Callable[Concatenate[Operations, P], Coroutine[Any, Any, T]]:
    """Return the coroutine method that sends a call and returns its value."""
    return awaited(make, lambda backend, call: backend._do(call))


async def drive(
    actions: Generator[A, Any, T],
    perform: Callable[[A], Awaitable[object]],
    limit_s: float | None = None,
) -> T:
    """Perform the actions of the core, in *limit_s* seconds, and return what comes of them."""
    # The caller that cancels the task waits for it, so the actions after an interrupt have a deadline.
    until = None if limit_s is None else time.monotonic() + limit_s
    try:
        action = next(actions)
        while True:
            try:
                left = None if until is None else until - time.monotonic()
                async with asyncio.timeout(left):
                    value = await perform(action)
            except BaseException as error:  # noqa: BLE001 - the core decides what it means
                if until is None and not isinstance(error, Exception):
                    until = time.monotonic() + HAND_BACK_S
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
        self._opening = asyncio.Lock()
        self._writers: weakref.WeakValueDictionary[str, Writer] = weakref.WeakValueDictionary()
        self._frame_writers: FrameWriters[Writer] = FrameWriters(self._writers)
        self._senders = Senders(self._nodes, self._check_thread, config)
        self._attending = Attending()
        self._kept = KeptLeases(self._hub, self._loop.call_later)
        self._witnesses: dict[tuple[Node, Durability], Witness] = {}

    async def _witness(self, ask: Ask) -> None:
        """Put a question of durability; return once it has ended, or is late."""
        self._check()
        try:
            node = self._nodes.of(ask.evidence.command.slot)
        except FFError as error:
            ask.begin()
            ask.end(error)
            return
        key = (node, ask.level.durability)
        witness = self._witnesses.get(key)
        if witness is None:
            witness = self._witnesses[key] = Witness(self._nodes, *key)
        await witness.answer(ask)

    def _store_soon(self) -> None:
        self._senders.store_soon()

    def _stored(self) -> bool:
        return self._senders.stored

    def _stop(self) -> None:
        keepers = self._kept.close()
        super()._stop()
        for keeper in keepers:
            keeper._abandon(_transport.closed_error())
        self._senders.stop()
        self._frame_writers.clear()

    async def _do(self, call: Call[T], *, until: float = float("inf")) -> T:
        if call.claim is not None:
            return await self._claim(call, call.claim)
        writer = None if call.releases is None else self._writers.get(call.releases)
        if writer is not None and not writer._idle:
            # An error of the writer is its own; what it means for the lease, the call says.
            with contextlib.suppress(FFError):
                await writer._wait(settle(writer, self._timeout_s))
        value = await self._run(call, until=until)
        self._frame_writers.settle(call.released_lease(value), call.extended_lease)
        return value

    async def _claim(self, call: Call[T], claim: Claim) -> T:
        """Make a claim; what it has taken is given back, unless the caller gets it."""
        self._claims.add(claim)
        claim.shares = True
        try:
            value = await self._run(call)
            if claim.abandoned:
                raise _transport.closed_error()
        except BaseException:
            if claim.unsettled:
                claim.abandoned = True
                task = self._spawn(self._give_back(claim))
                self._giving_back.add(task)
                task.add_done_callback(self._giving_back.discard)
            raise
        finally:
            self._claims.discard(claim)
        return value

    async def _give_back(self, claim: Claim) -> None:
        def steps() -> Steps[None]:
            return claiming.give_back(self._deployment, claim)

        lapses = time.monotonic() + claim.request.lease_ttl_ms / 1000
        while time.monotonic() < lapses:
            try:
                await self._run(operations.Call(steps, when_closed=True))
            except FFError as error:
                if self._closed or not error.retryable:
                    return
            else:
                return
            await asyncio.sleep(_GIVE_BACK_EVERY_S)

    def _tail(self, source: TailCore) -> Tail:
        return Tail(self, source)

    def _follow(self, source: FollowCore) -> Follow:
        return Follow(self, source)

    async def _wait(self, request: operations.WaitRequest) -> bytes:
        async with Waiting(self, request.source) as waiting:
            return request.value(await waiting.next_batch(request.timeout_s))

    def _subscribe(self, source: CompletionCore) -> Completions:
        return Completions(self, source)

    def _open_writer(self, request: operations.WriterRequest) -> Opening[Writer]:
        async def opening() -> Writer:
            state = await self._run(request.call)
            self._check()
            return self._use_writer(state)

        return Opening(opening)

    def _use_writer(self, state: WriterState) -> Writer:
        writer = Writer(state, self._senders, self, self._witness)
        writer._kept = self._kept
        self._writers[writer._lease_id] = writer
        self._frame_writers.pop(writer._lease_id, None)
        return writer

    async def _append_frame(self, request: operations.FrameRequest) -> AppendFrameOutcome:
        self._check()
        async with self._opening:
            # One at a time: two concurrent openings would supersede each other.
            writer = self._writers.get(request.lease_id)
            if writer is None or isinstance(writer._failure, WriterClosed):
                writer = await self._open_writer(request.opening())
                self._frame_writers.opened(writer, request.lease_s)
        try:
            writer.write_frame(request.frame)
            level = request.level if request.level.asks else writer._level
            outcome = await writer._wait(flush_to(writer, request.timeout, level))
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

        def renew() -> Coroutine[Any, Any, LeaseRenewal]:
            return self._do(request.renewal, until=clock.held_until)

        clock = request.clock()
        leave = partial(self._kept.remove, request.channel, request.name)
        keeper = LeaseKeeper(clock, renew, fail, lost, self._spawn, leave)
        self._kept.add(request.channel, request.name, keeper)
        return keeper

    def _stats(self, count: Callable[..., Stats]) -> Stats:
        return count(self._writers.valuerefs(), closed=self._closed)

    async def _supervise(self, request: operations.SupervisionRequest) -> None:
        await drive(request.actions(lambda: self._closed, self._attending.tell), self._supervising)

    async def _supervising(self, action: operations.MakeCall | operations.Rest) -> object:
        if isinstance(action, operations.MakeCall):
            return await self._run(action.call, until=time.monotonic() + action.limit_s)
        await asyncio.sleep(action.seconds)
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
    wait = awaited(operations.wait, _wait, "bytes")
    subscribe_completions = bind(operations.subscribe_completions, _subscribe, "Completions")
    open_writer = bind(operations.open_writer, _open_writer, "Opening[Writer]")
    append_frame = awaited(operations.append_frame, _append_frame, "AppendFrameOutcome")
    keep_lease = bind(operations.keep_lease, _keep_lease, "LeaseKeeper")
    supervise = awaited(operations.supervise, _supervise, "None")
