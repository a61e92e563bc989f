"""Every number on a page of docs/background comes from a snippet on that page: they run here, and their output is compared."""

import os
import re
import subprocess

import pytest

from tests.conftest import ROOT
from tests.docs.pages import page_id, prose

PAGES = sorted((ROOT / "docs/background").iterdir())
NEEDS_KERAS = ("jax.md", "keras.md")
BETWEEN = "=== the next snippet ==="
SNIPPET = re.compile(r"^```python\n(.*?)^```\n```text\n(.*?)^```$", re.M | re.S)
NUMBER = re.compile(r"(?<![\w.,-])\d+(?:[.,]\d+)*(?![\w-])")
QUIET = {
    "CUDA_VISIBLE_DEVICES": "",  # the pages say what two CPU cores print
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_the_snippets_of_a_page_print_what_the_page_says(page, tmp_path):
    environment = ROOT / (".venv-keras" if page.name in NEEDS_KERAS else ".venv")
    if not (environment / "bin/python").exists():
        pytest.skip(f"{environment.name} is absent; `make setup` creates it")
    snippets = SNIPPET.findall(page.read_text(encoding="utf-8"))
    assert len(snippets) > 1
    script = tmp_path / "page.py"
    script.write_text(f"print({BETWEEN!r})\n".join(code for code, _ in snippets), encoding="utf-8")
    command = [environment / "bin/python", script]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | QUIET, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.split(f"{BETWEEN}\n") == [output for _, output in snippets]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_a_page_is_one_screen_and_takes_every_number_in_its_prose_from_a_snippet(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert [line for line in text.splitlines() if len(line) > 100] == []
    snippets = SNIPPET.findall(text)
    assert text.count("```") == 4 * len(snippets), "each ```python is followed by its ```text"
    shown = set(NUMBER.findall(str(snippets)))
    assert set(NUMBER.findall(prose(page))) - shown == set()
