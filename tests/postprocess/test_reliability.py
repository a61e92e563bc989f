"""What goes wrong while packages are made: killed processes, full disks, damaged files. Nothing half-written is left."""

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import postprocess.merge
from kaggle_kernels.runtime.package import check_manifest
from postprocess.__main__ import main
from postprocess.merge import merge
from postprocess.pipeline import package_recipe
from postprocess.stages import run_stage
from preprocess.errors import UserError
from recipes.pairwise.schema import read_recipe
from tests.postprocess import runs

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["postprocess.work", "tests.postprocess.test_reliability"])
SMALL_SHARDS = 50_000
MADE = (
    "package",
    "quantised",
    ".quantised.partial",
    "agreement.json",
    "agreement.parquet",
    "agreement.png",
    "postprocess.json",
)


def package_in_small_shards(recipe: str) -> None:
    """What a child process does: `python -m postprocess RECIPE`, with shards small enough that there are many."""
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    merge.__kwdefaults__["shard_bytes"] = 10_000
    package_recipe(read_recipe(recipe))


def start(run: runs.Made):
    process = SERVER.Process(target=package_in_small_shards, args=(str(run.recipe),))
    process.start()
    return process


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def wipe(run: runs.Made) -> None:
    for name in MADE:
        path = run.folder / name
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def kill_and_run_again(run: runs.Made, moments: int) -> None:
    """Kill the command at so many random moments of its run; each time, run again to the end: the bytes are the same."""
    first = start(run)
    first.join(120)
    assert first.exitcode == 0
    expected = hashes(run.folder / "package")
    assert len([name for name in expected if name.startswith("model-")]) > 5
    wipe(run)
    timed = start(run)  # the first has also paid for imports
    slices = 0
    while timed.is_alive():
        timed.join(0.01)
        slices += 1
    draw = random.Random(0)
    killed = 0
    for _ in range(moments):
        wipe(run)
        process = start(run)
        process.join(draw.uniform(0, slices * 0.01))
        killed += process.is_alive()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        if (run.folder / "package").exists():
            check_manifest(run.folder / "package")
        again = start(run)
        again.join(120)
        assert again.exitcode == 0
        assert hashes(run.folder / "package") == expected
        left = [path.name for path in run.folder.iterdir() if path.name.startswith(".")]
        assert left == [], left
    assert killed > moments / 2


def test_a_killed_command_that_is_run_again_gives_the_same_bytes(copied):
    kill_and_run_again(copied("gemma2", quantize="nf4"), 3)


@pytest.mark.slow
def test_killed_at_twenty_random_moments_the_bytes_are_the_same(copied):
    kill_and_run_again(copied("gemma2", quantize="nf4"), 20)


def interrupt_at_the_third_shard(monkeypatch):
    original = postprocess.merge.write_shards

    def interrupted(folder, planned, store, shard_bytes, progress):
        def stop(done):
            if len(list(folder.glob("model-*"))) >= 2:
                raise KeyboardInterrupt
            progress(done)

        original(folder, planned, store, shard_bytes, stop)

    monkeypatch.setattr("postprocess.merge.write_shards", interrupted)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("model-*.safetensors"))}


@pytest.mark.parametrize(("key", "goes_on"), [("same", True), ("other", False)])
def test_an_interrupted_merge_goes_on_at_its_shard_and_only_if_nothing_has_changed(
    key, goes_on, made, opened, tmp_path, monkeypatch
):
    run, out = opened(made("gemma2")), tmp_path / "merged"
    with monkeypatch.context() as patched:
        interrupt_at_the_third_shard(patched)
        with pytest.raises(KeyboardInterrupt):
            merge(run, out, shard_bytes=SMALL_SHARDS, key="same")
    assert not out.exists()
    before = stamps(tmp_path / ".merged.partial")
    assert len(before) >= 2
    merge(run, out, shard_bytes=SMALL_SHARDS, key=key)
    after = stamps(out)
    assert all((after[name] == before[name]) is goes_on for name in before)
    merge(run, tmp_path / "whole", shard_bytes=SMALL_SHARDS)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not (tmp_path / ".merged.partial").exists()


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(made, opened, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"merged: needs 0\.0 GB, 0\.0 GB are free; make room, then run this again"):
        merge(opened(made("gemma2")), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_one_error_and_leaves_nothing(made, opened, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="merged: cannot be written .*No space left on device.*make room on the disk"):
        merge(opened(made("gemma2")), tmp_path / "merged", shard_bytes=SMALL_SHARDS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), UserError),
        (RuntimeError("parquet: underlying IO error: No space left on device (os error 28)"), UserError),
        (RuntimeError("another"), RuntimeError),
    ],
)
def test_a_full_disk_is_one_error_whichever_library_meets_it(error, expected, tmp_path):
    def action():
        raise error

    with pytest.raises(expected) as raised:
        run_stage(tmp_path, "agreement", [], {}, tmp_path / "agreement.json", action)
    if expected is UserError:
        assert str(raised.value).startswith(f"{tmp_path}/agreement.json: cannot be written (")
        assert str(raised.value).endswith("); make room on the disk, then run this again")
    assert not (tmp_path / "postprocess.json").exists()


def test_two_commands_at_once_on_one_run_are_one_line(copied):
    run = copied("gemma2")
    with FileLock(run.folder.with_name(f".{run.folder.name}.lock")):
        result = CliRunner().invoke(main, [str(run.recipe)])
    assert result.exit_code == 2
    assert result.stderr == f"error: {run.folder}: another python -m postprocess is at work there; wait for it, or stop it\n"


def sharded_base(run: runs.Made, folder: Path) -> Path:
    """The run's base in several files, which a test may damage."""
    AutoModelForCausalLM.from_pretrained(run.base).save_pretrained(folder, max_shard_size="150KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(run.base / name, folder / name)
    runs.set_base(run, folder)
    return folder


def truncate(shard: Path) -> None:
    shard.write_bytes(shard.read_bytes()[:-100])


def put_nan_in(shard: Path) -> None:
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[3] = float("nan")
    save_file(tensors, shard, {"format": "pt"})


def put_too_large_in(shard: Path) -> None:
    tensors = load_file(shard)
    next(iter(tensors.values())).view(-1)[3] = 70_000
    save_file(tensors, shard, {"format": "pt"})


def without_head(run: runs.Made) -> None:
    file = run.folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "score" not in name}, file, {"format": "pt"})


def of_another_base(run: runs.Made) -> None:
    file = run.folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "another/model"}))


SHARDS = [
    (truncate, "model-00002-of-00003.safetensors: not a whole safetensors file"),
    (lambda shard: shard.unlink(), "model-00002-of-00003.safetensors: no such file, though the index beside it lists it"),
    (put_nan_in, "is not finite; fetch the model again"),
    (put_too_large_in, "is not finite once it is torch.float16: its values are too large"),
]
RUNS = [(without_head, "no head (score.weight) in the adapter"), (of_another_base, "an adapter of another base")]


def refused(run: runs.Made, message: str) -> None:
    result = CliRunner().invoke(main, [str(run.recipe)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1), result.output
    assert message in result.stderr
    assert not {"package", "quantised", "merged"} & {path.name for path in run.folder.iterdir()}
    assert not [path for path in run.folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("damage", "message"), SHARDS, ids=[message[-30:] for _, message in SHARDS])
def test_a_damaged_shard_of_the_base_is_named_and_nothing_is_written(damage, message, copied, tmp_path):
    run = copied("gemma2", quantize="nf4")
    base = sharded_base(run, tmp_path / "base")
    shards = sorted(base.glob("model-*.safetensors"))
    assert len(shards) == 3
    damage(shards[1])
    refused(run, message)


@pytest.mark.parametrize(("damage", "message"), RUNS, ids=[message[:20] for _, message in RUNS])
def test_an_adapter_that_cannot_be_merged_leaves_nothing(damage, message, copied):
    run = copied("gemma2", quantize="nf4")
    damage(run)
    refused(run, message)
