"""What `python -m preprocess` prints: a table of the sources, lines about groups and folds, and leaks if there are any.

When the output is piped, its width does not depend on the terminal, so that two runs print the same.
"""

import sys

import numpy as np
import polars as pl
from rich import box
from rich.console import Console
from rich.table import Table

from preprocess.dedup.leaks import Leak
from preprocess.model_input import VERDICTS
from preprocess.pairs import Pairs, name_sources

PIPED_WIDTH = 100
LEAKS_SHOWN = 20
LANGUAGES_SHOWN = 5
SNIPPET = 50
PROMPT_WIDTH = 40
SUMMARY_SNIPPET = 60
HEADINGS = ("source", "read", "kept", "again", "rejected", "language", "A", "B", "tie", "longer")
LEFT_ALIGNED = ("source", "rejected", "language")


def console(stream=None, piped_width: int = PIPED_WIDTH) -> Console:
    """Return a console as wide as the terminal, or as `piped_width` if the output is piped; stdout by default."""
    stream = stream or sys.stdout
    width = None if stream.isatty() else piped_width
    return Console(file=stream, width=width, highlight=False, markup=False, soft_wrap=False)


def sources_table(rows: pl.DataFrame, pairs: Pairs) -> Table:
    """Build the table of what became of the rows that were read: a line for each source, and one for all.

    The column `again` counts rows that judge the same pair as an earlier row. The columns A, B, tie and
    longer are shares of the pairs: won by response A, by B, by nobody, and by the longer response.
    """
    table = Table(box=box.SIMPLE_HEAD)
    for heading in HEADINGS:
        justify = "left" if heading in LEFT_ALIGNED else "right"
        table.add_column(heading, justify=justify)

    # Extra and pool rows of a source have lines of their own, such as "arena (pool)". Its training and
    # lockbox rows share the line "arena", since some rows that were read for training are now in the
    # lockbox.
    name_of_row = name_sources(rows)
    name_of_pair = name_sources(pairs.table)
    names = name_of_row.unique(maintain_order=True).to_list()
    for name in names:
        source_rows = rows.filter(name_of_row == name)
        source_pairs = pairs.table.filter(name_of_pair == name)
        rows_united = pairs.united.get(name, 0)
        cells = _describe_rows(source_rows, source_pairs, rows_united)
        table.add_row(name, *cells)

    has_several_lines = len(names) > 1
    if has_several_lines:
        rows_united = sum(pairs.united.values())
        cells = _describe_rows(rows, pairs.table, rows_united)
        table.add_section()
        table.add_row("all", *cells)
    return table


def _describe_rows(rows: pl.DataFrame, kept: pl.DataFrame, united: int) -> list[str]:
    """Write the cells of a table line about the `rows` that were read and the pairs `kept` of them."""
    # Rejected rows have a reason, of which the commonest comes first.
    counts = rows["reason"].drop_nulls().value_counts()
    counts = counts.sort(["count", "reason"], descending=[True, False])
    rejected = [f"{reason}: {count:,}" for reason, count in counts.iter_rows()]

    # Polars' mean leaves nulls out: pool rows, which have no winner, count in none of the shares.
    win_rates = []
    for verdict in VERDICTS:
        wins = kept["winner"] == verdict
        win_rates.append(_format_percent(wins.mean()))
    longer_win_rate = _format_percent(_does_longer_win(kept).mean())

    return [
        f"{rows.height:,}",
        f"{kept.height:,}",
        f"{united:,}",
        "\n".join(rejected) or "0",
        _list_languages(kept["language"]),
        *win_rates,
        longer_win_rate,
    ]


def _does_longer_win(table: pl.DataFrame) -> pl.Series:
    """Return for each pair whether the longer answer won; null for a tie and without a winner."""
    # The longer one wins if A is longer and wins, or if B is longer and wins.
    a_wins = pl.col("winner") == "model_a"
    longer_wins = pl.col("is_a_longer") == a_wins

    # In Polars, `when` without `otherwise` gives null.
    is_decided = pl.col("winner") != "tie"
    longer_wins_or_null = pl.when(is_decided).then(longer_wins)
    return table.select(longer_wins_or_null.alias("longer_wins"))["longer_wins"]


def _list_languages(languages: pl.Series) -> str:
    """List the commonest languages with their numbers of rows, and sum up the others."""
    counts = languages.value_counts().sort(["count", "language"], descending=[True, False])
    lines = []
    for language, count in counts.head(LANGUAGES_SHOWN).iter_rows():
        lines.append(f"{language} {count:,}")

    others = counts["count"][LANGUAGES_SHOWN:]
    if len(others) > 0:
        lines.append(f"{len(others)} more {others.sum():,}")
    return "\n".join(lines)


def _format_percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def summary(pairs: Pairs, folds: int, threshold: float) -> list[str]:
    """Say in a few lines how the pairs were grouped and spread over folds."""
    table = pairs.table
    lines = [_describe_groups(table, threshold)]

    # A fold without rows is listed with 0.
    training_folds = table.filter(role="train")["fold"].to_numpy()
    fold_sizes = np.bincount(training_folds, minlength=folds).tolist()
    sizes = [f"{fold}: {size:,}" for fold, size in enumerate(fold_sizes)]
    lines.append(f"pairs per fold: {', '.join(sizes)}")

    role_sizes = []
    for role, name in (("test", "lockbox"), ("extra", "extra"), ("pool", "pool")):
        size = table.filter(role=role).height
        if size > 0:
            role_sizes.append(f"{name}: {size:,}")
    if role_sizes:
        lines.append(f"beside the folds: {', '.join(role_sizes)}")
    if pairs.dropped.height > 0:
        rows_dropped = _count(pairs.dropped.height, "row")
        lines.append(f"dropped because their prompt is like one of the lockbox: {rows_dropped}")
    return lines


def _describe_groups(table: pl.DataFrame, threshold: float) -> str:
    """Say how many groups of like prompts the pairs are in, and which is the largest."""
    groups = table["group"].value_counts().sort(["count", "group"], descending=[True, False])
    largest = table.filter(pl.col("group") == groups["group"][0])
    largest_size = _count(largest.height, "pair")
    largest_prompts = _count(largest["prompt_hash"].n_unique(), "prompt")
    first_prompt = snippet(largest["opening"][0], SUMMARY_SNIPPET)
    return (
        f"{table.height:,} pairs in {groups.height:,} groups of prompts that are equal or of similarity {threshold:g} or more; "
        f'the largest: {largest_size} with {largest_prompts}, "{first_prompt}"'
    )


def no_leaks(threshold: float, against: list[str]) -> str:
    """Write the line that is printed after a comparison of prompts that found no leak."""
    searched = "in a different fold"
    if against:
        searched = f"{searched} or in {', '.join(against)}"
    return f"leak report: no prompt has another of similarity {threshold:g} or more {searched}"


def leaks_table(leaks: list[Leak], prompts: pl.DataFrame) -> Table:
    """Build the table of the first LEAKS_SHOWN leaks.

    Args:
        leaks: The most similar first.
        prompts: All prompts by position: place_name (of the fold or file), id and prompt_text.
    """
    table = Table(
        box=box.SIMPLE_HEAD,
        title="prompts that are alike but stand apart",
        title_justify="left",
        title_style="",
    )
    for heading in ("similarity", "where", "id"):
        table.add_column(heading, overflow="fold")
    # Ids are shown whole, even if that takes two lines; a prompt is known by its beginning.
    table.add_column("prompt", no_wrap=True, overflow="ellipsis", max_width=PROMPT_WIDTH)

    # A leak is one row of the table, in which each of its two prompts has a line.
    for leak in leaks[:LEAKS_SHOWN]:
        both_prompts = prompts[[leak.first, leak.second]]
        openings = [snippet(text, SNIPPET) for text in both_prompts["prompt_text"]]
        table.add_row(
            f"{leak.similarity:.3f}",
            "\n".join(both_prompts["place_name"]),
            "\n".join(both_prompts["id"]),
            "\n".join(openings),
        )

    leaks_left = len(leaks) - LEAKS_SHOWN
    if leaks_left > 0:
        table.add_row("", "", "", f"and {leaks_left:,} more")
    return table


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def snippet(text: str, size: int) -> str:
    """Return the start of a text on one line, of at most `size` characters."""
    line = " ".join(text.split())
    return line if len(line) <= size else line[: size - 1] + "…"
