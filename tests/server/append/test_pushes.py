"""What `ff_append` publishes, and the frames that were pushed before they are stored."""

import pytest
from redis.exceptions import ResponseError

import ff_fast
from ff_fast import errors, keys
from ff_fast.embedded import EmbeddedServer

from ...conftest import connect_raw
from ...heads import head_of
from ..streams import Listener, Stream, appended, live, log, part_of, patches, server_ms

BODY = b" the body"


@pytest.fixture
def heard(stream, listen):
    return listen(stream.head).heard


# -- what is stored --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, count",
    [
        ([log(b"1")], 1),
        ([log(b"1", b"2", b"3")], 3),
        ([live(b"1")], 1),
        ([live(b"1", b"2")], 2),
        ([log(b"1"), live(b"2"), patches(b"{}", base=0), [b"E", b"1.5"]], 3),
    ],
)
def test_what_a_part_stored_is_published_with_the_last_id(stream, heard, blocks, count):
    answer = stream.append(*blocks, push=BODY)
    assert answer[1] == count
    assert heard() == [b"F%d-%d" % answer + BODY]
    # By a push that is empty behind the id, readers are told to read.
    answer = stream.append(log(b"x"), first=count + 1, push=b" ")
    assert heard() == [b"F%d-%d " % answer]


LONG = b"x" * 200
PAIRS = [b"encoding", b"e", b"source", LONG]
PUSHED_PAIRS = b"\x02\x08encoding\x01e\x06source\xc8\x01" + LONG


@pytest.mark.parametrize(
    "block, begins",
    [
        (log(b"1", b"2"), b"L\0"),
        (log(b"1", b"2", extras=PAIRS), b"L" + PUSHED_PAIRS),
        (live(b"1", b"2"), b"V\0"),
        (live(b"1", b"2", fields=PAIRS), b"V" + PUSHED_PAIRS),
    ],
)
def test_the_server_completes_a_push_with_the_fields_and_values_of_the_first_block(
    stream, heard, block, begins
):
    values = b"12" if begins[:1] == b"L" else block[-1]
    answer = stream.append(block, [b"E", b"1.5"], push=b"+middle")
    assert heard() == [b"F%d-%d " % answer + begins + b"middle" + values]


@pytest.mark.parametrize("blocks", [[log(b"1", b"2")], [live(b"1", b"2")], [live(b"1"), log(b"2")]])
def test_only_what_is_stored_is_published(stream, heard, blocks):
    answer = stream.append(*blocks)
    assert heard() == []
    for first, some in ((1, blocks), (1, [blocks[0]])):
        stream.repeated(*some, first=first, push=BODY)
    stream.append([b"E", b"1.5"], first=3, push=BODY)
    stream.refused("sequence_gap", log(b"x"), first=4, push=BODY)
    stream.refused("invalid_input", log(b"x"), [b"Z"], first=3, push=BODY)
    assert answer[1] == 2
    assert heard() == []


@pytest.mark.parametrize("stored", [1, 2, 3])
@pytest.mark.parametrize("block", [log, live])
def test_of_a_batch_that_is_stored_in_part_the_id_alone_is_published(
    stream, heard, next_ms, stored, block
):
    """Its frames have two times, and a push says one for all."""
    payloads = [b"1", b"2", b"3", b"4"]
    stream.append(block(*payloads[:stored]))
    next_ms()
    answer = stream.append(block(*payloads), push=BODY)
    assert heard() == [b"F%d-4 " % answer[0]]
    assert stream.payloads() == payloads


def test_a_push_has_a_limit(stream, heard):
    largest = bytes(2 << 20)
    stream.refused("invalid_input", log(b"x"), push=largest + b"x")
    assert stream.push(largest + b"x").code == "invalid_input"
    assert heard() == []
    assert stream.push(largest) is None
    assert heard() == [largest]


# -- pushed before they are stored -----------------------------------------------------------------


def test_a_push_stores_nothing(stream, heard):
    stream.append(log(b"1"))
    before = stream.everything()
    messages = [b"f%d-%d run" % (server_ms(stream.raw), n) for n in range(5)]
    for message in messages:
        assert stream.push(message) is None
    assert stream.everything() == before
    assert heard() == messages


def test_pushed_frames_are_stored_under_the_time_of_the_push(stream, heard, next_ms):
    pushed = server_ms(stream.raw)
    next_ms()
    answer = stream.append([b"I", b"%d" % pushed], live(b"1", b"2", b"3"), push=BODY)
    assert answer == (pushed, 3)
    assert stream.raw.xrange(stream.live)[0][0] == b"%d-3" % pushed
    assert head_of(stream.raw, stream.head).last_id == b"%d-3" % pushed
    assert heard() == [b"F%d-3" % pushed + BODY]
    # As after a lost reply.
    again = stream.repeated([b"I", b"%d" % pushed], live(b"1", b"2", b"3"), push=BODY)
    assert again == answer
    # An older place is found as well.
    assert stream.repeated([b"I", b"%d" % pushed], live(b"1"))[1] == 1
    assert heard() == []
    next_ms()
    assert stream.append(log(b"4"), first=4)[0] > pushed
    assert stream.payloads() == [b"1", b"2", b"3", b"4"]


@pytest.mark.parametrize("fields", [(), (b"frame_type", b"event")])
@pytest.mark.parametrize("names", ["head live", "head log live", "head log live summary"])
def test_one_pushed_frame_is_stored_like_a_run(stream, heard, next_ms, names, fields):
    pushed = server_ms(stream.raw)
    next_ms()
    block = [[b"I", b"%d" % pushed], live(b"1", fields=fields), [b"P", b"60000"]]
    assert stream.append(*block, names=names, push=BODY) == (pushed, 1)
    assert heard() == [b"F%d-1" % pushed + BODY]
    assert stream.raw.pttl(stream.live) > 0


def test_what_follows_pushed_frames_in_a_batch_has_the_servers_time(stream, heard, next_ms):
    pushed = server_ms(stream.raw)
    next_ms()
    pushed_block = [[b"I", b"%d" % pushed], live(b"1", b"2")]
    ms, sequence = stream.append(*pushed_block, log(b"3"), live(b"4"), push=BODY)
    assert sequence == 4
    assert ms > pushed
    assert stream.raw.xrange(stream.live)[0][0] == b"%d-2" % pushed
    assert stream.raw.xrange(stream.log)[0][0] == b"%d-3" % ms
    # The body would say one time for all.
    assert heard() == [b"F%d-4 " % ms]
    assert stream.repeated(*pushed_block) == (pushed, 2)
    # Of a repeat whose pushed frames are all stored, the rest is appended.
    ms, sequence = stream.append(*pushed_block, log(b"3"), live(b"4"), log(b"5"), push=BODY)
    assert sequence == 5
    assert heard() == [b"F%d-5 " % ms]
    assert stream.payloads() == [b"1", b"2", b"3", b"4", b"5"]


def test_pushed_frames_never_go_behind_the_last_frame(stream, next_ms):
    pushed = server_ms(stream.raw)
    next_ms()
    ms, _ = stream.append(log(b"1"))
    assert ms > pushed
    assert stream.append([b"I", b"%d" % pushed], live(b"2"), first=2) == (ms, 2)
    # A clock that was put back: the client's time is ahead, and so is what follows.
    ahead = server_ms(stream.raw) + 100_000
    assert stream.append([b"I", b"%d" % ahead], live(b"3"), log(b"4"), first=3) == (ahead, 4)
    assert stream.append(log(b"5"), first=5) == (ahead, 5)
    assert stream.payloads() == [b"1", b"2", b"3", b"4", b"5"]


def test_the_time_of_a_push_is_one_that_a_frame_may_have(stream, subtests):
    now = server_ms(stream.raw)
    run = live(b"1", b"2")
    for ms in (b"", b"x", b"-1", b"1.5", b"0", b"%d" % (now * 10), b"0x%d" % now, b" %d" % (now // 10),
               b"%d" % (now + 86_400_000 + 60_000), b"9999999999999"):  # fmt: skip
        with subtests.test(ms=ms):
            stream.refused("invalid_input", [b"I", ms], run)
    time = [b"I", b"%d" % now]
    for name, blocks in {
        "log": (time, log(b"1")),
        "log with fields": (time, log(b"1", extras=[b"f", b"v"])),
        "patches": (time, patches(b"{}", base=0)),
        "no frames": (time, [b"E", b"1"]),
        "nothing": (time,),
        "no time": ([b"I"],),
        "twice": (time, time, run),
        "not first": (run, time, run),
    }.items():
        with subtests.test(name):
            stream.refused("invalid_input", *blocks)


def test_frames_that_were_pushed_long_before_are_read_and_known(stream, next_ms):
    """Their ids are older than the time at which they were stored."""
    pushed = server_ms(stream.raw)
    stream.append([b"I", b"%d" % pushed], live(b"1", b"2", b"3", b"4"))
    next_ms()
    later = server_ms(stream.raw)
    next_ms()
    stream.append([b"I", b"%d" % later], live(b"5", b"6"), first=5)
    ids = [frame.stream_id for frame in stream.frames()]
    assert ids == [f"{pushed}-{n}" for n in range(1, 5)] + [f"{later}-{n}" for n in (5, 6)]
    # A reader that got them by pushes goes on from each of them.
    for place, identity in enumerate(ids):
        page = stream.frames(after=identity)
        assert page.gaps == ()
        assert [frame.sequence for frame in page] == list(range(place + 2, 7))
    # So does whoever releases the lease and names the last frame.
    attempt = ff_fast._core.ops.Attempt.of(stream.handle)
    op = ff_fast._core.ops.complete_execution(attempt, b"done", ids[-1].encode())
    assert stream.call(op.function.decode(), op.keys, *op.argv)[:2] == [1, b"OK"]
    page = stream.frames()
    assert (page.gaps, page.end_reason) == ((), "attempt_success")


# -- rights and states of the server ---------------------------------------------------------------


ALLOWED = "on nopass ~* +@all resetchannels"


def test_a_user_without_the_right_to_publish_stores_and_pushes_nothing(engine, stream, heard):
    stream.raw.execute_command("ACL", "SETUSER", "mute", "reset", *ALLOWED.split())
    url = engine.url.replace("://", "://mute:any@", 1)
    with connect_raw(url) as mute:
        # What is stored stays stored; its readers hear of it later.
        (answer,), now = appended(mute, stream.part(log(b"1"), push=BODY))
        assert stream.told(answer, now)[1] == 1
        before = stream.everything()
        with pytest.raises(ResponseError) as refused:
            appended(mute, stream.push_part(b"f1-1 "))
        answers, now = appended(mute, stream.push_part(b"f1-1 "), stream.part(log(b"1")))
        assert isinstance(answers[0], ResponseError)
        assert stream.told(answers[1], now)[1] == 1
        # Whoever opens a writer is told before anything changes.
        names = (stream.core, stream.head, stream.summary)
        writer, lease_id = stream.writer_id(b"writer-2"), stream.fence[1]
        with pytest.raises(ResponseError) as unopened:
            mute.fcall("ff_open_writer", len(names), *names, writer, lease_id)
        assert stream.everything() == before
        for failed in (refused.value, unopened.value, answers[0]):
            error = errors.from_server_error(str(failed), "ff_append")
            assert isinstance(error, errors.PermissionDenied), str(failed)
    assert heard() == []
    stream.raw.execute_command("ACL", "DELUSER", "mute")


@pytest.fixture(params=["valkey", pytest.param("redis", marks=pytest.mark.second_engine)])
def own(request, lane):
    """A stream on a server of its own, whose settings a test may change."""
    from ...conftest import second_engine

    options = {} if request.param == "valkey" else {"executable": second_engine()}
    with (
        EmbeddedServer(**options) as server,
        connect_raw(server.url) as raw,
        ff_fast.ValkeyBackend.connect(server.url) as backend,
    ):
        stream = Stream(raw, backend, lane)
        stream.open()
        yield stream


def test_a_server_that_takes_no_writes_publishes_nothing(own):
    listener = Listener(own.raw, own.head)
    push = own.push_part(b"f1-1 ")
    store = own.part(log(b"1"), push=BODY)
    for setting, value, usual in (("maxmemory", 1, 0), ("min-replicas-to-write", 1, 0)):
        own.raw.config_set(setting, value)
        for parts in ((store,), (push,), (push, store)):
            with pytest.raises(ResponseError):
                appended(own.raw, *parts)
        own.raw.config_set(setting, usual)
    assert listener.heard() == []
    assert len(own.frames()) == 0
    listener.close()


def test_a_transaction_publishes_when_it_is_executed(own):
    listener = Listener(own.raw, own.head)
    names = (own.head,)
    with own.raw.pipeline(transaction=True) as pipeline:
        for number in range(3):
            args = part_of(names, own.writer_id(), b"f1-%d " % number)
            pipeline.fcall("ff_append", 1, *names, *args)
        pipeline.execute()
    assert listener.heard() == [b"f1-0 ", b"f1-1 ", b"f1-2 "]
    listener.close()


def test_a_function_that_only_reads_publishes_nothing(own):
    """A replica may serve it."""
    names = (own.head,)
    args = part_of(names, own.writer_id(), b"f1-1 ")
    with pytest.raises(ResponseError):
        own.raw.fcall_ro("ff_append", 1, *names, *args)
    listener = Listener(own.raw, own.head, keys.execution_channel(own.eid))
    own.frames()
    own.backend.describe(own.eid)
    own.backend.describe_stream(own.eid, 0)
    assert listener.heard() == []
    listener.close()
