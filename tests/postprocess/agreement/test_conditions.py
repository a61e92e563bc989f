"""The gate's conditions on synthetic rows, of which every damage is known."""

import numpy as np
import polars as pl
import pytest

from postprocess.agreement.conditions import HOLDS, REFUSED, UNDECIDED, list_conditions, summarise
from postprocess.agreement.slices import slice_rows
from postprocess.agreement.statistics import Column, ComparedRows, divergence
from recipes.pairwise.config.schema import PackageBlock

ROWS = 500
THAI = slice(300, 325)
FRAME = pl.DataFrame(
    {
        "language": ["English"] * 300 + ["Thai"] * 25 + ["French"] * 165 + ["Latin", None] * 5,
        "prompt": [["x" * (number * 7919 % ROWS)] for number in range(ROWS)],
        "response_a": [["ab"]] * ROWS,
        "response_b": [[None, "c"]] * ROWS,
    }
)
LONGEST = np.argsort(FRAME["prompt"].list.first().str.len_chars().to_numpy())[-25:]


def make_columns(seed, spread, noise=0.05):
    """A trained model whose logits have this spread, an honest package of it, and the rows with fitting labels."""
    generator = np.random.default_rng(seed)
    logits_ro = generator.normal(0, spread, size=(ROWS, 1)) + generator.normal(0, 0.1, size=(ROWS, 2))
    columns = []
    for name, deviation in (("trained", 0), ("quantised", noise)):
        p_ro = 1 / (1 + np.exp(-logits_ro - generator.normal(0, 1, size=(ROWS, 2)) * deviation))
        columns.append(Column(name, np.stack([p_ro, 1 - p_ro], axis=-1), "float16"))
    winners_r = (generator.random(ROWS) > columns[0].mean_rv()[:, 0]).astype(int)
    groups_r = np.arange(ROWS)
    rows = ComparedRows(np.eye(2)[winners_r], winners_r, groups_r, slice_rows(FRAME, groups_r))
    return *columns, rows


def judge(trained, candidate, rows, **tolerances):
    """The verdict on a candidate, and the conditions that do not hold by name."""
    columns = {"trained": trained, candidate.name: candidate}
    conditions = list_conditions(candidate.name, columns, rows, PackageBlock(slug="tiny-package", **tolerances))
    others = {condition.name: condition for condition in conditions if condition.verdict != HOLDS}
    return summarise(conditions), others


def invert(chosen):
    def damage(p_rov):
        p_rov[chosen] = p_rov[chosen][..., ::-1]

    return damage


def shuffle(p_rov):
    np.random.default_rng(0).shuffle(p_rov)


def make_constant(p_rov):
    p_rov[:] = 0.5


LOG_LOSS = "the log loss that quantised adds"
SPREAD = "the share of the probabilities' spread that quantised loses"
DAMAGES = {
    "a tenth of the rows inverted": (invert(slice(None, None, 10)), 1.3, LOG_LOSS),
    "rows shuffled": (shuffle, 1.3, LOG_LOSS),
    "a constant": (make_constant, 1.3, LOG_LOSS),
    "a constant, for a weakly trained model": (make_constant, 0.15, SPREAD),
    "verdicts swapped": (invert(slice(None)), 1.3, LOG_LOSS),
    "one language broken": (invert(THAI), 1.3, "the expected log loss that quantised adds in the language Thai"),
    "long rows broken": (invert(LONGEST), 1.3, "the expected log loss that quantised adds in the longest quarter"),
}


@pytest.mark.parametrize(("damage", "spread", "expected"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_rows_are_refused(damage, spread, expected):
    trained, honest, rows = make_columns(1, spread)
    assert judge(trained, honest, rows, tolerance_verdicts=0.2) == (HOLDS, {})
    damage(honest.probabilities_rov)
    verdict, others = judge(trained, honest, rows)
    assert (verdict, others[expected].verdict) == (REFUSED, REFUSED)


def test_honest_packages_of_20_seeds_pass():
    verdicts = [judge(*make_columns(seed, spread=1.3))[0] for seed in range(20)]
    assert verdicts == [HOLDS] * 20


def test_too_few_rows_are_undecided_and_say_how_many_would_decide():
    trained, noisy, rows = make_columns(5, spread=1.3, noise=0.15)
    tenth = slice(None, None, 10)
    few = ComparedRows(rows.labels_rv[tenth], rows.winners_r[tenth], rows.groups_r[tenth], {})
    candidate = Column("quantised", noisy.probabilities_rov[tenth], "")
    reference = Column("trained", trained.probabilities_rov[tenth], "")
    verdict, others = judge(reference, candidate, few, tolerance_verdicts=0.2)
    assert (verdict, list(others)) == (UNDECIDED, [LOG_LOSS])
    assert others[LOG_LOSS].rows_needed == 331
    assert others[LOG_LOSS].value < others[LOG_LOSS].bound
    assert judge(trained, noisy, rows, tolerance_verdicts=0.2) == (HOLDS, {})


def test_the_intervals_of_the_slices_hold_together():
    trained, honest, rows = make_columns(0, spread=1.3)
    columns = {"trained": trained, "quantised": honest}
    conditions = list_conditions("quantised", columns, rows, PackageBlock(slug="tiny-package"))
    thai = next(condition for condition in conditions if condition.name.endswith("Thai"))
    values_r = divergence(honest.mean_rv(), trained.mean_rv())[THAI]
    quantile = 2.9406  # of t with 24 degrees of freedom, at 1 - 0.025 / 7: there are seven slices
    assert thai.high == pytest.approx(values_r.mean() + quantile * values_r.std(ddof=1) / 5, rel=1e-3)


def test_verdicts_that_change_are_counted_whatever_the_log_loss_says():
    trained, weak, rows = make_columns(0, spread=0.05)
    verdict, others = judge(trained, weak, rows)
    assert (verdict, list(others)) == (REFUSED, ["the share of verdicts that quantised changes"])


def test_rare_languages_are_judged_together_and_parts_with_few_groups_not_at_all():
    slices = slice_rows(FRAME, np.arange(ROWS))
    assert {name: int(mask.sum()) for name, mask in slices.items()} == {
        "the language English": 300,
        "the language French": 165,
        "the language Thai": 25,
        "the shortest quarter": 125,
        "the second quarter": 125,
        "the third quarter": 125,
        "the longest quarter": 125,
    }
    rare = FRAME.with_columns(language=pl.Series([str(number // 19) for number in range(ROWS)]))
    assert slice_rows(rare, np.arange(ROWS))["other languages"].all()
    assert slice_rows(FRAME, np.zeros(ROWS)) == {}
