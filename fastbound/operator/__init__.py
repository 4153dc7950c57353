"""One call, forward and backward: checks, the autograd functions, the operators and their engines.

Uses `truth`, `dispatch` and `kernels`.
"""
