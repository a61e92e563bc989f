"""Kaggle kernels from specs: built as one readable file, rehearsed on this machine."""
