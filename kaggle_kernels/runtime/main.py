"""The kernel from beginning to end: inputs, checks, scores, submission.

Every check that needs no device comes before the first model is loaded. Written to /kaggle/working:
submission.csv, scores.parquet, kernel.json.
"""

import contextlib
import importlib.metadata
import json
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
    kaggle_root,
    read_rows,
    read_table,
)
from kaggle_kernels.runtime.package import Package, PackageError, read_package
from kaggle_kernels.runtime.scheduling.schedule import (
    Board,
    make_board,
    score_all,
    serving_contract,
)
from kaggle_kernels.runtime.settings import (
    Clock,
    PackageSettings,
    Settings,
    is_hidden_run,
    log,
    start_clock,
)
from kaggle_kernels.runtime.submission import (
    describe_shortfall,
    fill_unscored,
    write_record,
    write_scores,
    write_submission,
)
from kaggle_kernels.runtime.visible import (
    Speed,
    VisibleRows,
    choose_visible_rows,
    report_quality,
    report_speed,
    visible_lines,
)

TEST_FILES = ("test.parquet", "test.csv")
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission.

    The hidden run always submits: a row that could not be scored gets the prior. Only what shows
    that answers would be wrong ends it. In the visible run every shortfall is an error.

    Args:
        settings: What the spec asks for.
        devices: PyTorch's names of the devices; by default those of this machine.

    Raises:
        PackageError: Every package is damaged, or scores other than when it was packaged.
        ValueError: The test file or the submission is not whole; in the visible run also: too few
            rows were scored.
    """
    began = time.monotonic()
    root = kaggle_root()
    hidden_run = is_hidden_run()
    devices = list(devices or list_devices())

    # An earlier run's submission must not pass for that of a run that fails.
    (root / "working" / "submission.csv").unlink(missing_ok=True)

    # The time limit depends on the number of rows.
    test_file = find_mounted(root, settings.competition, TEST_FILES, "competitions")
    rows = read_rows(test_file, are_turns="tie" in settings.verdicts)
    clock_seconds = settings.time_limit(len(rows))
    clock = start_clock(clock_seconds, began)
    versions = log_versions(settings, clock)
    counting_rows = sum(row["counts"] for row in rows)
    log(clock, f"{test_file}: {len(rows)} rows, {counting_rows} of them count")

    # What is there to score them with.
    served, packages = read_packages(root, settings, clock)
    folders = [package.folder for package in packages]
    test_ids = {row["id"] for row in rows}
    visible = choose_visible_rows(root, settings, folders, test_ids)
    if visible.log_line:
        log(clock, visible.log_line)
    machine = prepare_machine(root, served, packages, devices, clock)

    # The hours of work.
    all_rows = [*rows, *visible.rows]
    board = make_board(served, packages, all_rows, devices, clock, hidden_run)
    with log_errors_of_hidden_run(clock):
        score_all(board)
    scored = board.probabilities()

    # From here on a row without a score has the prior.
    shortfall = describe_shortfall(rows, scored, settings.min_scored)
    if shortfall is not None:
        if not hidden_run:
            raise ValueError(f"{shortfall}; nothing is submitted, as the visible run shows it")
        log(clock, f"warning: {shortfall}; the others get the prior")
    final = fill_unscored(rows, scored, settings.verdicts)

    # The ids are read again, so that a row lost on the way here is noticed.
    ids = [row["id"] for row in read_table(test_file, ("id",))]
    write_submission(root / "working" / "submission.csv", settings, final, ids)
    counts = log_counts(rows, scored, clock)

    # The submission stands: what fails from here on costs no more than a record.
    record = {
        "settings": asdict(settings),
        "clock_seconds": clock_seconds,
        "versions": versions,
        "machine": machine,
        **counts,
        "shortfall": shortfall,
    }
    with log_errors_of_hidden_run(clock):
        write_records(root / "working", board, visible, scored, final, record)


def log_versions(settings: Settings, clock: Clock) -> dict[str, str]:
    """Log the kernel's name and the versions of its libraries, and return these for kernel.json."""
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    listed = ", ".join(f"{name} {version}" for name, version in versions.items())
    log(clock, f"{settings.name}: {listed}")
    return versions


def log_counts(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], clock: Clock
) -> dict:
    """Log how many rows were scored, and return the counts for kernel.json."""
    counts = count_rows(rows, scored)
    by_prior = counts["rows"] - counts["scored"]
    log(
        clock,
        f"submission.csv: {len(rows)} rows, {counts['scored']} scored, {by_prior} by the prior",
    )
    return counts


def write_records(
    folder: Path,
    board: Board,
    visible: VisibleRows,
    scored: Mapping[str, list[float]],
    final: Mapping[str, list[float]],
    record: dict,
) -> None:
    """Write scores.parquet and kernel.json, which no score depends on.

    Args:
        folder: /kaggle/working.
        board: The finished work.
        visible: The held-out rows that the visible run scored; none in the hidden run.
        scored: Probabilities of the rows that models scored, by id.
        final: The same of all rows of the test file, the prior included.
        record: The part of kernel.json that is known before.
    """
    inputs = board.inputs
    write_scores(
        folder / "scores.parquet", inputs.settings.verdicts, final, scored, board.scores_by_run()
    )
    record |= describe_run(board)
    record["visible"] = report_visible_run(board, visible, scored) if visible.rows else None
    record["seconds"] = round(inputs.clock.elapsed(), 1)
    write_record(folder / "kernel.json", record)


def prepare_machine(
    root: Path,
    settings: Settings,
    packages: Sequence[Package],
    devices: Sequence[str],
    clock: Clock,
) -> dict:
    """Install what is missing and check what is there, for kernel.json.

    In the hidden run a problem is only logged: golden rows show where answers would be wrong.
    """
    machine: dict = {}
    folders = [package.folder for package in packages]
    with log_errors_of_hidden_run(clock):
        machine["installed"] = install_missing_wheels(root, folders, settings.wheels)
        machine |= check_machine(root, packages, devices, clock)
    return machine


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
    for number, package_settings in enumerate(settings.packages):
        # One package less costs some accuracy, no package at all the submission.
        try:
            package = read_and_check_package(root, package_settings, settings, clock)
        except Exception as error:
            is_last_chance = not packages and number == len(settings.packages) - 1
            if is_last_chance or not is_hidden_run():
                raise
            log(clock, f"{package_settings.run}: left out: {type(error).__name__}: {error}")
            continue
        kept_settings.append(package_settings)
        packages.append(package)
    return replace(settings, packages=tuple(kept_settings)), packages


def read_and_check_package(
    root: Path, package_settings: PackageSettings, settings: Settings, clock: Clock
) -> Package:
    """Find a package and check it against the spec and the recipe."""
    folder = find_mounted(root, package_settings.dataset, ("manifest.json",), "datasets").parent
    package = read_package(folder, clock)
    check_package(package, package_settings, settings)
    if package.contract.base_model != package_settings.base_model:
        log(
            clock,
            f"{package_settings.run}: made of {package.contract.base_model}, "
            f"its recipe says {package_settings.base_model}",
        )

    # The template alone must fit the token budget.
    empty_pair = package.model_input.Pair("", (), (), ())
    contract = serving_contract(package, settings)
    package.model_input.encode(empty_pair, package.tokenizer, contract)

    golden_rows = len(package.contract.golden)
    log(clock, f"{folder}: files, tokenizer and {golden_rows} golden rows are as packaged")
    return package


def check_package(package: Package, package_settings: PackageSettings, settings: Settings) -> None:
    """Raise PackageError where verdicts, their order or the architecture are not the recipe's."""
    contract = package.contract
    missing_verdicts = set(settings.verdicts) - set(contract.verdicts)
    if missing_verdicts:
        raise PackageError(
            f"{package.folder}: tells nothing of {', '.join(sorted(missing_verdicts))}, "
            "which the competition asks for"
        )

    # In another order, the logits of one verdict would be taken for those of another.
    config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
    model_type = config.get("model_type")
    if contract.verdicts != package_settings.verdicts:
        mismatch = f"contract.json: verdicts: found {contract.verdicts}"
        expected = package_settings.verdicts
    elif model_type != package_settings.model_type:
        mismatch = f"config.json: model_type: found {model_type}"
        expected = package_settings.model_type
    else:
        return
    raise PackageError(
        f"{package.folder}/{mismatch}, the recipe of {package_settings.run} says {expected}; package the "
        "run again, or build the kernel again from the recipe that it was trained with"
    )


def count_rows(rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]]) -> dict:
    """Count the rows for kernel.json, and those of them that were scored."""
    counting_ids = [row["id"] for row in rows if row["counts"]]
    return {
        "rows": len(rows),
        "scored": sum(row["id"] in scored for row in rows),
        "rows_that_count": len(counting_ids),
        "scored_that_count": sum(row_id in scored for row_id in counting_ids),
    }


def describe_run(board: Board) -> dict:
    """Describe what the kernel did, for kernel.json."""
    inputs, progress = board.inputs, board.progress
    manifests = {}
    for package_settings, package in zip(inputs.settings.packages, inputs.packages, strict=True):
        manifests[package_settings.dataset] = package.manifest_sha256()
    return {
        "manifests": manifests,
        "devices": list(inputs.devices.values()),
        "hidden_run": inputs.hidden_run,
        "plans": progress.plans,
        "passes": progress.passes,
        "workers": progress.workers,
    }


def report_visible_run(
    board: Board, visible: VisibleRows, scored: Mapping[str, list[float]]
) -> dict:
    """Log what the visible run measured, and return it for kernel.json."""
    settings, clock = board.inputs.settings, board.inputs.clock
    quality = report_quality(visible, settings.verdicts, scored, board.scores_by_run())
    speed = report_speed(measure_speeds(board), board.measured.before_seconds, settings)
    report = quality | speed
    for line in visible_lines(report):
        log(clock, line)
    return report


def measure_speeds(board: Board) -> list[Speed]:
    """Collect what was measured of each package that scored."""
    speeds = []
    for number, package_settings in enumerate(board.inputs.settings.packages):
        passes = []
        for record in board.progress.passes:
            if record["run"] == package_settings.run and record["scored"]:
                passes.append(record)
        if not passes:
            continue

        # The rate is that of tokens with their padding, which the prediction leaves out.
        first_pass = passes[0]
        token_share = first_pass["tokens"] / first_pass["computed_tokens"]
        name = board.inputs.packages[number].folder.name

        # A package's workers load side by side: the slowest of them is waited for.
        loads = []
        for worker in board.progress.workers:
            if worker["package"] == name:
                loads.append(worker["load_seconds"])
        speed = Speed(
            run=package_settings.run,
            loading_seconds=max(loads, default=0.0),
            tokens_per_second=board.measured.rates.get(number, 0.0) * token_share,
            tokens_per_row=first_pass["tokens"] / first_pass["scored"],
            orders=len(board.orders(number)),
        )
        speeds.append(speed)
    return speeds
