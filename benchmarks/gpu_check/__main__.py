"""Everything a machine with a GPU should run, in one command with a time budget.

    python -m benchmarks.gpu_check [--minutes 9] [--only correctness,ceilings,benchmark,...]

Most important first, stopping at the budget with what there is. The results file is written after
every step, so that a crash loses at most the running one. Exit status 1 if anything failed.
`--device cpu` runs all of it in tiny form through Triton's interpreter: its times mean nothing.
"""

import os
import sys

from benchmarks.gpu_check.options import parse

options = parse(sys.argv[1:])
if options.tiny:
    # Here, because triton reads it once, when it is imported: by what stands below.
    os.environ.setdefault("TRITON_INTERPRET", "1")

from benchmarks.gpu_check.run import run  # noqa: E402

sys.exit(run(options))
