"""The kernel from beginning to end: inputs, checks, scores, submission.

Every check that needs no device comes before the first model is loaded. Written to /kaggle/working: submission.csv,
scores.parquet, kernel.json.
"""

import gc
import importlib.metadata
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from kaggle_kernels.runtime.engine import load_workers, score_package
from kaggle_kernels.runtime.inputs import find_mounted, install_missing_wheels, kaggle_root, read_rows
from kaggle_kernels.runtime.package import Package, PackageError, read_package
from kaggle_kernels.runtime.scoring import mean_of_orders
from kaggle_kernels.runtime.settings import Clock, Settings, log, start_clock
from kaggle_kernels.runtime.submission import (
    fill_unscored,
    soften,
    to_competition,
    weighted_mean,
    write_record,
    write_scores,
    write_submission,
)

Scores = dict[str, dict[str, list[float]]]  # by id, then by order


def visible_devices() -> list[str]:
    """Every GPU, or the CPU."""
    return [f"cuda:{number}" for number in range(torch.cuda.device_count())] or ["cpu"]


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission; raises, and writes no submission, where it would be wrong."""
    clock = start_clock(settings.clock_seconds)
    root = kaggle_root()
    transformers_logging.disable_progress_bar()
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
    per_package, records = score_packages(settings, packages, rows, devices, clock)
    scored = combine(settings, packages, per_package)
    final = fill_unscored(rows, scored, settings.verdicts, settings.min_scored)
    working = root / "working"
    by_run = {
        chosen.run: (package.contract.verdicts, scores)
        for chosen, package, scores in zip(settings.packages, packages, per_package, strict=True)
    }
    write_scores(working / "scores.parquet", settings.verdicts, final, scored, by_run)
    write_submission(working / "submission.csv", settings, final)
    record = {
        "settings": asdict(settings),
        "versions": versions,
        "installed": installed,
        "devices": devices,
        "hidden_run": bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN")),
        "rows": len(rows),
        "scored": len(scored),
        "passes": records,
        "seconds": round(clock.elapsed(), 1),
    }
    write_record(working / "kernel.json", record)
    log(clock, f"submission.csv: {len(rows)} rows, {len(scored)} scored, {len(rows) - len(scored)} by the prior")


def read_packages(root: Path, settings: Settings, clock: Clock) -> list[Package]:
    """The spec's packages, found and checked: their verdicts must suit the competition, the template the token budget."""
    packages = []
    for chosen in settings.packages:
        package = read_package(find_mounted(root, chosen.dataset, ("manifest.json",)).parent)
        missing = set(settings.verdicts) - set(package.contract.verdicts)
        if missing:
            raise PackageError(
                f"{package.folder}: tells nothing of {', '.join(sorted(missing))}, which the competition asks for"
            )
        empty = package.model_input.Pair("", (), (), ())
        package.model_input.encode(empty, package.tokenizer, serving_contract(package, settings))
        for name, trained in package.contract.recorded.get("versions", {}).items():
            if name in ("torch", "transformers") and trained != importlib.metadata.version(name):
                log(clock, f"{chosen.run}: trained with {name} {trained}, served with {importlib.metadata.version(name)}")
        log(clock, f"{package.folder}: files, tokenizer and {len(package.contract.golden)} golden rows are as packaged")
        packages.append(package)
    return packages


def serving_contract(package: Package, settings: Settings):
    """The package's contract, with the spec's token budget where it names one."""
    if settings.budget_tokens is None:
        return package.contract
    return replace(package.contract, budget_tokens=settings.budget_tokens)


def score_packages(
    settings: Settings, packages: Sequence[Package], rows: Sequence[Mapping], devices: Sequence[str], clock: Clock
) -> tuple[list[Scores], list[dict]]:
    """Each package's scores, one package after the other, and a record of every pass.

    The first order of the first package may use the whole clock: a row with one score is worth more than a second one.
    All else shares what is left of the clock equally among the packages to come.
    """
    per_package, records = [], []
    for number, package in enumerate(packages):
        share = time.monotonic() + clock.left() / (len(packages) - number)
        deadlines = [share if number else clock.deadline, *[share] * (len(settings.orders) - 1)]
        contract = serving_contract(package, settings)
        pairs = [package.model_input.pair_from_row(row) for row in rows]
        workers = load_workers(package, devices, settings.tokens_per_batch, clock)
        scores, passes = score_package(package, contract, workers, pairs, settings.orders, deadlines, clock)
        per_package.append(scores)
        records += passes
        del workers
        gc.collect()
        torch.cuda.empty_cache()
    return per_package, records


def combine(settings: Settings, packages: Sequence[Package], per_package: Sequence[Scores]) -> dict[str, list[float]]:
    """Probabilities of the competition's verdicts by id: orders averaged, then packages by weight, then the temperature."""
    by_id: dict[str, list[tuple[float, list[float]]]] = {}
    for chosen, package, scores in zip(settings.packages, packages, per_package, strict=True):
        for row_id, values in mean_of_orders(scores).items():
            told = to_competition(values, package.contract.verdicts, settings.verdicts)
            by_id.setdefault(row_id, []).append((chosen.weight, told))
    return {
        row_id: soften(weighted_mean([values for _, values in found], [weight for weight, _ in found]), settings.temperature)
        for row_id, found in by_id.items()
    }
