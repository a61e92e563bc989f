"""An exponential moving average of the trained weights, which replaces them when training ends.

The plugin adds the callback where a recipe sets `pairwise.ema_decay`. Evaluations during the training
are of the weights themselves.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback

from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file
from recipes.pairwise.processes import stopping_on_errors

AVERAGE_FILE = "moving_average.safetensors"  # in each checkpoint


def decay_at(step: int, decay: float) -> float:
    """Return the decay of a step: smaller in the first ones, which TensorFlow's average does too.

    An average over a short run would otherwise consist of the weights that it began with.
    """
    return min(decay, (1 + step) / (10 + step))


class MovingAverage(TrainerCallback):
    """Averages the trained weights over the steps (Polyak and Juditsky 1992), with weights that decay.

    A checkpoint keeps the average too, so that a run that is resumed ends with the same weights.
    """

    def __init__(self, decay: float):
        self.decay = decay
        self.average: dict[str, torch.Tensor] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Begin with the model's weights, or in a run that is resumed with its checkpoint's average."""
        for name, weight in trained_weights(model).items():
            self.average[name] = weight.clone()

        is_resumed = state.global_step > 0
        if is_resumed:
            with stopping_on_errors():
                self.read_average(checkpoint_file(args, state))

    def read_average(self, file: Path) -> None:
        """Read the average from a checkpoint; raise UserError where the checkpoint has none."""
        if not file.is_file():
            raise UserError(
                f"{file}: no such file, the run was interrupted while it saved this checkpoint; "
                f"remove {file.parent} and resume"
            )
        for name, weight in load_file(file).items():
            self.average[name].copy_(weight)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Move the average towards the weights of this step."""
        # average = decay * average + (1 - decay) * weight
        share_of_step = 1 - decay_at(state.global_step, self.decay)
        for name, weight in trained_weights(model).items():
            self.average[name].lerp_(weight, share_of_step)

    def on_save(self, args, state, control, **kwargs):
        """Keep the average in the checkpoint that was just written."""
        # All processes hold the same average.
        if state.is_world_process_zero:
            with atomic_file(checkpoint_file(args, state)) as temporary:
                save_file(self.average, temporary)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        """Replace the weights by their average, before the run predicts and saves them."""
        for name, weight in trained_weights(model).items():
            weight.copy_(self.average[name])


def trained_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that are trained by their names, without their gradients' history."""
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            weights[name] = parameter.detach()
    return weights


def checkpoint_file(args, state) -> Path:
    """Return the file of the average in the checkpoint of the present step."""
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / AVERAGE_FILE
