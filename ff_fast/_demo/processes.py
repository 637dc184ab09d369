"""The processes of the demos: how they are started, spoken to and ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, NamedTuple

from ff_fast import FFError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Any, Self

GOODBYE_S = 3.0
"""How long a process has to end by itself, in seconds."""


class Failed(NamedTuple):
    """The last message of a child that failed."""

    sentence: str


class DemoError(FFError):
    """A process of the demo stopped early."""

    code = "demo_failed"


def child(descriptor: str, role: Callable[..., None]) -> None:
    """Be a child: carry out the task that comes through the pipe *descriptor*."""
    pipe: Connection[Any, Any] = Connection(int(descriptor))
    try:
        role(pipe, *pipe.recv())
        pipe.send(None)
    except FFError as error:
        with contextlib.suppress(OSError):
            pipe.send(Failed(str(error)))
    except (EOFError, OSError, asyncio.CancelledError):
        # The parent has gone, or told this process to stop.
        os._exit(1)


class Child:
    """A process of a demo and the pipe to it.

    It has a session of its own: a Ctrl-C reaches only the parent, which then ends the child.
    The task goes through the pipe, because a URL may hold a password and command lines are public.
    """

    def __init__(self, role: str, *task: object) -> None:
        self.role = role
        self.pipe, theirs = Pipe()
        # The child imports what this process imports, and nothing of that name in the current directory.
        path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)  # noqa: PTH109 - text
        self._process = subprocess.Popen(  # noqa: S603 - this interpreter, and arguments of ours
            [sys.executable, "-P", "-m", "ff_fast._demo", role, str(theirs.fileno())],
            env={**os.environ, "PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        if task:
            self.tell(task)

    def tell(self, message: object) -> None:
        """Send a message. If the process has gone, the next :meth:`receive` raises."""
        with contextlib.suppress(OSError):
            self.pipe.send(message)

    def receive(self) -> object:
        """Return the next message.

        Raises:
            DemoError: The process failed, or ended without a message.
        """
        try:
            message: object = self.pipe.recv()
        except (EOFError, OSError):
            raise DemoError(f"The {self.role} ended without a message.") from None
        if isinstance(message, Failed):
            raise DemoError(f"The {self.role} stopped: {message.sentence}")
        return message

    def stop(self, *, politely: bool = False) -> None:
        if politely:
            self.tell("stop")
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(GOODBYE_S)
        self.pipe.close()
        try:
            self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def kill(self) -> None:
        """End the process as a crash of the machine would."""
        self._process.kill()
        self._process.wait()
        self.pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        where: TracebackType | None,
    ) -> None:
        # An interrupted worker still fails its attempt, so that readers hear of the end.
        self.stop(politely=kind is not None and self.role == "worker")
