"""A writer that threads, collections and its own hooks call, and every order of events."""

import contextlib
import gc
import json
import sys
import threading
import time

import hiredis
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ff_fast._core.summary import fold
from ff_fast._hot.writer import arguments_of
from ff_fast.errors import (
    FFError,
    InvalidInput,
    LeaseExpired,
)

from ...reference_writer import Server, Written
from ...waiting import wait_until
from .core import DURABLE, LIVE, MERGE, OOM, TEXT, Shell, payloads_of, position, write

# -- threads, collections, hooks -------------------------------------------------------------------


class TestReentrance:
    def test_write_returns_its_own_sequence(self):
        # The hook lets another thread in, or writes itself.
        class Chatty(Shell):
            def _on_ready(self):
                super()._on_ready()
                if self.next_sequence < 3:
                    self.write(b"inner")

        writer = Chatty()
        assert writer.write(b"outer") == 1
        assert payloads_of(writer.take()) == [b"outer", b"inner"]

    @pytest.mark.parametrize("call", ["write", "seal_soon", "acknowledge", "seal_last", "requeue"])
    def test_hook_that_raises_is_called_again(self, call):
        class Interrupted(Shell):
            interrupt = False

            def _on_ready(self):
                if self.interrupt:
                    self.interrupt = False
                    raise KeyboardInterrupt
                super()._on_ready()

        writer = Interrupted(linger_ms=0 if call in ("write", "acknowledge") else 10)
        batch = None
        if call != "write":
            writer.write(b"1")
            if call in ("acknowledge", "requeue"):
                writer._seal_soon()
                batch = writer.take()
                writer.write(b"2")
        writer.interrupt = True
        with pytest.raises(KeyboardInterrupt):
            {
                "write": lambda: writer.write(b"1"),
                "seal_soon": writer._seal_soon,
                "acknowledge": lambda: writer._acknowledge(batch, position(batch)),
                "seal_last": writer._seal_last,
                "requeue": writer._requeue,
            }[call]()
        assert not writer.queued
        writer._seal_soon()
        assert payloads_of(writer.take())[0] == (b"2" if call == "acknowledge" else b"1")

    def test_waiters_are_told_although_the_other_hook_raises(self):
        class Broken(Shell):
            broken = False

            def _on_ready(self):
                super()._on_ready()
                if self.broken:
                    raise RuntimeError

        writer = Broken()
        writer.write(b"1")
        batch = writer.take()
        writer.write(b"2")
        writer.broken = writer._has_waiters = True
        with pytest.raises(RuntimeError):
            writer._acknowledge(batch, position(batch))
        assert writer.last_sequence == 1
        assert writer.progress == 1

    @pytest.mark.parametrize(
        "call", ["next_batch", "write", "patch", "unstored_frames", "seal_last"]
    )
    def test_collection_amid_a_call(self, call):
        """A finalizer, which may run wherever a container is made, writes to the same writer."""
        writer, server = Shell(LIVE), Server()
        taken: dict[int, bytes] = {}

        def put(payload, frame_type="token", mode=None):
            taken[writer.write(payload, frame_type, mode=mode)] = payload

        class Dying:
            def __init__(self):
                self.me = self

            def __del__(self):
                with contextlib.suppress(InvalidInput):  # it may come after _seal_last()
                    for i in range(300):
                        put(b"late%d" % i, f"type{i}", [LIVE, DURABLE, TEXT][i % 3])

        def patch():
            # Its parts are new containers, made while it is folded.
            put(b'{"a":{"b":{"c":{}}},"d":[[[]]]}', mode=MERGE)

        calls = {
            "next_batch": writer._next_batch,
            "write": lambda: put(b"x"),
            "patch": patch,
            "unstored_frames": writer._unstored_frames,
            "seal_last": writer._seal_last,
        }
        put(b"first", mode=TEXT)
        for i in range(1024 if call == "write" else 100):
            put(b"%d" % i, "ab"[i % 2])
        in_flight = []
        gc.collect()
        gc.disable()
        threshold = gc.get_threshold()
        try:
            Dying()
            # Containers that Python keeps for reuse would put the collection off.
            spare = [kind() for _ in range(200) for kind in (list, dict)]
            spare += [tuple(range(i % 20)) for i in range(20 * 2001)]
            gc.set_threshold(1)
            gc.enable()
            outcome = calls[call]()
        finally:
            gc.set_threshold(*threshold)
            gc.enable()
            del spare
        if call == "next_batch":
            in_flight.append(outcome)
        gc.collect()
        writer._seal_last()
        while not writer._idle:
            if not in_flight:
                in_flight.append(writer._next_batch())
            batch = in_flight.pop(0)
            writer._acknowledge(batch, server.append(arguments_of(batch.message)))
            assert writer.error is None
        assert [frame.payload for frame in server.frames] == [
            taken[i] for i in range(1, len(taken) + 1)
        ]
        server.check_visible_chain()
        assert fold(server.summary).version == writer.summary_version

    def test_threads(self):
        writer, server = Shell(LIVE, max_unacknowledged_bytes=1 << 30), Server()
        per_thread = 3000
        sequences: list[list[int]] = [[] for _ in range(3)]

        def produce(number):
            for i in range(per_thread):
                mode = TEXT if i % 50 == 0 else None
                payload = b"%d.%d " % (number, i)
                sequences[number].append(writer.write(payload, "ab"[i % 2], mode=mode))

        threads = [threading.Thread(target=produce, args=(n,)) for n in range(3)]
        interval = sys.getswitchinterval()
        sys.setswitchinterval(1e-5)
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads) or not writer._idle:
                if not writer.queued:
                    time.sleep(0)
                    continue
                writer.queued = False
                batch = writer._next_batch()
                if batch is not None:
                    writer._acknowledge(batch, server.append(arguments_of(batch.message)))
        finally:
            sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
        by_sequence = {
            sequence: b"%d.%d " % (number, i)
            for number, taken in enumerate(sequences)
            for i, sequence in enumerate(taken)
        }
        assert [frame.payload for frame in server.frames] == [
            by_sequence[i] for i in range(1, 3 * per_thread + 1)
        ]
        server.check_visible_chain()

    def test_a_batch_with_a_document_of_a_mib_is_sealed_by_one_thread_alone(self):
        writer = Shell(MERGE)
        sent, taken, over = [], [], threading.Event()

        def send():
            while not (over.is_set() and writer._idle):
                batch = writer._next_batch()
                if batch is not None:
                    taken.extend(payloads_of(batch))
                    writer._acknowledge(batch, position(batch))

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        for i in range(60):
            sent.append(b'{"%d":"%b"}' % (i, b"x" * 60_000))
            writer.write(sent[-1])
            wait_until(lambda: writer.unacknowledged_bytes < 4 << 20)
        writer._seal_last()
        over.set()
        sender.join(20)
        assert [len(payload) for payload in taken] == [len(payload) for payload in sent]
        assert taken == sent


# -- every order of events -------------------------------------------------------------------------


class Streams(RuleBasedStateMachine):
    """One writer, one server, a connection that breaks: every frame is stored once, in order."""

    def __init__(self):
        super().__init__()
        self.server = Server()
        self.written: list[Written] = []
        self.text = ""
        self.connection: list = []
        self.failed = False

    @initialize(linger_ms=st.sampled_from([0, 10]), mode=st.sampled_from([DURABLE, LIVE]))
    def open(self, linger_ms, mode):
        self.writer = Shell(mode, linger_ms=linger_ms, max_unacknowledged_bytes=1 << 40)

    @precondition(lambda self: not self.failed)
    @rule(
        mode=st.sampled_from([DURABLE, LIVE, LIVE, TEXT]),
        frame_type=st.sampled_from(["token", "log"]),
        count=st.sampled_from([1, 1, 2, 3, 255, 300, 1100]),
    )
    def write(self, mode, frame_type, count):
        for _ in range(count):
            frame = Written(b"%d;" % (len(self.written) + 1), mode, frame_type)
            self.written.append(frame)
            assert write(self.writer, frame) == len(self.written)
            if mode is TEXT:
                self.text += frame.payload.decode()

    @precondition(lambda self: not self.failed)
    @rule()
    def fill_the_connection(self):
        for _ in range(3):
            self.write(LIVE, "token", 256)
            self.send()

    @rule(payload=st.sampled_from([b"[", b"[]", b"\xff"]))
    def refused_patch(self, payload):
        with pytest.raises(FFError):
            self.writer.write(payload, mode=MERGE)

    @rule()
    def send(self):
        while self.writer.queued:
            self.writer.queued = False
            batch = self.writer._next_batch()
            if batch is not None:
                self.connection.append(batch)

    @rule()
    def asked_without_need(self):
        self.writer.queued = False
        batch = self.writer._next_batch()
        if batch is not None:
            self.connection.append(batch)

    @rule(
        refusals=st.lists(
            st.sampled_from([None, None, OOM, hiredis.ReplyError("BUSY running a script")]),
            min_size=1,
            max_size=5,
        )
    )
    def answer(self, refusals):
        for refusal in refusals:
            if self.connection:
                batch = self.connection.pop(0)
                reply = refusal or self.server.append(arguments_of(batch.message))
                error = self.writer._acknowledge(batch, reply)
                assert error is None or refusal is not None
                assert self.failed or self.writer.error is None

    @precondition(lambda self: self.connection)
    @rule(data=st.data())
    def lose_connection(self, data):
        reached = data.draw(st.integers(0, len(self.connection)))
        for batch in self.connection[:reached]:
            if data.draw(st.booleans()):
                continue  # the server refused it
            self.server.append(arguments_of(batch.message))
        self.connection.clear()
        self.writer._requeue()

    @rule()
    def seal_soon(self):
        self.writer._seal_soon()

    @precondition(lambda self: not self.failed)
    @rule(look=st.booleans())
    def look(self, look):
        if look:
            assert (
                len(self.writer._unstored_frames()) == len(self.written) - self.writer.last_sequence
            )

    @precondition(lambda self: not self.failed and self.written)
    @rule(reply=st.sampled_from([[0, b"lease_expired"], None]))
    def fail(self, reply):
        self.failed = True
        acknowledged = self.writer.last_sequence
        self.writer._fail(LeaseExpired())
        unstored = self.writer.error.unstored
        assert [(f.sequence, f.payload, f.frame_type, f.mode) for f in unstored] == [
            (number, frame.payload, frame.frame_type, frame.mode.wire)
            for number, frame in enumerate(self.written, 1)
            if number > acknowledged
        ]

    @invariant()
    def nothing_is_lost_or_invented(self):
        payloads = [frame.payload for frame in self.server.frames[-20:]]
        stored_count = len(self.server.frames)
        first = max(stored_count - 20, 0)
        assert payloads == [frame.payload for frame in self.written[first:stored_count]]
        if hasattr(self, "writer"):
            assert self.writer.last_sequence <= stored_count

    def teardown(self):
        if not hasattr(self, "writer") or self.failed:
            return
        # From here on everything works, and the shell does nothing but what it is told.
        for _ in range(10_000):
            self.send()
            if self.connection:
                self.answer([None])
            elif not self.writer.queued and self.writer.lingers:
                self.writer.lingers = 0
                self.writer._seal_soon()
            elif not self.writer.queued:
                break
        assert self.writer._idle, "the writer is stuck"
        assert self.writer.unacknowledged_bytes == 0
        assert len(self.server.frames) == len(self.written)
        self.writer._seal_last()
        self.send()
        self.answer([None])
        assert self.writer._idle
        assert [frame.payload for frame in self.server.frames] == [f.payload for f in self.written]
        self.server.check_visible_chain()
        if self.text:
            document = fold(self.server.summary)
            assert json.loads(document.document_json) == {"text": self.text}
            assert document.version == self.writer.summary_version


Streams.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestStreams = Streams.TestCase
