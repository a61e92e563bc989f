"""The generated kernel in a process of its own, in Kaggle's versions: from a test file to a submission, or a refusal."""

import csv
import json
import shutil
import subprocess

import polars as pl
import pytest

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.spec import read_spec
from kaggle_kernels.rehearsal.rehearse import measure
from kaggle_kernels.rehearsal.sandbox import SITECUSTOMIZE, find_python, kaggle_environment
from preprocess.core import ledger
from preprocess.core.files import sha256
from preprocess.model_input import encode, encode_all, pair_from_row, read_contract, swap
from tests import tiny
from tests.kaggle_kernels.packages import (
    AWKWARD_ROWS,
    WSDM,
    change_json,
    make_package,
    rehearse,
    write_manifest,
    write_recipe,
    write_spec,
)

LMSYS = (
    "title: Pairwise Test\ncompetition: lmsys\nclock_seconds: 600\ntemperature: 1.5\ntokens_per_batch: 1000\n"
    "packages: [{run: three, dataset: tiny-three, weight: 0.75}, {run: other, dataset: tiny-other, weight: 0.25}]\n"
)


def test_a_wsdm_rehearsal_gives_every_id_once_and_is_scored_by_id(workplace, tmp_path, ledger_file):
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results")
    assert done.exit_code == 0, done.output
    rows = pl.read_parquet("test.parquet")
    submission = pl.read_csv("results/submission.csv")
    assert submission.columns == ["id", "winner"]
    assert submission["id"].to_list() == rows["id"].to_list()
    right = (submission["winner"] == rows["winner"]).mean()
    measured = json.loads((tmp_path / "results" / "rehearsal.json").read_text())
    assert measured["accuracy"] == pytest.approx(right)
    assert f"accuracy {right:.4f}, log loss {measured['log_loss']:.4f} on 30 judged rows" in done.output
    record = json.loads((tmp_path / "results" / "kernel.json").read_text())
    assert (record["rows"], record["scored"], record["versions"]["transformers"]) == (30, 30, "5.0.0")
    assert [work["pass"].split(", ")[1] for work in record["passes"]] == ["as_given", "swapped"]
    scores = pl.read_parquet("results/scores.parquet")
    mean = (scores["two_p_model_a_as_given"] + scores["two_p_model_a_swapped"]) / 2
    assert (mean - scores["p_model_a"]).abs().max() < 1e-6
    assert mean.n_unique() == 30
    build = {
        "kernel_sha256": sha256(tmp_path / "outputs/kernels/test/kernel.py"),
        "packages": {"tiny-two": sha256(tmp_path / "outputs" / "two" / "package" / "manifest.json")},
    }
    assert measured["build"] == build
    [entry] = ledger.read()
    assert (entry["event"], entry["spec"], entry["verdict"], entry["rows"]) == ("rehearse", "test", "passed", 30)
    assert {key: entry[key] for key in build} == build
    assert entry["seconds"] == measured["seconds"]


def lmsys_rows():
    """Awkward rows in LMSYS's layout: JSON lists of turns, lone surrogates as escapes."""
    as_turns = [{key: [value] if isinstance(value, str) else value for key, value in row.items()} for row in AWKWARD_ROWS]
    return [{key: json.dumps(value) for key, value in row.items()} | {"id": row["id"][0]} for row in as_turns]


def write_lmsys(path):
    winners = [{f"winner_{verdict}": int(verdict == "tie") for verdict in ("model_a", "model_b", "tie")}] * len(AWKWARD_ROWS)
    pl.DataFrame([row | winner for row, winner in zip(lmsys_rows(), winners, strict=True)]).write_csv(path)


def test_an_lmsys_ensemble_on_awkward_rows_gives_three_probabilities_a_row(tmp_path, monkeypatch, three_verdict_folder):
    monkeypatch.chdir(tmp_path)
    for run in ("three", "other"):
        shutil.copytree(three_verdict_folder, tmp_path / "outputs" / run / "package")
        write_recipe(tmp_path, run, f"tiny-{run}", verdicts=["tie", "model_b", "model_a"])
    other = tmp_path / "outputs" / "other" / "package"
    change_json(other / "dataset-metadata.json", id="INSERT_OWNER/tiny-other")
    write_manifest(other)
    write_lmsys(tmp_path / "test.csv")
    done = rehearse(write_spec(tmp_path, LMSYS), "--test", "test.csv")
    assert done.exit_code == 0, done.output
    with open("outputs/test/rehearsal/submission.csv", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
    assert [line[0] for line in lines] == [row["id"] for row in lmsys_rows()]
    assert all(sum(map(float, line[1:])) == pytest.approx(1) for line in lines)
    assert f"on {len(AWKWARD_ROWS)} judged rows" in done.output


def test_a_wsdm_ensemble_is_planned_and_its_submission_is_the_mean(workplace, tmp_path, tiny_models):
    make_package(tmp_path / "outputs" / "other" / "package", tiny_models("gemma2"), seed=5)
    change_json(tmp_path / "outputs" / "other" / "package" / "dataset-metadata.json", id="INSERT_OWNER/tiny-other")
    write_manifest(tmp_path / "outputs" / "other" / "package")
    write_recipe(tmp_path, "other", "tiny-other")
    packages = "[{run: two, dataset: tiny-two, weight: 0.75}, {run: other, dataset: tiny-other, weight: 0.25}]"
    workplace.write_text(WSDM.replace("[{run: two, dataset: tiny-two}]", packages))
    build(workplace)
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results")
    assert done.exit_code == 0, done.output
    scores = pl.read_parquet("results/scores.parquet")
    two, other = ((scores[f"{run}_p_model_a_as_given"] + scores[f"{run}_p_model_a_swapped"]) / 2 for run in ("two", "other"))
    assert (two * 0.75 + other * 0.25 - scores["p_model_a"]).abs().max() < 1e-6
    assert (two - other).abs().max() > 1e-3
    submission = pl.read_csv("results/submission.csv")
    assert submission["id"].to_list() == pl.read_parquet("test.parquet")["id"].to_list()
    assert (submission["winner"] == "model_a").to_list() == (scores["p_model_a"] >= 0.5).to_list()


@pytest.mark.parametrize("head, orders", [("label_tokens", ["as_given", "swapped"]), ("reward", ["as_given"])])
def test_a_kernel_of_each_head_runs_in_kaggles_versions(workplace, tmp_path, tiny_models, head, orders):
    shutil.rmtree(tmp_path / "outputs" / "two")
    package = make_package(tmp_path / "outputs" / "two" / "package", tiny_models("gemma2"), head=head)
    change_json(package / "dataset-metadata.json", id="INSERT_OWNER/tiny-two")
    write_manifest(package)
    write_recipe(tmp_path, "two", "tiny-two", head=head)
    build(workplace)
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results")
    assert done.exit_code == 0, done.output
    record = json.loads((tmp_path / "results" / "kernel.json").read_text())
    assert [work["pass"].split(", ")[1] for work in record["passes"]] == orders
    assert record["scored"] == 30


def test_the_kernels_ids_are_trainings_ids_on_every_awkward_row(workplace, tmp_path, package_folder):
    from transformers import AutoTokenizer

    write_lmsys(tmp_path / "test.csv")
    script = (
        "import json, runpy, pathlib\n"
        "kernel = runpy.run_path('outputs/kernels/test/kernel.py')\n"
        "package = kernel['read_package']('outputs/two/package')\n"
        "rows = kernel['read_rows'](pathlib.Path('test.csv'), True)\n"
        "pairs = [package.model_input.pair_from_row(row) for row in rows]\n"
        "parts = package.model_input, package.tokenizer, package.contract, pairs, ('as_given', 'swapped')\n"
        "json.dump([request.sequences[0] for request in kernel['make_requests'](*parts)], open('ids.json', 'w'))\n"
    )
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITECUSTOMIZE)
    environment = kaggle_environment(tmp_path, tmp_path / "site")
    subprocess.run([find_python(None), "-P", "-c", script], check=True, env=environment)
    tokenizer, contract = AutoTokenizer.from_pretrained(package_folder), read_contract(package_folder)
    pairs = [pair_from_row(row) for row in AWKWARD_ROWS]
    trained = [encode(pair, tokenizer, contract)[0] for pair in [*pairs, *map(swap, pairs)]]
    assert json.loads((tmp_path / "ids.json").read_text()) == trained
    assert [ids for (ids,) in encode_all(pairs, tokenizer, contract)] == trained[: len(pairs)]
    assert max(map(len, trained)) <= contract.budget_tokens


def test_token_ids_other_than_training_s_make_the_kernel_refuse(workplace, tmp_path, ledger_file):
    package = tmp_path / "outputs" / "two" / "package"
    golden = json.loads((package / "contract.json").read_text())["golden"]
    golden[0]["ids"][0][3] += 1
    change_json(package / "contract.json", golden=golden)
    write_manifest(package)
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "rehearsal.json").write_text("of an earlier rehearsal, which passed")
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results")
    assert done.exit_code == 2
    last = done.output.splitlines()[-1]
    assert last.startswith("error: test: the kernel ended with exit code 1: ")
    assert "ContractError: golden row golden-00: token" in last
    assert "/tmp/rehearsal-" not in done.output
    assert not (tmp_path / "results" / "rehearsal.json").exists()
    [entry] = ledger.read()
    assert (entry["verdict"], "error: " + entry["reason"]) == ("failed", last)


def test_an_absent_package_exits_with_2_and_names_the_command(workplace, tmp_path):
    shutil.rmtree(tmp_path / "outputs")
    done = rehearse(workplace, "--test", "test.parquet")
    assert (done.exit_code, done.output) == (
        2,
        "error: outputs/two/package: no package; run `python -m postprocess recipes/two.yml` first\n",
    )
    assert not (tmp_path / "outputs").exists()


def test_a_stale_kernel_exits_with_2_and_names_the_command(workplace):
    workplace.write_text(WSDM.replace("600", "700"))
    done = rehearse(workplace, "--test", "test.parquet")
    assert done.exit_code == 2
    assert done.output.endswith(f"kernel.py not up to date; run `python -m kaggle_kernels build {workplace}`\n")


def test_a_package_of_another_dataset_exits_with_2(workplace, tmp_path):
    change_json(tmp_path / "outputs" / "two" / "package" / "dataset-metadata.json", id="me/tiny-too")
    done = rehearse(workplace, "--test", "test.parquet")
    assert done.exit_code == 2
    assert "dataset-metadata.json: id: found the dataset 'tiny-too', the spec says 'tiny-two'" in done.output


def test_a_recipe_without_the_competitions_verdicts_exits_with_2(workplace):
    workplace.write_text(WSDM.replace("wsdm", "lmsys"))
    done = rehearse(workplace, "--test", "test.parquet")
    assert (done.exit_code, done.output) == (
        2,
        f"error: recipes/two.yml: pairwise.verdicts: no tie, which lmsys asks for and {workplace}: packages.0 is to answer; "
        "train with it, or name another run\n",
    )


@pytest.mark.parametrize(
    "file, changes, message",
    [
        (
            "contract.json",
            {"verdicts": ["model_b", "model_a"]},
            "verdicts: found ['model_b', 'model_a'], recipes/two.yml says [",
        ),
        ("config.json", {"model_type": "llama"}, "model_type: found llama, recipes/two.yml says gemma2, which the kernel was"),
        ("contract.json", {"head": "reward"}, "head: found reward, recipes/two.yml says score, which the kernel was built for"),
        ("manifest.json", {"quantize": "int8"}, "quantize: found int8, recipes/two.yml says none, which the kernel was built"),
        ("dataset-metadata.json", {"id": None}, "id: found the dataset 'None', the spec says 'tiny-two'"),
    ],
)
def test_a_package_that_is_not_the_recipes_exits_with_2_and_names_file_key_and_fix(workplace, tmp_path, file, changes, message):
    change_json(tmp_path / "outputs" / "two" / "package" / file, **changes)
    done = rehearse(workplace, "--test", "test.parquet")
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"error: outputs/two/package/{file}: {message}")


@pytest.mark.parametrize(
    "text, message", [("[1]", "expected an object, found list"), ("{", "not valid JSON"), ("\udcff", "not valid JSON")]
)
@pytest.mark.parametrize("file", ["dataset-metadata.json", "contract.json", "manifest.json"])
def test_a_damaged_json_of_a_package_exits_with_2_in_one_line(workplace, tmp_path, file, text, message):
    (tmp_path / "outputs" / "two" / "package" / file).write_bytes(text.encode("utf-8", "surrogateescape"))
    done = rehearse(workplace, "--test", "test.parquet")
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"error: outputs/two/package/{file}: {message}")


@pytest.mark.parametrize(
    "write, message",
    [
        (lambda path: None, "no such file"),
        (lambda path: path.write_bytes(b"not parquet"), "cannot be read"),
        (lambda path: pl.DataFrame({"id": ["1"], "prompt": ["p"]}).write_parquet(path), "no column response_a, response_b"),
        (lambda path: tiny.pairs(3, seed=1).clear().write_parquet(path), "no rows"),
        (lambda path: tiny.pairs(3, seed=1).with_columns(prompt=pl.lit(1)).write_parquet(path), "no text in prompt"),
        (lambda path: tiny.pairs(3, seed=1).with_columns(id=pl.lit("x")).write_parquet(path), "the id x occurs twice"),
    ],
)
def test_a_test_file_that_cannot_be_used_exits_with_2(workplace, tmp_path, write, message):
    write(tmp_path / "broken.parquet")
    done = rehearse(workplace, "--test", "broken.parquet")
    assert done.exit_code == 2
    assert done.output.startswith("error: broken.parquet: ") and message in done.output
    assert done.output.count("\n") == 1


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"winner": "modelA"}, "row 1 (id row00000): winner is 'modelA'; expected model_a, model_b or tie"),
        (
            {"winner_model_a": 1, "winner_model_b": 1, "winner_tie": 0},
            "row 1 (id row00000): winner is (1, 1, 0); expected a 1 for model_a, model_b or tie, and 0 for the others",
        ),
        ({"winner_model_a": 1, "winner_model_b": 0}, "no column winner_tie; give all three, or none"),
        ({"winner_model_a": "x", "winner_model_b": "0", "winner_tie": "0"}, "row 1 (id row00000): winner is ('x', '0', '0')"),
    ],
)
def test_verdicts_that_make_no_sense_are_told_before_the_kernel_runs(workplace, tmp_path, columns, message, monkeypatch):
    from kaggle_kernels.rehearsal import rehearse as rehearsal

    monkeypatch.setattr(rehearsal, "run_as_kaggle", lambda *_, **__: pytest.fail("the kernel ran"))
    rows = tiny.pairs(3, seed=1).drop("winner").with_columns(**{name: pl.lit(value) for name, value in columns.items()})
    rows.write_parquet(tmp_path / "wrong.parquet")
    done = rehearse(workplace, "--test", "wrong.parquet")
    separator = ": " if message.startswith("no column") else ", "
    assert (done.exit_code, done.output.count("\n")) == (2, 1)
    assert done.output.startswith(f"error: wrong.parquet{separator}{message}")


def test_a_package_of_a_larger_base_model_than_the_recipes_exits_with_2(workplace, tmp_path):
    package = tmp_path / "outputs" / "two" / "package"
    change_json(package / "contract.json", base_model=".")
    with (package / "model.safetensors").open("ab") as file:
        file.truncate(2 * 2**30)
    done = rehearse(workplace, "--test", "test.parquet")
    assert (done.exit_code, done.output) == (
        2,
        "error: outputs/two/package: 2.0 GiB of weights, recipes/two.yml comes to 0.0, which the kernel's memory was computed "
        "for; it was packaged from .: make that the base_model, and build\n",
    )


def test_without_kaggles_environment_it_exits_with_2_and_says_how_to_make_it(workplace):
    done = rehearse(workplace, "--test", "test.parquet", "--python", "nowhere/bin/python")
    assert (done.exit_code, done.output) == (
        2,
        "error: nowhere/bin/python: absent; `make setup` makes the environment with Kaggle's versions\n",
    )


def test_accuracy_and_log_loss_are_joined_by_id(tmp_path, workplace):
    rows = pl.DataFrame(
        [
            {"id": "1", "response_a": "aa", "response_b": "b", "winner": "model_a"},
            {"id": "2", "response_a": "a", "response_b": "bb", "winner": "model_a"},
            {"id": "3", "response_a": "a", "response_b": "bb", "winner": "tie"},
        ]
    )
    scores = pl.DataFrame({"id": ["3", "2", "1"], "p_model_a": [0.5, 0.25, 0.5], "p_model_b": [0.5, 0.75, 0.5]})
    scores.write_parquet(tmp_path / "scores.parquet")
    measured = measure(rows, tmp_path / "scores.parquet", read_spec(workplace))
    assert measured == {"judged": 2, "accuracy": 0.5, "log_loss": pytest.approx(1.0397207708), "longer_accuracy": 0.5}
