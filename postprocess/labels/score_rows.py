"""Score rows with one trained run, some at a time, so that an interrupted call goes on where it was.

Rows are scored by the code that runs on Kaggle, with the model as training left it: an adapter on its
base, quantised if it was trained so. Nothing needs to be merged or packaged first. labels.py calls this.
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
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


@dataclass(frozen=True)
class Chunk:
    """Rows that are scored together, and the file that will hold their scores."""

    file: Path
    rows: pl.DataFrame


class ChunkScorer:
    """A trained run with its model in memory, which scores one chunk after the other."""

    def __init__(self, run: Run):
        """Load the run's model onto the GPUs, or onto the CPU where there is none."""
        self.run = run
        self.model = load_trained(run)
        self.tokenizer = checked_tokenizer(run)

    def write_scores(self, chunk: Chunk) -> None:
        """Score a chunk in both orders, and write its file: the table of metrics.predictions.

        Raises:
            UserError: A probability is not finite.
        """
        run = self.run
        # The run's own code makes the token ids, as in training.
        pairs = [run.model_input.pair_from_row(row) for row in chunk.rows.iter_rows(named=True)]
        try:
            column = score_column(run.folder.name, self.model, run, self.tokenizer, pairs)
        except FloatingPointError as error:
            raise UserError(f"{run.folder}: {error}; train the teacher again, in bf16") from None

        ids = chunk.rows["id"].to_list()
        table = metrics.predictions(
            ids, column.probabilities_rov, run.contract.verdicts, chunk.rows
        )
        with atomic_file(chunk.file) as temporary:
            table.write_parquet(temporary)


def score_rows(
    run: Run, rows: pl.DataFrame, key: dict, folder: Path, ray_workers: int = 0
) -> pl.DataFrame:
    """Score rows in both orders, into the table of metrics.predictions.

    The rows are scored in chunks, each with a file in `folder`, so that an interrupted call can go on.
    `key` is what the scores depend on: chunks that were made with another key are made again.

    Raises:
        UserError: A probability is not finite.
    """
    prepare_folder(folder, key)
    chunks = list_chunks(rows, folder)
    missing_chunks = [chunk for chunk in chunks if not chunk.file.is_file()]
    rows_missing = sum(len(chunk.rows) for chunk in missing_chunks)

    # Nothing is loaded where every chunk is there already.
    if missing_chunks:
        with tqdm(total=len(rows), desc=run.folder.name, unit=" pairs", mininterval=5) as progress:
            progress.update(len(rows) - rows_missing)
            for rows_scored in score_chunks(run, missing_chunks, ray_workers):
                progress.update(rows_scored)

    return pl.concat([pl.read_parquet(chunk.file) for chunk in chunks])


def prepare_folder(folder: Path, key: dict) -> None:
    """Make a folder for chunks that depend on a key; chunks of another key are removed."""
    key_file = folder / KEY
    has_same_key = key_file.is_file() and read_object(key_file) == key
    if folder.is_dir() and not has_same_key:
        shutil.rmtree(folder)

    # Chunks come after their key: a kill leaves none without it.
    folder.mkdir(parents=True, exist_ok=True)
    write_json(key_file, key)


def list_chunks(rows: pl.DataFrame, folder: Path) -> list[Chunk]:
    """Cut rows into chunks, each with its file in the folder.

    Long rows come first: rows that do not fit memory show at once, and not after hours.
    """
    characters_of_texts = [pl.col(name).list.join("").str.len_chars() for name in TEXTS]
    characters = pl.sum_horizontal(characters_of_texts)
    longest_first = rows.sort(characters, descending=True, maintain_order=True)

    chunks = []
    for number, chunk_rows in enumerate(longest_first.iter_slices(CHUNK_ROWS)):
        chunks.append(Chunk(folder / f"rows-{number:05d}.parquet", chunk_rows))
    return chunks


def score_chunks(run: Run, chunks: Sequence[Chunk], ray_workers: int) -> Iterator[int]:
    """Score chunks here or with Ray, and yield the number of rows of each one that is done."""
    if ray_workers:
        from postprocess.labels.ray_scoring import score_with_ray  # noqa: PLC0415  slow to import

        yield from score_with_ray(run, chunks, ray_workers)
        return

    scorer = ChunkScorer(run)
    for chunk in chunks:
        scorer.write_scores(chunk)
        yield len(chunk.rows)
