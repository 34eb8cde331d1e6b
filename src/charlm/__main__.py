"""The entry point of ``python -m charlm``."""

import sys

from charlm.cli import main

if __name__ == "__main__":
    sys.exit(main())
