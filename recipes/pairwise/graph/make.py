"""`pairwise make R`: bring a recipe's run, package, kernel, rehearsal and report up to date, and all that they are made from.

recipes/Snakefile has the steps. Snakemake runs them: here, or with --profile on a cluster.
"""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import click

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import write_json
from recipes.pairwise.graph.edges import ROOT, Graph, derive_graph
from recipes.pairwise.graph.step import visible_gpus

SNAKEMAKE = ROOT / ".venv-graph" / "bin" / "snakemake"
SNAKEFILE = ROOT / "recipes" / "Snakefile"
FOLDER = Path("outputs/.graph")
TEST_ROWS = "data/test.parquet"
# Data files up to this size are compared by checksum; a newer file of the same content makes nothing out of date.
LARGEST_CHECKSUM_BYTES = 10**11


@dataclass(frozen=True)
class Step:
    """One step of a plan.

    Attributes:
        name: Its rule in the Snakefile; of a fold, the fold too.
        command: What it runs.
        log: Where its output goes.
        is_pending: Whether it has to run.
        reason: Why, in Snakemake's words.
    """

    name: str
    command: str
    log: Path
    is_pending: bool
    reason: str


@dataclass(frozen=True)
class Machine:
    """Where the steps run.

    Attributes:
        cores: CPU cores; None for all of this machine.
        gpus: GPUs of one machine; None for those of this one.
        profile: Folder of a Snakemake profile, for a cluster; None for this machine.
    """

    cores: int | None = None
    gpus: int | None = None
    profile: str | None = None

    def count_gpus(self) -> int:
        """Count the GPUs of one machine."""
        return len(visible_gpus()) if self.gpus is None else self.gpus

    def options(self) -> list[str]:
        """Say it in Snakemake's options."""
        cores = self.cores or os.cpu_count()
        options = ["--cores", str(cores), "--resources", f"gpu={self.count_gpus()}"]
        if self.profile is not None:
            options += ["--profile", self.profile]
        return options


@dataclass(frozen=True)
class Workflow:
    """What Snakemake is called with.

    Attributes:
        snakefile: The steps.
        config_file: The edges, see write_config.
        targets: The files to make.
        machine: Where.
    """

    snakefile: Path
    config_file: Path
    targets: Sequence[str]
    machine: Machine

    def run_snakemake(self, *options: str, **arguments) -> subprocess.CompletedProcess:
        """Call Snakemake with further options.

        Args:
            options: Options of Snakemake.
            arguments: Arguments of subprocess.run.

        Raises:
            UserError: Snakemake is not installed.
        """
        if not SNAKEMAKE.is_file():
            environment_folder = SNAKEMAKE.parents[1]
            raise UserError(f"{SNAKEMAKE}: not installed; run make {environment_folder.name}/installed")

        command = [str(SNAKEMAKE), "--snakefile", str(self.snakefile)]
        command += ["--configfile", str(self.config_file)]
        command += ["--max-checksum-file-size", str(LARGEST_CHECKSUM_BYTES)]
        # Snakemake's own locks would outlive a killed graph; holding_the_graph keeps others out.
        command += ["--nolock", "--rerun-incomplete", "--keep-going"]
        command += [*self.machine.options(), *options, "--", *self.targets]

        # The steps call commands of this project by name.
        scripts_folder = Path(sys.executable).parent
        search_path = f"{scripts_folder}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": search_path}
        return subprocess.run(command, env=environment, check=False, **arguments)


@click.command()
@click.argument("target", metavar="R")
@click.option("--dry-run", is_flag=True, help="Print the plan; run nothing.")
@click.option("--dag", is_flag=True, help="Print the graph for Graphviz: … --dag | dot -Tsvg.")
@click.option("--cv", is_flag=True, help="Train every fold of R too, and join their predictions.")
@click.option("--test", default=TEST_ROWS, show_default=True, help="Rows for the rehearsal.")
@click.option("--cores", type=click.IntRange(min=1), help="CPU cores; by default all.")
@click.option(
    "--gpus",
    type=click.IntRange(min=0),
    help="GPUs of one machine; by default those of this one.",
)
@click.option(
    "--profile",
    type=click.Path(exists=True),
    help="Snakemake profile of a cluster, such as recipes/profiles/slurm.",
)
@exits_with_2
def main(target: str, dry_run: bool, dag: bool, cv: bool, test: str, **machine) -> None:
    """Bring R, a recipe or a spec, up to date with everything that it is made from.

    A teacher's folds and labels are made where a student needs them; packages, kernel and rehearsal
    where a spec has R's name.
    """
    graph = derive_graph(target)
    name = Path(target).stem
    test_rows = test if Path(test).is_file() else None
    if graph.kernels and test_rows is None:
        click.echo(f"no rehearsal: {test} does not exist; name rows with --test FILE", err=True)

    targets = list_targets(name, graph, has_test_rows=test_rows is not None)
    if cv:
        targets.append(f"outputs/{name}/oof.parquet")

    where = Machine(**machine)
    config_file = write_config(name, graph, test_rows, where)
    workflow = Workflow(SNAKEFILE, config_file, targets, where)
    if dag:
        raise SystemExit(workflow.run_snakemake("--dag", "--quiet", "all").returncode)
    make(workflow, dry_run)


def write_config(name: str, graph: Graph, test_rows: str | None, machine: Machine) -> Path:
    """Write a target's graph as a file for recipes/Snakefile.

    Args:
        name: The target's name.
        graph: Its graph.
        test_rows: The file of rows for rehearsals; None for no rehearsal.
        machine: Where the steps run.

    Returns:
        The file.
    """
    config_file = FOLDER / f"{name}.json"
    config = asdict(graph) | {"test": test_rows, "gpus": machine.count_gpus()}
    write_json(config_file, config)
    return config_file


def list_targets(name: str, graph: Graph, has_test_rows: bool) -> list[str]:
    """List the files that are up to date when a target is.

    Args:
        name: The name of the recipe or spec.
        graph: Its graph.
        has_test_rows: Whether there are rows to rehearse a kernel on.
    """
    targets = []
    if name in graph.kernels:
        targets.append(f"outputs/kernels/{name}/kernel.py")
        if has_test_rows:
            targets.append(f"outputs/{name}/rehearsal/submission.csv")

    if name in graph.runs:
        targets.append(f"outputs/{name}/report.html")
    return targets


def make(workflow: Workflow, dry_run: bool = False) -> None:
    """Print what is up to date, and run the other steps, or print them.

    Args:
        workflow: Says which files to make.
        dry_run: Print the plan and run nothing.

    Raises:
        UserError: Steps failed, or another graph is at work here. Those that did not need the failed ones have run.
    """
    with holding_the_graph() as lock_file:
        steps = read_plan(workflow)
        for step in steps:
            if not step.is_pending:
                click.echo(f"{step.name:<12} up to date   {step.command}")
            elif dry_run:
                click.echo(f"{step.name:<12} to run       {step.command}   ({step.reason})")

        if dry_run or not any(step.is_pending for step in steps):
            return
        # The steps inherit the lock: while one is alive, also after this process was killed, no other graph starts.
        exit_code = workflow.run_snakemake("--quiet", "all", pass_fds=[lock_file]).returncode
        if exit_code != 0:
            raise UserError(describe_failure(read_plan(workflow)))


def read_plan(workflow: Workflow) -> list[Step]:
    """Ask Snakemake which steps there are, and which of them have to run, in the order of the chain."""
    reasons = {}
    for step in list_steps(workflow):
        reasons[step.log] = step.reason

    plan = []
    for step in list_steps(workflow, "--forceall"):
        is_pending = step.log in reasons
        plan.append(replace(step, is_pending=is_pending, reason=reasons.get(step.log, "")))
    return plan


def list_steps(workflow: Workflow, *options: str) -> list[Step]:
    """Read from Snakemake's dry run which steps it would run.

    Raises:
        UserError: Snakemake cannot make a plan; its words are part of the message.
    """
    dry_run = workflow.run_snakemake("--dry-run", "--printshellcmds", *options, capture_output=True, text=True)
    if dry_run.returncode != 0:
        raise UserError(f"Snakemake cannot plan this: {' '.join(dry_run.stderr.split())}")

    # For each step a block: what it reads and writes, and as its last line the command.
    steps = []
    log = reason = ""
    for line in (dry_run.stdout + dry_run.stderr).splitlines():
        key, _, value = line.strip().partition(": ")
        if key == "log":
            log = Path(value)
        elif key == "reason":
            reason = value
        elif key == "Shell command":
            command = value.split(" -- ", maxsplit=1)[1].strip()
            steps.append(Step(log.stem, command, log, True, reason))
    return steps


def describe_failure(plan_afterwards: Sequence[Step]) -> str:
    """Say which steps failed, with their logs, and which are missing because of them."""
    failed = []
    missing = []
    for step in plan_afterwards:
        record = step.log.with_suffix(".json")
        if not step.is_pending:
            continue
        if record.is_file() and json.loads(record.read_text())["exit_code"] != 0:
            failed.append(f"{step.name} (its output is in {step.log})")
        else:
            missing.append(step.name)

    message = f"failed: {', '.join(failed) or 'Snakemake, see above'}"
    if missing:
        message += f"; not made because of it: {', '.join(missing)}"
    return f"{message}. The same command goes on from here"


@contextlib.contextmanager
def holding_the_graph() -> Iterator[int]:
    """Keep other graphs out of this folder's outputs.

    Yields:
        The lock's file descriptor. Whoever inherits it holds the lock too.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with (FOLDER / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError("another pairwise make is at work in this folder; wait for it, or stop it") from None
        yield file.fileno()


if __name__ == "__main__":
    main()
