"""Reading single values of a source file: texts and turns, cleaned by `model_input.clean`.

The layouts share these functions. They raise UnusableRow for a value of the wrong kind.
"""

from preprocess.model_input import clean
from preprocess.sources.rows import UnusableRow


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


def show_turns(value: object) -> list[str] | None:
    """Return a value that may not be turns at all in their form, for the file of rejected rows."""
    if value is None:
        return None
    if isinstance(value, list):
        return [read_text(turn) for turn in value]
    return [read_text(value)]
