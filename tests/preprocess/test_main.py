"""The command as a user meets it: what it prints, what it writes, and what it leaves alone when it refuses."""

import json
import subprocess
import sys

import polars as pl
import pytest
from click.testing import CliRunner

from preprocess import __main__ as command
from preprocess import pairs as pairs_module
from preprocess.core import ledger
from preprocess.core.files import sha256
from preprocess.pairs import PAIRS
from tests import tiny


def run(*args):
    return CliRunner().invoke(command.main, [str(arg) for arg in args])


@pytest.fixture
def train(tmp_path):
    """60 good rows and two that cannot be used."""
    bad = tiny.pairs(2, seed=9, prefix="bad").with_columns(winner=pl.Series(["modelA", "tie"]), response_a=pl.lit(""))
    pl.concat([tiny.pairs(60, seed=1), bad]).write_parquet(tmp_path / "train.parquet")
    return tmp_path / "train.parquet"


@pytest.fixture
def out(tmp_path):
    return tmp_path / "data" / "pairs.parquet"


def test_every_row_is_kept_or_rejected_with_a_reason_and_the_table_says_so(train, out):
    result = run(train, "--out", out, "--folds", "3")
    assert result.exit_code == 0, result.output
    pairs = pl.read_parquet(out)
    rejected = pl.read_parquet(out.with_name("pairs.rejected.parquet"))
    assert (pairs.schema, pairs.height) == (PAIRS, 60)
    assert rejected.select("id", "row", "reason").rows() == [
        ("bad00000", 61, "empty answer"),
        ("bad00001", 62, "empty answer"),
    ]
    assert sorted(path.name for path in out.parent.iterdir()) == ["pairs.parquet", "pairs.rejected.parquet"]
    lines = result.output.splitlines()
    row = next(line.split() for line in lines if line.strip().startswith("train"))
    assert row[:7] == ["train", "62", "60", "0", "empty", "answer:", "2"]
    assert any("60 pairs in 60 groups" in line for line in lines)
    assert "beside the folds" not in result.output
    assert any(line.startswith("leak report: no prompt has another of similarity 0.7 or more") for line in lines)


def test_the_longer_answer_wins_as_often_as_counted_by_hand(tmp_path, out):
    rows = [
        ("1", "long", "s", "model_a"),
        ("2", "long", "s", "model_b"),
        ("3", "xy", "xz", "model_a"),
        ("4", "long", "s", "tie"),
    ]
    table = pl.DataFrame(rows, schema=["id", "response_a", "response_b", "winner"], orient="row")
    table.with_columns(prompt=pl.lit("question ") + pl.col("id")).write_csv(tmp_path / "x.csv")
    line = next(line for line in run(tmp_path / "x.csv", "--out", out).output.splitlines() if line.split()[:1] == ["x"])
    assert line.split()[-4:] == ["50.0%", "25.0%", "25.0%", "66.7%"]


def test_running_again_gives_the_same_bytes_and_the_output_is_a_source_itself(train, out):
    first_run = run(train, "--out", out).output, out.read_bytes()
    assert (run(train, "--out", out).output, out.read_bytes()) == first_run
    copy = out.with_name("copy.parquet")
    assert run(out, "--out", copy).exit_code == 0
    assert pl.read_parquet(copy).equals(pl.read_parquet(out))


def test_a_prompt_of_a_held_back_file_is_a_leak_and_nothing_is_written(train, out, tmp_path):
    held_back = pl.read_parquet(train).head(3).drop("winner").with_columns(pl.col("prompt") + "!", id=pl.lit("held"))
    held_back.write_csv(tmp_path / "test.csv")
    tiny.pairs(5, seed=5).write_parquet(tmp_path / "other.parquet")
    result = run(train, "--out", out, "--against", tmp_path / "other.parquet", tmp_path / "test.csv")
    assert result.exit_code == 2
    assert "3 between sources and other.parquet, test.csv" in result.output
    assert all(part in result.output for part in ("row00000", "held", "test.csv", "fold "))
    assert not out.parent.exists()


def test_a_held_back_file_without_shared_prompts_passes_and_the_ledger_has_all_files(train, out, tmp_path, ledger_file):
    held_back = tmp_path / "test.parquet"
    tiny.pairs(30, seed=5).write_parquet(held_back)
    result = run(train, "--out", out, "--against", held_back)
    assert result.exit_code == 0
    assert "or in test.parquet" in result.output
    [entry] = ledger.read()
    assert (entry["event"], entry["rows"], entry["rejected"]) == ("pairs", 60, 2)
    assert entry["sources"] == [{"file": str(train), "sha256": sha256(train), "rows": 62, "role": "train"}]
    assert entry["against"] == [{"file": str(held_back), "sha256": sha256(held_back), "rows": 30}]
    assert (entry["pairs"], entry["pairs_sha256"]) == (str(out), sha256(out))


def test_files_of_all_roles_become_one_file_that_is_a_source_itself(train, out, tmp_path, ledger_file):
    files = {"extra": tiny.pairs(20, seed=2, prefix="e"), "pool": tiny.pairs(10, seed=3, prefix="p").drop("winner")}
    for role, table in files.items():
        table.write_csv(tmp_path / f"{role}.csv")
    result = run(train, "--out", out, "--extra", tmp_path / "extra.csv", "--pool", tmp_path / "pool.csv", "--test", "0.2")
    assert result.exit_code == 0, result.output
    roles = dict(pl.read_parquet(out)["role"].value_counts().iter_rows())
    assert (roles["extra"], roles["pool"], roles["train"] + roles["test"]) == (20, 10, 60)
    assert f"beside the folds: lockbox: {roles['test']}, extra: 20, pool: 10" in result.output
    assert "pool (pool)" in result.output
    assert max(map(len, result.output.splitlines()[:15])) <= 100
    assert [source["role"] for source in ledger.read()[0]["sources"]] == ["train", "extra", "pool"]
    copy = out.with_name("copy.parquet")
    assert run(out, "--out", copy).exit_code == 0
    assert pl.read_parquet(copy).equals(pl.read_parquet(out))


def test_a_training_row_whose_prompt_is_in_the_lockbox_is_a_leak(train, out, tmp_path):
    lockbox = pl.read_parquet(train).head(3).with_columns(pl.col("prompt") + "!", id="held" + pl.col("id"))
    lockbox.write_csv(tmp_path / "lockbox.csv")
    result = run(train, "--out", out, "--test", tmp_path / "lockbox.csv")
    assert result.exit_code == 2
    assert "3 between sources and the lockbox" in result.output
    assert not out.parent.exists()
    assert "expected a share between 0 and 1, or a file" in run(train, "--out", out, "--test", "1.5").output


def test_a_grouping_gone_wrong_is_caught_and_the_earlier_output_stays(tmp_path, out, monkeypatch):
    table = tiny.pairs(40, seed=1)
    table.write_parquet(tmp_path / "x.parquet")
    run(tmp_path / "x.parquet", "--out", out)
    before = out.read_bytes()
    copies = table.with_columns(pl.col("prompt") + "?", pl.col("response_a") + "!", id="copy" + pl.col("id"))
    pl.concat([table, copies]).write_parquet(tmp_path / "x.parquet")
    monkeypatch.setattr(pairs_module, "group_prompts", lambda texts, *_: pl.int_range(len(texts), eager=True).to_numpy())
    result = run(tmp_path / "x.parquet", "--out", out)
    assert result.exit_code == 2
    assert "between folds" in result.output
    assert out.read_bytes() == before


def test_bad_input_is_one_line_exit_code_2_and_no_file(tmp_path, train, out):
    (tmp_path / "unusable.csv").write_text("id,prompt,response_a,response_b,winner\n1,p,a,b,nobody\n")
    for arguments in ([tmp_path / "unusable.csv", "--out", out], ["--out", "pairs.csv"], ["--out", out, "--against", "no.csv"]):
        result = run(train, *arguments)
        assert (result.exit_code, result.output.count("\n"), result.output[:7]) == (2, 1, "error: ")
    assert not out.parent.exists()


def test_a_file_given_twice_is_refused(train, out):
    assert "given twice" in run(train, train, "--out", out).output
    assert "given twice" in run(train, "--out", train).output
    assert train.exists()


@pytest.mark.slow
def test_a_competitions_number_of_rows_fits_time_and_memory():
    bench = subprocess.run([sys.executable, "-m", "tests.bench", "preprocess"], capture_output=True, text=True)
    assert bench.returncode == 0, bench.stderr
    figures = json.loads(bench.stdout.splitlines()[-1])
    assert figures["rows"] == 48_000
    assert figures["peak_gigabytes"] <= 2
    assert figures["cpu_seconds"] <= 60  # not by the clock: other work on the machine would count
