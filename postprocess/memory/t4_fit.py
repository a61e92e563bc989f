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
    gpu_bytes,
    logit_bytes,
    served_of,
    weight_bytes,
    weight_bytes_limit,
)
from postprocess.run_folder import Run
from preprocess.core.errors import UserError
from preprocess.core.files import read_yaml
from recipes.pairwise.config.schema import GPTQ_BITS

SPECS = Path(__file__).parents[2] / "kaggle_kernels" / "specs"
TOKENS_PER_BATCH = 8192  # a spec's default
SMALLER_BATCHES = (4096, 2048, 1024)
GPUS = 2

# The formats that make a package smaller, by the one that it has.
SMALLER_FORMATS = {
    "none": ("int8", "gptq8", "nf4", "gptq4"),
    "int8": ("nf4", "gptq4"),
    "gptq8": ("gptq4", "nf4"),
}


@dataclass(frozen=True)
class Use:
    """How a kernel serves a run: the spec's name (None: a spec that has only defaults), its batch, budget and placement."""

    spec: str | None = None
    tokens_per_batch: int = TOKENS_PER_BATCH
    budget_tokens: int | None = None
    placement: str = "auto"


def check_target(run: Run) -> None:
    """Check that a run's package will fit Kaggle's two T4s in one of the kernels that serve it.

    The size of the package, and what each T4 will hold in each kernel, are computed and printed before the
    package is made.

    Raises:
        UserError: The package fits in no kernel, or Kaggle's T4s cannot run this kind of model.
    """
    from recipes.pairwise.memory.measure import measure_folder  # noqa: PLC0415  needs torch

    recipe = run.recipe
    # The sizes are read from the files of the base model that the run was trained from.
    served = served_of(recipe, measure_folder(run.weights))
    print(describe_size(served))

    uses = find_uses(recipe.path.stem)
    refusals = []
    for use in uses:
        # A kernel's spec may set another token budget (the most tokens of a row) than the recipe.
        budget_tokens = use.budget_tokens or served.budget_tokens
        served_here = replace(served, budget_tokens=budget_tokens)
        placement, needs = place(served_here, use.tokens_per_batch, use.placement)
        print(f"  {describe_memory(use, served_here, placement, needs)}")
        if max(needs) > GPU_BYTES:
            reason = refusal(
                recipe.path.stem, served_here, use.tokens_per_batch, use.placement, recipe.path
            )
            refusals.append(reason)

    # Kernels differ, e.g. in their batches. One that can hold the package is enough.
    is_refused_by_all = len(refusals) == len(uses)
    if is_refused_by_all:
        raise UserError(f"{recipe.path}: {refusals[0]}")


def find_uses(run: str, specs: Path = SPECS) -> list[Use]:
    """Find how kernels serve a run: a use for each spec that names it, or a spec's defaults where none does."""
    uses = []
    for path in sorted(specs.glob("*.yml")):
        try:
            uses += read_uses(path, run)
        except (UserError, KeyError, TypeError, ValueError, AttributeError):
            continue  # a spec with a mistake, which `build` reports
    return uses or [Use()]


def read_uses(spec_path: Path, run: str) -> list[Use]:
    """Read from a spec, which lists the packages of one kernel, how the kernel serves a run.

    Returns:
        A use for each package of the run in the spec; none where it serves other runs.
    """
    spec = read_yaml(spec_path)
    tokens_per_batch = int(spec.get("tokens_per_batch", TOKENS_PER_BATCH))
    budget_tokens = spec.get("budget_tokens")
    if budget_tokens is not None:
        budget_tokens = int(budget_tokens)

    uses = []
    for package in spec["packages"]:
        run_of_package = package["run"].split("/")[0]
        if run_of_package == run:
            placement = package.get("placement", "auto")
            uses.append(Use(spec_path.stem, tokens_per_batch, budget_tokens, placement))
    return uses


def describe_size(served: Served) -> str:
    """Write the package's bytes, in all and by class of tensor."""
    # Classes that the model lacks are left out.
    sizes = {name: size for name, size in bytes_by_class(served).items() if size > 0}
    classes = ", ".join(f"{name} {in_units(size)}" for name, size in sizes.items())
    number_format = "16 bits" if served.quantize == "none" else served.quantize
    return f"  in {number_format}: {in_units(sum(sizes.values()))}: {classes}"


def describe_memory(use: Use, served: Served, placement: str, needs: Sequence[int]) -> str:
    """Describe in one line what each T4 holds in a kernel: weights, activations, logits and CUDA.

    `placement` and `needs` are what `place` returns.
    """
    # Where GPUs share a model, each of them has a batch in work at the same time, and each GPU keeps the
    # memory for all these batches. activation_bytes counts the logits too, which are shown apart.
    gpus = len(needs)
    logits = gpus * logit_bytes(served, use.tokens_per_batch)
    activations = gpus * activation_bytes(served, use.tokens_per_batch) - logits
    byte_limit = weight_bytes_limit(served, use.tokens_per_batch, gpus)
    held_by_gpu = weight_bytes(served, gpus, byte_limit)
    weights = " + ".join(f"{held / GIB:.2f}" for held in held_by_gpu)

    # E.g. kernel gemma2_cls, a copy on each T4, batches of 8,192 tokens: 9.9 GiB of 14.5: weights …
    kernel = f"kernel {use.spec}" if use.spec else "no spec serves it; with a spec's defaults"
    copies = "layers on both T4s" if placement == "split" else "a copy on each T4"
    return (
        f"{kernel}, {copies}, batches of {use.tokens_per_batch:,} tokens: "
        f"{in_gib(needs)} GiB of {GPU_BYTES / GIB}: weights {weights}, activations "
        f"{activations / GIB:.2f}, logits {logits / GIB:.2f}, CUDA {CUDA_BYTES / GIB:.2f}"
    )


def in_units(size: int) -> str:
    """Write bytes as GB, MB or kB."""
    if size >= 1e9:
        return f"{size / 1e9:.2f} GB"
    if size >= 1e6:
        return f"{size / 1e6:.2f} MB"
    return f"{size / 1e3:.2f} kB"


def place(served: Served, tokens_per_batch: int, placement: str) -> tuple[str, tuple[int, ...]]:
    """Decide whether each GPU gets a copy of the model or all GPUs share one, and compute what that needs.

    With the placement `auto`, a copy is on every GPU if that fits.

    Returns:
        The placement, each or split, and the bytes that it needs: one number for a copy on one GPU,
        which is the same on all of them, or one for each GPU that shares the model.
    """
    needs_of_copy = tuple(gpu_bytes(served, tokens_per_batch))
    copy_fits = max(needs_of_copy) <= GPU_BYTES

    # The runtime has no way to split the layers of an encoder.
    must_be_copied = placement == "each" or served.base.is_encoder
    may_be_copied = placement == "auto" and copy_fits
    if must_be_copied or may_be_copied:
        return "each", needs_of_copy
    return "split", tuple(gpu_bytes(served, tokens_per_batch, GPUS))


def refusal(run: str, served: Served, tokens: int, placement: str, recipe: Path) -> str:
    """Explain what a package that does not fit needs, and each single change that would make it fit.

    For example: gemma2_cls needs 17.9 GiB on a GPU (16.0 of it weights), a T4 offers 14.5; what would fit:
    pairwise.package.quantize: int8 in recipes/gemma2_cls.yml (10.1 GiB), or …
    """
    # What each GPU needs: one number for a model that a GPU holds alone, two where two GPUs share it.
    _, bytes_by_gpu = place(served, tokens, placement)
    gpus = len(bytes_by_gpu)
    byte_limit = weight_bytes_limit(served, tokens, gpus)
    most_weights = max(weight_bytes(served, gpus, byte_limit))
    need = (
        f"{run} needs {in_gib(bytes_by_gpu)} GiB on a GPU ({most_weights / GIB:.1f} of it weights), "
        f"a T4 offers {GPU_BYTES / GIB}"
    )

    fitting_changes = []
    for change, size in list_changes(served, tokens, placement, recipe).items():
        if size <= GPU_BYTES:
            fitting_changes.append(f"{change} ({size / GIB:.1f} GiB)")

    if not fitting_changes:
        return f"{need}; no single change makes it fit; take a smaller base model"
    return f"{need}; what would fit: {', or '.join(fitting_changes)}"


def list_changes(served: Served, tokens: int, placement: str, recipe: Path) -> dict[str, int]:
    """List single changes of a kernel's spec or of the recipe that need less memory.

    Returns:
        For each change, in words such as `tokens_per_batch: 4096`, the bytes on the fullest GPU. They may
        still be too many.
    """
    sizes = {}

    # Smaller batches, of which the largest that fits is listed: still smaller ones only cost time. A batch
    # must hold the longest row.
    for fewer_tokens in SMALLER_BATCHES:
        is_possible = served.budget_tokens <= fewer_tokens < tokens
        size = measure_fullest_gpu(served, fewer_tokens, placement)
        if is_possible and size <= GPU_BYTES:
            sizes[f"tokens_per_batch: {fewer_tokens}"] = size
            break

    # Another placement: layers divided over both GPUs, which `each` forbids.
    if placement == "each":
        sizes["placement: split"] = measure_fullest_gpu(served, tokens, "auto")

    # A smaller format of the weights. GPTQ is for decoders only.
    for quantize in SMALLER_FORMATS.get(served.quantize, ()):
        if served.base.is_encoder and quantize in GPTQ_BITS:
            continue
        smaller = replace(served, quantize=quantize)
        change = f"pairwise.package.quantize: {quantize} in {recipe}"
        sizes[change] = measure_fullest_gpu(smaller, tokens, placement)
    return sizes


def measure_fullest_gpu(served: Served, tokens_per_batch: int, placement: str) -> int:
    """Compute the bytes that the GPU needs which needs most (see `place`)."""
    _, bytes_by_gpu = place(served, tokens_per_batch, placement)
    return max(bytes_by_gpu)


def in_gib(sizes: Sequence[int]) -> str:
    """Write GiB on each GPU, e.g. "9.9", or "12.1 + 11.9" where the layers stand on two."""
    return " + ".join(f"{size / GIB:.1f}" for size in sizes)
