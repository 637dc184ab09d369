"""What ``ff_fast._hot.writer`` must send, and what the server makes of it, in plain Python.

The oracle of the writer's tests, not part of the package: :func:`blocks` writes the arguments of a
batch the slow and obvious way; :class:`Server` follows the rules of ``lua/append.lua`` without a
server.
"""

from dataclasses import dataclass, field

import hiredis

from ff_fast.types import StreamMode

PUSH_BYTES = 8192
PUSH_FRAMES = 256
LETTERS_AFTER_FRAMES = {b"T": 1, b"P": 1, b"K": 1, b"E": 1, b"H": 1, b"C": 3, b"N": 3}
# What a field that is left out stands for.
RUN_BYTES = 65_536
USUAL = {b"frame_type": b"token", b"encoding": b"utf8", b"source": b"worker"}


@dataclass(frozen=True)
class Written:
    """One call of ``write``, with all its defaults filled in."""

    payload: bytes
    mode: StreamMode
    frame_type: str = "token"
    correlation_id: str | None = None
    encoding: str = "utf8"
    source: str = "worker"

    @property
    def visible(self) -> bool:
        return self.mode.wire != "best_effort"

    @property
    def shared(self) -> tuple:
        return self.mode, self.frame_type, self.correlation_id, self.encoding, self.source


@dataclass(frozen=True)
class Run:
    """Stands for the run of several frames: its times depend on the clock."""

    payloads: tuple[bytes, ...]


def optional_fields(written: Written) -> list[bytes]:
    fields = []
    if written.frame_type != "token":
        fields += [b"frame_type", written.frame_type.encode()]
    if written.correlation_id is not None:
        fields += [b"correlation_id", written.correlation_id.encode()]
    if written.encoding != "utf8":
        fields += [b"encoding", written.encoding.encode()]
    if written.source != "worker":
        fields += [b"source", written.source.encode()]
    return fields


def runs_of(
    batch: list[Written], first_sequence: int, visible: int
) -> list[tuple[list[Written], int | None]]:
    """Consecutive frames that share everything, each with the ``prev`` of its first frame."""
    runs: list[tuple[list[Written], int | None]] = []
    for sequence, written in enumerate(batch, first_sequence):
        previous = visible if written.visible and visible != sequence - 1 else None
        fits = runs and (
            written.mode.wire == "durable"
            or sum(len(one.payload) for one in [*runs[-1][0], written]) <= RUN_BYTES
        )
        if previous is None and fits and runs[-1][0][0].shared == written.shared:
            runs[-1][0].append(written)
        else:
            runs.append(([written], previous))
        if written.visible:
            visible = sequence
    return runs


def blocks(
    batch: list[Written], first_sequence: int, visible: int, summary_version: int
) -> list[bytes | Run]:
    """The frame blocks of a batch; *visible* and *summary_version* are those before it."""
    out: list[bytes | Run] = []
    for run, previous in runs_of(batch, first_sequence, visible):
        head = run[0]
        count = len(run)
        fields = optional_fields(head)
        prev = [] if previous is None else [b"prev", b"%d" % previous]
        if head.mode.wire == "durable":
            rest = run
            if prev:
                out += block(b"LX", 1, fields + prev)
                out.append(head.payload)
                rest = run[1:]
            if rest:
                out += block(b"LX", len(rest), fields)
                out += [one.payload for one in rest]
            continue
        value = head.payload if count == 1 else Run(tuple(one.payload for one in run))
        if head.mode.wire == "best_effort":
            out += block(b"VW", count, fields)
            out.append(value)
            continue
        kind = head.mode.patch_kind.wire.encode()
        fields += [b"mode", b"summary", b"patch_kind", kind]
        kind += b":"
        if head.mode.patch_kind.pointer is not None:
            fields += [b"pointer", head.mode.patch_kind.pointer.encode()]
            kind += head.mode.patch_kind.pointer.encode()
        fields += [*prev, b"summary_version", b"%d" % (summary_version + count)]
        out += block(b"SS", count, fields)
        form = b"patch" if count == 1 else b"run"
        out += [value, b"%b:%d:%d:%b" % (form, summary_version + count, count, kind)]
        out.append(b"%d" % summary_version)
        summary_version += count
    return out


def block(letters: bytes, count: int, fields: list[bytes]) -> list[bytes | Run]:
    """What stands before the payloads of a block; it has a letter without and one with fields."""
    plain, with_fields = letters[:1], letters[1:]
    if not fields:
        return [plain, b"%d" % count]
    return [with_fields, b"%d" % count, b"%d" % (len(fields) // 2), *fields]


@dataclass
class Stored:
    """A frame as the server has it."""

    sequence: int
    mode: bytes
    fields: dict[bytes, bytes]
    payload: bytes
    previous: int | None
    summary_version: int | None


@dataclass
class Request:
    """The arguments of one append, taken apart."""

    first_sequence: int
    frames: list[Stored] = field(default_factory=list)
    patches: list[tuple[bytes, bytes, int, int]] = field(default_factory=list)
    tail: dict[bytes, list[bytes]] = field(default_factory=dict)
    frame_arguments: list[bytes | Run] = field(default_factory=list)
    times: list[int] = field(default_factory=list)
    letters: set[bytes] = field(default_factory=set)
    # None where nothing is pushed; no blocks where the push has the id alone.
    push: list["Pushed"] | None = None
    # The ms under which the first frames were pushed before; None where they were not.
    pushed_ms: int | None = None
    # The ms of the first frames and of the others on a server that was lost.
    replayed_ms: tuple[int, int] | None = None
    # How many frames are lost.
    lost: int = 0
    first_block_frames: int = 0
    # For each block of frames, its values as they stand in the request.
    values: list[list[bytes]] = field(default_factory=list)

    @property
    def key_names(self) -> tuple[str, ...]:
        """The keys that the blocks need."""
        if self.letters & {b"S", b"C", b"N"}:
            return "head", "log", "live", "summary"
        log, live = self.letters & {b"L", b"X", b"K", b"G"}, self.letters & {b"V", b"W", b"T", b"P"}
        if log and live:
            return "head", "log", "live"
        return ("head", "live") if live else ("head", "log")


@dataclass
class Pushed:
    """A block of a push."""

    stream: bytes
    fields: dict[bytes, bytes]
    payloads: list[bytes]
    times: list[int]


def take_varint(data: bytes, at: int) -> tuple[int, int]:
    value = place = 0
    while True:
        value |= (data[at] & 127) << place
        if data[at] < 128:
            return value, at + 1
        at, place = at + 1, place + 7


def parse_run(run: bytes) -> tuple[list[bytes], list[int]]:
    """The payloads of a run, and when each was written, in ms after the ms of its entry."""
    count, at = take_varint(run, 0)
    numbers = []
    for _ in range(2 * count):
        number, at = take_varint(run, at)
        numbers.append(number)
    payloads = []
    for size in numbers[:count]:
        payloads.append(run[at : at + size])
        at += size
    assert at == len(run)
    return payloads, [zigzag // 2 ^ -(zigzag % 2) for zigzag in numbers[count:]]


def parse_push(body: bytes) -> list[Pushed]:
    """The blocks of a push."""
    found, at = [], 0

    def text() -> bytes:
        nonlocal at
        size, at = take_varint(body, at)
        at += size
        return body[at - size : at]

    while at < len(body):
        stream = body[at : at + 1]
        assert stream in (b"L", b"V")
        count, at = take_varint(body, at + 1)
        fields = {text(): text() for _ in range(count)}
        payloads, times = parse_run(text())
        found.append(Pushed(stream, fields, payloads, times))
    return found


def split_push(message: bytes) -> tuple[bytes, tuple[int, int], bytes]:
    """Kind, id and body of a message on the channel of an attempt."""
    head, _, body = message.partition(b" ")
    ms, sequence = head[1:].split(b"-")
    return head[:1], (int(ms), int(sequence)), body


def begin_of_push(argv: list[bytes], at: int) -> bytes:
    """What a push of the block of frames at *at* begins with: its stream and its fields."""
    pairs = []
    if argv[at] in (b"X", b"W", b"S"):
        pairs = argv[at + 3 : at + 3 + 2 * int(argv[at + 2])]
    begin = [b"L" if argv[at] in (b"L", b"X") else b"V", bytes([len(pairs) // 2])]
    for text in pairs:
        size = len(text)
        begin += [bytes([size] if size < 128 else [size % 128 + 128, size // 128]), text]
    return b"".join(begin)


def check_push(request: Request) -> None:
    """A push tells the last frames of its batch as their entries do."""
    if not request.push:
        return
    told = [
        (block.stream, block.fields, payload)
        for block in request.push
        for payload in block.payloads
    ]
    for frame, (stream, fields, payload) in zip(request.frames[-len(told) :], told, strict=True):
        assert payload == frame.payload
        assert stream == (b"L" if frame.mode == b"durable" else b"V")
        shared = dict(fields)
        assert shared.pop(b"mode", frame.mode) == frame.mode
        assert {*shared} - {b"prev", b"summary_version"} == {*frame.fields}
        assert {name: shared[name] for name in frame.fields} == frame.fields
    at = 0
    for block in request.push:
        frames = request.frames[len(request.frames) - len(told) + at :][: len(block.payloads)]
        at += len(frames)
        assert block.fields.get(b"prev") == (
            None if frames[0].previous is None else b"%d" % frames[0].previous
        )
        assert all(frame.previous is None for frame in frames[1:])
        version = frames[-1].summary_version
        assert block.fields.get(b"summary_version") == (
            None if version is None else b"%d" % version
        )
        if block.stream == b"L":
            assert not any(block.times)


def parse(argv: list[bytes]) -> Request:
    """Take a part apart, and check the grammar of ``lua/append.lua``."""
    head, argv = argv[0], argv[1:]
    assert int(head[:-1]) == len(argv)
    request = Request(int(argv[1]) + 1)
    push = argv[2]
    sequence = request.first_sequence - 1
    at = 3
    if argv[at : at + 1] == [b"I"]:
        request.pushed_ms = int(argv[at + 1])
        at += 2
        assert argv[at] in (b"V", b"W")
    elif argv[at : at + 1] == [b"R"]:
        request.replayed_ms = int(argv[at + 1]), int(argv[at + 2])
        at += 3
        assert push == b" "
    if argv[at : at + 1] == [b"G"]:
        assert request.replayed_ms
        request.lost = request.first_block_frames = int(argv[at + 1])
        request.letters.add(b"G")
        at += 2
        for _ in range(request.lost):
            sequence += 1
            request.frames.append(Stored(sequence, b"lost", {}, b"", None, None))
    while at < len(argv):
        letter = argv[at]
        request.letters.add(letter)
        if letter in LETTERS_AFTER_FRAMES:
            assert letter not in request.tail, "a retention block comes twice"
            size = LETTERS_AFTER_FRAMES[letter]
            request.tail[letter] = argv[at + 1 : at + 1 + size]
            at += 1 + size
            continue
        assert letter in (b"L", b"X", b"V", b"W", b"S")
        assert not request.tail, "frames stand before retention"
        start = at
        count = int(argv[at + 1])
        assert count >= 1
        request.first_block_frames = request.first_block_frames or count
        at += 2
        fields = {}
        if letter in (b"X", b"W", b"S"):
            end = at + 1 + 2 * int(argv[at])
            names, values = argv[at + 1 : end : 2], argv[at + 2 : end : 2]
            assert names, "a block without fields would do"
            at = end
            fields = dict(zip(names, values, strict=True))
            assert len(fields) == len(names), "a field comes twice"
            assert not fields.keys() & {b"payload", b"run", b"count"}
        for name, value in USUAL.items():
            assert fields.get(name) != value, "a field that could be left out"
        previous = fields.pop(b"prev", None)
        version = fields.pop(b"summary_version", None)
        mode = fields.pop(b"mode", None)
        if letter == b"S" or (letter == b"W" and mode):
            # A patch behind a loss is a frame, and no part of the summary that was lost.
            assert mode == b"summary"
            assert version is not None
        else:
            assert (mode, version) == (None, None)
            mode = b"durable" if letter in (b"L", b"X") else b"best_effort"
        request.frame_arguments += argv[start:at]
        if mode == b"durable":
            assert previous is None or count == 1
            payloads = tuple(argv[at : at + count])
            request.frame_arguments += payloads
            request.values.append(list(payloads))
            at += count
        else:
            value = argv[at]
            request.values.append([value])
            if count == 1:
                payloads = (value,)
                request.frame_arguments.append(value)
            else:
                found, times = parse_run(value)
                request.times += times
                payloads = tuple(found)
                request.frame_arguments.append(Run(payloads))
            at += 1
        assert len(payloads) == count
        for i, payload in enumerate(payloads):
            sequence += 1
            request.frames.append(
                Stored(
                    sequence,
                    mode,
                    fields,
                    payload,
                    int(previous) if previous is not None and i == 0 else None,
                    None if version is None else int(version) - count + 1 + i,
                )
            )
        if letter == b"S":
            request.patches.append((argv[at], value, count, int(argv[at + 1])))
            request.frame_arguments += argv[at : at + 2]
            at += 2
    # What has lost its part in the summary may name its key still.
    assert b"%d" % len(request.key_names) in (
        {head[-1:], b"2", b"3"} if head[-1:] == b"4" else {head[-1:]}
    )
    if push:
        body = push[1:]
        if push[:1] == b"+":
            # The fields and the values of a batch's one block cross the wire once.
            assert len(request.values) == 1
            body = begin_of_push(argv, 5 if request.pushed_ms else 3) + body
            body += b"".join(request.values[0])
        else:
            assert push[:1] == b" "
        assert len(body) <= PUSH_BYTES
        request.push = parse_push(body)
        check_push(request)
        told = sum(len(each.payloads) for each in request.push)
        whole = len(request.values) == 1 and told == len(request.frames)
        assert (push[:1] == b"+") == whole
    assert bool(push) == bool(request.frames) or request.pushed_ms
    return request


def called(message: bytes, attempts: dict[bytes, "Server"]) -> object:
    """The reply of servers, by the head key of their attempt, to one call of ``ff_append``."""
    reader = hiredis.Reader()
    reader.feed(message)
    name, function, count, *rest = reader.gets()
    assert (name, function) == (b"FCALL", b"ff_append")
    keys, argv = rest[: int(count)], rest[int(count) :]
    answers: list[object] = []
    seen: set[bytes] = set()
    while argv:
        size, key_count = int(argv[0][:-1]) + 1, int(argv[0][-1:])
        server = attempts[keys[0]]
        assert keys[0] not in seen
        seen.add(keys[0])
        answers.append(server.push(argv[:size]) if key_count == 1 else server.append(argv[:size]))
        keys, argv = keys[key_count:], argv[size:]
    assert not keys
    assert 1 <= len(answers) <= 128
    now = b"%d" % max(attempts[key].now_ms for key in seen)
    if len(answers) > 1:
        return [now, *answers]
    return b"%b %b" % (now, answers[0]) if isinstance(answers[0], bytes) else answers[0]


class Server:
    """One attempt on a server that knows no other writer."""

    def __init__(self) -> None:
        self.frames: list[Stored] = []
        self.summary: dict[bytes, bytes] = {}
        self.version = 0
        self.estimator: bytes | None = None
        # What H blocks have left in meta; None where the last frame is visible.
        self.told_visible: int | None = None
        self.now_ms = 1_700_000_000_000
        # The claim's, and then the ms of the id of each frame.
        self.id_ms = [self.now_ms]
        self.applied = 0
        # What was published of a frame, by its sequence: ms and payload, as often as it was.
        self.published: dict[int, list[tuple[int, bytes]]] = {}
        # The number of the opening of its writer; 0 where no writer is open.
        self.opening = 1

    def append(self, argv: list[bytes]) -> bytes | list[object]:
        """The reply to one append: a position, or a refusal."""
        self.now_ms += 1
        if not self.opening:
            return [0, b"writer_superseded", b"0"]
        request = parse(argv)
        first, total = request.first_sequence, len(request.frames)
        expected = len(self.frames) + 1
        last = first + total - 1
        if first > expected:
            return [0, b"sequence_gap", b"%d" % expected, b"%d" % first]
        skip = expected - first
        if skip and skip >= total:
            return self.position(last)
        assert skip == 0, "a batch that overlaps what is stored is not one that was sent before"
        compaction = request.tail.get(b"C")
        renewal = request.tail.get(b"N")
        version = self.version
        if renewal:
            assert not request.patches
            assert not compaction
            version = int(renewal[0])
            compaction = renewal
            self.summary = {
                b"version": renewal[0],
                b"last_updated_ms": b"%d" % self.now_ms,
                b"first_applied_ms": b"%d" % self.now_ms,
                b"cursor": b"0-0",
            }
        for name, value, count, base in request.patches:
            if base != version:
                return [0, b"summary_conflict", b"%d" % version, b"%d" % base]
            version += count
            self.summary[name] = value
        if compaction and int(compaction[0]) != version:
            return [0, b"summary_conflict", b"%d" % version, compaction[0]]
        self.version = version
        if request.patches:
            self.summary |= {
                b"version": b"%d" % version,
                b"last_updated_ms": b"%d" % self.now_ms,
                b"first_applied_ms": self.summary.get(b"first_applied_ms", b"%d" % self.now_ms),
                b"cursor": b"0-0",
            }
        if compaction:
            kept = (b"version", b"last_updated_ms", b"first_applied_ms", b"cursor")
            self.summary = {name: self.summary[name] for name in kept}
            self.summary |= {
                b"document": compaction[1],
                b"document_version": compaction[0],
                b"patch_kind": compaction[2],
            }
        if b"E" in request.tail:
            self.estimator = request.tail[b"E"][0]
        if b"H" in request.tail:
            (told,) = request.tail[b"H"]
            known = b"" if self.told_visible is None else b"%d" % self.told_visible
            assert told != known or request.lost or request.replayed_ms
            self.told_visible = int(told) if told else None
        self.frames += request.frames
        visible = [frame.sequence for frame in self.frames if frame.mode != b"best_effort"]
        self.check_told((visible or [0])[-1])
        ms = max(self.now_ms, self.id_ms[-1])
        fixed = request.replayed_ms or (request.pushed_ms, ms)
        if fixed[0] is not None:
            group = request.first_block_frames
            self.id_ms += [max(fixed[0], self.id_ms[-1])] * group
            total -= group
            ms = max(fixed[1], self.id_ms[-1])
        self.id_ms += [ms] * total
        self.applied += 1
        if request.push:
            self.publish(self.id_ms[-1], last, request.push)
        return self.position(last)

    def publish(self, ms: int, last: int, blocks: list[Pushed]) -> None:
        payloads = [payload for block in blocks for payload in block.payloads]
        for sequence, payload in enumerate(payloads, last - len(payloads) + 1):
            self.published.setdefault(sequence, []).append((ms, payload))

    def push(self, argv: list[bytes]) -> bytes | list[object]:
        """The answer to a part that stores nothing."""
        self.now_ms += 1
        if not self.opening:
            return [0, b"writer_superseded", b"0"]
        _, _, message = argv
        kind, (ms, last), body = split_push(message)
        assert kind == b"f"
        assert ms >= self.id_ms[-1]
        self.publish(ms, last, parse_push(body))
        return b"%d 0" % (self.now_ms + 30_000)

    def check_published(self) -> None:
        """Whatever readers were told of a frame is what is stored, under the same id."""
        for sequence, told in self.published.items():
            stored = self.id_ms[sequence], self.frames[sequence - 1].payload
            assert set(told) == {stored}, f"frame {sequence}"

    def position(self, sequence: int) -> bytes:
        """The id of a frame, the end of the lease, and that no cancel was requested."""
        return b"%d-%d %d 0" % (self.id_ms[sequence], sequence, self.now_ms + 30_000)

    def check_told(self, visible: int) -> None:
        """Meta tells the last visible frame: by a field of its own where it is not the last one."""
        assert self.told_visible in ((None, visible) if visible == len(self.frames) else (visible,))

    def check_visible_chain(self) -> None:
        """Every visible frame names the visible frame before it, where that is not its neighbour."""
        visible = 0
        lost = False
        for frame in self.frames:
            if frame.mode == b"best_effort":
                assert frame.previous is None
                continue
            if frame.mode == b"lost":
                visible, lost = frame.sequence, True
                continue
            named = frame.sequence - 1 if frame.previous is None else frame.previous
            assert named == visible or (lost and named < visible), (
                f"frame {frame.sequence} names {named} and not {visible}"
            )
            visible, lost = frame.sequence, False
