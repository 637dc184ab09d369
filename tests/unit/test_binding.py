"""Methods that are made of operations: the call, the signature, the words."""

import inspect

from ff_fast._core.binding import bind, dressed
from ff_fast._core.handlers import of_handler


class Call:
    """As an annotation of an operation names it."""


def operation(on: "object", first: "int", *, second: "str" = "b") -> "Call[list[int]]":
    """What it does."""
    return on, first, second


def plain(on: "object", first: "int") -> "Request":  # noqa: F821 - a name in an annotation
    """What is asked for."""
    return on, first


class Backend:
    _deployment = "the deployment"

    bound = bind(operation, lambda self, call: (self, call))
    named = bind(plain, lambda self, call: call, "Writer")
    handled = of_handler(plain, lambda self, handler, call: (handler, call))


def test_a_method_makes_the_operation_on_its_deployment_and_carries_it_out():
    backend = Backend()
    assert backend.bound(1) == (backend, ("the deployment", 1, "b"))
    assert backend.bound(first=1, second="c") == (backend, ("the deployment", 1, "c"))
    assert backend.named(1) == ("the deployment", 1)


def test_a_handler_stands_in_front():
    assert Backend().handled(print, first=1) == (print, ("the deployment", 1))


def test_a_method_has_the_name_and_the_words_of_its_operation():
    for method in (Backend.bound, Backend.named):
        assert method.__name__ in ("operation", "plain")
        assert method.__qualname__ == f"Operations.{method.__name__}"
    assert Backend.bound.__doc__ == "What it does."


def test_a_method_has_the_signature_of_its_operation():
    def shown(method):
        return str(inspect.signature(method)).replace("'", "")

    assert shown(Backend.bound) == "(self, /, first: int, *, second: str = b) -> list[int]"
    assert shown(Backend.named) == "(self, /, first: int) -> Writer"
    assert shown(Backend.handled) == "(self, handler: Handler | Worker, /, first: int) -> None"


def test_the_result_is_what_the_call_answers():
    def wait(on: "object") -> "Wait[None]":  # noqa: F821 - a name in an annotation
        """Wait."""

    def of(make):
        return inspect.signature(dressed("Backend", lambda self: None, make)).return_annotation

    assert (of(operation), of(wait), of(plain)) == ("list[int]", "None", "Request")


def test_a_shell_may_fill_in_several_parameters():
    method = dressed("Backend", lambda self: None, operation, hidden=2)
    assert list(inspect.signature(method).parameters) == ["self", "second"]
    assert method.__qualname__ == f"Backend.{operation.__name__}"
