"""Kaggle kernels from specs: built as one readable file, rehearsed on this machine."""

from preprocess.core.quiet import prepare_imports

prepare_imports()
