"""The mean of several runs' adapters: exact, and packaged."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file

from kaggle_kernels.runtime.models.model import CLASSES
from postprocess.weights.average_lora import write_adapter
from preprocess.core.errors import UserError
from tests.postprocess import runs
from tests.postprocess.runs import in_adapter, with_json

SCORE = "base_model.model.score.weight"


def fold(run: runs.Made, folder: Path, seed: int) -> Path:
    """A run like `run` with other random numbers in its adapter."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(tensors):
        for name in [name for name in tensors if ".base_layer." not in name]:
            tensor = tensors[name]
            tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) * tensor.std()

    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("merged", "quantised", "package", "*.json.*"))
    runs.change_tensors(folder / "adapter_model.safetensors", add_noise)
    return folder


def base_of(run: runs.Made) -> torch.nn.Module:
    return CLASSES["score"].from_pretrained(run.base, num_labels=2, pad_token_id=0).double()


def weights_of(run: runs.Made, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that PEFT merges from base and adapter, in float64."""
    merged = PeftModel.from_pretrained(base_of(run), folder, autocast_adapter_dtype=False).double().merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def averaged(out: Path, members: list[Path]) -> int:
    """Put the mean into the folder `out`, and give its rank."""
    shutil.copytree(members[0], out)
    return write_adapter(out, members)


@pytest.mark.parametrize(
    ("kind", "lora"),
    [
        ("bert", {}),
        ("llama", {"use_rslora": True}),
        ("llama", {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}}),
        ("llama", {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}),
    ],
    ids=["bert", "rslora", "patterns", "embedding"],
)
def test_the_mean_is_exact_whatever_scales_the_members(kind, lora, made, tmp_path):
    run = made(kind, lora=lora)
    members = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(3)]
    assert averaged(tmp_path / "mean", members) == 24
    expected = [weights_of(run, folder) for folder in members]
    mean = weights_of(run, tmp_path / "mean")
    for name, weight in mean.items():
        assert (weight - sum(weights[name] for weights in expected) / 3).abs().max() < 1e-6
    assert max((mean[name] - expected[0][name]).abs().max() for name in mean) > 1e-2


def test_a_mean_larger_than_the_memory_is_told_before_it_is_made(copied, tmp_path, monkeypatch):
    run = copied("gemma2", quantize="nf4")
    monkeypatch.setattr("postprocess.memory.comparison_fit.memory", lambda: (10_000, "the GPU"))
    error = runs.refuse(run.recipe, "--adapter", str(fold(run, tmp_path / "fold-0", 1)))
    assert "the trained model takes 0.0 GB" in error
    assert not (run.folder / "mean" / "adapter_model.safetensors").exists()


def test_the_mean_is_packaged_like_one_adapter_and_anew_after_a_member_was_trained_again(copied, tmp_path):
    run = copied("gemma2", quantize="nf4", tolerance=0.3)
    first, second = fold(run, tmp_path / "fold-0", 1), fold(run, tmp_path / "fold-1", 2)
    options = ("--adapter", str(first), "--adapter", str(second))
    printed = runs.succeed(run.recipe, *options)
    assert f"the mean of 2 adapters, of rank 16: {first}, {second}" in printed
    assert "the model was trained on these rows" in printed
    assert "this is a mean of runs, which was not trained itself" in printed
    mean = run.folder / "mean"
    metrics = json.loads((mean / "metrics.json").read_text())
    assert (metrics["rows_were_trained_on"], metrics["fold"], metrics["rows"]) == (True, "all", 24)
    assert metrics["members"] == [str(first), str(second)]
    report = json.loads((mean / "agreement.json").read_text())
    assert [model["model"] for model in report["models"]] == ["trained", "merged", "quantised"]
    assert (mean / "package" / "manifest.json").is_file()
    stages = runs.current_stages(runs.succeed(run.recipe, *options))
    assert stages == ["average", "quantise", "agreement", "package"]

    runs.change_tensors(second / "adapter_model.safetensors", lambda tensors: tensors[SCORE].add_(0.01))
    assert "average" not in runs.current_stages(runs.succeed(run.recipe, *options))
    one, other, found = (load_file(folder / "adapter_model.safetensors")[SCORE] for folder in (first, second, mean))
    assert torch.allclose(found, (one + other) / 2, atol=1e-7)


def put_nan(tensors):
    next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] = float("nan")


BAD = [
    (with_json("contract.json", budget_tokens=64), "budget_tokens has another value than in"),
    (in_adapter(lambda tensors: tensors.pop(SCORE)), "score.weight is only in this adapter or only in"),
    (in_adapter(put_nan), "lora_A.weight is not finite; train again"),
    (with_json("adapter_config.json", lora_alpha=32), "lora_alpha has another value than in"),
    (with_json("config.json", quantization_config={}), "quantization_config has another value than in"),
    (
        with_json("adapter_config.json", alpha_pattern={"q_proj(": 8}),
        "alpha_pattern.q_proj(.[key]: Input should be a valid regular expression",
    ),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_runs_that_have_no_mean_are_one_line_and_leave_no_package(damage, message, copied, tmp_path):
    run = copied("gemma2")
    first, second = fold(run, tmp_path / "fold-0", 1), fold(run, tmp_path / "fold-1", 2)
    (run.folder / "mean" / "package").mkdir(parents=True)  # of the runs as they were before
    damage(replace(run, folder=second))
    assert message in runs.refuse(run.recipe, "--adapter", str(first), "--adapter", str(second))
    assert not (run.folder / "mean" / "package").exists()


def test_dora_has_no_mean_that_is_an_adapter(made, tmp_path):
    run = made("llama", lora={"use_dora": True})
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(2)]
    with pytest.raises(UserError, match="was trained with DoRA, which also rescales the base's weights"):
        averaged(tmp_path / "mean", folders)


def test_the_mean_of_itself_is_refused_before_it_is_touched(copied, tmp_path):
    run = copied("gemma2")
    mean = fold(run, run.folder / "mean", 1)
    before = {path.name: path.read_bytes() for path in mean.iterdir()}
    error = runs.refuse(run.recipe, "--adapter", str(mean))
    assert "the mean itself is written to this folder; name the runs that it is the mean of" in error
    assert {path.name: path.read_bytes() for path in mean.iterdir()} == before


def test_a_recipe_without_training_has_no_adapters(copied):
    run = copied("gemma2", head="label_tokens")
    values = yaml.safe_load(run.recipe.read_text())
    values["pairwise"]["train"] = False
    del values["adapter"], values["lora_target_modules"]
    run.recipe.write_text(yaml.safe_dump(values))
    error = runs.refuse(run.recipe, "--adapter", ".")
    assert "nothing is trained and there are no adapters to average; leave out --adapter" in error


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ("fold-0", "--adapter: a folder is named twice; name each run once"),
        ("absent", "absent: there is no adapter_model.safetensors; --adapter takes the folder of a trained LoRA run"),
    ],
)
def test_adapters_that_make_no_sense_are_one_line(second, message, copied, tmp_path):
    run = copied("gemma2")
    first = fold(run, tmp_path / "fold-0", 1)
    assert message in runs.refuse(run.recipe, "--adapter", str(first), "--adapter", str(tmp_path / second))
