"""Opening source files: Parquet, CSV (every value a string) and JSONL become rows of Python values.

Only reader.py and the layouts use this. It knows file formats, and nothing of what columns mean.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from preprocess.core.errors import UserError

SUFFIXES = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class TableRow:
    """One row of a file."""

    number: int  # counts data rows from 1; in JSONL it is the number of the line
    values: dict | None  # by column; None for a line of JSONL that is not an object
    line: str = ""  # that line, for a message


@dataclass(frozen=True)
class Table:
    """A file that can be read: a Parquet or CSV file as a frame, or the parsed lines of a JSONL file."""

    path: Path
    columns: tuple[str, ...]
    height: int
    frame: pl.DataFrame | None = None
    json_rows: tuple[TableRow, ...] = ()

    def rows(self) -> Iterator[TableRow]:
        """Yield every row of the file, in its order."""
        if self.frame is None:
            yield from self.json_rows
            return

        for number, values in enumerate(self.frame.iter_rows(named=True), 1):
            yield TableRow(number, values)

    def holds_text(self, column: str) -> bool:
        """Return whether a column is known to hold only strings; that of a JSONL file never is."""
        return self.frame is not None and self.frame.schema.get(column) == pl.String


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

    try:
        table = _read_json_lines(path) if path.suffix == ".jsonl" else _read_frame(path)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        # Polars' messages have several lines, of which the first says what is wrong.
        message_lines = str(error).strip().splitlines()
        message = message_lines[0] if message_lines else type(error).__name__
        raise UserError(
            f"{path}: cannot be read as {path.suffix[1:]} ({message}); fetch or export it again"
        ) from None

    if table.height == 0:
        raise UserError(f"{path}: holds no rows; fetch or export it again")
    return table


def _read_frame(path: Path) -> Table:
    if path.suffix == ".csv":
        # Inferred types would turn the id 007 into 7.
        frame = pl.read_csv(path, infer_schema=False)
    else:
        frame = pl.read_parquet(path, use_pyarrow=False, glob=False)
    return Table(path, tuple(frame.columns), frame.height, frame=frame)


def _read_json_lines(path: Path) -> Table:
    rows = []
    # Lines may differ in their keys; a dict keeps these in the order of appearance.
    columns: dict[str, None] = {}

    with open(path, encoding="utf-8") as file:
        for line_number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                values = None
            if isinstance(values, dict):
                columns.update(dict.fromkeys(values))
            else:
                values = None
            rows.append(TableRow(line_number, values, line.rstrip("\n")))

    return Table(path, tuple(columns), len(rows), json_rows=tuple(rows))
