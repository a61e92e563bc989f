"""The kernel from beginning to end: inputs, checks, scores, submission.

Every check that needs no device comes before the first model is loaded. Written to /kaggle/working:
submission.csv, scores.parquet, kernel.json.
"""

import contextlib
import importlib.metadata
import os
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch

from kaggle_kernels.runtime.checks import check_machine
from kaggle_kernels.runtime.inputs import (
    find_mounted,
    install_missing_wheels,
    read_rows,
    read_table,
)
from kaggle_kernels.runtime.package import Package, PackageError, hash_file, read_package
from kaggle_kernels.runtime.scheduling.schedule import ScoringJob, make_job, score_all
from kaggle_kernels.runtime.settings import (
    Clock,
    PackageSettings,
    Settings,
    find_time_limit,
    is_hidden_run,
    log,
    start_clock,
)
from kaggle_kernels.runtime.submission import (
    fill_unscored,
    write_record,
    write_scores,
    write_submission,
)
from kaggle_kernels.runtime.visible import (
    VisibleRows,
    choose_visible_rows,
    describe_finish,
    describe_quality,
    measure_quality,
    predict_finish,
)

TEST_FILES = ("test.parquet", "test.csv")
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission.

    The hidden run always submits: a row that could not be scored gets the prior. Only what shows
    that answers would be wrong ends it. In the visible run every shortfall is an error.

    Raises:
        PackageError: Every package is damaged, or scores other than when it was packaged.
        ValueError: The test file or the submission is not whole; in the visible run also: too few
            rows were scored.
    """
    began = time.monotonic()
    root = Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))  # a rehearsal names another folder
    devices = list(devices or list_devices())

    # An earlier run's submission must not pass for that of a run that fails.
    (root / "working" / "submission.csv").unlink(missing_ok=True)

    # The time limit depends on the number of rows.
    test_file = find_mounted(root, settings.competition, TEST_FILES, "competitions")
    rows = read_rows(test_file, settings.texts_are_turns)
    clock_seconds = find_time_limit(settings.time_limits, len(rows))
    clock = start_clock(clock_seconds, began)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    log(clock, f"{settings.name}: {versions}")
    counting_rows = sum(row["counts"] for row in rows)
    log(clock, f"{test_file}: {len(rows)} rows, {counting_rows} of them count")

    # What is there to score them with. Golden rows show where a machine gives wrong answers.
    usable_settings, packages = read_packages(root, settings, clock)
    with log_errors_of_hidden_run(clock):
        install_missing_wheels(root, packages, settings.wheels)
        check_machine(packages, devices, clock)
    visible = choose_visible_rows(root, settings, packages, clock)

    # The hours of work.
    all_rows = [*rows, *visible.rows]
    job = make_job(usable_settings, packages, all_rows, devices, clock)
    with log_errors_of_hidden_run(clock):
        score_all(job)
    scored = job.probabilities()

    # From here on a row without a score has the prior.
    counts = count_rows(rows, scored)
    shortfall = describe_shortfall(counts, settings.min_scored)
    if shortfall is not None:
        if not is_hidden_run():
            raise ValueError(f"{shortfall}; nothing is submitted, as the visible run shows it")
        log(clock, f"warning: {shortfall}; the others get the prior")
    final = fill_unscored(rows, scored, settings.verdicts)

    # The ids are read again, so that a row lost on the way here is noticed.
    ids = [row["id"] for row in read_table(test_file, ("id",))]
    write_submission(root / "working" / "submission.csv", settings, final, ids)
    log(clock, f"submission.csv: {counts['rows']} rows, {counts['scored']} scored by models")

    # The submission stands: what fails from here on costs no more than a record.
    record = {
        "settings": asdict(settings),
        "clock_seconds": clock_seconds,
        "versions": versions,
        **counts,
        "shortfall": shortfall,
    }
    with log_errors_of_hidden_run(clock):
        write_records(root / "working", job, visible, final, record)


def write_records(
    folder: Path,
    job: ScoringJob,
    visible: VisibleRows,
    final: Mapping[str, list[float]],
    record: dict,
) -> None:
    """Write scores.parquet and kernel.json, which no score depends on.

    `final` are the submitted probabilities by id, `visible` the rows of the train file that were scored too,
    and `record` is the part of kernel.json that was known before.
    """
    inputs = job.inputs
    scored = job.probabilities()
    verdicts = inputs.settings.verdicts
    write_scores(folder / "scores.parquet", verdicts, final, scored, job.model_columns())
    if visible.rows:
        record["visible"] = report_visible_run(job, visible, scored)

    # By the hash of its manifest, `submit` recognises the package that it pushed.
    manifests = {}
    for package_settings, package in zip(inputs.settings.packages, inputs.packages, strict=True):
        manifests[package_settings.dataset] = hash_file(package.folder / "manifest.json")
    record |= {
        "manifests": manifests,
        "devices": list(inputs.devices.values()),
        "hidden_run": is_hidden_run(),
        "passes": job.progress.passes,
        "seconds": round(inputs.clock.elapsed(), 1),
    }
    write_record(folder / "kernel.json", record)


def count_rows(rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Count the rows for kernel.json, and those of them that were scored."""
    counting_ids = [row["id"] for row in rows if row["counts"]]
    return {
        "rows": len(rows),
        "scored": sum(row["id"] in scored for row in rows),
        "rows_that_count": len(counting_ids),
        "scored_that_count": sum(row_id in scored for row_id in counting_ids),
    }


def describe_shortfall(counts: Mapping[str, int], min_scored: float) -> str | None:
    """Say how many rows were scored, where it is a smaller share than `min_scored`, else None."""
    if counts["scored"] >= min_scored * counts["rows"]:
        return None
    return (
        f"{counts['scored']} of {counts['rows']} rows were scored, "
        f"the spec's min_scored is {min_scored}"
    )


def list_devices() -> list[str]:
    """List every GPU, or the CPU.

    A rehearsal names them in KAGGLE_DEVICES: "cpu,cpu" are two workers that stand in for GPUs.
    """
    named_devices = os.environ.get("KAGGLE_DEVICES")
    if named_devices:
        return named_devices.split(",")
    gpus = [f"cuda:{number}" for number in range(torch.cuda.device_count())]
    return gpus or ["cpu"]


@contextlib.contextmanager
def log_errors_of_hidden_run(clock: Clock) -> Iterator[None]:
    """In the hidden run, log an error of the block and go on: fewer scores beat no submission.

    A PackageError is raised in any run: it shows that answers would be wrong.
    """
    try:
        yield
    except PackageError:
        raise
    except Exception:
        if not is_hidden_run():
            raise
        log(clock, f"going on with what was scored until now: {traceback.format_exc()}")


def read_packages(root: Path, settings: Settings, clock: Clock) -> tuple[Settings, list[Package]]:
    """Find and check the spec's packages. In the hidden run one that fails is left out.

    Returns:
        The settings with the packages that passed, and these packages.

    Raises:
        Exception: The error of a package, in the hidden run only where none passed.
    """
    kept_settings = []
    packages = []
    last_package = settings.packages[-1]
    for package_settings in settings.packages:
        try:
            dataset = package_settings.dataset
            folder = find_mounted(root, dataset, ("manifest.json",), "datasets").parent
            package = read_package(folder)
            check_verdicts(package, package_settings)
        except Exception as error:
            # A package less costs some accuracy, but without any package there is no submission.
            none_passed = not packages and package_settings is last_package
            if none_passed or not is_hidden_run():
                raise
            log(clock, f"{package_settings.run}: left out: {type(error).__name__}: {error}")
            continue

        golden_rows = len(package.contract.golden)
        log(clock, f"{folder}: files, tokenizer and {golden_rows} golden rows are as packaged")
        kept_settings.append(package_settings)
        packages.append(package)
    return replace(settings, packages=tuple(kept_settings)), packages


def check_verdicts(package: Package, package_settings: PackageSettings) -> None:
    """Raise PackageError where a package has other verdicts than its recipe, or has them in another order.

    The kernel would then take the logits of one verdict for those of another.
    """
    if package.contract.verdicts != package_settings.verdicts:
        raise PackageError(
            f"{package.folder}/contract.json: verdicts: found {package.contract.verdicts}, but the "
            f"recipe of {package_settings.run} says {package_settings.verdicts}; package the run "
            "again, or build the kernel again from the recipe that it was trained with"
        )


def report_visible_run(
    job: ScoringJob, visible: VisibleRows, scored: Mapping[str, list[float]]
) -> dict:
    """Log what the visible run shows of the hidden run, and return it for kernel.json.

    Returns:
        `rows` (the number of train rows), `quality` unless a model was trained on them, and
        `predicted`: the seconds of the hidden run by its number of rows.
    """
    settings, clock, passes = job.inputs.settings, job.inputs.clock, job.progress.passes
    report: dict = {"rows": len(visible.rows), "predicted": []}

    # Rows that a model was trained on tell nothing of its quality.
    if not visible.trained_on:
        quality = measure_quality(visible, settings.verdicts, scored)
        report["quality"] = quality
        if quality["judged"] > 0:
            log(clock, describe_quality(quality))

    # All time that no batch took, such as that for loading, is the same for any number of rows.
    fixed_seconds = clock.elapsed() - sum(record["seconds"] for record in passes)
    for rows in settings.hidden_rows:
        finish = predict_finish(passes, fixed_seconds, rows)
        report["predicted"].append(finish)

        # Of its time limit, the hidden run keeps a reserve for writing.
        hidden_clock = start_clock(find_time_limit(settings.time_limits, rows))
        scoring_seconds = hidden_clock.deadline - hidden_clock.began
        log(clock, describe_finish(finish, scoring_seconds))
    return report
