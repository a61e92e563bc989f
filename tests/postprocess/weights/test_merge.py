import copy
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.merge import _pieces, is_finite, merge
from preprocess.core.errors import UserError
from tests.bench.merge import make_inputs, measure
from tests.bench.processes import in_process
from tests.postprocess import runs

VARIANTS = [
    ("gemma2", {}),
    ("llama", {}),
    ("bert", {}),
    ("gemma2", {"use_rslora": True, "rank_pattern": {"q_proj": 4}}),
    ("llama", {"use_dora": True}),
    ("gemma2", {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2, "k": 2}, "alpha_pattern": {r".*\.v_proj": 3}}),
    ("llama", {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}),
    ("bert", {"bias": "all"}),
]


def load(folder, **options):
    return AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="sdpa", **options).eval()


def logits(model):
    ids = torch.tensor([[2, 17, 200, 33, 4, 900], [2, 5, 6, 0, 0, 0]])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=(ids != 0).long()).logits


@pytest.mark.parametrize(
    ("kind", "lora"), VARIANTS, ids=lambda value: value if isinstance(value, str) else "-".join(value) or "lora"
)
def test_the_merged_classifier_is_the_one_that_peft_merges(kind, lora, made, opened, tmp_path):
    run = made(kind, lora=lora)
    merge(opened(run), tmp_path / "merged", dtype=torch.float32)
    expected = copy.deepcopy(run.model).merge_and_unload()
    found = load_file(tmp_path / "merged" / "model.safetensors")
    tensors = expected.state_dict()
    assert set(found) == set(tensors)
    assert [name for name in tensors if not torch.equal(found[name], tensors[name])] == []
    assert (logits(load(tmp_path / "merged")) - logits(expected)).abs().max() < 1e-5
    untrained = load(run.base, num_labels=2, pad_token_id=0)
    assert (logits(untrained) - logits(expected)).abs().max() > 1e-2


@pytest.mark.parametrize(("kind", "lora"), [VARIANTS[0], VARIANTS[4], VARIANTS[6]], ids=["lora", "dora", "embedding"])
def test_in_pieces_of_some_rows_it_is_the_same(kind, lora, made, opened, tmp_path, monkeypatch):
    run = opened(made(kind, lora=lora))
    merge(run, tmp_path / "whole", dtype=torch.float32)
    monkeypatch.setattr("postprocess.weights.merge.PIECE_NUMBERS", 64 * 64)
    monkeypatch.setattr("postprocess.weights.lora_adapter.WHOLE_BYTES", 0)
    merge(run, tmp_path / "pieces", dtype=torch.float32)
    whole, pieces = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "pieces"))
    assert max((whole[name] - pieces[name]).abs().max() for name in whole) < 1e-7
    assert len(list(_pieces(whole["model.embed_tokens.weight"]))) == 16


@pytest.mark.parametrize(
    ("value", "expected"), [(1.0, True), (float("nan"), False), (float("inf"), False), (-float("inf"), False)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(value, expected, dtype):
    tensor = torch.zeros(1000, 7, dtype=dtype)
    tensor[613, 5] = value
    assert is_finite(tensor) is expected


def test_an_empty_tensor_and_whole_numbers_are_finite():
    assert is_finite(torch.zeros(0, 4)) and is_finite(torch.arange(5))


@pytest.mark.slow
def test_at_the_shapes_of_gemma_2_9b_the_anonymous_memory_stays_under_a_gigabyte_and_a_half(tmp_path):
    in_process(make_inputs, tmp_path, "9b")
    assert measure("ours", tmp_path).peak_bytes < 1.5e9
    shutil.rmtree(tmp_path / "base")


def test_a_weight_is_rounded_once_to_float16(made, opened, tmp_path):
    run = opened(made("gemma2"))
    merge(run, tmp_path / "exact", dtype=torch.float32)
    merge(run, tmp_path / "half")
    exact, half = (load_file(tmp_path / name / "model.safetensors") for name in ("exact", "half"))
    assert all(torch.equal(half[name], exact[name].to(torch.float16)) for name in exact)


def test_a_base_in_bfloat16_is_merged_in_float32(made, opened, tmp_path, copied):
    run = copied("llama")
    base = tmp_path / "base"
    base.mkdir()
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(run.base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors")
    (base / "config.json").write_bytes((run.base / "config.json").read_bytes())
    runs.set_base(run, base)
    merge(opened(run), tmp_path / "merged", dtype=torch.float32)
    name = "model.layers.0.self_attn.q_proj"
    adapter = load_file(run.folder / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    found = load_file(tmp_path / "merged" / "model.safetensors")[f"{name}.weight"]
    assert torch.equal(found, weights[f"{name}.weight"].float() + b @ a * 2)


def test_a_sharded_base_and_a_sharded_result_hold_the_same_tensors(made, opened, tmp_path, copied):
    run = copied("gemma2")
    load(run.base, num_labels=2).save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    merge(opened(run), tmp_path / "one")
    runs.set_base(run, tmp_path / "base")
    merge(opened(run), tmp_path / "many", shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 1
    whole = load_file(tmp_path / "one" / "model.safetensors")
    with open_tensors(tmp_path / "many") as shards:
        assert set(shards.names()) == set(whole)
        assert all(torch.equal(shards.get(name), whole[name]) for name in whole)
    assert torch.equal(logits(load(tmp_path / "many")), logits(load(tmp_path / "one")))


def test_the_configuration_names_the_classifier_its_verdicts_and_its_pad_id(made, opened, tmp_path):
    merge(opened(made("gemma2")), tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["Gemma2ForSequenceClassification"]
    assert config["id2label"] == {"0": "model_a", "1": "model_b"}
    assert config["pad_token_id"] == 0
    assert config["dtype"] == "float16"
    assert config["attn_logit_softcapping"] is None


def test_a_model_trained_with_the_soft_cap_keeps_it(opened, tmp_path, copied):
    run = copied("gemma2")
    set_contract(run, softcap=True)
    values = yaml.safe_load(run.recipe.read_text())
    values["pairwise"]["softcap"] = True
    run.recipe.write_text(yaml.safe_dump(values))
    merge(opened(run), tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["attn_logit_softcapping"] == 50.0


def test_a_full_fine_tune_passes_straight_through(made, opened, tmp_path):
    run = made("bert", full=True)
    merge(opened(run), tmp_path / "merged", dtype=torch.float32)
    found = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in run.model.state_dict().items())


def test_old_names_of_layer_norms_are_understood(opened, tmp_path, copied):
    run = copied("bert")
    base = tmp_path / "base"
    base.mkdir()
    weights = load_file(run.base / "model.safetensors")
    renamed = {name.replace("LayerNorm.weight", "LayerNorm.gamma"): tensor for name, tensor in weights.items()}
    save_file(renamed, base / "model.safetensors")
    (base / "config.json").write_bytes((run.base / "config.json").read_bytes())
    merge(opened(run), tmp_path / "before", dtype=torch.float32)
    runs.set_base(run, base)
    merge(opened(run), tmp_path / "after", dtype=torch.float32)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def set_contract(run: runs.Made, **values):
    path = run.folder / "contract.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def set_adapter_config(run: runs.Made, **values):
    path = run.folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_adapter(run: runs.Made, change):
    path = run.folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def without_head(run):
    change_adapter(run, lambda tensors: tensors.pop("base_model.model.score.weight"))


def with_a_stray_key(run):
    change_adapter(run, lambda tensors: tensors.update({"base_model.model.model.layers.7.mlp.bias": torch.zeros(3)}))


def with_another_width(run):
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_A.weight"
    change_adapter(run, lambda tensors: tensors.update({name: torch.zeros(8, 96)}))


def with_half_a_layer(run):
    change_adapter(run, lambda tensors: tensors.pop("base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"))


def with_nan(run):
    change_adapter(run, lambda tensors: tensors["base_model.model.score.weight"].fill_(float("nan")))


def with_values_beyond_float16(run):
    change_adapter(run, lambda tensors: tensors["base_model.model.score.weight"].fill_(70000))


def with_three_labels(run):
    change_adapter(run, lambda tensors: tensors.update({"base_model.model.score.weight": torch.zeros(3, 64)}))


def cut_short(run):
    path = run.folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


DAMAGE = [
    (without_head, "no head"),
    (with_a_stray_key, "layers.7.mlp.bias is not part of Gemma2ForSequenceClassification"),
    (with_another_width, "an adapter of another base"),
    (with_half_a_layer, "has the parts lora_A"),
    (with_nan, "adapter_model.safetensors: score.weight is not finite; train again"),
    (with_values_beyond_float16, "score.weight is not finite once it is torch.float16"),
    (with_three_labels, r"score.weight has the shape \[3, 64\], the model needs \[2, 64\]"),
    (cut_short, "not a whole safetensors file"),
    (lambda run: set_adapter_config(run, init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (lambda run: set_adapter_config(run, use_bdlora=True), "use_bdlora: this kind of LoRA cannot be merged"),
    (lambda run: set_adapter_config(run, peft_type="IA3"), "peft_type is 'IA3'"),
    (lambda run: set_adapter_config(run, r=16), "has rank 8, adapter_config.json says 16"),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message.split("{")[0][:30] for _, message in DAMAGE])
def test_what_cannot_be_merged_is_one_error_and_nothing_is_written(damage, message, copied, opened, tmp_path):
    run = copied()
    damage(run)
    with pytest.raises(UserError, match=message):
        merge(opened(run), tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_an_adapter_on_a_base_of_another_architecture_is_refused(copied, opened, tiny_models, tmp_path):
    run = copied("bert")
    runs.set_base(run, tiny_models("llama"))
    with pytest.raises(UserError, match="no head"):
        merge(opened(run), tmp_path / "merged")


def test_a_base_whose_configuration_has_a_value_of_another_type_is_one_error(copied, opened, tmp_path):
    run = copied("gemma2")
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text(json.dumps(json.loads((run.base / "config.json").read_text()) | {"hidden_size": "64"}))
    runs.set_base(run, base)
    with pytest.raises(UserError, match=r"config.json: transformers cannot read it \(Validation error for field 'hidden_size'"):
        merge(opened(run), tmp_path / "merged")
