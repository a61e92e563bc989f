import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from safetensors.torch import load_file

from postprocess.run_folder import check_recipe
from postprocess.weights.lora_adapter import merge_layer
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import read_recipe
from tests.postprocess import runs
from tests.postprocess.runs import with_json

STAGES = ["merge", "quantise", "scores", "agreement", "package"]
HEAD = "base_model.model.score.weight"


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_does_nothing_and_needs_no_torch(packaged):
    run, printed = packaged("gemma2", quantize="nf4")
    assert runs.made_stages(printed) == STAGES
    before = snapshot(run.folder)
    code = (
        "import sys; from postprocess.__main__ import main; main(sys.argv[1:], standalone_mode=False); "
        "print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run.recipe)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    current = [f"{stage:<10} up to date" for stage in ("quantise", "agreement", "package")]
    assert [line[:21] for line in done.stdout.splitlines()] == [*current, "[]"]
    assert snapshot(run.folder) == before


@pytest.mark.parametrize("options", [{"quantize": "nf4"}, {"quantize": "int8"}, {"quantize": "none"}, {"adapter": "best"}])
def test_each_layer_is_merged_once_and_the_merged_model_does_not_stay(options, copied, monkeypatch):
    run = copied(training_rows=30, **{"quantize": "nf4", **options})
    merged_layers = []

    def merge_and_count(layer, tensor):
        merged_layers.append(id(tensor))
        return merge_layer(layer, tensor)

    monkeypatch.setattr("postprocess.weights.merge.merge_layer", merge_and_count)
    runs.succeed(run.recipe)
    adapter = load_file(run.folder / "adapter_model.safetensors")
    assert len(merged_layers) == len([name for name in adapter if "lora_A" in name])
    assert not (run.folder / ".merged").exists()
    assert (run.folder / "merged").exists() is (options == {"quantize": "none"})


def test_another_adapter_goes_through_every_stage_again_and_a_damaged_one_leaves_no_package(copied):
    run = copied(quantize="none")
    runs.succeed(run.recipe)
    path = run.folder / "adapter_model.safetensors"
    runs.change_tensors(path, lambda tensors: tensors[HEAD].mul_(1.01))
    assert runs.current_stages(runs.succeed(run.recipe)) == []
    head = load_file(run.folder / "package" / "model.safetensors")["score.weight"]
    assert head.equal(load_file(path)[HEAD].half())
    path.write_bytes(path.read_bytes()[:-100])
    runs.refuse(run.recipe)
    assert not (run.folder / "package").exists()


def test_another_tolerance_scores_nothing_again(copied):
    tolerances = {"tolerance": 0.3, "tolerance_log_loss": 0.9, "tolerance_verdicts": 0.8}
    run = copied(quantize="nf4", **tolerances)
    assert runs.made_stages(runs.succeed(run.recipe)) == STAGES
    for key, value in tolerances.items():
        run.recipe.write_text(run.recipe.read_text().replace(f"{key}: {value}", f"{key}: {value - 0.05}"))
        assert runs.current_stages(runs.succeed(run.recipe)) == ["quantise", "scores"], key
        conditions = json.loads((run.folder / "agreement.json").read_text())["conditions"]
        bounds = {condition["bound"] for condition in conditions}
        assert value - 0.05 in bounds and value not in bounds


def test_three_verdicts_in_the_contracts_order_become_a_package(packaged):
    run, _ = packaged("gemma2", quantize="nf4", tolerance=0.2, verdicts=("tie", "model_b", "model_a"))
    config = json.loads((run.folder / "package" / "config.json").read_text())
    assert config["id2label"] == {"0": "tie", "1": "model_b", "2": "model_a"}
    report = json.loads((run.folder / "agreement.json").read_text())
    assert report["models"][1]["against_recorded"]["largest"] < 1e-6
    assert all(len(row["probabilities"]) == 3 for row in report["golden"])


def without(name):
    """A damage: a file of the run is gone."""
    return lambda run: (run.folder / name).unlink()


def with_text(name, text):
    """A damage: a file of the run holds another text."""
    return lambda run: (run.folder / name).write_text(text)


BAD_RUNS = [
    (without("adapter_model.safetensors"), "train it first with axolotl train"),
    (lambda run: run.folder.rename(run.folder.with_name("moved")), "no such folder; train it first with axolotl train"),
    (without("contract.json"), "has weights but no contract.json"),
    (without("model_input.py"), "has weights but no model_input.py"),
    (without("metrics.json"), "has weights but no metrics.json"),
    (without("adapter_config.json"), "has weights but no adapter_config.json"),
    (with_text("tokenizer.json", "{}"), "tokenizer.json: missing or changed since training"),
    (without("predictions.parquet"), "predictions.parquet: no such file"),
    (with_text("predictions.parquet", "no"), "predictions.parquet: not the predictions of training"),
    (with_text("model.safetensors", "x"), "holds both an adapter and a full model"),
    (with_text("model_input.py", "# edited"), "has changed since training"),
    (with_json("contract.json", base_model="./gone"), "./gone: contract.json names this as the base model"),
    (with_json("contract.json", base_model="nobody/nothing"), "there is no such folder here, and the hub does not give it"),
    (with_json("contract.json", head="tail"), "head is 'tail'; only score, label_tokens, reward can be packaged"),
    (with_json("contract.json", head="reward"), "holds 2 labels, but the head reward needs 1 for 2 verdicts"),
    (with_json("contract.json", head="label_tokens", num_labels=0), "holds 0 label tokens, but the head label_tokens needs 2"),
    (with_json("contract.json", logit_bias=[0.5]), "holds 1 numbers in logit_bias, but the head score needs 2"),
    (with_json("contract.json", budget_tokens="128"), "contract.json: budget_tokens: Input should be a valid integer"),
    (with_json("contract.json", golden=[["a"]]), "contract.json: golden: expected rows with pair and ids"),
    (with_text("contract.json", "[1, 2]"), "contract.json: expected an object, found list"),
    (with_json("adapter_config.json", r="8"), 'adapter_config.json: r: Input should be a valid integer, found "8"'),
    (with_text("postprocess.json", "[]"), "postprocess.json: expected an object of stages"),
    (with_text("adapter_config.json", "[1]"), "adapter_config.json: expected an object"),
    (with_json("contract.json", extra=1), "unknown keys ['extra']"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_RUNS, ids=[message[:40] for _, message in BAD_RUNS])
def test_a_run_that_cannot_be_packaged_is_one_line_and_exit_code_2(damage, message, copied):
    run = copied()
    damage(run)
    assert message in runs.refuse(run.recipe)
    assert not (run.folder / "package").exists()
    assert not list(run.folder.parent.rglob("*.tmp"))


def test_a_model_larger_than_the_memory_is_told_before_anything_is_written(copied, monkeypatch):
    run = copied()
    monkeypatch.setattr("postprocess.memory.comparison_fit.memory", lambda: (10_000, "the GPU"))
    error = runs.refuse(run.recipe)
    assert error.startswith(f"error: {run.base}: the trained model takes 0.0 GB")
    assert "the GPU has 0.0 GB, too little to compare" in error
    assert not (run.folder / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"verdicts": ["model_b", "model_a"]}, "pairwise.verdicts is ('model_b', 'model_a'), but the run was trained with"),
        ({"template": "llama3"}, "pairwise.template.start is '<|begin_of_text|>"),
        ({"budget_tokens": 129}, "pairwise.budget_tokens is 129, but the run was trained with 128"),
    ],
)
def test_a_recipe_changed_since_training_is_one_line(copied, changes, line):
    run = copied()
    values = yaml.safe_load(run.recipe.read_text())
    values["pairwise"] |= changes
    run.recipe.write_text(yaml.safe_dump(values))
    assert line in runs.refuse(run.recipe)


@pytest.mark.parametrize("another", ["another/model", "."], ids=["of the hub", "a folder that is there"])
def test_an_adapter_of_another_base_is_one_line(another, copied, opened):
    run = copied()
    runs.set_json(run.folder / "adapter_config.json", base_model_name_or_path=another)
    with pytest.raises(UserError, match=f"base_model_name_or_path is {another}, .* an adapter of another base"):
        opened(run)


@pytest.mark.parametrize(
    ("in_recipe", "named", "trained_with", "is_refused"),
    [
        ("google/gemma-2-9b", "google/gemma-2-9b-it", "google/gemma-2-9b-it", True),
        ("one", "two", "two", True),
        ("one", "./one", "./one", False),
        ("google/gemma-2-9b-it", "google/gemma-2-9b-it", "one", False),  # axolotl train R.yml --base-model one
        ("google/gemma-2-9b", "google/gemma-2-9b-it", "one", True),
        ("one", "google/gemma-2-9b-it", "one", False),
    ],
)
def test_the_base_of_the_recipe_is_the_run_s(in_recipe, named, trained_with, is_refused, made, tmp_path, monkeypatch):
    run = made("gemma2")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    recipe = read_recipe(run.recipe)
    recipe.axolotl["base_model"] = in_recipe
    contract = replace(run.contract(), base_model=trained_with, recorded={"recipe_base_model": named})
    if not is_refused:
        return check_recipe(recipe, contract, has_adapter=False)
    with pytest.raises(UserError, match=f"base_model is {in_recipe}, but the run was trained with {named}"):
        check_recipe(recipe, contract, has_adapter=False)
