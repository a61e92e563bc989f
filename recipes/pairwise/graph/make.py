"""`pairwise make R`: bring a recipe's run, package, kernel, rehearsal and report up to date, and all that they are made from.

recipes/Snakefile has the steps. Snakemake runs them: here, or with --profile on a cluster. `make demo` calls `make_targets`
with steps of its own added.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import write_json
from recipes.pairwise.graph.edges import ROOT, Graph, derive_graph
from recipes.pairwise.graph.step import visible_gpus

SNAKEMAKE = ROOT / ".venv-graph" / "bin" / "snakemake"
SNAKEFILE = ROOT / "recipes" / "Snakefile"
FOLDER = Path("outputs/.graph")
# Data files up to this size are compared by checksum, whatever their times: 100 GB, hence all of them.
LARGEST_CHECKSUM_BYTES = 10**11


@dataclass(frozen=True)
class Workflow:
    """What Snakemake is called with: the edges (see write_config), the files to make, and the steps."""

    config_file: Path
    targets: Sequence[str]
    snakefile: Path = SNAKEFILE
    profile: str | None = None  # the folder of a Snakemake profile; None for this machine


@dataclass(frozen=True)
class Step:
    """A step that is out of date: its name and command, where its output goes, and why it has to run."""

    name: str
    command: str
    log: Path
    reason: str


@click.command()
@click.argument("target", metavar="R")
@click.option("--dry-run", is_flag=True, help="Print the plan; run nothing.")
@click.option("--dag", is_flag=True, help="Print the graph, for Mermaid.")
@click.option("--cv", is_flag=True, help="Train every fold of R too, and join their predictions.")
@click.option(
    "--test", default="data/test.parquet", show_default=True, help="Rows for the rehearsal."
)
@click.option("--gpus", type=click.IntRange(min=0), help="GPUs of a machine; by default of this.")
@click.option("--profile", type=click.Path(exists=True), help="Snakemake profile of a cluster.")
@exits_with_2
def main(target: str, dry_run: bool, dag: bool, cv: bool, **settings) -> None:
    """Bring R, a recipe or a spec, up to date with everything that it is made from.

    A student's teachers are trained first, and label its rows. Where there is a spec of R's name, its
    packages and kernel are made too, and the kernel is rehearsed. recipes/profiles/slurm is a profile.
    """
    name = Path(target).stem
    graph = derive_graph(target)
    test_rows = settings["test"]
    if not Path(test_rows).is_file():
        if graph.kernels:
            click.echo(
                f"no rehearsal: {test_rows} does not exist; name another file with --test", err=True
            )
        test_rows = None

    targets = list_targets(name, graph, test_rows)
    # Without --cv, a fold is trained only if a teacher or a mean of folds needs it.
    if cv:
        targets.append(f"outputs/{name}/oof.parquet")

    config_file = write_config(name, graph, test_rows, settings["gpus"])
    workflow = Workflow(config_file, targets, profile=settings["profile"])
    if dag:
        raise SystemExit(
            call_snakemake(workflow, "--dag", "mermaid-js", "--quiet", "all").returncode
        )
    make_targets(workflow, dry_run)


def list_targets(name: str, graph: Graph, test_rows: str | None) -> list[str]:
    """List the files that Snakemake is to make of a recipe or a spec; it finds by itself what they need.

    `test_rows` is the file on which a kernel is rehearsed; None for no rehearsal.
    """
    targets = []
    if name in graph.kernels:
        targets.append(f"outputs/kernels/{name}/kernel.py")
        if test_rows is not None:
            targets.append(f"outputs/{name}/rehearsal/submission.csv")

    # An ensemble has no run, hence no report.
    if name in graph.runs:
        targets.append(f"outputs/{name}/report.html")
    return targets


def write_config(name: str, graph: Graph, test_rows: str | None, gpus: int | None = None) -> Path:
    """Write a target's graph as a file for recipes/Snakefile.

    Args:
        name: The target's name.
        graph: Its graph.
        test_rows: The rows to rehearse a kernel on; None for no rehearsal.
        gpus: The GPUs of a machine; None for those of this one.
    """
    if gpus is None:
        gpus = len(visible_gpus())
    # Snakemake's environment has nothing of this project, so the edges go over as values.
    config_file = FOLDER / f"{name}.json"
    write_json(config_file, asdict(graph) | {"test": test_rows, "gpus": gpus})
    return config_file


def make_targets(workflow: Workflow, dry_run: bool = False) -> None:
    """Run the steps that are out of date, or print them.

    Raises:
        UserError: Steps failed, or another graph is at work here. What did not need them was made.
    """
    with holding_the_graph() as lock_file:
        steps = list_outdated_steps(workflow)
        if not steps:
            print(f"up to date: {', '.join(workflow.targets)}")
            return
        if dry_run:
            for step in steps:
                print(f"{step.name:<12} {step.command}   # {step.reason}")
            return

        # The steps inherit the lock. Where only this process is killed, no other graph starts
        # while one of them is alive.
        exit_code = call_snakemake(workflow, "--quiet", "all", pass_fds=[lock_file]).returncode
        if exit_code != 0:
            steps_left = list_outdated_steps(workflow)
            raise UserError(describe_failure(steps_left))


@contextlib.contextmanager
def holding_the_graph() -> Iterator[int]:
    """Hold a lock during the block, so that no other `pairwise make` writes into this folder's outputs.

    Yields:
        The lock's file descriptor. A process that inherits it holds the lock too.

    Raises:
        UserError: Another one holds the lock.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                "another pairwise make is at work in this folder; wait for it, or stop it"
            ) from None
        yield file.fileno()


def list_outdated_steps(workflow: Workflow) -> list[Step]:
    """List the steps that Snakemake would run, a step after those that it needs.

    Raises:
        UserError: Snakemake cannot make a plan; its words are part of the message.
    """
    options = ("--dry-run", "--printshellcmds", "--quiet", "host")
    dry_run = call_snakemake(workflow, *options, capture_output=True, text=True)
    if dry_run.returncode != 0:
        # Snakemake prints what is wrong behind this line.
        explanation = dry_run.stdout.partition("Building DAG of jobs...")[2]
        words = " ".join(explanation.split())
        raise UserError(f"Snakemake cannot plan {', '.join(workflow.targets)}: {words}")
    return parse_plan(dry_run.stdout)


def parse_plan(output: str) -> list[Step]:
    """Parse what Snakemake prints of the steps that it would run: a block of `key: value` for each.

        rule train:
            output: outputs/R/contract.json, …
            log: outputs/R/logs/train.log
            reason: Missing output files: outputs/R/contract.json, …
        Shell command: … python -m recipes.pairwise.graph.step outputs/R/logs/train.log --gpus 1 -- axolotl train R.yml

    That gives the step `train`, with the command behind the two dashes and the reason "Missing output files".
    """
    steps = []
    log_file = ""
    reason = ""
    for line in output.splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "log":
            log_file = value
        elif key == "reason":
            # The names of the files, which follow, are too many to print.
            reason = value.partition(":")[0]
        elif key == "Shell command":
            # It is the last line of the block. What stands before the dashes is the call of step.py.
            command = value.split(" -- ", maxsplit=1)[1].strip()
            log = Path(log_file)
            steps.append(Step(log.stem, command, log, reason))
    return steps


def call_snakemake(workflow: Workflow, *options: str, **arguments) -> subprocess.CompletedProcess:
    """Call Snakemake.

    Raises:
        UserError: Snakemake is not installed.
    """
    if not SNAKEMAKE.is_file():
        raise UserError(f"{SNAKEMAKE}: not installed; run make .venv-graph/installed")

    gpus = json.loads(workflow.config_file.read_text())["gpus"]
    command = [str(SNAKEMAKE), "--snakefile", str(workflow.snakefile)]
    command += ["--configfile", str(workflow.config_file)]
    command += ["--cores", str(os.cpu_count()), "--resources", f"gpu={gpus}"]
    command += ["--max-checksum-file-size", str(LARGEST_CHECKSUM_BYTES)]
    # Snakemake's own locks would outlive a killed graph; holding_the_graph keeps others out.
    command += ["--nolock", "--rerun-incomplete", "--keep-going"]
    if workflow.profile is not None:
        command += ["--profile", workflow.profile]
    command += [*options, "--", *workflow.targets]

    # The steps call this project's commands by name, in this environment.
    scripts_folder = Path(sys.executable).parent
    search_path = f"{scripts_folder}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": search_path}
    return subprocess.run(command, env=environment, check=False, **arguments)


def describe_failure(steps_left: Sequence[Step]) -> str:
    """Say which of the steps that are left have failed, and which could not run because of them.

    step.py writes a record of each step that has run, R/logs/train.json beside R/logs/train.log.
    """
    failed = []
    not_run = []
    for step in steps_left:
        # A step that could not run may have a record too, of an earlier graph in which it succeeded.
        record = step.log.with_suffix(".json")
        has_failed = record.is_file() and json.loads(record.read_text())["exit_code"] != 0
        if has_failed:
            failed.append(f"{step.name} (its output is in {step.log})")
        else:
            not_run.append(step.name)

    # Where no step has failed, Snakemake itself has, and has printed why.
    if not failed:
        failed.append("Snakemake, see above")
    message = f"failed: {', '.join(failed)}"
    if not_run:
        message += f"; not made because of it: {', '.join(not_run)}"
    return f"{message}. The same command goes on from here"


if __name__ == "__main__":
    main()
