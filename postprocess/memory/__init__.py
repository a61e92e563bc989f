"""How large a packaged model is, and whether it fits the GPUs that will serve it, without a weight being loaded.

The base models' sizes come from recipes/pairwise/memory; `model_size` and `t4_fit` compute with them what a package and its
batches need.
"""
