"""Base models are measured without weights, and base_models.yml holds what was measured."""

import json
import subprocess

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from preprocess.core.errors import UserError
from recipes.pairwise.config.served_models import NOT_ON_KAGGLE
from recipes.pairwise.memory import base_model
from recipes.pairwise.memory.__main__ import main
from recipes.pairwise.memory.base_model import (
    Weight,
    find_base_model,
    make_record,
    pack_weights,
    parse_record,
    read_records,
    unpack_weights,
)
from recipes.pairwise.memory.measure import PeakBytes, measure, measure_folder
from tests.conftest import ROOT

PARAMETERS = {
    "google/gemma-2-9b-it": 9_241_705_984,
    "meta-llama/Meta-Llama-3-8B-Instruct": 8_030_261_248,
    "Qwen/Qwen2.5-14B-Instruct": 14_770_033_664,
    "sentence-transformers/all-MiniLM-L6-v2": 22_713_216,
    "outputs/demo/input/gemma2": 139_840,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_the_file_holds_what_is_measured_and_every_parameter(name):
    record = read_records()[name]
    known = find_base_model(name)
    assert make_record(record["config"], measure(AutoConfig.for_model(**record["config"]))) == record
    elements = [weight.elements for weight in (*known.weights, *known.heads.get("label_tokens", ()))]
    assert sum(elements) == PARAMETERS[name]


def test_a_folder_is_measured_when_it_is_asked_for(tiny_models):
    llama = find_base_model(str(tiny_models("llama")))
    assert sum(weight.elements for weight in (*llama.weights, *llama.heads["label_tokens"])) == (
        AutoModelForCausalLM.from_pretrained(tiny_models("llama")).num_parameters()
    )


def test_layers_of_one_shape_share_a_row_and_others_have_their_own():
    embedding = Weight("embed.weight", "embedding", (8, 4))
    norms = [Weight(f"layers.{number}.norm.weight", "norm", (4,)) for number in (1, 2, 3)]
    routers = [Weight(f"layers.{number}.router.weight", "linear", (2, 4)) for number in (0, 2)]
    weights = (embedding, *norms, *routers)
    rows = pack_weights(weights)
    assert rows == ["embed.weight/embedding/8x4", "layers.1-3.norm.weight/norm/4", "layers.0,2.router.weight/linear/2x4"]
    assert unpack_weights(rows) == weights


def test_the_command_adds_a_base_model(tiny_models, tmp_path, monkeypatch):
    monkeypatch.setattr(base_model, "BASE_MODELS", tmp_path / "base_models.yml")
    base_model.BASE_MODELS.write_text("{}")
    read_records.cache_clear()
    name = str(tiny_models("deberta-v2"))
    result = CliRunner().invoke(main, [name])
    assert (result.exit_code, result.output) == (0, f"{name}: measured\n")
    assert parse_record(read_records()[name]).batches == measure_folder(tiny_models("deberta-v2")).batches
    read_records.cache_clear()


def test_peak_bytes_are_those_alive_at_one_time():
    weight = torch.ones(1000)
    peak = PeakBytes([weight])
    with peak:
        first = weight + 1
        del first
        second = weight * 2
        third = second * 2
    assert peak.highest == second.nbytes + third.nbytes


def test_a_model_without_a_classifier_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba"}))
    with pytest.raises(UserError, match="transformers has no model of the type mamba with the head score"):
        measure_folder(tmp_path)


def test_what_kaggles_transformers_lacks_is_what_the_two_versions_differ_in():
    code = (
        "from transformers.models.auto import modeling_auto as m; print(*m.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES, "
        "'/', *m.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)"
    )
    command = [ROOT / ".venv-kaggle/bin/python", "-c", code]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    kaggle_classifiers, kaggle_causal_models = (set(part.split()) for part in printed.split(" / "))
    classifiers = set(modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES)
    causal_models = set(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert set(NOT_ON_KAGGLE["classifier"]) == classifiers - kaggle_classifiers
    assert set(NOT_ON_KAGGLE["causal LM"]) == causal_models - kaggle_causal_models
