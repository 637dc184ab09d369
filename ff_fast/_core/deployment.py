"""What a backend knows of the deployment that it is connected to, and what every new connection checks."""

from __future__ import annotations

import time

from ff_fast import _library, keys
from ff_fast._core import ops
from ff_fast._core.steps import Command, Step, Steps, command
from ff_fast._hot.resp import pack_command
from ff_fast.errors import (
    ClusterModeRequired,
    DeploymentMismatch,
    FunctionMissing,
    LibraryMismatch,
    PermissionDenied,
    ProtocolError,
    from_server_error,
    shows_cluster,
)

_BUSY_SWEEP_S = 30.0
_LANES = 1_024


class Deployment:
    """The partition count of a deployment, and when this backend swept its lanes last.

    Attributes:
        partitions: How many partitions the deployment has. The server's own number counts from the first connection
            on; before that it is the configured one, or 256.
    """

    __slots__ = ("_configured", "_known", "_sweeps", "partitions")

    def __init__(self, partitions: int | None = None) -> None:
        self._configured = partitions
        self._known = False
        # Lane to when it was first claimed from, and last swept. Bounded: lanes may be as many as users.
        self._sweeps: dict[str, tuple[float, float]] = {}
        self.partitions = keys.DEFAULT_PARTITIONS if partitions is None else partitions

    def sweep_due(self, lane: str, every_s: float) -> bool:
        """Return whether a sweep of an empty lane is due; it then counts as made. The first one always is."""
        now = time.monotonic()
        seen, swept = self._sweeps.get(lane, (now, float("-inf")))
        due = now - swept >= every_s
        self._note(lane, seen, now if due else swept)
        return due

    def sweep_overdue(self, lane: str) -> bool:
        """Return whether a lane that never runs dry is due for a sweep: it would find no lost hint otherwise."""
        now = time.monotonic()
        seen, _ = self._sweeps.get(lane, (now, 0.0))
        if now - seen >= _BUSY_SWEEP_S:
            return self.sweep_due(lane, _BUSY_SWEEP_S)
        if lane not in self._sweeps:
            self._note(lane, now, float("-inf"))
        return False

    def _note(self, lane: str, seen: float, swept: float) -> None:
        if lane not in self._sweeps and len(self._sweeps) >= _LANES:
            # The oldest goes; one that comes back is swept at once.
            del self._sweeps[next(iter(self._sweeps))]
        self._sweeps[lane] = (seen, swept)

    def prepare(self) -> Steps[None]:
        """Check a new connection: load the library where it is missing or older, and compare the partition count.

        Raises:
            LibraryMismatch: The server holds a newer contract.
            ClusterModeRequired: The server is a node of a cluster.
            DeploymentMismatch: The server has another partition count than this backend uses.
            FFError: The server refused.
        """
        version = ops.version()
        stored: int | None = None
        (reply,) = yield Step((version.command(),))
        if isinstance(reply, Exception) and shows_cluster(str(reply)):
            raise ClusterModeRequired
        try:
            contract, digest, stored = version.answer(reply)
        except FunctionMissing:
            yield from _load()
        else:
            if contract > _library.CONTRACT:
                raise LibraryMismatch(contract, _library.CONTRACT)
            if digest != _library.digest():
                yield from _load()
        if stored is None:
            stored = yield from self._store()
        if self._known and stored != self.partitions:
            raise DeploymentMismatch(stored, self.partitions)
        if self._configured is not None and stored != self._configured:
            raise DeploymentMismatch(stored, self._configured)
        self.partitions = stored
        self._known = True

    def _store(self) -> Steps[int]:
        """Store the partition count unless another client has; return the one that counts."""
        key = keys.PARTITIONS_CONFIG
        mine = b"%d" % self.partitions
        refused, stored = yield Step((command(b"SET", key, mine, b"NX"), command(b"GET", key)))
        if isinstance(refused, Exception):
            error = from_server_error(str(refused))
            if not isinstance(error, PermissionDenied):
                raise error
            if not isinstance(stored, bytes):
                # A user who may not write it: whoever writes first stores it.
                return self.partitions
        if isinstance(stored, Exception):
            raise from_server_error(str(stored))
        if not isinstance(stored, bytes) or not stored.isdigit():
            raise ProtocolError
        return int(stored)


def _load() -> Steps[None]:
    load = pack_command(b"FUNCTION", b"LOAD", b"REPLACE", _library.source().encode())
    (reply,) = yield Step((Command(b"", load),))
    if isinstance(reply, Exception):
        raise from_server_error(str(reply))
