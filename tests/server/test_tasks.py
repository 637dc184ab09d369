"""Tasks of agents on a real server: compare-and-swap, the log of events, and the list of an owner."""

import asyncio
import itertools

import pytest

from ff_fast import aio, keys
from ff_fast._aio.readers import PushReader
from ff_fast._core import ops, tasks

OWNERS = map("{:040x}".format, itertools.count(1))


@pytest.fixture
def do(engine, raw):
    """Makes a call, and returns its value."""
    from ff_fast import _library

    raw.function_load(_library.source(), replace=True)
    return lambda op: op.answer(raw.fcall(op.function, len(op.keys), *op.keys, *op.argv))


@pytest.fixture
def name():
    return tasks.name_of(keys.new_execution_id())


@pytest.fixture
def owner():
    return keys.new_uuid().replace("-", "") + next(OWNERS)[-8:]


def saving(name, owner, previous, kind="", *, event=b"e", save_id=None, ttl_ms=60_000):
    return ops.save_task(
        name, owner, previous, kind, save_id or keys.new_uuid(), ttl_ms, b"d%d" % previous, event
    )


def test_a_save_needs_the_version_that_is_stored(do, name, owner):
    assert do(saving(name, owner, 1)) is None
    assert do(saving(name, owner, 0)) == 1
    assert do(saving(name, owner, 0)) is None
    assert do(saving(name, owner, 1, event=b"")) == 2
    assert do(saving(name, owner, 1)) is None
    read = do(ops.read_task(name, owner, count=10))
    assert (read.version, read.document) == (2, b"d1")
    assert [(version, data) for _, version, data in read.events] == [(1, b"e")]
    assert do(ops.read_task(name, "f" * 40)) == ops.TaskRead(True, 0, b"", False, [])


def test_a_cancel_replaces_what_has_not_ended(do, name, owner):
    assert do(saving(name, owner, 0, "cancelled")) is None
    assert do(saving(name, owner, 0)) == 1
    assert do(saving(name, owner, 7, "cancelled")) == 2
    assert do(saving(name, owner, 2, "cancelled")) is None


def test_a_save_that_is_repeated_is_one(do, name, owner):
    op = saving(name, owner, 0)
    assert [do(op), do(op)] == [1, 1]
    assert len(do(ops.read_task(name, owner, count=10)).events) == 1


def test_the_keys_of_a_task_end_with_it(do, name, owner, raw):
    do(saving(name, owner, 0, ttl_ms=50_000))
    assert all(40_000 < raw.pttl(key) <= 50_000 for key in name.keys)
    do(saving(name, "f" * 40, 0))
    assert do(ops.delete_task(name, owner)) is True
    assert do(ops.delete_task(name, owner)) is False
    assert raw.exists(*name.keys) == 2
    do(ops.delete_task(name, "f" * 40))
    assert raw.exists(*name.keys) == 0


def test_large_events_come_in_several_answers(do, name, owner):
    for number in range(20):
        do(saving(name, owner, number, event=b"%02d" % number * 50_000))
    after, found, answers = "0-0", [], 0
    while True:
        read = do(ops.read_task(name, after=after, count=256))
        found += [data[:2] for _, _, data in read.events]
        answers += 1
        if not read.more:
            break
        after = read.events[-1][0]
    assert found == [b"%02d" % number for number in range(20)]
    assert answers == 3


def noting(owner, task_id, version, time_us, state="2", context="-", ttl_ms=60_000):
    return ops.note_task(owner, task_id, version, time_us, state, context, ttl_ms)


def listed(do, owner, state="", context="", least=-1, count=500):
    place, found, calls = None, [], 0
    while True:
        page = do(ops.list_tasks(owner, state, context, least, place, count))
        found += page.found
        calls += 1
        place = page.then
        if place is None:
            return found, calls


def test_a_list_has_every_task_once_however_it_is_paged(do, owner):
    wanted = []
    for n in range(300):
        do(noting(owner, f"t-{n:03}", 1, n // 130 - 1, str(n % 3), f"c{n % 2}"))
        wanted.append(ops.TaskPlace(n // 130 - 1, f"t-{n:03}"))
    wanted.sort(reverse=True)
    for count in (1, 7, 128, 500):
        assert listed(do, owner, count=count)[0] == wanted
    picked = [each for each in wanted if int(each.task_id[2:]) % 6 == 4]
    assert listed(do, owner, "1", "c0", count=9)[0] == picked
    assert do(ops.list_tasks(owner, "", "", 1, None, 1)).all == 40


def test_a_call_looks_at_a_bounded_number_of_tasks(do, owner, raw):
    names = [f"t-{n:04}" for n in range(2_500)]
    raw.zadd(keys.task_order(owner), dict.fromkeys(names, 5))
    raw.hset(keys.task_facts(owner), mapping=dict.fromkeys(names, "1 2 -"))
    found, calls = listed(do, owner, state="3")
    assert (found, calls) == ([], 3)
    assert len(listed(do, owner, state="2")[0]) == 2_500


def test_a_list_is_not_told_of_an_older_version(do, owner):
    assert do(noting(owner, "t", 3, 30, "3"))
    assert not do(noting(owner, "t", 2, 20, "2"))
    assert listed(do, owner)[0] == [ops.TaskPlace(30, "t")]
    assert do(noting(owner, "t", 0, None))
    assert listed(do, owner)[0] == []


def test_a_task_about_to_be_stored_is_listed_unless_it_is_already(do, owner):
    assert do(noting(owner, "t", 0, 10, "1"))
    assert not do(noting(owner, "t", 0, 20, "2"))
    assert listed(do, owner)[0] == [ops.TaskPlace(10, "t")]
    assert do(noting(owner, "t", 1, 30, "3"))
    assert not do(noting(owner, "t", 0, 40, "4"))
    assert listed(do, owner)[0] == [ops.TaskPlace(30, "t")]


def test_tasks_whose_time_is_over_leave_the_list(do, owner, raw):
    do(noting(owner, "gone", 9, 1))
    raw.zadd(keys.task_due(owner), {"gone": 1})
    do(noting(owner, "t", 1, 2))
    assert listed(do, owner)[0] == [ops.TaskPlace(2, "t")]
    # Under its id another task may follow.
    do(noting(owner, "gone", 1, 1))
    assert len(listed(do, owner)[0]) == 2


def test_a_reader_is_pushed_events_and_ends_with_its_task(server, name, owner):
    async def run():
        async with aio.ValkeyBackend.connect(server.url) as backend:

            async def do(op):
                return await backend._do(tasks.call(op))

            async with PushReader(backend, tasks.TaskEvents(name)) as reader:
                assert await reader.next_batch(0.05) == []
                for number in range(300):
                    await do(saving(name, owner, number, event=b"%d" % number))
                found = []
                while len(found) < 300:
                    found += await reader.next_batch(5)
                assert [each.data for each in found] == [b"%d" % number for number in range(300)]
                async with PushReader(backend, tasks.TaskEvents(name)) as late:
                    assert len(await late.next_batch(5)) == 256
                    late._restart(found[9].cursor)
                    assert (await late.next_batch(5))[0].version == 11
                await do(ops.delete_task(name, owner))
                assert await asyncio.wait_for(reader.next_batch(), 5) == []

    asyncio.run(run())
