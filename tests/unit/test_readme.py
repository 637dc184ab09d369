"""README.md is short, and README.md and docs/ agree with the code: names, figures, tables and commands."""

import builtins
import importlib
import pkgutil
import re
from typing import get_args

import ff_fast
from ff_fast import FFError, Outcome, aio, cli, types, web
from ff_fast._core import operations
from ff_fast._core import writer as writer_core
from ff_fast._demo import plan

from .. import documents
from ..conftest import ROOT
from .test_fault_matrix import DEFINED

README = (ROOT / "README.md").read_text("utf-8")
GUIDES = ROOT / "docs/guides"
GUARANTEES = (GUIDES / "guarantees.md").read_text("utf-8")
DEPLOYMENT = (GUIDES / "deployment.md").read_text("utf-8")
ERRORS = (ROOT / "docs/reference/errors.md").read_text("utf-8")
COMMANDS = (ROOT / "docs/reference/command-line.md").read_text("utf-8")
ALL = "\n".join(path.read_text("utf-8") for path in documents.documents())
# Inline code only: what is in fences is run.
NAMES = set(
    re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", ALL, flags=re.MULTILINE | re.DOTALL))
)
# Other people's, which the prose names.
FOREIGN = {
    *("Authorization", "ConcurrentTaskModificationError", "EventSource", "Last-Event-ID"),
    *("Location", "Retry-After"),
}


def printed(capsys):
    """The lines that an example printed, without the cursors in them: those hold the time."""
    return re.sub(r", cursor='[0-9]+[.][0-9]+-[0-9]+'", "", capsys.readouterr().out).splitlines()


def test_the_readme_is_one_page():
    assert len(README.splitlines()) <= 150
    for name in ("readme-worker", "readme-web"):
        lines = [line for line in documents.program(name).shown.splitlines() if line.strip()]
        assert len(lines) <= 17, name


def test_examples_run_as_they_stand(capsys):
    documents.run("first-program")
    assert printed(capsys) == [
        "b'Hello'",
        "b','",
        "b' world'",
        "End(reason='attempt_success')",
    ]
    documents.run("by-hand")
    assert printed(capsys) == [
        "6 frames",
        """{"answer":"Hello, world","tokens":3} End(reason='attempt_success')""",
    ]
    documents.run("human-approval")
    assert printed(capsys) == ["Draft: 42.", "Approved by Ada"]
    config = documents.run("connection")["config"]
    assert config.connection.seeds == (("node-2.example", 7000),)
    documents.run("durability")
    assert printed(capsys) == ["Durability(replicas=0, on_disk=True)"]


def test_the_first_example_is_short():
    assert len(documents.program("first-program").shown.strip().splitlines()) <= 12


def homes():
    """The modules whose names the documents use."""
    yield ff_fast
    for package in (web,):
        yield package
        for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
            yield importlib.import_module(module.name)


def test_every_class_and_its_attributes_exist(subtests):
    named = sorted(name for name in NAMES if re.match(r"[A-Z][a-z]\w*(?!\S*/)\b", name))
    assert len(named) > 40
    modules = list(homes())
    adapters = "".join(path.read_text("utf-8") for path in (ROOT / "ff_fast/adapters").glob("*.py"))
    for name in named:
        with subtests.test(name):
            first, *rest = re.sub(r"\(.*\)$", "", name).split(".")
            if hasattr(builtins, first) or first.split()[0].rstrip(":") in FOREIGN:
                continue
            if re.search(rf"^class {first}\b", adapters, re.MULTILINE):
                continue
            value = next(getattr(module, first) for module in modules if hasattr(module, first))
            for part in rest:
                value = getattr(value, part)


def test_methods_exist_in_both_shells():
    named = {name for name in NAMES if name.startswith(("backend.", "writer."))}
    assert len(named) >= 4
    for name in named:
        owner, method = re.match(r"(\w+)\.(\w+)", name).groups()
        for shell in (ff_fast, aio):
            assert hasattr({"backend": shell.ValkeyBackend, "writer": shell.Writer}[owner], method)


def test_error_table_is_that_of_the_classes():
    rows = re.findall(
        r"^\|.*\| (not applied|applied|unknown) \| (yes|no) \| (.*) \|$", ERRORS, re.MULTILINE
    )
    stated = {
        name: (outcome, retryable)
        for outcome, retryable, names in rows
        for name in re.findall(r"`(\w+)`", names)
    }
    actual = {
        name: (cls.outcome.value.replace("_", " "), "yes" if cls.retryable else "no")
        for name in ff_fast.__all__
        if isinstance(cls := getattr(ff_fast, name), type)
        and issubclass(cls, FFError)
        and cls is not FFError
    }
    assert stated == actual
    assert {outcome.value for outcome in Outcome} == {"not_applied", "applied", "unknown"}


def test_reasons_are_those_of_the_code():
    table = GUARANTEES[GUARANTEES.index("`Gap.reason`") :]
    gaps = re.findall(r"^\| `(\w+)` \| ", table, re.MULTILINE)
    (listed,) = re.findall(r"`End\.reason` is (.*?) where", GUARANTEES, re.DOTALL)
    assert tuple(gaps) == get_args(types.GapReason)
    assert sorted(re.findall(r"`(\w+)`", listed)) == sorted(get_args(types.EndReason))


def test_each_guarantee_has_its_test():
    kept = GUARANTEES.split("\n## What is guaranteed\n")[1].split("\n## ")[0]
    sections = re.split(r"^### ", kept, flags=re.MULTILINE)[1:]
    assert len(sections) > 12
    for section in sections:
        name = section.splitlines()[0]
        (tests,) = re.findall(r"^Tests: (.*)\.$", section, re.MULTILINE)
        named = re.findall(r"`(\w+)`", tests)
        assert named, name
        assert set(named) <= DEFINED, name


def test_each_row_of_what_holds_has_its_test():
    tables = [
        table
        for path in sorted(GUIDES.glob("*.md"))
        for table in re.findall(
            r"^\| sentence \| test \|\n\|---\|---\|\n((?:\|.*\n)+)",
            path.read_text("utf-8"),
            re.MULTILINE,
        )
    ]
    assert len(tables) >= 4
    for row in "".join(tables).splitlines():
        _, tests = row.strip("| ").split(" | ")
        named = re.findall(r"`(\w+)`", tests)
        assert named, row
        assert set(named) <= DEFINED, row


def test_each_line_of_what_a_crash_costs_has_its_test():
    table = DEPLOYMENT[DEPLOYMENT.index("## What a crash costs") :].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 12
    for row in rows[1:]:
        assert len(row) == 5, row
        (named,) = re.findall(r"`(test_\w+)`", row[-1])
        assert named in DEFINED


def test_the_urls_of_servers_are_understood(subtests):
    table = DEPLOYMENT[DEPLOYMENT.index("\n## Servers") :].split("\n\n")[1]
    urls = re.findall(r"`((?:valkey|redis|unix)[a-z+]*://[^`]+)`", table)
    assert len(urls) >= 4
    for url in urls:
        written = url.replace("[:port][/db]", ":6379/0").replace("[/db]", "/0")
        with subtests.test(url):
            types.BackendConfig.from_url(re.sub(r"[\[\]]", "", written))


def test_figures_are_those_of_the_code():
    config = types.BestEffortLiveConfig(1)
    prose = " ".join(ALL.split())
    for text, value in [
        ("at most 65,536 bytes", types.DEFAULT_PAYLOAD_LIMIT == 65_536),
        ("the newest 10,000 ", writer_core.RETENTION_MAXLEN == 10_000),
        ("Past 32 MiB ", writer_core.MAX_UNACKNOWLEDGED_BYTES == 32 << 20),
        ("more than 1 MiB is unacknowledged", writer_core.HIGH_WATER_BYTES == 1 << 20),
        ("2), 64, 16,384)", (config.maxlen_floor, config.maxlen_ceiling) == (64, 16_384)),
        ("execution's payload at most 16 MiB", operations.MAX_DOCUMENT == 16 << 20),
    ]:
        assert text in prose
        assert value, text


def test_commands_and_options_exist(capsys):
    rows = re.findall(r"^\| `ff-fast (\w+).*?` \| (.*) \|$", COMMANDS, re.MULTILINE)
    assert [command for command, _ in rows] == [
        *("demo", "worker", "server", "follow", "tail", "summary", "info"),
        *("supervise", "submit", "why", "ls", "top", "doctor", "acl"),
        *("inspect", "signal", "cancel"),
    ]
    for command, text in rows:
        assert cli.main([command, "--help"]) == 0
        offered = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        everywhere = {"--help"} if command in ("server", "acl") else {"--help", "--url"}
        assert set(re.findall(r"`(--[a-z-]+)`", text)) | everywhere == offered | everywhere
    assert cli.URL_VARIABLE in NAMES
    assert cli.TOKEN_VARIABLE in NAMES
    assert plan.MODES == ("best-effort", "summary", "durable")


def test_commands_in_the_guides_exist():
    offered = set(re.findall(r"^\| `ff-fast (\w+)", COMMANDS, re.MULTILINE))
    assert set(re.findall(r"\bff-fast ([a-z]+)\b", ALL)) <= offered


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", ALL, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = re.findall(
        r"^\| (`[a-z0-9`, -]+`) \| .* \| .* \|$",
        (ROOT / "docs/index.md").read_text("utf-8"),
        re.MULTILINE,
    )
    named = [extra for row in extras for extra in re.findall(r"`([a-z0-9-]+)`", row)]
    assert {"embedded", "cli", "web"} <= set(named)
    for extra in named:
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra
    assert 'ff-fast = "ff_fast.cli:main"' in pyproject


def test_the_place_of_the_numbers_is_marked_once():
    between = re.findall(r"<!-- told:begin -->\n(.*?)<!-- told:end -->", README, re.DOTALL)
    assert len(between) == 1
