"""The error for everything that the user can mend, and the decorator that ends a command with it.

Every stage raises UserError; every command-line entry point is decorated with `exits_with_2`.
"""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what is wrong, where (file, row or key), and what to do."""


def exits_with_2(command: Callable) -> Callable:
    """Decorate a command: a UserError becomes one line on stderr and exit code 2, without a traceback."""

    @functools.wraps(command)
    def run_command(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return run_command
