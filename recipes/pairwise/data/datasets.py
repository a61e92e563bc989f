"""pairs.parquet → the datasets of a run: both orders of every pair tokenised once, cached beside the run."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
from datasets import Dataset, Features, List, Value, concatenate_datasets, load_from_disk
from filelock import FileLock
from tqdm import tqdm

from preprocess.core.errors import UserError
from preprocess.core.files import atomic_folder, sha256
from preprocess.model_input import Contract, encode_all, pair_from_row, swap

COLUMNS = (
    "id",
    "prompt",
    "response_a",
    "response_b",
    "winner",
    "fold",
    "weight",
    "p_model_a",
    "p_model_b",
    "p_tie",
)
FIXED_SAMPLE_ROWS = 500
CHUNK_ROWS = 1000
FEATURES = Features(
    {
        "id": Value("string"),
        "sequences": List(List(Value("int32"))),
        "labels": List(Value("float32")),
        "winner": Value("int8"),
        "weight": Value("float32"),
        "length": Value("int32"),
    }
)


def read_pairs(path: Path | str) -> pl.DataFrame:
    """The rows of a pairs.parquet, its columns checked."""
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file; make it with python -m preprocess SOURCE --out {path}"
        )
    try:
        frame = pl.read_parquet(path)
    except pl.exceptions.PolarsError as error:
        raise UserError(f"{path}: not a Parquet file ({str(error).splitlines()[0]})") from None
    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; it was not written by python -m preprocess"
        )
    return frame


def split(
    frame: pl.DataFrame, fold: int | str, path: Path | str
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Training and validation rows. Fold "all" trains on everything and validates on a fixed sample of it."""
    if fold == "all":
        order = frame["id"].map_elements(
            lambda row_id: hashlib.sha256(row_id.encode()).hexdigest(), return_dtype=pl.String
        )
        return frame, frame[order.arg_sort()[:FIXED_SAMPLE_ROWS]]
    folds = sorted(frame["fold"].unique())
    if fold not in folds or len(folds) < 2:
        raise UserError(
            f"{path}: pairwise.fold is {fold}, but the folds in the file are {', '.join(map(str, folds))}"
        )
    return frame.filter(pl.col("fold") != fold), frame.filter(pl.col("fold") == fold)


def targets(frame: pl.DataFrame, verdicts: tuple[str, ...]) -> np.ndarray:
    """Target probabilities, float32 of shape (rows, verdicts). Without a verdict for ties, half of a tie goes to each side."""
    shares = {
        verdict: frame[f"p_{verdict}"].to_numpy() for verdict in ("model_a", "model_b", "tie")
    }
    if "tie" not in verdicts:
        shares["model_a"] = shares["model_a"] + shares["tie"] / 2
        shares["model_b"] = shares["model_b"] + shares["tie"] / 2
    return np.stack([shares[verdict] for verdict in verdicts], axis=1).astype(np.float32)


def winners(frame: pl.DataFrame, verdicts: tuple[str, ...]) -> np.ndarray:
    """The place among `verdicts` of each row's winner, int8 (rows,); -1 where it is none of them (a tie for a model of two)."""
    places = pl.col("winner").replace_strict(
        {verdict: place for place, verdict in enumerate(verdicts)}, default=-1
    )
    return frame.select(places.cast(pl.Int8)).to_series().to_numpy()


def tokenise(frame: pl.DataFrame, tokenizer, contract: Contract, what: str) -> Dataset:
    """Tokenise pairs into a dataset of one row a pair, see FEATURES.

    The sequences are the pair in both orders, or for the reward head the prompt with each response; `winner` is its place among
    the verdicts, the weights are 1 on average, and `length` is that of the longer sequence.
    """
    parts = []
    labels, places = targets(frame, contract.verdicts), winners(frame, contract.verdicts)
    weights = (frame["weight"] / frame["weight"].mean()).to_numpy()
    with tqdm(
        total=len(frame), desc=f"tokenising {what}", unit=" pairs", mininterval=5
    ) as progress:
        for start in range(0, len(frame), CHUNK_ROWS):
            chunk = frame[start : start + CHUNK_ROWS]
            pairs = [pair_from_row(row) for row in chunk.iter_rows(named=True)]
            sequences = encode_all(pairs, tokenizer, contract)
            if contract.head != "reward":
                swapped = encode_all([swap(pair) for pair in pairs], tokenizer, contract)
                sequences = [one + other for one, other in zip(sequences, swapped, strict=True)]
            columns = {
                "id": chunk["id"].to_list(),
                "sequences": [list(both) for both in sequences],
                "labels": labels[start : start + CHUNK_ROWS].tolist(),
                "winner": places[start : start + CHUNK_ROWS].tolist(),
                "weight": weights[start : start + CHUNK_ROWS].tolist(),
                "length": [max(map(len, both)) for both in sequences],
            }
            parts.append(Dataset.from_dict(columns, features=FEATURES))
            progress.update(len(chunk))
    return concatenate_datasets(parts)


def datasets_of(
    pairs: Path, fold: int | str, tokenizer, contract: Contract, cache: Path
) -> tuple[Dataset, Dataset]:
    """Training and validation datasets; validation longest first, so that a batch that does not fit fails first.

    The first process to come tokenises and writes the cache, the others wait and read it. The cache's name is a hash of
    everything that decides its content, so that a stale one is never read.
    """
    frame = read_pairs(pairs)
    train, validation = split(frame, fold, pairs)
    settings = {
        name: value
        for name, value in asdict(contract).items()
        if name not in ("golden", "recorded", "base_model")
    }
    tokenizer_bytes = tokenizer.backend_tokenizer.to_str().encode()
    facts = [
        sha256(pairs),
        fold,
        settings,
        hashlib.sha256(tokenizer_bytes).hexdigest(),
        list(FEATURES),
    ]
    key = json.dumps(facts, sort_keys=True)
    folder = cache / hashlib.sha256(key.encode()).hexdigest()[:16]
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not folder.exists():
            with atomic_folder(folder) as temporary:
                tokenise(train, tokenizer, contract, "training pairs").save_to_disk(
                    temporary / "train"
                )
                longest_first = tokenise(validation, tokenizer, contract, "validation pairs").sort(
                    "length", reverse=True
                )
                longest_first.save_to_disk(temporary / "validation")
    return load_from_disk(folder / "train"), load_from_disk(folder / "validation")
