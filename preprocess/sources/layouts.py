"""Source files of three layouts become rows of one schema, recognised by their columns.

WSDM: id, prompt, response_a, response_b, winner (model_a, model_b or tie); a text is one turn, a list of texts its turns.
LMSYS: likewise with JSON lists of turns and winner_model_a, winner_model_b, winner_tie (one of them 1).
Chosen/rejected: chosen and rejected as texts beside a prompt, or as lists of chat messages; the sides are set by a hash of
the id, which is a hash of the row where the file has none. A system message stands before the first user message.

Every row of a file comes back, cleaned by `model_input.clean`; one that cannot be used carries a reason. The optional
columns language and source are kept; p_model_a, p_model_b, p_tie and weight (of an earlier pairs.parquet, or a teacher) too.
"""

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import polars as pl

from preprocess.core.errors import UserError
from preprocess.model_input import VERDICTS, clean
from preprocess.sources.tables import ROWS_AT_ONCE, Table, open_table

TURNS = pl.List(pl.String)
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
        "reason": pl.String,
    }
)
TEXTS = ("prompt", "response_a", "response_b")
SHARES = ("p_model_a", "p_model_b", "p_tie")
LAYOUTS = {
    "WSDM": ("id", *TEXTS, "winner"),
    "LMSYS": ("id", *TEXTS, "winner_model_a", "winner_model_b", "winner_tie"),
    "chosen/rejected": ("prompt", "chosen", "rejected"),
}
USERS, ASSISTANTS = ("user", "human"), ("assistant", "gpt", "model")


class _Unusable(Exception):
    """One row cannot be used; the message is the reason."""


def read_rows(path: Path | str) -> pl.DataFrame:
    """Every row of a source file in the schema ROWS; `reason` is null where the row can be used.

    UserError: the file is unreadable, its columns are of no known layout, or not one row can be used.
    """
    table = open_table(path)
    read = {"WSDM": _wsdm, "LMSYS": _lmsys, "chosen/rejected": _chosen_rejected}[_layout(table)]
    frames, values = [], []
    for number, row, raw in table.rows():
        values.append(_checked(read, table.path, number, row, raw))
        if len(values) == ROWS_AT_ONCE:
            frames.append(pl.DataFrame(values, schema=ROWS, orient="row"))
            values = []
    rows = pl.concat([*frames, pl.DataFrame(values, schema=ROWS, orient="row")])
    if rows["reason"].null_count() == 0:
        reasons = rows["reason"].value_counts(sort=True).iter_rows()
        found = ", ".join(f"{reason}: {count:,}" for reason, count in reasons)
        raise UserError(f"{table.path}: not one of its {rows.height:,} rows can be used ({found})")
    return rows


def read_prompts(path: Path | str) -> pl.DataFrame:
    """`id` and `prompt` (list of turns) of every row with a prompt, from any layout; verdicts are not needed.

    UserError: the file is unreadable, has no prompts, or not one that can be read.
    """
    table = open_table(path)
    if not {"prompt", "chosen"} & set(table.columns):
        raise UserError(f"{path}: no column prompt (found {', '.join(table.columns)}); it cannot be compared with the sources")
    as_json = "prompt" in table.columns and _holds_json_lists(table)
    kept = []
    for number, row, _ in table.rows():
        if row is None:
            continue
        try:
            turns = _prompt_turns(row, as_json)
        except _Unusable:
            continue
        kept.append((str(row.get("id", number)), turns))
    if not kept:
        raise UserError(f"{path}: not one of its {table.height:,} rows has a prompt that can be read")
    return pl.DataFrame(kept, schema={"id": pl.String, "prompt": TURNS}, orient="row")


def _layout(table: Table) -> str:
    found = set(table.columns)
    needed = {name: set(columns) for name, columns in LAYOUTS.items()}
    if table.frame is None or not isinstance(table.frame.schema.get("chosen"), pl.String):
        needed["chosen/rejected"] = {"chosen", "rejected"}
    fitting = [name for name, columns in needed.items() if columns <= found]
    if fitting:
        return fitting[0]
    nearest = min(needed, key=lambda name: (len(needed[name] - found), -len(needed[name] & found)))
    missing = ", ".join(column for column in LAYOUTS[nearest] if column in needed[nearest] - found)
    raise UserError(
        f"{table.path}: missing column{'s' * (', ' in missing)} {missing} of the layout {nearest} "
        f"({', '.join(LAYOUTS[nearest])}), which is nearest; found {', '.join(table.columns) or 'no columns'}"
    )


def _checked(read: Callable, path: Path, number: int, row: dict | None, raw: str) -> tuple:
    """One row in the order of ROWS, with the reason where it cannot be used."""
    if row is None:
        return (str(path), number, None, [clean(raw)], *[None] * 3, "unknown", path.stem, *[None] * 4, "not a JSON object")
    common = clean(_text(row.get("language"))) or "unknown", clean(_text(row.get("source"))) or path.stem
    row_id = _text(row.get("id")) or None
    try:
        row_id, prompt, a, b, winner = read(row)
        _require_texts(row_id, prompt, a, b, winner)
        shares = _shares(row, winner)
    except _Unusable as reason:
        texts = [_as_found(row.get(name)) for name in TEXTS]
        return (str(path), number, row_id, *texts, _winner_as_found(row), *common, *[None] * 4, str(reason))
    return (str(path), number, row_id, prompt, a, b, winner, *common, *shares, None)


def _require_texts(row_id: str | None, prompt: list[str], a: list[str], b: list[str], winner: str) -> None:
    if not row_id:
        raise _Unusable("no id")
    if not any(turn.strip() for turn in prompt):
        raise _Unusable("empty prompt")
    if not (any(turn.strip() for turn in a) and any(turn.strip() for turn in b)):
        raise _Unusable("empty answer")
    if winner not in VERDICTS:
        raise _Unusable("unknown winner")
    if a == b and winner != "tie":
        raise _Unusable("identical answers, one wins")


def _shares(row: dict, winner: str) -> tuple[float, float, float, float]:
    """p_model_a, p_model_b, p_tie and weight: the row's own where it has them, else one-hot and 1."""
    if not all(row.get(name) not in (None, "") for name in SHARES):
        return (*(float(winner == verdict) for verdict in VERDICTS), 1.0)
    try:
        values = [float(row[name]) for name in SHARES]
        weight = 1.0 if row.get("weight") in (None, "") else float(row["weight"])
    except (TypeError, ValueError):
        raise _Unusable("vote shares are not numbers") from None
    if not (min(values) >= 0 and abs(sum(values) - 1) < 1e-3 and 0 < weight < math.inf):
        raise _Unusable("vote shares do not add up to 1, or the weight is not positive")
    return (*values, weight)


def _wsdm(row: dict) -> tuple:
    texts = [_turns(row[name]) for name in TEXTS]
    return _text(row["id"]), *texts, _text(row["winner"])


def _lmsys(row: dict) -> tuple:
    texts = [_turns(_json_list(row[name])) for name in TEXTS]
    flags = [_text(row[f"winner_{verdict}"]) for verdict in ("model_a", "model_b", "tie")]
    won = [verdict for verdict, flag in zip(VERDICTS, flags, strict=True) if flag in ("1", "1.0", "True", "true")]
    return _text(row["id"]), *texts, won[0] if len(won) == 1 else ""


def _chosen_rejected(row: dict) -> tuple:
    prompt, chosen = _dialogue(row.get("prompt"), row.get("chosen"))
    prompt_of_rejected, rejected = _dialogue(row.get("prompt"), row.get("rejected"))
    if prompt != prompt_of_rejected:
        raise _Unusable("chosen and rejected answer different prompts")
    row_id = _text(row.get("id"))
    if not row_id:
        row_id = hashlib.sha256(json.dumps([prompt, chosen, rejected]).encode()).hexdigest()[:16]
    if hashlib.sha256(f"side of {row_id}".encode("utf-8", "replace")).digest()[0] % 2:
        return row_id, prompt, rejected, chosen, "model_b"
    return row_id, prompt, chosen, rejected, "model_a"


def _dialogue(prompt, answer) -> tuple[list[str], list[str]]:
    """The user's turns and the assistant's turns of a prompt with one answer, each a text or a list of chat messages."""
    messages = _messages(answer, "assistant")
    if all(role in ASSISTANTS for role, _ in messages):
        messages = _messages(prompt, "user") + messages
    turns: list[list[str | None]] = []
    system = ""
    for role, content in messages:
        if role == "system":
            system += content + "\n\n"
        elif role in USERS:
            if turns and turns[-1][1] is None:
                turns[-1][0] += "\n\n" + content
            else:
                turns.append([system + content, None])
                system = ""
        elif turns and turns[-1][1] is None:
            turns[-1][1] = content
        elif turns:
            turns[-1][1] += "\n\n" + content
        else:
            turns.append([system, content])
    return [user or "" for user, _ in turns], [assistant or "" for _, assistant in turns]


def _messages(value, role: str) -> list[tuple[str, str]]:
    """(role, content) of each chat message; a plain text is one message of `role`, null is none."""
    if value is None or isinstance(value, str):
        return [(role, clean(value))] if value else []
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise _Unusable("not a list of chat messages")
    messages = []
    for message in value:
        who, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
        if who not in ("system", *USERS, *ASSISTANTS) or not (content is None or isinstance(content, str)):
            raise _Unusable("not a list of chat messages")
        messages.append((who, clean(content)))
    return messages


def _turns(value) -> list[str]:
    if value is None or isinstance(value, str):
        return [clean(value)]
    if not isinstance(value, list) or not all(turn is None or isinstance(turn, str) for turn in value):
        raise _Unusable("not a list of turns")
    return [clean(turn) for turn in value]


def _json_list(value) -> list:
    if isinstance(value, list):
        return value
    try:
        value = json.loads(value or "[]")
    except (json.JSONDecodeError, RecursionError, TypeError):
        raise _Unusable("not a JSON list of turns") from None
    if not isinstance(value, list):
        raise _Unusable("not a JSON list of turns")
    return value


def _prompt_turns(row: dict, as_json: bool) -> list[str]:
    if row.get("chosen") is not None:
        return _dialogue(row.get("prompt"), row["chosen"])[0]
    prompt = row.get("prompt")
    return _turns(_json_list(prompt) if as_json else prompt)


def _holds_json_lists(table: Table) -> bool:
    """Whether every prompt is a JSON list of turns: a test file of LMSYS differs from one of WSDM in nothing else."""
    for _, row, _ in table.rows():
        if row is None or not row.get("prompt"):
            continue
        try:
            _turns(_json_list(row["prompt"]))
        except _Unusable:
            return False
    return True


def _text(value) -> str:
    return "" if value is None else clean(value) if isinstance(value, str) else str(value)


def _as_found(value) -> list[str] | None:
    """A text that could not be used, kept for the rejected table."""
    if value is None:
        return None
    return [_text(turn) for turn in value] if isinstance(value, list) else [_text(value)]


def _winner_as_found(row: dict) -> str | None:
    if "winner" in row:
        return _text(row["winner"])
    flags = [f"{verdict} {_text(row[f'winner_{verdict}'])}" for verdict in VERDICTS if f"winner_{verdict}" in row]
    return ", ".join(flags) or None
