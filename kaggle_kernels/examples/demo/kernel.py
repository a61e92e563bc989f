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
import warnings
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
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils import logging as transformers_logging
from transformers.utils.quantization_config import QuantizationConfigMixin

# ================================================================================================
# settings.py
#
# What a spec asks of the kernel, the clock that it keeps to, and its log.
# ================================================================================================

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
    build: str = ""  # a hash of the kernel's text, by which its outputs are recognised

    def time_limit(self, rows: int) -> float:
        """Return the seconds that the kernel may take for a test file of so many rows."""
        return find_time_limit(self.time_limits, rows)


def find_time_limit(time_limits: Sequence[TimeLimit], rows: int) -> float:
    """Return the seconds of the first limit that holds for so many rows; they ascend by rows."""
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
    build="057417d417b64774",
)


# ================================================================================================
# main.py
#
# The kernel from beginning to end: inputs, checks, scores, submission.
#
# Every check that needs no device comes before the first model is loaded. Written to /kaggle/working:
# submission.csv, scores.parquet, kernel.json.
# ================================================================================================

TEST_FILES = ("test.parquet", "test.csv")
LIBRARIES = ("torch", "transformers", "tokenizers", "safetensors")


def run_kernel(settings: Settings, devices: Sequence[str] | None = None) -> None:
    """Score the test file and write the submission.

    The hidden run always submits: a row that could not be scored gets the prior. Only what shows
    that answers would be wrong ends it. In the visible run every shortfall is an error.
    """
    began = time.monotonic()
    root = kaggle_root()
    hidden_run = is_hidden_run()
    devices = list(devices or list_devices())

    # An earlier run's submission must not pass for that of a run that fails.
    (root / "working" / "submission.csv").unlink(missing_ok=True)

    # The time limit depends on the number of rows.
    test_file = find_mounted(root, settings.competition, TEST_FILES, "competitions")
    rows = read_rows(test_file, settings.texts_are_turns)
    clock = start_clock(settings.time_limit(len(rows)), began)
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    log(clock, f"{settings.name}: {versions}")
    counting_rows = sum(row["counts"] for row in rows)
    log(clock, f"{test_file}: {len(rows)} rows, {counting_rows} of them count")

    # What is there to score them with. Golden rows show where a machine gives wrong answers.
    served, packages = read_packages(root, settings, clock)
    with log_errors_of_hidden_run(clock):
        install_missing_wheels(root, packages, settings.wheels)
        check_machine(packages, devices, clock)
    visible = choose_visible_rows(root, settings, packages)
    if visible.log_line:
        log(clock, visible.log_line)

    # The hours of work.
    all_rows = [*rows, *visible.rows]
    board = make_board(served, packages, all_rows, devices, clock, hidden_run)
    with log_errors_of_hidden_run(clock):
        score_all(board)
    scored = board.probabilities()

    # From here on a row without a score has the prior.
    counts = count_rows(rows, scored)
    shortfall = describe_shortfall(counts, settings.min_scored)
    if shortfall is not None:
        if not hidden_run:
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
        "clock_seconds": settings.time_limit(len(rows)),
        "versions": versions,
        **counts,
        "shortfall": shortfall,
    }
    with log_errors_of_hidden_run(clock):
        write_records(root / "working", board, visible, final, record)


def write_records(
    folder: Path,
    board: Board,
    visible: VisibleRows,
    final: Mapping[str, list[float]],
    record: dict,
) -> None:
    """Write scores.parquet and kernel.json, which no score depends on."""
    scored = board.probabilities()
    verdicts = board.inputs.settings.verdicts
    write_scores(folder / "scores.parquet", verdicts, final, scored, board.model_columns())
    if visible.rows:
        record["visible"] = report_visible_run(board, visible, scored)
    write_record(folder / "kernel.json", record | describe_run(board))


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
    for number, package_settings in enumerate(settings.packages):
        # One package less costs some accuracy, no package at all the submission.
        try:
            dataset = package_settings.dataset
            folder = find_mounted(root, dataset, ("manifest.json",), "datasets").parent
            package = read_package(folder)
            check_verdicts(package, package_settings)
        except Exception as error:
            is_last_chance = not packages and number == len(settings.packages) - 1
            if is_last_chance or not is_hidden_run():
                raise
            log(clock, f"{package_settings.run}: left out: {type(error).__name__}: {error}")
            continue

        golden_rows = len(package.contract.golden)
        log(clock, f"{folder}: files, tokenizer and {golden_rows} golden rows are as packaged")
        kept_settings.append(package_settings)
        packages.append(package)
    return replace(settings, packages=tuple(kept_settings)), packages


def check_verdicts(package: Package, package_settings: PackageSettings) -> None:
    """Raise PackageError where the order of the verdicts is not the recipe's.

    The logits of one verdict would be taken for those of another.
    """
    if package.contract.verdicts != package_settings.verdicts:
        raise PackageError(
            f"{package.folder}/contract.json: verdicts: found {package.contract.verdicts}, the "
            f"recipe of {package_settings.run} says {package_settings.verdicts}; package the run "
            "again, or build the kernel again from the recipe that it was trained with"
        )


def describe_run(board: Board) -> dict:
    """Describe what the kernel did, for kernel.json."""
    inputs, progress = board.inputs, board.progress
    manifests = {}
    for package_settings, package in zip(inputs.settings.packages, inputs.packages, strict=True):
        manifests[package_settings.dataset] = hash_file(package.folder / "manifest.json")
    return {
        "manifests": manifests,
        "devices": list(inputs.devices.values()),
        "hidden_run": inputs.hidden_run,
        "passes": progress.passes,
        "seconds": round(inputs.clock.elapsed(), 1),
    }


def report_visible_run(
    board: Board, visible: VisibleRows, scored: Mapping[str, list[float]]
) -> dict:
    """Log what the visible run measured, and return it for kernel.json."""
    inputs, progress = board.inputs, board.progress
    report: dict = {"rows": len(visible.rows), "predicted": []}
    if not visible.trained_on:
        report["quality"] = measure_quality(visible, inputs.settings.verdicts, scored)
        if report["quality"]["judged"]:
            log(inputs.clock, describe_quality(report["quality"]))

    # What is not spent on batches is spent once, however many rows there are.
    started_seconds = inputs.clock.elapsed() - sum(record["seconds"] for record in progress.passes)
    for rows in inputs.settings.hidden_rows:
        finish = predict_finish(progress.passes, started_seconds, rows)
        report["predicted"].append(finish)
        clock = start_clock(inputs.settings.time_limit(rows))
        log(inputs.clock, describe_finish(finish, clock.deadline - clock.began))
    return report


# ================================================================================================
# scheduling/schedule.py
#
# From packages and rows to scores: one pass after another, each planned when the one before ended.
#
# main.run_kernel calls `score_all`. Models run one after the other, each on all devices. The first
# order of the first model goes over all rows and may use the whole clock: a row with one score is
# worth more than a second one. What comes then, the second order and further models, is decided by
# `plan_next_pass`, with what was measured so far: see plan.py. Rows that count on the current
# leaderboard go through all of this alone; the others get what time is left.
# ================================================================================================

Scores = dict[str, dict[str, list[float]]]  # by id, then by order
Key = tuple[int, str]  # a package's number in the spec, and an order
PADDING = 1.03  # what batches compute beyond their rows' tokens, while nothing is measured
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
    hidden_run: bool


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
class Board:
    """The state of the run."""

    inputs: Inputs
    progress: Progress
    measured: Measurements

    def orders(self, number: int) -> tuple[str, ...]:
        """List the orders worth scoring with a package."""
        return orders_of(self.inputs.contracts[number], self.inputs.settings.orders)

    def unscored(self, key: Key, group: Sequence[str]) -> list[str]:
        """List those rows of a group that a pass has still to score."""
        tried = self.progress.tried.get(key, set())
        return [row_id for row_id in group if row_id not in tried]

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


def make_board(
    settings: Settings,
    packages: Sequence[Package],
    rows: Sequence[Mapping],
    devices: Sequence[str],
    clock: Clock,
    hidden_run: bool,
) -> Board:
    """Make a board on which nothing is scored yet. The devices share the CPU's cores evenly."""
    counting: list[str] = []
    others: list[str] = []
    for row in rows:
        group = counting if row["counts"] else others
        group.append(row["id"])

    # A spec may have another token budget than training.
    contracts = [package.contract for package in packages]
    if settings.budget_tokens is not None:
        budget_tokens = settings.budget_tokens
        contracts = [replace(contract, budget_tokens=budget_tokens) for contract in contracts]

    threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
    inputs = Inputs(
        settings=settings,
        packages=packages,
        contracts=contracts,
        rows=rows,
        row_groups=[group for group in (counting, others) if group],
        devices=dict(enumerate(devices)),
        threads=threads,
        clock=clock,
        hidden_run=hidden_run,
    )

    progress = Progress(
        scores=[{row["id"]: {} for row in rows} for _ in packages],
        packages=list(range(len(packages))),
        devices=dict(inputs.devices),
    )
    return Board(inputs, progress, Measurements())


def score_all(board: Board) -> None:
    """Make pass after pass until nothing is left or nothing more fits the clock.

    In the hidden run a package that fails is left out while another one works.
    """
    loaded: int | None = None
    workers: list[Worker] = []
    try:
        while next_pass := plan_next_pass(board, loaded, workers):
            try:
                # Two models do not fit one GPU: the old one goes before the new one comes.
                if next_pass.package != loaded:
                    retire(board, workers)
                    workers = start_team(board, next_pass.package)
                    loaded = next_pass.package
                score_pass(board, next_pass, workers)
            except (PackageError, LoadError) as error:
                retire(board, workers)
                loaded = None
                leave_out(board, next_pass.package, error)
    finally:
        retire(board, workers)


def leave_out(board: Board, number: int, error: Exception) -> None:
    """Go on without a package; in the visible run, or where no package has worked, raise its error."""
    board.progress.packages.remove(number)
    another_works = bool(board.progress.packages or board.progress.passes)
    if not board.inputs.hidden_run or not another_works:
        raise error
    log(board.inputs.clock, f"{board.inputs.packages[number].folder.name}: left out: {error}")


def plan_next_pass(board: Board, loaded: int | None, workers: Sequence[Worker]) -> NextPass | None:
    """Decide what to do next: rows that count come first, the others get what time is left."""
    # Workers are gone for good once they died too often; no plan brings them back.
    all_gone = bool(workers) and all(worker.gone for worker in workers)
    if all_gone:
        log(board.inputs.clock, "no device is left; rows without a score get the prior")
    if all_gone or not board.progress.packages or board.inputs.clock.left() <= 0:
        return None

    # Nothing of the others before all of those that count.
    for group in board.inputs.row_groups:
        # The first pass measures the tokens of all its rows: one row shows whether it was made.
        if group[0] in board.measured.tokens:
            next_pass = plan_further_pass(board, group, loaded)
        else:
            next_pass = plan_first_pass(board, group, loaded)
        if next_pass is not None:
            return next_pass
    return None


def plan_first_pass(board: Board, group: Sequence[str], loaded: int | None) -> NextPass:
    """Plan one order of all rows of a group, with the model that is there or the spec's first."""
    packages = board.progress.packages
    number = loaded if loaded in packages else packages[0]
    order = board.orders(number)[0]
    return NextPass(number, order, frozenset(group), board.inputs.clock.deadline)


def plan_further_pass(board: Board, group: Sequence[str], loaded: int | None) -> NextPass | None:
    """Share the time that is left among all passes that a group could still have; take the first."""
    options = make_options(board, group, loaded)
    if not options:
        return None
    clock, metric = board.inputs.clock, board.inputs.settings.metric
    tokens = board.measured.tokens
    shares = allocate(options, board.probabilities(), tokens, clock.left(), metric)
    log_plan(board, shares)

    # An option without rows gets no time.
    planned = [share for share in shares if share.row_ids]
    if not planned:
        return None
    first, *later = planned

    # The pass must leave the time for those planned after it.
    package = first.option.package
    deadline = clock.deadline - count_seconds(later, package)
    return NextPass(package, first.option.order, frozenset(first.row_ids), deadline)


def count_seconds(shares: Sequence[Share], loaded: int) -> float:
    """Count the seconds of shares: their scoring, and loading each package but the loaded one once."""
    seconds = 0.0
    loaded_packages = {loaded}
    for share in shares:
        seconds += share.seconds
        if share.option.package not in loaded_packages:
            loaded_packages.add(share.option.package)
            seconds += share.option.load_seconds
    return seconds


def make_options(board: Board, group: Sequence[str], loaded: int | None) -> list[Option]:
    """List every pass that has rows of the group left, those of the loaded model first."""
    # Loading takes long: the model that is there comes first.
    packages = sorted(board.progress.packages, key=lambda number: number != loaded)
    options = []
    for number in packages:
        for order in board.orders(number):
            unscored = board.unscored((number, order), group)
            if unscored:
                option = make_option(board, (number, order), unscored, is_loaded=number == loaded)
                options.append(option)
    return options


def make_option(board: Board, key: Key, unscored: list[str], is_loaded: bool) -> Option:
    """Describe a pass by what it should change, and by the seconds that it should take."""
    number, order = key
    settings, packages = board.inputs.settings, board.inputs.packages
    progress, measured = board.progress, board.measured

    # What it should change. CHANGE_OF_MODEL is that of one of two models of equal weight.
    total_weight = sum(settings.packages[other].weight for other in progress.packages)
    relative_weight = settings.packages[number].weight / total_weight
    is_new_model = not any(progress.tried.get((number, other)) for other in board.orders(number))
    typical_change = 2 * CHANGE_OF_MODEL if is_new_model else CHANGE_OF_ORDER
    change = typical_change * relative_weight

    # Before a package has run, its speed follows from another one's and the parameters of both.
    rate = measured.rates.get(number, 0.0)
    if measured.rates and not rate:
        other, other_rate = next(iter(measured.rates.items()))
        rate = other_rate * flop_per_token(packages[other]) / flop_per_token(packages[number])
    seconds_per_token = PADDING / rate if rate else 0.0

    # All devices load from one disk, so that further copies take time as well.
    copies = len(progress.devices)
    if settings.packages[number].placement == "split":
        copies = 1
    load_seconds = 0.0
    if not is_loaded:
        load_seconds = loading_seconds(packages[number], copies)
    return Option(number, order, change, seconds_per_token, load_seconds, unscored)


def log_plan(board: Board, shares: Sequence[Share]) -> None:
    """Log what a plan does with the seconds that are left."""
    parts = []
    for share in shares:
        name = f"{board.inputs.packages[share.option.package].folder.name} {share.option.order}"
        rows = f"{len(share.row_ids)} of {len(share.option.unscored)} rows"
        parts.append(f"{name} {rows} in {share.seconds:.1f} s")
    clock = board.inputs.clock
    log(clock, f"plan: {clock.left():.1f} s left: {'; '.join(parts)}")


def start_team(board: Board, number: int) -> list[Worker]:
    """Start workers for a package on the devices that are not gone."""
    inputs, devices = board.inputs, board.progress.devices
    package, settings = inputs.packages[number], inputs.settings
    package_settings = settings.packages[number]

    # The layers of a split model were placed for all of the devices.
    is_incomplete = package_settings.placement == "split" and len(devices) < len(inputs.devices)
    if not devices or is_incomplete:
        raise LoadError(f"{package.folder}: no device is left for it")
    return start_workers(
        package, package_settings, devices, settings.tokens_per_batch, inputs.threads, inputs.clock
    )


def retire(board: Board, workers: list[Worker]) -> None:
    """End the workers; devices that are gone leave the board.

    Where no worker could load the package, that is the package's fault and the devices stay.
    """
    any_loaded = any(worker.load_seconds for worker in workers)
    for worker in workers:
        worker.stop()
        if worker.gone and any_loaded:
            for position in worker.positions:
                board.progress.devices.pop(position, None)
    workers.clear()


def score_pass(board: Board, next_pass: NextPass, workers: Sequence[Worker]) -> None:
    """Score the rows of a pass and note the result on the board."""
    number, order = next_pass.package, next_pass.order
    package, clock = board.inputs.packages[number], board.inputs.clock
    label = f"{package.folder.name}, {order}"

    # The rows of the first pass are encoded here while the workers load.
    requests = encode_rows(board.inputs, next_pass)
    tokens = sum(request.tokens for request in requests)
    log(clock, f"{label}: {len(requests)} rows encoded, {tokens} tokens")

    work = make_pass(label, requests, next_pass.deadline, workers)
    work = run_pass(work, workers, clock)
    if all(worker.gone and not worker.load_seconds for worker in workers):
        raise LoadError(f"{package.folder}: no device could load it")
    note_pass(board, (number, order), work, requests, workers)


def encode_rows(inputs: Inputs, next_pass: NextPass) -> list[Request]:
    """Encode the rows of a pass by the package's own model_input."""
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
            spare_tokens_of(package.manifest),
        )

        # Four bytes for each token id, since there are millions of them.
        for request in requests:
            sequences = tuple(array("i", ids) for ids in request.sequences)
            encoded.append(replace(request, sequences=sequences))
    return encoded


def note_pass(
    board: Board, key: Key, work: Pass, requests: Sequence[Request], workers: Sequence[Worker]
) -> None:
    """Put a pass's scores on the board, and what was measured."""
    number, order = key
    progress, measured = board.progress, board.measured
    for row_id, values in work.scores.items():
        progress.scores[number][row_id][order] = values

    # Rows that the pass left are tried again, unless nothing came of any: that would never end.
    finished = {request.id for request in requests}
    if work.scores or all(worker.gone for worker in workers):
        for batch in work.queue:
            finished.difference_update(request.id for request in batch)
    progress.tried.setdefault(key, set()).update(finished)

    # What ends workers in one order would do so in the other.
    for any_order in board.orders(number):
        progress.tried.setdefault((number, any_order), set()).update(work.given_up)

    for request in requests:
        measured.tokens.setdefault(request.id, request.tokens)
    rate = sum(worker.rate() for worker in workers if not worker.gone)
    if rate:
        measured.rates[number] = rate

    # kernel.json keeps a record of every pass.
    run = board.inputs.settings.packages[number].run
    progress.passes.append({"run": run, "order": order, **pass_record(work)})


def combine(
    settings: Settings, packages: Sequence[Package], scores: Iterable[Scores]
) -> dict[str, list[float]]:
    """Combine the packages' scores to probabilities of the competition's verdicts, by id.

    Orders are averaged, then packages by weight, then the temperature is applied.
    """
    # A row has as many opinions as packages have scored it.
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
#
# One order of one package: batches dealt to workers until none is left or the deadline is near.
#
# schedule.make_next_pass calls `make_pass` and `run_pass`. What can happen to a batch on its way:
#     out of memory      its worker's token budget is halved, and the batch cut and tried again; a
#                        row that was alone is tried again at the end (`try_alone`)
#     its worker dies    the worker is started again, or given up with its device; its rows go back to
#                        the queue, those that it was scoring one by one at the end, in case that one
#                        of them killed it (`handle_worker_death`)
#     its worker hangs   the worker is killed, which is a death like others (`check_is_alive`)
#     the clock ends     the batch stays in the queue (`next_batch`)
# A row without a score is simply not in the result, and the caller decides what that means.
# ================================================================================================

GIVEN_UP_AFTER = 3  # tries of a row that ended its worker, or its memory
QUIET_SECONDS = 300.0  # many times what a batch takes on a T4: then a worker hangs
LOAD_PATIENCE_SECONDS = 1800.0
LOGGED_SHARE = 0.05  # of a pass's rows: progress is logged whenever so many more are scored


@dataclass
class Pass:
    """The queue of batches, the probabilities by id, and what there is to tell of both."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    rows: int
    all_tokens: int = 0  # of the queue at the beginning, padding included
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
        self.all_tokens = sum(map(padded_tokens, self.queue))

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
    """Make a pass over rows."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    batches = make_batches(requests, tokens_per_batch)
    return Pass(label, deque(batches), deadline, rows=len(requests))


def run_pass(work: Pass, workers: Sequence[Worker], clock: Clock) -> Pass:
    """Work through the queue; PackageError where the last worker refuses the package."""
    batches = "1 batch" if len(work.queue) == 1 else f"{len(work.queue)} batches"
    log(clock, f"{work.label}: {work.rows} rows in {batches}")

    # Workers that died late in the pass before may not have been restarted.
    for worker in workers:
        if not worker.process and not worker.gone and time.monotonic() < work.deadline:
            worker.launch()

    while True:
        for worker in workers:
            feed(work, worker, workers)

        # A worker that still loads is waited for while there is work for it.
        alive = [worker for worker in workers if worker.process]
        may_start = bool(work.queue) and time.monotonic() < work.deadline
        busy = []
        for worker in alive:
            if worker.outstanding or (may_start and not worker.loaded):
                busy.append(worker)
        if not busy:
            break

        # Wait for any message, but look after the workers every second.
        by_connection = {worker.connection: worker for worker in alive}
        for connection in wait(list(by_connection), timeout=1.0):
            receive(work, by_connection[connection], workers, clock)
        for worker in busy:
            check_is_alive(work, worker, clock)
        log_progress(work, workers, clock)

    log(clock, f"{work.label}: {progress_line(work, workers)}")
    return work


def feed(work: Pass, worker: Worker, workers: Sequence[Worker]) -> None:
    """Give a worker what it can score at once, and one batch more that lies ready in the pipe."""
    while worker.loaded and len(worker.outstanding) <= worker.batches_at_once:
        batch = next_batch(work, worker, workers)
        if batch is None:
            return

        # Loading is over: the pass's speed counts from here.
        if work.began is None:
            work.began = time.monotonic()
        worker.send(batch)


def next_batch(work: Pass, worker: Worker, workers: Sequence[Worker]) -> list[Request] | None:
    """Take the next batch within the worker's token budget that it can end before the deadline."""
    seconds_left = work.deadline - time.monotonic()
    if not work.queue or seconds_left <= 0:
        return None

    # Long rows stand first. Where time is short, they are left for the end: more rows get a score.
    short_rows_first = work.seconds_left(workers) > seconds_left
    whole_batch = work.queue.pop() if short_rows_first else work.queue.popleft()

    # The worker's budget may have shrunk since the batches were made.
    parts = make_batches(whole_batch, worker.tokens_per_batch)
    batch = None
    if worker.seconds_until_scored(parts[0]) <= seconds_left:
        batch = parts.pop(0)

    # What is not taken goes back to the same end.
    if short_rows_first:
        work.queue.extend(parts)
    else:
        work.queue.extendleft(reversed(parts))
    return batch


def receive(work: Pass, worker: Worker, workers: Sequence[Worker], clock: Clock) -> None:
    """Read one message of a worker (worker.py lists them), or notice its death."""
    try:
        kind, *message = worker.connection.recv()
    except (EOFError, OSError):
        # The pipe closes before the exit code is there.
        worker.process.join(timeout=5)
        exit_code = worker.process.exitcode
        return handle_worker_death(work, worker, f"died (exit code {exit_code})", clock)

    if kind == "loaded":
        worker.note_loaded(*message)
        log(
            clock,
            f"{worker.name}: loaded in {worker.load_seconds:.0f} s in {worker.loaded['dtype']}; "
            f"golden probabilities differ by at most {worker.loaded['worst']:.1e}",
        )
    elif kind == "scored":
        number, scores = message
        note_scores(work, worker.note_scored(number), scores)
    elif kind == "out of memory":
        batch = worker.note_out_of_memory(*message)
        log(clock, f"{worker.name}: out of memory: {worker.tokens_per_batch} tokens a batch now")
        # The budget is smaller than this batch, so next_batch cuts it in parts.
        if len(batch) > 1:
            work.queue.appendleft(batch)
        else:
            try_alone(work, batch, clock)
    elif kind == "refused":
        # One device alone may be faulty; the last one has nobody to contradict it.
        [reason] = message
        if all(other.gone for other in workers if other is not worker):
            raise PackageError(reason)
        reason = f"refuses the package, which another device may not: {reason}"
        handle_worker_death(work, worker, reason, clock)
    else:
        [reason] = message
        handle_worker_death(work, worker, f"failed: {reason.strip()}", clock)


def try_alone(work: Pass, batch: list[Request], clock: Clock) -> None:
    """Put rows that failed at the end of the queue, each alone, or give them up."""
    for request in batch:
        work.failed_tries[request.id] += 1
        if work.failed_tries[request.id] < GIVEN_UP_AFTER:
            work.queue.append([request])
        else:
            work.given_up.append(request.id)
            log(clock, f"row {request.id} is given up")


def handle_worker_death(work: Pass, worker: Worker, why: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and restart it or give its device up.

    No process is started that the clock has no time to load.
    """
    log(clock, f"{worker.name}: {why}")

    # Any of the rows that it was scoring may have killed it. What only lay ready has not.
    being_scored, ready = worker.note_death()
    work.queue.extendleft(reversed(ready))
    for batch in being_scored:
        try_alone(work, batch, clock)

    if worker.gone:
        outcome = f"gone after {worker.fruitless} deaths without a score in between"
    elif work.deadline - time.monotonic() <= worker.load_seconds:
        outcome = "not started again, the clock has no time to load it"
    else:
        worker.launch()
        outcome = f"started again, {worker.tokens_per_batch} tokens a batch"
    log(clock, f"{worker.name}: {outcome}")


def check_is_alive(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that has said nothing for far too long, or works on into the reserve."""
    if not worker.process:
        return

    patience = QUIET_SECONDS if worker.loaded else LOAD_PATIENCE_SECONDS
    # The reserve is for writing the submission.
    now = time.monotonic()
    if worker.outstanding and now > clock.deadline + clock.reserve_seconds / 3:
        patience = 0
    quiet_seconds = now - worker.last_event
    if quiet_seconds > patience:
        reason = f"killed: it said nothing for {quiet_seconds:.0f} s"
        handle_worker_death(work, worker, reason, clock)


def note_scores(work: Pass, batch: list[Request], scores: BatchScores) -> None:
    """Keep a batch's probabilities by id; those that are not finite count as not scored."""
    work.computed_tokens += padded_tokens(batch)
    work.tokens += sum(request.tokens for request in batch)
    work.overflowed += scores.overflowed
    for request, probabilities in zip(batch, scores.probabilities, strict=True):
        if all(map(math.isfinite, probabilities)):
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
#
# The workers as the kernel's own process sees them: started, given batches, killed, restarted.
#
# A worker that dies is started again with half its token budget, which stays halved. One that dies
# FRUITLESS_DEATHS times without a scored batch in between is given up: its device is gone, and the
# others go on without it. pass_runner.handle_worker_death decides what becomes of its rows.
# ================================================================================================

FRUITLESS_DEATHS = 3
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
    fruitless: int = 0  # deaths without a score in between

    @property
    def batches_at_once(self) -> int:
        """How many batches it scores at the same time: one for each stage of a split model."""
        return self.loaded["batches_at_once"] if self.loaded else 1

    def rate(self) -> float:
        """Return tokens a second, from what it has done; 0 before its first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def seconds_until_scored(self, batch: list[Request]) -> float:
        """Predict how long a batch takes behind those that it has; 0 before its first one."""
        if not self.rate():
            return 0.0
        tokens = padded_tokens(batch) + sum(map(padded_tokens, self.outstanding.values()))
        return tokens / self.rate()

    def launch(self) -> None:
        """Start the process, which loads the model."""
        self.loaded = None
        self.last_event = time.monotonic()
        self.process, self.connection = self.start(self.task)

    def send(self, batch: list[Request]) -> None:
        """Give it a batch; if it has died meanwhile, whoever reads from it will notice."""
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
        self.fruitless = 0
        return batch

    def note_out_of_memory(self, number: int) -> list[Request]:
        """Lower the token budget to half of a batch that was too large, and return it."""
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

        # Only now: a stopped worker no longer knows its batches_at_once.
        self.stop()

        # It may have died of a lack of memory that was never reported.
        self.tokens_per_batch = max(self.tokens_per_batch // 2, 1)

        # A row that is scored alone may be what kills the worker. It will be given up in the
        # worker's place, so that such a death does not count against the worker.
        only_single_rows = all(len(batch) == 1 for batch in being_scored)
        if not being_scored or not only_single_rows:
            self.fruitless += 1
        self.gone = self.fruitless >= FRUITLESS_DEATHS
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
    # A worker for each group of devices.
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
#
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
# ================================================================================================

GOLDEN_TOLERANCE = (
    0.05  # float16 and 4-bit kernels differ between devices by up to 0.02; a wrong head by far more
)
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
    """Load, then score until the other end of the pipe is closed or something fails."""
    began = time.monotonic()
    first_device = task.devices[0]
    try:
        # Else libraries that ask for no device take memory of the first GPU.
        if first_device.startswith("cuda"):
            torch.cuda.set_device(first_device)
        package = open_package(Path(task.folder))
        model, stages = load_on(package, task.devices, task.weight_bytes_limit)
        worst_difference = check_golden_scores(package, model, first_device)
    except (PackageError, FloatingPointError) as error:
        return tell(connection, "refused", f"{type(error).__name__}: {error}")
    except Exception:
        return tell(connection, "failed", traceback.format_exc())

    # Only now can it be given batches.
    batches_at_once = len(stages.locks) if stages else 1
    facts = {
        "dtype": str(model.dtype),
        "batches_at_once": batches_at_once,
        "worst": worst_difference,
        "seconds": time.monotonic() - began,
    }
    tell(connection, "loaded", facts)

    def score_requests(requests):
        pass_context = stages.forward_pass if stages else contextlib.nullcontext

        # Each thread has a current device of its own.
        on_device = contextlib.nullcontext()
        if first_device.startswith("cuda"):
            on_device = torch.cuda.device(first_device)
        with on_device:
            return score_batch(
                model, package.model_input, package.contract, requests, first_device, pass_context
            )

    serve(connection, score_requests, batches_at_once)


def open_package(folder: Path) -> Package:
    """Open a package whose files were checked before (see package.read_package)."""
    model_input = execute_model_input(folder / "model_input.py")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    contract = model_input.read_contract(folder)
    return Package(folder, contract, manifest, model_input, read_tokenizer(folder))


def load_on(
    package: Package, devices: tuple[str, ...], weight_bytes_limit: int | None = None
) -> tuple[torch.nn.Module, Stages | None]:
    """Load the model on a device, or split over several, then with its stages."""
    if len(devices) == 1:
        return load_model(package.folder, package.contract, devices[0]), None
    device_map = split_over(package.folder, devices, weight_bytes_limit)
    model = load_model(package.folder, package.contract, devices[0], device_map=device_map)
    return model, Stages(model, stage_starts(device_map), devices)


def check_golden_scores(package: Package, model: torch.nn.Module, device: str) -> float:
    """Score the golden rows, and compare them with the manifest's probabilities."""
    contract = package.contract

    # A golden row is scored as any other, by the code of the kernel.
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


def serve(connection, score_requests, batches_at_once: int) -> None:
    """Score what comes in until the pipe is closed, or until something fails."""
    # Two threads that read or write at once would mix their messages.
    receiving = threading.Lock()
    sending = threading.Lock()

    def score_until_closed():
        while True:
            try:
                with receiving:
                    number, requests = connection.recv()
            except (EOFError, OSError):
                return

            answer = answer_batch(number, requests, score_requests)
            with sending:
                tell(connection, *answer)

            # A CUDA error stays with its process: the other end will start a new one.
            if answer[0] == "failed":
                return

    threads = []
    for _ in range(batches_at_once):
        thread = threading.Thread(target=score_until_closed, daemon=True)
        thread.start()
        threads.append(thread)
    for thread in threads:
        thread.join()


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
    """Tell whether a batch of so many rows was too large.

    PyTorch says so of its own memory, CUDA's libraries only in words. By those, a row that is alone
    is no batch to be cut; only a new process may help it.
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    has_words = any(words in str(error) for words in MEMORY_WORDS)
    return rows > 1 and (has_words or isinstance(error, MemoryError))


def tell(connection, *message) -> None:
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
#
# Shares out the seconds that are left: which rows get the second order, and which a further model.
#
# schedule.plan_next_pass decides with it, after every pass, which pass comes next. An option is one
# more pass of a package in an order. It changes a probability by some amount, of standard deviation
# s. Its expected gain is that of the knowledge gradient (Frazier, Powell and Dayanik 2008):
# 2 (s φ(m/s) − m Φ(−m/s)), with m half the lead of the first verdict over the second. A row near the
# line between two verdicts gains most, one far from it nothing. For log loss it is s² (1 − Σp²), for
# the Brier score s² Σ p² (1 − 2p + Σp²), by the independent changes of a row's logits.
#
# Rows are taken by their gain per second until the seconds are used. Which further models are worth
# their loading is tried out.
# ================================================================================================

# An assumption without a published source. A kernel's log says how long its loading took.
LOAD_BYTES_PER_SECOND = 3e8

# The change of a probability (sd) by a second order or model.
CHANGE_OF_ORDER = 0.06
CHANGE_OF_MODEL = 0.1

# Of a row while no speed is measured: gains are divided by it.
SHORTEST_SECONDS = 1e-9


@dataclass(frozen=True)
class Option:
    """One more pass that could be made: a package in an order."""

    package: int  # its number in the spec
    order: str
    change: float  # standard deviation of what it changes in a probability
    seconds_per_token: float
    load_seconds: float = 0.0  # 0 where its model is loaded
    unscored: Sequence[str] = ()  # ids of the rows that it would score


@dataclass(frozen=True)
class Offer:
    """One row of an option, which is named by its place."""

    option_place: int
    row_id: str
    gain: float
    seconds: float


@dataclass(frozen=True)
class Share:
    """What an option gets of the clock."""

    option: Option
    row_ids: list[str]
    seconds: float  # for these rows, without loading


def allocate(
    options: Sequence[Option],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    metric: str,
) -> list[Share]:
    """Share the seconds that are left out among options: rows of most gain per second first."""
    offers = make_offers(options, probabilities, tokens, metric)
    packages = list(dict.fromkeys(option.package for option in options))

    # A further model must be worth its loading: with the first package, with the first two, …
    best_gain = -1.0
    best_shares: list[Share] = []
    for count in range(1, len(packages) + 1):
        gain, shares = allocate_to(packages[:count], options, offers, seconds)
        if gain > best_gain:
            best_gain, best_shares = gain, shares
    return best_shares


def make_offers(
    options: Sequence[Option],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    metric: str,
) -> list[Offer]:
    """List every unscored row of every option, by gain per second; equal ones keep their order."""
    offers = []
    for place, option in enumerate(options):
        for row_id in option.unscored:
            gain = expected_gain(probabilities.get(row_id), option.change, metric)
            seconds = max(tokens[row_id] * option.seconds_per_token, SHORTEST_SECONDS)
            offers.append(Offer(place, row_id, gain, seconds))
    return sorted(offers, key=lambda offer: offer.gain / offer.seconds, reverse=True)


def allocate_to(
    packages: Collection[int], options: Sequence[Option], offers: Sequence[Offer], seconds: float
) -> tuple[float, list[Share]]:
    """Take the best offers of these packages that fit the seconds left after loading."""
    # A package has several options, but is loaded once.
    load_seconds = {}
    for option in options:
        if option.package in packages:
            load_seconds[option.package] = option.load_seconds
    seconds_left = seconds - sum(load_seconds.values())

    total_gain = 0.0
    row_ids: list[list[str]] = [[] for _ in options]
    seconds_used = [0.0] * len(options)
    for offer in offers:
        place = offer.option_place
        # A row too long for what is left does not keep shorter ones behind it out.
        if options[place].package not in packages or offer.seconds > seconds_left:
            continue
        seconds_left -= offer.seconds
        seconds_used[place] += offer.seconds
        total_gain += offer.gain
        row_ids[place].append(offer.row_id)

    shares = []
    for place, option in enumerate(options):
        shares.append(Share(option, row_ids[place], seconds_used[place]))
    return total_gain, shares


def expected_gain(values: Sequence[float] | None, change: float, metric: str) -> float:
    """Compute what one more opinion on a row is expected to bring."""
    # A first score is worth more than any second opinion.
    if values is None:
        return 1.0

    # The expected drop of log loss or of the Brier score, to second order.
    sum_of_squares = sum(value**2 for value in values)
    if metric == "log_loss":
        return change**2 * (1 - sum_of_squares)
    if metric == "brier_score":
        return change**2 * sum(value**2 * (1 - 2 * value + sum_of_squares) for value in values)

    # The verdict flips where the change exceeds half of its lead.
    second, first = sorted(values)[-2:]
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
    """Predict how long loading copies of a package takes, one after the other."""
    weight_bytes = sum(size for size, _ in weight_sizes(package.folder).values())
    return copies * weight_bytes / LOAD_BYTES_PER_SECOND


def is_multiplied(name: str) -> bool:
    """Tell whether every token is multiplied with a tensor.

    That is no embedding, no lm_head (last places only), no norm, bias or scale.
    """
    is_matrix = name.endswith((".weight", ".qweight"))
    return is_matrix and not any(part in name.lower() for part in ("embed", "lm_head", "norm"))


# ================================================================================================
# inputs.py
#
# What Kaggle mounted: test rows, packages, wheels.
#
# Files are found by searching: the layout of /kaggle/input has changed before and differs between
# runs. WSDM's texts are strings; LMSYS's are JSON lists of turns with nulls.
# ================================================================================================

TEXTS = ("prompt", "response_a", "response_b")
SCORED = "scored"  # WSDM's column: whether the row counts on the current leaderboard


def kaggle_root() -> Path:
    """Return /kaggle, or the folder that KAGGLE_ROOT names in its place for a rehearsal."""
    return Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))


def find_mounted(root: Path, slug: str, names: Sequence[str], kind: str) -> Path:
    """Find a file of the dataset or competition `slug`, wherever that is mounted."""
    inputs = root / "input"
    for name in names:
        paths = []
        for path in sorted(inputs.rglob(name)):
            # A dataset may have the slug of the competition that it was made for.
            mount, *deeper_folders = path.relative_to(inputs).parts[:-1] or ("",)
            is_other_kind = mount in ("datasets", "competitions") and mount != kind
            if slug in (mount, *deeper_folders) and not is_other_kind:
                paths.append(path)

        # The same file may be mounted twice.
        if len(paths) == 1 or len({hash_file(path) for path in paths}) == 1:
            return paths[0]
        if paths:
            break

    # Say what there is, so that a wrong slug shows.
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


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """Read the test rows."""
    rows = []
    for file_row in read_table(path, ("id", *TEXTS, SCORED)):
        row = {"id": file_row["id"], "counts": is_counted(file_row.get(SCORED))}
        for name in TEXTS:
            row[name] = read_text(file_row[name], are_turns)
        rows.append(row)
    return rows


def is_counted(scored: object) -> bool:
    """Tell whether a row counts, from its value in the column `scored`: unless that says no.

    Values may be true and false, 1 and 0, or these as text; a null or no such column says nothing.
    """
    return str(scored).strip().lower() not in ("false", "0", "0.0")


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
    """Read a text; with `are_turns`, the turns in its JSON list, or a text that is none."""
    if not are_turns or not isinstance(value, str):
        return value

    # LMSYS's files hold nulls, and texts that merely look like JSON.
    try:
        turns = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value

    if isinstance(turns, list):
        return [None if turn is None else str(turn) for turn in turns]
    return None if turns is None else value


def install_missing_wheels(root: Path, packages: Sequence[Package], wheels: str | None) -> None:
    """Install bitsandbytes where a package needs it and the image lacks it."""
    formats = {package.manifest["quantize"] for package in packages}
    is_needed = not formats.isdisjoint(("nf4", "int8"))
    # An image that has the library keeps its own.
    if not is_needed or importlib.util.find_spec("bitsandbytes"):
        return
    if wheels is None:
        raise ModuleNotFoundError(
            "a package is quantised with bitsandbytes, which is absent; "
            "name a dataset in the spec's `wheels`"
        )

    # No network: pip installs from the mounted folder alone.
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",), "datasets").parent
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--find-links", str(folder), "bitsandbytes"], check=True)
    importlib.invalidate_caches()


# ================================================================================================
# package.py
#
# A package is read and checked before any device is touched: every byte, every golden token id.
#
# Raises PackageError where a package is not the one that was made; ContractError comes from the package's own model_input.py.
# ================================================================================================

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
    """Read a package and check it: file hashes, contract, tokenizer and golden token ids, in this order."""
    folder = Path(folder)
    manifest = check_manifest(folder)

    # The contract names what decides a model's input, so that a new manifest cannot hide a change.
    model_input_path = folder / "model_input.py"
    model_input = execute_model_input(model_input_path)
    contract = model_input.read_contract(folder)
    check_hash(model_input_path, contract.model_input_sha256, "contract.json")
    for name, sha256 in contract.tokenizer_sha256.items():
        check_hash(folder / name, sha256, "contract.json")

    # Another version of the tokenizers library may encode otherwise.
    tokenizer = read_tokenizer(folder)
    model_input.check_golden(tokenizer, contract)
    return Package(folder, contract, manifest, model_input, tokenizer)


def check_manifest(folder: Path) -> dict:
    """Parse manifest.json, once every file that it lists has the bytes that it lists, and none is there besides."""
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
    return manifest


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
            f"{path}: its SHA-256 is {sha256[:12]}…, {source} says {expected[:12]}…; the file has changed"
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
#
# What must hold before hours of work begin: libraries that read the packages rightly, and GPUs.
#
# What would make answers wrong, or could only end in a crash, is a MachineError that says what to do.
# No GPU is touched here: nvidia-smi is asked.
# ================================================================================================

ASK_CAPABILITIES = ("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
ASK_SECONDS = 30
EXPECTED_GPUS = 2  # machine_shape NvidiaTeslaT4
OLDEST_CAPABILITY = 7.0  # a P100 has 6.0, and the image's PyTorch no code for it


class MachineError(RuntimeError):
    """This machine, or what is installed on it, cannot do the work."""


def check_machine(packages: Sequence[Package], devices: Sequence[str], clock: Clock) -> None:
    """Check the installed transformers for each package, and the GPUs."""
    transformers_version = importlib.metadata.version("transformers")
    for package in packages:
        check_transformers(package, transformers_version)

    is_rehearsal = "KAGGLE_ROOT" in os.environ
    uses_gpus = any(device.startswith("cuda") for device in devices)
    if uses_gpus or not is_rehearsal:
        check_gpus(devices, ask_capabilities())
    if uses_gpus and len(devices) < EXPECTED_GPUS:
        log(clock, f"warning: {len(devices)} GPU where {EXPECTED_GPUS} were expected")


def check_transformers(package: Package, installed: str) -> None:
    """Raise MachineError where the installed transformers would misread a package.

    An older major version reads a newer configuration without complaint and ignores what it does
    not know: version 5 writes rope_parameters, without which version 4 gives every model the same
    rotary base.
    """
    config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
    trained_with = package.contract.recorded.get("versions", {})
    saved_by = config.get("transformers_version") or trained_with.get("transformers")
    if saved_by and major_version(installed) < major_version(saved_by):
        raise MachineError(
            f"{package.folder.name}: saved by transformers {saved_by}, which version {installed} "
            "here would read wrongly; choose the newest environment for the kernel"
        )


def major_version(version: str) -> int:
    """Return the first number of a version."""
    return int(version.split(".")[0])


def check_gpus(devices: Sequence[str], capabilities: Sequence[float]) -> None:
    """Raise MachineError where there is no GPU, or one too old for Kaggle's PyTorch."""
    if not any(device.startswith("cuda") for device in devices):
        raise MachineError(
            "PyTorch finds no GPU, and CPUs would take days; set machine_shape to NvidiaTeslaT4 "
            "and enable_gpu to true in kernel-metadata.json, or choose GPU T4 x2 in the editor, "
            "and look whether the week's GPU hours are spent"
        )

    # An older GPU fails at the first kernel that PyTorch starts.
    if capabilities and min(capabilities) < OLDEST_CAPABILITY:
        raise MachineError(
            f"a GPU has compute capability {min(capabilities)}, Kaggle's PyTorch needs "
            f"{OLDEST_CAPABILITY} or more; set machine_shape to NvidiaTeslaT4 in "
            "kernel-metadata.json, or choose GPU T4 x2 in the editor"
        )


def ask_capabilities() -> list[float]:
    """Ask nvidia-smi for the GPUs' compute capabilities; none where it cannot say."""
    try:
        done = subprocess.run(
            ASK_CAPABILITIES, capture_output=True, text=True, timeout=ASK_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [float(line) for line in re.findall(r"^\d+\.\d+$", done.stdout, re.MULTILINE)]


# ================================================================================================
# visible.py
#
# The visible run is a load test: it also scores rows of the competition's train file.
#
# They are validation rows that every package lists, so that accuracy means what it will mean in the
# hidden run, and enough to predict from their speed when 10,000 and 25,000 rows will be done.
# ================================================================================================

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
    log_line: str = ""  # what was chosen, or why nothing was


def choose_visible_rows(root: Path, settings: Settings, packages: Sequence[Package]) -> VisibleRows:
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
        return VisibleRows(log_line=f"visible run: only test rows are scored: {error}")

    # Rows that a model knows say nothing of its accuracy.
    trained_on = any(listing["trained_on"] for listing in listings)
    log_line = f"visible run: {len(train_rows)} rows of {file.name} are scored too"
    if trained_on:
        log_line += "; a model was trained on them: they tell of speed only"

    # They look like rows of the test file.
    rows = []
    winners = {}
    for train_row in train_rows:
        row = {"id": TRAIN_PREFIX + train_row["id"], "counts": True}
        for name in TEXTS:
            row[name] = read_text(train_row[name], settings.texts_are_turns)
        rows.append(row)
        winners[row["id"]] = read_winner(train_row, settings)
    return VisibleRows(tuple(rows), winners, trained_on, log_line)


def read_train_rows(file: Path, settings: Settings, listings: Sequence[Mapping]) -> list[dict]:
    """Read as many rows of the train file as the spec wants, of those in every listing."""
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

    # A fair sample, whatever the file's order.
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return rows[: settings.visible_rows]


def read_winner(row: Mapping, settings: Settings) -> str | None:
    """Read a train row's verdict from a column with its name, or from one flag a verdict."""
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
    """Measure the final probabilities over the scored rows that have one of `verdicts`."""
    right_rows = []
    losses = []
    brier_scores = []
    for row_id, winner in visible.winners.items():
        if row_id not in scored or winner not in verdicts:
            continue
        values = scored[row_id]
        place = verdicts.index(winner)
        right_rows.append(values.index(max(values)) == place)
        losses.append(-math.log(values[place]))

        # Σ (p − y)², where y is 1 for the winner and else 0.
        sum_of_squares = sum(value**2 for value in values)
        brier_scores.append(sum_of_squares - 2 * values[place] + 1)

    judged = len(right_rows)
    if not judged:
        return {"judged": 0}

    # The standard error is that of a share.
    accuracy = sum(right_rows) / judged
    return {
        "judged": judged,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": sum(losses) / judged,
        "brier_score": sum(brier_scores) / judged,
    }


def predict_finish(passes: Sequence[Mapping], started_seconds: float, rows: int) -> dict:
    """Predict when so many rows will be done, at the speed of the visible run."""
    # The first pass of its kind has all the rows that count.
    seconds_per_row: dict[tuple[str, str], float] = {}
    for record in passes:
        if record["scored"]:
            seconds = record["seconds"] / record["scored"]
            seconds_per_row.setdefault((record["run"], record["order"]), seconds)

    first_order, *others = seconds_per_row.values()
    return {
        "rows": rows,
        "first_order_seconds": round(started_seconds + rows * first_order),
        "all_seconds": round(started_seconds + rows * (first_order + sum(others))),
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
    """Write a line for the log: one prediction, a warning where rows will be left to the prior."""
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
#
# From probabilities to a submission that is whole: every id once, in the test file's order.
# ================================================================================================

# No probability is nearer to 0 or 1: log loss would punish it without end.
SMALLEST = 1e-6

# By the number of verdicts: longer, shorter, tie. The longer one wins 62 % of human verdicts.
PRIOR = {2: (0.6, 0.4), 3: (0.45, 0.25, 0.3)}


def to_competition(
    values: Sequence[float], model_verdicts: Sequence[str], verdicts: Sequence[str]
) -> list[float]:
    """Bring a model's probabilities into the order of the competition's verdicts.

    The probability of a verdict that the competition does not know is shared out.
    """
    kept = [values[model_verdicts.index(verdict)] for verdict in verdicts]
    total = sum(kept)
    if total == 0:  # the model is sure of a tie
        return [1 / len(kept)] * len(kept)
    return [value / total for value in kept]


def weighted_mean(values: Sequence[Sequence[float]], weights: Sequence[float]) -> list[float]:
    """Average the models' probabilities of a row; the weights need not sum to one."""
    total_weight = sum(weights)
    mean = [0.0] * len(values[0])
    for opinion, weight in zip(values, weights, strict=True):
        for place, probability in enumerate(opinion):
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
    """Give every row probabilities, in the rows' order: its score, or else the prior."""
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
    """Write id and the winner, or its probabilities. Where ids are wrong, no file is left."""
    with whole_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *settings.columns])
            for row_id, values in final.items():
                answer = values
                if settings.answer == "winner":
                    answer = [settings.verdicts[values.index(max(values))]]
                writer.writerow([row_id, *answer])

        # What stands in the file is checked, not what was meant to.
        check_ids(temporary, ids)


def check_ids(path: Path, ids: Sequence[str]) -> None:
    """Raise ValueError unless a submission has every id of the test file once, in its order."""
    with path.open(encoding="utf-8", newline="") as file:
        _header, *lines = csv.reader(file)
    written_ids = [line[0] for line in lines]
    for place, (written, expected) in enumerate(itertools.zip_longest(written_ids, ids), start=1):
        if written != expected:
            raise ValueError(
                f"{path}: its {len(written_ids)} ids are not the test file's {len(ids)} ids in "
                f"their order: row {place} has {written!r}, expected {expected!r}"
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
    """Write scores.parquet with every probability.

    Its columns are id, `scored` (else the row has the prior), p_VERDICT as submitted, and what each
    model gave, null where it did not score the row.
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
#
# Pairs in, probabilities out, the same whatever else is in the batch; everything is joined by id, never by position.
# ================================================================================================

ORDERS = ("as_given", "swapped")

# The order of a reward model's two sequences.
REWARD_SIDES = ("model_a", "model_b")

# What a forward pass costs beside its tokens, in tokens, by the package's quantisation: weights are unpacked in each pass.
SPARE_TOKENS = {"none": 32, "int8": 32, "nf4": 128, "gptq8": 256, "gptq4": 512}
DEFAULT_SPARE_TOKENS = 128


@dataclass(frozen=True)
class Request:
    """One pair to be scored: the pair `id`, with its responses in `order`, as one sequence, or for the reward head two."""

    id: str
    order: str
    sequences: tuple[list[int], ...]
    spare_tokens: int = DEFAULT_SPARE_TOKENS

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


def spare_tokens_of(manifest: Mapping[str, object]) -> int:
    """The padding that a package's forward passes may hold, by the quantisation that its manifest names."""
    return SPARE_TOKENS.get(manifest["quantize"], DEFAULT_SPARE_TOKENS)


def orders_of(contract, orders: Iterable[str]) -> tuple[str, ...]:
    """List the orders worth scoring: a reward model sees each response alone, so that its second order is its first."""
    if contract.head == "reward":
        return ORDERS[:1]
    return tuple(orders)


def padded_tokens(batch: Sequence[Request]) -> int:
    """Count the tokens that are computed for a batch, padding included."""
    lengths = []
    for request in batch:
        lengths += map(len, request.sequences)

    # Each group is a forward pass of its own, padded to its first sequence.
    tokens = 0
    for places in group_by_length(lengths, batch[0].spare_tokens):
        longest = lengths[places[0]]
        tokens += longest * len(places)
    return tokens


def group_by_length(
    lengths: Sequence[int], spare_tokens: int = DEFAULT_SPARE_TOKENS
) -> list[list[int]]:
    """Group sequences of like length, each group to be one forward pass."""
    groups: list[list[int]] = []
    padding = 0
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        # A row is padded to the longest of its group, which is the group's first.
        if groups:
            padding += lengths[groups[-1][0]] - lengths[place]
        if not groups or padding > spare_tokens:
            groups.append([])
            padding = 0
        groups[-1].append(place)
    return groups


def make_requests(
    model_input: ModuleType,
    tokenizer,
    contract,
    pairs: Sequence,
    orders: Iterable[str],
    spare_tokens: int = DEFAULT_SPARE_TOKENS,
) -> list[Request]:
    """Make the requests for `pairs` in `orders`, encoded by the package's own model_input."""
    requests = []
    for order in orders:
        ordered_pairs = pairs
        if order == "swapped":
            ordered_pairs = [model_input.swap(pair) for pair in pairs]
        encoded = model_input.encode_all(list(ordered_pairs), tokenizer, contract)
        for pair, sequences in zip(pairs, encoded, strict=True):
            requests.append(Request(pair.id, order, sequences, spare_tokens))
    return requests


def make_batches(requests: Iterable[Request], tokens_per_batch: int) -> list[list[Request]]:
    """Make batches of requests of like length, longest first, so that one too large for memory shows at once.

    A batch, padded, holds at most `tokens_per_batch` tokens; a request that is longer than that is a batch of its own.
    """
    batches: list[list[Request]] = []
    # The id decides between equals, so that the batches are the same in every run.
    ordered = sorted(requests, key=lambda request: (-request.length, request.id, request.order))
    for request in ordered:
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
    """Compute the probabilities of a batch in its own orders, float32 of shape (requests, verdicts)."""
    sequences = []
    for request in batch:
        sequences += request.sequences
    spare_tokens = batch[0].spare_tokens  # one package's requests have the same
    logits_bv = verdict_logits(model, contract, sequences, device, pass_context, spare_tokens)

    # What cancels the position bias of a base model that was not trained.
    if contract.logit_bias:
        logits_bv = logits_bv + torch.tensor(contract.logit_bias)
    return logits_bv.softmax(-1)


def verdict_logits(
    model: torch.nn.Module,
    contract,
    sequences: Sequence[list[int]],
    device: str,
    pass_context=contextlib.nullcontext,
    spare_tokens: int = DEFAULT_SPARE_TOKENS,
) -> torch.Tensor:
    """Compute the verdicts' logits of one sequence a request, for the reward head of two.

    Sequences of like length go through the model together: a pair's two responses, which are not, each with others.
    """
    rows = [torch.empty(0)] * len(sequences)
    lengths = [len(ids) for ids in sequences]
    for places in group_by_length(lengths, spare_tokens):
        group = [sequences[place] for place in places]
        with pass_context():
            outputs_bu = read_head(model, contract, group, device).float().cpu()
        for place, row in zip(places, outputs_bu, strict=True):
            rows[place] = row

    logits = torch.stack(rows)
    if contract.head != "reward":
        return logits

    # A pair's two rewards are its two logits: Bradley and Terry's model.
    sides = [REWARD_SIDES.index(verdict) for verdict in contract.verdicts]
    return logits.view(-1, 2)[:, sides]


def read_head(
    model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str
) -> torch.Tensor:
    """Run the model over sequences, padded on the right, and read its head at one place of each."""
    is_causal_lm = contract.head == "label_tokens"
    is_decoder = is_causal_lm or getattr(model, "causal", False)
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id)
    inputs = {"input_ids": ids_bt.to(device)}

    # What a decoder reads never sees the padding behind it, so that only an encoder needs a mask.
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
    """Pick the label tokens' logits at the place that is read, where a causal LM has computed more.

    With take_shortcuts it computes no more, unless an adapter is on its output layer.
    """
    if logits_btv.shape[1] > 1:
        rows_b = torch.arange(len(places_b), device=logits_btv.device)
        logits_bv = logits_btv[rows_b, places_b.to(logits_btv.device)]
    else:
        logits_bv = logits_btv[:, 0]

    if logits_bv.shape[-1] > len(label_token_ids):
        return logits_bv[:, list(label_token_ids)]
    return logits_bv


def list_read_places(contract, sequences: Sequence[list[int]], is_decoder: bool) -> list[int]:
    """List the place of each sequence that its head reads."""
    if contract.head == "label_tokens":
        return [len(ids) - 1 for ids in sequences]
    if is_decoder:
        return [find_last_token(ids, contract.pad_token_id) for ids in sequences]
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
    requests = make_requests(model_input, tokenizer, contract, pairs, distinct_orders)
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    overflowed = 0
    for batch in make_batches(requests, tokens_per_batch):
        batch_scores = score_batch(model, model_input, contract, batch, device)
        overflowed += batch_scores.overflowed
        for request, values in zip(batch, batch_scores.probabilities, strict=True):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(
                    f"row {request.id}, {request.order}: probabilities {values} in {model.dtype}"
                )
            equal_orders = orders if distinct_orders != orders else [request.order]
            scores[request.id] |= dict.fromkeys(equal_orders, values)

    if overflowed:
        warnings.warn(
            f"{overflowed} of {len(requests)} sequences overflowed float16 and were computed again in float32, "
            "which takes a T4 eight times as long",
            stacklevel=2,
        )
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
#
# The model of a package, loaded so that it answers as it did in training: pad id, attention and soft-cap from the contract.
# ================================================================================================

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
        config.quantization_config = unpacking(quantised)

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
    """Name the fastest implementation of attention that the architecture has; a soft cap has only transformers' eager one."""
    model_class = CLASSES[contract.head]._model_mapping[type(config)]
    if contract.softcap or not model_class._supports_sdpa:
        return "eager"
    if not model_class._supports_attention_backend:
        return "sdpa"
    return SDPA


def add_adapter(
    model: torch.nn.Module, lora_config_path: Path, lora_path: Path, dtype: torch.dtype
) -> tuple[torch.nn.Module, set[str]]:
    """Put a LoRA adapter that was not merged on a model, in `dtype`."""
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

    # Else keys and values are kept for a generation that never comes: 2.8 GB of Gemma-2-9b.
    config.use_cache = False

    # Training may have left the soft cap of attention out, for the sake of SDPA.
    if not contract.softcap and hasattr(config, "attn_logit_softcapping"):
        config.attn_logit_softcapping = None
    return config


# ================================================================================================
# models/overflow.py
#
# A float16 model computed in float32, for the rows that overflow float16.
#
# Some inputs drive activations of Qwen2.5 and Gemma-2 beyond 65,504; such a row ends as NaN. scoring.score_batch
# then computes it again in the context `ComputeInFloat32()`. The weights stay in float16; those of one layer at a
# time are converted.
# ================================================================================================

FLOAT16_MAX = torch.finfo(torch.float16).max

# These functions want input and weights in one dtype.
WITH_WEIGHTS = (layer_norm, linear, rms_norm)

# bitsandbytes' first step of an int8 product, which takes float16 only.
QUANTISE_TO_INT8 = "bitsandbytes.int8_vectorwise_quant.default"


class ComputeInFloat32(TorchFunctionMode):
    """In this thread, hidden states stay float32 from layer to layer, whatever the dtype of the weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call `function` so that no float16 comes of float32: PyTorch hands all its functions to this."""
        kwargs = kwargs or {}

        # Hidden states are float32 and the weights float16: the weights follow.
        if function in WITH_WEIGHTS:
            args = [to_float32(value) for value in args]
            kwargs = {name: to_float32(value) for name, value in kwargs.items()}
            return function(*args, **kwargs)

        # The int8 kernel of bitsandbytes reads float16 only, in which a larger number is infinite.
        if str(function) == QUANTISE_TO_INT8:
            hidden, *others = args
            hidden = hidden.clamp(-FLOAT16_MAX, FLOAT16_MAX).half()
            return function(hidden, *others, **kwargs)

        # bitsandbytes and PEFT convert a layer's input to the dtype of its weights, where it would
        # overflow again: the input stays as it is.
        result = function(*args, **kwargs)
        if function is torch.Tensor.to and result.dtype is torch.float16:
            return args[0] if args[0].dtype is torch.float32 else result
        return result


def to_float32(value):
    """Convert a float16 tensor; anything else stays as it is."""
    if isinstance(value, torch.Tensor) and value.dtype is torch.float16:
        return value.float()
    return value


# ================================================================================================
# models/shortcuts.py
#
# What scoring can leave out without another answer: work for tokens that nobody reads, and attention's slow kernel.
#
# A head reads one token of a row: a decoder's last one, an encoder's first. In the last layer all tokens are needed for the
# attention's keys and values, but what comes after it only for the token that is read: hooks on its output projection and
# its MLP hand on that token alone. What they give, one token wide, is added to the residual of all tokens by broadcasting,
# which is right in the one place that is read. Of a causal LM's output layer only the rows of the label tokens are kept.
# ================================================================================================

# The name under which transformers finds repeated_attention.
SDPA = "sdpa_repeated"

# Encoders whose head reads nothing but the first token.
READ_FIRST_TOKEN = ("bert", "deberta-v2")

# What comes after the attention in a layer, by the names of decoders, then of BERT.
AFTER_ATTENTION = ("self_attn.o_proj", "mlp", "attention.output.dense", "intermediate")

# The places read in the batch of this thread: a split model has a batch in each of several threads.
BEING_READ = threading.local()


def repeated_attention(module, query_bhtd, key_bhtd, value_bhtd, attention_mask, scaling=None, **_):
    """PyTorch's attention with keys and values repeated for every head of their group.

    transformers' own leaves the groups to PyTorch where there is no mask (`enable_gqa`). Only FlashAttention on a GPU can
    do that: on a T4, which has none, and on a CPU the unfused kernel is taken instead.
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
    """Have `model` compute no more than what is read in `reading`, and say whether it is `causal`.

    Outside of `reading` it computes all tokens.
    """
    attentions = [module for module in model.modules() if hasattr(module, "is_causal")]
    model.causal = bool(attentions) and all(module.is_causal for module in attentions)

    fuse_elementwise(model)
    if label_token_ids:
        keep_label_rows(model, label_token_ids)

    # Architectures name the parts after the attention differently: a layer has some of these names.
    if model.causal or model.config.model_type in READ_FIRST_TOKEN:
        last_layer = layer_list(model)[-1]
        for name in AFTER_ATTENTION:
            with contextlib.suppress(AttributeError):
                last_layer.get_submodule(name).register_forward_pre_hook(keep_read_tokens)


def keep_label_rows(model: torch.nn.Module, label_token_ids: Sequence[int]) -> None:
    """Have a causal LM compute logits of the label tokens only, at the place of each row that is read.

    An output layer that has an adapter on it stays whole.
    """
    output_layer = model.get_output_embeddings()
    if type(output_layer) is torch.nn.Linear:
        # The head of a model that is split need not stand where the hidden states come out.
        last_device = next(layer_list(model)[-1].parameters()).device
        output_layer = LabelHead(output_layer, label_token_ids, last_device)
        model.set_output_embeddings(output_layer)
    output_layer.register_forward_pre_hook(keep_read_tokens)


@contextlib.contextmanager
def reading(places_b: torch.Tensor) -> Iterator[None]:
    """In this thread, a forward pass is only read at one place of each row."""
    BEING_READ.places_b = places_b
    try:
        yield
    finally:
        BEING_READ.places_b = None


def keep_read_tokens(_, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """A forward pre-hook: of the hidden states (rows, tokens, width) the read token of each row, (rows, 1, width)."""
    places_b = getattr(BEING_READ, "places_b", None)
    if places_b is None:
        return None

    hidden_btd, *others = args
    rows_b = torch.arange(len(places_b), device=hidden_btd.device)
    read_bd = hidden_btd[rows_b, places_b.to(hidden_btd.device)]
    return (read_bd.unsqueeze(1), *others)


# ================================================================================================
# models/fused.py
#
# Norms, rotary positions and gated activations in fewer passes over memory than transformers' own chains of operations.
#
# A T4 spends a tenth of a Gemma-2 forward in them. They are replaced when a model is loaded, for the architectures below;
# others are left alone.
# ================================================================================================

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
    """Replace the elementwise operations of a model whose architecture is known."""
    model_type = model.config.model_type
    if model_type not in NORM_OFFSETS:
        return

    for name, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(name, fuse_norm(module, NORM_OFFSETS[model_type]))
        elif name.endswith(".mlp") and hasattr(module, "gate_proj"):
            model.set_submodule(name, GatedMlp(module))

    # The attention of an architecture finds this function in the module that defines it.
    if model_type not in PARTLY_ROTATED:
        architecture = sys.modules[type(layer_list(model)[0]).__module__]
        architecture.apply_rotary_pos_emb = rotate_queries_and_keys


def fuse_norm(norm: torch.nn.Module, offset: float) -> torch.nn.RMSNorm:
    """Make PyTorch's own RMSNorm, one kernel on a GPU, of an architecture's."""
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
    lists = [module for module in model.modules() if isinstance(module, torch.nn.ModuleList)]
    return max(lists, key=count_parameters)


def count_parameters(module: torch.nn.Module) -> int:
    """Count the parameters of a module and of all modules in it."""
    return sum(parameter.numel() for parameter in module.parameters())


# ================================================================================================
# models/gptq.py
#
# GPTQ packages without GPTQ's libraries: linear layers that unpack their 4 or 8 bits for each matrix product.
#
# Kaggle's image has none of them, and none can be taken there: gptqmodel is a source distribution that wants a newer
# transformers and compiles its CUDA kernels at first use.
#
# The file format is the standard one (checkpoint_format gptq). qweight and qzeros are int32 words, lowest bits first, of
# qweight along the inputs, of qzeros along the outputs, each zero less one.
# ================================================================================================

# The name that transformers knows these classes by; its own loader of gptq wants the libraries.
UNPACKING = "gptq_unpacked"

# A linear layer elsewhere, such as the head, is not quantised.
IN_LAYER = re.compile(r"\.\d+\.")


class GptqLinear(torch.nn.Module):
    """A linear layer of (outputs, inputs), each row in groups of `group_size` weights with one float16 scale.

    It is loaded in the format's own layout. `prepare` then turns words, zeros and scales once into the layout of a weight.
    """

    def __init__(self, linear_layer: torch.nn.Linear, bits: int, group_size: int):
        super().__init__()
        self.bits = bits
        self.group_size = group_size
        self.bias = linear_layer.bias

        # Tensors under the names and in the shapes of the file format.
        outputs, inputs = linear_layer.out_features, linear_layer.in_features
        groups = inputs // group_size
        codes_in_word = 32 // bits
        self.register_buffer(
            "qweight", torch.zeros(inputs // codes_in_word, outputs, dtype=torch.int32)
        )
        self.register_buffer(
            "qzeros", torch.zeros(groups, outputs // codes_in_word, dtype=torch.int32)
        )
        self.register_buffer("scales", torch.zeros(groups, outputs, dtype=torch.float16))

        # Of each input its group, which is its place // group_size: nothing was reordered.
        self.register_buffer("g_idx", torch.zeros(inputs, dtype=torch.int32))

    def prepare(self) -> None:
        """Turn the loaded tensors, once, into the layout that each matrix product needs.

        The file has inputs along the rows, a weight has outputs there. So all three are transposed:
        words (outputs, inputs / codes in a word), zeros and scales (outputs, groups, 1).
        """
        words_ui = self.qweight.T.clone(memory_format=torch.contiguous_format)

        # The format stores the number that stands for a weight of 0, minus one.
        stored_zeros_qu = unpack(self.qzeros, self.bits)
        zeros_uq = stored_zeros_qu.T + 1
        scales_uq = self.scales.T.contiguous()

        # With a last axis of one, a zero and a scale count for all inputs of their group.
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
    """Unpack the codes in int32 words, which stand lowest bits first."""
    bytes_ri = words.contiguous().view(torch.uint8)
    if bits == 8:
        return bytes_ri

    # Two codes share a byte, the first one in its lower half.
    codes = torch.stack((bytes_ri & 15, bytes_ri >> 4), dim=-1)
    return codes.flatten(-2)


class UnpackingConfig(QuantizationConfigMixin):
    """What a GPTQ package's config.json says, as far as loading needs it."""

    def __init__(self, bits: int, group_size: int, **_):
        self.quant_method = UNPACKING
        self.bits = bits
        self.group_size = group_size


class UnpackingQuantizer(HfQuantizer):
    """Tells transformers to put a GptqLinear in the place of every linear layer of a layer before it reads weights."""

    requires_calibration = True

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

    @property
    def is_trainable(self) -> bool:
        """No: what is loaded here is served."""
        return False


def unpacking(settings: Mapping[str, object]) -> dict[str, object]:
    """Rewrite config.json's `quantization_config` as from_pretrained must get it."""
    if UNPACKING not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(UNPACKING)(UnpackingConfig)
        register_quantizer(UNPACKING)(UnpackingQuantizer)
    return {
        "quant_method": UNPACKING,
        "bits": settings["bits"],
        "group_size": settings["group_size"],
    }


# ================================================================================================
# models/placement.py
#
# Which part of a model stands on which device, where one device cannot hold it: layers in their order, work in balance.
#
# A split model runs at the speed of its slower device. Its layers are shared out evenly, as far as the devices' memory allows;
# embedding and head hardly compute, but take memory. The build places a model by the same functions (postprocess.memory).
# Nothing here needs torch: sizes come from the headers of the package's safetensors files.
# ================================================================================================

# The name of a tensor in one of several modules of a list.
NUMBERED = re.compile(r"^(.+?)\.(\d+)\.")

# The name of a part that is a layer.
LAYER = re.compile(r"\.\d+$")


@dataclass(frozen=True)
class Part:
    """A layer, or a module beside the layers: its bytes, and its weights that are multiplied with every token."""

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
    """List a model's parts in the order in which a row passes through them, by bytes and elements of each tensor."""
    layers = find_layers(sizes)
    parts: dict[str, Part] = {}
    for name, (size_bytes, elements) in sizes.items():
        # Outside of the layers there is hardly work: embeddings are looked up, a head reads one token.
        work = 0
        if name.startswith(f"{layers}."):
            work = elements

        part_name = name_part(name, layers)
        part = parts.get(part_name, Part())
        parts[part_name] = Part(part.size_bytes + size_bytes, part.work + work)

    ordered_names = sorted(parts, key=lambda name: part_order(name, layers))
    return {name: parts[name] for name in ordered_names}


def name_part(tensor_name: str, layers: str) -> str:
    """Name the module that a tensor belongs to: a layer, or the largest module that holds no layer."""
    path = tensor_name.split(".")
    layers_path = layers.split(".")
    shared_path = os.path.commonprefix([path, layers_path])
    return ".".join(path[: len(shared_path) + 1])


def part_order(part_name: str, layers: str) -> tuple[int, int]:
    """Sort parts: embedding, layers by number, norm, head."""
    if part_name.startswith(f"{layers}."):
        return (1, int(part_name.rpartition(".")[2]))
    if "embed" in part_name:
        return (0, 0)
    if "norm" in part_name.lower():
        return (2, 0)
    return (3, 0)


def balance(parts: Sequence[Part], devices: int, byte_limit: int | None = None) -> list[int]:
    """Place parts on devices, neighbours together."""
    # There are few ways to cut some dozens of layers in two: all are tried.
    all_cuts = itertools.combinations(range(1, len(parts)), devices - 1)
    best_cuts = min(all_cuts, key=lambda cuts: rate_cuts(parts, cuts, byte_limit))

    numbers = []
    for device, stage in enumerate(cut_parts(parts, best_cuts)):
        numbers += [device] * len(stage)
    return numbers


def rate_cuts(
    parts: Sequence[Part], cuts: Sequence[int], byte_limit: int | None
) -> tuple[int, int, int]:
    """Rate a placement, the best one lowest: bytes over the limit, then most work, then most bytes."""
    stages = cut_parts(parts, cuts)
    most_bytes = max(sum(part.size_bytes for part in stage) for stage in stages)
    most_work = max(sum(part.work for part in stage) for stage in stages)

    # Memory comes first: a split that does not fit is of no use, however fast.
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
    """Make transformers' device_map for the model in `folder`, its layers over all `devices`.

    Positions are computed beside the embedding; a head that is the embedding itself stays with it.
    """
    sizes = weight_sizes(folder)
    parts = list_parts(sizes)
    numbers = balance(list(parts.values()), len(devices), byte_limit)
    device_map = {}
    for part_name, number in zip(parts, numbers, strict=True):
        device_map[part_name] = devices[number]

    # What holds no weights, or those of another part, is not in the files.
    layers = find_layers(sizes)
    device_map[f"{layers.rpartition('.')[0]}.rotary_emb"] = devices[0]
    last_part = list(parts)[-1]
    if part_order(last_part, layers) == (2, 0):  # the norm: there is no head
        device_map["lm_head"] = devices[0]
    return device_map


# ================================================================================================
# models/pipeline.py
#
# A split model has a batch in flight on each of its devices: while the second computes one, the first has the next.
#
# A stage is the layers on one device. A batch leaves its stage once the device has computed it and the next stage is free, so
# that there is one batch in a stage at most, and a device holds the intermediates of one batch only.
#
# Each batch in flight has a CUDA stream of its own on every device. PyTorch's copy from one GPU to another makes the current
# streams of both wait for each other, and accelerate copies masks and positions anew for every layer of a later stage: on one
# stream, the first GPU's next batch would stand in the queue behind copies that wait for the second GPU.
# ================================================================================================


class Stages:
    """The stages of a split model, entered by forward hooks on the first part of each device.

    `devices` are the stages' devices; those that are GPUs get a stream for each batch in flight.
    """

    def __init__(self, model: torch.nn.Module, starts: Sequence[str], devices: Sequence[str] = ()):
        self.locks = [threading.Lock() for _ in range(1 + len(starts))]

        # The stage and the streams of the batch that this thread computes.
        self.local = threading.local()

        # A set of streams for each batch in flight, taken by one batch after the other.
        gpus = [device for device in devices if device.startswith("cuda")]
        self.streams: queue.SimpleQueue[list] = queue.SimpleQueue()
        for _ in self.locks:
            self.streams.put([torch.cuda.Stream(gpu) for gpu in gpus])

        for stage, start in enumerate(starts, 1):
            hook = functools.partial(self.enter_stage, stage)
            find_part(model, start).register_forward_pre_hook(hook)

    @contextlib.contextmanager
    def forward_pass(self) -> Iterator[None]:
        """Let the forward pass of one batch inside go through the stages.

        Results must be read inside of this context, while the batch has its streams. A forward pass
        outside of it takes no locks.
        """
        # Wait until the first stage is free; enter_stage moves the batch on to the others.
        self.locks[0].acquire()
        self.local.stage = 0
        self.local.streams = self.streams.get()
        try:
            with contextlib.ExitStack() as current_streams:
                # The stream entered last decides the thread's device: it must be the first stage's.
                for stream in reversed(self.local.streams):
                    current_streams.enter_context(torch.cuda.stream(stream))
                yield
        finally:
            # After an error the batch may be in any of the stages.
            self.streams.put(self.local.streams)
            self.locks[self.local.stage].release()
            self.local.stage = None

    def enter_stage(self, stage: int, *_) -> None:
        """Move this thread's batch on to a stage, and free the one before.

        The model calls this as a hook, just before the first layer of the stage.
        """
        previous_stage = getattr(self.local, "stage", None)
        if previous_stage is None:  # outside of `forward_pass`
            return

        # Python is ahead of the device: a stage is free only once its device has done its work.
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
    starts = []
    previous_device = None
    for part_name, device in device_map.items():
        if not LAYER.search(part_name):
            continue
        # The first part of the first device begins no stage that a batch would have to wait for.
        if previous_device not in (None, device):
            starts.append(part_name)
        previous_device = device
    return starts


if __name__ == "__main__":
    run_kernel(SETTINGS)
    leave()
