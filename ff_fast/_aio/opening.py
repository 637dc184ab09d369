"""Objects that open with ``async with`` or ``await``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from ff_fast.errors import InvalidInput

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from types import TracebackType


class _Closing(Protocol):
    """An asynchronous context manager that enters as itself."""

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
        /,
    ) -> object: ...


T = TypeVar("T", bound=_Closing)


class Opening(Generic[T]):
    """A backend, a writer or a stream that is not open yet; ``await`` and ``async with`` open it and give the object.

    It opens once: what it has opened has an identity on the server, which two objects must not share.
    """

    def __init__(self, opening: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._opening = opening
        self._opened: T | None = None
        self._taken = False

    def __await__(self) -> Generator[Any, None, T]:
        return self._open().__await__()

    async def _open(self) -> T:
        if self._taken:
            raise InvalidInput("This was opened already; make the call again to open another one.")
        self._taken = True
        try:
            return await self._opening()
        except Exception:
            self._taken = False
            raise

    async def __aenter__(self) -> T:
        self._opened = await self
        return await self._opened.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        if self._opened is not None:
            await self._opened.__aexit__(kind, error, where)
