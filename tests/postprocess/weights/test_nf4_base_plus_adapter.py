"""QLoRA: the model as it was trained, and packages of base and adapter apart."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import ORDERS, score
from kaggle_kernels.runtime.package import read_package, read_tokenizer
from postprocess.agreement.model_scores import read_recorded_column
from postprocess.agreement.reference_model import load_trained
from postprocess.agreement.validation_rows import validation_rows
from postprocess.weights.nf4_base_plus_adapter import lora_config, unmerged
from preprocess.core.errors import UserError
from tests.postprocess import runs

QLORA = {"qlora": True, "quantize": "nf4"}


def difference_from_recorded(run, model):
    """The largest difference of the model's probabilities from those that training wrote down."""
    rows, pairs = validation_rows(run)
    found = score(model, run.model_input, read_tokenizer(run.folder), run.contract, pairs)
    values = np.array([[found[pair.id][order] for order in ORDERS] for pair in pairs])
    return np.abs(values - read_recorded_column(run, rows).probabilities_rov).max()


def test_the_base_is_loaded_in_the_four_bits_that_it_was_trained_in(copied, opened):
    run = copied(**QLORA)
    assert difference_from_recorded(opened(run), load_trained(opened(run))) < 1e-6
    run.recipe.write_text(
        run.recipe.read_text().replace("adapter: qlora\n", "adapter: lora\n").replace("load_in_4bit: true\n", "")
    )
    (run.folder / "config.json").write_text("{}")
    assert difference_from_recorded(opened(run), load_trained(opened(run))) > 1e-2


def test_an_adapter_of_a_training_in_16_bits_is_not_taken_for_qlora(copied, opened):
    run = copied(**QLORA)
    (run.folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: records no quantization_config, though recipe.yml says load_in_4bit"):
        load_trained(opened(run))


def test_four_bits_of_another_kind_are_refused(copied, opened, tmp_path):
    run = copied(**QLORA)
    config = run.folder / "config.json"
    config.write_text(config.read_text().replace('"nf4"', '"fp4"'))
    with pytest.raises(UserError, match="the base was quantised in training, but not to nf4"):
        unmerged(opened(run), tmp_path / "unmerged")
    assert not (tmp_path / "unmerged").exists()


def test_base_and_adapter_stay_apart_in_the_package_which_computes_what_was_trained(packaged, opened):
    run, printed = packaged("gemma2", adapter="unmerged", **QLORA)
    folder = run.folder / "package"
    assert runs.made_stages(printed) == ["unmerged", "scores", "agreement", "package"]
    adapter, trained = load_file(folder / "lora.safetensors"), load_file(run.folder / "adapter_model.safetensors")
    assert adapter.keys() == trained.keys()
    assert all(torch.equal(adapter[name], trained[name].half()) for name in trained)
    head = load_file(folder / "model.safetensors")["score.weight"]
    assert torch.equal(head, trained["base_model.model.score.weight"].half())
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (settings["bnb_4bit_use_double_quant"], settings["bnb_4bit_compute_dtype"]) == (True, "float16")
    package = read_package(folder)
    assert package.manifest["adapter"] == "unmerged"
    assert difference_from_recorded(opened(run), load_model(folder, package.contract, "cpu")) < 1e-2


def test_a_causal_base_is_quantised_where_it_was_in_training_lm_head_or_not(packaged, opened):
    run, _ = packaged("llama", head="label_tokens", adapter="unmerged", **QLORA)
    assert load_file(run.folder / "package" / "model.safetensors")["lm_head.weight"].dtype == torch.uint8
    model = load_model(run.folder / "package", run.contract(), "cpu")
    assert difference_from_recorded(opened(run), model) < 1e-2


def test_the_better_of_both_is_packaged_and_said_to_be(packaged):
    run, printed = packaged("gemma2", adapter="best", **QLORA)
    report = json.loads((run.folder / "agreement.json").read_text())
    means = {line["model"]: line["against_trained"]["mean"] for line in report["models"]}
    assert list(means) == ["recorded", "trained", "merged", "quantised", "unmerged"]
    assert means["unmerged"] < means["quantised"] / 5
    assert f"packaged: unmerged, {means['unmerged']:.5f} from the model as trained on average" in printed
    assert (run.folder / "package" / "lora.safetensors").exists()
    stages = runs.current_stages(runs.succeed(run.recipe))
    assert stages == ["quantise", "unmerged", "agreement", "package"]


def test_keys_without_a_value_and_paths_of_the_training_are_dropped():
    settings = {"r": 8, "new_key": None, "use_dora": False, "base_model_name_or_path": "outputs/base", "peft_version": "0.20.0"}
    assert lora_config(settings) == {"r": 8, "use_dora": False}
