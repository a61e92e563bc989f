"""`pairwise check` prints what a recipe takes on the GPUs that it is for, and refuses what cannot fit."""

import re

import pytest
from click.testing import CliRunner

from recipes.pairwise.__main__ import main
from recipes.pairwise.config.recipe_files import read_deepspeed
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.memory.hardware import find_least_hardware
from tests import tiny
from tests.conftest import ROOT

GEMMA = ROOT / "recipes/gemma2_cls.yml"
HEADER = re.compile(r"# Hardware: .*at least (\d+) GPUs? of (\d+) GB")


def check(*arguments):
    """Run the command; its exit code and what it printed."""
    ended = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return ended.exit_code, ended.output


def changed_gemma(folder, block=None, **keys):
    """Write gemma2_cls with other keys; None removes one."""
    return tiny.change(GEMMA, block, folder / "changed.yml", **keys)


def test_the_arithmetic_of_a_recipe_is_one_line(monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed = check(GEMMA)
    assert code == 0
    assert printed.splitlines()[1] == (
        "  8 GPUs of 80 GiB: each holds weights 17.6 + gradients 0.1 + optimizer 0.3 + activations 5.2 = 23.2 GiB, "
        "and can use 72.0; the least is 1 GPU of 40 GiB"
    )


def test_checkpointing_that_memory_does_not_ask_for_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed = check(changed_gemma(tmp_path, {"hardware": {"gpus": 8, "gib": 141}}))
    assert code == 0
    assert "; gradient_checkpointing: false fits too (" in printed
    assert "fits too" not in check(changed_gemma(tmp_path, {"hardware": {"gpus": 8, "gib": 96}}))[1]
    no_checkpointing = changed_gemma(tmp_path, {"hardware": {"gpus": 8, "gib": 141}}, gradient_checkpointing=None)
    assert "fits too" not in check(no_checkpointing)[1]


@pytest.mark.parametrize(
    ("block", "keys", "expected"),
    [
        ({}, {"gradient_checkpointing": None}, "pairwise.hardware: 8 GPUs of 80 GiB: each holds weights 17.6 + gradients 0.1"),
        ({}, {"base_model": "some/model"}, "recipes/pairwise/memory/base_models.yml: no entry some/model"),
        (
            {"hardware": {"gpus": 1, "gib": 24}},
            {},
            "optimizer 2.4 + activations 5.2 = 25.7 GiB, and can use 21.6; the least is 1",
        ),
        ({"hardware": {"gpus": 3, "gib": 80}}, {}, "pairwise.pairs_per_step: 64 is no multiple of 6 (micro_batch_size 2 on 3"),
        ({}, {"lora_modules_to_save": ["embed_tokens"]}, "with lora_modules_to_save the memory is not computed"),
    ],
)
def test_what_cannot_fit_or_be_computed_is_refused(block, keys, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, printed = check(changed_gemma(tmp_path, block, **keys))
    assert code == 2
    assert expected in printed


def test_a_recipe_without_hardware_needs_no_sizes(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = changed_gemma(tmp_path, {"hardware": None}, base_model="some/model")
    assert check(recipe) == (0, f"{recipe}: ok, some/model, writes outputs/changed\n")


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yml")), ids=lambda path: path.stem)
def test_a_header_names_the_least_hardware(path, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = read_recipe(path)
    match = HEADER.search(path.read_text())
    assert bool(match) is (recipe.pairwise.hardware is not None)
    if match:
        least = find_least_hardware(recipe, read_deepspeed(recipe.axolotl.get("deepspeed")))
        assert (least.gpus, least.gib) == (int(match[1]), int(match[2]))
