"""The graph from votes to a rehearsed kernel (`pairwise make`): recipes and specs say its edges, recipes/Snakefile its steps.

Snakemake has an environment of its own, .venv-graph, and imports nothing of this project: it gets the edges as a JSON file.
"""
