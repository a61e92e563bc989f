"""Estimate the position bias of an untrained model from unlabelled rows, and the bias that cancels it.

Over both orders of the same pairs, the response that stands first is the better one as often as the
one that stands second. A model that prefers one of the two places on average is biased, and one number
on its logits takes that away. This is contextual calibration (Zhao et al. 2021, "Calibrate Before
Use"), estimated on unlabelled rows of the task as in batch calibration (Zhou et al. 2023, "Batch
Calibration"). What those methods assume, that all labels are equally likely, both orders make true.
"""

from collections.abc import Sequence

import numpy as np
from scipy.optimize import bisect

from recipes.pairwise.tracking.metrics import softmax


def find_logit_bias(logits_rov: np.ndarray, verdicts: Sequence[str]) -> tuple[float, ...]:
    """Find what to add to a sequence's logits so that both places are equally likely on average.

    Args:
        logits_rov: Logits as the model gave them, (rows, 2 orders, verdicts), not swapped back:
            model_a is the response that stood first.
        verdicts: The verdicts in the order of the logits.

    Returns:
        The bias of each verdict: -d/2 for model_a, d/2 for model_b and 0 for a tie.
    """
    # Both orders count alike: a row in one order is one sequence.
    logits_bv = logits_rov.reshape(-1, len(verdicts)).astype(np.float64)
    first = verdicts.index("model_a")
    second = verdicts.index("model_b")
    direction_v = np.zeros(len(verdicts))
    direction_v[first] = -0.5
    direction_v[second] = 0.5

    def measure_preference(bias: float) -> float:
        probabilities_bv = softmax(logits_bv + bias * direction_v)
        return (probabilities_bv[:, first] - probabilities_bv[:, second]).mean()

    # The mean preference falls as the bias grows. Below the smallest margin every row prefers the first
    # place, above the largest one the second: in between, the mean is zero. Going 1 beyond both margins
    # keeps rounding from giving the two ends one sign, which bisect refuses.
    margins_b = logits_bv[:, first] - logits_bv[:, second]
    bias = bisect(measure_preference, margins_b.min() - 1, margins_b.max() + 1)
    return tuple(float(number) for number in bias * direction_v)
