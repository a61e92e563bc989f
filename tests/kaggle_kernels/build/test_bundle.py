"""The generated kernels are current, readable, and need nothing of this repository."""

import ast
import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from kaggle_kernels.build import bundle
from kaggle_kernels.build.bundle import (
    build_mark,
    generate,
    kernel_folder,
    read_module,
    stale_files,
)
from kaggle_kernels.build.spec import all_specs, find_spec, slugify
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
    assert stale_files(find_spec("demo"), EXAMPLES) == [], "run `make example`"
    assert [path.name for path in EXAMPLES.iterdir()] == ["demo"]


@pytest.mark.parametrize("path", all_specs(), ids=lambda path: path.stem)
def test_metadata_asks_for_two_t4s_without_internet_under_the_slug_of_the_title(path):
    metadata = json.loads(generate(path)["kernel-metadata.json"])
    assert metadata["machine_shape"] == "NvidiaTeslaT4"
    assert metadata["enable_internet"] is False
    assert (metadata["language"], metadata["kernel_type"], metadata["code_file"]) == ("python", "script", "kernel.py")
    assert metadata["id"] == f"INSERT_OWNER/{slugify(metadata['title'])}"
    assert 5 <= len(metadata["title"]) <= 50
    slug = "lmsys-chatbot-arena" if "lmsys" in path.stem else "wsdm-cup-multilingual-chatbot-arena"
    assert metadata["competition_sources"] == [slug]


def test_the_sources_are_the_packages_and_the_wheels():
    [path] = [path for path in all_specs() if path.stem == "gemma2_cls"]
    metadata = json.loads(generate(path)["kernel-metadata.json"])
    assert metadata["dataset_sources"] == ["INSERT_OWNER/pairwise-gemma2-cls", "INSERT_OWNER/pairwise-wheels"]


def test_a_kernel_imports_only_what_kaggles_image_has(spec_path):
    tree = ast.parse(generate(spec_path)["kernel.py"])
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names) == RUNTIME_PACKAGES


@pytest.mark.parametrize("command", [["check", "--select", "E,F,I,B,UP,SIM,W"], ["format", "--diff"]], ids=["check", "format"])
def test_a_kernel_is_as_tidy_as_code_written_by_hand(command):
    ruff = [sys.executable, "-m", "ruff", *command, "--isolated", "--line-length", "128"]
    done = subprocess.run([*ruff, EXAMPLES / "demo" / "kernel.py"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_kernel_holds_every_module_of_the_runtime_under_its_heading(spec_path):
    text = generate(spec_path)["kernel.py"]
    files = [path.relative_to(bundle.RUNTIME) for path in bundle.RUNTIME.rglob("*.py") if path.stem != "__init__"]
    modules = sorted(".".join(path.with_suffix("").parts) for path in files)
    assert sorted(bundle.MODULES) == modules
    for name in modules:
        module = read_module(name)
        assert f"# {name.replace('.', '/')}.py\n#\n# {module.docstring.splitlines()[0]}\n" in text
        assert module.body in text


def test_the_settings_are_literal_and_stand_before_the_code(spec_path):
    text = generate(spec_path)["kernel.py"]
    assert '        PackageSettings(\n            run="tiny",\n            dataset="dataset-tiny",\n' in text
    assert '            placement="each",\n            verdicts=("model_a", "model_b"),\n' in text
    assert '            base_model="outputs/demo/input/gemma2",\n            model_type="gemma2",\n' in text
    assert '    verdicts=("model_a", "model_b"),\n' in text
    assert text.index("SETTINGS = Settings(") < text.index("# package.py")


def test_build_writes_the_files_and_a_second_time_changes_nothing(spec_path):
    assert [path.name for path in bundle.build(spec_path)] == ["kernel.py", "kernel-metadata.json"]
    assert bundle.build(spec_path) == []
    assert stale_files(spec_path) == []


def test_check_exits_with_2_where_a_file_differs_and_leaves_it(spec_path):
    run = CliRunner()
    assert run.invoke(main, ["build", str(spec_path)]).exit_code == 0
    assert run.invoke(main, ["build", "--check", str(spec_path)]).exit_code == 0
    kernel = kernel_folder(spec_path) / "kernel.py"
    kernel.write_text(kernel.read_text() + "# by hand\n")
    done = run.invoke(main, ["build", "--check", str(spec_path)])
    assert done.exit_code == 2
    assert done.output.startswith(f"error: {kernel}: not up to date; run the same command without --check")
    assert kernel.read_text().endswith("# by hand\n")


def test_build_of_a_wrong_spec_exits_with_2_in_one_line(spec_path):
    spec_path.write_text(SPEC.replace("clock_seconds", "clock_second"))
    done = CliRunner().invoke(main, ["build", str(spec_path)])
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert "clock_second: unknown key; did you mean clock_seconds?" in done.output
    assert not kernel_folder(spec_path).exists()


def test_a_name_that_two_modules_define_is_refused():
    with pytest.raises(ValueError, match="package.py and package.py both define PackageError|both define NOT_MOUNTED"):
        bundle.check_names([read_module("package"), read_module("package")])


def test_help_loads_neither_torch_nor_polars():
    code = "import sys, kaggle_kernels.__main__; print({'torch', 'transformers', 'polars', 'pydantic'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


def test_the_build_tells_one_kernel_from_another(spec_path):
    first = generate(spec_path)["kernel.py"]
    assert first == generate(spec_path)["kernel.py"]
    assert first.count(f'    build="{build_mark(first)}",\n') == 1
    spec_path.write_text(SPEC.replace("600", "601"))
    assert len({build_mark(first), build_mark(generate(spec_path)["kernel.py"]), ""}) == 3
