"""`python -m kaggle_kernels list | build [SPEC…] [--check] | rehearse SPEC --test FILE | weigh SPEC [--write]`,

then `push SPEC [--dry-run] | status SPEC [--wait] | submit SPEC -m MESSAGE | scores | trace SPEC`.

A SPEC is the name of a file in kaggle_kernels/specs, or a path.
"""

from pathlib import Path

import click

from preprocess.core.errors import UserError, exits_with_2


@click.group()
def main() -> None:
    """Kaggle kernels from specs: built as one readable file, rehearsed on this machine, published, submitted, traced."""


@main.command("list")
@exits_with_2
def list_specs() -> None:
    """Print the specs: packages with their weights, what they need on a GPU, and whether the kernel is up to date."""
    from kaggle_kernels.build.listing import print_specs  # noqa: PLC0415  --help starts without pydantic
    from kaggle_kernels.build.spec import all_specs  # noqa: PLC0415

    print_specs(all_specs())


@main.command()
@click.argument("specs", nargs=-1)
@click.option(
    "--kernels",
    type=click.Path(path_type=Path),
    default=Path("outputs/kernels"),
    show_default=True,
    help="The folder of all kernels; each has a folder of its spec's name in it.",
)
@click.option(
    "--check",
    is_flag=True,
    help="Write nothing; exit with 2 where a generated file is not up to date.",
)
@exits_with_2
def build(specs: tuple[str, ...], kernels: Path, check: bool) -> None:
    """Write the kernels of SPECS, by default of all, to outputs/kernels/NAME."""
    from kaggle_kernels.build import bundle as builder  # noqa: PLC0415  --help starts without pydantic
    from kaggle_kernels.build.spec import all_specs, find_spec  # noqa: PLC0415

    paths = [find_spec(name) for name in specs] or all_specs()
    write = builder.stale_files if check else builder.build
    stale = [path for spec_path in paths for path in write(spec_path, kernels)]
    if check and stale:
        names = ", ".join(str(path) for path in stale)
        raise UserError(f"{names}: not up to date; run the same command without --check")
    for path in paths:
        click.echo(f"{builder.kernel_folder(path, kernels)}: {'up to date' if check else 'built'}")


@main.command()
@click.argument("spec")
@click.option(
    "--test",
    "test_file",
    type=click.Path(path_type=Path),
    required=True,
    help="Test rows; verdicts are scored against.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Where results go; by default outputs/SPEC/rehearsal.",
)
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    envvar="KAGGLE_PYTHON",
    help="Python with Kaggle's versions.",
)
@click.option(
    "--rows",
    "size",
    type=click.IntRange(1),
    help="So many rows, drawn from the test file, repeated if need be.",
)
@click.option("--shuffle", is_flag=True, help="Another order of rows, with the ids dealt out anew.")
@click.option(
    "--ids", type=click.Choice(["int", "string"]), help="New ids of this kind; see --hostile."
)
@click.option(
    "--hostile",
    is_flag=True,
    help="A twentieth of odd rows; ids: int with an odd seed, string with an even one.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=0,
    help="Decides rows, ids, order and whom a fault hits.",
)
@click.option(
    "--devices",
    type=click.IntRange(1),
    help="So many CPU workers; by default all GPUs, or one CPU.",
)
@click.option(
    "--clock",
    "clock_seconds",
    type=click.FloatRange(1, 43200),
    help="Seconds, in place of the spec's clock_seconds.",
)
@click.option(
    "--train",
    "train_file",
    type=click.Path(path_type=Path),
    help="The competition's train file: rehearse the visible run.",
)
@click.option(
    "--kill-every",
    type=click.FloatRange(0, min_open=True),
    help="Kill a worker every so many seconds, in turn.",
)
@click.option(
    "--lose-device",
    type=click.IntRange(0),
    help="Kill every worker of this device as soon as it appears.",
)
@exits_with_2
def rehearse(spec: str, test_file: Path, out: Path | None, python: Path | None, **scenario) -> None:
    """Run the generated kernel of SPEC as Kaggle would: its tree, its versions, no network, no repository.

    The kernel must have been built since the spec or the runtime changed; rehearse does not build it. Its results are
    checked from outside, and the time that two T4s would take is predicted.
    """
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415
    from kaggle_kernels.rehearsal import rehearse as rehearsal  # noqa: PLC0415  --help starts without polars

    spec_path = find_spec(spec)
    out = out or Path("outputs") / spec_path.stem / "rehearsal"
    rehearsal.rehearse(spec_path, test_file, out, python, rehearsal.Scenario(**scenario))


@main.command()
@click.argument("spec")
@click.option(
    "--write",
    is_flag=True,
    help="Put weights and temperature into the spec; build the kernel afterwards.",
)
@exits_with_2
def weigh(spec: str, write: bool) -> None:
    """Fit the weights of SPEC's packages, and the temperature, on the validation rows that all their runs have.

    Reads outputs/RUN/predictions.parquet and metrics.json; least log loss decides.
    """
    from kaggle_kernels.build import ensemble_weights as weighing  # noqa: PLC0415  --help starts without polars and scipy
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415

    weighing.weigh(find_spec(spec), write)


def asks_kaggle(patience_seconds: float):
    """Decorate a command with the options that say how often Kaggle is asked, and for how long in all."""
    poll = click.option(
        "--poll-seconds",
        type=click.FloatRange(0, min_open=True),
        default=15,
        show_default=True,
        envvar="PAIRWISE_POLL_SECONDS",
        help="Pause between two questions to Kaggle; it grows to eight times that.",
    )
    patience = click.option(
        "--patience-seconds",
        type=click.FloatRange(0),
        default=patience_seconds,
        show_default=True,
        envvar="PAIRWISE_PATIENCE_SECONDS",
        help="How long Kaggle may take; the same command goes on waiting.",
    )
    return lambda command: poll(patience(command))


@main.command()
@click.argument("spec")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Make every check, and list the calls that would change something.",
)
@click.option(
    "--again",
    is_flag=True,
    help="Push the kernel even where it is unchanged, so that it runs once more.",
)
@asks_kaggle(patience_seconds=3600)
@exits_with_2
def push(
    spec: str, dry_run: bool, again: bool, poll_seconds: float, patience_seconds: float
) -> None:
    """Publish SPEC on Kaggle: its packages and wheels as private datasets, then its kernel, all read back and compared.

    What is there unchanged is skipped; what was interrupted is continued by the same command.
    """
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415
    from kaggle_kernels.publish import push  # noqa: PLC0415  --help starts without polars
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415

    push.push(find_spec(spec), Pace(poll_seconds, patience_seconds), dry_run, again)


@main.command()
@click.argument("spec")
@click.option(
    "--wait", is_flag=True, help="Until the kernel has run; its log is printed as it grows."
)
@asks_kaggle(patience_seconds=50_000)
@exits_with_2
def status(spec: str, wait: bool, poll_seconds: float, patience_seconds: float) -> None:
    """Print the status of SPEC's kernel as it was pushed; exit code 2 where it ended in an error."""
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415
    from kaggle_kernels.publish import submit as submission  # noqa: PLC0415  --help starts without pydantic
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415

    submission.status(find_spec(spec), Pace(poll_seconds, patience_seconds), wait)


@main.command()
@click.argument("spec")
@click.option("-m", "--message", required=True, help="The submission's description on Kaggle.")
@click.option("--yes", is_flag=True, help="Submit without asking.")
@click.option("--again", is_flag=True, help="Submit a version that was submitted before.")
@asks_kaggle(patience_seconds=3600)
@exits_with_2
def submit(
    spec: str, message: str, yes: bool, again: bool, poll_seconds: float, patience_seconds: float
) -> None:
    """Submit the pushed version of SPEC's kernel: complete, current, with a submission.csv that is one."""
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415
    from kaggle_kernels.publish import submit as submission  # noqa: PLC0415  --help starts without pydantic
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415

    submission.submit(find_spec(spec), message, Pace(poll_seconds, patience_seconds), yes, again)


@main.command()
@click.option(
    "--competition", type=click.Choice(["wsdm", "lmsys"]), default="wsdm", show_default=True
)
@asks_kaggle(patience_seconds=3600)
@exits_with_2
def scores(competition: str, poll_seconds: float, patience_seconds: float) -> None:
    """Print the submissions with their scores, each with the commit, recipe and cross-validation that it came from.

    And how far cross-validation and the leaderboard go together; outputs/scores.png shows it.
    """
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415  --help starts without polars
    from kaggle_kernels.publish.scores import print_scores  # noqa: PLC0415

    print_scores(competition, Pace(poll_seconds, patience_seconds))


@main.command()
@click.argument("reference", metavar="SPEC|REF")
@exits_with_2
def trace(reference: str) -> None:
    """Lead a submission back to the raw files, by the ledger: outputs/ledger.jsonl.

    Named by its SPEC (the last one of it), by the submission's ref, or by the kernel: owner/slug or owner/slug/VERSION.
    """
    from kaggle_kernels.publish.lineage import print_trace  # noqa: PLC0415  --help starts fast

    print_trace(reference)


if __name__ == "__main__":
    main()
