"""Editors complete and check recipes and specs by JSON Schemas, which are written from the models and committed."""

import json

import jsonschema
import pytest
import yaml

from kaggle_kernels.build import json_schema as spec_side
from recipes.pairwise.config import json_schema as recipe_side
from tests.conftest import ROOT

SPECS = sorted((ROOT / "kaggle_kernels/specs").glob("*.yml"))
RECIPE_SCHEMA = json.loads((ROOT / "recipes/recipe.schema.json").read_text())
SPEC_SCHEMA = json.loads((ROOT / "kaggle_kernels/spec.schema.json").read_text())


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_names_its_schema_and_satisfies_it(path):
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=../spec.schema.json"
    jsonschema.Draft7Validator(SPEC_SCHEMA).validate(yaml.safe_load(path.read_text()))


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
