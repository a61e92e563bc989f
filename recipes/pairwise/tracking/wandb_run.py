"""Weights & Biases, to which Axolotl and transformers log where a recipe sets `wandb_project`; otherwise nothing here acts.

Axolotl stores the recipe beside the curves, wandb the git commit. Seen to here: a login before anything is
loaded, the run's name and group, and that an error of wandb ends the tracking, never the training. No row of
the data is sent: the report shows those. Only the first process logs.
"""

import logging
import os
from pathlib import Path

import wandb
from axolotl.utils.wandb_ import setup_wandb_env_vars
from pydantic import ValidationError
from transformers.integrations import WandbCallback
from wandb.sdk.lib import wbauth

from preprocess.core.errors import UserError
from recipes.pairwise.tracking.recipe_copy import TRIAL

LOG = logging.getLogger(__name__)

MODES_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
FINISH_SECONDS = "600"  # wandb's own default is to wait for the network for ever


def check(cfg: dict) -> None:
    """Raise UserError where wandb would ask who logs in.

    Nobody answers a training, and wandb asks only once the model is loaded.
    """
    # As Axolotl does it later: wandb reads its settings from the environment.
    setup_wandb_env_vars(cfg)
    project = cfg.get("wandb_project")
    is_first = int(os.environ.get("RANK", "0")) == 0
    if project and is_first and not is_ready():
        raise UserError(
            f"wandb_project: {project}, but nobody is logged in to wandb: run `wandb login`, or set "
            "WANDB_MODE=offline (`wandb sync` uploads the run later) or WANDB_MODE=disabled"
        )


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
        # wandb reads its settings from the environment, by pydantic. Of each wrong one, pydantic has a
        # dictionary: `loc` is the path to it, such as ("mode",), and `msg` what is wrong. The first one
        # is told.
        problem = error.errors()[0]
        setting = ".".join(str(part) for part in problem["loc"])
        raise UserError(f"wandb: {setting}: {problem['msg']}") from None
    except wandb.errors.Error as error:
        message = " ".join(str(error).split())
        raise UserError(f"wandb: {message}") from None
    return login is not None


def name_run(cfg: dict) -> None:
    """Name the run after its folder, unless the recipe does: R for outputs/R, R/fold-0 for outputs/R/fold-0.

    The folds or trials of a recipe are one group: the part before the first slash.
    """
    if not cfg.get("wandb_project"):
        return

    folder = Path(cfg["output_dir"]).absolute()
    parts = [folder.name]
    # The name of a fold or a trial says nothing alone: those of the folders around it are put before it.
    while TRIAL.fullmatch(parts[0]) or parts[0].startswith("fold-"):
        folder = folder.parent
        parts.insert(0, folder.name)

    if not cfg.get("wandb_name"):
        cfg["wandb_name"] = "/".join(parts)
    os.environ["WANDB_RUN_GROUP"] = parts[0]
    os.environ.setdefault("WANDB_FINISH_TIMEOUT", FINISH_SECONDS)


class HarmlessCallback(WandbCallback):
    """transformers' callback, for which a broken connection to wandb would end the training."""

    def on_log(self, args, state, control, **kwargs):
        try:
            super().on_log(args, state, control, **kwargs)
        except Exception as error:
            # WandbCallback does nothing from here on.
            self._wandb = None
            name = type(error).__name__
            LOG.error("wandb: %s: %s; tracking ends here, the training goes on", name, error)


def make_harmless(trainer) -> None:
    """Put HarmlessCallback in the place of transformers' callback."""
    # It keeps the place, for Axolotl's callback behind it adds the recipe to the run that it begins.
    callbacks = trainer.callback_handler.callbacks
    for place, callback in enumerate(callbacks):
        if type(callback) is WandbCallback:
            callbacks[place] = HarmlessCallback()


def finish() -> None:
    """End the run, where there is one: a sweep may train its next trial in the same process."""
    try:
        wandb.finish()
    except Exception as error:
        LOG.error("wandb: %s: %s; the run's end is not tracked", type(error).__name__, error)
