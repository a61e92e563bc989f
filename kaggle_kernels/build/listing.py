"""The table of `python -m kaggle_kernels list`."""

from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kaggle_kernels.build.bundle import stale_files
from kaggle_kernels.build.memory_fit import GPU_BYTES, fit_packages, in_gib
from kaggle_kernels.build.spec import read_spec
from postprocess.memory.model_size import GIB
from preprocess.core.errors import UserError

WIDTH = 144  # where the output is no terminal
COLUMNS = (
    "spec",
    "for",
    "packages",
    "base model",
    "approach",
    "bits",
    "GiB a GPU",
    "clock",
    "kernel",
)


def table_console() -> Console:
    """A console as wide as the terminal, or WIDTH where there is none."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = WIDTH
    return console


def print_specs(paths: Sequence[Path]) -> None:
    """One row a spec, its packages one below the other; a spec with a problem is a row too, a UserError in the end."""
    table = Table(*COLUMNS, box=SIMPLE_HEAD, pad_edge=False)
    problems = []
    for path in paths:
        try:
            table.add_row(path.stem, *row_of(path))
        except UserError as problem:
            table.add_row(path.stem, *[""] * (len(COLUMNS) - 2), "[red]see below[/red]")
            problems.append(str(problem))
    console = table_console()
    console.print(table)
    console.print(
        f"GiB a GPU: weights, a batch and CUDA itself, of the {GPU_BYTES / GIB} that a T4 offers; with a +, split over both."
    )
    if problems:
        raise UserError("\nerror: ".join(problems))


def row_of(path: Path) -> list[str]:
    """A spec's cells after its name; a UserError where the spec has a problem."""
    spec = read_spec(path)
    fits = fit_packages(path, spec)
    names = [
        fit.package.run if len(fits) == 1 else f"{fit.package.weight:g} × {fit.package.run}"
        for fit in fits
    ]
    is_stale = bool(stale_files(path))
    return [
        spec.competition,
        "\n".join(names),
        "\n".join(fit.recipe.axolotl["base_model"].split("/")[-1] for fit in fits),
        "\n".join(fit.approach for fit in fits),
        "\n".join(fit.served.quantize.replace("none", "16") for fit in fits),
        "\n".join(in_gib(fit.gpu_bytes) for fit in fits),
        f"{spec.clock_seconds // 3600:.0f} h {spec.clock_seconds % 3600 // 60:02.0f}",
        "[yellow]stale[/yellow]" if is_stale else "[green]built[/green]",
    ]
