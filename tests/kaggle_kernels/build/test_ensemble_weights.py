"""Weights of an ensemble: fitted on the rows that all runs held out, written into the spec and nothing else in it changed."""

import json

import numpy as np
import polars as pl
import pytest
import yaml
from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from kaggle_kernels.build.ensemble_weights import (
    Rows,
    fit,
    in_thousandths,
    mixed,
    noise_sentence,
    row_losses,
    validation,
    with_weights,
)
from kaggle_kernels.build.spec import read_spec

SPEC = """# a comment
title: "Pairwise Test"   # and another
competition: wsdm
packages:
  - {run: one, dataset: dataset-one, weight: 0.50}  # the first
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


@pytest.fixture
def workplace(tmp_path, monkeypatch):
    """A spec of two runs: the first is right on six rows of seven and too sure of it, the second tells nothing."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(3)
    winners = generator.choice(["model_a", "model_b"], 400).tolist()
    right = generator.random(400) < 0.85
    good = [0.94 if (winner == "model_a") == is_right else 0.06 for winner, is_right in zip(winners, right, strict=True)]
    write_run("one", predictions(good, winners))
    write_run("two", predictions(generator.uniform(0.3, 0.7, 400), winners))
    (tmp_path / "spec.yml").write_text(SPEC)
    return tmp_path


def write_run(run, table, trained_on=False):
    from pathlib import Path

    folder = Path("outputs") / run
    folder.mkdir(parents=True, exist_ok=True)
    table.write_parquet(folder / "predictions.parquet")
    (folder / "metrics.json").write_text(json.dumps({"rows_were_trained_on": trained_on}))


def weigh(*arguments):
    return CliRunner().invoke(main, ["weigh", "spec.yml", *arguments])


def test_the_better_run_gets_the_larger_weight_and_a_run_too_sure_a_temperature(workplace):
    done = weigh("--write")
    assert done.exit_code == 0, done.output
    values = yaml.safe_load((workplace / "spec.yml").read_text())
    first, second = (package["weight"] for package in values["packages"])
    assert first > 0.8 and first + second == pytest.approx(1)
    assert "400 rows that all runs held out" in done.output
    lines = {line.split()[0]: line.split() for line in done.output.splitlines()[3:] if line.startswith(" ") and line.strip()}
    assert float(lines["fitted"][-1]) <= min(float(lines["one"][-1]), float(lines["two"][-1]), float(lines["equal"][-1]))
    assert float(lines["one"][-2]) > 0.7 > float(lines["two"][-2])
    assert "fitted gains" in done.output and "warning" not in done.output
    assert "now run `python -m kaggle_kernels build spec.yml`" in done.output


def test_without_write_the_spec_stays_as_it_was(workplace):
    assert weigh().exit_code == 0
    assert (workplace / "spec.yml").read_text() == SPEC


def test_only_the_numbers_change_and_what_is_missing_is_added():
    changed = with_weights(SPEC, [0.625, 0.375], 1.5)
    expected = SPEC.replace("0.50}", "0.625}").replace("weight: 0.5\n", "weight: 0.375\n") + "temperature: 1.5\n"
    assert changed == expected
    bare = SPEC.replace(", weight: 0.50", "").replace("    weight: 0.5\n", "").replace("\n", "\r\n")
    changed = with_weights(bare, [0.625, 0.375], 1.5)
    assert "dataset: dataset-one, weight: 0.625}  # the first\r\n" in changed
    assert changed.endswith(
        "    dataset: dataset-two\r\n    weight: 0.375\r\nclock_seconds: 600\r\norders: both\r\ntemperature: 1.5\r\n"
    )
    assert with_weights(changed, [0.5, 0.5], 2) == changed.replace("0.625", "0.5").replace("0.375", "0.5").replace("1.5", "2")


def test_known_weights_are_found_again():
    generator = np.random.default_rng(0)
    first, second = generator.uniform(0.02, 0.98, (2, 20000))
    truth = 0.7 * first + 0.3 * second
    winners = (generator.random(20000) >= truth).astype(int)
    rows = Rows(np.array([[first, 1 - first], [second, 1 - second]]).transpose(0, 2, 1), winners)
    weights, temperature = fit(rows)
    assert weights[0] == pytest.approx(0.7, abs=0.05)
    assert temperature == pytest.approx(1, abs=0.08)
    best = row_losses(rows, weights, temperature).mean()
    assert all(best <= row_losses(rows, [w, 1 - w], t).mean() + 1e-6 for w in (0, 0.5, 0.6, 0.8, 1) for t in (0.9, 1, 1.1))


def test_the_mean_and_the_temperature_are_the_kernels():
    from kaggle_kernels.runtime.submission import soften, weighted_mean

    rows = Rows(np.array([[[0.7, 0.2, 0.1]], [[0.3, 0.3, 0.4]]]), np.array([0]))
    kernels = soften(weighted_mean([[0.7, 0.2, 0.1], [0.3, 0.3, 0.4]], [0.25, 0.75]), 1.5)
    assert mixed(rows, [0.25, 0.75], 1.5)[0].tolist() == pytest.approx(kernels)


def test_weights_are_thousandths_that_sum_to_one():
    assert in_thousandths([1 / 3, 1 / 3, 1 / 3]).tolist() == [0.334, 0.333, 0.333]
    assert in_thousandths([0.004, 0.996]).tolist() == [0, 1]


def test_a_gain_within_noise_is_told():
    gains = np.array([1.0, -1.0] * 50)
    assert noise_sentence(gains).startswith("warning: fitted gains 0.0000")
    assert noise_sentence(np.array([0.01, 0.02] * 50)).startswith("fitted gains 0.0150")


def test_only_rows_that_all_runs_have_count(workplace):
    write_run("two", pl.read_parquet("outputs/two/predictions.parquet").sample(100, seed=1))
    done = weigh()
    assert "100 rows that all runs held out" in done.output


def test_three_verdicts_count_as_two_where_the_competition_knows_no_ties(workplace):
    winners = ["model_a", "model_b", "tie", "model_a"] * 25
    for run in ("one", "two"):
        write_run(run, predictions([0.2, 0.3, 0.4, 0.25] * 25, winners, ties=0.5))
    done = weigh()
    assert "75 rows that all runs held out" in done.output
    alone = -(np.log(0.4) + np.log(0.4) + np.log(0.5)) / 3
    assert f"{alone:.4f}" in next(line for line in done.output.splitlines() if line.strip().startswith("one"))


def test_a_spec_with_one_order_is_weighed_on_that_order(workplace):
    (workplace / "spec.yml").write_text(SPEC.replace("orders: both", "orders: as_given"))
    winners = ["model_a", "model_b"] * 50
    for run in ("one", "two"):
        write_run(run, predictions([0.6, 0.5] * 50, winners))
    alone = -(np.log(0.65) + np.log(0.45)) / 2
    assert f"{alone:.4f}" in next(line for line in weigh().output.splitlines() if line.strip().startswith("one"))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda table: table.with_columns(fold=pl.lit(1)), "row row0: fold is 1, in one 0; train both on the same pairs"),
        (
            lambda table: table.with_columns(id="x" + pl.col("id"), fold=pl.lit(2)),
            "no row of one is among its rows (fold 0 there, fold 2 here); train both on the same pairs",
        ),
        (lambda table: table.with_columns(winner=pl.lit("tie")), "winner is tie, in one model_"),
        (lambda table: table.drop("p_model_b"), "not the predictions of training"),
        (lambda table: pl.concat([table, table.head(1)]), "the id row0 occurs twice"),
        (lambda table: table.with_columns(p_model_a=pl.lit(float("nan"))), "are not probabilities"),
    ],
    ids=["another fold", "other rows", "other verdicts", "no probabilities", "an id twice", "not finite"],
)
def test_runs_that_do_not_belong_together_are_refused_in_one_line(workplace, change, message):
    write_run("two", change(pl.read_parquet("outputs/two/predictions.parquet")))
    done = weigh("--write")
    assert done.exit_code == 2
    assert done.output.startswith("error: outputs/two/predictions.parquet: ") and message in done.output
    assert done.output.count("\n") == 1
    assert (workplace / "spec.yml").read_text() == SPEC


def test_a_run_that_was_trained_on_its_rows_is_refused(workplace):
    write_run("two", pl.read_parquet("outputs/two/predictions.parquet"), trained_on=True)
    done = weigh()
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith("error: outputs/two/metrics.json: rows_were_trained_on: ")


def test_a_run_that_is_absent_is_one_line(workplace):
    (workplace / "outputs/two/predictions.parquet").unlink()
    done = weigh()
    assert (done.exit_code, done.output[:51]) == (2, "error: outputs/two/predictions.parquet: no such fil")


def test_a_run_that_is_worth_nothing_is_not_written_with_weight_0(workplace):
    winners = ["model_a", "model_b"] * 50
    write_run("one", predictions([0.8, 0.2] * 49 + [0.2, 0.8], winners))
    write_run("two", predictions([0.2, 0.8] * 50, winners))
    assert "the fitted weight of two is 0; remove it from packages" in weigh().output
    done = weigh("--write")
    assert (done.exit_code, done.output.splitlines()[-1][:6]) == (2, "error:")
    assert (workplace / "spec.yml").read_text() == SPEC


@pytest.fixture
def packaged(workplace):
    """Two runs on four rows with the weights 0.75 and 0.25, each with the package of its training."""
    winners = ["model_a", "model_a", "model_b", "model_b"]
    write_run("one", predictions([0.9, 0.45, 0.2, 0.5], winners))
    write_run("two", predictions([0.1, 0.85, 0.2, 0.7], winners))
    (workplace / "spec.yml").write_text(SPEC.replace("weight: 0.50", "weight: 0.75").replace("weight: 0.5\n", "weight: 0.25\n"))
    for run in ("one", "two"):
        for folder in (workplace / "outputs" / run, workplace / "outputs" / run / "package"):
            folder.mkdir(exist_ok=True)
            (folder / "contract.json").write_text(run)
    return workplace


def test_what_the_models_reach_together_is_what_the_kernel_would(packaged):
    """p of A: 0.7, 0.55, 0.2, 0.55; the temperature 2 takes the root of the odds."""
    spec = read_spec(packaged / "spec.yml")
    losses = -np.log([0.7, 0.55, 0.8, 0.45])
    assert validation(spec) == {"rows": 4, "accuracy": 0.75, "log_loss": pytest.approx(losses.mean())}
    softened = [1 / (1 + np.sqrt((1 - p) / p)) for p in (0.7, 0.55, 0.8, 0.45)]
    cooler = spec.model_copy(update={"temperature": 2.0})
    assert validation(cooler)["log_loss"] == pytest.approx(-np.log(softened).mean())


def test_of_a_package_of_another_training_or_without_rows_it_is_not_known(packaged):
    spec = read_spec(packaged / "spec.yml")
    (packaged / "outputs/two/package/contract.json").write_text("an earlier training")
    assert validation(spec) is None
    (packaged / "outputs/two/package/contract.json").unlink()
    (packaged / "outputs/two/contract.json").unlink()
    assert validation(spec) is None
    for folder in ("outputs/two", "outputs/two/package"):
        (packaged / folder / "contract.json").write_text("two")
    (packaged / "outputs/two/predictions.parquet").unlink()
    assert validation(spec) is None
