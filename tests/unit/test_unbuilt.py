"""``import ff_fast`` where the extensions are missing or do not load."""

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent.parent / "ff_fast"
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
BUILD = "run `make build` in a checkout, or `pip install .`"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the package without its extensions."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "ff_fast", ignore=ignored)
    return tmp_path


def error_of_import(checkout):
    # -S: the installed package and its finder are out of reach; so is every dependency.
    call = [sys.executable, "-S", "-c", "import ff_fast"]
    done = subprocess.run(call, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    return done.stderr


def test_not_built(checkout):
    error = error_of_import(checkout)
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    message = f"ImportError: The extensions of ff_fast are not built for Python {version}: {BUILD}."
    assert error.strip().endswith(message)
    assert "ModuleNotFoundError: No module named 'ff_fast._hot.resp'" in error
    assert "direct cause" in error


def test_built_for_another_python(checkout):
    (checkout / "ff_fast/_hot/resp.cpython-32-x86_64-linux-gnu.so").write_bytes(b"")
    assert "ImportError: The extensions of ff_fast are not built for" in error_of_import(checkout)


def test_does_not_load(checkout):
    (checkout / f"ff_fast/_hot/resp{SUFFIX}").write_bytes(b"not a library")
    error = error_of_import(checkout)
    assert "ImportError: An extension of ff_fast does not load (" in error
    assert error.strip().endswith(f"it was built elsewhere: {BUILD}.")
    assert "direct cause" in error


@pytest.mark.parametrize("missing", sorted(path.stem for path in PACKAGE.glob("_hot/*.pyx")))
def test_one_is_missing(checkout, missing):
    # A checkout that was updated and not built again.
    for library in PACKAGE.glob(f"_hot/*{SUFFIX}"):
        if library.name != f"{missing}{SUFFIX}":
            (checkout / "ff_fast/_hot" / library.name).symlink_to(library)
    error = error_of_import(checkout)
    assert "are not built" in error
    assert f"No module named 'ff_fast._hot.{missing}'" in error


def test_another_module_is_missing(checkout):
    # Not for want of a build, so nothing is said of one.
    (checkout / "ff_fast/_hot/resp.py").write_text("import missing_dependency\n")
    error = error_of_import(checkout)
    assert error.strip().endswith("ModuleNotFoundError: No module named 'missing_dependency'")
    assert "make build" not in error


def test_a_free_threaded_python_is_named(checkout):
    program = "import sys; sys.abiflags = 't'; import ff_fast"
    call = [sys.executable, "-S", "-c", program]
    done = subprocess.run(call, cwd=checkout, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    message = f"ImportError: ff_fast does not support free-threaded Python: use the default build of Python {version}."
    assert done.stderr.strip().endswith(message)
