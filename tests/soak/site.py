"""The processes of a soak: one durable server, proxies before it, workers and supervisors of both shells."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from ff_fast import ValkeyBackend

from ..clock import SteppedServer
from ..conftest import ROOT, connect_raw
from ..faults.chaos import ChaosProxy
from ..waiting import wait_until

PARTITIONS = 32
LANES = ("work", "hand")
"""The lane of the worker processes, and that of the callers in `load`."""


class Process:
    """A child process that is started again whenever a fault has ended it."""

    def __init__(self, site, role, kind, url):
        self.name = f"{role}-{kind}-{len(site.processes)}"
        self.role = role
        self._site = site
        self._command = [
            *(sys.executable, "-m", "tests.soak.child", role, kind, url, LANES[0]),
            str(site.folder / f"{self.name}.jsonl"),
        ]
        self.start()

    def start(self):
        with (self._site.folder / f"{self.name}.stderr").open("ab") as stderr:
            self._popen = subprocess.Popen(self._command, cwd=ROOT, stderr=stderr)
        self.pid = self._popen.pid

    @property
    def code(self):
        """Exit code, None while it runs."""
        return self._popen.poll()

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):
            self._popen.send_signal(number)

    async def wait(self, deadline_s):
        """Wait for its end; return whether it came in time."""
        try:
            await asyncio.to_thread(self._popen.wait, deadline_s)
        except subprocess.TimeoutExpired:
            return False
        return True


def size_of(pid):
    """Descriptors, threads and MiB of memory of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    return {
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
        "threads": int(fields["Threads"]),
        "MiB": int(fields["VmRSS"].split()[0]) // 1024,
    }


class Site:
    """Everything that faults act on.

    Attributes:
        turns: Locks by name. A fault holds that of what it breaks, so that two of them do not heal each other.
    """

    def __init__(self, folder, account, *, workers, supervisors=2):
        self.folder = folder
        self.account = account
        self.server = SteppedServer(appendonly=True, appendfsync="always", hz=100)
        with ValkeyBackend.connect(f"{self.server.url}?partitions={PARTITIONS}"):
            pass
        self.proxies = {name: ChaosProxy(self.server.url) for name in ("work", "calls", "reads")}
        self.turns = {
            name: asyncio.Lock() for name in ("server", *self.proxies, "processes", "pair")
        }
        self.processes = []
        for role, count in (("worker", workers), ("supervisor", supervisors)):
            for i in range(count):
                kind = ("sync", "asyncio")[i % 2]
                self.processes.append(Process(self, role, kind, self.proxies["work"].url))

    @contextlib.contextmanager
    def raw(self):
        """A plain client of the server, past every proxy."""
        with connect_raw(self.server.url, socket_timeout=30) as client:
            yield client

    def of(self, role):
        return [process for process in self.processes if process.role == role]

    # -- healing ------------------------------------------------------------------------------------------------

    async def restart_server(self):
        await asyncio.to_thread(self.server.restart)

    def heal(self):
        """Undo whatever a fault that was broken off has left."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGCONT)
        if not self.server.running:
            self.server.restart()
        with self.raw() as raw:
            raw.replicaof("NO", "ONE")
            raw.config_set("maxmemory", "0")
            raw.config_set("min-replicas-to-write", "0")
        for proxy in self.proxies.values():
            proxy.cut_by(())
            proxy.chunk, proxy.delay = 1 << 16, 0.0
            proxy.release()
            proxy.refuse()
            proxy.listen()
        for process in self.processes:
            process.signal(signal.SIGCONT)
            if process.code is not None:
                process.start()

    # -- sizes --------------------------------------------------------------------------------------------------

    def size_of_server(self):
        """Keys, clients and MiB of data of the server."""
        with self.raw() as raw:
            return {
                "keys": raw.dbsize(),
                "clients": len(raw.client_list()),
                "MiB": raw.info("memory")["used_memory"] >> 20,
            }

    # -- its end ------------------------------------------------------------------------------------------------

    async def stop_processes(self):
        """Ask every process to end, and hold it to it."""
        for process in self.processes:
            process.signal(signal.SIGTERM)
        for process in self.processes:
            if not await process.wait(20):
                self.account.violation(f"{process.name} does not end on SIGTERM")
                process.signal(signal.SIGKILL)
                await process.wait(5)
            elif process.code != 0:
                self.account.violation(f"{process.name} ended with code {process.code}")
            stderr = (self.folder / f"{process.name}.stderr").read_text()
            if stderr:
                self.account.violation(f"{process.name} wrote to stderr: {stderr[-2000:]}")

    def close(self):
        for process in self.processes:
            process.signal(signal.SIGCONT)
            process.signal(signal.SIGKILL)
            wait_until(lambda process=process: process.code is not None)
        for proxy in self.proxies.values():
            proxy.release()
            proxy.close()
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.server.pid, signal.SIGCONT)
        self.server.stop()
