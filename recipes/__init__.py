"""Recipes, one YAML file for one training run by Axolotl, and `pairwise`, the plugin that they name.

`axolotl train recipes/NAME.yml` trains one; recipes/README.md lists them.
"""
