"""What comes before the first stage of postprocessing that has something to do. pipeline.py calls this.

What needs torch is imported late: that takes seconds, which a run that is up to date need not wait for.
"""

import shutil
import sys
import time
from dataclasses import dataclass

import click

from postprocess.memory.t4_fit import check_target
from postprocess.run_folder import Run
from recipes.pairwise.config.schema import GPTQ_BITS


@dataclass
class Preparation:
    """What comes once, before the first of a run's stages that has something to do."""

    run: Run
    is_done: bool = False

    def ensure(self) -> None:
        """Import torch, check that the run can be packaged on this machine, remove the old package.

        Raises:
            UserError: The models do not fit this machine or a T4, or GPTQ cannot quantise the model.
        """
        if self.is_done:
            return

        import_torch()
        from postprocess.gptq.quantize import check_model
        from postprocess.memory.comparison_fit import check_comparison

        check_comparison(self.run)
        if self.run.recipe.pairwise.package.quantize in GPTQ_BITS:
            check_model(self.run)
        check_target(self.run)

        # What the package was made from has changed. If a stage fails, no old package may be left.
        shutil.rmtree(self.run.folder / "package", ignore_errors=True)
        self.is_done = True


def import_torch() -> None:
    """Import torch and the libraries on top of it, silenced; print the seconds of the first import."""
    is_first_import = "peft" not in sys.modules
    started = time.perf_counter()

    import peft  # noqa: F401  brings torch
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    if is_first_import:
        seconds = time.perf_counter() - started
        click.echo(f"{'start-up':<10} {seconds:7.1f} s   torch, transformers, peft")
