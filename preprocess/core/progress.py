"""Progress bars, drawn on a terminal alone, so that the output of two runs is the same elsewhere."""

import sys
from collections.abc import Iterable

from rich.console import Console
from rich.progress import track


def show_progress(steps: Iterable, label: str) -> Iterable:
    """Yield the steps of a loop, and draw a bar with a label meanwhile."""
    return track(
        steps,
        label,
        console=Console(stderr=True, highlight=False, markup=False),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
