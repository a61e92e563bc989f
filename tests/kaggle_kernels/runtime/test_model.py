"""A model is loaded as its contract says, or not at all."""

from dataclasses import replace

import pytest
import torch

from kaggle_kernels.runtime.models.model import load_model, serving_config
from kaggle_kernels.runtime.package import PackageError, read_package
from tests.kaggle_kernels.packages import change_json


@pytest.fixture(scope="module")
def contract(package_folder):
    return read_package(package_folder).contract


def test_a_model_is_loaded_as_its_contract_says(package_folder, contract):
    model = load_model(package_folder, replace(contract, pad_token_id=7), "cpu")
    assert (model.dtype, model.training) == (torch.float32, False)
    assert model(torch.tensor([[2, 5, 6]])).past_key_values is None, "keys are kept for a generation that never comes"
    assert (model.config._attn_implementation, model.config.attn_logit_softcapping) == ("sdpa_repeated", None)
    assert model.config.pad_token_id == 7


def test_with_soft_cap_the_model_runs_eager_attention_and_keeps_the_value(package_folder, contract):
    model = load_model(package_folder, replace(contract, softcap=True), "cpu")
    assert (model.config._attn_implementation, model.config.attn_logit_softcapping) == ("eager", 50.0)


def test_a_soft_cap_that_the_config_lost_is_refused(spoilt, contract):
    change_json(spoilt / "config.json", attn_logit_softcapping=None)
    with pytest.raises(PackageError, match="has no attn_logit_softcapping"):
        serving_config(spoilt, replace(contract, softcap=True))


def test_a_checkpoint_without_its_head_is_refused(spoilt, contract):
    from safetensors.torch import load_file, save_file

    weights = load_file(spoilt / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackageError, match="weights are missing: score.weight"):
        load_model(spoilt, contract, "cpu")


def test_a_label_count_that_is_not_the_contracts_is_refused(package_folder, contract):
    with pytest.raises(PackageError, match="config.json has 2 labels, contract.json 3"):
        load_model(package_folder, replace(contract, num_labels=3), "cpu")


def test_a_head_that_this_runtime_cannot_score_is_refused(package_folder, contract):
    with pytest.raises(PackageError, match="its head is 'regression'"):
        load_model(package_folder, replace(contract, head="regression"), "cpu")


def test_a_package_that_computes_in_bfloat16_is_refused_on_a_gpu(spoilt, contract):
    quantised = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_compute_dtype": "bfloat16"}
    change_json(spoilt / "config.json", quantization_config=quantised)
    with pytest.raises(PackageError, match="computes in bfloat16, which a T4 lacks"):
        load_model(spoilt, contract, "cuda:0")
