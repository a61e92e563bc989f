"""What is scored next, by gain and seconds; two models on two devices by the cost model, and the same answers either way."""

import json
import shutil
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime.main import run_kernel
from kaggle_kernels.runtime.package import PackageError, read_package
from kaggle_kernels.runtime.scheduling import crew, schedule
from kaggle_kernels.runtime.scheduling.plan import (
    Job,
    Option,
    Share,
    allocate,
    expected_gain,
    job_of,
    loading_seconds,
    make_plan,
    measured_change,
    seconds_in_turn,
    seconds_side_by_side,
    share_devices,
)
from kaggle_kernels.runtime.scheduling.schedule import make_board, score_all
from kaggle_kernels.runtime.settings import start_clock
from tests import tiny
from tests.kaggle_kernels.packages import make_package, settings_for
from tests.kaggle_kernels.runtime.workers import hang_up, start_in_thread

pytestmark = pytest.mark.usefixtures("workers_in_threads")
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


def test_loading_takes_as_long_as_its_bytes_and_copies(packages):
    size = (packages[0].folder / "model.safetensors").stat().st_size
    assert loading_seconds(packages[0], 2) == pytest.approx(2 * size / 3e8, rel=0.05)


def test_gain_is_that_of_the_knowledge_gradient():
    assert expected_gain([0.5, 0.5], 0.1, False) == pytest.approx(2 * 0.1 * 0.3989423)
    assert expected_gain([0.6, 0.4], 0.1, False) == pytest.approx(2 * (0.1 * 0.2419707 - 0.1 * 0.1586553))
    assert expected_gain([0.99, 0.01], 0.1, False) < 1e-6
    assert expected_gain([0.2, 0.5, 0.3], 0.1, False) == pytest.approx(expected_gain([0.6, 0.4], 0.1, False))
    assert expected_gain([0.6, 0.4], 0.1, True) == pytest.approx(0.01 * (1 - 0.52))
    assert expected_gain(None, 0.1, True) == 1


def plan_for(options, probabilities, tokens, seconds, unscored=None):
    everything = list(tokens)
    return allocate(options, unscored or [everything] * len(options), probabilities, tokens, seconds, False)


def test_the_seconds_go_to_the_least_certain_rows_and_of_those_to_the_short_ones():
    probabilities = {"even": [0.5, 0.5], "even but long": [0.5, 0.5], "leaning": [0.55, 0.45], "sure": [0.95, 0.05]}
    tokens = {"even": 100, "even but long": 500, "leaning": 100, "sure": 100}
    option = Option(0, "swapped", 0.1, seconds_per_token=0.01)
    order = [list(plan_for([option], probabilities, tokens, seconds)[0].worth) for seconds in (1.5, 2.5, 7.5, 8.5)]
    assert order == [
        ["even"],
        ["even", "leaning"],
        ["even", "leaning", "even but long"],
        ["even", "leaning", "even but long", "sure"],
    ]
    assert plan_for([option], probabilities, tokens, 7.5)[0].seconds == pytest.approx(7)


def test_a_row_without_a_score_comes_first():
    option = Option(0, "as_given", 0.1, seconds_per_token=0.01)
    [share] = plan_for([option], {"known": [0.5, 0.5]}, {"known": 100, "unknown": 100}, 1.5)
    assert list(share.worth) == ["unknown"]


def test_a_further_model_is_loaded_where_it_is_worth_its_loading():
    probabilities, tokens = {str(n): [0.5, 0.5] for n in range(10)}, {str(n): 100 for n in range(10)}
    second_order, model = Option(0, "swapped", 0.02, 0.01), Option(1, "as_given", 0.1, 0.01, load_seconds=5)
    plans = [plan_for([second_order, model], probabilities, tokens, seconds) for seconds in (5.5, 9, 16, 30)]
    assert [[len(share.worth) for share in plan] for plan in plans] == [[5, 0], [0, 4], [1, 10], [10, 10]]


def test_a_model_that_would_have_to_be_loaded_again_keeps_no_seconds_from_the_loaded_one():
    probabilities, tokens = {str(n): [0.5, 0.5] for n in range(10)}, {str(n): 100 for n in range(10)}
    options = [Option(1, "swapped", 0.02, 0.01), Option(0, "swapped", 0.02, 0.01, load_seconds=40)]
    assert [[len(share.worth) for share in plan_for(options, probabilities, tokens, s)] for s in (5, 41)] == [[5, 0], [10, 0]]


def test_a_row_too_long_for_what_is_left_does_not_keep_shorter_ones_out():
    option = Option(0, "swapped", 0.1, seconds_per_token=0.01)
    [share] = plan_for([option], {"short": [0.6, 0.4]}, {"long and unknown": 500, "short": 100}, 2)
    assert list(share.worth) == ["short"]


def test_a_model_is_loaded_once_for_both_of_its_orders():
    probabilities, tokens = {str(n): [0.5, 0.5] for n in range(10)}, {str(n): 100 for n in range(10)}
    options = [Option(1, order, 0.1, 0.01, load_seconds=5) for order in ("as_given", "swapped")]
    assert [len(share.worth) for share in plan_for(options, probabilities, tokens, 25.5)] == [10, 10]


def test_the_change_is_measured_on_the_rows_in_both():
    before = {str(n): [0.5, 0.5] for n in range(30)} | {"only before": [0.9, 0.1]}
    after = {str(n): [0.5 + (0.1 if n % 2 else -0.1), 0.5] for n in range(30)}
    assert measured_change(before, after) == pytest.approx(0.1)
    assert measured_change({"1": [0.5, 0.5]}, {"1": [0.6, 0.4]}) is None


def board_of(packages, /, devices=("cpu", "cpu"), seconds=600, hidden_run=False, **changes):
    settings = replace(SETTINGS, **changes)
    return make_board(settings, packages, ROWS, devices, start_clock(seconds), hidden_run)


def test_both_ways_give_what_each_model_gives_alone(packages, monkeypatch):
    boards = {}
    for side_by_side in (True, False):
        monkeypatch.setattr(
            schedule, "make_plan", lambda *_, way=side_by_side: SimpleNamespace(side_by_side=way, why="as told")
        )
        boards[side_by_side] = board_of(packages)
        score_all(boards[side_by_side])
    for number, package in enumerate(packages):
        alone = board_of([package], ["cpu"], packages=SETTINGS.packages[number : number + 1])
        score_all(alone)
        for row in ROWS:
            for order in ("as_given", "swapped"):
                expected = pytest.approx(alone.scores[0][row["id"]][order], abs=1e-5)
                assert boards[True].scores[number][row["id"]][order] == expected
                assert boards[False].scores[number][row["id"]][order] == expected
    passes = [sorted(record["pass"] for record in board.passes) for board in boards.values()]
    assert passes == [["other, as_given", "other, swapped", "two, as_given", "two, swapped"]] * 2
    first = [
        board.scores[0]["row00001"]["as_given"][0] - board.scores[1]["row00001"]["as_given"][0] for board in boards.values()
    ]
    assert min(map(abs, first)) > 1e-3


@pytest.mark.parametrize("devices, planned", [(("cpu", "cpu"), True), (("cpu",), False)])
def test_with_one_device_there_is_no_side_by_side_to_plan(packages, monkeypatch, devices, planned):
    asked = []
    monkeypatch.setattr(schedule, "make_plan", lambda *_: asked.append(1) or SimpleNamespace(side_by_side=False, why="told"))
    monkeypatch.setattr(schedule, "score_in_turn", lambda *_: None)
    score_all(board_of(packages, devices))
    assert bool(asked) == planned


def break_first(monkeypatch, folder):
    """The first worker with the package in `folder` dies each time that it starts: its device is lost."""
    lost, real = [], crew.start_process

    def start(task):
        if task.folder == str(folder) and task.position in (lost or [task.position]):
            lost.append(task.position)
            return start_in_thread(task, lambda connection, _: hang_up(connection))
        return real(task)

    monkeypatch.setattr(crew, "start_process", start)


def test_a_device_that_is_lost_side_by_side_leaves_its_rows_to_the_other(packages, monkeypatch):
    monkeypatch.setattr(schedule, "make_plan", lambda *_: SimpleNamespace(side_by_side=True, why="as told"))
    whole = board_of(packages)
    score_all(whole)
    break_first(monkeypatch, packages[0].folder)
    board = board_of(packages)
    score_all(board)
    assert list(board.devices) == [1]
    assert board.workers[-1]["device"] == "cpu #1"
    assert [record["rows"] for record in board.passes if record["scored"]] == [30] * 4
    assert [worker["gone"] for worker in board.workers if worker["deaths"]] == [True]
    for number in (0, 1):
        for row in ROWS:
            for order in ("as_given", "swapped"):
                expected = pytest.approx(whole.scores[number][row["id"]][order], abs=1e-5)
                assert board.scores[number][row["id"]][order] == expected


def test_a_short_clock_gives_the_second_order_to_the_least_certain_rows(packages, monkeypatch, capsys):
    board = board_of(packages[:1], ["cpu"], packages=(replace(SETTINGS.packages[0], weight=1.0),))
    real = schedule.allocate

    def in_a_third(options, unscored, known, tokens, seconds, by_log_loss):
        rate = 1 / options[0].seconds_per_token
        third = sum(tokens.values()) / rate / 3 if len(unscored[0]) == 30 else 0.0
        return real(options, unscored, known, tokens, third, by_log_loss)

    monkeypatch.setattr(schedule, "allocate", in_a_third)
    score_all(board)
    twice = {row_id for row_id, by_order in board.scores[0].items() if len(by_order) == 2}
    assert 5 < len(twice) < 16
    lead = {row_id: abs(by_order["as_given"][0] - 0.5) for row_id, by_order in board.scores[0].items()}
    assert set(sorted(lead, key=lead.get)[:5]) <= twice
    assert f"two swapped {len(twice)} of 30 rows in" in board.plans[0]
    assert f"two swapped 0 of {30 - len(twice)} rows" in board.plans[-1]
    assert f"plan: {board.plans[0]}\n" in capsys.readouterr().out


@pytest.mark.parametrize("side_by_side", [False, True])
def test_a_further_model_that_is_refused_is_left_out_of_the_hidden_run_and_raises_in_the_visible_one(
    packages, monkeypatch, side_by_side
):
    monkeypatch.setattr(schedule, "make_plan", lambda *_: SimpleNamespace(side_by_side=side_by_side, why="as told"))
    real = crew.start_process

    def start(task):
        if task.folder == str(packages[1].folder):
            return start_in_thread(task, lambda connection, _: connection.send(("refused", "golden row 7")))
        return real(task)

    monkeypatch.setattr(crew, "start_process", start)
    board = board_of(packages, hidden_run=True)
    score_all(board)
    assert all(len(by_order) == 2 for by_order in board.scores[0].values())
    assert not any(board.scores[1].values())
    with pytest.raises(PackageError, match="golden row 7"):
        score_all(board_of(packages))


def test_the_first_model_that_is_refused_raises_always(packages, monkeypatch):
    refuse = partial(start_in_thread, target=lambda connection, _: connection.send(("refused", "golden row 7")))
    monkeypatch.setattr(crew, "start_process", refuse)
    with pytest.raises(PackageError, match="golden row 7"):
        score_all(board_of(packages, ["cpu"], hidden_run=True))


def test_rows_that_take_long_to_encode_do_not_move_the_deadline(packages, monkeypatch):
    board, deadlines, real = board_of(packages[:1], packages=SETTINGS.packages[:1]), [], schedule.run_pass
    encode = schedule.Encoder.requests
    monkeypatch.setattr(schedule.Encoder, "requests", lambda *arguments: time.sleep(0.2) or encode(*arguments))
    monkeypatch.setattr(schedule, "run_pass", lambda work, *others: deadlines.append(work.deadline) or real(work, *others))
    score_all(board)
    assert len(deadlines) == 2
    assert max(deadlines) <= board.clock.deadline


def test_a_pass_may_last_until_what_is_planned_after_it_must_begin_to_load(packages, monkeypatch):
    board = board_of(packages)
    board.tried[0, "as_given"] = {row["id"] for row in ROWS}
    planned = [
        Share(Option(0, "swapped", 0.1, 0.01), {ROWS[0]["id"]: 1.0}, 100.0),
        Share(Option(1, "as_given", 0.1, 0.01, load_seconds=40.0), {ROWS[0]["id"]: 1.0}, 20.0),
        Share(Option(1, "swapped", 0.1, 0.01, load_seconds=40.0), {ROWS[0]["id"]: 1.0}, 30.0),
    ]
    monkeypatch.setattr(schedule, "allocate", lambda *_: planned)
    share = schedule.next_share(board, [0, 1], 0, [])
    assert (share.option, share.worth) == (planned[0].option, planned[0].worth)
    assert share.seconds == pytest.approx(570 - 40 - 20 - 30, abs=1)


def test_a_tokenizer_is_used_by_one_thread_at_a_time_and_by_none_once_the_encoder_is_closed(packages, monkeypatch):
    board, real, inside, most = board_of(packages), schedule.make_requests, [], []

    def slow(*arguments):
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.1)
        made = real(*arguments)
        inside.pop()
        return made

    monkeypatch.setattr(schedule, "make_requests", slow)
    encoder = schedule.Encoder(board)
    encoder.begin(0, "swapped", ROWS)
    assert [request.order for request in encoder.requests(0, "as_given", ROWS)] == ["as_given"] * 30
    assert most == [1, 1]
    encoder.begin(1, "swapped", ROWS)
    encoder.close()
    assert inside == []


def test_a_kernel_with_two_models_writes_one_submission(packages, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "working").mkdir()
    folder = tmp_path / "input" / SETTINGS.competition
    folder.mkdir(parents=True)
    tiny.pairs(30, seed=9).drop("winner").write_parquet(folder / "test.parquet")
    for package, dataset in zip(packages, ("tiny-two", "tiny-other"), strict=True):
        shutil.copytree(package.folder, tmp_path / "input" / dataset)
    run_kernel(SETTINGS, devices=["cpu", "cpu"])
    record = json.loads((tmp_path / "working" / "kernel.json").read_text())
    assert record["plans"][0].startswith(("side by side", "in turn"))
    assert (record["rows"], record["scored"], len(record["passes"])) == (30, 30, 4)
