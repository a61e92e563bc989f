"""The picture of an agreement: each row's probability as trained and as packaged, and how the differences are spread."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from postprocess.agreement.statistics import Column, verdicts

INCHES = (11, 5.2)
DOTS_PER_INCH = 100
BINS = 41  # odd, so that a difference of 0 is in the middle of a bar

# Half the width of the histogram is at least this: else models that agree would look as if they did not.
NARROWEST = 1e-3

SAME = "#3b6ea5"
CHANGED = "#d1495b"
LINE = "#8a8a8a"


def agreement_picture(
    run: Path, report: dict, columns: Sequence[Column], names: Sequence[str], out: Path
) -> None:
    """Write a PNG of 1100 by 520 pixels, whose bytes are the same for the same numbers.

    Left, a dot for each row: the probability of model_a, mean of both orders, as trained (x) and as
    packaged (y). Right: the differences of the two in each row and order.

    Args:
        run: The run folder.
        report: That of `comparison.compare`.
        columns: The models' probabilities.
        names: The verdicts in the columns' order.
        out: The file.
    """
    by_name = {column.name: column for column in columns}
    trained = by_name["trained"]
    packaged = by_name[report["packaged"]]
    place = names.index("model_a")
    changed_r = verdicts(trained) != verdicts(packaged)
    differences_ro = (packaged.probabilities_rov - trained.probabilities_rov)[:, :, place]

    # Whatever the user's matplotlibrc says.
    with matplotlib.style.context("default"):
        figure = Figure(figsize=INCHES, dpi=DOTS_PER_INCH, layout="constrained")
        left, right = figure.subplots(1, 2)
        figure.suptitle(make_title(run, report), fontsize=12)
        draw_rows(
            left,
            trained.mean_rv()[:, place],
            packaged.mean_rv()[:, place],
            changed_r,
            packaged.name,
        )
        # With two verdicts, these are the lines at which a verdict changes.
        if len(names) == 2:
            left.axhline(0.5, color=LINE, linewidth=0.8, linestyle=":", zorder=0)
            left.axvline(0.5, color=LINE, linewidth=0.8, linestyle=":", zorder=0)
        draw_differences(right, differences_ro, packaged.name)
        figure.savefig(out, format="png", metadata={"Software": None})


def make_title(run: Path, report: dict) -> str:
    """Name the run, the verdict, and the largest of the mean differences that decide."""
    name = run.name
    if name.startswith("fold-") or name == "mean":
        name = f"{run.parent.name}/{name}"
    verdict = "agrees" if report["agrees"] else "does not agree"
    return (
        f"{name}: {report['packaged']} model, {verdict}\n{report['rows']} rows, mean difference "
        f"{report['mean_difference']:.4f}, tolerance {report['tolerance']}"
    )


def draw_rows(
    axes: Axes, trained_r: np.ndarray, packaged_r: np.ndarray, changed_r: np.ndarray, name: str
) -> None:
    """Draw a dot a row, and the diagonal.

    Args:
        axes: Where to draw.
        trained_r: Each row's probability as trained.
        packaged_r: The same as packaged.
        changed_r: Which rows' verdict is another.
        name: The name of the packaged model.
    """
    axes.axline((0, 0), (1, 1), color=LINE, linewidth=1, zorder=0)
    same_r = ~changed_r
    for is_drawn_r, colour, size, meaning in (
        (same_r, SAME, 16, "same verdict"),
        (changed_r, CHANGED, 34, "verdict changed"),
    ):
        axes.scatter(
            trained_r[is_drawn_r],
            packaged_r[is_drawn_r],
            s=size,
            color=colour,
            alpha=0.7,
            linewidths=0,
            label=f"{meaning}: {int(is_drawn_r.sum())}",
        )

    axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    axes.set(title="One dot a row, mean of both orders")
    axes.set(xlabel="P(model_a), trained", ylabel=f"P(model_a), {name}")
    axes.legend(loc="upper left", frameon=True)


def draw_differences(axes: Axes, differences_ro: np.ndarray, name: str) -> None:
    """Draw a histogram around 0, wide enough for the largest difference.

    Args:
        axes: Where to draw.
        differences_ro: The differences in probability, (rows, orders).
        name: The name of the packaged model.
    """
    finite_differences = differences_ro[np.isfinite(differences_ro)]
    largest = float(np.abs(finite_differences).max(initial=0))
    half_width = max(NARROWEST, 1.05 * largest)
    bins = np.linspace(-half_width, half_width, BINS + 1)

    axes.axvline(0, color=LINE, linewidth=1)
    axes.hist(finite_differences, bins=bins, color=SAME, alpha=0.85, zorder=2)
    axes.set(xlim=(-half_width, half_width))
    axes.set(title="Differences, each row in each order", ylabel="rows and orders")
    axes.set_xlabel(f"P(model_a), {name} less trained")
    axes.locator_params(axis="x", nbins=7)
    axes.yaxis.get_major_locator().set_params(integer=True)
