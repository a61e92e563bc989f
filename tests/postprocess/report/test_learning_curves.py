"""Learning curves out of the trainer's log."""

import pytest

from postprocess.report.learning_curves import read_curve, smooth


def test_a_curve_is_by_step_and_smoothed_over_a_tenth():
    records = [{"step": 2, "loss": 1.0}, {"step": 1, "loss": 3.0}, {"step": 2, "eval_loss": 9.0}, {"step": 3, "loss": "nan"}]
    assert read_curve(records, "loss") == [(1, 3.0), (2, 1.0)]
    smoothed = smooth([(step, float(step % 2)) for step in range(40)])
    assert smoothed[0] == (0, 0.0)
    assert smoothed[1] == (1, pytest.approx(1 / 3))
    assert smoothed[20] == (20, pytest.approx(2 / 5))
