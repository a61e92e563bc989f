"""Silence messages of libraries that a user can do nothing about.

Imports transformers, and so is imported only by what needs it anyway.
"""

import logging

import transformers


def silence_libraries() -> None:
    """Keep transformers' and torchao's warnings and progress bars off the screen."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    # torchao warns that its compiled extensions do not fit this torch; nothing here uses them.
    logging.getLogger("torchao").setLevel(logging.ERROR)
