import numpy as np
import pytest

from tests.postprocess.agreement.compared import TRAINED, report

FAR, NAN = (0.1, 0.4), (float("nan"), 0.4)


def test_what_packaging_costs_is_measured_row_by_row():
    cost = report(quantised=(0.8, 0.6))["packaged_minus_trained"]
    assert cost["accuracy"]["difference"] == -0.5
    assert cost["log_loss"]["difference"] == pytest.approx(0.261624, abs=1e-6)  # (ln(0.9 / 0.8) + ln(0.6 / 0.4)) / 2
    half_width = 12.7062 * (np.log(0.6 / 0.4) - np.log(0.9 / 0.8)) / 2  # t(0.975, 1) standard errors
    assert cost["log_loss"]["interval"][1] == pytest.approx(0.261624 + half_width, abs=1e-3)


def test_of_all_candidates_the_nearest_to_training_is_packaged_and_the_spread_of_repeats_is_told():
    models = {"quantised": NAN, "quantised_2": (0.9, 0.38), "quantised_3": (0.8, 0.4), "unmerged": (0.9, 0.45)}
    compared = report(merged=TRAINED, **models)
    assert compared["candidates"]["quantised-2"] == pytest.approx(0.01)
    assert (compared["packaged"], compared["agrees"]) == ("quantised-2", True)
    compared = report(quantised=(0.8, 0.4), quantised_2=(0.9, 0.38), quantised_3=(0.4, 0.4))
    assert compared["repeats"] == {
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
    ("models", "refused"),
    [
        ({"quantised": (0.8, 0.4)}, []),  # its mean difference is the tolerance, 0.05
        ({"quantised": (0.8, 0.41)}, ["quantised and trained", "quantised and recorded"]),
        ({"quantised": TRAINED, "recorded": FAR}, ["recorded and trained", "quantised and recorded"]),
        ({"quantised": TRAINED, "recorded": ()}, []),
        ({"quantised": TRAINED, "merged": FAR}, ["merged and trained"]),
        ({"quantised": FAR, "quantised_2": TRAINED, "merged": FAR}, ["merged and trained"]),
        ({"quantised": (0.5, 0.4), "unmerged": (0.9, 0.39), "merged": FAR}, []),  # merged is not in the package
    ],
)
def test_what_is_packaged_and_what_it_was_made_of_must_agree_with_training(models, refused):
    compared = report(tolerance=0.05 + 1e-9, **models)
    names = [condition["name"] for condition in compared["conditions"] if condition["verdict"] != "holds"]
    assert names == [f"the mean difference in probability between {pair}" for pair in refused]
    assert compared["agrees"] is (refused == [])


def test_a_nan_never_agrees():
    compared = report(quantised=NAN)
    assert (compared["agrees"], np.isnan(compared["mean_difference"])) == (False, True)
    assert compared["verdict"] == "refused"
