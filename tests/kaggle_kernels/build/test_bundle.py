"""The generated kernels are current, readable, and need nothing of this repository."""

import ast
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from kaggle_kernels.build import bundle
from kaggle_kernels.build.bundle import Module, generate_files, kernel_folder, stale_files
from kaggle_kernels.build.spec import find_spec
from tests.conftest import ROOT
from tests.kaggle_kernels.packages import write_recipe

EXAMPLES = ROOT / "kaggle_kernels" / "examples"
RUNTIME_PACKAGES = {"torch", "transformers", "tokenizers", "pyarrow", "safetensors", "peft"}
SPEC = "title: Pairwise Test\ncompetition: wsdm\npackages: [{run: tiny, dataset: dataset-tiny}]\nclock_seconds: 600\n"


@pytest.fixture
def spec_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, "tiny", "dataset-tiny")
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "test.yml").write_text(SPEC)
    return tmp_path / "specs" / "test.yml"


def test_the_committed_example_is_what_its_spec_and_the_runtime_give():
    assert stale_files(find_spec("demo"), EXAMPLES) == {}, "run `make example`"
    assert [path.name for path in EXAMPLES.iterdir()] == ["demo"]


def test_metadata_asks_for_two_t4s_without_internet_and_for_the_datasets():
    metadata = json.loads(generate_files(find_spec("gemma2_lmsys"))["kernel-metadata.json"])
    assert metadata["id"] == "INSERT_OWNER/pairwise-gemma-2-lmsys"
    assert (metadata["machine_shape"], metadata["enable_internet"]) == ("NvidiaTeslaT4", False)
    assert metadata["dataset_sources"] == ["INSERT_OWNER/pairwise-gemma2-lmsys", "INSERT_OWNER/pairwise-wheels"]
    assert metadata["competition_sources"] == ["lmsys-chatbot-arena"]
    without_wheels = json.loads(generate_files(find_spec("minilm_cls"))["kernel-metadata.json"])
    assert without_wheels["dataset_sources"] == ["INSERT_OWNER/pairwise-minilm-cls"]


def test_a_kernel_imports_only_what_kaggles_image_has(spec_path):
    tree = ast.parse(generate_files(spec_path)["kernel.py"])
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) == RUNTIME_PACKAGES


def test_a_kernel_is_as_tidy_as_code_written_by_hand():
    rules = ["--select", "E,F,I,B,UP,SIM,W", "--ignore", "SIM108,UP037", "--line-length", "128"]
    ruff = [sys.executable, "-m", "ruff", "check", *rules, "--isolated", EXAMPLES / "demo" / "kernel.py"]
    done = subprocess.run(ruff, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout


def test_a_kernel_holds_every_module_of_the_runtime():
    files = [path.relative_to(bundle.RUNTIME) for path in bundle.RUNTIME.rglob("*.py") if path.stem != "__init__"]
    assert sorted(bundle.MODULES) == sorted(".".join(path.with_suffix("").parts) for path in files)


def test_build_writes_what_is_stale_and_check_leaves_it(spec_path):
    run = CliRunner()
    assert run.invoke(main, ["build", str(spec_path)]).output == "outputs/kernels/test: built\n"
    assert bundle.build(spec_path) == []
    assert run.invoke(main, ["build", "--check", str(spec_path)]).exit_code == 0
    kernel = kernel_folder(spec_path) / "kernel.py"
    kernel.write_text(kernel.read_text() + "# by hand\n")
    done = run.invoke(main, ["build", "--check", str(spec_path)])
    assert done.exit_code == 2
    assert done.output.startswith(f"error: {kernel}: not up to date; run the same command without --check")
    assert kernel.read_text().endswith("# by hand\n")
    assert bundle.build(spec_path) == [kernel]


def test_a_name_that_two_modules_define_is_refused():
    twice = [Module(name, "", (), "", ("log",)) for name in ("first", "second")]
    with pytest.raises(ValueError, match="second.py and first.py both define log; rename one"):
        bundle.check_names(twice)
