"""The configuration of a run: which commands are refused, and what every recipe gets whatever it says."""

from contextlib import nullcontext

import pytest

from preprocess.core.errors import UserError
from recipes.pairwise.config.earlier_runs import HeadStart
from recipes.pairwise.config.model_checks import build_empty_model, read_config
from recipes.pairwise.config.run_config import (
    check_base_model,
    check_run,
    refuse_other_commands,
    set_accumulation_steps,
    set_fixed_keys,
    set_model_keys,
)
from tests.conftest import ROOT
from tests.recipes.blocks import block_of

DEMO = ROOT / "recipes/demo.yml"


@pytest.mark.parametrize("command", ["merge-lora", "quantize", "evaluate", "inference", "lm-eval"])
def test_commands_that_lose_or_misuse_the_head_are_refused_however_they_are_started(command):
    for command_line in (["/bin/axolotl", command, "r.yml"], [f"axolotl/cli/{command.replace('-', '_')}.py", "r.yml"]):
        with pytest.raises(UserError, match=f"axolotl {command}: refused, "):
            refuse_other_commands(command_line)
    for command_line in (["/bin/axolotl", "train", "r.yml"], ["axolotl/cli/train.py", "r.yml"], ["/bin/axolotl"]):
        refuse_other_commands(command_line)


def test_what_the_command_line_overrides_is_checked_with_the_file():
    cfg = {"pairwise": {"template": "gemma", "budget_tokens": 256, "package": {"slug": "pairwise-demo"}}}
    assert check_run(cfg, DEMO).budget_tokens == 256
    with pytest.raises(UserError, match="demo.yml: sample_packing: refused, "):
        check_run(cfg | {"sample_packing": True}, DEMO)


@pytest.mark.parametrize(
    ("block", "cfg", "expected"),
    [
        ({}, {}, {"model_type": "AutoModelForSequenceClassification", "num_labels": 2}),
        ({"head": "reward"}, {"output_dir": "elsewhere"}, {"num_labels": 1, "output_dir": "elsewhere"}),
        ({"head": "label_tokens"}, {}, {"model_type": "AutoModelForCausalLM", "output_dir": "outputs/demo"}),
        ({}, {"gradient_checkpointing": True}, {"gradient_checkpointing_kwargs": {"use_reentrant": False}}),
        ({}, {"sequence_len": 9}, {"sequence_len": 256}),
    ],
)
def test_keys_that_follow_from_the_block_are_set(block, cfg, expected):
    set_fixed_keys(cfg, block_of(**block), DEMO, checkpointing={"use_reentrant": False})
    assert {key: cfg[key] for key in expected} == expected


@pytest.mark.parametrize(
    ("kind", "softcap", "cfg", "expected"),
    [
        ("gemma2", False, {"adapter": "lora"}, {"attn_implementation": "sdpa"}),
        ("gemma2", True, {}, {"attn_implementation": "eager"}),
        ("gemma2", True, {"attn_implementation": "flash_attention_2"}, {"attn_implementation": "flash_attention_2"}),
        ("deberta-v2", False, {}, {"attn_implementation": "eager"}),
        ("deberta-v2", False, {"adapter": "lora"}, {"attn_implementation": "eager", "lora_modules_to_save": ["pooler"]}),
        ("modernbert", False, {"adapter": "lora"}, {"attn_implementation": "sdpa", "lora_modules_to_save": ["head"]}),
    ],
)
def test_keys_that_follow_from_the_base_model_are_set(kind, softcap, cfg, expected, tiny_models):
    model = build_empty_model(read_config(str(tiny_models(kind)), None), "score")
    set_model_keys(cfg, block_of(softcap=softcap), model, HeadStart(None, "the base model has none"))
    assert cfg == cfg | expected and ("lora_modules_to_save" in cfg) == ("lora_modules_to_save" in expected)


def test_training_what_kaggle_cannot_serve_is_warned_of(tiny_models, capsys):
    check_base_model({"base_model": str(tiny_models("olmo2"))}, block_of())
    warning = "warning: base_model: Kaggle's transformers 5.0.0 has no classifier for olmo2; it cannot be packaged\n"
    assert capsys.readouterr().err.endswith(warning)


@pytest.mark.parametrize(
    ("processes", "cfg", "steps"),
    [
        ("1", {}, 32),
        ("8", {"gradient_accumulation_steps": 4}, 4),
        ("1", {"use_ray": True, "ray_num_workers": 4}, 8),
        ("6", {}, "pairwise.pairs_per_step: 64 is no multiple of 12 "),
        ("8", {"gradient_accumulation_steps": 8}, "gradient_accumulation_steps: 8, but pairwise.pairs_per_step makes it 4"),
    ],
)
def test_accumulation_follows_from_the_pairs_of_a_step(processes, cfg, steps, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", processes)
    cfg = cfg | {"micro_batch_size": 2}
    with pytest.raises(UserError, match=steps) if isinstance(steps, str) else nullcontext():
        set_accumulation_steps(cfg, block_of(pairs_per_step=64))
        assert cfg["gradient_accumulation_steps"] == steps
