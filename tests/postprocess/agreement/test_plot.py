import struct
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from postprocess.agreement.plot import agreement_picture, draw_differences, draw_rows
from postprocess.agreement.statistics import Column
from tests.postprocess.agreement.compared import TRAINED, column, report

RUN = Path("outputs/gemma2_cls")


def picture(out, *quantised):
    named = {"recorded": TRAINED, "trained": TRAINED, "quantised": quantised}
    shown = [column(name, *rows) for name, rows in named.items()]
    agreement_picture(RUN, report(quantised=quantised), shown, ("model_a", "model_b"), out)
    return out.read_bytes()


def test_the_same_numbers_give_the_same_png_of_1100_by_520_pixels_whatever_the_user_s_settings(tmp_path):
    first = picture(tmp_path / "one.png", 0.8, 0.6)
    assert first[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", first[16:24]) == (1100, 520)
    with matplotlib.rc_context({"savefig.dpi": 50, "font.size": 30, "axes.facecolor": "black"}):
        assert picture(tmp_path / "two.png", 0.8, 0.6) == first
    assert b"matplotlib" not in first
    assert picture(tmp_path / "three.png", 0.8, 0.39) != first


def test_three_verdicts_have_a_picture_of_model_a(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("postprocess.agreement.plot.draw_differences", lambda axes, values, name: drawn.append(values))
    values = {"trained": [[[0.2, 0.3, 0.5]] * 2], "quantised": [[[0.2, 0.2, 0.6], [0.3, 0.3, 0.4]]]}
    shown = [Column(name, np.array(values[name]), "") for name in values]
    found = {"packaged": "quantised", "agrees": True, "rows": 1, "tolerance": 0.1, "mean_difference": 0.0}
    agreement_picture(RUN, found, shown, ("tie", "model_b", "model_a"), tmp_path / "agreement.png")
    assert drawn[0].tolist() == [[pytest.approx(0.1), pytest.approx(-0.1)]]


def test_rows_whose_verdict_changed_are_marked():
    axes = Figure().subplots()
    changed = np.array([False, True, False])
    draw_rows(axes, np.array([0.9, 0.45, 0.1]), np.array([0.8, 0.55, 0.2]), changed, "quantised")
    same, marked = axes.collections
    assert same.get_offsets().tolist() == [[0.9, 0.8], [0.1, 0.2]]
    assert marked.get_offsets().tolist() == [[0.45, 0.55]]
    assert same.get_facecolor().tolist() != marked.get_facecolor().tolist()
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["same verdict: 2", "verdict changed: 1"]


@pytest.mark.parametrize(
    ("values", "half"),
    [([[0.0, 0.0], [0.0, 0.0]], 0.001), ([[0.1, -0.2], [0.0, 0.0]], 0.21), ([[1e-9, float("nan")]], 0.001)],
    ids=["equal", "apart", "a NaN"],
)
def test_the_histogram_holds_every_difference_with_zero_in_the_middle_of_a_bar(values, half):
    axes = Figure().subplots()
    draw_differences(axes, np.array(values), "quantised")
    heights = [bar.get_height() for bar in axes.patches]
    assert sum(heights) == np.isfinite(values).sum()
    assert heights[20] == (np.abs(values) < 0.001).sum()
    assert axes.get_xlim() == pytest.approx((-half, half))
    assert axes.patches[20].get_x() == pytest.approx(-axes.patches[20].get_width() / 2)
