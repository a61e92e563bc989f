"""The kernel from beginning to end: inputs, checks, scores, submission.

Every check that needs no device comes before the first model is loaded. Written to /kaggle/working: submission.csv,
scores.parquet, kernel.json.
"""

import contextlib
import importlib.metadata
import json
import os
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kaggle_kernels.runtime.checks import check_machine
from kaggle_kernels.runtime.inputs import find_mounted, install_missing_wheels, kaggle_root, read_ids, read_rows
from kaggle_kernels.runtime.package import Package, PackageError, read_package
from kaggle_kernels.runtime.scheduling.schedule import Board, combine, make_board, score_all, serving_contract
from kaggle_kernels.runtime.settings import Clock, PackageSettings, Settings, log, start_clock
from kaggle_kernels.runtime.submission import fill_unscored, write_record, write_scores, write_submission
from kaggle_kernels.runtime.visible import Speed, VisibleRows, choose_visible_rows, visible_lines, visible_report


def visible_devices() -> list[str]:
    """Every GPU, or the CPU; in a rehearsal KAGGLE_DEVICES names them: "cpu,cpu" are two workers that stand in for GPUs."""
    if named := os.environ.get("KAGGLE_DEVICES"):
        return named.split(",")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission; raises, and writes no submission, where it would be wrong."""
    clock = start_clock(settings.clock_seconds)
    root = kaggle_root()
    (root / "working" / "submission.csv").unlink(missing_ok=True)  # of an earlier run in the same session
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    log(clock, f"{settings.name}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    test_file = find_mounted(root, settings.competition, ("test.parquet", "test.csv"), "competitions")
    rows = read_rows(test_file, are_turns="tie" in settings.verdicts)
    log(clock, f"{test_file}: {len(rows)} rows")
    packages = read_packages(root, settings, clock)
    folders = [package.folder for package in packages]
    installed = install_missing_wheels(root, folders, settings.wheels)
    if installed:
        log(clock, f"installed {', '.join(installed)} from {settings.wheels}")
    devices = list(devices or visible_devices())
    visible = choose_visible_rows(root, settings, folders, {row["id"] for row in rows})
    if visible.log_line:
        log(clock, visible.log_line)
    machine = check_machine(root, settings, packages, devices, len(rows) + len(visible.rows), clock)
    board = make_board(settings, packages, [*rows, *visible.rows], devices, clock, is_hidden_run())
    with carrying_on(board):
        score_all(board)
    scored = combine(settings, packages, board.scores)
    final = fill_unscored(rows, scored, settings.verdicts, settings.min_scored)
    write_submission(root / "working" / "submission.csv", settings, final, read_ids(test_file))
    record = {
        "settings": asdict(settings),
        "manifests": {one.dataset: package.manifest_sha256() for one, package in zip(settings.packages, packages, strict=True)},
        "versions": versions,
        "installed": installed,
        "machine": machine,
        "devices": devices,
        "hidden_run": board.inputs.hidden_run,
        "rows": len(rows),
        "scored": sum(row["id"] in scored for row in rows),
        "plans": board.plans,
        "passes": board.passes,
        "workers": board.workers,
        "visible": report_visible_rows(board, visible, scored) if visible.rows else None,
        "seconds": round(clock.elapsed(), 1),
    }
    with carrying_on(board):
        write_scores(root / "working" / "scores.parquet", settings.verdicts, final, scored, board.by_run())
        write_record(root / "working" / "kernel.json", record)
    log(clock, f"submission.csv: {len(rows)} rows, {record['scored']} scored, {len(rows) - record['scored']} by the prior")


def is_hidden_run() -> bool:
    """Whether this is the run on the hidden test rows, that of a submission."""
    return bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))


@contextlib.contextmanager
def carrying_on(board: Board) -> Iterator[None]:
    """In the hidden run an error in here is only logged: what was scored before it is worth submitting, if it is enough."""
    try:
        yield
    except Exception:
        if not board.inputs.hidden_run:
            raise
        log(board.inputs.clock, f"going on with what was scored until now: {traceback.format_exc()}")


def report_visible_rows(board: Board, visible: VisibleRows, scored: Mapping[str, list[float]]) -> dict:
    """What the visible run measured, for kernel.json, also logged."""
    clock_seconds = board.inputs.clock.deadline - board.inputs.clock.began
    verdicts, speeds = board.inputs.settings.verdicts, speeds_of(board)
    report = visible_report(visible, verdicts, scored, board.by_run(), speeds, board.before_seconds, clock_seconds)
    for line in visible_lines(report):
        log(board.inputs.clock, line)
    return report


def speeds_of(board: Board) -> list[Speed]:
    """What was measured of each package that scored."""
    speeds = []
    for number, chosen in enumerate(board.inputs.settings.packages):
        done = [record for record in board.passes if record["run"] == chosen.run and record["scored"]]
        name = board.inputs.packages[number].folder.name
        loads = [worker["load_seconds"] for worker in board.workers if worker["package"] == name]
        if done:
            rate = board.measured.rates[number] * done[0]["tokens"] / done[0]["computed_tokens"]
            tokens = done[0]["tokens"] / done[0]["scored"]
            speeds.append(Speed(chosen.run, max(loads, default=0.0), rate, tokens, len(board.orders(number))))
    return speeds


def read_packages(root: Path, settings: Settings, clock: Clock) -> list[Package]:
    """The spec's packages, found and checked against the spec and the recipe, the template against the token budget."""
    packages = []
    for chosen in settings.packages:
        package = read_package(find_mounted(root, chosen.dataset, ("manifest.json",), "datasets").parent, clock)
        check_package(package, chosen, settings)
        if package.contract.base_model != chosen.base_model:
            log(clock, f"{chosen.run}: made of {package.contract.base_model}, its recipe says {chosen.base_model}")
        empty = package.model_input.Pair("", (), (), ())
        package.model_input.encode(empty, package.tokenizer, serving_contract(package, settings))
        log(clock, f"{package.folder}: files, tokenizer and {len(package.contract.golden)} golden rows are as packaged")
        packages.append(package)
    return packages


def check_package(package: Package, chosen: PackageSettings, settings: Settings) -> None:
    """Raise PackageError where a package's verdicts, their order or its architecture are not those of the recipe."""
    contract, config = package.contract, json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
    if missing := set(settings.verdicts) - set(contract.verdicts):
        raise PackageError(f"{package.folder}: tells nothing of {', '.join(sorted(missing))}, which the competition asks for")
    for file, key, found, expected in (
        ("contract.json", "verdicts", contract.verdicts, chosen.verdicts),
        ("config.json", "model_type", config.get("model_type"), chosen.model_type),
    ):
        if found != expected:
            raise PackageError(
                f"{package.folder / file}: {key}: found {found}, the recipe of {chosen.run} says {expected}; package the run "
                "again, or build the kernel again from the recipe that it was trained with"
            )
