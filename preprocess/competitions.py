"""The competitions on Kaggle, one entry each: their files, what they ask for, and their rules.

preprocess makes a layout of each entry (sources/competition.py). The spec of a kernel names one, and
build, the kernel, its rehearsal, `weigh`, `submit` and `scores` go by it.
"""

from dataclasses import dataclass
from typing import Literal

from preprocess.model_input import VERDICTS

# Kaggle ends every kernel after twelve hours.
LONGEST_SECONDS = 43_200.0


@dataclass(frozen=True)
class Competition:
    """A competition on Kaggle. Its test and train file have id, prompt, response_a and response_b.

    Columns of several verdicts are in the order of `verdicts`.
    """

    name: str  # as messages name the layout of its train file
    slug: str  # on Kaggle
    verdicts: tuple[str, ...]  # what it tells apart: model_a, model_b, and tie if it knows ties

    # Its files.
    texts_are_turns: bool  # a text is a JSON list of turns; else it is the only turn
    verdict_form: Literal["name", "flags"]  # how the train file tells a row's verdict
    verdict_columns: tuple[str, ...]  # one with its name, or one of 0 and 1 for each verdict
    marks_scored_rows: bool  # the test file's column `scored` says which rows count now

    # Its submission.csv.
    answer: Literal["winner", "probabilities"]
    columns: tuple[str, ...]  # besides id: one with the winner's name, or one for each verdict
    metric: Literal["accuracy", "log_loss", "brier_score"]

    # Its rules.
    daily_submissions: int  # of a team, in a day of UTC
    time_limits: dict[int | None, float]  # seconds by rows up to; None: any more
    hidden_rows: tuple[int, ...]  # how many the hidden test has, in each of its phases

    def __post_init__(self) -> None:
        """Raise ValueError where the entry contradicts itself."""
        # The order counts: the kernel's probabilities for rows that it cannot score are in this order.
        if self.verdicts not in (VERDICTS[:2], VERDICTS):
            raise ValueError(
                f"{self.name}: verdicts are {self.verdicts}, expected {VERDICTS}, or the same without tie"
            )

        # The train file tells a row's verdict by its name in one column, or by a flag for each verdict.
        needed = 1 if self.verdict_form == "name" else len(self.verdicts)
        count = len(self.verdict_columns)
        if count != needed:
            raise ValueError(
                f"{self.name}: verdict_columns: expected {needed} of them, found {count}"
            )

        # A submission names the winner in one column, or has a probability for each verdict.
        needed = 1 if self.answer == "winner" else len(self.verdicts)
        count = len(self.columns)
        if count != needed:
            raise ValueError(f"{self.name}: columns: expected {needed} of them, found {count}")


# By the name that specs use. The rules are those of https://www.kaggle.com/competitions/SLUG.
COMPETITIONS = {
    "wsdm": Competition(
        name="WSDM",
        slug="wsdm-cup-multilingual-chatbot-arena",
        verdicts=("model_a", "model_b"),
        texts_are_turns=False,
        verdict_form="name",
        verdict_columns=("winner",),
        marks_scored_rows=True,
        answer="winner",
        columns=("winner",),
        metric="accuracy",
        daily_submissions=5,
        # 4 h 45 min for the public phase's 10,000 rows, 12 h for the final phase's 25,000.
        time_limits={12_000: 17_100.0, None: LONGEST_SECONDS},
        hidden_rows=(10_000, 25_000),
    ),
    "lmsys": Competition(
        name="LMSYS",
        slug="lmsys-chatbot-arena",
        verdicts=("model_a", "model_b", "tie"),
        texts_are_turns=True,
        verdict_form="flags",
        verdict_columns=("winner_model_a", "winner_model_b", "winner_tie"),
        marks_scored_rows=False,
        answer="probabilities",
        columns=("winner_model_a", "winner_model_b", "winner_tie"),
        metric="log_loss",
        daily_submissions=5,
        time_limits={None: 32_400.0},
        hidden_rows=(25_000,),
    ),
}
