"""A run in Weights & Biases, where its recipe sets `wandb_project`; where it does not, nothing here does anything.

Axolotl and transformers log losses and the metrics of each evaluation. Added here: recipe, contract and git commit in the
run's config, metrics by language and source, the worst rows, and the run's files by reference. Only the first process
logs. Once training has started, an error of wandb ends the tracking, never the training.
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import polars as pl
import wandb
from axolotl.utils.wandb_ import setup_wandb_env_vars
from pydantic import ValidationError
from transformers.integrations import WandbCallback
from wandb.sdk.lib import wbauth

from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_json, sha256, write_json
from preprocess.model_input import VERDICTS, Contract
from recipes.pairwise.data.datasets import read_pairs, targets
from recipes.pairwise.tracking import metrics
from recipes.pairwise.tracking.recipe_copy import RECIPE_COPY, TRACKED, TRIAL

LOG = logging.getLogger(__name__)
FILES = (
    *("adapter_model*.safetensors", "adapter_config.json", "model*.safetensors"),
    *("contract.json", "metrics.json", "model_input.py", "predictions.parquet", RECIPE_COPY),
)
MOST_GROUPS, MOST_ROWS, MOST_CHARACTERS = 30, 200, 400
FINISH_SECONDS = 600  # wandb's own default is to wait for the network for ever


def check(cfg: dict) -> None:
    """Raise UserError where wandb would ask who logs in: nobody answers a training, and it asks once the model is loaded."""
    setup_wandb_env_vars(cfg)
    if cfg.get("use_wandb") and not cfg.get("wandb_project"):
        raise UserError("use_wandb: names no project; set wandb_project instead")
    if cfg.get("wandb_project") and is_first() and not is_ready():
        raise UserError(
            f"wandb_project: {cfg['wandb_project']}, but nobody is logged in to wandb: run `wandb login`, or set "
            "WANDB_MODE=offline (`wandb sync` uploads the run later) or WANDB_MODE=disabled"
        )


def is_ready() -> bool:
    """Whether wandb has a login, or needs none. Never asks, sends nothing; a setting or key that it refuses is a UserError."""
    try:
        settings = wandb.setup().settings
        if settings.mode in ("offline", "dryrun", "disabled"):
            return True
        login = wbauth.authenticate_session(host=settings.base_url, source="train", prompt=False, update_session=False)
    except ValidationError as error:
        problem = error.errors()[0]
        raise UserError(f"wandb: {'.'.join(map(str, problem['loc']))}: {problem['msg']}") from None
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {one_line(error)}") from None
    return login is not None


def start(cfg: dict, recipe: dict, contract: Contract) -> None:
    """Begin the run, or raise UserError; before the model is loaded, so that it fails in time. A run folder has one run."""
    if not is_first():
        return
    folder = Path(cfg["output_dir"])
    (folder / TRACKED).unlink(missing_ok=True)
    if not cfg.get("wandb_project"):
        return
    name = name_of(folder)
    git = {key.removeprefix("git_"): value for key, value in ledger.git_state().items()}
    try:
        run = wandb.init(
            project=cfg["wandb_project"],
            entity=cfg.get("wandb_entity"),
            name=cfg.get("wandb_name") or name,
            group=name.split("/")[0],
            id=cfg.get("wandb_run_id"),
            job_type="train",
            config={"recipe": recipe, "contract": without_golden(asdict(contract)), "git": git},
            settings=wandb.Settings(finish_timeout=wandb.setup().settings.finish_timeout or FINISH_SECONDS),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb_project: {cfg['wandb_project']}: {one_line(error)}; mend that, or set WANDB_MODE=offline (`wandb sync` "
            "uploads the run later)"
        ) from None
    if not run.disabled:
        told = {"entity": run.entity or None, "project": run.project, "id": run.id, "name": run.name, "mode": run.settings.mode}
        write_json(folder / TRACKED, told)


def name_of(folder: Path) -> str:
    """A run's name, whose first part is its group: R/fold-0 in outputs/R/fold-0, R/sweep0001, or R alone."""
    folder = folder.absolute()
    parts = [folder.name]
    while TRIAL.fullmatch(parts[0]) or parts[0].startswith("fold-"):
        folder = folder.parent
        parts.insert(0, folder.name)
    return "/".join(parts)


def is_first() -> bool:
    """Whether this process is the one that logs."""
    return int(os.environ.get("RANK", "0")) == 0


def is_on() -> bool:
    """Whether this process logs to a run."""
    return wandb.run is not None and not wandb.run.disabled


@contextlib.contextmanager
def harmless() -> Iterator[None]:
    """Turn an error of wandb into a line in the log; what is tracked goes on."""
    try:
        yield
    except Exception as error:
        LOG.error("wandb: %s: %s; this is not tracked, all else goes on", type(error).__name__, one_line(error))


def one_line(error: Exception) -> str:
    """An error's message without its line breaks, and without advice for programmers."""
    return " ".join(str(error).split()).split(" Consider increasing the init_timeout")[0]


class HarmlessCallback(WandbCallback):
    """transformers' callback, for which a broken connection to wandb's own process would be the end of the training.

    After an error it is silent: with `_wandb` None, WandbCallback does nothing.
    """

    def _try(self, hook, args, state, control, **kwargs):
        try:
            hook(args, state, control, **kwargs)
        except Exception as error:
            self._wandb = None
            LOG.error("wandb: %s: %s; tracking ends here, the training goes on", type(error).__name__, one_line(error))

    def on_train_begin(self, args, state, control, **kwargs):
        self._try(super().on_train_begin, args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        self._try(super().on_train_end, args, state, control, **kwargs)

    def on_log(self, args, state, control, **kwargs):
        self._try(super().on_log, args, state, control, **kwargs)

    def on_predict(self, args, state, control, **kwargs):
        self._try(super().on_predict, args, state, control, **kwargs)


def make_harmless(trainer) -> None:
    """Put HarmlessCallback in the place of transformers' callback."""
    if trainer.pop_callback(WandbCallback):
        trainer.add_callback(HarmlessCallback)


def log_groups(pairs: str, ids: list[str], both_rov: np.ndarray, labels_rv: np.ndarray, winners_r: np.ndarray) -> None:
    """Add the metrics of each language and source to the row that the callback logs next, as eval/accuracy/language/English."""
    if is_on():
        with harmless():
            found = metrics.by_group(groups(pairs, ids), both_rov, labels_rv, winners_r)
            wandb.run.log({f"eval/{name}": value for name, value in found.items()}, commit=False)


def groups(pairs: str, ids: list[str]) -> dict[str, np.ndarray]:
    """The language and the source of the rows `ids`, by column; "other" beyond the largest."""
    columns = [name for name in ("language", "source") if name in pl.read_parquet_schema(pairs)]
    frame = pl.read_parquet(pairs, columns=["id", *columns])
    rows = pl.DataFrame({"id": ids}).join(frame, on="id", how="left", maintain_order="left")
    found = {}
    for column in columns:
        counts = rows[column].drop_nulls().value_counts().sort(["count", column], descending=[True, False])
        is_large = pl.col(column).is_in(counts[column][:MOST_GROUPS].to_list())
        found[column] = rows.select(pl.when(is_large).then(column).otherwise(pl.lit("other"))).to_series().to_numpy()
    return found


def finish(folder: Path, pairs: str, verdicts: tuple[str, ...]) -> None:
    """Log what stands in the finished run folder, and end the run."""
    if not is_on():
        return
    run = wandb.run
    with harmless():
        run.config.update({"contract": without_golden(read_json(folder / "contract.json"))}, allow_val_change=True)
        run.summary.update({"metrics": read_json(folder / "metrics.json")})
        table = worst_rows(pl.read_parquet(folder / "predictions.parquet"), read_pairs(pairs), verdicts)
        run.log({"worst_rows": wandb.Table(columns=table.columns, data=table.rows())})
        run.log_artifact(artifact(folder, "run", run_files(folder)))
    with harmless():
        run.finish()


def without_golden(contract: dict) -> dict:
    """A contract but for its golden rows, which are long and the same for every run of a base model."""
    return {key: value for key, value in contract.items() if key != "golden"}


def worst_rows(predictions: pl.DataFrame, pairs: pl.DataFrame, verdicts: tuple[str, ...]) -> pl.DataFrame:
    """Return the validation rows of the greatest loss, the greatest first, with their probabilities and texts.

    The loss is the cross-entropy of both orders' mean against the soft labels; texts are shortened.
    """
    rows = predictions.drop("fold", "winner").join(pairs, on="id", suffix="_label", maintain_order="left")
    labels_rv = targets(rows.select(pl.col(f"p_{name}_label").alias(f"p_{name}") for name in VERDICTS), verdicts)
    means_rv = rows.select(f"p_{verdict}" for verdict in verdicts).to_numpy()
    rows = rows.with_columns(loss=metrics.row_losses(means_rv, labels_rv))
    known = [name for name in ("language", "source") if name in rows.columns]
    orders = [f"p_{verdict}_{order}" for order in metrics.ORDERS for verdict in verdicts]
    texts = [shortened(name) for name in ("prompt", "response_a", "response_b")]
    worst = rows.sort("loss", "id", descending=[True, False]).head(MOST_ROWS)
    return worst.select("id", *known, "winner", *orders, "loss", *texts)


def shortened(column: str) -> pl.Expr:
    """A text of several turns as one, cut where it is long."""
    whole = pl.col(column).list.eval(pl.element().fill_null("")).list.join("\n\n")
    cut = whole.str.slice(0, MOST_CHARACTERS) + pl.lit("…")
    return pl.when(whole.str.len_chars() > MOST_CHARACTERS).then(cut).otherwise(whole).alias(column)


def artifact(folder: Path, kind: str, files: Iterable[Path]) -> wandb.Artifact:
    """Files by reference: where they are and their checksums; no byte of them is uploaded."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{name_of(folder)}-{kind}")
    found = wandb.Artifact(name, type=kind, metadata={"folder": str(folder)})
    for file in files:
        found.add_reference(file.resolve().as_uri(), name=file.name)
    return found


def run_files(folder: Path) -> list[Path]:
    """What makes the run in `folder`: weights, contract, predictions, metrics, recipe."""
    return sorted(file for pattern in FILES for file in folder.glob(pattern))


def log_package(folder: Path, package: Path) -> None:
    """Log the package of a tracked run by reference, in a run of its own beside it; an error of wandb costs only that."""
    known = read_json(folder / TRACKED)
    with harmless():
        os.environ.setdefault("WANDB_MODE", known["mode"])
        if not is_ready():
            raise UserError("nobody is logged in; run `wandb login`")
        with wandb.init(
            project=known["project"],
            entity=known["entity"],
            name=f"{known['name']}/package",
            group=name_of(folder).split("/")[0],
            job_type="package",
            config={"run": known["id"], "manifest_sha256": sha256(package / "manifest.json")},
            settings=wandb.Settings(silent=True, finish_timeout=FINISH_SECONDS),
        ) as run:
            run.log_artifact(artifact(folder, "package", sorted(package.iterdir())))
