"""One kind of error for everything that the user can mend, and one way to end a command with it."""

import functools
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input. The message is one line: what was found, where (file, row or key), and what to do."""


def exits_with_2(command: Callable) -> Callable:
    """Decorate a command's body: a UserError becomes one line on stderr and exit code 2, without a traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(2) from None

    return wrapped
