"""What a call costs: shapes, memory, compiled kernels and predicted times.

Uses `operator` and what is below it; `profiling`, which measures whole layers, and `warming` use
`models` too.
"""
