"""`make demo`: raw rows to submission.csv in minutes, each step a command that a user would type.

The steps are those of recipes/Snakefile, and the demo's own that make its data. outputs/demo/demo.json holds the seconds of
every step, accuracy and log loss on the test rows, and the paths of the submission and the report.
"""

import sys
from pathlib import Path

from preprocess.core.errors import exits_with_2
from preprocess.core.files import read_json, write_json
from recipes.pairwise.graph.edges import Graph, derive_graph, hash_code_of_steps
from recipes.pairwise.graph.make import Workflow, list_targets, make_targets, write_config

DEMO = Path("outputs/demo")
PAIRS = "outputs/demo/pairs.parquet"
TEST = "outputs/demo/input/test.parquet"
DATA_STEPS = Path(__file__).with_name("Snakefile")
STEPS = ("input", "preprocess", "train", "postprocess", "build", "rehearse", "report")


@exits_with_2
def main() -> None:
    """Bring the demo up to date, then write and print the result."""
    make_pairs(PAIRS)
    graph = derive_graph("demo")
    config_file = write_config("demo", graph, TEST)
    make_targets(Workflow(config_file, list_targets("demo", graph, TEST)))

    rehearsal = read_json(DEMO / "rehearsal" / "rehearsal.json")
    result = {
        "stages": {step: read_json(DEMO / "logs" / f"{step}.json")["seconds"] for step in STEPS},
        "accuracy": rehearsal["accuracy"],
        "log_loss": rehearsal["log_loss"],
        "submission": str(DEMO / "rehearsal" / "submission.csv"),
        "report": str(DEMO / "report.html"),
    }
    write_json(DEMO / "demo.json", result)
    print(
        f"accuracy {result['accuracy']:.3f}, log loss {result['log_loss']:.3f} on the test rows; "
        f"submission: {result['submission']}"
    )
    print(f"report: {result['report']}")


def make_pairs(pairs: str) -> None:
    """Bring a demo's pairs file up to date, by the steps of this folder's Snakefile."""
    graph = Graph(runs={}, kernels={}, code_hashes=hash_code_of_steps())
    config_file = write_config("demo_data", graph, test_rows=None)
    make_targets(Workflow(config_file, [pairs], DATA_STEPS))


if __name__ == "__main__":
    sys.exit(main())
