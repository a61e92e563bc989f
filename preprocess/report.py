"""What preprocess prints: one table of the sources, the groups and folds, and any leaks.

Its width does not depend on the terminal when it is piped, so that two runs print the same.
"""

import sys

import numpy as np
import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from preprocess.dedup.leaks import Leak, LeakReport
from preprocess.model_input import VERDICTS
from preprocess.pairs import Pairs

PIPED_WIDTH = 140
LEAKS_SHOWN = 20
SNIPPET = 100
HEADINGS = ("source", "read", "kept", "judged again", "rejected", "language", "A wins", "B wins", "tie", "longer wins")


def console(stream=None) -> Console:
    """A console as wide as the terminal, or PIPED_WIDTH where there is none."""
    stream = stream or sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPED_WIDTH, highlight=False, markup=False, soft_wrap=False)


def sources_table(rows: pl.DataFrame, pairs: Pairs) -> Table:
    """One line for each source and one for all: what became of its rows (schema sources.ROWS)."""
    table = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading in ("source", "rejected", "language") else "right")
    sources = rows["source"].unique(maintain_order=True).to_list()
    longer = longer_answer_wins(pairs.table)
    for source in sources:
        of_source = pairs.table["source"] == source
        united = pairs.united.get(source, 0)
        _add_source(
            table, source, rows.filter(pl.col("source") == source), pairs.table.filter(of_source), longer, of_source, united
        )
    if len(sources) > 1:
        table.add_section()
        everything = pl.repeat(True, pairs.table.height, eager=True)
        _add_source(table, "all", rows, pairs.table, longer, everything, sum(pairs.united.values()))
    return table


def longer_answer_wins(table: pl.DataFrame) -> pl.Series:
    """Of each pair, whether the answer with more characters won (A, where both are as long); null where it was a tie."""
    characters = {
        side: pl.col(f"response_{side}").list.eval(pl.element().str.len_chars()).list.sum().alias(side) for side in "ab"
    }
    a_is_longer = characters["a"] >= characters["b"]
    right = pl.when(pl.col("winner") != "tie").then(a_is_longer == (pl.col("winner") == "model_a"))
    return table.select(right.alias("right"))["right"]


def _add_source(table, name, rows, kept, longer, of_source, united) -> None:
    reasons = rows["reason"].drop_nulls().value_counts().sort(["count", "reason"], descending=[True, False])
    languages = kept["language"].value_counts().sort(["count", "language"], descending=[True, False])
    winners = kept["winner"]
    decided = longer.filter(of_source).drop_nulls()
    table.add_row(
        name,
        f"{rows.height:,}",
        f"{kept.height:,}",
        f"{united:,}",
        "\n".join(f"{reason}: {count:,}" for reason, count in reasons.iter_rows()) or "0",
        _languages(languages),
        *(_percent((winners == verdict).mean()) for verdict in VERDICTS),
        _percent(decided.mean()),
    )


def _languages(counts: pl.DataFrame, shown: int = 5) -> str:
    lines = [f"{language} {count:,}" for language, count in counts.head(shown).iter_rows()]
    if counts.height > shown:
        lines.append(f"{counts.height - shown} more {counts['count'][shown:].sum():,}")
    return "\n".join(lines)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def summary(pairs: Pairs, folds: int, threshold: float) -> list[str]:
    """Lines that say how the pairs were grouped and spread over folds."""
    table = pairs.table
    groups = table["group"].value_counts().sort(["count", "group"], descending=[True, False])
    first = table.filter(pl.col("group") == groups["group"][0])
    sizes = np.bincount(table["fold"].to_numpy(), minlength=folds)
    lines = [
        f"{table.height:,} pairs in {groups.height:,} groups of prompts that are equal or of similarity {threshold:g} or more; "
        f"the largest: {_count(first.height, 'pair')} with {_count(first['prompt'].n_unique(), 'prompt')}, "
        f'"{snippet(" ".join(first["prompt"][0]), 60)}"',
        "pairs per fold: " + ", ".join(f"{fold}: {size:,}" for fold, size in enumerate(sizes.tolist())),
    ]
    for joined in pairs.joined:
        now = "stays in" if joined.fold_now == joined.fold_before else f"moves from fold {joined.fold_before} to"
        lines.append(f"a later file joined two groups of earlier ones: the group of {joined.id} {now} fold {joined.fold_now}")
    return lines


def no_leaks(report: LeakReport, threshold: float, against: list[str]) -> str:
    """The line that a leak report without leaks comes to."""
    beyond = f" or in {', '.join(against)}" if against else ""
    closest = f"; the closest of {report.compared:,} that came near: {_decimals(report.closest)}" if report.compared else ""
    return f"leak report: no prompt has another of similarity {threshold:g} or more in a different fold{beyond}{closest}"


def _decimals(similarity: float) -> str:
    """Three decimals, rounded down, so that what is below the threshold never reads as if it had reached it."""
    return f"{int(similarity * 1000) / 1000:.3f}"


def leaks_table(leaks: tuple[Leak, ...], names: list[str], ids: list[str], prompts: list[str]) -> Table:
    """The first LEAKS_SHOWN leaks; `names` says where each prompt stands."""
    table = Table(box=box.SIMPLE_HEAD, title="prompts that are alike but stand apart", title_justify="left", title_style="")
    for heading in ("similarity", "where", "id"):
        table.add_column(heading, overflow="fold")
    table.add_column("prompt", no_wrap=True, overflow="ellipsis")
    for leak in leaks[:LEAKS_SHOWN]:
        both = (leak.first, leak.second)
        columns = [names[at] for at in both], [ids[at] for at in both], [snippet(prompts[at], SNIPPET) for at in both]
        table.add_row(_decimals(leak.similarity), *("\n".join(column) for column in columns))
    if len(leaks) > LEAKS_SHOWN:
        table.add_row("", "", "", f"and {len(leaks) - LEAKS_SHOWN:,} more")
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def snippet(text: str, size: int) -> str:
    """The start of a text on one line."""
    line = " ".join(text.split())
    return line if len(line) <= size else line[: size - 1] + "…"
