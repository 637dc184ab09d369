"""The command ``ff-fast``: a demo, a look at any execution of a server, and the calls of operators."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from ff_fast import FFError, InvalidInput, __version__
from ff_fast._cli import control, demo, look, read, top
from ff_fast._cli.shared import (
    FAILED,
    TOKEN_VARIABLE,
    URL_VARIABLE,
    USAGE,
    Commands,
    Parser,
    complain,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["TOKEN_VARIABLE", "URL_VARIABLE", "main"]

_INTERRUPTED = 130
_BROKEN_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with *argv* (default: ``sys.argv``) and return its exit code.

    Returns:
        0: done. 1: the server refused, or the demo found a difference. 2: wrong usage. 130: Ctrl-C.
        141: the reader of the output has gone.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _parser()
    if not argv:
        # To stderr, and no success: a script that lost its arguments must not go on.
        parser.print_help(sys.stderr)
        return USAGE
    arguments = parser.parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        sys.stdout.flush()
    except InvalidInput as error:
        complain(str(error))
        return USAGE
    except FFError as error:
        complain(str(error))
        return FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # The interpreter flushes stdout once more when it exits, and would report the error again.
        with contextlib.suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    return code


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
