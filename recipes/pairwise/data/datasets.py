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
        # The token ids of the pair in both orders, or of both responses, see encode_rows.
        "sequences": List(List(Value("int32"))),
        # The shares of the human votes for each verdict, in the order as given.
        "labels": List(Value("float32")),
        # The place of the winner among the verdicts.
        "winner": Value("int8"),
        # The teachers' probabilities; empty without teachers.
        "teacher": List(Value("float32")),
        # How much the pair counts in the loss; 1 on average.
        "weight": Value("float32"),
        # Tokens of the longer sequence.
        "length": Value("int32"),
        # Tokens of both sequences.
        "tokens": Value("int32"),
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

    Rows of the roles train and extra are trained on, those of train alone are validated on. Neither
    holds rows of the lockbox. A fold's other rows are left out with it, since their prompts may be like
    those of its validation rows.

    Args:
        frame: The rows of a pairs.parquet, as read_pairs gives them.
        fold: The number of the fold to hold out; "all" trains on every row, and validates on a
            sample of them that is the same whatever the order of the rows.
        path: The file, for the message.
        with_pool: Also train on the rows of the pool, which have no votes.

    Returns:
        The training rows and the validation rows.

    Raises:
        UserError: If there is no such fold, or no other one, or a row to train on shares its prompt
            with a row of the lockbox.
    """
    # Which rows are trained on, whatever the fold.
    training_roles = ["train", "extra"]
    if with_pool:
        training_roles.append("pool")
    trainable = frame.filter(pl.col("role").is_in(training_roles))
    check_lockbox(frame, trainable, path)

    # Metrics are of human votes on rows of the competition's own kind, which the role train is.
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
    """Raise UserError where a row to train on has a prompt like one of the lockbox, the rows of the role test."""
    lockbox = frame.filter(role="test")
    if lockbox.is_empty():
        return

    # Rows whose prompts are alike have the same group.
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
    """Return what the model is to predict for each row: the shares of the human votes.

    Args:
        frame: The rows of a pairs.parquet.
        verdicts: The model's verdicts. Where tie is none of them, half of a tie goes to each side.

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
    `winner` is its place among the verdicts.

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
                "tokens": [len(first) + len(second) for first, second in sequences],
            }
            writer.write_batch(columns)
            progress.update(len(chunk))
        writer.finalize()
    return Dataset.from_file(str(file))


def encode_rows(chunk: pl.DataFrame, tokenizer, contract: Contract) -> list[list[list[int]]]:
    """Encode each row as two sequences of token ids.

    Args:
        chunk: Rows of a pairs.parquet.
        tokenizer: A fast tokenizer.
        contract: Says how a pair becomes token ids.

    Returns:
        For each row the pair in both orders, as given and swapped; for the reward head, which reads
        each response alone, the prompt with response A and with response B.
    """
    pairs = [pair_from_row(row) for row in chunk.iter_rows(named=True)]
    as_given = encode_all(pairs, tokenizer, contract)
    if contract.head == "reward":
        return [list(both_responses) for both_responses in as_given]

    # Other heads read a pair as one sequence, so that encode_all returns lists of one.
    swapped_pairs = [swap(pair) for pair in pairs]
    swapped = encode_all(swapped_pairs, tokenizer, contract)
    return [[first, second] for (first,), (second,) in zip(as_given, swapped, strict=True)]


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
        distill: The teachers of a student, whose labels its training rows get; None without teachers.

    Returns:
        The training rows and the validation rows, with the columns of FEATURES.
    """
    # All processes of a run come here at once. One tokenises, and none of the others reads the pairs.
    folder = cache / _cache_name(pairs, fold, tokenizer, contract, distill)
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "lock"):
        if not folder.exists():
            with_pool = distill is not None and distill.pool
            train_pairs, validation_pairs = split(read_pairs(pairs), fold, pairs, with_pool)
            teacher_rv = None
            if distill is not None:
                teacher_rv = read_teachers(distill, train_pairs, pairs, contract.verdicts)

            with atomic_folder(folder) as temporary:
                tokenise(train_pairs, tokenizer, contract, temporary / TRAINING_FILE, teacher_rv)
                _tokenise_longest_first(validation_pairs, tokenizer, contract, temporary)

    # All processes read from the disk, so that they share its pages in memory.
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
    """Name the folder of tokenised rows by a hash of all that decides them.

    So rows of another file, fold, tokenizer or setting are never read in their place. The arguments
    are those of datasets_of.
    """
    # These three parts of a contract do not change how a pair is tokenised.
    settings = asdict(contract)
    for name in ("golden", "recorded", "base_model"):
        del settings[name]

    # Two tokenizers of one name may differ, so that its content is hashed.
    tokenizer_bytes = tokenizer.backend_tokenizer.to_str().encode()
    tokenizer_sha256 = hashlib.sha256(tokenizer_bytes).hexdigest()
    layout = [TRAINING_FILE, list(FEATURES)]
    inputs = [sha256(pairs), fold, settings, tokenizer_sha256, layout]
    if distill is not None:
        inputs += [distill.teachers, distill.pool, hash_labels(distill)]

    inputs_json = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(inputs_json.encode()).hexdigest()[:CACHE_NAME_LENGTH]
