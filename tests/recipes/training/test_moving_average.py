"""The moving average of the weights: what it holds after each step, after a resume, and in a trained run."""

from types import SimpleNamespace

import pytest
from safetensors.torch import load_file
from torch import nn

from preprocess.core.files import read_json
from recipes.pairwise.training.moving_average import MovingAverage, decay_at
from tests import forked, tiny
from tests.recipes import comparable


@pytest.mark.parametrize(("step", "decay"), [(1, 2 / 11), (8, 0.5), (1000, 0.9)])
def test_the_decay_grows_to_its_value(step, decay):
    assert decay_at(step, 0.9) == decay


def run_steps(average: MovingAverage, model: nn.Module, state, arguments, weights: list[float]) -> None:
    """Train as transformers does: begin, then one step for each of the weights that the optimizer would leave."""
    average.on_train_begin(arguments, state, None, model=model)
    for weight in weights:
        model.weight.data.fill_(weight)
        state.global_step += 1
        average.on_step_end(arguments, state, None, model=model)


@pytest.fixture
def training(tmp_path):
    """A model of one weight, which is 0, the trainer's state before its first step, and its arguments."""
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    return model, SimpleNamespace(global_step=0, is_world_process_zero=True), SimpleNamespace(output_dir=tmp_path)


def test_the_weights_become_their_average_at_the_end(training):
    model, state, arguments = training
    average = MovingAverage(0.2)
    run_steps(average, model, state, arguments, [1.0, 3.0])
    average.on_train_end(arguments, state, None, model=model)
    # Step 1 keeps 2/11, which is less than the decay, and step 2 keeps 0.2.
    assert model.weight.item() == pytest.approx(0.2 * (9 / 11 * 1.0) + 0.8 * 3.0)
    assert model.weight.requires_grad


def test_a_resumed_run_goes_on_from_the_average_of_its_checkpoint(training):
    model, state, arguments = training
    whole = MovingAverage(0.9)
    run_steps(whole, model, state, arguments, [1.0, 3.0])
    (arguments.output_dir / "checkpoint-2").mkdir()
    whole.on_save(arguments, state, None)
    resumed = MovingAverage(0.9)
    run_steps(resumed, model, state, arguments, [5.0])
    # Steps 1 to 3 keep 2/11, 3/12 and 4/13 of the average.
    after_two = 3 / 12 * (9 / 11) + 9 / 12 * 3.0
    assert resumed.average["weight"].item() == pytest.approx(4 / 13 * after_two + 9 / 13 * 5.0)


def test_a_checkpoint_without_its_average_is_refused(training, capsys):
    model, state, arguments = training
    state.global_step = 4
    with pytest.raises(SystemExit) as ended:
        MovingAverage(0.9).on_train_begin(arguments, state, None, model=model)
    assert ended.value.code == 2
    assert "checkpoint-4/moving_average.safetensors: no such file" in capsys.readouterr().err


def test_a_run_ends_with_the_average_and_learns_by_focal_loss(tiny_models, tmp_path):
    """The checkpoint of the last step holds the weights and their average; the run folder the average alone."""
    recipe = comparable.twin("minilm_cls", tmp_path, tiny_models("bert"))
    block = {"focal_gamma": 2.0, "r_drop": 0.001, "ema_decay": 0.9}
    forked.train(tiny.change(recipe, block, save_strategy="steps", save_steps=4, logging_steps=1))
    run = tmp_path / "minilm_cls"
    average = load_file(run / "checkpoint-4/moving_average.safetensors")
    assert comparable.largest_difference(comparable.trained_weights(run), average) == 0
    assert comparable.largest_difference(comparable.trained_weights(run / "checkpoint-4"), average) > 0.001
    # A model that knows nothing has p = 1/2: a quarter of the cross-entropy of 0.693.
    assert read_json(run / "history.json")[0]["loss"] == pytest.approx(0.693 / 4, abs=0.03)
