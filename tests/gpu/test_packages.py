"""Packages of every head and format answer on a GPU, in float16, as they do on a CPU in float32."""

import numpy as np
import pytest
import torch

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import score
from kaggle_kernels.runtime.package import read_package
from recipes.pairwise.config.schema import GPTQ_BITS
from tests.postprocess.gptq.test_quantize import needs_gptq

# Architecture, head, format, adapter. float16 kernels differ from float32 ones by rounding: 0.01 is far above what is
# measured, and far below what a wrong mask, head or scale would give.
CASES = [
    ("gemma2", "score", "none", "merged"),
    ("gemma2", "label_tokens", "none", "merged"),
    ("gemma2", "reward", "nf4", "merged"),
    ("gemma2", "score", "nf4", "unmerged"),
    ("gemma2", "score", "int8", "merged"),
    ("llama", "score", "nf4", "merged"),
    ("llama", "label_tokens", "nf4", "merged"),
    ("llama", "reward", "none", "merged"),
    ("qwen2", "score", "int8", "merged"),
    ("qwen2", "label_tokens", "none", "merged"),
    ("qwen2", "reward", "nf4", "unmerged"),
    ("bert", "score", "none", "merged"),
    ("bert", "reward", "int8", "merged"),
    pytest.param("gemma2", "score", "gptq8", "merged", marks=needs_gptq),
    pytest.param("llama", "label_tokens", "gptq4", "merged", marks=needs_gptq),
]
TOLERANCE = 0.01


def probabilities(package, device: str, dtype: torch.dtype) -> np.ndarray:
    """The golden rows' probabilities in both orders, (rows, orders, verdicts)."""
    model = load_model(package.folder, package.contract, device, dtype)
    pairs = [package.model_input.pair_from_row(row["pair"]) for row in package.contract.golden]
    scores = score(model, package.model_input, package.tokenizer, package.contract, pairs, device=device)
    return np.array([list(scores[pair.id].values()) for pair in pairs])


@pytest.mark.parametrize(("kind", "head", "quantize", "adapter"), CASES)
def test_a_package_answers_on_the_gpu_as_on_the_cpu(kind, head, quantize, adapter, packaged, gpu_memory, measure):
    options = {"head": head, "quantize": quantize, "adapter": adapter, "qlora": adapter == "unmerged"}
    if quantize in GPTQ_BITS:
        options |= {"width": 128, "training_rows": 30}  # a group of weights, and rows to calibrate on
    run, _ = packaged(kind, **options, tolerance=1.0)  # 4 bits are few for so narrow a model: the gate has tests of its own
    package = read_package(run.folder / "package")
    on_cpu = probabilities(package, "cpu", torch.float32)
    on_gpu = probabilities(package, "cuda:0", torch.float16)
    worst = float(np.abs(on_cpu - on_gpu).max())
    measure(f"largest difference, {kind} {head} {quantize} {adapter}", round(worst, 5))
    assert worst < TOLERANCE
