"""The test rows of a rehearsal: read from the test file, checked, and changed as the scenario says.

`rehearse.py` calls `read_test_rows`, `make_rows` and `describe_rows`, in this order.
"""

import random
from pathlib import Path

import polars as pl

from kaggle_kernels.build.spec import Spec
from kaggle_kernels.rehearsal.adversarial_rows import KIND_COLUMN, add_adversarial_rows
from kaggle_kernels.rehearsal.adversarial_texts import KINDS
from kaggle_kernels.rehearsal.scenario import Scenario
from preprocess.competitions import COMPETITIONS, Competition
from preprocess.core.errors import UserError
from preprocess.sources.rows import TEXTS

TEXT_TYPES = (pl.String, pl.List(pl.String), pl.Null)

# New integer ids have one of these lengths. The ids of LMSYS and WSDM have 6 or 7 digits (22 bits);
# ids above 2**53 get mixed up by a kernel that reads them as floats.
ID_BITS = (22, 31, 54, 63)

# Length of a new text id: that of the ids in WSDM's training file.
HEX_DIGITS = 64
BITS_PER_HEX_DIGIT = 4


def read_test_rows(test_file: Path, spec: Spec) -> pl.DataFrame:
    """Read the test file and check its columns and ids.

    Args:
        test_file: CSV (suffix ".csv") or Parquet, in the layout of the competition's test or train
            file. Further columns are kept.
        spec: The kernel's spec; its competition is named in messages.
    """
    if not test_file.is_file():
        raise UserError(f"{test_file}: no such file; give the test rows with --test")

    try:
        if test_file.suffix == ".csv":
            rows = pl.read_csv(test_file, infer_schema=False)  # every column as text
        else:
            rows = pl.read_parquet(test_file)
    except (pl.exceptions.PolarsError, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{test_file}: cannot be read: {message}") from None

    check_columns(rows, test_file, COMPETITIONS[spec.competition])
    check_ids(rows, test_file)
    return rows


def check_columns(rows: pl.DataFrame, test_file: Path, competition: Competition) -> None:
    """Raise UserError unless the test file has rows, each with an id and the texts."""
    advice = f"give a file in the layout of {competition.slug}"
    missing = [name for name in ("id", *TEXTS) if name not in rows.columns]
    if missing:
        raise UserError(f"{test_file}: no column {', '.join(missing)}; {advice}")

    wrong_type = [name for name in TEXTS if rows.schema[name] not in TEXT_TYPES]
    if wrong_type:
        raise UserError(f"{test_file}: no text in {', '.join(wrong_type)}; {advice}")
    if rows.is_empty():
        raise UserError(f"{test_file}: no rows; {advice}")


def check_ids(rows: pl.DataFrame, test_file: Path) -> None:
    """Raise UserError where an id is absent or occurs twice."""
    ids = rows["id"].cast(pl.String)
    if ids.null_count():
        raise UserError(f"{test_file}: a row has no id; a submission needs every id once")

    repeated_ids = ids.filter(ids.is_duplicated())
    if not repeated_ids.is_empty():
        raise UserError(
            f"{test_file}: the id {repeated_ids[0]} occurs twice; a submission needs every id once"
        )


def make_rows(rows: pl.DataFrame, scenario: Scenario, competition: Competition) -> pl.DataFrame:
    """Make the rows of a rehearsal: drawn, replaced, renumbered and shuffled as the scenario says.

    The same seed gives the same rows. A row keeps its verdict wherever it keeps its texts.

    Returns:
        The table. Where adversarial rows were added, it has a column `hostile` (see
        `add_adversarial_rows`).
    """
    rng = random.Random(scenario.seed)

    # The kind of ids is that of the whole file: among the few rows that are drawn, text ids may all
    # look like numbers.
    new_id_kind = choose_id_kind(rows, scenario)

    if scenario.size is not None:
        rows = draw_rows(rows, scenario.size, rng)
    if scenario.hostile:
        rows = add_adversarial_rows(rows, scenario.seed, competition)
    if scenario.needs_new_ids:
        if new_id_kind == "int":
            new_ids = pl.Series("id", make_int_ids(len(rows), rng), pl.Int64)
        else:
            new_ids = pl.Series("id", make_hex_ids(len(rows), rng), pl.String)
        rows = rows.with_columns(new_ids)
    if scenario.shuffle:
        rows = shuffle_rows(rows, rng)
    return rows


def draw_rows(rows: pl.DataFrame, size: int, rng: random.Random) -> pl.DataFrame:
    """Draw `size` rows in the file's order, with replacement only where the file has fewer."""
    all_places = range(len(rows))
    if size > len(rows):
        places = rng.choices(all_places, k=size)
    else:
        places = rng.sample(all_places, size)
    return rows[sorted(places)]


def shuffle_rows(rows: pl.DataFrame, rng: random.Random) -> pl.DataFrame:
    """Put the rows into a random order and deal their ids out anew, so that an id tells nothing about its row."""
    shuffled_ids = rng.sample(rows["id"].to_list(), len(rows))
    places = rng.sample(range(len(rows)), len(rows))
    return rows[places].with_columns(pl.Series("id", shuffled_ids, rows.schema["id"]))


def choose_id_kind(rows: pl.DataFrame, scenario: Scenario) -> str:
    """Choose the kind of new ids, "int" or "string": the file's own, or with adversarial rows by the seed."""
    # Whoever rehearses adversarial rows with a few seeds gets both kinds, whatever the file has.
    if scenario.hostile:
        seed_is_odd = scenario.seed % 2 == 1
        return "int" if seed_is_odd else "string"

    return find_id_kind(rows)


def find_id_kind(rows: pl.DataFrame) -> str:
    """Tell whether ids are "int" or "string"; texts that are all digits count as "int"."""
    if rows.schema["id"].is_integer():
        return "int"
    has_only_digits = rows["id"].cast(pl.String).str.contains(r"^\d+$")
    return "int" if has_only_digits.all() else "string"


def make_int_ids(number: int, rng: random.Random) -> list[int]:
    """Draw different integers of the lengths in ID_BITS, in no order."""
    ids: dict[int, None] = {}  # a set would not keep the order in which they were drawn
    for _ in range(number):
        bits = rng.choice(ID_BITS)
        ids[rng.getrandbits(bits)] = None

    # Short ids may have been drawn twice; long ones fill up.
    while len(ids) < number:
        ids[rng.getrandbits(max(ID_BITS))] = None
    return list(ids)


def make_hex_ids(number: int, rng: random.Random) -> list[str]:
    """Draw different ids of hexadecimal digits, among them two that look like numbers."""
    # A kernel that guesses types would change these two: drop the zeros, or read a float.
    digits = "".join(rng.choices("123456789", k=HEX_DIGITS))
    with_leading_zeros = "000" + digits[3:]
    like_a_float = digits[:4] + "e" + digits[5:]

    # A dictionary keeps the order in which they were drawn, a set would not.
    ids = {with_leading_zeros: None, like_a_float: None}
    while len(ids) < number:
        value = rng.getrandbits(BITS_PER_HEX_DIGIT * HEX_DIGITS)
        ids[f"{value:0{HEX_DIGITS}x}"] = None
    return list(ids)[:number]


def describe_rows(rows: pl.DataFrame, rows_in_file: int, scenario: Scenario) -> dict:
    """Describe the rows that `make_rows` returned, for the log and rehearsal.json (key `test`).

    Returns:
        `rows`, `of` (the file's number), `ids` (their kind), `shuffled`, `seed`; with adversarial
        rows also `hostile` (their number) and `kinds` (their number by kind).
    """
    description = {
        "rows": len(rows),
        "of": rows_in_file,
        "ids": find_id_kind(rows),
        "shuffled": scenario.shuffle,
        "seed": scenario.seed,
    }
    if KIND_COLUMN in rows.columns:
        kinds = rows[KIND_COLUMN].drop_nulls()
        description["hostile"] = len(kinds)
        description["kinds"] = dict(sorted(kinds.value_counts().iter_rows()))
    return description


def format_description(description: dict) -> str:
    """Turn the description of the rows into a line of the log."""
    parts = [f"{description['rows']:,} rows of {description['of']:,}", f"{description['ids']} ids"]
    if description["shuffled"]:
        parts.append("shuffled")
    if "hostile" in description:
        kinds = len(description["kinds"])
        parts.append(f"{description['hostile']:,} hostile of {kinds} of {len(KINDS)} kinds")
    return f"{', '.join(parts)}; seed {description['seed']}"
