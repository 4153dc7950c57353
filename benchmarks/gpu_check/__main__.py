"""Everything a machine with a GPU should run, in one command with a time budget.

    python -m benchmarks.gpu_check [--minutes 9] [--only correctness,ceilings,benchmark,...]

The most important steps come first, and the check stops when the budget ends. It writes the results
file after every step, so that a crash loses only the step that was running. The exit status is 1 if
anything failed. `--device cpu` runs everything at tiny sizes in Triton's interpreter, where times
mean nothing.
"""

import os
import sys

from benchmarks.gpu_check.options import parse

options = parse(sys.argv[1:])
if options.tiny:
    # Set here, because triton reads it when the imports below import triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.gpu_check.run import run  # noqa: E402

sys.exit(run(options))
