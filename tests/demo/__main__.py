"""`make demo`: raw rows to submission.csv in minutes, each stage a command that a user would type.

A stage runs when one of its outputs is missing or older than one of its inputs; a second demo does only what is out of
date. outputs/demo/demo.json holds the seconds of every stage, accuracy and log loss on the test rows, and the paths of the
submission and the report.
"""

import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import read_json, write_json

DEMO = Path("outputs/demo")
PAIRS = "outputs/demo/pairs.parquet"
TRAIN, TEST = "outputs/demo/input/train.parquet", "outputs/demo/input/test.parquet"
SPEC = "kaggle_kernels/specs/demo.yml"
REPORT = "outputs/demo/report.html"
PAGE = tuple(f"postprocess/report/page.{kind}" for kind in ("html.jinja", "css", "js"))


@dataclass(frozen=True)
class Stage:
    """One command. `inputs` and `outputs` are files; of a folder among the inputs, its Python files count."""

    name: str
    command: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


STAGES = (
    Stage("input", "python -m tests.tiny outputs/demo/input", ("tests/tiny.py",), (TRAIN, TEST)),
    Stage(
        "preprocess",
        f"python -m preprocess {TRAIN} --out {PAIRS} --against {TEST}",
        (TRAIN, TEST, "preprocess"),
        (PAIRS,),
    ),
    Stage(
        "train",
        "axolotl train recipes/demo.yml",
        (PAIRS, "recipes/demo.yml", "recipes/pairwise", "preprocess/model_input.py"),
        ("outputs/demo/contract.json",),
    ),
    Stage(
        "postprocess",
        "python -m postprocess recipes/demo.yml",
        ("outputs/demo/contract.json", "recipes/demo.yml", "postprocess"),
        ("outputs/demo/package/manifest.json",),
    ),
    Stage(
        "build",
        f"python -m kaggle_kernels build {SPEC}",
        (SPEC, "kaggle_kernels", "recipes/demo.yml", "recipes/pairwise", "postprocess"),
        ("outputs/kernels/demo/kernel.py", "outputs/demo/logs/build.log"),
    ),
    Stage(
        "rehearse",
        f"python -m kaggle_kernels rehearse {SPEC} --test {TEST}",
        ("outputs/demo/package/manifest.json", "outputs/kernels/demo/kernel.py", TEST),
        ("outputs/demo/rehearsal/submission.csv", "outputs/demo/rehearsal/rehearsal.json"),
    ),
    Stage(
        "report",
        "python -m postprocess.report outputs/demo",
        ("outputs/demo/contract.json", "outputs/demo/agreement.json", *PAGE, "postprocess"),
        (REPORT,),
    ),
)


def is_current(stage: Stage) -> bool:
    """Whether every output is there and none is older than an input."""
    outputs = [Path(name) for name in stage.outputs]
    inputs = [file for name in stage.inputs for file in (Path(name).rglob("*.py") if Path(name).is_dir() else [Path(name)])]
    if not all(file.exists() for file in (*outputs, *inputs)):
        return False
    oldest = min(output.stat().st_mtime_ns for output in outputs)
    return all(file.stat().st_mtime_ns <= oldest for file in inputs)


def run(stage: Stage, log: Path) -> float:
    """Run a stage, its output in `log`; seconds taken. A failure shows the log's end and is a UserError."""
    started = time.monotonic()
    running = log.with_suffix(".running")
    with running.open("w") as file:
        code = subprocess.run(stage.command.split(), stdout=file, stderr=subprocess.STDOUT, check=False).returncode
    if code:
        print("\n".join(running.read_text(errors="replace").splitlines()[-15:]))
        raise UserError(f"{stage.name}: `{stage.command}` ended with exit code {code}; its whole output is in {running}")
    running.replace(log)
    return round(time.monotonic() - started, 1)


@exits_with_2
def main() -> None:
    """Run what is out of date, then write and print the result."""
    logs = DEMO / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    seconds = json.loads((DEMO / "demo.json").read_text())["stages"] if (DEMO / "demo.json").exists() else {}
    for stage in STAGES:
        if is_current(stage):
            print(f"{stage.name:<12} up to date   {stage.command}")
            continue
        if sys.stdout.isatty():
            print(f"{stage.name:<12} …            {stage.command}", end="\r", flush=True)
        seconds[stage.name] = run(stage, logs / f"{stage.name}.log")
        print(f"{stage.name:<12} {seconds[stage.name]:>6.1f} s     {stage.command}", flush=True)
    rehearsal = read_json(DEMO / "rehearsal" / "rehearsal.json")
    submission = DEMO / "rehearsal" / "submission.csv"
    result = {
        "stages": seconds,
        "accuracy": rehearsal["accuracy"],
        "log_loss": rehearsal["log_loss"],
        "submission": str(submission),
        "report": REPORT,
    }
    write_json(DEMO / "demo.json", result)
    print(f"accuracy {result['accuracy']:.3f}, log loss {result['log_loss']:.3f} on the test rows; submission: {submission}")
    print(f"report: {REPORT}")


if __name__ == "__main__":
    sys.exit(main())
