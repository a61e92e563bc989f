"""What is wrong with a value of a YAML file, in the words of the one line that a user reads."""

import difflib
import math
from collections.abc import Iterable, Mapping

EXPECTED = {  # pydantic's kinds of problem, in the words of YAML
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "model_type": "expected keys and values",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a number",
    "bool_type": "expected true or false",
}
BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("of at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("of at most", "le"),
}


def nearest(key: object, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known word that is most like `key`, if one is like it."""
    match = difflib.get_close_matches(str(key), list(known), n=1, cutoff=cutoff)
    return match[0] if match else None


def unknown_key(key: object, known: Iterable[str]) -> str:
    """That a key is unknown, and the known one that may be meant."""
    match = nearest(key, known)
    if isinstance(key, bool):
        return "unknown key (YAML reads on, yes, off and no as true and false); remove it, or put it in quotes"
    return f"unknown key; did you mean {match}?" if match else "unknown key; remove it"


def in_words(problem: Mapping, patterns: Mapping[str, str]) -> str:
    """One of pydantic's problems, without its key. `patterns` says of each regular expression what it asks for."""
    kind, found = problem["type"], problem["input"]
    if kind == "string_pattern_mismatch":
        expected = f"expected {patterns[problem['ctx']['pattern']]}"
    elif kind in ("string_too_short", "string_too_long"):
        side = "at least" if kind == "string_too_short" else "at most"
        expected = f"expected text of {side} {problem['ctx']['min_length' if side == 'at least' else 'max_length']} characters"
    elif kind == "literal_error":
        words = problem["ctx"]["expected"].replace("'", "").replace(" or ", ", ").split(", ")
        match = nearest(found, words) if isinstance(found, str) else None
        return f"expected one of {', '.join(words)}, found {found!r}" + (f"; did you mean {match}?" if match else hint(found))
    elif kind in BOUNDS:
        word, name = BOUNDS[kind]
        expected = f"expected a number {word} {problem['ctx'][name]:g}"
    else:
        expected = EXPECTED.get(kind, problem["msg"].removeprefix("Value error, "))
    return f"{expected}, found {found!r}{hint(found)}"


def without_echo(problems: list[dict], known: Iterable[str]) -> list[dict]:
    """Pydantic's problems but for a key that is only missing because it stands there mistyped."""
    meant = {nearest(problem["loc"][-1], known) for problem in problems if problem["type"] == "extra_forbidden"}
    return [problem for problem in problems if problem["type"] != "missing" or problem["loc"][-1] not in meant]


def hint(found: object) -> str:
    """What YAML made of a value that may have been meant otherwise."""
    if isinstance(found, bool):
        return " (YAML reads no, off, yes and on as false and true: put such a word in quotes)"
    try:
        number = float(found) if isinstance(found, str) else math.nan
    except ValueError:
        return ""
    return f" (YAML reads that as text: write {plain(number)})" if math.isfinite(number) else ""


def plain(number: float) -> str:
    """A number as YAML reads it, without an exponent."""
    return str(int(number)) if number == int(number) else f"{number:.12f}".rstrip("0")
