"""The generated kernel in a process of its own, in Kaggle's versions: from a test file to a submission, or a refusal."""

import json
import subprocess

import polars as pl
import pytest

from kaggle_kernels.rehearsal.sandbox import SITECUSTOMIZE, find_python, make_environment
from preprocess.core import ledger
from preprocess.core.files import read_json, sha256
from preprocess.model_input import encode, encode_all, pair_from_row, read_contract, swap
from tests.kaggle_kernels.packages import AWKWARD_ROWS, rehearse


def test_a_wsdm_rehearsal_gives_every_id_once_and_is_scored_by_id(workplace, tmp_path, ledger_file):
    done = rehearse(workplace, "--test", "test.parquet", "--out", "results")
    assert done.exit_code == 0, done.output
    rows = pl.read_parquet("test.parquet")
    submission = pl.read_csv("results/submission.csv")
    assert submission.columns == ["id", "winner"]
    assert submission["id"].to_list() == rows["id"].to_list()
    right = (submission["winner"] == rows["winner"]).mean()
    measured = read_json("results/rehearsal.json")
    assert measured["accuracy"] == pytest.approx(right)
    line = f"accuracy {right:.4f}, log loss {measured['log_loss']:.4f}, Brier score {measured['brier_score']:.4f} on 30"
    assert f"{line} judged rows" in done.output
    record = read_json("results/kernel.json")
    assert (record["rows"], record["scored"], record["versions"]["transformers"]) == (30, 30, "5.0.0")
    scores = pl.read_parquet("results/scores.parquet")
    mean = (scores["two_p_model_a_as_given"] + scores["two_p_model_a_swapped"]) / 2
    assert (mean - scores["p_model_a"]).abs().max() < 1e-6
    assert mean.n_unique() == 30
    assert measured["build"] == {
        "kernel_sha256": sha256(tmp_path / "outputs/kernels/test/kernel.py"),
        "packages": {"tiny-two": sha256(tmp_path / "outputs" / "two" / "package" / "manifest.json")},
    }
    [entry] = ledger.read()
    assert (entry["event"], entry["spec"], entry["verdict"], entry["rows"]) == ("rehearse", "test", "passed", 30)
    assert measured["build"].items() <= entry.items()
    assert entry["seconds"] == measured["seconds"]


def write_lmsys(path):
    """Awkward rows in LMSYS's layout: JSON lists of turns, lone surrogates as escapes."""
    rows = []
    for row in AWKWARD_ROWS:
        as_turns = {key: [text] if isinstance(text, str) else text for key, text in row.items()}
        rows.append({key: json.dumps(turns) for key, turns in as_turns.items()} | {"id": row["id"]})
    pl.DataFrame(rows).write_csv(path)


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
    environment = make_environment(tmp_path, tmp_path / "site")
    subprocess.run([find_python(None), "-P", "-c", script], check=True, env=environment)
    tokenizer, contract = AutoTokenizer.from_pretrained(package_folder), read_contract(package_folder)
    pairs = [pair_from_row(row) for row in AWKWARD_ROWS]
    trained = [encode(pair, tokenizer, contract)[0] for pair in [*pairs, *map(swap, pairs)]]
    assert json.loads((tmp_path / "ids.json").read_text()) == trained
    assert [ids for (ids,) in encode_all(pairs, tokenizer, contract)] == trained[: len(pairs)]
    assert max(map(len, trained)) <= contract.budget_tokens
