"""Throughput: the speed of a rehearsal here, and the hours that Kaggle's two T4s would take.

`rehearse.py` calls `measure_speed` and `predict_runs` with the kernel's record of its passes, and
prints `report_throughput`.

The copies of each package are loaded one after the other, at the rate that the kernel itself plans
with. Then each T4 does 2 x parameters x tokens floating-point operations at T4_FLOP_PER_SECOND. The
models of an ensemble run one after the other.

Parameters and bytes are those of the recipe's base model, even where a small model stands in for it
in the rehearsal. Tokens are counted with padding, by the tokenizer of the rehearsed package.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kaggle_kernels.build.memory_fit import Fit
from kaggle_kernels.build.spec import Spec
from kaggle_kernels.runtime.scheduling import plan
from postprocess.memory.model_size import weight_bytes
from postprocess.memory.t4_fit import GPUS as T4S
from preprocess.competitions import COMPETITIONS
from preprocess.core.durations import format_duration

# About a quarter of the 65e12 that NVIDIA's data sheet gives for float16. Two public runs on two
# T4s come to the same: vLLM with a 14B in 8 bits at 70,000 tokens a minute, which is
# 2 * 13.2e9 * 70,000 / 60 / 2 = 1.54e13 on each; and Gemma-2-9b in nf4, 25,000 rows of about
# 1,000 tokens in 4 hours, which is 1.3e13 (for 900 tokens) to 1.6e13 (for 1,110).
T4_FLOP_PER_SECOND = 1.5e13

# A multiplication and an addition for each parameter and token (Kaplan et al. 2020, section 2.1).
FLOP_PER_PARAMETER = 2


@dataclass(frozen=True)
class Speed:
    """What was measured on this machine, over all passes. `padding` is a share of all tokens."""

    rows_per_second: float
    tokens_per_second: float  # without padding
    padding: float


@dataclass(frozen=True)
class Prediction:
    """Seconds that two T4s take for so many rows, by phase, all models together."""

    rows: int
    clock_seconds: float  # the kernel's time limit for so many rows
    loading: float
    first_order: float
    second_order: float  # 0 where no model has a second order

    @property
    def one_order(self) -> float:
        """Seconds until every model has scored every row once."""
        return self.loading + self.first_order

    @property
    def finish(self) -> float:
        """Seconds from the beginning to the end of the last order."""
        return self.one_order + self.second_order


def predict_runs(
    fits: Sequence[Fit], spec: Spec, passes: Sequence[dict], rows: int
) -> list[Prediction]:
    """Predict two T4s' time for the rehearsed number of rows, and for the hidden tests' numbers.

    Args:
        fits: The spec's packages, with the sizes of their base models.
        spec: The kernel's spec.
        passes: The key `passes` of kernel.json: what each model computed here in each order.
        rows: Number of rows in the rehearsed test file; other rows are taken to be as long.

    Returns:
        One prediction for each number of rows, the rehearsed number first.
    """
    runs_that_scored = {record["run"] for record in passes if record["scored"] > 0}

    # The work for a mean row in each order, all models together.
    first_order_flop = 0.0
    second_order_flop = 0.0
    for fit in fits:
        # The clock may have left no time for a later model: the first one's tokens are a guess.
        run = fit.package.run
        if run not in runs_that_scored:
            run = fits[0].package.run

        first_order_tokens, second_order_tokens = measure_tokens_per_row(passes, run, rows)
        flop_per_token = FLOP_PER_PARAMETER * count_multiplied_parameters(fit)
        first_order_flop += flop_per_token * first_order_tokens
        if spec.orders == "both" and fit.served.head != "reward":
            second_order_flop += flop_per_token * second_order_tokens

    # Rows cost time in proportion to their number, loading does not.
    loading = predict_loading(fits)
    flop_per_second = T4S * T4_FLOP_PER_SECOND
    hidden_rows = COMPETITIONS[spec.competition].hidden_rows
    predictions = []
    for number in dict.fromkeys((rows, *hidden_rows)):  # each number once, in this order
        prediction = Prediction(
            rows=number,
            clock_seconds=spec.time_limit(number),
            loading=loading,
            first_order=number * first_order_flop / flop_per_second,
            second_order=number * second_order_flop / flop_per_second,
        )
        predictions.append(prediction)
    return predictions


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


def measure_tokens_per_row(passes: Sequence[dict], run: str, rows: int) -> tuple[float, float]:
    """Measure how many tokens a model computes for a mean row, padding included.

    Args:
        passes: What each model computed in each order (see `predict_runs`).
        run: The model's run.
        rows: Number of rows in the rehearsed test file.

    Returns:
        The tokens in the first and in the second order; both are 0 where the model scored nothing.
    """
    first_order_tokens, _ = average_tokens(passes, run, "as_given")
    second_order_tokens, scored_rows = average_tokens(passes, run, "swapped")

    # With too little time for all rows the kernel takes short ones in the second order, so that their
    # mean is too small. Both orders of a row have about as many tokens.
    has_all_rows = scored_rows == rows
    if not has_all_rows:
        second_order_tokens = first_order_tokens
    return first_order_tokens, second_order_tokens


def average_tokens(passes: Sequence[dict], run: str, order: str) -> tuple[float, int]:
    """Return a run's computed tokens a scored row in one order, and the number of scored rows."""
    scored_rows = 0
    computed_tokens = 0
    for record in passes:
        if record["run"] == run and record["order"] == order:
            scored_rows += record["scored"]
            computed_tokens += record["computed_tokens"]

    if scored_rows == 0:
        return 0.0, 0
    return computed_tokens / scored_rows, scored_rows


def measure_speed(passes: Sequence[dict]) -> Speed:
    """Measure the speed on this machine, over all passes that kernel.json records."""
    seconds = sum(record["seconds"] for record in passes)
    rows = sum(record["scored"] for record in passes)
    tokens = sum(record["tokens"] for record in passes)
    computed_tokens = sum(record["computed_tokens"] for record in passes)  # with padding

    # The clock may have left no time for a single batch.
    if seconds == 0 or computed_tokens == 0:
        return Speed(rows_per_second=0.0, tokens_per_second=0.0, padding=0.0)
    return Speed(
        rows_per_second=round(rows / seconds, 2),
        tokens_per_second=round(tokens / seconds, 1),
        padding=round(1 - tokens / computed_tokens, 4),
    )


def report_throughput(speed: Speed, predictions: Sequence[Prediction]) -> list[str]:
    """Write the lines of the log: the speed here, the predictions, and a warning if it is too slow.

    The first prediction is for the rehearsed number of rows.
    """
    lines = [
        f"here: {speed.rows_per_second:.1f} rows/s, {speed.tokens_per_second:.0f} tokens/s, "
        f"padding {speed.padding:.1%}"
    ]
    for prediction in predictions:
        lines.append(format_prediction(prediction))

    # The predictions for other numbers of rows are for information only.
    rehearsed = predictions[0]
    if rehearsed.one_order > rehearsed.clock_seconds:
        lines.append(
            f"warning: {rehearsed.rows:,} rows are predicted to take "
            f"{format_duration(rehearsed.one_order)} in one order alone, the clock is "
            f"{format_duration(rehearsed.clock_seconds)}: rows would be left to the prior; "
            "lower budget_tokens, or take a smaller model"
        )
    return lines


def format_prediction(prediction: Prediction) -> str:
    """Format a prediction as a line of the log, with the part of the second order that fits in."""
    clock_seconds = prediction.clock_seconds
    phases = [
        f"loading {format_duration(prediction.loading)}",
        f"first order {format_duration(prediction.first_order)}",
    ]
    if prediction.second_order > 0:
        phases.append(f"second order {format_duration(prediction.second_order)}")
    phases.append(f"predicted finish {format_duration(prediction.finish)}")
    line = (
        f"{prediction.rows:,} rows of these lengths on two T4s: {', '.join(phases)} "
        f"of a clock of {format_duration(clock_seconds)}"
    )

    # Which rows get a second order is the kernel's choice: those that gain most by it.
    fits_in_part = prediction.one_order <= clock_seconds < prediction.finish
    if fits_in_part:
        share = (clock_seconds - prediction.one_order) / prediction.second_order
        line += f"; the clock has room for {share:.0%} of the second order"
    return line


def record_predictions(predictions: Sequence[Prediction]) -> list[dict]:
    """Convert the predictions to the key `two_t4s` of rehearsal.json, in whole seconds."""
    records = []
    for prediction in predictions:
        values = asdict(prediction) | {"finish": prediction.finish}
        records.append({name: round(value) for name, value in values.items()})
    return records
