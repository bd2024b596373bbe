"""Output whose reader may leave early: `python -m zoo names | head -1`."""

import os
import sys
from collections.abc import Callable

STATUS = 141
"""What a shell reports for a program that SIGPIPE ended."""


def quiet_pipe(program: Callable[[], int]) -> int:
    """Run a program and write out all that it printed; when the reader of its output has left, end it without a word.

    Returns:
        the program's exit status, or `STATUS` when nobody reads the standard output any more.
    """
    try:
        try:
            return program()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        # Without this, Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return STATUS
