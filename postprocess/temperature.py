"""Measure the best temperature of a run's validation rows, for its package's manifest.

`pipeline.make_package` calls this. `kaggle_kernels.build` reads the result where a single model is
served under log loss.
"""

from pathlib import Path

import click

from postprocess.agreement.statistics import FEW_GROUPS, Estimate
from postprocess.agreement.validation_rows import read_metrics
from postprocess.report.calibration import estimate_temperature
from postprocess.report.metrics import score_rows
from postprocess.report.predictions import PREDICTIONS, add_pairs, read_predictions
from postprocess.run_folder import Run

DECIMALS = 3  # the interval is no finer than 1 %


def measure_temperatures(run: Run) -> dict[str, dict[str, float]] | None:
    """Measure the best temperature of the probabilities that training recorded, and print it.

    Returns:
        By a spec's `orders`, both or as_given: the best temperature, and low and high of its 95 %
        confidence interval. None where these rows cannot tell: the run was trained on them, or
        they belong to so few groups of prompts that the interval would be too narrow.
    """
    if read_metrics(run)["rows_were_trained_on"]:
        return None

    # Soft labels and groups of prompts are in the pairs file.
    predictions = read_predictions(run.folder / PREDICTIONS)
    predictions, _ = add_pairs(predictions, Path(run.recipe.pairwise.pairs), expected_sha256=None)
    scored = score_rows(predictions, run.contract.verdicts)
    if scored.resamples.counts_sg.shape[1] < FEW_GROUPS:
        return None

    both = estimate_temperature(scored, scored.mean_rv)
    click.echo(
        f"  temperature {both.value:.2f} (95 %: {both.low:.2f} to {both.high:.2f}) has the "
        f"least log loss on {len(scored.labels_rv)} validation rows"
    )
    as_given = estimate_temperature(scored, scored.probabilities_rov[:, 0])
    return {"both": round_estimate(both), "as_given": round_estimate(as_given)}


def round_estimate(estimate: Estimate) -> dict[str, float]:
    """Write an estimate as the manifest holds it."""
    return {
        "best": round(estimate.value, DECIMALS),
        "low": round(estimate.low, DECIMALS),
        "high": round(estimate.high, DECIMALS),
    }
