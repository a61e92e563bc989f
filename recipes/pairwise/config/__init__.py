"""What a recipe may say: the `pairwise:` block, Axolotl's keys, named templates, and what only the base model can judge.

All problems of a recipe are found at once, before Axolotl starts. Only model_checks.py and run_config.py import torch.
"""
