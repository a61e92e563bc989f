"""The rows of a rehearsal: read and checked, and as asked drawn to size, made hostile, shuffled and given other ids."""

import random
from pathlib import Path

import polars as pl

from kaggle_kernels.build.spec import COMPETITIONS, Spec
from kaggle_kernels.rehearsal.adversarial_rows import KINDS, TEXTS, make_hostile
from preprocess.core.errors import UserError
from preprocess.model_input import VERDICTS

TEXT_TYPES = (pl.String, pl.List(pl.String), pl.Null)
ID_BITS = (
    22,
    31,
    54,
    63,
)  # LMSYS's and WSDM's ids have 6 or 7 digits; above 2**53 a float would confuse them
HEX_DIGITS = 64  # of a text id, as WSDM's training rows have


def read_test_rows(test_file: Path, spec: Spec) -> pl.DataFrame:
    """The test file's rows; a UserError where it cannot be read or lacks a column."""
    if not test_file.is_file():
        raise UserError(f"{test_file}: no such file; give the test rows with --test")
    try:
        is_csv = test_file.suffix == ".csv"
        rows = pl.read_csv(test_file, infer_schema=False) if is_csv else pl.read_parquet(test_file)
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(f"{test_file}: cannot be read: {' '.join(str(error).split())}") from None
    missing = [name for name in ("id", *TEXTS) if name not in rows.columns]
    wrong = [name for name in TEXTS if name not in missing and rows.schema[name] not in TEXT_TYPES]
    if missing or wrong or rows.is_empty():
        found = (
            f"no column {', '.join(missing)}"
            if missing
            else f"no text in {', '.join(wrong)}"
            if wrong
            else "no rows"
        )
        raise UserError(
            f"{test_file}: {found}; expected the layout of {COMPETITIONS[spec.competition].slug}"
        )
    ids = rows["id"].cast(pl.String)
    if ids.null_count() or ids.is_duplicated().any():
        found = (
            "a row has no id"
            if ids.null_count()
            else f"the id {ids.filter(ids.is_duplicated())[0]} occurs twice"
        )
        raise UserError(f"{test_file}: {found}; a submission needs every id once")
    return rows


def make_rows(
    rows: pl.DataFrame,
    *,
    size: int | None = None,
    shuffle: bool = False,
    ids: str | None = None,
    hostile: bool = False,
    seed: int = 0,
    are_turns: bool = False,
) -> pl.DataFrame:
    """The table as a rehearsal needs it, the same for the same seed; rows keep their verdicts where their texts stay.

    `size` rows are drawn, with replacement where there are fewer. With `hostile` some are replaced (see hostile.py), and ids
    are int for an odd seed, string for an even one. Rows that were drawn or replaced get new ids, of the kind `ids`, else of
    the file's. `shuffle` puts them in another order and deals out the ids anew.
    """
    rng = random.Random(seed)
    kind = ids or (("string", "int")[seed % 2] if hostile else id_kind(rows))
    is_new = bool(size or ids or hostile)
    if size:
        places = (
            rng.sample(range(len(rows)), size)
            if size <= len(rows)
            else rng.choices(range(len(rows)), k=size)
        )
        rows = rows[sorted(places)]
    if hostile:
        rows = make_hostile(rows, seed, are_turns)
    if is_new:
        rows = rows.with_columns(new_ids(len(rows), kind, rng))
    if shuffle:
        dealt = rng.sample(rows["id"].to_list(), len(rows))
        rows = rows[rng.sample(range(len(rows)), len(rows))].with_columns(
            pl.Series("id", dealt, rows.schema["id"])
        )
    return rows


def id_kind(rows: pl.DataFrame) -> str:
    """Whether a table's ids are `int` or `string`; in a CSV they are int where all of them are digits."""
    if rows.schema["id"].is_integer():
        return "int"
    return "int" if rows["id"].cast(pl.String).str.contains(r"^\d+$").all() else "string"


def new_ids(number: int, kind: str, rng: random.Random) -> pl.Series:
    """Ids in no order, none twice: int64, or hexadecimal text, of which the first two look like numbers."""
    if kind == "int":
        made = dict.fromkeys(rng.getrandbits(rng.choice(ID_BITS)) for _ in range(number))
        while len(made) < number:
            made[rng.getrandbits(ID_BITS[-1])] = None
        return pl.Series("id", list(made), pl.Int64)
    digits = "".join(rng.choices("123456789", k=HEX_DIGITS))
    made = dict.fromkeys(("000" + digits[3:], digits[:4] + "e" + digits[5:]))
    while len(made) < number:
        made[f"{rng.getrandbits(4 * HEX_DIGITS):0{HEX_DIGITS}x}"] = None
    return pl.Series("id", list(made)[:number], pl.String)


def describe(rows: pl.DataFrame, of: int, shuffled: bool, seed: int) -> dict:
    """How the rows were made, for the log and rehearsal.json: how many `of` how many, their ids, the hostile ones by kind."""
    told = {"rows": len(rows), "of": of, "ids": id_kind(rows), "shuffled": shuffled, "seed": seed}
    if "hostile" in rows.columns:
        counted = rows["hostile"].drop_nulls().value_counts(sort=True)
        told["hostile"] = len(rows) - rows["hostile"].null_count()
        told["kinds"] = dict(sorted(counted.iter_rows()))
    return told


def sentence(told: dict) -> str:
    """What `describe` found, as a line of the log."""
    shuffled = ", shuffled" if told["shuffled"] else ""
    hostile = (
        f", {told['hostile']:,} hostile of {len(told['kinds'])} of {len(KINDS)} kinds"
        if "hostile" in told
        else ""
    )
    return f"{told['rows']:,} rows of {told['of']:,}, {told['ids']} ids{shuffled}{hostile}; seed {told['seed']}"


def read_verdicts(test_rows: pl.DataFrame, where: str) -> pl.DataFrame | None:
    """id, winner and which response is longer, from WSDM's or LMSYS's columns; None where there are no verdicts.

    A row may have no verdict (null); any other value is a UserError that names the row in `where`.
    """
    flags = [f"winner_{verdict}" for verdict in VERDICTS]
    if "winner" in test_rows.columns:
        found, expected = test_rows["winner"].cast(pl.String).to_list(), "model_a, model_b or tie"
        winners = [None if value is None else value if value in VERDICTS else "" for value in found]
    elif present := set(flags) & set(test_rows.columns):
        if len(present) < len(flags):
            raise UserError(
                f"{where}: no column {', '.join(sorted(set(flags) - present))}; give all three, or none"
            )
        found, expected = (
            test_rows.select(flags).rows(),
            "a 1 for model_a, model_b or tie, and 0 for the others",
        )
        winners = [winner_of(values) for values in found]
    else:
        return None
    if "" in winners:
        at = winners.index("")
        raise UserError(
            f"{where}, row {at + 1} (id {test_rows['id'][at]}): winner is {found[at]!r}; expected {expected}"
        )
    a, b = (length_of(test_rows, name) for name in ("response_a", "response_b"))
    longer = pl.when(a >= b).then(pl.lit("model_a")).otherwise(pl.lit("model_b"))
    winner = pl.Series("winner", winners, pl.String)
    return test_rows.select(pl.col("id").cast(pl.String), winner, longer.alias("longer"))


def winner_of(flags: tuple) -> str | None:
    """The verdict whose flag is 1, None where all flags are null, "" where they make no sense."""
    if all(flag is None for flag in flags):
        return None
    try:
        numbers = [float(flag) for flag in flags]
    except (TypeError, ValueError):
        return ""
    return VERDICTS[numbers.index(1)] if sorted(numbers) == [0, 0, 1] else ""


def length_of(rows: pl.DataFrame, name: str) -> pl.Expr:
    """Characters of a text or of a list of turns."""
    if isinstance(rows.schema[name], pl.List):
        return pl.col(name).list.eval(pl.element().str.len_chars()).list.sum().fill_null(0)
    return pl.col(name).str.len_chars().fill_null(0)
