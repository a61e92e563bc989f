"""The temperature of a package: by order, and only of rows that can tell."""

from types import SimpleNamespace

import pytest

from postprocess.temperature import measure_temperatures
from tests.postprocess.report.reported import TWO, Row, write_run

RIGHT = Row(0.9, 0.7)
WRONG = Row(0.9, 0.7, "model_b")


def measure(tmp_path, rows, **metrics):
    folder = write_run(tmp_path / "run", rows, **metrics)
    recipe = SimpleNamespace(pairwise=SimpleNamespace(pairs=tmp_path / "pairs.parquet"))
    return measure_temperatures(SimpleNamespace(folder=folder, recipe=recipe, contract=SimpleNamespace(verdicts=TWO)))


def test_each_order_has_its_own_temperature_and_interval(tmp_path, capsys):
    """0.9 as given and 0.8 on average, right in three of four: ln 9 / ln 3 and ln 4 / ln 3."""
    measured = measure(tmp_path, ([RIGHT] * 3 + [WRONG]) * 50)
    assert measured["as_given"]["best"] == pytest.approx(2, abs=2e-3)
    assert measured["both"]["best"] == pytest.approx(1.262, abs=2e-3)
    assert measured["both"]["low"] < 1.2 < 1.3 < measured["both"]["high"]
    assert "temperature 1.26 (95 %: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("group", "trained_on"), [(None, True), (1, False)], ids=["rows that were trained on", "one group of prompts"]
)
def test_rows_that_cannot_tell_have_no_temperature(tmp_path, group, trained_on):
    rows = [Row(0.9, 0.9, group=group)] * 30 + [Row(0.9, 0.9, "model_b", group=group)] * 10
    assert measure(tmp_path, rows, rows_were_trained_on=trained_on) is None
