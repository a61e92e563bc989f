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
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq

TEXTS = ("prompt", "response_a", "response_b")


def kaggle_root() -> Path:
    """/kaggle, or the folder that stands for it in a rehearsal."""
    return Path(os.environ.get("KAGGLE_ROOT", "/kaggle"))


def find_mounted(root: Path, slug: str, names: Sequence[str]) -> Path:
    """The file named as one of `names` in the dataset or competition `slug`, wherever that is mounted.

    Mounted twice, the same file counts once. Raises FileNotFoundError where there is none, or several that differ.
    """
    inputs = root / "input"
    found = [path for name in names for path in inputs.rglob(name) if slug in path.relative_to(inputs).parts[:-1]]
    if found and all(path.name == found[0].name and filecmp.cmp(path, found[0], shallow=False) for path in found[1:]):
        return found[0]
    mounted = sorted({str(path.parent.relative_to(inputs)) for path in inputs.rglob("*") if path.is_file()})
    raise FileNotFoundError(
        f"{inputs}: {len(found)} files named {' or '.join(names)} below a folder {slug!r}, expected one; mounted are "
        f"{', '.join(mounted) or 'no files at all'}; attach {slug} to the kernel once"
    )


def read_rows(path: Path, are_turns: bool) -> list[dict]:
    """The test rows: id (str), prompt, response_a, response_b, each a string, null, or with `are_turns` a list of those."""
    if path.suffix == ".parquet":
        rows = pq.read_table(path).to_pylist()
    else:
        csv.field_size_limit(2**31 - 1)
        with path.open(encoding="utf-8", errors="replace", newline="") as file:
            rows = list(csv.DictReader(file))
    missing = [name for name in ("id", *TEXTS) if rows and name not in rows[0]]
    if missing or not rows:
        raise ValueError(f"{path}: {'no column ' + ', '.join(missing) if missing else 'no rows'}")
    rows = [{"id": str(row["id"]), **{name: read_text(row[name], are_turns) for name in TEXTS}} for row in rows]
    if len({row["id"] for row in rows}) != len(rows):
        raise ValueError(f"{path}: an id occurs twice; a submission needs every id once")
    return rows


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
    folder = find_mounted(root, wheels, ("bitsandbytes-*.whl",)).parent
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
