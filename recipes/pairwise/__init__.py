"""The Axolotl plugin that trains preference models; a recipe names it as recipes.pairwise.plugin.PairwisePlugin.

plugin.py holds Axolotl's hooks, in the order of a run. Behind them stand config (the recipe checked), data (pairs to batches),
training (losses and trainer) and tracking (metrics, wandb). contract.py says how a run's inputs are made, for all who score
with its weights; cv.py trains all folds; `python -m recipes.pairwise` checks recipes.
"""

from preprocess.core.quiet import prepare_imports

prepare_imports()
