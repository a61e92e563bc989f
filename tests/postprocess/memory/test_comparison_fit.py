import pytest

from postprocess.memory import comparison_fit
from postprocess.memory.comparison_fit import check_comparison, check_memory, estimate_weights
from postprocess.memory.model_size import served_of
from preprocess.core.errors import UserError
from recipes.pairwise.memory.measure import measure_folder

QLORA = {"qlora": True, "quantize": "nf4"}


def estimated(run, has_gpu):
    """Bytes by model, and the numbers of all weights and of those in linear layers."""
    served = served_of(run.recipe, measure_folder(run.weights))
    elements = sum(weight.elements for weight in served.weights)
    layers = sum(weight.elements for weight in served.weights if weight.kind == "linear")
    return estimate_weights(run, served, has_gpu), elements, layers


def test_a_merged_model_takes_twice_as_much_on_a_cpu(made, opened):
    run = opened(made("gemma2", quantize="nf4"))
    on_gpu, elements, _ = estimated(run, has_gpu=True)
    on_cpu, _, _ = estimated(run, has_gpu=False)
    assert (on_gpu["merged"], on_cpu["merged"]) == (2 * elements, 4 * elements)
    assert list(on_cpu) == ["trained", "merged"]


def test_a_qlora_run_packaged_unmerged_loads_nothing_but_nf4(made, opened):
    run = opened(made("gemma2", adapter="unmerged", **QLORA))
    bytes_by_model, elements, layers = estimated(run, has_gpu=True)
    nf4_bytes = layers * 9 // 16 + 2 * (elements - layers)
    assert bytes_by_model == {"trained": nf4_bytes, "unmerged": nf4_bytes}
    assert nf4_bytes < 2 * elements


def test_the_largest_model_and_its_batch_must_fit(made, opened, monkeypatch):
    run = opened(made("gemma2", quantize="nf4"))
    monkeypatch.setattr(comparison_fit, "activation_bytes", lambda *_: 1_000)
    bytes_by_model, _, _ = estimated(run, has_gpu=False)
    needed = bytes_by_model["trained"] + 2_000  # in float32, as this base is stored, with the file's header
    monkeypatch.setattr(comparison_fit, "memory", lambda: (needed, "this machine"))
    check_comparison(run)
    monkeypatch.setattr(comparison_fit, "memory", lambda: (needed - 1, "this machine"))
    with pytest.raises(UserError, match="the trained model takes .* this machine has .* too little to compare"):
        check_comparison(run)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [([16], (16, "the GPU")), ([16, 16], (24, "the room for weights on 2 GPUs"))],
)
def test_several_gpus_hold_a_model_together(gpus, expected, monkeypatch):
    monkeypatch.setattr(comparison_fit, "list_gpus", lambda: gpus)
    assert comparison_fit.memory() == expected


def test_the_error_names_the_gigabytes(monkeypatch, tmp_path):
    monkeypatch.setattr(comparison_fit, "memory", lambda: (int(33e9), "this machine"))
    with pytest.raises(UserError, match=r"takes 55\.4 GB and a batch of it 2\.0; this machine has 33\.0 GB"):
        check_memory(tmp_path, int(55.4e9), int(2e9), "the merged model")
