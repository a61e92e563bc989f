"""`make demo-distill`: a tiny teacher's folds, its labels, two students, and the kernel of one, in outputs/demo_distill.

The recipes and the spec are in tests/demo/distillation. The steps are those of recipes/Snakefile; what is up to date is not
made again, and a run that was killed goes on where it was.
"""

import os
import sys
from dataclasses import replace
from pathlib import Path

from preprocess.core.errors import exits_with_2
from preprocess.core.files import read_json
from recipes.pairwise.graph.edges import derive_graph
from recipes.pairwise.graph.make import Workflow, list_targets, make_targets, write_config
from tests.demo.__main__ import DATA_STEPS, make_pairs

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).with_name("distillation")
TEST = "data/input/test.parquet"
STUDENTS = {"student": "without the pool", "pool_student": "with the pool"}


@exits_with_2
def main() -> None:
    """Print the plan, bring everything up to date, and print the accuracies on the lockbox."""
    enter_folder(Path("outputs/demo_distill"))
    make_pairs("data/pairs.parquet")

    graph = derive_graph("pool_student")
    graph = replace(graph, runs=derive_graph("student").runs | graph.runs)
    targets = list_targets("pool_student", graph, TEST)
    targets += [f"outputs/{student}/lockbox.json" for student in STUDENTS]
    workflow = Workflow(write_config("demo_distill", graph, TEST), targets, DATA_STEPS)

    print("The plan:")
    make_targets(workflow, dry_run=True)
    print(flush=True)
    make_targets(workflow)

    print_lockbox("teacher", "teacher, mean of its folds")
    for student, description in STUDENTS.items():
        print_lockbox(student, f"student {description}")


def enter_folder(folder: Path) -> None:
    """Go to a folder that has this demo's recipes and spec in the place where commands look for them."""
    # The steps run there, and one of them is a command of tests/.
    os.environ["PYTHONPATH"] = str(ROOT)
    folder.mkdir(parents=True, exist_ok=True)
    os.chdir(folder)
    for name in ("recipes", "kaggle_kernels"):
        if not Path(name).exists():
            Path(name).symlink_to(FILES / name)


def print_lockbox(run: str, description: str) -> None:
    """Print a run's figures on the lockbox."""
    scores = read_json(Path("outputs") / run / "lockbox.json")
    print(
        f"{description:<26} accuracy {scores['accuracy']:.3f}, log loss {scores['log_loss']:.3f} "
        f"on the lockbox's {scores['rows']} rows"
    )


if __name__ == "__main__":
    sys.exit(main())
