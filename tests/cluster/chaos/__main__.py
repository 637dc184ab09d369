"""``make chaos``, and ``make chaos ARGS="--only kill --shell sync --seconds 60 --seed 7"``: see ``tests/README.md``."""

import argparse
import secrets
import sys

from ...shells import KINDS
from .run import Settings, run
from .scenarios import SCENARIOS


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m tests.cluster.chaos", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60.0, help="how long faults are injected")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=sorted(SCENARIOS),
        metavar="SCENARIO",
        default=sorted(SCENARIOS),
    )
    parser.add_argument("--shell", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--streams", type=int, default=200, help="executions at a time")
    parser.add_argument("--rate", type=float, default=20.0, help="frames a second of each")
    parser.add_argument("--seed", type=int, help="repeats the choices of an earlier run")
    given = parser.parse_args(argv)
    seed = secrets.randbelow(1 << 32) if given.seed is None else given.seed
    failed = 0
    for scenario in given.only:
        for shell in given.shell:
            settings = Settings(
                scenario, shell, given.seconds, given.streams, rate=given.rate, seed=seed
            )
            report = run(settings, lambda text: print(text, flush=True))
            print(report.text(), flush=True)
            failed += bool(report.violations)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
