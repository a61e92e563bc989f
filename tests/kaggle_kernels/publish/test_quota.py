"""What Kaggle still grants, asked by the real kaggle command of the stand-in."""

import pytest

from kaggle_kernels.publish.client import Pace
from kaggle_kernels.publish.preflight import Preflight
from kaggle_kernels.publish.quota import check_quota
from tests.fakes.kaggle.server import Fault
from tests.fakes.kaggle.site import Dataset, Version

PACE = Pace(0.02, 5)
UNTIL = "2026-01-03 00:00 UTC"


@pytest.fixture
def site(fast_kaggle):
    """An account with a dataset of 2,000 bytes and one of 500."""
    for name, size in (("tester/large-one", 2000), ("tester/small-one", 500)):
        version = Version(1, "", {"weights.bin": b"x" * size}, 0)
        fast_kaggle.site.datasets[name] = Dataset(name, name.split("/")[1], "other", True, [version])
    return fast_kaggle.site


def quota(sizes: dict[str, int]) -> Preflight:
    found = Preflight()
    check_quota(found, sizes, PACE)
    return found


def test_hours_and_room_are_told(site):
    site.gpu_seconds_used = 6 * 3600
    found = quota({"tester/small-one": 700, "tester/new-one": 800})
    assert (found.errors, found.warnings) == ([], [])
    assert found.checks == [
        f"GPU hours: 24 of 30.00 left until {UNTIL}",
        "room for datasets: 0.0 GB in 2 datasets now, 0.0 GB after this push",
    ]


@pytest.mark.parametrize(
    "seconds_left, told",
    [
        (0, f"0 of 30.00 left until {UNTIL}: Kaggle will take the datasets, and refuse the kernel until then"),
        (1800, f"0.5 of 30.00 left until {UNTIL}; a kernel that reaches the end is stopped"),
    ],
)
def test_no_hours_and_few_are_a_warning_for_the_datasets_can_go_up_before(site, seconds_left, told):
    site.gpu_seconds_used = site.gpu_seconds_allowed - seconds_left
    found = quota({})
    assert (found.errors, found.warnings) == ([], [f"GPU hours: {told}"])


def test_a_dataset_s_new_version_takes_the_place_of_the_one_before(site, monkeypatch):
    monkeypatch.setattr("kaggle_kernels.publish.quota.DATASET_BYTES", 3000)
    assert quota({"tester/large-one": 2400}).warnings == []
    [warning] = quota({"tester/new-one": 600}).warnings
    assert "remove some there if it refuses" in warning


def test_an_account_without_datasets_has_room(fast_kaggle):
    assert "room for datasets: 0.0 GB in 0 datasets now, 0.0 GB after this push" in quota({}).checks


def test_what_kaggle_does_not_tell_is_a_warning(fast_kaggle):
    fast_kaggle.faults += [Fault("GetAcceleratorQuotaStatistics", status=403), Fault("ListDatasets", status=403)]
    found = quota({})
    assert found.errors == []
    assert [warning.split(" (")[0] for warning in found.warnings] == ["GPU hours: not known", "room for datasets: not known"]
