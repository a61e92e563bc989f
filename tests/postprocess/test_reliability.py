"""What goes wrong while packages are made: killed processes, full disks, damaged files. Nothing half-written is left."""

import contextlib
import errno
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from filelock import FileLock

import postprocess.weights.merge
from kaggle_kernels.runtime.package import check_manifest
from postprocess.pipeline import package_recipe
from postprocess.run_folder import read_run
from postprocess.weights.merge import merge
from postprocess.weights.quantise_run import quantise_merged
from preprocess.core.errors import UserError
from preprocess.core.files import resumable_folder
from recipes.pairwise.config.schema import read_recipe
from tests.postprocess import runs

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["postprocess.agreement.gate", "tests.postprocess.test_reliability"])
SMALL_SHARDS = 50_000
CUT_BYTES = 3000
FILE_EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "shutil.rmtree")


def cut_writes() -> None:
    """No file may become longer from now on: the system kills the process in the middle of a write."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (CUT_BYTES, resource.RLIM_INFINITY))


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def package_in_small_shards(recipe: str, folder: str, events, kill_at: int | None, end) -> None:
    """What a child process does: `python -m postprocess RECIPE`, with shards small enough that there are many.

    It counts what it does to files of the run: between two of these events, the disk changes by one write at most. At
    number `kill_at` of them it calls `end`.
    """
    torch.set_num_threads(1)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    merge.__kwdefaults__["shard_bytes"] = 10_000

    def count_event(event: str, arguments: tuple) -> None:
        if event in FILE_EVENTS and str(arguments[0]).startswith(folder):
            events.value += 1
            if events.value == kill_at:
                end()

    sys.addaudithook(count_event)
    package_recipe(read_recipe(recipe))


def package(run: runs.Made, kill_at: int | None = None, end=kill_self) -> tuple[int, int]:
    """Package a run in a child process; its exit code and the number of events."""
    events = SERVER.Value("i", 0)
    arguments = (str(run.recipe), str(run.folder), events, kill_at, end)
    process = SERVER.Process(target=package_in_small_shards, args=arguments)
    process.start()
    process.join()
    return process.exitcode, events.value


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}


def wipe(folder: Path, kept: set[Path]) -> None:
    """Remove what was not in a folder before."""
    for path in set(folder.iterdir()) - kept:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("end", "moments", "exit_code"),
    [(cut_writes, 2, -signal.SIGXFSZ), pytest.param(kill_self, 20, -signal.SIGKILL, marks=pytest.mark.slow)],
    ids=["in the middle of a write", "at random moments"],
)
def test_a_killed_command_that_is_run_again_gives_the_same_bytes(end, moments, exit_code, copied):
    run = copied("gemma2", quantize="nf4")
    trained = set(run.folder.iterdir())
    undisturbed, event_count = package(run)
    assert (undisturbed, event_count > 50) == (0, True)
    expected = hashes(run.folder / "package")
    assert len([name for name in expected if name.startswith("model-")]) > 5

    for kill_at in sorted(random.Random(1).sample(range(1, event_count), moments)):
        wipe(run.folder, trained)
        assert package(run, kill_at, end)[0] == exit_code
        if (run.folder / "package").exists():
            check_manifest(run.folder / "package")
        assert package(run)[0] == 0
        assert hashes(run.folder / "package") == expected
        assert [path.name for path in run.folder.iterdir() if path.name.startswith(".")] == []


def interrupt_at_the_third_shard(monkeypatch):
    original = postprocess.weights.merge.write_shards

    def interrupted(folder, planned, store, shard_bytes, progress):
        def stop(done):
            if len(list(folder.glob("model-*"))) >= 2:
                raise KeyboardInterrupt
            progress(done)

        original(folder, planned, store, shard_bytes, stop)

    monkeypatch.setattr("postprocess.weights.merge.write_shards", interrupted)


def stamps(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in sorted(folder.glob("model-*.safetensors"))}


def test_an_interrupted_merge_goes_on_at_its_shard(made, opened, tmp_path, monkeypatch):
    run, out, working = opened(made("gemma2")), tmp_path / "merged", tmp_path / ".merged.partial"
    with monkeypatch.context() as patched:
        interrupt_at_the_third_shard(patched)
        with pytest.raises(KeyboardInterrupt):
            merge(run, out, shard_bytes=SMALL_SHARDS, key="same")
    assert not out.exists()
    before = stamps(working)
    assert len(before) >= 2
    for name in (".model.safetensors.index.json.123.tmp", ".model-00001-of-00009.safetensors.tmp"):
        (working / name).write_text("half-written when it was killed")

    merge(run, out, shard_bytes=SMALL_SHARDS, key="same")
    after = stamps(out)
    assert {name: after[name] for name in before} == before
    merge(run, tmp_path / "whole", shard_bytes=SMALL_SHARDS)
    assert hashes(out) == hashes(tmp_path / "whole")
    assert not working.exists()


def test_room_is_asked_for_what_is_still_to_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, 600))
    for key, size in (("first", 500), ("first", 1500)):
        with contextlib.suppress(KeyboardInterrupt), resumable_folder(tmp_path / "out", key, size) as folder:
            (folder / "shard").write_bytes(b"x" * 1000)
            raise KeyboardInterrupt
    with pytest.raises(UserError, match="needs"), resumable_folder(tmp_path / "out", "other", 1500):
        pass


def test_a_merge_of_another_training_does_not_go_on_with_the_shards_of_the_first(copied, monkeypatch):
    run = copied("gemma2", quantize="nf4", tolerance=0.5)
    monkeypatch.setitem(merge.__kwdefaults__, "shard_bytes", 10_000)
    with monkeypatch.context() as patched:
        interrupt_at_the_third_shard(patched)
        assert runs.invoke(run.recipe).exit_code == 1
    assert len(stamps(run.folder / "..merged.partial")) >= 2
    runs.set_json(run.folder / "adapter_config.json", lora_alpha=17)
    runs.succeed(run.recipe)
    opened_run = read_run(read_recipe(run.recipe))
    merge(opened_run, run.folder / "merged-again")
    quantise_merged(opened_run, run.folder / "merged-again", "nf4", run.folder / "whole")
    assert hashes(run.folder / "quantised") == hashes(run.folder / "whole")


def test_models_that_no_longer_belong_to_the_recipe_are_removed(copied):
    run = copied("gemma2", quantize="nf4")
    for name in ("unmerged", "quantised-2", ".merged.partial"):
        (run.folder / name).mkdir()
    runs.succeed(run.recipe, "--keep-merged")
    assert {"merged", "quantised"} <= {path.name for path in run.folder.iterdir()}
    runs.succeed(run.recipe)
    assert (run.folder / "merged").exists()  # it is what --keep-merged made, and up to date
    runs.set_json(run.folder / "adapter_config.json", lora_alpha=17)
    runs.succeed(run.recipe)
    assert not {"merged", "unmerged", "quantised-2", ".merged.partial"} & {path.name for path in run.folder.iterdir()}


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


def test_two_commands_at_once_on_one_run_are_one_line(copied):
    run = copied("gemma2")
    with FileLock(run.folder.with_name(f".{run.folder.name}.lock")):
        error = runs.refuse(run.recipe)
    advice = "wait until it has ended, or stop it"
    assert error == f"error: {run.folder}: another python -m postprocess is at work in this folder; {advice}\n"
