"""The whole kernel in this process: what reaches submission.csv, and when there is none."""

import json
from dataclasses import replace
from types import SimpleNamespace

import polars as pl
import pytest

from kaggle_kernels.build.spec import Spec, settings_of
from kaggle_kernels.runtime.main import run_kernel
from kaggle_kernels.runtime.scheduling.schedule import combine
from kaggle_kernels.runtime.settings import start_clock
from preprocess.core.files import sha256
from tests import tiny
from tests.kaggle_kernels.packages import settings_for

pytestmark = pytest.mark.usefixtures("workers_in_threads")
SPEC = Spec(title="Title", competition="wsdm", packages=[{"run": "two", "dataset": "tiny-two"}], clock_seconds=600)
SETTINGS = settings_of("test", SPEC, [settings_for("two", "tiny-two")])


@pytest.fixture
def kaggle(tmp_path, monkeypatch, package_folder):
    """A tree like Kaggle's without a test file."""
    monkeypatch.setenv("KAGGLE_ROOT", str(tmp_path))
    (tmp_path / "input").mkdir()
    (tmp_path / "working").mkdir()
    mounted = tmp_path / "input" / "tiny-two"
    mounted.mkdir()
    for path in package_folder.iterdir():
        (mounted / path.name).symlink_to(path)
    (tmp_path / "input" / SETTINGS.competition).mkdir()
    return tmp_path


def write_test_rows(kaggle, rows):
    rows.drop("winner").write_parquet(kaggle / "input" / SETTINGS.competition / "test.parquet")


def submitted(kaggle):
    return pl.read_csv(kaggle / "working" / "submission.csv")


def test_shuffled_rows_on_two_devices_get_the_same_answers_by_id(kaggle):
    rows = tiny.pairs(40, seed=6)
    write_test_rows(kaggle, rows)
    run_kernel(SETTINGS)
    first, first_scores = submitted(kaggle), pl.read_parquet(kaggle / "working" / "scores.parquet")
    write_test_rows(kaggle, rows.sample(fraction=1, shuffle=True, seed=8))
    run_kernel(replace(SETTINGS, tokens_per_batch=600), devices=["cpu", "cpu"])
    second, second_scores = submitted(kaggle), pl.read_parquet(kaggle / "working" / "scores.parquet")
    assert first["id"].to_list() != second["id"].to_list()
    assert first.sort("id").equals(second.sort("id"))
    assert first["winner"].n_unique() == 2
    for column in ("p_model_a", "two_p_model_a_as_given", "two_p_model_a_swapped"):
        assert (first_scores.sort("id")[column] - second_scores.sort("id")[column]).abs().max() < 1e-5


def test_the_record_holds_settings_versions_and_passes(kaggle, monkeypatch):
    monkeypatch.setenv("KAGGLE_IS_COMPETITION_RERUN", "1")
    write_test_rows(kaggle, tiny.pairs(3, seed=6))
    run_kernel(SETTINGS)
    record = json.loads((kaggle / "working" / "kernel.json").read_text())
    assert record["hidden_run"] is True
    [chosen] = record["settings"]["packages"]
    assert (chosen["run"], chosen["dataset"], chosen["weight"]) == ("two", "tiny-two", 1.0)
    assert record["manifests"] == {"tiny-two": sha256(kaggle / "input" / "tiny-two" / "manifest.json")}
    assert [(work["pass"], work["scored"]) for work in record["passes"]] == [
        ("tiny-two, as_given", 3),
        ("tiny-two, swapped", 3),
    ]


def test_a_clock_that_has_run_out_raises_and_writes_no_submission(kaggle):
    write_test_rows(kaggle, tiny.pairs(10, seed=6))
    with pytest.raises(ValueError, match="0 of 10 rows were scored, the spec's min_scored is 0.98; nothing is submitted"):
        run_kernel(replace(SETTINGS, clock_seconds=0.01))
    assert list((kaggle / "working").iterdir()) == []


def test_with_a_low_min_scored_rows_left_by_the_clock_get_the_longer_answer(kaggle):
    rows = tiny.pairs(10, seed=6)
    write_test_rows(kaggle, rows)
    run_kernel(replace(SETTINGS, clock_seconds=0.01, min_scored=0.0))
    longer = rows.select(pl.col("response_a").str.len_chars() >= pl.col("response_b").str.len_chars()).to_series()
    assert submitted(kaggle)["winner"].to_list() == ["model_a" if first else "model_b" for first in longer]


def test_a_package_that_is_not_mounted_is_told_before_a_model_is_loaded(kaggle, monkeypatch):
    monkeypatch.setattr("kaggle_kernels.runtime.scheduling.crew.start_process", lambda _: pytest.fail("a model was loaded"))
    write_test_rows(kaggle, tiny.pairs(3, seed=6))
    with pytest.raises(FileNotFoundError, match="0 files named manifest.json below a folder 'tiny-gone'"):
        run_kernel(replace(SETTINGS, packages=(settings_for("gone", "tiny-gone"),)))


def test_a_package_without_ties_is_refused_where_the_competition_has_them(kaggle):
    write_test_rows(kaggle, tiny.pairs(3, seed=6))
    with pytest.raises(ValueError, match="tells nothing of tie"):
        run_kernel(replace(SETTINGS, verdicts=("model_a", "model_b", "tie")))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"verdicts": ("model_b", "model_a")}, "contract.json: verdicts: found .'model_a', 'model_b'., the recipe of two says"),
        ({"model_type": "llama"}, "config.json: model_type: found gemma2, the recipe of two says llama; package the run again"),
    ],
)
def test_a_package_that_is_not_the_recipes_is_refused_before_a_model_is_loaded(kaggle, monkeypatch, changes, message):
    monkeypatch.setattr("kaggle_kernels.runtime.scheduling.crew.start_process", lambda _: pytest.fail("a model was loaded"))
    write_test_rows(kaggle, tiny.pairs(3, seed=6))
    with pytest.raises(ValueError, match=message):
        run_kernel(replace(SETTINGS, packages=(settings_for("two", "tiny-two", **changes),)))


def test_another_base_model_of_the_same_architecture_is_only_logged(kaggle, capsys):
    write_test_rows(kaggle, tiny.pairs(3, seed=6))
    run_kernel(replace(SETTINGS, packages=(settings_for("two", "tiny-two", base_model="folder/gemma"),)))
    assert "two: made of outputs/demo/input/gemma2, its recipe says folder/gemma\n" in capsys.readouterr().out


def test_packages_are_combined_by_weight_after_their_orders_and_verdicts_are_brought_together():
    packages = [
        SimpleNamespace(contract=SimpleNamespace(verdicts=v)) for v in (("model_a", "model_b"), ("tie", "model_b", "model_a"))
    ]
    chosen = (settings_for("one", "one", 0.75), settings_for("two", "two", 0.25))
    first = {"both": {"as_given": [1.0, 0.0], "swapped": [0.5, 0.5]}, "only second": {}}
    second = {"both": {"as_given": [0.5, 0.125, 0.375]}, "only second": {"as_given": [0.0, 0.75, 0.25]}}
    combined = combine(replace(SETTINGS, packages=chosen), packages, [first, second])
    assert combined["both"] == pytest.approx([0.75, 0.25])
    assert combined["only second"] == pytest.approx([0.25, 0.75])


def test_a_spec_may_serve_with_another_token_budget(kaggle):
    rows = tiny.pairs(3, seed=6).with_columns(prompt=pl.lit("river " * 300))
    write_test_rows(kaggle, rows)
    run_kernel(replace(SETTINGS, budget_tokens=150))
    [first, _] = json.loads((kaggle / "working" / "kernel.json").read_text())["passes"]
    assert 3 * 140 < first["tokens"] <= 3 * 150


def test_a_token_budget_too_small_for_the_template_is_told_before_a_model_is_loaded(kaggle, monkeypatch):
    monkeypatch.setattr("kaggle_kernels.runtime.scheduling.crew.start_process", lambda _: pytest.fail("a model was loaded"))
    write_test_rows(kaggle, tiny.pairs(3, seed=6))
    with pytest.raises(ValueError, match="budget_tokens: 64 leaves no room"):
        run_kernel(replace(SETTINGS, budget_tokens=64))


@pytest.mark.parametrize("clock_seconds, reserve", [(600, 30), (6000, 300), (43200, 300)])
def test_the_clock_keeps_a_reserve_for_writing(clock_seconds, reserve):
    clock = start_clock(clock_seconds)
    assert clock.deadline - clock.began == pytest.approx(clock_seconds - reserve)
