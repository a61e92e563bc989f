"""Every number on a page of docs/background comes from a snippet on that page: they run here, and their output is compared."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT

NOTES = ROOT / "docs/background"
PAGES = ("fine_tuning", "jax", "keras", "mixed_precision", "number_formats")
ENVIRONMENTS = {"jax": ".venv-keras", "keras": ".venv-keras"}
BETWEEN = "=== the next snippet ==="
SNIPPET = re.compile(r"^```python\n(.*?)^```\n```text\n(.*?)^```$", re.M | re.S)
FENCE = re.compile(r"^```.*?^```$", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:[.,]\d+)*(?![\w-])")
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",  # the pages say what two CPU cores print
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}
LINES, COLUMNS = 80, 100


def page_text(page: str) -> str:
    return (NOTES / f"{page}.md").read_text(encoding="utf-8")


def python_of(page: str) -> Path:
    """The Python that runs a page; the test is skipped where its environment has not been made."""
    environment = ROOT / ENVIRONMENTS.get(page, ".venv")
    if not (environment / "bin/python").exists():
        pytest.skip(f"{environment.name} is absent; `make setup` creates it")
    return environment / "bin/python"


def printed(page: str, folder: Path) -> list[str]:
    """What each snippet of a page prints, all of them run in order in one fresh process."""
    script = folder / f"page_{page}.py"
    script.write_text(f"print({BETWEEN!r})\n".join(code for code, _ in SNIPPET.findall(page_text(page))), encoding="utf-8")
    ended = subprocess.run(
        [python_of(page), script], capture_output=True, text=True, cwd=folder, env=os.environ | QUIET, timeout=300
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout.split(f"{BETWEEN}\n")


def test_there_are_five_pages():
    assert sorted(path.name for path in NOTES.iterdir()) == sorted(f"{page}.md" for page in PAGES)


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_print_what_the_page_says(page, tmp_path):
    expected = [output for _, output in SNIPPET.findall(page_text(page))]
    assert len(expected) > 1
    assert printed(page, tmp_path) == expected


@pytest.mark.parametrize("page", PAGES)
def test_a_page_is_one_screen_and_every_fence_on_it_is_a_snippet(page):
    text = page_text(page)
    assert len(text.splitlines()) <= LINES
    assert [line for line in text.splitlines() if len(line) > COLUMNS] == []
    assert len(FENCE.findall(text)) == 2 * len(SNIPPET.findall(text)), "each ```python is followed by its ```text"


@pytest.mark.parametrize("page", PAGES)
def test_every_number_in_the_prose_stands_in_a_snippet_or_its_output(page):
    text = page_text(page)
    shown = set(NUMBER.findall(" ".join(FENCE.findall(text))))
    assert set(NUMBER.findall(FENCE.sub("", text))) - shown == set()


def test_a_number_is_found_in_prose_and_not_in_a_name():
    prose = "a T4, fp16, bf16 on Gemma-2-9b: 65504, 0.334 of 1/3, float32 and 1e-8"
    assert NUMBER.findall(prose) == ["65504", "0.334", "1", "3"]


def test_a_snippet_is_code_and_what_it_prints():
    text = "# Page\n\n```python\nprint(1)\n```\n```text\n1\n```\n\nWords.\n\n```python\nprint(2)\n```\n```text\n2\n```\n"
    assert SNIPPET.findall(text) == [("print(1)\n", "1\n"), ("print(2)\n", "2\n")]
