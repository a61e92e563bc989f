"""What a run leaves in wandb, read back from an offline run; and that nothing of wandb can hold up or end a training."""

import base64
import hashlib
import math
import os
from pathlib import Path

import numpy as np
import polars as pl
import psutil
import pytest
import yaml
from axolotl.utils.dict import DictDefault

from preprocess.core.errors import UserError
from preprocess.core.files import read_json, write_json
from recipes.pairwise.config.schema import recipe_problems
from recipes.pairwise.tracking import metrics, wandb_run
from tests import forked, tiny
from tests.conftest import ROOT
from tests.recipes import offline_run
from tests.recipes.config.test_schema import GOOD

KEY = "local-" + "0123456789abcdef" * 3


def train(folder: Path, base: Path, environment: dict, options: dict | None = None, **changes) -> forked.Ended:
    """Train the demo's twin on forty pairs in `folder`, where wandb writes too; `options` are the command line's."""
    pairs = tiny.pairs_parquet(folder / "pairs.parquet", 40)
    recipe = tiny.twin(ROOT / "recipes/demo.yml", folder, base, pairs)
    recipe.write_text(yaml.safe_dump(yaml.safe_load(recipe.read_text()) | changes))
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


def test_each_evaluation_is_logged_with_its_groups_and_the_last_is_that_of_the_run_folder(tracked, run):
    evaluations = [row for row in run.history if "eval/accuracy" in row]
    assert [row["train/global_step"] for row in evaluations] == [2, 3, 3]  # the last is of the saved model
    last = evaluations[-1]
    written = read_json(tracked / "demo/metrics.json")
    assert run.summary["metrics"] == written
    for name in ("accuracy", "log_loss", "flip_rate"):
        assert last[f"eval/{name}"] == written[name]
        assert last[f"eval/{name}/source/tiny"] == pytest.approx(written[name])
    assert "eval/accuracy/language/Chinese" in last

    table = offline_run.table(tracked / "wandb", run, "worst_rows")
    predictions = pl.read_parquet(tracked / "demo/predictions.parquet")
    assert sorted(row["id"] for row in table) == predictions["id"].to_list()
    assert sum(row["loss"] for row in table) / len(table) == pytest.approx(written["log_loss"])


def test_artifacts_name_the_run_s_files_without_their_bytes_and_the_key_is_in_no_file(tracked, run):
    artifact = {entry.path: entry for entry in run.artifacts["demo-run"]}
    assert {"adapter_model.safetensors", "contract.json", "predictions.parquet", "recipe.yml"} <= artifact.keys()
    for name, entry in artifact.items():
        file = tracked / "demo" / name
        digest = base64.b64encode(hashlib.md5(file.read_bytes()).digest()).decode()
        assert (entry.ref, entry.digest, entry.local_path) == (file.as_uri(), digest, "")
    files = [path for path in tracked.rglob("*") if path.is_file()]
    assert len(files) > 20
    assert [path for path in files if KEY.encode() in path.read_bytes()] == []


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
    pairs = tiny.pairs_parquet(folder / "pairs.parquet", 2)
    wandb_run.log_groups(str(pairs), ["row00000"], np.full((1, 2, 2), 0.5), np.array([[1.0, 0.0]]), np.array([0]))
    wandb_run.finish(folder, str(pairs), ("model_a", "model_b"))
    silent = "silent" if callback._wandb is None else "not silent"
    return f"wandb.log raises {raised}; the rest went on, and the callback is {silent}"


def test_the_package_is_a_run_beside_the_training_s_with_its_files_by_reference(tmp_path):
    folder, package = tmp_path / "R" / "fold-1", tmp_path / "R" / "fold-1" / "package"
    package.mkdir(parents=True)
    (package / "manifest.json").write_text("{}")
    (package / "model.safetensors").write_bytes(b"weights")
    tracked = {"entity": None, "project": "arena", "id": "abc", "name": "R/fold-1", "mode": "offline"}
    write_json(folder / "wandb.json", tracked)
    assert in_a_process(_log_package, tmp_path, {"WANDB_MODE": "", "WANDB_DIR": str(tmp_path)}) == "logged"
    run = offline_run.read(tmp_path / "wandb")
    assert (run.project, run.name, run.group, run.job_type) == ("arena", "R/fold-1/package", "R", "package")
    assert (run.config["run"], run.config["manifest_sha256"]) == ("abc", hashlib.sha256(b"{}").hexdigest())
    files = {entry.path: (entry.ref, entry.size, entry.local_path) for entry in run.artifacts["R-fold-1-package"]}
    assert files == {
        "manifest.json": ((package / "manifest.json").as_uri(), 2, ""),
        "model.safetensors": ((package / "model.safetensors").as_uri(), 7, ""),
    }


def _log_package(folder: Path) -> str:
    wandb_run.log_package(folder / "R/fold-1", folder / "R/fold-1/package")
    return "logged"


def in_a_process(function, folder: Path, environment: dict) -> str:
    """What `function(folder)` returns in a process of its own: wandb keeps its settings and service for a process's life."""
    home = {"HOME": str(folder / "home"), "WANDB_API_KEY": ""}
    process = forked.SERVER.Process(target=_into_a_file, args=(function, folder, home | environment))
    process.start()
    process.join(timeout=120)
    return (folder / "returned").read_text()


def _into_a_file(function, folder: Path, environment: dict) -> None:
    os.environ |= environment
    for name in [name for name, value in environment.items() if not value]:
        del os.environ[name]
    (folder / "returned").write_text(function(folder))


def test_a_run_that_is_not_tracked_and_any_process_but_the_first_write_nothing(tmp_path, monkeypatch):
    (tmp_path / "wandb.json").write_text("{}")  # of an earlier run in this folder
    wandb_run.start({"output_dir": str(tmp_path)}, {}, None)
    assert list(tmp_path.iterdir()) == []

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WANDB_MODE", "online")
    cfg = DictDefault({"wandb_project": "arena", "output_dir": str(tmp_path)})
    wandb_run.check(cfg)
    wandb_run.start(cfg, {}, None)
    assert not wandb_run.is_on()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["gemma2_cls", "gemma2_cls/fold-3", "gemma2_cls/sweep0012", "gemma2_cls/sweep0012/fold-0"])
def test_folds_and_trials_go_by_their_run_s_name(name):
    assert wandb_run.name_of(Path("outputs") / name) == name


def test_metrics_by_group_are_of_that_group_and_left_out_where_they_mean_nothing():
    both = np.array([[[0.9, 0.1], [0.8, 0.2]], [[0.6, 0.4], [0.3, 0.7]], [[0.5, 0.5], [0.5, 0.5]]])
    labels, winners = np.array([[1.0, 0.0], [1.0, 0.0], [0.5, 0.5]]), np.array([0, 0, -1])
    values = metrics.by_group({"language": np.array(["en", "fr", "tie"])}, both, labels, winners)
    assert values == {
        "accuracy/language/en": 1.0,
        "log_loss/language/en": pytest.approx(-math.log(0.85)),
        "flip_rate/language/en": 0.0,
        "accuracy/language/fr": 0.0,
        "log_loss/language/fr": pytest.approx(-math.log(0.45)),
        "flip_rate/language/fr": 1.0,
        "log_loss/language/tie": pytest.approx(math.log(2)),
        "flip_rate/language/tie": 0.0,
    }


def test_beyond_the_thirty_largest_languages_is_other(tmp_path):
    languages = [f"language {number:02d}" for number in range(35)]
    counts = [2] * 29 + [1] * 6
    rows = pl.DataFrame({"language": languages, "count": counts}).select(pl.col("language").repeat_by("count").explode())
    rows = rows.with_columns(id=pl.int_range(pl.len()).cast(pl.String))
    rows.write_parquet(tmp_path / "pairs.parquet")
    values = wandb_run.groups(str(tmp_path / "pairs.parquet"), rows["id"].to_list()[::-1])
    assert list(values) == ["language"]
    assert values["language"].tolist() == ["other"] * 5 + rows["language"].to_list()[-6::-1]


def test_the_worst_rows_are_those_of_the_greatest_loss_against_soft_labels_texts_shortened():
    ids = [f"{number:03d}" for number in range(202)]
    orders = {f"p_{verdict}_{order}": [0.5] * 202 for verdict in ("model_a", "model_b", "tie") for order in metrics.ORDERS}
    means = {"p_model_a": [0.2, 0.9] + [0.6] * 200, "p_model_b": [0.8, 0.1] + [0.4] * 200, "p_tie": [0.0] * 202}
    predictions = pl.DataFrame({"id": ids, "fold": [0] * 202, "winner": ["model_a"] * 202} | means | orders)
    columns = {
        "id": ids,
        "winner": ["model_a", "tie"] + ["model_a"] * 200,
        "prompt": [["first", None, "third"], ["x" * 401]] + [["same"]] * 200,
        "response_a": [["a"]] * 202,
        "response_b": [["b"]] * 202,
        "p_model_a": [0.75, 0.0] + [1.0] * 200,
        "p_model_b": [0.25, 0.0] + [0.0] * 200,
        "p_tie": [0.0, 1.0] + [0.0] * 200,
    }
    worst = wandb_run.worst_rows(predictions, pl.DataFrame(columns), ("model_a", "model_b"))
    assert worst["id"].to_list() == ["000", "001", *ids[2:200]]
    losses = [-0.75 * math.log(0.2) - 0.25 * math.log(0.8), -0.5 * math.log(0.9) - 0.5 * math.log(0.1), -math.log(0.6)]
    assert worst["loss"][:3].to_list() == pytest.approx(losses)
    assert worst["winner"][:2].to_list() == ["model_a", "tie"]
    assert worst["prompt"][:3].to_list() == ["first\n\n\n\nthird", "x" * 400 + "…", "same"]
    assert worst["p_model_b_swapped"][0] == 0.5


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
