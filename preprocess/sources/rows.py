"""The schema that all source files are brought to, and the rules that a usable row obeys.

reader.py builds these rows; `preprocess.pairs` makes pairs of them.
"""

import math
from dataclasses import dataclass

import polars as pl

from preprocess.model_input import VERDICTS

# A conversation has one item a turn; a plain text is a conversation of one turn.
TURNS = pl.List(pl.String)
TEXTS = ("prompt", "response_a", "response_b")
# Shares of the votes for each verdict, in the order of VERDICTS.
SHARES = ("p_model_a", "p_model_b", "p_tie")

# One row of a source file.
ROWS = pl.Schema(
    {
        "file": pl.String,
        "row": pl.Int64,
        "id": pl.String,
        "prompt": TURNS,
        "response_a": TURNS,
        "response_b": TURNS,
        "winner": pl.String,
        "language": pl.String,
        "source": pl.String,
        "p_model_a": pl.Float64,
        "p_model_b": pl.Float64,
        "p_tie": pl.Float64,
        "weight": pl.Float64,
        # Null where the row can be used.
        "reason": pl.String,
    }
)

# Shares that were stored as float32 do not add up to 1 exactly.
SHARES_TOLERANCE = 1e-3


class UnusableRow(Exception):
    """A row that cannot be used. The message is the reason, a few words without the row's values."""


@dataclass(frozen=True)
class Judgement:
    """What a layout reads from a row: two responses to one prompt, and the verdict on them.

    Attributes:
        id: As the file has it; "" where it has none.
        prompt: The user's turns.
        response_a: The turns of the response that was shown as A.
        response_b: The turns of the other response.
        winner: One of VERDICTS; anything else makes the row unusable.
    """

    id: str
    prompt: list[str]
    response_a: list[str]
    response_b: list[str]
    winner: str


def check_judgement(judgement: Judgement) -> None:
    """Raise UnusableRow where a model could learn nothing, or something wrong, from a judgement."""
    if not judgement.id:
        raise UnusableRow("no id")
    if is_blank(judgement.prompt):
        raise UnusableRow("empty prompt")
    if is_blank(judgement.response_a) or is_blank(judgement.response_b):
        raise UnusableRow("empty answer")
    if judgement.winner not in VERDICTS:
        raise UnusableRow("unknown winner")

    # Equal answers can be a tie, but none can be better.
    is_identical = judgement.response_a == judgement.response_b
    if is_identical and judgement.winner != "tie":
        raise UnusableRow("identical answers, one wins")


def is_blank(turns: list[str]) -> bool:
    """Return whether no turn holds anything but white space."""
    return not "".join(turns).strip()


def read_vote_shares(values: dict, winner: str) -> dict[str, float]:
    """Read how the votes on a pair were spread, from an earlier pairs.parquet or from a teacher.

    Args:
        values: The row's values by column.
        winner: The verdict, which has all the votes where the row has no shares.

    Returns:
        p_model_a, p_model_b and p_tie, which add up to 1, and weight, the number of votes.

    Raises:
        UnusableRow: A value is not a number, the shares do not add up, or the weight is not positive.
    """
    has_shares = all(values.get(name) not in (None, "") for name in SHARES)
    if not has_shares:
        shares = {f"p_{verdict}": float(verdict == winner) for verdict in VERDICTS}
        return shares | {"weight": 1.0}

    # CSV has the empty string where other files have null.
    weight = values.get("weight")
    if weight in (None, ""):
        weight = 1.0
    try:
        weight = float(weight)
        shares = {name: float(values[name]) for name in SHARES}
    except (TypeError, ValueError):
        raise UnusableRow("vote shares are not numbers") from None

    # Written so that NaN, which compares with nothing, is refused.
    total = sum(shares.values())
    are_shares = min(shares.values()) >= 0 and abs(total - 1) < SHARES_TOLERANCE
    is_weight = 0 < weight < math.inf
    if not (are_shares and is_weight):
        raise UnusableRow("vote shares do not add up to 1, or the weight is not positive")
    return shares | {"weight": weight}
