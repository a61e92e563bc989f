"""The table that `python -m kaggle_kernels list` prints: a row for each spec."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kaggle_kernels.build.bundle import kernel_folder, stale_files
from kaggle_kernels.build.memory_fit import GPU_BYTES, Fit, fit_packages, in_gib
from kaggle_kernels.build.spec import Spec, read_spec
from postprocess.memory.model_size import GIB
from preprocess.core.errors import UserError

SECONDS_PER_HOUR = 3600
WIDTH = 180  # characters, where the output is no terminal
PACKAGE_COLUMNS = ("packages", "base model", "bits", "GiB a GPU")
COLUMNS = ("spec", "for", *PACKAGE_COLUMNS, "clock", "kernel")


def table_console() -> Console:
    """Make a console as wide as the terminal, or WIDTH where the output is none."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def print_specs(paths: Sequence[Path]) -> None:
    """Print a table with a row for each spec, its packages one below the other.

    Raises:
        UserError: after the table, with the mistakes of every spec that could not be shown.
    """
    # A spec with a mistake has a row too, so that it does not hide the others.
    table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    problems = []
    for path in paths:
        try:
            table.add_row(path.stem, *describe_spec(path))
        except UserError as problem:
            empty_cells = [""] * (len(COLUMNS) - 2)
            table.add_row(path.stem, *empty_cells, "[red]see below[/red]")
            problems.append(str(problem))

    console = table_console()
    console.print(table)
    console.print(
        f"GiB a GPU: weights, a batch and CUDA itself, of the {GPU_BYTES / GIB} that a T4 offers; "
        "with a +, split over both."
    )

    if problems:
        raise UserError("\nerror: ".join(problems))


def describe_spec(path: Path) -> list[str]:
    """Describe a spec in the cells that follow its name; UserError where it has mistakes."""
    spec = read_spec(path)
    fits = fit_packages(path, spec)

    # Each cell below PACKAGE_COLUMNS holds a line for each package.
    lines_by_package = [describe_package(fit, spec) for fit in fits]
    package_cells = ["\n".join(lines) for lines in zip(*lines_by_package, strict=True)]

    durations = [f"{limit.seconds / SECONDS_PER_HOUR:.4g} h" for limit in spec.time_limits]
    return [spec.competition, *package_cells, " / ".join(durations), describe_kernel(path)]


def describe_kernel(spec_path: Path) -> str:
    """Say whether a spec's kernel is built, and up to date."""
    if not kernel_folder(spec_path).exists():
        return "not built"
    return "[yellow]stale[/yellow]" if stale_files(spec_path) else "[green]built[/green]"


def describe_package(fit: Fit, spec: Spec) -> tuple[str, str, str, str]:
    """Describe a package: its run, the base model's name, its bits, and GiB on a GPU."""
    run = fit.package.run
    # The weights of an ensemble stand before its packages.
    if len(spec.packages) > 1:
        run = f"{fit.package.weight:g} × {run}"

    base_model = fit.recipe.axolotl["base_model"]
    bits = fit.served.quantize.replace("none", "16")
    return run, base_model.split("/")[-1], bits, in_gib(fit.gpu_bytes)
