"""DeepSpeed's stages in one process: each trains the weights that no DeepSpeed trains, and ZeRO-3 saves them whole."""

import json
import os
import shutil

import deepspeed
import pytest
import torch
from safetensors.torch import save_file

from preprocess.core.errors import UserError
from recipes.pairwise.training import deepspeed_cpu, zero3
from recipes.pairwise.training.heads import ensure_head
from tests import forked
from tests.conftest import ROOT
from tests.recipes import comparable


def train(recipe, stage, base, folder):
    """The weights that the recipe's comparable twin learns in a fork, by name."""
    forked.train(comparable.twin(recipe, folder, base, stage))
    return comparable.trained_weights(folder / recipe)


@pytest.fixture(scope="module")
def plain(tiny_models, tmp_path_factory):
    """What gemma2_cls's twin learns without DeepSpeed."""
    return train("gemma2_cls", None, tiny_models("gemma2"), tmp_path_factory.mktemp("plain"))


def test_deepspeed_knows_every_setting_and_zero3_loads_in_bf16():
    """With bf16 "auto", which is only settled after loading, ZeRO-3 would hold every weight in float32: twice the memory."""
    files = sorted((ROOT / "recipes/deepspeed").glob("*.json"))
    assert [path.stem for path in files] == ["zero1", "zero2", "zero3", "zero3_offload"]
    for path in files:
        settings = json.loads(path.read_text())
        zero3.is_zero3(settings)
        if path.stem.startswith("zero3"):
            assert settings["bf16"] == {"enabled": True}


# Its first run on a machine takes a minute: DeepSpeed compiles its Adam for CPUs.
OFFLOAD_MARKS = [pytest.mark.slow, pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs g++")]
STAGES = [
    pytest.param("zero1", marks=pytest.mark.slow),  # zero2 does what it does
    "zero2",
    "zero3",
    pytest.param("zero3_offload", marks=OFFLOAD_MARKS),
]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_trains_the_weights_that_plain_training_does(stage, plain, tiny_models, tmp_path):
    weights = train("gemma2_cls", stage, tiny_models("gemma2"), tmp_path)
    assert comparable.largest_difference(weights, plain) < comparable.ROUNDING
    moved = [weight.abs().max().item() for name, weight in weights.items() if "lora_B" in name]
    assert min(moved) > 10 * comparable.ROUNDING, "an adapter that stands where it began proves nothing"


def test_zero3_saves_every_weight_of_a_full_fine_tune(tiny_models, tmp_path):
    expected = train("minilm_cls", None, tiny_models("bert"), tmp_path / "plain")
    weights = train("minilm_cls", "zero3", tiny_models("bert"), tmp_path)
    # Under ZeRO-3 transformers saves layer norms by the names that BERT's first checkpoints had; it reads either.
    weights = {name.replace("Norm.beta", "Norm.bias").replace("Norm.gamma", "Norm.weight"): w for name, w in weights.items()}
    assert weights["classifier.weight"].shape == (2, 64)
    assert comparable.largest_difference(weights, expected) < comparable.ROUNDING


def test_a_head_that_stands_in_parts_is_checked_and_made_anew():
    process = forked.SERVER.Process(target=_make_a_head_under_zero3)
    process.start()
    process.join(timeout=400)
    assert process.exitcode == 0


def _make_a_head_under_zero3():
    os.environ |= {"DS_ACCELERATOR": "cpu", "WORLD_SIZE": "1"}
    deepspeed_cpu.start_group()
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
    with deepspeed.zero.Init(config_dict_or_path=settings):
        model = torch.nn.Module()
        model.score = torch.nn.Linear(64, 2, bias=False)
    assert model.score.weight.numel() == 0
    for wrong, is_replaced in ((float("nan"), True), (0.0, True), (1e30, True), (None, False)):
        with zero3.gathered(model.score.parameters()):
            if wrong is not None:
                model.score.weight.data.fill_(wrong)
            before = model.score.weight.detach().clone()
        ensure_head(model)
        with zero3.gathered(model.score.parameters()):
            assert 0.01 < model.score.weight.std().item() < 0.03
            assert torch.equal(model.score.weight, before) is not is_replaced


def test_checkpointing_is_reentrant_under_zero3_only(tmp_path):
    assert zero3.checkpointing_kwargs({}) == {"use_reentrant": False}
    assert zero3.checkpointing_kwargs({"deepspeed": str(ROOT / "recipes/deepspeed/zero2.json")}) == {"use_reentrant": False}
    stage_3 = {"deepspeed": str(ROOT / "recipes/deepspeed/zero3_offload.json")}
    assert zero3.checkpointing_kwargs(stage_3) == {"use_reentrant": True}
    with pytest.raises(UserError, match="use_reentrant: false fails under ZeRO-3; remove it"):
        zero3.checkpointing_kwargs(stage_3 | {"gradient_checkpointing_kwargs": {"use_reentrant": False}})


@pytest.mark.parametrize(
    ("deepspeed", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "lacks stage3_gather_16bit_weights_on_model_save: true"),
        ("absent.json", r"deepspeed: absent\.json: no such file; see recipes/deepspeed"),
        ({"zero_optimization": {"stgae": 3}}, "zero_optimization: 1 validation error for DeepSpeedZeroConfig stgae"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(deepspeed, message):
    with pytest.raises(UserError, match=message):
        zero3.is_zero3(deepspeed)


def test_a_weight_saved_without_its_values_is_found(tmp_path):
    save_file({"score.weight": torch.ones(2, 4)}, tmp_path / "adapter_model.safetensors")
    zero3.check_whole(tmp_path)
    save_file({"score.weight": torch.ones(0)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(RuntimeError, match="1 weights were saved without their values, score.weight the first"):
        zero3.check_whole(tmp_path)
