"""Fit an ensemble's weights and temperature on validation rows that none of its models was trained on.

`python -m kaggle_kernels weigh SPEC` prints what they gain, and with --write puts them into the spec. `push` records what the
spec's models reach together on these rows. The probabilities are mixed exactly as the kernel does it (runtime/submission.py):
the mean of the orders, the competition's verdicts made to sum to one, the weighted mean of the models, the temperature.

Shapes: m is the number of models (runs), n of rows, v of the competition's verdicts.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from ruamel.yaml import YAML
from scipy.optimize import minimize

from kaggle_kernels.build.ensemble_rows import Rows, read_rows
from kaggle_kernels.build.packages import choose_temperature, package_folder
from kaggle_kernels.build.spec import SPECS, Spec, read_spec
from kaggle_kernels.runtime.submission import SMALLEST
from postprocess.agreement.statistics import interval, resample
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file
from preprocess.core.ledger import fingerprint
from recipes.pairwise.tracking.metrics import measure_answers, row_brier_scores, row_losses

# The search: within these temperatures; weights are rounded to thousandths, and a model with less than the smallest weight is
# not worth its time in the kernel.
TEMPERATURE_BOUNDS = (0.1, 10.0)
WEIGHT_STEPS = 1000
SMALLEST_WEIGHT = 0.005


@dataclass(frozen=True)
class Mixture:
    """How an ensemble mixes its models: their weights, shape (m,), summing to one, and the temperature of the mean."""

    weights: np.ndarray
    temperature: float = 1.0


def weigh(spec_path: Path, write: bool) -> None:
    """Fit the weights and the temperature of a spec, and print what they gain over equal weights.

    With `write` they are put into the spec, too, unless a model has the weight 0.
    """
    spec = read_spec(spec_path)
    rows = read_rows(spec)
    metric = COMPETITIONS[spec.competition].metric
    fitted = fit_mixture(rows, metric)

    # By how much the loss of each row is less than with equal weights.
    number_of_models = len(spec.packages)
    equal = Mixture(np.full(number_of_models, 1 / number_of_models))
    gains = compute_losses(rows, equal, metric) - compute_losses(rows, fitted, metric)
    print_table(spec, rows, equal, fitted)
    print(describe_gain(gains, metric))

    # A model without weight would take its share of the kernel's time for nothing.
    useless_runs = []
    for package, weight in zip(spec.packages, fitted.weights, strict=True):
        if weight == 0:
            useless_runs.append(package.run)
    if useless_runs:
        advice = (
            f"{spec_path}: the fitted weight of {', '.join(useless_runs)} is 0; "
            "remove it from packages, then weigh again"
        )
        if write:
            raise UserError(advice)
        print(advice)

    if write:
        write_mixture(spec_path, fitted)
        weights = ", ".join(f"{weight:g}" for weight in fitted.weights)
        spec_argument = spec_path.stem if spec_path.parent == SPECS else spec_path
        print(
            f"{spec_path}: weights {weights}, temperature {fitted.temperature:g}; now run "
            f"`python -m kaggle_kernels build {spec_argument}`"
        )


def mix_probabilities(rows: Rows, mixture: Mixture) -> np.ndarray:
    """Compute the ensemble's probabilities as the kernel does.

    Returns:
        float64 of shape (n, v); each row sums to one.
    """
    # The least probability is bounded as in the kernel, so that log loss stays finite.
    mean = np.tensordot(mixture.weights, rows.probabilities, axes=1)
    powers = np.maximum(mean, SMALLEST) ** (1 / mixture.temperature)
    softened = powers / powers.sum(axis=1, keepdims=True)

    # The bound breaks the sum of one, so it is restored once more.
    bounded = np.maximum(softened, SMALLEST)
    return bounded / bounded.sum(axis=1, keepdims=True)


def compute_losses(rows: Rows, mixture: Mixture, metric: str) -> np.ndarray:
    """Compute each row's Brier score where that is the metric, else its log loss, shape (n,).

    Accuracy does not change by small steps of the weights: where it counts, log loss stands for it.
    """
    probabilities = mix_probabilities(rows, mixture)
    labels = np.eye(probabilities.shape[1])[rows.winners]
    if metric == "brier_score":
        return row_brier_scores(probabilities, labels)
    return row_losses(probabilities, labels)


def fit_mixture(rows: Rows, metric: str) -> Mixture:
    """Fit weights and temperature so that the mean of compute_losses is least.

    Sequential least squares (SLSQP) searches the simplex of the weights, w >= 0 and sum(w) = 1, together with the logarithm of
    the temperature, so that halving and doubling it are steps of the same size.

    Returns:
        Weights in thousandths that sum to one; a weight under SMALLEST_WEIGHT is 0. The temperature has three decimals.
    """
    number_of_models = len(rows.probabilities)

    # The parameters are the weights and then the logarithm of the temperature, shape (m + 1,).
    def unpack(parameters: np.ndarray) -> Mixture:
        return Mixture(parameters[:-1], float(np.exp(parameters[-1])))

    def mean_loss(parameters: np.ndarray) -> float:
        return compute_losses(rows, unpack(parameters), metric).mean()

    def excess_weight(parameters: np.ndarray) -> float:
        return parameters[:-1].sum() - 1

    # The search starts from equal weights and a temperature of 1, whose logarithm is 0.
    equal_weights = np.full(number_of_models, 1 / number_of_models)
    log_temperature_bounds = tuple(np.log(TEMPERATURE_BOUNDS))
    result = minimize(
        mean_loss,
        x0=np.append(equal_weights, 0.0),
        method="SLSQP",
        bounds=[(0.0, 1.0)] * number_of_models + [log_temperature_bounds],
        constraints={"type": "eq", "fun": excess_weight},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    if not result.success:
        raise UserError(
            f"the weights could not be fitted on {len(rows.winners)} rows ({result.message}); keep equal ones"
        )

    # Rounded, so that the spec stays readable; the loss hardly notices.
    best = unpack(result.x)
    return Mixture(round_weights(best.weights), round(best.temperature, 3))


def round_weights(weights: np.ndarray) -> np.ndarray:
    """Round weights to thousandths that sum to one, by the largest remainder; those under SMALLEST_WEIGHT become 0."""
    kept = np.where(weights < SMALLEST_WEIGHT, 0.0, weights)
    exact_steps = kept / kept.sum() * WEIGHT_STEPS
    steps = np.floor(exact_steps).astype(int)

    # The steps that are lost by rounding down go to the weights that lost most, one to each.
    steps_left = WEIGHT_STEPS - steps.sum()
    remainders = exact_steps - steps
    largest_remainder_first = np.argsort(-remainders)
    steps[largest_remainder_first[:steps_left]] += 1
    return steps / WEIGHT_STEPS


def describe_gain(gains: np.ndarray, metric: str) -> str:
    """Say what the fitted weights gain over equal ones, and whether that is more than noise.

    Args:
        gains: By how much the loss of each row is less than with equal weights, shape (n,).
        metric: The competition's metric, which decides what loss that is.
    """
    # The 95 % interval of the mean gain, by a bootstrap in which each row is a group of its own.
    group_of_each_row = np.arange(len(gains))
    all_rows = np.full(len(gains), True)
    low, high = interval(gains, all_rows, resample(group_of_each_row))

    loss_name = "Brier score" if metric == "brier_score" else "log loss"
    sentence = (
        f"fitted gains {gains.mean():.4f} in {loss_name} over equal weights "
        f"(95 %: {low:.4f} to {high:.4f})"
    )
    if low > 0:
        return sentence
    return f"warning: {sentence}, which is within noise: equal weights will do as well"


def print_table(spec: Spec, rows: Rows, equal: Mixture, fitted: Mixture) -> None:
    """Print the metrics of each run alone, of equal weights and of the fitted ones."""
    # A run alone has the weight 1 and all others 0: a row of the identity matrix.
    weights_of_one_run = np.eye(len(spec.packages))
    named_mixtures = {}
    for package, weights in zip(spec.packages, weights_of_one_run, strict=True):
        named_mixtures[package.run] = Mixture(weights)
    named_mixtures["equal weights"] = equal
    named_mixtures["fitted"] = fitted

    columns = ("model", "weights", "temperature", "accuracy", "log loss", "Brier score")
    table = Table(*columns, box=SIMPLE_HEAD, pad_edge=False)
    for name, mixture in named_mixtures.items():
        metrics = measure_answers(mix_probabilities(rows, mixture), rows.winners)
        table.add_row(
            name,
            " + ".join(f"{weight:.3f}" for weight in mixture.weights),
            f"{mixture.temperature:.3f}",
            f"{metrics['accuracy']:.4f}",
            f"{metrics['log_loss']:.4f}",
            f"{metrics['brier_score']:.4f}",
        )
    Console(highlight=False).print(table)
    print(f"{len(rows.winners)} rows that all runs held out")


def write_mixture(spec_path: Path, mixture: Mixture) -> None:
    """Put weights and temperature into a spec; comments, the order of keys and quotes stay as they are."""
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 1000  # in characters; ruamel.yaml breaks longer lines
    yaml.indent(mapping=2, sequence=4, offset=2)

    values = yaml.load(spec_path)
    for package, weight in zip(values["packages"], mixture.weights, strict=True):
        package["weight"] = float(weight)
    values["temperature"] = mixture.temperature

    with atomic_file(spec_path) as temporary:
        yaml.dump(values, temporary)


def measure_ensemble(spec: Spec) -> dict | None:
    """Measure what a spec's models reach together on the rows that all their runs held out.

    They are mixed as the kernel does it, with the spec's weights and the kernel's temperature.

    Returns:
        rows, accuracy, log_loss and brier_score; None where the runs' rows are absent or do not go together, or
        where a package is of an earlier training.
    """
    # Training writes a contract, and packaging copies it. Where the two differ, the run was trained
    # again since, and its rows say nothing of the weights in the package.
    for package in spec.packages:
        folder = package_folder(package.run)
        contract_of_run = fingerprint(folder.parent / "contract.json")
        contract_of_package = fingerprint(folder / "contract.json")
        if contract_of_run is None or contract_of_run != contract_of_package:
            return None

    # Runs may lack their rows, have none in common, or contradict each other: then there is no measurement.
    try:
        rows = read_rows(spec)
    except UserError:
        return None

    weights = np.array([package.weight for package in spec.packages])
    mixture = Mixture(weights, choose_temperature(spec))
    metrics = measure_answers(mix_probabilities(rows, mixture), rows.winners)
    return {"rows": len(rows.winners), **metrics}
