"""The stages that need torch, behind one import that takes seconds and is not paid by --help or by a run that is up to date."""

import logging

import transformers

from postprocess.agreement import agreement
from postprocess.average import average
from postprocess.gptq import check_model as check_gptq
from postprocess.gptq import quantize as gptq
from postprocess.merge import merge, quantise_in_one_pass
from postprocess.rows import validation_ids
from postprocess.trained import check_memory
from postprocess.unmerged import unmerged
from postprocess.untrained import untrained

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
