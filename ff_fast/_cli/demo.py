"""``ff-fast demo``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ff_fast import InvalidInput
from ff_fast._cli.shared import DONE, FAILED, complain, number
from ff_fast._demo.plan import MAX_TOKENS, MODES, Plan

if TYPE_CHECKING:
    from ff_fast._cli.shared import Commands


def add_demo(commands: Commands) -> None:
    parser = commands.add(
        demo,
        help_text="stream a text from a worker to a reader and compare every byte",
        description=(
            "A worker process streams a text in three modes at once. A reader process tails it, and"
            " every byte that arrived is compared with what was sent. Without --url it runs on an"
            " embedded server, which is removed afterwards."
        ),
    )
    parser.add_argument(
        "--rate",
        type=number(1, 100_000),
        default=1000.0,
        metavar="HZ",
        help="tokens a second (default: 1000)",
    )
    parser.add_argument(
        "--seconds",
        type=number(0.01, 3600),
        default=6.0,
        metavar="S",
        help="how long to stream; the text is repeated as often as needed (default: 6)",
    )
    parser.add_argument(
        "--modes",
        type=_modes,
        default=MODES,
        metavar="MODE,...",
        help=f"only these of {', '.join(MODES)} (default: all)",
    )
    parser.add_argument("--plain", action="store_true", help="plain lines, also on a terminal")
    parser.add_argument("--url", metavar="URL", help="server to stream through")


def demo(arguments: argparse.Namespace) -> int:
    # Other commands need neither asyncio nor multiprocessing.
    from ff_fast._demo import run, view  # noqa: PLC0415

    count = max(round(arguments.rate * arguments.seconds), 1)
    if count > MAX_TOKENS:
        raise InvalidInput(
            f"--rate times --seconds is {count} tokens; the demo keeps at most {MAX_TOKENS}."
        )
    plan = Plan(arguments.rate, count, arguments.modes)
    shown = view.choose_view(plain=arguments.plain)
    if arguments.url:
        differences = run.run(arguments.url, plan, shown)
    else:
        from ff_fast.embedded import EmbeddedServer  # noqa: PLC0415

        with EmbeddedServer() as server:
            differences = run.run(server.url, plan, shown)
    for sentence in differences:
        complain(sentence)
    return FAILED if differences else DONE


def _modes(text: str) -> tuple[str, ...]:
    given = set(text.split(","))
    if not given <= set(MODES):
        raise argparse.ArgumentTypeError(f"must be some of {', '.join(MODES)}, with commas")
    return tuple(mode for mode in MODES if mode in given)
