"""What scoring leaves out changes no answer: every architecture and head against plain forward passes, a row at a time."""

import copy
import random
import threading
from collections import Counter
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig
from transformers.models.gemma2 import modeling_gemma2
from transformers.models.granite import modeling_granite
from transformers.models.modernbert import modeling_modernbert

from kaggle_kernels.runtime.models.fused import GatedMlp, fuse_elementwise, rotate_queries_and_keys
from kaggle_kernels.runtime.models.model import CLASSES, choose_attention
from kaggle_kernels.runtime.models.pipeline import Stages
from kaggle_kernels.runtime.models.scoring import group_by_length, verdict_logits
from kaggle_kernels.runtime.models.shortcuts import keep_read_tokens, reading, take_shortcuts
from tests.kaggle_kernels.runtime.test_heads import CONTRACT

HEADS = {"score": 2, "reward": 1, "label_tokens": 0}
CASES = [
    *[(kind, head) for kind in ("gemma2", "llama", "qwen2") for head in HEADS],
    ("bert", "score"),
    ("bert", "reward"),
    *[(kind, "score") for kind in ("mistral", "phi3", "qwen3", "modernbert", "deberta-v2")],
]
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "sliding_window": 64,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "attn_logit_softcapping": None,
    "use_cache": False,
    "relative_attention": True,
    "pos_att_type": ["p2c", "c2p"],
    "initializer_range": 0.2,  # ten times as large as usual: every token then has a say in every answer
    "initializer_cutoff_factor": 20.0,
}
ENCODERS = ("bert", "modernbert", "deberta-v2")


def contract_of(head):
    return replace(CONTRACT, head=head, num_labels=HEADS[head], label_token_ids=(37, 38) if head == "label_tokens" else ())


def random_model(kind, head="score", dtype=torch.float32, as_served=True):
    """A model with random weights and the attention that it has in a kernel, or else transformers' own."""
    torch.manual_seed(4)
    sizes = SIZES
    if kind in ENCODERS:
        sizes = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "head_dim")}
    labels = {"num_labels": HEADS[head]} if HEADS[head] else {}
    config = AutoConfig.for_model(kind, **sizes, **labels)
    attention = choose_attention(config, contract_of(head))
    if not as_served and attention != "eager":
        attention = "sdpa"
    return CLASSES[head].from_config(config, attn_implementation=attention, dtype=dtype).eval()


@pytest.fixture(params=CASES, ids="-".join)
def served(request):
    """A model as transformers has it, the same one with shortcuts, and its contract."""
    kind, head = request.param
    plain, quick = (random_model(kind, head, as_served=as_served) for as_served in (False, True))
    take_shortcuts(quick, contract_of(head).label_token_ids)
    return plain, quick, contract_of(head)


def sequences(rows=16, shortest=3, longest=90):
    """Random rows; the pad id stands inside one, at the end of one and alone in one, and two have lengths of their own."""
    rng = random.Random(5)
    rows = [[rng.randrange(10, 1000) for _ in range(rng.randint(shortest, longest))] for _ in range(rows)]
    rows[3][1] = 0
    return [*rows, [11] * 200, [12] * 201, [11, 12, 13, 0, 0], [0, 0]]


def expected_logits(model, contract, rows):
    """A forward pass a row, by the model alone."""
    with torch.inference_mode():
        if contract.head == "label_tokens":
            return torch.stack(
                [model(torch.tensor([ids])).logits[0, -1, list(contract.label_token_ids)] for ids in rows]
            ).float()
        logits = torch.cat([model(torch.tensor([ids])).logits for ids in rows]).float()
    return logits if contract.head == "score" else logits.view(-1, 2)


def probabilities(model, contract, rows):
    with torch.inference_mode():
        return verdict_logits(model, contract, rows, "cpu").softmax(-1)


def test_every_architecture_and_head_answers_as_one_row_at_a_time(served):
    plain, quick, contract = served
    expected = expected_logits(plain, contract, sequences()).softmax(-1)
    assert (probabilities(quick, contract, sequences()) - expected).abs().max() < 1e-5
    assert expected.std() > 0.1, "the answers are too much alike to tell one from another"


@pytest.mark.parametrize("kind, part", [("gemma2", "mlp.down_proj"), ("llama", "mlp.up_proj"), ("bert", "intermediate.dense")])
def test_the_last_layers_mlp_computes_one_token_of_each_row_and_the_others_all(kind, part):
    model = random_model(kind)
    take_shortcuts(model)
    widths = {}
    for name, module in model.named_modules():
        if name.endswith(part):
            module.register_forward_hook(lambda *arguments, name=name: widths.update({name: arguments[2].shape[1]}))
    rows = [[11] * 30, [12] * 29]
    verdict_logits(model, contract_of("score"), rows, "cpu")
    assert list(widths.values()) == [30, 1]
    model(torch.tensor(rows[:1]))
    assert list(widths.values()) == [30, 30], "outside of scoring a model computes everything"


@pytest.mark.parametrize("kind, expected", [("gemma2", [False, False]), ("bert", [True, False])])
def test_a_mask_is_given_only_where_padding_would_be_seen(kind, expected):
    model = random_model(kind)
    take_shortcuts(model)
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append("attention_mask" in inputs), with_kwargs=True)
    verdict_logits(model, contract_of("score"), [[11, 12, 13], [14]], "cpu")
    verdict_logits(model, contract_of("score"), [[11, 12, 13], [14, 15, 16]], "cpu")
    assert seen == expected


def test_attention_repeats_keys_so_that_no_kernel_must_know_groups(monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, **options):
        calls.append((query.shape[1], key.shape[1], value.shape[1], options.get("attn_mask"), options["is_causal"]))
        assert "enable_gqa" not in options
        return attend(query, key, value, **options)

    monkeypatch.setattr("kaggle_kernels.runtime.models.shortcuts.scaled_dot_product_attention", noted)
    model = random_model("llama")
    take_shortcuts(model)
    verdict_logits(model, contract_of("score"), [[11, 12, 13], [14]], "cpu")
    assert calls == [(2, 2, 2, None, True)] * 2
    assert model.config.num_key_value_heads == 1


def test_a_pass_that_fails_leaves_nothing_to_read():
    with pytest.raises(RuntimeError), reading(torch.tensor([1])):
        assert keep_read_tokens(None, (torch.zeros(1, 3, 4),))[0].shape == (1, 1, 4)
        raise RuntimeError("CUDA error")
    assert keep_read_tokens(None, (torch.zeros(1, 3, 4),)) is None


@pytest.mark.parametrize(("head", "targets"), [("score", []), ("label_tokens", []), ("label_tokens", ["lm_head"])])
def test_an_unmerged_adapter_answers_as_one_row_at_a_time(head, targets):
    contract = contract_of(head)
    adapter = LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj", "gate_proj", "down_proj", *targets],
        modules_to_save=["score"] if head == "score" else None,
        task_type=TaskType.SEQ_CLS if head == "score" else TaskType.CAUSAL_LM,
        init_lora_weights=False,
    )
    adapted = []
    for as_served in (False, True):
        model = random_model("llama", head, as_served=as_served)
        adapted.append(get_peft_model(model, adapter).eval())
    plain, quick = adapted
    take_shortcuts(quick, contract.label_token_ids)
    assert quick.causal
    expected = expected_logits(plain, contract, sequences()).softmax(-1)
    assert (probabilities(quick, contract, sequences()) - expected).abs().max() < 1e-5


def test_known_architectures_get_fused_operations_and_others_are_left_alone():
    types = {}
    for kind in ("gemma2", "modernbert"):
        model = random_model(kind)
        before = [type(module) for module in model.modules()]
        fuse_elementwise(model)
        after = [type(module) for module in model.modules()]
        types[kind] = Counter(module_type for module_type in after if module_type not in before)
    assert types == {"gemma2": {torch.nn.RMSNorm: 9, GatedMlp: 2}, "modernbert": {}}
    assert modeling_gemma2.apply_rotary_pos_emb is rotate_queries_and_keys
    assert modeling_modernbert.apply_rotary_pos_emb is not rotate_queries_and_keys


def test_rotation_in_halves_is_transformers_own():
    torch.manual_seed(0)
    q, k, cos, sin = (torch.randn(shape) for shape in ((2, 4, 5, 8), (2, 1, 5, 8), (2, 5, 8), (2, 5, 8)))
    expected = modeling_granite.apply_rotary_pos_emb(q, k, cos, sin)
    for rotated, expected_states in zip(rotate_queries_and_keys(q, k, cos, sin), expected, strict=True):
        assert torch.allclose(rotated, expected_states, atol=1e-6)


@pytest.mark.parametrize("kind", ["gemma2", "llama"])
def test_fused_operations_stay_within_the_noise_of_float16(kind):
    rows = sequences()[:16]
    expected = expected_logits(random_model(kind), contract_of("score"), rows)
    eager = random_model(kind, dtype=torch.float16)
    fused = copy.deepcopy(eager)
    fuse_elementwise(fused)
    noise, difference = (
        (expected_logits(model, contract_of("score"), rows) - expected).abs().mean() for model in (eager, fused)
    )
    assert 0 < difference < 1.25 * noise


def score_in_two_threads(score):
    """What score(0) and score(1) give, each in a thread of its own."""
    scores = {}

    def keep_score(number):
        scores[number] = score(number)

    threads = [threading.Thread(target=keep_score, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a pass waits for a stage that its own batch holds"
    return scores


def test_two_threads_read_their_own_rows():
    """As two batches in a split model do, each in the middle of its pass when the other one begins."""
    contract = contract_of("score")
    model = random_model("gemma2")
    take_shortcuts(model)
    rows = [[11, 12, 13, 14], [15, 16, 17, 18, 19, 20, 21]]
    expected = [probabilities(model, contract, [ids]) for ids in rows]
    assert (expected[0] - expected[1]).abs().max() > 0.01

    barrier = threading.Barrier(2)

    def meet(*_):
        barrier.wait(20)

    model.model.layers[0].register_forward_hook(meet)
    model.model.layers[1].self_attn.o_proj.register_forward_hook(meet)
    scores = score_in_two_threads(lambda number: probabilities(model, contract, [rows[number]]))
    for number in (0, 1):
        assert (scores[number] - expected[number]).abs().max() < 1e-5


def test_a_split_model_makes_each_pass_of_a_batch_in_its_stages():
    """Rows of unlike length are several passes: each enters the first stage anew, while another batch is in the second."""
    contract = contract_of("score")
    placed = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "score"], "cpu")
    model = random_model("gemma2")
    model = dispatch_model(model, placed, main_device="cpu", force_hooks=True)
    take_shortcuts(model)
    stages = Stages(model, ["model.layers.1"])
    rows = [[[token] * length for length in (300, 297, 100, 97, 20, 17)] for token in (20, 40)]
    assert len(group_by_length([len(ids) for ids in rows[0]])) > 1

    def score_in_stages(number):
        with torch.inference_mode():
            return verdict_logits(model, contract, rows[number], "cpu", stages.forward_pass).softmax(-1)

    expected = [probabilities(model, contract, batch) for batch in rows]
    scores = score_in_two_threads(score_in_stages)
    for number in (0, 1):
        assert (scores[number] - expected[number]).abs().max() < 1e-5
    assert not any(lock.locked() for lock in stages.locks)
