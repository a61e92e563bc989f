"""The generated kernel in Kaggle's versions encodes as training does."""

import json
import subprocess

import polars as pl

from kaggle_kernels.rehearsal.sandbox import SITECUSTOMIZE, find_python, make_environment
from kaggle_kernels.rehearsal.scenario import Scenario
from preprocess.model_input import encode, encode_all, pair_from_row, read_contract, swap
from tests.kaggle_kernels.packages import AWKWARD_ROWS


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
    environment = make_environment(tmp_path, tmp_path / "site", Scenario())
    subprocess.run([find_python(None), "-P", "-c", script], check=True, env=environment)
    tokenizer, contract = AutoTokenizer.from_pretrained(package_folder), read_contract(package_folder)
    pairs = [pair_from_row(row) for row in AWKWARD_ROWS]
    trained = [encode(pair, tokenizer, contract)[0] for pair in [*pairs, *map(swap, pairs)]]
    assert json.loads((tmp_path / "ids.json").read_text()) == trained
    assert [ids for (ids,) in encode_all(pairs, tokenizer, contract)] == trained[: len(pairs)]
    assert max(map(len, trained)) <= contract.budget_tokens
