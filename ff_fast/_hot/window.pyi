from typing import final

@final
class LiveWindow:
    """Size, expiry and rate of the live window of one writer (see the module).

    Args:
        ttl_ms: How long a frame stays visible, in ms, at least.
        floor: Least number of frames to keep.
        ceiling: Greatest number of frames to keep.
        ema_alpha: Share of the latest 100 ms in the rate, in (0, 1].
        assumed: The four above are defaults; the first `widen` replaces them.
        rate_hz: Rate that an earlier writer has stored, in frames a second; 0 for none.
        now_us: The time, in µs.
        ms: Last id that is stored, which bounds what an earlier writer left: ms
        sequence: and sequence; 0 for none.

    Raises:
        InvalidInput: *ema_alpha* or *rate_hz* is out of range.
    """

    def __init__(
        self,
        ttl_ms: int,
        floor: int,
        ceiling: int,
        ema_alpha: float = 0.2,
        assumed: bool = False,
        rate_hz: float = 0.0,
        now_us: int = 0,
        ms: int = 0,
        sequence: int = 0,
    ) -> None: ...
    def widen(self, ttl_ms: int, floor: int, ceiling: int, ema_alpha: float, now_us: int) -> int:
        """Keep what best-effort frames of another mode ask for too. The window never narrows, but
        for defaults, which are replaced.
        """
    def first_kept(self, count: int, now_us: int, server_ms: int) -> tuple[int, int]:
        """Count *count* frames of a batch that is sealed now, and return the oldest id to keep.

        Returns:
            ``(ms, sequence)`` of the id; ``(0, 0)`` if nothing may leave that has not left before.
        """
    def renew_due(self, has_frames: bool, now_us: int) -> bool:
        """Whether a batch that is sealed now, with live frames or without, renews the expiry."""
    def take_rate(self, closing: bool, now_us: int) -> bytes | None:
        """Return what to store with a batch that is sealed now: the rate in frames a second, ttl,
        floor and ceiling.

        None within a second of the last time, unless the writer is *closing*.
        """
    def sealed(self, count: int, renews: bool, now_us: int) -> None:
        """A batch with *count* live frames was sealed; whether it renews the expiry."""
    def stored(self, count: int) -> None:
        """A batch with *count* live frames was acknowledged."""
    def mark(self, ms: int, sequence: int, renewed: bool, now_us: int, stored_ms: int = 0) -> None:
        """Add a mark if the last stored id is a step after the previous mark.

        Args:
            ms: The id: ms
            sequence: and sequence, each not below that of any mark.
            renewed: Whether the batch that was acknowledged renewed the expiry.
            now_us: The time, in µs.
            stored_ms: The server's time when it was stored, at the latest: no frame up to it is
                younger. A frame may be younger than its id, whose ms a push has fixed.
        """
    def rate_hz(self, now_us: int) -> float:
        """Return the rate at *now_us*, in frames a second."""
    @property
    def ttl_ms(self) -> int: ...
    @property
    def floor(self) -> int: ...
    @property
    def ceiling(self) -> int: ...
    @property
    def frames(self) -> int: ...
    @property
    def must_renew(self) -> bool: ...
    @property
    def mark_count(self) -> int:
        """How many ids are remembered, at most 32."""
