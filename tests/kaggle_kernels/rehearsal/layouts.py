"""A spec, and test rows in LMSYS's layout, which several tests of the rehearsal need."""

import json

import polars as pl

from kaggle_kernels.build.spec import Spec
from preprocess.model_input import VERDICTS
from preprocess.sources.rows import TEXTS

SPEC = Spec(title="Pairwise Test", competition="wsdm", packages=[{"run": "two", "dataset": "tiny-two"}], clock_seconds=600)
FLAGS = [f"winner_{verdict}" for verdict in VERDICTS]


def in_lmsys_layout(table: pl.DataFrame) -> pl.DataFrame:
    """WSDM's rows with numbers as ids, texts as JSON lists of turns, and a column of 0 and 1 for each verdict."""
    flags = [(pl.col("winner") == verdict).cast(pl.Int8).alias(f"winner_{verdict}") for verdict in VERDICTS]
    texts = [pl.Series(name, [json.dumps([text]) for text in table[name]]) for name in TEXTS]
    return table.with_columns(*flags, *texts, id=pl.int_range(pl.len())).drop("winner")
