"""Each user of the ACL lines of docs/guides/deployment.md can do the whole of its work, and has no right that its work does not take."""

import dataclasses
import threading

import pytest
import redis

import ff_fast
from ff_fast import (
    RetryPolicy,
    StreamMode,
    WaitpointKind,
    WaitpointSpec,
    _library,
    cli,
    keys,
)
from ff_fast._core import hub as hub_core
from ff_fast._core import leases as leases_core
from ff_fast._core import operations as operations_core
from ff_fast._core import slots
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import AuthenticationFailed, FunctionMissing, PermissionDenied, StaleOwner

from .. import conftest as suite
from ..conftest import connect_raw
from ..heads import head_of, set_head
from ..server.workers import Supervisor, Worker, opened, until
from ..shells import KINDS, Opener, config
from ..waiting import wait_until
from . import rights
from .rights import ACL, Life, Line, Monitor, allow, as_user, complaints, may_run

FEW = "?partitions=4"
"""For whoever brings the library: some work looks at all partitions."""

ENGINES = [
    pytest.param(False, id="valkey"),
    pytest.param(True, id="redis", marks=pytest.mark.second_engine),
]


@pytest.fixture(scope="module")
def running(request):
    """A server with the users of ACL, which this module alone uses."""
    executable = suite.second_engine() if getattr(request, "param", False) else None
    with (
        EmbeddedServer(executable=executable, **suite.PROMPT) as server,
        connect_raw(server.url) as raw,
    ):
        yield server, raw


@pytest.fixture
def guarded(running, monkeypatch):
    """The server, emptied, and a client that may do everything."""
    monkeypatch.setattr(hub_core, "LINGER_S", 0.1)
    server, raw = running
    raw.function_flush()
    raw.flushall()
    for name, rules in ACL.items():
        allow(raw, name, rules)
    raw.acl_log_reset()
    return server, raw


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def opener(kind):
    opened = Opener(kind)
    yield opened
    opened.close()


def test_the_rights_of_each_user_are_those_that_its_work_takes(guarded, opener, monkeypatch):
    server, raw = guarded
    for name in ACL:
        allow(raw, name, "+@all ~* &*")
    monitor = Monitor(raw, server.url.removeprefix("unix://"))
    try:
        Life(lambda user: opener(as_user(server, user) + FEW), raw, monitor).run()
        users = monitor.users()
    finally:
        monitor.close()
    assert set(users) == set(ACL)
    for ran in users.values():
        for function, commands in ran.inside.items():
            # The Lua files name every command that runs.
            assert commands <= may_run(function), function
    found = [each for user, ran in sorted(users.items()) for each in complaints(user, ran)]
    assert not found, "\n".join(found)
    # And each right that is taken away would be missed.
    for user, rules in ACL.items():
        for rule in set(rules.split()):
            without = " ".join(each for each in rules.split() if each != rule)
            monkeypatch.setitem(rights.ACL, user, without)
            assert complaints(user, users[user]), (user, rule)
        monkeypatch.setitem(rights.ACL, user, rules)


@pytest.mark.parametrize("running", ENGINES, indirect=True)
def test_each_user_can_do_its_work_and_is_refused_nothing(guarded, opener):
    server, raw = guarded
    Life(lambda user: opener(as_user(server, user) + FEW), raw).run()
    assert raw.acl_log() == []


# -- workers --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def prompt(monkeypatch):
    """Workers look more often whether they shall stop, pause briefly, and renew long leases soon: none lapses by chance."""
    monkeypatch.setattr(leases_core, "RENEW_AT", 0.007)
    monkeypatch.setattr(operations_core, "CLAIM_WAIT_S", 0.05)
    monkeypatch.setattr(slots, "_FIRST_PAUSE_S", 0.01)


def ended(backend, eid):
    ends = ("completed", "failed", "cancelled")
    return wait_until(lambda: (told := backend.describe(eid)).state in ends and told, 20)


def lapse(raw, eid):
    index = int(raw.hget(keys.core(eid), "current_attempt_index"))
    set_head(raw, keys.head(eid, index), lease_expires_at=1)
    raw.zadd(keys.timers(keys.slot_tag_of(eid)), {f"lease:{eid}": 1})


@pytest.mark.usefixtures("prompt")
def test_a_fleet_with_the_workers_rights_outlives_lost_leases_and_cancellations(
    guarded, kind, opener
):
    server, raw = guarded
    opener(as_user(server, "ff_deploy") + FEW)
    producer, tailer = (opener(as_user(server, name)) for name in ("ff_producer", "ff_reader"))
    begun = threading.Event()

    def handler(task):
        if task.payload == b"long" and not task.resumed:
            yield opened(task)
            task.write(b"first")
            begun.set()
            yield until(task, lambda: task.cancelled)
            return None
        return b"well"

    url = as_user(server, "ff_worker")
    fleet = [Worker(kind, url, handler) for _ in range(2)]
    with fleet[0], fleet[1], Supervisor(kind, as_user(server, "ff_supervisor")):
        lost = producer.create_execution(payload=b"long")
        assert begun.wait(10)
        lapse(raw, lost)
        assert ended(tailer, lost).state == "completed"
        assert tailer.read_result(lost) == b"well"
        begun.clear()
        unwanted = producer.create_execution(payload=b"long")
        assert begun.wait(10)
        opener(as_user(server, "ff_operator")).cancel(unwanted, reason="too expensive", grace=20)
        assert ended(tailer, unwanted).cancellation_reason == "too expensive"
        for _ in range(4):
            assert ended(tailer, producer.create_execution()).state == "completed"
    assert raw.acl_log() == []


def well(task):
    return b"well"


def broken(task):
    raise ValueError("broken")


def until_cancelled(task):
    yield opened(task)
    yield until(task, lambda: task.cancelled)
    return b"well"


def reporting(task):
    yield task.progress(1)


def writing(task):
    yield opened(task)
    task.write(b"x")


MISSING = {
    "ff_read_payload": (well, "failed"),
    "ff_open_writer": (well, "failed"),
    "ff_complete_execution": (well, "failed"),
    "ff_report_progress": (reporting, "failed"),
    "ff_append": (writing, "failed"),
    "ff_renew_lease": (until_cancelled, "failed"),
    "ff_cancel_execution": (until_cancelled, "failed"),
    "ff_describe_execution": (until_cancelled, "cancelled"),
    "ff_fail_execution": (broken, "active"),
}


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("function", MISSING)
def test_a_right_that_is_missing_fails_the_attempt_that_needs_it_and_no_worker(
    guarded, kind, function, caplog
):
    server, raw = guarded
    handler, end = MISSING[function]
    rules = [rule for rule in ACL["ff_worker"].split() if rule.rpartition("|")[2] != function]
    allow(raw, "ff_worker", " ".join(rules))
    called = threading.Event()

    def once(task):
        if task.payload:
            return well(task)
        called.set()
        return handler(task)

    with ff_fast.ValkeyBackend.connect(server.url + FEW) as backend:
        with Worker(kind, as_user(server, "ff_worker"), once):
            eid = backend.create_execution(retry=RetryPolicy(max_retries=3))
            if "cancel" in function or "describe" in function:
                assert called.wait(10)
                backend.cancel(eid, grace=20)
            if end == "active":
                assert called.wait(10)
            else:
                told = ended(backend, eid)
                assert (told.state, told.attempt_count) == (end, 1)
                if end == "failed":
                    # A batch is refused as the one command that it is.
                    named = "command fcall" if function == "ff_append" else function
                    assert told.failure_reason.startswith("PermissionDenied: ")
                    assert named in told.failure_reason
            good = backend.create_execution(payload=b"good")
            if function in ("ff_read_payload", "ff_open_writer", "ff_complete_execution"):
                assert ended(backend, good).state == "failed"
            else:
                assert ended(backend, good).state == "completed"
        assert backend.describe(eid).state == end
    said = [text for text in caplog.messages if "cannot be ended" in text]
    assert len(said) == (end == "active")


@pytest.mark.usefixtures("prompt")
def test_a_worker_that_may_not_claim_ends_and_says_so(guarded, kind):
    server, raw = guarded
    ff_fast.ValkeyBackend.connect(server.url + FEW).close()
    rules = [rule for rule in ACL["ff_worker"].split() if rule != "+fcall|ff_claim"]
    allow(raw, "ff_worker", " ".join(rules))
    running = Worker(kind, as_user(server, "ff_worker"), well).begin()
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        backend.create_execution()
        with pytest.raises(PermissionDenied, match="ff_claim"):
            running.result()


@pytest.mark.usefixtures("prompt")
def test_a_worker_waits_for_a_library_that_it_may_not_load(guarded, kind, opener):
    server, raw = guarded
    deploy = as_user(server, "ff_deploy") + FEW
    opener(deploy)
    begun, lost = threading.Event(), threading.Event()

    def handler(task):
        yield opened(task)
        task.write(b"before")
        yield task.flush()
        begun.set()
        yield until(task, lost.is_set)
        return b"well"

    tailer = opener(as_user(server, "ff_reader"))
    running = Worker(kind, as_user(server, "ff_worker"), handler)
    once = config(as_user(server, "ff_producer"), retries=0)
    with running, ff_fast.ValkeyBackend.connect(once) as producer:
        eid = producer.create_execution()
        assert begun.wait(10)
        raw.function_flush()
        raw.acl_log_reset()
        lost.set()
        # It has tried.
        wait_until(lambda: any(entry["username"] == "ff_worker" for entry in raw.acl_log()))
        with pytest.raises(FunctionMissing, match="may not load"):
            producer.create_execution()
        ff_fast.ValkeyBackend.connect(deploy).close()
        assert ended(tailer, eid).state == "completed"
        assert ended(tailer, producer.create_execution()).state == "completed"


def test_another_library_of_the_same_contract_serves_whoever_may_load_none(guarded, opener):
    server, raw = guarded
    opener(as_user(server, "ff_deploy") + FEW)
    producer = opener(as_user(server, "ff_producer"))
    raw.function_load(_library.source().replace(_library.digest(), "0" * 12), replace=True)
    raw.client_kill_filter(_type="normal", skipme=True)
    assert producer.create_execution()


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("busy", [False, True])
def test_a_user_that_is_deleted_ends_its_workers_without_a_storm(guarded, kind, opener, busy):
    server, raw = guarded
    opener(as_user(server, "ff_deploy") + FEW)
    begun = threading.Event()

    def handler(task):
        begun.set()
        yield until(task, lambda: task.cancelled)

    running = Worker(kind, as_user(server, "ff_worker"), handler, concurrency=4).begin()
    if busy:
        opener(as_user(server, "ff_producer")).create_execution()
        assert begun.wait(10)
    raw.acl_log_reset()
    raw.execute_command("ACL", "DELUSER", "ff_worker")
    with pytest.raises(AuthenticationFailed):
        running.result()
    tries = sum(entry["count"] for entry in raw.acl_log() if entry["reason"] == "auth")
    # Of four slots, of a renewal, and of the end.
    assert 1 <= tries <= 12


# -- readers --------------------------------------------------------------------------------------------------------------

SECRET = bytes(range(32))
READS = {
    "string": ["GET"],
    "hash": ["HGETALL"],
    "list": ["LRANGE", 0, -1],
    "set": ["SMEMBERS"],
    "zset": ["ZRANGE", 0, -1],
    "stream": ["XRANGE", "-", "+"],
}


def everything_read(raw, user):
    """Every value that a user can read by the plain command for its type, and how many keys it cannot."""
    found, refused = b"", set()
    for key in user_keys(raw):
        command, *rest = READS[raw.type(key).decode()]
        try:
            found += repr(user.execute_command(command, key, *rest)).encode()
        except redis.exceptions.NoPermissionError:
            refused.add(rights.kind_of(key))
    return found, refused


def user_keys(raw):
    return sorted(raw.keys("ff:*"))


@pytest.fixture
def waiting(guarded):
    """An execution that waits for a signal, and one under a lease, with all that is secret about them."""
    server, raw = guarded
    backend = ff_fast.ValkeyBackend.connect(f"{server.url}?partitions=1")
    backend.rotate_waitpoint_secret("kid", SECRET)
    claim = {"lane": "default", "worker_id": "w", "worker_instance_id": "w-1"}
    backend.create_execution(payload=b"prompt")
    handle = backend.claim(**claim)
    waitpoint = backend.create_waitpoint(handle)
    token = waitpoint.hmac_token
    spec = WaitpointSpec(kind=WaitpointKind.SIGNAL_NAME, matcher=b"go", hmac_token=token)
    backend.suspend(handle, spec, timeout=60)
    backend.create_execution(payload=b"prompt")
    held = backend.claim(**claim)
    writer = backend.open_writer(held)
    writer.write(b"x")
    writer.write(b"{}", mode=StreamMode.durable_summary())
    writer.flush(5)
    backend.create_execution(payload=b"prompt")
    done = backend.claim(**claim)
    backend.complete(done, b"answer")
    secrets = {
        "secret": SECRET.hex(),
        "token": token.reveal(),
        "digest of the token": token.reveal().partition(":")[2],
        **{f"lease {i}": each.fields().lease_id for i, each in enumerate((handle, held, done))},
    }
    yield server, raw, secrets
    backend.close()


READS_SECRETS = {"ff_deploy", "ff_worker", "ff_signaller"}


@pytest.mark.parametrize("user", sorted(ACL))
def test_who_reads_all_that_it_can_learns_no_secret(waiting, user):
    server, raw, secrets = waiting
    # Each command that reads a type is added, so the key patterns alone decide.
    reading = " ".join(f"+{command[0].lower()}" for command in READS.values())
    allow(raw, user, f"{ACL[user]} {reading}")
    with connect_raw(as_user(server, user)) as plain:
        found, _ = everything_read(raw, plain)
    told = {name for name, secret in secrets.items() if secret.encode() in found}
    assert told == ({"secret"} if user in READS_SECRETS else set())


def test_no_lease_and_no_token_is_stored_anywhere(waiting):
    _, raw, secrets = waiting
    found, refused = everything_read(raw, raw)
    assert refused == set()
    assert [name for name, secret in secrets.items() if secret.encode() in found] == ["secret"]


def test_a_reader_calls_no_function_that_writes(guarded):
    server, raw = guarded
    raw.function_load(_library.source())
    readable = Line.of(ACL["ff_reader"]).commands
    (listed,) = raw.function_list(library="ff_fast")
    functions = dict(zip(listed[::2], listed[1::2], strict=True))[b"functions"]
    with connect_raw(as_user(server, "ff_reader")) as tailer:
        for _, name, _, _, _, flags in functions:
            for call in ("FCALL", "FCALL_RO"):
                if f"{call.lower()}|{name.decode()}" in readable:
                    assert flags == [b"no-writes"]
                    continue
                with pytest.raises(redis.exceptions.NoPermissionError):
                    tailer.execute_command(call, name, 1, keys.PARTITIONS_CONFIG)


def test_what_a_reader_learns_of_a_lease_is_no_lease(waiting):
    server, raw, _ = waiting
    with ff_fast.ValkeyBackend.connect(server.url) as backend:
        eid = backend.create_execution()
        handle = backend.claim(worker_id="w", worker_instance_id="w-1")
        backend.open_writer(handle).close()
        with connect_raw(as_user(server, "ff_reader")) as tailer:
            digest = tailer.hget(keys.core(eid), "current_lease_digest").decode()
            writer = head_of(tailer, keys.head(eid, 0)).writer.decode()
        assert digest in writer
        names = (keys.core(eid), keys.head(eid, 0), keys.summary(eid, 0))
        for learned in (digest, writer.replace(":", "-"), writer.rpartition(":")[2]):
            fields = dataclasses.asdict(handle.fields()) | {"lease_id": learned}
            forged = ff_fast.Handle.encode(**fields)
            for call in (backend.renew, backend.complete, backend.open_writer):
                with pytest.raises(StaleOwner):
                    call(forged)
            answer = raw.fcall("ff_open_writer", len(names), *names, f"{writer}2", learned)
            assert answer == [0, b"stale_owner"]
        backend.complete(handle)


def test_each_command_of_the_command_line_runs_as_one_user(guarded, monkeypatch, capsysbinary):
    server, raw = guarded

    def run(user, *argv):
        monkeypatch.setenv(cli.URL_VARIABLE, as_user(server, user))
        assert cli.main(argv) == 0
        return capsysbinary.readouterr().out

    ff_fast.ValkeyBackend.connect(as_user(server, "ff_deploy") + FEW).close()
    eid = run("ff_producer", "submit", "prompt", "--tag", "app.x=1").decode().strip()
    with ff_fast.ValkeyBackend.connect(as_user(server, "ff_worker")) as worker:
        handle = worker.claim(worker_id="w", worker_instance_id="w-1")
        waitpoint = worker.create_waitpoint(handle)
        with worker.open_writer(handle) as writer:
            writer.write(b"{}", mode=StreamMode.durable_summary())
    monkeypatch.setenv("FF_FAST_TOKEN", waitpoint.hmac_token.reveal())
    run("ff_signaller", "signal", eid, waitpoint.waitpoint_id, "go")
    for command in ("info", "summary", "inspect"):
        assert run("ff_reader", command, eid)
    run("ff_operator", "cancel", eid)
    for command in ("tail", "follow"):
        assert b"{}" in run("ff_reader", command, eid)
    assert raw.acl_log() == []
