"""What Kaggle still grants this account: GPU hours of the week, and room for private datasets, as far as it tells.

The command line tells the hours exactly. Of datasets it tells the sizes, public ones among them, and neither which are private
nor what old versions take: what comes to more than the limit is a warning, and Kaggle's own refusal the last word.
"""

import re
from collections.abc import Mapping

from kaggle_kernels.publish.client import Answer, Pace, ask, pages
from kaggle_kernels.publish.preflight import DATASET_BYTES, Preflight
from preprocess.core.errors import UserError

PAGE = 200  # datasets a page
FEW_HOURS = 1.0


def check_quota(found: Preflight, sizes: Mapping[str, int], pace: Pace) -> None:
    """Ask Kaggle, and add to `found`; `sizes` are the bytes of the datasets that are to be pushed, by owner/slug."""
    for what, check in (("GPU hours", gpu_hours), ("room for datasets", lambda found, pace: storage(found, sizes, pace))):
        try:
            found.checks.append(f"{what}: {check(found, pace)}")
        except UserError as error:
            found.warnings.append(f"{what}: not known ({error})")


def gpu_hours(found: Preflight, pace: Pace) -> str:
    """How many hours of GPUs are left this week, in words; a warning where they will not do."""
    for row in rows_of(ask(pace, "quota", "--format", "json")):
        hours = re.match(r"[\d.]+", str(row.get("remaining")))
        if row.get("resource") == "GPU" and hours:
            left, until = float(hours[0]), str(row.get("refreshAt"))[:16].replace("T", " ")
            told = f"{left:g} of {str(row.get('total')).removesuffix('h')} left until {until} UTC"
            if left == 0:
                found.warnings.append(f"GPU hours: {told}: Kaggle will take the datasets, and refuse the kernel until then")
            elif left < FEW_HOURS:
                found.warnings.append(f"GPU hours: {told}; a kernel that reaches the end is stopped")
            return told
    raise UserError("the kaggle command told none")


def storage(found: Preflight, sizes: Mapping[str, int], pace: Pace) -> str:
    """What the account's datasets take now and will take, in words; a warning where that is more than Kaggle grants."""
    held = held_bytes(pace)
    others = sum(size for ref, size in held.items() if ref not in sizes)
    together = others + sum(sizes.values())
    told = f"{sum(held.values()) / 1e9:.1f} GB in {len(held)} datasets now, {together / 1e9:.1f} GB after this push"
    if together > DATASET_BYTES:
        found.warnings.append(
            f"datasets: {told}; Kaggle holds {DATASET_BYTES / 1e9:.0f} GB of private ones: remove some there if it refuses"
        )
    return told


def held_bytes(pace: Pace) -> dict[str, int]:
    """The bytes of each dataset of the account, by owner/slug."""
    answers = pages(pace, "datasets", "list", "--mine", "--page-size", str(PAGE))
    return {str(row.get("ref")): int(row.get("size") or 0) for answer in answers for row in rows_of(answer)}


def rows_of(answer: Answer) -> list[Mapping]:
    """The rows that a call printed; none where there is nothing to list, a UserError where it failed."""
    values = answer.values()
    if isinstance(values, list):
        return [row for row in values if isinstance(row, Mapping)]
    if answer.code or not re.search(r"^No \w+ found", answer.text, re.MULTILINE):
        raise UserError(f"{answer.call}: {answer.reason}")
    return []
