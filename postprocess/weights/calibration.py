"""The training rows that GPTQ and SmoothQuant calibrate on, as token ids.

They go through the run's own model_input.py. None of them is a row that the package is checked on,
unless every row is trained on and checked (fold: all of a small file).
"""

import polars as pl

from postprocess.agreement.validation_rows import by_hash
from postprocess.run_folder import Run, checked_tokenizer
from preprocess.core.errors import UserError
from recipes.pairwise.data.datasets import read_pairs, split

ROWS = 256


def choose_calibration_rows(run: Run, seed: int = 0) -> pl.DataFrame:
    """Choose up to 256 training rows on which a quantiser calibrates its rounding.

    Rows in predictions.parquet are left out: packages are checked on these, and calibrating on them would
    flatter the package. The only exception is a small pairs file without a held-out fold (fold `all`), all
    of whose rows are in there: then any row is taken. Another seed draws other rows.

    Raises:
        UserError: A fold is held out, and yet every other row is one of those checked.
    """
    pairs_file, predictions = run.validation_files()
    fold = run.recipe.pairwise.fold
    training_rows, _ = split(read_pairs(pairs_file), fold, pairs_file)
    checked_rows = pl.read_parquet(predictions, columns=["id"])

    rows = training_rows.join(checked_rows, on="id", how="anti")
    if rows.is_empty() and fold == "all":
        rows = training_rows
    if rows.is_empty():
        raise UserError(
            f"{pairs_file}: no row is left to calibrate on, because every row outside fold {fold} is in {predictions}; "
            "set pairwise.fold as it was in training"
        )

    chosen_ids = pl.DataFrame({"id": by_hash(rows["id"], ROWS, salt=f"{seed}:")})
    return chosen_ids.join(rows, on="id", how="left", maintain_order="left")


def encode_calibration_rows(run: Run, rows: pl.DataFrame) -> list[list[int]]:
    """Encode rows as the token ids that the model reads.

    Returns:
        The token ids of each sequence. A reward model reads the two responses of a row in two sequences.
    """
    # In every second row the responses are swapped: the packaged model will meet both orders too.
    pairs = []
    for number, row in enumerate(rows.iter_rows(named=True)):
        pair = run.model_input.pair_from_row(row)
        is_swapped = number % 2 == 1
        pairs.append(run.model_input.swap(pair) if is_swapped else pair)

    sequences = []
    for encoded in run.model_input.encode_all(pairs, checked_tokenizer(run), run.contract):
        for ids in encoded:
            sequences.append(list(ids))
    return sequences
