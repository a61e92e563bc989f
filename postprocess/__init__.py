"""A trained run in, a Kaggle dataset folder out: merge, quantise, prove agreement, package. `python -m postprocess RECIPE`."""
