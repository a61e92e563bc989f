"""Weights of an ensemble: fitted on the rows that all runs held out, written into the spec and nothing else in it changed."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.ensemble_rows import Rows, read_rows
from kaggle_kernels.build.ensemble_weights import (
    Mixture,
    describe_gain,
    fit_mixture,
    measure_ensemble,
    mix_probabilities,
    round_weights,
    write_mixture,
)
from kaggle_kernels.build.spec import read_spec
from kaggle_kernels.runtime.submission import soften, weighted_mean
from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError

SPEC = """# a comment
title: "Pairwise Test"   # and another
competition: wsdm
packages:
  - {run: one, dataset: dataset-one, weight: 0.500}  # the first
  - run: two
    weight: 0.5
    dataset: dataset-two

clock_seconds: 600
orders: both
"""


def predictions(values, winners, fold=0, ids=None, ties=0.0):
    """A run's predictions.parquet: p_model_a of each row, the same in both orders but for a constant."""
    a = np.array(values)
    table = {"id": ids or [f"row{n}" for n in range(len(a))], "fold": [fold] * len(a), "winner": winners}
    for suffix, shift in (("", 0.0), ("_as_given", 0.05), ("_swapped", -0.05)):
        table |= {f"p_model_a{suffix}": a + shift, f"p_model_b{suffix}": 1 - ties - a - shift}
        table |= {f"p_tie{suffix}": np.full(len(a), ties)}
    return pl.DataFrame(table)


def write_run(run, table, trained_on=False):
    folder = Path("outputs") / run
    folder.mkdir(parents=True, exist_ok=True)
    table.write_parquet(folder / "predictions.parquet")
    (folder / "metrics.json").write_text(json.dumps({"rows_were_trained_on": trained_on}))


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A spec of two runs: the first is right on six rows of seven and too sure of it, the second knows nothing."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(3)
    winners = generator.choice(["model_a", "model_b"], 400).tolist()
    right = generator.random(400) < 0.85
    good = [0.94 if (winner == "model_a") == is_right else 0.06 for winner, is_right in zip(winners, right, strict=True)]
    write_run("one", predictions(good, winners))
    write_run("two", predictions(generator.uniform(0.3, 0.7, 400), winners))
    (tmp_path / "spec.yml").write_text(SPEC)
    return tmp_path


def weigh(*arguments):
    return CliRunner().invoke(main, ["weigh", "spec.yml", *arguments])


def table_row(output, name):
    """The cells of one line of the printed table."""
    return next(line.split() for line in output.splitlines() if line.strip().startswith(name))


def test_the_better_run_gets_the_larger_weight_and_a_run_too_sure_a_temperature(workplace):
    done = weigh("--write")
    assert done.exit_code == 0, done.output
    spec = read_spec(workplace / "spec.yml")
    assert spec.packages[0].weight > 0.8 and spec.temperature > 1.05
    assert "400 rows that all runs held out" in done.output
    losses = {name: float(table_row(done.output, name)[-2]) for name in ("one", "two", "equal", "fitted")}
    assert losses["fitted"] == min(losses.values())
    assert float(table_row(done.output, "one")[-3]) > 0.7 > float(table_row(done.output, "two")[-3])
    assert "fitted gains" in done.output and "warning" not in done.output
    assert "now run `python -m kaggle_kernels build spec.yml`" in done.output


def test_only_the_numbers_of_a_spec_change_and_a_temperature_is_added(tmp_path):
    path = tmp_path / "spec.yml"
    path.write_text(SPEC)
    write_mixture(path, Mixture(np.array([0.625, 0.375]), 1.5))
    expected = SPEC.replace("0.500}", "0.625}").replace("weight: 0.5\n", "weight: 0.375\n") + "temperature: 1.5\n"
    assert path.read_text() == expected
    write_mixture(path, Mixture(np.array([0.25, 0.75]), 2.0))
    assert read_spec(path).temperature == 2
    assert [package.weight for package in read_spec(path).packages] == [0.25, 0.75]


@pytest.mark.parametrize("metric", ["log_loss", "brier_score"])
def test_weights_that_made_the_verdicts_are_found(metric):
    generator = np.random.default_rng(0)
    first, second = generator.uniform(0.02, 0.98, (2, 20000))
    truth = 0.7 * first + 0.3 * second
    winners = (generator.random(20000) >= truth).astype(int)
    rows = Rows(np.array([[first, 1 - first], [second, 1 - second]]).transpose(0, 2, 1), winners)
    fitted = fit_mixture(rows, metric)
    assert fitted.weights[0] == pytest.approx(0.7, abs=0.05)
    assert fitted.temperature == pytest.approx(1, abs=0.08)


def test_the_mean_and_the_temperature_are_the_kernels():
    rows = Rows(np.array([[[0.7, 0.2, 0.1]], [[0.3, 0.3, 0.4]]]), np.array([0]))
    kernels = soften(weighted_mean([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], [0.25, 0.75]), 1.5)
    assert mix_probabilities(rows, Mixture(np.array([0.25, 0.75]), 1.5))[0].tolist() == pytest.approx(kernels)


def test_the_gain_is_in_the_brier_score_where_the_competition_goes_by_it(workplace, monkeypatch):
    by_brier_score = replace(COMPETITIONS["wsdm"], metric="brier_score")
    monkeypatch.setitem(COMPETITIONS, "wsdm", by_brier_score)
    assert "in Brier score over equal weights" in weigh().output


def test_weights_are_thousandths_that_sum_to_one():
    assert round_weights(np.array([1 / 3, 1 / 3, 1 / 3])).tolist() == [0.334, 0.333, 0.333]
    assert round_weights(np.array([0.004, 0.996])).tolist() == [0, 1]


def test_a_gain_within_noise_is_called_so():
    assert describe_gain(np.array([1.0, -1.0] * 50), "accuracy").startswith("warning: fitted gains 0.0000 in log loss")
    assert describe_gain(np.array([0.01, 0.02] * 50), "brier_score").startswith("fitted gains 0.0150 in Brier score")


def test_only_rows_that_all_runs_have_count_and_without_write_the_spec_stays(workplace):
    write_run("two", pl.read_parquet("outputs/two/predictions.parquet").sample(100, seed=1))
    assert "100 rows that all runs held out" in weigh().output
    assert (workplace / "spec.yml").read_text() == SPEC


def test_three_verdicts_count_as_two_where_the_competition_knows_no_ties(workplace):
    for run in ("one", "two"):
        write_run(run, predictions([0.2, 0.3, 0.4, 0.25] * 25, ["model_a", "model_b", "tie", "model_a"] * 25, ties=0.5))
    output = weigh().output
    assert "75 rows that all runs held out" in output
    assert table_row(output, "one")[-2] == f"{-(np.log(0.4) + np.log(0.4) + np.log(0.5)) / 3:.4f}"


def test_a_spec_with_one_order_is_weighed_on_that_order(workplace):
    (workplace / "spec.yml").write_text(SPEC.replace("orders: both", "orders: as_given"))
    for run in ("one", "two"):
        write_run(run, predictions([0.6, 0.5] * 50, ["model_a", "model_b"] * 50))
    assert table_row(weigh().output, "one")[-2] == f"{-(np.log(0.65) + np.log(0.45)) / 2:.4f}"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table.with_columns(fold=pl.lit(1)), "row row0: fold is 1, in one 0; train them on the same pairs"),
        (
            lambda table: table.with_columns(id="x" + pl.col("id"), fold=pl.lit(2)),
            "of fold 2, and none of them is among the rows of one, which are of fold 0; train them on",
        ),
        (lambda table: table.with_columns(winner=pl.lit("tie")), "winner is tie, in one model_"),
        (lambda table: table.with_columns(p_model_a=pl.lit(float("nan"))), "probabilities that are not between 0 and 1"),
    ],
    ids=["another fold", "other rows", "other verdicts", "not finite"],
)
def test_runs_that_do_not_belong_together_are_refused_in_one_line(workplace, change, message):
    write_run("two", change(pl.read_parquet("outputs/two/predictions.parquet")))
    done = weigh("--write")
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith("error: outputs/two/predictions.parquet: ") and message in done.output
    assert (workplace / "spec.yml").read_text() == SPEC


def test_three_runs_without_a_row_in_common_are_refused(workplace):
    table = pl.read_parquet("outputs/two/predictions.parquet")
    for run, rows in {"one": table, "two": table.head(200), "three": table.tail(200)}.items():
        write_run(run, rows)
    spec = read_spec(workplace / "spec.yml")
    third = spec.packages[1].model_copy(update={"run": "three"})
    with pytest.raises(UserError, match="no row with a verdict of wsdm is among those of all runs: one, two, three"):
        read_rows(spec.model_copy(update={"packages": (*spec.packages, third)}))


def test_a_run_without_held_out_rows_is_refused(workplace):
    write_run("two", pl.read_parquet("outputs/two/predictions.parquet"), trained_on=True)
    assert weigh().output.startswith("error: outputs/two/metrics.json: rows_were_trained_on: ")
    (workplace / "outputs/two/predictions.parquet").unlink()
    assert weigh().output.startswith("error: outputs/two/predictions.parquet: no such file")


def test_a_run_that_is_worth_nothing_is_not_written_with_weight_0(workplace):
    winners = ["model_a", "model_b"] * 50
    write_run("one", predictions([0.8, 0.2] * 49 + [0.2, 0.8], winners))
    write_run("two", predictions([0.2, 0.8] * 50, winners))
    for arguments, exit_code in (((), 0), (("--write",), 2)):
        done = weigh(*arguments)
        assert done.exit_code == exit_code
        assert "the fitted weight of two is 0; remove it from packages" in done.output.splitlines()[-1]
    assert (workplace / "spec.yml").read_text() == SPEC


@pytest.fixture
def packaged(workplace):
    """Two runs on four rows with the weights 0.75 and 0.25, each with the package of its training; the spec."""
    winners = ["model_a", "model_a", "model_b", "model_b"]
    write_run("one", predictions([0.9, 0.45, 0.2, 0.5], winners))
    write_run("two", predictions([0.1, 0.85, 0.2, 0.7], winners))
    write_mixture(workplace / "spec.yml", Mixture(np.array([0.75, 0.25])))
    for run in ("one", "two"):
        for folder in (workplace / "outputs" / run, workplace / "outputs" / run / "package"):
            folder.mkdir(exist_ok=True)
            (folder / "contract.json").write_text(run)
    return read_spec(workplace / "spec.yml")


def test_what_the_models_reach_together_is_what_the_kernel_would(packaged):
    """p of A: 0.7, 0.55, 0.2, 0.55; the temperature 2 takes the root of the odds."""
    softened = [1 / (1 + np.sqrt((1 - p) / p)) for p in (0.7, 0.55, 0.8, 0.45)]
    measured = measure_ensemble(packaged.model_copy(update={"temperature": 2.0}))
    losses = {"log_loss": -np.log(softened).mean(), "brier_score": 2 * np.square(1 - np.array(softened)).mean()}
    assert measured == {"rows": 4, "accuracy": 0.75, **{name: pytest.approx(loss) for name, loss in losses.items()}}


@pytest.mark.parametrize("absent", ["contract.json", "package/contract.json", "predictions.parquet"])
def test_absent_files_are_not_measured(packaged, absent):
    Path("outputs/two", absent).unlink()
    assert measure_ensemble(packaged) is None


def test_another_training_is_not_measured(packaged):
    Path("outputs/two/package/contract.json").write_text("an earlier training")
    assert measure_ensemble(packaged) is None
