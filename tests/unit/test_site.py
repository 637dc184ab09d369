"""The site of the documentation: stubs agree with what is compiled, every public name is described, every page is in order."""

import ast
import inspect
import re
import sys
import tomllib

import pytest

import ff_fast
from ff_fast import aio
from tools import api_stubs, build_docs, stub_docs

from ..conftest import ROOT

PAGES = build_docs.entries()


def test_the_stubs_say_what_the_compiled_modules_say(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["stub_docs"])
    assert stub_docs.main() == 0, "run `python -m tools.stub_docs --write`"
    assert not capsys.readouterr().out


def test_a_stub_gets_the_docstrings_that_it_lacks():
    class Module:
        def plain():
            r"""A \ in a line."""

        class Kind:
            """What it is.

            Further.
            """

            def method():
                """How."""

        def _private():
            """Not this one."""

    source = "def plain() -> int: ...\n\nclass Kind:\n    x: int\n    def method(self) -> None:\n        '''Else.'''\n\ndef _private() -> int: ...\n"
    text = stub_docs.documented(source, Module)
    tree = ast.parse(text)
    plain, kind, private = tree.body
    assert ast.get_docstring(plain) == r"A \ in a line."
    assert ast.get_docstring(kind) == "What it is.\n\nFurther."
    assert ast.get_docstring(kind.body[2]) == "How."
    assert ast.get_docstring(private) is None
    assert stub_docs.documented(text, Module) == text


@pytest.mark.parametrize("module", [ff_fast, aio])
def test_every_public_name_is_in_the_reference_with_its_docstring(module):
    tree = ast.parse(api_stubs.stub_of(module))
    described = {
        node.name: ast.get_docstring(node)
        for node in tree.body
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for name in module.__all__:
        if inspect.isclass(getattr(module, name)):
            assert described[name], name
    backend = next(node for node in tree.body if getattr(node, "name", "") == "ValkeyBackend")
    methods = {
        node.name: node
        for node in backend.body
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    }
    for name in ("create_execution", "claim", "open_stream", "follow", "run_worker", "connect"):
        assert ast.get_docstring(methods[name]), name
        arguments = methods[name].args
        assert all(each.annotation for each in [*arguments.args[1:], *arguments.kwonlyargs]), name
    writer = next(node for node in tree.body if getattr(node, "name", "") == "Writer")
    (write,) = (node for node in writer.body if getattr(node, "name", "") == "write")
    assert ast.unparse(write.args).startswith("self, payload: bytes")


def test_what_is_for_restructured_text_becomes_markdown():
    text = api_stubs.markdown("Like :class:`~a.B`::\n\n    code\n\n>>> f()\n'x'\n\nEnd.")
    assert text == "Like `a.B`:\n\n    code\n\n```pycon\n>>> f()\n'x'\n```\n\nEnd."


def test_every_page_of_the_navigation_is_there():
    here = {build_docs.place_of(path).as_posix() for path in build_docs.sources()}
    here |= {f"reference/api/{name}.md" for name in build_docs.reference()}
    listed = [place for _, _, place in PAGES]
    assert len(listed) == len(set(listed))
    assert set(listed) == here


def test_every_name_of_the_reference_is_named_once():
    named = re.findall(r"^::: (.*)$", "\n".join(build_docs.reference().values()), re.MULTILINE)
    assert len(named) == len(set(named)) > 150
    for name in ff_fast.__all__:
        if inspect.isclass(getattr(ff_fast, name)):
            assert {f"ff_fast.{name}", f"ff_fast.errors.{name}"} & set(named), name


def test_pages_have_no_notes_for_tests_and_links_that_hold_on_the_site():
    for path in build_docs.sources():
        text = build_docs.page(path)
        assert "\n<!-- python" not in text
        assert "\n<!-- place" not in text
    index = build_docs.page(ROOT / "docs/index.md")
    assert "](examples/README.md)" in index


def test_a_link_to_what_is_not_on_the_site_is_an_error(tmp_path, monkeypatch):
    page = ROOT / "docs/glossary.md"
    monkeypatch.setattr(type(page), "read_text", lambda *_: "See [it](../Makefile).")
    with pytest.raises(ValueError, match="not on the site"):
        build_docs.page(page)


def test_broken_links_of_a_site_are_found(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#here">b</a><a href="https://x">x</a>')
    (tmp_path / "b.html").write_text('<h1 id="here"></h1><a href="#gone">b</a><img src="no.png">')
    assert build_docs.broken_links(tmp_path) == [
        "b.html: #gone names no anchor",
        "b.html: no.png leads nowhere",
    ]


def test_the_list_for_language_models_names_every_page():
    text = build_docs.llms()
    assert text.startswith("# ff_fast\n\n> ")
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert len(headings) == len(set(headings))
    # It is read out of its place, so its links name the site.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    site = re.escape(project["urls"]["Documentation"])
    for _, title, place in PAGES:
        assert re.search(
            rf"^- \[{re.escape(title)}\]\({site}{place[:-3]}\.html\): \S.{{10,}}$",
            text,
            re.MULTILINE,
        )
