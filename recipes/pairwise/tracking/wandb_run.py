"""A run in Weights & Biases, where its recipe sets `wandb_project`; otherwise nothing here acts.

Axolotl and transformers log losses and the metrics of each evaluation. Added here: recipe, contract
and git commit in the run's config, and the metrics of the finished run. No row of the data is sent:
the report shows those. Only the first process logs. Once training has started, an error of wandb
ends the tracking, never the training.
"""

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import wandb
from axolotl.utils.wandb_ import setup_wandb_env_vars
from pydantic import ValidationError
from transformers.integrations import WandbCallback
from wandb.sdk.lib import wbauth

from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import read_json
from preprocess.model_input import Contract
from recipes.pairwise.tracking.recipe_copy import TRIAL

LOG = logging.getLogger(__name__)

MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
FINISH_SECONDS = 600  # wandb's own default is to wait for the network for ever


def check(cfg: dict) -> None:
    """Check before the model is loaded that a run which Weights & Biases is to track can log in there.

    Otherwise wandb would ask for a key during the training, when nobody is there to answer.

    Raises:
        UserError: Nobody is logged in, or use_wandb is set without wandb_project.
    """
    # wandb reads its settings from the environment. Axolotl copies the recipe's there, but later.
    setup_wandb_env_vars(cfg)
    project = cfg.get("wandb_project")
    if cfg.get("use_wandb") and not project:
        raise UserError("use_wandb: names no project; set wandb_project instead")
    if project and is_first() and not is_ready():
        raise UserError(
            f"wandb_project: {project}, but nobody is logged in to wandb: run `wandb login`, or set "
            "WANDB_MODE=offline (`wandb sync` uploads the run later) or WANDB_MODE=disabled"
        )


def is_first() -> bool:
    """Return whether this process is the one that logs."""
    return int(os.environ.get("RANK", "0")) == 0


def is_ready() -> bool:
    """Find out whether wandb has a login, or needs none.

    Nothing is sent. With `prompt=False` wandb asks nobody for a key: it gives None where it finds none.

    Raises:
        UserError: wandb refuses a setting or a key.
    """
    try:
        settings = wandb.setup().settings
        if settings.mode in MODES_WITHOUT_LOGIN:
            return True
        login = wbauth.authenticate_session(
            host=settings.base_url, source="train", prompt=False, update_session=False
        )
    except ValidationError as error:
        # wandb checks its settings with pydantic, which describes each wrong one by a dictionary: `loc` is
        # the path to it, such as ("mode",), and `msg` what is wrong. The first one is reported.
        problem = error.errors()[0]
        setting = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"wandb: {setting}: {problem['msg']}") from None
    except wandb.errors.Error as error:
        raise UserError(f"wandb: {one_line(error)}") from None
    return login is not None


def start(cfg: dict, recipe: dict, contract: Contract) -> None:
    """Begin the run, before the model is loaded, so that it fails in time.

    Raises:
        UserError: The run cannot begin.
    """
    project = cfg.get("wandb_project")
    if not is_first() or not project:
        return

    # What the run's page shows beside its curves. The ledger's git_commit is commit here, below git.
    git_state = {key.removeprefix("git_"): value for key, value in ledger.git_state().items()}
    contract_keys = without_golden(asdict(contract))
    config = {"recipe": recipe, "contract": contract_keys, "git": git_state}

    # The folds or trials of a recipe are one group: R/fold-0 is in the group R.
    name = name_of(Path(cfg["output_dir"]))
    group = name.split("/")[0]
    finish_timeout = wandb.setup().settings.finish_timeout or FINISH_SECONDS
    try:
        wandb.init(
            project=project,
            entity=cfg.get("wandb_entity"),
            name=cfg.get("wandb_name") or name,
            group=group,
            id=cfg.get("wandb_run_id"),
            job_type="train",
            config=config,
            settings=wandb.Settings(finish_timeout=finish_timeout),
        )
    except wandb.errors.Error as error:
        raise UserError(
            f"wandb_project: {project}: {one_line(error)}; mend that, or set "
            "WANDB_MODE=offline (`wandb sync` uploads the run later)"
        ) from None


def name_of(folder: Path) -> str:
    """Name a run by its folder: R for outputs/R, R/fold-0 for outputs/R/fold-0, R/sweep0001/fold-0.

    The part before the first slash is the run's group.
    """
    folder = folder.absolute()
    parts = [folder.name]

    # The name of a fold or a trial says nothing alone: those of the folders around it are put before it.
    while TRIAL.fullmatch(parts[0]) or parts[0].startswith("fold-"):
        folder = folder.parent
        parts.insert(0, folder.name)
    return "/".join(parts)


def without_golden(contract: dict) -> dict:
    """Drop a contract's golden rows, which are long and the same for all runs of a base model."""
    return {key: value for key, value in contract.items() if key != "golden"}


class HarmlessCallback(WandbCallback):
    """transformers' callback, for which a broken connection to wandb would end the training.

    After an error it is silent: with `_wandb` None, WandbCallback does nothing.
    """

    @contextlib.contextmanager
    def _harmless(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            # WandbCallback does nothing from here on.
            self._wandb = None
            LOG.error(
                "wandb: %s: %s; tracking ends here, the training goes on",
                type(error).__name__,
                one_line(error),
            )

    def on_train_begin(self, args, state, control, **kwargs):
        with self._harmless():
            super().on_train_begin(args, state, control, **kwargs)

    def on_train_end(self, args, state, control, **kwargs):
        with self._harmless():
            super().on_train_end(args, state, control, **kwargs)

    def on_log(self, args, state, control, **kwargs):
        with self._harmless():
            super().on_log(args, state, control, **kwargs)

    def on_predict(self, args, state, control, **kwargs):
        with self._harmless():
            super().on_predict(args, state, control, **kwargs)


def make_harmless(trainer) -> None:
    """Put HarmlessCallback in the place of transformers' callback."""
    # Without wandb there is no such callback.
    if trainer.pop_callback(WandbCallback):
        trainer.add_callback(HarmlessCallback)


def finish(folder: Path) -> None:
    """Send wandb the contract and the metrics of a finished run folder, and end the tracking.

    The run itself is complete by then, so that an error of wandb is logged and not raised.
    """
    if wandb.run is None or wandb.run.disabled:
        return

    try:
        # `start` has sent a contract too. That of the finished run says more: training has added to it.
        contract = without_golden(read_json(folder / "contract.json"))
        wandb.run.config.update({"contract": contract}, allow_val_change=True)
        wandb.run.summary.update({"metrics": read_json(folder / "metrics.json")})
        wandb.run.finish()
    except Exception as error:
        LOG.error(
            "wandb: %s: %s; the run's end is not tracked", type(error).__name__, one_line(error)
        )


def one_line(error: Exception) -> str:
    """Return an error's message without line breaks, and without advice for programmers."""
    # wandb's messages have several lines.
    message = " ".join(str(error).split())
    return message.split(" Consider increasing the init_timeout")[0]
