"""The picture of an agreement: each row's probability as trained and as packaged, and how the differences are spread."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from postprocess.agreement.statistics import Column, verdicts

INCHES, DOTS_PER_INCH = (11, 5.2), 100
BINS = 41  # odd, so that a difference of 0 is in the middle of a bar
NARROWEST = 1e-3  # half the width of the histogram at least: below it, models that agree would look as if they did not
SAME, CHANGED, LINE = "#3b6ea5", "#d1495b", "#8a8a8a"


def agreement_picture(run: Path, report: dict, columns: Sequence[Column], names: Sequence[str], out: Path) -> None:
    """Write a PNG of 1100 by 520 pixels, whose bytes are the same for the same numbers.

    Left, a dot for each row: the probability of model_a, mean of both orders, of `trained` (x) and of the packaged model (y).
    Right: the differences of the two in each row and order. `report` is that of `statistics.compare`, `names` the
    verdicts in the columns' order.
    """
    by_name = {column.name: column for column in columns}
    trained, packaged = by_name["trained"], by_name[report["packaged"]]
    place = names.index("model_a")
    with matplotlib.style.context("default"):  # whatever the user's matplotlibrc says
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        left, right = figure.subplots(1, 2)
        figure.suptitle(title(run, report), fontsize=12)
        changed_r = verdicts(trained) != verdicts(packaged)
        means = (column.probabilities_rov[:, :, place].mean(axis=1) for column in (trained, packaged))
        draw_rows(left, *means, changed_r, packaged.name, two=len(names) == 2)
        draw_differences(right, packaged.probabilities_rov[:, :, place] - trained.probabilities_rov[:, :, place], packaged.name)
        figure.savefig(out, format="png", metadata={"Software": None})


def title(run: Path, report: dict) -> str:
    """Run, rows, and the mean differences that decide beside the tolerance."""
    name = f"{run.parent.name}/{run.name}" if run.name.startswith("fold-") or run.name == "mean" else run.name
    worst = report["gates"][0]
    told = f"mean difference {report['mean_difference']:.4f} ({worst['model']} against {worst['against']})"
    verdict = "agrees" if report["agrees"] else "does not agree"
    return f"{name}: {report['packaged']} model, {verdict}\n{report['rows']} rows, {told}, tolerance {report['tolerance']}"


def draw_rows(axes: Axes, trained_r: np.ndarray, packaged_r: np.ndarray, changed_r: np.ndarray, name: str, two: bool) -> None:
    """A dot a row, the diagonal, and with two verdicts the lines at which a verdict changes."""
    axes.axline((0, 0), (1, 1), color=LINE, linewidth=1, zorder=0)
    for draw in (axes.axhline, axes.axvline) if two else ():
        draw(0.5, color=LINE, linewidth=0.8, linestyle=":", zorder=0)
    for chosen, colour, size, told in ((~changed_r, SAME, 16, "same verdict"), (changed_r, CHANGED, 34, "verdict changed")):
        label = f"{told}: {int(chosen.sum())}"
        axes.scatter(trained_r[chosen], packaged_r[chosen], s=size, color=colour, alpha=0.7, linewidths=0, label=label)
    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", title="One dot a row, mean of both orders")
    axes.set(xlabel="P(model_a), trained", ylabel=f"P(model_a), {name}")
    axes.legend(loc="upper left", frameon=True)


def draw_differences(axes: Axes, differences_ro: np.ndarray, name: str) -> None:
    """A histogram around 0, wide enough for the largest difference."""
    found = differences_ro[np.isfinite(differences_ro)]
    half = max(NARROWEST, 1.05 * float(np.abs(found).max(initial=0)))
    axes.axvline(0, color=LINE, linewidth=1)
    axes.hist(found, bins=np.linspace(-half, half, BINS + 1), color=SAME, alpha=0.85, zorder=2)
    axes.set(xlim=(-half, half), title="Differences, each row in each order", ylabel="rows and orders")
    axes.set_xlabel(f"P(model_a), {name} less trained")
    axes.locator_params(axis="x", nbins=7)
    axes.yaxis.get_major_locator().set_params(integer=True)
