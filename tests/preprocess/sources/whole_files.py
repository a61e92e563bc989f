"""A source file read in one piece, for the tests of this folder."""

import polars as pl

from preprocess.sources.reader import read_batches


def read_rows(path, role: str = "train") -> pl.DataFrame:
    return pl.concat(read_batches(path, role))
