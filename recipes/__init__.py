"""Recipes: one YAML file is one Axolotl run; `pairwise` is the plugin that they name."""
