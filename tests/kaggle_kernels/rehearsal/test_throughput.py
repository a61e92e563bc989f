"""The prediction for two T4s, against arithmetic by hand."""

import pytest

from kaggle_kernels.build.memory_fit import fit_packages
from kaggle_kernels.build.spec import find_spec, read_spec
from kaggle_kernels.rehearsal.throughput import (
    Prediction,
    as_record,
    here,
    in_time,
    multiplied_parameters,
    predict,
    report,
)


def fits_of(name):
    path = find_spec(name)
    spec = read_spec(path)
    return fit_packages(path, spec), spec


def passes(run, *counts):
    """Records of kernel.json from (order, scored, seconds, tokens, computed tokens)."""
    keys = ("scored", "seconds", "tokens", "computed_tokens")
    return [{"run": run, "order": order, **dict(zip(keys, values, strict=True))} for order, *values in counts]


BOTH = [("as_given", 100, 4.0, 90_000, 100_000), ("swapped", 100, 6.0, 90_000, 120_000)]


@pytest.mark.parametrize("name, parameters", [("gemma2_cls", 8_323_603_456), ("qwen2_5_14b_cls", 13_212_067_840)])
def test_parameters_are_the_recipes_without_the_embedding(name, parameters):
    fits, _ = fits_of(name)
    assert [multiplied_parameters(fit) for fit in fits] == [parameters]


def test_the_model_agrees_with_a_public_run_on_t4s():
    """70,000 tokens a minute of a 14B on two T4s are 1.54e13 a second on each; the model says 1.5e13."""
    fits, _ = fits_of("qwen2_5_14b_cls")
    assert 2 * multiplied_parameters(fits[0]) * 70_000 / 60 / 2 == pytest.approx(1.541e13, rel=1e-3)


def test_both_orders_are_predicted_from_their_own_tokens_padding_included():
    fits, spec = fits_of("gemma2_cls")
    found = predict(fits, spec, passes("gemma2_cls", *BOTH), 100)
    assert [one.rows for one in found] == [100, 10_000, 25_000]
    assert found[1].first_order == pytest.approx(2 * 8_323_603_456 * 1000 * 10_000 / 3e13)
    assert found[1].second_order == pytest.approx(found[1].first_order * 1.2)
    assert found[2].first_order == pytest.approx(found[1].first_order * 2.5)
    assert found[1].loading == found[0].loading == pytest.approx(2 * 6.52e9 / 3e8, rel=0.01)
    assert found[1].finish == found[1].loading + found[1].first_order + found[1].second_order


def test_an_order_that_was_run_in_part_is_predicted_from_the_first():
    fits, spec = fits_of("gemma2_cls")
    short = [BOTH[0], ("swapped", 10, 1.0, 900, 1000)]
    one, *_ = predict(fits, spec, passes("gemma2_cls", *short), 100)
    assert one.second_order == one.first_order
    alone, *_ = predict(fits, spec, passes("gemma2_cls", BOTH[0]), 100)
    assert alone == one
    in_two = [("as_given", 60, 2.0, 50_000, 60_000), ("as_given", 40, 2.0, 40_000, 40_000)]
    again, *_ = predict(fits, spec, passes("gemma2_cls", *in_two), 100)
    assert again == one


def test_a_reward_model_has_one_order_and_a_split_model_is_loaded_once():
    fits, spec = fits_of("gemma2_reward")
    one, *_ = predict(fits, spec, passes(fits[0].package.run, BOTH[0]), 100)
    assert (one.second_order, one.first_order > 0) == (0.0, True)
    fits, spec = fits_of("qwen2_5_14b_cls")
    one, *_ = predict(fits, spec, passes(fits[0].package.run, *BOTH), 100)
    assert one.loading == pytest.approx(14.8e9 / 3e8, rel=0.02)


def test_models_of_an_ensemble_are_added_and_one_that_scored_nothing_has_the_firsts_tokens():
    fits, spec = fits_of("gemma2_llama3_own")
    gemma, llama = (fit.package.run for fit in fits)
    one, *_ = predict(fits, spec, passes(gemma, *BOTH) + passes(llama, BOTH[0], BOTH[0]), 100)
    flop = 2 * (multiplied_parameters(fits[0]) + multiplied_parameters(fits[1]))
    assert one.first_order == pytest.approx(flop * 1000 * 100 / 3e13)
    other, *_ = predict(fits, spec, passes(gemma, *BOTH), 100)
    assert other.first_order == pytest.approx(one.first_order)
    assert other.second_order == pytest.approx(one.first_order * 1.2)


def test_what_was_measured_here_is_over_all_passes():
    assert here(passes("any", *BOTH)) == {"rows_per_second": 20.0, "tokens_per_second": 18_000.0, "padding": 0.1818}
    assert here([]) == {"rows_per_second": 0.0, "tokens_per_second": 0.0, "padding": 0.0}


SPEED = {"rows_per_second": 20.0, "tokens_per_second": 18_000.0, "padding": 0.1818}


def test_the_report_says_each_order_and_the_finish():
    lines = report(SPEED, [Prediction(25_000, 60, 6720, 6720)], 17_100)
    assert lines == [
        "here: 20.0 rows/s, 18000 tokens/s, padding 18.2%",
        "25,000 rows of these lengths on two T4s: loading 1 min, first order 1 h 52 min, second order 1 h 52 min, predicted "
        "finish 3 h 45 min of a clock of 4 h 45 min",
    ]


@pytest.mark.parametrize(
    "second, end",
    [
        (0.0, "first order 3 h 00 min, predicted finish 3 h 01 min of a clock of 4 h 45 min"),
        (10_800.0, "of a clock of 4 h 45 min; the clock has room for 58% of the second order"),
    ],
)
def test_the_report_says_how_much_of_the_second_order_the_clock_has_room_for(second, end):
    assert report(SPEED, [Prediction(25_000, 60, 10_800, second)], 17_100)[-1].endswith(end)


def test_a_first_order_over_the_clock_is_a_warning_for_the_rehearsed_rows_alone():
    over, within = Prediction(25_000, 60, 18_000, 18_000), Prediction(10_000, 60, 7200, 7200)
    assert report(SPEED, [over, within], 17_100)[-1] == (
        "warning: 25,000 rows are predicted to take 5 h 01 min in one order alone, the clock is 4 h 45 min: rows would be left "
        "to the prior; lower budget_tokens, or take a smaller model"
    )
    assert not any("warning" in line for line in report(SPEED, [within, over], 17_100))


@pytest.mark.parametrize(
    "seconds, told", [(0, "0 s"), (59.4, "59 s"), (60, "1 min"), (3569, "59 min"), (3599, "1 h 00 min"), (6720, "1 h 52 min")]
)
def test_seconds_are_told_as_hours_and_minutes(seconds, told):
    assert in_time(seconds) == told


def test_the_record_has_whole_seconds():
    assert as_record([Prediction(10, 1.4, 2.6, 3.5)]) == [
        {"rows": 10, "loading": 1, "first_order": 3, "second_order": 4, "finish": 8}
    ]
