"""Does a model fit what it is packaged for? What two T4s would hold of it in the kernels that serve it, by arithmetic.

A kernel's spec is a file between two stages and read as one: its batch, its budget and its placement decide what a GPU holds.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from postprocess.memory.model_size import (
    CUDA_BYTES,
    GIB,
    GPU_BYTES,
    Served,
    activation_bytes,
    bytes_by_class,
    dimensions_of,
    gpu_bytes,
    logit_bytes,
    served_of,
    weight_bytes,
    weight_bytes_limit,
)
from postprocess.run_folder import Run
from preprocess.core.errors import UserError
from preprocess.core.files import read_object, read_yaml
from recipes.pairwise.config.schema import GPTQ_BITS

SPECS = Path(__file__).parents[2] / "kaggle_kernels" / "specs"
TOKENS_PER_BATCH = 8192  # a spec's default
GPUS = 2
SMALLER = {"none": ("int8", "gptq8", "nf4", "gptq4"), "int8": ("nf4", "gptq4"), "gptq8": ("gptq4", "nf4")}


@dataclass(frozen=True)
class Use:
    """How a kernel serves a run: the spec's name (None: a spec that has only defaults), its batch, budget and placement."""

    spec: str | None = None
    tokens_per_batch: int = TOKENS_PER_BATCH
    budget_tokens: int | None = None
    placement: str = "auto"


def check_target(run: Run) -> None:
    """Print what the package will weigh, class by class, and what each T4 will hold; UserError where no kernel could hold it.

    Sizes are known of four architectures; of another, one line says so.
    """
    recipe, config = run.recipe, run.weights / "config.json"
    try:
        served = served_of(recipe, dimensions_of(read_object(config), str(config)))
    except UserError as error:
        print(f"  not computed whether a T4 holds it: {error}")
        return
    print("\n".join(size_lines(served)))
    uses = uses_of(recipe.path.stem)
    refused = []
    for use in uses:
        asked = replace(served, budget_tokens=use.budget_tokens or served.budget_tokens)
        placement, needs = place(asked, use.tokens_per_batch, use.placement)
        print(f"  {memory_line(use, asked, placement, needs)}")
        if max(needs) > GPU_BYTES:
            refused.append(refusal(recipe.path.stem, asked, use.tokens_per_batch, use.placement, recipe.path))
    if len(refused) == len(uses):
        raise UserError(f"{recipe.path}: {refused[0]}")


def uses_of(name: str, specs: Path = SPECS) -> list[Use]:
    """How the specs in the folder `specs` serve the run `name` (or a part of it, as NAME/mean); defaults where none does."""
    found = []
    for path in sorted(specs.glob("*.yml")):
        try:
            values = read_yaml(path)
            packages = [package for package in values["packages"] if package["run"].split("/")[0] == name]
            tokens, budget = int(values.get("tokens_per_batch", TOKENS_PER_BATCH)), values.get("budget_tokens")
            budget = budget if budget is None else int(budget)
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            continue  # a spec with a mistake, which `build` tells of
        found += [Use(path.stem, tokens, budget, package.get("placement", "auto")) for package in packages]
    return found or [Use()]


def size_lines(served: Served) -> list[str]:
    """The package's bytes by class of tensor, and in all."""
    classes = {kind: size for kind, size in bytes_by_class(served).items() if size}
    parts = ", ".join(f"{kind} {in_units(size)}" for kind, size in classes.items())
    return [f"  in {served.quantize if served.quantize != 'none' else '16 bits'}: {in_units(sum(classes.values()))}: {parts}"]


def memory_line(use: Use, served: Served, placement: str, needs: Sequence[int]) -> str:
    """What each T4 holds in one kernel, part by part."""
    gpus = len(needs)
    held_by_gpu = weight_bytes(served, gpus, weight_bytes_limit(served, use.tokens_per_batch, gpus))
    logits = gpus * logit_bytes(served, use.tokens_per_batch)
    activations = gpus * activation_bytes(served, use.tokens_per_batch) - logits
    weights = " + ".join(f"{held / GIB:.2f}" for held in held_by_gpu)
    where = f"kernel {use.spec}" if use.spec else "no spec serves it; with a spec's defaults"
    return (
        f"{where}, {'layers on both T4s' if placement == 'split' else 'a copy on each T4'}, batches of "
        f"{use.tokens_per_batch:,} tokens: {in_gib(needs)} GiB of {GPU_BYTES / GIB}: weights {weights}, activations "
        f"{activations / GIB:.2f}, logits {logits / GIB:.2f}, CUDA {CUDA_BYTES / GIB:.2f}"
    )


def in_units(size: int) -> str:
    """Bytes as GB, MB or kB."""
    unit, name = next((unit, name) for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if size >= unit or name == "kB")
    return f"{size / unit:.2f} {name}"


def place(served: Served, tokens_per_batch: int, placement: str) -> tuple[str, tuple[int, ...]]:
    """Where a package goes, and what that needs on each GPU. `auto`: a copy on every GPU if that fits, else split."""
    alone = tuple(gpu_bytes(served, tokens_per_batch))
    is_encoder = served.dimensions.model_type == "bert"
    if placement == "each" or is_encoder or (placement == "auto" and max(alone) <= GPU_BYTES):
        return "each", alone
    return "split", tuple(gpu_bytes(served, tokens_per_batch, GPUS))


def refusal(run: str, served: Served, tokens: int, placement: str, recipe: Path) -> str:
    """What a package that does not fit needs, and each single change that would make it fit."""

    def most(changed: Served, tokens: int, placement: str) -> float:
        return max(place(changed, tokens, placement)[1])

    needs = place(served, tokens, placement)[1]
    smaller = [fewer for fewer in (4096, 2048, 1024) if served.budget_tokens <= fewer < tokens]
    fitting = [fewer for fewer in smaller if most(served, fewer, placement) <= GPU_BYTES][:1]
    changes = {f"tokens_per_batch: {fewer}": most(served, fewer, placement) for fewer in fitting}
    if placement == "each":
        changes["placement: split"] = most(served, tokens, "auto")
    is_encoder = served.dimensions.model_type == "bert"
    for kind in SMALLER.get(served.quantize, ()):
        if is_encoder and kind in GPTQ_BITS:
            continue
        changes[f"pairwise.package.quantize: {kind} in {recipe}"] = most(replace(served, quantize=kind), tokens, placement)
    ways = [f"{text} ({size / GIB:.1f} GiB)" for text, size in changes.items() if size <= GPU_BYTES]
    held = max(weight_bytes(served, len(needs), weight_bytes_limit(served, tokens, len(needs)))) / GIB
    return f"{run} needs {in_gib(needs)} GiB on a GPU ({held:.1f} of it weights), a T4 offers {GPU_BYTES / GIB}; " + (
        f"what would fit: {', or '.join(ways)}" if ways else "no single change makes it fit; take a smaller base model"
    )


def in_gib(sizes: Sequence[int]) -> str:
    """GiB on each GPU, e.g. "9.9", or "12.1 + 11.9" where the layers stand on two."""
    return " + ".join(f"{size / GIB:.1f}" for size in sizes)
