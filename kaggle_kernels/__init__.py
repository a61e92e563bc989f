"""Kaggle kernels from specs, the last stage of the chain.

`build` makes one readable kernel.py of a spec in specs/ and of the modules in runtime/, which run
on Kaggle. `rehearsal` runs it on this machine as Kaggle would, `publish` pushes and submits it.
examples/ holds one built kernel.
"""

from preprocess.core.quiet import prepare_imports

prepare_imports()
