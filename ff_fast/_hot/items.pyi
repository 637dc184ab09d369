from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, Self, TypeVar, final

from typing_extensions import disjoint_base

from ff_fast._hot.feed import Bell, Inbox

_T = TypeVar("_T")

@disjoint_base
class Items(Generic[_T]):
    """Base of both shells' readers: holds the items of the answers that were read."""

    def __new__(cls, *_: object, **__: object) -> Self: ...
    @classmethod
    def __class_getitem__(cls, item: Any) -> type[Self]: ...  # noqa: ANN401 - as typing has it
    @property
    def last(self) -> _T | None:
        """The item that was taken last; None before the first."""

    @property
    def _empty(self) -> bool:
        """Whether nothing is left."""

    def _put(self, items: list[_T]) -> None:
        """Take over the items of one answer; none may be left of the one before."""

    @property
    def _rest(self) -> list[_T]:
        """The items that are left, as a list; ``del`` takes them."""

    @_rest.deleter
    def _rest(self) -> None: ...

@disjoint_base
class Turn:
    """Lets one in at a time: ``with turn`` raises the error that *error* returns while one is in.

    In C, because an interrupt can strike between the call that takes a lock and the ``try`` behind
    it, and leave the lock taken for ever.
    """

    def __init__(self, error: Callable[[], Exception]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

class BlockingItems(Items[_T]):
    """An iterator. ``_fill()`` of the subclass puts the items of an answer; false says the end."""

    def __iter__(self) -> Self: ...
    def __next__(self) -> _T: ...

@disjoint_base
class AsyncItems(Items[_T]):
    """An asynchronous iterator. ``_next_item()`` of the subclass is awaited if nothing is left.

    With an inbox, what is pushed is taken and waited for without it: it is awaited where a read is
    due or under way, where the timer of the shell would be late, on another loop, and behind the
    end.
    """

    _looks_at: float
    def __aiter__(self) -> Self: ...
    def __anext__(self) -> Coroutine[Any, Any, _T]: ...
    def _pop(self) -> _T:
        """Return the next item. There must be one."""

    def _take_ready(self) -> list[_T]:
        """Take all items that are there without waiting, of the last answer or pushed."""

    def _attach(self, inbox: Inbox, bell: Bell) -> None:
        """Take pushes from *inbox* from here on; *bell*, its ``on_wake``, says when there are any."""

    def _detach(self) -> None:
        """Take no pushes any more, and wake the task that waits for one."""

@final
class NextItem(Generic[_T]):
    """A coroutine that returns the next item, which is taken when it runs.

    One that is cancelled before it began has taken none. It is a class because Python's coroutine
    for each item costs twice as much.
    """

    def __await__(self) -> Generator[Any, Any, _T]: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Any: ...  # noqa: ANN401 - as a coroutine's
    def send(self, value: object) -> Any:  # noqa: ANN401 - as a coroutine's
        """Run until it waits, or return by ``StopIteration``."""

    def throw(self, *error: Any) -> Any:  # noqa: ANN401 - as a coroutine's
        """Raise *error* where it waits."""

    def close(self) -> None:
        """End it where it waits."""
