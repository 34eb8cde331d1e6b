"""The command ``charlm``, also ``python -m charlm``."""

import os
import signal
import sys

SPINS = "200"  # some microseconds


def main() -> int:
    """Import the command line and run it; return the exit code."""
    # GNU's OpenMP library reads this when torch is loaded. By default a thread that waits for another one
    # spins for milliseconds, and beside a busy process for as long as the other one is not scheduled.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    caught: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if before is signal.default_int_handler:  # an import that an exception ends shows a traceback
        signal.signal(signal.SIGINT, lambda number, frame: caught.append(number))
    from charlm.cli import main as run_command

    signal.signal(signal.SIGINT, before)
    if caught:
        print("charlm: interrupted", file=sys.stderr)
        return 130
    code = run_command()
    if before is signal.default_int_handler:  # the work is done, and files are complete
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    return code


def run() -> None:
    """Run the command and end the process with its exit code."""
    if os.environ.get("WORLD_SIZE", "1") == "1":
        sys.exit(main())
    try:
        code = main()
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    from charlm.training.distributed import end_process

    end_process(code)


if __name__ == "__main__":
    run()
