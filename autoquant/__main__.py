"""What runs as ``autoquant`` and ``python -m autoquant``."""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import NoReturn


def main() -> None:
    """Run the command line; Ctrl-C ends it in one line wherever it comes, imports of other libraries included."""
    interrupted = False

    def interrupt(signum: int, frame: FrameType | None) -> NoReturn:
        nonlocal interrupted
        interrupted = True
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # what is to be cleaned up is cleaned up once
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, interrupt)
    try:
        from autoquant.cli.main import main as command_line

        command_line()
    except SystemExit:
        raise
    except BaseException:
        if not interrupted:
            raise
        # Libraries that are being imported make errors of their own of it.
        print("error: interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
