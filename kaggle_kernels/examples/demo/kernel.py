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
import resource
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.nn.functional import layer_norm, linear, rms_norm, scaled_dot_product_attention
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
    Verdicts, in the order of the logits, and model_type are the recipe's: a package that says
    otherwise is refused. Another base_model is only logged. A model that is split puts no more than
    `weight_bytes_limit` on a GPU, which leaves room for a batch.
    """

    run: str
    dataset: str
    weight: float
    placement: str
    verdicts: tuple[str, ...]
    base_model: str
    model_type: str
    weight_bytes_limit: int | None = None


@dataclass(frozen=True)
class TimeLimit:
    """Seconds that a kernel may take for a test file of up to so many rows; None: of any more."""

    rows: int | None
    seconds: float


@dataclass(frozen=True)
class Settings:
    """A spec, checked by `build`."""

    name: str
    competition: str  # Kaggle's slug
    columns: tuple[str, ...]  # of the submission, besides id
    verdicts: tuple[str, ...]  # what the competition tells apart
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
    columns=("winner",),
    verdicts=("model_a", "model_b"),
    packages=(
        PackageSettings(
            run="demo",
            dataset="pairwise-demo",
            weight=1.0,
            placement="each",
            verdicts=("model_a", "model_b"),
            base_model="outputs/demo/input/gemma2",
            model_type="gemma2",
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
    build="5cd7837814c25d75",
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
    """Write scores.parquet and kernel.json, which no score depends on."""
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
    """Find and check the spec's packages. In the hidden run one that fails is left out."""
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
    proven: set[int] = field(default_factory=set)  # positions of devices that had a model
    # Rows that need no further try: in a pass, or with a package in any order.
    tried: dict[Key, set[str]] = field(default_factory=dict)
    given_up: dict[int, set[str]] = field(default_factory=dict)
    passes: list[dict] = field(default_factory=list)
    workers: list[dict] = field(default_factory=list)
    plans: list[str] = field(default_factory=list)


@dataclass
class Measurements:
    """What plans are made of."""

    before_seconds: float = 0.0  # passed before the first model was loaded
    tokens: dict[str, int] = field(default_factory=dict)  # of a row, as the first pass encoded it
    rates: dict[int, float] = field(default_factory=dict)  # tokens a second, by package
    changes: dict[Key, float] = field(default_factory=dict)  # of a probability (sd), by a pass


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
        number, _ = key
        tried = self.progress.tried.get(key, set())
        given_up = self.progress.given_up.get(number, set())
        finished = tried | given_up
        return [row_id for row_id in group if row_id not in finished]

    def probabilities(self) -> dict[str, list[float]]:
        """Combine what all packages have given so far, by id."""
        return combine(self.inputs.settings, self.inputs.packages, self.progress.scores)

    def scores_by_run(self) -> dict[str, ModelScores]:
        """Collect what each run's model gave."""
        models = {}
        for number, package_settings in enumerate(self.inputs.settings.packages):
            verdicts = self.inputs.packages[number].contract.verdicts
            models[package_settings.run] = ModelScores(verdicts, self.progress.scores[number])
        return models


@dataclass(frozen=True)
class NextPass:
    """A pass to be made now."""

    package: int  # its number in the spec
    order: str
    rows: frozenset[str]
    gains: Mapping[str, float] | None = None  # a second, by row; None: rows are taken by length
    deadline: float | None = None  # None: the clock's


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

    threads = max(len(os.sched_getaffinity(0)) // len(devices), 1)
    inputs = Inputs(
        settings=settings,
        packages=packages,
        contracts=[serving_contract(package, settings) for package in packages],
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


def serving_contract(package: Package, settings: Settings):
    """Return the package's contract, with the spec's token budget where it names one."""
    if settings.budget_tokens is None:
        return package.contract
    return replace(package.contract, budget_tokens=settings.budget_tokens)


def score_all(board: Board) -> None:
    """Make pass after pass until nothing is left or nothing more fits the clock.

    In the hidden run a package that fails is left out while another one works.
    """
    board.measured.before_seconds = board.inputs.clock.elapsed()
    loaded: int | None = None
    workers: list[Worker] = []
    encoder = Encoder(board.inputs)
    try:
        while True:
            next_pass = plan_next_pass(board, loaded, workers)
            if next_pass is None:
                return

            try:
                # Two models do not fit one GPU: the old one goes before the new one comes.
                if next_pass.package != loaded:
                    retire(board, workers)
                    workers = start_team(board, next_pass.package)
                    loaded = next_pass.package
                make_next_pass(board, next_pass, workers, encoder)
            except (PackageError, LoadError) as error:
                retire(board, workers)
                loaded = None
                leave_out(board, next_pass.package, error)
    finally:
        retire(board, workers)
        encoder.close()


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
        next_pass = plan_group(board, group, loaded)
        if next_pass is not None:
            return next_pass
    return None


def plan_group(board: Board, group: Sequence[str], loaded: int | None) -> NextPass | None:
    """Plan a group's next pass: at first one order of all its rows, later the first of a new plan."""
    # The first pass measures the tokens of all its rows: one row shows whether it was made.
    has_had_first_pass = group[0] in board.measured.tokens
    if not has_had_first_pass:
        packages = board.progress.packages
        number = loaded if loaded in packages else packages[0]
        return NextPass(number, board.orders(number)[0], frozenset(group))

    # Share the time that is left out among all passes that could still be made.
    options = make_options(board, group, loaded)
    if not options:
        return None
    clock = board.inputs.clock
    seconds_left = clock.left()
    by_log_loss = len(board.inputs.settings.columns) > 1
    shares = allocate(
        options, board.probabilities(), board.measured.tokens, seconds_left, by_log_loss
    )
    note_plan(board, shares, seconds_left)

    # An option without rows gets no time.
    planned = [share for share in shares if share.gains]
    if not planned:
        return None
    first, *later = planned

    # The pass must leave the time for those planned after it: their scoring, and loading each
    # package once. Its own package is loaded by then.
    load_seconds = {share.option.package: share.option.load_seconds for share in later}
    load_seconds.pop(first.option.package, None)
    seconds_for_later = sum(share.seconds for share in later) + sum(load_seconds.values())
    deadline = clock.deadline - seconds_for_later

    # Where no row must be left out, taking them by length wastes the least padding.
    option = first.option
    has_every_row = len(first.gains) == len(option.unscored)
    gains = None if has_every_row else first.gains
    return NextPass(option.package, option.order, frozenset(first.gains), gains, deadline)


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
    """Describe a pass by what it should change and take, as measured or else as guessed."""
    number, order = key
    settings, packages = board.inputs.settings, board.inputs.packages
    progress, measured = board.progress, board.measured

    # What it should change. CHANGE_OF_MODEL is that of one of two models of equal weight.
    total_weight = sum(settings.packages[other].weight for other in progress.packages)
    relative_weight = settings.packages[number].weight / total_weight
    is_new_model = not any(progress.tried.get((number, other)) for other in board.orders(number))
    if is_new_model:
        typical_change = 2 * CHANGE_OF_MODEL
    else:
        typical_change = CHANGE_OF_ORDER
    change = measured.changes.get(key, typical_change * relative_weight)

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


def note_plan(board: Board, shares: Sequence[Share], seconds_left: float) -> None:
    """Log what the plan does with the seconds that are left; keep the line for kernel.json."""
    parts = []
    for share in shares:
        option = share.option
        name = f"{board.inputs.packages[option.package].folder.name} {option.order}"
        rows = f"{len(share.gains)} of {len(option.unscored)} rows"
        part = f"{name} {rows} in {share.seconds:.1f} s"
        if share.gains and option.load_seconds:
            part += f" and {option.load_seconds:.1f} s to load"
        parts.append(part)

    line = f"{max(seconds_left, 0.0):.1f} s left: {'; '.join(parts)}"
    board.progress.plans.append(line)
    log(board.inputs.clock, f"plan: {line}")


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
    """End the workers and note what they did; devices that are gone leave the board.

    A device stays where its worker could not load a package that no other loaded either, or where
    it had a model before: that may be the package's fault.
    """
    stop_workers(workers)
    progress = board.progress
    any_loaded = any(worker.load_seconds for worker in workers)
    for worker in workers:
        is_proven = progress.proven.issuperset(worker.positions)
        is_to_blame = bool(worker.load_seconds) or (any_loaded and not is_proven)
        if worker.gone and is_to_blame:
            for position in worker.positions:
                progress.devices.pop(position, None)
        elif worker.load_seconds:
            progress.proven.update(worker.positions)
        progress.workers.append(worker_record(worker))
    workers.clear()


def make_next_pass(
    board: Board, next_pass: NextPass, workers: Sequence[Worker], encoder: "Encoder"
) -> None:
    """Score the rows of a pass and note the result on the board.

    The rows are encoded here while the workers load, or were encoded during the pass before.
    """
    number, order = next_pass.package, next_pass.order
    package, clock = board.inputs.packages[number], board.inputs.clock
    deadline = clock.deadline
    if next_pass.deadline is not None:
        deadline = min(next_pass.deadline, deadline)

    rows = [row for row in board.inputs.rows if row["id"] in next_pass.rows]
    requests = encoder.requests(number, order, rows)

    # The rows' other order is encoded in the background, while this one is scored.
    for other_order in board.orders(number):
        was_tried = (number, other_order) in board.progress.tried
        if other_order != order and not was_tried:
            encoder.begin(number, other_order, rows)

    probabilities_before = board.probabilities()
    label = f"{package.folder.name}, {order}"
    work = make_pass(label, requests, deadline, workers, next_pass.gains)
    work = run_pass(work, workers, clock)
    if all(worker.gone and not worker.load_seconds for worker in workers):
        raise LoadError(f"{package.folder}: no device could load it")

    # How far this pass moved probabilities tells what further passes are worth.
    note_pass(board, (number, order), work, requests, workers)
    change = measured_change(probabilities_before, board.probabilities())
    if change:
        board.measured.changes[number, order] = change


def note_pass(
    board: Board, key: Key, work: Pass, requests: Sequence[Request], workers: Sequence[Worker]
) -> None:
    """Put a pass's scores on the board, and what was measured."""
    number, order = key
    progress, measured = board.progress, board.measured
    progress.given_up.setdefault(number, set()).update(work.given_up)
    for row_id, values in work.scores.items():
        progress.scores[number][row_id][order] = values

    # Rows that the pass left are tried again, unless nothing came of any: that would never end.
    finished = {request.id for request in requests}
    if work.scores or all(worker.gone for worker in workers):
        for batch in work.queue:
            finished.difference_update(request.id for request in batch)
    progress.tried.setdefault(key, set()).update(finished)

    for request in requests:
        measured.tokens.setdefault(request.id, request.tokens)
    rate = sum(worker.rate() for worker in workers if not worker.gone)
    if rate:
        measured.rates[number] = rate

    # kernel.json keeps a record of every pass.
    run = board.inputs.settings.packages[number].run
    progress.passes.append({"run": run, "order": order, **pass_record(work)})


class Encoder:
    """Makes rows into requests, what is needed next in a thread of its own.

    A tokenizer is for one thread at a time: model_input switches its control tokens off while it
    encodes what users wrote, and another thread would then encode the template as plain text.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.pool = ThreadPoolExecutor(1)
        self.closing = threading.Event()
        self.ahead: dict[Key, Future] = {}
        self.tokenizers = [threading.Lock() for _ in inputs.packages]

    def begin(self, number: int, order: str, rows: Sequence[Mapping]) -> None:
        """Begin to encode rows that are likely to be needed in a later pass."""
        key = (number, order)
        if key not in self.ahead:
            self.ahead[key] = self.pool.submit(self.encode, number, order, rows)

    def requests(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """Return the rows' requests, in the rows' order."""
        encoded = []
        if (number, order) in self.ahead:
            encoded = self.ahead[number, order].result()
        by_id = {request.id: request for request in encoded}

        # Rows that nobody expected to be needed.
        missing_rows = [row for row in rows if row["id"] not in by_id]
        if missing_rows:
            for request in self.encode(number, order, missing_rows):
                by_id[request.id] = request
        return [by_id[row["id"]] for row in rows]

    def encode(self, number: int, order: str, rows: Sequence[Mapping]) -> list[Request]:
        """Encode rows by the package's own model_input."""
        began = time.monotonic()
        package, contract = self.inputs.packages[number], self.inputs.contracts[number]
        encoded: list[Request] = []
        for start in range(0, len(rows), ENCODED_AT_ONCE):
            if self.closing.is_set():
                return encoded

            part = rows[start : start + ENCODED_AT_ONCE]
            pairs = [package.model_input.pair_from_row(row) for row in part]
            with self.tokenizers[number]:
                requests = make_requests(
                    package.model_input,
                    package.tokenizer,
                    contract,
                    pairs,
                    (order,),
                    spare_tokens_of(package.manifest),
                )

            # Four bytes for each token id, since there are millions of them.
            for request in requests:
                sequences = tuple(array("i", ids) for ids in request.sequences)
                encoded.append(replace(request, sequences=sequences))

        tokens = sum(request.tokens for request in encoded)
        name = f"{package.folder.name}, {order}"
        seconds = time.monotonic() - began
        log(
            self.inputs.clock,
            f"{name}: {len(encoded)} rows encoded, {tokens} tokens in {seconds:.1f} s",
        )
        return encoded

    def close(self) -> None:
        """Stop, after the rows that are being encoded: ENCODED_AT_ONCE at most."""
        self.closing.set()
        self.pool.shutdown(cancel_futures=True)


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
#     out of memory      its worker's token budget is halved, and the batch cut and tried again
#                        (`return_large_batch`)
#     its worker dies    the worker is started again, or given up with its device; its rows go back to
#                        the queue, those that it was scoring one by one at the end, in case that one
#                        of them killed it (`handle_worker_death`)
#     its worker hangs   the worker is killed, which is a death like others (`check_is_alive`)
#     the clock ends     the batch stays in the queue (`next_batch`)
# A row without a score is simply not in the result, and the caller decides what that means.
# ================================================================================================

GIVEN_UP_AFTER = 3  # deaths of the worker that was scoring a row, the last two with that row alone
PATIENCE = 20.0  # times what a batch should take, but at least QUIET_SECONDS: then a worker hangs
QUIET_SECONDS = 120.0
LOAD_PATIENCE_SECONDS = 1800.0
BLOCKS = 8  # where rows are scored by their gains, an eighth at a time is batched by length
LOGGED_SHARE = 0.2  # of a pass's rows: progress is logged whenever so many more are scored


@dataclass
class Pass:
    """The queue of batches and the probabilities by id, and what there is to tell of both."""

    label: str
    queue: deque[list[Request]]
    deadline: float
    may_reorder: bool  # a clock too short for the queue then takes short rows first: more of them
    rows: int
    began: float | None = None
    scores: dict[str, list[float]] = field(default_factory=dict)
    tokens: int = 0
    computed_tokens: int = 0
    out_of_memory: int = 0
    overflowed: int = 0  # rows that were computed again in float32
    not_finite: int = 0
    given_up: list[str] = field(default_factory=list)
    deaths: dict[str, int] = field(default_factory=dict)  # by worker
    suspected: Counter = field(default_factory=Counter)  # deaths by row
    # By row, alone in its batch: the workers that lack the memory for it.
    too_large: dict[str, set[str]] = field(default_factory=dict)
    logged_at: float = field(default_factory=time.monotonic)
    logged_rows: int = 0
    queued_tokens: int = 0  # of the queue, padding included

    def __post_init__(self):
        self.queued_tokens = sum(map(padded_tokens, self.queue))

    def take(self, from_end: bool) -> list[Request]:
        """Take the queue's first or last batch."""
        batch = self.queue.pop() if from_end else self.queue.popleft()
        self.queued_tokens -= padded_tokens(batch)
        return batch

    def put_first(self, batches: Sequence[list[Request]]) -> None:
        """Put batches before all others, in their order."""
        self.queue.extendleft(reversed(batches))
        self.queued_tokens += sum(map(padded_tokens, batches))

    def put_last(self, batches: Sequence[list[Request]]) -> None:
        """Put batches after all others, in their order."""
        self.queue.extend(batches)
        self.queued_tokens += sum(map(padded_tokens, batches))

    def seconds_left(self, workers: Sequence[Worker]) -> float:
        """Predict how long the living workers need for the queue; 0 before their first batch."""
        rate = sum(worker.rate() for worker in workers if not worker.gone)
        if not rate:
            return 0.0
        return self.queued_tokens / rate

    def seconds(self) -> float:
        """Return the seconds since its first batch was sent: loading a model does not count."""
        if self.began is None:
            return 1e-9
        return max(time.monotonic() - self.began, 1e-9)


def make_pass(
    label: str,
    requests: Sequence[Request],
    deadline: float,
    workers: Sequence[Worker],
    gains: Mapping[str, float] | None = None,
) -> Pass:
    """Make a pass over rows."""
    tokens_per_batch = max(worker.tokens_per_batch for worker in workers)
    if gains is None:
        batches = make_batches(requests, tokens_per_batch)
        return Pass(label, deque(batches), deadline, may_reorder=True, rows=len(requests))

    # Batches of one length waste no padding, but rows of high gain must come early: a compromise.
    by_gain = sorted(requests, key=lambda request: -gains[request.id])
    block_size = max(math.ceil(len(requests) / BLOCKS), 1)
    batches = []
    for start in range(0, len(by_gain), block_size):
        block = by_gain[start : start + block_size]
        batches += make_batches(block, tokens_per_batch)
    return Pass(label, deque(batches), deadline, may_reorder=False, rows=len(requests))


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
    """Give a worker what it can score at once, and one batch more that lies ready."""
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

    # Long rows stand first. Where time is short, they are left for the end.
    from_end = work.may_reorder and work.seconds_left(workers) > seconds_left
    if from_end:
        put_back, put_off = work.put_last, work.put_first
    else:
        put_back, put_off = work.put_first, work.put_last

    # The first batch that this worker has not proven too small for.
    whole_batch = None
    for _ in range(len(work.queue)):
        batch = work.take(from_end)
        if worker.name not in work.too_large.get(batch[0].id, ()):
            whole_batch = batch
            break
        put_off([batch])
    if whole_batch is None:
        return None

    # The worker's budget may have shrunk since the batches were made.
    batch, *rest = make_batches(whole_batch, worker.tokens_per_batch)
    tokens_ahead = sum(map(padded_tokens, worker.outstanding.values())) + padded_tokens(batch)
    if worker.rate() and tokens_ahead / worker.rate() > seconds_left:
        put_back([whole_batch])
        return None
    put_back(rest)
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
        number, scores, memory_bytes = message
        note_scores(work, worker.note_scored(number, memory_bytes), scores)
    elif kind == "out of memory":
        batch = worker.note_out_of_memory(*message)
        outcome = return_large_batch(work, worker, batch, workers)
        budget = f"{worker.tokens_per_batch} tokens a batch from now on"
        log(clock, f"{worker.name}: out of memory: {budget}{outcome}")
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


def return_large_batch(
    work: Pass, worker: Worker, batch: list[Request], workers: Sequence[Worker]
) -> str:
    """Put a batch back that a worker lacks the memory for.

    A row that was alone in it is left to the other workers, or given up.
    """
    # The worker's budget is smaller now, so next_batch cuts the batch in parts.
    work.out_of_memory += 1
    if len(batch) > 1:
        work.put_first([batch])
        return ""

    [request] = batch
    lacking_workers = work.too_large.setdefault(request.id, set())
    lacking_workers.add(worker.name)
    if all(other.name in lacking_workers for other in workers if not other.gone):
        return give_up(work, request)
    work.put_last([batch])
    return f"; row {request.id} is left to the others"


def handle_worker_death(work: Pass, worker: Worker, why: str, clock: Clock) -> None:
    """Put a dead worker's rows back into the queue, and restart it or give its device up.

    A row that was being scored at GIVEN_UP_AFTER deaths is given up. No process is started that the
    clock has no time to load.
    """
    # What only lay ready is not suspected.
    being_scored, ready = worker.note_death()
    work.deaths[worker.name] = work.deaths.get(worker.name, 0) + 1
    work.put_first(ready)

    # Any of the rows that it was scoring may have killed it: each is tried again alone, at the end.
    rows_given_up = ""
    for batch in being_scored:
        for request in batch:
            work.suspected[request.id] += 1
            if work.suspected[request.id] >= GIVEN_UP_AFTER:
                rows_given_up += give_up(work, request)
            else:
                work.put_last([[request]])

    log(clock, f"{worker.name}: {why}")
    if worker.gone:
        outcome = f"gone after {worker.fruitless} deaths without a score in between"
    elif work.deadline - time.monotonic() <= worker.load_seconds:
        outcome = "not started again, the clock has no time to load it"
    else:
        worker.launch()
        outcome = f"started again, {worker.tokens_per_batch} tokens a batch"
    log(clock, f"{worker.name}: {outcome}{rows_given_up}")


def give_up(work: Pass, request: Request) -> str:
    """Leave a row without a score; return a note for the log."""
    work.given_up.append(request.id)
    return f"; row {request.id} is given up"


def check_is_alive(work: Pass, worker: Worker, clock: Clock) -> None:
    """Kill a worker that has said nothing for far too long, or works on into the reserve."""
    if not worker.process:
        return

    now = time.monotonic()
    quiet_seconds = now - worker.last_event

    # How long a batch takes is known only once the worker has scored one.
    if not worker.loaded:
        patience = LOAD_PATIENCE_SECONDS
    else:
        expected_seconds = 0.0
        if worker.outstanding and worker.rate():
            first_batch = next(iter(worker.outstanding.values()))
            expected_seconds = padded_tokens(first_batch) / worker.rate()
        patience = max(PATIENCE * expected_seconds, QUIET_SECONDS)

    # The reserve is for writing the submission.
    if worker.outstanding and now > clock.deadline + clock.reserve_seconds / 3:
        patience = 0
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
    """Log the progress from time to time, and whenever LOGGED_SHARE more of the rows is scored."""
    now = time.monotonic()
    seconds_between = max((clock.deadline - clock.began) / 300, 10)
    is_time = now - work.logged_at > seconds_between
    is_far = len(work.scores) - work.logged_rows >= LOGGED_SHARE * work.rows
    if is_time or is_far:
        work.logged_at = now
        work.logged_rows = len(work.scores)
        log(clock, f"{work.label}: {progress_line(work, workers)}")


def progress_line(work: Pass, workers: Sequence[Worker]) -> str:
    """Describe rows done, speed, time to go and memory, for the log."""
    seconds = work.seconds()
    parts = [
        f"{len(work.scores)} of {work.rows} rows",
        f"{len(work.scores) / seconds:.1f} rows/s",
        f"{work.tokens / seconds:.0f} tokens/s",
    ]
    if work.queue:
        parts.append(f"{work.seconds_left(workers):.0f} s to go")
    sizes = []
    for worker in workers:
        for memory_bytes in worker.memory_bytes:
            sizes.append(f"{memory_bytes / 2**30:.1f}")
    if sizes:
        parts.append(f"{' + '.join(sizes)} GiB")
    if work.overflowed:
        parts.append(
            f"{work.overflowed} rows overflowed float16 and were computed again in float32, "
            f"{work.not_finite} of them in vain"
        )
    return ", ".join(parts)


def pass_record(work: Pass) -> dict:
    """Describe a finished pass for kernel.json."""
    seconds = work.seconds()
    padding = 0.0
    if work.computed_tokens:
        padding = 1 - work.tokens / work.computed_tokens
    return {
        "pass": work.label,
        "rows": work.rows,
        "scored": len(work.scores),
        "left": sum(map(len, work.queue)),
        "seconds": round(seconds, 2),
        "rows_per_second": round(len(work.scores) / seconds, 2),
        "tokens_per_second": round(work.tokens / seconds, 1),
        "tokens": work.tokens,
        "computed_tokens": work.computed_tokens,
        "padding": round(padding, 4),
        "out_of_memory": work.out_of_memory,
        "overflowed": work.overflowed,
        "not_finite": work.not_finite,
        "given_up": work.given_up,
        "deaths": work.deaths,
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

    name: str  # its devices, for the log
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
    memory_bytes: list[int] = field(default_factory=list)
    deaths: int = 0
    fruitless: int = 0  # deaths without a score in between

    @property
    def batches_at_once(self) -> int:
        """How many batches it scores at the same time: one for each stage of a split model."""
        return self.loaded["batches_at_once"] if self.loaded else 1

    def rate(self) -> float:
        """Return tokens a second, from what it has done; 0 before its first batch."""
        return self.tokens / self.seconds if self.seconds else 0.0

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

    def note_scored(self, number: int, memory_bytes: list[int]) -> list[Request]:
        """Count a batch that was scored, and return it."""
        batch = self.outstanding.pop(number)
        now = time.monotonic()
        self.tokens += padded_tokens(batch)
        self.seconds += now - self.last_event
        self.last_event = now
        self.memory_bytes = memory_bytes
        self.fruitless = 0
        return batch

    def note_out_of_memory(self, number: int) -> list[Request]:
        """Lower the token budget below a batch that was too large, and return it."""
        batch = self.outstanding.pop(number)
        self.last_event = time.monotonic()

        # A row that is alone cannot be cut, but longer ones need not be tried.
        if len(batch) > 1:
            fitting_tokens = padded_tokens(batch) // 2
        else:
            fitting_tokens = padded_tokens(batch) - 1
        self.tokens_per_batch = max(min(self.tokens_per_batch, fitting_tokens), 1)
        return batch

    def note_death(self) -> tuple[list[list[Request]], list[list[Request]]]:
        """Count a death; return the batches that it was scoring, and those that lay ready."""
        # Batches are scored in the order in which they were sent.
        sent_batches = list(self.outstanding.values())
        being_scored = sent_batches[: self.batches_at_once]
        ready = sent_batches[self.batches_at_once :]
        self.outstanding.clear()

        # Only now: a stopped worker no longer knows its batches_at_once.
        self.stop()
        self.deaths += 1

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
        log_names = []
        # Two workers on one CPU would have the same name.
        for position, name in zip(positions, device_names, strict=True):
            log_names.append(f"cpu #{position}" if name == "cpu" else name)
        task = Assignment(
            str(package.folder),
            device_names,
            positions[0],
            threads,
            package_settings.weight_bytes_limit,
        )
        worker = Worker("+".join(log_names), task, tokens_per_batch, start_process, positions)
        worker.launch()
        workers.append(worker)

    names = ", ".join(worker.name for worker in workers)
    log(clock, f"{package.folder.name}: loading on {names}")
    return workers


def stop_workers(workers: Sequence[Worker]) -> None:
    """End all the processes."""
    for worker in workers:
        worker.stop()


def worker_record(worker: Worker) -> dict:
    """Describe a worker for kernel.json."""
    return {
        "device": worker.name,
        "package": worker.task.folder.rpartition("/")[2],
        "load_seconds": round(worker.load_seconds, 1),
        "computed_tokens": worker.tokens,
        "busy_seconds": round(worker.seconds, 1),
        "tokens_per_batch": worker.tokens_per_batch,
        "memory_bytes": worker.memory_bytes,
        "deaths": worker.deaths,
        "gone": worker.gone,
    }


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
#     ("scored", number, BatchScores, bytes)    bytes: the most memory used so far on each device
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

    serve(connection, score_requests, batches_at_once, lambda: memory_bytes(task.devices))


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


def serve(connection, score_requests, batches_at_once: int, measure_memory) -> None:
    """Score what comes in. Batches are read as they come, so that the next one lies ready."""
    inbox = queue.SimpleQueue()
    lock = threading.Lock()

    def score_from_inbox():
        while message := inbox.get():
            number, requests = message
            try:
                answer = ("scored", number, score_requests(requests), measure_memory())
            except Exception as error:
                if lacks_memory(error, len(requests)):
                    free_memory()
                    answer = ("out of memory", number)
                else:
                    answer = ("failed", traceback.format_exc())
            # Two threads that write at once would mix their messages.
            with lock:
                tell(connection, *answer)

            # A CUDA error stays with its process: the other end will kill it.
            if answer[0] == "failed":
                return

    # The stages of a split model work on different batches at the same time.
    for _ in range(batches_at_once):
        threading.Thread(target=score_from_inbox, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):
        while True:
            inbox.put(connection.recv())

    # The pipe is closed: None ends a thread.
    for _ in range(batches_at_once):
        inbox.put(None)


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


def memory_bytes(devices: tuple[str, ...]) -> list[int]:
    """Measure the most memory used so far: PyTorch's on each GPU, or this process's on the CPU."""
    if devices[0].startswith("cuda"):
        return [torch.cuda.max_memory_reserved(device) for device in devices]
    return [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024]


# ================================================================================================
# scheduling/plan.py
#
# Shares out the seconds that are left: which rows get the second order, and which a further model.
#
# schedule.plan_next_pass decides with it, after every pass, which pass comes next. An option is one
# more pass of a package in an order. It changes a probability by some amount, whose standard
# deviation s is measured. Its expected gain is that of the knowledge gradient (Frazier, Powell and
# Dayanik 2008): 2 (s φ(m/s) − m Φ(−m/s)), with m half the lead of the first verdict over the second.
# A row near the line between two verdicts gains most, one far from it nothing. For log loss it is
# s² (1 − Σp²).
#
# Rows are taken by their gain per second until the seconds are used. Which further models are worth
# their loading is tried out: with none of them, with the first, with the first two, and so on.
# ================================================================================================

# An assumption without a published source. A kernel's log says how long its loading took.
LOAD_BYTES_PER_SECOND = 3e8

# The change of a probability (sd) by a second order or model, until it is measured.
CHANGE_OF_ORDER = 0.06
CHANGE_OF_MODEL = 0.1

# Fewer rows give no standard deviation worth planning by.
ROWS_TO_MEASURE = 30

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
    gain_per_second: float


@dataclass(frozen=True)
class Share:
    """What an option gets of the clock."""

    option: Option
    gains: dict[str, float]  # of its rows, a second
    seconds: float  # for these rows, without loading


def allocate(
    options: Sequence[Option],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    seconds: float,
    by_log_loss: bool,
) -> list[Share]:
    """Share the seconds that are left out among options: rows of most gain per second first."""
    offers = make_offers(options, probabilities, tokens, by_log_loss)
    loaded = set()
    not_loaded = set()
    for option in options:
        packages = not_loaded if option.load_seconds else loaded
        packages.add(option.package)

    # Loaded models cost no loading; further ones are tried in the spec's order.
    further = sorted(not_loaded)
    best_gain, best_shares = allocate_to(loaded, options, offers, seconds)
    for count in range(1, len(further) + 1):
        gain, shares = allocate_to(loaded.union(further[:count]), options, offers, seconds)
        if gain > best_gain:
            best_gain, best_shares = gain, shares
    return best_shares


def make_offers(
    options: Sequence[Option],
    probabilities: Mapping[str, Sequence[float]],
    tokens: Mapping[str, int],
    by_log_loss: bool,
) -> list[Offer]:
    """List every unscored row of every option, by gain per second; equal ones keep their order."""
    offers = []
    for place, option in enumerate(options):
        for row_id in option.unscored:
            gain = expected_gain(probabilities.get(row_id), option.change, by_log_loss)
            seconds = max(tokens[row_id] * option.seconds_per_token, SHORTEST_SECONDS)
            offers.append(Offer(place, row_id, gain, seconds, gain / seconds))
    return sorted(offers, key=lambda offer: offer.gain_per_second, reverse=True)


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
    gains_by_option: list[dict[str, float]] = [{} for _ in options]
    seconds_used = [0.0] * len(options)
    for offer in offers:
        place = offer.option_place
        # A row too long for what is left does not keep shorter ones behind it out.
        if options[place].package not in packages or offer.seconds > seconds_left:
            continue
        seconds_left -= offer.seconds
        seconds_used[place] += offer.seconds
        total_gain += offer.gain
        gains_by_option[place][offer.row_id] = offer.gain_per_second

    shares = []
    for place, option in enumerate(options):
        shares.append(Share(option, gains_by_option[place], seconds_used[place]))
    return total_gain, shares


def expected_gain(values: Sequence[float] | None, change: float, by_log_loss: bool) -> float:
    """Compute what one more opinion on a row is expected to bring."""
    # A first score is worth more than any second opinion.
    if values is None:
        return 1.0

    # The expected drop of log loss, to second order.
    if by_log_loss:
        return change**2 * (1 - sum(value**2 for value in values))

    # The verdict flips where the change exceeds half of its lead.
    second, first = sorted(values)[-2:]
    margin = (first - second) / 2
    change = max(change, 1e-6)
    ratio = margin / change
    density = math.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    return 2 * (change * density - margin * math.erfc(ratio / math.sqrt(2)) / 2)


def measured_change(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]]
) -> float | None:
    """Measure the standard deviation of the first probability's change over the rows in both."""
    changes = []
    for row_id, values in before.items():
        if row_id in after:
            changes.append(after[row_id][0] - values[0])
    if len(changes) < ROWS_TO_MEASURE:
        return None
    return math.sqrt(sum(change**2 for change in changes) / len(changes))


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
    paths_by_rank: dict[tuple[int, int], list[Path]] = {}
    for name_rank, name in enumerate(names):
        for path in sorted(inputs.rglob(name)):
            folders = path.relative_to(inputs).parts[:-1]
            mount_rank = rank_mount(folders, slug, kind)
            if path.is_file() and mount_rank is not None:
                paths_by_rank.setdefault((mount_rank, name_rank), []).append(path)

    # The best rank wins. The same file may be mounted twice.
    paths = []
    if paths_by_rank:
        paths = paths_by_rank[min(paths_by_rank)]
    distinct_files = {(path.name, hash_file(path)) for path in paths}
    if len(distinct_files) == 1:
        return paths[0]

    # Say what there is, so that a wrong slug shows.
    folders_with_files = set()
    for path in inputs.rglob("*"):
        if path.is_file():
            folders_with_files.add(str(path.parent.relative_to(inputs)))
    mounted = sorted(folders_with_files)
    raise FileNotFoundError(
        f"{inputs}: {len(paths)} files named {' or '.join(names)} below a folder {slug!r}, "
        f"expected one; mounted are {', '.join(mounted) or 'no files at all'}; "
        f"attach {slug} to the kernel once"
    )


def rank_mount(folders: Sequence[str], slug: str, kind: str) -> int | None:
    """Rank a file by its folders below /kaggle/input."""
    # A dataset's mount has its owner between the kind and the slug.
    if kind == "datasets":
        other_kind, slug_place = "competitions", 2
    else:
        other_kind, slug_place = "datasets", 1

    # A dataset may have the slug of the competition that it was made for.
    is_other = len(folders) > 1 and folders[0] == other_kind
    if slug not in folders or is_other:
        return None
    is_below_kind = folders[0] == kind and folders[slug_place : slug_place + 1] == (slug,)
    return 0 if folders[0] == slug or is_below_kind else 1


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """Read the test rows."""
    rows = []
    for file_row in read_table(path, ("id", *TEXTS, SCORED)):
        row = {"id": file_row["id"], "counts": is_counted(file_row.get(SCORED))}
        for name in TEXTS:
            row[name] = read_text(file_row[name], are_turns)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")

    # Scores are joined by id.
    id_counts = Counter(row["id"] for row in rows)
    repeated_ids = [row_id for row_id, count in id_counts.items() if count > 1]
    if repeated_ids:
        raise ValueError(
            f"{path}: an id occurs twice: {', '.join(repeated_ids[:3])}; "
            "a submission needs every id once"
        )
    return rows


def is_counted(scored: object) -> bool:
    """Tell whether a row counts, from its value in the column `scored`: unless that says no.

    Values may be true and false, 1 and 0, or these as text; a null or no such column says nothing.
    """
    return str(scored).strip().lower() not in ("false", "0", "0.0")


def read_table(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a Parquet or CSV file, `id` among them as text; `scored` may be absent."""
    if path.suffix == ".parquet":
        rows = read_parquet(path, columns)
    else:
        rows = read_csv(path, columns)

    # Scores are joined by id, so an id must have one way to be written.
    for number, row in enumerate(rows, start=1):
        row_id = id_text(row["id"])
        if row_id is None:
            raise ValueError(
                f"{path}, row {number}: its id is {row['id']!r}; expected a text or a whole number"
            )
        row["id"] = row_id
    return rows


def read_parquet(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a Parquet file."""
    schema = pq.read_schema(path)
    names = choose_columns(path, columns, schema.names)

    # What holds no text would fail later, without the name of its column.
    for name in names:
        kind = schema.field(name).type
        if name in TEXTS and not holds_text(kind):
            raise ValueError(f"{path}: column {name} holds {kind}; expected text, or lists of it")
    return pq.read_table(path, columns=names).to_pylist()


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


def holds_text(kind: pa.DataType) -> bool:
    """Tell whether a column's type is text, lists of it, or nothing but nulls."""
    if isinstance(kind, pa.DictionaryType | pa.ListType | pa.LargeListType):
        return holds_text(kind.value_type)
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def id_text(value: object) -> str | None:
    """Write an id as the submission has it: a text as it is, a whole number as its digits."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return str(int(value))
    if value is None or isinstance(value, bool | float | bytes):
        return None
    return str(value) or None


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


def install_missing_wheels(root: Path, folders: Sequence[Path], wheels: str | None) -> list[str]:
    """Install bitsandbytes where a package needs it and the image lacks it."""
    # An image that has the library keeps its own.
    methods = set()
    for folder in folders:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        methods.add(config.get("quantization_config", {}).get("quant_method"))
    if "bitsandbytes" not in methods or importlib.util.find_spec("bitsandbytes"):
        return []
    if wheels is None:
        raise ModuleNotFoundError(
            "a package is quantised with bitsandbytes, which is absent; "
            "name a dataset in the spec's `wheels`"
        )

    # No network: pip installs from the mounted folder alone.
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",), "datasets").parent
    check_wheels(folder)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--find-links", str(folder), "bitsandbytes"], check=True)
    importlib.invalidate_caches()
    return ["bitsandbytes"]


def check_wheels(folder: Path) -> None:
    """Raise ValueError where a wheel is not as wheels.json lists it, if that is there."""
    if not (folder / "wheels.json").is_file():
        return
    manifest = json.loads((folder / "wheels.json").read_text(encoding="utf-8"))
    listed = {wheel["file"]: wheel["sha256"] for wheel in manifest["wheels"]}
    for path in sorted(folder.glob("*.whl")):
        sha256 = hash_file(path)
        if sha256 != listed.get(path.name):
            raise ValueError(
                f"{path}: its SHA-256 is {sha256[:12]}…, wheels.json says "
                f"{listed.get(path.name, 'nothing')[:12]}; make the dataset again with "
                "`python -m postprocess.wheels` and upload it"
            )


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

    def manifest_sha256(self) -> str:
        """What tells this package from others, every file of it being as listed."""
        return hash_file(self.folder / "manifest.json")


def read_package(folder: Path | str, clock: Clock | None = None) -> Package:
    """Read a package and check it: file hashes, contract, tokenizer and golden token ids, in this order."""
    folder = Path(folder)
    began = time.monotonic()
    manifest = check_manifest(folder)
    if clock:
        size = sum(listed["bytes"] for listed in manifest["files"].values())
        seconds = time.monotonic() - began
        log(clock, f"{folder}: {size / 1e9:.2f} GB as listed, hashed in {seconds:.1f} s")

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

    # Sizes are compared first: a truncated upload shows before gigabytes are hashed.
    hashes = {}
    for name, listed in manifest["files"].items():
        if name not in NOT_MOUNTED:
            check_size(folder / name, listed["bytes"])
            hashes[folder / name] = listed["sha256"]

    # Reading every byte takes a minute or two: several files at a time.
    with ThreadPoolExecutor(HASHING_THREADS) as pool:
        checks = [pool.submit(check_hash, *item, "manifest.json") for item in hashes.items()]
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


def check_size(path: Path, expected: int) -> None:
    """Raise PackageError unless the file at `path` has as many bytes as manifest.json says."""
    if not path.is_file():
        raise PackageError(f"{path}: missing, but manifest.json lists it; upload the package again")
    size = path.stat().st_size
    if size != expected:
        raise PackageError(f"{path}: {size} bytes, manifest.json says {expected}; upload it again")


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
# What must hold before hours of work begin: libraries, GPUs, a disk that can be written to.
#
# No GPU is touched here: nvidia-smi is asked. What would make answers wrong, or could only end in a
# crash, is a MachineError that says what to do; what costs no more than speed is a line in the log.
# What cannot be found out is not checked.
# ================================================================================================

ASK_GPUS = (
    "nvidia-smi",
    "--query-gpu=name,memory.free,compute_cap",
    "--format=csv,noheader,nounits",
)
ASK_SECONDS = 30
EXPECTED_GPUS = 2  # machine_shape NvidiaTeslaT4
OLDEST_CAPABILITY = 7.0  # a P100 has 6.0, and the image's PyTorch no code for it
MEBIBYTE = 2**20
GIBIBYTE = 2**30
FREE_BYTES = 14 * GIBIBYTE  # of a T4 that no other process uses

# How weights may be packed, and the library that unpacks them, if it is not this runtime.
METHODS = {"bitsandbytes": "bitsandbytes", "gptq": None}
COMPARED = ("torch", "transformers", "tokenizers", "peft", "bitsandbytes")


class MachineError(RuntimeError):
    """This machine, or what is installed on it, cannot do the work."""


@dataclass(frozen=True)
class Gpu:
    """A GPU as nvidia-smi describes it; None is what it does not say."""

    name: str
    free_bytes: int | None
    capability: float | None


def check_machine(
    root: Path, packages: Sequence[Package], devices: Sequence[str], clock: Clock
) -> dict:
    """Check libraries, GPUs and the disk for packages, and log what is there."""
    check_disk(root / "working")
    notes = check_libraries(packages, {name: installed_version(name) for name in COMPARED})
    gpus = ask_gpus()
    notes += check_gpus(devices, gpus, on_kaggle="KAGGLE_ROOT" not in os.environ)

    # The log says what was there, whatever happens later.
    names = [f"{gpu.name} ({format_gib(gpu.free_bytes)} GiB free)" for gpu in gpus or ()]
    log(clock, f"machine: {', '.join(names) or 'no GPU'}")
    for note in notes:
        log(clock, note)
    return {"gpus": [asdict(gpu) for gpu in gpus or ()], "notes": notes}


def check_disk(working: Path) -> None:
    """Raise MachineError where the outputs cannot be written to /kaggle/working."""
    try:
        working.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=working) as file:
            file.write(b"x")
    except OSError as error:
        raise MachineError(
            f"{working}: cannot be written to ({error}); the submission could not be kept"
        ) from None


def installed_version(name: str) -> str | None:
    """Return the version of an installed package, None where it is absent; it is not imported."""
    if importlib.util.find_spec(name) is None:
        return None

    # A module that was copied without its metadata is there all the same.
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def check_libraries(packages: Sequence[Package], installed: Mapping[str, str | None]) -> list[str]:
    """Check the libraries that packages need.

    Golden rows show whether another version of PyTorch or of the tokenizers gives other answers, so
    those are only noted. But transformers of an older major version reads a newer configuration
    without complaint and ignores what it does not know: version 5 writes rope_parameters, without
    which version 4 gives every model the same rotary base.
    """
    notes = []
    for package in packages:
        name = package.folder.name
        config = json.loads((package.folder / "config.json").read_text(encoding="utf-8"))
        trained_with = package.contract.recorded.get("versions", {})
        saved_by = config.get("transformers_version") or trained_with.get("transformers")
        if major_version(installed["transformers"]) < major_version(saved_by):
            raise MachineError(
                f"{name}: saved by transformers {saved_by}, which version "
                f"{installed['transformers']} here would read wrongly; choose the newest "
                "environment for the kernel"
            )

        # Weights that nothing here can unpack.
        method = config.get("quantization_config", {}).get("quant_method")
        if method is not None and method not in METHODS:
            raise MachineError(
                f"{name}: quantised by {method}, this kernel knows {', '.join(METHODS)}; "
                "package the run again"
            )

        # What this package is computed with.
        needed = {"torch", "transformers", "tokenizers"}
        if METHODS.get(method) is not None:
            needed.add(METHODS[method])
        if (package.folder / "lora_config.json").is_file():
            needed.add("peft")  # the adapter is not merged
        for library in COMPARED:
            if library not in needed:
                continue
            if installed[library] is None:
                raise MachineError(
                    f"{name}: needs {library}, which is not installed; "
                    "attach a dataset with its wheel"
                )
            trained_version = trained_with.get(library, installed[library])
            if trained_version != installed[library]:
                notes.append(
                    f"{name}: trained with {library} {trained_version}, "
                    f"served with {installed[library]}"
                )
    return notes


def major_version(version: str | None) -> int:
    """Return the first number of a version; 0 where there is none."""
    match = re.match(r"\d+", version or "")
    return int(match[0]) if match else 0


def ask_gpus() -> list[Gpu] | None:
    """Ask nvidia-smi for the GPUs; None where it is absent, fails, or does not answer in time."""
    try:
        done = subprocess.run(
            ASK_GPUS, capture_output=True, text=True, timeout=ASK_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return parse_gpus(done.stdout)


def parse_gpus(text: str) -> list[Gpu]:
    """Read GPUs from nvidia-smi's lines: name, free MiB, compute capability; "[N/A]" is None."""
    gpus = []
    for line in text.splitlines():
        if line.strip():
            # A GPU's name may hold a comma: the fields are counted from the right.
            name, free_mib, capability = [field.strip() for field in line.rsplit(",", 2)]
            free_bytes = None
            if free_mib.isdigit():
                free_bytes = int(free_mib) * MEBIBYTE
            capability_number = None
            if re.fullmatch(r"\d+(\.\d+)?", capability):
                capability_number = float(capability)
            gpus.append(Gpu(name, free_bytes, capability_number))
    return gpus


def check_gpus(devices: Sequence[str], gpus: Sequence[Gpu] | None, on_kaggle: bool) -> list[str]:
    """Check that the GPUs can do the work."""
    if not any(device.startswith("cuda") for device in devices):
        if on_kaggle:
            raise MachineError(
                "PyTorch finds no GPU, and CPUs would take days; set machine_shape to "
                "NvidiaTeslaT4 and enable_gpu to true in kernel-metadata.json, or choose GPU T4 x2 "
                "in the editor, and look whether the week's GPU hours are spent"
            )
        return []

    # Older GPUs fail at the first kernel that PyTorch starts.
    for gpu in gpus or ():
        if gpu.capability is not None and gpu.capability < OLDEST_CAPABILITY:
            raise MachineError(
                f"{gpu.name} has compute capability {gpu.capability}, Kaggle's PyTorch needs "
                f"{OLDEST_CAPABILITY} or more; set machine_shape to NvidiaTeslaT4 in "
                "kernel-metadata.json, or choose GPU T4 x2 in the editor"
            )

    # The build has computed that the weights fit a T4 that is free.
    notes = []
    if len(devices) < EXPECTED_GPUS:
        notes.append(f"warning: {len(devices)} GPU where {EXPECTED_GPUS} were expected")
    for gpu in gpus or ():
        if gpu.free_bytes is not None and gpu.free_bytes < FREE_BYTES:
            notes.append(
                f"warning: {gpu.name} has {format_gib(gpu.free_bytes)} GiB free; restart the "
                "session if another kernel is on it"
            )
    return notes


def format_gib(size: int | None) -> str:
    """Format bytes as GiB with one decimal."""
    return "?" if size is None else f"{size / GIBIBYTE:.1f}"


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
TRAIN_PREFIX = "train:"
HIDDEN_ROWS = (10_000, 25_000)  # WSDM's public phase; its final phase, and LMSYS's
VERDICTS = ("model_a", "model_b", "tie")  # in the order of LMSYS's columns
NEVER = 1e9  # seconds, where nothing was measured


@dataclass(frozen=True)
class VisibleRows:
    """What the visible run scores beside the test rows."""

    rows: tuple[dict, ...] = ()  # as the test file's, each with a new id
    winners: Mapping[str, str | None] = field(default_factory=dict)  # by that id; None: no verdict
    trained_on: bool = False  # a model has seen the rows in training
    log_line: str = ""  # what was chosen, or why nothing was


@dataclass(frozen=True)
class Speed:
    """What was measured of a package, over all its devices. Tokens are those without padding."""

    run: str
    loading_seconds: float
    tokens_per_second: float
    tokens_per_row: float  # in one order
    orders: int  # in which a row is scored: 1 for a reward model

    def seconds_for(self, rows: int, orders: int) -> float:
        """Predict how long rows take, in that many orders, once the model is loaded."""
        if not self.tokens_per_second:
            return NEVER
        return min(rows * orders * self.tokens_per_row / self.tokens_per_second, NEVER)


def choose_visible_rows(
    root: Path, settings: Settings, folders: Sequence[Path], test_ids: Collection[str]
) -> VisibleRows:
    """Choose rows of the train file that every package lists as validation rows."""
    if is_hidden_run():
        return VisibleRows()
    if not settings.visible_rows:
        return no_visible_rows("visible_rows is 0, no row of the train file is scored")

    # Rows that every package lists.
    listings = []
    for folder in folders:
        path = folder / VALIDATION_IDS
        if not path.is_file():
            return no_visible_rows(
                f"{folder.name} has no {VALIDATION_IDS}; package the run again to have it measured"
            )
        listings.append(json.loads(path.read_text(encoding="utf-8")))
    id_sets = [frozenset(listing["ids"]) for listing in listings]
    listed_by_all = frozenset.intersection(*id_sets)

    # A rehearsal may have no train file.
    try:
        file = find_mounted(root, settings.competition, TRAIN_FILES, "competitions")
    except FileNotFoundError:
        return no_visible_rows(
            f"no {' or '.join(TRAIN_FILES)} of {settings.competition} is mounted"
        )
    # Whatever is wrong with this file, the test rows can be scored.
    try:
        train_rows = read_train_rows(file, settings, listed_by_all)
    except (OSError, ValueError, pa.ArrowException) as error:
        return no_visible_rows(f"the train file is not scored: {error}")
    if not train_rows:
        return no_visible_rows(
            f"{file.name} holds none of the {len(listed_by_all)} ids that every package lists"
        )

    # Rows that a model knows say nothing of its accuracy.
    trained_on = any(listing["trained_on"] for listing in listings)
    if trained_on:
        kind = "rows that a model was trained on: they tell of speed only"
    else:
        folds = sorted({f"fold {listing['fold']}" for listing in listings})
        kind = f"held out ({' and '.join(folds)})"
    log_line = f"visible run: {len(train_rows)} rows of {file.name} are scored too, {kind}"

    rows, winners = rename_train_rows(train_rows, settings, test_ids)
    return VisibleRows(rows, winners, trained_on, log_line)


def no_visible_rows(reason: str) -> VisibleRows:
    """No rows, and a line for the log that says why."""
    return VisibleRows(log_line=f"visible run: {reason}")


def read_train_rows(file: Path, settings: Settings, listed: frozenset[str]) -> list[dict]:
    """Read as many listed rows of the train file as the spec wants.

    Rows are chosen and ordered by the hashes of their ids, so that the file's order is without
    effect.
    """
    listed_rows = []
    for row in read_table(file, ("id", *TEXTS, *settings.columns)):
        if row["id"] in listed:
            listed_rows.append(row)
    listed_rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    return listed_rows[: settings.visible_rows]


def rename_train_rows(
    train_rows: Sequence[dict], settings: Settings, test_ids: Collection[str]
) -> tuple[tuple[dict, ...], dict[str, str | None]]:
    """Make rows of the train file into test rows, under new ids that no test row has."""
    # A test row may have such an id already.
    prefix = TRAIN_PREFIX
    while any(row_id.startswith(prefix) for row_id in test_ids):
        prefix = TRAIN_PREFIX + prefix

    are_turns = "tie" in settings.verdicts
    rows = []
    winners = {}
    for train_row in train_rows:
        row = {"id": prefix + train_row["id"], "counts": True}
        for name in TEXTS:
            row[name] = read_text(train_row[name], are_turns)
        rows.append(row)
        winners[row["id"]] = read_winner(train_row, settings.columns)
    return tuple(rows), winners


def read_winner(row: Mapping, columns: Sequence[str]) -> str | None:
    """Read a train row's verdict from a column with its name, or from one flag a verdict."""
    if len(columns) == 1:
        winner = row[columns[0]]
        return winner if winner in VERDICTS else None

    # A flag may come as an integer, a float or a truth value, from CSV as their text.
    winners = []
    for verdict, name in zip(VERDICTS, columns, strict=True):
        if str(row[name]) in ("1", "1.0", "True"):
            winners.append(verdict)
    return winners[0] if len(winners) == 1 else None


def report_quality(
    visible: VisibleRows,
    verdicts: Sequence[str],
    scored: Mapping[str, Sequence[float]],
    models: Mapping[str, ModelScores],
) -> dict:
    """Report for kernel.json how good the answers are, where no model has seen the rows before."""
    ids = [row["id"] for row in visible.rows]
    report = {
        "rows": len(ids),
        "scored": sum(row_id in scored for row_id in ids),
        "trained_on": visible.trained_on,
    }
    if not visible.trained_on:
        report["quality"] = measure_quality(visible, verdicts, scored)
        report["flips"] = {}
        for run, model in models.items():
            report["flips"][run] = share_of_flips(model.by_id, ids)
    return report


def report_speed(speeds: Sequence[Speed], before_seconds: float, settings: Settings) -> dict:
    """Report for kernel.json how fast the packages are, and what that means for hidden tests."""
    if not speeds:
        return {"speed": [], "predicted": []}

    measured = []
    for speed in speeds:
        rows_per_second = speed.tokens_per_second / max(speed.tokens_per_row, 1)
        measured.append({**asdict(speed), "rows_per_second": rows_per_second})

    # Each number of rows has a time limit of its own.
    predicted = []
    for rows in HIDDEN_ROWS:
        clock = start_clock(settings.time_limit(rows))
        clock_seconds = clock.deadline - clock.began
        predicted.append(predict_finish(speeds, before_seconds, clock_seconds, rows))
    return {"speed": measured, "predicted": predicted}


def measure_quality(
    visible: VisibleRows, verdicts: Sequence[str], scored: Mapping[str, Sequence[float]]
) -> dict:
    """Measure the final probabilities over the scored rows that have one of `verdicts`."""
    judged = 0
    correct = 0
    correct_by_length = 0
    loss = 0.0
    for row in visible.rows:
        values = scored.get(row["id"])
        winner = visible.winners[row["id"]]
        if values is None or winner not in verdicts:
            continue
        judged += 1
        correct += verdicts[values.index(max(values))] == winner

        # The baseline that any model must beat.
        longer = "model_a" if is_first_longer(row) else "model_b"
        correct_by_length += longer == winner

        # A probability of 0 would make the loss infinite.
        loss -= math.log(max(values[verdicts.index(winner)], 1e-15))

    ties_left_out = 0
    if "tie" not in verdicts:
        ties_left_out = list(visible.winners.values()).count("tie")
    if not judged:
        return {"judged": 0, "ties_left_out": ties_left_out}

    # The standard error is that of a share.
    accuracy = correct / judged
    return {
        "judged": judged,
        "ties_left_out": ties_left_out,
        "accuracy": accuracy,
        "standard_error": math.sqrt(accuracy * (1 - accuracy) / judged),
        "log_loss": loss / judged,
        "longer_accuracy": correct_by_length / judged,
    }


def share_of_flips(
    scores: Mapping[str, Mapping[str, Sequence[float]]], ids: Sequence[str]
) -> float | None:
    """Compute the share of rows whose verdict changes with the order; None: no row has two."""
    rows = 0
    flips = 0
    for row_id in ids:
        by_order = scores.get(row_id, {})
        # What time did not allow has one order, and cannot flip.
        if len(by_order) == 2:
            first, second = by_order.values()
            rows += 1
            flips += first.index(max(first)) != second.index(max(second))
    return flips / rows if rows else None


def predict_finish(
    speeds: Sequence[Speed], before_seconds: float, clock_seconds: float, rows: int
) -> dict:
    """Predict when so many rows will be done, one model after another."""
    # As schedule.py goes about it: one order of all rows, then the rest, model by model.
    first, *others = speeds
    loaded = before_seconds + first.loading_seconds
    once = loaded + first.seconds_for(rows, 1)
    everything = once + first.seconds_for(rows, first.orders - 1)
    for speed in others:
        everything += speed.loading_seconds + speed.seconds_for(rows, speed.orders)

    # Which part of it the clock allows.
    first_share = (clock_seconds - loaded) / max(once - loaded, 1e-9)
    if everything > once:
        rest_share = (clock_seconds - once) / (everything - once)
    else:
        rest_share = 1.0 if clock_seconds >= once else 0.0
    return {
        "rows": rows,
        "clock_seconds": clock_seconds,
        "first_order_seconds": round(once, 1),
        "all_seconds": round(everything, 1),
        "first_share": min(max(first_share, 0.0), 1.0),
        "rest_share": min(max(rest_share, 0.0), 1.0),
    }


def visible_lines(report: Mapping) -> list[str]:
    """Write the report as lines of the log."""
    lines = []
    if report.get("quality", {}).get("judged"):
        lines.append(f"visible run: {quality_line(report['quality'], report['flips'])}")
    for speed in report["speed"]:
        lines.append(
            f"visible run: {speed['run']}: {speed['rows_per_second']:.2f} rows/s in one order, "
            f"{speed['tokens_per_second']:.0f} tokens/s, {speed['tokens_per_row']:.0f} tokens "
            f"a row, loaded in {speed['loading_seconds']:.0f} s"
        )
    for finish in report["predicted"]:
        lines.append(finish_line(finish))
    return lines


def quality_line(quality: Mapping, flips: Mapping[str, float | None]) -> str:
    """Write how good the answers are, and each run's share of flips."""
    ties = quality["ties_left_out"]
    ties_note = f" (ties left out: {ties})" if ties else ""
    parts = [
        f"accuracy {quality['accuracy']:.4f} ± {2 * quality['standard_error']:.4f} "
        "(two standard errors)",
        f"log loss {quality['log_loss']:.4f} on {quality['judged']} rows{ties_note}",
        f"the longer answer: {quality['longer_accuracy']:.4f}",
    ]
    for run, share in flips.items():
        if share is not None:
            parts.append(f"{run} flips {share:.3f}")
    return ", ".join(parts)


def finish_line(finish: Mapping) -> str:
    """Write one prediction, with a warning where rows will be left to the prior."""
    beginning = f"predicted for {finish['rows']:,} rows"
    clock = format_hours(finish["clock_seconds"])
    # The share that gets no score at all is what a reader must see first.
    if finish["first_share"] < 1:
        return (
            f"warning: {beginning}: {clock} are enough for {finish['first_share']:.0%} of them; "
            "the others would get the prior"
        )

    first_order = format_hours(finish["first_order_seconds"])
    beginning += f": every row scored once after {first_order}"
    if finish["rest_share"] < 1:
        return f"{beginning}, {finish['rest_share']:.0%} of all else within {clock}"
    return f"{beginning}, all done after {format_hours(finish['all_seconds'])} of {clock}"


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


@dataclass(frozen=True)
class ModelScores:
    """A model's probabilities, by id and then by order of the responses, in its verdicts' order."""

    verdicts: Sequence[str]
    by_id: Mapping[str, Mapping[str, Sequence[float]]]


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


def is_first_longer(row: Mapping) -> bool:
    """Tell whether a row's first response has as many characters as its second, or more."""
    return count_characters(row["response_a"]) >= count_characters(row["response_b"])


def count_characters(text: str | Sequence[str | None] | None) -> int:
    """Count the characters of a text, or of all its turns."""
    if text is None:
        return 0
    if isinstance(text, str):
        return len(text)

    # A conversation of LMSYS has None for a turn without an answer.
    characters = 0
    for turn in text:
        if turn is not None:
            characters += len(turn)
    return characters


def prior(row: Mapping, verdicts: Sequence[str]) -> list[float]:
    """Give a row that could not be scored probabilities, by which of its responses is longer."""
    longer, shorter, *tie = PRIOR[len(verdicts)]
    if is_first_longer(row):
        return [longer, shorter, *tie]
    return [shorter, longer, *tie]


def describe_shortfall(
    rows: Sequence[Mapping], scored: Mapping[str, Sequence[float]], min_scored: float
) -> str | None:
    """Say how many rows were scored, where it is a smaller share than `min_scored`, else None."""
    scored_rows = sum(row["id"] in scored for row in rows)
    if scored_rows >= min_scored * len(rows):
        return None
    return f"{scored_rows} of {len(rows)} rows were scored, the spec's min_scored is {min_scored}"


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
    """Write id,winner or id and one probability a verdict. Where a check fails, no file is left."""
    check_probabilities(final, settings.verdicts)
    with whole_file(path) as temporary:
        with temporary.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["id", *settings.columns])
            for row_id, values in final.items():
                answer = values
                # One column holds the name of the winner, several hold probabilities.
                if len(settings.columns) == 1:
                    answer = [settings.verdicts[values.index(max(values))]]
                writer.writerow([row_id, *answer])

        # What stands in the file is checked, not what was meant to.
        check_submission(temporary, settings, ids)


def check_probabilities(final: Mapping[str, Sequence[float]], verdicts: Sequence[str]) -> None:
    """Raise ValueError at a row without one probability a verdict, which sum to one."""
    for row_id, values in final.items():
        are_probabilities = len(values) == len(verdicts) and all(0 < value < 1 for value in values)
        if not are_probabilities or not math.isclose(sum(values), 1, abs_tol=1e-6):
            raise ValueError(
                f"id {row_id}: {list(values)} are not probabilities that sum to one, one for each "
                f"of {', '.join(verdicts)}; nothing is submitted"
            )


def check_submission(path: Path, settings: Settings, ids: Sequence[str]) -> None:
    """Raise ValueError unless a file has every id once, in order, with a valid answer."""
    with path.open(encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    expected_header = ["id", *settings.columns]
    if header != expected_header:
        raise ValueError(f"{path}: columns {header}, expected {expected_header}")

    # An empty line has no id; it still counts as a row that is not the expected one.
    written_ids = []
    for line in lines:
        written_ids.append(line[0] if line else "")
    check_order(path, written_ids, ids)

    for row_id, *answer in lines:
        expected = len(settings.columns)
        if len(answer) != expected:
            raise ValueError(f"{path}: id {row_id}: {len(answer)} values, expected {expected}")
        if expected > 1:
            numbers = [float(value) for value in answer]
            check_probabilities({row_id: numbers}, settings.verdicts)
        elif answer[0] not in settings.verdicts:
            verdicts = ", ".join(settings.verdicts)
            raise ValueError(f"{path}: id {row_id}: {answer[0]!r}, expected one of {verdicts}")


def check_order(path: Path, written_ids: Sequence[str], ids: Sequence[str]) -> None:
    """Raise ValueError at the first id that is not the test file's at that place."""
    for place, (written, expected) in enumerate(itertools.zip_longest(written_ids, ids), start=1):
        if written == expected:
            continue

        # zip_longest gives None where one of the two lists has ended.
        here = f"row {place} has {written!r}"
        if written is None:
            here = f"row {place} is missing"
        there = "no more" if expected is None else repr(expected)
        raise ValueError(
            f"{path}: its {len(written_ids)} ids are not the test file's {len(ids)} ids in their "
            f"order: {here}, expected {there}"
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
    models: Mapping[str, ModelScores],
) -> None:
    """Write scores.parquet with every probability.

    Its columns are id, p_VERDICT as submitted, `scored` (else that is the prior), and
    RUN_p_VERDICT_ORDER as each model gave it, null where it did not score the row.
    """
    columns: dict[str, list] = {"id": list(final), "scored": [row_id in scored for row_id in final]}
    for place, verdict in enumerate(verdicts):
        columns[f"p_{verdict}"] = [values[place] for values in final.values()]

    # Each model's own opinion, order by order.
    for run, model in models.items():
        orders: set[str] = set()
        for by_order in model.by_id.values():
            orders.update(by_order)
        for order in sorted(orders):
            for place, verdict in enumerate(model.verdicts):
                columns[f"{run}_p_{verdict}_{order}"] = read_column(model, order, place, final)

    with whole_file(path) as temporary:
        pq.write_table(pa.table(columns), temporary)


def read_column(
    model: ModelScores, order: str, place: int, ids: Iterable[str]
) -> list[float | None]:
    """Read one verdict's probabilities in one order, by its place; None for a row without."""
    column: list[float | None] = []
    for row_id in ids:
        values = model.by_id.get(row_id, {}).get(order)
        column.append(None if values is None else values[place])
    return column


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
            outputs_bu = head_outputs(model, contract, group, device).float().cpu()
        for place, row in zip(places, outputs_bu, strict=True):
            rows[place] = row

    logits = torch.stack(rows)
    if contract.head != "reward":
        return logits

    # A pair's two rewards are its two logits: Bradley and Terry's model.
    sides = [REWARD_SIDES.index(verdict) for verdict in contract.verdicts]
    return logits.view(-1, 2)[:, sides]


def head_outputs(
    model: torch.nn.Module, contract, sequences: Sequence[list[int]], device: str
) -> torch.Tensor:
    """Run the model over sequences, padded on the right, and read its head's outputs at one place of each."""
    is_causal_lm = contract.head == "label_tokens"
    is_decoder = is_causal_lm or getattr(model, "causal", False)
    ids_bt, mask_bt = pad(sequences, contract.pad_token_id)
    inputs = {"input_ids": ids_bt.to(device)}

    # What a decoder reads never sees the padding behind it, so that only an encoder needs a mask.
    if not is_decoder and not mask_bt.all():
        inputs["attention_mask"] = mask_bt.long().to(device)

    read_places = list_read_places(contract, sequences, is_decoder)
    places_b = torch.tensor(read_places, device=device)
    with reading(places_b):
        logits = model(**inputs).logits
    if not is_causal_lm:
        return logits

    # A model that was loaded by load_model has computed no more than this (see shortcuts.LabelHead).
    if logits.shape[1] > 1:
        rows_b = torch.arange(len(sequences), device=logits.device)
        logits = logits[rows_b, places_b.to(logits.device)].unsqueeze(1)
    if logits.shape[-1] > len(contract.label_token_ids):
        logits = logits[..., list(contract.label_token_ids)]
    return logits[:, 0]


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
    lengths = [len(ids) for ids in sequences]
    shape = (len(sequences), max(lengths))
    ids_bt = torch.full(shape, pad_token_id)
    mask_bt = torch.zeros(shape, dtype=torch.bool)

    for row, ids in enumerate(sequences):
        length = len(ids)
        ids_bt[row, :length] = torch.tensor(ids)
        mask_bt[row, :length] = True
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
    scores: dict[str, dict[str, list[float]]] = {pair.id: {} for pair in pairs}
    if len(scores) != len(pairs):
        raise ValueError(
            f"{len(pairs) - len(scores)} pairs have the id of another one; scores are joined by id"
        )

    # Where the orders do not differ, one is computed and counts for all.
    orders = tuple(orders)
    distinct_orders = orders_of(contract, orders)
    requests = make_requests(model_input, tokenizer, contract, pairs, distinct_orders)
    overflowed = 0
    for batch in make_batches(requests, tokens_per_batch):
        batch_scores = score_batch(model, model_input, contract, batch, device)
        overflowed += batch_scores.overflowed
        for request, values in zip(batch, batch_scores.probabilities, strict=True):
            if not all(map(math.isfinite, values)):
                raise FloatingPointError(
                    f"row {request.id}, {request.order}: probabilities {values} in {model.dtype}"
                )
            scored_orders = orders
            if distinct_orders == orders:
                scored_orders = [request.order]
            scores[request.id] |= dict.fromkeys(scored_orders, values)

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
    if contract.head not in CLASSES:
        raise PackageError(
            f"{folder}: its head is {contract.head!r}; this runtime scores {', '.join(CLASSES)}"
        )
    if dtype is None:
        dtype = torch.float16 if device.startswith("cuda") else torch.float32

    # For some CPUs bitsandbytes looks for a compiled kernel on a hub, and warns that it does without.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)

    config = serving_config(folder, contract)
    is_quantised = set_quantisation(config, folder, device)

    # Without a device_map weights are read on the CPU first, and quantised ones are not read at all.
    options = {}
    if device_map or is_quantised or device != "cpu":
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


def set_quantisation(config, folder: Path | str, device: str) -> bool:
    """Prepare a configuration for the package's kind of quantisation, and say whether it has one."""
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return False
    if device.startswith("cuda") and quantised.get("bnb_4bit_compute_dtype") == "bfloat16":
        raise PackageError(
            f"{folder}: computes in bfloat16, which a T4 lacks; quantise it again from float16 weights"
        )
    if quantised.get("quant_method") == "gptq":
        config.quantization_config = unpacking(quantised, folder)
    return True


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
    result = set_peft_model_state_dict(model, tensors)

    # PEFT also counts the weights of the base model as missing.
    unmatched = [
        name for name in result.missing_keys if "lora_" in name or ".modules_to_save." in name
    ]
    unmatched += result.unexpected_keys
    if unmatched:
        raise PackageError(
            f"{lora_path}: not the adapter of {lora_config_path}: {', '.join(unmatched[:5])}"
        )

    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    replaced_names = {name.removeprefix("base_model.model.") for name in tensors}
    return model, replaced_names


def serving_config(folder: Path | str, contract):
    """Read the folder's config.json, with pad id and soft-cap set as the contract says."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    verdicts = contract.verdicts

    # The head has one output for each verdict, or one reward, or is the language model's own.
    expected_labels = {"score": len(verdicts), "reward": 1, "label_tokens": 0}[contract.head]
    labels = 0 if contract.head == "label_tokens" else config.num_labels
    if not labels == contract.num_labels == expected_labels:
        raise PackageError(
            f"{folder}: config.json has {labels} labels, contract.json {contract.num_labels} for the head {contract.head} and "
            f"the verdicts {', '.join(verdicts)}; package the run again"
        )
    if contract.head == "label_tokens" and len(contract.label_token_ids) != len(verdicts):
        raise PackageError(
            f"{folder}: contract.json names {len(contract.label_token_ids)} label tokens; package the run again"
        )

    config.pad_token_id = contract.pad_token_id

    # Else keys and values are kept for a generation that never comes: 2.8 GB of Gemma-2-9b.
    config.use_cache = False

    # Training may have left the soft cap of attention out, for the sake of SDPA.
    if contract.softcap and not getattr(config, "attn_logit_softcapping", None):
        raise PackageError(
            f"{folder}: trained with a soft-cap, but config.json has no attn_logit_softcapping"
        )
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
    """In this thread, hidden states are float32 from the first layer on, whatever the dtype of the weights."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        """Call `function` with float32 in place of float16; PyTorch calls this for every function."""
        kwargs = kwargs or {}
        # Hidden states are float32 and the weights float16: the weights follow.
        if function in WITH_WEIGHTS:
            args = [to_float32(value) for value in args]
            kwargs = {name: to_float32(value) for name, value in kwargs.items()}
        # The int8 kernel of bitsandbytes reads float16 only, in which a larger number is infinite.
        if str(function) == QUANTISE_TO_INT8:
            args = (args[0].clamp(-FLOAT16_MAX, FLOAT16_MAX).half(), *args[1:])

        result = function(*args, **kwargs)

        # bitsandbytes and PEFT convert a layer's input to the dtype of its weights, where it would
        # overflow again: the input stays as it is.
        is_narrowed = function is torch.Tensor.to and result.dtype is torch.float16
        if is_narrowed and args[0].dtype is torch.float32:
            return args[0]
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

# The kinds of GPTQ that are unpacked here, by the keys of config.json.
SUPPORTED = {"bits": (4, 8), "desc_act": (False,), "sym": (True,), "checkpoint_format": ("gptq",)}


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
        """Bring the loaded tensors into the order in which they are used; what they came in is freed."""
        words_ui = self.qweight.T.clone(memory_format=torch.contiguous_format)

        # The format stores each zero less one.
        zeros_uq = unpack(self.qzeros, self.bits).T + 1
        scales_uq = self.scales.T.contiguous()

        self.register_buffer("words_ui", words_ui)
        self.register_buffer("zeros_uq1", zeros_uq.unsqueeze(-1))
        self.register_buffer("scales_uq1", scales_uq.unsqueeze(-1))
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


def unpacking(settings: Mapping[str, object], folder: Path | str) -> dict[str, object]:
    """Rewrite config.json's `quantization_config` as from_pretrained must get it."""
    for key, supported in SUPPORTED.items():
        if settings.get(key) not in supported:
            expected = " or ".join(map(str, supported))
            raise PackageError(
                f"{folder}: config.json: {key} is {settings.get(key)!r}, expected {expected}; quantise it again"
            )

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

    def cost_of(cuts: Sequence[int]) -> tuple[int, int, int]:
        stages = cut_parts(parts, cuts)
        stage_bytes = [sum(part.size_bytes for part in stage) for stage in stages]
        stage_work = [sum(part.work for part in stage) for stage in stages]
        most_bytes = max(stage_bytes)
        most_work = max(stage_work)

        # Memory comes first: a split that does not fit is of no use, however fast.
        if byte_limit is None:
            return (0, most_work, most_bytes)
        excess_bytes = max(most_bytes - byte_limit, 0)
        return (excess_bytes, most_work, most_bytes)

    # There are few ways to cut some dozens of layers in two: all are tried.
    all_cuts = itertools.combinations(range(1, len(parts)), devices - 1)
    best_cuts = min(all_cuts, key=cost_of)

    numbers = []
    for device, stage in enumerate(cut_parts(parts, best_cuts)):
        numbers += [device] * len(stage)
    return numbers


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
