"""The mean of several runs' adapters, as one adapter: of the products B A, which a model adds to its weights.

The mean of products is not the product of means: averaging A and B apart mixes one run's A with
another's B, and is wrong even for two copies of one model that differ by a rotation of their ranks.
Here the ranks stand side by side, [w1 B1, w2 B2, …] [A1; A2; …], which is exact, or are cut to a given
number by the truncated singular value decomposition, the nearest product of that rank (Eckart and
Young 1936). PEFT's add_weighted_adapter does both with the whole model in memory and without the heads,
which are averaged here as well.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from peft.utils.other import get_pattern_key
from safetensors.torch import save_file

from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.agreement.model_scores import score_column
from postprocess.agreement.reference_model import load_trained
from postprocess.run_folder import (
    ADAPTER_SETTINGS,
    ADAPTER_WEIGHTS,
    Run,
    adapter_settings,
    check_recipe,
    check_tokenizer_files,
    find_base,
    read_contract,
)
from postprocess.weights.checkpoint_reader import Tensors, open_tensors
from postprocess.weights.lora_adapter import PREFIX, check_settings
from postprocess.weights.merge import is_finite
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, sha256, write_json
from recipes.pairwise.config.schema import Recipe
from recipes.pairwise.data.datasets import read_pairs, split, targets, winners
from recipes.pairwise.tracking import metrics

WRITTEN_FILES = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "contract.json",
    "model_input.py",
    "metrics.json",
    "predictions.parquet",
    "config.json",
)
A_NAME = re.compile(r"(?P<module>.+)\.(lora_A\.weight|lora_embedding_A)")


@dataclass(frozen=True)
class Member:
    """A run whose adapter goes into the mean, with its share of it; the shares sum to 1."""

    folder: Path
    share: float


@dataclass(frozen=True)
class Factors:
    """The low-rank change of one module: the names of A and B in the adapter's file, and the factor on B A."""

    a_name: str
    b_name: str
    scaling: float


@dataclass(frozen=True)
class MemberAdapter:
    """A member's open adapter.

    Attributes:
        tensors: The open file.
        share: The member's share of the mean.
        changes: The low-rank change of each module, by the module's name in the file.
        whole: The names of the tensors that were trained whole.
    """

    tensors: Tensors
    share: float
    changes: Mapping[str, Factors]
    whole: Sequence[str]

    def read(self, name: str) -> torch.Tensor:
        """Read a tensor in float64; a UserError where it is not finite."""
        tensor = self.tensors.get(name)
        if not is_finite(tensor):
            raise UserError(f"{self.tensors.path}: {name} is not finite; train again")
        return tensor.to(torch.float64)


@dataclass
class Truncation:
    """What cutting ranks costs.

    Attributes:
        total: The sum of the squared Frobenius norms of all changes.
        lost: The same of what was cut away.
        worst: The largest relative error of a module, and the module.
    """

    total: float = 0.0
    lost: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    def add(self, module: str, singular_values: torch.Tensor, rank: int) -> None:
        """Count a module's change, of whose singular values the first `rank` are kept."""
        total = float((singular_values**2).sum())
        lost = float((singular_values[rank:] ** 2).sum())
        self.total += total
        self.lost += lost
        self.worst = max(self.worst, (relative_norm(lost, total), module))

    @property
    def error(self) -> float:
        """The norm of what was cut away, relative to the norm of all changes."""
        return relative_norm(self.lost, self.total)


def relative_norm(part: float, total: float) -> float:
    """Give the ratio of two norms from their squares; 0 where there is nothing."""
    return math.sqrt(part / total) if total else 0.0


def average(recipe: Recipe, shares: Mapping[Path, float], rank: int | None) -> None:
    """Fill a run folder with the mean of several runs' adapters.

    The validation rows are the fixed sample of a run that trained on everything, since most of them
    were trained on by some member.

    Args:
        recipe: The recipe of the runs, with the folder of the mean as its run folder.
        shares: Each run's share of the mean, by its folder; the shares sum to 1.
        rank: The rank that the mean is cut to; None keeps it exact.

    Raises:
        UserError: The members are not runs of one contract, or have no mean (DoRA).
    """
    folder = recipe.run_folder
    members = [Member(member_folder, share) for member_folder, share in shares.items()]
    first = members[0].folder
    check_members(members, folder)
    contract, model_input = read_contract(first)
    check_recipe(replace(recipe, run_folder=first), contract, has_adapter=True)

    # Nothing of an earlier run may vouch for this one.
    folder.mkdir(parents=True, exist_ok=True)
    for name in WRITTEN_FILES:
        (folder / name).unlink(missing_ok=True)
    for name in ("model_input.py", "config.json", *contract.tokenizer_sha256):
        if (first / name).is_file():
            shutil.copyfile(first / name, folder / name)

    # The contract comes after the adapter, for which it vouches.
    truncation = write_adapter(folder, members, rank)
    shutil.copyfile(first / "contract.json", folder / "contract.json")
    print_summary(members, read_object(folder / ADAPTER_SETTINGS)["r"], truncation, rank)

    base = find_base(contract.base_model, contract.revision)
    run = Run(recipe, folder, contract, model_input, base, has_adapter=True)
    facts = {
        "members": {str(member.folder): member.share for member in members},
        "rank": rank,
        "error": truncation.error,
    }
    write_results(run, facts)


def check_members(members: Sequence[Member], mean_folder: Path) -> None:
    """Check that the members are runs with LoRA adapters of one contract, since others have no mean.

    Args:
        members: The runs.
        mean_folder: Where the mean is written, which must be none of them.

    Raises:
        UserError: They are not.
    """
    for member in members:
        if member.folder.resolve() == mean_folder.resolve():
            raise UserError(
                f"--adapter {member.folder}: the mean is written there; name the runs that it is the mean of"
            )
        for name in (ADAPTER_WEIGHTS, ADAPTER_SETTINGS, "contract.json", "model_input.py"):
            if not (member.folder / name).is_file():
                raise UserError(
                    f"{member.folder}: no {name}; --adapter takes the folder of a trained LoRA run"
                )

    # The mean gets the first member's tokenizer and contract, which the others must share.
    first = members[0].folder
    contract, _ = read_contract(first)
    check_tokenizer_files(first, contract)
    for member in members[1:]:
        check_alike(first, member.folder)


def check_alike(first: Path, other: Path) -> None:
    """Raise UserError where two runs differ in a way that leaves their adapters without a mean.

    Args:
        first: The folder of one run.
        other: The folder of another one, which the message names.
    """
    first_contract = asdict(read_contract(first)[0])
    other_contract = asdict(read_contract(other)[0])
    for key, value in first_contract.items():
        if key != "recorded" and value != other_contract[key]:
            raise UserError(
                f"{other / 'contract.json'}: {key} is not that of {first}; only adapters that were trained "
                "with one recipe on one base have a mean"
            )

    # One of them has an output layer of its own, the other has not.
    first_is_tied = bool(adapter_settings(first).get("ensure_weight_tying"))
    other_is_tied = bool(adapter_settings(other).get("ensure_weight_tying"))
    if first_is_tied != other_is_tied:
        raise UserError(f"{other / ADAPTER_SETTINGS}: ensure_weight_tying is not that of {first}")

    # A QLoRA adapter corrects the rounding of its base too.
    if read_quantization(first) != read_quantization(other):
        raise UserError(
            f"{other / 'config.json'}: quantization_config is not that of {first}: LoRA and QLoRA do not mix"
        )


def read_quantization(folder: Path) -> object:
    """Read how a run's base was quantised during training; None for 16 bits."""
    file = folder / "config.json"
    if not file.is_file():
        return None
    return read_object(file).get("quantization_config")


def write_adapter(folder: Path, members: Sequence[Member], rank: int | None) -> Truncation:
    """Write the mean as adapter_model.safetensors and adapter_config.json, as PEFT reads them.

    Args:
        folder: Where they are written.
        members: The runs.
        rank: The rank that the mean is cut to; None keeps it exact.

    Returns:
        What cutting ranks has cost.
    """
    truncation = Truncation()
    mean_tensors = {}
    ranks = {}
    with contextlib.ExitStack() as stack:
        adapters = []
        for member in members:
            tensors = stack.enter_context(open_tensors(member.folder / ADAPTER_WEIGHTS))
            adapters.append(read_member(member, tensors))
        check_whole_tensors(adapters)

        for module, names in list_modules(adapters).items():
            a, b = join_factors(adapters, module)
            if rank is not None:
                a, b = cut_rank(a, b, rank, module, truncation)
            ranks[module] = len(a)
            mean_tensors[names.a_name] = a.to(torch.float32).contiguous()
            mean_tensors[names.b_name] = b.to(torch.float32).contiguous()

        # Heads, and what else was trained whole.
        for name in adapters[0].whole:
            mean_tensors[name] = average_tensor(adapters, name)

    # The settings come after the weights that they describe.
    with atomic_file(folder / ADAPTER_WEIGHTS) as temporary:
        save_file(mean_tensors, temporary, metadata={"format": "pt"})
    settings = [adapter_settings(member.folder) for member in members]
    write_json(folder / ADAPTER_SETTINGS, make_settings(settings, ranks))
    return truncation


def list_modules(adapters: Sequence[MemberAdapter]) -> dict[str, Factors]:
    """List every module that some member changes, with the names of its factors in the mean's file."""
    names_of_factors = {}
    for adapter in reversed(adapters):
        names_of_factors |= adapter.changes
    return names_of_factors


def read_member(member: Member, tensors: Tensors) -> MemberAdapter:
    """Find what a member's adapter changes.

    Args:
        member: The run.
        tensors: Its open adapter_model.safetensors.

    Raises:
        UserError: It is no adapter of PEFT's, or of a kind that has no mean.
    """
    settings = adapter_settings(member.folder)
    check_settings(settings, member.folder / ADAPTER_SETTINGS)
    if settings.get("use_dora"):
        raise UserError(
            f"{tensors.path}: was trained with DoRA, which rescales rows: no adapter is the mean of that; train with "
            "peft_use_dora: false, or package the runs apart and let a kernel average them"
        )

    # A module's low-rank change is two tensors, A and B. All other tensors were trained whole.
    changes = {}
    whole = []
    for name in tensors.names():
        a_name = A_NAME.fullmatch(name)
        if a_name:
            module = a_name["module"]
            b_name = name.replace("lora_A", "lora_B").replace("embedding_A", "embedding_B")
            if b_name not in tensors.names():
                raise UserError(f"{tensors.path}: {module} has no lora_B; train again")
            rank = tensors.shape(name)[0]
            changes[module] = Factors(name, b_name, find_scaling(module, rank, settings))
        elif "lora_" not in name:
            whole.append(name)
    return MemberAdapter(tensors, member.share, changes, whole)


def find_scaling(module: str, rank: int, settings: Mapping) -> float:
    """Find the factor by which PEFT multiplies a module's change B A: alpha/rank, or with rsLoRA alpha/√rank.

    Args:
        module: The module's name in the adapter's file.
        rank: The rank of its change.
        settings: adapter_config.json.
    """
    # A module may have an alpha of its own.
    alpha_pattern = settings.get("alpha_pattern") or {}
    pattern = get_pattern_key(alpha_pattern.keys(), module.removeprefix(PREFIX))
    alpha = alpha_pattern.get(pattern, settings["lora_alpha"])
    if settings.get("use_rslora"):
        return alpha / math.sqrt(rank)
    return alpha / rank


def check_whole_tensors(adapters: Sequence[MemberAdapter]) -> None:
    """Raise UserError unless all members trained the same tensors whole (heads), in the same shapes."""
    first = adapters[0]
    for adapter in adapters[1:]:
        path = adapter.tensors.path
        names_in_one_of_both = set(first.whole) ^ set(adapter.whole)
        for name in sorted(names_in_one_of_both):
            raise UserError(f"{path}: {name} is in it or in {first.tensors.path}, not in both")

        for name in first.whole:
            if adapter.tensors.shape(name) != first.tensors.shape(name):
                raise UserError(f"{path}: {name} has another shape than in {first.tensors.path}")


def join_factors(
    adapters: Sequence[MemberAdapter], module: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Join the members' low-rank changes of one module to their mean, which has the sum of their ranks.

    Args:
        adapters: The members.
        module: The module's name in their files. A member that did not train it adds nothing.

    Returns:
        A (sum of ranks, inputs) and B (outputs, sum of ranks) in float64. Their product B A is the mean
        of what the members add to the module's weight.
    """
    a_factors = []
    b_factors = []
    for adapter in adapters:
        change = adapter.changes.get(module)
        if change is None:
            continue

        # Share and scaling go into B, so that the mean needs none.
        a = adapter.read(change.a_name)
        b = adapter.read(change.b_name) * (adapter.share * change.scaling)
        if a_factors and (a.shape[1] != a_factors[0].shape[1] or len(b) != len(b_factors[0])):
            raise UserError(
                f"{adapter.tensors.path}: {module} has another shape than in {adapters[0].tensors.path}"
            )
        a_factors.append(a)
        b_factors.append(b)
    # [w1 B1, w2 B2, …] [A1; A2; …] is the sum of all w B A.
    return torch.cat(a_factors), torch.cat(b_factors, dim=1)


def cut_rank(
    a: torch.Tensor, b: torch.Tensor, rank: int, module: str, truncation: Truncation
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the product of a lower rank that is nearest to B A, by the truncated singular value decomposition.

    Args:
        a: (ranks, inputs).
        b: (outputs, ranks).
        rank: The rank to cut to. The product may have less.
        module: The module, for `truncation`.
        truncation: What is cut away is counted there.

    Returns:
        A (rank, inputs) and B (outputs, rank).
    """
    # B A is as large as the weight itself, and is never multiplied out. With B = Q_b R_b and
    # A^T = Q_a R_a it is Q_b (R_b R_a^T) Q_a^T, whose middle has as many rows and columns as ranks.
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.T)
    left, singular_values, right = torch.linalg.svd(r_b @ r_a.T)
    rank = min(rank, len(singular_values))
    truncation.add(module, singular_values, rank)

    # Each factor gets the root of the singular values, so that they are of one size.
    roots = singular_values[:rank].sqrt()
    cut_a = (roots[:, None] * right[:rank]) @ q_a.T
    cut_b = q_b @ (left[:, :rank] * roots)
    return cut_a, cut_b


def average_tensor(adapters: Sequence[MemberAdapter], name: str) -> torch.Tensor:
    """Average a tensor that the members trained whole, such as a head, in float32.

    A tensor that is the same in all of them, such as a bias that was not trained, stays as it is.
    """
    first = adapters[0].tensors.get(name)
    mean = torch.zeros(first.shape, dtype=torch.float64)
    is_same_in_all = True
    for adapter in adapters:
        mean += adapter.share * adapter.read(name)
        if not torch.equal(adapter.tensors.get(name), first):
            is_same_in_all = False
    return first if is_same_in_all else mean.to(torch.float32)


def make_settings(settings: Sequence[dict], ranks: Mapping[str, int]) -> dict:
    """Make adapter_config.json, PEFT's settings, of the mean of several adapters.

    Args:
        settings: The members' adapter_config.json.
        ranks: The rank of the mean's change of each module, by the module's name in the file.
    """
    # PEFT has one rank for all modules, and a pattern for every module with another one.
    rank = max(ranks.values())
    other_ranks = {}
    for module, module_rank in ranks.items():
        if module_rank != rank:
            other_ranks[re.escape(module.removeprefix(PREFIX))] = module_rank

    mean = dict(settings[0])
    for key in ("target_modules", "modules_to_save"):
        mean[key] = unite_names([member_settings.get(key) for member_settings in settings])

    # PEFT multiplies B A by alpha / rank. B holds the scalings already, so that both are the same.
    mean |= {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other_ranks,
        "alpha_pattern": other_ranks,
        "use_rslora": False,
    }
    return mean


def unite_names(names_of_members: Sequence[list[str] | str | None]) -> list[str] | str | None:
    """Unite the lists of modules that members trained. A pattern or nothing is the first member's."""
    united_names = set()
    for names in names_of_members:
        if not isinstance(names, list):
            return names_of_members[0]
        united_names.update(names)
    return sorted(united_names)


def print_summary(
    members: Sequence[Member], mean_rank: int, truncation: Truncation, rank: int | None
) -> None:
    """Print whose mean it is, its rank, and what cutting ranks has cost.

    Args:
        members: The runs.
        mean_rank: The rank of the mean.
        truncation: What was cut away.
        rank: The rank that was asked for; None for an exact mean.
    """
    # The shares as they count: they sum to 1, the weights of the command line need not.
    shares = ", ".join(f"{member.share:.3f} {member.folder}" for member in members)
    print(f"  the mean of {len(members)} adapters: {shares}")

    if rank is None or truncation.error <= 1e-6:
        print(f"  exact, of rank {mean_rank}")
        return
    # The layer that suffers most says whether the rank is too low.
    worst_error, module = truncation.worst
    print(
        f"  cut to rank {rank}: {truncation.error:.2%} of the change is lost (norms), at most "
        f"{worst_error:.2%}, in {module.removeprefix(PREFIX)}"
    )


def write_results(run: Run, facts: Mapping[str, object]) -> None:
    """Score the fixed sample of validation rows, and write predictions.parquet and metrics.json.

    Args:
        run: The mean.
        facts: What metrics.json says of the mean.
    """
    block = run.recipe.pairwise
    verdicts = run.contract.verdicts
    _, sample = split(read_pairs(block.pairs), "all", block.pairs)
    pairs = [run.model_input.pair_from_row(row) for row in sample.iter_rows(named=True)]

    # Scored as training scores them: by PEFT's model, not by a merged one.
    model = load_trained(run)
    tokenizer = read_tokenizer(run.folder)
    probabilities_rov = score_column("mean", model, run, tokenizer, pairs).probabilities_rov

    # The same figures that training writes of its validation rows.
    scores = metrics.scores(probabilities_rov, targets(sample, verdicts), winners(sample, verdicts))
    results = {
        **scores,
        "accuracy_of_longer": metrics.longer_is_right(sample),
        "rows": len(sample),
        "fold": "all",
        "rows_were_trained_on": True,
        "average": facts,
        "pairs_sha256": sha256(block.pairs),
    }
    write_json(run.folder / "metrics.json", results)

    ids = [pair.id for pair in pairs]
    table = metrics.predictions(ids, probabilities_rov, verdicts, sample)
    with atomic_file(run.folder / "predictions.parquet") as temporary:
        table.write_parquet(temporary)
    print(
        f"  accuracy {scores['accuracy']:.4f}, log loss {scores['log_loss']:.4f} on {len(sample)} rows that "
        "members trained on"
    )
