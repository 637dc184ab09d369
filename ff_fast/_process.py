"""Hooks of the whole process: forks, and the signals that stop workers."""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import sys
import threading
import time
import weakref
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType

# -- fork ------------------------------------------------------------------------------------------------------------


class Forkable(Protocol):
    """An object with state that is invalid in a forked child."""

    def _forked(self) -> None:
        """Reset the state in the child: no other thread runs there, and locks may stay locked for ever."""


_forkable: weakref.WeakSet[Forkable] = weakref.WeakSet()


def watch_fork(client: Forkable) -> None:
    """Call ``_forked`` of *client* in every forked child, as long as *client* is alive."""
    _forkable.add(client)


def _tell_of_fork() -> None:
    for client in list(_forkable):
        client._forked()


os.register_at_fork(after_in_child=_tell_of_fork)


# -- exit ------------------------------------------------------------------------------------------------------------

EXIT_S = 2.0
"""How long the end of the interpreter waits for frames to be stored, in seconds, for all backends together."""

_EXIT_LOOK_S = 0.002


class Exiting(Protocol):
    """An object with work that the end of the interpreter would drop in silence."""

    def _finish_soon(self) -> None:
        """Begin to finish the work, without waiting."""

    def _finished(self) -> bool:
        """Return whether the work is finished, or can never be."""

    def _warn_of_losses(self) -> None:
        """Warn of the work that is lost."""


_ending: weakref.WeakSet[Exiting] = weakref.WeakSet()
# The process whose end as a child of multiprocessing is watched.
_child: int | None = None


def watch_exit(client: Exiting) -> None:
    """Let *client*, if it is alive, finish its work when the interpreter ends. Daemon threads still run then."""
    global _child  # noqa: PLW0603 - it belongs to the process
    _ending.add(client)
    util = sys.modules.get("multiprocessing.util")
    if util is not None and _child != os.getpid():
        _child = os.getpid()
        if sys.modules["multiprocessing.process"].parent_process() is not None:
            # A forked child of multiprocessing ends without the functions of atexit.
            util.Finalize(None, _tell_of_exit, exitpriority=0)


def _tell_of_exit() -> None:
    clients = list(_ending)
    for client in clients:
        client._finish_soon()
    until = time.monotonic() + EXIT_S
    while time.monotonic() < until and not all(client._finished() for client in clients):
        time.sleep(_EXIT_LOOK_S)
    for client in clients:
        client._warn_of_losses()


atexit.register(_tell_of_exit)


# -- stop signals ----------------------------------------------------------------------------------------------------


_NUMBERS = (signal.SIGTERM, signal.SIGINT)
_stops: list[Callable[[], None]] = []
_before: dict[int, Any] = {}
# Interrupts that came, and those that are for the stops alone.
_interrupts = 0
_ours = 1


def on_stop_signals(stop: Callable[[], None], *, twice: bool = False) -> Callable[[], None]:
    """Call *stop* on SIGTERM and SIGINT; return the function that ends this. Outside the main thread, do nothing.

    Several workers of one loop share the signals. A handler that the program had installed, as a web server has, is
    called after each *stop*; the exit or interrupt that it raises is not. A second SIGINT calls that of Python or asyncio.

    Args:
        stop: Called inside the signal handler, at any point of the program: it must take no lock.
        twice: A second SIGINT is for *stop* too, and a third calls the other handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return lambda: None
    global _interrupts, _ours  # noqa: PLW0603 - signals belong to the process
    if not _stops:
        _interrupts, _ours = 0, 1
        for number in _NUMBERS:
            before = signal.signal(number, _stop_all)
            # None: the handler was not installed by Python, so signal.signal() cannot restore it.
            _before[number] = signal.SIG_DFL if before is None else before
    _ours = max(_ours, 1 + twice)
    _stops.append(stop)

    def restore() -> None:
        _stops.remove(stop)
        if _stops:
            return
        for number in _NUMBERS:
            before = _before.pop(number)
            # Leave handlers alone that user code installed meanwhile.
            if signal.getsignal(number) is _stop_all:
                signal.signal(number, before)

    return restore


def _stop_all(number: int, frame: FrameType | None) -> None:
    global _interrupts  # noqa: PLW0603
    before = _before.get(number)
    own = callable(before) and not _only_interrupts(before)
    if number == signal.SIGINT:
        if _interrupts >= _ours and callable(before) and not own:
            before(number, frame)
            return
        _interrupts += 1
    for stop in tuple(_stops):
        stop()
    if callable(before) and own:
        # One that raises is to end the program: the stops do that in order.
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            before(number, frame)


def handler_of(number: int) -> object:
    """The handler of a signal that the program, or its server, has installed, whether or not workers hear it first."""
    found = signal.getsignal(number)
    return _before.get(number) if found is _stop_all else found


def _only_interrupts(handler: Callable[..., object]) -> bool:
    """Whether a handler does nothing but end at once what the stops are to end in order: Python's, asyncio's or ours."""
    runner = getattr(getattr(handler, "func", None), "__self__", None)
    return (
        handler in (signal.default_int_handler, raise_terminated)
        or type(runner).__module__ == "asyncio.runners"
    )


class Terminated(BaseException):
    """SIGTERM has come to a command: what it has started ends with it."""


def raise_terminated(number: int, frame: FrameType | None) -> None:  # noqa: ARG001 - as signal calls it
    """Raise :class:`Terminated`: the handler of SIGTERM of a command."""
    # What ends then may take its time, and a second signal is the end of it.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise Terminated
