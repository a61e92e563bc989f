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
ROWS_AT_ONCE = 1024


def kaggle_root() -> Path:
    """/kaggle, or the folder that stands for it in a rehearsal."""
    return Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))


def find_mounted(root: Path, slug: str, names: Sequence[str], kind: str | None = None) -> Path:
    """The file named as one of `names`, the first that is there, in the dataset or competition `slug`, wherever it is mounted.

    A `kind`, datasets or competitions, leaves out what is mounted as the other, and takes `slug` at the place of a mount
    (slug, kind/slug, kind/owner/slug) before a folder of that name deeper inside. Mounted twice, the same file counts once.
    Raises FileNotFoundError where there is none, or several that differ.
    """
    inputs = root / "input"
    places: dict[tuple[int, str], list[Path]] = {}
    for name in names:
        for path in sorted(inputs.rglob(name)):
            place = place_in_mounts(path.relative_to(inputs).parts[:-1], slug, kind)
            if path.is_file() and place is not None:
                places.setdefault((place, name), []).append(path)
    found = places[min(places, key=lambda place: (place[0], names.index(place[1])))] if places else []
    if found and all(path.name == found[0].name and filecmp.cmp(path, found[0], shallow=False) for path in found[1:]):
        return found[0]
    mounted = sorted({str(path.parent.relative_to(inputs)) for path in inputs.rglob("*") if path.is_file()})
    raise FileNotFoundError(
        f"{inputs}: {len(found)} files named {' or '.join(names)} below a folder {slug!r}, expected one; mounted are "
        f"{', '.join(mounted) or 'no files at all'}; attach {slug} to the kernel once"
    )


def place_in_mounts(parts: Sequence[str], slug: str, kind: str | None) -> int | None:
    """How well a file's folders below /kaggle/input suit: 0 in the mount of `slug`, 1 in a folder of that name, None not."""
    other = {"datasets": "competitions", "competitions": "datasets"}.get(kind or "")
    if slug not in parts or (len(parts) > 1 and parts[0] == other):
        return None
    owner = 1 if kind == "datasets" else 0
    is_mount = parts[0] == slug or (parts[0] == kind and parts[1 + owner : 2 + owner] == (slug,))
    return 0 if kind is None or is_mount else 1


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """The test rows: id (str), prompt, response_a, response_b, each a string, null, or with `are_turns` a list of those.

    Ids keep the file's characters, numbers their digits. Raises ValueError where a column is missing or holds no text, where
    there are no rows, or where an id is null, no whole number, or there twice.
    """
    rows = list(rows_of(path, ("id", *TEXTS)))
    if not rows:
        raise ValueError(f"{path}: no rows")
    if twice := [row_id for row_id, count in Counter(row["id"] for row in rows).items() if count > 1]:
        raise ValueError(f"{path}: an id occurs twice: {', '.join(twice[:3])}; a submission needs every id once")
    return [{"id": row["id"], **{name: read_text(row[name], are_turns) for name in TEXTS}} for row in rows]


def read_ids(path: Path) -> list[str]:
    """The ids of a table, in its order: what a submission is checked against."""
    return [row["id"] for row in rows_of(path, ("id",))]


def rows_of(path: Path, columns: Sequence[str], keep: Container[str] | None = None) -> Iterator[dict]:
    """The rows of a Parquet or CSV file with these columns, id among them, where it stands in `keep` if that is given.

    Others are never made into Python objects (Parquet) or soon dropped (CSV): memory is that of a thousand rows and those kept.
    """
    number = 0
    for values in (parquet_parts if path.suffix == ".parquet" else csv_parts)(path, columns, keep):
        for row in values:
            number += 1
            row_id = id_text(row["id"])
            if row_id is None:
                raise ValueError(f"{path}, row {number}: its id is {row['id']!r}; expected a text or a whole number")
            if keep is None or row_id in keep:
                yield {**row, "id": row_id}


def parquet_parts(path: Path, columns: Sequence[str], keep: Container[str] | None) -> Iterator[list[dict]]:
    """Rows by the thousand; of those that are not in `keep` only the id."""
    with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**18) as file:  # else whole columns: 340 MB of a file of 68 MB
        schema = file.schema_arrow
        check_columns(path, columns, schema.names)
        for name in set(columns) & set(TEXTS):
            if not holds_text(schema.field(name).type):
                raise ValueError(f"{path}: column {name} holds {schema.field(name).type}; expected text, or lists of it")
        for batch in file.iter_batches(ROWS_AT_ONCE, columns=list(columns), use_threads=False):
            ids = batch.column("id").to_pylist()
            is_kept = [keep is None or id_text(row_id) in keep for row_id in ids]
            kept = iter(batch.filter(pa.array(is_kept, pa.bool_())).to_pylist())
            yield [next(kept) if wanted else {"id": row_id} for row_id, wanted in zip(ids, is_kept, strict=True)]


def csv_parts(path: Path, columns: Sequence[str], keep: Container[str] | None) -> Iterator[list[dict]]:
    """Rows one by one; what a row lacks is null."""
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", errors="replace", newline="") as file:
        reader = csv.DictReader(file)
        check_columns(path, columns, reader.fieldnames or ())
        for row in reader:
            yield [{name: row[name] for name in columns}]


def check_columns(path: Path, columns: Sequence[str], present: Sequence[str]) -> None:
    """Raise ValueError where a column is not there."""
    if missing := [name for name in columns if name not in present]:
        raise ValueError(f"{path}: no column {', '.join(missing)}; there are {', '.join(present) or 'none'}")


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
