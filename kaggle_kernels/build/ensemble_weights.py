"""An ensemble's weights, and its temperature, fitted on validation rows that none of its models was trained on.

The rows are those of outputs/RUN/predictions.parquet that all runs have, joined by id. The kernel's own arithmetic is
followed: orders averaged, the competition's verdicts made to sum to one, the weighted mean, the temperature.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl
import yaml
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.optimize import minimize

from kaggle_kernels.build.packages import package_folder
from kaggle_kernels.build.spec import COMPETITIONS, SPECS, Spec, read_spec
from kaggle_kernels.runtime.submission import SMALLEST
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object
from preprocess.core.ledger import fingerprint

TEMPERATURES = (0.1, 10.0)
RESAMPLES = 1000
SEED = 1


@dataclass(frozen=True)
class Rows:
    """Validation rows that all runs have: probabilities float64 (runs, rows, verdicts), and each row's verdict (rows,)."""

    probabilities_mrv: np.ndarray
    winners_r: np.ndarray


def weigh(spec_path: Path, write: bool) -> None:
    """Fit, print the table, and with `write` put weights and temperature into the spec."""
    spec = read_spec(spec_path)
    rows = read_rows(spec)
    weights, temperature = fit(rows)
    equal = np.full(len(weights), 1 / len(weights))
    print_table(spec, rows, equal, weights, temperature)
    print(noise_sentence(row_losses(rows, equal, 1.0) - row_losses(rows, weights, temperature)))
    useless = [
        package.run for package, weight in zip(spec.packages, weights, strict=True) if weight == 0
    ]
    if useless:
        advice = f"{spec_path}: the fitted weight of {', '.join(useless)} is 0; remove it from packages, then weigh again"
        if write:
            raise UserError(advice)
        print(advice)
    if write:
        write_spec(spec_path, weights, temperature)
        told = (
            f"weights {', '.join(f'{weight:g}' for weight in weights)}, temperature {temperature:g}"
        )
        name = spec_path.stem if spec_path.parent == SPECS else spec_path
        print(f"{spec_path}: {told}; now run `python -m kaggle_kernels build {name}`")


def read_rows(spec: Spec) -> Rows:
    """The rows that all runs of the spec held out, with a verdict that the competition knows; a UserError where none are."""
    verdicts = COMPETITIONS[spec.competition].verdicts
    tables = [read_predictions(package.run, spec) for package in spec.packages]
    first, joined = (
        spec.packages[0].run,
        tables[0].rename({"fold": "fold_0", "winner": "winner_0", "p": "p_0"}),
    )
    for number, (package, table) in enumerate(zip(spec.packages[1:], tables[1:], strict=True), 1):
        renamed = {name: f"{name}_{number}" for name in ("fold", "winner", "p")}
        joined = joined.join(table.rename(renamed), on="id", how="inner", maintain_order="left")
        if joined.is_empty():
            raise UserError(
                f"outputs/{package.run}/predictions.parquet: no row of {first} is among its rows ({folds_of(tables[0])} there, "
                f"{folds_of(table)} here); train both on the same pairs with the same fold held out"
            )
        for name in ("fold", "winner"):
            other = joined.filter(pl.col(f"{name}_0").ne_missing(pl.col(f"{name}_{number}")))
            if not other.is_empty():
                row = other.row(0, named=True)
                raise UserError(
                    f"outputs/{package.run}/predictions.parquet: row {row['id']}: {name} is {row[f'{name}_{number}']}, in "
                    f"{first} {row[f'{name}_0']}; train both on the same pairs with the same fold held out"
                )
    judged = joined.filter(pl.col("winner_0").is_in(verdicts))
    if judged.is_empty():
        raise UserError(
            f"outputs/{first}/predictions.parquet: no row has one of {', '.join(verdicts)} as its winner"
        )
    probabilities = np.array(
        [judged[f"p_{number}"].to_list() for number in range(len(tables))], dtype=np.float64
    )
    return Rows(probabilities, np.array([verdicts.index(winner) for winner in judged["winner_0"]]))


def read_predictions(run: str, spec: Spec) -> pl.DataFrame:
    """A run's id, fold, winner, and p: the list of its probabilities of the competition's verdicts, summing to one."""
    folder = Path("outputs") / run
    path, verdicts = folder / "predictions.parquet", COMPETITIONS[spec.competition].verdicts
    if not path.is_file():
        raise UserError(
            f"{path}: no such file; weights are fitted on a run's validation rows: axolotl train recipes/{run}.yml"
        )
    if read_object(folder / "metrics.json").get("rows_were_trained_on"):
        raise UserError(
            f"{folder / 'metrics.json'}: rows_were_trained_on: the run was trained on these rows, so that they say nothing of "
            "its weight; train it with a fold held out (PAIRWISE_FOLD=0), and weigh that"
        )
    suffix = "" if spec.orders == "both" else "_as_given"
    columns = [f"p_{verdict}{suffix}" for verdict in verdicts]
    try:
        table = pl.read_parquet(path, columns=["id", "fold", "winner", *columns])
    except (pl.exceptions.PolarsError, OSError) as error:
        raise UserError(
            f"{path}: not the predictions of training ({str(error).splitlines()[0]}); train again"
        ) from None
    values = table.select(pl.col(columns).cast(pl.Float64)).to_numpy()
    if not np.isfinite(values).all() or (values.min(axis=0) == values.max(axis=0)).any():
        raise UserError(
            f"{path}: {', '.join(columns)} are not probabilities that differ from row to row; train again"
        )
    if table["id"].is_duplicated().any():
        raise UserError(
            f"{path}: the id {table.filter(table['id'].is_duplicated())['id'][0]} occurs twice; train again"
        )
    shares = values / values.sum(axis=1, keepdims=True)
    return table.select("id", "fold", "winner", pl.Series("p", shares.tolist()))


def folds_of(table: pl.DataFrame) -> str:
    """The folds of a run's rows, e.g. "fold 0"."""
    return f"fold {', '.join(map(str, sorted(table['fold'].unique().to_list())))}"


def mixed(rows: Rows, weights: Sequence[float], temperature: float) -> np.ndarray:
    """The ensemble's probabilities (rows, verdicts), as the kernel computes them."""
    mean = np.tensordot(np.asarray(weights), rows.probabilities_mrv, axes=1)
    powers = np.maximum(mean, SMALLEST) ** (1 / temperature)
    return powers / powers.sum(axis=1, keepdims=True)


def row_losses(rows: Rows, weights: Sequence[float], temperature: float) -> np.ndarray:
    """Each row's log loss (rows,)."""
    probabilities = mixed(rows, weights, temperature)
    return -np.log(
        np.maximum(probabilities[np.arange(len(rows.winners_r)), rows.winners_r], SMALLEST)
    )


def validation(spec: Spec) -> dict | None:
    """What the spec's models reach together on the rows that all their runs held out: rows, accuracy, log_loss.

    They are mixed as the kernel does, with the spec's weights and temperature. None where the rows are not here, or a run's
    package is of another training than the run is now.
    """
    folders = [package_folder(package.run) for package in spec.packages]
    contracts = [
        [fingerprint(path / "contract.json") for path in (folder.parent, folder)]
        for folder in folders
    ]
    if any(trained is None or trained != packaged for trained, packaged in contracts):
        return None
    try:
        rows = read_rows(spec)
    except UserError:
        return None
    weights = [package.weight for package in spec.packages]
    is_right = mixed(rows, weights, spec.temperature).argmax(axis=1) == rows.winners_r
    losses = row_losses(rows, weights, spec.temperature)
    return {
        "rows": len(is_right),
        "accuracy": float(is_right.mean()),
        "log_loss": float(losses.mean()),
    }


def fit(rows: Rows) -> tuple[np.ndarray, float]:
    """The weights, summing to one, and the temperature of the least log loss, in thousandths."""
    models = len(rows.probabilities_mrv)
    found = minimize(
        lambda values: row_losses(rows, values[:-1], float(np.exp(values[-1]))).mean(),
        x0=[*[1 / models] * models, 0.0],
        method="SLSQP",
        bounds=[*[(0.0, 1.0)] * models, tuple(np.log(TEMPERATURES))],
        constraints={"type": "eq", "fun": lambda values: values[:-1].sum() - 1},
        options={"ftol": 1e-10, "maxiter": 500},
    )
    if not found.success:
        raise UserError(
            f"the weights could not be fitted on {len(rows.winners_r)} rows ({found.message}); keep equal ones"
        )
    return in_thousandths(found.x[:-1]), round(float(np.exp(found.x[-1])), 3)


def in_thousandths(weights: Sequence[float]) -> np.ndarray:
    """Weights as multiples of 0.001 that sum to one; what is under 0.005 becomes 0."""
    kept = np.where(np.asarray(weights) < 0.005, 0.0, weights)
    parts = kept / kept.sum() * 1000
    whole = np.floor(parts).astype(int)
    for at in np.argsort(whole - parts)[: 1000 - whole.sum()]:
        whole[at] += 1
    return whole / 1000


def noise_sentence(gains_r: np.ndarray) -> str:
    """What the fitted weights gain over equal ones, with the interval that resampled rows (a bootstrap) give."""
    generator = np.random.default_rng(SEED)
    means = [generator.choice(gains_r, len(gains_r)).mean() for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [0.025, 0.975])
    told = f"fitted gains {gains_r.mean():.4f} in log loss over equal weights (95 %: {low:.4f} to {high:.4f})"
    return (
        told
        if low > 0
        else f"warning: {told}, which is within noise: equal weights will do as well"
    )


def print_table(
    spec: Spec, rows: Rows, equal: np.ndarray, weights: np.ndarray, temperature: float
) -> None:
    """Each run alone, equal weights, fitted weights: accuracy and log loss."""
    table = Table(
        "model", "weights", "temperature", "accuracy", "log loss", box=SIMPLE_HEAD, pad_edge=False
    )
    runs = [
        (package.run, row, 1.0)
        for package, row in zip(spec.packages, np.eye(len(weights)), strict=True)
    ]
    for name, chosen, at in [
        *runs,
        ("equal weights", equal, 1.0),
        ("fitted", weights, temperature),
    ]:
        told = " + ".join(f"{weight:.3f}" for weight in chosen)
        right = (mixed(rows, chosen, at).argmax(axis=1) == rows.winners_r).mean()
        table.add_row(
            name, told, f"{at:.3f}", f"{right:.4f}", f"{row_losses(rows, chosen, at).mean():.4f}"
        )
    Console(highlight=False).print(table)
    print(f"{len(rows.winners_r)} rows that all runs held out")


def write_spec(path: Path, weights: Sequence[float], temperature: float) -> None:
    """Put weights and temperature into the spec's text, all else byte for byte as it was."""
    text = path.read_bytes().decode("utf-8")
    changed = with_weights(text, weights, temperature)
    expected = yaml.safe_load(text) | {"temperature": temperature}
    for package, weight in zip(expected["packages"], weights, strict=True):
        package["weight"] = weight
    if yaml.safe_load(changed) != expected:
        raise UserError(
            f"{path}: written in a way that cannot be changed here; write weights and temperature yourself"
        )
    with atomic_file(path) as temporary:
        temporary.write_bytes(changed.encode("utf-8"))


def with_weights(text: str, weights: Sequence[float], temperature: float) -> str:
    """A spec's YAML with these weights and this temperature; comments, order and quotes stay."""
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    packages = next(value for key, value in root.value if key.value == "packages")
    edits = [
        edit_of(text, node, "weight", weight)
        for node, weight in zip(packages.value, weights, strict=True)
    ]
    edits.append(edit_of(text, root, "temperature", temperature))
    for start, end, new in sorted(edits, reverse=True):
        text = text[:start] + new + text[end:]
    return text


def edit_of(text: str, mapping: yaml.MappingNode, key: str, value: float) -> tuple[int, int, str]:
    """Start, end and new text that give `key` of a mapping its value: in its place, or after the mapping's last scalar."""
    entries = [(name, node) for name, node in mapping.value if isinstance(node, yaml.ScalarNode)]
    for name, node in entries:
        if name.value == key:
            return node.start_mark.index, node.end_mark.index, f"{value:g}"
    name, node = entries[-1]
    end = node.end_mark.index
    if mapping.flow_style:
        return end, end, f", {key}: {value:g}"
    line_end = text.find("\n", end)
    end = len(text) if line_end < 0 else line_end - (text[line_end - 1] == "\r")
    newline = "\r\n" if "\r\n" in text else "\n"
    return end, end, f"{newline}{' ' * name.start_mark.column}{key}: {value:g}"
