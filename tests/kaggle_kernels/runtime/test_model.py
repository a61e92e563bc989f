"""A model is loaded as its contract says, or not at all."""

from dataclasses import replace

import pytest
import torch

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.package import PackageError, read_package


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


def test_a_checkpoint_without_its_head_is_refused(spoilt, contract):
    from safetensors.torch import load_file, save_file

    weights = load_file(spoilt / "model.safetensors")
    del weights["score.weight"]
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PackageError, match="weights are missing: score.weight"):
        load_model(spoilt, contract, "cpu")
