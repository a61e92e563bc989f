"""The mean of several runs' adapters, as one adapter: of the products B A, which a model adds to its weights.

The mean of products is not the product of means: averaging A and B apart mixes one run's A with
another's B, and is wrong even for two copies of one model that differ by a rotation of their ranks.
Here the ranks of n runs stand side by side, [B1/n, B2/n, …] [A1; A2; …], which is exact. PEFT's
add_weighted_adapter does so with the whole model in memory and without the heads, which are averaged
here as well.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.agreement.model_scores import score_column, write_results
from postprocess.agreement.reference_model import load_trained
from postprocess.run_folder import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    RESULT_FILES,
    Run,
    adapter_settings,
    check_recipe,
    check_tokenizer_files,
    find_base,
    read_contract,
)
from postprocess.weights.checkpoint_reader import Tensors, open_tensors
from postprocess.weights.lora_adapter import check_settings
from postprocess.weights.merge import is_finite
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, write_json
from recipes.pairwise.config.schema import Recipe
from recipes.pairwise.data.datasets import read_pairs, split

# PEFT's names of the two factors of a low-rank change; an embedding's have no `.weight` behind them.
A_NAME = re.compile(r".+\.(lora_A\.weight|lora_embedding_A)")
B_NAME = re.compile(r".+\.(lora_B\.weight|lora_embedding_B)")


def average(recipe: Recipe, members: Sequence[Path]) -> None:
    """Fill a run folder with the mean of several runs' adapters, as if it had been trained.

    Most rows were trained on by some member. So the mean is scored on the fixed sample of rows that a run
    gets which was trained on everything.

    Raises:
        UserError: The members were trained differently, or have no mean (DoRA).
    """
    folder = recipe.run_folder
    first = members[0]
    check_members(members, folder)
    contract, model_input = read_contract(first)
    check_recipe(replace(recipe, run_folder=first), contract, has_adapter=True)

    # Remove what an earlier run left: its contract and results must not be taken for the mean's.
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*RESULT_FILES, ADAPTER_WEIGHTS, ADAPTER_SETTINGS, "config.json"):
        (folder / name).unlink(missing_ok=True)

    # The members share one tokenizer and one contract: the first member's are copied. The contract comes
    # after the adapter, because a folder with a contract counts as complete.
    for name in ("model_input.py", "config.json", *contract.tokenizer_sha256):
        if (first / name).is_file():
            shutil.copyfile(first / name, folder / name)
    rank = write_adapter(folder, members)
    shutil.copyfile(first / "contract.json", folder / "contract.json")
    print(f"  the mean of {len(members)} adapters, of rank {rank}: {', '.join(map(str, members))}")

    base = find_base(contract.base_model, contract.revision)
    score_mean(Run(recipe, folder, contract, model_input, base, has_adapter=True), members)


def check_members(members: Sequence[Path], mean_folder: Path) -> None:
    """Check that the members of a mean are runs with LoRA adapters, trained in the same way.

    Raises:
        UserError: A folder is no such run, is named twice, or was trained differently than the first one.
    """
    different_folders = {member.resolve() for member in members}
    if len(different_folders) < len(members):
        raise UserError("--adapter: a folder is named twice; name each run once")

    for member in members:
        if member.resolve() == mean_folder.resolve():
            raise UserError(
                f"--adapter {member}: the mean itself is written to this folder; name the runs that it is the "
                "mean of"
            )
        for name in (ADAPTER_WEIGHTS, ADAPTER_SETTINGS, "contract.json", "model_input.py"):
            if not (member / name).is_file():
                raise UserError(
                    f"{member}: there is no {name}; --adapter takes the folder of a trained LoRA run"
                )

    # The mean gets the first member's tokenizer and contract, which the others must share.
    first = members[0]
    contract, _ = read_contract(first)
    check_tokenizer_files(first, contract)
    for member in members[1:]:
        check_alike(first, member)


def check_alike(first: Path, other: Path) -> None:
    """Raise UserError where two runs differ in a way that leaves their adapters without a mean."""
    first_facts = read_facts(first)
    other_facts = read_facts(other)
    for file, key in {**first_facts, **other_facts}:
        if first_facts.get((file, key)) != other_facts.get((file, key)):
            raise UserError(
                f"{other / file}: {key} has another value than in {first}; average only adapters that were "
                "trained with one recipe on one base"
            )


def read_facts(folder: Path) -> dict[tuple[str, str], object]:
    """Read from a run's folder what all members of a mean must have in common.

    Returns:
        The values by file and key, such as ("adapter_config.json", "r").
    """
    facts = {}
    contract, _ = read_contract(folder)
    for key, value in asdict(contract).items():
        if key != "recorded":
            facts["contract.json", key] = value

    # Ranks, scalings and names of modules come from the recipe. PEFT's version may differ.
    for key, value in adapter_settings(folder).items():
        # PEFT writes sets as lists, in any order.
        if isinstance(value, list):
            value = sorted(map(str, value))
        if key != "peft_version":
            facts[ADAPTER_SETTINGS, key] = value

    # A QLoRA adapter corrects the rounding of its base too, and has no mean with one of plain LoRA.
    config_file = folder / "config.json"
    if config_file.is_file():
        quantization = read_object(config_file).get("quantization_config")
        facts["config.json", "quantization_config"] = quantization
    return facts


def write_adapter(folder: Path, members: Sequence[Path]) -> int:
    """Write the mean as adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    Returns:
        The rank of the mean: the sum of the members' ranks.
    """
    settings = adapter_settings(members[0])
    check_settings(settings, members[0] / ADAPTER_SETTINGS)
    if settings.get("use_dora"):
        raise UserError(
            f"{members[0]}: was trained with DoRA, which also rescales the base's weights, so that no adapter is the "
            "mean of several; train with peft_use_dora: false, or package each run and let a kernel average them"
        )

    mean_tensors = {}
    with contextlib.ExitStack() as stack:
        adapters = []
        for member in members:
            adapters.append(stack.enter_context(open_tensors(member / ADAPTER_WEIGHTS)))
        check_same_tensors(adapters)
        for name in adapters[0].names():
            tensors = [read_finite(adapter, name) for adapter in adapters]
            mean_tensors[name] = join_tensors(name, tensors).to(torch.float32).contiguous()

    # The settings come after the weights that they describe.
    with atomic_file(folder / ADAPTER_WEIGHTS) as temporary:
        save_file(mean_tensors, temporary, metadata={"format": "pt"})
    mean_settings = make_settings(settings, len(members))
    write_json(folder / ADAPTER_SETTINGS, mean_settings)
    return mean_settings["r"]


def check_same_tensors(adapters: Sequence[Tensors]) -> None:
    """Raise UserError unless all adapters hold the same tensors, in the same shapes."""
    first = adapters[0]
    for adapter in adapters[1:]:
        names_in_one_only = set(first.names()) ^ set(adapter.names())
        if names_in_one_only:
            raise UserError(
                f"{adapter.path}: {min(names_in_one_only)} is only in this adapter or only in {first.path}; "
                "average only adapters that were trained with one recipe"
            )

        for name in first.names():
            if adapter.shape(name) != first.shape(name):
                raise UserError(
                    f"{adapter.path}: {name} has another shape than in {first.path}; average only adapters "
                    "that were trained with one recipe"
                )


def read_finite(adapter: Tensors, name: str) -> torch.Tensor:
    """Read a tensor in float64; a UserError where it is not finite."""
    tensor = adapter.get(name)
    if not is_finite(tensor):
        raise UserError(f"{adapter.path}: {name} is not finite; train again")
    return tensor.to(torch.float64)


def join_tensors(name: str, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Make a tensor of the mean from those that the members have under its name."""
    # [B1/n, B2/n, …] [A1; A2; …] is the mean of all products.
    if A_NAME.fullmatch(name):
        return torch.cat(tensors)
    if B_NAME.fullmatch(name):
        return torch.cat(tensors, dim=1) / len(tensors)

    # Heads, and what else was trained whole.
    return torch.stack(tensors).mean(dim=0)


def make_settings(settings: dict, member_count: int) -> dict:
    """Make adapter_config.json, PEFT's settings, for the mean of several adapters.

    The rank of the mean is the sum of the members' ranks. PEFT scales an adapter by alpha / rank, with
    rsLoRA by alpha / √rank, and this scale must stay the same: so alpha grows with the rank, or its root.
    """
    rank_factor = member_count
    alpha_factor = member_count
    if settings.get("use_rslora"):
        alpha_factor = math.sqrt(member_count)

    # rank_pattern and alpha_pattern set other values for the modules whose names match a pattern.
    mean = dict(settings)
    for key, factor in (("rank", rank_factor), ("alpha", alpha_factor)):
        values_by_pattern = settings.get(f"{key}_pattern") or {}
        mean[f"{key}_pattern"] = {
            pattern: value * factor for pattern, value in values_by_pattern.items()
        }
    mean["r"] *= rank_factor
    mean["lora_alpha"] *= alpha_factor
    return mean


def score_mean(run: Run, members: Sequence[Path]) -> None:
    """Score the fixed sample of validation rows, and write predictions.parquet and metrics.json."""
    pairs_file = run.recipe.pairwise.pairs
    _, sample = split(read_pairs(pairs_file), "all", pairs_file)
    pairs = [run.model_input.pair_from_row(row) for row in sample.iter_rows(named=True)]

    # Scored as training scores them: by PEFT's model, not by a merged one.
    model = load_trained(run)
    tokenizer = read_tokenizer(run.folder)
    column = score_column("mean", model, run, tokenizer, pairs)
    facts = {
        "fold": "all",
        "rows_were_trained_on": True,
        "members": [str(member) for member in members],
    }
    scores = write_results(run, sample, column.probabilities_rov, facts)
    print(
        f"  accuracy {scores['accuracy']:.4f}, log loss {scores['log_loss']:.4f} on {len(sample)} rows that "
        "members trained on"
    )
