"""The two passes over the sources, batch by batch, so that their texts are never held in memory at once.

`python -m preprocess` reads the facts of all rows first. When pairs have been made of these and checked,
it reads the sources again, and writes each batch's pairs and rejected rows.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyarrow import parquet

from preprocess.core.errors import UserError
from preprocess.core.progress import show_progress
from preprocess.facts import extract_facts
from preprocess.pairs import PAIRS, REJECTED, Pairs
from preprocess.sources.reader import read_batches
from preprocess.sources.rows import TEXTS

# Columns of few different values, which Parquet stores as a dictionary.
REPETITIVE_COLUMNS = ["winner", "language", "source", "role"]


@dataclass(frozen=True)
class Source:
    """A file that is read, and the role of its rows."""

    path: Path
    role: str


def read_sources(sources: Iterable[Source], verb: str) -> Iterator[pl.DataFrame]:
    """Read all sources in batches with a column `position`, which counts the rows of all of them from 0."""
    rows_before = 0
    for source in sources:
        batches = read_batches(source.path, source.role)
        for batch in show_progress(batches, f"{verb} {source.path.name}"):
            yield batch.with_row_index("position", rows_before)
            rows_before += batch.height
            # PyArrow would keep the memory of most batches for itself.
            pa.default_memory_pool().release_unused()


def read_facts(sources: Iterable[Source]) -> pl.DataFrame:
    """Read all sources, and keep of each row its position and the columns facts.FACTS."""
    return pl.concat(extract_facts(batch) for batch in read_sources(sources, "reading"))


def write_pairs(
    sources: Iterable[Source],
    pairs: Pairs,
    out: Path,
    rejected: Path,
) -> None:
    """Read the sources again, and write the pairs, and the rows that were rejected or dropped.

    Raises:
        UserError: A source was changed meanwhile.
    """
    pairs_written = 0
    with (
        _open_writer(out, PAIRS.names()) as pair_file,
        _open_writer(rejected, REJECTED) as rejected_file,
    ):
        # Each batch has some of the pairs, and some of the rejected rows.
        for batch in read_sources(sources, "writing pairs of"):
            pairs_of_batch = select_pairs(batch, pairs.table)
            pairs_written += pairs_of_batch.height
            _write_rows(pair_file, pairs_of_batch)
            _write_rows(rejected_file, select_rejected(batch, pairs.dropped))

    # The second reading must find every pair again at the position of the first.
    if pairs_written != pairs.table.height:
        raise UserError(
            "a source was changed while it was read; run this again when it is complete"
        )


def select_pairs(rows: pl.DataFrame, pairs: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs that are among some rows, with their texts: a frame of the schema PAIRS."""
    # A pair has the position of its first row, whose texts are its own. The join leaves out all
    # other rows, since it keeps only positions that both frames have.
    texts = rows.select("position", *TEXTS)
    decisions = _select_positions(pairs, rows)
    return texts.join(decisions, on="position", maintain_order="left").select(PAIRS.names())


def select_rejected(rows: pl.DataFrame, dropped: pl.DataFrame) -> pl.DataFrame:
    """Return those of some rows that cannot be used, and those that were dropped: the columns REJECTED."""
    unusable = rows.filter(pl.col("reason").is_not_null())

    # Dropped rows get their texts back. The join keeps only positions that both frames have.
    texts = rows.select("position", *TEXTS)
    dropped_here = _select_positions(dropped, rows)
    dropped_rows = texts.join(dropped_here, on="position")

    # Both kinds, in the order of the source.
    columns = ["position", *REJECTED]
    both = pl.concat([unusable.select(columns), dropped_rows.select(columns)])
    return both.sort("position").select(REJECTED)


def _select_positions(table: pl.DataFrame, rows: pl.DataFrame) -> pl.DataFrame:
    """Return the part of a table that is about a batch of rows."""
    first = rows["position"].min()
    last = rows["position"].max()
    return table.filter(pl.col("position").is_between(first, last))


def _open_writer(path: Path, columns: Iterable[str]) -> parquet.ParquetWriter:
    """Open a Parquet file of columns of pairs or rejected rows."""
    types = {"file": pl.String, "row": pl.Int64, "reason": pl.String} | dict(PAIRS)
    empty = pl.DataFrame(schema={name: types[name] for name in columns})
    schema = empty.to_arrow(compat_level=pl.CompatLevel.oldest()).schema
    return parquet.ParquetWriter(
        path, schema, compression="zstd", compression_level=1, use_dictionary=REPETITIVE_COLUMNS
    )


def _write_rows(file: parquet.ParquetWriter, rows: pl.DataFrame) -> None:
    """Write a batch of rows as a row group, unless it is empty."""
    if not rows.is_empty():
        file.write_table(rows.to_arrow(compat_level=pl.CompatLevel.oldest()))
