import numpy as np
import pytest

from postprocess.zero_shot.position_bias import find_logit_bias

TWO = ("model_a", "model_b")


def both_orders(margins, first=0.0, ties=None):
    """Logits of an unbiased model, whose margin changes sign with the order, with `first` added to the first answer's."""
    rows = []
    for row, margin in enumerate(margins):
        tie = [] if ties is None else [ties[row]]
        rows.append([[margin + first, 0.0, *tie], [first, margin, *tie]])
    return np.array(rows)


@pytest.mark.parametrize(
    ("logits", "bias"),
    [
        (both_orders([2.0, -1.0, 0.3, 5.0], first=3.0), (-1.5, 1.5)),
        (both_orders([2.0, -1.0, 0.3]), (0.0, 0.0)),
        (np.full((5, 2, 2), [80.0, 0.0]), (-40.0, 40.0)),
    ],
    ids=["first", "none", "the same margin everywhere"],
)
def test_a_constant_preference_for_a_place_is_found_whole(logits, bias):
    assert find_logit_bias(logits, TWO) == pytest.approx(bias)


def test_the_bias_follows_the_order_of_the_verdicts_and_leaves_a_tie_alone():
    logits = both_orders([2.0, -1.0, 0.3], first=3.0, ties=[0.5, 4.0, -1.0])
    assert find_logit_bias(logits, (*TWO, "tie")) == pytest.approx((-1.5, 1.5, 0.0))
    assert find_logit_bias(logits[:, :, [2, 1, 0]], ("tie", "model_b", "model_a")) == pytest.approx((0.0, 1.5, -1.5))


def test_afterwards_both_places_are_equally_likely_on_average():
    logits = np.random.default_rng(0).normal(1.7, 2.0, (200, 2, 3))
    bias = np.array(find_logit_bias(logits, (*TWO, "tie")))
    shares = np.exp(logits + bias) / np.exp(logits + bias).sum(axis=-1, keepdims=True)
    assert shares[..., 0].mean() == pytest.approx(shares[..., 1].mean(), abs=1e-9)
