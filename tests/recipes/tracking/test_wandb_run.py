"""What a run leaves in wandb, and that nothing of wandb can hold up or end a training."""

import os
from pathlib import Path

import polars as pl
import psutil
import pytest
import yaml
from axolotl.utils.dict import DictDefault

from preprocess.core.errors import UserError
from recipes.pairwise.config.schema import recipe_problems
from recipes.pairwise.tracking import wandb_run
from tests import forked, tiny
from tests.conftest import ROOT
from tests.recipes.config.test_schema import GOOD

KEY = "local-" + "0123456789abcdef" * 3


def train(folder: Path, base: Path, environment: dict, **changes) -> forked.Ended:
    """Train the demo's twin on forty pairs in `folder`, where wandb writes too."""
    pairs = tiny.pairs_parquet(folder / "pairs.parquet", 40)
    recipe = tiny.twin(ROOT / "recipes/demo.yml", folder, base, pairs)
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))
    home = {"HOME": str(folder / "home"), "WANDB_DIR": str(folder)}
    return forked.axolotl("train", recipe, home | environment)


def test_a_tracked_run_logs_every_evaluation_and_neither_the_key_nor_a_row_of_the_data(tiny_models, tmp_path):
    changes = {"wandb_project": "arena", "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    ended = train(tmp_path, tiny_models("gemma2"), {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}, **changes)
    assert ended.code == 0, ended.output[-3000:]
    [record] = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    content = record.read_bytes()
    # After two steps, after the last one, and of the saved model.
    assert content.count(b"eval/flip_rate") >= 3
    prompt = pl.read_parquet(tmp_path / "pairs.parquet")["prompt"][0][0]
    for file in (tmp_path / "wandb").rglob("*"):
        assert not file.is_file() or not any(secret in file.read_bytes() for secret in (KEY.encode(), prompt.encode()))


def test_a_recipe_without_a_project_says_nothing_of_wandb_and_leaves_nothing(tiny_models, tmp_path):
    ended = train(tmp_path, tiny_models("gemma2"), {"WANDB_MODE": "online", "WANDB_API_KEY": KEY, "WANDB_PROJECT": "mine"})
    assert ended.code == 0, ended.output[-3000:]
    assert [line for line in ended.output.replace(str(tmp_path), "").splitlines() if "wandb" in line.lower()] == []
    assert [path for path in tmp_path.rglob("*wandb*")] == []


def test_without_a_login_the_run_ends_with_2_and_one_line_before_anything_is_read(tiny_models, tmp_path):
    ended = train(tmp_path, tiny_models("gemma2"), {"WANDB_MODE": "online"}, wandb_project="arena")
    assert ended.code == 2
    message = "demo.yml: wandb_project: arena, but nobody is logged in to wandb: run `wandb login`, or set WANDB_MODE=offline"
    assert ended.output.strip().splitlines()[-1].startswith(f"error: {tmp_path}/{message}")
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize(
    ("environment", "outcome"),
    [
        ({"WANDB_MODE": "offline"}, "ready"),
        ({"WANDB_MODE": "disabled"}, "ready"),
        ({"WANDB_MODE": "ofline"}, "wandb: mode: Input should be 'online', 'offline', "),
        ({"WANDB_MODE": "online", "WANDB_API_KEY": "secret"}, "wandb: WANDB_API_KEY invalid: API key must have 40+ characters"),
    ],
)
def test_only_an_online_run_needs_a_login_and_a_refused_setting_is_one_line_without_the_key(tmp_path, environment, outcome):
    checked = in_a_process(_check, tmp_path, environment)
    assert checked.startswith(outcome)
    assert "secret" not in checked


def _check(folder: Path) -> str:
    try:
        wandb_run.check(DictDefault({"wandb_project": "arena"}))
    except UserError as error:
        return str(error)
    return "ready"


def test_when_wandb_s_process_dies_the_training_goes_on(tmp_path):
    """wandb's own calls raise ConnectionResetError then; transformers' callback would hand that on to the training."""
    found = in_a_process(_log_after_the_end_of_wandb, tmp_path, {"WANDB_MODE": "offline"})
    assert found == "wandb.log raises ConnectionResetError; the rest went on, and the callback is silent"


def _log_after_the_end_of_wandb(folder: Path) -> str:
    import wandb
    from transformers import TrainerControl, TrainerState, TrainingArguments

    wandb.init(project="arena", mode="offline", dir=folder)
    arguments, state, control = TrainingArguments(output_dir=str(folder)), TrainerState(), TrainerControl()
    callback = wandb_run.HarmlessCallback()
    callback.on_train_begin(arguments, state, control, model=None)
    (service,) = (child for child in psutil.Process().children() if "wandb-core" in child.name())
    service.kill()
    service.wait()
    try:
        wandb.run.log({"a": 1})
        raised = "nothing"
    except Exception as error:
        raised = type(error).__name__
    callback.on_log(arguments, state, control, logs={"loss": 1.0})
    callback.on_train_end(arguments, state, control)
    wandb_run.finish()
    silent = "silent" if callback._wandb is None else "not silent"
    return f"wandb.log raises {raised}; the rest went on, and the callback is {silent}"


def in_a_process(function, folder: Path, environment: dict) -> str:
    """What `function(folder)` returns in a process of its own: wandb keeps its settings and service for a process's life."""
    home = {"HOME": str(folder / "home"), "WANDB_API_KEY": ""}
    process = forked.SERVER.Process(target=_into_a_file, args=(function, folder, home | environment))
    process.start()
    process.join(timeout=400)
    return (folder / "returned").read_text()


def _into_a_file(function, folder: Path, environment: dict) -> None:
    os.environ |= environment
    for name in [name for name, value in environment.items() if not value]:
        del os.environ[name]
    (folder / "returned").write_text(function(folder))


@pytest.mark.parametrize("name", ["gemma2_cls", "gemma2_cls/fold-3", "gemma2_cls/sweep0012", "gemma2_cls/sweep0012/fold-0"])
def test_folds_and_trials_go_by_their_run_s_name(name, monkeypatch):
    monkeypatch.setenv("WANDB_RUN_GROUP", "")
    monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "5")
    cfg = {"wandb_project": "arena", "output_dir": f"outputs/{name}"}
    wandb_run.name_run(cfg)
    assert (cfg["wandb_name"], os.environ["WANDB_RUN_GROUP"]) == (name, "gemma2_cls")

    named = cfg | {"wandb_name": "mine"}
    wandb_run.name_run(named)
    assert named["wandb_name"] == "mine"


@pytest.mark.parametrize(
    ("keys", "problem"),
    [
        ({"wandb_name": "first"}, "wandb_name: means nothing without a project; set wandb_project, or remove the key"),
        ({"wandb_project": "a", "wandb_api_key": KEY}, "wandb_api_key: unknown key"),
        ({"comet_api_key": KEY}, "comet_api_key: refused, a file is no place for a secret"),
    ],
)
def test_keys_of_wandb_in_a_recipe(keys, problem):
    (line,) = recipe_problems(GOOD | keys)
    assert line.startswith(problem)
    assert KEY not in line
