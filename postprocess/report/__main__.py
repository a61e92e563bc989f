"""`python -m postprocess.report outputs/R`: what a run is worth on one page, outputs/R/report.html.

The page is a single file that loads nothing. It shows accuracy and log loss with intervals, by
language, length and source, calibration, position bias, learning curves, agreement, and the fifty
worst errors. It holds rows of the pairs file, so it is as private as they are. Exit code 2, after
one line, for what the user can mend.
"""

import logging
from pathlib import Path

import click

from postprocess.report.page import render_page
from postprocess.report.results import measure_run
from postprocess.report.run_data import read_run
from preprocess.core.errors import exits_with_2
from preprocess.core.files import atomic_file

REPORT = "report.html"


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--oof",
    "out_of_fold",
    is_flag=True,
    help="Measure oof.parquet, the rows of all folds, in place of the run's own.",
)
@click.option(
    "--pairs",
    "pairs_file",
    type=click.Path(path_type=Path),
    help="The pairs file of the training, if it has moved.",
)
@exits_with_2
def main(folder: Path, out_of_fold: bool, pairs_file: Path | None) -> None:
    """Write the report of a run."""
    # Libraries warn of things that no user of a report can mend.
    logging.disable(logging.WARNING)

    run = read_run(folder, out_of_fold, pairs_file)
    page = render_page(run, measure_run(run))

    file = folder / REPORT
    with atomic_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")
    click.echo(f"report: {file}")


if __name__ == "__main__":
    main()
