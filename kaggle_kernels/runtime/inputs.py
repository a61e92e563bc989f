"""What Kaggle mounted, found by searching: the layout of /kaggle/input has changed before and differs between runs.

WSDM's texts are strings; LMSYS's are JSON lists of turns with nulls. KAGGLE_ROOT stands for /kaggle in a rehearsal.
"""

import csv
import filecmp
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Container, Iterator, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

TEXTS = ("prompt", "response_a", "response_b")
SCORED = "scored"  # WSDM's column: whether the row counts on the current leaderboard
ROWS_AT_ONCE = 1024


def kaggle_root() -> Path:
    """/kaggle, or the folder that stands for it in a rehearsal."""
    return Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))


def find_mounted(root: Path, slug: str, names: Sequence[str], kind: str | None = None) -> Path:
    """Find a file of the dataset or competition `slug`, wherever that is mounted.

    Args:
        root: The folder that is /kaggle, or stands for it.
        slug: Kaggle's slug of the dataset or competition.
        names: Names or patterns of the file; the first one that is there is taken.
        kind: "datasets" or "competitions". What is mounted as the other is left out, and a mount
            (slug, kind/slug, kind/owner/slug) comes before a folder of that name deeper inside.

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

    # The same file may be mounted twice.
    paths = []
    if paths_by_rank:
        paths = paths_by_rank[min(paths_by_rank)]
        if all(is_same_file(path, paths[0]) for path in paths[1:]):
            return paths[0]

    folders_with_files = {path.parent for path in inputs.rglob("*") if path.is_file()}
    mounted = sorted(str(folder.relative_to(inputs)) for folder in folders_with_files)
    raise FileNotFoundError(
        f"{inputs}: {len(paths)} files named {' or '.join(names)} below a folder {slug!r}, "
        f"expected one; mounted are {', '.join(mounted) or 'no files at all'}; "
        f"attach {slug} to the kernel once"
    )


def is_same_file(path: Path, other: Path) -> bool:
    """Tell whether two files have the same name and the same bytes."""
    return path.name == other.name and filecmp.cmp(path, other, shallow=False)


def rank_mount(folders: Sequence[str], slug: str, kind: str | None) -> int | None:
    """Rank a file by its folders below /kaggle/input.

    Returns:
        0 in the mount of `slug`, 1 in another folder of that name, None outside of both.
    """
    if slug not in folders:
        return None
    if kind is None:
        return 0

    # As the other kind, which may have the same slug.
    other_kind = "competitions" if kind == "datasets" else "datasets"
    if len(folders) > 1 and folders[0] == other_kind:
        return None

    # A competition has no owner: its mount is competitions/SLUG.
    slug_place = 2 if kind == "datasets" else 1
    is_below_kind = folders[0] == kind and folders[slug_place : slug_place + 1] == (slug,)
    is_mount = folders[0] == slug or is_below_kind
    return 0 if is_mount else 1


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """Read the test rows.

    Args:
        path: The test file, Parquet or CSV.
        are_turns: Whether a text is a JSON list of turns.

    Returns:
        A dictionary for each row: `id` (str), prompt, response_a, response_b (each a string, None,
        or with `are_turns` a list of those), and `counts`: whether Kaggle scores the row now.

    Raises:
        ValueError: A column is missing or holds no text, there are no rows, or an id is null, no
            whole number, or there twice.
    """
    file_rows = list(rows_of(path, ("id", *TEXTS), optional_columns=(SCORED,)))
    if not file_rows:
        raise ValueError(f"{path}: no rows")

    id_counts = Counter(row["id"] for row in file_rows)
    repeated_ids = [row_id for row_id, count in id_counts.items() if count > 1]
    if repeated_ids:
        raise ValueError(
            f"{path}: an id occurs twice: {', '.join(repeated_ids[:3])}; "
            "a submission needs every id once"
        )

    rows = []
    for file_row in file_rows:
        row = {"id": file_row["id"]}
        for name in TEXTS:
            row[name] = read_text(file_row[name], are_turns)
        row["counts"] = is_counted(file_row.get(SCORED))
        rows.append(row)
    return rows


def is_counted(scored: object) -> bool:
    """Tell whether a row counts, from its value in the column `scored`: unless that says no.

    Values may be true and false, 1 and 0, or these as text; a null or no such column says nothing.
    """
    return str(scored).strip().lower() not in ("false", "0", "0.0")


def read_ids(path: Path) -> list[str]:
    """Read the ids of a table, in its order."""
    return [row["id"] for row in rows_of(path, ("id",))]


def rows_of(
    path: Path,
    columns: Sequence[str],
    optional_columns: Sequence[str] = (),
    keep: Container[str] | None = None,
) -> Iterator[dict]:
    """Read rows one after the other, so that memory holds a thousand of them at a time.

    Args:
        path: A Parquet or CSV file.
        columns: What a row holds, `id` among them.
        optional_columns: What it holds besides, where the file has it.
        keep: The ids of the rows to be read; None: all.

    Raises:
        ValueError: A column is missing or holds no text, or an id is neither text nor a whole number.
    """
    read_parts = parquet_parts if path.suffix == ".parquet" else csv_parts
    row_number = 0
    for part in read_parts(path, columns, optional_columns, keep):
        for row in part:
            row_number += 1
            row_id = id_text(row["id"])
            if row_id is None:
                raise ValueError(
                    f"{path}, row {row_number}: its id is {row['id']!r}; "
                    "expected a text or a whole number"
                )
            if keep is None or row_id in keep:
                yield {**row, "id": row_id}


def parquet_parts(
    path: Path,
    columns: Sequence[str],
    optional_columns: Sequence[str],
    keep: Container[str] | None,
) -> Iterator[list[dict]]:
    """Read a Parquet file by the thousand rows; of rows that are not in `keep` only the id."""
    # Without these options whole columns are read: 340 MB of a file of 68 MB.
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**18) as file:
        schema = file.schema_arrow
        names = choose_columns(path, columns, optional_columns, schema.names)
        for name in names:
            if name in TEXTS and not holds_text(schema.field(name).type):
                raise ValueError(
                    f"{path}: column {name} holds {schema.field(name).type}; "
                    "expected text, or lists of it"
                )

        for batch in file.iter_batches(ROWS_AT_ONCE, columns=names, use_threads=False):
            if keep is None:
                yield batch.to_pylist()
                continue
            ids = batch.column("id").to_pylist()
            is_kept = [id_text(row_id) in keep for row_id in ids]
            kept_rows = iter(batch.filter(pa.array(is_kept, pa.bool_())).to_pylist())
            pairs = zip(ids, is_kept, strict=True)
            yield [next(kept_rows) if kept else {"id": row_id} for row_id, kept in pairs]


def csv_parts(
    path: Path,
    columns: Sequence[str],
    optional_columns: Sequence[str],
    keep: Container[str] | None,
) -> Iterator[list[dict]]:
    """Read a CSV file row by row; what a row lacks is None."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        names = choose_columns(path, columns, optional_columns, reader.fieldnames or ())
        for row in reader:
            yield [{name: row[name] for name in names}]


def choose_columns(
    path: Path, columns: Sequence[str], optional_columns: Sequence[str], present: Sequence[str]
) -> list[str]:
    """List the columns to be read; ValueError where one is missing that is not optional."""
    missing = [name for name in columns if name not in present]
    if missing:
        raise ValueError(
            f"{path}: no column {', '.join(missing)}; there are {', '.join(present) or 'none'}"
        )
    return [*columns, *(name for name in optional_columns if name in present)]


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column's type is text, or lists of it; a column of nothing but nulls is."""
    if isinstance(kind, pa.DictionaryType | pa.ListType | pa.LargeListType):
        return holds_text(kind.value_type)
    return kind in (pa.string(), pa.large_string(), pa.string_view(), pa.null())


def id_text(value: object) -> str | None:
    """An id as the submission has it: a text as it is, a whole number as its digits; None where it is neither.

    A number that came as a float must be within 2**53: beyond it, digits have been lost.
    """
    if isinstance(value, float) and value.is_integer() and abs(value) <= 2**53:
        return str(int(value))
    if isinstance(value, bool | float | bytes):
        return None
    return str(value) if value is not None and str(value) != "" else None


def read_text(value: str | Sequence | None, are_turns: bool) -> str | list[str | None] | None:
    """A text as it is; with `are_turns`, the turns in its JSON (null: None), or the text itself where that is no JSON list."""
    if not are_turns or not isinstance(value, str):
        return value
    try:
        turns = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value
    if isinstance(turns, list):
        return [turn if turn is None else str(turn) for turn in turns]
    return None if turns is None else value


def install_missing_wheels(root: Path, folders: Sequence[Path], wheels: str | None) -> list[str]:
    """Install bitsandbytes from the mounted wheels where a package needs it and the image lacks it; what was installed."""
    configs = [json.loads((folder / "config.json").read_text(encoding="utf-8")) for folder in folders]
    methods = {config.get("quantization_config", {}).get("quant_method") for config in configs}
    if "bitsandbytes" not in methods or importlib.util.find_spec("bitsandbytes"):
        return []
    if wheels is None:
        raise ModuleNotFoundError(
            "a package is quantised with bitsandbytes, which is absent; name a dataset in the spec's `wheels`"
        )
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",), "datasets").parent
    check_wheels(folder)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--find-links", str(folder)]
    subprocess.run([*command, "bitsandbytes"], check=True)
    importlib.invalidate_caches()
    return ["bitsandbytes"]


def check_wheels(folder: Path) -> None:
    """Raise ValueError where a wheel is not the one that wheels.json beside it lists; without that file, all are taken."""
    if not (folder / "wheels.json").is_file():
        return
    manifest = json.loads((folder / "wheels.json").read_text(encoding="utf-8"))
    listed = {wheel["file"]: wheel["sha256"] for wheel in manifest["wheels"]}
    for path in sorted(folder.glob("*.whl")):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != listed.get(path.name):
            raise ValueError(
                f"{path}: its SHA-256 is {found[:12]}…, wheels.json says {listed.get(path.name, 'nothing')[:12]}; make "
                "the dataset again with `python -m postprocess.wheels` and upload it"
            )
