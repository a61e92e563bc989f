"""Memory, clocks and devices that fail: what happens to a batch, and that no row gets another row's answer."""

import threading
import time
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from kaggle_kernels.runtime.engine import Pass, Worker, margin, next_batch, plan_batches, score_package
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.scoring import Request
from kaggle_kernels.runtime.settings import start_clock
from tests import tiny

ORDERS = ("as_given", "swapped")
FAR = 1000.0


@pytest.fixture(scope="module")
def package(package_folder):
    return read_package(package_folder)


@pytest.fixture(scope="module")
def pairs(package):
    return [package.model_input.pair_from_row(row) for row in tiny.pairs(40, seed=9).to_dicts()]


class Model:
    """Answers by a row's own ids, so that any mix-up shows; may run out of memory, break or take its time."""

    dtype = torch.float32

    def __init__(self, memory_tokens=10**9, breaks_after=None, seconds_per_batch=0.0, not_finite=False):
        self.memory_tokens, self.breaks_after, self.seconds_per_batch = memory_tokens, breaks_after, seconds_per_batch
        self.not_finite = not_finite
        self.batches = []
        self.lock = threading.Lock()

    def __call__(self, input_ids, attention_mask):
        if input_ids.numel() > self.memory_tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        if self.breaks_after is not None and len(self.batches) >= self.breaks_after:
            raise RuntimeError("CUDA error: device-side assert triggered")
        with self.lock:
            self.batches.append((input_ids.shape[0], input_ids.numel()))
        time.sleep(self.seconds_per_batch)
        first = (input_ids * attention_mask).sum(1) % 97 / 97.0
        logits = torch.stack([first, 1 - first], 1)
        return SimpleNamespace(logits=logits * float("nan") if self.not_finite else logits)


def run(package, pairs, workers, orders=ORDERS, seconds=FAR):
    deadlines = [time.monotonic() + seconds] * len(orders)
    return score_package(package, package.contract, workers, pairs, orders, deadlines, start_clock(FAR))


@pytest.fixture(scope="module")
def expected(package, pairs):
    return run(package, pairs, [Worker("cpu", Model(), 500)])[0]


def test_every_row_is_scored_in_both_orders(expected, pairs):
    assert {row_id: set(by_order) for row_id, by_order in expected.items()} == {pair.id: set(ORDERS) for pair in pairs}


def test_several_devices_share_the_rows_and_give_the_same_scores(package, pairs, expected):
    models = [Model(seconds_per_batch=0.01), Model(seconds_per_batch=0.01)]
    scores, _ = run(package, pairs, [Worker("cpu", model, 500) for model in models])
    assert scores == expected
    assert sum(rows for model in models for rows, _ in model.batches) == 2 * len(pairs)
    assert min(len(model.batches) for model in models) > 2


def test_out_of_memory_halves_the_token_budget_and_tries_again(package, pairs, expected):
    model = Model(memory_tokens=700)
    worker = Worker("cpu", model, 2000)
    scores, records = run(package, pairs, [worker])
    assert scores == expected
    assert worker.tokens_per_batch <= 700
    assert [record["out_of_memory"] for record in records][1] == 0
    assert sum(rows for rows, _ in model.batches) == 2 * len(pairs)


def test_a_row_that_alone_needs_too_much_memory_is_given_up_and_the_others_are_scored(package, pairs, expected):
    longest = max(len(package.model_input.encode(pair, package.tokenizer, package.contract)[0]) for pair in pairs)
    scores, _ = run(package, pairs, [Worker("cpu", Model(memory_tokens=longest - 1), 500)], orders=["as_given"])
    left_out = {row_id for row_id, by_order in scores.items() if not by_order}
    assert 1 <= len(left_out) < 10
    assert all(scores[row_id]["as_given"] == expected[row_id]["as_given"] for row_id in set(scores) - left_out)


def test_a_device_that_breaks_leaves_its_rows_to_the_other(package, pairs, expected):
    workers = [Worker("cpu", Model(breaks_after=2), 500), Worker("cpu", Model(seconds_per_batch=0.01), 500)]
    scores, records = run(package, pairs, workers)
    assert scores == expected
    assert workers[0].failure == "RuntimeError: CUDA error: device-side assert triggered"
    assert records[0]["failures"] == {"cpu": workers[0].failure}


def test_a_batch_given_back_after_the_other_device_had_ended_is_scored_by_it(package, pairs, expected):
    class Late(Model):
        def __call__(self, input_ids, attention_mask):
            time.sleep(0.5)
            raise RuntimeError("late")

    scores, _ = run(package, pairs, [Worker("cpu", Late(), 500), Worker("cpu", Model(), 500)], orders=["as_given"])
    assert {row_id for row_id, by_order in scores.items() if by_order} == set(expected)


def test_with_all_devices_broken_rows_are_left_without_scores(package, pairs):
    scores, _ = run(package, pairs, [Worker("cpu", Model(breaks_after=1), 500)])
    assert 0 < sum(bool(by_order) for by_order in scores.values()) < len(pairs)


def test_scores_that_are_not_finite_count_as_not_scored(package, pairs):
    scores, records = run(package, pairs, [Worker("cpu", Model(not_finite=True), 500)], orders=["as_given"])
    assert not any(scores.values())
    assert records[0]["not_finite"] == len(pairs)


def test_no_batch_is_begun_that_would_end_after_the_deadline(package, pairs):
    began = time.monotonic()
    scores, records = run(package, pairs, [Worker("cpu", Model(seconds_per_batch=0.1), 200)], orders=["as_given"], seconds=0.65)
    assert time.monotonic() - began < 2
    assert 0 < records[0]["scored"] < len(pairs)
    assert sum(bool(by_order) for by_order in scores.values()) == records[0]["scored"]


def test_a_clock_too_short_for_all_rows_takes_the_short_ones(package, pairs):
    scores, _ = run(package, pairs, [Worker("cpu", Model(seconds_per_batch=0.1), 200)], orders=["as_given"], seconds=0.65)
    length = {pair.id: len(package.model_input.encode(pair, package.tokenizer, package.contract)[0]) for pair in pairs}
    longest_first = sorted(length, key=lambda row_id: -length[row_id])
    scored = [row_id for row_id in longest_first[len(pairs) // 2 :] if scores[row_id]]
    assert len(scored) >= 2 * len([row_id for row_id in longest_first[: len(pairs) // 2] if scores[row_id]])


def test_the_second_order_on_a_short_clock_takes_the_least_certain_rows_first():
    requests = [Request(str(number), "swapped", ([5] * 10,)) for number in range(16)]
    known = {str(number): [0.5 + number / 32, 0.5 - number / 32] for number in range(16)}
    worker = Worker("cpu", None, 20, tokens=100, seconds=100.0)
    batches = plan_batches(requests, known, [worker], time.monotonic() + 50)
    assert [sorted(int(request.id) for request in batch) for batch in batches[:3]] == [[0, 1], [2, 3], [4, 5]]


def test_the_second_order_on_a_long_clock_is_batched_by_length():
    requests = [Request(str(number), "swapped", ([5] * (number + 1),)) for number in range(16)]
    known = {str(number): [0.5 + number / 32, 0.5 - number / 32] for number in range(16)}
    worker = Worker("cpu", None, 40, tokens=100, seconds=1.0)
    batches = plan_batches(requests, known, [worker], time.monotonic() + 50)
    assert [request.id for request in batches[0]] == ["15", "14"]


def test_the_margin_is_the_lead_of_the_first_verdict():
    assert margin([0.5, 0.25, 0.25]) == 0.25
    assert margin(None) == -1


def queue_of(lengths, deadline, may_reorder):
    batches = [[Request(str(number), "as_given", ([5] * length,))] for number, length in enumerate(lengths)]
    return Pass("test", deque(batches), deadline, may_reorder, len(lengths))


def test_a_batch_that_would_end_after_the_deadline_stays_in_the_queue():
    worker = Worker("cpu", None, 100, tokens=10, seconds=1.0)
    work = queue_of([90, 60], time.monotonic() + 5, may_reorder=False)
    assert next_batch(work, worker, [worker]) is None
    assert [batch[0].id for batch in work.queue] == ["0", "1"]


def test_a_short_clock_takes_the_shortest_batch_that_fits():
    worker = Worker("cpu", None, 100, tokens=10, seconds=1.0)
    work = queue_of([90, 60, 40], time.monotonic() + 5, may_reorder=True)
    assert [request.id for request in next_batch(work, worker, [worker])] == ["2"]
    assert [batch[0].id for batch in work.queue] == ["0", "1"]


def test_a_batch_over_the_workers_budget_is_split_and_the_rest_stays_next():
    worker = Worker("cpu", None, 20)
    work = Pass(
        "test", deque([[Request(str(number), "as_given", ([5] * 10,)) for number in range(5)]]), time.monotonic() + 5, True, 5
    )
    assert [[request.id for request in next_batch(work, worker, [worker])] for _ in range(3)] == [["0", "1"], ["2", "3"], ["4"]]
    assert next_batch(work, worker, [worker]) is None
