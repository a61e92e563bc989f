"""The Axolotl plugin that trains preference classifiers; a recipe names it as `recipes.pairwise.plugin.PairwisePlugin`."""
