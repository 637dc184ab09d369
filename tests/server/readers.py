"""Tails that run in threads of their own, in either shell, and writers for them to read."""

import contextlib
import time
from typing import NamedTuple

import ff_fast
from ff_fast import BestEffortLiveConfig, StreamMode, keys

from ..router import node_of
from ..shells import KINDS, Reading
from ..unit.script import request_of
from ..waiting import wait_until

__all__ = ["KINDS"]

DURABLE = StreamMode.durable()
SUMMARY = StreamMode.durable_summary()
# A window that drops nothing while a test runs.
BEST_EFFORT = StreamMode.best_effort_live_with_config(
    BestEffortLiveConfig(600_000, maxlen_ceiling=1_000_000)
)
MODES = {"durable": DURABLE, "summary": SUMMARY, "best_effort": BEST_EFFORT}


class Attempt(NamedTuple):
    """An execution whose first attempt is claimed."""

    eid: str
    handle: ff_fast.Handle

    @property
    def log(self):
        return keys.stream(self.eid, 0)

    @property
    def live(self):
        return keys.live(self.eid, 0)

    @property
    def channel(self):
        return keys.attempt_channel(self.eid, 0)

    @property
    def core(self):
        return keys.core(self.eid)

    @property
    def head(self):
        return keys.head(self.eid, 0)


def begin(backend, lane, lease_ttl_ms=30_000):
    eid = backend.create_execution(lane=lane)
    handle = backend.claim(
        lane=lane, worker_id="w", worker_instance_id="w-1", lease_ttl_ms=lease_ttl_ms
    )
    return Attempt(eid, handle)


class Reader(Reading):
    """A tail to its end. ``items`` has ``(monotonic, item)``."""

    def __init__(self, kind, url, eid, **options):
        self._eid, self._options = eid, options
        super().__init__(kind, url)

    def open(self):
        return self.backend.tail(self._eid, **self._options)

    def take(self, item):
        self.items.append((time.monotonic(), item))
        return False

    @property
    def got(self):
        return [item for _, item in self.items]

    def result(self, deadline_s=20.0):
        """What the tail yielded, once it is over."""
        super().result(deadline_s)
        return self.got

    def wait_for(self, count):
        return wait_until(lambda: len(self.items) >= count or self.error is not None)


def blocked(raw):
    """Connections that are blocked in XREAD."""
    return [c for c in raw.client_list() if "b" in c["flags"] and c["cmd"] == "xread"]


def listening(raw):
    """Connections over which readers hear of pushes."""
    return [c for c in raw.client_list() if c["name"] == "ff_fast:readers" and int(c["ssub"]) > 0]


def wait_listening(raw, count=1):
    """Wait until readers listen to *count* channels, and ask for nothing; return their connections."""

    def calls():
        stats = raw.info("commandstats")
        return sum(
            stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("fcall_ro", "fcall")
        )

    def quiet():
        before = calls()
        time.sleep(0.01)
        return calls() == before

    def found():
        clients = listening(raw)
        return sum(int(c["ssub"]) for c in clients) >= count and quiet() and clients

    return wait_until(found)


def collect(kind, url, eid, **options):
    """Everything that a tail of an ended attempt yields."""
    return Reader(kind, url, eid, **options).result()


def sequences(items):
    return [item.sequence for item in items if isinstance(item, ff_fast.StreamFrame)]


@contextlib.contextmanager
def counted(raw, *commands):
    """Count the calls of some commands while the block runs; the result is a dict that is filled at its end."""

    def calls():
        stats = raw.info("commandstats")
        return {name: stats.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in commands}

    before = calls()
    result = {}
    yield result
    after = calls()
    result.update({name: after[name] - before[name] for name in commands})


class Stepper:
    """A tail driven by hand, one step at a time, over a connection of a plain client."""

    def __init__(self, raw, core):
        self.core = core
        self.items = []
        self._raw = raw

    def step(self):
        """Make one step; return what it brought."""
        step = self.core.step()
        if step is None:
            # As after a loss of the subscription: storage is asked.
            self.core.doubt(True)
            step = self.core.step()
        found = self.core.receive(self._ask(step))
        self.items += found
        return found

    def drive(self, steps):
        """Run steps of one command each; return their value."""
        reply = None
        while True:
            try:
                step = steps.send(reply)
            except StopIteration as stop:
                return stop.value
            reply = [self._ask(step)]

    def _ask(self, step):
        pool = node_of(self._raw, step.commands[0].key).connection_pool
        connection = pool.get_connection()
        request = request_of(step)
        try:
            connection.send_packed_command([request])
            reply = connection.read_response()
        finally:
            pool.release(connection)
        self.received(request.split(b"\r\n", 3)[2], reply)
        return reply

    def received(self, command, reply):
        """Called with the name of a command, and the reply to it."""

    def run(self):
        """Step to the end of the attempt; return everything."""
        while not self.core.ended:
            self.step()
        return self.items
