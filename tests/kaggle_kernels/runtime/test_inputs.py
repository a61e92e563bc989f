"""Inputs are found wherever Kaggle mounts them, and read whatever they hold."""

import json
import subprocess
import sys

import polars as pl
import pytest

from kaggle_kernels.runtime import inputs
from kaggle_kernels.runtime.inputs import (
    find_mounted,
    install_missing_wheels,
    parquet_parts,
    read_ids,
    read_rows,
    read_text,
    rows_of,
)


def mount(root, path, content=b"x"):
    file = root / "input" / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("folder", ["pairwise-demo", "datasets/owner/pairwise-demo", "datasets/owner/pairwise-demo/inner"])
def test_a_file_is_found_in_either_layout(tmp_path, folder):
    mount(tmp_path, "datasets/owner/another/manifest.json", b"other")
    expected = mount(tmp_path, f"{folder}/manifest.json")
    assert find_mounted(tmp_path, "pairwise-demo", ("manifest.json",)) == expected


def test_the_same_file_mounted_twice_counts_once(tmp_path):
    mount(tmp_path, "wsdm/test.parquet")
    mount(tmp_path, "competitions/wsdm/test.parquet")
    assert find_mounted(tmp_path, "wsdm", ("test.parquet", "test.csv")).name == "test.parquet"


def test_two_different_files_are_refused(tmp_path):
    mount(tmp_path, "wsdm/test.parquet", b"one")
    mount(tmp_path, "competitions/wsdm/test.parquet", b"two")
    with pytest.raises(FileNotFoundError, match="2 files named test.parquet"):
        find_mounted(tmp_path, "wsdm", ("test.parquet",))


@pytest.mark.parametrize("folder", ["wsdm", "competitions/wsdm"])
@pytest.mark.parametrize("dataset", ["datasets/owner/wsdm", "datasets/wsdm/texts", "texts/wsdm", "datasets/owner/texts/wsdm"])
def test_a_datasets_file_is_not_taken_for_the_competitions(tmp_path, folder, dataset):
    mount(tmp_path, f"{dataset}/test.parquet", b"another")
    expected = mount(tmp_path, f"{folder}/test.csv")
    assert find_mounted(tmp_path, "wsdm", ("test.parquet", "test.csv"), "competitions") == expected


@pytest.mark.parametrize("dataset", ["datasets/owner/gemma", "gemma"])
def test_a_folder_named_like_a_dataset_elsewhere_is_not_taken_for_it(tmp_path, dataset):
    mount(tmp_path, "competitions/gemma/manifest.json", b"a competition")
    mount(tmp_path, "datasets/gemma/other/manifest.json", b"an owner")
    mount(tmp_path, "datasets/owner/other/gemma/manifest.json", b"a folder")
    expected = mount(tmp_path, f"{dataset}/manifest.json")
    assert find_mounted(tmp_path, "gemma", ("manifest.json",), "datasets") == expected


def test_a_mount_deeper_than_known_is_still_found_but_not_among_the_other_kind(tmp_path):
    expected = mount(tmp_path, "v3/competitions/wsdm/test.parquet")
    assert find_mounted(tmp_path, "wsdm", ("test.parquet",), "competitions") == expected
    mount(tmp_path, "datasets/owner/llama/test.parquet")
    with pytest.raises(FileNotFoundError, match="0 files named test.parquet"):
        find_mounted(tmp_path, "llama", ("test.parquet",), "competitions")


def test_a_competition_with_both_formats_gives_the_first_one_named(tmp_path):
    mount(tmp_path, "wsdm/test.csv", b"csv")
    expected = mount(tmp_path, "wsdm/test.parquet", b"parquet")
    (tmp_path / "input" / "wsdm" / "inner" / "test.parquet").mkdir(parents=True)
    assert find_mounted(tmp_path, "wsdm", ("test.parquet", "test.csv")) == expected


def test_what_is_not_mounted_is_named_with_what_is(tmp_path):
    mount(tmp_path, "datasets/owner/another/manifest.json")
    with pytest.raises(FileNotFoundError, match="0 files named manifest.json .*'pairwise-demo'.* datasets/owner/another;"):
        find_mounted(tmp_path, "pairwise-demo", ("manifest.json",))


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
def test_wsdm_rows_are_read_from_parquet_and_csv(tmp_path, suffix):
    path = write_table(tmp_path / f"test.{suffix}", ROWS)
    first, second = read_rows(path, are_turns=False)
    assert first == {**ROWS[0], "id": "7"}
    assert (second["id"], len(second["response_a"]), second["response_b"] or None) == ("3", 200_000, None)


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_ids_beyond_what_a_float_holds_keep_their_digits(tmp_path, suffix):
    path = write_table(tmp_path / f"test.{suffix}", [{**ROWS[0], "id": 2**53 + 1}, {**ROWS[1], "id": 2**63 - 1}])
    assert read_ids(path) == ["9007199254740993", "9223372036854775807"]
    assert [row["id"] for row in read_rows(path, False)] == read_ids(path)


def test_ids_are_the_characters_of_the_file(tmp_path):
    (tmp_path / "test.csv").write_text('\ufeffid,prompt,response_a,response_b\n007,p,a,b\n 1.0 ,p,a,b\n"a,""b""",p,a,b\n')
    assert read_ids(tmp_path / "test.csv") == ["007", " 1.0 ", 'a,"b"']
    pl.DataFrame({"id": [3.0, -4.0]}).write_parquet(tmp_path / "floats.parquet")
    assert read_ids(tmp_path / "floats.parquet") == ["3", "-4"]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_columns_may_stand_in_any_order_beside_others_and_hold_nothing_but_nulls(tmp_path, suffix):
    row = {"scored": True, "response_b": "b", "id": 1, "more": 0.5, "prompt": None, "response_a": ""}
    path = write_table(tmp_path / f"test.{suffix}", [row])
    [row] = read_rows(path, are_turns=False)
    assert {**row, "prompt": row["prompt"] or None} == {"id": "1", "prompt": None, "response_a": "", "response_b": "b"}


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_a_row_of_ten_million_characters_is_read_whole(tmp_path, suffix):
    path = write_table(tmp_path / f"test.{suffix}", [ROWS[0], {**ROWS[1], "prompt": "河 " * 5_000_000}])
    assert [len(row["prompt"]) for row in read_rows(path, are_turns=True)] == [16, 10_000_000]


def test_categories_and_lists_of_text_are_text(tmp_path):
    frame = pl.DataFrame({"id": ["x"], "prompt": [["p", None]], "response_a": ["a"], "response_b": ["b"]})
    frame.with_columns(pl.col("response_a").cast(pl.Categorical)).write_parquet(tmp_path / "test.parquet")
    [row] = read_rows(tmp_path / "test.parquet", are_turns=True)
    assert row == {"id": "x", "prompt": ["p", None], "response_a": "a", "response_b": "b"}


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_of_rows_that_are_not_kept_no_text_is_made(tmp_path, suffix):
    path = write_table(tmp_path / f"train.{suffix}", [{**ROWS[0], "id": number} for number in range(3000)])
    kept = list(rows_of(path, ("id", "prompt"), {"5", "2999", "absent"}))
    assert kept == [{"id": "5", "prompt": ROWS[0]["prompt"]}, {"id": "2999", "prompt": ROWS[0]["prompt"]}]
    if suffix == "parquet":
        rows = [row for part in parquet_parts(path, ("id", "prompt"), {"5"}) for row in part]
        assert (rows[4], rows[5]) == ({"id": 4}, {"id": 5, "prompt": ROWS[0]["prompt"]})


def test_lmsys_rows_are_lists_of_turns_with_nulls_and_lone_surrogates(tmp_path):
    values = {"prompt": '["one","two"]', "response_a": '["a",null]', "response_b": '["\\ud83d","b"]'}
    pl.DataFrame([{"id": 9, **values}]).write_csv(tmp_path / "test.csv")
    [row] = read_rows(tmp_path / "test.csv", are_turns=True)
    assert row == {"id": "9", "prompt": ["one", "two"], "response_a": ["a", None], "response_b": ["\ud83d", "b"]}


def test_text_that_is_no_json_list_is_one_turn():
    assert [read_text(text, True) for text in ("[broken", '"text"', "5", "", "[" * 100_000)] == [
        "[broken",
        '"text"',
        "5",
        "",
        "[" * 100_000,
    ]
    assert [read_text(text, True) for text in (None, "null", "[1, null]")] == [None, None, ["1", None]]
    assert [read_text(text, False) for text in ('["a"]', "null")] == ['["a"]', "null"]


@pytest.mark.parametrize(
    "frame, message",
    [
        (pl.DataFrame([{"id": 1, "prompt": "p", "response_a": "a"}]), "no column response_b"),
        (pl.DataFrame(ROWS).clear(), "no rows"),
        (pl.DataFrame([{**ROWS[0]}, {**ROWS[0]}]), "an id occurs twice: 7; a submission"),
        (pl.DataFrame([ROWS[0], {**ROWS[1], "id": None}]), "test.parquet, row 2: its id is None; expected a text or a whole"),
        (pl.DataFrame([{**ROWS[0], "id": ""}]), "row 1: its id is ''; expected"),
        (pl.DataFrame([{**ROWS[0], "id": 7.5}]), "row 1: its id is 7.5; expected"),
        (pl.DataFrame([{**ROWS[0], "id": 2.0**60}]), "row 1: its id is 1.15.*; expected"),
        (pl.DataFrame([{**ROWS[0], "prompt": 5}]), "column prompt holds int64; expected text, or lists of it"),
    ],
)
def test_a_test_file_that_cannot_give_a_submission_is_refused(tmp_path, frame, message):
    frame.write_parquet(tmp_path / "test.parquet")
    with pytest.raises(ValueError, match=message):
        read_rows(tmp_path / "test.parquet", are_turns=False)


@pytest.fixture
def image_without_bitsandbytes(monkeypatch, tmp_path):
    """A package in nf4, an image without bitsandbytes, and the commands that were run."""
    commands = []
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda command, check: commands.append(command))
    package = tmp_path / "package"
    package.mkdir()
    (package / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "bitsandbytes"}}))
    return package, commands


SHA256_OF_X = "2d711642b726b04401627ca9fbac32f5c8530fb1903cc4db02258717921a4881"
WHEEL = "datasets/owner/pairwise-wheels/bitsandbytes-0.50.2-py3-none-manylinux_2_24_x86_64.whl"


def mount_wheel(root, is_listed=True):
    """The wheel of bitsandbytes, of the bytes b"x", beside a wheels.json that lists it."""
    wheel = mount(root, WHEEL)
    if is_listed:
        listed = {"wheels": [{"file": wheel.name, "sha256": SHA256_OF_X}]}
        mount(root, "datasets/owner/pairwise-wheels/wheels.json", json.dumps(listed).encode())
    return wheel


@pytest.mark.parametrize("is_listed", [True, False], ids=["listed in wheels.json", "no wheels.json"])
def test_missing_bitsandbytes_is_installed_from_the_mounted_wheels(tmp_path, image_without_bitsandbytes, is_listed):
    package, commands = image_without_bitsandbytes
    wheel = mount_wheel(tmp_path, is_listed)
    assert install_missing_wheels(tmp_path, [package], "pairwise-wheels") == ["bitsandbytes"]
    [command] = commands
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[command.index("--find-links") + 1] == str(wheel.parent)
    assert {"--no-index", "--no-deps"} < set(command)
    assert command[-1] == "bitsandbytes"


def test_wheels_that_are_not_those_of_wheels_json_are_not_installed(tmp_path, image_without_bitsandbytes):
    package, commands = image_without_bitsandbytes
    wheel = mount_wheel(tmp_path)
    other = mount(tmp_path, "datasets/owner/pairwise-wheels/zeta-9-py3-none-any.whl")
    with pytest.raises(ValueError, match="zeta-9-py3-none-any.whl: its SHA-256 is 2d711642b726…, wheels.json says nothing;"):
        install_missing_wheels(tmp_path, [package], "pairwise-wheels")
    other.unlink()
    wheel.write_bytes(b"y")
    with pytest.raises(ValueError, match="whl: its SHA-256 is a1fce4363854…, wheels.json says 2d711642b726; make the dataset"):
        install_missing_wheels(tmp_path, [package], "pairwise-wheels")
    assert commands == []


def test_missing_bitsandbytes_without_wheels_is_a_clear_error(tmp_path, image_without_bitsandbytes):
    with pytest.raises(ModuleNotFoundError, match="name a dataset in the spec's `wheels`"):
        install_missing_wheels(tmp_path, [image_without_bitsandbytes[0]], None)


def test_nothing_is_installed_for_packages_that_are_not_quantised(tmp_path, image_without_bitsandbytes):
    package, commands = image_without_bitsandbytes
    (package / "config.json").write_text("{}")
    assert install_missing_wheels(tmp_path, [package], None) == []
    assert commands == []
