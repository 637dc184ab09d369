"""What users install: sdist, wheel and editable install, each used from outside the checkout.

Each must bring the compiled extensions and the checkout's Lua, and load it into a server.
"""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import ff_fast
from ff_fast import _library

from ..conftest import EXTENSIONS, ROOT

pytestmark = [pytest.mark.packaging, pytest.mark.timeout(600)]

# Read where the package was installed; says what it found there.
PROBE = """
import importlib, json, sys
from pathlib import Path

import redis

import ff_fast
from ff_fast import _library, data, keys, web
from ff_fast.embedded import EmbeddedServer

extensions = [importlib.import_module(name).__file__ for name in sys.argv[1:]]
with EmbeddedServer() as server, redis.Redis.from_url(server.url, protocol=2) as client:
    loaded = client.function_load(_library.source()).decode()
    version = [part.decode() for part in client.fcall("ff_version", 1, keys.PARTITIONS_CONFIG) if isinstance(part, bytes)]
    functions = sorted(
        entry[1].decode() for entry in client.function_list(_library.NAME)[0][5]
    )
print(json.dumps({
    "package": str(Path(ff_fast.__file__).parent),
    "extensions": extensions,
    "digest": _library.digest(),
    "version": version,
    "loaded": loaded,
    "functions": functions,
    "headers": sorted(_library.headers()),
    "typed": Path(ff_fast.__file__).with_name("py.typed").exists(),
    "text": len(data.text()),
    "pages": [len(path.read_text("utf-8")) for path in (web.CLIENT_JS, Path(ff_fast.__file__).parent / "_demo" / "chat.html")],
}))
"""


def run(*command: object, cwd: Path) -> str:
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "VIRTUAL_ENV") and not name.startswith("FF_FAST_")
    }
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the checkout without anything built."""
    copy = tmp_path_factory.mktemp("checkout") / "ff_fast"
    built = shutil.ignore_patterns(
        ".git",
        ".venv",
        ".*_cache",
        ".coverage*",
        ".hypothesis",
        "build",
        "dist",
        "*.egg-info",
        "*.so",
        "__pycache__",
    )
    shutil.copytree(ROOT, copy, ignore=built)
    return copy


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    out = tmp_path_factory.mktemp("sdist")
    run(sys.executable, "-m", "build", "--sdist", "--outdir", out, checkout, cwd=out)
    (made,) = out.iterdir()
    return made


def build_wheel(source: Path, out: Path) -> Path:
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", out, source, cwd=out)
    (made,) = out.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build_wheel(checkout, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def wheel_of_sdist(sdist, tmp_path_factory):
    return build_wheel(sdist, tmp_path_factory.mktemp("wheel-of-sdist"))


@pytest.fixture
def probe(tmp_path):
    """Install into a fresh environment and report what it finds, run from an empty directory."""

    def install_and_look(*requirement: object) -> dict:
        environment = tmp_path / "environment"
        run(sys.executable, "-m", "venv", environment, cwd=tmp_path)
        python = environment / "bin" / "python"
        run(python, "-m", "pip", "install", *requirement, cwd=tmp_path)
        elsewhere = tmp_path / "elsewhere"
        elsewhere.mkdir()
        found = json.loads(run(python, "-c", PROBE, *EXTENSIONS, cwd=elsewhere))
        found["home"] = environment
        return found

    return install_and_look


def assert_complete(found: dict) -> None:
    assert found["digest"] == _library.digest()
    assert found["loaded"] == _library.NAME
    assert _library.digest() in found["version"]
    assert found["functions"] == found["headers"] == sorted(_library.headers())
    assert len(found["extensions"]) == len(EXTENSIONS)
    assert all(file.endswith(".so") for file in found["extensions"])
    assert found["typed"]
    assert found["text"] > 0
    assert min(found["pages"]) > 0


def files_of(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return sorted(name for name in archive.namelist() if ".dist-info/" not in name)


def below(folder: str, *patterns: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for pattern in patterns
        for path in (ROOT / folder).rglob(pattern)
    }


def test_sdist_has_the_sources_and_nothing_built(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = below(
        "ff_fast", "*.py", "*.pyx", "*.pxd", "*.pyi", "*.txt", "*.js", "*.html", "py.typed"
    )
    assert sources | below("lua", "*.lua") | below("tests", "*.py") <= names
    assert {"setup.py", "pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md"} <= names
    assert not [name for name in names if name.endswith((".c", ".so", ".pyc"))]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git says what the repository has")
def test_sdist_has_every_file_of_the_repository(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    tracked = {
        name for name in run("git", "ls-files", cwd=ROOT).splitlines() if (ROOT / name).exists()
    }
    assert {
        name for name in tracked - names if not name.endswith((".gitignore", ".gitkeep"))
    } == set()


def test_extensions_carry_no_debug_tables(wheel):
    with zipfile.ZipFile(wheel) as archive:
        files = {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}
    assert len(files) == len(EXTENSIONS)
    assert not [name for name, content in files.items() if b".debug_info" in content]
    assert sum(map(len, files.values())) < 3e6


def test_wheel_has_what_is_used_at_run_time(wheel):
    names = files_of(wheel)
    used = below("ff_fast", "*.py", "*.pxd", "*.pyi", "*.txt", "*.js", "*.html", "py.typed")
    lua = {f"ff_fast/_lua/{path.name}" for path in (ROOT / "lua").glob("*.lua")}
    assert used | lua == {name for name in names if not name.endswith(".so")}
    built = {name.partition(".")[0].replace("/", ".") for name in names if name.endswith(".so")}
    assert built == set(EXTENSIONS)


def test_wheel_has_the_version_of_the_package(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    assert about["Version"] == ff_fast.__version__


def test_pypi_shows_a_page_whose_links_and_pictures_lead_somewhere(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = email.message_from_bytes(archive.read(name))
    assert about["Description-Content-Type"] == "text/markdown"
    page = about.get_payload()
    assert page.startswith("# ff_fast\n")
    links = re.findall(r"(!?)\[[^\]]*\]\(([^)\s]+)\)", page)
    home = "https://github.com/ff-fast/ff_fast"
    own = [(picture, link) for picture, link in links if link.startswith(home)]
    assert {link for _, link in links if not link.startswith(home)} == {"https://valkey.io"}
    assert len(own) > 10
    assert {bool(picture) for picture, _ in own} == {False, True}
    for picture, link in own:
        place = f"{home}/{'raw' if picture else 'blob'}/v{ff_fast.__version__}/"
        assert link.startswith(place)
        assert (ROOT / link.removeprefix(place).partition("#")[0]).is_file(), link


def test_wheel_of_the_sdist_is_the_same(wheel, wheel_of_sdist):
    assert files_of(wheel_of_sdist) == files_of(wheel)


def test_wheel_works_elsewhere(probe, wheel_of_sdist):
    found = probe(f"ff_fast[embedded] @ {wheel_of_sdist.as_uri()}")
    assert_complete(found)
    python = found["home"] / "bin" / "python"
    said = run(python, ROOT / "tools/check_installed.py", cwd=found["home"])
    assert said.endswith("; streamed 100 tokens\n")
    assert Path(found["package"]).is_relative_to(found["home"])


def test_editable_install_reads_the_checkout(probe, checkout):
    found = probe("--editable", f"{checkout}[embedded]")
    assert_complete(found)
    assert Path(found["package"]) == checkout / "ff_fast"
    assert not (checkout / "ff_fast" / "_lua").exists()

    edited = checkout / "lua" / "version.lua"
    edited.write_text(edited.read_text("utf-8") + "\n-- edited\n", "utf-8")
    python = found["home"] / "bin" / "python"
    program = "from ff_fast import _library; print(_library.digest())"
    assert run(python, "-c", program, cwd=checkout.parent).strip() != _library.digest()
