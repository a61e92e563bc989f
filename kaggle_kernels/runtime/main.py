"""The kernel from beginning to end: inputs, checks, scores, submission.

Every check that needs no device comes before the first model is loaded. Written to /kaggle/working: submission.csv,
scores.parquet, kernel.json.
"""

import importlib.metadata
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from kaggle_kernels.runtime.inputs import find_mounted, install_missing_wheels, kaggle_root, read_rows
from kaggle_kernels.runtime.package import Package, PackageError, read_package
from kaggle_kernels.runtime.schedule import Board, combine, make_board, score_all, serving_contract
from kaggle_kernels.runtime.settings import Clock, PackageSettings, Settings, log, start_clock
from kaggle_kernels.runtime.submission import fill_unscored, write_record, write_scores, write_submission


def visible_devices() -> list[str]:
    """Every GPU, or the CPU; in a rehearsal KAGGLE_DEVICES names them: "cpu,cpu" are two workers that stand in for GPUs."""
    if named := os.environ.get("KAGGLE_DEVICES"):
        return named.split(",")
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission; raises, and writes no submission, where it would be wrong."""
    clock = start_clock(settings.clock_seconds)
    root = kaggle_root()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "tokenizers", "safetensors")}
    log(clock, f"{settings.name}: {', '.join(f'{name} {version}' for name, version in versions.items())}")
    test_file = find_mounted(root, settings.competition, ("test.parquet", "test.csv"))
    rows = read_rows(test_file, are_turns="tie" in settings.verdicts)
    log(clock, f"{test_file}: {len(rows)} rows")
    packages = read_packages(root, settings, clock)
    installed = install_missing_wheels(root, [package.folder for package in packages], settings.wheels)
    if installed:
        log(clock, f"installed {', '.join(installed)} from {settings.wheels}")
    devices = list(devices or visible_devices())
    threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
    hidden_run = bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))
    board = make_board(settings, packages, rows, devices, threads, clock, hidden_run)
    score_all(board)
    record = {
        "settings": asdict(settings),
        "versions": versions,
        "installed": installed,
        "devices": devices,
        "hidden_run": hidden_run,
        "rows": len(rows),
        "scored": write_results(root / "working", board, rows),
        "plans": board.plans,
        "passes": board.passes,
        "workers": board.workers,
        "seconds": round(clock.elapsed(), 1),
    }
    write_record(root / "working" / "kernel.json", record)
    log(clock, f"submission.csv: {len(rows)} rows, {record['scored']} scored, {len(rows) - record['scored']} by the prior")


def write_results(working: Path, board: Board, rows: Sequence[dict]) -> int:
    """Write scores.parquet and submission.csv; how many of the rows were scored."""
    settings = board.settings
    scored = combine(settings, board.packages, board.scores)
    final = fill_unscored(rows, scored, settings.verdicts, settings.min_scored)
    by_run = {
        chosen.run: (package.contract.verdicts, scores)
        for chosen, package, scores in zip(settings.packages, board.packages, board.scores, strict=True)
    }
    write_scores(working / "scores.parquet", settings.verdicts, final, scored, by_run)
    write_submission(working / "submission.csv", settings, final)
    return sum(row["id"] in scored for row in rows)


def read_packages(root: Path, settings: Settings, clock: Clock) -> list[Package]:
    """The spec's packages, found and checked against the spec and the recipe, the template against the token budget."""
    packages = []
    for chosen in settings.packages:
        package = read_package(find_mounted(root, chosen.dataset, ("manifest.json",)).parent)
        check_package(package, chosen, settings)
        if package.contract.base_model != chosen.base_model:
            log(clock, f"{chosen.run}: made of {package.contract.base_model}, its recipe says {chosen.base_model}")
        empty = package.model_input.Pair("", (), (), ())
        package.model_input.encode(empty, package.tokenizer, serving_contract(package, settings))
        for name, trained in package.contract.recorded.get("versions", {}).items():
            if name in ("torch", "transformers") and trained != importlib.metadata.version(name):
                log(clock, f"{chosen.run}: trained with {name} {trained}, served with {importlib.metadata.version(name)}")
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
