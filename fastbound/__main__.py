"""`python -m fastbound` does the same as the console script `fastbound`."""

import sys

from fastbound.cli import main

if __name__ == "__main__":
    sys.exit(main())
