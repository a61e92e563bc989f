"""Editors complete and check recipes and specs by JSON Schemas, which are written from the models and committed."""

import json

import jsonschema
import pytest
import yaml

from kaggle_kernels.build import json_schema as spec_side
from recipes.pairwise.config import json_schema as recipe_side
from tests.conftest import ROOT
from tests.recipes.config.test_schema import GOOD, with_block

SPECS = sorted((ROOT / "kaggle_kernels/specs").glob("*.yml"))
RECIPE_SCHEMA = json.loads((ROOT / "recipes/recipe.schema.json").read_text())
SPEC_SCHEMA = json.loads((ROOT / "kaggle_kernels/spec.schema.json").read_text())
GOOD_SPEC = {
    "title": "Pairwise Test",
    "competition": "wsdm",
    "packages": [{"run": "one", "dataset": "dataset-one"}],
    "clock_seconds": 600,
}


def mistakes(values: dict, schema: dict) -> list[str]:
    """Where each mistake stands, as key.key: and what the validator says of it."""
    errors = jsonschema.Draft7Validator(schema).iter_errors(values)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in errors]


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_names_its_schema_and_satisfies_it(path):
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=../spec.schema.json"
    assert mistakes(yaml.safe_load(path.read_text()), SPEC_SCHEMA) == []


@pytest.mark.parametrize(
    ("values", "mistake"),
    [
        (GOOD | {"lerning_rate": 1}, ": Additional properties are not allowed ('lerning_rate' was unexpected)"),
        (GOOD | {"sample_packing": True}, "sample_packing: False was expected"),
        (with_block(budget_tokens=63), "pairwise.budget_tokens: 63 is less than the minimum of 64"),
        (with_block(package={"slug": "some-model", "quantise": "nf4"}), "pairwise.package: Additional properties"),
    ],
)
def test_a_mistake_in_a_recipe_is_underlined(values, mistake):
    [only] = mistakes(values, RECIPE_SCHEMA)
    assert only.startswith(mistake)


def test_a_mistake_in_a_spec_is_underlined():
    [unknown_key] = mistakes(GOOD_SPEC | {"clock": 60}, SPEC_SCHEMA)
    assert unknown_key.startswith(": Additional properties are not allowed ('clock' was unexpected)")
    [unknown_key] = mistakes(GOOD_SPEC | {"packages": [{"run": "one", "dataset": "dataset-one", "wieght": 1}]}, SPEC_SCHEMA)
    assert unknown_key.startswith("packages.0: Additional properties")
    [too_large] = mistakes(GOOD_SPEC | {"clock_seconds": 50000}, SPEC_SCHEMA)
    assert too_large == "clock_seconds: 50000 is not valid under any of the given schemas"


def test_what_is_right_is_not_underlined():
    spelled_out = {"start": "<s>", "turn": "{prompt}{response_a}{response_b}", "end": ""}
    right = with_block(fold="all", verdicts=["tie", "model_a", "model_b"], template=spelled_out)
    right |= {"bf16": "auto", "sample_packing": False, "lora_dropout": 0.05, "liger_rope": True}
    assert mistakes(right, RECIPE_SCHEMA) == mistakes(GOOD_SPEC, SPEC_SCHEMA) == []


def test_the_schemas_are_valid_draft_7_and_describe_every_key_of_ours():
    for schema, block in ((RECIPE_SCHEMA, RECIPE_SCHEMA["properties"]["pairwise"]), (SPEC_SCHEMA, SPEC_SCHEMA)):
        assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
        jsonschema.Draft7Validator.check_schema(schema)
        for model in (block, *schema["$defs"].values()):
            assert [key for key, part in model["properties"].items() if not part.get("description")] == []


@pytest.mark.parametrize(
    ("module", "constant"), [(recipe_side, "RECIPE_SCHEMA"), (spec_side, "SPEC_SCHEMA")], ids=["recipe", "spec"]
)
def test_the_committed_file_is_up_to_date_and_another_ends_the_check_with_2(module, constant, tmp_path, monkeypatch, capsys):
    module.main.callback(check=True)
    stale = json.loads(getattr(module, constant).read_text()) | {"title": "Another"}
    (tmp_path / "stale.json").write_text(json.dumps(stale))
    monkeypatch.setattr(module, constant, tmp_path / "stale.json")
    with pytest.raises(SystemExit) as end:
        module.main.callback(check=True)
    assert end.value.code == 2
    assert f"error: stale.json: not up to date; run `{module.COMMAND}`" in capsys.readouterr().err
