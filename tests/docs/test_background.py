"""Every number on a page of docs/background comes from a snippet on that page: they run here, and their output is compared."""

import os
import re
import runpy
import subprocess
import sys

import pytest
import torch

from tests import forked
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
    snippets = SNIPPET.findall(page.read_text(encoding="utf-8"))
    assert len(snippets) > 1
    script = tmp_path / "page.py"
    script.write_text(f"print({BETWEEN!r})\n".join(code for code, _ in snippets), encoding="utf-8")
    run_script = run_with_keras if page.name in NEEDS_KERAS else run_in_fork
    assert run_script(script).split(f"{BETWEEN}\n") == [output for _, output in snippets]


def run_with_keras(script) -> str:
    python = ROOT / ".venv-keras/bin/python"
    if not python.exists():
        pytest.skip(".venv-keras is absent; `make setup` creates it")
    command = [python, script]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=script.parent, env=os.environ | QUIET, timeout=300)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


def run_in_fork(script) -> str:
    """A fork of the server that has imported PyTorch and the libraries: importing takes most of a page's seconds."""
    process = forked.SERVER.Process(target=print_into_files, args=(script,))
    process.start()
    forked.wait([process])
    assert process.exitcode == 0, script.with_suffix(".err").read_text()[-3000:]
    return script.with_suffix(".out").read_text()


def print_into_files(script) -> None:
    os.environ |= QUIET
    os.chdir(script.parent)
    torch.set_num_threads(1)
    for stream, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(script.with_suffix(suffix), os.O_WRONLY | os.O_CREAT), stream)
    sys.stdout = os.fdopen(1, "w")
    sys.stderr = os.fdopen(2, "w")
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_a_page_is_one_screen_and_takes_every_number_in_its_prose_from_a_snippet(page):
    text = page.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 80
    assert [line for line in text.splitlines() if len(line) > 100] == []
    snippets = SNIPPET.findall(text)
    assert text.count("```") == 4 * len(snippets), "each ```python is followed by its ```text"
    shown = set(NUMBER.findall(str(snippets)))
    assert set(NUMBER.findall(prose(page))) - shown == set()
