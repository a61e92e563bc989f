import numpy as np
import pytest

from postprocess.zero_shot.position_bias import position_bias

TWO = ("model_a", "model_b")


def both_orders(margins, first=0.0, ties=None):
    """Logits of an unbiased model, whose margin changes sign with the order, with `first` added to the first answer's."""
    rows = []
    for row, margin in enumerate(margins):
        tie = [] if ties is None else [ties[row]]
        rows.append([[margin + first, 0.0, *tie], [first, margin, *tie]])
    return np.array(rows)


def test_a_constant_preference_for_the_first_place_is_found_whole():
    assert position_bias(both_orders([2.0, -1.0, 0.3, 5.0], first=3.0), TWO) == pytest.approx((-1.5, 1.5))


def test_a_preference_for_the_second_place_is_taken_away_too():
    assert position_bias(both_orders([2.0, -1.0, 0.3], first=-0.8), TWO) == pytest.approx((0.4, -0.4))


def test_a_model_without_bias_gets_none():
    assert position_bias(both_orders([2.0, -1.0, 0.3]), TWO) == pytest.approx((0.0, 0.0))


def test_the_bias_follows_the_order_of_the_verdicts_and_leaves_a_tie_alone():
    logits = both_orders([2.0, -1.0, 0.3], first=3.0, ties=[0.5, 4.0, -1.0])
    assert position_bias(logits, (*TWO, "tie")) == pytest.approx((-1.5, 1.5, 0.0))
    assert position_bias(logits[:, :, [2, 1, 0]], ("tie", "model_b", "model_a")) == pytest.approx((0.0, 1.5, -1.5))


def test_afterwards_both_places_are_equally_likely_on_average():
    logits = np.random.default_rng(0).normal(1.7, 2.0, (200, 2, 3))
    bias = np.array(position_bias(logits, (*TWO, "tie")))
    shares = np.exp(logits + bias) / np.exp(logits + bias).sum(axis=-1, keepdims=True)
    assert shares[..., 0].mean() == pytest.approx(shares[..., 1].mean(), abs=1e-9)
    before = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    assert abs(before[..., 0].mean() - before[..., 1].mean()) > 0.03


def test_a_model_that_gives_one_margin_everywhere_is_undone():
    assert position_bias(np.full((5, 2, 2), [80.0, 0.0]), TWO) == pytest.approx((-40.0, 40.0))
