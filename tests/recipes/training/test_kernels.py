"""Axolotl's LoRA kernels: when they are on, and that a classifier computes the same with them.

The MLP's kernel is written in Triton and needs a GPU: tests/gpu/test_training.py trains with it.
"""

import importlib

import pytest
import torch
from axolotl.monkeypatch.lora_kernels import apply_lora_kernel_patches, patch_self_attn_lora
from axolotl.utils.dict import DictDefault
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForSequenceClassification

from recipes.pairwise.training import kernels
from recipes.pairwise.training.kernels import LIGER, MODEL_TYPES, choose_lora_kernels, turn_on_liger
from tests.conftest import ROOT

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
CFG = {"adapter": "lora", "lora_target_modules": ALL}


@pytest.mark.parametrize(
    ("changes", "model_type", "expected"),
    [
        ({}, "gemma2", (True, True, True)),
        ({"lora_target_modules": ATTENTION}, "llama", (True, True, False)),
        ({"lora_o_kernel": False}, "qwen3", (True, False, True)),
        ({"adapter": None}, "gemma2", (False, False, False)),
        ({"deepspeed": str(ROOT / "recipes/deepspeed/zero3.json")}, "llama", (False, False, False)),
        ({"load_in_8bit": True}, "llama", (False, False, False)),
        ({}, "phi3", (False, False, False)),
    ],
)
def test_kernels_are_on_where_they_work(changes, model_type, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    cfg = CFG | changes
    choose_lora_kernels(cfg, model_type)
    assert (cfg["lora_qkv_kernel"], cfg["lora_o_kernel"], cfg["lora_mlp_kernel"]) == expected


def test_without_a_gpu_they_are_off_and_one_line_says_so(monkeypatch):
    lines = []
    monkeypatch.setattr(kernels.LOG, "info", lambda text, *words: lines.append(text % words))
    cfg = CFG | {"lora_qkv_kernel": True}
    choose_lora_kernels(cfg, "gemma2")
    assert cfg["lora_qkv_kernel"] is False
    assert lines == ["LoRA kernels: off, there is no GPU"]


def test_liger_is_on_where_it_is_named_and_not_turned_off(monkeypatch):
    cfg = {"plugins": [LIGER], "liger_rope": False}
    turn_on_liger(cfg)
    assert "liger_rms_norm" not in cfg
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    turn_on_liger(cfg)
    assert (cfg["liger_rms_norm"], cfg["liger_rope"], cfg["liger_glu_activation"]) == (True, False, True)


def run_backward(model):
    """Compute a batch's logits and the gradients of all that is trained, by name."""
    model.zero_grad()
    ids_bt = torch.randint(5, 1000, (2, 24), generator=torch.Generator().manual_seed(0))
    logits_bv = model(input_ids=ids_bt, attention_mask=torch.ones_like(ids_bt)).logits
    logits_bv.square().sum().backward()
    gradients = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    return logits_bv.detach(), gradients


@pytest.mark.parametrize("kind", MODEL_TYPES)
def test_a_classifier_has_the_same_gradients_with_them(kind, tiny_models, monkeypatch):
    # Axolotl rewrites the class: what it sets is undone afterwards.
    module = importlib.import_module(f"transformers.models.{kind}.modeling_{kind}")
    attention_class = getattr(module, f"{kind.capitalize()}Attention")
    monkeypatch.setattr(attention_class, "forward", attention_class.forward)
    monkeypatch.setattr(attention_class, "_original_forward", None, raising=False)
    del attention_class._original_forward

    base = str(tiny_models(kind))
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, pad_token_id=0)
    model = get_peft_model(model, LoraConfig(r=4, target_modules=ATTENTION, task_type="SEQ_CLS"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)  # with zeros, as they begin, A would have no gradient
    plain_logits, plain_gradients = run_backward(model)

    cfg = DictDefault({"base_model": base, "lora_qkv_kernel": True, "lora_o_kernel": True})
    patch_self_attn_lora(cfg)
    kernels.let_classifiers_pass()
    apply_lora_kernel_patches(model, cfg)
    attention = model.base_model.model.model.layers[0].self_attn
    assert attention.apply_qkv.__func__.__name__ == "apply_lora_qkv"

    logits, gradients = run_backward(model)
    torch.testing.assert_close(logits, plain_logits, rtol=1e-4, atol=1e-5)
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, plain_gradients[name], rtol=1e-3, atol=1e-5, msg=name)
