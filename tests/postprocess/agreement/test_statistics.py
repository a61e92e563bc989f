import numpy as np
import pytest

from postprocess.agreement.statistics import Column, Resamples, difference, estimate_mean, interval, resample
from tests.postprocess.agreement.compared import column


def test_the_divergence_from_a_model_that_was_sure_of_the_contrary_is_large_and_finite():
    found = difference(column("quantised", 0.0), column("trained", 1.0))
    assert found["kl_divergence"] == pytest.approx(34.538776, abs=1e-6)  # ln 1e15


def test_differences_and_divergence_are_of_each_order_and_verdicts_of_their_mean():
    packaged = Column("quantised", np.array([[[0.7, 0.3], [0.2, 0.8]]]), "float16")
    trained = Column("trained", np.array([[[0.5, 0.5], [0.5, 0.5]]]), "float16")
    assert difference(packaged, trained) == {
        "largest": pytest.approx(0.3),
        "mean": pytest.approx(0.25),
        "kl_divergence": pytest.approx((0.5 * np.log(0.25 / 0.21) + 0.5 * np.log(0.25 / 0.16)) / 2),
        "verdicts_changed": 1,
    }


def test_the_interval_of_independent_rows_is_that_of_a_share():
    """0.84 of 400 rows: 1.96 sqrt(0.84 * 0.16 / 400) = 0.036 to each side."""
    values_r = np.array([1.0] * 336 + [0.0] * 64)
    low, high = interval(values_r, np.full(400, True), resample(np.arange(400)))
    assert (low, high) == (pytest.approx(0.804, abs=0.005), pytest.approx(0.876, abs=0.005))
    estimate = estimate_mean(values_r, np.arange(400))
    assert (estimate.low, estimate.high) == (pytest.approx(0.804, abs=1e-3), pytest.approx(0.876, abs=1e-3))


def test_rows_without_a_winner_do_not_count_for_accuracy_even_where_a_draw_has_no_others():
    draws = Resamples(np.array([0, 1]), np.array([[2, 0], [0, 2]]))
    assert interval(np.array([1.0, 0.0]), np.array([True, False]), draws) == [1.0, 1.0]
    nothing = interval(np.array([1.0, 0.0]), np.array([False, False]), draws)
    assert np.isnan(nothing).tolist() == [True, True]


def test_copies_of_rows_in_their_groups_make_an_estimate_no_surer():
    """Four groups with means 0, 1, 2, 3: 1.5 and t(0.975, 3) * sqrt(5 / 3) / 2 = 2.0543 to each side."""
    values_r = np.array([0.0, 1.0, 2.0, 3.0])
    alone = estimate_mean(values_r, np.arange(4))
    assert (alone.value, alone.high) == (1.5, pytest.approx(1.5 + 2.0543, abs=1e-4))
    copies = estimate_mean(np.repeat(values_r, 10), np.repeat(np.arange(4), 10))
    assert copies.high == pytest.approx(alone.high)
    assert estimate_mean(values_r, np.zeros(4)).high == np.inf
