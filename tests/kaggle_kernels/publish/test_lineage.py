"""A submission leads back through the ledger to the raw files' hashes, and where it does not, the step is named."""

import pytest
from click.testing import CliRunner

from kaggle_kernels.__main__ import main
from preprocess.core import ledger

RAW, PAIRS, CONTRACT, MANIFEST, WHEELS, KERNEL = (letter * 64 for letter in "abcdef")
TIME = "2026-11-25T10:00:00+00:00"
CODE = {"time": TIME, "git_commit": "1" * 40, "git_dirty": False}
ENTRIES = {
    "pairs": {
        "sources": [{"file": "data/train.parquet", "sha256": RAW, "rows": 48439}],
        "pairs": "data/pairs.parquet",
        "pairs_sha256": PAIRS,
        "rows": 48401,
    },
    "train": {
        "recipe": "recipes/demo.yml",
        "recipe_sha256": "2" * 64,
        "run": "outputs/demo",
        "pairs": "data/pairs.parquet",
        "pairs_sha256": PAIRS,
        "fold": 0,
        "contract": CONTRACT,
        "metrics": {"accuracy": 0.84, "log_loss": 0.443},
    },
    "package": {"run": "outputs/demo", "dataset": "pairwise-demo", "manifest": MANIFEST, "trained": {"outputs/demo": CONTRACT}},
    "push": {
        **{"spec": "demo", "kernel": "me/pairwise-demo", "kernel_version": 3, "kernel_sha256": KERNEL},
        "datasets": {
            "me/pairwise-demo": {"version": 2, "manifest": MANIFEST},
            "me/pairwise-wheels": {"version": 1, "manifest": WHEELS},
        },
    },
    "submit": {
        **{"spec": "demo", "kernel": "me/pairwise-demo", "kernel_version": 3, "submission_ref": "4711"},
        "message": "first",
    },
}


def write_chain(without: str = "", **changes) -> None:
    """A ledger from raw files to a submission; `changes` are of entries by event."""
    ledger.record("package", **CODE, dataset="pairwise-wheels", manifest=WHEELS, wheels=["bitsandbytes 0.50.2"])
    for event, fields in ENTRIES.items():
        if event != without:
            ledger.record(event, **{**CODE, **fields, **changes.get(event, {})})


def trace(reference: str):
    return CliRunner().invoke(main, ["trace", reference])


@pytest.mark.parametrize("reference", ["demo", "4711", "me/pairwise-demo", "me/pairwise-demo/3"])
def test_a_submission_leads_back_to_the_raw_file(ledger_file, reference):
    write_chain()
    traced = trace(reference)
    assert traced.exit_code == 0
    lines = [" ".join(line.split()) for line in traced.output.splitlines()]
    made = "2026-11-25 10:00 111111111111"
    assert lines == [
        "step time (UTC) commit facts",
        f"submit {made} me/pairwise-demo version 3, 'first'",
        f"push {made} me/pairwise-demo version 3",
        f"package {made} me/pairwise-demo version 2: outputs/demo",
        f"train {made} outputs/demo: recipes/demo.yml, fold 0, accuracy 0.8400, log loss 0.4430",
        f"pairs {made} data/pairs.parquet, 48,401 pairs",
        f"raw data/train.parquet, 48,439 rows, sha256 {RAW}",
        f"package {made} me/pairwise-wheels version 1: wheels",
    ]


def test_a_push_that_was_not_submitted_leads_back_too(ledger_file):
    write_chain(without="submit")
    done = trace("demo")
    assert done.exit_code == 0
    assert done.output.splitlines()[1].startswith("push ")
    assert f"data/train.parquet, 48,439 rows, sha256 {RAW}" in done.output


@pytest.mark.parametrize(
    "event, change, line",
    [
        ("push", {"kernel_version": 4}, "broken: push no push of me/pairwise-demo version 3: was it pushed"),
        ("package", {"manifest": "0" * 64}, "broken: package me/pairwise-demo version 2: no package with its manifest"),
        (
            "package",
            {"trained": {"outputs/demo": CONTRACT, "outputs/other": "0" * 64}},
            "broken: train outputs/other: no training that wrote its contract",
        ),
        ("train", {"pairs_sha256": "0" * 64}, "broken: pairs data/pairs.parquet: no preprocessing that made this file"),
        ("pairs", {"sources": [{"file": "raw.csv", "sha256": None}]}, "broken: raw raw.csv: its SHA-256 is not known"),
    ],
)
def test_a_chain_that_a_hash_or_a_version_breaks_says_where_and_ends_with_2(ledger_file, event, change, line):
    write_chain(**{event: change})
    done = trace("demo")
    assert done.exit_code == 2
    assert line in " ".join(done.output.split())
    assert done.stderr == "error: demo: the chain is broken, see above\n"


def test_an_unknown_reference_is_one_line_and_the_last_submission_of_a_spec_is_meant(ledger_file):
    assert trace("demo").stderr.startswith(f"error: demo: no submission and no push of it in {ledger_file}; give a spec")
    write_chain()
    write_chain(push={"kernel_version": 4}, submit={"kernel_version": 4, "message": "second"})
    assert trace("demo").output.splitlines()[1].endswith("me/pairwise-demo version 4, 'second'")


def test_a_run_that_went_on_from_another_leads_back_to_it(ledger_file):
    first_contract = "3" * 64
    first = ENTRIES["train"] | {"run": "outputs/first", "contract": first_contract}
    ledger.record("train", **CODE, **first)
    write_chain(train={"started_from": {"run": "outputs/first", "contract": first_contract}})
    traced = trace("demo").output
    assert traced.index("outputs/demo: recipes/demo.yml") < traced.index("outputs/first: recipes/demo.yml")


def test_pairs_that_were_made_of_pairs_lead_on(ledger_file):
    raw = {"file": "raw.csv", "sha256": RAW, "rows": 7}
    ledger.record("pairs", **CODE, sources=[raw], pairs="old.parquet", pairs_sha256=PAIRS, rows=7)
    again = [{"file": "old.parquet", "sha256": PAIRS, "rows": 7}, {"file": "new.csv", "sha256": "9" * 64, "rows": 3}]
    write_chain(pairs={"sources": again})
    traced = trace("demo").output
    assert f"raw.csv, 7 rows, sha256 {RAW}" in traced
    assert f"new.csv, 3 rows, sha256 {'9' * 64}" in traced
