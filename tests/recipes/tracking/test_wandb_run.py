"""What a run leaves in wandb, read back from an offline run; and that nothing of wandb can hold up or end a training."""

import os
from pathlib import Path

import polars as pl
import psutil
import pytest
import yaml
from axolotl.utils.dict import DictDefault

from preprocess.core.errors import UserError
from preprocess.core.files import read_json
from recipes.pairwise.tracking import wandb_run
from tests import forked, tiny
from tests.conftest import ROOT
from tests.recipes import offline_run

KEY = "local-" + "0123456789abcdef" * 3


def train(folder: Path, base: Path, environment: dict, options: dict | None = None, **changes) -> forked.Ended:
    """Train the demo's twin on forty pairs in `folder`, where wandb writes too; `options` are the command line's."""
    pairs = tiny.pairs_parquet(folder / "pairs.parquet", 40)
    recipe = tiny.change(tiny.twin(ROOT / "recipes/demo.yml", folder, base, pairs), **changes)
    home = {"HOME": str(folder / "home"), "WANDB_DIR": str(folder)}
    return forked.axolotl("train", recipe, home | environment, **(options or {}))


@pytest.fixture(scope="module")
def tracked(tiny_models, tmp_path_factory):
    """The folder of a run that was tracked offline, on a machine with a key; evaluated every two steps and at the end."""
    folder = tmp_path_factory.mktemp("tracked")
    changes = {"wandb_project": "arena", "eval_strategy": "steps", "eval_steps": 2, "logging_steps": 1}
    environment = {"WANDB_MODE": "offline", "WANDB_API_KEY": KEY}
    ended = train(folder, tiny_models("gemma2"), environment, {"learning_rate": "0.002"}, **changes)
    assert ended.code == 0, ended.output[-3000:]
    return folder


@pytest.fixture(scope="module")
def run(tracked):
    return offline_run.read(tracked / "wandb")


def test_the_config_holds_recipe_contract_and_git(tracked, run):
    assert (run.project, run.name, run.group, run.job_type, run.has_ended) == ("arena", "demo", "demo", "train", True)
    assert run.config["recipe"] == yaml.safe_load((tracked / "demo.yml").read_text()) | {"learning_rate": 0.002}
    contract = read_json(tracked / "demo/contract.json")
    assert len(contract.pop("golden")) == 20
    assert run.config["contract"] == contract
    commit = contract["recorded"]["git_commit"]
    git = {"commit": commit.removesuffix("-dirty"), "dirty": commit.endswith("-dirty")}
    assert run.config["git"] == (git if commit != "unknown" else {"commit": None, "dirty": None})


def test_each_evaluation_is_logged_and_the_last_is_that_of_the_run_folder(tracked, run):
    evaluations = [row for row in run.history if "eval/accuracy" in row]
    assert [row["train/global_step"] for row in evaluations] == [2, 3, 3]  # the last is of the saved model
    written = read_json(tracked / "demo/metrics.json")
    assert run.summary["metrics"] == written
    for name in ("accuracy", "log_loss", "flip_rate"):
        assert evaluations[-1][f"eval/{name}"] == written[name]


def test_neither_the_key_nor_a_row_of_the_data_is_in_wandbs_files(tracked):
    prompt = pl.read_parquet(tracked / "pairs.parquet")["prompt"][0][0]
    files = [path for path in (tracked / "wandb").rglob("*") if path.is_file()]
    assert len(files) >= 3
    assert [path for path in files if KEY.encode() in path.read_bytes() or prompt.encode() in path.read_bytes()] == []


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


def test_wandb_without_a_project_is_refused():
    with pytest.raises(UserError, match="use_wandb: names no project; set wandb_project instead"):
        wandb_run.check(DictDefault({"use_wandb": True}))


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
    wandb_run.finish(folder)
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


def test_a_run_that_is_not_tracked_and_any_process_but_the_first_write_nothing(tmp_path, monkeypatch):
    wandb_run.start({"output_dir": str(tmp_path)}, {}, None)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WANDB_MODE", "online")
    cfg = DictDefault({"wandb_project": "arena", "output_dir": str(tmp_path)})
    wandb_run.check(cfg)
    wandb_run.start(cfg, {}, None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma2_cls", "gemma2_cls/fold-3", "gemma2_cls/sweep0012", "gemma2_cls/sweep0012/fold-0"])
def test_folds_and_trials_go_by_their_run_s_name(name):
    assert wandb_run.name_of(Path("outputs") / name) == name
