"""The processes of ``ff-fast worker --workers N``, and their restarts."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import site
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ff_fast import InvalidInput, MissingDependency, _process
from ff_fast._cli import health
from ff_fast._cli.shared import DONE, END_S, FAILED, LOOK_S, URL_VARIABLE, USAGE
from ff_fast._core.worker import HAND_BACK_S
from ff_fast._log import LOG

if TYPE_CHECKING:
    import argparse

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
# A process that has lived so long has started well.
_LIVED_S = 10.0
# A process that is stopped while its interpreter starts has no handler of signals yet.
_STOPPED = (DONE, -signal.SIGTERM, 128 + signal.SIGTERM)


def run(arguments: argparse.Namespace, url: str) -> int:
    """Run the processes until a signal, or until all are idle; return the exit code.

    Raises:
        InvalidInput: The ports overlap, or cannot be had.
        MissingDependency: ``--reload`` needs a package.
    """
    if arguments.reload:
        check_reload()
    ports = arguments.metrics_port and range(
        arguments.metrics_port, arguments.metrics_port + arguments.workers
    )
    if ports and (arguments.health_port in ports or ports[-1] > 65_535):
        raise InvalidInput("--metrics-port is the first of one port a process; choose another one.")
    return _Parent(arguments, url).run()


def check_reload() -> None:
    """Check that files can be watched.

    Raises:
        MissingDependency: The extra ``reload`` is not installed.
    """
    try:
        import watchfiles  # noqa: F401, PLC0415
    except ImportError:
        raise MissingDependency(
            "--reload needs watchfiles: pip install 'ff_fast[reload]'."
        ) from None


def _environment(url: str) -> dict[str, str]:
    """Return the environment of a process, which imports this library and no package of its name in the working directory."""
    found = {**os.environ, URL_VARIABLE: url}
    home = str(Path(__file__).parents[2])
    if home not in site.getsitepackages():
        found["PYTHONPATH"] = os.pathsep.join(filter(None, (home, os.environ.get("PYTHONPATH"))))
    return found


class _Child:
    """One process, from its start to its end.

    A process of its own group: a Ctrl-C at the terminal reaches the parent alone. The socket tells each of the two that
    the other has gone.
    """

    def __init__(self, command: list[str], url: str) -> None:
        self._mine, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - this program itself
                [*command, "--parent-fd", str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                process_group=0,
                env=_environment(url),
            )
        self._mine.setblocking(False)
        self.began = time.monotonic()
        self.why = "starting"
        self.drain_s = 0.0
        self.replaced = False
        self._unread = b""

    def fileno(self) -> int:
        return self._mine.fileno()

    def read(self) -> bool:
        """Take what the process tells; return whether it may tell more."""
        try:
            received = self._mine.recv(4096)
        except BlockingIOError:
            return True
        except OSError:
            return False
        *lines, self._unread = (self._unread + received).split(b"\n")
        if lines:
            drain_s, _, self.why = lines[-1].decode("ascii", "replace").partition(" ")
            self.drain_s = float(drain_s)
        return bool(received)

    def terminate(self) -> None:
        self.process.terminate()

    def kill(self) -> None:
        """Kill the process and what it has started."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._mine.close()


class _Parent:
    def __init__(self, arguments: argparse.Namespace, url: str) -> None:
        self._arguments = arguments
        self._url = url
        self._children: dict[int, _Child] = {}
        # When a process is started again, and its pause if it ends soon.
        self._due: dict[int, float] = dict.fromkeys(range(arguments.workers), 0.0)
        self._pauses: dict[int, float] = {}
        self._signals = 0
        self._passed_on = 0
        self._until = float("inf")
        self._changed = threading.Event()
        self._code = DONE

    @property
    def _stopping(self) -> bool:
        return self._signals > 0 or self._code != DONE

    def run(self) -> int:
        restore = _process.on_stop_signals(self._on_signal, twice=True)
        try:
            if self._arguments.health_port is not None:
                endpoints = health.Endpoints()
                endpoints.ready = self.why_not_ready
                served = health.serve(endpoints, self._arguments.bind, self._arguments.health_port)
                LOG.info("Serving health on port %d", served)
            if self._arguments.reload:
                threading.Thread(target=self._watch, name="ff-fast reload", daemon=True).start()
            while self._children or (self._waits and not self._stopping):
                self._look()
        finally:
            for child in self._children.values():
                child.kill()
                child.process.wait()
            restore()
        return self._code

    @property
    def _waits(self) -> bool:
        """Whether a process is to be started, at some time or after a change."""
        return bool(self._due) or self._arguments.reload

    def why_not_ready(self) -> str:
        """Return why not all processes are ready, as one word; empty if they are."""
        if self._stopping:
            return "stopping"
        children = list(self._children.values())
        if len(children) < self._arguments.workers and not self._arguments.until_idle:
            return "starting"
        return next((child.why for child in children if child.why), "")

    def _on_signal(self) -> None:
        self._signals += 1

    def _look(self) -> None:
        now = time.monotonic()
        if not self._stopping:
            for index in [each for each, due in self._due.items() if due <= now]:
                del self._due[index]
                self._start(index)
        readable = [child for child in self._children.values() if child.fileno() >= 0]
        for child in select.select(readable, [], [], LOOK_S)[0]:
            if not child.read():
                child.close()
        for index, child in list(self._children.items()):
            code = child.process.poll()
            if code is not None:
                child.close()
                del self._children[index]
                self._ended(index, child, code)
        if self._changed.is_set() and not self._stopping:
            self._changed.clear()
            self._replace()
        if self._stopping:
            self._pass_on()

    def _start(self, index: int) -> None:
        given = self._arguments
        command = [sys.executable, "-P", "-m", "ff_fast", "worker", *given.targets]
        command += ["--log-level", given.log_level, "--bind", given.bind]
        for name in ("lane", "concurrency", "drain_timeout"):
            if getattr(given, name) is not None:
                command += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
        if given.metrics_port is not None:
            command += ["--metrics-port", str(given.metrics_port and given.metrics_port + index)]
        command += ["--until-idle"] * given.until_idle + ["--no-supervise"] * given.no_supervise
        try:
            child = self._children[index] = _Child(command, self._url)
        except OSError as error:
            pause_s = self._later(index)
            text = "Worker process %d cannot be started (%s); it is tried again in %g s"
            LOG.warning(text, index, error.strerror, pause_s)
            return
        LOG.info("Worker process %d has started, with pid %d", index, child.process.pid)

    def _ended(self, index: int, child: _Child, code: int) -> None:
        how = f"by {_signal_name(-code)}" if code < 0 else f"with code {code}"
        if self._stopping:
            LOG.info("Worker process %d has ended %s", index, how)
            if code not in _STOPPED:
                self._code = self._code or FAILED
        elif child.replaced:
            self._due[index] = 0.0
        elif code == DONE and self._arguments.until_idle:
            LOG.info("Worker process %d is idle", index)
        elif self._arguments.reload:
            LOG.warning("Worker process %d has ended %s; it waits for a change", index, how)
        elif code == USAGE:
            # It would be refused again.
            self._code = USAGE
        else:
            if time.monotonic() - child.began > _LIVED_S:
                self._pauses.pop(index, None)
            pause_s = self._later(index)
            LOG.warning(
                "Worker process %d has ended %s; it is started again in %g s", index, how, pause_s
            )

    def _later(self, index: int) -> float:
        """Let a process start after a pause, and return its seconds; the next one is longer."""
        pause_s = self._pauses.get(index, _FIRST_PAUSE_S)
        self._pauses[index] = min(2 * pause_s, _LONGEST_PAUSE_S)
        self._due[index] = time.monotonic() + pause_s
        return pause_s

    def _pass_on(self) -> None:
        """Pass each signal on, and kill what does not end in time."""
        now = time.monotonic()
        wanted = min(max(self._signals, 1), 2)
        if self._passed_on < wanted:
            self._passed_on += 1
            children = self._children.values()
            drain_s = max((child.drain_s for child in children), default=0.0)
            # The process itself ends earlier.
            self._until = now + HAND_BACK_S + 2 * END_S
            if self._passed_on == 1:
                self._until += drain_s
            for child in children:
                child.terminate()
        if now > self._until:
            self._until = float("inf")
            self._code = self._code or FAILED
            for child in self._children.values():
                child.kill()

    # -- reload --------------------------------------------------------------------------------------

    def _watch(self) -> None:
        import watchfiles  # noqa: PLC0415

        try:
            for _ in watchfiles.watch(Path.cwd(), watch_filter=watchfiles.PythonFilter()):
                self._changed.set()
        except Exception as error:  # noqa: BLE001 - of another package, and of the system
            LOG.error("Files cannot be watched, so no change is seen: %s", error)

    def _replace(self) -> None:
        LOG.info("A file has changed: starting again")
        for index in range(self._arguments.workers):
            child = self._children.get(index)
            if child is None:
                self._due[index] = 0.0
            elif not child.replaced:
                child.replaced = True
                child.terminate()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        # One for real-time programs.
        return f"signal {number}"
