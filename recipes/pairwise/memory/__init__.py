"""What a base model takes, without a weight being loaded: its tensors, and the memory of training it.

`measure` builds a base model on the meta device, `base_model` keeps the numbers in base_models.yml. `training_step` computes
with them what each GPU of a training holds, `hardware` compares that with the GPUs that a recipe is for.
"""
