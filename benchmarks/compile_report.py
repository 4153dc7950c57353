"""`python -m benchmarks.compile_report`: the command of `static.compile_report`."""

import os
import sys

# Kernels that are interpreted cannot be compiled; the variable is read when triton is imported.
os.environ.pop("TRITON_INTERPRET", None)

from benchmarks.static.compile_report import main

if __name__ == "__main__":
    sys.exit(main())
