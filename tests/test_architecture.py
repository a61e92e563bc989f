"""Imports go one way, the runtime is a leaf, model_input.py needs nothing, and nothing unsafe is called."""

import ast
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

MAY_IMPORT = {
    "preprocess": set(),
    "recipes": {"preprocess"},
    "postprocess": {"preprocess", "recipes", "kaggle_kernels.runtime"},
    "kaggle_kernels": {"preprocess", "recipes", "postprocess"},
}
RUNTIME_MAY_IMPORT = {
    "torch",
    "transformers",
    "peft",
    "tokenizers",
    "safetensors",
    "numpy",
    "pandas",
    "pyarrow",
    "kaggle_kernels",
}
FILES = [path for room in MAY_IMPORT for path in sorted((ROOT / room).rglob("*.py")) if "generated" not in path.parts]
LONGEST_FILE, LONGEST_FUNCTION = 400, 60


def imports(path: Path) -> set[str]:
    """Every module that a file imports, wherever the import stands."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
    return found


def within(module: str, packages: set[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def test_the_files_are_found():
    assert len(FILES) > 30


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    ours = {module for module in imports(path) if within(module, {*MAY_IMPORT, "tests"})}
    assert {module for module in ours if not within(module, MAY_IMPORT[room] | {room})} == set()


def test_the_runtime_is_a_leaf():
    allowed = RUNTIME_MAY_IMPORT | set(sys.stdlib_module_names)
    for path in (ROOT / "kaggle_kernels/runtime").glob("*.py"):
        modules = imports(path)
        assert {module for module in modules if module.split(".")[0] not in allowed} == set(), path
        ours = {module for module in modules if module.startswith("kaggle_kernels")}
        assert {module for module in ours if not module.startswith("kaggle_kernels.runtime")} == set(), path


def test_the_model_input_imports_the_standard_library_only():
    assert {module.split(".")[0] for module in imports(ROOT / "preprocess/model_input.py")} <= set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_short_and_nothing_unsafe_is_called(path):
    text = path.read_text()
    assert text.count("\n") <= LONGEST_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < LONGEST_FUNCTION, node.name
        if isinstance(node, ast.Call):
            assert getattr(node.func, "id", "") not in {"eval", "exec"}
    assert not within("pickle", imports(path))
    assert "trust_remote_code=True" not in text


def test_every_file_has_its_line_in_the_readme():
    readme = (ROOT / "README.md").read_text()
    unnamed = [str(path.relative_to(ROOT)) for path in FILES if path.name != "__init__.py" and path.name not in readme]
    assert unnamed == []
