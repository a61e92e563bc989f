"""The stages that need torch, behind one import that takes seconds and is not paid by --help or by a run that is up to date."""

import logging

import transformers

from postprocess.agreement.gate import agreement
from postprocess.agreement.reference_model import check_memory
from postprocess.agreement.validation_rows import validation_ids
from postprocess.gptq.quantize import check_model as check_gptq
from postprocess.gptq.quantize import quantize as gptq
from postprocess.weights.average_lora import average
from postprocess.weights.merge import merge, quantise_in_one_pass
from postprocess.weights.nf4_base_plus_adapter import unmerged
from postprocess.zero_shot.base_model_run import untrained

__all__ = [
    "agreement",
    "average",
    "check_gptq",
    "check_memory",
    "gptq",
    "merge",
    "quantise_in_one_pass",
    "unmerged",
    "untrained",
    "validation_ids",
]

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
logging.getLogger("torchao").setLevel(logging.ERROR)
