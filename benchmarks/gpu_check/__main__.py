import sys

from benchmarks.gpu_check.session import main

sys.exit(main())
