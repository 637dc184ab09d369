"""What goes on while faults are injected: executions are created, signalled, cancelled, read and worked on.

Producers, readers and subscribers are patient: they repeat what may be repeated. The callers of the lane ``hand`` are
hasty: short limits and random cancellations make calls fail, and every outcome that they are told is held against what
is stored.
"""

import asyncio
import collections
import contextlib
import random
import uuid
from typing import NamedTuple

from ff_fast import (
    FailureClass,
    Frame,
    FrameKind,
    Gap,
    PendingWaitpoint,
    StreamFrame,
    SummaryView,
    TailVisibility,
    UsageDimensions,
    WaitpointHmac,
    keys,
)
from ff_fast.errors import (
    ExecutionNotFound,
    FFError,
    FlowAlreadyTerminal,
    InvalidToken,
    SummaryConflict,
    WaitpointClosed,
)
from ff_fast.types import CancelFlowWait

from ..shells import KINDS, Shell
from ..waiting import wait_until_async
from .account import DONE, NOT_APPLIED, UNKNOWN, outcome_of
from .child import LEASE_MS, PATIENT, RETENTION_S
from .job import draw
from .site import LANES, PARTITIONS

TERMINAL = ("completed", "failed", "cancelled", "expired")
LONG_LEASE_MS = 3_600_000
READERS = 12
"""Most tails at a time."""


class Read(NamedTuple):
    """What a reader brought of one attempt.

    Attributes:
        attempt: The attempt.
        whole: Whether it began at the beginning.
        hidden: Whether it left out best-effort frames.
        items: All that it got.
        document: The document that it folded; None if it met a gap.
    """

    attempt: int
    whole: bool
    hidden: bool
    items: list
    document: bytes | None


class Load:
    """Everything that is done to executions, in both shells."""

    def __init__(self, site, account, seed, retention=RETENTION_S):
        self.site = site
        self.account = account
        self.retention = retention
        self._dice = random.Random(f"{seed}/load")
        self._seed = seed
        self._backends = []
        self._tasks = set()
        self._reading = 0
        self._subscribed = set()
        self.stopping = False
        """No new executions; those that are there go on."""
        self.draining = False
        """Nothing is broken any more. The callers of the lane ``hand`` end all that is left there, under leases that would
        outlive the soak if a cancelled claim kept one."""
        self.over = False

    # -- its life ------------------------------------------------------------------------------------------------

    async def start(self):
        reading = [await self._open(kind, "reads", timeout=2.0) for kind in KINDS]
        for backend in reading:
            for after in (None, "start"):
                name = f"subscriber {backend.kind} from {after}"
                self.account.completions[name] = collections.Counter()
                dice = self._own_dice(backend.kind, str(after))
                self._spawn(name, self._subscribe, backend, name, after, dice)
        # Nothing has ended before their first reads, so all of them are told of everything.
        await wait_until_async(self._subscribers_wait)
        for backend, kind in zip(reading, KINDS, strict=True):
            self._spawn(f"readers {kind}", self._read_some, backend, self._own_dice(kind, "read"))
            patient = await self._open(kind, "calls")
            for what in (self._produce, self._cancel, self._signal):
                name = f"{what.__name__} {kind}"
                self._spawn(name, what, patient, self._own_dice(kind, what.__name__))
            hasty = await self._open(kind, "calls", timeout=1.0, retries=2, factor=20)
            for i in range(3):
                self._spawn(f"caller {kind}", self._call_by_hand, hasty, self._own_dice(kind, i))

    async def _subscribers_wait(self):
        return self._subscribed == self.account.completions.keys()

    def _own_dice(self, kind, number):
        return random.Random(f"{self._seed}/{kind}/{number}")

    async def _open(self, kind, proxy, **limits):
        shell = Shell(kind)
        backend = await self._repeated(
            lambda: shell.connect(self.site.proxies[proxy].url, **limits)
        )
        backend.kind = kind
        self._backends.append(backend)
        return backend

    def _spawn(self, name, what, *arguments):
        async def run():
            try:
                await what(*arguments)
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self.account.violation(f"{name} ended with {type(error).__name__}: {error}")
                raise

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self):
        """End every task, and close every backend."""
        self.over = True
        _, late = await asyncio.wait(self._tasks, timeout=30) if self._tasks else (None, ())
        for task in late:
            self.account.violation(f"{task.get_name()} does not end")
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for backend in self._backends:
            await backend.close()

    async def _repeated(self, call, pause=0.1):
        """Repeat a call that may be repeated until it is answered."""
        while True:
            try:
                return await call()
            except FFError as error:
                if not error.retryable or self.over:
                    raise
                self.account.counts[f"repeated after {error.code}"] += 1
            await asyncio.sleep(pause)

    # -- producers -----------------------------------------------------------------------------------------------

    async def _produce(self, backend, dice):
        while not self.stopping:
            flow = None
            if dice.random() < 0.1:
                flow = await self._create_flow(backend)
            members = [await self._create(backend, dice, flow) for _ in range(3 if flow else 1)]
            if flow is not None and dice.random() < 0.5:
                await self._cancel_flow(backend, flow, members)
            await asyncio.sleep(dice.uniform(0.05, 0.5))

    async def _create_flow(self, backend):
        flow = keys.new_uuid()
        with contextlib.suppress(FFError):
            await backend.create_flow(flow)
            return flow
        return None

    async def _create(self, backend, dice, flow):
        eid = (
            keys.new_execution_id(PARTITIONS)
            if flow is None
            else keys.execution_id_for_flow(flow, PARTITIONS)
        )
        job = draw(dice)
        options = {
            "priority": dice.randrange(10),
            "delay": dice.choice((None, None, 0.2)),
            "deadline": dice.choice((None,) * 9 + (dice.uniform(1, 10),)),
            "flow_id": flow,
        }
        await self._created(backend, eid, LANES[0], job, **options)
        return eid

    async def _created(self, backend, eid, lane, job, **options):
        """Create an execution and note what was said about it."""
        self.account.created(eid, job, UNKNOWN)
        execution = self.account.executions[eid]
        execution.may_be_cancelled = options.get("deadline") is not None
        options |= {"retry": PATIENT, "retention": self.retention, "execution_id": eid}
        payload = b"" if job is None else job.dump()
        try:
            await backend.create_execution(lane=lane, payload=payload, **options)
        except FlowAlreadyTerminal as error:
            execution.created = outcome_of(error)
        except FFError as error:
            execution.created = outcome_of(error)
            self.account.event(f"create of {eid[-36:]} {execution.created}: {error.code}")
        else:
            execution.created = DONE
        self.account.counts[f"create {execution.created}"] += 1

    async def _cancel_flow(self, backend, flow, members):
        for eid in members:
            self.account.executions[eid].may_be_cancelled = True
        with contextlib.suppress(FFError):
            await backend.cancel_flow(flow, wait=CancelFlowWait.NO_WAIT)

    async def _cancel(self, backend, dice):
        while not self.stopping:
            await asyncio.sleep(dice.uniform(0.5, 3))
            running = [
                e for e in self.account.executions.values() if not e.told and e.job is not None
            ]
            if running:
                execution = dice.choice(running)
                execution.may_be_cancelled = True
                mark = keys.new_uuid()
                grace = dice.choice((None, 0.3))
                call = backend.cancel(execution.eid, reason=mark, grace=grace)
                await self._marked(execution, "cancel" if grace is None else "ask", mark, call)

    async def _signal(self, backend, dice):
        waiting = self.account.waitpoints
        while not self.over:
            self.account.read_files()
            if not waiting:
                await asyncio.sleep(0.05)
                continue
            line = waiting.popleft()
            waitpoint = PendingWaitpoint(line["id"], WaitpointHmac(line["token"]))
            signal = str(uuid.uuid5(uuid.UUID(line["id"]), "go"))
            with contextlib.suppress(WaitpointClosed, InvalidToken, ExecutionNotFound):
                try:
                    await backend.deliver_signal(line["eid"], waitpoint, "go", signal_id=signal)
                except FFError as error:
                    if not error.retryable:
                        raise
                    waiting.append(line)
                    await asyncio.sleep(0.1)

    # -- readers -------------------------------------------------------------------------------------------------

    async def _subscribe(self, backend, name, after, dice):
        """Take completions; now and then another reader goes on from the cursor of this one."""
        completions = backend.wrapped.subscribe_completions(after=after)
        while not self.over:
            for each in await self._next_batch(backend, completions, dice):
                self.account.completed(name, each)
            if completions.cursor is None:
                continue
            self._subscribed.add(name)
            if dice.random() < 0.1:
                await _close(backend, completions)
                completions = backend.wrapped.subscribe_completions(after=completions.cursor)
        await _close(backend, completions)

    async def _next_batch(self, backend, reader, dice):
        """What comes next; an empty list if nothing came in time, or the read was cancelled."""
        try:
            if backend.kind == "sync":
                return await asyncio.to_thread(reader.next_batch, dice.choice((0.05, 0.3)))
            if dice.random() < 0.3:
                with contextlib.suppress(TimeoutError, StopAsyncIteration):
                    return [await asyncio.wait_for(anext(reader), dice.uniform(0, 0.02))]
                return []
            return await reader.next_batch(dice.choice((0.05, 0.3)))
        except FFError as error:
            if not error.retryable:
                raise
            self.account.counts[f"read failed: {error.code}"] += 1
            await asyncio.sleep(0.1)
            return []

    async def _read_some(self, backend, dice):
        seen = set()
        while not self.stopping:
            await asyncio.sleep(0.1)
            for execution in list(self.account.executions.values())[-20:]:
                if execution.eid in seen or self._reading >= READERS:
                    continue
                seen.add(execution.eid)
                if dice.random() < 0.5 and execution.created == DONE:
                    self._reading += 1
                    own = random.Random(f"{self._seed}/{execution.eid}")
                    self._spawn(f"reader of {execution.eid}", self._read, backend, execution, own)

    async def _read(self, backend, execution, dice):
        execution.busy += 1
        try:
            attempt = 0
            while not self.over:
                execution.reads.append(
                    await self._read_attempt(backend, execution.eid, attempt, dice)
                )
                while not self.over:
                    found = await self._repeated(lambda: backend.describe(execution.eid))
                    if found.attempt_count > attempt + 1:
                        break
                    if found.state in TERMINAL:
                        return
                    await asyncio.sleep(0.1)
                attempt += 1
        except ExecutionNotFound:
            # Its retention was over before a slow link let the reader come to its end.
            self.account.counts["readers that came too late"] += 1
        finally:
            execution.busy -= 1
            self._reading -= 1

    async def _read_attempt(self, backend, eid, attempt, dice):
        """Read one attempt to its end: from its beginning or its summary, reopened now and then from a cursor."""
        document = None
        if dice.random() < 0.3:
            document = await self._repeated(lambda: backend.read_summary(eid, attempt))
        view = SummaryView(document)
        hidden = dice.random() < 0.2
        options = {"visibility": TailVisibility.EXCLUDE_BEST_EFFORT} if hidden else {}
        items, cursor = [], None if document is None else document.cursor
        while not self.over:
            tail = backend.wrapped.tail(eid, attempt, after=cursor, **options)
            turns = dice.choice((3, 10, 1 << 60))
            while turns and not tail.ended and not self.over:
                turns -= 1
                for item in await self._next_batch(backend, tail, dice):
                    items.append(item)
                    view = _folded(view, item)
            cursor = tail.cursor or cursor
            ended = tail.ended
            await _close(backend, tail)
            if ended:
                break
        folded = None if view is None else view.document_json
        return Read(attempt, document is None, hidden, items, folded)

    # -- callers -------------------------------------------------------------------------------------------------

    async def _marked(self, execution, what, mark, call):
        """Make a call that leaves *mark*, and note its outcome. Return its value, None without one."""
        execution.busy += 1
        try:
            value = await call
        except (FFError, TimeoutError) as error:
            self.account.said(execution.eid, what, mark, error)
            return None
        else:
            self.account.said(execution.eid, what, mark)
            return value
        finally:
            execution.busy -= 1

    async def _perhaps_cancelled(self, backend, dice, call):
        """Await a call; in asyncio sometimes only for a moment."""
        if backend.kind == "sync" or dice.random() < 0.6:
            return await call
        self.account.injected["calls cancelled"] += 1
        return await asyncio.wait_for(call, dice.uniform(0, 0.01))

    async def _call_by_hand(self, backend, dice):
        while not self.over:
            if not self.stopping:
                await asyncio.sleep(dice.uniform(0.05, 0.3))
                eid = keys.new_execution_id(PARTITIONS)
                await self._created(backend, eid, LANES[1], None)
            handle = await self._claim(backend, dice)
            if handle is None:
                await asyncio.sleep(dice.uniform(0.05, 0.3))
            else:
                await self._attend(backend, dice, handle)

    async def _claim(self, backend, dice):
        """Claim an execution. Nobody may hold one by a claim that said that there was none, or that failed for sure."""
        instance = keys.new_uuid()
        claim = backend.claim(
            lane=LANES[1],
            worker_instance_id=instance,
            lease_ttl_ms=LONG_LEASE_MS if self.draining else LEASE_MS,
        )
        try:
            handle = await self._perhaps_cancelled(backend, dice, claim)
        except (FFError, TimeoutError) as error:
            outcome = outcome_of(error)
            self.account.counts[f"claim {outcome}"] += 1
            if outcome == NOT_APPLIED:
                self.account.refused_claims[instance] = error.code
            return None
        if handle is None:
            self.account.refused_claims[instance] = "no work"
        else:
            self.account.counts["claim done"] += 1
        return handle

    async def _attend(self, backend, dice, handle):
        """Work on a claimed execution as somebody who gives up easily."""
        execution = self.account.executions[handle.execution_id]
        calls = {
            "frame": lambda mark: backend.append_frame(
                handle, Frame(mark.encode(), FrameKind.EVENT), 1.0
            ),
            "progress": lambda mark: backend.progress(handle, message=mark),
            "usage": lambda mark: backend.report_usage(handle, UsageDimensions(custom={mark: 1})),
            "tag": lambda mark: backend.set_tags(
                handle.execution_id, {f"soak.m{mark.replace('-', '')}": "1"}
            ),
        }
        if dice.random() < 0.5:
            await self._write(backend, dice, execution, handle)
            del calls["frame"]
        for _ in range(dice.randrange(4)):
            what = dice.choice(sorted(calls))
            mark = keys.new_uuid()
            await self._marked(
                execution, what, mark, self._perhaps_cancelled(backend, dice, calls[what](mark))
            )
        ends = {
            "complete": lambda mark: backend.complete(handle, mark),
            "fail": lambda mark: backend.fail(handle, mark, FailureClass.PERMANENT),
            "retry": lambda mark: backend.fail(handle, mark, FailureClass.TRANSIENT),
            "cancel": lambda mark: backend.cancel(handle, reason=mark),
            "delay": lambda mark: backend.delay(handle, 0.1),
            "leave": None,
        }
        (what,) = (
            dice.choices(sorted(ends), (1, 8, 1, 1, 1, 1)) if not self.draining else ("complete",)
        )
        if ends[what] is not None:
            mark = keys.new_uuid()
            call = ends[what](mark)
            if not self.draining:
                # One that is broken off while it waits for a writer is never sent.
                call = self._perhaps_cancelled(backend, dice, call)
            await self._marked(execution, what, mark, call)

    async def _write(self, backend, dice, execution, handle):
        """Write frames that carry marks; what a writer says of each is held against the stream."""
        execution.busy += 1
        written = []
        writer = error = None
        try:
            writer = await backend.open_writer(handle)
            first = writer.next_sequence
            for _ in range(dice.randrange(1, 200)):
                mark = keys.new_uuid()
                writer.write(mark.encode())
                written.append(mark)
                if dice.random() < 0.05:
                    await self._perhaps_cancelled(backend, dice, writer.flush(1.0))
            await writer.close(2.0)
        except (FFError, TimeoutError) as caught:
            error = caught
            if writer is not None:
                with contextlib.suppress(FFError, TimeoutError):
                    await writer.close(0.1)
        finally:
            execution.busy -= 1
        if writer is not None:
            stored = (
                written if error is None else written[: max(0, writer.last_sequence + 1 - first)]
            )
            self._tell_of(execution, stored, written[len(stored) :], writer.error)

    def _tell_of(self, execution, stored, others, failed):
        """Note what became of the frames of a writer: acknowledged, not stored, or unknown."""
        for mark in stored:
            self.account.said(execution.eid, "frame", mark)
        unstored = {frame.payload.decode() for frame in (failed.unstored if failed else ())}
        for mark in others:
            self.account.said(
                execution.eid, "frame", mark, failed if mark in unstored else TimeoutError()
            )
            if unstored and mark not in unstored:
                self.account.violation(
                    f"{mark} is neither acknowledged nor in unstored: {failed!r}"
                )


def _folded(view, item):
    """The view with one more item; None once patches are missing."""
    if view is not None and isinstance(item, StreamFrame):
        try:
            view.apply(item)
        except SummaryConflict:
            return None
    return None if isinstance(item, Gap) else view


async def _close(backend, reader):
    if backend.kind == "sync":
        await asyncio.to_thread(reader.close)
    else:
        await reader.aclose()
