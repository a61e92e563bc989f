"""What the stand-in Kaggle answers: one function a call, of the site and the request's JSON; it gives the answer's JSON.

Names of calls and fields are those of kagglesdk, which ignores what it does not know: `check_fields` holds every answer against
kagglesdk's own response type, so that the two cannot drift apart.
"""

from collections.abc import Callable

import kagglesdk.blobs.types.blob_api_service as blobs
import kagglesdk.competitions.types.competition_api_service as competitions
import kagglesdk.datasets.types.dataset_api_service as datasets
import kagglesdk.kernels.types.kernels_api_service as kernels
import kagglesdk.security.types.oauth_service as oauth
from slugify import slugify

from tests.fakes.kaggle.site import OWNER, TOKEN, Blob, Dataset, Kernel, KernelVersion, Run, Site, Submission, Version


class Refusal(Exception):
    """An HTTP error with a message, as Kaggle words it where that is known."""

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status, self.message = status, message


def introspect_token(site: Site, fields: dict) -> dict:
    return {"active": True, "username": OWNER, "userId": 1} if fields["token"] == TOKEN else {"active": False}


def start_blob_upload(site: Site, fields: dict) -> dict:
    blob = Blob(f"blob-{next(site.numbers)}", fields["name"], fields.get("contentLength", 0))
    site.blobs[blob.token] = blob
    return {"token": blob.token, "createUrl": f"http://localhost/uploads/{blob.token}"}


def create_dataset(site: Site, fields: dict) -> dict:
    ref = f"{fields['ownerSlug']}/{fields['slug']}"
    if ref in site.datasets:
        return {"status": "error", "error": f'The requested title "{fields["title"]}" is already in use by a dataset.'}
    files = received_files(site, fields)
    site.datasets[ref] = Dataset(ref, fields["licenseName"], fields.get("isPrivate", False))
    return add_version(site, site.datasets[ref], files)


def create_dataset_version(site: Site, fields: dict) -> dict:
    dataset = find_dataset(site, fields)
    if dataset.versions[-1].status == "BLOBS_RECEIVED":
        raise Refusal(403, "Permission 'datasets.update' was denied")
    return add_version(site, dataset, received_files(site, fields["body"]))


def received_files(site: Site, fields: dict) -> dict[str, bytes]:
    blobs = [site.blobs.get(file.get("token", "")) for file in fields.get("files", [])]
    if None in blobs or not all(blob.complete for blob in blobs):
        raise Refusal(400, "A file's token is unknown, or its upload was not completed")
    return {blob.name: bytes(blob.content) for blob in blobs}


def add_version(site: Site, dataset: Dataset, files: dict[str, bytes]) -> dict:
    number = len(dataset.versions) + 1
    dataset.versions.append(Version(number, files, site.processing_calls, site.processing_ends))
    return {"ref": dataset.ref, "status": "ok"}


def find_dataset(site: Site, fields: dict) -> Dataset:
    ref = f"{fields.get('ownerSlug', '')}/{fields.get('datasetSlug', '')}"
    if ref not in site.datasets:
        raise Refusal(404, f"Dataset {ref} was not found")
    return site.datasets[ref]


def get_dataset_status(site: Site, fields: dict) -> dict:
    version = find_dataset(site, fields).versions[-1]
    status = version.status
    version.calls_left -= 1
    return {"status": status}


def get_dataset(site: Site, fields: dict) -> dict:
    dataset = find_dataset(site, fields)
    shown = {"ref": dataset.ref, "isPrivate": dataset.is_private}
    if dataset.current:
        shown["currentVersionNumber"] = dataset.current.number
    return shown


def list_dataset_files(site: Site, fields: dict) -> dict:
    version = find_dataset(site, fields).find(fields.get("datasetVersionNumber"))
    files = version.files.items() if version else ()
    return {"datasetFiles": [{"name": name, "totalBytes": len(content)} for name, content in files]}


def download_dataset(site: Site, fields: dict) -> dict:
    version = find_dataset(site, fields).find(fields.get("datasetVersionNumber"))
    if version is None or fields.get("fileName", "") not in version.files:
        raise Refusal(404, "The file was not found")
    path = f"{fields['ownerSlug']}/{fields['datasetSlug']}/{version.number}/{fields['fileName']}"
    return {"redirect": f"http://localhost/files/datasets/{path}"}


def save_kernel(site: Site, fields: dict) -> dict:
    ref = fields["slug"]
    if ref not in site.kernels and fields.get("newTitle"):
        ref = f"{ref.split('/')[0]}/{slugify(fields['newTitle'])}"  # a new kernel lands where its title says
    kernel = site.kernels.setdefault(ref, Kernel(ref))
    invalid = invalid_sources(site, fields)
    pushed = {**fields, **{key: [s for s in fields.get(key, []) if s not in invalid[key]] for key in invalid}}
    kernel.versions.append(KernelVersion(len(kernel.versions) + 1, pushed, site.runs.pop(0) if site.runs else Run()))
    invalid_fields = {SOURCES[key]: sources for key, sources in invalid.items() if sources}
    return {"ref": f"/code/{ref}", "versionNumber": len(kernel.versions), **invalid_fields}


SOURCES = {"datasetDataSources": "invalidDatasetSources", "competitionDataSources": "invalidCompetitionSources"}


def invalid_sources(site: Site, fields: dict) -> dict[str, list[str]]:
    """What a kernel names and the site has not, by the request's field; a dataset without a ready version is such."""
    absent = [source for source in fields.get("datasetDataSources", []) if not has_ready_version(site, source)]
    unknown = [source for source in fields.get("competitionDataSources", []) if source not in site.competitions]
    return {"datasetDataSources": absent, "competitionDataSources": unknown}


def has_ready_version(site: Site, source: str) -> bool:
    """Whether the site has the dataset owner/slug or owner/slug/version, processed."""
    owner, slug, *number = source.split("/")
    if number and not site.takes_pins:
        return False
    dataset = site.datasets.get(f"{owner}/{slug}")
    version = dataset and dataset.find(int(number[0]) if number else None)
    return bool(version) and version.status == "READY"


def find_kernel(site: Site, fields: dict) -> KernelVersion:
    """The version of a versionLabel ("v3"), or the newest."""
    kernel = site.kernels.get(f"{fields.get('userName', '')}/{fields.get('kernelSlug', '')}")
    number = int(fields.get("versionLabel", "v0").removeprefix("v"))
    if kernel is None or number > len(kernel.versions):
        raise Refusal(403, "Permission 'kernels.get' was denied")
    return kernel.versions[number - 1]


def get_kernel(site: Site, fields: dict) -> dict:
    pushed = find_kernel(site, fields).pushed
    ref = f"{fields['userName']}/{fields['kernelSlug']}"
    metadata = {
        "ref": ref,
        "title": pushed.get("newTitle", ""),
        "currentVersionNumber": site.kernels[ref].versions[-1].number,
        "dockerImage": site.docker_image,
    }
    kept = ("language", "kernelType", "isPrivate", "enableGpu", "enableTpu", "enableInternet", "machineShape", *SOURCES)
    metadata |= {key: pushed[key] for key in kept if key in pushed}
    return {"metadata": metadata, "blob": {"source": pushed["text"]}}


def get_kernel_session_status(site: Site, fields: dict) -> dict:
    run = find_kernel(site, fields).run
    status = run.statuses[0]
    run.statuses = run.statuses[1:] or run.statuses
    return {"status": status, "failureMessage": run.failure if status == "ERROR" else ""}


def list_kernel_session_output(site: Site, fields: dict) -> dict:
    version = find_kernel(site, fields)
    if not version.run.over:
        return {"files": [], "log": version.run.log[0]}
    where = f"http://localhost/files/kernels/{fields['userName']}/{fields['kernelSlug']}/{version.number}"
    files = [{"url": f"{where}/{name}", "fileName": name} for name in version.run.output]
    return {"files": files, "log": "".join(version.run.log)}


def create_code_submission(site: Site, fields: dict) -> dict:
    competition, file_name = fields["competitionName"], fields["fileName"]
    label = f"v{fields['kernelVersion']}"
    kernel = {"userName": fields["kernelOwner"], "kernelSlug": fields["kernelSlug"], "versionLabel": label}
    version = find_kernel(site, kernel)
    if version.run.statuses[0] != "COMPLETE" or file_name not in version.run.output:
        raise Refusal(400, f"The kernel version has no output file {file_name}")
    if len(site.submissions) >= site.submissions_a_day:
        raise Refusal(400, f"Your team has used its daily Submission allowance ({site.submissions_a_day}) today")
    kernel, scores = f"{fields['kernelOwner']}/{fields['kernelSlug']}", site.scores.pop(0) if site.scores else ("0.7", "0.69")
    described = (kernel, version.number, file_name, fields.get("submissionDescription", ""))
    ref = 1001 + len(site.submissions)
    site.submissions.append(Submission(ref, competition, *described, *scores))
    return {"message": f"Successfully submitted to {competition}", "ref": ref}


def list_submissions(site: Site, fields: dict) -> dict:
    listed = [submission for submission in reversed(site.submissions) if submission.competition == fields["competitionName"]]
    return {"submissions": [shown(submission) for submission in listed]}


def shown(submission: Submission) -> dict:
    shown_fields = {"ref": submission.ref, "fileName": submission.file_name, "description": submission.description}
    shown_fields |= {"date": f"{submission.day}T00:{submission.ref - 1000:02d}:00.000Z", "status": submission.status}
    if submission.status == "COMPLETE":
        shown_fields |= {"publicScore": submission.public_score, "privateScore": submission.private_score}
    return shown_fields


def delete_dataset(site: Site, fields: dict) -> dict:
    del site.datasets[find_dataset(site, fields).ref]
    return {}


def delete_kernel(site: Site, fields: dict) -> dict:
    find_kernel(site, fields)
    del site.kernels[f"{fields['userName']}/{fields['kernelSlug']}"]
    return {}


# Of each call: what answers it, and kagglesdk's type of the answer; None for a redirect.
CALLS: dict[str, tuple[Callable[[Site, dict], dict], type | None]] = {
    "security.OAuthService/IntrospectToken": (introspect_token, oauth.IntrospectTokenResponse),
    "blobs.BlobApiService/StartBlobUpload": (start_blob_upload, blobs.ApiStartBlobUploadResponse),
    "datasets.DatasetApiService/CreateDataset": (create_dataset, datasets.ApiCreateDatasetResponse),
    "datasets.DatasetApiService/CreateDatasetVersion": (create_dataset_version, datasets.ApiCreateDatasetResponse),
    "datasets.DatasetApiService/GetDatasetStatus": (get_dataset_status, datasets.ApiGetDatasetStatusResponse),
    "datasets.DatasetApiService/GetDataset": (get_dataset, datasets.ApiDataset),
    "datasets.DatasetApiService/ListDatasetFiles": (list_dataset_files, datasets.ApiListDatasetFilesResponse),
    "datasets.DatasetApiService/DownloadDataset": (download_dataset, None),
    "datasets.DatasetApiService/DeleteDataset": (delete_dataset, datasets.ApiDeleteDatasetResponse),
    "kernels.KernelsApiService/SaveKernel": (save_kernel, kernels.ApiSaveKernelResponse),
    "kernels.KernelsApiService/GetKernel": (get_kernel, kernels.ApiGetKernelResponse),
    "kernels.KernelsApiService/DeleteKernel": (delete_kernel, kernels.ApiDeleteKernelResponse),
    "kernels.KernelsApiService/GetKernelSessionStatus": (get_kernel_session_status, kernels.ApiGetKernelSessionStatusResponse),
    "kernels.KernelsApiService/ListKernelSessionOutput": (
        list_kernel_session_output,
        kernels.ApiListKernelSessionOutputResponse,
    ),
    "competitions.CompetitionApiService/CreateCodeSubmission": (
        create_code_submission,
        competitions.ApiCreateCodeSubmissionResponse,
    ),
    "competitions.CompetitionApiService/ListSubmissions": (list_submissions, competitions.ApiListSubmissionsResponse),
}


def check_fields(answer: dict, response_type: type) -> None:
    """Refuse where an answer has a field that kagglesdk does not know, or a value that it cannot read."""
    fields = {field.json_name: field for field in response_type._fields}
    if unknown := answer.keys() - fields.keys():
        raise Refusal(400, f"kagglesdk's {response_type.__name__} has no {sorted(unknown)}")
    for name, value in answer.items():
        for inner in value if isinstance(value, list) else [value]:
            if isinstance(inner, dict):
                check_fields(inner, fields[name].field_type)
    response_type.from_dict(answer)
