"""What libraries print, fetch or cost when they are imported, and a user can do nothing about: switched off beforehand.

The packages that import such libraries call `prepare_imports` in their __init__.py, which Python runs before any of their
modules: recipes.pairwise, postprocess and kaggle_kernels. Nothing here imports a library.
"""

import atexit
import functools
import gc
import logging
import sys
import warnings
from collections.abc import Callable

# Logger → how its messages begin that are kept back. All others of the same logger are printed.
KEPT_BACK = {
    # Extensions in C++ for other GPUs, or for another Python, that torchao tries in turn.
    "torchao": "Failed to load ",
    # torchao registers its enumerations with PyTorch as older versions of it demanded.
    "torch.utils._pytree": "<enum ",
    # The compiled kernel that refuse_hub_kernels keeps from being fetched; bitsandbytes' own code does its work.
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward ",
    # DeepSpeed, which is imported by runs that do not use it, on every machine without a GPU.
    "DeepSpeed": "Setting accelerator to CPU",
    # PEFT asks transformers for a setting by its former name.
    "transformers.configuration_utils": "`use_return_dict` is deprecated",
    # Axolotl on what this project does otherwise: recipes name their template, and no attention comes from a hub.
    "axolotl.loaders.tokenizer": "No Chat template selected",
    "axolotl.monkeypatch.attention.fa2_hub_kernel": "Pinned the flash-attn2 hub kernel",
}


@functools.cache
def prepare_imports() -> None:
    """Keep back useless warnings of libraries, keep them from running code from a hub, and let Python end at once."""
    for logger_name, beginning in KEPT_BACK.items():
        logging.getLogger(logger_name).addFilter(without(beginning))
    # Polars and datasets sort by an argument that PyArrow has renamed.
    warnings.filterwarnings(
        "ignore", message="Specifying null_placement", category=FutureWarning, module="pyarrow"
    )
    # Axolotl imports fla's kernels for linear attention, which no recipe here uses.
    warnings.filterwarnings("ignore", message="Triton is not supported", module="fla")
    refuse_hub_kernels()
    # At its end Python would look for garbage among the million objects that were imported, for a second or two.
    atexit.register(gc.freeze)


def without(beginning: str) -> Callable[[logging.LogRecord], bool]:
    """Return a filter for a logger, which keeps back the messages that begin so."""

    def lets_pass(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    return lets_pass


def refuse_hub_kernels() -> None:
    """Make the `kernels` library look as if it was not installed, unless it is imported already.

    With it, bitsandbytes' CPU backend downloads a compiled kernel from the Hugging Face hub as soon as it is imported, and
    runs it, on CPUs with AVX512-BF16; transformers does so for some attention implementations. Neither library has a
    setting that prevents this. Both do without it where `import kernels` fails.
    """
    # Python raises ImportError for a module that is None in this dictionary.
    sys.modules.setdefault("kernels", None)
