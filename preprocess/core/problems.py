"""Validation messages: pydantic's problems with a YAML file, in the words of the line that a user reads.

Recipes and kernel specs are validated by pydantic, whose messages speak of Python types. Each function
here returns a part of the line "KEY: expected …, found …; did you mean …?".
"""

import difflib
import math
from collections.abc import Iterable, Mapping

# The message for each of pydantic's types of problem that needs no context.
EXPECTED = {
    "tuple_type": "expected a list",
    "list_type": "expected a list",
    "model_type": "expected keys and values",
    "string_type": "expected text",
    "int_type": "expected a whole number",
    "int_from_float": "expected a whole number",
    "float_type": "expected a number",
    "finite_number": "expected a number",
    "bool_type": "expected true or false",
    "dict_type": "expected keys and values",
    "too_short": "expected at least one entry",
}

# For pydantic's types of violated bounds: the comparison, and the bound's key in the problem's context.
NUMBER_BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("of at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("of at most", "le"),
}
LENGTH_BOUNDS = {
    "string_too_short": ("at least", "min_length"),
    "string_too_long": ("at most", "max_length"),
}


# Below this ratio of difflib, a word is no plausible misspelling of another.
LEAST_SIMILARITY = 0.5


def nearest(key: object, candidates: Iterable[str]) -> str | None:
    """Find the candidate that is most similar to a mistyped key; None if none is similar enough."""
    matches = difflib.get_close_matches(str(key), list(candidates), n=1, cutoff=LEAST_SIMILARITY)
    return matches[0] if matches else None


def unknown_key(key: object, allowed_keys: Iterable[str]) -> str:
    """Return the message for a key that is not allowed, with the one that may be meant."""
    # A key such as `on` has become a boolean, which resembles no allowed key.
    if isinstance(key, bool):
        return (
            "unknown key (YAML reads on, yes, off and no as true and false); "
            "remove it, or put it in quotes"
        )

    match = nearest(key, allowed_keys)
    if match is None:
        return "unknown key; remove it"
    return f"unknown key; did you mean {match}?"


def in_words(problem: Mapping, patterns: Mapping[str, str]) -> str:
    """Return the message for one of pydantic's problems with a value, without the key.

    Args:
        problem: An item of pydantic's ValidationError.errors().
        patterns: What each regular expression of the model asks for, e.g. {"^[a-z]+$": "lower case"}.

    Returns:
        "expected …, found …", with a hint where YAML may have read the value differently than meant.
    """
    # For example, if a learning rate must be above 0, and is -1, pydantic's problem is
    #     {"type": "greater_than", "loc": ("learning_rate",), "input": -1, "ctx": {"gt": 0}, …}
    # and the message is "expected a number above 0, found -1".
    kind = problem["type"]
    value = problem["input"]
    context = problem.get("ctx", {})

    # A wrong choice is the one problem whose message may end in a suggestion.
    if kind == "literal_error":
        return _describe_wrong_choice(value, context["expected"])

    if kind == "string_pattern_mismatch":
        expected = f"expected {patterns[context['pattern']]}"
    elif kind in LENGTH_BOUNDS:
        comparison, bound = LENGTH_BOUNDS[kind]
        expected = f"expected text of {comparison} {context[bound]} characters"
    elif kind in NUMBER_BOUNDS:
        comparison, bound = NUMBER_BOUNDS[kind]
        expected = f"expected a number {comparison} {context[bound]:g}"
    elif kind in EXPECTED:
        expected = EXPECTED[kind]
    else:
        # Validators of our own raise ValueError with a message that is fit to print. pydantic puts
        # "Value error, " before it.
        expected = problem["msg"].removeprefix("Value error, ")

    return f"{expected}, found {value!r}{hint(value)}"


def _describe_wrong_choice(value: object, expected: str) -> str:
    """Return the message for a value that is none of those to choose from.

    Args:
        value: The value.
        expected: Those to choose from, as pydantic lists them: "'a', 'b' or 'c'".
    """
    choices = expected.replace("'", "").replace(" or ", ", ").split(", ")
    message = f"expected one of {', '.join(choices)}, found {value!r}"

    match = nearest(value, choices) if isinstance(value, str) else None
    if match is None:
        return message + hint(value)
    return f"{message}; did you mean {match}?"


def without_echo(problems: list[dict], allowed_keys: Iterable[str]) -> list[dict]:
    """Drop the problem that a key is missing where the same key is already reported as mistyped.

    For `leaning_rate: 1`, pydantic reports two problems: there is an unknown key leaning_rate, and
    learning_rate is missing. The second one is an echo of the first.

    Args:
        problems: Those of pydantic's ValidationError.errors(). The last item of "loc" is the key.
        allowed_keys: The keys that the user may have meant.
    """
    meant_keys = set()
    for problem in problems:
        is_unknown_key = problem["type"] == "extra_forbidden"
        if is_unknown_key:
            mistyped_key = problem["loc"][-1]
            meant_keys.add(nearest(mistyped_key, allowed_keys))

    remaining = []
    for problem in problems:
        is_missing_key = problem["type"] == "missing"
        is_echo = is_missing_key and problem["loc"][-1] in meant_keys
        if not is_echo:
            remaining.append(problem)
    return remaining


def hint(value: object) -> str:
    """Return a hint in brackets where YAML may have read a value differently than meant, else ""."""
    if isinstance(value, bool):
        return " (YAML reads no, off, yes and on as false and true: put such a word in quotes)"
    if not isinstance(value, str):
        return ""

    # YAML reads some numbers as text, e.g. 1e-5.
    try:
        number = float(value)
    except ValueError:
        return ""
    # "nan" and "inf" are more likely to be words.
    if not math.isfinite(number):
        return ""
    return f" (YAML reads that as text: write {plain(number)})"


def plain(number: float) -> str:
    """Return a number as YAML reads it, without an exponent."""
    if number == int(number):
        return str(int(number))
    return f"{number:.12f}".rstrip("0")
