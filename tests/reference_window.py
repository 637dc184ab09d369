"""What ``ff_fast._hot.window`` must do, written the slow and obvious way: the tests' oracle.

It remembers the id of every acknowledged batch and looks at all of them each time. The rate is not
its business: the number of frames to keep is passed in.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stored:
    """The last id of an acknowledged batch, and how many live frames were stored up to it."""

    count: int
    ms: int
    sequence: int


@dataclass
class Window:
    ttl_ms: int
    floor: int
    ceiling: int
    sealed_count: int = 0
    stored_count: int = 0
    batches: list[Stored] = field(default_factory=list)
    must_renew: bool = True
    renewed_us: int = 0

    def widen(self, ttl_ms: int, floor: int, ceiling: int) -> None:
        self.must_renew = self.must_renew or ttl_ms > self.ttl_ms
        self.ttl_ms = max(self.ttl_ms, ttl_ms)
        self.floor = max(self.floor, floor)
        self.ceiling = max(self.ceiling, ceiling)

    def may_drop(self, batch: Stored, count: int, frames: int, server_ms: int) -> bool:
        remaining = self.sealed_count + count - batch.count
        old = server_ms - batch.ms >= self.ttl_ms
        return remaining >= self.ceiling or (remaining >= frames and old)

    def first_kept(self, count: int, frames: int, server_ms: int) -> tuple[int, int]:
        first = (0, 0)
        for batch in self.batches:
            if not self.may_drop(batch, count, frames, server_ms):
                break
            first = batch.ms, batch.sequence + 1
        return first

    def renew_due(self, has_frames: bool, now_us: int) -> bool:
        old = now_us - self.renewed_us >= self.ttl_ms * 1000 / 4
        return self.must_renew or (has_frames and old)

    def sealed(self, count: int, renews: bool, now_us: int) -> None:
        self.sealed_count += count
        if renews:
            self.must_renew, self.renewed_us = False, now_us

    def mark(self, count: int, ms: int, sequence: int, renewed: bool, now_us: int) -> None:
        self.stored_count += count
        self.batches.append(Stored(self.stored_count, ms, sequence))
        if not renewed and now_us - self.renewed_us > self.ttl_ms * 1000:
            self.must_renew = True
