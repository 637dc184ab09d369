"""Tasks of the A2A protocol on any replica: a task store and an event stream for ``a2a-sdk`` (extra ``a2a``).

::

    store = ValkeyTaskStore(backend)
    handler = DefaultRequestHandlerV2(
        agent_executor=executor, task_store=store, agent_card=card, event_stream=ValkeyTaskEventStream(backend)
    )

Each replica of the agent has both, over the same deployment. A client may then get, cancel, list and subscribe to a task on
any of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import TYPE_CHECKING, Any

from ff_fast import keys
from ff_fast._aio.readers import PushReader
from ff_fast._core import ops, tasks
from ff_fast._core.operations import Call
from ff_fast.errors import ExecutionNotFound, FFError, MissingDependency
from ff_fast.types import End, FailureClass, duration_ms

try:
    from a2a.server.cluster import (
        ConcurrentTaskModificationError,
        StoredTask,
        TaskEventStream,
        TaskVersion,
        VersionedEvent,
        VersionedTaskStore,
    )
    from a2a.server.owner_resolver import resolve_user_scope
    from a2a.types.a2a_pb2 import ListTasksResponse, StreamResponse, Task, TaskState
    from a2a.utils.constants import DEFAULT_LIST_TASKS_PAGE_SIZE
    from a2a.utils.errors import InvalidParamsError
    from a2a.utils.proto_utils import to_stream_response
    from a2a.utils.task import (
        ListTasksCursor,
        decode_list_tasks_cursor,
        encode_list_tasks_cursor,
    )
except ImportError as error:
    raise MissingDependency(
        "ff_fast.adapters.a2a needs a2a-sdk 1.3 or newer; run: pip install 'ff_fast[a2a]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from datetime import timedelta

    from a2a.server.context import ServerCallContext
    from a2a.server.events.event_queue import Event
    from a2a.server.owner_resolver import OwnerResolver
    from a2a.types.a2a_pb2 import ListTasksRequest

    from ff_fast import aio

NAMESPACE = "a2a"
TTL_S = 30 * 86_400.0
"""Time that a task is kept after its last save, in seconds."""

_ENDED = frozenset(
    {
        TaskState.TASK_STATE_COMPLETED,
        TaskState.TASK_STATE_CANCELED,
        TaskState.TASK_STATE_FAILED,
        TaskState.TASK_STATE_REJECTED,
    }
)
_RUNNING = frozenset({TaskState.TASK_STATE_SUBMITTED, TaskState.TASK_STATE_WORKING})

_MAX_US = 2**53 - 1
# The list of an owner's tasks is told again of a task that is saved without a change of what it lists, but not with each
# save: the task stays in the list for longer than it is kept by this part of its time.
_NOTED_PART = 8
_NOTED_TASKS = 4_096
_LISTED_AT_ONCE = 1_000
# How long the lease of a task that nobody runs any more is remembered, in seconds.
_LAPSED_KEPT_S = 60.0


class _Tasks:
    """What both classes know of a deployment."""

    def __init__(self, backend: aio.ValkeyBackend, namespace: str) -> None:
        keys.free_text("namespace", namespace)
        self._backend = backend
        self._namespace = namespace

    def _run_id(self, task_id: str) -> str:
        """Return the id of the execution that says who runs a task; it is in the slot of the task."""
        # Whatever text an id is.
        name = tasks.digest_of(task_id)
        return self._backend.execution_id_for(name, namespace=self._namespace)

    def _name(self, task_id: str) -> ops.TaskName:
        return tasks.name_of(self._run_id(task_id))

    async def _do(self, op: ops.Op[ops.T]) -> ops.T:
        return await self._backend._do(tasks.call(op))

    async def _run_state(self, task_id: str) -> ops.State | None:
        op = ops.read_state(self._run_id(task_id))
        with contextlib.suppress(ExecutionNotFound):
            return await self._backend._do(Call(lambda: ops.call(op), writes=False))
        return None


class ValkeyTaskStore(_Tasks, VersionedTaskStore):
    """A ``VersionedTaskStore``: `save` compares the version, stores the task and appends its event in one step.

    While a task is submitted or working, the store that has saved it holds a lease for it, by which
    `ValkeyTaskEventStream` learns that the replica has died.

    Args:
        backend: Where the tasks are.
        namespace: Namespace of the tasks. Stores and streams with the same one share them.
        owner_resolver: Says whose task a call is about. Nobody gets, lists or deletes tasks of another owner.
        ttl: Time that a task and its events are kept after the last save, in seconds or as a ``timedelta``.
        lease_ttl_ms: Length of the lease in ms: so long subscribers wait for a replica that has died.
    """

    def __init__(
        self,
        backend: aio.ValkeyBackend,
        *,
        namespace: str = NAMESPACE,
        owner_resolver: OwnerResolver = resolve_user_scope,
        ttl: float | timedelta = TTL_S,
        lease_ttl_ms: int = 30_000,
    ) -> None:
        super().__init__(backend, namespace)
        self._owner_resolver = owner_resolver
        self._ttl_ms = duration_ms("ttl", ttl)
        self._lease_ttl_ms = lease_ttl_ms
        # Leases of tasks that run here, and the ends of others that are under way.
        self._runs: dict[str, asyncio.Task[aio.OpenedStream | None]] = {}
        self._ending: dict[str, asyncio.Task[None]] = {}
        # What the list of its owner has of a task, as of which version, and when it was told, in monotonic time.
        self._noted: dict[tuple[str, str], tuple[tuple[object, ...], int, float]] = {}

    async def save(
        self,
        task: Task,
        *,
        event: Event | None = None,
        prev: Task | None = None,  # noqa: ARG002 - the whole document is stored
        prev_version: TaskVersion,
        context: ServerCallContext,
    ) -> TaskVersion:
        """Store a task over the version that it was made from, with the event that has changed it.

        One that is cancelled replaces any version of a task that has not ended.

        Returns:
            The new version, which is 1 for a first write.

        Raises:
            ConcurrentTaskModificationError: Another version is stored; of one that is cancelled: none, or one that ended.
            FFError: The server cannot be reached.
        """
        owner = self._owner(context)
        previous = _number(prev_version)
        state = task.status.state
        cancelled = state == TaskState.TASK_STATE_CANCELED
        kind = "cancelled" if cancelled else "ended" if state in _ENDED else ""
        if previous == 0 and not cancelled:
            # Before it is stored, so that no task is stored and not listed.
            await self._note(owner, task, 0)
        if state in _RUNNING:
            await self._hold(task.id)
        op = ops.save_task(
            self._name(task.id),
            owner,
            previous,
            kind,
            keys.new_uuid(),
            self._ttl_ms,
            task.SerializeToString(),
            b"" if event is None else to_stream_response(event).SerializeToString(),
        )
        version = await self._do(op)
        if version is None or state not in _RUNNING:
            self._release(task.id)
        if version is None:
            raise ConcurrentTaskModificationError(task.id)
        await self._note(owner, task, version)
        return TaskVersion(version)

    async def get(self, task_id: str, context: ServerCallContext) -> StoredTask | None:
        """Return a task of the caller's with its version; None where there is none.

        Raises:
            FFError: The server cannot be reached.
        """
        found = await self._do(ops.read_task(self._name(task_id), self._owner(context)))
        if found.version == 0:
            return None
        return StoredTask(Task.FromString(found.document), TaskVersion(found.version))

    async def list(self, params: ListTasksRequest, context: ServerCallContext) -> ListTasksResponse:
        """Return tasks of the caller's, by the time of their status, the latest first.

        Raises:
            InvalidParamsError: The page token is not one of an answer before.
            FFError: The server cannot be reached.
        """
        owner = self._owner(context)
        state = str(params.status) if params.status else ""
        group = _group(params.context_id) if params.context_id else ""
        least = -1
        if params.HasField("status_timestamp_after"):
            least = max(params.status_timestamp_after.ToMicroseconds(), 0)
        after = _place(params.page_token) if params.page_token else None
        page_size = params.page_size or DEFAULT_LIST_TASKS_PAGE_SIZE

        found: list[ops.TaskPlace] = []
        place, total = after, 0
        while True:
            op = ops.list_tasks(owner, state, group, least, place, page_size + 1 - len(found))
            page = await self._do(op)
            found += page.found
            place, total = page.then, page.all
            if place is None or len(found) > page_size:
                break
        if state or group:
            total = await self._count(owner, state, group, least)
        shown = found[:page_size]
        stored = await asyncio.gather(
            *(self._do(ops.read_task(self._name(each.task_id), owner)) for each in shown)
        )
        listed = [Task.FromString(each.document) for each in stored if each.version]
        # The list may be behind a task, and may name one that is gone.
        listed = [
            each
            for each in listed
            if (not params.status or each.status.state == params.status)
            and (not params.context_id or each.context_id == params.context_id)
        ]
        token = None
        if len(found) > page_size:
            last = shown[-1]
            token = encode_list_tasks_cursor(
                ListTasksCursor(
                    timestamp_ns=None if last.time_us < 0 else last.time_us * 1000,
                    task_id=last.task_id,
                )
            )
        return ListTasksResponse(
            tasks=listed,
            total_size=total - (len(shown) - len(listed)),
            next_page_token=token,
            page_size=page_size,
        )

    async def delete(self, task_id: str, context: ServerCallContext) -> None:
        """Remove a task of the caller's; its subscribers end. Nothing happens where there is none.

        Raises:
            FFError: The server cannot be reached.
        """
        owner = self._owner(context)
        self._release(task_id)
        await self._do(ops.delete_task(self._name(task_id), owner))
        self._noted.pop((owner, task_id), None)
        await self._do(ops.note_task(owner, task_id, 0, None, "", "", self._ttl_ms))

    async def aclose(self) -> None:
        """Tell the subscribers of all tasks that run here that their replica is gone; call it behind the handler's."""
        for task_id in list(self._runs):
            self._release(task_id, lost=True)
        if self._ending:
            await asyncio.wait(self._ending.values())

    # -- the list of an owner's tasks ----------------------------------------------------------------------------------

    def _owner(self, context: ServerCallContext) -> str:
        return tasks.digest_of(self._namespace, self._owner_resolver(context))

    async def _note(self, owner: str, task: Task, version: int) -> None:
        time_us = -1
        if task.status.HasField("timestamp"):
            time_us = min(max(task.status.timestamp.ToMicroseconds(), 0), _MAX_US)
        facts = (time_us, str(task.status.state), _group(task.context_id))
        told = None if version == 0 else self._noted.get((owner, task.id))
        now = time.monotonic()
        part_ms = self._ttl_ms // _NOTED_PART
        if (
            told is not None
            and told[0] == facts
            # Nobody else has saved it in between.
            and told[1] == version - 1
            and (now - told[2]) * 1000 < part_ms
        ):
            self._noted[owner, task.id] = (facts, version, told[2])
            return
        noted = await self._do(
            ops.note_task(owner, task.id, version, *facts, self._ttl_ms + part_ms + 1)
        )
        self._noted.pop((owner, task.id), None)
        if version == 0 and not noted:
            return
        if len(self._noted) >= _NOTED_TASKS:
            del self._noted[next(iter(self._noted))]
        self._noted[owner, task.id] = (facts, version, now)

    async def _count(self, owner: str, state: str, group: str, least: int) -> int:
        """Return how many tasks of an owner have that state, that context and at least that time."""
        count, place = 0, None
        while True:
            op = ops.list_tasks(owner, state, group, least, place, _LISTED_AT_ONCE)
            page = await self._do(op)
            count += len(page.found)
            place = page.then
            if place is None:
                return count

    # -- leases of tasks that run --------------------------------------------------------------------------------------

    async def _hold(self, task_id: str) -> None:
        """Hold the lease of a task that runs here."""
        run = self._runs.get(task_id)
        if run is None or _has_no_lease(run):
            run = self._backend._loop.create_task(self._open(task_id))
            self._runs[task_id] = run
        try:
            await asyncio.shield(run)
        except FFError:
            if self._runs.get(task_id) is run:
                del self._runs[task_id]
            raise

    async def _open(self, task_id: str) -> aio.OpenedStream | None:
        ending = self._ending.get(task_id)
        if ending is not None:
            await asyncio.wait({ending})
        eid = self._run_id(task_id)
        for _ in range(2):
            stream = await self._backend.open_stream(
                eid,
                namespace=self._namespace,
                lease_ttl_ms=self._lease_ttl_ms,
                ttl=_LAPSED_KEPT_S,
                takeover=_LAPSED_KEPT_S,
            )
            if stream.role == "producer":
                return stream
            state = await self._run_state(task_id)
            if state is not None and state.outcome is None:
                # Another replica runs it.
                return None
            with contextlib.suppress(ExecutionNotFound):
                await self._backend.delete_execution(eid)
        return None

    def _release(self, task_id: str, *, lost: bool = False) -> None:
        """Let the lease of a task go that does not run here any more."""
        run = self._runs.pop(task_id, None)
        if run is None or self._backend.closed:
            return

        async def end() -> None:
            # A lease that cannot be released lapses.
            with contextlib.suppress(FFError):
                stream = await run
                if stream is not None and lost:
                    await stream.fail("the replica was stopped", FailureClass.INFRA_CRASH)
                elif stream is not None:
                    await stream.complete()
                    await self._backend.delete_execution(stream.execution_id)

        def ended(done: asyncio.Task[None]) -> None:
            if self._ending.get(task_id) is done:
                del self._ending[task_id]

        ending = self._ending[task_id] = self._backend._loop.create_task(end())
        ending.add_done_callback(ended)


class ValkeyTaskEventStream(_Tasks, TaskEventStream):
    """A ``TaskEventStream`` of what `ValkeyTaskStore` saves: subscribers are pushed events, and do not poll.

    A subscription to a task ends by itself when the replica that runs it has died, which its lease tells, and when the task
    is removed.

    Args:
        backend: Where the tasks are.
        namespace: Namespace of the tasks.
    """

    def __init__(self, backend: aio.ValkeyBackend, *, namespace: str = NAMESPACE) -> None:
        super().__init__(backend, namespace)

    async def publish(self, task_id: str, event: VersionedEvent) -> None:
        """Do nothing: an event is stored with the task that it has changed."""

    async def subscribe(
        self, task_id: str, *, after: TaskVersion
    ) -> AsyncGenerator[VersionedEvent, None]:
        """Yield the events of a task that are later than a version, and go on with those that follow.

        Whoever may read the task may subscribe to it: the stream is given no owner.

        Raises:
            FFError: The server cannot be reached.
        """
        _number(after)
        name = self._name(task_id)
        reader = PushReader(self._backend, tasks.TaskEvents(name))
        watching: asyncio.Task[None] | None = None
        lost = False
        try:
            while not lost:
                if watching is None:
                    watching = asyncio.create_task(self._watch(task_id, reader))
                try:
                    batch = await reader.next_batch()
                    if not batch:
                        # The task was removed.
                        return
                except FFError:
                    if not reader.closed:
                        raise
                    lost = True
                    batch = await self._rest(name, reader.cursor)
                for each in batch:
                    version = TaskVersion(each.version)
                    if version.is_after(after):
                        yield VersionedEvent(event=_event(each.data), version=version)
                if watching.done():
                    # Somebody may have begun to run it.
                    watching = None
        finally:
            if watching is not None:
                watching.cancel()
            await reader.aclose()

    async def destroy(self, task_id: str) -> None:
        """Do nothing: events are removed with their task."""

    async def _watch(self, task_id: str, reader: PushReader[tasks.TaskEvent]) -> None:
        """Close the reader when the replica that runs the task is found to have died; return if none runs it."""
        # What keeps it from being found also keeps the reader from reading, which says so.
        with contextlib.suppress(FFError):
            if await self._is_lost(task_id):
                await reader.aclose()

    async def _is_lost(self, task_id: str) -> bool:
        """Wait until the run of the task ends; return whether its replica has died, False where it does not run."""
        state = await self._run_state(task_id)
        if state is None:
            return False
        if state.outcome is not None:
            return state.closed_reason == "producer_lost"
        if not state.claimed:
            return state.attempt_index > 0
        if not state.lapsed:
            async with self._backend.tail(self._run_id(task_id), state.attempt_index) as tail:
                async for item in tail:
                    if isinstance(item, End):
                        return item.reason == "producer_lost"
        return True

    async def _rest(self, name: ops.TaskName, after: str | None) -> list[tasks.TaskEvent]:
        """Return the events that are stored after the place *after*."""
        place = after or tasks.TaskEvents.start
        found: list[tasks.TaskEvent] = []
        while True:
            read = await self._do(ops.read_task(name, after=place, count=256))
            found += [tasks.TaskEvent(version, data, at) for at, version, data in read.events]
            if not read.more:
                return found
            place = found[-1].cursor


def _has_no_lease(run: asyncio.Task[aio.OpenedStream | None]) -> bool:
    """Whether another replica had the lease when it was asked for, and may have let it go since; or it is lost."""
    if not run.done() or run.cancelled() or run.exception() is not None:
        return False
    stream = run.result()
    return stream is None or stream.cancelled


def _number(version: TaskVersion) -> int:
    value = version._value
    if type(value) is not int:
        raise TypeError(f"A version of this store is an int, not {type(value).__name__}.")
    return value


def _group(context_id: str) -> str:
    """Return what stands for a context in the list of tasks."""
    return tasks.digest_of(context_id)[:16] if context_id else "-"


def _place(page_token: str) -> ops.TaskPlace:
    cursor = decode_list_tasks_cursor(page_token)
    if cursor is None:
        raise InvalidParamsError("Invalid page token")
    at = cursor.timestamp_ns
    if at is not None and not 0 <= at // 1000 <= _MAX_US:
        raise InvalidParamsError("Invalid page token")
    return ops.TaskPlace(-1 if at is None else at // 1000, cursor.task_id)


def _event(data: bytes) -> Any:
    """Return the event that a stored text is."""
    response = StreamResponse.FromString(data)
    which = response.WhichOneof("payload")
    if which is None:
        raise ValueError("A stored event is of no known kind.")
    return getattr(response, which)
