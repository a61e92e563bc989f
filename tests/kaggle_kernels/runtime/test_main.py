"""The whole kernel in this process: what reaches submission.csv, and when there is none.

What one device, one row or one package cannot do costs no more than that: the others go on, and the hidden run submits.
"""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import polars as pl
import pytest

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime import main
from kaggle_kernels.runtime.main import run_kernel
from kaggle_kernels.runtime.package import PackageError
from kaggle_kernels.runtime.scheduling import schedule, worker_handle
from kaggle_kernels.runtime.scheduling.schedule import combine
from kaggle_kernels.runtime.settings import TimeLimit, start_clock
from preprocess.core.files import sha256
from tests import tiny
from tests.kaggle_kernels.packages import flip_byte, make_package, settings_for
from tests.kaggle_kernels.runtime.scoring_jobs import refuse
from tests.kaggle_kernels.runtime.workers import start_in_thread

pytestmark = pytest.mark.usefixtures("workers_in_threads")
SPEC = Spec(title="Title", competition="wsdm", packages=[{"run": "two", "dataset": "tiny-two"}])
SETTINGS = settings_of("test", SPEC, [settings_for("two", "tiny-two")])


def write_test_rows(kaggle, rows):
    rows.drop("winner").write_parquet(kaggle / "input" / SETTINGS.competition / "test.parquet")


@pytest.fixture
def kaggle(tmp_path, monkeypatch, package_folder):
    """A tree like Kaggle's with three test rows."""
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    monkeypatch.delenv("KAGGLE_IS_COMPETITION_RERUN", raising=False)
    (tmp_path / "working").mkdir()
    (tmp_path / "input" / SETTINGS.competition).mkdir(parents=True)
    (tmp_path / "input" / "tiny-two").mkdir()
    for path in package_folder.iterdir():
        (tmp_path / "input" / "tiny-two" / path.name).symlink_to(path)
    write_test_rows(tmp_path, tiny.pairs(3, seed=6))
    return tmp_path


def submitted(kaggle):
    return pl.read_csv(kaggle / "working" / "submission.csv")


def record_of(kaggle):
    return json.loads((kaggle / "working" / "kernel.json").read_text())


def test_heads_of_two_kinds_make_one_ensemble_and_a_reward_model_runs_one_order(kaggle, tiny_models):
    served = []
    for run, head in (("causal", "label_tokens"), ("reward", "reward")):
        make_package(kaggle / "input" / f"tiny-{run}", tiny_models("gemma2"), head=head)
        served.append(settings_for(run, f"tiny-{run}", 0.5))
    run_kernel(replace(SETTINGS, packages=tuple(served)))
    assert record_of(kaggle)["scored"] == 3
    passes = [work["pass"] for work in record_of(kaggle)["passes"]]
    assert passes == ["tiny-causal, as_given", "tiny-causal, swapped", "tiny-reward, as_given"]
    scores = pl.read_parquet(kaggle / "working" / "scores.parquet")
    causal = (scores["causal_p_model_a_as_given"] + scores["causal_p_model_a_swapped"]) / 2
    assert ((causal + scores["reward_p_model_a_as_given"]) / 2 - scores["p_model_a"]).abs().max() < 1e-6
    assert scores["p_model_a"].n_unique() == 3


def test_packages_are_combined_by_weight_after_their_orders_and_verdicts_are_brought_together():
    packages = [
        SimpleNamespace(contract=SimpleNamespace(verdicts=verdicts))
        for verdicts in (("model_a", "model_b"), ("tie", "model_b", "model_a"))
    ]
    served = (settings_for("one", "one", 0.75), settings_for("two", "two", 0.25))
    first = {"both": {"as_given": [1.0, 0.0], "swapped": [0.5, 0.5]}, "only second": {}}
    second = {"both": {"as_given": [0.5, 0.125, 0.375]}, "only second": {"as_given": [0.0, 0.75, 0.25]}}
    combined = combine(replace(SETTINGS, packages=served), packages, [first, second])
    assert combined["both"] == pytest.approx([0.75, 0.25])
    assert combined["only second"] == pytest.approx([0.25, 0.75])


def test_a_spec_may_serve_with_another_token_budget(kaggle):
    write_test_rows(kaggle, tiny.pairs(3, seed=6).with_columns(prompt=pl.lit("river " * 300)))
    run_kernel(replace(SETTINGS, budget_tokens=150))
    [first, _] = record_of(kaggle)["passes"]
    assert 3 * 140 < first["tokens"] <= 3 * 150


@pytest.mark.parametrize("clock_seconds, reserve", [(600, 30), (6000, 300), (43200, 300)])
def test_the_clock_keeps_a_reserve_for_writing(clock_seconds, reserve):
    clock = start_clock(clock_seconds)
    assert clock.deadline - clock.began == pytest.approx(clock_seconds - reserve)


def answers_by_id(kaggle, rows, settings, devices):
    """The submission and the scores of a kernel that gets these rows, sorted by id."""
    write_test_rows(kaggle, rows)
    run_kernel(settings, devices)
    assert submitted(kaggle)["id"].to_list() == rows["id"].to_list()
    return submitted(kaggle).sort("id"), pl.read_parquet(kaggle / "working" / "scores.parquet").sort("id")


def test_shuffled_rows_on_two_devices_get_the_same_answers_by_id(kaggle):
    rows = tiny.pairs(40, seed=6)
    shuffled = rows.sample(fraction=1, shuffle=True, seed=8)
    first, first_scores = answers_by_id(kaggle, rows, SETTINGS, ["cpu"])
    second, second_scores = answers_by_id(kaggle, shuffled, replace(SETTINGS, tokens_per_batch=600), ["cpu", "cpu"])
    assert first.equals(second)
    assert first["winner"].n_unique() == 2
    for column in ("p_model_a", "two_p_model_a_as_given", "two_p_model_a_swapped"):
        assert (first_scores[column] - second_scores[column]).abs().max() < 1e-5


def test_a_package_with_another_order_of_verdicts_is_refused_before_a_model_is_loaded(kaggle, monkeypatch):
    monkeypatch.setattr(worker_handle, "start_process", lambda _: pytest.fail("a model was loaded"))
    served = settings_for("two", "tiny-two", verdicts=("model_b", "model_a"))
    message = "contract.json: verdicts: found .'model_a', 'model_b'., but the recipe of two says"
    with pytest.raises(PackageError, match=message):
        run_kernel(replace(SETTINGS, packages=(served,)))


def test_the_time_limit_is_that_of_the_files_number_of_rows(kaggle):
    limits = (TimeLimit(2, 1.0), TimeLimit(3, 700.0), TimeLimit(None, 800.0))
    run_kernel(replace(SETTINGS, time_limits=limits))
    assert record_of(kaggle)["clock_seconds"] == 700


def test_rows_left_by_the_clock_are_an_error_of_the_visible_run_and_get_the_longer_answer_in_the_hidden_one(
    kaggle, monkeypatch, capsys
):
    rows = tiny.pairs(10, seed=6)
    write_test_rows(kaggle, rows.with_columns(scored=pl.int_range(pl.len()) < 4))
    settings = replace(SETTINGS, time_limits=(TimeLimit(None, 0.01),))
    shortfall = "0 of 10 rows were scored, the spec's min_scored is 0.98"
    with pytest.raises(ValueError, match=f"{shortfall}; nothing is submitted"):
        run_kernel(settings)
    assert list((kaggle / "working").iterdir()) == []
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    run_kernel(settings)
    assert f"warning: {shortfall}; the others get the prior\n" in capsys.readouterr().out
    record = record_of(kaggle)
    assert [record[key] for key in ("rows", "scored", "rows_that_count", "scored_that_count")] == [10, 0, 4, 0]
    assert record["shortfall"] == shortfall
    longer = rows.select(pl.col("response_a").str.len_chars() >= pl.col("response_b").str.len_chars()).to_series()
    assert submitted(kaggle)["winner"].to_list() == ["model_a" if first else "model_b" for first in longer]


def test_what_fails_after_the_first_order_ends_the_visible_run_and_is_logged_in_the_hidden_one(kaggle, monkeypatch, capsys):
    run_pass = schedule.run_pass

    def fail_in_the_second_order(work, workers, clock):
        if "swapped" in work.label:
            raise RuntimeError("what nobody thought of")
        return run_pass(work, workers, clock)

    monkeypatch.setattr(schedule, "run_pass", fail_in_the_second_order)
    with pytest.raises(RuntimeError, match="what nobody thought of"):
        run_kernel(SETTINGS)
    assert not (kaggle / "working" / "submission.csv").exists()
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    run_kernel(SETTINGS)
    assert submitted(kaggle).height == 3
    assert "RuntimeError: what nobody thought of" in capsys.readouterr().out
    record = record_of(kaggle)
    assert (record["hidden_run"], record["scored"], record["settings"]["packages"][0]["dataset"]) == (True, 3, "tiny-two")
    assert record["manifests"] == {"tiny-two": sha256(kaggle / "input" / "tiny-two" / "manifest.json")}
    assert [work["pass"] for work in record["passes"]] == ["tiny-two, as_given"]


def test_in_the_hidden_run_no_error_of_the_machine_costs_the_submission(kaggle, monkeypatch, capsys):
    def fail_to_write(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    monkeypatch.setattr(main, "write_scores", fail_to_write)
    run_kernel(SETTINGS)
    assert submitted(kaggle).height == 3
    assert "No space left on device" in capsys.readouterr().out
    for name in ("check_machine", "score_all"):
        monkeypatch.setattr(main, name, lambda *_: 1 / 0)
    run_kernel(SETTINGS)
    assert submitted(kaggle).height == 3
    assert capsys.readouterr().out.count("ZeroDivisionError: ") == 2


def test_a_package_that_is_damaged_is_left_out_of_the_hidden_run_while_another_one_works(kaggle, monkeypatch, capsys):
    shutil.copytree(kaggle / "input" / "tiny-two", kaggle / "input" / "tiny-damaged")
    flip_byte(kaggle / "input" / "tiny-damaged" / "tokenizer.json")
    damaged, whole = settings_for("damaged", "tiny-damaged", 0.5), settings_for("two", "tiny-two", 0.5)
    with pytest.raises(PackageError):
        run_kernel(replace(SETTINGS, packages=(damaged, whole)))
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    for packages in ((damaged, whole), (whole, damaged)):
        run_kernel(replace(SETTINGS, packages=packages))
        assert record_of(kaggle)["scored"] == 3
        assert "damaged: left out: PackageError: " in capsys.readouterr().out
    with pytest.raises(PackageError):
        run_kernel(replace(SETTINGS, packages=(damaged,)))


def test_workers_that_refuse_the_only_package_end_the_hidden_run_without_a_submission(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    monkeypatch.setattr(worker_handle, "start_process", lambda task: start_in_thread(task, refuse))
    with pytest.raises(PackageError, match="golden row 7"):
        run_kernel(SETTINGS)
    assert list((kaggle / "working").iterdir()) == []
