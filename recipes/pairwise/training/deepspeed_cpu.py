"""DeepSpeed on CPUs, over gloo: what Axolotl, accelerate and DeepSpeed each get wrong there, put right in one place.

On GPUs nothing here runs but the last check. Left alone, on CPUs: Axolotl asks for NCCL in a single process; accelerate
trains with DDP under ACCELERATE_USE_CPU whatever the recipe says, and without it takes every process for the only one;
Axolotl's trainer forgets a process group's state that was right; DeepSpeed's step fails in autograd.
"""

import os

import torch
from accelerate.state import AcceleratorState, PartialState
from transformers import TrainerCallback


def deepspeed_on_cpu(deepspeed: object) -> bool:
    """Return whether DeepSpeed is asked for where there is no GPU, as in tests and on laptops."""
    return bool(deepspeed) and not torch.cuda.is_available()


def start_group() -> None:
    """Make PyTorch's group of training processes, over gloo, before Axolotl makes one that needs GPUs."""
    # With this variable, accelerate would train with DDP whatever the recipe says.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    os.environ["DS_ACCELERATOR"] = "cpu"

    if not torch.distributed.is_initialized():
        is_single_process = os.environ.get("WORLD_SIZE", "1") == "1"
        if is_single_process:
            # DeepSpeed reads these variables. A launcher would have set them.
            os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        else:
            torch.distributed.init_process_group("gloo")
    tell_accelerate()


def tell_accelerate() -> None:
    """Have accelerate see the group: DeepSpeed, over gloo, with all its processes."""
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    # What accelerate concluded earlier, in this process, is forgotten.
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(backend="gloo")


class StepsWithoutGrad(TrainerCallback):
    """Lets DeepSpeed's engine step: gloo's all-gather writes into views of parameters, which autograd forbids."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        engine = self.trainer.model_wrapped
        engine.step = torch.no_grad()(engine.step)


def check_engine(deepspeed: object, trainer) -> None:
    """Raise where DeepSpeed is in the recipe and something else has trained: only the memory would tell."""
    engine = type(trainer.model_wrapped).__name__
    if deepspeed and engine != "DeepSpeedEngine":
        raise RuntimeError(f"deepspeed is set in the recipe, but {engine} has trained")
