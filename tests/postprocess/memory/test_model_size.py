"""Sizes by arithmetic are those of the packages that bitsandbytes writes, and of the models that PyTorch runs."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kaggle_kernels.runtime.models.placement import weight_sizes
from postprocess.memory.model_size import (
    CUDA_BYTES,
    GIB,
    GPU_BYTES,
    Served,
    activation_bytes,
    bytes_by_class,
    gpu_bytes,
    packed_bytes,
    served_of,
    weight_bytes,
    weight_bytes_limit,
)
from postprocess.weights.bnb_quantize import quantization_config
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.memory.base_model import find_base_model
from recipes.pairwise.memory.measure import measure_folder
from tests.conftest import ROOT
from tests.kaggle_kernels.packages import write_recipe
from tests.tiny import KINDS

RECIPES = sorted((ROOT / "recipes").glob("*.yml"))
GEMMA = Served(find_base_model("google/gemma-2-9b-it"), "score", "nf4", False, 2048)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_a_base_model_whose_size_is_known(path):
    served = served_of(read_recipe(path))
    assert sum(weight_bytes(served)) == sum(bytes_by_class(served).values())


# nf4 tells of every architecture which weights are quantised; the other formats differ in the arithmetic alone.
FORMATS = [(kind, "nf4") for kind in KINDS]
FORMATS += [(kind, quantize) for kind in ("gemma2", "deberta-v2") for quantize in ("none", "int8")]


@pytest.mark.parametrize(("kind", "quantize"), FORMATS)
def test_a_tiny_package_on_disk_has_the_bytes_that_were_computed(tiny_models, tmp_path, kind, quantize):
    served = Served(measure_folder(tiny_models(kind)), "score", quantize, False, 128)
    options = {"num_labels": 2, "dtype": torch.float16, "device_map": {"": "cpu"}}
    if quantize != "none":
        head = {weight.name.split(".")[0] for weight in served.base.heads["score"]}
        options["quantization_config"] = quantization_config(quantize, sorted(head))
    AutoModelForSequenceClassification.from_pretrained(tiny_models(kind), **options).save_pretrained(tmp_path)

    sizes = {name: size for name, (size, _) in weight_sizes(tmp_path).items()}
    # A few bytes a layer that no GPU holds: how nf4 and int8 were made.
    notes = sum(size for name, size in sizes.items() if ".quant_state." in name or name.endswith(".weight_format"))
    assert notes < 120 * 7 * 2 + 120
    for weight in served.weights:
        stem = weight.name.removesuffix("weight")
        states = (f"{stem}SCB", f"{stem}weight.absmax", f"{stem}weight.quant_map")
        stored = sizes[weight.name], sum(sizes.get(name, 0) for name in states)
        assert stored == packed_bytes(weight, quantize), weight.name
    assert sum(bytes_by_class(served).values()) == sum(sizes.values()) - notes


def test_an_adapter_that_stays_apart_is_counted():
    served = served_of(read_recipe(ROOT / "recipes" / "gemma2_qlora.yml"))
    assert (served.lora_rank, bytes_by_class(served)["adapter"]) == (64, 432_144_384)


def test_a_batch_holds_at_least_the_longest_request():
    assert activation_bytes(GEMMA, 100) == activation_bytes(GEMMA, 2048)
    assert activation_bytes(replace(GEMMA, head="reward"), 100) == activation_bytes(replace(GEMMA, head="reward"), 4096)


def test_a_gpu_holds_weights_a_batch_and_cuda_and_of_a_model_on_two_each_about_half():
    [needed] = gpu_bytes(GEMMA, 8192)
    assert needed == sum(bytes_by_class(GEMMA).values()) + activation_bytes(GEMMA, 8192) + CUDA_BYTES
    assert 9.5 < needed / GIB < 10.5
    served = Served(find_base_model("Qwen/Qwen2.5-14B-Instruct"), "score", "int8", False, 2048)
    first, second = weight_bytes(served, 2)
    assert first + second == weight_bytes(served)[0] > 13.7 * GIB
    assert first - second == 152_064 * 5_120 * 2 - 5_120 * 2 - 2 * 5_120 * 2, (
        "24 layers on each; embedding here, norm and head there"
    )
    batches = 2 * activation_bytes(served, 3072)  # one in flight for each GPU
    assert gpu_bytes(served, 3072, 2) == [first + batches + CUDA_BYTES, second + batches + CUDA_BYTES]


def test_layers_are_moved_where_a_gpu_lacks_the_memory_for_half_of_them():
    served = Served(find_base_model("Qwen/Qwen2.5-14B-Instruct"), "score", "int8", False, 2048)
    first, second = weight_bytes(served, 2)
    layer = (second - 2 * 5_120 * 2) // 24
    limited = weight_bytes(served, 2, byte_limit=first - 1)
    assert limited == pytest.approx([first - layer, second + layer], abs=5_120 * 2)
    byte_limit = weight_bytes_limit(served, 3072, 2)
    assert gpu_bytes(served, 3072, 2) == [GPU_BYTES - byte_limit + size for size in weight_bytes(served, 2, byte_limit)]


@pytest.mark.parametrize(
    ("changes", "block", "message"),
    [
        (
            {},
            {},
            "base_models.yml: no entry some/model, and no such folder; run `python -m recipes.pairwise.memory some/model`",
        ),
        ({"model_type": "gemma3_text"}, {}, "activations of gemma3_text overflow float16, .*transformers/issues/36822"),
        ({"heads": {}}, {"head": "label_tokens"}, "gemma2 is an encoder, which has no answer tokens"),
    ],
)
def test_a_base_model_that_is_unknown_or_not_to_be_served_is_one_line(changes, block, message, tmp_path):
    recipe = read_recipe(write_recipe(tmp_path, "big", "dataset-big", "some/model", **block))
    base = replace(GEMMA.base, **changes) if changes else None
    with pytest.raises(UserError, match=f"big.yml: base_model: .*{message}"):
        served_of(recipe, base)


def test_sizes_need_no_torch():
    code = "import sys, kaggle_kernels.build.listing; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
