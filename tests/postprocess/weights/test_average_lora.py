"""The mean of several runs' adapters: exact, cut to a rank, merged, packaged."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file

from kaggle_kernels.runtime.models.model import CLASSES
from postprocess.__main__ import main, members_of
from postprocess.run_folder import read_run
from postprocess.weights.average_lora import Member, write_adapter
from postprocess.weights.merge import merge
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import read_recipe
from tests.postprocess import runs

IDS = torch.tensor([[2, 17, 200, 33, 4, 900], [2, 5, 6, 44, 71, 9]])


def fold(run: runs.Made, folder: Path, seed: int, **settings) -> Path:
    """A run like `run` with other random numbers in its adapter, and other settings in its adapter_config.json."""
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("merged", "quantised", "package", "*.json.*"))
    generator = torch.Generator().manual_seed(seed)
    tensors = load_file(folder / "adapter_model.safetensors")
    for name, tensor in tensors.items():
        if ".base_layer." not in name:
            tensors[name] = tensor + torch.randn(tensor.shape, generator=generator) * tensor.std()
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


def weights_of(run: runs.Made, folder: Path, head: str = "score") -> dict[str, torch.Tensor]:
    """The weights that PEFT merges from base and adapter, in float64."""
    options = {} if head == "label_tokens" else {"num_labels": 2}
    model = CLASSES[head].from_pretrained(run.base, pad_token_id=0, **options).double()
    merged = PeftModel.from_pretrained(model, folder, autocast_adapter_dtype=False).double().merge_and_unload()
    return {name: tensor.clone() for name, tensor in merged.state_dict().items()}


def logits(run: runs.Made, weights: dict[str, torch.Tensor]) -> torch.Tensor:
    model = CLASSES["score"].from_pretrained(run.base, num_labels=2, pad_token_id=0, attn_implementation="sdpa").double().eval()
    if hasattr(model.config, "attn_logit_softcapping"):
        model.config.attn_logit_softcapping = None
    model.load_state_dict(weights)
    with torch.inference_mode():
        return model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits


def factorwise_mean(folders: list[Path], out: Path) -> Path:
    """What others average: A with A and B with B."""
    shutil.copytree(folders[0], out)
    tensors = [load_file(folder / "adapter_model.safetensors") for folder in folders]
    mean = {name: sum(one[name] for one in tensors) / len(tensors) for name in tensors[0]}
    save_file(mean, out / "adapter_model.safetensors", {"format": "pt"})
    return out


def averaged(out: Path, shares: dict[Path, float], rank: int | None = None):
    """The folder `out` with the mean in it, and what cutting ranks has cost."""
    shutil.copytree(next(iter(shares)), out)
    return write_adapter(out, [Member(*item) for item in shares.items()], rank)


def test_the_mean_is_of_the_products_where_averaging_factors_is_far_off(made, tmp_path, capsys):
    run = made("gemma2")
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(3)]
    averaged(tmp_path / "mean", dict.fromkeys(folders, 1 / 3))
    per_fold = [weights_of(run, folder) for folder in folders]
    truth = {name: sum(one[name] for one in per_fold) / 3 for name in per_fold[0]}
    expected = logits(run, truth)
    exact = (logits(run, weights_of(run, tmp_path / "mean")) - expected).abs().max().item()
    factors = factorwise_mean(folders, tmp_path / "factors")
    wrong = (logits(run, weights_of(run, factors)) - expected).abs().max().item()
    with capsys.disabled():
        print(
            f"\nlargest error of logits up to {expected.abs().max():.2f}: exact mean {exact:.1e}, factor-wise mean {wrong:.1e}"
        )
    assert exact < 1e-6
    assert wrong > 1e-2


def test_the_head_is_averaged_and_weights_count(made, tmp_path):
    run = made("bert")
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(2)]
    averaged(tmp_path / "mean", {folders[0]: 0.75, folders[1]: 0.25})
    one, other, found = (load_file(folder / "adapter_model.safetensors") for folder in (*folders, tmp_path / "mean"))
    for name in ("base_model.model.classifier.weight", "base_model.model.classifier.bias"):
        assert torch.allclose(found[name], 0.75 * one[name] + 0.25 * other[name], atol=1e-7)
    per_fold = [weights_of(run, folder) for folder in folders]
    mean = weights_of(run, tmp_path / "mean")
    assert all((mean[name] - 0.75 * per_fold[0][name] - 0.25 * per_fold[1][name]).abs().max() < 1e-6 for name in mean)


@pytest.mark.parametrize(
    ("lora", "others"),
    [
        ({"use_rslora": True}, {}),
        ({"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}}, {}),
        ({"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}, {}),
        ({}, {"lora_alpha": 32}),  # one member with another scaling
    ],
    ids=["rslora", "patterns", "embedding", "another alpha"],
)
def test_whatever_scaled_the_members_the_mean_is_exact(lora, others, made, tmp_path):
    run = made("llama", lora=lora)
    folders = [fold(run, tmp_path / "one", 1), fold(run, tmp_path / "two", 2, **others)]
    averaged(tmp_path / "mean", dict.fromkeys(folders, 0.5))
    one, other, mean = (weights_of(run, folder) for folder in (*folders, tmp_path / "mean"))
    assert max((mean[name] - (one[name] + other[name]) / 2).abs().max() for name in mean) < 1e-6
    assert max((mean[name] - one[name]).abs().max() for name in mean) > 1e-2


def test_cut_to_a_rank_it_is_the_nearest_of_that_rank_and_the_error_is_told(made, tmp_path):
    run = made("llama")
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(2)]
    shares = dict.fromkeys(folders, 0.5)
    averaged(tmp_path / "exact", shares)
    truncation = averaged(tmp_path / "cut", shares, rank=6)
    config = json.loads((tmp_path / "cut" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (6, 6, False)
    base = CLASSES["score"].from_pretrained(run.base, num_labels=2, pad_token_id=0).double().state_dict()
    exact, cut = weights_of(run, tmp_path / "exact"), weights_of(run, tmp_path / "cut")
    total = lost = 0.0
    for name in (name for name in base if "_proj" in name):
        change = exact[name] - base[name]
        left, values, right = torch.linalg.svd(change, full_matrices=False)
        nearest = (left[:, :6] * values[:6]) @ right[:6]
        assert (cut[name] - base[name] - nearest).abs().max() < 1e-6
        total, lost = total + float((change**2).sum()), lost + float(((change - nearest) ** 2).sum())
    assert truncation.error == pytest.approx((lost / total) ** 0.5, abs=1e-6)
    assert truncation.worst[0] < 1
    assert 0.3 < truncation.error < truncation.worst[0] < 0.9
    assert averaged(tmp_path / "whole", shares, rank=16).error == 0


def test_the_mean_is_merged_like_one_adapter_and_packaged(copied, tmp_path):
    run = copied("gemma2", quantize="nf4", tolerance=0.3)
    first, second = fold(run, tmp_path / "fold-0", 1), fold(run, tmp_path / "fold-1", 2)
    command = [str(run.recipe), "--adapter", f"{first}=3", "--adapter", str(second)]
    result = CliRunner().invoke(main, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert f"the mean of 2 adapters: 0.750 {first}, 0.250 {second}" in result.output
    assert "exact, of rank 16" in result.output
    mean = run.folder / "mean"
    metrics = json.loads((mean / "metrics.json").read_text())
    assert (metrics["rows_were_trained_on"], metrics["fold"], metrics["rows"]) == (True, "all", 24)
    assert metrics["average"]["members"] == {str(first): 0.75, str(second): 0.25}
    assert (mean / "contract.json").read_bytes() == (first / "contract.json").read_bytes()
    report = json.loads((mean / "agreement.json").read_text())
    assert report["models"][0]["against_trained"]["largest"] < 1e-6
    assert (mean / "package" / "manifest.json").is_file()
    assert "the model was trained on these rows" in result.output
    again = CliRunner().invoke(main, command)
    assert [line[:21] for line in again.output.splitlines()] == [
        f"{stage:<10} up to date" for stage in ("average", "quantise", "agreement", "package")
    ]
    recipe = read_recipe(run.recipe)
    object.__setattr__(recipe, "run_folder", mean)
    merge(read_run(recipe), tmp_path / "merged", dtype=torch.float32)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    one, other = weights_of(run, first), weights_of(run, second)
    assert max((found[name] - 0.75 * one[name] - 0.25 * other[name]).abs().max() for name in found) < 1e-6


def set_json(file, **values):
    file.write_text(json.dumps((json.loads(file.read_text()) if file.exists() else {}) | values))


def set_budget(folder):
    set_json(folder / "contract.json", budget_tokens=64)


def with_nan(folder):
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    next(tensor for name, tensor in tensors.items() if "lora_A" in name)[0, 0] = float("nan")
    save_file(tensors, file, {"format": "pt"})


def without_head(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "score" not in name}, file, {"format": "pt"})


BAD = [
    (
        lambda folder: (folder / "adapter_model.safetensors").unlink(),
        "no adapter_model.safetensors there; it takes the folder of a trained LoRA run",
    ),
    (set_budget, "budget_tokens is not that of"),
    (without_head, "score.weight is in it or in"),
    (with_nan, "lora_A.weight is not finite; train again"),
    (lambda folder: set_json(folder / "adapter_config.json", ensure_weight_tying=True), "ensure_weight_tying is not that of"),
    (lambda folder: set_json(folder / "config.json", quantization_config={}), "quantization_config is not that of"),
    (lambda folder: set_json(folder / "adapter_config.json", alpha_pattern={"q_proj(": 8}), 'alpha_pattern has {"q_proj(": 8}'),
    (lambda folder: shutil.rmtree(folder), "no such folder; it takes the folder of a trained LoRA run"),
]


@pytest.mark.parametrize(("damage", "message"), BAD, ids=[message[:30] for _, message in BAD])
def test_runs_that_have_no_mean_are_one_line(damage, message, copied, tmp_path):
    run = copied("gemma2")
    first, second = fold(run, tmp_path / "fold-0", 1), fold(run, tmp_path / "fold-1", 2)
    (run.folder / "mean" / "package").mkdir(parents=True)  # of the runs as they were before
    damage(second)
    result = CliRunner().invoke(main, [str(run.recipe), "--adapter", str(first), "--adapter", str(second)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr
    if "no such folder" not in message and "no adapter_model" not in message:
        assert not (run.folder / "mean" / "package").exists()


def test_a_layer_that_is_not_cut_counts_in_what_is_lost(made, tmp_path):
    run = made("llama", lora={"rank_pattern": {"q_proj": 2}})
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(2)]
    shares = dict.fromkeys(folders, 0.5)
    averaged(tmp_path / "exact", shares)
    truncation = averaged(tmp_path / "cut", shares, rank=12)
    base = CLASSES["score"].from_pretrained(run.base, num_labels=2, pad_token_id=0).double().state_dict()
    exact, cut = weights_of(run, tmp_path / "exact"), weights_of(run, tmp_path / "cut")
    changed = [name for name in base if "_proj" in name]
    total = sum(float(((exact[name] - base[name]) ** 2).sum()) for name in changed)
    lost = sum(float(((exact[name] - cut[name]) ** 2).sum()) for name in changed)
    assert truncation.error == pytest.approx((lost / total) ** 0.5, rel=1e-3)
    assert (exact["model.layers.0.self_attn.q_proj.weight"] - cut["model.layers.0.self_attn.q_proj.weight"]).abs().max() < 1e-6


def test_more_rank_than_a_layer_can_have_is_what_it_can_have(made, tmp_path):
    run = made("llama")
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(5)]
    shares = dict.fromkeys(folders, 0.2)
    averaged(tmp_path / "exact", shares)
    assert averaged(tmp_path / "cut", shares, rank=36).worst[0] < 1  # k_proj has 32 outputs, the sum of ranks is 40
    exact, cut = weights_of(run, tmp_path / "exact"), weights_of(run, tmp_path / "cut")
    name = "model.layers.0.self_attn.k_proj.weight"
    assert (exact[name] - cut[name]).abs().max() < 1e-6
    tensors = load_file(tmp_path / "cut" / "adapter_model.safetensors")
    assert tensors[f"base_model.model.{name.removesuffix('.weight')}.lora_A.weight"].shape == (32, 64)


def test_modules_that_only_some_members_trained_are_in_the_mean(made, tmp_path):
    one = made("llama", lora={"target_modules": ["q_proj"]})
    other = made("llama", lora={"target_modules": ["up_proj"]})
    folders = [fold(one, tmp_path / "one", 1), fold(other, tmp_path / "two", 2)]
    averaged(tmp_path / "mean", dict.fromkeys(folders, 0.5))
    assert json.loads((tmp_path / "mean" / "adapter_config.json").read_text())["target_modules"] == ["q_proj", "up_proj"]
    first, second, mean = (weights_of(one, folder) for folder in (*folders, tmp_path / "mean"))
    assert max((mean[name] - (first[name] + second[name]) / 2).abs().max() for name in mean) < 1e-6


def test_the_mean_of_itself_is_refused_before_it_is_touched(copied, tmp_path):
    run = copied("gemma2")
    mean = fold(run, run.folder / "mean", 1)
    before = {path.name: path.read_bytes() for path in mean.iterdir()}
    result = CliRunner().invoke(main, [str(run.recipe), "--adapter", str(mean)])
    assert result.exit_code == 2
    assert "the mean is written there; name the runs that it is the mean of" in result.stderr
    assert {path.name: path.read_bytes() for path in mean.iterdir()} == before


def test_a_member_that_was_trained_again_makes_another_mean(copied, tmp_path):
    run = copied("gemma2", tolerance=0.3)
    first, second = fold(run, tmp_path / "fold-0", 1), fold(run, tmp_path / "fold-1", 2)
    command = [str(run.recipe), "--adapter", str(first), "--adapter", str(second)]
    assert CliRunner().invoke(main, command).exit_code == 0
    file = second / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors["base_model.model.score.weight"] += 0.01
    save_file(tensors, file, {"format": "pt"})
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0
    assert "average    up to date" not in result.output
    mean = load_file(run.folder / "mean" / "adapter_model.safetensors")["base_model.model.score.weight"]
    parts = [load_file(folder / "adapter_model.safetensors")["base_model.model.score.weight"] for folder in (first, second)]
    assert torch.allclose(mean, (parts[0] + parts[1]) / 2, atol=1e-7)


def test_a_recipe_that_trains_nothing_has_no_adapters(copied, tmp_path):
    run = copied("gemma2", head="label_tokens")
    values = yaml.safe_load(run.recipe.read_text())
    values["pairwise"]["train"] = False
    del values["adapter"], values["lora_target_modules"]
    run.recipe.write_text(yaml.safe_dump(values))
    result = CliRunner().invoke(main, [str(run.recipe), "--adapter", str(run.folder)])
    assert result.exit_code == 2
    assert "train: false, so that there are no adapters; leave out --adapter" in result.stderr


def test_dora_has_no_mean_that_is_an_adapter(made, tmp_path):
    run = made("llama", lora={"use_dora": True})
    folders = [fold(run, tmp_path / f"fold-{seed}", seed) for seed in range(2)]
    with pytest.raises(UserError, match="was trained with DoRA, which rescales rows"):
        averaged(tmp_path / "mean", dict.fromkeys(folders, 0.5))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{one}=x"], "--adapter {one}=x: 'x' is no weight; write FOLDER or FOLDER=WEIGHT"),
        (["{one}=-1"], "--adapter {one}=-1: expected a weight above 0"),
        (["{one}=nan"], "--adapter {one}=nan: expected a weight above 0"),
        (["{one}", "{one}=2"], "a folder is named twice; give it a weight instead"),
        (["{one}", "{one}/../{name}"], "a folder is named twice; give it a weight instead"),
        (["{one}=inf"], "--adapter {one}=inf: expected a weight above 0"),
        (["{one}/absent"], "--adapter {one}/absent: no such folder; it takes the folder of a trained LoRA run"),
    ],
)
def test_adapters_that_make_no_sense_are_one_line(arguments, message, tmp_path):
    (tmp_path / "adapter_model.safetensors").touch()
    with pytest.raises(UserError, match=re.escape(message.format(one=tmp_path))):
        members_of([text.format(one=tmp_path, name=tmp_path.name) for text in arguments])


def test_shares_sum_to_one(tmp_path):
    for name in ("a", "b=2"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "adapter_model.safetensors").touch()
    assert members_of([f"{tmp_path}/a=3", f"{tmp_path}/b=2"]) == {tmp_path / "a": 0.75, tmp_path / "b=2": 0.25}


def test_a_rank_without_adapters_is_one_line(made):
    result = CliRunner().invoke(main, [str(made("gemma2").recipe), "--rank", "8"])
    assert result.exit_code == 2
    assert "--rank is for the mean of several runs" in result.stderr
