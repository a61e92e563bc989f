"""What each T4 would hold, told before any work, and refused where it is too much."""

from dataclasses import replace
from pathlib import Path

import pytest

from postprocess.memory import t4_fit
from postprocess.memory.model_size import GIB, Served
from postprocess.memory.t4_fit import Use, describe_memory, describe_size, find_uses, place, refusal
from recipes.pairwise.memory.base_model import find_base_model
from tests.postprocess import runs

GEMMA = Served(find_base_model("google/gemma-2-9b-it"), "score", "nf4", softcap=False, budget_tokens=2048)


def test_the_specs_that_serve_a_run_are_found_with_their_batches():
    assert find_uses("qwen2_5_14b_cls") == [Use("qwen2_5_14b_cls", 3072, None, "split")]
    assert [use.spec for use in find_uses("gemma2_cls")] == ["gemma2_cls", "gemma2_llama3_own"]
    assert find_uses("served_by_nobody") == [Use(None, 8192, None, "auto")]


@pytest.mark.parametrize(
    ("spec", "use"),
    [
        ("packages: [{run: mine/mean, placement: split}]\nbudget_tokens: 1024\n", Use("a", 8192, 1024, "split")),
        ("packages: [\n", Use()),
        ("packages: [{run: mine}]\ntokens_per_batch: x\n", Use()),
    ],
)
def test_a_spec_serves_the_mean_of_folds_too_and_one_with_a_mistake_is_passed_over(spec, use, tmp_path):
    (tmp_path / "a.yml").write_text(spec)
    assert find_uses("mine", tmp_path) == [use]


def test_bytes_and_what_a_t4_holds_are_told_part_by_part():
    assert describe_size(GEMMA) == (
        "  in nf4: 6.52 GB: linear 4.16 GB, embedding 1.84 GB, norm 1.21 MB, head 14.34 kB, quantisation state 520.24 MB"
    )
    placement, needs = place(GEMMA, 8192, "auto")
    assert describe_memory(Use("mine"), GEMMA, placement, needs) == (
        "kernel mine, a copy on each T4, batches of 8,192 tokens: 9.9 GiB of 14.5: weights 6.07, activations 3.08, "
        "logits 0.00, CUDA 0.75"
    )
    causal = replace(GEMMA, head="label_tokens")
    assert "logits 0.18, CUDA" in describe_memory(Use(), causal, *place(causal, 8192, "auto"))


def test_a_refusal_says_what_would_fit():
    assert refusal("mine", replace(GEMMA, quantize="none"), 8192, "each", Path("recipes/mine.yml")) == (
        "mine needs 20.9 GiB on a GPU (17.2 of it weights), a T4 offers 14.5; what would fit: "
        "pairwise.package.quantize: int8 in recipes/mine.yml (13.8 GiB), or "
        "pairwise.package.quantize: gptq8 in recipes/mine.yml (13.6 GiB), or "
        "pairwise.package.quantize: nf4 in recipes/mine.yml (9.9 GiB), or "
        "pairwise.package.quantize: gptq4 in recipes/mine.yml (9.7 GiB)"
    )


def test_an_encoder_is_never_split():
    minilm = replace(GEMMA, base=find_base_model("sentence-transformers/all-MiniLM-L6-v2"), quantize="none")
    assert place(minilm, 10**6, "auto")[0] == "each"


def test_the_command_tells_it_first_and_only_when_there_is_work(packaged):
    run, printed = packaged("gemma2", quantize="nf4")
    lines = printed.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("  in nf4: "))
    assert lines[first + 1].startswith(
        "  no spec serves it; with a spec's defaults, a copy on each T4, batches of 8,192 tokens: 0.8 GiB"
    )
    assert first < next(number for number, line in enumerate(lines) if line.startswith("quantise"))
    assert "  in nf4" not in runs.succeed(run.recipe)


def test_what_no_t4_can_hold_is_refused_before_anything_is_written(copied, monkeypatch):
    run = copied("gemma2", quantize="nf4")
    for module in ("t4_fit", "model_size"):
        monkeypatch.setattr(f"postprocess.memory.{module}.GPU_BYTES", GIB // 2)
    assert runs.refuse(run.recipe).startswith(
        f"error: {run.recipe}: recipe needs 0.8 + 0.8 GiB on a GPU (0.0 of it weights), a T4 offers 0.5"
    )
    assert not {"quantised", "package", "merged"} & {path.name for path in run.folder.iterdir()}


def test_one_kernel_that_holds_it_is_enough(made, opened, monkeypatch, capsys):
    uses = [Use("too_much", 10**9), Use("enough", 256)]
    monkeypatch.setattr(t4_fit, "find_uses", lambda name: uses)
    t4_fit.check_target(opened(made("gemma2")))
    assert "kernel too_much" in capsys.readouterr().out
