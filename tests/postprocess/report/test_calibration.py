"""Calibration, against values computed by hand."""

import math

import pytest

from postprocess.report.calibration import estimate_temperature, measure_calibration
from tests.postprocess.report import reported
from tests.postprocess.report.reported import Row


def test_bins_and_error_by_hand(tmp_path):
    """Confidences 0.82 and 0.81 share a bin and are right; 0.59 and 0.72 have bins of their own and are wrong."""
    calibration = measure_calibration(reported.score(tmp_path / "run"))
    assert [(filled.row_count, round(filled.confidence, 3), filled.accuracy.value) for filled in calibration.bins] == [
        (1, 0.59, 0.0),
        (1, 0.72, 0.0),
        (2, 0.815, 1.0),
    ]
    assert calibration.error == pytest.approx((0.59 + 0.72 + 2 * 0.185) / 4)


def test_the_best_temperature_makes_confidence_what_accuracy_is(tmp_path):
    """Always 0.9 sure and right in three of four: logit(0.9) / T = logit(0.75), so T = ln 9 / ln 3 = 2."""
    calibration = measure_calibration(reported.score(tmp_path / "run", [Row(0.9, 0.9)] * 3 + [Row(0.9, 0.9, "model_b")]))
    assert calibration.temperature == pytest.approx(2, abs=1e-3)
    assert calibration.log_loss == pytest.approx(-(3 * math.log(0.9) + math.log(0.1)) / 4)
    assert calibration.log_loss_at_temperature == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))


@pytest.mark.parametrize(("confidence", "best", "low", "high"), [(0.9, 2.0, 1.64, 2.49), (0.75, 1.0, 0.82, 1.25)])
def test_the_interval_of_the_temperature_is_that_of_the_accuracy(tmp_path, confidence, best, low, high):
    """Right in 300 of 400 rows, 0.708 to 0.792: logit(confidence) / T lies between the logits of these shares."""
    rows = [Row(confidence, confidence)] * 300 + [Row(confidence, confidence, "model_b")] * 100
    scored = reported.score(tmp_path / "run", rows)
    estimate = estimate_temperature(scored, scored.mean_rv)
    assert estimate.value == pytest.approx(best, abs=1e-3)
    assert (estimate.low, estimate.high) == (pytest.approx(low, abs=0.06), pytest.approx(high, abs=0.06))
