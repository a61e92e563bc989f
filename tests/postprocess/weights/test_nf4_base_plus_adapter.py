"""QLoRA: the model as it was trained, and packages of base and adapter apart."""

import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import ORDERS, score
from kaggle_kernels.runtime.package import read_package, read_tokenizer
from postprocess.__main__ import main
from postprocess.agreement.gate import compare, recorded_column
from postprocess.agreement.reference_model import load_trained
from postprocess.agreement.validation_rows import validation_rows
from postprocess.weights.nf4_base_plus_adapter import lora_config, unmerged
from preprocess.core.errors import UserError
from tests.postprocess.agreement.test_gate import LABELS, WINNERS, column

QLORA = {"qlora": True, "quantize": "nf4"}


def difference_from_recorded(run, model):
    rows, pairs = validation_rows(run)
    found = score(model, run.model_input, read_tokenizer(run.folder), run.contract, pairs)
    values = np.array([[found[pair.id][order] for order in ORDERS] for pair in pairs])
    return np.abs(values - recorded_column(run, rows).probabilities_rov).max()


def test_the_base_is_loaded_in_the_four_bits_that_it_was_trained_in(copied, opened):
    run = copied(**QLORA)
    assert difference_from_recorded(opened(run), load_trained(opened(run), "cpu")) < 1e-6
    run.recipe.write_text(
        run.recipe.read_text().replace("adapter: qlora\n", "adapter: lora\n").replace("load_in_4bit: true\n", "")
    )
    (run.folder / "config.json").write_text("{}")
    assert difference_from_recorded(opened(run), load_trained(opened(run), "cpu")) > 1e-2


def test_an_adapter_of_a_training_in_16_bits_is_not_taken_for_qlora(copied, opened):
    run = copied(**QLORA)
    (run.folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"config.json: records no quantization_config, though recipe.yml says load_in_4bit"):
        load_trained(opened(run), "cpu")


def test_four_bits_of_another_kind_are_refused(copied, opened, tmp_path):
    run = copied(**QLORA)
    config = run.folder / "config.json"
    config.write_text(config.read_text().replace('"nf4"', '"fp4"'))
    with pytest.raises(UserError, match="the base was not trained in nf4"):
        unmerged(opened(run), tmp_path / "unmerged")
    assert not (tmp_path / "unmerged").exists()


def test_base_and_adapter_stay_apart_in_the_package(packaged):
    run, printed = packaged("gemma2", adapter="unmerged", **QLORA)
    folder = run.folder / "package"
    stages = [line.split()[0] for line in printed.splitlines() if " s   /" in line]
    assert stages == ["unmerged", "agreement", "package"]
    names = {path.name for path in folder.iterdir()}
    assert {"lora.safetensors", "lora_config.json", "model.safetensors"} <= names
    assert not any(name.startswith("adapter_") for name in names)
    adapter = load_file(folder / "lora.safetensors")
    trained = load_file(run.folder / "adapter_model.safetensors")
    assert {name: tensor.half() for name, tensor in trained.items()}.keys() == adapter.keys()
    assert all(torch.equal(adapter[name], trained[name].half()) for name in trained)
    settings = json.loads((folder / "lora_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 16)
    assert None not in settings.values() and "base_model_name_or_path" not in settings
    quantised = json.loads((folder / "config.json").read_text())["quantization_config"]
    assert (quantised["bnb_4bit_use_double_quant"], quantised["bnb_4bit_compute_dtype"]) == (True, "float16")
    assert quantised["llm_int8_skip_modules"] == ["score"]
    head = load_file(folder / "model.safetensors")["score.weight"]
    assert torch.equal(head, trained["base_model.model.score.weight"].half())
    assert read_package(folder).manifest["adapter"] == "unmerged"


def test_the_unmerged_package_computes_what_was_trained(packaged, opened):
    run, _ = packaged("gemma2", adapter="unmerged", **QLORA)
    model = load_model(run.folder / "package", run.contract(), "cpu")
    assert difference_from_recorded(opened(run), model) < 1e-2
    report = json.loads((run.folder / "agreement.json").read_text())
    assert [line["model"] for line in report["models"]] == ["recorded", "trained", "unmerged"]
    assert report["packaged"] == "unmerged"
    assert report["models"][1]["against_recorded"]["largest"] < 1e-6


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
    assert report["candidates"] == {"quantised": means["quantised"], "unmerged": means["unmerged"]}
    assert means["unmerged"] < means["quantised"] / 5
    assert (report["packaged"], report["mean_difference"]) == ("unmerged", pytest.approx(means["unmerged"], abs=1e-6))
    assert f"packaged: unmerged, {means['unmerged']:.5f} from the model as trained on average" in printed
    assert (run.folder / "package" / "lora.safetensors").exists()
    again = CliRunner().invoke(main, [str(run.recipe)])
    assert [line[:21] for line in again.stdout.splitlines()] == [
        f"{stage:<10} up to date" for stage in ("quantise", "unmerged", "agreement", "package")
    ]


def candidates(quantised, unmerged, merged=(0.9, 0.4)):
    trained = (0.9, 0.4)
    models = {"recorded": trained, "trained": trained, "merged": merged, "quantised": quantised, "unmerged": unmerged}
    return [column(name, *rows) for name, rows in models.items()]


def test_the_candidate_with_the_smaller_mean_difference_is_chosen():
    report = compare(candidates((0.8, 0.4), (0.9, 0.38)), LABELS, WINNERS, tolerance=0.05)
    assert (report["packaged"], report["agrees"]) == ("unmerged", True)
    assert report["candidates"] == {"quantised": pytest.approx(0.05), "unmerged": pytest.approx(0.01)}
    assert compare(candidates((0.9, 0.38), (0.8, 0.4)), LABELS, WINNERS, tolerance=0.05)["packaged"] == "quantised"


def test_a_merged_model_that_is_not_packaged_need_not_agree():
    far_off = (0.1, 0.4)
    assert compare(candidates((0.5, 0.4), (0.9, 0.39), merged=far_off), LABELS, WINNERS, tolerance=0.05)["agrees"]
    assert not compare(candidates((0.9, 0.4), (0.5, 0.39), merged=far_off), LABELS, WINNERS, tolerance=0.05)["agrees"]


def test_keys_without_a_value_and_paths_of_the_training_are_dropped():
    settings = {"r": 8, "new_key": None, "use_dora": False, "base_model_name_or_path": "outputs/base", "peft_version": "0.20.0"}
    assert lora_config(settings) == {"r": 8, "use_dora": False}
