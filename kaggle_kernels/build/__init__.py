"""From a spec to a kernel: everything that is decided before anything runs.

A spec is a YAML file that describes one Kaggle kernel. `spec` reads and checks it, `memory_fit` decides whether its models fit
two T4s, `bundle` writes the kernel as one readable file, `packages` checks the models that it will be run with, and
`ensemble_weights` fits how an ensemble mixes them, on the rows of `ensemble_rows`. `listing` prints all specs in a table.
"""
