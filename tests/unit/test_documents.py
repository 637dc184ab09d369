"""README.md and docs/: every block of code is run by a test, and every link leads somewhere."""

import re

from .. import documents
from ..conftest import ROOT

TESTS = "".join(path.read_text("utf-8") for path in sorted((ROOT / "tests").rglob("test_*.py")))
# GitHub's rule, and that of the site: lower case, without punctuation, spaces are hyphens.
ANCHOR = re.compile(r"[^\w\- ]")


def anchors(text):
    headings = re.findall(
        r"^#+ (.*)$",
        re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL),
        re.MULTILINE,
    )
    return {ANCHOR.sub("", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_python_block_has_a_name_and_a_test_that_runs_it():
    found = documents.blocks("python")
    assert not [f"{block.document}:{block.line}" for block in found if block.name is None]
    names = [block.name for block in found]
    assert len(names) == len(set(names))
    run = set(re.findall(r"""documents\.run\(\s*["']([\w-]+)["']""", TESTS))
    run |= set(re.findall(r"""documents\.program\(\s*["']([\w-]+)["']""", TESTS))
    assert set(names) == run


def test_no_block_hides_behind_another_name_of_its_language():
    for path in documents.documents():
        text = path.read_text("utf-8")
        fences = set(re.findall(r"^ *```(\S+)$", text, re.MULTILINE))
        assert fences <= {"python", "html", "js", "ts", "sh", "text", "toml", "yaml"}, path
        found = documents.blocks_of(text, path.name)
        for language in ("python", "html", "js", "ts"):
            count = len(re.findall(rf"^ *```{language}$", text, re.MULTILINE))
            assert count == sum(block.language == language for block in found), (path, language)


def test_links_lead_somewhere():
    for path in documents.documents():
        text = path.read_text("utf-8")
        for target in re.findall(
            r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
        ):
            if target.startswith("https://"):
                continue
            name, _, anchor = target.partition("#")
            there = path if not name else (path.parent / name).resolve()
            assert there.exists(), (path, target)
            if anchor:
                assert anchor in anchors(there.read_text("utf-8")), (path, target)


def test_names_of_tests_in_the_documents_exist():
    defined = set(re.findall(r"^ *(?:async )?def (test_\w+)", TESTS, re.MULTILINE))
    for path in documents.documents():
        named = set(re.findall(r"`(test_\w+)(?:\[[^\]]*\])?`", path.read_text("utf-8")))
        assert named <= defined, (path, named - defined)
