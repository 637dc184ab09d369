"""Binding: a shell's methods take name, signature and documentation from the core's operations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar

if TYPE_CHECKING:
    from ff_fast._core.deployment import Deployment

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")


class OnDeployment(Protocol):
    """A backend, as far as binding needs it."""

    @property
    def _deployment(self) -> Deployment: ...


S = TypeVar("S", bound=OnDeployment)
F = TypeVar("F", bound=Callable[..., Any])


def bind(
    make: Callable[Concatenate[Deployment, P], R],
    carry_out: Callable[[S, R], T],
    returns: str | None = None,
    owner: str = "Operations",
) -> Callable[Concatenate[S, P], T]:
    """Return a method that calls *make* with its arguments and passes the result to *carry_out*.

    Args:
        make: The operation of the core.
        carry_out: The shell's part.
        returns: Annotation of the result; None takes the operation's.
        owner: Name of the class that gets the method.
    """

    def method(self: S, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return carry_out(self, make(self._deployment, *args, **kwargs))

    method.__module__ = carry_out.__module__
    return dressed(owner, method, make, returns)


HANDLER = inspect.Parameter(
    "handler", inspect.Parameter.POSITIONAL_ONLY, annotation="Handler | Worker"
)
"""What a worker's method takes in front of the operation's parameters."""


def dressed(
    owner: str,
    method: F,
    make: Callable[..., object],
    returns: str | None = None,
    first: inspect.Parameter | None = None,
    *,
    hidden: int = 1,
) -> F:
    """Give *method* the name, the documentation and the signature of *make*, and return it.

    Args:
        owner: Name of the class that gets the method.
        method: A function whose first parameter is ``self``.
        make: The operation.
        returns: Annotation of the result. None takes that of *make*, without the ``Call`` around it.
        first: Extra parameter of the shell, before those of *make*.
        hidden: Number of leading parameters of *make* that the shell fills in.
    """
    declared = inspect.signature(make)
    if returns is None:
        whole = str(declared.return_annotation)
        inner = re.fullmatch(r"(?:Call|Wait)\[(.*)\]", whole)
        returns = inner[1] if inner else whole
    parameters = list(declared.parameters.values())[hidden:]
    if first is not None:
        parameters.insert(0, first)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    method.__name__ = make.__name__
    method.__qualname__ = f"{owner}.{make.__name__}"
    method.__doc__ = make.__doc__
    method.__signature__ = declared.replace(  # type: ignore[attr-defined]
        parameters=[itself, *parameters], return_annotation=returns
    )
    return method
