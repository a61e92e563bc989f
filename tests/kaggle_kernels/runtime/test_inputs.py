"""Inputs are found wherever Kaggle mounts them, and read whatever they hold."""

import subprocess
import sys
from types import SimpleNamespace

import polars as pl
import pytest

from kaggle_kernels.runtime import inputs
from kaggle_kernels.runtime.inputs import find_mounted, install_missing_wheels, read_rows, read_table, read_text


def mount(root, path, content=b"x"):
    file = root / "input" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


def read_ids(path):
    return [row["id"] for row in read_table(path, ("id",))]


DATASET = ("manifest.json",)
COMPETITION = ("test.parquet", "test.csv")
DEMO = "datasets/owner/demo/manifest.json"


@pytest.mark.parametrize(
    "slug, names, kind, mounted, expected",
    [
        ("demo", DATASET, "datasets", ["datasets/owner/another/manifest.json", "demo/manifest.json"], "demo/manifest.json"),
        ("demo", DATASET, "datasets", ["datasets/owner/another/manifest.json", DEMO], DEMO),
        ("wsdm", COMPETITION, "competitions", ["wsdm/test.csv", "wsdm/test.parquet"], "wsdm/test.parquet"),
        ("wsdm", COMPETITION, "competitions", ["datasets/owner/wsdm/test.parquet", "wsdm/test.csv"], "wsdm/test.csv"),
        (
            "wsdm",
            COMPETITION,
            "competitions",
            ["datasets/wsdm/texts/test.parquet", "competitions/wsdm/test.csv"],
            "competitions/wsdm/test.csv",
        ),
        ("wsdm", COMPETITION, "competitions", ["v3/competitions/wsdm/test.csv"], "v3/competitions/wsdm/test.csv"),
        ("demo", DATASET, "datasets", ["competitions/demo/manifest.json", "demo/manifest.json"], "demo/manifest.json"),
    ],
)
def test_the_mounted_file_is_found_in_every_layout_and_no_other_is_taken_for_it(tmp_path, slug, names, kind, mounted, expected):
    for path in mounted:
        mount(tmp_path, path, path.encode())
    assert find_mounted(tmp_path, slug, names, kind) == tmp_path / "input" / expected


def test_a_file_mounted_twice_counts_once_unless_the_copies_differ(tmp_path):
    mount(tmp_path, "wsdm/test.parquet")
    copy = mount(tmp_path, "competitions/wsdm/test.parquet")
    assert find_mounted(tmp_path, "wsdm", COMPETITION, "competitions").name == "test.parquet"
    copy.write_bytes(b"y")
    with pytest.raises(FileNotFoundError, match="2 files named test.parquet"):
        find_mounted(tmp_path, "wsdm", COMPETITION, "competitions")


def test_a_file_that_is_not_mounted_is_named_with_the_folders_that_are(tmp_path):
    mount(tmp_path, "datasets/owner/llama/test.csv")
    with pytest.raises(FileNotFoundError, match="0 files named test.parquet or test.csv .*'llama'.* datasets/owner/llama;"):
        find_mounted(tmp_path, "llama", COMPETITION, "competitions")


ROWS = [
    {"id": 7, "prompt": 'p, "quoted"\nline', "response_a": "河流", "response_b": ""},
    {"id": 3, "prompt": "q", "response_a": "x" * 200_000, "response_b": None},
]


def write_table(path, rows):
    """The rows in the format that the path's suffix names."""
    frame = pl.DataFrame(rows)
    frame.write_parquet(path) if path.suffix == ".parquet" else frame.write_csv(path)
    return path


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_rows_are_read_from_columns_in_any_order_and_ids_keep_every_digit(tmp_path, suffix):
    rows = [{"other": True, "response_b": None, "prompt": row["prompt"], "response_a": row["response_a"]} for row in ROWS]
    rows[0]["id"], rows[1]["id"] = 2**53 + 1, 2**63 - 1
    path = write_table(tmp_path / f"test.{suffix}", rows)
    null = None if suffix == "parquet" else ""
    assert read_rows(path, are_turns=False) == [
        {"id": "9007199254740993", "prompt": 'p, "quoted"\nline', "response_a": "河流", "response_b": null, "counts": True},
        {"id": "9223372036854775807", "prompt": "q", "response_a": "x" * 200_000, "response_b": null, "counts": True},
    ]
    assert read_ids(path) == ["9007199254740993", "9223372036854775807"]


def test_ids_are_the_characters_of_the_file(tmp_path):
    (tmp_path / "test.csv").write_text('\ufeffid,prompt,response_a,response_b\n007,p,a,b\n 1.0 ,p,a,b\n"a,""b""",p,a,b\n')
    assert read_ids(tmp_path / "test.csv") == ["007", " 1.0 ", 'a,"b"']


def test_categories_and_lists_of_text_are_text(tmp_path):
    frame = pl.DataFrame({"id": ["x"], "prompt": [["p", None]], "response_a": ["a"], "response_b": ["b"]})
    frame.with_columns(pl.col("response_a").cast(pl.Categorical)).write_parquet(tmp_path / "test.parquet")
    [row] = read_rows(tmp_path / "test.parquet", are_turns=True)
    assert row == {"id": "x", "prompt": ["p", None], "response_a": "a", "response_b": "b", "counts": True}


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
@pytest.mark.parametrize("false", [False, 0, 0.0, "FALSE"])
def test_a_row_counts_unless_its_column_scored_says_no(tmp_path, suffix, false):
    scored = pl.Series("scored", [type(false)(1), false, None])
    table = pl.DataFrame([{**ROWS[0], "id": number} for number in range(3)]).with_columns(scored)
    path = write_table(tmp_path / f"test.{suffix}", table)
    assert [row["counts"] for row in read_rows(path, are_turns=False)] == [True, False, True]


@pytest.mark.parametrize("text", ["[broken", '"text"', "5", "", "[" * 100_000], ids=lambda text: text[:7])
def test_text_that_is_no_json_list_is_one_turn(text):
    assert read_text(text, True) == text


@pytest.mark.parametrize(
    "text, are_turns, expected",
    [
        (None, True, None),
        ("null", True, None),
        ('[1, null, "\\ud83d"]', True, ["1", None, "\ud83d"]),
        ('["a"]', False, '["a"]'),
        ("null", False, "null"),
    ],
)
def test_a_json_list_is_turns_where_the_competition_has_them(text, are_turns, expected):
    assert read_text(text, are_turns) == expected


def test_a_test_file_without_a_column_is_refused(tmp_path):
    pl.DataFrame([{"id": 1, "prompt": "p", "response_a": "a"}]).write_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match="no column response_b; there are id, prompt, response_a"):
        read_rows(tmp_path / "test.parquet", are_turns=False)


@pytest.fixture
def image_without_bitsandbytes(monkeypatch):
    """A package in nf4, an image without bitsandbytes, and the commands that were run."""
    commands = []
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    return SimpleNamespace(manifest={"quantize": "nf4"}), commands


def test_missing_bitsandbytes_is_installed_from_the_mounted_wheels(tmp_path, image_without_bitsandbytes):
    package, commands = image_without_bitsandbytes
    wheel = mount(tmp_path, "datasets/owner/pairwise-wheels/bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl")
    install_missing_wheels(tmp_path, [package], "pairwise-wheels")
    [command] = commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[command.index("--find-links") + 1] == str(wheel.parent)
    assert {"--no-index", "--no-deps"} < set(command)
    assert command[-1] == "bitsandbytes"


def test_without_wheels_a_package_that_needs_them_is_refused_and_another_installs_nothing(tmp_path, image_without_bitsandbytes):
    package, commands = image_without_bitsandbytes
    with pytest.raises(ModuleNotFoundError, match="name the dataset that holds its wheel in the spec's `wheels`"):
        install_missing_wheels(tmp_path, [package], None)
    package.manifest["quantize"] = "gptq4"
    install_missing_wheels(tmp_path, [package], None)
    assert commands == []
