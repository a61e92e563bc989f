"""Large packages on two T4s without data: where they stand, in which dtype, and whether the build's memory is right.

`make test-fake-gpu` runs this file in an environment of its own; its name keeps it out of `make test`.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.hooks import remove_hook_from_submodules
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging

from kaggle_kernels.build.memory_fit import fit_packages
from kaggle_kernels.build.spec import find_spec, read_spec
from kaggle_kernels.runtime.models import shortcuts
from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.placement import split_over
from kaggle_kernels.runtime.models.shortcuts import reading
from postprocess.memory.model_size import GIB, activation_bytes, weight_bytes
from recipes.pairwise.memory.base_model import read_records
from tests.fake_gpu import fakes

GPUS = ["cuda:0", "cuda:1"]
# The kernel that PyTorch takes on a T4, and the one that holds every score.
ATTENTIONS = {"efficient": fakes.efficient_attention, "math": fakes.math_attention}
# Spec, and the format in place of its recipe's, where another one is walked too.
CASES = [
    ("gemma2_cls", None),
    ("gemma2_cls", "int8"),
    ("gemma2_cls", "gptq4"),
    ("gemma2_cls", "gptq8"),
    ("gemma2_cls_fp16", None),
    ("gemma2_causal", None),
    ("gemma2_reward", None),
    ("llama3_cls", None),
    ("llama3_zeroshot", None),
    ("qwen2_5_14b_cls", None),
]


@pytest.fixture(autouse=True)
def fake_gpus(monkeypatch):
    """Two T4s without data for everything that a test computes."""
    # A loader in threads of its own would leave the mode, which is its thread's.
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")
    monkeypatch.setattr("transformers.modeling_utils.safe_open", fakes.FakeCheckpoint)
    logging.disable_progress_bar()
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (fakes.T4_BYTES, fakes.T4_BYTES))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 0)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


def load(folder, fit, quantize: str, contract) -> torch.nn.Module:
    """Load a checkpoint as a kernel's worker does; where bitsandbytes' own layers cannot be faked, stand-ins follow."""
    config = read_records()[fit.recipe.axolotl["base_model"]]["config"]
    fakes.write_checkpoint(folder / quantize, config, contract.head, quantize)
    device_map = split_over(folder / quantize, GPUS) if fit.placement == "split" else None
    if quantize not in ("nf4", "int8"):
        return load_model(folder / quantize, contract, GPUS[0], device_map=device_map)

    fakes.write_checkpoint(folder / "none", config, contract.head, "none")
    model = load_model(folder / "none", contract, GPUS[0], device_map=device_map)
    fakes.quantise_layers(model, quantize)
    return model


def contract_of(fit) -> SimpleNamespace:
    """What loading needs of the contract that a package of this recipe has."""
    head = fit.recipe.pairwise.head
    return SimpleNamespace(
        head=head,
        verdicts=("model_a", "model_b"),
        num_labels={"score": 2, "reward": 1, "label_tokens": 0}[head],
        pad_token_id=0,
        softcap=False,
        label_token_ids=(5, 6) if head == "label_tokens" else (),
    )


def record_layers(model: torch.nn.Module) -> list[tuple[str, torch.dtype]]:
    """Record device and dtype of what each decoder layer hands on."""
    outputs = []

    def record(_module, _inputs, output) -> None:
        hidden_btd = output[0] if isinstance(output, tuple) else output
        outputs.append((str(hidden_btd.device), hidden_btd.dtype))

    layers = next(module for name, module in model.named_modules() if name.endswith(".layers"))
    for layer in layers:
        layer.register_forward_hook(record)
    return outputs


def compute_batch(model: torch.nn.Module, contract, rows: int, tokens: int) -> torch.Tensor:
    """Compute a full batch of rows of the greatest length, read at their last token."""
    ids_bt = torch.zeros(rows, tokens, dtype=torch.long, device=GPUS[0])
    places_b = torch.full((rows,), tokens - 1, device=GPUS[0])
    options = {"logits_to_keep": 1} if contract.head == "label_tokens" else {}
    with torch.no_grad(), reading(places_b):
        return model(input_ids=ids_bt, **options).logits


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(("name", "quantize"), CASES)
def test_a_package_stands_where_the_build_says(name, quantize, attention, tmp_path, monkeypatch):
    spec = read_spec(find_spec(name))
    [fit] = fit_packages(find_spec(name), spec)
    served = fit.served if quantize is None else replace(fit.served, quantize=quantize)
    contract = contract_of(fit)
    model = load(tmp_path, fit, served.quantize, contract)
    gpus = GPUS if fit.placement == "split" else GPUS[:1]

    # Weights: on their GPUs, none in bfloat16, as many bytes as the build computes.
    live = fakes.LiveBytes()
    weights = [*model.parameters(), *model.buffers()]
    for tensor in weights:
        live.add(tensor)
    held = dict(live.now)
    assert {str(tensor.device) for tensor in weights} == set(gpus)
    assert torch.bfloat16 not in {tensor.dtype for tensor in weights}
    for gpu, computed_bytes in zip(gpus, weight_bytes(served, len(gpus)), strict=True):
        assert held[gpu] <= 1.01 * computed_bytes
        # A causal LM may leave the output layer's rows of all other tokens away.
        assert contract.head == "label_tokens" or held[gpu] >= 0.99 * computed_bytes

    # A batch: each layer in float16, from the first GPU to the second once, and never back.
    layers = record_layers(model)
    monkeypatch.setattr(shortcuts, "scaled_dot_product_attention", ATTENTIONS[attention])
    tokens = min(served.budget_tokens, spec.tokens_per_batch)
    rows = spec.tokens_per_batch // tokens
    with live:
        logits = compute_batch(model, contract, rows, tokens)
    assert str(logits.device) == GPUS[0]
    assert layers == sorted(layers, key=str)
    assert {device for device, _ in layers} == set(gpus)
    assert {dtype for _, dtype in layers} == {torch.float16}

    # The build's arithmetic is of the attention that holds every score: an upper bound of what a T4 needs.
    for gpu in gpus:
        peak = live.peak[gpu] - held[gpu]
        computed = activation_bytes(served, rows * tokens)
        print(
            f"\n{name} {served.quantize} {attention} {gpu}: weights {held[gpu] / GIB:.2f} GiB, batch of {rows * tokens:,} "
            f"tokens {peak / GIB:.2f} ({computed / GIB:.2f})"
        )
        assert peak <= computed
        assert attention == "efficient" or computed <= 1.25 * peak


def test_a_split_model_without_its_hooks_is_noticed(tmp_path):
    """What shows that the devices of these tensors are checked: nothing brings the hidden states to the second GPU."""
    [fit] = fit_packages(find_spec("gemma2_cls_fp16"), read_spec(find_spec("gemma2_cls_fp16")))
    contract = contract_of(fit)
    model = load(tmp_path, fit, "none", contract)
    remove_hook_from_submodules(model)
    with pytest.raises(RuntimeError, match="cuda:1"):
        compute_batch(model, contract, rows=1, tokens=64)
