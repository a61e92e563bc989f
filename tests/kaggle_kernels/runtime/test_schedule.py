"""Pass after pass: what is done next, how long it may take, what it leaves behind, and what is left out."""

import time
from collections import deque
from dataclasses import replace
from types import SimpleNamespace

import pytest

from kaggle_kernels.runtime.models.scoring import Request
from kaggle_kernels.runtime.package import PackageError, read_package
from kaggle_kernels.runtime.scheduling import schedule
from kaggle_kernels.runtime.scheduling.pass_runner import Pass
from kaggle_kernels.runtime.scheduling.plan import PlannedPass
from kaggle_kernels.runtime.scheduling.schedule import (
    LoadError,
    leave_out,
    load_package,
    plan_next_pass,
    record_pass,
    score_all,
)
from tests.kaggle_kernels.packages import make_package
from tests.kaggle_kernels.runtime.scoring_jobs import BOTH, ONE, ROWS, job_of, refuse, replace_workers
from tests.kaggle_kernels.runtime.workers import hang_up

pytestmark = pytest.mark.usefixtures("workers_in_threads")
KEY = (0, "as_given")
IDS = [row["id"] for row in ROWS]
REQUESTS = [Request(row_id, "as_given", ([1, 2, 3],)) for row_id in IDS[:4]]
ALIVE = SimpleNamespace(gone=False, rate=lambda: 50.0, tokens_per_batch=100, load_seconds=1.0, positions=(0,))
GONE = SimpleNamespace(gone=True, rate=lambda: 50.0)


@pytest.fixture(autouse=True)
def hidden_run(monkeypatch):
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")


@pytest.fixture(scope="module")
def packages(package_folder, tiny_models, tmp_path_factory):
    other = make_package(tmp_path_factory.mktemp("packages") / "other", tiny_models("gemma2"), seed=5)
    return [read_package(package_folder), read_package(other)]


def ended(scored):
    """A pass over four rows that has scored so many; the others are still in its queue."""
    work = Pass("test", deque([[request] for request in REQUESTS[scored:]]), time.monotonic() + 600, 4)
    work.scores = {request.id: [0.75, 0.25] for request in REQUESTS[:scored]}
    return work


@pytest.mark.parametrize(
    "scored, workers, not_again, rate",
    [(1, [ALIVE, GONE, ALIVE], IDS[:1], 100.0), (0, [GONE], [], None), (0, [ALIVE, GONE], IDS[:4], 50.0)],
    ids=["what it left is asked for again", "lost devices: others may do it", "nothing came: it would be asked for for ever"],
)
def test_what_a_pass_left_is_asked_for_again_only_where_that_can_end(packages, scored, workers, not_again, rate):
    job = job_of(packages[:1])
    record_pass(job, KEY, ended(scored), REQUESTS, workers)
    assert job.progress.tried[KEY] == set(not_again)
    assert job.measured.rates.get(0) == rate


def test_a_pass_may_last_until_what_is_planned_after_it_must_begin_to_load(packages, monkeypatch):
    job = job_of(packages)
    job.progress.tried[KEY] = set(IDS)
    job.measured.tokens.update(dict.fromkeys(IDS, 100))
    job.measured.rates[0] = 100.0

    def plan_one_row_of_each(options, *_):
        assert [(option.package, option.order) for option in options] == [(0, "swapped"), (1, "as_given"), (1, "swapped")]
        further = [replace(option, load_seconds=40.0) for option in options[1:]]
        return [
            PlannedPass(option, [IDS[0]], seconds)
            for option, seconds in zip([options[0], *further], (100.0, 20.0, 30.0), strict=True)
        ]

    monkeypatch.setattr(schedule, "plan_passes", plan_one_row_of_each)
    planned = plan_next_pass(job, 0, [])
    assert (planned.package, planned.order, planned.row_ids) == (0, "swapped", {IDS[0]})
    assert planned.deadline - job.inputs.clock.began == pytest.approx(570 - 40 - 20 - 30, abs=0.1)


def test_a_change_goes_by_weight_and_until_it_is_measured_a_speed_by_parameters(packages, monkeypatch):
    job = job_of(packages)
    job.progress.tried[KEY] = set(IDS)
    job.measured.tokens.update(dict.fromkeys(IDS, 100))
    job.measured.rates[0] = 103.0
    planned = []
    monkeypatch.setattr(schedule, "plan_passes", lambda options, *_: planned.extend(options) or [])
    plan_next_pass(job, 0, [])
    assert [option.change for option in planned] == pytest.approx([0.03, 0.1, 0.1])
    assert [option.seconds_per_token for option in planned] == pytest.approx([0.01] * 3)
    assert [option.load_seconds > 0 for option in planned] == [False, True, True]
    assert [len(option.unscored) for option in planned] == [30] * 3


def passes_of(job):
    return [record["pass"] for record in job.progress.passes]


def test_each_model_of_an_ensemble_gives_what_it_gives_alone(packages):
    job = job_of(packages)
    score_all(job)
    for number, package in enumerate(packages):
        alone = job_of([package], ["cpu"])
        score_all(alone)
        for row_id in IDS:
            for order in ("as_given", "swapped"):
                expected = alone.progress.scores[0][row_id][order]
                assert job.progress.scores[number][row_id][order] == pytest.approx(expected, abs=1e-5)
    assert passes_of(job) == ["two, as_given", "two, swapped", "other, as_given", "other, swapped"]
    assert abs(job.progress.scores[0][IDS[1]]["as_given"][0] - job.progress.scores[1][IDS[1]]["as_given"][0]) > 1e-3


def test_a_device_that_is_lost_leaves_the_job_and_its_rows_to_the_other(packages, monkeypatch):
    replace_workers(monkeypatch, packages[0].folder, lambda connection, _: hang_up(connection), positions=(0,))
    job = job_of(packages)
    score_all(job)
    assert job.progress.devices == {1: "cpu"}
    assert [record["scored"] for record in job.progress.passes] == [30] * 4


def test_a_short_clock_gives_the_second_order_to_the_least_certain_rows(packages, monkeypatch, capsys):
    job, plan_passes = job_of(packages[:1], ["cpu"]), schedule.plan_passes

    def in_a_third(options, probabilities, tokens, seconds, metric):
        third = sum(tokens.values()) * options[0].seconds_per_token / 3 if len(options[0].unscored) == 30 else 0.0
        return plan_passes(options, probabilities, tokens, third, metric)

    monkeypatch.setattr(schedule, "plan_passes", in_a_third)
    score_all(job)
    twice = {row_id for row_id, by_order in job.progress.scores[0].items() if len(by_order) == 2}
    assert 5 < len(twice) < 16
    lead = {row_id: abs(by_order["as_given"][0] - 0.5) for row_id, by_order in job.progress.scores[0].items()}
    assert set(sorted(lead, key=lead.get)[:5]) <= twice
    plans = [line for line in capsys.readouterr().out.splitlines() if "plan: " in line]
    assert f"two swapped {len(twice)} of 30 rows in" in plans[0]
    assert f"two swapped 0 of {30 - len(twice)} rows" in plans[-1]


FAILURES = pytest.mark.parametrize(
    "target, error",
    [(lambda connection, _: hang_up(connection), LoadError), (refuse, PackageError)],
    ids=["cannot load", "refuses"],
)


@FAILURES
@pytest.mark.parametrize("failing", [0, 1])
def test_a_package_that_fails_is_left_out_of_the_hidden_run_and_takes_no_device_with_it(
    packages, monkeypatch, target, error, failing
):
    replace_workers(monkeypatch, packages[failing].folder, target)
    job = job_of(packages)
    score_all(job)
    assert [len(by_order) for by_order in job.progress.scores[1 - failing].values()] == [2] * 30
    assert not any(job.progress.scores[failing].values())
    assert job.progress.devices == {0: "cpu", 1: "cpu"}
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN")
    with pytest.raises(error):
        score_all(job_of(packages))


@FAILURES
def test_where_no_package_works_the_error_is_raised(packages, monkeypatch, target, error):
    replace_workers(monkeypatch, packages[0].folder, target)
    with pytest.raises(error):
        score_all(job_of(packages[:1], ["cpu"]))


def test_a_split_model_is_not_loaded_on_half_of_its_devices(packages):
    split = replace(BOTH, packages=tuple(replace(served, placement="split") for served in BOTH.packages))
    job = job_of(packages, settings=split)
    del job.progress.devices[1]
    with pytest.raises(LoadError, match="two: no device is left for it"):
        load_package(job, 0)


def test_rows_that_count_have_all_their_passes_before_the_others_have_one(packages, monkeypatch):
    rows = [{**row, "counts": number % 3 == 0} for number, row in enumerate(ROWS)]
    counting = {row["id"] for row in rows if row["counts"]}
    job, run_pass, passes = job_of(packages, rows=rows), schedule.run_pass, []

    def note_rows(work, workers, clock):
        passes.append({request.id for batch in work.queue for request in batch})
        return run_pass(work, workers, clock)

    monkeypatch.setattr(schedule, "run_pass", note_rows)
    score_all(job)
    others = set(IDS) - counting
    assert passes == [counting] * 4 + [others] * 4
    assert [len(by_order) for scores in job.progress.scores for by_order in scores.values()] == [2] * 60
    # The others begin with the model that is loaded.
    assert passes_of(job)[4:] == ["other, as_given", "other, swapped", "two, as_given", "two, swapped"]


def test_a_row_that_was_given_up_in_one_order_is_not_tried_in_the_other(packages, monkeypatch):
    run_pass, tried = schedule.run_pass, []

    def give_one_up(work, workers, clock):
        tried.append({request.id for batch in work.queue for request in batch})
        work = run_pass(work, workers, clock)
        work.scores.pop(IDS[3], None)
        work.given_up.append(IDS[3])
        return work

    monkeypatch.setattr(schedule, "run_pass", give_one_up)
    score_all(job_of(packages[:1], settings=ONE))
    assert tried == [set(IDS), set(IDS) - {IDS[3]}]


def test_the_scores_of_a_package_that_was_left_out_later_still_count(packages):
    job = job_of(packages)
    job.progress.scores[1][IDS[0]]["as_given"] = [0.75, 0.25]
    leave_out(job, 1, LoadError("no device could load it"))
    assert job.probabilities() == {IDS[0]: pytest.approx([0.75, 0.25])}
