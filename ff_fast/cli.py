"""The command ``ff-fast``: a demo, a look at any execution of a server, and the calls of operators."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import signal
import sys
import threading
import warnings
from typing import TYPE_CHECKING

from ff_fast import DeploymentWarning, FFError, InvalidInput, __version__, _process
from ff_fast._cli import control, demo, look, read, serve, top, work
from ff_fast._cli.shared import (
    DONE,
    FAILED,
    TOKEN_VARIABLE,
    URL_VARIABLE,
    USAGE,
    Commands,
    Parser,
    complain,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from typing import TextIO

__all__ = ["TOKEN_VARIABLE", "URL_VARIABLE", "main"]

_INTERRUPTED = 130
_BROKEN_PIPE = 141
_TERMINATED = 143
# Errors of a write that its reader has not caused.
_NOT_WRITTEN = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with *argv* (default: ``sys.argv``) and return its exit code; without a command, print the help.

    Returns:
        0: done. 1: the server refused, the demo found a difference, or the output could not be written. 2: wrong usage.
        130: Ctrl-C. 141: the reader of the output has gone. 143: SIGTERM.
    """
    _open_streams()
    try:
        with _terminable(), _warns_in_one_line():
            code = _run(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
    except InvalidInput as error:
        complain(str(error))
        return USAGE
    except FFError as error:
        complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except _process.Terminated:
        return _TERMINATED
    except BrokenPipeError:
        _drop_output()
        return _BROKEN_PIPE
    except OSError as error:
        if error.errno not in _NOT_WRITTEN:
            raise
        _drop_output()
        complain(f"The output cannot be written: {error.strerror}.")
        return FAILED
    return code


def _run(argv: Sequence[str]) -> int:
    parser = _parser()
    if not argv:
        parser.print_help()
        return DONE
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as stop:
        # Help, the version, or wrong usage.
        return stop.code if isinstance(stop.code, int) else DONE
    code: int = arguments.run(arguments)
    return code


def _open_streams() -> None:
    """Open streams that the caller has closed, so that no file or socket takes their place."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            nothing = os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, open(nothing, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Texts of others are shown as far as the encoding of the terminal goes.
        sys.stdout.reconfigure(errors="backslashreplace")


def _drop_output() -> None:
    """Drop what is left of the output: the interpreter flushes stdout once more when it exits, and would say so again."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise: its default action would leave children and servers to themselves."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    before = signal.signal(signal.SIGTERM, _process.raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


@contextlib.contextmanager
def _warns_in_one_line() -> Iterator[None]:
    """Show what there is to say of a server as other sentences, without a place in the source."""
    with warnings.catch_warnings():
        show = warnings.showwarning

        def tell(
            message: Warning | str,
            category: type[Warning],
            filename: str,
            lineno: int,
            file: TextIO | None = None,
            line: str | None = None,
        ) -> None:
            if issubclass(category, DeploymentWarning):
                complain(str(message))
            else:
                show(message, category, filename, lineno, file, line)

        warnings.showwarning = tell
        yield


def _parser() -> Parser:
    parser = Parser(
        prog="ff-fast",
        description="Streams LLM tokens from workers to readers through Valkey.",
        epilog="Exit codes: 0 done; 1 the server refused or something differs; 2 wrong usage.",
    )
    parser.add_argument("--version", action="version", version=f"ff-fast {__version__}")
    commands = Commands(parser)
    # --help lists them in this order.
    demo.add_demo(commands)
    serve.add_server(commands)
    work.add_worker(commands)
    read.add_follow(commands)
    read.add_tail(commands)
    read.add_summary(commands)
    read.add_info(commands)
    read.add_inspect(commands)
    look.add_ls(commands)
    top.add_top(commands)
    look.add_why(commands)
    look.add_doctor(commands)
    look.add_acl(commands)
    control.add_submit(commands)
    control.add_signal(commands)
    control.add_cancel(commands)
    control.add_supervise(commands)
    return parser
