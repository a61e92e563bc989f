"""recipes/siamese.py, run as a user runs it, with .venv-keras: it learns on two devices, swaps, answers, and refuses."""

import json
import os
import re
import subprocess

import numpy as np
import polars as pl
import pytest
from tokenizers import Tokenizer, models

from preprocess.core.files import read_json, sha256
from recipes.pairwise.data.datasets import targets, winners
from recipes.pairwise.tracking import metrics
from tests import tiny
from tests.conftest import ROOT

PYTHON = ROOT / ".venv-keras" / "bin" / "python"
SCRIPT = ROOT / "recipes" / "siamese.py"
SMALL = ["--tokens=32", "--units=8", "--vocabulary=600", "--batch-size=16", "--learning-rate=0.01"]
VERDICTS = ("model_a", "model_b")


def siamese(*arguments, code: str | None = None) -> subprocess.CompletedProcess:
    """The script, or `code` in its place, in a process of its own."""
    assert PYTHON.is_file(), "no .venv-keras; `make setup` makes it"
    command = [str(PYTHON), *(["-c", code] if code else [str(SCRIPT)]), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with pairs.parquet (240 rows, some ties and soft labels), test.csv and swapped.csv of 33 rows."""
    folder = tmp_path_factory.mktemp("siamese")
    pairs = pl.read_parquet(tiny.pairs_parquet(folder / "pairs.parquet", rows=240))
    number = pl.int_range(pl.len())
    is_tie = number % 15 == 0
    certainty = pl.when(number % 7 == 1).then(0.75).otherwise(1.0)
    pairs = pairs.with_columns(
        winner=pl.when(is_tie).then(pl.lit("tie")).otherwise("winner"),
        p_tie=is_tie.cast(pl.Float64),
        p_model_a=pl.when(is_tie).then(0.0).when(pl.col("p_model_a") == 1).then(certainty).otherwise(1 - certainty),
    )
    pairs.with_columns(p_model_b=1 - pl.col("p_model_a") - pl.col("p_tie")).write_parquet(folder / "pairs.parquet")
    test = tiny.pairs(33, seed=5, prefix="test").select("id", "prompt", "response_a", "response_b")
    test.write_csv(folder / "test.csv")
    test.rename({"response_a": "response_b", "response_b": "response_a"}).write_csv(folder / "swapped.csv")
    return folder


@pytest.fixture(scope="module")
def trained(inputs):
    """The folder of a run over two logical CPUs that answered test.csv, and what it printed."""
    return inputs / "run", train_and_answer(inputs, "test.csv")


def train_and_answer(inputs, test: str) -> str:
    """Answer a file's rows by the run of fold 2, which is trained unless it was; return what the script prints."""
    files = ["--pairs", inputs / "pairs.parquet", "--out", inputs / "run", "--test", inputs / test]
    done = siamese(*files, *SMALL, "--fold", 2, "--cpu-devices", 2, "--epochs", 4)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_loss_falls_over_two_devices(trained):
    out, printed = trained
    losses = [float(value) for value in re.findall(r"- loss: ([\d.]+)", printed)]
    assert "2 device(s)" in printed
    assert losses[-1] < 0.8 * losses[0]
    assert read_json(out / "metrics.json")["log_loss"] < 0.6


def test_it_leaves_what_every_run_leaves_and_the_metrics_are_those_of_all_runs(inputs, trained):
    out, _ = trained
    held_out = pl.read_parquet(inputs / "pairs.parquet").filter(pl.col("fold") == 2).sort("id")
    table = pl.read_parquet(out / "predictions.parquet")
    assert table.select("id", "fold", "winner").equals(held_out.select("id", "fold", "winner"))
    values = read_json(out / "metrics.json")
    assert values["pairs_sha256"] == sha256(inputs / "pairs.parquet")
    assert (values["fold"], values["rows"], values["rows_were_trained_on"]) == (2, 48, False)
    assert {path.name for path in out.iterdir()} == {
        *("metrics.json", "model.keras", "predictions.parquet", "submission.csv", "tokenizer.json")
    }
    both = np.stack([table.select(f"p_{v}_{order}" for v in VERDICTS).to_numpy() for order in metrics.ORDERS], axis=1)
    expected = metrics.scores(both, targets(held_out, VERDICTS), winners(held_out, VERDICTS))
    assert {name: values[name] for name in expected} == pytest.approx(expected, abs=1e-6)
    assert values["accuracy_of_longer"] == pytest.approx(metrics.longer_is_right(held_out), abs=1e-9)


def test_a_finished_run_answers_swapped_rows_the_other_way_without_training_again(inputs, trained):
    out, _ = trained
    first = pl.read_csv(out / "submission.csv")
    weights = (out / "model.keras").read_bytes()
    assert "Epoch" not in train_and_answer(inputs, "swapped.csv")
    assert (out / "model.keras").read_bytes() == weights
    assert first["id"].to_list() == [f"test{number:05d}" for number in range(33)]
    assert first["winner"].n_unique() == 2
    other_way = pl.col("winner").replace_strict({"model_a": "model_b", "model_b": "model_a"})
    assert pl.read_csv(out / "submission.csv").equals(first.with_columns(other_way))


ALL_IN_ONE_PROCESS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import siamese
for arguments in json.loads(sys.argv[2]):
    sys.argv = ["siamese.py", *arguments]
    try:
        siamese.main()
        print(json.dumps(None))
    except (siamese.UserError, OSError) as error:
        print(json.dumps(str(error)))
"""


def test_what_is_broken_is_named_in_one_line(inputs, tmp_path):
    pairs = pl.read_parquet(inputs / "pairs.parquet")
    pairs.drop("weight").write_parquet(tmp_path / "no-weight.parquet")
    pairs.with_columns(p_model_a=None).write_parquet(tmp_path / "no-votes.parquet")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "twice.csv").write_text("id,prompt,response_a,response_b\n1,p,a,b\n1,p,a,b\n")
    (tmp_path / "none.csv").write_text("id,prompt,response_a,response_b\n")
    (tmp_path / "lacks.csv").write_text("id,prompt,response_a\n1,p,a\n")
    good = ["--pairs", str(inputs / "pairs.parquet"), "--out", str(tmp_path / "out")]
    cases = {
        "no column weight": ["--pairs", str(tmp_path / "no-weight.parquet"), *good[2:]],
        "a probability or weight of some row is missing": ["--pairs", str(tmp_path / "no-votes.parquet"), *good[2:]],
        "--fold is 9, but the folds in the file are 0, 1, 2, 3, 4": [*good, "--fold", "9"],
        "are too few for --batch-size 500; lower it": [*good, "--batch-size", "500"],
        "--units 0: expected 1 or more": [*good, "--units", "0"],
        "broken.json: not a tokenizer.json": [*good, "--tokenizer", str(tmp_path / "broken.json")],
        "twice.csv: a row has no id, or the id of another row": [*good, "--test", str(tmp_path / "twice.csv")],
        "none.csv: no rows": [*good, "--test", str(tmp_path / "none.csv")],
        "lacks.csv: no column response_b": [*good, "--test", str(tmp_path / "lacks.csv")],
    }
    done = siamese(SCRIPT.parent, json.dumps(list(cases.values())), code=ALL_IN_ONE_PROCESS)
    messages = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(messages) == len(cases), done.stderr
    for expected, message in zip(cases, messages, strict=True):
        assert expected in message
        assert "\n" not in message
    assert not list((tmp_path / "out").iterdir())


PARTS = """
import json, sys
sys.path.insert(0, sys.argv[1])
import numpy as np, siamese
print(siamese.read_tokenizer(sys.argv[2]).to_str())
pairs = [([5] * (row + 1), [6]) for row in range(5)]
rows = pairs, np.arange(5), np.ones(5), 3
for dataset in (siamese.make_ordered_batches(*rows), siamese.make_shuffled_batches(*rows, np.random.default_rng(1))):
    for (a, b), targets, weights in dataset.as_numpy_iterator():
        print(json.dumps([a.tolist(), b.tolist(), targets.ravel().tolist(), weights.ravel().tolist()]))
"""


def test_every_batch_is_full_and_a_tokenizer_from_a_file_neither_cuts_nor_pads(tmp_path):
    """Five rows in batches of three: Keras divides the loss by six rows, so that each of the five weighs 6/5."""
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "river": 1}, unk_token="<unk>"))
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding()
    tokenizer.save(str(tmp_path / "tokenizer.json"))

    done = siamese(SCRIPT.parent, tmp_path / "tokenizer.json", code=PARTS)
    assert done.returncode == 0, done.stderr
    read, first, second, shuffled = [json.loads(line) for line in done.stdout.splitlines()]
    assert (read["model"]["vocab"], read["truncation"], read["padding"]) == ({"<unk>": 0, "river": 1}, None, None)
    assert first[:3] == [[[5, 0, 0], [5, 5, 0], [5, 5, 5]], [[6, 0, 0]] * 3, [0, 1, 2]]
    assert second[:3] == [
        [[5, 5, 5, 5, 0], [5, 5, 5, 5, 5], [1, 0, 0, 0, 0]],
        [[6, 0, 0, 0, 0]] * 2 + [[1, 0, 0, 0, 0]],
        [3, 4, 0],
    ]
    assert first[3] + second[3] == pytest.approx([1.2] * 5 + [0])
    assert shuffled[3] == [1, 1, 1]
    assert [sum(token > 0 for token in ids) - 1 for ids in shuffled[0]] == shuffled[2]  # a row keeps its target
    assert len(set(shuffled[2])) == 3


def test_an_error_ends_with_one_line_and_exit_code_2(tmp_path):
    done = siamese("--pairs", tmp_path / "absent.parquet", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path / 'absent.parquet'}: cannot be read (")
