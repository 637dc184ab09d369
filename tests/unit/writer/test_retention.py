"""How long the live window of a writer is, and when it is trimmed."""

import itertools
import random
import time

import pytest

from ff_fast._hot.writer import arguments_of

from ...reference_writer import parse
from .core import DURABLE, LIVE, NOW_MS, TEXT, Shell, keys_named, keys_of, live, position, tail_of


class TestRetention:
    def test_first_live_batch_sets_the_expiry(self):
        writer = Shell(live(4000))
        writer.write(b"x", mode=DURABLE)
        batch = writer.take()
        assert tail_of(batch) == {}
        writer._acknowledge(batch, position(batch))
        writer.write(b"x")
        assert tail_of(writer.take()) == {
            b"P": [b"8000"],
            b"H": [b"1"],
            b"E": [b"0.000 4000 64 16384"],
        }

    def test_patches_alone_have_a_window_too(self):
        writer = Shell(TEXT)
        writer.write(b"x")
        assert tail_of(writer.take())[b"P"] == [b"60000"]
        assert writer.window_frames == 64

    def test_first_best_effort_frame_replaces_the_window_of_patches(self):
        writer = Shell(live(5000, 10, 20))
        writer.write(b"x", mode=TEXT)
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer.write(b"x")
        assert tail_of(writer.take())[b"P"] == [b"10000"]
        assert writer.window_frames <= 20

    def test_patches_do_not_narrow_a_window(self):
        writer = Shell(live(5000, 100_000, 200_000))
        writer.write(b"x")
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer.write(b"x", mode=TEXT)
        batch = writer.take()
        assert b"P" not in tail_of(batch)
        assert writer.window_frames == 100_000

    def test_expiry_is_renewed_four_times_a_ttl(self):
        writer = Shell(live(400))
        renewed = []
        end = time.monotonic() + 1.0
        while time.monotonic() < end:
            writer.write(b"x")
            sealed = time.monotonic()
            batch = writer.take()
            if b"P" in tail_of(batch):
                renewed.append(sealed)
            writer._acknowledge(batch, position(batch))
            time.sleep(0.001)
        pauses = [b - a for a, b in itertools.pairwise(renewed)]
        assert len(pauses) >= 4
        assert min(pauses) > 0.09

    def test_longer_ttl_renews_at_once(self):
        writer = Shell(live(1000))
        for ttl_ms, due in [(1000, True), (900, False), (60_000, True), (1000, False)]:
            writer.write(b"x", mode=live(ttl_ms))
            batch = writer.take()
            assert (b"P" in tail_of(batch)) is due
            writer._acknowledge(batch, position(batch))

    def test_expiry_is_renewed_after_a_batch_that_took_longer_than_the_ttl(self):
        # The key died meanwhile, and the batch makes a new one, without an end.
        writer = Shell(live(200))
        writer.write(b"x")
        batch = writer.take()
        assert b"P" in tail_of(batch)
        writer._acknowledge(batch, position(batch))
        writer.write(b"y")
        batch = writer.take()
        assert b"P" not in tail_of(batch)
        writer._requeue()
        time.sleep(0.21)
        assert writer.take() is batch
        writer._acknowledge(batch, position(batch))
        assert not writer._idle
        batch = writer.take()
        assert (batch.first_sequence, batch.frame_count) == (3, 0)
        assert tail_of(batch) == {b"P": [b"400"]}
        assert keys_of(batch) == keys_named("head live")
        writer._acknowledge(batch, position(batch))
        assert writer._idle

    def test_batch_behind_a_late_one_renews_whatever_it_holds(self):
        writer = Shell(live(200))
        writer.write(b"x")
        batch = writer.take()
        writer._acknowledge(batch, position(batch))
        writer.write(b"y")
        batch = writer.take()
        writer.write(b"log", mode=DURABLE)
        time.sleep(0.21)
        writer._acknowledge(batch, position(batch))
        batch = writer.take()
        assert tail_of(batch) == {b"P": [b"400"], b"H": [b""]}
        assert batch.frame_count == 1
        # The window's key is not one that a durable frame asks for.
        assert keys_of(batch) == keys_named("head log live")
        writer._acknowledge(batch, position(batch))
        assert writer._idle

    def test_log_is_trimmed_now_and_then(self):
        writer = Shell(retention_maxlen=777)
        trims = []
        for i in range(1000):
            writer.write(b"x")
            writer.write(b"x", mode=LIVE)
            batch = writer.take()
            if b"K" in tail_of(batch):
                assert tail_of(batch)[b"K"] == [b"777"]
                trims.append(i)
            writer._acknowledge(batch, position(batch))
        assert trims == list(range(255, 1000, 256))

    def test_log_of_an_earlier_writer_is_trimmed_at_once(self):
        writer = Shell(DURABLE, (NOW_MS, 5, 5, b"", 0))
        writer.write(b"x")
        assert tail_of(writer.take()) == {b"K": [b"10000"]}

    def test_estimate_is_stored_once_a_second(self):
        writer = Shell(LIVE)
        with_estimate = 0
        for _ in range(200):
            writer.write(b"x")
            batch = writer.take()
            with_estimate += b"E" in tail_of(batch)
            writer._acknowledge(batch, position(batch))
        assert with_estimate == 1

    def test_estimate_is_handed_over(self):
        writer = Shell(live(1000, 64, 100_000), (NOW_MS, 3, 0, b"1000.000", 0))
        writer.write(b"x")
        writer.take()
        assert writer.window_frames == pytest.approx(2000, rel=0.01)
        assert writer.rate_hz == pytest.approx(1000, rel=0.1)

    @pytest.mark.parametrize("alpha", [5e-324, 1e-12, 1.0])
    def test_any_alpha_gives_a_rate(self, alpha):
        writer = Shell(live(1000, alpha=alpha))
        for _ in range(3):
            writer.write(b"x")
            batch = writer.take()
            assert float(tail_of(batch).get(b"E", [b"0"])[0].split()[0]) >= 0
            writer._acknowledge(batch, position(batch))
            assert 0 <= writer.rate_hz < float("inf")


class Window:
    """The live stream of a server whose clock the test sets: what trims may and may not do."""

    def __init__(self, ttl_ms, floor, ceiling):
        self.ttl_ms, self.floor, self.ceiling = ttl_ms, floor, ceiling
        self.kept: list[tuple[int, int]] = []
        self.longest = 0

    def apply(self, batch, now_ms, wanted):
        request = parse(arguments_of(batch.message))
        for frame in request.frames:
            if frame.mode == b"best_effort":
                self.kept.append((now_ms, frame.sequence))
        if b"T" in request.tail:
            ms, sequence = map(int, request.tail[b"T"][0].split(b"-"))
            cut = [frame for frame in self.kept if frame < (ms, sequence)]
            self.kept = self.kept[len(cut) :]
            if cut and now_ms - cut[-1][0] < self.ttl_ms:
                assert len(self.kept) >= self.ceiling, "a frame younger than ttl was trimmed"
            assert len(self.kept) >= min(wanted, self.ceiling), "fewer frames than K are left"
        self.longest = max(self.longest, len(self.kept))


class TestTrims:
    @pytest.mark.parametrize("seed", range(6))
    def test_window(self, seed):
        rng = random.Random(seed)
        ttl_ms, floor = rng.choice([(1000, 64), (5000, 200), (200, 1), (15_000, 64)])
        ceiling = max(floor, rng.choice([64, 300, 2000]))
        writer, window = Shell(live(ttl_ms, floor, ceiling)), Window(ttl_ms, floor, ceiling)
        now_ms = stored_ms = NOW_MS
        for _ in range(1500):
            for _ in range(rng.choice([1, 1, 5, 40])):
                writer.write(b"x", mode=rng.choice([None, None, None, DURABLE]))
            # The server's clock runs ahead of ours here, as after a pause.
            now_ms += rng.choice([0, 1, ttl_ms // 200, ttl_ms // 20, ttl_ms // 2])
            batch = writer.take()
            window.apply(batch, now_ms, writer.window_frames)
            if batch.frame_count:
                stored_ms = now_ms
            # A renewal alone is answered with the frame that is there.
            writer._acknowledge(batch, position(batch, stored_ms))
        # A sixteenth of the window, and the batches that are being sent.
        assert window.longest <= ceiling + ceiling // 16 + 2 * 40

    def test_slow_stream_keeps_k_frames(self):
        # K counts: everything is older than ttl, and the rate has faded.
        writer, window = Shell(live(1000, 64, 16_384, 1.0)), Window(1000, 64, 16_384)
        now_ms = NOW_MS
        for _ in range(300):
            writer.write(b"x")
            now_ms += 500
            batch = writer.take()
            window.apply(batch, now_ms, 64)
            writer._acknowledge(batch, position(batch, now_ms))
        time.sleep(0.2)
        for _ in range(2):
            for _ in range(40):
                writer.write(b"x")
            now_ms += 5000
            batch = writer.take()
            window.apply(batch, now_ms, 64)
            writer._acknowledge(batch, position(batch, now_ms))
            time.sleep(0.2)
        writer.write(b"x")
        batch = writer.take()
        assert writer.window_frames == 64
        window.apply(batch, now_ms, 64)
        assert 64 <= len(window.kept) <= 64 + 41

    def test_frames_of_an_earlier_writer_leave_too(self):
        writer = Shell(live(100, 5, 50), (NOW_MS, 1000, 0, b"", 0))
        cuts = []
        for i in range(60):
            writer.write(b"x")
            batch = writer.take()
            cuts += tail_of(batch).get(b"T", [])
            writer._acknowledge(batch, position(batch, NOW_MS + i))
        assert cuts[0] == b"%d-1001" % NOW_MS

    @pytest.mark.parametrize("ms", [0, NOW_MS - 5])
    def test_answer_to_a_repeat_makes_nothing_look_older(self, ms):
        # A frame that was trimmed meanwhile has no id: the server says 0.
        writer = Shell(live(1000, 1, 1000))
        for i in range(20):
            writer.write(b"x")
            batch = writer.take()
            assert b"T" not in tail_of(batch)
            writer._acknowledge(batch, position(batch, ms if i % 2 else NOW_MS))
        assert writer.last_id == f"{NOW_MS}-20"
