"""`python -m benchmarks.compile_report`: the command of `static.compile_report`."""

import os
import sys

# Interpreted kernels cannot be compiled, and triton reads the variable when it is imported.
os.environ.pop("TRITON_INTERPRET", None)

from benchmarks.static.compile_report import main

if __name__ == "__main__":
    sys.exit(main())
