"""`pairwise make` with the real Snakemake and Snakefile, and stand-ins of the steps' commands: what runs, and what does not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.conftest import ROOT


def test_a_spec_is_made_from_its_recipe_to_the_rehearsal_and_then_by_content(workplace, capfd):
    workplace.write_recipe("small")
    workplace.write_spec("small", "small")
    (workplace.folder / "data/test.parquet").touch()

    plan = workplace.make("small", "--dry-run")
    steps = [line.split()[0] for line in plan.stdout.splitlines()]
    assert sorted(steps) == ["build", "postprocess", "rehearse", "report", "train"]
    assert steps[:2] == ["train", "postprocess"]
    assert plan.calls == []
    assert workplace.make("small", "--dag").calls == []
    assert "flowchart" in capfd.readouterr().out

    chain = ["train outputs/small", "postprocess recipes/small.yml", "build small", "rehearse small", "report outputs/small"]
    first = workplace.make("small")
    assert (first.exit_code, first.calls) == (0, chain), first.output
    again = workplace.make("small")
    assert (again.exit_code, again.calls) == (0, [])
    assert again.stdout.startswith("up to date: outputs/kernels/small/kernel.py, ")

    # A checkout, or a copy of the data, gives files of the same content another time.
    for name in ("recipes/small.yml", "kaggle_kernels/specs/small.yml", "data/pairs.parquet", "data/test.parquet"):
        os.utime(workplace.folder / name)
    assert workplace.make("small").calls == []

    # How a run is packaged does not change the run, nor does a comment.
    recipe = workplace.folder / "recipes/small.yml"
    recipe.write_text("# Score: 0.7\n" + recipe.read_text().replace("nf4", "int8"))
    assert workplace.make("small").calls == chain[1:]


def test_a_student_is_trained_on_the_labels_of_its_teachers_folds(workplace):
    workplace.write_recipe("teacher")
    workplace.write_recipe("student", pairwise={"distill": {"teachers": ["teacher"]}})
    calls = workplace.make("student").calls
    folds = [f"train outputs/teacher/fold-{fold}" for fold in range(2)]
    rest = ["labels recipes/teacher.yml", "train outputs/student", "report outputs/student"]
    assert (sorted(calls[:2]), calls[2:]) == (folds, rest)
    assert workplace.make("student").calls == []

    workplace.write_recipe("teacher", max_steps=61)
    calls = workplace.make("student").calls
    assert (sorted(calls[:2]), calls[2:]) == (folds, rest)


def test_a_run_that_was_trained_by_hand_is_taken_as_it_is(workplace):
    workplace.write_recipe("small")
    environment = os.environ | {"PAIRWISE_FOLD": ""}
    subprocess.run(["axolotl", "train", "recipes/small.yml"], env=environment, check=True)
    assert workplace.make("small").calls == ["report outputs/small"]


def test_a_model_on_a_merged_model_is_not_trained_again_because_packaging_ran(workplace):
    workplace.write_recipe("first")
    workplace.write_recipe("second", base_model="outputs/first/merged")
    calls = workplace.make("second").calls
    assert calls[:3] == ["train outputs/first", "postprocess recipes/first.yml --keep-merged", "train outputs/second"]

    workplace.write_recipe("first", pairwise={"package": {"quantize": "int8", "slug": "pairwise-first"}})
    assert workplace.make("second").calls == ["postprocess recipes/first.yml --keep-merged"]
    workplace.write_recipe("first", max_steps=61)
    assert "train outputs/second" in workplace.make("second").calls


def test_the_mean_of_the_folds_is_packaged_where_a_spec_serves_it(workplace):
    workplace.write_recipe("small")
    workplace.write_spec("mean", "small/mean")
    result = workplace.make("mean")
    folds = [f"train outputs/small/fold-{fold}" for fold in range(2)]
    adapters = " ".join(f"--adapter outputs/small/fold-{fold}" for fold in range(2))
    assert sorted(result.calls[:2]) == folds
    assert result.calls[2:] == [f"postprocess recipes/small.yml {adapters}", "build mean"]
    assert "no rehearsal: data/test.parquet does not exist" in result.output


def test_runs_that_need_each_other_are_one_error(workplace):
    workplace.write_recipe("small", base_model="outputs/big/merged")
    workplace.write_recipe("big", base_model="outputs/small/merged")
    result = workplace.make("small")
    assert (result.exit_code, result.calls) == (2, [])
    assert "error: Snakemake cannot plan outputs/small/report.html: CyclicGraphException" in result.output


def test_when_a_step_fails_the_others_go_on_and_the_end_says_what_is_missing(workplace):
    for name in ("good", "bad"):
        workplace.write_recipe(name)
    workplace.write_spec("both", "good", "bad")
    (workplace.folder / "bad.fails").touch()

    result = workplace.make("both")
    assert result.exit_code == 2
    assert "postprocess recipes/good.yml" in result.calls
    assert (
        "error: failed: train (its output is in outputs/bad/logs/train.log); "
        "not made because of it: postprocess, build. The same command goes on from here"
    ) in result.output
    (workplace.folder / "bad.fails").unlink()
    assert workplace.make("both").calls == ["train outputs/bad", "postprocess recipes/bad.yml", "build both"]


def test_folds_run_side_by_side_each_on_a_free_gpu(workplace, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    workplace.write_recipe("small")
    calls = workplace.make("small", "--cv").calls
    folds = [call.split() for call in calls if call.startswith("train")]
    assert sorted(folder for _, folder, _ in folds) == ["outputs/small", *(f"outputs/small/fold-{n}" for n in range(2))]
    assert {gpu for _, _, gpu in folds} == {"4", "6"}
    assert (workplace.folder / "outputs/small/oof.parquet").exists()


def wait_until(condition, seconds: float = 30):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_graph_goes_on_where_it_was(workplace):
    workplace.write_recipe("small")
    workplace.make("small")
    (workplace.folder / "outputs/small/report.html").unlink()
    workplace.write_recipe("small", max_steps=61)
    (workplace.folder / "small.waits").touch()
    calls = workplace.folder / "calls.txt"
    calls.unlink()

    command = [sys.executable, "-m", "recipes.pairwise.graph.make", "small"]
    graph = subprocess.Popen(command, start_new_session=True)
    wait_until(calls.exists)
    # While it is at work no other starts, also where only its first process was killed.
    os.kill(graph.pid, signal.SIGKILL)
    graph.wait(timeout=30)
    other = workplace.make("small")
    assert other.exit_code == 2
    assert "another pairwise make is at work in this folder" in other.output

    os.killpg(graph.pid, signal.SIGKILL)
    (workplace.folder / "small.waits").unlink()
    wait_until(lambda: "at work" not in workplace.make("small", "--dry-run").output)
    result = workplace.make("small")
    assert (result.exit_code, result.calls) == (0, ["train outputs/small", "report outputs/small"]), result.output
    assert not list(Path(workplace.folder).glob(".snakemake/locks/*"))


def test_slurm_gets_each_step_by_sbatch(workplace, monkeypatch):
    """A stand-in of sbatch runs the script at once and prints a job's number, as --parsable does."""
    sbatch = workplace.folder / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text('#!/bin/bash\necho "$@" >> sbatch.txt\nSLURM_JOB_ID=7 bash "${@: -1}" > slurm.log 2>&1\necho 7\n')
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}{os.pathsep}{os.environ['PATH']}")
    workplace.write_recipe("small", deepspeed="recipes/deepspeed/zero2.json")
    (workplace.folder / "recipes/deepspeed").symlink_to(ROOT / "recipes/deepspeed")

    profile = (ROOT / "recipes/profiles/slurm/config.yaml").read_text()
    (workplace.folder / "config.yaml").write_text(profile + "seconds-between-status-checks: 1\n")

    result = workplace.make("small", "--gpus", "8", "--profile", str(workplace.folder))
    log = workplace.folder / "slurm.log"
    assert result.exit_code == 0, result.output + (log.read_text() if log.exists() else "")
    assert result.calls == ["train outputs/small", "report outputs/small"]
    submissions = (workplace.folder / "sbatch.txt").read_text().splitlines()
    assert [line.split()[1:3] for line in submissions] == [["--job-name=train", "--gpus=8"], ["--job-name=report", "--gpus=0"]]
