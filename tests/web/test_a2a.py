"""The task store and the event stream of A2A: what a2a-sdk's own tests ask of a pair, and what lost replicas do."""

import asyncio
import contextlib
import signal
import sys
import uuid

import pytest

from ff_fast import aio
from tests.waiting import wait_until_async

pytestmark = pytest.mark.web
pytest.importorskip("a2a.server.cluster", reason="make test-web installs it")

from a2a.auth.user import UnauthenticatedUser, User  # noqa: E402
from a2a.server.cluster import ConcurrentTaskModificationError, TaskVersion  # noqa: E402
from a2a.server.context import ServerCallContext  # noqa: E402
from a2a.types.a2a_pb2 import (  # noqa: E402
    Artifact,
    ListTasksRequest,
    Part,
    Task,
    TaskArtifactUpdateEvent,
    TaskState,
    TaskStatus,
    TaskStatusUpdateEvent,
)
from a2a.utils.errors import InvalidParamsError  # noqa: E402

from ff_fast.adapters.a2a import ValkeyTaskEventStream, ValkeyTaskStore  # noqa: E402

MISSING = TaskVersion.MISSING
SUBMITTED = TaskState.TASK_STATE_SUBMITTED
WORKING = TaskState.TASK_STATE_WORKING
COMPLETED = TaskState.TASK_STATE_COMPLETED
CANCELED = TaskState.TASK_STATE_CANCELED
INPUT_REQUIRED = TaskState.TASK_STATE_INPUT_REQUIRED
ENDED = (
    COMPLETED,
    CANCELED,
    TaskState.TASK_STATE_FAILED,
    TaskState.TASK_STATE_REJECTED,
)


class Named(User):
    def __init__(self, name):
        self._name = name

    @property
    def is_authenticated(self):
        return True

    @property
    def user_name(self):
        return self._name


@pytest.fixture
def owner():
    return ServerCallContext(user=Named(uuid.uuid4().hex))


@pytest.fixture
def replicas(server):
    """`async with replicas(n) as [(store, stream), ...]`."""

    @contextlib.asynccontextmanager
    async def opened(count=1, **options):
        async with contextlib.AsyncExitStack() as stack:
            made = []
            for _ in range(count):
                backend = await stack.enter_async_context(aio.ValkeyBackend.connect(server.url))
                store = ValkeyTaskStore(backend, **options)
                stack.push_async_callback(store.aclose)
                made.append((store, ValkeyTaskEventStream(backend)))
            yield made

    return opened


def task_of(state=WORKING, *, task_id=None, context_id="c-1", seconds=None):
    task = Task(
        id=task_id or str(uuid.uuid4()), context_id=context_id, status=TaskStatus(state=state)
    )
    if seconds is not None:
        task.status.timestamp.FromSeconds(seconds)
    return task


def status_event(task):
    return TaskStatusUpdateEvent(
        task_id=task.id, context_id=task.context_id, status=TaskStatus(state=task.status.state)
    )


def text_event(task, text):
    return TaskArtifactUpdateEvent(
        task_id=task.id,
        context_id=task.context_id,
        artifact=Artifact(artifact_id="a", parts=[Part(text=text)]),
        append=True,
    )


async def save(store, task, prev, context, *, event=None):
    return await store.save(task, event=event, prev=None, prev_version=prev, context=context)


async def collect(stream, task_id, after=MISSING, *, into=None, count=None):
    found = [] if into is None else into
    async with contextlib.aclosing(stream.subscribe(task_id, after=after)) as events:
        async for each in events:
            found.append(each)
            if len(found) == count:
                break
    return found


def texts(found):
    return [each.event.artifact.parts[0].text for each in found]


async def _true(value):
    return value


@pytest.mark.cluster
def test_versions_count_the_writes(replicas, owner):
    async def run():
        async with replicas() as [(store, _)]:
            task = task_of()
            version = await save(store, task, MISSING, owner)
            assert version == TaskVersion(1)
            for number in range(2, 5):
                task.metadata["n"] = number
                version = await save(store, task, version, owner)
                assert version == TaskVersion(number)
            stored = await store.get(task.id, owner)
            assert stored.task == task
            assert stored.version == version
            assert await store.get("nobody-knows", owner) is None

    asyncio.run(run())


@pytest.mark.cluster
def test_a_stale_version_is_refused_and_changes_nothing(replicas, owner):
    async def run():
        async with replicas(2) as [(one, stream), (other, _)]:
            task = task_of()
            first = await save(one, task, MISSING, owner)
            second = await save(other, task, first, owner, event=text_event(task, "kept"))
            for prev in (MISSING, first, TaskVersion(9)):
                with pytest.raises(ConcurrentTaskModificationError) as refused:
                    await save(one, task_of(COMPLETED, task_id=task.id), prev, owner)
                assert refused.value.task_id == task.id
            assert (await one.get(task.id, owner)).version == second
            assert texts(await collect(stream, task.id, count=1)) == ["kept"]
            with pytest.raises(ConcurrentTaskModificationError):
                await save(one, task_of(), TaskVersion(1), owner)
            with pytest.raises(TypeError):
                await save(one, task, TaskVersion("1"), owner)

    asyncio.run(run())


def test_a_cancel_needs_no_version_but_a_task_that_goes_on(replicas, owner):
    async def run():
        async with replicas(2) as [(one, _), (other, _)]:
            task = task_of()
            version = await save(one, task, MISSING, owner)
            version = await save(one, task, version, owner)
            cancelled = task_of(CANCELED, task_id=task.id)
            assert await save(other, cancelled, TaskVersion(1), owner) == TaskVersion(3)
            # The owner learns it by its next save.
            with pytest.raises(ConcurrentTaskModificationError):
                await save(one, task, version, owner)
            with pytest.raises(ConcurrentTaskModificationError):
                await save(other, task_of(CANCELED), MISSING, owner)
            for state in ENDED:
                ended = task_of(state)
                if state == CANCELED:
                    await save(one, task_of(task_id=ended.id), MISSING, owner)
                    await save(one, ended, MISSING, owner)
                else:
                    await save(one, ended, MISSING, owner)
                with pytest.raises(ConcurrentTaskModificationError):
                    await save(other, task_of(CANCELED, task_id=ended.id), TaskVersion(1), owner)

    asyncio.run(run())


@pytest.mark.cluster
def test_of_racing_saves_one_wins_each_version(replicas, owner):
    async def run():
        async with replicas(2) as made:
            stores = [store for store, _ in made]
            task = task_of()
            prev = MISSING
            for number in range(1, 9):
                results = await asyncio.gather(
                    *(
                        save(store, task, prev, owner, event=text_event(task, str(number)))
                        for store in stores * 4
                    ),
                    return_exceptions=True,
                )
                won = [each for each in results if isinstance(each, TaskVersion)]
                assert won == [TaskVersion(number)]
                assert sum(isinstance(e, ConcurrentTaskModificationError) for e in results) == 7
                prev = won[0]
            found = await collect(made[0][1], task.id, count=8)
            assert texts(found) == [str(number) for number in range(1, 9)]
            assert [each.version for each in found] == [TaskVersion(n) for n in range(1, 9)]

    asyncio.run(run())


def test_owners_do_not_see_each_others_tasks(replicas, owner):
    async def run():
        other = ServerCallContext(user=Named(uuid.uuid4().hex))
        nobody = ServerCallContext(user=UnauthenticatedUser())
        async with replicas() as [(store, _)]:
            task = task_of()
            await save(store, task, MISSING, owner)
            for context in (other, nobody):
                assert await store.get(task.id, context) is None
                assert not (await store.list(ListTasksRequest(context_id="c-1"), context)).tasks
                await store.delete(task.id, context)
            assert (await store.get(task.id, owner)).task == task
            # Ids are unique for each owner.
            same = task_of(SUBMITTED, task_id=task.id)
            assert await save(store, same, MISSING, other) == TaskVersion(1)
            assert (await store.get(task.id, owner)).task == task
            await store.delete(task.id, owner)
            assert await store.get(task.id, owner) is None
            assert (await store.get(task.id, other)).task == same

    asyncio.run(run())


@pytest.mark.parametrize("task_id", ["a b/ć{}*", "x" * 2_000, "line\nbreak\0"], ids=repr)
def test_every_text_can_be_the_id_of_a_task(replicas, owner, task_id):
    async def run():
        async with replicas() as [(store, stream)]:
            task = task_of(task_id=task_id)
            await save(store, task, MISSING, owner, event=text_event(task, "x"))
            assert (await store.get(task_id, owner)).task == task
            assert [each.id for each in (await store.list(ListTasksRequest(), owner)).tasks] == [
                task_id
            ]
            assert texts(await collect(stream, task_id, count=1)) == ["x"]
            await store.delete(task_id, owner)

    asyncio.run(run())


@pytest.mark.cluster
def test_a_subscriber_on_another_replica_gets_what_is_stored_and_what_follows(replicas, owner):
    async def run():
        async with replicas(2) as [(store, _), (_, stream)]:
            task = task_of()
            version = MISSING
            for number in range(3):
                version = await save(
                    store, task, version, owner, event=text_event(task, f"{number}")
                )
            found = []
            subscribed = asyncio.create_task(
                collect(stream, task.id, TaskVersion(1), into=found, count=6)
            )
            await wait_until_async(lambda: _true(len(found) == 2))
            # Without an event there is nothing to be told.
            version = await save(store, task, version, owner)
            for number in range(3, 6):
                version = await save(
                    store, task, version, owner, event=text_event(task, f"{number}")
                )
            done = task_of(COMPLETED, task_id=task.id)
            await save(store, done, version, owner, event=status_event(done))
            await asyncio.wait_for(subscribed, 5)
            assert texts(found[:5]) == ["1", "2", "3", "4", "5"]
            assert found[5].event.status.state == COMPLETED
            assert [each.version for each in found] == [TaskVersion(n) for n in (2, 3, 5, 6, 7, 8)]

    asyncio.run(run())


def test_a_subscription_may_come_before_the_task(replicas, owner):
    async def run():
        async with replicas(2) as [(store, _), (_, stream)]:
            task = task_of()
            subscribed = asyncio.create_task(collect(stream, task.id, count=2))
            await asyncio.sleep(0.05)
            version = await save(store, task, MISSING, owner, event=task)
            await save(store, task, version, owner, event=text_event(task, "x"))
            first, second = await asyncio.wait_for(subscribed, 5)
            assert first.event == task
            assert texts([second]) == ["x"]

    asyncio.run(run())


def test_thousands_of_events_come_in_order_to_all_subscribers(replicas, owner):
    async def run():
        async with replicas(2) as [(store, one), (_, other)]:
            task = task_of()
            early = [
                asyncio.create_task(collect(stream, task.id, count=600)) for stream in (one, other)
            ]
            version = MISSING
            for number in range(600):
                version = await save(
                    store, task, version, owner, event=text_event(task, str(number))
                )
            late = asyncio.create_task(collect(other, task.id, count=600))
            for each in (*early, late):
                assert texts(await asyncio.wait_for(each, 10)) == [str(n) for n in range(600)]

    asyncio.run(run())


def test_subscribers_of_a_task_that_is_removed_end(replicas, owner):
    async def run():
        async with replicas(2) as [(store, _), (other, stream)]:
            task = task_of(INPUT_REQUIRED)
            await save(store, task, MISSING, owner, event=text_event(task, "x"))
            found = []
            subscribed = asyncio.create_task(collect(stream, task.id, into=found))
            await wait_until_async(lambda: _true(len(found) == 1))
            await other.delete(task.id, owner)
            await asyncio.wait_for(subscribed, 5)
            await other.delete(task.id, owner)
            assert await store.get(task.id, owner) is None
            assert not (await store.list(ListTasksRequest(), owner)).tasks

    asyncio.run(run())


def test_a_task_is_removed_after_its_time(replicas, owner):
    async def run():
        async with replicas(ttl=0.15) as [(store, _)]:
            task = task_of(COMPLETED)
            await save(store, task, MISSING, owner, event=text_event(task, "x"))
            assert (await store.list(ListTasksRequest(), owner)).total_size == 1

            async def gone():
                return await store.get(task.id, owner) is None

            await wait_until_async(gone)
            listed = await store.list(ListTasksRequest(), owner)
            assert not listed.tasks
            assert listed.total_size == 0
            assert await save(store, task, MISSING, owner) == TaskVersion(1)

    asyncio.run(run())


def test_tasks_are_listed_by_time_the_latest_first_in_pages(replicas, owner):
    async def run():
        async with replicas() as [(store, _)]:
            made = [task_of(COMPLETED, seconds=1_000 + n // 2, task_id=f"t-{n}") for n in range(8)]
            made += [task_of(COMPLETED, task_id=f"none-{n}") for n in range(3)]
            for task in made:
                await save(store, task, MISSING, owner)
            wanted = [f"t-{n}" for n in range(7, -1, -1)] + ["none-2", "none-1", "none-0"]
            for page_size in (1, 2, 3, 11, 50):
                found, token, pages = [], "", 0
                while True:
                    answer = await store.list(
                        ListTasksRequest(page_size=page_size, page_token=token), owner
                    )
                    assert answer.total_size == 11
                    assert answer.page_size == page_size
                    assert len(answer.tasks) <= page_size
                    found += [each.id for each in answer.tasks]
                    token = answer.next_page_token
                    pages += 1
                    if not token:
                        break
                assert found == wanted
                assert pages == -(-11 // page_size)

    asyncio.run(run())


def test_a_page_token_stays_valid_when_its_task_is_removed_or_saved(replicas, owner):
    async def run():
        async with replicas() as [(store, _)]:
            for n in range(4):
                await save(store, task_of(seconds=1_000 + n, task_id=f"t-{n}"), MISSING, owner)
            answer = await store.list(ListTasksRequest(page_size=2), owner)
            await store.delete("t-2", owner)
            answer = await store.list(
                ListTasksRequest(page_size=2, page_token=answer.next_page_token), owner
            )
            assert [each.id for each in answer.tasks] == ["t-1", "t-0"]
            for token in ("x", "%%%", "bnVsbA", "eyJ0cyI6LTEsImlkIjoieCJ9"):
                with pytest.raises(InvalidParamsError):
                    await store.list(ListTasksRequest(page_token=token), owner)

    asyncio.run(run())


def test_a_list_is_filtered_by_context_state_and_time(replicas, owner):
    async def run():
        async with replicas() as [(store, _)]:
            for n in range(60):
                state = COMPLETED if n % 3 else INPUT_REQUIRED
                task = task_of(
                    state, seconds=1_000 + n, task_id=f"t-{n:02}", context_id=f"c-{n % 2}"
                )
                await save(store, task, MISSING, owner)

            async def ids(**given):
                after = given.pop("after", None)
                request = ListTasksRequest(page_size=100, **given)
                if after is not None:
                    request.status_timestamp_after.FromSeconds(after)
                answer = await store.list(request, owner)
                assert answer.total_size == len(answer.tasks)
                return [int(each.id[2:]) for each in answer.tasks]

            down = range(59, -1, -1)
            assert await ids() == [*down]
            assert await ids(context_id="c-1") == [n for n in down if n % 2]
            assert await ids(status=INPUT_REQUIRED) == [n for n in down if n % 3 == 0]
            assert await ids(status=COMPLETED, context_id="c-0", after=1_030) == [
                n for n in down if n % 3 and n % 2 == 0 and n >= 30
            ]
            assert await ids(context_id="unknown") == []
            paged, token = [], ""
            while True:
                answer = await store.list(
                    ListTasksRequest(status=COMPLETED, page_size=7, page_token=token), owner
                )
                assert answer.total_size == 40
                paged += [int(each.id[2:]) for each in answer.tasks]
                token = answer.next_page_token
                if not token:
                    break
            assert paged == [n for n in down if n % 3]

    asyncio.run(run())


def test_a_list_follows_what_becomes_of_a_task(replicas, owner):
    async def run():
        async with replicas(2) as [(one, _), (other, _)]:
            task = task_of(seconds=1_000)
            version = await save(one, task, MISSING, owner)
            await save(one, task_of(seconds=2_000, task_id="b"), MISSING, owner)
            task.status.state = INPUT_REQUIRED
            task.status.timestamp.FromSeconds(3_000)
            await save(other, task, version, owner)
            answer = await one.list(ListTasksRequest(), owner)
            assert [each.id for each in answer.tasks] == [task.id, "b"]
            assert not (await one.list(ListTasksRequest(status=SUBMITTED), owner)).tasks
            assert (await one.list(ListTasksRequest(status=INPUT_REQUIRED), owner)).tasks == [task]

    asyncio.run(run())


@pytest.mark.cluster
def test_a_save_that_is_refused_changes_no_list(replicas, owner):
    async def run():
        async with replicas(2) as [(one, _), (other, _)]:
            task = task_of(seconds=1_000)
            await save(one, task, MISSING, owner)
            for store in (one, other):
                late = task_of(INPUT_REQUIRED, task_id=task.id, context_id="c-2", seconds=9_000)
                with pytest.raises(ConcurrentTaskModificationError):
                    await save(store, late, MISSING, owner)
            for asked in (ListTasksRequest(context_id="c-1"), ListTasksRequest(status=WORKING)):
                assert (await one.list(asked, owner)).tasks == [task]
            answer = await one.list(ListTasksRequest(page_size=1), owner)
            assert (answer.tasks, answer.total_size) == ([task], 1)

    asyncio.run(run())


def test_a_list_follows_replicas_that_take_turns(replicas, owner):
    async def run():
        async with replicas(2) as [(one, _), (other, _)]:
            task = task_of()
            version = await save(one, task, MISSING, owner)
            for store, state in ((other, INPUT_REQUIRED), (one, WORKING), (other, WORKING)):
                task.status.state = state
                version = await save(store, task, version, owner)
                assert (await one.list(ListTasksRequest(status=state), owner)).tasks == [task]
            # What another replica has removed may be stored again.
            await other.delete(task.id, owner)
            assert not (await one.list(ListTasksRequest(), owner)).tasks
            await save(one, task, MISSING, owner)
            assert (await one.list(ListTasksRequest(), owner)).tasks == [task]

    asyncio.run(run())


REPLICA = """
import asyncio, os, signal, sys
sys.path.insert(0, ".")
from tests.web.test_a2a import *

async def run(url, task_id, user):
    context = ServerCallContext(user=Named(user))
    async with aio.ValkeyBackend.connect(url) as backend:
        store = ValkeyTaskStore(backend, lease_ttl_ms=1_500)
        task = task_of(task_id=task_id)
        version = await save(store, task, MISSING, context, event=text_event(task, "one"))
        await save(store, task, version, context, event=text_event(task, "two"))
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(run(*sys.argv[1:]))
"""


@pytest.mark.cluster
def test_subscribers_of_a_replica_that_is_killed_end_and_another_goes_on(replicas, owner, server):
    async def run():
        async with replicas(2) as [(_, stream), (other, late)]:
            task_id = str(uuid.uuid4())
            subscribed = asyncio.create_task(collect(stream, task_id))
            child = await asyncio.create_subprocess_exec(
                sys.executable, "-c", REPLICA, server.url, task_id, owner.user.user_name
            )
            assert await child.wait() == -signal.SIGKILL
            assert texts(await asyncio.wait_for(subscribed, 10)) == ["one", "two"]
            # Who comes late gets what there is.
            assert texts(await asyncio.wait_for(collect(late, task_id), 10)) == ["one", "two"]
            # Another replica takes the task over, and who subscribes then waits for it.
            stored = await other.get(task_id, owner)
            assert stored.version == TaskVersion(2)
            task = stored.task
            version = await save(other, task, stored.version, owner, event=text_event(task, "3"))
            found = []
            subscribed = asyncio.create_task(
                collect(stream, task_id, TaskVersion(2), into=found, count=2)
            )
            await wait_until_async(lambda: _true(len(found) == 1))
            task.status.state = COMPLETED
            await save(other, task, version, owner, event=status_event(task))
            await asyncio.wait_for(subscribed, 5)

    asyncio.run(run())


def test_a_store_that_is_closed_tells_the_subscribers_of_its_tasks(replicas, owner):
    async def run():
        async with replicas(2) as [(store, _), (_, stream)]:
            task = task_of()
            await save(store, task, MISSING, owner, event=text_event(task, "x"))
            found = []
            subscribed = asyncio.create_task(collect(stream, task.id, into=found))
            await wait_until_async(lambda: _true(len(found) == 1))
            await asyncio.sleep(0.05)
            await store.aclose()
            await asyncio.wait_for(subscribed, 5)

    asyncio.run(run())


@pytest.mark.cluster
def test_a_replica_that_goes_on_with_a_task_holds_it_once_the_other_has_let_go(replicas, owner):
    async def run():
        async with replicas(3) as [(one, _), (other, _), (_, stream)]:
            task = task_of()
            version = await save(one, task, MISSING, owner)
            # While another one holds it.
            version = await save(other, task, version, owner)
            await one.aclose()
            version = await save(other, task, version, owner, event=text_event(task, "x"))
            found = []
            subscribed = asyncio.create_task(collect(stream, task.id, into=found))
            await wait_until_async(lambda: _true(len(found) == 1))
            await save(other, task, version, owner, event=text_event(task, "y"))
            await wait_until_async(lambda: _true(len(found) == 2 or subscribed.done()))
            await asyncio.sleep(0.05)
            assert not subscribed.done()
            await other.aclose()
            await asyncio.wait_for(subscribed, 5)
            assert texts(found) == ["x", "y"]

    asyncio.run(run())


def test_a_replica_that_has_lost_its_lease_holds_it_again_with_the_next_save(replicas, owner):
    async def run():
        async with replicas(lease_ttl_ms=1_000) as [(store, stream)]:
            task = task_of()
            version = await save(store, task, MISSING, owner, event=text_event(task, "x"))
            # As a process that stands still: nobody renews.
            held = await store._runs[task.id]
            await held._keeper.stop()
            assert texts(await asyncio.wait_for(collect(stream, task.id), 5)) == ["x"]
            await save(store, task, version, owner)
            state = await store._run_state(task.id)
            assert (state.state, state.lapsed, state.attempt_index) == ("active", False, 1)

    asyncio.run(run())


def test_a_task_that_waits_for_input_is_held_by_nobody(replicas, owner):
    async def run():
        async with replicas(2) as [(one, _), (other, _)]:
            task = task_of()
            for store in (one, other, one):
                stored = await store.get(task.id, owner)
                version = MISSING if stored is None else stored.version
                task.status.state = WORKING
                version = await save(store, task, version, owner)
                assert (await store._run_state(task.id)).state == "active"
                task.status.state = INPUT_REQUIRED
                await save(store, task, version, owner)

                async def free():
                    return await one._run_state(task.id) is None

                await wait_until_async(free)

    asyncio.run(run())


def test_a_save_whose_reply_is_lost_is_no_conflict(replicas, owner):
    async def run():
        async with replicas() as [(store, _)]:
            from ff_fast._core import ops

            name = store._name("t")
            digest = store._owner(owner)
            op = ops.save_task(name, digest, 0, "", "save-1", 60_000, b"", b"")
            assert await store._do(op) == await store._do(op) == 1
            again = ops.save_task(name, digest, 0, "", "save-2", 60_000, b"", b"")
            assert await store._do(again) is None

    asyncio.run(run())


# -- with the request handler of a2a-sdk ------------------------------------------------------------------------------------


def handlers(made):
    """The request handlers of replicas whose agent counts to five, then waits for what the test says."""
    from a2a.server.agent_execution import AgentExecutor
    from a2a.server.request_handlers import DefaultRequestHandlerV2
    from a2a.server.tasks import TaskUpdater
    from a2a.types.a2a_pb2 import AgentCapabilities, AgentCard

    class Counting(AgentExecutor):
        def __init__(self):
            self.go_on = asyncio.Event()
            self.runs = 0

        async def execute(self, context, event_queue):
            self.runs += 1
            task = task_of(
                SUBMITTED, task_id=context.task_id, context_id=context.context_id, seconds=1_000
            )
            await event_queue.enqueue_event(task)
            updater = TaskUpdater(event_queue, context.task_id, context.context_id)
            await updater.start_work()
            for number in range(5):
                if number == 2:
                    await self.go_on.wait()
                await updater.add_artifact(
                    [Part(text=str(number))], artifact_id="a", append=number > 0
                )
            await updater.complete()

        async def cancel(self, context, event_queue):
            await TaskUpdater(event_queue, context.task_id, context.context_id).cancel()

    card = AgentCard(
        name="counter",
        description="It counts.",
        version="1",
        capabilities=AgentCapabilities(streaming=True),
        default_input_modes=["text"],
        default_output_modes=["text"],
    )
    return [
        DefaultRequestHandlerV2(
            agent_executor=Counting(), task_store=store, agent_card=card, event_stream=stream
        )
        for store, stream in made
    ]


def numbers(events):
    return [
        each.artifact.parts[0].text for each in events if isinstance(each, TaskArtifactUpdateEvent)
    ]


def message():
    from a2a.types.a2a_pb2 import Message, Role, SendMessageRequest

    return SendMessageRequest(
        message=Message(
            message_id=uuid.uuid4().hex, role=Role.ROLE_USER, parts=[Part(text="count")]
        )
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_client_subscribes_on_another_replica_and_misses_nothing(replicas, owner):
    from a2a.types.a2a_pb2 import GetTaskRequest, SubscribeToTaskRequest

    async def run():
        async with replicas(2) as made:
            one, other = handlers(made)
            sent, task_id, resumed = [], None, []

            async def send():
                async for event in one.on_message_send_stream(message(), owner):
                    sent.append(event)  # noqa: PERF401 - the test looks at them meanwhile

            async def resume():
                request = SubscribeToTaskRequest(id=sent[0].id)
                async for event in other.on_subscribe_to_task(request, owner):
                    resumed.append(event)  # noqa: PERF401

            sending = asyncio.create_task(send())
            await wait_until_async(lambda: _true(numbers(sent) == ["0", "1"]))
            task_id = sent[0].id
            resuming = asyncio.create_task(resume())
            await wait_until_async(lambda: _true(len(resumed) == 1))
            one.agent_executor.go_on.set()
            await asyncio.wait_for(asyncio.gather(sending, resuming), 10)
            assert numbers(sent) == ["0", "1", "2", "3", "4"]
            # The snapshot has what was before.
            before = [part.text for part in resumed[0].artifacts[0].parts]
            assert before + numbers(resumed) == ["0", "1", "2", "3", "4"]
            assert resumed[-1].status.state == COMPLETED
            task = await other.on_get_task(GetTaskRequest(id=task_id), owner)
            assert task.status.state == COMPLETED
            listed = await other.on_list_tasks(ListTasksRequest(), owner)
            assert [each.id for each in listed.tasks] == [task_id]
            for handler in (one, other):
                await handler.aclose()

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_client_cancels_on_another_replica(replicas, owner):
    from a2a.types.a2a_pb2 import CancelTaskRequest

    async def run():
        async with replicas(2) as made:
            one, other = handlers(made)
            sent = []

            async def send():
                with contextlib.suppress(Exception):
                    async for event in one.on_message_send_stream(message(), owner):
                        sent.append(event)  # noqa: PERF401

            sending = asyncio.create_task(send())
            await wait_until_async(lambda: _true(numbers(sent) == ["0", "1"]))
            task = await other.on_cancel_task(CancelTaskRequest(id=sent[0].id), owner)
            assert task.status.state == CANCELED
            # The replica that runs it learns it by its next save.
            one.agent_executor.go_on.set()
            await asyncio.wait_for(sending, 10)
            stored = await made[0][0].get(sent[0].id, owner)
            assert stored.task.status.state == CANCELED
            for handler in (one, other):
                await handler.aclose()

    asyncio.run(run())
