import copy
import json

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file

from kaggle_kernels.runtime.models.model import CLASSES, load_model
from postprocess.weights.bnb_quantize import quantise_nf4, quantization_config
from postprocess.weights.merge import Form, merge
from postprocess.weights.meta_model import head_modules


@pytest.mark.parametrize(
    ("kind", "head", "own_head"),
    [("gemma2", "score", "score"), ("bert", "score", "classifier"), ("llama", "label_tokens", "lm_head")],
)
def test_the_head_is_what_stands_beside_the_base_model(kind, head, own_head, tiny_models):
    assert head_modules(tiny_models(kind), head) == [own_head]


def test_int8_does_not_depend_on_what_else_is_in_the_batch(packaged):
    run, _ = packaged("gemma2", quantize="int8")
    package = run.folder / "package"
    assert json.loads((package / "config.json").read_text())["quantization_config"]["llm_int8_threshold"] == 0.0
    model = load_model(package, run.contract(), "cpu")
    ids = torch.tensor([[2, 17, 200, 33, 4, 900], [2, 5, 6, 44, 71, 9]])
    with torch.inference_mode():
        alone, together = model(input_ids=ids[:1]).logits, model(input_ids=ids).logits[:1]
    assert (alone - together).abs().max() < 1e-4


def every_finite_float16():
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.float16)
    return numbers[numbers.isfinite()]


def numbers_on_the_bounds():
    """A block whose scale is 2: twice the bounds between two levels, and their neighbours in float32."""
    levels = bnb.get_4bit_type("nf4", device="cpu")
    bounds = (levels[:-1] + levels[1:]) / 2
    around = [torch.nextafter(bounds, torch.tensor(end)) for end in (-2.0, 2.0)]
    return 2 * torch.cat([bounds, *around, torch.ones(64 - 3 * len(bounds))])


@pytest.mark.parametrize(
    "numbers",
    [
        every_finite_float16(),
        every_finite_float16()[torch.randperm(63488, generator=torch.Generator().manual_seed(0))],
        numbers_on_the_bounds(),
        torch.zeros(3, 64).half(),
        torch.randn(5, 77, generator=torch.Generator().manual_seed(0)).half(),
    ],
    ids=["all, in order", "all, shuffled", "bounds", "zeros", "a last block of fewer numbers"],
)
def test_nf4_has_the_bytes_of_bitsandbytes(numbers):
    before = numbers.clone()
    values, scales = quantise_nf4(numbers)
    expected_values, state = bnb.quantize_4bit(numbers, blocksize=64, quant_type="nf4")
    assert values.dtype == expected_values.dtype
    assert torch.equal(values, expected_values)
    assert torch.equal(scales, state.absmax)
    assert torch.equal(numbers, before)


TWO_STEPS = [
    ("gemma2", {}, "score", "nf4"),
    ("qwen2", {}, "score", "double"),
    ("bert", {}, "score", "int8"),
    ("gemma2", {}, "label_tokens", "int8"),
    ("gemma2", {}, "reward", "nf4"),
    ("llama", {"use_dora": True}, "score", "nf4"),
]


@pytest.mark.parametrize(("kind", "lora", "head", "quantize"), TWO_STEPS)
def test_one_pass_gives_the_bytes_of_merging_with_peft_saving_and_quantising(
    kind, lora, head, quantize, made, opened, tmp_path, monkeypatch
):
    run = made(kind, lora=lora, head=head)
    settings = quantization_config(quantize.replace("double", "nf4"), head_modules(run.base, head), quantize == "double")
    monkeypatch.setattr("postprocess.weights.merge.PIECE_NUMBERS", 64 * 100)  # pieces of fewer rows than a layer has
    merge(opened(run), tmp_path / "ours", Form(settings))

    merged = copy.deepcopy(run.model).merge_and_unload().half()
    merged.config.dtype = torch.float16
    merged.save_pretrained(tmp_path / "merged")
    options = {"quantization_config": settings, "dtype": torch.float16, "device_map": {"": "cpu"}}
    CLASSES[head].from_pretrained(tmp_path / "merged", **options).save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert ours.keys() == theirs.keys()
    assert [
        name for name in theirs if ours[name].dtype != theirs[name].dtype or not torch.equal(ours[name], theirs[name])
    ] == []
    ours, theirs = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("ours", "theirs"))
    for key in ("quantization_config", "architectures", "dtype"):
        assert ours[key] == theirs[key]
