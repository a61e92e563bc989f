"""Links resolve, files and messages that are named exist, the README stays a front door, generated parts are up to date."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from kaggle_kernels.build.spec import PackageBlock as SpecPackageBlock
from kaggle_kernels.build.spec import Spec
from recipes.pairwise.config.schema import PackageBlock, PairwiseBlock
from tests.conftest import ROOT
from tests.docs.pages import all_pages, anchors, page_id, prose

LINK = re.compile(r"\]\(([^)\s]+)\)")
NAMED_FILE = re.compile(r"`((?:preprocess|recipes|postprocess|kaggle_kernels|tests|docs)/[\w./-]+\.\w+)`")
KEY = re.compile(r"^\| `(\w+)` \|", re.M)
QUOTED = re.compile(r"`([^`]+)`")
PLACEHOLDER = re.compile(r"/(mine|NAME|R)\.")
pages = pytest.mark.parametrize("page", all_pages(), ids=page_id)


@pages
def test_links_lead_to_files_and_headings(page):
    broken = []
    for link in LINK.findall(prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pages
def test_files_named_in_the_prose_exist(page):
    named = [name for name in NAMED_FILE.findall(prose(page)) if not PLACEHOLDER.search(name)]
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_readme_is_a_front_door_with_an_index_of_all_pages():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 160
    assert len(text.split()) <= 1500
    assert {page_id(page) for page in all_pages()[1:]} <= {*LINK.findall(text)}


def test_what_was_never_tried_is_said_where_everybody_sees_it():
    assert re.search(r"^> \*\*Not yet run .*the real Kaggle\.\*\*", (ROOT / "README.md").read_text(), re.M)
    publishing = (ROOT / "docs/publishing.md").read_text().splitlines()
    assert "never tried on the real Kaggle" in " ".join(publishing[:4])


def test_messages_that_are_explained_are_in_the_code():
    code = "\n".join(texts_in_the_code())
    unknown = []
    for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines():
        cell = line.split(" | ")[0]
        if not cell.startswith("| ") or "Kaggle's own words" in line:
            continue
        for message in QUOTED.findall(cell):
            fragments = [fragment.strip(" ,") for fragment in message.split("…")]
            unknown += [message for fragment in fragments if fragment not in code]
    assert unknown == []


def texts_in_the_code() -> Iterator[str]:
    """Every string in the source code; what an f-string fills in is …"""
    for room in ("preprocess", "recipes", "postprocess", "kaggle_kernels"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_an_outdated_table_of_rooms_is_refused(tmp_path):
    for folder in ("docs", "preprocess"):
        (tmp_path / folder).mkdir()
    (tmp_path / "preprocess/__init__.py").write_text('"""Makes | pairs.\n\nMore."""\n')
    (tmp_path / "preprocess/pairs.py").touch()
    script, page = tmp_path / "docs/build_architecture.py", tmp_path / "docs/architecture.md"
    script.write_bytes((ROOT / "docs/build_architecture.py").read_bytes())
    page.write_text("# Written by hand\n")

    def build(*options):
        return subprocess.run([sys.executable, script, *options], capture_output=True, text=True, timeout=300)

    outdated = build("--check")
    assert (outdated.returncode, "not up to date" in outdated.stderr) == (2, True)
    assert build().returncode == build("--check").returncode == 0
    assert page.read_text().startswith("# Written by hand\n\n<!--")
    assert "| [preprocess](../preprocess) | Makes \\| pairs. | pairs |" in page.read_text()


@pytest.mark.parametrize(
    "name, heading, block",
    [
        ("recipes", "The `pairwise:` block", PairwiseBlock),
        ("recipes", "The package block", PackageBlock),
        ("kernels", "The keys of a spec", Spec),
        ("kernels", "The keys of a package", SpecPackageBlock),
    ],
)
def test_every_key_is_documented(name, heading, block):
    section = (ROOT / f"docs/{name}.md").read_text().partition(f"# {heading}\n")[2].partition("\n#")[0]
    assert sorted(KEY.findall(section)) == sorted(block.model_fields)
