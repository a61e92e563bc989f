"""A Siamese network in Keras on pairs.parquet: the smallest approach here, one script that stands alone.

Both sides (the prompt with response A, the prompt with response B) go through the same embedding and the
same three bidirectional LSTM layers. Their concatenation, in both orders, goes through the same dense
ReLU layers; the sigmoid of the difference is the probability that A is preferred, so that a swapped pair
has 1 - p by construction.

The pairs of --fold are held out and measured; a tenth of the other prompts say when to stop. Into --out
go tokenizer.json, model.keras, predictions.parquet, metrics.json and submission.csv, each whole or
absent; a finished run is not repeated.
"""

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ["KERAS_BACKEND"] = "tensorflow"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import polars as pl
import tensorflow as tf
from keras import layers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

TEXTS = ("prompt", "response_a", "response_b")
COLUMNS = ("id", *TEXTS, "winner", "group", "fold", "weight", "p_model_a", "p_model_b", "p_tie")

# Token ids that no text can spell: the tokenizer's own ids start at RESERVED.
PADDING = 0
SEPARATOR = 1
RESERVED = 2

DROPOUT = 0.3
LSTM_LAYERS = 3
PATIENCE = 2  # epochs without a better loss before training stops
LENGTH_NOISE = 32  # tokens by which lengths are blurred, so that batches differ between epochs
SMALLEST = 1e-15  # where a probability is clipped before its logarithm

# The token ids of a pair's two sides.
Sides = tuple[list[int], list[int]]


class UserError(Exception):
    """Bad input, in one line: what was found, where, and what to do."""


def read_options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--pairs", type=Path, default=Path("data/pairs.parquet"), help="by python -m preprocess")
    add("--fold", type=int, default=0, help="the fold that is held out and measured")
    add("--out", type=Path, default=Path("outputs/siamese"), help="the folder that is written")
    add(
        "--test",
        type=Path,
        help="rows to answer: a Parquet or CSV file with id, prompt, response_a, response_b",
    )
    add(
        "--tokenizer",
        type=Path,
        help="a tokenizer.json such as XLM-R's; without one, it is trained on the training rows",
    )
    add("--vocabulary", type=int, default=8000, help="tokens of a tokenizer that is trained")
    add("--tokens", type=int, default=256, help="of a side; a prompt takes a quarter at most")
    add("--units", type=int, default=32, help="of an LSTM, each way; embeddings have twice as many")
    add("--batch-size", type=int, default=32, help="pairs in a step, over all devices")
    add("--epochs", type=int, default=12, help="at most")
    add("--learning-rate", type=float, default=5e-4, help="Adam's")
    add("--seed", type=int, default=1, help="of weights, order, and the rows that say when to stop")
    add("--cpu-devices", type=int, default=1, help="logical CPUs, to try replicas without GPUs")

    options = parser.parse_args()
    for name, value in vars(options).items():
        if name != "fold" and isinstance(value, int) and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    return options


# Rows


def read_rows(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Read rows from a Parquet or CSV file; the turns of a conversation are joined by line breaks.

    Raises:
        UserError: The file cannot be read, lacks a column, is empty, or has an id twice.
    """
    try:
        if path.suffix == ".csv":
            rows = pl.read_csv(path, infer_schema=False)
        else:
            rows = pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        reason = " ".join(str(error).split())[:150]
        raise UserError(
            f"{path}: cannot be read ({reason}); pairs are made by python -m preprocess"
        ) from None

    missing_columns = [name for name in columns if name not in rows.columns]
    if missing_columns:
        raise UserError(
            f"{path}: no column {', '.join(missing_columns)}; expected {', '.join(columns)}"
        )
    if rows.is_empty():
        raise UserError(f"{path}: no rows; export the file again")

    # pairs.parquet has a list of turns where a competition's file has a text.
    turns = pl.selectors.list() & pl.selectors.by_name(*TEXTS)
    rows = rows.with_columns(turns.list.join("\n"))
    rows = rows.with_columns(
        pl.col("id").cast(pl.String), pl.col(TEXTS).cast(pl.String).fill_null("")
    )
    if rows["id"].null_count() or rows["id"].is_duplicated().any():
        raise UserError(
            f"{path}: a row has no id, or the id of another row; give every row an id of its own"
        )
    return rows


def add_targets(pairs: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Keep the rows with votes, add the column `target`, and scale the weights to a mean of 1.

    `target` is what P(A) should be: the share of the votes for A and half of those for a tie.
    """
    # The other roles are the pool, which has no votes, and the lockbox, on which nothing is trained.
    if "role" not in pairs.columns:
        pairs = pairs.with_columns(role=pl.lit("train"))
    pairs = pairs.filter(pl.col("role").is_in(["train", "extra"]))

    pairs = pairs.with_columns(
        pl.col("weight") / pl.mean("weight"), target=pl.col("p_model_a") + pl.col("p_tie") / 2
    )
    is_complete = (pairs["target"] + pairs["weight"]).is_finite().fill_null(False)
    if not is_complete.all():
        raise UserError(
            f"{path}: a probability or weight of some row is missing; write the file with python -m preprocess"
        )
    return pairs


def split(
    pairs: pl.DataFrame, options: argparse.Namespace
) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Hold out a fold, and draw a tenth of the other groups of prompts to say when to stop.

    Extra rows are trained on, and never measured: neither held out nor a reason to stop.

    Returns:
        Rows to train on, rows that say when to stop, and rows to measure.

    Raises:
        UserError: There is no such fold, or fewer training rows than a batch has.
    """
    others = pairs.filter(pl.col("fold") != options.fold)
    held_out = pairs.filter(pl.col("fold") == options.fold, pl.col("role") == "train")
    if others.is_empty() or held_out.is_empty():
        folds = ", ".join(map(str, sorted(pairs["fold"].unique())))
        raise UserError(
            f"{options.pairs}: --fold is {options.fold}, but the folds in the file are {folds}"
        )

    # Whole groups are drawn, so that no prompt is both trained on and a reason to stop.
    human_votes = others.filter(pl.col("role") == "train")
    groups = human_votes["group"].unique().sort().to_numpy()
    groups = np.random.default_rng(options.seed).permutation(groups)
    stopping_count = max(len(groups) // 10, 1)
    is_stopping = pl.col("group").is_in(groups[:stopping_count].tolist())

    training = others.filter(~is_stopping)
    if len(training) < options.batch_size:
        raise UserError(
            f"{options.pairs}: {len(training)} rows to train on are too few for --batch-size {options.batch_size}; lower it"
        )
    return training, human_votes.filter(is_stopping), held_out


# Token ids


def read_tokenizer(path: Path) -> Tokenizer:
    """Read a tokenizer.json; raise UserError where the file is none."""
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(
            f"{path}: not a tokenizer.json of the tokenizers library ({error}); give another file"
        ) from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def train_tokenizer(vocabulary: int, training: pl.DataFrame) -> Tokenizer:
    """Train a byte-level BPE, whose tokens are frequent sequences of bytes, on the texts of the training rows."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = byte_level
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, initial_alphabet=byte_level.alphabet(), show_progress=False
    )

    texts = []
    for name in TEXTS:
        texts += training[name].to_list()
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode_rows(rows: pl.DataFrame, tokenizer: Tokenizer, tokens: int) -> list[Sides]:
    """Encode both sides of each row, each with at most so many tokens."""
    encoded = {}
    for name in TEXTS:
        texts = rows[name].to_list()
        encoded[name] = tokenizer.encode_batch_fast(texts, add_special_tokens=False)

    pairs = []
    texts_of_rows = zip(
        encoded["prompt"], encoded["response_a"], encoded["response_b"], strict=True
    )
    for prompt, response_a, response_b in texts_of_rows:
        side_a = join_side(prompt.ids, response_a.ids, tokens)
        side_b = join_side(prompt.ids, response_b.ids, tokens)
        pairs.append((side_a, side_b))
    return pairs


def join_side(prompt: list[int], response: list[int], tokens: int) -> list[int]:
    """Join the token ids of a prompt and a response, with a separator between, shortened to `tokens` in all."""
    # A long prompt keeps its end, a quarter of all tokens.
    prompt_limit = tokens // 4
    prompt = prompt[max(len(prompt) - prompt_limit, 0) :]

    # A long response loses its middle.
    response_limit = max(tokens - len(prompt) - 1, 1)
    if len(response) > response_limit:
        beginning = response[: (response_limit + 1) // 2]
        end = response[len(response) - response_limit // 2 :]
        response = beginning + end

    # The first ids are reserved for padding and separator.
    shifted_prompt = [token + RESERVED for token in prompt]
    shifted_response = [token + RESERVED for token in response]
    return [*shifted_prompt, SEPARATOR, *shifted_response]


# Batches: always full, so that every replica has its share


def make_ordered_batches(
    pairs: list[Sides], targets: np.ndarray, weights: np.ndarray, size: int
) -> tf.data.Dataset:
    """Make batches of `size` rows in the order of the rows, to measure or to predict.

    `targets` are what P(A) should be. The last batch is filled up with rows of weight 0: 7 rows in
    batches of 3 get 2 of them.
    """
    batch_count = math.ceil(len(pairs) / size)
    filler_count = batch_count * size - len(pairs)
    filler = ([SEPARATOR], [SEPARATOR])
    filled = pairs + [filler] * filler_count

    # Keras divides the sum of the losses by the number of all rows, also of those of weight 0. Larger
    # weights of the others make up for that.
    weights = weights * (len(filled) / len(pairs))
    targets = np.pad(targets, (0, filler_count))
    weights = np.pad(weights, (0, filler_count))
    batches = np.arange(len(filled)).reshape(batch_count, size)
    return make_dataset(filled, targets, weights, batches.shape, lambda: batches)


def make_shuffled_batches(
    pairs: list[Sides],
    targets: np.ndarray,
    weights: np.ndarray,
    size: int,
    rng: np.random.Generator,
) -> tf.data.Dataset:
    """Make batches of `size` rows to train on, anew in each epoch and in random order.

    The rows of a batch are about equally long, so that little of it is padding. A batch that would not
    be full is left out: of 7 rows in batches of 3, a random one has no part in an epoch.
    """
    batch_count = len(pairs) // size
    lengths = np.array([max(len(side_a), len(side_b)) for side_a, side_b in pairs])

    def draw_batches() -> np.ndarray:
        rows = rng.permutation(len(pairs))[: batch_count * size]
        # With their exact lengths, the same rows would meet in every epoch.
        blurred_lengths = lengths[rows] + LENGTH_NOISE * rng.random(len(rows))
        rows_by_length = rows[np.argsort(blurred_lengths, kind="stable")]
        return rng.permutation(rows_by_length.reshape(batch_count, size))

    return make_dataset(pairs, targets, weights, (batch_count, size), draw_batches)


def make_dataset(
    pairs: list[Sides],
    targets: np.ndarray,
    weights: np.ndarray,
    shape: tuple[int, int],
    draw_batches: Callable[[], np.ndarray],
) -> tf.data.Dataset:
    """Make the dataset that Keras reads: ids of both sides, targets and weights of each batch.

    Args:
        pairs: The token ids of each row's two sides.
        targets: What P(A) should be, of shape (rows,).
        weights: Of the same shape.
        shape: The number of batches, and of rows in each.
        draw_batches: Called in each epoch; returns the row numbers of its batches, of that shape.
    """
    batch_count, size = shape

    def generate():
        for rows in draw_batches():
            # Both sides of a batch are padded to one length: the model stacks them.
            sides = [pairs[row][0] for row in rows] + [pairs[row][1] for row in rows]
            ids = keras.utils.pad_sequences(sides, padding="post", value=PADDING)
            ids_a = ids[:size]
            ids_b = ids[size:]
            yield (ids_a, ids_b), targets[rows, None], weights[rows, None]

    # Every batch has `size` rows, and as many tokens as its longest side.
    ids = tf.TensorSpec((size, None), tf.int32)
    value = tf.TensorSpec((size, 1), tf.float32)
    dataset = tf.data.Dataset.from_generator(generate, output_signature=((ids, ids), value, value))
    return dataset.apply(tf.data.experimental.assert_cardinality(batch_count)).prefetch(2)


# The model


def build_model(vocabulary: int, options: argparse.Namespace) -> keras.Model:
    """Build the network: ids of side A and of side B, each (rows, tokens), to P(A), (rows, 1)."""
    ids_a = keras.Input((None,), dtype="int32", name="a")
    ids_b = keras.Input((None,), dtype="int32", name="b")

    # Both sides in one pass take half the LSTM's steps.
    states = layers.Concatenate(axis=0)([ids_a, ids_b])
    states = layers.Embedding(vocabulary + RESERVED, 2 * options.units, mask_zero=True)(states)
    states = layers.Dropout(DROPOUT)(states)
    for _ in range(LSTM_LAYERS):
        lstm = layers.LSTM(options.units, return_sequences=True)
        states = layers.Bidirectional(lstm)(states)
    side_a, side_b = keras.ops.split(layers.GlobalAveragePooling1D()(states), 2)

    # One head for both orders: the difference changes its sign when the sides are swapped.
    head = keras.Sequential(
        [
            layers.Dense(64, "relu"),
            layers.Dropout(DROPOUT),
            layers.Dense(32, "relu"),
            layers.Dense(1),
        ]
    )
    logit_as_given = head(layers.Concatenate()([side_a, side_b]))
    logit_swapped = head(layers.Concatenate()([side_b, side_a]))
    difference = layers.Subtract()([logit_as_given, logit_swapped])

    model = keras.Model([ids_a, ids_b], layers.Activation("sigmoid")(difference))
    optimizer = keras.optimizers.Adam(options.learning_rate, clipnorm=1.0)
    model.compile(optimizer, keras.losses.BinaryCrossentropy())
    return model


def train(
    training: pl.DataFrame,
    stopping: pl.DataFrame,
    tokenizer: Tokenizer,
    options: argparse.Namespace,
) -> keras.Model:
    """Train on every GPU, or on the logical CPUs where there is none.

    Raises:
        UserError: Batches cannot be divided among the devices, or the loss is not finite.
    """
    training_batches = make_shuffled_batches(
        encode_rows(training, tokenizer, options.tokens),
        training["target"].to_numpy(),
        training["weight"].to_numpy(),
        options.batch_size,
        np.random.default_rng(options.seed),
    )
    stopping_batches = make_ordered_batches(
        encode_rows(stopping, tokenizer, options.tokens),
        stopping["target"].to_numpy(),
        stopping["weight"].to_numpy(),
        options.batch_size,
    )

    devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if options.batch_size % len(devices):
        raise UserError(
            f"--batch-size {options.batch_size}: expected a multiple of the {len(devices)} devices"
        )
    with tf.distribute.MirroredStrategy([device.name for device in devices]).scope():
        model = build_model(tokenizer.get_vocab_size(), options)
    print(
        f"{model.count_params():,} weights, {len(devices)} device(s), {len(training)} pairs; "
        "ends where val_loss rises twice",
        flush=True,
    )

    stop = keras.callbacks.EarlyStopping("val_loss", patience=PATIENCE, restore_best_weights=True)
    model.fit(
        training_batches,
        validation_data=stopping_batches,
        epochs=options.epochs,
        callbacks=[stop],
        shuffle=False,  # the dataset is shuffled already
        verbose=2,
    )
    if not np.isfinite(stop.best):
        raise UserError(
            f"--learning-rate {options.learning_rate}: the loss is not finite; lower it"
        )
    return model


def predict(rows: pl.DataFrame, options: argparse.Namespace) -> pl.DataFrame:
    """Add the predicted probabilities to rows, by the model and the tokenizer in --out.

    Returns:
        The rows with p_VERDICT and the same of each order: both are equal by construction.
    """
    model = keras.saving.load_model(options.out / "model.keras", compile=False)
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    sides = encode_rows(rows, tokenizer, options.tokens)
    unused = np.zeros(len(rows))
    batches = make_ordered_batches(sides, unused, unused, options.batch_size)

    # The last rows only fill up a batch.
    p_model_a = model.predict(batches, verbose=0)[: len(rows), 0].astype(np.float64)
    columns = {}
    for order in ("", "_as_given", "_swapped"):
        columns[f"p_model_a{order}"] = p_model_a
        columns[f"p_model_b{order}"] = 1 - p_model_a
        columns[f"p_tie{order}"] = np.zeros(len(rows))
    return rows.with_columns(**columns)


def measure(rows: pl.DataFrame) -> dict[str, float]:
    """Compute accuracy against the winners, ties left out, and log loss against the shares of the votes."""
    is_decided = (rows["winner"] != "tie").to_numpy()
    a_won = (rows["winner"] == "model_a").to_numpy()
    p_model_a = rows["p_model_a"].to_numpy()
    is_right = (p_model_a >= 0.5) == a_won
    accuracy = is_right[is_decided].mean()

    # A model has to beat the rule that the longer response wins.
    length_a = rows["response_a"].str.len_chars().to_numpy()
    length_b = rows["response_b"].str.len_chars().to_numpy()
    longer_is_right = (length_a >= length_b) == a_won
    accuracy_of_longer = longer_is_right[is_decided].mean()

    target = rows["target"].to_numpy()
    loss_if_a = -np.log(np.clip(p_model_a, SMALLEST, 1))
    loss_if_b = -np.log(np.clip(1 - p_model_a, SMALLEST, 1))
    log_loss = np.mean(target * loss_if_a + (1 - target) * loss_if_b)
    return {
        "accuracy": float(accuracy),
        "accuracy_as_given": float(accuracy),
        "log_loss": float(log_loss),
        "log_loss_as_given": float(log_loss),
        "flip_rate": 0.0,
        "accuracy_of_longer": float(accuracy_of_longer),
    }


# The run


def save_whole(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write a file under a temporary name, and rename it to `path`: it is whole or absent."""
    temporary = path.with_name(f".unfinished.{path.name}")
    save(temporary)
    os.replace(temporary, path)


def collect_settings(options: argparse.Namespace) -> dict[str, object]:
    """Collect everything that decides the result: options, and hashes of pairs, tokenizer and script."""
    settings = {}
    for name, value in vars(options).items():
        is_path = name in ("pairs", "tokenizer", "out", "test")
        if not is_path:
            settings[name] = value

    # Files count by their content, wherever they lie.
    files = {"pairs": options.pairs, "tokenizer": options.tokenizer, "script": Path(__file__)}
    for name, path in files.items():
        settings[f"{name}_sha256"] = None
        if path is not None:
            settings[f"{name}_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return settings


def run(pairs: pl.DataFrame, settings: dict[str, object], options: argparse.Namespace) -> None:
    """Train, measure, and write the files of --out. With metrics.json, the last one, the run is finished."""
    start = time.monotonic()
    pairs = add_targets(pairs, options.pairs)
    training, stopping, held_out = split(pairs, options)
    if options.tokenizer is None:
        tokenizer = train_tokenizer(options.vocabulary, training)
    else:
        tokenizer = read_tokenizer(options.tokenizer)
    model = train(training, stopping, tokenizer, options)

    # Results of an earlier run must not stand beside the weights of this one.
    out = options.out
    for name in ("metrics.json", "submission.csv"):
        (out / name).unlink(missing_ok=True)
    save_whole(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    # A model made anew has no optimizer, which holds two numbers for each weight.
    save_whole(out / "model.keras", keras.Model(model.inputs, model.outputs).save)
    end_of_training = time.monotonic()

    held_out = predict(held_out, options).sort("id")
    table = held_out.select("id", "fold", "winner", "^p_.*$")
    save_whole(out / "predictions.parquet", table.write_parquet)
    metrics = {
        **measure(held_out),
        "rows": len(held_out),
        "fold": options.fold,
        "rows_were_trained_on": False,
        "seconds_training": round(end_of_training - start, 1),
        "seconds_predicting": round(time.monotonic() - end_of_training, 1),
        "pairs_sha256": settings["pairs_sha256"],
        "settings": settings,
    }
    text = json.dumps(metrics, indent=1) + "\n"
    save_whole(out / "metrics.json", lambda path: path.write_text(text))


def main() -> None:
    """Train unless that is done, print what was measured, and answer the rows of --test."""
    options = read_options()
    pairs = read_rows(options.pairs, COLUMNS)
    test = None
    if options.test:
        test = read_rows(options.test, ("id", *TEXTS))

    # TensorFlow takes this only before it is used.
    cpu = tf.config.list_physical_devices("CPU")[0]
    logical_cpus = [tf.config.LogicalDeviceConfiguration()] * options.cpu_devices
    tf.config.set_logical_device_configuration(cpu, logical_cpus)
    keras.utils.set_random_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)

    settings = collect_settings(options)
    metrics_file = options.out / "metrics.json"
    metrics = json.loads(metrics_file.read_text()) if metrics_file.exists() else {}
    # A run that was made already with the same settings is not repeated.
    if metrics.get("settings") != settings:
        run(pairs, settings, options)
        metrics = json.loads(metrics_file.read_text())
    print(
        f"{metrics_file}: accuracy {metrics['accuracy']:.4f} on {metrics['rows']} rows (the longer response: "
        f"{metrics['accuracy_of_longer']:.4f}), log loss {metrics['log_loss']:.4f}"
    )

    if test is not None:
        p_model_a = predict(test, options)["p_model_a"].to_numpy()
        winners = np.where(p_model_a >= 0.5, "model_a", "model_b")
        submission = pl.DataFrame({"id": test["id"], "winner": winners})
        save_whole(options.out / "submission.csv", submission.write_csv)
        print(f"{options.out / 'submission.csv'}: {len(test)} rows")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
