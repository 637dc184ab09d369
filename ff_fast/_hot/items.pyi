from collections.abc import Awaitable
from typing import Any, Generic, Self, TypeVar

from typing_extensions import disjoint_base

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

    def _take_all(self) -> list[_T]:
        """Return the items that are left, as a list."""

class BlockingItems(Items[_T]):
    def __iter__(self) -> Self: ...
    def __next__(self) -> _T: ...

class AsyncItems(Items[_T]):
    def __aiter__(self) -> Self: ...
    def __anext__(self) -> Awaitable[_T]: ...
    def _pop(self) -> _T:
        """Return the next item. There must be one."""

async def next_item(items: AsyncItems[_T]) -> _T:
    """Return the next item, taken when this is awaited; cancelled before that, none is taken."""
