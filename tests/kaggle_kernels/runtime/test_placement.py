"""A model over several devices: its parts in their order, bytes in balance, the same answers as on one."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kaggle_kernels.runtime.models.gptq import GptqLinear
from kaggle_kernels.runtime.models.placement import balance, part_sizes, split_over, weight_sizes
from kaggle_kernels.runtime.models.scoring import score
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.scheduling import crew
from kaggle_kernels.runtime.scheduling.plan import is_multiplied
from kaggle_kernels.runtime.scheduling.worker import load_on
from kaggle_kernels.runtime.settings import start_clock
from tests import tiny


@pytest.mark.parametrize(
    "sizes, devices, expected",
    [
        ([1, 1, 1, 1], 2, [0, 0, 1, 1]),
        ([6, 1, 1, 1, 1], 2, [0, 1, 1, 1, 1]),
        ([3, 2, 2, 2, 2, 2], 2, [0, 0, 0, 1, 1, 1]),
        ([1, 1, 1, 1, 1, 1], 3, [0, 0, 1, 1, 2, 2]),
        ([5], 2, [0]),
    ],
)
def test_the_fullest_device_holds_as_little_as_can_be(sizes, devices, expected):
    assert balance(sizes, devices) == expected


def test_parts_stand_in_the_order_in_which_a_row_passes_through_them():
    names = [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.10.a.weight",
        "model.layers.2.a.weight",
        "model.layers.2.b.bias",
    ]
    sizes = dict.fromkeys([*names, "model.embed_tokens.weight"], 1)
    assert part_sizes(sizes) == {
        "model.embed_tokens": 1,
        "model.layers.2": 2,
        "model.layers.10": 1,
        "model.norm": 1,
        "lm_head": 1,
    }


def test_the_map_of_a_tiny_classifier(package_folder):
    assert split_over(package_folder, ["cuda:0", "cuda:1"]) == {
        "model.embed_tokens": "cuda:0",
        "model.layers.0": "cuda:1",
        "model.layers.1": "cuda:1",
        "model.norm": "cuda:1",
        "score": "cuda:1",
        "model.rotary_emb": "cuda:0",
    }


def test_a_head_that_is_the_embedding_stays_with_it(tiny_models):
    assert split_over(tiny_models("gemma2"), ["cuda:0", "cuda:1"])["lm_head"] == "cuda:0"
    assert split_over(tiny_models("llama"), ["cuda:0", "cuda:1"])["lm_head"] == "cuda:1"


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen2"])
def test_every_part_of_the_model_has_a_place(tiny_models, kind):
    placed = split_over(tiny_models(kind), ["cuda:0", "cuda:1"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_models(kind)))
    tensors = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert [name for name in tensors if not any(name.startswith(f"{part}.") for part in placed)] == []
    assert [part for part in placed if not any(name == part for name, _ in model.named_modules())] == []


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen2"])
def test_accelerate_takes_the_map_and_rows_pass_through_its_hooks(tiny_models, kind):
    from accelerate import dispatch_model

    model = AutoModelForCausalLM.from_pretrained(tiny_models(kind)).eval()
    ids = torch.arange(40).view(2, 20)
    with torch.inference_mode():
        expected = model(ids, use_cache=False).logits
        hooked = dispatch_model(model, split_over(tiny_models(kind), ["cpu", "cpu"]), main_device="cpu", force_hooks=True)
        assert (hooked(ids, use_cache=False).logits - expected).abs().max() < 1e-5
    assert hooked.model.layers[1]._hf_hook is not None


def test_elements_of_nf4_are_counted_as_the_weights_that_they_stand_for(tiny_models, tmp_path):
    from postprocess.weights.bnb_quantize import quantization_config

    settings = {"quantization_config": quantization_config("nf4", ["lm_head"]), "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(tiny_models("llama"), dtype=torch.float16, **settings).save_pretrained(tmp_path)
    whole, packed = weight_sizes(tiny_models("llama")), weight_sizes(tmp_path)
    assert {name: elements for name, (_, elements) in packed.items() if name in whole} == {
        name: elements for name, (_, elements) in whole.items()
    }
    name = "model.layers.0.mlp.up_proj.weight"
    assert (whole[name], packed[name]) == ((4 * 64 * 128, 64 * 128), (64 * 128 // 2, 64 * 128))


def test_elements_of_gptq_are_counted_as_the_weights_that_they_stand_for(tmp_path):
    for bits in (4, 8):
        layer = GptqLinear(64, 256, None, bits, group_size=128)
        save_file({f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "model.safetensors")
        sizes = weight_sizes(tmp_path)
        assert sizes["layer.qweight"] == (64 * 256 * bits // 8, 64 * 256)
        assert sizes["layer.scales"] == (2 * 2 * 64, 2 * 64)
        assert [name for name in sizes if is_multiplied(name)] == ["layer.qweight"]


def test_a_model_whose_parts_all_stand_on_one_device_answers_as_the_whole_one(package_folder):
    package = read_package(package_folder)
    pairs = [package.model_input.pair_from_row(row) for row in tiny.pairs(12, seed=9).to_dicts()]
    (whole, no_stages), (split, stages) = (load_on(package, devices) for devices in (("cpu",), ("cpu", "cpu")))
    assert (no_stages, len(stages.locks)) == (None, 1)
    expected, found = (
        score(model, package.model_input, package.tokenizer, package.contract, pairs, orders=("as_given",))
        for model in (whole, split)
    )
    for pair in pairs:
        assert found[pair.id]["as_given"] == pytest.approx(expected[pair.id]["as_given"], abs=1e-5)


def test_a_split_model_stands_on_all_devices_with_a_stage_on_each(package_folder, monkeypatch):
    from kaggle_kernels.runtime.scheduling import worker

    loaded, staged = [], []
    monkeypatch.setattr(worker, "load_model", lambda *_, device_map=None: loaded.append(device_map))
    monkeypatch.setattr(worker, "Stages", lambda model, starts, devices: staged.append((starts, devices)))
    package = read_package(package_folder)
    load_on(package, ("cuda:0", "cuda:1"))
    assert set(loaded[0].values()) == {"cuda:0", "cuda:1"}
    assert [devices for _, devices in staged] == [("cuda:0", "cuda:1")]


def test_each_means_a_worker_a_device_and_split_one_worker(package_folder, monkeypatch, capsys):
    tasks = []
    monkeypatch.setattr(crew, "start_process", lambda task: tasks.append(task) or (None, None))
    package, devices = read_package(package_folder), {0: "cuda:0", 1: "cuda:1"}
    each = crew.start_workers(package, "each", devices, 100, 2, start_clock(600))
    assert [(worker.name, worker.positions) for worker in each] == [("cuda:0", (0,)), ("cuda:1", (1,))]
    [split] = crew.start_workers(package, "split", devices, 100, 2, start_clock(600))
    assert (split.name, split.positions) == ("cuda:0+cuda:1", (0, 1))
    assert [(task.devices, task.position, task.threads) for task in tasks] == [
        (("cuda:0",), 0, 2),
        (("cuda:1",), 1, 2),
        (("cuda:0", "cuda:1"), 0, 2),
    ]
    assert "two: loading on cuda:0, cuda:1\n" in capsys.readouterr().out
