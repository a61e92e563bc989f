"""Recipes are checked strictly, without torch, and every problem is named with its fix."""

import subprocess
import sys

import pytest
import yaml
from click.testing import CliRunner

from preprocess.core.errors import UserError
from recipes.pairwise.__main__ import main
from recipes.pairwise.config.axolotl_keys import REFUSED, schema
from recipes.pairwise.config.schema import read_recipe, recipe_problems
from recipes.pairwise.config.templates import named_template
from tests.conftest import ROOT

GOOD = {
    "base_model": "some/model",
    "plugins": ["recipes.pairwise.plugin.PairwisePlugin"],
    "pairwise": {"template": "gemma", "budget_tokens": 256, "package": {"slug": "some-model"}},
}
SECRET = "0123456789abcdef"
LORA = {"adapter": "lora", "lora_r": 8, "lora_target_modules": ["q_proj", "v_proj"]}


def with_block(**changes) -> dict:
    return GOOD | {"pairwise": GOOD["pairwise"] | changes}


def test_a_good_recipe_has_no_problem():
    for block in ({}, {"distill": {"teachers": ["a", "b"], "weight": 1}}, {"distill": {"teachers": {"a": 2, "b": 0.5}}}):
        assert recipe_problems(with_block(**block)) == []
    layers_of_other_models = ["qkv_proj", "out_proj", "gate_up_proj", "c_proj"]
    assert recipe_problems(GOOD | LORA | {"lora_target_modules": layers_of_other_models}) == []


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (with_block(budget_token=1), "pairwise.budget_token: unknown key; did you mean budget_tokens?"),
        (with_block(fold="first"), "pairwise.fold: expected a fold's number or all, found 'first'"),
        (with_block(fold=True), "pairwise.fold: expected a fold's number or all, found True"),
        (with_block(budget_tokens="2048"), "pairwise.budget_tokens: expected a whole number, found '2048' (YAML reads that as"),
        (with_block(template={"start": "", "turn": "{prompt}"}), "pairwise.template.end: missing"),
        (
            with_block(template={"start": "", "turn": "{promt}{response_a}{response_b}", "end": ""}),
            "pairwise.template.turn: expected {prompt}, {response_a}, {response_b}, each once, found '{promt}",
        ),
        (with_block(template="gema"), "pairwise.template: expected one of gemma, llama3, chatml, phi4, bert, or start, turn"),
        (with_block(verdicts=["model_a", "tie"]), "pairwise.verdicts: expected model_a and model_b, with or without tie"),
        (with_block(package={}), "pairwise.package.slug: missing; add it: the Kaggle dataset's slug"),
        (with_block(package={"slug": "Some_Model"}), "pairwise.package.slug: expected lower-case letters and digits, with"),
        (
            with_block(tokens_per_micro_batch=8192) | {"group_by_length": True},
            "group_by_length: pairwise.tokens_per_micro_batch decides which rows share a batch; remove one",
        ),
        (with_block(hardware={"gpus": 0, "gib": 80}), "pairwise.hardware.gpus: expected a number above 0, found 0"),
        (with_block(hardware={"gpu": 8, "gpus": 8, "gib": 80}), "pairwise.hardware.gpu: unknown key; did you mean gpus?"),
        (with_block(pairs_per_step=64) | {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps: pairwise.pairs"),
        (with_block(softcap=True) | {"attn_implementation": "sdpa"}, "attn_implementation: sdpa ignores the soft cap"),
        (with_block(padding_free=True) | {"attn_implementation": "eager"}, "attn_implementation: with eager, the sequences"),
        (
            with_block(padding_free=True, softcap=True),
            "pairwise.padding_free: with pairwise.softcap it needs attn_implementation: flash_attention_2",
        ),
        (with_block(padding_free=True, r_drop=1.0), "pairwise.padding_free: R-Drop repeats each row of a batch"),
        (
            with_block(head="reward", verdicts=["model_a", "tie", "model_b"]),
            "pairwise.verdicts: a reward model cannot answer tie",
        ),
        (with_block(head="reward", orders="both"), "pairwise.orders: a reward model reads each response alone"),
        (
            with_block(head="label_tokens", template="bert"),
            "pairwise.template: bert is for encoders, which predict no next token",
        ),
        (with_block(ema_decay=0.9) | {"deepspeed": "zero2.json"}, "pairwise.ema_decay: with deepspeed no process holds all"),
        (with_block(ema_decay=0.9) | {"load_best_model_at_end": True}, "pairwise.ema_decay: the average would replace the"),
        (with_block(distill={}), "pairwise.distill.teachers: missing"),
        (with_block(distill={"teachers": ["a", "a"]}), "pairwise.distill.teachers: a teacher is named twice"),
        (with_block(distill={"teachers": []}), "pairwise.distill.teachers: expected at least one entry, found "),
        (with_block(distill={"teachers": ["a"], "weight": 2}), "pairwise.distill.weight: "),
        (with_block(distill={"teachers": ["a"], "temprature": 2}), "pairwise.distill.temprature: unknown key; did you mean"),
        (with_block(distill={"teachers": ["a"]}, train=False), "pairwise.distill: with train: false nothing is trained"),
        (with_block(train=False) | {"adapter": "lora"}, "adapter: with pairwise.train: false nothing is trained"),
        (
            with_block(package={"slug": "some-model", "adapter": "best"}) | LORA,
            "pairwise.package.adapter: best needs quantize: nf4, found quantize: none",
        ),
        (
            with_block(package={"slug": "some-model", "quantize": "nf4", "adapter": "best"}),
            "pairwise.package.adapter: best needs a run with adapter: lora or qlora",
        ),
        (
            with_block(head="label_tokens") | {"bnb_config_kwargs": {"llm_int8_skip_modules": ["score"]}},
            "bnb_config_kwargs.llm_int8_skip_modules: this list replaces the default one, so that the head "
            "would be quantised; add lm_head",
        ),
    ],
)
def test_a_mistake_in_the_block_is_one_sentence_that_names_the_key(values, problem):
    [only] = recipe_problems(values)
    assert only.startswith(problem)


@pytest.mark.parametrize("missing", ["base_model", "plugins", "pairwise"])
def test_a_recipe_cannot_do_without_its_three_keys(missing):
    [only] = recipe_problems({key: value for key, value in GOOD.items() if key != missing})
    assert only.startswith(f"{missing}: ")


# Merged as PEFT merges it (tests/postprocess/weights/test_merge.py), or without effect on a merge.
MERGED_KEYS = {
    "lora_alpha", "lora_alpha_pattern", "lora_dropout", "lora_mlp_kernel", "lora_model_dir", "lora_modules_to_save",
    "lora_o_kernel", "lora_on_cpu", "lora_qkv_kernel", "lora_r", "lora_rank_pattern", "lora_target_modules",
    "peft_autocast_adapter_dtype", "peft_ensure_weight_tying",
    "peft_init_lora_weights", "peft_layers_pattern", "peft_layers_to_transform", "peft_use_dora", "peft_use_rslora",
}  # fmt: skip


def test_every_key_of_lora_is_merged_or_refused():
    keys = {key for key in schema()["properties"] if key.startswith(("lora_", "peft"))}
    assert keys - REFUSED.keys() == MERGED_KEYS


@pytest.mark.parametrize(
    "key",
    ["dataloader_drop_last", "lora_target_linear", "peft", "peft_layer_replication", "relora", "reward_model", "rl",
     "sample_packing", "trust_remote_code"],
)  # fmt: skip
def test_what_would_go_wrong_later_is_refused_and_may_be_spelled_out_as_off(key):
    [only] = recipe_problems(GOOD | {key: True})
    assert only.startswith(f"{key}: refused, ")
    assert recipe_problems(GOOD | LORA | {key: False}) == []


def test_a_plugin_s_keys_are_accepted_where_the_recipe_names_the_plugin():
    liger = "axolotl.integrations.liger.LigerPlugin"
    [only] = recipe_problems(GOOD | {"liger_rope": True})
    assert only == f"liger_rope: needs a plugin of Axolotl's; add {liger} to plugins, or remove the key"
    for name in (liger, "axolotl.integrations.liger.plugin.LigerPlugin"):
        named = GOOD | {"plugins": [*GOOD["plugins"], name]}
        assert recipe_problems(named | {"liger_rope": True}) == []
        assert recipe_problems(named | {"liger_rope": 3}) == ["liger_rope: expected true or false, found 3"]
    spectrum = "axolotl.integrations.spectrum.SpectrumPlugin"
    assert len(recipe_problems(GOOD | {"plugins": [*GOOD["plugins"], spectrum], "liger_rope": True})) == 1
    others = ["axolotl.integrations.cut_cross_entropy.CutCrossEntropyPlugin", spectrum]
    keys = {"cut_cross_entropy": True, "spectrum_top_fraction": 0.5, "loraplus_lr_ratio": 16}
    assert recipe_problems(GOOD | {"plugins": [*GOOD["plugins"], *others]} | keys) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"lerning_rate": 1}, "lerning_rate: unknown key; did you mean learning_rate?"),
        ({True: "x"}, "True: unknown key (YAML reads on, yes, off and no as true and false); remove it, or put it in quotes"),
        ({"plugins": ["recipes.pairwise.PairwisePlugin"]}, "plugins: without recipes.pairwise.plugin.PairwisePlugin Axolotl"),
        ({"plugins": 3}, "plugins: expected a list, found 3"),
        ({"optimizer": "adamw_torch_fusd"}, "optimizer: expected one of adafactor, "),
        ({"bf16": "autoo"}, "bf16: expected one of auto, true, false, found 'autoo'; did you mean auto?"),
        ({"learning_rate": "1e-4"}, "learning_rate: expected a number above 0, found '1e-4' (YAML reads that as text: write "),
        ({"learning_rate": float("nan")}, "learning_rate: expected a number, found nan"),
        ({"micro_batch_size": 1.5}, "micro_batch_size: expected a whole number above 0, found 1.5"),
        ({"warmup_ratio": 5}, "warmup_ratio: expected a number of at least 0 and of at most 1, found 5"),
        (LORA | {"peft_init_lora_weights": "pissa"}, "peft_init_lora_weights: expected one of true, false, gaussian, "),
        (LORA | {"lora_target_modules": []}, "lora_target_modules: missing; list the layers that lora is to adapt"),
        ({"lora_r": 8}, "adapter: missing, so every weight is trained without regard to lora_r; set adapter: lora"),
        (LORA | {"adapter": "qlora"}, "load_in_4bit: adapter: qlora needs a base model in 4 bits; set load_in_4bit: true"),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_typ": "nf4"}}, "bnb_config_kwargs.bnb_4bit_quant_typ: unknown key; did you"),
        ({"bnb_config_kwargs": {"llm_int8_skip_modules": ["lm_head"]}}, "bnb_config_kwargs.llm_int8_skip_modules: this list"),
        ({"special_tokens": {"pad_tok": "<pad>"}}, "special_tokens.pad_tok: unknown key; did you mean pad_token?"),
        ({"num_labels": 3}, "num_labels: refused, it follows from pairwise.verdicts and pairwise.head; remove it"),
        ({"wandb_name": "first"}, "wandb_name: has no effect, since wandb_project is missing; add that, or remove the key"),
        ({"wandb_project": "a", "wandb_api_key": SECRET}, "wandb_api_key: unknown key"),
        ({"comet_api_key": SECRET}, "comet_api_key: refused, a file is no place for a secret"),
    ],
)
def test_a_key_of_axolotl_s_is_checked_before_axolotl_starts(changes, problem):
    [only] = recipe_problems(GOOD | changes)
    assert only.startswith(problem)
    assert SECRET not in only


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base_model: a/b\nbase_model: c/d\n", "not valid YAML: the key base_model stands in line 1 and again in line 2"),
        ("a: [", "not valid YAML: while parsing a flow"),
        ("[" * 3000, "not valid YAML: maximum recursion depth exceeded"),
        ("- a", "expected keys and values, found list"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_line(text, problem, tmp_path):
    (tmp_path / "bad.yml").write_text(text)
    with pytest.raises(UserError) as error:
        read_recipe(tmp_path / "bad.yml")
    assert str(error.value).startswith(f"{tmp_path / 'bad.yml'}: {problem}")
    assert "\n" not in str(error.value)


def test_the_check_reads_the_deepspeed_file(tmp_path):
    (tmp_path / "bad.yml").write_text(yaml.safe_dump(GOOD | {"deepspeed": "recipes/deepspeed/zero9.json"}))
    done = CliRunner().invoke(main, [str(tmp_path / "bad.yml")])
    assert done.exit_code == 2
    assert "bad.yml: deepspeed: recipes/deepspeed/zero9.json: no such file; see recipes/deepspeed" in done.output


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
    assert str(third.run_folder) == "outputs/minilm_cls/fold-3"
    assert (third.pairwise.fold, third.pairwise.pairs) == (3, "elsewhere.parquet")
    monkeypatch.setenv("PAIRWISE_FOLD", "all")
    assert (str(read_recipe(recipe).run_folder), read_recipe(recipe).pairwise.fold) == ("outputs/minilm_cls", "all")
    monkeypatch.setenv("PAIRWISE_FOLD", "-1")
    with pytest.raises(UserError, match="PAIRWISE_FOLD=-1"):
        read_recipe(recipe)


def test_each_head_has_its_own_template():
    score, causal = (named_template("llama3", head, ("model_a", "model_b")) for head in ("score", "label_tokens"))
    assert score.end.startswith("Which response would a person prefer, A or B?<|eot_id|>")
    assert causal.end.startswith("Which response would a person prefer, A or B? Answer with A or B.<|eot_id|>")
    assert "with C if neither" in named_template("llama3", "label_tokens", ("model_a", "tie", "model_b")).end


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
