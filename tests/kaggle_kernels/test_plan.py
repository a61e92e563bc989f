"""Two models on two devices: the plan by its cost model, and the same answers whichever way it goes."""

import json
import shutil
import threading
from dataclasses import replace

import pytest
import torch

from kaggle_kernels.runtime import engine
from kaggle_kernels.runtime import main as runtime_main
from kaggle_kernels.runtime.main import score_in_turn, score_packages, score_side_by_side
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.plan import (
    Job,
    job_of,
    loading_seconds,
    make_plan,
    seconds_in_turn,
    seconds_side_by_side,
    share_devices,
)
from kaggle_kernels.runtime.settings import Clock, start_clock
from kaggle_kernels.spec import Spec, settings_of
from tests import tiny
from tests.kaggle_kernels.packages import make_package, settings_for

GPUS = ["cuda:0", "cuda:1"]
SPEC = Spec(
    title="Title",
    competition="wsdm",
    packages=[{"run": "two", "dataset": "tiny-two", "weight": 0.5}, {"run": "other", "dataset": "tiny-other", "weight": 0.5}],
    clock_seconds=600,
    tokens_per_batch=1000,
)
SETTINGS = settings_of("test", SPEC, [settings_for("two", "tiny-two", 0.5), settings_for("other", "tiny-other", 0.5)])
ROWS = [{key: row[key] for key in ("id", "prompt", "response_a", "response_b")} for row in tiny.pairs(30, seed=9).to_dicts()]


@pytest.fixture(scope="module")
def packages(package_folder, tiny_models, tmp_path_factory):
    other = make_package(tmp_path_factory.mktemp("packages") / "other", tiny_models("gemma2"), seed=5)
    return [read_package(package_folder), read_package(other)]


def test_the_cost_model_by_numbers():
    jobs = [Job(load_bytes=6e9, flop=3e15), Job(load_bytes=3e9, flop=6e15)]
    assert seconds_in_turn(jobs, GPUS) == pytest.approx(40 + 100 + 20 + 200)
    assert seconds_side_by_side(jobs, GPUS) == pytest.approx(20 + 10 + 400)


def test_models_of_like_size_go_side_by_side_and_unlike_ones_in_turn():
    like = make_plan([Job(6e9, 3e15), Job(6e9, 3e15)], True, GPUS, 10000)
    assert like.side_by_side and like.why == "side by side (estimates: in turn 280 s, side by side 240 s, 10000 s left)"
    unlike = make_plan([Job(6e9, 3e15), Job(3e9, 6e15)], True, GPUS, 10000)
    assert not unlike.side_by_side and unlike.why == "in turn (estimates: in turn 360 s, side by side 430 s, 10000 s left)"


def test_side_by_side_needs_twice_its_estimate_on_the_clock():
    jobs = [Job(6e9, 3e15), Job(6e9, 3e15)]
    assert make_plan(jobs, True, GPUS, 481).side_by_side
    assert not make_plan(jobs, True, GPUS, 479).side_by_side


@pytest.mark.parametrize("jobs, can_part, devices", [(2, False, 2), (1, True, 2), (3, True, 2), (2, True, 1)])
def test_a_split_model_too_few_devices_or_one_model_go_in_turn(jobs, can_part, devices):
    plan = make_plan([Job(6e9, 3e15)] * jobs, can_part, GPUS[:devices], 10000)
    assert (plan.side_by_side, plan.side_by_side_seconds) == (False, None)


def test_devices_are_shared_out_to_the_last_one():
    assert share_devices(["a", "b", "c"], 2) == [("a", "c"), ("b",)]


def test_the_work_is_twice_the_multiplied_parameters_times_the_tokens_in_both_orders(packages):
    package = packages[0]
    pairs = [package.model_input.pair_from_row(row) for row in ROWS]
    tokens = sum(len(package.model_input.encode(pair, package.tokenizer, package.contract)[0]) for pair in pairs)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    job = job_of(package, package.contract, pairs, ("as_given", "swapped"))
    assert job.flop == pytest.approx(2 * (2 * layer + 2 * 64) * 2 * tokens)
    assert job.load_bytes == 4 * (2 * layer + 2 * 64 + 1024 * 64 + 9 * 64)
    assert job_of(package, package.contract, pairs, ("as_given",)).flop == pytest.approx(job.flop / 2)


def test_both_ways_give_what_each_model_gives_alone(packages):
    in_turn, records = score_in_turn(SETTINGS, packages, ROWS, ["cpu", "cpu"], start_clock(600))
    beside, side_records = score_side_by_side(SETTINGS, packages, ROWS, ["cpu", "cpu"], start_clock(600))
    for number, package in enumerate(packages):
        alone, _ = score_in_turn(
            replace(SETTINGS, packages=SETTINGS.packages[number : number + 1]), [package], ROWS, ["cpu"], start_clock(600)
        )
        for row in ROWS:
            for order in ("as_given", "swapped"):
                expected = pytest.approx(alone[0][row["id"]][order], abs=1e-5)
                assert in_turn[number][row["id"]][order] == expected
                assert beside[number][row["id"]][order] == expected
    assert [record["pass"] for record in records] == [record["pass"] for record in side_records]
    assert abs(in_turn[0]["row00001"]["as_given"][0] - in_turn[1]["row00001"]["as_given"][0]) > 1e-3


@pytest.mark.parametrize("chosen", [True, False])
def test_the_plan_is_followed_and_told(packages, monkeypatch, capsys, chosen):
    called = []
    monkeypatch.setattr(runtime_main, "score_side_by_side", lambda *_: called.append("side by side") or ([], []))
    monkeypatch.setattr(runtime_main, "score_in_turn", lambda *_: called.append("in turn") or ([], []))
    clock = start_clock(600)
    left = Clock(clock.began, clock.deadline if chosen else clock.began + 0.001)
    _, records = score_packages(SETTINGS, packages, ROWS, ["cpu", "cpu"], left)
    assert called == ["side by side" if chosen else "in turn"]
    assert f"plan: {called[0]} (estimates: in turn " in capsys.readouterr().out
    assert records[0]["plan"].startswith(called[0])


def test_with_one_device_there_is_nothing_to_plan(packages, monkeypatch):
    monkeypatch.setattr(runtime_main, "job_of", lambda *_: pytest.fail("planned"))
    monkeypatch.setattr(runtime_main, "score_in_turn", lambda *_: ("scores", "records"))
    assert score_packages(SETTINGS, packages, ROWS, ["cpu"], start_clock(600)) == ("scores", "records")


def test_a_device_that_breaks_side_by_side_leaves_its_rows_to_the_other(packages, monkeypatch):
    whole, _ = score_side_by_side(SETTINGS, packages, ROWS, ["cpu", "cpu"], start_clock(600))
    real_serve, real_score_batch, broken, calls = engine.serve, engine.score_batch, threading.local(), []

    def serve(work, worker, package, *rest):
        if package is packages[0] and not calls:
            calls.append(work.label)
            broken.here = True
        real_serve(work, worker, package, *rest)

    def score_batch(*arguments):
        if getattr(broken, "here", False):
            raise RuntimeError("CUDA error")
        return real_score_batch(*arguments)

    monkeypatch.setattr(engine, "serve", serve)
    monkeypatch.setattr(engine, "score_batch", score_batch)
    scores, records = score_side_by_side(SETTINGS, packages, ROWS, ["cpu", "cpu"], start_clock(600))
    assert calls == ["two, as_given"]
    assert all(scores[0][row["id"]]["as_given"] == pytest.approx(whole[0][row["id"]]["as_given"], abs=1e-5) for row in ROWS)
    assert scores[1] == whole[1]
    assert records[-1]["scored"] == 30


def break_one_device(monkeypatch, package):
    """The first thread that serves `package` fails, as on a GPU after an illegal memory access."""
    real_serve, broken = engine.serve, []

    def serve(work, worker, served, *rest):
        if served is package and not broken:
            broken.append(worker)
            worker.failure = "CUDA error"
        real_serve(work, worker, served, *rest)

    monkeypatch.setattr(engine, "serve", serve)


def test_a_broken_device_that_does_not_answer_when_its_memory_is_freed_stops_nothing(packages, monkeypatch):
    def empty_cache():
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    break_one_device(monkeypatch, packages[0])
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    scores, _ = score_side_by_side(SETTINGS, packages, ROWS, ["cpu", "cpu"], start_clock(600))
    assert all(len(scores[number][row["id"]]) == 2 - (number == 0) for number in (0, 1) for row in ROWS)


def test_a_rescue_that_fails_leaves_the_other_packages_scores(packages, monkeypatch, capsys):
    loaded = []

    def load_workers(package, *rest):
        loaded.append(package)
        if len(loaded) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return engine.load_workers(package, *rest)

    break_one_device(monkeypatch, packages[0])
    monkeypatch.setattr(runtime_main, "load_workers", load_workers)
    scores, _ = score_side_by_side(SETTINGS, packages, ROWS, ["cpu", "cpu"], start_clock(600))
    assert [[len(scores[number][row["id"]]) for row in ROWS] for number in (0, 1)] == [[0] * 30, [2] * 30]
    assert "cannot be loaded on cpu" in capsys.readouterr().out


def test_a_later_package_that_cannot_be_loaded_before_the_deadline_is_left_out(packages, monkeypatch, capsys):
    loaded = []
    real_load = runtime_main.load_workers
    monkeypatch.setattr(
        runtime_main, "load_workers", lambda package, *rest: loaded.append(package) or real_load(package, *rest)
    )
    monkeypatch.setattr(runtime_main, "loading_seconds", lambda package, copies: 1000.0 * copies)
    scores, _ = score_in_turn(SETTINGS, packages, ROWS, ["cpu"], start_clock(600))
    assert loaded == packages[:1]
    assert [[len(scores[number][row["id"]]) for row in ROWS] for number in (0, 1)] == [[2] * 30, [0] * 30]
    assert "other: left out, " in capsys.readouterr().out


def test_loading_takes_as_long_as_its_bytes_and_copies(packages):
    size = (packages[0].folder / "model.safetensors").stat().st_size
    assert loading_seconds(packages[0], 2) == pytest.approx(2 * size / 3e8, rel=0.05)


def test_a_kernel_with_two_models_writes_one_submission(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "working").mkdir()
    folder = tmp_path / "input" / SETTINGS.competition
    folder.mkdir(parents=True)
    tiny.pairs(30, seed=9).drop("winner").write_parquet(folder / "test.parquet")
    for package, dataset in zip(packages, ("tiny-two", "tiny-other"), strict=True):
        shutil.copytree(package.folder, tmp_path / "input" / dataset)
    runtime_main.run_kernel(SETTINGS, devices=["cpu", "cpu"])
    record = json.loads((tmp_path / "working" / "kernel.json").read_text())
    assert record["passes"][0]["plan"].startswith(("side by side", "in turn"))
    assert (record["rows"], record["scored"], len(record["passes"])) == (30, 30, 5)
