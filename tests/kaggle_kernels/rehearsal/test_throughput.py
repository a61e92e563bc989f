"""The prediction for two T4s, against arithmetic by hand."""

import pytest

from kaggle_kernels.build.memory_fit import fit_packages
from kaggle_kernels.build.spec import find_spec, read_spec
from kaggle_kernels.rehearsal.throughput import (
    Prediction,
    Speed,
    count_multiplied_parameters,
    measure_speed,
    predict_runs,
    report_throughput,
)


def fits_of(name):
    path = find_spec(name)
    spec = read_spec(path)
    return fit_packages(path, spec), spec


def passes(run, *counts):
    """Records of kernel.json from (order, scored, seconds, tokens, computed tokens)."""
    keys = ("scored", "seconds", "tokens", "computed_tokens")
    return [{"run": run, "order": order, **dict(zip(keys, values, strict=True))} for order, *values in counts]


SPEED = Speed(20.0, 18_000.0, 0.1818)
BOTH = [("as_given", 100, 4.0, 90_000, 100_000), ("swapped", 100, 6.0, 90_000, 120_000)]


def test_both_orders_are_predicted_from_their_own_tokens_padding_included():
    fits, spec = fits_of("gemma2_cls")
    here, ten_thousand, twenty_five_thousand = predict_runs(fits, spec, passes("gemma2_cls", *BOTH), 100)
    assert (here.rows, ten_thousand.rows, twenty_five_thousand.rows) == (100, 10_000, 25_000)
    assert ten_thousand.first_order == pytest.approx(2 * 8_323_603_456 * 1000 * 10_000 / 3e13)
    assert ten_thousand.second_order == pytest.approx(ten_thousand.first_order * 1.2)
    assert twenty_five_thousand.first_order == pytest.approx(ten_thousand.first_order * 2.5)
    assert ten_thousand.loading == here.loading == pytest.approx(2 * 6.52e9 / 3e8, rel=0.01)


@pytest.mark.parametrize(
    "counts",
    [
        [BOTH[0], ("swapped", 10, 1.0, 900, 1000)],
        [BOTH[0]],
        [("as_given", 60, 2.0, 50_000, 60_000), ("as_given", 40, 2.0, 40_000, 40_000)],
    ],
    ids=["in part", "not at all", "first order in two passes"],
)
def test_a_second_order_that_was_not_run_whole_is_predicted_from_the_first(counts):
    prediction, *_ = predict_runs(*fits_of("gemma2_cls"), passes("gemma2_cls", *counts), 100)
    assert prediction.second_order == prediction.first_order == pytest.approx(2 * 8_323_603_456 * 1000 * 100 / 3e13)


def test_a_reward_model_has_one_order_and_a_split_model_is_loaded_once():
    fits, spec = fits_of("gemma2_reward")
    reward, *_ = predict_runs(fits, spec, passes(fits[0].package.run, BOTH[0]), 100)
    assert (reward.second_order, reward.first_order > 0) == (0.0, True)
    fits, spec = fits_of("qwen2_5_14b_cls")
    split, *_ = predict_runs(fits, spec, passes(fits[0].package.run, *BOTH), 100)
    assert split.loading == pytest.approx(14.8e9 / 3e8, rel=0.02)
    assert split.first_order == pytest.approx(2 * 13_212_067_840 * 1000 * 100 / 3e13)


def test_models_of_an_ensemble_are_added_and_one_that_scored_nothing_has_the_firsts_tokens():
    fits, spec = fits_of("gemma2_llama3_own")
    gemma, llama = (fit.package.run for fit in fits)
    whole, *_ = predict_runs(fits, spec, passes(gemma, *BOTH) + passes(llama, BOTH[0], BOTH[0]), 100)
    flop = 2 * (count_multiplied_parameters(fits[0]) + count_multiplied_parameters(fits[1]))
    assert whole.first_order == pytest.approx(flop * 1000 * 100 / 3e13)
    without_llama, *_ = predict_runs(fits, spec, passes(gemma, *BOTH), 100)
    assert without_llama.first_order == pytest.approx(whole.first_order)
    assert without_llama.second_order == pytest.approx(whole.first_order * 1.2)


def test_the_speed_here_is_over_all_passes():
    assert measure_speed(passes("any", *BOTH)) == SPEED
    assert measure_speed([]) == Speed(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    "orders, end",
    [
        (
            (6720, 6720),
            "25,000 rows of these lengths on two T4s: loading 1 min, first order 1 h 52 min, second order 1 h 52 min, "
            "predicted finish 3 h 45 min of a clock of 4 h 45 min",
        ),
        ((10_800, 0), "loading 1 min, first order 3 h 00 min, predicted finish 3 h 01 min of a clock of 4 h 45 min"),
        ((10_800, 10_800), "of a clock of 4 h 45 min; the clock has room for 58% of the second order"),
    ],
)
def test_the_report_has_each_order_the_finish_and_what_fits_into_the_clock(orders, end):
    speed, prediction = report_throughput(SPEED, [Prediction(25_000, 17_100, 60, *orders)])
    assert speed == "here: 20.0 rows/s, 18000 tokens/s, padding 18.2%"
    assert prediction.endswith(end)


def test_a_first_order_over_the_clock_is_a_warning_for_the_rehearsed_rows_alone():
    over, within = Prediction(25_000, 17_100, 60, 18_000, 18_000), Prediction(10_000, 17_100, 60, 7200, 7200)
    *_, warning = report_throughput(SPEED, [over, within])
    assert warning.startswith("warning: 25,000 rows are predicted to take 5 h 01 min in one order alone, the clock")
    assert "warning" not in "".join(report_throughput(SPEED, [within, over]))
