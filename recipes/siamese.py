"""A Siamese network in Keras on pairs.parquet: the smallest approach here, one script that stands alone.

Both sides (the prompt with response A, the prompt with response B) go through the same embedding and the same three
bidirectional LSTM layers. Their concatenation, in both orders, goes through the same dense ReLU layers; the sigmoid of the
difference is the probability that A is preferred, so that a swapped pair has 1 - p by construction.

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
COLUMNS = ("id", *TEXTS, "winner", "group", "fold", "weight", "p_model_a", "p_model_b", "p_tie")
PADDING, SEPARATOR, RESERVED = 0, 1, 2  # the tokenizer's own ids start at RESERVED: no text can spell these two
DROPOUT = 0.3


class UserError(Exception):
    """Bad input, in one line: what was found, where, and what to do."""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--pairs", type=Path, default=Path("data/pairs.parquet"), help="written by python -m preprocess")
    add("--fold", type=int, default=0, help="the fold that is held out and measured")
    add("--out", type=Path, default=Path("outputs/siamese"), help="the folder that is written")
    add("--test", type=Path, help="rows to answer: a Parquet or CSV file with id, prompt, response_a, response_b")
    add("--tokenizer", type=Path, help="a tokenizer.json such as XLM-R's; without one, it is trained on the training rows")
    add("--vocabulary", type=int, default=8000, help="tokens of the tokenizer that is trained where --tokenizer names none")
    add("--tokens", type=int, default=256, help="tokens of a side; a prompt takes a quarter at most")
    add("--units", type=int, default=32, help="width of an LSTM layer, each way; the embedding is twice as wide")
    add("--batch-size", type=int, default=32, help="pairs in a step, over all devices")
    add("--epochs", type=int, default=12, help="at most")
    add("--learning-rate", type=float, default=5e-4, help="Adam's")
    add("--seed", type=int, default=1, help="of the weights, the order of the rows, and the rows that say when to stop")
    add("--cpu-devices", type=int, default=1, help="logical CPUs, to try several replicas without GPUs")
    options = parser.parse_args()
    for name, value in vars(options).items():
        if name != "fold" and isinstance(value, int) and value < 1:
            raise UserError(f"--{name.replace('_', '-')} {value}: expected 1 or more")
    return options


def read_rows(path: Path, columns: tuple[str, ...]) -> pl.DataFrame:
    """The rows of a Parquet or CSV file, each id once; the turns of a conversation are joined by line breaks."""
    try:
        frame = pl.read_csv(path, infer_schema=False) if path.suffix == ".csv" else pl.read_parquet(path)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{path}: cannot be read ({' '.join(str(error).split())[:150]}); pairs are made by python -m preprocess"
        ) from None
    missing = [name for name in columns if name not in frame.columns]
    if missing or frame.is_empty():
        raise UserError(f"{path}: {'no column ' + ', '.join(missing) if missing else 'no rows'}; expected {', '.join(columns)}")
    frame = frame.with_columns((pl.selectors.list() & pl.selectors.by_name(*TEXTS)).list.join("\n"))
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
    groups = np.random.default_rng(options.seed).permutation(rest["group"].unique().sort().to_numpy())
    stops = pl.col("group").is_in(groups[: max(len(groups) // 10, 1)].tolist())
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
    """Full batches, so that every replica has its share: in order, then rows of weight 0; by `rng`, the last rows left out."""
    filler = 0 if rng else -len(pairs) % size
    pairs = pairs + [([SEPARATOR], [SEPARATOR])] * filler
    weights = weights * (len(pairs) / len(targets))  # Keras divides the loss by all rows, the filler too
    values = np.pad(np.stack([targets, weights])[..., None], ((0, 0), (0, filler), (0, 0)))
    count = len(pairs) // size

    def generate():
        order = rng.permutation(len(pairs)) if rng else np.arange(len(pairs))
        if rng:
            order = sorted(order[: count * size], key=lambda row: max(map(len, pairs[row])) + 32 * rng.random())
            order = rng.permutation(np.reshape(order, (count, size)))  # like lengths in a batch, the batches at random
        for chunk in np.reshape(order, (count, size)):
            ids = keras.utils.pad_sequences([pairs[row][side] for side in (0, 1) for row in chunk], padding="post")
            yield (ids[:size], ids[size:]), *values[:, chunk]

    ids, value = tf.TensorSpec((size, None), tf.int32), tf.TensorSpec((size, 1), tf.float32)
    dataset = tf.data.Dataset.from_generator(generate, output_signature=((ids, ids), value, value))
    return dataset.apply(tf.data.experimental.assert_cardinality(count)).prefetch(2)


def build(vocabulary: int, options: argparse.Namespace) -> keras.Model:
    """The network: ids of side A and of side B, each (rows, tokens), to the probability (rows, 1) that A is preferred."""
    a, b = (keras.Input((None,), dtype="int32", name=name) for name in "ab")
    states = layers.Concatenate(axis=0)([a, b])  # both sides in one pass: half the LSTM's steps
    states = layers.Embedding(vocabulary + RESERVED, 2 * options.units, mask_zero=True)(states)
    states = layers.Dropout(DROPOUT)(states)
    for _ in range(3):
        states = layers.Bidirectional(layers.LSTM(options.units, return_sequences=True))(states)
    side_a, side_b = keras.ops.split(layers.GlobalAveragePooling1D()(states), 2)
    head = keras.Sequential([layers.Dense(64, "relu"), layers.Dropout(DROPOUT), layers.Dense(32, "relu"), layers.Dense(1)])
    logits = [head(layers.Concatenate()(order)) for order in ([side_a, side_b], [side_b, side_a])]
    model = keras.Model([a, b], layers.Activation("sigmoid")(layers.Subtract()(logits)))
    model.compile(keras.optimizers.Adam(options.learning_rate, clipnorm=1.0), keras.losses.BinaryCrossentropy())
    return model


def predict(rows: pl.DataFrame, options: argparse.Namespace) -> pl.DataFrame:
    """`rows` with p_VERDICT by the model in --out, and each order's: the swapped one, swapped back, is the same."""
    model = keras.saving.load_model(options.out / "model.keras", compile=False)
    pairs = sides(rows, Tokenizer.from_file(str(options.out / "tokenizer.json")), options.tokens)
    data = batches(pairs, *np.zeros((2, len(pairs))), options.batch_size)
    p = model.predict(data, verbose=0)[: len(pairs), 0].astype(np.float64)
    for end in ("", "_as_given", "_swapped"):
        rows = rows.with_columns(**{f"p_model_a{end}": p, f"p_model_b{end}": 1 - p, f"p_tie{end}": pl.lit(0.0)})
    return rows


def measure(rows: pl.DataFrame) -> dict[str, float]:
    """Accuracy against the winners, ties left out, and log loss against the shares, by the names that all runs use."""
    target, p, winner = (rows[name].to_numpy() for name in ("target", "p_model_a", "winner"))
    longer = (rows["response_a"].str.len_chars() >= rows["response_b"].str.len_chars()).to_numpy()
    right, longer_right = ((says_a == (winner == "model_a"))[winner != "tie"].mean() for says_a in (p >= 0.5, longer))
    loss = -np.mean(target * np.log(np.clip(p, 1e-15, 1)) + (1 - target) * np.log(np.clip(1 - p, 1e-15, 1)))
    values = {"accuracy": right, "accuracy_as_given": right, "log_loss": loss, "log_loss_as_given": loss, "flip_rate": 0}
    return {name: float(value) for name, value in (values | {"accuracy_of_longer": longer_right}).items()}


def write(path: Path, save) -> None:
    """Call `save` with a temporary path beside `path`, which then takes that name: the file is whole or absent."""
    temporary = path.with_name(f".unfinished.{path.name}")
    save(temporary)
    os.replace(temporary, path)


def run(pairs: pl.DataFrame, settings: dict, options: argparse.Namespace) -> None:
    """Train on every GPU or logical CPU, then write the files; the last one, metrics.json, vouches for the others."""
    started, out = time.monotonic(), options.out
    pairs = pairs.with_columns(pl.col("weight") / pl.mean("weight"), target=pl.col("p_model_a") + pl.col("p_tie") / 2)
    if not (pairs["target"] + pairs["weight"]).is_finite().fill_null(False).all():
        raise UserError(f"{options.pairs}: a probability or weight is missing; write the file with python -m preprocess")
    parts = split(pairs, options)
    tokenizer = find_tokenizer(options.tokenizer, options.vocabulary, parts[0])
    fitted, checked = ((sides(part, tokenizer, options.tokens), part["target"], part["weight"]) for part in parts[:2])
    fitted = batches(*fitted, options.batch_size, np.random.default_rng(options.seed))
    checked = batches(*checked, options.batch_size)
    devices = [device.name for device in tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")]
    if options.batch_size % len(devices):
        raise UserError(f"--batch-size {options.batch_size}: expected a multiple of the {len(devices)} devices")
    with tf.distribute.MirroredStrategy(devices).scope():
        model = build(tokenizer.get_vocab_size(), options)
    print(
        f"{model.count_params():,} weights, {len(devices)} device(s), {len(parts[0])} pairs; ends where val_loss rises twice",
        flush=True,
    )
    stop = keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)
    model.fit(fitted, validation_data=checked, epochs=options.epochs, callbacks=[stop], shuffle=False, verbose=2)
    if not np.isfinite(stop.best):
        raise UserError(f"--learning-rate {options.learning_rate}: the loss is not finite; lower it")
    for name in ("metrics.json", "submission.csv"):
        (out / name).unlink(missing_ok=True)
    write(out / "tokenizer.json", lambda path: tokenizer.save(str(path)))
    write(out / "model.keras", keras.Model(model.inputs, model.outputs).save)  # without Adam's two numbers a weight
    trained, held_out = time.monotonic(), predict(parts[2], options).sort("id")
    write(out / "predictions.parquet", held_out.select("id", "fold", "winner", "^p_.*$").write_parquet)
    values = measure(held_out) | {"rows": len(held_out), "fold": options.fold, "rows_were_trained_on": False}
    values |= {"seconds_training": round(trained - started, 1), "seconds_predicting": round(time.monotonic() - trained, 1)}
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
    told = "accuracy {accuracy:.4f} on {rows} rows (the longer response: {accuracy_of_longer:.4f}), log loss {log_loss:.4f}"
    print(f"{metrics}: {told.format(**json.loads(metrics.read_text()))}")
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
