"""How long a kernel should take on Kaggle's two T4s, from the tokens that a rehearsal computed here.

The model is that of runtime/plan.py: each copy of a package is loaded at LOAD_BYTES_PER_SECOND, one after the other; then a T4
does 2 x multiplied parameters x tokens floating-point operations at FLOP_PER_SECOND. Parameters and bytes are those of the
recipe's base model, even where the rehearsed package is a small one that stands in for it; tokens are counted with their
padding, by the tokenizer of the rehearsed package. Models of an ensemble are taken one after the other.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kaggle_kernels.build.memory_fit import Fit
from kaggle_kernels.build.spec import Spec
from kaggle_kernels.runtime.scheduling.plan import (
    FLOP_PER_SECOND,
    LOAD_BYTES_PER_SECOND,
    is_multiplied,
)
from postprocess.memory.model_size import weight_bytes, weights
from postprocess.memory.t4_fit import GPUS

ROWS = (10_000, 25_000)  # the hidden test of WSDM's public phase; of its final phase, and LMSYS's


@dataclass(frozen=True)
class Prediction:
    """Seconds on two T4s for so many rows: loading, every model's first order, every model's second order (0: has none)."""

    rows: int
    loading: float
    first_order: float
    second_order: float

    @property
    def finish(self) -> float:
        """Seconds from the beginning to the end of the last order."""
        return self.loading + self.first_order + self.second_order


def predict(fits: Sequence[Fit], spec: Spec, passes: Sequence[dict], rows: int) -> list[Prediction]:
    """The prediction for `rows` rows, and for each of ROWS, all of the lengths that the passes of kernel.json had.

    `rows` is the test file's number. A model that scored nothing here is taken to have the first one's tokens.
    """
    loaded = sum(
        sum(weight_bytes(fit.served)) * (GPUS if fit.placement == "each" else 1) for fit in fits
    )
    flop = [0.0, 0.0]  # a row's, of each order
    first: list[float] = []
    for fit in fits:
        tokens = tokens_per_row(fit, spec, passes, rows)
        first = first or tokens
        for order, number in enumerate(tokens if tokens[0] else first[: len(tokens)]):
            flop[order] += 2 * multiplied_parameters(fit) * number
    rate = GPUS * FLOP_PER_SECOND["cuda"]
    return [
        Prediction(
            number, loaded / LOAD_BYTES_PER_SECOND, number * flop[0] / rate, number * flop[1] / rate
        )
        for number in dict.fromkeys((rows, *ROWS))
    ]


def multiplied_parameters(fit: Fit) -> int:
    """The parameters of the recipe's model that every token is multiplied with."""
    served = fit.served
    found = weights(served.dimensions, served.head, served.verdicts)
    return sum(weight.elements for weight in found if is_multiplied(weight.name))


def tokens_per_row(fit: Fit, spec: Spec, passes: Sequence[dict], rows: int) -> list[float]:
    """Computed tokens a row of each order that the spec asks for: as measured; as in the first, where not every row was run."""
    measured: list[float] = []
    orders = (
        ("as_given", "swapped")
        if spec.orders == "both" and fit.served.head != "reward"
        else ("as_given",)
    )
    for order in orders:
        ran = [work for work in passes if (work["run"], work["order"]) == (fit.package.run, order)]
        scored = sum(work["scored"] for work in ran)
        tokens = sum(work["computed_tokens"] for work in ran) / max(scored, 1)
        measured.append(tokens if scored >= rows or not measured else measured[0])
    return measured


def here(passes: Sequence[dict]) -> dict:
    """What the passes of kernel.json say of this machine: rows and tokens (without padding) a second, over all passes."""
    seconds = max(sum(work["seconds"] for work in passes), 1e-9)
    rows, tokens, computed = (
        sum(work[key] for work in passes) for key in ("scored", "tokens", "computed_tokens")
    )
    return {
        "rows_per_second": round(rows / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "padding": round(1 - tokens / computed, 4) if computed else 0.0,
    }


def report(speed: dict, predictions: Sequence[Prediction], clock_seconds: float) -> list[str]:
    """Lines for the log: the speed here, a prediction each, and a warning where one order alone is over the clock."""
    rows, tokens = speed["rows_per_second"], speed["tokens_per_second"]
    lines = [f"here: {rows:.1f} rows/s, {tokens:.0f} tokens/s, padding {speed['padding']:.1%}"]
    for one in predictions:
        second = f", second order {in_time(one.second_order)}" if one.second_order else ""
        room = (
            (clock_seconds - one.loading - one.first_order) / one.second_order
            if one.second_order
            else 1.0
        )
        part = f"; the clock has room for {room:.0%} of the second order" if 0 <= room < 1 else ""
        lines.append(
            f"{one.rows:,} rows of these lengths on two T4s: loading {in_time(one.loading)}, first order "
            f"{in_time(one.first_order)}{second}, predicted finish {in_time(one.finish)} of a clock of "
            f"{in_time(clock_seconds)}{part}"
        )
    rehearsed = predictions[0]
    alone = rehearsed.loading + rehearsed.first_order
    if alone > clock_seconds:
        lines.append(
            f"warning: {rehearsed.rows:,} rows are predicted to take {in_time(alone)} in one order alone, the clock is "
            f"{in_time(clock_seconds)}: rows would be left to the prior; lower budget_tokens, or take a smaller model"
        )
    return lines


def in_time(seconds: float) -> str:
    """Seconds as a person says them: 45 s, 12 min, 1 h 52 min."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"


def as_record(predictions: Sequence[Prediction]) -> list[dict]:
    """The predictions for rehearsal.json, in whole seconds."""
    return [
        {name: round(value) for name, value in (asdict(one) | {"finish": one.finish}).items()}
        for one in predictions
    ]
