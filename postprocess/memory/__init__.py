"""How large a packaged model is, and whether it fits the GPUs that will serve it, without a weight being loaded.

`measure` builds a base model on the meta device, `base_model` keeps the numbers in base_models.yml, `model_size` and `t4_fit`
compute with them what a package and its batches need.
"""
