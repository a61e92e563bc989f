"""Collect the rows that the model gets most wrong, with their texts cut to a readable length.

`results.measure_run` calls `find_worst_rows`. Control characters become visible: the texts are
the users' and the models', and some are made to deceive.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from postprocess.report.metrics import ScoredRows
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking.metrics import ORDERS

MAX_ROWS = 50
PROMPT_CHARACTERS = 400
ANSWER_CHARACTERS = 700
MAX_LINES = 14
MAX_REST_CHARACTERS = 50_000  # of a text after its beginning; hostile rows have far more
# A text is cut only if it is longer than its limit by this factor: no click for three words.
SLACK = 1.25
WORD_CHARACTERS = 40  # how far back from its limit a text is searched for the end of a word

# Control characters but tab and line feed become characters that can be seen: Unicode's pictures of
# the characters 0 to 31 and of delete. The controls of Latin-1 have no pictures.
CONTROL_PICTURES = {code: 0x2400 + code for code in range(0x20)}
CONTROL_PICTURES[0x7F] = 0x2421
CONTROL_PICTURES.update(dict.fromkeys(range(0x80, 0xA0), 0xFFFD))
del CONTROL_PICTURES[ord("\t")]
del CONTROL_PICTURES[ord("\n")]


@dataclass(frozen=True)
class Text:
    """One turn of a prompt or answer, cut for the page."""

    shown: str  # the beginning, or all of a short text
    rest: str = ""  # opens on a click
    left_out: int = 0  # number of characters after the rest, which are not in the page

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to see: only white space and characters without a width."""
        for character in self.shown + self.rest:
            if character.isprintable() and not character.isspace():
                return False
        return True

    @property
    def characters(self) -> int:
        """Length of the whole text."""
        return len(self.shown) + len(self.rest) + self.left_out


@dataclass(frozen=True)
class WorstRow:
    """A row with a wrong verdict; its texts are empty without the pairs file."""

    id: str
    facts: tuple[str, ...]  # language, source and fold, as far as they are known
    winner: str
    verdict: str  # the model's
    prompt: tuple[Text, ...]
    response_a: tuple[Text, ...]
    response_b: tuple[Text, ...]
    probabilities: dict[str, dict[str, float]]  # by order and the mean, then by verdict


def find_worst_rows(
    rows: pl.DataFrame, scored: ScoredRows, count: int = MAX_ROWS
) -> list[WorstRow]:
    """Find the rows with a wrong verdict whose winner had the least probability."""
    places = rank_wrong_rows(scored)[:count]
    return [make_worst_row(rows.row(place, named=True), scored, place) for place in places]


def rank_wrong_rows(scored: ScoredRows) -> list[int]:
    """Return the places of the rows with a wrong verdict, the least probable winner first."""
    # A stable sort keeps rows of equal probability in the order of their ids.
    wrong_rows = np.flatnonzero(scored.is_decided_r & ~scored.is_right_r)
    winner_probabilities = scored.mean_rv[wrong_rows, scored.winners_r[wrong_rows]]
    ranking = np.argsort(winner_probabilities, kind="stable")
    return wrong_rows[ranking].tolist()


def make_worst_row(row: dict, scored: ScoredRows, place: int) -> WorstRow:
    """Make a row, which stands at `place` in the arrays of `scored`, ready for the page."""
    facts = [row.get("language"), row.get("source")]
    if row["fold"] is not None:
        facts.append(f"fold {row['fold']}")

    # Show both orders, as a row may be wrong in one of them only, and their mean, which decides.
    probabilities = {}
    for order_place, order in enumerate(ORDERS):
        name = order.replace("_", " ")
        order_probabilities = scored.probabilities_rov[place, order_place]
        probabilities[name] = name_probabilities(order_probabilities, scored.verdicts)
    mean = scored.mean_rv[place]
    probabilities["mean"] = name_probabilities(mean, scored.verdicts)

    return WorstRow(
        id=show_controls(str(row["id"])),
        facts=tuple(show_controls(fact) for fact in facts if fact),
        winner=scored.verdicts[scored.winners_r[place]],
        verdict=scored.verdicts[mean.argmax()],
        prompt=cut_turns(row.get("prompt"), PROMPT_CHARACTERS),
        response_a=cut_turns(row.get("response_a"), ANSWER_CHARACTERS),
        response_b=cut_turns(row.get("response_b"), ANSWER_CHARACTERS),
        probabilities=probabilities,
    )


def name_probabilities(probabilities_v: np.ndarray, verdicts: tuple[str, ...]) -> dict[str, float]:
    """Give each probability its verdict's name, A first, then B, then a tie if there is one."""
    ordered = sorted(verdicts, key=VERDICTS.index)
    return {verdict: float(probabilities_v[verdicts.index(verdict)]) for verdict in ordered}


def cut_turns(turns: Sequence[str | None] | None, limit: int) -> tuple[Text, ...]:
    """Cut each turn of a conversation on its own; an absent turn is an empty text."""
    if turns is None:
        return ()
    return tuple(cut_text(turn or "", limit) for turn in turns)


def cut_text(text: str, limit: int) -> Text:
    """Cut a text for the page into a beginning that shows, and a rest that opens on a click.

    Args:
        text: One turn of a prompt or answer.
        limit: The characters of the beginning, which has MAX_LINES lines at most. A text that is only a
            little longer is not cut.
    """
    text = show_controls(text)
    longest_uncut = int(limit * SLACK)
    beginning = text[:longest_uncut]
    has_many_lines = beginning.count("\n") > MAX_LINES
    if len(text) <= longest_uncut and not has_many_lines:
        return Text(text)

    # Many short lines take as much room on the page as a long text: the beginning ends after MAX_LINES.
    if has_many_lines:
        lines = beginning.split("\n")[:MAX_LINES]
        limit = min(limit, len("\n".join(lines)))

    # Of a very long rest, only a part is on the page: even hidden text makes a browser slow.
    cut = find_cut(text, limit)
    rest = text[cut:]
    left_out = max(0, len(rest) - MAX_REST_CHARACTERS)
    return Text(text[:cut], rest[:MAX_REST_CHARACTERS], left_out)


def find_cut(text: str, limit: int) -> int:
    """Find where to cut a text: at white space shortly before its limit, or else at the limit."""
    earliest = max(0, limit - WORD_CHARACTERS)
    last_space = text.rfind(" ", earliest, limit + 1)
    last_line_break = text.rfind("\n", earliest, limit + 1)
    white_space = max(last_space, last_line_break)

    # Chinese, or a long link, has no white space.
    return white_space if white_space > 0 else limit


def show_controls(text: str) -> str:
    """Replace control characters by their pictures, but for tabs and line breaks."""
    return text.replace("\r\n", "\n").translate(CONTROL_PICTURES)
