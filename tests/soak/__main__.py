"""``make soak``, and ``make soak ARGS="--seconds 60 --seed 7"``: see ``tests/README.md``."""

import argparse
import secrets
import sys

from .faults import FAULTS
from .run import Settings, run


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument(
        "--seconds", type=float, default=3600.0, help="how long faults are injected"
    )
    parser.add_argument("--seed", type=int, help="repeats the schedule of an earlier soak")
    parser.add_argument(
        "--only", nargs="+", choices=sorted(FAULTS), metavar="KIND", help="kinds of faults"
    )
    parser.add_argument(
        "--every", type=float, default=0.7, help="seconds between two faults on average"
    )
    parser.add_argument("--no-sizes", action="store_true", help="do not compare sizes")
    given = parser.parse_args(argv)
    settings = Settings(
        seconds=given.seconds,
        seed=secrets.randbelow(1 << 32) if given.seed is None else given.seed,
        kinds=None if given.only is None else tuple(given.only),
        every=given.every,
        sizes=not given.no_sizes,
    )
    report = run(settings, lambda text: print(text, flush=True))
    print(report.text())
    return 1 if report.account.violations else 0


if __name__ == "__main__":
    sys.exit(main())
