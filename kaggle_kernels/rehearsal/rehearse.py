"""The rehearsal of a kernel, step by step, from a test file to rehearsal.json.

`python -m kaggle_kernels rehearse SPEC --test FILE` calls `rehearse`. The package's docstring lists
the steps and their modules.
"""

import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from kaggle_kernels.build.bundle import check_built, kernel_text
from kaggle_kernels.build.memory_fit import Fit, fit_packages
from kaggle_kernels.build.packages import build_of, find_package
from kaggle_kernels.build.spec import Spec, read_spec
from kaggle_kernels.rehearsal.fault_injection import check_faults, check_happened
from kaggle_kernels.rehearsal.kaggle_tree import lay_out_tree
from kaggle_kernels.rehearsal.rows import (
    describe_rows,
    format_description,
    make_rows,
    read_test_rows,
)
from kaggle_kernels.rehearsal.sandbox import KernelRun, find_python, run_as_kaggle
from kaggle_kernels.rehearsal.scenario import Scenario
from kaggle_kernels.rehearsal.throughput import predict_runs
from kaggle_kernels.rehearsal.validate import check_results, choose_tolerance
from kaggle_kernels.rehearsal.verdicts import measure_quality, read_verdicts
from kaggle_kernels.runtime.visible import describe_finish
from preprocess.competitions import COMPETITIONS
from preprocess.core import ledger
from preprocess.core.durations import format_duration
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, write_json

RECORD = "rehearsal.json"
RESULTS = ("submission.csv", "scores.parquet", "kernel.json")
TRAIN_SUFFIXES = (".parquet", ".csv")


@dataclass(frozen=True)
class Inputs:
    """All that a rehearsal needs, checked before the kernel runs."""

    name: str  # of the spec and the kernel
    spec: Spec  # with the scenario's clock
    fits: list[Fit]
    packages: dict[str, Path]  # their folders, by dataset
    kernel_folder: Path
    clock_seconds: float
    python: Path  # the interpreter with Kaggle's versions
    rows: pl.DataFrame  # with verdicts where the test file has them
    rows_description: dict
    suffix: str  # of the test file: ".csv", or another for Parquet


def rehearse(
    spec_path: Path,
    test_file: Path,
    out: Path,
    python: Path | None = None,
    scenario: Scenario | None = None,
) -> dict:
    """Run a spec's kernel as Kaggle would, check its results and keep them in `out`.

    Args:
        spec_path: The spec; its kernel must be built.
        test_file: The test rows, CSV or Parquet. Verdicts are hidden from the kernel.
        out: The folder for the kernel's results, rehearsal.json, and rows.parquet where the rows
            are not the test file's. After a failure it has no rehearsal.json.
        python: The interpreter with Kaggle's versions, by default .venv-kaggle's.
        scenario: The options.

    Returns:
        The content of rehearsal.json.
    """
    if scenario is None:
        scenario = Scenario()

    # A record of an earlier rehearsal must not outlive this one's failure.
    (out / RECORD).unlink(missing_ok=True)

    inputs = prepare_inputs(spec_path, test_file, python, scenario)

    # From here on the ledger gets an entry, whether the rehearsal passes or fails.
    build = build_of(inputs.kernel_folder, inputs.packages)
    ledger_entry = {"spec": inputs.name, **build, "rows": len(inputs.rows)}
    try:
        run = run_kernel(inputs, scenario, out)
        measurements = evaluate_results(inputs, out)
    except UserError as error:
        ledger.record("rehearse", **ledger_entry, verdict="failed", reason=str(error))
        raise

    print(
        f"{out / 'submission.csv'}: {len(inputs.rows)} rows in {run.seconds:.1f} s "
        f"of a clock of {format_duration(inputs.clock_seconds)}"
    )
    faults = {
        "kill_every": scenario.kill_every,
        "lose_all_at": scenario.lose_all_at,
        "end_clock_at": scenario.end_clock_at,
        "kills": [asdict(kill) for kill in run.kills],
    }
    record = {
        "rows": len(inputs.rows),
        "test": inputs.rows_description,
        "seconds": round(run.seconds, 1),
        "clock_seconds": inputs.clock_seconds,
        "devices": scenario.devices,
        "faults": faults,
        **measurements,
        "build": build,
    }
    write_json(out / RECORD, record)
    ledger.record("rehearse", **ledger_entry, verdict="passed", seconds=record["seconds"])
    return record


def prepare_inputs(
    spec_path: Path, test_file: Path, python: Path | None, scenario: Scenario
) -> Inputs:
    """Check all inputs and make the rows, so that mistakes show before the kernel's long run."""
    # The kernel and its packages. A time limit of the scenario holds for any number of rows.
    spec = read_spec(spec_path)
    kernel_folder = check_built(spec_path)
    fits = fit_packages(spec_path, spec)
    packages = {fit.package.dataset: find_package(fit) for fit in fits}
    if scenario.clock_seconds is not None:
        spec = spec.model_copy(update={"clock_seconds": {None: scenario.clock_seconds}})

    # Options that do not suit this machine or the files.
    python = find_python(python)
    check_faults(scenario)
    check_train_file(scenario)

    # The verdicts are needed after the run only, but mistakes in them are found now.
    file_rows = read_test_rows(test_file, spec)
    competition = COMPETITIONS[spec.competition]
    read_verdicts(file_rows, competition, str(test_file))

    rows = make_rows(file_rows, scenario, competition)
    description = describe_rows(rows, len(file_rows), scenario)
    if scenario.is_hidden:
        print(f"[rehearsal] {test_file}: {format_description(description)}", flush=True)

    return Inputs(
        name=spec_path.stem,
        spec=spec,
        fits=fits,
        packages=packages,
        kernel_folder=kernel_folder,
        clock_seconds=spec.time_limit(len(rows)),
        python=python,
        rows=rows,
        rows_description=description,
        suffix=test_file.suffix,
    )


def check_train_file(scenario: Scenario) -> None:
    """Raise UserError if the train file does not exist, or would not be read.

    The kernel scores rows of it in the visible run. Options that change the test rows rehearse the hidden run.
    """
    train_file = scenario.train_file
    if train_file is None:
        return

    if not train_file.is_file() or train_file.suffix not in TRAIN_SUFFIXES:
        raise UserError(
            f"--train {train_file}: no such file; give the competition's train.parquet or train.csv"
        )
    if scenario.is_hidden:
        raise UserError(
            "--train: only the visible run scores its rows, but --rows, --shuffle and --hostile "
            "rehearse the hidden run; leave these out"
        )


def run_kernel(inputs: Inputs, scenario: Scenario, out: Path) -> KernelRun:
    """Run the kernel in a temporary /kaggle, and copy its results to `out`."""
    # The same text as the built kernel, but for the scenario's clock.
    kernel = kernel_text(inputs.name, inputs.spec, inputs.fits)

    # The packages are linked, so that this folder stays small.
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        root = Path(folder) / "kaggle"
        lay_out_tree(
            root, inputs.spec, inputs.packages, inputs.suffix, inputs.rows, scenario.train_file
        )
        run = run_as_kaggle(
            inputs.python, kernel, root, inputs.name, inputs.clock_seconds, scenario
        )
        keep_results(root / "working", out)

    # The test file's own rows need no copy.
    (out / "rows.parquet").unlink(missing_ok=True)
    if scenario.is_hidden:
        with atomic_file(out / "rows.parquet") as temporary:
            inputs.rows.write_parquet(temporary)

    check_happened(scenario, run.kills, run.clock_ended, run.seconds)
    return run


def keep_results(working: Path, out: Path) -> None:
    """Copy the kernel's results to `out`; a UserError names one that it did not write."""
    for name in RESULTS:
        if not (working / name).is_file():
            raise UserError(
                f"{name}: the kernel ended without an error, but did not write it; its log says why"
            )
        with atomic_file(out / name) as temporary:
            shutil.copyfile(working / name, temporary)


def evaluate_results(inputs: Inputs, out: Path) -> dict:
    """Validate the results in `out`, measure them, predict two T4s' time, and print all of it.

    Returns:
        The measurements for rehearsal.json: `measure_quality`'s keys, `checks`, `two_t4s`.
    """
    # Is it a valid submission?
    competition = COMPETITIONS[inputs.spec.competition]
    tolerance = choose_tolerance(inputs.packages.values(), out)
    checks = check_results(out, inputs.rows, competition, tolerance)
    print_checks(checks, inputs.fits)

    # How long would two T4s take?
    passes = read_object(out / "kernel.json")["passes"]
    predictions = predict_runs(inputs.fits, passes, competition.hidden_rows)
    for finish in predictions:
        clock_seconds = inputs.spec.time_limit(finish["rows"])
        print(f"two T4s: {describe_finish(finish, clock_seconds)}")

    # How good are the answers?
    quality = measure_quality(inputs.rows, out / "scores.parquet", inputs.spec)
    if quality:
        print(
            f"accuracy {quality['accuracy']:.4f}, log loss {quality['log_loss']:.4f}, "
            f"Brier score {quality['brier_score']:.4f} on {quality['judged']} judged rows; "
            f"the longer response: accuracy {quality['longer_accuracy']:.4f}"
        )

    return {**quality, "checks": checks, "two_t4s": predictions}


def print_checks(checks: dict, fits: list[Fit]) -> None:
    """Print the result of `check_results`, with a warning for each model that scored nothing."""
    print(
        f"checked: {checks['ids']} ids, each once and in the test file's order; "
        f"{checks['scored']} rows were scored"
    )

    runs = [fit.package.run for fit in fits]
    idle_runs = [run for run in runs if not checks["by_model"].get(run)]
    if idle_runs:
        print(f"warning: {', '.join(idle_runs)} scored no row; the log above says why")

    if checks["alike"]:
        print(
            f"checked: {checks['alike']} rows have the texts of others; their probabilities differ "
            f"by at most {checks['largest_difference']:.1e}, {checks['tolerance']:g} is allowed"
        )
