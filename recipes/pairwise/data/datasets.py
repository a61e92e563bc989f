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
from recipes.pairwise.config.schema import DistillBlock
from recipes.pairwise.data.teacher_labels import hash_labels, read_teachers

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
CHUNK_ROWS = 1000
CACHE_NAME_LENGTH = 16  # hexadecimal digits
TRAINING_FILE = "training.arrow"
VALIDATION_FOLDER = "validation"
FEATURES = Features(
    {
        "id": Value("string"),
        "sequences": List(List(Value("int32"))),
        "labels": List(Value("float32")),
        "winner": Value("int8"),
        # The teachers' probabilities; empty without teachers.
        "teacher": List(Value("float32")),
        "weight": Value("float32"),
        "length": Value("int32"),
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
    # A panic of Polars, as of a damaged page, is no Exception.
    except (pl.exceptions.PolarsError, pl.exceptions.PanicException) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(f"{path}: not a Parquet file ({first_line})") from None

    missing = [column for column in COLUMNS if column not in frame.columns]
    if missing:
        raise UserError(
            f"{path}: no column {', '.join(missing)}; it was not written by python -m preprocess"
        )
    if "role" not in frame.columns:
        frame = frame.with_columns(role=pl.lit("train"))
    return frame


def split(
    frame: pl.DataFrame, fold: int | str, path: Path | str, with_pool: bool = False
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Split pairs into training and validation rows, by their roles.

    Rows of the roles train and extra are trained on, those of train alone are validated on. Neither
    holds rows of the lockbox. A fold's other rows are left out with it, since their prompts may be like
    those of its validation rows.

    Args:
        frame: The rows of a pairs.parquet, as read_pairs gives them.
        fold: The number of the fold to hold out; "all" trains on every row, and validates on a
            sample of them that is the same whatever the order of the rows.
        path: The file, for the message.
        with_pool: Also train on the rows of the pool, which have no votes.

    Raises:
        UserError: If there is no such fold, or no other one, or a row to train on shares its prompt
            with a row of the lockbox.
    """
    training_roles = ["train", "extra"]
    if with_pool:
        training_roles.append("pool")
    human_votes = frame.filter(role="train")
    trainable = frame.filter(pl.col("role").is_in(training_roles))
    check_lockbox(frame, trainable, path)
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
    """Raise UserError where a row to train on shares its group of prompts with a row of the lockbox."""
    lockbox = frame.filter(role="test")
    if lockbox.is_empty():
        return
    leaks = trainable.filter(pl.col("group").is_in(lockbox["group"].implode()))
    if not leaks.is_empty():
        raise UserError(
            f"{path}: {leaks['id'][0]} (role {leaks['role'][0]}) has a prompt like one of the lockbox; make the file "
            "again with python -m preprocess, which drops such rows"
        )


def list_folds(frame: pl.DataFrame) -> list[int]:
    """List the folds that pairs are validated in."""
    return sorted(frame.filter(role="train")["fold"].unique())


def _order_by_hash(ids: pl.Series) -> pl.Series:
    """Return the row numbers in an order that only the ids decide."""

    def hash_id(row_id: str) -> str:
        return hashlib.sha256(row_id.encode()).hexdigest()

    return ids.map_elements(hash_id, return_dtype=pl.String).arg_sort()


def targets(frame: pl.DataFrame, verdicts: tuple[str, ...]) -> np.ndarray:
    """Return the target probabilities, float32 of shape (rows, verdicts).

    Without a verdict for ties, half of a tie goes to each side. A pool row, which has no votes, has zeros.
    """
    frame = frame.with_columns(pl.col("p_model_a", "p_model_b", "p_tie").fill_null(0.0))
    share_a = frame["p_model_a"].to_numpy()
    share_b = frame["p_model_b"].to_numpy()
    share_tie = frame["p_tie"].to_numpy()
    if "tie" not in verdicts:
        share_a = share_a + share_tie / 2
        share_b = share_b + share_tie / 2

    shares = {"model_a": share_a, "model_b": share_b, "tie": share_tie}
    return np.stack([shares[verdict] for verdict in verdicts], axis=1).astype(np.float32)


def winners(frame: pl.DataFrame, verdicts: tuple[str, ...]) -> np.ndarray:
    """Return the place among `verdicts` of each row's winner, int8 of shape (rows,).

    It is -1 where the winner is none of them: a tie, for a model of two verdicts.
    """
    place_by_verdict = {verdict: place for place, verdict in enumerate(verdicts)}
    places = pl.col("winner").replace_strict(place_by_verdict, default=-1).cast(pl.Int8)
    return frame.select(places).to_series().to_numpy()


def tokenise(
    frame: pl.DataFrame,
    tokenizer,
    contract: Contract,
    file: Path,
    teacher_rv: np.ndarray | None = None,
) -> Dataset:
    """Tokenise pairs into an Arrow file of one row a pair, with the columns of FEATURES.

    The sequences are the pair in both orders, or for the reward head the prompt with each response;
    `winner` is its place among the verdicts, `length` that of the longer sequence.

    Args:
        frame: The rows of a pairs.parquet.
        tokenizer: A fast tokenizer.
        contract: Says how a pair becomes token ids.
        file: The file to write, chunk by chunk; its name is shown with the progress.
        teacher_rv: The teachers' probabilities, (rows, verdicts), if there are teachers.

    Returns:
        The file's rows, which are mapped into memory.
    """
    if teacher_rv is None:
        teacher_rv = np.zeros((len(frame), 0), np.float32)
    labels_rv = targets(frame, contract.verdicts)
    places_r = winners(frame, contract.verdicts)
    # 1 on average, so that the learning rate means the same whatever preprocess counted.
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
                "winner": places_r[rows].tolist(),
                "teacher": teacher_rv[rows].tolist(),
                "weight": weights_r[rows].tolist(),
                "length": [max(len(first), len(second)) for first, second in sequences],
            }
            writer.write_batch(columns)
            progress.update(len(chunk))
        writer.finalize()
    return Dataset.from_file(str(file))


def encode_rows(chunk: pl.DataFrame, tokenizer, contract: Contract) -> list[list[list[int]]]:
    """Return two sequences of token ids for each row, see tokenise."""
    pairs = [pair_from_row(row) for row in chunk.iter_rows(named=True)]
    as_given = encode_all(pairs, tokenizer, contract)
    if contract.head == "reward":
        # One sequence for each response: the order of the two makes no difference.
        return [list(sequences) for sequences in as_given]

    swapped = encode_all([swap(pair) for pair in pairs], tokenizer, contract)
    return [[first[0], second[0]] for first, second in zip(as_given, swapped, strict=True)]


def datasets_of(
    pairs: Path,
    fold: int | str,
    tokenizer,
    contract: Contract,
    cache: Path,
    distill: DistillBlock | None = None,
) -> tuple[Dataset, Dataset]:
    """Return the training and validation datasets of a run, tokenised once.

    The first process to come reads the pairs and writes the cache. The others wait, and map it into
    memory as the first one does.

    Args:
        pairs: A pairs.parquet.
        fold: See split.
        tokenizer: A fast tokenizer.
        contract: Says how a pair becomes token ids.
        cache: The folder of the run's tokenised rows.
        distill: The teachers of a student, whose labels its training rows get.
    """
    folder = cache / _cache_name(pairs, fold, tokenizer, contract, distill)
    cache.mkdir(parents=True, exist_ok=True)

    with FileLock(cache / "lock"):
        if not folder.exists():
            with_pool = distill is not None and distill.pool
            train, validation = split(read_pairs(pairs), fold, pairs, with_pool)
            teacher_rv = None
            if distill is not None:
                teacher_rv = read_teachers(distill, train, pairs, contract.verdicts)

            with atomic_folder(folder) as temporary:
                tokenise(train, tokenizer, contract, temporary / TRAINING_FILE, teacher_rv)
                _tokenise_longest_first(validation, tokenizer, contract, temporary)

    training_set = Dataset.from_file(str(folder / TRAINING_FILE))
    return training_set, load_from_disk(folder / VALIDATION_FOLDER)


def _tokenise_longest_first(
    validation: pl.DataFrame, tokenizer, contract: Contract, folder: Path
) -> None:
    """Write the validation rows, the longest first, so that a batch that does not fit fails at once."""
    unsorted_file = folder / "validation.arrow"
    rows = tokenise(validation, tokenizer, contract, unsorted_file)

    lengths_r = np.array(rows["length"])
    longest_first = np.argsort(-lengths_r, kind="stable")
    # Where the order is held makes no difference but for a file that it would leave behind.
    sorted_rows = rows.select(longest_first, keep_in_memory=True)
    sorted_rows.save_to_disk(folder / VALIDATION_FOLDER)
    unsorted_file.unlink()


def _cache_name(
    pairs: Path, fold: int | str, tokenizer, contract: Contract, distill: DistillBlock | None
) -> str:
    """Hash everything that decides the tokenised rows, so that a stale cache is never read."""
    settings = asdict(contract)
    for name in ("golden", "recorded", "base_model"):
        del settings[name]

    tokenizer_bytes = tokenizer.backend_tokenizer.to_str().encode()
    tokenizer_sha256 = hashlib.sha256(tokenizer_bytes).hexdigest()
    layout = [TRAINING_FILE, list(FEATURES)]
    inputs = [sha256(pairs), fold, settings, tokenizer_sha256, layout]
    if distill is not None:
        inputs += [distill.teachers, distill.pool, hash_labels(distill)]
    key = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:CACHE_NAME_LENGTH]
