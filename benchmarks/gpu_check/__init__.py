"""`python -m benchmarks.gpu_check`: everything a machine with a GPU should run, in a time budget.

Uses `rivals`, `report` and fastbound.
"""
