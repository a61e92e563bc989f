import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

from postprocess.__main__ import main
from postprocess.run_folder import check_recipe, read_run
from postprocess.weights.lora_adapter import merge_layer
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import read_recipe
from tests.postprocess import runs

KNOWN = ("merge", "quantise", "scores", "agreement", "package")
STAGES = ["merge", "quantise", "scores", "agreement", "package"]


def invoke(run):
    return CliRunner().invoke(main, [str(run.recipe)])


def stage_lines(output):
    return [line.split()[0] for line in output.splitlines() if line.split()[0] in KNOWN and not line.startswith(" ")]


def snapshot(folder):
    return {path: (path.stat().st_mtime_ns, path.stat().st_ino) for path in folder.rglob("*") if path.is_file()}


def test_a_second_run_does_nothing_and_needs_no_torch(packaged):
    run, printed = packaged("gemma2", quantize="nf4")
    assert stage_lines(printed) == STAGES
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
    assert invoke(run).exit_code == 0
    adapter = load_file(run.folder / "adapter_model.safetensors")
    assert len(merged_layers) == len([name for name in adapter if "lora_A" in name])
    assert not (run.folder / ".merged").exists()
    assert (run.folder / "merged").exists() is (options == {"quantize": "none"})


def test_another_adapter_goes_through_every_stage_again_and_a_damaged_one_leaves_no_package(copied):
    run = copied(quantize="none")
    assert invoke(run).exit_code == 0
    path = run.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    tensors["base_model.model.score.weight"] *= 1.01
    save_file(tensors, path)
    result = invoke(run)
    assert result.exit_code == 0
    assert "up to date" not in result.stdout
    head = load_file(run.folder / "package" / "model.safetensors")["score.weight"]
    assert head.equal(tensors["base_model.model.score.weight"].half())
    path.write_bytes(path.read_bytes()[:-100])
    assert invoke(run).exit_code == 2
    assert not (run.folder / "package").exists()


@pytest.mark.parametrize(
    ("key", "value", "changed"),
    [("tolerance", 0.3, 0.25), ("tolerance_log_loss", 0.9, 0.8), ("tolerance_verdicts", 0.9, 0.8)],
)
def test_another_tolerance_scores_nothing_again(key, value, changed, copied):
    run = copied(quantize="nf4", **{key: value})
    assert stage_lines(invoke(run).stdout) == STAGES
    run.recipe.write_text(run.recipe.read_text().replace(f"{key}: {value}", f"{key}: {changed}"))
    result = invoke(run)
    lines = [line.split()[0] for line in result.stdout.splitlines() if "up to date" in line]
    assert (result.exit_code, lines) == (0, ["quantise", "scores"])
    bounds = {condition["bound"] for condition in json.loads((run.folder / "agreement.json").read_text())["conditions"]}
    assert changed in bounds and value not in bounds


def test_three_verdicts_in_the_contracts_order_become_a_package(packaged):
    run, _ = packaged("gemma2", quantize="nf4", tolerance=0.2, verdicts=("tie", "model_b", "model_a"))
    config = json.loads((run.folder / "package" / "config.json").read_text())
    assert config["id2label"] == {"0": "tie", "1": "model_b", "2": "model_a"}
    report = json.loads((run.folder / "agreement.json").read_text())
    assert report["models"][1]["against_recorded"]["largest"] < 1e-6
    assert all(len(row["probabilities"]) == 3 for row in report["golden"])


def edit_json(run, name="contract.json", **values):
    path = run.folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def append_to_model_input(run):
    with (run.folder / "model_input.py").open("a") as file:
        file.write("# edited\n")


BAD_RUNS = [
    (lambda run: (run.folder / "adapter_model.safetensors").unlink(), "train it first with axolotl train"),
    (lambda run: run.folder.rename(run.folder.with_name("moved")), "no such folder; train it first with axolotl train"),
    (lambda run: (run.folder / "contract.json").unlink(), "weights without contract.json"),
    (lambda run: (run.folder / "model_input.py").unlink(), "weights without model_input.py"),
    (lambda run: (run.folder / "metrics.json").unlink(), "weights without metrics.json"),
    (lambda run: (run.folder / "adapter_config.json").unlink(), "weights without adapter_config.json"),
    (lambda run: (run.folder / "tokenizer.json").write_text("{}"), "tokenizer.json: missing or changed since training"),
    (lambda run: (run.folder / "predictions.parquet").unlink(), "predictions.parquet: no such file"),
    (lambda run: (run.folder / "predictions.parquet").write_text("no"), "predictions.parquet: not the predictions of training"),
    (lambda run: (run.folder / "model.safetensors").write_text("x"), "holds an adapter and a full model"),
    (append_to_model_input, "has changed since training"),
    (lambda run: edit_json(run, base_model="./gone"), "./gone: the base model in contract.json"),
    (lambda run: edit_json(run, base_model="nobody/nothing"), "neither a folder here nor to be had from the hub"),
    (lambda run: edit_json(run, head="tail"), "head is 'tail'; only score, label_tokens, reward can be packaged"),
    (lambda run: edit_json(run, head="reward"), "2 labels for 2 verdicts and the head reward, expected 1"),
    (lambda run: edit_json(run, head="label_tokens", num_labels=0), "0 label tokens for 2 verdicts"),
    (lambda run: edit_json(run, logit_bias=[0.5]), "1 numbers in logit_bias for 2 verdicts"),
    (lambda run: edit_json(run, budget_tokens="128"), "contract.json: budget_tokens: Input should be a valid integer"),
    (lambda run: edit_json(run, golden=[["a"]]), "contract.json: golden: expected rows with pair and ids"),
    (lambda run: (run.folder / "contract.json").write_text("[1, 2]"), "contract.json: expected an object, found [1, 2]"),
    (
        lambda run: edit_json(run, "adapter_config.json", r="8"),
        'adapter_config.json: r: Input should be a valid integer, found "8"',
    ),
    (lambda run: (run.folder / "postprocess.json").write_text("[]"), "postprocess.json: expected an object of stages"),
    (lambda run: (run.folder / "adapter_config.json").write_text("[1]"), "adapter_config.json: expected an object"),
    (lambda run: edit_json(run, extra=1), "unknown keys ['extra']"),
]


@pytest.mark.parametrize(("damage", "message"), BAD_RUNS, ids=[message[:40] for _, message in BAD_RUNS])
def test_a_run_that_cannot_be_packaged_is_one_line_and_exit_code_2(damage, message, copied):
    run = copied()
    damage(run)
    result = invoke(run)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (run.folder / "package").exists()
    assert not list(run.folder.parent.rglob("*.tmp"))


def test_a_model_larger_than_the_memory_is_told_before_anything_is_written(copied, monkeypatch):
    run = copied()
    monkeypatch.setattr("postprocess.memory.comparison_fit.memory", lambda: (10_000, "the GPU"))
    result = CliRunner().invoke(main, [str(run.recipe)])
    assert result.exit_code == 2
    assert result.stderr.startswith(f"error: {run.base}: the trained model takes 0.0 GB")
    assert "the GPU has 0.0 GB, too little to compare" in result.stderr
    assert not (run.folder / "merged").exists()


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"verdicts": ["model_b", "model_a"]}, "pairwise.verdicts is ('model_b', 'model_a'), the run was trained with"),
        ({"template": "llama3"}, "pairwise.template.start is '<|begin_of_text|>"),
        ({"budget_tokens": 129}, "pairwise.budget_tokens is 129, the run was trained with 128"),
    ],
)
def test_a_recipe_changed_since_training_is_one_line(tmp_path, tiny_models, changes, line):
    made = runs.make(tmp_path, tiny_models("gemma2"), "gemma2")
    values = yaml.safe_load(made.recipe.read_text())
    values["pairwise"] |= changes
    made.recipe.write_text(yaml.safe_dump(values))
    with pytest.raises(UserError) as error:
        read_run(read_recipe(made.recipe))
    assert line in str(error.value)


@pytest.mark.parametrize("another", ["another/model", "."], ids=["of the hub", "a folder that is there"])
def test_an_adapter_of_another_base_is_one_line(another, tmp_path, tiny_models):
    made = runs.make(tmp_path, tiny_models("gemma2"), "gemma2")
    file = made.folder / "adapter_config.json"
    file.write_text(file.read_text().replace(str(made.base), another))
    with pytest.raises(UserError, match=f"base_model_name_or_path is {another}, .* an adapter of another base"):
        read_run(read_recipe(made.recipe))


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
    with pytest.raises(UserError, match=f"base_model is {in_recipe}, the run was trained with {named}"):
        check_recipe(recipe, contract, has_adapter=False)
