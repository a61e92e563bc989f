"""A spec with one wrong value is one clear line that names the file, the key and the fix."""

import pytest
import yaml

from kaggle_kernels.build.spec import all_specs, find_spec, read_spec, settings_of
from kaggle_kernels.runtime.settings import TimeLimit
from preprocess.core.errors import UserError
from tests.kaggle_kernels.packages import settings_for

GOOD = {
    "title": "Pairwise Test",
    "competition": "wsdm",
    "packages": [
        {"run": "one", "dataset": "dataset-one", "weight": 0.75},
        {"run": "two", "dataset": "dataset-two", "weight": 0.25},
    ],
    "clock_seconds": 600,
}


def read(tmp_path, **changes):
    values = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    (tmp_path / "spec.yml").write_text(yaml.safe_dump(values))
    return read_spec(tmp_path / "spec.yml")


def package(**changes):
    return [{"run": "one", "dataset": "dataset-one", **changes}]


def test_the_projects_specs_are_valid_and_no_two_share_a_kernel():
    slugs = [read_spec(path).slug for path in all_specs()]
    assert len(set(slugs)) == len(slugs) >= 13
    assert all(slug.startswith("pairwise-") for slug in slugs)


def test_what_follows_from_a_mistake_is_not_a_second_problem(tmp_path):
    with pytest.raises(UserError) as refusal:
        read(tmp_path, packages=package(datset="x"), title=None, titel="Pairwise Test")
    assert str(refusal.value) == (
        f"{tmp_path}/spec.yml: packages.0.datset: unknown key; did you mean dataset?; titel: unknown key; did you mean title?"
    )


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"zebra": 1}, "zebra: unknown key; remove it"),
        ({"competition": "duel"}, "competition: expected wsdm or lmsys, found 'duel'"),
        ({"title": None}, "title: missing; add it: the kernel's title on Kaggle"),
        ({"packages": package(weight=0.5)}, "packages: the weights sum to 0.5, expected 1"),
        ({"packages": [*package(weight=0.5)] * 2}, "packages: two packages have the same run"),
        ({"packages": package(dataset="Upper_case")}, "packages.0.dataset: expected lower-case letters and digits, with"),
        ({"packages": package(run="")}, "packages.0.run: expected a run's name, as in outputs/NAME, found ''"),
        ({"packages": package(weight="0.5")}, "packages.0.weight: expected a number, found '0.5' (YAML reads that as text"),
        ({"wheels": "dataset-one"}, "wheels: found dataset-one, which is the dataset of a package; name the one with"),
        ({"clock_seconds": 0}, "clock_seconds: expected seconds above 0 and up to 43200, found 0"),
        ({"clock_seconds": {None: 50_000}}, "clock_seconds: expected seconds above 0 and up to 43200, found 50000"),
        (
            {"clock_seconds": {"12k": 60, None: 90}},
            "clock_seconds: expected a number of rows, or null for any more, found '12k'",
        ),
        ({"clock_seconds": {12_000: 60}}, "clock_seconds: a test file may have more rows than any limit here is for; add null"),
        ({"title": "!!!!! ab"}, "title: Kaggle would make the slug 'ab' of it, which needs 5 characters or more"),
    ],
)
def test_a_wrong_value_is_one_line_with_its_key(tmp_path, changes, message):
    with pytest.raises(UserError) as refusal:
        read(tmp_path, **changes)
    assert str(refusal.value).startswith(f"{tmp_path}/spec.yml: {message}")
    assert "\n" not in str(refusal.value)


def test_an_unknown_spec_names_those_there_are():
    with pytest.raises(UserError, match="nothing: no such spec; there are .*demo"):
        find_spec("nothing")


def test_settings_hold_what_the_spec_says(tmp_path):
    packages = [settings_for("one", "dataset-one", 0.75), settings_for("two", "dataset-two", 0.25)]
    settings = settings_of("spec", read(tmp_path, orders="as_given", budget_tokens=1024), packages)
    assert (settings.orders, settings.budget_tokens) == (("as_given",), 1024)
    assert settings.time_limits == (TimeLimit(None, 600),)
    assert settings.packages == tuple(packages)


@pytest.mark.parametrize(
    "changes, seconds",
    [
        ({"clock_seconds": None}, [17_100, 17_100, 43_200]),
        ({"clock_seconds": None, "competition": "lmsys"}, [32_400, 32_400, 32_400]),
        ({"clock_seconds": {None: 900, 12_000: 600, 100: 60}}, [60, 600, 900]),
    ],
)
def test_the_time_limit_goes_by_rows_as_the_competition_or_the_spec_says(tmp_path, changes, seconds):
    spec = read(tmp_path, **changes)
    assert [spec.time_limit(rows) for rows in (100, 12_000, 12_001)] == seconds
