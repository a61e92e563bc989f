"""What is scored next, by gain and seconds."""

import pytest

from kaggle_kernels.runtime.package import read_package
from kaggle_kernels.runtime.scheduling.plan import CandidatePass, expected_gain, flop_per_token, loading_seconds, plan_passes

TEN = [str(number) for number in range(10)]
EVEN = {row_id: [0.5, 0.5] for row_id in TEN}
LENGTHS = dict.fromkeys(TEN, 100)


def option(package=0, order="swapped", change=0.1, load_seconds=0.0, unscored=TEN):
    """A pass at 0.01 seconds a token: a row of LENGTHS takes one second."""
    return CandidatePass(package, order, change, 0.01, load_seconds, unscored)


def test_gain_is_that_of_the_knowledge_gradient():
    assert expected_gain([0.5, 0.5], 0.1, "accuracy") == pytest.approx(2 * 0.1 * 0.3989423)
    assert expected_gain([0.6, 0.4], 0.1, "accuracy") == pytest.approx(2 * (0.1 * 0.2419707 - 0.1 * 0.1586553))
    assert expected_gain([0.99, 0.01], 0.1, "accuracy") < 1e-6
    assert expected_gain([0.2, 0.5, 0.3], 0.1, "accuracy") == pytest.approx(expected_gain([0.6, 0.4], 0.1, "accuracy"))
    assert expected_gain([0.6, 0.4], 0.1, "log_loss") == pytest.approx(0.01 * (1 - 0.52))
    assert expected_gain([0.6, 0.4], 0.1, "brier_score") == pytest.approx(0.01 * (0.36 * 0.32 + 0.16 * 0.72))
    assert expected_gain(None, 0.1, "log_loss") == 1


@pytest.mark.parametrize(
    "seconds, rows",
    [
        (1.5, ["unknown"]),
        (2.5, ["unknown", "even"]),
        (3.5, ["unknown", "even", "leaning"]),
        (8.5, ["unknown", "even", "leaning", "even but long"]),
        (9.5, ["unknown", "even", "leaning", "even but long", "sure"]),
    ],
)
def test_the_seconds_go_to_unscored_rows_then_to_the_least_certain_and_of_those_to_the_short_ones(seconds, rows):
    probabilities = {"even": [0.5, 0.5], "even but long": [0.5, 0.5], "leaning": [0.55, 0.45], "sure": [0.95, 0.05]}
    tokens = {"even": 100, "even but long": 500, "leaning": 100, "sure": 100, "unknown but long": 1000, "unknown": 100}
    [share] = plan_passes([option(unscored=list(tokens))], probabilities, tokens, seconds, "accuracy")
    assert share.row_ids == rows
    assert share.seconds == pytest.approx(int(seconds))


CHEAP_AND_FURTHER = [option(change=0.02), option(1, "as_given", load_seconds=5)]
CHEAP_AND_AGAIN = [option(1, change=0.02), option(0, change=0.02, load_seconds=40)]
BOTH_ORDERS = [option(1, order, load_seconds=5) for order in ("as_given", "swapped")]


@pytest.mark.parametrize(
    "options, seconds, counts",
    [
        *((CHEAP_AND_FURTHER, *case) for case in ((5.5, [5, 0]), (9, [0, 4]), (16, [1, 10]), (30, [10, 10]))),
        *((CHEAP_AND_AGAIN, *case) for case in ((5, [5, 0]), (41, [10, 0]))),
        (BOTH_ORDERS, 25.5, [10, 10]),
    ],
)
def test_a_model_is_loaded_once_and_where_it_is_worth_its_loading(options, seconds, counts):
    shares = plan_passes(options, EVEN, LENGTHS, seconds, "accuracy")
    assert [len(share.row_ids) for share in shares] == counts


def test_a_token_costs_two_operations_a_multiplied_parameter_and_loading_goes_by_bytes_and_copies(package_folder):
    package = read_package(package_folder)
    layer = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128
    assert flop_per_token(package) == 2 * (2 * layer + 2 * 64)
    assert loading_seconds(package, 2) == pytest.approx(2 * 4 * (2 * layer + 2 * 64 + 1024 * 64 + 9 * 64) / 3e8)
