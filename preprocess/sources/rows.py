"""The schema that all source files are brought to, the values of a row, and the rules that it obeys.

The layouts read values with these functions; reader.py builds the rows, and `preprocess.pairs` makes
pairs of them.
"""

import json
import math
from dataclasses import dataclass

import polars as pl

from preprocess.model_input import VERDICTS, clean

# A conversation has one item a turn; a plain text is a conversation of one turn.
TURNS = pl.List(pl.String)
TEXTS = ("prompt", "response_a", "response_b")
# Shares of the votes for each verdict, in the order of VERDICTS.
SHARES = ("p_model_a", "p_model_b", "p_tie")

# Arena's words for a tie of two bad responses, which differ from release to release.
BOTH_BAD = ("both_bad", "tie (bothbad)")

# What a row is for: see docs/data.md.
ROLES = ("train", "extra", "pool", "test")

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
        "role": pl.String,
        "p_model_a": pl.Float64,
        "p_model_b": pl.Float64,
        "p_tie": pl.Float64,
        "weight": pl.Float64,
        "both_bad": pl.Boolean,
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
    """What a layout reads from a row: the turns of a prompt and two responses, and the verdict."""

    id: str  # "" where the file has none
    prompt: list[str]
    response_a: list[str]
    response_b: list[str]
    winner: str  # one of VERDICTS; anything else makes a row unusable that needs a verdict
    share_a: float | None = None  # of the votes on A, the rest being on B; None where all agree
    both_bad: bool = False  # whether a tie says that both responses are bad


def judge_by_share(
    row_id: str, prompt: list[str], response_a: list[str], response_b: list[str], share_a: float
) -> Judgement:
    """Make the judgement of a row whose verdict is a share of votes on A; one half is a tie."""
    if share_a == 0.5:
        return Judgement(row_id, prompt, response_a, response_b, "tie")
    winner = "model_a" if share_a > 0.5 else "model_b"
    return Judgement(row_id, prompt, response_a, response_b, winner, share_a)


def read_winner(value: object) -> tuple[str, bool]:
    """Return a verdict in this project's words, and whether it calls both responses bad."""
    winner = read_text(value)
    if winner in BOTH_BAD:
        return "tie", True
    return winner, False


def read_text(value: object) -> str:
    """Return a value as text; null becomes ""."""
    if value is None:
        return ""
    return clean(str(value))


def read_turns(value: object) -> list[str]:
    """Return the turns of a conversation: a text or null is one turn, a list has a turn an item."""
    if value is None or isinstance(value, str):
        return [clean(value)]
    if not isinstance(value, list):
        raise UnusableRow("not a list of turns")

    turns = []
    for turn in value:
        if turn is not None and not isinstance(turn, str):
            raise UnusableRow("not a list of turns")
        turns.append(clean(turn))
    return turns


def read_json_turns(value: object) -> list[str]:
    """Return the turns of a JSON list, or of a list that is parsed already; null and "" hold none."""
    if value is None or value == "":
        return []

    # Parquet and JSONL can hold real lists.
    if not isinstance(value, list):
        try:
            value = json.loads(value)
        except (json.JSONDecodeError, RecursionError, TypeError):
            raise UnusableRow("not a JSON list of turns") from None
    if not isinstance(value, list):
        raise UnusableRow("not a JSON list of turns")
    return read_turns(value)


def show_turns(value: object) -> list[str] | None:
    """Return a value that may not be turns at all in their form, for the file of rejected rows."""
    if value is None:
        return None
    if isinstance(value, list):
        return [read_text(turn) for turn in value]
    return [read_text(value)]


def check_judgement(judgement: Judgement, needs_verdict: bool = True) -> None:
    """Check that a model can learn from a judgement: nothing is empty, and the verdict makes sense."""
    if not judgement.id:
        raise UnusableRow("no id")
    if not "".join(judgement.prompt).strip():
        raise UnusableRow("empty prompt")
    for response in (judgement.response_a, judgement.response_b):
        if not "".join(response).strip():
            raise UnusableRow("empty answer")

    # For a row that teachers label, there is no verdict to check; two equal answers teach nothing.
    is_identical = judgement.response_a == judgement.response_b
    if not needs_verdict:
        if is_identical:
            raise UnusableRow("identical answers")
        return

    if judgement.winner not in VERDICTS:
        raise UnusableRow("unknown winner")
    # Equal answers can be a tie, but none can be better.
    if is_identical and judgement.winner != "tie":
        raise UnusableRow("identical answers, one wins")


def read_vote_shares(values: dict, judgement: Judgement) -> dict[str, float]:
    """Read how the votes on a pair were spread, from an earlier pairs.parquet or from a teacher.

    Returns:
        p_model_a, p_model_b and p_tie, which add up to 1, and weight, the number of votes.

    Raises:
        UnusableRow: A value is not a number, the shares do not add up, or the weight is not positive.
    """
    has_shares = all(values.get(name) not in (None, "") for name in SHARES)
    if not has_shares:
        return _spread_one_vote(judgement)

    # CSV has the empty string where other files have null.
    weight = values.get("weight")
    if weight in (None, ""):
        weight = 1.0
    try:
        weight = float(weight)
        shares = {name: float(values[name]) for name in SHARES}
    except (TypeError, ValueError):
        raise UnusableRow("vote shares are not numbers") from None

    # Every comparison with NaN is false. Asked whether values are right, and not whether they are
    # wrong, NaN is refused as well.
    total = sum(shares.values())
    are_shares = min(shares.values()) >= 0 and abs(total - 1) < SHARES_TOLERANCE
    is_weight = 0 < weight < math.inf
    if not (are_shares and is_weight):
        raise UnusableRow("vote shares do not add up to 1, or the weight is not positive")
    return shares | {"weight": weight}


def _spread_one_vote(judgement: Judgement) -> dict[str, float]:
    """Return the shares of one vote: all for the winner, or spread as scores or grades say."""
    if judgement.share_a is not None:
        share_b = 1 - judgement.share_a
        return {"p_model_a": judgement.share_a, "p_model_b": share_b, "p_tie": 0.0, "weight": 1.0}

    shares = {}
    for verdict in VERDICTS:
        shares[f"p_{verdict}"] = float(verdict == judgement.winner)
    return shares | {"weight": 1.0}
