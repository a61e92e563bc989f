"""Editors complete and check recipes and specs: the JSON Schemas are those of the models, and every file names its own."""

import json
import subprocess
import sys

import jsonschema
import pytest
import yaml

from kaggle_kernels.build import json_schema as spec_side
from preprocess.core.errors import UserError
from recipes.pairwise.config import json_schema as recipe_side
from tests.conftest import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.yml"))
SPECS = sorted((ROOT / "kaggle_kernels/specs").glob("*.yml"))
RECIPE_SCHEMA = json.loads((ROOT / "recipes/recipe.schema.json").read_text())
SPEC_SCHEMA = json.loads((ROOT / "kaggle_kernels/spec.schema.json").read_text())
GOOD_RECIPE = {
    "base_model": "some/model",
    "plugins": ["recipes.pairwise.plugin.PairwisePlugin"],
    "pairwise": {"template": "gemma", "budget_tokens": 256, "package": {"slug": "some-model"}},
}
GOOD_SPEC = {
    "title": "Pairwise Test",
    "competition": "wsdm",
    "packages": [{"run": "one", "dataset": "dataset-one"}],
    "clock_seconds": 600,
}


def mistakes(values: dict, schema: dict) -> list[str]:
    """Where each mistake stands, as key.key: and what the validator says of it."""
    found = jsonschema.Draft7Validator(schema).iter_errors(values)
    return [f"{'.'.join(map(str, error.absolute_path))}: {error.message}" for error in found]


def keys_of(schema):
    """Every key of a block and of the blocks in it, with its schema."""
    for part in (schema, schema.get("items", {}), *schema.get("anyOf", ())):
        for key, value in part.get("properties", {}).items():
            yield key, value
            yield from keys_of(value)


def with_block(**changes) -> dict:
    return GOOD_RECIPE | {"pairwise": GOOD_RECIPE["pairwise"] | changes}


def test_the_files_are_found():
    assert {"demo", "gemma2_cls", "minilm_cls"} <= {path.stem for path in RECIPES} & {path.stem for path in SPECS}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_schema_and_satisfies_it(path):
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=recipe.schema.json"
    assert mistakes(yaml.safe_load(path.read_text()), RECIPE_SCHEMA) == []


@pytest.mark.parametrize("path", SPECS, ids=lambda path: path.stem)
def test_a_spec_names_its_schema_and_satisfies_it(path):
    assert path.read_text().splitlines()[0] == "# yaml-language-server: $schema=../spec.schema.json"
    assert mistakes(yaml.safe_load(path.read_text()), SPEC_SCHEMA) == []


@pytest.mark.parametrize(
    ("values", "mistake"),
    [
        (GOOD_RECIPE | {"lerning_rate": 1}, ": Additional properties are not allowed ('lerning_rate' was unexpected)"),
        (GOOD_RECIPE | {"learning_rate": "1e-4"}, "learning_rate: '1e-4' is not of type 'number'"),
        (GOOD_RECIPE | {"micro_batch_size": 0}, "micro_batch_size: 0 is less than or equal to the minimum of 0"),
        (GOOD_RECIPE | {"bf16": "yes"}, "bf16: 'yes' is not valid under any of the given schemas"),
        (GOOD_RECIPE | {"sample_packing": True}, "sample_packing: False was expected"),
        (GOOD_RECIPE | {"plugins": ["other"]}, "plugins: None of ['other'] are valid under the given schema"),
        ({key: GOOD_RECIPE[key] for key in ("base_model", "plugins")}, ": 'pairwise' is a required property"),
        (with_block(budget_token=1), "pairwise: Additional properties are not allowed ('budget_token' was unexpected)"),
        (with_block(budget_tokens=63), "pairwise.budget_tokens: 63 is less than the minimum of 64"),
        (with_block(head="scor"), "pairwise.head: 'scor' is not one of ['score', 'label_tokens', 'reward']"),
        (with_block(fold="first"), "pairwise.fold: 'first' is not valid under any of the given schemas"),
        (with_block(fold=-1), "pairwise.fold: -1 is not valid under any of the given schemas"),
        (with_block(verdicts=["model_a"]), "pairwise.verdicts: ['model_a'] is too short"),
        (with_block(template="gema"), "pairwise.template: 'gema' is not valid under any of the given schemas"),
        (with_block(package={"slug": "some-model", "quantise": "nf4"}), "pairwise.package: Additional properties"),
    ],
)
def test_a_mistake_in_a_recipe_is_underlined(values, mistake):
    found = mistakes(values, RECIPE_SCHEMA)
    assert len(found) == 1
    assert found[0].startswith(mistake)


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"clock": 60}, ": Additional properties are not allowed ('clock' was unexpected)"),
        ({"clock_seconds": 50000}, "clock_seconds: 50000 is greater than the maximum of 43200"),
        ({"competition": "wdsm"}, "competition: 'wdsm' is not one of ['wsdm', 'lmsys']"),
        ({"packages": [{"run": "one", "dataset": "dataset-one", "wieght": 1}]}, "packages.0: Additional properties"),
    ],
)
def test_a_mistake_in_a_spec_is_underlined(changes, mistake):
    found = mistakes(GOOD_SPEC | changes, SPEC_SCHEMA)
    assert len(found) == 1
    assert found[0].startswith(mistake)


def test_what_is_right_is_not_underlined():
    assert mistakes(GOOD_RECIPE, RECIPE_SCHEMA) == mistakes(GOOD_SPEC, SPEC_SCHEMA) == []
    spelled_out = {"start": "<s>", "turn": "{prompt}{response_a}{response_b}", "end": ""}
    assert mistakes(with_block(fold="all", verdicts=["tie", "model_a", "model_b"], template=spelled_out), RECIPE_SCHEMA) == []
    assert mistakes(GOOD_RECIPE | {"bf16": "auto", "sample_packing": False, "lora_dropout": 0.05}, RECIPE_SCHEMA) == []


def test_the_schemas_are_valid_draft_7_and_describe_every_key_of_ours():
    for schema in (RECIPE_SCHEMA, SPEC_SCHEMA):
        assert schema["$schema"] == "http://json-schema.org/draft-07/schema#"
        jsonschema.Draft7Validator.check_schema(schema)
    for block in (RECIPE_SCHEMA["properties"]["pairwise"], SPEC_SCHEMA):
        assert sorted(key for key, value in keys_of(block) if not value.get("description")) == []
    assert RECIPE_SCHEMA["properties"]["lora_r"]["type"] == "integer"
    described = [key for key, value in RECIPE_SCHEMA["properties"].items() if "description" in value]
    assert len(described) > 300


def test_a_deprecated_key_says_what_to_write_instead():
    assert "attn_implementation: flash_attention_2" in RECIPE_SCHEMA["properties"]["flash_attention"]["deprecationMessage"]


def test_the_recipe_schema_is_that_of_the_installed_axolotl_and_of_our_block():
    whole = recipe_side.text_of(recipe_side.recipe_schema(recipe_side.axolotl_schema()))
    assert (ROOT / "recipes/recipe.schema.json").read_text() == whole, f"run `{recipe_side.COMMAND}`"


def test_the_spec_schema_is_that_of_the_spec():
    whole = recipe_side.text_of(spec_side.spec_schema())
    assert (ROOT / "kaggle_kernels/spec.schema.json").read_text() == whole, f"run `{spec_side.COMMAND}`"


@pytest.mark.parametrize("module", [recipe_side, spec_side], ids=["recipe", "spec"])
def test_the_check_ends_with_2_and_says_what_to_run(module, tmp_path, monkeypatch, capsys):
    constant = "RECIPE_SCHEMA" if module is recipe_side else "SPEC_SCHEMA"
    stale = json.loads(getattr(module, constant).read_text()) | {"title": "Another"}
    (tmp_path / "stale.json").write_text(json.dumps(stale))
    monkeypatch.setattr(module, constant, tmp_path / "stale.json")
    with pytest.raises(SystemExit) as end:
        module.main.callback(check=True)
    assert end.value.code == 2
    assert capsys.readouterr().err == f"error: stale.json: not up to date; run `{module.COMMAND}`, and commit what it wrote\n"


def test_the_check_notices_another_axolotl(tmp_path, monkeypatch):
    old = RECIPE_SCHEMA | {"$comment": RECIPE_SCHEMA["$comment"].replace("0.19.0", "0.18.0")}
    (tmp_path / "old.json").write_text(json.dumps(old))
    monkeypatch.setattr(recipe_side, "RECIPE_SCHEMA", tmp_path / "old.json")
    with pytest.raises(UserError, match=r"old.json: not of Axolotl 0\.19\.0; run `python -m"):
        recipe_side.committed_axolotl_schema()


def test_the_check_needs_no_axolotl():
    code = (
        "import sys; sys.argv = ['check', '--check']\n"
        "from recipes.pairwise.config.json_schema import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'axolotl'} & set(sys.modules)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "recipe.schema.json: up to date\n", "")
