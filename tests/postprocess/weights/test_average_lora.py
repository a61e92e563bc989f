"""The mean of several runs' adapters: exact, cut to a rank, packaged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file

from kaggle_kernels.runtime.models.model import CLASSES
from postprocess.__main__ import main, share_out
from postprocess.weights.average_lora import Member, write_adapter
from preprocess.core.errors import UserError
from tests.postprocess import runs

SCORE = "base_model.model.score.weight"


def fold(run: runs.Made, folder: Path, seed: int, **settings) -> Path:
    """A run like `run` with other random numbers in its adapter, and other settings in its adapter_config.json."""
    generator = torch.Generator().manual_seed(seed)

    def add_noise(tensors):
        for name in [name for name in tensors if ".base_layer." not in name]:
            tensor = tensors[name]
            tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) * tensor.std()

    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("merged", "quantised", "package", "*.json.*"))
    runs.change_tensors(folder / "adapter_model.safetensors", add_noise)
    runs.set_json(folder / "adapter_config.json", **settings)
    return folder


def base_of(run: runs.Made) -> torch.nn.Module:
    return CLASSES["score"].from_pretrained(run.base, num_labels=2, pad_token_id=0).double()


def weights_of(run: runs.Made, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that PEFT merges from base and adapter, in float64."""
    merged = PeftModel.from_pretrained(base_of(run), folder, autocast_adapter_dtype=False).double().merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def averaged(out: Path, shares: dict[Path, float], rank: int | None = None):
    """The folder `out` with the mean in it, and what cutting ranks has cost."""
    shutil.copytree(next(iter(shares)), out)
    return write_adapter(out, [Member(*item) for item in shares.items()], rank)


@pytest.mark.parametrize(
    ("kind", "lora", "other_lora", "other_settings"),
    [
        ("bert", {}, {}, {}),
        ("llama", {"use_rslora": True}, {"use_rslora": True}, {}),
        ("llama", *[{"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}}] * 2, {}),
        ("llama", *[{"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}] * 2, {}),
        ("llama", {}, {}, {"lora_alpha": 32}),
        ("llama", {"target_modules": ["q_proj"]}, {"target_modules": ["up_proj"]}, {}),
    ],
    ids=["bert", "rslora", "patterns", "embedding", "another alpha", "other modules"],
)
def test_the_mean_is_exact_whatever_scaled_the_members(kind, lora, other_lora, other_settings, made, tmp_path):
    run = made(kind, lora=lora)
    first, second = fold(run, tmp_path / "one", 1), fold(made(kind, lora=other_lora), tmp_path / "two", 2, **other_settings)
    averaged(tmp_path / "mean", {first: 0.75, second: 0.25})
    one, other, mean = (weights_of(run, folder) for folder in (first, second, tmp_path / "mean"))
    assert max((mean[name] - 0.75 * one[name] - 0.25 * other[name]).abs().max() for name in mean) < 1e-6
    assert max((mean[name] - one[name]).abs().max() for name in mean) > 1e-2


def test_cut_to_a_rank_it_is_the_nearest_of_that_rank_and_the_error_counts_layers_that_are_not_cut(made, tmp_path):
    run = made("llama", lora={"rank_pattern": {"q_proj": 2}})  # its mean has rank 4
    shares = {fold(run, tmp_path / f"fold-{seed}", seed): 0.5 for seed in range(2)}
    averaged(tmp_path / "exact", shares)
    truncation = averaged(tmp_path / "cut", shares, rank=6)
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    base, exact, cut = base_of(run).state_dict(), weights_of(run, tmp_path / "exact"), weights_of(run, tmp_path / "cut")
    total = lost = 0.0
    for name in [name for name in base if "_proj" in name]:
        change = exact[name] - base[name]
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        nearest = (left[:, :6] * values[:6]) @ right[:6]
        assert (cut[name] - base[name] - nearest).abs().max() < 1e-6
        total += float((change**2).sum())
        lost += float(((change - nearest) ** 2).sum())
    assert truncation.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert 0.3 < truncation.error < truncation.worst[0] < 0.9
    assert averaged(tmp_path / "whole", shares, rank=16).error == 0


def test_more_rank_than_a_layer_can_have_is_what_it_can_have(made, tmp_path):
    run = made("llama", lora={"r": 20})
    shares = {fold(run, tmp_path / f"fold-{seed}", seed): 0.5 for seed in range(2)}
    averaged(tmp_path / "exact", shares)
    averaged(tmp_path / "cut", shares, rank=36)  # k_proj has 32 outputs, the sum of ranks is 40
    name = "model.layers.0.self_attn.k_proj"
    exact, cut = (weights_of(run, tmp_path / folder)[f"{name}.weight"] for folder in ("exact", "cut"))
    assert (exact - cut).abs().max() < 1e-6
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{name}.lora_A.weight"].shape == (32, 64)


def test_a_mean_larger_than_the_memory_is_told_before_it_is_made(copied, tmp_path, monkeypatch):
    run = copied("gemma2", quantize="nf4")
    monkeypatch.setattr("postprocess.memory.comparison_fit.memory", lambda: (10_000, "the GPU"))
    result = CliRunner().invoke(main, [str(run.recipe), "--adapter", str(fold(run, tmp_path / "fold-0", 1))])
    assert (result.exit_code, "the trained model takes 0.0 GB" in result.stderr) == (2, True)
    assert not (run.folder / "mean" / "adapter_model.safetensors").exists()


def test_the_mean_is_packaged_like_one_adapter_and_anew_after_a_member_was_trained_again(copied, tmp_path):
    run = copied("gemma2", quantize="nf4", tolerance=0.3)
    first, second = fold(run, tmp_path / "fold-0", 1), fold(run, tmp_path / "fold-1", 2)
    command = [str(run.recipe), "--adapter", f"{first}=3", "--adapter", str(second)]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"the mean of 2 adapters: 0.750 {first}, 0.250 {second}" in result.output
    assert "exact, of rank 16" in result.output
    assert "the model was trained on these rows" in result.output
    mean = run.folder / "mean"
    metrics = json.loads((mean / "metrics.json").read_text())
    assert (metrics["rows_were_trained_on"], metrics["fold"], metrics["rows"]) == (True, "all", 24)
    assert metrics["average"]["members"] == {str(first): 0.75, str(second): 0.25}
    report = json.loads((mean / "agreement.json").read_text())
    assert [model["model"] for model in report["models"]] == ["trained", "merged", "quantised"]
    assert "no record: a mean of runs was not trained as such" in result.output
    assert (mean / "package" / "manifest.json").is_file()
    again = CliRunner().invoke(main, command)
    assert [line[:21] for line in again.output.splitlines()] == [
        f"{stage:<10} up to date" for stage in ("average", "quantise", "agreement", "package")
    ]

    runs.change_tensors(second / "adapter_model.safetensors", lambda tensors: tensors[SCORE].add_(0.01))
    again = CliRunner().invoke(main, command)
    assert again.exit_code == 0
    assert "average    up to date" not in again.output
    one, other, found = (load_file(folder / "adapter_model.safetensors")[SCORE] for folder in (first, second, mean))
    assert torch.allclose(found, 0.75 * one + 0.25 * other, atol=1e-7)


def with_nan(folder):
    def spoil(tensors):
        next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] = float("nan")

    runs.change_tensors(folder / "adapter_model.safetensors", spoil)


def without_head(folder):
    runs.change_tensors(folder / "adapter_model.safetensors", lambda tensors: tensors.pop(SCORE))


def with_json(name, **values):
    """A change of one of a run's files."""
    return lambda folder: runs.set_json(folder / name, **values)


BAD = [
    (with_json("contract.json", budget_tokens=64), "budget_tokens is not that of"),
    (without_head, "score.weight is in it or in"),
    (with_nan, "lora_A.weight is not finite; train again"),
    (with_json("adapter_config.json", ensure_weight_tying=True), "ensure_weight_tying is not that of"),
    (with_json("config.json", quantization_config={}), "quantization_config is not that of"),
    (with_json("adapter_config.json", alpha_pattern={"q_proj(": 8}), 'alpha_pattern has {"q_proj(": 8}'),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_runs_that_have_no_mean_are_one_line_and_leave_no_package(damage, message, copied, tmp_path):
    run = copied("gemma2")
    first, second = fold(run, tmp_path / "fold-0", 1), fold(run, tmp_path / "fold-1", 2)
    (run.folder / "mean" / "package").mkdir(parents=True)  # of the runs as they were before
    damage(second)
    result = CliRunner().invoke(main, [str(run.recipe), "--adapter", str(first), "--adapter", str(second)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr
    assert not (run.folder / "mean" / "package").exists()


def test_dora_has_no_mean_that_is_an_adapter(made, tmp_path):
    run = made("llama", lora={"use_dora": True})
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(2)]
    with pytest.raises(UserError, match="was trained with DoRA, which rescales rows"):
        averaged(tmp_path / "mean", dict.fromkeys(folders, 0.5))


def test_the_mean_of_itself_is_refused_before_it_is_touched(copied, tmp_path):
    run = copied("gemma2")
    mean = fold(run, run.folder / "mean", 1)
    before = {path.name: path.read_bytes() for path in mean.iterdir()}
    result = CliRunner().invoke(main, [str(run.recipe), "--adapter", str(mean)])
    assert result.exit_code == 2
    assert "the mean is written there; name the runs that it is the mean of" in result.stderr
    assert {path.name: path.read_bytes() for path in mean.iterdir()} == before


@pytest.mark.parametrize(
    ("train", "options", "message"),
    [
        (False, ["--adapter", "."], "train: false, so that there are no adapters; leave out --adapter"),
        (True, ["--rank", "8"], "--rank is for the mean of several runs"),
    ],
)
def test_options_that_do_not_go_with_the_recipe_are_one_line(train, options, message, copied):
    run = copied("gemma2", head="label_tokens")
    values = yaml.safe_load(run.recipe.read_text())
    values["pairwise"]["train"] = train
    del values["adapter"], values["lora_target_modules"]
    run.recipe.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(main, [str(run.recipe), *options])
    assert result.exit_code == 2
    assert message in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{one}=x"], "--adapter {one}=x: 'x' is no weight; write FOLDER or FOLDER=WEIGHT"),
        (["{one}=-1"], "--adapter {one}=-1: expected a weight above 0"),
        (["{one}=nan"], "--adapter {one}=nan: expected a weight above 0"),
        (["{one}=inf"], "--adapter {one}=inf: expected a weight above 0"),
        (["{one}", "{one}/../one"], "a folder is named twice; give it a weight instead"),
        (["{one}/absent"], "--adapter {one}/absent: no such folder; it takes the folder of a trained LoRA run"),
        (["{one}/.."], "--adapter {one}/..: no adapter_model.safetensors there; it takes the folder of a trained LoRA run"),
    ],
)
def test_adapters_that_make_no_sense_are_one_line(arguments, message, tmp_path):
    one = tmp_path / "one"
    one.mkdir()
    (one / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=re.escape(message.format(one=one))):
        share_out([text.format(one=one) for text in arguments])


def test_shares_sum_to_one(tmp_path):
    for name in ("a", "b=2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").touch()
    assert share_out([f"{tmp_path}/a=3", f"{tmp_path}/b=2"]) == {tmp_path / "a": 0.75, tmp_path / "b=2": 0.25}
