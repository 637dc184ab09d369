"""What is wrong with a server is told once, when connecting, as far as its user may know it."""

import contextlib
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import pytest
import redis

import ff_fast
from ff_fast import embedded
from ff_fast.errors import DeploymentWarning

from ..conftest import connect_raw, second_engine
from ..shells import KINDS, Opener
from ..waiting import wait_until

NOTHING_ON_DISK = "stores nothing on disk"


@contextlib.contextmanager
def users_server(executable, *directives):
    """A server that is not one of ff_fast.embedded; its URL."""
    folder = Path(tempfile.mkdtemp(prefix="own-"))
    settings = ["port 0", f"unixsocket {folder}/s", f"dir {folder}", "logfile log", *directives]
    (folder / "valkey.conf").write_text("".join(f"{line}\n" for line in settings))
    with subprocess.Popen([executable, folder / "valkey.conf"], cwd=folder) as process:
        try:
            url = f"unix://{folder}/s"

            def answers():
                with contextlib.suppress(redis.ConnectionError), connect_raw(url) as raw:
                    return raw.ping()

            wait_until(answers)
            yield url
        finally:
            process.kill()
    shutil.rmtree(folder)


@pytest.fixture(params=KINDS)
def connect(request):
    opener = Opener(request.param)
    yield opener
    opener.close()


@pytest.fixture(scope="module")
def forgetful():
    with users_server(embedded._bundled(), 'save ""', "appendonly no") as url:
        yield url


def told(connect, url):
    """The text of the one warning; None without one."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        connect(url)
    assert len(caught) <= 1
    if not caught:
        return None
    assert caught[0].category is DeploymentWarning
    return str(caught[0].message)


def test_a_server_that_stores_nothing_on_disk_is_told(connect, forgetful):
    assert NOTHING_ON_DISK in told(connect, forgetful)
    # A class of its own: whoever has accepted it says so.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ff_fast.DeploymentWarning)
        connect(forgetful)


def test_everything_is_told_at_once(connect, forgetful):
    with connect_raw(forgetful) as raw:
        raw.config_set("maxmemory", "100mb", "maxmemory-policy", "allkeys-lru")
        text = told(connect, forgetful)
        raw.config_set("maxmemory", "0", "maxmemory-policy", "noeviction")
    assert "allkeys-lru" in text
    assert NOTHING_ON_DISK in text


@pytest.mark.parametrize("setting", [{"save": "3600 1"}, {"appendonly": "yes"}], ids=str)
def test_a_server_that_stores_something_on_disk_is_quiet(connect, forgetful, setting):
    with connect_raw(forgetful) as raw:
        (name,) = setting
        before = raw.config_get(name)
        raw.config_set(name, setting[name])
        assert told(connect, forgetful) is None
        raw.config_set(name, before[name])


@pytest.mark.parametrize("denied", ["-info", "-config|get"])
def test_who_may_not_ask_is_told_nothing_and_leaves_no_trace(connect, forgetful, denied):
    with connect_raw(forgetful) as raw:
        told(connect, forgetful)
        raw.execute_command("ACL", "SETUSER", "u", "reset", "on", ">p", "~*", "&*", "+@all", denied)
        raw.acl_log_reset()
        assert told(connect, forgetful.replace("://", "://u:p@")) is None
        assert raw.acl_log() == []


@pytest.mark.second_engine
def test_an_older_version_is_told(connect):
    with users_server(second_engine(), "save 3600 1") as url:
        text = told(connect, url)
    assert text is None or "Use Valkey 7.2 or newer" in text
    assert (text is None) == (second_version() >= (7, 2))


def second_version():
    asked = subprocess.run(
        [second_engine(), "--version"], capture_output=True, text=True, check=True
    )
    return tuple(int(part) for part in asked.stdout.partition("v=")[2].split(".")[:2])


@pytest.mark.second_engine
def test_an_embedded_server_is_thrown_away_and_quiet(connect, redis_server):
    assert told(connect, redis_server.url) is None
