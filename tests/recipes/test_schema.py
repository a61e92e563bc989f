"""Recipes are checked strictly, without torch, and every problem is named with its fix."""

import subprocess
import sys

import pytest
import yaml

from preprocess.errors import UserError
from recipes.pairwise.schema import read_recipe, recipe_problems
from recipes.pairwise.templates import NAMES, named_template
from tests.conftest import ROOT

GOOD = {
    "base_model": "some/model",
    "plugins": ["recipes.pairwise.plugin.PairwisePlugin"],
    "pairwise": {"template": "gemma", "budget_tokens": 256, "package": {"slug": "some-model"}},
}


def with_block(**changes) -> dict:
    return GOOD | {"pairwise": GOOD["pairwise"] | changes}


def test_a_good_recipe_has_no_problem():
    assert recipe_problems(GOOD) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (GOOD | {"lerning_rate": 1}, "lerning_rate: unknown key; did you mean learning_rate?"),
        (with_block(budget_token=1), "pairwise.budget_token: unknown key; did you mean budget_tokens?"),
        (with_block(fold="first"), "pairwise.fold: expected a fold's number or all, found 'first'"),
        (with_block(template={"start": "", "turn": "{prompt}"}), "pairwise.template.end: missing"),
        (with_block(template=3), "pairwise.template: "),
        (with_block(verdicts=["model_a", "tie"]), "pairwise.verdicts: expected model_a and model_b, with or without tie"),
        (with_block(template="gema"), "pairwise.template: expected one of gemma, llama3, chatml, bert"),
        (with_block(truncation="both"), "pairwise.truncation: Input should be 'left', 'right' or 'middle', found 'both'"),
        (with_block(package={"slug": "some-model", "quantise": "nf4"}), "pairwise.package.quantise: unknown key; did you mean"),
        ({key: value for key, value in GOOD.items() if key != "pairwise"}, "pairwise: missing"),
        (GOOD | {"base_model": None}, "base_model: expected a model or a folder, found None"),
        (GOOD | {"plugins": ["recipes.pairwise.PairwisePlugin"]}, "plugins: without recipes.pairwise.plugin.PairwisePlugin"),
        (GOOD | {"plugins": 3}, "plugins: without recipes.pairwise.plugin.PairwisePlugin"),
        (GOOD | {"output_dir": 5}, "output_dir: expected a folder, found 5"),
        (GOOD | {"bnb_config_kwargs": {"llm_int8_skip_modules": 3}}, "bnb_config_kwargs.llm_int8_skip_modules: it replaces"),
        (GOOD | {"micro_batch_size": "four"}, "micro_batch_size: expected a number above 0, found 'four'"),
        (with_block(softcap=True) | {"attn_implementation": "sdpa"}, "attn_implementation: sdpa drops the soft cap"),
        (with_block(head="reward", verdicts=["model_a", "tie", "model_b"]), "pairwise.verdicts: a reward model tells no ties"),
        (with_block(head="reward", orders="both"), "pairwise.orders: a reward model sees each answer alone"),
        (with_block(head="label_tokens", template="bert"), "pairwise.template: bert has no answer to predict"),
        (with_block(head="label_tokens", label_smoothing=0.1), "pairwise.label_smoothing: Axolotl's causal trainer has none"),
        (with_block(train=False) | {"adapter": "lora"}, "adapter: nothing is trained with pairwise.train: false"),
        (
            with_block(package={"slug": "some-model", "adapter": "best"}) | {"adapter": "qlora"},
            "pairwise.package.adapter: best needs quantize: nf4, found quantize: none",
        ),
        (
            with_block(package={"slug": "some-model", "quantize": "nf4", "adapter": "best"}),
            "pairwise.package.adapter: the run has no adapter",
        ),
        (GOOD | {"reward_model": True}, "reward_model: refused"),
        (GOOD | {"trust_remote_code": True}, "trust_remote_code: refused"),
        (GOOD | {"sample_packing": True}, "sample_packing: refused"),
        (GOOD | {"dataloader_drop_last": True}, "dataloader_drop_last: refused, it drops validation rows too"),
        (GOOD | {"lora_target_linear": True}, "lora_target_linear: refused"),
        (
            GOOD | {"bnb_config_kwargs": {"llm_int8_skip_modules": ["lm_head"]}},
            "bnb_config_kwargs.llm_int8_skip_modules: it replaces the default list, so the head would be quantised; add sc",
        ),
        (
            with_block(head="label_tokens") | {"bnb_config_kwargs": {"llm_int8_skip_modules": ["score"]}},
            "bnb_config_kwargs.llm_int8_skip_modules: it replaces the default list, so the head would be quantised; add lm",
        ),
    ],
)
def test_each_mistake_is_one_sentence_that_names_the_key(values, problem):
    found = recipe_problems(values)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_all_problems_come_at_once(tmp_path):
    recipe = tmp_path / "bad.yml"
    recipe.write_text(yaml.safe_dump(with_block(head="scor") | {"lerning_rate": 1, "sample_packing": True}))
    with pytest.raises(UserError) as error:
        read_recipe(recipe)
    assert all(word in str(error.value) for word in ("bad.yml", "pairwise.head", "lerning_rate", "sample_packing"))


def test_a_numbered_fold_of_the_environment_writes_below_the_run(monkeypatch):
    recipe = ROOT / "recipes/minilm_cls.yml"
    assert str(read_recipe(recipe).run_folder) == "outputs/minilm_cls"
    monkeypatch.setenv("PAIRWISE_FOLD", "3")
    monkeypatch.setenv("PAIRWISE_PAIRS", "elsewhere.parquet")
    third = read_recipe(recipe)
    assert (str(third.run_folder), third.pairwise.fold, third.pairwise.pairs) == (
        "outputs/minilm_cls/fold-3",
        3,
        "elsewhere.parquet",
    )
    monkeypatch.setenv("PAIRWISE_FOLD", "all")
    assert (str(read_recipe(recipe).run_folder), read_recipe(recipe).pairwise.fold) == ("outputs/minilm_cls", "all")
    monkeypatch.setenv("PAIRWISE_FOLD", "-1")
    with pytest.raises(UserError, match="PAIRWISE_FOLD=-1"):
        read_recipe(recipe)


def test_every_template_holds_its_places_once():
    for template in [named_template(name, "score", ("model_a", "model_b")) for name in NAMES]:
        assert [template.turn.count(place) for place in ("{prompt}", "{response_a}", "{response_b}")] == [1, 1, 1]


def test_each_head_has_its_own_template():
    score, causal = (named_template("llama3", head, ("model_a", "model_b")) for head in ("score", "label_tokens"))
    assert score.end.startswith("Which response would a person prefer, A or B?<|eot_id|>")
    assert causal.end.startswith("Which response would a person prefer, A or B? Answer with A or B.<|eot_id|>")
    assert "with C if neither" in named_template("llama3", "label_tokens", ("model_a", "tie", "model_b")).end
    for name in NAMES:
        turn = named_template(name, "reward", ("model_a", "model_b")).turn
        assert [turn.count(place) for place in ("{prompt}", "{response}", "{response_a}")] == [1, 1, 0]


def test_the_check_needs_no_torch_and_ends_with_2():
    code = (
        "import sys; sys.argv = ['check', *sys.argv[1:]]\n"
        "from recipes.pairwise.__main__ import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'axolotl', 'transformers'} & set(sys.modules)"
    )
    good = subprocess.run([sys.executable, "-c", code, "recipes/demo.yml"], capture_output=True, text=True, cwd=ROOT)
    assert (good.returncode, good.stdout) == (0, "recipes/demo.yml: ok, outputs/demo/input/gemma2, writes outputs/demo\n")
    bad = subprocess.run([sys.executable, "-c", code, "recipes/none.yml"], capture_output=True, text=True, cwd=ROOT)
    assert (bad.returncode, bad.stderr) == (2, "error: recipes/none.yml: no such recipe\n")
