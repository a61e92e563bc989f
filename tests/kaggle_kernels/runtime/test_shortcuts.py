"""What scoring leaves out changes no answer: every architecture and head against plain forward passes, a row at a time."""

import random
import threading
from dataclasses import replace

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, TaskType, get_peft_model
from transformers import AutoConfig

from kaggle_kernels.runtime.models.gptq import GptqLinear
from kaggle_kernels.runtime.models.model import CLASSES
from kaggle_kernels.runtime.models.pipeline import Stages
from kaggle_kernels.runtime.models.scoring import alike, verdict_logits
from kaggle_kernels.runtime.models.shortcuts import SDPA, only_what_is_read, reading, take_shortcuts
from postprocess.weights.bnb_quantize import quantization_config
from tests.kaggle_kernels.runtime.test_heads import CONTRACT

HEADS = {"score": 2, "reward": 1, "label_tokens": 0}
CASES = [
    (kind, head) for kind in ("gemma2", "llama", "qwen2", "bert") for head in HEADS if (kind, head) != ("bert", "label_tokens")
]


def contract_of(head):
    return replace(CONTRACT, head=head, num_labels=HEADS[head], label_token_ids=(37, 38) if head == "label_tokens" else ())


def random_model(folder, head, attention, dtype=torch.float32):
    """Weights ten times as large as usual: every token then has a say in every answer."""
    torch.manual_seed(4)
    labels = {"num_labels": HEADS[head]} if HEADS[head] else {}
    config = AutoConfig.from_pretrained(folder, pad_token_id=0, use_cache=False, attn_logit_softcapping=None, **labels)
    config.initializer_range = 0.2
    return CLASSES[head].from_config(config, attn_implementation=attention, dtype=dtype).eval()


@pytest.fixture(params=CASES, ids="-".join)
def served(request, tiny_models):
    """A model as transformers has it, the same one with shortcuts, and its contract."""
    kind, head = request.param
    models = [random_model(tiny_models(kind), head, attention) for attention in ("sdpa", SDPA)]
    take_shortcuts(models[1])
    return *models, contract_of(head)


def sequences(rows=16, shortest=3, longest=90):
    """Random ids, none of them special; the pad id stands in the middle of one row, and another has nobody of its length."""
    rng = random.Random(5)
    found = [[rng.randrange(10, 1000) for _ in range(rng.randint(shortest, longest))] for _ in range(rows)]
    found[3][1] = 0
    return [*found, [11] * 200, [12] * 201]


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


def test_a_row_that_ends_with_the_pad_id_is_read_before_it_as_the_head_does(served):
    plain, quick, contract = served
    rows = [[11, 12, 13, 0, 0], [14, 15, 16, 17, 18, 19, 20], [0, 0], [21, 22]]
    assert (probabilities(quick, contract, rows) - expected_logits(plain, contract, rows).softmax(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["gemma2", "bert"])
def test_float16_answers_within_a_thousandth(tiny_models, kind):
    contract = contract_of("score")
    plain, quick = (random_model(tiny_models(kind), "score", attention) for attention in ("sdpa", SDPA))
    for model in (plain, quick):
        (model.score if kind == "gemma2" else model.classifier).weight.data.mul_(0.2)
    take_shortcuts(quick)
    found = probabilities(quick.half(), contract, sequences())
    assert (found - expected_logits(plain.half(), contract, sequences()).softmax(-1)).abs().max() < 1e-3
    assert found.std() > 0.02


@pytest.mark.parametrize("kind, part", [("gemma2", "mlp.down_proj"), ("llama", "mlp.up_proj"), ("bert", "intermediate.dense")])
def test_the_last_layers_mlp_computes_one_token_of_each_row_and_the_others_all(tiny_models, kind, part):
    model = random_model(tiny_models(kind), "score", SDPA)
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
def test_a_mask_is_given_only_where_padding_would_be_seen(tiny_models, kind, expected):
    model = random_model(tiny_models(kind), "score", SDPA)
    take_shortcuts(model)
    seen = []
    model.register_forward_pre_hook(lambda _, args, inputs: seen.append("attention_mask" in inputs), with_kwargs=True)
    verdict_logits(model, contract_of("score"), [[11, 12, 13], [14]], "cpu")
    verdict_logits(model, contract_of("score"), [[11, 12, 13], [14, 15, 16]], "cpu")
    assert seen == expected


def test_a_model_that_is_not_known_to_be_causal_gets_a_mask(tiny_models):
    plain = random_model(tiny_models("llama"), "score", "sdpa")
    seen = []
    plain.register_forward_pre_hook(lambda _, args, inputs: seen.append("attention_mask" in inputs), with_kwargs=True)
    verdict_logits(plain, contract_of("score"), [[11, 12, 13], [14]], "cpu")
    assert seen == [True]


def test_attention_repeats_keys_so_that_no_kernel_must_know_groups(tiny_models, monkeypatch):
    calls = []
    attend = torch.nn.functional.scaled_dot_product_attention

    def noted(query, key, value, **options):
        calls.append((query.shape[1], key.shape[1], value.shape[1], options.get("attn_mask"), options["is_causal"]))
        assert "enable_gqa" not in options
        return attend(query, key, value, **options)

    monkeypatch.setattr("kaggle_kernels.runtime.models.shortcuts.scaled_dot_product_attention", noted)
    model = random_model(tiny_models("llama"), "score", SDPA)
    take_shortcuts(model)
    verdict_logits(model, contract_of("score"), [[11, 12, 13], [14]], "cpu")
    assert calls == [(2, 2, 2, None, True)] * 2
    assert model.config.num_key_value_heads == 1


def test_two_threads_read_their_own_rows(tiny_models):
    """As two batches in a split model do, each in the middle of its pass when the other one begins."""
    contract = contract_of("score")
    model = random_model(tiny_models("gemma2"), "score", SDPA)
    take_shortcuts(model)
    rows = [[11, 12, 13, 14], [15, 16, 17, 18, 19, 20, 21]]
    expected = [probabilities(model, contract, [ids]) for ids in rows]
    barrier, found = threading.Barrier(2), {}

    def meet(*_):
        barrier.wait(20)

    model.model.layers[0].register_forward_hook(meet)
    threads = [
        threading.Thread(target=lambda n=n: found.update({n: probabilities(model, contract, [rows[n]])})) for n in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (torch.cat(expected)[0] - torch.cat(expected)[1]).abs().max() > 0.01
    for number in (0, 1):
        assert (found[number] - expected[number]).abs().max() < 1e-5


def test_a_split_model_makes_each_pass_of_a_batch_in_its_stages(tiny_models):
    """Rows of unlike length are several passes: each enters the first stage anew, while another batch is in the second."""
    contract = contract_of("score")
    model = random_model(tiny_models("gemma2"), "score", SDPA)
    placed = dict.fromkeys(["model.embed_tokens", "model.rotary_emb", "model.layers", "model.norm", "score"], "cpu")
    model = dispatch_model(model, placed, main_device="cpu", force_hooks=True)
    take_shortcuts(model)
    stages = Stages(model, ["model.layers.1"])
    rows = [
        [ids for length in (300, 100, 20) for ids in ([start + 1] * length, [start + 2] * (length - 3))] for start in (20, 40)
    ]
    expected = [probabilities(model, contract, batch) for batch in rows]
    assert len(alike([len(ids) for ids in rows[0]])) > 1
    found = {}

    def score(number):
        with torch.inference_mode():
            found[number] = verdict_logits(model, contract, rows[number], "cpu", stages.batch).softmax(-1)

    threads = [threading.Thread(target=score, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive(), "a pass waits for a stage that its own batch holds"
    for number in (0, 1):
        assert (found[number] - expected[number]).abs().max() < 1e-5
    assert not any(lock.locked() for lock in stages.locks)


def test_a_pass_that_fails_leaves_nothing_to_read():
    with pytest.raises(RuntimeError), reading(torch.tensor([1])):
        assert only_what_is_read(None, (torch.zeros(1, 3, 4),))[0].shape == (1, 1, 4)
        raise RuntimeError("CUDA error")
    assert only_what_is_read(None, (torch.zeros(1, 3, 4),)) is None


def test_an_unmerged_adapter_answers_as_one_row_at_a_time(tiny_models):
    contract = contract_of("score")
    plain, quick = (random_model(tiny_models("gemma2"), "score", attention) for attention in ("sdpa", SDPA))
    adapter = LoraConfig(
        r=4,
        target_modules=["q_proj", "o_proj", "gate_proj", "down_proj"],
        modules_to_save=["score"],
        task_type=TaskType.SEQ_CLS,
        init_lora_weights=False,
    )
    adapted = []
    for model in (plain, quick):
        torch.manual_seed(6)
        adapted.append(get_peft_model(model, adapter).eval())
    take_shortcuts(adapted[1])
    assert adapted[1].causal
    expected = expected_logits(adapted[0], contract, sequences()).softmax(-1)
    assert (probabilities(adapted[1], contract, sequences()) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("bits", ["nf4", "int8", "gptq"])
def test_quantised_layers_answer_as_one_row_at_a_time(tiny_models, tmp_path, bits):
    contract = contract_of("score")
    source = random_model(tiny_models("llama", width=128), "score", "sdpa")
    source.save_pretrained(tmp_path)
    models = []
    for attention in ("sdpa", SDPA):
        options = (
            {} if bits == "gptq" else {"quantization_config": quantization_config(bits, ["score"]), "device_map": {"": "cpu"}}
        )
        model = CLASSES["score"].from_pretrained(tmp_path, attn_implementation=attention, dtype=torch.float32, **options).eval()
        if bits == "gptq":
            for name, linear in [
                (n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".layers." in n
            ]:
                model.set_submodule(name, unpacked_at_random(linear))
        models.append(model)
    take_shortcuts(models[1])
    expected = expected_logits(models[0], contract, sequences()).softmax(-1)
    tolerance = {"nf4": 1e-3, "int8": 1e-3, "gptq": 1e-5}[bits]  # bitsandbytes computes in float16
    assert (probabilities(models[1], contract, sequences()) - expected).abs().max() < tolerance


def unpacked_at_random(linear):
    generator = torch.Generator().manual_seed(linear.out_features)
    made = GptqLinear(linear.out_features, linear.in_features, None, bits=4, group_size=128)
    made.qweight.random_(-(2**31), 2**31 - 1, generator=generator)
    made.qzeros.fill_(0x77777777)
    made.scales.fill_(0.02)
    return made
