"""A Siamese network in Keras on pairs.parquet: the smallest approach here, one script that stands alone.

Both sides (the prompt with response A, the prompt with response B) go through the same embedding and the same three
bidirectional LSTM layers, are concatenated, and end over dense ReLU layers in one sigmoid: the probability that A is
preferred. With `--orders both` the dense layers see the concatenation in both orders in every step and the sigmoid takes the
difference, so that a swapped pair has 1 - p; `as_given` leaves the second order out, for comparison.

The pairs of --fold are held out and measured; a tenth of the other prompts say when to stop. Into --out go tokenizer.json,
model.keras, predictions.parquet, metrics.json and submission.csv, each whole or absent; a finished run is not repeated.
"""

import argparse
import hashlib
import json
import os
import sys
import time
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
COLUMNS = ("id", *TEXTS, "winner", "fold", "weight", "p_model_a", "p_model_b", "p_tie")
PADDING, SEPARATOR, RESERVED = 0, 1, 2  # the tokenizer's own ids start at RESERVED: no text can spell these two
DROPOUT = 0.3
COUNTS = {  # option: default, help
    "vocabulary": (8000, "tokens of the tokenizer that is trained where --tokenizer names none"),
    "tokens": (256, "tokens of a side; a prompt takes a quarter at most"),
    "embedding": (64, "width of the embedding"),
    "units": (32, "width of an LSTM layer, each way"),
    "batch_size": (32, "pairs in a step, over all devices"),
    "epochs": (12, "at most"),
    "patience": (2, "epochs without improvement before it stops"),
    "seed": (1, "of the weights, the order of the rows, and the rows that say when to stop"),
    "cpu_devices": (1, "split the CPU into so many logical devices, to try several replicas without GPUs"),
}


class UserError(Exception):
    """Bad input, in one line: what was found, where, and what to do."""


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=Path, default=Path("data/pairs.parquet"), help="written by python -m preprocess")
    add("--fold", type=int, default=0, help="the fold that is held out and measured")
    add("--out", type=Path, default=Path("outputs/siamese"), help="the folder that is written")
    add("--test", type=Path, help="rows to answer: a Parquet or CSV file with id, prompt, response_a, response_b")
    add("--tokenizer", type=Path, help="a tokenizer.json such as XLM-R's; without one, it is trained on the training rows")
    add("--orders", choices=("both", "as_given"), default="both", help="the orders of a pair that the dense layers see")
    add("--learning-rate", type=float, default=5e-4, help="Adam's")
    for name, (default, text) in COUNTS.items():
        add(f"--{name.replace('_', '-')}", type=int, default=default, help=text)
    options = parser.parse_args()
    for name in COUNTS:
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: expected 1 or more")
    return options


def read_rows(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """The rows of a Parquet or CSV file, each id once; the turns of a conversation are joined by line breaks."""
    try:
        frame = pl.read_csv(path, infer_schema=False) if path.suffix == ".csv" else pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({' '.join(str(error).split())[:150]}); make or fetch it again") from None
    missing = [name for name in columns if name not in frame.columns]
    if missing or frame.is_empty():
        raise UserError(f"{path}: {'no column ' + ', '.join(missing) if missing else 'no rows'}; expected {', '.join(columns)}")
    for name in TEXTS:
        if isinstance(frame.schema[name], pl.List):
            frame = frame.with_columns(pl.col(name).list.eval(pl.element().fill_null("")).list.join("\n"))
    frame = frame.with_columns(pl.col("id").cast(pl.String), pl.col(TEXTS).cast(pl.String).fill_null(""))
    if frame["id"].null_count() or frame["id"].is_duplicated().any():
        raise UserError(f"{path}: an id is missing or stands there twice; give every row an id of its own")
    return frame


def split(pairs: pl.DataFrame, options: argparse.Namespace) -> tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame]:
    """Rows to train on, rows that say when to stop, rows that are held out. No group of prompts stands in two of them."""
    rest, held_out = pairs.filter(pl.col("fold") != options.fold), pairs.filter(pl.col("fold") == options.fold)
    if rest.is_empty() or held_out.is_empty():
        folds = ", ".join(map(str, sorted(pairs["fold"].unique())))
        raise UserError(f"{options.pairs}: --fold is {options.fold}, but the folds in the file are {folds}")
    group = "group" if "group" in pairs.columns else "prompt"
    groups = np.random.default_rng(options.seed).permutation(rest[group].unique().sort().to_numpy())
    stops = pl.col(group).is_in(groups[: max(len(groups) // 10, 1)].tolist())
    if rest.filter(~stops).height < options.batch_size:
        raise UserError(f"{options.pairs}: too few rows for --batch-size {options.batch_size}; lower it")
    return rest.filter(~stops), rest.filter(stops), held_out


def find_tokenizer(path: Path | None, vocabulary: int, train: pl.DataFrame) -> Tokenizer:
    """The tokenizer in a file, or a byte-level BPE trained on the training rows."""
    if path is None:
        tokenizer, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = byte_level
        trainer = trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=byte_level.alphabet(), show_progress=False)
        tokenizer.train_from_iterator([text for name in TEXTS for text in train[name]], trainer)
        return tokenizer
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path}: not a tokenizer.json of the tokenizers library ({error}); give another file") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def sides(rows: pl.DataFrame, tokenizer: Tokenizer, tokens: int) -> list[tuple[list[int], list[int]]]:
    """For each pair the ids of both sides: the end of the prompt, a separator, the response without its middle."""
    encoded = [tokenizer.encode_batch_fast(rows[name].to_list(), add_special_tokens=False) for name in TEXTS]

    def side(prompt: list[int], response: list[int]) -> list[int]:
        prompt = prompt[max(len(prompt) - tokens // 4, 0) :]
        room = max(tokens - len(prompt) - 1, 1)
        if len(response) > room:
            response = response[: (room + 1) // 2] + response[len(response) - room // 2 :]
        return [token + RESERVED for token in prompt] + [SEPARATOR] + [token + RESERVED for token in response]

    return [(side(prompt.ids, a.ids), side(prompt.ids, b.ids)) for prompt, a, b in zip(*encoded, strict=True)]


def batches(pairs: list, targets: np.ndarray, weights: np.ndarray, size: int, rng=None) -> tf.data.Dataset:
    """Batches ((a, b), targets, weights) of exactly `size` rows, so that every replica has its share: in order, the last one
    filled up with rows of weight 0; or with `rng` at random, like lengths together, the incomplete one left out.
    """
    count = len(pairs) // size if rng is not None else -(-len(pairs) // size)
    share = min(len(pairs) / (count * size), 1)  # of rows that count, so that Keras' mean loss is theirs

    def generate():
        order = np.arange(len(pairs))
        if rng is not None:
            order = rng.permutation(order)[: len(pairs) // size * size]
            order = sorted(order, key=lambda row: max(map(len, pairs[row])) + 32 * rng.random())
            order = rng.permutation(np.reshape(order, (-1, size))).ravel()
        for chunk in (order[start : start + size] for start in range(0, len(order), size)):
            rows = [pairs[row] for row in chunk] + [([SEPARATOR], [SEPARATOR])] * (size - len(chunk))
            longest = max(len(side) for row in rows for side in row)
            ids = np.array([[side + [PADDING] * (longest - len(side)) for side in row] for row in rows], np.int32)
            values = np.zeros((2, size, 1), np.float32)
            values[:, : len(chunk), 0] = targets[chunk], weights[chunk] / share
            yield (ids[:, 0], ids[:, 1]), values[0], values[1]

    ids, value = tf.TensorSpec((size, None), tf.int32), tf.TensorSpec((size, 1), tf.float32)
    dataset = tf.data.Dataset.from_generator(generate, output_signature=((ids, ids), value, value))
    return dataset.apply(tf.data.experimental.assert_cardinality(count)).prefetch(2)


def build(vocabulary: int, options: argparse.Namespace) -> keras.Model:
    """The network: ids of side A and of side B, each (rows, tokens), to the probability (rows, 1) that A is preferred."""
    a, b = (keras.Input((None,), dtype="int32", name=name) for name in "ab")
    states = layers.Concatenate(axis=0)([a, b])  # both sides in one pass: half the LSTM's steps
    states = layers.Embedding(vocabulary + RESERVED, options.embedding, mask_zero=True)(states)
    states = layers.Dropout(DROPOUT)(states)
    for _ in range(3):
        states = layers.Bidirectional(layers.LSTM(options.units, return_sequences=True))(states)
    side_a, side_b = keras.ops.split(layers.GlobalAveragePooling1D()(states), 2)
    dense = [layers.Dense(64, "relu"), layers.Dropout(DROPOUT), layers.Dense(32, "relu"), layers.Dense(1)]
    head = keras.Sequential([keras.Input((4 * options.units,)), *dense])
    logit = head(layers.Concatenate()([side_a, side_b]))
    if options.orders == "both":
        logit = layers.Subtract()([logit, head(layers.Concatenate()([side_b, side_a]))])
    model = keras.Model([a, b], layers.Activation("sigmoid")(logit))
    model.compile(keras.optimizers.Adam(options.learning_rate, clipnorm=1.0), keras.losses.BinaryCrossentropy())
    return model


def train(data: tuple, stopping: tuple, vocabulary: int, options: argparse.Namespace) -> keras.Model:
    """The model with the weights of its best epoch, trained on every GPU or logical CPU; both tuples are for `batches`."""
    devices = [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]
    if options.batch_size % len(devices):
        raise UserError(f"--batch-size {options.batch_size}: expected a multiple of the {len(devices)} devices")
    with tf.distribute.MirroredStrategy(devices).scope():
        model = build(vocabulary, options)
    print(f"{model.count_params():,} weights, {len(devices)} devices, {len(data[0])} pairs to train on", flush=True)
    stop = keras.callbacks.EarlyStopping("val_loss", patience=options.patience, restore_best_weights=True)
    size, rng = options.batch_size, np.random.default_rng(options.seed)
    verbose = 1 if sys.stdout.isatty() else 2
    rows, checked = batches(*data, size, rng), batches(*stopping, size)
    model.fit(rows, validation_data=checked, epochs=options.epochs, callbacks=[stop], shuffle=False, verbose=verbose)
    if not np.isfinite(stop.best):
        raise UserError(f"--learning-rate {options.learning_rate}: the loss is not finite; lower it")
    return model


def predict(rows: pl.DataFrame, options: argparse.Namespace) -> pl.DataFrame:
    """`rows` with p_VERDICT by the model in --out, the mean of both orders, and each order's, the swapped one swapped back."""
    model = keras.saving.load_model(options.out / "model.keras", compile=False)
    tokenizer = Tokenizer.from_file(str(options.out / "tokenizer.json"))
    pairs, nothing = sides(rows, tokenizer, options.tokens), np.zeros(len(rows))
    orders = [batches(order, nothing, nothing, options.batch_size) for order in (pairs, [(b, a) for a, b in pairs])]
    p, q = (model.predict(data, verbose=0)[: len(rows), 0].astype(np.float64) for data in orders)
    for end, p_a in (("", (p + 1 - q) / 2), ("_as_given", p), ("_swapped", 1 - q)):
        columns = {f"p_model_a{end}": p_a, f"p_model_b{end}": 1 - p_a, f"p_tie{end}": np.zeros(len(rows))}
        rows = rows.with_columns(**columns)
    return rows


def measure(rows: pl.DataFrame) -> dict[str, float]:
    """Accuracy, log loss and what else a run's metrics.json holds; a row whose votes are even has no accuracy."""
    target, length = rows["target"].to_numpy(), {side: rows[f"response_{side}"].str.len_chars() for side in "ab"}

    def share_right(says_a: pl.Series) -> float:
        return float((says_a.to_numpy() == (target > 0.5))[target != 0.5].mean())

    values = {"rows": len(rows), "accuracy_of_longer": share_right(length["a"] >= length["b"])}
    values["flip_rate"] = float(((rows["p_model_a_as_given"] >= 0.5) != (rows["p_model_a_swapped"] >= 0.5)).mean())
    for end in ("", "_as_given"):
        p, q = (np.clip(rows[f"p_model_{side}{end}"].to_numpy(), 1e-15, 1) for side in "ab")
        values[f"log_loss{end}"] = float(-(target * np.log(p) + (1 - target) * np.log(q)).mean())
        values[f"accuracy{end}"] = share_right(rows[f"p_model_a{end}"] >= 0.5)
    return values


def write(path: Path, save) -> None:
    """Call `save` with a temporary path beside `path`, which then takes that name: the file is whole or absent."""
    temporary = path.with_name(f".unfinished.{path.name}")
    save(temporary)
    os.replace(temporary, path)


def run(pairs: pl.DataFrame, settings: dict, options: argparse.Namespace) -> None:
    """Train, then write the tokenizer, the model, predictions.parquet and, last, metrics.json, which vouches for the others."""
    started, out = time.monotonic(), options.out
    pairs = pairs.with_columns(pl.col("weight") / pl.mean("weight"), target=pl.col("p_model_a") + pl.col("p_tie") / 2)
    if not (pairs["target"] + pairs["weight"]).is_finite().fill_null(False).all():
        raise UserError(f"{options.pairs}: a probability or weight is missing; write the file with python -m preprocess")
    parts = split(pairs, options)
    tokenizer = find_tokenizer(options.tokenizer, options.vocabulary, parts[0])
    data = [(sides(part, tokenizer, options.tokens), part["target"], part["weight"]) for part in parts[:2]]
    model = train(*data, tokenizer.get_vocab_size(), options)
    for name in ("metrics.json", "submission.csv"):
        (out / name).unlink(missing_ok=True)
    write(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write(out / "model.keras", keras.Model(model.inputs, model.outputs).save)  # without Adam's two numbers a weight
    trained, held_out = time.monotonic(), predict(parts[2], options).sort("id")
    write(out / "predictions.parquet", held_out.select("id", "fold", "winner", "^p_.*$").write_parquet)
    values = measure(held_out) | {"fold": options.fold, "training_rows": len(parts[0]), "rows_were_trained_on": False}
    values["steps"] = int(model.optimizer.iterations.numpy())
    values["seconds_training"] = round(trained - started, 1)
    values["seconds_predicting"] = round(time.monotonic() - trained, 1)
    values |= {"pairs_sha256": settings["pairs_sha256"], "settings": settings}
    write(out / "metrics.json", lambda path: path.write_text(json.dumps(values, indent=1) + "\n"))


def main() -> None:
    """Train unless that is done, print what was measured, and answer the rows of --test."""
    options = arguments()
    pairs = read_rows(options.pairs, COLUMNS)
    test = read_rows(options.test, ("id", *TEXTS)) if options.test else None
    files = {"pairs": options.pairs, "tokenizer": options.tokenizer, "script": Path(__file__)}
    settings = {name: value for name, value in vars(options).items() if name not in (*files, "out", "test")}
    settings |= {f"{name}_sha256": path and hashlib.sha256(path.read_bytes()).hexdigest() for name, path in files.items()}
    one = tf.config.LogicalDeviceConfiguration()
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], [one] * options.cpu_devices)
    keras.utils.set_random_seed(options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    metrics = options.out / "metrics.json"
    if not metrics.exists() or json.loads(metrics.read_text()).get("settings") != settings:
        run(pairs, settings, options)
    print(f"{metrics}: accuracy {{accuracy:.4f}}, log loss {{log_loss:.4f}}".format(**json.loads(metrics.read_text())))
    if test is not None:
        answers = np.where(predict(test, options)["p_model_a"] >= 0.5, "model_a", "model_b")
        write(options.out / "submission.csv", pl.DataFrame({"id": test["id"], "winner": answers}).write_csv)
        print(f"{options.out / 'submission.csv'}: {len(test)} rows")


if __name__ == "__main__":
    try:
        main()
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
