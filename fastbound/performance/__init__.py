"""What a call costs: shapes, timing, memory, compiled kernels, and the time they predict.

Uses `operator` and what is below it; `profiling` measures whole layers and uses `models` too.
"""
