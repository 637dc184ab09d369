"""Both shells offer the same names, with the same parameters and the same words."""

import inspect
import pickle
import re

import pytest

import ff_fast
from ff_fast import aio

CLASSES = (
    "ValkeyBackend", "Writer", "Task", "LeaseKeeper", "OpenedStream", "Tail", "Follow", "Completions",
)  # fmt: skip

# The same thing under the name that Python's own protocols give it.
ASYNC_NAMES = {"aclose": "close"}


def public(cls):
    """Public names of a class, those of the asyncio shell as in the blocking one."""
    names = {name for name in dir(cls) if not name.startswith("_")}
    return {ASYNC_NAMES.get(name, name) for name in names} if cls.__module__ else names


def member(shell, cls, name):
    found = getattr(shell, cls)
    if shell is aio and not hasattr(found, name):
        name = next(a for a, b in ASYNC_NAMES.items() if b == name)
    return inspect.getattr_static(found, name)


def pairs():
    for cls in CLASSES:
        for name in sorted(public(getattr(ff_fast, cls)) & public(getattr(aio, cls))):
            yield cls, name


@pytest.mark.parametrize("cls", CLASSES)
def test_names(cls):
    assert public(getattr(ff_fast, cls)) == public(getattr(aio, cls))


def test_the_module_of_the_shell_names_its_classes():
    assert set(aio.__all__) == set(CLASSES)


@pytest.mark.parametrize("cls, name", list(pairs()))
def test_parameters_and_words(cls, name):
    ours, theirs = member(ff_fast, cls, name), member(aio, cls, name)
    assert type(ours) is type(theirs) or (cls, name) == ("ValkeyBackend", "closed")
    ours, theirs = (getattr(found, "__func__", found) for found in (ours, theirs))
    assert words(ours) == words(theirs)
    if callable(ours):
        assert parameters(ours) == parameters(theirs)


def words(found):
    """The documentation, without the lines that say how to wait."""
    text = inspect.cleandoc(found.__doc__ or "")
    assert text, "no documentation"
    assert "See :meth:" not in text
    lines = (line for line in text.splitlines() if "async with" not in line)
    return re.sub(r"\n\n+", "\n\n", "\n".join(lines))


def parameters(found):
    signature = inspect.signature(found)
    return [(p.name, p.kind, p.default, str(p.annotation)) for p in signature.parameters.values()]


@pytest.mark.parametrize("cls", CLASSES)
@pytest.mark.parametrize("shell", [ff_fast, aio])
def test_classes_have_words(shell, cls):
    assert getattr(shell, cls).__doc__


@pytest.mark.parametrize("shell", [ff_fast, aio])
def test_a_bound_operation_looks_like_a_method(shell):
    complete = shell.ValkeyBackend.complete
    assert complete.__name__ == "complete"
    # So pickle finds it by its name.
    assert pickle.loads(pickle.dumps(complete)) is complete
    signature = inspect.signature(complete)
    assert list(signature.parameters)[:4] == ["self", "handle", "payload", "last_sequence"]
    assert list(signature.parameters)[4:] == ["durability", "durability_timeout"]
    assert signature.return_annotation == "None"
    assert "Calling it again is safe." in complete.__doc__
    assert inspect.iscoroutinefunction(complete) == (shell is aio)


@pytest.mark.parametrize("name", ["run_worker", "supervise", "append_frame", "close"])
def test_what_waits_is_a_coroutine_function(name):
    assert inspect.iscoroutinefunction(getattr(aio.ValkeyBackend, name))
    assert not inspect.iscoroutinefunction(getattr(ff_fast.ValkeyBackend, name))
