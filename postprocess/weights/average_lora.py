"""The mean of several runs' adapters, as one adapter: of the products B A, which is what a model adds to its weights.

The mean of products is not the product of means: averaging A and B apart, as others do, mixes one run's A with another's B
and is wrong even for two copies of one model that differ by a rotation of their ranks. Here the ranks stand side by side,
[w1 B1, w2 B2, …] [A1; A2; …], which is exact, or are cut to a given number by the truncated singular value decomposition,
the nearest product of that rank (Eckart and Young 1936), its error told. Heads are averaged as they are.
"""

import contextlib
import math
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from kaggle_kernels.runtime.models.scoring import ORDERS, score
from kaggle_kernels.runtime.package import read_tokenizer
from postprocess.agreement.reference_model import load_trained
from postprocess.run_folder import ADAPTER, Run, adapter_settings, check_recipe, find_base, read_contract
from postprocess.weights.checkpoint_reader import open_tensors
from postprocess.weights.lora_adapter import Adapter, read_adapter
from postprocess.weights.merge import is_finite
from postprocess.weights.shard_writer import Planned, Stored, write_file
from preprocess.core.errors import UserError
from preprocess.core.files import atomic_file, read_object, sha256, write_json
from recipes.pairwise.config.schema import Recipe
from recipes.pairwise.data.datasets import read_pairs, split, targets, winners
from recipes.pairwise.tracking import metrics

MADE = (
    "adapter_model.safetensors",
    "adapter_config.json",
    "contract.json",
    "model_input.py",
    "metrics.json",
    "predictions.parquet",
    "config.json",
)
A_PARTS, B_PARTS = ("lora_A", "lora_embedding_A"), ("lora_B", "lora_embedding_B")


@dataclass(frozen=True)
class Member:
    """A run whose adapter goes into the mean, with its share of it; the shares sum to 1."""

    folder: Path
    share: float


@dataclass(frozen=True)
class Part:
    """A member's open adapter with its share."""

    adapter: Adapter
    share: float


@dataclass
class Truncation:
    """What cutting ranks has cost: squared Frobenius norms of all changes and of what was cut, and the worst layer."""

    total: float = 0.0
    cut: float = 0.0
    worst: tuple[float, str] = (0.0, "")

    def add(self, name: str, singular_values: torch.Tensor, kept: int) -> None:
        """Count one weight, whose change has these singular values, of which the first `kept` are kept."""
        total, cut = (float((values**2).sum()) for values in (singular_values, singular_values[kept:]))
        self.total += total
        self.cut += cut
        self.worst = max(self.worst, (math.sqrt(cut / total) if total else 0.0, name))

    @property
    def error(self) -> float:
        """The norm of what was cut over the norm of what there was."""
        return math.sqrt(self.cut / self.total) if self.total else 0.0


def average(recipe: Recipe, shares: Mapping[Path, float], rank: int | None) -> None:
    """Fill the run folder of `recipe` with the mean of several runs' adapters, cut to `rank` where that is given.

    `shares` are what each run's folder has in the mean; they sum to 1. The validation rows are the fixed sample of a run that
    trained on everything, since most were trained on by some member. Raises UserError where the members are not runs of one
    contract, or cannot be averaged (DoRA).
    """
    folder, members = recipe.run_folder, [Member(*item) for item in shares.items()]
    check_members(members, folder)
    check_recipe(replace(recipe, run_folder=members[0].folder), read_contract(members[0].folder)[0], has_adapter=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in MADE:  # nothing of an earlier run may vouch for this one
        (folder / name).unlink(missing_ok=True)
    first = members[0].folder
    contract, model_input = read_contract(first)
    for name in ("model_input.py", "config.json", *contract.tokenizer_sha256):
        if (first / name).is_file():
            shutil.copyfile(first / name, folder / name)
    truncation = write_adapter(folder, members, rank)
    shutil.copyfile(first / "contract.json", folder / "contract.json")
    print_summary(members, read_object(folder / ADAPTER[1]), truncation, rank)
    weights = find_base(contract.base_model, contract.revision)
    told = {"members": {str(member.folder): member.share for member in members}, "rank": rank, "error": truncation.error}
    write_results(Run(recipe, folder, contract, model_input, weights, has_adapter=True), told)


def check_members(members: Sequence[Member], out: Path) -> None:
    """Raise UserError unless every member is a run with an adapter other than `out`, all of the same contract."""
    first = members[0].folder
    for member in members:
        if member.folder.resolve() == out.resolve():
            raise UserError(f"--adapter {member.folder}: the mean is written there; name the runs that it is the mean of")
        if missing := [name for name in (*ADAPTER, "contract.json", "model_input.py") if not (member.folder / name).is_file()]:
            raise UserError(f"{member.folder}: no {missing[0]}; --adapter takes the folder of a trained LoRA run")
    contract, _ = read_contract(first)
    for name, expected in contract.tokenizer_sha256.items():
        if not (first / name).is_file() or sha256(first / name) != expected:
            raise UserError(f"{first / name}: missing or changed since training; contract.json holds another SHA-256")
    one = asdict(contract)
    for member in members[1:]:
        other = asdict(read_contract(member.folder)[0])
        if unlike := [key for key in one if key != "recorded" and one[key] != other[key]]:
            raise UserError(
                f"{member.folder / 'contract.json'}: {unlike[0]} is not that of {first}; only adapters that were trained "
                "with one recipe on one base have a mean"
            )
        settings = [adapter_settings(folder).get("ensure_weight_tying") for folder in (first, member.folder)]
        if bool(settings[0]) != bool(settings[1]):
            raise UserError(f"{member.folder / ADAPTER[1]}: ensure_weight_tying is not that of {first}")
        quantised = [quantization_of(folder) for folder in (first, member.folder)]
        if quantised[0] != quantised[1]:
            raise UserError(
                f"{member.folder / 'config.json'}: quantization_config is not that of {first}: LoRA and QLoRA do not mix"
            )


def quantization_of(folder: Path) -> object:
    """How a run's base was quantised while it was trained; None for 16 bits."""
    file = folder / "config.json"
    return read_object(file).get("quantization_config") if file.is_file() else None


def write_adapter(folder: Path, members: Sequence[Member], rank: int | None) -> Truncation:
    """Write the mean as adapter_model.safetensors and adapter_config.json that PEFT reads; what cutting ranks has cost."""
    truncation = Truncation()
    with contextlib.ExitStack() as stack:
        parts = []
        for member in members:
            tensors = stack.enter_context(open_tensors(member.folder / ADAPTER[0]))
            settings = adapter_settings(member.folder)
            parts.append(Part(read_adapter(tensors, settings, member.folder / ADAPTER[1]), member.share))
        names = changed_names(parts)
        ranks = {name: rank_of_mean(parts, name, rank) for name in names}
        planned = [Planned(name, stored_names(parts, name), 0) for name in names]
        replaced = {key: name for name, key in replaced_keys(parts).items()}
        planned += [Planned(key, (key,), 0) for key in replaced]

        def store(name: str) -> Iterator[Stored]:
            if name in ranks:
                a, b = mean_factors(parts, name)
                if rank:
                    a, b = cut(a, b, ranks[name], name, truncation)
                for key, tensor in zip(stored_names(parts, name), (a, b), strict=True):
                    yield Stored(key, torch.float32, tuple(tensor.shape), [tensor.to(torch.float32)])
            else:
                mean = mean_replacement(parts, replaced[name])
                yield Stored(name, mean.dtype, tuple(mean.shape), [mean])

        write_file(folder / ADAPTER[0], planned, store)
    write_json(folder / ADAPTER[1], mean_settings([adapter_settings(member.folder) for member in members], ranks))
    return truncation


def changed_names(parts: Sequence[Part]) -> list[str]:
    """The weights that some member changed, in order. A UserError where one is of DoRA, whose changes are no products."""
    for part in parts:
        for name, change in part.adapter.changes.items():
            if "lora_magnitude_vector" in change.parts:
                raise UserError(
                    f"{part.adapter.tensors.path}: {name} was trained with DoRA, which rescales rows: no adapter is the mean "
                    "of that; train with peft_use_dora: false, or package the runs apart and let a kernel average them"
                )
    return list(dict.fromkeys(name for part in parts for name in part.adapter.changes))


def replaced_keys(parts: Sequence[Part]) -> Mapping[str, str]:
    """The adapters' keys of the tensors that every member replaces; a UserError where only some do."""
    first = parts[0].adapter
    for part in parts[1:]:
        if unlike := sorted(first.replacements.keys() ^ part.adapter.replacements.keys()):
            raise UserError(f"{part.adapter.tensors.path}: {unlike[0]} is in it or in {first.tensors.path}, not in both")
        for name, key in part.adapter.replacements.items():
            if part.adapter.tensors.shape(key) != first.tensors.shape(first.replacements[name]):
                raise UserError(f"{part.adapter.tensors.path}: {name} has another shape than in {first.tensors.path}")
    return first.replacements


def _keys(part: Part, name: str) -> tuple[str, str] | None:
    """The adapter's keys of A and of B for the weight `name`."""
    if name not in part.adapter.changes:
        return None
    found = part.adapter.changes[name].parts
    return tuple(next(found[which] for which in both if which in found) for both in (A_PARTS, B_PARTS))


def stored_names(parts: Sequence[Part], name: str) -> tuple[str, str]:
    """The keys under which the mean's A and B of the weight `name` are stored: a member's own."""
    return next(keys for part in parts if (keys := _keys(part, name)))


def sum_of_ranks(parts: Sequence[Part], name: str) -> int:
    """The rank of the exact mean of the changes of the weight `name`."""
    return sum(part.adapter.tensors.shape(keys[0])[0] for part in parts if (keys := _keys(part, name)))


def rank_of_mean(parts: Sequence[Part], name: str, rank: int | None) -> int:
    """The rank of the mean's change of the weight `name`: all of it, or at most `rank` and what its shape can have."""
    whole = sum_of_ranks(parts, name)
    if rank is None:
        return whole
    part, (a, b) = next((part, keys) for part in parts if (keys := _keys(part, name)))
    shape = part.adapter.tensors.shape
    return min(whole, rank, shape(a)[1], shape(b)[0])


def mean_factors(parts: Sequence[Part], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (ranks, in) and B (out, ranks) in float64, whose product is the mean of the members' s B A."""
    a, b = [], []
    for part in parts:
        if keys := _keys(part, name):
            one, other = (finite(part, key).to(torch.float64) for key in keys)
            a.append(one)
            b.append(other * (part.share * part.adapter.changes[name].scaling))
    if len({(one.shape[1], other.shape[0]) for one, other in zip(a, b, strict=True)}) > 1:
        raise UserError(f"{parts[-1].adapter.tensors.path}: {name} has another shape than in {parts[0].adapter.tensors.path}")
    return torch.cat(a), torch.cat(b, dim=1)


def finite(part: Part, key: str) -> torch.Tensor:
    """A tensor of a member; a UserError where it is not finite."""
    tensor = part.adapter.tensors.get(key)
    if not is_finite(tensor):
        raise UserError(f"{part.adapter.tensors.path}: {key} is not finite; train again")
    return tensor


def cut(a: torch.Tensor, b: torch.Tensor, rank: int, name: str, truncation: Truncation) -> tuple[torch.Tensor, torch.Tensor]:
    """The factors of the nearest product of `rank`, found without multiplying out: B A = Q (R S^T) P^T, and R S^T is small."""
    q, r = torch.linalg.qr(b)
    p, s = torch.linalg.qr(a.T)
    left, values, right = torch.linalg.svd(r @ s.T)
    truncation.add(name, values, rank)
    root = values[:rank].sqrt()
    return (root[:, None] * right[:rank]) @ p.T, q @ (left[:, :rank] * root)


def mean_replacement(parts: Sequence[Part], name: str) -> torch.Tensor:
    """The mean of a tensor that the members replace (a head); as it is where it is the same in all."""
    tensors = [finite(part, part.adapter.replacements[name]) for part in parts]
    if all(torch.equal(tensor, tensors[0]) for tensor in tensors):
        return tensors[0]
    return sum(part.share * tensor.to(torch.float64) for part, tensor in zip(parts, tensors, strict=True)).to(torch.float32)


def mean_settings(settings: Sequence[dict], ranks: Mapping[str, int]) -> dict:
    """adapter_config.json of the mean: scalings are in B already, so alpha is the rank everywhere."""
    rank = max(ranks.values())
    others = {re.escape(name.removesuffix(".weight")): found for name, found in ranks.items() if found != rank}
    kept = {key: value for key, value in settings[0].items() if key not in ("target_modules", "modules_to_save")}
    joined = {}
    for key in ("target_modules", "modules_to_save"):
        found = [one.get(key) for one in settings]
        lists = all(isinstance(value, list) for value in found)
        joined[key] = sorted({name for value in found for name in value}) if lists else found[0]
    scaled = {"r": rank, "lora_alpha": rank, "rank_pattern": others, "alpha_pattern": others, "use_rslora": False}
    return {**kept, **joined, **scaled}


def print_summary(members: Sequence[Member], settings: Mapping, truncation: Truncation, rank: int | None) -> None:
    """Print whose mean it is, its rank, and what cutting ranks has cost."""
    shares = ", ".join(f"{member.share:.3f} {member.folder}" for member in members)
    print(f"  the mean of {len(members)} adapters: {shares}")
    if rank and truncation.error > 1e-6:
        worst, name = truncation.worst
        print(f"  cut to rank {rank}: {truncation.error:.2%} of the change is lost (norms), at most {worst:.2%}, in {name}")
    else:
        print(f"  exact, of rank {settings['r']}")


def write_results(run: Run, told: dict) -> None:
    """Score the fixed sample with base and mean; write predictions.parquet and metrics.json."""
    block, verdicts = run.recipe.pairwise, run.contract.verdicts
    _, sample = split(read_pairs(block.pairs), "all", block.pairs)
    pairs = [run.model_input.pair_from_row(row) for row in sample.iter_rows(named=True)]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_trained(run, device)
    found = score(model, run.model_input, read_tokenizer(run.folder), run.contract, pairs, device=device)
    both = np.array([[found[pair.id][order] for order in ORDERS] for pair in pairs], dtype=np.float64)
    values = metrics.scores(both, targets(sample, verdicts), winners(sample, verdicts))
    write_json(
        run.folder / "metrics.json",
        {
            **values,
            "accuracy_of_longer": metrics.longer_is_right(sample),
            "rows": len(sample),
            "fold": "all",
            "rows_were_trained_on": True,
            "average": told,
            "pairs_sha256": sha256(block.pairs),
        },
    )
    table = metrics.predictions([pair.id for pair in pairs], both, verdicts, sample)
    with atomic_file(run.folder / "predictions.parquet") as temporary:
        table.write_parquet(temporary)
    print(
        f"  accuracy {values['accuracy']:.4f}, log loss {values['log_loss']:.4f} on {len(sample)} rows that members trained on"
    )
