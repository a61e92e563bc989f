"""Pairwise Demo: scores the pairs of wsdm-cup-multilingual-chatbot-arena and writes submission.csv.

Generated from the spec demo.yml by `python -m kaggle_kernels build demo`; change that, not this.
It runs on two T4s without internet, and needs the datasets that SETTINGS names and the competition's files.

On each GPU, which offers 14.5 GiB, computed for batches of 8,192 tokens: demo 0.8 GiB.
"""

from __future__ import annotations

import contextlib
import csv
import functools
import gc
import hashlib
import importlib.abc
import importlib.metadata
import importlib.util
import itertools
import json
import logging
import math
import multiprocessing
import os
import queue
import re
import subprocess
import sys
import threading
import time
import traceback
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from statistics import NormalDist
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention
from torch.nn.utils.rnn import pad_sequence
from torch.overrides import TorchFunctionMode
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
)
from transformers.masking_utils import sdpa_mask
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

# ================================================================================================
# settings.py
# What a spec asks of the kernel, the clock that it keeps to, and its log.

RESERVE_SECONDS = 300  # kept for writing and checking the submission
RESERVE_SHARE = 1 / 20  # of a shorter time limit


@dataclass(frozen=True)
class PackageSettings:
    """One model: the run that made it, the Kaggle dataset of its package, its weight in the mean.

    Placement is `each` (a copy on every GPU) or `split` (one copy, its layers over all of them).
    Verdicts are the recipe's, in the order of the logits: a package that says otherwise is refused.
    A model that is split puts no more than `weight_bytes_limit` on a GPU, which leaves room for a
    batch.
    """

    run: str
    dataset: str
    weight: float
    placement: str
    verdicts: tuple[str, ...]
    weight_bytes_limit: int | None = None


@dataclass(frozen=True)
class TimeLimit:
    """Seconds that a kernel may take for a test file of up to so many rows; None: of any more."""

    rows: int | None
    seconds: float


@dataclass(frozen=True)
class Settings:
    """A spec and its competition, checked by `build`."""

    name: str
    competition: str  # Kaggle's slug
    verdicts: tuple[str, ...]  # what the competition tells apart
    texts_are_turns: bool  # a text of its files is a JSON list of turns
    verdict_form: str  # of its train file: `name` in one column, or `flags`, one for each verdict
    verdict_columns: tuple[str, ...]
    answer: str  # of its submission: the `winner`, or `probabilities` of all verdicts
    columns: tuple[str, ...]  # of the submission, besides id
    metric: str  # accuracy, log_loss or brier_score
    hidden_rows: tuple[int, ...]  # numbers of rows that the hidden run may meet
    packages: tuple[PackageSettings, ...]
    orders: tuple[str, ...]
    time_limits: tuple[TimeLimit, ...]  # by ascending number of rows
    budget_tokens: int | None  # None: as in training
    tokens_per_batch: int
    temperature: float
    min_scored: float  # share of the rows; fewer are an error in the visible run
    visible_rows: int  # of the train file, scored in the visible run
    wheels: str | None  # the dataset with wheels that Kaggle's image lacks


def find_time_limit(time_limits: Sequence[TimeLimit], rows: int) -> float:
    """Return the seconds that a kernel may take for a test file of so many rows."""
    for limit in time_limits:
        if limit.rows is None or rows <= limit.rows:
            return limit.seconds
    raise ValueError(f"no time limit for {rows} rows; give one for any number of them")


@dataclass(frozen=True)
class Clock:
    """When the kernel began and must end, as time.monotonic gives seconds.

    After `deadline` no batch may be running; the reserve behind it is for writing.
    """

    began: float
    deadline: float
    reserve_seconds: float = 0.0

    def elapsed(self) -> float:
        """Return the seconds since the beginning."""
        return time.monotonic() - self.began

    def left(self) -> float:
        """Return the seconds until the deadline."""
        return self.deadline - time.monotonic()


def start_clock(limit_seconds: float, began: float | None = None) -> Clock:
    """Make a clock for a time limit, which begins now unless it `began` before."""
    if began is None:
        began = time.monotonic()

    # A rehearsal of a minute cannot spare five.
    reserve_seconds = min(RESERVE_SECONDS, limit_seconds * RESERVE_SHARE)
    return Clock(began, began + limit_seconds - reserve_seconds, reserve_seconds)


def is_hidden_run() -> bool:
    """Tell whether this is the run on the hidden test rows, which a submission starts."""
    return bool(os.environ.get("KAGGLE_IS_COMPETITION_RERUN"))


def log(clock: Clock, message: str) -> None:
    """Print one line of the kernel's log, with the seconds since the beginning."""
    print(f"[{clock.elapsed():8.1f} s] {message}", flush=True)


SETTINGS = Settings(
    name="demo",
    competition="wsdm-cup-multilingual-chatbot-arena",
    verdicts=("model_a", "model_b"),
    texts_are_turns=False,
    verdict_form="name",
    verdict_columns=("winner",),
    answer="winner",
    columns=("winner",),
    metric="accuracy",
    hidden_rows=(10000, 25000),
    packages=(
        PackageSettings(
            run="demo",
            dataset="pairwise-demo",
            weight=1.0,
            placement="each",
            verdicts=("model_a", "model_b"),
            weight_bytes_limit=None,
        ),
    ),
    orders=("as_given", "swapped"),
    time_limits=(TimeLimit(rows=None, seconds=600.0),),
    budget_tokens=None,
    tokens_per_batch=8192,
    temperature=1.0,
    min_scored=0.98,
    visible_rows=512,
    wheels="pairwise-wheels",
)


# ================================================================================================
# main.py
# The kernel from beginning to end: inputs, checks, scores, submission.
#
# Every check that needs no device comes before the first model is loaded. Written to /kaggle/working:
# submission.csv, scores.parquet, kernel.json.

TEST_FILES = ("test.parquet", "test.csv")
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission.

    The hidden run always submits: a row that could not be scored gets the prior. Only what shows
    that answers would be wrong ends it. In the visible run every shortfall is an error.
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
    """Find and check the spec's packages. In the hidden run one that fails is left out."""
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
    """Log what the visible run shows of the hidden run, and return it for kernel.json."""
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


# ================================================================================================
# scheduling/schedule.py
# From packages and rows to scores: one pass after another, each planned when the one before ended.
#
# main.run_kernel calls `score_all`. Models run one after the other, each on all devices. The first
# order of the first model goes over all rows and may use the whole clock: a row with one score is
# worth more than a second one. What comes then, the second order and further models, is decided by
# `plan_next_pass`, with what was measured so far: see plan.py. Rows that count on the current
# leaderboard go through all of this alone; the others get what time is left.

Scores = dict[str, dict[str, list[float]]]  # by id, then by order
Key = tuple[int, str]  # a package's number in the spec, and an order
PADDING_FACTOR = 1.03  # by which batches, padded, have more tokens than their rows
ENCODED_AT_ONCE = 1000


class LoadError(RuntimeError):
    """No device could load a package."""


@dataclass(frozen=True)
class Inputs:
    """What is to be scored, by which packages, on which devices (by position) and until when."""

    settings: Settings
    packages: Sequence[Package]
    contracts: Sequence  # the packages', with the spec's token budget
    rows: Sequence[Mapping]
    row_groups: Sequence[Sequence[str]]  # ids of the rows that count, then of the others
    devices: Mapping[int, str]
    threads: int  # of the CPU, for each worker
    clock: Clock


@dataclass
class Progress:
    """How far the run is, and the records of it for kernel.json."""

    scores: list[Scores]  # of each package
    packages: list[int]  # numbers of those that are not left out
    devices: dict[int, str]  # those of the inputs that are not gone
    tried: dict[Key, set[str]] = field(default_factory=dict)  # rows that need no further try
    passes: list[dict] = field(default_factory=list)


@dataclass
class Measurements:
    """What plans are made of."""

    tokens: dict[str, int] = field(default_factory=dict)  # of a row, as the first pass encoded it
    rates: dict[int, float] = field(default_factory=dict)  # tokens a second, by package


@dataclass(frozen=True)
class ScoringJob:
    """The kernel's job: what to score, how far that is, and what was measured on the way."""

    inputs: Inputs
    progress: Progress
    measured: Measurements

    def orders(self, number: int) -> tuple[str, ...]:
        """List the orders worth scoring with a package."""
        return orders_of(self.inputs.contracts[number], self.inputs.settings.orders)

    def probabilities(self) -> dict[str, list[float]]:
        """Combine what all packages have given so far, by id."""
        return combine(self.inputs.settings, self.inputs.packages, self.progress.scores)

    def model_columns(self) -> dict[str, dict[str, float]]:
        """Collect each model's own probabilities: RUN_p_VERDICT_ORDER, then by id."""
        columns: dict[str, dict[str, float]] = {}
        for number, package_settings in enumerate(self.inputs.settings.packages):
            verdicts = self.inputs.packages[number].contract.verdicts
            for row_id, by_order in self.progress.scores[number].items():
                for order, values in by_order.items():
                    for verdict, value in zip(verdicts, values, strict=True):
                        name = f"{package_settings.run}_p_{verdict}_{order}"
                        columns.setdefault(name, {})[row_id] = value
        return columns


@dataclass(frozen=True)
class NextPass:
    """A pass to be made now."""

    package: int  # its number in the spec
    order: str
    row_ids: frozenset[str]
    deadline: float  # as time.monotonic gives seconds


def make_job(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    devices: Sequence[str],
    clock: Clock,
) -> ScoringJob:
    """Make a job of which nothing is scored yet. The devices share the CPU's cores evenly."""
    # Rows that count on the leaderboard will be scored before the others.
    counting_ids = [row["id"] for row in rows if row["counts"]]
    other_ids = [row["id"] for row in rows if not row["counts"]]
    row_groups = [group for group in (counting_ids, other_ids) if group]

    # A spec may have another token budget than training.
    contracts = [package.contract for package in packages]
    if settings.budget_tokens is not None:
        budget_tokens = settings.budget_tokens
        contracts = [replace(contract, budget_tokens=budget_tokens) for contract in contracts]

    cores = len(os.sched_getaffinity(0))
    inputs = Inputs(
        settings=settings,
        packages=packages,
        contracts=contracts,
        rows=rows,
        row_groups=row_groups,
        devices=dict(enumerate(devices)),
        threads=max(cores // len(devices), 1),
        clock=clock,
    )
    progress = Progress(
        scores=[{row["id"]: {} for row in rows} for _ in packages],
        packages=list(range(len(packages))),
        devices=dict(inputs.devices),
    )
    return ScoringJob(inputs, progress, Measurements())


def score_all(job: ScoringJob) -> None:
    """Make pass after pass until nothing is left or nothing more fits the clock.

    In the hidden run a package that fails is left out while another one works.
    """
    loaded: int | None = None  # the number of the package that the workers have
    workers: list[Worker] = []
    try:
        while next_pass := plan_next_pass(job, loaded, workers):
            try:
                # Two models do not fit one GPU: the old one goes before the new one comes.
                if next_pass.package != loaded:
                    stop_workers(job, workers)
                    workers = load_package(job, next_pass.package)
                    loaded = next_pass.package
                score_pass(job, next_pass, workers)
            except (PackageError, LoadError) as error:
                stop_workers(job, workers)
                loaded = None
                leave_out(job, next_pass.package, error)
    finally:
        stop_workers(job, workers)


def leave_out(job: ScoringJob, number: int, error: Exception) -> None:
    """Leave out the package that failed with `error`, in the hidden run and while another one works; else raise it."""
    job.progress.packages.remove(number)
    another_works = bool(job.progress.packages or job.progress.passes)
    if not is_hidden_run() or not another_works:
        raise error
    log(job.inputs.clock, f"{job.inputs.packages[number].folder.name}: left out: {error}")


def plan_next_pass(
    job: ScoringJob, loaded: int | None, workers: Sequence[Worker]
) -> NextPass | None:
    """Plan the next pass: rows that count come first, the others get what time is left."""
    # Workers are gone for good once they died too often; no plan brings them back.
    all_gone = bool(workers) and all(worker.gone for worker in workers)
    if all_gone:
        log(job.inputs.clock, "no device is left; rows without a score get the prior")
    if all_gone or not job.progress.packages or job.inputs.clock.left() <= 0:
        return None

    packages = job.progress.packages
    for group in job.inputs.row_groups:
        # A group begins with one order of all its rows, by the loaded model or else the spec's
        # first. That measures the tokens of all rows, so that any row shows whether it was made.
        if group[0] not in job.measured.tokens:
            number = loaded if loaded in packages else packages[0]
            first_order = job.orders(number)[0]
            return NextPass(number, first_order, frozenset(group), job.inputs.clock.deadline)

        # The rows that do not count wait until nothing is left to do for those that do.
        next_pass = plan_further_pass(job, group, loaded)
        if next_pass is not None:
            return next_pass
    return None


def plan_further_pass(job: ScoringJob, group: Sequence[str], loaded: int | None) -> NextPass | None:
    """Plan all further passes over a group of rows, and return the one to begin with."""
    candidates = list_candidates(job, group, loaded)
    if not candidates:
        return None

    clock = job.inputs.clock
    metric = job.inputs.settings.metric
    plan = plan_passes(candidates, job.probabilities(), job.measured.tokens, clock.left(), metric)
    log_plan(job, plan)

    # Where a pass has no rows, there was no time for it.
    plan_with_rows = [planned for planned in plan if planned.row_ids]
    if not plan_with_rows:
        return None

    # The first pass must leave the time that is planned for the others.
    first, *later = plan_with_rows
    package = first.candidate.package
    deadline = clock.deadline - count_seconds(later, package)
    return NextPass(package, first.candidate.order, frozenset(first.row_ids), deadline)


def count_seconds(plan: Sequence[PlannedPass], loaded: int) -> float:
    """Count the seconds of planned passes. Each package but the loaded one is loaded once."""
    seconds = 0.0
    loaded_packages = {loaded}
    for planned in plan:
        seconds += planned.seconds
        if planned.candidate.package not in loaded_packages:
            loaded_packages.add(planned.candidate.package)
            seconds += planned.candidate.load_seconds
    return seconds


def list_candidates(
    job: ScoringJob, group: Sequence[str], loaded: int | None
) -> list[CandidatePass]:
    """List every pass that has rows of the group left to score, those of the loaded model first."""
    packages = sorted(job.progress.packages, key=lambda number: number != loaded)
    candidates = []
    for number in packages:
        rate = predict_rate(job, number)
        load_seconds = 0.0
        if number != loaded:
            is_split = job.inputs.settings.packages[number].placement == "split"
            copies = 1 if is_split else len(job.progress.devices)
            load_seconds = loading_seconds(job.inputs.packages[number], copies)

        # An order of which every row was tried needs no further pass.
        for order in job.orders(number):
            tried = job.progress.tried.get((number, order), set())
            unscored = [row_id for row_id in group if row_id not in tried]
            if unscored:
                candidate = CandidatePass(
                    package=number,
                    order=order,
                    change=predict_change(job, number),
                    seconds_per_token=PADDING_FACTOR / rate if rate else 0.0,
                    load_seconds=load_seconds,
                    unscored=unscored,
                )
                candidates.append(candidate)
    return candidates


def predict_change(job: ScoringJob, number: int) -> float:
    """Predict how much another score by a package changes a probability (standard deviation)."""
    packages = job.inputs.settings.packages
    total_weight = sum(packages[other].weight for other in job.progress.packages)
    relative_weight = packages[number].weight / total_weight

    # The second order of a model says less than the first score of a model.
    has_scored = any(job.progress.tried.get((number, order)) for order in job.orders(number))
    if has_scored:
        return CHANGE_OF_ORDER * relative_weight
    return CHANGE_OF_MODEL * 2 * relative_weight  # measured with two models of equal weight


def predict_rate(job: ScoringJob, number: int) -> float:
    """Predict how many tokens of a package all devices score in a second; 0 before any pass was measured."""
    rates = job.measured.rates
    if not rates:
        return 0.0
    if number in rates:
        return rates[number]

    # The devices do as many operations a second as for a package that has run, but a token takes
    # more of them, or fewer.
    packages = job.inputs.packages
    measured_number, *_others = rates
    operations_per_second = rates[measured_number] * flop_per_token(packages[measured_number])
    return operations_per_second / flop_per_token(packages[number])


def log_plan(job: ScoringJob, plan: Sequence[PlannedPass]) -> None:
    """Log what a plan does with the seconds that are left."""
    parts = []
    for planned in plan:
        candidate = planned.candidate
        name = f"{job.inputs.packages[candidate.package].folder.name} {candidate.order}"
        rows = f"{len(planned.row_ids)} of {len(candidate.unscored)} rows"
        parts.append(f"{name} {rows} in {planned.seconds:.1f} s")
    clock = job.inputs.clock
    log(clock, f"plan: {clock.left():.1f} s left: {'; '.join(parts)}")


def load_package(job: ScoringJob, number: int) -> list[Worker]:
    """Start workers on the devices that still work, which load a package."""
    inputs, devices = job.inputs, job.progress.devices
    package, settings = inputs.packages[number], inputs.settings
    package_settings = settings.packages[number]

    # The layers of a split model were placed for all of the devices.
    is_incomplete = package_settings.placement == "split" and len(devices) < len(inputs.devices)
    if not devices or is_incomplete:
        raise LoadError(f"{package.folder}: no device is left for it")
    return start_workers(
        package, package_settings, devices, settings.tokens_per_batch, inputs.threads, inputs.clock
    )


def stop_workers(job: ScoringJob, workers: list[Worker]) -> None:
    """Stop the workers and empty the list. A device that has failed for good leaves the job."""
    # Where no worker could load the package, that is the package's fault and the devices stay.
    any_has_loaded = any(worker.load_seconds for worker in workers)
    for worker in workers:
        worker.stop()
        if worker.gone and any_has_loaded:
            for position in worker.positions:
                job.progress.devices.pop(position, None)
    workers.clear()


def score_pass(job: ScoringJob, next_pass: NextPass, workers: Sequence[Worker]) -> None:
    """Score the rows of a pass, and note the result."""
    number, order = next_pass.package, next_pass.order
    package, clock = job.inputs.packages[number], job.inputs.clock
    label = f"{package.folder.name}, {order}"

    # The rows of the first pass are encoded here while the workers load.
    requests = encode_rows(job.inputs, next_pass)
    tokens = sum(request.tokens for request in requests)
    log(clock, f"{label}: {len(requests)} rows encoded, {tokens} tokens")

    work = make_pass(label, requests, next_pass.deadline, workers)
    work = run_pass(work, workers, clock)
    if all(worker.gone and not worker.load_seconds for worker in workers):
        raise LoadError(f"{package.folder}: no device could load it")
    record_pass(job, (number, order), work, requests, workers)


def encode_rows(inputs: Inputs, next_pass: NextPass) -> list[Request]:
    """Encode the rows of a pass to token ids, by the package's own model_input.py."""
    package = inputs.packages[next_pass.package]
    pairs = []
    for row in inputs.rows:
        if row["id"] in next_pass.row_ids:
            pairs.append(package.model_input.pair_from_row(row))

    encoded: list[Request] = []
    for start in range(0, len(pairs), ENCODED_AT_ONCE):
        requests = make_requests(
            package.model_input,
            package.tokenizer,
            inputs.contracts[next_pass.package],
            pairs[start : start + ENCODED_AT_ONCE],
            (next_pass.order,),
            PADDING_LIMITS.get(package.manifest["quantize"], DEFAULT_PADDING_LIMIT),
        )

        # Four bytes for each token id, since there are millions of them.
        for request in requests:
            sequences = tuple(array("i", ids) for ids in request.sequences)
            encoded.append(replace(request, sequences=sequences))
    return encoded


def record_pass(
    job: ScoringJob, key: Key, work: Pass, requests: Sequence[Request], workers: Sequence[Worker]
) -> None:
    """Note what a finished pass gave: its scores, the rows that it tried, what it measured."""
    number, order = key
    progress = job.progress
    for row_id, probabilities in work.scores.items():
        progress.scores[number][row_id][order] = probabilities

    progress.tried.setdefault(key, set()).update(list_tried_rows(work, requests, workers))

    # A row that ended its workers in one order would do so in the other: it is tried in none again.
    for any_order in job.orders(number):
        progress.tried.setdefault((number, any_order), set()).update(work.given_up)

    # What later plans need: the rows' lengths, and the speed of the workers that still live.
    for request in requests:
        job.measured.tokens.setdefault(request.id, request.tokens)
    rate = sum(worker.rate() for worker in workers if not worker.gone)
    if rate:
        job.measured.rates[number] = rate

    # kernel.json keeps a record of every pass.
    run = job.inputs.settings.packages[number].run
    progress.passes.append({"run": run, "order": order, **pass_record(work)})


def list_tried_rows(work: Pass, requests: Sequence[Request], workers: Sequence[Worker]) -> set[str]:
    """List the rows of a finished pass that no later pass should try: all but those that are still in its queue."""
    tried_ids = {request.id for request in requests}

    # Workers that live and scored nothing would not do better another time, and the kernel would try
    # for ever: then no row is left for later.
    can_be_repeated = work.scores or all(worker.gone for worker in workers)
    if can_be_repeated:
        for batch in work.queue:
            tried_ids.difference_update(request.id for request in batch)
    return tried_ids


def combine(
    settings: Settings, packages: Sequence[Package], scores: Iterable[Scores]
) -> dict[str, list[float]]:
    """Combine the packages' scores to probabilities of the competition's verdicts, by id.

    Orders are averaged, then packages by weight, then the temperature is applied. `packages` and
    `scores` are in the order of the settings.
    """
    # For each row, a list of probabilities from every package that scored it, and these packages' weights.
    opinions: dict[str, list[list[float]]] = {}
    weights: dict[str, list[float]] = {}
    for package_settings, package, package_scores in zip(
        settings.packages, packages, scores, strict=True
    ):
        for row_id, values in mean_of_orders(package_scores).items():
            opinion = to_competition(values, package.contract.verdicts, settings.verdicts)
            opinions.setdefault(row_id, []).append(opinion)
            weights.setdefault(row_id, []).append(package_settings.weight)

    combined = {}
    for row_id, values in opinions.items():
        mean = weighted_mean(values, weights[row_id])
        combined[row_id] = soften(mean, settings.temperature)
    return combined


# ================================================================================================
# scheduling/pass_runner.py
# One order of one package: batches dealt to workers until none is left or the deadline is near.
#
# schedule.score_pass calls `make_pass` and `run_pass`. What can happen to a batch on its way:
#     out of memory      its worker's token budget is halved, and the batch cut and tried again; a
#                        row that was alone is tried again at the end (`try_alone`)
#     its worker dies    the worker is started again, or given up with its device; its rows go back to
#                        the queue, those that it was scoring one by one at the end, in case that one
#                        of them killed it (`handle_worker_death`)
#     its worker hangs   the worker is killed, which is a death like others (`kill_if_silent`)
#     the clock ends     the batch stays in the queue (`next_batch`)
# A row without a score is simply not in the result, and the caller decides what that means.

GIVEN_UP_AFTER = 3  # tries of a row that ended its worker, or its memory
QUIET_SECONDS = 300.0  # many times what a batch takes on a T4: then a worker hangs
LOAD_PATIENCE_SECONDS = 1800.0
LOGGED_SHARE = 0.05  # of a pass's rows: progress is logged whenever so many more are scored


@dataclass
class Pass:
    """One order of one package over some rows: its queue of batches, its scores, its progress."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    rows: int
    all_tokens: int = field(init=False)  # of the queue at the beginning, padding included
    began: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    computed_tokens: int = 0  # padding included
    overflowed: int = 0  # rows that were computed again in float32
    not_finite: int = 0
    failed_tries: Counter = field(default_factory=Counter)  # by row
    given_up: list[str] = field(default_factory=list)
    logged_rows: int = 0

    def __post_init__(self):
        self.all_tokens = sum(padded_tokens(batch) for batch in self.queue)

    def seconds_left(self, workers: Sequence[Worker]) -> float:
        """Predict how long the living workers need for the rest; 0 before their first batch."""
        rate = sum(worker.rate() for worker in workers if not worker.gone)
        if not rate:
            return 0.0
        return (self.all_tokens - self.computed_tokens) / rate

    def seconds(self) -> float:
        """Return the seconds since its first batch was sent: loading a model does not count."""
        if self.began is None:
            return 1e-9
        return max(time.monotonic() - self.began, 1e-9)


def make_pass(
    label: str, requests: Sequence[Request], deadline: float, workers: Sequence[Worker]
) -> Pass:
    """Make a pass over rows, whose batches fit the token budget of the most capable worker."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    batches = make_batches(requests, tokens_per_batch)
    return Pass(label, deque(batches), deadline, rows=len(requests))


def run_pass(work: Pass, workers: Sequence[Worker], clock: Clock) -> Pass:
    """Have the workers score the batches in the queue until it is empty or the deadline is near."""
    batches = "1 batch" if len(work.queue) == 1 else f"{len(work.queue)} batches"
    log(clock, f"{work.label}: {work.rows} rows in {batches}")

    # A worker that died late in the pass before may not have been restarted.
    for worker in workers:
        if not worker.process and not worker.gone and time.monotonic() < work.deadline:
            worker.launch()

    while True:
        for worker in workers:
            feed(work, worker, workers)
        busy = list_busy(work, workers)
        if not busy:
            break

        # Wait for any message, but look after the workers every second.
        by_connection = {worker.connection: worker for worker in workers if worker.process}
        for connection in wait(list(by_connection), timeout=1.0):
            receive(work, by_connection[connection], workers, clock)
        for worker in busy:
            kill_if_silent(work, worker, clock)
        log_progress(work, workers, clock)

    log(clock, f"{work.label}: {progress_line(work, workers)}")
    return work


def list_busy(work: Pass, workers: Sequence[Worker]) -> list[Worker]:
    """List the workers that the pass must wait for: those that have a batch, or still load and could get one."""
    # A worker that still loads is needed while there is a batch that it could score in time.
    has_work_left = bool(work.queue) and time.monotonic() < work.deadline
    busy = []
    for worker in workers:
        is_needed = has_work_left and not worker.loaded
        if worker.process and (worker.outstanding or is_needed):
            busy.append(worker)
    return busy


def feed(work: Pass, worker: Worker, workers: Sequence[Worker]) -> None:
    """Give a worker the batches that it can score at once, and one more, so that it never waits for the next."""
    while worker.loaded and len(worker.outstanding) <= worker.batches_at_once:
        batch = next_batch(work, worker, workers)
        if batch is None:
            return

        # Loading is over: the pass's speed counts from here.
        if work.began is None:
            work.began = time.monotonic()
        worker.send(batch)


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """Take the next batch for a worker from the queue."""
    seconds_left = work.deadline - time.monotonic()
    if not work.queue or seconds_left <= 0:
        return None

    # The longest rows stand first. Where the time is not enough for all rows, the shortest are
    # taken first: more rows get a score.
    is_time_short = work.seconds_left(workers) > seconds_left
    whole_batch = work.queue.pop() if is_time_short else work.queue.popleft()

    # The worker's token budget may have shrunk since the batch was made.
    parts = make_batches(whole_batch, worker.tokens_per_batch)
    batch = None
    if worker.seconds_until_scored(parts[0]) <= seconds_left:
        batch = parts.pop(0)

    # The other parts go back to where the batch was.
    if is_time_short:
        work.queue.extend(parts)
    else:
        work.queue.extendleft(reversed(parts))
    return batch


def receive(work: Pass, worker: Worker, workers: Sequence[Worker], clock: Clock) -> None:
    """Handle the next message of a worker, or its death. worker.py lists the messages."""
    try:
        message = worker.connection.recv()
    except (EOFError, OSError):
        # The pipe closes before the exit code is there.
        worker.process.join(timeout=5)
        exit_code = worker.process.exitcode
        handle_worker_death(work, worker, f"died (exit code {exit_code})", clock)
        return

    match message:
        case ("loaded", facts):
            worker.note_loaded(facts)
            log(
                clock,
                f"{worker.name}: loaded in {facts['seconds']:.0f} s in {facts['dtype']}; "
                f"golden probabilities differ by at most {facts['worst']:.1e}",
            )
        case ("scored", number, scores):
            batch = worker.note_scored(number)
            note_scores(work, batch, scores)
        case ("out of memory", number):
            batch = worker.note_out_of_memory(number)
            log(
                clock, f"{worker.name}: out of memory: {worker.tokens_per_batch} tokens a batch now"
            )
            # The token budget is smaller now, so that next_batch will cut the batch in parts.
            if len(batch) > 1:
                work.queue.appendleft(batch)
            else:
                try_alone(work, batch, clock)
        case ("refused", reason):
            # One device alone may be faulty. Where all others are gone, it is the package.
            if all(other.gone for other in workers if other is not worker):
                raise PackageError(reason)
            reason = f"refuses the package, which another device may not: {reason}"
            handle_worker_death(work, worker, reason, clock)
        case ("failed", traceback):
            handle_worker_death(work, worker, f"failed: {traceback.strip()}", clock)


def try_alone(work: Pass, batch: list[Request], clock: Clock) -> None:
    """Put rows that failed at the end of the queue, each alone; give up those that failed often."""
    for request in batch:
        work.failed_tries[request.id] += 1
        if work.failed_tries[request.id] < GIVEN_UP_AFTER:
            work.queue.append([request])
        else:
            work.given_up.append(request.id)
            log(clock, f"row {request.id} is given up")


def handle_worker_death(work: Pass, worker: Worker, reason: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and restart it or give its device up."""
    log(clock, f"{worker.name}: {reason}")

    # Any of the rows that it was scoring may have killed it, so that each is tried alone. Batches
    # that lay ready in its pipe go back to where they came from.
    being_scored, ready = worker.note_death()
    work.queue.extendleft(reversed(ready))
    for batch in being_scored:
        try_alone(work, batch, clock)

    # A process that could not load before the deadline is not started.
    if worker.gone:
        outcome = f"gone after {worker.deaths_without_score} deaths without a score in between"
    elif work.deadline - time.monotonic() <= worker.load_seconds:
        outcome = "not started again, the clock has no time to load it"
    else:
        worker.launch()
        outcome = f"started again, {worker.tokens_per_batch} tokens a batch"
    log(clock, f"{worker.name}: {outcome}")


def kill_if_silent(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that hangs, or whose batch is not done when the submission must be written."""
    if not worker.process:
        return

    # After the deadline there is a reserve for writing. A third of it may pass.
    now = time.monotonic()
    is_too_late = now > clock.deadline + clock.reserve_seconds / 3
    if worker.outstanding and is_too_late:
        allowed_seconds = 0.0
    elif worker.loaded:
        allowed_seconds = QUIET_SECONDS
    else:
        allowed_seconds = LOAD_PATIENCE_SECONDS

    quiet_seconds = now - worker.last_event
    if quiet_seconds > allowed_seconds:
        reason = f"killed: it said nothing for {quiet_seconds:.0f} s"
        handle_worker_death(work, worker, reason, clock)


def note_scores(work: Pass, batch: list[Request], scores: BatchScores) -> None:
    """Keep a batch's probabilities by id, and count its tokens, overflows and rows without a score."""
    work.computed_tokens += padded_tokens(batch)
    work.tokens += sum(request.tokens for request in batch)
    work.overflowed += scores.overflowed
    for request, probabilities in zip(batch, scores.probabilities, strict=True):
        if all(math.isfinite(probability) for probability in probabilities):
            work.scores[request.id] = probabilities
        else:
            work.not_finite += 1


def log_progress(work: Pass, workers: Sequence[Worker], clock: Clock) -> None:
    """Log the progress whenever LOGGED_SHARE more of the rows is scored."""
    if len(work.scores) - work.logged_rows >= LOGGED_SHARE * work.rows:
        work.logged_rows = len(work.scores)
        log(clock, f"{work.label}: {progress_line(work, workers)}")


def progress_line(work: Pass, workers: Sequence[Worker]) -> str:
    """Describe rows done, speed, time to go and overflows, for the log."""
    seconds = work.seconds()
    parts = [
        f"{len(work.scores)} of {work.rows} rows",
        f"{len(work.scores) / seconds:.1f} rows/s",
        f"{work.tokens / seconds:.0f} tokens/s",
    ]
    if work.queue:
        parts.append(f"{work.seconds_left(workers):.0f} s to go")
    if work.overflowed:
        parts.append(
            f"{work.overflowed} rows overflowed float16 and were computed again in float32, "
            f"{work.not_finite} of them in vain"
        )
    return ", ".join(parts)


def pass_record(work: Pass) -> dict:
    """Describe a finished pass for kernel.json."""
    return {
        "pass": work.label,
        "rows": work.rows,
        "scored": len(work.scores),
        "seconds": round(work.seconds(), 2),
        "tokens": work.tokens,
        "computed_tokens": work.computed_tokens,
        "overflowed": work.overflowed,
        "not_finite": work.not_finite,
        "given_up": work.given_up,
    }


# ================================================================================================
# scheduling/worker_handle.py
# The workers as the kernel's own process sees them: started, given batches, killed, restarted.
#
# A worker that dies is started again with half its token budget, which stays halved. One that dies
# often without a scored batch in between is given up: its device is gone, and the others go on
# without it. pass_runner.handle_worker_death decides what becomes of its rows.

MOST_DEATHS_WITHOUT_SCORE = 3
JOIN_SECONDS = 30.0  # a killed process may be stuck in a driver


@dataclass
class Worker:
    """One process and its history. Tokens are counted with their padding."""

    name: str  # for the log
    task: Assignment
    tokens_per_batch: int
    start: Callable[[Assignment], tuple]  # gives the process and the pipe to it
    positions: tuple[int, ...] = ()  # of its devices

    # The process.
    process: object = None
    connection: object = None
    loaded: dict | None = None  # what the worker said of its model
    gone: bool = False
    batches_sent: int = 0
    outstanding: dict[int, list[Request]] = field(default_factory=dict)  # by number, as sent
    last_event: float = 0.0  # began to load, got its first batch, or gave one back

    # The history, over all of its processes.
    tokens: int = 0
    seconds: float = 0.0  # in which it had work
    load_seconds: float = 0.0
    deaths_without_score: int = 0  # since the last scored batch

    @property
    def batches_at_once(self) -> int:
        """How many batches it scores at the same time: one for each stage of a split model."""
        return self.loaded["batches_at_once"] if self.loaded else 1

    def rate(self) -> float:
        """Return tokens a second, from what it has done; 0 before its first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def seconds_until_scored(self, batch: list[Request]) -> float:
        """Predict when a batch would be scored, after those that it has; 0 before its first one."""
        if not self.rate():
            return 0.0
        tokens = padded_tokens(batch)
        for outstanding_batch in self.outstanding.values():
            tokens += padded_tokens(outstanding_batch)
        return tokens / self.rate()

    def launch(self) -> None:
        """Start the process, which loads the model."""
        self.loaded = None
        self.last_event = time.monotonic()
        self.process, self.connection = self.start(self.task)

    def send(self, batch: list[Request]) -> None:
        """Send it a batch. If it has died meanwhile, pass_runner.receive will notice."""
        # The time in which it had nothing to do counts neither as work nor as silence.
        if not self.outstanding:
            self.last_event = time.monotonic()
        self.batches_sent += 1
        self.outstanding[self.batches_sent] = batch
        with contextlib.suppress(OSError):
            self.connection.send((self.batches_sent, batch))

    def note_loaded(self, facts: dict) -> None:
        """Note what it said of its model; from now on it can be given batches."""
        self.loaded = facts
        self.load_seconds = facts["seconds"]
        self.last_event = time.monotonic()

    def note_scored(self, number: int) -> list[Request]:
        """Count a batch that was scored, and return it."""
        batch = self.outstanding.pop(number)
        now = time.monotonic()
        self.tokens += padded_tokens(batch)
        self.seconds += now - self.last_event
        self.last_event = now
        self.deaths_without_score = 0
        return batch

    def note_out_of_memory(self, number: int) -> list[Request]:
        """Lower the token budget to half the tokens of a batch that was too large, and return the batch."""
        batch = self.outstanding.pop(number)
        self.last_event = time.monotonic()

        self.tokens_per_batch = max(min(self.tokens_per_batch, padded_tokens(batch) // 2), 1)
        return batch

    def note_death(self) -> tuple[list[list[Request]], list[list[Request]]]:
        """Count a death; return the batches that it was scoring, and those that lay ready."""
        # Batches are scored in the order in which they were sent.
        batches = list(self.outstanding.values())
        being_scored = batches[: self.batches_at_once]
        ready = batches[self.batches_at_once :]
        self.outstanding.clear()
        self.stop()

        # It may have died of a lack of memory that was never reported.
        self.tokens_per_batch = max(self.tokens_per_batch // 2, 1)

        # Where it scored single rows only, one of them may kill workers, and will be given up soon.
        # Such a death does not count against the worker.
        had_single_rows = bool(being_scored) and all(len(batch) == 1 for batch in being_scored)
        if not had_single_rows:
            self.deaths_without_score += 1
        self.gone = self.deaths_without_score >= MOST_DEATHS_WITHOUT_SCORE
        return being_scored, ready

    def stop(self) -> None:
        """End the process, whatever it is doing; its device is free afterwards."""
        if self.process:
            self.connection.close()
            self.process.kill()
            self.process.join(JOIN_SECONDS)
        self.process = None
        self.loaded = None


def start_process(task: Assignment) -> tuple:
    """Start a process for a task; return it and the pipe to it."""
    # CUDA does not survive a fork.
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=run_worker, args=(theirs, task), daemon=True)
    process.start()

    # With the process's own end alone open, its death closes the pipe.
    theirs.close()
    return process, ours


def start_workers(
    package: Package,
    package_settings: PackageSettings,
    devices: Mapping[int, str],
    tokens_per_batch: int,
    threads: int,
    clock: Clock,
) -> list[Worker]:
    """Start the workers of a package, which load it by themselves."""
    # The positions of each worker's devices.
    position_groups = [(position,) for position in devices]
    if package_settings.placement == "split":
        position_groups = [tuple(devices)]

    workers = []
    for positions in position_groups:
        device_names = tuple(devices[position] for position in positions)
        task = Assignment(
            str(package.folder),
            device_names,
            positions[0],
            threads,
            package_settings.weight_bytes_limit,
        )
        # Two workers may stand on one CPU.
        name = f"worker {positions[0]} on {'+'.join(device_names)}"
        worker = Worker(name, task, tokens_per_batch, start_process, positions)
        worker.launch()
        workers.append(worker)

    names = ", ".join(worker.name for worker in workers)
    log(clock, f"{package.folder.name}: loading in {names}")
    return workers


def leave() -> None:
    """End this process at once where a worker's is stuck: it would be waited for for ever."""
    if multiprocessing.active_children():
        sys.stdout.flush()
        os._exit(0)


# ================================================================================================
# scheduling/worker.py
# A process for each device: it loads a model, then scores the batches that come through its pipe.
#
# A model that one device cannot hold has one process with several devices, its layers over all of
# them, and a thread for each. A process, because a CUDA error takes a whole process with it, and
# because two threads share one Python. What the kernel's own process does when one dies:
# pass_runner.handle_worker_death.
#
# To the worker: (number, requests). From it:
#     ("loaded", facts)                         dtype, batches_at_once, seconds, worst difference
#     ("scored", number, BatchScores)
#     ("out of memory", number)                 it lives on; the batch is to be cut
#     ("refused", sentence)                     the package is not what was packaged
#     ("failed", traceback)                     and its end

# float16 and 4-bit kernels differ between devices by up to 0.02; a wrong head by far more.
GOLDEN_TOLERANCE = 0.05
MEMORY_WORDS = (
    "CUDA error: out of memory",
    "_ALLOC_FAILED",
    "DefaultCPUAllocator: can't allocate memory",
)


@dataclass(frozen=True)
class Assignment:
    """What a worker is to load, and where."""

    folder: str  # of the package
    devices: tuple[str, ...]  # several: the model's layers over them
    position: int  # of the first device
    threads: int  # of the CPU
    weight_bytes_limit: int | None = None  # of each device, for a model that is split


def run_worker(connection, task: Assignment) -> None:
    """Run the process until the pipe closes; leave at once then, whatever its threads are at."""
    with contextlib.suppress(OSError):
        name = f"worker {task.position}"  # as top and ps show it
        Path("/proc/self/comm").write_text(name, encoding="utf-8")

    # Several workers write to one log, where progress bars would run into each other.
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(task.threads)
    work(connection, task)
    os._exit(0)


def work(connection, task: Assignment) -> None:
    """Load a package's model, then score the batches that come until the pipe is closed."""
    began = time.monotonic()
    first_device = task.devices[0]
    try:
        # Libraries that name no device would take memory of the first GPU.
        if first_device.startswith("cuda"):
            torch.cuda.set_device(first_device)
        package = open_package(Path(task.folder))
        model, stages = load_on(package, task.devices, task.weight_bytes_limit)
        worst_difference = check_golden_scores(package, model, first_device)
    except (PackageError, FloatingPointError) as error:
        return send_message(connection, "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return send_message(connection, "failed", traceback.format_exc())

    # Each stage of a split model works on a batch of its own.
    batches_at_once = len(stages.locks) if stages else 1
    facts = {
        "dtype": str(model.dtype),
        "batches_at_once": batches_at_once,
        "worst": worst_difference,
        "seconds": time.monotonic() - began,
    }
    send_message(connection, "loaded", facts)

    def score_requests(requests: list[Request]) -> BatchScores:
        pass_context = stages.forward_pass if stages else contextlib.nullcontext
        # Each thread has a current device of its own.
        if first_device.startswith("cuda"):
            torch.cuda.set_device(first_device)
        return score_batch(
            model, package.model_input, package.contract, requests, first_device, pass_context
        )

    serve(connection, score_requests, batches_at_once)


def load_on(
    package: Package, devices: tuple[str, ...], weight_bytes_limit: int | None = None
) -> tuple[torch.nn.Module, Stages | None]:
    """Load a package's model on its device, or split over several of them."""
    if len(devices) == 1:
        return load_model(package.folder, package.contract, devices[0]), None

    # The first device gets the inputs, and each a stretch of the layers.
    device_map = split_over(package.folder, devices, weight_bytes_limit)
    model = load_model(package.folder, package.contract, devices[0], device_map=device_map)
    return model, Stages(model, stage_starts(device_map), devices)


def check_golden_scores(package: Package, model: torch.nn.Module, device: str) -> float:
    """Score the golden rows, twenty awkward pairs, and compare with the probabilities that packaging wrote down."""
    contract = package.contract

    # By the same code as any other row.
    pairs = [package.model_input.pair_from_row(row["pair"]) for row in contract.golden]
    scores = score(
        model,
        package.model_input,
        package.tokenizer,
        contract,
        pairs,
        orders=("as_given",),
        tokens_per_batch=contract.budget_tokens,
        device=device,
    )

    # The largest difference is logged even where it is within the tolerance.
    worst_difference = 0.0
    for golden in package.manifest["golden"]:
        values = scores[golden["id"]]["as_given"]
        for value, expected in zip(values, golden["probabilities"], strict=True):
            worst_difference = max(worst_difference, abs(value - expected))
        if worst_difference > GOLDEN_TOLERANCE:
            raise PackageError(
                f"{package.folder}: golden row {golden['id']} scores {values} on {device}, the "
                f"package recorded {golden['probabilities']}; weights, head, pad id or attention "
                "are not those that were packaged"
            )
    return worst_difference


def serve(connection, score_requests: Callable, batches_at_once: int) -> None:
    """Score the batches that come through the pipe until it is closed, or until something fails.

    `batches_at_once` of them are scored at the same time, each in a thread of its own.
    """
    receiving = threading.Lock()
    sending = threading.Lock()
    arguments = (connection, receiving, sending, score_requests)

    threads = []
    for _ in range(batches_at_once):
        thread = threading.Thread(target=score_until_closed, args=arguments, daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()


def score_until_closed(
    connection, receiving: threading.Lock, sending: threading.Lock, score_requests: Callable
) -> None:
    """Receive a batch, score it and send the answer, until the pipe is closed or a batch fails.

    The locks let one thread at a time read from the pipe, and one write to it.
    """
    while True:
        try:
            with receiving:
                number, requests = connection.recv()
        except (EOFError, OSError):
            return

        kind, *content = answer_batch(number, requests, score_requests)
        with sending:
            send_message(connection, kind, *content)

        # A CUDA error stays with its process. The kernel's own process will start a new one.
        if kind == "failed":
            return


def answer_batch(number: int, requests: list[Request], score_requests) -> tuple:
    """Score a batch; return the message to the kernel's own process."""
    try:
        return ("scored", number, score_requests(requests))
    except Exception as error:
        if not lacks_memory(error, len(requests)):
            return ("failed", traceback.format_exc())
    free_memory()
    return ("out of memory", number)


def lacks_memory(error: Exception, rows: int) -> bool:
    """Tell whether an error means that a batch of so many rows was too large for memory."""
    # PyTorch has a class for that.
    if isinstance(error, torch.OutOfMemoryError):
        return True

    # Other libraries raise MemoryError, or say so only in words. That counts for a batch of several
    # rows, which can be cut. One row cannot, and a new process may have more memory for it.
    has_words = any(words in str(error) for words in MEMORY_WORDS)
    return rows > 1 and (has_words or isinstance(error, MemoryError))


def send_message(connection, *message) -> None:
    """Send a message, unless nobody listens any more."""
    with contextlib.suppress(OSError):
        connection.send(message)


def free_memory() -> None:
    """Give the memory of a batch that failed back to its device."""
    gc.collect()
    if torch.cuda.is_initialized():
        # A broken device raises its error again; the next batch then ends the worker.
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()


# ================================================================================================
# scheduling/plan.py
# Shares out the seconds that are left: which rows get the second order, and which a further model.
#
# schedule.plan_next_pass decides with it, after every pass, which pass comes next. A candidate is one
# more pass of a package in an order. It changes a probability by some amount, of standard deviation
# s. Its expected gain is that of the knowledge gradient (Frazier, Powell and Dayanik 2008):
# 2 (s φ(m/s) − m Φ(−m/s)), with m half the lead of the first verdict over the second. A row near the
# line between two verdicts gains most, one far from it nothing. For log loss it is s² (1 − Σp²), for
# the Brier score s² Σ p² (1 − 2p + Σp²), by the independent changes of a row's logits.
#
# Rows are taken by their gain per second until the seconds are used. Which further models are worth
# their loading is tried out.

# An assumption without a published source. A kernel's log says how long its loading took.
LOAD_BYTES_PER_SECOND = 3e8

# The change of a probability (sd) by a second order or model.
CHANGE_OF_ORDER = 0.06
CHANGE_OF_MODEL = 0.1

# Of a row while no speed is measured: gains are divided by it.
SHORTEST_SECONDS = 1e-9


@dataclass(frozen=True)
class CandidatePass:
    """A pass that could come next: a package scores rows in one order of their responses."""

    package: int  # its number in the spec
    order: str
    change: float  # standard deviation of what it changes in a probability
    seconds_per_token: float
    load_seconds: float = 0.0  # 0 where its model is loaded
    unscored: Sequence[str] = ()  # ids of the rows that it would score


@dataclass(frozen=True)
class CandidateRow:
    """One row of a candidate pass."""

    pass_place: int  # of the pass in the list of candidates
    row_id: str
    gain: float
    seconds: float


@dataclass
class PlannedPass:
    """A candidate pass with those of its rows that the time is enough for; perhaps none."""

    candidate: CandidatePass
    row_ids: list[str] = field(default_factory=list)
    seconds: float = 0.0  # for these rows, without loading


def plan_passes(
    candidates: Sequence[CandidatePass],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    metric: str,
) -> list[PlannedPass]:
    """Plan what the seconds that are left are spent on: the rows of most expected gain per second."""
    rows = rank_rows(candidates, probabilities, tokens, metric)
    packages = list(dict.fromkeys(candidate.package for candidate in candidates))

    # A further model must be worth its loading. Plans with the first package alone, with the first
    # two, and so on are compared.
    best_gain = -1.0
    best_plan: list[PlannedPass] = []
    for count in range(1, len(packages) + 1):
        gain, plan = fill_seconds(packages[:count], candidates, rows, seconds)
        if gain > best_gain:
            best_gain, best_plan = gain, plan
    return best_plan


def rank_rows(
    candidates: Sequence[CandidatePass],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    metric: str,
) -> list[CandidateRow]:
    """Sort the rows of all candidates by their expected gain per second (see `plan_passes`)."""
    rows = []
    for place, candidate in enumerate(candidates):
        for row_id in candidate.unscored:
            gain = expected_gain(probabilities.get(row_id), candidate.change, metric)
            seconds = max(tokens[row_id] * candidate.seconds_per_token, SHORTEST_SECONDS)
            rows.append(CandidateRow(place, row_id, gain, seconds))
    return sorted(rows, key=lambda row: row.gain / row.seconds, reverse=True)


def fill_seconds(
    packages: Collection[int],
    candidates: Sequence[CandidatePass],
    ranked_rows: Sequence[CandidateRow],
    seconds: float,
) -> tuple[float, list[PlannedPass]]:
    """Fill the time with the best rows of some packages, whose loading is counted first."""
    # A package may have several candidates, but is loaded once.
    load_seconds = {}
    for candidate in candidates:
        if candidate.package in packages:
            load_seconds[candidate.package] = candidate.load_seconds
    seconds_left = seconds - sum(load_seconds.values())

    total_gain = 0.0
    plan = [PlannedPass(candidate) for candidate in candidates]
    for row in ranked_rows:
        planned = plan[row.pass_place]
        is_wanted = planned.candidate.package in packages

        # A row that is too long for what is left is skipped: shorter ones behind it may fit.
        if is_wanted and row.seconds <= seconds_left:
            seconds_left -= row.seconds
            total_gain += row.gain
            planned.row_ids.append(row.row_id)
            planned.seconds += row.seconds
    return total_gain, plan


def expected_gain(probabilities: Sequence[float] | None, change: float, metric: str) -> float:
    """Compute what another score of a row is expected to gain (the module says by which formula)."""
    # A first score is worth more than any further one.
    if probabilities is None:
        return 1.0

    # The expected drop of log loss or of the Brier score, to second order.
    sum_of_squares = sum(probability**2 for probability in probabilities)
    if metric == "log_loss":
        return change**2 * (1 - sum_of_squares)
    if metric == "brier_score":
        terms = [p**2 * (1 - 2 * p + sum_of_squares) for p in probabilities]
        return change**2 * sum(terms)

    # The verdict flips where the change exceeds half of the first verdict's lead over the second.
    second, first = sorted(probabilities)[-2:]
    margin = (first - second) / 2
    ratio = margin / change
    density = NormalDist().pdf(ratio)
    tail = math.erfc(ratio / math.sqrt(2)) / 2  # NormalDist.cdf is not exact so far out
    return 2 * (change * density - margin * tail)


def flop_per_token(package: Package) -> float:
    """Count the floating-point operations of a token: two for each parameter of its products."""
    sizes = weight_sizes(package.folder)
    multiplied_elements = 0
    for name, (_, elements) in sizes.items():
        if is_multiplied(name):
            multiplied_elements += elements
    return 2.0 * multiplied_elements


def loading_seconds(package: Package, copies: int) -> float:
    """Predict how long loading copies of a package takes: all devices load from the same disk."""
    weight_bytes = sum(size for size, _ in weight_sizes(package.folder).values())
    return copies * weight_bytes / LOAD_BYTES_PER_SECOND


def is_multiplied(name: str) -> bool:
    """Tell by its name whether a tensor is a matrix that every token is multiplied with.

    Embeddings are looked up, lm_head reads the last token only, and norms, biases and scales are no matrices.
    """
    is_matrix = name.endswith((".weight", ".qweight"))
    return is_matrix and not any(part in name.lower() for part in ("embed", "lm_head", "norm"))


# ================================================================================================
# inputs.py
# What Kaggle mounted: test rows, packages, wheels.
#
# Files are found by searching: the layout of /kaggle/input has changed before and differs between
# runs. WSDM's texts are strings; LMSYS's are JSON lists of turns with nulls.

TEXTS = ("prompt", "response_a", "response_b")
SCORED = "scored"  # WSDM's column: whether the row counts on the current leaderboard


def find_mounted(root: Path, slug: str, names: Sequence[str], kind: str) -> Path:
    """Find a file of the dataset or competition `slug`, wherever that is mounted."""
    inputs = root / "input"
    paths = []
    for name in names:
        paths = list_mounted(inputs, slug, name, kind)
        if paths:
            break

    # The same file may be mounted twice.
    contents = {hash_file(path) for path in paths}
    if len(contents) == 1:
        return paths[0]

    # The message lists what is mounted, so that a wrong slug shows.
    folders_with_files = set()
    for path in inputs.rglob("*"):
        if path.is_file():
            folders_with_files.add(str(path.parent.relative_to(inputs)))
    mounted = ", ".join(sorted(folders_with_files))
    raise FileNotFoundError(
        f"{inputs}: {len(paths)} files named {' or '.join(names)} below a folder {slug!r}, "
        f"expected one; mounted are {mounted or 'no files at all'}; "
        f"attach {slug} to the kernel once"
    )


def list_mounted(inputs: Path, slug: str, name: str, kind: str) -> list[Path]:
    """List the files of that name below a folder `slug`, but for mounts of the other kind."""
    paths = []
    for path in sorted(inputs.rglob(name)):
        *folders, _file = path.relative_to(inputs).parts
        if slug not in folders:
            continue

        # A dataset may have the slug of the competition that it was made for.
        is_other_kind = folders[0] in ("datasets", "competitions") and folders[0] != kind
        if not is_other_kind:
            paths.append(path)
    return paths


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """Read the test rows."""
    rows = []
    for file_row in read_table(path, ("id", *TEXTS, SCORED)):
        # True and false, 1 and 0, or these as text; a null or no such column says nothing.
        counts = str(file_row.get(SCORED)).strip().lower() not in ("false", "0", "0.0")
        row = {"id": file_row["id"], "counts": counts}
        for name in TEXTS:
            row[name] = read_text(file_row[name], are_turns)
        rows.append(row)
    return rows


def read_table(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a Parquet or CSV file, `id` among them as text; `scored` may be absent."""
    if path.suffix == ".parquet":
        names = choose_columns(path, columns, pq.read_schema(path).names)
        rows = pq.read_table(path, columns=names).to_pylist()
    else:
        rows = read_csv(path, columns)

    for row in rows:
        row["id"] = str(row["id"])
    return rows


def read_csv(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a CSV file as text; what a row lacks is None."""
    # The csv module refuses fields beyond 128 KiB by default, conversations may be longer.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        names = choose_columns(path, columns, reader.fieldnames or ())
        return [{name: row[name] for name in names} for row in reader]


def choose_columns(path: Path, columns: Sequence[str], present: Sequence[str]) -> list[str]:
    """List the columns that are there; ValueError where one is missing, except `scored`."""
    missing = [name for name in columns if name not in (*present, SCORED)]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; there are {', '.join(present) or 'none'}"
        )
    return [name for name in columns if name in present]


def read_text(value: str | Sequence | None, are_turns: bool) -> str | list[str | None] | None:
    """Read a text of the test file, which in some competitions (`are_turns`) is a JSON list of turns."""
    if not are_turns or not isinstance(value, str):
        return value

    # A text may merely look like JSON.
    try:
        turns = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value

    if turns is None:
        return None
    if isinstance(turns, list):
        return [None if turn is None else str(turn) for turn in turns]
    return value


def install_missing_wheels(root: Path, packages: Sequence[Package], wheels: str | None) -> None:
    """Install bitsandbytes, from the dataset `wheels`, where a package needs it and the image lacks it."""
    is_needed = any(package.manifest["quantize"] in ("nf4", "int8") for package in packages)
    is_installed = importlib.util.find_spec("bitsandbytes") is not None
    if not is_needed or is_installed:
        return
    if wheels is None:
        raise ModuleNotFoundError(
            "a package is quantised with bitsandbytes, which is not installed here; "
            "name the dataset that holds its wheel in the spec's `wheels`"
        )

    # No network: pip installs from the mounted folder alone.
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",), "datasets").parent
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--find-links", str(folder), "bitsandbytes"], check=True)
    importlib.invalidate_caches()


# ================================================================================================
# package.py
# A package is read and checked before any device is touched: every byte, every golden token id.
#
# Raises PackageError where a package is not the one that was made; ContractError comes from the package's own model_input.py.

# hashlib lets other threads go on. A core does about 1 GB a second.
HASHING_THREADS = 4

# Kaggle's client reads these files and leaves them out of the dataset.
NOT_MOUNTED = ("dataset-metadata.json",)


class PackageError(ValueError):
    """A package is incomplete, damaged, or not what its manifest and contract say."""


@dataclass(frozen=True)
class Package:
    """A checked package: its folder, the parsed contract.json and manifest.json, its own model_input.py, its tokenizer."""

    folder: Path
    contract: object  # model_input.Contract
    manifest: dict
    model_input: ModuleType
    tokenizer: Tokenizer


def read_package(folder: Path | str) -> Package:
    """Read a package and check it: file hashes, contract, tokenizer, and token ids of twenty awkward pairs, the golden rows."""
    folder = Path(folder)
    check_manifest(folder)
    package = open_package(folder)

    # What decides a model's input is in the contract too: a new manifest cannot hide a change of it.
    contract = package.contract
    check_hash(folder / "model_input.py", contract.model_input_sha256, "contract.json")
    for name, sha256 in contract.tokenizer_sha256.items():
        check_hash(folder / name, sha256, "contract.json")

    # Another version of the tokenizers library may encode otherwise.
    package.model_input.check_golden(package.tokenizer, contract)
    return package


def open_package(folder: Path) -> Package:
    """Open a package whose files were checked before."""
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    model_input = execute_model_input(folder / "model_input.py")
    contract = model_input.read_contract(folder)
    return Package(folder, contract, manifest, model_input, read_tokenizer(folder))


def check_manifest(folder: Path) -> None:
    """Check that the folder has just the files that manifest.json lists, unchanged."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        raise PackageError(f"{folder}: manifest.json is missing; package the run again")
    manifest = json.loads(manifest_path.read_text(encoding="utf-8"))

    # Reading every byte takes a minute or two: several files at a time.
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        checks = []
        for name, listed in manifest["files"].items():
            if name not in NOT_MOUNTED:
                path = folder / name
                checks.append(pool.submit(check_hash, path, listed["sha256"], "manifest.json"))

        # The error of a check is raised when its result is asked for.
        for check in checks:
            check.result()

    # A file that nobody packaged may be one that transformers would read.
    expected_names = {"manifest.json", *manifest["files"], *NOT_MOUNTED}
    present_names = {path.name for path in folder.iterdir() if path.is_file()}
    unlisted = sorted(present_names - expected_names)
    if unlisted:
        raise PackageError(
            f"{folder}: {', '.join(unlisted)} not listed in manifest.json; package the run again"
        )


def hash_file(path: Path) -> str:
    """Compute a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_hash(path: Path, expected: str, source: str) -> None:
    """Raise PackageError unless the SHA-256 of the file at `path` is `expected`, as `source` says."""
    if not path.is_file():
        raise PackageError(f"{path}: missing, but {source} lists it; package the run again")
    sha256 = hash_file(path)
    if sha256 != expected:
        raise PackageError(
            f"{path}: its SHA-256 is {sha256[:12]}…, but {source} says {expected[:12]}…: the file has "
            "changed; package the run again"
        )


class _SourceOnly(importlib.abc.SourceLoader):
    """Loads a module from its source, never from a cached compilation, and writes none beside it."""

    def __init__(self, path: Path):
        self.path = path

    def get_filename(self, fullname: str) -> str:
        return str(self.path)

    def get_data(self, path: str) -> bytes:
        return Path(path).read_bytes()


def execute_model_input(path: Path) -> ModuleType:
    """Import the module at `path` under a name of its own, so that packages with different copies can live side by side."""
    name = f"model_input_{hash_file(path)[:12]}"
    loader = _SourceOnly(path)
    module_spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(module_spec)

    # Its dataclasses look their module up by name.
    sys.modules[name] = module
    loader.exec_module(module)
    return module


def read_tokenizer(folder: Path) -> Tokenizer:
    """Read tokenizer.json, as training saved it: no class of transformers can rebuild it differently."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise PackageError(f"{folder}: tokenizer.json is missing; package the run again")
    return Tokenizer.from_file(str(path))


# ================================================================================================
# checks.py
# What must hold before hours of work begin: libraries that read the packages rightly, and GPUs.
#
# What would make answers wrong, or could only end in a crash, is a MachineError that says what to do.

EXPECTED_GPUS = 2  # machine_shape NvidiaTeslaT4


class MachineError(RuntimeError):
    """This machine, or what is installed on it, cannot do the work."""


def check_machine(packages: Sequence[Package], devices: Sequence[str], clock: Clock) -> None:
    """Check that the installed transformers can read each package, and that there are GPUs."""
    transformers_version = importlib.metadata.version("transformers")
    for package in packages:
        check_transformers(package, transformers_version)

    is_rehearsal = "KAGGLE_ROOT" in os.environ
    uses_gpus = any(device.startswith("cuda") for device in devices)
    if not uses_gpus and not is_rehearsal:
        raise MachineError(
            "PyTorch finds no GPU, and CPUs would take days; set machine_shape to NvidiaTeslaT4 "
            "and enable_gpu to true in kernel-metadata.json, or choose GPU T4 x2 in the editor, "
            "and look whether the week's GPU hours are spent"
        )
    if uses_gpus and len(devices) < EXPECTED_GPUS:
        log(clock, f"warning: {len(devices)} GPU where {EXPECTED_GPUS} were expected")


def check_transformers(package: Package, installed: str) -> None:
    """Raise MachineError where the `installed` version of transformers would misread a package.

    An older major version reads a newer configuration without complaint and ignores what it does
    not know: version 5 writes rope_parameters, without which version 4 gives every model the same
    rotary base.
    """
    # config.json says by which version the model was saved, or else the contract of its training.
    config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
    trained_with = package.contract.recorded.get("versions", {})
    saved_by = config.get("transformers_version") or trained_with.get("transformers")
    if saved_by and major_version(installed) < major_version(saved_by):
        raise MachineError(
            f"{package.folder.name}: saved by transformers {saved_by}, but {installed} is installed "
            "here, which would read it wrongly; choose the newest environment for the kernel"
        )


def major_version(version: str) -> int:
    """Return the first number of a version."""
    return int(version.split(".")[0])


# ================================================================================================
# visible.py
# The visible run is a load test: it also scores rows of the competition's train file.
#
# They are validation rows that every package lists, so that accuracy means what it will mean in the
# hidden run, and enough to predict from their speed when 10,000 and 25,000 rows will be done.

VALIDATION_IDS = "validation_ids.json"
TRAIN_FILES = ("train.parquet", "train.csv")
TRAIN_PREFIX = "train:"  # of the rows' ids, which then differ from those of test rows
FLAG_SET = ("1", "1.0", "True")  # as text, for a flag may be an integer, a float or a truth value


@dataclass(frozen=True)
class VisibleRows:
    """What the visible run scores beside the test rows."""

    rows: tuple[dict, ...] = ()  # as the test file's, each with a new id
    winners: Mapping[str, str | None] = field(default_factory=dict)  # by that id; None: no verdict
    trained_on: bool = False  # a model has seen the rows in training


def choose_visible_rows(
    root: Path, settings: Settings, packages: Sequence[Package], clock: Clock
) -> VisibleRows:
    """Choose rows of the train file that every package lists as validation rows."""
    if is_hidden_run() or settings.visible_rows == 0:
        return VisibleRows()

    # Whatever is wrong with the train file, the test rows can be scored.
    try:
        listings = []
        for package in packages:
            listing = (package.folder / VALIDATION_IDS).read_text(encoding="utf-8")
            listings.append(json.loads(listing))
        file = find_mounted(root, settings.competition, TRAIN_FILES, "competitions")
        train_rows = read_train_rows(file, settings, listings)
    except (OSError, ValueError, pa.ArrowException) as error:
        log(clock, f"visible run: only test rows are scored: {error}")
        return VisibleRows()

    # Rows that a model knows say nothing of its accuracy.
    trained_on = any(listing["trained_on"] for listing in listings)
    remark = "; a model was trained on them: they tell of speed only" if trained_on else ""
    log(clock, f"visible run: {len(train_rows)} rows of {file.name} are scored too{remark}")

    # They look like rows of the test file.
    rows = []
    winners = {}
    for train_row in train_rows:
        row = {"id": TRAIN_PREFIX + train_row["id"], "counts": True}
        for name in TEXTS:
            row[name] = read_text(train_row[name], settings.texts_are_turns)
        rows.append(row)
        winners[row["id"]] = read_winner(train_row, settings)
    return VisibleRows(tuple(rows), winners, trained_on)


def read_train_rows(file: Path, settings: Settings, listings: Sequence[Mapping]) -> list[dict]:
    """Read rows of the train file that are validation rows of every package, as many as the spec wants.

    `listings` are the packages' lists of validation rows, one validation_ids.json each.
    """
    id_sets = [frozenset(listing["ids"]) for listing in listings]
    listed_by_all = frozenset.intersection(*id_sets)
    rows = []
    for row in read_table(file, ("id", *TEXTS, *settings.verdict_columns)):
        if row["id"] in listed_by_all:
            rows.append(row)
    if not rows:
        raise ValueError(
            f"{file.name} holds none of the {len(listed_by_all)} ids that every package lists"
        )

    # A fair sample, which does not depend on the file's order: by a hash of the id.
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return rows[: settings.visible_rows]


def read_winner(row: Mapping, settings: Settings) -> str | None:
    """Read a train row's verdict from a column with its name, or from a column for each verdict; None without one."""
    if settings.verdict_form == "name":
        [column] = settings.verdict_columns
        return row[column]

    winners = []
    for verdict, column in zip(settings.verdicts, settings.verdict_columns, strict=True):
        if str(row[column]) in FLAG_SET:
            winners.append(verdict)
    return winners[0] if len(winners) == 1 else None


def measure_quality(
    visible: VisibleRows, verdicts: Sequence[str], scored: Mapping[str, Sequence[float]]
) -> dict:
    """Measure the kernel's probabilities against the verdicts that people gave."""
    right_rows = []
    losses = []
    brier_scores = []
    for row_id, winner in visible.winners.items():
        if row_id not in scored or winner not in verdicts:
            continue

        probabilities = scored[row_id]
        place = verdicts.index(winner)
        right_rows.append(probabilities.index(max(probabilities)) == place)
        losses.append(-math.log(probabilities[place]))

        # The Brier score is Σ (p − y)², where y is 1 for the winner and else 0.
        sum_of_squares = sum(probability**2 for probability in probabilities)
        brier_scores.append(sum_of_squares - 2 * probabilities[place] + 1)

    judged = len(right_rows)
    if not judged:
        return {"judged": 0}

    # The standard error of a share p of n rows is √(p (1 − p) / n).
    accuracy = sum(right_rows) / judged
    return {
        "judged": judged,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": sum(losses) / judged,
        "brier_score": sum(brier_scores) / judged,
    }


def predict_finish(passes: Sequence[Mapping], fixed_seconds: float, rows: int) -> dict:
    """Predict how long the hidden run would take for so many rows, at the speed of this run."""
    # A later pass of the same model and order had only rows that were left over, or do not count.
    seconds_per_row: dict[tuple[str, str], float] = {}
    for record in passes:
        model_and_order = (record["run"], record["order"])
        if record["scored"] > 0 and model_and_order not in seconds_per_row:
            seconds_per_row[model_and_order] = record["seconds"] / record["scored"]

    # The first pass gives every row a score, the further ones make it better.
    seconds_in_first_pass, *_further_passes = seconds_per_row.values()
    seconds_in_all_passes = sum(seconds_per_row.values())
    return {
        "rows": rows,
        "first_order_seconds": round(fixed_seconds + rows * seconds_in_first_pass),
        "all_seconds": round(fixed_seconds + rows * seconds_in_all_passes),
    }


def describe_quality(quality: Mapping) -> str:
    """Write a line for the log: how good the answers are."""
    error = 2 * quality["standard_error"]
    return (
        f"visible run: accuracy {quality['accuracy']:.4f} ± {error:.4f} (two standard errors), "
        f"log loss {quality['log_loss']:.4f}, Brier score {quality['brier_score']:.4f} "
        f"on {quality['judged']} rows"
    )


def describe_finish(finish: Mapping, clock_seconds: float) -> str:
    """Write a prediction for the log, beside the seconds allowed; a warning where rows will be left to the prior."""
    line = (
        f"predicted for {finish['rows']:,} rows: every row scored once after "
        f"{format_hours(finish['first_order_seconds'])}, everything after "
        f"{format_hours(finish['all_seconds'])}, with {format_hours(clock_seconds)} allowed"
    )
    if finish["first_order_seconds"] > clock_seconds:
        return f"warning: {line}; rows would get the prior"
    return line


def format_hours(seconds: float) -> str:
    """Format seconds as hours and minutes, e.g. 4 h 40 min; under ten minutes as seconds."""
    if seconds < 600:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


# ================================================================================================
# submission.py
# From probabilities to a submission that is whole: every id once, in the test file's order.

# No probability is nearer to 0 or 1: log loss would punish it without end.
SMALLEST = 1e-6

# By the number of verdicts: longer, shorter, tie. The longer one wins 62 % of human verdicts.
PRIOR = {2: (0.6, 0.4), 3: (0.45, 0.25, 0.3)}


def to_competition(
    values: Sequence[float], model_verdicts: Sequence[str], verdicts: Sequence[str]
) -> list[float]:
    """Turn a model's probabilities into those of the competition's verdicts, in their order.

    A verdict that the competition does not know, such as a tie, is left out: the others' shares then
    grow to a sum of one again. Of 0.3, 0.1 and 0.6 for a tie, 0.75 and 0.25 are left.
    """
    kept = [values[model_verdicts.index(verdict)] for verdict in verdicts]
    total = sum(kept)
    if total == 0:  # the model is sure of the verdict that was left out
        return [1 / len(kept)] * len(kept)
    return [value / total for value in kept]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Average the probabilities of a row, a list from each model; the weights need not sum to one."""
    total_weight = sum(weights)
    number_of_verdicts = len(values[0])
    mean = [0.0] * number_of_verdicts
    for probabilities, weight in zip(values, weights, strict=True):
        for place, probability in enumerate(probabilities):
            mean[place] += weight * probability / total_weight
    return mean


def soften(values: Sequence[float], temperature: float) -> list[float]:
    """Apply a temperature: above 1, probabilities become less sure. None falls below SMALLEST."""
    powers = [max(value, SMALLEST) ** (1 / temperature) for value in values]
    total = sum(powers)

    # The bound breaks the sum of one, so it is restored once more.
    bounded = [max(power / total, SMALLEST) for power in powers]
    total = sum(bounded)
    return [value / total for value in bounded]


def count_characters(text: str | Sequence[str | None] | None) -> int:
    """Count the characters of a text, or of all its turns."""
    if text is None:
        return 0
    if isinstance(text, str):
        return len(text)

    # A conversation of LMSYS has None for a turn without an answer.
    return sum(len(turn) for turn in text if turn is not None)


def prior(row: Mapping, verdicts: Sequence[str]) -> list[float]:
    """Give a row that could not be scored probabilities, by which of its responses is longer."""
    longer, shorter, *tie = PRIOR[len(verdicts)]
    if count_characters(row["response_a"]) >= count_characters(row["response_b"]):
        return [longer, shorter, *tie]
    return [shorter, longer, *tie]


def fill_unscored(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], verdicts: Sequence[str]
) -> dict[str, list[float]]:
    """Give every row probabilities, in the rows' order: those in `scored`, or else the prior, a guess by length."""
    final = {}
    for row in rows:
        row_id = row["id"]
        if row_id in scored:
            final[row_id] = list(scored[row_id])
        else:
            final[row_id] = prior(row, verdicts)
    return final


def write_submission(
    path: Path, settings: Settings, final: Mapping[str, Sequence[float]], ids: Sequence[str]
) -> None:
    """Write submission.csv: the id of each row with its winner, or with a probability a verdict."""
    with whole_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *settings.columns])
            for row_id, probabilities in final.items():
                answer = probabilities
                if settings.answer == "winner":
                    likeliest = probabilities.index(max(probabilities))
                    answer = [settings.verdicts[likeliest]]
                writer.writerow([row_id, *answer])

        # The ids are read back from the file itself.
        check_ids(temporary, ids)


def check_ids(path: Path, ids: Sequence[str]) -> None:
    """Raise ValueError unless a submission has every id of the test file once, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        _header, *lines = csv.reader(file)
    written_ids = [line[0] for line in lines]
    if written_ids != list(ids):
        raise ValueError(
            f"{path}: its {len(written_ids)} ids are not the test file's {len(ids)} in their order"
        )


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path that gets its name when the block succeeds, and is removed if not."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_scores(
    path: Path,
    verdicts: Sequence[str],
    final: Mapping[str, Sequence[float]],
    scored: Mapping[str, Sequence[float]],
    model_columns: Mapping[str, Mapping[str, float]],
) -> None:
    """Write scores.parquet, which tells for every row where its probabilities come from.

    Its columns are id; `scored`, which is false where the row has the prior; p_VERDICT, as submitted;
    and what each model gave, null where it did not score the row.
    """
    columns: dict[str, list] = {"id": list(final), "scored": [row_id in scored for row_id in final]}
    for place, verdict in enumerate(verdicts):
        columns[f"p_{verdict}"] = [values[place] for values in final.values()]
    for name, value_by_id in model_columns.items():
        columns[name] = [value_by_id.get(row_id) for row_id in final]
    with whole_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def write_record(path: Path, record: Mapping) -> None:
    """Write kernel.json."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


# ================================================================================================
# models/scoring.py
# Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position.

ORDERS = ("as_given", "swapped")

# The order of a reward model's two sequences.
REWARD_SIDES = ("model_a", "model_b")

# A forward pass may compute so many tokens of padding, by the package's quantisation: more would cost more than another
# pass. That costs most where weights are unpacked in each.
PADDING_LIMITS = {"none": 32, "int8": 32, "nf4": 128, "gptq8": 256, "gptq4": 512}
DEFAULT_PADDING_LIMIT = 128


@dataclass(frozen=True)
class Request:
    """One pair to be scored: the pair `id`, with its responses in `order`, as one sequence, or for the reward head two."""

    id: str
    order: str
    sequences: tuple[list[int], ...]
    padding_limit: int = DEFAULT_PADDING_LIMIT

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return max(map(len, self.sequences))

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(map(len, self.sequences))


@dataclass(frozen=True)
class BatchScores:
    """A batch's probabilities, one list a request in the order of contract.verdicts, and how many rows overflowed float16."""

    probabilities: list[list[float]]
    overflowed: int = 0


def orders_of(contract, orders: Iterable[str]) -> tuple[str, ...]:
    """List the orders worth scoring: a reward model sees each response alone, so that its second order is its first."""
    if contract.head == "reward":
        return ORDERS[:1]
    return tuple(orders)


def padded_tokens(batch: Sequence[Request]) -> int:
    """Count the tokens that are computed for a batch, padding included."""
    lengths = []
    for request in batch:
        lengths += [len(sequence) for sequence in request.sequences]

    # Each group is a forward pass of its own, padded to its longest sequence.
    tokens = 0
    for places in group_by_length(lengths, batch[0].padding_limit):
        longest = max(lengths[place] for place in places)
        tokens += longest * len(places)
    return tokens


def group_by_length(
    lengths: Sequence[int], padding_limit: int = DEFAULT_PADDING_LIMIT
) -> list[list[int]]:
    """Group sequences of like length, each group to be one forward pass."""
    longest_first = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    groups: list[list[int]] = []
    padding = 0
    longest = 0
    for place in longest_first:
        # A sequence is padded to the longest of its group, which is the group's first one.
        padding += longest - lengths[place]
        if not groups or padding > padding_limit:
            groups.append([])
            padding = 0
            longest = lengths[place]
        groups[-1].append(place)
    return groups


def make_requests(
    model_input: ModuleType,
    tokenizer,
    contract,
    pairs: Sequence,
    orders: Iterable[str],
    padding_limit: int = DEFAULT_PADDING_LIMIT,
) -> list[Request]:
    """Encode pairs in each of `orders`, by the package's own model_input.py: a request for each."""
    requests = []
    for order in orders:
        ordered_pairs = pairs
        if order == "swapped":
            ordered_pairs = [model_input.swap(pair) for pair in pairs]
        encoded = model_input.encode_all(list(ordered_pairs), tokenizer, contract)
        for pair, sequences in zip(pairs, encoded, strict=True):
            requests.append(Request(pair.id, order, sequences, padding_limit))
    return requests


def make_batches(requests: Iterable[Request], tokens_per_batch: int) -> list[list[Request]]:
    """Make batches of requests of like length, the longest first.

    A batch, padded, holds at most `tokens_per_batch` tokens; a request that is longer than that is
    a batch of its own.
    """
    # A batch that is too large for memory then shows at once. The id decides between requests of
    # one length, so that the batches are the same in every run.
    longest_first = sorted(
        requests, key=lambda request: (-request.length, request.id, request.order)
    )
    batches: list[list[Request]] = []
    for request in longest_first:
        if batches and padded_tokens([*batches[-1], request]) <= tokens_per_batch:
            batches[-1].append(request)
        else:
            batches.append([request])
    return batches


@torch.inference_mode()
def score_batch(
    model: torch.nn.Module,
    model_input: ModuleType,
    contract,
    batch: Sequence[Request],
    device: str,
    pass_context=contextlib.nullcontext,
) -> BatchScores:
    """Score a batch; a row that overflows float16 is computed again in float32, alone."""
    probabilities_bv = batch_probabilities(model, contract, batch, device, pass_context)

    # Only float16 has a range that hidden states can leave.
    overflowed_rows = []
    if model.dtype is torch.float16:
        is_finite_b = probabilities_bv.isfinite().all(-1)
        overflowed_rows = torch.nonzero(~is_finite_b).flatten().tolist()

    # What fails here, for lack of memory or of a float32 kernel, costs this row alone.
    for row in overflowed_rows:
        batch_of_one = [batch[row]]
        with contextlib.suppress(RuntimeError), ComputeInFloat32():
            [row_v] = batch_probabilities(model, contract, batch_of_one, device, pass_context)
            probabilities_bv[row] = row_v

    rows = []
    for request, values in zip(batch, probabilities_bv.tolist(), strict=True):
        if request.order == "swapped":
            rows.append(model_input.swap_probabilities(values, contract.verdicts))
        else:
            rows.append(values)
    return BatchScores(rows, len(overflowed_rows))


def batch_probabilities(
    model: torch.nn.Module, contract, batch: Sequence[Request], device: str, pass_context
) -> torch.Tensor:
    """Compute the verdicts' probabilities of each request; those of swapped requests are not swapped back yet."""
    sequences = []
    for request in batch:
        sequences += request.sequences
    padding_limit = batch[0].padding_limit  # one package's requests have the same
    logits_bv = verdict_logits(model, contract, sequences, device, pass_context, padding_limit)

    # This cancels the position bias of a base model that was not trained.
    if contract.logit_bias:
        logits_bv = logits_bv + torch.tensor(contract.logit_bias)
    return logits_bv.softmax(-1)


def verdict_logits(
    model: torch.nn.Module,
    contract,
    sequences: Sequence[list[int]],
    device: str,
    pass_context=contextlib.nullcontext,
    padding_limit: int = DEFAULT_PADDING_LIMIT,
) -> torch.Tensor:
    """Compute the logits of the verdicts for the requests of a batch.

    A request has one sequence of token ids; for the reward head two, for response A and for B.
    """
    # Sequences of like length go through the model together, wherever they stand in the batch.
    output_rows = [torch.empty(0)] * len(sequences)
    lengths = [len(ids) for ids in sequences]
    for places in group_by_length(lengths, padding_limit):
        group = [sequences[place] for place in places]
        with pass_context():
            outputs_bu = read_head(model, contract, group, device).float().cpu()
        for place, output_u in zip(places, outputs_bu, strict=True):
            output_rows[place] = output_u

    outputs = torch.stack(output_rows)
    if contract.head != "reward":
        return outputs

    # In Bradley and Terry's model the rewards of A and B are the logits of their winning.
    sides = [REWARD_SIDES.index(verdict) for verdict in contract.verdicts]
    rewards_by_side = outputs.view(-1, 2)
    return rewards_by_side[:, sides]


def read_head(
    model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str
) -> torch.Tensor:
    """Run the model once over sequences, and read its head for one token of each."""
    is_causal_lm = contract.head == "label_tokens"
    is_decoder = is_causal_lm or getattr(model, "causal", False)
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id)
    inputs = {"input_ids": ids_bt.to(device)}

    # A decoder's token does not see the padding behind it, so that only an encoder needs a mask.
    if not is_decoder and not mask_bt.all():
        inputs["attention_mask"] = mask_bt.to(device)

    places_b = torch.tensor(list_read_places(contract, sequences, is_decoder), device=device)
    with reading(places_b):
        logits = model(**inputs).logits
    if is_causal_lm:
        return pick_label_logits(logits, places_b, contract.label_token_ids)
    return logits


def pick_label_logits(
    logits_btv: torch.Tensor, places_b: torch.Tensor, label_token_ids: Sequence[int]
) -> torch.Tensor:
    """Pick the label tokens' logits for the token that is read, of all that a causal LM computed.

    After shortcuts.take_shortcuts it computes no others, unless an adapter is on its output layer.
    """
    has_all_tokens = logits_btv.shape[1] > 1
    if has_all_tokens:
        rows_b = torch.arange(len(places_b), device=logits_btv.device)
        logits_bv = logits_btv[rows_b, places_b.to(logits_btv.device)]
    else:
        logits_bv = logits_btv[:, 0]

    has_whole_vocabulary = logits_bv.shape[-1] > len(label_token_ids)
    if has_whole_vocabulary:
        return logits_bv[:, list(label_token_ids)]
    return logits_bv


def list_read_places(contract, sequences: Sequence[list[int]], is_decoder: bool) -> list[int]:
    """List for each sequence the place of the token whose hidden state the model's head reads."""
    # A causal LM answers with the token that follows the last one.
    if contract.head == "label_tokens":
        return [len(ids) - 1 for ids in sequences]

    # The classifiers that transformers makes of decoders read the last token that is not padding.
    if is_decoder:
        return [find_last_token(ids, contract.pad_token_id) for ids in sequences]

    # The heads of BERT and DeBERTa read the first token. Those of other encoders get all tokens,
    # whatever is listed here (see shortcuts.take_shortcuts).
    return [0] * len(sequences)


def find_last_token(ids: Sequence[int], pad_token_id: int) -> int:
    """Find the last token that is not the pad id; 0 where all are, as transformers' classifier reads such a row."""
    for place in range(len(ids) - 1, -1, -1):
        if ids[place] != pad_token_id:
            return place
    return 0


def pad(sequences: Sequence[list[int]], pad_token_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Pad token ids on the right to the longest sequence."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    ids_bt = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    mask_bt = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return ids_bt, mask_bt


def score(  # noqa: PLR0913  the last three are options by name
    model: torch.nn.Module,
    model_input: ModuleType,
    tokenizer,
    contract,
    pairs: Sequence,
    *,
    orders: Iterable[str] = ORDERS,
    tokens_per_batch: int = 8192,
    device: str = "cpu",
) -> dict[str, dict[str, list[float]]]:
    """Score pairs in one process. A reward model is run once a pair, whatever the orders."""
    # A reward model's orders do not differ: one is computed and counts for all.
    orders = tuple(orders)
    distinct_orders = orders_of(contract, orders)
    one_counts_for_all = distinct_orders != orders
    requests = make_requests(model_input, tokenizer, contract, pairs, distinct_orders)
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    for batch in make_batches(requests, tokens_per_batch):
        batch_scores = score_batch(model, model_input, contract, batch, device)
        for request, values in zip(batch, batch_scores.probabilities, strict=True):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(
                    f"row {request.id}, {request.order}: probabilities {values} in {model.dtype}"
                )
            covered_orders = orders if one_counts_for_all else [request.order]
            for order in covered_orders:
                scores[request.id][order] = values
    return scores


def mean_of_orders(scores: dict[str, dict[str, list[float]]]) -> dict[str, list[float]]:
    """Average each pair's probabilities over the orders in which it was scored; a pair that was not scored is left out."""
    means = {}
    for pair_id, by_order in scores.items():
        if by_order:
            # The verdict's probabilities in each order stand together.
            by_verdict = zip(*by_order.values(), strict=True)
            means[pair_id] = [sum(values) / len(by_order) for values in by_verdict]
    return means


# ================================================================================================
# models/model.py
# The model of a package, loaded so that it answers as it did in training: pad id, attention and soft-cap from the contract.

CLASSES = {
    "score": AutoModelForSequenceClassification,
    "reward": AutoModelForSequenceClassification,
    "label_tokens": AutoModelForCausalLM,
}

# Under PEFT's own names for them, transformers would go looking for the base model.
LORA = ("lora_config.json", "lora.safetensors")


def load_model(
    folder: Path | str,
    contract,
    device: str,
    dtype: torch.dtype | None = None,
    device_map: Mapping[str, str] | None = None,
) -> torch.nn.Module:
    """Load the model in `folder` in eval mode, with the adapter on it where the folder holds one."""
    if dtype is None:
        dtype = torch.float16 if device.startswith("cuda") else torch.float32

    # For some CPUs bitsandbytes looks for a compiled kernel on a hub, and warns that it does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    config = serving_config(folder, contract)
    quantised = getattr(config, "quantization_config", None)
    if quantised and quantised["quant_method"] == "gptq":
        config.quantization_config = {**quantised, "quant_method": UNPACKING}

    # Without a device_map weights are read on the CPU first, and quantised ones are not read at all.
    options = {}
    if device_map or quantised or device != "cpu":
        options["device_map"] = dict(device_map or {"": device})
    model, loading = CLASSES[contract.head].from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=choose_attention(config, contract),
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **options,
    )

    # An adapter may bring a head of its own, which the base model then lacks rightly.
    missing = set(loading["missing_keys"])
    lora_config_path, lora_path = (Path(folder) / name for name in LORA)
    if lora_path.is_file():
        model, replaced_names = add_adapter(model, lora_config_path, lora_path, dtype)
        missing -= replaced_names
    if missing:
        raise PackageError(f"{folder}: weights are missing: {', '.join(sorted(missing)[:5])}")
    take_shortcuts(model, contract.label_token_ids)
    return model.eval()


def choose_attention(config, contract) -> str:
    """Name the fastest implementation of attention that the architecture has, as transformers' attn_implementation."""
    model_class = CLASSES[contract.head]._model_mapping[type(config)]

    # Only transformers' own, slow implementation can cap the attention's logits, as Gemma-2 does.
    if contract.softcap or not model_class._supports_sdpa:
        return "eager"
    if not model_class._supports_attention_backend:
        return "sdpa"
    return SDPA


def add_adapter(
    model: torch.nn.Module, lora_config_path: Path, lora_path: Path, dtype: torch.dtype
) -> tuple[torch.nn.Module, set[str]]:
    """Put a LoRA adapter on a model that it was not merged into, its matrices in `dtype`."""
    # Few packages need PEFT, whose import takes seconds.
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict  # noqa: PLC0415

    settings = json.loads(lora_config_path.read_text(encoding="utf-8"))
    lora_config = LoraConfig.from_peft_type(**settings)
    tensors = load_file(lora_path)
    model = get_peft_model(model, lora_config, autocast_adapter_dtype=False)
    set_peft_model_state_dict(model, tensors)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    replaced_names = {name.removeprefix("base_model.model.") for name in tensors}
    return model, replaced_names


def serving_config(folder: Path | str, contract):
    """Read the folder's config.json, with pad id and soft-cap set as the contract says."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    config.pad_token_id = contract.pad_token_id

    # A cache of keys and values serves generation, and nothing is generated: 2.8 GB for Gemma-2-9b.
    config.use_cache = False

    # Training may have left the soft cap of attention out, for the sake of SDPA.
    if not contract.softcap and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    return config


# ================================================================================================
# models/overflow.py
# A float16 model computed in float32, for the rows that overflow float16.
#
# Some inputs drive activations of Qwen2.5 and Gemma-2 beyond 65,504; such a row ends as NaN. scoring.score_batch
# then computes it again in the context `ComputeInFloat32()`. The weights stay in float16; those of one layer at a
# time are converted.

FLOAT16_MAX = torch.finfo(torch.float16).max

# These functions want input and weights in one dtype.
WITH_WEIGHTS = (layer_norm, linear, rms_norm)

# bitsandbytes' first step of an int8 product, which takes float16 only.
QUANTISE_TO_INT8 = "bitsandbytes.int8_vectorwise_quant.default"


class ComputeInFloat32(TorchFunctionMode):
    """In this thread, hidden states stay float32 from layer to layer, whatever the dtype of the weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call a function of PyTorch's so that hidden states stay float32.

        PyTorch hands every call of its functions to this method while the mode is on.
        """
        kwargs = kwargs or {}

        # Hidden states are float32 and the weights float16: the weights are converted.
        if function in WITH_WEIGHTS:
            args = [to_float32(value) for value in args]
            kwargs = {name: to_float32(value) for name, value in kwargs.items()}
            return function(*args, **kwargs)

        # The int8 kernel of bitsandbytes takes float16 only: what does not fit becomes the largest.
        if str(function) == QUANTISE_TO_INT8:
            hidden, *others = args
            hidden = hidden.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
            return function(hidden, *others, **kwargs)

        # bitsandbytes and PEFT convert a layer's input to the dtype of its weights. In float16 it
        # would overflow again, so that it stays as it is.
        result = function(*args, **kwargs)
        if function is torch.Tensor.to:
            original = args[0]
            if original.dtype is torch.float32 and result.dtype is torch.float16:
                return original
        return result


def to_float32(value):
    """Convert a float16 tensor; anything else stays as it is."""
    if isinstance(value, torch.Tensor) and value.dtype is torch.float16:
        return value.float()
    return value


# ================================================================================================
# models/shortcuts.py
# What scoring can leave out without another answer: work for tokens that nobody reads, and attention's slow kernel.
#
# A head reads one token of a row: a decoder's last one, an encoder's first. In the last layer all tokens are needed for the
# attention's keys and values, but what comes after it only for the token that is read: hooks on its output projection and
# its MLP hand on that token alone. What they give, one token wide, is added to the residual of all tokens by broadcasting,
# which is right in the one place that is read. Of a causal LM's output layer only the rows of the label tokens are kept.

# The name under which transformers finds repeated_attention.
SDPA = "sdpa_repeated"

# Encoders whose head reads nothing but the first token.
READ_FIRST_TOKEN = ("bert", "deberta-v2")

# What comes after the attention in a layer, by the names of decoders, then of BERT.
AFTER_ATTENTION = ("self_attn.o_proj", "mlp", "attention.output.dense", "intermediate")

# The places read in the batch of this thread: a split model has a batch in each of several threads.
BEING_READ = threading.local()


def repeated_attention(module, query_bhtd, key_bhtd, value_bhtd, attention_mask, scaling=None, **_):
    """Compute attention by PyTorch, with keys and values repeated for every head of their group.

    transformers' own leaves the groups to PyTorch where there is no mask (`enable_gqa`). Only
    FlashAttention can do that: a T4, which has none, and a CPU would fall back to a slow kernel.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if groups > 1:
        key_bhtd = key_bhtd.repeat_interleave(groups, dim=1)
        value_bhtd = value_bhtd.repeat_interleave(groups, dim=1)

    output_bhtd = scaled_dot_product_attention(
        query_bhtd,
        key_bhtd,
        value_bhtd,
        attn_mask=attention_mask,
        scale=scaling,
        is_causal=attention_mask is None and module.is_causal,
    )
    return output_bhtd.transpose(1, 2).contiguous(), None


AttentionInterface.register(SDPA, repeated_attention)
AttentionMaskInterface.register(SDPA, sdpa_mask)


class LabelHead(torch.nn.Module):
    """The rows of a causal LM's output layer that belong to the label tokens, in float32."""

    def __init__(
        self, output_layer: torch.nn.Linear, label_token_ids: Sequence[int], device: torch.device
    ):
        super().__init__()
        rows = list(label_token_ids)
        weight_vd = output_layer.weight.detach()[rows]
        self.weight_vd = weight_vd.to(device, torch.float32)
        self.bias_v = None
        if output_layer.bias is not None:
            bias_v = output_layer.bias.detach()[rows]
            self.bias_v = bias_v.to(device, torch.float32)

    def forward(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        """The label tokens' logits, (rows, tokens, labels); the model itself scales or caps them afterwards."""
        hidden_btd = hidden_btd.float()
        return linear(hidden_btd, self.weight_vd, self.bias_v)


def take_shortcuts(model: torch.nn.Module, label_token_ids: Sequence[int] = ()) -> None:
    """Make a model's forward pass faster where the result does not change.

    In the context `reading` its last layer then computes the tokens that are read only. The model
    gets an attribute `causal`: whether a token sees those before it only.
    """
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    model.causal = bool(attentions) and all(module.is_causal for module in attentions)

    fuse_elementwise(model)
    if label_token_ids:
        keep_label_rows(model, label_token_ids)

    # The head of any other encoder may read all tokens.
    reads_one_token = model.causal or model.config.model_type in READ_FIRST_TOKEN
    if not reads_one_token:
        return

    # A layer has some of these names only: architectures have different ones.
    last_layer = layer_list(model)[-1]
    for name in AFTER_ATTENTION:
        with contextlib.suppress(AttributeError):
            last_layer.get_submodule(name).register_forward_pre_hook(keep_read_tokens)


def keep_label_rows(model: torch.nn.Module, label_token_ids: Sequence[int]) -> None:
    """Have a causal LM compute, for the read token of each row, the logits of the label tokens only.

    These tokens stand for the verdicts, such as A and B. An output layer with an adapter on it
    keeps those of the whole vocabulary.
    """
    output_layer = model.get_output_embeddings()
    if type(output_layer) is torch.nn.Linear:
        # In a split model the output layer may stand on another device than the last layer.
        last_device = next(layer_list(model)[-1].parameters()).device
        output_layer = LabelHead(output_layer, label_token_ids, last_device)
        model.set_output_embeddings(output_layer)
    output_layer.register_forward_pre_hook(keep_read_tokens)


@contextlib.contextmanager
def reading(places_b: torch.Tensor) -> Iterator[None]:
    """Tell the model's hooks, for a forward pass in this thread, the one place of each row that is read."""
    BEING_READ.places_b = places_b
    try:
        yield
    finally:
        BEING_READ.places_b = None


def keep_read_tokens(_, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """A forward pre-hook that cuts a module's input to the token of each row that is read.

    Hidden states of shape (rows, tokens, width) become (rows, 1, width), and other arguments stay. Outside
    of the context `reading` it returns None, by which PyTorch leaves the input as it is.
    """
    places_b = getattr(BEING_READ, "places_b", None)
    if places_b is None:
        return None

    hidden_btd, *others = args
    rows_b = torch.arange(len(places_b), device=hidden_btd.device)
    read_bd = hidden_btd[rows_b, places_b.to(hidden_btd.device)]
    return (read_bd.unsqueeze(1), *others)


# ================================================================================================
# models/fused.py
# Norms, rotary positions and gated activations in fewer passes over memory than transformers' own chains of operations.
#
# A T4 spends a tenth of a Gemma-2 forward in them. They are replaced when a model is loaded, for the architectures below;
# others are left alone.

# What is added to the weight of a norm, by model_type.
NORM_OFFSETS = {
    "gemma2": 1.0,
    "llama": 0.0,
    "mistral": 0.0,
    "phi3": 0.0,
    "qwen2": 0.0,
    "qwen3": 0.0,
}

# Architectures whose positions may rotate a part of a head only.
PARTLY_ROTATED = ("phi3",)


class GatedMlp(torch.nn.Module):
    """A gated MLP whose product is formed in the memory of the activation."""

    def __init__(self, mlp: torch.nn.Module):
        super().__init__()
        self.gate_proj = mlp.gate_proj
        self.up_proj = mlp.up_proj
        self.down_proj = mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, hidden_btd: torch.Tensor) -> torch.Tensor:
        """The MLP's output, of the input's shape."""
        gate_btu = self.gate_proj(hidden_btd)
        gated_btu = self.act_fn(gate_btu)
        gated_btu *= self.up_proj(hidden_btd)
        return self.down_proj(gated_btu)


def fuse_elementwise(model: torch.nn.Module) -> None:
    """Replace a model's norms, gated MLPs and rotary positions by faster ones of the same result.

    A model of an architecture that is not in NORM_OFFSETS stays as it is.
    """
    model_type = model.config.model_type
    if model_type not in NORM_OFFSETS:
        return

    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, fuse_norm(module, NORM_OFFSETS[model_type]))
        elif name.endswith(".mlp") and hasattr(module, "gate_proj"):
            model.set_submodule(name, GatedMlp(module))

    # The attention calls apply_rotary_pos_emb of the Python module that defines the architecture.
    if model_type not in PARTLY_ROTATED:
        layer_class = type(layer_list(model)[0])
        architecture = sys.modules[layer_class.__module__]
        architecture.apply_rotary_pos_emb = rotate_queries_and_keys


def fuse_norm(norm: torch.nn.Module, offset: float) -> torch.nn.RMSNorm:
    """Make PyTorch's own RMSNorm, which is one kernel on a GPU, from an architecture's norm.

    PyTorch multiplies with the weight as it is. Some architectures add an `offset` to it first: Gemma-2
    multiplies with 1 + weight.
    """
    # Architectures have either of two names for it.
    epsilon = getattr(norm, "variance_epsilon", None)
    if epsilon is None:
        epsilon = norm.eps

    fused = torch.nn.RMSNorm(norm.weight.shape, eps=epsilon, device="meta")
    weight_d = norm.weight.detach() + offset
    fused.weight = torch.nn.Parameter(weight_d, requires_grad=False)
    return fused


def rotate_queries_and_keys(q, k, cos, sin, unsqueeze_dim=1) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys by their positions, as transformers' apply_rotary_pos_emb does, by its parameters."""
    cos = cos.unsqueeze(unsqueeze_dim)
    sin = sin.unsqueeze(unsqueeze_dim)
    return rotate_halves(q, cos, sin), rotate_halves(k, cos, sin)


def rotate_halves(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate each number of the first half of the last axis together with its counterpart in the second half."""
    half = states.shape[-1] // 2
    first = states[..., :half]
    second = states[..., half:]

    # The first half becomes first * cos - second * sin, the second half second * cos + first * sin.
    rotated = states * cos
    rotated[..., :half].addcmul_(second, sin[..., :half], value=-1)
    rotated[..., half:].addcmul_(first, sin[..., half:])
    return rotated


def layer_list(model: torch.nn.Module) -> torch.nn.ModuleList:
    """Find the list of a model's layers: of all its lists of modules the one with the most parameters."""
    parameters_by_list = {}
    for module in model.modules():
        if isinstance(module, torch.nn.ModuleList):
            parameters_by_list[module] = sum(weight.numel() for weight in module.parameters())
    return max(parameters_by_list, key=parameters_by_list.get)


# ================================================================================================
# models/gptq.py
# GPTQ packages without GPTQ's libraries: linear layers that unpack their 4 or 8 bits for each matrix product.
#
# Kaggle's image has none of them, and none can be taken there: gptqmodel is a source distribution that wants a newer
# transformers and compiles its CUDA kernels at first use.
#
# The file format is the standard one (checkpoint_format gptq). qweight and qzeros are int32 words, lowest bits first, of
# qweight along the inputs, of qzeros along the outputs, each zero less one.

# The name that transformers knows these classes by; its own loader of gptq wants the libraries.
UNPACKING = "gptq_unpacked"

# A linear layer elsewhere, such as the head, is not quantised.
IN_LAYER = re.compile(r"\.\d+\.")


class GptqLinear(torch.nn.Module):
    """A linear layer in GPTQ's format: codes of 4 or 8 bits, a zero and a scale for each group of inputs.

    It is loaded in the layout of the file. `prepare` then turns that once into the layout of a weight.
    """

    def __init__(self, linear_layer: torch.nn.Linear, bits: int, group_size: int):
        super().__init__()
        self.bits = bits
        self.group_size = group_size
        self.bias = linear_layer.bias

        # Tensors with the file format's names and shapes. g_idx, the group of each input, is not
        # needed: inputs were not reordered.
        outputs, inputs = linear_layer.out_features, linear_layer.in_features
        groups = inputs // group_size
        codes_in_word = 32 // bits
        qweight = torch.zeros(inputs // codes_in_word, outputs, dtype=torch.int32)
        self.register_buffer("qweight", qweight)
        qzeros = torch.zeros(groups, outputs // codes_in_word, dtype=torch.int32)
        self.register_buffer("qzeros", qzeros)
        self.register_buffer("scales", torch.zeros(groups, outputs, dtype=torch.float16))
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))

    def prepare(self) -> None:
        """Turn the loaded tensors, once, into the layout that each matrix product needs.

        The file has inputs along the rows, a weight has outputs there, so that all tensors are
        transposed. In their names u are the outputs, i the inputs, q the groups of inputs.
        """
        # Words of codes along the inputs stay packed: of shape (outputs, inputs / codes in a word).
        words_ui = self.qweight.T.clone(memory_format=torch.contiguous_format)

        # A group's zero is the code that stands for a weight of 0. The format stores zero - 1.
        stored_zeros_qu = unpack(self.qzeros, self.bits)
        zeros_uq = stored_zeros_qu.T + 1
        scales_uq = self.scales.T.contiguous()

        # With a last axis of one they broadcast over the inputs of their group.
        self.register_buffer("words_ui", words_ui)
        self.register_buffer("zeros_uq1", zeros_uq.unsqueeze(-1))
        self.register_buffer("scales_uq1", scales_uq.unsqueeze(-1))

        # Both layouts at once would take twice the memory.
        del self.qweight, self.qzeros, self.scales, self.g_idx

    def weight_ui(self, dtype: torch.dtype) -> torch.Tensor:
        """The weights in `dtype`, of shape (outputs, inputs): (code - zero) * scale."""
        codes_ui = unpack(self.words_ui, self.bits)
        codes_uqi = codes_ui.unflatten(1, (-1, self.group_size))

        # In place: the weights of a layer are large beside a batch.
        weight_uqi = codes_uqi.to(dtype)
        weight_uqi.sub_(self.zeros_uq1)
        weight_uqi.mul_(self.scales_uq1.to(dtype))
        return weight_uqi.flatten(1)

    def forward(self, input_bti: torch.Tensor) -> torch.Tensor:
        """The layer's output, in the input's dtype."""
        return linear(input_bti, self.weight_ui(input_bti.dtype), self.bias)


def unpack(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Unpack the codes of 4 or 8 bits in int32 words, lowest bits first."""
    bytes_ri = words.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_ri

    # Two codes share a byte, the first one in its lower half.
    codes = torch.stack((bytes_ri & 15, bytes_ri >> 4), dim=-1)
    return codes.flatten(-2)


@register_quantization_config(UNPACKING)
class UnpackingConfig(QuantizationConfigMixin):
    """What a GPTQ package's config.json says, as far as loading needs it."""

    def __init__(self, bits: int, group_size: int, **_):
        self.quant_method = UNPACKING
        self.bits = bits
        self.group_size = group_size


@register_quantizer(UNPACKING)
class UnpackingQuantizer(HfQuantizer):
    """Tells transformers to put a GptqLinear in the place of every linear layer of a layer before it reads weights."""

    requires_calibration = True
    is_trainable = False  # what is loaded here is served

    def _process_model_before_weight_loading(self, model: torch.nn.Module, **_) -> None:
        config = self.quantization_config
        for name, module in list(model.named_modules()):
            is_linear = isinstance(module, torch.nn.Linear)
            if not is_linear or not IN_LAYER.search(name):
                continue

            # On the meta device: its tensors are read from the package afterwards.
            with torch.device("meta"):
                packed = GptqLinear(module, config.bits, config.group_size)
            model.set_submodule(name, packed)

    def _process_model_after_weight_loading(self, model: torch.nn.Module, **_) -> None:
        for module in model.modules():
            if isinstance(module, GptqLinear):
                module.prepare()

    def is_serializable(self, **_) -> bool:
        """No: what is loaded here is served."""
        return False


# ================================================================================================
# models/placement.py
# Which part of a model stands on which device, where one device cannot hold it: layers in their order, work in balance.
#
# A split model runs at the speed of its slower device. Its layers are shared out evenly, as far as the devices' memory allows;
# embedding and head hardly compute, but take memory. The build places a model by the same functions (postprocess.memory).
# Nothing here needs torch: sizes come from the headers of the package's safetensors files.

# The name of a tensor in one of several modules of a list.
NUMBERED = re.compile(r"^(.+?)\.(\d+)\.")

# The name of a part that is a layer.
LAYER = re.compile(r"\.\d+$")

# The place of the head in `part_order`.
HEAD_ORDER = (3, 0)


@dataclass(frozen=True)
class Part:
    """A layer, or a module beside the layers: its bytes, and how many weights multiply every token."""

    size_bytes: int = 0
    work: int = 0


def weight_sizes(folder: Path) -> dict[str, tuple[int, int]]:
    """Read the bytes and the elements of every tensor in the folder's model*.safetensors, by name."""
    sizes = {}
    for path in sorted(Path(folder).glob("model*.safetensors")):
        # A file begins with the length of its header, which describes each tensor.
        with path.open("rb") as file:
            header_length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(header_length))
        header.pop("__metadata__", None)

        for name, tensor in header.items():
            start, end = tensor["data_offsets"]
            sizes[name] = (end - start, count_elements(name, header))
    return sizes


def count_elements(name: str, header: Mapping[str, Mapping]) -> int:
    """Count a tensor's elements; those of a quantised weight as they were before it was packed."""
    tensor = header[name]
    stored_elements = math.prod(tensor["shape"])

    # nf4 packs two elements into a byte.
    if tensor["dtype"] == "U8" and f"{name}.absmax" in header:
        return stored_elements * 2

    # GPTQ packs several inputs into a word; g_idx has an entry for each input.
    if name.endswith(".qweight"):
        group_indices = header[name.removesuffix("qweight") + "g_idx"]
        inputs_per_word = group_indices["shape"][0] // tensor["shape"][0]
        return stored_elements * inputs_per_word
    return stored_elements


def find_layers(sizes: Mapping[str, tuple[int, int]]) -> str:
    """Find the name of the list of layers, such as model.layers: of all lists the one with the most bytes."""
    bytes_by_list: Counter[str] = Counter()
    for name, (size_bytes, _) in sizes.items():
        numbered = NUMBERED.match(name)
        if numbered:
            bytes_by_list[numbered[1]] += size_bytes
    return max(bytes_by_list, key=bytes_by_list.get)


def list_parts(sizes: Mapping[str, tuple[int, int]]) -> dict[str, Part]:
    """List a model's parts: its layers, and the modules before and after them."""
    layers = find_layers(sizes)
    parts: dict[str, Part] = {}
    for name, (size_bytes, elements) in sizes.items():
        # Outside of the layers there is hardly any work: an embedding is looked up, and a head
        # reads one token.
        is_in_layer = name.startswith(f"{layers}.")
        work = elements if is_in_layer else 0

        part_name = name_part(name, layers)
        part = parts.get(part_name, Part())
        parts[part_name] = Part(part.size_bytes + size_bytes, part.work + work)

    ordered_names = sorted(parts, key=lambda name: part_order(name, layers))
    return {name: parts[name] for name in ordered_names}


def name_part(tensor_name: str, layers: str) -> str:
    """Name the module that a tensor belongs to: a layer, or the largest module that holds no layer.

    With the layers in model.layers, model.layers.7.mlp.up_proj.weight belongs to model.layers.7, and
    model.norm.weight to model.norm.
    """
    # The module's name is one step longer than what the tensor's path has in common with the layers'.
    path = tensor_name.split(".")
    layers_path = layers.split(".")
    shared_path = os.path.commonprefix([path, layers_path])
    return ".".join(path[: len(shared_path) + 1])


def part_order(part_name: str, layers: str) -> tuple[int, int]:
    """Give a part's key for sorting: the embedding comes first, then the layers by number, norm and head."""
    if part_name.startswith(f"{layers}."):
        return (1, int(part_name.rpartition(".")[2]))
    if "embed" in part_name:
        return (0, 0)
    if "norm" in part_name.lower():
        return (2, 0)
    return HEAD_ORDER


def balance(parts: Sequence[Part], devices: int, byte_limit: int | None = None) -> list[int]:
    """Place a model's parts on devices so that these have equal work, as far as memory allows.

    Neighbouring parts stay together: each device gets a stretch of the list, called a stage, with
    no more than `byte_limit` bytes of weights where that is possible.
    """
    # A cut is the place of a stage's first part. There are few ways to cut some dozens of layers in
    # two, so that all are tried.
    all_cuts = itertools.combinations(range(1, len(parts)), devices - 1)
    best_cuts = min(all_cuts, key=lambda cuts: rate_cuts(parts, cuts, byte_limit))

    device_numbers = []
    for device, stage in enumerate(cut_parts(parts, best_cuts)):
        device_numbers += [device] * len(stage)
    return device_numbers


def rate_cuts(
    parts: Sequence[Part], cuts: Sequence[int], byte_limit: int | None
) -> tuple[int, int, int]:
    """Rate a placement for `balance`, which takes the lowest rating."""
    most_bytes = 0
    most_work = 0
    for stage in cut_parts(parts, cuts):
        most_bytes = max(most_bytes, sum(part.size_bytes for part in stage))
        most_work = max(most_work, sum(part.work for part in stage))

    # Memory comes first: a placement that does not fit is of no use, however fast.
    excess_bytes = 0
    if byte_limit is not None:
        excess_bytes = max(most_bytes - byte_limit, 0)
    return (excess_bytes, most_work, most_bytes)


def cut_parts(parts: Sequence[Part], cuts: Sequence[int]) -> list[Sequence[Part]]:
    """Cut a list of parts before the places in `cuts`."""
    bounds = [0, *cuts, len(parts)]
    return [parts[start:end] for start, end in itertools.pairwise(bounds)]


def split_over(
    folder: Path, devices: Sequence[str], byte_limit: int | None = None
) -> dict[str, str]:
    """Split the layers of a model over devices, with equal work as far as memory allows."""
    sizes = weight_sizes(folder)
    parts = list_parts(sizes)
    device_numbers = balance(list(parts.values()), len(devices), byte_limit)
    device_map = {}
    for part_name, number in zip(parts, device_numbers, strict=True):
        device_map[part_name] = devices[number]

    # Rotary positions have no weights in the files. They stand beside the layers in the model.
    layers = find_layers(sizes)
    parent_module = layers.rpartition(".")[0]
    device_map[f"{parent_module}.rotary_emb"] = devices[0]

    # Where the files have no head, its weights are the embedding's.
    if not any(part_order(part_name, layers) == HEAD_ORDER for part_name in parts):
        device_map["lm_head"] = devices[0]
    return device_map


# ================================================================================================
# models/pipeline.py
# A split model has a batch in flight on each of its devices: while the second computes one, the first has the next.
#
# A stage is the layers on one device. A batch leaves its stage once the device has computed it and the next stage is free, so
# that there is one batch in a stage at most, and a device holds the intermediates of one batch only.
#
# Each batch in flight has a CUDA stream of its own on every device. PyTorch's copy from one GPU to another makes the current
# streams of both wait for each other, and accelerate copies masks and positions anew for every layer of a later stage: on one
# stream, the first GPU's next batch would stand in the queue behind copies that wait for the second GPU.


class Stages:
    """The stages of a split model, entered by forward hooks on the first part of each device.

    `devices` are the stages' devices; those that are GPUs get a stream for each batch in flight.
    """

    def __init__(self, model: torch.nn.Module, starts: Sequence[str], devices: Sequence[str] = ()):
        # Whoever holds a stage's lock has its device for itself. The first stage has no start.
        stages = 1 + len(starts)
        self.locks = [threading.Lock() for _ in range(stages)]

        # What belongs to the batch that a thread computes: its `stage` and its `streams`.
        self.local = threading.local()

        # Streams for as many batches as there are stages; a batch takes a set and puts it back.
        gpus = [device for device in devices if device.startswith("cuda")]
        self.free_streams: queue.SimpleQueue[list] = queue.SimpleQueue()
        for _ in range(stages):
            self.free_streams.put([torch.cuda.Stream(gpu) for gpu in gpus])

        # The model calls `enter_stage` just before the first layer of each further stage.
        for stage, start in enumerate(starts, start=1):
            hook = functools.partial(self.enter_stage, stage)
            find_part(model, start).register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Let the forward pass of a batch, made in this context, wait for each stage to be free.

        Its results must be read in the context too, while the batch has its streams.
        """
        self.locks[0].acquire()
        self.local.stage = 0
        self.local.streams = self.free_streams.get()
        try:
            with contextlib.ExitStack() as current_streams:
                # The stream entered last decides the thread's device: it must be the first stage's.
                for stream in reversed(self.local.streams):
                    current_streams.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            # `enter_stage` has moved the batch on. After an error it may be in any of the stages.
            self.free_streams.put(self.local.streams)
            self.locks[self.local.stage].release()
            self.local.stage = None

    def enter_stage(self, stage: int, *_) -> None:
        """Wait until a stage is free, move this thread's batch on to it, and free the one before."""
        previous_stage = getattr(self.local, "stage", None)
        is_outside_of_forward_pass = previous_stage is None
        if is_outside_of_forward_pass:
            return

        # Python runs ahead of the device. The stage before is free once its device is done.
        self.locks[stage].acquire()
        if self.local.streams:
            self.local.streams[previous_stage].synchronize()
        self.locks[previous_stage].release()
        self.local.stage = stage


def find_part(model: torch.nn.Module, part_name: str) -> torch.nn.Module:
    """Find a part of a model by its name, to which PEFT adds a prefix."""
    for name, module in model.named_modules():
        if f".{name}".endswith(f".{part_name}"):
            return module
    raise LookupError(f"the model has no part {part_name}")


def stage_starts(device_map: Mapping[str, str]) -> list[str]:
    """List the first layer on each device but the first, by a device_map in the order of the layers."""
    layer_names = [part_name for part_name in device_map if LAYER.search(part_name)]
    starts = []
    for previous_name, layer_name in itertools.pairwise(layer_names):
        if device_map[layer_name] != device_map[previous_name]:
            starts.append(layer_name)
    return starts


if __name__ == "__main__":
    run_kernel(SETTINGS)
    leave()
