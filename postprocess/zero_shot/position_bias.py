"""The position bias of a model that was never trained for the task, found without looking at a label, and its cancellation.

Over both orders of the same pairs, the answer that stands first and the one that stands second are equally often the better
one, by construction. Where the model still prefers one of the two places on average, that is bias, and one number on the
logits takes it away. It is contextual calibration (Zhao et al. 2021, "Calibrate Before Use") with the estimate from
unlabelled rows of the task as in batch calibration (Zhou et al. 2023, "Batch Calibration"); what those assume of the labels,
that all are equally likely, both orders of each row make true here.
"""

from collections.abc import Sequence

import numpy as np

STEPS = 100  # halvings; float64 is exhausted after about 60


def position_bias(logits_rov: np.ndarray, verdicts: Sequence[str]) -> tuple[float, ...]:
    """What to add to a sequence's logits, in the order of `verdicts`: -d/2 for model_a, d/2 for model_b, 0 for tie.

    `logits_rov` are logits of shape (rows, 2 orders, verdicts) as the model gave them, not swapped back: model_a is whatever
    stood first. With d added, the mean probability of the first answer is that of the second; d is found by bisection.
    """
    logits = logits_rov.reshape(-1, len(verdicts)).astype(np.float64)
    first, second = verdicts.index("model_a"), verdicts.index("model_b")
    direction = np.array([{"model_a": -0.5, "model_b": 0.5, "tie": 0.0}[verdict] for verdict in verdicts])
    margins = logits[:, first] - logits[:, second]
    low, high = float(margins.min()), float(margins.max())
    for _ in range(STEPS):
        middle = (low + high) / 2
        shifted = logits + middle * direction
        shares = np.exp(shifted - shifted.max(axis=1, keepdims=True))
        shares /= shares.sum(axis=1, keepdims=True)
        low, high = (middle, high) if (shares[:, first] - shares[:, second]).mean() > 0 else (low, middle)
    return tuple(float(part) for part in (low + high) / 2 * direction)
