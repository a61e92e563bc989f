"""Memory, clocks and workers that fail: what happens to a batch, and that no row gets another row's answer."""

import multiprocessing
import os
import random
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from kaggle_kernels.runtime.models.scoring import Request
from kaggle_kernels.runtime.scheduling import pass_runner
from kaggle_kernels.runtime.scheduling import worker as runtime_worker
from kaggle_kernels.runtime.scheduling.pass_runner import Pass, make_pass, next_batch, pass_record, run_pass
from kaggle_kernels.runtime.scheduling.worker_handle import Worker, leave
from kaggle_kernels.runtime.settings import Clock, start_clock
from tests.kaggle_kernels.runtime.scoring_jobs import refuse
from tests.kaggle_kernels.runtime.workers import Device, answer, start_in_thread

FAR = 1000.0
LENGTHS = random.Random(4)
REQUESTS = [
    Request(f"row{number}", "as_given", ([LENGTHS.randrange(1, 50) for _ in range(LENGTHS.randrange(20, 120))],))
    for number in range(60)
]
EXPECTED = {request.id: answer(request) for request in REQUESTS}
LONGEST = max(REQUESTS, key=lambda request: request.length)


def run(workers, seconds=FAR, requests=REQUESTS, clock=None):
    work = make_pass("test", requests, time.monotonic() + seconds, workers)
    try:
        return run_pass(work, workers, clock or start_clock(FAR))
    finally:
        for worker in workers:
            worker.stop()


def holds(row_id):
    return lambda requests: any(request.id == row_id for request in requests)


def once(condition):
    """A condition that is true the first time it would be, and never again."""
    seen = []
    return lambda requests: bool(not seen and condition(requests) and not seen.append(1))


def test_the_slower_worker_gets_fewer_rows_so_that_both_end_together():
    fast, slow = Device(seconds_per_token=2e-5), Device(seconds_per_token=1e-4)
    work = run([fast.worker(200), slow.worker(200)])
    assert work.scores == EXPECTED
    record = pass_record(work)
    assert [record[key] for key in ("pass", "rows", "scored")] == ["test", 60, 60]
    assert record["tokens"] == sum(request.tokens for request in REQUESTS)
    fast_tokens, slow_tokens = (sum(tokens for _, tokens in device.batches) for device in (fast, slow))
    assert record["computed_tokens"] == fast_tokens + slow_tokens
    assert fast_tokens > 2 * slow_tokens > 0


def without(*left_out):
    """The expected scores of all rows but these."""
    return {row_id: values for row_id, values in EXPECTED.items() if row_id not in left_out}


def test_a_row_that_alone_needs_too_much_memory_is_given_up_and_the_others_are_scored():
    worker = Device(memory_tokens=LONGEST.tokens - 1).worker()
    work = run([worker])
    too_long = {request.id for request in REQUESTS if request.tokens == LONGEST.tokens}
    assert work.scores == without(*too_long)
    assert set(work.given_up) == too_long
    assert worker.tokens_per_batch == LONGEST.tokens // 2


@pytest.mark.parametrize(
    "way, line",
    [("dies_at", "cpu: died (exit code -9)"), ("fails_at", "RuntimeError: CUDA error: device-side assert triggered")],
)
def test_a_worker_that_dies_is_started_again_with_half_the_budget_and_its_rows_are_scored(way, line, capsys):
    device = Device()
    setattr(device, way, once(holds("row7")))
    worker = device.worker(240)
    work = run([worker])
    assert work.scores == EXPECTED
    assert (device.starts, worker.tokens_per_batch, worker.gone) == (2, 120, False)
    assert line in capsys.readouterr().out


def test_a_row_that_kills_its_worker_is_given_up_and_all_others_are_scored():
    device = Device()
    device.dies_at = holds("row7")
    worker = device.worker(1000)
    work = run([worker])
    assert work.given_up == ["row7"]
    assert work.scores == without("row7")
    assert (device.starts, worker.gone) == (4, False)


def test_a_device_that_is_lost_leaves_its_rows_to_the_other(capsys):
    lost, other = Device(), Device(seconds_per_batch=0.01)
    lost.loads = lambda start: start == 1
    lost.dies_at = lambda requests: True
    workers = [lost.worker(name="cuda:0"), other.worker(name="cuda:1")]
    work = run(workers)
    assert work.scores == EXPECTED
    assert (lost.starts, workers[0].gone, workers[1].gone) == (3, True, False)
    assert "cuda:0: gone after 3 deaths without a score in between" in capsys.readouterr().out


def test_a_worker_that_says_nothing_is_killed_and_started_again_unless_it_loads(monkeypatch):
    monkeypatch.setattr(pass_runner, "QUIET_SECONDS", 0.3)
    device = Device()
    device.loads = lambda start: start > 1 or time.sleep(1.3) is None  # longer than the pass waits before it looks
    device.hangs_at = once(holds("row7"))
    worker = device.worker()
    assert run([worker]).scores == EXPECTED
    assert device.starts == 2


def test_a_worker_that_hangs_into_the_reserve_is_killed_and_its_rows_are_left():
    device = Device(seconds_per_batch=0.01)
    device.hangs_at = holds(LONGEST.id)
    began = time.monotonic()
    work = run([device.worker()], seconds=0.5, clock=Clock(began, began + 0.5, 0.3))
    assert time.monotonic() - began < 5
    assert LONGEST.id not in work.scores


def refusing(name):
    worker = Worker(name, None, 500, lambda task: start_in_thread(task, refuse), (0,))
    worker.launch()
    return worker


def test_a_device_that_refuses_the_package_leaves_the_rows_to_one_that_does_not(capsys):
    workers = [refusing("cuda:0"), Device(seconds_per_batch=0.02).worker(name="cuda:1")]
    assert run(workers).scores == EXPECTED
    assert [worker.gone for worker in workers] == [True, False]
    assert "cuda:0: refuses the package, which another device may not: golden row 7" in capsys.readouterr().out


def test_scores_that_are_not_finite_count_as_not_scored():
    work = run([Device(not_finite=True).worker()])
    assert (work.scores, work.not_finite) == ({}, 60)


def queue_of(lengths, deadline):
    batches = [[Request(str(number), "as_given", ([5] * length,))] for number, length in enumerate(lengths)]
    return Pass("test", deque(batches), deadline, len(lengths))


def worker_of_rate(tokens_per_second, tokens_per_batch=100):
    return Worker("cpu", None, tokens_per_batch, None, tokens=tokens_per_second, seconds=1.0)


def test_a_batch_that_would_end_after_the_deadline_behind_those_before_it_stays_in_the_queue():
    worker = worker_of_rate(10)
    worker.outstanding[1] = [Request("before", "as_given", ([5] * 30,))]
    work = queue_of([40, 60], time.monotonic() + 6)
    assert next_batch(work, worker, [worker, worker]) is None
    assert [batch[0].id for batch in work.queue] == ["0", "1"]
    work.deadline += 2
    assert [request.id for request in next_batch(work, worker, [worker, worker])] == ["0"]


def test_what_a_short_clock_takes_from_the_end_goes_back_there():
    worker = worker_of_rate(10, tokens_per_batch=20)
    work = queue_of([90, 40], time.monotonic() + 5)
    work.queue.extend([[Request(name, "as_given", ([5] * 10,)) for name in "abc"]])
    assert [request.id for request in next_batch(work, worker, [worker])] == ["a", "b"]
    assert [batch[0].id for batch in work.queue] == ["0", "1", "c"]
    worker.outstanding[1] = [Request("before", "as_given", ([5] * 45,))]
    assert next_batch(work, worker, [worker]) is None
    assert [batch[0].id for batch in work.queue] == ["0", "1", "c"]


def test_a_batch_over_the_workers_budget_is_split_and_the_rest_stays_next():
    worker = Worker("cpu", None, 20, None)
    five = [Request(str(number), "as_given", ([5] * 10,)) for number in range(5)]
    work = Pass("test", deque([five]), time.monotonic() + 5, 5)
    assert [[request.id for request in next_batch(work, worker, [worker])] for _ in range(3)] == [["0", "1"], ["2", "3"], ["4"]]
    assert next_batch(work, worker, [worker]) is None


@pytest.mark.parametrize("seconds_left, is_started", [(5, False), (15, True)])
def test_a_worker_that_died_is_started_again_where_the_clock_has_time_to_load_it(seconds_left, is_started):
    device = Device()
    worker = device.worker()
    worker.load_seconds = 10.0
    work = make_pass("test", REQUESTS, time.monotonic() + seconds_left, [worker])
    pass_runner.handle_worker_death(work, worker, "died", start_clock(FAR))
    assert (worker.process is not None) == is_started
    worker.stop()


def test_a_worker_is_not_started_after_the_deadline():
    worker = Worker("cpu", None, 500, lambda task: pytest.fail("it was started"))
    assert run([worker], seconds=-1).scores == {}


def test_only_deaths_without_a_score_in_between_and_over_more_than_one_row_count_against_a_device():
    worker = Worker("cpu", None, 1000, lambda task: None)
    worker.connection = SimpleNamespace(send=lambda message: None)
    for rows, deaths_without_score in ((1, 0), (1, 0), (2, 1), (2, 2)):
        worker.send(REQUESTS[:rows])
        worker.note_death()
        assert (worker.deaths_without_score, worker.gone) == (deaths_without_score, False)
    worker.send(REQUESTS[:2])
    worker.note_scored(worker.batches_sent)
    assert worker.deaths_without_score == 0


@pytest.mark.parametrize(
    "error, rows, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), 1, True),
        (RuntimeError("CUDA error: out of memory"), 2, True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), 2, True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"), 2, True),
        (MemoryError(), 2, True),
        (RuntimeError("CUDA error: out of memory"), 1, False),
        (RuntimeError("CUDA error: device-side assert triggered"), 2, False),
    ],
)
def test_memory_may_run_out_in_any_library(error, rows, expected):
    assert runtime_worker.lacks_memory(error, rows) == expected


def random_device(seed, killers):
    """A device with a random memory and speed, which may die, fail, not load, and dies at the rows in `killers`."""
    dice = random.Random(seed)
    device = Device(dice.choice([90, 300, 10**9]), dice.choice([0, 0.005, 0.03]), dice.choice([0, 1e-5, 1e-4]))
    dies, fails, loads = dice.choice([0, 0.02, 0.2, 1]), dice.choice([0, 0, 0.05]), dice.choice([1, 1, 0.7, 0])
    device.dies_at = lambda requests: any(request.id in killers for request in requests) or dice.random() < dies
    device.fails_at = lambda requests: dice.random() < fails
    device.loads = lambda start: dice.random() < loads
    return device


@pytest.mark.parametrize("seed", range(16))
def test_whatever_fails_the_pass_ends_in_time_and_each_row_is_scored_left_or_given_up(seed, monkeypatch):
    monkeypatch.setattr(runtime_worker, "free_memory", lambda: None)
    dice = random.Random(seed)
    killers = {f"row{dice.randrange(60)}" for _ in range(dice.choice([0, 0, 1, 2]))}
    devices = [random_device(dice.random(), killers) for _ in range(dice.choice([1, 2, 2, 3]))]
    workers = [device.worker(dice.choice([100, 500, 2000])) for device in devices]
    seconds = dice.choice([0.1, 0.3, 0.6])
    began = time.monotonic()
    work = run(workers, seconds, clock=Clock(began, began + seconds, 0.6))
    assert time.monotonic() - began < seconds + 5
    assert work.scores == {row_id: EXPECTED[row_id] for row_id in work.scores}
    left = [request.id for batch in work.queue for request in batch]
    assert sorted([*work.scores, *left, *work.given_up]) == sorted(EXPECTED)


def test_a_worker_is_killed_and_a_process_that_does_not_end_is_not_waited_for_for_ever():
    ended = []
    process = SimpleNamespace(kill=lambda: ended.append("killed"), join=ended.append)
    ours, theirs = multiprocessing.Pipe()
    Worker("cuda:0", None, 500, None, process=process, connection=ours).stop()
    assert ended == ["killed", 30.0]
    assert theirs.poll(1), "the pipe is closed, so that the worker's end of it can be read to its end"


@pytest.mark.parametrize("children, exits", [([], []), (["stuck"], [0])])
def test_the_kernel_leaves_at_once_where_a_process_is_stuck(monkeypatch, children, exits):
    codes = []
    monkeypatch.setattr(multiprocessing, "active_children", lambda: children)
    monkeypatch.setattr(os, "_exit", codes.append)
    leave()
    assert codes == exits
