"""The scan before each push finds every kind of secret, tells none of them, and lets everything pass that packages hold."""

import json
import random
import re
import string
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from safetensors.numpy import save_file

from kaggle_kernels.publish.leak_scan import HOMES as HOME_PATTERNS
from kaggle_kernels.publish.leak_scan import SECRETS as SECRET_PATTERNS
from kaggle_kernels.publish.leak_scan import find_rows, scan
from preprocess.__main__ import main
from preprocess.core.errors import UserError
from tests import tiny
from tests.conftest import ROOT

LETTERS = string.ascii_letters + string.digits


def letters(count: int, alphabet: str = LETTERS) -> str:
    """Random characters, a digit first: these secrets are of no account and stand in no file of the project."""
    rng = random.Random(count)
    return "7" + "".join(rng.choices(alphabet, k=count - 1))


HEX = string.hexdigits.lower()[:16]
SECRETS = [
    f"token = 'KGAT_{letters(32, HEX)}'",
    f'os.environ["KAGGLE_API_TOKEN"] = "{letters(40)}"',
    json.dumps({"username": "me", "key": letters(32, HEX)}),
    f"login('hf_{letters(34)}')",
    f"wandb.login('{letters(40, HEX)}')",
    f"wandb_v1_{letters(60)}",
    f"client = OpenAI('sk-proj-{letters(48)}')",
    f"AKIA{letters(16, string.ascii_uppercase + string.digits)}",
    f"aws_secret_access_key = {letters(40)}",
    f"AIza{letters(35)}",
    f"git clone https://ghp_{letters(36)}@github.com/me/it",
    f"github_pat_{letters(82)}",
    f"-----BEGIN OPENSSH PRIVATE KEY-----\n{letters(64)}\n-----END OPENSSH PRIVATE KEY-----",
    json.dumps({"private": f"-----BEGIN PRIVATE KEY-----\n{letters(64)}\n-----END PRIVATE KEY-----"}),
    f"https://me:{letters(12)}@example.com/simple",
    f"api_key: {letters(32)}",
]
HOMES = ["/home/someone/models/gemma", "/Users/someone/models", "/root", "C:\\Users\\someone\\models"]


@pytest.mark.parametrize("text", [*SECRETS, *(json.dumps({"base_model": home}) for home in HOMES)])
def test_each_kind_is_found_with_file_and_line_and_never_told(tmp_path, text):
    (tmp_path / "kernel.py").write_text(f"# Übung\n\n{text}\n")
    problems = scan(tmp_path)
    assert [problem for problem in problems if problem.startswith(f"{tmp_path}/kernel.py: line 3: looks like ")]
    assert max(len(shown) for problem in problems for shown in re.findall(r" \((.*?)…\); ", problem)) == 4
    assert all("\n" not in problem for problem in problems)


def test_every_pattern_has_a_text_above():
    for pattern in (*SECRET_PATTERNS, *HOME_PATTERNS):
        assert [text for text in (*SECRETS, *HOMES) if re.search(pattern, text)], pattern


def test_of_weights_only_the_header_is_read(tmp_path):
    secret = f"hf_{letters(34)}".encode()
    tensors = {"a": np.frombuffer(secret, dtype=np.uint8)}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    assert scan(tmp_path) == []
    save_file(tensors, tmp_path / "model.safetensors", {"made_by": secret.decode(), "from": "/home/someone/x"})
    token, home = scan(tmp_path)
    assert token.startswith(f"{tmp_path}/model.safetensors: line 1: looks like a secret (hf_7…); take it out")
    assert "looks like the path of a home folder (/hom…); take it out" in home


def german(pairs) -> dict:
    """A row of the pairs."""
    return pl.read_parquet(pairs).filter(pl.col("language") == "German").row(0, named=True)


@pytest.fixture
def harmless(package_folder) -> list[Path]:
    """What goes up, of a package without rows and of the example kernel."""
    return [package_folder, *(ROOT / "kaggle_kernels" / "examples").iterdir()]


def test_what_packages_and_generated_kernels_hold_gives_no_alarm(harmless, pairs):
    assert [problem for folder in harmless for problem in scan(folder)] == []
    assert find_rows(harmless, pairs) == []


def test_words_of_a_vocabulary_hashes_and_commits_give_no_alarm(tmp_path):
    rng = random.Random(0)
    parts = ["hf_", "sk-", "ghp_", "/home/user", "://", "password", "secret", "AKIA", "machine", "-----BEGIN PRIVATE KEY-----"]
    words = [rng.choice(parts) + "".join(rng.choices(LETTERS + "_/-.\"' ", k=rng.randint(0, 12))) for _ in range(50_000)]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"vocab": {word: at for at, word in enumerate(words)}}, indent=1))
    contract = {"git_commit": letters(40, HEX), "sha256": letters(64, HEX), "wandb": "0.31.0", "pad_token": "<pad>"}
    (tmp_path / "contract.json").write_text(json.dumps(contract, indent=1))
    assert scan(tmp_path) == []


@pytest.fixture
def pairs(tmp_path):
    """Forty pairs with texts of their own."""
    folder = tmp_path / "data"
    folder.mkdir()
    return tiny.pairs_parquet(folder / "pairs.parquet", 40)


def test_a_row_of_the_data_is_found_in_text_in_json_and_in_another_form(pairs, tmp_path):
    row = german(pairs)
    prompt, response_a, response_b = row["prompt"][0], row["response_a"][0], row["response_b"][0]
    contents = {
        "notes.txt": f"an example:\n{prompt.upper()}\n{response_a}",
        "rows.json": json.dumps({"examples": [prompt, response_a]}),
        "kernel.py": f"EXAMPLE = '''{prompt.replace(' ', '  ')}''', '{response_b}'",
    }
    for name, content in contents.items():
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text(content)
        [told] = find_rows([folder], pairs)
        assert told.startswith(
            f"{folder / name}: holds texts of 1 of the pairs in {pairs} (id {row['id']}), which the competition"
        )
        assert prompt[:20] not in told


def test_a_row_in_a_script_without_spaces_is_found(tmp_path):
    row = {"id": "1", "prompt": ["空" * 10], "response_a": [tiny.LANGUAGES["Japanese"][1].replace(" ", "")], "response_b": []}
    pl.DataFrame([row], schema_overrides={"response_b": pl.List(pl.String)}).write_parquet(tmp_path / "pairs.parquet")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "notes.txt").write_text(f"例:{row['response_a'][0][:110]}。")
    assert len(find_rows([tmp_path / "package"], tmp_path / "pairs.parquet")) == 1


def test_a_row_is_found_in_each_of_two_files_and_one_sentence_in_each_is_no_row(pairs, tmp_path):
    row, folder = german(pairs), tmp_path / "package"
    folder.mkdir()
    for name, key in (("a.txt", "prompt"), ("b.txt", "response_a")):
        (folder / name).write_text(row[key][0][:60])
    assert find_rows([folder], pairs) == []
    for name in ("a.txt", "b.txt"):
        (folder / name).write_text(f"{row['prompt'][0]} {row['response_a'][0]}")
    assert [problem.split(": ")[0] for problem in find_rows([folder], pairs)] == [
        str(folder / name) for name in ("a.txt", "b.txt")
    ]


def test_pairs_that_cannot_be_read_are_one_line(tmp_path):
    (tmp_path / "notes.txt").write_text("words " * 40)
    (tmp_path / "pairs.parquet").write_text("no")
    with pytest.raises(UserError, match="pairs.parquet: cannot be read"):
        find_rows([tmp_path], tmp_path / "pairs.parquet")


def test_real_pairs_give_no_alarm_on_what_packages_hold(shared_data, harmless, tmp_path):
    out = tmp_path / "pairs.parquet"
    sources = [str(shared_data / name) for name in ("human.parquet", "human_lmsys.csv")]
    done = CliRunner().invoke(main, [*sources, "--out", str(out)])
    assert done.exit_code == 0, done.output
    assert find_rows([*harmless, ROOT / "preprocess", ROOT / "recipes"], out) == []
