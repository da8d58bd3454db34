"""Ctrl-C in the seconds in which a program imports what it needs: one line and status 130, no traceback.

A program calls end_quietly() before its imports; once they are done run_program calls raise_again().
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def end_quietly() -> None:
    """From here on SIGINT ends the process, which has nothing to tidy up yet; if ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def raise_again() -> None:
    """Have SIGINT raise KeyboardInterrupt, as it does in Python."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> None:
    # An exception could be swallowed or wrapped by a library that is being imported.
    os.write(2, b"error: interrupted\n")
    os._exit(128 + number)
