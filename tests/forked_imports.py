"""What each run in a fork needs: imported once, by the process that is forked (see forked.py)."""

# ruff: noqa: E402, F401

import gc

from preprocess.core.quiet import prepare_imports

gc.disable()
prepare_imports()

import axolotl.cli.train
import axolotl.core.builders
import axolotl.train
import deepspeed
import liger_kernel.transformers.monkey_patch
import torchao

import recipes.pairwise.plugin

# Training collects garbage several times. Half a second each time would go into looking at all that has been imported.
gc.freeze()
gc.enable()
