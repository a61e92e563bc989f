"""A PEFT LoRA adapter as a list of changes to a classifier's tensors: products to add, and tensors to put in their place.

Plain, rank-stabilised and weight-decomposed (DoRA) LoRA on linear layers, plain LoRA on embeddings, `rank_pattern`,
`alpha_pattern`, `modules_to_save` and trained biases. Whatever else an adapter_config.json asks for is refused by name.
"""

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from postprocess.weights.checkpoint_reader import Tensors
from preprocess.core.errors import UserError

PREFIX = "base_model.model."
PARTS = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)(\.default)?(\.weight)?"
)
READ = {"peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "init_lora_weights"}
WITHOUT_EFFECT_ON_A_MERGE = {
    "auto_mapping", "base_model_name_or_path", "bias", "corda_config", "ensure_weight_tying", "eva_config", "exclude_modules",
    "inference_mode", "layers_pattern", "layers_to_transform", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "modules_to_save", "peft_version", "qalora_group_size", "revision", "runtime_config",
    "target_modules", "task_type",
}  # fmt: skip
WHOLE_BYTES = 2**28  # every layer of Gemma-2-9b
KEEP_THE_BASE = (True, False, "gaussian", "orthogonal", "eva")  # the other initialisations change the base's weights


@dataclass(frozen=True)
class Change:
    """What a low-rank update adds to one weight: names of its parts in the adapter file, and the factor on B @ A."""

    parts: Mapping[str, str]
    scaling: float


@dataclass(frozen=True)
class Adapter:
    """An adapter's changes by the name of the classifier's tensor."""

    tensors: Tensors
    changes: Mapping[str, Change]
    replacements: Mapping[str, str]

    def delta(self, name: str) -> "Delta | None":
        """What training added to the weight `name`; None where nothing was."""
        return Delta(self.changes[name], self.tensors) if name in self.changes else None

    def without(self, names: Iterable[str]) -> "Adapter":
        """The adapter without what it says of the tensors `names`, which are another one's bytes."""
        kept = [
            {name: value for name, value in part.items() if name not in names} for part in (self.changes, self.replacements)
        ]
        return Adapter(self.tensors, *kept)

    def untrained(self) -> "Adapter":
        """The adapter without its low-rank changes: what it replaces is still replaced."""
        return replace(self, changes={})


class Delta:
    """A weight's low-rank change, in float32 and applied to the weight's rows as they come.

    s B A is multiplied out at once where it is small, so that it has the bits that PEFT gives it, and row by row where it
    is not (an embedding of 256,000 tokens). DoRA's norms are of the whole weight's rows.
    """

    def __init__(self, change: Change, tensors: Tensors):
        self.parts = {name: tensors.get(key).to(torch.float32) for name, key in change.parts.items()}
        self.scaling = change.scaling
        self.is_embedding = "lora_embedding_A" in self.parts
        rows, columns = shape_of(change, tensors)
        self.whole = self._rows(0, rows) if rows * columns * 4 <= WHOLE_BYTES else None

    def _rows(self, start: int, stop: int) -> torch.Tensor:
        if self.is_embedding:
            product = (self.parts["lora_embedding_B"] @ self.parts["lora_embedding_A"][:, start:stop]).T
        else:
            product = self.parts["lora_B"][start:stop] @ self.parts["lora_A"]
        return product.mul_(self.scaling)

    def apply(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """The weight's rows from `start` on after training, float32; `rows` are the base's, in any dtype."""
        stop = start + len(rows)
        changed = self._rows(start, stop) if self.whole is None else self.whole[start:stop]
        changed = changed + rows.to(torch.float32)
        if "lora_magnitude_vector" in self.parts:
            norm = torch.linalg.norm(changed, dim=1)
            changed = (self.parts["lora_magnitude_vector"][start:stop] / norm).view(-1, 1) * changed
        return changed


def read_adapter(tensors: Tensors, settings: Mapping[str, object], config_file: Path) -> Adapter:
    """The changes in an open adapter file. A setting or key that this merge does not know is a UserError."""
    _refuse_unknown(settings, config_file)
    parts: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for key in tensors.names():
        if not key.startswith(PREFIX):
            raise UserError(
                f"{tensors.path}: key {key} does not start with {PREFIX}: a whole model, or not saved by PEFT; put "
                "the training's adapter there"
            )
        if ".original_module." in key:  # with bias: all, PEFT also saves the untrained biases of a module that it replaced
            continue
        name = key.removeprefix(PREFIX).replace(".base_layer.", ".")
        if found := PARTS.fullmatch(name):
            parts.setdefault(found["module"], {})[found["part"]] = key
        else:
            replacements[re.sub(r"\.modules_to_save(\.default)?\.", ".", name)] = key
    changes = {f"{module}.weight": _change(module, keys, tensors, settings) for module, keys in parts.items()}
    for name in sorted(changes.keys() & replacements.keys()):
        if ".base_layer." not in replacements[name]:  # PEFT saves an embedding under LoRA with its base's weights
            raise UserError(
                f"{tensors.path}: {name} is in lora_target_modules and in lora_modules_to_save; train with one of them"
            )
    return Adapter(tensors, changes, replacements)


def _refuse_unknown(settings: Mapping[str, object], config_file: Path) -> None:
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{config_file}: peft_type is {settings.get('peft_type')!r}; only LORA can be merged")
    if settings.get("init_lora_weights", True) not in KEEP_THE_BASE:
        raise UserError(
            f"{config_file}: init_lora_weights is {settings['init_lora_weights']!r}, which changed the base's own weights; "
            "train with init_lora_weights true or gaussian"
        )
    unknown = sorted(key for key, value in settings.items() if value and key not in READ | WITHOUT_EFFECT_ON_A_MERGE)
    if unknown:
        raise UserError(f"{config_file}: {', '.join(unknown)}: this kind of LoRA cannot be merged; train without")


def _change(module: str, keys: Mapping[str, str], tensors: Tensors, settings: Mapping[str, object]) -> Change:
    linear, embedding = {"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"}
    if set(keys) not in (linear, linear | {"lora_magnitude_vector"}, embedding):
        raise UserError(f"{tensors.path}: {module} has the parts {', '.join(sorted(keys))}; this kind of LoRA cannot be merged")
    rank = _by_pattern(module, settings.get("rank_pattern") or {}, settings["r"])
    alpha = _by_pattern(module, settings.get("alpha_pattern") or {}, settings["lora_alpha"])
    found = tensors.shape(keys.get("lora_A") or keys["lora_embedding_A"])[0]
    if found != rank:
        raise UserError(
            f"{tensors.path}: {module} has rank {found}, adapter_config.json says {rank}; they do not belong together"
        )
    _check_parts(module, keys, tensors, rank)
    return Change(keys, alpha / math.sqrt(rank) if settings.get("use_rslora") else alpha / rank)


def _check_parts(module: str, keys: Mapping[str, str], tensors: Tensors, rank: int) -> None:
    """Raise UserError where the parts of one weight's change do not fit each other."""
    shapes = {part: tensors.shape(key) for part, key in keys.items()}
    fitting = {"lora_B": (1, rank), "lora_embedding_B": (1, rank)}
    for part, shape in shapes.items():
        axis, expected = fitting.get(part, (0, rank))
        if part == "lora_magnitude_vector":
            expected = shapes["lora_B"][0]
        dimensions = 1 if part == "lora_magnitude_vector" else 2
        if len(shape) != dimensions or shape[axis] != expected:
            raise UserError(
                f"{tensors.path}: {keys[part]} has the shape {list(shape)}, which does not go with the other parts of "
                f"{module}; train again"
            )


def _by_pattern(module: str, patterns: Mapping[str, float], default: float) -> float:
    """The value of the first pattern that matches the end of a module's name, as PEFT reads rank_pattern and alpha_pattern."""
    return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", module)), default)


def shape_of(change: Change, tensors: Tensors) -> tuple[int, int]:
    """The shape that a weight must have for `change` to fit it."""
    parts, shape = change.parts, tensors.shape
    if "lora_embedding_A" in parts:
        return shape(parts["lora_embedding_A"])[1], shape(parts["lora_embedding_B"])[0]
    return shape(parts["lora_B"])[0], shape(parts["lora_A"])[1]
