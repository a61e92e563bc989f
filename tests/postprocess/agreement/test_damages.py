"""Damages to a tiny model, to what it reads and to how it reads, each refused; honest packages of it pass."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import polars as pl
import pytest
import torch
from transformers import AutoTokenizer

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import read_head
from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.agreement.conditions import HOLDS, REFUSED
from postprocess.agreement.model_scores import score_column
from postprocess.agreement.slices import slice_rows
from postprocess.agreement.statistics import Column, ComparedRows
from postprocess.run_folder import Run, read_run
from postprocess.weights.merge import merge
from postprocess.weights.quantise_run import quantise_merged
from preprocess.model_input import Template
from recipes.pairwise.config.schema import read_recipe
from recipes.pairwise.data.datasets import read_pairs, winners
from tests.postprocess import runs
from tests.postprocess.agreement.test_conditions import judge

ROWS = 1000  # so many decide for honest packages too
TRAINING_ROWS = 600
STEPS = 100
BATCH_ROWS = 16
FLIPPED = 0.2  # people disagree about that many pairs


@dataclass(frozen=True)
class Scored:
    """A trained model, its run, and its probabilities of the validation rows."""

    model: torch.nn.Module
    run: Run
    tokenizer: object
    pairs: list
    column: Column
    rows: ComparedRows

    def judge(self, model, run=None, tokenizer=None):
        """The verdict on what a model makes of the same rows, and the conditions that do not hold."""
        candidate = score_column("quantised", model, run or self.run, tokenizer or self.tokenizer, self.pairs)
        return judge(self.column, candidate, self.rows)


def flip_some(winners_r: np.ndarray) -> np.ndarray:
    """Winners as noisy as people's: generated ones are so clear that a model would be surer than any real one."""
    is_flipped_r = np.random.default_rng(0).random(len(winners_r)) < FLIPPED
    return np.where(is_flipped_r, 1 - winners_r, winners_r).astype(int)


def train(model, run: Run, tokenizer, frame: pl.DataFrame) -> None:
    """Train a model's adapter and head for a few seconds, and write them into the run folder."""
    pairs = [run.model_input.pair_from_row(row) for row in frame.iter_rows(named=True)]
    sequences = [ids for (ids,) in run.model_input.encode_all(pairs, tokenizer, run.contract)]
    winners_r = torch.tensor(flip_some(winners(frame, run.contract.verdicts))).long()

    # As LoRA begins: with the base model as it is.
    change_weights(model, "lora_B", torch.Tensor.zero_)
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=0.006)
    generator = torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        batch = torch.randint(len(sequences), (BATCH_ROWS,), generator=generator)
        logits_bv = read_head(model, run.contract, [sequences[row] for row in batch], "cpu")
        loss = torch.nn.functional.cross_entropy(logits_bv, winners_r[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.save_pretrained(run.folder)


def make_scored(folder, base, seed: int) -> Scored:
    """A tiny model, trained, with its probabilities."""
    made_run = runs.make(folder, base, "gemma2", training_rows=ROWS + TRAINING_ROWS, seed=seed)
    run = read_run(read_recipe(made_run.recipe))
    tokenizer = read_tokenizer(run.folder)
    others = read_pairs(run.recipe.pairwise.pairs).filter(pl.col("fold") == 1)
    train(made_run.model, run, tokenizer, others[ROWS:])
    frame = others[:ROWS]
    pairs = [run.model_input.pair_from_row(row) for row in frame.iter_rows(named=True)]
    verdicts = run.contract.verdicts
    groups_r = np.arange(len(frame))
    winners_r = flip_some(winners(frame, verdicts))
    rows = ComparedRows(np.eye(2)[winners_r], winners_r, groups_r, slice_rows(frame, groups_r))
    column = score_column("trained", made_run.model, run, tokenizer, pairs)
    return Scored(made_run.model, run, tokenizer, pairs, column, rows)


@pytest.fixture(scope="module")
def scored(tiny_models, tmp_path_factory):
    return make_scored(tmp_path_factory.mktemp("damages"), tiny_models("gemma2"), seed=1)


def change_weights(model, pattern, change):
    with torch.no_grad():
        changed = [change(weight) for name, weight in model.named_parameters() if pattern in name]
    assert changed


def zero_the_head(model):
    change_weights(model, "modules_to_save.default.weight", torch.Tensor.zero_)


def zero_a_layer(model):
    change_weights(model, "layers.0.", torch.Tensor.zero_)


def flip_the_adapter(model):
    change_weights(model, "lora_B", torch.Tensor.neg_)


def double_the_scale(model):
    change_weights(model, "lora_B", lambda weight: weight.mul_(2))


@pytest.mark.parametrize("damage", [zero_the_head, zero_a_layer, flip_the_adapter, double_the_scale])
def test_a_model_with_other_weights_is_refused(damage, scored):
    model = copy.deepcopy(scored.model)
    damage(model)
    assert scored.judge(model)[0] == REFUSED


def test_a_model_that_reads_another_template_is_refused(scored):
    template = Template("<bos>", "{prompt}{response_a}{response_b}", "A or B?")
    contract = replace(scored.run.contract, template=template)
    assert scored.judge(scored.model, run=replace(scored.run, contract=contract))[0] == REFUSED


def test_a_model_with_another_tokenizer_is_refused(scored, tiny_models):
    tokenizer = AutoTokenizer.from_pretrained(tiny_models("qwen2"))
    assert scored.judge(scored.model, tokenizer=tokenizer)[0] == REFUSED


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 21))])
def test_honest_nf4_and_int8_packages_pass(seed, tiny_models, tmp_path):
    scored = make_scored(tmp_path, tiny_models("gemma2"), seed)
    merge(scored.run, tmp_path / "merged")
    for kind in ("nf4", "int8"):
        quantise_merged(scored.run, tmp_path / "merged", kind, tmp_path / kind)
        model = load_model(tmp_path / kind, scored.run.contract, "cpu", torch.float32)
        assert scored.judge(model) == (HOLDS, {})
