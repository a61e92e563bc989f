"""pairs.parquet → the datasets of a run: both orders of every pair tokenised once, cached beside the run."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
from datasets import Dataset, Features, List, Value, load_from_disk
from datasets.arrow_writer import ArrowWriter
from filelock import FileLock
from tqdm import tqdm

from preprocess.core.errors import UserError
from preprocess.core.files import atomic_folder, sha256
from preprocess.model_input import Contract, encode_all, pair_from_row, swap
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.data.teacher_labels import hash_labels, read_teachers

# What a run reads of a pairs.parquet; role and group may be absent in files of an earlier version.
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
FIXED_SAMPLE_ROWS = 500  # of fold "all", whose validation rows are trained on too
CHUNK_ROWS = 1000  # that are tokenised at once
CACHE_NAME_LENGTH = 16  # hexadecimal digits
TRAINING_FILE = "training.arrow"
VALIDATION_FOLDER = "validation"
FEATURES = Features(
    {
        "id": Value("string"),
        "sequences": List(List(Value("int32"))),  # token ids, see encode_rows
        "labels": List(Value("float32")),  # shares of the human votes, in the order as given
        "winner": Value("int8"),  # its place among the verdicts
        "teacher": List(Value("float32")),  # the teachers' probabilities; empty without teachers
        "weight": Value("float32"),  # how much the pair counts in the loss; 1 on average
        "length": Value("int32"),  # tokens of the longer sequence
        "tokens": Value("int32"),  # tokens of both sequences
    }
)


def read_pairs(path: Path | str) -> pl.DataFrame:
    """Read a pairs.parquet. In a file without roles, every row is a training row.

    Raises:
        UserError: It is absent or damaged, or lacks a column.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            f"{path}: no such file; make it with python -m preprocess SOURCE --out {path}"
        )

    try:
        frame = pl.read_parquet(path)
    # Polars panics at a damaged page, and its panic is no subclass of Exception.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file ({first_line})") from None

    missing_columns = [column for column in COLUMNS if column not in frame.columns]
    if missing_columns:
        listed = ", ".join(missing_columns)
        raise UserError(f"{path}: no column {listed}; it was not written by python -m preprocess")

    if "role" not in frame.columns:
        frame = frame.with_columns(role=pl.lit("train"))
    return frame


def split(
    frame: pl.DataFrame, fold: int | str, path: Path | str, with_pool: bool = False
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split pairs into training and validation rows, by their roles and folds.

    | role  | trained on, outside the fold | validated on, inside the fold |
    |-------|------------------------------|-------------------------------|
    | train | yes                          | yes                           |
    | extra | yes                          | no                            |
    | pool  | with `with_pool`             | no                            |
    | test  | no                           | no                            |

    Rows with similar prompts have the same fold. So no row of the fold that is held out is trained on,
    whatever its role: its prompt may be like that of a validation row.

    Args:
        frame: As read_pairs gives it.
        fold: The fold to hold out; "all" trains on every row, and validates on a sample of them that is
            the same whatever the order of the rows.
        path: The file, for the message.
        with_pool: Also train on the rows of the pool, which have no votes.

    Raises:
        UserError: If there is no such fold, or no other one, or a row to train on shares its prompt
            with a row of the lockbox.
    """
    training_roles = ["train", "extra"]
    if with_pool:
        training_roles.append("pool")
    trainable = frame.filter(pl.col("role").is_in(training_roles))
    check_lockbox(frame, trainable, path)

    # Metrics compare with human votes on rows of the competition itself, which have the role train.
    human_votes = frame.filter(role="train")
    if fold == "all":
        sample = _order_by_hash(human_votes["id"])[:FIXED_SAMPLE_ROWS]
        return trainable, human_votes[sample]

    folds = list_folds(frame)
    if fold not in folds or len(folds) < 2:
        listed = ", ".join(str(number) for number in folds)
        raise UserError(f"{path}: pairwise.fold is {fold}, but the folds in the file are {listed}")

    is_held_out = pl.col("fold") == fold
    return trainable.filter(~is_held_out), human_votes.filter(is_held_out)


def check_lockbox(frame: pl.DataFrame, trainable: pl.DataFrame, path: Path | str) -> None:
    """Check that no row to train on has a prompt like one of the lockbox, which are the rows of the role test."""
    lockbox = frame.filter(role="test")
    if lockbox.is_empty():
        return

    # Rows whose prompts are alike have the same group. Polars' is_in takes the groups of the lockbox as
    # one list, which implode makes of the column.
    lockbox_groups = lockbox["group"].implode()
    leaks = trainable.filter(pl.col("group").is_in(lockbox_groups))
    if not leaks.is_empty():
        raise UserError(
            f"{path}: {leaks['id'][0]} (role {leaks['role'][0]}) has a prompt like one of the lockbox; make the file "
            "again with python -m preprocess, which drops such rows"
        )


def list_folds(frame: pl.DataFrame) -> list[int]:
    """List the folds that pairs are validated in."""
    return sorted(frame.filter(role="train")["fold"].unique())


def _order_by_hash(ids: pl.Series) -> pl.Series:
    """Return the row numbers in the order of the hashes of their ids, whatever order the file has them in."""

    def hash_id(row_id: str) -> str:
        return hashlib.sha256(row_id.encode()).hexdigest()

    return ids.map_elements(hash_id, return_dtype=pl.String).arg_sort()


def targets(frame: pl.DataFrame, verdicts: tuple[str, ...]) -> np.ndarray:
    """Return what the model is to predict for each row: the shares of the human votes.

    Votes of 0.5 for A, 0.3 for B and 0.2 for a tie are 0.6 and 0.4 to a model without the verdict tie.

    Returns:
        Probabilities, float32 of shape (rows, verdicts). A pool row, which has no votes, has zeros.
    """
    # The shares are null where there are no votes.
    shares = frame.select(pl.col("p_model_a", "p_model_b", "p_tie").fill_null(0.0))

    if "tie" not in verdicts:
        half_of_tie = pl.col("p_tie") / 2
        shares = shares.with_columns(pl.col("p_model_a", "p_model_b") + half_of_tie)

    columns = [f"p_{verdict}" for verdict in verdicts]
    return shares.select(columns).to_numpy().astype(np.float32)


def winners(frame: pl.DataFrame, verdicts: tuple[str, ...]) -> np.ndarray:
    """Return for each row which of `verdicts` won, as its number: with (model_a, model_b), model_b is 1.

    Returns:
        Numbers from 0, int8 of shape (rows,). It is -1 where the winner is none of the verdicts: a tie,
        for a model of two verdicts.
    """
    number_by_verdict = {verdict: number for number, verdict in enumerate(verdicts)}
    # replace_strict takes every value from the dictionary, and the default for all that it lacks.
    numbers = pl.col("winner").replace_strict(number_by_verdict, default=-1).cast(pl.Int8)
    return frame.select(numbers).to_series().to_numpy()


def tokenise(
    frame: pl.DataFrame,
    tokenizer,
    contract: Contract,
    file: Path,
    teacher_rv: np.ndarray | None = None,
) -> Dataset:
    """Tokenise pairs into an Arrow file with the columns of FEATURES, and map its rows into memory."""
    # Without teachers, the list of their probabilities is empty in each row.
    if teacher_rv is None:
        teacher_rv = np.zeros((len(frame), 0), np.float32)
    labels_rv = targets(frame, contract.verdicts)
    winners_r = winners(frame, contract.verdicts)

    # Weights are 1 on average. Otherwise they would scale the loss, and so the learning rate.
    weights_r = (frame["weight"] / frame["weight"].mean()).to_numpy()

    progress = tqdm(
        total=len(frame), desc=f"tokenising {file.stem} pairs", unit=" pairs", mininterval=5
    )
    with progress, ArrowWriter(path=str(file), features=FEATURES) as writer:
        for start in range(0, len(frame), CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            chunk = frame[rows]
            sequences = encode_rows(chunk, tokenizer, contract)
            columns = {
                "id": chunk["id"].to_list(),
                "sequences": sequences,
                "labels": labels_rv[rows].tolist(),
                "winner": winners_r[rows].tolist(),
                "teacher": teacher_rv[rows].tolist(),
                "weight": weights_r[rows].tolist(),
                "length": [max(len(first), len(second)) for first, second in sequences],
                "tokens": [len(first) + len(second) for first, second in sequences],
            }
            writer.write_batch(columns)
            progress.update(len(chunk))
        writer.finalize()
    return Dataset.from_file(str(file))


def encode_rows(chunk: pl.DataFrame, tokenizer, contract: Contract) -> list[list[list[int]]]:
    """Encode each row as two sequences of token ids.

    Returns:
        For each row the pair in both orders, as given and swapped; for the reward head, which reads
        each response alone, the prompt with response A and with response B.
    """
    pairs = [pair_from_row(row) for row in chunk.iter_rows(named=True)]
    as_given = encode_all(pairs, tokenizer, contract)
    if contract.head == "reward":
        return [list(both_responses) for both_responses in as_given]

    # Other heads read a pair as one sequence: for each pair, encode_all returns a list of one sequence.
    swapped_pairs = [swap(pair) for pair in pairs]
    swapped = encode_all(swapped_pairs, tokenizer, contract)

    sequences = []
    for sequences_as_given, sequences_swapped in zip(as_given, swapped, strict=True):
        sequences.append([sequences_as_given[0], sequences_swapped[0]])
    return sequences


def datasets_of(
    block: PairwiseBlock, tokenizer, contract: Contract, cache: Path
) -> tuple[Dataset, Dataset]:
    """Return the training and validation datasets of a run, tokenised once.

    All processes of a run call this at once. The first one takes the lock, reads the pairs and writes
    the cache. The others wait for the lock, and then find the cache written.

    Returns:
        The training rows and the validation rows, with the columns of FEATURES.
    """
    folder = cache / _cache_name(block, tokenizer, contract)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not folder.exists():
            _write_cache(folder, block, tokenizer, contract)

    # Both are mapped into memory, not read into it: the processes of a machine share one copy.
    training_set = Dataset.from_file(str(folder / TRAINING_FILE))
    validation_set = load_from_disk(folder / VALIDATION_FOLDER)
    return training_set, validation_set


def _write_cache(folder: Path, block: PairwiseBlock, tokenizer, contract: Contract) -> None:
    """Tokenise the training and validation rows of a run into a folder; see datasets_of."""
    pairs = Path(block.pairs)
    with_pool = block.distill is not None and block.distill.pool
    train_pairs, validation_pairs = split(read_pairs(pairs), block.fold, pairs, with_pool)
    teacher_rv = None
    if block.distill is not None:
        teacher_rv = read_teachers(block.distill, train_pairs, pairs, contract.verdicts)

    with atomic_folder(folder) as temporary:
        tokenise(train_pairs, tokenizer, contract, temporary / TRAINING_FILE, teacher_rv)
        _tokenise_longest_first(validation_pairs, tokenizer, contract, temporary)


def _tokenise_longest_first(
    validation: pl.DataFrame, tokenizer, contract: Contract, folder: Path
) -> None:
    """Tokenise the validation rows into a folder, the longest first.

    If the longest rows do not fit into memory, the evaluation then fails in its first batch, and not in its last.
    """
    unsorted_file = folder / "validation.arrow"
    rows = tokenise(validation, tokenizer, contract, unsorted_file)

    lengths_r = np.array(rows["length"])
    longest_first = np.argsort(-lengths_r, kind="stable")
    # select moves no rows, it keeps a list of row numbers. In memory this list leaves no file behind.
    sorted_rows = rows.select(longest_first, keep_in_memory=True)
    sorted_rows.save_to_disk(folder / VALIDATION_FOLDER)
    unsorted_file.unlink()


def _cache_name(block: PairwiseBlock, tokenizer, contract: Contract) -> str:
    """Name the folder of a run's tokenised rows by a hash of everything that they follow from.

    A run that would tokenise the same rows in the same way gets the same name, and finds them there.
    """
    # All of the contract but these three parts decides how a pair is tokenised.
    settings = asdict(contract)
    for name in ("golden", "recorded", "base_model"):
        del settings[name]

    # Tokenizers of one name may differ, so that the whole tokenizer is hashed.
    tokenizer_bytes = tokenizer.backend_tokenizer.to_str().encode()
    tokenizer_sha256 = hashlib.sha256(tokenizer_bytes).hexdigest()

    # The files and columns that this code writes. A later version may write others.
    layout = [TRAINING_FILE, list(FEATURES)]
    inputs = [sha256(block.pairs), block.fold, settings, tokenizer_sha256, layout]
    if block.distill is not None:
        inputs += [block.distill.teachers, block.distill.pool, hash_labels(block.distill)]

    inputs_json = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(inputs_json.encode()).hexdigest()[:CACHE_NAME_LENGTH]
