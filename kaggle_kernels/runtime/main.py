"""The kernel from beginning to end: inputs, checks, scores, submission.

Every check that needs no device comes before the first model is loaded. Written to /kaggle/working: submission.csv,
scores.parquet, kernel.json.
"""

import contextlib
import gc
import importlib.metadata
import json
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from kaggle_kernels.runtime.engine import Worker, load_workers, score_package
from kaggle_kernels.runtime.inputs import find_mounted, install_missing_wheels, kaggle_root, read_rows
from kaggle_kernels.runtime.package import Package, PackageError, read_package
from kaggle_kernels.runtime.plan import job_of, loading_seconds, make_plan, share_devices
from kaggle_kernels.runtime.scoring import mean_of_orders
from kaggle_kernels.runtime.settings import Clock, PackageSettings, Settings, log, start_clock
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


def serving_contract(package: Package, settings: Settings):
    """The package's contract, with the spec's token budget where it names one."""
    if settings.budget_tokens is None:
        return package.contract
    return replace(package.contract, budget_tokens=settings.budget_tokens)


def score_packages(
    settings: Settings, packages: Sequence[Package], rows: Sequence[Mapping], devices: Sequence[str], clock: Clock
) -> tuple[list[Scores], list[dict]]:
    """Each package's scores, and a record of every pass: in turn or side by side, as planned."""
    if len(packages) == 1 or len(devices) == 1:
        return score_in_turn(settings, packages, rows, devices, clock)
    contracts = [serving_contract(package, settings) for package in packages]
    jobs = [
        job_of(package, contract, make_pairs(package, rows), settings.orders)
        for package, contract in zip(packages, contracts, strict=True)
    ]
    can_part = all(chosen.placement == "each" for chosen in settings.packages)
    plan = make_plan(jobs, can_part, devices, clock.left())
    log(clock, f"plan: {plan.why}")
    scoring = score_side_by_side if plan.side_by_side else score_in_turn
    per_package, records = scoring(settings, packages, rows, devices, clock)
    return per_package, [{"plan": plan.why}, *records]


def make_pairs(package: Package, rows: Sequence[Mapping]) -> list:
    """The rows as pairs of the package's own model_input."""
    return [package.model_input.pair_from_row(row) for row in rows]


def score_in_turn(
    settings: Settings, packages: Sequence[Package], rows: Sequence[Mapping], devices: Sequence[str], clock: Clock
) -> tuple[list[Scores], list[dict]]:
    """One package after the other on all devices.

    The first order of the first package may use the whole clock: a row with one score is worth more than a second one.
    All else shares what is left of the clock equally among the packages to come. A later package that could not be loaded
    before the deadline is left out.
    """
    per_package, records = [], []
    for number, (chosen, package) in enumerate(zip(settings.packages, packages, strict=True)):
        if number and clock.left() <= loading_seconds(package, 1 if chosen.placement == "split" else len(devices)):
            log(clock, f"{package.folder.name}: left out, {clock.left():.0f} s are too few to load it")
            per_package.append({row["id"]: {} for row in rows})
            continue
        share = time.monotonic() + clock.left() / (len(packages) - number)
        deadlines = [share if number else clock.deadline, *[share] * (len(settings.orders) - 1)]
        contract = serving_contract(package, settings)
        pairs = make_pairs(package, rows)
        workers = load_workers(package, chosen.placement, devices, settings.tokens_per_batch, clock)
        scores, passes = score_package(package, contract, workers, pairs, settings.orders, deadlines, clock)
        per_package.append(scores)
        records += passes
        free(workers)
    return per_package, records


def score_side_by_side(
    settings: Settings, packages: Sequence[Package], rows: Sequence[Mapping], devices: Sequence[str], clock: Clock
) -> tuple[list[Scores], list[dict]]:
    """Every package on devices of its own, all at the same time; each may use the whole clock.

    All models are loaded before the first row is scored: loading changes torch's defaults for every thread.
    """
    shares = share_devices(devices, len(packages))
    teams = [
        load_workers(package, "each", share, settings.tokens_per_batch, clock)
        for package, share in zip(packages, shares, strict=True)
    ]
    deadlines = [clock.deadline] * len(settings.orders)

    def score_one(package: Package, workers: list[Worker]) -> tuple[Scores, list[dict]]:
        contract = serving_contract(package, settings)
        pairs = make_pairs(package, rows)
        return score_package(package, contract, workers, pairs, settings.orders, deadlines, clock)

    with ThreadPoolExecutor(len(packages)) as pool:
        done = list(pool.map(score_one, packages, teams))
    per_package = [scores for scores, _ in done]
    records = [record for _, passes in done for record in passes]
    alive = [worker.device for team in teams for worker in team if not worker.failure]
    for team in teams:
        free(team)
    if len(alive) < len(devices):
        records += rescue(settings, packages, rows, alive, per_package, clock)
    return per_package, records


def rescue(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    alive: Sequence[str],
    per_package: list[Scores],
    clock: Clock,
) -> list[dict]:
    """After a device broke: the first order of the rows that its package left, on the devices that are `alive`.

    Whatever goes wrong here is only logged: the other packages' scores are there, and min_scored decides whether they do.
    """
    records = []
    for package, scores in zip(packages, per_package, strict=True):
        missing = [row for row in rows if not scores[row["id"]]]
        if not missing or not alive or clock.left() <= loading_seconds(package, len(alive)):
            continue
        try:
            workers = load_workers(package, "each", alive, settings.tokens_per_batch, clock)
        except Exception:
            log(clock, f"{package.folder.name}: cannot be loaded on {', '.join(alive)}: {traceback.format_exc()}")
            continue
        contract = serving_contract(package, settings)
        pairs = make_pairs(package, missing)
        found, passes = score_package(package, contract, workers, pairs, settings.orders[:1], [clock.deadline], clock)
        scores.update(found)
        records += passes
        free(workers)
    return records


def free(workers: list[Worker]) -> None:
    """Give the devices' memory back, as far as they still answer: one that broke raises its error again."""
    workers.clear()
    gc.collect()
    with contextlib.suppress(RuntimeError):
        torch.cuda.empty_cache()


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
