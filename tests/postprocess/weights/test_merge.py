import copy
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from kaggle_kernels.runtime.models.model import CLASSES
from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.merge import Form, is_finite, merge
from postprocess.weights.meta_model import model_skeleton
from preprocess.core.errors import UserError
from tests.bench.merge import make_inputs, measure
from tests.bench.processes import in_process
from tests.postprocess import runs
from tests.postprocess.runs import in_adapter, with_json

PATTERNS = {"rank_pattern": {"q_proj": 4, "layers.1.mlp.up_proj": 2, "k": 2}, "alpha_pattern": {r".*\.v_proj": 3}}
VARIANTS = [
    ("gemma2", "score", {}),
    ("llama", "score", {"use_dora": True}),
    ("gemma2", "score", {"use_rslora": True} | PATTERNS),
    ("llama", "score", {"target_modules": ["embed_tokens", "q_proj"], "modules_to_save": ["norm"]}),
    ("bert", "score", {"bias": "all"}),
    ("gemma2", "label_tokens", {}),
    ("llama", "label_tokens", {"target_modules": ["q_proj", "down_proj", "lm_head"]}),
    ("llama", "label_tokens", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("bert", "reward", {}),
    *[(kind, "score", {}) for kind in ("qwen3", "phi3", "mistral", "modernbert", "deberta-v2")],
]


def name_of(value):
    """A parameter in a test's name."""
    return value if isinstance(value, str) else "-".join(value) or "lora"


def logits(model):
    ids = torch.tensor([[2, 17, 200, 33, 4, 900], [2, 5, 6, 0, 0, 0]])
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=(ids != 0).long()).logits


@pytest.mark.parametrize(("kind", "head", "lora"), VARIANTS, ids=name_of)
def test_the_merged_model_is_the_one_that_peft_merges(kind, head, lora, made, opened, tmp_path, monkeypatch):
    monkeypatch.setattr("postprocess.weights.merge.PIECE_NUMBERS", 64 * 64)  # several pieces a tensor
    run = made(kind, head=head, lora=lora)
    merge(opened(run), tmp_path / "merged", Form(dtype=torch.float32))
    expected = copy.deepcopy(run.model).merge_and_unload()
    merged, tensors = load_file(tmp_path / "merged" / "model.safetensors"), expected.state_dict()
    is_tied = (kind, head) == ("gemma2", "label_tokens")
    assert set(tensors) - set(merged) == ({"lm_head.weight"} if is_tied else set())
    assert [name for name in merged if not torch.equal(merged[name], tensors[name])] == []
    loaded = CLASSES[head].from_pretrained(tmp_path / "merged").eval()
    assert (logits(loaded) - logits(expected)).abs().max() < 1e-5


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_number_that_is_not_finite_is_found_wherever_it_stands(value, dtype):
    tensor = torch.zeros(1000, 7, dtype=dtype)
    tensor[613, 5] = value
    assert is_finite(tensor) is (value == 1.0)
    assert is_finite(tensor[:0])


@pytest.mark.slow
def test_at_the_shapes_of_gemma_2_9b_the_anonymous_memory_stays_under_a_gigabyte_and_a_half(tmp_path):
    in_process(make_inputs, tmp_path, "9b", 1)
    assert measure("ours", tmp_path).peak_bytes < 1.5e9
    shutil.rmtree(tmp_path / "base")


@pytest.mark.parametrize(("kind", "head"), [("bert", "score"), ("gemma2", "label_tokens")])
def test_a_full_fine_tune_passes_straight_through(kind, head, made, opened, tmp_path):
    run = made(kind, head=head, full=True)
    merge(opened(run), tmp_path / "merged", Form(dtype=torch.float32))
    merged, trained = load_file(tmp_path / "merged" / "model.safetensors"), run.model.state_dict()
    assert set(trained) - set(merged) == ({"lm_head.weight"} if kind == "gemma2" else set())
    assert all(torch.equal(tensor, trained[name]) for name, tensor in merged.items())


def test_a_base_in_bfloat16_is_merged_in_float32(opened, tmp_path, copied):
    run, name = copied("llama"), "model.layers.0.self_attn.q_proj"
    base = runs.change_base(
        run, tmp_path / "base", lambda tensors: tensors.update({key: value.bfloat16() for key, value in tensors.items()})
    )
    runs.set_json(run.folder / "adapter_config.json", setting_of_a_newer_peft=None)
    merge(opened(run), tmp_path / "merged", Form(dtype=torch.float32))
    adapter = load_file(run.folder / "adapter_model.safetensors")
    a, b = (adapter[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    before, after = (load_file(folder / "model.safetensors")[f"{name}.weight"] for folder in (base, tmp_path / "merged"))
    assert before.dtype == torch.bfloat16
    assert torch.equal(after, before.float() + b @ a * 2)


def test_a_sharded_base_and_a_sharded_result_hold_the_same_tensors(opened, tmp_path, copied):
    run = copied("gemma2")
    model = AutoModelForSequenceClassification.from_pretrained(run.base, num_labels=2)
    model.save_pretrained(tmp_path / "base", max_shard_size="100KB")
    assert len(list((tmp_path / "base").glob("model-*.safetensors"))) > 1
    merge(opened(run), tmp_path / "one")
    runs.set_base(run, tmp_path / "base")
    merge(opened(run), tmp_path / "many", shard_bytes=100_000)
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 1
    whole = load_file(tmp_path / "one" / "model.safetensors")
    with open_tensors(tmp_path / "many") as shards:
        assert set(shards.names()) == set(whole)
        assert all(torch.equal(shards.get(name), whole[name]) for name in whole)


def test_old_names_of_layer_norms_are_understood(opened, tmp_path, copied):
    def rename(tensors):
        for name in [name for name in tensors if name.endswith("LayerNorm.weight")]:
            tensors[name.replace("LayerNorm.weight", "LayerNorm.gamma")] = tensors.pop(name)

    run = copied("bert")
    merge(opened(run), tmp_path / "before", Form(dtype=torch.float32))
    runs.change_base(run, tmp_path / "base", rename)
    merge(opened(run), tmp_path / "after", Form(dtype=torch.float32))
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("head", "softcap", "labels", "cap"),
    [("score", False, {0: "model_a", 1: "model_b"}, None), ("reward", True, {0: "reward"}, 50.0)],
)
def test_the_configuration_has_the_labels_the_pad_id_and_the_soft_cap_of_the_contract(head, softcap, labels, cap, made):
    run = made("gemma2", head=head)
    config = model_skeleton(run.base, replace(run.contract(), softcap=softcap, pad_token_id=5)).config
    assert config.architectures == ["Gemma2ForSequenceClassification"]
    assert (config.id2label, config.pad_token_id, config.attn_logit_softcapping) == (labels, 5, cap)


def with_tensors(tensors):
    """A damage that adds tensors to the adapter, or replaces its own."""
    return in_adapter(lambda own: own.update(tensors))


def cut_short(run):
    path = run.folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def with_nan_in_base(run):
    """A base with a number that is not finite."""
    runs.change_base(
        run, run.folder.parent / "base", lambda tensors: next(iter(tensors.values())).view(-1)[3].fill_(float("nan"))
    )


SCORE, LAYER = "base_model.model.score.weight", "base_model.model.model.layers.0.mlp.up_proj"
DAMAGE = [
    (in_adapter(lambda tensors: tensors.pop(SCORE)), "the adapter has no head"),
    (with_tensors({"base_model.model.model.layers.7.mlp.bias": torch.zeros(3)}), "layers.7.mlp.bias is not part of Gemma2"),
    (with_tensors({f"{LAYER}.lora_A.weight": torch.zeros(8, 96)}), "an adapter of another base"),
    (in_adapter(lambda tensors: tensors.pop(f"{LAYER}.lora_B.weight")), "up_proj.weight has no lora_B"),
    (in_adapter(lambda tensors: tensors[SCORE].fill_(float("nan"))), "score.weight is not finite; train again"),
    (with_nan_in_base, "is not finite; fetch the model again"),
    (in_adapter(lambda tensors: tensors[SCORE].fill_(70000)), "score.weight is not finite once it is torch.float16"),
    (with_tensors({SCORE: torch.zeros(3, 64)}), r"score.weight has the shape \[3, 64\], but the model needs \[2, 64\]"),
    (cut_short, "not a complete safetensors file"),
    (with_json("adapter_config.json", init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (with_json("adapter_config.json", use_bdlora=True), "use_bdlora is set, and this kind of LoRA cannot be merged"),
    (with_json("adapter_config.json", peft_type="IA3"), "peft_type is 'IA3'"),
    (
        with_json("adapter_config.json", r=16),
        r"size mismatch for .*64, 8\]\) from checkpoint.* is not its own",
    ),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGE, ids=[message[:30] for _, message in DAMAGE])
def test_what_cannot_be_merged_is_one_error_and_nothing_is_written(damage, message, copied, opened, tmp_path):
    run = copied()
    damage(run)
    with pytest.raises(UserError, match=message):
        merge(opened(run), tmp_path / "merged")
    assert not list(tmp_path.glob("*merged*"))


def test_a_base_whose_configuration_has_a_value_of_another_type_is_one_error(copied, opened, tmp_path):
    run = copied("gemma2")
    base = runs.change_base(run, tmp_path / "base", lambda tensors: None)
    runs.set_json(base / "config.json", hidden_size="64")
    with pytest.raises(UserError, match=r"config.json: transformers cannot read it \(Validation error for field 'hidden_size'"):
        merge(opened(run), tmp_path / "merged")
