"""Rows that overflow float16 are computed again in float32, and counted."""

import copy
import math

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from kaggle_kernels.runtime.models.scoring import BatchScores, Request, score_batch
from kaggle_kernels.runtime.models.shortcuts import take_shortcuts
from kaggle_kernels.runtime.scheduling.pass_runner import make_pass, note_scores, progress_line
from postprocess.weights.bnb_quantize import quantization_config
from preprocess import model_input
from tests.kaggle_kernels.runtime.test_shortcuts import contract_of, random_model
from tests.kaggle_kernels.runtime.workers import Device

CONTRACT = contract_of("score")
LAST_LINEAR = {"bert": "output.dense", "gemma2": "mlp.down_proj", "llama": "mlp.down_proj"}
SEQUENCES = [[token] * length for token, length in ((20, 5), (40, 30), (50, 31), (70, 44))]
BATCH = [Request(str(number), "as_given", (ids,)) for number, ids in enumerate(SEQUENCES)]


def overflowing_model(kind, factor):
    """A float16 model whose first layer gives some rows values beyond those of float16."""
    model = random_model(kind, dtype=torch.float16)
    for name, module in model.named_modules():
        if name.endswith(f"0.{LAST_LINEAR[kind]}"):
            module.weight.data *= factor
    return model


def probabilities_in_float32(model):
    with torch.inference_mode():
        return [model.float()(torch.tensor([ids])).logits[0].softmax(-1).tolist() for ids in SEQUENCES]


@pytest.mark.parametrize("kind", LAST_LINEAR)
def test_what_overflows_is_finite_and_as_in_float32(kind):
    model = overflowing_model(kind, 8e3)
    expected = probabilities_in_float32(copy.deepcopy(model))
    with torch.inference_mode():
        in_float16 = [model(torch.tensor([ids])).logits[0] for ids in SEQUENCES]
    overflowed = sum(not logits.isfinite().all() for logits in in_float16)

    take_shortcuts(model)
    scores = score_batch(model, model_input, CONTRACT, BATCH, "cpu")
    assert 0 < overflowed <= scores.overflowed, "padding may overflow too, and takes its row with it"
    assert overflowed < len(BATCH), "every row overflows, so that nothing shows that the others are left alone"
    for values, expected_values in zip(scores.probabilities, expected, strict=True):
        assert values == pytest.approx(expected_values, abs=0.01)
    assert len({round(values[0], 2) for values in scores.probabilities}) > 1, "rows cannot be told from one another"


@pytest.mark.parametrize("quantize", ["nf4", "int8"])
def test_quantised_layers_compute_in_float32_as_well(quantize, tmp_path):
    overflowing_model("llama", 3e4).save_pretrained(tmp_path)
    probabilities = []
    for dtype in (torch.float16, torch.float32):
        options = quantization_config(quantize, ["score"])
        if quantize == "nf4":
            options.bnb_4bit_compute_dtype = dtype
        model = AutoModelForSequenceClassification.from_pretrained(
            tmp_path, quantization_config=options, dtype=dtype, device_map={"": "cpu"}
        )
        take_shortcuts(model)
        scores = score_batch(model, model_input, CONTRACT, BATCH, "cpu")
        probabilities.append([values[0] for values in scores.probabilities])
        assert (scores.overflowed > 0) == (dtype is torch.float16)
    assert probabilities[0] == pytest.approx(probabilities[1], abs=0.02)


def test_the_log_says_how_many_rows_overflowed():
    work = make_pass("test", BATCH, math.inf, [Device().worker()])
    note_scores(work, BATCH, BatchScores([[0.5, 0.5]] * 3 + [[math.nan] * 2], overflowed=2))
    assert progress_line(work, []).endswith(", 2 rows overflowed float16 and were computed again in float32, 1 of them in vain")
