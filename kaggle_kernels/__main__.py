"""The commands of `python -m kaggle_kernels`: build a kernel from a spec, rehearse it, publish it, submit it, trace it.

Each command reads its options and calls one function of a room: build/, rehearsal/ or publish/. A SPEC is the name of a file in
kaggle_kernels/specs, without .yml, or the path of a file. Rooms are imported when a command runs, so that --help starts fast.
"""

from collections.abc import Callable
from pathlib import Path

import click

from preprocess.competitions import COMPETITIONS, LONGEST_SECONDS
from preprocess.core.errors import UserError, exits_with_2


@click.group()
def main() -> None:
    """Build Kaggle kernels from specs, rehearse them on this machine, publish, submit and trace them.

    A SPEC is the name of a file in kaggle_kernels/specs, without .yml, or the path of a file.
    """


@main.command()
@click.argument("name")
@click.option("--base", required=True, help="The base model: a folder, or OWNER/NAME on the hub.")
@click.option(
    "--head",
    type=click.Choice(["score", "reward", "label_tokens"]),
    default="score",
    show_default=True,
    help="How verdicts come out of the model.",
)
@exits_with_2
def new(name: str, base: str, head: str) -> None:
    """Write recipes/NAME.yml and kaggle_kernels/specs/NAME.yml for a base model.

    Template, LoRA's layers, token budget and memory come from the model's configuration and tokenizer.
    """
    from kaggle_kernels.build.new_recipe import write_recipe_and_spec  # noqa: PLC0415  --help starts fast

    write_recipe_and_spec(name, base, head)


@main.command("list")
@exits_with_2
def list_specs() -> None:
    """List the specs: packages, GPU memory, state of the kernel.

    The memory is computed from each package's recipe, for a T4.
    """
    from kaggle_kernels.build.listing import print_specs  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.build.spec import all_specs  # noqa: PLC0415  --help starts fast

    print_specs(all_specs())


@main.command()
@click.argument("specs", nargs=-1)
@click.option(
    "--kernels",
    type=click.Path(path_type=Path),
    default=Path("outputs/kernels"),
    show_default=True,
    help="Folder of all kernels; each is written to a folder with its spec's name.",
)
@click.option(
    "--check", is_flag=True, help="Write nothing; exit with code 2 if a file is not up to date."
)
@exits_with_2
def build(specs: tuple[str, ...], kernels: Path, check: bool) -> None:
    """Build the kernels of SPECS, or of all specs if none is given.

    A kernel is one readable file, kernel.py, with its kernel-metadata.json. It runs without this repository.
    """
    from kaggle_kernels.build import bundle  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.build.spec import all_specs, find_spec  # noqa: PLC0415  --help starts fast

    spec_paths = [find_spec(name) for name in specs] if specs else all_specs()

    if check:
        stale_files = []
        for spec_path in spec_paths:
            stale_files += bundle.stale_files(spec_path, kernels)
        if stale_files:
            names = ", ".join(str(path) for path in stale_files)
            raise UserError(f"{names}: not up to date; run the same command without --check")
    else:
        for spec_path in spec_paths:
            bundle.build(spec_path, kernels)

    state = "up to date" if check else "built"
    for spec_path in spec_paths:
        click.echo(f"{bundle.kernel_folder(spec_path, kernels)}: {state}")


@main.command()
@click.argument("spec")
@click.option(
    "--test",
    "test_file",
    type=click.Path(path_type=Path),
    required=True,
    help="Test rows, CSV or Parquet. If they have verdicts, the kernel's answers are scored.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the results; by default outputs/SPEC/rehearsal.",
)
@click.option(
    "--python",
    type=click.Path(path_type=Path),
    envvar="KAGGLE_PYTHON",
    help="The Python that has the versions of Kaggle's image.",
)
@click.option(
    "--rows",
    "size",
    type=click.IntRange(1),
    help="Number of rows, drawn from the test file; with repetition if it has fewer.",
)
@click.option("--shuffle", is_flag=True, help="Shuffle the rows and give them each other's ids.")
@click.option(
    "--hostile",
    is_flag=True,
    help="Replace a twentieth of the rows by adversarial ones. Ids are int for an odd seed, string for an even one.",
)
@click.option(
    "--seed", type=click.IntRange(0), default=0, help="Seed for rows, ids and their order."
)
@click.option(
    "--devices",
    type=click.IntRange(1),
    help="Number of CPU workers; by default all GPUs, or one CPU.",
)
@click.option(
    "--clock",
    "clock_seconds",
    type=click.FloatRange(1, LONGEST_SECONDS),
    help="Time limit in seconds, instead of the spec's clock_seconds.",
)
@click.option(
    "--train",
    "train_file",
    type=click.Path(path_type=Path),
    help="The competition's train file; rehearse the visible run, which scores rows of it.",
)
@click.option(
    "--kill-every",
    type=click.FloatRange(0, min_open=True),
    help="Kill one worker after another, with a pause of so many seconds.",
)
@click.option(
    "--lose-all-at",
    type=click.FloatRange(0, 1, min_open=True),
    help="Kill every worker for good once this share of a pass's rows is scored.",
)
@click.option(
    "--end-clock-at",
    type=click.IntRange(1),
    help="Put the kernel's clock to its end once so many rows are scored.",
)
@exits_with_2
def rehearse(spec: str, test_file: Path, out: Path | None, python: Path | None, **scenario) -> None:
    """Run the kernel of SPEC as Kaggle would, on this machine.

    It gets Kaggle's folders and versions, and neither network nor repository. Build it first; one that is out of date is
    refused. The results are checked, and the time that the kernel would take on two T4s is predicted.
    """
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.rehearsal import rehearse as rehearsal  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.rehearsal.scenario import Scenario  # noqa: PLC0415  --help starts fast

    spec_path = find_spec(spec)
    if out is None:
        out = Path("outputs") / spec_path.stem / "rehearsal"
    rehearsal.rehearse(spec_path, test_file, out, python, Scenario(**scenario))


@main.command()
@click.argument("spec")
@click.option(
    "--write",
    is_flag=True,
    help="Write weights and temperature into the spec; build the kernel afterwards.",
)
@exits_with_2
def weigh(spec: str, write: bool) -> None:
    """Fit the weights of SPEC's packages and the temperature.

    They give the least log loss on the validation rows that all runs held out, which are in outputs/RUN/predictions.parquet.
    """
    from kaggle_kernels.build import ensemble_weights  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415  --help starts fast

    ensemble_weights.weigh(find_spec(spec), write)


def asks_kaggle(patience_seconds: float) -> Callable[[Callable], Callable]:
    """Make a decorator that gives a command the options --poll-seconds and --patience-seconds.

    The command makes a client.Pace of them, which says how often and how long Kaggle is asked.

    Args:
        patience_seconds: The default of --patience-seconds for this command.
    """
    poll_option = click.option(
        "--poll-seconds",
        type=click.FloatRange(0, min_open=True),
        default=15,
        show_default=True,
        envvar="PAIRWISE_POLL_SECONDS",
        help="Pause between two requests to Kaggle; it grows to eight times that.",
    )
    patience_option = click.option(
        "--patience-seconds",
        type=click.FloatRange(0),
        default=patience_seconds,
        show_default=True,
        envvar="PAIRWISE_PATIENCE_SECONDS",
        help="How long to wait for Kaggle; the same command then goes on waiting.",
    )

    def add_options(command: Callable) -> Callable:
        return poll_option(patience_option(command))

    return add_options


@main.command()
@click.option("--yes", is_flag=True, help="Try it without confirmation.")
@asks_kaggle(patience_seconds=600)
@exits_with_2
def smoke(yes: bool, poll_seconds: float, patience_seconds: float) -> None:
    """Try every call of publishing on your Kaggle account.

    Makes a private dataset of 10 KB and a kernel that reads it, and deletes both. outputs/smoke.json has the calls, without
    names.
    """
    from kaggle_kernels.publish import smoke as smoke_test  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415  --help starts fast

    smoke_test.smoke(Pace(poll_seconds, patience_seconds), yes)


@main.command()
@click.argument("spec")
@click.option("--dry-run", is_flag=True, help="Make every check and push nothing.")
@click.option(
    "--again",
    is_flag=True,
    help="Push the kernel even if it is unchanged, so that it runs once more.",
)
@click.option(
    "--latest-image",
    is_flag=True,
    help="Run in Kaggle's newest Docker image, in place of the last push's.",
)
@asks_kaggle(patience_seconds=3600)
@exits_with_2
def push(spec: str, poll_seconds: float, patience_seconds: float, **options) -> None:
    """Publish the datasets and the kernel of SPEC on Kaggle.

    Packages and wheels become private datasets. They and the kernel are read back and compared with the files here. What is
    unchanged on Kaggle is skipped. After an interruption the same command goes on.
    """
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish import push as publishing  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415  --help starts fast

    pace = Pace(poll_seconds, patience_seconds)
    publishing.push(find_spec(spec), pace, **options)


@main.command()
@click.argument("spec")
@click.option(
    "--wait",
    is_flag=True,
    help="Wait until the kernel has run, and print its log as Kaggle shows it.",
)
@asks_kaggle(patience_seconds=50_000)
@exits_with_2
def status(spec: str, wait: bool, poll_seconds: float, patience_seconds: float) -> None:
    """Print the status of SPEC's pushed kernel.

    The exit code is 2 if the kernel ended in an error.
    """
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish import status as run_status  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415  --help starts fast

    run_status.status(find_spec(spec), Pace(poll_seconds, patience_seconds), wait)


@main.command()
@click.argument("spec")
@click.option("-m", "--message", required=True, help="Description of the submission on Kaggle.")
@click.option("--yes", is_flag=True, help="Submit without confirmation.")
@click.option("--again", is_flag=True, help="Submit a version that was submitted before.")
@asks_kaggle(patience_seconds=3600)
@exits_with_2
def submit(
    spec: str, message: str, yes: bool, again: bool, poll_seconds: float, patience_seconds: float
) -> None:
    """Submit the pushed version of SPEC's kernel.

    It must be complete, and have written submission.csv with the packages that were pushed.
    """
    from kaggle_kernels.build.spec import find_spec  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish import submit as submission  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415  --help starts fast

    submission.submit(find_spec(spec), message, Pace(poll_seconds, patience_seconds), yes, again)


@main.command()
@click.option(
    "--competition", type=click.Choice(list(COMPETITIONS)), default="wsdm", show_default=True
)
@asks_kaggle(patience_seconds=3600)
@exits_with_2
def scores(competition: str, poll_seconds: float, patience_seconds: float) -> None:
    """List the submissions with their scores.

    Each is shown with the commit, recipe and cross-validation that it came from.
    """
    from kaggle_kernels.publish.client import Pace  # noqa: PLC0415  --help starts fast
    from kaggle_kernels.publish.scores import print_scores  # noqa: PLC0415  --help starts fast

    print_scores(competition, Pace(poll_seconds, patience_seconds))


@main.command()
@click.argument("reference", metavar="SPEC|REF")
@exits_with_2
def trace(reference: str) -> None:
    """Trace a submission back to the raw files.

    It is looked up in the ledger, outputs/ledger.jsonl. REF is the submission's reference on Kaggle, or its kernel:
    owner/slug or owner/slug/VERSION. A SPEC stands for its last submission.
    """
    from kaggle_kernels.publish.lineage import print_trace  # noqa: PLC0415  --help starts fast

    print_trace(reference)


if __name__ == "__main__":
    main()
