"""Print the assembled Lua library, as the server gets it; with ``--check``, let luacheck read it.

``python -m tools.assemble_lua`` prints the source. ``--check`` runs ``luacheck`` with ``.luacheckrc`` and reports
warnings by file and line of ``lua/``.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys

from ff_fast import _library


def check() -> int:
    """Run luacheck over the assembled library; return its exit status."""
    luacheck = shutil.which("luacheck")
    if luacheck is None:
        sys.exit("luacheck is not installed (Debian: apt install lua-check)")
    done = subprocess.run(  # noqa: S603 - a fixed command
        [luacheck, "--no-color", "--quiet", "--codes", "-"],
        input=_library.source(),
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.sub(
        r"\bstdin:(\d+)", lambda line: _library.line_of(int(line[1])), done.stdout + done.stderr
    )
    sys.stdout.write(found)
    return done.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.assemble_lua", description=__doc__)
    parser.add_argument("--check", action="store_true", help="run luacheck instead of printing")
    if parser.parse_args().check:
        return check()
    sys.stdout.write(_library.source())
    return 0


if __name__ == "__main__":
    sys.exit(main())
