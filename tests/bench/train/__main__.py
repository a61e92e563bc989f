"""`make bench-train`: pairs a second of ours, TRL's RewardTrainer and transformers' Trainer.

All train the same model on the same rows from the same weights, see work.py and contenders.py. They
take turns, each run in a process of its own, and a ratio is taken within a round. First all take
the rows in random order, then all group rows of like lengths. The last line is ours with padding.
"""

import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from preprocess.core.errors import exits_with_2
from preprocess.core.files import read_yaml, write_json
from recipes.pairwise.config.recipe_files import find_recipe
from tests.bench.kernel import matrix_rate
from tests.bench.processes import in_process
from tests.bench.train import contenders, work

RESULTS = Path("outputs/bench/train.json")
BASE = read_yaml(find_recipe(contenders.RECIPE))["base_model"]
HELD_OUT = 24  # pairs


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        title: What the table calls it.
        order: How rows come together in micro-batches.
        rival: The line of ours that it is compared with.
        train: Trains it; takes the bench's folder and the option.
        option: Whether rows are grouped by length; for ours, keys of the recipe.
    """

    title: str
    order: str
    rival: str
    train: Callable
    option: bool | dict


TRL, TRAINER, OURS = contenders.train_with_trl, contenders.train_with_trainer, contenders.train_with_ours

# On a GPU the recipe would train in bf16.
FLOAT32 = {"bf16": False}
GROUPED = FLOAT32 | {"group_by_length": True}
PADDED = GROUPED | {"pairwise": {"padding_free": False}}
CONTENDERS = {
    "trl": Contender("TRL RewardTrainer", "random", "ours", TRL, False),
    "trainer": Contender("transformers Trainer", "random", "ours", TRAINER, False),
    "ours": Contender("ours", "random", "ours", OURS, FLOAT32),
    "trl_grouped": Contender("TRL RewardTrainer", "by length", "ours_grouped", TRL, True),
    "trainer_grouped": Contender("transformers Trainer", "by length", "ours_grouped", TRAINER, True),
    "ours_grouped": Contender("ours", "by length", "ours_grouped", OURS, GROUPED),
    "ours_padded": Contender("ours, padded", "by length", "ours_grouped", OURS, PADDED),
}


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), default="data/pairs.parquet")
@click.option("--base", default=BASE, help="MiniLM's folder, on a machine without network.")
@click.option("--trained", default=64, show_default=True, help="Pairs of a run.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each contender.")
@exits_with_2
def main(pairs: Path, base: str, trained: int, rounds: int) -> None:
    """Write outputs/bench/train.json and print it as a table."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        block = read_yaml(find_recipe(contenders.RECIPE))["pairwise"]
        work.write_base(folder, base)
        work.write_rows(folder, work.draw_rows(pairs, trained, HELD_OUT), block)
        results = {"pairs": str(pairs), "base": base, "matrix_rate": 0.0, "runs": {}}
        for _ in range(rounds):
            results["matrix_rate"] = max(results["matrix_rate"], matrix_rate(work.read_clock))
            add_round(results, folder, list(CONTENDERS))
            write_json(RESULTS, results)
    print(format_table(results))


def add_round(results: dict, folder: Path, names: list[str]) -> None:
    """Run contenders in turns, and add their figures to `runs` of the results, which has them by round."""
    for name in names:
        contender = CONTENDERS[name]
        imports = contenders.SLOW_IMPORTS
        measured = in_process(contender.train, folder, contender.option, imports=imports)
        results["runs"].setdefault(name, []).append(asdict(measured))
        print(f"{name}: {measured.seconds:.1f} s", flush=True)


def format_table(results: dict) -> str:
    """Return the contenders' figures as a Markdown table, the fastest run of each."""
    lines = [
        "| trainer | order of rows | pairs a second | ours / it | padding | matrix rate "
        "| loss by quarter | held out, before and after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        contender = CONTENDERS[name]
        seconds = np.array([run["seconds"] for run in runs])
        fastest = runs[seconds.argmin()]
        our_seconds = np.array([run["seconds"] for run in results["runs"][contender.rival]])
        # Of the same round, in which the machine was as busy.
        ratios = seconds / our_seconds

        speed = fastest["pairs"] / seconds.min()
        rate = fastest["operations"] / seconds.min() / results["matrix_rate"]
        quarters = ", ".join(f"{loss:.3f}" for loss in fastest["losses"])
        held_out = f"{fastest['held_out_before']:.4f}, {fastest['held_out_after']:.4f}"
        lines.append(
            f"| {contender.title} | {contender.order} | {speed:.2f} "
            f"| {np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f}) "
            f"| {fastest['padding']:.2f} | {rate:.2f} | {quarters} | {held_out} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.train")
