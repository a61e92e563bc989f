"""What Kaggle mounted: test rows, packages, wheels.

Files are found by searching: the layout of /kaggle/input has changed before and differs between
runs. WSDM's texts are strings; LMSYS's are JSON lists of turns with nulls.
"""

import csv
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from kaggle_kernels.runtime.package import hash_file

TEXTS = ("prompt", "response_a", "response_b")
SCORED = "scored"  # WSDM's column: whether the row counts on the current leaderboard


def kaggle_root() -> Path:
    """Return /kaggle, or the folder that KAGGLE_ROOT names in its place for a rehearsal."""
    return Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))


def find_mounted(root: Path, slug: str, names: Sequence[str], kind: str) -> Path:
    """Find a file of the dataset or competition `slug`, wherever that is mounted.

    Args:
        root: The folder that is /kaggle, or stands for it.
        slug: Kaggle's slug of the dataset or competition.
        names: Names or patterns of the file; the first one that is there is taken.
        kind: "datasets" or "competitions": what is mounted as the other is left out.

    Raises:
        FileNotFoundError: There is none, or several that differ.
    """
    inputs = root / "input"
    paths_by_rank: dict[tuple[int, int], list[Path]] = {}
    for name_rank, name in enumerate(names):
        for path in sorted(inputs.rglob(name)):
            folders = path.relative_to(inputs).parts[:-1]
            mount_rank = rank_mount(folders, slug, kind)
            if path.is_file() and mount_rank is not None:
                paths_by_rank.setdefault((mount_rank, name_rank), []).append(path)

    # The best rank wins. The same file may be mounted twice.
    paths = []
    if paths_by_rank:
        paths = paths_by_rank[min(paths_by_rank)]
    distinct_files = {(path.name, hash_file(path)) for path in paths}
    if len(distinct_files) == 1:
        return paths[0]

    # Say what there is, so that a wrong slug shows.
    folders_with_files = set()
    for path in inputs.rglob("*"):
        if path.is_file():
            folders_with_files.add(str(path.parent.relative_to(inputs)))
    mounted = sorted(folders_with_files)
    raise FileNotFoundError(
        f"{inputs}: {len(paths)} files named {' or '.join(names)} below a folder {slug!r}, "
        f"expected one; mounted are {', '.join(mounted) or 'no files at all'}; "
        f"attach {slug} to the kernel once"
    )


def rank_mount(folders: Sequence[str], slug: str, kind: str) -> int | None:
    """Rank a file by its folders below /kaggle/input.

    Returns:
        0 in a mount of `slug` (slug, competitions/slug, datasets/owner/slug), 1 in a folder of that
        name deeper inside, None outside of both.
    """
    # A dataset's mount has its owner between the kind and the slug.
    if kind == "datasets":
        other_kind, slug_place = "competitions", 2
    else:
        other_kind, slug_place = "datasets", 1

    # A dataset may have the slug of the competition that it was made for.
    is_other = len(folders) > 1 and folders[0] == other_kind
    if slug not in folders or is_other:
        return None
    is_below_kind = folders[0] == kind and folders[slug_place : slug_place + 1] == (slug,)
    return 0 if folders[0] == slug or is_below_kind else 1


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """Read the test rows.

    Args:
        path: The test file, Parquet or CSV.
        are_turns: Whether a text is a JSON list of turns.

    Returns:
        A dictionary for each row: `id` (str), prompt, response_a, response_b (each a string, None,
        or with `are_turns` a list of those), and `counts`: whether Kaggle scores the row now.

    Raises:
        ValueError: There are no rows, an id is there twice, or `read_table` raises it.
    """
    rows = []
    for file_row in read_table(path, ("id", *TEXTS, SCORED)):
        row = {"id": file_row["id"], "counts": is_counted(file_row.get(SCORED))}
        for name in TEXTS:
            row[name] = read_text(file_row[name], are_turns)
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")

    # Scores are joined by id.
    id_counts = Counter(row["id"] for row in rows)
    repeated_ids = [row_id for row_id, count in id_counts.items() if count > 1]
    if repeated_ids:
        raise ValueError(
            f"{path}: an id occurs twice: {', '.join(repeated_ids[:3])}; "
            "a submission needs every id once"
        )
    return rows


def is_counted(scored: object) -> bool:
    """Tell whether a row counts, from its value in the column `scored`: unless that says no.

    Values may be true and false, 1 and 0, or these as text; a null or no such column says nothing.
    """
    return str(scored).strip().lower() not in ("false", "0", "0.0")


def read_table(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a Parquet or CSV file, `id` among them as text; `scored` may be absent.

    Raises:
        ValueError: A column is missing or holds no text, or an id is no text and no whole number.
    """
    if path.suffix == ".parquet":
        rows = read_parquet(path, columns)
    else:
        rows = read_csv(path, columns)

    # Scores are joined by id, so an id must have one way to be written.
    for number, row in enumerate(rows, start=1):
        row_id = id_text(row["id"])
        if row_id is None:
            raise ValueError(
                f"{path}, row {number}: its id is {row['id']!r}; expected a text or a whole number"
            )
        row["id"] = row_id
    return rows


def read_parquet(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a Parquet file."""
    schema = pq.read_schema(path)
    names = choose_columns(path, columns, schema.names)

    # What holds no text would fail later, without the name of its column.
    for name in names:
        kind = schema.field(name).type
        if name in TEXTS and not holds_text(kind):
            raise ValueError(f"{path}: column {name} holds {kind}; expected text, or lists of it")
    return pq.read_table(path, columns=names).to_pylist()


def read_csv(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a CSV file as text; what a row lacks is None."""
    # The csv module refuses fields beyond 128 KiB by default, conversations may be longer.
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        names = choose_columns(path, columns, reader.fieldnames or ())
        return [{name: row[name] for name in names} for row in reader]


def choose_columns(path: Path, columns: Sequence[str], present: Sequence[str]) -> list[str]:
    """List the columns that are there; ValueError where one is missing, except `scored`."""
    missing = [name for name in columns if name not in (*present, SCORED)]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; there are {', '.join(present) or 'none'}"
        )
    return [name for name in columns if name in present]


def holds_text(kind: pa.DataType) -> bool:
    """Tell whether a column's type is text, lists of it, or nothing but nulls."""
    if isinstance(kind, pa.DictionaryType | pa.ListType | pa.LargeListType):
        return holds_text(kind.value_type)
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def id_text(value: object) -> str | None:
    """Write an id as the submission has it: a text as it is, a whole number as its digits.

    Returns:
        None for what is neither. A float must be within 2**53: beyond it, digits have been lost.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return str(int(value))
    if value is None or isinstance(value, bool | float | bytes):
        return None
    return str(value) or None


def read_text(value: str | Sequence | None, are_turns: bool) -> str | list[str | None] | None:
    """Read a text; with `are_turns`, the turns in its JSON list, or a text that is none."""
    if not are_turns or not isinstance(value, str):
        return value

    # LMSYS's files hold nulls, and texts that merely look like JSON.
    try:
        turns = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value

    if isinstance(turns, list):
        return [None if turn is None else str(turn) for turn in turns]
    return None if turns is None else value


def install_missing_wheels(root: Path, folders: Sequence[Path], wheels: str | None) -> list[str]:
    """Install bitsandbytes where a package needs it and the image lacks it.

    Args:
        root: The folder that is /kaggle, or stands for it.
        folders: The packages.
        wheels: The dataset with the wheel; None: the spec names none.

    Returns:
        What was installed.
    """
    # An image that has the library keeps its own.
    methods = set()
    for folder in folders:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        methods.add(config.get("quantization_config", {}).get("quant_method"))
    if "bitsandbytes" not in methods or importlib.util.find_spec("bitsandbytes"):
        return []
    if wheels is None:
        raise ModuleNotFoundError(
            "a package is quantised with bitsandbytes, which is absent; "
            "name a dataset in the spec's `wheels`"
        )

    # No network: pip installs from the mounted folder alone.
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",), "datasets").parent
    check_wheels(folder)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--find-links", str(folder), "bitsandbytes"], check=True)
    importlib.invalidate_caches()
    return ["bitsandbytes"]


def check_wheels(folder: Path) -> None:
    """Raise ValueError where a wheel is not as wheels.json lists it, if that is there."""
    if not (folder / "wheels.json").is_file():
        return
    manifest = json.loads((folder / "wheels.json").read_text(encoding="utf-8"))
    listed = {wheel["file"]: wheel["sha256"] for wheel in manifest["wheels"]}
    for path in sorted(folder.glob("*.whl")):
        sha256 = hash_file(path)
        if sha256 != listed.get(path.name):
            raise ValueError(
                f"{path}: its SHA-256 is {sha256[:12]}…, wheels.json says "
                f"{listed.get(path.name, 'nothing')[:12]}; make the dataset again with "
                "`python -m postprocess.wheels` and upload it"
            )
