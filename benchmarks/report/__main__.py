import sys

from benchmarks.report.rows import main

sys.exit(main())
