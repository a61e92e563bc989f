"""Kaggle's folder tree for one rehearsal: what a kernel sees below /kaggle.

input/datasets/owner/DATASET/        each package
input/competitions/COMPETITION/      the test file, and the train file in the visible run
working/                             empty; the kernel writes its results there
"""

from collections.abc import Mapping
from pathlib import Path

import polars as pl

from kaggle_kernels.build.spec import Spec
from kaggle_kernels.runtime.inputs import SCORED
from kaggle_kernels.runtime.package import NOT_MOUNTED
from preprocess.competitions import COMPETITIONS
from preprocess.sources.rows import TEXTS


def lay_out_tree(
    root: Path,
    spec: Spec,
    packages: Mapping[str, Path],
    suffix: str,
    test_rows: pl.DataFrame,
    train_file: Path | None = None,
) -> None:
    """Make the tree in the new folder `root`, which stands for /kaggle; `packages` are folders by dataset.

    The test file has the ids, texts and `scored` of the test rows, in CSV for the suffix ".csv" and else in Parquet.
    A train file is for the visible run.
    """
    # Kaggle mounts each package as a dataset.
    for dataset, package in packages.items():
        mount = root / "input" / "datasets" / "owner" / dataset
        mount.mkdir(parents=True)
        for path in package.iterdir():
            if path.name not in NOT_MOUNTED:
                (mount / path.name).symlink_to(path.absolute())

    competition = root / "input" / "competitions" / COMPETITIONS[spec.competition].slug
    competition.mkdir(parents=True)

    # The kernel must not see verdicts, which a train file used as the test file has.
    optional_columns = [name for name in (SCORED,) if name in test_rows.columns]
    visible_columns = test_rows.select("id", *TEXTS, *optional_columns)
    if suffix == ".csv":
        visible_columns.write_csv(competition / "test.csv")
    else:
        visible_columns.write_parquet(competition / "test.parquet")

    if train_file is not None:
        (competition / f"train{train_file.suffix}").symlink_to(train_file.absolute())

    (root / "working").mkdir()
