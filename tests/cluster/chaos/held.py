"""What a process holds of the library. Nothing of it may grow with the streams that have ended."""

import collections
import ctypes
import gc
import resource
from pathlib import Path

from ff_fast import aio, client
from ff_fast._aio import connection as _aio_connection
from ff_fast._aio import hub as _aio_hub
from ff_fast._aio import leases as _aio_leases
from ff_fast._core.readers import ReaderState
from ff_fast._hot.feed import Feed, Inbox
from ff_fast._hot.writer import Batch, Push, WriterCore
from ff_fast._sync import connection as _sync_connection
from ff_fast._sync import hub as _sync_hub
from ff_fast._sync import leases as _sync_leases

OF_STREAMS = {
    "writers": WriterCore,
    "batches": (Batch, Push),
    "places": Inbox,
    "feeds": Feed,
    "readers": ReaderState,
    "lease keepers": (_sync_leases.LeaseKeeper, _aio_leases.LeaseKeeper),
}
"""What belongs to a stream, or to who writes or reads it, and goes with it."""

OF_BACKENDS = {
    "connections": (_sync_connection.Connection, _aio_connection.Connection),
    "hubs": (_sync_hub.Hub, _aio_hub.Hub, _sync_hub.Hubs, _aio_hub.Hubs),
    "backends": (client.ValkeyBackend, aio.ValkeyBackend),
}
"""What goes with the backend."""

SUBSCRIPTIONS = 1
"""Readers that the load has to its end."""

GROWTH_BYTES = 128 << 20
"""How much more memory the process may have after a run, in bytes: what allocators keep of that which was freed. The
frames of a minute and what was said of them are several times as much."""


class Held:
    """What there is at a moment.

    Attributes:
        counts: Objects of each kind of the library.
        memory: Resident bytes of the process.
    """

    def __init__(self):
        gc.collect()
        of_types = collections.Counter(map(type, gc.get_objects()))
        self.counts = collections.Counter()
        for name, kind in {**OF_STREAMS, **OF_BACKENDS}.items():
            self.counts[name] = sum(
                count for each, count in of_types.items() if issubclass(each, kind)
            )
        # What was freed in between goes back to the system.
        ctypes.CDLL(None).malloc_trim(0)
        self.memory = _resident()


def _resident():
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * resource.getpagesize()


def after_the_streams(before, now):
    """What is held although every stream has ended, while the backends are open."""
    for name in OF_STREAMS:
        allowed = before.counts[name] + (SUBSCRIPTIONS if name == "readers" else 0)
        if now.counts[name] > allowed:
            yield f"{now.counts[name] - allowed} {name} are held of streams that have ended"


def after_everything(before, now):
    """What is held although every backend is closed."""
    for name in [*OF_STREAMS, *OF_BACKENDS]:
        if (left := now.counts[name] - before.counts[name]) > 0:
            yield f"{left} {name} are held after everything was closed"
    if (grown := now.memory - before.memory) > GROWTH_BYTES:
        yield f"the process has grown by {grown >> 20} MiB"
