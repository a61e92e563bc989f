"""From a run to its package: the stages, what each is made from, and their order.

    untrained or average (where a recipe needs one)  →  merge, quantise, unmerged  →  scores  →  agreement  →  package

`python -m postprocess` calls `package_recipe` or `package_mean`. Each `make_…` function below is one
stage: it names the stage's inputs, returns where they have not changed, and else makes its outputs.

What needs torch is imported inside the functions, once there is something to do: that takes seconds,
which --help and a run that is up to date need not wait for.
"""

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import click
from filelock import FileLock, Timeout

from postprocess import stage_code
from postprocess.memory.t4_fit import check_target
from postprocess.package import package
from postprocess.run_folder import (
    ADAPTER,
    Run,
    find_base,
    hub_commit,
    read_contract,
    read_run,
    refuse_weights,
    weight_files,
)
from postprocess.staleness import Stage, is_current, making, skip_if_current
from preprocess.core.errors import UserError
from preprocess.core.files import read_json, remove_leftovers
from recipes.pairwise.config.schema import GPTQ_BITS, Recipe
from recipes.pairwise.contract import TOKENIZER_FILES

RUN_FILES = (
    "contract.json",
    "model_input.py",
    "metrics.json",
    "predictions.parquet",
    *TOKENIZER_FILES,
)
MOST_REPEATS = 20
MODEL_FOLDERS = ("merged", "quantised", "quantised-*", "unmerged", ".*.partial")


@dataclass(frozen=True)
class Options:
    """Options of the command line.

    Attributes:
        keep_merged: Write the merged model in 16 bits to the run folder too.
        repeat: How many times to quantise, each time calibrated on other rows; the best is packaged.
    """

    keep_merged: bool = False
    repeat: int = 1


@dataclass
class Preparation:
    """What comes once, before the first of a run's stages that has something to do."""

    run: Run
    is_done: bool = False

    def ensure(self) -> None:
        """Import torch, check that the run can be packaged on this machine, remove the old package.

        Raises:
            UserError: The models do not fit this machine or a T4, or GPTQ cannot quantise the model.
        """
        if self.is_done:
            return

        import_torch()
        from postprocess.gptq.quantize import check_model  # noqa: PLC0415  needs torch
        from postprocess.memory.comparison_fit import check_comparison  # noqa: PLC0415  needs torch

        check_comparison(self.run)
        if self.run.recipe.pairwise.package.quantize in GPTQ_BITS:
            check_model(self.run)
        check_target(self.run)

        # What the package was made from has changed. If a stage fails, no old package may be left.
        shutil.rmtree(package_folder(self.run), ignore_errors=True)
        self.is_done = True


def package_recipe(recipe: Recipe, options: Options = Options()) -> Path:
    """Bring the package of a recipe's run up to date.

    Args:
        recipe: Its run was trained before; with `train: false`, the run folder is made here.
        options: Options of the command line.

    Returns:
        The package's folder.

    Raises:
        UserError: The run cannot be packaged, or the models do not agree; no package is left then.
    """
    with locked(recipe.run_folder):
        if not recipe.pairwise.train:
            make_untrained_run(recipe)
        return make_all_stages(read_run(recipe), options)


def package_mean(
    recipe: Recipe,
    shares: Mapping[Path, float],
    rank: int | None,
    options: Options = Options(),
) -> Path:
    """Bring the package of the mean of several runs up to date, in the folder `mean` of the run folder.

    Args:
        recipe: The recipe of the runs.
        shares: Each run's share in the mean, by its folder; the shares sum to 1.
        rank: The rank that the mean adapter is cut to; None keeps it exact.
        options: Options of the command line.

    Returns:
        The package's folder.

    Raises:
        UserError: The runs cannot be averaged or packaged, or the models do not agree.
    """
    mean_recipe = replace(recipe, run_folder=recipe.run_folder / "mean")
    with locked(mean_recipe.run_folder):
        make_average(mean_recipe, shares, rank)
        return make_all_stages(read_run(mean_recipe), options)


@contextlib.contextmanager
def locked(run_folder: Path) -> Iterator[None]:
    """Keep other processes out of a run folder, and remove what a killed one left half-written."""
    lock = FileLock(run_folder.with_name(f".{run_folder.name}.lock"), timeout=0)
    run_folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{run_folder}: another python -m postprocess is at work there; wait for it, or stop it"
        ) from None

    try:
        # With the lock held, no living process can be writing these temporary files.
        remove_leftovers(run_folder)
        yield
    finally:
        lock.release()


def import_torch() -> None:
    """Import torch and the libraries on top of it, silenced; print the seconds of the first import."""
    is_first_import = "peft" not in sys.modules
    started = time.perf_counter()

    import peft  # noqa: F401, PLC0415  brings torch
    import transformers  # noqa: PLC0415

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if is_first_import:
        seconds = time.perf_counter() - started
        click.echo(f"{'start-up':<10} {seconds:7.1f} s   torch, transformers, peft")


def make_all_stages(run: Run, options: Options) -> Path:
    """Bring every stage of a run up to date, and return the package's folder."""
    preparation = Preparation(run)
    candidates = make_candidates(run, options, preparation)
    report = make_agreement(run, candidates, preparation)

    best_candidate = read_json(report)["packaged"]
    make_package(run, candidates[best_candidate], report)

    remove_outdated_models(run, candidates)
    return package_folder(run)


def make_candidates(run: Run, options: Options, preparation: Preparation) -> dict[str, Path | None]:
    """Bring the models that could be packaged up to date.

    Returns:
        The models' folders, by the name that agreement.json gives them. Where the package is made of
        the merged model, `merged` is among them, to be compared; None if it is not kept on the disk.
    """
    settings = run.recipe.pairwise.package
    quantize = settings.quantize
    if options.repeat > 1 and quantize not in GPTQ_BITS:
        raise UserError(
            f"--repeat: quantize: {quantize} always gives the same bytes; "
            f"only {' and '.join(GPTQ_BITS)} depend on chance"
        )

    candidates: dict[str, Path | None] = {}

    # `adapter: best` is both of these; agreement.json says which is packaged.
    if settings.adapter != "unmerged":
        candidates["merged"] = None
        if quantize == "none" or options.keep_merged:
            candidates["merged"] = make_merged(run, preparation)

        # Whatever is packaged is called `quantised`, also where nothing is quantised.
        if quantize == "none":
            candidates["quantised"] = candidates["merged"]
        elif quantize in GPTQ_BITS:
            candidates |= make_gptq_models(run, options, preparation)
        else:
            candidates["quantised"] = make_quantised(run, preparation)

    if settings.adapter != "merged":
        candidates["unmerged"] = make_unmerged(run, preparation)

    return candidates


def make_untrained_run(recipe: Recipe) -> None:
    """Bring the run folder of a recipe with `train: false` up to date, from the base model alone."""
    refuse_weights(recipe)
    base_model = recipe.axolotl["base_model"]
    base = find_base(base_model, recipe.axolotl.get("model_revision"), str(recipe.path))

    # How the run is packaged does not change the run.
    settings = recipe.pairwise.model_dump(mode="json", exclude={"package"})
    for key in ("base_model", "special_tokens", "attn_implementation"):
        settings[key] = recipe.axolotl.get(key)

    stage = Stage(
        recipe.run_folder,
        "untrained",
        inputs=[
            *weight_files(base),
            *files_named(TOKENIZER_FILES, base),
            Path(recipe.pairwise.pairs),
        ],
        settings=settings,
        outputs=files_named(RUN_FILES, recipe.run_folder),
        code=stage_code.ZERO_SHOT,
    )
    if skip_if_current(stage):
        return

    import_torch()
    from postprocess.memory.comparison_fit import check_base_model  # noqa: PLC0415  needs torch
    from postprocess.zero_shot.base_model_run import make_base_model_run  # noqa: PLC0415  needs torch

    check_base_model(base)
    with making(stage):
        make_base_model_run(recipe, base, hub_commit(base))


def make_average(recipe: Recipe, shares: Mapping[Path, float], rank: int | None) -> None:
    """Bring the run folder of a mean up to date, from the adapters of its member runs."""
    member_files = []
    for member in shares:
        member_files += files_named([*RUN_FILES, *ADAPTER, "config.json"], member)

    shares_by_name = {str(member): share for member, share in shares.items()}
    stage = Stage(
        recipe.run_folder,
        "average",
        inputs=[*member_files, Path(recipe.pairwise.pairs)],
        settings={"shares": shares_by_name, "rank": rank},
        outputs=files_named([*RUN_FILES, *ADAPTER], recipe.run_folder),
        code=stage_code.AVERAGE,
    )
    if skip_if_current(stage):
        return

    # The package of an earlier mean must not stay beside this one.
    shutil.rmtree(recipe.run_folder / "package", ignore_errors=True)
    import_torch()
    from postprocess.memory.comparison_fit import check_comparison  # noqa: PLC0415  needs torch
    from postprocess.weights.average_lora import average  # noqa: PLC0415  needs torch

    # Any member's model is as large as the mean's.
    member = next(iter(shares))
    contract, model_input = read_contract(member)
    base = find_base(contract.base_model, contract.revision)
    check_comparison(Run(recipe, member, contract, model_input, base, has_adapter=True))

    with making(stage):
        average(recipe, shares, rank)


def merge_stage(run: Run) -> Stage:
    """Describe the stage that writes the merged model in 16 bits."""
    return Stage(
        run.folder,
        "merge",
        inputs=run.source_files(),
        settings={},
        outputs=[run.folder / "merged"],
        code=stage_code.MERGE,
    )


def make_merged(run: Run, preparation: Preparation) -> Path:
    """Bring the merged model in 16 bits up to date, and return its folder."""
    stage = merge_stage(run)
    merged = stage.outputs[0]
    if skip_if_current(stage):
        return merged

    preparation.ensure()
    from postprocess.weights.merge import merge  # noqa: PLC0415  needs torch

    with making(stage) as key:
        merge(run, merged, key=key)
    return merged


def make_quantised(run: Run, preparation: Preparation) -> Path:
    """Bring the merged model in nf4 or int8 up to date, made in one pass, and return its folder."""
    block = run.recipe.pairwise
    quantize = block.package.quantize
    quantised = run.folder / "quantised"
    inputs = run.source_files()
    settings = {"to": quantize}
    if quantize == "int8":
        # It is calibrated on training rows.
        inputs += run.validation_files()
        settings["fold"] = block.fold
    stage = Stage(
        run.folder,
        "quantise",
        inputs=inputs,
        settings=settings,
        outputs=[quantised],
        code=stage_code.QUANTISE,
    )
    if skip_if_current(stage):
        return quantised

    preparation.ensure()
    from postprocess.weights.quantise_run import quantise_in_one_pass  # noqa: PLC0415  needs torch

    with making(stage) as key:
        quantise_in_one_pass(run, quantize, quantised, key)
    return quantised


def make_gptq_models(run: Run, options: Options, preparation: Preparation) -> dict[str, Path]:
    """Bring the GPTQ models up to date, each calibrated on other rows.

    They are made from the merged model, which needs to be on the disk only meanwhile. Models of an
    earlier call with a larger `repeat` are kept among them while they are up to date.

    Returns:
        The models' folders by name: quantised, quantised-2, …
    """
    stages = []
    while len(stages) < MOST_REPEATS:
        stage = gptq_stage(run, seed=len(stages))
        if len(stages) >= options.repeat and not is_current(stage):
            break
        stages.append(stage)

    outdated_stages = []
    for stage in stages:
        if not skip_if_current(stage):
            outdated_stages.append(stage)

    if outdated_stages:
        preparation.ensure()
        from postprocess.gptq.quantize import quantize  # noqa: PLC0415  needs torch

        merged = make_merged(run, preparation)
        for stage in outdated_stages:
            with making(stage):
                quantize(
                    run, merged, stage.settings["bits"], stage.outputs[0], stage.settings["seed"]
                )
        if not options.keep_merged:
            shutil.rmtree(merged)

    return {stage.outputs[0].name: stage.outputs[0] for stage in stages}


def gptq_stage(run: Run, seed: int) -> Stage:
    """Describe the stage that makes one GPTQ model.

    Args:
        run: The run that is packaged.
        seed: Decides which rows it is calibrated on; 0 for the first model.
    """
    block = run.recipe.pairwise
    number = "" if seed == 0 else f"-{seed + 1}"
    return Stage(
        run.folder,
        f"quantise{number}",
        inputs=[*run.source_files(), *run.validation_files()],
        settings={"bits": GPTQ_BITS[block.package.quantize], "fold": block.fold, "seed": seed},
        outputs=[run.folder / f"quantised{number}"],
        code=stage_code.GPTQ,
    )


def make_unmerged(run: Run, preparation: Preparation) -> Path:
    """Bring the model of nf4 base and separate adapter up to date, and return its folder."""
    folder = run.folder / "unmerged"
    stage = Stage(
        run.folder,
        "unmerged",
        inputs=run.source_files(),
        settings={"to": "nf4"},
        outputs=[folder],
        code=stage_code.UNMERGED,
    )
    if skip_if_current(stage):
        return folder

    preparation.ensure()
    from postprocess.weights.nf4_base_plus_adapter import unmerged  # noqa: PLC0415  needs torch

    with making(stage) as key:
        unmerged(run, folder, key)
    return folder


def make_agreement(
    run: Run, candidates: Mapping[str, Path | None], preparation: Preparation
) -> Path:
    """Bring the comparison of the candidates with the trained model up to date.

    Returns:
        agreement.json, which names the candidate to be packaged.

    Raises:
        UserError: The models do not agree.
    """
    package_settings = run.recipe.pairwise.package
    report = run.folder / "agreement.json"
    stage = Stage(
        run.folder,
        "agreement",
        inputs=[*compared_files(run, candidates), run.folder / "metrics.json"],
        settings={
            "candidates": list(candidates),
            "tolerance": package_settings.tolerance,
            "tolerance_log_loss": package_settings.tolerance_log_loss,
            "tolerance_verdicts": package_settings.tolerance_verdicts,
        },
        outputs=[report, report.with_suffix(".parquet")],
        code=stage_code.AGREEMENT,
    )
    if skip_if_current(stage):
        return report

    preparation.ensure()
    from postprocess.agreement.gate import agreement, needs_more_rows  # noqa: PLC0415  needs torch

    # More rows are scored only where fewer leave it open whether the models agree.
    scores_files = [make_scores(run, candidates, part=0)]
    while needs_more_rows(run, scores_files):
        scores_files.append(make_scores(run, candidates, part=len(scores_files)))

    with making(stage):
        agreement(run, scores_files, report)
    return report


def make_scores(run: Run, candidates: Mapping[str, Path | None], part: int) -> Path:
    """Bring the probabilities that the candidates and the trained model give up to date.

    Args:
        run: The run that is packaged.
        candidates: The models' folders.
        part: 0 for the first validation rows, 1 for those that are added to them, …

    Returns:
        The file with the probabilities. Other tolerances need no other ones.
    """
    number = "" if part == 0 else f"-{part + 1}"
    scores_file = run.folder / f"scores{number}.json"
    stage = Stage(
        run.folder,
        f"scores{number}",
        inputs=compared_files(run, candidates),
        settings={"candidates": list(candidates)},
        outputs=[scores_file],
        code=stage_code.SCORES,
    )
    if skip_if_current(stage):
        return scores_file

    from postprocess.agreement.model_scores import score_models  # noqa: PLC0415  needs torch

    with making(stage):
        score_models(run, candidates, part, scores_file)
    return scores_file


def compared_files(run: Run, candidates: Mapping[str, Path | None]) -> list[Path]:
    """List the files of all models that are compared, and of the rows that they are compared on."""
    # The comparison is of what is on the disk: a model that was made anew is compared anew.
    files = [*run.source_files(), *run.validation_files()]
    for folder in unique_folders(candidates):
        files += files_of(folder)
    return files


def make_package(run: Run, model: Path, report: Path) -> None:
    """Bring the package up to date.

    Args:
        run: The run that is packaged.
        model: The folder of the candidate that goes into the package.
        report: agreement.json.
    """
    run_files = files_named(["contract.json", "model_input.py", "metrics.json"], run.folder)
    stage = Stage(
        run.folder,
        "package",
        inputs=[*files_of(model), report, *run_files, *run.validation_files()],
        settings=run.recipe.pairwise.package.model_dump(),
        outputs=[package_folder(run)],
        code=stage_code.PACKAGE,
    )
    if skip_if_current(stage):
        return

    import_torch()
    from postprocess.agreement.validation_rows import validation_ids  # noqa: PLC0415  needs torch
    from postprocess.temperature import measure_temperatures  # noqa: PLC0415  needs scipy

    with making(stage):
        temperatures = measure_temperatures(run)
        package(run, model, report, validation_ids(run), temperatures, package_folder(run))


def remove_outdated_models(run: Run, candidates: Mapping[str, Path | None]) -> None:
    """Remove the models of an earlier recipe or training: gigabytes that match nothing beside them."""
    kept_folders = unique_folders(candidates)
    # An earlier run with --keep-merged made it, and it still belongs to this training.
    stage = merge_stage(run)
    if is_current(stage):
        kept_folders += stage.outputs

    for pattern in MODEL_FOLDERS:
        for folder in run.folder.glob(pattern):
            if folder not in kept_folders:
                shutil.rmtree(folder, ignore_errors=True)


def package_folder(run: Run) -> Path:
    """Return where a run's package is written."""
    return run.folder / "package"


def unique_folders(candidates: Mapping[str, Path | None]) -> list[Path]:
    """List the candidates' folders, each once: with `quantize: none`, two names share the merged model."""
    folders = []
    for folder in candidates.values():
        if folder is not None and folder not in folders:
            folders.append(folder)
    return folders


def files_of(folder: Path) -> list[Path]:
    """List the files of a model's folder."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def files_named(names: Sequence[str], folder: Path) -> list[Path]:
    """Give the paths of files by their names in a folder."""
    return [folder / name for name in names]
