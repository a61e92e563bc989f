"""Importing our packages first keeps libraries from fetching code from a hub, from useless warnings, and from being slow."""

import logging
import os
import subprocess
import sys

import pytest

from preprocess.core.quiet import KEPT_BACK, without
from tests.conftest import ROOT

GARBAGE = """
import kaggle_kernels
class Cycle:
    def __init__(self):
        self.itself = self
    def __del__(self):
        print("was looked at")
Cycle()
"""
FAKE_KERNELS = """
print("kernels was imported")
def get_kernel(*arguments, **options):
    print("a kernel was asked for", arguments)
    raise OSError
"""


def run_python(code: str, tmp_path) -> str:
    """What Python prints, both streams, with a library `kernels` before all others that tells of its use."""
    (tmp_path / "kernels.py").write_text(FAKE_KERNELS)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    ended = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path, check=False
    )
    assert ended.returncode == 0, ended.stderr
    return ended.stdout + ended.stderr


@pytest.mark.parametrize("package", ["sys", "recipes.pairwise", "postprocess", "kaggle_kernels"])
def test_our_packages_hide_the_library_that_fetches_kernels(package, tmp_path):
    code = f"from importlib.util import find_spec; import {package}; print(find_spec('kernels') is None)"
    assert run_python(code, tmp_path) == f"{package != 'sys'}\n"


def test_libraries_are_imported_without_a_kernel_and_without_a_warning(tmp_path):
    # On any machine: bitsandbytes asks for a kernel where the CPU has AVX512-BF16.
    code = "import recipes.pairwise, bitsandbytes.backends.cpu.ops, torchao.quantization, transformers.modeling_utils"
    assert run_python(code, tmp_path) == ""


def test_only_messages_that_begin_so_are_kept_back():
    lets_pass = without(KEPT_BACK["torchao"])
    for text, passes in (("Failed to load %s", False), ("Is %s", True)):
        assert lets_pass(logging.LogRecord("torchao", logging.WARNING, "", 0, text, ("x",), None)) is passes


def test_python_does_not_look_for_garbage_when_it_ends(tmp_path):
    assert run_python(GARBAGE.replace("import kaggle_kernels", ""), tmp_path) == "was looked at\n"
    assert run_python(GARBAGE, tmp_path) == ""
