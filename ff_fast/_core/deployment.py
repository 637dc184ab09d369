"""The deployment behind a server: its partition count, and the checks of every new connection."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import time
import warnings
from typing import TYPE_CHECKING

from ff_fast import _library, keys
from ff_fast._core import ops
from ff_fast._core.places import Places, bound
from ff_fast._core.ready import Offer
from ff_fast._core.steps import Command, Step, Steps, command
from ff_fast._hot.resp import pack_command
from ff_fast._hot.tally import Tally
from ff_fast._log import say
from ff_fast.errors import (
    ClusterModeRequired,
    Corruption,
    DeploymentMismatch,
    DeploymentWarning,
    FunctionMissing,
    LibraryMismatch,
    PermissionDenied,
    from_server_error,
    shows_cluster,
)
from ff_fast.types import DEFAULT_PAYLOAD_LIMIT

if TYPE_CHECKING:
    from collections.abc import Hashable, Set

    from ff_fast._core.traces import Tracing
    from ff_fast.types import BackendConfig

READS = "reads"
"""Role of a connection whose reads a replica may answer."""

_READONLY = Command(b"", pack_command(b"READONLY"))

_BUSY_SWEEP_S = 30.0
PERSISTENCE = Command(b"", pack_command(b"CONFIG", b"GET", b"appendonly", b"save"))
_LANES = 1_024
"""Lanes, and kinds of workers on them, that are remembered."""
_RELEASED = 4_096
"""Released leases that are remembered."""
_NOT_MINE_TO_LOAD = "The server has lost the function library and this user may not load it; connect as one that may."
_NOT_TO_LOAD = (
    "The server has no function library of ff_fast: nothing has connected to it yet, or it is another server. A worker"
    " or a web process loads it; this client does not (load_library)."
)


class Deployment:
    """The partition count of a deployment, and what this backend's workers know of their lanes.

    Attributes:
        partitions: Number of partitions: the stored one from the first connection on, before it the configured one or
            256.
        max_payload_bytes: Largest payload that writers of this backend accept.
        pid: The process that opened the backend.
        places: What this backend knows to be stored.
        tally: What this backend has done, in numbers.
        tracing: Makes spans; None while nobody has asked for traces.
    """

    __slots__ = (
        "_client_name", "_configured", "_known", "_loads", "_looked", "_offers", "_released", "_sweeps",
        "max_payload_bytes", "partitions", "pid", "places", "tally", "tracing",
    )  # fmt: skip

    def __init__(
        self,
        partitions: int | None = None,
        max_payload_bytes: int = DEFAULT_PAYLOAD_LIMIT,
        replay_ms: int = 0,
        replay_bytes: int = 0,
        client_name: str | None = None,
        *,
        loads: bool = True,
    ) -> None:
        self._configured = partitions
        # Whether connections may load the library and store the partition count.
        self._loads = loads
        # Of all connections; None is their role.
        self._client_name = client_name
        self._known = False
        # Whether the server was looked at.
        self._looked = False
        # Lane and capabilities -> times of the first claim and the last sweep. Bounded, since there may be a lane for
        # each user.
        self._sweeps: dict[Hashable, tuple[float, float]] = {}
        self._offers: dict[tuple[str, tuple[str, ...], bool], Offer] = {}
        self.partitions = keys.DEFAULT_PARTITIONS if partitions is None else partitions
        self.max_payload_bytes = max_payload_bytes
        self.pid = os.getpid()
        self.tally = Tally()
        self.tracing: Tracing | None = None
        self.places = Places(replay_ms, replay_bytes, self.tally)
        # Leases that a call of this backend has set out to release. Single calls in C change it.
        self._released: dict[str, None] = {}

    @classmethod
    def of(cls, config: BackendConfig) -> Deployment:
        """Return the deployment of a backend with that configuration, before its first connection."""
        return cls(
            config.partitions,
            config.max_payload_bytes,
            config.replay_ms,
            config.replay_bytes,
            config.connection.client_name,
            loads=config.load_library,
        )

    def releases(self, lease_id: str) -> None:
        """Note that a call of this backend is about to release a lease: a renewal that is refused then is no loss."""
        self._released[lease_id] = None
        bound(self._released, _RELEASED)

    def gives_up(self, lease_id: str) -> bool:
        """Whether a call of this backend has set out to release a lease."""
        return lease_id in self._released

    def offer(self, lane: str, tokens: tuple[str, ...], plain: bool = True) -> Offer:
        """Return what workers with these capabilities know of a lane."""
        found = self._offers.get((lane, tokens, plain))
        if found is None:
            if len(self._offers) >= _LANES:
                del self._offers[next(iter(self._offers))]
            found = self._offers[lane, tokens, plain] = Offer(lane, tokens, plain=plain)
        return found

    def sweep_due(self, lane: Hashable, every_s: float) -> bool:
        """Return whether a sweep of an empty lane is due, and if so note it as made. The first is always due."""
        now = time.monotonic()
        seen, swept = self._sweeps.get(lane, (now, float("-inf")))
        due = now - swept >= every_s
        self._note(lane, seen, now if due else swept)
        return due

    def sweep_overdue(self, lane: Hashable) -> bool:
        """Return whether a sweep of a lane that is never empty is due; without one its lost hints are never found."""
        now = time.monotonic()
        seen, _ = self._sweeps.get(lane, (now, 0.0))
        if now - seen >= _BUSY_SWEEP_S:
            return self.sweep_due(lane, _BUSY_SWEEP_S)
        if lane not in self._sweeps:
            self._note(lane, now, float("-inf"))
        return False

    def _note(self, lane: Hashable, seen: float, swept: float) -> None:
        if lane not in self._sweeps and len(self._sweeps) >= _LANES:
            # An evicted lane is swept again at its next claim, which costs one round trip.
            del self._sweeps[next(iter(self._sweeps))]
        self._sweeps[lane] = (seen, swept)

    def prepare(self, role: str | None = None, slots: Set[int] | None = None) -> Steps[bool]:
        """Check a new connection: load the library if it is missing or different, and compare the partition count.

        Args:
            role: What the connection is for: CLIENT LIST shows it in its name. None leaves the name as it is.
            slots: The known slots of the node; None where there is no cluster. In one, :meth:`agree` compares the count.

        Returns:
            Whether the library was checked; a node that has no slots, or does not know yet that it has them, is not asked.

        Warns (``DeploymentWarning``), on the first connection, of a server that evicts any key when its memory is full, that
        stores nothing on disk, or that is of an older version.

        Raises:
            LibraryMismatch: The server holds a newer contract, or an older one, and this backend loads none.
            FunctionMissing: The server holds no library, and this backend loads none.
            ClusterModeRequired: The server is a node of a cluster.
            DeploymentMismatch: The server stores another partition count than this backend uses.
            FFError: The server refused a command.
        """
        if slots is not None:
            return (yield from self._prepare_node(role, slots))
        version = ops.version()
        # Servers that do not know these commands, and users without the right, go on without a name.
        *_, reply = yield Step((*_names(role, self._client_name), version.command()))
        if isinstance(reply, Exception) and shows_cluster(str(reply)):
            raise ClusterModeRequired
        held = yield from self._check_library(version, reply)
        stored = held.partitions
        if stored is None:
            stored = yield from self._store()
        self._agree(stored)
        return True

    def _prepare_node(self, role: str | None, slots: Set[int]) -> Steps[bool]:
        key = None if role == READS else keys.key_in(slots)
        names = (*_names(role, self._client_name), *((_READONLY,) if role == READS else ()))
        if key is None:
            if names:
                yield Step(names)
            return False
        version = ops.version((key,))
        *_, reply = yield Step((*names, version.command()))
        if isinstance(reply, Exception) and shows_cluster(str(reply)):
            # The slots have moved, or the node waits for the others.
            return False
        yield from self._check_library(version, reply)
        return True

    def load(self) -> Steps[None]:
        """Load the library on a node that has answered that it has none."""
        if not self._loads:
            raise _not_loaded()
        try:
            yield from _load(None)
        except PermissionDenied:
            raise FunctionMissing(_NOT_MINE_TO_LOAD) from None

    def agree(self) -> Steps[None]:
        """Read the partition count of a cluster, or store it, and compare it.

        Raises:
            DeploymentMismatch: The cluster stores another partition count than this backend uses.
            FFError: The server refused a command.
        """
        (stored,) = yield Step((command(b"GET", keys.PARTITIONS_CONFIG),))
        if stored is None:
            self._agree((yield from self._store()))
        else:
            self._agree(_count(stored))

    def _check_library(self, version: ops.Op[ops.Version], reply: object) -> Steps[ops.Version]:
        """Load the library if *reply* says that it is missing or different; return what the server holds then."""
        held: ops.Version | None = None
        with contextlib.suppress(FunctionMissing):
            held = version.answer(reply)
        if held is not None and (
            held.contract > _library.CONTRACT
            or (held.contract < _library.CONTRACT and not self._loads)
        ):
            raise LibraryMismatch(held.contract, _library.CONTRACT)
        if not self._loads:
            if held is None:
                raise _not_loaded()
        elif held is None or held.digest != _library.digest():
            try:
                yield from _load(held)
            except PermissionDenied:
                # Whoever may load it does so again. A library of the same contract serves meanwhile.
                if not self._known or (held is not None and held.contract < _library.CONTRACT):
                    raise
                if held is None:
                    raise FunctionMissing(_NOT_MINE_TO_LOAD) from None
            else:
                # Asked again: another library may read no partition count.
                held = yield from ops.call(version)
        if not self._looked:
            self._looked = True
            yield from _look(held)
        return held

    def _agree(self, stored: int) -> None:
        if not 1 <= stored <= keys.MAX_PARTITIONS:
            raise _unreadable()
        if self._known and stored != self.partitions:
            raise DeploymentMismatch(stored, self.partitions)
        if self._configured is not None and stored != self._configured:
            raise DeploymentMismatch(stored, self._configured)
        self.partitions = stored
        self._known = True

    def _store(self) -> Steps[int]:
        """Store the partition count unless one is stored; return the stored one."""
        if not self._loads:
            return self.partitions
        key = keys.PARTITIONS_CONFIG
        mine = b"%d" % self.partitions
        written, stored = yield Step((command(b"SET", key, mine, b"NX"), command(b"GET", key)))
        if isinstance(written, Exception):
            error = from_server_error(str(written))
            if not isinstance(error, PermissionDenied):
                raise error
            if not isinstance(stored, bytes):
                # The user lacks the right to SET; the first client that has it stores the count.
                return self.partitions
        return _count(stored)


def _count(stored: object) -> int:
    if isinstance(stored, Exception):
        raise from_server_error(str(stored))
    if not isinstance(stored, bytes) or not stored.isdigit():
        raise _unreadable()
    return int(stored)


def _names(role: str | None, name: str | None) -> tuple[Command, ...]:
    """Return the commands that tell the server who connects."""
    if role is None:
        return ()
    return (
        Command(b"", pack_command(b"CLIENT", b"SETNAME", (name or f"ff_fast:{role}").encode())),
        Command(b"", pack_command(b"CLIENT", b"SETINFO", b"LIB-NAME", b"ff_fast")),
        Command(b"", pack_command(b"CLIENT", b"SETINFO", b"LIB-VER", _library.VERSION.encode())),
    )


def _look(held: ops.Version) -> Steps[None]:
    """Warn, once, of everything by which the server loses data, as far as it can be known."""
    faults: list[str] = []
    if held.eviction_policy.startswith("allkeys"):
        faults.append(
            f"The server's maxmemory-policy is {held.eviction_policy}: when its memory is full, it deletes frames, leases"
            " and executions without an error. Set it to noeviction."
        )
    if held.settings:
        (settings,) = yield Step((PERSISTENCE,))
        # Many services refuse the command.
        if isinstance(settings, list) and dict(
            zip(settings[::2], settings[1::2], strict=False)
        ) == {b"appendonly": b"no", b"save": b""}:
            faults.append(
                "The server stores nothing on disk: what it holds is lost when it restarts. Set appendonly to yes."
            )
    if is_older(held.engine):
        faults.append(f"The server is {held.engine}. Use Valkey 7.2 or newer.")
    if faults:
        warnings.warn(" ".join(faults), DeploymentWarning, stacklevel=1)


def is_older(engine: str) -> bool:
    """Whether the server is older than Valkey 7.2, which began as Redis 7.2."""
    found = re.match(r"(?:Valkey|Redis) ([0-9]{1,4})\.([0-9]{1,4})", engine)
    return found is not None and (int(found[1]), int(found[2])) < (7, 2)


def _not_loaded() -> FunctionMissing:
    """Return the error of a client that loads no library: no time that it waits brings one."""
    error = FunctionMissing(_NOT_TO_LOAD)
    error.retryable = False
    return error


def _unreadable() -> Corruption:
    return Corruption(
        f"{keys.PARTITIONS_CONFIG.decode()} is not a partition count; look for what wrote it."
    )


def _load(held: ops.Version | None) -> Steps[None]:
    """Load the library in place of the one that the server holds; None for none."""
    load = pack_command(b"FUNCTION", b"LOAD", b"REPLACE", _library.source().encode())
    (reply,) = yield Step((Command(b"", load),))
    if isinstance(reply, Exception):
        raise from_server_error(str(reply))
    before = "the server had none" if held is None else f"in place of contract {held.contract}"
    say(
        logging.INFO,
        "The function library of contract %d was loaded, digest %.12s; %s.",
        _library.CONTRACT,
        _library.digest(),
        before,
    )
