import numpy as np
import pytest

from postprocess.agreement.statistics import Column, Resamples, compare, difference, interval, outcomes, resample
from recipes.pairwise.tracking.metrics import scores

LABELS = np.array([[1.0, 0.0], [0.0, 1.0]])
WINNERS = np.array([0, 1])
TRAINED, FAR, NAN = (0.9, 0.4), (0.1, 0.4), (float("nan"), 0.4)


def column(name, *rows):
    """A column from the probability of model_a in each row, the same in both orders."""
    return Column(name, np.array([[[p, 1 - p]] * 2 for p in rows]), "float16")


def report(tolerance=0.05, groups=None, labels=LABELS, winners=WINNERS, trained=TRAINED, **models):
    named = {"recorded": trained, "trained": trained, **models}
    return compare([column(name.replace("_", "-"), *rows) for name, rows in named.items()], labels, winners, tolerance, groups)


def test_the_divergence_from_a_model_that_was_sure_of_the_contrary_is_large_and_finite():
    found = difference(column("quantised", 0.0), column("trained", 1.0))
    assert found["kl_divergence"] == pytest.approx(34.538776, abs=1e-6)  # ln 1e15


def test_differences_and_divergence_are_of_each_order_and_verdicts_of_their_mean():
    one = Column("quantised", np.array([[[0.7, 0.3], [0.2, 0.8]]]), "float16")
    other = Column("trained", np.array([[[0.5, 0.5], [0.5, 0.5]]]), "float16")
    assert difference(one, other) == {
        "largest": pytest.approx(0.3),
        "mean": pytest.approx(0.25),
        "kl_divergence": pytest.approx((0.5 * np.log(0.25 / 0.21) + 0.5 * np.log(0.25 / 0.16)) / 2),
        "verdicts_changed": 1,
    }


@pytest.mark.parametrize(("groups", "between"), [([0, 0, 0, 1], [0.0, 1.0]), (None, [0.25, 1.0])])
def test_rows_of_one_group_are_drawn_together(groups, between):
    """Three rows right and one wrong: both draws hit the group of the wrong row in a quarter of cases, four in 1 of 256."""
    labels, winners = np.eye(2)[[0, 0, 0, 1]], np.array([0, 0, 0, 1])
    rows, groups = (0.9, 0.9, 0.9, 0.9), groups and np.array(groups)
    line = report(groups=groups, labels=labels, winners=winners, trained=rows, quantised=rows)["models"][-1]
    assert (line["accuracy"], line["accuracy_interval"]) == (0.75, between)


def test_the_interval_of_independent_rows_is_that_of_a_share():
    """0.84 of 400 rows: 1.96 sqrt(0.84 * 0.16 / 400) = 0.036 to each side."""
    values_r = np.array([1.0] * 336 + [0.0] * 64)
    low, high = interval(values_r, np.full(400, True), resample(np.arange(400)))
    assert (low, high) == (pytest.approx(0.804, abs=0.005), pytest.approx(0.876, abs=0.005))


def test_rows_without_a_winner_do_not_count_for_accuracy_even_where_a_draw_has_no_others():
    counts = np.array([[2, 0], [0, 2]])
    drawn = Resamples(np.array([0, 1]), counts)
    assert interval(np.array([1.0, 0.0]), np.array([True, False]), drawn) == [1.0, 1.0]
    nothing = interval(np.array([1.0, 0.0]), np.array([False, False]), drawn)
    assert np.isnan(nothing).tolist() == [True, True]


def test_the_means_of_the_outcomes_are_the_metrics():
    generator = np.random.default_rng(3)
    rows = generator.dirichlet([1, 1, 1], size=(50, 2))
    labels, winners = np.eye(3)[generator.integers(3, size=50)], generator.integers(-1, 3, size=50)
    right_r, loss_r = outcomes(Column("trained", rows, ""), labels, winners)
    known = scores(rows, labels, winners)
    assert right_r[winners >= 0].mean() == pytest.approx(known["accuracy"])
    assert loss_r.mean() == pytest.approx(known["log_loss"])


def test_what_packaging_costs_is_measured_row_by_row():
    found = report(groups=np.array([0, 0]), quantised=(0.8, 0.6))["packaged_minus_trained"]
    assert found["accuracy"] == {"difference": -0.5, "interval": [-0.5, -0.5]}
    assert found["log_loss"]["difference"] == pytest.approx(0.261624, abs=1e-6)  # (ln(0.9 / 0.8) + ln(0.6 / 0.4)) / 2


def test_of_all_candidates_the_nearest_to_training_is_packaged_and_the_spread_of_repeats_is_told():
    models = {"quantised": NAN, "quantised_2": (0.9, 0.38), "quantised_3": (0.8, 0.4), "unmerged": (0.9, 0.45)}
    found = report(merged=TRAINED, **models)
    assert found["candidates"]["quantised-2"] == pytest.approx(0.01)
    assert (found["packaged"], found["agrees"]) == ("quantised-2", True)
    found = report(quantised=(0.8, 0.4), quantised_2=(0.9, 0.38), quantised_3=(0.4, 0.4))
    assert found["repeats"] == {
        "models": ["quantised", "quantised-2", "quantised-3"],
        "mean_difference": {
            "min": pytest.approx(0.01),
            "max": pytest.approx(0.25),
            "standard_deviation": pytest.approx(0.128582, abs=1e-6),
        },
        "accuracy": {"min": 0.5, "max": 1.0, "standard_deviation": pytest.approx(0.288675, abs=1e-6)},
    }
    assert "repeats" not in report(quantised=TRAINED, unmerged=TRAINED)


@pytest.mark.parametrize(
    ("models", "gate"),
    [
        ({"quantised": (0.8, 0.4)}, None),  # its mean difference is the tolerance, 0.05
        ({"quantised": (0.8, 0.41)}, ("quantised", "trained")),
        ({"quantised": TRAINED, "recorded": FAR}, ("quantised", "recorded")),
        ({"quantised": TRAINED, "merged": FAR}, ("merged", "trained")),
        ({"quantised": FAR, "quantised_2": TRAINED, "merged": FAR}, ("merged", "trained")),
        ({"quantised": NAN}, ("quantised", "trained")),
        ({"quantised": (0.5, 0.4), "unmerged": (0.9, 0.39), "merged": FAR}, None),  # merged is not in the package
        ({"quantised": TRAINED, "unmerged": FAR, "merged": FAR}, ("merged", "trained")),
    ],
)
def test_what_is_packaged_and_what_it_was_made_of_must_agree_with_training(models, gate):
    found = report(tolerance=0.05 + 1e-9, **models)
    assert found["agrees"] is (gate is None)
    farthest = found["gates"][0]
    assert gate in (None, (farthest["model"], farthest["against"]))
