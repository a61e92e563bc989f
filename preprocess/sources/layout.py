"""What a layout has to define: its name, its columns, and how one of its rows is read."""

from collections.abc import Callable
from dataclasses import dataclass

from preprocess.sources.rows import Judgement
from preprocess.sources.tables import Table


@dataclass(frozen=True)
class Layout:
    """One kind of source file.

    `read_judgement` reads a row, given its values by column (a line of JSONL may lack some). It raises
    UnusableRow where a value is of the wrong kind; reader.py checks what every layout has to check.
    """

    name: str
    columns: tuple[str, ...]  # by which a file of this layout is recognised
    verdict_columns: tuple[str, ...]  # those of them that only a judged row needs
    read_judgement: Callable[[dict], Judgement]
    required_columns: Callable[[Table], tuple[str, ...]] | None = None  # where not all are needed
    texts_are_turns: bool = (
        False  # they are JSON lists of turns, by which layouts of equal columns are told apart
    )

    def find_missing_columns(self, table: Table, needs_verdicts: bool = True) -> list[str]:
        """List the columns that a file would need to be of this layout, and lacks."""
        required = self.columns
        if self.required_columns is not None:
            required = self.required_columns(table)
        if not needs_verdicts:
            required = [column for column in required if column not in self.verdict_columns]
        return [column for column in required if column not in table.columns]
