"""Streams of one shell: written by hand or by workers, read from their beginning, and all that was said of them.

A payload follows from execution, attempt and sequence (`tests.soak.job.frame`), so whoever reads a frame knows whether
it is right.
"""

import asyncio
import collections
import contextlib
import random
import threading
import time

import ff_fast
from ff_fast import Durability, FailureClass, RetryPolicy, keys
from ff_fast.errors import FFError, InvalidCursor

from ...server.workers import handler_for
from ...shells import Shell
from ...soak.account import DONE, NOT_APPLIED, UNKNOWN, outcome_of
from ...soak.child import sleep
from ...soak.job import MODES, Burst, frame

LEASE_MS = 30_000
RETENTION_S = 600.0
PATIENT = RetryPolicy(max_retries=100, delay=0.05, max_delay=0.2, max_reclaims=100)
FLUSH_S = 30.0
"""Time limit of a flush."""
CALL_S = 20.0
"""Longest time of a call: twice the time limit of the backend, since a connection may have died in silence, the pauses
of its retries, and what a busy machine takes."""
BURSTS = tuple(Burst(1 << 30, mode, 40) for mode in ("durable", "best_effort"))
FLUSH_EVERY = 20
TERMINAL = ("completed", "failed", "cancelled", "expired")


REPLICATED = {"durability": Durability.replicated(1), "durability_timeout": 5.0}
"""Options of a writer whose acknowledgements are to survive its server."""


class Attempt:
    """What was said about one attempt.

    Attributes:
        acknowledged: Last sequence that its writer was told is stored.
        safe: The same of a writer whose frames are to be on a replica.
        lost: Ranges that the caller was told are lost.
        error: The error that its caller gave up for.
        completed: Whether its caller was told that it is.
        is_safe: Whether that is to be on a replica.
    """

    def __init__(self):
        self.acknowledged = 0
        self.safe = 0
        self.lost = []
        self.error = None
        self.completed = False
        self.is_safe = False

    def has_told(self, sequence):
        return any(sequence in each for each in self.lost)


class Execution:
    """What is known of one execution.

    Attributes:
        created: What the call that created it was told.
        over: It has ended, and its readers with it.
        is_gone: No server has it any more.
        reads: A reader for each attempt that was read: its items, and the error that ended it.
    """

    def __init__(self, eid, burst, length):
        self.eid = eid
        self.burst = burst
        self.length = length
        self.created = UNKNOWN
        self.attempts = collections.defaultdict(Attempt)
        self.reads = []
        self.over = asyncio.Event()
        self.is_gone = False

    def payload(self, attempt, sequence):
        return frame(self.eid, attempt, sequence, self.burst)


def _forget_frames(error):
    if isinstance(error, BaseException):
        error.__traceback__ = None
        _forget_frames(error.__cause__)
        _forget_frames(error.__context__)


class Told(Exception):  # noqa: N818 - it is no error: the caller was told, and gives its attempt up
    """An error that ends an attempt for its caller."""


class Load:
    """Streams of one shell on one site.

    Args:
        kind: The shell.
        streams: How many executions are worked on at a time: half by hand, half by a worker.
        length: Frames of each.
        rate: Frames a second of each.
        report: Gets each violation.
    """

    def __init__(self, kind, site, *, streams, length, rate, seed, report):
        self.kind = kind
        self.site = site
        self.streams = streams
        self.length = length
        self.rate = rate
        self.executions = {}
        self.completions = collections.Counter()
        self.counts = collections.Counter()
        self.slowest = 0.0
        self.stopping = False
        self.over = False
        self._seed = seed
        self._report = report
        self._shell = Shell(kind)
        self._backends = []
        self._tasks = set()
        self._stop = None
        self._lane = f"chaos-{keys.new_uuid()}"

    # -- its life ------------------------------------------------------------------------------------------------

    async def start(self):
        self.writes, self.reads, works, other = [
            await self._repeated(lambda: self._shell.connect(self.site.url)) for _ in range(4)
        ]
        self._backends = [self.writes, self.reads, works, other]
        self._spawn("subscriber", self._subscribe(other))
        by_hand = self.streams - self.streams // 2
        for i in range(by_hand):
            self._spawn(f"stream {i}", self._stream(f"{self._lane}-{i}", self._dice(i)))
        for i in range(by_hand, self.streams):
            self._spawn(f"producer {i}", self._produce(self._dice(i)))
        self._stop = asyncio.Event() if self.kind == "asyncio" else threading.Event()
        self._spawn("worker", self._work(works))
        self._spawn("supervisor", self._supervise(other))

    def _dice(self, number):
        return random.Random(f"{self._seed}/{self.kind}/{number}")

    def _spawn(self, name, what):
        async def run():
            try:
                await what
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                self._report(f"{name} ended with {type(error).__name__}: {error}")
                raise

        task = asyncio.create_task(run(), name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drain(self, deadline_s):
        """Let everything end that is there; return the executions that have not."""
        self.stopping = True
        until = time.monotonic() + deadline_s
        left = list(self.executions.values())
        while left and time.monotonic() < until:
            left = [each for each in left if not await self._has_ended(each)]
            await asyncio.sleep(0.1)
        return left

    def forget_frames(self):
        """Let go what the frames of noted errors hold: the writer and the reader that have failed with them."""
        for execution in self.executions.values():
            for attempt in execution.attempts.values():
                _forget_frames(attempt.error)
            for items in execution.reads:
                _forget_frames(items[-1] if items else None)

    async def _has_ended(self, execution):
        with contextlib.suppress(ff_fast.ExecutionNotFound):
            found = await self._repeated(lambda: self.writes.describe(execution.eid))
            if found.state not in TERMINAL:
                return False
        return execution.over.is_set()

    async def stop(self):
        """End every task, and close every backend."""
        self.over = self.stopping = True
        self._stop.set()
        for execution in self.executions.values():
            execution.over.set()
        _, late = await asyncio.wait(self._tasks, timeout=30) if self._tasks else (None, ())
        for task in late:
            self._report(f"{task.get_name()} does not end")
            task.cancel()
        await asyncio.gather(*late, return_exceptions=True)
        for backend in self._backends:
            await backend.close()

    async def _repeated(self, call, refused=None):
        """Repeat a call that may be repeated until it is answered; see `_hold` for *refused*."""
        refuted = True
        while True:
            try:
                return await self._timed(call())
            except FFError as error:
                if not error.retryable or self.over:
                    raise
                self.counts[f"repeated after {error.code}"] += 1
                refuted = refuted and outcome_of(error) == NOT_APPLIED
                if refuted and refused:
                    await self._hold(error, refused)
            await asyncio.sleep(0.05)

    async def _hold(self, error, refused):
        """Report a call that was *not applied*, and yet was: *refused* finds out, while nobody repeats the call."""
        self.counts[f"held against the server after {error.code}"] += 1
        if not await refused():
            self._report(f"a call was applied, and its caller told {error!r}")

    async def _is_absent(self, eid):
        try:
            await self._repeated(lambda: self.reads.describe(eid))
        except ff_fast.ExecutionNotFound:
            return True
        return False

    async def _is_open(self, handle):
        try:
            found = await self._repeated(lambda: self.reads.describe(handle.execution_id))
        except ff_fast.ExecutionNotFound:
            return True
        return found.state not in TERMINAL or found.attempt_count > handle.attempt_index + 1

    async def _timed(self, call, longest=CALL_S):
        began = time.monotonic()
        try:
            return await call
        finally:
            took = time.monotonic() - began
            self.slowest = max(self.slowest, took)
            if took > longest:
                self._report(f"{getattr(call, '__qualname__', call)} took {took:.1f} s")

    # -- executions ----------------------------------------------------------------------------------------------

    async def _create(self, lane, dice):
        # An id of one's own lets the call be repeated for as long as it takes.
        eid = keys.new_execution_id(self.site.partitions)
        execution = Execution(eid, dice.choice(BURSTS), self.length)
        self.executions[eid] = execution
        self._spawn(f"reader of {eid}", self._read(execution, dice))
        options = {"retry": PATIENT, "retention": RETENTION_S, "execution_id": eid}
        await self._repeated(
            lambda: self.writes.create_execution(lane=lane, **options), lambda: self._is_absent(eid)
        )
        execution.created = DONE
        return execution

    async def _produce(self, dice):
        """Keep one execution for the workers on its way."""
        while not self.stopping:
            execution = await self._create(self._lane, dice)
            await execution.over.wait()

    async def _stream(self, lane, dice):
        """Create executions and work on them by hand, also on those that come back."""
        waiting = None
        while not self.over:
            if (waiting is None or waiting.over.is_set()) and not self.stopping:
                waiting = await self._create(lane, dice)
            handle = await self._repeated(
                lambda: self.writes.claim(
                    lane=lane, worker_instance_id=keys.new_uuid(), lease_ttl_ms=LEASE_MS
                )
            )
            if handle is None:
                await asyncio.sleep(0.1)
            else:
                await self._attend(handle, dice)

    async def _attend(self, handle, dice):
        execution = self.executions[handle.execution_id]
        attempt = execution.attempts[handle.attempt_index]
        durable = self.site.has_replicas and dice.random() < 0.3
        options = REPLICATED if durable else {}
        try:
            await self._write(execution, attempt, handle, options)
            await self._patiently(
                attempt,
                lambda: self.writes.complete(handle, execution.eid.encode(), **options),
                refused=lambda: self._is_open(handle),
            )
            attempt.completed = True
            attempt.is_safe = bool(options)
        except Told:
            # Given back, so that its lease is not waited for; whoever has lost it is refused.
            with contextlib.suppress(FFError):
                await self._timed(self.writes.fail(handle, "given up", FailureClass.TRANSIENT))

    async def _write(self, execution, attempt, handle, options):
        mode = MODES[execution.burst.mode]
        writer = await self._patiently(
            attempt, lambda: self.writes.open_writer(handle, mode=mode, **options)
        )
        try:
            while (sequence := writer.next_sequence) <= execution.length:
                payload = execution.payload(handle.attempt_index, sequence)
                writer.write(payload)
                await asyncio.sleep(1 / self.rate)
                if sequence % FLUSH_EVERY == 0 or sequence == execution.length:
                    await self._patiently(attempt, lambda: writer.flush(FLUSH_S), FLUSH_S + 5)
                    attempt.acknowledged = sequence
                    if options:
                        attempt.safe = sequence
            await self._patiently(attempt, lambda: writer.close(FLUSH_S), FLUSH_S + 5)
        except FFError as error:
            # `write` raises what the writer has failed with.
            attempt.error = error
            self.counts[f"writer failed: {error.code}"] += 1
            raise Told from error
        finally:
            with contextlib.suppress(FFError, Told):
                await writer.close(0.1)

    async def _patiently(self, attempt, call, longest=CALL_S, refused=None):
        """Make a call for an attempt: what may be repeated is, and what is lost is noted."""
        refuted = True
        while True:
            try:
                return await self._timed(call(), longest)
            except FFError as error:
                self.counts[f"{error.code} {outcome_of(error)}"] += 1
                refuted = refuted and outcome_of(error) == NOT_APPLIED
                if refuted and refused and not self.over:
                    await self._hold(error, refused)
                if error.code == "frames_lost":
                    attempt.lost.append(range(error.first, error.last + 1))
                    if error.first <= attempt.safe:
                        self._report(f"{error!r}: up to {attempt.safe} was to be on a replica")
                elif error.code == "not_replicated":
                    pass
                elif not error.retryable or self.over:
                    attempt.error = error
                    raise Told from error
            await asyncio.sleep(0.05)

    # -- workers -------------------------------------------------------------------------------------------------

    async def _work(self, backend):
        handler = handler_for(self.kind, self._handle)
        while not self.over:
            try:
                await backend.run_worker(
                    handler,
                    lane=self._lane,
                    lease_ttl_ms=LEASE_MS,
                    concurrency=self.streams // 2 or 1,
                    stop=self._stop,
                )
            except FFError as error:
                # As a service manager does.
                self.counts[f"worker ended: {error.code}"] += 1
                if not error.retryable:
                    self._report(f"the worker ended: {error!r}")

    def _handle(self, task):
        execution = self.executions[task.execution_id]
        attempt = execution.attempts[task.attempt_index]
        try:
            yield from self._write_in(task, execution, attempt)
            # The worker completes it behind the handler.
            attempt.completed = True
        except FFError as error:
            self.counts[f"handler: {error.code} {outcome_of(error)}"] += 1
            attempt.error = error
            raise
        return execution.eid.encode()

    def _write_in(self, task, execution, attempt):
        mode = MODES[execution.burst.mode]
        while (sequence := task.writer.next_sequence) <= execution.length:
            task.write(execution.payload(task.attempt_index, sequence), mode=mode)
            yield sleep(task, 1 / self.rate)
            if sequence % FLUSH_EVERY and sequence != execution.length:
                continue
            try:
                yield task.flush()
            except FFError as error:
                if error.code != "frames_lost":
                    raise
                attempt.lost.append(range(error.first, error.last + 1))
                self.counts["handler: frames_lost"] += 1
            else:
                attempt.acknowledged = sequence

    async def _supervise(self, backend):
        while not self.over:
            try:
                await backend.supervise(interval=0.5, stop=self._stop)
            except FFError as error:
                self.counts[f"supervisor ended: {error.code}"] += 1
                if not error.retryable:
                    self._report(f"the supervisor ended: {error!r}")

    # -- readers -------------------------------------------------------------------------------------------------

    async def _subscribe(self, backend):
        completions = backend.wrapped.subscribe_completions(after="start")
        while not self.over:
            try:
                for each in await self._next_batch(completions, 0.3):
                    self.completions[each.execution_id] += 1
            except InvalidCursor:
                # Told of the loss, a subscriber begins again, and compares with what it has.
                self.counts["subscriptions begun again"] += 1
                await self._close(completions)
                completions = backend.wrapped.subscribe_completions(after="start")
        await self._close(completions)

    async def _next_batch(self, reader, wait_s):
        try:
            if self.kind == "sync":
                return await asyncio.to_thread(reader.next_batch, wait_s)
            return await reader.next_batch(wait_s)
        except FFError as error:
            if not error.retryable:
                raise
            self.counts[f"read failed: {error.code}"] += 1
            await asyncio.sleep(0.1)
            return []

    async def _close(self, reader):
        await (asyncio.to_thread(reader.close) if self.kind == "sync" else reader.aclose())

    async def _read(self, execution, dice):
        """Read attempts in order, each from its beginning; now and then another reader goes on from the cursor."""
        attempt = 0
        while not self.over:
            items, created = [], execution.created
            execution.reads.append(items)
            try:
                await self._read_attempt(execution, attempt, items, dice)
                while not self.over:
                    found = await self._repeated(lambda: self.reads.describe(execution.eid))
                    if found.attempt_count > attempt + 1:
                        break
                    if found.state in TERMINAL:
                        execution.over.set()
                        return
                    await asyncio.sleep(0.1)
            except ff_fast.ExecutionNotFound as error:
                if created == UNKNOWN and not items:
                    # The reader came before the execution.
                    execution.reads.pop()
                    await asyncio.sleep(0.02)
                    continue
                items.append(error)
                execution.over.set()
                return
            except FFError as error:
                items.append(error)
                execution.over.set()
                return
            attempt += 1

    async def _read_attempt(self, execution, attempt, items, dice):
        cursor = None
        while not self.over:
            tail = self.reads.wrapped.tail(execution.eid, attempt, after=cursor)
            turns = dice.choice((5, 1 << 60))
            try:
                while turns and not tail.ended and not self.over:
                    turns -= 1
                    items += await self._next_batch(tail, 1.0)
                cursor, ended = tail.cursor or cursor, tail.ended
            finally:
                await self._close(tail)
            if ended:
                return
