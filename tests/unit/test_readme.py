"""README.md agrees with the code: its examples run as they stand, and every name in it exists."""

import asyncio
import builtins
import re
from typing import get_args

import pytest

import ff_fast
from ff_fast import FFError, Outcome, PatchKind, StreamMode, aio, cli, types
from ff_fast._core import operations
from ff_fast._core import writer as writer_core
from ff_fast._demo import plan

from .. import documents
from ..conftest import ROOT
from .test_fault_matrix import DEFINED

README = (ROOT / "README.md").read_text("utf-8")
# Those with a name are run in the framework that they are about.
EXAMPLES = [
    block.shown
    for block in documents.blocks("python")
    if block.document == "README.md" and block.name is None
]
# Inline code only: what is in fences is run.
NAMES = set(
    re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", README, flags=re.MULTILINE | re.DOTALL))
)


def printed(capsys):
    """The lines that an example printed, without the cursors in them: those hold the time."""
    return re.sub(r", cursor='[0-9]+[.][0-9]+-[0-9]+'", "", capsys.readouterr().out).splitlines()


def test_examples_run_as_they_stand(capsys):
    sync, asynchronous, events, work, servers, durable = EXAMPLES
    exec(compile(sync, "README.md", "exec"), {"__name__": "__main__"})
    assert printed(capsys) == [
        "b'Hello'",
        "b','",
        "b' world'",
        "End(reason='attempt_success')",
    ]
    exec(compile(asynchronous, "README.md", "exec"), {"__name__": "__main__"})
    assert printed(capsys) == [
        "6 frames",
        """{"answer":"Hello, world","tokens":3} End(reason='attempt_success')""",
    ]
    names = {"__name__": "__main__"}
    exec(compile(events, "README.md", "exec"), names)
    frames = [["event: token", 'data: "Hello"'], ["event: token", r'data: "world\n"']]
    end = ["event: end", 'data: "success"']
    started = ["event: attempt", 'data: "0"']
    assert asyncio.run(sent(names["events"], None)) == [started, *frames, end]
    document = ["event: document", r'data: "{\"tokens\":2}"']
    assert asyncio.run(sent(names["events"], '{"tokens": 2}')) == [document, *frames, end]
    exec(compile(work, "README.md", "exec"), {"__name__": "__main__"})
    assert printed(capsys) == ["Draft: 42.", "Approved by Ada"]
    names = {"__name__": "__main__"}
    exec(compile(servers, "README.md", "exec"), names)
    assert names["config"].connection.seeds == (("node-2.example", 7000),)
    exec(compile(durable, "README.md", "exec"), {"__name__": "__main__"})
    assert printed(capsys) == ["Durability(replicas=0, on_disk=True)"]


async def sent(events, patch):
    """The events that the example of a web layer sends of a stream, which has a document if there is a *patch*."""
    async with aio.ValkeyBackend.embedded() as backend:
        eid = await backend.create_execution()
        handle = await backend.claim()
        async with backend.open_writer(handle) as writer:
            if patch is not None:
                writer.write(patch, mode=StreamMode.durable_summary(PatchKind.JSON_MERGE_PATCH))
            writer.write("Hello", "token")
            writer.write("world\n", "token")
        await backend.complete(handle)

        async def after(last_id):
            found = "".join([text async for text in events(backend, eid, last_id)])
            return [event.splitlines() for event in found.removesuffix("\n\n").split("\n\n")]

        found = await after(None)
        # A browser that connects again gets the rest.
        for number, (identity, *_) in enumerate(found[:-1], start=1):
            assert await after(identity.removeprefix("id: ")) == found[number:]
        return [lines[1:] for lines in found]


def test_the_first_example_is_short():
    assert len(EXAMPLES[0].strip().splitlines()) <= 12


def test_every_class_and_its_attributes_exist(subtests):
    named = sorted(name for name in NAMES if re.match(r"[A-Z][a-z]\w*(?!\S*/)\b", name))
    assert len(named) > 40
    for name in named:
        with subtests.test(name):
            first, *rest = re.sub(r"\(.*\)$", "", name).split(".")
            if hasattr(builtins, first):
                continue
            value = getattr(ff_fast, first)
            assert first in ff_fast.__all__
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
        r"^\|.*\| (not applied|applied|unknown) \| (yes|no) \| (.*) \|$", README, re.MULTILINE
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
    gaps = re.findall(r"^\| `(\w+)` \| ", README[README.index("`Gap.reason`") :], re.MULTILINE)
    ends = re.findall(r"`(\w+)`", re.search(r"`End\.reason` is (.*?) where", README, re.DOTALL)[1])
    assert tuple(gaps) == get_args(types.GapReason)
    assert sorted(ends) == sorted(get_args(types.EndReason))


def test_each_line_of_what_a_crash_costs_has_its_test():
    table = README[README.index("### What a crash costs") :].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| ")]
    assert len(rows) > 12
    for row in rows[1:]:
        assert len(row) == 5, row
        (named,) = re.findall(r"`(test_\w+)`", row[-1])
        assert named in DEFINED


def test_the_urls_of_servers_are_understood(subtests):
    table = README[README.index("\n## Servers") :].split("\n\n")[1]
    urls = re.findall(r"`((?:valkey|redis|unix)[a-z+]*://[^`]+)`", table)
    assert len(urls) >= 4
    for url in urls:
        written = url.replace("[:port][/db]", ":6379/0").replace("[/db]", "/0")
        with subtests.test(url):
            types.BackendConfig.from_url(re.sub(r"[\[\]]", "", written))


def test_figures_are_those_of_the_code():
    config = types.BestEffortLiveConfig(1)
    prose = " ".join(README.split())
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
    rows = re.findall(r"^\| `ff-fast (\w+).*?` \| (.*) \|$", README, re.MULTILINE)
    assert [command for command, _ in rows] == [
        *("demo", "follow", "tail", "summary", "info"),
        *("supervise", "submit", "inspect", "signal", "cancel"),
    ]
    for command, text in rows:
        with pytest.raises(SystemExit, match=r"^0$"):
            cli.main([command, "--help"])
        offered = set(re.findall(r"--[a-z-]+", capsys.readouterr().out))
        assert set(re.findall(r"`(--[a-z-]+)`", text)) | {"--url"} == offered - {"--help"}
    assert cli.URL_VARIABLE in NAMES
    assert cli.TOKEN_VARIABLE in NAMES
    assert plan.MODES == ("best-effort", "summary", "durable")


def test_make_targets_and_extras_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"(?:^|`)make ([a-z-]+)", README, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    for extra in ("embedded", "cli"):
        assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE)
    assert 'ff-fast = "ff_fast.cli:main"' in pyproject


def test_links_lead_somewhere():
    headings = re.findall(r"^##+ (.*)$", README, re.MULTILINE)
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in {heading.lower().replace(" ", "-") for heading in headings}
            continue
        assert target.startswith("https://") or (ROOT / target).is_file()


def test_the_place_of_the_numbers_is_marked_once():
    between = re.findall(r"<!-- numbers:begin -->\n(.*?)<!-- numbers:end -->", README, re.DOTALL)
    assert len(between) == 1
