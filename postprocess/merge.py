"""Base weights and an adapter → one model in float16, tensor by tensor, the head included.

Every weight is computed in float32 and rounded once. The names are those of the model that transformers builds from the
base's configuration for the contract's head: a classifier has no lm_head, a causal LM has one unless it is the embedding
(tied, in no file), an encoder's missing prefix is added. A full fine-tune goes the same way, without an adapter, and so
does a base model that nobody trained.
"""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from postprocess.adapter import Adapter, changed_shape, read_adapter
from postprocess.run import ADAPTER, Run, adapter_settings
from postprocess.skeleton import LABELLED, Skeleton, model_skeleton
from postprocess.tensors import SHARD_BYTES, Tensors, open_tensors, write_tensors
from preprocess.errors import UserError
from preprocess.files import atomic_folder

OLD_NAMES = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}


def merge(run: Run, out: Path, dtype: torch.dtype = torch.float16, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the merged model of `run` with its configuration and tokenizer as the folder `out`.

    Everything is checked from the files' headers before a weight is read. Raises UserError where base and adapter do not
    belong together, the head is missing, or a weight does not fit `dtype`.
    """
    skeleton = model_skeleton(run.weights, run.contract)
    with open_sources(run, skeleton) as (base, sources, adapter), atomic_folder(out) as folder:
        merged = merged_tensors(skeleton, base, sources, adapter, dtype)
        write_tensors(folder, list(skeleton.shapes), merged, shard_bytes)
        skeleton.config.dtype = dtype
        skeleton.config.save_pretrained(folder)
        for file in run.tokenizer_files():
            shutil.copyfile(file, folder / file.name)


@contextlib.contextmanager
def open_sources(run: Run, skeleton: Skeleton) -> Iterator[tuple[Tensors, dict[str, str], Adapter | None]]:
    """The open base, its names by the skeleton's, and the open adapter where the run has one: checked to fit each other."""
    with contextlib.ExitStack() as stack:
        base = stack.enter_context(open_tensors(run.weights))
        adapter = None
        if run.has_adapter:
            tensors = stack.enter_context(open_tensors(run.folder / ADAPTER[0]))
            adapter = read_adapter(tensors, adapter_settings(run.folder), run.folder / ADAPTER[1])
        sources = base_names(base, skeleton)
        check_fit(skeleton, base, sources, adapter, has_own_head=run.contract.head in LABELLED)
        yield base, sources, adapter


def base_names(base: Tensors, skeleton: Skeleton) -> dict[str, str]:
    """The model's name for each tensor of the base checkpoint that it has, as {model's: checkpoint's}."""
    names = {}
    for found in base.names():
        name = found
        for old, new in OLD_NAMES.items():
            name = name.replace(old, new)
        for candidate in (name, f"{skeleton.prefix}.{name}"):
            if candidate in skeleton.shapes:
                names[candidate] = found
    return names


def check_fit(
    skeleton: Skeleton, base: Tensors, sources: Mapping[str, str], adapter: Adapter | None, *, has_own_head: bool
) -> None:
    """Every tensor has one source of its own shape, every key of the adapter a place; else a UserError."""
    changes = adapter.changes if adapter else {}
    replaced = adapter.replacements if adapter else {}
    if adapter:
        if has_own_head:
            _check_head(skeleton, adapter)
        _check_tied(skeleton, adapter)
        if unused := sorted((changes.keys() | replaced.keys()) - skeleton.shapes.keys()):
            kind = skeleton.config.architectures[0]
            raise UserError(
                f"{adapter.tensors.path}: {unused[0]} is not part of {kind} in {base.path}: an adapter of another base"
            )
    for name, shape in skeleton.shapes.items():
        if name not in replaced and name not in sources:
            what = "head" if name in skeleton.head else "weight"
            either = f" and not in {adapter.tensors.path.name}; list it in lora_modules_to_save" if adapter else ""
            raise UserError(f"{base.path}: the {what} {name} is not there{either}; train again")
        found = adapter.tensors.shape(replaced[name]) if name in replaced else base.shape(sources[name])
        if found != shape:
            path = adapter.tensors.path if name in replaced else base.path
            raise UserError(f"{path}: {name} has the shape {list(found)}, the model needs {list(shape)}")
        if name in changes and changed_shape(adapter, name) != shape:
            raise UserError(
                f"{adapter.tensors.path}: the change of {name} is for the shape {list(changed_shape(adapter, name))}, in "
                f"{base.path} it has {list(shape)}: an adapter of another base"
            )


def _check_head(skeleton: Skeleton, adapter: Adapter) -> None:
    if not any(name in adapter.replacements for name in skeleton.head):
        raise UserError(
            f"{adapter.tensors.path}: no head ({', '.join(skeleton.head)}) in the adapter, its answers would be random; train "
            "with task type SEQ_CLS (model_type: AutoModelForSequenceClassification)"
        )


def _check_tied(skeleton: Skeleton, adapter: Adapter) -> None:
    for name, source in skeleton.tied.items():
        if found := {name, source} & (adapter.changes.keys() | adapter.replacements.keys()):
            raise UserError(
                f"{adapter.tensors.path}: {', '.join(sorted(found))} was trained, but {name} and {source} are one tensor in "
                "this base, and the adapter changed one of the two; train without"
            )


def merged_tensors(
    skeleton: Skeleton, base: Tensors, sources: Mapping[str, str], adapter: Adapter | None, dtype: torch.dtype
) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of the model in `dtype`, one at a time; one that is not finite there is a UserError."""
    for name in skeleton.shapes:
        tensor = base.get(sources[name]) if name in sources else None
        if adapter:
            tensor = adapter.apply(name, tensor)
        rounded = tensor.to(dtype) if tensor.is_floating_point() else tensor
        if not torch.isfinite(rounded).all():
            kind = f"once it is {dtype}: its values are too large" if torch.isfinite(tensor).all() else "before it is rounded"
            raise UserError(f"{base.path}: {name} is not finite {kind}; train again, or fetch the model again")
        yield name, rounded
