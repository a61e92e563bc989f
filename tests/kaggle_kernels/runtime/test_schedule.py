"""What a pass leaves on the board, and how long it may take."""

import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kaggle_kernels.runtime.models.scoring import Request
from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.scheduling import schedule
from kaggle_kernels.runtime.scheduling.engine import Pass
from kaggle_kernels.runtime.scheduling.plan import Option, Share
from kaggle_kernels.runtime.scheduling.schedule import Encoder, make_board, note_pass, run_share
from kaggle_kernels.runtime.settings import start_clock
from tests import tiny
from tests.kaggle_kernels.runtime.test_always_submits import ONE

KEY = (0, "as_given")
REQUESTS = [Request(f"row0000{number}", "as_given", ([1, 2, 3],)) for number in range(4)]
ALIVE = SimpleNamespace(gone=False, rate=lambda: 50.0)
GONE = SimpleNamespace(gone=True, rate=lambda: 50.0)


@pytest.fixture
def board(package_folder):
    return make_board(
        ONE, [read_package(package_folder)], tiny.pairs(4, seed=9).to_dicts(), ["cpu", "cpu"], start_clock(600), True
    )


def ended(scored):
    """A pass over four rows that has scored so many; the others are still in its queue."""
    work = Pass("test", deque([[request] for request in REQUESTS[scored:]]), time.monotonic() + 600, True, 4)
    work.scores = {request.id: [0.75, 0.25] for request in REQUESTS[:scored]}
    return work


@pytest.mark.parametrize(
    "scored, workers, not_again",
    [
        (1, [ALIVE], {"row00000"}),
        (0, [GONE], set()),
        (0, [ALIVE, GONE], {"row00000", "row00001", "row00002", "row00003"}),
    ],
    ids=["what it left is asked for again", "lost devices: others may do it", "nothing came: it would be asked for for ever"],
)
def test_what_a_pass_left_is_asked_for_again_only_where_that_can_end(board, scored, workers, not_again):
    note_pass(board, KEY, ended(scored), REQUESTS, workers)
    assert board.tried[KEY] == not_again


def test_the_rate_of_a_package_is_that_of_the_workers_that_are_left(board):
    note_pass(board, KEY, ended(4), REQUESTS, [ALIVE, GONE, ALIVE])
    assert board.rates == {0: 100.0}


@pytest.mark.parametrize("seconds, expected", [(30.0, 30.0), (0.0, 600.0), (5000.0, 600.0)])
def test_a_pass_ends_with_its_share_of_the_clock(board, monkeypatch, seconds, expected):
    deadlines = []
    monkeypatch.setattr(schedule, "run_pass", lambda work, *_: deadlines.append(work.deadline) or ended(4))
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    board.clock = replace(board.clock, deadline=1600.0)
    worker = SimpleNamespace(gone=False, rate=lambda: 1.0, most_tokens=100, load_seconds=1.0, positions=(0,))
    encoder = Encoder(board)
    try:
        run_share(board, Share(Option(*KEY, change=1.0, seconds_per_token=0.0), {}, seconds), [0], [worker], encoder)
    finally:
        encoder.close()
    assert deadlines == [1000.0 + expected]
