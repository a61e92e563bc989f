"""The rows that a model gets most wrong, as the page shows them: texts in turns, cut for reading, every character visible."""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import polars as pl

from postprocess.report.metrics import Scored, worst
from preprocess.model_input import VERDICTS
from recipes.pairwise.tracking.metrics import ORDERS

COUNT = 50
PROMPT_CHARACTERS, ANSWER_CHARACTERS = 400, 700
LINES = 14
REST_CHARACTERS = 50_000  # of a text behind its beginning; hostile rows have hundreds of thousands
SLACK = 1.25  # a text this much longer than its limit is shown whole: no click for three words
ZERO_WIDTH_JOINER, VARIATION_SELECTOR = "\u200d", "\ufe0f"
CONTROLS = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"}  # their pictures in Unicode
CONTROLS |= {0x7F: 0x2421} | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)


@dataclass(frozen=True)
class Text:
    """A turn: what is shown, what opens behind it, and how many characters are left out even there."""

    shown: str
    rest: str = ""
    left_out: int = 0

    @property
    def is_blank(self) -> bool:
        """Whether nothing of it is to be seen: white space, or characters without a width."""
        return all(character.isspace() or not character.isprintable() for character in self.shown + self.rest)

    @property
    def characters(self) -> int:
        """Of the whole text."""
        return len(self.shown) + len(self.rest) + self.left_out


@dataclass(frozen=True)
class Error:
    """A row with a wrong verdict. `prompt`, `response_a`, `response_b` are turns, empty where there are no texts.

    `probabilities`: of each order and of their mean, by verdict, all from the pairs file's view of A and B.
    """

    id: str
    facts: tuple[str, ...]
    winner: str
    verdict: str
    prompt: tuple[Text, ...]
    response_a: tuple[Text, ...]
    response_b: tuple[Text, ...]
    probabilities: tuple[tuple[str, dict[str, float]], ...]


def worst_errors(rows: pl.DataFrame, data: Scored, count: int = COUNT) -> list[Error]:
    """The rows with a wrong verdict whose winner had the least probability, by the mean of both orders."""
    places = worst(data, count)
    return [error(row, data, place) for row, place in zip(rows[places].iter_rows(named=True), places, strict=True)]


def error(row: dict, data: Scored, place: int) -> Error:
    """One row of the table as the page shows it."""
    orders = {name: data.both_rov[place, at] for at, name in enumerate(ORDERS)} | {"mean": data.mean_rv[place]}
    facts = [row.get("language"), row.get("source"), f"fold {row['fold']}" if row["fold"] is not None else None]
    return Error(
        id=visible(str(row["id"])),
        facts=tuple(visible(fact) for fact in facts if fact),
        winner=data.verdicts[data.winners_r[place]],
        verdict=data.verdicts[int(data.mean_rv[place].argmax())],
        prompt=turns(row.get("prompt"), PROMPT_CHARACTERS),
        response_a=turns(row.get("response_a"), ANSWER_CHARACTERS),
        response_b=turns(row.get("response_b"), ANSWER_CHARACTERS),
        probabilities=tuple((name.replace("_", " "), by_verdict(values, data.verdicts)) for name, values in orders.items()),
    )


def by_verdict(values: Sequence[float], verdicts: tuple[str, ...]) -> dict[str, float]:
    """Probabilities by name, A first, then B, then a tie."""
    return {name: float(values[verdicts.index(name)]) for name in VERDICTS if name in verdicts}


def turns(texts: Sequence[str | None] | None, limit: int) -> tuple[Text, ...]:
    """The turns of a conversation, each cut on its own."""
    return tuple(shortened(text or "", limit) for text in texts or ())


def visible(text: str) -> str:
    """`text` with a picture in place of every control character but tabs and line breaks."""
    return text.replace("\r\n", "\n").translate(CONTROLS)


def shortened(text: str, limit: int) -> Text:
    """`text`, visible, cut where a word ends after at most `limit` characters or LINES lines."""
    text = visible(text)
    breaks = [at for at, character in enumerate(text[: int(limit * SLACK)]) if character == "\n"]
    if len(breaks) > LINES:
        limit = min(limit, breaks[LINES - 1])
    elif len(text) <= limit * SLACK:
        return Text(text)
    cut = word_end(text, limit)
    rest = text[cut:]
    return Text(text[:cut], rest[:REST_CHARACTERS], max(0, len(rest) - REST_CHARACTERS))


def word_end(text: str, limit: int) -> int:
    """Where to cut at `limit` or a little before: at white space, else anywhere but within a character made of several."""
    space = max(text.rfind(" ", limit - 40, limit + 1), text.rfind("\n", limit - 40, limit + 1))
    if space > 0:
        return space
    while limit > 1 and (
        unicodedata.combining(text[limit])
        or text[limit] in (ZERO_WIDTH_JOINER, VARIATION_SELECTOR)
        or text[limit - 1] == ZERO_WIDTH_JOINER
    ):
        limit -= 1
    return limit
