"""What runs as ``autoquant`` and ``python -m autoquant``."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from autoquant.errors import INTERRUPTED


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line wherever it comes, imports of other libraries included."""
    interrupted = ended = False

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is to be cleaned up is cleaned up once
        raise KeyboardInterrupt

    def leave() -> None:
        # An interruption of Python text that a library runs from C leaves a mark in the interpreter, with which it ends
        # by the signal itself and not with the exit code. Registered first, this runs last.
        if ended:
            os._exit(INTERRUPTED)

    def swallowed(unraisable: sys.UnraisableHookArgs) -> None:
        # A callback or a destructor of a library was interrupted: nobody saw the exception, so it comes once more.
        if not interrupted or not isinstance(unraisable.exc_value, KeyboardInterrupt):
            sys.__unraisablehook__(unraisable)
            return
        signal.signal(signal.SIGALRM, interrupt)
        signal.setitimer(signal.ITIMER_REAL, 0.01)

    atexit.register(leave)
    sys.unraisablehook = swallowed
    signal.signal(signal.SIGINT, interrupt)
    try:
        from autoquant.cli.main import main as command_line

        command_line()
    except SystemExit as end:
        ended = interrupted and end.code == INTERRUPTED
        raise
    except BaseException:
        if not interrupted:
            raise
        # Libraries that are being imported make errors of their own of it.
        print("error: interrupted", file=sys.stderr, flush=True)
        ended = True
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
