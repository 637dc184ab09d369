"""Compile ``ff_fast/**/*.pyx`` and bundle ``lua/``; metadata is in pyproject.toml.

Environment switches, each with a folder of its own for the generated C, because
cythonize does not notice that directives or flags have changed:

``FF_FAST_WERROR=1``    warnings of Cython and of the C compiler are errors
``FF_FAST_DEBUG=1``     ``-O0``, C asserts on, Cython's bounds and None checks on
``FF_FAST_SANITIZE=1``  ``-O1 -g`` with AddressSanitizer and UndefinedBehaviorSanitizer
"""

import os
import re
import shutil
import sysconfig
import tomllib
from pathlib import Path

# Before anything is asked of Cython: a writer and its connection share state without locks, which the GIL protects.
if sysconfig.get_config_var("Py_GIL_DISABLED"):
    raise SystemExit(
        "ff_fast does not support free-threaded Python: install it with the default build of the same version."
    )

from Cython.Build import cythonize
from Cython.Compiler import Options
from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def switch(name: str) -> bool:
    return os.environ.get(f"FF_FAST_{name}", "0") not in ("", "0")


WERROR = switch("WERROR")
DEBUG = switch("DEBUG")
SANITIZE = switch("SANITIZE")

compile_flags = ["-Wall", "-Wextra"]
link_flags = []
if SANITIZE:
    # One list for both: an extension linked without them does not load the runtimes it calls.
    sanitizers = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer"]
    # Python's own flags carry -fwrapv, under which no signed overflow would be reported.
    compile_flags += ["-O1", "-g", "-fno-wrapv", *sanitizers]
    link_flags += sanitizers
elif DEBUG:
    compile_flags += ["-O0", "-g"]
else:
    # Python's own flags may carry -g, whose tables are five times as large as the code.
    compile_flags += ["-O3", "-g0"]
if DEBUG:
    compile_flags += ["-UNDEBUG"]  # Python's own flags carry -DNDEBUG
if WERROR:
    compile_flags += ["-Werror"]
    Options.warning_errors = True

mode = "-".join(
    ["cython", *(name.lower() for name in ("SANITIZE", "DEBUG", "WERROR") if switch(name))]
)


def long_description() -> str:
    """README.md as PyPI shows it, which has no other file: links and pictures lead to those of the release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    library = (ROOT / "ff_fast/_library.py").read_text("utf-8")
    version = re.findall(r'^VERSION = "(.+)"$', library, re.MULTILINE)[0]

    def there(link: re.Match[str]) -> str:
        kind = "raw" if link[1] else "blob"
        return f"{link[1]}[{link[2]}]({project['urls']['Homepage']}/{kind}/v{version}/{link[3]})"

    text = (ROOT / "README.md").read_text("utf-8")
    return re.sub(r"(!?)\[([^\]\n]*)\]\((?!https://|#)([^)\s]+)\)", there, text)


class BundleLua(build_py):
    """Copy ``lua/*.lua`` to ``ff_fast/_lua/`` in the wheel.

    Never into the source tree: a checkout (and ``pip install -e .``) reads ``lua/`` itself,
    so an edited script can't be shadowed by a stale copy.
    """

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "ff_fast", "_lua")
        # The build folder outlives a build, and a part removed from lua/ must not.
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        for part in sorted(ROOT.glob("lua/*.lua")):
            shutil.copy(part, target)


extensions = [
    Extension(
        ".".join(pyx.relative_to(ROOT).with_suffix("").parts),
        [str(pyx.relative_to(ROOT))],
        extra_compile_args=compile_flags,
        extra_link_args=link_flags,
    )
    for pyx in sorted(ROOT.glob("ff_fast/**/*.pyx"))
]

setup(
    long_description=long_description(),
    long_description_content_type="text/markdown",
    cmdclass={"build_py": BundleLua},
    ext_modules=cythonize(
        extensions,
        # Worker processes need not inherit Options.warning_errors.
        nthreads=0 if WERROR else 2,
        compiler_directives={
            "language_level": "3",
            "binding": True,
            "boundscheck": DEBUG,
            "wraparound": False,
            "nonecheck": DEBUG,
            "initializedcheck": DEBUG,
            "cdivision": True,
            "autotestdict": False,
        },
        annotate=DEBUG,
        build_dir=f"build/{mode}",
    ),
    options={"build_ext": {"parallel": 2}},
)
