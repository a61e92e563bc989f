"""A base model measured without weights: its tensors, and the memory of a batch, by building and running it on the meta device.

Tensors there have a shape and no bytes, so that any model fits. What PyTorch would hold at the worst moment of a forward
pass is counted operation by operation.
"""

import contextlib
import copy
import weakref
from collections.abc import Iterable
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig

from preprocess.core.errors import UserError
from recipes.pairwise.config.model_checks import build_empty_model, read_config
from recipes.pairwise.memory.base_model import BaseModel, BatchBytes, Weight

SHORT_ROW = 64  # tokens
LONG_ROW = 2048  # tokens, or as many as the model has positions
SHORT_ROWS = 32  # in a batch


def measure_folder(folder: Path) -> BaseModel:
    """Measure the model whose config.json is in a folder."""
    return measure(read_config(str(folder), None))


def measure(config: PretrainedConfig) -> BaseModel:
    """Measure the classifier, and the causal LM where there is one, that transformers builds of a configuration.

    Raises:
        UserError: Transformers has no classifier for it, or it cannot be run without weights.
    """
    # As the kernel on Kaggle loads the model: in float16, without a cache of keys and values. The soft cap
    # comes last, as only some recipes ask for it.
    config = copy.deepcopy(config)
    config.dtype = torch.float16
    config.use_cache = False
    softcap = getattr(config, "attn_logit_softcapping", None)
    if softcap is not None:
        config.attn_logit_softcapping = None
    if config.pad_token_id is None:
        config.pad_token_id = 0  # a classifier wants one for batches

    classifier = build_empty_model(config, "score").eval()
    is_encoder = not any(getattr(module, "is_causal", False) for module in classifier.modules())
    weights, score_head = split_weights(classifier)
    heads = {"score": score_head}
    if not is_encoder:
        # Some reward models have a class of their own, and no causal LM beside it.
        with contextlib.suppress(UserError):
            _, heads["label_tokens"] = split_weights(build_empty_model(config, "label_tokens"))

    text_config = config.get_text_config()
    positions = getattr(text_config, "max_position_embeddings", None)
    batches = {"plain": measure_batches(classifier, positions)}
    if softcap is not None:
        # Only eager attention applies the soft cap.
        config.attn_logit_softcapping = softcap
        config._attn_implementation = "eager"
        capped_classifier = build_empty_model(config, "score").eval()
        batches["softcap"] = measure_batches(capped_classifier, positions)

    return BaseModel(
        model_type=config.model_type,
        is_encoder=is_encoder,
        positions=positions,
        vocabulary=text_config.vocab_size,
        weights=weights,
        heads=heads,
        batches=batches,
    )


def split_weights(model: torch.nn.Module) -> tuple[tuple[Weight, ...], tuple[Weight, ...]]:
    """List the tensors of a model that have bytes of their own.

    A tied tensor has none: it is another name of a tensor that is listed, as the output layer of many
    models is the embedding. Transformers keeps the names of all of them in `all_tied_weights_keys`.

    Returns:
        Those of the base model, and those of the head.
    """
    base_weights = []
    head_weights = []
    for module_name, module in model.named_modules():
        for parameter_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{parameter_name}"
            is_tied = name in model.all_tied_weights_keys
            if is_tied:
                continue

            # The base model lies below one attribute, mostly `model`. All else is the head.
            is_of_base = name.startswith(f"{model.base_model_prefix}.")
            shape = tuple(parameter.shape)
            if is_of_base:
                kind = find_kind(module, parameter_name)
                base_weights.append(Weight(name, kind, shape))
            else:
                head_weights.append(Weight(name, "head", shape))
    return tuple(base_weights), tuple(head_weights)


def find_kind(module: torch.nn.Module, parameter_name: str) -> str:
    """Name the kind of a base model's tensor."""
    if isinstance(module, torch.nn.Embedding):
        return "embedding"
    # The weights of linear layers are what is quantised.
    if isinstance(module, torch.nn.Linear):
        return "linear" if parameter_name == "weight" else "bias"
    return "norm"


def measure_batches(model: torch.nn.Module, positions: int | None) -> BatchBytes:
    """Measure three batches, and compute from them how memory grows with tokens and with the length of a row.

    One batch is of short rows, where the MLP needs most memory. The other two are one long row each, where
    attention needs most: for each token a constant, and some bytes for each token of the row that it
    attends to:

        bytes per token = constant + bytes per score × length of the row

    Two lengths solve this for its two unknowns. 1,224 bytes per token in a row of 1,024 tokens and 2,248 in
    one of 2,048 are 1 byte per score and a constant of 200.

    Raises:
        UserError: The model looks at values that tensors on the meta device lack.
    """
    long_row = min(LONG_ROW, positions or LONG_ROW)
    half_row = long_row // 2
    try:
        short_bytes = count_peak_bytes(model, SHORT_ROWS, SHORT_ROW)
        half_bytes = count_peak_bytes(model, 1, half_row)
        long_bytes = count_peak_bytes(model, 1, long_row)
    except (RuntimeError, NotImplementedError) as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"{type(model).__name__} cannot be run without weights ({first_line[:200]})"
        ) from None

    # The slope and the constant of the line through both long rows.
    per_token_in_long = long_bytes / long_row
    per_token_in_half = half_bytes / half_row
    per_score = (per_token_in_long - per_token_in_half) / (long_row - half_row)
    constant = per_token_in_long - per_score * long_row

    tokens_of_short_rows = SHORT_ROWS * SHORT_ROW
    return BatchBytes(
        mlp_per_token=round(short_bytes / tokens_of_short_rows),
        attention_per_token=round(constant),
        attention_per_score=round(per_score),
    )


def count_peak_bytes(model: torch.nn.Module, rows: int, length: int) -> int:
    """Count the most bytes that a forward pass holds at one time beside weights and inputs.

    Attention is PyTorch's unfused kernel, which any GPU can run. It holds the scores of all pairs of tokens.
    """
    with torch.device("meta"):
        ids_bt = torch.ones(rows, length, dtype=torch.long)
        mask_bt = torch.ones(rows, length, dtype=torch.long)

    # Weights and inputs are there before the pass, and are not counted.
    tensors_before = [*model.parameters(), *model.buffers(), ids_bt, mask_bt]
    peak = PeakBytes(tensors_before)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), peak:
        model(input_ids=ids_bt, attention_mask=mask_bt)
    return peak.highest


class PeakBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that are alive, but for those that were there before."""

    def __init__(self, tensors_before: Iterable[torch.Tensor]):
        super().__init__()
        self.alive = 0
        self.highest = 0
        # Tensors may share a storage. It is forgotten when the last of them is gone.
        self.counted = weakref.WeakKeyDictionary()
        for tensor in tensors_before:
            self.counted[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        # Models ask whether a mask has padding at all. Without values, the answer that needs more memory.
        if function is torch.ops.aten._local_scalar_dense.default:
            return False

        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.count_storage(tensor.untyped_storage())
        return result

    def count_storage(self, storage) -> None:
        """Count a storage that was not seen before, until it is freed."""
        if storage in self.counted:
            return
        self.counted[storage] = True
        self.add_bytes(storage.nbytes())
        weakref.finalize(storage, self.add_bytes, -storage.nbytes())

    def add_bytes(self, size: int) -> None:
        """Add bytes that came to life, or subtract those that were freed."""
        self.alive += size
        self.highest = max(self.highest, self.alive)
