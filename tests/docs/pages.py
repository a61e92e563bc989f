"""What the tests of the documentation share: the pages, and what stands on them."""

import re
from pathlib import Path

from tests.conftest import ROOT

FENCE = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.M | re.S)
HEADING = re.compile(r"^#+ +(.+?) *$", re.M)


def all_pages() -> list[Path]:
    """Every Markdown page of the project, README first."""
    at_the_root = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "recipes/README.md")]
    return [*at_the_root, *sorted((ROOT / "docs").rglob("*.md"))]


def page_id(page: Path) -> str:
    """A page's name in a test's id."""
    return str(page.relative_to(ROOT))


def prose(page: Path) -> str:
    """A page's text without its fenced blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language on a page."""
    return [text for _, name, text in FENCE.findall(page.read_text(encoding="utf-8")) if name == language]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    slugs = set()
    for heading in HEADING.findall(prose(page)):
        words = re.sub(r"[^\w\- ]", "", heading.lower())
        slugs.add(words.replace(" ", "-"))
    return slugs
