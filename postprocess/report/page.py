"""Evidence → the page: its numbers and pictures put into page.html.jinja, with page.css and page.js inside it.

Everything is escaped but our own SVG, style and script. A content security policy lets the page load nothing, and run no
script but page.js, whatever the texts in it say.
"""

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path

import jinja2
import numpy as np
import polars as pl
from markupsafe import Markup, escape

from postprocess.report import metrics, svg
from postprocess.report.metrics import Figure, Line, Scored
from postprocess.report.run_data import OF_A_RECIPE, OUT_OF_FOLD, Evidence, first
from postprocess.report.worst_rows import visible, worst_errors

HERE = Path(__file__).parent
DOTS = 600  # of a scatter plot, evenly spaced among the rows
NEXT_TO_LETTER = {"model_a": "A", "model_b": "B", "tie": "tie"}


def render(evidence: Evidence) -> str:
    """The whole page."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (fixed, signed, percent, between, coded, visible):
        environment.filters[function.__name__] = function
    script = (HERE / "page.js").read_text(encoding="utf-8")
    policy = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.jinja").render(
        name=run_name(evidence.folder),
        evidence=evidence,
        missing=evidence.missing,
        facts=facts(evidence),
        of_fold=evidence.rows_file is not None and evidence.rows_file.name == OUT_OF_FOLD,
        measured=measured(evidence) if evidence.rows is not None else None,
        learning=learning(evidence),
        agreement=agreement(evidence),
        letters=NEXT_TO_LETTER,
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        policy=policy,
        table=table,
        share_bar=svg.share_bar,
    )


def run_name(folder: Path) -> str:
    """The run's name: its folder's, with its parent's where that alone says little."""
    folder = folder.resolve()
    return f"{folder.parent.name}/{folder.name}" if re.fullmatch(OF_A_RECIPE, folder.name) else folder.name


def facts(evidence: Evidence) -> list[tuple[str, str]]:
    """Names and values of the page's head."""
    contract, recorded, metrics = first(evidence.contracts), evidence.recorded, first(evidence.metrics)
    commits = {values.get("recorded", {}).get("git_commit") for values in evidence.contracts.values()} - {None}
    versions = recorded.get("versions") or {}
    folds = sorted({str(values["fold"]) for values in evidence.metrics.values() if "fold" in values}, key=lambda f: (len(f), f))
    training = [values["training_rows"] for values in evidence.metrics.values() if values.get("training_rows")]
    seconds = sum(values.get("seconds_training", 0) for values in evidence.metrics.values())
    found = [
        ("recipe", recorded.get("recipe")),
        ("base model", " at ".join(filter(None, (contract.get("base_model"), (contract.get("revision") or "")[:12])))),
        ("git commit", ", ".join(sorted(re.sub(r"^(\w{12})\w+", r"\1", commit) for commit in commits))),
        ("trained", str(recorded.get("created", "")).replace("T", " ").replace("+00:00", " UTC")),
        ("head", f"{contract.get('head')}, {len(evidence.verdicts)} verdicts" if contract else None),
        ("tokens", f"{contract['budget_tokens']:,} a row" if contract.get("budget_tokens") else None),
        ("fold held out" if len(folds) == 1 else "folds", "none" if folds == ["all"] else ", ".join(folds)),
        ("rows measured", f"{len(evidence.rows):,}" if evidence.rows is not None else None),
        ("rows trained on", " to ".join(f"{rows:,}" for rows in sorted({min(training), max(training)})) if training else None),
        ("steps", f"{metrics['steps']:,}" if metrics.get("steps") else None),
        ("training took", duration(seconds) if seconds else None),
        ("pairs", str(metrics.get("pairs_sha256", ""))[:12]),
        ("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version != "absent")),
    ]
    return [(name, value) for name, value in found if value]


def measured(evidence: Evidence) -> dict:
    """What the sections about the rows show."""
    rows, data = evidence.rows, metrics.scored(evidence.rows, evidence.verdicts)
    length = metrics.lengths(rows) if evidence.has_texts else None
    longer_r = metrics.longer_is_a(length) if length else None
    is_symmetrical = bool((data.both_rov[:, 0] == data.both_rov[:, 1]).all())
    found = metrics.calibration(data)
    return {
        "data": data,
        "model": metrics.model_line(data),
        "groups": data.resamples.counts_bg.shape[1],
        "has_groups": "group" in rows.columns,
        "has_labels": "label_model_a" in rows.columns,
        "baselines": metrics.baselines(data, longer_r),
        "slices": slices(evidence, data, length),
        "calibration": found,
        "reliability": svg.reliability(found.bins, found.lowest) if found else None,
        "positions": None if is_symmetrical else metrics.positions(data),
        "orders_picture": None if is_symmetrical else orders_picture(data),
        "before_calibration": first(evidence.metrics).get("before_calibration"),
        "errors": worst_errors(rows, data),
        "wrong": int((data.decided_r & (data.mean_rv.argmax(axis=1) != data.winners_r)).sum()),
    }


def slices(evidence: Evidence, data: Scored, length: dict[str, np.ndarray] | None) -> list[tuple[str, list[Line]]]:
    """The tables by what a row is, those left out that would have one line only."""
    rows, found = evidence.rows, []
    for column, title, others in (("language", "By language", "languages"), ("source", "By source", "sources")):
        if column in rows.columns:
            found.append((title, metrics.by_name(data, rows[column], others)))
    if length:
        found.insert(1, ("By length of prompt and answers", metrics.by_length(data, sum(length.values()))))
        found.append(("By which answer won", metrics.by_longer(data, length)))
    if rows["fold"].n_unique() > 1:
        folds = metrics.by_name(data, "fold " + rows["fold"].cast(pl.String), "folds")
        found.append(("By fold", sorted(folds, key=lambda line: (len(line.name), line.name))))
    return [(title, lines) for title, lines in found if len(lines) > 1]


def table(lines: Sequence[Line], reference: Line) -> dict:
    """A table's lines, each with its strips, and the columns' axes: scales that all lines share."""
    axes, strips = {}, [{} for _ in lines]
    for column in ("accuracy", "log_loss"):
        figures, aim = [getattr(line, column) for line in lines], getattr(reference, column)
        on = svg.strip_scale([*figures, aim])
        axes[column] = svg.strip_axis(on)
        for drawn, one in zip(strips, figures, strict=True):
            drawn[column] = svg.strip(one, on, aim.value if aim else None) if one else None
    return {"rows": list(zip(lines, strips, strict=True)), "axes": axes}


def orders_picture(data: Scored) -> Markup:
    """P(A) of each row in the order as given and swapped; those whose verdict flips stand out."""
    chosen = spaced(len(data.winners_r))
    place = data.verdicts.index("model_a")
    flips_r = data.both_rov[:, 0].argmax(axis=1) != data.both_rov[:, 1].argmax(axis=1)
    x, y = (data.both_rov[chosen, order, place] for order in (0, 1))
    label = "The probability of answer A in both orders, a dot a row"
    names = ("P(A), order as given", "P(A), order swapped")
    return svg.scatter(x, y, flips_r[chosen], names, label, len(data.verdicts) == 2)


def spaced(rows: int) -> np.ndarray:
    """The places of at most DOTS of so many rows, evenly spaced."""
    return np.unique(np.linspace(0, rows - 1, min(rows, DOTS)).round().astype(int))


def learning(evidence: Evidence) -> list[dict]:
    """The pictures of the learning curves: title, picture, the kinds of lines in it.

    Where nothing was validated on the way, the validation after the last step, of metrics.json, is a dot.
    """
    found = []
    for title, axis, training, validation, at_the_end in (
        ("Loss", "loss", "loss", "eval_log_loss", "log_loss"),
        ("Accuracy", "accuracy", None, "eval_accuracy", "accuracy"),
        ("Learning rate", "learning rate", "learning_rate", None, None),
    ):
        series = []
        for name, records in evidence.history.items():
            values = evidence.metrics.get(name, {})
            last = [(values["steps"], values[at_the_end])] if values.get("steps") and values.get(at_the_end) else []
            curve = metrics.curve(records, training)
            if training == "loss" and len(evidence.history) == 1:
                series.append(("raw", curve))
            series.append(("training", metrics.smoothed(curve) if training == "loss" else curve))
            series.append(("validation", metrics.curve(records, validation) or last))
        drawn = [(kind, curve) for kind, curve in series if curve]
        if any(len(curve) > 1 for _, curve in drawn):
            kinds = {kind for kind, _ in drawn}
            found.append({"title": title, "picture": svg.curves(drawn, axis, f"{title} by step"), "kinds": kinds})
    return found


def agreement(evidence: Evidence) -> dict | None:
    """agreement.json, with the picture of the packaged model beside the trained one where agreement.parquet is there."""
    if evidence.agreement is None:
        return None
    report, rows, picture = evidence.agreement, evidence.agreement_rows, None
    packaged = report.get("packaged")
    if rows is not None and f"{packaged}_p_model_a" in rows.columns and "trained_p_model_a" in rows.columns:
        names = [name for name in NEXT_TO_LETTER if f"trained_p_{name}" in rows.columns]
        columns = [pl.col(f"{model}_p_{name}").mean() for model in ("trained", packaged) for name in names]
        mean = rows.group_by("id", maintain_order=True).agg(columns).drop("id").to_numpy()
        trained, other = mean[:, : len(names)], mean[:, len(names) :]
        chosen = spaced(len(mean))
        changed = (trained.argmax(axis=1) != other.argmax(axis=1))[chosen]
        label = f"The probability of answer A as trained and as {packaged}, a dot a row"
        axes = ("P(A), trained", f"P(A), {packaged}")
        picture = svg.scatter(trained[chosen, 0], other[chosen, 0], changed, axes, label, len(names) == 2)
    return {**report, "picture": picture}


def duration(seconds: float) -> str:
    """1 h 5 min, 7 min, 24 s."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min" if minutes >= 2 else f"{seconds:.0f} s"


def fixed(value: float | None, places: int = 3) -> str:
    """A number with so many decimals; a dash where there is none."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.{places}f}".replace("-", "−")


def signed(value: float | None, places: int = 3) -> str:
    """+0.012 or −0.012."""
    return "–" if value is None else f"{round(value, places) + 0.0:+.{places}f}".replace("-", "−")


def percent(value: float | None, places: int = 1) -> str:
    """61.8 %, with a space that does not break."""
    return "–" if value is None else f"{100 * value:.{places}f}\u00a0%"


def between(one: Figure | Sequence[float] | None, places: int = 3) -> str:
    """An interval: [0.598, 0.712]."""
    low, high = (None, None) if one is None else (one.low, one.high) if isinstance(one, Figure) else one
    return f"[{fixed(low, places)},\u00a0{fixed(high, places)}]"


def coded(text: str) -> Markup:
    """Escaped text, what stands between backticks as code."""
    parts = [escape(part) if at % 2 == 0 else Markup("<code>{}</code>").format(part) for at, part in enumerate(text.split("`"))]
    return Markup("").join(parts)
