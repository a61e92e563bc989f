"""A cross-validation, which the tests of reading and of the page share."""

import pytest

from recipes.pairwise.cv import collect
from tests.postprocess.report import reported
from tests.postprocess.report.reported import ALL_METRICS, FOUR, Row


@pytest.fixture
def crossed(tmp_path):
    """A cross-validation of two folds, joined as `make cv` does it."""
    rows = [Row(row.given, row.swapped, row.winner, fold=number % 2) for number, row in enumerate(FOUR)]
    for fold in (0, 1):
        reported.write_run(tmp_path / f"R/fold-{fold}", rows, pairs=tmp_path / "pairs.parquet", fold=fold, **ALL_METRICS)
    collect(tmp_path / "R", [0, 1], tmp_path / "pairs.parquet")
    return tmp_path / "R"
