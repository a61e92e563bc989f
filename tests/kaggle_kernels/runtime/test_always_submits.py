"""What one device, one row or one package cannot do costs no more than that: the others go on, and the hidden run submits."""

import json
import multiprocessing
import os
import shutil
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import polars as pl
import pytest

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime import main
from kaggle_kernels.runtime.main import run_kernel
from kaggle_kernels.runtime.models.scoring import Request
from kaggle_kernels.runtime.package import PackageError, read_package
from kaggle_kernels.runtime.scheduling import crew, schedule
from kaggle_kernels.runtime.scheduling.crew import RECOVERY_BATCHES, Worker, leave
from kaggle_kernels.runtime.scheduling.engine import make_pass, run_pass
from kaggle_kernels.runtime.scheduling.schedule import make_board, score_all, start_team
from kaggle_kernels.runtime.settings import start_clock
from tests import tiny
from tests.kaggle_kernels.packages import make_package, settings_for
from tests.kaggle_kernels.runtime.workers import Device, answer, hang_up, start_in_thread

pytestmark = pytest.mark.usefixtures("workers_in_threads")
REQUESTS = [Request(f"row{number}", "as_given", ([1 + number % 7] * (20 + 4 * number),)) for number in range(20)]
EXPECTED = {request.id: answer(request) for request in REQUESTS}
SPEC = Spec(
    title="Title",
    competition="wsdm",
    packages=[{"run": "two", "dataset": "tiny-two", "weight": 0.5}, {"run": "other", "dataset": "tiny-other", "weight": 0.5}],
    clock_seconds=600,
    tokens_per_batch=1000,
)
SETTINGS = settings_of("test", SPEC, [settings_for("two", "tiny-two", 0.5), settings_for("other", "tiny-other", 0.5)])
ONE = replace(SETTINGS, packages=(settings_for("two", "tiny-two"),))
ROWS = [{key: row[key] for key in ("id", "prompt", "response_a", "response_b")} for row in tiny.pairs(30, seed=9).to_dicts()]


def run(workers):
    try:
        return run_pass(make_pass("test", REQUESTS, time.monotonic() + 600, workers), workers, start_clock(600))
    finally:
        crew.stop_workers(workers)


def refuse(connection, task):
    connection.send(("refused", "golden row 7"))


def refusing(name):
    worker = Worker(name, None, 500, lambda task: start_in_thread(task, refuse), (0,))
    worker.launch()
    return worker


def test_rows_that_one_worker_has_no_memory_for_are_scored_by_the_other():
    small, large = Device(memory_tokens=60), Device(seconds_per_batch=0.02)
    work = run([small.worker(name="cuda:0"), large.worker(name="cuda:1")])
    assert work.scores == EXPECTED
    assert work.given_up == []
    assert all(tokens <= 60 for _, tokens in small.batches)


def test_a_device_that_refuses_the_package_leaves_the_rows_to_one_that_does_not(capsys):
    workers = [refusing("cuda:0"), Device(seconds_per_batch=0.02).worker(name="cuda:1")]
    work = run(workers)
    assert work.scores == EXPECTED
    assert [worker.gone for worker in workers] == [True, False]
    assert "cuda:0: refuses the package, which another device may not: golden row 7" in capsys.readouterr().out


def test_a_package_that_every_device_refuses_raises():
    with pytest.raises(PackageError, match="golden row 7"):
        run([refusing("cuda:0"), refusing("cuda:1")])


def test_after_each_death_the_budget_needs_twice_as_many_batches_to_grow():
    worker = Worker("cpu", None, 800, None, most_tokens=800, deaths=3, fruitless=0)
    worker.tokens_per_batch = 100
    for number in range(4 * RECOVERY_BATCHES):
        assert worker.tokens_per_batch == 100
        worker.outstanding[number] = [REQUESTS[0]]
        worker.note_scored(number, [1])
    assert worker.tokens_per_batch == 200


def test_a_worker_is_killed_and_a_process_that_does_not_end_is_not_waited_for_for_ever():
    done = []

    class Process:
        def kill(self):
            done.append("killed")

        def join(self, timeout=None):
            done.append(timeout)

    ours, _ = multiprocessing.Pipe()
    Worker("cuda:0", None, 500, None, process=Process(), connection=ours).stop()
    assert done == ["killed", 30.0]


@pytest.mark.parametrize("children, left", [([], []), (["stuck"], [0])])
def test_the_kernel_leaves_at_once_where_a_process_is_stuck(monkeypatch, children, left):
    exits = []
    monkeypatch.setattr(multiprocessing, "active_children", lambda: children)
    monkeypatch.setattr(os, "_exit", exits.append)
    leave()
    assert exits == left


@pytest.fixture(scope="module")
def packages(package_folder, tiny_models, tmp_path_factory):
    other = make_package(tmp_path_factory.mktemp("packages") / "other", tiny_models("gemma2"), seed=5)
    return [read_package(package_folder), read_package(other)]


def board_of(packages, settings=SETTINGS, hidden_run=True, devices=("cpu", "cpu")):
    return make_board(settings, packages, ROWS, devices, start_clock(600), hidden_run)


def in_place_of(monkeypatch, folder, target):
    """Workers with the package in `folder` do `target`."""
    real = crew.start_process
    spoilt = partial(start_in_thread, target=target)
    monkeypatch.setattr(crew, "start_process", lambda task: (spoilt if task.folder == str(folder) else real)(task))


@pytest.mark.parametrize("target", [lambda connection, _: hang_up(connection), refuse], ids=["cannot load", "refuses"])
def test_a_further_package_that_cannot_be_had_takes_no_device_with_it(packages, monkeypatch, target):
    monkeypatch.setattr(schedule, "make_plan", lambda *_: SimpleNamespace(side_by_side=False, why="as told"))
    in_place_of(monkeypatch, packages[1].folder, target)
    board = board_of(packages)
    # A device whose first model is still being loaded as the rows are done could not be told from a lost one.
    board.proven = {0, 1}
    score_all(board)
    assert all(len(by_order) == 2 for by_order in board.scores[0].values())
    assert not any(board.scores[1].values())
    assert board.devices == {0: "cpu", 1: "cpu"}
    visible = board_of(packages, hidden_run=False)
    visible.proven = {0, 1}
    with pytest.raises(PackageError):
        score_all(visible)


def test_a_split_model_is_not_loaded_on_half_of_its_devices(packages, capsys):
    split = replace(SETTINGS, packages=tuple(replace(chosen, placement="split") for chosen in SETTINGS.packages))
    board = board_of(packages, split)
    del board.devices[1]
    assert start_team(board, 0, {0: "cpu", 1: "cpu"}) == []
    assert "two: no device is left for it" in capsys.readouterr().out


def test_a_row_that_was_given_up_in_one_order_is_not_tried_in_the_other(packages, monkeypatch):
    real, asked = schedule.run_pass, []

    def give_one_up(work, workers, clock):
        asked.append({request.id for batch in work.queue for request in batch})
        done = real(work, workers, clock)
        done.scores.pop("row00003", None)
        done.given_up.append("row00003")
        return done

    monkeypatch.setattr(schedule, "run_pass", give_one_up)
    board = board_of(packages[:1], ONE)
    score_all(board)
    everything = {row["id"] for row in ROWS}
    assert asked == [everything, everything - {"row00003"}]


@pytest.fixture
def kaggle(tmp_path, monkeypatch, package_folder):
    """A tree like Kaggle's with 30 test rows, in the hidden run."""
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    (tmp_path / "working").mkdir()
    shutil.copytree(package_folder, tmp_path / "input" / "tiny-two")
    folder = tmp_path / "input" / SETTINGS.competition
    folder.mkdir(parents=True)
    tiny.pairs(30, seed=9).drop("winner").write_parquet(folder / "test.parquet")
    return tmp_path


def fail_in_the_second_pass(monkeypatch):
    real, calls = schedule.run_pass, []

    def fail(*arguments):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("what nobody thought of")
        return real(*arguments)

    monkeypatch.setattr(schedule, "run_pass", fail)


def test_what_goes_wrong_after_the_first_order_does_not_lose_it(kaggle, monkeypatch, capsys):
    fail_in_the_second_pass(monkeypatch)
    run_kernel(ONE)
    assert pl.read_csv(kaggle / "working" / "submission.csv").height == 30
    assert json.loads((kaggle / "working" / "kernel.json").read_text())["scored"] == 30
    assert "RuntimeError: what nobody thought of" in capsys.readouterr().out


def test_in_the_visible_run_it_ends_the_kernel(kaggle, monkeypatch):
    fail_in_the_second_pass(monkeypatch)
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN")
    with pytest.raises(RuntimeError, match="what nobody thought of"):
        run_kernel(ONE)
    assert not (kaggle / "working" / "submission.csv").exists()


def test_with_too_few_scores_it_raises_in_the_hidden_run_too(kaggle, monkeypatch):
    monkeypatch.setattr(main, "score_all", lambda board: 1 / 0)
    with pytest.raises(ValueError, match="0 of 30 rows were scored"):
        run_kernel(ONE)


def test_a_record_that_cannot_be_written_does_not_cost_the_submission(kaggle, monkeypatch, capsys):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(main, "write_scores", full)
    run_kernel(ONE)
    assert pl.read_csv(kaggle / "working" / "submission.csv").height == 30
    assert "No space left on device" in capsys.readouterr().out
