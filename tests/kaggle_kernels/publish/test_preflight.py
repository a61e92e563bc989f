"""What push checks before the first byte goes up: each fault is one line with file, finding and fix, and all come at once."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import polars as pl
import pytest

from kaggle_kernels.build.bundle import build
from kaggle_kernels.build.packages import build_of
from kaggle_kernels.build.spec import all_specs, read_spec
from kaggle_kernels.publish.preflight import check_licences, check_title, preflight
from postprocess.wheels.build import LICENCES as LICENCES_OF_WHEELS
from preprocess.core.files import read_yaml
from tests import tiny
from tests.conftest import ROOT
from tests.kaggle_kernels.packages import WSDM, change_json, flip_byte, make_pushable, write_manifest, write_recipe
from tests.kaggle_kernels.publish.pushes import pretend_wheels

PACKAGE = Path("outputs/two/package")
REHEARSAL = Path("outputs/test/rehearsal/rehearsal.json")
METADATA = PACKAGE / "dataset-metadata.json"
PAIRS = Path("data/pairs.parquet")


@pytest.fixture(autouse=True)
def pairs(tmp_path, monkeypatch):
    """The pairs are on this machine; nothing above is a repository."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (tmp_path / "data").mkdir()
    tiny.pairs_parquet(tmp_path / PAIRS, 3)


def errors_of(spec_path: Path, owner: str = "me") -> list[str]:
    return preflight(spec_path, owner).errors


def test_what_is_ready_passes_every_check(pushable):
    found = preflight(pushable, "me")
    assert found.errors == []
    assert len(found.checks) == 10
    assert {line.rsplit(": ", 1)[1] for line in found.checks} == {"ok"}


def test_all_problems_are_told_at_once(pushable):
    pushable.write_text(WSDM.replace("600", "700"))
    flip_byte(PACKAGE / "tokenizer.json")
    change_json(METADATA, title="two", licenses=[])
    (PACKAGE / "train.parquet").write_text("rows")
    Path("outputs/kernels/test/kaggle.json").write_text("{}")
    change_json(PACKAGE.parent / "agreement.json", agrees=False)
    REHEARSAL.unlink()
    errors = errors_of(pushable, "INSERT_OWNER")
    starts = (
        "owner: 'INSERT_OWNER' is no user name of Kaggle; ",
        "outputs/kernels/test/kernel.py: not up to date; run `python -m kaggle_kernels build test`",
        "outputs/kernels/test/kaggle.json: no file of a kernel; remove it",
        f"{PACKAGE}/tokenizer.json: changed since it was made",
        f"{PACKAGE}/train.parquet: no file that such a folder is defined to have; remove it",
        f"{METADATA}: title: 'two', Kaggle takes 6 to 50 characters; change package.slug",
        f"{METADATA}: licenses: found [], Kaggle takes exactly one of its own names: apache-2.0,",
        "outputs/two/agreement.json: the package does not agree with the trained model; run `python -m postprocess`",
        f"{REHEARSAL}: missing: no rehearsal passed; run `python -m kaggle_kernels rehearse test",
    )
    assert [error[: len(start)] for error, start in zip(errors, starts, strict=True)] == list(starts)
    assert all("\n" not in error for error in errors)


def test_a_spec_that_cannot_be_read_is_one_error(pushable):
    pushable.write_text(WSDM.replace("600", "-1"))
    [error] = errors_of(pushable)
    assert error.startswith(f"{pushable}: clock_seconds: ")


def test_an_unknown_owner_is_left_to_who_asked_for_it(pushable):
    found = preflight(pushable, "")
    assert found.errors == []
    assert not [line for line in found.checks if line.startswith("owner")]


def test_titles_of_specs_and_licences_of_recipes_and_wheels_are_kaggles(pushable):
    for path in all_specs():
        assert check_title(path, read_spec(path)) == []
    recipes = [read_yaml(path) for path in sorted((ROOT / "recipes").glob("*.yml"))]
    used = {recipe["pairwise"]["package"].get("licence", "apache-2.0") for recipe in recipes} | set(LICENCES_OF_WHEELS.values())
    assert {"apache-2.0", "other", "MIT"} <= used
    for name in sorted(used):
        assert check_licences(METADATA, [{"name": name}]) == []
    pushable.write_text(WSDM.replace("Pairwise Test", "Pairwise 1,000 Tests"))
    assert "title: 'Pairwise 1,000 Tests' is 'pairwise-1000-tests' on Kaggle, not 'pairwise-1-000" in errors_of(pushable)[0]


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"id": "me/tiny-too"}, "id: found the dataset 'tiny-too', the spec says 'tiny-two'; package again, or mend the spec"),
        ({"licenses": [{"name": "other"}] * 2}, "licenses: found ['other', 'other'], Kaggle takes exactly one of its own"),
    ],
)
def test_metadata_that_kaggle_would_not_take_is_told_with_file_and_key(pushable, changes, told):
    change_json(METADATA, id="me/tiny-two")  # an owner that was filled in is no change
    assert errors_of(pushable) == []
    change_json(METADATA, **changes)
    assert [error for error in errors_of(pushable) if error.startswith(f"{METADATA}: {told}")]


def test_an_absent_package_is_one_error(pushable):
    shutil.rmtree(PACKAGE)
    assert errors_of(pushable) == ["outputs/two/package: no package; run `python -m postprocess recipes/two.yml`"]


def test_a_package_that_is_not_the_recipes_and_absent_wheels_are_told(pushable):
    pushable.write_text(WSDM + "wheels: pairwise-wheels\n")
    build(pushable)
    [wheels, _] = errors_of(pushable)
    assert wheels.startswith("outputs/wheels: no wheels, and the spec names the dataset pairwise-wheels; run")
    assert "take `wheels` out of the spec, which needs none" in wheels
    write_recipe(Path.cwd(), "two", "tiny-two", quantize="int8")
    build(pushable)
    package, wheels, rehearsal = errors_of(pushable)
    assert package.startswith("outputs/two/package/manifest.json: quantize: found none, recipes/two.yml says int8")
    assert wheels.endswith("run `python -m postprocess.wheels`")
    assert "is of another build of the kernel" in rehearsal


def test_the_wheels_are_checked_as_a_package_is(pushable):
    folder = pretend_wheels("pairwise-wheels")
    pushable.write_text(WSDM + "wheels: pairwise-wheels\n")
    build(pushable)
    REHEARSAL.write_text(json.dumps({"build": build_of(Path("outputs/kernels/test"), {"tiny-two": PACKAGE})}))
    assert errors_of(pushable) == []
    [wheel] = folder.glob("*.whl")
    flip_byte(wheel)
    change_json(folder / "dataset-metadata.json", id="me/other-wheels")
    assert [error.split(": ")[0] for error in errors_of(pushable)] == [str(wheel), "outputs/wheels/dataset-metadata.json"]


def test_an_agreement_of_another_package_or_none_is_refused(pushable):
    golden = json.loads((PACKAGE / "manifest.json").read_text())["golden"]
    golden[0]["probabilities"][0] += 0.25
    change_json(PACKAGE.parent / "agreement.json", golden=golden)
    [error] = errors_of(pushable)
    assert error.startswith("outputs/two/agreement.json: is of another package than outputs/two/package, their golden prob")
    (PACKAGE.parent / "agreement.json").unlink()
    [error] = errors_of(pushable)
    assert error.startswith("outputs/two/agreement.json: missing, so that it is unknown whether the package")


def test_a_rehearsal_of_another_build_or_of_another_package_is_refused(pushable):
    again = "run `python -m kaggle_kernels rehearse test --test FILE`"
    change_json(PACKAGE / "contract.json", recorded={})
    write_manifest(PACKAGE)
    assert errors_of(pushable) == [f"{REHEARSAL}: was with another package tiny-two than outputs/two/package; {again}"]
    pushable.write_text(WSDM.replace("600", "700"))
    build(pushable)
    assert errors_of(pushable) == [f"{REHEARSAL}: is of another build of the kernel; {again}"]


def test_a_secret_a_home_path_and_a_row_of_the_pairs_are_refused(pushable):
    row = pl.read_parquet(tiny.pairs_parquet(PAIRS, 40)).filter(pl.col("language") == "German").row(0, named=True)
    change_json(PACKAGE / "config.json", note=f"hf_{'7a' * 20}", name_or_path="/home/someone/model")
    change_json(PACKAGE / "contract.json", recorded={"example": f"{row['prompt'][0]} {row['response_a'][0]}"})
    write_manifest(PACKAGE)
    make_pushable(pushable, {"tiny-two": PACKAGE})
    token, home, rows = errors_of(pushable)
    assert "config.json: line 1: looks like a secret" in token
    assert "config.json: line 1: looks like the path of a home folder" in home
    assert f"contract.json: holds texts of 1 row of data/pairs.parquet (id {row['id']})" in rows


def test_a_dirty_tree_no_repository_and_absent_pairs_are_warned_of(pushable):
    assert preflight(pushable, "me").warnings == ["no git commit: nothing will tell which code made this push"]
    git = ["git", "-c", "user.name=Test", "-c", "user.email=test@example.com"]
    for command in (["init", "-q"], ["add", "test.parquet"], ["commit", "-q", "-m", "one"]):
        subprocess.run([*git, *command], check=True)
    assert preflight(pushable, "me").warnings == []
    Path("test.parquet").write_text("changed")
    PAIRS.unlink()
    dirty, absent = preflight(pushable, "me").warnings
    assert re.fullmatch(r"the git tree is dirty: commit first, or .* other than [0-9a-f]{12}", dirty)
    assert absent == "data/pairs.parquet: not on this machine, so that its rows were not looked for in what goes up"


def test_sizes_over_kaggles_limits_are_told_before_the_upload(pushable, monkeypatch):
    monkeypatch.setattr("kaggle_kernels.publish.preflight.DATASET_BYTES", 1000)
    [error] = errors_of(pushable)
    assert error.startswith("outputs/two/package: 0.0 GB, Kaggle takes 0 in a dataset; package fewer bits")
