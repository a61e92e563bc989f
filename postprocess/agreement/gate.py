"""The same validation rows through the model as trained and through what is made of it: probabilities compared row by row.

Everything but the trained model is loaded and scored by the code that runs on Kaggle. The columns: `recorded`
(predictions.parquet, written by training), `trained` (base and adapter loaded by PEFT, in the precision of the training),
`merged` (16 bits), and the candidates for the package: `quantised` (merged, then quantised), `unmerged` (the base in nf4,
the adapter apart), or both, of which the one closer to `trained` is taken.
"""

import gc
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
import polars as pl
import torch

from kaggle_kernels.runtime.models.model import load_model
from kaggle_kernels.runtime.models.scoring import ORDERS, make_requests, orders_of, score
from postprocess.agreement.plot import agreement_picture
from postprocess.agreement.reference_model import load_merged, load_trained
from postprocess.agreement.statistics import QUANTISED, Column, compare
from postprocess.agreement.table import groups_of, probability_table, table_lines, without_nan
from postprocess.agreement.validation_rows import validation_rows
from postprocess.run_folder import Run, checked_tokenizer
from postprocess.weights.meta_model import model_skeleton
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, write_json
from recipes.pairwise.data.datasets import targets, winners

FLOAT16_ON_CPU_FLOP = 5e10  # about 20 s: float16 is ten times slower than float32 on CPUs without units for it
GOLDEN_ORDER = ("as_given",)


def score_models(run: Run, folders: Mapping[str, Path | None], out: Path) -> None:
    """Score the validation rows with every model, and write the probabilities to a JSON file.

    Args:
        run: The run that is packaged.
        folders: The models' folders by column: `merged` where there is one (None: made in memory),
            then the candidates `quantised`, `quantised-2`, …, `unmerged`.
        out: The file. Besides the columns it has the golden rows' probabilities of each model.
    """
    rows, pairs = validation_rows(run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = checked_tokenizer(run)
    dtype = kernel_dtype(run, tokenizer, pairs, device)
    columns = [recorded_column(run, rows)]
    golden = {}
    for name, load in model_loaders(run, folders, device, dtype):
        column, golden[name] = _score_model(name, load(), run, tokenizer, pairs)
        columns.append(column)
        gc.collect()

    # With quantize: none, one model has both names.
    if QUANTISED in folders and folders[QUANTISED] == folders.get("merged"):
        merged = next(column for column in columns if column.name == "merged")
        columns.append(Column(QUANTISED, merged.probabilities_rov, merged.precision))
        golden[QUANTISED] = golden["merged"]

    as_json = []
    for column in columns:
        probabilities = column.probabilities_rov.tolist()
        as_json.append({"name": column.name, "precision": column.precision, "rov": probabilities})
    write_json(out, {"columns": as_json, "golden": golden})


def agreement(run: Run, scores_file: Path, out: Path) -> None:
    """Compare the models, print a table, write agreement.json and, beside it, a table and a picture.

    Args:
        run: The run that is packaged.
        scores_file: What score_models wrote.
        out: agreement.json. It also has the golden probabilities of the candidate that is packaged.

    Raises:
        UserError: The models do not agree. All is written by then.
    """
    scores = read_object(scores_file)
    columns = []
    for column in scores["columns"]:
        columns.append(Column(column["name"], np.array(column["rov"]), column["precision"]))

    rows, _ = validation_rows(run)
    verdicts = run.contract.verdicts
    tolerance = run.recipe.pairwise.package.tolerance
    report = compare(columns, targets(rows, verdicts), winners(rows, verdicts), tolerance, groups_of(rows))
    metrics = run.folder / "metrics.json"
    trained_on = metrics.is_file() and read_object(metrics).get("rows_were_trained_on")
    report["rows_were_trained_on"] = bool(trained_on)
    print("\n".join(table_lines(report)))

    with atomic_file(out.with_suffix(".parquet")) as temporary:
        probability_table(rows, columns, verdicts).write_parquet(temporary)
    with atomic_file(out.with_suffix(".png")) as temporary:
        agreement_picture(run.folder, report, columns, verdicts, temporary)
    golden = scores["golden"][report["packaged"]]
    write_json(out, without_nan({**report, "golden": golden}))
    refuse(run, report, out)


def refuse(run: Run, report: dict, out: Path) -> None:
    """Raise UserError where the models do not agree: which one is off, by how much, and what to do about it."""
    tolerance, recorded = report["tolerance"], report["models"][0]["against_trained"]["mean"]
    if not recorded <= tolerance:
        raise UserError(
            f"{out}: base and adapter, loaded as they were trained, differ by {recorded:.4f} in probability "
            f"from predictions.parquet, which training wrote: one of {run.weights}, {run.folder} is not the training's; put it "
            "back, or train again"
        )
    if not report["agrees"]:
        gate = report["gates"][0]
        raise UserError(
            f"{out}: the {gate['model']} model differs from the {gate['against']} one by {gate['mean']:.4f} in probability on "
            f"average, over pairwise.package.tolerance ({tolerance}); no package is made: {remedy(run, report)}; "
            f"{out.with_suffix('.png').name} and {out.with_suffix('.parquet').name} beside it show the rows"
        )


def remedy(run: Run, report: dict) -> str:
    """What to change in the recipe: less rounding where that is to blame, another kind of package where merging is."""
    quantize = run.recipe.pairwise.package.quantize
    means = {line["model"]: line["against_trained"]["mean"] for line in report["models"]}
    merged, nearer = means.get("merged", 0), max(report["tolerance"], means[report["packaged"]] / 2)
    if merged <= nearer and report["packaged"] == "unmerged":
        return "package with adapter: merged and quantize: int8 or none"
    if merged <= nearer and quantize != "none":
        return "package with quantize: none" if quantize == "int8" else "package with quantize: int8 or none"
    if "unmerged" in means:
        return "no package of this run would be nearer, raise the tolerance if that will do or train again"
    if run.has_adapter:
        return f"merging alone moves it by {merged:.4f}, package with quantize: nf4 and adapter: unmerged"
    return f"float16 alone moves it by {merged:.4f}, train it again with fp16: true"


def recorded_column(run: Run, rows: pl.DataFrame) -> Column:
    """The probabilities that training wrote down."""
    per_order = [
        rows.select(f"p_{verdict}_{order}" for verdict in run.contract.verdicts).to_numpy().astype(np.float64)
        for order in ORDERS
    ]
    return Column("recorded", np.stack(per_order, axis=1), "as trained")


def model_loaders(
    run: Run, folders: Mapping[str, Path | None], device: str, dtype: torch.dtype
) -> Iterator[tuple[str, Callable[[], torch.nn.Module]]]:
    """The models to be scored, as (name, function that loads it), each folder once; all but `trained` compute in `dtype`."""
    yield "trained", lambda: load_trained(run, device)
    loaded = set()
    for name, folder in folders.items():
        if folder is None:
            yield name, lambda: load_merged(run, device, dtype)
        elif folder not in loaded:
            loaded.add(folder)
            yield name, lambda folder=folder: load_model(folder, run.contract, device, dtype)


def _score_model(name: str, model: torch.nn.Module, run: Run, tokenizer, pairs: list) -> tuple[Column, list[dict]]:
    """A model's column, and its probabilities of the contract's golden rows."""
    contract, model_input, device = run.contract, run.model_input, str(model.device)
    golden_pairs = [model_input.pair_from_row(row["pair"]) for row in contract.golden]
    try:
        found = score(model, model_input, tokenizer, contract, pairs, device=device)
        golden = score(model, model_input, tokenizer, contract, golden_pairs, orders=GOLDEN_ORDER, device=device)
    except FloatingPointError as error:
        raise UserError(f"{name}: {error}; this model overflows, package it from other weights") from None
    precision = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    values = np.array([[found[pair.id][order] for order in ORDERS] for pair in pairs], dtype=np.float64)
    rows = [{"id": pair.id, "probabilities": golden[pair.id][GOLDEN_ORDER[0]]} for pair in golden_pairs]
    return Column(name, values, precision), rows


def kernel_dtype(run: Run, tokenizer, pairs: list, device: str) -> torch.dtype:
    """What the models compute in: float16 as on Kaggle; float32 from the same float16 weights where a CPU would take long."""
    if device != "cpu":
        return torch.float16
    skeleton = model_skeleton(run.weights, run.contract)
    layers = [shape for name, shape in skeleton.shapes.items() if "embed" not in name and name not in skeleton.head]
    multiplied = sum(math.prod(shape) for shape in layers if len(shape) == 2)
    requests = make_requests(run.model_input, tokenizer, run.contract, pairs, orders_of(run.contract, ORDERS))
    tokens = sum(request.tokens for request in requests)
    return torch.float16 if 2 * tokens * multiplied <= FLOAT16_ON_CPU_FLOP else torch.float32
