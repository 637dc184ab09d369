from typing_extensions import disjoint_base

def window_size(rate_hz: float, ttl_ms: int, floor: int, ceiling: int) -> int:
    """Return K, how many frames the window keeps: ``clamp(ceil(rate * ttl * 2), floor, ceiling)``.

    Args:
        rate_hz: Frames a second, finite and not negative.
        ttl_ms: How long a frame stays visible, in ms, not negative.
        floor: Least K; at most *ceiling*.
        ceiling: Greatest K.

    Raises:
        InvalidInput: *rate_hz* is negative or not finite, *ttl_ms* is negative, or *floor* is above
            *ceiling*.
    """

@disjoint_base
class RateEstimator:
    """Estimates frames a second from the times of appends (see the module for the formula).

    Args:
        ema_alpha: Share of the latest 100 ms in the estimate, in (0, 1].
        rate_hz: Estimate of an earlier writer to continue from, in frames a second; 0 for none.
        now_us: The time of *rate_hz*, in µs of any monotonic clock.

    Raises:
        InvalidInput: *ema_alpha* or *rate_hz* is out of range.
    """

    def __init__(self, ema_alpha: float = 0.2, rate_hz: float = 0.0, now_us: int = 0) -> None: ...
    def record(self, count: int, now_us: int) -> None:
        """Count frames that were appended at *now_us*.

        Args:
            count: How many, not negative.
            now_us: When, in µs of the same clock; an earlier time than the latest one is taken as
                the latest.

        Raises:
            InvalidInput: *count* is negative.
        """
    def rate_hz(self, now_us: int) -> float:
        """Return the estimate at *now_us*, in frames a second."""
