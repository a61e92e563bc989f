"""Opening source files: Parquet, CSV (every value a string) and JSONL become rows of Python values.

Only reader.py and the layouts use this. It knows file formats, and nothing of what columns mean. Files
are streamed, so that they may be larger than memory.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
from pyarrow import parquet

from preprocess.core.errors import UserError

SUFFIXES = (".parquet", ".csv", ".jsonl")
BATCH_ROWS = 2048

# A panic of Polars is no Exception.
READ_ERRORS = (
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    pa.ArrowException,
    OSError,
    OverflowError,
    UnicodeError,
)


@dataclass(frozen=True)
class TableRow:
    """One row of a file."""

    number: int  # counts data rows from 1; in JSONL it is the number of the line
    values: dict | None  # by column; None for a line of JSONL that is not an object
    line: str = ""  # that line, for a message


@dataclass(frozen=True)
class Table:
    """A file that can be read, as often as need be."""

    path: Path
    columns: tuple[str, ...]
    height: int

    def rows(self, columns: tuple[str, ...]) -> Iterator[TableRow]:
        """Yield every row of the file, in its order, with these columns at least."""
        with _reporting_damage(self.path):
            if self.path.suffix == ".jsonl":
                yield from _read_json_lines(self.path)
            elif self.path.suffix == ".csv":
                yield from _read_csv_rows(self.path)
            else:
                yield from _read_parquet_rows(self.path, columns)


def open_table(path: Path | str) -> Table:
    """Open a Parquet, CSV or JSONL file; raise UserError if it is missing, unreadable or empty."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise UserError(
            f"{path}: unknown kind of file; "
            f"expected {', '.join(SUFFIXES)} (unpack an archive first)"
        )

    with _reporting_damage(path):
        if path.suffix == ".jsonl":
            table = _inspect_json_lines(path)
        elif path.suffix == ".csv":
            table = _inspect_csv(path)
        else:
            table = _inspect_parquet(path)

    if table.height == 0:
        raise UserError(f"{path}: holds no rows; fetch or export it again")
    return table


@contextlib.contextmanager
def _reporting_damage(path: Path) -> Iterator[None]:
    """Turn the errors of a file that cannot be read into a UserError."""
    try:
        yield
    except READ_ERRORS as error:
        # The messages have several lines, of which the first says what is wrong.
        message_lines = str(error).strip().splitlines()
        message = message_lines[0] if message_lines else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as {path.suffix[1:]} ({message}); fetch or export it again"
        ) from None


def _inspect_parquet(path: Path) -> Table:
    with parquet.ParquetFile(path) as file:
        return Table(path, tuple(file.schema_arrow.names), file.metadata.num_rows)


def _read_parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[TableRow]:
    number = 0
    with parquet.ParquetFile(path) as file:
        present = [name for name in file.schema_arrow.names if name in columns]
        for batch in file.iter_batches(BATCH_ROWS, columns=present):
            for values in batch.to_pylist():
                number += 1
                yield TableRow(number, values)


def _scan_csv(path: Path) -> pl.LazyFrame:
    # Inferred types would turn the id 007 into 7.
    return pl.scan_csv(path, infer_schema=False)


def _inspect_csv(path: Path) -> Table:
    columns = tuple(_scan_csv(path).collect_schema().names())
    height = _scan_csv(path).select(pl.len()).collect().item()
    return Table(path, columns, height)


def _read_csv_rows(path: Path) -> Iterator[TableRow]:
    number = 0
    for frame in _scan_csv(path).collect_batches(chunk_size=BATCH_ROWS, maintain_order=True):
        for values in frame.iter_rows(named=True):
            number += 1
            yield TableRow(number, values)


def _inspect_json_lines(path: Path) -> Table:
    """Find the columns of a JSONL file, which are the keys of all its lines, and count its rows."""
    # A dict, unlike a set, keeps the keys in the order in which they appear.
    columns: dict[str, None] = {}
    height = 0
    for row in _read_json_lines(path):
        height += 1
        columns.update(dict.fromkeys(row.values or ()))

    if height > 0 and not columns:
        raise UserError(
            f"{path}: none of its {height:,} lines is a JSON object with keys; "
            "fetch or export it again"
        )
    return Table(path, tuple(columns), height)


def _read_json_lines(path: Path) -> Iterator[TableRow]:
    """Yield the lines of a JSONL file; one that is no JSON object has no values."""
    with open(path, encoding="utf-8") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                values = None
            if not isinstance(values, dict):
                values = None
            yield TableRow(line_number, values, line.rstrip("\n"))
