"""Source files written and read in one piece, for the tests of this folder."""

import json

import polars as pl

from preprocess.sources.reader import read_batches


def read_rows(path, role: str = "train") -> pl.DataFrame:
    return pl.concat(read_batches(path, role))


def jsonl(path, *rows):
    """Write rows, or lines as they are, to a file, and return its path."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path
