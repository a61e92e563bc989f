"""When a stage is made again: its inputs, its settings, its code, and what each stage's list of code must hold."""

import ast
import os
import shutil

import grimp
import pytest

from postprocess import stage_code, staleness
from postprocess.staleness import Stage, code_hashes, making, skip_if_current
from preprocess.core.errors import UserError
from tests.conftest import ROOT
from tests.postprocess import runs

PROJECT = ("kaggle_kernels", "postprocess", "preprocess", "recipes")
ENTRY_MODULES = {
    "MERGE": ["postprocess.weights.merge"],
    "QUANTISE": ["postprocess.weights.quantise_run"],
    "GPTQ": ["postprocess.gptq.quantize", "postprocess.gptq.worker"],
    "UNMERGED": ["postprocess.weights.nf4_base_plus_adapter"],
    "SCORES": ["postprocess.agreement.model_scores"],
    "AGREEMENT": ["postprocess.agreement.gate"],
    "PACKAGE": ["postprocess.package", "postprocess.agreement.validation_rows", "postprocess.temperature"],
    "AVERAGE": ["postprocess.weights.average_lora"],
    "ZERO_SHOT": ["postprocess.zero_shot.base_model_run"],
}
CANNOT_CHANGE_RESULTS = (
    "preprocess/core/",  # errors, atomic files, the ledger
    "recipes/pairwise/processes.py",  # which process prints
    "recipes/pairwise/config/",  # checks a recipe, whose values are among a stage's settings
    "recipes/pairwise/tracking/recipe_copy.py",
    "kaggle_kernels/runtime/settings.py",  # the kernel's clock and log
)
# validation_rows.py takes the names of the two orders from it, for a function that GPTQ does not call.
CANNOT_CHANGE_GPTQ = ("kaggle_kernels/runtime/models/scoring.py",)


@pytest.fixture(scope="module")
def import_graph():
    """Which module of the project imports which."""
    return grimp.build_graph(*PROJECT, cache_dir=None)


@pytest.mark.parametrize("name", ENTRY_MODULES)
def test_a_stage_lists_every_module_that_it_imports(name, import_graph):
    modules = set(ENTRY_MODULES[name])
    for entry in ENTRY_MODULES[name]:
        modules |= import_graph.find_upstream_modules(entry)
    exceptions = CANNOT_CHANGE_RESULTS + (CANNOT_CHANGE_GPTQ if name == "GPTQ" else ())
    files = [module.replace(".", "/") + ".py" for module in modules]
    imported = {file for file in files if (ROOT / file).is_file() and not file.startswith(exceptions)}
    assert len(imported) > 3
    assert sorted(imported - code_hashes(getattr(stage_code, name)).keys()) == []


def test_gptq_is_made_again_with_other_requirements():
    assert "postprocess/gptq/requirements.txt" in code_hashes(stage_code.GPTQ)


def test_every_module_that_the_pipeline_imports_late_is_an_entry_module():
    tree = ast.parse((ROOT / "postprocess/pipeline.py").read_text())
    late = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.col_offset}
    checks = {"postprocess.memory.comparison_fit"}
    assert late - checks <= {module for modules in ENTRY_MODULES.values() for module in modules}


@pytest.fixture
def source_copy(tmp_path, monkeypatch):
    """A copy of the project's source, of which the keys are made; a test may edit it."""
    for name in PROJECT:
        ignored = shutil.ignore_patterns("__pycache__", "examples", "*.yml")
        shutil.copytree(ROOT / name, tmp_path / "source" / name, ignore=ignored)
    monkeypatch.setattr(staleness, "ROOT", tmp_path / "source")
    return tmp_path / "source"


def test_code_that_has_moved_away_is_no_silent_gap(source_copy):
    (source_copy / "postprocess/weights/merge.py").rename(source_copy / "postprocess/merge.py")
    with pytest.raises(FileNotFoundError, match=r"weights/merge\.py"):
        code_hashes(stage_code.MERGE)


def test_the_command_makes_again_what_an_edit_concerns(copied, source_copy):
    run = copied(quantize="nf4")

    def made_after_edit(name: str) -> list[str]:
        (source_copy / name).write_text((source_copy / name).read_text() + "\n")
        return runs.made_stages(runs.succeed(run.recipe))

    assert made_after_edit("postprocess/weights/merge.py") == ["merge", "quantise", "scores", "agreement", "package"]
    assert made_after_edit("postprocess/sweep.py") == []
    assert made_after_edit("kaggle_kernels/runtime/models/pipeline.py") == ["merge", "scores", "agreement", "package"]
    assert made_after_edit("postprocess/package.py") == ["package"]


@pytest.fixture
def stage(tmp_path):
    """A stage that reads one file and makes one."""
    (tmp_path / "input").write_text("a")
    return Stage(tmp_path, "stage", [tmp_path / "input"], {"to": 1}, [tmp_path / "output"], stage_code.MERGE)


def make(stage: Stage) -> bool:
    """Whether the stage had to be made."""
    if skip_if_current(stage):
        return False
    with making(stage):
        stage.outputs[0].write_text("made")
    return True


def test_a_stage_is_made_again_where_an_input_an_output_a_setting_or_a_library_has_changed(stage, monkeypatch):
    assert (make(stage), make(stage)) == (True, False)
    os.utime(stage.inputs[0], ns=(1, 1))  # a small file counts by its content
    assert not make(stage)
    stage.inputs[0].write_text("b")
    assert (make(stage), make(stage)) == (True, False)
    stage.outputs[0].write_text("damaged")
    assert (make(stage), make(stage)) == (True, False)
    stage.settings["to"] = 2
    assert (make(stage), make(stage)) == (True, False)
    monkeypatch.setattr("postprocess.staleness.version", lambda library: "0.0")
    assert (make(stage), make(stage)) == (True, False)


def test_a_large_file_counts_by_its_size_and_time(stage, monkeypatch):
    monkeypatch.setattr(staleness, "LARGEST_HASHED_BYTES", 0)
    assert (make(stage), make(stage)) == (True, False)
    os.utime(stage.inputs[0], ns=(1, 1))
    assert (make(stage), make(stage)) == (True, False)


def test_what_changes_while_a_stage_is_made_makes_it_again(stage):
    with making(stage):
        stage.outputs[0].write_text("made")
        stage.inputs[0].write_text("b, meanwhile")
    assert (make(stage), make(stage)) == (True, False)


def test_a_full_disk_is_one_error_whichever_library_meets_it(stage):
    with pytest.raises(UserError, match=r"output: cannot be written \(parquet.*\); make room on the disk"), making(stage):
        raise RuntimeError("parquet: underlying IO error: No space left on device (os error 28)")
    with pytest.raises(RuntimeError, match="another"), making(stage):
        raise RuntimeError("another")
    assert not (stage.run_folder / "postprocess.json").exists()
