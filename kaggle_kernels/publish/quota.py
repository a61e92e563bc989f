"""The accelerator hours that Kaggle still grants this week: the command `quota`, and a check of `push`."""

from dataclasses import dataclass

from kagglesdk.kernels.types.kernels_api_service import ApiGetAcceleratorQuotaStatisticsRequest
from rich.box import SIMPLE_HEAD
from rich.table import Table

from kaggle_kernels.build.listing import table_console
from kaggle_kernels.publish.client import Kaggle, Pace, Refused, ask, connect
from kaggle_kernels.publish.preflight import Preflight

SECONDS_PER_HOUR = 3600
FEW_HOURS = 1.0


@dataclass(frozen=True)
class Quota:
    """The hours of one kind of accelerator, and until when they count."""

    hours_used: float
    hours_allowed: float
    until: str

    @property
    def hours_left(self) -> float:
        """What is left of the week's hours."""
        return max(self.hours_allowed - self.hours_used, 0.0)


def read_quotas(kaggle: Kaggle) -> dict[str, Quota]:
    """Read the week's hours of each kind of accelerator that Kaggle names."""
    request = ApiGetAcceleratorQuotaStatisticsRequest()
    answer = ask(kaggle.pace, kaggle.kernels.get_accelerator_quota_statistics, request)
    until = "?"
    if answer.quota_refresh_time:
        until = f"{answer.quota_refresh_time:%Y-%m-%d %H:%M} UTC"

    # Kaggle leaves out what an account has no right to.
    quotas = {}
    for name, values in (("GPU", answer.gpu_quota), ("TPU", answer.tpu_quota)):
        if values is not None and values.total_time_allowed is not None:
            used = values.time_used.total_seconds() / SECONDS_PER_HOUR if values.time_used else 0.0
            allowed = values.total_time_allowed.total_seconds() / SECONDS_PER_HOUR
            quotas[name] = Quota(used, allowed, until)
    return quotas


def print_quota(pace: Pace) -> None:
    """Print a table with the hours of each kind of accelerator."""
    table = Table(
        "accelerator", "hours used", "hours left", "until", box=SIMPLE_HEAD, pad_edge=False
    )
    for name, quota in read_quotas(connect(pace)).items():
        table.add_row(name, f"{quota.hours_used:.2f}", f"{quota.hours_left:.2f}", quota.until)
    table_console().print(table)


def check_gpu_hours(kaggle: Kaggle, report: Preflight) -> None:
    """Add to a push's checks how many GPU hours are left, with a warning where they are few or unknown."""
    try:
        quota = read_quotas(kaggle).get("GPU")
    except Refused as error:
        report.warnings.append(f"GPU hours: not known ({error})")
        return
    if quota is None:
        report.warnings.append("GPU hours: not known (Kaggle names none)")
        return

    left = f"{quota.hours_left:g} of {quota.hours_allowed:g} left until {quota.until}"
    report.checks.append(f"GPU hours: {left}")
    if quota.hours_left == 0:
        report.warnings.append(
            f"GPU hours: {left}: Kaggle will take the datasets, and refuse the kernel until then"
        )
    elif quota.hours_left < FEW_HOURS:
        report.warnings.append(f"GPU hours: {left}; a kernel that reaches the end is stopped")
