"""int8 of models whose activations have outliers."""

import pytest
import torch
from safetensors.torch import load_file

from kaggle_kernels.runtime.models.model import CLASSES, load_model
from postprocess.weights.bnb_quantize import quantization_config
from postprocess.weights.merge import Form, merge
from postprocess.weights.quantise_run import calibrate_smoothing
from tests.postprocess import runs
from tests.postprocess.weights.test_nf4_base_plus_adapter import difference_from_recorded

OUTLIER = 200.0
NORMS = {"gemma2": "pre_feedforward_layernorm", "llama": "post_attention_layernorm"}


def plant_outliers(run: runs.Made, kind: str) -> None:
    """Make one channel of each layer's inputs 200 times larger and its columns smaller: the same model."""
    offset = 1.0 if kind == "gemma2" else 0.0

    def plant(tensors):
        for layer in ("model.layers.0.", "model.layers.1."):
            for norm, targets in (
                ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
                (NORMS[kind], ("mlp.gate_proj", "mlp.up_proj")),
            ):
                weight = tensors[f"{layer}{norm}.weight"]
                weight[5] = (weight[5] + offset) * OUTLIER - offset
                for target in targets:
                    tensors[f"{layer}{target}.weight"][:, 5] /= OUTLIER
            tensors[f"{layer}mlp.up_proj.weight"][9] *= OUTLIER
            tensors[f"{layer}mlp.down_proj.weight"][:, 9] /= OUTLIER

    runs.change_tensors(run.folder / "model.safetensors", plant)


@pytest.mark.parametrize("kind", NORMS)
def test_int8_agrees_where_outliers_broke_it(kind, copied, opened, tmp_path):
    run = copied(kind, full=True, quantize="int8", training_rows=30)
    int8 = Form(quantization_config("int8", ["score"]))
    merge(opened(run), tmp_path / "before", int8)
    plant_outliers(run, kind)
    merge(opened(run), tmp_path / "planted", int8)
    assert "int8 with SmoothQuant, calibrated on 30 training rows" in runs.succeed(run.recipe)

    differences = {}
    for folder in (tmp_path / "before", tmp_path / "planted", run.folder / "quantised"):
        model = load_model(folder, run.contract(), "cpu")
        differences[folder.name] = difference_from_recorded(opened(run), model)
    assert differences["planted"] > 4 * differences["before"]
    assert differences["quantised"] < 1.5 * differences["before"]


@pytest.mark.parametrize("kind", NORMS)
def test_without_rounding_the_smoothed_model_is_the_same(kind, copied, opened, tmp_path):
    run = copied(kind, training_rows=30)
    merge(opened(run), tmp_path / "merged")
    smoothing = calibrate_smoothing(opened(run), tmp_path / "merged")
    merge(opened(run), tmp_path / "smoothed", Form(dtype=torch.float32, smoothing=smoothing))
    smoothed = CLASSES["score"].from_pretrained(tmp_path / "smoothed", attn_implementation="sdpa").eval()
    assert difference_from_recorded(opened(run), smoothed) < 1e-4
    base, changed = (load_file(folder / "model.safetensors") for folder in (run.base, tmp_path / "smoothed"))
    norm = "model.layers.0.input_layernorm.weight"
    assert not torch.allclose(base[norm], changed[norm], atol=0.05)


@pytest.mark.parametrize(
    ("kind", "training_rows", "line"),
    [
        ("bert", 30, "int8 without SmoothQuant, which is for gemma2, llama, mistral, qwen2, qwen3; this is a bert"),
        ("gemma2", 0, "int8 without SmoothQuant: "),
    ],
)
def test_what_cannot_be_smoothed_is_said(kind, training_rows, line, made, opened, tmp_path, capsys):
    run = opened(made(kind, training_rows=training_rows))
    assert calibrate_smoothing(run, tmp_path / "not read") is None
    assert line in capsys.readouterr().out
