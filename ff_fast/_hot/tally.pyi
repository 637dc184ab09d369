from typing import Any, Self, final

@final
class Tally:
    """The counters of one backend.

    Attributes:
        tails_open: How many readers are listening to an execution.
    """

    @property
    def tails_open(self) -> int: ...
    def took(self, items: list[Any]) -> None:
        """Count the items of one answer."""
    def missed(self, reason: str) -> None:
        """Count a gap that a reader is told of."""
    def note(self, event: str) -> None:
        """Count something that happens once in a call at most."""
    def snapshot(self) -> dict[str, object]:
        """Return all counts by name; of frames by mode, of values as count, total and buckets."""

@final
class Listening:
    """A reader that listens: it counts as open until it is let go."""

    def __new__(cls, tally: Tally) -> Self: ...
