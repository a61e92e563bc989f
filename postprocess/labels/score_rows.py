"""Score rows with one trained run, some at a time, so that an interrupted call goes on where it was.

Rows are scored by the code that runs on Kaggle, with the model as training left it: an adapter on its
base, quantised if it was trained so. Nothing needs to be merged or packaged first. labels.py calls this.
"""

import shutil
from pathlib import Path

import numpy as np
import polars as pl
import torch
from tqdm import tqdm

from kaggle_kernels.runtime.models.scoring import ORDERS, score
from postprocess.agreement.reference_model import load_trained
from postprocess.run_folder import Run, checked_tokenizer
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, write_json
from recipes.pairwise.tracking import metrics

CHUNK_ROWS = 1000  # what an interrupted call loses at most
KEY = "key.json"


def score_rows(run: Run, rows: pl.DataFrame, key: dict, folder: Path) -> pl.DataFrame:
    """Score rows in both orders.

    Args:
        run: The trained run.
        rows: Rows of a pairs file.
        key: What the scores depend on. Chunks that were made with another key are made again.
        folder: Where the chunks are kept.

    Returns:
        The table of metrics.predictions.

    Raises:
        UserError: A probability is not finite.
    """
    if folder.is_dir() and (not (folder / KEY).is_file() or read_object(folder / KEY) != key):
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / KEY, key)

    # Long rows first: a batch that does not fit memory fails at once, and not after hours.
    characters = pl.sum_horizontal(
        pl.col(name).list.join("").str.len_chars()
        for name in ("prompt", "response_a", "response_b")
    )
    chunks = rows.sort(characters, descending=True, maintain_order=True).iter_slices(CHUNK_ROWS)

    model = None
    tables = []
    with tqdm(total=len(rows), desc=run.folder.name, unit=" pairs", mininterval=5) as progress:
        for number, chunk in enumerate(chunks):
            file = folder / f"rows-{number:05d}.parquet"
            if not file.is_file():
                # Nothing is loaded where every chunk is there already.
                if model is None:
                    device = "cuda" if torch.cuda.is_available() else "cpu"
                    model = load_trained(run, device)
                with atomic_file(file) as temporary:
                    score_chunk(run, model, chunk).write_parquet(temporary)
            tables.append(pl.read_parquet(file))
            progress.update(len(chunk))
    return pl.concat(tables)


def score_chunk(run: Run, model: torch.nn.Module, chunk: pl.DataFrame) -> pl.DataFrame:
    """Score some rows in both orders; the table is that of metrics.predictions."""
    contract = run.contract
    pairs = [run.model_input.pair_from_row(row) for row in chunk.iter_rows(named=True)]
    device = str(next(model.parameters()).device)
    try:
        scores = score(
            model, run.model_input, checked_tokenizer(run), contract, pairs, device=device
        )
    except FloatingPointError as error:
        raise UserError(f"{run.folder}: {error}; train the teacher again, in bf16") from None

    probabilities_rov = np.empty((len(pairs), len(ORDERS), len(contract.verdicts)))
    for row, pair in enumerate(pairs):
        for order_number, order in enumerate(ORDERS):
            probabilities_rov[row, order_number] = scores[pair.id][order]
    ids = [pair.id for pair in pairs]
    return metrics.predictions(ids, probabilities_rov, contract.verdicts, chunk)
