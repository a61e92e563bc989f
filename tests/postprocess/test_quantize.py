import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from kaggle_kernels.runtime.model import load_model
from postprocess.quantize import quantization_config
from postprocess.skeleton import head_modules


@pytest.mark.parametrize(("kind", "head"), [("gemma2", "score"), ("bert", "classifier")])
def test_the_head_is_named_by_the_architecture(kind, head, packaged):
    run, _ = packaged(kind, quantize="nf4")
    assert head_modules(run.folder / "merged", "score") == [head]


@pytest.mark.parametrize(("kind", "head"), [("gemma2", "score.weight"), ("bert", "classifier.weight")])
@pytest.mark.parametrize(("quantize", "stored"), [("nf4", torch.uint8), ("int8", torch.int8)])
def test_the_layers_are_quantised_and_the_head_is_not(kind, head, quantize, stored, packaged):
    run, _ = packaged(kind, quantize=quantize)
    tensors = load_file(run.folder / "package" / "model.safetensors")
    layers = "model.layers.0.mlp.up_proj.weight" if kind == "gemma2" else "bert.encoder.layer.0.output.dense.weight"
    assert tensors[layers].dtype == stored
    assert torch.equal(tensors[head], load_file(run.folder / "merged" / "model.safetensors")[head])
    assert tensors[head].dtype == torch.float16


def test_nf4_is_made_for_a_gpu_without_bfloat16(packaged):
    run, _ = packaged("gemma2", quantize="nf4")
    settings = json.loads((run.folder / "package" / "config.json").read_text())["quantization_config"]
    assert (settings["bnb_4bit_quant_type"], settings["bnb_4bit_compute_dtype"]) == ("nf4", "float16")
    assert settings["llm_int8_skip_modules"] == ["score"]
    states = [value for name, value in load_file(run.folder / "package" / "model.safetensors").items() if "quant_state" in name]
    assert len(states) == 14
    assert {json.loads(bytes(state.tolist()))["dtype"] for state in states} == {"float16"}


def test_int8_does_not_depend_on_what_else_is_in_the_batch(packaged):
    run, _ = packaged("gemma2", quantize="int8")
    package = run.folder / "package"
    assert json.loads((package / "config.json").read_text())["quantization_config"]["llm_int8_threshold"] == 0.0
    model = load_model(package, run.contract(), "cpu")
    ids = torch.tensor([[2, 17, 200, 33, 4, 900], [2, 5, 6, 44, 71, 9]])
    with torch.inference_mode():
        alone, together = model(input_ids=ids[:1]).logits, model(input_ids=ids).logits[:1]
    assert (alone - together).abs().max() < 1e-4


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_the_reloaded_model_is_the_one_that_was_quantised(quantize, packaged):
    run, _ = packaged("gemma2", quantize=quantize)
    settings = quantization_config(quantize, ["score"])
    quantised = AutoModelForSequenceClassification.from_pretrained(
        run.folder / "merged",
        quantization_config=settings,
        dtype=torch.float16,
        device_map={"": "cpu"},
        attn_implementation="sdpa",
    ).eval()
    reloaded = load_model(run.folder / "package", run.contract(), "cpu", torch.float16)
    ids = torch.tensor([[2, 17, 200, 33, 4, 900]])
    with torch.inference_mode():
        assert torch.equal(reloaded(input_ids=ids).logits, quantised(input_ids=ids).logits)
