"""The chosen model and its contract → a flat Kaggle dataset folder, with every file's SHA-256 in its manifest."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from postprocess.run_folder import Run
from preprocess.core import ledger
from preprocess.core.files import atomic_folder, link_or_copy, read_json, sha256, write_json

# Stands for the Kaggle account; `push` puts its name there.
OWNER = "INSERT_OWNER"
MANIFEST, METADATA = "manifest.json", "dataset-metadata.json"


def package(
    run: Run,
    model: Path,
    agreement: Path,
    validation_ids: Mapping,
    temperatures: Mapping | None,
    out: Path,
) -> None:
    """Write a package, the folder that becomes a Kaggle dataset, and enter it into the ledger.

    Args:
        run: The run that is packaged.
        model: The folder of the candidate that is packaged.
        agreement: agreement.json.
        validation_ids: See validation_rows.validation_ids; the kernel's visible run picks rows of them.
        temperatures: See temperature.measure_temperatures; a kernel may take one of them.
        out: The package's folder.
    """
    settings = run.recipe.pairwise.package
    report = read_json(agreement)
    with atomic_folder(out) as folder:
        for file in sorted(model.iterdir()):
            if file.is_file():
                link_or_copy(file, folder / file.name)
        for name in ("contract.json", "model_input.py"):
            shutil.copyfile(run.folder / name, folder / name)
        write_json(folder / "validation_ids.json", validation_ids)
        write_json(folder / METADATA, dataset_metadata(settings.slug, settings.licence))

        # The manifest comes last: it lists all other files.
        manifest = {"files": list_files(folder), **describe_model(run, report)}
        write_json(folder / MANIFEST, manifest | {"temperature": temperatures})

    ledger_keys = ("rows", "tolerance", "mean_difference", "packaged")
    ledger.record(
        "package",
        run=run.folder,
        dataset=settings.slug,
        package=out,
        manifest=ledger.fingerprint(out / MANIFEST),
        contract=ledger.fingerprint(out / "contract.json"),
        trained=trained_contracts(run.folder),
        quantize=settings.quantize,
        agreement={key: report[key] for key in ledger_keys},
    )


def list_files(folder: Path) -> dict[str, dict]:
    """List a folder's files for the manifest: SHA-256 and size in bytes, by name."""
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"sha256": sha256(path), "bytes": path.stat().st_size}
    return files


def describe_model(run: Run, report: Mapping) -> dict:
    """Describe the packaged model for the manifest: its format, its base, and how it was checked."""
    # A full fine-tune has no adapter.
    adapter = None
    if run.has_adapter:
        adapter = "unmerged" if report["packaged"] == "unmerged" else "merged"

    validation_keys = ("rows", "tolerance", "mean_difference", "models")
    return {
        "quantize": run.recipe.pairwise.package.quantize,
        "adapter": adapter,
        "dtype": "float16",
        "base_model": run.contract.base_model,
        "revision": run.contract.revision,
        "validation": {key: report[key] for key in validation_keys},
        "golden": report["golden"],
    }


def trained_contracts(run_folder: Path) -> dict[str, str | None]:
    """Give the SHA-256 of the contract of each run that a package is made of: the run, or a mean's members."""
    folders = [run_folder]
    metrics_file = run_folder / "metrics.json"
    if metrics_file.is_file():
        folders = read_json(metrics_file).get("members", folders)
    return {str(folder): ledger.fingerprint(Path(folder) / "contract.json") for folder in folders}


def dataset_metadata(slug: str, licence: str) -> dict:
    """Kaggle's dataset-metadata.json. The title is the slug, so that the two cannot part."""
    return {"title": slug, "id": f"{OWNER}/{slug}", "licenses": [{"name": licence}]}
