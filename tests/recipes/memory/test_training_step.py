"""The memory of a training step: sums of known shapes, and the activations against PyTorch's own on fake tensors."""

from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoConfig

from recipes.pairwise.config.model_checks import build_empty_model
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.memory.base_model import read_records
from recipes.pairwise.memory.hardware import describe_step
from recipes.pairwise.memory.measure import PeakBytes
from recipes.pairwise.memory.training_step import GIB, Zero, count_activation_bytes, count_step_memory
from recipes.pairwise.training.heads import replace_head_forward
from tests.conftest import ROOT

# One recipe for each step that differs.
LARGE_RECIPES = {}
for path in sorted((ROOT / "recipes").glob("*.yml")):
    recipe = read_recipe(path)
    if recipe.pairwise.hardware is not None:
        step = describe_step(recipe, None, gpus=1)
        LARGE_RECIPES.setdefault((recipe.axolotl["base_model"], step.head, step.tokens), path.stem)

GEMMA = describe_step(read_recipe(ROOT / "recipes/gemma2_cls.yml"), None, gpus=1)
# LoRA of rank 64 on all linear layers of Gemma-2-9b, and a head of two outputs.
TRAINED = 216_072_192 + 2 * 3584
WEIGHTS = 9_241_705_984 + 2 * 3584


class FusedDropout(torch.nn.Dropout):
    """Dropout as it is on GPUs: it keeps one byte for each value."""

    def forward(self, inputs):
        return torch.native_dropout(inputs, self.p, True)[0]


def build_trained_model(recipe):
    """Build a recipe's model in 16 bits on the meta device, its adapter included."""
    keys, block = recipe.axolotl, recipe.pairwise
    config = AutoConfig.for_model(**read_records()[keys["base_model"]]["config"])
    config.dtype = torch.bfloat16
    config.use_cache = False
    config.pad_token_id = None  # an embedding would set its row to zero, which fake tensors cannot
    config.num_labels = 1 if block.head == "reward" else len(block.verdicts)
    if config.model_type == "gemma2":
        config.attn_logit_softcapping = None
    model = build_empty_model(config, block.head)
    model.config.pad_token_id = 0

    adapter = LoraConfig(
        r=keys["lora_r"],
        lora_dropout=keys["lora_dropout"],
        target_modules=keys["lora_target_modules"],
        task_type="CAUSAL_LM" if block.head == "label_tokens" else "SEQ_CLS",
    )
    with torch.device("meta"):
        model = get_peft_model(model, adapter, autocast_adapter_dtype=False).to(torch.bfloat16)
    for module in model.modules():
        if hasattr(module, "lora_dropout"):
            module.lora_dropout["default"] = FusedDropout(keys["lora_dropout"])
    return model


def put_fake_tensors(model) -> None:
    """Replace meta tensors by fake ones on the CPU; to be called inside FakeTensorMode."""
    for module in model.modules():
        for name, weight in module.named_parameters(recurse=False):
            fake = torch.empty(weight.shape, dtype=weight.dtype)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=weight.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))


def track_activations(recipe, is_checkpointed: bool) -> int:
    """Track the bytes of a micro-batch beside weights and gradients, at their peak."""
    model = build_trained_model(recipe)
    block = recipe.pairwise
    rows = 2 * recipe.axolotl["micro_batch_size"]
    is_causal = block.head == "label_tokens"
    with FakeTensorMode(allow_non_fake_inputs=True):
        put_fake_tensors(model)
        replace_head_forward(model, (5, 6) if is_causal else ())
        model.train()
        if is_checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.enable_input_require_grads()
        ids_bt = torch.zeros(rows, block.budget_tokens, dtype=torch.long)

        def run_micro_batch():
            options = {"logits_to_keep": 1} if is_causal else {}
            model(input_ids=ids_bt, attention_mask=None, **options).logits.float().sum().backward()

        run_micro_batch()  # from here on there are gradients
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        peak = PeakBytes([*model.parameters(), *model.buffers(), *gradients, ids_bt])
        with peak:
            run_micro_batch()
    return peak.highest


@pytest.mark.slow
@pytest.mark.parametrize("is_checkpointed", [True, False], ids=["checkpointed", "kept"])
@pytest.mark.parametrize("name", LARGE_RECIPES.values())
def test_activations_are_those_that_pytorch_holds(name, is_checkpointed):
    recipe = read_recipe(ROOT / "recipes" / f"{name}.yml")
    step = replace(describe_step(recipe, None, gpus=1), is_checkpointed=is_checkpointed)
    tracked = track_activations(recipe, is_checkpointed)
    print(f"{name}: {tracked / GIB:.2f} GiB tracked, {count_activation_bytes(step) / tracked:.3f} of it computed")
    assert count_activation_bytes(step) == pytest.approx(tracked, rel=0.1)


@pytest.mark.parametrize(
    ("changes", "weights", "gradients", "optimizer"),
    [
        # One GPU, then DDP: the adapter is float32, and DDP holds gradients twice.
        ({}, 2 * WEIGHTS + 4 * TRAINED, 4 * TRAINED, 8 * TRAINED),
        ({"gpus": 8}, 2 * WEIGHTS + 4 * TRAINED, 8 * TRAINED, 8 * TRAINED),
        ({"gpus": 8, "zero": Zero(1)}, 2 * (WEIGHTS + TRAINED), 2 * TRAINED, 12 * TRAINED // 8),
        ({"gpus": 8, "zero": Zero(2)}, 2 * (WEIGHTS + TRAINED), 2 * TRAINED // 8, 12 * TRAINED // 8),
        (
            {"gpus": 8, "zero": Zero(3)},
            2 * (WEIGHTS + TRAINED) // 8 + 2 * (10**9 + 256_000 * 3584),
            2 * TRAINED // 8,
            12 * TRAINED // 8,
        ),
        (
            {"gpus": 8, "zero": Zero(3, 10**8, offloads_weights=True, offloads_optimizer=True)},
            2 * (10**8 + 256_000 * 3584),
            2 * TRAINED // 8,
            0,
        ),
        ({"lora_rank": 0}, 4 * WEIGHTS + 2 * 8_323_596_288, 4 * WEIGHTS, 8 * WEIGHTS),
        (
            {"is_4bit": True, "moment_bytes": 2},
            int(0.5625 * 8_323_596_288) + 2 * (WEIGHTS - 8_323_596_288 + 14336 * 3584) + 4 * TRAINED,
            4 * TRAINED,
            2 * TRAINED,
        ),
    ],
    ids=["LoRA", "DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-3, offloaded", "full", "QLoRA"],
)
def test_what_each_gpu_holds_beside_activations(changes, weights, gradients, optimizer):
    memory = count_step_memory(replace(GEMMA, **changes))
    assert (memory.gradients, memory.optimizer) == (gradients, optimizer)
    assert memory.weights == weights


def test_activations_grow_with_tokens_and_without_checkpointing():
    assert count_activation_bytes(GEMMA) == 8192 * (42 * 2 * 3584 + 290_176 + 93_184)
    kept = count_activation_bytes(replace(GEMMA, is_checkpointed=False, tokens=2 * 8192))
    assert kept == 2 * 8192 * (42 * 290_176 + 93_184)
