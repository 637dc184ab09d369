"""`ff_append` and `ff_open_writer` on real engines, called as any client may call them.

Every refusal must leave every key as it was, so each is compared byte for byte with what was there before.
"""

import itertools
import json

import pytest

import ff_fast
from ff_fast import errors, keys
from ff_fast._core import ops
from ff_fast.errors import MAX_INT, Outcome

from ..reference_frames import run_of, varint

MAX_PAYLOAD = 65_536
MAX_RUN = 2 << 20
WRITER = b"writer-1"
NOT_INTEGERS = [
    b"", b"0x10", b" 5 ", b"5\n", b"1e3", b"inf", b"nan", b"-1", b"+1", b"1.0", b"\xb2", b"1\x00",
    b"9007199254740992", b"99999999999999999999",
]  # fmt: skip


# -- what a batch is made of -------------------------------------------------------------------------


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
    ages = list(range(len(payloads) * 100, 0, -100))
    return payloads[0] if len(payloads) == 1 else run_of(payloads, ages)


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


class Stream:
    """One attempt, and the calls that its worker could make."""

    def __init__(self, raw, backend, lane, *, retry=None, **claim):
        self.raw = raw
        self.backend = backend
        self.lane = lane
        self.eid = backend.create_execution(
            lane=lane, payload=b"in", tags={"a.b": "c"}, retry=retry
        )
        self.handle = self.claim(**claim)
        attempt = ops.Attempt.of(self.handle)
        self.fence = attempt.fence
        self.keys = attempt.stream_keys
        self.core = keys.core(self.eid)
        self.meta, self.log, self.live, self.summary = self.keys

    def claim(self, **options):
        return self.backend.claim(lane=self.lane, worker_id="w", worker_instance_id="i", **options)

    def child(self):
        return self.backend.create_execution(lane=f"{self.lane[:50]}-child", parent_id=self.eid)

    def call(self, function, keys, *args):
        return self.raw.fcall(function, len(keys), *keys, *args)

    def writer_id(self, writer=WRITER, fence=None):
        return b":".join((*(fence or self.fence), writer))

    def open(self, writer=WRITER, fence=None):
        names = (self.core, self.meta, self.summary)
        return self.call("ff_open_writer", names, self.writer_id(writer, fence))

    def append(self, *blocks, first=1, previous=None, fence=None, writer=WRITER, names=None):
        """The answer: (ms, sequence) of the position, or the error that the answer stands for.

        *names* are those of the keys that the call is told of; all of them by default.
        """
        previous = number(first - 1) if previous is None else previous
        args = [part for block in blocks for part in block]
        writer_id = self.writer_id(writer, fence)
        used = self.keys if names is None else [getattr(self, name) for name in names.split()]
        before = server_ms(self.raw)
        reply = self.call("ff_append", used, writer_id, previous, *args)
        if isinstance(reply, list):
            assert reply[0] == 0
            return errors.for_code(reply[1].decode(), reply[2:])
        identity, now, expires, cancel = reply.split(b" ")
        ms, sequence = map(int, identity.split(b"-"))
        assert before <= int(now) <= server_ms(self.raw)
        assert int(now) < int(expires) == int(self.raw.hget(self.meta, "lease_expires_at"))
        assert cancel in (b"0", b"1")
        return ms, sequence

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
        stored_ms, stored_sequence = map(int, self.raw.hget(self.meta, "last_id").split(b"-"))
        ms = stored_ms if ms is None else ms
        sequence = stored_sequence if sequence is None else sequence
        self.raw.hset(self.meta, "last_id", f"{ms}-{sequence}")


@pytest.fixture(scope="module")
def backends():
    opened = {}
    yield opened
    for backend in opened.values():
        backend.close()


@pytest.fixture
def backend(engine, backends):
    if engine.url not in backends:
        backends[engine.url] = ff_fast.ValkeyBackend.connect(engine.url)
    return backends[engine.url]


@pytest.fixture
def unopened(raw, backend, lane):
    return Stream(raw, backend, lane)


@pytest.fixture
def stream(unopened):
    unopened.open()
    return unopened


def server_ms(raw):
    seconds, micros = raw.time()
    return seconds * 1000 + micros // 1000


@pytest.fixture
def next_ms(raw, wait_until):
    """Wait until the server's clock shows another millisecond."""

    def wait():
        now = server_ms(raw)
        wait_until(lambda: server_ms(raw) > now)

    return wait


# -- refusals ----------------------------------------------------------------------------------------


def _gone(stream):
    stream.raw.delete(*stream.everything())


def _other_lease(stream, call):
    call["fence"] = (stream.fence[0], b"00000000-0000-4000-8000-000000000000", stream.fence[2])


def _suspended(stream):
    stream.raw.hset(stream.core, "state", "suspended")
    stream.raw.hdel(stream.meta, "writer")


def _closed(stream):
    stream.raw.hset(stream.meta, "closed_at", "1")
    stream.raw.hdel(stream.meta, "writer")


def _lapsed(stream):
    stream.raw.hset(stream.meta, "lease_expires_at", "1")


def _superseded(stream):
    stream.open(b"writer-2")


REFUSALS = [
    ("execution_not_found", _gone, None, errors.ExecutionNotFound),
    ("stale_owner", None, _other_lease, errors.StaleOwner),
    ("suspended", _suspended, None, errors.ExecutionSuspended),
    ("stream_closed", _closed, None, errors.StreamClosed),
    ("lease_expired", _lapsed, None, errors.LeaseExpired),
    ("writer_superseded", _superseded, None, errors.WriterSuperseded),
    ("payload_too_large", None, lambda _, call: call.update(b=log(bytes(65_537))), errors.PayloadTooLarge),
    ("invalid_input", None, lambda _, call: call.setdefault("b", [b"Z"]), errors.InvalidInput),
    ("sequence_gap", None, lambda _, call: call.update(first=9), errors.SequenceGap),
    ("summary_conflict", None, lambda _, call: call.setdefault("b", patches(b"{}", base=7)), errors.SummaryConflict),
]  # fmt: skip
CODES = [code for code, *_ in REFUSALS]


def test_every_error_of_append_has_its_refusal_here():
    from ff_fast import _library

    assert sorted(_library.headers()["ff_append"].errors) == sorted(CODES)


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


@pytest.mark.parametrize("refusal", REFUSALS, ids=CODES)
def test_a_refusal_changes_nothing(stream, refusal):
    block, call = spoil(stream, [refusal])
    error = stream.refused(refusal[0], log(b"good"), block, **call)
    assert type(error) is refusal[3]


@pytest.mark.parametrize("at", range(len(REFUSALS)), ids=CODES)
def test_of_several_reasons_the_first_is_told(stream, at):
    block, call = spoil(stream, REFUSALS[at:])
    stream.refused(CODES[at], log(b"good"), block, **call)


def test_a_fence_that_differs_in_any_part_is_stale(stream, subtests):
    parts = enumerate(("attempt", "lease id", "epoch"))
    for (at, name), value in itertools.product(parts, (b"7", b"", b"0x0", b"00")):
        fence = list(stream.fence)
        fence[at] = value
        # A lease id is any text; what is no fence at all is told apart.
        malformed = value == b"" or (value == b"0x0" and name != "lease id")
        code = "invalid_input" if malformed else "stale_owner"
        with subtests.test(name, value=value):
            stream.refused(code, log(b"x"), fence=fence)
            assert stream.open(b"writer-2", fence)[:2] == [0, code.encode()]


def test_a_writer_id_is_a_fence_and_a_text(stream):
    before = stream.everything()
    for writer in (b"", b"writer", b":::", b"0:lease:1", b"0:lease:1:", b"0:a:b:c:d"):
        for function, names, args in (
            ("ff_append", stream.keys, (writer, b"0", *log(b"x"))),
            ("ff_open_writer", (stream.core, stream.meta, stream.summary), (writer,)),
        ):
            reply = stream.call(function, names, *args)
            assert reply == [0, b"invalid_input", b"writer"], writer
    assert stream.everything() == before


def test_nobody_appends_under_a_part_of_the_writer_id(stream):
    whole = stream.writer_id()
    for writer in (whole[:-1], whole + b"x", whole + b"\x00", whole.upper()):
        reply = stream.call("ff_append", stream.keys, writer, b"0", *log(b"x"))
        assert reply in ([0, b"writer_superseded"], [0, b"stale_owner"])


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_a_stream_is_closed_by_the_end_of_its_execution(stream, end):
    stream.append(log(b"x"))
    if end == "complete":
        stream.backend.complete(stream.handle, b"done")
    else:
        stream.backend.fail(stream.handle, "broken")
    stream.refused("stream_closed", log(b"y"), first=2)
    # Even what is stored is not acknowledged any more: the answer of the end is the last word.
    stream.refused("stream_closed", log(b"x"))


def test_a_lease_lapses_by_the_servers_clock(raw, backend, lane, wait_until):
    stream = Stream(raw, backend, lane, lease_ttl_ms=300)
    stream.open()
    assert stream.append(log(b"x"))[1] == 1
    expires_at = int(raw.hget(stream.meta, "lease_expires_at"))
    wait_until(lambda: server_ms(raw) >= expires_at)
    stream.refused("lease_expired", log(b"y"), first=2)


@pytest.mark.parametrize("expires_at", [b"1", b"99", b"9" * 12, b"1000000000000", b"0" * 12 + b"9"])
def test_a_lease_that_ended_long_ago_has_ended(stream, expires_at):
    """A time of fewer digits is an earlier one, although its text may be behind today's."""
    stream.append(log(b"1"))
    stream.raw.hset(stream.meta, "lease_expires_at", expires_at)
    stream.refused("lease_expired", log(b"2"), first=2)
    stream.refused("lease_expired", live(b"2"), first=2, names="meta live")
    stream.refused("lease_expired", log(b"1"))
    stream.refused("lease_expired", [b"K", b"1"], first=2)
    assert stream.open(b"writer-2") == [0, b"lease_expired"]


@pytest.mark.parametrize("expires_at", [b"9999999999999", b"10000000000000", b"100000000000000"])
def test_a_lease_that_ends_in_ages_has_not_ended(stream, expires_at):
    """A time of more digits is a later one, although its text may be before today's."""
    stream.raw.hset(stream.meta, "lease_expires_at", expires_at)
    answer = stream.append(log(b"1"))
    assert stream.repeated(log(b"1")) == answer
    assert stream.append(live(b"2"), first=2, names="meta live")[1] == 2
    assert stream.payloads() == [b"1", b"2"]
    left = stream.backend.describe_stream(stream.eid, 0).lease_left * 1000
    assert left == pytest.approx(int(expires_at) - server_ms(stream.raw), abs=60_000)


def test_a_gap_says_what_was_expected(stream):
    stream.append(log(b"1", b"2"))
    error = stream.refused("sequence_gap", log(b"x"), first=4)
    assert (error.expected, error.got) == (3, 4)
    error = stream.refused("sequence_gap", first=MAX_INT)
    assert (error.expected, error.got) == (3, MAX_INT)


def test_the_sequence_of_the_frame_before_is_a_whole_number(stream, subtests):
    for previous in NOT_INTEGERS:
        with subtests.test(before="no frame", previous=previous):
            stream.refused("invalid_input", log(b"x"), previous=previous)
    stream.append(log(*[b"x"] * 1024))
    for previous in NOT_INTEGERS:
        with subtests.test(before="1,024 frames", previous=previous):
            stream.refused("invalid_input", log(b"x"), previous=previous)
            stream.refused("invalid_input", previous=previous)


@pytest.mark.parametrize(
    "block, limit",
    [
        (log(b"a", bytes(MAX_PAYLOAD + 1)), MAX_PAYLOAD),
        (live(bytes(MAX_PAYLOAD + 1)), MAX_PAYLOAD),
        (patches(bytes(MAX_PAYLOAD + 1), base=0), MAX_PAYLOAD),
        (live(bytes(MAX_RUN // 2), bytes(MAX_RUN // 2)), MAX_RUN),
    ],
    ids=["log", "live", "patch", "run"],
)
def test_a_payload_that_is_too_large(stream, block, limit):
    error = stream.refused("payload_too_large", log(b"good"), block)
    assert error.limit == limit
    assert error.size > limit


def test_the_largest_payloads_are_stored(stream):
    data = bytes(range(256)) * 256
    stream.append(log(data), live(data), live(data, data))
    assert stream.payloads() == [data] * 4


def replaced(block, at, value):
    return [*block[:at], value, *block[at + 1 :]]


ONE_LOG, ONE_LIVE = log(b"p"), live(b"p")
ONE_EXTRA, ONE_WIDE = log(b"p", extras=[b"f", b"v"]), live(b"p", fields=[b"f", b"v"])
ONE_PATCH = patches(b"{}", base=0)
TWO_PATCHES = [*patches(b"{}", base=0), *patches(b"{}", base=1)]
COUNTS = [*NOT_INTEGERS, b"0"]
EACH_BLOCK = {
    "log": ONE_LOG, "live": ONE_LIVE, "extras": ONE_EXTRA, "wide": ONE_WIDE, "patch": ONE_PATCH,
}  # fmt: skip
WITH_FIELDS = {"extras": ONE_EXTRA, "wide": ONE_WIDE, "patch": ONE_PATCH}
MALFORMED = {
    "unknown letter": [b"Z"],
    "lower case": replaced(ONE_LOG, 0, b"l"),
    "empty letter": replaced(ONE_LOG, 0, b""),
    **{f"{name} cut {n}": block[:n] for name, block in EACH_BLOCK.items() for n in range(1, len(block))},
    **{f"{name} count {count}": replaced(block, 1, count) for name, block in EACH_BLOCK.items() for count in COUNTS},
    "log count of more": replaced(ONE_LOG, 1, b"2"),
    "extras count of more": replaced(ONE_EXTRA, 1, b"2"),
    **{f"{name} fields {count}": replaced(block, 2, count) for name, block in WITH_FIELDS.items() for count in NOT_INTEGERS},
    "log fields of more": replaced(ONE_EXTRA, 2, b"2"),
    "live fields of more": replaced(ONE_WIDE, 2, b"2"),
    "patch fields of more": replaced(ONE_PATCH, 2, b"4"),
    "log 33 fields": log(b"p", extras=[b"f", b"v"] * 33),
    "live 33 fields": live(b"p", fields=[b"f", b"v"] * 33),
    "patch 33 fields": patches(b"p", base=0, fields=[b"f", b"v"] * 30),
    **{f"patch base {base}": [*ONE_PATCH[:-1], base] for base in NOT_INTEGERS},
    "patches that do not follow": [*TWO_PATCHES[:-1], b"2"],
    **{f"document version {version}": [b"C", version, b"{}", b"k"] for version in COUNTS},
    "document cut": [b"C", b"1", b"{}"],
    "document beside its patches": [*TWO_PATCHES, b"C", b"3", b"{}", b"k"],
    "document before its patches": [b"C", b"2", b"{}", b"k", *TWO_PATCHES],
    **{f"{letter} cut": [letter.encode()] for letter in "TPKEH"},
    **{f"H {sequence}": [b"H", sequence] for sequence in NOT_INTEGERS if sequence},
    **{f"P {ttl}": [b"P", ttl] for ttl in (*COUNTS, b"0.4")},
    **{f"K {maxlen}": [b"K", maxlen] for maxlen in (*COUNTS, b"0.4")},
    **{
        f"T {oldest}": [b"T", oldest]
        for oldest in (b"", b"5", b"-", b"5-", b"-5", b"5-5-5", b"x-1", b"1-x", b" 1-1", b"9" * 20, b"9" * 20 + b"-1", b"(1-1",
                       b"text", b"-1", b"1.5", b"nan", b"0.4")
    },
    **{f"E {state}": [b"E", state] for state in (b"", b"nan", b"inf", b"-1", b"1e9", b"1" * 40)},
    "too many frames": replaced(ONE_LIVE, 1, b"1025"),
}  # fmt: skip


def test_a_malformed_block_is_refused_whole(stream, subtests):
    stream.append(log(b"1"))
    for name, block in MALFORMED.items():
        with subtests.test(name):
            stream.refused("invalid_input", log(b"good"), live(b"good"), block, first=2)


@pytest.mark.parametrize("given", range(2))
def test_missing_arguments_are_refused(stream, given):
    args = [stream.writer_id(), b"0"][:given]
    before = stream.everything()
    reply = stream.call("ff_append", stream.keys, *args)
    assert reply == [0, b"invalid_input", [b"writer", b"previous_sequence"][given]]
    assert stream.everything() == before
    if given == 0:
        names = (stream.core, stream.meta, stream.summary)
        assert stream.call("ff_open_writer", names) == [0, b"invalid_input", b"writer"]


# Blocks, and the keys that a batch needs whose blocks they are.
NEEDED_KEYS = {
    "none": ([], "meta log"),
    "L": (log(b"x"), "meta log"),
    "X": (log(b"x", extras=[b"f", b"v"]), "meta log"),
    "K": ([b"K", b"10"], "meta log"),
    "E": ([b"E", b"1"], "meta log"),
    "H": ([b"H", b"0"], "meta log"),
    "V": (live(b"x"), "meta live"),
    "V run": (live(b"x", b"y"), "meta live"),
    "W": (live(b"x", fields=[b"f", b"v"]), "meta live"),
    "T": ([b"T", b"1-1"], "meta live"),
    "P": ([b"P", b"60000"], "meta live"),
    "S": (patches(b"{}", base=0), "meta log live summary"),
    "C": ([b"C", b"1", b"{}", b"json-merge-patch:"], "meta log live summary"),
}
OF_THE_LOG, OF_THE_WINDOW = ("L", "X", "K"), ("V", "V run", "W", "T", "P")


def fewer_than(names):
    """The first keys of *names*, for each count that is too small."""
    names = names.split()
    return [" ".join(names[:count]) for count in range(len(names))]


def first_for(stream, block):
    """A document needs a version, and so a frame before it."""
    if block[:1] != [b"C"]:
        return 1
    stream.append(patches(b"{}", base=0))
    return 2


@pytest.mark.parametrize("name", NEEDED_KEYS)
def test_a_batch_names_the_keys_that_it_needs(stream, name):
    block, names = NEEDED_KEYS[name]
    first = first_for(stream, block)
    for fewer in fewer_than(names):
        stream.refused("invalid_input", block, first=first, names=fewer)
    frames = {"L": 1, "X": 1, "V": 1, "V run": 2, "W": 1, "S": 1}.get(name, 0)
    answer = stream.append(block, first=first, names=names)
    assert answer[1] == len(stream.frames()) == first - 1 + frames
    # A repeat is told by the same keys.
    if frames:
        assert stream.repeated(block, first=first, names=names) == answer


@pytest.mark.parametrize("with_log", [False, True], ids=["window", "log"])
@pytest.mark.parametrize("name", NEEDED_KEYS)
def test_a_batch_for_both_streams_names_both(stream, name, with_log):
    block, names = NEEDED_KEYS[name]
    good = log(b"good") if with_log else live(b"good")
    if name in (OF_THE_WINDOW if with_log else OF_THE_LOG):
        names = "meta log live"
        # Whichever of the two it names.
        stream.refused("invalid_input", good, block, names="meta live")
        stream.refused("invalid_input", block, good, names="meta live")
        stream.refused("invalid_input", block, good, names="meta log")
    elif not with_log and names == "meta log":
        names = "meta live"
    first = first_for(stream, block)
    for fewer in fewer_than(names):
        error = stream.refused("invalid_input", good, block, first=first, names=fewer)
        assert "keys" in str(error)
    ms, sequence = stream.append(good, block, first=first, names=names)
    assert stream.repeated(good, block, first=first, names=names) == (ms, sequence)
    mode = "durable" if with_log else "best_effort"
    assert stream.frames()[first - 1].payload == b"good"
    assert stream.frames()[first - 1].mode == mode
    assert sequence == len(stream.frames())


def test_a_word_on_the_whole_batch_goes_to_either_stream(stream):
    about = [[b"H", b"0"], [b"E", b"3"]]
    stream.append(live(b"1"), *about, names="meta live")
    assert (visible(stream), stream.raw.hget(stream.meta, "estimator")) == (b"0", b"3")
    stream.append(log(b"2"), [b"H", b""], [b"E", b"4"], first=2, names="meta log")
    assert (visible(stream), stream.raw.hget(stream.meta, "estimator")) == (None, b"4")
    assert stream.raw.exists(stream.summary) == 0


@pytest.mark.parametrize("refusal", REFUSALS[:6], ids=CODES[:6])
def test_a_refusal_needs_no_more_keys_than_the_batch(stream, refusal):
    """The core, which says why, is spelled from the key of meta."""
    _, call = spoil(stream, [refusal])
    for names in ("meta log", "meta live", "meta log live"):
        frame = live(b"x") if names == "meta live" else log(b"x")
        error = stream.refused(refusal[0], frame, names=names, **call)
        assert type(error) is refusal[3], names


def test_a_repeat_is_looked_for_in_both_streams(stream, next_ms):
    """Which one has the frame is not known from its number; both are spelled from the key of meta."""
    first = stream.append(log(b"1"), names="meta log")
    next_ms()
    second = stream.append(live(b"2", b"3"), first=2, names="meta live")
    for names, block in (("meta log", log), ("meta live", live)):
        assert stream.repeated(block(b"1"), names=names) == first
        assert stream.repeated(block(b"1", b"2"), names=names) == (second[0], 2)
        assert stream.repeated(block(b"3"), first=3, names=names) == second


@pytest.mark.parametrize("meta", [b"", b"meta", b"ff:stream:x:meta", b"ff:stream:x:0:metadata"])
def test_no_key_of_meta_is_no_execution(stream, meta):
    before = stream.everything()
    reply = stream.call("ff_append", (meta, stream.log), stream.writer_id(), b"0", *log(b"x"))
    assert reply == [0, b"execution_not_found"]
    assert stream.everything() == before
    assert stream.raw.exists(meta) == 0


def test_a_batch_without_frames_does_what_it_says(stream):
    stream.append(live(b"1"))
    stream.append([b"E", b"12.5", b"P", b"60000", b"K", b"10", b"T", b"5-5"], first=2)
    assert stream.raw.hget(stream.meta, "estimator") == b"12.5"
    assert 0 < stream.raw.pttl(stream.live) <= 60_000
    assert stream.raw.pttl(stream.log) < 0
    assert stream.append(log(b"2"), first=2)[1] == 2


# -- blocks ------------------------------------------------------------------------------------------


def entries(stream, key):
    return [(identity, list(fields.items())) for identity, fields in stream.raw.xrange(key)]


def test_extra_fields_stand_on_every_frame_of_their_block(stream):
    extras = [b"frame_type", b"event", b"correlation_id", b"c-1", b"encoding", b"binary"]
    ms, sequence = stream.append(log(b"1"), log(b"2", b"3", extras=extras), log(b"4"))
    assert sequence == 4
    named = [(b"frame_type", b"event"), (b"correlation_id", b"c-1"), (b"encoding", b"binary")]
    assert entries(stream, stream.log) == [
        (b"%d-1" % ms, [(b"payload", b"1")]),
        (b"%d-2" % ms, [(b"payload", b"2"), *named]),
        (b"%d-3" % ms, [(b"payload", b"3"), *named]),
        (b"%d-4" % ms, [(b"payload", b"4")]),
    ]
    assert [frame.correlation_id for frame in stream.frames()] == [None, "c-1", "c-1", None]
    assert [frame.frame_type for frame in stream.frames()] == ["token", "event", "event", "token"]


def test_extra_fields_stand_on_an_entry_of_the_window(stream):
    named = [b"frame_type", b"event", b"source", b"tool"]
    ms, sequence = stream.append(live(b"1", fields=named), live(b"2", b"3", fields=named))
    assert sequence == 3
    pairs = [(b"frame_type", b"event"), (b"source", b"tool")]
    assert entries(stream, stream.live) == [
        (b"%d-1" % ms, [(b"payload", b"1"), *pairs]),
        (b"%d-3" % ms, [(b"run", run_value(b"2", b"3")), *pairs]),
    ]
    assert [(f.frame_type, f.source) for f in stream.frames()] == [("event", "tool")] * 3


def test_an_entry_has_only_what_is_unusual(stream):
    ms, _ = stream.append(
        log(b"1", b"2"), live(b"3"), live(b"4", b"5"), patches(b"{}", base=0),
        patches(b"{}", b"{}", base=1),
    )  # fmt: skip
    assert entries(stream, stream.log) == [
        (b"%d-1" % ms, [(b"payload", b"1")]),
        (b"%d-2" % ms, [(b"payload", b"2")]),
    ]
    kind = [(b"mode", b"summary"), (b"patch_kind", b"json-merge-patch")]
    assert entries(stream, stream.live) == [
        (b"%d-3" % ms, [(b"payload", b"3")]),
        (b"%d-5" % ms, [(b"run", run_value(b"4", b"5"))]),
        (b"%d-6" % ms, [(b"payload", b"{}"), *kind, (b"summary_version", b"1")]),
        (b"%d-8" % ms, [(b"run", run_value(b"{}", b"{}")), *kind, (b"summary_version", b"3")]),
    ]
    modes = ["durable"] * 2 + ["best_effort"] * 3 + ["summary"] * 3
    assert [(f.mode, f.frame_type) for f in stream.frames()] == [(mode, "token") for mode in modes]
    assert stream.raw.hgetall(stream.meta).keys() == {
        b"created_at", b"last_id", b"lease_expires_at", b"writer", b"writer_base",
    }  # fmt: skip


@pytest.mark.parametrize("letter", [b"X", b"W"])
def test_a_block_of_no_extra_fields_is_a_plain_one(stream, letter):
    if letter == b"X":
        ms, _ = stream.append([b"X", b"2", b"0", b"1", b"2"])
        assert entries(stream, stream.log) == [
            (b"%d-%d" % (ms, i), [(b"payload", b"%d" % i)]) for i in (1, 2)
        ]
    else:
        run = run_value(b"1", b"2")
        ms, _ = stream.append([b"W", b"2", b"0", run])
        assert entries(stream, stream.live) == [(b"%d-2" % ms, [(b"run", run)])]


@pytest.mark.parametrize("block, key", [(log, "log"), (live, "live")])
def test_a_frame_has_up_to_32_extra_fields(stream, block, key):
    fields = [part for i in range(32) for part in (b"f%d" % i, b"v")]
    stream.append(block(b"p", **{"extras" if block is log else "fields": fields}))
    ((_, found),) = entries(stream, getattr(stream, key))
    assert found == [(b"payload", b"p"), *((b"f%d" % i, b"v") for i in range(32))]


def test_too_large_a_payload_beside_extra_fields(stream):
    block = log(b"a", bytes(MAX_PAYLOAD + 1), extras=[b"f", b"v"])
    error = stream.refused("payload_too_large", block)
    assert (error.limit, error.size) == (MAX_PAYLOAD, MAX_PAYLOAD + 1)
    # Fields are no payload, so an extra one is not held to its limit.
    stream.append(log(bytes(MAX_PAYLOAD), extras=[b"f", bytes(MAX_PAYLOAD + 1)]))


@pytest.mark.parametrize("stored", range(1, 5))
def test_of_an_overlap_extra_fields_stay_with_their_frames(stream, stored):
    payloads = [b"1", b"2", b"3"]
    extras = [b"f", b"v"]
    stream.append(log(*payloads[:stored], extras=extras), *([log(b"4")] if stored > 3 else []))
    stream.append(log(*payloads, extras=extras), log(b"4", b"5"), names="meta log")
    found = [dict(fields) for _, fields in entries(stream, stream.log)]
    assert [fields[b"payload"] for fields in found] == [b"1", b"2", b"3", b"4", b"5"]
    assert [fields.get(b"f") for fields in found] == [b"v", b"v", b"v", None, None]


def visible(stream):
    return stream.raw.hget(stream.meta, "visible_sequence")


def test_the_last_visible_frame_is_kept_while_best_effort_frames_are_last(stream):
    assert visible(stream) is None
    stream.append(log(b"1"))
    assert visible(stream) is None
    stream.append(live(b"2"), [b"H", b"1"], first=2)
    assert visible(stream) == b"1"
    # Sent when it changes: what does not name it leaves it.
    stream.append(live(b"3"), first=3)
    assert visible(stream) == b"1"
    stream.append(log(b"4", extras=[b"prev", b"1"]), [b"H", b""], first=4)
    assert visible(stream) is None
    assert stream.raw.hexists(stream.meta, "visible_sequence") is False
    stream.append([b"H", b""], first=5)
    assert visible(stream) is None


def test_no_visible_frame_at_all(stream):
    stream.append(live(b"1", b"2"), [b"H", b"0"])
    assert visible(stream) == b"0"
    assert stream.open(b"writer-2")[3] == b"0"
    page = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert (page, page.gaps) == ((), ())


def test_of_several_the_last_word_on_visibility_counts(stream):
    stream.append(live(b"1"), [b"H", b"0"], log(b"2"), [b"H", b""], live(b"3"), [b"H", b"2"])
    assert visible(stream) == b"2"


@pytest.mark.parametrize("last, prev", [([], b"2"), ([live(b"3"), [b"H", b"2"]], b"2")])
def test_the_end_names_the_last_visible_frame(stream, last, prev):
    stream.append(log(b"1", b"2"), *last)
    stream.backend.complete(stream.handle)
    assert stream.raw.xrevrange(stream.log, count=1)[0][1] == {
        b"end": b"attempt_success",
        b"prev": prev,
    }
    page = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert (len(page), page.gaps, page.end_reason) == (2, (), "attempt_success")


def test_a_repeated_word_on_visibility_is_not_taken_back(stream):
    first = (live(b"1"), [b"H", b"0"])
    stream.append(*first)
    stream.append(log(b"2", extras=[b"prev", b"0"]), [b"H", b""], first=2)
    stream.repeated(*first)
    assert visible(stream) is None


# -- sequences ---------------------------------------------------------------------------------------


def test_frames_are_numbered_densely_over_both_streams(stream, next_ms):
    assert stream.append(log(b"1", b"2"), live(b"3", b"4"), patches(b"{}", base=0))[1] == 5
    next_ms()
    assert stream.append(live(b"6"), log(b"7"), first=6)[1] == 7
    assert stream.payloads() == [b"1", b"2", b"3", b"4", b"{}", b"6", b"7"]
    ids = [frame.stream_id for frame in stream.frames()]
    assert [int(each.split("-")[1]) for each in ids] == list(range(1, 8))
    assert sorted(ids, key=lambda each: int(each.split("-")[0])) == ids


def test_the_milliseconds_of_ids_never_go_back(stream):
    ahead = server_ms(stream.raw) + 100_000
    stream.set_last(ms=ahead)
    assert stream.append(log(b"1"), live(b"2")) == (ahead, 2)
    assert stream.append(log(b"3"), first=3) == (ahead, 3)
    assert stream.payloads() == [b"1", b"2", b"3"]


def test_a_repeated_batch_is_a_success_with_what_is_stored(stream, next_ms):
    batches = [
        (1, log(b"1", b"2")),
        (3, live(b"3", b"4", b"5")),
        (6, live(b"6")),
        (7, patches(b'{"a":1}', b'{"b":2}', base=0)),
        (9, log(b"9")),
    ]
    answers = []
    for first, block in batches:
        answers.append(stream.append(block, first=first))
        next_ms()
    assert len({ms for ms, _ in answers}) == len(answers)
    for (first, block), answer in zip(batches, answers, strict=True):
        assert stream.repeated(block, first=first) == answer
    # Repeats that end inside a run stand under the id that readers have seen.
    assert stream.repeated(live(b"3", b"4"), first=3) == (answers[1][0], 4)
    assert stream.repeated(live(b"4"), first=4) == (answers[1][0], 4)
    assert stream.repeated(patches(b'{"a":1}', base=0), first=7) == (answers[3][0], 7)
    # And across batches.
    assert stream.repeated(log(*[b"x"] * 8), first=1) == (answers[3][0], 8)
    summary = stream.backend.read_summary(stream.eid)
    assert (json.loads(summary.document_json), summary.version) == ({"a": 1, "b": 2}, 2)


def test_an_old_frame_is_found_behind_many_others(stream, next_ms):
    first = stream.append(log(b"1"))
    next_ms()
    for at in range(2, 502):
        stream.append(live(b"x") if at % 2 else log(b"x"), first=at)
    assert stream.repeated(log(b"1")) == first


def test_a_duplicate_of_a_trimmed_frame_is_a_success_without_a_time(stream):
    stream.append(live(b"1"))
    stream.append(log(b"2"), first=2)
    stream.raw.delete(stream.live)
    assert stream.repeated(live(b"1")) == (0, 1)


BATCH = [
    ("log", b"1"), ("log", b"2"),
    ("live", b"3"), ("live", b"4"), ("live", b"5" * 200),
    ("patch", b'{"n":6}'), ("patch", b'{"l":{"x":7}}'), ("patch", b'{"n":8}'), ("patch", b'{"l":{"y":9}}'),
    ("log", b"10"), ("live", b"11"),
]  # fmt: skip


def batch_of(frames, before=0):
    """The blocks of consecutive frames of BATCH; *before* of them are in earlier batches."""
    blocks = []
    groups = []
    for kind, payload in frames:
        if groups and groups[-1][0] == kind:
            groups[-1][1].append(payload)
        else:
            groups.append((kind, [payload]))
    kinds = [kind for kind, _ in BATCH]
    at = before
    for kind, payloads in groups:
        prev = (b"prev", number(visible_at(at))) if at and kinds[at - 1] == "live" else ()
        if kind == "log":
            blocks.append(log(*payloads, extras=prev))
        elif kind == "live":
            blocks.append(live(*payloads))
        else:
            blocks.append(patches(*payloads, base=kinds[:at].count("patch"), fields=prev))
        at += len(payloads)
    return [*blocks, [b"H", number(visible_at(at)) if kinds[at - 1] == "live" else b""]]


def visible_at(count):
    """The last visible one of the first frames of BATCH."""
    return max((i + 1 for i in range(count) if BATCH[i][0] != "live"), default=0)


def shown(frames):
    return [(f.sequence, f.payload, f.mode, f.summary_version) for f in frames]


@pytest.mark.parametrize("stored", range(1, len(BATCH)))
def test_of_an_overlap_only_the_suffix_is_appended(unopened, raw, backend, stored):
    whole = Stream(raw, backend, f"whole-{unopened.eid[-12:]}")
    whole.open()
    assert whole.append(*batch_of(BATCH))[1] == len(BATCH)
    stream = unopened
    stream.open()
    stream.append(*batch_of(BATCH[:stored]))
    assert stream.append(*batch_of(BATCH))[1] == len(BATCH)
    assert shown(stream.frames()) == shown(whole.frames())
    assert stream.payloads() == [payload for _, payload in BATCH]
    visible = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert visible.gaps == ()
    assert shown(visible) == [row for row in shown(whole.frames()) if row[2] != "best_effort"]
    summary = stream.backend.read_summary(stream.eid)
    assert (summary.document_json, summary.version) == (b'{"n":8,"l":{"x":7,"y":9}}', 4)
    # The repeat of it all is a duplicate now.
    stream.repeated(*batch_of(BATCH))


@pytest.mark.parametrize("before", range(1, 7))
def test_an_overlap_that_begins_inside_what_is_stored(stream, before):
    stream.append(*batch_of(BATCH[:7]))
    assert stream.append(*batch_of(BATCH[before:], before), first=before + 1)[1] == len(BATCH)
    assert stream.payloads() == [payload for _, payload in BATCH]
    summary = stream.backend.read_summary(stream.eid)
    assert (summary.document_json, summary.version) == (b'{"n":8,"l":{"x":7,"y":9}}', 4)


@pytest.mark.parametrize("skip", [1, 44, 127, 128, 129, 171, 172, 173, 298, 299])
@pytest.mark.parametrize("summary", [False, True], ids=["live", "summary"])
def test_a_run_whose_count_takes_two_bytes_is_cut(stream, skip, summary):
    payloads = [b'{"n":%d}' % n for n in range(300)]

    def frames(upto):
        return patches(*payloads[:upto], base=0) if summary else live(*payloads[:upto])

    names = "meta log live summary" if summary else "meta live"
    ms, sequence = stream.append(frames(skip), names=names)
    assert sequence == skip
    end_ms, sequence = stream.append(frames(300), names=names)
    assert sequence == 300
    assert stream.payloads() == payloads
    assert [entry for entry, _ in stream.raw.xrange(stream.live)] == [
        b"%d-%d" % (ms, skip), b"%d-300" % end_ms,
    ]  # fmt: skip
    # A repeat that ends inside a run stands under the run's time.
    assert stream.repeated(frames(skip), names=names) == (ms, skip)
    inside = max(skip - 1, 1)
    assert stream.repeated(frames(inside), names=names) == (ms, inside)
    if summary:
        found = stream.backend.read_summary(stream.eid)
        assert (found.document_json, found.version) == (payloads[-1], 300)


def test_ages_of_frames_survive_a_cut(stream):
    stream.append(live(b"1", b"2"))
    stream.append(live(b"1", b"2", b"3", b"4", b"5"))
    third, fourth, fifth = stream.frames()[2:]
    assert [fourth.ts_ms - third.ts_ms, fifth.ts_ms - fourth.ts_ms] == [100, 100]


def test_a_cut_run_does_not_hide_a_hole_before_it(stream):
    stream.append(*batch_of(BATCH[:7]))
    stream.append(*batch_of(BATCH[:9]))
    # Frames 6 and 7 are lost: who reads durable frames alone must hear of it.
    entry = next(entry for entry, _ in stream.raw.xrange(stream.live) if entry.endswith(b"-7"))
    stream.raw.xdel(stream.live, entry)
    page = stream.frames(visibility=ff_fast.TailVisibility.EXCLUDE_BEST_EFFORT)
    assert [frame.sequence for frame in page] == [1, 2, 8, 9]
    (gap,) = page.gaps
    assert gap.next_sequence == 8


BROKEN_RUNS = {
    "empty": b"",
    "count": varint(2) + run_of([b"1", b"2", b"3"])[1:],
    "cut": run_of([b"1", b"2", b"3"])[:-1],
    "longer": run_of([b"1", b"2", b"3"]) + b"x",
    "endless number": b"\x03" + b"\xff" * 400,
    "lengths beyond the end": b"\x03\xff\xff\x7f\x01\x01\x00\x00\x00abc",
}


@pytest.mark.parametrize("summary", [False, True], ids=["live", "summary"])
def test_a_run_that_cannot_be_cut_is_refused(stream, summary, subtests):
    stream.append(live(b"1"))
    block = patches(b"{}", b"{}", b"{}", base=0) if summary else live(b"1", b"2", b"3")
    at = 3 + 2 * int(block[2]) if summary else 2
    assert block[at][0] == 3
    for name, run in BROKEN_RUNS.items():
        with subtests.test(name):
            stream.refused("invalid_input", replaced(block, at, run))


def test_a_new_writer_does_not_swallow_frames_of_the_old_one(stream):
    stream.append(log(b"1", b"2", b"3"))
    stream.open(b"writer-2")
    # To writer-2 a sequence before its first is no duplicate: it has never written it.
    for first in (1, 3):
        error = stream.refused("sequence_gap", log(b"mine"), writer=b"writer-2", first=first)
        assert (error.expected, error.got) == (4, first)
    stream.refused("sequence_gap", log(b"a", b"b"), writer=b"writer-2", first=3)
    assert stream.append(log(b"4"), writer=b"writer-2", first=4)[1] == 4
    assert stream.repeated(log(b"4"), writer=b"writer-2", first=4)[1] == 4
    assert stream.payloads() == [b"1", b"2", b"3", b"4"]


def test_the_last_sequence_is_the_last_exact_integer(stream):
    stream.set_last(sequence=MAX_INT - 2)
    stream.refused("invalid_input", log(b"1", b"2", b"3"), first=MAX_INT - 1)
    ms, sequence = stream.append(log(b"1"), live(b"2"), first=MAX_INT - 1)
    assert sequence == MAX_INT
    assert stream.raw.xrange(stream.log)[0][0] == b"%d-%d" % (ms, MAX_INT - 1)
    assert stream.raw.xrange(stream.live)[0][0] == b"%d-%d" % (ms, MAX_INT)
    assert stream.raw.hget(stream.meta, "last_id") == b"%d-%d" % (ms, MAX_INT)
    assert stream.repeated(live(b"2"), first=MAX_INT) == (ms, MAX_INT)
    stream.refused("invalid_input", log(b"3"), first=MAX_INT + 1)


@pytest.mark.parametrize("left", range(1, 9))
def test_the_last_sequences_are_counted_exactly(stream, left):
    """Sums beyond the last exact integer, however soon they are undone, are another number."""
    stream.set_last(sequence=MAX_INT - left)
    payloads = [b"%d" % n for n in range(left)]
    blocks = [log(payload) for payload in payloads[: left // 2]]
    ms, sequence = stream.append(*blocks, log(*payloads[left // 2 :]), first=MAX_INT - left + 1)
    assert sequence == MAX_INT
    ids = [b"%d-%d" % (ms, MAX_INT - left + 1 + n) for n in range(left)]
    found = zip(ids, payloads, strict=True)
    assert stream.raw.xrange(stream.log) == [(each, {b"payload": data}) for each, data in found]
    assert stream.raw.hget(stream.meta, "last_id") == ids[-1]


def test_a_batch_holds_1024_frames(stream):
    assert stream.append(log(*[b"x"] * 1000), live(*[b"y"] * 24))[1] == 1024
    stream.refused("invalid_input", log(*[b"x"] * 1000), live(*[b"y"] * 25), first=1025)


def test_a_requested_cancel_is_told_to_the_writer(stream):
    def told(previous):
        args = (stream.writer_id(), previous, *log(b"x"))
        _, now, expires, cancel = stream.call("ff_append", stream.keys, *args).split(b" ")
        assert 0 < int(expires) - int(now) <= 30_000
        return cancel

    assert told(b"0") == b"0"
    assert not stream.backend.cancel(stream.handle, reason="enough", grace=60).cancelled
    assert stream.raw.hget(stream.meta, "cancel_requested") == b"1"
    assert told(b"1") == b"1"
    # Also to one that has lost its reply.
    assert told(b"1") == b"1"


# -- summary -----------------------------------------------------------------------------------------


def test_patches_need_the_version_that_they_were_made_for(stream):
    stream.append(patches(b'{"a":1}', base=0))
    for base in (0, 2, 5):
        error = stream.refused("summary_conflict", patches(b'{"a":2}', base=base), first=2)
        assert (error.expected, error.got) == (1, base)
    # An overlap is held to the version after what it leaves out.
    stream.append(patches(b'{"a":2}', base=1), first=2)
    error = stream.refused("summary_conflict", patches(b"{}", b"{}", base=3), first=2)
    assert (error.expected, error.got) == (2, 4)
    stream.refused("summary_conflict", [b"C", b"3", b"{}", b"json-merge-patch:"], first=3)


def test_a_fresh_document_takes_the_place_of_its_patches(stream, next_ms):
    stream.append(patches(b'{"a":1}', b'{"b":[]}', base=0))
    before = stream.backend.read_summary(stream.eid)
    next_ms()
    stream.append([b"C", b"2", b'{"a":1,"b":[]}', b"json-merge-patch:"], first=3)
    assert stream.backend.read_summary(stream.eid) == before
    assert not [name for name in stream.raw.hkeys(stream.summary) if b":" in name]
    # With patches of its own batch.
    stream.append(
        patches(b'{"c":3}', base=2),
        [b"C", b"3", b'{"a":1,"b":[],"c":3}', b"json-merge-patch:"],
        first=3,
    )
    after = stream.backend.read_summary(stream.eid)
    assert (after.version, after.document_json) == (3, b'{"a":1,"b":[],"c":3}')
    assert after.first_applied_ms == before.first_applied_ms < after.last_updated_ms


# -- opening -----------------------------------------------------------------------------------------


def test_opening_tells_where_to_go_on(unopened):
    claimed = unopened.raw.hget(unopened.meta, "created_at") + b"-0"
    assert unopened.raw.hget(unopened.meta, "last_id") == claimed
    assert unopened.open() == [1, b"OK", claimed, b"0", b"", b"0"]
    ms, _ = unopened.append(
        log(b"1"), patches(b"{}", base=0), live(b"3"), [b"H", b"2"], [b"E", b"99.5"]
    )
    assert unopened.open(b"writer-2") == [1, b"OK", b"%d-3" % ms, b"2", b"99.5", b"1"]
    ms, _ = unopened.append(log(b"4"), [b"H", b""], first=4, writer=b"writer-2")
    assert unopened.open(b"writer-3") == [1, b"OK", b"%d-4" % ms, b"4", b"99.5", b"1"]


def test_opening_again_with_the_same_id_changes_nothing(stream):
    stream.append(log(b"1"))
    before = stream.everything()
    answer = stream.open()
    assert stream.everything() == before
    assert stream.open() == answer
    # What was a duplicate for this writer is one still.
    assert stream.repeated(log(b"1"))[1] == 1


def test_opening_supersedes_the_writer_before(stream):
    stream.append(log(b"1"))
    stream.open(b"writer-2")
    stream.refused("writer_superseded", log(b"2"), first=2)
    stream.refused("writer_superseded", log(b"1"), first=1)
    stream.open()
    stream.refused("writer_superseded", log(b"2"), first=2, writer=b"writer-2")
    assert stream.append(log(b"2"), first=2)[1] == 2


def test_nobody_appends_without_opening(unopened):
    unopened.refused("writer_superseded", log(b"1"))


@pytest.mark.parametrize("at", range(5), ids=CODES[:5])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "first of several"])
def test_opening_is_refused_as_appending_is(unopened, at, alone):
    refusals = REFUSALS[at : at + 1] if alone else REFUSALS[at:5]
    _, call = spoil(unopened, refusals)
    before = unopened.everything()
    assert unopened.open(**call) == [0, CODES[at].encode()]
    assert unopened.everything() == before


# -- whatever takes the lease away takes the writer away ----------------------------------------------


def _retried(stream):
    outcome = stream.backend.fail(stream.handle, "again", ff_fast.FailureClass.TRANSIENT)
    assert outcome.retry_scheduled


def _crashed(stream):
    stream.backend.fail(stream.handle, "lost", ff_fast.FailureClass.INFRA_CRASH)


def _suspend(stream):
    waitpoint = stream.backend.create_waitpoint(stream.handle)
    spec = ff_fast.WaitpointSpec(ff_fast.WaitpointKind.EXTERNAL, b"", waitpoint.hmac_token)
    assert not stream.backend.suspend(stream.handle, spec).already_satisfied


def _fire(stream, kind):
    tag = stream.eid[: stream.eid.index("}") + 1]
    timers = keys.timers(tag)
    member = f"{kind}:{stream.eid}"
    stream.raw.zadd(timers, {member: 1})
    args = (member, kind, "", "", "", "")
    assert stream.call("ff_fire_timer", (timers, stream.core), *args)[:3] == [1, b"OK", b"done"]
    assert stream.raw.zscore(timers, member) is None


def _lapse_by_timer(stream):
    _lapsed(stream)
    _fire(stream, "lease")


def _lapse_by_claim(stream):
    _lapsed(stream)
    args = ("w", "i", "lease-2", 30_000, "attempt-2", "1")
    assert stream.call("ff_claim_execution", (stream.core,), *args)[1] == b"OK"


def _cancel_with_its_flow(stream):
    tag = stream.eid[: stream.eid.index("}") + 1]
    flow = keys.new_uuid()
    names = [key(tag, flow) for key in (keys.flow, keys.flow_members, keys.flow_open)]
    stream.call("ff_create_flow", names[:1], flow, "default")
    stream.raw.sadd(names[2], stream.eid)
    reply = stream.call("ff_cancel_flow", (*names, keys.timers(tag)), "stop", "cancel_all", 0)
    assert reply[1] == b"OK"
    reply = stream.call("ff_cancel_members", (names[0], names[2], keys.timers(tag)), 10)
    assert reply[2:4] == [b"1", b"0"]


TAKERS = {
    "complete": (lambda s: s.backend.complete(s.handle, b"r"), "completed", "stream_closed"),
    "fail": (lambda s: s.backend.fail(s.handle, "x", ff_fast.FailureClass.PERMANENT), "failed", "stream_closed"),
    "fail and retry": (_retried, "delayed", "stream_closed"),
    "crash": (_crashed, "waiting", "stream_closed"),
    "cancel": (lambda s: s.backend.cancel(s.eid), "cancelled", "stream_closed"),
    "cancel by timer": (lambda s: _fire(s, "cancel"), "cancelled", "stream_closed"),
    "cancel with its flow": (_cancel_with_its_flow, "cancelled", "stream_closed"),
    "deadline": (lambda s: _fire(s, "deadline"), "expired", "stream_closed"),
    "attempt timeout": (lambda s: _fire(s, "attempt"), "delayed", "stream_closed"),
    "delay": (lambda s: s.backend.delay(s.handle, 60), "delayed", "stale_owner"),
    "no delay": (lambda s: s.backend.delay(s.handle, 0), "delayed", "stale_owner"),
    "wait for a child": (lambda s: (s.child(), s.backend.wait_children(s.handle)), "waiting_children", "stale_owner"),
    "wait for no child": (lambda s: s.backend.wait_children(s.handle), "waiting", "stale_owner"),
    "suspend": (_suspend, "suspended", "suspended"),
    "lapse by timer": (_lapse_by_timer, "waiting", "stream_closed"),
    "lapse by claim": (_lapse_by_claim, "active", "stale_owner"),
}  # fmt: skip


@pytest.fixture
def retrying(raw, backend, lane):
    stream = Stream(raw, backend, lane, retry=ff_fast.RetryPolicy(max_retries=1))
    stream.open()
    return stream


@pytest.mark.parametrize("take, state, code", TAKERS.values(), ids=TAKERS)
def test_who_takes_the_lease_away_takes_the_writer_away(retrying, take, state, code):
    stream = retrying
    stream.append(log(b"1"), live(b"2"), [b"H", b"1"])
    assert stream.raw.hget(stream.meta, "writer") == stream.writer_id()
    take(stream)
    assert stream.raw.hget(stream.core, "state") == state.encode()
    assert stream.raw.hget(stream.meta, "writer") is None
    # Not a new frame, not a repeat, not a batch without frames; nor may it open again.
    stream.refused(code, log(b"3"), first=3)
    stream.refused(code, log(b"1"), first=1)
    stream.refused(code, [b"K", b"1"], first=3)
    before = stream.everything()
    assert stream.open() == [0, code.encode()]
    assert stream.open(b"writer-2") == [0, code.encode()]
    assert stream.everything() == before


RESUMED = {
    "delay": lambda s: (s.backend.delay(s.handle, 0), _fire(s, "delay")),
    "wait for no child": lambda s: s.backend.wait_children(s.handle),
}


@pytest.mark.parametrize("interrupt", RESUMED.values(), ids=RESUMED)
def test_an_attempt_that_goes_on_is_not_the_old_writers(stream, interrupt):
    stream.append(log(b"1"), live(b"2"), [b"H", b"1"])
    old = stream.fence
    interrupt(stream)
    handle = stream.claim()
    assert handle.kind is ff_fast.HandleKind.RESUMED
    fence = ops.Attempt.of(handle).fence
    assert (fence[0], int(fence[2])) == (old[0], int(old[2]) + 1)
    stream.refused("stale_owner", log(b"3"), first=3)
    stream.refused("writer_superseded", log(b"3"), first=3, fence=fence)
    assert stream.open(fence=fence)[2].split(b"-")[1] == b"2"
    stream.refused("stale_owner", log(b"3"), first=3)
    assert stream.append(log(b"3"), first=3, fence=fence)[1] == 3
    assert stream.payloads() == [b"1", b"2", b"3"]


def test_a_suspension_that_is_not_needed_keeps_the_writer(stream):
    waitpoint = stream.backend.create_waitpoint(stream.handle)
    stream.backend.deliver_signal(stream.eid, waitpoint, "go")
    spec = ff_fast.WaitpointSpec(ff_fast.WaitpointKind.EXTERNAL, b"", waitpoint.hmac_token)
    assert stream.backend.suspend(stream.handle, spec).already_satisfied
    assert stream.append(log(b"1"))[1] == 1


def test_a_timer_that_is_early_takes_nothing(stream):
    tag = stream.eid[: stream.eid.index("}") + 1]
    member = f"lease:{stream.eid}"
    timers = keys.timers(tag)
    # Renewed since: the timer moves to the end that the lease has now.
    stream.raw.zadd(timers, {member: 1})
    reply = stream.call("ff_fire_timer", (timers, stream.core), member, "lease", "", "", "", "")
    assert reply == [1, b"OK", b"later"]
    expires_at = int(stream.raw.hget(stream.meta, "lease_expires_at"))
    assert stream.raw.zscore(timers, member) == expires_at
    assert stream.append(log(b"1"))[1] == 1


def test_a_requested_cancel_is_told_to_the_writer_of_the_next_attempt(retrying):
    stream = retrying
    stream.backend.cancel(stream.eid, grace=60)
    _retried(stream)
    _fire(stream, "delay")
    attempt = ops.Attempt.of(stream.claim())
    assert attempt.attempt_index == 1
    meta, _, _, summary = attempt.stream_keys
    names = (stream.core, meta, summary)
    writer = ops.writer_id(attempt)
    assert stream.call("ff_open_writer", names, writer)[1] == b"OK"
    reply = stream.call("ff_append", attempt.stream_keys, writer, b"0", *log(b"x"))
    assert reply.split(b" ")[3] == b"1"


def test_a_requested_cancel_leaves_the_writer_its_grace(stream):
    stream.backend.cancel(stream.eid, grace=60)
    assert stream.append(log(b"1"))[1] == 1


# -- cases that FlowFabric's append gets wrong ------------------------------------------------------------


def test_the_same_call_twice_stores_once(stream):
    block = patches(b'{"n":1}', base=0)
    assert stream.append(log(b"x"), block) == stream.repeated(log(b"x"), block)
    assert len(stream.payloads()) == 2
    assert stream.backend.read_summary(stream.eid).version == 1


def test_no_text_of_a_mode_makes_frames_of_the_log_vanish(stream):
    for first, mode in zip((1, 3, 5), (b"foo", b"Durable", b"durable"), strict=True):
        stream.append(live(b"x", fields=[b"mode", mode]), [b"P", b"1"], log(b"kept"), first=first)
    assert stream.raw.pttl(stream.log) == -1
    assert stream.raw.xlen(stream.log) == 3


def test_a_rate_that_is_no_number_is_refused_and_the_window_is_trimmed_still(stream):
    stream.refused("invalid_input", live(b"x"), [b"E", b"nan"])
    for first in range(1, 1001):
        stream.append(live(b"x"), [b"T", b"0-%d" % max(first - 10, 1)], first=first)
    stream.append(live(b"x"), [b"T", b"%d-%d" % (server_ms(stream.raw) + 1, 0)], first=1001)
    assert stream.raw.xlen(stream.live) < 300


@pytest.mark.parametrize("value", ["", None, "soon"])
def test_a_lease_without_a_time_has_lapsed(stream, value):
    if value is None:
        stream.raw.hdel(stream.meta, "lease_expires_at")
    else:
        stream.raw.hset(stream.meta, "lease_expires_at", value)
    stream.refused("lease_expired", log(b"x"))
    assert stream.open(b"writer-2") == [0, b"lease_expired"]
    before = stream.everything()
    for call in (stream.backend.renew, stream.backend.complete):
        with pytest.raises(errors.LeaseExpired):
            call(stream.handle)
    assert stream.everything() == before


def test_times_are_the_servers(stream):
    before = server_ms(stream.raw)
    ms, _ = stream.append(log(b"x"))
    (frame,) = stream.frames()
    assert before <= frame.ts_ms == ms <= server_ms(stream.raw)


def test_absent_suspended_and_closed_are_told_apart(raw, backend, lane):
    told = []
    for change in (_gone, _suspended, _closed):
        stream = Stream(raw, backend, lane)
        stream.open()
        change(stream)
        told.append(stream.append(log(b"x")).code)
    assert told == ["execution_not_found", "suspended", "stream_closed"]


def test_whoever_has_no_lease_has_no_say(raw, backend, lane):
    stream = Stream(raw, backend, lane)
    stream.open()
    # Nobody's: the lease fields are empty, and so are those of the call.
    raw.hset(stream.core, "current_lease_id", "")
    raw.hset(stream.meta, "lease_expires_at", "0")
    raw.hdel(stream.meta, "writer")
    stream.refused("stale_owner", log(b"x"))
    stream.refused("invalid_input", log(b"x"), fence=(stream.fence[0], b"", stream.fence[2]))
    # Nor has an empty writer, where none is open.
    for writer in (b"", b":::"):
        assert stream.call("ff_append", stream.keys, writer, b"0", *log(b"x"))[0] == 0
