"""One attempt on a real server, and the calls of `ff_append` and `ff_open_writer` that any client may make."""

import hashlib

from ff_fast import errors, keys
from ff_fast._core import ops
from ff_fast.errors import Outcome

from ..heads import head_of, set_head
from ..reference_frames import run_of

MAX_PAYLOAD = 1 << 20
WRITER = b"writer-1"
MARK = b"the test's own mark"


def number(value):
    return b"%d" % value


def block(plain, with_fields, count, fields, *values):
    """A block of frames: one letter without fields, another with fields."""
    if fields:
        return [with_fields, number(count), number(len(fields) // 2), *fields, *values]
    return [plain, number(count), *values]


def log(*payloads, extras=()):
    return block(b"L", b"X", len(payloads), extras, *payloads)


def run_value(*payloads):
    """What stands for several frames in the live window: one payload, or a run."""
    times = list(range(len(payloads) * -100, 0, 100))
    return payloads[0] if len(payloads) == 1 else run_of(payloads, times)


def live(*payloads, fields=()):
    return block(b"V", b"W", len(payloads), fields, run_value(*payloads))


def patches(*payloads, base, fields=()):
    version, count = base + len(payloads), len(payloads)
    form = b"patch" if count == 1 else b"run"
    about = [b"mode", b"summary", b"patch_kind", b"json-merge-patch", *fields]
    about += [b"summary_version", number(version)]
    return [
        *block(b"", b"S", count, about, run_value(*payloads)),
        b"%b:%d:%d:json-merge-patch:" % (form, version, count),
        number(base),
    ]


def part_of(names, *args):
    """The arguments of a part of `ff_append` whose keys are *names*, with its head."""
    return (b"%d%d" % (len(args), len(names)), *args)


def appended(raw, *parts):
    """The answers of one call of `ff_append` to its parts, each ``(keys, arguments)``; and server time in ms."""
    names = [name for each, _ in parts for name in each]
    args = [arg for each, given in parts for arg in part_of(each, *given)]
    reply = raw.fcall("ff_append", len(names), *names, *args)
    if len(parts) > 1:
        assert isinstance(reply[0], bytes), reply
        assert len(reply) == len(parts) + 1
        return reply[1:], int(reply[0])
    if isinstance(reply, list):
        return [reply], server_ms(raw)
    now, _, answer = reply.partition(b" ")
    return [answer], int(now)


class Listener:
    """Subscribes to channels; `heard` tells what was published since."""

    def __init__(self, raw, *channels):
        self._raw = raw
        self._channels = channels
        self._pubsub = raw.pubsub(ignore_subscribe_messages=True)
        self._pubsub.ssubscribe(*channels)
        self.heard()

    def heard(self):
        """The messages in their order, each with its channel where there are several."""
        # One connection hears what was published in its order, so nothing is behind the mark.
        while not self._raw.execute_command("SPUBLISH", self._channels[0], MARK):
            pass
        found = []
        while True:
            message = self._pubsub.get_message(timeout=10)
            if message is None:
                continue
            if message["data"] == MARK:
                return found
            several = len(self._channels) > 1
            found.append((message["channel"], message["data"]) if several else message["data"])

    def close(self):
        self._pubsub.close()


class Stream:
    """One attempt, and the calls that its worker could make; in the partition of *beside*, if that is given."""

    def __init__(self, raw, backend, lane, *, retry=None, beside=None, **claim):
        self.raw = raw
        self.backend = backend
        self.lane = lane
        self.eid = backend.create_execution(
            lane=lane,
            payload=b"in",
            tags={"a.b": "c"},
            retry=retry,
            execution_id=beside and f"{beside.eid.rpartition(':')[0]}:{keys.new_uuid()}",
        )
        self.handle = self.claim(**claim)
        attempt = ops.Attempt.of(self.handle)
        self.fence = attempt.fence
        self.keys = attempt.stream_keys
        self.core = keys.core(self.eid)
        self.head, self.log, self.live, self.summary = self.keys
        self.meta = keys.meta(self.eid, int(self.fence[0]))

    def claim(self, **options):
        return self.backend.claim(lane=self.lane, worker_id="w", worker_instance_id="i", **options)

    def child(self):
        return self.backend.create_execution(lane=f"{self.lane[:50]}-child", parent_id=self.eid)

    def call(self, function, keys, *args):
        return self.raw.fcall(function, len(keys), *keys, *args)

    def writer_id(self, writer=WRITER, fence=None):
        index, lease_id, epoch = fence or self.fence
        return b":".join((index, hashlib.sha1(lease_id).hexdigest().encode(), epoch, writer))

    def open(self, writer=WRITER, fence=None):
        names = (self.core, self.head, self.summary)
        lease_id = (fence or self.fence)[1]
        return self.call("ff_open_writer", names, self.writer_id(writer, fence), lease_id)

    def part(
        self, *blocks, first=1, previous=None, fence=None, writer=WRITER, names=None, push=b""
    ):
        """Keys and arguments of a part that stores blocks.

        *names* are those of the keys that the call is told of; all of them by default.
        """
        previous = number(first - 1) if previous is None else previous
        args = [part for block in blocks for part in block]
        used = self.keys if names is None else [getattr(self, name) for name in names.split()]
        return used, (self.writer_id(writer, fence), previous, push, *args)

    def push_part(self, message, fence=None, writer=WRITER):
        """Keys and arguments of a part that only pushes."""
        return (self.head,), (self.writer_id(writer, fence), message)

    def told(self, answer, now):
        """What the answer to a part of this attempt says: (ms, sequence) of the position, or the error.

        Of a part that only pushes it is None.
        """
        if isinstance(answer, list):
            assert answer[0] == 0
            return errors.for_code(answer[1].decode(), answer[2:])
        *identity, expires, cancel = answer.split(b" ")
        assert now < int(expires) == head_of(self.raw, self.head).lease_expires_at
        assert cancel in (b"0", b"1")
        return tuple(map(int, identity[0].split(b"-"))) if identity else None

    def append(self, *blocks, **options):
        """The answer to a call of one part: (ms, sequence) of the position, or the error that it stands for."""
        before = server_ms(self.raw)
        (answer,), now = appended(self.raw, self.part(*blocks, **options))
        assert before <= now <= server_ms(self.raw)
        return self.told(answer, now)

    def push(self, message, **options):
        """The answer to a call that only pushes: None, or the error that it stands for."""
        (answer,), now = appended(self.raw, self.push_part(message, **options))
        return self.told(answer, now)

    def everything(self):
        """Every key of the execution, byte for byte, and when it expires."""
        found = sorted(self.raw.keys(f"*{self.eid.partition(':')[2].partition(':')[2]}*"))
        return {key: (self.raw.dump(key), self.raw.pexpiretime(key)) for key in found}

    def refused(self, code, *blocks, **call):
        """The error of a call that must change nothing."""
        before = self.everything()
        error = self.append(*blocks, **call)
        assert self.everything() == before
        assert isinstance(error, errors.FFError), error
        assert (error.code, error.outcome) == (code, Outcome.NOT_APPLIED)
        return error

    def repeated(self, *blocks, **call):
        """The answer to a call whose frames are all stored already: it must change nothing."""
        before = self.everything()
        answer = self.append(*blocks, **call)
        assert self.everything() == before
        return answer

    def frames(self, **options):
        return self.backend.read_stream(self.eid, 0, count=10_000, **options)

    def payloads(self):
        page = self.frames()
        assert page.gaps == ()
        assert [frame.sequence for frame in page] == list(range(1, len(page) + 1))
        return [frame.payload for frame in page]

    def set_last(self, *, ms=None, sequence=None):
        """Change one part of the id of the last frame."""
        stored_ms, stored_sequence = map(int, head_of(self.raw, self.head).last_id.split(b"-"))
        ms = stored_ms if ms is None else ms
        sequence = stored_sequence if sequence is None else sequence
        set_head(self.raw, self.head, last_id=f"{ms}-{sequence}")


def server_ms(raw):
    seconds, micros = raw.time()
    return seconds * 1000 + micros // 1000


def _gone(stream):
    stream.raw.delete(*stream.everything())


def _claim_lost(stream):
    stream.raw.hset(stream.core, "current_lease_epoch", "0")
    set_head(stream.raw, stream.head, writer=None)


def _other_lease(stream, call):
    call["fence"] = (stream.fence[0], b"00000000-0000-4000-8000-000000000000", stream.fence[2])


def _suspended(stream):
    stream.raw.hset(stream.core, "state", "suspended")
    set_head(stream.raw, stream.head, writer=None)


def _closed(stream):
    stream.raw.hset(stream.meta, "closed_at", "1")
    set_head(stream.raw, stream.head, writer=None)


def _lapsed(stream):
    set_head(stream.raw, stream.head, lease_expires_at="1")


def _superseded(stream):
    stream.open(b"writer-2")


REFUSALS = [
    ("execution_not_found", _gone, None, errors.ExecutionNotFound),
    ("state_lost", _claim_lost, None, errors.StateLost),
    ("stale_owner", None, _other_lease, errors.StaleOwner),
    ("suspended", _suspended, None, errors.ExecutionSuspended),
    ("stream_closed", _closed, None, errors.StreamClosed),
    ("lease_expired", _lapsed, None, errors.LeaseExpired),
    ("writer_superseded", _superseded, None, errors.WriterSuperseded),
    ("payload_too_large", None, lambda _, call: call.update(b=log(bytes(MAX_PAYLOAD + 1))), errors.PayloadTooLarge),
    ("invalid_input", None, lambda _, call: call.setdefault("b", [b"Z"]), errors.InvalidInput),
    ("sequence_gap", None, lambda _, call: call.update(first=9), errors.SequenceGap),
    ("summary_conflict", None, lambda _, call: call.setdefault("b", patches(b"{}", base=7)), errors.SummaryConflict),
]  # fmt: skip
CODES = [code for code, *_ in REFUSALS]


def spoil(stream, refusals):
    call = {}
    # The writer is superseded while the execution still allows it.
    for _, change, _, _ in reversed(refusals):
        if change is not None:
            change(stream)
    for _, _, change, _ in refusals:
        if change is not None:
            change(stream, call)
    return call.pop("b", log(b"x")), call


def replaced(block, at, value):
    return [*block[:at], value, *block[at + 1 :]]


def visible(stream):
    return stream.raw.hget(stream.meta, "visible_sequence")
