from collections.abc import Callable, Coroutine, Generator
from typing import Any, Generic, Self, TypeVar, final

from typing_extensions import disjoint_base

from ff_fast._hot.feed import Bell, Inbox

_T = TypeVar("_T")

@disjoint_base
class Items(Generic[_T]):
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
    """Lets one in at a time: ``with turn`` raises the error that *error* returns while one is in."""

    def __init__(self, error: Callable[[], Exception]) -> None: ...
    def __enter__(self) -> None: ...
    def __exit__(self, *_: object) -> None: ...

class BlockingItems(Items[_T]):
    def __iter__(self) -> Self: ...
    def __next__(self) -> _T: ...

@disjoint_base
class AsyncItems(Items[_T]):
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
    """A coroutine that returns the next item, which is taken when it runs."""

    def __await__(self) -> Generator[Any, Any, _T]: ...
    def __iter__(self) -> Self: ...
    def __next__(self) -> Any: ...  # noqa: ANN401 - as a coroutine's
    def send(self, value: object) -> Any:  # noqa: ANN401 - as a coroutine's
        """Run until it waits, or return by ``StopIteration``."""

    def throw(self, *error: Any) -> Any:  # noqa: ANN401 - as a coroutine's
        """Raise *error* where it waits."""

    def close(self) -> None:
        """End it where it waits."""
