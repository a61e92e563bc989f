"""Gemma-2-9b and Qwen2.5-14B at their own shapes, with random weights: loading, memory against the build's arithmetic, speed.

Accuracy needs trained weights; seconds, bytes and tokens a second do not.
"""

import gc
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, BitsAndBytesConfig

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import verdict_logits
from postprocess.memory.model_size import CUDA_BYTES, GIB, gpu_bytes, served_of, weight_bytes
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.memory.base_model import read_records
from tests.conftest import ROOT

TOKENS_PER_BATCH = 8192
TOKENS_PER_ROW = 1024
PASSES = 6
CONTRACT = SimpleNamespace(
    head="score",
    verdicts=("model_a", "model_b"),
    num_labels=2,
    pad_token_id=0,
    softcap=False,
    label_token_ids=(),
    logit_bias=(),
)
QUANTISED = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float16},
    "int8": {"load_in_8bit": True, "llm_int8_threshold": 0.0},
}


def random_checkpoint(folder, base_model: str) -> None:
    """Write a float16 checkpoint of the base model's shape, with random weights."""
    sizes = read_records()[base_model]["config"]
    config = AutoConfig.for_model(**sizes, num_labels=2, pad_token_id=0, dtype=torch.float16)
    with torch.device("cuda"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder, max_shard_size="4GB")


def free_memory() -> None:
    """Give back what models that nobody uses any more hold; they are in reference cycles."""
    gc.collect()
    torch.cuda.empty_cache()


def quantise(source, folder, quantize: str) -> None:
    """Load the checkpoint quantised by bitsandbytes and save it so."""
    options = BitsAndBytesConfig(**QUANTISED[quantize], llm_int8_skip_modules=["score"])
    model = AutoModelForSequenceClassification.from_pretrained(
        source, quantization_config=options, dtype=torch.float16, device_map={"": "cuda:0"}
    )
    model.save_pretrained(folder)
    del model
    free_memory()


def seconds_a_pass(model) -> float:
    """Seconds of a forward pass over a full batch of rows of like length, the median of several."""
    rows = TOKENS_PER_BATCH // TOKENS_PER_ROW
    vocabulary = model.config.get_text_config().vocab_size
    sequences = torch.randint(5, vocabulary, (rows, TOKENS_PER_ROW)).tolist()
    seconds = []
    with torch.inference_mode():
        for _ in range(PASSES):
            began = time.perf_counter()
            verdict_logits(model, CONTRACT, sequences, "cuda:0")
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - began)
    return sorted(seconds)[PASSES // 2]


@pytest.mark.parametrize("recipe", ["gemma2_cls", "qwen2_5_14b_cls"])
@pytest.mark.timeout(400)
def test_a_large_model_loads_fits_and_scores_as_computed(recipe, room, gpu_memory, matrix_rate, measure):
    measure("float16 matrices of 8,192, TFLOP/s", round(matrix_rate / 1e12, 1))
    checked = read_recipe(ROOT / "recipes" / f"{recipe}.yml")
    planned = served_of(checked)
    random_checkpoint(room / "none", checked.axolotl["base_model"])
    multiplied = sum(weight.elements for weight in planned.weights if weight.kind in ("linear", "head"))

    for quantize in ("none", "nf4", "int8"):
        folder = room / quantize
        if quantize != "none":
            quantise(room / "none", folder, quantize)
        free_memory()
        held_before = gpu_memory.memory_allocated()

        began = time.perf_counter()
        model = load_model(folder, CONTRACT, "cuda:0", torch.float16)
        torch.cuda.synchronize()
        loading = time.perf_counter() - began
        weights_held = gpu_memory.memory_allocated() - held_before
        gpu_memory.reset_peak_memory_stats()
        seconds = seconds_a_pass(model)
        peak = gpu_memory.max_memory_allocated() - held_before

        served = replace(planned, quantize=quantize, lora_rank=0)
        [computed_weights] = weight_bytes(served)
        [computed] = gpu_bytes(served, TOKENS_PER_BATCH)
        tokens_per_second = TOKENS_PER_BATCH / seconds
        share = 2 * multiplied * tokens_per_second / matrix_rate
        name = f"{recipe} {quantize}"
        measure(f"{name}: seconds to load", round(loading, 1))
        measure(f"{name}: weights, GiB (computed)", f"{weights_held / GIB:.2f} ({computed_weights / GIB:.2f})")
        activations, computed_activations = peak - weights_held, computed - computed_weights - CUDA_BYTES
        measure(f"{name}: activations, GiB (computed)", f"{activations / GIB:.2f} ({computed_activations / GIB:.2f})")
        measure(f"{name}: tokens a second", round(tokens_per_second))
        measure(f"{name}: share of the matrix rate", round(share, 3))
        del model
        free_memory()

        assert abs(weights_held / computed_weights - 1) < 0.02, name
        assert peak <= computed - CUDA_BYTES, name
