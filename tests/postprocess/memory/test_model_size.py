"""Sizes by arithmetic are those of the models that transformers builds and of the packages that bitsandbytes writes."""

import json
import subprocess
import sys
import weakref
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from kaggle_kernels.runtime.models.placement import weight_sizes
from postprocess.memory.model_size import (
    CUDA_BYTES,
    GIB,
    GPU_BYTES,
    Served,
    activation_bytes,
    bytes_by_class,
    dimensions_of,
    gpu_bytes,
    known_dimensions,
    packed_bytes,
    read_dimensions,
    served_of,
    weight_bytes,
    weight_bytes_limit,
    weights,
)
from postprocess.weights.bnb_quantize import quantization_config
from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import read_recipe
from tests.conftest import ROOT

PARAMETERS = {
    "google/gemma-2-9b-it": 9_241_705_984,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "meta-llama/Meta-Llama-3-70B-Instruct": 70_553_706_496,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
    "outputs/demo/input/gemma2": 139_840,
}
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.yml"))
GEMMA = Served(read_dimensions("google/gemma-2-9b-it"), "score", 2, "nf4", False, 2048)


def parameters_of(dimensions):
    return sum(weight.elements for weight in weights(dimensions, "label_tokens", 2))


def test_every_base_model_that_is_known_has_its_parameters():
    assert {name: parameters_of(read_dimensions(name)) for name in known_dimensions()} == PARAMETERS
    assert weights(GEMMA.dimensions, "reward", 2)[-1].shape == (1, 3584)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_a_base_model_that_is_a_folder_is_read_from_its_config_which_may_leave_keys_out(kind, tiny_models):
    model = AutoModelForCausalLM.from_pretrained(tiny_models(kind))
    assert parameters_of(read_dimensions(str(tiny_models(kind)))) == model.num_parameters()


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_names_a_base_model_whose_size_is_known(path):
    served = served_of(read_recipe(path))
    assert sum(weight_bytes(served)) == sum(bytes_by_class(served).values())


@pytest.mark.parametrize("kind", ["gemma2", "llama", "qwen2", "bert"])
@pytest.mark.parametrize("quantize", ["none", "nf4", "int8"])
def test_a_tiny_package_on_disk_has_the_bytes_that_were_computed(tiny_models, tmp_path, kind, quantize):
    config = quantization_config(quantize, ["classifier" if kind == "bert" else "score"]) if quantize != "none" else None
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_models(kind), num_labels=2, dtype=torch.float16, quantization_config=config, device_map={"": "cpu"}
    )
    model.save_pretrained(tmp_path)
    served = Served(dimensions_of(json.loads((tmp_path / "config.json").read_text()), "tiny"), "score", 2, quantize, False, 128)
    sizes = {name: size for name, (size, _) in weight_sizes(tmp_path).items()}
    # a few bytes a layer that no GPU holds: how nf4 and int8 were made
    notes = sum(size for name, size in sizes.items() if ".quant_state." in name or name.endswith(".weight_format"))
    assert notes < 120 * 7 * 2 + 120
    for weight in weights(served.dimensions, "score", 2):
        stem = weight.name.removesuffix("weight")
        states = (f"{stem}SCB", f"{stem}weight.absmax", f"{stem}weight.quant_map")
        stored = sizes[weight.name], sum(sizes.get(name, 0) for name in states)
        assert stored == packed_bytes(weight, quantize), weight.name
    assert sum(bytes_by_class(served).values()) == sum(sizes.values()) - notes


def test_an_adapter_that_stays_apart_is_counted():
    lora = (64, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    assert bytes_by_class(replace(GEMMA, lora=lora))["adapter"] == 432_144_384
    recipe = read_recipe(ROOT / "recipes" / "gemma2_qlora.yml")
    assert served_of(recipe).lora == lora


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, but for those of the model and its inputs."""

    def __init__(self, known):
        super().__init__()
        self.alive = self.most = 0
        self.known = weakref.WeakKeyDictionary({tensor.untyped_storage(): True for tensor in known})

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in tree_leaves(result):
            storage = tensor.untyped_storage() if isinstance(tensor, torch.Tensor) else None
            if storage is not None and storage not in self.known:
                self.known[storage] = True
                self.add(storage.nbytes())
                weakref.finalize(storage, self.add, -storage.nbytes())
        return result

    def add(self, size):
        self.alive += size
        self.most = max(self.most, self.alive)


@pytest.mark.parametrize(
    "name, head, softcap, rows, length",
    [
        ("google/gemma-2-9b-it", "score", False, 4, 2048),
        ("google/gemma-2-9b-it", "score", True, 4, 2048),
        ("google/gemma-2-9b-it", "label_tokens", False, 128, 64),
        ("Qwen/Qwen2.5-14B-Instruct", "score", False, 2, 2048),
        ("sentence-transformers/all-MiniLM-L6-v2", "score", False, 128, 256),
    ],
)
def test_a_batchs_bytes_are_those_that_pytorch_counts_and_at_most_an_eighth_more(name, head, softcap, rows, length):
    config = AutoConfig.for_model(**{**known_dimensions()[name], "num_hidden_layers": 2}, pad_token_id=0, use_cache=False)
    config._attn_implementation = "eager" if softcap else "sdpa"
    if not softcap:
        config.attn_logit_softcapping = None
    with FakeTensorMode():  # tensors have a size and no bytes: any model fits
        with torch.device("cpu"):
            auto = AutoModelForCausalLM if head == "label_tokens" else AutoModelForSequenceClassification
            model = auto.from_config(config, dtype=torch.float16).eval()
        inputs = {key: torch.ones(rows, length, dtype=torch.long) for key in ("input_ids", "attention_mask")}
        peak = PeakBytes([*model.parameters(), *model.buffers(), *inputs.values()])
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), peak:
            model(**inputs, **({"logits_to_keep": 1} if head == "label_tokens" else {}))
    served = Served(read_dimensions(name), head, 2, "none", softcap, length)
    assert 0.875 < peak.most / activation_bytes(served, rows * length) <= 1


def test_a_batch_holds_at_least_the_longest_request():
    assert activation_bytes(GEMMA, 100) == activation_bytes(GEMMA, 2048)
    assert activation_bytes(replace(GEMMA, head="reward"), 100) == activation_bytes(replace(GEMMA, head="reward"), 4096)


def test_a_gpu_holds_weights_a_batch_and_cuda_and_of_a_model_on_two_each_about_half():
    [needed] = gpu_bytes(GEMMA, 8192)
    assert needed == sum(bytes_by_class(GEMMA).values()) + activation_bytes(GEMMA, 8192) + CUDA_BYTES
    assert 9.5 < needed / GIB < 10.5
    served = Served(read_dimensions("Qwen/Qwen2.5-14B-Instruct"), "score", 2, "int8", False, 2048)
    first, second = weight_bytes(served, 2)
    assert first + second == weight_bytes(served)[0] > 13.7 * GIB
    assert first - second == 152_064 * 5_120 * 2 - 5_120 * 2 - 2 * 5_120 * 2, (
        "24 layers on each; embedding here, norm and head there"
    )
    batches = 2 * activation_bytes(served, 3072)  # one in flight for each GPU
    assert gpu_bytes(served, 3072, 2) == [first + batches + CUDA_BYTES, second + batches + CUDA_BYTES]


def test_layers_are_moved_where_a_gpu_lacks_the_memory_for_half_of_them():
    served = Served(read_dimensions("Qwen/Qwen2.5-14B-Instruct"), "score", 2, "int8", False, 2048)
    first, second = weight_bytes(served, 2)
    layer = (second - 2 * 5_120 * 2) // 24
    limited = weight_bytes(served, 2, byte_limit=first - 1)
    assert limited == pytest.approx([first - layer, second + layer], abs=5_120 * 2)
    byte_limit = weight_bytes_limit(served, 3072, 2)
    assert gpu_bytes(served, 3072, 2) == [GPU_BYTES - byte_limit + size for size in weight_bytes(served, 2, byte_limit)]


@pytest.mark.parametrize(
    "config, message",
    [
        (None, "postprocess/memory/dimensions.yml: no entry "),
        ({"model_type": "mamba"}, "model_type 'mamba'; sizes are known of gemma2, llama, qwen2 and bert"),
        ({"model_type": "llama", "hidden_size": 64}, "no num_hidden_layers, intermediate_size, num_attention_heads"),
    ],
)
def test_a_base_model_whose_size_is_unknown_is_one_line(tmp_path, config, message):
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as refusal:
        read_dimensions(str(tmp_path))
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_sizes_need_no_torch():
    code = "import sys, kaggle_kernels.build.listing; assert not {'torch', 'transformers'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
