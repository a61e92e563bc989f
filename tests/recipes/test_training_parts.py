"""The plain functions behind the plugin: targets, collator, loss, metrics, splits, head."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch
from axolotl.utils.dict import DictDefault
from torch.utils.data import RandomSampler
from transformers import AutoTokenizer
from transformers.trainer_pt_utils import LengthGroupedSampler

from preprocess.core import ledger
from preprocess.core.errors import UserError
from preprocess.core.files import sha256
from recipes.pairwise.config.model_checks import (
    build_empty_model,
    check_config,
    check_layers,
    check_vocabulary,
    read_config,
    warn_of_home_path,
)
from recipes.pairwise.contract import record_training
from recipes.pairwise.data import datasets
from recipes.pairwise.data.collators import PairCollator
from recipes.pairwise.plugin import PairwisePlugin
from recipes.pairwise.tracking import metrics
from recipes.pairwise.training import cpu
from recipes.pairwise.training.checkpoints import check_resume
from recipes.pairwise.training.losses import soft_cross_entropy
from recipes.pairwise.training.trainer import BeginEpoch, RowOrder, check_gradient
from tests import tiny
from tests.recipes.blocks import ROWS, TWO, block_of, contract_of

THREE = ("model_b", "tie", "model_a")


def test_targets_and_winners_follow_the_verdicts_and_two_of_them_share_a_tie():
    shares = {"p_model_a": [1.0, 0.25], "p_model_b": [0.0, 0.25], "p_tie": [0.0, 0.5]}
    frame = pl.DataFrame(shares | {"winner": ["model_a", "tie"]})
    assert datasets.targets(frame, TWO).tolist() == [[1.0, 0.0], [0.5, 0.5]]
    assert datasets.targets(frame, THREE).tolist() == [[0.0, 0.0, 1.0], [0.25, 0.5, 0.25]]
    assert datasets.winners(frame, TWO).tolist() == [0, -1]
    assert datasets.winners(frame, THREE).tolist() == [2, 1]


def test_a_random_order_has_its_own_labels_and_follows_from_the_seed_the_epoch_and_the_pair():
    def draw(number: int, **settings) -> tuple[list, list]:
        collator = PairCollator(None, "score", TWO, "random", pad_token_id=1, **settings)
        batch = collator([ROWS[0] | {"id": f"row{number}"}])
        return batch["input_ids"][0, :4].tolist(), batch["labels"][0, 0].tolist()

    def draw_many(**settings) -> list:
        return [draw(number, **settings) for number in range(100)]

    draws = draw_many()
    assert 30 < draws.count(([5, 6, 7, 1], [0.75, 0.25])) < 70
    assert draws.count(([5, 6, 7, 1], [0.75, 0.25])) + draws.count(([5, 7, 6, 8], [0.25, 0.75])) == 100
    assert draws == draw_many()
    assert draws not in (draw_many(seed=1), draw_many(epoch=1))


def test_loss_is_the_weighted_soft_cross_entropy():
    logits = torch.tensor([[[0.0, 0.0]], [[math.log(3.0), 0.0]]])
    labels = torch.tensor([[[0.5, 0.5]], [[1.0, 0.0]]])
    expected = (3 * math.log(2) + 1 * math.log(4 / 3)) / 2
    assert soft_cross_entropy(logits, labels, torch.tensor([3.0, 1.0])).item() == pytest.approx(expected, abs=1e-6)
    smoothed = soft_cross_entropy(logits[1:], labels[1:], torch.tensor([1.0]), label_smoothing=0.2).item()
    assert smoothed == pytest.approx(0.9 * math.log(4 / 3) + 0.1 * math.log(4), abs=1e-6)


@pytest.mark.parametrize(
    ("norm", "loss_scale", "has_diverged"),
    [(1.0, None, False), (math.nan, None, True), (math.inf, 32768.0, False), (math.nan, 0.5, True)],
)
def test_an_overflow_is_routine_only_while_fp16_looks_for_its_scale(norm, loss_scale, has_diverged):
    with pytest.raises(FloatingPointError, match="step 3: the gradient is not finite") if has_diverged else nullcontext():
        check_gradient(norm, 3, loss_scale)


def test_the_swapped_order_is_swapped_back_before_it_is_averaged():
    logits = np.log(np.array([[[0.7, 0.2, 0.1], [0.3, 0.5, 0.2]]]))
    both = metrics.probabilities(logits, ("model_a", "model_b", "tie"))
    assert np.allclose(both[0], [[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]])
    assert np.allclose(metrics.probabilities(logits, ("model_a", "tie", "model_b"))[0, 1], [0.2, 0.5, 0.3])


def test_scores_are_those_worked_out_by_hand():
    """Accuracy is against the winner, whatever the label says; -1 is no verdict of the model."""
    both = np.array([[[0.8, 0.2], [0.6, 0.4]], [[0.6, 0.4], [0.2, 0.8]], [[0.9, 0.1], [0.7, 0.3]]])
    labels = np.array([[0.4, 0.6], [1.0, 0.0], [0.5, 0.5]])
    found = metrics.scores(both, labels, np.array([0, 0, -1]))
    assert found["accuracy"] == 0.5
    assert found["accuracy_as_given"] == 1.0
    assert found["flip_rate"] == pytest.approx(1 / 3)
    first = 0.4 * math.log(0.7) + 0.6 * math.log(0.3)
    assert found["log_loss"] == pytest.approx(-(first + math.log(0.4) + (math.log(0.8) + math.log(0.2)) / 2) / 3)


def test_the_longer_response_is_counted_over_all_turns():
    frame = pl.DataFrame(
        {
            "response_a": [["abc", "d"], ["x"], ["same"]],
            "response_b": [["abc"], ["long"], ["long"]],
            "winner": ["model_a", "model_a", "tie"],
        }
    )
    assert metrics.longer_is_right(frame) == 0.5


def test_a_fold_is_held_out_and_all_keeps_a_fixed_sample(tmp_path):
    path = tiny.pairs_parquet(tmp_path / "pairs.parquet", 1000)
    frame = datasets.read_pairs(path)
    train, validation = datasets.split(frame, 2, path)
    assert (len(train), validation["fold"].unique().to_list()) == (800, [2])
    train, sample = datasets.split(frame, "all", path)
    shuffled = datasets.split(frame.sample(fraction=1.0, shuffle=True, seed=3), "all", path)[1]
    assert (len(train), len(sample)) == (1000, 500)
    assert sample["id"].to_list() == shuffled["id"].to_list()
    with pytest.raises(UserError, match="pairwise.fold is 7, but the folds in the file are 0, 1, 2, 3, 4"):
        datasets.split(frame, 7, path)


def test_extra_rows_are_trained_on_and_only_human_votes_are_validated_on(tmp_path):
    path = tiny.pairs_parquet(tmp_path / "pairs.parquet", 20)
    frame = datasets.read_pairs(path)
    tables = [frame]
    for role in ("extra", "pool", "test"):
        group = pl.col("group") + (100 if role == "test" else 0)
        tables.append(frame.with_columns(id=role + pl.col("id"), role=pl.lit(role), group=group))
    frame = pl.concat(tables)
    train, validation = datasets.split(frame, 2, path)
    assert dict(train["role"].value_counts().iter_rows()) == {"train": 16, "extra": 16}
    assert dict(validation["role"].value_counts().iter_rows()) == {"train": 4}
    assert 2 not in train["fold"], "extra rows like the validation rows are left out with them"
    train, sample = datasets.split(frame, "all", path)
    assert (len(train), sample["role"].unique().to_list()) == (40, ["train"])


def test_pairs_that_are_absent_or_of_another_kind_are_named(tmp_path):
    with pytest.raises(UserError, match="none.parquet: no such file; make it with python -m preprocess"):
        datasets.read_pairs(tmp_path / "none.parquet")
    (tmp_path / "text.parquet").write_text("not parquet")
    with pytest.raises(UserError, match="text.parquet: not a Parquet file"):
        datasets.read_pairs(tmp_path / "text.parquet")
    pl.DataFrame({"id": ["x"]}).write_parquet(tmp_path / "raw.parquet")
    with pytest.raises(UserError, match="no column prompt, response_a"):
        datasets.read_pairs(tmp_path / "raw.parquet")


def test_weights_are_one_on_average_whatever_preprocess_counted(tiny_models, tmp_path):
    path = tiny.pairs_parquet(tmp_path / "pairs.parquet", 4)
    frame = datasets.read_pairs(path).with_columns(weight=pl.Series([1.0, 3.0, 1.0, 3.0], dtype=pl.Float32))
    tokenizer = AutoTokenizer.from_pretrained(tiny_models("gemma2"))
    rows = datasets.tokenise(frame, tokenizer, contract_of(tokenizer), tmp_path / "rows.arrow")
    assert list(rows["weight"]) == [0.5, 1.5, 0.5, 1.5]
    assert rows["sequences"][0][0] != rows["sequences"][0][1]
    assert sorted(rows["sequences"][0][0]) == sorted(rows["sequences"][0][1])


def test_only_the_first_process_reads_the_pairs_and_all_map_what_it_wrote_in_chunks(tiny_models, tmp_path, monkeypatch):
    block = block_of(pairs=str(tiny.pairs_parquet(tmp_path / "pairs.parquet", 20)))
    tokenizer = AutoTokenizer.from_pretrained(tiny_models("gemma2"))
    contract = contract_of(tokenizer)

    whole = datasets.datasets_of(block, tokenizer, contract, tmp_path / "whole")
    monkeypatch.setattr(datasets, "CHUNK_ROWS", 3)
    first = datasets.datasets_of(block, tokenizer, contract, tmp_path / "chunks")
    monkeypatch.setattr(datasets, "read_pairs", None)
    second = datasets.datasets_of(block, tokenizer, contract, tmp_path / "chunks")

    for first_rows, second_rows, whole_rows in zip(first, second, whole, strict=True):
        assert first_rows.to_list() == second_rows.to_list() == whole_rows.to_list()
        assert second_rows.cache_files[0]["filename"].startswith(str(tmp_path / "chunks"))
    training, validation = second
    assert training.data.column("id").num_chunks == 6, "16 rows in chunks of 3"
    assert list(validation["length"]) == sorted(validation["length"], reverse=True)


@pytest.mark.parametrize(
    ("kind", "keys", "overrides", "message"),
    [
        (
            "gemma2",
            {"budget_tokens": 4097},
            {},
            "pairwise.budget_tokens: 4097, but the base model has 4096 positions; lower it",
        ),
        ("gemma2", {}, {"attention_droput": 0.1}, "attention_droput: unknown key; did you mean attention_dr"),
        (
            "llama",
            {"softcap": True},
            {},
            "pairwise.softcap: the base model has no soft cap of attention logits; remove the key",
        ),
    ],
)
def test_what_the_base_model_s_config_does_not_allow_is_refused(kind, keys, overrides, message, tiny_models):
    config = read_config(str(tiny_models(kind)), None)
    check_config(config, block_of(budget_tokens=4096), {"attention_dropout": 0.1})
    with pytest.raises(UserError, match=message):
        check_config(config, block_of(**keys), overrides)


@pytest.mark.parametrize(
    ("head", "layers", "message"),
    [
        ("score", {"targets": "all-linear", "saved": ["score"]}, None),
        ("score", {"targets": ["gate_prj"], "saved": None}, "lora_target_modules: Llama.* has no layer gate_prj; did you"),
        ("score", {"targets": None, "saved": ["embed_token"]}, "lora_modules_to_save: Llama.* no layer embed_token; did you"),
        ("label_tokens", {"targets": ["q_proj", "lm_head"], "saved": None}, None),
        ("label_tokens", {"targets": None, "saved": ["score"]}, "lora_modules_to_save: LlamaForCausalLM has no layer score"),
    ],
)
def test_a_layer_that_the_base_model_lacks_is_refused(head, layers, message, tiny_models):
    model = build_empty_model(read_config(str(tiny_models("llama")), None), head)
    with pytest.raises(UserError, match=message) if message else nullcontext():
        check_layers(model, **layers)


def test_a_special_token_that_the_base_model_lacks_is_refused(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models("llama"))
    check_vocabulary({"pad_token": "<|reserved_special_token_0|>"}, tokenizer, "some/llama", 1024)
    tokenizer.add_special_tokens({"pad_token": "<|reserved_special_tokn_0|>"})
    with pytest.raises(
        UserError, match="special_tokens.pad_token: some/llama has no token '<.reserved_special_tokn_0.>'; name"
    ):
        check_vocabulary({"pad_token": "<|reserved_special_tokn_0|>"}, tokenizer, "some/llama", 1024)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Gemma-2-9b", "base_model: Gemma-2-9b is neither a model's folder"),
        ("google/gemma-2-9b-it", "base_model: google/gemma-2-9b-it cannot be read .*; accept its licence on the hub and"),
    ],
)
def test_a_base_model_that_cannot_be_read_is_one_line_that_says_how_to_get_it(name, message):
    with pytest.raises(UserError, match=message):
        read_config(name, None)


def test_a_template_of_another_family_is_refused(tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models("gemma2"))
    with pytest.raises(UserError, match=r"pairwise.template: llama3 writes <.begin_of_text.>, which is no token of m; name"):
        contract_of(tokenizer, template="llama3")


def test_a_run_resumes_only_from_its_own_checkpoints(tmp_path):
    pairs = tiny.pairs_parquet(tmp_path / "pairs.parquet", 10)
    block = block_of(pairs=str(pairs))
    for step, files in ((5, ["trainer_state.json"]), (10, ["trainer_state.json"]), (15, [])):
        checkpoint = tmp_path / f"run/checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        for name in files:
            (checkpoint / name).write_text("{}")
    cfg = SimpleNamespace(output_dir=str(tmp_path / "run"), resume_from_checkpoint=None, auto_resume_from_checkpoints=None)
    check_resume(cfg, block, {"learning_rate": 0.1})
    cfg.auto_resume_from_checkpoints = True
    check_resume(cfg, block, {"learning_rate": 0.1, "auto_resume_from_checkpoints": True})
    assert cfg.resume_from_checkpoint == str(tmp_path / "run/checkpoint-10"), "the newest was left half written"
    with pytest.raises(UserError, match="run: its checkpoints were trained with another learning_rate, pairwise; remove them"):
        check_resume(cfg, block.model_copy(update={"fold": "all"}), {"learning_rate": 0.2})
    tiny.pairs_parquet(pairs, 10, seed=2)
    with pytest.raises(UserError, match="were trained with another content of pairwise.pairs; remove"):
        check_resume(cfg, block, {"learning_rate": 0.1})


@pytest.mark.parametrize("sampler", [RandomSampler(range(60)), LengthGroupedSampler(4, lengths=list(range(60)))])
def test_the_order_of_the_rows_follows_from_the_epoch_that_begins(sampler):
    trainer = SimpleNamespace(data_collator=SimpleNamespace(), train_order=RowOrder(sampler, seed=42))
    first_epoch = list(trainer.train_order)
    assert sorted(first_epoch) == list(range(60))
    # A run that is resumed in the middle of its third epoch.
    BeginEpoch(trainer).on_epoch_begin(None, SimpleNamespace(epoch=2.4), None)
    assert (trainer.data_collator.epoch, trainer.train_order.epoch) == (2, 2)
    third_epoch = list(trainer.train_order)
    assert third_epoch != first_epoch
    assert list(trainer.train_order) == third_epoch


def test_a_single_process_gets_every_core_back_from_the_launcher(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2})
    for threads, processes in (("1", "1"), ("2", "1"), ("1", "2")):
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        monkeypatch.setenv("WORLD_SIZE", processes)
        cpu.use_all_cores()
    assert chosen == [3]


def test_a_checkpoint_is_read_onto_a_numbered_cpu(tmp_path):
    torch.save({"step": torch.ones(2)}, tmp_path / "optimizer.pt")
    for _ in range(2):
        cpu.prepare({})
    loaded = torch.load(tmp_path / "optimizer.pt", map_location=torch.device("cpu:0"), weights_only=True)
    assert loaded["step"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(("recipe_keys", "batch_size"), [({}, 8), ({"eval_batch_size": 3}, None)])
def test_validation_has_larger_batches_unless_the_recipe_says_otherwise(recipe_keys, batch_size):
    plugin = PairwisePlugin()
    plugin.resolved = recipe_keys
    arguments = plugin.get_training_args(DictDefault(micro_batch_size=2))
    assert arguments.get("per_device_eval_batch_size") == batch_size


@pytest.mark.parametrize(("deepspeed", "trained"), [(None, torch.float32), ("zero2.json", torch.bfloat16)])
def test_what_is_trained_is_held_in_float32_unless_deepspeed_does_that(deepspeed, trained):
    model = torch.nn.ModuleDict({"layer": torch.nn.Linear(4, 4), "score": torch.nn.Linear(4, 2)}).to(torch.bfloat16)
    model["layer"].requires_grad_(False)
    plugin = PairwisePlugin()
    plugin.contract = SimpleNamespace(label_token_ids=())
    plugin.block = SimpleNamespace(padding_free=False)
    plugin.post_model_load(SimpleNamespace(deepspeed=deepspeed, fsdp_config=None), model)
    assert [parameter.dtype for parameter in model.parameters()] == [torch.bfloat16] * 2 + [trained] * 2


@pytest.mark.parametrize(
    ("base_model", "is_warned_of"), [("~/models/gemma", True), ("/home/someone/gemma", True), ("/data/gemma", False)]
)
def test_a_base_model_below_the_home_folder_is_warned_of(base_model, is_warned_of, monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/someone")
    warn_of_home_path(base_model)
    assert capsys.readouterr().err.startswith("warning: base_model: ") is is_warned_of


def test_the_history_is_what_json_can_hold_of_each_step():
    log = [{"loss": 0.5, "grad_norm": math.nan, "note": "text", "step": 1}, {"train_runtime": 3.0}, {"eval_loss": 1, "step": 2}]
    assert metrics.history(log) == [{"loss": 0.5, "step": 1}, {"eval_loss": 1, "step": 2}]


def test_a_run_is_entered_with_the_recipe_and_the_commit_that_it_began_with(tmp_path, ledger_file):
    recipe = tmp_path / "recipe.yml"
    recipe.write_text("changed while it trained")
    (tmp_path / "contract.json").write_text("{}")
    (tmp_path / "metrics.json").write_text('{"accuracy": 0.7, "fold": 0, "pairs_sha256": "p"}')
    record_training(recipe, tmp_path, "pairs.parquet", recipe_sha256="at the beginning", git_commit="then", git_dirty=True)
    record_training(recipe, tmp_path, "pairs.parquet")
    first, second = ledger.read()
    assert (first["recipe_sha256"], first["git_commit"], first["git_dirty"]) == ("at the beginning", "then", True)
    assert (second["recipe_sha256"], first["pairs_sha256"], first["metrics"]) == (sha256(recipe), "p", {"accuracy": 0.7})
