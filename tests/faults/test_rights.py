"""Each user of the README's ACL lines can do the whole of its work, and has no right that its work does not take."""

import threading

import pytest

from ff_fast import _library, errors, keys
from ff_fast._core import operations as operations_core
from ff_fast._core import worker as worker_core
from ff_fast.embedded import EmbeddedServer
from ff_fast.errors import PermissionDenied

from .. import conftest as suite
from ..conftest import connect_raw
from ..server.workers import Supervisor, Worker, opened, until
from ..shells import KINDS, Opener
from ..waiting import wait_until
from . import rights
from .rights import ACL, Life, Line, Monitor, allow, as_user, complaints, may_run

ENGINES = [
    pytest.param(False, id="valkey"),
    pytest.param(True, id="redis", marks=pytest.mark.second_engine),
]


@pytest.fixture(scope="module")
def running(request):
    """A server with the users of ACL, which this module alone uses."""
    executable = suite._second_engine() if getattr(request, "param", False) else None
    with (
        EmbeddedServer(executable=executable, **suite.PROMPT) as server,
        connect_raw(server.url) as raw,
    ):
        yield server, raw


@pytest.fixture
def guarded(running):
    """The server, emptied, and a client that may do everything."""
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


@pytest.mark.parametrize("running", ENGINES, indirect=True)
def test_each_user_has_the_rights_that_its_work_takes_and_no_more(guarded, opener, monkeypatch):
    server, raw = guarded
    monitor = Monitor(raw, server.url.removeprefix("unix://"))
    try:
        Life(lambda user: opener(as_user(server, user)), raw, monitor).run()
        users = monitor.users()
    finally:
        monitor.close()
    assert raw.acl_log() == []
    assert set(users) == set(ACL)
    for ran in users.values():
        for function, commands in ran.inside.items():
            # The Lua files name every command that runs.
            assert commands <= may_run(function), function
    assert [each for user, ran in sorted(users.items()) for each in complaints(user, ran)] == []
    # And this would notice each right that is taken away.
    for user, rules in ACL.items():
        for rule in set(rules.split()) - {"resetchannels", "-@all"}:
            without = " ".join(each for each in rules.split() if each != rule)
            monkeypatch.setitem(rights.ACL, user, without)
            assert complaints(user, users[user]) or rule in COVERED.get(user, ()), (user, rule)
        monkeypatch.setitem(rights.ACL, user, rules)


# A key that is read here and written there takes both rights in one pattern where one command does both.
COVERED = {}
