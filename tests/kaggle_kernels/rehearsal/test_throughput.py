"""The prediction for two T4s, against arithmetic by hand."""

import pytest

from kaggle_kernels.build.memory_fit import fit_packages
from kaggle_kernels.build.spec import find_spec, read_spec
from kaggle_kernels.rehearsal.throughput import count_multiplied_parameters, predict_loading, predict_runs


def fits_of(name):
    path = find_spec(name)
    return fit_packages(path, read_spec(path))


def passes(run, *counts):
    """Records of kernel.json from (order, scored, computed tokens)."""
    keys = ("order", "scored", "computed_tokens")
    return [{"run": run, "seconds": 1.0, **dict(zip(keys, values, strict=True))} for values in counts]


BOTH = [("as_given", 100, 100_000), ("swapped", 100, 120_000)]
GEMMA = 2 * 8_323_603_456 * 1000 / 3e13  # seconds of a row of 1,000 tokens


def test_both_orders_are_predicted_from_their_own_tokens_for_each_number_of_rows():
    fits = fits_of("gemma2_cls")
    loading = predict_loading(fits)
    assert loading == pytest.approx(2 * 6.52e9 / 3e8, rel=0.01)
    assert predict_runs(fits, passes("gemma2_cls", *BOTH), (10_000, 25_000)) == [
        {"rows": rows, "first_order_seconds": round(loading + rows * GEMMA), "all_seconds": round(loading + rows * GEMMA * 2.2)}
        for rows in (10_000, 25_000)
    ]


def test_a_split_model_is_loaded_once():
    assert predict_loading(fits_of("qwen2_5_14b_cls")) == pytest.approx(14.8e9 / 3e8, rel=0.02)


def test_models_of_an_ensemble_are_added():
    fits = fits_of("gemma2_llama3_own")
    gemma, llama = (fit.package.run for fit in fits)
    [finish] = predict_runs(fits, passes(gemma, *BOTH) + passes(llama, BOTH[0]), (10_000,))
    seconds = 2.2 * GEMMA + 2 * count_multiplied_parameters(fits[1]) * 1000 / 3e13
    assert finish["all_seconds"] == pytest.approx(predict_loading(fits) + 10_000 * seconds, abs=1)


def test_where_no_row_was_scored_nothing_is_predicted():
    assert predict_runs(fits_of("gemma2_cls"), passes("gemma2_cls", ("as_given", 0, 0)), (10_000,)) == []
