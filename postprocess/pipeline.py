"""From a run to its package: the stages, what each is made from, and their order.

    untrained or average (where a recipe needs one)  →  merge  →  quantise, unmerged  →  scores  →  agreement  →  package

`python -m postprocess` calls `package_recipe` or `package_mean`. Each `make_…` function below is one
stage: it names the stage's inputs, returns where they have not changed, and else makes its outputs.
The merged model is made once: it is quantised and compared from the disk, and then removed.

What needs torch is imported inside the functions, once there is something to do: that takes seconds,
which --help and a run that is up to date need not wait for.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from postprocess import stage_code
from postprocess.package import package
from postprocess.preparation import Preparation, import_torch
from postprocess.run_folder import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    RESULT_FILES,
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

RUN_FILES = (*RESULT_FILES, *TOKENIZER_FILES)
MOST_REPEATS = 20

# The folder of the merged model: one that the user asked for, or one that is removed at the end.
KEPT_MERGED = "merged"
TEMPORARY_MERGED = ".merged"

# All that the stages may have left of models.
MODEL_FOLDERS = (
    KEPT_MERGED,
    TEMPORARY_MERGED,
    "quantised",
    "quantised-*",
    "unmerged",
    ".*.partial",
)


@dataclass(frozen=True)
class Options:
    """Options of the command line."""

    keep_merged: bool = False  # in 16 bits, in the run folder
    repeat: int = 1  # how many times to quantise, each time calibrated on other rows


def package_recipe(recipe: Recipe, options: Options = Options()) -> Path:
    """Bring the package of a recipe's run up to date, and return its folder.

    With `train: false`, the run folder is made here; any other run was trained before.

    Raises:
        UserError: The run cannot be packaged, or the models do not agree; no package is left then.
    """
    with locked(recipe.run_folder):
        if not recipe.pairwise.train:
            make_untrained_run(recipe)
        return make_all_stages(read_run(recipe), options)


def package_mean(recipe: Recipe, members: Sequence[Path], options: Options = Options()) -> Path:
    """Bring the package of the mean of several runs up to date, in the folder `mean` of the run folder.

    Raises:
        UserError: The runs cannot be averaged or packaged, or the models do not agree.
    """
    mean_recipe = replace(recipe, run_folder=recipe.run_folder / "mean")
    with locked(mean_recipe.run_folder):
        make_average(mean_recipe, members)
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
            f"{run_folder}: another python -m postprocess is at work in this folder; wait until it has ended, "
            "or stop it"
        ) from None

    try:
        # With the lock held, no living process can be writing these temporary files.
        remove_leftovers(run_folder)
        yield
    finally:
        lock.release()


@dataclass(frozen=True)
class Models:
    """The folders of the models that are made of a run and compared with it."""

    # The merged model in 16 bits; None with `adapter: unmerged`. It may still have to be made: it
    # is on the disk only while another stage reads it, unless it is kept.
    merged: Path | None
    # The models that could be packaged, by the names that agreement.json gives them.
    candidates: Mapping[str, Path]

    def compared_folders(self) -> dict[str, Path]:
        """Return the folder of each model that is compared with the trained one, by its name."""
        if self.merged is None:
            return dict(self.candidates)
        return {"merged": self.merged, **self.candidates}


def make_all_stages(run: Run, options: Options) -> Path:
    """Bring models, comparison and package of a run up to date, and return the package's folder."""
    quantize = run.recipe.pairwise.package.quantize
    if options.repeat > 1 and quantize not in GPTQ_BITS:
        raise UserError(
            f"--repeat: the recipe says quantize: {quantize}, which gives the same bytes each time; leave "
            f"--repeat out, which is for {' and '.join(GPTQ_BITS)}: these depend on the rows drawn to calibrate on"
        )

    preparation = Preparation(run)
    models = make_models(run, options, preparation)
    report = make_agreement(run, models, preparation)

    best_candidate = read_json(report)["packaged"]
    package_folder = make_package(run, models.candidates[best_candidate], report)

    remove_outdated_models(run, models)
    return package_folder


def make_models(run: Run, options: Options, preparation: Preparation) -> Models:
    """Bring the models that could be packaged up to date.

    With `adapter: best` in the recipe there are both: the adapter merged into its base, and the two apart.
    The later comparison decides which is packaged.
    """
    adapter = run.recipe.pairwise.package.adapter
    merged = None
    candidates: dict[str, Path] = {}
    if adapter in ("merged", "best"):
        merged = choose_merged_folder(run, options)
        candidates |= make_merged_candidates(run, merged, options, preparation)

    if adapter in ("unmerged", "best"):
        candidates["unmerged"] = make_unmerged(run, preparation)
    return Models(merged, candidates)


def make_merged_candidates(
    run: Run, merged: Path, options: Options, preparation: Preparation
) -> dict[str, Path]:
    """Bring the models up to date that are made of the merged one: quantised, or as it is in 16 bits.

    Returns:
        The models' folders by name. With `quantize: none`, the merged model itself has the name `quantised`.
    """
    # A merged model that the user wants to keep is made here. Any other is made when a quantiser needs it.
    is_kept = merged.name == KEPT_MERGED
    if is_kept and not skip_if_current(merge_stage(run, merged)):
        make_merged(run, merged, preparation)

    quantize = run.recipe.pairwise.package.quantize
    if quantize in GPTQ_BITS:
        return make_gptq_models(run, merged, options.repeat, preparation)
    if quantize == "none":
        return {"quantised": merged}
    return {"quantised": make_quantised(run, merged, preparation)}


def choose_merged_folder(run: Run, options: Options) -> Path:
    """Choose where the merged model in 16 bits is: in a folder that stays, or in a temporary one."""
    kept = run.folder / KEPT_MERGED
    is_packaged = run.recipe.pairwise.package.quantize == "none"
    if options.keep_merged or is_packaged:
        return kept

    # An earlier call with --keep-merged may have made it of this training.
    if is_current(merge_stage(run, kept)):
        return kept
    return run.folder / TEMPORARY_MERGED


def make_untrained_run(recipe: Recipe) -> None:
    """Bring the run folder of a recipe with `train: false` up to date, from the base model as it is."""
    refuse_weights(recipe)
    base_model = recipe.axolotl["base_model"]
    base = find_base(base_model, recipe.axolotl.get("model_revision"), str(recipe.path))

    # The keys of the recipe that change the run: how it is packaged does not.
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
    from postprocess.memory.comparison_fit import check_base_model
    from postprocess.zero_shot.base_model_run import make_base_model_run

    check_base_model(base)
    with making(stage):
        make_base_model_run(recipe, base, hub_commit(base))


def make_average(recipe: Recipe, members: Sequence[Path]) -> None:
    """Bring the recipe's run folder up to date, which holds the mean of the adapters of `members`."""
    member_files = []
    for member in members:
        member_files += files_named(
            [*RUN_FILES, ADAPTER_WEIGHTS, ADAPTER_SETTINGS, "config.json"], member
        )

    stage = Stage(
        recipe.run_folder,
        "average",
        inputs=[*member_files, Path(recipe.pairwise.pairs)],
        settings={"members": [str(member) for member in members]},
        outputs=files_named([*RUN_FILES, ADAPTER_WEIGHTS, ADAPTER_SETTINGS], recipe.run_folder),
        code=stage_code.AVERAGE,
    )
    if skip_if_current(stage):
        return

    # The package of an earlier mean must not stay beside this one.
    shutil.rmtree(recipe.run_folder / "package", ignore_errors=True)
    import_torch()
    from postprocess.memory.comparison_fit import check_comparison
    from postprocess.weights.average_lora import average

    # The memory is checked with the first member, whose model is as large as the mean's.
    member = members[0]
    contract, model_input = read_contract(member)
    base = find_base(contract.base_model, contract.revision)
    check_comparison(Run(recipe, member, contract, model_input, base, has_adapter=True))

    with making(stage):
        average(recipe, members)


def merge_stage(run: Run, merged: Path) -> Stage:
    """Describe the stage that writes the merged model in 16 bits into the folder `merged`."""
    return Stage(run.folder, "merge", run.source_files(), {}, [merged], stage_code.MERGE)


def make_merged(run: Run, merged: Path, preparation: Preparation) -> None:
    """Bring the merged model in 16 bits up to date; every stage that reads it calls this before."""
    stage = merge_stage(run, merged)
    if is_current(stage):
        return

    preparation.ensure()
    from postprocess.weights.merge import merge

    with making(stage) as key:
        merge(run, merged, key=key)


def make_quantised(run: Run, merged: Path, preparation: Preparation) -> Path:
    """Bring the merged model in nf4 or int8 up to date, and return its folder."""
    block = run.recipe.pairwise
    quantize = block.package.quantize
    quantised = run.folder / "quantised"
    inputs = run.source_files()
    settings = {"to": quantize}

    # int8 is calibrated on rows of the pairs file that are not among the validation rows.
    if quantize == "int8":
        inputs += run.validation_files()
        settings["fold"] = block.fold

    stage = Stage(run.folder, "quantise", inputs, settings, [quantised], stage_code.QUANTISE)
    if skip_if_current(stage):
        return quantised

    preparation.ensure()
    from postprocess.weights.quantise_run import quantise_merged

    make_merged(run, merged, preparation)
    with making(stage) as key:
        quantise_merged(run, merged, quantize, quantised, key)
    return quantised


def make_gptq_models(
    run: Run, merged: Path, repeat: int, preparation: Preparation
) -> dict[str, Path]:
    """Bring the GPTQ models up to date: quantised, quantised-2 and so on, each calibrated on other rows.

    There are `repeat` of them at least. Further ones that an earlier call made are kept while they are up
    to date.
    """
    folders = {}
    for seed, stage in enumerate(list_gptq_stages(run, repeat)):
        quantised = stage.outputs[0]
        folders[quantised.name] = quantised
        if skip_if_current(stage):
            continue

        preparation.ensure()
        from postprocess.gptq.quantize import quantize

        # The first of these calls makes the merged model, which the others then find.
        make_merged(run, merged, preparation)
        with making(stage):
            quantize(run, merged, stage.settings["bits"], quantised, seed)
    return folders


def list_gptq_stages(run: Run, repeat: int) -> list[Stage]:
    """List the stages of `repeat` GPTQ models, and of those after them that are up to date already."""
    stages = []
    for seed in range(MOST_REPEATS):
        stage = gptq_stage(run, seed)
        if seed >= repeat and not is_current(stage):
            break
        stages.append(stage)
    return stages


def gptq_stage(run: Run, seed: int) -> Stage:
    """Describe the stage that makes one GPTQ model; the seed decides which rows it is calibrated on."""
    # The first is called quantised, as it is where there is one only, the others quantised-2, …
    number = "" if seed == 0 else f"-{seed + 1}"
    block = run.recipe.pairwise
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
    settings = {"to": "nf4"}
    stage = Stage(
        run.folder, "unmerged", run.source_files(), settings, [folder], stage_code.UNMERGED
    )
    if skip_if_current(stage):
        return folder

    preparation.ensure()
    from postprocess.weights.nf4_base_plus_adapter import unmerged

    with making(stage) as key:
        unmerged(run, folder, key)
    return folder


def make_agreement(run: Run, models: Models, preparation: Preparation) -> Path:
    """Bring the comparison of the models with the trained one up to date.

    Returns:
        agreement.json, which names the candidate to be packaged.

    Raises:
        UserError: The models do not agree.
    """
    report = run.folder / "agreement.json"
    tolerances = {"tolerance", "tolerance_log_loss", "tolerance_verdicts"}
    settings = run.recipe.pairwise.package.model_dump(include=tolerances)
    stage = Stage(
        run.folder,
        "agreement",
        inputs=[*compared_files(run, models), run.folder / "metrics.json"],
        settings={"candidates": list(models.compared_folders()), **settings},
        outputs=[report, report.with_suffix(".parquet")],
        code=stage_code.AGREEMENT,
    )
    if skip_if_current(stage):
        return report

    preparation.ensure()
    from postprocess.agreement.gate import agreement, needs_more_rows

    # More rows are scored only where fewer leave it open whether the models agree.
    scores_files = [make_scores(run, models, 0, preparation)]
    while needs_more_rows(run, scores_files):
        part = len(scores_files)
        scores_files.append(make_scores(run, models, part, preparation))

    # The temporary merged model is needed no more. It goes now, because a refusal in the next lines ends the call.
    shutil.rmtree(run.folder / TEMPORARY_MERGED, ignore_errors=True)
    with making(stage):
        agreement(run, scores_files, report)
    return report


def make_scores(run: Run, models: Models, part: int, preparation: Preparation) -> Path:
    """Bring the probabilities that the models give to a part of the validation rows up to date.

    Returns:
        The file with the probabilities: scores.json for part 0, the first rows; scores-2.json and so on for
        parts that are added because the rows so far do not decide.
    """
    # The tolerances are no setting of this stage: other ones need no new probabilities.
    folders = models.compared_folders()
    name = "scores" if part == 0 else f"scores-{part + 1}"
    scores_file = run.folder / f"{name}.json"
    inputs = compared_files(run, models)
    settings = {"candidates": list(folders)}
    stage = Stage(run.folder, name, inputs, settings, [scores_file], stage_code.SCORES)
    if skip_if_current(stage):
        return scores_file

    from postprocess.agreement.model_scores import score_models

    if models.merged is not None:
        make_merged(run, models.merged, preparation)
    with making(stage):
        score_models(run, folders, part, scores_file)
    return scores_file


def compared_files(run: Run, models: Models) -> list[Path]:
    """List the files that decide a comparison: of the run, its validation rows and the candidates."""
    # Not of the merged model, which need not be on the disk: the run's files decide it.
    files = [*run.source_files(), *run.validation_files()]
    for folder in models.candidates.values():
        files += files_of(folder)
    return files


def make_package(run: Run, model: Path, report: Path) -> Path:
    """Bring the package up to date, and return its folder."""
    folder = run.folder / "package"
    run_files = files_named(["contract.json", "model_input.py", "metrics.json"], run.folder)
    stage = Stage(
        run.folder,
        "package",
        inputs=[*files_of(model), report, *run_files, *run.validation_files()],
        settings=run.recipe.pairwise.package.model_dump(),
        outputs=[folder],
        code=stage_code.PACKAGE,
    )
    if skip_if_current(stage):
        return folder

    import_torch()
    from postprocess.agreement.validation_rows import validation_ids
    from postprocess.temperature import measure_temperatures

    with making(stage):
        temperatures = measure_temperatures(run)
        package(run, model, report, validation_ids(run), temperatures, folder)
    return folder


def remove_outdated_models(run: Run, models: Models) -> None:
    """Remove the models that an earlier recipe or training left in the run folder: they take gigabytes."""
    kept_folders = list(models.candidates.values())

    # Keep what an earlier call with --keep-merged made, if it belongs to this training.
    kept_merged = run.folder / KEPT_MERGED
    if is_current(merge_stage(run, kept_merged)):
        kept_folders.append(kept_merged)

    for pattern in MODEL_FOLDERS:
        for folder in run.folder.glob(pattern):
            if folder not in kept_folders:
                shutil.rmtree(folder, ignore_errors=True)


def files_of(folder: Path) -> list[Path]:
    """List the files of a model's folder."""
    return sorted(path for path in folder.iterdir() if path.is_file())


def files_named(names: Sequence[str], folder: Path) -> list[Path]:
    """Give the paths of files by their names in a folder."""
    return [folder / name for name in names]
