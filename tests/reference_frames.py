"""The layout of stream entries, as plainly as it can be said: the oracle of ``ff_fast._hot.frames``."""

import re
from typing import NamedTuple, get_args

from ff_fast import Gap, PatchKind
from ff_fast.types import EndReason


class F(NamedTuple):
    """A frame as a reader gets it, and the sequence of the visible frame before it."""

    ms: int
    sequence: int
    frame_type: str
    payload: bytes
    ts_ms: int
    mode: str
    encoding: str
    source: str
    correlation_id: str | None
    summary_version: int | None
    patch_kind: PatchKind | None
    attempt_index: int
    previous: int


def plain(frame):
    """What a StreamFrame shows, in the order of F."""
    return (
        int(frame.stream_id.split("-")[0]),
        frame.sequence,
        frame.frame_type,
        frame.payload,
        frame.ts_ms,
        frame.mode,
        frame.encoding,
        frame.source,
        frame.correlation_id,
        frame.summary_version,
        frame.patch_kind,
        frame.attempt_index,
    )


def varint(value):
    out = []
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def zigzag(value):
    return 2 * value if value >= 0 else -2 * value - 1


def unzigzag(value):
    return value // 2 if value % 2 == 0 else -(value + 1) // 2


def run_of(payloads, times=None):
    """A run, from its description in ff_fast/_hot/frames.pyx."""
    times = times or [0] * len(payloads)
    return b"".join(
        [
            varint(len(payloads)),
            *(varint(len(payload)) for payload in payloads),
            *(varint(zigzag(time)) for time in times),
            *payloads,
        ]
    )


MAX_FRAMES = 1024
MAX_RUN_BYTES = 2 << 20


class TooLargeError(ValueError):
    """A run that ff_fast does not write."""


def parse_run(run):
    """Payloads and times of a run; ValueError where it is none."""
    at = 0

    def take():
        nonlocal at
        value = 0
        for place in range(8):
            if at == len(run):
                raise ValueError("ends within a varint")
            byte = run[at]
            at += 1
            value += (byte % 128) * 128**place
            if byte < 128:
                return value
        raise ValueError("a varint is too long")

    count = take()
    if count > MAX_FRAMES or len(run) > MAX_RUN_BYTES:
        raise TooLargeError
    if count < 1:
        raise ValueError("no frame")
    lengths = [take() for _ in range(count)]
    times = [unzigzag(take()) for _ in range(count)]
    if at + sum(lengths) != len(run):
        raise ValueError("another size")
    payloads = []
    for length in lengths:
        payloads.append(run[at : at + length])
        at += length
    return payloads, times


def entry_id(raw):
    ms, sequence = raw.split(b"-")
    return int(ms), int(sequence)


def number(raw):
    if not re.fullmatch(rb"[0-9]{1,18}", raw):
        raise ValueError("no number")
    return int(raw)


def text(raw):
    return raw.decode("utf-8", "replace")


class Decoded(NamedTuple):
    frames: list
    end: tuple | None  # ms, sequence, previous, reason
    taken: int
    foreign: int
    rewound: bool


def count_of(fields):
    """How many frames an entry of ours with these fields holds."""
    names, values = fields[::2], fields[1::2]
    return len(parse_run(values[names.index(b"run")])[0]) if b"run" in names else 1


def decode(entries, after=0, limit=None, exclude=False, live=False, after_ms=0, attempt=0):
    """Decode entries of the log, or of the live window; ValueError where one is damaged."""
    frames, end, taken, foreign, rewound = [], None, 0, 0, False
    for raw, parts in entries:
        ms, sequence = entry_id(raw)
        if limit is not None and (ms, sequence) > limit:
            break
        taken += 1
        fields = dict(zip(parts[::2], parts[1::2], strict=False))
        payload, run = fields.get(b"payload"), fields.get(b"run")
        if b"end" in fields and b"prev" in fields and payload is None and run is None:
            rewound |= 0 < after_ms < ms and sequence <= after
            end = (ms, sequence, number(fields[b"prev"]), text(fields[b"end"]))
            continue
        if (payload is None) == (run is None) or sequence == 0:
            foreign += 1
            continue
        mode = text(fields.get(b"mode", b"best_effort" if live else b"durable"))
        if exclude and mode == "best_effort":
            continue
        kind = None
        if b"patch_kind" in fields:
            pointer = fields.get(b"pointer")
            kind = PatchKind(
                fields[b"patch_kind"].decode(), None if pointer is None else pointer.decode()
            )
        try:
            payloads, times = ([payload], [0]) if run is None else parse_run(run)
        except TooLargeError:
            foreign += 1
            continue
        version = number(fields[b"summary_version"]) if b"summary_version" in fields else 0
        previous = number(fields[b"prev"]) if b"prev" in fields else -1
        if len(payloads) > sequence:
            raise ValueError("the run begins before the stream")
        if 0 < version < len(payloads):
            raise ValueError("the run begins before the document")
        for i, (payload, time) in enumerate(zip(payloads, times, strict=True)):
            mine = sequence - len(payloads) + 1 + i
            if mine <= after:
                continue
            frames.append(
                F(
                    ms,
                    mine,
                    text(fields.get(b"frame_type", b"token")),
                    payload,
                    ms + time,
                    mode,
                    text(fields.get(b"encoding", b"utf8")),
                    text(fields.get(b"source", b"worker")),
                    text(fields[b"correlation_id"]) if b"correlation_id" in fields else None,
                    version - len(payloads) + 1 + i if version else None,
                    kind,
                    attempt,
                    previous if i == 0 and previous >= 0 else mine - 1,
                )
            )
        rewound |= 0 < after_ms < ms and sequence - len(payloads) + 1 <= after
    return Decoded(frames, end, taken, foreign, rewound)


def merge(log, live, ms, sequence, exclude, reason):
    """Frames of both in order with the gaps between, the last id, and why the attempt ended."""
    items = []
    for frame in sorted(log.frames + live.frames, key=lambda frame: frame.sequence):
        if frame.sequence <= sequence:
            continue
        before = frame.previous if exclude else frame.sequence - 1
        if before > sequence:
            items.append(Gap(sequence + 1, frame.sequence, reason))
        items.append(frame)
        ms, sequence = frame.ms, frame.sequence
    if log.end is None:
        return items, ms, sequence, None
    end_ms, end_sequence, previous, why = log.end
    if (previous if exclude else end_sequence - 1) > sequence:
        items.append(Gap(sequence + 1, end_sequence, reason))
    return items, end_ms, end_sequence, why


# -- pushes ----------------------------------------------------------------------------------------


def block_of(stream, fields, payloads, times=None):
    """A block of a push, from its description in ff_fast/_hot/frames.pyx."""
    run = run_of(payloads, times)
    pairs = list(zip(fields[::2], fields[1::2], strict=True))
    return b"".join(
        [
            stream,
            varint(len(pairs)),
            *(varint(len(text)) + text for pair in pairs for text in pair),
            varint(len(run)),
            run,
        ]
    )


def push_of(kind, ms, last, blocks=()):
    """A push of frames, ``F`` or ``f``, up to an id."""
    return b"%c%d-%d " % (kind, ms, last) + b"".join(blocks)


class Push(NamedTuple):
    """What a push says: kind ``frames``, ``end``, ``lease`` or ``look``."""

    kind: str
    deferred: bool = False
    ms: int = 0
    first: int = 0
    last: int = 0
    frames: list | None = None
    previous: int = 0
    end_reason: str | None = None
    end_error: str | None = None
    lease_ms: int = 0


LOOK = Push("look")


def decode_push(message, attempt=0):
    """Decode a push; one that is damaged says: look."""
    try:
        return parse_push(message, attempt)
    except ValueError:
        return LOOK


def parse_push(message, attempt):
    kind, rest = message[:1], message[1:]
    if kind == b"L":
        return Push("lease", lease_ms=number(rest))
    if kind not in (b"F", b"f", b"E") or b" " not in rest:
        return LOOK
    place, _, rest = rest.partition(b" ")
    ms, _, last = place.partition(b"-")
    ms, last = number(ms), number(last)
    if last < 1:
        return LOOK
    if kind == b"E":
        previous, _, reason = rest.partition(b" ")
        reason, space, error = reason.partition(b" ")
        if text(reason) not in get_args(EndReason) or number(previous) >= last:
            return LOOK
        told = error.decode("utf-8", "ignore") if space else None
        return Push("end", False, ms, 0, last, None, number(previous), text(reason), told)
    if not rest:
        return LOOK
    blocks = list(blocks_in(rest))
    total = sum(len(parse_run(run)[0]) for _, _, run in blocks)
    if total > MAX_FRAMES:
        return LOOK
    frames, sequence = [], last - total
    for stream, fields, run in blocks:
        sequence += len(parse_run(run)[0])
        entry = [b"%d-%d" % (ms, sequence), [*fields, b"run", run]]
        frames += decode([entry], 0, live=stream == b"V", attempt=attempt).frames
    if last - total < 0:
        return LOOK
    return Push("frames", kind == b"f", ms, last - total + 1, last, frames)


def blocks_in(body):
    at = 0

    def take():
        nonlocal at
        value = 0
        for place in range(8):
            if at >= len(body):
                raise ValueError("ends within a varint")
            byte = body[at]
            at += 1
            value += (byte % 128) * 128**place
            if byte < 128:
                return value
        raise ValueError("a varint is too long")

    def take_text():
        nonlocal at
        size = take()
        if size > len(body) - at:
            raise ValueError("ends within a text")
        at += size
        return body[at - size : at]

    while at < len(body):
        stream = body[at : at + 1]
        at += 1
        if stream not in (b"L", b"V"):
            raise ValueError("no stream")
        fields = []
        for _ in range(take()):
            fields += [take_text(), take_text()]
        yield stream, fields, take_text()


class Written(NamedTuple):
    """One frame to lay out: mode ``durable``, ``summary`` or ``best_effort``."""

    mode: str
    payload: bytes = b"p"
    frame_type: str = "token"
    correlation_id: str | None = None
    encoding: str = "utf8"


def lay_out(batches, end=None, start_ms=1_000):
    """Entries of log and live window for *batches* (lists of :class:`Written`), one ms apart."""
    log, live = [], []
    sequence = visible = version = 0
    ms = start_ms
    for batch in batches:
        ms += 1
        runs = []
        for frame in batch:
            kind = frame._replace(payload=b"")
            if runs and runs[-1][0] == kind and frame.mode != "durable":
                runs[-1][1].append(frame.payload)
            else:
                runs.append((kind, [frame.payload]))
        for kind, payloads in runs:
            if len(payloads) == 1:
                fields = [b"payload", payloads[0]]
            else:
                times = [(i - len(payloads) // 2) * 3 for i in range(len(payloads))]
                fields = [b"run", run_of(payloads, times)]
            if kind.mode == "summary":
                fields += [b"mode", b"summary"]
            if kind.frame_type != "token":
                fields += [b"frame_type", kind.frame_type.encode()]
            if kind.mode != "best_effort" and visible != sequence:
                fields += [b"prev", b"%d" % visible]
            if kind.correlation_id is not None:
                fields += [b"correlation_id", kind.correlation_id.encode()]
            if kind.encoding != "utf8":
                fields += [b"encoding", kind.encoding.encode()]
            if kind.mode == "summary":
                version += len(payloads)
                fields += [b"patch_kind", b"json-merge-patch", b"summary_version", b"%d" % version]
            sequence += len(payloads)
            if kind.mode != "best_effort":
                visible = sequence
            (log if kind.mode == "durable" else live).append([b"%d-%d" % (ms, sequence), fields])
    if end is not None:
        log.append(
            [b"%d-%d" % (ms, sequence + 1), [b"end", end.encode(), b"prev", b"%d" % visible]]
        )
    return log, live


def wanted_of(modes, exclude):
    return {n for n, mode in enumerate(modes, 1) if not exclude or mode != "best_effort"}


def check_told(items, after, modes, exclude, stored):
    """Frames and gaps tell of every frame behind the cursor that is wanted, once and in order."""
    last = len(modes)
    wanted = wanted_of(modes, exclude)
    if after > last:
        first, *items = items
        assert first == Gap(after + 1, last + 1, "cursor_ahead")
        assert items == []
        return
    position = after
    delivered = []
    for item in items:
        if isinstance(item, Gap):
            missing = set(range(item.first_missing, item.next_sequence)) & wanted
            assert missing, f"{item} covers nothing that is missing"
            assert item.first_missing > position
            if not exclude:
                assert item.first_missing == position + 1
            assert not missing & stored, f"{item} covers what is stored"
            position = item.next_sequence - 1
        else:
            assert item.sequence > position, "a repeat, or out of order"
            assert item.mode == modes[item.sequence - 1]
            skipped = set(range(position + 1, item.sequence)) & wanted
            assert not skipped, f"{skipped} were skipped in silence"
            position = item.sequence
            delivered.append(item.sequence)
    assert not set(range(position + 1, last + 1)) & wanted, (
        "the last frames were skipped in silence"
    )
    assert set(delivered) <= wanted
