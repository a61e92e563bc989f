"""The generated kernel, run on this machine as Kaggle runs it, in a process of its own.

It sees a tree like Kaggle's (packages as datasets, the test file without its verdicts), Kaggle's versions of the libraries,
no network, and nothing of this repository. Its results are then copied out and scored against the verdicts, if there are any.
"""

import math
import os
import shutil
import subprocess
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import polars as pl

from kaggle_kernels.build import check_built
from kaggle_kernels.fit import Fit, fit_packages
from kaggle_kernels.spec import COMPETITIONS, Spec, read_spec
from postprocess.run import is_same_model
from postprocess.sizes import GIB, weight_bytes
from preprocess.errors import UserError
from preprocess.files import atomic_file, read_object, write_json
from preprocess.model_input import VERDICTS

ROOT = Path(__file__).parents[1]
TEXTS = ("prompt", "response_a", "response_b")
TEXT_TYPES = (pl.String, pl.List(pl.String), pl.Null)
AS_TRAINED = ("head", "budget_tokens", "truncation", "softcap")  # keys that contract.json and the recipe share
ROOM = 1.1  # weights on disk may be a little more than computed: names, and how they were quantised
RESULTS = ("submission.csv", "scores.parquet", "kernel.json")
PROJECT = ("preprocess", "recipes", "postprocess", "kaggle_kernels", "tests")
KEPT_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "LD_LIBRARY_PATH")

# Python executes this before the kernel. An audit hook cannot be taken out again, and sub-processes inherit it.
SITECUSTOMIZE = f'''"""A rehearsal: no network, and nothing of the repository."""

import sys


def refuse(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        raise OSError("a kernel has no network: a name was looked up")
    if event in ("socket.connect", "socket.sendto", "socket.sendmsg") and isinstance(arguments[1], tuple):
        raise OSError(f"a kernel has no network: it reached for {{arguments[1]}}")
    if event == "import" and arguments[0].split(".")[0] in {PROJECT!r}:
        raise ImportError(f"a kernel has no repository: it imported {{arguments[0]}}")


sys.addaudithook(refuse)
'''


def rehearse(spec_path: Path, test_file: Path, out: Path, python: Path | None = None) -> dict:
    """Run the spec's kernel on `test_file` and copy what it wrote to `out`; what was measured, also in `out`/rehearsal.json.

    Raises UserError where the kernel was not built, a package is absent or does not suit, or the kernel fails.
    """
    spec = read_spec(spec_path)
    kernel = check_built(spec_path) / "kernel.py"
    packages = {fit.package.dataset: find_package(fit) for fit in fit_packages(spec_path, spec)}
    python = find_python(python)
    test_rows = read_test_rows(test_file, spec)
    read_verdicts(test_rows, str(test_file))
    with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
        root = Path(folder) / "kaggle"
        lay_out(root, spec, packages, test_file, test_rows)
        began = time.monotonic()
        run_as_kaggle(python, kernel, root, spec_path.stem)
        seconds = time.monotonic() - began
        for name in RESULTS:
            with atomic_file(out / name) as temporary:
                shutil.copyfile(root / "working" / name, temporary)
    measured = {"rows": len(test_rows), "seconds": round(seconds, 1), **measure(test_rows, out / "scores.parquet", spec)}
    write_json(out / "rehearsal.json", measured)
    print(f"{out / 'submission.csv'}: {len(test_rows)} rows in {seconds:.1f} s")
    if "accuracy" in measured:
        print(
            f"accuracy {measured['accuracy']:.4f}, log loss {measured['log_loss']:.4f} on {measured['judged']} judged rows; "
            f"the longer response: accuracy {measured['longer_accuracy']:.4f}"
        )
    return measured


def find_package(fit: Fit) -> Path:
    """The run's package; a UserError where it is absent, or is not what the spec and the recipe say."""
    folder, recipe = Path("outputs") / fit.package.run / "package", fit.recipe
    if not (folder / "manifest.json").is_file():
        raise UserError(f"{folder}: no package; run `python -m postprocess {recipe.path}` first")
    slug = str(read_object(folder / "dataset-metadata.json").get("id")).split("/")[-1]
    if slug != fit.package.dataset:
        raise UserError(
            f"{folder / 'dataset-metadata.json'}: id: found the dataset {slug!r}, the spec says {fit.package.dataset!r}; run "
            f"`python -m postprocess {recipe.path}` again"
        )
    contract, config, manifest = (read_object(folder / f"{name}.json") for name in ("contract", "config", "manifest"))
    for file, key, found, expected in (
        ("contract.json", "verdicts", contract.get("verdicts"), list(recipe.pairwise.verdicts)),
        *(("contract.json", key, contract.get(key), getattr(recipe.pairwise, key)) for key in AS_TRAINED),
        ("contract.json", "template", contract.get("template"), asdict(recipe.pairwise.resolved_template())),
        ("config.json", "model_type", config.get("model_type"), fit.served.dimensions.model_type),
        ("manifest.json", "quantize", manifest.get("quantize"), recipe.pairwise.package.quantize),
    ):
        if found != expected:
            raise UserError(
                f"{folder / file}: {key}: found {found}, {recipe.path} says {expected}, which the kernel was built for; train "
                "and package again with this recipe, or put the recipe back"
            )
    base, trained_with = recipe.axolotl["base_model"], str(contract.get("base_model"))
    stands_in = Path(trained_with).exists() and not Path(base).exists()  # axolotl train R.yml --base-model FOLDER
    if not is_same_model(base, trained_with) and not stands_in:
        raise UserError(
            f"{recipe.path}: base_model is {base}, {folder} was made of {trained_with}; put that back, or train, package and "
            "build again"
        )
    held, computed = sum(path.stat().st_size for path in folder.glob("*.safetensors")), sum(weight_bytes(fit.served))
    if held > computed * ROOM + 2**20:
        raise UserError(
            f"{folder}: {held / GIB:.1f} GiB of weights, {recipe.path} comes to {computed / GIB:.1f}, which the kernel's "
            f"memory was computed for; it was packaged from {contract.get('base_model')}: make that the base_model, and build"
        )
    return folder


def find_python(python: Path | None) -> Path:
    """The interpreter of the environment with Kaggle's versions."""
    python = python or ROOT / ".venv-kaggle" / "bin" / "python"
    if not python.is_file():
        raise UserError(f"{python}: absent; `make setup` makes the environment with Kaggle's versions")
    return python.absolute()


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
        found = f"no column {', '.join(missing)}" if missing else f"no text in {', '.join(wrong)}" if wrong else "no rows"
        raise UserError(f"{test_file}: {found}; expected the layout of {COMPETITIONS[spec.competition].slug}")
    ids = rows["id"].cast(pl.String)
    if ids.null_count() or ids.is_duplicated().any():
        found = "a row has no id" if ids.null_count() else f"the id {ids.filter(ids.is_duplicated())[0]} occurs twice"
        raise UserError(f"{test_file}: {found}; a submission needs every id once")
    return rows


def lay_out(root: Path, spec: Spec, packages: dict[str, Path], test_file: Path, test_rows: pl.DataFrame) -> None:
    """Make /kaggle below `root`: packages as links, dataset-metadata.json left out as Kaggle does, verdicts left out."""
    for dataset, package in packages.items():
        folder = root / "input" / "datasets" / "owner" / dataset
        folder.mkdir(parents=True)
        for path in package.iterdir():
            if path.name != "dataset-metadata.json":
                (folder / path.name).symlink_to(path.absolute())
    folder = root / "input" / "competitions" / COMPETITIONS[spec.competition].slug
    folder.mkdir(parents=True)
    shown = test_rows.select("id", *TEXTS)
    if test_file.suffix == ".csv":
        shown.write_csv(folder / "test.csv")
    else:
        shown.write_parquet(folder / "test.parquet")
    (root / "working").mkdir()


def run_as_kaggle(python: Path, kernel: Path, root: Path, name: str) -> None:
    """Run the kernel and print its log line by line; a UserError where it ends with an error."""
    site = root.parent / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITECUSTOMIZE, encoding="utf-8")
    script = root.parent / "kernel.py"
    shutil.copyfile(kernel, script)
    process = subprocess.Popen(
        [str(python), "-u", "-P", str(script)],
        cwd=root / "working",
        env=kaggle_environment(root, site),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    )
    last = ""
    with process:
        for line in process.stdout:
            line = line.replace(str(root), "/kaggle").replace(f"{root.parent}/", "")
            print(line, end="", flush=True)
            last = line.strip() or last
    if process.returncode:
        raise UserError(f"{name}: the kernel ended with exit code {process.returncode}: {last}")


def kaggle_environment(root: Path, site: Path) -> dict[str, str]:
    """The kernel's environment variables: nothing of ours but the path, the root, and the hubs told to stay offline."""
    kept = {key: os.environ[key] for key in KEPT_ENVIRONMENT if key in os.environ}
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    folders = {"KAGGLE_ROOT": str(root), "HOME": str(root.parent), "PYTHONPATH": str(site), "PYTHONDONTWRITEBYTECODE": "1"}
    return {**kept, **offline, **folders}


def measure(test_rows: pl.DataFrame, scores: Path, spec: Spec) -> dict:
    """Accuracy and log loss (natural) over the rows that have a verdict, joined by id; empty where the file has none."""
    verdicts = COMPETITIONS[spec.competition].verdicts
    truth = read_verdicts(test_rows, "the test rows")
    if truth is None:
        return {}
    columns = [f"p_{verdict}" for verdict in verdicts]
    judged = pl.read_parquet(scores).join(truth, on="id", how="inner").filter(pl.col("winner").is_in(verdicts))
    right, loss, longer_right = 0, 0.0, 0
    for row in judged.select("winner", "longer", *columns).to_dicts():
        values = [row[column] for column in columns]
        right += verdicts[values.index(max(values))] == row["winner"]
        loss -= math.log(values[verdicts.index(row["winner"])])
        longer_right += row["longer"] == row["winner"]
    total = max(judged.height, 1)
    shares = {"accuracy": right / total, "log_loss": loss / total, "longer_accuracy": longer_right / total}
    return {"judged": judged.height, **shares} if judged.height else {}


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
            raise UserError(f"{where}: no column {', '.join(sorted(set(flags) - present))}; give all three, or none")
        found, expected = test_rows.select(flags).rows(), "a 1 for model_a, model_b or tie, and 0 for the others"
        winners = [winner_of(values) for values in found]
    else:
        return None
    if "" in winners:
        at = winners.index("")
        raise UserError(f"{where}, row {at + 1} (id {test_rows['id'][at]}): winner is {found[at]!r}; expected {expected}")
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
