"""One kernel on Kaggle: saved, which starts its visible run, read back and compared field by field; a version's run.

Kaggle's documentation names dataset sources without a version. A push tries `owner/slug/VERSION`; where Kaggle refuses that,
it says so, and the next push names the dataset alone, whose newest version is the one that was just compared.
"""

import hashlib
import itertools
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import requests
from kagglesdk.kernels.types.kernels_api_service import (
    ApiGetKernelRequest,
    ApiGetKernelSessionStatusRequest,
    ApiListKernelSessionOutputRequest,
    ApiSaveKernelRequest,
    ApiSaveKernelResponse,
)

from kaggle_kernels.publish.client import TIMEOUT, Kaggle, Refused, as_unanswered, ask, list_all
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object

METADATA = "kernel-metadata.json"
CODE = "kernel.py"

FINAL_STATUSES = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")

# How often Kaggle is asked for what it has just taken: it may show that late.
FEW_LOOKS = 4

# Keys of kernel-metadata.json that kagglesdk has under the same name, and kinds of what a kernel reads.
SETTINGS = ("language", "kernel_type", "is_private", "enable_gpu", "enable_tpu", "enable_internet")
SOURCES = ("dataset", "competition", "kernel", "model")

# Each key of kernel-metadata.json that Kaggle shows again, and the field of kagglesdk's ApiKernelMetadata.
SHOWN_FIELDS = {key: key for key in ("title", *SETTINGS, "machine_shape", "docker_image")}
SHOWN_FIELDS["id"] = "ref"
SHOWN_FIELDS.update({f"{kind}_sources": f"{kind}_data_sources" for kind in SOURCES})


class PinsRefused(Refused):
    """Kaggle does not take the versions of the datasets."""


@dataclass(frozen=True)
class Kernel:
    """A kernel as it was built, or as Kaggle shows it."""

    code: str
    # By the keys of kernel-metadata.json, with the owner and the datasets' versions filled in.
    metadata: Mapping
    version: int = 0  # its newest version on Kaggle; 0 where that is not known

    @property
    def ref(self) -> str:
        """owner/slug."""
        return self.metadata["id"]

    def fingerprint(self) -> dict:
        """What is written down of a pushed kernel, to compare it with the next."""
        # Kaggle may change the last line end.
        code_sha256 = hashlib.sha256(self.code.rstrip().encode()).hexdigest()
        # The image is a choice of the push: another one is no reason to push again.
        metadata = {key: self.metadata[key] for key in self.metadata if "docker_image" not in key}
        return {"code": code_sha256, "metadata": metadata}


@dataclass(frozen=True)
class RunStatus:
    """The status of a version's run, e.g. QUEUED, RUNNING, COMPLETE; and Kaggle's message where it failed."""

    word: str
    failure: str

    @property
    def is_over(self) -> bool:
        """Whether it will not change any more."""
        return self.word in FINAL_STATUSES


def read_kernel(folder: Path, owner: str, versions: Mapping[str, int]) -> Kernel:
    """Read a built kernel from its folder, and fill in what only the push knows.

    Args:
        folder: The folder with kernel.py and kernel-metadata.json, which has a placeholder for the owner.
        owner: The user's name on Kaggle.
        versions: The versions of the datasets that the kernel is to read, by owner/slug. A dataset that is
            not among them is named without a version.
    """
    metadata = read_object(folder / METADATA)
    sources = []
    for source in metadata["dataset_sources"]:
        ref = f"{owner}/{source.split('/')[1]}"
        sources.append(f"{ref}/{versions[ref]}" if ref in versions else ref)

    slug = metadata["id"].split("/")[1]
    metadata = {**metadata, "id": f"{owner}/{slug}", "dataset_sources": sources}
    return Kernel((folder / CODE).read_text(encoding="utf-8"), metadata)


def pull_kernel(kaggle: Kaggle, ref: str, version: int | None = None) -> Kernel | None:
    """Read a kernel (owner/slug) from Kaggle, by default its newest version; None if absent."""
    request = name_version(ApiGetKernelRequest(), ref, version)
    try:
        answer = ask(kaggle.pace, kaggle.kernels.get_kernel, request)
    except Refused as error:
        if error.is_absent:
            return None
        raise

    metadata = {key: getattr(answer.metadata, field) for key, field in SHOWN_FIELDS.items()}
    return Kernel(answer.blob.source, metadata, answer.metadata.current_version_number)


def name_version(request, ref: str, version: int | None):
    """Fill in which kernel a request is about, and which version unless the newest is meant."""
    request.user_name, request.kernel_slug = ref.split("/")
    if version is not None:
        request.version_label = f"v{version}"
    return request


def find_differences(meant: Kernel, shown: Kernel) -> list[str]:
    """Compare the kernel that was built with what Kaggle shows of it; a line for each difference."""
    differences = []
    if shown.code.rstrip() != meant.code.rstrip():
        differences.append("the code is another one")

    for key in sorted(meant.metadata.keys() & SHOWN_FIELDS.keys()):
        expected = normalise(key, meant.metadata[key])
        actual = normalise(key, shown.metadata.get(key))
        if key == "dataset_sources":
            expected = drop_hidden_versions(expected, actual)

        if actual != expected and not may_be_hidden(key, expected, actual):
            differences.append(f"{key} is {json.dumps(actual)} in place of {json.dumps(expected)}")
    return differences


def normalise(key: str, value: object) -> object:
    """Normalise a value of the metadata: a list's order and an owner's capitals mean nothing."""
    if key.endswith("_sources"):
        return sorted(source.lower() for source in value or [])
    if key == "id":
        return str(value).lower()
    return value


def drop_hidden_versions(expected: list[str], actual: list[str]) -> list[str]:
    """Drop the version from those expected sources that Kaggle shows as owner/slug alone."""
    comparable_sources = []
    for source in expected:
        owner, slug, *_version = source.split("/")
        bare_ref = f"{owner}/{slug}"
        comparable_sources.append(bare_ref if bare_ref in actual else source)
    return sorted(comparable_sources)


def may_be_hidden(key: str, expected: object, actual: object) -> bool:
    """Tell whether a value of the metadata may be absent because Kaggle does not show it, which is no difference."""
    if actual:
        return False

    # Kaggle may leave out what is false or empty, and knows no machine before the first run.
    return not expected or key == "machine_shape"


def save_kernel(kaggle: Kaggle, kernel: Kernel) -> int:
    """Save a kernel on Kaggle, which starts its visible run. The call is never repeated.

    Returns:
        The number of the kernel's new version.

    Raises:
        PinsRefused: Kaggle leaves datasets out that are named with a version.
        Refused: It refuses anything else.
        Unanswered: It is unknown whether Kaggle has taken the kernel.
    """
    metadata = kernel.metadata
    request = ApiSaveKernelRequest()
    request.slug = metadata["id"]
    request.new_title = metadata["title"]
    request.text = kernel.code

    # All are set, since kagglesdk would allow the internet by default.
    for key in SETTINGS:
        setattr(request, key, metadata[key])
    for kind in SOURCES:
        setattr(request, f"{kind}_data_sources", metadata[f"{kind}_sources"])

    # These stay unset where there is no value, since kagglesdk takes no None.
    for key in ("machine_shape", "docker_image", "docker_image_pinning_type"):
        if metadata.get(key):
            setattr(request, key, metadata[key])

    answer = kaggle.kernels.save_kernel(request)
    check_accepted(answer)
    return answer.version_number


def check_accepted(answer: ApiSaveKernelResponse) -> None:
    """Check that Kaggle took the whole kernel, for it saves and runs one without what it refuses.

    Raises:
        PinsRefused: It took all but datasets that are named with a version.
        Refused: It refused anything else.
    """
    problems = []
    if answer.error:
        problems.append(answer.error)
    for kind in SOURCES:
        refused_sources = getattr(answer, f"invalid_{kind}_sources")
        if refused_sources:
            problems.append(f"{kind} sources {', '.join(refused_sources)}: not accepted")
    if not problems:
        return

    # Where only datasets named owner/slug/VERSION were refused, a push without versions may do.
    refused_datasets = answer.invalid_dataset_sources or []
    has_versions = any(source.count("/") == 2 for source in refused_datasets)
    is_only_problem = len(problems) == 1
    if has_versions and is_only_problem:
        raise PinsRefused(
            f"{problems[0]}: version {answer.version_number} runs without them, and ends in an "
            "error; run push again, which names datasets without their versions",
            status=200,
        )
    raise Refused(f"{'; '.join(problems)}; mend that, then run push again", status=200)


def check_pushed(kaggle: Kaggle, kernel: Kernel) -> Kernel:
    """Read a kernel back after its push, until Kaggle shows it as it was built."""
    problems = ["Kaggle does not show it"]
    for _ in itertools.islice(kaggle.pace.looks(), FEW_LOOKS):
        shown = pull_kernel(kaggle, kernel.ref)
        if shown is None:
            continue

        problems = find_differences(kernel, shown)
        if not problems:
            return shown

    raise UserError(
        f"{kernel.ref}: was pushed, and is not what was meant: {'; '.join(problems)}; run push again"
    )


def read_status(kaggle: Kaggle, ref: str, version: int) -> RunStatus:
    """Read the status of a version's run."""
    request = name_version(ApiGetKernelSessionStatusRequest(), ref, version)
    answer = ask(kaggle.pace, kaggle.kernels.get_kernel_session_status, request)
    return RunStatus(answer.status.name, answer.failure_message)


def read_log(kaggle: Kaggle, ref: str, version: int) -> list[str]:
    """Read the lines of a version's log that Kaggle shows so far, without blank ones."""
    request = name_version(ApiListKernelSessionOutputRequest(), ref, version)
    answer = ask(kaggle.pace, kaggle.kernels.list_kernel_session_output, request)
    log = answer.log or ""

    # Kaggle gives the log as text, or as a JSON list of pieces of it.
    try:
        pieces = [piece["data"].removesuffix("\n") for piece in json.loads(log)]
        log = "\n".join(pieces)
    except (ValueError, TypeError, KeyError):
        pass
    return [line for line in log.splitlines() if line.strip()]


def download_output(
    kaggle: Kaggle, ref: str, version: int, names: tuple[str, ...], out: Path
) -> None:
    """Download the output files `names` of a kernel's version into the folder `out`, and no others."""
    # Files of an earlier version must not pass for this one's.
    shutil.rmtree(out, ignore_errors=True)
    request = name_version(ApiListKernelSessionOutputRequest(), ref, version)
    files = list_all(kaggle.pace, kaggle.kernels.list_kernel_session_output, request, "files")
    for file in files:
        if file.file_name in names:
            content = ask(kaggle.pace, download, file.url)
            with atomic_file(out / file.file_name) as temporary:
                temporary.write_bytes(content)


def download(url: str) -> bytes:
    """Download a small file from a signed address, to which no credentials are sent."""
    try:
        response = requests.get(url, timeout=TIMEOUT)
        response.raise_for_status()
    except requests.RequestException as error:
        raise as_unanswered("download", error) from None
    return response.content
