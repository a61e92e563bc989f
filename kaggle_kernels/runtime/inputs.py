"""What Kaggle mounted: test rows, packages, wheels.

Files are found by searching: the layout of /kaggle/input has changed before and differs between
runs. WSDM's texts are strings; LMSYS's are JSON lists of turns with nulls.
"""

import csv
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

from kaggle_kernels.runtime.package import Package, hash_file

TEXTS = ("prompt", "response_a", "response_b")
SCORED = "scored"  # WSDM's column: whether the row counts on the current leaderboard


def find_mounted(root: Path, slug: str, names: Sequence[str], kind: str) -> Path:
    """Find a file of the dataset or competition `slug`, wherever that is mounted.

    Args:
        root: The folder that is /kaggle, or stands for it.
        slug: Kaggle's slug of the dataset or competition.
        names: Names or patterns of the file; the first one that is there is taken.
        kind: "datasets" or "competitions". A dataset may have a competition's slug: what is mounted as
            the other kind is left out.

    Raises:
        FileNotFoundError: There is none, or several that differ.
    """
    inputs = root / "input"
    paths = []
    for name in names:
        paths = list_mounted(inputs, slug, name, kind)
        if paths:
            break

    # The same file may be mounted twice.
    contents = {hash_file(path) for path in paths}
    if len(contents) == 1:
        return paths[0]

    # The message lists what is mounted, so that a wrong slug shows.
    folders_with_files = set()
    for path in inputs.rglob("*"):
        if path.is_file():
            folders_with_files.add(str(path.parent.relative_to(inputs)))
    mounted = ", ".join(sorted(folders_with_files))
    raise FileNotFoundError(
        f"{inputs}: {len(paths)} files named {' or '.join(names)} below a folder {slug!r}, "
        f"expected one; mounted are {mounted or 'no files at all'}; "
        f"attach {slug} to the kernel once"
    )


def list_mounted(inputs: Path, slug: str, name: str, kind: str) -> list[Path]:
    """List the files of that name below a folder `slug`, but for mounts of the other kind."""
    paths = []
    for path in sorted(inputs.rglob(name)):
        *folders, _file = path.relative_to(inputs).parts
        if slug not in folders:
            continue

        # A dataset may have the slug of the competition that it was made for.
        is_other_kind = folders[0] in ("datasets", "competitions") and folders[0] != kind
        if not is_other_kind:
            paths.append(path)
    return paths


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """Read the test rows.

    Returns:
        A dictionary for each row: `id` (str), prompt, response_a, response_b (each a string, None,
        or with `are_turns` a list of those), and `counts`: whether Kaggle scores the row now.
    """
    rows = []
    for file_row in read_table(path, ("id", *TEXTS, SCORED)):
        # True and false, 1 and 0, or these as text; a null or no such column says nothing.
        counts = str(file_row.get(SCORED)).strip().lower() not in ("false", "0", "0.0")
        row = {"id": file_row["id"], "counts": counts}
        for name in TEXTS:
            row[name] = read_text(file_row[name], are_turns)
        rows.append(row)
    return rows


def read_table(path: Path, columns: Sequence[str]) -> list[dict]:
    """Read columns of a Parquet or CSV file, `id` among them as text; `scored` may be absent."""
    if path.suffix == ".parquet":
        names = choose_columns(path, columns, pq.read_schema(path).names)
        rows = pq.read_table(path, columns=names).to_pylist()
    else:
        rows = read_csv(path, columns)

    for row in rows:
        row["id"] = str(row["id"])
    return rows


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


def read_text(value: str | Sequence | None, are_turns: bool) -> str | list[str | None] | None:
    """Read a text of the test file, which in some competitions (`are_turns`) is a JSON list of turns.

    Returns:
        The list of turns, each a string or None. A text that is no such list stays as it is.
    """
    if not are_turns or not isinstance(value, str):
        return value

    # A text may merely look like JSON.
    try:
        turns = json.loads(value)
    except (json.JSONDecodeError, RecursionError):
        return value

    if turns is None:
        return None
    if isinstance(turns, list):
        return [None if turn is None else str(turn) for turn in turns]
    return value


def install_missing_wheels(root: Path, packages: Sequence[Package], wheels: str | None) -> None:
    """Install bitsandbytes, from the dataset `wheels`, where a package needs it and the image lacks it."""
    is_needed = any(package.manifest["quantize"] in ("nf4", "int8") for package in packages)
    is_installed = importlib.util.find_spec("bitsandbytes") is not None
    if not is_needed or is_installed:
        return
    if wheels is None:
        raise ModuleNotFoundError(
            "a package is quantised with bitsandbytes, which is not installed here; "
            "name the dataset that holds its wheel in the spec's `wheels`"
        )

    # No network: pip installs from the mounted folder alone.
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",), "datasets").parent
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--find-links", str(folder), "bitsandbytes"], check=True)
    importlib.invalidate_caches()
