"""Files of any accepted format as rows of plain Python values: Parquet, CSV (every value a string) and JSONL.

`open_table` reads nothing but what it must to know the columns are there; a file that cannot be read is a UserError that
names it. Row numbers count data rows from 1; in JSONL they are line numbers, and a line that is no JSON object is `None`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from preprocess.core.errors import UserError

ROWS_AT_ONCE = 2048
SUFFIXES = (".parquet", ".csv", ".jsonl")


@dataclass(frozen=True)
class Table:
    """A readable file: its columns, its number of rows, and the rows themselves, as a frame or as parsed JSON lines."""

    path: Path
    columns: tuple[str, ...]
    height: int
    frame: pl.DataFrame | None
    lines: tuple[tuple[int, dict | None, str], ...] = ()

    def rows(self, columns: tuple[str, ...] | None = None) -> Iterator[tuple[int, dict | None, str]]:
        """(row number, values by column, the raw line where there is one) of every row; only `columns`, where given."""
        if self.frame is None:
            yield from self.lines
            return
        frame = self.frame if columns is None else self.frame.select(columns)
        number = 0
        for part in frame.iter_slices(ROWS_AT_ONCE):
            for values in part.iter_rows(named=True):
                number += 1
                yield number, values, ""


def open_table(path: Path | str) -> Table:
    """Open a Parquet, CSV or JSONL file; a missing, unreadable or empty one is a UserError."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path}: no such file")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)} (unpack an archive first)")
    try:
        table = _json_lines(path) if path.suffix == ".jsonl" else _frame(path)
    except (pl.exceptions.PolarsError, OSError, UnicodeDecodeError) as error:
        first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path}: cannot be read as {path.suffix[1:]} ({first_line}); fetch or export it again") from None
    if not table.height:
        raise UserError(f"{path}: holds no rows; fetch or export it again")
    return table


def _frame(path: Path) -> Table:
    if path.suffix == ".csv":
        frame = pl.read_csv(path, infer_schema=False)
    else:
        frame = pl.read_parquet(path, use_pyarrow=False, glob=False)
    return Table(path, tuple(frame.columns), frame.height, frame)


def _json_lines(path: Path) -> Table:
    lines, columns = [], {}
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            values = _json_object(line)
            columns |= dict.fromkeys(values or ())
            lines.append((number, values, line.rstrip("\n")))
    return Table(path, tuple(columns), len(lines), None, tuple(lines))


def _json_object(line: str) -> dict | None:
    try:
        values = json.loads(line)
    except (json.JSONDecodeError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
