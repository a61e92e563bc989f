"""`pairwise new`: the plan for a base model, and the two files that it writes."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from kaggle_kernels.build import training_plan
from kaggle_kernels.build.memory_fit import fit_packages
from kaggle_kernels.build.new_recipe import choose_pad_token, list_linear_names
from kaggle_kernels.build.spec import read_spec
from preprocess.core.errors import UserError
from preprocess.model_input import Template
from recipes.pairwise.config.model_checks import build_empty_model, read_config
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.memory.base_model import find_base_model


@pytest.mark.parametrize(
    ("name", "deepspeed", "pairs", "serving"),
    [
        ("sentence-transformers/all-MiniLM-L6-v2", None, 8, ("none", "each")),
        ("google/gemma-2-9b-it", "zero2", 2, ("nf4", "each")),
        ("microsoft/phi-4", "zero2", 1, ("int8", "split")),
        ("Qwen/Qwen3-32B", "zero2", 1, None),
        ("meta-llama/Meta-Llama-3-70B-Instruct", "zero3", 1, None),
    ],
)
def test_the_plan_follows_the_models_size(name, deepspeed, pairs, serving):
    base = find_base_model(name)
    plan = training_plan.plan_training(base, ["q_proj"], "score")
    assert (plan.deepspeed, plan.micro_batch_size) == (deepspeed, pairs)
    assert bool(plan.lora_targets) == (deepspeed is not None)
    assert plan.budget_tokens <= (base.positions or 2048)
    served = training_plan.plan_serving(base, "score", plan.budget_tokens)
    assert (served and (served.quantize, served.placement)) == serving


@pytest.mark.parametrize(("kind", "head"), [("phi3", "score"), ("bert", "reward"), ("qwen3", "label_tokens")])
def test_what_it_writes_passes_the_checks(kind, head, tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["new", "tiny_one", "--base", str(tiny_models(kind)), "--head", head]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert done.output.splitlines()[-1].startswith('template: "')
    assert read_recipe("recipes/tiny_one.yml").pairwise.head == head
    spec = Path("kaggle_kernels/specs/tiny_one.yml")
    assert [fit.placement for fit in fit_packages(spec, read_spec(spec))] == ["each"]

    again = CliRunner().invoke(main, command)
    assert again.exit_code == 2
    assert "recipes/tiny_one.yml: exists already; remove it, or take another name" in again.output


def test_a_large_model_gets_lora_on_its_own_layers(tiny_models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training_plan, "SMALL_PARAMETERS", 1)
    done = CliRunner().invoke(main, ["new", "large", "--base", str(tiny_models("phi3"))])
    assert done.exit_code == 0, done.output
    keys = read_recipe("recipes/large.yml").axolotl
    assert keys["lora_target_modules"] == ["o_proj", "qkv_proj", "gate_up_proj", "down_proj"]
    assert keys["deepspeed"] == "recipes/deepspeed/zero2.json"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["Some-Name", "--base", "x/y"], "Some-Name: expected lower-case letters and digits"),
        (["some_name", "--base", "./absent"], "base_model: ./absent is neither a model's folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["new", *arguments])
    assert done.exit_code == 2
    assert message in done.output
    assert list(tmp_path.rglob("*.yml")) == []


def test_the_linear_layers_of_a_model_are_found_once_each(tiny_models):
    model = build_empty_model(read_config(str(tiny_models("modernbert")), None), "score")
    assert list_linear_names(model) == ["Wqkv", "Wo", "Wi"]


@pytest.mark.parametrize(
    ("own", "others", "row_end", "expected"),
    [
        ("<pad>", [], "<eos>", None),
        ("<eos>", ["<eos>", "<right_pad_id>"], "<eos>", "<right_pad_id>"),
        (None, ["<s>", "<reserved_0>"], "</s>", "<reserved_0>"),
    ],
)
def test_no_row_ends_with_the_pad_token(own, others, row_end, expected):
    tokens = {number: SimpleNamespace(content=content) for number, content in enumerate(others)}
    tokenizer = SimpleNamespace(pad_token=own, added_tokens_decoder=tokens, name_or_path="m")
    assert choose_pad_token(tokenizer, Template("", "{prompt}", row_end)) == expected


def test_a_tokenizer_without_a_token_to_spare_is_refused():
    tokenizer = SimpleNamespace(pad_token=None, added_tokens_decoder={}, name_or_path="m")
    with pytest.raises(UserError, match="m has no pad token and no reserved token"):
        choose_pad_token(tokenizer, Template("", "{prompt}", "end"))
