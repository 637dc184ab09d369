"""A writer without I/O, the shell that drives it in tests, and what it sends."""

import hiredis

from ff_fast._hot.writer import WriterCore, arguments_of
from ff_fast.types import BestEffortLiveConfig, PatchKind, StreamMode

from ...reference_writer import parse

KEYS = {name: b"{p}%b" % name.encode() for name in ("head", "log", "live", "summary")}
WRITER = b"0:lease:7:writer"
NOW_MS = 1_700_000_000_000
NEW = (NOW_MS, 0, 0, b"", 0)
DURABLE = StreamMode.durable()
LIVE = StreamMode.best_effort_live(15_000)
MERGE = StreamMode.durable_summary()
TEXT = StreamMode.durable_summary(PatchKind.STRING_APPEND("/text"))
NOTES = StreamMode.durable_summary(PatchKind.STRING_APPEND("/notes/a:b"))
MODES = [DURABLE, LIVE, MERGE, TEXT, NOTES]
OOM = hiredis.ReplyError("OOM command not allowed when used memory > 'maxmemory'.")


class Shell(WriterCore):
    """A shell that notes what the core tells it."""

    def __init__(self, mode=DURABLE, opened=NEW, **options):
        self.queued = False
        self.lingers = 0
        self.progress = 0
        super().__init__(
            keys=tuple(KEYS.values()), writer=WRITER, mode=mode, opened=opened, **options
        )

    def _on_ready(self):
        self.queued = True

    def _on_linger(self):
        self.lingers += 1

    def _on_progress(self):
        self.progress += 1

    def _acknowledge(self, batch, reply, now_ms=NOW_MS, shared=False):
        if isinstance(reply, bytes) and b"-" in reply[:14]:
            # The server's clock is not behind the id.
            now_ms = max(now_ms, int(reply.split(b"-")[0] or 0))
        return super()._acknowledge(batch, reply, now_ms, shared)

    def take(self):
        """The next batch, as a shell that was told to ask for it."""
        assert self.queued, "the shell was not told"
        self.queued = False
        return self._next_batch()


def position(batch, ms=NOW_MS):
    last = batch.first_sequence + batch.frame_count - 1
    return b"%d-%d %d 0" % (ms, last, NOW_MS + 30_000)


def stored(writer, ms=NOW_MS):
    """Acknowledge everything; return what was sent."""
    requests = []
    while not writer._idle:
        writer._seal_soon()
        batch = writer.take()
        requests.append(parse(arguments_of(batch.message)))
        writer._acknowledge(batch, position(batch, ms))
    return requests


def payloads_of(batch):
    return [frame.payload for frame in parse(arguments_of(batch.message)).frames]


def keys_of(batch):
    """The keys that a request names."""
    reader = hiredis.Reader()
    reader.feed(batch.message)
    name, function, count, *rest = reader.gets()
    assert (name, function) == (b"FCALL", b"ff_append")
    return tuple(rest[: int(count)])


def keys_named(names):
    return tuple(KEYS[name] for name in names.split())


def write(writer, frame):
    return writer.write(
        frame.payload,
        frame.frame_type,
        mode=frame.mode,
        correlation_id=frame.correlation_id,
        encoding=frame.encoding,
        source=frame.source,
    )


def stored_on(writer, server):
    requests = []
    while not writer._idle:
        batch = writer.take()
        argv = arguments_of(batch.message)
        requests.append(parse(argv))
        assert writer._acknowledge(batch, server.append(argv)) is None
        assert writer.error is None
    return requests


def in_flight(count, mode=DURABLE, **options):
    """A writer with *count* batches on their way."""
    writer = Shell(mode, **options)
    sent = []
    for _ in range(count):
        for _ in range(256):
            writer.write(b"%d" % writer.next_sequence)
        sent.append(writer.take())
    return writer, sent


def live(ttl_ms, floor=64, ceiling=16_384, alpha=0.2):
    return StreamMode.best_effort_live_with_config(
        BestEffortLiveConfig(ttl_ms, floor, ceiling, alpha)
    )


def tail_of(batch):
    return parse(arguments_of(batch.message)).tail
