"""A model over several devices: its parts in their order, work in balance, the same answers as on one."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from kaggle_kernels.runtime.models.gptq import GptqLinear
from kaggle_kernels.runtime.models.placement import Part, balance, list_parts, split_over, weight_sizes
from kaggle_kernels.runtime.models.scoring import score
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.scheduling import worker, worker_handle
from kaggle_kernels.runtime.scheduling.plan import is_multiplied
from kaggle_kernels.runtime.scheduling.worker import load_on
from kaggle_kernels.runtime.settings import start_clock
from postprocess.weights.bnb_quantize import quantization_config
from tests import tiny
from tests.kaggle_kernels.packages import settings_for


def embedding_and_layers(embedding_bytes, layers):
    return [Part(embedding_bytes, 0), *[Part(2, 2)] * layers, Part(1, 0)]


@pytest.mark.parametrize(
    ("embedding_bytes", "layers", "devices", "byte_limit", "expected"),
    [
        (6, 4, 2, None, "0 00 11 1"),  # two layers each, whatever the embedding takes
        (6, 5, 2, None, "0 00 111 1"),  # the odd layer stands where there is no embedding
        (0, 6, 3, None, "0 00 11 22 2"),
        (6, 4, 2, 10, "0 00 11 1"),  # all within the limit: bytes do not count
        (6, 4, 2, 9, "0 0 111 1"),  # half of the layers would be 10 bytes
        (6, 4, 2, 5, "0 0 111 1"),  # nothing keeps to 5 bytes: as even as can be
        (6, 1, 2, None, "0 1 1"),  # one layer
    ],
)
def test_devices_have_the_same_work_as_far_as_their_memory_allows(embedding_bytes, layers, devices, byte_limit, expected):
    placed = balance(embedding_and_layers(embedding_bytes, layers), devices, byte_limit)
    assert placed == [int(device) for device in expected if device != " "]


def test_parts_stand_in_the_order_in_which_a_row_passes_through_them():
    layers = ["model.layers.10.a.weight", "model.layers.2.a.weight", "model.layers.2.b.bias"]
    sizes = dict.fromkeys(["lm_head.weight", "model.norm.weight", *layers, "model.embed_tokens.weight"], (4, 1))
    assert list(list_parts(sizes).items()) == [
        ("model.embed_tokens", Part(4, 0)),
        ("model.layers.2", Part(8, 2)),
        ("model.layers.10", Part(4, 1)),
        ("model.norm", Part(4, 0)),
        ("lm_head", Part(4, 0)),
    ]


def test_the_layers_of_an_encoder_are_found_as_well(tiny_models):
    parts = list(list_parts(weight_sizes(tiny_models("bert"))))
    assert parts[:3] == ["embeddings", "encoder.layer.0", "encoder.layer.1"]


def test_positions_and_a_head_that_is_the_embedding_stay_with_it(tiny_models):
    gemma2, llama = (split_over(tiny_models(kind), ["cuda:0", "cuda:1"]) for kind in ("gemma2", "llama"))
    assert (gemma2["model.embed_tokens"], gemma2["model.rotary_emb"], gemma2["lm_head"]) == ("cuda:0", "cuda:0", "cuda:0")
    assert (llama["model.embed_tokens"], llama["lm_head"]) == ("cuda:0", "cuda:1")


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen2"])
def test_every_part_of_the_model_has_a_place(tiny_models, kind):
    placed = split_over(tiny_models(kind), ["cuda:0", "cuda:1"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_models(kind)))
    tensors = [name for name, _ in [*model.named_parameters(), *model.named_buffers()]]
    assert [name for name in tensors if not any(name.startswith(f"{part}.") for part in placed)] == []
    assert [part for part in placed if not any(name == part for name, _ in model.named_modules())] == []


def test_elements_of_gptq_are_counted_as_the_weights_that_they_stand_for(tmp_path):
    for bits in (4, 8):
        layer = GptqLinear(torch.nn.Linear(256, 64), bits, group_size=128)
        save_file({f"layer.{name}": tensor for name, tensor in layer.state_dict().items()}, tmp_path / "model.safetensors")
        sizes = weight_sizes(tmp_path)
        assert sizes["layer.qweight"] == (64 * 256 * bits // 8, 64 * 256)
        assert sizes["layer.scales"] == (2 * 2 * 64, 2 * 64)
        assert [name for name in sizes if is_multiplied(name)] == ["layer.qweight"]


def test_elements_of_nf4_are_counted_as_the_weights_that_they_stand_for(tiny_models, tmp_path):
    settings = {"quantization_config": quantization_config("nf4", ["lm_head"]), "device_map": {"": "cpu"}}
    AutoModelForCausalLM.from_pretrained(tiny_models("llama"), dtype=torch.float16, **settings).save_pretrained(tmp_path)
    name = "model.layers.0.mlp.up_proj.weight"
    assert weight_sizes(tiny_models("llama"))[name] == (4 * 64 * 128, 64 * 128)
    assert weight_sizes(tmp_path)[name] == (64 * 128 // 2, 64 * 128)
    assert weight_sizes(tmp_path)["lm_head.weight"][1] == 1024 * 64


def test_a_split_model_answers_as_the_whole_one(package_folder):
    package = read_package(package_folder)
    pairs = [package.model_input.pair_from_row(row) for row in tiny.pairs(3, seed=9).to_dicts()]
    scores = []
    for devices, stages_expected in ((("cpu",), 0), (("cpu", "cpu"), 1)):
        model, stages = load_on(package, devices)
        assert len(stages.locks if stages else ()) == stages_expected
        scores.append(score(model, package.model_input, package.tokenizer, package.contract, pairs, orders=("as_given",)))
    for pair in pairs:
        assert scores[1][pair.id]["as_given"] == pytest.approx(scores[0][pair.id]["as_given"], abs=1e-5)


def test_a_split_model_stands_on_all_devices_with_a_stage_on_each(package_folder, monkeypatch):
    loaded, staged = [], []
    monkeypatch.setattr(worker, "load_model", lambda *_, device_map=None: loaded.append(device_map))
    monkeypatch.setattr(worker, "Stages", lambda model, starts, devices: staged.append(devices))
    load_on(read_package(package_folder), ("cuda:0", "cuda:1"))
    assert set(loaded[0].values()) == {"cuda:0", "cuda:1"}
    assert staged == [("cuda:0", "cuda:1")]


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("each", [("worker 0 on cuda:0", (0,), ("cuda:0",)), ("worker 1 on cuda:1", (1,), ("cuda:1",))]),
        ("split", [("worker 0 on cuda:0+cuda:1", (0, 1), ("cuda:0", "cuda:1"))]),
    ],
)
def test_each_means_a_worker_a_device_and_split_one_worker(package_folder, monkeypatch, placement, expected):
    monkeypatch.setattr(worker_handle, "start_process", lambda task: (None, None))
    devices = {0: "cuda:0", 1: "cuda:1"}
    served = settings_for("two", "tiny-two", placement=placement, weight_bytes_limit=10**6)
    workers = worker_handle.start_workers(read_package(package_folder), served, devices, 100, 2, start_clock(600))
    assert [worker.task.weight_bytes_limit for worker in workers] == [10**6] * len(expected)
    assert [(worker.name, worker.positions, worker.task.devices) for worker in workers] == expected
    assert [worker.task.position for worker in workers] == [positions[0] for _, positions, _ in expected]
