"""The hidden test, rehearsed here: the generated kernel on a test file of any size, with whatever goes wrong on Kaggle.

The kernel runs in a process of its own (see sandbox.py). Its results are then checked from outside, scored against the
verdicts, if there are any, and what two T4s would take is predicted.
"""

import functools
import math
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import polars as pl

from kaggle_kernels.build.bundle import check_built, kernel_folder, kernel_text
from kaggle_kernels.build.memory_fit import Fit, fit_packages
from kaggle_kernels.build.packages import build_of, find_package
from kaggle_kernels.build.spec import COMPETITIONS, Spec, read_spec
from kaggle_kernels.rehearsal.fault_injection import Faults, check_faults, check_kills
from kaggle_kernels.rehearsal.rows import (
    describe,
    make_rows,
    read_test_rows,
    read_verdicts,
    sentence,
)
from kaggle_kernels.rehearsal.sandbox import Run, find_python, lay_out, run_as_kaggle
from kaggle_kernels.rehearsal.throughput import as_record, here, in_time, predict, report
from kaggle_kernels.rehearsal.validate import check_results, tolerance_for
from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, write_json

RESULTS = ("submission.csv", "scores.parquet", "kernel.json")


@dataclass(frozen=True)
class Scenario:
    """What a rehearsal makes of the test rows (see rehearsal_rows.make_rows), the devices, the clock, and the faults.

    `devices` is a number of CPU workers, None the kernel's own choice; `clock_seconds` None is the spec's.
    A `train_file` is mounted beside the test file, so that the visible run scores rows of it.
    """

    size: int | None = None
    shuffle: bool = False
    ids: str | None = None
    hostile: bool = False
    seed: int = 0
    devices: int | None = None
    clock_seconds: float | None = None
    kill_every: float | None = None
    lose_device: int | None = None
    train_file: Path | None = None

    @property
    def makes_rows(self) -> bool:
        """Whether the kernel gets other rows than the test file's; it is then told that this is the hidden run."""
        return bool(self.size or self.shuffle or self.ids or self.hostile)

    @property
    def faults(self) -> Faults:
        """What is done to the kernel's workers."""
        return Faults(self.kill_every, self.lose_device, self.seed)


def rehearse(
    spec_path: Path,
    test_file: Path,
    out: Path,
    python: Path | None = None,
    scenario: Scenario | None = None,
) -> dict:
    """Run the spec's kernel on `test_file` and copy what it wrote to `out`; what was measured, also in `out`/rehearsal.json.

    Raises UserError where the kernel was not built, a package is absent or does not suit, the kernel fails or is late, or
    what it wrote is no valid submission; `out` then has no rehearsal.json.
    """
    scenario = scenario or Scenario()
    if (out / "rehearsal.json").is_file():
        (out / "rehearsal.json").unlink()  # of an earlier rehearsal, which says nothing of this one
    spec = read_spec(spec_path)
    folder = check_built(spec_path)
    fits = fit_packages(spec_path, spec)
    packages = {fit.package.dataset: find_package(fit) for fit in fits}
    python = find_python(python)
    check_faults(scenario.faults, scenario.devices)
    check_train_file(scenario)
    rows, told = rehearsal_rows(test_file, spec, scenario)
    build = build_of(folder, packages)
    entered = functools.partial(
        ledger.record, "rehearse", spec=spec_path.stem, **build, rows=len(rows)
    )
    try:
        measured = run_and_check(
            spec_path, test_file.suffix, rows, out, fits, packages, python, scenario
        )
    except UserError as error:
        entered(verdict="failed", reason=str(error))
        raise
    measured = {"rows": len(rows), "test": told, **measured, "build": build}
    write_json(out / "rehearsal.json", measured)
    entered(verdict="passed", seconds=measured["seconds"])
    return measured


def run_and_check(
    spec_path: Path,
    suffix: str,
    rows: pl.DataFrame,
    out: Path,
    fits: list[Fit],
    packages: dict[str, Path],
    python: Path,
    scenario: Scenario,
) -> dict:
    """Run the built kernel on `rows`, copy what it wrote to `out`, check it; what was measured."""
    spec = read_spec(spec_path)
    kernel = (kernel_folder(spec_path) / "kernel.py").read_text(encoding="utf-8")
    clock_seconds = scenario.clock_seconds or spec.clock_seconds
    if scenario.clock_seconds:
        kernel = kernel_text(
            spec_path.stem, spec.model_copy(update={"clock_seconds": clock_seconds}), fits
        )
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        root = Path(folder) / "kaggle"
        lay_out(root, spec, packages, suffix, rows, scenario.train_file)
        run = run_as_kaggle(
            python,
            kernel,
            root,
            spec_path.stem,
            clock_seconds=clock_seconds,
            devices=scenario.devices,
            is_hidden=scenario.makes_rows,
            faults=scenario.faults,
        )
        keep(root / "working", out, rows if scenario.makes_rows else None)
    check_kills(scenario.faults, run.kills, run.seconds)
    measured = {"seconds": round(run.seconds, 1), "clock_seconds": clock_seconds}
    measured |= {"devices": scenario.devices, "faults": faults_record(scenario, run)}
    measured |= evaluate(out, rows, spec, fits, tolerance_for(packages.values(), out))
    print(
        f"{out / 'submission.csv'}: {len(rows)} rows in {run.seconds:.1f} s of a clock of {in_time(clock_seconds)}"
    )
    return measured


def check_train_file(scenario: Scenario) -> None:
    """Raise UserError where there is no such train file, or the run that is rehearsed would not look at it."""
    if scenario.train_file is None:
        return
    if not scenario.train_file.is_file() or scenario.train_file.suffix not in (".parquet", ".csv"):
        raise UserError(
            f"--train {scenario.train_file}: no such file; give the competition's train.parquet or train.csv"
        )
    if scenario.makes_rows:
        raise UserError(
            "--train: only the visible run scores it; leave out --rows, --shuffle, --ids and --hostile"
        )


def rehearsal_rows(test_file: Path, spec: Spec, scenario: Scenario) -> tuple[pl.DataFrame, dict]:
    """The rows that the kernel gets, and how they were made."""
    given = read_test_rows(test_file, spec)
    read_verdicts(given, str(test_file))
    options = {
        name: getattr(scenario, name) for name in ("size", "shuffle", "ids", "hostile", "seed")
    }
    rows = make_rows(given, are_turns=spec.competition == "lmsys", **options)
    told = describe(rows, len(given), scenario.shuffle, scenario.seed)
    if scenario.makes_rows:
        print(f"[rehearsal] {test_file}: {sentence(told)}", flush=True)
    return rows, told


def keep(working: Path, out: Path, rows: pl.DataFrame | None) -> None:
    """Copy the kernel's results to `out`, with the rows that it got where those are not the test file's."""
    for name in RESULTS:
        if not (working / name).is_file():
            raise UserError(f"{name}: the kernel ended well and did not write it; its log says why")
        with atomic_file(out / name) as temporary:
            shutil.copyfile(working / name, temporary)
    (out / "rows.parquet").unlink(missing_ok=True)
    if rows is not None:
        with atomic_file(out / "rows.parquet") as temporary:
            rows.write_parquet(temporary)


def faults_record(scenario: Scenario, run: Run) -> dict:
    """What was done to the workers, for rehearsal.json."""
    return {**asdict(scenario.faults), "kills": [asdict(kill) for kill in run.kills]}


def evaluate(out: Path, rows: pl.DataFrame, spec: Spec, fits: list[Fit], tolerance: float) -> dict:
    """Check the results in `out`, score them, predict two T4s' time; all of it printed and returned."""
    competition = COMPETITIONS[spec.competition]
    found = check_results(out, rows, competition, tolerance)
    passes = read_object(out / "kernel.json")["passes"]
    speed, predictions = here(passes), predict(fits, spec, passes, len(rows))
    silent = [fit.package.run for fit in fits if not found["by_model"].get(fit.package.run)]
    print(
        f"checked: {found['ids']} ids, each once and in the test file's order; {found['scored']} rows were scored"
    )
    if silent:
        print(f"warning: {', '.join(silent)} scored no row; the log above says why")
    if found["alike"]:
        print(
            f"checked: {found['alike']} rows have the texts of others; their probabilities differ by at most "
            f"{found['largest_difference']:.1e}, {tolerance:g} is allowed"
        )
    print("\n".join(report(speed, predictions, spec.clock_seconds)))
    scores = measure(rows, out / "scores.parquet", spec)
    if scores:
        print(
            f"accuracy {scores['accuracy']:.4f}, log loss {scores['log_loss']:.4f} on {scores['judged']} judged rows; "
            f"the longer response: accuracy {scores['longer_accuracy']:.4f}"
        )
    return {**scores, "checks": found, "here": speed, "two_t4s": as_record(predictions)}


def measure(test_rows: pl.DataFrame, scores: Path, spec: Spec) -> dict:
    """Accuracy and log loss (natural) over the rows that have a verdict, joined by id; empty where the file has none."""
    verdicts = COMPETITIONS[spec.competition].verdicts
    truth = read_verdicts(test_rows, "the test rows")
    if truth is None:
        return {}
    columns = [f"p_{verdict}" for verdict in verdicts]
    judged = (
        pl.read_parquet(scores)
        .join(truth, on="id", how="inner")
        .filter(pl.col("winner").is_in(verdicts))
    )
    right, loss, longer_right = 0, 0.0, 0
    for row in judged.select("winner", "longer", *columns).to_dicts():
        values = [row[column] for column in columns]
        right += verdicts[values.index(max(values))] == row["winner"]
        loss -= math.log(values[verdicts.index(row["winner"])])
        longer_right += row["longer"] == row["winner"]
    total = max(judged.height, 1)
    shares = {
        "accuracy": right / total,
        "log_loss": loss / total,
        "longer_accuracy": longer_right / total,
    }
    return {"judged": judged.height, **shares} if judged.height else {}
