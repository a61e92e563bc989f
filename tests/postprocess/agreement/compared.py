"""Models with given probabilities, compared: what several tests of the gate begin with."""

import numpy as np

from postprocess.agreement.comparison import compare
from postprocess.agreement.statistics import Column, ComparedRows
from recipes.pairwise.config.schema import PackageBlock

LABELS = np.array([[1.0, 0.0], [0.0, 1.0]])
WINNERS = np.array([0, 1])
TRAINED = (0.9, 0.4)


def column(name, *rows):
    """A column from the probability of model_a in each row, the same in both orders."""
    return Column(name, np.array([[[p, 1 - p]] * 2 for p in rows]), "float16")


def report(tolerance=0.05, labels=LABELS, winners=WINNERS, trained=TRAINED, **models):
    """The comparison of models with these probabilities; two rows decide the mean differences only."""
    named = {"recorded": trained, "trained": trained, **models}
    columns = [column(name.replace("_", "-"), *rows) for name, rows in named.items() if rows]
    groups_r = np.arange(len(labels))
    package = PackageBlock(slug="tiny-package", tolerance=tolerance, tolerance_log_loss=100.0, tolerance_verdicts=1.0)
    return compare(columns, ComparedRows(labels, winners, groups_r, {}), package)
