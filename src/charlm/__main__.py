"""The command ``charlm``, also ``python -m charlm``."""

import signal
import sys


def main() -> int:
    """Import the command line and run it; return the exit code."""
    caught: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # an import that an exception ends shows a traceback
        signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    from charlm.cli import main as run

    signal.signal(signal.SIGINT, before)
    if caught:
        print("charlm: interrupted", file=sys.stderr)
        return 130
    code = run()
    if before is signal.default_int_handler:  # the work is done, and files are complete
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


if __name__ == "__main__":
    sys.exit(main())
