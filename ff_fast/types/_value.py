"""The base of all values, a frozen class, and checks of fields that several topics share."""

from __future__ import annotations

from operator import attrgetter
from typing import TYPE_CHECKING, TypeVar, dataclass_transform

from ff_fast.errors import InvalidInput, InvalidPayload, InvalidType, check_int

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import Field
    from typing import Any, ClassVar, Self

_T = TypeVar("_T")

DEFAULT_PAYLOAD_LIMIT = 65_536
"""Largest payload of a frame in bytes, unless a backend's configuration says otherwise."""

LARGEST_PAYLOAD_LIMIT = 1 << 20
"""Largest value of that limit; the server functions refuse more."""

MAX_U32 = 2**32 - 1
MAX_SECONDS = 31_536_000.0
"""Longest duration accepted, a year: beyond it a timeout is a mistake in units."""


# -- checks ----------------------------------------------------------------------------------------


def check_type(name: str, value: object, wanted: type[_T]) -> _T:
    """Return *value* if it is a *wanted*; nothing is converted.

    Raises:
        InvalidType: *value* has another type.
    """
    if not isinstance(value, wanted):
        raise InvalidType(f"{name} must be {wanted.__name__}, not {type(value).__name__}.")
    return value


def check_flag(name: str, value: object) -> None:
    """Raise :class:`~ff_fast.errors.InvalidType` unless *value* is True or False itself."""
    if type(value) is not bool:
        raise InvalidType(f"{name} must be bool, not {type(value).__name__}.")


def check_optional_int(name: str, value: object, low: int, high: int) -> None:
    """Raise as :func:`~ff_fast.errors.check_int` does, unless *value* is None."""
    if value is not None:
        check_int(name, value, low, high)


def seconds(name: str, value: object, *, zero: bool = True) -> float:
    """Return a duration in seconds; *value* is a number of seconds or a ``timedelta``.

    Args:
        name: Name of the argument, for the error.
        value: What the caller passed.
        zero: Whether 0 is accepted.

    Raises:
        InvalidInput: *value* is negative, not finite, longer than a year, or 0 if *zero* is False.
        InvalidType: *value* is neither a number nor a ``timedelta``.
    """
    if type(value) not in (int, float):
        total = _total_seconds(value)
        if total is None:
            raise InvalidType(
                f"{name} must be a number of seconds or a timedelta, not {type(value).__name__}."
            )
        value = total
    if not isinstance(value, (int, float)) or not 0 <= value <= MAX_SECONDS:
        raise InvalidInput(f"{name} must be from 0 to {MAX_SECONDS:.0f} seconds.")
    if value == 0 and not zero:
        raise InvalidInput(f"{name} must be longer than 0 seconds.")
    return float(value)


def duration_ms(name: str, value: object) -> int:
    """Return a duration of seconds or a ``timedelta`` as whole milliseconds, rounded; None is 0.

    Raises:
        InvalidInput: *value* is negative, not finite, or longer than a year.
        InvalidType: *value* is neither a number nor a ``timedelta``.
    """
    return 0 if value is None else round(seconds(name, value) * 1000)


def milliseconds(name: str, value: object, low: int, high: int) -> int:
    """Return a duration whose unit is milliseconds; *value* is an ``int`` or a ``timedelta``, which is rounded.

    Raises:
        InvalidInput: It is below *low* or above *high* milliseconds.
        InvalidType: It is neither an ``int`` nor a ``timedelta``.
    """
    if type(value) is not int:
        total = _total_seconds(value)
        if total is None:
            raise InvalidType(
                f"{name} must be an int of milliseconds or a timedelta, not {type(value).__name__}."
            )
        value = round(total * 1000)
    return check_int(name, value, low, high)


def _total_seconds(value: object) -> float | None:
    # An isinstance check would import datetime.
    method = getattr(value, "total_seconds", None)
    total = method() if callable(method) else None
    return total if isinstance(total, float) else None


def payload_bytes(payload: object, name: str = "payload") -> bytes:
    """Return a payload as ``bytes``, copied if the caller could change it later.

    Accepts ``bytes``, ``bytearray``, ``memoryview`` and ``str`` (encoded as UTF-8).

    Raises:
        InvalidPayload: Text that cannot be encoded (a lone surrogate), or a released ``memoryview``.
        InvalidType: Anything else.
    """
    if isinstance(payload, (bytes, bytearray, memoryview)):
        try:
            return bytes(payload)
        except ValueError:
            raise InvalidPayload(f"{name} is a memoryview that was released.") from None
    if not isinstance(payload, str):
        raise InvalidType(
            f"{name} must be bytes, bytearray, memoryview or str, not {type(payload).__name__}."
        )
    encoded = utf8(payload)
    if encoded is None:
        raise InvalidPayload(f"{name} contains a lone surrogate; encode the text yourself.")
    return encoded


def utf8(text: str) -> bytes | None:
    """Return *text* as UTF-8; None if it has a lone surrogate."""
    # The error holds the text, and raising another one here would chain it.
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError:
        return None


# -- frozen values ----------------------------------------------------------------------------------
#
# Type checkers see frozen dataclasses with slots, and the functions of ``dataclasses`` accept these values. The
# decorator itself takes 0.65 ms a class, for all classes a third of the import time of ff_fast. The metaclass takes
# 0.04 ms a class.

set_field = object.__setattr__
"""Sets a field of a frozen value, in its ``__post_init__`` only."""


class _ValueType(type):
    """Makes slots of annotations and, unless the class has one, an ``__init__``, as a dataclass does."""

    def __new__(
        cls, name: str, bases: tuple[type, ...], namespace: dict[str, object]
    ) -> _ValueType:
        fields: list[str] = []
        defaults: dict[str, object] = {}
        keyword_only: set[str] = set()
        annotations: dict[str, str] = namespace.get("__annotations__", {})  # type: ignore[assignment]
        if bases:
            parameters = ["self"]
            scope: dict[str, object] = {"_set": set_field}
            for field, annotation in annotations.items():
                if annotation == "KW_ONLY":
                    parameters.append("*")
                elif not annotation.startswith("ClassVar"):
                    fields.append(field)
                    if "*" in parameters:
                        keyword_only.add(field)
                    if field in namespace:
                        defaults[field] = scope[f"_{field}"] = namespace.pop(field)
                        parameters.append(f"{field}=_{field}")
                    else:
                        parameters.append(field)
            if "__init__" not in namespace:
                body = [f"_set(self, {field!r}, {field})" for field in fields]
                if "__post_init__" in namespace:
                    body.append("self.__post_init__()")
                # exec() gets only names from class statements of this package.
                source = f"def __init__({', '.join(parameters)}):\n " + "\n ".join(body)
                exec(source, scope, namespace)  # noqa: S102
                namespace["__init__"].__qualname__ = f"{name}.__init__"  # type: ignore[attr-defined]
            uncompared = namespace.get("_uncompared", ())
            namespace["_key"] = attrgetter(*(name for name in fields if name not in uncompared))  # type: ignore[operator]
            namespace["__match_args__"] = tuple(fields)
            own = {field: annotations[field] for field in fields}
            for attribute in ("__dataclass_fields__", "__dataclass_params__"):
                namespace[attribute] = _Described(attribute, own, defaults, keyword_only)
        namespace["__slots__"] = tuple(fields)
        return super().__new__(cls, name, bases, namespace)


class _Described:
    """A class attribute that ``dataclasses`` reads, computed on first use so that importing it is not needed before."""

    def __init__(
        self,
        attribute: str,
        annotations: dict[str, str],
        defaults: dict[str, object],
        keyword_only: set[str],
    ) -> None:
        self._attribute = attribute
        self._annotations = annotations
        self._defaults = defaults
        self._keyword_only = keyword_only

    def __get__(self, value: object, cls: type[Value]) -> object:
        # Taken from a real dataclass with the same fields, so its private format is not copied here.
        import dataclasses  # noqa: PLC0415 - see above

        fields: list[tuple[str, str, Field[object]]] = []
        for name, annotation in self._annotations.items():
            options: dict[str, object] = {
                "kw_only": name in self._keyword_only,
                "repr": name not in cls._secret,
                "compare": name not in cls._uncompared,
            }
            if name in self._defaults:
                default = self._defaults[name]
                # dataclasses refuses an unhashable default, for instance a mapping.
                hashable = type(default).__hash__ is not None
                options["default" if hashable else "default_factory"] = (
                    default if hashable else lambda default=default: default
                )
            made: Field[object] = dataclasses.field(**options)  # type: ignore[call-overload]
            fields.append((name, annotation, made))
        # Without an __init__ the order of defaults does not matter. With repr, pprint would show the secret fields.
        twin = dataclasses.make_dataclass(
            cls.__name__, fields, init=False, repr=False, eq=False, frozen=True
        )
        described: object = getattr(twin, self._attribute)
        setattr(cls, self._attribute, described)
        return described


@dataclass_transform(frozen_default=True)
class Value(metaclass=_ValueType):
    """Base of all values: frozen, compared by content, copied by reference."""

    _key: ClassVar[Callable[[object], object]]
    _secret: ClassVar[tuple[str, ...]] = ()  # fields hidden by repr
    _uncompared: ClassVar[
        tuple[str, ...]
    ] = ()  # fields ignored by == and hash: positions, not content
    __match_args__: ClassVar[tuple[str, ...]] = ()
    if TYPE_CHECKING:
        __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen; use replace().")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen.")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return type(self)._key(self) == type(self)._key(other)

    def __hash__(self) -> int:
        return hash((type(self), type(self)._key(self)))  # noqa: SLF001 - its own

    def __repr__(self) -> str:
        shown = (
            f"{name}={_shown(value)}"
            for name, value in self._fields().items()
            if name not in self._secret
        )
        return f"{type(self).__name__}({', '.join(shown)})"

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return _remake, (type(self), self._fields())

    def replace(self, **changes: object) -> Self:
        """Return a copy with some fields changed, checked like any other value."""
        return _remake(type(self), {**self._fields(), **changes})

    __replace__ = replace

    def _fields(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in type(self).__match_args__}


def _remake(cls: Callable[..., _T], fields: dict[str, object]) -> _T:
    return cls(**fields)


def _shown(value: object) -> str:
    return f"<{len(value)} bytes>" if isinstance(value, bytes) else repr(value)
