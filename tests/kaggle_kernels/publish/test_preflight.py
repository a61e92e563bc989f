"""What push checks before the first byte goes up: each fault is one line with file, finding and fix, and all come at once."""

import json
from pathlib import Path

import polars as pl
import pytest

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.packages import build_of
from kaggle_kernels.publish.preflight import find_problems
from tests import tiny
from tests.kaggle_kernels.packages import WSDM, change_json, flip_byte, make_pushable, write_manifest, write_recipe
from tests.kaggle_kernels.publish.pushes import pretend_wheels

PACKAGE = Path("outputs/two/package")
REHEARSAL = Path("outputs/test/rehearsal/rehearsal.json")
PAIRS = Path("data/pairs.parquet")


@pytest.fixture(autouse=True)
def pairs(tmp_path):
    """The pairs are on this machine."""
    (tmp_path / "data").mkdir()
    tiny.pairs_parquet(tmp_path / PAIRS, 3)


def test_all_problems_are_told_at_once(pushable):
    assert find_problems(pushable) == []
    pushable.write_text(WSDM.replace("600", "700"))
    flip_byte(PACKAGE / "tokenizer.json")
    (PACKAGE / "train.parquet").write_text("rows")
    change_json(PACKAGE.parent / "agreement.json", agrees=False)
    REHEARSAL.unlink()
    problems = find_problems(pushable)
    starts = (
        "outputs/kernels/test/kernel.py: not up to date; run `python -m kaggle_kernels build test`",
        f"{PACKAGE}/tokenizer.json: changed since it was made",
        f"{PACKAGE}/train.parquet: not in manifest.json, so that nobody checked it; remove it",
        "outputs/two/agreement.json: no agreement with the trained model; run `python -m postprocess recipes/two.yml`",
        f"{REHEARSAL}: missing, so that no rehearsal has passed; run `python -m kaggle_kernels rehearse test",
    )
    assert [problem[: len(start)] for problem, start in zip(problems, starts, strict=True)] == list(starts)
    assert all("\n" not in problem for problem in problems)


def test_a_spec_that_cannot_be_read_is_one_problem(pushable):
    pushable.write_text(WSDM.replace("600", "-1"))
    [problem] = find_problems(pushable)
    assert problem.startswith(f"{pushable}: clock_seconds: ")


def test_a_package_that_is_not_the_recipes_is_told(pushable):
    write_recipe(Path.cwd(), "two", "tiny-two", quantize="int8")
    pushable.write_text(WSDM + "wheels: pairwise-wheels\n")
    build(pushable)
    package, wheels, rehearsal = find_problems(pushable)
    assert package.startswith("outputs/two/package/manifest.json: quantize: found none, recipes/two.yml says int8")
    assert wheels.startswith("outputs/wheels: no such folder, but the spec names the dataset pairwise-wheels; run")
    assert "is of another build of the kernel" in rehearsal


def test_the_wheels_are_checked_as_a_package_is(pushable):
    folder = pretend_wheels("pairwise-wheels")
    pushable.write_text(WSDM + "wheels: pairwise-wheels\n")
    build(pushable)
    REHEARSAL.write_text(json.dumps({"build": build_of(Path("outputs/kernels/test"), {"tiny-two": PACKAGE})}))
    assert find_problems(pushable) == []
    [wheel] = folder.glob("*.whl")
    flip_byte(wheel)
    change_json(folder / "dataset-metadata.json", id="me/other-wheels")
    assert [problem.split(": ")[0] for problem in find_problems(pushable)] == [
        str(wheel),
        "outputs/wheels/dataset-metadata.json",
    ]


def test_an_agreement_of_another_package_is_refused(pushable):
    golden = json.loads((PACKAGE / "manifest.json").read_text())["golden"]
    golden[0]["probabilities"][0] += 0.25
    change_json(PACKAGE.parent / "agreement.json", golden=golden)
    [problem] = find_problems(pushable)
    assert problem.startswith("outputs/two/agreement.json: is of another package than outputs/two/package: their golden prob")


def test_a_rehearsal_of_another_build_or_of_another_package_is_refused(pushable):
    again = "run `python -m kaggle_kernels rehearse test --test FILE`"
    change_json(PACKAGE / "contract.json", recorded={})
    write_manifest(PACKAGE)
    assert find_problems(pushable) == [
        f"{REHEARSAL}: was with another package for tiny-two than that in outputs/two/package; {again}"
    ]
    pushable.write_text(WSDM.replace("600", "700"))
    build(pushable)
    assert find_problems(pushable) == [f"{REHEARSAL}: is of another build of the kernel; {again}"]


def test_a_secret_a_home_path_and_a_row_of_the_pairs_are_refused(pushable, capsys):
    row = pl.read_parquet(tiny.pairs_parquet(PAIRS, 40)).filter(pl.col("language") == "German").row(0, named=True)
    change_json(PACKAGE / "config.json", note=f"hf_{'7a' * 20}", name_or_path="/home/someone/model")
    change_json(PACKAGE / "contract.json", recorded={"example": f"{row['prompt'][0]} {row['response_a'][0]}"})
    write_manifest(PACKAGE)
    make_pushable(pushable, {"tiny-two": PACKAGE})
    token, home, rows = find_problems(pushable)
    assert "config.json: line 1: looks like a secret" in token
    assert "config.json: line 1: looks like the path of a home folder" in home
    assert f"contract.json: holds texts of 1 of the pairs in data/pairs.parquet (id {row['id']})" in rows
    PAIRS.unlink()
    assert find_problems(pushable) == [token, home]
    assert capsys.readouterr().out.startswith("warning: data/pairs.parquet: not on this machine, so that its rows were not")
