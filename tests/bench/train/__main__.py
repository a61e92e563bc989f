"""`make bench-train`: pairs a second of ours, TRL's RewardTrainer and transformers' Trainer.

All train the same model on the same rows from the same weights: work.py says what they share. They
take turns, each run in a process of its own, and a ratio is taken within a round. First all take
the rows in random order, then all group rows of like lengths. The last line is ours with padding.

On a CPU the time is that of its cores, which other work on the machine disturbs least.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import click
import numpy as np

from preprocess.core.errors import UserError, exits_with_2
from preprocess.core.files import write_json
from tests import tiny
from tests.bench.processes import in_process

RESULTS = Path("outputs/bench/train.json")
SLOW_IMPORTS = ("tests.bench.train.contenders", "recipes.pairwise.plugin")
TINY_PAIRS = 600  # generated, where no file is given


@dataclass(frozen=True)
class Contender:
    """One line of the table.

    Attributes:
        title: What the table calls it.
        order: How rows come together in micro-batches.
        trains_with: trl, trainer or ours.
        rival_of: The line of ours that it is compared with.
        recipe_changes: For ours, keys of the recipe; None removes one.
    """

    title: str
    order: str
    trains_with: str
    rival_of: str
    recipe_changes: dict | None = None


PADDED = {"group_by_length": True, "pairwise": {"padding_free": False}}
CONTENDERS = {
    "trl": Contender("TRL RewardTrainer", "random", "trl", "ours"),
    "trainer": Contender("transformers Trainer", "random", "trainer", "ours"),
    "ours": Contender("ours", "random", "ours", "ours", {"group_by_length": None}),
    "trl_grouped": Contender("TRL RewardTrainer", "by length", "trl", "ours_grouped"),
    "trainer_grouped": Contender("transformers Trainer", "by length", "trainer", "ours_grouped"),
    "ours_grouped": Contender("ours", "by length", "ours", "ours_grouped", {"group_by_length": True}),
    "ours_padded": Contender("ours, padded", "by length", "ours", "ours_grouped", PADDED),
}


def train(name: str, folder: Path):
    """Run one contender; see work.Measured for what it returns."""
    # In a process of its own: this command's has neither torch nor its threads.
    from recipes.pairwise.training import cpu
    from tests.bench.train import contenders

    contender = CONTENDERS[name]
    if contender.trains_with == "ours":
        return contenders.train_with_ours(folder, contenders.RECIPE, contender.recipe_changes)

    cpu.use_all_cores()
    groups_lengths = contender.order == "by length"
    if contender.trains_with == "trl":
        return contenders.train_with_trl(folder, groups_lengths)
    return contenders.train_with_trainer(folder, groups_lengths)


def prepare(folder: Path, rows: dict[str, int], pairs: Path, base: Path, tokens: int) -> None:
    """Write what the runs read."""
    from preprocess.core.files import read_yaml
    from recipes.pairwise.config.recipe_files import find_recipe
    from tests.bench.train import contenders, work

    block = read_yaml(find_recipe(contenders.RECIPE))["pairwise"] | {"budget_tokens": tokens}
    work.write_base(folder, base)
    work.write_rows(folder, work.draw_rows(pairs, **rows), block)


def measure_rate() -> float:
    """Return floating-point operations a second of the best matrix product, by the bench's clock."""
    from tests.bench.kernel import matrix_rate
    from tests.bench.train import work

    return matrix_rate(work.read_clock)


@click.command()
@click.option("--pairs", type=click.Path(path_type=Path), help="By default generated.")
@click.option("--base", type=click.Path(path_type=Path), help="A model; by default a tiny one.")
@click.option("--trained", default=96, show_default=True, help="Pairs of a run.")
@click.option("--held-out", default=96, show_default=True, help="Pairs to measure the loss on.")
@click.option("--tokens", default=512, show_default=True, help="Of a sequence.")
@click.option("--rounds", default=3, show_default=True, help="Turns of each contender.")
@click.option("--only", help="Contenders, separated by commas.")
@exits_with_2
def main(
    pairs: Path | None,
    base: Path | None,
    trained: int,
    held_out: int,
    tokens: int,
    rounds: int,
    only: str | None,
) -> None:
    """Write outputs/bench/train.json and print it as a table."""
    names = list(CONTENDERS) if only is None else only.split(",")
    unknown_names = set(names) - CONTENDERS.keys()
    if unknown_names:
        raise UserError(f"--only {only}: expected some of {', '.join(CONTENDERS)}")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if pairs is None:
            pairs = tiny.pairs_parquet(folder / "tiny.parquet", TINY_PAIRS)
        if base is None:
            base = in_process(tiny.model, folder / "tiny", "bert")

        rows = {"trained": trained, "held_out": held_out}
        in_process(prepare, folder / "bench", rows, pairs, base, tokens)
        results = run_rounds(folder / "bench", names, rounds)

    write_json(RESULTS, {"pairs": str(pairs), "base": str(base), "tokens": tokens, **results})
    print(format_table(results))


def run_rounds(folder: Path, names: list[str], rounds: int) -> dict:
    """Run all contenders in turns.

    Returns:
        matrix_rate, the best of all rounds, and runs: for each contender its rounds' figures.
    """
    rates = []
    runs = {name: [] for name in names}
    for number in range(rounds):
        rates.append(in_process(measure_rate))
        for name in names:
            measured = in_process(train, name, folder, imports=SLOW_IMPORTS)
            runs[name].append(asdict(measured))
            print(f"round {number + 1}, {name}: {measured.wall_seconds:.0f} s", flush=True)
    return {"matrix_rate": max(rates), "runs": runs}


def format_table(results: dict) -> str:
    """Return the contenders' figures as a Markdown table."""
    lines = [
        "| trainer | order of rows | pairs a second | ours / it | padding | matrix rate "
        "| loss by quarter | held out, before and after |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, runs in results["runs"].items():
        contender = CONTENDERS[name]
        seconds = [run["seconds"] for run in runs]
        fastest = runs[int(np.argmin(seconds))]
        share = fastest["operations"] / min(seconds) / results["matrix_rate"]
        quarters = ", ".join(f"{loss:.3f}" for loss in fastest["losses"])
        cells = [
            contender.title,
            contender.order,
            f"{fastest['pairs'] / min(seconds):.2f}",
            format_ratio(seconds, results["runs"].get(contender.rival_of)),
            f"{fastest['padding']:.2f}",
            f"{share:.2f}",
            quarters,
            f"{fastest['held_out_before']:.3f}, {fastest['held_out_after']:.3f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def format_ratio(seconds: list[float], our_runs: list[dict] | None) -> str:
    """Return how many times as fast ours is: the median over the rounds, and their range."""
    if our_runs is None:
        return ""
    our_seconds = [run["seconds"] for run in our_runs]
    ratios = np.array(seconds) / np.array(our_seconds)
    return f"{np.median(ratios):.2f} ({ratios.min():.2f} to {ratios.max():.2f})"


if __name__ == "__main__":
    main(prog_name="python -m tests.bench.train")
