"""The hours that Kaggle's two T4s would take, predicted from the tokens that a rehearsal computed.

`rehearse.py` calls `predict_runs`. Each T4 is taken to do 2 x parameters x tokens floating-point operations at
T4_FLOP_PER_SECOND, and the copies of each package to be loaded one after the other, at the rate that the
kernel itself plans with. What follows from that is computed and told as in the visible run (see runtime/visible.py).

Parameters and bytes are those of the recipe's base model, even where a small model stands in for it
in the rehearsal. Tokens are counted with padding, by the tokenizer of the rehearsed package.
"""

from collections.abc import Sequence

from kaggle_kernels.build.memory_fit import Fit
from kaggle_kernels.runtime.scheduling import plan
from kaggle_kernels.runtime.visible import predict_finish
from postprocess.memory.model_size import weight_bytes
from postprocess.memory.t4_fit import GPUS as T4S

# About a quarter of the 65e12 that NVIDIA's data sheet gives for float16; docs/rehearsal.md says from
# which two public runs it follows.
T4_FLOP_PER_SECOND = 1.5e13

# A multiplication and an addition for each parameter and token (Kaplan et al. 2020, section 2.1).
FLOP_PER_PARAMETER = 2


def predict_runs(
    fits: Sequence[Fit], passes: Sequence[dict], row_numbers: Sequence[int]
) -> list[dict]:
    """Predict how long two T4s would take for each of several numbers of rows.

    The rows are taken to be as long as those of the rehearsal.

    Args:
        fits: The spec's packages, with the sizes of their base models.
        passes: The key `passes` of kernel.json: what each model computed here in each order.
        row_numbers: The numbers of rows, e.g. 10,000 and 25,000.

    Returns:
        A prediction for each number of rows (see visible.predict_finish); none where no model scored a row.
    """
    if not any(record["scored"] for record in passes):
        return []

    # Each pass as it would have been on two T4s.
    parameters = {fit.package.run: count_multiplied_parameters(fit) for fit in fits}
    t4_passes = []
    for record in passes:
        flop = FLOP_PER_PARAMETER * parameters[record["run"]] * record["computed_tokens"]
        t4_passes.append({**record, "seconds": flop / (T4S * T4_FLOP_PER_SECOND)})

    loading_seconds = predict_loading(fits)
    return [predict_finish(t4_passes, loading_seconds, rows) for rows in row_numbers]


def predict_loading(fits: Sequence[Fit]) -> float:
    """Predict how long loading takes: one copy on each T4, or one that is split over them."""
    bytes_to_load = 0
    for fit in fits:
        copies = T4S if fit.placement == "each" else 1
        bytes_to_load += copies * sum(weight_bytes(fit.served))
    return bytes_to_load / plan.LOAD_BYTES_PER_SECOND


def count_multiplied_parameters(fit: Fit) -> int:
    """Count the parameters of the recipe's base model that every token is multiplied with."""
    parameters = 0
    for weight in fit.served.weights:
        if plan.is_multiplied(weight.name):
            parameters += weight.elements
    return parameters
