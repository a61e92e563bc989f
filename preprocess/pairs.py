"""Rows of all sources become pairs: judgements of one pair united, ids unique, prompts grouped, groups spread over folds.

Rows keep their roles: train, extra, pool, or test for the lockbox. Judgements are united within a role, so
that the shares of votes of a training row are never mixed with a teacher's. Whole groups of training rows
can be drawn into the lockbox; extra and pool rows that share a group with a lockbox row are dropped.

A pair is one prompt with two responses, in either order. If it was judged several times, it becomes one row, that of its
first judgement: the weight is the number of votes, p_* are their shares, and the winner is the verdict with the most votes
(tie if two have as many). An id that an earlier row has already becomes `source:id`, then `source:id:2` and so on.

A group's number is a hash of its earliest prompt, and its fold is the remainder of that number. So rows that are added after
the others move no pair, unless they join two groups: then the younger one moves.
"""

import hashlib
from dataclasses import dataclass

import polars as pl

from preprocess.dedup.grouping import group_prompts
from preprocess.sources.rows import SHARES, TEXTS, TURNS

PAIRS = pl.Schema(
    {
        "id": pl.String,
        "prompt": TURNS,
        "response_a": TURNS,
        "response_b": TURNS,
        "winner": pl.String,
        "language": pl.String,
        "source": pl.String,
        "role": pl.String,
        "group": pl.Int64,
        # Null for the lockbox, which is in no fold.
        "fold": pl.Int8,
        "weight": pl.Float32,
        "p_model_a": pl.Float32,
        "p_model_b": pl.Float32,
        "p_tie": pl.Float32,
        # Whether a vote called both responses bad; it counts as a tie.
        "both_bad": pl.Boolean,
    }
)
REJECTED = ("file", "row", "id", "reason", *TEXTS, "winner", "language", "source")
# Rows that are equal in these judge the same pair for the same role.
SAME_PAIR = ("role", "prompt_hash", "responses_hash")
DRAW_STEPS = 10_000  # in which a share of the groups is counted
LIKE_LOCKBOX = "prompt is like one of the lockbox"

# Shares of votes that differ by less are equal; sums of float shares are not exact.
EQUAL_SHARES = 1e-9


@dataclass(frozen=True)
class Pairs:
    """The pairs of all sources."""

    # One row a pair: the columns of PAIRS but for the texts, beside those of the facts.
    table: pl.DataFrame
    united: dict[str, int]  # by source, the number of its rows that became part of an earlier row
    dropped: pl.DataFrame  # likewise, with a reason: those left out for the lockbox's sake


def make_pairs(
    rows: pl.DataFrame,
    folds: int,
    threshold: float,
    test_share: float = 0.0,
) -> Pairs:
    """Make pairs of usable rows: rows that judge the same pair are united, and each pair gets a fold.

    Prompts that are alike form a group, and all pairs of a group are in one fold.

    Args:
        rows: The facts of usable rows with their positions, as stream.read_facts gives them.
        folds: The number of folds.
        threshold: The Jaccard similarity from which on two prompts share a group.
        test_share: The share of the groups of training rows that are drawn into the lockbox.
    """
    table, united = unite_judgements(rows)
    ids = _make_ids_unique(table["id"].to_list(), table["source"].to_list())

    # The root of a group is the position of its earliest prompt. The group's number is a hash of that prompt.
    prompts = table["prompt_text"]
    roots = group_prompts(prompts, threshold).tolist()
    number_by_root = {root: group_number(prompts[root]) for root in set(roots)}
    group = pl.Series([number_by_root[root] for root in roots], dtype=pl.Int64)
    fold = group % folds

    # Draw the lockbox. Then drop the extra and pool rows whose prompts are like one of its own.
    unique_ids = pl.Series(ids, dtype=pl.String)
    table = table.with_columns(id=unique_ids, group=group, fold=fold)
    table = draw_lockbox(table, folds, test_share)
    is_dropped = find_like_lockbox(table)
    dropped = table.filter(is_dropped).with_columns(reason=pl.lit(LIKE_LOCKBOX))

    types = {name: dtype for name, dtype in PAIRS.items() if name not in TEXTS}
    return Pairs(
        table=table.filter(~is_dropped).cast(types),
        united=united,
        dropped=dropped,
    )


def draw_lockbox(table: pl.DataFrame, folds: int, share: float) -> pl.DataFrame:
    """Move a share of the groups of training rows into the lockbox, and take lockbox rows out of the folds."""
    # Each group draws a lot from 0 to 9,999. The lot is a part of the group's number, a hash, so that
    # rows that are added later change no lot. It comes from the quotient of number and folds: the
    # fold is the remainder, and so all folds lose about the same share of their groups.
    quotient = pl.col("group") // folds
    lot = quotient % DRAW_STEPS
    is_drawn = lot < round(share * DRAW_STEPS)

    # Lockbox rows have the role test.
    is_training = pl.col("role") == "train"
    role = pl.when(is_training & is_drawn).then(pl.lit("test")).otherwise(pl.col("role"))
    table = table.with_columns(role=role)

    # They are in no fold.
    is_lockbox = pl.col("role") == "test"
    fold = pl.when(is_lockbox).then(None).otherwise(pl.col("fold"))
    return table.with_columns(fold=fold)


def find_like_lockbox(table: pl.DataFrame) -> pl.Series:
    """Find the extra and pool rows whose prompt is like one of the lockbox: none may be trained on.

    Returns:
        For each row of the table whether it is such a row.
    """
    # Like prompts are in one group. Polars wants the values for is_in as a list, which implode
    # makes.
    is_lockbox = table["role"] == "test"
    lockbox_groups = table["group"].filter(is_lockbox).unique()
    is_group_in_lockbox = table["group"].is_in(lockbox_groups.implode())

    # Training rows are not dropped: if one is like a lockbox row, the leak report stops the
    # command.
    is_extra_or_pool = table["role"].is_in(["extra", "pool"])
    return is_extra_or_pool & is_group_in_lockbox


def group_number(prompt: str) -> int:
    """Return a group's number, a hash of its earliest prompt (normalised)."""
    # 64 bits of the hash, of which one is cut off: from 0 to 2**63 - 1, the largest number in an
    # int64.
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def unite_judgements(rows: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, int]]:
    """Unite the rows of one role that judge one pair, in whichever order its responses stand.

    Returns:
        The first row of each pair with the weight, shares and winner of all its judgements; and, by
        source, how many rows became part of an earlier one.
    """
    # One row a pair: the first one, with the votes of all.
    totals = _sum_votes(rows)
    first_rows = totals["first_row"]
    table = rows[first_rows].with_columns(totals.select(*SHARES, "weight", "both_bad"))

    # A pair of several judgements gets the winner with the most votes. A single judgement keeps its own
    # winner, since its shares may come from a teacher that favours another one. Pool rows have no winner.
    is_single = totals["judgements"] == 1
    is_pool = table["role"] == "pool"
    winner = pl.when(is_single | is_pool).then(pl.col("winner")).otherwise(_most_voted())
    table = table.with_columns(winner=winner)

    # Count the other rows, which became part of an earlier one.
    row_numbers = pl.int_range(rows.height, dtype=first_rows.dtype, eager=True)
    is_first = row_numbers.is_in(first_rows.implode())
    later_rows = rows.filter(~is_first)
    counts = name_sources(later_rows).value_counts()
    united = dict(counts.iter_rows())
    return table, united


def name_sources(table: pl.DataFrame) -> pl.Series:
    """Name each row's source as the printed table does: with its role where that is extra or pool."""
    is_special = pl.col("role").is_in(["extra", "pool"])
    name = pl.when(is_special).then(pl.format("{} ({})", "source", "role")).otherwise("source")
    return table.select(name.alias("name"))["name"]


def _sum_votes(rows: pl.DataFrame) -> pl.DataFrame:
    """Sum the votes of all rows that judge the same pair for the same role.

    Returns:
        For each pair: first_row (the number of its first judgement's row), judgements (how many there
        are), weight (the votes), the shares of the votes, null for the pool, and both_bad.
    """
    judgements = _align_judgements(rows).with_row_index("first_row")

    # Shares become votes, which can be added: 0.75 of 4 votes are 3. The sums become shares again.
    votes = judgements.with_columns(pl.col(SHARES) * pl.col("weight"))
    totals = votes.group_by(SAME_PAIR, maintain_order=True).agg(
        pl.first("first_row"),
        pl.len().alias("judgements"),
        pl.sum("weight", *SHARES),
        pl.any("both_bad"),
    )

    # In Polars, `when` without `otherwise` gives null: that is what the pool gets.
    has_votes = pl.col("role") != "pool"
    return totals.with_columns(pl.when(has_votes).then(pl.col(SHARES) / pl.col("weight")))


def _align_judgements(rows: pl.DataFrame) -> pl.DataFrame:
    """Bring the votes of a pair's rows into one order of its responses, that of its first row.

    Returns:
        For each row: the columns SAME_PAIR, weight, both_bad, and the shares of the votes, in which A is
        what the pair's first row has as A.
    """
    # For example, three rows of a pair, the second of which has the responses the other way round:
    #     is_swapped    true   false   true
    #     p_model_a     0.9    0.2     0.7      as it is in the row
    #     p_model_a     0.9    0.8     0.7      as it is returned; 0.8 was p_model_b
    judgements = rows.select(*SAME_PAIR, "is_swapped", "weight", *SHARES, "both_bad")
    is_same_order = pl.col("is_swapped") == pl.col("is_swapped").first().over(SAME_PAIR)
    share_a = pl.when(is_same_order).then("p_model_a").otherwise("p_model_b")
    share_b = pl.when(is_same_order).then("p_model_b").otherwise("p_model_a")
    return judgements.with_columns(p_model_a=share_a, p_model_b=share_b)


def _most_voted() -> pl.Expr:
    """Return an expression: the verdict with the largest share, tie where several have it."""
    # What is this large counts as the largest share: sums of float shares are not exact.
    least_share = pl.max_horizontal(SHARES) - EQUAL_SHARES
    has_a_most = pl.col("p_model_a") >= least_share
    has_b_most = pl.col("p_model_b") >= least_share
    has_tie_most = pl.col("p_tie") >= least_share

    is_tie = has_tie_most | (has_a_most & has_b_most)
    winner = pl.when(has_a_most).then(pl.lit("model_a")).otherwise(pl.lit("model_b"))
    return pl.when(is_tie).then(pl.lit("tie")).otherwise(winner)


def _make_ids_unique(ids: list[str], sources: list[str]) -> list[str]:
    """Make each row's id unique: of equal ids, the first one stays as it is.

    For example, the ids 7, 7, 7 and 7 of the source arena become 7, arena:7, arena:7:2 and
    arena:7:3.
    """
    used: set[str] = set()
    unique_ids = []
    for row_id, source in zip(ids, sources, strict=True):
        unique_id = row_id
        attempt = 1
        while unique_id in used:
            unique_id = f"{source}:{row_id}"
            if attempt > 1:
                unique_id = f"{unique_id}:{attempt}"
            attempt += 1
        used.add(unique_id)
        unique_ids.append(unique_id)
    return unique_ids
