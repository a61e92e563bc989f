"""A trained run in, a Kaggle dataset folder out: merge, quantise, prove agreement, package. `python -m postprocess RECIPE`."""

from preprocess.core.quiet import prepare_imports

prepare_imports()
