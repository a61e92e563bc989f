"""The entry to this room: a source file is recognised by its columns, and read into rows of one schema.

`preprocess.stream` calls `read_batches` for its sources, and `python -m preprocess` `read_prompts` for the
files that no source may share a prompt with. Every row of a file comes back: usable, or with the reason why
it is not.

Any layout may have the columns language and source, which are kept, and p_model_a, p_model_b, p_tie and
weight, the votes of an earlier pairs.parquet or of a teacher.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import polars as pl
import pyarrow as pa

from preprocess.competitions import COMPETITIONS
from preprocess.core.errors import UserError
from preprocess.model_input import clean
from preprocess.sources import arena, chosen_rejected, helpsteer, ppe
from preprocess.sources.competition import make_layout
from preprocess.sources.layout import Layout
from preprocess.sources.messages import read_conversation
from preprocess.sources.rows import (
    ROLES,
    ROWS,
    SHARES,
    TEXTS,
    TURNS,
    UnusableRow,
    check_judgement,
    read_json_turns,
    read_text,
    read_turns,
    read_vote_shares,
    show_turns,
)
from preprocess.sources.tables import Table, TableRow, open_table

# Besides those of the competitions.
LAYOUTS = (arena.LAYOUT, ppe.LAYOUT, helpsteer.LAYOUT, chosen_rejected.LAYOUT)

# The columns of which one holds the prompt.
PROMPT_COLUMNS = ("prompt", "chosen", "conversation_a", "context")

# What a file of any layout may have besides.
FURTHER_COLUMNS = (
    *chosen_rejected.SCORES,
    *SHARES,
    "weight",
    "both_bad",
    "language",
    "source",
    "role",
)

# Bounds memory: the rows of a frame, whose texts are all that is held of a file's.
BATCH_ROWS = 4096

# PyArrow makes columns of dictionaries three times as fast as Polars does.
ARROW_ROWS = pl.DataFrame(schema=ROWS).to_arrow(compat_level=pl.CompatLevel.oldest()).schema


def read_batches(path: Path | str, role: str = "train") -> Iterator[pl.DataFrame]:
    """Read every row of a source file, a batch at a time.

    Args:
        path: The file.
        role: One of ROLES. Rows of the role pool need no verdict, and lose the one that they have. A
            column `role`, as an earlier pairs.parquet has it, takes the place of train.

    Yields:
        Frames of the schema ROWS, in the file's order; `reason` is null where a row can be used.

    Raises:
        UserError: The file is unreadable, of no known layout, or without a single usable row.
    """
    table = open_table(path)
    layout = recognise_layout(table, needs_verdicts=role != "pool")

    # How many rows were rejected, by reason. The reason None counts the rows that can be used.
    reason_counts: Counter[str | None] = Counter()
    rows_left = table.rows(list_columns_read())
    while table_rows := list(islice(rows_left, BATCH_ROWS)):
        rows = [_read_row(layout, table.path, role, table_row) for table_row in table_rows]
        reason_counts.update(row.get("reason") for row in rows)
        yield pl.DataFrame(pa.Table.from_pylist(rows, ARROW_ROWS), schema=ROWS)

    # A file of the right columns may still have none of the right values.
    if None not in reason_counts:
        reasons = [f"{reason}: {count:,}" for reason, count in reason_counts.most_common()]
        raise UserError(
            f"{table.path}: not one of its {reason_counts.total():,} rows can be used ({', '.join(reasons)})"
        )


def list_layouts() -> list[Layout]:
    """List all layouts; a file that fits several is of the first one."""
    layouts = [make_layout(competition) for competition in COMPETITIONS.values()]
    return [*layouts, *LAYOUTS]


def list_columns_read() -> tuple[str, ...]:
    """List the columns that any layout needs: Parquet files may have others, and large ones."""
    columns = list(FURTHER_COLUMNS)
    for layout in list_layouts():
        columns += layout.columns
    return tuple(columns)


def recognise_layout(table: Table, needs_verdicts: bool = True) -> Layout:
    """Find the layout whose columns a file has.

    Raises:
        UserError: It has no layout's columns; the message names the nearest layout.
    """
    layouts = list_layouts()
    fitting = []
    for layout in layouts:
        if not layout.find_missing_columns(table, needs_verdicts):
            fitting.append(layout)

    # Without their columns of verdicts, all competitions have the same columns. What may tell them apart is
    # whether their texts are JSON lists.
    if len(fitting) > 1:
        holds_json = _holds_json_prompts(table)
        same_form = [layout for layout in fitting if layout.texts_are_turns == holds_json]
        if same_form:
            fitting = same_form
    if fitting:
        return fitting[0]

    # Name the layout that the user most likely meant, and what the file lacks.
    nearest = min(layouts, key=lambda layout: _measure_distance(layout, table))
    missing = nearest.find_missing_columns(table)
    noun = "column" if len(missing) == 1 else "columns"
    raise UserError(
        f"{table.path}: missing {noun} {', '.join(missing)} of the layout {nearest.name} "
        f"({', '.join(nearest.columns)}), which is nearest; "
        f"found {', '.join(table.columns) or 'no columns'}"
    )


def _measure_distance(layout: Layout, table: Table) -> tuple[int, int]:
    """Return how far a file is from a layout, as a key to sort by.

    A file that lacks fewer columns is nearer; of two that lack as many, the one that has more of
    the layout's columns, hence the minus sign.
    """
    columns_missing = len(layout.find_missing_columns(table))
    columns_present = len(set(layout.columns) & set(table.columns))
    return columns_missing, -columns_present


def _read_row(layout: Layout, path: Path, role: str, table_row: TableRow) -> dict:
    """Read a row of a file, which can be used or has a reason why not.

    Returns:
        The values by column of ROWS; a column that is left out is null.
    """
    row = {"file": str(path), "row": table_row.number, "role": role}
    values = table_row.values

    # A broken line of JSONL is kept whole, in the place of the prompt.
    if values is None:
        row["prompt"] = [clean(table_row.line)]
        row["language"] = "unknown"
        row["source"] = path.stem
        row["reason"] = "not a JSON object"
        return row

    row["id"] = read_text(values.get("id", values.get("question_id"))) or None
    row["language"] = read_text(values.get("language")) or "unknown"
    row["source"] = read_text(values.get("source")) or path.stem
    if role == "train" and values.get("role") in ROLES:
        row["role"] = values["role"]
    needs_verdict = row["role"] != "pool"

    try:
        judgement = layout.read_judgement(values)
        # A layout may give an id to a row without one.
        row["id"] = judgement.id
        check_judgement(judgement, needs_verdict)
        shares = {"weight": 1.0}
        if needs_verdict:
            shares = read_vote_shares(values, judgement)
    except UnusableRow as reason:
        # The file of rejected rows shows the texts as they were.
        for name in TEXTS:
            row[name] = show_turns(values.get(name))
        row["winner"] = _show_verdict(layout, values)
        row["reason"] = str(reason)
        return row

    # All fields of a judgement are columns, but for share_a, which the shares come from.
    row.update(vars(judgement))
    del row["share_a"]
    row.update(shares)
    if not needs_verdict:
        row["winner"] = None
    return row


def _show_verdict(layout: Layout, values: dict) -> str | None:
    """Return as text what an unusable row has in place of its verdict, however wrong that is.

    Returns:
        The value of the column with the verdict. Where each verdict has a column with a flag, all
        of them, e.g. "winner_model_a 1, winner_model_b 1, winner_tie 0". None without such a
        column.
    """
    columns = [column for column in layout.verdict_columns if column in values]
    if len(columns) == 1:
        return read_text(values[columns[0]])

    flags = [f"{column} {read_text(values[column])}" for column in columns]
    return ", ".join(flags) or None


def read_prompts(path: Path | str) -> pl.DataFrame:
    """Read the prompts of a file, e.g. of a test set, which needs neither answers nor verdicts.

    Returns:
        A frame of id and prompt (list of turns). Rows without a readable prompt are left out.

    Raises:
        UserError: The file is unreadable, or holds no prompt that can be read.
    """
    table = open_table(path)
    if not set(PROMPT_COLUMNS) & set(table.columns):
        raise UserError(
            f"{path}: no column prompt (found {', '.join(table.columns)}); "
            "name a file with the prompts that the sources are to be compared with"
        )

    # A test file has no verdicts, so that its layout cannot be recognised.
    is_json = _holds_json_prompts(table)
    prompts = []
    for table_row in table.rows(("id", *PROMPT_COLUMNS)):
        if table_row.values is None:
            continue
        try:
            turns = _read_prompt(table_row.values, is_json)
        except UnusableRow:
            continue
        row_id = table_row.values.get("id", table_row.number)
        prompts.append({"id": str(row_id), "prompt": turns})

    if not prompts:
        raise UserError(
            f"{path}: not one of its {table.height:,} rows has a prompt that can be read"
        )
    return pl.DataFrame(prompts, schema={"id": pl.String, "prompt": TURNS})


def _read_prompt(values: dict, is_json: bool) -> list[str]:
    """Read the turns of a row's prompt, whatever its layout.

    Args:
        values: The row's values by column.
        is_json: Whether its column prompt holds JSON lists, as LMSYS's does.
    """
    # These two columns may hold a whole conversation: its turns of the user are the prompt.
    prompt = values.get("prompt")
    for column in ("chosen", "conversation_a"):
        if values.get(column) is not None:
            turns, _ = read_conversation(prompt, values[column])
            return turns

    # HelpSteer3's context is a conversation without an answer.
    if isinstance(values.get("context"), list):
        turns, _ = read_conversation(values["context"], None)
        return turns

    if is_json:
        return read_json_turns(prompt)
    return read_turns(prompt)


def _holds_json_prompts(table: Table) -> bool:
    """Return whether every prompt of a file is a JSON list, as in LMSYS's files, not in WSDM's."""
    if "prompt" not in table.columns:
        return False

    for table_row in table.rows(("prompt",)):
        # A broken line says nothing of the others.
        if table_row.values is None:
            continue
        try:
            read_json_turns(table_row.values.get("prompt"))
        except UnusableRow:
            return False
    return True
