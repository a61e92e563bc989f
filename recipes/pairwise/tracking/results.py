"""What a run says of its validation rows: predictions.parquet, metrics.json and history.json, written once it is trained."""

import time
from pathlib import Path

import numpy as np
import polars as pl

from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, sha256, write_json
from recipes.pairwise.config.schema import PairwiseBlock
from recipes.pairwise.data.datasets import read_pairs
from recipes.pairwise.data.teacher_labels import hash_labels
from recipes.pairwise.processes import LOG
from recipes.pairwise.tracking import metrics

# They vouch for the weights beside them.
FILES = ("contract.json", "metrics.json", "predictions.parquet", "history.json")


def remove_earlier(folder: Path) -> None:
    """Remove what an earlier run wrote: it must not vouch for the weights of the run that starts."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def write_results(folder: Path, trainer, block: PairwiseBlock, started: float) -> None:
    """Predict the validation rows in all processes, and write the results in the first.

    The trainer has them as its eval_dataset; the run began at `started` on time.monotonic()'s clock.

    Raises:
        UserError: A probability is not finite.
    """
    end_of_training = time.monotonic()
    # Every process predicts its share, and the first one gets all of them.
    rows = trainer.eval_dataset
    output = trainer.predict(rows, metric_key_prefix="eval")
    if not trainer.is_world_process_zero():
        return

    probabilities_rov = metrics.probabilities(output.predictions, block.verdicts)
    if not np.isfinite(probabilities_rov).all():
        raise UserError(
            f"{folder}: the model's probabilities are not finite; lower the learning rate or use bf16"
        )

    # Fold and winner of each row are in the pairs file.
    pairs = read_pairs(block.pairs)
    table = metrics.predictions(list(rows["id"]), probabilities_rov, block.verdicts, pairs)
    with atomic_file(folder / "predictions.parquet") as temporary:
        table.write_parquet(temporary)

    # label_ids holds the soft labels, (rows, orders, verdicts); the first order is the one as given.
    labels_rv = output.label_ids[:, 0]
    scores = metrics.scores(probabilities_rov, labels_rv, np.array(rows["winner"]))
    validation_pairs = pairs.filter(pl.col("id").is_in(table["id"].to_list()))
    facts = {
        "accuracy_of_longer": metrics.longer_is_right(validation_pairs),
        "rows": len(table),
        "training_rows": len(trainer.train_dataset),
        "fold": block.fold,
        "rows_were_trained_on": block.fold == "all",
        "steps": trainer.state.global_step,
        "seconds_training": round(end_of_training - started, 1),
        "seconds_predicting": round(time.monotonic() - end_of_training, 1),
        "pairs_sha256": sha256(block.pairs),
        "labels_sha256": hash_labels(block.distill),
    }
    write_json(folder / "metrics.json", scores | facts)
    write_json(folder / "history.json", metrics.history(trainer.state.log_history))
    LOG.info(
        "validation: accuracy %.4f, log loss %.4f, flips %.3f",
        scores["accuracy"],
        scores["log_loss"],
        scores["flip_rate"],
    )
