"""One call, forward and backward: checks, autograd functions, registered operators and engines.

Uses `truth`, `dispatch` and `kernels`.
"""
