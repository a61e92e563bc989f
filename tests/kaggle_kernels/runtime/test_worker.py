"""Worker processes as on Kaggle: started, killed, started again, and the same answers."""

import multiprocessing
import os
import signal
import threading
from pathlib import Path

import pytest

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import make_requests, score
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.scheduling.pass_runner import make_pass, receive, run_pass
from kaggle_kernels.runtime.scheduling.worker import Assignment, serve
from kaggle_kernels.runtime.scheduling.worker_handle import start_workers
from kaggle_kernels.runtime.settings import start_clock
from tests import tiny
from tests.kaggle_kernels.packages import settings_for, write_manifest
from tests.kaggle_kernels.runtime.workers import start_in_thread


def test_two_processes_of_which_one_is_killed_score_what_one_model_scores(package_folder, capsys):
    package = read_package(package_folder)
    pairs = [package.model_input.pair_from_row(row) for row in tiny.pairs(400, seed=9).to_dicts()]
    requests = make_requests(package.model_input, package.tokenizer, package.contract, pairs, ("as_given",))
    clock = start_clock(600)
    workers = start_workers(package, settings_for("two", "tiny-two"), {0: "cpu", 1: "cpu"}, 300, 1, clock)
    try:
        for worker in workers:
            receive(make_pass("nothing", [], clock.deadline, workers), worker, workers, clock)
        names = [Path(f"/proc/{worker.process.pid}/comm").read_text().strip() for worker in workers]
        os.kill(workers[1].process.pid, signal.SIGKILL)
        done = run_pass(make_pass("test", requests, clock.deadline, workers), workers, clock)
        processes = [worker.process for worker in workers]
    finally:
        for worker in workers:
            worker.stop()
    assert names == ["worker 0", "worker 1"]
    printed = capsys.readouterr().out
    assert (printed.count("died"), workers[1].gone) == (1, False)
    assert "worker 1 on cpu: died (exit code -9)" in printed
    model = load_model(package_folder, package.contract, "cpu")
    expected = score(model, package.model_input, package.tokenizer, package.contract, pairs, orders=("as_given",))
    assert len(done.scores) == 400
    for row_id, values in done.scores.items():
        assert values == pytest.approx(expected[row_id]["as_given"], abs=1e-5)
    assert [process.is_alive() for process in processes] == [False, False]


def first_message(folder):
    process, connection = start_in_thread(Assignment(str(folder), ("cpu",), 0, 0))
    message = connection.recv()
    connection.close()
    process.thread.join(10)
    return message


def test_a_worker_tells_what_it_loaded(package_folder):
    kind, facts = first_message(package_folder)
    assert (kind, facts["dtype"], facts["batches_at_once"]) == ("loaded", "torch.float32", 1)
    assert facts["worst"] < 1e-5


def test_a_worker_refuses_weights_that_are_not_those_packaged(spoilt):
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(spoilt / "model.safetensors")
    weights["score.weight"] = torch.flip(weights["score.weight"], [0])
    save_file(weights, spoilt / "model.safetensors", metadata={"format": "pt"})
    write_manifest(spoilt)
    kind, sentence = first_message(spoilt)
    assert kind == "refused"
    assert "PackageError: " in sentence and "the package recorded" in sentence


def test_a_worker_that_cannot_load_says_why(spoilt):
    (spoilt / "model.safetensors").write_bytes(b"no tensors")
    kind, told = first_message(spoilt)
    assert kind == "failed"
    assert "safetensors" in told.lower()


def test_a_worker_with_two_stages_scores_two_batches_at_once():
    both_are_scored = threading.Barrier(2)

    def score_requests(requests):
        both_are_scored.wait(10)
        return requests

    ours, theirs = multiprocessing.Pipe()
    thread = threading.Thread(target=serve, args=(theirs, score_requests, 2), daemon=True)
    thread.start()
    for number in (1, 2):
        ours.send((number, [number]))
    answers = []
    for _ in range(2):
        assert ours.poll(20), "the batches are scored one after the other"
        answers.append(ours.recv())
    assert sorted(answers) == [("scored", 1, [1]), ("scored", 2, [2])]
    ours.close()
    thread.join(10)
