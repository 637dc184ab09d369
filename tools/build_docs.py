"""Put the pages of the site together, build it, and check it: ``make docs``.

Pages come from docs/, examples/, bench/, tests/README.md, CHANGELOG.md, CONTRIBUTING.md and SECURITY.md, at the paths that they have in the
repository, so that their links hold; those of docs/ move to the top. The API reference is made of `tools.api_stubs`. A warning of
the builder, a link that leads nowhere and an anchor that no page has are errors. ``llms.txt`` names every page.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urldefrag

import ff_fast
from ff_fast import FFError, aio
from tools import api_stubs

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build/docs"
PAGES = BUILD / "pages"
SITE = BUILD / "site"
OTHERS = (
    *("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "bench/README.md", "bench/RESULTS.md"),
    *("examples/README.md", "tests/README.md"),
)
"""Pages outside docs/, which keep their paths."""

_HIDDEN = re.compile(r"^<!-- (?:python|place:).*?-->\n+", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"(\]\()([^)\s]+)(\))")


def place_of(path: Path) -> Path | None:
    """Where a file of the repository is on the site, from its top; None if it is not there."""
    inside = path.relative_to(ROOT)
    if inside.parts[0] == "docs":
        return Path(*inside.parts[1:])
    if inside.as_posix() == "README.md":
        return Path("index.md")
    if inside.parts[0] == "examples" and inside.suffix in (".py", ".html"):
        return inside.with_name(inside.name + ".md")
    if inside.as_posix() in OTHERS or inside.parent.as_posix() == "bench/results":
        return inside
    return None


def sources() -> list[Path]:
    """The pages that are files of the repository."""
    return [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in OTHERS)]


def page(path: Path) -> str:
    """Return the text of a page as the site has it: without what tests read alone, with links as they are there."""
    text = _HIDDEN.sub("", path.read_text("utf-8"))
    here = place_of(path)
    if here is None:
        raise ValueError(f"{path} is no page")

    def there(link: re.Match[str]) -> str:
        target, anchor = urldefrag(link[2])
        if not target or target.startswith(("https://", "http://")):
            return link[0]
        meant = (path.parent / target).resolve()
        place = place_of(meant)
        if place is None or not meant.exists():
            raise ValueError(f"{path.relative_to(ROOT)}: {link[2]} is not on the site")
        relative = os.path.relpath(place, here.parent)
        return f"{link[1]}{relative}{'#' if anchor else ''}{anchor}{link[3]}"

    parts = re.split(r"(^```.*?^```$)", text, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else _LINK.sub(there, part) for part in parts)


def write(place: str | Path, text: str) -> None:
    """Write a page."""
    path = PAGES / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def reference() -> dict[str, str]:
    """Return the pages of the API: title and introduction, then a directive for each name."""
    errors, values, tools = ["FFError"], [], []
    for name in ff_fast.__all__:
        value = getattr(ff_fast, name)
        if not isinstance(value, type) or value is FFError:
            continue
        if issubclass(value, FFError):
            errors.append(name)
        elif value.__module__.startswith("ff_fast.types") or issubclass(value, Warning):
            values.append(name)
        elif name not in aio.__all__:
            tools.append(name)
    shells = sorted(set(aio.__all__))
    # Of each page the title with what follows it, and the names of a package.
    pages = {
        "blocking": ("ff_fast: the blocking interface", "ff_fast", [*shells, *tools]),
        "aio": (
            "ff_fast.aio: the interface of asyncio\n\nValues, errors and frames are those of `ff_fast`.",
            "ff_fast.aio",
            shells,
        ),
        "values": (
            "Values\n\nAll are frozen, built by keywords, and in `ff_fast`.",
            "ff_fast",
            values,
        ),
        "errors": (
            "Errors, in full\n\n[Errors](../errors.md) has the table: outcome, and whether a repeat may pass.",
            "ff_fast.errors",
            errors,
        ),
        "web": (
            "ff_fast.web",
            "ff_fast.web",
            ["response", "reading", "framing", "chunk_log", "tickets"],
        ),
        "front-ends": (
            "Front ends",
            "ff_fast.web",
            ["ai_sdk", "ag_ui", "openai_responses", "langgraph", "durable_streams"],
        ),
        "adapters": ("ff_fast.adapters", "ff_fast.adapters", ["assistant_ui", "a2a"]),
        "metrics": ("Metrics and traces", "ff_fast", ["metrics", "tracing"]),
        "keys": ("ff_fast.keys", "ff_fast", ["keys"]),
        "embedded": ("ff_fast.embedded", "ff_fast", ["embedded"]),
    }
    return {
        page: "\n\n".join([f"# {title}", *(f"::: {package}.{name}" for name in names)])
        for page, (title, package, names) in pages.items()
    }


def stage() -> None:
    """Write all pages and stubs."""
    for folder in (PAGES, BUILD / "api", SITE):
        shutil.rmtree(folder, ignore_errors=True)
    api_stubs.write(BUILD / "api")
    for path in sources():
        place = place_of(path)
        if place is not None:
            write(place, page(path))
    for path in sorted((ROOT / "examples").iterdir()):
        if path.suffix in (".py", ".html"):
            language = path.suffix.removeprefix(".").replace("py", "python")
            text = path.read_text("utf-8")
            write(f"examples/{path.name}.md", f"# {path.name}\n\n```{language}\n{text}```\n")
    for picture in [*(ROOT / "docs/images").glob("*.png"), *(ROOT / "bench/results").glob("*.png")]:
        place = place_of(picture)
        if place is not None:
            target = PAGES / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(picture, target)
    for name, text in reference().items():
        write(f"reference/api/{name}.md", text + "\n")
    (PAGES / "llms.txt").write_text(llms(), "utf-8")


def entries() -> list[tuple[str, str, str]]:
    """Return section, title and page of each entry of the navigation."""
    return _entries(_project()["nav"])


def _project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "zensical.toml").read_text("utf-8"))["project"]
    return project


def _entries(nav: list[object], section: str = "") -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for entry in nav:
        if not isinstance(entry, dict):
            raise TypeError("an entry of the navigation has a title")
        for title, target in entry.items():
            if isinstance(target, list):
                found += _entries(target, title)
            else:
                found.append((section, title, target))
    return found


def _source(place: str) -> Path | None:
    for path in (ROOT / "docs" / place, ROOT / place):
        if path.is_file():
            return path
    return None


def llms() -> str:
    """Return ``llms.txt``: what the project is, and each page with its first sentence."""
    project = _project()
    sections: dict[str, list[str]] = {}
    for section, title, place in entries():
        source = _source(place)
        said = (
            f"Signatures and docstrings of {title}." if source is None else _first_sentence(source)
        )
        url = f"{project['site_url']}{place.removesuffix('.md')}.html"
        sections.setdefault(section or "Pages", []).append(f"- [{title}]({url}): {said}")
    lines = [f"# {project['site_name']}", "", f"> {project['site_description']}"]
    for section, pages in sections.items():
        lines += ["", f"## {section}", "", *pages]
    return "\n".join(lines) + "\n"


def _first_sentence(path: Path) -> str:
    """The first sentence of a page's prose, without links."""
    for paragraph in _HIDDEN.sub("", path.read_text("utf-8")).split("\n\n"):
        text = " ".join(paragraph.split())
        if text and (text[0].isalnum() or text[0] == "`"):
            text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
            return re.split(r"(?<=[.]) ", text)[0]
    return path.stem


class _Page(HTMLParser):
    """The links and anchors of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name in ("id", "name"):
                self.anchors.add(value)
            elif (tag, name) in (("a", "href"), ("img", "src")):
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """Return what is wrong with the links between the pages of a site."""
    pages = {}
    for path in site.rglob("*.html"):
        pages[path.resolve()] = read = _Page()
        read.feed(path.read_text("utf-8"))
    wrong = []
    for path, read in pages.items():
        if path.name == "404.html":  # its links begin with the address of the site
            continue
        for link in read.links:
            target, anchor = urldefrag(link)
            if re.match(r"[a-z]+:", target):
                continue
            there = (path.parent / unquote(target)).resolve() if target else path
            if there.is_dir():
                there = there / "index.html"
            where = f"{path.relative_to(site.resolve())}: {link}"
            if not there.exists():
                wrong.append(f"{where} leads nowhere")
            elif anchor and there in pages and unquote(anchor) not in pages[there].anchors:
                wrong.append(f"{where} names no anchor")
    return sorted(set(wrong))


def main() -> int:
    """Build the site with the builder whose path is named."""
    (builder,) = sys.argv[1:]
    stage()
    done = subprocess.run(  # noqa: S603 - make names it
        [builder, "build", "--strict", "--clean", "--config-file", str(ROOT / "zensical.toml")],
        cwd=ROOT,
        check=False,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    print(done.stdout)
    # Its strict mode does not count what the reader of docstrings has to say.
    if done.returncode or re.search(
        r"^griffe: |warning", done.stdout, re.MULTILINE | re.IGNORECASE
    ):
        print("The builder has warned.", file=sys.stderr)
        return 1
    wrong = broken_links(SITE)
    print("\n".join(wrong), file=sys.stderr, end="\n" if wrong else "")
    if not wrong:
        print(f"The site is in {SITE.relative_to(ROOT)}: {len(list(SITE.rglob('*.html')))} pages.")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
