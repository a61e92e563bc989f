"""Score rows with one trained run, some at a time, so that an interrupted call goes on where it was.

Rows are scored by the code that runs on Kaggle, with the model as training left it: an adapter on its
base, quantised if it was trained so. Nothing needs to be merged or packaged first. labels.py calls this.
"""

import shutil
from pathlib import Path

import polars as pl
import torch
from tqdm import tqdm

from postprocess.agreement.model_scores import score_column
from postprocess.agreement.reference_model import load_trained
from postprocess.run_folder import Run, checked_tokenizer
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, write_json
from recipes.pairwise.tracking import metrics

TEXTS = ("prompt", "response_a", "response_b")
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
    key_file = folder / KEY
    is_of_key = key_file.is_file() and read_object(key_file) == key
    if folder.is_dir() and not is_of_key:
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(key_file, key)

    # Long rows first: rows that do not fit memory show at once, and not after hours.
    characters_by_text = []
    for name in TEXTS:
        characters_by_text.append(pl.col(name).list.join("").str.len_chars())
    characters = pl.sum_horizontal(characters_by_text)
    longest_first = rows.sort(characters, descending=True, maintain_order=True)

    model = None
    tokenizer = None
    tables = []
    with tqdm(total=len(rows), desc=run.folder.name, unit=" pairs", mininterval=5) as progress:
        for number, chunk in enumerate(longest_first.iter_slices(CHUNK_ROWS)):
            file = folder / f"rows-{number:05d}.parquet"
            if not file.is_file():
                # Nothing is loaded where every chunk is there already.
                if model is None:
                    device = "cuda" if torch.cuda.is_available() else "cpu"
                    model = load_trained(run, device)
                    tokenizer = checked_tokenizer(run)
                with atomic_file(file) as temporary:
                    score_chunk(run, model, tokenizer, chunk).write_parquet(temporary)
            tables.append(pl.read_parquet(file))
            progress.update(len(chunk))
    return pl.concat(tables)


def score_chunk(run: Run, model: torch.nn.Module, tokenizer, chunk: pl.DataFrame) -> pl.DataFrame:
    """Score some rows in both orders.

    Args:
        run: The trained run.
        model: Its model.
        tokenizer: Its tokenizer.
        chunk: Rows of a pairs file.

    Returns:
        The table of metrics.predictions.
    """
    pairs = [run.model_input.pair_from_row(row) for row in chunk.iter_rows(named=True)]
    try:
        column = score_column(run.folder.name, model, run, tokenizer, pairs)
    except FloatingPointError as error:
        raise UserError(f"{run.folder}: {error}; train the teacher again, in bf16") from None
    ids = chunk["id"].to_list()
    return metrics.predictions(ids, column.probabilities_rov, run.contract.verdicts, chunk)
