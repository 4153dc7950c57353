"""What needs no GPU: compiled kernels, counted bytes, CPU time of a call, predictions.

Uses `rivals` and `report`.
"""
